"""`durable.map`: a step for each of many items, so many at a time."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
import threading
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from kernels import kernel as kernel_of

import durable_nb as durable
from durable_nb._clock import parse_rate
from durable_nb._engine import Asked, Engine
from durable_nb._engine.observing import Notice
from durable_nb._facts import Status
from durable_nb._store import Store
from durable_nb.errors import NestedStepError, NonRetryableError, NotInRunError, RetryAfter
from durable_nb.testing import FakeClock, MemoryStore, ModelServer, runtime


class World:
    """What bodies do. Always the same value to a fingerprint."""

    def __init__(self) -> None:
        self.done = []
        self.at_work = self.most = 0
        self.clock = None
        self.times = []
        self.down = set()
        self.gate = None
        self.meeting = None

    def __reduce__(self):
        return World, ()

    def begin(self, item):
        with lock:
            self.done.append(item)
            self.at_work += 1
            self.most = max(self.most, self.at_work)
            if self.clock is not None:
                self.times.append(self.clock.now().boot_s)

    def end(self):
        with lock:
            self.at_work -= 1


world = World()
lock = threading.Lock()


async def work(item):
    world.begin(item)
    await asyncio.sleep(0)
    if world.gate is not None:
        await world.gate.wait()
    world.end()
    if isinstance(item, int) and item in world.down:
        raise ConnectionError(f"{item} is down")
    return f"{item} done"


def work_in_thread(item):
    world.begin(item)
    if world.meeting is not None:
        world.meeting.wait(30)
    world.end()
    return f"{item} done"


class Quiet:
    """Keeps what the user of a run is told."""

    def __init__(self):
        self.notices = []

    def __call__(self, observation):
        if isinstance(observation, Notice) and not observation.is_advice:
            self.notices.append(observation.text)


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    world.__init__()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@asynccontextmanager
async def kernel(path, clock=None):
    store = Store(path)
    try:
        yield Engine(store, clock=clock, jitter=lambda: 0.0)
    finally:
        store.close()


async def begun(engine, inputs="k"):
    run = await engine.begin(Asked("cell", inputs))
    run.quiet = Quiet()
    run.observers.subscribe(run.quiet)
    return run


async def finished(run, body):
    status = Status.FAILED
    try:
        value = await run.execute(body())
        status = Status.COMPLETED
        return value
    finally:
        await run.finish(status)


async def cell(engine, body):
    """One execution of a durable cell whose code is `body`."""
    return await finished(await begun(engine), body)


def mapped(items, fn=work, **options):
    async def body():
        return await durable.map("m", fn, items, **options)

    return body


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# -- results, and what is kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [work, work_in_thread, durable.step(work, retries=0), functools.partial(work)])
def test_results_come_in_order_and_never_more_than_so_many_are_at_work(path, fn):
    async def main():
        async with kernel(path) as engine:
            assert await cell(engine, mapped(range(50), fn, concurrency=3)) == [f"{n} done" for n in range(50)]
        assert world.most == 3 or (world.most < 3 and fn is work_in_thread)  # threads may end before the next begins
        assert sorted(world.done) == list(range(50))

    asyncio.run(main())


def test_new_rows_cost_only_themselves_and_a_reordered_list_nothing(path):
    """Items are known by their content, equal ones are counted: [1, 1] are two samples."""

    async def main():
        async with kernel(path) as engine:
            await cell(engine, mapped([{"n": n} for n in range(20)]))
        world.done.clear()
        rows = [{"n": n} for n in (7, 30, 3, 31, *range(10, 20))]
        async with kernel(path) as engine:
            assert await cell(engine, mapped(rows)) == [f"{row} done" for row in rows]
            assert sorted(row["n"] for row in world.done) == [30, 31]
            world.done.clear()
            assert await cell(engine, mapped(rows[::-1], concurrency=2)) == [f"{row} done" for row in rows[::-1]]
            assert world.done == []
            await cell(engine, mapped([{"n": 7}, {"n": 7}]))
            assert world.done == [{"n": 7}]

    asyncio.run(main())


def test_a_map_that_died_goes_on_with_the_items_that_are_missing(path):
    async def main():
        world.gate = asyncio.Event()
        async with kernel(path) as engine:
            run = await begun(engine)
            task = asyncio.ensure_future(run.execute(mapped(range(30), concurrency=4)()))
            await until(lambda: len(world.done) == 4)
            world.gate.set()
            await until(lambda: len(engine.store.journal.scan("step/")) >= 8)
            engine.store.process.end()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        world.done.clear()
        async with kernel(path) as engine:
            recorded = len(engine.store.journal.scan("step/"))
            assert 8 <= recorded < 30
            assert await cell(engine, mapped(range(30), concurrency=4)) == [f"{n} done" for n in range(30)]
        assert len(world.done) == 30 - recorded

    asyncio.run(main())


def test_an_empty_list_and_a_generator(path):
    async def main():
        async with kernel(path) as engine:
            assert await cell(engine, mapped([])) == []
            assert await cell(engine, mapped(n for n in range(3))) == ["0 done", "1 done", "2 done"]

    asyncio.run(main())


def test_whoever_watches_knows_the_total_from_the_beginning(path):
    """Before the first item is done all of them can be seen, `m[3]` the fourth; a second map of the name has its own."""

    async def main():
        world.gate = asyncio.Event()
        async with kernel(path) as engine:
            run = await begun(engine)

            async def body():
                await durable.map("m", work, range(1000), concurrency=2)
                await durable.map("m", work, range(3))

            task = asyncio.ensure_future(finished(run, body))
            await until(lambda: len(world.done) == 2)
            steps = run.snapshot().steps
            assert [step.path for step in steps] == [f"m[{n}]" for n in range(1000)]
            assert [step.status for step in steps[:4]] == ["running", "running", "pending", "pending"]
            world.gate.set()
            await task
            assert [step.path for step in run.snapshot().steps[999:]] == ["m[999]", "m[0]#2", "m[1]#2", "m[2]#2"]
            assert {step.status for step in run.snapshot().steps} == {"completed"}

    asyncio.run(main())


# -- failures ---------------------------------------------------------------------------------------------------------


def test_after_a_failure_none_begins_and_those_at_work_are_recorded(path):
    async def main():
        world.gate = asyncio.Event()
        world.down = {0}
        one_try = durable.step(work, retries=0)
        async with kernel(path) as engine:
            run = await begun(engine)
            task = asyncio.ensure_future(finished(run, mapped(range(30), one_try, concurrency=4)))
            await until(lambda: len(world.done) == 4)
            world.gate.set()
            with pytest.raises(ConnectionError, match="0 is down"):
                await task
            assert len(world.done) <= 12, "while the failure is being recorded, a few more begin"
            done = len(world.done) - 1
            assert len(engine.store.journal.scan("step/")) == done
            world.down, world.done = set(), []
            assert await cell(engine, mapped(range(30), one_try)) == [f"{n} done" for n in range(30)]
            assert len(world.done) == 30 - done

    asyncio.run(main())


def test_a_failure_that_the_cell_catches_leaves_no_item_to_come(path):
    """The view shows what was tried; none of the others is taken for a step that was forgotten."""

    async def main():
        world.down = {2}
        async with kernel(path) as engine:
            run = await begun(engine)

            async def body():
                with suppress(ConnectionError):
                    await durable.map("m", durable.step(work, retries=0), range(1000), concurrency=2)

            await finished(run, body)
            states = [step.status for step in run.snapshot().steps]
            assert len(states) < 10
            assert "pending" not in states

    asyncio.run(main())


def test_collected_failures_stand_in_their_places_and_are_tried_again(path):
    async def main():
        world.down = {3, 5}
        one_try = durable.step(work, retries=0)
        async with kernel(path) as engine:
            values = await cell(engine, mapped(range(8), one_try, on_error="collect"))
            assert [str(value) for value in values] == [f"{n} is down" if n in world.down else f"{n} done" for n in range(8)]
            assert isinstance(values[3], ConnectionError)
            world.down, world.done = {5}, []
            values = await cell(engine, mapped(range(8), one_try, on_error="collect"))
            assert sorted(world.done) == [3, 5]
            assert values[3] == "3 done"

    asyncio.run(main())


def test_an_item_that_waits_for_its_next_attempt_keeps_nobody_waiting(path):
    """Two that fail and pause leave their places to the next two."""

    async def main():
        world.down = {0, 1}

        async def flaky(item):
            world.begin(item)
            world.end()
            if item in world.down:
                world.down.discard(item)
                raise ConnectionError("down")
            return item

        slow = durable.step(flaky, backoff=1000)
        async with kernel(path, FakeClock()) as engine:
            assert await cell(engine, mapped(range(20), slow, concurrency=2)) == list(range(20))
        assert sorted(world.done[2:4]) == [2, 3]

    asyncio.run(main())


# -- concurrency and rate ---------------------------------------------------------------------------------------------


def test_more_than_64_plain_functions_are_at_work_at_once(path):
    """All hundred have to be there before any ends."""

    async def main():
        world.meeting = threading.Barrier(100)
        async with kernel(path) as engine:
            assert len(await cell(engine, mapped(range(100), work_in_thread, concurrency=100))) == 100
        assert world.most == 100

    asyncio.run(main())


def test_attempts_are_evenly_spaced_and_restored_items_take_no_time(path):
    async def main():
        world.clock = clock = FakeClock()
        async with kernel(path, clock) as engine:
            await cell(engine, mapped(range(10), rate="60/min"))
            assert [round(time - world.times[0], 6) for time in world.times] == list(range(10))
            world.times.clear()
            before = clock.now().boot_s
            await cell(engine, mapped(range(12), rate="30/min"))
            assert [round(time - before, 6) for time in world.times] == [0, 2]

    asyncio.run(main())


@pytest.mark.parametrize("how", ["raised", "header"])
def test_a_pause_that_the_server_asks_for_is_kept_by_all_items(path, how):
    async def main():
        world.clock = clock = FakeClock()

        class Busy(Exception):
            response = type("Response", (), {"status_code": 429, "headers": {"Retry-After": "30"}})

        async def asks(item):
            world.begin(item)
            world.end()
            if world.done == [0, 1, 2]:
                raise RetryAfter("30s") if how == "raised" else Busy
            return item

        async with kernel(path, clock) as engine:
            began = clock.now().boot_s
            assert await cell(engine, mapped(range(6), asks, concurrency=1)) == list(range(6))
            assert [round(time - began) for time in world.times] == [0, 0, 0, 30, 30, 30, 30]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("60/min", 1), ("5/s", 0.2), ("1000/h", 3.6), ("1/day", 86400), ("10/15min", 90), (" 2 / second ", 0.5), ("0.5/s", 2)],
)
def test_rates(text, seconds):
    assert parse_rate(text) == pytest.approx(seconds)


# -- in a workflow ----------------------------------------------------------------------------------------------------


def test_in_a_workflow_a_killed_map_goes_on_even_with_another_concurrency():
    async def main():
        store, clock, concurrency = MemoryStore(), FakeClock(), 3

        @durable.workflow(name="labels")
        async def label(count):
            return await durable.map("m", work, range(count), concurrency=concurrency)

        async with runtime(store, clock=clock, crash="after:step", nth=10) as process:
            await label.start(40, id="1")
        assert process.crashed
        assert world.most == 3
        began, concurrency = len(world.done), 5
        assert 10 <= began < 16
        world.most = world.at_work = 0
        async with runtime(store, clock=clock):
            run = durable.get_run("1")
            run.resume()
            assert await run == [f"{n} done" for n in range(40)]
            assert [step.path for step in run.steps] == [f"m[{n}]" for n in range(40)]
        assert len(world.done) <= 40 + 3
        assert world.most == 5

    asyncio.run(main())


def test_in_a_workflow_too_none_begins_after_a_failure_and_resume_goes_on():
    async def main():
        store, clock = MemoryStore(), FakeClock()
        one_try = durable.step(work, retries=0)
        world.down = {5}

        @durable.workflow(name="label")
        async def label():
            return await durable.map("m", one_try, range(40), concurrency=2)

        @durable.workflow(name="lenient")
        async def lenient():
            return [str(value) for value in await durable.map("m", one_try, range(8), on_error="collect")]

        async with runtime(store, clock=clock):
            run = label.start(id="1")
            with pytest.raises(ConnectionError, match="5 is down"):
                await run
            assert len(world.done) <= 12, "while the failure is being recorded, a few more begin"
            before = [item for item in world.done if item != 5]
            world.down = set()
            run.resume()
            assert await run == [f"{n} done" for n in range(40)]
            assert all(world.done.count(item) == 1 for item in before)
            world.down = {5}
            assert (await lenient.start(id="2"))[4:6] == ["4 done", "5 is down"]

    asyncio.run(main())


# -- bad input --------------------------------------------------------------------------------------------------------


class DataFrame:
    def __iter__(self):
        return iter(["text", "label"])


NONSENSE = [
    ({"concurrency": 0}, ValueError, r"concurrency=0\): write how many may be at work at once, 1 or more; nothing was run"),
    ({"concurrency": -3}, ValueError, "1 or more"),
    ({"concurrency": 2.5}, ValueError, "1 or more"),
    ({"concurrency": "8"}, ValueError, "1 or more"),
    ({"concurrency": True}, ValueError, "1 or more"),
    ({"concurrency": 5000, "fn": work_in_thread}, ValueError, "plain function runs in threads"),
    ({"rate": "fast"}, ValueError, "'fast' is not a rate: write how many in what time, such as '60/min'"),
    ({"rate": "0/min"}, ValueError, "is not a rate"),
    ({"rate": "-5/min"}, ValueError, "is not a rate"),
    ({"rate": "60/fortnight"}, ValueError, "is not a rate"),
    ({"rate": 60}, ValueError, "60 is not a rate"),
    ({"on_error": "ignore"}, ValueError, "write 'raise' or 'collect'"),
    ({"items": "abc"}, TypeError, "the items are a str, whose items are letters; give a list"),
    ({"items": 7}, TypeError, "the third argument is the items, a list for instance, not a int"),
    ({"items": DataFrame()}, TypeError, "a frame's items are its columns"),
    ({"items": [1, (n for n in range(3))]}, TypeError, "item 1 is a generator"),
    ({"fn": work(1)}, TypeError, "the second argument is the function"),
    ({"name": ""}, ValueError, "the step's name is empty"),
    ({"workers": 3}, TypeError, "there is no such option"),
]


@pytest.mark.parametrize(("given", "error", "message"), NONSENSE, ids=[" ".join(row[0]) for row in NONSENSE])
def test_nonsense_is_refused_before_anything_runs(path, given, error, message):
    options = {"name": "m", "fn": work, "items": range(3), **given}
    name, fn, items = (options.pop(key) for key in ("name", "fn", "items"))

    async def body():
        return await durable.map(name, fn, items, **options)

    async def main():
        async with kernel(path) as engine:
            with pytest.raises(error, match=message) as raised:
                await cell(engine, body)
            assert "\n" not in str(raised.value)
        assert world.done == []

    asyncio.run(main())
    if asyncio.iscoroutine(fn):
        fn.close()


def test_outside_a_run_and_inside_a_step_it_says_what_to_do(path):
    async def inner(item):
        return await durable.map("inner", work, [1])

    async def main():
        with pytest.raises(NotInRunError, match="%%durable NAME"):
            durable.map("m", work, [1])
        async with kernel(path) as engine:
            with pytest.raises(NestedStepError, match="inside the body of step 'm'"):
                await cell(engine, mapped([1], inner))
            with pytest.raises(NonRetryableError):
                await cell(engine, mapped([1], durable.step(refuse)))

    asyncio.run(main())


async def refuse(item):
    raise NonRetryableError("never")


# -- many rows, and a process that is killed --------------------------------------------------------------------------

ROWS = int(os.environ.get("DURABLE_NB_MAP_ROWS", "10000"))


def test_ten_thousand_rows_are_asked_once_each_though_their_process_is_killed(tmp_path):
    """With 5 % failures, 429s among them: what the server counts is one answer a row, and at most so many more as were being
    asked when the process died. The third execution asks nothing."""  # fmt: skip
    concurrency = 16

    def worker():
        command = [sys.executable, Path(__file__).with_name("map_worker.py"), tmp_path / "store", server.url]
        return subprocess.Popen([*map(str, command), str(ROWS), str(concurrency)], stdout=subprocess.PIPE, text=True)

    with ModelServer(failing=0.05) as server:
        first = worker()
        said = next(line for line in first.stdout if int(line) >= ROWS * 0.4)
        first.kill()
        first.communicate()
        answered = sum(server.answered.values())
        assert int(said) <= answered < ROWS
        second = worker()
        out, _ = second.communicate(timeout=300)
        assert second.returncode == 0, out
        told = json.loads(out.splitlines()[-1])
        assert set(server.answered.values()) <= {1, 2}
        assert len(server.answered) == ROWS
        assert sum(server.answered.values()) <= ROWS + concurrency + concurrency // 4
        assert ROWS * 1.03 < server.count < ROWS * 1.07
        assert told["asked"] <= ROWS - answered + concurrency + concurrency // 4
        assert told["grown"] < 5 * told["asked"] / 1000  # MB: the results themselves, and what the run knows of each step
    third = worker()
    out, _ = third.communicate(timeout=300)
    assert third.returncode == 0, out
    again = json.loads(out.splitlines()[-1])
    assert (again["asked"], again["digest"]) == (0, told["digest"])


@pytest.mark.kernel
def test_in_a_notebook_a_killed_map_goes_on_and_a_row_more_costs_a_row(tmp_path):
    """Stopped, killed, edited; plain functions in threads."""
    define = (
        "import time\nfrom pathlib import Path\n"
        "def label(row):\n    Path('asked').open('a').write(f'{row}\\n'); time.sleep(0.05); return row * 2"
    )
    cell = "%%durable rows\nfound = await durable.map('label', label, {rows}, concurrency=4)\nprint(sum(found))"
    asked = tmp_path / "asked"

    def lines():
        return asked.read_text().split() if asked.exists() else []

    with kernel_of(tmp_path) as nb:
        nb.run(define)
        message = nb.send(cell.format(rows="range(60)"))
        nb.wait_until(asked, lines=10)
        nb.interrupt()
        assert nb.wait(message).status == "error"
        stopped = len(lines())
        assert stopped < 60
        nb.send(cell.format(rows="range(60)"))
        nb.wait_until(asked, lines=30)
        nb.kill()
        nb.run(define)
        shown = nb.run(cell.format(rows="range(60)"))
        assert (shown.status, shown.stdout) == ("ok", f"{sum(range(60)) * 2}\n")
        assert 60 <= len(lines()) <= 60 + 4 + 1
        assert {int(line) for line in lines()} == set(range(60))
        asked.unlink()
        shown = nb.run(cell.format(rows="[60, *range(59, -1, -1)]"))
        assert shown.stdout == f"{sum(range(61)) * 2}\n"
        assert lines() == ["60"]
        assert "60 of 61 steps restored" in shown.told[-1]
