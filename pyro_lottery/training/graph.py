"""``--graph``: a training step that is recorded once and then replayed, so that a GPU does not wait for Python.

A step of a small network has hundreds of kernels, and Python takes longer to launch them than the GPU to run them. A CUDA graph
launches them all at once. What is recorded is the step as it is, with guide, priors, masks and handlers; nothing of it is known here.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
"""Greatest difference between a replayed and an ordinary step, relative to the step, of parameters, of moments, of buffers and of each
sum. Where a GPU sums in any order, the last bits differ, and Adam's first steps magnify that where a gradient is nearly 0."""

Take = Callable[[Any, Tensor, float, Tensor], None]
"""Takes one step, given x, y, the KL factor and the sums to add to."""
Record = Callable[[Callable[[], None], Adam], Callable[[], None]]
"""Returns a function that repeats ``work``; ``work`` has been done exactly once by then."""
Groups = Sequence[Sequence[Tensor]]
State = Callable[[], Groups]
"""Returns the tensors that a step changes, beside the sums, in groups that are compared as wholes."""


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
    beside the sums. ``facts`` returns what a step depends on beside tensors; when that changes, when tensors are replaced, or with
    another KL factor, a step is recorded anew. Where recording fails, or a replay is not the step, a warning says so once and all
    steps are taken as they are.
    """

    def __init__(self, take: Take, optimizer: Adam, state: State, facts: Callable[[], Any], record: Record):
        self.take, self.optimizer, self.state, self.facts, self.record = take, optimizer, state, facts, record
        self._seen: Counter[Any] = Counter()
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
        self._seen[shapes] += 1
        known = (shapes, kl_factor, self.facts(), tuple(t.data_ptr() for group in self.state() for t in group))
        if known == self._known:
            assert self._replay is not None
            for own, new in zip(self._inputs, given, strict=True):
                own.copy_(new)
            self._replay()
            return _copy([sums], self._inputs[-1:])
        others = max((count for other, count in self._seen.items() if other != shapes), default=0)
        if self._seen[shapes] <= max(WARM_UP, others):
            return self.take(x, y, kl_factor, sums)
        self._replay, self._known = None, known  # the memory of the old record is free for the new one
        return self._begin(x, y, kl_factor, sums)

    def _begin(self, x: Any, y: Tensor, kl_factor: float, sums: Tensor) -> None:
        """Take one step as it is, go back, and take it again by recording it; compare both."""
        device, groups = sums.device, [*self.state(), [sums]]
        tensors = [tensor for group in groups for tensor in group]
        before, began, after, ended = _copies(groups), seeds.state_of(device), None, None
        try:
            with _no_waits(device):  # a wait within a recording would spoil the generator too
                self.take(x, y, kl_factor, sums)
            after, ended = _copies(groups), seeds.state_of(device)
            _copy(tensors, [tensor for group in before for tensor in group])
            seeds.set_state(device, began)
            own_x = trees.map_tensors(lambda t: t.clone(memory_format=torch.preserve_format), x)
            own_y, own_sums = y.clone(), sums.clone()
            self._inputs = [*trees.tensors(own_x), own_y, own_sums]
            self._replay = self.record(lambda: self.take(own_x, own_y, kl_factor, own_sums), self.optimizer)
            sums.copy_(own_sums)
            same = torch.equal(seeds.state_of(device), ended) and _agree(before, after, groups)
            why = "a replay of this step does not do what the step does: some code in it acts differently at each call"
        except UserError:
            raise
        except Exception as error:
            same, why = False, f"this step cannot be recorded ({one_line(error)})"
        if same:
            return
        self._failed, self._replay, self._inputs = True, None, []
        _copy(tensors, [tensor for group in after or before for tensor in group])
        seeds.set_state(device, began if ended is None else ended)
        warnings.warn(f"--graph: {why}; all steps are taken without it, which is slower", stacklevel=3)
        if after is None:
            self.take(x, y, kl_factor, sums)


@contextmanager
def _no_waits(device: torch.device) -> Iterator[None]:
    """Let an operation for which the host would wait for a GPU raise ``RuntimeError`` within this context."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def cuda_graph(work: Callable[[], None], optimizer: Adam) -> Callable[[], None]:
    """Record ``work`` as a CUDA graph and launch it once; returns the function that launches it again."""
    device = optimizer.param_groups[0]["params"][0].device
    with torch.cuda.device(device):  # a graph is of the current one
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        for group in optimizer.param_groups:
            group["capturable"] = True  # torch asks for it within a capture, and warns of it outside
        try:
            with torch.cuda.graph(
                graph, capture_error_mode="thread_local"
            ):  # a loader's threads may use the GPU meanwhile
                work()
        except BaseException:  # torch leaves the generator, and the stream, as they were within the capture
            torch.cuda.set_stream(stream)
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        finally:
            for group in optimizer.param_groups:
                group["capturable"] = False
        graph.replay()
    return graph.replay


def _copies(groups: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [[tensor.detach().clone() for tensor in group] for group in groups]


@torch.no_grad()
def _copy(into: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def _agree(before: Groups, step: Groups, replay: Groups) -> bool:
    """Whether two steps from the same state are the same but for rounding; the last group is the sums."""

    def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
        pairs = [(a, b) for a, b in zip(one, other, strict=True) if a.is_floating_point()]
        # Some buffers hold infinite numbers, and the tally is NaN for a likelihood without a mean.
        each = [torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b).double().norm() for a, b in pairs]
        return torch.stack(each).norm() if each else torch.zeros(())

    def single(groups: Groups) -> list[Sequence[Tensor]]:
        return [*groups[:-1], *([value] for value in groups[-1][0])]

    both = zip(single(before), single(step), single(replay), strict=True)
    # A distance of 0 agrees with any step, even one to NaN.
    return all(bool((far := distance(b, c)) == 0) or bool(far <= AGREE * distance(a, b)) for a, b, c in both)
