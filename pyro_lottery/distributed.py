"""Several processes that train one network: what part each has, and what they agree on.

``Alone`` is the usual case, in which every method is what one process does anyway. ``Several`` are the ranks of a process
group that Lightning Fabric starts, or finds where torchrun or SLURM has started it; with one device nothing of it is imported.
Gradients are averaged after the backward pass: all weights of a guide are one vector, whose gradient is complete at its end,
so that there is nothing to overlap with.
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


class Alone:
    """One process by itself."""

    rank = 0
    world = 1
    least = 2
    """Fewest images in a batch: BatchNorm cannot normalise one, and every rank needs two."""
    parallel = "data"
    device: torch.device | None = None
    """Where this rank computes; None: wherever ``--device`` says."""

    @property
    def path(self) -> tuple[int, ...]:
        """What tells this rank's random streams from those of the first rank, which are those of one process."""
        return (self.rank,) if self.rank else ()

    def share(self, batch: Tensor) -> Tensor:
        """This rank's part of a batch that all ranks have."""
        return batch

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over ranks, with the same bits on all."""

    def total(self, value: Tensor) -> Tensor:
        """The sum over ranks, on the CPU."""
        return value.cpu()

    def collect_(self, value: Tensor) -> Tensor:
        """The sum over ranks, on the CPU; from now on the first rank holds it, and the others 0."""
        return value.cpu()

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on some rank."""
        return flag

    def first(self, work: Callable[[], T]) -> T:
        """Do ``work`` on the first rank alone; its value, or what it raises, on all."""
        return work()

    def every(self, work: Callable[[], T]) -> T:
        """Do ``work`` on every rank; what it raises on one is raised on all, or the others would wait for ever."""
        return work()

    def gather(self, value: Tensor) -> list[Tensor]:
        """Every rank's tensor on the CPU, in their order."""
        return [value.cpu()]

    def agree(self, what: str, checksum: Callable[[], int]) -> None:
        """Raise ``Failed`` unless all ranks have the same ``checksum`` of ``what``; one process computes none."""


ALONE = Alone()


class Several(Alone):
    """The ranks of a process group. Every method must be called by all of them."""

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
        for several in by_type.values():  # in one message each
            flat = torch.cat([t.reshape(-1) for t in several])
            torch.distributed.all_reduce(flat)  # Fabric's has a barrier before it, at which a GPU would be waited for
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

    def first(self, work: Callable[[], T]) -> T:
        outcome = _outcome(work) if self.rank == 0 else (None, None)
        value, failure = self.fabric.broadcast(outcome)
        if failure is not None:
            raise failure
        return value

    def every(self, work: Callable[[], T]) -> T:
        value, failure = _outcome(work)
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

    def agree(self, what: str, checksum: Callable[[], int]) -> None:
        every = [int(found) for found in self.gather(torch.tensor(checksum()))]
        if len(set(every)) > 1:
            raise Failed(f"{what} differs between ranks (checksums {every}); please report this with the command")


def _outcome(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # or the other ranks would wait for ever
        return None, error


_joined: Alone = ALONE


@cache
def start(accelerator: str, devices: int, num_nodes: int, strategy: str, parallel: str) -> Several:
    """Start the ranks, each of which runs the process's command line, or join those that torchrun or SLURM started.

    ``accelerator`` is ``cpu`` (gloo) or ``cuda`` (nccl). Raises ``UserError`` for devices that are not there.
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
    """End this process's part in its group, if it has one, and the group's threads: on every way out of the process.

    A thread of gloo that frees the tensors of the last collective waits for Python's lock. Once the interpreter ends it
    never gets it: Python ends the thread instead, within a C++ destructor, and that aborts the process ("terminate called
    without an active exception") where bad input is found right after a collective.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the first rank, or alone: of several ranks one speaks."""
    return _joined.rank == 0


def check_alone() -> None:
    """Raise ``UserError`` where torchrun has started several processes, each of which would train by itself."""
    if (world := os.environ.get("WORLD_SIZE", "1")) not in ("", "0", "1"):
        raise UserError(
            f"{world} processes were started together; say --devices, and --num-nodes, to train one network"
        )
