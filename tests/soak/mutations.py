"""Random changes of a file, and the checksum that whoever forged it would give it."""

from __future__ import annotations

import json
import struct
import zlib
from contextlib import suppress
from typing import Any

import torch
from hypothesis import strategies as st

from pyro_lottery import files


@st.composite
def mutations(draw: Any, contents: dict[str, bytes]) -> tuple[str, bytes, bool]:
    """A file's name, what it holds after some random changes, and whether its checksum was made to fit again."""
    name = draw(st.sampled_from(sorted(contents)))
    data = bytearray(contents[name])
    # Half of the changes hit the first kilobyte, where headers are.
    place = st.one_of(st.integers(0, min(1024, len(data))), st.integers(0, len(data)))
    for _ in range(draw(st.integers(1, 3))):
        at, size = min(draw(place), len(data)), draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["flip", "cut", "delete", "insert", "repeat", "number", "zero"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "delete":
            del data[at : at + size]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "repeat":
            data[at:at] = data[at : at + size]
        elif kind == "number":  # a digit of the text becomes a number
            digits = [i for i in range(at, min(at + 200, len(data))) if 48 <= data[i] < 58]
            if digits:
                new = draw(st.sampled_from([b"-1", b"0", b"99999999999", b"1e999", b"NaN", b'"x"', b"[[]]", b"null"]))
                data[digits[0] : digits[0] + 1] = new
        else:
            data[at : at + size] = bytes(len(data[at : at + size]))
    return name, bytes(data), draw(st.booleans())


def reseal(name: str, data: bytes) -> bytes:
    """``data`` with the checksum that whoever forged it would give it; unchanged where its text cannot be read."""
    with suppress(Exception):
        if name.endswith(".json"):
            config = json.loads(data)
            config.pop("crc32", None)
            return json.dumps(config | {"crc32": f"{zlib.crc32(json.dumps(config).encode()):08x}"}).encode()
        if name.endswith(".csv"):
            header, *rows = data.decode().splitlines()  # only tables of version 0.1.0 have checksums
            sums = [f"{zlib.crc32(f'{header}{row}{len(rows)}'.encode()):08x}" for row in rows]
            return "\n".join([f"{header},crc32", *(f"{r},{s}" for r, s in zip(rows, sums, strict=True))]).encode()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        own = json.loads(header["__metadata__"]["pyro_lottery"])
        tensors = {}
        for key, entry in header.items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[key] = torch.frombuffer(bytearray(data[8 + size + begin : 8 + size + end]), dtype=torch.uint8)
        own["checksum"] = files.checksum(tensors, own["info"])
        header["__metadata__"]["pyro_lottery"] = json.dumps(own)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + data[8 + size :]
    return data
