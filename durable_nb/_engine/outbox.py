"""The rows of a workflow's run on their way to disk, in order; what is on disk is handed back to be delivered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from msgspec import structs

from durable_nb._engine.by_history import Row
from durable_nb._engine.run_log import LinearLog
from durable_nb._journal import Verdict
from durable_nb._records import Asked, Event

_RECORD_AFTER_S = 1.0
"""A request whose body has run for so long without a commit of the run is committed by itself, for other processes to see."""


class Outbox:
    """What one execution writes."""

    def __init__(
        self,
        log: LinearLog,
        *,
        wall_s: Callable[[], float],
        run_s: Callable[[], float],
        closed: Callable[[], int],
        written: Callable[[Row, Any, BaseException | None], None],
        failed: Callable[[BaseException | Verdict], None],
    ) -> None:
        """
        closed   the last activation all of whose requests have been made
        written  is called with each row that is on disk and that the code is to hear of, in order
        failed   is called where a row could not be written, with the cause
        """
        self._log, self._wall_s, self._run_s, self._closed = log, wall_s, run_s, closed
        self._written, self._failed = written, failed
        self.unrecorded: list[Asked] = []
        """Requests that are on no row yet."""
        self.has_values = False
        """Among these are values that the code has got in passing."""
        self._values: asyncio.Future[Verdict] | None = None
        """Of the last row that has such values."""
        self.count = 0
        """Rows handed over that are not on disk yet."""
        self.last: asyncio.Future[Verdict] | None = None
        """Of the last row that was handed over."""
        self.is_closed = False
        """Nothing more is said of what is at work."""
        self._recording: asyncio.TimerHandle | None = None
        self._last_commit_s = time.monotonic()

    def append(
        self,
        row: Row,
        value: Any = None,
        error: BaseException | None = None,
        *,
        at_s: float = 0.0,
        inserts: tuple[tuple[str, bytes], ...] = (),
        puts: tuple[tuple[str, bytes], ...] = (),
        deletes: tuple[str, ...] = (),
    ) -> asyncio.Future[Verdict]:
        """Commit a row; when that is done, it is delivered with `value` or `error`."""
        if isinstance(row, Event):
            row = structs.replace(row, wall_s=self._wall_s())
        self._last_commit_s = time.monotonic()
        at_s = max(self._run_s(), at_s)
        has_values, self.has_values = self.has_values, False
        row, done = self._log.append(row, self.unrecorded, self._closed(), at_s, inserts=inserts, puts=puts, deletes=deletes)
        self.count += 1
        self.last = done
        if has_values:
            self._values = done
        done.add_done_callback(lambda commit: self._applied(commit, row, value, error))
        return done

    def _applied(self, commit: asyncio.Future[Verdict], row: Row, value: Any, error: BaseException | None) -> None:
        self.count -= 1
        if commit.cancelled():
            return
        failed = commit.exception()
        if failed is not None:
            self._failed(failed)
        elif commit.result() is not Verdict.APPLIED:
            self._failed(commit.result())
        else:
            self._log.on_disk += 1
            if row.what not in ("asked", "moved"):
                self._written(row, value, error)

    async def written(self, row: Row, *, puts: tuple[tuple[str, bytes], ...] = ()) -> None:
        """Commit a row that is delivered to nobody, and return when it is on disk."""
        if await self.append(row, puts=puts) is not Verdict.APPLIED:
            raise asyncio.CancelledError

    async def remembered(self) -> None:
        """Return when what the code has got in passing is on disk: killed in a body and repeated, it gives that the same."""
        if self.has_values:
            self.append(Event("asked"))
        if self._values is not None and await asyncio.shield(self._values) is not Verdict.APPLIED:
            raise asyncio.CancelledError

    def record_soon(self) -> None:
        """Others see what is at work, when it takes longer."""

        def look() -> None:
            self._recording = None
            if self.is_closed or not self.unrecorded:
                return
            if time.monotonic() - self._last_commit_s >= _RECORD_AFTER_S:
                self.append(Event("asked"))
            else:
                self.record_soon()

        if self._recording is None and self.unrecorded:
            self._recording = asyncio.get_running_loop().call_later(_RECORD_AFTER_S, look)
