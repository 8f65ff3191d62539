"""Steps the code of a workflow's run: through everything recorded, one delivery at a time; then live.

The code runs on a loop of its own (`workflow_loop`), stepped from callbacks of the kernel's loop. Bodies run on the kernel's
loop and in its threads, and none begins before every recorded event was asked for and delivered. What ends is committed, then
delivered, in the order of the commits: what the code has seen is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from asyncio import events
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from itertools import islice
from typing import Any

from msgspec import structs

from durable_nb import _codec
from durable_nb._current import Run, StepRequest, WaitRequest, current_run
from durable_nb._engine.asking import Ask, Lane, OpenAttempts, current_lane
from durable_nb._engine.blame import Blame
from durable_nb._engine.by_history import TIMER, History, Mismatch, Request, Row, Value, without_collector
from durable_nb._engine.execution import Execution, timer_of
from durable_nb._engine.outbox import Outbox
from durable_nb._engine.performer import ended_step
from durable_nb._engine.recalling import Recalled
from durable_nb._engine.request_tasks import RequestTasks, undelivered
from durable_nb._engine.run_log import LinearLog, cancelled
from durable_nb._engine.run_time import RunTime
from durable_nb._engine.workflow_loop import Interrupted, WorkflowLoop
from durable_nb._events import came
from durable_nb._facts import Status, Step
from durable_nb._journal import Verdict
from durable_nb._records import Asked, Event, Outcome
from durable_nb.errors import DurableError, NonDeterminismError, NotSupportedError, RunCancelled, RunTimeout, StoreError

SLICE_S = 0.01
"""So long the workflow's code has the kernel's loop at a time."""
_IDLE_S = 2.0
"""So long code may wait for what nothing in its run can bring about."""
_AT_ONCE = 32
"""So many bodies begin in one turn of the kernel's loop."""
_AT_ONCE_KINDS = ("start", "notify")
"""What the code asks for without awaiting it: it begins when the code awaits next, or is over."""


@dataclass(frozen=True, slots=True)
class Over:
    """How the code ended."""

    status: Status
    value: Any = None
    error: BaseException | None = None
    ended_by: tuple[int, ...] = ()


class Stepper:
    """Of one execution. Verbs hand it what the code asks for; it ends once, with `ended`."""

    def __init__(self, execution: Execution, *, lost: Callable[[], object]) -> None:
        """`lost` is called where another process owns the run."""
        shared, record = execution.shared, execution.record
        self._execution, self._facts, self._label = execution, execution.facts, execution.wording.label
        self._shared, self._lost = shared, lost
        self.run_time = RunTime(shared.clock, record.since, record.since_s)
        self._log = LinearLog(execution.log)
        self.outbox = Outbox(
            self._log,
            wall_s=execution.now_s,
            run_s=self.run_time.now_s,
            closed=lambda: self._closed,
            written=self._written,
            failed=self._not_written,
        )
        self._host_loop = execution.loop
        self.tasks = RequestTasks(
            execution,
            self._log,
            self.outbox,
            is_cancelled=lambda: not self.is_over and (self.cancelled or self._timed_out) is not None,
            failed=self.fail,
            lost=lost,
            interrupted=lambda: self._host_loop.call_soon(self.interrupt),
        )
        self._recalled: Recalled
        """Once the history is loaded."""
        self.loop = WorkflowLoop(self)  # type: ignore[abstract]  # the rest of a loop is refused, see there
        self._history = History(())
        self._muting = shared.muting()
        self._blame = Blame()
        self._main: asyncio.Task[Any] | None = None
        self.ended: asyncio.Future[Over] = self._host_loop.create_future()
        self.cancelled: RunCancelled | None = None
        """The run is being cancelled: its code unwinds."""
        self._timeout: RunTimeout | None = None
        """The run has taken too long; that is recorded when all that happened before is delivered."""
        self._timed_out: RunTimeout | None = None
        """The same, delivered: its code unwinds."""
        self.broken: NonDeterminismError | None = None
        # requests, by where they stand
        self._fresh: list[Ask] = []
        """Made in the activation that is not closed."""
        self._wanted: dict[Ask, None] = {}
        """Awaited now, their bodies not begun."""
        self._open: dict[int, Ask] = {}
        """Not delivered."""
        self._attempts = OpenAttempts()
        self._forgotten: list[Ask] = []
        """Verbs that were called, have ended, and were never awaited."""
        self._idle: asyncio.TimerHandle | None = None
        self._due: deque[tuple[Row, Any, BaseException | None]] = deque()
        """On disk, not delivered."""
        self._delivering: tuple[str, ...] = ()
        """Messages that asked for the cancellation, while that is not recorded."""
        self._closed = -1
        """The last activation that is over."""
        self.is_pending = False
        """The run is to begin later."""
        self.is_over = False
        self._is_live = self._is_scheduled = False

    # -- what the run's verbs hand over, and the course of its execution -------------------------------------------------

    @property
    def rows(self) -> int:
        """So many rows of the log are on disk, at least."""
        return self._log.on_disk

    @property
    def is_open(self) -> bool:
        """Is the code being executed? Then it may ask for something."""
        return not self.is_over and self._main is not None and not self._main.done()

    async def begin(self, run: Run, function: Any, read_arguments: Callable[[], Any]) -> None:
        """Load the history, and let the code begin as `run` with these arguments when `go` is called."""
        self._history, self.tasks.attempts, taken = await self._log.load()
        self._execution.arrivals.know(taken)
        self._recalled = Recalled(self._execution, self._history)
        args, kwargs = await read_arguments()
        self.run_time.begin(self._log.at_s)
        context = copy_context()
        context.run(current_run.set, run)
        context.run(current_lane.set, Lane())
        with self.loop.delivering(0.0):
            self.loop.call_soon(self._begin_main, function, args, kwargs, context=context)

    def go(self) -> None:
        """Step the code; one that was cancelled before its first line, or took too long before it, has ended."""
        if self.cancelled is not None and self._history.is_empty:
            self.end(Over(Status.CANCELLED, error=self.cancelled))
        elif self._timeout is not None and self._history.is_empty:
            self.end(Over(Status.FAILED, error=self._timeout))
        else:
            self._schedule()

    def ask(self, request: Request, kind: str, what: Any) -> Ask:
        """The code asks for something; `kind` is the step's that views show, '' for none."""
        lane = current_lane.get()
        ask = Ask(request, self.loop.create_future(), lane.path if lane else (), what)
        if (settled := self._attempts.settle(ask)) is not None:
            self._facts.update(settled.path, status=Status.FAILED)
        if kind and not ask.failed:
            item = (what.items, what.item) if isinstance(what, StepRequest) else ()
            ask.path = self._facts.take("", request.name, *item)
            prompt = what.of if kind == "decision" else ""
            self._facts.add(Step(request.name, ask.path, kind, Status.PENDING, prompt=prompt))
        if isinstance(what, WaitRequest):
            ask.timer = timer_of(what, self._shared.clock.now())
        self._fresh.append(ask)
        return ask

    def ask_now(self, request: Request, what: Any) -> Ask:
        """The same for a start, which must know now which of its equals it is. It begins when the code awaits next."""
        before = [other.request for other in self._fresh]
        ask = self.ask(request, request.kind, what)
        ask.is_wanted = True
        self._history.bind(request, before)
        return ask

    def child_id(self, request: Request) -> str:
        """Of a child that is started without an id: the same in every execution; in a fork, that of the run that it is of."""
        begun = self._history.end_of(request.id)
        recorded = _decoded(begun)[0] if begun is not None and not begun.failed else None
        return recorded or self.tasks.key(request)

    def want(self, ask: Ask) -> None:
        """The code awaits it."""
        ask.is_wanted = True
        ask.context = copy_context()
        self._wanted[ask] = None

    def draw(self, request: Request, make: Callable[[], Value], *, or_passed: bool = False) -> Value | None:
        """A value that the code gets in passing: the recorded one, else a new one. `or_passed`: None where the code has been
        here before without it."""  # fmt: skip
        lane = current_lane.get()
        ask = Ask(request, None, lane.path if lane else ())
        value = self._history.draw(request, ask.lane)
        if value is None and or_passed and self._history.has_passed(one.request for one in self._fresh):
            return None
        ask.value = value if value is not None else make()
        self._fresh.append(ask)
        return ask.value

    def stands_for(self, error: BaseException, value: Any) -> None:
        """Should the run end with that value, the failure is what ended it."""
        self._blame.stands_for(error, value)

    def interrupt(self) -> None:
        """A KeyboardInterrupt has met the code or a body: nothing of it is executed any more."""
        self.end(Over(Status.INTERRUPTED, error=KeyboardInterrupt(f"{self._label} was interrupted")))

    def cancel(self, why: RunCancelled, delivered: tuple[str, ...] = ()) -> None:
        """Unwind the code at its next await; a second time, end at once. `delivered`: the messages that ask for it go in the
        commit that records it."""  # fmt: skip
        self._delivering += delivered
        if self.cancelled is not None or self.is_pending:
            if self._is_live or self.is_pending:
                self.end(Over(Status.CANCELLED, error=self.cancelled or why))
            return
        self.cancelled = why
        if self._is_live:
            self._record_cancellation(why)

    def time_out(self, error: RunTimeout) -> None:
        """Unwind the code at its next await, unless it does already; the run fails with this error then."""
        if self._timeout is None:
            self._timeout = error
            if self._is_live:
                self._record_timeout(error)

    def is_busy(self) -> bool:
        """Is something on its way, so that time can't be skipped?"""
        others = any(not body.is_over and body.request.kind != "invoke" for body in self._shared.bodies.values())
        return others or not self._is_live or bool(self.outbox.count or self._due or self._is_scheduled)

    def unwind(self) -> None:
        """The execution has ended while its code is suspended: let it tidy up, without asking for anything."""
        if self._main is None or self.loop.is_running():
            return
        with self.loop.delivering(self.loop.now_s):
            self.loop.call_soon(self._main.cancel)
        with contextlib.suppress(Interrupted, DurableError):
            self.loop.run_ready(time.perf_counter() + 1.0)

    async def settle(self, *, drains: bool, returned: bool, is_stopped: Callable[[], bool]) -> None:
        """The code is over. Let begun bodies end, or stop them, and close what is suspended."""
        if self.broken is None:
            if drains:
                await self.tasks.drain(self._history.activation, is_stopped, returned=returned)
            else:
                await self.tasks.stop()
        self.close()

    def remember(self) -> None:
        """Record what the code got in passing: resumed, it gets the same."""
        if self.outbox.has_values and self.broken is None:
            self.outbox.append(Event("asked"))

    def is_asleep(self) -> bool:
        """Does nothing but the code's own timers (`asyncio.sleep`) keep it?"""
        return self.run_time.is_armed and not self.tasks

    # -- the loop's timers ---------------------------------------------------------------------------------------------

    def timer(self, handle: events.TimerHandle, delay_s: float) -> None:
        lane = current_lane.get()
        ask = Ask(Request(TIMER, "", f"{delay_s:.6g}"), None, lane.path if lane else ())
        ask.handle = handle
        ask.is_wanted = True
        self._fresh.append(ask)

    def called_from_outside(self) -> None:
        self._host_loop.call_soon(self.end, Over(Status.FAILED, error=self._never_woken()))

    def timer_cancelled(self, handle: events.TimerHandle) -> None:
        """The alarm is set anew when the code has stopped."""

    def create_lane(self, context: Any) -> None:
        """A task of the code's is created, in this context."""
        parent = current_lane.get()
        if parent is not None:
            context.run(current_lane.set, parent.child())

    # -- stepping ----------------------------------------------------------------------------------------------------

    def _begin_main(self, function: Any, args: Any, kwargs: Any) -> None:
        self._main = self.loop.create_task(_called(function, args, kwargs), name=f"durable_nb run {self._execution.record.id}")

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._host_loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Go on until there is nothing more to do now. A plain callback: no task of the kernel's loop is current."""
        self._is_scheduled = False
        if self.is_over or self.loop.is_running():  # the code itself may run the kernel's loop, and mustn't be re-entered
            return
        until_s = time.perf_counter() + SLICE_S
        with self.loop.interruptible():
            self._step_on(until_s)

    def _step_on(self, until_s: float) -> None:
        try:
            with nullcontext() if self._is_live else self._muting.installed():
                goes_on = True
                if self._history.is_replaying():
                    # Entered once for all that is only repeated: nothing of the kernel's loop is needed.
                    with without_collector(), self.loop.entered():
                        while goes_on and self._history.is_replaying() and time.perf_counter() < until_s:
                            goes_on = self._go_on(until_s)
                while goes_on and time.perf_counter() < until_s:
                    goes_on = self._go_on(until_s)
                if goes_on:
                    self._schedule()
        except Interrupted:
            self.interrupt()
        except Mismatch as mismatch:
            self._break(self._explained(mismatch), until_s)
        except StoreError as error:
            self.end(Over(Status.INTERRUPTED, error=error))
        except DurableError as error:
            self.end(Over(Status.FAILED, error=error))
        except Exception as error:  # of the engine's own: told to whoever waits, instead of a run that hangs
            self.end(Over(Status.INTERRUPTED, error=error))

    def _go_on(self, until_s: float) -> bool:
        """Let the code run, or deliver one thing to it; False where there is nothing to do."""
        history = self._history
        self._muting.is_on = history.is_repeating()  # what the code says now was said when it happened
        try:
            all_ran = self.loop.run_ready(until_s)
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
            if not self._recalled.is_at_hand(delivery.row, self._schedule, self.fail):
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
        self.run_time.arm(self._fire, self.tasks.is_at_work)
        self._check_idle()
        return False

    def _close(self) -> None:
        """The activation is over: its requests are matched; live, they begin."""
        history = self._history
        asked = [ask for ask in self._fresh if not ask.is_given_up]
        new = history.close([ask.request for ask in asked if not ask.failed])
        self._fresh = []
        self._closed = history.activation
        fresh = {id(request) for request in new}
        for ask in asked:
            if ask.value is not None:
                if id(ask.request) in fresh:
                    self.outbox.unrecorded.append(self._as_recorded(ask))
                    self.outbox.has_values = True
                continue
            self._open[ask.request.id] = ask
            ask.activation = history.activation
            if id(ask.request) in fresh:
                self.outbox.unrecorded.append(self._as_recorded(ask))
            else:
                recorded = history.recorded(ask.request.id)
                if recorded is not None and recorded.timer is not None:
                    ask.timer = recorded.timer
            is_asleep = not ask.is_wanted and ask.request.kind == "sleep"
            if is_asleep or ask.handle is not None or ask.request.kind in _AT_ONCE_KINDS:
                self._wanted[ask] = None
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
        self._execution.reporting.release()
        if self.cancelled is not None:  # what is wanted after that begins
            self._record_cancellation(self.cancelled)
        elif self._timeout is not None:
            self._record_timeout(self._timeout)
        else:
            self._begin_wanted()

    def _begin_wanted(self) -> None:
        for ask in list(islice(self._wanted, _AT_ONCE)):
            del self._wanted[ask]
            if ask.request.id < 0:
                self._wanted[ask] = None  # its activation is not closed
            elif not ask.begun:
                self._begin(ask)
        self.tasks.let_go_of_waits()

    def _begin(self, ask: Ask) -> None:
        ask.begun = True
        if self._open.get(ask.request.id) is not ask or ask.is_given_up or (ask.future is not None and ask.future.done()):
            return
        if ask.handle is not None:
            self.run_time.add(ask.handle, ask.request.id)
            return
        kept = self._history.kept(ask.request)
        if kept is not None:
            row = structs.replace(kept, request=ask.request.id, again=True)
            value, error = _decoded(row)
            self.outbox.append(row, _as_asked(ask, row, value), error)
            return
        self.tasks.begin(ask)

    def _fire(self, number: int, at_s: float) -> None:
        """A timer of the code's is due."""
        with contextlib.suppress(StoreError):
            self.outbox.append(Event("fired", number), at_s=at_s)

    def _check_idle(self) -> None:
        """Where nothing is left that can wake the code, it is told so, after a moment in which somebody may cancel it."""

        def look() -> None:
            self._idle = None
            if not self.is_over and self._is_idle():
                self.end(self._unwound() or Over(Status.FAILED, error=self._never_woken()))

        if self._idle is None and self._is_idle():
            self._idle = self._host_loop.call_later(_IDLE_S, look)

    def _is_idle(self) -> bool:
        busy = len(self.tasks) or self.run_time.is_waiting or self._due or self.outbox.count or self._is_scheduled
        return not busy and self._is_live

    def _never_woken(self) -> NotSupportedError:
        return NotSupportedError(
            f"{self._label} waits for something that its own code can't bring about, and that a replay would not see (an "
            "asyncio.Event, Future or Queue of the notebook, a thread, or nothing at all). Do this in a step, await "
            "durable.run(name, function), and call the run's resume()"
        )

    # -- delivering --------------------------------------------------------------------------------------------------

    def _recall(self, row: Row) -> None:
        """Deliver what is recorded."""
        value: Any = None
        error: BaseException | None = None
        ask = self._open.get(row.request)
        if ask is not None and ask.future is not None and not ask.future.done():
            if row.form:
                value, error = self._recalled.value_of(row, ask)
            value = _as_asked(ask, row, value)
        self._deliver(row, value, error, restored=True)

    def _deliver(self, row: Row, value: Any, error: BaseException | None, *, restored: bool = False) -> None:
        self.loop.begin_delivery(row.at)
        try:
            if row.request < 0:
                self._deliver_cancellation(row)
            else:
                self._deliver_end(row, value, error, restored=restored)
        finally:
            self.loop.end_delivery()

    def _deliver_cancellation(self, row: Row) -> None:
        if self._main is not None:
            self.loop.call_soon(self._main.cancel)
        if row.what == "timeout":
            self._timed_out = self._timeout = RunTimeout(row.error)
        elif self.cancelled is None:
            self.cancelled = cancelled(self._execution.record.id, row.error)
        self.tasks.cancel(list(self._open.values()), f"with the run {self._execution.record.id!r}, which invoked it")

    def _deliver_end(self, row: Row, value: Any, error: BaseException | None, *, restored: bool) -> None:
        ask = self._open.pop(row.request)
        self._wanted.pop(ask, None)  # repeated, it never begins
        if ask.is_forgotten:
            self._forgotten.append(ask)
        self._publish_end(ask, row, restored=restored)
        if isinstance(row, Event) and row.source:
            if ask.future is not None and ask.future.done():  # given up meanwhile: the next that waits for such an event has it
                self._execution.arrivals.give_back(undelivered(row, ask))
            else:
                self._execution.arrivals.take(row.source)
        if isinstance(row, Outcome) and row.is_attempt:
            if ask.future is not None and not ask.future.done():
                self._attempts.add(ask, row.attempts)
            else:  # the code has given it up
                self._facts.update(ask.path, status=Status.FAILED)
        if ask.handle is not None:
            if not ask.handle.cancelled():
                self.loop.fire(ask.handle)
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
            if not ask.is_wanted or ask.request.kind == "notify":
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
        self.broken = error
        with self.loop.delivering(self.loop.now_s):
            for ask in (*self._open.values(), *self._fresh):
                if ask.future is not None and not ask.future.done():
                    ask.future.set_exception(error)
                    ask.future.exception()  # it needn't be awaited
        with contextlib.suppress(Interrupted, DurableError):
            self.loop.run_ready(until_s + 1.0)
        self.end(Over(Status.FAILED, error=error))

    def _explained(self, mismatch: Mismatch) -> NonDeterminismError:
        what, _, columns = str(mismatch).partition("\n")
        return NonDeterminismError(
            f"{self._label} {what}; nothing was executed, and the records are as they were. Put the code back as it was and "
            f"call the run's resume(), or begin a new run\n{columns}"
        )

    # -- writing -----------------------------------------------------------------------------------------------------

    def _written(self, row: Row, value: Any, error: BaseException | None) -> None:
        """On disk: the code hears of it."""
        if not self.is_over:
            self._due.append((row, value, error))
            self._schedule()

    def _not_written(self, cause: BaseException | Verdict) -> None:
        if isinstance(cause, BaseException):
            self.fail(cause)
        elif cause is Verdict.MISSING:
            self.end(Over(Status.INTERRUPTED, error=StoreError(f"{self._label}: an earlier record could not be written")))
        else:
            self._lost()

    def _record_cancellation(self, why: RunCancelled) -> None:
        """The message that asked for it goes in the same commit."""
        consumed, self._delivering = self._delivering, ()
        self.outbox.append(Event("cancel", error=str(why)), deletes=consumed)

    def _record_timeout(self, error: RunTimeout) -> None:
        if self.cancelled is None:
            self.outbox.append(Event("timeout", error=str(error)))

    # -- ending ------------------------------------------------------------------------------------------------------

    def _returned(self, main: asyncio.Task[Any]) -> None:
        """The code is done: what it returned or raised."""
        self._history.check_returned()
        self._is_live, ended = True, self._history.undelivered()
        # Made before the last delivery, these had begun: in a former life, or they wait for a turn of the kernel's loop.
        # So do what returns at once: a child, an event.
        for ask in list(self._wanted):
            at_latest = self._history.activation - (ask.request.kind not in _AT_ONCE_KINDS)
            if 0 <= ask.activation <= at_latest and not ask.begun and ask.request.id not in ended:
                self._begin(ask)
        error = None if main.cancelled() else main.exception()
        if isinstance(error, RuntimeError) and "different" in str(error) and "loop" in str(error):
            error.add_note(f"durable_nb: {self._never_woken()}")
        if (unwound := self._unwound()) is not None:
            self.end(unwound)
        elif main.cancelled():
            own = RunCancelled(f"{self._label} ended with a CancelledError of its own code")
            self.end(Over(Status.CANCELLED, error=own))
        elif error is not None:
            self.end(Over(Status.FAILED, error=error, ended_by=self._blame.of(error)))
        else:
            asked = (*self._forgotten, *self._open.values(), *self._fresh)
            forgotten = [ask for ask in asked if ask.is_forgotten]
            if forgotten:
                name = forgotten[0].request.name
                self.end(
                    Over(
                        Status.FAILED,
                        error=DurableError(
                            f"{self._label} called step {name!r} and never awaited it, so it was not run: write 'await' before "
                            "it, and call the run's resume()"
                        ),
                    )
                )
            else:
                self.end(Over(Status.COMPLETED, value=main.result()))

    def _unwound(self) -> Over | None:
        """How the run ends when its code has unwound; None where it was not told to."""
        if self.cancelled is not None:
            return Over(Status.CANCELLED, error=self.cancelled)
        if self._timed_out is not None:
            return Over(Status.FAILED, error=self._timed_out, ended_by=(-1,))
        return None

    def fail(self, error: BaseException) -> None:
        """The execution can't go on; the run can, when the cause is gone."""
        self.end(Over(Status.INTERRUPTED, error=error))

    def end(self, over: Over) -> None:
        """The code is over. Bodies that have begun go on; nothing begins any more."""
        if self.is_over:
            return
        self.is_over = True
        for ask in self._attempts.left():
            self._facts.update(ask.path, status=Status.FAILED)
        self.outbox.is_closed = True
        self.run_time.stop()
        if not self.ended.done():
            self.ended.set_result(over)

    def close(self) -> None:
        for ask in (*self._forgotten, *self._open.values(), *self._fresh):
            if ask.coro is not None and inspect.getcoroutinestate(ask.coro) == inspect.CORO_CREATED:
                ask.coro.close()
        self.loop.close()


def _decoded(row: Row) -> tuple[Any, BaseException | None]:
    """What is given again of a row that was recorded before the run was resumed."""
    if not row.form or row.blob:
        return None, None
    value = _codec.decode(row.form, row.value)
    return (None, value) if row.failed else (value, None)


def _as_asked(ask: Ask, row: Row, value: Any) -> Any:
    """What the code gets of a recorded value."""
    return came(ask.request.kind, value, timed_out=row.timed_out) if isinstance(row, Event) and row.what == "arrived" else value


async def _called(function: Any, args: Any, kwargs: Any) -> Any:
    return await function(*args, **kwargs)
