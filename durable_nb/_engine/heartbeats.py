"""What the bodies of steps report of their progress: shown now and then, and on disk within a second.

A body may hold the kernel's loop for minutes, so a thread of its own hands over what is to be written. The row is
kept until the step has come to a value, under the step's idempotency key.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from durable_nb import _codec
from durable_nb import _records as rec
from durable_nb._engine.run_log import RunLog
from durable_nb._engine.ticker import Ticker
from durable_nb._facts import Progress
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Checkpoint, unpack
from durable_nb.errors import StoreError

_WRITTEN_S = 0.4
"""So long after it was reported, at the latest, it is handed over to be written."""
_SHOWN_S = 0.25
"""At least between two changes of what is shown."""
_AGAIN_S = 1.0
"""After a disk that refused."""

_Show = Callable[[Progress], object]


class Heartbeat:
    """Of one attempt. Implements `_current.Heartbeat`: `report` and `last` are for its body, in whatever thread."""

    __slots__ = (
        "_before",
        "_heartbeats",
        "_is_closed",
        "_is_known",
        "_is_showing",
        "_is_written",
        "_latest",
        "_log",
        "_loop",
        "_of",
        "_path",
        "_show",
        "_shown_s",
    )

    def __init__(
        self, heartbeats: Heartbeats, log: RunLog, key: str, path: str, before: Checkpoint | None, show: _Show
    ) -> None:
        """`key`: the step's. `before`: what an earlier attempt here has reported. `show` is called on this loop."""
        self._heartbeats, self._log, self._path, self._show = heartbeats, log, path, show
        self._of = log.record.id, key
        self._before, self._is_known = before, before is not None
        self._latest: Checkpoint | None = None
        self._is_written = True
        self._loop = asyncio.get_running_loop()
        self._is_closed = self._is_showing = False
        self._shown_s = float("-inf")

    @property
    def key(self) -> str:
        """Of its row. Few steps report anything: it isn't made for each."""
        return rec.progress_key(*self._of)

    @property
    def latest(self) -> Checkpoint | None:
        """What the next attempt is given, as far as this process knows."""
        return self._latest or self._before

    def last(self) -> Progress | None:
        before = self._known()
        if before is None:
            return None
        state = _codec.decode(before.form, before.state) if before.form else {}
        return Progress(before.done, before.total, before.note, state)

    def _known(self) -> Checkpoint | None:
        with self._heartbeats.lock:
            if not self._is_known:
                row = self._log.store.journal.get(self.key)
                self._before = unpack(self._log.signer, self.key, row, Checkpoint) if row is not None else None
                self._is_known = True
            return self._before

    def report(self, progress: Progress, form: str, data: bytes) -> None:
        with self._heartbeats.lock:
            if self._is_closed:
                return
            self._known()  # before it is written over
            self._latest = Checkpoint(progress.done, progress.total, progress.note, form, data, self._path)
            self._is_written = False
            self._heartbeats.write_soon(self, _WRITTEN_S)
            if self._is_showing:
                return
            self._is_showing = True
        self._loop.call_soon_threadsafe(self._show_latest)

    def _show_latest(self) -> None:
        if self._is_closed or self._latest is None:
            return
        left_s = self._shown_s + _SHOWN_S - time.monotonic()
        if left_s > 0:
            self._loop.call_later(left_s, self._show_latest)
            return
        self._is_showing, self._shown_s = False, time.monotonic()
        self._show(Progress(self._latest.done, self._latest.total, self._latest.note))

    def close(self, *, has_value: bool) -> None:
        """The body has ended. `has_value`: the step needs no checkpoint any more."""
        with self._heartbeats.lock:
            self._is_closed = True
            if has_value:
                self._is_written = True
            with contextlib.suppress(StoreError):  # the store is closed
                self.handed_over()  # at once: after the commit that ends the run it would be refused

    def rows(self) -> tuple[str, ...]:
        """What goes with the step's outcome."""
        return (self.key,) if self.latest is not None else ()

    def moves_to(self, log: RunLog, path: str, show: _Show) -> None:
        """Another execution of the run goes on with the attempt."""
        with self._heartbeats.lock:
            self._log, self._path, self._show = log, path, show

    def handed_over(self) -> Future[Verdict] | None:
        """What was reported last, on its way to disk: before the step's outcome, with which it goes."""
        with self._heartbeats.lock:
            if self._is_written or self._latest is None:
                return None
            self._is_written = True
            row = self._log.pack(self.key, self._latest)
            return self._log.store.writer.hand_over(Commit(self._log.held.guard, puts=(row,)))

    def refused(self) -> None:
        """By the disk: it is tried again."""
        with self._heartbeats.lock:
            if not self._is_closed and not self._log.store.writer.closed:
                self._is_written = False
                self._heartbeats.write_soon(self, _AGAIN_S)


class Heartbeats:
    """Of all attempts of one store in this process."""

    def __init__(self) -> None:
        self._ticker = Ticker("durable_nb progress", self._write)

    @property
    def lock(self) -> threading.RLock:
        return self._ticker.lock

    def write_soon(self, heartbeat: Heartbeat, delay_s: float = 0.0) -> None:
        """What was reported last is handed over after so long, at the latest."""
        self._ticker.soon(heartbeat, delay_s)

    def _write(self, due: list[Heartbeat]) -> None:
        handed_over: list[tuple[Heartbeat, Future[Verdict]]] = []
        for heartbeat in due:  # together, they share one fsync
            with contextlib.suppress(StoreError):  # the store is closed: nobody is at work in it any more
                if (written := heartbeat.handed_over()) is not None:
                    handed_over.append((heartbeat, written))
        for heartbeat, written in handed_over:
            try:
                written.result()  # where the run is another process's by now, nothing was written, and nothing is to be
            except StoreError:  # the step's outcome tells of a disk that refuses
                heartbeat.refused()
