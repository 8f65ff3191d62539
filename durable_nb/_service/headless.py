"""`durable-nb run NOTEBOOK`: executes a notebook to its end, however long that takes and however often it is cut off.

A process of its own executes it (`notebook`). Where it comes to a long wait that process ends, kernel and all; this one waits,
with little memory, and starts it again when the time has come or what it waits for is there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path
from typing import Any

from durable_nb._clock import RECHECK_S, parse_duration
from durable_nb._engine import WATCH_S, Engine
from durable_nb._engine.workflows import Workflows
from durable_nb._facts import Status
from durable_nb._records import Notification
from durable_nb._store import Store
from durable_nb.errors import DurableError, RunNotFoundError, StoreError

MAX_WAIT = "10s"
SUSPENDED = 75
"""The exit status that means: not now, try again (EX_TEMPFAIL)."""
_DEATHS = 3
"""So often a kernel that died is started again, if it has recorded nothing new meanwhile."""
_MARGIN_S = 5.0

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be executed."""

    notebook: Path
    out: Path
    parameters: dict[str, Any]
    max_wait: str = MAX_WAIT

    def check(self) -> None:
        """ValueError where it makes no sense."""
        parse_duration(self.max_wait)
        if not self.notebook.is_file():
            raise ValueError(f"no notebook {str(self.notebook)!r}; nothing was run")
        if not self.out.absolute().parent.is_dir():
            raise ValueError(f"no folder for {str(self.out)!r}; nothing was run")
        for name in self.parameters:
            if not name.isidentifier() or iskeyword(name):
                raise ValueError(f"-p {name}: that is no name of a variable; nothing was run")
        try:
            cells = json.loads(self.notebook.read_bytes())["cells"]
        except (ValueError, LookupError, TypeError, RecursionError):
            cells = None
        if not isinstance(cells, list):
            raise ValueError(f"{str(self.notebook)!r} is no notebook; nothing was run")  # noqa: TRY004  as the others


@dataclass(frozen=True, slots=True)
class Wait:
    """A step that keeps the notebook from going on."""

    run: str
    step: str
    kind: str
    """`sleep`, `event`, `approval` or `retry`."""
    until: float | None
    event: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        until = datetime.fromtimestamp(self.until).astimezone().isoformat(timespec="seconds") if self.until else None
        return {"run": self.run, "kind": self.kind, "step": self.step, "until": until} | (
            {"event": self.event} if self.event else {}
        )


def run(order: Order, *, once: bool, say: Say) -> tuple[int, dict[str, Any]]:
    """Execute the notebook; the exit status, and what is told of it as JSON. `once`: end at a long wait instead of waiting."""
    if find_spec("nbclient") is None:
        raise DurableError("nbclient is not installed: pip install 'durable-nb[run]'")
    deaths, last = 0, None
    while True:
        result = _executed(order, quiet=say is _nothing)
        match result["status"]:
            case "completed":
                return 0, {"status": "completed", "output": str(order.out)}
            case "failed":
                return 1, {**result, "output": str(order.out)}
            case "suspended":
                deaths = 0
                with _opened(Path(result["store"])) as workflows:
                    waits = [wait for run_id in result["runs"] for wait in _waits(workflows, run_id)]
                    if cell := result["suspended"]:  # what its code asked for before it was edited may wait still
                        waits += [wait for wait in _waits(workflows, cell["run"]) if wait.step in cell["steps"]]
                    if once:
                        return SUSPENDED, _suspended(waits)
                    if waits:  # else it was over in this moment
                        say(f"parked: {_listed(waits)}")
                        _park(workflows, waits, since_s=time.time() - _MARGIN_S)
                say("goes on")
            case died:
                deaths = deaths + 1 if result == last or last is None else 1
                last = result
                if deaths > _DEATHS:
                    return 1, {"status": died, "error": f"{result['error']}, {deaths} times", "output": str(order.out)}
                say(f"{result['error']}; it is started again")


def value_of(text: str) -> Any:
    """A parameter's value: as papermill reads it, a number, True, False, None, else the text."""
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            found = kind(text)
            return found if math.isfinite(found) else text
    return text


def _nothing(_: str) -> None:
    """Says nothing."""


quietly: Say = _nothing


def _executed(order: Order, *, quiet: bool) -> dict[str, Any]:
    """One execution, in a process of its own; how it ended. Ctrl-C and SIGTERM end that as well."""
    reading, writing = os.pipe()
    told = {
        "notebook": str(order.notebook.absolute()),
        "out": str(order.out.absolute()),
        "parameters": order.parameters,
        "max_wait": order.max_wait,
        "waits_s": parse_duration(order.max_wait).total_seconds(),
        "result": writing,
    }
    process = subprocess.Popen(  # noqa: S603  this interpreter, and our own module
        [sys.executable, "-m", "durable_nb._service.notebook", json.dumps(told)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL if quiet else None,
        pass_fds=[writing],
    )
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            text = pipe.read()
        code = process.wait()
    except BaseException:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        raise
    finally:
        if process.stdin is not None:
            process.stdin.close()
    if text:
        found: dict[str, Any] = json.loads(text)
        return found
    return {"status": "died", "error": f"the process that executes the notebook ended with status {code}"}


# -- parked -----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Any:
    store = Store(path)
    try:
        yield Workflows(Engine(store))
    finally:
        store.close()


def _waits(workflows: Workflows, run_id: str) -> list[Wait]:
    """What an unfinished run waits for."""
    record, _ = workflows.catalog.find(run_id)
    open_waits = {
        wait.path: wait for kind in ("event", "decision") for wait in workflows.catalog.waits(record, kind) if wait.is_open
    }
    found = []
    for step in workflows.snapshot(run_id).steps:
        wait = open_waits.get(step.path)
        if wait is not None:
            kind = "event" if step.kind == "event" else "approval"
            found.append(Wait(record.id, step.path, kind, wait.until_s, wait.timer.of if kind == "event" else ""))
        elif step.status in (Status.SLEEPING, Status.RETRYING):
            kind = "sleep" if step.status is Status.SLEEPING else "retry"
            found.append(Wait(record.id, step.path, kind, step.wake_at))
    return found


def _park(workflows: Workflows, waits: list[Wait], *, since_s: float) -> None:
    """Return when one of the waits may be over."""
    until_s = min((wait.until for wait in waits if wait.until is not None), default=0.0)
    runs, events = {wait.run for wait in waits}, {wait.event for wait in waits if wait.event}
    while (left_s := until_s - time.time()) > 0:
        with contextlib.suppress(StoreError):  # looked at again
            if _has_news(workflows, runs, events, since_s):
                return
        time.sleep(min(left_s, WATCH_S, RECHECK_S))


def _has_news(workflows: Workflows, runs: set[str], events: set[str], since_s: float) -> bool:
    """Was something sent to one of the runs, or has another process brought one to its end?"""
    inbox = workflows.engine.ownership.inbox
    if any(inbox.of(run_id) for run_id in runs):
        return True
    sent = (one.message for one in inbox.events(events)) if events else ()
    if any(isinstance(message, Notification) and message.sent_at >= since_s for message in sent):
        return True
    try:
        return any(workflows.catalog.find(run_id)[0].status != Status.RUNNING for run_id in runs)
    except RunNotFoundError:  # deleted
        return True


def _suspended(waits: list[Wait]) -> dict[str, Any]:
    """What `--once` tells. The time to come back is when a sleep or a retry is over; nobody knows when an event comes."""
    due = min((wait.until for wait in waits if wait.kind in ("sleep", "retry") and wait.until is not None), default=None)
    wake_at = datetime.fromtimestamp(due).astimezone().isoformat(timespec="seconds") if due is not None else None
    return {"status": "suspended", "wake_at": wake_at, "waits_for": [wait.facts for wait in waits]}


def _listed(waits: list[Wait]) -> str:
    texts = []
    for wait in waits[:5]:
        until = f" until {datetime.fromtimestamp(wait.until).astimezone():%a %d %b %H:%M:%S}" if wait.until else ""
        what = f"event {wait.event!r}" if wait.event else wait.kind
        texts.append(f"{wait.step} ({what}{until})")
    return "waits for " + ", ".join(texts)
