import pytest
import torch

from pyro_lottery import files
from pyro_lottery.errors import Damaged
from pyro_lottery.types import Posterior, Ticket

from .test_results import ticket


def test_a_ticket_round_trips_in_the_networks_order(tmp_path):
    saved = ticket()
    saved.save(tmp_path / "t.safetensors")
    loaded = Ticket.load(tmp_path / "t.safetensors")
    assert list(loaded.mask) == list(saved.mask)
    assert list(loaded.start.loc) == list(saved.start.loc)
    for name in ("mask", "net"):
        assert all(torch.equal(getattr(loaded, name)[n], t) for n, t in getattr(saved, name).items())
    assert all(torch.equal(loaded.start.scale[n], t) for n, t in saved.start.scale.items())
    assert loaded.start.prunable == saved.start.prunable


def test_a_posterior_round_trips_with_what_it_was_estimated_from(tmp_path):
    saved = Posterior({"w": torch.randn(3)}, {"w": torch.ones(3)}, ("w",), {"raw": torch.zeros(2)}, 50)
    saved.save(tmp_path / "p.safetensors", {"bn.weight": torch.ones(1)})
    loaded, net = Posterior.load(tmp_path / "p.safetensors")
    assert (loaded.draws, loaded.prunable, list(loaded.extra), list(net)) == (50, ("w",), ["raw"], ["bn.weight"])


def test_a_file_that_holds_something_else_is_named(tmp_path):
    Posterior({"w": torch.randn(3)}, None, ("w",)).save(tmp_path / "p.safetensors", {})
    with pytest.raises(Damaged, match=r"p\.safetensors is no ticket"):
        Ticket.load(tmp_path / "p.safetensors")
    files.save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(1)})
    with pytest.raises(Damaged, match=r"x\.safetensors holds no posterior: 'sites' is missing"):
        Ticket.load(tmp_path / "x.safetensors")
