import json
import os
import zlib

import pytest

from pyro_lottery import files, untrusted
from pyro_lottery.errors import UserError


def test_an_object_carries_the_crc_of_what_else_it_holds(tmp_path):
    path = tmp_path / "o.json"
    files.write_object(path, {"b": [1, 2], "a": "ü"})
    assert json.loads(path.read_text())["crc32"] == f"{zlib.crc32(json.dumps({'b': [1, 2], 'a': 'ü'}).encode()):08x}"
    assert untrusted.read_object(path) == {"b": [1, 2], "a": "ü"}
    path.write_text(path.read_text().replace("1", "7", 1))
    with pytest.raises(UserError, match="fails its checksum"):
        untrusted.read_object(path)
    path.write_text('{"a": "\\ud800"}')
    with pytest.raises(UserError, match="text that is not valid Unicode"):
        untrusted.read_object(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("os.nothing", "--score os.nothing cannot be imported"),
        ("no_such_module:f", "--score no_such_module:f cannot be imported .*; expected package.module:name"),
        ("os.sep", "--score os.sep is a str; expected a class or a function"),
    ],
)
def test_a_path_that_names_no_code_is_named(path, message):
    with pytest.raises(UserError, match=message):
        untrusted.load_callable(path, "--score")
    assert untrusted.load_callable("os.path:join", "--score") is os.path.join
