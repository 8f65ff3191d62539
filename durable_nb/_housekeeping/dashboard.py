"""`durable.dashboard()`: the open store as the source of a dashboard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from durable_nb._current import engine, refuse_in_workflow, workflow_functions
from durable_nb._engine.workflows import Workflows
from durable_nb._facts import Status
from durable_nb._housekeeping.inventory import Inventory
from durable_nb._outside import decide
from durable_nb._view.actions import RESUMABLE
from durable_nb._view.actions import actions_of as asked_of
from durable_nb._view.dashboard import Action, Dashboard
from durable_nb._view.place import is_live
from durable_nb.errors import DurableError, NotSupportedError, StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from durable_nb._facts import Step
    from durable_nb._view.dashboard import Source
    from durable_nb._view.listing import Page, Query, RunFacts

_BY = "by the dashboard"


def dashboard() -> Dashboard:
    """The cells and runs of the store in use, with filters and buttons: shown live in a notebook, as a table elsewhere.

    Display it, as a cell's last expression does, or print it. It shows what other kernels and programs execute, too.
    """
    refuse_in_workflow("durable.dashboard()")
    return dashboard_of(engine())


def dashboard_of(engine: Any, query: Query | None = None) -> Dashboard:
    """The same of that engine; NotSupportedError where it has no store."""
    if not isinstance(engine, Workflows):
        raise NotSupportedError("durable.dashboard() shows a store; the engine in use keeps its runs elsewhere")
    return Dashboard(source_of(engine), query, live=is_live)


def source_of(workflows: Workflows) -> Source:
    """Where a dashboard of that store looks, and whom its buttons tell."""
    return _Store(workflows)


class _Store:
    """The source of a dashboard: one store, whichever is in use later."""

    def __init__(self, workflows: Workflows) -> None:
        self._workflows = workflows
        self.path = str(workflows.engine.store.path)

    def page(self, query: Query) -> Page:
        store = self._workflows.engine.store
        if not store.is_in_place():  # who looks makes no new one
            raise StoreError(f"the store {store.path} was deleted or replaced; display the dashboard again")
        return self._inventory().page(query)

    def steps(self, run_id: str) -> Sequence[Step]:
        return self._workflows.snapshot(run_id).steps

    def actions(self, run: RunFacts) -> list[Action]:
        return actions_of(run)

    def send(self, action: str, run_id: str, step: str = "", comment: str = "") -> str:
        run = self._inventory().run(run_id)
        if action in ("approve", "reject"):
            approved = action == "approve"
            decide(run.id, step, approved=approved, comment=comment, at=lambda: self._workflows)
            return f"{step.removesuffix('#1')} of {run.id} is {'approved' if approved else 'rejected'}"
        offered = {known.name: known for known in actions_of(run)}
        if action not in offered:
            raise DurableError(f"there is no such action for it as it stands ({run.status}); nothing was done")
        if offered[action].refusal:
            raise DurableError(f"{offered[action].refusal}; nothing was done")
        if action == "cancel":
            self._workflows.cancel(run.id, _BY)
            return f"{run.id} is being cancelled; its completed steps are kept"
        if action == "restart":
            self._workflows.restart(run.id)
            return f"{run.id} begins anew; what was recorded of it is discarded"
        self._workflows.resume(run.id, take_over=False)
        return f"{run.id} goes on from its last completed step"

    def _inventory(self) -> Inventory:
        return Inventory(self._workflows.engine)


def actions_of(run: RunFacts) -> list[Action]:
    """What may be asked of a run as it stands. A cell's goes on when its cell is executed, which no button here does."""
    status = Status(run.status)
    reasons = asked_of(status, run.kind)
    found = []
    if run.kind == "workflow" and status in RESUMABLE:
        missing = "" if run.name in workflow_functions else f"its workflow {run.name!r} is not defined in this kernel"
        found += [Action("retry", "Retry", missing), Action("restart", "Restart", missing)]
    if not reasons.cancel:
        found.append(Action("cancel", "Cancel"))
    return found
