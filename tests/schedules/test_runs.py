"""Runs whose density falls while level 0 trains."""

import warnings
from dataclasses import replace

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import controls, evaluate, export, imp, masks, report, transplant
from pyro_lottery.errors import Stopped
from pyro_lottery.runs.checkpoint import LevelHooks
from pyro_lottery.runs.config import Config, preset
from tests.model.test_mask_check import Standardised
from tests.support import SMALL, fingerprint, same, small_run

MOVING = {
    "schedule": "dynamic",
    "prune_to": 0.1,
    "epochs": 4,
    "milestones": (3,),
    "batch_size": 50,
    "levels": 1,
    "lr": 0.01,
}
"""Sixteen steps, after each of which the mask moves until the twelfth."""


@pytest.fixture(params=["dynamic", "gradual"])
def run(request, tmp_path):
    return small_run(tmp_path / "run", **MOVING | {"schedule": request.param})


def test_level_0_ends_with_the_density_and_level_1_trains_what_it_has_found(run):
    found, ticket = run.level(0), run.level(1).ticket
    total = masks.total(found.mask)
    assert run.results["remaining"].tolist() == [-(-total // 10)] * 2
    begun = found.ticket.mask
    assert masks.density(begun) == (1.0 if run.config.schedule == "gradual" else run.results["density"][0])
    assert not same(begun, found.mask)
    assert same(ticket.mask, found.mask)
    initial = run.initial(run.config.seed)
    assert same(ticket.start.loc, masks.apply(found.mask, initial.start).loc)
    assert same(found.load_model().mask, found.mask)
    for name, mask in found.mask.items():
        assert not bool(found.posterior.loc[name][~mask].any())
        assert bool((found.posterior.scale[name][mask] > 0).all())
    assert same(run.folder.mask(0), found.mask)


def test_the_saved_network_gives_the_probabilities_behind_the_results(run):
    data = run.load_data()
    network = run.level(0).load_model()
    probabilities = network.predict(data.test, run.config.eval_samples, run.config.seed)
    accuracy = float((probabilities.argmax(1) == data.test.targets).double().mean())
    assert accuracy == pytest.approx(run.results["test_accuracy"][0])


def test_a_finished_run_trains_nothing_again(run, capsys):
    before = fingerprint(run.folder.path)
    capsys.readouterr()
    imp.run_imp(run.config)
    assert fingerprint(run.folder.path) == before
    assert "level 0" not in capsys.readouterr().out


def test_a_control_has_the_initial_values_of_weights_that_were_pruned(run):
    with warnings.catch_warnings(action="ignore"):
        done = controls.run_control(run, "shuffle_global", [1])
    ticket, initial = done.level(1).ticket, run.initial(run.config.seed)
    assert same(ticket.start.loc, masks.apply(ticket.mask, initial.start).loc)
    assert not same(ticket.mask, run.level(1).ticket.mask)


@pytest.mark.parametrize("schedule", ["dynamic", "gradual"])
@pytest.mark.parametrize("guide", ["mean_field", "deterministic"])
def test_a_run_that_was_stopped_within_level_0_goes_on_with_the_same_bits(schedule, guide, tmp_path, monkeypatch):
    options = SMALL | MOVING | {"schedule": schedule, "guide": guide, "levels": 0, "mask_every": 3}
    whole = imp.run_imp(Config(**options, run_dir=str(tmp_path / "whole")))
    config = Config(**options, run_dir=str(tmp_path / "stopped"))
    for asks in (3, 5, 1, 2):  # at a move, in the second epoch, after one more step, and at a move
        asked = []
        with monkeypatch.context() as patch:
            patch.setattr(
                LevelHooks, "stopping", lambda self, asked=asked, asks=asks: asked.append(0) or len(asked) >= asks
            )
            with pytest.raises(Stopped):
                imp.run_imp(config)
    assert fingerprint(imp.run_imp(config).folder.path) == fingerprint(whole.folder.path)


def test_gradual_pruning_rewinds_late(tmp_path):
    run = small_run(tmp_path / "run", **MOVING | {"schedule": "gradual", "rewind": "epoch:1"})
    ticket, point = run.level(1).ticket, run.folder.load_rewind_point()[0]
    assert same(ticket.start.loc, masks.apply(run.level(0).mask, point).loc)
    assert len(run.level(1).history) == 3


def test_a_deterministic_ticket_found_in_one_training_is_transplanted(tmp_path):
    run = small_run(tmp_path / "run", **MOVING | {"guide": "deterministic"})
    done = transplant.transplant_run(run, [1])
    assert same(done.level(1).ticket.mask, run.level(0).mask)


def test_options_follow_from_the_schedule():
    assert Config().levels == 20
    assert Config(schedule="gradual", prune_to=0.1).levels == 0
    one = Config(schedule="one_shot", prune_to=0.05)
    assert one == Config(levels=1, prune_to=0.05)  # so that both may share a level 0
    assert (one.levels, one.prune_fraction, one.schedule) == (1, 0.95, "iterative")
    assert preset("quick", schedule="dynamic", prune_to=0.1).levels == 0
    assert preset("quick", schedule="one_shot", prune_to=0.1).levels == 1
    assert preset("quick").levels == 2
    again = Config(schedule="dynamic", prune_to=0.1, mask_every=7)
    assert Config(**again.options()) == again
    assert "dynamic" in again.name()
    assert "prune_to0.1" in again.name()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "sudden"}, "unknown --schedule 'sudden'"),
        ({"schedule": "dynamic"}, "--schedule dynamic needs --prune-to, the density that it ends with"),
        ({"schedule": "one_shot"}, "--schedule one_shot needs --prune-to"),
        ({"schedule": "gradual", "prune_to": 0.1, "prune_fraction": 0.5}, "--schedule gradual prunes to --prune-to"),
        ({"schedule": "gradual", "prune_to": 0.1, "levels": 3}, "--levels must be 0 or 1 with --schedule gradual, got 3"),
        ({"schedule": "one_shot", "prune_to": 0.1, "levels": 0}, "--levels must be 1 with --schedule one_shot, got 0"),
        ({"prune_to": 0.1, "prune_fraction": "evidence"}, "--prune-fraction evidence chooses the density itself"),
        ({"mask_every": 3}, "--mask-every is for --schedule gradual and dynamic"),
        ({"schedule": "dynamic", "prune_to": 0.1, "mask_every": 0}, "--mask-every must be at least 1, got 0"),
        ({"schedule": "dynamic", "prune_to": 0.1, "devices": 2}, "--schedule dynamic trains on one device"),
        ({"schedule": "dynamic", "prune_to": 0.1, "rewind": "epoch:1"}, "--rewind epoch:1 has no values for weights"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(options, message):
    with pytest.raises(pl.UserError, match=message):
        Config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_every": 8}, "--mask-every 8 changes the mask last after 8 of 16"),
        ({"guide": "pyro.infer.autoguide.AutoMultivariateNormal", "arch": "tests.schedules.test_runs:small"}, "a mask cannot move"),
        ({"guide": "deterministic", "score": "squared_sum"}, "--score squared_sum needs scales"),
    ],
)  # fmt: skip
def test_what_cannot_be_completed_is_one_line_before_any_training(options, message, tmp_path):
    with pytest.raises(pl.UserError, match=message):
        small_run(tmp_path / "run", **MOVING | {"mask_every": 3} | options)
    assert not (tmp_path / "run").exists()


def standardised(num_classes):
    return torch.nn.Sequential(Standardised(1, 4, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(256, num_classes))


def test_layers_that_transform_their_weights_are_pruned_gradually_alone(tmp_path):
    options = MOVING | {"levels": 0, "arch": "tests.schedules.test_runs:standardised"}
    with pytest.raises(
        pl.UserError, match=r"the layer of '0.weight' transforms its weights, .* use --schedule gradual"
    ):
        small_run(tmp_path / "dynamic", **options)
    run = small_run(tmp_path / "gradual", **options | {"schedule": "gradual"})
    assert run.results["remaining"].tolist() == [4]


def small(num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2), torch.nn.Linear(2, num_classes))


def test_a_level_0_whose_mask_moved_is_shared_by_the_same_score_alone(tmp_path):
    options = MOVING | {"schedule": "gradual"}
    first = small_run(tmp_path / "first", **options)
    with pytest.raises(pl.UserError, match="its score is snr, here it is magnitude"):
        small_run(tmp_path / "other", **options | {"score": "magnitude", "level0_from": str(first.folder.path)})
    again = small_run(tmp_path / "again", **options | {"level0_from": str(first.folder.path)})
    assert same(again.level(0).mask, first.level(0).mask)
    assert same(again.level(1).posterior.loc, first.level(1).posterior.loc)


def test_shuffles_of_a_gradual_run_that_rewinds_late_are_refused(tmp_path):
    run = small_run(tmp_path / "run", **MOVING | {"schedule": "gradual", "rewind": "restart:1"})
    with pytest.raises(pl.UserError, match="--control shuffle_even needs the values of pruned weights"):
        controls.run_control(run, "shuffle_even")
    assert controls.run_control(run, "reinit").results["level"].tolist() == [1]


def test_a_transplant_of_level_0_has_the_mask_that_was_found(tmp_path):
    run = small_run(tmp_path / "run", **MOVING | {"guide": "deterministic", "levels": 0})
    done = transplant.transplant_run(run, [0])
    assert same(done.level(0).ticket.mask, run.level(0).mask)
    assert same(done.level(0).mask, run.level(0).mask)  # and it stays
    assert transplant.transplant_run(run).results["level"].tolist() == [0]  # the only level is the default
    with pytest.raises(pl.UserError, match="schedule does not go with a transplant"):
        transplant.transplant_run(run, [0], schedule="gradual")


def test_random_removal_has_new_noise_at_every_move(tmp_path, monkeypatch):
    seen, real = [], pl.scores.random
    monkeypatch.setattr(pl.scores, "random", lambda posterior, seed=0: seen.append(seed) or real(posterior, seed))
    small_run(tmp_path / "run", **MOVING | {"score": "random", "levels": 0})
    assert len(set(seen)) == len(seen) > 5


def test_a_dynamic_run_of_a_loader(tiny_data, tmp_path):
    x, y = tiny_data.train[torch.arange(60)], tiny_data.train.targets
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    found = pl.find_tickets(
        net, pl.data.from_loaders(loader, loader), run_dir=tmp_path / "run", schedule="dynamic", prune_to=0.25, epochs=5,
        milestones=(), eval_samples=2,
    )  # fmt: skip
    assert found.results["remaining"].tolist() == [32]


@pytest.mark.slow
def test_a_run_whose_mask_moved_is_exported_with_a_card_evaluated_and_reported(tmp_path):
    run = small_run(tmp_path / "run", **MOVING | {"levels": 0})
    folder = str(run.folder.path)
    assert export.main([folder, "--level", "0", "--format", "safetensors", "-o", str(tmp_path / "small")]) == 0
    text = (tmp_path / "small" / "README.md").read_text()
    assert "found by dynamic sparse training" in text
    assert "pruned to 10 % while it trained" in text
    assert same(pl.Ticket.load(tmp_path / "small" / "ticket.safetensors").mask, run.level(0).mask)
    assert evaluate.main([folder]) == 0
    assert report.main([folder, "-o", str(tmp_path / "report.html")]) == 0
    layers = pl.tables.layers([run])
    assert layers["density"].tolist() == list(masks.density_per_site(run.level(0).mask).values())


def test_a_run_made_in_python(tmp_path, tiny_data):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    found = pl.find_tickets(
        net, tiny_data, run_dir=tmp_path / "run", schedule="dynamic", prune_to=0.25, epochs=4, batch_size=16, milestones=(),
        eval_samples=2,
    )  # fmt: skip
    assert found.results["remaining"].tolist() == [32]
    assert replace(found.config, run_dir=None).schedule == "dynamic"


def test_a_random_mask_that_leaves_a_layer_without_weights_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="no weight is left of"):
        small_run(tmp_path / "run", **MOVING | {"prune_to": 1e-4, "levels": 0})


def test_the_best_epoch_is_one_of_the_final_mask(tmp_path):
    """At 0.2 % the network is worse than at the densities that it passes."""
    options = MOVING | {"schedule": "gradual", "prune_to": 0.002, "epochs": 10, "milestones": (8,), "levels": 0}
    run = small_run(tmp_path / "run", **options, val_fraction=0.2)
    history, row = run.level(0).history, run.results.iloc[0]
    settled = history[history["epoch"] >= 8]  # of 30 steps, the mask moves last after step 23, in the eighth epoch
    assert history["test_accuracy"].max() > settled["test_accuracy"].max()
    assert row["max_test_accuracy"] == max(row["test_accuracy"], settled["test_accuracy"].max())
    assert row["val_accuracy"] == settled["val_accuracy"].max()
    chosen = settled.loc[settled["val_accuracy"].idxmax()]
    assert row["selected_test_accuracy"] == chosen["test_accuracy"]
