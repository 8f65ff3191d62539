"""What the steps of one execution print and how they fail, as the short texts that its view unfolds."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from durable_nb._engine.observing import Observation, Raised
from durable_nb._facts import Snapshot
from durable_nb._preview import last_lines, redacted
from durable_nb._view import Detail, Source

_STEPS = 5000
"""Of a run in which more have failed, those that come later unfold to their error's message."""
_LINES, _LINE = 60, 300
"""Of what a step printed, lines and characters each."""
_FRAMES = 12
_TRACEBACK = 6000
_OWN_FOLDER = str(Path(__file__).parents[1]) + os.sep


class Details:
    """Texts alone: no value of the user's is kept, and none of their code is called but an exception's `__str__`."""

    def __init__(self, written_by: Callable[[str], list[str]]) -> None:
        """`written_by`: what a step has printed."""
        self._written_by = written_by
        self._tracebacks: dict[str, str] = {}

    def note(self, observation: Observation) -> None:
        """Something has happened in the run."""
        match observation:
            case Raised(path, error) if len(self._tracebacks) < _STEPS:
                self._tracebacks[path] = _traceback(error)

    def of(self, path: str) -> Detail:
        """Return what there is of a step."""
        return Detail(tuple(last_lines(self._written_by(path), _LINES, _LINE)), self._tracebacks.get(path, ""))


class DetailedSource(Source):
    """A run that is executed here, and what its steps print and raise."""

    def __init__(self, snapshot: Callable[[], Snapshot], details: Details, kind: str = "workflow") -> None:
        super().__init__(snapshot, kind)
        self._details = details

    def detail(self, path: str) -> Detail:
        return self._details.of(path)


def _traceback(error: BaseException) -> str:
    """Return an error as Python writes it, with the user's frames only, and without what looks like a credential."""
    text = type(error).__name__
    with contextlib.suppress(Exception):  # its own `__str__` may fail: then its type is what is known
        found: Any = traceback.TracebackException.from_exception(error, limit=-_FRAMES, compact=True)
        waiting, seen = [found], set()
        while waiting:
            one = waiting.pop()
            if one is None or id(one) in seen:
                continue
            seen.add(id(one))
            one.stack = traceback.StackSummary.from_list(
                frame for frame in one.stack if not frame.filename.startswith(_OWN_FOLDER)
            )
            waiting += [one.__cause__, one.__context__]
        text = "".join(found.format())
    return redacted(text[-_TRACEBACK:])
