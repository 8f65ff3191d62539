"""What waits in a store that nobody has opened here: what loading the extension says of it.

Only looks, and only where that takes a moment: the journal is opened by the first durable cell.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from durable_nb import _records as rec
from durable_nb._codec import Seal, load_key
from durable_nb._files import is_locked
from durable_nb._records import Lease, RunRecord, unpack
from durable_nb.errors import StoreError

_ROWS = "SELECT key, value FROM Cache WHERE key >= ? AND key < ? AND raw = 1"


def waiting(store: Path) -> list[RunRecord]:
    """The unfinished runs that no live process executes, the newest first; none where that can't be told now."""
    database = store / "journal" / "cache.db"
    found = []
    if database.exists():
        with suppress(sqlite3.Error, StoreError), closing(_opened(database)) as sql:
            seal = Seal(load_key())
            for key, _ in sql.execute(_ROWS, ("open/", "open0")).fetchall():
                run_id = key.split("/", 2)[2]
                rows = dict(sql.execute(_ROWS, (name, name + "\0")).fetchone() or (name, None) for name in _rows_of(run_id))
                record, lease, cancel = (rows[name] for name in _rows_of(run_id))
                if record is None or lease is None or cancel is not None:
                    continue
                run = unpack(seal, rec.run_key(run_id), record, RunRecord)
                owner = unpack(seal, rec.lease_key(run_id), lease, Lease).owner
                if run.status == "running" and not (owner and is_locked(store / "locks" / f"{owner}.lock")):
                    found.append(run)
    return sorted(found, key=lambda run: run.started_at, reverse=True)


def _opened(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=0.1)


def _rows_of(run_id: str) -> tuple[str, str, str]:
    return rec.run_key(run_id), rec.lease_key(run_id), rec.cancel_key(run_id)
