"""Threads for the bodies of synchronous steps.

Not asyncio's default pool: that has six threads on two cores, and the interpreter waits for its threads at exit, so one
stuck body would keep a kernel from shutting down. These are daemons.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from typing import Any

from durable_nb._forks import children_end_here

MOST = 64

_Job = tuple[Callable[[], Any], Context, asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[[], object] | None]


class Workers:
    """Up to 64 threads, or as many as somebody asks for, started as they are needed."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = self._busy = 0

    def submit(
        self, job: Callable[[], Any], context: Context, began: Callable[[], object] | None = None, most: int = 0
    ) -> asyncio.Future[Any]:
        """Run `job` in a thread, in `context`; the future belongs to the running loop, which calls `began` when a thread has
        taken the job up. `most`: there may be so many threads, where that is more than usual."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._lock:
            self._busy += 1
            if self._busy > self._threads and self._threads < max(MOST, most):
                self._start_thread()
        self._jobs.put((job, context, loop, future, began))
        return future

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name=f"durable_nb step {self._threads + 1}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system allows no more
            if not self._threads:
                self._busy -= 1
                raise
        else:
            self._threads += 1

    def _work(self) -> None:
        while True:
            job, context, loop, future, began = self._jobs.get()
            if began is not None:
                with suppress(RuntimeError):  # its loop is gone
                    loop.call_soon_threadsafe(began)
            try:
                with children_end_here():
                    result, error = context.run(job), None
            except BaseException as raised:
                result, error = None, raised
            with self._lock:
                self._busy -= 1
            try:
                loop.call_soon_threadsafe(_resolve, future, result, error)
            except RuntimeError:
                if not loop.is_closed():  # with its loop gone, nobody waits for the result any more
                    raise
            del job, context, future, began, result, error


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if isinstance(error, StopIteration):  # a future can't carry it
        error = RuntimeError(f"the step's body raised StopIteration({error.value!r})")
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
