"""What all executions of one store in this process share: the store, the clock, the threads, and the bodies at work."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from weakref import WeakSet

from durable_nb._clock import Clock, SystemClock
from durable_nb._current import Engine
from durable_nb._engine.attempt import Attempt
from durable_nb._engine.heartbeats import Heartbeats
from durable_nb._engine.in_place import Changed
from durable_nb._engine.limits import Limits
from durable_nb._engine.muting import Muting
from durable_nb._engine.ownership import Ownership
from durable_nb._engine.run_log import CellRecords
from durable_nb._engine.workers import Workers
from durable_nb._savings import Savings
from durable_nb._store import Store

_T = TypeVar("_T")


class Shared:
    """One for each store and process."""

    def __init__(self, store: Store, clock: Clock | None = None, jitter: Callable[[], float] = random.random) -> None:
        self.store = store
        self.clock: Clock = clock or SystemClock()
        self.jitter = jitter
        self.workers = Workers()
        self.savings = Savings(store)
        self.limits = Limits(store, self.clock)
        self.heartbeats = Heartbeats()
        self.ownership = Ownership(store, self.is_at_work)
        self.ownership.waiting_row = self.limits.waiting_row
        self.bodies: dict[str, Attempt] = {}
        """By idempotency key. Threads outlive the execution that began them, and are taken over by the next one."""
        self.records: defaultdict[str, WeakSet[CellRecords]] = defaultdict(WeakSet)
        """By run of a cell: what its executions know of its records. A body that outlives its own tells those that follow."""
        self.changed: defaultdict[str, list[Changed]] = defaultdict(list)
        """By scope: steps of unfinished runs of cells that have changed live objects of this kernel, in order."""
        self.muting: Callable[[], Muting] = Muting
        """What keeps a repeated workflow from showing again what it showed."""
        self.workflows: Engine
        """What starts and finds the runs of workflows of this store, and awaits them."""
        self.events: Any
        """What sends events from runs of this store (`events.Events`)."""
        self.performed: dict[str, asyncio.Future[None]] = {}
        """By idempotency key: done when what a cell's step has come to is on disk."""
        self._recording: Counter[str] = Counter()
        """By run: how many results of bodies that nobody waits for are being recorded."""
        self._settling: defaultdict[str, list[asyncio.Future[None]]] = defaultdict(list)
        """By run: who waits until there are none."""
        store.writer.expected = lambda: len(self.bodies)

    def is_at_work(self, run_id: str) -> bool:
        """Does a body of the run live, or is being recorded?"""
        return self._recording[run_id] > 0 or any(b.run_id == run_id and not b.is_over for b in self.bodies.values())

    def is_any_at_work(self) -> bool:
        """Does a body of any run live?"""
        return any(not body.is_over for body in self.bodies.values())

    def has_bodies(self) -> bool:
        """Does a body of any run live?"""
        return any(not body.is_over for body in self.bodies.values())

    def left_over(self, run_id: str) -> list[str]:
        """Keys of bodies of the run that have ended and that nobody has taken over."""
        return [key for key, body in self.bodies.items() if body.run_id == run_id and body.is_over]

    def keep(self, recording: Coroutine[Any, Any, _T], run_id: str) -> asyncio.Future[_T]:
        """Record what a body has come to, whether or not somebody waits for it: cancelling the future stops nothing. The run's
        lease is ours until then.

        It is no task: it begins now, not a turn of the loop later, and ends with the turn that it has waited for.
        """
        self._recording[run_id] += 1
        recorded: asyncio.Future[_T] = asyncio.get_running_loop().create_future()

        def go_on(_: object = None) -> None:
            value, error = None, None
            try:
                waited = recording.send(None)
            except StopIteration as ended:
                value = ended.value
            except BaseException as raised:
                error = raised
            else:
                waited._asyncio_future_blocking = False  # as a task tells a future that it was awaited
                waited.add_done_callback(go_on)
                return
            self._recording[run_id] -= 1
            self.ownership.let_go(run_id)
            for settling in self._settling.pop(run_id, ()) if not self._recording[run_id] else ():
                settling.set_result(None)
            if recorded.done():
                return
            if isinstance(error, asyncio.CancelledError):
                recorded.cancel()
            elif error is not None:
                recorded.set_exception(error)
                recorded.exception()  # whoever waits gets it; nobody has to
            else:
                recorded.set_result(value)  # type: ignore[arg-type]  # what the coroutine has returned

        go_on()
        return recorded

    async def settled(self, run_id: str) -> None:
        """Return when what is being recorded of the run is."""
        while self._recording[run_id] > 0:
            settling = asyncio.get_running_loop().create_future()
            self._settling[run_id].append(settling)
            await asyncio.wait({settling})
