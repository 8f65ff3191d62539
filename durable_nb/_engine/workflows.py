"""The embedded engine's side of workflows: starting their runs, attaching to them, going on with them.

A run is found by its id. Whoever starts one under an id that is used already gets that run: a double click buys once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import sys
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from durable_nb import _codec
from durable_nb import _records as rec
from durable_nb._clock import elapsed_s
from durable_nb._current import (
    Limit,
    SendRequest,
    StartRequest,
    WorkflowOptions,
    current_body,
    current_run,
    use_engine,
    workflow_functions,
    workflow_options,
)
from durable_nb._engine.branches import current_branch
from durable_nb._engine.by_history import Row, deliveries_of, set_aside
from durable_nb._engine.catalog import Catalog
from durable_nb._engine.control import delete, fork_of
from durable_nb._engine.engine import Engine, new_id
from durable_nb._engine.events import Events
from durable_nb._engine.execution import UNWIND_S
from durable_nb._engine.inbox import Received, Restarted, outlasts, up_to_restart, wish
from durable_nb._engine.limits import next_place
from durable_nb._engine.observing import Observers, log
from durable_nb._engine.run_log import BLOB_BYTES, Held, read_log
from durable_nb._engine.run_time import due_in_s
from durable_nb._engine.schedules import Schedules
from durable_nb._engine.webhooks import Webhooks
from durable_nb._engine.workflow_loop import WorkflowLoop
from durable_nb._engine.workflow_run import WorkflowRun
from durable_nb._events import Delivery, Waiter
from durable_nb._facts import Snapshot, Status, Used
from durable_nb._fingerprint import Unhashable, hash_value
from durable_nb._records import Arguments, Cancel, Event, Lease, Message, Restart, Result, Resume, RunRecord, unpack
from durable_nb._store import Store
from durable_nb.errors import (
    CorruptStoreError,
    DurableError,
    LeaseLost,
    NotSupportedError,
    RunCancelled,
    RunConflictError,
    StoreError,
    UnserializableError,
)

_UNDONE = frozenset((Status.FAILED, Status.CANCELLED))


class Workflows:
    """Implements `_current.Engine` on one store. Its calls may come from any thread."""

    def __init__(self, engine: Engine, main: Callable[[], str] | None = None) -> None:
        """`main`: what tells apart the workflows that the module `__main__` defines; None: the script's path."""
        self.engine = engine
        self._shared, self._store, self._ownership = engine.shared, engine.store, engine.ownership
        self._main = main or _script
        self._tasks: dict[str, asyncio.Task[Any] | None] = {}
        """Runs that are executed here; None: the task is about to be made, on the loop's thread."""
        self._loop: asyncio.AbstractEventLoop | None = None
        """Where runs are executed that are started from another thread."""
        with contextlib.suppress(RuntimeError):
            self._loop = _carrier(asyncio.get_running_loop())
        self.catalog = Catalog(self._shared, self._tasks.__contains__)
        self.events = self._shared.events = Events(self._shared, self.catalog)
        self.schedules = Schedules(self)
        self.webhooks = Webhooks(self._shared, self.events)
        self._shared.workflows = self
        self._ownership.takes = self.take
        if self._loop is not None:
            self._ownership.watch()

    @property
    def store_id(self) -> str:
        return self._store.id

    @property
    def running_loop(self) -> asyncio.AbstractEventLoop | None:
        return self._loop if self._loop is not None and self._loop.is_running() else None

    def execute_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Runs that other threads start are executed on this loop, which is the running one."""
        self._loop = _carrier(loop)
        self._ownership.watch()

    # -- starting ------------------------------------------------------------------------------------------------------

    def start(self, request: StartRequest, parent: str = "") -> str:
        return self.start_many([request], parent)[0]

    def start_many(self, requests: list[StartRequest], parent: str = "") -> list[str]:
        starts = [
            _Start(request, *_encoded(request.workflow, request.args, request.kwargs), request.run_id or new_id())
            for request in requests
        ]
        while True:
            known = [(start, found) for start in starts if (found := self._known(start)) is not None]
            for start, found in known:
                self._check_conflict(*found, start)
            there = {start.run_id for start, _ in known}
            new = {start.run_id: start for start in reversed(starts) if start.run_id not in there}
            for start in starts:
                first = new.get(start.run_id)
                if first is not None and (first.request.workflow, first.inputs) != (start.request.workflow, start.inputs):
                    raise _conflict(start.run_id, "the same list, with other arguments")
            # Others may have started one of them in this very moment: then nothing was begun, and it is looked again.
            if not new or self._begin(list(reversed(new.values())), parent):
                for start, found in known:
                    self._attach(*found, start.request.on_conflict)
                return [start.run_id for start in starts]

    def _known(self, start: _Start) -> tuple[RunRecord, Lease | None] | None:
        return self.catalog.seen(start.run_id) if start.request.run_id is not None else None

    def _begin(self, starts: list[_Start], parent: str) -> bool:
        """Record new runs, and execute them; False, and none is recorded, where there is one of such an id."""
        now = self._shared.clock.now()
        records, rows = [], []
        for start in starts:
            self._loop_for(start.run_id)  # before anything is recorded
            request, arguments = start.request, start.arguments
            scope = rec.scope_of(f"~run {start.run_id}")
            home = self.home_of(workflow_functions.get(request.workflow))
            of = start.run_id, "workflow", request.workflow, scope, 0, start.inputs, now.wall_s
            record = RunRecord(*of, labels=request.labels, home=home, parent=parent, since=now, since_s=-request.delay_s)
            record = replace(record, is_invoked=request.is_invoked)
            records.append(self._limited(record, request.limit, request.limit_key) if request.limit is not None else record)
            if len(arguments.value) >= BLOB_BYTES:
                arguments = replace(arguments, value=b"", blob=self._store.journal.put_blob(arguments.value))
            rows.append(self._ownership.pack(rec.arguments_key(start.run_id), arguments))
        return self._begin_recorded(records, rows)

    def _begin_recorded(self, records: list[RunRecord], rows: list[tuple[str, bytes]]) -> bool:
        """The same, of runs whose records these are, and of `rows` beside."""
        try:
            held = self._ownership.claim_and_wait(records, rows)
            for record, mine in zip(records, held, strict=False):
                self._spawn(record.id, functools.partial(self._execute, record, mine))
        except BaseException:  # a KeyboardInterrupt: what was begun is nobody's, and can be resumed
            for record in records:
                if record.id not in self._tasks:
                    self._ownership.disown(record.id)
            raise
        return bool(held)

    def _limited(self, record: RunRecord, limit: Limit, key: str) -> RunRecord:
        above: RunRecord | None = record
        while above is not None and above.is_invoked and limit.concurrency is not None:  # who invokes waits for the end
            found = self.catalog.seen(above.parent)
            above = found[0] if found is not None else None
            if above is not None and (above.limit, above.limit_key) == (limit.name, key):
                raise NotSupportedError(
                    f"a run of workflow {record.name!r} is under the limit {limit.name!r}, of which the run {above.id!r} that "
                    "waits for it holds a share: where no other is left it would never begin. Give one of the two a limit of "
                    "its own; nothing was started"
                )
        self._shared.limits.know(limit)
        return replace(record, limit=limit.name, limit_key=key, place=next_place(self._shared.clock))

    def _check_conflict(self, record: RunRecord, lease: Lease | None, start: _Start) -> None:
        """There is a run of that id: is it the same, and may it be attached to?"""
        inputs, on_conflict = start.inputs, start.request.on_conflict
        same = (record.kind, record.name) == ("workflow", start.request.workflow)
        if not same or (record.inputs != inputs and on_conflict != "keep"):
            raise _conflict(record.id, "the same workflow with other arguments" if same else f"{record.kind} {record.name!r}")
        if on_conflict == "fail":
            raise RunConflictError(
                f"the run {record.id!r} was started already (it is {self.catalog.said(record, lease)}); nothing was started. "
                f"Attach to it with durable.get_run({record.id!r})"
            )
        if on_conflict == "restart" and self.catalog.is_owned(record.id, lease):
            raise RunConflictError(
                f"the run {record.id!r} is being executed (it is {self.catalog.said(record, lease)}), so it was not restarted; "
                f"nothing was started. Attach to it with durable.get_run({record.id!r}), or cancel it first, with the run's "
                "cancel()"
            )

    def _attach(self, record: RunRecord, lease: Lease | None, on_conflict: str) -> None:
        if on_conflict == "restart":
            self._go(record, lease, anew=True)
        elif record.status == Status.RUNNING and not self.catalog.is_owned(record.id, lease):
            self._go(record, lease)

    def resume(self, run_id: str, *, take_over: bool) -> None:
        record, lease = self.catalog.find(run_id)
        if record.id in self._tasks or record.status == Status.COMPLETED or record.kind != "workflow":
            return
        if self.catalog.is_owned(record.id, lease) and not take_over:
            return
        self._go_or_ask(record, lease)

    def restart(self, run_id: str) -> None:
        while True:
            record, lease, row = self.catalog.found(run_id)
            if record.kind != "workflow":
                raise DurableError(
                    f"{record.id!r} is a run of the cell {record.name!r}, so nothing was restarted: run the cell with --rerun"
                )
            if not self.catalog.is_owned(record.id, lease):
                self._go_or_ask(record, lease, anew=True)
                return
            if self._send(record.id, row, Restart(self._shared.clock.now().wall_s)):
                return  # else it has changed hands, or ended, in this very moment

    def fork(self, run_id: str, at: str) -> str:
        record, rows = fork_of(self._shared, self.catalog, run_id, at)
        if workflow_functions.get(record.name) is None:
            self._say_that_it_is_asked(record)
            rows.append(self._ownership.inbox.next_row(record.id, Resume(self._shared.clock.now().wall_s)))
            self._ownership.claim_for_nobody(record, None, inserts=tuple(rows))
        else:
            self._loop_for(record.id)  # before anything is recorded
            self._begin_recorded([record], rows)
        return record.id

    def delete(self, run_id: str) -> None:
        delete(self._shared, self.catalog, run_id)

    def resume_own(self) -> list[str]:
        resumed = []
        for run_id, name in self.interrupted():
            record, lease = self.catalog.find(run_id)
            if run_id in self._tasks or record.status != Status.RUNNING or self.catalog.is_owned(run_id, lease):
                continue  # another process was faster: with the lease as it stands now, its live executor would be robbed
            function = workflow_functions.get(name)
            if function is None or self.home_of(function) == record.home:
                self._go(record, lease)
                if function is not None:
                    resumed.append(run_id)
        return resumed

    def home_of(self, function: Any) -> str:
        """Which module or notebook defines a workflow; '' where that can't be told."""
        if function is None:
            return ""
        module = str(function.__module__)
        return self._main() if module == "__main__" else module

    def cancel(self, run_id: str, reason: str) -> None:
        while True:
            record, lease, row = self.catalog.found(run_id)
            if record.status != Status.RUNNING and record.id not in self._tasks:
                return
            # Whoever executes it reads this soon; where nobody does, it is a cancelled run from now on.
            if self._send(record.id, row, Cancel(reason, self._shared.clock.now().wall_s)):
                break  # else it has changed hands, or ended, in this very moment
        if not self.catalog.is_owned(record.id, lease):  # else its executor cancels them
            self._cancel_invoked({record.id})

    def _cancel_invoked(self, parents: set[str]) -> None:
        """The children that runs have invoked are cancelled, since nobody waits for them any more."""
        for child, _ in list(self.catalog.all()) if parents else ():
            if child.parent in parents and child.is_invoked and child.status == Status.RUNNING:
                self.cancel(child.id, f"with the run {child.parent!r}, which invoked it")

    def cancel_all(self, *, status: str | None, workflow: str | None, label: str | None, reason: str) -> list[str]:
        chosen = [found for found in self.catalog.chosen(status, workflow, label) if found[0].kind == "workflow"]
        ids = [record.id for record, _, _ in chosen if record.status == Status.RUNNING or record.id in self._tasks]
        message = Cancel(reason, self._shared.clock.now().wall_s)
        rows = self._store.journal.get_many(map(rec.run_key, ids))
        unfinished = {run_id: rows[rec.run_key(run_id)] for run_id in ids if rec.run_key(run_id) in rows}
        for run_id in self._ownership.inbox.send_all(unfinished, message):
            self.cancel(run_id, reason)  # it has changed hands, or ended, in this very moment
        inboxes = self._ownership.inbox.all()
        for run_id in ids:
            self._tell(run_id, inboxes.get(run_id, []))
        self._cancel_invoked({record.id for record, lease, _ in chosen if not self.catalog.is_owned(record.id, lease)})
        return ids

    def _send(self, run_id: str, row: bytes, message: Message) -> bool:
        """Put it into the run's inbox, and tell the run of it where this process executes it."""
        if not self._ownership.inbox.send(run_id, row, message):
            return False
        self._tell(run_id, self._ownership.inbox.of(run_id))
        return True

    def _tell(self, run_id: str, inbox: list[Received]) -> None:
        run = self._ownership.active.get(run_id)
        if run is not None:
            run.hear_soon(inbox)

    # -- events and decisions ------------------------------------------------------------------------------------------

    def send(self, request: SendRequest) -> Delivery:
        return Delivery(request.event_id, self.events.send(request))

    def waiters(self, event_id: str) -> list[Waiter]:
        return self.events.waiters(event_id)

    def decide(self, run_id: str, step: str, *, approved: bool, comment: str, by: str) -> None:
        self.events.decide(run_id, step, approved=approved, comment=comment, by=by)

    # -- executing -----------------------------------------------------------------------------------------------------

    def _go(self, record: RunRecord, lease: Lease | None, *, anew: bool = False) -> None:
        """Execute a run in a task of its own, which belongs to no cell; `anew`, with nothing of it behind it. Where its
        workflow is not defined here, that is told."""  # fmt: skip
        if workflow_functions.get(record.name) is None:
            log.warning(
                "the run %r waits: its workflow %r is not defined here. Run the cell or import the module that defines it, "
                "then durable.get_run(%r).resume()",
                *(record.id, record.name, record.id),
            )
            return
        inbox = self._ownership.inbox.of(record.id)
        if not anew and isinstance(wish(record, inbox), Restart):
            anew, inbox = True, up_to_restart(inbox)
        stale = _stale(inbox, anew=anew)
        self._spawn(record.id, lambda: self._drive(record, lease, stale, anew=anew))

    def _say_that_it_is_asked(self, record: RunRecord) -> None:
        log.warning(
            "the run %r waits: its workflow %r is not defined here. A live process that defines it executes the run; where "
            "there is none, run the cell or import the module that defines it, then durable.get_run(%r).resume()",
            *(record.id, record.name, record.id),
        )

    def _go_or_ask(self, record: RunRecord, lease: Lease | None, *, anew: bool = False) -> None:
        """The same; where its workflow is not defined here, the run is made ready, and a process that has it is asked."""
        if record.name in workflow_functions or self.catalog.is_owned(record.id, lease):
            self._go(record, lease, anew=anew)
            return
        self._say_that_it_is_asked(record)
        stale = _stale(self._ownership.inbox.of(record.id), anew=anew)
        ready = self._ready(record, stale, anew=anew)
        for child in ready.children:
            self.resume(child, take_over=False)
        if anew:
            self._cancel_invoked({record.id})
        asked = self._ownership.inbox.next_row(record.id, Resume(self._shared.clock.now().wall_s))
        self._ownership.claim_for_nobody(ready.record, lease, deletes=ready.deletes, inserts=(*ready.rows, asked))

    def take(self, run_id: str, *, unasked: bool = False) -> None:
        """Somebody wants this run executed, which nobody does: if it is this process's to do, do it. `unasked`: also where
        nobody has asked for it since its process died."""  # fmt: skip
        found = self._ownership.read_run(run_id)
        if found is None or run_id in self._tasks or self._ownership.is_owned(run_id, found[1]):
            return
        wanted = wish(found[0], self._ownership.inbox.of(run_id))
        is_wanted = isinstance(wanted, Resume | Restart) or (wanted is None and unasked)  # and not cancelled since
        if is_wanted and self._is_ours(found[0]):
            self._go(*found)

    def free(self, known: dict[tuple[str, bytes], Lease | None]) -> list[str]:
        """Runs that nobody executes and that are this process's to do. Only looks, and may be called by any thread.

        known  leases that were read before, so that a look is cheap; None for one that needn't be looked at again: of a run
               that has failed, or that is defined elsewhere
        """
        found, alive = list[str](), dict[str, bool]()
        leases = self._store.journal.scan(rec.lease_key(""))
        for gone in known.keys() - set(leases):
            del known[gone]
        for key, row in leases:
            with contextlib.suppress(StoreError):  # `doctor` tells of one that can't be read
                if (key, row) not in known:
                    known[key, row] = unpack(self._store.signer, key, row, Lease)
                lease, run_id = known[key, row], key.partition("/")[2]
                if lease is None:
                    continue
                if lease.owner not in alive or lease.owner == self._store.process.id:
                    alive[lease.owner] = self._ownership.is_owned(run_id, lease)
                if alive[lease.owner] or run_id in self._tasks:
                    continue
                record, _ = self._ownership.read_run(run_id) or (None, None)
                if record is not None and record.status == Status.RUNNING and self._is_ours(record):
                    found.append(run_id)
                else:
                    known[key, row] = None
        return found

    async def retire(self, patience_s: float) -> None:
        """Let go of every run that is executed here, for other processes. Bodies that have begun are recorded if they end
        in that time, else stopped; nothing begins any more."""  # fmt: skip
        self._ownership.takes = None
        self.schedules.retire()
        executed = [run for run in self._ownership.active.values() if isinstance(run, WorkflowRun)]
        for run in executed:
            run.retire()
        tasks = {task for task in self._tasks.values() if task is not None}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=patience_s)
            for run in executed:
                run.stop(asyncio.CancelledError())
            if late:
                await asyncio.wait(late, timeout=UNWIND_S)

    def executed(self) -> list[str]:
        """The runs of workflows that this process executes, or is about to."""
        return list(self._tasks)

    def _is_ours(self, record: RunRecord) -> bool:
        """Is the run's workflow defined here, by the module or notebook that has started it?"""
        function = workflow_functions.get(record.name)
        return function is not None and self.home_of(function) == record.home

    def _loop_for(self, run_id: str) -> asyncio.AbstractEventLoop:
        """The loop that executes it: the running one; in another thread, the one that executes this store's runs."""
        with contextlib.suppress(RuntimeError):
            self._loop = _carrier(asyncio.get_running_loop())
            return self._loop
        if self._loop is not None and self._loop.is_running():
            return self._loop
        raise RuntimeError(
            f"the run {run_id!r} needs a running event loop: start it from async code, as in asyncio.run(main())"
        )

    def _spawn(self, run_id: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        loop = self._loop_for(run_id)
        context = copy_context()
        context.run(current_run.set, None)
        context.run(current_branch.set, None)
        context.run(current_body.set, None)

        def begin() -> None:
            task = loop.create_task(work(), context=context, name=f"durable_nb run {run_id}")
            self._tasks[run_id] = task
            task.add_done_callback(lambda done: self._ended(run_id, done))

        self._tasks[run_id] = None
        self._ownership.changing.add(run_id)
        if asyncio._get_running_loop() is loop:
            begin()
        else:
            loop.call_soon_threadsafe(begin)

    def _ended(self, run_id: str, task: asyncio.Task[Any]) -> None:
        if self._tasks.get(run_id) is task:
            del self._tasks[run_id]
            self._ownership.changing.discard(run_id)
        if not task.cancelled():
            task.exception()  # on record: whoever waits for the run gets it from there

    async def _drive(self, record: RunRecord, lease: Lease | None, stale: tuple[str, ...], *, anew: bool) -> None:
        ready = await self._store.writer.call(lambda: self._ready(record, stale, anew=anew))
        for child in ready.children:
            self.resume(child, take_over=False)
        if anew:
            self._cancel_invoked({record.id})
        held = await self._ownership.claim(ready.record, lease, deletes=ready.deletes, inserts=ready.rows)
        if held is None:
            return  # another process was faster: it executes the run, and who waits here hears of it by the journal
        await self._execute(ready.record, held)

    def _ready(self, record: RunRecord, stale: tuple[str, ...], *, anew: bool) -> _Ready:
        """What is to be written for a run to be executed from here on; `stale`: rows that go. Only looks."""
        now, rows, deletes, children = self._shared.clock.now(), list[tuple[str, bytes]](), stale, list[str]()
        since, since_s, generation = record.since, record.since_s, record.generation
        counts_from_s = record.counts_from_s
        if anew:
            since, since_s, generation, counts_from_s = now, 0.0, generation + 1, 0.0
            place = next_place(self._shared.clock) if record.limit else 0
            record = replace(record, place=place, rows=0, renewed_at=now.wall_s)
        elif record.status in (Status.FAILED, Status.CANCELLED) and due_in_s(record, now) <= 0:
            since = now
            since_s, counts_from_s, rows, cleared, children = self._resumption(record)
            deletes += cleared
        elif since is None or since.boot != now.boot:  # from here on this boot's clock tells the run's time
            since_s, since = since_s + elapsed_s(since or now, now), now
        record = replace(
            record,
            generation=generation,
            status=Status.RUNNING.value,
            ended_at=None,
            error="",
            ended_by=(),
            since=since,
            since_s=since_s,
            counts_from_s=counts_from_s,
        )
        return _Ready(record, tuple(rows), deletes, tuple(children))

    def _resumption(self, record: RunRecord) -> tuple[float, float, list[tuple[str, bytes]], tuple[str, ...], list[str]]:
        """A failed or cancelled run goes on from the failure that ended it: the run's time then, the latest on record, the row
        that says so, rows that go, and the runs that have failed as well and whose results are asked for again."""  # fmt: skip
        rows = [row for _, _, row in read_log(self._store.journal, self._store.signer, record)]
        cut, forgotten = set_aside(rows, record.ended_by, cancelled=record.status == Status.CANCELLED)
        course = deliveries_of(rows)
        last_s = max((row.at for row in rows), default=0.0)
        since_s = course[cut].row.at if cut >= 0 else last_s
        if forgotten:
            names = ", ".join(dict.fromkeys(repr(asked.name) for asked in forgotten))
            log.warning(
                "run %r of workflow %r is resumed before the failure that ended it; what that had caused is forgotten: %s",
                *(record.id, record.name, names),
            )
        key = f"{rec.log_prefixes(record.scope, record.generation)[2]}{len(rows) + 1:08}"
        event = Event("resumed", cut=cut, ended_by=record.ended_by, at=since_s, wall_s=self._shared.clock.now().wall_s)
        attempts = rec.attempts_prefix(record.scope, record.generation)
        cleared = tuple(f"{attempts}{request:08}" for request in record.ended_by)
        return since_s, last_s, [self._ownership.pack(key, event)], cleared, self._failed_children(record, rows, event)

    def _failed_children(self, parent: RunRecord, rows: list[Row], resumed: Event) -> list[str]:
        """Also those that were invoked and that were cancelled with it."""
        stand = {delivery.id for delivery in deliveries_of([*rows, resumed])}
        again = [one for row in rows for one in row.asked if one.kind in ("result", "invoke") and one.id not in stand]
        children = [
            (one.name, {Status.FAILED}) if one.kind == "result" else (self.catalog.child_of(parent, one), _UNDONE)
            for one in again
        ]
        found = [(child, ends, self.catalog.seen(child)) for child, ends in children]
        return [child for child, ends, seen in found if seen is not None and self.catalog.status(*seen) in ends]

    async def _execute(self, record: RunRecord, held: Held) -> None:
        self._ownership.watch()
        run = WorkflowRun(self._shared, record, held, workflow_options.get(record.name, WorkflowOptions()))
        try:
            await run.drive(workflow_functions[record.name])
        except Restarted:
            inbox = await self._store.writer.call(lambda: self._ownership.inbox.of(record.id))
            mine = Lease(held.epoch, self._store.process.id)
            await self._drive(record, mine, _stale(up_to_restart(inbox), anew=True), anew=True)
        finally:
            if self._ownership.active.get(run.id) is run:  # where the records or the arguments can't be read
                del self._ownership.active[run.id]
                self._ownership.let_go(run.id)

    # -- looking -------------------------------------------------------------------------------------------------------

    async def outcome(self, run_id: str) -> Any:
        while True:
            task = self._tasks.get(run_id)
            if task is not None:
                await asyncio.wait({task})
            elif run_id in self._tasks:  # another thread has started it this moment
                await asyncio.sleep(0)
                continue
            record, lease = self.catalog.find(run_id)
            if record.status == Status.COMPLETED:
                return await self._result(record)
            lost = task.exception() if task is not None and not task.cancelled() else None
            if isinstance(lost, StoreError):  # also where a failed run could not be resumed: it stands as it did
                raise lost
            if record.status in (Status.FAILED, Status.CANCELLED):
                raise await self._result(record)
            if lost is not None and not isinstance(lost, LeaseLost):
                raise lost
            if run_id in self._tasks:
                continue
            if not self.catalog.is_owned(run_id, lease):
                self._go(record, lease)
                if run_id not in self._tasks:
                    raise DurableError(
                        f"the run {run_id!r} is interrupted: no process is running it, and its workflow {record.name!r} is not "
                        "defined here. Run the cell or import the module that defines it, and await the run again"
                    )
                continue
            await self._ownership.change_of(run_id)

    async def _result(self, record: RunRecord) -> Any:
        if record.ended_at is None:  # cancelled while nobody executed it
            return RunCancelled(record.error)
        journal, key, call = self._store.journal, rec.result_key(record.id), self._store.writer.call
        row = await call(lambda: journal.get(key))
        if row is None:
            raise CorruptStoreError(f"the record {key!r} is missing: what the run {record.id!r} came to")
        result = unpack(self._store.signer, key, row, Result)
        data = await call(lambda: journal.get_blob(result.blob)) if result.blob else result.value
        return _codec.decode(result.form, data)

    def check(self, run_id: str) -> None:
        self.catalog.find(run_id)

    def status_of(self, run_id: str) -> Status:
        return self.catalog.status_of(run_id)

    def snapshot(self, run_id: str) -> Snapshot:
        return self.catalog.snapshot(run_id)

    def facts_of(self, run_id: str) -> dict[str, Any]:
        return self.catalog.reported(run_id)

    def observers_of(self, run_id: str) -> Observers | None:
        """Where a run that this process executes can be subscribed to; None for any other."""
        run = self._ownership.active.get(run_id)
        return run.observers if isinstance(run, WorkflowRun) else None

    def snapshots(
        self,
        *,
        status: str | None = None,
        workflow: str | None = None,
        label: str | None = None,
        limit: int | None = None,
        before: str | None = None,
        steps: bool = False,
    ) -> list[Snapshot]:
        return self.catalog.snapshots(status, workflow, label, limit, before=before, steps=steps)

    def used(self) -> list[Used]:
        return self.catalog.used()

    def declare(self, limit: Limit) -> None:
        self._shared.limits.declare(limit)

    def interrupted(self) -> list[tuple[str, str]]:
        waiting = self.catalog.chosen(Status.INTERRUPTED)
        return [(record.id, record.name) for record, _, _ in waiting if record.kind == "workflow"]


@dataclass(frozen=True, slots=True)
class _Start:
    """A run that is to be started."""

    request: StartRequest
    arguments: Arguments
    inputs: str
    """Digest of the arguments."""
    run_id: str


@dataclass(frozen=True, slots=True)
class _Ready:
    """What the claim of a run writes."""

    record: RunRecord
    rows: tuple[tuple[str, bytes], ...]
    deletes: tuple[str, ...]
    children: tuple[str, ...]
    """Runs to be resumed before."""


def _stale(inbox: list[Received], *, anew: bool) -> tuple[str, ...]:
    """Keys of the messages that the next execution is not to hear: what was sent before it about the one before. The events and
    decisions that came for the run go only where it begins anew."""  # fmt: skip
    return tuple(one.key for one in inbox if anew or not outlasts(one.message))


def _conflict(run_id: str, what: str) -> RunConflictError:
    return RunConflictError(
        f"the run id {run_id!r} is used already, by {what}; nothing was started. Use another id, or find that run with "
        f"durable.get_run({run_id!r})"
    )


def _script() -> str:
    """The script that is `__main__`; '' where there is none."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    return str(Path(path).resolve()) if path else ""


def _carrier(loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
    """Of a workflow's code, too, runs are executed by the loop that carries it."""
    return loop.carrier if isinstance(loop, WorkflowLoop) else loop


def _encoded(workflow: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Arguments, str]:
    """The arguments of a run, and their digest."""
    try:
        arguments = Arguments(*_codec.encode((args, kwargs)))
    except Exception as error:
        raise UnserializableError(
            f"workflow {workflow!r} can't be started with these arguments ({type(error).__name__}: {error}); nothing was "
            "recorded. Give it plain data, and make connections and the like in its steps"
        ) from error
    with contextlib.suppress(Unhashable):
        return arguments, hash_value((args, kwargs))
    return arguments, hashlib.blake2b(arguments.value, digest_size=16).hexdigest()


def open_store(path: str | Path) -> None:
    """Open the store folder `path`, making it where it isn't there, for the workflows of this program.

    A notebook needs none of this: `%load_ext durable_nb` opens its store. StoreError where the folder can't be used.
    """
    opened = Workflows(Engine(Store(path)))
    use_engine(lambda: opened)
