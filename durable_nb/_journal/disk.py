"""The journal on disk: rows in a diskcache directory that is kept from losing anything, and large values beside it.

Statements are given to SQLite directly: diskcache's own `set` costs several, and its `get` would unpickle what a stranger's
store tells it to (CVE-2025-69872).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from durable_nb._journal import Commit, Verdict
from durable_nb._journal.blobs import Blobs
from durable_nb._journal.database import FORGETS, Database, has_race, keep_settings
from durable_nb._locks import HeldTooLongError
from durable_nb.errors import StoreError

_COLUMNS = "key, raw, store_time, expire_time, access_time, access_count, tag, size, mode, filename, value"
_RAW_MODE = 1  # diskcache.core.MODE_RAW: the value itself is in the row
_ROW = f"?, 1, ?, NULL, ?, 0, NULL, 0, {_RAW_MODE}, NULL, ?"
_SETTINGS_HOLD = f"NOT EXISTS (SELECT 1 FROM Settings WHERE {FORGETS})"
_INSERT = f"INSERT INTO Cache({_COLUMNS}) SELECT {_ROW} WHERE NOT EXISTS (SELECT 1 FROM Cache WHERE key = ? AND raw = 1)"
_HOLDS = "EXISTS (SELECT 1 FROM Cache WHERE key = ? AND raw = 1 AND value = ?)"
_IS_THERE = "EXISTS (SELECT 1 FROM Cache WHERE key = ? AND raw = 1)"
_PUT = (  # INSERT OR REPLACE deletes without a trigger, and then diskcache's count of the rows is wrong
    f"INSERT INTO Cache({_COLUMNS}) VALUES ({_ROW}) ON CONFLICT(key, raw) DO UPDATE SET "
    "store_time = excluded.store_time, expire_time = NULL, size = 0, mode = excluded.mode, filename = NULL, "
    "value = excluded.value"
)
_GET = "SELECT value FROM Cache WHERE key = ? AND raw = 1"
_SCAN = "SELECT key, value FROM Cache WHERE key >= ? AND key < ? AND raw = 1 ORDER BY key"
_SIZES = "SELECT key, length(value) FROM Cache WHERE key >= ? AND key < ? AND raw = 1 ORDER BY key"
_FIRST = "SELECT key FROM Cache WHERE key >= ? AND key < ? AND key > ? AND raw = 1 ORDER BY key LIMIT 1"
_AT_ONCE = 500
_GET_MANY = {  # few statements, so that sqlite3 keeps them prepared
    n: f"SELECT key, value FROM Cache WHERE raw = 1 AND key IN ({', '.join('?' * n)})" for n in (4, 40, _AT_ONCE)
}
_BEYOND = chr(0x10FFFF)
_DELETE = "DELETE FROM Cache WHERE key = ? AND raw = 1"


class DiskJournal:
    """Rows in a diskcache directory `folder`, large values in files beside it."""

    def __init__(
        self, folder: Path, blobs: Path, *, wal: bool | None = None, must_exist: bool = False, only_look: bool = False
    ) -> None:
        """`wal`: None chooses by the file system. `must_exist`: CorruptStoreError where there is no journal; else it is made.
        `only_look`: nothing is made, written or waited for, and where that is not possible, StoreError."""  # fmt: skip
        self._blobs, self._folder = Blobs(blobs), folder
        with _as_store_errors(folder, "opened"):
            self._database = Database(folder, wal=wal, must_exist=must_exist, only_look=only_look)

    @property
    def mode(self) -> str:
        """SQLite's journal mode in force: `wal` or `persist`."""
        return self._database.mode

    def apply(self, commits: Sequence[Commit]) -> list[Verdict]:
        with _as_store_errors(self._folder, "written"), self._database.writing() as sql:
            # The group is one transaction: on disk when COMMIT returns, as a whole or not at all. No verdict is given before,
            # so nothing is acknowledged that a kill or a power cut could take back.
            if len(commits) == 1 and _applied_as_one_statement(sql, commits[0]):
                return [Verdict.APPLIED]
            with _transaction(sql):
                keep_settings(sql)  # first: a row is never written while the cache may forget rows
                return [_applied(sql, commit) for commit in commits]

    def get(self, key: str) -> bytes | None:
        with _as_store_errors(self._folder, "read"), self._database.reading() as sql:
            row = sql.execute(_GET, (key,)).fetchone()
        return row[0] if row and isinstance(row[0], bytes) else None

    def get_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        wanted, found = list(keys), []
        with _as_store_errors(self._folder, "read"), self._database.reading() as sql, _transaction(sql, "BEGIN"):
            for start in range(0, len(wanted), _AT_ONCE):
                some = wanted[start : start + _AT_ONCE]
                n = next(n for n in _GET_MANY if n >= len(some))
                found += sql.execute(_GET_MANY[n], some + [None] * (n - len(some))).fetchall()
        return {key: value for key, value in found if isinstance(value, bytes)}

    def scan(self, prefix: str) -> list[tuple[str, bytes]]:
        with _as_store_errors(self._folder, "read"), self._database.reading() as sql:
            rows = sql.execute(_SCAN, (prefix, _beyond(prefix))).fetchall()
        return [(key, value) for key, value in rows if isinstance(value, bytes)]

    def sizes(self, prefix: str = "") -> list[tuple[str, int]]:
        with _as_store_errors(self._folder, "read"), self._database.reading() as sql:
            return [(key, size or 0) for key, size in sql.execute(_SIZES, (prefix, _beyond(prefix))).fetchall()]

    def first(self, prefix: str, after: str = "") -> str | None:
        with _as_store_errors(self._folder, "read"), self._database.reading() as sql:
            row = sql.execute(_FIRST, (prefix, _beyond(prefix), after)).fetchone()
        return row[0] if row else None

    def problems(self) -> list[str]:
        """SQLite's own check; and are there as many rows as its triggers have counted?"""
        with _as_store_errors(self._folder, "read"), self._database.reading() as sql, _transaction(sql, "BEGIN"):
            found = [str(row[0]) for row in sql.execute("PRAGMA integrity_check").fetchall()]
            (counted,) = sql.execute("SELECT value FROM Settings WHERE key = 'count'").fetchone() or (None,)
            (there,) = sql.execute("SELECT count(*) FROM Cache").fetchone()
        if counted != there:
            found.append(f"{there} rows are there, {counted} were counted")
        return [line for line in found if line != "ok"]

    def caveats(self) -> list[str]:
        if self.mode != "wal" or not has_race():
            return []
        told = (
            f"SQLite {sqlite3.sqlite_version} can corrupt the journal when a program other than durable_nb writes to it while "
            "a kernel does; reading it is safe"
        )
        return [told]

    def drop_blobs(self, before: float, needed: Callable[[str], bool]) -> int:
        return self._blobs.drop(before, needed)

    def put_blob(self, data: bytes) -> str:
        return self._blobs.put(data)

    def get_blob(self, digest: str) -> bytes:
        return self._blobs.get(digest)

    def close(self) -> None:
        self._database.close()


def _applied_as_one_statement(sql: sqlite3.Connection, commit: Commit) -> bool:
    """The usual commit, one new row under a guard, needs no BEGIN and COMMIT. False: nothing done, reason unknown."""
    if len(commit.inserts) != 1 or commit.puts or commit.deletes or commit.sweeps:
        return False
    if commit.guard is None or commit.guard[1] is None:
        return False
    ((key, value),) = commit.inserts
    now = time.time()
    statement = f"{_INSERT} AND {_HOLDS} AND {_SETTINGS_HOLD}"
    bindings: tuple[Any, ...] = (key, now, now, value, key, *commit.guard)
    if commit.follows is not None:
        statement, bindings = f"{statement} AND {_IS_THERE}", (*bindings, commit.follows)
    return sql.execute(statement, bindings).rowcount == 1


def _applied(sql: sqlite3.Connection, commit: Commit) -> Verdict:
    # All checks come before the first write, within BEGIN IMMEDIATE: what they saw cannot change until COMMIT. The guard is
    # first, so that a run's former owner is refused whatever it brings; then no row that exists is written by an insert.
    if commit.guard is not None:
        key, wanted = commit.guard
        row = sql.execute(_GET, (key,)).fetchone()
        if (row[0] if row else None) != wanted:
            return Verdict.GUARD_FAILED
    if commit.follows is not None and not sql.execute(_GET, (commit.follows,)).fetchone():
        return Verdict.MISSING
    if any(sql.execute(_GET, (key,)).fetchone() for key, _ in commit.inserts):
        return Verdict.EXISTS
    now = time.time()
    sql.executemany(_PUT, [(key, now, now, value) for key, value in (*commit.inserts, *commit.puts)])
    sql.executemany(_DELETE, [(key,) for key in commit.deletes])
    if commit.sweeps is not None:
        prefix, goes = commit.sweeps
        rows = sql.execute(_SCAN, (prefix, _beyond(prefix))).fetchall()
        sql.executemany(_DELETE, [(key,) for key, row in rows if isinstance(row, bytes) and goes(key, row)])
    return Verdict.APPLIED


@contextmanager
def _transaction(sql: sqlite3.Connection, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
    sql.execute(begin)
    try:
        yield
        sql.execute("COMMIT")
    except BaseException:
        if sql.in_transaction:  # a full disk may have rolled back already
            sql.execute("ROLLBACK")
        raise


def _beyond(prefix: str) -> str:
    """The first key after those that begin with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else _BEYOND


@contextmanager
def _as_store_errors(folder: Path, what: str) -> Iterator[None]:
    """SQLite's and the file system's errors as one sentence that a user can act on."""
    try:
        yield
    except StoreError:
        raise
    except HeldTooLongError as error:
        raise StoreError(
            f"the journal {folder} could not be {what}: {error} holds its lock, and did so for too long. Let that process "
            f"continue (a stopped one by 'kill -CONT {error.pid}') or end it, and run the cell again; steps "
            "acknowledged before are safe"
        ) from error
    except Exception as error:  # a damaged schema makes diskcache raise whatever comes
        raise StoreError(
            f"the journal {folder} could not be {what}: {error or type(error).__name__}. Steps acknowledged before are safe; "
            "free the disk or the folder, or choose another with DURABLE_NB_DIR, and run the cell again"
        ) from error
