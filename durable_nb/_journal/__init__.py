"""The journal: rows of bytes under text keys, changed by one primitive, the guarded commit.

Implementations know nothing of runs and steps. `disk` survives a kill and a power cut, on connections from `database` and with
large values in `blobs`; `memory` is its twin for tests; `writer` is the one thread that calls `apply`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Commit:
    """Changes that become durable together, or not at all."""

    guard: tuple[str, bytes | None] | None = None
    """Apply only while this row holds exactly these bytes (None: while there is no such row)."""
    inserts: tuple[tuple[str, bytes], ...] = ()
    """Rows that must be new: if one exists, nothing is applied. This is what keeps an outcome from ever changing."""
    puts: tuple[tuple[str, bytes], ...] = ()
    """Rows written over whatever is there."""
    deletes: tuple[str, ...] = ()
    sweeps: tuple[str, Callable[[str, bytes], bool]] | None = None
    """Of the rows whose keys begin so, those go of which the function says so: whatever other processes have written before
    this commit is among them."""
    follows: str | None = None
    """Apply only while there is a row of this key: of commits handed over one by one, none lands without the former."""


class Verdict(Enum):
    """What became of a commit."""

    APPLIED = "applied"
    GUARD_FAILED = "guard failed"
    EXISTS = "exists"
    MISSING = "missing"


class Journal(Protocol):
    """Durable rows. Every method may be called from any thread; none knows asyncio."""

    @property
    def mode(self) -> str:
        """How rows are made durable: SQLite's journal mode, or `memory`."""
        ...

    def apply(self, commits: Sequence[Commit]) -> list[Verdict]:
        """Apply each commit that may be applied, in order; all are on disk when this returns.

        StoreError where the disk refuses; then none of them is applied.
        """
        ...

    def get(self, key: str) -> bytes | None:
        """One row."""
        ...

    def scan(self, prefix: str) -> list[tuple[str, bytes]]:
        """All rows whose key begins with `prefix`, in key order."""
        ...

    def get_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Those of the rows that there are, all as they were at one moment."""
        ...

    def sizes(self, prefix: str = "") -> list[tuple[str, int]]:
        """Keys that begin with `prefix`, in order, and the bytes of each row."""
        ...

    def first(self, prefix: str, after: str = "") -> str | None:
        """The first key that begins with `prefix` and comes after that one."""
        ...

    def problems(self) -> list[str]:
        """What is wrong with the journal as a whole, a line each; empty where it is sound."""
        ...

    def caveats(self) -> list[str]:
        """What its users should know of the journal though nothing is wrong with it, a line each."""
        ...

    def put_blob(self, data: bytes) -> str:
        """Keep a large value; its digest, by which `get_blob` finds it. On disk and fsynced when this returns."""
        ...

    def get_blob(self, digest: str) -> bytes:
        """What `put_blob` was given; CorruptStoreError where it is gone or altered."""
        ...

    def drop_blobs(self, before: float, needed: Callable[[str], bool]) -> int:
        """Remove large values that were put before that unix time and that no row needs; how many bytes that was."""
        ...

    def close(self) -> None:
        """Release the files. What is asked after that opens them again."""
        ...
