"""What the basic operations cost: loading the extension, a step, a hit. Run with `make bench` or `python benchmarks/basics.py`.

A step is compared with one raw SQLite commit of the same bytes, in the same journal mode and in the same process, the two
taking turns. Loading and hits are timed inside a real kernel.
"""

from __future__ import annotations

import asyncio
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

from jupyter_client.manager import start_new_kernel

import durable_nb as durable
from durable_nb._engine import Engine
from durable_nb._facts import Status
from durable_nb._store import Store

STEPS = 500

IN_KERNEL = """
import time as _time
_began = _time.perf_counter()
get_ipython().run_line_magic("load_ext", "durable_nb")
print("LOAD", _time.perf_counter() - _began)
"""
CELL = "%%durable small --quiet\nx = {'a': 1, 'b': [1, 2, 3]}\ny = 'text'"


def milliseconds(times: list[float]) -> float:
    """The median."""
    return statistics.median(times) * 1000


async def same(n: int) -> int:
    return n


def same_in_thread(n: int) -> int:
    return n


async def steps(folder: Path) -> None:
    """A sequential step against one raw commit."""
    store = Store(folder / "store")
    engine = Engine(store)
    raw = sqlite3.connect(folder / "raw.db", isolation_level=None)
    raw.execute(f"PRAGMA journal_mode={store.journal.mode}")
    raw.execute("PRAGMA synchronous=2")
    raw.execute("CREATE TABLE row (key TEXT PRIMARY KEY, value BLOB)")
    times: dict[str, list[float]] = {"raw": [], "async": [], "thread": []}

    async def body() -> None:
        for n in range(STEPS):
            began = time.perf_counter()
            raw.execute("INSERT INTO row VALUES (?, ?)", (f"{n:08}", size * b"x"))
            times["raw"].append(time.perf_counter() - began)
            for kind, fn in (("async", same), ("thread", same_in_thread)):
                began = time.perf_counter()
                await durable.run(kind, fn, n)
                times[kind].append(time.perf_counter() - began)

    probe = await engine.begin("probe", "inputs")
    assert probe
    await probe.execute(_one_step())
    await probe.finish(Status.COMPLETED)
    size = max(len(row) for key, row in store.journal.scan("step/"))
    run = await engine.begin("bench", "inputs")
    assert run
    await run.execute(body())
    await run.finish(Status.COMPLETED)
    base = milliseconds(times["raw"])
    print(f"one raw commit of {size} bytes, SQLite {sqlite3.sqlite_version}, {store.journal.mode}, FULL: {base:.2f} ms")
    for kind in ("async", "thread"):
        print(f"one {kind} step: {milliseconds(times[kind]):.2f} ms, {milliseconds(times[kind]) / base:.2f} times that")
    store.close()


async def _one_step() -> None:
    await durable.run("async", same, 0)


def kernel(folder: Path) -> None:
    """%load_ext, the first hit of a fresh kernel, and the hits after it."""
    for _ in range(2):  # the second kernel has the entry and the compiled files
        manager, client = start_new_kernel(cwd=str(folder))
        try:
            printed: list[str] = []

            def hear(message: dict, printed: list[str] = printed) -> None:
                if message["msg_type"] == "stream":
                    printed.append(message["content"]["text"])

            client.execute_interactive(IN_KERNEL, output_hook=hear)
            times = []
            for _ in range(50):
                began = time.perf_counter()
                client.execute_interactive(CELL, output_hook=hear)
                times.append(time.perf_counter() - began)
            empty = []
            for _ in range(50):
                began = time.perf_counter()
                client.execute_interactive("pass", output_hook=hear)
                empty.append(time.perf_counter() - began)
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
    load = float(next(line for line in "".join(printed).splitlines() if line.startswith("LOAD")).split()[1])
    print(f"%load_ext: {load * 1000:.0f} ms")
    print(f"first hit of a fresh kernel, seen by the front end: {times[0] * 1000:.0f} ms")
    print(f"a small hit after it: {milliseconds(times[1:]):.1f} ms, a cell 'pass' beside it {milliseconds(empty):.1f} ms")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(steps(Path(folder)))
        kernel(Path(folder))


if __name__ == "__main__":
    main()
