"""What the steps of one execution were given, returned and raised, as the short texts that its view unfolds."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from durable_nb import _usage
from durable_nb._current import StepRequest
from durable_nb._engine.observing import Observation, Raised, Returned
from durable_nb._facts import Snapshot
from durable_nb._preview import last_lines, names_of, preview, preview_call, redacted
from durable_nb._view import Detail, Extra, Source

STEPS = 5000
"""Of a run with more, those that come later unfold to what they print only."""
_LINES, _LINE = 60, 300
"""Of what a step printed, lines and characters each."""
_FRAMES = 12
_TRACEBACK = 6000
_OWN_FOLDER = str(Path(__file__).parents[1]) + os.sep

log = logging.getLogger("durable_nb")


class Details:
    """Texts alone: no value of the user's is kept, and none of their code is called but an exception's `__str__`."""

    def __init__(self, written_by: Callable[[str], list[str]]) -> None:
        """`written_by`: what a step has printed."""
        self._written_by = written_by
        self._arguments: dict[str, str] = {}
        self._results: dict[str, str] = {}
        self._tracebacks: dict[str, str] = {}
        self._prices = _prices()
        self.extras: dict[str, Extra] = {}
        """By path, what models' answers have cost."""

    def begins(self, path: str, request: StepRequest) -> None:
        """A step's body is about to be called."""
        if len(self._arguments) < STEPS and path not in self._arguments:
            self._arguments[path] = _call(request)

    def note(self, observation: Observation) -> None:
        """Something has happened in the run."""
        match observation:
            case Returned(path, request, value, usage):
                self.begins(path, request)
                if len(self._results) < STEPS:
                    self._results[path] = preview(value)
                self._tracebacks.pop(path, None)
                if usage:
                    self.extras[path] = Extra(tokens=_tokens(usage), cost=_cost(usage, self._prices))
            case Raised(path, request, error):
                self.begins(path, request)
                self._tracebacks[path] = _traceback(error)

    def of(self, path: str) -> Detail:
        """Return what there is of a step."""
        log = tuple(last_lines(self._written_by(path), _LINES, _LINE))
        return Detail(self._arguments.get(path, ""), self._results.get(path, ""), log, self._tracebacks.get(path, ""))


class DetailedSource(Source):
    """A run that is executed here, and what its steps were given, gave, and print."""

    def __init__(self, snapshot: Callable[[], Snapshot], details: Details) -> None:
        super().__init__(snapshot)
        self._details = details

    def extras(self) -> Mapping[str, Extra]:
        return self._details.extras

    def detail(self, path: str) -> Detail:
        return self._details.of(path)


def _call(request: StepRequest) -> str:
    if request.described is not None:  # its arguments hold more than counts: a client, a key
        return preview(request.described)
    return preview_call(request.args, request.kwargs, names_of(request.fn))


def _tokens(usage: _usage.Usage) -> int:
    return sum(counts.get(_usage.INPUT, 0) + counts.get(_usage.OUTPUT, 0) for counts in usage.values())


def _cost(usage: _usage.Usage, prices: _usage.Prices) -> str:
    spent = sum(_usage.cost(counts, model, prices) for model, counts in usage.items())
    return "" if math.isnan(spent) else f"${spent:.4f}"


def _prices() -> _usage.Prices:
    """Return what `DURABLE_NB_PRICES` says: JSON, or the file that holds it; empty where it says nothing."""
    text = os.environ.get("DURABLE_NB_PRICES", "").strip()
    if not text:
        return {}
    try:
        found = json.loads(text if text.startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = error
    if _usage.are_prices(found):
        return cast("_usage.Prices", found)
    log.warning("DURABLE_NB_PRICES: write %r, or the name of a file that holds it (%.200s)", '{"gpt-5": [1.25, 10]}', found)
    return {}


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
