import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import seeds


def test_a_stream_repeats_and_leaves_the_outside_alone():
    torch.manual_seed(1)
    outside = torch.rand(4)
    torch.manual_seed(1)
    with seeds.stream("cpu", 0, "noise", 3):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(4), outside)
    with seeds.stream("cpu", 0, "noise", 3):
        assert torch.equal(torch.rand(4), inside)


def test_streams_differ_by_seed_and_by_name():
    named = {seeds.derive(s, n, i) for s in range(3) for n in ("noise", "batches") for i in range(3)}
    assert len(named) == 18
    assert seeds.derive(1, 23) != seeds.derive(12, 3)
    assert torch.rand(1, generator=seeds.generator("cpu", 0, "a")) == torch.rand(
        1, generator=seeds.generator("cpu", 0, "a")
    )


def test_deterministic_algorithms_are_asked_for_inside_alone():
    with seeds.deterministic():
        assert torch.are_deterministic_algorithms_enabled()
    with seeds.deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(pl.UserError, match="--deterministic: put_ does not"), seeds.deterministic():
        raise RuntimeError("put_ does not have a deterministic implementation\nmore")
    with pytest.raises(RuntimeError, match="other"), seeds.deterministic():
        raise RuntimeError("other")
