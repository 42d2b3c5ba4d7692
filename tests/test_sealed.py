import json
import zlib

import pytest

from pyro_lottery import sealed
from pyro_lottery.errors import UserError


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
