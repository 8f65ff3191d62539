"""Connections, cursors and rows of sqlite3 as values: how one stands, and how another is brought to stand the same.

A database in memory is nowhere else, so its content goes along. Of one in a file only the connection is meant.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from pathlib import Path
from typing import Any, NamedTuple

SEEN_BY_NOBODY = frozenset(
    "create_function create_aggregate create_collation create_window_function set_authorizer set_progress_handler "
    "set_trace_callback enable_load_extension load_extension setlimit setconfig".split()
)
"""Methods that give a connection what nobody can ask it for."""
PRAGMAS = (
    "automatic_index busy_timeout cache_size cell_size_check checkpoint_fullfsync defer_foreign_keys foreign_keys fullfsync "
    "hard_heap_limit ignore_check_constraints journal_size_limit legacy_alter_table locking_mode mmap_size query_only "
    "read_uncommitted recursive_triggers reverse_unordered_selects secure_delete soft_heap_limit synchronous temp_store "
    "threads trusted_schema wal_autocheckpoint writable_schema"
).split()
"""Settings of a connection, as far as it tells of them."""
_COUNTED = 1_000_000
"""So many changes a connection is made to count, in less than a second."""


class Standing(NamedTuple):
    """How a connection stands."""

    row_factory: Any
    text_factory: Any
    isolation_level: str | None
    changes: int
    last: int
    """The row that was inserted last."""
    pragmas: dict[str, Any]
    content: bytes | None
    """Of a database in memory, as a file; None of one that is a file."""


class UntoldError(Exception):
    """What a connection or cursor holds that can't be made again, in words."""


def is_closed(con: Any) -> bool:
    try:
        con.total_changes  # noqa: B018  a closed one refuses
    except sqlite3.ProgrammingError as error:
        return "closed" in str(error)
    return False


def rows(con: Any, query: str) -> list[tuple[Any, ...]]:
    """Tuples, whatever the connection makes of rows."""
    return sqlite3.Cursor(con).execute(query).fetchall()


def databases(con: Any) -> list[tuple[str, str]]:
    """Name and file of each, '' in memory. SQLite makes the one for temporary tables when it is first asked for."""
    found = [(name, file if Path(file).is_absolute() else "") for _, name, file in rows(con, "PRAGMA database_list")]
    return [each for each in found if each[0] != "temp" or rows(con, "SELECT 1 FROM temp.sqlite_master LIMIT 1")]


def content(con: Any, name: str = "main") -> bytes:
    """A database as a file; empty where it is empty."""
    return con.serialize(name=name) if rows(con, f"PRAGMA {name}.page_count")[0][0] else b""  # older ones can't serialise that


def standing(con: Any) -> Standing | None:
    """None of a closed connection. UntoldError where it holds more than that."""
    if is_closed(con):
        return None
    if con.in_transaction:
        raise UntoldError("an open transaction")
    known = databases(con)
    if len(known) != 1:
        raise UntoldError("temporary tables" if known[-1][0] == "temp" else "an attached database")
    if con.total_changes > _COUNTED:
        raise UntoldError("a count of many changes")
    row_factory, text_factory, level, changes, last, pragmas = looks(con)
    whole = None if known[0][1] else content(con)
    return Standing(row_factory, text_factory, level, changes, last, pragmas, whole)


def looks(con: Any) -> tuple[Any, ...]:
    """What a connection is, but for its databases; nothing of a closed one."""
    if is_closed(con):
        return ()
    last = rows(con, "SELECT last_insert_rowid()")[0][0]
    pragmas = {name: found for name in PRAGMAS if (found := _asked(con, name)) is not None}
    return con.row_factory, con.text_factory, con.isolation_level, con.total_changes, last, pragmas


def _asked(con: Any, pragma: str) -> Any:
    """None where it isn't told, as where another process has locked the file."""
    with contextlib.suppress(sqlite3.Error):
        return next(iter(rows(con, f"PRAGMA {pragma}")), (None,))[0]
    return None


def bring(con: Any, wanted: Standing | None, *, counts: bool = True) -> None:
    """Make a connection stand as `standing` said; what it counts, if `counts`."""
    if wanted is None:
        con.close()
        return
    if con.in_transaction:
        con.rollback()  # what it holds is exchanged
    if wanted.content is not None and wanted.content != content(con):
        _exchange(con, wanted.content)
    for name, value in wanted.pragmas.items():
        if _asked(con, name) not in (None, value):
            rows(con, f"PRAGMA {name} = {value}")
    if counts:
        _count(con, wanted.changes, wanted.last)
    con.row_factory, con.text_factory = wanted.row_factory, wanted.text_factory
    if con.isolation_level != wanted.isolation_level:
        con.isolation_level = wanted.isolation_level


def _exchange(con: Any, new: bytes) -> None:
    """By a copy: what a connection itself reads from bytes gets the name of a file."""
    with contextlib.closing(sqlite3.connect(":memory:")) as other:
        if new:
            other.deserialize(new)
        other.backup(con)


def _count(con: Any, changes: int, last: int) -> None:
    """By rows of tables that are gone again: they count, and are nowhere on disk."""
    more = changes - con.total_changes
    if more > 0:
        numbers = f"WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < {more}) SELECT i FROM n"
        con.executescript(
            "BEGIN; CREATE TEMP TABLE durable_nb_more (i); CREATE TEMP TABLE durable_nb_last (i);"
            + (f"INSERT INTO durable_nb_more {numbers};" if more > 1 else "")
            + f"INSERT INTO durable_nb_last (rowid) VALUES ({last});"
            "DROP TABLE durable_nb_more; DROP TABLE durable_nb_last; COMMIT"
        )


def is_reading(con: Any) -> bool:
    """Is a cursor of it in the middle of its rows? A function can't be exchanged then."""
    try:
        con.create_function("durable_nb_asks", 0, int)
        con.create_function("durable_nb_asks", 0, None)
    except sqlite3.OperationalError:
        return True
    return False


# -- cursors and rows --------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """How a cursor stands that is in the middle of nothing."""

    columns: tuple[str, ...] | None
    """Of what it selected last."""
    rowcount: int
    lastrowid: int | None
    arraysize: int
    row_factory: Any


def place(cursor: Any) -> Place:
    """UntoldError where rows are left."""
    columns = None if cursor.description is None else tuple(column[0] for column in cursor.description)
    if columns is not None and (cursor.rowcount != -1 or is_reading(cursor.connection)):
        raise UntoldError("rows")
    return Place(columns, cursor.rowcount, cursor.lastrowid, cursor.arraysize, cursor.row_factory)


def bring_cursor(cursor: Any, wanted: Place) -> None:
    """Make a cursor stand as `place` said. What this counts on its connection, the connection has to be brought back from."""
    cursor.arraysize = wanted.arraysize
    cursor.row_factory = wanted.row_factory
    if (wanted.rowcount, wanted.lastrowid) != (cursor.rowcount, cursor.lastrowid):
        _bring_counts(cursor, wanted)
    if wanted.columns is not None:
        cursor.execute("SELECT {} WHERE 0".format(", ".join(f"NULL AS {_quoted(name)}" for name in wanted.columns)))


def _bring_counts(cursor: Any, wanted: Place) -> None:
    con, nothing = cursor.connection, "DROP TABLE IF EXISTS temp.durable_nb_none"
    was_open = con.in_transaction
    rows(con, "CREATE TEMP TABLE durable_nb_cursor (i)")
    if wanted.lastrowid not in (None, cursor.lastrowid):
        is_last = rows(con, "SELECT last_insert_rowid()")[0][0] == wanted.lastrowid
        cursor.execute(nothing if is_last else f"INSERT INTO durable_nb_cursor (rowid) VALUES ({wanted.lastrowid})")
    if wanted.rowcount > 0 and wanted.rowcount != cursor.rowcount:
        cursor.executemany("INSERT INTO durable_nb_cursor (i) VALUES (?)", ((i,) for i in range(wanted.rowcount)))
    elif wanted.rowcount == 0:
        cursor.execute("DELETE FROM durable_nb_cursor WHERE 0")
    rows(con, "DROP TABLE durable_nb_cursor")
    if wanted.rowcount == -1 and cursor.rowcount != -1:
        cursor.execute(nothing)
    if not was_open:
        con.commit()


def _quoted(name: str) -> str:
    return '"{}"'.format(name.replace('"', '""'))


def cursor_again(kind: Any, con: Any, wanted: Place) -> Any:
    """A new cursor that stands as `place` said."""
    made = kind(con)
    bring_cursor(made, wanted)
    return made


def _row(kind: Any, columns: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    with contextlib.closing(sqlite3.connect(":memory:")) as con:
        cursor = con.cursor()
        bring_cursor(cursor, Place(columns, -1, None, 1, None))
        return kind(cursor, values)


def reduction_of(obj: Any) -> Any:
    """Of a cursor or row; None of anything else."""
    if isinstance(obj, sqlite3.Cursor):
        return cursor_again, (type(obj), obj.connection, place(obj))
    if isinstance(obj, sqlite3.Row):
        return _row, (type(obj), tuple(obj.keys()), tuple(obj))
    return None


def is_connection(obj: Any) -> bool:
    """Without importing sqlite3 for it."""
    return "sqlite3" in sys.modules and isinstance(obj, sqlite3.Connection)
