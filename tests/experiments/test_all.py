"""All figures and claims from real, tiny runs."""

import json
import shutil

import pandas as pd
import pytest

from experiments import all as everything
from experiments import claims
from experiments.command import FIGURES, jobs_of, parser, study_of
from experiments.study import jobs
from experiments.study.executors.here import carry_out
from experiments.study.statistics import UNKNOWN
from pyro_lottery.tables import list_runs


def files(root):
    return {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and "figures" not in p.parts}


def test_every_figure_and_claim_is_there(smoke_study):
    figures = smoke_study / "figures"
    for stem in FIGURES:
        assert (figures / f"{stem}.png").read_bytes().startswith(b"\x89PNG"), stem
        assert "<svg" in (figures / f"{stem}.svg").read_text()
        assert len((figures / f"{stem}.csv").read_text().splitlines()) > 1
    judged = json.loads((figures / "claims.json").read_text())
    assert [claim["claim"] for claim in judged] == list(range(1, 15))
    assert {claim["verdict"] for claim in judged} == {UNKNOWN}  # of one seed
    text = (figures / "claims.md").read_text()
    assert "smoke protocol" in text
    assert str(smoke_study) not in text + json.dumps(judged), "results name runs, not somebody's folders"


def test_claims_are_judged_again_without_the_runs(smoke_study, tmp_path, refused):
    kept, again = tmp_path / "kept", tmp_path / "again"
    kept.mkdir()
    for name in ("claims_levels.csv", "claims_layers.csv"):
        shutil.copy(smoke_study / "figures" / name, kept)
    assert claims.main([str(kept), "-o", str(again)]) == 0
    for name in ("claims.md", "claims.json", "claims_levels.csv", "claims_layers.csv"):
        assert (again / name).read_bytes() == (smoke_study / "figures" / name).read_bytes(), name
    refused(claims.main, [str(kept), "--protocol", "paper"], "no finished run with --protocol paper, but of smoke")
    refused(claims.main, [str(kept), "--accuracy", "nll"], "--accuracy nll: choose test_accuracy or max_test_accuracy")


def test_a_run_that_still_trains_changes_no_claim(smoke_study, tmp_path):
    """Neither it nor its controls count, nor does a control that lacks a level; the layers of the others stay."""
    study = tmp_path / "study"
    shutil.copytree(smoke_study, study)
    first, second = sorted(path.parent for path in study.glob("*/controls"))[:2]
    shutil.rmtree(first / "level_02")
    shutil.rmtree(next((second / "controls").glob("*")) / "level_02")
    assert claims.main([str(study), "-o", str(tmp_path / "once")]) == 0
    before, after = (
        pd.read_csv(folder / "claims_levels.csv") for folder in (smoke_study / "figures", tmp_path / "once")
    )
    gone = set(before["run"]) - set(after["run"])
    assert {path for path in set(before["run"]) if path.split("/")[0] == first.name} <= gone
    assert len([path for path in gone if path.startswith(f"{second.name}/controls/")]) == 1
    old, new = (pd.read_csv(folder / "claims_layers.csv") for folder in (smoke_study / "figures", tmp_path / "once"))
    pd.testing.assert_frame_equal(old[old["run"].isin(new["run"])].reset_index(drop=True), new)
    assert claims.main([str(tmp_path / "once"), "-o", str(tmp_path / "again")]) == 0
    for name in ("claims.md", "claims.json", "claims_levels.csv", "claims_layers.csv"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_runs_are_shared(smoke_study):
    # 4 scores and guides, a larger network, 4 more rates and warm-ups, 2 by learning-rate rewinding
    assert len(list(smoke_study.glob("*/config.json"))) == 4 + 1 + 4 + 2
    assert len(list(smoke_study.glob("*/controls/*/config.json"))) == 2 * 4
    assert len(list(smoke_study.glob("*/transplant/config.json"))) == 1
    # two scores and two rewindings of the networks that the first two runs train; the others train a level 0 of their own
    assert sum(run.config.level0_from is not None for run in list_runs(smoke_study)) == 4


def test_a_finished_study_is_not_run_again(smoke_study, monkeypatch, capsys):
    for name in ("run_imp", "run_control", "transplant_run"):
        monkeypatch.setattr(jobs, name, lambda *a, **k: pytest.fail("a finished run was run again"))
    before = files(smoke_study)
    study = study_of(parser("all", "").parse_args(["--protocol", "smoke"]))
    assert carry_out(jobs_of(FIGURES, study), smoke_study) == {}
    assert files(smoke_study) == before
    assert everything.main(["--protocol", "smoke", "--runs", str(smoke_study), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count(" finished, ") == 20
    assert "together: 0 s left" in out


def test_a_dry_run_touches_nothing(tmp_path, capsys):
    arguments = ["--protocol", "reduced", "--arch", "lenet", "--seeds", "1", "--dataset", "digits", "--dry-run"]
    assert everything.main([*arguments, "--runs", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "lenet, mean_field, snr, seed 0: 0 of 6 levels, " in out
    assert "lenet, deterministic, magnitude, seed 0: transplant: 0 of 3 levels, " in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--protocol", "papper"],
            "choose among paper, fast, reduced, minimal, evidence, evidence_small, costs, smoke",
        ),
        (["--arch", "resnet19"], "did you mean resnet1"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--dataset", "folder", "--data-dir", "/nowhere"], "--data-dir /nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, refused):
    refused(everything.main, [*arguments, "--runs", str(tmp_path / "runs")], message)
