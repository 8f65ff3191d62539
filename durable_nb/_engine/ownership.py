"""Which runs this process executes, and by what right: claiming a run, releasing it, and watching what others want of it.

A run has one executor. Who may write for it is told by its lease's row, which every commit is conditional on; who of several
processes is alive, by an OS lock that frees itself at death. A dead owner is succeeded at once, a live one never.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Container
from contextvars import Context
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from durable_nb import _records as rec
from durable_nb._engine.arrivals import Wait
from durable_nb._engine.inbox import Inbox, Received
from durable_nb._engine.run_log import Held
from durable_nb._engine.workflow_loop import WorkflowLoop
from durable_nb._facts import Snapshot, Status
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Generation, Lease, Restart, Resume, RunRecord, pack, unpack
from durable_nb._store import Store
from durable_nb.errors import StoreError

WATCH_S = 0.5
"""How soon a process hears what others want of its runs, and that one was taken over, where it doesn't find out itself."""

LISTEN_S = 0.2
"""The same where a run waits for an event or a decision: it has it within half a second, and the looks take 0.3 % of a core."""


class Executed(Protocol):
    """A run that is being executed here."""

    id: str

    @property
    def waits(self) -> tuple[Wait, ...]:
        """Its waits for events and decisions."""
        ...

    @property
    def given_up(self) -> Container[str]:
        """Those that its code has given up."""
        ...

    @property
    def heard(self) -> Container[str]:
        """Keys of the messages that it has heard of."""
        ...

    @property
    def event_ids(self) -> set[str]:
        """The events that it waits for."""
        ...

    def standing(self) -> Status:
        """How it stands now."""
        ...

    def snapshot(self) -> Snapshot:
        """How it and its steps stand now."""
        ...

    def reported(self) -> dict[str, Any]:
        """What its code has reported."""
        ...

    def die(self) -> None:
        """End as a kill would."""
        ...

    def hear(self, lease: bytes | None, inbox: list[Received]) -> None:
        """What stands in the journal: the row of its lease, what others want of it, and the events that it waits for."""
        ...

    def hear_soon(self, inbox: list[Received]) -> None:
        """The same of its inbox, from any thread."""
        ...


@dataclass(slots=True)
class _Awaited:
    row: bytes | None
    """The run's record, when it was looked at last."""
    waiters: list[asyncio.Future[None]] = field(default_factory=list)


class Ownership:
    """The leases that this process holds, and the runs that it executes under them."""

    def __init__(self, store: Store, is_at_work: Callable[[str], bool]) -> None:
        """`is_at_work`: does a body of that run still live, or is being recorded?"""
        self.store, self._is_at_work = store, is_at_work
        self.inbox = Inbox(store)
        self.held: dict[str, Held] = {}
        self.active: dict[str, Executed] = {}
        self.changing: set[str] = set()
        """Runs that are being claimed or ended: their leases are not to be given away meanwhile."""
        self._awaited: dict[str, _Awaited] = {}
        """Runs that other processes execute, and that somebody here waits for."""
        self.takes: Callable[[str], None] | None = None
        """Where this process executes workflows: told of a run that nobody executes, and that somebody wants executed."""
        self.waiting_row: Callable[[RunRecord], tuple[str, bytes]]
        """What shows that a run waits for its limit."""
        self.watching: asyncio.Task[None] | None = None
        """The look that is being taken."""
        self._watched_on: asyncio.AbstractEventLoop | None = None

    def pack(self, key: str, record: rec.Record) -> tuple[str, bytes]:
        """A record as the row that a commit takes."""
        return key, pack(self.store.signer, key, record)

    # -- claiming ------------------------------------------------------------------------------------------------------

    async def claim(
        self,
        record: RunRecord,
        lease: Lease | None,
        *,
        deletes: tuple[str, ...] = (),
        inserts: tuple[tuple[str, bytes], ...] = (),
        first: tuple[str, bytes | None, Generation] | None = None,
    ) -> Held | None:
        """Take a run whose lease is `lease` (None: a new run), and write its record; None where another was faster.

        Who held the lease before has its commits refused from here on. `first`: a row that must still hold these bytes, and
        what it shall hold then, instead of the lease's row.
        """
        commit, held = self._claiming(record, lease, deletes, first)
        return self._claimed(held, await self.store.writer.commit(replace(commit, inserts=inserts)))

    def claim_and_wait(self, records: list[RunRecord], rows: list[tuple[str, bytes]]) -> list[Held]:
        """New runs, for synchronous code: their records and `rows` are on disk when this returns, by one commit. Empty, and
        nothing is written, where there is a run of one of these ids.

        That there is no lease doesn't say so: another process may have started the run meanwhile, and completed it.
        """
        inserts, puts, held = list[tuple[str, bytes]](), list(rows), list[Held]()
        for record in records:
            commit, mine = self._claiming(record, None, (), None)
            held.append(mine)
            for row in commit.puts:
                (inserts if row[0] == rec.run_key(record.id) else puts).append(row)
        verdict = self.store.writer.commit_and_wait(Commit(inserts=tuple(inserts), puts=tuple(puts)))
        return [mine for mine in held if self._claimed(mine, verdict) is not None]

    def claim_for_nobody(
        self,
        record: RunRecord,
        lease: Lease | None,
        *,
        deletes: tuple[str, ...] = (),
        inserts: tuple[tuple[str, bytes], ...] = (),
    ) -> bool:
        """Write a run's record as a claim does, and leave the run to whoever claims it; for synchronous code. False where
        another was faster."""  # fmt: skip
        commit, held = self._claiming(record, lease, deletes, None)
        free = self.pack(rec.lease_key(record.id), Lease(held.epoch, ""))
        puts = (free, *(row for row in commit.puts if row[0] != free[0]))
        verdict = self.store.writer.commit_and_wait(replace(commit, puts=puts, inserts=inserts))
        return verdict is Verdict.APPLIED

    def reserve(self, run_id: str) -> Lease | None:
        """Own a run that nobody executes, and don't execute it, so that nobody begins to; for synchronous code. Its lease, and
        nothing is done, where somebody does."""  # fmt: skip
        key = rec.lease_key(run_id)
        row = self.store.journal.get(key)
        lease = unpack(self.store.signer, key, row, Lease) if row else None
        if not self._is_at_work(run_id) and not self.is_owned(run_id, lease):
            mine = self.pack(key, Lease(lease.epoch + 1 if lease else 1, self.store.process.id))
            if self.store.writer.commit_and_wait(Commit((key, row), puts=(mine,))) is Verdict.APPLIED:
                return None
        return lease or Lease(0, "")

    def _claiming(
        self,
        record: RunRecord,
        lease: Lease | None,
        deletes: tuple[str, ...],
        first: tuple[str, bytes | None, Generation] | None,
    ) -> tuple[Commit, Held]:
        lease_key, open_key = rec.lease_key(record.id), rec.open_prefix(record.scope) + record.id
        before = pack(self.store.signer, lease_key, lease) if lease else None
        held = self.held.get(record.id)
        if held is None or held.row != before:  # else ours already: a body of an earlier execution still writes under it
            new = Lease(lease.epoch + 1 if lease else 1, self.store.process.id)
            held = Held(record.id, new.epoch, pack(self.store.signer, lease_key, new))
        puts = [
            (lease_key, held.row),
            self.pack(rec.run_key(record.id), record),
            (open_key, self.store.signer.sign(open_key, b"")),
        ]
        if record.limit and record.since_s >= 0:  # from now on none that is started later overtakes it
            puts.append(self.waiting_row(record))
        guard = lease_key, before
        if first is not None:
            key, wanted, then = first
            guard = key, wanted
            puts.append(self.pack(key, then))
        return Commit(guard, puts=tuple(puts), deletes=deletes), held

    def _claimed(self, held: Held, verdict: Verdict) -> Held | None:
        if verdict is not Verdict.APPLIED:
            return None
        self.held[held.run_id] = held
        if asyncio._get_running_loop() is not None:
            self.watch()
        return held

    def holds(self, held: Held) -> bool:
        """Is it still this that the run is written under here?"""
        return self.held.get(held.run_id) is held

    def is_owned(self, run_id: str, lease: Lease | None) -> bool:
        """Does a live process, this one or another, execute the run?"""
        if lease is None:
            return False
        return (
            run_id in self.active or run_id in self.changing
            if lease.owner == self.store.process.id
            else self.store.process.is_alive(lease.owner)
        )

    def read_run(self, run_id: str) -> tuple[RunRecord, Lease | None] | None:
        """A run and its lease, as they stand in the journal."""
        journal, signer = self.store.journal, self.store.signer
        lease_row = journal.get(rec.lease_key(run_id))
        row = journal.get(rec.run_key(run_id))
        if row is None:
            return None
        if lease_row != journal.get(rec.lease_key(run_id)):  # it changed hands or ended between the two: look again
            return self.read_run(run_id)
        lease = unpack(signer, rec.lease_key(run_id), lease_row, Lease) if lease_row else None
        return unpack(signer, rec.run_key(run_id), row, RunRecord), lease

    # -- releasing -----------------------------------------------------------------------------------------------------

    def disown(self, run_id: str) -> None:
        """Give up a run that was begun and is not executed, after whatever was handed over."""
        self.held.pop(run_id, None)
        key = rec.lease_key(run_id)
        mine, free = (self.pack(key, Lease(1, owner)) for owner in (self.store.process.id, ""))
        with contextlib.suppress(StoreError):
            self.store.writer.commit_and_wait(Commit(mine, puts=(free,)))

    def lose(self, held: Held) -> None:
        """Another process owns the run."""
        if self.holds(held):
            del self.held[held.run_id]

    def let_go(self, run_id: str) -> asyncio.Future[Verdict] | None:
        """Give a run that nothing here works on any more to whoever wants it: an interrupted one whose last thread has ended,
        or whose end could not be written."""  # fmt: skip
        held = self.held.get(run_id)
        if held is None or run_id in self.active or run_id in self.changing or self.store.writer.closed:
            return None
        if self._is_at_work(run_id):
            return None
        row = self.pack(rec.lease_key(run_id), Lease(held.epoch, ""))
        given = self.store.writer.commit(Commit(held.guard, puts=(row,)))
        given.add_done_callback(lambda done: self._let_go(held, done))
        return given

    def _let_go(self, held: Held, done: asyncio.Future[Verdict]) -> None:
        if not done.cancelled() and done.exception() is None:
            self.lose(held)

    # -- watching ------------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Look for what other processes want of the runs that are executed here, and of nobody's runs, for as long as there is
        any, or this process executes workflows."""  # fmt: skip
        loop = asyncio.get_running_loop()
        if type(loop) is WorkflowLoop:
            loop = loop.carrier
        if self._watched_on is not loop:
            self._watched_on = loop
            loop.call_later(WATCH_S, self._tick, loop, context=Context())

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        # A timer, and a task for the moment of a look: a loop that ends with a task that waits complains of it.
        if self._watched_on is not loop:
            return
        if self.store.writer.closed or not (self.held or self._awaited or self.takes):
            self._watched_on = None
            return
        self.watching = loop.create_task(self._look(), name="durable_nb watch")
        self.watching.add_done_callback(lambda _: loop.call_later(self._pause_s(), self._tick, loop))

    def _pause_s(self) -> float:
        return LISTEN_S if any(run.waits for run in list(self.active.values())) else WATCH_S

    async def _look(self) -> None:
        with contextlib.suppress(StoreError):  # whoever needs the disk is told; here it is tried again
            for run_id in list(self.held):
                self.let_go(run_id)
            runs = list(self.active.values())
            awaited = dict(self._awaited)
            asked = {run.id: (run.event_ids, run.heard) for run in runs}
            inboxes, leases, events = await self.store.writer.call(functools.partial(self._news, asked))
            for run in runs:
                if self.active.get(run.id) is run:  # not ended meanwhile
                    run.hear(leases[run.id], [*inboxes.get(run.id, ()), *events[run.id]])
            if self.takes is not None:
                for run_id, inbox in inboxes.items():
                    if run_id not in self.active and any(isinstance(one.message, Resume | Restart) for one in inbox):
                        self.takes(run_id)
            if awaited:
                for run_id in await self.store.writer.call(functools.partial(self._changed_of, awaited)):
                    for waiting in self._awaited.pop(run_id).waiters:
                        if not waiting.done():
                            waiting.set_result(None)

    async def change_of(self, run_id: str) -> None:
        """Return when a run that another process executes has ended, or when that process has."""
        seen = self._awaited.setdefault(run_id, _Awaited(self.store.journal.get(rec.run_key(run_id))))
        waiting = asyncio.get_running_loop().create_future()
        seen.waiters.append(waiting)
        self.watch()
        await waiting

    def _changed_of(self, awaited: dict[str, _Awaited]) -> list[str]:
        """Which of the runs have ended, or lost their owner. One look for all of them."""
        journal, alive = self.store.journal, dict[str, bool]()
        leases = dict(journal.scan(rec.lease_key("")))
        changed = []
        for run_id, seen in awaited.items():
            row = leases.get(rec.lease_key(run_id))
            owner = ""
            with contextlib.suppress(StoreError):
                owner = unpack(self.store.signer, rec.lease_key(run_id), row, Lease).owner if row else ""
            if owner not in alive:
                alive[owner] = owner != self.store.process.id and self.store.process.is_alive(owner)
            if not alive[owner] or journal.get(rec.run_key(run_id)) != seen.row:
                changed.append(run_id)
        return changed

    def _news(
        self, asked: dict[str, tuple[set[str], Container[str]]]
    ) -> tuple[dict[str, list[Received]], dict[str, bytes | None], dict[str, list[Received]]]:
        """What is in all inboxes; of these runs the rows of the leases, and the events of these ids that they don't know."""
        leases = {run_id: self.store.journal.get(rec.lease_key(run_id)) for run_id in asked}
        return self.inbox.all(), leases, {run_id: self.inbox.events(*of) for run_id, of in asked.items()}
