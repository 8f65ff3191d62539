"""A workflow's run as a cell's last expression: its view, live between cells too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from durable_nb._current import current_run, engine
from durable_nb._engine.observing import Notice, Observation, Observers, log
from durable_nb._engine.workflows import Workflows
from durable_nb._ipython.details import DetailedSource, Details
from durable_nb._outside import decide
from durable_nb._view import Place, RunView
from durable_nb._view.actions import place_of
from durable_nb._view.place import is_live
from durable_nb._view.state import ENDED
from durable_nb._workflow import Run
from durable_nb.errors import NotSupportedError

_EVERY_S = 0.25
"""Between two looks at a run; what looking costs is bounded by the view."""
_SOON_S, _SOON = 0.05, 20
"""The same, so often, before it has begun: its steps' values are told only to those who have subscribed."""
_ELSEWHERE_S = 1.0
"""The same where another process executes it: looking reads its records."""


def send(action: str, run_id: str, step: str | None = None, comment: str = "") -> None:
    """Ask for what a button of a view says. `step`: the path of what is decided."""
    if action in ("approve", "reject"):
        found = next((one for one in engine().snapshot(run_id).steps if one.path == step), None)
        place = place_of(found) if found is not None else step or ""
        decide(run_id, place, approved=action == "approve", comment=comment)
    elif action == "cancel":
        engine().cancel(run_id, comment or "cancelled in the notebook")
    elif action == "retry":
        engine().resume(run_id, take_over=False)
    elif action == "restart":
        engine().restart(run_id)
    else:
        raise NotSupportedError(f"{action!r}: there is no such action; nothing was done")


def show(run: Run) -> None:
    """Display the run's view, and follow it until it has ended."""
    _Followed(run.id)


_tasks: set[asyncio.Task[None]] = set()
"""The loop holds its tasks by weak references only."""


class _Followed:
    """One display of a run."""

    def __init__(self, run_id: str) -> None:
        self._run_id, self._place = run_id, Place()
        self._details = Details(lambda _: [])
        self._source = DetailedSource(lambda: engine().snapshot(run_id), self._details)
        self._live = is_live()
        self._follow()

    def _follow(self) -> None:
        self._view = view = RunView(self._source, live=self._live, place=self._place, send=self._send)
        view.open()
        if not self._live or self._source.snapshot().status in ENDED:
            view.close()
            return
        task = asyncio.get_running_loop().create_task(self._until_ended(view), name=f"durable_nb view of {self._run_id}")
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)

    async def _until_ended(self, view: RunView) -> None:
        current_run.set(None)  # of the cell that displays it
        observers: Observers | None = None
        looks = 0
        unsubscribe: Callable[[], None] = lambda: None  # noqa: E731
        try:
            while self._source.snapshot().status not in ENDED:
                if observers is None and (observers := _observers_of(self._run_id)) is not None:
                    unsubscribe = observers.subscribe(self._note)
                view.changed()
                looks += 1
                await asyncio.sleep(_EVERY_S if observers is not None else _SOON_S if looks < _SOON else _ELSEWHERE_S)
        finally:
            unsubscribe()
            view.close()

    def _note(self, observation: Observation) -> None:
        if isinstance(observation, Notice):  # who looks at a run takes its notices from nobody
            log.warning(observation.text)
        self._details.note(observation)

    def _send(self, action: str, run_id: str, step: str | None = None, comment: str = "") -> None:
        send(action, run_id, step, comment)
        if not self._view.is_open:
            self._follow()


def _observers_of(run_id: str) -> Observers | None:
    """Return where a run that this process executes can be subscribed to."""
    workflows = engine()
    return workflows.observers_of(run_id) if isinstance(workflows, Workflows) else None
