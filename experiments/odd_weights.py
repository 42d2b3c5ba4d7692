"""What comes of odd weight files: ``python -m experiments.odd_weights -o weights.md`` writes the table.

Each case writes a file as people have them, reads it as ``python -m pyro_lottery.transplant FILE`` does, into a small
network, and compares the ticket's density and every value with what they must be, or the error with its line.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import pickle
import sys
import tarfile
import tempfile
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import pyro_lottery as pl
from experiments.study.markdown import markdown_table
from pyro_lottery import files, guides, masks, seeds, tickets, transplant, untrusted
from pyro_lottery.errors import UserError
from pyro_lottery.nets.lenet import LeNet
from pyro_lottery.runs import build


class Network(nn.Module):
    """A convolution with BatchNorm, a linear layer and a classifier of three classes; 132 prunable weights."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(16, 6)
        self.out = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(torch.relu(self.bn(self.conv(x))), 2).flatten(1)
        return self.out(torch.relu(self.hidden(x)))


State = dict[str, Tensor]
PRUNABLE = ("conv.weight", "hidden.weight")


@cache
def into() -> pl.Ticket:
    """The dense ticket of the network that all files are for."""
    with seeds.stream("cpu", 0, "odd weights"):
        model = pl.BayesianClassifier(Network(), num_data=60)
        return build.dense_ticket(model, guides.mean_field(model))


def dense(seed: int = 1) -> State:
    """Weights without a zero, and statistics of some training."""
    with seeds.stream("cpu", seed, "odd weights"):
        return {
            name: torch.tensor(100 * seed) if t.ndim == 0 else t + torch.rand_like(t)
            for name, t in Network().state_dict().items()
        }


def mask() -> State:
    """Every second prunable weight."""
    return {
        name: (torch.arange(into().start.loc[name].numel()) % 2).view_as(into().start.loc[name]) for name in PRUNABLE
    }


def pruned(seed: int = 1) -> State:
    """:func:`dense` times :func:`mask`."""
    return {name: value * mask().get(name, 1) for name, value in dense(seed).items()}


def prefixed(prefix: str, state: State) -> State:
    """``state`` with ``prefix`` before each name."""
    return {f"{prefix}{name}": value for name, value in state.items()}


@dataclass(frozen=True)
class Case:
    """One file and what must come of it."""

    name: str
    """What the file is; the first word is its name in a folder of its own."""
    write: Callable[[Path], object]
    """Writes the file at the path."""
    right: State | None = None
    """The values that the ticket must have, by the network's names; None for a file that is refused."""
    line: str = ""
    """The error's line, or all that is said beside; FILE stands for the path, and … for what follows, if not all is compared."""
    density: float = 0.5
    key: str | None = None
    mask: Callable[[Path], object] | None = None
    """Writes a file for ``--mask``, the path with ``.mask`` added."""

    @property
    def file(self) -> str:
        return self.name.split()[0]

    @property
    def what(self) -> str:
        return self.name.partition(" ")[2]


def saved(content: Any, **options: Any) -> Callable[[Path], object]:
    """Writes by ``torch.save``."""
    return lambda path: torch.save(content() if callable(content) else content, path, **options)


def safe(state: Callable[[], State]) -> Callable[[Path], object]:
    """Writes safetensors."""
    return lambda path: safetensors.torch.save_file(state(), path)


def bytes_of(content: bytes) -> Callable[[Path], object]:
    """Writes bytes."""
    return lambda path: path.write_bytes(content)


def cut(write: Callable[[Path], object], at: int) -> Callable[[Path], object]:
    """Writes a file and cuts it short."""

    def work(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[:at])

    return work


def archive(*names: str, compressed: bool = False) -> Callable[[Path], object]:
    """Writes a zip archive of small files."""

    def work(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as opened:
            for name in names:
                opened.writestr(name, b"\0" * 100)

    return work


def folder(*names: str) -> Callable[[Path], object]:
    """Makes a folder of empty files."""

    def work(path: Path) -> None:
        path.mkdir()
        for name in names:
            (path / name).touch()

    return work


def _torchscript(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(Network().eval(), torch.zeros(1, 1, 4, 4)).save(str(path))


def _compressed(path: Path) -> None:
    torch.save(pruned(), path)
    with zipfile.ZipFile(path) as plain:
        entries = {info.filename: plain.read(info) for info in plain.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for name, content in entries.items():
            small.writestr(name, content)


def _without_checksums(path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(pruned(), path)
    finally:
        torch.serialization.set_crc32_options(before)


def _changed(path: Path) -> None:
    torch.save(pruned(), path)
    content = bytearray(path.read_bytes())
    content[content.index(dense()["hidden.weight"][0, 1].numpy().tobytes())] ^= 1
    path.write_bytes(content)


def _damaged_end(path: Path) -> None:
    torch.save(pruned(), path)
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"))


def _gzipped(path: Path) -> None:
    path.write_bytes(gzip.compress(b"weights", mtime=0))


def _tarred(path: Path) -> None:
    with tarfile.open(path, "w") as opened:
        opened.addfile(tarfile.TarInfo("weights.pt"))


def _own(path: Path) -> pl.Ticket:
    ticket = tickets.transplant(pruned(), {name: value for name, value in mask().items()}, into())
    ticket.save(path)
    return ticket


def _own_posterior(path: Path) -> None:
    state = pruned()
    start = into().start
    loc = {name: state[name] for name in start.loc}
    pl.Posterior(loc, start.scale, start.prunable).save(path, {name: state[name] for name in into().net})


def _own_damaged(path: Path) -> None:
    _own(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _own_by_torch(path: Path) -> None:
    _own(path)
    torch.save({name: value.clone() for name, value in untrusted.load_tensors(path)[0].items()}, path)


def _adam(state: State) -> dict[str, Any]:
    network = Network()
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.rand(2, 1, 4, 4)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def _torch_pruned() -> State:
    network = Network()
    network.load_state_dict(dense())
    for name, value in mask().items():
        prune.custom_from_mask(network.get_submodule(name.partition(".")[0]), "weight", value)
    return network.state_dict()


def _weight_norm(new: bool) -> State:
    network = Network()
    with warnings.catch_warnings(action="ignore"):
        (parametrizations.weight_norm if new else nn.utils.weight_norm)(network.hidden)
    return network.state_dict()


def _spectral_norm() -> State:
    network = Network()
    with warnings.catch_warnings(action="ignore"):
        nn.utils.spectral_norm(network.hidden)
    return network.state_dict()


def _quantised() -> State:
    with warnings.catch_warnings(action="ignore"):
        return dense() | {"hidden.weight": torch.quantize_per_tensor(dense()["hidden.weight"], 0.1, 0, torch.qint8)}


def _averaged() -> State:
    network = Network()
    network.load_state_dict(pruned())
    return torch.optim.swa_utils.AveragedModel(network).state_dict()


def _with(**changed: Any) -> State:
    """:func:`pruned` with other values, by names whose dots are two underscores; None takes one away."""
    given = {name.replace("__", "."): value for name, value in changed.items()}
    return {name: value for name, value in (pruned() | given).items() if value is not None}


def _in(dtype: torch.dtype, state: State) -> State:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}


class Code:
    """An object whose pickle runs code when it is read."""

    def __reduce__(self) -> Any:
        return print, ("code of the file was run",)


def _masks(**changed: Any) -> Callable[[Path], object]:
    given = {name.replace("__", "."): value for name, value in changed.items()}
    return saved(lambda: {name: value for name, value in (mask() | given).items() if value is not None})


ZEROS = "FILE: 66 of 132 prunable weights are 0, and taken for pruned: density 50.0000%"


def _prefix(names: str) -> str:
    return f"FILE: names are read without {names}; {ZEROS}"


def _refused(what: str) -> str:
    return f"FILE cannot be read as a state_dict: it is {what}"


def cases() -> list[Case]:
    """All files, right ones first."""
    p = pruned()
    half, brain = _in(torch.float16, p), _in(torch.bfloat16, p)
    lightning = {
        "state_dict": prefixed("model.", p), "epoch": 3, "global_step": 100, "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": Namespace(lr=0.1, folder=Path("data")), "callbacks": {}, "loops": {}, "lr_schedulers": [],
        "optimizer_states": [_adam(p)],
    }  # fmt: skip
    numbers = {
        "best": np.float64(0.9),
        "seen": np.int64(3),
        "done": np.bool_(True),
        "name": "tiny",
        "curve": np.ones(3),
    }
    timm = {
        "state_dict": p,
        "state_dict_ema": pruned(2),
        "epoch": 3,
        "arch": "tiny",
        "optimizer": _adam(p),
        "metric": 0.9,
    }
    beside = "; the key can name another entry: state_dict_ema"
    tiny = "in which small weights become 0 and would be taken for pruned; --mask tells them apart"
    whole = [
        Case("a.pt a state_dict by torch.save", saved(p), p, ZEROS),
        Case("a.pt of torch before 1.6, no zip archive", saved(p, _use_new_zipfile_serialization=False), p, ZEROS),
        Case("a.safetensors a state_dict", safe(pruned), p, ZEROS),
        Case("a.pt which is safetensors", safe(pruned), p, ZEROS),
        Case("a.safetensors which torch.save wrote", saved(p), p, ZEROS),
        Case("a.pt without checksums", _without_checksums, p, ZEROS),
        Case("a without an ending", saved(p), p, ZEROS),
        Case("a.pt without a zero", saved(dense), dense(), "", 1.0),
        Case("a.pt of parameters, with gradients", saved(lambda: dict(nn.Module.state_dict(_network(p), keep_vars=True))), p, ZEROS),
        Case("a.pt in channels_last", saved(lambda: _network(p).to(memory_format=torch.channels_last).state_dict()), p, ZEROS),
        Case("a.ckpt {'state_dict', 'epoch'}", saved({"state_dict": p, "epoch": 3}), p, ZEROS),
        Case("a.pth {'net', 'acc', 'epoch'}", saved({"net": p, "acc": torch.tensor(93.0), "epoch": 3}), p, ZEROS),
        Case("a.pt {'model', 'optimizer'} with numpy's numbers and arrays", saved({"model": p, "optimizer": _adam(p)} | numbers), p, ZEROS),
        Case("a.tar {'model_state_dict', 'optimizer_state_dict'}", saved({"model_state_dict": p, "optimizer_state_dict": _adam(p)}), p, ZEROS),
        Case("a.pt {'weights'}", saved({"weights": p}), p, ZEROS),
        Case("a.pt {'model': {'state_dict'}}", saved({"model": {"state_dict": p, "arch": "tiny"}}), p, ZEROS),
        Case("a.pt a defaultdict of entries", saved(lambda: defaultdict(dict, model=OrderedDict(p))), p, ZEROS),
        Case("a.pt {'generator'}, no usual name", saved({"generator": p, "epoch": 1}), p, f"FILE: the weights are read from its entry 'generator'; {ZEROS}"),
        Case("a.ckpt of Lightning", saved(lightning), p, _prefix("the prefix model.")),
        Case("a.pth.tar of timm, with averaged weights", saved(timm), p, f"FILE: the weights are read from its entry 'state_dict'{beside}; {ZEROS}"),
        Case("a.pth.tar of timm, --key state_dict_ema", saved(timm), pruned(2), ZEROS, key="state_dict_ema"),
        Case("a.pt {'ema': {'module', 'decay'}}", saved({"ema": {"module": p, "decay": torch.tensor(0.99)}}), p, f"FILE: the weights are read from its entry 'ema'; {ZEROS}"),
        Case("a.pt two networks, --key student", saved({**prefixed("student.", p), **prefixed("teacher.", pruned(2))}), p, ZEROS, key="student"),
        Case("a.pt of DataParallel", saved(prefixed("module.", p)), p, _prefix("the prefix module.")),
        Case("a.pt of torch.compile", saved(prefixed("_orig_mod.", p)), p, _prefix("the prefix _orig_mod.")),
        Case("a.pt of both", saved(prefixed("module._orig_mod.", p)), p, _prefix("the prefix module._orig_mod.")),
        Case("a.safetensors of a wrapper in a wrapper", safe(lambda: prefixed("model.net.backbone.", p)), p, _prefix("the prefix model.net.backbone.")),
        Case("a.pt of torch.compile on one layer", saved({n.replace("hidden.", "hidden._orig_mod."): t for n, t in p.items()}), p, _prefix("_orig_mod.")),
        Case("a.pt of AveragedModel", saved(_averaged), p, _prefix("the prefix module.")),
        Case("a.pt with a layer of zeros", saved(dense() | {"hidden.weight": torch.zeros(6, 16)}), dense() | {"hidden.weight": torch.zeros(6, 16)}, "FILE: all weights of hidden.weight are 0, and pruned; FILE: 96 of 132 prunable weights are 0, and taken for pruned: density 27.2727%", 36 / 132),
        Case("a.pt without num_batches_tracked", saved(_with(bn__num_batches_tracked=None)), p | {"bn.num_batches_tracked": torch.tensor(0)}, ZEROS),
        Case("a.pt with entries that are no tensors", saved(p | {"epoch": 3, "note": "best"}), p, f"FILE: epoch, note are not tensors and are ignored; {ZEROS}"),
        Case("a.pt in float64", saved(_in(torch.float64, p)), p, ZEROS),
        Case("a.pt in float16", saved(half), _in(torch.float32, half), f"FILE is in float16, {tiny}; {ZEROS}"),
        Case("a.pt in bfloat16", saved(brain), _in(torch.float32, brain), f"FILE is in bfloat16, {tiny}; {ZEROS}"),
        Case("a.pt in float16, without a zero", saved(_in(torch.float16, dense())), _in(torch.float32, _in(torch.float16, dense())), "", 1.0),
        Case("a.pt of torch.nn.utils.prune", saved(_torch_pruned), p, ZEROS),
        Case("a.safetensors a ticket of this library", _own, p),
        Case("a.safetensors a posterior of this library", _own_posterior, p, ZEROS),
        Case("a.pt a ticket that torch.save wrote again", _own_by_torch, p),
        Case("a.pt dense, --mask", saved(dense), p, mask=_masks()),
        Case("a.pt dense, --mask in bool, which keeps biases and classifier whole", saved(dense), p, mask=_masks(conv__bias=torch.ones(4), out__weight=torch.ones(3, 6))),
        Case("a.pt dense, --mask of names module.NAME_mask", saved(dense), p, "FILE.mask: names are read without the prefix module.", mask=saved(lambda: {f"module.{n}_mask": t for n, t in mask().items()})),
        Case("a.pt dense, --mask a ticket of this library", saved(dense), p, mask=_own),
        Case("a.pt pruned, --mask that prunes the same", saved(p), p, mask=_masks()),
    ]  # fmt: skip
    nothing = torch.zeros(6, 16)
    refused = {
        "a.pt of TorchScript": (_torchscript, _refused("a TorchScript archive; save torch.jit.load(FILE).state_dict() with torch.save")),
        "a.pt a whole pickled model": (saved(lambda: LeNet(3, 1, 8)), _refused("a whole pickled model (pyro_lottery.nets.lenet.LeNet), which cannot be read without its code; save model.state_dict() instead")),
        "a.pt a pickle that runs code": (saved({"state_dict": p, "x": Code()}), "FILE cannot be read as a state_dict: it calls __builtin__ print, which does not make a tensor; save only the state_dict"),
        "a.pt a pickle of Python's own": (lambda path: path.write_bytes(pickle.dumps({"w": [1.0]})), _refused("a Python pickle, which could run code when it is read; save the state_dict with torch.save")),
        "a.pt in another protocol of pickle": (saved(p, pickle_protocol=4), "FILE cannot be read as a state_dict: its pickle protocol is not 2 (STACK_GLOBAL); save it with torch.save or safetensors"),
        "a.pt a compressed zip archive": (_compressed, "FILE cannot be read as a state_dict: it is compressed, so it may need far more memory than its size; save it with torch.save or safetensors"),
        "a.pt that is cut short": (cut(saved(p), 3000), _refused("a truncated zip archive, 3,000 bytes; copy or download it again")),
        "a.pt with a changed byte": (_changed, "FILE cannot be read as a state_dict: it is damaged (Bad CRC-32 for file 'a/data/…"),
        "a.pt with a damaged end": (_damaged_end, "FILE cannot be read as a state_dict: it is a damaged zip archive (…"),
        "a.safetensors that is cut short": (cut(safe(pruned), 1200), "FILE cannot be read as a state_dict: …"),
        "a.safetensors cut within its header": (cut(safe(pruned), 100), _refused("a safetensors file that ends within its header, at 100 bytes")),
        "a.pt that is empty": (bytes_of(b""), _refused("empty; copy or download it again")),
        "a.pt that is not there": (lambda path: None, "FILE does not exist; expected a .safetensors or .pt file with a state_dict"),
        "a a folder": (folder(), _refused("a folder; give a file of weights")),
        "a a folder of transformers": (folder("config.json", "model.safetensors"), _refused("a folder with model.safetensors; give a file of weights")),
        "a a SavedModel of TensorFlow": (folder("saved_model.pb"), _refused("a folder with a SavedModel of TensorFlow; give a file of weights")),
        "a.npz": (lambda path: np.savez(path, w=np.ones(3)), _refused("an archive of numpy arrays (.npz); save them as tensors with torch.save")),
        "a.npy": (lambda path: np.save(path, np.ones(3)), _refused("a single numpy array (.npy); save all tensors in one file with torch.save")),
        "a.h5 of Keras": (bytes_of(b"\x89HDF\r\n\x1a\n" + b"\0" * 100), _refused("an HDF5 file, perhaps of Keras; save a PyTorch network's state_dict")),
        "a.keras": (archive("metadata.json", "config.json", "model.weights.h5"), _refused("a Keras model; save a PyTorch network's state_dict")),
        "a.onnx": (bytes_of(b"\x08\x07\x12\x07pytorch\x1a\x052.8.0:" + b"\0" * 100), _refused("an ONNX model; save the state_dict of the network from which it was exported")),
        "a.pt2 of torch.export": (archive("a/archive_format", "a/models/model.json"), _refused("a program by torch.export; save its state_dict with torch.save")),
        "a.gguf": (bytes_of(b"GGUF\x03\0\0\0" + b"\0" * 100), _refused("a GGUF file, whose weights are quantised; give the file that it was converted from")),
        "a.tflite": (bytes_of(b"\x1c\0\0\0TFL3" + b"\0" * 100), _refused("a TFLite model, of TensorFlow; save a PyTorch network's state_dict")),
        "a.ckpt.index of TensorFlow": (bytes_of(b"\0" * 40 + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"), _refused("one file of a checkpoint of TensorFlow; save a PyTorch network's state_dict")),
        "a.ckpt.data-00000-of-00001": (bytes_of(bytes(range(256))), _refused("one file of a checkpoint of TensorFlow; save a PyTorch network's state_dict")),
        "checkpoint of TensorFlow": (bytes_of(b'model_checkpoint_path: "a.ckpt"\n'), _refused("the index of checkpoints of TensorFlow; save a PyTorch network's state_dict")),
        "model.safetensors.index.json": (lambda path: path.write_text(json.dumps({"metadata": {}, "weight_map": {"w": "a"}})), _refused("the index of weights in several files; save them in one file")),
        "a.pt a Git LFS pointer": (bytes_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"), _refused("a Git LFS pointer instead of the file itself; run git lfs pull")),
        "a.pt a web page": (bytes_of(b"\n<!DOCTYPE html><html><title>404</title></html>"), _refused("a web page, so the download failed; download the file again")),
        "a.pt a text": (bytes_of(b"see the other file\n"), _refused("a text file that begins with 'see the other file'")),
        "a.pt.gz": (_gzipped, _refused("compressed (gzip); unpack it first")),
        "a.tar": (_tarred, _refused("a tar archive; unpack it and give the file of weights in it")),
        "a.zip with weights in it": (archive("b/weights.pt", "b/README.md"), _refused("a zip archive with b/weights.pt; unpack it and give that file")),
        "a.zip of images": (archive("1.png", "2.png"), _refused("a zip archive of 2 other files")),
        "a.pt of random bytes": (bytes_of(b"\xfe\0\1\2" * 50), "FILE cannot be read as a state_dict: it is not a file of weights; it begins with b'\\xfe\\x00\\x01\\x02\\xfe\\x00\\x01\\x02'"),
        "a.pt in int8": (saved(_with(hidden__weight=torch.ones(6, 16, dtype=torch.int8))), "FILE: hidden.weight is torch.int8, perhaps a quantised weight; save weights in floating point"),
        "a.pt with a quantised tensor": (saved(_quantised), "FILE: hidden.weight is quantised (torch.qint8); save the weights before quantisation"),
        "a.pt in float8": (saved(_with(hidden__weight=nothing.to(torch.float8_e4m3fn))), "FILE: hidden.weight is a torch.float8_e4m3fn tensor (torch.strided); expected dense real numbers"),
        "a.pt with complex weights": (saved(_with(hidden__weight=nothing.to(torch.complex64))), "FILE: hidden.weight is a torch.complex64 tensor (torch.strided); expected dense real numbers"),
        "a.pt with a sparse tensor": (saved(lambda: _with(hidden__weight=_csr(p["hidden.weight"]))), "FILE: hidden.weight is a torch.float32 tensor (torch.sparse_csr); expected dense real numbers"),
        "a.pt with a tensor of no values": (saved(_with(hidden__weight=nothing.to("meta"))), "FILE: hidden.weight has no values (it is on the meta device); save the weights themselves"),
        "a.pt with one number for all": (saved(_with(hidden__weight=torch.ones(1, 1).expand(6, 16))), "FILE: hidden.weight stores fewer numbers than its shape (6, 16) has; save it contiguous"),
        "a.pt with NaN": (saved(_with(hidden__bias=torch.full((6,), torch.nan))), "hidden.bias holds values that are not finite"),
        "a.pt with a number beyond float32": (saved(_with(hidden__bias=torch.full((6,), 1e300, dtype=torch.float64))), "hidden.bias holds values that are not finite"),
        "a.pt of four classes": (saved(_with(out__weight=torch.ones(4, 6), out__bias=torch.ones(4))), "out.weight is (4, 6), but the network's is (3, 6); out.bias is (4,), but the network's is (3,)"),
        "a.ckpt of Lightning, with weights of the loss": (saved({"state_dict": prefixed("model.", p) | {"loss.weight": torch.ones(3)}}), "FILE: the network's names begin with model in this file; give the key 'model'"),
        "a.pt two networks": (saved({**prefixed("student.", p), **prefixed("teacher.", pruned(2))}), "FILE: the network's names begin with student or teacher in this file; give the key 'student'"),
        "a.pt that lacks a layer": (saved(_with(hidden__weight=None)), "hidden.weight is missing"),
        "a.pt with a layer more": (saved(_with(aux__weight=torch.ones(2))), "aux.weight is not in the network"),
        "a.pt by other names": (saved(prefixed("qkv_", {"proj.weight": torch.ones(3)})), "conv.weight is missing; conv.bias is missing; hidden.weight is missing; hidden.bias is missing; out.weight is missing and 6 more"),
        "a.pt prefixes on some names": (saved({("module." if n.startswith("b") else "") + n: t for n, t in p.items()}), "bn.weight is missing; …"),
        "a.pt of weight_norm": (saved(lambda: _weight_norm(False)), "FILE: hidden.weight_g is only a part of a weight (weight norm, hidden.weight_g and hidden.weight_v); call torch.nn.utils.remove_weight_norm and save again"),
        "a.pt of parametrizations": (saved(lambda: _weight_norm(True)), "FILE: hidden.parametrizations.weight.original0 is only a part of a weight (a parametrization); call torch.nn.utils.parametrize.remove_parametrizations and save again"),
        "a.pt of spectral_norm": (saved(_spectral_norm), "FILE: hidden.weight_orig is only a part of a weight (spectral norm, hidden.weight_orig and hidden.weight_u); call torch.nn.utils.remove_spectral_norm and save again"),
        "a.pt an optimizer's state": (saved(lambda: {"optimizer": _adam(p)}), "FILE has no state_dict: expected a dictionary of tensors by name, found optimizer"),
        "a.pt of numpy arrays": (saved({"w": np.ones(3)}), "FILE has no state_dict: expected a dictionary of tensors by name, found numpy arrays or numbers"),
        "a.pt a list": (saved([1, 2]), "FILE has no state_dict: expected a dictionary of tensors by name, found a list"),
        "a.pt one tensor": (saved(torch.ones(2)), "FILE has no state_dict: expected a dictionary of tensors by name, found a Tensor"),
        "a.pt names that are numbers": (saved({1: torch.ones(1)}), "FILE has no state_dict: its key 1 is not a string"),
        "a.pt two state_dicts": (saved({"model": p, "net": p}), "FILE has several state_dicts; choose one by its key: model, net"),
        "a.safetensors a damaged ticket": (_own_damaged, "FILE fails its checksum"),
        "a.safetensors a checkpoint of a level": (lambda path: files.save_tensors(path, {"guide/x": torch.ones(1), "optimizer/0/step": torch.ones(1)}), "FILE is a checkpoint of a level in training without loc/; give a ticket.safetensors or posterior.safetensors"),
    }  # fmt: skip
    ones = {name: torch.ones_like(value) for name, value in mask().items()}
    contradicting = {
        "keeps what is 0": (saved(p), saved(ones), "the mask keeps 66 weights that are 0, 18 of them in 'conv.weight', so another mask pruned these weights; without a mask, the zeros are used as the mask"),
        "prunes a bias": (saved(dense), _masks(conv__bias=torch.zeros(4)), "the mask prunes 'conv.bias', which is a bias or in the final layer, so it cannot be pruned; leave it out of the mask"),
        "prunes the classifier": (saved(dense), _masks(out__weight=torch.zeros(3, 6)), "the mask prunes 'out.weight', which is a bias or in the final layer, so it cannot be pruned; leave it out of the mask"),
        "prunes BatchNorm": (saved(dense), _masks(bn__weight=torch.zeros(4)), "the mask prunes 'bn.weight', which stays deterministic in this network, so it cannot be pruned; leave it out of the mask"),
        "holds 0.5": (saved(dense), _masks(hidden__weight=torch.full((6, 16), 0.5)), "mask of hidden.weight must hold only 0 and 1"),
        "keeps nothing": (saved(dense), saved({name: 0 * value for name, value in ones.items()}), "the mask keeps no weight; at least one must survive"),
        "lacks a layer": (saved(dense), _masks(hidden__weight=None), "mask of hidden.weight is missing"),
        "is of another shape": (saved(dense), _masks(hidden__weight=torch.ones(2)), "mask of hidden.weight is (2,), but the network's is (6, 16)"),
        "is a posterior": (saved(dense), _own_posterior, "FILE.mask holds no mask/: it is a posterior; name the level's ticket.safetensors"),
    }  # fmt: skip
    whole += [Case(name, write, None, line) for name, (write, line) in refused.items()]
    whole += [
        Case(
            "a.pt {'state_dict'}, --key ema",
            saved({"state_dict": p}),
            None,
            "FILE has no entry 'ema'; it has state_dict",
            key="ema",
        )
    ]
    whole += [Case(f"a.pt, --mask that {name}", write, None, line, mask=other) for name, (write, other, line) in contradicting.items()]  # fmt: skip
    return whole


def _network(state: State) -> Network:
    network = Network()
    network.load_state_dict(state)
    return network


def _csr(value: Tensor) -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # that the layout is in beta
        return value.to_sparse_csr()


@dataclass(frozen=True)
class Outcome:
    """What came of a file."""

    ticket: pl.Ticket | None
    said: str
    """The error's line, or all lines beside, with FILE for the path."""


def try_out(case: Case) -> Outcome:
    """Write the case's file, and read it as a transplant's source."""
    printed, ticket, error = io.StringIO(), None, ""
    with tempfile.TemporaryDirectory() as made:
        path, masked = Path(made) / case.file.rstrip(","), Path(made) / f"{case.file.rstrip(',')}.mask"
        case.write(path)
        if case.mask:
            case.mask(masked)
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
            warnings.simplefilter("always")
            try:
                ticket = transplant.ticket_of(*transplant.read(path, masked if case.mask else None, case.key), into())
            except UserError as wrong:
                error = str(wrong)
        lines = [str(each.message) for each in caught] + printed.getvalue().splitlines()
        return Outcome(ticket, (error or "; ".join(lines)).replace(str(path), "FILE"))


def agrees(case: Case, outcome: Outcome) -> str:
    """What is wrong with an outcome, or empty."""
    before, cut_short, _ = case.line.partition("…")
    if not (outcome.said.startswith(before) if cut_short else outcome.said == case.line) or "\n" in outcome.said:
        return f"it says {outcome.said!r}, not {case.line!r}"
    if (case.right is None) != (outcome.ticket is None):
        return "it is refused" if case.right else "it is read"
    if outcome.ticket is None or case.right is None:
        return ""
    found = {**outcome.ticket.start.loc, **outcome.ticket.net}
    wrong = [name for name, value in case.right.items() if not torch.equal(found[name], value)]
    if wrong or found.keys() != case.right.keys():
        return f"{wrong[:1] or 'a name'} is wrong"
    density = masks.density(outcome.ticket.mask)
    return "" if density == case.density else f"density is {density}, not {case.density}"


HEAD = """# Weight files, one line each

What `python -m pyro_lottery.transplant FILE` makes of weight files as people have them. The network has one convolution, BatchNorm,
a linear layer and a classifier, with 132 prunable weights.

- "Read": every value of the ticket is right, and its density is the given one. Messages follow; "zeros" stands for the message
  that says how many zeros are taken for pruned.
- Otherwise the command ends with exit code 2 and the given line. FILE is the path; … is the rest of a line of another library.

Each row is a test.

"""


def markdown(every: Sequence[Case]) -> str:
    """The table, with a sentence that counts its rows."""
    read = [case for case in every if case.right is not None]
    lines = [
        f"{HEAD}{len(every)} files: {len(read)} are read, {len(every) - len(read)} are refused in one line. Made by "
        "`python -m experiments.odd_weights -o plots/gallery/weights.md`.\n",
    ]
    rows = []
    for case in every:
        density = f"read, density {100 * case.density:.4g} %" if case.right is not None else ""
        line = case.line.replace(ZEROS, "zeros")
        told = ". ".join(part for part in (density, line) if part).replace("|", "/")
        rows.append((case.file.rstrip(","), case.what, told))
    return "\n".join([*lines, *markdown_table(("file", "", "what comes of it"), rows)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 1 where an outcome is not the one that is stated."""
    parser = argparse.ArgumentParser(prog="python -m experiments.odd_weights", description=str(__doc__))
    parser.add_argument("-o", "--output", type=Path, default=Path("figures/weights.md"), help="the table to write")
    given = parser.parse_args(arguments)
    every = cases()
    wrong = {case.name: fault for case in every if (fault := agrees(case, try_out(case)))}
    for name, fault in wrong.items():
        print(f"{name}: {fault}")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(given.output, markdown(every).encode())
    print(f"{len(every) - len(wrong)} of {len(every)} files as stated: {given.output}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
