"""`durable-nb demo`: the order notebook in a real kernel, killed half-way, then twice in new kernels.

The shop lives in this process, so what it counted survives every kernel. Nothing is guessed by waiting: the first kernel is
killed when the shop holds the step's request, or when the sleep's deadline is in the journal.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from durable_nb._demo.shop import Shop
from durable_nb._demo.verdict import KILLS, STEPS, Evidence, closing, faults, restored_whole, table
from durable_nb._journal.disk import DiskJournal

NOTEBOOK = "01_order.ipynb"
NAP_S = 3.0

_PATIENCE_S = 120.0
_POLL_S = 0.02


class DemoError(Exception):
    """The demo could not be carried through; says nothing about what it set out to prove."""


def demo(kill: str = "sleep") -> int:
    """Run the demo, kill the first kernel at `kill` (a key of KILLS), print what was seen; 0 if the promise was kept."""
    cells = code_cells()
    try:
        with tempfile.TemporaryDirectory(prefix="durable_nb-demo-", ignore_cleanup_errors=True) as folder, Shop() as shop:
            seen = _gather(Stage(Path(folder), shop), cells, kill)
    except DemoError as error:
        _say(f"The demo failed, nothing was proved: {error}")
        return 1
    _say(f"\n{table(seen)}\n")
    if restored_whole(seen):
        _say(f"Kernel 3 restored the whole cell in {seen.third_took_s * 1000:.0f} ms and asked the shop nothing.\n")
    if found := faults(seen):
        _say("The promise was broken:\n" + "\n".join(f"  {fault}" for fault in found))
        return 1
    _say(closing(seen))
    return 0


def code_cells() -> list[str]:
    """The code cells of the notebook that comes with the package."""
    notebook = json.loads(resources.files(__package__).joinpath(NOTEBOOK).read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@dataclass(slots=True)
class Stage:
    """Where it plays: a folder of its own, and the shop."""

    folder: Path
    shop: Shop

    @property
    def env(self) -> dict[str, str]:
        """The kernels' environment: nothing of the user's Jupyter is read or written, nor their store."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("DURABLE_NB_")}
        return {
            **ours,
            "IPYTHONDIR": str(self.folder / "home" / "ipython"),
            "JUPYTER_CONFIG_DIR": str(self.folder / "home" / "config"),
            "JUPYTER_DATA_DIR": str(self.folder / "home" / "jupyter"),
            "ORDER_SERVER": self.shop.url,
            "ORDER_SLEEP": f"{NAP_S:g}s",
        }

    def requests(self) -> Counter[str]:
        """By step, what the shop has received so far."""
        counts = self.shop.counts()
        return Counter({step: counts[path]["received"] for step, path in STEPS.items() if path})

    def bodies(self, pid: int) -> Counter[str]:
        """By step, how often its body noted in the log that it runs in the process `pid`."""
        log = self.folder / "executed.log"
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return Counter(step for step, who in lines if who == str(pid))


@dataclass(slots=True)
class Told:
    """What a durable cell said while it was executed."""

    lines: list[str] = field(default_factory=list)
    took_s: float = 0.0


class Kernel:
    """A real ipykernel process, as JupyterLab would start it."""

    def __init__(self, stage: Stage, number: int) -> None:
        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_client.manager import KernelManager

        # Without folders to look in there is this interpreter's own kernel only, whatever `python3` means to the user.
        self._manager = KernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
            connection_file=str(stage.folder / f"kernel-{number}.json"),
            transport="ipc",  # a TCP port may be taken between being chosen and being bound
            ip=str(stage.folder / f"kernel-{number}"),
        )
        self._number = number
        self._manager.start_kernel(cwd=str(stage.folder), env=stage.env, stderr=subprocess.DEVNULL)
        provisioner: Any = self._manager.provisioner
        self.pid: int = provisioner.process.pid
        self._client = self._manager.client()
        self._client.start_channels()
        try:
            self._client.wait_for_ready(timeout=_PATIENCE_S)
        except RuntimeError as error:
            self.close()
            raise DemoError(f"kernel {number} did not start ({error}); is {sys.executable} able to run ipykernel?") from error

    def run(self, source: str, *, until: Callable[[], bool] | None = None) -> Told:
        """Execute a cell to its end; with `until`, return as soon as that holds, the cell still being executed."""
        told, began = Told(), time.monotonic()
        message_id = self._client.execute(source, allow_stdin=True)  # as a front end: its status line is shown
        while until is None or not until():
            if time.monotonic() - began > _PATIENCE_S:
                raise DemoError(f"kernel {self._number} is still busy after {_PATIENCE_S:.0f} s with\n{source}")
            try:
                message = self._client.get_iopub_msg(timeout=_POLL_S if until else 1)
            except queue.Empty:
                if not self._manager.is_alive():
                    raise DemoError(f"kernel {self._number} died by itself") from None
                continue
            if message["parent_header"].get("msg_id") == message_id and self._take(message, told):
                told.took_s = time.monotonic() - began
                if until is not None:
                    raise DemoError(f"the cell ended before kernel {self._number} could be killed in it")
                break
        return told

    def _take(self, message: dict[str, Any], told: Told) -> bool:
        """Note one message; True for a cell's last one."""
        content = message["content"]
        match message["msg_type"]:
            case "error":
                raise DemoError(f"in kernel {self._number}, a cell raised {content['ename']}: {content['evalue']}")
            case "display_data" | "update_display_data" if "cell" in content["metadata"].get("durable_nb", {}):
                told.lines.append(content["data"]["text/plain"])
                _say(f"  {told.lines[-1]}")
            case "status":
                return bool(content["execution_state"] == "idle")
        return False

    def kill(self) -> None:
        """SIGKILL, as an out-of-memory killer would; it is dead when this returns."""
        os.kill(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + _PATIENCE_S
        while self._manager.is_alive():
            if time.monotonic() > deadline:
                raise DemoError(f"kernel {self._number} survived SIGKILL")
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End the process and release the sockets."""
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


def _gather(stage: Stage, cells: list[str], kill: str) -> Evidence:
    durable = next(i for i, cell in enumerate(cells) if cell.startswith("%%durable"))
    requests, bodies = [stage.requests()], []

    def count(pid: int) -> None:
        requests.append(stage.requests())
        bodies.append(stage.bodies(pid))

    _say("Kernel 1 runs the notebook …")
    first = Kernel(stage, 1)
    try:
        for cell in cells[:durable]:
            first.run(cell)
        timers = _run_and_kill(stage, first, cells[durable], kill)
    finally:
        first.close()
    count(first.pid)
    _say(f"  killed with SIGKILL {KILLS[kill]}")

    _say("Kernel 2, a new process, runs all cells again …")
    second = Kernel(stage, 2)
    try:
        for cell in cells[:durable]:
            second.run(cell)
        began = time.monotonic()
        for cell in cells[durable:]:
            second.run(cell)
    finally:
        second.close()
    count(second.pid)

    _say("Kernel 3, a new process, runs all cells once more …")
    third = Kernel(stage, 3)
    try:
        told = [third.run(cell) for cell in cells][durable]
    finally:
        third.close()
    count(third.pid)

    tallies = stage.shop.counts()
    timers_now = _timers(stage.folder)
    receipt_at, review_at = tallies[STEPS["receipt"]]["answered_at"], tallies[STEPS["review"]]["first_at"]
    return Evidence(
        killed=kill,
        requests=tuple(after - before for before, after in pairwise(requests)),
        bodies=tuple(bodies),
        performed={step: tallies[path]["performed"] for step, path in STEPS.items() if path},
        keys={step: len(tallies[path]["keys"]) for step, path in STEPS.items() if path},
        charged=stage.shop.charged(),
        nap_s=NAP_S,
        paused_s=review_at - receipt_at,
        waited_s=review_at - max(began, receipt_at),
        same_deadline=len(timers_now) == 1 and timers in ({}, timers_now),
        third_line=told.lines[-1] if told.lines else "",
        third_took_s=told.took_s,
    )


def _run_and_kill(stage: Stage, kernel: Kernel, cell: str, kill: str) -> dict[str, bytes]:
    """Execute the cell and kill its kernel in it; the sleep's record so far."""
    if kill != "sleep":
        hold = stage.shop.hold(STEPS[kill])
        try:
            kernel.run(cell, until=hold.reached.is_set)
            kernel.kill()
        finally:
            hold.drop()
        return {}
    timers: dict[str, bytes] = {}

    def sleeping() -> bool:
        if stage.shop.counts()[STEPS["receipt"]]["answered"]:  # the journal is there, and what is missing is the timer
            timers.update(_timers(stage.folder))
        return bool(timers)

    kernel.run(cell, until=sleeping)
    kernel.kill()
    return timers


def _timers(folder: Path) -> dict[str, bytes]:
    """The records of all sleeps, as they lie in the journal."""
    store = folder / ".durable_nb"
    journal = DiskJournal(store / "journal", store / "values")
    try:
        return dict(journal.scan("timer/"))
    finally:
        journal.close()


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  a command line program speaks
