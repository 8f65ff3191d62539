"""The engine's tasks for what a workflow has asked for: each executes a step, waits for a sleep or for another run, and hands
over what comes of it."""  # fmt: skip

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable
from contextvars import copy_context
from dataclasses import replace
from typing import Any

from msgspec import structs

from durable_nb import _codec
from durable_nb._codec import digest_of
from durable_nb._current import InvokeRequest, SendRequest, StartRequest
from durable_nb._engine.arrivals import is_addressed
from durable_nb._engine.asking import Ask
from durable_nb._engine.by_history import Request
from durable_nb._engine.execution import UNWIND_S, Execution, of_this_boot
from durable_nb._engine.inbox import Received
from durable_nb._engine.outbox import Outbox
from durable_nb._engine.performer import Ended, StepCall, encoded
from durable_nb._engine.run_log import LinearLog, say
from durable_nb._events import approvals_policy, came
from durable_nb._facts import Status
from durable_nb._journal import Verdict
from durable_nb._records import Attempts, Decided, Event, Notification, RunRecord, Timer, decided_key, wait_of_request
from durable_nb._replay import Wait, decide_sleep
from durable_nb.errors import DurableError, LeaseLost, RunNotFoundError, StepInterrupted, StoreError, UnserializableError


class RequestTasks:
    """Of one execution of a workflow's run."""

    def __init__(
        self,
        execution: Execution,
        log: LinearLog,
        outbox: Outbox,
        *,
        is_cancelled: Callable[[], bool],
        failed: Callable[[BaseException], None],
        lost: Callable[[], object],
        interrupted: Callable[[], object],
    ) -> None:
        """
        is_cancelled  is the run being cancelled, and goes on?
        failed        is called where the disk refuses
        lost          is called where another process owns the run
        interrupted   is called where a KeyboardInterrupt has ended a body
        """
        self._execution, self._log, self._outbox = execution, log, outbox
        self._performer, self._facts, self._shared = execution.performer, execution.facts, execution.shared
        self._label = execution.wording.label
        self._is_cancelled, self._failed, self._lost, self._interrupted = is_cancelled, failed, lost, interrupted
        self.attempts: dict[int, Attempts] = {}
        """By request: attempts that have failed."""
        self._working: dict[int, Ask] = {}
        self._sleeping: dict[int, Ask] = {}
        self._limited = 0
        """How many steps under limits have been asked for."""

    def __len__(self) -> int:
        return len(self._working)

    def begin(self, ask: Ask) -> None:
        """Let a task work on it."""
        match ask.request.kind:
            case "notify" if not self._starting(ask.what.run_id):
                self._send(ask)
                return
            case "notify":
                work = self._send_to_child
            case "sleep" | "event" | "decision" as kind:
                work = {"sleep": self._sleep, "event": self._wait_for_event, "decision": self._wait_for_decision}[kind]
                self._sleeping[ask.request.id] = ask
            case "start" | "result":
                work = self._ask_engine
            case _:
                work = self._perform
        self._working[ask.request.id] = ask
        self._limited += ask.is_step and bool(ask.what.limits)
        ask.task = self._execution.loop.create_task(self._guarded(ask, work), context=copy_context())
        ask.task.add_done_callback(lambda _: self._over(ask))

    def _over(self, ask: Ask) -> None:
        self._working.pop(ask.request.id, None)
        self._sleeping.pop(ask.request.id, None)
        if ask.is_step and not ask.is_at_work and self._is_cancelled():  # cancelled before its first line
            self._drop(ask)

    def let_go_of_waits(self) -> None:
        """End the sleeps that nobody waits for any more, and let no step begin that waits for a limit and is not wanted."""
        limited = [ask for ask in self._working.values() if ask.is_step and self._waits_for_limit(ask)] if self._limited else []
        for ask in [*self._sleeping.values(), *limited]:
            if ask.is_given_up and ask.task is not None and not ask.task.cancelling():
                ask.task.cancel()
                self._facts.update(ask.path, status=Status.CANCELLED, wake_at=None, waits_for=None)

    def _waits_for_limit(self, ask: Ask) -> bool:
        return bool(ask.path) and self._facts[ask.path].waits_for is not None

    def is_at_work(self) -> bool:
        """Is a body executed, or about to be?"""
        at_work = (Status.PENDING, Status.RUNNING)
        steps = (ask for ask in self._working.values() if ask.is_step and not isinstance(ask.what, InvokeRequest))
        return any(self._facts[ask.path].status in at_work for ask in steps)

    def key(self, request: Request) -> str:
        """The idempotency key: of the request among its equals, never of a place in the log."""
        digest = request.recorded_digest if request.recorded_digest is not None else request.digest
        return key_of(self._shared.store.id, self._execution.record, request.kind, request.name, digest, request.n)

    def cancel(self, asks: Iterable[Ask], reason: str) -> None:
        """Stop what can be stopped of what has begun, or waits to be tried again; and the children that were invoked by `asks`,
        in this execution or an earlier one."""  # fmt: skip
        for ask in asks:
            if isinstance(ask.what, InvokeRequest):
                with contextlib.suppress(RunNotFoundError):  # it was not begun
                    self._shared.workflows.cancel(self.key(ask.request), reason)
        for ask in list(self._working.values()):
            body = self._performer.bodies.get(self.key(ask.request)) if ask.is_step else None
            if body is not None:
                body.cancel()
            elif ask.task is not None and ask.is_step:
                ask.task.cancel()

    async def drain(self, activation: int, is_stopped: Callable[[], bool], *, returned: bool) -> None:
        """Bodies that have begun end, and are recorded; what was asked for in this activation, or waits, never begins; invoked
        children go on by themselves. `returned`: the code is done, and it is told what it had asked for in vain."""
        unbegun = []
        self._performer.leave_children()
        for ask in list(self._working.values()):
            step = self._facts[ask.path] if ask.path else None
            is_waiting = step is not None and (step.status in (Status.RETRYING, Status.SLEEPING) or step.waits_for is not None)
            is_new = ask.activation == activation
            has_body = ask.is_step and self.key(ask.request) in self._performer.bodies
            is_on_its_way = isinstance(ask.what, StartRequest | SendRequest)  # what the code asks for without awaiting it
            if not has_body and ask.task is not None and (is_new or is_waiting or not ask.is_step) and not is_on_its_way:
                ask.task.cancel()
                if ask.is_step:
                    unbegun.append(ask.request.name)
        if unbegun and returned:
            self._execution.observers.notice(
                f"{self._label} returned while {', '.join(map(repr, unbegun[:5]))} had not begun: what nobody awaits is not run"
            )
        while working := {ask.task for ask in self._working.values() if ask.task is not None and not ask.task.done()}:
            await asyncio.wait(working, timeout=0.5)
            if is_stopped():
                break
        if self._outbox.last is not None and not self._outbox.last.done():
            await asyncio.wait({self._outbox.last})

    async def stop(self) -> None:
        """Cancel all of them, and wait a moment for what unwinds."""
        tasks = {ask.task for ask in self._working.values() if ask.task is not None}
        for body in list(self._performer.bodies.values()):
            body.cancel()
        for task in tasks:
            task.cancel()
        unwinding = {task for task in tasks if not task.done()}
        if unwinding:
            await asyncio.wait(unwinding, timeout=UNWIND_S)

    def die(self) -> None:
        """End as a kill would."""
        for ask in list(self._working.values()):
            if ask.task is not None:
                ask.task.cancel()

    async def _guarded(self, ask: Ask, work: Callable[[Ask], Coroutine[Any, Any, None]]) -> None:
        """An engine's task for one request. A disk that refuses ends the execution; it goes on when the cause is gone."""
        ask.is_at_work = True
        try:
            await work(ask)
        except LeaseLost:
            self._lost()
        except Exception as error:  # of the disk, or of the engine's own: the run would wait for it for ever
            self._failed(error)

    async def _perform(self, ask: Ask) -> None:
        """Execute a step until its outcome is handed over."""
        number, key = ask.request.id, self.key(ask.request)
        call = StepCall(ask.what, key, ask.path)
        call.context, call.failures = ask.context, self.attempts.get(number)
        if ask.failed:  # the code tries again by itself
            step, of = self._facts[ask.path], (ask.what.kind, ask.what.name, self._execution.record.id)
            since = self._shared.clock.now()
            call.failures = Attempts(*of, ask.failed, step.error or "", step.started_at or since.wall_s, since, 0.0)
        if isinstance(ask.what, InvokeRequest):
            self._facts.update(ask.path, child=key)
        if self._outbox.unrecorded:
            self._outbox.record_soon()

        async def note(failures: Attempts) -> None:
            self.attempts[number] = failures
            await self._outbox.written(Event("asked"), puts=(self._log.attempts_row(number, failures),))

        kept: list[Ended] = []

        def keep(ended: Ended) -> Coroutine[Any, Any, None]:
            kept.append(ended)
            return self._kept(ask, call, ended)

        try:
            await self._outbox.remembered()
            ended = await self._performer.perform(call, note, keep, earlier=self._shared.bodies.get(key))
        except StepInterrupted as cut_off:
            tried = call.failures.failed + 1 if call.failures else 1
            ended = Ended(call.inputs, tried, self._execution.now_s(), error=cut_off)
        except asyncio.CancelledError:
            if self._is_cancelled() and not kept:
                self._drop(ask)
            raise
        if ended.was_interrupted:
            call.leave()
            self._interrupted()
        elif isinstance(ended.error, asyncio.CancelledError):
            call.leave()
            self._drop(ask)
        else:
            try:
                await self._record(ask, call, ended)
            except asyncio.CancelledError:  # while a large value was being written: it is paid for
                self._shared.keep(self._kept(ask, call, ended), self._execution.record.id)
                raise
            except BaseException:
                call.leave()
                raise

    async def _kept(self, ask: Ask, call: StepCall, ended: Ended) -> None:
        """Record what a body came to that nobody waits for."""
        with contextlib.suppress(StoreError):
            await self._record(ask, call, ended)

    async def _record(self, ask: Ask, call: StepCall, ended: Ended) -> None:
        """Hand over what a step has come to. A failure is an outcome: the code may catch it and go on."""
        number, value, error = ask.request.id, ended.value, None
        if ended.error is None:
            try:
                outcome = await self._performer.outcome_of(call, ended, ended.inputs.after())
            except UnserializableError as unserializable:
                ended = replace(ended, error=unserializable)
        if ended.error is not None:
            value = None
            outcome, error = self._performer.failure_of(call, ended)
        gone = (self._log.attempts_key(number),) if self.attempts.pop(number, None) is not None else ()
        gone = gone if outcome.failed else (*gone, *call.progress_rows)  # resumed, a failed step goes on from there
        done = self._outbox.append(structs.replace(outcome, request=number), value, error, deletes=gone)
        done.add_done_callback(lambda _: call.leave())

    def _drop(self, ask: Ask) -> None:
        """The body was stopped, since the run was cancelled: whoever awaits it is cancelled."""
        self._outbox.append(Event("dropped", ask.request.id))

    async def _sleep(self, ask: Ask) -> None:
        timer = await self._deadline(ask)
        await self._execution.sleep(timer, ask.path, timer.since)
        self._outbox.append(Event("fired", ask.request.id))

    async def _deadline(self, ask: Ask) -> Timer:
        """Of a wait; it is on disk before the wait begins."""
        assert ask.timer is not None  # noqa: S101  every wait has one
        now = self._shared.clock.now()
        if (moved := of_this_boot(ask.timer, now)) is not ask.timer:
            ask.timer = moved
            await self._outbox.written(Event("moved", ask.request.id, timer=moved))
        elif isinstance(decide_sleep(ask.timer, now), Wait) and self._outbox.unrecorded:
            await self._outbox.written(Event("asked"))
        return ask.timer

    async def _wait_for_event(self, ask: Ask) -> None:
        assert ask.timer is not None  # noqa: S101  every wait has one
        number, wait_id = ask.request.id, self._wait_id(ask)
        with self._execution.expecting(wait_id, ask.path, ask.timer) as found:
            try:
                received = await self._execution.event(await self._deadline(ask), ask.path, wait_id, found)
            except asyncio.CancelledError:
                self._note_given_up(ask)
                raise
            if received is None:
                self._outbox.append(Event("arrived", number, timed_out=True), came("event", None, timed_out=True))
                return
            message, key = received.message, received.key
            assert isinstance(message, Notification)  # noqa: S101  what events are
            data = await self._execution.log.blob(message.blob) if message.blob else message.value
            row = Event("arrived", number, form=message.form, value=message.value, blob=message.blob, source=key)
            try:
                value, error = came("event", _codec.decode(message.form, data), timed_out=False), None
            except Exception as unreadable:  # of a class that there isn't here, for instance
                form, data, error = _codec.encode_error(unreadable)
                row, value = structs.replace(row, form=form, value=data, blob="", failed=True, error=say(error)), None
            self._outbox.append(row, value, error, deletes=(key,) if is_addressed(received) else ())

    async def _wait_for_decision(self, ask: Ask) -> None:
        assert ask.timer is not None  # noqa: S101  every wait has one
        wait_id, policy = self._wait_id(ask), approvals_policy()
        with self._execution.expecting(wait_id, ask.path, ask.timer) as found:
            try:
                timer = await self._deadline(ask)
                decided, key = await self._execution.decision(timer, ask.path, wait_id, found, policy)
            except asyncio.CancelledError:
                self._note_given_up(ask)
                raise
            form, data = _codec.encode([decided.approved, decided.by, decided.comment])
            row = Event("arrived", ask.request.id, form=form, value=data, timed_out=decided.timed_out)
            value = came("decision", (decided.approved, decided.by, decided.comment), timed_out=decided.timed_out)
            self._outbox.append(row, value, deletes=(key,) if key else ())

    def _note_given_up(self, ask: Ask) -> None:
        """The code doesn't wait for it any more: who asks who waits is told so, in other processes too."""
        execution = self._execution
        if ask.is_given_up and execution.status is Status.RUNNING:
            key = decided_key(execution.record.id, self._wait_id(ask))
            row = execution.log.pack(key, Decided(False, "", execution.now_s(), given_up=True))
            execution.log.commit(inserts=(row,))  # where it was decided in this very moment, that stands

    def _wait_id(self, ask: Ask) -> str:
        return wait_of_request(self._execution.record.generation, ask.request.id)

    def _starting(self, run_id: str | None) -> list[asyncio.Task[Any]]:
        """The tasks that start that child now."""
        starts = (one for one in self._working.values() if isinstance(one.what, StartRequest) and one.what.run_id == run_id)
        return [one.task for one in starts if one.task is not None]

    async def _send_to_child(self, ask: Ask) -> None:
        await asyncio.wait(self._starting(ask.what.run_id))
        self._send(ask)

    def _send(self, ask: Ask) -> None:
        """Send an event: its row is part of the commit that records it."""
        number, events = ask.request.id, self._shared.events
        try:
            letter = events.letter(ask.what)
        except StoreError:
            raise
        except DurableError as error:
            self._execution.observers.notice(f"{self._label} has sent no event {ask.request.name!r}: {error}")
            form, data, error_ = _codec.encode_error(error)
            self._outbox.append(Event("ended", number, form=form, value=data, failed=True, error=say(error)), None, error_)
            return
        form, data = _codec.encode(list(letter.run_ids))
        done = self._outbox.append(Event("ended", number, form=form, value=data), letter.run_ids, inserts=(letter.row,))

        def tell(commit: asyncio.Future[Verdict]) -> None:
            if not commit.cancelled() and commit.exception() is None and commit.result() is Verdict.APPLIED:
                events.tell(letter)

        done.add_done_callback(tell)

    async def _ask_engine(self, ask: Ask) -> None:
        """Start another run, or wait for one."""
        workflows = self._shared.workflows
        if ask.path:
            self._facts.update(ask.path, status=Status.RUNNING, attempts=1, started_at=self._execution.now_s())
        value, error = None, None
        await self._outbox.remembered()
        try:
            if isinstance(ask.what, StartRequest):
                value = workflows.start(ask.what, self._execution.record.id)
            else:
                value = await workflows.outcome(ask.request.name)
        except (asyncio.CancelledError, StoreError):
            raise
        except BaseException as raised:
            error = raised
        if error is None:
            try:
                form, data = encoded(value, f"the run {ask.request.name!r} returned")
            except UnserializableError as unserializable:
                error = unserializable
        if error is not None:
            form, data, error = _codec.encode_error(error)
        data, blob = await self._execution.log.kept(data)
        failed = error is not None
        event = Event(
            "ended", ask.request.id, form=form, value=data, blob=blob, failed=failed, error=say(error) if error else ""
        )
        self._outbox.append(event, value, error)


def undelivered(row: Event, ask: Ask) -> Received:
    """An event that was recorded for a wait which had been given up by then."""
    event_id = ask.timer.of if ask.timer else ""
    return Received(row.source, b"", Notification(event_id, row.form, row.value, row.blob, row.wall_s))


def key_of(store_id: str, record: RunRecord, kind: str, name: str, digest: str, n: int) -> str:
    """The idempotency key of the `n`th such request of that run."""
    return digest_of(store_id, record.id, str(record.generation), kind, name, digest, str(n))
