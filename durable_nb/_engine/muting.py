"""Saying nothing: what a workflow's code prints and logs while its history is repeated was shown when it happened."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any


class Muting:
    """While `is_on`, what this thread writes to stdout and stderr and to the root logger's handlers goes nowhere."""

    def __init__(self) -> None:
        self.is_on = False
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Stand before the streams and handlers meanwhile; other threads pass through."""
        out, err = sys.stdout, sys.stderr
        mine = _Stream(self, out), _Stream(self, err)
        handlers = [*logging.root.handlers, *([logging.lastResort] if logging.lastResort else [])]
        sys.stdout, sys.stderr = mine
        for handler in handlers:
            handler.addFilter(self._lets_pass)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(self._lets_pass)
            if sys.stdout is mine[0]:  # else the code has redirected it, and puts back what it found
                sys.stdout = out
            if sys.stderr is mine[1]:
                sys.stderr = err

    def swallows(self) -> bool:
        """Is this the thread that says nothing now?"""
        return self.is_on and threading.get_ident() == self._thread

    def _lets_pass(self, _: logging.LogRecord) -> bool:
        return not self.swallows()


class _Stream:
    """A stream that may be muted; everything else is the stream's."""

    def __init__(self, muting: Muting, stream: Any) -> None:
        self._muting, self._stream = muting, stream

    def write(self, text: str) -> int:
        return len(text) if self._muting.swallows() else self._stream.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
