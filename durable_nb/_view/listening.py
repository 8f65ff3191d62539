"""Buttons that act while a cell is running, on ipykernel 6 too: it handles no message before the cell has ended.

ipykernel 7 handles them while the cell awaits. On 6 they wait in the kernel's queue behind the running cell: as long as a view
listens, a task takes them out and hands them to the widgets; everything else stays in the queue, in its order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

_EVERY_S = 0.1
_COMM = frozenset({"comm_msg", "comm_open", "comm_close"})

log = logging.getLogger("durable_nb")


class Listening:
    """For all views of this kernel; it listens as long as one of them does."""

    def __init__(self) -> None:
        self._listeners: set[object] = set()
        self._task: asyncio.Task[None] | None = None

    def begin(self, listener: object) -> None:
        """Listen on its behalf, too. Call it on the kernel's loop."""
        kernel = _kernel_with_queue()
        if kernel is None:
            return
        self._listeners.add(listener)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._listen(kernel), name="durable_nb listens")

    def end(self, listener: object) -> None:
        """It needs nothing any more."""
        self._listeners.discard(listener)

    async def _listen(self, kernel: Any) -> None:
        while self._listeners:
            with contextlib.suppress(asyncio.CancelledError):  # an interrupt of the cell is none of this
                await asyncio.sleep(_EVERY_S)
            _hand_over(kernel)


listening = Listening()


def _kernel_with_queue() -> Any:
    from IPython.core.getipython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    return kernel if hasattr(kernel, "msg_queue") else None


def _hand_over(kernel: Any) -> None:
    """Give the widgets their messages that wait; no await in between, so that the queue is as it was but for them."""
    waiting = [kernel.msg_queue.get_nowait() for _ in range(kernel.msg_queue.qsize())]
    ours = [item for item in waiting if _kind(kernel, item) in _COMM]
    for item in waiting:
        if item not in ours:
            kernel.msg_queue.put_nowait(item)
    for _, _, args in ours:
        try:
            identities, parts = kernel.session.feed_identities(args[0], copy=False)
            message = kernel.session.deserialize(parts, content=True, copy=False)
            # the handler itself: dispatching would take the cell for the message's
            kernel.shell_handlers[message["header"]["msg_type"]](kernel.shell_stream, identities, message)
        except Exception:
            log.exception("a message to a widget could not be handled")


def _kind(kernel: Any, item: Any) -> str:
    """Return a message's type; '' for anything else that waits in the queue."""
    _, dispatch, args = item
    if dispatch != kernel.dispatch_shell or not args:
        return ""
    with contextlib.suppress(Exception):  # whoever dispatches it says what is wrong with it
        _, parts = kernel.session.feed_identities(args[0], copy=False)
        return str(kernel.session.deserialize(parts, content=False, copy=False)["header"]["msg_type"])
    return ""
