"""Writes weight files as people have them, of one small network. Functions without a path return a writer or a state."""

from __future__ import annotations

import gzip
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import pyro_lottery as pl
from pyro_lottery import guides, seeds, tickets, untrusted
from pyro_lottery.runs import build


class Network(nn.Module):
    """A convolution with BatchNorm, a linear layer and a classifier, for [n, 1, 4, 4] images; 132 prunable weights."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(16, 6)
        self.out = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(torch.relu(self.bn(self.conv(x))), 2).flatten(1)
        return self.out(torch.relu(self.hidden(x)))


State = dict[str, Tensor]
Write = Callable[[Path], object]
"""Writes a file, or makes a folder, at a path."""
PRUNABLE = ("conv.weight", "hidden.weight")


@cache
def into() -> pl.Ticket:
    """The dense ticket of the network that all files are for."""
    with seeds.rng("cpu", 0, "odd weights"):
        model = pl.BayesianClassifier(Network(), num_data=60)
        return build.dense_ticket(model, guides.mean_field(model))


def dense(seed: int = 1) -> State:
    """A state_dict without a zero, and with statistics of BatchNorm as after training."""
    with seeds.rng("cpu", seed, "odd weights"):
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


def saved(content: Any, **options: Any) -> Write:
    """Writes by ``torch.save``."""
    return lambda path: torch.save(content() if callable(content) else content, path, **options)


def safe(state: Callable[[], State]) -> Write:
    """Writes safetensors."""
    return lambda path: safetensors.torch.save_file(state(), path)


def bytes_of(content: bytes) -> Write:
    """Writes bytes."""
    return lambda path: path.write_bytes(content)


def cut(write: Write, at: int) -> Write:
    """Writes a file and cuts it short."""

    def work(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[:at])

    return work


def archive(*names: str) -> Write:
    """Writes a zip archive of small files."""

    def work(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as opened:
            for name in names:
                opened.writestr(name, b"\0" * 100)

    return work


def folder(*names: str) -> Write:
    """Makes a folder of empty files."""

    def work(path: Path) -> None:
        path.mkdir()
        for name in names:
            (path / name).touch()

    return work


def torchscript(path: Path) -> None:
    """Writes a TorchScript archive."""
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(Network().eval(), torch.zeros(1, 1, 4, 4)).save(str(path))


def compressed(path: Path) -> None:
    """Writes by ``torch.save``, then compresses the archive."""
    torch.save(pruned(), path)
    with zipfile.ZipFile(path) as plain:
        entries = {info.filename: plain.read(info) for info in plain.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for name, content in entries.items():
            small.writestr(name, content)


def without_checksums(path: Path) -> None:
    """Writes by ``torch.save`` without checksums."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(pruned(), path)
    finally:
        torch.serialization.set_crc32_options(before)


def changed_byte(path: Path) -> None:
    """Writes by ``torch.save``, then flips one bit of a weight."""
    torch.save(pruned(), path)
    content = bytearray(path.read_bytes())
    content[content.index(dense()["hidden.weight"][0, 1].numpy().tobytes())] ^= 1
    path.write_bytes(content)


def damaged_end(path: Path) -> None:
    """Writes by ``torch.save``, then damages the archive's directory."""
    torch.save(pruned(), path)
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"))


def gzipped(path: Path) -> None:
    """Writes a gzip file."""
    path.write_bytes(gzip.compress(b"weights", mtime=0))


def tarred(path: Path) -> None:
    """Writes a tar archive."""
    with tarfile.open(path, "w") as opened:
        opened.addfile(tarfile.TarInfo("weights.pt"))


def own_ticket(path: Path) -> pl.Ticket:
    """Writes a ticket of this library, and returns it."""
    ticket = tickets.transplant(pruned(), mask(), into())
    ticket.save(path)
    return ticket


def own_small_ticket(path: Path) -> pl.Ticket:
    """Writes a small ticket of this library, and returns it."""
    ticket = tickets.transplant(pruned(), mask(), into())
    ticket.pack(path)
    return ticket


def own_posterior(path: Path) -> None:
    """Writes a posterior of this library."""
    state = pruned()
    start = into().start
    loc = {name: state[name] for name in start.loc}
    pl.Posterior(loc, start.scale, start.prunable).save(path, {name: state[name] for name in into().net})


def own_damaged(path: Path) -> None:
    """Writes a ticket of this library with a changed last byte."""
    own_ticket(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def own_by_torch(path: Path) -> None:
    """Writes the tensors of a ticket by ``torch.save``."""
    own_ticket(path)
    torch.save({name: value.clone() for name, value in untrusted.load_tensors(path)[0].items()}, path)


def adam(state: State) -> dict[str, Any]:
    """The state of Adam after one step."""
    network = Network()
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.rand(2, 1, 4, 4)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def torch_pruned() -> State:
    """A state_dict of ``torch.nn.utils.prune``, with ``weight_orig`` and ``weight_mask``."""
    pruned_network = network(dense())
    for name, value in mask().items():
        prune.custom_from_mask(pruned_network.get_submodule(name.partition(".")[0]), "weight", value)
    return pruned_network.state_dict()


def weight_norm(new: bool) -> State:
    """A state_dict with weight norm, as a parametrization if ``new``."""
    network = Network()
    with warnings.catch_warnings(action="ignore"):
        (parametrizations.weight_norm if new else nn.utils.weight_norm)(network.hidden)
    return network.state_dict()


def spectral_norm() -> State:
    """A state_dict with spectral norm."""
    network = Network()
    with warnings.catch_warnings(action="ignore"):
        nn.utils.spectral_norm(network.hidden)
    return network.state_dict()


def quantised() -> State:
    """A state_dict with one quantised tensor."""
    with warnings.catch_warnings(action="ignore"):
        return dense() | {"hidden.weight": torch.quantize_per_tensor(dense()["hidden.weight"], 0.1, 0, torch.qint8)}


def averaged() -> State:
    """A state_dict of ``AveragedModel``."""
    return torch.optim.swa_utils.AveragedModel(network(pruned())).state_dict()


def pruned_with(**changed: Any) -> State:
    """:func:`pruned` with other values, by names with two underscores for each dot; None removes a value."""
    return _changed(pruned(), changed)


def cast(dtype: torch.dtype, state: State) -> State:
    """``state`` with its floating-point tensors in ``dtype``."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}


class Code:
    """An object whose pickle runs code when it is read."""

    def __reduce__(self) -> Any:
        return print, ("code of the file was run",)


def mask_with(**changed: Any) -> Write:
    """Writes :func:`mask` with other values, named as in :func:`pruned_with`."""
    return saved(lambda: _changed(mask(), changed))


def _changed(state: State, changed: dict[str, Any]) -> State:
    given = {name.replace("__", "."): value for name, value in changed.items()}
    return {name: value for name, value in (state | given).items() if value is not None}


def network(state: State) -> Network:
    """The network with the values of ``state``."""
    network = Network()
    network.load_state_dict(state)
    return network


def csc(value: Tensor) -> Tensor:
    """``value`` in the sparse CSC layout."""
    with warnings.catch_warnings(action="ignore"):  # that the layout is in beta
        return value.to_sparse_csc()


def csr(value: Tensor) -> Tensor:
    """``value`` in the sparse CSR layout."""
    with warnings.catch_warnings(action="ignore"):  # that the layout is in beta
        return value.to_sparse_csr()
