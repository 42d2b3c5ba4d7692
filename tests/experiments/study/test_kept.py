"""Figures and claims from what is kept of runs, alone and beside other runs."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from experiments import claims
from experiments.study import kept
from experiments.study.finished import read, read_all
from experiments.study.verdicts.evidence import gather
from experiments.study.verdicts.transplants import claim_11
from plots import fig1, fig2, fig7
from pyro_lottery.errors import UserError

GALLERY = Path(__file__).parents[3] / "plots" / "gallery"
DRAWN = ("fig1", "fig2", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9")
"""The figures that need no ticket and no time of a run."""
WRITTEN = ("claims.md", "claims.json", kept.LEVELS, kept.LAYERS)
SNR = "lenet-digits-mean_field-snr-seed0-smoke"


@pytest.fixture
def copied(smoke_study, tmp_path):
    """The evidence of the study, without its runs."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in (kept.LEVELS, kept.LAYERS):
        shutil.copy(smoke_study / "figures" / name, folder)
    return folder


@pytest.fixture
def another(copied, tmp_path):
    """A function that writes changed evidence to another folder."""

    def write(change):
        folder = tmp_path / "another"
        folder.mkdir()
        tables = kept.read(copied)
        kept.write(kept.Tables(change(tables.levels), tables.layers), folder)
        return folder

    return write


def drawn(stem, finished):
    return __import__(f"plots.{stem}", fromlist=["plot"]).plot(finished)


@pytest.mark.parametrize("stem", DRAWN)
def test_figures_are_drawn_again_without_the_runs(stem, smoke_study, copied):
    one, other = drawn(stem, read(smoke_study)), drawn(stem, read(copied))
    pd.testing.assert_frame_equal(one.table, other.table, check_like=True)
    assert one.figure.get_suptitle() == other.figure.get_suptitle()


@pytest.mark.parametrize("stem", ["fig3", "table1"])
def test_tickets_and_times_are_those_of_runs(stem, smoke_study, copied):
    with pytest.raises(UserError, match="which are not kept without their runs; name a folder of runs"):
        drawn(stem, read(copied))
    assert drawn(stem, read([copied, smoke_study])).table.equals(drawn(stem, read(smoke_study)).table)


def test_runs_of_two_machines_are_judged_together(smoke_study, copied, tmp_path):
    """Half of the runs are gone, and what is kept of all of them stands in: the same files come out, in either order of the folders."""
    here = tmp_path / "here"
    for config in sorted(smoke_study.glob("*/config.json"))[::2]:
        shutil.copytree(config.parent, here / config.parent.name)
    for number, folders in enumerate(([here, copied], [copied, here], [copied, copied])):
        out = tmp_path / str(number)
        assert claims.main([*map(str, folders), "-o", str(out)]) == 0
        for name in WRITTEN:
            assert (out / name).read_bytes() == (smoke_study / "figures" / name).read_bytes(), name
    assert fig1.plot(read([here, copied])).table.equals(fig1.plot(read(copied)).table)


def test_rates_of_figure_7_come_from_both(smoke_study, copied, another, tmp_path):
    here, levels = tmp_path / "here", kept.read(copied).levels
    for name in levels.loc[~levels["base"], "run"].unique():
        shutil.copytree(smoke_study / name, here / name)
    others = another(lambda levels: levels[levels["base"]])
    pd.testing.assert_frame_equal(fig7.plot(read([here, others])).table, fig7.plot(read(smoke_study)).table)


def test_the_first_of_equal_copies_counts_once(copied, another, smoke_study):
    other = another(lambda levels: levels.assign(mace=0.5))
    for first, second, found in ((other, copied, True), (copied, other, False), (smoke_study, other, False)):
        levels = read([first, second]).all_levels
        assert len(levels) == len(kept.read(copied).levels)
        assert set(levels["mace"] == 0.5) == {found}
    pd.testing.assert_frame_equal(fig2.plot(read([copied, other])).table, fig2.plot(read(copied)).table)


def test_a_run_comes_with_its_controls_from_the_folder_that_has_most_of_them(copied, another):
    """So a control is compared with the ticket that it was made from, and one that has begun does not hide a finished one."""
    for missing in ("/controls/reinit", "/transplant", ""):

        def less(levels, missing=missing):
            levels = levels.assign(test_accuracy=0.0)
            hit = levels["run"].str.endswith(missing) if missing else levels["run"] == SNR
            return levels[~(hit & (levels["level"] == 2))]

        other = another(less)
        for folders in ([other, copied], [copied, other]):
            levels = read(folders).all_levels
            changed = levels.loc[levels["test_accuracy"] == 0.0, "run"].str.split("/").str[0].unique()
            assert len(changed) == 0 or folders[0] == other
            hit = levels["run"].str.endswith(missing) if missing else levels["run"] == SNR
            tops = set(levels.loc[hit, "run"].str.split("/").str[0])
            assert tops
            assert not tops & set(changed)
        shutil.rmtree(other)


def test_a_run_that_has_begun_here_hides_nothing(smoke_study, copied, tmp_path, capsys):
    here = tmp_path / "here"
    shutil.copytree(smoke_study / SNR, here / SNR)
    shutil.rmtree(here / SNR / "controls" / "reinit" / "level_02")
    assert fig1.plot(read([here, copied])).table.equals(fig1.plot(read(copied)).table)
    assert claims.main([str(here), str(copied), "-o", str(tmp_path / "out")]) == 0
    for name in WRITTEN:
        assert (tmp_path / "out" / name).read_bytes() == (smoke_study / "figures" / name).read_bytes(), name
    shutil.rmtree(here / SNR / "level_02")
    assert claims.main([str(here), str(copied), "-o", str(tmp_path / "out")]) == 0
    assert "left out" not in capsys.readouterr().err


def test_what_is_kept_counts_if_it_is_complete(copied, another):
    whole = gather([copied])[0].levels
    lost = another(lambda levels: levels[(levels["run"] != SNR) | (levels["level"] != 1)])
    found = gather([lost])[0].levels
    assert set(whole["run"]) - set(found["run"]) == {run for run in whole["run"] if run.split("/")[0] == SNR}


def test_times_of_several_machines_are_not_divided(copied, another):
    tables = kept.read(copied)
    levels = tables.levels.assign(train_samples=10, arch=tables.levels["arch"].replace("lenet", "vgg11"))
    other = another(lambda _: levels.assign(hardware="cpu another"))

    def why_not(folders):
        return {part.why_not for part in claim_11(gather(folders)[0]) if part.network == "vgg11"}

    kept.write(tables._replace(levels=levels), copied)
    assert why_not([copied]) == why_not([copied, other]) == {""}
    kept.write(tables._replace(levels=levels[levels["guide"] == "mean_field"]), copied)
    assert why_not([copied, other]) == {"times of several machines"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda levels: levels.assign(seed=7, description="digits (8×8), smoke protocol: 99 training images"),
            r"runs of lenet under the protocol smoke cannot be compared: digits .* and digits",
        ),
        (lambda levels: levels.assign(seed=7), "two different runs are called lenet-.*; rename the folder of one"),
        (
            lambda levels: pd.concat([levels, levels.assign(run="copy/" + levels["run"])]),
            "are the same run; keep one of them",
        ),
        (lambda levels: pd.concat([levels, levels]), "has a level of .* twice; write it again"),
        (lambda levels: levels.assign(density=None), r"claims_levels.csv is damaged.*\(density\)"),
        (lambda levels: levels.assign(level="<<<<"), r"claims_levels.csv is damaged.*\(level\); write it again"),
    ],
)
def test_what_cannot_stand_together_is_refused(change, message, copied, another):
    with pytest.raises(UserError, match=message):
        read([copied, another(change)]).levels  # noqa: B018


def test_runs_of_no_protocol_are_compared_within_a_folder_only(copied, another):
    levels, layers = kept.read(copied)
    kept.write(kept.Tables(levels.assign(protocol="custom"), layers), copied)
    assert read(copied).protocol == "custom"
    with pytest.raises(UserError, match="runs that follow no protocol are compared within one folder only"):
        read([copied, another(lambda levels: levels.assign(seed=7))])


@pytest.mark.parametrize("name", [kept.LEVELS, kept.LAYERS])
def test_damaged_files_are_one_line(name, copied, refused):
    path = copied / name
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2] + b'"', b"\xff\xfe" + whole, whole.replace(b",seed", b",sead", 1)):
        path.write_bytes(damaged)
        refused(claims.main, [str(copied)], f"{name} is damaged, or of another version (")
    path.unlink()
    refused(claims.main, [str(copied)], f"{copied}", code=2 if name == kept.LEVELS else 1)


def test_layers_that_are_lost_are_missed(copied):
    tables = kept.read(copied)
    of_run = tables.layers["run"] == SNR
    for rows, message in (
        (tables.layers["seed"] < 0, "the layers of lenet-.* are missing"),
        (~of_run, f"the layers of {SNR} are missing"),
        (~of_run | (tables.layers["depth"] > 1), "the layers of runs of lenet differ in level or number"),
    ):
        kept.write(kept.Tables(tables.levels, tables.layers[rows]), copied)
        with pytest.raises(UserError, match=message):
            read(copied).layers  # noqa: B018


def test_protocols_and_data_are_chosen_among_what_is_kept(copied):
    levels, layers = kept.read(copied)
    assert set(kept.data_of(levels)) == {"digits (8×8)"}
    more = levels.assign(
        protocol="paper", description=levels["description"].str.replace(", smoke", " large, 64×64, paper")
    )
    levels = pd.concat([levels, more.assign(run="paper-" + more["run"])])
    kept.write(kept.Tables(levels, layers), copied)
    assert [study.protocol for study in read_all([copied])] == ["paper", "smoke"]
    with pytest.raises(
        UserError, match=r"holds runs of digits \(8×8\), digits \(8×8\) large, 64×64; choose one with --data"
    ):
        read(copied)
    with pytest.raises(UserError, match="no finished run with --data MNIST, but of digits"):
        read(copied, data="MNIST")
    assert read(copied, "paper").description == more["description"].iloc[0]
    assert read(copied, data="digits (8×8)").protocol == "smoke"


def test_runs_of_two_protocols_have_two_names(copied, another):
    other = another(lambda levels: levels.assign(protocol="other"))
    with pytest.raises(UserError, match="runs of two protocols are called"):
        gather([copied, other])


def test_evidence_beside_runs_is_not_read_in_silence(smoke_study, tmp_path, capsys):
    here = tmp_path / "here"
    shutil.copytree(smoke_study / SNR, here / SNR)
    shutil.copy(smoke_study / "figures" / kept.LEVELS, here)
    assert set(read(here).all_levels["run"].str.split("/").str[0]) == {SNR}
    assert "holds runs, so its claims_levels.csv is not read" in capsys.readouterr().err


@pytest.mark.parametrize("shown", sorted(GALLERY.glob("evidence*/fig*.csv")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_gallery_has_the_figures_of_its_evidence(shown, tmp_path):
    drawn(shown.stem, read(GALLERY, shown.parent.name)).save(shown.stem, tmp_path)
    assert (tmp_path / shown.name).read_bytes() == shown.read_bytes()
