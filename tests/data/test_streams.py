"""Batches from loaders: the same training as from memory, in any process and from any epoch on."""

import multiprocessing
import random

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import pyro_lottery as pl
from pyro_lottery import distributed as ranks
from pyro_lottery import training
from pyro_lottery.training import Hooks
from tests.support import same

QUICK = {"milestones": (), "epochs": 2, "lr": 0.01}
multiprocessing.set_forkserver_preload(["tests.data.test_streams"])  # so that a worker starts in no time
WORKER = {"num_workers": 1, "multiprocessing_context": "forkserver"}
"""Options of a loader with a process of its own; a fork of a test runner may wait for ever for a lock that a thread held."""


def regression(count=48, outputs=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]).repeat(1, outputs) + 0.3 * torch.randn(
        count, outputs, generator=generator
    )
    return TensorDataset(x, y)


def linear(num_data=48, noise=0.3):
    torch.manual_seed(0)
    model = pl.BayesianRegressor(nn.Linear(3, 1), num_data=num_data, noise_scale=noise)
    return model, pl.guides.mean_field(model)


def trained(loader, model=None, guide=None, **options):
    model, guide = (model, guide) if model is not None else linear()
    history = pl.train(model, guide, loader, **QUICK | options)
    return {name: p.detach().clone() for name, p in guide.named_parameters()}, history


def test_a_shuffling_loader_follows_the_seed_alone():
    def loader(**options):
        return DataLoader(regression(), 16, shuffle=True, **options)

    torch.manual_seed(1)
    first, _ = trained(loader())
    torch.manual_seed(2)
    torch.rand(5)
    assert same(first, trained(loader())[0])
    assert not same(first, trained(loader(), seed=1)[0])
    assert not same(first, trained(DataLoader(regression(), 16))[0])  # so that it does shuffle


def test_a_generator_of_the_loaders_own_follows_the_seed_and_is_given_back():
    generator = torch.Generator().manual_seed(7)
    generator.get_state()
    loader = DataLoader(regression(), 16, shuffle=True, generator=generator)
    before = generator.get_state()
    first, _ = trained(loader)
    assert torch.equal(generator.get_state(), before)
    generator.manual_seed(8)
    assert same(first, trained(loader)[0])


class Augmented(Dataset):
    """Adds noise by all three global generators."""

    def __init__(self):
        self.x, self.y = regression().tensors

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = np.random.normal() + random.gauss(0, 1) + torch.randn(()).item()
        return self.x[index] + 0.01 * noise, self.y[index]


def test_augmentation_by_numpy_and_python_follows_the_seed_and_leaves_their_generators_alone():
    first, _ = trained(DataLoader(Augmented(), 16, shuffle=True))
    random.seed(3)
    np.random.seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    again, _ = trained(DataLoader(Augmented(), 16, shuffle=True))
    assert same(first, again)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]


def test_workers_follow_the_seed():
    def loader():
        return DataLoader(Augmented(), 24, shuffle=True, **WORKER)

    torch.manual_seed(1)
    first, _ = trained(loader(), epochs=1)
    torch.manual_seed(2)
    assert same(first, trained(loader(), epochs=1)[0])


def test_several_calls_with_one_state_are_one_call():
    loader = DataLoader(Augmented(), 16, shuffle=True)
    whole, history = trained(loader, epochs=3, milestones=(1,))
    model, guide = linear()
    state, rows = pl.TrainState(), []
    for _ in range(3):
        found, row = trained(loader, model, guide, epochs=1, milestones=(1,), state=state)
        rows += row
    assert same(whole, found)
    assert [row["loss"] for row in rows] == [row["loss"] for row in history]


def test_workers_that_stay_draw_what_new_ones_would():
    def loader():
        return DataLoader(Augmented(), 24, persistent_workers=True, **WORKER)

    whole, _ = trained(loader(), epochs=2)
    model, guide = linear()
    state = pl.TrainState()
    for _ in range(2):
        found, _ = trained(loader(), model, guide, epochs=1, state=state)
    assert same(whole, found)


def test_a_stop_waits_for_the_end_of_the_epoch():
    class Asking(Hooks):
        def stopping(self):
            return True

        def stop(self, state):
            raise AssertionError("a stream cannot go on within an epoch")

    whole, _ = trained(DataLoader(regression(), 16))
    found, history = trained(DataLoader(regression(), 16), hooks=Asking())
    assert len(history) == 2
    assert same(whole, found)


def test_set_epoch_is_called_and_a_part_of_a_data_set_counts_as_what_it_is():
    epochs = []

    class Sampler(SubsetRandomSampler):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    loader = DataLoader(regression(), 8, sampler=Sampler(range(30)))
    model, guide = linear(30)
    trained(loader, model, guide, epochs=2)
    assert [e for e in epochs if e] == [1]
    with pytest.raises(pl.UserError, match="num_data is 48, but there are 30 training examples"):
        trained(loader)
    batches = DataLoader(regression(), batch_sampler=BatchSampler(RandomSampler(range(20)), 5, False))
    trained(batches, *linear(20))


def test_a_ragged_last_batch_weighs_what_it_holds():
    dataset = regression(48)
    model, guide = linear()
    history = pl.train(
        model, pl.guides.deterministic(model), DataLoader(dataset, 20), **QUICK | {"lr": 1e-12, "epochs": 1}
    )
    with torch.no_grad():
        output = nn.functional.linear(dataset.tensors[0], *(guide.median()[n] for n in ("weight", "bias")))
    exact = -dist.Normal(output, 0.3).log_prob(dataset.tensors[1]).mean()
    assert history[0]["nll"] == pytest.approx(float(exact), rel=1e-5)
    error = (output - dataset.tensors[1]).square().mean().sqrt()
    assert history[0]["train_rmse"] == pytest.approx(float(error), rel=1e-5)


def test_no_more_than_two_batches_are_alive():
    alive, most = set(), 0

    class Batches:
        def __len__(self):
            return 20

        def __iter__(self):
            nonlocal most
            for index in range(20):
                x = torch.full((4, 3), float(index))
                alive.add(x.untyped_storage().data_ptr())
                import weakref

                weakref.finalize(x, alive.discard, x.untyped_storage().data_ptr())
                most = max(most, len(alive))
                yield x, torch.zeros(4, 1)
                del x

    trained(pl.data.from_loaders(Batches(), num_data=80), *linear(80))
    assert most <= 2


def two_inputs(kind):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 1), nn.Linear(2, 1)

        def forward(self, one, two):
            return self.one(one) + self.two(two)

    torch.manual_seed(0)
    x, z = torch.randn(24, 3), torch.randn(24, 2)
    y = x[:, :1] + z[:, 1:]
    batches = [
        ((a, b) if kind == "tuple" else {"two": b, "one": a}, c)
        for a, b, c in zip(x.split(8), z.split(8), y.split(8), strict=True)
    ]
    return pl.BayesianRegressor(Both(), num_data=24, noise_scale=0.1), batches


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_networks_of_two_inputs(kind):
    model, batches = two_inputs(kind)
    guide = pl.guides.mean_field(model)
    history = pl.train(model, guide, batches, epochs=60, lr=0.05, milestones=(40,))
    assert history[-1]["train_rmse"] < 0.2 < history[0]["train_rmse"]


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_networks_of_two_inputs_are_measured_on_a_stream(kind):
    model, batches = two_inputs(kind)  # a pair of inputs is not taken for inputs and targets
    guide = pl.guides.deterministic(model)
    history = pl.train(model, guide, pl.data.from_loaders(batches, test=batches), epochs=1, lr=1e-9)
    found = torch.cat([pl.predict(model, guide, x) for x, _ in batches])
    expected = pl.metrics.rmse(found, torch.cat([y for _, y in batches]))
    assert history[0]["test_rmse"] == pytest.approx(expected, rel=1e-5)


def test_a_poisson_rate_is_that_of_the_counts():
    class Counts(pl.BayesianNetwork):
        def likelihood(self, output):
            return dist.Poisson(output.exp().clamp(1e-3, 1e3)).to_event(1)

    generator = torch.Generator().manual_seed(0)
    y = torch.poisson(torch.full((400, 1), 3.0), generator=generator)
    x = torch.zeros(400, 1)
    model = Counts(nn.Linear(1, 1), pl.priors.normal(100.0), num_data=400, kl_temperature=1.0)
    guide = pl.guides.mean_field(model)
    pl.train(
        model,
        guide,
        [(x[:200], y[:200]), (x[200:], y[200:])],
        epochs=600,
        lr=0.05,
        milestones=(300, 500),
        weight_decay=0.0,
    )
    # With a wide prior, log-rate ~ N(log mean, 1/Σ counts), to first order in 1/Σ counts.
    posterior = pl.posterior(guide)
    assert float(posterior.loc["bias"].exp()) == pytest.approx(float(y.mean()), rel=0.02)
    assert float(posterior.scale["bias"]) == pytest.approx(float(y.sum()) ** -0.5, rel=0.1)


class Fewer:
    """Gives its batches once."""

    def __init__(self, batches):
        self._iterator = iter(batches)
        self._length = len(batches)

    def __len__(self):
        return self._length

    def __iter__(self):
        return (batch for batch in self._iterator)


X, Y = regression(8).tensors


@pytest.mark.parametrize(
    ("loader", "line"),
    [
        (((X, Y) for _ in range(2)), "can be read only once"),
        (iter([(X, Y)]), "can be read only once"),
        ([], "has no batches"),
        (3, "give a DataLoader"),
        (X, "give a DataLoader"),
        ([X, X], r"a batch must be a pair \(x, y\), got a Tensor"),
        ([{"x": X, "labels": Y}], r"a batch must be a pair \(x, y\), got a dict of 2"),
        ([(X, X, Y)], r"got a tuple of 3; give several inputs as one x"),
        ([(X[:5], Y)], "a batch has 5 inputs and 8 targets"),
        ([((X, X[:5]), Y)], "the tensors of a batch must have the same first dimension"),
        ([(X.to(torch.uint8), Y)], "inputs of a batch are uint8"),
        ([(X.clone().fill_(torch.nan), Y)], "inputs of a batch hold values that are not finite"),
        ([(X, Y.clone().fill_(torch.inf))], "targets of a batch hold values that are not finite"),
        ([(X, {"y": Y})], "targets of a batch must be a tensor"),
        ([(X, Y[:, 0])], r"targets have shape \(2,\), but the likelihood has shape \(2, 1\)"),
        ([(X, torch.zeros(8, dtype=torch.long))], r"targets have shape \(2,\)"),
        ([(X[:, :2], Y)], r"the network cannot take inputs of \[2, 2\] float32"),
        ([(X[:0], Y[:0])], "no examples"),
        (Fewer([(X, Y)]), "a batch must be a pair"),
        (pl.data.Stream(Fewer([(X[:4], Y[:4]), (X[4:], Y[4:])]), 8), "gave 0 of 2 batches in this pass"),
        (pl.data.Stream([(X, Y)], 7), "num_data is 8, but there are 7"),
    ],
)  # fmt: skip
def test_what_is_odd_is_one_line_before_the_first_step(loader, line):
    model, guide = linear(8)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    with pytest.raises(pl.UserError, match=line) as caught:
        pl.train(model, guide, loader, **QUICK)
    assert "\n" not in str(caught.value)
    assert same(before, {name: p.detach() for name, p in guide.named_parameters()})


class Miscounted(list):
    """A list that is one batch longer or shorter than it says."""

    def __init__(self, batches, said):
        super().__init__(batches)
        self.said = said

    def __len__(self):
        return self.said


@pytest.mark.parametrize(
    ("stream", "line"),
    [
        (pl.data.Stream(Miscounted([(X, Y)] * 2, 1), 8), "gave more than the 1 batches that its length says"),
        (pl.data.Stream(Miscounted([(X, Y)] * 2, 3), 8), "gave 2 of 3 batches in this pass"),
        (pl.data.Stream([(X, Y)] * 2, 8), "gave 16 examples in a pass, but num_data is 8"),
    ],
)
def test_a_pass_that_is_not_what_was_said_is_told_at_its_end(stream, line):
    with pytest.raises(pl.UserError, match=line):
        pl.train(*linear(8), stream, **QUICK)


def classifier(outputs=3, norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), *([nn.BatchNorm1d(4)] if norm else []), nn.ReLU(), nn.Linear(4, outputs)]
    model = pl.BayesianClassifier(nn.Sequential(*layers), num_data=9)
    return model, pl.guides.mean_field(model)


def test_labels_beyond_the_outputs_and_batches_of_one():
    x, y = torch.randn(9, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 5])
    with pytest.raises(pl.UserError, match="a label of the training set is 5, but the network has 3 outputs"):
        pl.train(*classifier(), DataLoader(TensorDataset(x, y), 3), **QUICK)
    y[-1] = 2
    loader = DataLoader(TensorDataset(x, y), 4)
    with pytest.raises(
        pl.UserError, match=r"last batch has one example, which BatchNorm cannot normalise; give .* drop_last=True"
    ):
        pl.train(*classifier(norm=True), loader, **QUICK)
    pl.train(*classifier(norm=True), DataLoader(TensorDataset(x, y), 4, drop_last=True), **QUICK)
    pl.train(*classifier(), loader, **QUICK)


def test_classes_of_a_loader_are_known_or_asked_for():
    x, y = torch.randn(9, 3), torch.tensor([0, 1, 2] * 3)
    loader = DataLoader(TensorDataset(x, y), 3)
    assert pl.data.from_loaders(loader, loader).num_classes == 3
    assert pl.data.from_loaders([(x, y)]).num_classes == 3

    class Named(TensorDataset):
        classes = ("cat", "dog", "owl", "elk")

    found = pl.data.from_loaders(DataLoader(Named(x, y), 3))
    assert (found.num_classes, found.classes) == (4, Named.classes)

    class Own:
        def __len__(self):
            return 1

        def __iter__(self):
            yield x, y

    with pytest.raises(pl.UserError, match="give num_classes"):
        pl.data.from_loaders(Own(), num_data=9)
    assert pl.data.from_loaders(Own(), num_data=9, num_classes=3).num_classes == 3
    assert pl.data.from_loaders([(x, y.float()[:, None])]).num_classes is None


def test_a_likelihood_without_a_mean_trains_and_has_no_rmse():
    class Heavy(pl.BayesianNetwork):
        def likelihood(self, output):
            return dist.Cauchy(output, 0.3).to_event(1)

    torch.manual_seed(0)
    model = Heavy(nn.Linear(3, 1), num_data=48)
    history = pl.train(model, pl.guides.mean_field(model), DataLoader(regression(), 16), **QUICK)
    assert np.isnan(history[-1]["train_rmse"])
    assert history[-1]["nll"] < history[0]["nll"]


def test_several_devices_do_not_share_a_loader():
    class Two(ranks.Ranks):
        world = 2

    model, _ = linear()
    with pytest.raises(pl.UserError, match="a loader's data cannot be shared by several devices"):
        training.check_batches(model, pl.data.from_loaders(DataLoader(regression(), 16)), 16, Two())


def test_batches_from_a_list_give_the_bits_of_the_same_batches_from_memory():
    dataset = regression(48)
    x, y = dataset.tensors
    model, guide = linear()
    in_memory = pl.data.from_tensors(x, y, x, y, normalize=False)
    # In memory, one batch an epoch is the whole data set in another order, whose sum may differ in its last bits.
    pl.train(model, guide, in_memory, batch_size=48, weight_decay=0.0, **QUICK)
    found, _ = trained([(x, y)], weight_decay=0.0)
    for name, value in guide.named_parameters():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_test_loader_is_measured_in_one_pass_whatever_its_order(shuffle):
    x, y = torch.randn(30, 3), torch.tensor([0, 1, 2] * 10)
    model, guide = classifier()
    model.num_data = 30
    train = DataLoader(TensorDataset(x, y), 10)
    told = pl.data.from_loaders(train, DataLoader(TensorDataset(x, y), 7, shuffle=shuffle))
    history = pl.train(model, guide, told, **QUICK | {"epochs": 1})
    with torch.no_grad():
        model2, guide2 = classifier()
        model2.num_data = 30
    direct = pl.train(
        model2,
        guide2,
        pl.data.from_loaders(train, pl.data.from_tensors(x, y, x, y, normalize=False).test),
        **QUICK | {"epochs": 1},
    )
    assert history[0]["test_accuracy"] == direct[0]["test_accuracy"]


def test_a_pass_to_measure_on_draws_the_same_numbers_each_time():
    def passes(**options):
        data = pl.data.from_loaders(DataLoader(regression(), 16), DataLoader(Augmented(), 24, shuffle=True, **options))
        return [torch.cat([x for x, _ in data.test]) for _ in range(2)]

    state = random.getstate()
    once, again = passes()
    assert random.getstate() == state
    assert torch.equal(once, again)
    once, again = passes(persistent_workers=True, **WORKER)
    assert torch.equal(once, again)


class Counted:
    """Batches that are made as they are read, ``given`` of them, with the length ``said``."""

    def __init__(self, given, said=3):
        self.given, self.said = given, said

    def __len__(self):
        return self.said

    def __iter__(self):
        x, y = regression().tensors
        number = 0
        while number != self.given:
            yield x[:16], y[:16]
            number += 1


def test_examples_of_a_loader_that_does_not_tell_them():
    data = pl.data.from_loaders(Counted(3), Counted(3), num_data=48)
    assert (len(data.train), len(data.test)) == (48, 48)  # a test set is counted
    assert same(trained(Counted(3))[0], trained(data)[0])  # a bare loader has as many as the model says
    with pytest.raises(pl.UserError, match="a Counted does not tell how many examples train has; give num_data"):
        pl.data.from_loaders(Counted(3))
    with pytest.raises(pl.UserError, match="48 examples in a pass, but num_data is 64"):
        trained(Counted(3), *linear(num_data=64))


@pytest.mark.parametrize("loader", [DataLoader(regression(), 16), [(x[None], y[None]) for x, y in regression()]])
def test_num_data_is_exact_where_no_example_is_left_out(loader):
    with pytest.raises(pl.UserError, match="48 examples in a pass, but num_data is 49"):
        trained(pl.data.from_loaders(loader, num_data=49), *linear(num_data=49), epochs=1)


@pytest.mark.parametrize(
    ("test", "line"),
    [
        (DataLoader(regression(), 10, drop_last=True), "test leaves out 8 of its 48 examples"),
        (
            DataLoader(regression(), batch_sampler=BatchSampler(range(48), 20, drop_last=True)),
            "test leaves out 8 of its 48",
        ),
        ([(torch.zeros(1, 3), torch.tensor(1.0))], "the targets of a batch are a single number"),
        (Counted(2), "gave 2 of 3 batches"),
        (Counted(-1), "more than the 3 batches"),  # without an end
    ],
)
def test_a_test_loader_must_give_what_it_says(test, line):
    with pytest.raises(pl.UserError, match=line):
        pl.data.from_loaders(DataLoader(regression(), 16), test)


def test_a_checksum_is_of_all_that_loaders_hold_in_memory():
    x, y = regression().tensors
    other = y.clone()
    other[-1] += 1

    def checksum(train=y, test=y, val=y):
        kinds = [
            DataLoader(TensorDataset(x, train), 16, shuffle=True),
            DataLoader(Subset(TensorDataset(x, test), range(40, 48)), 4),
            [(x[40:], val[40:])],
        ]
        return pl.data.from_loaders(*kinds).checksum

    found = [checksum(), checksum(train=other), checksum(test=other), checksum(val=other)]
    assert len(set(found)) == 4
    assert checksum() == found[0]


class Own(Dataset):
    """A data set that tells nothing but its length."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


class Told(Own):
    """One that tells its targets too."""

    @property
    def targets(self):
        return self.y.tolist()


def test_a_checksum_tells_how_examples_are_chosen_and_the_targets_of_a_test_set():
    x, labels = torch.randn(48, 3), torch.arange(48) % 2
    flipped = torch.cat([labels[:2], 1 - labels[2:]])

    def checksum(train, test=None):
        return pl.data.from_loaders(train, test or DataLoader(Own(x, labels), 8), num_classes=2).checksum

    def chosen(indices, kind=Own):
        return DataLoader(kind(x, labels), 8, sampler=SubsetRandomSampler(indices))

    train = DataLoader(Own(x, labels), 16)
    found = [
        checksum(train),
        checksum(DataLoader(Own(x, labels), 18)),  # three batches too
        checksum(DataLoader(Own(x, labels), 16, shuffle=True)),
        checksum(DataLoader(Told(x, labels), 16)),
        checksum(DataLoader(Told(x, flipped), 16)),
        checksum(chosen(range(40))),
        checksum(chosen([0, 1, *range(10, 48)])),
        checksum(DataLoader(Own(x, labels), 16, sampler=WeightedRandomSampler(torch.ones(48), 48))),
        checksum(DataLoader(Own(x, labels), 16, sampler=WeightedRandomSampler(torch.arange(48.0), 48))),
        checksum(DataLoader(Subset(Told(x, labels), range(40)), 16)),
        checksum(DataLoader(Subset(Told(x, labels), range(8, 48)), 16)),  # the same labels of other images
        checksum(train, DataLoader(Own(x, flipped), 8)),
        checksum(train, DataLoader(Subset(Own(x, labels), range(40)), 8)),
        checksum(train, DataLoader(Subset(Own(x, labels), range(8, 48)), 8)),
    ]
    assert len(set(found)) == len(found)
    assert checksum(DataLoader(Own(x, labels), 16)) == found[0]


def test_double_precision_stays():
    x = 1e8 + torch.arange(32, dtype=torch.float64)[:, None] / 8  # equal in float32

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(1, 1).double(), set()

        def forward(self, x):
            self.seen |= {*(x - 1e8).flatten().tolist()}
            return self.layer(x - 1e8)

    net = Centred()
    model = pl.BayesianRegressor(net, num_data=32, noise_scale=1.0)
    pl.train(model, pl.guides.mean_field(model), DataLoader(TensorDataset(x, x / 1e8), 8), epochs=1, milestones=())
    assert len(net.seen) == 32


def test_a_test_loader_may_fill_the_same_tensors_again():
    x, y = regression().tensors
    separate = [(x[:24], y[:24]), (x[24:], y[24:])]

    class Refilled(list):
        def __iter__(self):
            for batch in super().__iter__():
                for own, new in zip(buffers, batch, strict=True):
                    own.copy_(new)
                yield buffers

    buffers = (torch.empty(24, 3), torch.empty(24, 1))
    errors = [
        trained(pl.data.from_loaders(DataLoader(TensorDataset(x, y), 48), test))[1][-1]["test_rmse"]
        for test in (separate, Refilled(separate))
    ]
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("numbers", "line"),
    [
        ({"num_data": -3}, "num_data must be a whole number, at least 1, got -3"),
        ({"num_data": 48.0}, "num_data must be a whole number"),
        ({"num_classes": -2}, "num_classes must be a whole number"),
        ({"num_classes": 2}, "num_classes is 2, but the targets are real"),
    ],
)
def test_odd_numbers_of_examples_and_classes(numbers, line):
    with pytest.raises(pl.UserError, match=line):
        pl.data.from_loaders(DataLoader(regression(), 16), **numbers)
