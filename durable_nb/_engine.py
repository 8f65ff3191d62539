"""The embedded engine: which runs this process executes, and by what right.

A run has one executor. Who may write for it is told by its lease's row, which every commit is conditional on; who of
several processes is alive, by an OS lock that frees itself at death. A dead owner is succeeded at once, a live one never.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import secrets
from collections import defaultdict
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from durable_nb import _records as rec
from durable_nb._adoption import Origin, exists_beside, may_adopt
from durable_nb._attempt import Attempt
from durable_nb._cellrun import CellRun
from durable_nb._clock import Clock, SystemClock
from durable_nb._facts import Status
from durable_nb._journal import Commit, Verdict
from durable_nb._muting import Muting
from durable_nb._records import Cancel, Generation, Lease, RunRecord, pack, unpack
from durable_nb._request import Changed
from durable_nb._run import Held, Run, Work
from durable_nb._savings import Savings
from durable_nb._store import Store
from durable_nb._workers import Workers
from durable_nb._workflow_loop import WorkflowLoop
from durable_nb._workflowrun import WorkflowRun
from durable_nb.errors import StoreError, UntrustedStoreError

WATCH_S = 0.5
"""How soon a process hears that a run of its was cancelled or taken over by another, where it doesn't find out itself."""


@dataclass(frozen=True, slots=True)
class Asked:
    """An execution of a cell."""

    owner: str
    """What its steps belong to: the cell's name, or what stands for one."""
    inputs: str
    """Digest of its code and of what it reads."""
    label: str = ""
    """How messages call it, where not so."""
    rerun: bool = False
    rerun_step: str = ""
    origin: Origin = field(default_factory=Origin)

    @property
    def scope(self) -> str:
        """The cell in the journal's keys."""
        return rec.scope_of(self.owner)


class Engine:
    """All runs of one store in this process."""

    def __init__(self, store: Store, *, clock: Clock | None = None, jitter: Callable[[], float] = random.random) -> None:
        self.store = store
        self.clock = clock or SystemClock()
        self.jitter = jitter
        self.workers = Workers()
        self.savings = Savings(store)
        self.held: dict[str, Held] = {}
        self.active: dict[str, Run | WorkflowRun] = {}
        self.changing: set[str] = set()
        """Runs that are being claimed or ended: their leases are not to be given away meanwhile."""
        self.works: dict[str, Work] = {}
        """Attempts that are being made now, by their outcome's key; some outlive the execution that began them."""
        self.bodies: dict[str, Attempt] = {}
        """Bodies of workflows' steps that are at work now, by their idempotency key; threads outlive an execution."""
        self.workflows: Any = None
        """What starts and finds the runs of workflows of this store, and awaits them."""
        self._awaited: dict[str, _Awaited] = {}
        """Runs that other processes execute, and that somebody here waits for."""
        self.muting: Callable[[], Muting] = Muting
        """What keeps a repeated workflow from showing again what it showed."""
        self._kept: set[asyncio.Task[Any]] = set()
        self.changed: defaultdict[str, list[Changed]] = defaultdict(list)
        """By scope: steps of unfinished runs that have changed live objects of this kernel, in order."""
        store.writer.expected = lambda: len(self.works) + len(self.bodies)
        self.watching: asyncio.Task[None] | None = None

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Let a task that nobody awaits come to its end."""
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)

    def pack(self, key: str, record: rec.Record) -> tuple[str, bytes]:
        """A record as the row that a commit takes."""
        return key, pack(self.store.seal, key, record)

    async def begin(self, asked: Asked) -> CellRun | None:
        """A run of that cell with those inputs: its unfinished one, or a new one.

        None where a live process is executing the cell with the same inputs: wait for its entry. With `rerun`, steps are
        counted from a new generation, unless the unfinished run is itself such a rerun whose kernel died; with `rerun_step` the
        steps of that name are, likewise. LookupError where the cell has recorded no step of that name.
        """
        while True:
            found = await self.store.writer.call(lambda: self._unfinished(asked.scope, forgiving=asked.rerun))
            if any(run.inputs == asked.inputs and self.is_owned(run.id, lease) for run, lease in found.runs):
                return None
            adopted = self._adopted(asked, found)
            starting = adopted[0].id if adopted else new_id()
            self.changing.add(starting)
            run = None
            try:
                run = await self._claim(asked, found, adopted, starting)
                if run is None:
                    continue
                await run.load()
                died = adopted is not None and self._died(adopted[1])
                if asked.rerun_step and not (died and adopted and adopted[0].rerun_step == asked.rerun_step):
                    await run.forget_step(asked.rerun_step)
            except BaseException:
                if run is not None:
                    run.abandon()
                raise
            finally:
                self.changing.discard(starting)
            return run

    def _adopted(self, asked: Asked, found: _Unfinished) -> tuple[RunRecord, Lease] | None:
        """The unfinished run that the cell goes on with: of those that nobody executes, and that it may adopt, one of its own
        notebook before others, with these inputs before others, the newest."""  # fmt: skip
        asking = replace(asked.origin, process=self.store.process.id)
        free = [
            (run, lease)
            for run, lease in found.runs
            if run.generation == found.generation
            and not self.is_owned(run.id, lease)
            and may_adopt(run.origin, asking, functools.partial(exists_beside, self.store.path))
        ]
        adopted = max(
            free,
            key=lambda pair: (
                pair[0].origin.notebook == asking.notebook,
                pair[0].inputs == asked.inputs,
                pair[0].started_at,
            ),
            default=None,
        )
        if asked.rerun and adopted and not (adopted[0].rerun and self._died(adopted[1])):
            return None
        return adopted

    def _died(self, lease: Lease) -> bool:
        """Was its owner killed, and didn't let go of it itself?"""
        return lease.owner not in ("", self.store.process.id)

    async def close_finished(self, asked: Asked) -> None:
        """Close a run that was killed between storing its cell's entry and saying that it was complete.

        Left open, its timers would count for the next inputs. There is hardly ever one, and a hit waits for this look: it is
        made here, not on the writer's thread.
        """
        if not self.store.journal.scan(rec.open_prefix(asked.scope)):
            return
        found = await self.store.writer.call(lambda: self._unfinished(asked.scope))
        for run, lease in found.runs:
            if run.inputs == asked.inputs and not self.is_owned(run.id, lease):
                claimed = await self._claim(asked, found, (run, lease), run.id)
                if claimed is not None:
                    await claimed.finish(Status.COMPLETED)

    def _unfinished(self, scope: str, *, forgiving: bool = False) -> _Unfinished:
        """Runs on the writer's thread. What somebody else signed counts as not there, but for the steps: they are refused when
        they are asked for. `forgiving`: nor does what can't be read, since all is made anew."""  # fmt: skip
        journal, seal = self.store.journal, self.store.seal
        ignored = StoreError if forgiving else UntrustedStoreError
        runs = []
        for key, _ in journal.scan(rec.open_prefix(scope)):
            with contextlib.suppress(ignored):
                found = self.read_run(key.rsplit("/", 1)[1])
                if found is not None and found[1] is not None and not self._was_cancelled(*found):
                    runs.append((found[0], found[1]))
        row = journal.get(rec.generation_key(scope))
        try:
            generation = unpack(seal, rec.generation_key(scope), row, Generation).number if row else 0
        except ignored:
            used = [int(key.split("/")[2]) for key, _ in journal.scan(f"step/{scope}/")]
            generation = max(used, default=0)
        return _Unfinished(generation, row, runs)

    def _was_cancelled(self, run: RunRecord, lease: Lease | None) -> bool:
        """Was it cancelled while nobody executed it, or its executor killed before hearing of it?"""
        return self.store.journal.get(rec.cancel_key(run.id)) is not None and not self.is_owned(run.id, lease)

    async def _claim(
        self, asked: Asked, found: _Unfinished, adopted: tuple[RunRecord, Lease] | None, new: str
    ) -> CellRun | None:
        """Become the one executor of a cell's run; None where another was faster.

        A new run is begun only while the cell's `generation` row is as it was read, and changes it: of two that find nothing
        to adopt at the same moment, one begins, and the other looks again.
        """
        origin = replace(asked.origin, process=self.store.process.id)
        if adopted:
            record = replace(adopted[0], inputs=asked.inputs, status="running", ended_at=None, error="", origin=origin)
            held = await self.claim(record, adopted[1])
        else:
            generation = found.generation + asked.rerun
            began = self.clock.now().wall_s
            of = "cell", asked.label or asked.owner, asked.scope, generation, asked.inputs, began
            record = RunRecord(new, *of, rerun=asked.rerun, origin=origin)
            begun = Generation(generation, record.id)
            held = await self.claim(record, None, first=(rec.generation_key(asked.scope), found.counter, begun))
        return CellRun(self, record, held, resumed=adopted is not None) if held else None

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

    def claim_and_wait(self, record: RunRecord, row: tuple[str, bytes]) -> Held | None:
        """A new run, for synchronous code: its record and `row` are on disk when this returns. None: there is one of that id.

        That there is no lease doesn't say so: another process may have started the run meanwhile, and completed it.
        """
        commit, held = self._claiming(record, None, (), None)
        key = rec.run_key(record.id)
        new = tuple(row for row in commit.puts if row[0] == key)
        commit = replace(commit, inserts=new, puts=(row, *(row for row in commit.puts if row[0] != key)))
        return self._claimed(held, self.store.writer.commit_and_wait(commit))

    def _claiming(
        self,
        record: RunRecord,
        lease: Lease | None,
        deletes: tuple[str, ...],
        first: tuple[str, bytes | None, Generation] | None,
    ) -> tuple[Commit, Held]:
        lease_key, open_key = rec.lease_key(record.id), rec.open_prefix(record.scope) + record.id
        before = pack(self.store.seal, lease_key, lease) if lease else None
        held = self.held.get(record.id)
        if held is None or held.row != before:  # else ours already: a body of an earlier execution still writes under it
            new = Lease(lease.epoch + 1 if lease else 1, self.store.process.id)
            held = Held(record.id, new.epoch, pack(self.store.seal, lease_key, new))
        puts = [
            (lease_key, held.row),
            self.pack(rec.run_key(record.id), record),
            (open_key, self.store.seal.close(open_key, b"")),
        ]
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

    def disown(self, run_id: str) -> None:
        """Give up a run that was begun and is not executed, after whatever was handed over."""
        self.held.pop(run_id, None)
        key = rec.lease_key(run_id)
        mine, free = (self.pack(key, Lease(1, owner)) for owner in (self.store.process.id, ""))
        with contextlib.suppress(StoreError):
            self.store.writer.commit_and_wait(Commit(mine, puts=(free,)))

    def read_run(self, run_id: str) -> tuple[RunRecord, Lease | None] | None:
        """A run and its lease, as they stand in the journal."""
        journal, seal = self.store.journal, self.store.seal
        lease_row = journal.get(rec.lease_key(run_id))
        row = journal.get(rec.run_key(run_id))
        if row is None:
            return None
        if lease_row != journal.get(rec.lease_key(run_id)):  # it changed hands or ended between the two: look again
            return self.read_run(run_id)
        lease = unpack(seal, rec.lease_key(run_id), lease_row, Lease) if lease_row else None
        return unpack(seal, rec.run_key(run_id), row, RunRecord), lease

    def is_owned(self, run_id: str, lease: Lease | None) -> bool:
        """Does a live process, this one or another, execute the run?"""
        if lease is None:
            return False
        return (
            run_id in self.active or run_id in self.changing
            if lease.owner == self.store.process.id
            else self.store.process.is_alive(lease.owner)
        )

    def let_go(self, run_id: str) -> asyncio.Future[Verdict] | None:
        """Give a run that nothing here works on any more to whoever wants it: an interrupted one whose last thread has ended,
        or whose end could not be written."""  # fmt: skip
        held = self.held.get(run_id)
        if held is None or run_id in self.active or run_id in self.changing or self.store.writer.closed:
            return None
        if any(work.run_id == run_id and not work.task.done() for work in self.works.values()):
            return None
        if any(body.run_id == run_id for body in self.bodies.values()):
            return None
        row = self.pack(rec.lease_key(run_id), Lease(held.epoch, ""))
        given = self.store.writer.commit(Commit(held.guard, puts=(row,)))
        given.add_done_callback(lambda done: self._let_go(held, done))
        return given

    def _let_go(self, held: Held, done: asyncio.Future[Verdict]) -> None:
        if not done.cancelled() and done.exception() is None and self.held.get(held.run_id) is held:
            del self.held[held.run_id]

    def watch(self) -> None:
        """Look for what other processes want of the runs that are executed here, for as long as there are any."""
        loop = asyncio.get_running_loop()
        if type(loop) is WorkflowLoop:
            loop = loop.carrier
        if self.watching is None or self.watching.done() or self.watching.get_loop() is not loop:
            self.watching = loop.create_task(self._watch_on(), context=Context(), name="durable_nb watch")

    async def _watch_on(self) -> None:
        while (self.held or self._awaited) and not self.store.writer.closed:
            await asyncio.sleep(WATCH_S)
            with contextlib.suppress(StoreError):  # whoever needs the disk is told; here it is tried again
                for run_id in list(self.held):
                    self.let_go(run_id)
                runs = list(self.active.values())
                awaited = dict(self._awaited)
                for run, lease, cancel in await self.store.writer.call(functools.partial(self._news, runs)):
                    if self.active.get(run.id) is run:
                        run.hear(lease, cancel)
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
                owner = unpack(self.store.seal, rec.lease_key(run_id), row, Lease).owner if row else ""
            if owner not in alive:
                alive[owner] = owner != self.store.process.id and self.store.process.is_alive(owner)
            if not alive[owner] or journal.get(rec.run_key(run_id)) != seen.row:
                changed.append(run_id)
        return changed

    def _news(self, runs: list[Run | WorkflowRun]) -> list[tuple[Run | WorkflowRun, bytes | None, Cancel | None]]:
        journal = self.store.journal
        rows = dict(journal.scan(rec.cancel_key("")))
        cancels = {}
        for key, row in rows.items():
            with contextlib.suppress(StoreError):  # one that can't be read is of no other run's concern
                cancels[key] = unpack(self.store.seal, key, row, Cancel)
        return [(run, journal.get(rec.lease_key(run.id)), cancels.get(rec.cancel_key(run.id))) for run in runs]


@dataclass(slots=True)
class _Awaited:
    row: bytes | None
    """The run's record, when it was looked at last."""
    waiters: list[asyncio.Future[None]] = field(default_factory=list)


def new_id() -> str:
    """A run's id: when it began, and some randomness."""
    return f"{datetime.now().astimezone():%y%m%d-%H%M%S}-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class _Unfinished:
    generation: int
    counter: bytes | None
    """The row that holds it, and changes with every run that is begun."""
    runs: list[tuple[RunRecord, Lease]]
