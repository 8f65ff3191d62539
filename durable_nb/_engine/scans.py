"""Rows by the beginnings of their keys, for a look at many runs at once."""

from __future__ import annotations

from bisect import bisect_left

from durable_nb._journal import Journal

_FEW = 200
_WHOLE = ("timer/", "try/")
"""Kinds of which most rows are wanted when the rows of many runs are."""

Row = tuple[str, bytes]


class Scans:
    """`scan` of a journal as it is now. Asked for often, rows of a kind are all read at once, and found from there."""

    def __init__(self, journal: Journal) -> None:
        self._journal, self._asked = journal, 0
        self._read: dict[str, tuple[list[str], list[Row]]] = {}

    def __call__(self, prefix: str) -> list[Row]:
        self._asked += 1
        kind = prefix[: prefix.index("/") + 1]
        if self._asked <= _FEW or kind not in _WHOLE:
            return self._journal.scan(prefix)
        if kind not in self._read:
            rows = self._journal.scan(kind)
            self._read[kind] = [key for key, _ in rows], rows
        keys, rows = self._read[kind]
        begin = bisect_left(keys, prefix)
        end = begin
        while end < len(keys) and keys[end].startswith(prefix):
            end += 1
        return rows[begin:end]
