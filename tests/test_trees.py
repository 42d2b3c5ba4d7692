from collections import namedtuple

import numpy as np
import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import trees

Pair = namedtuple("Pair", ["x", "mask"])


def test_containers_keep_their_kind_and_order():
    x = Pair(torch.arange(3), [{"b": torch.ones(3, 2), "a": None}, "text", (torch.zeros(3),)])
    doubled = trees.map_tensors(lambda t: 2 * t, x)
    assert type(doubled) is Pair
    assert doubled.x.tolist() == [0, 2, 4]
    assert doubled.mask[0]["a"] is None
    assert doubled.mask[1] == "text"
    assert type(doubled.mask[2]) is tuple
    assert [tuple(t.shape) for t in trees.tensors(x)] == [(3,), (3, 2), (3,)]
    assert trees.first_tensor(x) is x.x
    assert trees.count(x) == 3


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ((torch.zeros(3, 1), torch.zeros(2, 1)), r"the examples; got tensors of \(3, 1\), \(2, 1\)"),
        ((torch.zeros(3, 1), torch.tensor(1.0)), r"got tensors of \(3, 1\), \(\)"),
        (torch.tensor(1.0), r"got tensors of \(\)"),
        ("images", "got a str"),
        ({"a": None}, "got a dict"),
    ],
)
def test_what_is_no_batch_is_named(x, message):
    with pytest.raises(pl.UserError, match=message):
        trees.count(x)


def test_arrays_become_tensors_wherever_they_are():
    found = trees.as_tensors({"a": np.zeros(3, dtype=np.float64)[::-1], "b": (np.ones(2), "name", None)})
    assert found["a"].dtype == torch.double
    assert found["b"][1:] == ("name", None)
