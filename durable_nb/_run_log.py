"""The log of one workflow run, in the journal: read whole, and appended to under the run's lease.

A row is one commit. It is inserted only while the run's lease is ours and the row before it is there: so a process that lost
the run writes nothing more, and of commits that are handed over one after the other none lands when an earlier one failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from durable_nb import _records as rec
from durable_nb._history import History, Row, without_collector
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Asked, Attempts, Event, Outcome, RunRecord, unpack
from durable_nb.errors import CorruptStoreError

if TYPE_CHECKING:
    from durable_nb._codec import Seal
    from durable_nb._journal import Journal
    from durable_nb._run import Held
    from durable_nb._store import Store

BLOB_BYTES = 1 << 20
"""Values from this size on lie in files of their own."""

_T = TypeVar("_T")


class RunLog:
    """The rows of a run, as one execution of it sees them."""

    def __init__(self, store: Store, record: RunRecord, held: Held) -> None:
        self._store, self._seal, self._held = store, store.seal, held
        self._scope, self._generation = record.scope, record.generation
        self._prefixes = rec.log_prefixes(record.scope, record.generation)
        self._last = ""
        self._seq = 0
        self.at_s = 0.0
        """The run's time of the last row."""

    async def load(self) -> tuple[History, dict[int, Attempts]]:
        """What the rows tell, and the failed attempts of steps that have not ended. CorruptStoreError where a row is missing.

        It is worked out on the writer's thread: for 100,000 rows it takes a second, which the kernel's loop has better use for.
        """
        return await self._store.writer.call(self._read)

    def append(
        self,
        row: Row,
        asked: list[Asked],
        closed: int,
        at_s: float,
        *,
        puts: tuple[tuple[str, bytes], ...] = (),
        deletes: tuple[str, ...] = (),
    ) -> tuple[Row, asyncio.Future[Verdict]]:
        """Hand over the next row, with what was asked for since the last one; the row as it is on disk when the future is done.

        The verdict is GUARD_FAILED where another process owns the run, MISSING where an earlier row could not be written.
        """
        self._seq += 1
        self.at_s = max(self.at_s, at_s)
        row = replace(row, asked=tuple(asked), closed=closed, at=self.at_s)
        asked.clear()
        steps, sleeps, others = self._prefixes
        prefix = steps if isinstance(row, Outcome) else sleeps if any(one.timer for one in row.asked) else others
        key = f"{prefix}{self._seq:08}"
        follows, self._last = self._last or None, key
        insert = key, rec.pack(self._seal, key, row)
        return row, self._store.writer.commit(Commit(self._held.guard, (insert,), puts, deletes, follows))

    def attempts_row(self, request: int, attempts: Attempts) -> tuple[str, bytes]:
        """The row of a step's failed attempts, to be put with a row of the log."""
        key = self.attempts_key(request)
        return key, rec.pack(self._seal, key, attempts)

    def attempts_key(self, request: int) -> str:
        return f"{rec.attempts_prefix(self._scope, self._generation)}{request:08}"

    async def kept(self, data: bytes) -> tuple[bytes, str]:
        """What goes into a row: the bytes themselves or, large, the name of the file that holds them now."""
        if len(data) < BLOB_BYTES:
            return data, ""
        return b"", await self._store.writer.call(lambda: self._store.journal.put_blob(data))

    def blob(self, digest: str) -> asyncio.Future[bytes]:
        """A large value."""
        return self._store.writer.call(lambda: self._store.journal.get_blob(digest))

    def read(self, job: Callable[[], _T]) -> asyncio.Future[_T]:
        """Look at the journal, after what was handed over."""
        return self._store.writer.call(job)

    def _read(self) -> tuple[History, dict[int, Attempts]]:
        with without_collector():
            return self._made()

    def _made(self) -> tuple[History, dict[int, Attempts]]:
        rows = read_log(self._store.journal, self._seal, self._scope, self._generation)
        if rows:
            self._seq, self._last = rows[-1][0], rows[-1][1]
            self.at_s = max(row.at for _, _, row in rows)
        attempts = {}
        for key, packed in self._store.journal.scan(rec.attempts_prefix(self._scope, self._generation)):
            attempts[int(key.rpartition("/")[2])] = unpack(self._seal, key, packed, Attempts)
        return History(row for _, _, row in rows), attempts


def read_log(journal: Journal, seal: Seal, scope: str, generation: int) -> list[tuple[int, str, Row]]:
    """The rows of a run's log in order, each with its number and its key. CorruptStoreError where one is missing."""
    found: list[tuple[int, str, Row]] = []
    for prefix, kind in zip(rec.log_prefixes(scope, generation), (Outcome, Event, Event), strict=True):
        for key, packed in journal.scan(prefix):
            if not key[len(prefix) :].isdecimal():
                raise CorruptStoreError(f"the record {key!r} was written by an unpublished durable_nb; begin the run anew")
            found.append((int(key[len(prefix) :]), key, unpack(seal, key, packed, kind)))
    found.sort(key=lambda row: row[0])
    for n, (seq, key, _) in enumerate(found, 1):
        if seq != n:
            raise CorruptStoreError(
                f"row {n} of the log is missing (the next one is {key!r}): what it recorded may have been paid for. Nothing "
                "was run. Restore the store from a backup, or begin the run anew with its restart()"
            )
    return found
