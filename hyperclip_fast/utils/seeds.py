"""Seeds and hashes that are the same on every machine, and chance that follows from them."""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy
import torch


def stable_hash(text: str) -> int:
    """A 64-bit hash that is the same everywhere."""
    return int.from_bytes(hashlib.md5(text.encode(), usedforsecurity=False).digest()[:8], "big")


def step_seed(seed: int, step: int) -> int:
    """The seed of all chance in a step."""
    return seed * 1_000_003 + step


def hash_seed(*parts: object) -> int:
    """A 63-bit seed made of anything that prints."""
    return stable_hash(repr(parts)) >> 1


def generator_of(*parts: object) -> torch.Generator:
    """Chance of its own, on the CPU, that follows from anything that prints."""
    return torch.Generator().manual_seed(hash_seed(*parts))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Chance inside, of torch, numpy and Python, follows from `seed`; outside it goes on as if nothing had been."""
    before = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        numpy.random.set_state(before[1])
        random.setstate(before[2])
