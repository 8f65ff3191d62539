"""One execution of a durable cell: what verbs ask in it. Its code runs on the kernel's loop."""

from __future__ import annotations

import asyncio
import contextlib
import types
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from dataclasses import replace
from datetime import datetime
from pathlib import PurePath
from typing import Any

from durable_nb import _codec, _patches, _usage
from durable_nb import _records as rec
from durable_nb._arguments import fingerprint_of
from durable_nb._clock import say_duration
from durable_nb._codec import digest_of
from durable_nb._current import CalledOff, Items, Published, Recorded, RecordRequest, StartRequest, StepRequest, WaitRequest
from durable_nb._engine.attempt import Attempt
from durable_nb._engine.branches import branch_name
from durable_nb._engine.by_content import ByContent
from durable_nb._engine.execution import UNWIND_S, Execution, of_this_boot, timer_of
from durable_nb._engine.in_place import Changed, Inputs, arguments_of, described
from durable_nb._engine.inbox import Received
from durable_nb._engine.observing import Host, Observers
from durable_nb._engine.performer import Ended, RunPolicy, StepCall, Wording, ended_step
from durable_nb._engine.run_log import CellRecords, Held, cancelled, say
from durable_nb._engine.shared import Shared
from durable_nb._engine.task_scope import TaskScope, enters_engine_code, in_user_code
from durable_nb._facts import Snapshot, Status, Step
from durable_nb._fingerprint import Unhashable
from durable_nb._journal import Verdict
from durable_nb._records import Again, Attempts, Cancel, Outcome, Passing, RunRecord, StepKey
from durable_nb._usage import Usage
from durable_nb.errors import (
    CorruptStoreError,
    LeaseLost,
    RunCancelled,
    RunSuspended,
    StoreError,
    UnserializableError,
    UntrustedStoreError,
)

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
        self._records = CellRecords(self._log)
        self._scope = TaskScope(label)
        self._identity: ByContent
        """Once the records are loaded."""
        self.max_wait_s: float | None = None
        """A wait with more than this left suspends the run; None: any wait is waited for."""
        self.used: Usage = {}
        """What models' answers cost that its steps were given, in this execution or an earlier one."""
        self.unrepeated: list[tuple[str, str]] = []
        """Restored steps, and the inputs that their bodies would have changed."""
        self._at_work: dict[StepCall, asyncio.Future[None]] = {}
        """Steps that are performed, until what they come to is on disk."""
        self._asking: dict[StepCall, asyncio.Task[Any] | None] = {}
        """The tasks that wait for these."""
        self._earlier = {key: body for key, body in shared.bodies.items() if body.run_id == record.id}
        """Bodies that an execution began which was interrupted."""
        self._unrecorded: list[tuple[str, bytes]] = []
        """Rows of what the code got in passing, which ride with the next commit."""
        self._origins = {record.id}
        """Runs whose steps were met, and whose notebook is known therefore."""

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
    def set_variables(self) -> list[tuple[ContextVar[Any], Any]]:
        """Context variables that the code set: it ran in a context of its own."""
        return self._scope.set_variables

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._scope.loop

    def at_end(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._execution.closing.append(close)

    @property
    def runs(self) -> Any:
        """The engine of the workflows of this store."""
        return self._shared.workflows

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
        await self._records.load()
        self._identity = ByContent(
            self._records,
            self._record.scope,
            self._record.generation,
            self.id,
            holds=lambda outcome: self.host.holds(outcome.seen),
            now_s=self._execution.now_s,
            changed_before=self._shared.changed[self._record.scope] if self.resumed else (),
        )

    async def forget_step(self, name: str) -> None:
        """Execute the steps of that name anew, under identities and idempotency keys of their own."""
        names = self._records.names()
        if name not in names:
            await (self.finish(Status.INTERRUPTED) if self.resumed else self._discard())
            known = f"; it has {', '.join(map(repr, sorted(names)))}" if names else ""
            raise LookupError(f"{self._label} has recorded no step {name!r}{known}")
        number = self._records.again[name] = self._records.again.get(name, 0) + 1
        key = rec.again_prefix(self._record.scope, self._record.generation) + digest_of(name)
        marked = self._log.pack(rec.run_key(self.id), replace(self._record, rerun_step=name))
        await self._commit(puts=(self._log.pack(key, Again(name, number)), marked))

    async def _discard(self) -> None:
        """Leave no trace of a run that was begun and has executed nothing."""
        own = (rec.run_key(self.id), rec.open_prefix(self._record.scope) + self.id, rec.lease_key(self.id))
        self._shared.ownership.lose(self._held)
        await self._commit(deletes=own)

    def abandon(self) -> None:
        """Its execution never began: whoever asks next may have the run."""
        self._shared.ownership.active.pop(self.id, None)

    async def execute(self, body: Coroutine[Any, Any, Any]) -> Any:
        """Run the cell's code as this run; what it returns or raises.

        Started bodies end and are recorded before this returns. RunSuspended, LeaseLost and KeyboardInterrupt come from
        here, never from inside the code: there it is CancelledError, which no `except Exception` swallows.
        """
        return await self._scope.execute(body, self, unwind_s=UNWIND_S, drain=self._drain)

    def interrupt(self) -> None:
        """Stop at the next await, keeping what is recorded. Safe in a signal handler."""
        self._scope.soon(lambda: self.stop(KeyboardInterrupt(f"{self._label} was interrupted")))

    def stop(self, why: BaseException) -> None:
        """Cancel the cell's code; `execute` raises `why`. Bodies are cancelled too, but for a suspension."""
        self._scope.stop(why)
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
        own = self._scope.is_main(task) or any(task is body.task for body in self._performer.bodies.values())
        return own and in_user_code(frame)

    async def _drain(self) -> None:
        """Let bodies that have begun end. Stopped ones get a moment to unwind; threads go on alone."""
        while (busy := self._busy()) and (self._scope.stopped is None or isinstance(self._scope.stopped, RunSuspended)):
            await asyncio.wait(busy, timeout=0.5)
        if self._scope.stopped is None or isinstance(self._scope.stopped, RunSuspended):
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
        if isinstance(self._scope.stopped, LeaseLost):
            self._execution.leave(status)
            return
        if status is Status.COMPLETED:
            self._shared.changed.pop(self._record.scope, None)
        elif self._unrecorded:
            self._log.commit(puts=self._riding())  # just before the end is written: it goes with that
        await self._execution.finish(status, error=error)

    def ends_as(self, error: BaseException) -> Status:
        """The status that an error leaves the run in."""
        return Status.CANCELLED if error is self._scope.stopped and isinstance(error, RunCancelled) else Status.FAILED

    def hear_soon(self, inbox: list[Received]) -> None:
        self._scope.soon(lambda: self.hear(self._held.row, inbox))

    def hear(self, lease: bytes | None, inbox: list[Received]) -> None:
        for received in self._execution.news(lease, inbox, self._give_way):
            match received.message:
                case Cancel(reason) if self._scope.stopped is None:  # once: its code may be tidying up by now
                    self.stop(cancelled(self.id, reason))

    def _give_way(self) -> asyncio.CancelledError:
        """Another process owns the run: unwind, so that `execute` raises LeaseLost."""
        self._shared.ownership.lose(self._held)
        self.stop(self._execution.lost())
        return asyncio.CancelledError()

    async def _commit(self, *, puts: tuple[tuple[str, bytes], ...] = (), deletes: tuple[str, ...] = ()) -> None:
        if await self._log.commit(puts=(*self._riding(), *puts), deletes=deletes) is not Verdict.APPLIED:
            raise self._give_way()

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self, request: StepRequest) -> Coroutine[Any, Any, Any]:
        __tracebackhide__ = True
        self._scope.check_open(request.name)
        branch = branch_name()
        key, found = self._identity.step(request, branch)
        path = self._facts.take(branch, request.name, request.items, request.item)
        self._facts.add(Step(request.name, path, request.kind, Status.PENDING))
        self._advise_of_origin(key)
        return self._step(key, self._call(key, Inputs(request, found), path, branch))

    def _call(self, key: StepKey, inputs: Inputs, path: str, branch: str) -> StepCall:
        return StepCall(inputs.request, digest_of(self._shared.store.id, key.outcome), path, branch, inputs)

    def publish(self, published: Published) -> None:
        match published:  # what stands for a failure is of no matter here: a step that failed is not kept
            case Items(name, count):
                paths = self._facts.expect(published, branch_name(), name, count)
                self._facts.add(*(Step(name, path, "run", Status.PENDING) for path in paths))
            case CalledOff(items):
                self._facts.call_off(items)

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
                await self._look(key)
                performed = True
                continue
            recorded = self._outcome(key, call) if earlier is None else None
            if recorded is not None:
                value = await self._recall(key, call, recorded, show=not performed)
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
        key, found = self._identity.step(call.request, call.branch)
        return key, self._call(key, Inputs(call.request, found), call.path, call.branch)

    def _earlier_attempt(self, call: StepCall) -> Attempt | None:
        """One that an interrupted execution of the cell began, or that another one makes now."""
        found = self._shared.bodies.get(call.key)
        if found is not None:
            return None if found is self._performer.bodies.get(call.key) and found.is_over else found
        for key, body in self._earlier.items():
            is_free = self._shared.bodies.get(key) is body and body.owner is not None
            if is_free and self._identity.is_same_but_for_own_changes(body.inputs, call.inputs):
                del self._shared.bodies[key]
                return body
        return None

    async def _look(self, key: StepKey) -> None:
        """An execution of the cell with other inputs may have recorded it."""
        row = await self._log.read_row(key.outcome)
        if row is not None:
            self._records.outcomes[key.outcome] = row

    async def _perform(self, key: StepKey, call: StepCall, earlier: Attempt | None) -> tuple[Outcome | None, Any]:
        """Execute the step; its outcome on disk and its value, or None where another execution has recorded it meanwhile."""
        self._scope.check_open(call.request.name)
        call.failures = self._records.failures(key.attempts)
        if self._unrecorded:  # on disk first: killed in the body and executed again, the code gives it the same
            await self._commit()

        async def note(failures: Attempts) -> None:
            self._scope.check_open(call.request.name)
            row = self._log.pack(key.attempts, failures)
            await self._commit(puts=(row,))
            self._learn_attempts(key, row[1])

        async def keep(ended: Ended) -> None:
            with contextlib.suppress(StoreError, asyncio.CancelledError):
                try:
                    await self._recorded(key, call, ended)
                except UnserializableError as error:  # nobody waits for it
                    self.observers.notice(say(error))

        done = asyncio.get_running_loop().create_future()
        self._at_work[call] = self._shared.performed[call.key] = done
        self._asking[call] = asyncio.current_task()
        try:
            ended = await self._performer.perform(call, note, keep, self._wait, earlier)
            if ended.was_interrupted and self._scope.stopped is None:
                self.stop(KeyboardInterrupt(f"{self._label} was interrupted"))
            if ended.error is not None:
                raise await self._failed(key, call, ended)
            # The code may give up in this very moment; the body has run, and is paid for.
            recording = self._shared.keep(self._recorded(key, call, ended), self.id)
            recording.add_done_callback(lambda done: done.cancelled() or done.exception())  # who still waits gets it
            outcome, value = await asyncio.shield(recording)
            if outcome is not None and ended.inputs is not call.inputs:
                value = await self._taken_over(key, call, outcome, value)
        except LeaseLost:
            raise self._give_way() from None
        finally:
            call.is_at_work = False
            del self._at_work[call], self._asking[call]
            if self._shared.performed.get(call.key) is done:
                del self._shared.performed[call.key]
            done.set_result(None)
        return outcome, value

    async def _taken_over(self, key: StepKey, call: StepCall, outcome: Outcome, value: Any) -> Any:
        """Of an attempt that an earlier execution began: its cell got what the body displayed, and the body its objects."""
        self.host.show_again(outcome.shown, outcome.seen)
        return await self._patch(key, call, outcome, value) if _has_patches(outcome) else value

    async def _failed(self, key: StepKey, call: StepCall, ended: Ended) -> BaseException:
        """A failed step is not kept: the next execution tries anew."""
        error = ended.error
        try:
            if error is None or isinstance(error, asyncio.CancelledError):
                return asyncio.CancelledError()
            self._facts.update(call.path, status=Status.FAILED, error=say(error), ended_at=self._execution.now_s())
            if call.request.is_continued:
                self._identity.give_back(key)
            if key.attempts in self._records.attempts:
                await self._commit(deletes=(key.attempts,))
                self._learn_attempts(key, None)
            return error
        finally:
            call.leave()

    async def _recorded(self, key: StepKey, call: StepCall, ended: Ended) -> tuple[Outcome | None, Any]:
        try:
            return await self._written(key, call, ended)
        except UnserializableError as unserializable:
            raise await self._failed(key, call, replace(ended, error=unserializable)) from None
        finally:
            call.leave()

    async def _written(self, key: StepKey, call: StepCall, ended: Ended) -> tuple[Outcome | None, Any]:
        after = ended.inputs.after()
        outcome = await self._performer.outcome_of(call, ended, after)
        # What can't be stored has raised by now: nothing is settled that will not be on disk.
        settled = self._identity.settle(key, ended.inputs, after)
        outcome = replace(outcome, changes=tuple(sorted({*outcome.changes, *map(described, settled.own)})))
        more: tuple[tuple[str, bytes], ...] = ()
        if settled.excluded is not None:
            names = ", ".join(sorted(map(described, settled.own)))
            self.observers.advise(f"step {call.request.name!r} changes {names}: restoring the step won't, and {names} is not "
                                  "compared")  # fmt: skip
            of = settled.excluded.kind, settled.excluded.name
            excluded_key = rec.excluded_prefix(self._record.scope, self._record.generation) + digest_of(*of)
            more = (self._log.pack(excluded_key, settled.excluded),)
        row = self._log.pack(settled.key.outcome, outcome)
        stale = (key.attempts,) if key.attempts in self._records.attempts else ()
        riding = self._riding()
        verdict = await self._log.commit(inserts=(row,), puts=(*riding, *more), deletes=stale)
        if verdict is Verdict.GUARD_FAILED:
            raise self._give_way()
        if verdict is Verdict.EXISTS:  # a run of the same cell with other inputs was faster: its outcome stands
            self._unrecorded = [*riding, *self._unrecorded]  # nothing of that commit was written
            await self._look(settled.key)
            if settled.key.outcome not in self._records.outcomes:
                raise CorruptStoreError(f"the record {settled.key.outcome!r} disappeared while it was read")
            return None, None
        _usage.add(self.used, outcome.usage)
        self._learn_attempts(key, None)
        for records in self._listening():
            records.outcomes[settled.key.outcome] = row[1]
        given = ended.inputs.given(after)
        if given:
            self._shared.changed[self._record.scope].append(Changed(ended.inputs, settled.key, given, after))
        return outcome, ended.value

    def _listening(self) -> set[CellRecords]:
        """Of this execution, and of the one that is active now: a body that outlived its execution tells that."""
        active = self._shared.ownership.active.get(self.id)
        return {self._records, *([active._records] if isinstance(active, CellRun) else [])}

    def _learn_attempts(self, key: StepKey, row: bytes | None) -> None:
        for records in self._listening():
            if row is None:
                records.attempts.pop(key.attempts, None)
            else:
                records.attempts[key.attempts] = row

    def _advise_of_origin(self, key: StepKey) -> None:
        """Steps are shared by the notebooks of a folder; one line tells of it."""
        with contextlib.suppress(StoreError):  # whoever asks for the step is told
            outcome = self._records.outcome(key.outcome)
            if outcome is None or outcome.run_id in self._origins:
                return
            self._origins.add(outcome.run_id)
            found, mine = self._shared.ownership.read_run(outcome.run_id), self._record.origin.notebook
            theirs = found[0].origin.notebook if found else ""
            if mine and theirs and mine != theirs:
                self.observers.advise(f"steps come from {PurePath(theirs).name}, which has them in common")

    # -- recalling -----------------------------------------------------------------------------------------------------

    def _outcome(self, key: StepKey, call: StepCall) -> Outcome | None:
        try:
            return self._records.outcome(key.outcome)
        except StoreError as error:
            raise self._unreadable(call, error) from error

    async def _recall(self, key: StepKey, call: StepCall, outcome: Outcome, *, show: bool) -> Any:
        """The recorded value; what the body displayed is shown again."""
        try:
            data = await self._log.blob(outcome.blob) if outcome.blob else outcome.value
        except StoreError as error:
            raise self._unreadable(call, error) from error
        if show and (outcome.shown or outcome.seen):
            self.host.show_again(outcome.shown, outcome.seen)
        if show and outcome.usage:
            _usage.add(self.used, outcome.usage)
            self._shared.savings.add(self.id, outcome.usage)
        if self._identity.is_changed_already(key):
            self.unrepeated.append((call.request.name, "what it was given was changed by it already"))
        elif show and outcome.changes:
            self.unrepeated.append((call.request.name, f"{', '.join(outcome.changes)} not, which it changes"))
        value = _codec.decode(outcome.form, data)
        if show and _has_patches(outcome) and not self._identity.is_changed_already(key):
            return await self._patch(key, call, outcome, value)
        return value

    async def _patch(self, key: StepKey, call: StepCall, outcome: Outcome, value: Any) -> Any:
        """Change the arguments as the body did; what it returned, which may be one of them."""
        packed = outcome.patches
        try:
            if outcome.patches_blob:
                packed = await self._log.blob(outcome.patches_blob)
        except StoreError as error:
            raise self._unreadable(call, error) from error
        try:
            result = _patches.apply(packed, call.inputs.objects, value)
        except (KeyError, Unhashable):
            self.unrepeated.append((call.request.name, "what it was given is not as when it ran: it can't be changed again"))
            return value
        after = call.inputs.after()
        if given := call.inputs.given(after):
            self._shared.changed[self._record.scope].append(Changed(call.inputs, key, given, after))
        return result

    def _unreadable(self, call: StepCall, error: StoreError) -> StoreError:
        kind = UntrustedStoreError if isinstance(error, UntrustedStoreError) else CorruptStoreError
        return kind(
            f"step {call.request.name!r} of {self._label} is recorded, but the record can't be used: {error}. Its "
            f"body was not run again, since it may have been paid for; to do so, {self._execution.wording.unreadable_hint}"
        )

    # -- waiting -------------------------------------------------------------------------------------------------------

    def wait(self, request: WaitRequest) -> Coroutine[Any, Any, Any]:
        __tracebackhide__ = True
        self._scope.check_open(request.name)
        branch = branch_name()
        key = self._identity.sleep(request.name, branch, self._scope.branch.has_made)
        path = self._facts.take(branch, request.name)
        self._facts.add(Step(request.name, path, "sleep", Status.PENDING))
        return self._sleep(request, key, path, branch)

    @enters_engine_code
    async def _sleep(self, request: WaitRequest, key: str, path: str, branch: str) -> None:
        recorded, began = self._records.timer(key), self._shared.clock.now()
        since = recorded.since if recorded else began
        sequence = recorded.sequence if recorded else self._held.next_sequence()
        # An edited duration counts from the first asking.
        timer = replace(timer_of(request, since), branch=branch, sequence=sequence)
        if timer != recorded:
            await self._commit(puts=(self._log.pack(key, timer),))
        if (moved := of_this_boot(timer, began)) is not timer:
            timer = moved
            await self._commit(puts=(self._log.pack(key, timer),))
        was_left = await self._execution.sleep(timer, path, since, self._wait)
        now, restored = self._execution.now_s(), recorded is not None and not was_left
        self._facts.update(
            path, status=Status.COMPLETED, started_at=since.wall_s, ended_at=now, restored=restored, wake_at=None
        )

    def _wait(self, seconds: float, doing: str) -> None:
        """A pause begins: suspend the run where it is longer than the cell may wait."""
        if self.max_wait_s is None or seconds <= self.max_wait_s:
            return
        until = datetime.fromtimestamp(self._execution.now_s() + seconds).astimezone()
        self.stop(
            RunSuspended(
                f"{self._label} {doing} until {until:%a %d %b %H:%M:%S}, longer than it may wait here "
                f"({say_duration(self.max_wait_s)}); everything so far is kept: run this cell again then, or with a "
                "longer --max-wait"
            )
        )
        raise asyncio.CancelledError

    # -- recorded in passing -------------------------------------------------------------------------------------------

    def record(self, request: RecordRequest) -> Recorded:
        self._scope.check_open(request.kind)
        if request.kind == "patched":
            return True  # the code of a cell may change: its steps are known by what they are
        branch = branch_name()
        key = self._identity.value(request.kind, branch, self._scope.branch.has_made)
        recorded = self._records.value(key)
        if recorded is None:
            recorded = Passing(request.kind, request.make(self._shared.clock.now()), branch)
            self._unrecorded.append(self._log.pack(key, recorded))
        return recorded.value

    def _riding(self) -> tuple[tuple[str, bytes], ...]:
        rows, self._unrecorded = tuple(self._unrecorded), []
        return rows

    # -- other runs ----------------------------------------------------------------------------------------------------

    def start(self, request: StartRequest) -> str:
        """Begin a child; without an id of its own it has the same one in every execution."""
        self._scope.check_open(request.workflow)
        branch, now = branch_name(), self._execution.now_s()
        if request.run_id is None:
            key = self._identity.child(request.workflow, arguments_of(request))
            parts = self._shared.store.id, self._record.scope, str(self._record.generation), key
            request.run_id, request.on_conflict = digest_of("start", *parts), "keep"
        path = self._facts.take(branch, request.workflow)
        self._facts.add(Step(request.workflow, path, "start", Status.COMPLETED, 1, now, now))
        if self._unrecorded:  # handed over before the child's: of both, none is there without it
            self._log.commit(puts=self._riding())
        self._shared.workflows.start(request, self.id)
        return request.run_id

    def result_of(self, run_id: str) -> Coroutine[Any, Any, Any]:
        return self._shared.workflows.outcome(run_id)


def _has_patches(outcome: Outcome) -> bool:
    return bool(outcome.patches or outcome.patches_blob)
