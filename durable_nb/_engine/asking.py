"""What a workflow's code has asked for, from the call of a verb to its delivery."""

from __future__ import annotations

import asyncio
import inspect
from asyncio import events
from collections.abc import Coroutine
from contextvars import Context, ContextVar
from typing import Any

from durable_nb._current import Recorded, StepRequest
from durable_nb._engine.by_history import Request
from durable_nb._records import Timer

current_lane: ContextVar[Lane | None] = ContextVar("durable_nb_lane", default=None)


class Lane:
    """Where a task of the workflow's stands in the tree of its tasks."""

    __slots__ = ("_children", "path")

    def __init__(self, path: tuple[int, ...] = ()) -> None:
        self.path, self._children = path, 0

    def child(self) -> Lane:
        self._children += 1
        return Lane((*self.path, self._children))


class Ask:
    """A request of the code's, from the call of its verb to its delivery."""

    __slots__ = (
        "activation",
        "begun",
        "context",
        "coro",
        "failed",
        "future",
        "handle",
        "is_at_work",
        "is_wanted",
        "lane",
        "path",
        "request",
        "task",
        "timer",
        "value",
        "what",
    )

    def __init__(self, request: Request, future: asyncio.Future[Any] | None, lane: tuple[int, ...], what: Any = None) -> None:
        self.request, self.future, self.lane, self.what = request, future, lane, what
        self.handle: events.TimerHandle | None = None
        self.coro: Coroutine[Any, Any, Any] | None = None
        self.timer: Timer | None = None
        self.value: Recorded | None = None
        """Of what the code gets in passing: it has it already."""
        self.path = ""
        """Of the step that views show; '' of what they don't."""
        self.task: asyncio.Task[Any] | None = None
        self.context: Context | None = None
        """Of the task that awaits it: its body sees the same context variables."""
        self.is_wanted = self.begun = self.is_at_work = False
        self.activation = -1
        """The one that it was made in."""
        self.failed = 0
        """So many attempts have failed that the code has seen: it is the same request made again, with that one's number."""

    @property
    def is_given_up(self) -> bool:
        """Does nobody wait for it any more, and nobody will?"""
        if self.handle is not None:
            return self.handle.cancelled()
        if self.future is not None and self.future.cancelled():
            return True
        return not self.is_wanted and self.coro is not None and inspect.getcoroutinestate(self.coro) == inspect.CORO_CLOSED

    @property
    def is_step(self) -> bool:
        return isinstance(self.what, StepRequest)

    @property
    def is_forgotten(self) -> bool:
        """Was the verb called, and its coroutine neither awaited nor made a task?"""
        return self.coro is not None and not self.is_wanted and inspect.getcoroutinestate(self.coro) == inspect.CORO_CREATED


class OpenAttempts:
    """Requests whose last attempt has failed, and that the code may go on with, by the task that was given the failure.

    SDKs try again by themselves: the same request, made next by that task, is one more attempt. Another request makes the
    failure the outcome; a timer doesn't, since an SDK pauses.
    """

    def __init__(self) -> None:
        self._of: dict[tuple[int, ...], tuple[Ask, int]] = {}

    def __len__(self) -> int:
        return len(self._of)

    def add(self, ask: Ask, failed: int) -> None:
        """The code is given the failure of attempt number `failed`."""
        self._of[ask.lane] = ask, failed

    def settle(self, ask: Ask) -> Ask | None:
        """This is what the task makes next: it goes on with the one before, or that is returned, whose failure stands."""
        before, failed = self._of.pop(ask.lane, (None, 0))
        if before is None:
            return None
        old, new = before.request, ask.request
        if (old.kind, old.name, old.digest) != (new.kind, new.name, new.digest):
            return before
        new.id, new.n, new.recorded_digest = old.id, old.n, old.recorded_digest
        ask.path, ask.failed = before.path, failed
        return None

    def left(self) -> list[Ask]:
        """Those that nothing has followed."""
        return [ask for ask, _ in self._of.values()]
