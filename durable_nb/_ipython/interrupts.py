"""An interrupt stops the cell at once, and never the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import types
from collections.abc import Iterator

from durable_nb._engine.cell_run import CellRun


@contextlib.contextmanager
def interruptible(run: CellRun) -> Iterator[None]:
    """Make an interrupt stop the cell at once.

    The kernel's own handler doesn't wake a loop that idles in an await. And a KeyboardInterrupt may be raised only where
    one of the run's own tasks executes the user's code: out of anything else it would end the kernel.
    """
    if threading.current_thread() is not threading.main_thread():  # a subshell: it gets no signals
        yield
        return
    loop = asyncio.get_running_loop()

    def on_interrupt(_signum: int, frame: types.FrameType | None) -> None:
        run.interrupt()
        if run.may_be_left(asyncio.current_task(loop) if asyncio._get_running_loop() is loop else None, frame):
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
