"""One execution of a workflow's run. Its steps are identified by history: replay goes the way the run went.

The workflow's code runs on a loop of its own (`_workflow_loop`), which this object steps from callbacks of the kernel's loop:
first through everything recorded, one delivery at a time; then live. Bodies run on the kernel's loop and in its threads, and
none begins before every recorded event was asked for and delivered. What ends is committed, then delivered, in the order of
the commits: what the code has seen is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import heapq
import inspect
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from durable_nb import _codec, _patches, _usage
from durable_nb import _records as rec
from durable_nb._attempt import Attempt
from durable_nb._clock import RECHECK_S, Instant, elapsed_s, remaining_s, say_duration
from durable_nb._current import Body, Limit, SleepRequest, StartRequest, StepRequest, current_body, current_run
from durable_nb._facts import Paths, Snapshot, Status, Step, standing
from durable_nb._fingerprint import Unhashable
from durable_nb._history import TIMER, History, Mismatch, Request, Row, without_collector
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Arguments, Asked, Attempts, Event, Lease, Outcome, Result, RunRecord, Timer, unpack
from durable_nb._replay import CutOff, Perform, Retry, Wait, decide, decide_sleep
from durable_nb._request import PYTHON, Inputs, arguments_of, code_of, fingerprint_of, packed_changes, provenance_of, said
from durable_nb._retry import retry_delay_s
from durable_nb._run import Held, Stage, cancelled, digest_of, encoded, say
from durable_nb._run_log import RunLog
from durable_nb._workflow_loop import Interrupted, WorkflowLoop
from durable_nb.errors import (
    CorruptStoreError,
    DurableError,
    LeaseLost,
    NonDeterminismError,
    NotInRunError,
    NotSupportedError,
    RunCancelled,
    StepInterrupted,
    StepTimeout,
    StoreError,
    UnserializableError,
    UntrustedStoreError,
)

if TYPE_CHECKING:
    from asyncio import events

    from durable_nb._engine import Engine

SLICE_S = 0.01
"""So long the workflow's code has the kernel's loop at a time."""
_SAY_AFTER_S = 1.0
"""A request whose body has run for so long without a commit of the run is committed by itself, for other processes to see."""
_IDLE_S = 2.0
"""So long code may wait for what nothing in its run can bring about."""
_UNWIND_S = 2.0
"""How long an ended run waits for cancelled bodies to unwind."""
_SURE_S = 0.1
"""A commit that was applied so short a time ago says as much as looking. A stopped process's time passes too."""
_AT_ONCE = 32
"""So many bodies begin in one turn of the kernel's loop."""
_LOOKS = 100
"""So many recorded steps of one name are compared with what is asked for now. Comparing is most of what a replay costs."""

_lane: ContextVar[_Lane | None] = ContextVar("durable_nb_lane", default=None)


class _Lane:
    """Where a task of the workflow's stands in the tree of its tasks."""

    __slots__ = ("_children", "path")

    def __init__(self, path: tuple[int, ...] = ()) -> None:
        self.path, self._children = path, 0

    def child(self) -> _Lane:
        self._children += 1
        return _Lane((*self.path, self._children))


class _Ask:
    """A request of the code's, from the call of its verb to its delivery."""

    __slots__ = (
        "activation",
        "begun",
        "context",
        "coro",
        "fact",
        "future",
        "handle",
        "is_wanted",
        "lane",
        "request",
        "task",
        "timer",
        "what",
    )

    def __init__(self, request: Request, future: asyncio.Future[Any] | None, lane: tuple[int, ...], what: Any = None) -> None:
        self.request, self.future, self.lane, self.what = request, future, lane, what
        self.handle: events.TimerHandle | None = None
        self.coro: Coroutine[Any, Any, Any] | None = None
        self.timer: Timer | None = None
        self.fact: Step | None = None
        self.task: asyncio.Task[Any] | None = None
        self.context: Context | None = None
        """Of the task that awaits it: its body sees the same context variables."""
        self.is_wanted = self.begun = False
        self.activation = -1
        """The one that it was made in."""

    @property
    def is_given_up(self) -> bool:
        """Does nobody wait for it any more, and nobody will?"""
        if self.handle is not None:
            return self.handle.cancelled()
        if self.future is not None and self.future.cancelled():
            return True
        return not self.is_wanted and self.coro is not None and inspect.getcoroutinestate(self.coro) == inspect.CORO_CLOSED


@dataclass(frozen=True, slots=True)
class _Over:
    """How the code ended."""

    status: Status
    value: Any = None
    error: BaseException | None = None
    ended_by: tuple[int, ...] = ()


class WorkflowRun:
    """What verbs ask, in a workflow's run (`_current.Run`)."""

    is_replayed = True

    def __init__(self, engine: Engine, record: RunRecord, held: Held) -> None:
        self.engine, self.record, self._held = engine, record, held
        self.id, self.name = record.id, record.name
        self.what = f"run {record.id!r} of workflow {record.name!r}"
        self.stage = Stage()
        self.status = Status.RUNNING
        self.ended_at: float | None = None
        self._log = RunLog(engine.store, record, held)
        self._began_at = record.started_at
        self._host = asyncio.get_running_loop()
        self._loop = WorkflowLoop(self)  # type: ignore[abstract]  # the rest of a loop is refused, see there
        self._history = History(())
        self._main: asyncio.Task[Any] | None = None
        self._ended: asyncio.Future[_Over] = self._host.create_future()
        self._stopped: BaseException | None = None
        """Why this execution ends before its code does; nothing of it is executed any more."""
        self._cancelled: RunCancelled | None = None
        self._broken: NonDeterminismError | None = None
        self._paths, self._facts = Paths(), dict[str, Step]()
        self._attempts: dict[int, Attempts] = {}
        self._anchor = record.since or engine.clock.now()
        self._anchor_s = record.since_s
        # requests, by where they stand
        self._fresh: list[_Ask] = []
        """Made in the activation that is not closed."""
        self._wanted: list[_Ask] = []
        """Awaited now, their bodies not begun."""
        self._unsaid: list[Asked] = []
        """On no row yet."""
        self._open: dict[int, _Ask] = {}
        """Not delivered."""
        self._working: dict[int, _Ask] = {}
        """With a task of the engine's at work on them."""
        self._bodies: dict[int, Attempt] = {}
        self._timers: list[tuple[float, int, _Ask]] = []
        self._alarm: asyncio.Task[None] | None = None
        self._armed_s = 0.0
        self._starts: dict[str, _Ask] = {}
        """Children, by id."""
        self._given: dict[int, Inputs] = {}
        """Inputs of the steps whose bodies are at work."""
        self._holders: dict[int, set[int]] = {}
        """By identity: objects among these inputs, and the requests whose bodies have them."""
        self._forgotten: list[_Ask] = []
        """Verbs that were called, have ended, and were never awaited."""
        self._sleeping: dict[int, _Ask] = {}
        self._unapplied = 0
        """Rows handed over that are not on disk yet."""
        self._handed_over: asyncio.Future[Verdict] | None = None
        """The last of them."""
        self._saying: asyncio.TimerHandle | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._inbox: deque[tuple[Row, Any, BaseException | None]] = deque()
        self._loaded: tuple[int, bytes, bytes] | None = None
        """Of the next delivery: large values, read from their files."""
        self._errors: dict[int, tuple[int, BaseException]] = {}
        """By identity: exceptions that the code was given, and of which request."""
        self._answers: dict[int, tuple[int, Any]] = {}
        self._admitted: dict[int, Limit] = {}
        """Requests with an attempt that their limit counts."""
        self._closed = -1
        self._muting = engine.muting()
        self._is_live = self._is_over = self._is_scheduled = False
        self._last_commit_s = time.monotonic()
        self._looked: Counter[str] = Counter()

    @property
    def runs(self) -> Any:
        return self.engine.workflows

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._host

    # -- facts ---------------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """How the run and its steps stand now."""
        steps = tuple(self._facts.values())
        return Snapshot(self.id, self.name, self.standing(), self._began_at, self.ended_at, steps, self.record.labels)

    def standing(self) -> Status:
        """How the run stands now; takes as long however many steps there are."""
        if self.status is not Status.RUNNING or self._bodies:
            return self.status
        found = standing([ask.fact for ask in self._working.values() if ask.fact is not None])
        is_asleep = found is Status.RUNNING and self._alarm is not None and not self._working  # in asyncio.sleep
        return Status.SLEEPING if is_asleep else found

    def stop_soon(self, why: BaseException) -> None:
        """The same as `stop`, from any thread."""
        if asyncio._get_running_loop() is self._host:
            self.stop(why)
        else:
            self._host.call_soon_threadsafe(self.stop, why)

    def _tell(self, ask: _Ask, **news: Any) -> None:
        if ask.fact is not None:
            ask.fact = self._facts[ask.fact.path] = replace(ask.fact, **news)
            self.stage.changed()

    def _now_s(self) -> float:
        return self.engine.clock.now().wall_s

    def _run_s(self) -> float:
        """The run's time: seconds since it was started, but for those in which it had failed."""
        return self._anchor_s + elapsed_s(self._anchor, self.engine.clock.now())

    # -- what verbs ask ------------------------------------------------------------------------------------------------

    def step(self, request: StepRequest) -> Coroutine[Any, Any, Any]:
        __tracebackhide__ = True
        return self._ask(Request(request.kind, request.name, functools.partial(arguments_of, request)), request.kind, request)

    def expect(self, name: str, count: int) -> list[str]:
        return [self._paths.take("", name, item) for item in range(count)]

    def call_off(self, paths: list[str]) -> None:
        """They were asked for, as the history tells."""

    def sleep(self, request: SleepRequest) -> Coroutine[Any, Any, None]:
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
            request.run_id, request.on_conflict = self._key(ask.request), "keep"
        self._starts[request.run_id] = ask
        return request.run_id

    async def result_of(self, run_id: str) -> Any:
        """What another run comes to, recorded in this one."""
        __tracebackhide__ = True
        start = self._starts.get(run_id)
        if start is not None and start.future is not None:
            await asyncio.shield(start.future)  # a conflict is raised here
        return await self._ask(Request("result", run_id, ""), "", None)

    def _ask(self, request: Request, kind: str, what: Any) -> Coroutine[Any, Any, Any]:
        __tracebackhide__ = True
        self._check_open(request.name)
        if self._broken is not None:
            return _raises(self._broken)
        ask = self._asked(request, kind, what)
        ask.coro = self._answer(ask)
        return ask.coro

    def _asked(self, request: Request, kind: str, what: Any) -> _Ask:
        lane = _lane.get()
        ask = _Ask(request, self._loop.create_future(), lane.path if lane else (), what)
        if kind:
            path = what.path if isinstance(what, StepRequest) else ""
            ask.fact = Step(request.name, path or self._paths.take("", request.name), kind, Status.PENDING)
            self._facts[ask.fact.path] = ask.fact
            self.stage.changed()
        if isinstance(what, SleepRequest):
            ask.timer = _timer_of(what, self.engine.clock.now())
        self._fresh.append(ask)
        return ask

    async def _answer(self, ask: _Ask) -> Any:
        __tracebackhide__ = True
        ask.is_wanted = True
        ask.context = copy_context()
        self._wanted.append(ask)
        if ask.future is None or asyncio.get_running_loop() is not self._loop:
            raise NotSupportedError(
                f"{ask.request.said} of {self.what} was awaited on another event loop; nothing was run. Await it in the "
                "workflow's own code"
            )
        return await ask.future

    def _check_open(self, name: str) -> None:
        __tracebackhide__ = True
        if isinstance(self._stopped, LeaseLost):
            raise asyncio.CancelledError
        if isinstance(sys.exc_info()[1], KeyboardInterrupt):  # a `finally` that it came to asks for no step
            self._host.call_soon(self.stop, KeyboardInterrupt(f"{self.what} was interrupted"))
            raise KeyboardInterrupt
        if self._is_over or self._main is None or self._main.done():
            raise NotInRunError(
                f"step {name!r} was asked for when {self.what} was over; nothing was run. Await the task that asks for it in "
                "the workflow (await asyncio.gather(...)), then its steps are recorded"
            )
        if asyncio._get_running_loop() is not self._loop:
            raise NotSupportedError(
                f"step {name!r} of {self.what} was asked for outside the workflow's own code, by a thread or a callback; "
                "nothing was run. Call durable's verbs in the workflow function itself"
            )

    # -- the loop's timers ---------------------------------------------------------------------------------------------

    def timer(self, handle: events.TimerHandle, delay_s: float) -> None:
        lane = _lane.get()
        ask = _Ask(Request(TIMER, "", f"{delay_s:.6g}"), None, lane.path if lane else ())
        ask.handle = handle
        ask.is_wanted = True
        self._fresh.append(ask)

    def called_from_outside(self) -> None:
        self._host.call_soon(self._end, _Over(Status.FAILED, error=self._never_woken()))

    def timer_cancelled(self, handle: events.TimerHandle) -> None:
        """The alarm is set anew when the code has stopped: `_arm`."""

    # -- stepping ------------------------------------------------------------------------------------------------------

    async def drive(self, function: Any) -> Any:
        """Execute the workflow's function from its recorded arguments; what it returns or raises, written down."""
        self.engine.active[self.id] = self
        self._history, self._attempts = await self._log.load()
        args, kwargs = await self._arguments()
        self._anchor_s, self._anchor = max(self._run_s(), self._log.at_s), self.engine.clock.now()
        context = copy_context()
        context.run(current_run.set, self)
        context.run(_lane.set, _Lane())
        with self._loop.delivering(0.0):
            self._loop.call_soon(self._begin_main, function, args, kwargs, context=context)
        self.engine.changing.discard(self.id)
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

    def _begin_main(self, function: Any, args: Any, kwargs: Any) -> None:
        self._main = self._loop.create_task(_called(function, args, kwargs), name=f"durable_nb run {self.id}")

    def create_lane(self, context: Any) -> None:
        """A task of the code's is created, in this context."""
        parent = _lane.get()
        if parent is not None:
            context.run(_lane.set, parent.child())

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._host.call_soon(self._pump)

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
                    with (
                        without_collector(),
                        self._loop.entered(),
                    ):  # once for all that is only repeated: nothing of the kernel's loop is needed
                        while goes_on and self._history.is_replaying() and time.perf_counter() < until_s:
                            goes_on = self._go_on(until_s)
                while goes_on and time.perf_counter() < until_s:
                    goes_on = self._go_on(until_s)
                if goes_on:
                    self._schedule()
        except Interrupted:
            self._end(_Over(Status.INTERRUPTED, error=KeyboardInterrupt(f"{self.what} was interrupted")))
        except Mismatch as mismatch:
            self._break(self._told(mismatch), until_s)
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
            if not self._is_at_hand(delivery.row):
                return False
            history.check_delivery(delivery, self._open)
            history.activation += 1
            self._recall(delivery.row)
            return True
        if not self._is_live:
            self._go_live()
            return True
        if self._inbox:
            history.activation += 1
            self._deliver(*self._inbox.popleft())
            return True
        if any(
            ask.request.id >= 0 for ask in self._wanted[:1]
        ):  # many were asked for at once: the kernel's loop has a turn between
            self._begin_wanted()
            self._schedule()
            return False
        self._arm()
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
            self._open[ask.request.id] = ask
            ask.activation = history.activation
            if id(ask.request) in fresh:
                self._unsaid.append(self._as_recorded(ask))
            else:
                recorded = history.recorded(ask.request.id)
                if recorded is not None and recorded.timer is not None:
                    ask.timer = recorded.timer
            if (not ask.is_wanted and ask.request.kind == "sleep") or ask.handle is not None or ask.request.kind == "start":
                self._wanted.append(ask)
        if self._is_live:
            self._begin_wanted()

    def _as_recorded(self, ask: _Ask) -> Asked:
        request = ask.request
        where = request.id, self._history.activation, request.kind, request.name, request.digest, request.n
        return Asked(*where, ask.lane, ask.timer)

    def _go_live(self) -> None:
        """Everything recorded was asked for and delivered: from here on bodies begin."""
        self._is_live = True
        if self._cancelled is None:
            self._begin_wanted()
        else:
            self._append(Event("cancel", error=str(self._cancelled)))  # what is wanted after that begins

    def _begin_wanted(self) -> None:
        wanted, self._wanted = self._wanted[:_AT_ONCE], self._wanted[_AT_ONCE:]
        for ask in wanted:
            if ask.request.id < 0:
                self._wanted.append(ask)  # its activation is not closed
            elif not ask.begun:
                self._begin(ask)
        for ask in list(self._sleeping.values()):
            if ask.is_given_up and ask.task is not None:
                ask.task.cancel()

    def _begin(self, ask: _Ask) -> None:
        ask.begun = True
        if self._open.get(ask.request.id) is not ask or ask.is_given_up or (ask.future is not None and ask.future.done()):
            return
        if ask.handle is not None:
            heapq.heappush(self._timers, (ask.handle.when(), ask.request.id, ask))
            return
        kept = self._history.kept(ask.request)
        if kept is not None:
            row = replace(kept, request=ask.request.id, again=True)
            self._append(row, None, None, recorded=True)
            return
        match ask.request.kind:
            case "sleep":
                work = self._sleep
                self._sleeping[ask.request.id] = ask
            case "start" | "result":
                work = self._ask_engine
            case _:
                work = self._perform
        self._working[ask.request.id] = ask
        ask.task = self._host.create_task(self._guarded(ask, work), context=copy_context())

    async def _guarded(self, ask: _Ask, work: Callable[[_Ask], Coroutine[Any, Any, None]]) -> None:
        """An engine's task for one request. A disk that refuses ends the execution; it goes on when the cause is gone."""
        try:
            await work(ask)
        except (StoreError, LeaseLost) as error:
            self._end(_Over(Status.INTERRUPTED, error=error))
        finally:
            self._working.pop(ask.request.id, None)
            self._sleeping.pop(ask.request.id, None)
            if ask.request.id in self._admitted and self._handed_over is not None:
                self._handed_over.add_done_callback(lambda _: self._leave(ask.request.id))

    def _leave(self, number: int) -> None:
        """What an attempt came to is on disk: of those that share its limit, the next may begin."""
        limit = self._admitted.pop(number, None)
        if limit is not None:
            limit.leave()

    def _arm(self) -> None:
        """Have the earliest timer wake the code."""
        while self._timers and self._timers[0][2].is_given_up:
            heapq.heappop(self._timers)
        due_s = self._timers[0][0] if self._timers else None
        if self._alarm is not None:
            if not self._alarm.done() and due_s == self._armed_s:
                return
            self._alarm.cancel()
            self._alarm = None
        if due_s is not None:
            self._armed_s = due_s
            self._alarm = self._host.create_task(self._wake(due_s))

    async def _wake(self, due_s: float) -> None:
        left = due_s - self._run_s()
        while left > 0:
            piece = min(left, RECHECK_S)
            is_over = await self.engine.clock.wait(piece, self._is_at_work)
            left = left - piece if is_over else due_s - self._run_s()
        if self._timers and self._timers[0][0] == due_s:
            _, number, _ = heapq.heappop(self._timers)
            self._alarm = None
            with contextlib.suppress(StoreError):
                self._append(Event("fired", number), at_s=due_s)

    def _is_at_work(self) -> bool:
        """Is a body executed, or about to be?"""
        at_work = (Status.PENDING, Status.RUNNING)
        return any(
            isinstance(ask.what, StepRequest) and ask.fact is not None and ask.fact.status in at_work
            for ask in self._working.values()
        )

    def _check_idle(self) -> None:
        """Where nothing is left that can wake the code, it is told so, after a moment in which somebody may cancel it."""

        def look() -> None:
            self._idle = None
            if not self._is_over and self._is_idle():
                never = _Over(Status.FAILED, error=self._never_woken())
                self._end(never if self._cancelled is None else _Over(Status.CANCELLED, error=self._cancelled))

        if self._idle is None and self._is_idle():
            self._idle = self._host.call_later(_IDLE_S, look)

    def _is_idle(self) -> bool:
        busy = self._working or self._timers or self._inbox or self._unapplied or self._is_scheduled
        return not busy and self._is_live

    def _never_woken(self) -> NotSupportedError:
        return NotSupportedError(
            f"{self.what} waits for something that its own code can't bring about, and that a replay would not see (an "
            "asyncio.Event, Future or Queue of the notebook, a thread, or nothing at all). Do this in a step, await "
            "durable.run(name, function), and call the run's resume()"
        )

    # -- delivering ----------------------------------------------------------------------------------------------------

    def _is_at_hand(self, row: Row) -> bool:
        """Are the large values of a record here? Else they are fetched, and it goes on then."""
        names = [row.blob, row.patches_blob if isinstance(row, Outcome) else ""]
        if not any(names):
            return True
        if self._loaded is not None and self._loaded[0] == self._history.activation:
            return True

        async def fetch() -> None:
            try:
                found = [await self._log.blob(name) if name else b"" for name in names]
            except StoreError as error:
                self._end(_Over(Status.INTERRUPTED, error=self._unreadable(row, error)))
            else:
                self._loaded = self._history.activation, found[0], found[1]
                self._schedule()

        task = self._host.create_task(fetch())
        self._fetching = task
        return False

    def _recall(self, row: Row) -> None:
        """Deliver what is recorded."""
        value: Any = None
        error: BaseException | None = None
        ask = self._open.get(row.request)
        if ask is not None and ask.future is not None and not ask.future.done() and row.form:
            data, patches = row.value, row.patches if isinstance(row, Outcome) else b""
            if self._loaded is not None and self._loaded[0] == self._history.activation - 1:
                data, patches = self._loaded[1] or data, self._loaded[2] or patches
                self._loaded = None
            try:
                value = _codec.decode(row.form, data)
            except Exception as unreadable:
                raise self._unreadable(row, unreadable) from unreadable
            if isinstance(row, Outcome):
                self._look(ask, row)
                self.engine.savings.add(self.id, row.usage)
                if patches:
                    value = self._patched(ask, patches, value)
            if row.failed:
                value, error = None, value
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
        self._cancel_bodies()
        if self._cancelled is None:
            self._cancelled = cancelled(self.id, row.error)

    def _deliver_end(self, row: Row, value: Any, error: BaseException | None, *, restored: bool) -> None:
        ask = self._open.pop(row.request)
        if _is_forgotten(ask):
            self._forgotten.append(ask)
        self._tell_end(ask, row, restored=restored)
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
            self._errors[id(error)] = row.request, error
            ask.future.set_exception(error)
            if not ask.is_wanted:
                ask.future.exception()  # it may be awaited later, or never
        else:
            ask.future.set_result(value)

    def _tell_end(self, ask: _Ask, row: Row, *, restored: bool) -> None:
        if ask.fact is None:
            return
        if isinstance(row, Outcome):
            of, status = ask.fact, Status.FAILED if row.failed else Status.COMPLETED
            times = row.attempts, row.started_at, row.ended_at
            ask.fact = Step(of.name, of.path, of.kind, status, *times, restored, row.error or None)
            self._facts[of.path] = ask.fact
            self.stage.changed()
        elif row.what == "dropped":
            self._tell(ask, status=Status.CANCELLED)
        else:
            began = ask.timer.since.wall_s if ask.timer else row.wall_s
            status = Status.FAILED if row.failed else Status.COMPLETED
            self._tell(
                ask,
                status=status,
                started_at=began,
                ended_at=row.wall_s,
                restored=restored,
                error=row.error or None,
                wake_at=None,
            )

    def _look(self, ask: _Ask, recorded: Outcome) -> None:
        """Say once of a step that was edited that this changes nothing."""
        name = recorded.name
        if self._looked[name] >= _LOOKS or not isinstance(ask.what, StepRequest):
            return
        self._looked[name] += 1
        written = recorded.provenance
        other_code = written.python == PYTHON and written.code != code_of(ask.what.fn)
        if other_code or ask.request.recorded_digest not in (None, ask.request.digest):
            self._looked[name] = _LOOKS
            self.stage.notice(
                f"step {name!r} of {self.what} was edited, or has other arguments, since it was recorded; the recorded result "
                "stands"
            )

    def _patched(self, ask: _Ask, packed: bytes, value: Any) -> Any:
        """Change the step's arguments as its body did; what it returned, which may be one of them."""
        try:
            places = fingerprint_of(ask.what).places()
            return _patches.apply(packed, places, value)
        except Exception:  # there is something else at these places
            self.stage.notice(
                f"step {ask.request.name!r} of {self.what} changed its arguments when it ran; restored, it can't: they are "
                "others now"
            )
            return value

    def _unreadable(self, row: Row, error: Exception) -> StoreError:
        kind = UntrustedStoreError if isinstance(error, UntrustedStoreError) else CorruptStoreError
        asked = self._history.recorded(row.request)
        name = asked.name if asked else ""
        return kind(
            f"step {name!r} of {self.what} is recorded, but the record can't be used: {say(error)}. Its body was not run "
            "again, since it may have been paid for; begin the run anew with its restart()"
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

    def _told(self, mismatch: Mismatch) -> NonDeterminismError:
        what, _, columns = str(mismatch).partition("\n")
        return NonDeterminismError(
            f"{self.what} {what}; nothing was executed, and the records are as they were. Put the code back as it was and call "
            f"the run's resume(), or begin a new run\n{columns}"
        )

    # -- writing -------------------------------------------------------------------------------------------------------

    def _append(
        self,
        row: Row,
        value: Any = None,
        error: BaseException | None = None,
        *,
        at_s: float = 0.0,
        puts: tuple[tuple[str, bytes], ...] = (),
        deletes: tuple[str, ...] = (),
        recorded: bool = False,
    ) -> asyncio.Future[Verdict]:
        """Commit a row; when that is done, it is delivered. `recorded`: its value is decoded when it is."""
        if isinstance(row, Event):
            row = replace(row, wall_s=self._now_s())
        began_s = time.monotonic()
        row, done = self._log.append(row, self._unsaid, self._closed, max(self._run_s(), at_s), puts=puts, deletes=deletes)
        self._last_commit_s = began_s
        self._unapplied += 1
        self._handed_over = done

        def applied(commit: asyncio.Future[Verdict]) -> None:
            self._unapplied -= 1
            if commit.cancelled():
                return
            failed = commit.exception()
            if failed is not None:
                self._end(_Over(Status.INTERRUPTED, error=failed))
            elif commit.result() is Verdict.MISSING:
                self._end(_Over(Status.INTERRUPTED, error=StoreError(f"{self.what}: an earlier record could not be written")))
            elif commit.result() is not Verdict.APPLIED:
                self._give_way()
            else:
                self._held.confirmed_s = began_s
                if row.what not in ("asked", "moved") and not self._is_over:
                    if recorded:
                        self._inbox.append((row, *self._decoded(row)))
                    else:
                        self._inbox.append((row, value, error))
                    self._schedule()

        done.add_done_callback(applied)
        return done

    async def _written(self, row: Row, *, puts: tuple[tuple[str, bytes], ...] = ()) -> None:
        """Commit a row that is delivered to nobody, and return when it is on disk."""
        if await self._append(row, puts=puts) is not Verdict.APPLIED:
            raise asyncio.CancelledError

    def _decoded(self, row: Row) -> tuple[Any, BaseException | None]:
        if not row.form or row.blob:
            return None, None
        value = _codec.decode(row.form, row.value)
        return (None, value) if row.failed else (value, None)

    def _say_soon(self) -> None:
        """Others see what is at work, when it takes longer."""

        def look() -> None:
            self._saying = None
            if self._is_over or not self._unsaid:
                return
            if time.monotonic() - self._last_commit_s >= _SAY_AFTER_S:
                self._append(Event("asked"))
            else:
                self._say_soon()

        if self._saying is None:
            self._saying = self._host.call_later(_SAY_AFTER_S, look)

    # -- at work on requests -------------------------------------------------------------------------------------------

    def _key(self, request: Request) -> str:
        """The idempotency key: of the request among its equals, never of a place in the log."""
        digest = request.recorded_digest if request.recorded_digest is not None else request.digest
        of = self.engine.store.id, self.id, str(self.record.generation)
        return digest_of(*of, request.kind, request.name, digest, str(request.n))

    async def _perform(self, ask: _Ask) -> None:
        """Execute a step until its outcome is handed over."""
        request: StepRequest = ask.what
        number, key = ask.request.id, self._key(ask.request)
        late: Attempt | None = self.engine.bodies.get(key)  # a thread that an earlier execution began
        if late is not None:
            late.owner = None
            self._bodies[number] = late
            late.when_over(lambda: self._bodies.pop(number, None))
        inputs = self._inputs(ask)
        began_at = self._now_s()
        try:
            while True:
                failures = self._attempts.get(number)
                if late is not None and late.is_over and late.error is None:
                    await self._succeeded(ask, inputs, late, failures.failed if failures else 1, began_at)
                    return
                match decide(None, self._same_boot(number, failures), self.engine.clock.now()):
                    case CutOff() if late is None:
                        self._failed_for_good(ask, inputs, self._cut_off(ask), failures.failed + 1 if failures else 1, began_at)
                        return
                    case Retry() as later:
                        self._tell(
                            ask,
                            status=Status.RETRYING,
                            attempts=later.failures.failed,
                            started_at=later.failures.started_at,
                            error=later.failures.error,
                            wake_at=self._now_s() + later.seconds,
                        )
                        await self._pause(min(later.seconds, RECHECK_S), late)
                        continue
                    case Perform(attempt):
                        pass
                    case _:
                        attempt = (failures.failed if failures else 0) + 1
                if request.limit is not None and late is None:
                    await request.limit.enter(self.engine.clock)
                    self._admitted[number] = request.limit
                    began_at = self._now_s()
                if failures is not None:
                    began_at = failures.started_at
                self._tell(ask, status=Status.RUNNING, attempts=attempt, started_at=began_at, error=None, wake_at=None)
                body = late if late is not None and not late.is_over else await self._begun(ask, key, attempt, began_at)
                late = None
                error: BaseException | None
                if await body.ends_within(request.timeout_s):
                    error = body.error
                    if body.was_interrupted:
                        self._host.call_soon(self.stop, KeyboardInterrupt(f"{self.what} was interrupted"))
                        return
                    if isinstance(error, asyncio.CancelledError):
                        self._drop(ask)
                        return
                    if error is None:
                        await self._succeeded(ask, inputs, body, attempt, began_at)
                        return
                else:
                    error = self._late(ask, request.timeout_s or 0.0)
                    late = body if body.in_thread else None
                if request.limit is not None:
                    request.limit.heed(error)
                delay = self._delay(ask, attempt, error)
                if delay is None:
                    self._failed_for_good(ask, inputs, error, attempt, began_at)
                    if late is not None:
                        late.owner = lambda _: self.stage.notice(
                            f"step {request.name!r} of {self.what}: the thread that had timed out has ended; what it came to "
                            "is dropped"
                        )
                    return
                await self._note_failure(ask, attempt, error, began_at, delay)
                if late is None:
                    self._leave(number)
                else:
                    late.when_over(lambda: self._leave(number))
        except asyncio.CancelledError:
            running = self._bodies.get(number)
            if running is not None:
                running.cancel()
                if running.in_thread:
                    running.owner = lambda body: self._orphaned(ask, inputs, body, began_at)
            if self._stopped is None and not self._is_over and self._cancelled is not None:
                self._drop(ask)
            raise

    async def _begun(self, ask: _Ask, key: str, attempt: int, began_at: float) -> Attempt:
        """A new attempt at the body."""
        request: StepRequest = ask.what
        await self._check_lease()
        if request.at_most_once:
            now = self.engine.clock.now()
            record = Attempts(request.kind, request.name, self.id, attempt - 1, "", began_at, now, 0.0, begun=True)
            await self._written(Event("asked"), puts=(self._log.attempts_row(ask.request.id, record),))
            self._attempts[ask.request.id] = record
        context = ask.context.copy() if ask.context is not None else copy_context()
        context.run(current_body.set, Body(request.name, key))
        body = Attempt(self.id, request, self.engine.workers, context)
        number = ask.request.id
        self._bodies[number] = self.engine.bodies[key] = body

        def over() -> None:
            if self._bodies.get(number) is body:
                del self._bodies[number]
            if self.engine.bodies.get(key) is body:
                del self.engine.bodies[key]
            if body.owner is not None:
                body.owner(body)
            self.engine.let_go(self.id)

        body.when_over(over)
        if self._unsaid:
            self._say_soon()
        return body

    async def _pause(self, seconds: float, late: Attempt | None) -> None:
        """A part of the wait for a retry; a thread that ends after its time-out ends it."""
        waiting = asyncio.ensure_future(self.engine.clock.sleep(seconds))
        try:
            if late is None or late.is_over:
                await waiting
            else:
                ended = asyncio.ensure_future(late.ends_within(None))
                await asyncio.wait({waiting, ended}, return_when=asyncio.FIRST_COMPLETED)
                ended.cancel()
        finally:
            waiting.cancel()

    async def _check_lease(self) -> None:
        """A run that was taken over begins no body any more, even where it has nothing to commit."""
        if time.monotonic() - self._held.confirmed_s < _SURE_S:
            return
        key, journal = rec.lease_key(self.id), self.engine.store.journal
        if await self._log.read(lambda: journal.get(key)) != self._held.row:
            self._give_way()
            raise asyncio.CancelledError

    def _same_boot(self, number: int, failures: Attempts | None) -> Attempts | None:
        """From another boot's: from here on this boot's clock decides when the retry is due."""
        if failures is None or failures.since.boot == (now := self.engine.clock.now()).boot:
            return failures
        failures = replace(failures, since=now, delay_s=remaining_s(failures.since, failures.delay_s, now))
        self._attempts[number] = failures
        return failures

    def _delay(self, ask: _Ask, attempt: int, error: BaseException) -> float | None:
        """Seconds until the next attempt; None: that was the last."""
        request: StepRequest = ask.what
        try:
            delay = retry_delay_s(request.policy, attempt, error, self.engine.jitter())
        except Exception as policy_error:  # of the user's own functions; the step's error is what they want to see
            error.add_note(f"durable_nb: its retry policy failed as well ({say(policy_error)}), so it was not tried again")
            delay = None
        if delay is None:
            attempts = f"{attempt} attempt{'s' if attempt > 1 else ''}"
            error.add_note(
                f"durable_nb: step {request.name!r} of {self.what} failed after {attempts}. Completed steps are kept: call the "
                "run's resume() to go on from here"
            )
            self.stage.notice(f"step {request.name!r} failed after {attempts}: {say(error)}")
        return delay

    async def _note_failure(self, ask: _Ask, attempt: int, error: BaseException, began_at: float, delay: float) -> None:
        request: StepRequest = ask.what
        self.stage.notice(
            f"step {request.name!r} failed (attempt {attempt} of {request.policy.retries + 1}): {say(error)}; trying again in "
            f"{say_duration(delay)}"
        )
        now = self.engine.clock.now()
        record = Attempts(request.kind, request.name, self.id, attempt, say(error), began_at, now, delay)
        self._attempts[ask.request.id] = record
        await self._written(Event("asked"), puts=(self._log.attempts_row(ask.request.id, record),))

    def _late(self, ask: _Ask, limit_s: float) -> StepTimeout:
        took = f"step {ask.request.name!r} of {self.what} took longer than its timeout of {say_duration(limit_s)}"
        thread = "; its thread can't be stopped and goes on" if ask.what.thread else ""
        return StepTimeout(took + thread)

    def _cut_off(self, ask: _Ask) -> StepInterrupted:
        return StepInterrupted(
            f"step {ask.request.name!r} of {self.what} was cut off in an earlier execution, and may have had its effect; as it "
            "is tried at most once, its body was not run again. Look at the far end, then call the run's resume()"
        )

    def _inputs(self, ask: _Ask) -> Inputs:
        """What the body is given, as it is now; afterwards it tells what the body has changed."""
        request: StepRequest = ask.what
        try:
            found = fingerprint_of(request)
        except Unhashable:  # it explains, and identifies nothing: an argument that can't be read is no reason to fail
            found = None
        inputs = Inputs(request, found)
        self._given[ask.request.id] = inputs
        for obj in inputs.objects.values():
            holders = self._holders.setdefault(id(obj), set())
            other = next((number for number in holders if number != ask.request.id), None)
            if other is not None:  # all of them are marked as soon as there are two
                inputs.shared = self._given[other].shared = True
            holders.add(ask.request.id)
        return inputs

    def _let_go_of_inputs(self, number: int) -> None:
        inputs = self._given.pop(number, None)
        for obj in inputs.objects.values() if inputs is not None else ():
            holders = self._holders.get(id(obj), set())
            holders.discard(number)
            if not holders:
                self._holders.pop(id(obj), None)

    async def _succeeded(self, ask: _Ask, inputs: Inputs, body: Attempt, attempt: int, began_at: float) -> None:
        try:
            outcome = await self._outcome(ask, inputs, body, attempt, began_at)
        except UnserializableError as error:
            self._failed_for_good(ask, inputs, error, attempt, began_at)
        else:
            self._record(ask, outcome, body.value, None)

    async def _outcome(self, ask: _Ask, inputs: Inputs, body: Attempt, attempt: int, began_at: float) -> Outcome:
        value = body.value
        form, data = encoded(value, f"step {ask.request.name!r} of {self.what} returned")
        data, blob = await self._log.kept(data)
        outcome = self._as_outcome(ask, inputs, form, data, attempt, began_at)
        self._let_go_of_inputs(ask.request.id)
        after = self._components_now(inputs)
        given = inputs.given(after)
        patches, patches_blob = b"", ""
        if (packed := packed_changes(inputs, given, value)) is not None:
            (patches, patches_blob), given = await self._log.kept(packed), set()
        if given:
            names = ", ".join(sorted(map(said, given)))
            self.stage.advise(f"step {ask.request.name!r} changes {names}: restoring the step won't")
        changes = tuple(sorted(map(said, given)))
        usage = _usage.of_step(body.used, ask.request.kind, value)
        return replace(outcome, blob=blob, changes=changes, patches=patches, patches_blob=patches_blob, usage=usage)

    @staticmethod
    def _components_now(inputs: Inputs) -> dict[str, str]:
        if inputs.found is None or inputs.found.lasting or inputs.request.kind != "run":
            return inputs.components
        try:
            return fingerprint_of(inputs.request).components
        except Exception:  # an input can't be read any more: the outcome is recorded all the same
            return inputs.components

    def _as_outcome(self, ask: _Ask, inputs: Inputs, form: str, data: bytes, attempt: int, began_at: float) -> Outcome:
        of = ask.request.kind, ask.request.name, "", self.id
        return Outcome(
            *of,
            form,
            data,
            attempt,
            began_at,
            self._now_s(),
            replace(provenance_of(inputs.found), code=code_of(inputs.request.fn)),
            request=ask.request.id,
        )

    def _failed_for_good(self, ask: _Ask, inputs: Inputs, error: BaseException, attempt: int, began_at: float) -> None:
        """A failure is an outcome: the code may catch it and go on."""
        self._let_go_of_inputs(ask.request.id)
        form, data, shown = _codec.encode_error(error)
        outcome = self._as_outcome(ask, inputs, form, data, attempt, began_at)
        self._record(ask, replace(outcome, failed=True, error=say(error)), None, shown)

    def _record(self, ask: _Ask, outcome: Outcome, value: Any, error: BaseException | None) -> None:
        number = ask.request.id
        gone = (self._log.attempts_key(number),) if self._attempts.pop(number, None) is not None else ()
        self._append(outcome, value, error, deletes=gone)

    def _drop(self, ask: _Ask) -> None:
        """The body was stopped, since the run was cancelled: whoever awaits it is cancelled."""
        self._let_go_of_inputs(ask.request.id)
        self._append(Event("dropped", ask.request.id))

    def _orphaned(self, ask: _Ask, inputs: Inputs, body: Attempt, began_at: float) -> None:
        """A thread has ended after this execution: what it came to was paid for, and is recorded while the lease is ours."""
        if body.error is not None or self.engine.held.get(self.id) is not self._held or self.id in self.engine.active:
            return

        async def record() -> None:
            with contextlib.suppress(UnserializableError, StoreError):
                attempts = self._attempts.get(ask.request.id)
                outcome = await self._outcome(ask, inputs, body, attempts.failed + 1 if attempts else 1, began_at)
                self._record(ask, outcome, None, None)
            self.engine.let_go(self.id)

        self.engine.keep(self._host.create_task(record()))

    async def _sleep(self, ask: _Ask) -> None:
        timer, now = ask.timer, self.engine.clock.now()
        if timer is None:
            return
        if timer.until_s is None and timer.since.boot != now.boot:
            # From here on this boot's clock decides: a wall clock that was set back must not make the wait longer again.
            timer = ask.timer = replace(timer, since=now, duration_s=remaining_s(timer.since, timer.duration_s, now))
            await self._written(Event("moved", ask.request.id, timer=timer))
        elif isinstance(decide_sleep(timer, now), Wait) and self._unsaid:
            await self._written(Event("asked"))  # the deadline is on disk before the wait begins
        while isinstance(left := decide_sleep(timer, self.engine.clock.now()), Wait):
            self._tell(ask, status=Status.SLEEPING, started_at=timer.since.wall_s, wake_at=self._now_s() + left.seconds)
            await self.engine.clock.sleep(min(left.seconds, RECHECK_S))
        self._append(Event("fired", ask.request.id))

    async def _ask_engine(self, ask: _Ask) -> None:
        """Start another run, or wait for one."""
        workflows = self.engine.workflows
        self._tell(ask, status=Status.RUNNING, attempts=1, started_at=self._now_s())
        value, error = None, None
        try:
            if isinstance(ask.what, StartRequest):
                workflows.start_requested(ask.what, self.id)
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
        data, blob = await self._log.kept(data)
        failed = error is not None
        event = Event(
            "ended", ask.request.id, form=form, value=data, blob=blob, failed=failed, error=say(error) if error else ""
        )
        self._append(event, value, error)

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
            own = RunCancelled(f"{self.what} ended with a CancelledError of its own code")
            self._end(_Over(Status.CANCELLED, error=own))
        elif error is not None:
            self._end(_Over(Status.FAILED, error=error, ended_by=self._blamed(error)))
        else:
            asked = (*self._forgotten, *self._open.values(), *self._fresh)
            forgotten = [ask for ask in asked if _is_forgotten(ask)]
            if forgotten:
                name = forgotten[0].request.name
                self._end(
                    _Over(
                        Status.FAILED,
                        error=DurableError(
                            f"{self.what} called step {name!r} and never awaited it, so it was not run: write 'await' before "
                            "it, and call the run's resume()"
                        ),
                    )
                )
            else:
                self._end(_Over(Status.COMPLETED, value=main.result()))

    def _blamed(self, error: BaseException) -> tuple[int, ...]:
        """The requests whose exceptions are in what ended the run."""
        found, todo, seen = [], [error], set[int]()
        while todo:
            one = todo.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            if id(one) in self._errors:
                found.append(self._errors[id(one)][0])
            response = getattr(one, "response", None)
            if id(response) in self._answers:
                found.append(self._answers[id(response)][0])
            inner = (one.__cause__, one.__context__, *(one.exceptions if isinstance(one, BaseExceptionGroup) else ()))
            todo += [other for other in inner if other is not None]
        if not found and self._answers:  # the code made an error of its own out of an answer's status
            found = [max(number for number, _ in self._answers.values())]
        return tuple(found)

    def stands_for(self, error: BaseException, value: Any) -> None:
        """The code is given that value where the step failed (an answer with a status of 400 or more): should the run end with
        it, that failure is what ended it."""  # fmt: skip
        if id(error) in self._errors:
            self._answers[id(value)] = self._errors[id(error)][0], value

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
            self._append(Event("cancel", error=str(why)))

    def die(self) -> None:
        """End as a kill would."""
        self.stop(asyncio.CancelledError())
        for ask in list(self._working.values()):
            if ask.task is not None:
                ask.task.cancel()
        self._close_loop()

    def _cancel_bodies(self) -> None:
        """Stop what can be stopped of what has begun, or waits to be tried again."""
        for ask in list(self._working.values()):
            body = self._bodies.get(ask.request.id)
            if body is not None:
                body.cancel()
            elif ask.task is not None and isinstance(ask.what, StepRequest):
                ask.task.cancel()

    def interrupt(self) -> None:
        """As a kill would: nothing is recorded any more."""
        self._host.call_soon_threadsafe(self.stop, KeyboardInterrupt(f"{self.what} was interrupted"))

    def hear(self, lease: bytes | None, cancel: rec.Cancel | None) -> None:
        """What other processes have written about this run."""
        if self.engine.held.get(self.id) is not self._held or self.id in self.engine.changing:
            return
        if lease != self._held.row:
            self._give_way()
        elif cancel is not None and self._cancelled is None:
            self.cancel(cancelled(self.id, cancel.reason))

    def _give_way(self) -> None:
        """Another process owns the run: this one writes nothing more."""
        if self.engine.held.get(self.id) is self._held:
            del self.engine.held[self.id]
        lost = LeaseLost(
            f"{self.what} was taken over by another process; what was acknowledged before is safe, this commit was refused. "
            "Call its resume() to attach to it"
        )
        self._stopped = lost
        if not self._is_over and self._main is not None and not self._loop.is_running():
            self._end(_Over(Status.INTERRUPTED, error=lost))
            with self._loop.delivering(self._loop.now_s):
                self._loop.call_soon(self._main.cancel)
            with contextlib.suppress(Interrupted, DurableError):
                self._loop.run_ready(time.perf_counter() + 1.0)
        self._end(_Over(Status.INTERRUPTED, error=lost))

    def _end(self, over: _Over) -> None:
        """The code is over. Bodies that have begun go on; nothing begins any more."""
        if self._is_over:
            return
        self._is_over = True
        if self._alarm is not None:
            self._alarm.cancel()
        if not self._ended.done():
            self._ended.set_result(over)

    async def _conclude(self, over: _Over) -> Any:
        """Let begun bodies end, unwind the code, and write down how the run ended."""
        normal = over.status in (Status.COMPLETED, Status.FAILED) and self._stopped is None
        if not isinstance(over.error, NonDeterminismError):
            if normal:
                await self._drain()
            else:
                await self._stop_bodies()
        self._close_loop()
        status, error, value = over.status, over.error, over.value
        if isinstance(error, LeaseLost):
            self.engine.active.pop(self.id, None)
            self._finish_facts(Status.INTERRUPTED)
            raise error
        form, data = "", b""
        if status is Status.COMPLETED:
            try:
                form, data = encoded(value, f"{self.what} returned")
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

    async def _drain(self) -> None:
        """Bodies that have begun end, and are recorded; what has not begun never does."""
        unbegun = []
        for ask in list(self._working.values()):
            is_waiting = ask.fact is not None and ask.fact.status in (Status.RETRYING, Status.SLEEPING)
            is_new = ask.activation == self._history.activation
            if ask.request.id not in self._bodies and ask.task is not None and (is_new or is_waiting or not _is_step(ask)):
                ask.task.cancel()
                if _is_step(ask):
                    unbegun.append(ask.request.name)
        if unbegun:
            self.stage.notice(
                f"{self.what} returned while {', '.join(map(repr, unbegun[:5]))} had not begun: what nobody awaits is not run"
            )
        while working := {ask.task for ask in self._working.values() if ask.task is not None and not ask.task.done()}:
            await asyncio.wait(working, timeout=0.5)
            if self._stopped is not None:
                break
        if self._handed_over is not None and not self._handed_over.done():
            await asyncio.wait({self._handed_over})

    async def _stop_bodies(self) -> None:
        tasks = {ask.task for ask in self._working.values() if ask.task is not None}
        for task in tasks:
            task.cancel()
        unwinding = {task for task in tasks if not task.done()}
        if unwinding:
            await asyncio.wait(unwinding, timeout=_UNWIND_S)

    def _close_loop(self) -> None:
        for ask in (*self._forgotten, *self._open.values(), *self._fresh):
            if ask.coro is not None and inspect.getcoroutinestate(ask.coro) == inspect.CORO_CREATED:
                ask.coro.close()
        self._loop.close()

    def _finish_facts(self, status: Status) -> None:
        self.status, self.ended_at = status, self._now_s()
        for path, fact in self._facts.items():
            if fact.status not in (Status.COMPLETED, Status.FAILED, Status.CANCELLED):
                self._facts[path] = replace(fact, status=Status.INTERRUPTED)
        self.stage.changed()

    async def _finish(
        self, status: Status, error: BaseException | None, ended_by: tuple[int, ...], form: str, data: bytes
    ) -> None:
        """Write down how the run ended. A completed one is closed; any other stays, to be gone on with."""
        self._finish_facts(status)
        self.engine.active.pop(self.id, None)
        self.engine.savings.write()
        self.engine.changing.add(self.id)
        try:
            data, blob = await self._log.kept(data)
            is_over = status is not Status.INTERRUPTED
            record = replace(
                self.record,
                status=status.value if is_over else Status.RUNNING.value,
                ended_at=self.ended_at if is_over else None,
                error=rec.plain(say(error)) if error is not None and is_over else "",
                ended_by=ended_by,
                since=self._anchor,
                since_s=self._anchor_s,
            )
            puts = [self.engine.pack(rec.run_key(self.id), record)]
            deletes = []
            if is_over:
                puts.append(self.engine.pack(rec.result_key(self.id), Result(form, data, blob)))
                deletes.append(rec.cancel_key(self.id))
            if status in (Status.COMPLETED, Status.CANCELLED):
                deletes.append(rec.open_prefix(self.record.scope) + self.id)
            at_work = any(body.in_thread for body in self._bodies.values())
            if at_work:
                pass
            elif status is Status.COMPLETED:
                deletes.append(rec.lease_key(self.id))
            else:
                puts.append(self.engine.pack(rec.lease_key(self.id), Lease(self._held.epoch, "")))
            commit = Commit(self._held.guard, puts=tuple(puts), deletes=tuple(deletes))
            verdict = await self.engine.store.writer.commit(commit)
            if not at_work and self.engine.held.get(self.id) is self._held:
                del self.engine.held[self.id]
        finally:
            self.engine.changing.discard(self.id)
        if verdict is not Verdict.APPLIED:
            raise LeaseLost(f"{self.what} was taken over by another process; how it ended here was not recorded")

    async def _arguments(self) -> tuple[Any, Any]:
        journal, key = self.engine.store.journal, rec.arguments_key(self.id)
        row = await self._log.read(lambda: journal.get(key))
        if row is None:
            raise CorruptStoreError(f"the record {key!r} is missing: what {self.what} was started with; nothing was run")
        arguments = unpack(self.engine.store.seal, key, row, Arguments)
        data = await self._log.blob(arguments.blob) if arguments.blob else arguments.value
        args, kwargs = _codec.decode(arguments.form, data)
        return args, kwargs


async def _raises(error: BaseException) -> Any:
    """Not raised by the verb itself: of several that are called together, the others would never be awaited."""
    raise error


def _timer_of(request: SleepRequest, now: Instant) -> Timer:
    if isinstance(request.wake, datetime):
        return Timer(request.name, now, 0.0, request.wake.timestamp())
    return Timer(request.name, now, request.wake.total_seconds())


def _is_step(ask: _Ask) -> bool:
    return isinstance(ask.what, StepRequest)


def _is_forgotten(ask: _Ask) -> bool:
    """Was a verb called, and its coroutine neither awaited nor made a task?"""
    return ask.coro is not None and not ask.is_wanted and inspect.getcoroutinestate(ask.coro) == inspect.CORO_CREATED


async def _called(function: Any, args: Any, kwargs: Any) -> Any:
    return await function(*args, **kwargs)
