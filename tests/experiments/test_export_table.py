import csv

import pytest

from experiments import export_table
from pyro_lottery.files import write_atomic
from pyro_lottery.runs.level_folder import as_csv

ROW = {f"{form}_{format}": "1e-7" for form, format in export_table.WAYS} | {"seconds": 1, "note": ""}


@pytest.mark.slow
def test_a_network_s_row_holds_its_differences(tmp_path, capsys):
    earlier = ROW | {"network": "earlier", "size": 32}
    write_atomic(tmp_path / "exports.csv", as_csv(export_table.COLUMNS, [earlier]))
    assert export_table.main(["-o", str(tmp_path), "--networks", "lenet"]) == 0
    kept, row = csv.DictReader((tmp_path / "exports.csv").read_text().splitlines())
    assert kept["network"] == "earlier"  # a row of another call
    for form, format in export_table.WAYS:
        assert 0 < float(row[f"{form}_{format}"]) <= 1e-5
    text = (tmp_path / "exports.md").read_text()
    assert "2 networks: 2 are exported as mean and draws in both formats" in text
    assert "| lenet | 32 |" in text
    assert export_table.main(["-o", str(tmp_path), "--networks", "lenet"]) == 0
    assert capsys.readouterr().out.count("lenet 32") == 1  # the second command has nothing to do


def test_what_is_refused_or_fails_is_counted_as_such():
    def row(name, **values):
        return ROW | {"network": name, "size": 32} | values

    rows = [row("a"), row("b", moments_onnx="refused", note="no rule"), row("c", draws_pt2="failed", note="crashed")]
    text = export_table.markdown(rows)
    assert "3 networks: 2 are exported as mean and draws in both formats" in text
    assert "| b | 32 | 1e-07 | 1e-07 | 1e-07 | 1e-07 | refused | 1e-07 | no rule |" in text
