import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

import pyro_lottery as pl
from pyro_lottery.data import Stream
from pyro_lottery.model import inputs

X, Y = torch.arange(7.0)[:, None], torch.zeros(7)
CPU = torch.device("cpu")


def seen(x, batch_size=3):
    parts = inputs.batches(x, CPU) if inputs.is_loader(x) else inputs.slices(x, batch_size, CPU)
    return [
        part if isinstance(part, torch.Tensor) else part["a"] if isinstance(part, dict) else part[0] for part in parts
    ]


@pytest.mark.parametrize(
    "x",
    [
        X, X.numpy(), (X, Y), [X, Y], {"a": X, "b": Y.numpy()}, DataLoader(TensorDataset(X, Y), batch_size=3),
        DataLoader(TensorDataset(X), batch_size=3), DataLoader(X, batch_size=3), DataLoader([{"a": v} for v in X], batch_size=3),
        [(X[:3], Y[:3]), (X[3:6], Y[3:6]), (X[6:], Y[6:])], [{"a": X[:3]}, {"a": X[3:6]}, {"a": X[6:]}],
        (part for part in X.split(3)), ((part.numpy(), None) for part in X.split(3)),
        [((X[:3], Y[:3]), Y[:3]), ((X[3:6], Y[3:6]), Y[3:6]), ((X[6:], Y[6:]), Y[6:])],
    ],
)  # fmt: skip
def test_inputs_of_every_kind_come_in_batches_and_in_order(x):
    found = seen(x)
    assert [len(part) for part in found] == [3, 3, 1]
    assert torch.equal(torch.cat(found), X)


class Endless(IterableDataset):
    def __iter__(self):
        yield from X


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (DataLoader(X, batch_size=3, shuffle=True), "the loader shuffles, .* use shuffle=False"),
        (DataLoader(X, batch_sampler=BatchSampler(RandomSampler(X), 3, False)), "the loader shuffles"),
        (Stream(DataLoader(X, 3, sampler=SubsetRandomSampler(range(len(X)))), len(X)), "the loader shuffles"),
        (DataLoader(X, 3, sampler=DistributedSampler(X, 1, 0)), "the loader shuffles"),
        (DataLoader(X, 3, sampler=DistributedSampler(X, 2, 0, shuffle=False)), "a part of the examples, for 1 of 2"),
        (Stream(DataLoader(X, batch_size=len(X) - 1, drop_last=True), len(X)), "drops the last 1 of"),
        (DataLoader(X, batch_size=3, drop_last=True), "drops the last 1 of 7 examples; use drop_last=False"),
        (DataLoader(TensorDataset(X, X, X), batch_size=3), "a batch must be x or .* got 3 parts; pass several inputs"),
        (TensorDataset(X, Y), "yields single examples; pass DataLoader"),
        (Endless(), "yields single examples"),
        (iter([]), "yields no batch"),
        (X[:0], "no examples to predict"),
        ((X, Y[:3]), r"tensors of \(7, 1\), \(3,\)"),
        (3.0, "inputs are a float; pass tensors"),
        (iter([("a", Y)]), "a batch must be a tensor.* got a str"),
    ],
)  # fmt: skip
def test_what_cannot_be_predicted_in_order_is_named(x, message):
    with pytest.raises(pl.UserError, match=message):
        seen(x)


def test_a_loader_that_drops_nothing_may_say_so():
    assert len(seen(DataLoader(X[:6], batch_size=3, drop_last=True))) == 2
    with pytest.raises(pl.UserError, match="batch_size must be a whole number, at least 1, got 0"):
        seen(X, 0)
