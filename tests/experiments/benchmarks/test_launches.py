"""The kernels that a step would launch on a GPU, counted on the CPU."""

import pyro
import pytest
import torch

from experiments.benchmarks.launches import NARROW, PATHS, Launches, counted, steps

MORE = {"our deterministic guide": 30, "one weight sample": 60, "one weight sample at 1.2 %": 60, "local": 250}
"""The most kernels beyond those of the deterministic step, with kernels in Triton."""
WITHOUT_TRITON = {"our deterministic guide": 30, "one weight sample": 61, "one weight sample at 1.2 %": 65}
LAYERS = {"vit_tiny": {"local": 50 * 10}}
"""A local step takes about ten kernels a layer, in which vit_tiny has 50."""


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("arch", NARROW)
def test_a_bayesian_step_launches_few_more_kernels_than_a_deterministic_one(arch, path):
    torch.manual_seed(0)
    with pyro.validation_enabled(False):  # as in training
        found = {name: counted(step) for name, step in steps(arch, path).items()}
    limits = MORE | LAYERS.get(arch, {}) if path == "triton" else WITHOUT_TRITON
    more = {name: found[name].total - found["det"].total for name in limits}
    assert {name: count for name, count in more.items() if count > limits[name]} == {}
    assert not any(launches.waits.total() for launches in found.values())


def test_kernels_are_counted_by_hand():
    x, weight = torch.randn(4, 6), torch.randn(3, 6, requires_grad=True)
    with Launches() as launches:
        y = torch.nn.functional.linear(x, weight)  # a product; its transpose is a view
        loss = y.square().sum()  # two
        loss.backward()  # ones, pow·2 and a product, and the product of the weight's gradient
        torch.cat([x] * 200)  # two
        float(loss.detach())  # the host waits
    assert launches.by_name["mm"] == 2
    assert launches.by_name["cat"] == 2
    assert launches.by_name["t"] == launches.by_name["_local_scalar_dense"] == 0
    assert dict(+launches.waits) == {"_local_scalar_dense": 1}
