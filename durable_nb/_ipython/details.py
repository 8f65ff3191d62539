"""What the steps of one execution print and how they fail, as the short texts that its view unfolds."""

from __future__ import annotations

import contextlib
import os
import textwrap
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from durable_nb._engine.observing import Observation, Raised, Said
from durable_nb._facts import Snapshot
from durable_nb._preview import last_lines, redacted
from durable_nb._view import Detail, Extra, Source

_STEPS = 5000
"""Of a run in which more have failed, those that come later unfold to their error's message."""
_LINES, _LINE, _WIDTH = 60, 300, 120
"""Of what a step printed, lines and characters each; a model's answer has long ones, which are wrapped."""
_SAYING, _LAST = 200, 60
"""So many steps' words are kept, those of the latest; of them, so many characters are shown in one line."""
_FRAMES = 12
_TRACEBACK = 6000
_OWN_FOLDER = str(Path(__file__).parents[1]) + os.sep


class Details:
    """Texts alone: no value of the user's is kept, and none of their code is called but an exception's `__str__`."""

    def __init__(self, written_by: Callable[[str], list[str]]) -> None:
        """`written_by`: what a step has printed."""
        self._written_by = written_by
        self._tracebacks: dict[str, str] = {}
        self._said: dict[str, str] = {}

    def note(self, observation: Observation) -> None:
        """Something has happened in the run."""
        match observation:
            case Raised(path, error) if len(self._tracebacks) < _STEPS:
                self._tracebacks[path] = _traceback(error)
            case Said(path, text):
                self._said.pop(path, None)
                self._said[path] = text
                if len(self._said) > _SAYING:
                    del self._said[next(iter(self._said))]

    def saying(self) -> dict[str, str]:
        """Return the last words of the steps that have said something of late, by their paths."""
        return {path: redacted(text.rstrip().rpartition("\n")[2])[-_LAST:] for path, text in self._said.items()}

    def of(self, path: str) -> Detail:
        """Return what there is of a step."""
        written = self._written_by(path)
        if path in self._said:
            lines = self._said[path].splitlines()
            written = [*written, *(part for line in lines for part in textwrap.wrap(line, _WIDTH))]
        return Detail(tuple(last_lines(written, _LINES, _LINE)), self._tracebacks.get(path, ""))


class DetailedSource(Source):
    """A run that is executed here, and what its steps print and raise."""

    def __init__(self, snapshot: Callable[[], Snapshot], details: Details, kind: str = "workflow") -> None:
        super().__init__(snapshot, kind)
        self._details = details

    def detail(self, path: str) -> Detail:
        return self._details.of(path)

    def extras(self) -> Mapping[str, Extra]:
        """What a step is saying stands beside its name, while it is at work."""
        return {path: Extra(note=text) for path, text in self._details.saying().items()}


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
