"""What an observer may know of a run: plain facts, handed out by the engine to views, logs and command lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from durable_nb._preview import NONE, Preview
from durable_nb._usage import Usage


class Status(StrEnum):
    """The states of a run and of a step."""

    PENDING = "pending"
    RUNNING = "running"
    SLEEPING = "sleeping"
    WAITING = "waiting"
    RETRYING = "retrying"
    INTERRUPTED = "interrupted"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINISHED = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)
"""Of a run: it goes on only if somebody asks for that."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a step has come, as its body has reported it."""

    done: float
    total: float | None = None
    note: str = ""
    state: dict[str, Any] = field(default_factory=dict, hash=False)
    """What the next attempt needs to go on from there."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run, as it stands at the moment of asking. Times are unix seconds."""

    name: str
    path: str
    """Where in the run: unique among its steps, stable over replays."""
    kind: str
    """`run`, `call`, `sleep`, `event`, `decision`, `notify`, `start` or `invoke`."""
    status: Status
    attempts: int = 0
    """Attempts begun, over all kernels."""
    started_at: float | None = None
    ended_at: float | None = None
    restored: bool = False
    """The outcome came from the journal: no body code ran in this execution."""
    error: str | None = None
    """`TypeName: message` of the last failed attempt."""
    wake_at: float | None = None
    """When a sleep or a retry goes on, or when a wait for an event or a decision is over at the latest."""
    preview: Preview = field(default=NONE, repr=False)
    """What it was given and what it gave, as short texts without secrets."""
    usage: Usage = field(default_factory=dict, repr=False, hash=False)
    """What models' answers have cost it."""
    waits_for: str | None = None
    """Pending: the limit of which it has no share, as views say it."""
    progress: Progress | None = field(default=None, repr=False)
    """Running, or to be tried again: how far it has come, as its body says."""
    prompt: str = field(default="", repr=False)
    """Of a decision: the question."""
    child: str | None = None
    """Of `invoke`: the id of the run that it has begun. That one's steps follow it, as `invoke's path/step`."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run and its steps, in the order in which the steps were asked for."""

    id: str
    name: str
    status: Status
    started_at: float
    ended_at: float | None
    steps: tuple[Step, ...]
    labels: tuple[str, ...] = ()
    error: str | None = None
    """Failed or cancelled: `TypeName: message`."""
    waits_for: str | None = None
    """Pending: the limit of which it has no share, as views say it."""
    wake_at: float | None = None
    """When a run begins that was started with a delay."""


@dataclass(frozen=True, slots=True)
class Used:
    """What models' answers have cost a run, and what restoring has saved of it."""

    run_id: str
    name: str
    started_at: float
    spent: Usage
    saved: Usage


@dataclass(frozen=True, slots=True)
class ScheduleFacts:
    """Starts of a workflow by the clock."""

    name: str
    workflow: str
    cron: str
    tz: str
    paused: bool
    next_at: float | None
    """Unix seconds; None while it is paused."""
    last_run: str
    """The id of the run that it has started last; '' for none."""


class Paths:
    """Names for the steps of a run: where each was asked for, numbered from the second of a name on; `map[3]` is an item."""

    def __init__(self) -> None:
        self._used: dict[str, int] = {}

    def take(self, branch: str, name: str, item: int = -1) -> str:
        """The path of the next step of that name in that task."""
        name = name if item < 0 else f"{name}[{item}]"
        place = f"{branch}/{name}" if branch else name
        count = self._used[place] = self._used.get(place, 0) + 1
        return place if count == 1 else f"{place}#{count}"


class Facts:
    """The steps of one execution of a run, in the order in which they were asked for."""

    def __init__(self, changed: Callable[[], object]) -> None:
        """`changed` is called after every change."""
        self._steps: dict[str, Step] = {}
        self._counts = dict.fromkeys(Status, 0)
        """Of the steps, by status. Its keys never change: any thread may read it."""
        self._items: dict[object, list[str]] = {}
        self._paths, self._changed = Paths(), changed

    def take(self, branch: str, name: str, items: object = None, item: int = -1) -> str:
        """A path for the next step of that name in that task; of an item, the one that it was given with the others."""
        return self._paths.take(branch, name) if items is None else self._items[items][item]

    def expect(self, items: object, branch: str, name: str, count: int) -> list[str]:
        """Paths for so many items, which will be asked for."""
        paths = self._items[items] = [self._paths.take(branch, name, n) for n in range(count)]
        return paths

    def add(self, *steps: Step) -> None:
        for step in steps:
            self._set(step)
        self._changed()

    def update(self, path: str, **news: Any) -> Step:
        """The step at that path, with these fields."""
        step = replace(self._steps[path], **news)
        self._set(step)
        self._changed()
        return step

    def call_off(self, items: object) -> None:
        """Those that have not been asked for will not."""
        for path in self._items[items]:
            if self._steps[path].status is Status.PENDING:
                self._counts[self._steps.pop(path).status] -= 1
        self._changed()

    def interrupt(self) -> None:
        """The execution is over: what has not ended is interrupted."""
        for step in self.steps():
            if step.status not in (Status.COMPLETED, Status.FAILED, Status.CANCELLED):
                self._set(replace(step, status=Status.INTERRUPTED))
        self._changed()

    def __getitem__(self, path: str) -> Step:
        return self._steps[path]

    def steps(self) -> tuple[Step, ...]:
        return tuple(self._steps.values())

    def standing(self) -> Status:
        """What the run does. May be asked by any thread, and takes as long however many steps there are."""
        return standing(status for status, count in self._counts.items() if count)

    def _set(self, step: Step) -> None:
        before = self._steps.get(step.path)
        self._counts[step.status] += 1
        if before is not None:
            self._counts[before.status] -= 1
        self._steps[step.path] = step


def standing(found: Iterable[Status]) -> Status:
    """What a run that is being executed does, its steps having these states: it waits or sleeps where none is at work."""
    found = set(found)
    if Status.RUNNING in found:
        return Status.RUNNING
    return next((s for s in (Status.WAITING, Status.SLEEPING, Status.RETRYING) if s in found), Status.RUNNING)
