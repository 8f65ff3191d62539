"""The global random generators, Python's and numpy's: the state they are in, and whether somebody chose it."""

from __future__ import annotations

import hashlib
import importlib
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

UNSEEDED = "unseeded"
ANY = ""
"""In place of a state that doesn't matter: the generator is seeded before any number is drawn."""


@dataclass(frozen=True, slots=True)
class Generator:
    """A global random generator: Python's or numpy's."""

    seeded: bool
    state: Any

    def is_at(self, other: Generator) -> bool:
        """Are both in the same state?"""
        return all(
            part is now or (part.tobytes() == now.tobytes() if hasattr(part, "tobytes") else part == now)
            for part, now in zip(self.state, other.state, strict=True)
        )

    def digest(self) -> str:
        """Of the state."""
        state = [getattr(part, "tobytes", lambda part=part: part)() for part in self.state]
        return hashlib.blake2b(repr(state).encode(), digest_size=16).hexdigest()

    def before(self) -> str:
        """The state as an input: one that nobody seeded is none."""
        return self.digest() if self.seeded else UNSEEDED


_seeded = False
_restored: set[str] = set()
"""Generators that are in a state of somebody's choice because a restored cell left them in it."""


def generators() -> dict[str, Generator]:
    """The generators that are loaded, as they stand."""
    found = {"random": Generator(_seeded, random.getstate())}
    numpy_random: Any = sys.modules.get("numpy.random")
    if numpy_random is not None:
        bits = numpy_random.mtrand._rand._bit_generator
        # numpy forgets the entropy it began with when it is seeded the legacy way.
        seeded = getattr(bits, "_seed_seq", None) is None or "numpy.random" in _restored
        found["numpy.random"] = Generator(seeded, numpy_random.get_state())
    return found


def set_generator(name: str, state: Any) -> None:
    """Put a generator into a state that `generators` gave."""
    if name == "random":
        random.setstate(state)
    else:
        numpy_random: Any = importlib.import_module(name)
        numpy_random.set_state(state)
        _restored.add(name)


@contextmanager
def seeds_noticed() -> Iterator[None]:
    """Notice when somebody seeds Python's generator: nothing in its state tells."""
    before = random.seed, random.setstate

    def noticing(function: Callable[..., None]) -> Callable[..., None]:
        def seed(*args: Any, **kwargs: Any) -> None:
            global _seeded  # noqa: PLW0603  there is one such generator in a process
            function(*args, **kwargs)
            _seeded = bool(args and args[0] is not None) or bool(kwargs)

        return seed

    random.seed, random.setstate = (noticing(function) for function in before)
    try:
        yield
    finally:
        random.seed, random.setstate = before
