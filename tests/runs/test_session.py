"""A session trains what is not finished, and nothing else."""

import signal
import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import imp, untrusted
from pyro_lottery.errors import Busy, Stopped
from pyro_lottery.kernels import native
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.session import Session
from pyro_lottery.types import Ticket, ticket_checksum
from tests.runs.made import replace_text, truncate
from tests.support import fingerprint


@pytest.fixture
def config(tmp_path):
    return Config(
        arch="lenet", dataset="digits", train_size=64, test_size=64, epochs=1, milestones=(), train_samples=1,
        eval_samples=1, levels=2, run_dir=str(tmp_path / "run"),
    )  # fmt: skip


def trained(capsys):
    """The levels that were trained since the last look."""
    return sorted({int(line[6]) for line in capsys.readouterr().out.splitlines() if line.startswith("level ")})


def bits(run):
    return {level: run.folder.level(level).manifest().files for level in run.folder.levels()}


def changed(ticket, by):
    """``ticket`` with all locs multiplied."""
    loc = {name: value * by for name, value in ticket.start.loc.items()}
    return Ticket(ticket.mask, replace(ticket.start, loc=loc), ticket.net)


def test_a_finished_run_trains_nothing(config, capsys):
    once = bits(imp.run_imp(config))
    assert trained(capsys) == [0, 1, 2]
    assert bits(imp.run_imp(config)) == once
    assert trained(capsys) == []


@pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))
def test_a_sparse_run_says_so_repeats_its_bits_and_is_the_dense_run_up_to_rounding(config, tmp_path):
    runs = {
        sparse + name: imp.run_imp(
            replace(config, guide="deterministic", sparse=sparse, run_dir=str(tmp_path / f"{sparse}{name}"))
        )
        for sparse, name in (("on", "1"), ("on", "2"), ("off", ""))
    }
    assert fingerprint(runs["on1"].folder.path) == fingerprint(runs["on2"].folder.path)
    manifests = [runs["on1"].folder.level(level).manifest() for level in range(3)]
    assert [set(manifest.layers.values()) for manifest in manifests] == [set(), {"sparse"}, {"sparse"}]
    assert not runs["off"].folder.level(1).manifest().layers
    for level in range(3):
        loaded, dense = (runs[name].level(level) for name in ("on1", "off"))
        for name, loc in dense.posterior.loc.items():
            torch.testing.assert_close(loaded.posterior.loc[name], loc, rtol=1e-3, atol=1e-5)
        probs = loaded.load_model().predict(runs["on1"].load_data().test, 1, config.seed)
        accuracy = float((probs.argmax(1) == runs["on1"].load_data().test.labels).double().mean())
        assert accuracy == runs["on1"].row(level).test_accuracy


def test_a_finished_run_reads_each_ticket_and_posterior_a_few_times(config, monkeypatch):
    imp.run_imp(config)
    read, real = Counter(), untrusted.load_tensors
    monkeypatch.setattr(untrusted, "load_tensors", lambda path: read.update([path.name]) or real(path))
    imp.run_imp(config)
    levels = config.levels + 1
    # Each is checked once; all posteriors but the last are scored, and level 0's ticket is where tickets are rewound to.
    assert read["posterior.safetensors"] == 2 * levels - 1
    assert read["ticket.safetensors"] == levels + 2 * (levels - 1) + levels  # the last: the figure of densities


@pytest.mark.parametrize("name", ["posterior.safetensors", "ticket.safetensors", "history.csv", "level.json"])
def test_a_damaged_level_alone_is_trained_again_and_ends_with_the_same_bits(config, capsys, name):
    run = imp.run_imp(config)
    once, path = run.folder.level(1).load_posterior()[0], run.folder.level(1).path / name
    trained(capsys)
    truncate(path)
    with pytest.warns(UserWarning, match="level_01.*; level 1 is trained again"):
        imp.run_imp(config)
    assert trained(capsys) == [1], "level 2 was trained from the ticket that the run makes now"
    again = run.folder.level(1).load_posterior()[0]
    assert all(torch.equal(again.loc[site], once.loc[site]) for site in once.loc)
    assert (run.folder.path / "level_01.damaged" / name).exists()


def test_a_level_without_its_manifest_is_trained_again(config, capsys):
    """The manifest is the commit point: a process that dies before it leaves no finished level."""
    run = imp.run_imp(config)
    once = bits(run)
    (run.folder.level(2).path / "level.json").unlink()
    (run.folder.path / "results.csv").unlink()
    trained(capsys)
    with pytest.warns(
        UserWarning, match="level_02 has the files of a finished level and no level.json; level 2 is trained"
    ):
        found = bits(imp.run_imp(config))
    assert trained(capsys) == [2]
    assert (run.folder.path / "level_02.damaged" / "posterior.safetensors").exists()
    assert found[2]["posterior.safetensors"] == once[2]["posterior.safetensors"]
    assert len((run.folder.path / "results.csv").read_text().splitlines()) == 4


def test_manifests_that_changed_places_are_damaged_and_the_run_goes_on(config, capsys):
    run = imp.run_imp(config)
    once = {level: files["posterior.safetensors"] for level, files in bits(run).items()}
    first, second = (run.folder.level(level).path / "level.json" for level in (1, 2))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    trained(capsys)
    with pytest.warns(UserWarning, match=r"is the manifest of level \d; level \d is trained again") as warned:
        run = imp.run_imp(config)
    assert len(warned) == 2
    assert trained(capsys) == [1, 2]
    assert {level: files["posterior.safetensors"] for level, files in bits(run).items()} == once


def test_another_ticket_trains_the_level_again_and_keeps_what_it_was(config, capsys):
    with Session.open(config) as session:
        session.train(0, session.dense)
        before = session.ticket(0)
    trained(capsys)
    with (
        pytest.warns(
            UserWarning,
            match="level 0 was trained from another ticket than the run makes now; level 0 is trained again",
        ),
        Session.open(config) as session,
    ):
        session.train(0, changed(session.dense, 1.01))
    assert trained(capsys) == [0]
    aside = RunFolder(config.run_dir).path / "level_00.damaged" / "ticket.safetensors"
    assert ticket_checksum(Ticket.load(aside)) == ticket_checksum(before)


def test_the_last_bits_of_another_processor_train_nothing_again(config, capsys):
    with Session.open(config) as session:
        session.train(0, session.dense)
    trained(capsys)
    with Session.open(config) as session:
        session.train(0, changed(session.dense, 1 + 1e-6))
        assert ticket_checksum(session.ticket(0)) == ticket_checksum(session.dense)
    assert trained(capsys) == []


def test_nothing_is_written_before_the_first_ticket(config):
    with pytest.raises(RuntimeError, match="no ticket"), Session.open(config):
        raise RuntimeError("no ticket")
    assert not RunFolder(config.run_dir).path.exists()


def test_two_sessions_do_not_share_a_folder(config):
    with RunFolder(config.run_dir).lock(), Session.open(config) as session, pytest.raises(Busy, match="is using"):
        session.train(0, session.dense)
    assert not (RunFolder(config.run_dir).path / "config.json").exists()


def test_a_signal_between_levels_stops_before_the_next(config):
    def stopped():
        with Session.open(config) as session:
            session.train(0, session.dense)
            signal.raise_signal(signal.SIGTERM)  # from here on it is noted
            session.train(1, imp.next_ticket(session, 1))

    with pytest.raises(Stopped):
        stopped()
    run = pl.load_run(config.run_dir)
    assert run.results["level"].tolist() == [0]
    assert not run.folder.level(1).path.exists()


def test_results_that_were_changed_are_those_of_the_manifests_again(config, capsys):
    run = imp.run_imp(config)
    table = run.folder.path / "results.csv"
    before = table.read_bytes()
    replace_text(table, "\n0,", "\n7,")
    assert run.results["level"].tolist() == [0, 1, 2]
    trained(capsys)
    with warnings.catch_warnings(action="error"):
        imp.run_imp(config)
    assert table.read_bytes() == before
    assert trained(capsys) == []


def test_a_file_in_the_place_of_a_folder_is_named_before_anything_is_trained(config, capsys):
    run = imp.run_imp(replace(config, levels=0)).folder
    (run.level(0).path / "level.json").unlink()
    trained(capsys)
    for name in ("level_01", "rewind"):
        (run.path / name).symlink_to("nowhere")
        with pytest.raises(pl.UserError, match=f"{name} is not a folder, which the run needs there; move it away"):
            imp.run_imp(config)
        (run.path / name).unlink()
    assert trained(capsys) == []
