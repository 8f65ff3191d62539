"""What a cell leaves running behind it: tasks, timers, threads. A hit would not start them, so the cell is not stored."""

from __future__ import annotations

import asyncio
import threading
import types
from collections.abc import Iterator
from typing import Any

_OURS = ("durable_nb", "ipykernel", "tornado", "jupyter_client", "zmq", "IPython", "debugpy")
"""Packages of the notebook's own machinery, whose tasks come and go at any time."""
_THREADS = (
    "durable",
    "asyncio_",
    "ThreadPoolExecutor-",
    "IOPub",
    "Heartbeat",
    "Control",
    "IPythonHistory",
    "Subshell",
    "subshell",
    "Shell channel",
)
"""Beginnings of names. Executors' threads end with their executor, which is looked at where a name holds it."""
_THREAD_TYPES = {
    "tqdm._monitor.TMonitor",
    "ipykernel.iostream.IOPubThread",
    "multiprocessing.queues.QueueFeederThread",
    "concurrent.futures.process._ExecutorManagerThread",
}


class Pending:
    """What runs before a cell."""

    def __init__(self) -> None:
        self._tasks, self._timers, self._threads = set(_tasks()), set(_timers()), set(threading.enumerate())

    def left(self) -> list[str]:
        """What runs now besides, in words."""
        found = [
            f"it leaves the task {_name_of(task)} running" for task in _tasks() if task not in self._tasks and _is_users(task)
        ]
        found += [
            f"it leaves a timer that will call {_called(timer)}"
            for timer in _timers()
            if timer not in self._timers and not timer.cancelled() and _is_users_timer(timer)
        ]
        return found + [
            f"it leaves the thread {thread.name!r} running"
            for thread in threading.enumerate()
            if thread not in self._threads and _is_users_thread(thread)
        ]


def _tasks() -> Iterator[asyncio.Task[Any]]:
    try:
        yield from asyncio.all_tasks()
    except RuntimeError:  # no loop runs
        return


def _timers() -> list[asyncio.TimerHandle]:
    """asyncio keeps them where nobody but itself looks; another loop has none that could be seen."""
    try:
        return list(getattr(asyncio.get_running_loop(), "_scheduled", ()))
    except RuntimeError:
        return []


def _is_users(task: asyncio.Task[Any]) -> bool:
    coroutine: Any = task.get_coro()
    frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
    return task is not asyncio.current_task() and frame is not None and not _is_ours(frame.f_globals.get("__name__"))


def _is_ours(module: Any) -> bool:
    return str(module).partition(".")[0] in _OURS


def _name_of(task: asyncio.Task[Any]) -> str:
    return getattr(task.get_coro(), "__qualname__", None) or task.get_name()


def _is_users_timer(timer: asyncio.TimerHandle) -> bool:
    """asyncio's own belong to tasks, which are looked at as such."""
    callback = timer._callback  # type: ignore[attr-defined]
    module = getattr(callback, "__module__", None) or getattr(type(getattr(callback, "__self__", None)), "__module__", "")
    return not _is_ours(module) and str(module).partition(".")[0] not in ("asyncio", "_asyncio", "anyio")


def _called(timer: asyncio.TimerHandle) -> str:
    callback: Any = timer._callback  # type: ignore[attr-defined]
    return f"{getattr(callback, '__qualname__', None) or type(callback).__name__}()"


def _is_users_thread(thread: threading.Thread) -> bool:
    kind = type(thread)
    if f"{kind.__module__}.{kind.__qualname__}" in _THREAD_TYPES or thread.name.startswith(_THREADS):
        return False
    target = getattr(thread, "_target", None)
    return (
        thread.is_alive()
        and not _is_ours(kind.__module__)
        and not (isinstance(target, types.FunctionType) and _is_ours(target.__module__))
    )
