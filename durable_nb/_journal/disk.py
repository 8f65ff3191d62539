"""The journal on disk: a diskcache directory that is kept from losing anything.

diskcache gives the schema, the settings and a connection per thread; rows go through its connection directly, since its
own `set` costs several statements, and its `get` would unpickle what a stranger's store tells it to (CVE-2025-69872). Its
defaults make a cache, which may forget: eviction and culling are switched off, and because settings live in the database,
where any other program that opens the folder may change them, every commit checks that they still are.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diskcache

from durable_nb._journal import Commit, Verdict
from durable_nb._journal.blobs import Blobs
from durable_nb.errors import StoreError

BUSY_TIMEOUT_S = 60.0

_COLUMNS = "key, raw, store_time, expire_time, access_time, access_count, tag, size, mode, filename, value"
_RAW_MODE = 1  # diskcache.core.MODE_RAW: the value itself is in the row
_ROW = f"?, 1, ?, NULL, ?, 0, NULL, 0, {_RAW_MODE}, NULL, ?"
_NEVER_FORGET = {"eviction_policy": "none", "cull_limit": 0}
_SETTINGS_HOLD = (
    "NOT EXISTS (SELECT 1 FROM Settings WHERE (key = 'eviction_policy' AND value <> 'none') "
    "OR (key = 'cull_limit' AND value <> 0))"
)
_INSERT = f"INSERT INTO Cache({_COLUMNS}) SELECT {_ROW} WHERE NOT EXISTS (SELECT 1 FROM Cache WHERE key = ? AND raw = 1)"
_HOLDS = "EXISTS (SELECT 1 FROM Cache WHERE key = ? AND raw = 1 AND value = ?)"
_IS_THERE = "EXISTS (SELECT 1 FROM Cache WHERE key = ? AND raw = 1)"
_PUT = f"INSERT OR REPLACE INTO Cache({_COLUMNS}) VALUES ({_ROW})"
_GET = "SELECT value FROM Cache WHERE key = ? AND raw = 1"
_SCAN = "SELECT key, value FROM Cache WHERE key >= ? AND key < ? AND raw = 1 ORDER BY key"
_SIZES = "SELECT key, length(value) FROM Cache WHERE key >= ? AND key < ? AND raw = 1 ORDER BY key"
_BEYOND = chr(0x10FFFF)
_DELETE = "DELETE FROM Cache WHERE key = ? AND raw = 1"


def journal_mode(version: tuple[int, int, int]) -> str:
    """WAL where this SQLite is free of its WAL-reset race, else a rollback journal.

    SQLite 3.7.0 to 3.51.2 can corrupt a WAL database when two connections write or checkpoint at the same moment; fixed in
    3.51.3, and in 3.44.6 and 3.50.7 (https://sqlite.org/wal.html#walresetbug).
    """
    fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51, 0) or (3, 44, 6) <= version < (3, 45, 0)
    return "wal" if fixed else "persist"


class DiskJournal:
    """Rows in a diskcache directory `folder`, large values in files beside it."""

    def __init__(self, folder: Path, blobs: Path, *, wal: bool = True) -> None:
        self._blobs = Blobs(blobs)
        mode = journal_mode(sqlite3.sqlite_version_info) if wal else "persist"
        with _told(folder, "opened"):
            self._cache = _opened(
                str(folder),
                timeout=BUSY_TIMEOUT_S,
                statistics=0,
                tag_index=0,
                size_limit=2**62,
                sqlite_journal_mode=mode,
                sqlite_synchronous=2,  # FULL: an acknowledged commit survives a power cut
                sqlite_mmap_size=0,  # mapped, a full disk is a SIGBUS
                **_NEVER_FORGET,
            )
        self._folder = folder

    @property
    def mode(self) -> str:
        """SQLite's journal mode in force: `wal` or `persist`."""
        return str(self._sql("PRAGMA journal_mode").fetchone()[0])

    def apply(self, commits: Sequence[Commit]) -> list[Verdict]:
        with _told(self._folder, "written"):
            if len(commits) == 1 and self._apply_as_one_statement(commits[0]):
                return [Verdict.APPLIED]
            with self._transaction():
                self._keep_settings()
                return [self._apply(commit) for commit in commits]

    def get(self, key: str) -> bytes | None:
        with _told(self._folder, "read"):
            row = self._sql(_GET, (key,)).fetchone()
        return row[0] if row and isinstance(row[0], bytes) else None

    def scan(self, prefix: str) -> list[tuple[str, bytes]]:
        with _told(self._folder, "read"):
            rows = self._sql(_SCAN, (prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))).fetchall()
        return [(key, value) for key, value in rows if isinstance(value, bytes)]

    def sizes(self, prefix: str = "") -> list[tuple[str, int]]:
        """Keys that begin with `prefix`, in order, and the bytes of each row."""
        beyond = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else _BEYOND
        with _told(self._folder, "read"):
            return [(key, size or 0) for key, size in self._sql(_SIZES, (prefix, beyond)).fetchall()]

    def problems(self) -> list[str]:
        """What SQLite's own check finds wrong with the database; empty where it is sound."""
        with _told(self._folder, "read"):
            found = [str(row[0]) for row in self._sql("PRAGMA integrity_check").fetchall()]
        return [line for line in found if line != "ok"]

    def drop_blobs(self, before: float, needed: Callable[[str], bool]) -> int:
        """Remove large values that were put before that unix time and that no row needs; how many bytes that was."""
        return self._blobs.drop(before, needed)

    def put_blob(self, data: bytes) -> str:
        return self._blobs.put(data)

    def get_blob(self, digest: str) -> bytes:
        return self._blobs.get(digest)

    def close(self) -> None:
        self._cache.close()

    @property
    def _sql(self) -> Callable[..., sqlite3.Cursor]:
        """Runs a statement on this thread's connection: diskcache's private door, used in this class only."""
        return self._cache._sql  # type: ignore[no-any-return]

    def _apply_as_one_statement(self, commit: Commit) -> bool:
        """The usual commit, one new row under a guard, needs no BEGIN and COMMIT. False: nothing done, reason unknown."""
        if len(commit.inserts) != 1 or commit.puts or commit.deletes or commit.guard is None or commit.guard[1] is None:
            return False
        ((key, value),) = commit.inserts
        now = time.time()
        statement = f"{_INSERT} AND {_HOLDS} AND {_SETTINGS_HOLD}"
        bindings: tuple[Any, ...] = (key, now, now, value, key, *commit.guard)
        if commit.follows is not None:
            statement, bindings = f"{statement} AND {_IS_THERE}", (*bindings, commit.follows)
        return self._sql(statement, bindings).rowcount == 1

    def _apply(self, commit: Commit) -> Verdict:
        if commit.guard is not None:
            key, wanted = commit.guard
            row = self._sql(_GET, (key,)).fetchone()
            if (row[0] if row else None) != wanted:
                return Verdict.GUARD_FAILED
        if commit.follows is not None and not self._sql(_GET, (commit.follows,)).fetchone():
            return Verdict.MISSING
        if any(self._sql(_GET, (key,)).fetchone() for key, _ in commit.inserts):
            return Verdict.EXISTS
        now = time.time()
        for key, value in (*commit.inserts, *commit.puts):
            self._sql(_PUT, (key, now, now, value))
        for key in commit.deletes:
            self._sql(_DELETE, (key,))
        return Verdict.APPLIED

    def _keep_settings(self) -> None:
        for key, value in _NEVER_FORGET.items():
            self._sql("UPDATE Settings SET value = ? WHERE key = ? AND value <> ?", (value, key, value))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._sql("BEGIN IMMEDIATE")
        try:
            yield
            self._sql("COMMIT")
        except BaseException:
            if self._in_transaction():  # a full disk may have rolled back already
                self._sql("ROLLBACK")
            raise

    def _in_transaction(self) -> bool:
        connection: Any = self._cache._con
        return bool(connection.in_transaction)


def _opened(folder: str, **options: Any) -> Any:
    """Several processes that make a store at once get in each other's way: diskcache changes the schema without waiting."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        cache = diskcache.Cache.__new__(diskcache.Cache)
        try:
            cache.__init__(folder, **options)
        except BaseException as error:
            cache.close()  # the connection that the failing constructor had opened
            locked = isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
            if not locked or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return cache


@contextmanager
def _told(folder: Path, what: str) -> Iterator[None]:
    """SQLite's and the file system's errors as one sentence that a user can act on."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # a damaged schema makes diskcache raise whatever comes
        raise StoreError(
            f"the journal {folder} could not be {what}: {error or type(error).__name__}. Steps acknowledged before are safe; "
            "free the disk or the folder, or choose another with DURABLE_NB_DIR, and run the cell again"
        ) from error
