"""What has come to one run from outside, and which of its waits gets it: the first sent, to the wait asked for first, once.

Without a disk and a loop of its own: it is told what is in the run's inbox and of the store's events, and hands out futures.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from durable_nb import _records as rec
from durable_nb._engine.inbox import Received
from durable_nb._records import Answer, Notification, Timer


@dataclass(frozen=True, slots=True)
class Wait:
    """One wait of a run, for an event or a decision."""

    id: str
    """Tells it from the run's others."""
    path: str
    """Of the step that views show."""
    timer: Timer
    future: asyncio.Future[Received]


class Arrivals:
    """Of one execution."""

    def __init__(self, since_s: float) -> None:
        """`since_s`: when the run began; what was sent to everybody before that is none of its."""
        self._since_s = since_s
        self._waits: dict[str, Wait] = {}
        self._buffered: dict[str, Received] = {}
        """By the key of its row, in the order in which they came."""
        self._taken: set[str] = set()
        self.given_up: set[str] = set()
        """Waits that the code has given up, in this execution."""
        self._unready: set[str] = set()
        """Waits that take nothing yet."""

    @property
    def waits(self) -> tuple[Wait, ...]:
        """What has not come yet, in the order of asking."""
        return tuple(self._waits.values())

    @property
    def event_ids(self) -> set[str]:
        """The events that somebody waits for."""
        return {wait.timer.of for wait in self.waits if wait.timer.kind == "event"}

    def know(self, taken: Iterable[str]) -> None:
        """Keys of rows whose delivery is on record."""
        self._taken.update(taken)

    def hear(self, received: Iterable[Received]) -> None:
        """These are in the inbox, or among the store's events. Those that were heard of before are passed over."""
        for one in received:
            if isinstance(one.message, Notification | Answer) and one.key not in self._taken and not self._is_early(one):
                self._buffered.setdefault(one.key, one)
        self._match()

    def expect(self, wait_id: str, path: str, timer: Timer) -> asyncio.Future[Received]:
        """What comes for this wait, once `admit` has said that what came before it is heard."""
        future: asyncio.Future[Received] = asyncio.get_running_loop().create_future()
        self._waits[wait_id] = Wait(wait_id, path, timer, future)
        self._unready.add(wait_id)
        self.given_up.discard(wait_id)
        return future

    def admit(self, wait_id: str) -> None:
        """All that was sent before the wait has been heard."""
        self._unready.discard(wait_id)
        self._match()

    def forget(self, wait_id: str) -> None:
        """Nobody waits for it any more. What it got and nobody took is there for the next."""
        wait = self._waits.pop(wait_id, None)
        self._unready.discard(wait_id)
        if wait is not None:
            self.given_up.add(wait_id)
            wait.future.cancel()
            self._match()

    def take(self, key: str) -> None:
        """That row was delivered."""
        self._taken.add(key)
        self._buffered.pop(key, None)

    def give_back(self, received: Received) -> None:
        """It was delivered to nobody."""
        self._taken.discard(received.key)
        self._buffered = {received.key: received, **self._buffered}  # it came before what is there
        self._match()

    def _is_early(self, received: Received) -> bool:
        """Was it sent to everybody, before the run began?"""
        return not is_addressed(received) and received.message.sent_at < self._since_s

    def _match(self) -> None:
        kept = set()
        """Events that are an earlier wait's, which does not know yet of all that came."""
        for wait in self.waits:
            if wait.id in self._unready:
                kept.add(wait.timer.of)
            elif wait.timer.of not in kept and (found := self._first_for(wait)) is not None:
                del self._waits[wait.id], self._buffered[found.key]
                self._taken.add(found.key)
                wait.future.set_result(found)

    def _first_for(self, wait: Wait) -> Received | None:
        if wait.timer.kind == "decision":
            return next((one for one in self._buffered.values() if _decided_by(one) == wait.id), None)
        fitting = [one for one in self._buffered.values() if _event_of(one) == wait.timer.of]
        # Each of the two is in order, by its numbers: a clock that was set back between two of them changes nothing of that.
        own, everybodys = ([one for one in fitting if is_addressed(one) is mine] for mine in (True, False))
        return next(heapq.merge(own, everybodys, key=lambda one: one.message.sent_at), None)


def _event_of(received: Received) -> str:
    return received.message.event_id if isinstance(received.message, Notification) else ""


def _decided_by(received: Received) -> str:
    return received.message.wait if isinstance(received.message, Answer) else ""


def is_addressed(received: Received) -> bool:
    """Is it in the run's own inbox, and not for whoever waits?"""
    return not received.key.startswith(rec.event_prefix(""))
