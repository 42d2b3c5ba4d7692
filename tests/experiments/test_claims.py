"""Every claim against two made-up worlds: one in which all that the paper says is so, and one in which none of it is."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from experiments.study import kept
from experiments.study.kept import Tables
from experiments.study.statistics import EQUIVALENT, FAILS, HOLDS, UNKNOWN, Curve, corrected, depth_slope, together
from experiments.study.verdicts import judge, layers_and_controls, schedules_and_sizes, tickets, transplants, written
from experiments.study.verdicts.evidence import Evidence, gather
from experiments.study.verdicts.judge import CLAIMS
from pyro_lottery.controls import run_control
from pyro_lottery.imp import run_imp
from pyro_lottery.runs.config import preset
from pyro_lottery.tickets import CONTROLS
from tests.support import small_run

DENSITIES = [1.0, 0.5, 0.2, 0.1, 0.04, 0.01]
TICKETS = {  # accuracy by level of Bayesian tickets by snr
    "resnet20": [90, 90.5, 90.2, 89.5, 88, 80],
    "vgg11": [92, 92.3, 92.1, 91.9, 91.7, 91.5],
    "vit_tiny": [70, 72, 71, 70, 66, 60],
}
SQUARED_SUM = {"resnet20": [90, 90, 89, 88, 85, 60], "vgg11": TICKETS["vgg11"], "vit_tiny": [70, 68, 66, 64, 60, 50]}
DETERMINISTIC = {
    "resnet20": [90.1, 90.2, 89.9, 89.5, 87, 65], "vgg11": TICKETS["vgg11"], "vit_tiny": [68, 69, 69, 68, 64, 58],
}  # fmt: skip
LARGE = {"resnet20": "resnet110", "vgg11": "vgg19", "vit_tiny": "vit_base"}


class World:
    def __init__(self, seeds=3):
        self.rows, self.seeds, self.noise = [], range(seeds), np.random.default_rng(0)

    def add(self, arch, accuracy, mace=(0.05,) * 6, ms=10.0, levels=range(6), noise=0.02, **options):
        base = {"guide": "mean_field", "score": "snr", "treatment": "imp", "rewind": "init"}
        options = base | {"lr": 1e-3, "warmup_epochs": 0} | options
        if options["guide"] == "deterministic":
            options["score"] = "magnitude"
        for seed in self.seeds:
            name = "-".join(map(str, [arch, *options.values(), seed]))
            for level in levels:
                self.rows.append(
                    options
                    | {
                        "arch": arch, "seed": seed, "level": level, "density": DENSITIES[level], "run": name,
                        "accuracy": accuracy[level] + self.noise.normal(0, noise), "mace": mace[level] + self.noise.normal(0, 2e-4),
                        "step_ms": ms * self.noise.normal(1, 0.002), "train_samples": 10, "protocol": "paper", "hardware": "one", "base": options["lr"] == 1e-3 and not options["warmup_epochs"],
                    }
                )  # fmt: skip

    def evidence(self, layers):
        frame = pd.DataFrame(self.rows)
        tickets = frame[(frame["treatment"] == "imp") & (frame["rewind"] == "init") & frame["base"]]
        rows = [
            {
                "run": run,
                "arch": arch,
                "seed": seed,
                "guide": guide,
                "level": 5,
                "site": "conv",
                "depth": depth,
                "weights": 1,
                "sparsity": sparsity,
            }
            for run, arch, seed, guide in tickets[["run", "arch", "seed", "guide"]]
            .drop_duplicates()
            .itertuples(index=False)
            for depth, sparsity in enumerate(swapped(layers[guide], seed + (guide == "deterministic")), start=1)
        ]
        return Evidence(frame, pd.DataFrame(rows))


def swapped(layers, seed):
    """The same layers, of which the last two change places for odd seeds."""
    return [*layers[:-2], layers[-1], layers[-2]] if seed % 2 else layers


def shifted(accuracy, by, levels=range(1, 6)):
    return [a + by * (level in levels) for level, a in enumerate(accuracy)]


def paper_world(seeds=3):
    world = World(seeds)
    for arch, ticket in TICKETS.items():
        falling = [0.06, 0.06, 0.06, 0.05, 0.04, 0.04] if arch != "vgg11" else [0.06] * 6
        world.add(arch, ticket, falling, ms=40)
        world.add(arch, shifted(ticket, -0.1), score="magnitude")
        world.add(arch, SQUARED_SUM[arch], score="squared_sum")
        world.add(arch, DETERMINISTIC[arch], guide="deterministic")
        for guide, start in (("mean_field", ticket), ("deterministic", DETERMINISTIC[arch])):
            lost = dict(zip(CONTROLS, (-0.3, -5, -4, -0.6) if arch != "vit_tiny" else (-3, -5, -4, -3), strict=True))
            for control, by in lost.items():
                world.add(arch, shifted(start, by), levels=range(1, 6), guide=guide, treatment=control)
            late = (3, 4, 5) if arch != "resnet20" and guide == "mean_field" else range(1, 6)
            world.add(arch, shifted(start, 1.0, late), guide=guide, rewind="lr")
        moved = shifted(DETERMINISTIC[arch], -2) if arch == "vit_tiny" else ticket
        world.add(arch, moved, falling, 40, range(1, 6), treatment="transplant", score="magnitude")
        world.add(LARGE[arch], shifted(ticket, 2, range(6)), noise=0.1)
        world.add(arch, shifted(ticket, -8, range(6)), lr=1e-4)
        for warmup in (0, 2):
            world.add(arch, shifted(ticket, 5, (4, 5)), lr=1e-2, warmup_epochs=warmup)
    return world.evidence({"mean_field": [1, 2, 3, 4, 5, 6, 7, 8], "deterministic": [1, 2, 6, 4, 5, 3, 7, 8]})


def contrary_world():
    world = World()
    for arch in TICKETS:
        ticket = [90, 80, 78, 76, 74, 60]
        rising = [0.02, 0.02, 0.02, 0.04, 0.06, 0.06]
        world.add(arch, ticket, rising)
        world.add(arch, ticket, score="magnitude")
        world.add(arch, [90] * 6, score="squared_sum")
        world.add(arch, [91] * 6, guide="deterministic")
        for guide in ("mean_field", "deterministic"):
            for control in CONTROLS:
                world.add(arch, [95] * 6, levels=range(1, 6), guide=guide, treatment=control)
            world.add(arch, [50] * 6, guide=guide, rewind="lr")
        moved = [95 if arch == "vit_tiny" else 20] * 6
        world.add(arch, moved, [0.3] * 6, 10, range(1, 6), treatment="transplant", score="magnitude")
        world.add(LARGE[arch], shifted(ticket, -2, range(6)))
        world.add(arch, [99, 90, 90, 90, 90, 90], lr=1e-4)
        world.add(arch, [50] * 6, lr=1e-2)
        world.add(arch, [70] * 6, lr=1e-2, warmup_epochs=2)
    return world.evidence({"mean_field": [8, 7, 6, 5, 4, 3, 2, 1], "deterministic": [8, 7, 6, 5, 4, 3, 2, 1]})


PAPER, CONTRARY = paper_world(), contrary_world()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
class TestEachWay:
    def test_holds_where_all_is_as_the_paper_says(self, claim):
        parts = corrected(claim(PAPER))
        assert parts
        assert {part.what: part.verdict for part in parts} == {part.what: HOLDS for part in parts}
        assert together(parts) == HOLDS
        assert all(part.runs for part in parts)

    def test_fails_where_the_contrary_is_so(self, claim):
        assert FAILS in {part.verdict for part in corrected(claim(CONTRARY))}

    def test_two_seeds_and_no_runs_are_not_enough(self, claim):
        for evidence in (paper_world(seeds=2), Evidence(PAPER.levels.iloc[:0], PAPER.layers.iloc[:0])):
            parts = corrected(claim(evidence))
            assert {part.verdict for part in parts} == {UNKNOWN} == {together(parts)}


def value(claim, what):
    return next(part for part in claim(PAPER) if part.what == what).mean


def test_statistics_by_hand():
    assert value(tickets.claim_1, "resnet20: accuracy − dense at 20 % remaining") == pytest.approx(0.2, abs=0.1)
    fall = (90 - 60) - (90 - 80)
    assert value(tickets.claim_2, "resnet20: fall of squared_sum − fall of snr") == pytest.approx(fall, abs=0.1)
    assert value(tickets.claim_5, "resnet20: MACE at high sparsity − dense") == pytest.approx(-0.02, abs=1e-3)
    # Per unit of depth, from 1 to 8: Σ(d − 4.5) s / Σ(d − 4.5)², of [1, 2, 6, 4, 5, 3, 7, 8], and with the last two swapped one less.
    rise = 100 * 7 * np.mean([32, 33, 32]) / 42
    assert value(layers_and_controls.claim_6, "vgg11: rise of sparsity with depth, deterministic") == pytest.approx(
        rise
    )
    assert value(transplants.claim_11, "vgg11: time, Bayesian / deterministic, weight samples: 10") == pytest.approx(
        4, rel=0.01
    )
    saved = 1 - (20 * 10 + 40) / (21 * 40)
    assert value(transplants.claim_11, "vgg11: compute saved by transplantation") == pytest.approx(saved, rel=0.01)
    assert value(schedules_and_sizes.claim_14, "vit_tiny: low rate 0.0001 − the usual rate") == pytest.approx(
        -8, abs=0.1
    )


@pytest.mark.parametrize(("curve", "density"), [([90, 91, 90.4, 92, 85, 80], 10), ([90, 91, 89, 92, 85, 80], 50)])
def test_the_sparsest_level_that_matches_as_all_denser_ones_do_is_reported(curve, density):
    world = World()
    world.add("resnet20", curve)
    part, *others = corrected(tickets.claim_1(world.evidence({"mean_field": [0.1, 0.2]})))
    assert part.what == f"resnet20: accuracy − dense at {density} % remaining"
    assert part.verdict == HOLDS
    assert {other.values for other in others} == {()}  # of vgg11 and vit_tiny


def one(claim, world, what):
    evidence = world.evidence({"mean_field": [0.1, 0.2], "deterministic": [0.1, 0.2]})
    return next(part for part in corrected(claim(evidence)) if part.what.startswith(what))


def test_noise_alone_matches_nothing():
    world = World()
    world.add("resnet20", [90, 80, 80, 80, 80, 80])
    for row in world.rows:
        row["accuracy"] += {0: 25.0, 1: -15.0, 2: 0.0}[row["seed"]] * (row["level"] > 0)
    assert one(tickets.claim_1, world, "resnet20").verdict == UNKNOWN, "a standard error of 11 points"


def test_a_tie_is_equivalent():
    world = World()
    for options in ({}, {"score": "magnitude"}, {"score": "squared_sum"}, {"guide": "deterministic"}):
        world.add("resnet20", [10] * 6, **options)
    for row in world.rows:
        row["accuracy"] = 10.0 + row["seed"] / 100 * (row["level"] == 5) * (row["score"] == "snr")
    assert one(tickets.claim_2, world, "resnet20: fall of squared_sum − fall of snr").verdict == EQUIVALENT
    for row in world.rows:
        row["accuracy"] = 10.0 + row["seed"] / 100 * (row["level"] == 5) * (len(row["run"]) % 7 + 1)
    claim = next(
        c for c in judge.judge(world.evidence({"mean_field": [0.1, 0.2], "deterministic": [0.1, 0.2]})) if c.number == 2
    )
    assert claim.networks == {"resnet20": EQUIVALENT}
    assert "equivalent within 1 |" in written.markdown([claim], [], "test_accuracy")


def test_one_level_far_off_is_not_averaged_away():
    world = World()
    for score in ("snr", "magnitude", "squared_sum"):
        world.add("vgg11", [92, 94.5, 93, 88.6, 80, 70], score=score)
    part = one(tickets.claim_3, world, "vgg11: snr − dense")
    assert part.verdict == FAILS
    assert part.mean == pytest.approx(-3.4, abs=0.1)


def test_the_cost_is_judged_with_the_papers_samples_alone():
    world = World()
    world.add("resnet20", [90] * 6)
    world.add("resnet20", [90] * 6, guide="deterministic")
    world.add("resnet20", [90] * 6, treatment="transplant", score="magnitude")
    for samples, verdict in ((10, FAILS), (1, UNKNOWN)):
        for row in world.rows:
            row["train_samples"] = samples
        for what in ("time", "compute saved"):
            part = one(transplants.claim_11, world, f"resnet20: {what}")
            assert (part.verdict, part.why_not != "") == (verdict, samples == 1)
    claim = judge.Claim(11, "", [part])
    assert "| cannot tell (needs 10 weight samples a batch) |" in written.markdown([claim], [], "test_accuracy")


def test_runs_that_only_time_steps_decide_the_cost_and_nothing_else():
    costs = PAPER.levels
    costs = costs[costs["arch"] == "resnet20"].assign(protocol="costs", accuracy=10.0)
    one_sample = PAPER.levels.assign(train_samples=1)
    both = Evidence(pd.concat([one_sample, costs]), PAPER.layers)
    without, found = judge.judge(Evidence(one_sample, PAPER.layers)), judge.judge(both)
    assert without[10].verdict == UNKNOWN
    assert found[10].networks == {"resnet20": HOLDS, "vgg11": UNKNOWN, "vit_tiny": UNKNOWN}
    assert [c.parts for c in found if c.number != 11] == [c.parts for c in without if c.number != 11]


def test_a_rate_without_all_seeds_is_still_the_high_one():
    """Where the high rate fails, it does not become the usual one because a seed of it diverged."""
    world = World()
    world.add("resnet20", TICKETS["resnet20"])
    for rate, accuracy in ((1e-4, shifted(TICKETS["resnet20"], -8, range(6))), (1e-2, [50] * 6)):
        world.add("resnet20", accuracy, lr=rate)
    high = "resnet20: high rate 0.01 − 0.001 at high sparsity"
    assert one(schedules_and_sizes.claim_14, world, high).verdict == FAILS
    world.rows = [row for row in world.rows if (row["lr"], row["seed"]) != (1e-2, 2)]
    part = one(schedules_and_sizes.claim_14, world, high)
    assert (part.verdict, len(part.values)) == (UNKNOWN, 2)
    evidence = world.evidence({"mean_field": [0.1, 0.2]})
    rows = written.markdown(judge.judge(evidence)[-1:], [], "test_accuracy")
    assert f"| {high} | -35 [-35.1, -34.9] | 2 of 3 |" in re.sub(r"-3\d\.?\d* \[[^]]*\]", "-35 [-35.1, -34.9]", rows)


def test_curves_are_compared_over_the_same_levels():
    """A run of other length is no reason for another fall, and no cheaper."""
    world = World()
    for options in ({}, {"score": "magnitude"}):
        world.add("resnet20", [90, 89, 88, 87, 60, 50], **options)
    for options in ({"score": "squared_sum"}, {"guide": "deterministic"}):
        world.add("resnet20", [90, 89, 88, 87, 60, 50], levels=range(5), **options)
    for row in world.rows:
        row["density"] = {4: 0.019, 5: 0.01}.get(row["level"], row["density"])
    for fast in ("squared_sum", "deterministic"):
        for slow in ("snr", "magnitude"):
            assert one(tickets.claim_2, world, f"resnet20: fall of {fast} − fall of {slow}").mean == pytest.approx(
                0, abs=0.1
            )
    world = World()
    world.add("resnet20", [90] * 6, ms=20.0, levels=range(3))
    world.add("resnet20", [90] * 6, guide="deterministic")
    for row in world.rows:
        row["step_ms"] /= 1 + row["level"]
    ratio = one(transplants.claim_11, world, "resnet20: time")
    assert (ratio.mean, ratio.verdict) == (pytest.approx(2, rel=0.01), FAILS)


def test_the_saving_is_that_of_the_papers_levels():
    """Level i of the paper costs what lies between this study's levels, by the logarithm of density; transplants have one level here."""
    world, at = World(), [1, *(0.8**i for i in (5, 10, 20))]
    for options in (
        {"ms": 40.0},
        {"guide": "deterministic"},
        {"ms": 40.0, "treatment": "transplant", "score": "magnitude"},
    ):
        world.add("resnet20", [90] * 6, levels=[3] if "treatment" in options else range(4), **options)
    for row in world.rows:
        row["density"] = at[row["level"]]
        row["step_ms"] *= [1, 0.5, 0.5, 0.25][row["level"]]
    share = [1, 0.9, 0.8, 0.7, 0.6, *[0.5] * 6, *(0.5 - 0.025 * i for i in range(1, 11))]
    saved = 1 - (10 * sum(share[:-1]) + 40 * 0.25) / (40 * sum(share))
    part = one(transplants.claim_11, world, "resnet20: compute saved")
    assert part.values == pytest.approx([saved] * 3, rel=0.01)


def test_a_deviation_up_does_not_cancel_one_down():
    for arch in ("resnet20", "vgg11"):
        world = World()
        world.add(arch, [90] * 6)
        world.add(arch, [90] * 6, guide="deterministic")
        apart, off = [90, 90, 96, 84, 90, 90], [0.05, 0.05, 0.11, -0.01, 0.05, 0.05]
        world.add(arch, apart, off, levels=(2, 3), treatment="transplant", score="magnitude")
        world.add(arch, apart, levels=(2, 3), treatment="reinit")
        claims = (
            (transplants.claim_9, "transplanted − Bayesian"),
            (transplants.claim_10, "MACE"),
            (layers_and_controls.claim_8, "ticket − reinit"),
        )
        for claim, what in claims:
            part = one(claim, world, f"{arch}: {what}")
            assert part.verdict == FAILS
            assert "at every level (2, 3)" in part.wanted
    world = World()
    world.add("vgg11", [90] * 6, [0.05, 0.05, 0.05, 0.05, 0.15, -0.05])
    assert one(tickets.claim_5, world, "vgg11").verdict == FAILS


def test_a_rise_in_between_is_no_steady_fall():
    world = World()
    world.add("vit_tiny", [70, 69, 76, 64, 68, 60], score="squared_sum")
    part = one(tickets.claim_4, world, "vit_tiny: squared_sum")
    assert (part.verdict, part.what) == (
        FAILS,
        "vit_tiny: squared_sum − squared_sum one level before, worst at level 2",
    )
    assert part.mean == pytest.approx(7, abs=0.1)


def test_the_level_that_is_shown_is_the_one_that_fails():
    world = World()
    world.add("vgg11", [90] * 6, noise=0)
    for row in world.rows:
        row["accuracy"] += {1: (-4, 8, 5), 2: (2, 2.01, 1.99)}.get(row["level"], (0, 0, 0))[row["seed"]]
    part = one(tickets.claim_3, world, "vgg11: snr − dense")
    assert (part.verdict, part.what) == (FAILS, "vgg11: snr − dense, worst at level 2")


def test_all_seeds_of_a_study_have_to_be_in():
    """Three of five planned ones give no verdict, nor do those that are left where others diverged."""
    for seeds, verdict in ((3, UNKNOWN), (5, HOLDS)):
        world = World(seeds)
        world.add("resnet20", TICKETS["resnet20"])
        evidence = world.evidence({"mean_field": [0.1, 0.2]})
        evidence = Evidence(evidence.levels.assign(protocol="evidence"), evidence.layers)
        assert judge.judge(evidence)[0].networks["resnet20"] == verdict
    rows = evidence.levels[(evidence.levels["seed"] < 3) | (evidence.levels["level"] == 0)]
    claim = judge.judge(Evidence(rows, evidence.layers))[0]
    assert (claim.networks["resnet20"], claim.parts[0].why_not) == (UNKNOWN, "3 of 5 seeds")
    assert "| 3 of 5 |" in written.markdown([claim], [], "test_accuracy")


def test_a_shorter_run_does_not_change_the_level_at_which_others_are_compared(tmp_path, capsys):
    for seed, levels in ((0, 2), (1, 2), (2, 1)):
        config = preset(
            "smoke", arch="lenet", dataset="digits", levels=levels, seed=seed, run_dir=str(tmp_path / str(seed))
        )
        run_imp(config)
    evidence, _ = gather([tmp_path], "smoke")
    assert set(evidence.levels["seed"]) == {0, 1}
    assert set(evidence.layers["run"]) == {"0", "1"}
    assert capsys.readouterr().err.endswith("left out, without all levels of their protocol: 2\n")


def test_an_advantage_at_medium_sparsity_is_not_one_at_high_sparsity_only():
    world = World()
    world.add("vit_tiny", [70] * 6)
    world.add("vit_tiny", [70.5, 70.5, 70.5, 70.1, 70.1, 70.1], rewind="lr")
    assert one(schedules_and_sizes.claim_12, world, "vit_tiny, Bayesian: LRR − IMP at high sparsity").verdict != FAILS
    assert one(schedules_and_sizes.claim_12, world, "vit_tiny, Bayesian: LRR − IMP at high − medium").verdict == FAILS


def test_matching_has_one_margin():
    """A sparse network 0.8 points below the dense one does not match it, in claim 1 as in claim 14."""
    world = World()
    for rate in (1e-4, 1e-3):
        world.add("resnet20", [90, 89.2, 89.2, 89.2, 89.2, 89.2], lr=rate)
    assert one(tickets.claim_1, world, "resnet20").verdict == FAILS
    assert one(schedules_and_sizes.claim_14, world, "resnet20: low rate 0.0001, sparse − dense").verdict == FAILS


def test_sign_flips_are_of_the_level_that_is_tested_first():
    world = World()
    world.add("resnet20", [90, 80, 91, 91, 91, 91])
    part = one(tickets.claim_1, world, "resnet20")
    assert (part.p_flips, part.p_holds > 0.9) == (1.0, True)


def test_beating_means_the_same_at_medium_sparsity():
    for gain, verdict in ((0.7, FAILS), (0.0, HOLDS), (-3.0, HOLDS)):
        world = World()
        world.add("vit_tiny", [70] * 6)
        world.add("vit_tiny", [70 + gain] * 6, rewind="lr")
        assert one(schedules_and_sizes.claim_12, world, "vit_tiny, Bayesian: LRR − IMP at medium").verdict == verdict


def test_few_levels_have_no_correlation():
    levels = PAPER.levels[PAPER.levels["arch"].isin(["resnet20", "resnet110"])]
    for most, count in ((5, 3), (4, 3), (3, 0)):
        parts = schedules_and_sizes.claim_13(Evidence(levels[levels["level"] <= most], PAPER.layers))
        assert [len(p.values) for p in parts if p.what == "resnet110, resnet20: correlation of the curves"] == [count]


def test_a_claim_of_all_networks_needs_all_families():
    levels = PAPER.levels[PAPER.levels["arch"].isin(["resnet20", "resnet110"])]
    found = judge.judge(Evidence(levels, PAPER.layers))
    assert {claim.networks["resnet20"] for claim in found if "resnet20" in claim.networks} == {HOLDS}
    assert {claim.verdict for claim in found if claim.number != 2} == {UNKNOWN}


@pytest.mark.parametrize("names", [["0", "1", "2"], ["007", "null", "1e3"]])
def test_the_kept_evidence_is_the_evidence_whatever_the_runs_are_called(names, tmp_path):
    every = [run for run in PAPER.levels["run"].unique() if "-imp-" in run]
    runs = dict(zip(every, [*names, *(f"{n}-{name}" for n, name in enumerate(names * 99))], strict=False))
    for run, treatment in PAPER.levels[["run", "treatment"]].drop_duplicates().itertuples(index=False):
        if treatment != "imp":  # within the folder of the run that it is made from
            of = run.replace("mean_field-magnitude-transplant", "deterministic-magnitude-imp")
            runs[run] = f"{runs[of.replace(treatment, 'imp')]}/{treatment}"
    levels = PAPER.levels.assign(
        run=PAPER.levels["run"].map(runs),
        protocol="made-up",
        description="made-up, made-up protocol: none",
        test_accuracy=PAPER.levels["accuracy"] / 100,
    )
    levels = levels.assign(max_test_accuracy=levels["test_accuracy"]).sort_values(["run", "level"], ignore_index=True)
    layers = PAPER.layers.assign(run=PAPER.layers["run"].map(runs))
    evidence = Evidence(levels.assign(accuracy=100 * levels["test_accuracy"]), layers)
    kept.write(Tables(evidence.levels, evidence.layers), tmp_path)
    found, _ = gather([tmp_path])
    assert set(names) <= set(found.layers["run"])
    assert [claim.parts for claim in judge.judge(found)] == [claim.parts for claim in judge.judge(evidence)]


def test_a_control_counts_when_all_its_levels_are_finished(tmp_path):
    run = small_run(tmp_path / "run", levels=2, epochs=1)
    for level, found in ((1, {"imp"}), (2, {"imp", "reinit"})):
        run_control(run, "reinit", [level])
        evidence, _ = gather([tmp_path])
        assert set(evidence.levels["treatment"]) == found


def test_runs_whose_layers_no_claim_compares_are_no_error(tmp_path):
    small_run(tmp_path / "run", score="squared_sum", levels=1, epochs=1)
    written.write([tmp_path], tmp_path / "judged")
    text = (tmp_path / "judged" / "claims.md").read_bytes()
    written.write([tmp_path / "judged"], tmp_path / "again")
    assert text == (tmp_path / "again" / "claims.md").read_bytes()
    assert gather([tmp_path])[0].layers.empty


def test_shortcuts_have_no_depth():
    layers = pd.DataFrame({"seed": 0, "site": ["conv", "shortcut.0", "conv2", "conv3"], "depth": [1, 2, 3, 4]})
    rise = (
        100 * 3 * (-5 * 0.1 + 0.2 + 4 * 0.3) / 3 / (25 + 1 + 16) * 9
    )  # depths 1, 3, 4 less their mean are −5/3, 1/3, 4/3
    assert depth_slope(layers.assign(sparsity=[0.1, 0.0, 0.2, 0.3])).tolist() == pytest.approx([rise])
    assert depth_slope(layers.assign(sparsity=[0.1, 0.0, 0.1, 0.1])).tolist() == pytest.approx([0.0])


def test_controls_of_some_levels_are_compared_at_those():
    ticket, control = World(), World()
    ticket.add("resnet20", [90, 80, 70, 60, 50, 40])
    control.add("resnet20", [0, 79, 0, 57, 0, 0], levels=(1, 3))
    ahead = Curve(pd.DataFrame(ticket.rows)).ahead_of(Curve(pd.DataFrame(control.rows)), "accuracy")
    assert ahead.tolist() == pytest.approx([2.0] * 3, abs=0.1)


def test_a_claim_has_a_verdict_for_all_networks_where_each_has_one():
    world = World()
    for score in ("snr", "magnitude", "squared_sum"):
        world.add("vgg11", TICKETS["vgg11"], score=score)
    world.add("vit_tiny", [70, 60, 60, 60, 60, 60])
    found = {c.number: c for c in judge.judge(world.evidence({"mean_field": [0.1, 0.2]}))}
    assert found[1].networks == {"resnet20": UNKNOWN, "vgg11": HOLDS, "vit_tiny": FAILS}
    assert found[1].verdict == UNKNOWN
    world.add("resnet20", TICKETS["resnet20"])
    assert judge.judge(world.evidence({"mean_field": [0.1, 0.2]}))[0].verdict == FAILS
    assert found[3].verdict == HOLDS
    assert found[5].networks == {"resnet20": UNKNOWN, "vgg11": HOLDS, "vit_tiny": EQUIVALENT}
    assert found[5].verdict == UNKNOWN


def test_the_written_table_says_value_interval_and_verdict(tmp_path):
    judged = judge.judge(PAPER)
    assert [claim.number for claim in judged] == list(range(1, 15))
    text = written.markdown(judged, ["made-up data"], "test_accuracy")
    assert text.count("**holds**") == 14
    assert "- made-up data\n" in text
    plain = json.loads(json.dumps(written.to_json(judged, ["made-up data"], "test_accuracy")))
    first = plain[0]["parts"][0]
    assert first["interval"][0] < first["mean"] < first["interval"][1]
    assert len(first["values"]) == 3
    assert first["runs"]
    assert first["bca_interval"] is None  # of three seeds
    assert first["p_flips"] == 1 / 8
    assert plain[0]["networks"] == {"resnet20": HOLDS, "vgg11": HOLDS, "vit_tiny": HOLDS}
