"""A thread that does what is due, whatever the loops of the process do. It is started when there is something to do."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from durable_nb._locks import let_go_in_children

_IDLE_S = 5.0
"""The thread ends when it had nothing to do for so long."""

_T = TypeVar("_T")


class Ticker(Generic[_T]):
    """Hands over what is due. Its calls may come from any thread."""

    def __init__(self, name: str, work: Callable[[list[_T]], None]) -> None:
        """`work` gets, on the thread, all that is due by now. It must not raise."""
        self._name, self._work = name, work
        self.lock = threading.RLock()
        """For what the work looks at, too."""
        self._changed = threading.Condition(self.lock)
        self._due: dict[_T, float] = {}
        self._thread: threading.Thread | None = None
        let_go_in_children(self)

    def soon(self, item: _T, delay_s: float = 0.0) -> None:
        """It is due after so long, unless it is earlier anyway."""
        with self.lock:
            due_s = time.monotonic() + delay_s
            if self._due.get(item, math.inf) > due_s:
                self._due[item] = due_s
                self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._tick, name=self._name, daemon=True)
                self._thread.start()

    def is_due(self, item: _T) -> bool:
        """Now, or at some time."""
        return item in self._due

    def let_go(self) -> None:
        """In a forked child, which has no such thread, and may have been forked while another one held the lock."""
        self.lock = threading.RLock()
        self._changed, self._thread = threading.Condition(self.lock), None
        self._due = {}

    def _tick(self) -> None:
        while True:
            with self.lock:
                now_s = time.monotonic()
                left_s = min(self._due.values(), default=math.inf) - now_s
                if left_s > 0:
                    self._changed.wait(min(left_s, _IDLE_S))
                    if not self._due:
                        self._thread = None
                        return
                    continue
                due = [item for item, due_s in self._due.items() if due_s <= now_s]
                for item in due:
                    del self._due[item]
            try:
                self._work(due)
            except BaseException:  # told by the thread's end; the next that is due begins another one
                with self.lock:
                    self._thread = None
                raise
