"""One display in the notebook, filled now and updated in place: a run's first line, its view and its end."""

from __future__ import annotations

import sys
from typing import Any

OURS = "durable_nb"
"""Displays whose metadata has this key are the package's own, and no output of the cell."""


def is_terminal() -> bool:
    """Tell whether what is displayed is written to a terminal that may have colours."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    return shell is not None and not hasattr(shell, "kernel") and sys.stdout.isatty()


class Place:
    """Shows nothing before `show` is called. In a plain script, where `display` would print a bundle's repr, it never does."""

    def __init__(self, **mark: str) -> None:
        self.mark = mark
        """Told in the display's metadata: the cell, the state, the run."""
        self._handle: Any = None

    @property
    def is_filled(self) -> bool:
        """Has anything been shown?"""
        return self._handle is not None

    def show(self, data: dict[str, Any], **mark: str) -> None:
        """Show this in place of what was shown before."""
        from IPython.core.getipython import get_ipython
        from IPython.display import display

        if get_ipython() is None:
            return
        self.mark |= mark
        metadata = {OURS: dict(self.mark)}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True, metadata=metadata)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(data, raw=True, metadata=metadata)


def is_live() -> bool:
    """Tell whether a front end listens that could press a button: nbclient and papermill answer no questions."""
    from IPython.core.getipython import get_ipython

    kernel: Any = getattr(get_ipython(), "kernel", None)
    request = (kernel.get_parent("shell") or {}) if kernel is not None else {}
    return bool(request.get("content", {}).get("allow_stdin"))
