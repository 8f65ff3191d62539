"""What steps cost: one after the other, a thousand at once, recalled, and as their number grows.

Run with `make bench` or `python benchmarks/steps.py`; DURABLE_NB_BENCH_STEPS=100 DURABLE_NB_BENCH_MANY=2000 is a quick run.
Steps of a cell run in a real IPython shell in this process, and in a real kernel with a front end and a view. Beside them
stand one raw SQLite commit of the same bytes in the same journal mode, an append with fdatasync, DBOS with its system
database on SQLite, and joblib.Memory, which doesn't wait for the disk. All take turns; whose turn it is executes one step
that isn't counted first, as a loop does, so that the processor's caches hold its code and not another's.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import queue
import random
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import Floor, Notebook, Times, machine, missing, size
from jupyter_client.manager import start_new_kernel

import durable_nb as durable
from durable_nb import _codec
from durable_nb import _records as rec
from durable_nb._journal import Commit
from durable_nb._journal.disk import DiskJournal

STEPS = size("STEPS", 300)
AT_ONCE = size("AT_ONCE", 1000)
MANY = size("MANY", 100_000)
RUNS = size("RUNS", 10_000)
REPLAYS = size("REPLAYS", 3)
PEERS_MANY = min(MANY, size("PEERS_MANY", 1000))
AT_EACH_LEVEL = 50
BRANCHES = 1000
PROCESSES = 4

NOTEBOOK = """
import durable_nb as durable

async def same(n):
    return n

def same_in_thread(n):
    return n
"""
PROBE = "%%durable probe --quiet\nfor n in range(3):\n    await durable.run('async', same, n)"
ONE_BY_ONE = """%%durable one_by_one --quiet
number = 0
while await mine.turn():
    number += 1
    await durable.run("warm", same, number)
    with mine.times["async"].taken():
        await durable.run("async", same, number)
    with mine.times["thread"].taken():
        await durable.run("thread", same_in_thread, number)
"""
IN_KERNEL = (
    f"""import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from tempfile import mkdtemp
from bench import Floor, Times
floor, times = Floor(Path(mkdtemp()), {{key_size}}, {{row_size}}), {{{{"async": Times(), "thread": Times()}}}}
%load_ext durable_nb""",
    NOTEBOOK,
    f"""%%durable in_kernel
for number in range({STEPS + 10}):
    floor.take_turn()
    with times["async"].taken():
        await durable.run("async", same, number)
    with times["thread"].taken():
        await durable.run("thread", same_in_thread, number)""",
    "print(json.dumps([[found.wall[10:], found.cpu[10:]] for found in (floor.commit, *times.values())]))",
)
GROW = """%%durable grow --quiet
await grow(same)
"""


async def same(n: int) -> int:
    return n


def same_in_thread(n: int) -> int:
    return n


async def ends_some_time(n: int) -> int:
    await asyncio.sleep(random.random())
    return n


class Player:
    """Executes its steps each time it is its turn, wherever its code runs: in a cell, in a workflow, in a thread."""

    def __init__(self, *kinds: str) -> None:
        self.times = {kind: Times() for kind in kinds}
        self._go: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[None] = queue.SimpleQueue()

    def wait_for_turn(self) -> bool:
        self._ready.put(None)
        return self._go.get()

    async def turn(self) -> bool:
        return await asyncio.to_thread(self.wait_for_turn)

    async def play(self, go: bool = True) -> None:
        """Have the player take its turn (or end), and wait until it is ready for the next."""
        ready = asyncio.ensure_future(asyncio.to_thread(self._ready.get)) if go else None
        await asyncio.sleep(0)  # the thread waits already: beside the player, nothing of ours is at work
        self._go.put(go)
        if ready is not None:
            await ready

    async def come(self) -> None:
        await asyncio.to_thread(self._ready.get)


class Bench:
    """What functions of workflows and cells reach as a global."""

    mine: Player
    floor: Floor
    levels: dict[int, tuple[Times, Times]]
    """By number of recorded steps: ours, and raw commits in turns with them."""
    timed = True


bench = Bench()


@durable.workflow
async def one_by_one() -> None:
    number = 0
    while await durable.run("turn", bench.mine.wait_for_turn):  # a workflow's own code waits for no thread
        number += 1
        await durable.run("warm", same, number)
        with bench.mine.times["async"].taken():
            await durable.run("async", same, number)
        with bench.mine.times["thread"].taken():
            await durable.run("thread", same_in_thread, number)


@durable.workflow
async def all_at_once(together: bool) -> None:
    await asyncio.gather(*(durable.run("same", same if together else ends_some_time, n) for n in range(AT_ONCE)))


@durable.workflow
async def nothing() -> None:
    pass


@durable.workflow
async def of_steps(count: int) -> None:
    await asyncio.gather(*(durable.run("same", same, n) for n in range(count)))


class PlannedError(Exception):
    """Leaves the run open, so that the next execution replays it."""


@durable.workflow
async def growing() -> None:
    await grow(same)


async def grow(fn: Callable[[int], Any]) -> None:
    """Some steps one after the other at each level; from level to level they are recorded in many branches at once."""
    done, level = 0, 10
    while level <= MANY:
        done = await _fill(fn, done, level)
        ours, raw = bench.levels.setdefault(level, (Times(), Times()))
        if bench.timed:
            bench.floor.fill(level)
            os.sync()  # what was written in bulk is not to be paid for by the next commits
        for _ in range(AT_EACH_LEVEL):
            if bench.timed:
                before = len(bench.floor.commit.wall)
                bench.floor.take_turn()
                raw.wall += bench.floor.commit.wall[before:]
                raw.cpu += bench.floor.commit.cpu[before:]
                with ours.taken():
                    await durable.run("same", fn, done)
            else:
                await durable.run("same", fn, done)
            done += 1
        level *= 10
    await _fill(fn, done, MANY)
    raise PlannedError


async def _fill(fn: Callable[[int], Any], done: int, until: int) -> int:
    branches = max(min(BRANCHES, until - done), 1)

    async def branch(number: int) -> None:
        for n in range(done + number, until, branches):
            await durable.run("same", fn, n)

    await asyncio.gather(*(branch(number) for number in range(branches)))
    return max(until, done)


def beside(name: str, times: Times, ours: str = "", commit: Times | None = None) -> None:
    commit, append = commit or bench.floor.commit, bench.floor.append
    more = f"; beyond the raw commit {times.ms - commit.ms:+.2f} ms, {times.cpu_ms - commit.cpu_ms:+.2f} ms of CPU"
    ratios = f"{times.ms / commit.ms:5.2f} x raw commit, {times.ms / append.ms:5.1f} x fdatasync"
    print(f"  {name:<34}{times.ms:7.2f} ms = {ratios}{more}{ours}")


# ---- the peers ----


class Dbos:
    """DBOS, with a thread for its synchronous workflow."""

    def __init__(self, folder: Path) -> None:
        from dbos import DBOS

        self.file = folder / "dbos.sqlite"
        self.api = DBOS
        DBOS(config={"name": "bench", "system_database_url": f"sqlite:///{self.file}", "log_level": "ERROR"})

        @DBOS.step()  # of its own functions: it leaves its marks on them
        def plain(n: int) -> int:
            return n

        @DBOS.step()
        async def awaited(n: int) -> int:
            return n

        self.plain, self.awaited = plain, awaited
        self.sync, self.many_times = Player("sync"), Times()
        self.asynchronous = Player("async")

        @DBOS.workflow()
        def turns() -> None:
            number = 0
            while self.sync.wait_for_turn():
                number += 1
                self.plain(number)
                with self.sync.times["sync"].taken():
                    self.plain(number)

        @DBOS.workflow()
        async def turns_async() -> None:
            number = 0
            while await self.asynchronous.turn():
                number += 1
                await self.awaited(number)
                with self.asynchronous.times["async"].taken():
                    await self.awaited(number)

        @DBOS.workflow()
        async def at_once() -> None:
            await asyncio.gather(*(self.awaited(n) for n in range(AT_ONCE)))

        @DBOS.workflow()
        def many() -> None:
            for n in range(PEERS_MANY):
                with self.many_times.taken():
                    self.plain(n)

        self.turns, self.turns_async, self.at_once, self.many = turns, turns_async, at_once, many
        DBOS.launch()

    def mode(self) -> str:
        with sqlite3.connect(self.file) as sql:
            return str(sql.execute("PRAGMA journal_mode").fetchone()[0])

    def replay_ms(self) -> float:
        """Of one step: the median over a workflow that is executed again from all its recorded steps."""
        handle = self.api.start_workflow(self.many)
        handle.get_result()
        self.many_times.wall.clear()
        self.api.fork_workflow(handle.workflow_id, PEERS_MANY + 1).get_result()
        return self.many_times.ms

    def end(self) -> None:
        self.api.destroy()


def dbos_in(folder: Path) -> Dbos | None:
    try:
        return Dbos(folder)
    except Exception as error:
        missing("DBOS", error)
        return None


def joblib_in(folder: Path) -> Any:
    try:
        from joblib import Memory
    except ImportError as error:
        missing("joblib.Memory", error)
        return None
    warnings.filterwarnings("ignore", module="joblib")
    return Memory(folder / "joblib", verbose=0).cache(same_in_thread)


# ---- what is measured ----


async def sequential(notebook: Notebook, folder: Path, dbos: Dbos | None, remembered: Any) -> None:
    await notebook.cell(PROBE)
    with journal() as sql:
        found = "SELECT length(key), length(value) FROM Cache WHERE key LIKE 'step/%' ORDER BY 2 DESC LIMIT 1"
        key_size, row_size = sql.execute(found).fetchone()
    bench.floor = floor = Floor(folder, key_size, row_size)
    in_cell, bench.mine = Player("async", "thread"), Player("async", "thread")
    notebook.names["mine"] = in_cell
    players = [in_cell, bench.mine]
    tasks: list[Any] = [asyncio.ensure_future(notebook.cell(ONE_BY_ONE)), one_by_one.start()]
    if dbos:
        players += [dbos.sync, dbos.asynchronous]
        tasks += [dbos.api.start_workflow(dbos.turns), await dbos.api.start_workflow_async(dbos.turns_async)]
    for player in players:
        await player.come()
    stored = Times()
    for number in range(STEPS):
        floor.take_turn()
        for player in players:
            await player.play()
        if remembered:
            with stored.taken():
                remembered(number)
    for player in players:
        await player.play(go=False)
    for task in tasks[:2]:
        await task
    print(f"\nOne step after the other, medians of {STEPS}; the row has {row_size} bytes")
    beside("raw SQLite commit", floor.commit)
    beside("append and fdatasync", floor.append)
    for where, player in (("cell", in_cell), ("workflow", bench.mine)):
        for kind, target in (("async", 0.3), ("thread", 0.35)):
            body = "async body" if kind == "async" else "plain body"
            beside(f"{where}, {body}", player.times[kind], f" (target +{target})")
    if dbos:
        best = min(times.ms for times in bench.mine.times.values())
        for kind, player in (("async", dbos.asynchronous), ("sync", dbos.sync)):
            times = player.times[kind]
            beside(f"DBOS, {kind}, journal mode {dbos.mode()}", times, f"; {times.ms / best:.1f} x ours (target 4)")
    if remembered:
        beside("joblib.Memory, unsynced", stored)
    commit, *steps = await asyncio.to_thread(times_in_kernel, key_size, row_size)
    beside("raw SQLite commit in a kernel", commit, commit=commit)
    for kind, times, target in zip(("async", "plain"), steps, (0.3, 0.35), strict=True):
        beside(f"kernel with a view, {kind} body", times, f" (target +{target})", commit)


def times_in_kernel(key_size: int, row_size: int) -> list[Times]:
    """Of raw commits, and of steps with an async and with a plain body, in a cell of a real kernel."""
    manager, client = start_new_kernel(extra_arguments=["--Application.log_level=40"])
    shown: list[str] = []

    def note(message: dict[str, Any]) -> None:
        if message["msg_type"] == "error":
            raise AssertionError("\n".join(message["content"]["traceback"]))
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            shown.append(message["content"]["text"])

    try:
        for source in (IN_KERNEL[0].format(key_size=key_size, row_size=row_size), *IN_KERNEL[1:]):
            shown.clear()
            client.execute_interactive(source, allow_stdin=True, stdin_hook=lambda _: None, output_hook=note, timeout=600)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    found = []
    for wall, cpu in json.loads("".join(shown)):
        times = Times()
        times.wall, times.cpu = wall, cpu
        found.append(times)
    return found


async def at_once(dbos: Dbos | None) -> None:
    print(f"\n{AT_ONCE:,} steps at once")
    for together, what in ((True, "that end together"), (False, "that end within a second")):
        with commits_counted() as groups:
            began = time.perf_counter()
            await all_at_once.start(together)
            took = time.perf_counter() - began
        target = 10 if together else AT_ONCE // 20
        print(f"  bodies {what}: {took * 1000:.0f} ms, {len(groups)} commit groups in all (target {target})")
    if dbos:
        began = time.perf_counter()
        handle = await dbos.api.start_workflow_async(dbos.at_once)
        await handle.get_result()
        print(f"  DBOS, bodies that end together: {(time.perf_counter() - began) * 1000:.0f} ms")


@contextmanager
def commits_counted() -> Iterator[list[int]]:
    """The sizes of the journal's commit groups meanwhile."""
    apply, groups = DiskJournal.apply, []

    def counting(journal, commits):
        groups.append(len(commits))
        return apply(journal, commits)

    DiskJournal.apply = counting
    try:
        yield groups
    finally:
        DiskJournal.apply = apply


async def growth(notebook: Notebook, dbos: Dbos | None, remembered: Any) -> None:
    """One after the other, 100,000 commits would take minutes: between the levels, steps are recorded in 1,000 branches."""
    per_step = {}
    for what in ("content", "history"):
        bench.levels, bench.timed = {}, True
        notebook.names["grow"] = grow
        began = time.perf_counter()
        if what == "content":
            await notebook.cell(GROW, may_raise=True)
        else:
            run = growing.start(id="growing")
            await failed(run)
        took = time.perf_counter() - began
        print(f"\n{MANY:,} steps by {what}: recorded in {took:.1f} s, most of them in {BRANCHES:,} branches at once")
        for level, (ours, raw) in bench.levels.items():
            print(f"  with {level:>7,} recorded, one more: {ours.ms:.2f} ms = {ours.ms / raw.ms:.2f} x raw commit; beyond it "
                  f"{ours.ms - raw.ms:+.2f} ms, {ours.cpu_ms - raw.cpu_ms:+.2f} ms of CPU")  # fmt: skip
        first, *_, last = bench.levels.values()
        ours, raw = (last[which].ms / first[which].ms - 1 for which in (0, 1))
        print(f"  from first to last {ours:+.0%} (target 30%), the raw commit {raw:+.0%}")
        bench.timed = False
        floors, replays = Times(), Times()
        for _ in range(REPLAYS):
            with floors.taken():
                count = read_all("grow" if what == "content" else "growing")
            with replays.taken():
                if what == "content":
                    await notebook.cell(GROW, may_raise=True)
                else:
                    run.resume()
                    await failed(run)
        ratio, target = replays.ms / floors.ms, 5 if what == "content" else 2
        per_step[what] = replays.ms / count
        print(f"  replay of {count:,}: {replays.ms / 1000:.2f} s, {per_step[what] * 1000:.0f} us a step = {ratio:.1f} x one "
              f"SELECT of all with decoding ({floors.ms / 1000:.2f} s; target {target}), medians of {REPLAYS}")  # fmt: skip
    print(f"\nOne step recalled, among {MANY:,}: {per_step['content'] * 1000:.0f} us by content, "
          f"{per_step['history'] * 1000:.0f} us by history")  # fmt: skip
    if dbos:
        ms = await asyncio.to_thread(dbos.replay_ms)
        print(f"  DBOS, among {PEERS_MANY:,}: {ms * 1000:.0f} us")
    if remembered:
        hits = Times()
        for number in range(PEERS_MANY):
            remembered(number)
        for number in range(PEERS_MANY):
            with hits.taken():
                remembered(number)
        print(f"  joblib.Memory, among {PEERS_MANY:,}: {hits.ms * 1000:.0f} us")


async def listed() -> None:
    """The runs of a store, and how one of them stands while and after its steps run."""
    for start in range(0, RUNS, 1000):
        await asyncio.gather(*(nothing.start() for _ in range(start, min(start + 1000, RUNS))))
    print(f"\n{RUNS:,} more runs")
    for limit, what in ((100, "the newest 100"), (2 * RUNS, "all")):
        times = Times()
        for _ in range(5):
            with times.taken():
                durable.runs(limit=limit)
        print(f"  {what} listed: {times.ms:.0f} ms, {times.cpu_ms:.0f} ms of CPU (target 100)")
    for count in (10, 1000, 10_000):
        run = of_steps.start(count)
        await run
        times = Times()
        for _ in range(100):
            with times.taken():
                _ = run.status
        print(f"  run.status after {count:>6,} steps: {times.ms * 1000:.0f} us")


def commits_of_a_process(folder: Path, name: str) -> list[float]:
    """How long each commit took of a process that makes one after the other, and waits for nothing else."""
    journal = DiskJournal(folder / "journal", folder / "values")
    lease = (f"lease/{name}", b"mine")
    journal.apply([Commit(puts=(lease,))])
    times = Times()
    for n in range(STEPS):
        with times.taken():
            journal.apply([Commit(lease, inserts=((f"step/{name}/{n:06}", bytes(493)),))])
    journal.close()
    return times.wall


def processes_at_once(folder: Path) -> None:
    folder.mkdir()
    DiskJournal(folder / "journal", folder / "values").close()
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        names = [str(n) for n in range(PROCESSES)]
        took = sorted(s for times in pool.map(commits_of_a_process, [folder] * PROCESSES, names) for s in times)
    print(f"\n{PROCESSES} processes at once, {STEPS} commits each, one after the other")
    print(f"  a commit: {took[len(took) // 2] * 1000:.2f} ms in the median, {took[-1] * 1000:.0f} ms at most (target 1,000)")


async def failed(run: Any) -> None:
    try:
        await run
    except PlannedError:
        return
    raise AssertionError("the planned failure did not come")


def journal() -> Any:
    return sqlite3.connect(Path(".durable_nb/journal/cache.db"))


def read_all(name: str) -> int:
    """One SELECT of the steps of a cell or a run, each unsealed and decoded with its value; how many there are."""
    signer = _codec.Signer(_codec.load_key())
    with journal() as sql:
        found = f"SELECT key, value FROM Cache WHERE key GLOB 'step/*{name}/*'"
        rows = sql.execute(found).fetchall()
    for key, row in rows:
        outcome = rec.unpack(signer, key, row, rec.Outcome)
        _codec.decode(outcome.form, outcome.value)
    assert len(rows) >= MANY, len(rows)
    return len(rows)


async def measure(folder: Path) -> None:
    notebook = Notebook()
    await notebook.cell(NOTEBOOK)
    dbos, remembered = dbos_in(folder), joblib_in(folder)
    try:
        await sequential(notebook, folder, dbos, remembered)
        await at_once(dbos)
        await listed()
        await growth(notebook, dbos, remembered)
    finally:
        if dbos:
            dbos.end()


def main() -> None:
    print(machine())
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            processes_at_once(Path(folder, "processes"))  # first: the shell becomes __main__, from which nothing is spawned
            asyncio.run(measure(Path(folder)))
        finally:
            os.chdir(home)


if __name__ == "__main__":
    main()
