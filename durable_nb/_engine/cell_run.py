"""One execution of a durable cell: what verbs ask in it. Its code runs on the kernel's loop."""

from __future__ import annotations

import asyncio
import contextlib
import types
from collections.abc import Callable, Container, Coroutine
from typing import Any

from durable_nb import _codec
from durable_nb import _records as rec
from durable_nb._arguments import fingerprint_of
from durable_nb._codec import digest_of
from durable_nb._current import (
    CalledOff,
    InvokeRequest,
    Items,
    Published,
    Recorded,
    RecordRequest,
    Reported,
    SendRequest,
    StartRequest,
    StepRequest,
    WaitRequest,
)
from durable_nb._engine.arrivals import Wait
from durable_nb._engine.attempt import Attempt
from durable_nb._engine.branches import branch_name
from durable_nb._engine.execution import UNWIND_S, Execution
from durable_nb._engine.in_place import Inputs, arguments_of
from durable_nb._engine.inbox import Received
from durable_nb._engine.observing import Host, Observers
from durable_nb._engine.performer import Ended, RunPolicy, StepCall, Wording, ended_step
from durable_nb._engine.recording import Recording
from durable_nb._engine.restoring import Restoring
from durable_nb._engine.run_log import Held, cancelled, say
from durable_nb._engine.shared import Shared
from durable_nb._engine.task_scope import TaskScope, enters_engine_code, in_user_code
from durable_nb._engine.waiting import Waiting
from durable_nb._events import Delivery
from durable_nb._facts import Snapshot, Status, Step
from durable_nb._records import Attempts, Cancel, Outcome, Passing, RunRecord, StepKey
from durable_nb.errors import LeaseLost, RunCancelled, RunNotFoundError, RunSuspended, StoreError, UnserializableError

_POLICY = RunPolicy(keeps_late_results=True, verifies_lease=False)


class CellRun:
    """Implements what verbs ask (`_current.Run`)."""

    is_replayed = False

    def __init__(self, shared: Shared, record: RunRecord, held: Held, *, resumed: bool) -> None:
        self.id, self.name, self._record = record.id, record.name, record
        self.resumed = resumed
        """It goes on with a run that an earlier execution left unfinished."""
        label = f"cell {record.name!r}"
        wording = Wording(label, "run the cell again", "run the cell once with --rerun=STEP", "run the cell once with --rerun")
        self._execution = Execution(shared, record, held, wording, _POLICY)
        self._performer, self._log = self._execution.performer, self._execution.log
        self._facts = self._execution.facts
        self._shared, self._held, self._label = shared, held, label
        self.scope = TaskScope(label)
        self.recording = Recording(self._execution, self._give_way)
        self.restoring = Restoring(self._execution, self.recording)
        self.waiting = Waiting(self._execution, self.recording, self.scope, self.stop, self._give_way)
        self._at_work: dict[StepCall, asyncio.Future[None]] = {}
        """Steps that are performed, until what they come to is on disk."""
        self._asking: dict[StepCall, asyncio.Task[Any] | None] = {}
        """The tasks that wait for these."""
        self._earlier = {key: body for key, body in shared.bodies.items() if body.run_id == record.id}
        """Bodies that an execution began which was interrupted."""

    # -- facts ---------------------------------------------------------------------------------------------------------

    @property
    def observers(self) -> Observers:
        """Whoever wants to know how the run goes subscribes here."""
        return self._execution.observers

    @property
    def host(self) -> Host:
        """Where its steps show things."""
        return self._performer.host

    @host.setter
    def host(self, host: Host) -> None:
        self._performer.host = host

    @property
    def started_at(self) -> float:
        """When its first execution began."""
        return self._record.started_at

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self.scope.loop

    def at_end(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._execution.closing.append(close)

    @property
    def runs(self) -> Any:
        """The engine of the workflows of this store."""
        return self._shared.workflows

    @property
    def waits(self) -> tuple[Wait, ...]:
        return self._execution.arrivals.waits

    @property
    def given_up(self) -> Container[str]:
        return self._execution.arrivals.given_up

    @property
    def heard(self) -> Container[str]:
        return self._execution.heard

    @property
    def event_ids(self) -> set[str]:
        return self._execution.arrivals.event_ids

    def snapshot(self) -> Snapshot:
        return self._execution.snapshot(self.standing())

    def standing(self) -> Status:
        status = self._execution.status
        return self._facts.standing() if status is Status.RUNNING else status

    def spent_before_s(self) -> float:
        """What the steps of this run took before this execution began: a restored one all, a sleep what had passed."""
        began = self._execution.began_at
        times = ((step.started_at, min(step.ended_at or began, began)) for step in self._facts.steps())
        return sum(max(until - since, 0.0) for since, until in times if since is not None)

    def left_running(self) -> list[str]:
        """The steps whose threads go on, though the execution has ended."""
        bodies = self._shared.bodies.values()
        return [body.request.name for body in bodies if body.run_id == self.id and not body.is_over]

    # -- executing the code --------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Read what was recorded. Called once, before `execute`."""
        self._execution.begin(self)  # before the records are read: a body that ends meanwhile adds to them
        await self.recording.load(resumed=self.resumed, reads=self.waiting.reads)
        await self._execution.reporting.load()
        self._execution.reporting.release()

    async def forget_step(self, name: str) -> None:
        """Execute the steps of that name anew, under identities and idempotency keys of their own."""
        names = self.recording.records.names()
        if name not in names:
            await (self.finish(Status.INTERRUPTED) if self.resumed else self._discard())
            known = f"; it has {', '.join(map(repr, sorted(names)))}" if names else ""
            raise LookupError(f"{self._label} has recorded no step {name!r}{known}")
        await self.recording.forget(name)

    async def _discard(self) -> None:
        """Leave no trace of a run that was begun and has executed nothing."""
        own = (rec.run_key(self.id), rec.open_prefix(self._record.scope) + self.id, rec.lease_key(self.id))
        self._shared.ownership.lose(self._held)
        await self.recording.commit(deletes=own)

    def abandon(self) -> None:
        """Its execution never began: whoever asks next may have the run."""
        self._shared.ownership.active.pop(self.id, None)

    async def execute(self, body: Coroutine[Any, Any, Any]) -> Any:
        """Run the cell's code as this run; what it returns or raises.

        Started bodies end and are recorded before this returns. RunSuspended, LeaseLost and KeyboardInterrupt come from
        here, never from inside the code: there it is CancelledError, which no `except Exception` swallows.
        """
        return await self.scope.execute(body, self, unwind_s=UNWIND_S, drain=self._drain)

    def interrupt(self) -> None:
        """Stop at the next await, keeping what is recorded. Safe in a signal handler."""
        self.scope.soon(lambda: self.stop(KeyboardInterrupt(f"{self._label} was interrupted")))

    def stop(self, why: BaseException) -> None:
        """Cancel the cell's code; `execute` raises `why`. Bodies are cancelled too, but for a suspension."""
        self.scope.stop(why)
        if isinstance(why, RunCancelled):
            for call in list(self._at_work):
                if isinstance(call.request, InvokeRequest):
                    with contextlib.suppress(RunNotFoundError):  # it was not begun
                        self._shared.workflows.cancel(call.key, f"with the {self._label}, which invoked it")
        if not isinstance(why, RunSuspended):
            for attempt in list(self._performer.bodies.values()):
                attempt.cancel()

    def die(self) -> None:
        """End as a kill would."""
        self.stop(asyncio.CancelledError())

    def may_be_left(self, task: asyncio.Task[Any] | None, frame: types.FrameType | None) -> bool:
        """Is the user's code executing there, in a task of this run's own? It may be left by a KeyboardInterrupt; out of the
        engine's code one would leave the task, and end the kernel process."""  # fmt: skip
        if task is None:
            return False
        own = self.scope.is_main(task) or any(task is body.task for body in self._performer.bodies.values())
        return own and in_user_code(frame)

    async def _drain(self) -> None:
        """Let bodies that have begun end. Stopped ones get a moment to unwind; threads and invoked children go on alone."""
        self._performer.leave_children()
        while (busy := self._busy()) and (self.scope.stopped is None or isinstance(self.scope.stopped, RunSuspended)):
            await asyncio.wait(busy, timeout=0.5)
        if self.scope.stopped is None or isinstance(self.scope.stopped, RunSuspended):
            await self._shared.settled(self.id)
        elif self._at_work:  # shielded from what stopped the code: nobody waits for their bodies from here on
            for task in self._asking.values():
                if task is not None:
                    task.cancel()
            await asyncio.wait(set(self._at_work.values()), timeout=UNWIND_S)
        unwinding = {body.task for body in self._performer.bodies.values() if not (body.is_over or body.in_thread)}
        if unwinding:
            await asyncio.wait(unwinding, timeout=UNWIND_S)
        await self._execution.close()

    def _busy(self) -> set[asyncio.Future[Any]]:
        overdue = {key for key, body in self._performer.bodies.items() if body.is_overdue}
        steps = {done for call, done in self._at_work.items() if call.is_at_work and call.key not in overdue}
        given_up = [body for body in self._performer.bodies.values() if body.owner is not None and not body.is_overdue]
        return steps | {body.task for body in given_up if not body.is_over}

    async def finish(self, status: Status, error: str = "") -> None:
        """Write down how the run ended. A completed one is closed; any other stays, to be gone on with."""
        if isinstance(self.scope.stopped, LeaseLost):
            self._execution.leave(status)
            return
        if status is Status.COMPLETED:
            self._shared.changed.pop(self._record.scope, None)
        else:
            self.recording.hand_over()
        await self._execution.finish(status, error=error)

    def ends_as(self, error: BaseException) -> Status:
        """The status that an error leaves the run in."""
        return Status.CANCELLED if error is self.scope.stopped and isinstance(error, RunCancelled) else Status.FAILED

    def hear_soon(self, inbox: list[Received]) -> None:
        self.scope.soon(lambda: self.hear(self._held.row, inbox))

    def hear(self, lease: bytes | None, inbox: list[Received]) -> None:
        for received in self._execution.news(lease, inbox, self._give_way):
            match received.message:
                case Cancel(reason) if self.scope.stopped is None:  # once: its code may be tidying up by now
                    self.stop(cancelled(self.id, reason))

    def _give_way(self) -> asyncio.CancelledError:
        """Another process owns the run: unwind, so that `execute` raises LeaseLost."""
        self._shared.ownership.lose(self._held)
        self.stop(self._execution.lost())
        return asyncio.CancelledError()

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self, request: StepRequest) -> Coroutine[Any, Any, Any]:
        __tracebackhide__ = True
        self.scope.check_open(request.name)
        branch = branch_name()
        key, found = self.recording.identity.step(request, branch)
        path = self._facts.take(branch, request.name, request.items, request.item)
        call = self._call(key, Inputs(request, found), path, branch)
        child = call.key if isinstance(request, InvokeRequest) else None
        self._facts.add(Step(request.name, path, request.kind, Status.PENDING, child=child))
        self.restoring.advise_of_origin(key)
        return self._step(key, call)

    def _call(self, key: StepKey, inputs: Inputs, path: str, branch: str) -> StepCall:
        return StepCall(inputs.request, (self._shared.store.id, key.outcome), path, branch, inputs)

    def publish(self, published: Published) -> None:
        match published:  # what stands for a failure is of no matter here: a step that failed is not kept
            case Items(name, count):
                paths = self._facts.expect(published, branch_name(), name, count)
                self._facts.add(*(Step(name, path, "run", Status.PENDING) for path in paths))
            case CalledOff(items):
                self._facts.call_off(items)
            case Reported(facts):
                self._execution.reporting.report(facts)

    def reported(self) -> dict[str, Any]:
        """What its code has reported."""
        return self._execution.reporting.facts()

    @enters_engine_code
    async def _step(self, key: StepKey, call: StepCall) -> Any:
        __tracebackhide__ = True
        if call.inputs.objects and call.request.kind == "run" and not call.request.awaited_at_once:
            key, call = self._renewed(key, call)
        performed = False
        while True:
            earlier = self._earlier_attempt(call)
            if earlier is not None and earlier.owner is None:  # another execution waits for it, and records it
                recorded_by = self._shared.performed.get(call.key)
                await asyncio.wait({earlier.task})
                if recorded_by is not None and earlier.error is None:
                    await asyncio.wait({recorded_by})
                await self._shared.settled(earlier.run_id)
                await self.recording.look(key)
                performed = True
                continue
            recorded = self.restoring.outcome(key, call) if earlier is None else None
            if recorded is not None:
                value = await self.restoring.value(key, call, recorded, show=not performed)
                self._facts.add(ended_step(self._facts[call.path], recorded, restored=not performed))
                return value
            performed = True
            outcome, value = await self._perform(key, call, earlier)
            if outcome is not None:
                self._facts.add(ended_step(self._facts[call.path], outcome, restored=False))
                return value

    def _renewed(self, key: StepKey, call: StepCall) -> tuple[StepKey, StepCall]:
        """The step as its body would begin with it now: called and not awaited at once, it may get a list that another step or
        the cell's own code has appended to since."""  # fmt: skip
        if call.inputs.found is None or fingerprint_of(call.request).digest == call.inputs.found.digest:
            return key, call
        key, found = self.recording.identity.step(call.request, call.branch)
        return key, self._call(key, Inputs(call.request, found), call.path, call.branch)

    def _earlier_attempt(self, call: StepCall) -> Attempt | None:
        """One that an interrupted execution of the cell began, or that another one makes now."""
        if not self._shared.bodies:
            return None
        found = self._shared.bodies.get(call.key)
        if found is not None:
            return None if found is self._performer.bodies.get(call.key) and found.is_over else found
        for key, body in self._earlier.items():
            is_free = self._shared.bodies.get(key) is body and body.owner is not None
            if is_free and self.recording.identity.is_same_but_for_own_changes(body.inputs, call.inputs):
                del self._shared.bodies[key]
                return body
        return None

    async def _perform(self, key: StepKey, call: StepCall, earlier: Attempt | None) -> tuple[Outcome | None, Any]:
        """Execute the step; its outcome on disk and its value, or None where another execution has recorded it meanwhile."""
        self.scope.check_open(call.request.name)
        call.failures = self.recording.records.failures(key.attempts)
        await self.recording.flush()

        async def note(failures: Attempts) -> None:
            self.scope.check_open(call.request.name)
            await self.recording.note(key, failures)

        async def keep(ended: Ended) -> None:
            with contextlib.suppress(StoreError, asyncio.CancelledError):
                try:
                    await self.recording.ended(key, call, ended)
                except UnserializableError as error:  # nobody waits for it
                    self.observers.notice(say(error))

        done = asyncio.get_running_loop().create_future()
        self._at_work[call] = self._shared.performed[call.key] = done
        self._asking[call] = asyncio.current_task()
        try:
            ended = await self._performer.perform(call, note, keep, self.waiting.pause, earlier)
            if ended.was_interrupted and self.scope.stopped is None:
                self.stop(KeyboardInterrupt(f"{self._label} was interrupted"))
            if ended.error is not None:
                raise await self.recording.failed(key, call, ended)
            # The code may give up in this very moment; the body has run, and is paid for.
            outcome, value = await self._shared.keep(self.recording.ended(key, call, ended), self.id), ended.value
            if outcome is not None and ended.inputs is not call.inputs:
                # An earlier execution began it: its cell got what the body displayed, and the body its objects.
                self.restoring.show(outcome)
                value = await self.restoring.patched(key, call, outcome, value)
        except LeaseLost:
            raise self._give_way() from None
        finally:
            call.is_at_work = False
            del self._at_work[call], self._asking[call]
            if self._shared.performed.get(call.key) is done:
                del self._shared.performed[call.key]
            done.set_result(None)
        return outcome, value

    # -- waiting, and the outside ----------------------------------------------------------------------------------------

    def wait(self, request: WaitRequest) -> Coroutine[Any, Any, Any]:
        __tracebackhide__ = True
        self.scope.check_open(request.name)
        return self.waiting.ask(request)

    def send(self, request: SendRequest) -> Delivery:
        self.scope.check_open(request.event_id)
        branch = branch_name()
        outcome, restored = self.recording.send(request, branch)
        path = self._facts.take(branch, request.event_id)
        self._facts.add(ended_step(Step(request.event_id, path, "notify", Status.PENDING), outcome, restored=restored))
        return Delivery(request.event_id, tuple(_codec.decode(outcome.form, outcome.value)))

    def answer(self, prompt: str, ask: Callable[[], str]) -> str:
        """The answer to a question of the cell's own code. `ask` gets it, and blocks meanwhile; once in all executions."""
        self.scope.check_open("input")
        branch = branch_name()
        outcome, restored = self.recording.answer(prompt, ask, branch)
        path = self._facts.take(branch, outcome.name)
        self._facts.add(ended_step(Step(outcome.name, path, "input", Status.PENDING), outcome, restored=restored))
        return str(_codec.decode(outcome.form, outcome.value))

    # -- recorded in passing -------------------------------------------------------------------------------------------

    def record(self, request: RecordRequest) -> Recorded:
        self.scope.check_open(request.kind)
        if request.kind == "patched":
            return True  # the code of a cell may change: its steps are known by what they are
        branch = branch_name()
        key = self.recording.identity.value(request.kind, branch, self.scope.branch.has_made)
        recorded = self.recording.records.value(key)
        if recorded is None:
            recorded = Passing(request.kind, request.make(self._shared.clock.now()), branch)
            self.recording.got(key, recorded)
        return recorded.value

    # -- other runs ----------------------------------------------------------------------------------------------------

    def start_many(self, requests: list[StartRequest]) -> list[str]:
        """Begin children; without an id of its own one has the same id in every execution."""
        branch, now = branch_name(), self._execution.now_s()
        for request in requests:
            self.scope.check_open(request.workflow)
            if request.run_id is None:
                key = self.recording.identity.child(request.workflow, arguments_of(request))
                parts = self._shared.store.id, self._record.scope, str(self._record.generation), key
                request.run_id, request.on_conflict = digest_of("start", *parts), "keep"
        self.recording.hand_over()
        ids = self._shared.workflows.start_many(requests, self.id)
        steps = [(request.workflow, self._facts.take(branch, request.workflow)) for request in requests]
        self._facts.add(*(Step(name, path, "start", Status.COMPLETED, 1, now, now) for name, path in steps))
        return ids

    def result_of(self, run_id: str) -> Coroutine[Any, Any, Any]:
        return self._shared.workflows.outcome(run_id)
