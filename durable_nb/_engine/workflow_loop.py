"""The event loop that a workflow's own code runs on: stepped by the engine, deterministic, and with nothing outside.

It is an asyncio loop without sockets, threads and processes, whose time stands still while code runs. The kernel's loop steps
it from plain callbacks on the same thread. Whatever the code waits for is asked of the engine: a step, a sleep, a timer
(`asyncio.sleep`, `timeout`, `wait_for`). So the code's course depends on nothing but the order in which the engine delivers.

temporalio's `worker/_workflow_instance.py` runs workflow code in the same manner.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal`'s functions look for an enum's member, and describe the handler for that
import asyncio
import builtins
import contextvars
import functools
import logging
import os
import sys
import threading
import time
from asyncio import events, tasks
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from durable_nb.errors import DurableError, NotInRunError, NotSupportedError

log = logging.getLogger("durable_nb")

_OWN_FOLDER = os.path.dirname(__file__) + os.sep  # noqa: PTH120  compared with file names
SPINS = 200_000
"""So many callbacks without a pause are a loop of the code's that waits for what can't be delivered meanwhile."""


_SIGINT: int = _signal.SIGINT


class Interrupted(BaseException):
    """A KeyboardInterrupt has come while the workflow's code was executing: the execution ends as a kill would end it."""


class Timers(Protocol):
    """Who is asked to wake the loop."""

    def timer(self, handle: events.TimerHandle, delay_s: float) -> None:
        """The code wants this handle to run in so long."""
        ...

    def called_from_outside(self) -> None:
        """Something that the code waits for was set outside it."""
        ...

    def create_lane(self, context: contextvars.Context) -> None:
        """The code has created a task, which runs in this context."""
        ...

    def timer_cancelled(self, handle: events.TimerHandle) -> None:
        """It doesn't any more."""
        ...


class WorkflowLoop(asyncio.AbstractEventLoop):
    """Runs the code of one execution. Nothing here outlives it: `close` unwinds whatever is suspended."""

    def __init__(self, timers: Timers, now_s: float = 0.0) -> None:
        self.now_s = now_s
        """The run's time at the last delivery: what `loop.time()` says."""
        self.tasks: set[asyncio.Task[Any]] = set()
        self.carrier = events.get_running_loop()
        """The kernel's loop, which steps this one."""
        self._timers = timers
        self._ready: deque[events.Handle] = deque()
        self._generators: list[Any] = []
        self._prune_at = 64
        self.in_code = False
        """Is a line of the workflow's code being executed, or of what it calls?"""
        self._numbers = 0
        self._spun = 0
        self._stepping = self._delivering = self._closed = False

    # -- stepping ------------------------------------------------------------------------------------------------------

    def run_ready(self, until_s: float) -> bool:
        """Run what is ready, at most until `time.perf_counter()` says so; False where something is left.

        To be called from a plain callback of the loop that carries this one. Interrupted where a KeyboardInterrupt came.
        """
        if self._stepping:  # entered already
            return self._run_all(until_s)
        with self.entered():
            return self._run_all(until_s)

    def _run_all(self, until_s: float) -> bool:
        count, ready = 0, self._ready
        while ready:
            handle = ready.popleft()
            if not handle._cancelled:
                self._run(handle)
            count += 1
            if not count & 15 and time.perf_counter() > until_s:
                break
        self._spun = self._spun + count if ready else 0
        if self._spun > SPINS:
            raise DurableError(
                "the workflow's code spins: it calls 'await asyncio.sleep(0)' again and again, and nothing that it waits for "
                "is delivered meanwhile. Await the task itself, or sleep for longer than 0"
            )
        return not self._ready

    def begin_delivery(self, at_s: float) -> None:
        """The engine makes something ready, at this time of the run's, until `end_delivery`."""
        self.now_s = max(self.now_s, at_s)
        self._delivering = True

    def end_delivery(self) -> None:
        self._delivering = False

    @contextmanager
    def delivering(self, at_s: float) -> Iterator[None]:
        """The same, for a block."""
        self.begin_delivery(at_s)
        try:
            yield
        finally:
            self.end_delivery()

    def fire(self, handle: events.TimerHandle) -> None:
        """A timer's time has come."""
        self.now_s = max(self.now_s, handle.when())
        self._ready.append(handle)

    def close(self) -> None:
        """Unwind what is suspended, now: left to the garbage collector, `finally` blocks would run in the middle of another
        run, and ask it for their steps."""  # fmt: skip
        if self._closed:
            return
        self._closed = True
        with self.entered():
            while self.tasks or self._generators:  # `finally` blocks may make more of them
                while self.tasks:
                    task = self.tasks.pop()
                    task._log_destroy_pending = False  # type: ignore[attr-defined]  # it isn't forgotten, it is over
                    coro = task.get_coro()
                    if coro is not None:
                        _unwind(coro)
                while self._generators and not self.tasks:
                    closing = self._generators.pop().aclose()
                    with suppress(Exception, KeyboardInterrupt, SystemExit, asyncio.CancelledError):
                        closing.send(None)
                    _unwind(closing)
        self._ready.clear()

    def _run(self, handle: events.Handle) -> None:
        try:
            self.in_code = True
            handle._run()
        except KeyboardInterrupt as interrupt:
            raise Interrupted from interrupt
        except SystemExit:
            pass  # asyncio has set it as the task's exception, and raises it here to end the process
        finally:
            self.in_code = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C (Stop) raise a KeyboardInterrupt in the workflow's own code, which no handler of the kernel's reaches.

        In the engine's lines it is held back until the end of the block. Whoever handled it before is told then, too: the cell
        that awaits the run ends as well.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before, pending = _signal.getsignal(_SIGINT), list[Any]()
        if before is None:  # C code's, which Python could not put back
            yield
            return

        def handle(_: int, frame: Any) -> None:
            pending.append(frame)
            if self.in_code and frame is not None and not frame.f_code.co_filename.startswith(_OWN_FOLDER):
                raise KeyboardInterrupt

        _signal.signal(_SIGINT, handle)
        try:
            yield
        finally:
            _signal.signal(_SIGINT, before)
            if pending and callable(before):
                before(_SIGINT, pending[0])

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This is the thread's running loop meanwhile, and no task of the carrying loop is the current one."""
        carrier, hooks = events._get_running_loop(), sys.get_asyncgen_hooks()
        with _set_aside(carrier):
            events._set_running_loop(None)
            events._set_running_loop(self)
            sys.set_asyncgen_hooks(firstiter=self._hold, finalizer=None)
            before, self._stepping = self._stepping, True
            try:
                yield
            finally:
                self._stepping = before
                sys.set_asyncgen_hooks(*hooks)
                events._set_running_loop(carrier)

    def _hold(self, generator: AsyncGenerator[Any, Any]) -> None:
        """A generator that the code drops is held until the run ends and closed then: when the collector finds one is no part
        of the run's history, and its `finally` may ask for a step."""  # fmt: skip
        self._generators.append(generator)
        if len(self._generators) > self._prune_at:
            self._generators = [held for held in self._generators if held.ag_frame is not None]
            self._prune_at = 2 * len(self._generators) + 64

    # -- what asyncio asks of a loop -----------------------------------------------------------------------------------

    def time(self) -> float:
        return self.now_s

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        pass

    def is_running(self) -> bool:
        return self._stepping

    def is_closed(self) -> bool:
        return self._closed

    def get_task_factory(self) -> None:
        return None

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None, **options: Any) -> asyncio.Task[Any]:
        if events._get_running_loop() is not self:
            if isinstance(coro, Coroutine):
                coro.close()
            raise NotInRunError("a workflow's task can be created by the workflow's own code only; nothing was run")
        options.pop("eager_start", None)
        context = contextvars.copy_context() if context is None else context
        self._timers.create_lane(context)
        number = self.next_number()
        kind = _numbered(asyncio.Task)
        task: asyncio.Task[Any] = kind.__new__(kind)
        task.number = number  # type: ignore[attr-defined]  # before __init__, which puts it into a set
        task.__init__(coro, loop=self, name=name or f"Task-{number}", context=context, **options)  # type: ignore[misc]
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def next_number(self) -> int:
        """Counts what is made on this loop, in the order of making."""
        self._numbers += 1
        return self._numbers

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> events.Handle:
        handle = events.Handle(callback, args, self, context)
        if not (self._stepping or self._delivering):
            if not self._closed:
                self._timers.called_from_outside()
            return handle
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> events.Handle:
        if events._get_running_loop() is not self:
            raise _outside("a thread called back into it")
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]  # what it gives has no more than a handle's methods
        self, delay: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        if when <= self.now_s:
            return self.call_soon(callback, *args, context=context)
        handle = events.TimerHandle(when, callback, args, self, context)
        handle._scheduled = True  # type: ignore[attr-defined]  # so that cancelling it tells `_timer_handle_cancelled`
        self._timers.timer(handle, when - self.now_s)
        return handle

    def _timer_handle_cancelled(self, handle: events.TimerHandle) -> None:
        self._timers.timer_cancelled(handle)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._closed:
            error = context.get("exception")
            log.warning("workflow: %s%s", context.get("message"), f" ({error!r})" if error else "")

    def run_in_executor(self, _: Any, func: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        """Refused, but for what openai and anthropic ask about the machine they run on: that is executed at once."""
        in_context = isinstance(func, functools.partial) and getattr(func.func, "__name__", "") == "run" and func.args
        if _is_platform_probe(func.args[0] if in_context else func):  # type: ignore[attr-defined]  # as asyncio.to_thread calls it
            answer = self.create_future()
            answer.set_result(func(*args))
            return answer
        raise _outside("it uses a thread (asyncio.to_thread, run_in_executor)")


class _Unwound(BaseException):
    """Ends what is suspended. No CancelledError: a TaskGroup would wait on, for tasks that nobody steps any more."""


def _unwind(coro: Any) -> None:
    """End what is suspended there. Closing alone won't do: up to Python 3.12 it leaves an async generator that the coroutine
    waits in suspended for the garbage collector."""  # fmt: skip
    with suppress(Exception, KeyboardInterrupt, SystemExit, asyncio.CancelledError, _Unwound):
        for _ in range(100):  # each `finally` that waits for something takes one
            coro.throw(_Unwound())
    with suppress(Exception, KeyboardInterrupt, SystemExit, asyncio.CancelledError):
        coro.close()


def _outside(what: str) -> NotSupportedError:
    return NotSupportedError(
        f"the workflow's own code can't do this: {what}, and a replay would not see what comes of it. "
        "Do it in a step: await durable.run(name, function, ...)"
    )


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise _outside(f"it calls loop.{name}(), for sockets, subprocesses, signals or other loops")

    return refuse


for _name, _member in vars(asyncio.AbstractEventLoop).items():
    if callable(_member) and not _name.startswith("_") and _name not in vars(WorkflowLoop):
        setattr(WorkflowLoop, _name, _refusing(_name))
WorkflowLoop.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


def _is_platform_probe(function: Any) -> bool:
    module = str(getattr(function, "__module__", ""))
    return getattr(function, "__name__", "") == "get_platform" and module.partition(".")[0] in ("openai", "anthropic")


# -- sets of tasks and futures are walked in one order in every process ---------------------------------------------------


class _Future(asyncio.Future[Any]):
    """Its hash is its number."""

    _number: int | None = None

    def __hash__(self) -> int:
        if self._number is None:
            loop: Any = self.get_loop()
            self._number = loop.next_number()
        return self._number


@functools.cache
def _numbered(base: type[asyncio.Task[Any]]) -> type[asyncio.Task[Any]]:
    """Tasks whose hash is their number. nest_asyncio puts another class in asyncio.Task's place: both are met."""

    class Task(base):  # type: ignore[misc,valid-type]
        number = -1

        def __hash__(self) -> int:
            return self.number

    return Task


def _in_order(items: Iterable[Any] = ()) -> Any:
    """`set`, as the module asyncio.tasks sees it. `as_completed` makes its tasks in the order of a set of coroutines, that is,
    of their addresses: in a workflow, in the order in which they were given."""  # fmt: skip
    if type(events._get_running_loop()) is not WorkflowLoop:
        return builtins.set(items)
    given = list(items)
    return dict.fromkeys(given) if any(asyncio.iscoroutine(item) for item in given) else builtins.set(given)


tasks.set = _in_order  # type: ignore[attr-defined]


# -- the carrying loop's current task ---------------------------------------------------------------------------------------


_ONE_TASK_A_THREAD = sys.version_info >= (3, 14)


@contextmanager
def _set_aside(carrier: asyncio.AbstractEventLoop | None) -> Iterator[None]:
    """From Python 3.14 on a thread has one current task, not each loop one: the carrying loop's makes room meanwhile."""
    swap: Any = getattr(tasks, "_swap_current_task", None)
    if carrier is None or swap is None or not _ONE_TASK_A_THREAD:
        yield
        return
    before = swap(carrier, None)
    try:
        yield
    finally:
        swap(carrier, before)
