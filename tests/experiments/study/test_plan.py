import json
import re
from dataclasses import asdict
from functools import partial

import pytest

from experiments.command import jobs_of, main, parser, study_of
from experiments.study import plan
from experiments.study.plan import Cost, disk, measure_together
from pyro_lottery.runs.config import preset
from pyro_lottery.tables import list_runs


def test_a_level_takes_the_bytes_that_were_planned(smoke_study):
    for run in list_runs(smoke_study):
        if run.config.arch != "lenet":  # a small network's files are mostly names
            folder = run.folder.level(1).path
            found = sum((folder / f"{name}.safetensors").stat().st_size for name in ("ticket", "posterior"))
            assert disk(run.config, run.shape) == pytest.approx(found, rel=0.05)


def test_a_plan_adds_up(tmp_path, monkeypatch, capsys):
    """Steps of 1 s, forward passes of 0.1 s: the smoke protocol's 2 steps and 60 images by 1 sample, and by 2 at the end."""
    start = 6.0
    monkeypatch.setattr(plan, "measure_together", lambda config, together, threads: Cost(1.0, 0.1, 2.0**30, start))
    arguments = ["--protocol", "smoke", "--runs", str(tmp_path), "--plan", "--gpus", "2"]
    assert main("fig5", arguments) == 0
    out = capsys.readouterr().out
    bayesian, point = 2 + 60 * 0.1 + 2 * 60 * 0.1, 2 + 60 * 0.1 + 60 * 0.1
    imp, deterministic, transplant = 3 * bayesian, 3 * point, bayesian
    hours = (3 * start + imp + deterministic + transplant) / 3600
    wall = max(imp + start, deterministic + transplant + 2 * start)
    assert re.search(rf"\| fig5 \| 3 \| 7 \| {wall:.0f} s \| {hours:.2f} \| 2.00 \| 0.00 \|", out)
    assert f"| 1 | {hours * 60:.0f} min | 1.0 |" in out
    assert f"| any number | {wall:.0f} s |" in out
    assert f"critical path: 4 trainings one after the other, {wall:.0f} s" in out
    assert "| lenet, mean_field, 30 | 1000 | 1.00 |" in out
    assert not list(tmp_path.iterdir()), "a plan writes nothing"
    # a run that takes 0.3 of a GPU has two beside it, on each of two GPUs, and counts for its part of the hours
    assert main("fig5", [*arguments, "--gpus-per-run", "0.3"]) == 0
    out = capsys.readouterr().out
    assert "; 6 workers" in out
    assert re.search(rf"\| fig5 \| 3 \| 7 \| {wall:.0f} s \| {0.3 * hours:.2f} \| 3.00 \| 0.00 \|", out)


@pytest.mark.slow
def test_a_run_that_cannot_be_measured_is_one_line(tmp_path, refused):
    more = ["--protocol", "reduced", "--dataset", "folder", "--data-dir", str(tmp_path), "--runs", str(tmp_path / "r")]
    refused(partial(main, "fig5"), [*more, "--plan"], "no folder train/")


def test_what_is_finished_costs_nothing(smoke_study, capsys):
    assert main("fig5", ["--protocol", "smoke", "--runs", str(smoke_study), "--plan"]) == 0
    assert "| together | 0 | 0 | 0 s | 0.00 | 0.00 | 0.00 |" in capsys.readouterr().out


def test_figures_share_runs_in_a_plan():
    given = parser("all", "").parse_args(["--protocol", "paper"])
    study = study_of(given)
    one, both = jobs_of(["fig1"], study), jobs_of(["fig1", "fig2"], study)
    assert set(one) <= set(both)
    assert len(both) < len(one) + len(jobs_of(["fig2"], study))


@pytest.mark.slow
def test_steps_are_measured_in_a_process_of_their_own():
    cost = measure_together(preset("smoke", arch="lenet"), 1, 1)
    assert min(cost.step, cost.forward, cost.start) > 0
    assert 2**26 < cost.memory < 2**34


def test_the_cost_of_several_at_once_is_the_median_of_what_each_measures(tmp_path, monkeypatch):
    """Processes that know their answers: each takes the next one, and all wait for each other."""
    for i, (step, forward) in enumerate([(3.0, 0.1), (1.0, 0.3), (2.0, 0.2)]):
        (tmp_path / f"{i}.json").write_text(json.dumps(asdict(Cost(step, forward, 2.0**30, 4.0))))
    measuring = tmp_path / "measuring"
    measuring.write_text(
        f"#!/bin/sh\ncd {tmp_path}\n[ $OMP_NUM_THREADS = 5 ] || exit 1\ni=0\n"
        "until mkdir took_$i 2> /dev/null; do i=$((i + 1)); done\n"
        "until [ -d took_0 ] && [ -d took_1 ] && [ -d took_2 ]; do sleep 0.01; done\ncat $i.json\n"
    )
    measuring.chmod(0o755)
    monkeypatch.setattr(plan.sys, "executable", str(measuring))
    assert measure_together(preset("smoke", arch="lenet"), 3, 5) == Cost(2.0, 0.2, 2.0**30, 4.0)
