"""What a file is, by its content: a state dict in one of two formats, or what people take for one."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from pyro_lottery.errors import UserError, one_line

SAFETENSORS, TORCH = "safetensors", "torch"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file by ``torch.save`` begins that is no zip archive: its magic number, as a pickle."""
_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"\x93NUMPY", "one numpy array (.npy); put all tensors into one file by torch.save"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, of Keras say; save a PyTorch network's state_dict"),
    (b"GGUF", "a GGUF file, whose weights are quantised; name the file that it was converted from"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for; fetch that by git lfs pull"),
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
    """``SAFETENSORS`` or ``TORCH``; ``UserError`` that names what the file is, if it is neither."""
    try:
        if not path.exists():
            raise UserError(f"{path} does not exist; expected a .safetensors or .pt file with a state_dict")
        if path.is_dir():
            raise not_read(path, f"it is a folder{_named_in(path)}; name a file of weights")
        if not path.is_file():
            raise not_read(path, "it is a pipe or a device, not a regular file")
        with path.open("rb") as file:
            head = file.read(512)
        size = path.stat().st_size
    except OSError as error:  # no permission, a name too long
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
    """That a file is no state dict, and why."""
    return UserError(f"{path} cannot be read as a state_dict: {why}")


def check_folder(path: Path) -> None:
    """Raise ``UserError`` for a folder that holds a model of another library, and is no run."""
    if named := _named_in(path):
        raise UserError(f"{path} is no run folder: it is a folder{named}; name a file of weights")


def _named_in(path: Path) -> str:
    found = [name for name in _IN_FOLDERS if (path / name).exists()]
    if found == ["saved_model.pb"]:
        return " of a SavedModel of TensorFlow"
    return f" with {found[0]}" if found else ""


def _zip(path: Path) -> str:
    """What a zip archive holds, by the names in it."""
    try:
        if not zipfile.is_zipfile(path):
            raise not_read(path, f"it is cut short: a zip archive without its end, of {path.stat().st_size:,} bytes")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except UserError:
        raise
    except Exception as error:  # zipfile raises what it meets
        raise not_read(path, f"it is a damaged zip archive ({one_line(error)})") from error
    inner = {name.partition("/")[2] for name in names}
    for is_it, what in _ZIPS:
        if is_it(set(names), inner):
            raise not_read(path, f"it is {what}")
    if "data.pkl" in inner:
        return TORCH
    weights = [name for name in names if name.endswith((".pt", ".pth", ".bin", ".safetensors"))]
    held = f"with {weights[0]}; unpack it, and name that file" if weights else f"of {len(names)} other files"
    raise not_read(path, f"it is a zip archive {held}")


def _all_npy(names: set[str], inner: set[str]) -> bool:
    return bool(names) and all(name.endswith(".npy") for name in names)


_ZIPS: tuple[tuple[Callable[[set[str], set[str]], bool], str], ...] = (
    (
        lambda names, inner: "constants.pkl" in inner or any(name.startswith("code/") for name in inner),
        "a TorchScript archive; save torch.jit.load(FILE).state_dict() by torch.save",
    ),
    (
        lambda names, inner: "archive_format" in names | inner,
        "a program by torch.export; save its state_dict by torch.save",
    ),
    (_all_npy, "an archive of numpy arrays (.npz); save them as tensors by torch.save"),
    (lambda names, inner: "model.weights.h5" in names, "a Keras model; save a PyTorch network's state_dict"),
)


def _other(path: Path, head: bytes, size: int) -> str:
    for start, what in _STARTS:
        if head.startswith(start):
            return f"it is {what}"
    if head.startswith(b"\x80"):
        return "it is a pickle of Python's, which could run code when it is read; save the state_dict by torch.save"
    if head[4:8] == b"TFL3":
        return f"it is a TFLite model, {_TENSORFLOW}"
    if path.suffix == ".onnx" or re.match(rb"\x08[\x01-\x20]\x12.{1,60}\x1a?", head, re.S):
        return "it is an ONNX model; save the state_dict of the network that it was exported from"
    if re.search(r"\.data-\d{5}-of-\d{5}$", path.name) or _ends_as_table(path, size):
        return f"it is a part of a checkpoint {_TENSORFLOW}"
    if path.suffix == ".pb":
        return f"it is a model {_TENSORFLOW}"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it, and name the file of weights in it"
    try:
        text = head.decode().lstrip("\ufeff \r\n\t")
    except UnicodeDecodeError:
        text = "" if b"\0" in head else head.decode("latin1").lstrip()
    return _text(text) if text and "\0" not in text else f"it is no file of weights; it begins with {head[:8]!r}"


def _text(text: str) -> str:
    low = text[:200].lower()
    if low.startswith(("<!doctype html", "<html", "<?xml", "<head")):
        return "it is a web page: the download failed; download the file again"
    if '"weight_map"' in text or ('"metadata"' in text and '"total_size"' in text):
        return "it is the index of weights in several files; put them into one file"
    if low.startswith("model_checkpoint_path"):
        return f"it is the index of checkpoints {_TENSORFLOW}"
    return f"it is a text that begins with {text.splitlines()[0][:40]!r}"


def _ends_as_table(path: Path, size: int) -> bool:
    """Whether a file ends as a table of LevelDB, as the .index of a TensorFlow checkpoint does."""
    with path.open("rb") as file:
        file.seek(max(0, size - 8))
        return file.read() == b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
