"""Triton's kernels, in Triton's interpreter on the CPU, beside those in torch.

The interpreter must be chosen before Triton is imported, and torch imports it. So the tests of this file are skipped but for
one, which runs them in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import kernels, training
from pyro_lottery.kernels import Layout, torch_path
from tests.support import tiny

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [torch.Size(s) for s in [(16, 3, 3, 3), (32, 16, 3, 3), (10, 32), (10,)]]


needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_all_in_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="runs these tests")
@pytest.mark.slow
def test_all_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "11 passed, 1 skipped" in done.stdout


@pytest.fixture
def triton_path():
    from pyro_lottery.kernels import triton_path

    return triton_path


@pytest.fixture(params=[1.0, 0.4, 0.0])
def layout(request):
    torch.manual_seed(0)
    masks = [torch.rand(s) < request.param if len(s) > 1 else None for s in SHAPES]
    return Layout(SHAPES, masks)


@needs_interpreter
def test_kl_and_gradients_are_those_of_torch(triton_path, layout):
    n = layout.offsets[-1]
    loc, log_scale, w = torch.randn(n), torch.randn(n) - 4, torch.randn(n)
    m, s, weight = torch.randn(4), torch.rand(4) + 0.5, torch.rand(4)
    expected = torch_path.kl(layout, loc, log_scale, m, s)
    found = triton_path.kl(layout, loc, log_scale, m, s)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    g = [torch.randn(count) for count in layout.kept]
    g[1] = None
    for factor in (weight, None):
        mine = triton_path.sample_grad(layout, g, w, loc, log_scale, m, s, factor)
        theirs = torch_path.sample_grad(layout, g, w, loc, log_scale, m, s, factor)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@needs_interpreter
def test_a_sample_is_loc_plus_scale_times_standard_noise(triton_path, layout):
    n = layout.offsets[-1]
    loc = torch.randn(n)
    torch.manual_seed(1)
    _, noise = triton_path.sample(layout, torch.zeros(n), torch.zeros(n))
    torch.manual_seed(1)
    dense, kept = triton_path.sample(layout, loc, torch.full((n,), -2.0))
    torch.testing.assert_close(kept, loc + torch.tensor(-2.0).exp() * noise)
    assert torch.equal(dense, layout.scatter(kept))
    assert not torch.equal(triton_path.sample(layout, loc, torch.zeros(n))[1], kept) or n == 0


@needs_interpreter
def test_noise_is_standard_normal_and_never_that_of_another_seed(triton_path):
    layout, zeros = Layout([torch.Size((40_000,))]), torch.zeros(40_000)
    torch.manual_seed(1)
    first, second = (triton_path.sample(layout, zeros, zeros)[1].double() for _ in range(2))
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((first**power).mean() - moment) < 4 * (variance / len(first)) ** 0.5
    assert abs((first * second).mean()) < 4 / len(first) ** 0.5
    # seeds that differ above the low 32 bits alone
    calls = []
    for seed in (5, 5 + 2**40):
        out = torch.empty(1024)
        triton_path._sample[(1,)](
            zeros, zeros, zeros, torch.tensor(seed), out, out, 1024, MASKED=False, BLOCK=triton_path.BLOCK
        )
        calls.append(out.clone())
    assert not torch.equal(*calls)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perturb_is_mean_plus_noise_with_its_slope(triton_path, dtype):
    torch.manual_seed(0)
    mean, variance = torch.randn(2, 4, 8, 40, dtype=dtype), torch.rand(2, 4, 8, 40, dtype=dtype) + 0.5
    variance[0] = 0
    out, rate = triton_path.perturb(mean, variance)
    assert out.dtype == rate.dtype == dtype
    assert torch.equal(out[0], mean[0])
    assert not rate[0].any()
    noise = (out - mean)[1].float() / variance[1].float().sqrt()
    assert abs(noise.mean()) < 4 / len(noise.flatten()) ** 0.5
    assert abs(noise.square().mean() - 1) < 4 * (2 / noise.numel()) ** 0.5 + 0.02
    if dtype == torch.float32:
        torch.testing.assert_close(rate[1] * 2 * variance[1], (out - mean)[1], rtol=1e-3, atol=1e-4)
    variance[1, 0, 0, 0] = float("nan")
    assert triton_path.perturb(mean, variance)[0][1, 0, 0, 0].isnan()


@needs_interpreter
@pytest.mark.parametrize("estimator", ["weights", "local"])
def test_a_training_step_takes_them(triton_path, estimator):
    x, y, found = torch.randn(6, 1, 4, 4), torch.tensor([0, 1, 2] * 2), {}
    for choice in ("triton", "torch"):
        model, guide = tiny()
        mask = {name: torch.arange(v.numel()).view(v.shape) % 3 > 0 for name, v in model.initial_values().items()}
        optimizer = torch.optim.Adam(pl.guides.parameter_groups(model, guide, 1e-4))
        with kernels.using(choice), pl.handlers.sparsify(mask), pl.guides.compressed(guide):
            assert kernels.backend(torch.zeros(1)) is (triton_path if choice == "triton" else torch_path)
            assert kernels.backend(torch.zeros(1, dtype=torch.double)) is torch_path
            found[choice] = training.step(model, guide, pl.ELBO(estimator=estimator), optimizer, x, y)
        assert all(p.isfinite().all() for p in guide.parameters())
    nll, tempered_kl = zip(*(sums[:2] for sums in found.values()), strict=True)
    torch.testing.assert_close(*tempered_kl)  # which no noise changes
    assert abs(nll[0] - nll[1]) < 0.2 * nll[1]
