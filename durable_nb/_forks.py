"""What becomes of a process that a step's body forks: it ends where the body ends."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator


@contextlib.contextmanager
def children_end_here() -> Iterator[None]:
    """A child that was forked in this block ends with the block, and no statement after it is executed in the child.

    What comes after a step's body is the parent's: its loop, its store, its front end's sockets. A child that went on there
    would wait for jobs for ever, or answer in the parent's place. It ends as `multiprocessing`'s children do: status 0, or 1
    and a traceback, or what `sys.exit` was given; no exit handlers.
    """
    parent, error = os.getpid(), None
    try:
        yield
    except BaseException as raised:
        if os.getpid() == parent:
            raise
        error = raised
    if os.getpid() != parent:
        _end(error)


def _end(error: BaseException | None) -> None:
    status = 1
    try:
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            traceback.print_exception(error)
        else:
            status = 0
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(status)
