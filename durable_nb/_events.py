"""What comes to a run from outside, as its code and its senders see it: events, decisions, and what became of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any

POLICIES = ("wait", "approve", "reject", "suspend")
APPROVALS = "DURABLE_NB_APPROVALS"


@dataclass(frozen=True, slots=True)
class Event:
    """What `wait_for_event` gives."""

    data: Any = None
    timed_out: bool = False
    """No event came in time; `data` is None then."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What `approve` gives. It is true where it approves."""

    approved: bool
    by: str = ""
    """Who decided: a user's name, or the setting that did."""
    comment: str = ""
    timed_out: bool = False
    """Nobody decided in time; that approves nothing."""

    def __bool__(self) -> bool:
        return self.approved


def came(kind: str, value: Any, *, timed_out: bool) -> Event | Decision:
    """What the code gets of a wait of that kind, of what is recorded: an event's data, or what was decided, by whom and why."""
    if kind == "event":
        return Event(value, timed_out)
    approved, by, comment = value
    return Decision(approved, by, comment, timed_out)


@dataclass(frozen=True, slots=True)
class Waiter:
    """A run that waits for an event. Times are unix seconds."""

    run_id: str
    step: str
    """The path of the step that waits."""
    since: float
    until: float


class Delivery:
    """What became of an event that was sent. Awaiting it gives itself: in a workflow's own code it has `run_ids` and `buffered`
    only then, since the event is committed when the code awaits next."""  # fmt: skip

    __slots__ = ("_sent", "buffered", "event_id", "run_ids")

    event_id: str
    run_ids: tuple[str, ...]
    """The runs that waited for it when it was sent."""
    buffered: bool
    """It is on disk, and no run waited for it: it is delivered to the ones that will."""

    def __init__(
        self,
        event_id: str,
        run_ids: tuple[str, ...] | None = None,
        sent: Callable[[], Coroutine[Any, Any, tuple[str, ...]]] | None = None,
    ) -> None:
        """`sent` gives the runs once the event is on disk, where that is not so yet."""
        self.event_id, self._sent = event_id, sent
        if run_ids is not None:
            self._settle(run_ids)

    def _settle(self, run_ids: tuple[str, ...]) -> None:
        self.run_ids, self.buffered, self._sent = run_ids, not run_ids, None

    def __await__(self) -> Generator[Any, Any, Delivery]:
        if self._sent is not None:
            self._settle((yield from self._sent().__await__()))
        return self

    def __getattr__(self, name: str) -> Any:
        if name in ("run_ids", "buffered"):
            raise AttributeError(
                f"the event {self.event_id!r} is sent when the workflow awaits next: write 'await' before durable.notify(...) "
                f"to have its {name}"
            )
        raise AttributeError(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Delivery) and repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if self._sent is not None:
            return f"Delivery({self.event_id!r}, not sent yet)"
        return f"Delivery(event_id={self.event_id!r}, run_ids={self.run_ids!r}, buffered={self.buffered!r})"


def approvals_policy() -> str:
    """What `DURABLE_NB_APPROVALS` says of approvals that are asked for in this process: `wait` (the default), `approve`,
    `reject`, or `suspend` the cell. ValueError for anything else."""  # fmt: skip
    policy = os.environ.get(APPROVALS, "").strip().lower() or "wait"
    if policy not in POLICIES:
        raise ValueError(f"{APPROVALS}={policy!r}: write one of {', '.join(POLICIES)}; nothing was asked")
    return policy
