import csv
import signal

import pytest

from experiments import timm_table
from experiments.timm_models import MODELS


def test_the_table_names_each_model_once_and_enough_of_them():
    assert len(set(MODELS)) == len(MODELS) >= 120


def test_a_model_of_standardised_convolutions_works_from_end_to_end():
    row = timm_table.try_out("test_nfnet")
    assert {row[step] for step in timm_table.STEPS} == {"works"}
    assert 0.4 < row["in_use_50"] < 0.501
    assert 0.005 < row["in_use_1"] < 0.0101


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of later Pythons, where a test runner has threads
def test_a_hang_is_a_row_that_a_repeated_command_keeps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timm_table, "try_out", lambda name: signal.pause())  # for ever, in the forked process
    arguments = ["-o", str(tmp_path), "--models", "test_resnet", "--timeout", "0.01"]
    assert timm_table.main(arguments) == 1
    assert timm_table.main(arguments) == 1
    assert capsys.readouterr().out.count("test_resnet") == 1
    assert timm_table.main([*arguments, "--again"]) == 1
    assert capsys.readouterr().out.count("test_resnet") == 1
    (row,) = csv.DictReader((tmp_path / "timm.csv").read_text().splitlines())
    assert (row["create"], row["weights"], row["note"]) == ("failed", "", "not finished after 0.01 s")


def test_what_is_refused_says_why_in_the_table():
    row = timm_table.try_out("no_such_model")
    assert row["create"] == "refused"
    text = timm_table.markdown([row])
    assert "1 models: 0 work, 1 are refused in one line, 0 fail" in text
    assert "| no_such_model |  |  |  | no | – | – | – | – | – | – |  |  | create: unknown --arch" in text
