"""A journal that ends with the process: the disk journal's twin for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from durable_nb._journal import Commit, Verdict
from durable_nb._journal.blobs import blob_digest
from durable_nb.errors import CorruptStoreError


class MemoryJournal:
    """Rows in a dict."""

    mode = "memory"

    def __init__(self) -> None:
        self.rows: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self._put_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def apply(self, commits: Sequence[Commit]) -> list[Verdict]:
        with self._lock:
            return [self._apply(commit) for commit in commits]

    def _apply(self, commit: Commit) -> Verdict:
        if commit.guard is not None and self.rows.get(commit.guard[0]) != commit.guard[1]:
            return Verdict.GUARD_FAILED
        if commit.follows is not None and commit.follows not in self.rows:
            return Verdict.MISSING
        if any(key in self.rows for key, _ in commit.inserts):
            return Verdict.EXISTS
        self.rows.update(commit.inserts)
        self.rows.update(commit.puts)
        swept: list[str] = []
        if commit.sweeps is not None:
            prefix, goes = commit.sweeps
            swept = [key for key, row in self.rows.items() if key.startswith(prefix) and goes(key, row)]
        for key in (*commit.deletes, *swept):
            self.rows.pop(key, None)
        return Verdict.APPLIED

    def get(self, key: str) -> bytes | None:
        return self.rows.get(key)

    def scan(self, prefix: str) -> list[tuple[str, bytes]]:
        with self._lock:
            return sorted((k, v) for k, v in self.rows.items() if k.startswith(prefix))

    def get_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        with self._lock:
            return {key: self.rows[key] for key in keys if key in self.rows}

    def sizes(self, prefix: str = "") -> list[tuple[str, int]]:
        return [(key, len(value)) for key, value in self.scan(prefix)]

    def first(self, prefix: str, after: str = "") -> str | None:
        with self._lock:
            return min((key for key in self.rows if key.startswith(prefix) and key > after), default=None)

    def problems(self) -> list[str]:
        return []

    def caveats(self) -> list[str]:
        return []

    def drop_blobs(self, before: float, needed: Callable[[str], bool]) -> int:
        with self._lock:
            dropped = [d for d in self.blobs if self._put_at[d] < before and not needed(d)]
            return sum(len(self.blobs.pop(digest)) for digest in dropped)

    def put_blob(self, data: bytes) -> str:
        digest = blob_digest(data)
        with self._lock:
            self.blobs[digest], self._put_at[digest] = data, time.time()
        return digest

    def get_blob(self, digest: str) -> bytes:
        if digest not in self.blobs:
            raise CorruptStoreError(f"the large value {digest} is gone from the store")
        return self.blobs[digest]

    def close(self) -> None:
        """Nothing to release."""
