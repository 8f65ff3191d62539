"""`input()` in a durable cell is a durable question: its answer is recorded as a step's result is."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from durable_nb._current import current_body, current_run
from durable_nb._engine.cell_run import CellRun

_asks: list[Callable[[Any], str]] = []
"""How the front end is asked, by each cell that is executed; the last one counts."""


def ask(prompt: object = "", /) -> str:
    """Stands for `input` while a durable cell is executed. A step's body asks as ever: it is recorded as a whole."""
    run = current_run.get()
    if isinstance(run, CellRun) and current_body.get() is None:
        return run.answer(str(prompt), lambda: _asks[-1](prompt))
    return _asks[-1](prompt)


@contextlib.contextmanager
def durable_questions() -> Iterator[None]:
    """While entered, `input()` asks durable questions."""
    before = builtins.input
    if before is ask:  # of another durable cell, which is executed at the same time
        yield
        return
    _asks.append(before)
    builtins.input = ask
    try:
        yield
    finally:
        if builtins.input is ask:  # ipykernel puts its own in its place with each cell
            builtins.input = before
        _asks.remove(before)
