import codecs
import copy
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from pyro_lottery import weights
from pyro_lottery.errors import UserError


def test_a_small_state_dict_that_becomes_a_large_one_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1).expand(10**13)}, tmp_path / "repeated.pt")
    with pytest.raises(UserError, match="w stores fewer numbers than its shape"):
        weights.load(tmp_path / "repeated.pt")
    torch.save({"w": torch.zeros(1_000_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "small.pt", "w", 8) as small:
        for info in plain.infolist():
            small.writestr(info.filename, plain.read(info))
    assert (tmp_path / "small.pt").stat().st_size < 10_000
    with pytest.raises(UserError, match="compressed, so it may need far more memory than its size"):
        weights.load(tmp_path / "small.pt")
    assert weights.load(tmp_path / "plain.pt").values["w"].shape == (1_000_000,)


class _Calls:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_that_calls_what_makes_no_tensors_is_refused_before_it_does(legacy, tmp_path):
    """``weights_only`` allows bytearray(2**30) and encodings that double what they get."""
    path = tmp_path / "calls.pt"
    for bomb in (_Calls(bytearray, 2**33), _Calls(codecs.encode, "ab", "hex")):
        torch.save({"w": torch.zeros(2), "x": bomb}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match="which does not make a tensor"):
            weights.load(path)
    plain = {"w": torch.zeros(2), "b": torch.nn.Parameter(torch.ones(3)), "m": torch.ones(2, dtype=torch.bool)}
    torch.save({"state_dict": OrderedDict(plain), "epoch": 3}, path, _use_new_zipfile_serialization=not legacy)
    found = weights.load(path).values
    assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_many_names_for_one_record_are_refused(tmp_path):
    path = tmp_path / "many.pt"
    torch.save({"w": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        record = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
        for number in range(300):
            again = copy.copy(record)
            again.filename = record.filename[:-1] + str(1000 + number)
            archive.filelist.append(again)
        archive._didModify = True
    with pytest.raises(UserError, match="may need far more memory than its size"):
        weights.load(path)


def test_bytes_are_read_as_python_2_wrote_them_and_encoded_in_no_other_way(tmp_path):
    """The second call's function comes from the pickle's memo, where no name stands."""
    plain, hidden = _Calls(codecs.encode, "ab", "latin1"), _Calls(codecs.encode, "ab", "utf-16")
    torch.save({"w": torch.ones(2), "note": b"abc", "x": plain}, tmp_path / "plain.pt")
    with warnings.catch_warnings(action="ignore"):
        assert torch.equal(weights.load(tmp_path / "plain.pt").values["w"], torch.ones(2))
    for number, more in enumerate(({"x": plain, "y": hidden}, {"x": _Calls(codecs.encode, "ab")})):
        torch.save({"w": torch.ones(2)} | more, tmp_path / f"{number}.pt")
        with pytest.raises(UserError, match="it calls _codecs encode, which does not make a tensor"):
            weights.load(tmp_path / f"{number}.pt")


def test_numpys_numbers_are_passed_over_without_numpy(tmp_path):
    """What they would be made by takes as much memory as the file says."""
    huge = _Calls(np._core.multiarray.scalar, np.dtype("V2000000000"))
    torch.save(
        {"model": {"w": torch.ones(2)}, "best": np.float32(0.5), "huge": huge, "epoch": np.int64(3)}, tmp_path / "n.pt"
    )
    before = set(torch.serialization.get_safe_globals())
    assert torch.equal(weights.load(tmp_path / "n.pt").values["w"], torch.ones(2))
    assert set(torch.serialization.get_safe_globals()) == before


WANTED = {"a.weight": torch.ones(2), "b.weight": torch.ones(2)}


@pytest.mark.parametrize("prefix", ["module.", "model.module.", "x.y.z."])
def test_a_shared_prefix_goes_where_the_networks_names_remain(prefix, tmp_path):
    path = tmp_path / "w.pt"
    with pytest.warns(UserWarning, match=f"names are read without the prefix {prefix}"):
        found = weights.fit(path, {prefix + name: value for name, value in WANTED.items()}, WANTED)
    assert found.keys() == WANTED.keys()


def test_names_that_fit_as_they_are_stay(tmp_path):
    wanted = {f"net.{name}": value for name, value in WANTED.items()}
    assert weights.fit(tmp_path, wanted, wanted).keys() == wanted.keys()
    assert weights.fit(tmp_path, WANTED, wanted).keys() == WANTED.keys(), (
        "no prefix is guessed, and the names are named"
    )
    twice = {"0.weight": torch.ones(2)}
    assert weights.fit(tmp_path, twice, twice).keys() == twice.keys()


def test_names_that_no_file_can_have_are_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read as a state_dict: File name too long"):
        weights.load(tmp_path / ("x" * 5000))
    with pytest.raises(UserError, match="does not exist"):
        weights.load(tmp_path / "a\0b")
