"""Independent random streams from one seed: numbers that one stage draws never shift those of another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lottery.errors import UserError, one_line
from pyro_lottery.threads import TURN

STREAMS = "full keys"
"""The method that makes the random streams, as written to ``config.json``. Early runs, with 32 bits each, lack the entry."""
_WORDS = slice(24, 24 + 624 * 8)
"""Bytes of a CPU generator's state that hold the 624 words of its Mersenne Twister, 8 bytes each."""


def derive(seed: int, *path: str | int) -> int:
    """Return a 63-bit seed for the random stream named by ``path``: the BLAKE2 hash of ``seed`` and ``path``.

    >>> derive(0, "noise", 1) == derive(0, "noise", 1) != derive(0, "noise", 2)
    True
    """
    return int.from_bytes(hashlib.blake2b(_key(seed, *path), digest_size=8).digest(), "big") >> 1


def generator(device: torch.device | str, seed: int, *path: str | int) -> torch.Generator:
    """Return a generator on ``device`` for the random stream named by ``path``.

    On a CPU, ``manual_seed`` keeps only the low 32 bits of a seed, so among 77,000 random streams two are equal with probability
    1/2. Therefore all 624 words of the state are filled from SHAKE-256 of the seed and the path. A GPU's generator (Philox)
    keeps all bits of a seed.
    """
    made = torch.Generator(device).manual_seed(derive(seed, *path))
    if made.device.type == "cpu":
        made.set_state(_full_state(made.get_state(), _key(seed, *path)))
    return made


def _full_state(state: Tensor, key: bytes) -> Tensor:
    words = np.frombuffer(hashlib.shake_256(key).digest(624 * 4), "<u4").astype(np.int64)
    state[_WORDS] = torch.from_numpy(words).view(torch.uint8)
    return state


def _key(seed: int, *path: str | int) -> bytes:
    return "/".join(map(str, (seed, *path))).encode()


@contextmanager
def rng(device: torch.device | str, seed: int, *path: str | int) -> Iterator[None]:
    """Let torch's global generators follow the random stream named by ``path`` within this context, and restore them after it.

    Pyro samples from the global generators; this context gives the noise of the weights a random stream of its own.
    """
    with Rng(device, seed, *path):
        yield


@contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Choose a GPU's algorithms within this context: deterministic ones, or those that cuDNN measures to be fastest.

    Deterministic ones give the same bits every time on one GPU, and may be slower. Raises ``UserError`` if an operation has no
    deterministic algorithm.
    """
    if not deterministic:
        measured, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = measured
        return
    filled: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        filled.fill_uninitialized_memory,
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses cuBLAS without it
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    filled.fill_uninitialized_memory = False  # a pass over every new tensor, which all operations here write in full
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UserError(f"--deterministic: {one_line(error)}") from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark, filled.fill_uninitialized_memory = before[1:]


def state_of(device: torch.device) -> Tensor:
    """Return the state of torch's global generator on ``device``."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_state(device: torch.device, state: Tensor) -> None:
    """Set torch's global generator on ``device`` to ``state``."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


class Rng:
    """An :func:`rng` that can be entered several times; each time it continues where it was left."""

    def __init__(self, device: torch.device | str, seed: int, *path: str | int):
        self.device = torch.device(device)
        self._states = [generator(d, seed, *path).get_state() for d in self._devices]

    @property
    def _devices(self) -> list[torch.device]:
        return [torch.device("cpu"), *([self.device] if self.device.type == "cuda" else [])]

    def _now(self) -> list[Tensor]:
        return [state_of(device) for device in self._devices]

    def _swap(self) -> None:
        before = self._now()
        for device, state in zip(self._devices, self._states, strict=True):
            set_state(device, state)
        self._states = before

    def __enter__(self) -> Rng:
        with TURN:  # another thread may be predicting with the global generators
            self._swap()
        return self

    def __exit__(self, *exception: object) -> None:
        with TURN:
            self._swap()


class Replay(Rng):
    """An :class:`Rng` that starts at the state of the global generators and can repeat its own numbers.

    The first :meth:`mark` of a number records the state; later marks of the same number restore it.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._states = self._now()
        self._marks: dict[int, list[Tensor]] = {0: self._now()}

    def mark(self, number: int) -> None:
        """Record the current state under ``number``, or restore it if ``number`` is known. Call it within this context."""
        if number not in self._marks:
            self._marks[number] = self._now()
            return
        for device, state in zip(self._devices, self._marks[number], strict=True):
            set_state(device, state)

    def keep(self) -> None:
        """Set the global generators to this state. Call it outside this context."""
        self._swap()
