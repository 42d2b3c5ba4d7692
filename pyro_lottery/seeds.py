"""One seed, many independent streams: what one stage draws never shifts what another draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *path: str | int) -> int:
    """A 63-bit seed for the stream named by ``path``, from BLAKE2 of the run's seed and the path.

    >>> derive(0, "noise", 1) == derive(0, "noise", 1) != derive(0, "noise", 2)
    True
    """
    text = "/".join(map(str, (seed, *path))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(device: torch.device | str, seed: int, *path: str | int) -> torch.Generator:
    """A generator on ``device`` for the stream named by ``path``."""
    return torch.Generator(device).manual_seed(derive(seed, *path))


@contextmanager
def stream(device: torch.device | str, seed: int, *path: str | int) -> Iterator[None]:
    """Torch's global generators follow the stream named by ``path`` inside, and are as before outside.

    Pyro draws its samples from the global generators, so this is how weight noise gets its own stream.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        # not torch.manual_seed, which would seed every other GPU of the machine too
        torch.default_generator.manual_seed(derive(seed, *path))
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(derive(seed, *path))
        yield
