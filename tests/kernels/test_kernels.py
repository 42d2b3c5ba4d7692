import os
import shutil
import subprocess
import sys

import pytest
import torch
from scipy import stats

from pyro_lottery import kernels
from pyro_lottery.kernels import Layout, compiled, native, torch_path

needs_compiler = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))
BACKENDS = [pytest.param(compiled, marks=needs_compiler, id="compiled"), pytest.param(torch_path, id="torch")]
SHAPES = [torch.Size(s) for s in [(5, 3, 3, 2), (5,), (700, 20), (20,), (1,)]]


@pytest.fixture(params=[False, True], ids=["dense", "masked"])
def layout(request):
    torch.manual_seed(7)
    masks = [torch.rand(s) < 0.3 if len(s) > 1 and request.param else None for s in SHAPES]
    return Layout(SHAPES, masks)


def parameters(layout):
    count = layout.offsets[-1]
    return torch.randn(count), torch.randn(count) - 3


def priors(layout):
    return torch.randn(len(layout.shapes)), torch.rand(len(layout.shapes)) + 0.5


def reference_kl(layout, loc, log_scale, m, s):
    q = [
        torch.distributions.Normal(a, b.exp()) for a, b in zip(layout.parts(loc), layout.parts(log_scale), strict=True)
    ]
    p = [torch.distributions.Normal(a, b) for a, b in zip(m, s, strict=True)]
    return torch.stack([torch.distributions.kl_divergence(a, b).sum() for a, b in zip(q, p, strict=True)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_standard_normal_by_kolmogorov_smirnov(backend):
    torch.manual_seed(0)
    values = backend.normal(1_500_000, torch.zeros(1)).double()
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((values**power).mean() - moment) < 4 * (variance / len(values)) ** 0.5
    for lag in (1, 2, 64, 128, 256):  # the pairs of Box-Muller lie 64 apart
        assert abs((values[lag:] * values[:-lag]).mean()) < 4 / len(values) ** 0.5
    assert values.abs().max() > 4.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_are_independent_of_each_other(backend):
    torch.manual_seed(0)
    draws = torch.stack([backend.normal(3, torch.zeros(1)) for _ in range(20_000)]).double()
    assert (draws.mean(0).abs() < 4 / 20_000**0.5).all()
    assert ((draws[1:] * draws[:-1]).mean(0).abs() < 4 / 20_000**0.5).all()


def test_no_chunk_of_noise_is_drawn_twice():
    """Two draws whose seeds agree in the low 32 bits, all that torch's own seeding keeps, differ in every chunk."""
    count = 11 * torch_path.CHUNK + 5  # weights of resnet18
    chunks = [
        part for seed in (1, 1 + 2**40) for part in torch_path.fill_(torch.empty(count), seed).split(torch_path.CHUNK)
    ]
    assert len({tuple(chunk[:5].tolist()) for chunk in chunks}) == len(chunks) == 24


@pytest.mark.slow
def test_one_seed_gives_the_same_bits_on_any_number_of_threads():
    code = (
        "import hashlib, torch; from pyro_lottery import kernels; from pyro_lottery.kernels import Layout, compiled, native\n"
        "layout = Layout([torch.Size((2_500_001,)), torch.Size((9,))]); n = layout.offsets[-1]\n"
        "loc, log_scale = torch.linspace(-1, 1, n), torch.linspace(-5, -1, n)\n"
        "for backend in [kernels.torch_path] + [compiled] * (native.problem() is None):\n"
        "    torch.manual_seed(3); out = [backend.normal(n, loc), *backend.sample(layout, loc, log_scale)]\n"
        "    out += backend.perturb(loc.clone(), log_scale.exp())\n"
        "    print(hashlib.sha256(b''.join(t.numpy().tobytes() for t in out)).hexdigest())"
    )
    found = {
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": n}, check=True,
                       capture_output=True, text=True).stdout
        for n in ("1", "3")
    }  # fmt: skip
    assert len(found) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_is_loc_plus_scale_times_noise_and_zero_elsewhere(backend, layout):
    loc, log_scale = parameters(layout)
    torch.manual_seed(1)
    noise = backend.normal(len(loc), loc)
    torch.manual_seed(1)
    dense, kept = backend.sample(layout, loc, log_scale)
    assert torch.equal(layout.keep(dense), kept)
    torch.testing.assert_close(layout.keep(dense), loc + log_scale.exp() * noise, rtol=1e-5, atol=1e-6)
    assert dense.count_nonzero() == len(loc)
    assert len(dense) == layout.total


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_kl_and_gradients_are_autograds(backend, layout):
    (loc, log_scale), (m, s) = parameters(layout), priors(layout)
    mean, variance = backend.moments(layout, loc, log_scale)
    torch.testing.assert_close(mean, layout.scatter(loc))
    torch.testing.assert_close(variance, layout.scatter((2 * log_scale).exp()), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        backend.kl(layout, loc, log_scale, m, s), reference_kl(layout, loc, log_scale, m, s), rtol=1e-5, atol=1e-4
    )

    weight = torch.rand(len(SHAPES))
    g = [torch.randn(shape) for shape in SHAPES]
    _, kept = backend.sample(layout, loc, log_scale)
    a, b = loc.clone().requires_grad_(), log_scale.clone().requires_grad_()
    noise = (kept - loc) / log_scale.exp()
    sample = layout.views(layout.scatter(a + b.exp() * noise))
    (
        sum((x * y).sum() for x, y in zip(sample, g, strict=True)) + (weight * reference_kl(layout, a, b, m, s)).sum()
    ).backward()
    for got, expected in zip(
        backend.sample_grad(layout, layout.kept_of(g), kept, loc, log_scale, m, s, weight),
        (a.grad, b.grad),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)

    h = [torch.randn(shape) for shape in SHAPES]
    a, b = loc.clone().requires_grad_(), log_scale.clone().requires_grad_()
    means, variances = layout.views(layout.scatter(a)), layout.views(layout.scatter((2 * b).exp()))
    loss = sum((x * y).sum() for x, y in zip([*means, *variances], g + h, strict=True))
    (loss + (weight * reference_kl(layout, a, b, m, s)).sum()).backward()
    got = backend.moments_grad(layout, layout.kept_of(g), layout.kept_of(h), loc, log_scale, m, s, weight)
    for mine, expected in zip(got, (a.grad, b.grad), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sites_without_gradient_and_without_kl_get_zeros(backend, layout):
    (loc, log_scale), (m, s) = parameters(layout), priors(layout)
    nothing = [None] * len(SHAPES)
    for grads in (
        backend.sample_grad(layout, nothing, loc + 1, loc, log_scale, m, s, None),
        backend.moments_grad(layout, nothing, nothing, loc, log_scale, m, s, None),
    ):
        assert all(not g.any() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_perturb_has_the_right_moments_and_derivative(backend):
    mean, variance = torch.full((200_000,), 2.0), torch.full((200_000,), 0.25)
    variance[:10] = 0
    out, rate = backend.perturb(mean.clone(), variance.clone())
    assert torch.equal(out[:10], mean[:10])
    assert not rate[:10].any()
    noise = (out[10:] - 2) / 0.5
    assert abs(noise.mean()) < 4 / len(noise) ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / len(noise)) ** 0.5
    torch.testing.assert_close(rate[10:], noise / (2 * 0.5), rtol=1e-4, atol=1e-5)


ODD = torch.tensor([0.0, 1.0, -1.0, 100.0, -200.0, torch.nan, torch.inf, -torch.inf])


def kind(value, infinite=2):
    """What must not depend on the backend or the noise: which are NaN, infinite (0 · inf aside), and 0."""
    return torch.where(value.isnan(), 3, torch.where(value.isinf(), infinite, (value != 0).int())).tolist()


def results_of(backend, loc, log_scale):
    """Everything that a backend computes from one weight and a unit gradient, and from a mean and a variance."""
    layout, one = Layout([torch.Size((1,))]), torch.ones(1)
    priors, variance = (torch.zeros(1), one), log_scale.abs()
    w, _ = backend.sample(layout, loc, log_scale)
    yield "sample", w
    yield "moments", torch.stack(backend.moments(layout, loc, log_scale))
    yield "kl", backend.kl(layout, loc, log_scale, *priors)
    for weight in (None, one):
        yield "sample_grad", torch.stack(backend.sample_grad(layout, [one], w, loc, log_scale, *priors, weight))
        yield (
            "moments_grad",
            torch.stack(backend.moments_grad(layout, [one], [one], loc, log_scale, *priors, weight)),
        )
    for dtype in (torch.float32, torch.bfloat16):
        yield "perturb", torch.stack(backend.perturb(loc.to(dtype, copy=True), variance.to(dtype, copy=True)))


@needs_compiler
@pytest.mark.parametrize("loc", ODD, ids=str)
@pytest.mark.parametrize("log_scale", ODD, ids=str)
def test_what_is_not_finite_stays_so_on_both_backends_alike(loc, log_scale):
    loc, log_scale = loc.reshape(1).clone(), log_scale.reshape(1).clone()
    infinite = 3 if loc.isinf() and log_scale.isinf() else 2  # inf - inf or inf + inf, by the sign of the noise
    for (name, a), (_, b) in zip(
        results_of(compiled, loc, log_scale), results_of(torch_path, loc, log_scale), strict=True
    ):
        assert kind(a, infinite) == kind(b, infinite), name
        if (loc.isnan() or log_scale.isnan()) and "grad" not in name:
            assert a.isnan().any(), name


@pytest.mark.slow
def test_without_a_compiler_the_torch_backend_is_used_with_a_warning(tmp_path):
    code = (
        "import torch; from pyro_lottery import kernels\n"
        "assert kernels.backend(torch.zeros(1)).__name__.endswith('torch_path')\n"
        "with kernels.using('torch'): kernels.backend(torch.zeros(1))\n"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CC": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("there is no C compiler") == 1


def test_a_compiler_that_fails_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    library, problem = native._load.__wrapped__()
    assert library is None
    assert "cannot be built (exit 1)" in problem
    assert not list(tmp_path.rglob("*.so"))


def test_other_devices_and_precisions_use_the_torch_backend():
    assert kernels.backend(torch.zeros(1, dtype=torch.float64)) is torch_path
    assert kernels.backend(torch.zeros(1, device="meta")) is torch_path
    with kernels.using("torch"):
        assert kernels.backend(torch.zeros(1)) is torch_path


def test_a_compiler_command_may_have_arguments(tmp_path, monkeypatch):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", f"{compiler} -g0")
    assert native._load.__wrapped__()[1] is None
    assert len(list(tmp_path.rglob("*.so"))) == 1


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache folder with a library."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        assert native._load.__wrapped__()[1] is None
    return folder


@needs_compiler
@pytest.mark.parametrize("damage", [0, 4096, -4096, -1])
def test_half_a_library_is_built_again(built, tmp_path, monkeypatch, damage):
    """As a power cut may leave one, in another folder, since a process loads a library of one path once.

    One that begins well would crash the interpreter if it were loaded.
    """
    (library,) = built.rglob("*.so")
    assert library.stat().st_size > 10_000
    half = tmp_path / library.relative_to(built)
    half.parent.mkdir(parents=True)
    half.write_bytes(library.read_bytes()[:damage] if damage else b"half")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native._load.__wrapped__()[1] is None
    assert list(tmp_path.rglob("*.so")) == [half]
    assert half.read_bytes() == library.read_bytes()


def test_a_tensor_that_c_would_misread_is_refused():
    with pytest.raises(ValueError, match="strides"):
        native.argument(torch.ones(3).expand(2, 3))
