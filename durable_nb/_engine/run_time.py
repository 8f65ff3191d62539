"""The time of one workflow's run, and the timers of its code.

A run's time counts seconds since it was started, but for those in which it had failed: a time-out does not fall due at once
after `resume()`.
"""

from __future__ import annotations

import asyncio
import heapq
from asyncio import events
from collections.abc import Callable

from durable_nb._clock import RECHECK_S, Clock, Instant, elapsed_s
from durable_nb._records import RunRecord


def due_in_s(record: RunRecord, now: Instant) -> float:
    """So long until a run is to begin that was started with a delay; 0 or less: it has begun."""
    return -(record.since_s + elapsed_s(record.since, now)) if record.since is not None else 0.0


class RunTime:
    """Now, in the run's time, and the earliest timer that is due."""

    def __init__(self, clock: Clock, since: Instant | None, since_s: float) -> None:
        self._clock = clock
        self.since, self.since_s = since or clock.now(), since_s
        """At that moment the run's time was so."""
        self._timers: list[tuple[float, int, events.TimerHandle]] = []
        self._alarm: asyncio.Task[None] | None = None
        self._armed_s = 0.0

    def now_s(self) -> float:
        return self.since_s + elapsed_s(self.since, self._clock.now())

    def begin(self, at_s: float) -> None:
        """An execution begins: its time goes on from `at_s` at the earliest, which is on record."""
        self.since_s, self.since = max(self.now_s(), at_s), self._clock.now()

    async def until(self, at_s: float, is_busy: Callable[[], bool]) -> None:
        """Return when the run's time is that. `is_busy`: is something executed? Then it is waited for by the clock, also where
        that can skip time."""  # fmt: skip
        left = at_s - self.now_s()
        while left > 0:
            piece = min(left, RECHECK_S)
            is_over = await self._clock.wait(piece, is_busy)
            left = min(left - piece, at_s - self.now_s()) if is_over else at_s - self.now_s()

    def add(self, handle: events.TimerHandle, number: int) -> None:
        """A timer of the code's, with the number of its request."""
        heapq.heappush(self._timers, (handle.when(), number, handle))

    @property
    def is_waiting(self) -> bool:
        """Is a timer left, or was one when this was armed?"""
        return bool(self._timers)

    @property
    def is_armed(self) -> bool:
        return self._alarm is not None

    def arm(self, fire: Callable[[int, float], object], is_at_work: Callable[[], bool]) -> None:
        """Have `fire` called with the number of the earliest timer, and its time, when that has come.

        is_at_work  is a body executed? Then time-outs go by the clock, also where that can skip time
        """
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        due_s = self._timers[0][0] if self._timers else None
        if self._alarm is not None:
            if not self._alarm.done() and due_s == self._armed_s:
                return
            self._alarm.cancel()
            self._alarm = None
        if due_s is not None:
            self._armed_s = due_s
            self._alarm = asyncio.get_running_loop().create_task(self._wake(due_s, fire, is_at_work))

    def stop(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()

    async def _wake(self, due_s: float, fire: Callable[[int, float], object], is_at_work: Callable[[], bool]) -> None:
        await self.until(due_s, is_at_work)
        if self._timers and self._timers[0][0] == due_s:
            _, number, _ = heapq.heappop(self._timers)
            self._alarm = None
            fire(number, due_s)
