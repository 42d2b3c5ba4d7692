"""Recognising a file by its content: the two formats of state dicts, and files that are often mistaken for one."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from pyro_lottery.errors import UserError, one_line

SAFETENSORS, TORCH = "safetensors", "torch"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of a file by ``torch.save`` in the format before torch 1.6: a magic number, as a pickle."""
_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"\x93NUMPY", "a single numpy array (.npy); save all tensors in one file with torch.save"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, perhaps of Keras; save a PyTorch network's state_dict"),
    (b"GGUF", "a GGUF file, whose weights are quantised; give the file that it was converted from"),
    (b"version https://git-lfs", "a Git LFS pointer instead of the file itself; run git lfs pull"),
    (b"\x1f\x8b", "compressed (gzip); unpack it first"),
    (b"BZh", "compressed (bzip2); unpack it first"),
    (b"\xfd7zXZ", "compressed (xz); unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd); unpack it first"),
    (b"7z\xbc\xaf", "compressed (7z); unpack it first"),
    (b"MATLAB 5.0", "a MATLAB file; save a PyTorch network's state_dict"),
    (b"\x89PNG", "an image (PNG)"),
    (b"\xff\xd8\xff", "an image (JPEG)"),
    (b"%PDF", "a PDF document"),
    (b"\x7fELF", "a program or a library (ELF)"),
    (b"SQLite format 3", "a database (SQLite)"),
)  # fmt: skip
_TENSORFLOW = "of TensorFlow; save a PyTorch network's state_dict"
_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin", "saved_model.pb", "model.safetensors.index.json")


def kind(path: Path) -> str:
    """Return ``SAFETENSORS`` or ``TORCH``. Raises ``UserError`` for other files; the message says what the file is."""
    try:
        if not path.exists():
            raise UserError(f"{path} does not exist; expected a .safetensors or .pt file with a state_dict")
        if path.is_dir():
            raise not_read(path, f"it is a folder{_named_in(path)}; give a file of weights")
        if not path.is_file():
            raise not_read(path, "it is a pipe or a device, not a regular file")
        with path.open("rb") as file:
            head = file.read(512)
        size = path.stat().st_size
    except OSError as error:  # for example no permission, or a name that is too long
        raise UserError(f"{str(path)[:200]} cannot be read as a state_dict: {error.strerror}") from error
    if not head:
        raise not_read(path, "it is empty; copy or download it again")
    if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
        return _zip(path)
    if head.startswith(LEGACY):
        return TORCH
    if head[8:9] == b"{":
        length = int.from_bytes(head[:8], "little")
        if length + 8 <= size:
            return SAFETENSORS
        if length < 2**32:
            raise not_read(path, f"it is a safetensors file that ends within its header, at {size:,} bytes")
    raise not_read(path, _other(path, head, size))


def not_read(path: Path, why: str) -> UserError:
    """Return the error for a file that is not a state dict; ``why`` is the reason."""
    return UserError(f"{path} cannot be read as a state_dict: {why}")


def check_folder(path: Path) -> None:
    """Raise ``UserError`` if the folder ``path`` holds a model of another library instead of a run."""
    if named := _named_in(path):
        raise UserError(f"{path} is not a run folder: it is a folder{named}; give a file of weights")


def _named_in(path: Path) -> str:
    found = [name for name in _IN_FOLDERS if (path / name).exists()]
    if found == ["saved_model.pb"]:
        return " with a SavedModel of TensorFlow"
    return f" with {found[0]}" if found else ""


def _zip(path: Path) -> str:
    """Return ``TORCH`` for a zip archive by ``torch.save``. Raises ``UserError`` that says what another archive is."""
    try:
        if not zipfile.is_zipfile(path):
            raise not_read(
                path, f"it is a truncated zip archive, {path.stat().st_size:,} bytes; copy or download it again"
            )
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except UserError:
        raise
    except Exception as error:  # zipfile may raise anything for a damaged archive
        raise not_read(path, f"it is a damaged zip archive ({one_line(error)})") from error
    inner = {name.partition("/")[2] for name in names}
    for is_it, what in _ZIPS:
        if is_it(set(names), inner):
            raise not_read(path, f"it is {what}")
    if "data.pkl" in inner:
        return TORCH
    weights = [name for name in names if name.endswith((".pt", ".pth", ".bin", ".safetensors"))]
    held = f"with {weights[0]}; unpack it and give that file" if weights else f"of {len(names)} other files"
    raise not_read(path, f"it is a zip archive {held}")


def _all_npy(names: set[str], inner: set[str]) -> bool:
    return bool(names) and all(name.endswith(".npy") for name in names)


_ZIPS: tuple[tuple[Callable[[set[str], set[str]], bool], str], ...] = (
    (
        lambda names, inner: "constants.pkl" in inner or any(name.startswith("code/") for name in inner),
        "a TorchScript archive; save torch.jit.load(FILE).state_dict() with torch.save",
    ),
    (
        lambda names, inner: "archive_format" in names | inner,
        "a program by torch.export; save its state_dict with torch.save",
    ),
    (_all_npy, "an archive of numpy arrays (.npz); save them as tensors with torch.save"),
    (lambda names, inner: "model.weights.h5" in names, "a Keras model; save a PyTorch network's state_dict"),
)


def _other(path: Path, head: bytes, size: int) -> str:
    for start, what in _STARTS:
        if head.startswith(start):
            return f"it is {what}"
    if head.startswith(b"\x80"):
        return "it is a Python pickle, which could run code when it is read; save the state_dict with torch.save"
    if head[4:8] == b"TFL3":
        return f"it is a TFLite model, {_TENSORFLOW}"
    if path.suffix == ".onnx" or re.match(rb"\x08[\x01-\x20]\x12.{1,60}\x1a?", head, re.S):
        return "it is an ONNX model; save the state_dict of the network from which it was exported"
    if re.search(r"\.data-\d{5}-of-\d{5}$", path.name) or _ends_as_table(path, size):
        return f"it is one file of a checkpoint {_TENSORFLOW}"
    if path.suffix == ".pb":
        return f"it is a model {_TENSORFLOW}"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it and give the file of weights in it"
    try:
        text = head.decode().lstrip("\ufeff \r\n\t")
    except UnicodeDecodeError:
        text = "" if b"\0" in head else head.decode("latin1").lstrip()
    return _text(text) if text and "\0" not in text else f"it is not a file of weights; it begins with {head[:8]!r}"


def _text(text: str) -> str:
    low = text[:200].lower()
    if low.startswith(("<!doctype html", "<html", "<?xml", "<head")):
        return "it is a web page, so the download failed; download the file again"
    if '"weight_map"' in text or ('"metadata"' in text and '"total_size"' in text):
        return "it is the index of weights in several files; save them in one file"
    if low.startswith("model_checkpoint_path"):
        return f"it is the index of checkpoints {_TENSORFLOW}"
    return f"it is a text file that begins with {text.splitlines()[0][:40]!r}"


def _ends_as_table(path: Path, size: int) -> bool:
    """Return whether a file ends like a LevelDB table; the .index file of a TensorFlow checkpoint is one."""
    with path.open("rb") as file:
        file.seek(max(0, size - 8))
        return file.read() == b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
