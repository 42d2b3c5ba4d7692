"""``--graph``: a training step that is recorded once and then replayed, so that a GPU does not wait for Python.

A step of a small network has hundreds of kernels, and Python takes longer to launch them than the GPU to run them. A CUDA graph
launches them all at once. What is recorded is the step as it is, with guide, priors, masks and handlers; nothing of it is known here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from pyro_lottery import seeds, trees
from pyro_lottery.distributed import Ranks
from pyro_lottery.errors import UserError, one_line, unknown

CHOICES = ("auto", "on", "off")
WARM_UP = 3
"""Steps of one shape that are taken as they are before one is recorded."""
AGREE = 0.05
"""Greatest difference between a replayed and an ordinary step, relative to the step. Where a GPU sums in any order, the last
bits differ, and Adam's first steps double the difference; a step that Python changes from one call to the next differs in all.
"""

Take = Callable[[Any, Tensor, float, Tensor], None]
"""Takes one step, given x, y, the KL factor and the sums to add to."""
Record = Callable[[Callable[[], None], Adam], Callable[[], None]]
"""Records the work that a function does, which then has been done once, and returns a function that does it again."""


def recorder(choice: str, device: torch.device, ranks: Ranks) -> Record | None:
    """What records the steps of ``--graph choice``, or None if all are taken as they are: ``auto`` records on a GPU that trains alone.

    Raises ``UserError`` for another choice, and for ``on`` where steps cannot be recorded.
    """
    if choice not in CHOICES:
        raise unknown("--graph", choice, CHOICES)
    can = device.type == "cuda" and ranks.world == 1
    if choice == "on" and not can:
        why = "needs a GPU" if device.type != "cuda" else "records the steps of one device, and several train here"
        raise UserError(f"--graph on {why}; use auto or off")
    return cuda_graph if can and choice != "off" else None


class Steps:
    """Takes training steps: the first ones of a shape as they are, then one that is recorded, and then replays of it.

    Steps of other shapes, such as an epoch's rest, are taken as they are. ``state`` returns all tensors that a step changes,
    beside the sums: parameters, buffers and the optimizer's state. Where recording fails, or a replay is not the step, a
    warning says so once and all steps are taken as they are.
    """

    def __init__(self, take: Take, optimizer: Adam, state: Callable[[], Iterable[Tensor]], record: Record):
        self.take, self.optimizer, self.state, self.record = take, optimizer, state, record
        self.replayed = 0
        """Steps that were replayed."""
        self._seen: dict[Any, int] = {}
        self._known: Any = None
        self._inputs: list[Tensor] = []
        self._replay: Callable[[], None] | None = None
        self._failed = False

    def __call__(self, x: Any, y: Tensor, kl_factor: float, sums: Tensor) -> None:
        """Take one step on one batch."""
        if self._failed:
            return self.take(x, y, kl_factor, sums)
        given = [*trees.tensors(x), y, sums]
        shapes = tuple((t.shape, t.dtype, t.stride()) for t in given)
        known = (shapes, kl_factor, tuple(t.data_ptr() for t in self.state()))
        if known == self._known and self._replay is not None:
            for own, new in zip(self._inputs, given, strict=True):
                own.copy_(new)
            self._replay()
            sums.copy_(self._inputs[-1])
            self.replayed += 1
            return None
        seen = self._seen[shapes] = self._seen.get(shapes, 0) + 1
        if seen <= WARM_UP or seen < max(self._seen.values()):
            return self.take(x, y, kl_factor, sums)
        self._replay, self._known = None, known  # the memory of the old record is free for the new one
        return self._begin(x, y, kl_factor, sums)

    def _begin(self, x: Any, y: Tensor, kl_factor: float, sums: Tensor) -> None:
        """Take one step as it is, go back, and take it again by recording it; compare both."""
        device, tensors = sums.device, [*self.state(), sums]
        before, began = [t.detach().clone() for t in tensors], seeds.state_of(device)
        self.take(x, y, kl_factor, sums)
        after, ended = [t.detach().clone() for t in tensors], seeds.state_of(device)
        _copy(tensors, before)
        seeds.set_state(device, began)
        own_x = trees.map_tensors(lambda t: t.clone(memory_format=torch.preserve_format), x)
        own_y, own_sums = y.clone(), sums.clone()
        try:
            self._inputs = [*trees.tensors(own_x), own_y, own_sums]
            self._replay = self.record(lambda: self.take(own_x, own_y, kl_factor, own_sums), self.optimizer)
            sums.copy_(own_sums)
            same = torch.equal(seeds.state_of(device), ended) and _agree(before, after, tensors)
            why = "a replay of this step does not do what the step does: some code in it acts differently at each call"
        except Exception as error:
            same, why = False, f"this step cannot be recorded ({one_line(error)})"
        if not same:
            _copy(tensors, after)
            seeds.set_state(device, ended)
            self._give_up(why)

    def _give_up(self, why: str) -> None:
        self._failed, self._replay, self._inputs = True, None, []
        warnings.warn(f"--graph: {why}; all steps are taken without it, which is slower", stacklevel=4)


def cuda_graph(work: Callable[[], None], optimizer: Adam) -> Callable[[], None]:
    """Record ``work`` as a CUDA graph and launch it once; returns the function that launches it again."""
    graph = torch.cuda.CUDAGraph()
    for group in optimizer.param_groups:
        group["capturable"] = True  # torch asks for it within a capture, and warns of it outside
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's threads may use the GPU meanwhile
            work()
    finally:
        for group in optimizer.param_groups:
            group["capturable"] = False
    graph.replay()
    return graph.replay


@torch.no_grad()
def _copy(into: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(value)


def _agree(before: list[Tensor], step: list[Tensor], replay: list[Tensor]) -> bool:
    """Whether two steps from the same state are the same but for rounding."""

    def norm(these: Iterable[Tensor], others: Iterable[Tensor]) -> Tensor:
        pairs = [(a, b) for a, b in zip(these, others, strict=True) if a.is_floating_point()]
        each = [torch.where(a == b, 0.0, a - b).double().norm() for a, b in pairs]  # some buffers hold infinite numbers
        return torch.stack(each).norm()

    return bool(norm(step, replay) <= AGREE * norm(step, before))
