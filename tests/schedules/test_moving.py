"""Training under a mask that moves."""

import copy
from functools import partial

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import guides, masks, schedules, training
from pyro_lottery.kernels.layout import flatten
from pyro_lottery.tickets import rewind
from pyro_lottery.types import Posterior
from tests.support import same, tiny

OPTIONS = {"epochs": 4, "batch_size": 16, "train_samples": 1, "milestones": (3,), "seed": 5, "level": 0}
"""Of a training of sixteen steps on the tiny data, in four epochs."""


class Recorded:
    """A schedule that keeps what it sees, and what ``move`` makes of it."""

    def __init__(self, move=None):
        self.own, self.seen, self.masks = move or (lambda at: at.mask), [], []

    def move(self, at):
        self.seen.append(at)
        self.masks.append(self.own(at))
        return self.masks[-1]


def run(schedule, data, every=3, make=pl.guides.mean_field, mask=None, hooks=None, **options):
    """Train a tiny network; returns its guide and network, state and last mask."""
    model, guide = tiny(make)
    start = guides.posterior(guide)
    dense = rewind(masks.full(start), start, model.net_state())
    ticket = rewind(mask or dense.mask, start, dense.net)
    model.start_from_(guide, ticket)
    state = pl.TrainState()
    last, _ = schedules.train(
        schedule, every, model, guide, data, ticket.mask, dense=dense, state=state, hooks=hooks or training.Hooks(),
        **OPTIONS | options,
    )  # fmt: skip
    return model, guide, state, last


@pytest.mark.parametrize("make", [pl.guides.mean_field, pl.guides.deterministic])
def test_a_mask_that_stays_changes_no_bit_of_a_training(make, tiny_data, half_mask):
    model, guide, state, last = run(Recorded(), tiny_data, 3, make, half_mask)
    plain, own = tiny(make)
    with pl.handlers.sparsify(half_mask):
        history = pl.train(plain, own, tiny_data, **OPTIONS)
    assert same(masks.apply(half_mask, guides.posterior(guide)).loc, masks.apply(half_mask, guides.posterior(own)).loc)
    assert same(model.net_state(), plain.net_state())
    assert same(last, half_mask)
    times = {"seconds": 0.0}
    assert [row | times for row in state.history] == [row | times for row in history]


def test_the_mask_moves_every_n_steps_until_three_quarters(tiny_data):
    seen = Recorded()
    run(seen, tiny_data, 3)
    # The last move is the first at or after 12 of 16 steps.
    assert [at.context.step for at in seen.seen] == [3, 6, 9, 12]
    assert [at.progress for at in seen.seen] == [3 / 12, 6 / 12, 9 / 12, 1.0]
    batches = [next(at.context.batches(size=8))[1].tolist() for at in seen.seen]
    assert len(set(map(tuple, batches))) > 1  # each move has its own


@pytest.mark.parametrize(("every", "moves"), [(5, [5, 10, 15]), (None, list(range(1, 13)))])
def test_how_often(every, moves, tiny_data):
    seen = Recorded()
    run(seen, tiny_data, every)
    assert [at.context.step for at in seen.seen] == moves


def test_a_schedule_that_could_not_be_completed_is_refused(tiny_data):
    with pytest.raises(
        pl.UserError, match=r"--mask-every 7 changes the mask last after 14 of 20 steps; .* last quarter"
    ):
        schedules.steps_between_moves(7, tiny_data, 5, 16)
    with pytest.raises(pl.UserError, match="last after 0 of 4 steps"):
        schedules.steps_between_moves(4, tiny_data, 1, 16)
    assert schedules.steps_between_moves(None, tiny_data, 300, 16) == 100


def test_a_loader_moves_at_the_ends_of_epochs(tiny_data):
    stream = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(tiny_data.train.inputs.float(), tiny_data.train.targets),
        batch_size=16,
        shuffle=True,
    )
    data = pl.data.from_loaders(stream, stream)
    assert schedules.steps_between_moves(3, data, 4, 16) == 4
    seen = Recorded()
    run(seen, data, 3)
    assert [at.context.step for at in seen.seen] == [4, 8, 12]


def test_a_weight_that_comes_starts_as_specified_and_the_others_stay(tiny_data, half_mask):
    """Loc 0, the mean scale of its site's survivors, and Adam's moments 0; the others keep every bit."""
    swapped = {name: ~mask for name, mask in half_mask.items()}
    kept = half_mask["conv.weight"].clone()
    kept[0] = ~kept[0]  # the first filter is exchanged, the others stay
    after = swapped | {"conv.weight": kept}

    seen = Recorded(lambda at: after)
    model, guide = tiny()
    start = guides.posterior(guide)
    dense = rewind(masks.full(start), start, model.net_state())
    state = pl.TrainState()
    # A training of one move, after which nothing is learned: the rate is 0 but for rounding.
    schedules.train(
        seen, 13, model, guide, tiny_data, half_mask, dense=dense, state=state,
        hooks=training.Hooks(), **OPTIONS | {"lr": 1e-30},
    )  # fmt: skip
    before, now = seen.seen[0].posterior, guides.posterior(guide)
    for name, mask in after.items():
        new, stay = mask & ~half_mask[name], mask & half_mask[name]
        assert now.loc[name][new].abs().max() < 1e-20
        survivors = (
            before.scale[name][stay] if bool(stay.any()) else torch.cat([s[s > 0] for s in before.scale.values()])
        )
        torch.testing.assert_close(now.scale[name][new], survivors.mean().expand(int(new.sum())))
        torch.testing.assert_close(now.loc[name][stay], before.loc[name][stay], rtol=0, atol=1e-20)
        assert torch.equal(now.scale[name][stay], before.scale[name][stay])


@pytest.mark.parametrize("make", [pl.guides.mean_field, pl.guides.deterministic])
def test_moments_follow_their_weights(make, half_mask):
    model, guide = tiny(make)
    after = {name: mask.clone() for name, mask in half_mask.items()}
    after["conv.weight"][0], after["conv.weight"][1, 0, 0, 0] = ~after["conv.weight"][0], True
    number = dict(zip(guide.locs(), guide.unpack(torch.arange(1.0, guide.loc.numel() + 1)).values(), strict=True))

    def moments(mask):
        """Moments that say which weight they are of."""
        kept = [flatten(t)[flatten(mask[n])] if n in mask else flatten(t) for n, t in number.items()]
        flat = torch.cat(kept)
        parameters = [p for group in guides.parameter_groups(model, guide, 0.0) for p in group["params"]]
        own = [p is guide.loc or p is getattr(guide, "log_scale", None) for p in parameters]
        return {
            i: {"exp_avg": flat if mine else torch.ones_like(p)}
            for i, (p, mine) in enumerate(zip(parameters, own, strict=True))
        }

    moved = guides.moved_moments(model, guide, moments(half_mask), half_mask, after)
    number = {n: t * half_mask[n] if n in half_mask else t for n, t in number.items()}  # 0 where a weight is new
    expected = moments(after)
    assert all(torch.equal(moved[i]["exp_avg"], own["exp_avg"]) for i, own in expected.items())


def test_the_scale_of_a_site_that_has_no_survivor_is_the_mean_of_all():
    posterior = Posterior(
        {"a": torch.ones(2, 1), "b": torch.ones(2, 1)},
        {"a": torch.tensor([[1.0], [3.0]]), "b": torch.zeros(2, 1)},
        ("a", "b"),
    )
    before = {"a": torch.tensor([[True], [True]]), "b": torch.tensor([[False], [False]])}
    after = {"a": torch.tensor([[True], [False]]), "b": torch.tensor([[True], [False]])}
    found = schedules.grown(posterior, before, after)
    assert found.scale["a"].tolist() == [[1.0], [0.0]]
    assert found.scale["b"].tolist() == [[2.0], [0.0]]
    assert found.loc["b"].tolist() == [[1.0], [0.0]]  # a posterior is given with 0 there


class Stop(Exception):
    pass


class Saving(training.Hooks):
    """Stops after step ``at`` and keeps what a checkpoint keeps; begins with what another one has ``kept``."""

    def __init__(self, model, guide, at=None, kept=None):
        self.model, self.guide, self.at, self.before = model, guide, at, kept

    def begin(self, mask):
        return (self.before and training.mask_of(self.before["state"])) or mask

    def start(self, state):
        self.state = state
        if self.before:
            state.load_state_dict(self.before["state"])
            self.guide.load_state_dict(self.before["guide"])
            self.model.load_net_state(self.before["net"])

    def stopping(self):
        return 4 * self.state.epoch + self.state.step == self.at

    def stop(self, state):
        parts = {"state": state.state_dict(), "guide": self.guide.state_dict(), "net": self.model.net_state()}
        self.kept = copy.deepcopy(parts)
        raise Stop

    def epoch_ended(self, state):
        if self.stopping():
            self.stop(state)


@pytest.mark.parametrize(
    "make", [lambda: schedules.Gradual(0.2, pl.scores.snr), lambda: schedules.Dynamic(pl.scores.snr)]
)
def test_a_training_that_is_stopped_anywhere_goes_on_with_the_same_bits(make, tiny_data, half_mask):
    def trained(pair, at=None, kept=None):
        model, guide = pair
        start = guides.posterior(tiny()[1])
        dense = rewind(masks.full(start), start, tiny()[0].net_state())
        state, hooks = pl.TrainState(), Saving(model, guide, at, kept)
        try:
            last, _ = schedules.train(
                make(), 3, model, guide, tiny_data, half_mask, dense=dense, state=state,
                hooks=hooks, **OPTIONS,
            )  # fmt: skip
        except Stop:
            return hooks.kept
        rows = [row | {"seconds": 0.0} for row in state.history]
        found = masks.apply(last, guides.posterior(guide))
        return last, found.loc, found.scale, model.net_state(), rows

    once = trained(tiny())
    for at in (1, 3, 4, 8, 11, 12, 15):  # a move is after 3, 6, 9 and 12 steps, an epoch ends after 4, 8 and 12
        again = trained(tiny(seed=7), kept=trained(tiny(), at))
        assert all(same(a, b) for a, b in zip(again[:4], once[:4], strict=True)), at
        assert again[4] == once[4], at


def test_a_guide_of_more_than_loc_and_scale_cannot_move(tiny_data):
    from pyro.infer.autoguide import AutoMultivariateNormal

    with pytest.raises(pl.UserError, match="a mask cannot move while a AutoMultivariateNormal trains"):
        run(Recorded(), tiny_data, make=partial(pl.guides.auto, AutoMultivariateNormal))
