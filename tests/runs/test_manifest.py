import json
import math
from dataclasses import asdict, replace

import pytest

import pyro_lottery as pl
from pyro_lottery import files
from pyro_lottery.errors import Damaged
from pyro_lottery.runs.manifest import Manifest, checked_row
from tests.runs.made import row

MADE = Manifest(row(3), 4_000_000_000, {"ticket.safetensors": "0badf00d"}, {"linear 2x3 of 4x3": "sparse"})


def test_a_manifest_round_trips_and_is_plain_json(tmp_path):
    path = tmp_path / "level.json"
    assert Manifest.load(path) is None
    MADE.save(path)
    assert Manifest.load(path) == MADE
    found = json.loads(path.read_text())
    assert found.keys() == {"result", "ticket", "files", "layers", "crc32"}
    assert found["result"]["test_accuracy"] == 0.5
    assert found["files"] == {"ticket.safetensors": "0badf00d"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"ticket": 1, "files": {}, "result": {}}', "fails its checksum"),
    ],
)
def test_a_manifest_that_is_not_whole_is_damaged(content, message, tmp_path):
    path = tmp_path / "level.json"
    path.write_text(content)
    with pytest.raises(Damaged, match=message):
        Manifest.load(path)


@pytest.mark.parametrize("change", [{"ticket": "1"}, {"files": []}, {"result": None}])
def test_a_sealed_object_that_is_no_manifest_is_damaged(change, tmp_path):
    path = tmp_path / "level.json"
    files.write_object(path, {"result": asdict(row(0)), "ticket": 1, "files": {}} | change)
    with pytest.raises(Damaged, match=r"is not the manifest|holds no row"):
        Manifest.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nll": math.nan}, "has nan as nll of level 0"),
        ({"density": math.inf}, "has inf as density of level 0"),
        ({"density": -1.0}, "level 0 keeps 6 of 10 weights"),
        ({"remaining": 11}, "level 0 keeps 11 of 10 weights"),
        ({"remaining": True}, "has True as remaining"),
        ({"remaining": 6.5}, r"has 6\.5 as remaining"),
        ({"total": 0, "remaining": 0}, "level 0 keeps 0 of 0 weights"),
        ({"nll": None}, "has no nll"),
        ({"mace": None}, "has no mace of level 0"),
        ({"nll": "1"}, "has '1' as nll"),
        ({"level": -1}, "level -1 keeps"),
        ({"nll": 10**400}, "has 10+ as nll of level 0"),
        ({"remaining": 10**400, "total": 10**400}, "has 10+ as remaining of level 0"),
    ],
)
def test_a_row_of_impossible_values_is_refused(change, message, tmp_path):
    with pytest.raises(pl.UserError, match=message):
        checked_row(asdict(row(0)) | change, tmp_path)


def test_rows_of_classes_and_of_real_targets_are_known(tmp_path):
    assert checked_row(asdict(row(0)), tmp_path) == row(0)
    of_classes = dict.fromkeys(("test_accuracy", "max_test_accuracy", "mace", "ece", "brier"))
    real = replace(row(1), **of_classes, rmse=1.0, coverage_50=0.5, coverage_80=0.8, coverage_95=0.95)
    assert checked_row(asdict(real), tmp_path) == real
    no_mean = replace(real, rmse=None)
    assert checked_row(asdict(no_mean), tmp_path) == no_mean
    with pytest.raises(pl.UserError, match="has no coverage_80 of level 1"):
        checked_row(asdict(replace(real, coverage_80=None)), tmp_path)
    with pytest.raises(pl.UserError, match="has a column 'thesis'"):
        checked_row(asdict(real) | {"thesis": 1}, tmp_path)
