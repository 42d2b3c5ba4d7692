import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyro_lottery as pl
from pyro_lottery import files, packed
from pyro_lottery.errors import Damaged
from pyro_lottery.tickets import rewind
from pyro_lottery.types import Posterior, Ticket
from tests.support import same, ticket


def masked():
    found = ticket()
    return rewind(found.mask, found.start, found.net)


def equal(a, b):
    return (
        same(a.mask, b.mask) and same(a.start.loc, b.start.loc) and same(a.start.scale, b.start.scale) and same(a.net, b.net)
        and list(a.start.loc) == list(b.start.loc) and a.start.prunable == b.start.prunable
    )  # fmt: skip


def test_a_ticket_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    one = masked()
    one.pack(tmp_path / "t.safetensors")
    assert equal(Ticket.load(tmp_path / "t.safetensors"), one)


def test_the_size_is_that_counted_by_hand():
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask.view(-1)[:500] = True
    tensors, _ = packed.pack({"mask": {"w": mask}, "loc": {"w": torch.ones(100, 100)}, "scale": {}, "net": {}}, "bf16")
    assert {name: t.nbytes for name, t in tensors.items()} == {"mask/w": 1250, "loc/w": 1000}


@settings(deadline=None, derandomize=True, database=None)  # the same on a busy machine, every time
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 100), st.sampled_from(list(packed.DTYPES)))
def test_any_shape_and_mask_comes_back(shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.4
    loc = torch.randn(shape, generator=generator).masked_fill(~mask, 0)
    scale = torch.rand(shape, generator=generator).add(0.1).masked_fill(~mask, 0)
    tensors, info = packed.pack({"mask": {"w": mask}, "loc": {"w": loc}, "scale": {"w": scale}, "net": {}}, dtype)
    found = packed.unpack(tensors, json.loads(json.dumps(info)))
    assert torch.equal(found["mask"]["w"].bool(), mask)
    error = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-10, "int8": 0.02}[dtype]
    torch.testing.assert_close(found["scale"]["w"], scale, rtol=error, atol=0)
    rows = loc.flatten(1).abs().amax(1) if loc.ndim > 1 and loc.numel() else loc.abs().max() if loc.numel() else loc
    step = rows.max() / 127 if rows.numel() else 0
    torch.testing.assert_close(
        found["loc"]["w"], loc, rtol=error, atol=float(step) / 2 + 1e-7 if dtype == "int8" else 1e-7
    )
    assert not found["loc"]["w"][~mask].any()


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path):
    loc = {"w": torch.tensor([[1e6, 1.0]])}
    one = Ticket({"w": torch.ones(1, 2).bool()}, Posterior(loc, {"w": torch.tensor([[1e-9, 1.0]])}, ("w",)), {})
    with pytest.raises(pl.UserError, match="--dtype fp16 cannot hold the loc of 'w', from 1 to 1e"):
        one.pack(tmp_path / "t", "fp16")
    smaller = Ticket(one.mask, Posterior({"w": torch.ones(1, 2)}, one.start.scale, ("w",)), {})
    with pytest.raises(pl.UserError, match="cannot hold the scale of 'w'"):
        smaller.pack(tmp_path / "t", "fp16")
    for dtype in ("fp32", "int8"):
        broken = Ticket(one.mask, Posterior({"w": torch.tensor([[1.0, torch.nan]])}, one.start.scale, ("w",)), {})
        with pytest.raises(pl.UserError, match="the loc of 'w' holds values that are not finite"):
            broken.pack(tmp_path / "t", dtype)
    with pytest.raises(pl.UserError, match="unknown --dtype 'int4'"):
        one.pack(tmp_path / "t", "int4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t, i: i["shapes"].update({"b10.weight": [10**6, 10**6]}),
        lambda t, i: i["shapes"].update({"b10.weight": [2.5, 3]}),
        lambda t, i: i["shapes"].update({"b10.weight": [-2, -3]}),
        lambda t, i: i["shapes"].pop("a.bias"),
        lambda t, i: i.update(packed="int4"),
        lambda t, i: i.update(packed=["int8"]),
        lambda t, i: t.update({"loc/b10.weight": t["loc/b10.weight"][:-1]}),
        lambda t, i: t.update({"mask/b10.weight": torch.tensor([255], dtype=torch.uint8)}),
        lambda t, i: t.update({"mask/b10.weight": torch.ones(2, 3, dtype=torch.uint8)}),
        lambda t, i: t.update({"loc/a.bias": t["loc/a.bias"].double()}),
        lambda t, i: t.update({"scale/a.bias": -t["scale/a.bias"]}),
        lambda t, i: (
            t.update({"step/loc/a.bias": torch.ones(1, 1000)}) if "step/loc/a.bias" in t else t.pop("loc/a.bias")
        ),
        lambda t, i: (
            t.update({"step/scale/a.bias": torch.ones(2, 9)}) if "step/loc/a.bias" in t else t.pop("loc/a.bias")
        ),
        lambda t, i: t.pop("step/loc/a.bias") if "step/loc/a.bias" in t else t.pop("loc/a.bias"),
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_file_that_was_changed_is_damaged(tmp_path, spoil, dtype):
    one = masked()
    groups = {"mask": one.mask, "loc": one.start.loc, "scale": one.start.scale, "net": one.net}
    tensors, info = packed.pack(groups, dtype)
    info |= {"sites": list(one.start.loc), "prunable": list(one.start.prunable)}
    files.save_tensors(tmp_path / "good", tensors, info)
    Ticket.load(tmp_path / "good")
    before = {name: t.clone() for name, t in tensors.items()}
    spoil(tensors, info)
    files.save_tensors(tmp_path / "bad", tensors, info)
    if dtype == "int8" and set(before) == set(tensors) and (tensors["scale/a.bias"] != before["scale/a.bias"]).any():
        return  # a negative step of a logarithm is another positive scale
    with pytest.raises(Damaged, match="bad"):
        Ticket.load(tmp_path / "bad")
