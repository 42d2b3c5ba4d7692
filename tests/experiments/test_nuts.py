"""The experiment, with few draws."""

import pandas as pd
import pytest

from experiments import nuts


@pytest.mark.slow
def test_every_posterior_has_a_row_beside_nuts(tmp_path, capsys):
    small = {"draws": 6, "warmup": 6, "chains": 2, "epochs": 4, "train-size": 200, "samples": 3, "members": 2}
    options = [part for name, value in small.items() for part in (f"--{name}", str(value))]
    assert nuts.main([*options, "--runs", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "nuts.csv").set_index("posterior")
    assert list(table.index) == [
        "NUTS",
        "NUTS, one chain against the others",
        *nuts.POSTERIORS,
        "ensemble of 2 trainings",
    ]
    assert table.loc["NUTS", ["agreement", "total_variation"]].tolist() == [1.0, 0.0]
    assert ((table["total_variation"] >= 0) & (table["total_variation"] <= 1)).all()
    text = (tmp_path / "nuts.md").read_text()
    assert "R-hat of 3,600 predicted probabilities" in text
    assert "(153 of 768 prunable ones)" in text
