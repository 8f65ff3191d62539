"""What may be asked of a run as it stands: one answer for the view of a run and for the dashboard. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from durable_nb._facts import Status, Step

RESUMABLE = frozenset({Status.FAILED, Status.CANCELLED, Status.INTERRUPTED})
OF_A_CELL = "run the cell with --rerun"
NO_APPROVALS = "nobody waits for a decision"


@dataclass(frozen=True, slots=True)
class Actions:
    """Why each can't be asked for now; '' where it can."""

    cancel: str = ""
    retry: str = ""
    """Go on with the run where it stopped."""
    restart: str = ""
    """Begin it anew, without its outcomes."""
    approve: str = ""


def waits_for_decision(step: Step) -> bool:
    """Can it be approved or rejected now? Also where nobody executes its run: the decision waits for it, then."""
    return step.kind == "decision" and step.ended_at is None and step.status in (Status.WAITING, Status.INTERRUPTED)


def place_of(step: Step) -> str:
    """Return the step's path as decisions take it: without a number, its name may mean any that bear it."""
    return f"{step.path}#1" if step.path.endswith(step.name) else step.path


def actions_of(status: Status, kind: str = "workflow") -> Actions:
    """Return what may be asked of a run of that `kind`, a `workflow`'s or a `cell`'s. What decisions it waits for is not
    known here."""  # fmt: skip
    ended = f"the run is {status.value}"
    anew = "" if kind == "workflow" else OF_A_CELL
    if status is Status.COMPLETED:
        return Actions(ended, ended, anew, ended)
    if status in RESUMABLE:
        return Actions("" if status is Status.INTERRUPTED else ended, "", anew, ended)
    return Actions("", "the run has not ended", anew or "the run has not ended", NO_APPROVALS)
