"""Figures and claims from what is kept of runs, alone and beside other runs."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from experiments import claims
from experiments.study import kept
from experiments.study.finished import read, read_all
from plots import fig1, fig7
from pyro_lottery.errors import UserError

GALLERY = Path(__file__).parents[3] / "plots" / "gallery"
DRAWN = ("fig1", "fig2", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9")
"""The figures that need no ticket and no time of a run."""


@pytest.fixture
def copied(smoke_study, tmp_path):
    """The evidence of the study, without its runs."""
    for name in (kept.LEVELS, kept.LAYERS):
        shutil.copy(smoke_study / "figures" / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("stem", DRAWN)
def test_figures_are_drawn_again_without_the_runs(stem, smoke_study, copied):
    module = __import__(f"plots.{stem}", fromlist=["plot"])
    one, other = module.plot(read(smoke_study)), module.plot(read(copied))
    pd.testing.assert_frame_equal(one.table, other.table, check_like=True)
    assert one.figure.get_suptitle() == other.figure.get_suptitle()


@pytest.mark.parametrize("stem", ["fig3", "table1"])
def test_tickets_and_times_are_those_of_runs(stem, smoke_study, copied):
    module = __import__(f"plots.{stem}", fromlist=["plot"])
    with pytest.raises(UserError, match=f"is finished; run python -m experiments.{stem}"):
        module.plot(read(copied))
    assert module.plot(read([copied, smoke_study])).table.equals(module.plot(read(smoke_study)).table)


def test_runs_of_two_machines_are_judged_together(smoke_study, copied, tmp_path):
    """Half of the runs are gone, and what is kept of all of them stands in: the same files come out, in either order of the folders."""
    here = tmp_path / "here"
    for folder in sorted(smoke_study.glob("*/config.json"))[::2]:
        shutil.copytree(folder.parent, here / folder.parent.name)
    for number, folders in enumerate(([here, copied], [copied, here])):
        out = tmp_path / str(number)
        assert claims.main([*map(str, folders), "-o", str(out)]) == 0
        for name in ("claims.md", "claims.json", kept.LEVELS, kept.LAYERS):
            assert (out / name).read_bytes() == (smoke_study / "figures" / name).read_bytes(), name
    assert fig1.plot(read([here, copied])).table.equals(fig1.plot(read(copied)).table)


def test_a_run_counts_once_as_its_folder_has_it(smoke_study, copied):
    levels, layers = kept.read(copied)
    kept.write(levels.assign(mace=0.5), layers, copied)
    found = read([copied, smoke_study]).all_levels
    assert len(found) == len(levels)
    assert 0.5 not in set(found["mace"])


def test_of_two_kept_copies_the_first_counts(copied, tmp_path):
    levels, layers = kept.read(copied)
    other = tmp_path / "other"
    other.mkdir()
    kept.write(levels.assign(mace=0.5), layers, other)
    assert set(read([other, copied]).all_levels["mace"]) == {0.5}
    assert set(read([copied, other]).all_levels["mace"]) == set(levels["mace"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"description": "digits (8×8), smoke protocol: 99 training images"},
            "cannot be compared: digits .* and digits",
        ),
        ({"seed": 7}, "two different runs are called lenet-.*; rename the folder of one"),
    ],
)
def test_what_cannot_stand_together_is_refused(changes, message, copied, tmp_path):
    levels, layers = kept.read(copied)
    other, first = tmp_path / "other", levels["run"] == levels["run"].min()
    other.mkdir()
    kept.write(levels[first].assign(**changes), layers, other)
    if "description" in changes:
        kept.write(levels[~first], layers, copied)
    with pytest.raises(UserError, match=message):
        read([copied, other]).levels  # noqa: B018


def test_protocols_and_data_are_chosen_among_what_is_kept(copied, tmp_path):
    levels, layers = kept.read(copied)
    name = kept.data_of(levels).unique().tolist()
    assert name == ["digits (8×8)"]
    more = levels.assign(protocol="paper", description=levels["description"].str.replace("smoke", "paper"))
    kept.write(pd.concat([levels, more.assign(run="paper/" + more["run"])]), layers, copied)
    assert [study.protocol for study in read_all([copied])] == ["paper", "smoke"]
    with pytest.raises(UserError, match="holds runs of paper, smoke; choose one with --protocol"):
        read(copied)
    with pytest.raises(UserError, match="no finished run with --data MNIST, but of digits"):
        read(copied, data="MNIST")
    assert read(copied, "paper", "digits (8×8)").protocol == "paper"


@pytest.mark.parametrize("stem", DRAWN)
def test_the_gallery_has_the_figures_of_its_evidence(stem, tmp_path):
    kept_table = GALLERY / "evidence_small" / f"{stem}.csv"
    if not kept_table.exists():
        pytest.skip("no such figure in the gallery")
    module = __import__(f"plots.{stem}", fromlist=["plot"])
    module.plot(read(GALLERY, "evidence_small")).save(stem, tmp_path)
    assert (tmp_path / kept_table.name).read_bytes() == kept_table.read_bytes()


def test_rates_of_figure_7_come_from_both(smoke_study, copied, tmp_path):
    levels, layers = kept.read(copied)
    kept.write(levels[levels["base"]], layers, copied)
    here = tmp_path / "here"
    for name in levels.loc[~levels["base"], "run"].unique():
        shutil.copytree(smoke_study / name, here / name)
    assert fig7.plot(read([here, copied])).table.equals(fig7.plot(read(smoke_study)).table)
