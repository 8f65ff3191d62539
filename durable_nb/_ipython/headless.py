"""What `durable-nb run` asks the kernel that executes its notebook: who waits, and for what."""

from __future__ import annotations

import json
import sys
import time
from math import inf
from typing import Any

from IPython.core.getipython import get_ipython

from durable_nb._facts import Snapshot, Status
from durable_nb._ipython.extension import keys_of
from durable_nb.errors import RunSuspended

_SOON_S = 10.0


def standing(*, resume: bool) -> str:
    """As JSON: the store's folder, what the cell waits for that was suspended last, and the runs of workflows that this kernel
    executes. `resume`: before, go on with those that this notebook has started and that nobody executes."""  # fmt: skip
    extension = getattr(get_ipython(), "_durable_extension", None)
    if extension is None:
        return json.dumps({"store": None, "suspended": None, "runs": [], "idle": True})
    session = extension.session
    runs, busy = list[str](), False
    if keys_of(session, "open/"):
        workflows: Any = session.workflows()
        if resume:
            workflows.resume_own()
        runs = workflows.executed()
        busy = any(_is_busy(workflows.snapshot(run_id)) for run_id in runs)
    last = getattr(sys, "last_value", None)
    suspended = {"run": last.run_id, "steps": last.steps} if isinstance(last, RunSuspended) else None
    return json.dumps({"store": str(session.path), "suspended": suspended, "runs": runs, "idle": not busy})


def _is_busy(run: Snapshot) -> bool:
    """Does it do something, or is it about to within seconds?"""
    wakes = [step.wake_at for step in run.steps if step.wake_at is not None]
    return (
        run.status not in (Status.SLEEPING, Status.WAITING, Status.RETRYING) or min(wakes, default=inf) < time.time() + _SOON_S
    )
