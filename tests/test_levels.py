"""A level starts from its ticket, trains under its mask, is measured, and has its row."""

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import levels, training
from pyro_lottery.types import Posterior, Ticket, ticket_checksum

OPTIONS = {"batch_size": 16, "lr": 0.01, "seed": 3, "precision": "32", "milestones": ()}


@pytest.fixture
def guide(tiny_model):
    return pl.guides.mean_field(tiny_model)


@pytest.fixture
def ticket(tiny_model, guide, half_mask):
    return pl.tickets.rewind(half_mask, pl.posterior(guide), tiny_model.net_state())


def train(model, guide, data, ticket, epochs=2, hooks=None, **options):
    return levels.train_level(
        model, guide, data, ticket, 1, first_epoch=0, eval_samples=3, hooks=hooks or training.Hooks(), epochs=epochs,
        **OPTIONS | options,
    )  # fmt: skip


def test_a_level_is_its_ticket_trained_and_measured(tiny_model, guide, tiny_data, ticket):
    """The same by hand: start, train under the mask, measure with the random stream of the level's predictions."""
    trained = train(tiny_model, guide, tiny_data, ticket)
    by_hand = pl.guides.mean_field(tiny_model)
    with pl.handlers.sparsify(ticket.mask):
        tiny_model.start_from_(by_hand, ticket)
        history = pl.train(tiny_model, by_hand, tiny_data, epochs=2, level=1, **OPTIONS)
        with pl.seeds.rng("cpu", 3, "predict", 1):
            probs = pl.predict(tiny_model, by_hand, tiny_data.test, num_samples=3)
    assert trained.measured == pl.metrics.all_metrics(probs, tiny_data.test.targets)
    assert [row["loss"] for row in trained.history] == [row["loss"] for row in history]
    expected = pl.posterior(by_hand)
    for name, loc in trained.posterior.loc.items():
        kept = ticket.mask.get(name, torch.ones_like(loc, dtype=torch.bool))
        assert torch.equal(loc, expected.loc[name] * kept)
        assert not loc[~kept].any()
        assert not trained.posterior.scale[name][~kept].any()
    assert trained.steps == 4, "60 images in batches of 16: the last has 12"


def test_a_level_can_be_trained_again_and_another_ticket_gives_other_bits(tiny_model, guide, tiny_data, ticket):
    first = train(tiny_model, guide, tiny_data, ticket)
    again = train(tiny_model, guide, tiny_data, ticket)
    assert all(torch.equal(value, again.posterior.loc[name]) for name, value in first.posterior.loc.items())
    moved = Ticket(ticket.mask, Posterior({n: 2 * v for n, v in ticket.start.loc.items()}, ticket.start.scale, ticket.start.prunable), ticket.net)  # fmt: skip
    assert ticket_checksum(moved) != ticket_checksum(ticket)
    other = train(tiny_model, guide, tiny_data, moved)
    assert not torch.equal(other.posterior.loc["out.weight"], first.posterior.loc["out.weight"])


def test_the_row_of_a_level(tiny_model, guide, tiny_data, ticket):
    trained = train(tiny_model, guide, tiny_data, ticket)
    row = levels.result(1, trained)
    kept, total = pl.masks.remaining(ticket.mask), pl.masks.total(ticket.mask)
    assert (row.level, row.remaining, row.total, row.density) == (1, kept, total, kept / total)
    assert row.test_accuracy == trained.measured["accuracy"]
    assert row.max_test_accuracy == max(row.test_accuracy, *(r["test_accuracy"] for r in trained.history))
    seconds = [r["seconds"] for r in trained.history]
    assert row.train_seconds == sum(seconds)
    assert row.step_ms == pytest.approx(1000 * (seconds[0] + seconds[1]) / 2 / 4)
    assert (row.rmse, row.coverage_95, row.val_accuracy) == (None, None, None)


def test_the_epoch_with_the_best_validation_accuracy_is_chosen():
    history = [{"val_accuracy": v, "test_accuracy": t} for v, t in ((0.5, 0.9), (0.7, 0.6), (0.7, 0.8))]
    columns = levels._columns({"accuracy": 0.5, "nll": 1.0, "mace": 0.1, "ece": 0.1, "brier": 0.1}, history)
    assert columns["val_accuracy"] == 0.7
    assert columns["selected_test_accuracy"] == 0.6, "the first of two equal ones"
    assert columns["max_test_accuracy"] == 0.9


def test_hooks_are_entered_while_the_level_is_measured(tiny_model, guide, tiny_data, ticket):
    class Interrupted(training.Hooks):
        def measuring(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, guide, tiny_data, ticket, hooks=Interrupted())
