"""Connections to the journal's database, which other threads and other processes use at the same time.

SQLite 3.7.0 to 3.51.2 can corrupt a database in WAL mode when two connections write or checkpoint at the same moment
(https://sqlite.org/wal.html#walresetbug). So here whoever writes, checkpoints, opens or closes holds a lock among
processes (`_locks.FairLock`). One connection of a process writes, and checkpoints as it commits. All others read: in WAL mode
they are read-only, so that SQLite doesn't let them checkpoint, not even where the last one closes. The lock is taken with
every SQLite and in every mode: another process may have another SQLite, and SQLite's own waiting lets a writer starve.

diskcache makes the schema and the settings. Its defaults make a cache, which may forget: eviction and culling are off.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from durable_nb._disks import file_system_of
from durable_nb._locks import FairLock, HeldTooLongError, let_go_in_children
from durable_nb.errors import CorruptStoreError, StoreError

PATIENCE_S = 60.0
"""How long a commit waits for the lock, and SQLite for programs that don't take it."""
_PATIENCE_OF_LOOKING_S = 0.1
_PATIENCE_OF_CLOSING_S = 2.0

_SETTINGS = {
    "eviction_policy": "none",
    "cull_limit": 0,
    "size_limit": 2**62,
    "statistics": 0,
    "tag_index": 0,
    "sqlite_synchronous": 2,  # FULL: an acknowledged commit survives a power cut
    "sqlite_mmap_size": 0,  # mapped, a full disk is a SIGBUS
    "sqlite_cache_size": 8192,  # pages, as diskcache has it: a scan of 10,000 rows is a fifth faster
}
FORGETS = "(key = 'eviction_policy' AND value <> 'none') OR (key = 'cull_limit' AND value <> 0)"
"""Settings with which diskcache would forget: they live in the database, where any program that opens it may change them."""
_LAST_MADE = "SELECT 1 FROM sqlite_master WHERE type = 'trigger' AND name = 'Settings_size_delete'"

_inherited: list[sqlite3.Connection] = []
"""A forked child's copies of its parent's connections. Closing one hangs where a thread of the parent was just using it."""


def has_race(version: tuple[int, int, int] = sqlite3.sqlite_version_info) -> bool:
    """Can this SQLite corrupt a database in WAL mode when two write at once, as a program that does not take the lock may?"""
    fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51, 0) or (3, 44, 6) <= version < (3, 45, 0)
    return version >= (3, 7, 0) and not fixed


class Database:
    """The database in the diskcache directory `folder`."""

    def __init__(self, folder: Path, *, wal: bool | None = None, must_exist: bool = False, only_look: bool = False) -> None:
        """Opens the database, and makes it where it isn't there.

        `wal`: None chooses by the file system. `must_exist`: CorruptStoreError where it isn't there. `only_look`: nothing is
        made, written or waited for. Other errors are sqlite3's, HeldTooLongError and OSError.
        """
        self.folder = folder
        self.file = folder / "cache.db"
        self._name, self._log_name = str(self.file), f"{self.file}-wal"
        self.mode = "wal" if (file_system_of(folder).is_fit if wal is None else wal) else "persist"
        """SQLite's journal mode in force: `wal` or `persist`."""
        self._only_look = only_look
        self._lock = FairLock(folder / "cache.db.lock")  # a name that diskcache's own check knows
        self._writer: sqlite3.Connection | None = None
        self._idle: list[sqlite3.Connection] = []
        self._place = self._log_place = _place_of(self._name)
        let_go_in_children(self)
        if (must_exist or only_look) and not (self._place and self.file.stat().st_size):
            raise CorruptStoreError(f"{self.file} is missing or empty")
        if not only_look:
            folder.mkdir(mode=0o700, exist_ok=True)
            with self._locked():
                self._open(must_exist=must_exist)

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The connection that writes, under the lock: no other connection writes, opens or closes meanwhile."""
        if self._only_look:
            raise StoreError("the journal was opened to look at it only; nothing was written")
        with self._locked():
            writer = self._writer if self._is_in_place() else None
            yield writer or self._reopen()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that only reads, for the calling thread alone."""
        if not self._is_in_place():
            with self._locked():
                self._reopen()
        idle = self._idle
        try:
            connection = idle.pop()
        except IndexError:
            connection = self._another_reader()
        try:
            yield connection
        except BaseException:
            connection.close()  # a statement that wasn't read to its end would keep it at this moment's rows
            raise
        if idle is self._idle:
            idle.append(connection)
        else:  # the others were closed meanwhile
            connection.close()

    def close(self) -> None:
        """Close what is open and not being used; whoever needs a connection opens one again."""
        self._close_readers()
        if self._writer is not None:
            try:
                with self._locked(_PATIENCE_OF_CLOSING_S):
                    self._close_writer()
            except StoreError:  # the folder is gone
                self._close_writer()
            except HeldTooLongError as error:
                # The lock is for the last connection, which checkpoints in closing. Where another process holds it, this one
                # isn't the last.
                if error.pid != os.getpid():
                    self._close_writer()
        self._lock.close()

    @contextlib.contextmanager
    def _locked(self, patience_s: float | None = None) -> Iterator[None]:
        try:
            with self._lock.locked(PATIENCE_S if patience_s is None else patience_s):
                yield
        except FileNotFoundError:
            raise self._gone() from None

    def let_go(self) -> None:
        """In a forked child."""
        _inherited.extend(filter(None, (self._writer, *self._idle)))
        self._writer, self._idle = None, []

    # -- opening and closing the writer, under the lock -------------------------------------------------------------------

    def _open(self, *, must_exist: bool = True) -> sqlite3.Connection:
        if not (self.file.exists() and self._is_made(must_exist=must_exist)):
            self._make()
        sql = self._connected("rw")
        try:
            self.mode = str(sql.execute(f"PRAGMA journal_mode = {self.mode}").fetchone()[0])
            keep_settings(sql, _SETTINGS | {"sqlite_journal_mode": self.mode})
            self._idle.append(self._reader())
        except BaseException:
            sql.close()
            raise
        self._writer, self._place, self._log_place = sql, _place_of(self._name), self._place_of_log()
        return sql

    def _is_made(self, *, must_exist: bool) -> bool:
        with contextlib.closing(self._connected("rw")) as sql:
            if sql.execute(_LAST_MADE).fetchone():
                return True
            if must_exist and not sql.execute("SELECT 1 FROM sqlite_master WHERE name = 'Cache'").fetchone():
                raise CorruptStoreError(f"{self.file} holds no journal")
        return False

    def _make(self) -> None:
        import diskcache  # here, since a store that is there is opened without it

        made = diskcache.Cache.__new__(diskcache.Cache)
        try:
            made.__init__(str(self.folder), timeout=PATIENCE_S, sqlite_journal_mode=self.mode, **_SETTINGS)
        finally:
            made.close()  # the connection that a failing constructor has opened, too

    def _reopen(self) -> sqlite3.Connection:
        self._close_readers()
        self._close_writer()
        return self._open()

    def _close_writer(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    # -- readers -----------------------------------------------------------------------------------------------------------

    def _another_reader(self) -> sqlite3.Connection:
        if self._only_look or self._writer is not None:
            # It neither writes nor checkpoints. Only the first connection of all may have to recover the log (WAL), and
            # where this process has the writer open it isn't the first.
            return self._reader()
        with self._locked():
            return self._reader()

    def _reader(self) -> sqlite3.Connection:
        if self._only_look:
            # Where there is no log, SQLite would make one even for a reader.
            log = self.file.with_name("cache.db-wal")
            at_rest = not (log.exists() and log.stat().st_size) and not self.file.with_name("cache.db-journal").exists()
            sql = self._connected("ro&immutable=1" if at_rest else "ro")
        else:  # in persist mode a reader must be able to roll back what a killed writer left
            sql = self._connected("ro" if self.mode == "wal" else "rw")
        sql.execute("PRAGMA query_only = 1")
        return sql

    def _close_readers(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _connected(self, access: str) -> sqlite3.Connection:
        sql = sqlite3.connect(
            f"{self.file.absolute().as_uri()}?mode={access}",
            uri=True,
            timeout=_PATIENCE_OF_LOOKING_S if self._only_look else PATIENCE_S,
            isolation_level=None,
            check_same_thread=False,  # one thread at a time all the same
        )
        try:
            for name in ("synchronous", "mmap_size", "cache_size"):
                sql.execute(f"PRAGMA {name} = {_SETTINGS['sqlite_' + name]}")
        except BaseException:
            sql.close()
            raise
        return sql

    # -- staying on the same files -----------------------------------------------------------------------------------------

    def _is_in_place(self) -> bool:
        """Are the files those that were opened? StoreError where the database isn't: writing to a deleted file would succeed.

        Where only the log (WAL) isn't, opening again is enough. When user code opens and closes the database's files in this
        process, as copying the folder does, SQLite's locks are gone (https://sqlite.org/howtocorrupt.html, 2.2): another
        process that closes then takes itself for the last one, copies the log into the database, and removes it.
        """
        if _place_of(self._name) != self._place:
            raise self._gone()
        return self._only_look or self._place_of_log() == self._log_place

    def _gone(self) -> StoreError:
        return StoreError(
            f"the store {self.folder.parent} was deleted or replaced while it was open, and what was recorded there is gone "
            "with it; nothing more is written. Put it back, or run the cell again to begin a new one"
        )

    def _place_of_log(self) -> tuple[int, int] | None:
        return _place_of(self._log_name) if self.mode == "wal" else None


def keep_settings(sql: sqlite3.Connection, settings: dict[str, object] | None = None) -> None:
    """Set anew what another program changed of the settings; of those with which diskcache would forget, or of these."""
    for key, value in (settings or {key: _SETTINGS[key] for key in ("eviction_policy", "cull_limit")}).items():
        sql.execute("UPDATE Settings SET value = ? WHERE key = ? AND value IS NOT ?", (value, key, value))


def _place_of(file: str) -> tuple[int, int] | None:
    try:
        found = os.stat(file)  # noqa: PTH116  before each read and commit, so it must be quick
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
