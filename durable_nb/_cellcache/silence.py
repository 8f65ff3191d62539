"""Silence while a cell is restored: what imports and constructors show was recorded when the cell ran, and is shown again."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any


class _Silenced:
    """A stream that drops what the restoring thread writes. Whoever keeps it writes to the real one afterwards."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> Any:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def over(self) -> None:
        self._thread = -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Meanwhile nothing that the calling thread prints is seen."""
    before = sys.stdout, sys.stderr
    streams = _Silenced(before[0]), _Silenced(before[1])
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for name, stream, real in zip(("stdout", "stderr"), streams, before, strict=True):
            stream.over()
            if getattr(sys, name) is stream:
                setattr(sys, name, real)
