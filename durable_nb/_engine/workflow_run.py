"""One execution of a workflow's run: what verbs ask in it.

Its steps are identified by history: replay goes the way the run went.

The workflow's code runs on a loop of its own (`workflow_loop`), which this object steps from callbacks of the kernel's loop:
first through everything recorded, one delivery at a time; then live. Bodies run on the kernel's loop and in its threads, and
none begins before every recorded event was asked for and delivered. What ends is committed, then delivered, in the order of
the commits: what the code has seen is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import sys
import time
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Any

from durable_nb import _codec
from durable_nb import _records as rec
from durable_nb._current import (
    CalledOff,
    Items,
    Published,
    Recorded,
    RecordRequest,
    StandsFor,
    StartRequest,
    StepRequest,
    WaitRequest,
    current_run,
)
from durable_nb._engine.asking import Ask, Lane, current_lane
from durable_nb._engine.blame import Blame
from durable_nb._engine.by_history import PATCHED, TIMER, History, Mismatch, Request, Row, without_collector
from durable_nb._engine.execution import Execution, timer_of
from durable_nb._engine.in_place import arguments_of
from durable_nb._engine.inbox import Received, Restarted
from durable_nb._engine.observing import Observers, Returned
from durable_nb._engine.outbox import Outbox
from durable_nb._engine.performer import RunPolicy, Wording, encoded, ended_step
from durable_nb._engine.recalling import Recalled
from durable_nb._engine.request_tasks import RequestTasks
from durable_nb._engine.run_log import Held, LinearLog, cancelled, say
from durable_nb._engine.run_time import RunTime
from durable_nb._engine.shared import Shared
from durable_nb._engine.workflow_loop import Interrupted, WorkflowLoop
from durable_nb._facts import Snapshot, Status, Step
from durable_nb._journal import Verdict
from durable_nb._records import Arguments, Asked, Cancel, Event, Outcome, Restart, Result, RunRecord, unpack
from durable_nb.errors import (
    CorruptStoreError,
    DurableError,
    LeaseLost,
    NonDeterminismError,
    NotInRunError,
    NotSupportedError,
    RunCancelled,
    StoreError,
    UnserializableError,
)

SLICE_S = 0.01
"""So long the workflow's code has the kernel's loop at a time."""
_IDLE_S = 2.0
"""So long code may wait for what nothing in its run can bring about."""
_AT_ONCE = 32
"""So many bodies begin in one turn of the kernel's loop."""
_POLICY = RunPolicy(keeps_late_results=False, verifies_lease=True)


@dataclass(frozen=True, slots=True)
class _Over:
    """How the code ended."""

    status: Status
    value: Any = None
    error: BaseException | None = None
    ended_by: tuple[int, ...] = ()


class WorkflowRun:
    """Implements what verbs ask (`_current.Run`)."""

    is_replayed = True

    def __init__(self, shared: Shared, record: RunRecord, held: Held) -> None:
        self.id, self.name = record.id, record.name
        self._label = f"run {record.id!r} of workflow {record.name!r}"
        rerun = "call the run's resume()"
        wording = Wording(self._label, rerun, rerun, "begin the run anew with its restart()")
        self._execution = Execution(shared, record, held, wording, _POLICY)
        self._execution.began_at = record.started_at
        self._performer, self._facts = self._execution.performer, self._execution.facts
        self._shared, self._held = shared, held
        self._time = RunTime(shared.clock, record.since, record.since_s)
        self._log = LinearLog(self._execution.log)
        self._outbox = Outbox(
            self._log,
            wall_s=self._execution.now_s,
            run_s=self._time.now_s,
            closed=lambda: self._closed,
            written=self._written,
            failed=self._not_written,
        )
        self._tasks = RequestTasks(
            self._execution,
            self._log,
            self._outbox,
            is_cancelled=lambda: self._stopped is None and not self._is_over and self._cancelled is not None,
            failed=self._fail,
            lost=self._give_way,
            interrupted=lambda: self._host_loop.call_soon(self.stop, KeyboardInterrupt(f"{self._label} was interrupted")),
        )
        self._recalled: Recalled
        """Once the history is loaded."""
        self._host_loop = self._execution.loop
        self._loop = WorkflowLoop(self)  # type: ignore[abstract]  # the rest of a loop is refused, see there
        self._history = History(())
        self._muting = shared.muting()
        self._blame = Blame()
        self._main: asyncio.Task[Any] | None = None
        self._ended: asyncio.Future[_Over] = self._host_loop.create_future()
        self._stopped: BaseException | None = None
        """Why this execution ends before its code does; nothing of it is executed any more."""
        self._cancelled: RunCancelled | None = None
        self._broken: NonDeterminismError | None = None
        # requests, by where they stand
        self._fresh: list[Ask] = []
        """Made in the activation that is not closed."""
        self._wanted: list[Ask] = []
        """Awaited now, their bodies not begun."""
        self._open: dict[int, Ask] = {}
        """Not delivered."""
        self._starts: dict[str, Ask] = {}
        """Children, by id."""
        self._forgotten: list[Ask] = []
        """Verbs that were called, have ended, and were never awaited."""
        self._idle: asyncio.TimerHandle | None = None
        self._due: deque[tuple[Row, Any, BaseException | None]] = deque()
        """On disk, not delivered."""
        self._delivering: list[str] = []
        """Messages that were heard and whose delivery is not recorded."""
        self._closed = -1
        """The last activation that is over."""
        self._is_live = self._is_over = self._is_scheduled = False
        self._ways: dict[str, Recorded] = {}
        """By change: whether the run takes the new way."""

    @property
    def runs(self) -> Any:
        return self._shared.workflows

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
        return self._execution.snapshot(self.standing())

    def standing(self) -> Status:
        """How the run stands now; takes as long however many steps there are."""
        status = self._execution.status
        if status is not Status.RUNNING or self._performer.bodies:
            return status
        found = self._tasks.standing()
        is_asleep = found is Status.RUNNING and self._time.is_armed and not self._tasks  # in asyncio.sleep
        return Status.SLEEPING if is_asleep else found

    # -- what verbs ask ------------------------------------------------------------------------------------------------

    def step(self, request: StepRequest) -> Coroutine[Any, Any, Any]:
        __tracebackhide__ = True
        return self._ask(Request(request.kind, request.name, functools.partial(arguments_of, request)), request.kind, request)

    def publish(self, published: Published) -> None:
        match published:
            case Items(name, count):
                self._facts.expect(published, "", name, count)
            case CalledOff():
                pass  # they were asked for, as the history tells
            case StandsFor(error, value):  # should the run end with that value, the failure is what ended it
                self._blame.stands_for(error, value)

    def wait(self, request: WaitRequest) -> Coroutine[Any, Any, Any]:
        __tracebackhide__ = True
        return self._ask(Request("sleep", request.name, str(request.wake)), "sleep", request)

    def start(self, request: StartRequest) -> str:
        """The child's id, fixed now; it begins when the code awaits next."""
        __tracebackhide__ = True
        self._check_open(request.workflow)
        if self._broken is not None:
            raise self._broken
        before = [other.request for other in self._fresh]
        ask = self._asked(Request("start", request.workflow, functools.partial(arguments_of, request)), "start", request)
        ask.is_wanted = True
        self._history.bind(ask.request, before)
        if request.run_id is None:
            request.run_id, request.on_conflict = self._tasks.key(ask.request), "keep"
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
        if self._broken is not None:
            raise self._broken
        if request.kind == PATCHED and request.name in self._ways:
            return self._ways[request.name]
        lane = current_lane.get()
        ask = Ask(Request(request.kind, request.name, ""), None, lane.path if lane else ())
        value = self._history.draw(ask.request, ask.lane)
        if value is None and request.kind == PATCHED and self._history.has_passed(one.request for one in self._fresh):
            self._ways[request.name] = False
            return False
        ask.value = value if value is not None else request.make(self._shared.clock.now())
        if request.kind == PATCHED:
            self._ways[request.name] = ask.value
        self._fresh.append(ask)
        return ask.value

    def _ask(self, request: Request, kind: str, what: Any) -> Coroutine[Any, Any, Any]:
        __tracebackhide__ = True
        self._check_open(request.name)
        if self._broken is not None:
            return _raises(self._broken)
        ask = self._asked(request, kind, what)
        ask.coro = self._answer(ask)
        return ask.coro

    def _asked(self, request: Request, kind: str, what: Any) -> Ask:
        lane = current_lane.get()
        ask = Ask(request, self._loop.create_future(), lane.path if lane else (), what)
        if kind:
            item = (what.items, what.item) if isinstance(what, StepRequest) else ()
            ask.path = self._facts.take("", request.name, *item)
            self._facts.add(Step(request.name, ask.path, kind, Status.PENDING))
        if isinstance(what, WaitRequest):
            ask.timer = timer_of(what, self._shared.clock.now())
        self._fresh.append(ask)
        return ask

    async def _answer(self, ask: Ask) -> Any:
        __tracebackhide__ = True
        ask.is_wanted = True
        ask.context = copy_context()
        self._wanted.append(ask)
        if ask.future is None or asyncio.get_running_loop() is not self._loop:
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
            self._host_loop.call_soon(self.stop, KeyboardInterrupt(f"{self._label} was interrupted"))
            raise KeyboardInterrupt
        if self._is_over or self._main is None or self._main.done():
            raise NotInRunError(
                f"step {name!r} was asked for when {self._label} was over; nothing was run. Await the task that asks for it in "
                "the workflow (await asyncio.gather(...)), then its steps are recorded"
            )
        if asyncio._get_running_loop() is not self._loop:
            raise NotSupportedError(
                f"step {name!r} of {self._label} was asked for outside the workflow's own code, by a thread or a callback; "
                "nothing was run. Call durable's verbs in the workflow function itself"
            )

    # -- the loop's timers ---------------------------------------------------------------------------------------------

    def timer(self, handle: events.TimerHandle, delay_s: float) -> None:
        lane = current_lane.get()
        ask = Ask(Request(TIMER, "", f"{delay_s:.6g}"), None, lane.path if lane else ())
        ask.handle = handle
        ask.is_wanted = True
        self._fresh.append(ask)

    def called_from_outside(self) -> None:
        self._host_loop.call_soon(self._end, _Over(Status.FAILED, error=self._never_woken()))

    def timer_cancelled(self, handle: events.TimerHandle) -> None:
        """The alarm is set anew when the code has stopped."""

    # -- stepping ------------------------------------------------------------------------------------------------------

    async def drive(self, function: Any) -> Any:
        """Execute the workflow's function from its recorded arguments; what it returns or raises, written down."""
        self._execution.begin(self)
        self._history, self._tasks.attempts = await self._log.load()
        self._recalled = Recalled(self._execution, self._history)
        args, kwargs = await self._arguments()
        self._time.begin(self._log.at_s)
        context = copy_context()
        context.run(current_run.set, self)
        context.run(current_lane.set, Lane())
        with self._loop.delivering(0.0):
            self._loop.call_soon(self._begin_main, function, args, kwargs, context=context)
        self._shared.ownership.changing.discard(self.id)
        self.hear(self._held.row, self._shared.ownership.inbox.of(self.id))  # sent before there was anybody to hear it
        if self._stopped is not None:
            self._end(_Over(Status.INTERRUPTED, error=self._stopped))
        elif self._cancelled is not None and self._history.is_empty:  # before its first line
            self._end(_Over(Status.CANCELLED, error=self._cancelled))
        else:
            self._schedule()
        try:
            try:
                over = await asyncio.shield(self._ended)
            except asyncio.CancelledError as stopped:
                self.stop(stopped)
                over = self._ended.result() if self._ended.done() else _Over(Status.INTERRUPTED, error=stopped)
            return await self._conclude(over)
        finally:
            self._close_loop()
            await self._execution.close()

    def _begin_main(self, function: Any, args: Any, kwargs: Any) -> None:
        self._main = self._loop.create_task(_called(function, args, kwargs), name=f"durable_nb run {self.id}")

    def create_lane(self, context: Any) -> None:
        """A task of the code's is created, in this context."""
        parent = current_lane.get()
        if parent is not None:
            context.run(current_lane.set, parent.child())

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._host_loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Go on until there is nothing more to do now. A plain callback: no task of the kernel's loop is current."""
        self._is_scheduled = False
        if self._is_over or self._loop.is_running():  # the code itself may run the kernel's loop, and mustn't be re-entered
            return
        until_s = time.perf_counter() + SLICE_S
        with self._loop.interruptible():
            self._step_on(until_s)

    def _step_on(self, until_s: float) -> None:
        try:
            with nullcontext() if self._is_live else self._muting.installed():
                goes_on = True
                if self._history.is_replaying():
                    # Entered once for all that is only repeated: nothing of the kernel's loop is needed.
                    with without_collector(), self._loop.entered():
                        while goes_on and self._history.is_replaying() and time.perf_counter() < until_s:
                            goes_on = self._go_on(until_s)
                while goes_on and time.perf_counter() < until_s:
                    goes_on = self._go_on(until_s)
                if goes_on:
                    self._schedule()
        except Interrupted:
            self._end(_Over(Status.INTERRUPTED, error=KeyboardInterrupt(f"{self._label} was interrupted")))
        except Mismatch as mismatch:
            self._break(self._explained(mismatch), until_s)
        except StoreError as error:
            self._end(_Over(Status.INTERRUPTED, error=error))
        except DurableError as error:
            self._end(_Over(Status.FAILED, error=error))
        except Exception as error:  # of the engine's own: told to whoever waits, instead of a run that hangs
            self._end(_Over(Status.INTERRUPTED, error=error))

    def _go_on(self, until_s: float) -> bool:
        """Let the code run, or deliver one thing to it; False where there is nothing to do."""
        history = self._history
        self._muting.is_on = history.is_repeating()  # what the code says now was said when it happened
        try:
            all_ran = self._loop.run_ready(until_s)
        finally:
            self._muting.is_on = False
        if not all_ran:
            return True
        if self._closed < history.activation or self._fresh:
            self._close()
        if self._main is not None and self._main.done():
            self._returned(self._main)
            return False
        if history.is_replaying():
            delivery = history.peek()
            if not self._recalled.is_at_hand(delivery.row, self._schedule, self._fail):
                return False
            history.check_delivery(delivery, self._open)
            history.activation += 1
            self._recall(delivery.row)
            return True
        if not self._is_live:
            self._go_live()
            return True
        if self._due:
            history.activation += 1
            self._deliver(*self._due.popleft())
            return True
        if any(ask.request.id >= 0 for ask in self._wanted):  # of many the kernel's loop has a turn between
            self._begin_wanted()
            self._schedule()
            return False
        self._time.arm(self._fire, self._tasks.is_at_work)
        self._check_idle()
        return False

    def _close(self) -> None:
        """The activation is over: its requests are matched; live, they begin."""
        history = self._history
        asked = [ask for ask in self._fresh if not ask.is_given_up]
        new = history.close([ask.request for ask in asked])
        self._fresh = []
        self._closed = history.activation
        fresh = {id(request) for request in new}
        for ask in asked:
            if ask.value is not None:
                if id(ask.request) in fresh:
                    self._outbox.unrecorded.append(self._as_recorded(ask))
                    self._outbox.has_values = True
                continue
            self._open[ask.request.id] = ask
            ask.activation = history.activation
            if id(ask.request) in fresh:
                self._outbox.unrecorded.append(self._as_recorded(ask))
            else:
                recorded = history.recorded(ask.request.id)
                if recorded is not None and recorded.timer is not None:
                    ask.timer = recorded.timer
            if (not ask.is_wanted and ask.request.kind == "sleep") or ask.handle is not None or ask.request.kind == "start":
                self._wanted.append(ask)
        if self._is_live:
            self._begin_wanted()

    def _as_recorded(self, ask: Ask) -> Asked:
        request = ask.request
        where = request.id, self._history.activation, request.kind, request.name, request.digest, request.n
        item = ask.what.item if isinstance(ask.what, StepRequest) else -1
        return Asked(*where, ask.lane, ask.timer, item, ask.value)

    def _go_live(self) -> None:
        """Everything recorded was asked for and delivered: from here on bodies begin."""
        self._is_live = True
        if self._cancelled is None:
            self._begin_wanted()
        else:
            self._record_cancellation(self._cancelled)  # what is wanted after that begins

    def _begin_wanted(self) -> None:
        wanted, self._wanted = self._wanted[:_AT_ONCE], self._wanted[_AT_ONCE:]
        for ask in wanted:
            if ask.request.id < 0:
                self._wanted.append(ask)  # its activation is not closed
            elif not ask.begun:
                self._begin(ask)
        self._tasks.let_go_of_sleeps()

    def _begin(self, ask: Ask) -> None:
        ask.begun = True
        if self._open.get(ask.request.id) is not ask or ask.is_given_up or (ask.future is not None and ask.future.done()):
            return
        if ask.handle is not None:
            self._time.add(ask.handle, ask.request.id)
            return
        kept = self._history.kept(ask.request)
        if kept is not None:
            row = replace(kept, request=ask.request.id, again=True)
            self._outbox.append(row, *_decoded(row))
            return
        self._tasks.begin(ask)

    def _fire(self, number: int, at_s: float) -> None:
        """A timer of the code's is due."""
        with contextlib.suppress(StoreError):
            self._outbox.append(Event("fired", number), at_s=at_s)

    def _check_idle(self) -> None:
        """Where nothing is left that can wake the code, it is told so, after a moment in which somebody may cancel it."""

        def look() -> None:
            self._idle = None
            if not self._is_over and self._is_idle():
                never = _Over(Status.FAILED, error=self._never_woken())
                self._end(never if self._cancelled is None else _Over(Status.CANCELLED, error=self._cancelled))

        if self._idle is None and self._is_idle():
            self._idle = self._host_loop.call_later(_IDLE_S, look)

    def _is_idle(self) -> bool:
        busy = len(self._tasks) or self._time.is_waiting or self._due or self._outbox.count or self._is_scheduled
        return not busy and self._is_live

    def _never_woken(self) -> NotSupportedError:
        return NotSupportedError(
            f"{self._label} waits for something that its own code can't bring about, and that a replay would not see (an "
            "asyncio.Event, Future or Queue of the notebook, a thread, or nothing at all). Do this in a step, await "
            "durable.run(name, function), and call the run's resume()"
        )

    # -- delivering ----------------------------------------------------------------------------------------------------

    def _recall(self, row: Row) -> None:
        """Deliver what is recorded."""
        value: Any = None
        error: BaseException | None = None
        ask = self._open.get(row.request)
        if ask is not None and ask.future is not None and not ask.future.done() and row.form:
            value, error = self._recalled.value_of(row, ask)
        self._deliver(row, value, error, restored=True)

    def _deliver(self, row: Row, value: Any, error: BaseException | None, *, restored: bool = False) -> None:
        self._loop.begin_delivery(row.at)
        try:
            if row.request < 0:
                self._deliver_cancellation(row)
            else:
                self._deliver_end(row, value, error, restored=restored)
        finally:
            self._loop.end_delivery()

    def _deliver_cancellation(self, row: Row) -> None:
        if self._main is not None:
            self._loop.call_soon(self._main.cancel)
        self._tasks.cancel()
        if self._cancelled is None:
            self._cancelled = cancelled(self.id, row.error)

    def _deliver_end(self, row: Row, value: Any, error: BaseException | None, *, restored: bool) -> None:
        ask = self._open.pop(row.request)
        if ask.is_forgotten:
            self._forgotten.append(ask)
        if isinstance(row, Outcome) and not row.failed and ask.path and isinstance(ask.what, StepRequest):
            self.observers.publish(Returned(ask.path, ask.what, value, row.usage))
        self._publish_end(ask, row, restored=restored)
        if ask.handle is not None:
            if not ask.handle.cancelled():
                self._loop.fire(ask.handle)
        elif ask.future is None or ask.future.done():
            return
        elif row.what == "dropped":
            ask.future.cancel()
        elif row.failed:
            error = error if error is not None else DurableError(row.error)
            if isinstance(error, StopIteration):
                error = RuntimeError(f"the step's body raised StopIteration({error.value!r})")
            self._blame.given(error, row.request)
            ask.future.set_exception(error)
            if not ask.is_wanted:
                ask.future.exception()  # it may be awaited later, or never
        else:
            ask.future.set_result(value)

    def _publish_end(self, ask: Ask, row: Row, *, restored: bool) -> None:
        if not ask.path:
            return
        if isinstance(row, Outcome):
            self._facts.add(ended_step(self._facts[ask.path], row, restored=restored))
        elif row.what == "dropped":
            self._facts.update(ask.path, status=Status.CANCELLED)
        else:
            self._facts.update(
                ask.path,
                status=Status.FAILED if row.failed else Status.COMPLETED,
                started_at=ask.timer.since.wall_s if ask.timer else row.wall_s,
                ended_at=row.wall_s,
                restored=restored,
                error=row.error or None,
                wake_at=None,
            )

    def _break(self, error: NonDeterminismError, until_s: float) -> None:
        """Whatever the code waits for, and whatever it asks for from here on, raises this: nothing is executed any more."""
        self._broken = error
        with self._loop.delivering(self._loop.now_s):
            for ask in (*self._open.values(), *self._fresh):
                if ask.future is not None and not ask.future.done():
                    ask.future.set_exception(error)
                    ask.future.exception()  # it needn't be awaited
        with contextlib.suppress(Interrupted, DurableError):
            self._loop.run_ready(until_s + 1.0)
        self._end(_Over(Status.FAILED, error=error))

    def _explained(self, mismatch: Mismatch) -> NonDeterminismError:
        what, _, columns = str(mismatch).partition("\n")
        return NonDeterminismError(
            f"{self._label} {what}; nothing was executed, and the records are as they were. Put the code back as it was and "
            f"call the run's resume(), or begin a new run\n{columns}"
        )

    # -- writing -------------------------------------------------------------------------------------------------------

    def _written(self, row: Row, value: Any, error: BaseException | None) -> None:
        """On disk: the code hears of it."""
        if not self._is_over:
            self._due.append((row, value, error))
            self._schedule()

    def _not_written(self, cause: BaseException | Verdict) -> None:
        if isinstance(cause, BaseException):
            self._fail(cause)
        elif cause is Verdict.MISSING:
            self._end(_Over(Status.INTERRUPTED, error=StoreError(f"{self._label}: an earlier record could not be written")))
        else:
            self._give_way()

    # -- ending --------------------------------------------------------------------------------------------------------

    def _returned(self, main: asyncio.Task[Any]) -> None:
        """The code is done: what it returned or raised."""
        self._history.check_returned()
        self._is_live, ended = True, self._history.undelivered()
        # Made before the last delivery, these had begun: in a former life, or they wait for a turn of the kernel's loop.
        for ask in self._wanted:
            if 0 <= ask.activation < self._history.activation and not ask.begun and ask.request.id not in ended:
                self._begin(ask)
        error = None if main.cancelled() else main.exception()
        if isinstance(error, RuntimeError) and "different" in str(error) and "loop" in str(error):
            error.add_note(f"durable_nb: {self._never_woken()}")
        if self._cancelled is not None:
            self._end(_Over(Status.CANCELLED, error=self._cancelled, ended_by=()))
        elif main.cancelled():
            own = RunCancelled(f"{self._label} ended with a CancelledError of its own code")
            self._end(_Over(Status.CANCELLED, error=own))
        elif error is not None:
            self._end(_Over(Status.FAILED, error=error, ended_by=self._blame.of(error)))
        else:
            asked = (*self._forgotten, *self._open.values(), *self._fresh)
            forgotten = [ask for ask in asked if ask.is_forgotten]
            if forgotten:
                name = forgotten[0].request.name
                self._end(
                    _Over(
                        Status.FAILED,
                        error=DurableError(
                            f"{self._label} called step {name!r} and never awaited it, so it was not run: write 'await' before "
                            "it, and call the run's resume()"
                        ),
                    )
                )
            else:
                self._end(_Over(Status.COMPLETED, value=main.result()))

    def stop(self, why: BaseException) -> None:
        """Cancelled, the code unwinds; for any other reason nothing of it is executed any more."""
        if self._is_over:
            return
        if isinstance(why, RunCancelled):
            self.cancel(why)
            return
        self._stopped = self._stopped or why
        self._end(_Over(Status.INTERRUPTED, error=self._stopped))

    def cancel(self, why: RunCancelled) -> None:
        """Unwind the code at its next await; a second time, end at once."""
        if self._cancelled is not None:
            if self._is_live:
                self._end(_Over(Status.CANCELLED, error=self._cancelled))
            return
        self._cancelled = why
        if self._is_live:
            self._record_cancellation(why)

    def _record_cancellation(self, why: RunCancelled) -> None:
        """The message that asked for it goes in the same commit."""
        consumed, self._delivering = tuple(self._delivering), []
        self._outbox.append(Event("cancel", error=str(why)), deletes=consumed)

    def die(self) -> None:
        """End as a kill would."""
        self.stop(asyncio.CancelledError())
        self._tasks.die()
        self._close_loop()

    def hear_soon(self, inbox: list[Received]) -> None:
        if asyncio._get_running_loop() is self._host_loop:
            self.hear(self._held.row, inbox)
        else:
            self._host_loop.call_soon_threadsafe(self.hear, self._held.row, inbox)

    def hear(self, lease: bytes | None, inbox: list[Received]) -> None:
        for received in self._execution.news(lease, inbox, self._give_way):
            match received.message:
                case Cancel(reason):
                    self._delivering.append(received.key)
                    self.cancel(cancelled(self.id, reason))
                case Restart():
                    self._shared.ownership.changing.add(self.id)  # the lease stays ours
                    self.stop(Restarted())

    def _give_way(self) -> None:
        """Another process owns the run: this one writes nothing more."""
        self._shared.ownership.lose(self._held)
        lost = self._stopped = self._execution.lost()
        if not self._is_over and self._main is not None and not self._loop.is_running():
            self._end(_Over(Status.INTERRUPTED, error=lost))
            with self._loop.delivering(self._loop.now_s):
                self._loop.call_soon(self._main.cancel)
            with contextlib.suppress(Interrupted, DurableError):
                self._loop.run_ready(time.perf_counter() + 1.0)
        self._end(_Over(Status.INTERRUPTED, error=lost))

    def _fail(self, error: BaseException) -> None:
        """The execution can't go on; the run can, when the cause is gone."""
        self._end(_Over(Status.INTERRUPTED, error=error))

    def _end(self, over: _Over) -> None:
        """The code is over. Bodies that have begun go on; nothing begins any more."""
        if self._is_over:
            return
        self._is_over = True
        self._outbox.is_closed = True
        self._time.stop()
        if not self._ended.done():
            self._ended.set_result(over)

    async def _conclude(self, over: _Over) -> Any:
        """Let begun bodies end, unwind the code, and write down how the run ended."""
        normal = over.status in (Status.COMPLETED, Status.FAILED) and self._stopped is None
        if not isinstance(over.error, NonDeterminismError):
            if normal:
                await self._tasks.drain(self._history.activation, lambda: self._stopped is not None)
            else:
                await self._tasks.stop()
        self._close_loop()
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
        await self._finish(status, error, over.ended_by, form, data)
        if status is Status.COMPLETED:
            return value
        if isinstance(error, Exception) or (status is Status.INTERRUPTED and isinstance(error, asyncio.CancelledError)):
            raise error from None
        if status is Status.INTERRUPTED:
            raise asyncio.CancelledError from error
        return None  # SystemExit: out of a task, it would end the loop; the record has it

    def _close_loop(self) -> None:
        for ask in (*self._forgotten, *self._open.values(), *self._fresh):
            if ask.coro is not None and inspect.getcoroutinestate(ask.coro) == inspect.CORO_CREATED:
                ask.coro.close()
        self._loop.close()

    async def _finish(
        self, status: Status, error: BaseException | None, ended_by: tuple[int, ...], form: str, data: bytes
    ) -> None:
        """Write down how the run ended."""
        if self._outbox.has_values and status is not Status.COMPLETED and self._broken is None:
            self._outbox.append(Event("asked"))  # resumed, the code gets the same
        data, blob = await self._execution.log.kept(data)
        await self._execution.finish(
            status,
            error=say(error) if error is not None else "",
            result=None if status is Status.INTERRUPTED else Result(form, data, blob),
            ended_by=ended_by,
            since=self._time.since,
            since_s=self._time.since_s,
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


async def _raises(error: BaseException) -> Any:
    """Not raised by the verb itself: of several that are called together, the others would never be awaited."""
    raise error


def _decoded(row: Row) -> tuple[Any, BaseException | None]:
    """What is given again of a row that was recorded before the run was resumed."""
    if not row.form or row.blob:
        return None, None
    value = _codec.decode(row.form, row.value)
    return (None, value) if row.failed else (value, None)


async def _called(function: Any, args: Any, kwargs: Any) -> Any:
    return await function(*args, **kwargs)
