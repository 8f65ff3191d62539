"""Which unfinished run of a cell an execution of it may go on with.

Timers, events and approvals belong to a cell's unfinished run. Two notebooks in one folder may each have a cell `wait`, and
neither may end the other's sleep; but a notebook that was renamed, or is executed by another front end, goes on with its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Origin:
    """Which cell of which notebook a run is of, as far as that is known."""

    notebook: str = ""
    """Its file, as seen from the store's folder; '' where the front end doesn't tell, as headless and in a terminal."""
    is_saved: bool = False
    """There was such a file then. A remote front end may name one that was never on this machine."""
    code: str = ""
    """Digest of the cell's code."""
    process: str = ""
    """The process that executed it last."""


def may_adopt(began: Origin, asking: Origin, exists: Callable[[str], bool]) -> bool:
    """May the cell `asking` go on with an unfinished run that nobody executes, and that `began` so?

    `exists`: is there a file of that name now, as seen from the store's folder?
    """
    if asking.process and asking.process == began.process:  # a kernel executes one notebook, whatever is edited in it
        return True
    if began.notebook and began.is_saved and not exists(began.notebook):  # renamed or removed
        return True
    if began.notebook and asking.notebook:
        return began.notebook == asking.notebook
    return began.code == asking.code


def exists_beside(store: Path, notebook: str) -> bool:
    """Is there a file of that name, as an origin has it? The store's folder may be a link: no '..' of it."""
    return Path(os.path.normpath(store / notebook)).exists()
