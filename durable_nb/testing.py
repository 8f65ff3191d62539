"""Play a workflow's life in a test: its clock, its store, its process, and that process's death.

    clock, store = FakeClock(), MemoryStore()
    async with runtime(store, clock=clock, crash="after:step") as process:
        await order.start("jane@example.com", id="order-42")
    assert process.crashed
    async with runtime(store, clock=clock):
        await order.start("jane@example.com", id="order-42")

Nothing here is part of the engine: the clock is another clock, and a crash is a journal that lets nothing through any more.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from durable_nb import _current
from durable_nb._clock import Instant, parse_duration
from durable_nb._codec import Signer
from durable_nb._engine import Engine
from durable_nb._engine.workflows import Workflows
from durable_nb._journal import Commit, Journal, Verdict
from durable_nb._journal.memory import MemoryJournal
from durable_nb._journal.writer import Writer
from durable_nb._model_server import Fault as Fault  # noqa: PLC0414  # handed on
from durable_nb._model_server import ModelServer as ModelServer  # noqa: PLC0414
from durable_nb._records import Outcome, unpack
from durable_nb._store import Store
from durable_nb._workflow import Workflow
from durable_nb._workflow import workflow as define_workflow
from durable_nb.errors import StoreError

_ROWS = {"run": ("run/",), "step": ("step/",), "try": ("try/",), "timer": ("timer/",)}
CRASH_POINTS = tuple(f"{side}:{what}" for what in ("write", *_ROWS, "value") for side in ("before", "after"))
"""Where a process can die: just before something is on disk, or just after, when the process hasn't heard of it yet.

`write` is any of them. `run` is a run that begins, goes on or ends; `step` an outcome; `try` a failed attempt, or that one
at an `at_most_once` step begins; `timer` the beginning of a sleep; `value` a large result's file, before its step.
"""


LISTEN_S = 0.2
"""So long, in real seconds, nothing must happen before a `FakeClock` skips the rest of a wait for an event or a decision."""


class FakeClock:
    """Time that passes only while somebody sleeps, or when it is told to.

    Sleeping takes no time at all: the clock goes to the moment when the sleep ends. Of several sleeps the earliest ends first.
    Pauses before retries are sleeps too; a step's `timeout` isn't, it goes by real time, as the step's body does. Where a run
    waits for an event or a decision, whoever plays the outside has `LISTEN_S` of real time to send it before time is skipped.
    """

    def __init__(self, start_s: float = 1_700_000_000.0) -> None:
        """`start_s`: unix seconds."""
        self.wall_s = start_s
        self._boot, self._boot_s, self._passed_s = 1, 500.0, 0.0
        self._sleepers: set[tuple[float, int]] = set()
        self._polling: dict[int, tuple[float, Callable[[], bool]]] = {}
        """Time-outs that wait for bodies at work: until when, and whether these still are."""
        self._count = itertools.count()
        self.writing: list[Callable[[], bool]] = []
        """Is a process on this clock writing? No time passes meanwhile: what has ended is about to be told."""
        self._told_in = 0

    def now(self) -> Instant:
        """This moment."""
        return Instant(self.wall_s, f"boot {self._boot}", self._boot_s)

    async def sleep(self, seconds: float) -> None:
        """Skip `seconds`. Others that are ready run first."""
        mine = self._passed_s + seconds, next(self._count)
        self._sleepers.add(mine)
        try:
            await asyncio.sleep(0)
            # A time-out that ends before that sleeps as soon as it sees that no body is at work any more.
            while (  # noqa: ASYNC110
                min(self._sleepers) < mine
                or any(s < mine[0] and not busy() for s, busy in self._polling.values())
                or self._is_writing()
            ):
                await asyncio.sleep(0)
            self._pass(max(mine[0] - self._passed_s, 0.0))
        finally:
            self._sleepers.remove(mine)

    async def wait(self, seconds: float, is_busy: Callable[[], bool]) -> bool:
        """Skip `seconds` of a time-out in a workflow's code (`asyncio.timeout`, `wait_for`, `asyncio.sleep`).

        While bodies of the run are at work, which take real time, it takes as much of that.
        """
        loop = asyncio.get_running_loop()
        until_s, due_s, number = loop.time() + seconds, self._passed_s + seconds, next(self._count)
        self._polling[number] = due_s, is_busy
        try:
            while is_busy() and loop.time() < until_s:  # noqa: ASYNC110  nobody tells when a body ends
                await asyncio.sleep(min(0.002, max(until_s - loop.time(), 0.0)))
        finally:
            del self._polling[number]
        if is_busy():
            self._pass(seconds)
        else:
            await self.sleep(max(due_s - self._passed_s, 0.0))
        return True

    async def listen(self, seconds: float, arrival: asyncio.Future[Any], is_busy: Callable[[], bool]) -> None:
        """Skip `seconds`, unless something comes from outside: while a body is at work, or somebody sleeps for a shorter time,
        and for LISTEN_S of real time after that, this waits for it."""  # fmt: skip
        loop = asyncio.get_running_loop()
        due_s, number, quiet_since = self._passed_s + seconds, next(self._count), loop.time()
        self._polling[number] = due_s, lambda: False  # who sleeps for longer waits for this
        try:
            while not arrival.done() and self._passed_s < due_s:
                earlier = min(min(self._sleepers, default=(due_s, 0))[0], *(due for due, _ in self._polling.values()))
                if is_busy() or earlier < due_s or self._is_writing():
                    quiet_since = loop.time()
                elif loop.time() - quiet_since >= LISTEN_S:
                    self._pass(due_s - self._passed_s)
                await asyncio.sleep(0.002)
        finally:
            del self._polling[number]

    def advance(self, duration: float | str | timedelta) -> None:
        """Let time pass, as between a crash and the restart: seconds, a timedelta, or "90s" "2h" "7d"."""
        self._pass(parse_duration(duration).total_seconds())

    def jump(self, duration: float | timedelta) -> None:
        """Somebody sets the wall clock, by so much forward or (negative) back. No time passes."""
        self.wall_s += duration.total_seconds() if isinstance(duration, timedelta) else duration

    def reboot(self) -> None:
        """The machine is started anew: what its boot clock said before means nothing now."""
        self._boot += 1
        self._boot_s = 3.0

    def _is_writing(self) -> bool:
        if any(is_writing() for is_writing in self.writing):
            self._told_in = 5  # turns of the loop, until whoever waits for it has heard
        elif self._told_in:
            self._told_in -= 1
        return self._told_in > 0

    def _pass(self, seconds: float) -> None:
        self.wall_s = _later(self.wall_s, seconds)
        self._boot_s = _later(self._boot_s, seconds)
        self._passed_s += seconds


def _later(time_s: float, seconds: float) -> float:
    """A rest of a wait that is too short for a float to tell still passes: else it would be waited for forever."""
    return max(time_s + seconds, math.nextafter(time_s, math.inf)) if seconds > 0 else time_s + seconds


class Crashed(StoreError):  # noqa: N818  it says what happened
    """The process has died at its crash point. Seen by code that a real death would have stopped; `runtime` swallows it."""


class CrashingJournal:
    """A journal, on disk or in memory, that dies at the `nth` write of a kind: the one after which nothing is written.

    `on_crash` is called from the thread that writes. Of commits that were handed over together, those before the nth land.
    ValueError for a point that isn't one of CRASH_POINTS.
    """

    def __init__(self, inner: Journal, point: str | None, nth: int, on_crash: Callable[[], object]) -> None:
        if point is not None and point not in CRASH_POINTS:
            raise ValueError(f"no crash point {point!r}; there are {', '.join(CRASH_POINTS)}")
        if nth < 1:
            raise ValueError(f"nth={nth!r}: 1 is the first write of that kind")
        self.inner = inner
        self.crashed = False
        side, _, self._what = (point or "").partition(":")
        self._lands, self._left, self._on_crash = side == "after", nth if point else 0, on_crash

    def apply(self, commits: Sequence[Commit]) -> list[Verdict]:
        self._check()
        for n, commit in enumerate(commits):
            if self._is_reached(_is_of(commit, self._what)):
                self.inner.apply(commits[: n + self._lands])
                self._die()
        return self.inner.apply(commits)

    def put_blob(self, data: bytes) -> str:
        self._check()
        reached = self._is_reached(self._what == "value")
        if reached and not self._lands:
            self._die()
        digest = self.inner.put_blob(data)
        if reached:
            self._die()
        return digest

    def get(self, key: str) -> bytes | None:
        self._check()
        return self.inner.get(key)

    def scan(self, prefix: str) -> list[tuple[str, bytes]]:
        self._check()
        return self.inner.scan(prefix)

    def get_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        self._check()
        return self.inner.get_many(keys)

    def get_blob(self, digest: str) -> bytes:
        self._check()
        return self.inner.get_blob(digest)

    @property
    def mode(self) -> str:
        """Of the inner journal."""
        return self.inner.mode

    def sizes(self, prefix: str = "") -> list[tuple[str, int]]:
        self._check()
        return self.inner.sizes(prefix)

    def first(self, prefix: str, after: str = "") -> str | None:
        self._check()
        return self.inner.first(prefix, after)

    def problems(self) -> list[str]:
        self._check()
        return self.inner.problems()

    def caveats(self) -> list[str]:
        return self.inner.caveats()

    def drop_blobs(self, before: float, needed: Callable[[str], bool]) -> int:
        self._check()
        return self.inner.drop_blobs(before, needed)

    def close(self) -> None:
        """Release the inner journal's files."""
        self.inner.close()

    def _is_reached(self, matches: bool) -> bool:
        if not matches or not self._left:
            return False
        self._left -= 1
        return not self._left

    def _die(self) -> None:
        self.crashed = True
        self._on_crash()
        self._check()

    def _check(self) -> None:
        if self.crashed:
            raise Crashed("this process died at its crash point; open another runtime on its store")


def _is_of(commit: Commit, what: str) -> bool:
    if what not in _ROWS:
        return what == "write"
    return any(key.startswith(_ROWS[what]) for key, _ in (*commit.inserts, *commit.puts))


class MemoryStore:
    """A store in memory. It outlives the processes that `runtime` plays on it, as a folder would."""

    def __init__(self) -> None:
        self.id = secrets.token_hex(8)
        self.signer = Signer(secrets.token_bytes(32))
        self.journal = MemoryJournal()
        self.living: set[str] = set()
        """Ids of the processes that live."""


class Process:
    """What plays a process: an engine of its own on a store that it may share with others. `runtime` makes it."""

    def __init__(self, store: MemoryStore | Path, clock: FakeClock, crash: str | None, nth: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._owner = asyncio.current_task()
        self._buried = self._owner_cancelled = False
        disk = None if isinstance(store, MemoryStore) else Store(store)
        home = cast("Store", store) if disk is None else disk
        self._journal = CrashingJournal(home.journal, crash, nth, lambda: self._loop.call_soon_threadsafe(self._bury))
        life = _Life(store.living) if isinstance(store, MemoryStore) else home.process
        if disk is not None:
            disk.writer.close()
        self._writer = _Writer(self._journal)
        self._store = _Opened(home, self._journal, self._writer, life, disk)
        self.engine = Engine(cast("Store", self._store), clock=clock, jitter=lambda: 0.0)
        self._workflows = Workflows(self.engine)

    @property
    def crashed(self) -> bool:
        """Was the crash point reached? False: the process did all that was asked of it."""
        return self._journal.crashed

    def use(self) -> None:
        """What is called from here on (`start`, `get_run`, `run.status` ...) is called in this process."""
        _current.use_engine(lambda: self._workflows)

    def kill(self) -> None:
        """Die now, wherever the code is. The `async with` block goes on."""
        self._journal.crashed = True
        self._owner = None
        self._bury()

    def _bury(self) -> None:
        """What a death ends at once is ended here: no step begins, nobody hears of a commit, the sign of life is gone."""
        if self._buried:
            return
        self._buried = True
        for run in list(self.engine.active.values()):
            run.die()
        for task in self._tasks():
            task.cancel()
        self._writer.die()
        self._store.process.end()
        if self._owner is not None:
            self._owner_cancelled = self._owner.cancel()

    def _tasks(self) -> set[asyncio.Task[Any]]:
        tasks = {*self._workflows._tasks.values(), self.engine.ownership.watching, self._workflows.schedules.watching}
        tasks |= {body.task for body in self.engine.bodies.values()}
        return {task for task in tasks if task is not None}

    async def _end(self) -> None:
        """The process ends: of itself, its unfinished runs interrupted, or by its death."""
        if self._owner_cancelled and self._owner is not None:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)  # the block may have ended before the cancellation came
            self._owner.uncancel()
        self._owner = None
        if self.crashed:
            self._bury()
        while tasks := {task for task in self._tasks() if not task.done()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=5)
        await asyncio.sleep(0)  # what their callbacks hand over is written too
        self._store.close()


@asynccontextmanager
async def runtime(
    store: MemoryStore | Path | None = None,
    *,
    clock: FakeClock | None = None,
    crash: str | None = None,
    nth: int = 1,
) -> AsyncIterator[Process]:
    """A process in which workflows can be started; at the end of the block it ends, and what was in use before is so again.

    store  what it shares with its predecessors and contemporaries: a MemoryStore, or the folder of one on disk; None: a new one
    clock  to be shared with them as well, so that no sleep takes time; None: a new one
    crash  one of CRASH_POINTS: at the `nth` such write in this process it dies. The block is left there, silently: ask
           `process.crashed`. What was acknowledged is in the store, and a runtime opened on it next is the successor

    A sync step's thread can't be killed: what it does after the death is done, but is not recorded. Unfinished runs are
    interrupted at the end of the block. ValueError, before anything is done, for a crash point that there isn't.
    """
    clock = clock or FakeClock()
    process = Process(store if store is not None else MemoryStore(), clock, crash, nth)
    clock.writing.append(process._writer.is_writing)
    before = _current._engines[:]
    process.use()
    try:
        yield process
    except (asyncio.CancelledError, Crashed):
        if not process.crashed:
            raise
    finally:
        try:
            await process._end()
        finally:
            clock.writing.remove(process._writer.is_writing)
            _current._engines[:] = before


def redefine(workflow: Any, *, name: str | None = None) -> Any:
    """Make this function the workflow of its name (or `name`), whatever has had it before, as after an edit and a restart.

    workflow  an async function, or a workflow, which becomes the one of its name again; a name alone forgets who has it, so
              that the next `@durable.workflow` of that name is taken. The workflow is returned; None for a name alone
    """
    if isinstance(workflow, str):
        _current.workflow_functions.pop(workflow, None)
        return None
    function = workflow.fn if isinstance(workflow, Workflow) else workflow
    called = name or (workflow.name if isinstance(workflow, Workflow) else function.__name__)
    _current.workflow_functions.pop(called, None)
    limit, key = (workflow.limit, workflow.key) if isinstance(workflow, Workflow) else (None, None)
    made = define_workflow(name=called, limit=limit, key=key)(function)
    if isinstance(workflow, Workflow):
        _current.workflow_options[called] = made.options = workflow.options
    return made


def outcomes(store: MemoryStore | Path, run_id: str | None = None) -> list[Outcome]:
    """The recorded outcomes of steps of workflows' runs and of cells, in the order in which they were recorded; of one run.

    Each has `name kind run_id failed error attempts started_at ended_at`, and `value` as bytes, of the form `form`.
    """
    opened = None if isinstance(store, MemoryStore) else Store(store)
    journal, signer = (store.journal, store.signer) if isinstance(store, MemoryStore) else (opened.journal, opened.signer)  # type: ignore[union-attr]
    try:
        found = [unpack(signer, key, row, Outcome) for key, row in journal.scan("step/")]
    finally:
        if opened is not None:
            opened.close()
    return [outcome for outcome in found if run_id in (None, outcome.run_id)]


class _Writer(Writer):
    """The writer of a process that may die: whoever waits for it then waits no longer, and hears of nothing."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(journal)
        self._waiting: set[asyncio.Future[Any]] = set()
        self._dead = False

    def is_writing(self) -> bool:
        """Has something been handed over that nobody has heard of yet?"""
        return any(not told.done() for told in self._waiting)

    def die(self) -> None:
        self._dead = True
        for waiting in self._waiting:
            waiting.cancel()

    def _submit(self, work: Any) -> asyncio.Future[Any]:
        told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._dead:
            told.cancel()
            return told
        self._waiting.add(told)
        super()._submit(work).add_done_callback(lambda done: self._pass_on(done, told))
        return told

    def _pass_on(self, done: asyncio.Future[Any], told: asyncio.Future[Any]) -> None:
        error = done.exception()
        if isinstance(error, Crashed) and not self._dead:
            return  # a death's news never arrives; `die` comes soon
        self._waiting.discard(told)
        if told.done():
            return
        if error is not None:
            told.set_exception(error)
        else:
            told.set_result(done.result())


class _Life:
    """A process's sign of life, beside those of others."""

    def __init__(self, living: set[str]) -> None:
        self.id = secrets.token_hex(6)
        self._living = living
        living.add(self.id)

    def is_alive(self, process_id: str) -> bool:
        return process_id in self._living

    def end(self) -> None:
        self._living.discard(self.id)


class _Opened:
    """What an engine needs of a store."""

    def __init__(self, home: Store, journal: Journal, writer: Writer, process: Any, disk: Store | None) -> None:
        self.id, self.signer = home.id, home.signer
        self.path = disk.path if disk is not None else Path("memory")
        self.cells = self.path / "cells"
        self.journal, self.writer, self.process, self._disk = journal, writer, process, disk

    def is_in_place(self) -> bool:
        return self._disk is None or self._disk.is_in_place()

    def close(self) -> None:
        self.writer.close()
        if self._disk is not None:
            self._disk.journal.close()
        self.process.end()
