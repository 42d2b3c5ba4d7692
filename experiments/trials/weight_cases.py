"""Weight files as people have them, and what ``python -m pyro_lottery.transplant FILE`` must make of each."""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from experiments.trials.weights import (
    Code,
    State,
    Write,
    adam,
    archive,
    averaged,
    bytes_of,
    cast,
    changed_byte,
    compressed,
    csc,
    csr,
    cut,
    damaged_end,
    dense,
    folder,
    gzipped,
    mask,
    mask_with,
    network,
    own_by_torch,
    own_damaged,
    own_posterior,
    own_small_ticket,
    own_ticket,
    prefixed,
    pruned,
    pruned_with,
    quantised,
    safe,
    saved,
    spectral_norm,
    tarred,
    torch_pruned,
    torchscript,
    weight_norm,
    without_checksums,
)
from pyro_lottery import files
from pyro_lottery.nets.lenet import LeNet


@dataclass(frozen=True)
class Case:
    """One file and what must come of it."""

    name: str
    """What the file is; the first word is the file's name."""
    write: Write
    """Writes the file at the path."""
    right: State | None = None
    """The values that the ticket must have, by the network's names; None for a file that is refused."""
    line: str = ""
    """The error's line, or all messages. FILE stands for the path; … for an end that is not compared."""
    density: float = 0.5
    key: str | None = None
    mask: Write | None = None
    """Writes a file for ``--mask``, the path with ``.mask`` added."""

    @property
    def file(self) -> str:
        return self.name.split()[0]

    @property
    def what(self) -> str:
        return self.name.partition(" ")[2]


ZEROS = "FILE: 66 of 132 prunable weights are 0 and count as pruned: density 50.0000%"


def without(names: str) -> str:
    """The lines for names that are read without a prefix."""
    return f"FILE: names are read without {names}; {ZEROS}"


def unreadable(what: str) -> str:
    """The line for a file that is ``what``, not a state_dict."""
    return f"FILE cannot be read as a state_dict: it is {what}"


def cases() -> list[Case]:
    """All files, right ones first."""
    return [*_read(), *_refused(), *_contradicted()]


def _read() -> list[Case]:
    """Files that are read."""
    p = pruned()
    half, brain = cast(torch.float16, p), cast(torch.bfloat16, p)
    lightning = {
        "state_dict": prefixed("model.", p), "epoch": 3, "global_step": 100, "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": Namespace(lr=0.1, folder=Path("data")), "callbacks": {}, "loops": {}, "lr_schedulers": [],
        "optimizer_states": [adam(p)],
    }  # fmt: skip
    numbers = {
        "best": np.float64(0.9),
        "seen": np.int64(3),
        "done": np.bool_(True),
        "name": "tiny",
        "curve": np.ones(3),
    }
    averages = {"state_dict": p, "state_dict_ema": pruned(2)}
    timm = averages | {"epoch": 3, "arch": "tiny", "optimizer": adam(p), "metric": 0.9}
    beside = "; the key can name another entry: state_dict_ema"
    tiny = "in which small weights become 0 and would count as pruned; give --mask to tell them apart"
    return [
        Case("a.pt a state_dict by torch.save", saved(p), p, ZEROS),
        Case("a.pt of torch before 1.6, no zip archive", saved(p, _use_new_zipfile_serialization=False), p, ZEROS),
        Case("a.safetensors a state_dict", safe(pruned), p, ZEROS),
        Case("a.pt which is safetensors", safe(pruned), p, ZEROS),
        Case("a.safetensors which torch.save wrote", saved(p), p, ZEROS),
        Case("a.pt without checksums", without_checksums, p, ZEROS),
        Case("a without an ending", saved(p), p, ZEROS),
        Case("a.pt without a zero", saved(dense), dense(), "", 1.0),
        Case("a.pt of parameters, with gradients", saved(lambda: dict(nn.Module.state_dict(network(p), keep_vars=True))), p, ZEROS),
        Case("a.pt in channels_last", saved(lambda: network(p).to(memory_format=torch.channels_last).state_dict()), p, ZEROS),
        Case("a.ckpt {'state_dict', 'epoch'}", saved({"state_dict": p, "epoch": 3}), p, ZEROS),
        Case("a.pth {'net', 'acc', 'epoch'}", saved({"net": p, "acc": torch.tensor(93.0), "epoch": 3}), p, ZEROS),
        Case("a.pt {'model', 'optimizer'} with numpy's numbers and arrays", saved({"model": p, "optimizer": adam(p)} | numbers), p, ZEROS),
        Case("a.tar {'model_state_dict', 'optimizer_state_dict'}", saved({"model_state_dict": p, "optimizer_state_dict": adam(p)}), p, ZEROS),
        Case("a.pt {'weights'}", saved({"weights": p}), p, ZEROS),
        Case("a.pt {'model': {'state_dict'}}", saved({"model": {"state_dict": p, "arch": "tiny"}}), p, ZEROS),
        Case("a.pt a defaultdict of entries", saved(lambda: defaultdict(dict, model=OrderedDict(p))), p, ZEROS),
        Case("a.pt {'generator'}, no usual name", saved({"generator": p, "epoch": 1}), p, f"FILE: the weights are read from its entry 'generator'; {ZEROS}"),
        Case("a.ckpt of Lightning", saved(lightning), p, without("the prefix model.")),
        Case("a.pth.tar of timm, with averaged weights", saved(timm), p, f"FILE: the weights are read from its entry 'state_dict'{beside}; {ZEROS}"),
        Case("a.pth.tar of timm, --key state_dict_ema", saved(timm), pruned(2), ZEROS, key="state_dict_ema"),
        Case("a.pt {'ema': {'module', 'decay'}}", saved({"ema": {"module": p, "decay": torch.tensor(0.99)}}), p, f"FILE: the weights are read from its entry 'ema'; {ZEROS}"),
        Case("a.pt two networks, --key student", saved({**prefixed("student.", p), **prefixed("teacher.", pruned(2))}), p, ZEROS, key="student"),
        Case("a.pt of DataParallel", saved(prefixed("module.", p)), p, without("the prefix module.")),
        Case("a.pt of torch.compile", saved(prefixed("_orig_mod.", p)), p, without("the prefix _orig_mod.")),
        Case("a.pt of both", saved(prefixed("module._orig_mod.", p)), p, without("the prefix module._orig_mod.")),
        Case("a.safetensors of a wrapper in a wrapper", safe(lambda: prefixed("model.net.backbone.", p)), p, without("the prefix model.net.backbone.")),
        Case("a.pt of torch.compile on one layer", saved({n.replace("hidden.", "hidden._orig_mod."): t for n, t in p.items()}), p, without("_orig_mod.")),
        Case("a.pt of AveragedModel", saved(averaged), p, without("the prefix module.")),
        Case("a.pt with a layer of zeros", saved(dense() | {"hidden.weight": torch.zeros(6, 16)}), dense() | {"hidden.weight": torch.zeros(6, 16)}, "FILE: all weights of hidden.weight are 0 and count as pruned; FILE: 96 of 132 prunable weights are 0 and count as pruned: density 27.2727%", 36 / 132),
        Case("a.pt without num_batches_tracked", saved(pruned_with(bn__num_batches_tracked=None)), p | {"bn.num_batches_tracked": torch.tensor(0)}, ZEROS),
        Case("a.pt with entries that are no tensors", saved(p | {"epoch": 3, "note": "best"}), p, f"FILE: epoch, note are not tensors and are ignored; {ZEROS}"),
        Case("a.pt in float64", saved(cast(torch.float64, p)), p, ZEROS),
        Case("a.pt in float16", saved(half), cast(torch.float32, half), f"FILE is in float16, {tiny}; {ZEROS}"),
        Case("a.pt in bfloat16", saved(brain), cast(torch.float32, brain), f"FILE is in bfloat16, {tiny}; {ZEROS}"),
        Case("a.pt in float16, without a zero", saved(cast(torch.float16, dense())), cast(torch.float32, cast(torch.float16, dense())), "", 1.0),
        Case("a.pt of torch.nn.utils.prune", saved(torch_pruned), p, "FILE: its masks keep 66 of 132 prunable weights: density 50.0000%"),
        Case("a.pt with a CSR matrix", saved(lambda: p | {"hidden.weight": csr(p["hidden.weight"])}), p, ZEROS),
        Case("a.pt with a COO matrix", saved(lambda: p | {"hidden.weight": p["hidden.weight"].to_sparse()}), p, ZEROS),
        Case("a.safetensors a ticket of this library", own_ticket, p),
        Case("a.safetensors a small ticket of this library", own_small_ticket, p),
        Case("a.safetensors a posterior of this library", own_posterior, p, ZEROS),
        Case("a.pt a ticket that torch.save wrote again", own_by_torch, p),
        Case("a.pt dense, --mask", saved(dense), p, mask=mask_with()),
        Case("a.pt dense, --mask in bool, which keeps biases and classifier whole", saved(dense), p, mask=mask_with(conv__bias=torch.ones(4), out__weight=torch.ones(3, 6))),
        Case("a.pt dense, --mask of names module.NAME_mask", saved(dense), p, "FILE.mask: names are read without the prefix module.", mask=saved(lambda: {f"module.{n}_mask": t for n, t in mask().items()})),
        Case("a.pt dense, --mask a ticket of this library", saved(dense), p, mask=own_ticket),
        Case("a.pt pruned, --mask that prunes the same", saved(p), p, mask=mask_with()),
    ]  # fmt: skip


def _refused() -> list[Case]:
    """Files that are refused."""
    p, nothing = pruned(), torch.zeros(6, 16)
    refused = {
        "a.pt of TorchScript": (torchscript, unreadable("a TorchScript archive; save torch.jit.load(FILE).state_dict() with torch.save")),
        "a.pt a whole pickled model": (saved(lambda: LeNet(3, 1, 8)), unreadable("a whole pickled model (pyro_lottery.nets.lenet.LeNet), which cannot be read without its code; save model.state_dict() instead")),
        "a.pt a pickle that runs code": (saved({"state_dict": p, "x": Code()}), "FILE cannot be read as a state_dict: it calls __builtin__ print, which does not make a tensor; save only the state_dict"),
        "a.pt a pickle of Python's own": (lambda path: path.write_bytes(pickle.dumps({"w": [1.0]})), unreadable("a Python pickle, which could run code when it is read; save the state_dict with torch.save")),
        "a.pt in another protocol of pickle": (saved(p, pickle_protocol=4), "FILE cannot be read as a state_dict: its pickle protocol is not 2 (STACK_GLOBAL); save it with torch.save or safetensors"),
        "a.pt a compressed zip archive": (compressed, "FILE cannot be read as a state_dict: it is compressed, so it may need far more memory than its size; save it with torch.save or safetensors"),
        "a.pt that is cut short": (cut(saved(p), 3000), unreadable("a truncated zip archive, 3,000 bytes; copy or download it again")),
        "a.pt with a changed byte": (changed_byte, "FILE cannot be read as a state_dict: it is damaged (Bad CRC-32 for file 'a/data/…"),
        "a.pt with a damaged end": (damaged_end, "FILE cannot be read as a state_dict: it is a damaged zip archive (…"),
        "a.safetensors that is cut short": (cut(safe(pruned), 1200), "FILE cannot be read as a state_dict: …"),
        "a.safetensors cut within its header": (cut(safe(pruned), 100), unreadable("a safetensors file that ends within its header, at 100 bytes")),
        "a.pt that is empty": (bytes_of(b""), unreadable("empty; copy or download it again")),
        "a.pt that is not there": (lambda path: None, "FILE does not exist; expected a .safetensors or .pt file with a state_dict"),
        "a a folder": (folder(), unreadable("a folder; give a file of weights")),
        "a a folder of transformers": (folder("config.json", "model.safetensors"), unreadable("a folder with model.safetensors; give a file of weights")),
        "a a SavedModel of TensorFlow": (folder("saved_model.pb"), unreadable("a folder with a SavedModel of TensorFlow; give a file of weights")),
        "a.npz": (lambda path: np.savez(path, w=np.ones(3)), unreadable("an archive of numpy arrays (.npz); save them as tensors with torch.save")),
        "a.npy": (lambda path: np.save(path, np.ones(3)), unreadable("a single numpy array (.npy); save all tensors in one file with torch.save")),
        "a.h5 of Keras": (bytes_of(b"\x89HDF\r\n\x1a\n" + b"\0" * 100), unreadable("an HDF5 file, perhaps of Keras; save a PyTorch network's state_dict")),
        "a.keras": (archive("metadata.json", "config.json", "model.weights.h5"), unreadable("a Keras model; save a PyTorch network's state_dict")),
        "a.onnx": (bytes_of(b"\x08\x07\x12\x07pytorch\x1a\x052.8.0:" + b"\0" * 100), unreadable("an ONNX model; save the state_dict of the network from which it was exported")),
        "a.pt2 of torch.export": (archive("a/archive_format", "a/models/model.json"), unreadable("a program by torch.export; save its state_dict with torch.save")),
        "a.gguf": (bytes_of(b"GGUF\x03\0\0\0" + b"\0" * 100), unreadable("a GGUF file, whose weights are quantised; give the file that it was converted from")),
        "a.tflite": (bytes_of(b"\x1c\0\0\0TFL3" + b"\0" * 100), unreadable("a TFLite model, of TensorFlow; save a PyTorch network's state_dict")),
        "a.ckpt.index of TensorFlow": (bytes_of(b"\0" * 40 + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"), unreadable("one file of a checkpoint of TensorFlow; save a PyTorch network's state_dict")),
        "a.ckpt.data-00000-of-00001": (bytes_of(bytes(range(256))), unreadable("one file of a checkpoint of TensorFlow; save a PyTorch network's state_dict")),
        "checkpoint of TensorFlow": (bytes_of(b'model_checkpoint_path: "a.ckpt"\n'), unreadable("the index of checkpoints of TensorFlow; save a PyTorch network's state_dict")),
        "model.safetensors.index.json": (lambda path: path.write_text(json.dumps({"metadata": {}, "weight_map": {"w": "a"}})), unreadable("the index of weights in several files; save them in one file")),
        "a.pt a Git LFS pointer": (bytes_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"), unreadable("a Git LFS pointer instead of the file itself; run git lfs pull")),
        "a.pt a web page": (bytes_of(b"\n<!DOCTYPE html><html><title>404</title></html>"), unreadable("a web page, so the download failed; download the file again")),
        "a.pt a text": (bytes_of(b"see the other file\n"), unreadable("a text file that begins with 'see the other file'")),
        "a.pt.gz": (gzipped, unreadable("compressed (gzip); unpack it first")),
        "a.tar": (tarred, unreadable("a tar archive; unpack it and give the file of weights in it")),
        "a.zip with weights in it": (archive("b/weights.pt", "b/README.md"), unreadable("a zip archive with b/weights.pt; unpack it and give that file")),
        "a.zip of images": (archive("1.png", "2.png"), unreadable("a zip archive of 2 other files")),
        "a.pt of random bytes": (bytes_of(b"\xfe\0\1\2" * 50), "FILE cannot be read as a state_dict: it is not a file of weights; it begins with b'\\xfe\\x00\\x01\\x02\\xfe\\x00\\x01\\x02'"),
        "a.pt in int8": (saved(pruned_with(hidden__weight=torch.ones(6, 16, dtype=torch.int8))), "FILE: hidden.weight is torch.int8, perhaps a quantised weight; save weights in floating point"),
        "a.pt with a quantised tensor": (saved(quantised), "FILE: hidden.weight is quantised (torch.qint8); save the weights before quantisation"),
        "a.pt in float8": (saved(pruned_with(hidden__weight=nothing.to(torch.float8_e4m3fn))), "FILE: hidden.weight is a torch.float8_e4m3fn tensor (torch.strided); expected dense real numbers"),
        "a.pt with complex weights": (saved(pruned_with(hidden__weight=nothing.to(torch.complex64))), "FILE: hidden.weight is a torch.complex64 tensor (torch.strided); expected dense real numbers"),
        "a.pt with a CSC matrix": (saved(lambda: pruned_with(hidden__weight=csc(p["hidden.weight"]))), "FILE: hidden.weight is a torch.float32 tensor (torch.sparse_csc); expected dense real numbers"),
        "a.pt with a sparse matrix of one number seen many times": (saved(lambda: pruned_with(hidden__weight=torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64).expand(2, 2**22), torch.ones(1).expand(2**22), (2**15, 2**15), check_invariants=True))), "FILE: hidden.weight is a sparse matrix of (32768, 32768) with hardly a value; save it dense"),
        "a.pt with a sparse matrix of one value in terabytes": (saved(lambda: pruned_with(hidden__weight=torch.sparse_coo_tensor([[1], [2]], [1.0], (2**20, 2**20), check_invariants=True))), "FILE: hidden.weight is a sparse matrix of (1048576, 1048576) with hardly a value; save it dense"),
        "a.pt with a tensor of no values": (saved(pruned_with(hidden__weight=nothing.to("meta"))), "FILE: hidden.weight has no values (it is on the meta device); save the weights themselves"),
        "a.pt with one number for all": (saved(pruned_with(hidden__weight=torch.ones(1, 1).expand(6, 16))), "FILE: hidden.weight stores fewer numbers than its shape (6, 16) has; save it contiguous"),
        "a.pt with NaN": (saved(pruned_with(hidden__bias=torch.full((6,), torch.nan))), "hidden.bias holds values that are not finite"),
        "a.pt with a number beyond float32": (saved(pruned_with(hidden__bias=torch.full((6,), 1e300, dtype=torch.float64))), "hidden.bias holds values that are not finite"),
        "a.pt of four classes": (saved(pruned_with(out__weight=torch.ones(4, 6), out__bias=torch.ones(4))), "out.weight is (4, 6), but the network's is (3, 6); out.bias is (4,), but the network's is (3,)"),
        "a.ckpt of Lightning, with weights of the loss": (saved({"state_dict": prefixed("model.", p) | {"loss.weight": torch.ones(3)}}), "FILE: the network's names begin with model in this file; give the key 'model'"),
        "a.pt two networks": (saved({**prefixed("student.", p), **prefixed("teacher.", pruned(2))}), "FILE: the network's names begin with student or teacher in this file; give the key 'student'"),
        "a.pt that lacks a layer": (saved(pruned_with(hidden__weight=None)), "hidden.weight is missing"),
        "a.pt with a layer more": (saved(pruned_with(aux__weight=torch.ones(2))), "aux.weight is not in the network"),
        "a.pt by other names": (saved(prefixed("qkv_", {"proj.weight": torch.ones(3)})), "conv.weight is missing; conv.bias is missing; hidden.weight is missing; hidden.bias is missing; out.weight is missing and 6 more"),
        "a.pt prefixes on some names": (saved({("module." if n.startswith("b") else "") + n: t for n, t in p.items()}), "bn.weight is missing; …"),
        "a.pt of weight_norm": (saved(lambda: weight_norm(False)), "FILE: hidden.weight_g is only a part of a weight (weight norm, hidden.weight_g and hidden.weight_v); call torch.nn.utils.remove_weight_norm and save again"),
        "a.pt of parametrizations": (saved(lambda: weight_norm(True)), "FILE: hidden.parametrizations.weight.original0 is only a part of a weight (a parametrization); call torch.nn.utils.parametrize.remove_parametrizations and save again"),
        "a.pt of spectral_norm": (saved(spectral_norm), "FILE: hidden.weight_orig is only a part of a weight (spectral norm, hidden.weight_orig and hidden.weight_u); call torch.nn.utils.remove_spectral_norm and save again"),
        "a.pt an optimizer's state": (saved(lambda: {"optimizer": adam(p)}), "FILE has no state_dict: expected a dictionary of tensors by name, found optimizer"),
        "a.pt of numpy arrays": (saved({"w": np.ones(3)}), "FILE has no state_dict: expected a dictionary of tensors by name, found numpy arrays or numbers"),
        "a.pt a list": (saved([1, 2]), "FILE has no state_dict: expected a dictionary of tensors by name, found a list"),
        "a.pt one tensor": (saved(torch.ones(2)), "FILE has no state_dict: expected a dictionary of tensors by name, found a Tensor"),
        "a.pt names that are numbers": (saved({1: torch.ones(1)}), "FILE has no state_dict: its key 1 is not a string"),
        "a.pt two state_dicts": (saved({"model": p, "net": p}), "FILE has several state_dicts; choose one by its key: model, net"),
        "a.safetensors a damaged ticket": (own_damaged, "FILE fails its checksum"),
        "a.safetensors a checkpoint of a level": (lambda path: files.save_tensors(path, {"guide/x": torch.ones(1), "optimizer/0/step": torch.ones(1)}), "FILE is a checkpoint of a level in training without loc/; give a ticket.safetensors or posterior.safetensors"),
    }  # fmt: skip
    every = [Case(name, write, None, line) for name, (write, line) in refused.items()]
    line = "FILE has no entry 'ema'; it has state_dict"
    return [*every, Case("a.pt {'state_dict'}, --key ema", saved({"state_dict": p}), None, line, key="ema")]


def _contradicted() -> list[Case]:
    """Files whose ``--mask`` contradicts them, or is none."""
    p = pruned()
    ones = {name: torch.ones_like(value) for name, value in mask().items()}
    contradicting = {
        "keeps what is 0": (saved(p), saved(ones), "the mask keeps 66 weights that are 0, 18 of them in 'conv.weight', so another mask pruned these weights; without a mask, the zeros are used as the mask"),
        "prunes a bias": (saved(dense), mask_with(conv__bias=torch.zeros(4)), "the mask prunes 'conv.bias', which is a bias or in the final layer, so it cannot be pruned; leave it out of the mask"),
        "prunes the classifier": (saved(dense), mask_with(out__weight=torch.zeros(3, 6)), "the mask prunes 'out.weight', which is a bias or in the final layer, so it cannot be pruned; leave it out of the mask"),
        "prunes BatchNorm": (saved(dense), mask_with(bn__weight=torch.zeros(4)), "the mask prunes 'bn.weight', which stays deterministic in this network, so it cannot be pruned; leave it out of the mask"),
        "holds 0.5": (saved(dense), mask_with(hidden__weight=torch.full((6, 16), 0.5)), "mask of hidden.weight must hold only 0 and 1"),
        "keeps nothing": (saved(dense), saved({name: 0 * value for name, value in ones.items()}), "the mask keeps no weight; at least one must survive"),
        "lacks a layer": (saved(dense), mask_with(hidden__weight=None), "mask of hidden.weight is missing"),
        "is of another shape": (saved(dense), mask_with(hidden__weight=torch.ones(2)), "mask of hidden.weight is (2,), but the network's is (6, 16)"),
        "is a posterior": (saved(dense), own_posterior, "FILE.mask holds no mask/: it is a posterior; name the level's ticket.safetensors"),
    }  # fmt: skip
    return [
        Case(f"a.pt, --mask that {name}", write, None, line, mask=other)
        for name, (write, other, line) in contradicting.items()
    ]
