import json

import pytest

import pyro_lottery as pl
from pyro_lottery import files
from pyro_lottery.runs.folder import RunFolder
from tests.runs.made import OPTIONS, opened, replace_text
from tests.support import small_run


def test_a_run_folder_keeps_its_options(tmp_path):
    path = tmp_path / "run"
    opened(path, OPTIONS, {"versions": {"torch": "1"}})
    assert json.loads((path / "config.json").read_text())["versions"] == {"torch": "1"}
    opened(path, OPTIONS | {"run_dir": "elsewhere"})
    with pytest.raises(pl.UserError, match="epochs was 5, now it is 6"):
        opened(path, OPTIONS | {"epochs": 6})
    with pytest.raises(pl.UserError, match=r"milestones was \[3, 4\], now it is \[3\]"):
        opened(path, OPTIONS | {"milestones": (3,)})
    assert opened(path, OPTIONS | {"levels": 5}).config["levels"] == 5
    assert opened(path, OPTIONS | {"levels": 1}).config["levels"] == 5


def test_another_run_is_named_before_data_are_loaded(tmp_path):
    path = small_run(tmp_path / "run", levels=0, epochs=1).folder.path
    with pytest.raises(pl.UserError, match="was started with other options: dataset was digits, now it is folder"):
        small_run(path, levels=0, epochs=1, dataset="folder", data_dir="no/such/folder")


def test_nothing_foreign_is_written_into(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("do not touch")
    with pytest.raises(pl.UserError, match="not empty and is not a run folder"):
        opened(tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(pl.UserError, match="is a file"):
        opened(tmp_path / "file")
    with pytest.raises(pl.UserError, match=r"no config\.json"):
        RunFolder(tmp_path / "none").config  # noqa: B018
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["thesis.tex"]


def test_other_data_are_noticed(tmp_path):
    opened(tmp_path, OPTIONS | {"data_dir": "a"}, {"data": {"checksum": 1}})
    with pytest.raises(pl.UserError, match="trained on other data than --data-dir b has now"):
        opened(tmp_path, OPTIONS | {"data_dir": "b"}, {"data": {"checksum": 2}})


def test_other_versions_are_warned_of(tmp_path):
    opened(tmp_path, facts={"versions": {"torch": "1", "python": "3.9"}, "hardware": {"threads": 2}})
    opened(tmp_path, facts={"versions": {"torch": "1", "python": "3.9"}, "hardware": {"threads": 2}})
    with pytest.warns(UserWarning, match="started with hardware threads = 2, now it is 3"):
        opened(tmp_path, facts={"versions": {"torch": "1"}, "hardware": {"threads": 3}})


def test_other_kernels_are_warned_of(tmp_path):
    opened(tmp_path, facts={"kernels": "compiled"})
    with pytest.warns(UserWarning, match="started with kernels = compiled, now it is torch_path"):
        opened(tmp_path, facts={"kernels": "torch_path"})


def test_a_full_disk_is_no_fault_of_the_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "config.json")

    monkeypatch.setattr(files, "write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        opened(tmp_path / "run")


def test_a_run_made_in_python_is_known_by_its_checksum_exactly_and_by_sums_to_rounding(tmp_path):
    own = {"initial_values": 4_000_000_000, "log_joint": -123.4}
    path = tmp_path / "run"
    opened(path, facts={"own": own})
    opened(path, facts={"own": own | {"log_joint": -123.4001}})
    for other in ({"initial_values": 4_000_000_001}, {"log_joint": -123.5}):
        with pytest.raises(pl.UserError, match=f"{next(iter(other))} was "):
            opened(path, facts={"own": own | other})


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "fails its checksum"), ("[]", "is not a JSON object"), ("{", "is not JSON")],
)
def test_a_damaged_config_is_named(tmp_path, content, message):
    opened(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(pl.UserError, match=message):
        opened(tmp_path)


def test_a_changed_digit_of_the_config_is_noticed(tmp_path):
    opened(tmp_path)
    replace_text(tmp_path / "config.json", '"epochs": 5', '"epochs": 6')
    with pytest.raises(pl.UserError, match=r"config\.json fails its checksum"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": "2"}, "levels is '2'; expected a whole number"),
        ({"versions": []}, r"versions is \[\]; expected an object"),
        ({"control": 5}, "control is 5; expected text"),
    ],
)
def test_a_config_of_other_types_is_named(change, message, tmp_path):
    opened(tmp_path)
    files.write_object(tmp_path / "config.json", OPTIONS | change)
    with pytest.raises(pl.UserError, match=message):
        opened(tmp_path)


def test_an_option_that_the_config_lacks_is_named(tmp_path):
    opened(tmp_path, {name: value for name, value in OPTIONS.items() if name != "epochs"})
    with pytest.raises(pl.UserError, match="has no option epochs"):
        opened(tmp_path)
