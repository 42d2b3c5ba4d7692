import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import machine


def test_devices_that_are_not_there_are_named():
    assert machine.resolve_device("cpu").type == "cpu"
    for name in ("cuda:99", "toaster"):
        with pytest.raises(pl.UserError, match=f"--device {name} is not available"):
            machine.resolve_device(name)


@pytest.mark.parametrize(
    ("name", "device", "bf16", "faster", "resolved"),
    [
        ("auto", "cpu", True, True, "bf16"), ("auto", "cpu", True, False, "32"), ("auto", "cpu", False, None, "32"),
        ("auto", "cuda", True, None, "bf16"), ("auto", "cuda", False, None, "32"),
        ("32", "cpu", True, None, "32"), ("bf16", "cpu", False, None, "bf16"),
    ],
)  # fmt: skip
def test_auto_precision_measures_on_a_cpu_that_has_bf16_and_nowhere_else(
    monkeypatch, name, device, bf16, faster, resolved
):
    def is_faster():
        assert faster is not None, "it was measured"
        return faster

    monkeypatch.setattr("pyro_lottery.machine.has_bf16", lambda device: bf16)
    assert machine.resolve_precision(name, torch.device(device), is_faster) == resolved


def test_auto_precision_without_a_measurement_is_fp32_on_a_cpu(monkeypatch):
    monkeypatch.setattr("pyro_lottery.machine.has_bf16", lambda device: True)
    with machine.autocast(torch.device("cpu"), "auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_autocast_takes_known_precisions():
    x = torch.ones(2, 2)
    with machine.autocast(x.device, "bf16"):
        assert (x @ x).dtype == torch.bfloat16
    for name in ("32", "tf32"):  # a run that a GPU trained in tf32 predicts on a CPU too
        with machine.autocast(x.device, name):
            assert (x @ x).dtype == torch.float32
    with pytest.raises(pl.UserError, match="unknown precision '16'"):
        machine.autocast(x.device, "16")


def test_a_gpus_products_are_rounded_by_tf32_alone():
    def switches():
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    before, cuda = switches(), torch.device("cuda")
    for name, rounded in (("32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")):
        with machine.products(cuda, name):
            assert switches() == (rounded, rounded)
        assert switches() == before
    with machine.products(cuda, "tf32"):
        with machine.products(cuda, "32"):
            assert switches() == ("ieee", "ieee")
        assert switches() == ("tf32", "tf32")
    with machine.products(torch.device("cpu"), "tf32"):
        assert switches() == before


def test_only_weights_of_four_dimensions_change_their_layout():
    net = torch.nn.ModuleList([torch.nn.Conv2d(2, 3, 3), torch.nn.Conv3d(2, 3, 3), torch.nn.Linear(2, 3)])
    machine.channels_last_(net)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert net[1].weight.is_contiguous()
    assert net[2].weight.is_contiguous()
    assert machine.channels_last(torch.zeros(2, 3, 4, 4)).stride() == (48, 1, 12, 3)
    assert machine.channels_last(torch.zeros(2, 3)).stride() == (3, 1)
