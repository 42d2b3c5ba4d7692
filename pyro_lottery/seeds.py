"""One seed, many independent streams: what one stage draws never shifts what another draws."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pyro_lottery.errors import UserError, one_line
from pyro_lottery.threads import TURN

STREAMS = "full keys"
"""How streams are made, for ``config.json``; runs of earlier versions, of 32 bits a stream, do not say."""
_WORDS = slice(24, 24 + 624 * 8)
"""Of a CPU generator's state in bytes: the 624 words of its Mersenne Twister, 8 bytes each."""


def derive(seed: int, *path: str | int) -> int:
    """A 63-bit seed for the stream named by ``path``, from BLAKE2 of the run's seed and the path.

    >>> derive(0, "noise", 1) == derive(0, "noise", 1) != derive(0, "noise", 2)
    True
    """
    return int.from_bytes(hashlib.blake2b(_key(seed, *path), digest_size=8).digest(), "big") >> 1


def generator(device: torch.device | str, seed: int, *path: str | int) -> torch.Generator:
    """A generator on ``device`` for the stream named by ``path``.

    ``manual_seed`` keeps only the low 32 bits of a seed on a processor, so that 77,000 streams have an even chance that
    two are equal; here all 624 words of the state come from SHAKE-256 of the seed and the path. A GPU's generator
    (Philox) keeps a seed whole.
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
def stream(device: torch.device | str, seed: int, *path: str | int) -> Iterator[None]:
    """Torch's global generators follow the stream named by ``path`` inside, and are as before outside.

    Pyro draws its samples from the global generators, so this is how weight noise gets its own stream.
    """
    with Stream(device, seed, *path):
        yield


@contextmanager
def deterministic(on: bool = True) -> Iterator[None]:
    """Only algorithms that give the same bits every time on one GPU, inside; they may be slower.

    Raises ``UserError`` for an operation that has none.
    """
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS is refused
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UserError(f"--deterministic: {one_line(error)}") from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


class Stream:
    """A :func:`stream` that can be left and entered again, and then goes on where it was."""

    def __init__(self, device: torch.device | str, seed: int, *path: str | int):
        self.device = torch.device(device)
        self._states = [generator(d, seed, *path).get_state() for d in self._devices]

    @property
    def _devices(self) -> list[torch.device]:
        return [torch.device("cpu"), *([self.device] if self.device.type == "cuda" else [])]

    def _swap(self) -> None:
        for place, device in enumerate(self._devices):
            on_gpu = device.type == "cuda"
            state = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
            if on_gpu:
                torch.cuda.set_rng_state(self._states[place], device)
            else:
                torch.set_rng_state(self._states[place])
            self._states[place] = state

    def __enter__(self) -> Stream:
        with TURN:  # not while another thread predicts
            self._swap()
        return self

    def __exit__(self, *exception: object) -> None:
        with TURN:
            self._swap()


class Replay(Stream):
    """A :class:`Stream` that begins where the global generators are, and whose :meth:`mark` brings back, whenever one is
    passed again, the state in which it was passed first.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._states = self._now()
        self._marks: dict[int, list[Tensor]] = {0: self._now()}

    def _now(self) -> list[Tensor]:
        return [torch.get_rng_state() if d.type == "cpu" else torch.cuda.get_rng_state(d) for d in self._devices]

    def mark(self, number: int) -> None:
        """Within the stream: go back to where ``number`` was first passed, or note that it is passed here."""
        if number not in self._marks:
            self._marks[number] = self._now()
            return
        for state, device in zip(self._marks[number], self._devices, strict=True):
            if device.type == "cuda":
                torch.cuda.set_rng_state(state, device)
            else:
                torch.set_rng_state(state)

    def keep(self) -> None:
        """Outside: leave the global generators where the stream is."""
        self._swap()
