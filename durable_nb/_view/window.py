"""Which steps of a run are worth a reader's eyes, and what lies between them, counted."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from durable_nb._view.words import ACTIVE, BROKEN, counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from durable_nb._facts import Step

FIRST = 20
LAST = 50
AT_MOST = 100
"""Active steps, and as many broken ones: a fan-out of 10,000 calls must not become 10,000 rows."""
PAGE = 50
WHOLE = 100
"""A run of so few steps is shown without gaps."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Steps `start` up to, not including, `stop`, left out of sight."""

    start: int
    stop: int
    counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class Window:
    """The places, ascending, of the steps to show, and the gaps between them."""

    shown: tuple[int, ...]
    gaps: tuple[Gap, ...]


def by_interest(steps: Sequence[Step], pages: Iterable[int] = ()) -> list[int]:
    """Return the places of the steps worth showing, the most interesting first.

    `pages` are the places where a reader asked to see more: `PAGE` steps from each.
    """
    total = len(steps)
    if total <= WHOLE:
        return list(range(total))
    active = [i for i, step in enumerate(steps) if step.status in ACTIVE]
    broken = [i for i, step in enumerate(steps) if step.status in BROKEN]
    places = [*active[:AT_MOST], *broken[:AT_MOST], *range(total - LAST, total), *range(FIRST)]
    for start in pages:
        places += range(max(start, 0), min(start + PAGE, total))
    # a step alone between two others costs one row either way: show it
    known = set(places)
    places += [i + 1 for i in known if i + 2 in known and i + 1 not in known]
    return list(dict.fromkeys(places))


def window(words: Sequence[str], places: Iterable[int]) -> Window:
    """Show the steps at `places`; count the others, given every step's word."""
    shown = tuple(sorted(places))
    edges = (-1, *shown, len(words))
    gaps = tuple(
        Gap(before + 1, after, counted(words[before + 1 : after])) for before, after in pairwise(edges) if after - before > 1
    )
    return Window(shown, gaps)
