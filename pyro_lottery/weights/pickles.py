"""Safe reading of files by ``torch.save``: no code in the file is run, and memory is limited by the size of the file.

``torch.load(weights_only=True)`` runs no code from a file, but the functions that it does call can take any amount of memory,
and it refuses numpy scalars, which are frequent in checkpoints. Therefore every call in the file is checked first. Calls that
make tensors are left to torch; other objects in a checkpoint are replaced by :class:`Ignored`, which does nothing.
"""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch

from pyro_lottery.errors import UserError, one_line
from pyro_lottery.weights.kinds import LEGACY, not_read

_MAKES_TENSORS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor(_v[23])?|parameter|qtensor|sparse_tensor|meta_tensor_no_storage)"
    r"|torch (\w*Storage|Size|device|per_\w+|(bfloat|float|complex|q?u?int)\d\w*|bool)|torch\.nn\.parameter Parameter"
    r"|torch\.storage _?\w*Storage|torch\.serialization _get_layout|(__builtin__|builtins) set"
)
_ENCODE = "_codecs encode"
"""Function by which pickle protocol 2 stores bytes, as text in latin1."""
_MODELS = (
    "torch.nn.modules", "torch.nn.parallel", "torchvision.models", "timm.", "torch.ao.nn", "torch.fx", "torch.jit",
)  # fmt: skip


class Ignored:
    """Stand-in for an object of a checkpoint that is not a tensor: a numpy number, a path, an argparse namespace."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _dictionary(*factory: Any) -> OrderedDict[Any, Any]:
    return OrderedDict()


_STAND_INS: dict[str, Any] = {
    "numpy.core.multiarray scalar": Ignored, "numpy._core.multiarray scalar": Ignored,
    "numpy.core.multiarray _reconstruct": Ignored, "numpy._core.multiarray _reconstruct": Ignored,
    "numpy dtype": Ignored, "numpy ndarray": Ignored,
    "argparse Namespace": Ignored, "pathlib Path": Ignored, "pathlib PosixPath": Ignored, "pathlib WindowsPath": Ignored,
    "pathlib._local PosixPath": Ignored, "pathlib._local WindowsPath": Ignored,
    "datetime datetime": Ignored, "datetime timedelta": Ignored,
    "collections defaultdict": _dictionary,
    "pytorch_lightning.utilities.parsing AttributeDict": OrderedDict,
    "lightning.pytorch.utilities.parsing AttributeDict": OrderedDict,
    "lightning.fabric.utilities.data AttributeDict": OrderedDict,
    "lightning_fabric.utilities.data AttributeDict": OrderedDict,
    **{f"{module} {name}": Ignored for module in ("__builtin__", "builtins") for name in ("int", "float", "dict", "list")},
}  # fmt: skip
"""Functions that are called in place of those named in the file; the named ones are never imported."""


def load(path: Path) -> Any:
    """Load a file of ``torch.save`` onto the CPU. Raises ``UserError`` if it is damaged or needs code to be run."""
    try:
        calls = _calls(path)
        _check(path, calls)
        named: list[Any] = [(stand_in, name.replace(" ", ".")) for name, stand_in in _STAND_INS.items()]
        named += [(stand_in, name.replace("__builtin__.", "builtins.")) for stand_in, name in named]
        # An open file is passed, since torch chooses the format of a path by its suffix.
        with torch.serialization.safe_globals(named), path.open("rb") as file, warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".*sparse.*|.*Sparse.*"
            )  # it checks sparse matrices, which are in beta state
            return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a hostile or damaged file may raise anything
        raise not_read(path, f"{one_line(error)}; save it with torch.save or safetensors") from error


def _check(path: Path, calls: set[str]) -> None:
    """Raise ``UserError`` if a file calls anything but functions that make tensors and those with a stand-in."""
    unknown = sorted(name for name in calls if not _MAKES_TENSORS.fullmatch(name) and name not in _STAND_INS)
    if any(name.startswith(_MODELS) for name in unknown):
        own = [name for name in unknown if not name.startswith("torch.")] or unknown
        raise not_read(
            path,
            f"it is a whole pickled model ({own[0].replace(' ', '.')}), which cannot be read without its code; save "
            "model.state_dict() instead",
        )
    if unknown:
        raise not_read(path, f"it calls {unknown[0]}, which does not make a tensor; save only the state_dict")


def _calls(path: Path) -> set[str]:
    """Return all functions that a file of ``torch.save`` calls, each as "module name".

    Raises ``ValueError`` for a file that may take far more memory than its size, because it is compressed or lists one
    record several times.
    """
    found: set[str] = set()
    with ExitStack() as opened:
        file = opened.enter_context(path.open("rb"))
        if file.read(len(LEGACY)) == LEGACY:
            # Format before torch 1.6: five pickles in sequence (magic number, version, system, dictionary, storages).
            file.seek(0)
            pickles: list[IO[bytes]] = [file] * 5
        else:
            archive = opened.enter_context(zipfile.ZipFile(path))
            entries = archive.infolist()
            if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > path.stat().st_size:
                raise ValueError("it is compressed, so it may need far more memory than its size")
            _check_sums(archive, entries)
            pickles = [io.BytesIO(archive.read(e)) for e in entries if e.filename.endswith("data.pkl")]
        for pickled in pickles:
            found.update(_calls_of(pickled))
    return found


def _check_sums(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> None:
    """Raise ``ValueError`` for a record that fails its checksum; torch does not verify checksums."""
    for entry in entries:
        # Files written after torch.serialization.set_crc32_options(False) have no checksums. Without the attribute,
        # zipfile does not verify them either when it reads the pickle.
        if not entry.CRC:
            del entry.CRC
            continue
        try:
            with archive.open(entry) as record:
                while record.read(2**20):
                    pass
        except zipfile.BadZipFile as error:
            raise ValueError(f"it is damaged ({one_line(error)})") from error


def _calls_of(pickled: IO[bytes]) -> Iterator[str]:
    """Yield the functions that a pickle calls, except for the encoding of bytes, which are no longer than their text."""
    memo: dict[Any, Any] = {}
    pushed: Any = None
    place = 0  # position in the sequence that encodes bytes: encode, text, "latin1", the pair, the call
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = pushed
            continue
        if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX"):
            raise ValueError(f"its pickle protocol is not 2 ({opcode.name})")
        if opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            pushed = memo.get(argument)
        elif opcode.name == "GLOBAL":
            pushed = ("call", argument)
        else:
            pushed = argument if isinstance(argument, str) else None
        is_bytes = (
            isinstance(pushed, str), pushed == "latin1", opcode.name == "TUPLE2", opcode.name == "REDUCE",
        )  # fmt: skip
        if place and not is_bytes[place - 1]:
            yield _ENCODE
        if pushed == ("call", _ENCODE):
            place = 1
        else:
            place = (place + 1) % 5 if place else 0
            if opcode.name == "GLOBAL":
                yield str(argument)
