"""Errors as if the cell had run plainly: tracebacks without the package's own frames."""

from __future__ import annotations

import contextlib
import os
import types
from pathlib import Path
from typing import Any

from durable_nb.errors import RunSuspended

_OWN_FOLDER = str(Path(__file__).parents[1]) + os.sep


def users_traceback(error: BaseException) -> None:
    """Take the package's own frames out of an exception's tracebacks, and of those it came from."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        exception = waiting.pop()
        if exception is None or id(exception) in seen:
            continue
        seen.add(id(exception))
        frames = []
        trace = exception.__traceback__
        while trace is not None:
            if not trace.tb_frame.f_code.co_filename.startswith(_OWN_FOLDER):
                frames.append(trace)
            trace = trace.tb_next
        kept: types.TracebackType | None = None
        for frame in reversed(frames):
            kept = types.TracebackType(kept, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
        exception.__traceback__ = kept
        waiting += [exception.__cause__, exception.__context__]
        if isinstance(exception, BaseExceptionGroup):
            waiting += exception.exceptions


def show_users_lines(shell: Any, error: BaseException) -> None:
    """Make IPython show an error as if the cell had run plainly."""
    users_traceback(error)
    # An interrupt of the user's is told in a line; a KeyboardInterrupt that the cell's own code raises has lines to show.
    told = isinstance(error, RunSuspended) or (isinstance(error, KeyboardInterrupt) and error.__traceback__ is None)
    shown = [f"{type(error).__name__}: {error}"] if told else None
    trace = error.__traceback__

    # IPython reads the traceback after it has gone through the frames of the magic, so it is rendered from here.
    def render() -> list[str]:
        return shown or shell.InteractiveTB.structured_traceback(type(error), error, trace, tb_offset=0)

    with contextlib.suppress(AttributeError):  # an exception class with __slots__: its traceback shows more than it should
        error._render_traceback_ = render  # type: ignore[attr-defined]
