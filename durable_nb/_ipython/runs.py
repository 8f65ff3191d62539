"""A workflow's run as a cell's last expression: its view, live between cells too."""

from __future__ import annotations

import asyncio

from durable_nb._current import current_run, engine
from durable_nb._view import Place, RunView, Source
from durable_nb._view.place import is_live
from durable_nb._view.state import ENDED
from durable_nb._workflow import Run
from durable_nb.errors import NotSupportedError

_EVERY_S = 0.25
"""Between two looks at a run; what looking costs is bounded by the view."""


def send(action: str, run_id: str, step: str | None = None, comment: str = "") -> None:  # noqa: ARG001
    """Ask for what a button of a view says."""
    if action == "cancel":
        engine().cancel(run_id, comment or "cancelled in the notebook")
    elif action == "retry":
        engine().resume(run_id, take_over=False)
    else:
        raise NotSupportedError(f"{action}: no step of the run {run_id!r} waits for a decision")


def show(run: Run) -> None:
    """Display the run's view, and follow it until it has ended."""
    _Followed(run.id)


_tasks: set[asyncio.Task[None]] = set()
"""The loop holds its tasks by weak references only."""


class _Followed:
    """One display of a run."""

    def __init__(self, run_id: str) -> None:
        self._run_id, self._place = run_id, Place()
        self._source = Source(lambda: engine().snapshot(run_id))
        self._live = is_live()
        self._follow()

    def _follow(self) -> None:
        view = RunView(self._source, live=self._live, place=self._place, send=self._send)
        view.open()
        if not self._live or self._source.snapshot().status in ENDED:
            view.close()
            return
        task = asyncio.get_running_loop().create_task(self._until_ended(view), name=f"durable_nb view of {self._run_id}")
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)

    async def _until_ended(self, view: RunView) -> None:
        current_run.set(None)  # of the cell that displays it
        try:
            while self._source.snapshot().status not in ENDED:
                view.changed()
                await asyncio.sleep(_EVERY_S)
        finally:
            view.close()

    def _send(self, action: str, run_id: str, step: str | None = None, comment: str = "") -> None:
        send(action, run_id, step, comment)
        if action == "retry":
            self._follow()
