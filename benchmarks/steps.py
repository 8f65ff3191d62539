"""What steps of a workflow cost, one after the other, a thousand at once, and recalled. Run `python benchmarks/steps.py`.

Each figure stands beside raw SQLite in the same journal mode and an append with fdatasync, taken in turns with it.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import durable_nb as durable
from durable_nb import _current
from durable_nb import _records as rec
from durable_nb._engine import Engine
from durable_nb._facts import Status
from durable_nb._store import Store

STEPS = 300
MANY = int(os.environ.get("DURABLE_NB_BENCH_MANY", "100000"))
ROW = 600


def median_us(times: list[float]) -> float:
    return statistics.median(times) * 1e6


async def same(n: int) -> int:
    return n


def same_in_thread(n: int) -> int:
    return n


class Raw:
    """The floor: one row a commit in SQLite, and one append with fdatasync."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.sql = sqlite3.connect(folder / "raw.db", isolation_level=None)
        self.sql.execute(f"PRAGMA journal_mode={mode}")
        self.sql.execute("PRAGMA synchronous=2")
        self.sql.execute("CREATE TABLE row (key TEXT PRIMARY KEY, value BLOB)")
        self._file = os.open(folder / "raw.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.sql_times: list[float] = []
        self.append_times: list[float] = []

    def take_turn(self) -> None:
        began = time.perf_counter()
        self.sql.execute("INSERT INTO row VALUES (?, ?)", (f"{time.perf_counter_ns():020}", ROW * b"x"))
        self.sql_times.append(time.perf_counter() - began)
        began = time.perf_counter()
        os.write(self._file, ROW * b"x")
        os.fdatasync(self._file)
        self.append_times.append(time.perf_counter() - began)

    def beside(self, us: float) -> str:
        sql, append = median_us(self.sql_times), median_us(self.append_times)
        return f"{us:.0f} us = {us / sql:.2f} x raw SQLite ({sql:.0f}) = {us / append:.2f} x append+fdatasync ({append:.0f})"


@durable.workflow
async def one_by_one(kind: str) -> None:
    """The raw commits in between are no steps: they take turns."""
    fn = same if kind == "async" else same_in_thread
    for n in range(STEPS):
        bench.raw.take_turn()
        began = time.perf_counter()
        await durable.run(kind, fn, n)
        bench.times[kind].append(time.perf_counter() - began)


@durable.workflow
async def all_at_once(count: int) -> None:
    await asyncio.gather(*(durable.run("same", same, n) for n in range(count)))


@durable.workflow
async def many(count: int) -> None:
    """In groups of a thousand; the time of each group is kept."""
    for start in range(0, count, 1000):
        began = time.perf_counter()
        await asyncio.gather(*(durable.run("same", same, n) for n in range(start, start + 1000)))
        bench.groups.append(time.perf_counter() - began)


class Bench:
    raw: Raw
    times: dict[str, list[float]]
    groups: list[float]


bench = Bench()


def counted(store: Store) -> Callable[[], int]:
    """How many commits of the journal there have been since."""
    apply, calls = store.journal.apply, []

    def counting(commits):
        calls.append(len(commits))
        return apply(commits)

    store.journal.apply = counting  # type: ignore[method-assign]
    return lambda: len(calls)


async def workflows(folder: Path) -> None:
    durable.open(folder / "store")
    engine: Engine = _current.engine()._engine  # type: ignore[attr-defined]
    store = engine.store
    bench.raw = Raw(folder, store.journal.mode)
    print(f"SQLite {sqlite3.sqlite_version}, journal mode {store.journal.mode}, FULL; medians of {STEPS}")
    bench.times = {"async": [], "thread": []}
    for kind in bench.times:
        await one_by_one.start(kind)
        times = bench.times[kind]
        print(f"one {kind} step: {bench.raw.beside(median_us(times))}")
        print(f"  the first 30: {median_us(times[:30]):.0f} us, the last 30: {median_us(times[-30:]):.0f} us")
    commits = counted(store)
    began = time.perf_counter()
    await all_at_once.start(1000)
    took = time.perf_counter() - began
    print(f"1,000 at once: {took * 1000:.0f} ms, {took * 1000:.0f} us a step, {commits()} commits in all")
    bench.groups = []
    await many.start(MANY, id="many")
    groups = [f"{median_us(bench.groups[i:][:5]) / 1000:.0f}" for i in (0, len(bench.groups) // 2, -5)]
    print(f"a step of a group of 1,000, as a run of {MANY:,} grows (begin, middle, end): {' '.join(groups)} us")
    found = engine.read_run("many")
    assert found
    scope = found[0].scope
    bulk, decoded = read_all(store, scope)
    bench.groups = []
    began = time.perf_counter()
    run = durable.get_run("many")
    await replay(engine, run.id)
    took = time.perf_counter() - began
    print(
        f"replay of {MANY:,} steps by place: {took:.2f} s; one SELECT of them {bulk:.2f} s, with decoding {decoded:.2f} s: "
        f"{took / decoded:.1f} x"
    )


async def replay(engine: Engine, run_id: str) -> None:
    """Execute a completed run's code once more, from its records."""
    found = engine.read_run(run_id)
    assert found
    record, lease = found
    from dataclasses import replace

    from durable_nb._workflowrun import WorkflowRun

    record = replace(record, status=Status.RUNNING.value, ended_at=None)
    held = await engine.claim(record, lease)
    assert held
    run = WorkflowRun(engine, record, held, resumed=True)
    await run.load()
    await run.drive(many.fn)


def read_all(store: Store, scope: str) -> tuple[float, float]:
    """Seconds of one SELECT, and of that with unsealing and decoding each record."""
    began = time.perf_counter()
    rows = store.journal.scan(rec.step_prefix(scope, 0))
    selected = time.perf_counter() - began
    for key, row in rows:
        rec.unpack(store.seal, key, row, rec.Outcome)
    assert len(rows) == MANY
    return selected, time.perf_counter() - began


async def cells(folder: Path) -> None:
    """The same replay in a cell, whose steps are identified by content."""
    store = Store(folder / "cells")
    engine = Engine(store)

    async def body() -> None:
        for start in range(0, MANY, 1000):
            await asyncio.gather(*(durable.run("same", same, n) for n in range(start, start + 1000)))

    for what in ("recorded", "replayed"):
        began = time.perf_counter()
        run = await engine.begin("bench", "inputs")
        assert run
        await run.execute(body())
        await run.finish(Status.INTERRUPTED if what == "recorded" else Status.COMPLETED)
        print(f"{MANY:,} steps of a cell {what} by content: {time.perf_counter() - began:.2f} s")
    store.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(workflows(Path(folder)))
        asyncio.run(cells(Path(folder)))


if __name__ == "__main__":
    main()
