"""The code of a cell, executed on the kernel's loop: its tasks are named, stopped and interrupted as one."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

from durable_nb._current import Run, current_run
from durable_nb._engine.branches import Branch, branching, current_branch
from durable_nb.errors import NotInRunError

_F = TypeVar("_F", bound=Callable[..., Any])

_USERS: set[types.CodeType] = set()
_OURS: set[types.CodeType] = set()


def enters_user_code(function: _F) -> _F:
    """Marks a function of the engine's whose calls are the user's code: what it calls may be left by a KeyboardInterrupt."""
    _USERS.add(function.__code__)
    return function


def enters_engine_code(function: _F) -> _F:
    """Marks a function that the user's code calls and that is the engine's: an exception out of it would break the engine."""
    _OURS.add(function.__code__)
    return function


def in_user_code(frame: types.FrameType | None) -> bool:
    """Is it the user's code that executes in this frame, of those that are marked?"""
    innermost = frame
    while frame is not None:
        if frame.f_code in _USERS:
            return frame is not innermost
        if frame.f_code in _OURS:
            return False
        frame = frame.f_back
    return False


class TaskScope:
    """The tasks of one execution of a cell's code."""

    def __init__(self, label: str) -> None:
        self._label = label
        self.branch = Branch()
        self.stopped: BaseException | None = None
        """Why the code was told to stop."""
        self.is_over = False
        """The code has ended: no step begins from here on."""
        self.set_variables: list[tuple[ContextVar[Any], Any]] = []
        """Context variables that the code set: it ran in a context of its own."""
        self._main: asyncio.Task[Any] | None = None

    async def execute(
        self, body: Coroutine[Any, Any, Any], run: Run, *, unwind_s: float, drain: Callable[[], Awaitable[None]]
    ) -> Any:
        """Execute the code as `run`; what it returns or raises, after `drain`.

        What stopped it comes from here, never from inside the code: there it is CancelledError, which no `except Exception`
        swallows.
        """
        loop = asyncio.get_running_loop()
        before, context = copy_context(), copy_context()
        with branching(loop):
            context.run(current_run.set, run)
            context.run(current_branch.set, self.branch)
            self._main = main = loop.create_task(_caught(body), context=context)
            if self.stopped is not None:
                main.cancel()
            try:
                await asyncio.wait({main})
            except asyncio.CancelledError as cancelled:
                run.stop(cancelled)  # type: ignore[attr-defined]  # a cell's, which stops its bodies as well
                await asyncio.wait({main}, timeout=unwind_s)
            self.is_over = True
            await drain()
        own = (current_run, current_branch)
        self.set_variables = [
            (v, value) for v, value in context.items() if v not in own and (v not in before or before[v] is not value)
        ]
        if self.stopped is not None:
            raise self.stopped
        value, error = main.result()
        if error is not None:  # a KeyboardInterrupt is the code's own: the user's has come as `stop`, too
            raise error
        return value

    def stop(self, why: BaseException) -> None:
        """Cancel the code at its next await; `execute` raises `why`."""
        self.stopped = self.stopped or why
        if self._main is not None:
            self._main.cancel()

    def soon(self, call: Callable[[], object]) -> None:
        """Call that on the loop's thread, from any thread."""
        if self._main is None:
            call()
        else:
            with suppress(RuntimeError):  # the loop is closed, and the code with it
                self._main.get_loop().call_soon_threadsafe(call)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Which executes the code."""
        assert self._main is not None  # noqa: S101  its code asks
        return self._main.get_loop()

    def is_main(self, task: asyncio.Task[Any]) -> bool:
        return task is self._main

    def check_open(self, name: str) -> None:
        """May a step begin? CancelledError where the code is told to stop, NotInRunError where it has ended."""
        if self.stopped is not None:
            raise asyncio.CancelledError
        if self.is_over:
            raise NotInRunError(
                f"step {name!r} was asked for by a task that outlived {self._label}; nothing was run. Await the task in it "
                "(await asyncio.gather(...)), then its steps are recorded"
            )


@enters_user_code
async def _caught(body: Coroutine[Any, Any, Any]) -> tuple[Any, BaseException | None]:
    """What `body` returns, and what it raises. A KeyboardInterrupt or SystemExit that leaves a task's step would end the
    kernel process (asyncio raises it from the loop)."""  # fmt: skip
    try:
        return await body, None
    except asyncio.CancelledError:
        raise
    except BaseException as raised:
        return None, raised
