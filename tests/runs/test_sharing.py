"""Level 0 from another run gives the bits of a run that trained it itself."""

import json
import warnings
from dataclasses import replace

import pytest

import pyro_lottery as pl
from pyro_lottery import files, imp
from pyro_lottery.controls import run_control
from pyro_lottery.errors import NotShared
from pyro_lottery.runs import sharing
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.own import Own
from tests.runs.made import replace_text, truncate
from tests.support import SMALL, TinyNet, fingerprint, small_run

TINY = {"train_size": 64, "test_size": 64, "levels": 1}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two runs: one rewound to its initial values, one to its values after an epoch."""
    root = tmp_path_factory.mktemp("sources")
    return {rewind: small_run(root / rewind, **TINY, rewind=rewind).folder.path for rewind in ("init", "epoch:1")}


@pytest.fixture
def source(sources, tmp_path):
    """A run that a test may damage."""
    return copied(sources["init"], tmp_path / "source")


def copied(run, to):
    for path in run.rglob("*"):
        if path.is_file():
            (to / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (to / path.relative_to(run)).write_bytes(path.read_bytes())
    return to


def trained(capsys):
    """The levels that were trained since the last look."""
    return sorted({int(line[6]) for line in capsys.readouterr().out.splitlines() if line.startswith("level ")})


@pytest.mark.parametrize(
    ("options", "rewind"),
    [
        ({"score": "magnitude"}, "init"),
        ({"prune_fraction": 0.5}, "init"),
        ({"levels": 2}, "init"),
        ({"rewind": "lr"}, "init"),
        ({"score": "squared_sum"}, "epoch:1"),
        ({"rewind": "epoch:1", "prune_fraction": 0.5}, "epoch:1"),
        ({"rewind": "restart:1"}, "epoch:1"),
    ],
    ids=str,
)
def test_a_run_with_level_0_of_another_has_the_bits_of_one_that_trained_it(options, rewind, sources, tmp_path, capsys):
    alone = small_run(tmp_path / "alone", **TINY | options)
    levels = trained(capsys)
    shared = small_run(tmp_path / "shared", **TINY | options, level0_from=str(sources[rewind]))
    assert trained(capsys) == levels[1:], "level 0 is not trained"
    assert fingerprint(shared.folder.path) == fingerprint(alone.folder.path)
    seconds = [run.results["train_seconds"][0] for run in (shared, pl.load_run(sources[rewind]))]
    assert seconds[0] == seconds[1], "a copied level says how long its training took"
    with warnings.catch_warnings(action="error"):
        small_run(tmp_path / "shared", **TINY | options)
    assert trained(capsys) == [], "a resumed run needs the other one no more"


def test_a_level_0_that_began_is_replaced_by_a_finished_one(sources, tmp_path, capsys):
    begun = RunFolder(tmp_path / "run")
    alone = small_run(tmp_path / "alone", **TINY)
    copied(alone.folder.path, begun.path)
    for name in ("level.json", "posterior.safetensors", "history.csv"):
        (begun.level(0).path / name).unlink()
    (begun.level(0).path / "checkpoint.safetensors").write_bytes(b"")
    trained(capsys)
    small_run(begun.path, **TINY, level0_from=str(sources["init"]))
    assert trained(capsys) == []
    assert fingerprint(begun.path) == fingerprint(alone.folder.path)
    assert not begun.level(0).checkpoint.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.5}, "its lr is 0.001, here it is 0.5"),
        ({"seed": 1}, "its seed is 0, here it is 1"),
        ({"epochs": 3}, "its epochs is 2, here it is 3"),
        ({"guide": "deterministic"}, "its guide is mean_field, here it is deterministic"),
        ({"deterministic": True}, "its deterministic is False, here it is True"),
        ({"sparse": "off"}, "its sparse is auto, here it is off"),
        ({"rewind": "epoch:1"}, "its rewind is init, here it is epoch:1"),
    ],
)
def test_another_level_0_is_one_line_and_nothing_is_written(options, message, sources, tmp_path):
    with pytest.raises(NotShared, match=f"^--level0-from .* cannot be used: {message}; name another run"):
        small_run(tmp_path / "run", **TINY | options, level0_from=str(sources["init"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"versions": {"torch": "1"}}, "its versions torch is 1, here it is 2"),
        ({"hardware": {"threads": 64}}, "its hardware threads is 64, here it is"),
        ({"data": {"checksum": 7}}, "its data checksum is 7, here it is"),
        ({"kernels": "others"}, "its kernels is others, here it is"),
        ({"streams": "others"}, "its streams is others, here it is"),
        ({"pretrained_checksum": "00000007"}, "its pretrained_checksum is 00000007, here it is None"),
        ({"control": "reinit"}, "its control is reinit, here it is None"),
        ({"own": {"initial_values": 7}}, "level 0 of a network made in Python is not shared"),
    ],
    ids=str,
)
def test_level_0_of_other_data_versions_or_hardware_is_not_taken(facts, message, source, tmp_path):
    config = RunFolder(source).config
    for name, value in facts.items():
        config[name] = config[name] | value if isinstance(value, dict) and name in config else value
    RunFolder(source).save_config(config)
    with pytest.raises(NotShared, match=message):
        small_run(tmp_path / "run", **TINY, level0_from=str(source))
    assert not (tmp_path / "run").exists()


def test_other_initial_values_are_noticed(source, tmp_path, monkeypatch):
    level = RunFolder(source).level(0)
    manifest = level.manifest()
    replace(manifest, ticket=manifest.ticket ^ 1).save(level.path / "level.json")
    with pytest.raises(NotShared, match="its level 0 was trained from other initial values"):
        small_run(tmp_path / "run", **TINY, level0_from=str(source))


def test_a_level_0_that_is_not_finished_is_not_taken(source, tmp_path):
    (RunFolder(source).level(0).path / "level.json").unlink()
    for run, message in (
        (source, "its level 0 is not finished; name another run, or leave the option out"),
        (tmp_path / "nowhere", "is not a run folder"),
        (tmp_path / "run", "is not a run folder"),
    ):
        with pytest.raises(NotShared, match=message):
            small_run(tmp_path / "run", **TINY, level0_from=str(run))


@pytest.mark.parametrize("name", ["posterior.safetensors", "ticket.safetensors", "history.csv", "level.json"])
def test_a_damaged_level_0_is_not_taken(name, source, tmp_path):
    truncate(RunFolder(source).level(0).path / name)
    with pytest.raises(NotShared, match=f"cannot be used: .*level_00/{name}"):
        small_run(tmp_path / "run", **TINY, level0_from=str(source))
    assert not (tmp_path / "run").exists()


def test_a_damaged_rewind_point_is_not_taken(sources, tmp_path):
    source = copied(sources["epoch:1"], tmp_path / "source")
    truncate(source / "rewind" / "posterior.safetensors")
    with pytest.raises(NotShared, match="does not have the checksum"):
        small_run(tmp_path / "run", **TINY, rewind="epoch:1", level0_from=str(source))


def test_a_file_that_changes_while_it_is_copied_leaves_no_finished_level(source, tmp_path, monkeypatch, capsys):
    real = sharing.copy_level_0

    def changed(run, manifest, target):
        replace_text(run.level(0).path / "history.csv", "1", "2")
        real(run, manifest, target)

    monkeypatch.setattr(sharing, "copy_level_0", changed)
    monkeypatch.setattr("pyro_lottery.runs.session.copy_level_0", changed)
    with pytest.raises(NotShared, match=r"history\.csv has changed while level 0 was copied"):
        small_run(tmp_path / "run", **TINY, level0_from=str(source))
    assert RunFolder(tmp_path / "run").results() == []
    trained(capsys)
    small_run(tmp_path / "run", **TINY)
    assert trained(capsys) == [0, 1]


def test_damage_to_one_run_is_not_damage_to_the_other(source, tmp_path, capsys):
    """A file of a level may be truncated or overwritten in place; the other run has a copy."""
    run = small_run(tmp_path / "run", **TINY, score="magnitude", level0_from=str(source)).folder
    once = fingerprint(run.path)
    for name in ("posterior.safetensors", "ticket.safetensors"):
        truncate(RunFolder(source).level(0).path / name)
    trained(capsys)
    with warnings.catch_warnings(action="error"):
        small_run(run.path, **TINY, score="magnitude")
    assert trained(capsys) == []
    with pytest.warns(UserWarning, match="level 0 is trained again"):
        small_run(source, **TINY)
    assert fingerprint(run.path) == once
    truncate(run.level(0).path / "history.csv")
    trained(capsys)
    with pytest.warns(UserWarning, match="level 0 is trained again"):
        small_run(run.path, **TINY, score="magnitude", level0_from=str(source))
    assert trained(capsys) == [], "a damaged copy is copied again"
    assert {n: t for n, t in fingerprint(run.path)[0].items() if "damaged" not in n} == once[0]


def test_a_level_0_that_diverged_is_not_shared(source, tmp_path):
    RunFolder(source).level(0).save_divergence({"lr": 0.0005})
    with pytest.raises(NotShared, match="level 0 diverged, there or here"):
        small_run(tmp_path / "run", **TINY, level0_from=str(source))


def test_networks_made_in_python_share_nothing(source, tmp_path, tiny_data):
    config = replace(pl.load_run(source).config, run_dir=str(tmp_path / "run"), level0_from=str(source), dataset="own")
    own = Own(TinyNet(), tiny_data)
    with pytest.raises(NotShared, match="level 0 of a network made in Python is not shared"):
        imp.run_imp(replace(config, arch="own-Network", batch_size=16), own)
    assert not (tmp_path / "run").exists()


def test_what_is_made_from_a_run_does_not_take_its_level_0(source, tmp_path):
    run = small_run(tmp_path / "run", **TINY, score="magnitude", level0_from=str(source))
    assert run.config.level0_from == str(source)
    control = run_control(run, "reinit")
    assert control.config.level0_from is None
    assert json.loads((control.folder.path / "config.json").read_text())["level0_from"] is None


def test_the_command_line_takes_a_run(source, tmp_path, refused):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | TINY).items() if name != "milestones"]
    options += ["--milestones", "--score=magnitude", f"--run-dir={tmp_path / 'run'}", f"--level0-from={source}"]
    refused(
        imp.main, [*options, "--lr=0.5"], "its lr is 0.001, here it is 0.5; name another run, or leave the option out"
    )
    assert imp.main(options) == 0
    assert pl.load_run(tmp_path / "run").results["level"].tolist() == [0, 1]


def test_a_copy_is_a_file_of_its_own(source, tmp_path):
    run = small_run(tmp_path / "run", **TINY, level0_from=str(source)).folder
    for name in ("posterior.safetensors", "ticket.safetensors", "history.csv"):
        one, other = run.level(0).path / name, RunFolder(source).level(0).path / name
        assert files.crc32_of(one) == files.crc32_of(other)
        assert not one.samefile(other)
