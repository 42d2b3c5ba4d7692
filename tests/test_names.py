import pytest
import torch

import pyro_lottery as pl
from pyro_lottery.errors import Damaged
from pyro_lottery.names import check_finite, check_same


def test_nothing_differs_between_tensors_and_shapes_in_any_order():
    check_same({"a": torch.ones(2, 3), "b": torch.ones(())}, {"b": (), "a": (2, 3)})


def test_what_differs_is_named_in_one_line():
    given, wanted = {"a": (2,), "c": (1,)}, {"a": torch.ones(3), "b": (1,)}
    with pytest.raises(pl.UserError) as error:
        check_same(given, wanted, "the guide does not fit: ", "model")
    assert str(error.value) == (
        "the guide does not fit: a is (2,), but the model's is (3,); b is missing; c is not in the model"
    )
    with pytest.raises(pl.UserError, match=r"w4 is missing and 4 more$"):
        check_same({}, {f"w{number}": () for number in range(9)})
    with pytest.raises(Damaged, match=r"loc/a is missing; loc/b is not in the network"):
        check_same({"b": ()}, {"a": ()}, prefix="loc/", error=Damaged)


def test_values_are_finite_but_where_the_networks_own_are_not():
    own = {"mask": torch.tensor([0.0, -torch.inf]), "w": torch.ones(2)}
    check_finite(own, own)
    for wrong in (torch.tensor([0.0, torch.nan]), torch.tensor([0.0, 1e300], dtype=torch.float64)):
        with pytest.raises(pl.UserError, match="net/w holds values that are not finite"):
            check_finite(own | {"w": wrong}, own, "net/")
    with pytest.raises(pl.UserError, match="mask holds values that are not finite"):
        check_finite(own | {"mask": torch.tensor([torch.inf, -torch.inf])}, own)
