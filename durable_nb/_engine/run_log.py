"""The records of one run, as one execution of it reads and writes them: typed, and guarded by the run's lease.

Every commit is conditional on the exact bytes of the lease's row, so a process that lost the run writes nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from msgspec import structs

from durable_nb import _codec
from durable_nb import _records as rec
from durable_nb._codec import Signer
from durable_nb._engine.by_history import History, Row, without_collector
from durable_nb._journal import Commit, Journal, Verdict
from durable_nb._records import (
    Again,
    Answer,
    Arrived,
    Asked,
    Attempts,
    Cancel,
    Event,
    Excluded,
    Lease,
    Notification,
    Outcome,
    Passing,
    Record,
    Resume,
    RunRecord,
    Timer,
    unpack,
)
from durable_nb._store import Store
from durable_nb.errors import CorruptStoreError, RunCancelled, StoreError

BLOB_BYTES = 1 << 20
"""Values from this size on lie in files of their own."""

_SURE_S = 0.1
"""A commit that was applied so short a time ago says as much as looking. A stopped process's time passes too."""

_T = TypeVar("_T")


@dataclass(slots=True)
class Held:
    """This process's right to write for a run: every commit is guarded by the exact bytes of the lease's row."""

    run_id: str
    epoch: int
    row: bytes
    _count: int = 0
    confirmed_s: float = float("-inf")
    """When a commit was handed over, by the monotonic clock, that was the last to be applied under this row."""

    def next_sequence(self) -> rec.Sequence:
        """Now, as the run's own events tell it: later than every one before, in this process and in former owners."""
        self._count += 1
        return self.epoch, self._count

    @property
    def guard(self) -> tuple[str, bytes]:
        return rec.lease_key(self.run_id), self.row


class RunLog:
    """Reads, guarded writes, large values, and the end of a run."""

    def __init__(self, store: Store, record: RunRecord, held: Held) -> None:
        self.store, self.signer, self.record, self.held = store, store.signer, record, held

    def pack(self, key: str, record: Record) -> tuple[str, bytes]:
        """A record as the row that a commit takes."""
        return key, rec.pack(self.signer, key, record)

    def commit(
        self,
        *,
        inserts: tuple[tuple[str, bytes], ...] = (),
        puts: tuple[tuple[str, bytes], ...] = (),
        deletes: tuple[str, ...] = (),
        sweeps: tuple[str, Callable[[str, bytes], bool]] | None = None,
        follows: str | None = None,
    ) -> asyncio.Future[Verdict]:
        """Hand over a commit. GUARD_FAILED where another process owns the run, EXISTS, MISSING of `inserts`, `follows`."""
        began_s = time.monotonic()
        done = self.store.writer.commit(Commit(self.held.guard, inserts, puts, deletes, sweeps, follows))
        done.add_done_callback(lambda commit: self._confirm(commit, began_s))
        return done

    def _confirm(self, commit: asyncio.Future[Verdict], began_s: float) -> None:
        if not commit.cancelled() and commit.exception() is None and commit.result() is Verdict.APPLIED:
            self.held.confirmed_s = began_s

    async def is_ours(self) -> bool:
        """Is the lease's row still what it was? A run that was taken over begins no body any more, even where it has nothing
        to commit."""  # fmt: skip
        if time.monotonic() - self.held.confirmed_s < _SURE_S:
            return True
        key = rec.lease_key(self.record.id)
        return await self.read(lambda: self.store.journal.get(key)) == self.held.row

    async def kept(self, data: bytes) -> tuple[bytes, str]:
        """What goes into a row: the bytes themselves or, large, the name of the file that holds them now."""
        if len(data) < BLOB_BYTES:
            return data, ""
        return b"", await self.read(lambda: self.store.journal.put_blob(data))

    def blob(self, digest: str) -> asyncio.Future[bytes]:
        """A large value."""
        return self.read(lambda: self.store.journal.get_blob(digest))

    def read(self, job: Callable[[], _T]) -> asyncio.Future[_T]:
        """Look at the journal, after what was handed over."""
        return self.store.writer.call(job)

    def read_row(self, key: str) -> asyncio.Future[bytes | None]:
        return self.read(lambda: self.store.journal.get(key))

    def end(self, record: RunRecord, result: rec.Result | None, *, closes: bool, is_at_work: bool) -> asyncio.Future[Verdict]:
        """Write down how an execution ended. `closes`: nobody goes on with the run. While a body of it `is_at_work`, the lease
        stays ours, so that what it comes to can be recorded."""  # fmt: skip
        puts = [self.pack(rec.run_key(record.id), record)]
        if result is not None:
            puts.append(self.pack(rec.result_key(record.id), result))
        deletes = []
        # What came too late goes with the end, also what was sent since the last look; after it nobody can send any more. What
        # is wanted of an execution that is interrupted is delivered to the next one.
        settled = functools.partial(self._is_settled, closes=closes)
        sweeps = (rec.inbox_prefix(record.id), settled) if record.status != "running" else None
        if closes:
            deletes.append(rec.open_prefix(record.scope) + record.id)
        if is_at_work:
            pass
        elif record.status == "completed":
            deletes.append(rec.lease_key(record.id))
            deletes += [key for key, _ in self.store.journal.sizes(rec.progress_prefix(record.id))]
        else:
            puts.append(self.pack(rec.lease_key(record.id), Lease(self.held.epoch, "")))
        return self.commit(puts=tuple(puts), deletes=tuple(deletes), sweeps=sweeps)

    def _is_settled(self, key: str, row: bytes, *, closes: bool) -> bool:
        """Is that message done with when the run has ended? A restart is not: the run is to begin anew all the same. Nor is
        what came for a run that has failed, and may be resumed."""  # fmt: skip
        with contextlib.suppress(StoreError):
            message = rec.unpack_message(self.signer, key, row)
            return isinstance(message, Cancel | Resume) or (closes and isinstance(message, Notification | Answer))
        return False


class CellRecords:
    """What is recorded of a cell's steps and waits. Written rows are put here by whoever writes them."""

    def __init__(self, log: RunLog) -> None:
        self.log, self._signer = log, log.signer
        self._scope, self._generation = log.record.scope, log.record.generation
        self.outcomes: dict[str, bytes] = {}
        self.attempts: dict[str, bytes] = {}
        self.timers: dict[str, bytes] = {}
        """By what keys call the wait."""
        self.arrived: dict[str, bytes] = {}
        """The same, of what waits have come to."""
        self.values: dict[str, bytes] = {}
        self.excluded: dict[tuple[str, str], tuple[tuple[str, ...], ...]] = {}
        """By kind and name: components that steps change themselves."""
        self.again: dict[str, int] = {}
        """By name: how often steps were asked to be executed anew."""
        self._last_read: tuple[str, Outcome | None] = "", None

    async def load(self) -> None:
        """Read what was recorded. What is written meanwhile counts."""
        of = self._scope, self._generation
        prefixes = (
            rec.step_prefix(*of),
            rec.attempts_prefix(*of),
            rec.timer_prefix(self.log.record.id),
            rec.arrived_prefix(self.log.record.id),
            rec.value_prefix(self.log.record.id),
            rec.excluded_prefix(*of),
            rec.again_prefix(*of),
        )
        journal = self.log.store.journal
        found = await self.log.read(lambda: [dict(journal.scan(prefix)) for prefix in prefixes])
        outcomes, attempts, timers, arrived, self.values, excluded, again = found
        self.timers = {key[len(prefixes[2]) :]: row for key, row in timers.items()}
        self.arrived = {key[len(prefixes[3]) :]: row for key, row in arrived.items()}
        self.outcomes = outcomes | self.outcomes
        self.attempts = attempts | self.attempts
        for key, row in excluded.items():
            known = unpack(self._signer, key, row, Excluded)
            self.excluded[known.kind, known.name] = known.left_out
        for key, row in again.items():
            asked = unpack(self._signer, key, row, Again)
            self.again[asked.name] = asked.number

    def outcome(self, key: str) -> Outcome | None:
        """The outcome in that row. It is asked for several times in succession."""
        if key == self._last_read[0]:
            return self._last_read[1]
        row = self.outcomes.get(key)
        if row is None:
            return None
        outcome = unpack(self._signer, key, row, Outcome)
        self._last_read = key, outcome
        return outcome

    def failures(self, key: str) -> Attempts | None:
        row = self.attempts.get(key)
        return None if row is None else unpack(self._signer, key, row, Attempts)

    def timer(self, wait: str) -> Timer | None:
        row = self.timers.get(wait)
        return None if row is None else unpack(self._signer, rec.timer_key(self.log.record.id, wait), row, Timer)

    def what_came(self, wait: str) -> Arrived | None:
        row = self.arrived.get(wait)
        return None if row is None else unpack(self._signer, rec.arrived_key(self.log.record.id, wait), row, Arrived)

    def taken(self) -> set[str]:
        """The rows of events that were delivered."""
        return {came.source for wait in self.arrived if (came := self.what_came(wait)) and came.source}

    def value(self, key: str) -> Passing | None:
        row = self.values.get(key)
        return None if row is None else unpack(self._signer, key, row, Passing)

    def names(self) -> set[str]:
        """Of the steps that are recorded, or have failed and are to be tried again."""
        ended = {unpack(self._signer, key, row, Outcome).name for key, row in self.outcomes.items()}
        return ended | {unpack(self._signer, key, row, Attempts).name for key, row in self.attempts.items()}


class LinearLog:
    """The log of a workflow's run: read whole, and appended to.

    A row is one commit, inserted only while the row before it is there: of commits that are handed over one after the other
    none lands when an earlier one failed.
    """

    def __init__(self, log: RunLog) -> None:
        self._log, self._signer = log, log.signer
        self._scope, self._generation = log.record.scope, log.record.generation
        self._last = ""
        self._seq = 0
        self.on_disk = 0
        """So many rows are, at least."""
        self.at_s = 0.0
        """The run's time of the last row."""

    async def load(self) -> tuple[History, dict[int, Attempts], set[str]]:
        """What the rows tell, the failed attempts of steps that have not ended, and the rows of events that were delivered.
        CorruptStoreError where a row is missing.

        It is worked out on the writer's thread: for 100,000 rows it takes a second, which the kernel's loop has better use for.
        """
        return await self._log.read(self._read)

    def append(
        self,
        row: Row,
        asked: list[Asked],
        closed: int,
        at_s: float,
        *,
        inserts: tuple[tuple[str, bytes], ...] = (),
        puts: tuple[tuple[str, bytes], ...] = (),
        deletes: tuple[str, ...] = (),
    ) -> tuple[Row, asyncio.Future[Verdict]]:
        """Hand over the next row, with what was asked for since the last one; the row as it is on disk when the future is done.
        `inserts`: rows that nobody else writes.

        The verdict is GUARD_FAILED where another process owns the run, MISSING where an earlier row could not be written.
        """
        self._seq += 1
        self.at_s = max(self.at_s, at_s)
        row = structs.replace(row, asked=tuple(asked), closed=closed, at=self.at_s)
        asked.clear()
        key = rec.log_key(self._scope, self._generation, self._seq, row)
        follows, self._last = self._last or None, key
        return row, self._log.commit(inserts=(self._log.pack(key, row), *inserts), puts=puts, deletes=deletes, follows=follows)

    def attempts_row(self, request: int, attempts: Attempts) -> tuple[str, bytes]:
        """The row of a step's failed attempts, to be put with a row of the log."""
        return self._log.pack(self.attempts_key(request), attempts)

    def attempts_key(self, request: int) -> str:
        return f"{rec.attempts_prefix(self._scope, self._generation)}{request:08}"

    def _read(self) -> tuple[History, dict[int, Attempts], set[str]]:
        with without_collector():
            journal = self._log.store.journal
            rows = read_log(journal, self._signer, self._log.record)
            if rows:
                self._seq, self._last = rows[-1][0], rows[-1][1]
                self.on_disk = self._seq
                self.at_s = max(row.at for _, _, row in rows)
            attempts = {}
            for key, packed in journal.scan(rec.attempts_prefix(self._scope, self._generation)):
                attempts[int(key.rpartition("/")[2])] = unpack(self._signer, key, packed, Attempts)
            taken = {row.source for _, _, row in rows if isinstance(row, Event) and row.source}
            return History(row for _, _, row in rows), attempts, taken


def read_log(journal: Journal, signer: Signer, record: RunRecord) -> list[tuple[int, str, Row]]:
    """The rows of a run's log in order, each with its number and its key. CorruptStoreError where one is missing.

    Of a run whose process was killed, the last row can be missing without being missed: that is how a kill just before its
    commit leaves the log. The step's body runs again then, under the same idempotency key, as it does after such a kill.
    """
    found: list[tuple[int, str, Row]] = []
    kinds: tuple[type[Row], ...] = (Outcome, Event, Event)
    for prefix, kind in zip(rec.log_prefixes(record.scope, record.generation), kinds, strict=True):
        for key, packed in journal.scan(prefix):
            if not key[len(prefix) :].isdecimal():
                raise CorruptStoreError(f"the record {key!r} was written by an unpublished durable_nb; begin the run anew")
            found.append((int(key[len(prefix) :]), key, unpack(signer, key, packed, kind)))
    found.sort(key=lambda row: row[0])
    numbers = [seq for seq, _, _ in found]
    missing = next((n for n, seq in enumerate(numbers, 1) if seq != n), len(found) + 1)
    if missing <= max(len(found), record.rows):
        of = f"the next one is {found[missing - 1][1]!r}" if missing <= len(found) else f"there were {record.rows}"
        raise CorruptStoreError(
            f"row {missing} of the log of the run {record.id!r} is missing ({of}): what it recorded may have been paid for. "
            "Nothing was run. Restore the store from a backup, or begin the run anew with its restart()"
        )
    return found


def say(error: BaseException) -> str:
    """`TypeName: message`, as a row keeps it."""
    text = _codec.text_of(error)
    return rec.plain(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def cancelled(run_id: str, reason: str) -> RunCancelled:
    """What whoever waits for a cancelled run gets."""
    return RunCancelled(f"the run {run_id!r} was cancelled" + (f": {reason}" if reason else ""))
