"""What `%durable` does about a run. Each call says in one line what comes of it."""

from __future__ import annotations

from durable_nb._current import workflow_functions
from durable_nb._engine.workflows import Workflows
from durable_nb._facts import FINISHED, Status
from durable_nb._housekeeping.inventory import Inventory
from durable_nb._view.listing import RunFacts
from durable_nb.errors import DurableError


class Acts:
    """Of the runs of a store. A run is named by its id, or by its workflow: the last one of it.

    DurableError, and nothing was done, for a cell's run, and for one that stands otherwise.
    """

    def __init__(self, workflows: Workflows) -> None:
        self._workflows = workflows
        self._inventory = Inventory(workflows.engine)

    def resume(self, said: str) -> str:
        """Resume one run."""
        run = self._run(said, "run the cell again to resume it")
        if run.status == Status.COMPLETED:
            return f"{run.id} · is completed; nothing to do"
        self._workflows.resume(run.id, take_over=False)
        if run.status not in (Status.INTERRUPTED, Status.FAILED, Status.CANCELLED):
            return f"{run.id} · is {run.status}{self._executor(run)}; nothing to do"
        return f"{run.id} · {self._executed(run, 'resumes')}"

    def resume_all(self) -> list[str]:
        """Resume every interrupted run; a line for each."""
        waiting = [run for run in self._inventory.runs() if run.kind != "cell" and run.status == Status.INTERRUPTED]
        return [
            self.resume(run.id)
            if run.name in workflow_functions
            else f"{run.id} · waits: its workflow {run.name!r} is not defined here. Run the cell that defines it"
            for run in waiting
        ]

    def restart(self, said: str) -> str:
        """Begin a run anew."""
        run = self._run(said, "run the cell with --rerun to begin it anew")
        where = self._executor(run)
        self._workflows.restart(run.id)
        return f"{run.id} · {f'begins anew{where}' if where else self._executed(run, 'begins anew')}"

    def fork(self, said: str, at: str) -> str:
        """Begin a new run that keeps what this one did before a step."""
        run = self._run(said, "edit the cell and run it again")
        new = self._workflows.fork(run.id, at)
        return f"{new} · {self._executed(run, f'begins at {at}')}, a fork of {run.id}"

    def cancel(self, said: str, reason: str) -> str:
        """Cancel a run."""
        run = self._run(said, f"interrupt the kernel to stop it, or '%durable forget {said}' to drop what it kept")
        if run.status in FINISHED:
            return f"{run.id} · is {run.status} already"
        where = self._executor(run)
        self._workflows.cancel(run.id, reason)
        return f"{run.id} · is {f'being cancelled{where}' if where else 'cancelled'}; its completed steps are kept"

    def delete(self, said: str) -> str:
        """Remove a finished run."""
        run = self._run(said, f"'%durable forget {said}' forgets it")
        self._workflows.delete(run.id)
        return f"{run.id} · is deleted, and its values with it"

    def _run(self, said: str, instead: str) -> RunFacts:
        run = self._inventory.find_run(said)
        if run.kind == "cell":
            raise DurableError(f"{run.id} is a run of the cell {run.name!r}: {instead}; nothing was done")
        return run

    def _executor(self, run: RunFacts) -> str:
        return self._workflows.catalog.executor(self._workflows.catalog.find(run.id)[1])

    def _executed(self, run: RunFacts, what: str) -> str:
        """What happens to a run that nobody executes."""
        if run.name in workflow_functions:
            return f"{what} ({run.name})"
        return f"{what} in a process that defines its workflow {run.name!r}; until one lives, no process is running this"
