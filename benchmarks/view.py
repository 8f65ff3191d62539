"""What the live view of a run costs: the kernel's CPU and its messages, over 1,000 steps of 5 ms each.

Run with `make bench` or `python benchmarks/view.py`; DURABLE_NB_BENCH_STEPS=200 is a quick run. A real ipykernel executes the
cell with and without its view (`--quiet`), by turns, and a client stands in for the notebook, which reads every message.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import machine, size
from jupyter_client import KernelManager

STEPS, TURNS = size("STEPS", 1000), size("TURNS", 5)
ALLOWED = 0.05

LOAD = """
%load_ext durable_nb
import asyncio, time
import durable_nb as durable
async def five(n):
    await asyncio.sleep(0.005)
    return n
"""
CELL = """%%durable {name} {options}
began = time.perf_counter(), time.process_time()
for n in range({steps}):
    await durable.run("five", five, n)
print(time.perf_counter() - began[0], time.process_time() - began[1])
"""
FANNED = CELL.replace('"five"', 'f"five {{n}}"')
"""No two of one name: as many rows as steps."""


class Turn:
    """One execution of the cell: its seconds, and the messages of its view."""

    def __init__(self, client: Any, source: str) -> None:
        self.sizes: list[int] = []
        self.times: list[float] = []
        asked, printed = client.execute(source), ""
        while True:
            message = client.get_iopub_msg(timeout=120)
            content, kind = message["content"], message["msg_type"]
            if kind == "error":
                raise SystemExit("\n".join(content["traceback"]))
            if kind.startswith("comm_"):
                self.sizes.append(len(json.dumps(content, ensure_ascii=False).encode()))
                self.times.append(time.perf_counter())
            if message["parent_header"].get("msg_id") != asked:
                continue
            if kind == "stream" and content["name"] == "stdout":
                printed += content["text"]
            if kind == "status" and content["execution_state"] == "idle":
                break
        self.wall_s, self.cpu_s = map(float, printed.split())

    def busiest_second(self) -> int:
        """Return how many messages came within one second, at most."""
        return max((sum(at <= other < at + 1 for other in self.times) for at in self.times), default=0)


def measured(client: Any, cell: str, name: str) -> bool:
    """Print a line; tell whether the view kept what is promised."""
    with_view, without = [], []
    for turn in range(TURNS):
        for turns, options in ((with_view, ""), (without, "--quiet")):
            source = cell.format(name=f"{name}_{turn}{'q' if options else ''}", options=options, steps=STEPS)
            turns.append(Turn(client, source))
    costs = [(shown.cpu_s - plain.cpu_s) / shown.wall_s for shown, plain in zip(with_view, without, strict=True)]
    cost = statistics.median(costs)
    busiest, largest = max(turn.busiest_second() for turn in with_view), max(max(turn.sizes) for turn in with_view)
    wall_s = statistics.median(turn.wall_s for turn in with_view)
    print(
        f"{name:<10} {STEPS:,} steps in {wall_s:.1f} s: the view takes {cost:.1%} of it ({min(costs):.1%} to {max(costs):.1%}),"
        f" at most {busiest} messages in a second and {largest / 1024:.0f} KiB in one"
    )
    return cost <= ALLOWED and busiest <= 12 and largest <= 64 * 1024


def main() -> None:
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel(cwd=folder, env={**os.environ, "JUPYTER_DATA_DIR": str(Path(folder) / "data")})
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        try:
            client.execute_interactive(LOAD, timeout=60, store_history=False, output_hook=lambda _: None)
            kept = [measured(client, cell, name) for name, cell in (("folded", CELL), ("unfolded", FANNED))]
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
    if not all(kept):
        raise SystemExit(f"more than {ALLOWED:.0%} of the run, 12 messages a second or 64 KiB a message")


if __name__ == "__main__":
    main()
