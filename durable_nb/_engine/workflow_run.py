"""One execution of a workflow's run: what verbs ask in it, and its life from the claim to its end.

Its steps are identified by history: replay goes the way the run went (`stepping`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import sys
from collections.abc import AsyncIterator, Callable, Container, Coroutine
from contextvars import copy_context
from typing import Any

from durable_nb import _codec
from durable_nb import _records as rec
from durable_nb._clock import RECHECK_S
from durable_nb._codec import digest_of
from durable_nb._current import (
    Body,
    CalledOff,
    Items,
    Published,
    Recorded,
    RecordRequest,
    Reported,
    SendRequest,
    StandsFor,
    StartRequest,
    StepRequest,
    WaitRequest,
    WorkflowOptions,
    current_body,
    current_run,
)
from durable_nb._engine.arrivals import Wait
from durable_nb._engine.asking import Ask
from durable_nb._engine.by_history import PATCHED, Request
from durable_nb._engine.execution import Execution
from durable_nb._engine.in_place import arguments_of, sent
from durable_nb._engine.inbox import Received, Restarted
from durable_nb._engine.limits import Share
from durable_nb._engine.observing import Observers
from durable_nb._engine.performer import RunPolicy, Wording, encoded
from durable_nb._engine.run_log import Held, cancelled, say
from durable_nb._engine.shared import Shared
from durable_nb._engine.stepping import Over, Stepper
from durable_nb._events import Delivery
from durable_nb._facts import Snapshot, Status
from durable_nb._records import Arguments, Cancel, Restart, Result, RunRecord, unpack
from durable_nb._retry import run_timed_out
from durable_nb.errors import (
    CorruptStoreError,
    LeaseLost,
    NonDeterminismError,
    NotInRunError,
    NotSupportedError,
    RunCancelled,
    StoreError,
    UnserializableError,
)

_POLICY = RunPolicy(keeps_late_results=False, verifies_lease=True)


class WorkflowRun:
    """Implements what verbs ask (`_current.Run`)."""

    is_replayed = True

    def __init__(self, shared: Shared, record: RunRecord, held: Held, options: WorkflowOptions) -> None:
        self.id, self.name = record.id, record.name
        self._label = f"run {record.id!r} of workflow {record.name!r}"
        rerun = "call the run's resume()"
        wording = Wording(self._label, rerun, rerun, "begin the run anew with its restart()")
        self._execution = Execution(shared, record, held, wording, _POLICY)
        self._execution.began_at = record.started_at
        self._shared, self._held, self._options = shared, held, options
        self._host_loop = self._execution.loop
        self._stepper = Stepper(self._execution, lost=self._give_way)
        self._stopped: BaseException | None = None
        """Why this execution ends before its code does; nothing of it is executed any more."""
        self._retires = False
        self._starts: dict[str, Ask] = {}
        """Children, by id."""
        self._entering: asyncio.Future[Share] | None = None
        """Its share of its limit, while it waits for that."""
        self._waits_for: str | None = None
        self._ways: dict[str, Recorded] = {}
        """By change: whether the run takes the new way."""

    @property
    def runs(self) -> Any:
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

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._host_loop

    @property
    def observers(self) -> Observers:
        """Whoever wants to know how the run goes subscribes here."""
        return self._execution.observers

    def at_end(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._execution.closing.append(close)

    # -- facts ---------------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """How the run and its steps stand now."""
        left_s = -self._stepper.run_time.now_s() if self._stepper.is_pending else None
        wake_at = None if left_s is None else self._execution.now_s() + left_s
        return self._execution.snapshot(self.standing(), self._waits_for, wake_at)

    def standing(self) -> Status:
        """How the run stands now. May be asked by any thread, and takes as long however many steps there are."""
        status = self._execution.status
        if self._stepper.is_pending:
            return Status.PENDING
        if status is not Status.RUNNING or self._execution.performer.bodies:
            return status
        if self._entering is not None:
            return Status.PENDING
        found = self._execution.facts.standing()
        return Status.SLEEPING if found is Status.RUNNING and self._stepper.is_asleep() else found

    # -- what verbs ask ------------------------------------------------------------------------------------------------

    def step(self, request: StepRequest) -> Coroutine[Any, Any, Any]:
        __tracebackhide__ = True
        return self._ask(Request(request.kind, request.name, arguments_of(request)), request.kind, request)

    def publish(self, published: Published) -> None:
        match published:
            case Items(name, count):
                self._execution.facts.expect(published, "", name, count)
            case CalledOff():
                pass  # they were asked for, as the history tells
            case StandsFor(error, value):
                self._stepper.stands_for(error, value)
            case Reported(facts):
                self._execution.reporting.report(facts)

    def reported(self) -> dict[str, Any]:
        """What its code has reported."""
        return self._execution.reporting.facts()

    def wait(self, request: WaitRequest) -> Coroutine[Any, Any, Any]:
        __tracebackhide__ = True
        digest = str(request.wake) if request.kind == "sleep" else digest_of(request.of)
        return self._ask(Request(request.kind, request.name, digest), request.kind, request)

    def send(self, request: SendRequest) -> Delivery:
        """The event goes in the commit of its record, when the code awaits next."""
        __tracebackhide__ = True
        self._check_open(request.event_id)
        if self._stepper.broken is not None:
            raise self._stepper.broken
        ask = self._stepper.ask(Request("notify", request.event_id, functools.partial(sent, request)), "notify", request)
        ask.is_wanted = True
        return Delivery(request.event_id, sent=lambda: _run_ids(ask))

    def start_many(self, requests: list[StartRequest]) -> list[str]:
        """The children's ids, fixed now; they begin when the code awaits next."""
        __tracebackhide__ = True
        return [self._start(request) for request in requests]

    def _start(self, request: StartRequest) -> str:
        __tracebackhide__ = True
        self._check_open(request.workflow)
        if self._stepper.broken is not None:
            raise self._stepper.broken
        asked = Request("start", request.workflow, functools.partial(arguments_of, request))
        ask = self._stepper.ask_now(asked, request)
        if request.run_id is None:
            request.run_id, request.on_conflict = self._stepper.child_id(ask.request), "keep"
        self._starts[request.run_id] = ask
        return request.run_id

    async def result_of(self, run_id: str) -> Any:
        """What another run comes to, recorded in this one."""
        __tracebackhide__ = True
        start = self._starts.get(run_id)
        if start is not None and start.future is not None:
            await asyncio.shield(start.future)  # a conflict is raised here
        return await self._ask(Request("result", run_id, ""), "", None)

    def record(self, request: RecordRequest) -> Recorded:
        """The recorded value, matched now; else a new one, which rides with the next commit."""
        __tracebackhide__ = True
        self._check_open(request.name or request.kind)
        if self._stepper.broken is not None:
            raise self._stepper.broken
        is_way = request.kind == PATCHED
        if is_way and request.name in self._ways:
            return self._ways[request.name]
        asked = Request(request.kind, request.name, "")
        value = self._stepper.draw(asked, lambda: request.make(self._shared.clock.now()), or_passed=is_way)
        value = value if value is not None else False
        if is_way:
            self._ways[request.name] = value
        return value

    def _ask(self, request: Request, kind: str, what: Any) -> Coroutine[Any, Any, Any]:
        __tracebackhide__ = True
        self._check_open(request.name)
        if self._stepper.broken is not None:
            return _raises(self._stepper.broken)
        ask = self._stepper.ask(request, kind, what)
        ask.coro = self._answer(ask)
        return ask.coro

    async def _answer(self, ask: Ask) -> Any:
        __tracebackhide__ = True
        self._stepper.want(ask)
        if ask.future is None or asyncio.get_running_loop() is not self._stepper.loop:
            raise NotSupportedError(
                f"{ask.request.described} of {self._label} was awaited on another event loop; nothing was run. Await it in the "
                "workflow's own code"
            )
        return await ask.future

    def _check_open(self, name: str) -> None:
        __tracebackhide__ = True
        if isinstance(self._stopped, LeaseLost):
            raise asyncio.CancelledError
        if isinstance(sys.exc_info()[1], KeyboardInterrupt):  # a `finally` that it came to asks for no step
            self._host_loop.call_soon(self._stepper.interrupt)
            raise KeyboardInterrupt
        if not self._stepper.is_open:
            raise NotInRunError(
                f"step {name!r} was asked for when {self._label} was over; nothing was run. Await the task that asks for it in "
                "the workflow (await asyncio.gather(...)), then its steps are recorded"
            )
        if asyncio._get_running_loop() is not self._stepper.loop:
            raise NotSupportedError(
                f"step {name!r} of {self._label} was asked for outside the workflow's own code, by a thread or a callback; "
                "nothing was run. Call durable's verbs in the workflow function itself"
            )

    # -- its life ------------------------------------------------------------------------------------------------------

    async def drive(self, function: Any) -> Any:
        """Execute the workflow's function from its recorded arguments; what it returns or raises, written down."""
        self._execution.begin(self)
        await self._execution.reporting.load()
        await self._due()
        async with self._in_limit() as share:
            return await self._drive(function, share)

    @contextlib.asynccontextmanager
    async def _in_limit(self) -> AsyncIterator[Share | None]:
        """Hold a share of the run's limit, sleeping and waiting included. One that has ended, or is to end, waits for none."""
        record, share = self._execution.record, None
        if record.limit and not self._stepper.is_over:
            self._shared.ownership.changing.discard(self.id)
            entering = asyncio.ensure_future(self._shared.limits.enter_run(record, self._say_that_it_waits))
            timeout = asyncio.ensure_future(self._time_out(self._shared.has_bodies))
            self._entering, whatever = entering, set[asyncio.Future[Any]]((entering, self._stepper.ended))
            if self._options.timeout_s is not None:
                whatever.add(timeout)
            try:
                await asyncio.wait(whatever, return_when=asyncio.FIRST_COMPLETED)
                if entering.done() and not entering.cancelled():
                    share = entering.result()
            finally:
                timeout.cancel()
                self._entering = self._waits_for = None
                if share is None:
                    entering.add_done_callback(_given_back)
                    entering.cancel()
        try:
            yield share
        finally:
            if share is not None:
                share.leave()

    def _say_that_it_waits(self) -> None:
        self._waits_for = f"limit {self._execution.record.limit!r}"
        self.observers.changed()

    async def _drive(self, function: Any, share: Share | None) -> Any:
        stepper = self._stepper
        if not stepper.is_over:
            await stepper.begin(self, function, self._arguments)
            self._listen()
        if self._stopped is not None:
            stepper.end(Over(Status.INTERRUPTED, error=self._stopped))
        else:
            stepper.go()
            if share is not None:
                self._host_loop.call_soon(share.begun)
        timeout = asyncio.ensure_future(self._time_out(stepper.is_busy))
        try:
            try:
                over = await asyncio.shield(stepper.ended)
            except asyncio.CancelledError as stopped:
                self.stop(stopped)
                over = stepper.ended.result() if stepper.ended.done() else Over(Status.INTERRUPTED, error=stopped)
            timeout.cancel()
            return await self._conclude(over)
        finally:
            timeout.cancel()
            stepper.close()
            await self._execution.close()

    async def _due(self) -> None:
        """Return when a run that was started with a delay is to begin, or has ended before."""
        stepper = self._stepper
        while (left_s := -stepper.run_time.now_s()) > 0 and not stepper.is_over:
            if not stepper.is_pending:
                stepper.is_pending = True
                self._listen()
                continue
            pause: asyncio.Future[Any] = asyncio.ensure_future(self._shared.clock.sleep(min(left_s, RECHECK_S)))
            try:
                await asyncio.wait({pause, stepper.ended}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                pause.cancel()
        stepper.is_pending = False

    def _listen(self) -> None:
        """From here on the run hears what others want of it; and now, what was sent before there was anybody to hear it."""
        self._shared.ownership.changing.discard(self.id)
        self.hear(self._held.row, self._shared.ownership.inbox.of(self.id))

    async def _time_out(self, is_busy: Callable[[], bool]) -> None:
        """Tell the code when the run has taken too long."""
        limit_s, stepper = self._options.timeout_s, self._stepper
        if limit_s is not None:
            await stepper.run_time.until(self._execution.record.counts_from_s + limit_s, is_busy)
            stepper.time_out(run_timed_out(self._label, self.id, limit_s))

    def stop(self, why: BaseException) -> None:
        """Cancelled, the code unwinds; for any other reason nothing of it is executed any more."""
        if self._stepper.is_over and not self._retires:
            return
        if isinstance(why, RunCancelled):
            self._cancel(why)
            return
        self._stopped = self._stopped or why
        self._stepper.end(Over(Status.INTERRUPTED, error=self._stopped))

    def retire(self) -> None:
        """Ask for nothing more, and let bodies that have begun end, until `stop`: another process goes on with the run."""
        self._retires = True
        self._stepper.end(Over(Status.INTERRUPTED, error=asyncio.CancelledError()))

    def _cancel(self, why: RunCancelled, delivering: tuple[str, ...] = ()) -> None:
        self._stepper.cancel(why, delivering)
        if self._entering is not None:
            self._entering.cancel()

    def die(self) -> None:
        """End as a kill would."""
        self.stop(asyncio.CancelledError())
        self._stepper.tasks.die()
        self._stepper.close()

    def hear_soon(self, inbox: list[Received]) -> None:
        if asyncio._get_running_loop() is self._host_loop:
            self.hear(self._held.row, inbox)
        else:
            self._host_loop.call_soon_threadsafe(self.hear, self._held.row, inbox)

    def hear(self, lease: bytes | None, inbox: list[Received]) -> None:
        for received in self._execution.news(lease, inbox, self._give_way):
            match received.message:
                case Cancel(reason):
                    self._cancel(cancelled(self.id, reason), (received.key,))
                case Restart():
                    self._shared.ownership.changing.add(self.id)  # the lease stays ours
                    self.stop(Restarted())

    def _give_way(self) -> None:
        """Another process owns the run: this one writes nothing more."""
        self._shared.ownership.lose(self._held)
        lost = self._stopped = self._execution.lost()
        was_over = self._stepper.is_over
        self._stepper.end(Over(Status.INTERRUPTED, error=lost))
        if not was_over:
            self._stepper.unwind()

    async def _conclude(self, over: Over) -> Any:
        """Let begun bodies end, unwind the code, and write down how the run ended."""
        returned = over.status in (Status.COMPLETED, Status.FAILED)
        drains = (returned or self._retires) and self._stopped is None
        await self._stepper.settle(drains=drains, returned=returned, is_stopped=lambda: self._stopped is not None)
        status, error, value = over.status, over.error, over.value
        if isinstance(error, LeaseLost | Restarted):
            self._execution.leave(Status.INTERRUPTED)
            raise error
        form, data = "", b""
        if status is Status.COMPLETED:
            try:
                form, data = encoded(value, f"{self._label} returned")
            except UnserializableError as unserializable:
                status, error = Status.FAILED, unserializable
        if status in (Status.FAILED, Status.CANCELLED) and error is not None:
            form, data, error = _codec.encode_error(error)
        elif status is Status.INTERRUPTED and isinstance(error, StoreError):
            with contextlib.suppress(StoreError):  # the disk's failure is none of the run's: it goes on once the cause is gone
                await self._finish(status, None, over.ended_by, form, data)
            raise error
        if status is Status.FAILED and error is not None and not isinstance(error, NonDeterminismError):
            await self._tell_of_failure(error)
        await self._finish(status, error, over.ended_by, form, data)
        if status is Status.COMPLETED:
            return value
        if isinstance(error, Exception) or (status is Status.INTERRUPTED and isinstance(error, asyncio.CancelledError)):
            raise error from None
        if status is Status.INTERRUPTED:
            raise asyncio.CancelledError from error
        return None  # SystemExit: out of a task, it would end the loop; the record has it

    async def _tell_of_failure(self, error: BaseException) -> None:
        """Call the workflow's `on_failure`. Killed in it, the run has not failed yet: whoever resumes it comes here again."""
        tell = self._options.on_failure
        if tell is None:
            return
        context = copy_context()
        key = digest_of(self._shared.store.id, self.id, str(self._execution.record.generation), "on_failure")
        context.run(current_run.set, self)
        context.run(current_body.set, Body("on_failure", key))
        call = functools.partial(tell, self.id, error)
        try:
            if inspect.iscoroutinefunction(tell):
                await self._host_loop.create_task(call(), context=context)
            else:
                await self._shared.workers.submit(call, context)
        except Exception as failed:
            self.observers.notice(f"on_failure of {self._label} failed itself: {say(failed)}; the run's own error stands")

    async def _finish(
        self, status: Status, error: BaseException | None, ended_by: tuple[int, ...], form: str, data: bytes
    ) -> None:
        """Write down how the run ended."""
        if status is not Status.COMPLETED:
            self._stepper.remember()
        data, blob = await self._execution.log.kept(data)
        await self._execution.finish(
            status,
            error=say(error) if error is not None else "",
            result=None if status is Status.INTERRUPTED else Result(form, data, blob),
            ended_by=ended_by,
            since=self._stepper.run_time.since,
            since_s=self._stepper.run_time.since_s,
            rows=self._stepper.rows,
        )

    async def _arguments(self) -> tuple[Any, Any]:
        log, key = self._execution.log, rec.arguments_key(self.id)
        row = await log.read_row(key)
        if row is None:
            raise CorruptStoreError(f"the record {key!r} is missing: what {self._label} was started with; nothing was run")
        arguments = unpack(log.signer, key, row, Arguments)
        data = await log.blob(arguments.blob) if arguments.blob else arguments.value
        args, kwargs = _codec.decode(arguments.form, data)
        return args, kwargs


def _given_back(entering: asyncio.Future[Share]) -> None:
    """What came in the very moment in which nobody waited for it any more."""
    if not entering.cancelled() and entering.exception() is None:
        entering.result().leave()


async def _raises(error: BaseException) -> Any:
    """Not raised by the verb itself: of several that are called together, the others would never be awaited."""
    raise error


async def _run_ids(ask: Ask) -> tuple[str, ...]:
    assert ask.future is not None  # noqa: S101  it is asked for
    return tuple(await asyncio.shield(ask.future))
