"""The embedded engine's side of workflows: starting their runs, attaching to them, going on with them.

A run is found by its id. Whoever starts one under an id that is used already gets that run: a double click buys once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import warnings
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from typing import Any

from durable_nb import _codec
from durable_nb import _records as rec
from durable_nb._branches import current_branch
from durable_nb._current import current_run, use_engine, workflow_functions
from durable_nb._engine import Engine, new_id
from durable_nb._facts import Snapshot, Status, Step
from durable_nb._fingerprint import Unhashable, hash_value
from durable_nb._records import Attempts, Lease, Outcome, RunRecord, Timer, unpack
from durable_nb._replay import Ending, to_clear
from durable_nb._store import Store
from durable_nb._workflowrun import WorkflowRun
from durable_nb.errors import DurableError, LeaseLost, RunCancelled, RunConflictError, RunNotFoundError, UnserializableError

POLL_S = 0.2


class Workflows:
    """Implements `_current.Engine` on one store."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._runs: dict[str, WorkflowRun] = {}
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
        form, arguments, inputs = _encoded(workflow, args, kwargs)
        function = workflow_functions.get(workflow)
        new = run_id if run_id is not None else new_id()
        found = self._engine.read_run(new)
        if found is None:
            _loop_for(new)  # before anything is recorded
            began = self._engine.clock.now().wall_s
            scope = rec.scope_of(f"~run {new}")
            record = RunRecord(
                new, "workflow", workflow, scope, 0, inputs, began, form=form, arguments=arguments, labels=labels
            )
            held = self._engine.claim_and_wait(record)
            if held is not None:
                self._spawn(new, self._execute(WorkflowRun(self._engine, record, held, resumed=False), function))
                return new
            found = self._engine.read_run(new)  # another process started it in this very moment
        if found is not None:
            record, lease = found
            if (record.kind, record.name, record.inputs) != ("workflow", workflow, inputs):
                same = (record.kind, record.name) == ("workflow", workflow)
                what = "the same workflow with other arguments" if same else f"{record.kind} {record.name!r}"
                raise RunConflictError(
                    f"the run id {run_id!r} is used already, by {what}; nothing was started. Use another id, or "
                    f"find that run with durable.get_run({run_id!r})"
                )
            if on_conflict == "fail":
                status = self._status(record, lease)
                raise RunConflictError(f"the run {run_id!r} was started already (it is {status}); nothing was started")
            if on_conflict == "restart":
                if self._is_owned(record.id, lease):
                    raise RunConflictError(
                        f"the run {run_id!r} is being executed (it is {self._status(record, lease)}), so it was not restarted; "
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
        run = self._runs.get(run_id)
        if run is not None:
            run.stop(_cancelled(run_id, reason))
        elif run_id in self._tasks:
            self._cancelling[run_id] = _cancelled(run_id, reason)
        elif self._is_owned(run_id, lease):
            raise DurableError(
                f"the run {run_id!r} is executed by another process; cancel it there, or take it over first: "
                "resume(take_over=True)"
            )
        elif record.status == Status.RUNNING:
            self._spawn(run_id, self._cancel_unowned(record, lease, reason))

    async def _cancel_unowned(self, record: RunRecord, lease: Lease | None, reason: str) -> None:
        held = await self._engine.claim(record, lease)
        if held is not None:
            run = WorkflowRun(self._engine, record, held, resumed=True)
            error = _cancelled(record.id, reason)
            await run.finish(Status.CANCELLED, str(error), result=_codec.encode_error(error)[:2])

    def _go(self, record: RunRecord, lease: Lease | None, *, anew: bool = False) -> None:
        """Execute a run in a task of its own, which belongs to no cell; `anew`, with none of its sleeps behind it."""
        function = workflow_functions.get(record.name)
        if function is None:
            warnings.warn(
                f"durable_nb: the run {record.id!r} waits: its workflow {record.name!r} is not defined here. Run the cell or "
                f"import the module that defines it, then durable.get_run({record.id!r}).resume()",
                stacklevel=3,
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
        task = loop.create_task(work, context=context, name=f"durable_nb run {run_id}")
        self._tasks[run_id] = task
        task.add_done_callback(lambda done: self._ended(run_id, done))

    def _ended(self, run_id: str, task: asyncio.Task[Any]) -> None:
        if self._tasks.get(run_id) is task:
            del self._tasks[run_id]
            self._cancelling.pop(run_id, None)
        if not task.cancelled():
            task.exception()  # on record: whoever waits for the run gets it from there

    async def _drive(self, record: RunRecord, lease: Lease | None, function: Any, *, anew: bool) -> None:
        cleared: tuple[str, ...] = ()
        if anew:
            timers = await self._engine.store.writer.call(lambda: self._engine.store.journal.scan(rec.timer_prefix(record.id)))
            cleared = tuple(key for key, _ in timers)
        elif record.status in (Status.FAILED, Status.CANCELLED):
            cleared = await self._engine.store.writer.call(lambda: self._cleared(record))
        record = replace(record, status=Status.RUNNING.value, ended_at=None, error="", result=b"", result_form="")
        held = await self._engine.claim(record, lease, deletes=cleared)
        if held is None:
            return  # another process was faster: it executes the run, and who waits here hears of it by the journal
        await self._execute(WorkflowRun(self._engine, record, held, resumed=True), function)

    async def _execute(self, run: WorkflowRun, function: Any) -> None:
        self._runs[run.id] = run
        if run.id in self._cancelling:
            run.stop(self._cancelling[run.id])
        try:
            await run.load()
            await run.drive(function)
        finally:
            self._runs.pop(run.id, None)
            self._engine.active.pop(run.id, None)  # where the records or the arguments can't be read, it was never finished

    def _cleared(self, record: RunRecord) -> tuple[str, ...]:
        """What is forgotten when a failed run goes on: failures that nothing came after, and cut-off attempts."""
        journal, seal = self._engine.store.journal, self._engine.store.seal
        endings = []
        for key, row in journal.scan(rec.step_prefix(record.scope, record.generation)):
            outcome = unpack(seal, key, row, Outcome)
            # A success that was under way already when another step failed is no sign that the failure was caught.
            at_s = outcome.ended_at if outcome.failed else outcome.started_at
            endings.append(Ending(key, outcome.branch, at_s, outcome.failed))
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
                return _codec.decode(record.result_form, record.result)
            if record.status in (Status.FAILED, Status.CANCELLED):
                raise _codec.decode(record.result_form, record.result)
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

    def snapshot(self, run_id: str) -> Snapshot:
        run = self._runs.get(run_id)
        if run is not None:
            return run.snapshot()
        record, lease = self._find(run_id)
        return self._summary(record, lease, self._steps(record))

    def snapshots(self) -> list[Snapshot]:
        found = []
        for key, row in self._engine.store.journal.scan("run/"):
            record = unpack(self._engine.store.seal, key, row, RunRecord)
            pair = self._engine.read_run(record.id)
            found.append(self._summary(record, pair[1] if pair else None, ()))
        return sorted(found, key=lambda run: run.started_at, reverse=True)

    def labels(self, run_id: str) -> tuple[str, ...]:
        return self._find(run_id)[0].labels

    def _summary(self, record: RunRecord, lease: Lease | None, steps: tuple[Step, ...]) -> Snapshot:
        return Snapshot(record.id, record.name, self._status(record, lease), record.started_at, record.ended_at, steps)

    def _status(self, record: RunRecord, lease: Lease | None) -> Status:
        run = self._runs.get(record.id)
        if run is not None:
            return run.status
        if record.id in self._tasks:
            return Status.PENDING
        if record.status != Status.RUNNING:
            return Status(record.status)
        return Status.RUNNING if self._is_owned(record.id, lease) else Status.INTERRUPTED

    def _steps(self, record: RunRecord) -> tuple[Step, ...]:
        """From the records alone: what is known of a run that is not executed here."""
        journal, seal = self._engine.store.journal, self._engine.store.seal
        found = []
        for key, row in journal.scan(rec.step_prefix(record.scope, record.generation)):
            o = unpack(seal, key, row, Outcome)
            status = Status.FAILED if o.failed else Status.COMPLETED
            found.append(Step(o.name, key, o.kind, status, o.attempts, o.started_at, o.ended_at))
        for key, row in journal.scan(rec.timer_prefix(record.id)):
            t = unpack(seal, key, row, Timer)
            wake = t.until_s if t.until_s is not None else t.since.wall_s + t.duration_s
            if record.status == Status.COMPLETED or wake <= self._engine.clock.now().wall_s:
                found.append(Step(t.name, key, "sleep", Status.COMPLETED, 0, t.since.wall_s, wake))
            else:
                found.append(Step(t.name, key, "sleep", Status.SLEEPING, 0, t.since.wall_s, None, wake_at=wake))
        return tuple(sorted(found, key=lambda step: step.started_at or 0.0))

    def _is_owned(self, run_id: str, lease: Lease | None) -> bool:
        return run_id in self._tasks or self._engine.is_owned(run_id, lease)

    def _find(self, run_id: str) -> tuple[RunRecord, Lease | None]:
        found = self._engine.read_run(run_id)
        if found is not None:
            return found
        raise RunNotFoundError(
            f"no run {run_id!r} in the store {self._engine.store.path}; durable.runs() lists those there are"
        )


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


def _cancelled(run_id: str, reason: str) -> RunCancelled:
    return RunCancelled(f"the run {run_id!r} was cancelled" + (f": {reason}" if reason else ""))


def open_store(path: str | Path) -> None:
    """Open the store folder `path`, making it where it isn't there, for the workflows of this program.

    A notebook needs none of this: `%load_ext durable_nb` opens its store. StoreError where the folder can't be used.
    """
    opened = Workflows(Engine(Store(Path(path))))
    use_engine(lambda: opened)
