"""What others want of a run: messages in its inbox. Buttons, command lines and other processes are senders, and nothing more.

A sender inserts the next row `inbox/RUN/SEQ`; whoever executes the run hears of it within half a second, and its row goes in
the commit that records its delivery. What is sent while nobody executes the run waits there.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass

from durable_nb import _records as rec
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Message, pack, unpack
from durable_nb._store import Store
from durable_nb.errors import StoreError


@dataclass(frozen=True, slots=True)
class Received:
    """A message that is in an inbox."""

    key: str
    row: bytes
    """Tells it from another one that had the same key, before or after."""
    message: Message


class Inbox:
    """Of all runs of a store. May be used by any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def send(self, run_id: str, run_row: bytes, message: Message) -> bool:
        """Put a message on disk. False, and nothing is written, where the run's record is not `run_row` any more."""
        while True:
            keys = [key for key, _ in self._store.journal.sizes(rec.inbox_prefix(run_id))]
            key = rec.inbox_key(run_id, max((int(key.rpartition("/")[2]) for key in keys), default=0) + 1)
            row = key, pack(self._store.signer, key, message)
            guard = rec.run_key(run_id), run_row  # of a run that has ended nobody would take it out again
            verdict = self._store.writer.commit_and_wait(Commit(guard, inserts=(row,)))
            if verdict is not Verdict.EXISTS:  # else another sender was faster
                return verdict is Verdict.APPLIED

    def of(self, run_id: str) -> list[Received]:
        """What is in one run's inbox, in the order in which it was sent."""
        return self._read(rec.inbox_prefix(run_id)).get(run_id, [])

    def all(self) -> dict[str, list[Received]]:
        """The same of every run that has something in its inbox: one scan."""
        return self._read(rec.inbox_prefix(""))

    def _read(self, prefix: str) -> dict[str, list[Received]]:
        found: defaultdict[str, list[Received]] = defaultdict(list)
        for key, row in sorted(self._store.journal.scan(prefix)):
            with contextlib.suppress(StoreError):  # one that can't be read is told of by `doctor`, and stops no other
                found[rec.run_of_inbox(key)].append(Received(key, row, unpack(self._store.signer, key, row, Message)))
        return found
