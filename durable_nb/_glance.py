"""What waits in a store that nobody has opened here: what loading the extension says of it.

Only looks, and only where that takes a moment: the journal is opened by the first durable cell.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from durable_nb import _records as rec
from durable_nb._codec import Seal, load_key
from durable_nb._journal.disk import DiskJournal
from durable_nb._locks import is_locked
from durable_nb._records import Lease, RunRecord, unpack
from durable_nb.errors import StoreError


def waiting(store: Path) -> list[RunRecord]:
    """The unfinished runs that no live process executes, the newest first; none where that can't be told now."""
    found = []
    with suppress(StoreError):
        journal = DiskJournal(store / "journal", store / "values", only_look=True)
        try:
            seal = Seal(load_key())
            ids = [key.split("/", 2)[2] for key, _ in journal.sizes("open/")]
            rows = journal.get_many([key for run_id in ids for key in _rows_of(run_id)])
            for run_id in ids:
                record, lease, cancel = (rows.get(key) for key in _rows_of(run_id))
                if record is None or lease is None or cancel is not None:
                    continue
                try:
                    run = unpack(seal, rec.run_key(run_id), record, RunRecord)
                    owner = unpack(seal, rec.lease_key(run_id), lease, Lease).owner
                except StoreError:
                    continue
                if run.status == "running" and not (owner and is_locked(store / "locks" / f"{owner}.lock")):
                    found.append(run)
        finally:
            journal.close()
    return sorted(found, key=lambda run: run.started_at, reverse=True)


def _rows_of(run_id: str) -> tuple[str, str, str]:
    return rec.run_key(run_id), rec.lease_key(run_id), rec.cancel_key(run_id)
