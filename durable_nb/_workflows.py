"""The embedded engine's side of workflows: starting their runs, attaching to them, going on with them.

A run is found by its id. Whoever starts one under an id that is used already gets that run: a double click buys once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from contextvars import copy_context
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from durable_nb import _codec
from durable_nb import _records as rec
from durable_nb._branches import current_branch
from durable_nb._clock import remaining_s
from durable_nb._current import current_body, current_run, use_engine, workflow_functions
from durable_nb._engine import Engine, new_id
from durable_nb._facts import Paths, Snapshot, Status, Step, standing
from durable_nb._fingerprint import Unhashable, hash_value
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Attempts, Cancel, Generation, Lease, Outcome, RunRecord, Timer, Turn, unpack
from durable_nb._replay import Ending, How, Wait, decide_sleep, to_clear
from durable_nb._run import BLOB_BYTES, cancelled, log
from durable_nb._store import Store
from durable_nb._workflowrun import WorkflowRun
from durable_nb.errors import (
    DurableError,
    LeaseLost,
    RunCancelled,
    RunConflictError,
    RunNotFoundError,
    UnserializableError,
    UntrustedStoreError,
)

POLL_S = 0.2


class Workflows:
    """Implements `_current.Engine` on one store."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._cancelling: dict[str, RunCancelled] = {}
        """Runs whose task has been made and has not begun, that are to stop as soon as it does."""

    # -- starting ------------------------------------------------------------------------------------------------------

    def start(
        self,
        workflow: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        run_id: str | None,
        labels: tuple[str, ...],
        on_conflict: str,
    ) -> str:
        form, data, inputs = _encoded(workflow, args, kwargs)
        function = workflow_functions.get(workflow)
        new = run_id if run_id is not None else new_id()
        found = self.seen(new)
        if found is None:
            _loop_for(new)  # before anything is recorded
            began = self._engine.clock.now().wall_s
            scope = rec.scope_of(f"~run {new}")
            record = RunRecord(new, "workflow", workflow, scope, 0, inputs, began, form=form, arguments=data, labels=labels)
            if len(data) >= BLOB_BYTES:
                record = replace(record, arguments=b"", arguments_blob=self._engine.store.journal.put_blob(data))
            held = self._engine.claim_and_wait(record)
            if held is not None:
                self._spawn(new, self._execute(WorkflowRun(self._engine, record, held, resumed=False), function))
                return new
            found = self.seen(new)  # another process started it in this very moment
        if found is not None:
            record, lease = found
            same = (record.kind, record.name) == ("workflow", workflow)
            if not same or (record.inputs != inputs and on_conflict != "keep"):
                what = "the same workflow with other arguments" if same else f"{record.kind} {record.name!r}"
                raise RunConflictError(
                    f"the run id {run_id!r} is used already, by {what}; nothing was started. Use another id, or "
                    f"find that run with durable.get_run({run_id!r})"
                )
            if on_conflict == "fail":
                status = self.status(record, lease)
                raise RunConflictError(f"the run {run_id!r} was started already (it is {status}); nothing was started")
            if on_conflict == "restart":
                if self._is_owned(record.id, lease):
                    raise RunConflictError(
                        f"the run {run_id!r} is being executed (it is {self.status(record, lease)}), so it was not restarted; "
                        "nothing was started. Cancel it first, with the run's cancel()"
                    )
                self._go(replace(record, generation=record.generation + 1), lease, anew=True)
            elif record.status == Status.RUNNING and not self._is_owned(record.id, lease):
                self._go(record, lease)
        return new

    def resume(self, run_id: str, *, take_over: bool) -> None:
        record, lease = self._find(run_id)
        if record.id in self._tasks or record.status == Status.COMPLETED or record.kind != "workflow":
            return
        if self._is_owned(run_id, lease) and not take_over:
            return
        self._go(record, lease)

    def cancel(self, run_id: str, reason: str) -> None:
        record, lease = self._find(run_id)
        run = self._engine.active.get(record.id)
        if run is not None:
            run.stop(cancelled(record.id, reason))
        elif record.id in self._tasks:
            self._cancelling[record.id] = cancelled(record.id, reason)
        elif record.status == Status.RUNNING and lease is not None:
            # Whoever executes it reads this soon; where nobody does, it is a cancelled run from now on.
            guard = rec.lease_key(record.id), self._engine.pack(rec.lease_key(record.id), lease)[1]
            row = self._engine.pack(rec.cancel_key(record.id), Cancel(reason))
            if self._engine.store.writer.commit_and_wait(Commit(guard, puts=(row,))) is not Verdict.APPLIED:
                self.cancel(run_id, reason)  # it has changed hands, or ended, in this very moment

    def _go(self, record: RunRecord, lease: Lease | None, *, anew: bool = False) -> None:
        """Execute a run in a task of its own, which belongs to no cell; `anew`, with none of its sleeps behind it."""
        function = workflow_functions.get(record.name)
        if function is None:
            log.warning(
                "the run %r waits: its workflow %r is not defined here. Run the cell or import the module that defines it, "
                "then durable.get_run(%r).resume()",
                *(record.id, record.name, record.id),
            )
            return
        self._spawn(record.id, self._drive(record, lease, function, anew=anew))

    def _spawn(self, run_id: str, work: Any) -> None:
        try:
            loop = _loop_for(run_id)
        except RuntimeError:
            work.close()
            raise
        context = copy_context()
        context.run(current_run.set, None)
        context.run(current_branch.set, None)
        context.run(current_body.set, None)
        task = loop.create_task(work, context=context, name=f"durable_nb run {run_id}")
        self._tasks[run_id] = task
        self._engine.changing.add(run_id)
        task.add_done_callback(lambda done: self._ended(run_id, done))

    def _ended(self, run_id: str, task: asyncio.Task[Any]) -> None:
        if self._tasks.get(run_id) is task:
            del self._tasks[run_id]
            self._cancelling.pop(run_id, None)
            self._engine.changing.discard(run_id)
        if not task.cancelled():
            task.exception()  # on record: whoever waits for the run gets it from there

    async def _drive(self, record: RunRecord, lease: Lease | None, function: Any, *, anew: bool) -> None:
        cleared: tuple[str, ...] = ()
        if anew:
            timers = await self._engine.store.writer.call(lambda: self._engine.store.journal.scan(rec.timer_prefix(record.id)))
            cleared = tuple(key for key, _ in timers)
        elif record.status in (Status.FAILED, Status.CANCELLED):
            cleared = await self._engine.store.writer.call(lambda: self._cleared(record))
        record = replace(
            record, status=Status.RUNNING.value, ended_at=None, error="", result=b"", result_form="", result_blob=""
        )
        held = await self._engine.claim(record, lease, deletes=(*cleared, rec.cancel_key(record.id)))
        if held is None:
            return  # another process was faster: it executes the run, and who waits here hears of it by the journal
        await self._execute(WorkflowRun(self._engine, record, held, resumed=True), function)

    async def _execute(self, run: WorkflowRun, function: Any) -> None:
        if run.id in self._cancelling:
            run.stop(self._cancelling[run.id])
        try:
            await run.load()
            self._engine.changing.discard(run.id)
            await run.drive(function)
        finally:
            self._engine.active.pop(run.id, None)  # where the records or the arguments can't be read, it was never finished

    def _cleared(self, record: RunRecord) -> tuple[str, ...]:
        """What is forgotten when a failed run goes on: failures that nothing came after, and cut-off attempts."""
        journal, seal = self._engine.store.journal, self._engine.store.seal
        endings = []
        for key, row in journal.scan(rec.step_prefix(record.scope, record.generation)):
            outcome = unpack(seal, key, row, Outcome)
            endings.append(Ending(key, outcome.branch, *outcome.turns, How.FAILED if outcome.failed else How.SUCCEEDED))
        for key, row in journal.scan(rec.timer_prefix(record.id)):
            timer = unpack(seal, key, row, Timer)
            endings.append(Ending(key, timer.branch, timer.turn, timer.turn, How.SLEPT))
        begun = [
            key
            for key, row in journal.scan(rec.attempts_prefix(record.scope, record.generation))
            if unpack(seal, key, row, Attempts).begun
        ]
        return (*to_clear(endings), *begun)

    # -- looking -------------------------------------------------------------------------------------------------------

    async def outcome(self, run_id: str) -> Any:
        while True:
            task = self._tasks.get(run_id)
            if task is not None:
                await asyncio.wait({task})
            record, lease = self._find(run_id)
            if record.status == Status.COMPLETED:
                return await self._result(record)
            if record.status in (Status.FAILED, Status.CANCELLED):
                raise await self._result(record)
            if task is not None and not task.cancelled() and task.exception() is not None:
                lost = task.exception()
                if lost is not None and not isinstance(lost, LeaseLost):
                    raise lost
            if run_id not in self._tasks:
                if not self._is_owned(run_id, lease):
                    self._go(record, lease)
                if run_id not in self._tasks and not self._is_owned(run_id, lease):
                    raise DurableError(
                        f"the run {run_id!r} is interrupted, and its workflow {record.name!r} is not defined here"
                    )
                await asyncio.sleep(POLL_S)

    async def _result(self, record: RunRecord) -> Any:
        journal, data = self._engine.store.journal, record.result
        if record.result_blob:
            data = await self._engine.store.writer.call(lambda: journal.get_blob(record.result_blob))
        return _codec.decode(record.result_form, data)

    def snapshot(self, run_id: str) -> Snapshot:
        record, lease = self._find(run_id)
        run = self._engine.active.get(record.id)
        if run is not None:
            return run.snapshot()
        return self._summary(record, lease, self._steps(record))

    def snapshots(self) -> list[Snapshot]:
        found = []
        for key, row in self._engine.store.journal.scan("run/"):
            with contextlib.suppress(UntrustedStoreError):  # somebody else's run in a store that was copied
                pair = self.seen(unpack(self._engine.store.seal, key, row, RunRecord).id)
                if pair is not None:
                    found.append(self._summary(*pair, ()))
        return sorted(found, key=lambda run: run.started_at, reverse=True)

    def interrupted(self) -> list[tuple[str, str]]:
        waiting = [run for run in self.snapshots() if run.status is Status.INTERRUPTED]
        return [(run.id, run.name) for run in waiting if self._find(run.id)[0].kind == "workflow"]

    def labels(self, run_id: str) -> tuple[str, ...]:
        return self._find(run_id)[0].labels

    def _summary(self, record: RunRecord, lease: Lease | None, steps: tuple[Step, ...]) -> Snapshot:
        return Snapshot(record.id, record.name, self.status(record, lease), record.started_at, record.ended_at, steps)

    def status(self, record: RunRecord, lease: Lease | None) -> Status:
        """How a run stands, given its record and its lease."""
        run = self._engine.active.get(record.id)
        if run is not None:
            return run.snapshot().status
        if record.id in self._tasks:
            return Status.PENDING
        if record.status != Status.RUNNING:
            return Status(record.status)
        return standing([step for _, step in self._waits(record)]) if self._is_owned(record.id, lease) else Status.INTERRUPTED

    def _steps(self, record: RunRecord) -> tuple[Step, ...]:
        """From the records alone: what is known of a run that is not executed here. Of a cell's run, what it did itself."""
        journal, seal = self._engine.store.journal, self._engine.store.seal
        found = self._waits(record)
        for key, row in journal.scan(rec.step_prefix(record.scope, record.generation)):
            o = unpack(seal, key, row, Outcome)
            if record.kind == "workflow" or o.run_id == record.id:
                status = Status.FAILED if o.failed else Status.COMPLETED
                step = Step(o.name, o.branch, o.kind, status, o.attempts, o.started_at, o.ended_at, error=o.error or None)
                found.append((o.turns[0], step))
        paths = Paths()
        return tuple(replace(step, path=paths.take(step.path, step.name)) for _, step in sorted(found, key=itemgetter(0)))

    def _waits(self, record: RunRecord) -> list[tuple[Turn, Step]]:
        """The sleeps, and the steps that have failed and are to be tried again: when asked for, and with a branch as path."""
        journal, seal, now = self._engine.store.journal, self._engine.store.seal, self._engine.clock.now()
        found = []
        for key, row in journal.scan(rec.timer_prefix(record.id)):
            t = unpack(seal, key, row, Timer)
            began, left = t.since.wall_s, decide_sleep(t, now)
            if isinstance(left, Wait) and record.status != Status.COMPLETED:
                step = Step(t.name, t.branch, "sleep", Status.SLEEPING, 0, began, wake_at=now.wall_s + left.seconds)
            else:
                until = t.until_s if t.until_s is not None else began + t.duration_s
                step = Step(t.name, t.branch, "sleep", Status.COMPLETED, 0, began, until)
            found.append((t.turn, step))
        for key, row in journal.scan(rec.attempts_prefix(record.scope, record.generation)):
            a = unpack(seal, key, row, Attempts)
            if a.run_id == record.id:
                wake_at = now.wall_s + remaining_s(a.since, a.delay_s, now)
                status = Status.RUNNING if a.begun else Status.RETRYING
                step = Step(a.name, a.branch, a.kind, status, a.failed, a.started_at, error=a.error or None, wake_at=wake_at)
                found.append((a.turn, step))
        return found

    def _is_owned(self, run_id: str, lease: Lease | None) -> bool:
        return run_id in self._tasks or self._engine.is_owned(run_id, lease)

    def _find(self, run_id: str) -> tuple[RunRecord, Lease | None]:
        found = self.seen(run_id) or self._last_of_cell(run_id)
        if found is not None:
            return found
        raise RunNotFoundError(
            f"no run {run_id!r} in the store {self._engine.store.path}; durable.runs() lists those there are"
        )

    def seen(self, run_id: str) -> tuple[RunRecord, Lease | None] | None:
        """A run as it stands; cancelled it is as well where its executor died before it heard of it."""
        found = self._engine.read_run(run_id)
        if found is None or found[0].status != Status.RUNNING or self._is_owned(run_id, found[1]):
            return found
        key = rec.cancel_key(run_id)
        row = self._engine.store.journal.get(key)
        if row is None:
            return found
        error = cancelled(run_id, unpack(self._engine.store.seal, key, row, Cancel).reason)
        form, data, _ = _codec.encode_error(error)
        return replace(found[0], status=Status.CANCELLED.value, error=str(error), result_form=form, result=data), found[1]

    def _last_of_cell(self, name: str) -> tuple[RunRecord, Lease | None] | None:
        key = rec.generation_key(rec.scope_of(name))
        row = self._engine.store.journal.get(key)
        return self.seen(unpack(self._engine.store.seal, key, row, Generation).last_run) if row else None


def _encoded(workflow: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, bytes, str]:
    try:
        form, data = _codec.encode((args, kwargs))
    except Exception as error:
        raise UnserializableError(
            f"workflow {workflow!r} can't be started with these arguments ({type(error).__name__}: {error}); nothing was "
            "recorded. Give it plain data, and make connections and the like in its steps"
        ) from error
    with contextlib.suppress(Unhashable):
        return form, data, hash_value((args, kwargs))
    return form, data, hashlib.blake2b(data, digest_size=16).hexdigest()


def _loop_for(run_id: str) -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            f"the run {run_id!r} needs a running event loop: start it from async code, as in asyncio.run(main())"
        ) from None


def open_store(path: str | Path) -> None:
    """Open the store folder `path`, making it where it isn't there, for the workflows of this program.

    A notebook needs none of this: `%load_ext durable_nb` opens its store. StoreError where the folder can't be used.
    """
    opened = Workflows(Engine(Store(path)))
    use_engine(lambda: opened)
