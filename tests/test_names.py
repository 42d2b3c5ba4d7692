import pytest
import torch

import pyro_lottery as pl
from pyro_lottery.names import check_same


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
