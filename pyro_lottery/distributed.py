"""Ranks: several processes that train one network together.

``Ranks`` is the interface, and implements it for the usual case of one process. ``Several`` is a process group that
Lightning Fabric starts, or joins if torchrun or SLURM started it; with one device, Fabric is not imported. Gradients are
averaged after the backward pass: all weights of a guide are one vector, whose gradient is complete only at the end, so
averaging cannot overlap with the backward pass.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_lottery.errors import Failed, UserError, one_line

T = TypeVar("T")
PARALLEL = ("data", "samples")
STRATEGIES = ("ddp",)


class Ranks:
    """The ranks that train one network; here a single process, so that every collective operation returns its own value."""

    rank = 0
    world = 1
    least = 2
    """Smallest allowed batch size: every rank needs two examples, since BatchNorm cannot normalise one."""
    parallel = "data"
    device: torch.device | None = None
    """Device of this rank, or None for the one that ``--device`` names."""

    @property
    def path(self) -> tuple[int, ...]:
        """Path that makes this rank's random streams its own; it is empty on rank 0, whose random streams are those of one process."""
        return (self.rank,) if self.rank else ()

    def share(self, batch: Tensor) -> Tensor:
        """Return this rank's part of a batch that all ranks hold."""
        return batch

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over ranks, with the same bits on all ranks."""

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over ranks, on the CPU."""
        return value.cpu()

    def collect_(self, value: Tensor) -> Tensor:
        """Return the sum over ranks, on the CPU, and set ``value`` to it on rank 0 and to 0 on the others.

        This lets a running total be collected repeatedly without counting any part twice.
        """
        return value.cpu()

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on at least one rank."""
        return flag

    def first(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call ``work`` on rank 0 only; all ranks return its value or raise its exception."""
        return work(*arguments)

    def every(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call ``work`` on every rank; if it raises on one, all ranks raise, so that none waits for the others for ever."""
        return work(*arguments)

    def gather(self, value: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, in the order of the ranks, on the CPU."""
        return [value.cpu()]

    def agree(self, what: str, checksum: Callable[..., int], *arguments: Any) -> None:
        """Raise ``Failed`` unless ``checksum(*arguments)`` is equal on all ranks; a single process does not call it."""


ALONE = Ranks()


class Several(Ranks):
    """The ranks of a process group. All ranks must call each method."""

    def __init__(self, fabric: Any, parallel: str):
        self.fabric, self.rank, self.world = fabric, fabric.global_rank, fabric.world_size
        self.device, self.parallel = fabric.device, parallel
        self.least = 2 * self.world if parallel == "data" else 2

    def share(self, batch: Tensor) -> Tensor:
        return batch.tensor_split(self.world)[self.rank] if self.parallel == "data" else batch

    @torch.no_grad()
    def mean_(self, tensors: Iterable[Tensor]) -> None:
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for several in by_type.values():  # one message per dtype
            flat = torch.cat([t.reshape(-1) for t in several])
            torch.distributed.all_reduce(flat)  # Fabric's version waits for the GPU at a barrier first
            flat /= self.world
            for tensor, part in zip(several, flat.split([t.numel() for t in several]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def total(self, value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total.cpu()

    def collect_(self, value: Tensor) -> Tensor:
        total = self.total(value)
        value.copy_(total * (self.rank == 0))
        return total

    def any(self, flag: bool) -> bool:
        return bool(self.total(torch.tensor(float(flag), device=self.device)))

    def first(self, work: Callable[..., T], *arguments: Any) -> T:
        outcome = _outcome(work, arguments) if self.rank == 0 else (None, None)
        value, failure = self.fabric.broadcast(outcome)
        if failure is not None:
            raise failure
        return value

    def every(self, work: Callable[..., T], *arguments: Any) -> T:
        value, failure = _outcome(work, arguments)
        failures: list[Exception | None] = [None] * self.world
        torch.distributed.all_gather_object(failures, failure)
        for rank, found in enumerate(failures):
            if isinstance(found, UserError):
                raise UserError(f"{found} (on rank {rank})" if rank else str(found))
            if found is not None:
                raise found
        return value

    def gather(self, value: Tensor) -> list[Tensor]:
        every = torch.zeros((self.world, *value.shape), dtype=value.dtype, device=self.device)
        every[self.rank] = value
        return list(self.total(every).unbind(0))

    def agree(self, what: str, checksum: Callable[..., int], *arguments: Any) -> None:
        every = [int(found) for found in self.gather(torch.tensor(checksum(*arguments)))]
        if len(set(every)) > 1:
            raise Failed(f"{what} differs between ranks (checksums {every}); please report this with the command")


def _outcome(work: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Exception | None]:
    try:
        return work(*arguments), None
    except Exception as error:  # sent to the other ranks, which would otherwise wait for ever
        return None, error


_joined: Ranks = ALONE


@cache
def start(accelerator: str, devices: int, num_nodes: int, strategy: str, parallel: str) -> Several:
    """Start the ranks, each with the command line of this process, or join those that torchrun or SLURM started.

    ``accelerator`` is ``cpu`` (gloo) or ``cuda`` (nccl). Raises ``UserError`` for devices that this machine does not have.
    """
    import logging

    from lightning_fabric import Fabric
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    global _joined
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    try:
        fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy)
        fabric.launch()
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        what = " ".join(str(error).split()) or one_line(error)
        raise UserError(
            f"--devices {devices} --num-nodes {num_nodes} cannot be started on {accelerator} ({what})"
        ) from error
    _joined = Several(fabric, parallel)
    atexit.register(leave)
    return _joined


def leave() -> None:
    """Leave the process group, if there is one, and end its threads. This must run on every exit of the process.

    A gloo thread that frees the tensors of the last collective waits for Python's lock. If the interpreter is ending, Python
    ends that thread within a C++ destructor instead, which aborts the process ("terminate called without an active
    exception"). This happened when bad input was found right after a collective.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_first() -> bool:
    """Return whether this process is rank 0 or the only one; only that process prints."""
    return _joined.rank == 0


def check_alone() -> None:
    """Raise ``UserError`` if torchrun started several processes, since each would train a network of its own."""
    if (world := os.environ.get("WORLD_SIZE", "1")) not in ("", "0", "1"):
        raise UserError(f"{world} processes were started together; give --devices and --num-nodes to train one network")
