"""A folder of version 0.1.0 (tests/runs/first_version/run): its numbers, its tickets, and how it goes on."""

import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import files, imp, masks, scores, untrusted
from pyro_lottery.runs import first_version
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.resume import adopt
from tests.runs.made import replace_text

KEPT = Path(__file__).parent / "first_version" / "run"
OTHER_MACHINE = pytest.mark.filterwarnings("ignore:.* was started with (versions|hardware|kernels):UserWarning")


@pytest.fixture
def old(tmp_path):
    return RunFolder(shutil.copytree(KEPT, tmp_path / "run"))


def resumed(folder, **options):
    saved = pl.load_run(folder.path).config.options()
    return imp.run_imp(Config(**saved | {"run_dir": str(folder.path)} | options))


def test_it_opens_and_nothing_is_written(old):
    before = {path: path.read_bytes() for path in old.path.rglob("*") if path.is_file()}
    run = pl.load_run(old.path, trust_code=True)
    assert run.results["remaining"].tolist() == [18, 14]
    assert run.results["test_accuracy"].tolist() == pytest.approx([0.22, 0.14])
    assert len(run.level(0).history) == 4
    assert len(run.level(1).history) == 3
    assert run.level(1).load_model().predict(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert {path: path.read_bytes() for path in old.path.rglob("*") if path.is_file()} == before


@OTHER_MACHINE
def test_it_goes_on_from_its_checkpoint_and_gets_manifests(old, capsys):
    rows, begun = old.results(), old.level(2).load_ticket()
    kept = {n: files.crc32_of(old.level(n).path / "posterior.safetensors") for n in (0, 1)}
    run = resumed(old)
    lines = capsys.readouterr().out
    assert "level 0" not in lines
    assert "level 1" not in lines
    assert old.results()[:2] == rows
    assert [row.remaining for row in old.results()] == [18, 14, 11, 8]
    assert {n: files.crc32_of(old.level(n).path / "posterior.safetensors") for n in (0, 1)} == kept
    assert len(run.level(2).history) == 3, "epochs 2 to 4"
    for level in range(4):
        assert old.level(level).check(run.config.epochs_of(level)).result.level == level
    assert "../rewind/posterior.safetensors" in old.level(0).manifest().files
    ticket, before = run.level(2).ticket, run.level(1)
    expected = masks.shrink(before.ticket.mask, scores.snr(before.posterior), 0.2)
    assert all(torch.equal(ticket.mask[n], expected[n]) and torch.equal(begun.mask[n], expected[n]) for n in expected)
    header, *table = (old.path / "results.csv").read_text().splitlines()
    assert "crc32" not in header
    assert len(table) == 4


@OTHER_MACHINE
def test_a_damaged_row_and_a_damaged_file_are_trained_again(old):
    replace_text(old.path / "results.csv", "0,1.0,18,18,0.2", "0,1.0,18,18,0.9")
    replace_text(old.path / "level_01" / "history.csv", "2,", "3,")
    with pytest.warns(UserWarning, match="damaged") as warned:
        run = resumed(old)
    texts = [str(w.message) for w in warned]
    assert any("results.csv: the row '0,1.0,18,18,0.9" in text for text in texts)
    assert any("has fewer than 3 undamaged epochs; level 1 is trained again" in text for text in texts)
    assert run.results["level"].tolist() == [0, 1, 2, 3]


def test_adoption_that_was_killed_goes_on(old):
    config = pl.load_run(old.path).config
    adopt(RunFolder(shutil.copytree(old.path, old.path.with_name("whole"))), config)
    whole = json.loads((old.path.with_name("whole") / "level_01" / "level.json").read_text())
    finish = old.level(0).finish
    finish(old.results()[0], 7, True)  # the first level has its manifest already
    adopt(old, config)
    assert old.level(0).manifest().ticket == 7, "a manifest that is there is left alone"
    assert json.loads((old.path / "level_01" / "level.json").read_text()) == whole
    assert [row.level for row in old.results()] == [0, 1]


@pytest.mark.parametrize("name", ["results.csv", "level_01/history.csv"])
def test_a_table_that_cannot_be_read_now_loses_no_level(name, old, monkeypatch):
    config, read = pl.load_run(old.path).config, untrusted.read_text

    def denied(path, *rest):
        if path == old.path / name:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *rest)

    with monkeypatch.context() as context:
        context.setattr(untrusted, "read_text", denied)
        with pytest.raises(PermissionError):
            adopt(old, config)
    adopt(old, config)
    assert [old.level(level).manifest().result for level in (0, 1)] == old.results()
    assert not list(old.path.glob("*.damaged"))


def test_a_table_of_this_version_says_nothing_of_what_is_finished(tmp_path):
    (tmp_path / "results.csv").write_text("level,density\n0,1.0\n")
    assert first_version.rows(tmp_path / "results.csv") == []
    assert first_version.rows(tmp_path / "none.csv") == []


def test_a_damaged_header_loses_no_level(old):
    replace_text(old.path / "results.csv", "density", "dens")
    with pytest.warns(UserWarning, match="results.csv has a damaged header; its rows are read"):
        assert [row.remaining for row in old.results()] == [18, 14]
    replace_text(old.path / "results.csv", "crc32", "crc3")
    with pytest.warns(UserWarning, match="damaged header"):
        adopt(old, pl.load_run(old.path).config)
    assert [old.level(n).manifest().result.remaining for n in (0, 1)] == [18, 14]
    assert not (old.path / "results.csv").exists()


def _first_table(path, header, rows):
    sums = [f"{zlib.crc32(f'{header}{row}{len(rows)}'.encode()):08x}" for row in rows]
    path.write_text("\n".join([f"{header},crc32", *(f"{row},{crc}" for row, crc in zip(rows, sums, strict=True))]))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_a_row_of_impossible_numbers_is_refused(value, old):
    header = (old.path / "results.csv").read_text().partition(",crc32")[0]
    _first_table(old.path / "results.csv", header, [",".join([value] * (header.count(",") + 1))])
    with pytest.raises(pl.UserError, match=r"has (nan|-?inf) as level"):
        old.results()


def test_a_history_of_many_epochs_is_read_and_a_table_without_end_is_not(tmp_path):
    path = tmp_path / "history.csv"
    _first_table(path, "epoch,loss", [f"{epoch},0.5" for epoch in range(1, 1501)])
    assert len(first_version.table(path)) == 1500
    path.write_text("epoch,loss,crc32\n" + "\n" * 20_000)
    with pytest.raises(pl.UserError, match="has 20000 rows; expected at most 10000"):
        first_version.table(path)


def test_a_new_column_of_eight_digits_is_no_checksum(tmp_path):
    """Later versions may add columns: a row that ends in a whole number is not taken for one of version 0.1.0."""
    path = tmp_path / "results.csv"
    path.write_text("level,density,flops\n0,1.0,12345678\n1,0.5,87654321\n")
    assert not first_version.is_first(path)
    assert first_version.rows(path) == []


@OTHER_MACHINE
def test_a_manifest_that_is_damaged_within_the_adoption_is_no_dead_end(old):
    level = old.level(1)
    level.finish(old.results()[1], 7)
    replace_text(level.path / "level.json", "0.1", "0.2")
    with pytest.warns(UserWarning, match=r"level\.json fails its checksum.*; level 1 is trained again"):
        run = resumed(old)
    assert run.results["level"].tolist() == [0, 1, 2, 3]
