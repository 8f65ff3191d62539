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
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from durable_nb._demo.shop import Shop
from durable_nb._demo.verdict import KILLS, STEPS, Evidence, closing, faults, table
from durable_nb._journal.disk import DiskJournal

NAP_S = 3.0
_PATIENCE_S = 120.0
_POLL_S = 0.02


class DemoError(Exception):
    """The demo could not be carried through; says nothing about what it set out to prove."""


def demo(kill: str = "sleep") -> int:
    """Run the demo, kill the first kernel at `kill` (a key of KILLS), print what was seen; 0 if the promise was kept."""
    try:
        with tempfile.TemporaryDirectory(prefix="durable_nb-demo-", ignore_cleanup_errors=True) as folder, Shop() as shop:
            seen, took_s = _gather(Path(folder), shop, kill)
    except (DemoError, RuntimeError) as error:  # jupyter_client says so where a kernel doesn't start
        _say(f"The demo failed, nothing was proved: {error}")
        return 1
    _say(f"\n{table(seen)}\n")
    if found := faults(seen):
        _say("The promise was broken:\n" + "\n".join(f"  {fault}" for fault in found))
        return 1
    _say(f"Kernel 3 restored the whole cell in {took_s * 1000:.0f} ms and asked the shop nothing.\n\n{closing(kill)}")
    return 0


def _gather(folder: Path, shop: Shop, kill: str) -> tuple[Evidence, float]:
    """What was seen, and how long the third kernel took to restore the cell."""
    notebook = json.loads(resources.files(__package__).joinpath("01_order.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    durable = next(i for i, cell in enumerate(cells) if cell.startswith("%%durable"))
    requests = [_requests(shop)]

    _say("Kernel 1 runs the notebook …")
    with _kernel(folder, shop) as first:
        for cell in cells[:durable]:
            first.run(cell)
        deadline = _run_and_kill(folder, shop, first, cells[durable], kill)
    requests.append(_requests(shop))
    _say(f"  killed with SIGKILL {KILLS[kill]}\nKernel 2, a new process, runs all cells again …")
    with _kernel(folder, shop) as second:
        for cell in cells[:durable]:
            second.run(cell)
        began = time.monotonic()
        for cell in cells[durable:]:
            second.run(cell)
    requests.append(_requests(shop))
    _say("Kernel 3, a new process, runs all cells once more …")
    with _kernel(folder, shop) as third:
        line, took_s = [third.run(cell) for cell in cells][durable]
    requests.append(_requests(shop))

    tallies, deadlines = shop.counts(), _deadlines(folder)
    receipt_at, review_at = tallies[STEPS["receipt"]]["answered_at"], tallies[STEPS["review"]]["first_at"]
    seen = Evidence(
        killed=kill,
        requests=tuple(after - before for before, after in pairwise(requests)),
        performed={step: tallies[path]["performed"] for step, path in STEPS.items() if path},
        keys={step: len(tallies[path]["keys"]) for step, path in STEPS.items() if path},
        charged=shop.charged(),
        nap_s=NAP_S,
        paused_s=review_at - receipt_at,
        waited_s=review_at - max(began, receipt_at),
        same_deadline=len(deadlines) == 1 and deadline in ({}, deadlines),
        third_line=line,
    )
    return seen, took_s


def _run_and_kill(folder: Path, shop: Shop, kernel: _Kernel, cell: str, kill: str) -> dict[str, bytes]:
    """Execute the cell and kill its kernel in it; the sleep's record so far."""
    if kill != "sleep":
        with shop.hold(STEPS[kill]) as reached:
            kernel.run(cell, until=reached.is_set)
            kernel.kill()
        return {}
    # Before the receipt is answered there may be no journal to look into.
    kernel.run(cell, until=lambda: bool(shop.counts()[STEPS["receipt"]]["answered"] and _deadlines(folder)))
    kernel.kill()
    return _deadlines(folder)


def _requests(shop: Shop) -> Counter[str]:
    """By step, what the shop has received so far."""
    counts = shop.counts()
    return Counter({step: counts[path]["received"] for step, path in STEPS.items() if path})


def _deadlines(folder: Path) -> dict[str, bytes]:
    """The records of all sleeps, as they lie in the journal."""
    store = folder / ".durable_nb"
    journal = DiskJournal(store / "journal", store / "values")
    try:
        return dict(journal.scan("timer/"))
    finally:
        journal.close()


@contextmanager
def _kernel(folder: Path, shop: Shop) -> Iterator[_Kernel]:
    """A new ipykernel process in that folder. Nothing of the user's Jupyter is read or written, nor their store."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import KernelManager

    number = sum(path.name.startswith("kernel-") for path in folder.iterdir())
    # Without folders to look in there is this interpreter's own kernel only, whatever `python3` means to the user.
    manager = KernelManager(
        kernel_name="python3",
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
        connection_file=str(folder / f"kernel-{number}.json"),
        transport="ipc",  # a TCP port may be taken between being chosen and being bound
        ip=str(folder / f"kernel-{number}"),
    )
    ours = {name: value for name, value in os.environ.items() if not name.startswith("DURABLE_NB_")}
    homes = {name: str(folder / "home" / name) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    order = {"ORDER_SERVER": shop.url, "ORDER_SLEEP": f"{NAP_S:g}s"}
    manager.start_kernel(cwd=str(folder), env={**ours, **homes, **order}, stderr=subprocess.DEVNULL)
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=_PATIENCE_S)
        yield _Kernel(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


class _Kernel:
    """A real ipykernel process, as JupyterLab would start it."""

    def __init__(self, manager: Any, client: Any) -> None:
        self._manager, self._client = manager, client

    def run(self, source: str, *, until: Callable[[], bool] | None = None) -> tuple[str, float]:
        """Execute a cell to its end: its last status line, and how long it took. With `until`, return as soon as that holds,
        the cell still being executed."""  # fmt: skip
        line, began = "", time.monotonic()
        message_id = self._client.execute(source, allow_stdin=True)  # as a front end: its status line is shown
        while until is None or not until():
            if time.monotonic() - began > _PATIENCE_S:
                raise DemoError(f"a kernel is still busy after {_PATIENCE_S:.0f} s with\n{source}")
            try:
                message = self._client.get_iopub_msg(timeout=_POLL_S if until else 1)
            except queue.Empty:
                if not self._manager.is_alive():
                    raise DemoError("a kernel died by itself") from None
                continue
            content, kind = message["content"], message["msg_type"]
            if message["parent_header"].get("msg_id") != message_id:
                continue
            if kind == "error":
                raise DemoError(f"a cell raised {content['ename']}: {content['evalue']}")
            if kind.endswith("display_data") and "cell" in content["metadata"].get("durable_nb", {}):
                line = content["data"]["text/plain"]
                _say(f"  {line}")
            if kind == "status" and content["execution_state"] == "idle":
                if until is not None:
                    raise DemoError("the cell ended before the kernel could be killed in it")
                break
        return line, time.monotonic() - began

    def kill(self) -> None:
        """SIGKILL, as an out-of-memory killer would; it is dead when this returns."""
        os.kill(self._manager.provisioner.process.pid, signal.SIGKILL)
        self._manager.provisioner.process.wait(_PATIENCE_S)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  a command line program speaks
