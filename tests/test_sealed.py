import json
import zlib

import pytest

from pyro_lottery import sealed
from pyro_lottery.errors import UserError

ROWS = [{"epoch": 1, "loss": 2.5}, {"epoch": 2, "loss": None}]


def test_an_object_carries_the_crc_of_what_else_it_holds(tmp_path):
    path = tmp_path / "o.json"
    sealed.write_object(path, {"b": [1, 2], "a": "ü"})
    assert json.loads(path.read_text())["crc32"] == f"{zlib.crc32(json.dumps({'b': [1, 2], 'a': 'ü'}).encode()):08x}"
    assert sealed.read_object(path) == {"b": [1, 2], "a": "ü"}
    path.write_text(path.read_text().replace("1", "7", 1))
    with pytest.raises(UserError, match="fails its checksum"):
        sealed.read_object(path)
    path.write_text('{"a": "\\ud800"}')
    with pytest.raises(UserError, match="text that is not valid Unicode"):
        sealed.read_object(path)


def test_a_row_carries_the_crc_of_the_header_itself_and_the_count(tmp_path):
    path = tmp_path / "t.csv"
    sealed.write_table(path, ["epoch", "loss"], ROWS)
    crc = [f"{zlib.crc32(f'epoch,loss{row}2'.encode()):08x}" for row in ("1,2.5", "2,")]
    assert path.read_text() == f"epoch,loss,crc32\n1,2.5,{crc[0]}\n2,,{crc[1]}\n"
    assert sealed.read_table(path) == ROWS
    lines = path.read_text().splitlines(keepends=True)
    for changed in (
        lines[:2],
        [lines[0].replace("loss", "gain"), *lines[1:]],
        [*lines[:2], lines[2].replace("2", "3", 1)],
    ):
        path.write_text("".join(changed))
        with pytest.raises(UserError, match="fails its checksum; the run's command repairs it"):
            sealed.read_table(path)


def test_repair_keeps_the_whole_rows(tmp_path):
    path = tmp_path / "t.csv"
    sealed.write_table(path, ["epoch", "loss"], ROWS)
    whole = path.read_text()
    path.write_text(whole.replace("2.5", "2.4"))
    with pytest.warns(UserWarning, match=r"the row '1,2\.4,.* is damaged"):
        assert sealed.read_table(path, ["epoch", "loss"]) == ROWS[1:]
    path.write_text(whole.replace("epoch", "epoc"))
    with pytest.warns(UserWarning, match="damaged header, which is mended"):
        assert sealed.read_table(path, ["epoch", "loss"]) == ROWS
    path.write_text(whole[: whole.rfind("2,")])
    assert sealed.read_table(path, ["epoch", "loss"]) == ROWS[:1], "a row that is gone is trained again"
