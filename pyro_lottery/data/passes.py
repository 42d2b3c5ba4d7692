"""Passes over a loader whose random numbers follow a seed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from pyro_lottery import seeds
from pyro_lottery.errors import UserError

_END = object()


class Shuffled:
    """One pass over a loader with random numbers that follow a seed.

    The seed determines the global generators of torch, numpy and Python while a batch is made, and the generators of the
    loader and its sampler; workers of a DataLoader are seeded from these. All generators are restored afterwards. A sampler's
    ``set_epoch`` is called with ``epoch``. Other generators, such as those of the user's data set, are not seeded.
    """

    def __init__(self, loader: Any, seed: int, *path: str | int, epoch: int = 0):
        self._loader, self._epoch = loader, epoch
        self._torch = seeds.Rng("cpu", seed, "loader", *path)
        number = seeds.derive(seed, "loader", *path)
        self._python: Any = random.Random(number).getstate()
        self._numpy: Any = np.random.RandomState(number % 2**32).get_state()
        places = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
        places.append(getattr(places[-1], "sampler", None))
        self._samplers = list({id(place): place for place in places if place is not None}.values())
        owned = {id(g): g for p in places if isinstance(g := getattr(p, "generator", None), torch.Generator)}
        self._own = [(g, g.get_state(), seeds.derive(seed, "loader", *path)) for g in owned.values()]
        self._iterator: Any = None

    def __enter__(self) -> Shuffled:
        if getattr(self._loader, "persistent_workers", False):
            self._loader._iterator = None  # persistent workers would continue the random numbers of the previous pass
        for generator, _, number in self._own:
            generator.manual_seed(number)
        for sampler in self._samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self._epoch)
        self._drawing(lambda: setattr(self, "_iterator", iter(self._loader)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._iterator = None  # ends a DataLoader's workers
        for generator, state, _ in self._own:
            generator.set_state(state)

    def next(self) -> Any:
        """Return the next batch as the loader gives it, or ``_END`` after the last one."""
        return self._drawing(lambda: next(self._iterator, _END))

    def _drawing(self, work: Any) -> Any:
        with self._torch:
            self._swap()
            try:
                return work()
            finally:
                self._swap()

    def _swap(self) -> None:
        python, numbers = random.getstate(), np.random.get_state()
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        self._python, self._numpy = python, numbers


def present(batch: Any, step: int, steps: int) -> Any:
    """Return ``batch``. Raises ``UserError`` if the pass ended before its ``steps`` batches."""
    if batch is _END:
        raise UserError(
            f"the loader gave {step} of {steps} batches in this pass; it must give as many as its length says in every pass"
        )
    return batch


def check_end(batches: Shuffled, steps: int) -> None:
    """Raise ``UserError`` if the loader gives more than ``steps`` batches."""
    if batches.next() is not _END:
        raise UserError(f"the loader gave more than the {steps} batches that its length says; correct its length")
