import math

import pytest
import torch

from pyro_lottery import files
from pyro_lottery.errors import Damaged
from pyro_lottery.types import Posterior, Ticket
from tests.support import ticket


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
    with pytest.raises(Damaged, match=r"p\.safetensors is not a ticket"):
        Ticket.load(tmp_path / "p.safetensors")
    files.save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(1)})
    with pytest.raises(Damaged, match=r"x\.safetensors does not hold a posterior: 'sites' is missing"):
        Ticket.load(tmp_path / "x.safetensors")


GOOD = {
    "loc/w": torch.tensor([1.0, 0.0]), "scale/w": torch.tensor([0.5, 0.0]), "mask/w": torch.tensor([1, 0]).byte(),
    "loc/b": torch.zeros(1), "scale/b": torch.ones(1), "net/bn.running_mean": torch.zeros(2),
}  # fmt: skip
INFO = {"sites": ["w", "b"], "prunable": ["w"]}


@pytest.mark.parametrize(
    ("tensors", "info", "message"),
    [
        ({"mask/w": torch.tensor([1, 2]).byte()}, {}, "mask/w holds values other than 0 and 1"),
        ({"mask/w": torch.tensor([1.0, 0.0])}, {}, "mask/w is not a mask for its loc"),
        ({"mask/w": torch.tensor([1]).byte()}, {}, "mask/w is not a mask for its loc"),
        ({"mask/b": torch.tensor([1]).byte()}, {}, "mask/b does not belong to a prunable site"),
        ({"loc/w": torch.tensor([1.0, float("nan")])}, {}, "loc/w holds values that are not finite"),
        ({"loc/w": torch.tensor([1, 0])}, {}, "loc/w does not fit"),
        ({"scale/w": torch.tensor([0.5, -1.0])}, {}, "scale/w holds negative scales"),
        ({"scale/w": torch.tensor([0.0, 0.0])}, {}, "scale/w is not positive at kept weights"),
        ({"scale/w": torch.ones(3)}, {}, "scale/w does not fit its loc"),
        ({"net/bn.running_mean": torch.tensor([float("inf")])}, {}, "net/bn.running_mean holds values"),
        ({"loc/c": torch.ones(1)}, {}, "loc/ does not match the list of sites"),
        ({"other/c": torch.ones(1)}, {}, "'other' is missing or unknown"),
        ({}, {"prunable": ["c"]}, "prunable is not a subset of the sites"),
        ({}, {"prunable": ["w", "w"]}, "prunable is not a subset of the sites"),
        ({}, {"prunable": [["w"]]}, "does not hold a posterior: its metadata is not valid"),
        ({}, {"sites": [["w"]]}, "does not hold a posterior: its metadata is not valid"),
        ({}, {"draws": -1}, "draws is not a count"),
    ],
)
def test_values_that_are_not_what_they_are_called_are_refused(tensors, info, message, tmp_path):
    """Whoever writes a foreign file can write its checksum too."""
    path = tmp_path / "t.safetensors"
    files.save_tensors(path, GOOD, INFO)
    assert Ticket.load(path).mask["w"].tolist() == [True, False]
    files.save_tensors(path, GOOD | tensors, INFO | info)
    with pytest.raises(Damaged, match=message):
        Ticket.load(path)


def test_an_attention_masks_infinite_numbers_are_saved_and_loaded_and_nan_never(tmp_path):
    saved, path = ticket(), tmp_path / "t.safetensors"
    mask = torch.tensor([0.0, -math.inf])
    Ticket(saved.mask, saved.start, {"attention_mask": mask}).save(path)
    assert torch.equal(Ticket.load(path).net["attention_mask"], mask)
    Ticket(saved.mask, saved.start, {"attention_mask": torch.tensor([math.nan, -math.inf])}).save(path)
    with pytest.raises(Damaged, match="net/attention_mask holds values that are not finite"):
        Ticket.load(path)
