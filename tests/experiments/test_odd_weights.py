from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import odd_weights

CASES = odd_weights.cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_a_weight_file_is_read_right_or_refused_in_its_line(case):
    assert odd_weights.agrees(case, odd_weights.try_out(case)) == ""


def test_the_table_is_the_one_of_these_cases():
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)
    written = Path(__file__).parents[2] / "plots" / "gallery" / "weights.md"
    assert written.read_text() == odd_weights.markdown(CASES)


def test_what_is_wrong_with_an_outcome_is_seen(tmp_path, capsys, monkeypatch):
    case = CASES[0]
    outcome = odd_weights.try_out(case)
    right = case.right | {"out.bias": torch.zeros(3)}
    assert "['out.bias'] is wrong" in odd_weights.agrees(replace(case, right=right), outcome)
    assert "density is 0.5, not 0.25" in odd_weights.agrees(replace(case, density=0.25), outcome)
    assert odd_weights.agrees(replace(case, right=None), outcome) == "it is read"
    assert "not 'other'" in odd_weights.agrees(replace(case, line="other"), outcome)
    monkeypatch.setattr(odd_weights, "cases", lambda: [replace(case, line="other"), CASES[1]])
    assert odd_weights.main(["-o", str(tmp_path / "weights.md")]) == 1
    assert "1 of 2 cases as stated" in capsys.readouterr().out
