"""Which tokens restoring has saved, by run: counted in memory, and written down when a run ends or a cell was restored.

A row holds what one process has counted for one run. Nobody waits for it to be written: what a killed process had restored in
its last moments may be missing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from durable_nb import _records as rec
from durable_nb import _usage
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Saved, pack, unpack
from durable_nb.errors import StoreError

if TYPE_CHECKING:
    from durable_nb._store import Store
    from durable_nb._usage import Usage

_log = logging.getLogger("durable_nb")


class Savings:
    """Of one store, as far as this process has seen it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._counted: dict[str, Usage] = {}
        self._unwritten: set[str] = set()

    def add(self, run_id: str, usage: Usage) -> None:
        """That much was not asked for again in this run."""
        if usage:
            _usage.add(self._counted.setdefault(run_id, {}), usage)
            self._unwritten.add(run_id)

    def write(self) -> None:
        """Hand over what was counted; nobody waits for it. Needs a running loop."""
        if not self._unwritten:
            return
        runs, self._unwritten = self._unwritten, set()
        keys = {run_id: rec.saved_key(run_id, self._store.process.id) for run_id in runs}
        rows = tuple((key, pack(self._store.signer, key, Saved(self._counted[run_id]))) for run_id, key in keys.items())
        self._store.writer.commit(Commit(puts=rows)).add_done_callback(_told)

    def all(self) -> Iterator[tuple[str, Usage]]:
        """What was written, and what this process has counted since: (run, usage). What can't be read is left out."""
        own = {rec.saved_key(run_id, self._store.process.id): (run_id, usage) for run_id, usage in self._counted.items()}
        yield from own.values()
        for key, row in self._store.journal.scan(rec.saved_prefix("")):
            if key not in own:
                try:
                    yield rec.run_of_saved(key), unpack(self._store.signer, key, row, Saved).usage
                except StoreError as error:
                    _log.warning("what restoring saved is not known in full: %s", error)


def _told(commit: asyncio.Future[Verdict]) -> None:
    if not commit.cancelled() and (error := commit.exception()) is not None:
        _log.warning("what restoring saved could not be written: %s", error)
