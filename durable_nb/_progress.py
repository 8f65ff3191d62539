"""`progress`, how far a step has come: a bar in the view, and a checkpoint for the next attempt; and `last_progress`."""

from __future__ import annotations

import math
import numbers
from typing import Any

from durable_nb._codec import encode
from durable_nb._current import current_body, current_run
from durable_nb._facts import Progress
from durable_nb._misuse import explained
from durable_nb._records import plain
from durable_nb.errors import UnserializableError

MOST_BYTES = 1 << 24
"""Of a state: it is written anew, whole, with each report that reaches the disk."""


@explained
def progress(done: float, total: float | None = None, note: str = "", **state: Any) -> None:
    """Say how far the step has come, from its body: a plain function's thread, too.

    The view shows a bar and the note, at most four times a second. What was reported last is on disk within a second, and
    `last_progress()` gives it to the next attempt: so a long step whose kernel was killed goes on from there.

    done, total  numbers; `total` None where it isn't known
    state        what the next attempt needs to go on. It is copied now; UnserializableError where it can't be stored

    Outside a run it does nothing, so that the function can be called plainly. LookupError in a cell's or workflow's own code.
    """
    __tracebackhide__ = True
    body = current_body.get()
    if body is None and current_run.get() is None:
        return
    if body is None:
        raise LookupError(
            "durable.progress() belongs in the body of a step: call it inside the function given to durable.run(); of a cell "
            "and a workflow the view shows by itself how far it has come"
        )
    what = f"durable.progress() in step {body.name!r}"
    found = Progress(_number(what, "done", done), None if total is None else _number(what, "total", total), note, state)
    if not isinstance(note, str):
        raise TypeError(f"{what}: note={note!r} is not text")
    form, data = _encoded(what, state) if state else ("", b"")
    if body.heartbeat is not None:
        body.heartbeat.report(found, form, data)


def last_progress() -> Progress | None:
    """What the attempt before this one, in whatever process, has reported last; None at a run's first attempt.

    A step of a cell that has failed for good, or was killed, and is executed again with the same arguments gets it as well,
    until the cell has completed. None outside a run; LookupError in a cell's or workflow's own code.
    """
    __tracebackhide__ = True
    body = current_body.get()
    if body is None and current_run.get() is not None:
        raise LookupError(
            "durable.last_progress() belongs in the body of a step: call it inside the function given to durable.run()"
        )
    return body.heartbeat.last() if body is not None and body.heartbeat is not None else None


def _number(what: str, name: str, value: object) -> float:
    """As Python's own number, whosever it was."""
    __tracebackhide__ = True
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what}: {name}={value!r} is not a number")
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{what}: {name}={value!r}; write a finite number, 0 or more")
    return number


def _encoded(what: str, state: dict[str, Any]) -> tuple[str, bytes]:
    __tracebackhide__ = True
    try:
        form, data = encode(state)
    except Exception as error:
        wrong = next((name for name, value in state.items() if not _can_be_stored(value)), "state")
        raise UnserializableError(
            f"{what}: {wrong}=... is a {type(state.get(wrong, state)).__qualname__} that can't be stored "
            f"({type(error).__name__}: {plain(str(error))}); what was reported before stands. Give plain data: numbers, text, "
            "lists, dicts, arrays"
        ) from error
    if len(data) > MOST_BYTES:
        raise UnserializableError(
            f"{what}: its state has {len(data):,} bytes, and may have {MOST_BYTES:,}, since it is written with each report; "
            "what was reported before stands. Write what is large to a file, and report its name"
        )
    return form, data


def _can_be_stored(value: Any) -> bool:
    try:
        encode(value)
    except Exception:
        return False
    return True
