"""One execution of a run: what a cell's and a workflow's have in common. Each part owns its state."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from durable_nb import _records as rec
from durable_nb._clock import RECHECK_S, Instant, elapsed_s, remaining_s
from durable_nb._current import WaitRequest
from durable_nb._engine.arrivals import Arrivals
from durable_nb._engine.inbox import Received, outlasts
from durable_nb._engine.observing import Observers
from durable_nb._engine.performer import Performer, RunPolicy, Wording
from durable_nb._engine.reporting import Reporting
from durable_nb._engine.run_log import Held, RunLog
from durable_nb._engine.shared import Shared
from durable_nb._events import APPROVALS
from durable_nb._facts import Facts, Snapshot, Status
from durable_nb._journal import Verdict
from durable_nb._records import Decided, Result, RunRecord, Timer, unpack
from durable_nb._replay import Wait, decide_sleep
from durable_nb.errors import LeaseLost

UNWIND_S = 2.0
"""How long an execution that ends waits for cancelled bodies to unwind."""


@dataclass(frozen=True, slots=True)
class Patience:
    """For how long an execution waits for an event or a decision."""

    seconds: float
    begins: Callable[[float], object]
    """Called before it waits, with what is left of the wait."""
    give_up: Callable[[float], None]
    """Called after that, with what is left of the wait; it raises."""


class Execution:
    """The records, the facts, the steps that are performed, the waits, and the end of one execution."""

    def __init__(self, shared: Shared, record: RunRecord, held: Held, wording: Wording, policy: RunPolicy) -> None:
        self.shared, self.record, self.held, self.wording = shared, record, held, wording
        self.loop = asyncio.get_running_loop()
        """The kernel's. While workflow code is stepped, another is the running one."""
        self.log = RunLog(shared.store, record, held)
        self.observers = Observers()
        self.facts = Facts(self.observers.changed)
        self.reporting = Reporting(self.log)
        self.performer = Performer(shared, self.log, held, self.facts, self.observers, wording, policy)
        self.closing: list[Callable[[], Coroutine[Any, Any, None]]] = []
        """What is to be closed when no body is at work any more."""
        self.status = Status.RUNNING
        self.began_at = self.now_s()
        self.ended_at: float | None = None
        self.error: str | None = None
        self.arrivals = Arrivals(record.started_at if record.renewed_at is None else record.renewed_at)
        self.heard: dict[str, bytes] = {}
        """Messages that are on disk and that this execution has heard of."""

    def now_s(self) -> float:
        return self.shared.clock.now().wall_s

    def snapshot(self, status: Status, waits_for: str | None = None, wake_at: float | None = None) -> Snapshot:
        """The run and its steps, as they stand now."""
        of = self.record.id, self.record.name, status, self.began_at, self.ended_at
        return Snapshot(*of, self.facts.steps(), self.record.labels, self.error, waits_for, wake_at)

    def begin(self, run: Any) -> None:
        """`run` is what executes it here from now on."""
        self.shared.ownership.active[self.record.id] = run

    def news(self, lease: bytes | None, inbox: Iterable[Received], give_way: Callable[[], object]) -> list[Received]:
        """Of what is in the run's inbox, what this execution has not heard of yet; from now on it has. What came for the run's
        waits goes to these. Where the lease's row is another's, `give_way` is called, and nothing is news."""  # fmt: skip
        ownership = self.shared.ownership
        if not ownership.holds(self.held) or self.record.id in ownership.changing:
            return []
        if lease != self.held.row:
            give_way()
            return []
        new = [one for one in inbox if self.heard.get(one.key) != one.row]
        self.heard.update((one.key, one.row) for one in new)
        self.arrivals.hear(one for one in new if outlasts(one.message))
        return [one for one in new if not outlasts(one.message)]

    async def sleep(self, timer: Timer, path: str, since: Instant, wait: Callable[[float, str], None] | None = None) -> bool:
        """Return when a sleep is over; was there anything left of it? `wait` is told of a pause before it, and may raise."""
        was_left = False
        while isinstance(left := decide_sleep(timer, self.shared.clock.now()), Wait):
            was_left = True
            wake_at = self.now_s() + left.seconds
            self.facts.update(path, status=Status.SLEEPING, started_at=since.wall_s, wake_at=wake_at)
            if wait is not None:
                wait(left.seconds, f"sleeps {timer.name!r}")
            await self.shared.clock.sleep(min(left.seconds, RECHECK_S))
        return was_left

    @contextlib.contextmanager
    def expecting(self, wait_id: str, path: str, timer: Timer) -> Iterator[asyncio.Future[Received]]:
        """While entered, the run waits for that event or decision. Entered before anything else is awaited: the wait that is
        asked for first takes what comes first. Given up, it has taken nothing."""  # fmt: skip
        found = self.arrivals.expect(wait_id, path, timer)
        try:
            yield found
        except BaseException:
            if found.done() and not found.cancelled():
                self.arrivals.give_back(found.result())
            raise
        finally:
            self.arrivals.forget(wait_id)

    async def event(
        self, timer: Timer, path: str, wait_id: str, found: asyncio.Future[Received], patience: Patience | None = None
    ) -> Received | None:
        """What has come for a wait that is expected and on disk; None where its time is over before."""
        inbox, run_id = self.shared.ownership.inbox, self.record.id
        key, journal = rec.decided_key(run_id, wait_id), self.shared.store.journal
        # Sent before anybody waited.
        mail, row = await self.log.read(lambda: ([*inbox.of(run_id), *inbox.events({timer.of})], journal.get(key)))
        if row is not None:
            await self._forget(key)
        self.arrivals.hear(mail)
        self.arrivals.admit(wait_id)
        await self._pause(timer, path, found, patience)
        return found.result() if found.done() else None

    async def decision(
        self,
        timer: Timer,
        path: str,
        wait_id: str,
        found: asyncio.Future[Received],
        policy: str,
        patience: Patience | None = None,
    ) -> tuple[Decided, str]:
        """How an approval that is on disk is decided, and the message that said so, which is to be deleted. `policy`: what
        decides at once. LeaseLost."""  # fmt: skip
        inbox, journal = self.shared.ownership.inbox, self.shared.store.journal
        key = rec.decided_key(self.record.id, wait_id)
        while True:
            mail, row = await self.log.read(lambda: (inbox.of(self.record.id), journal.get(key)))
            self.arrivals.hear(mail)
            self.arrivals.admit(wait_id)
            if row is not None and not (decided := unpack(self.log.signer, key, row, Decided)).given_up:
                return decided, found.result().key if found.done() else ""
            if row is not None:
                await self._forget(key)
                continue
            if policy in ("approve", "reject"):
                await self._decide(key, Decided(policy == "approve", APPROVALS, self.now_s()))
            elif not await self._pause(timer, path, found, patience):
                await self._decide(key, Decided(False, "", self.now_s(), timed_out=True))

    async def _forget(self, key: str) -> None:
        """A wait that was given up is asked for again: the run was resumed before that."""
        if await self.log.commit(deletes=(key,)) is Verdict.GUARD_FAILED:
            raise self.lost()

    async def _decide(self, key: str, decided: Decided) -> None:
        """Settle an approval here, unless somebody was faster: the row tells."""
        if await self.log.commit(inserts=(self.log.pack(key, decided),)) is Verdict.GUARD_FAILED:
            raise self.lost()

    async def _pause(self, timer: Timer, path: str, found: asyncio.Future[Received], patience: Patience | None) -> bool:
        """Return when something has come, or when the time is over; has it come?"""
        clock = self.shared.clock
        began, is_told = clock.now(), False
        while not found.done() and isinstance(left := decide_sleep(timer, clock.now()), Wait):
            wake_at = self.now_s() + left.seconds
            self.facts.update(path, status=Status.WAITING, started_at=timer.since.wall_s, wake_at=wake_at)
            rest_s = left.seconds
            if patience is not None:
                rest_s = min(rest_s, patience.seconds - elapsed_s(began, clock.now()))
                if rest_s <= 0:
                    patience.give_up(left.seconds)
                if not is_told:
                    patience.begins(left.seconds)
                    is_told = True
            await clock.listen(rest_s, found, self.shared.is_any_at_work)
        return found.done()

    async def close(self) -> None:
        """The code is done, and the bodies are: close what they have had in common."""
        while self.closing:
            await self.closing.pop()()

    def lost(self) -> LeaseLost:
        """What is raised where another process owns the run."""
        hint = self.wording.resume_hint
        return LeaseLost(
            f"{self.wording.label} was taken over by another process; what was acknowledged before is safe, this commit was "
            f"refused. {hint[0].upper()}{hint[1:]} to attach to it"
        )

    def leave(self, status: Status) -> None:
        """The execution is over here; what it comes to may still be written down."""
        self.status, self.ended_at = status, self.now_s()
        self.performer.is_over = True
        self.shared.ownership.active.pop(self.record.id, None)
        self.facts.interrupt()
        self.shared.savings.write()

    async def finish(self, status: Status, *, error: str = "", result: Result | None = None, **changes: Any) -> None:
        """Write down how the execution ended. A completed or cancelled run is closed; any other can be resumed.

        changes  of the run's record, beside status and time
        """
        ownership, run_id = self.shared.ownership, self.record.id
        ownership.changing.add(run_id)
        self.error = rec.plain(error) or None
        self.leave(status)
        self.reporting.release()
        self.reporting.write()
        try:
            for key in self.shared.left_over(run_id):  # bodies of an earlier execution that this one did not ask for
                body = self.shared.bodies.pop(key)
                owner, body.owner = body.owner, None
                if owner is not None:
                    owner(body)
            is_over = status is not Status.INTERRUPTED
            record = replace(
                self.record,
                status=status.value if is_over else Status.RUNNING.value,
                ended_at=self.ended_at if is_over else None,
                error=rec.plain(error) if is_over else "",
                **changes,
            )
            is_at_work = self.shared.is_at_work(run_id)
            closes = status in (Status.COMPLETED, Status.CANCELLED)
            verdict = await self.log.end(record, result, closes=closes, is_at_work=is_at_work)
            if not is_at_work:
                ownership.lose(self.held)
        finally:
            ownership.changing.discard(run_id)
        if verdict is not Verdict.APPLIED:
            raise self.lost()


def timer_of(request: WaitRequest, since: Instant) -> Timer:
    """What is recorded of a sleep that was first asked for then."""
    if isinstance(request.wake, datetime):
        return Timer(request.name, since, 0.0, request.wake.timestamp(), kind=request.kind, of=request.of)
    return Timer(request.name, since, request.wake.total_seconds(), kind=request.kind, of=request.of)


def of_this_boot(timer: Timer, now: Instant) -> Timer:
    """A sleep that began in another boot: from here on this boot's clock decides, since a wall clock that was set back must not
    make the wait longer again."""  # fmt: skip
    if timer.until_s is not None or timer.since.boot == now.boot:
        return timer
    return replace(timer, since=now, duration_s=remaining_s(timer.since, timer.duration_s, now))
