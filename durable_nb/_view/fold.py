"""A run's steps as rows: equal names fold into one, children and `map` items fold into their parent. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

from durable_nb._facts import Status
from durable_nb._view.costs import usage_of
from durable_nb._view.words import ACTIVE, BROKEN, counted, error_of, word

if TYPE_CHECKING:
    from durable_nb._facts import Step
    from durable_nb._usage import Usage

CELLS = 48
"""Of a strip, at most."""

LETTERS = {
    "restored": "R",
    "completed": "c",
    "running": "r",
    "sleeping": "s",
    "waiting": "w",
    "retrying": "y",
    "pending": "p",
    "failed": "f",
    "interrupted": "i",
    "cancelled": "x",
}
_GRAVITY = "finwysrxpcR"
"""Of the states that share a cell of a strip, the first of these is shown (`n` is no state)."""
_STANDING = ("running", "retrying", "waiting", "sleeping", "failed", "interrupted", "cancelled", "pending", "completed")


@dataclass(slots=True)
class Row:
    """A step, or steps of one name. `key` is the same in every state of the run."""

    key: str
    name: str
    steps: Sequence[Step]
    depth: int = 0
    below: Callable[[], list[Row]] | None = field(default=None, repr=False)
    """The rows that unfold."""
    is_group: bool = False

    @property
    def step(self) -> Step:
        return self.steps[0]


@dataclass(frozen=True, slots=True)
class Group:
    """What one row says of several steps."""

    status: str
    done: int
    counts: dict[str, int]
    median_s: float | None
    """Of those whose body ran."""
    started_at: float | None
    ended_at: float | None
    wake_at: float | None
    strip: str
    error: str | None
    """Of the first that is broken."""
    usage: Usage


def fold(steps: Sequence[Step]) -> list[Row]:
    """Return the rows of a run, in the order in which their first steps were asked for."""
    nested = {step.path for step in steps} if any("/" in s.path or s.path.endswith("]") for s in steps) else frozenset[str]()
    families: dict[str, dict[str, list[Step]]] = {}
    for step in steps:
        parent = _parent(step.path, nested) if nested else ""
        name = step.name
        if name.endswith("]"):
            name = name.rpartition("[")[0] or name
        families.setdefault(parent, {}).setdefault(name, []).append(step)
    return _rows(families, "", 0)


def flat(rows: list[Row], opened: set[str]) -> list[Row]:
    """Return the rows that are to be seen, where those of the keys `opened` are unfolded."""
    return list(_flat(rows, opened)) if opened else rows


def told(row: Row) -> Group:
    """Return what a row of several steps says."""
    words = [word(step) for step in row.steps]
    counts = counted(words)
    spans = [s.ended_at - s.started_at for s in row.steps if not s.restored and s.ended_at and s.started_at]
    begun = [step.started_at for step in row.steps if step.started_at is not None and not step.restored]
    ended = [step.ended_at for step in row.steps if step.ended_at is not None and not step.restored]
    active = any(step.status in ACTIVE for step in row.steps)
    return Group(
        status=next((name for name in _STANDING if name in counts), "restored"),
        done=counts.get("completed", 0) + counts.get("restored", 0),
        counts=counts,
        median_s=median(spans) if spans else None,
        started_at=min(begun, default=None),
        ended_at=None if active else max(ended, default=None),
        wake_at=min((step.wake_at for step in row.steps if step.wake_at and step.status in ACTIVE), default=None),
        strip=strip(words),
        error=next((error_of(step) for step in row.steps if step.status in BROKEN and step.error), None),
        usage=usage_of(row.steps),
    )


def strip(words: Sequence[str]) -> str:
    """Return a letter for each state in the order of the steps; where there are too many, the gravest of each stretch."""
    letters = "".join(LETTERS[name] for name in words)
    if len(letters) <= CELLS:
        return letters
    edges = [len(letters) * i // CELLS for i in range(CELLS + 1)]
    parts = [set(letters[a:b]) for a, b in pairwise(edges)]
    return "".join(next(letter for letter in _GRAVITY if letter in part) for part in parts)


def timeline(steps: Sequence[Step], since: float, until: float) -> str:
    """Return, for equal parts of the time between, what was at work then: the gravest state, or a space where nothing was."""
    span = max(until - since, 1e-9)
    parts: list[set[str]] = [set() for _ in range(CELLS)]
    for step in steps:
        if step.started_at is None or step.restored or step.status is Status.PENDING:
            continue
        end = until if step.ended_at is None else step.ended_at
        first = min(max(int((step.started_at - since) / span * CELLS), 0), CELLS - 1)
        last = min(max(int((end - since) / span * CELLS - 1e-9), first), CELLS - 1)
        letter = "p" if step.kind == "sleep" and step.status is Status.COMPLETED else LETTERS[word(step)]
        for part in parts[first : last + 1]:
            part.add(letter)
    order = "fiyrxcswp"
    return "".join(next((letter for letter in order if letter in part), " ") for part in parts)


def _rows(families: dict[str, dict[str, list[Step]]], parent: str, depth: int) -> list[Row]:
    rows = []
    for name, members in families.get(parent, {}).items():
        if len(members) == 1:
            rows.append(_one(families, members[0], depth))
        else:
            below = _members(families, members, depth + 1)
            rows.append(Row(f"{parent}\0{name}", name, members, depth, below, is_group=True))
    return rows


def _members(families: dict[str, dict[str, list[Step]]], members: list[Step], depth: int) -> Callable[[], list[Row]]:
    return lambda: [_one(families, step, depth, _own(step)) for step in members]


def _one(families: dict[str, dict[str, list[Step]]], step: Step, depth: int, name: str = "") -> Row:
    below = (lambda: _rows(families, step.path, depth + 1)) if step.path in families else None
    return Row(step.path, name or step.name, (step,), depth, below)


def _own(step: Step) -> str:
    """Return the end of a step's path that tells it from others of its name: `row[4711]`, `fold#2`."""
    return step.path[max(step.path.rfind(step.name), 0) :] if step.name in step.path else step.name


def _flat(rows: list[Row], opened: set[str]) -> Iterator[Row]:
    for row in rows:
        yield row
        if row.below is not None and row.key in opened:
            yield from _flat(row.below(), opened)


def _parent(path: str, paths: frozenset[str] | set[str]) -> str:
    """Return the path of the step that this one belongs to; '' where there is none."""
    if path.endswith("]"):
        above = path.rpartition("[")[0]
        if above in paths:
            return above
    while "/" in path:
        path = path.rpartition("/")[0]
        if path in paths:
            return path
    return ""
