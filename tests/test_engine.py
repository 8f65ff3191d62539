"""Runs of a durable cell, driven by plain coroutines: what is kept, what runs again, when, and by whom.

The journal is the real one, on disk. A kernel's death is played by letting go of the process's lock without finishing the
run, or, for the cuts, by a journal that lets nothing through any more from one write on.
"""

from __future__ import annotations

import asyncio
import decimal
import itertools
import os
import threading
from collections.abc import Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import durable_nb as durable
from durable_nb import _records as rec
from durable_nb._clock import Instant
from durable_nb._engine import WATCH_S, Asked, Engine
from durable_nb._engine.observing import Notice
from durable_nb._engine.workflows import Workflows
from durable_nb._facts import Status
from durable_nb._store import Store
from durable_nb.errors import (
    CorruptStoreError,
    LeaseLost,
    NestedStepError,
    NonRetryableError,
    NotInRunError,
    RetryAfter,
    RunSuspended,
    StepTimeout,
    StoreError,
    UnserializableError,
    UntrustedStoreError,
)

T0 = 1_700_000_000.0


class FakeClock:
    """Time that passes only while somebody sleeps, or when it is told to."""

    def __init__(self) -> None:
        self.wall_s, self.boot, self.boot_s = T0, "boot 1", 500.0
        self.slept: list[float] = []
        self.holding = False
        self.asleep = asyncio.Event()

    def now(self) -> Instant:
        return Instant(self.wall_s, self.boot, self.boot_s)

    async def sleep(self, seconds: float) -> None:
        self.asleep.set()
        if self.holding:
            await asyncio.Event().wait()
        self.slept.append(seconds)
        self.advance(seconds)
        await asyncio.sleep(0)

    def advance(self, seconds: float) -> None:
        self.wall_s += seconds
        self.boot_s += seconds

    def reboot(self) -> None:
        self.boot, self.boot_s = self.boot + "'", 3.0

    def __reduce__(self) -> Any:  # constant: no part of a step's identity
        return FakeClock, ()


class World:
    """What bodies do to the outer world, and gates that hold them. Always the same value to a fingerprint."""

    def __init__(self) -> None:
        self.done: list[Any] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.thread_gates: dict[str, threading.Event] = {}
        self.started: dict[str, asyncio.Event] = {}
        self.clock: FakeClock | None = None
        self.times: dict[Any, float] = {}

    def __reduce__(self) -> Any:
        return World, ()

    def do(self, what: Any) -> None:
        self.done.append(what)
        if self.clock is not None:
            self.times[what] = self.clock.now().wall_s

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    def thread_gate(self, name: str) -> threading.Event:
        return self.thread_gates.setdefault(name, threading.Event())

    def start(self, name: str) -> asyncio.Event:
        return self.started.setdefault(name, asyncio.Event())


world = World()


def work(what: Any) -> str:
    world.do(what)
    return f"{what} done"


async def work_async(what: Any) -> str:
    world.do(what)
    await asyncio.sleep(0)
    return f"{what} done"


async def held_work(what: str) -> str:
    """Waits for its gate, then does it."""
    world.start(what).set()
    await world.gate(what).wait()
    world.do(what)
    return f"{what} done"


def thread_work(what: str) -> str:
    world.do(f"{what} begun")
    assert world.thread_gate(what).wait(30)
    world.do(what)
    return f"{what} done"


async def flaky(what: str, good_from: int) -> str:
    """Fails until it is tried for the `good_from`th time in the world's history."""
    world.do(what)
    if world.done.count(what) < good_from:
        raise ConnectionError(f"{what} is down")
    return f"{what} done"


async def broken(what: str) -> None:
    world.do(what)
    raise ConnectionError(f"{what} is down")


class Quiet:
    """Keeps what the user of a run is told."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def __call__(self, observation):
        if isinstance(observation, Notice) and not observation.is_advice:
            self.notices.append(observation.text)


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    world.__init__()
    yield
    for gate in world.thread_gates.values():
        gate.set()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


class Kernel(Engine):
    """One process's engine; `die` is its kill -9."""

    def die(self) -> None:
        self.store.process.end()


@asynccontextmanager
async def kernel(path, clock=None):
    store = Store(path)
    try:
        yield Kernel(store, clock=clock or FakeClock(), jitter=lambda: 0.0)
    finally:
        store.close()


async def begun(engine, *, name="cell", inputs="k", rerun=False, max_wait_s=None):
    run = await engine.begin(Asked(name, inputs, rerun=rerun))
    assert run is not None, "a live process executes this cell"
    run.quiet, run.waiting.max_wait_s = Quiet(), max_wait_s
    run.observers.subscribe(run.quiet)
    return run


async def finished(run, body):
    """Execute and finish, as the magic does."""
    status, error = Status.INTERRUPTED, ""
    coroutine = body()
    try:
        value = await run.execute(coroutine)
        status = Status.COMPLETED
    except (asyncio.CancelledError, KeyboardInterrupt, RunSuspended):
        raise
    except BaseException as raised:
        status, error = Status.FAILED, f"{type(raised).__name__}: {raised}"
        raise
    else:
        return value
    finally:
        coroutine.close()
        await run.finish(status, error)


async def cell(engine, body, **options):
    """One execution of a durable cell whose code is `body`."""
    return await finished(await begun(engine, **options), body)


async def killed(engine, body, when, **options):
    """Execute until `when` is set, then die: nothing is finished, nothing written any more."""
    run = await begun(engine, **options)
    coroutine = body()
    task = asyncio.ensure_future(run.execute(coroutine))
    waiting = asyncio.ensure_future(when.wait())
    await asyncio.wait({task, waiting}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
    assert waiting.done(), f"the cell ended before it could be killed: {task!r}"
    engine.die()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return run


async def stopped(work):
    """A KeyboardInterrupt that left a task would leave the whole loop: caught inside, and given back."""
    try:
        await work
    except KeyboardInterrupt as interrupt:
        return interrupt
    return None


async def until(condition: Callable[[], Any], what: str = "") -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail(f"waited in vain: {what or condition}")


def states(run):
    return {step.path: step.status for step in run.snapshot().steps}


# -- completed steps --------------------------------------------------------------------------------------------------


async def three_steps():
    a = await durable.run("a", work, "a")
    b = await durable.run("b", work_async, "b")
    return await durable.run("c", work, f"{a}, {b}")


@pytest.mark.parametrize("again", ["same kernel", "new kernel", "after kill"])
def test_a_completed_step_never_runs_again(path, again):
    """Neither in the same kernel, nor in a new one, nor in the successor of one that was killed after its last step."""

    async def main():
        done = asyncio.Event()

        async def and_then_waits():
            value = await three_steps()
            done.set()
            await asyncio.Event().wait()
            return value

        async with kernel(path) as first:
            if again == "after kill":
                await killed(first, and_then_waits, done)
            else:
                assert await cell(first, three_steps) == "a done, b done done"
            assert len(world.done) == 3
            if again == "same kernel":
                assert await cell(first, three_steps) == "a done, b done done"
        if again != "same kernel":
            async with kernel(path) as second:
                run = await begun(second)
                assert await finished(run, three_steps) == "a done, b done done"
                assert all(step.restored for step in run.snapshot().steps)
        assert len(world.done) == 3

    asyncio.run(main())


def test_a_result_is_on_disk_before_the_next_step_starts(path):
    """When a step's await returns, another process's journal already shows its outcome."""

    async def main():
        async with kernel(path) as engine, kernel(path) as other:

            async def body():
                for i in range(5):
                    await durable.run(f"s{i}", work, i)
                    rows = other.store.journal.scan("step/")
                    assert len(rows) == i + 1

            await cell(engine, body)

    asyncio.run(main())


@pytest.mark.parametrize("is_decorated", [False, True])
def test_a_step_is_identified_by_what_its_list_holds_when_its_body_begins(path, is_decorated):
    """Awaited where it is called, that is what it held then; else what was appended before the wait counts as well."""

    def total(items):
        world.do(list(items))
        return sum(items)

    async def body(late):
        ask = durable.step(total) if is_decorated else lambda items: durable.run("total", total, items)
        items = [1]
        first = await ask(items)
        waiting = ask(items)
        items.append(late)
        second = await waiting
        third = asyncio.ensure_future(ask(items))
        items.append(late)
        return first, second, await third

    async def main():
        async with kernel(path) as engine:
            assert await cell(engine, lambda: body(2)) == (1, 3, 5)
            assert await cell(engine, lambda: body(2)) == (1, 3, 5)
            assert await cell(engine, lambda: body(3)) == (1, 4, 7)
        assert world.done == [[1], [1, 2], [1, 2, 2], [1, 3], [1, 3, 3]]

    asyncio.run(main())


def test_equal_steps_are_counted_and_give_their_own_answers_back(path):
    """Asking twice with the same arguments gives two samples, and the same two in the same order after a restart."""

    async def sample():
        world.do("sample")
        return len(world.done)

    async def body():
        return [await durable.run("sample", sample) for _ in range(3)]

    async def main():
        async with kernel(path) as engine:
            assert await cell(engine, body) == [1, 2, 3]
        async with kernel(path) as engine:
            assert await cell(engine, body) == [1, 2, 3]
        assert len(world.done) == 3

    asyncio.run(main())


def test_equal_steps_of_two_tasks_get_their_own_answers_back_in_any_order(path):
    """Two tasks that each ask the same twice find their own samples again, whichever of them comes first."""

    async def sample():
        world.do("sample")
        return len(world.done)

    async def asks(turn, mine):
        got = []
        for _ in range(2):
            await turn[mine].acquire()
            got.append(await durable.run("sample", sample))
            turn[1 - mine].release()
        return got

    async def body_first(first):
        turn = [asyncio.Semaphore(0), asyncio.Semaphore(0)]
        turn[first].release()
        return await asyncio.gather(asks(turn, 0), asks(turn, 1))

    async def main():
        async with kernel(path) as engine:
            assert await cell(engine, lambda: body_first(0)) == [[1, 3], [2, 4]]
        async with kernel(path) as engine:
            assert await cell(engine, lambda: body_first(1)) == [[1, 3], [2, 4]]
        assert len(world.done) == 4

    asyncio.run(main())


def test_a_reordered_list_recomputes_nothing_and_a_new_row_one(path):
    def over(items):
        async def body():
            return await asyncio.gather(*(durable.run("item", work_async, i) for i in items))

        return body

    async def main():
        async with kernel(path) as engine:
            await cell(engine, over([1, 2, 3]), inputs="first")
            world.done.clear()
            assert await cell(engine, over([3, 1, 2]), inputs="second") == ["3 done", "1 done", "2 done"]
            assert world.done == []
            await cell(engine, over([3, 9, 1, 2]), inputs="third")
            assert world.done == [9]

    asyncio.run(main())


def test_an_edited_function_runs_and_the_old_one_still_hits(path):
    async def edited(what):
        world.do(f"edited {what}")
        return "edited"

    def with_(fn):
        async def body():
            return await durable.run("s", fn, "x")

        return body

    async def main():
        async with kernel(path) as engine:
            assert await cell(engine, with_(work_async)) == "x done"
            assert await cell(engine, with_(edited)) == "edited"
            assert world.done == ["x", "edited x"]
            assert await cell(engine, with_(work_async)) == "x done"
            assert world.done == ["x", "edited x"]

    asyncio.run(main())


def test_two_cells_share_no_steps(path):
    """The same step in a cell of another name is another step; names that look alike once quoted are apart too."""

    async def main():
        async with kernel(path) as engine:
            for name in ("a", "a/b", "a%2Fb", "a b", "~id a"):
                await cell(engine, three_steps, name=name)
        assert len(world.done) == 15

    asyncio.run(main())


def test_rerun_runs_every_step_anew_and_a_killed_rerun_goes_on(path):
    async def main():
        stop = asyncio.Event()

        async def two_and_stop():
            await durable.run("a", work, "a")
            stop.set()
            await durable.run("b", held_work, "b")

        async def two():
            await durable.run("a", work, "a")
            await durable.run("b", held_work, "b")

        world.gate("b").set()
        async with kernel(path) as engine:
            await cell(engine, two)
        world.gate("b").clear()
        async with kernel(path) as engine:
            await killed(engine, two_and_stop, stop, rerun=True)
        world.gate("b").set()
        assert world.done == ["a", "b", "a"]
        async with kernel(path) as engine:
            await cell(engine, two, rerun=True)
        assert world.done == ["a", "b", "a", "b"]  # the second kernel's `a` was paid for
        async with kernel(path) as engine:
            await cell(engine, two)
            assert world.done == ["a", "b", "a", "b"]
            await cell(engine, two, rerun=True)
        assert world.done == ["a", "b"] * 3

    asyncio.run(main())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_parallel_steps_are_kept_in_whatever_order_they_end(path, order, kept):
    """Killed after the first `kept` of three have ended, in any order, only the others run again, and results are in place."""

    async def body():
        return await asyncio.gather(*(durable.run("part", held_work, f"p{i}") for i in range(3)))

    async def main():
        async with kernel(path) as engine:
            run = await begun(engine)
            task = asyncio.ensure_future(run.execute(body()))
            for n, i in enumerate(order[:kept]):
                world.gate(f"p{i}").set()
                await until(lambda n=n: len(engine.store.journal.scan("step/")) == n + 1)
            engine.die()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        assert world.done == [f"p{i}" for i in order[:kept]]
        world.done.clear()
        for gate in world.gates.values():
            gate.set()
        async with kernel(path) as engine:
            assert await cell(engine, body) == ["p0 done", "p1 done", "p2 done"]
        assert sorted(world.done) == sorted(f"p{i}" for i in order[kept:])

    asyncio.run(main())


def test_large_values_come_back_from_their_own_file_and_a_missing_file_is_told_before_the_body_runs(path):
    def big():
        world.do("big")
        return os.urandom(3) + bytes(2 << 20)

    async def body():
        return await durable.run("big", big)

    async def main():
        async with kernel(path) as engine:
            value = await cell(engine, body)
        async with kernel(path) as engine:
            assert await cell(engine, body) == value
        (file,) = (path / "values").iterdir()
        file.unlink()
        async with kernel(path) as engine:
            with pytest.raises(CorruptStoreError, match=r"'big'.*not run again"):
                await cell(engine, body)
        assert world.done == ["big"]

    asyncio.run(main())


@pytest.mark.parametrize("text", ["plain", "\u00e9\U0001f600", "\udcff"])
def test_a_step_of_any_name_is_recorded(path, text):
    """Text of every kind, a lone surrogate (from a file name) included, may name a step."""

    async def body():
        return await durable.run(text, work, "x")

    async def main():
        async with kernel(path) as engine:
            await cell(engine, body)
            assert await cell(engine, body) == "x done"
        assert world.done == ["x"]

    asyncio.run(main())


# -- failures and retries ---------------------------------------------------------------------------------------------


def test_a_failed_step_is_tried_again_with_growing_pauses(path):
    async def body():
        return await durable.run("s", flaky, "s", 3)

    async def main():
        clock = FakeClock()
        async with kernel(path, clock) as engine:
            run = await begun(engine)
            assert await finished(run, body) == "s done"
            assert clock.slept == [0.5, 1.0]
            assert run.snapshot().steps[0].attempts == 3
            assert [n.split(";")[0] for n in run.quiet.notices] == [
                f"step 's' failed (attempt {i} of 4): ConnectionError: s is down" for i in (1, 2)
            ]

    asyncio.run(main())


@pytest.mark.parametrize("boot", ["same boot", "new boot"])
def test_a_pending_retry_survives_a_restart_neither_early_nor_restarted(path, boot):
    """Killed 12 s into a pause of 40 s, the next kernel waits for 28 s more and counts the first attempt."""
    slow = durable.step(flaky, backoff=40)

    async def body():
        return await durable.run("s", slow, "s", 2)

    async def main():
        clock = FakeClock()
        clock.holding = True
        async with kernel(path, clock) as engine:
            await killed(engine, body, clock.asleep)
        clock.holding = False
        clock.advance(12)
        if boot == "new boot":
            clock.reboot()
        async with kernel(path, clock) as engine:
            run = await begun(engine)
            assert await finished(run, body) == "s done"
            assert sum(clock.slept) == pytest.approx(28)
            assert run.snapshot().steps[0].attempts == 2

    asyncio.run(main())


def test_after_the_last_attempt_the_original_exception_comes_and_the_next_execution_tries_anew(path):
    async def body():
        return await durable.run("s", durable.step(broken, retries=2), "s")

    async def main():
        async with kernel(path) as engine:
            for execution in (1, 2):
                run = await begun(engine)
                with pytest.raises(ConnectionError, match="s is down") as caught:
                    await finished(run, body)
                assert any("'s'" in note and "3 attempts" in note for note in caught.value.__notes__)
                assert len(world.done) == 3 * execution
                assert states(run) == {"s": Status.FAILED}
            assert engine.store.journal.scan("try/") == []

    asyncio.run(main())


@pytest.mark.parametrize("error", [ValueError("bad"), TypeError("wrong"), NonRetryableError("no"), KeyError("k")])
def test_what_cannot_get_better_is_not_tried_again(path, error):
    kind, text = type(error), str(error)

    async def fails():
        world.do("try")
        raise kind(text)

    async def body():
        await durable.run("s", fails)

    async def main():
        async with kernel(path) as engine:
            with pytest.raises(type(error)):
                await cell(engine, body)
        assert world.done == ["try"]

    asyncio.run(main())


def test_retry_after_overrides_the_backoff(path):
    async def busy():
        world.do("busy")
        if len(world.done) == 1:
            raise RetryAfter("2m")
        return "ok"

    async def body():
        return await durable.run("s", busy)

    async def main():
        clock = FakeClock()
        async with kernel(path, clock) as engine:
            assert await cell(engine, body) == "ok"
        assert sum(clock.slept) == pytest.approx(120)
        assert max(clock.slept) <= 30  # a suspended laptop: rechecked at least every 30 s

    asyncio.run(main())


def test_an_error_whose_message_is_no_plain_text_is_retried_and_raised_as_itself(path):
    """Messages quote file names, and those may hold lone surrogates."""

    async def odd():
        world.do("odd")
        raise ConnectionError(os.fsdecode(b"/tmp/\xff"))

    async def body():
        await durable.run("s", durable.step(odd, retries=1))

    async def main():
        async with kernel(path) as engine:
            with pytest.raises(ConnectionError):
                await cell(engine, body)
        assert world.done == ["odd", "odd"]

    asyncio.run(main())


def test_a_failing_sibling_does_not_lose_what_others_have_begun(path):
    """The cell's error comes only when the body that had begun has ended; its result is kept, and none starts after that."""

    async def fails_later():
        await world.start("slow").wait()
        world.do("fails")
        raise ValueError("no")

    async def then_more():
        value = await durable.run("slow", held_work, "slow")
        await durable.run("more", work, "more")
        return value

    async def body():
        return await asyncio.gather(then_more(), durable.run("fails", fails_later))

    async def main():
        async with kernel(path) as engine:
            task = asyncio.ensure_future(cell(engine, body))
            await until(lambda: "fails" in world.done)
            await asyncio.sleep(0.05)
            assert not task.done()
            world.gate("slow").set()
            with pytest.raises(ValueError, match="no"):
                await task
        assert world.done == ["fails", "slow"]
        world.done.clear()
        async with kernel(path) as engine:
            with pytest.raises(ValueError, match="no"):
                await cell(engine, body)
        assert "slow" not in world.done

    asyncio.run(main())


def test_a_task_group_keeps_the_siblings_of_a_failed_step(path):
    """A task group cancels its other tasks, but their bodies have begun: they end and are recorded."""

    async def fails_later():
        await world.start("slow").wait()
        raise ValueError("no")

    async def body():
        async with asyncio.TaskGroup() as group:
            group.create_task(durable.run("slow", held_work, "slow"))
            group.create_task(durable.run("fails", fails_later))

    async def main():
        async with kernel(path) as engine:
            task = asyncio.ensure_future(cell(engine, body))
            await world.start("slow").wait()
            await asyncio.sleep(0.05)
            world.gate("slow").set()
            with pytest.raises(ExceptionGroup):
                await task
            assert len(engine.store.journal.scan("step/")) == 1

    asyncio.run(main())


def test_a_result_that_cannot_be_stored_is_named_and_not_recorded(path):
    def socket():
        world.do("socket")
        return threading.Lock()

    async def body():
        await durable.run("connect", socket)

    async def main():
        async with kernel(path) as engine:
            for executions in (1, 2):
                with pytest.raises(UnserializableError, match="'connect' of cell 'cell' returned a lock") as caught:
                    await cell(engine, body)
                assert "pickle" in str(caught.value)
                assert len(world.done) == executions

    asyncio.run(main())


async def failing(work):
    try:
        await work
    except BaseException as error:
        return error
    return None


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration, SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("threaded", [False, True])
def test_an_odd_exception_out_of_a_body_ends_the_cell_and_nothing_else(path, kind, threaded):
    """It is not recorded, the loop (the kernel) lives on, and the next cell runs."""

    def odd():
        world.do("odd")
        raise kind

    async def body():
        return await durable.run("odd", durable.step(odd, thread=threaded, retries=0))

    async def main():
        async with kernel(path) as engine:
            with pytest.raises(BaseException):  # noqa: B017  which one is not promised
                async with asyncio.timeout(5):
                    await cell(engine, body)
            assert engine.store.journal.scan("step/") == []
            assert await cell(engine, three_steps) == "a done, b done done"

    asyncio.run(main())


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_the_cells_own_exit_ends_the_cell_and_not_the_loop(path, kind):
    """sys.exit() in a cell is shown and nothing more, as it is plainly: the kernel goes on, finished steps are kept."""

    async def exits():
        await three_steps()
        raise kind

    async def main():
        async with kernel(path) as engine:
            assert await asyncio.wait_for(failing(cell(engine, exits)), 5)
            assert await cell(engine, three_steps) == "a done, b done done"
        assert len(world.done) == 3

    asyncio.run(main())


def test_a_step_has_one_idempotency_key_over_attempts_and_kernels(path):
    async def charge(what):
        world.do((what, durable.idempotency_key()))
        if len(world.done) < 4:
            raise ConnectionError
        return "ok"

    async def body():
        await durable.run("s", durable.step(charge, retries=1, backoff=0), 1)
        await durable.run("s", charge, 2)

    async def main():
        for _ in range(2):
            async with kernel(path) as engine:
                with suppress(ConnectionError):
                    await cell(engine, body)
        first, second = {k for w, k in world.done if w == 1}, {k for w, k in world.done if w == 2}
        assert [len(first), len(second)] == [1, 1]
        assert first != second
        async with kernel(path) as engine:
            await cell(engine, body, rerun=True)
        assert len({k for w, k in world.done if w == 1}) == 2, "a rerun charges anew"

    asyncio.run(main())


# -- interrupts -------------------------------------------------------------------------------------------------------


async def one_then_held():
    await durable.run("a", work, "a")
    try:
        return await durable.run("b", held_work, "b")
    except Exception:  # what a user's cell may do; an interrupt must get through
        return "swallowed"


def test_an_interrupt_keeps_finished_steps_and_an_interrupted_async_body_runs_again(path):
    async def main():
        async with kernel(path) as engine:
            run = await begun(engine)
            task = asyncio.ensure_future(stopped(finished(run, one_then_held)))
            await world.start("b").wait()
            run.interrupt()
            assert isinstance(await task, KeyboardInterrupt)
            assert states(run) == {"a": Status.COMPLETED, "b": Status.INTERRUPTED}
            assert world.done == ["a"]
            world.gate("b").set()
            assert await cell(engine, one_then_held) == "b done"
            assert world.done == ["a", "b"]

    asyncio.run(main())


def test_a_body_that_a_cancelled_wait_gave_up_is_paid_for_and_recorded(path):
    """The code goes on at once; the cell's end waits for the body, whose outcome is there when it is asked for again."""

    async def body():
        try:
            return await asyncio.wait_for(durable.run("b", held_work, "b"), 0.01)
        except TimeoutError:
            world.gate("b").set()
            return "gave up"

    async def main():
        async with kernel(path) as engine:
            assert await cell(engine, body) == "gave up"
            assert len(engine.store.journal.scan("step/")) == 1
            assert await cell(engine, body) == "b done"
        assert world.done == ["b"]

    asyncio.run(main())


async def interrupted(engine, body, ready):
    run = await begun(engine)
    task = asyncio.ensure_future(stopped(finished(run, body)))
    await until(lambda: run.snapshot().steps and ready())
    await asyncio.sleep(0.02)
    run.interrupt()
    assert isinstance(await task, KeyboardInterrupt)


async def one_thread():
    return await durable.run("t", thread_work, "t")


def test_a_thread_that_outlives_an_interrupt_is_recorded_when_it_ends(path):
    """And the run is free then: another kernel takes it, and runs nothing again."""

    async def main():
        async with kernel(path) as engine, kernel(path) as other:
            await interrupted(engine, one_thread, lambda: world.done == ["t begun"])
            assert await other.begin(Asked("cell", "k")) is None
            world.thread_gate("t").set()
            await until(lambda: engine.store.journal.scan("step/"), "the outcome")
            await until(lambda: not engine.ownership.held, "the lease let go")
            assert await cell(other, one_thread) == "t done"
        assert world.done == ["t begun", "t"]

    asyncio.run(main())


def test_running_the_cell_again_attaches_to_a_living_thread(path):
    async def main():
        async with kernel(path) as engine:
            for _ in range(2):
                await interrupted(engine, one_thread, lambda: "t begun" in world.done)
            task = asyncio.ensure_future(cell(engine, one_thread))
            await asyncio.sleep(0.05)
            assert not task.done()
            world.thread_gate("t").set()
            assert await task == "t done"
            assert await cell(engine, one_thread) == "t done"
        assert world.done == ["t begun", "t"]

    asyncio.run(main())


def test_every_thread_that_outlives_its_interrupt_is_recorded(path):
    """Threads of two interrupted executions of one run: the first to end must not give the run away under the other."""

    async def both():
        return await asyncio.gather(one_thread(), durable.run("u", thread_work, "u"))

    async def main():
        async with kernel(path) as engine:
            await interrupted(engine, one_thread, lambda: "t begun" in world.done)
            await interrupted(engine, both, lambda: "u begun" in world.done)
            world.thread_gate("t").set()
            await until(lambda: len(engine.store.journal.scan("step/")) == 1)
            await asyncio.sleep(0.05)
            world.thread_gate("u").set()
            await until(lambda: not engine.bodies)
            assert await cell(engine, both) == ["t done", "u done"]
        assert sorted(world.done) == ["t", "t begun", "u", "u begun"]

    asyncio.run(main())


def test_a_thread_that_fails_after_an_interrupt_is_tried_again_by_the_next_execution(path):
    def fails_late():
        world.do("begun")
        assert world.thread_gate("f").wait(30)
        if len(world.done) == 1:
            raise ConnectionError("late")
        return "ok"

    async def body():
        return await durable.run("f", durable.step(fails_late, backoff=1))

    async def main():
        async with kernel(path) as engine:
            await interrupted(engine, body, lambda: world.done == ["begun"])
            world.thread_gate("f").set()
            await until(lambda: not engine.bodies)
            assert await cell(engine, body) == "ok"
        assert len(world.done) == 2

    asyncio.run(main())


def test_an_interrupt_before_the_first_step_of_the_loop_ends_the_cell(path):
    async def main():
        async with kernel(path) as engine:
            run = await begun(engine)
            run.stop(KeyboardInterrupt())
            coroutine = three_steps()
            assert isinstance(await stopped(run.execute(coroutine)), KeyboardInterrupt)
            coroutine.close()
            await run.finish(Status.INTERRUPTED)
        assert world.done == []

    asyncio.run(main())


# -- verbs in the wrong place -----------------------------------------------------------------------------------------


def test_a_verb_inside_a_body_is_refused_also_after_an_await(path):
    async def nests():
        world.do("nests")
        await asyncio.sleep(0)
        await durable.run("inner", work, "inner")

    async def nests_in_a_task():
        await asyncio.create_task(nests())

    def nests_in_a_thread():
        durable.sleep("inner", 1)

    async def main():
        async with kernel(path) as engine:
            for fn in (nests, nests_in_a_task, nests_in_a_thread):

                async def body(fn=fn):
                    await durable.run("outer", fn)

                with pytest.raises(NestedStepError, match="'outer'"):
                    await cell(engine, body)
        assert "inner" not in world.done

    asyncio.run(main())


def test_a_verb_outside_any_run_is_refused_and_says_what_to_add(path):
    async def main():
        with pytest.raises(NotInRunError, match="%%durable NAME"):
            durable.run("a", work, "a")
        with pytest.raises(NotInRunError, match="%%durable NAME"):
            durable.sleep("a", 1)
        async with kernel(path) as engine:
            await cell(engine, three_steps)
            with pytest.raises(NotInRunError):
                durable.run("a", work, "a")

    asyncio.run(main())


def test_a_task_that_outlives_its_cell_cannot_ask_for_steps(path):
    async def main():
        gate, tasks = asyncio.Event(), []

        async def late():
            await gate.wait()
            return await durable.run("late", work, "late")

        async def body():
            tasks.append(asyncio.create_task(late()))
            return await durable.run("a", work, "a")

        async with kernel(path) as engine:
            await cell(engine, body)
            gate.set()
            with pytest.raises(NotInRunError, match=r"'late'.*outlived cell 'cell'"):
                await tasks[0]
        assert world.done == ["a"]

    asyncio.run(main())


def test_context_variables_set_by_the_cell_hold_after_it(path):
    from decimal import getcontext, localcontext

    async def body():
        getcontext().prec = 11
        await durable.run("a", work, "a")

    async def main():
        with localcontext():
            async with kernel(path) as engine:
                await cell(engine, body)
            assert getcontext().prec == 11

    asyncio.run(main())


# -- timers -----------------------------------------------------------------------------------------------------------


def pausing(duration):
    async def body():
        await durable.sleep("pause", duration)
        return await durable.run("after", work, "after")

    return body


async def killed_while_asleep(path, clock, body):
    clock.holding, clock.asleep = True, asyncio.Event()
    async with kernel(path, clock) as engine:
        await killed(engine, body, clock.asleep)
    clock.holding = False


@pytest.mark.parametrize("boot", ["same boot", "new boot"])
@pytest.mark.parametrize("away_s", [0, 100, 3599, 3600, 90_000])
def test_a_timer_is_neither_early_nor_lengthened_by_a_restart(path, boot, away_s):
    async def main():
        clock = FakeClock()
        await killed_while_asleep(path, clock, pausing("1h"))
        clock.advance(away_s)
        if boot == "new boot":
            clock.reboot()
        async with kernel(path, clock) as engine:
            assert await cell(engine, pausing("1h")) == "after done"
        assert clock.wall_s == pytest.approx(T0 + max(3600, away_s))
        assert max(clock.slept, default=0) <= 30

    asyncio.run(main())


@pytest.mark.parametrize("set_by_s", [-86_400, 86_400])
def test_setting_the_wall_clock_changes_no_timer_within_one_boot(path, set_by_s):
    async def main():
        clock = FakeClock()
        await killed_while_asleep(path, clock, pausing("1h"))
        clock.advance(600)
        clock.wall_s += set_by_s
        async with kernel(path, clock) as engine:
            await cell(engine, pausing("1h"))
        assert sum(clock.slept) == pytest.approx(3000)

    asyncio.run(main())


def test_a_wall_clock_set_back_across_boots_waits_at_most_the_original_duration(path):
    async def main():
        clock = FakeClock()
        await killed_while_asleep(path, clock, pausing("1h"))
        clock.wall_s -= 1_000_000
        clock.reboot()
        async with kernel(path, clock) as engine:
            await cell(engine, pausing("1h"))
        assert sum(clock.slept) == pytest.approx(3600)

    asyncio.run(main())


def test_many_restarts_and_boots_do_not_lengthen_a_timer(path):
    async def main():
        clock = FakeClock()
        for boot in (False, True, False, True, True, False):
            if boot:
                clock.reboot()
            await killed_while_asleep(path, clock, pausing("1h"))
            clock.advance(100)
        async with kernel(path, clock) as engine:
            await cell(engine, pausing("1h"))
        assert clock.wall_s == pytest.approx(T0 + 3600)

    asyncio.run(main())


def test_a_duration_edited_after_a_boot_counts_from_the_first_asking_too(path):
    async def main():
        clock = FakeClock()
        for _ in range(2):
            await killed_while_asleep(path, clock, pausing("1h"))
            clock.advance(600)
            clock.reboot()
        async with kernel(path, clock) as engine:
            await cell(engine, pausing("2h"))
        assert clock.wall_s == pytest.approx(T0 + 7200)

    asyncio.run(main())


def test_a_wall_clock_set_back_across_boots_does_not_lengthen_a_retry(path):
    slow = durable.step(flaky, backoff=40)

    async def body():
        return await durable.run("s", slow, "s", 2)

    async def main():
        clock = FakeClock()
        await killed_while_asleep(path, clock, body)
        clock.wall_s -= 1_000_000
        clock.reboot()
        async with kernel(path, clock) as engine:
            assert await cell(engine, body) == "s done"
        assert sum(clock.slept) == pytest.approx(40)

    asyncio.run(main())


@pytest.mark.parametrize(("edited", "left_s"), [("2h", 6600), ("15m", 300), ("5m", 0)])
def test_an_edited_duration_counts_from_the_first_asking(path, edited, left_s):
    async def main():
        clock = FakeClock()
        await killed_while_asleep(path, clock, pausing("1h"))
        clock.advance(600)
        async with kernel(path, clock) as engine:
            await cell(engine, pausing(edited), inputs="the cell was edited")
        assert sum(clock.slept) == pytest.approx(left_s)

    asyncio.run(main())


def test_timers_belong_to_the_attempt_and_start_anew_once_the_cell_completed(path):
    async def main():
        clock = FakeClock()
        async with kernel(path, clock) as engine:
            for _ in range(2):
                clock.slept.clear()
                await cell(engine, pausing("1h"))
                assert sum(clock.slept) == pytest.approx(3600)

    asyncio.run(main())


def test_sleep_until_goes_by_the_wall_clock(path):
    async def body():
        await durable.sleep_until("until", datetime.fromtimestamp(T0 + 500).astimezone())
        return world.do("woken")

    async def main():
        world.clock = clock = FakeClock()
        await killed_while_asleep(path, clock, body)
        clock.advance(100)
        clock.reboot()
        async with kernel(path, clock) as engine:
            await cell(engine, body)
        assert world.times["woken"] == pytest.approx(T0 + 500)

    asyncio.run(main())


def test_two_sleeps_of_one_name_are_two(path):
    async def body():
        await durable.sleep("nap", 10)
        await durable.sleep("nap", 20)

    async def main():
        clock = FakeClock()
        async with kernel(path, clock) as engine:
            await cell(engine, body)
        assert clock.slept == [10, 20]

    asyncio.run(main())


# -- suspension -------------------------------------------------------------------------------------------------------


def test_a_wait_longer_than_max_wait_suspends_and_the_next_execution_goes_on(path):
    """RunSuspended outside, CancelledError inside, which `except Exception` doesn't swallow."""

    async def body():
        await durable.run("a", work, "a")
        try:
            await durable.sleep("pause", "1h")
        except Exception:
            return "swallowed"
        except BaseException as error:
            world.do(type(error))
            raise
        return "done"

    async def main():
        clock = FakeClock()
        async with kernel(path, clock) as engine:
            run = await begun(engine, max_wait_s=60)
            with pytest.raises(RunSuspended, match=r"'cell' sleeps 'pause' until .*run this cell again"):
                await finished(run, body)
            assert world.done == ["a", asyncio.CancelledError]
            assert clock.slept == []
        clock.advance(3550)
        async with kernel(path, clock) as engine:
            assert await cell(engine, body, max_wait_s=60) == "done"
        assert sum(clock.slept) == pytest.approx(50)

    asyncio.run(main())


def test_a_suspension_lets_bodies_that_have_begun_end(path):
    async def body():
        await asyncio.gather(durable.run("b", held_work, "b"), sleeps())

    async def sleeps():
        await world.start("b").wait()
        await durable.sleep("pause", "1h")

    async def main():
        async with kernel(path) as engine:
            task = asyncio.ensure_future(cell(engine, body, max_wait_s=0))
            await world.start("b").wait()
            await asyncio.sleep(0.05)
            assert not task.done()
            world.gate("b").set()
            with pytest.raises(RunSuspended):
                await task
            assert len(engine.store.journal.scan("step/")) == 1

    asyncio.run(main())


def test_a_retry_later_than_max_wait_suspends_too(path):
    async def body():
        return await durable.run("s", durable.step(flaky, backoff=300), "s", 2)

    async def main():
        clock = FakeClock()
        async with kernel(path, clock) as engine:
            with pytest.raises(RunSuspended, match="try step 's' again"):
                await cell(engine, body, max_wait_s=10)
            clock.advance(300)
            assert await cell(engine, body, max_wait_s=10) == "s done"

    asyncio.run(main())


# -- one executor -----------------------------------------------------------------------------------------------------


def test_a_live_run_is_never_given_away_and_a_dead_one_at_once(path):
    async def main():
        async with kernel(path) as first, kernel(path) as second:
            run = await begun(first)
            task = asyncio.ensure_future(run.execute(one_then_held()))
            await world.start("b").wait()
            assert await second.begin(Asked("cell", "k")) is None
            assert await first.begin(Asked("cell", "k")) is None
            other = await second.begin(Asked("cell", "other inputs"))  # its own run
            assert other is not None
            assert other.id != run.id
            await other.finish(Status.COMPLETED)
            first.die()
            taken = await second.begin(Asked("cell", "k"))
            assert taken is not None
            assert taken.id == run.id
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    asyncio.run(main())


@pytest.mark.parametrize("ends", [Status.COMPLETED, Status.FAILED, Status.INTERRUPTED])
def test_the_late_commit_of_one_that_was_succeeded_raises_lease_lost(path, ends):
    """Its result is refused, `execute` raises LeaseLost, and afterwards the same kernel can execute the cell again."""

    async def main():
        async with kernel(path) as first, kernel(path) as second:
            run = await begun(first)
            task = asyncio.ensure_future(finished(run, one_then_held))
            await world.start("b").wait()
            first.die()  # its lock is gone, its code goes on
            taken = await begun(second)
            world.gate("b").set()
            with pytest.raises(LeaseLost, match="taken over"):
                await task
            assert len(second.store.journal.scan("step/")) == 1
            await taken.finish(ends)
            async with asyncio.timeout(5):
                assert await cell(first, one_then_held) == "b done"

    asyncio.run(main())


def test_two_kernels_that_start_the_same_cell_at_once_execute_it_once(path):
    """Run All in two kernels: one runs, the other is told to wait."""

    async def main():
        async with kernel(path) as first, kernel(path) as second:
            barrier = threading.Barrier(2)
            for engine in (first, second):

                def look(scope, _look=engine._unfinished, **options):
                    found = _look(scope, **options)
                    with suppress(threading.BrokenBarrierError):
                        barrier.wait(1)  # both have looked before either claims
                    return found

                engine._unfinished = look
            runs = await asyncio.gather(first.begin(Asked("cell", "k")), second.begin(Asked("cell", "k")))
            assert sum(run is not None for run in runs) == 1

    asyncio.run(main())


def test_two_executions_in_one_kernel_at_once_execute_once(path):
    """A subshell may start the same cell while it is being started."""

    async def main():
        async with kernel(path) as engine:
            runs = await asyncio.gather(engine.begin(Asked("cell", "k")), engine.begin(Asked("cell", "k")))
            assert sum(run is not None for run in runs) == 1

    asyncio.run(main())


def test_of_two_that_do_one_step_at_once_the_first_outcome_stands_for_both(path):
    """Two kernels with other inputs of one cell may both run a step; what is recorded first is what both get."""

    async def sample():
        world.do("sample")
        mine = len(world.done)
        await world.gate(f"sample {mine}").wait()
        return mine

    async def body():
        return await durable.run("sample", sample)

    async def main():
        async with kernel(path) as first, kernel(path) as second:
            tasks = [asyncio.ensure_future(cell(engine, body, inputs=str(n))) for n, engine in enumerate((first, second))]
            await until(lambda: len(world.done) == 2)
            world.gate("sample 2").set()
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            world.gate("sample 1").set()
            assert await asyncio.gather(*tasks) == [2, 2]
            assert await cell(first, body) == 2
        assert len(world.done) == 2

    asyncio.run(main())


def test_what_is_recorded_in_passing_is_kept_where_the_commit_that_it_rides_with_comes_second(path):
    """Nothing is written of the commit of a step that another kernel has recorded first."""
    numbers = []

    async def sample():
        world.do("sample")
        await world.gate(f"sample {len(world.done)}").wait()
        return 7

    async def slower():
        asking = asyncio.create_task(durable.run("sample", sample))
        await world.start("asked").wait()
        numbers.append(durable.random())
        await asking
        await durable.run("held", held_work, "held")

    async def faster():
        return await durable.run("sample", sample)

    async def main():
        async with kernel(path) as first, kernel(path) as second:
            run = await begun(first, inputs="1")
            task = asyncio.ensure_future(stopped(finished(run, slower)))
            await until(lambda: len(world.done) == 1)
            other = asyncio.ensure_future(cell(second, faster, inputs="2"))
            await until(lambda: len(world.done) == 2)
            world.gate("sample 2").set()
            assert await other == 7
            world.start("asked").set()
            await until(lambda: numbers)
            world.gate("sample 1").set()
            await world.start("held").wait()
            run.interrupt()
            assert isinstance(await task, KeyboardInterrupt)
            world.gate("held").set()
            await cell(first, slower, inputs="1")
        assert numbers[0] == numbers[1]

    asyncio.run(main())


def test_a_run_killed_between_its_entry_and_its_end_is_closed(path):
    """Left open, its timers would count for the next inputs."""

    async def main():
        clock, done = FakeClock(), asyncio.Event()

        async def body():
            await durable.sleep("pause", 60)
            done.set()
            await asyncio.Event().wait()

        async def short():
            await durable.sleep("pause", 60)

        async with kernel(path, clock) as engine:
            await killed(engine, body, done)
        async with kernel(path, clock) as engine:
            await engine.close_finished(Asked("cell", "k"))
            assert engine.store.journal.scan("open/") == []
            clock.slept.clear()
            await cell(engine, short, inputs="next week")
            assert sum(clock.slept) == 60

    asyncio.run(main())


# -- steps that change what they are given ------------------------------------------------------------------------------


class Agent:
    def __init__(self):
        self.heard = []

    def ask(self, question):
        world.do(question)
        self.heard.append([question, len(self.heard)])
        return len(self.heard)


def ask_list(history, question):
    world.do(question)
    history.append(question)
    return history


def ask_dict(history, question):
    world.do(question)
    history[question] = {"n": len(history)}


def ask_array(history, question):
    world.do(question)
    history[history.argmin()] = len(question)
    return float(history.sum())


def numbers():
    import numpy as np

    return np.zeros(4)


CONVERSATIONS = {
    "list": (list, lambda history: (ask_list, history)),
    "dict": (dict, lambda history: (ask_dict, history)),
    "object": (Agent, lambda agent: (agent.ask,)),
    "array": (numbers, lambda history: (ask_array, history)),
    "nested": (lambda: {"a": [[]]}, lambda history: (ask_list, history["a"][0])),
}
QUESTIONS = ["one", "three", "sixteen"]


def plain(value):
    return vars(value) if isinstance(value, Agent) else value.tolist() if hasattr(value, "tolist") else value


@pytest.mark.parametrize(("new", "ask"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_restored_step_changes_its_arguments_as_its_body_did(path, new, ask):
    """A conversation that grows by each answer: killed and gone on with, no question is asked again, and none is missing."""
    ended = []

    def conversation(questions, held=False):
        async def body():
            history = new()
            for question in questions:
                await durable.run("ask", *ask(history), question)
            if held:
                world.start("held").set()
                await asyncio.Event().wait()
            ended.append(plain(history))

        return body

    async def main():
        history = new()
        for question in QUESTIONS:
            fn, *given = ask(history)
            fn(*given, question)
        world.done.clear()
        async with kernel(path) as engine:
            await killed(engine, conversation(QUESTIONS[:2], held=True), world.start("held"))
        async with kernel(path) as engine:
            run = await begun(engine)
            await finished(run, conversation(QUESTIONS))
            assert run.restoring.unrepeated == []
        assert ended == [plain(history)]
        assert world.done == QUESTIONS

    asyncio.run(main())


@pytest.mark.parametrize(("new", "ask"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_gone_on_with_in_the_same_kernel_a_conversation_asks_nothing_again_and_says_nothing_twice(path, new, ask):
    """The cell failed and was mended; what it talked about was made in an earlier cell and is as the failure left it."""
    history, expected = new(), new()

    def conversation(questions, then=lambda: None):
        async def body():
            for question in questions:
                await durable.run("ask", *ask(history), question)
            then()

        return body

    def fail():
        raise RuntimeError("later")

    async def main():
        for question in QUESTIONS:
            fn, *given = ask(expected)
            fn(*given, question)
        world.done.clear()
        async with kernel(path) as engine:
            for _ in range(2):
                with pytest.raises(RuntimeError, match="later"):
                    await cell(engine, conversation(QUESTIONS[:2], fail))
            run = await begun(engine)
            await finished(run, conversation(QUESTIONS))
            assert [name for name, _ in run.restoring.unrepeated] == ["ask", "ask"]
            assert plain(history) == plain(expected)
            assert world.done == QUESTIONS
            await cell(engine, conversation(QUESTIONS[:1]))  # a new run, with what is there now
        assert world.done == [*QUESTIONS, "one"]

    asyncio.run(main())


def test_what_the_code_changes_between_the_call_and_the_await_is_what_the_step_gets(path):
    async def main():
        async with kernel(path) as engine:
            for x, wanted in ((2, ["a"]), (2, ["a"]), (5, ["a", "a"])):

                async def body(x=x):
                    history = [1]
                    step = durable.run("ask", ask_list, history, "a")
                    history.append(x)
                    return list(await step), history

                assert await cell(engine, body) == ([1, x, "a"], [1, x, "a"])
                assert world.done == wanted

    asyncio.run(main())


def test_an_object_that_somebody_else_changed_meanwhile_is_another_input(path):
    history = []

    async def body():
        await durable.run("ask", ask_list, history, "a")
        raise RuntimeError("later")

    async def main():
        async with kernel(path) as engine:
            for _ in range(2):
                with pytest.raises(RuntimeError, match="later"):
                    await cell(engine, body)
            history.append("mine")
            with pytest.raises(RuntimeError, match="later"):
                await cell(engine, body)
        assert history == ["a", "mine", "a"]

    asyncio.run(main())


def test_what_a_step_returns_is_the_argument_that_it_was(path):
    async def body():
        history = []
        again = await durable.run("ask", ask_list, history, "a")
        again.append("b")
        return history, again is history

    async def main():
        for _ in range(2):
            async with kernel(path) as engine:
                assert await cell(engine, body) == (["a", "b"], True)
        assert world.done == ["a"]

    asyncio.run(main())


def test_two_arguments_that_share_an_object_share_it_still(path):
    def mix(one, other):
        world.do("mix")
        one.append(other)
        other.append(1)

    async def body():
        one, other = [], []
        await durable.run("mix", mix, one, other)
        other.append(2)
        return one

    async def main():
        for _ in range(2):
            async with kernel(path) as engine:
                assert await cell(engine, body) == [[1, 2]]
        assert world.done == ["mix"]

    asyncio.run(main())


def test_of_parallel_steps_that_change_one_object_nobody_knows_whose_change_is_whose(path):
    """The cell is told: it is not to be stored, since its variables are not what plain execution would have left."""

    async def ask(history, what):
        await held_work(what)
        history.append(what)

    async def body():
        history = []
        await asyncio.gather(*(durable.run("ask", ask, history, what) for what in "ab"))

    async def main():
        world.gate("a").set()
        world.gate("b").set()
        async with kernel(path) as engine:
            await cell(engine, body)
        async with kernel(path) as engine:
            run = await begun(engine)
            await finished(run, body)
            assert run.restoring.unrepeated == 2 * [("ask", "history not, which it changes")]
        assert sorted(world.done) == ["a", "b"]

    asyncio.run(main())


def test_what_cannot_be_put_back_is_told(path):
    def spoil(odd):
        world.do("spoil")
        odd.prec = 5

    async def body():
        odd = decimal.Context(prec=9)  # an object of C code
        await durable.run("spoil", spoil, odd)

    async def main():
        for n in range(2):
            async with kernel(path) as engine:
                run = await begun(engine)
                await finished(run, body)
                assert run.restoring.unrepeated == n * [("spoil", "odd not, which it changes")]
        assert world.done == ["spoil"]

    asyncio.run(main())


# -- records that are not ours ----------------------------------------------------------------------------------------


def test_records_signed_by_another_key_are_refused_before_any_body_runs(path, tmp_path, monkeypatch):
    async def main():
        async with kernel(path) as engine:
            await cell(engine, three_steps)
        world.done.clear()
        monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "another.key"))
        async with kernel(path) as engine:
            with pytest.raises(UntrustedStoreError, match="DURABLE_NB_KEY_FILE"):
                await cell(engine, three_steps)
        assert world.done == []

    asyncio.run(main())


@pytest.mark.parametrize("what", ["another key", "damage"])
def test_a_single_step_that_is_not_ours_is_refused_by_name_and_rerun_helps(path, what):
    from durable_nb._codec import Signer
    from durable_nb._journal import Commit

    async def main():
        async with kernel(path) as engine:
            await cell(engine, three_steps)
            key, row = engine.store.journal.scan("step/")[0]
            name = rec.unpack(engine.store.signer, key, row, rec.Outcome).name
            forged = Signer(b"x" * 32).sign(key, row[24:]) if what == "another key" else row[:-1] + bytes([row[-1] ^ 1])
            engine.store.journal.apply([Commit(puts=((key, forged),))])
        world.done.clear()
        async with kernel(path) as engine:
            kind = UntrustedStoreError if what == "another key" else CorruptStoreError
            with pytest.raises(kind, match=f"step '{name}'.*--rerun"):
                await cell(engine, three_steps)
            assert name not in world.done
            assert await cell(engine, three_steps, rerun=True) == "a done, b done done"

    asyncio.run(main())


def test_a_store_that_cannot_be_written_says_so_and_loses_nothing(path):
    """The step's own commit fails: StoreError, no record; with the disk back, the cell goes on."""

    async def main():
        async with kernel(path) as engine:
            real, broken_from = engine.store.journal.apply, [2]

            def apply(commits):
                broken_from[0] -= 1
                if broken_from[0] < 0:
                    raise StoreError("no space left")
                return real(commits)

            engine.store.journal.apply = apply
            run = await begun(engine)
            with pytest.raises(StoreError, match="no space"):
                await run.execute(three_steps())
            with pytest.raises(StoreError, match="no space"):
                await run.finish(Status.FAILED)
            assert world.done == ["a", "b"]
            broken_from[0] = 1000
            assert await cell(engine, three_steps) == "a done, b done done"
            assert world.done == ["a", "b", "b", "a done, b done"]

    asyncio.run(main())


# -- cut at every write -----------------------------------------------------------------------------------------------


@dataclass
class CutJournal:
    """Lets `limit` writes through whole; at the next one the process dies, before or after the write."""

    inner: Any
    limit: int
    lands: bool
    dead: asyncio.Event
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    buried: threading.Event = field(default_factory=threading.Event)
    is_dead: bool = False

    def apply(self, commits):
        if self.is_dead:
            raise StoreError("killed")
        if self.limit > 0:
            self.limit -= 1
            return self.inner.apply(commits)
        if self.lands:
            self.inner.apply(commits)
        self.is_dead = True
        self.loop.call_soon_threadsafe(self.dead.set)
        assert self.buried.wait(30)
        raise StoreError("killed")

    def __getattr__(self, name):
        return getattr(self.inner, name)


async def life(path, clock, body, limit, lands):
    """One kernel that dies at its write number `limit` + 1: (ended by itself, its result)."""
    async with kernel(path, clock) as engine:
        journal = CutJournal(engine.store.journal, limit, lands, asyncio.Event())
        engine.store.journal = engine.store.writer.journal = journal
        kill = asyncio.ensure_future(journal.dead.wait())
        coroutines = []

        async def whole():
            run = await begun(engine)
            coroutines.append(body())
            value = await run.execute(coroutines[-1])
            await run.finish(Status.COMPLETED)
            return value

        task = asyncio.ensure_future(whole())
        await asyncio.wait({task, kill}, return_when=asyncio.FIRST_COMPLETED, timeout=30)
        if journal.is_dead:
            engine.die()
            task.cancel()
            with suppress(asyncio.CancelledError, StoreError):
                await task
            journal.buried.set()
            for coroutine in coroutines:
                coroutine.close()
            return False, None
        kill.cancel()
        return True, await task


def recorded(path):
    """The steps whose outcome is on disk, by name; and is there a run that completed, with none open?"""
    store = Store(path)
    try:
        rows = store.journal.scan("step/")
        completed = bool(store.journal.scan("run/")) and not store.journal.scan("open/")
        return {rec.unpack(store.signer, key, row, rec.Outcome).name for key, row in rows}, completed
    finally:
        store.close()


told: list[str] = []
"""Steps whose result the cell has seen."""


async def ask(name, fn, *args):
    value = await durable.run(name, fn, *args)
    told.append(name)
    return value


async def sequence():
    a = await ask("a", work, "a")
    b = await ask("b", work_async, "b")
    await ask("c", work, "c")
    return [a, b, await ask("d", work_async, "d")]


async def gathered():
    return await asyncio.gather(*(ask(f"s{i}", fn, f"s{i}") for i in range(3) for fn in [(work_async, work)[i % 2]]))


async def retried():
    first = await ask("first", work, "first")
    return [first, await ask("flaky", flaky, "flaky", 3), await ask("last", work_async, "last")]


async def slept():
    before = await ask("before", work, "before")
    await durable.sleep("pause", "1h")
    return [before, await ask("after", work, "after")]


async def everything():
    async def branch():
        await durable.sleep("short", 5)
        return [await ask(f"b{i}", work, f"b{i}") for i in range(2)]

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(c) for c in (branch(), retried(), slept())]
    return [task.result() for task in tasks]


SHAPES = [sequence, gathered, retried, slept, everything]


async def lives(path, shape, cuts):
    """Die at each of `cuts`, then live on: (the result, were all cuts reached, the clock). No recorded step runs again.

    The clock is None where a life ended after its run was completed: the next execution has timers of its own then.
    """
    clock = world.clock = FakeClock()
    reached = anew = False
    for limit, lands in [*cuts, (10_000, True)]:
        kept, completed = recorded(path)
        anew |= completed
        assert set(told) <= kept, "a result was handed out that is not on disk"
        before = len(world.done)
        ended, value = await life(path, clock, shape, limit, lands)
        again = {what for what in world.done[before:] if what in kept}
        assert not again, f"{again} ran again after {cuts}"
        clock.advance(7)
        if ended:
            reached = (limit, lands) == (10_000, True)
            break
    assert set(told) <= recorded(path)[0]
    return value, reached, None if anew else clock


@pytest.mark.parametrize("lands", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("shape", SHAPES)
def test_killed_at_any_write_the_cell_resumes_and_repeats_nothing(tmp_path, shape, lands):
    """For every single write of the run: cut before or after it, resume in a new kernel, same outcome, no step twice."""
    expected, _, _ = asyncio.run(lives(tmp_path / "whole", shape, []))
    for limit in itertools.count():
        world.__init__()
        told.clear()
        value, reached, clock = asyncio.run(lives(tmp_path / f"cut{limit}", shape, [(limit, lands)]))
        assert value == expected
        if shape is slept and clock is not None:
            assert world.times["after"] - T0 >= 3600
            assert clock.wall_s - T0 <= 3600 + 2 * 7
        if not reached:  # the run has fewer writes than that
            break
    assert limit >= 3


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(SHAPES),
    st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=5),
)
def test_killed_again_and_again_the_cell_still_ends_well(tmp_path_factory, shape, cuts):
    """Several deaths in a row, at any writes: what was recorded never runs again, in no later life."""
    folder = tmp_path_factory.mktemp("lives")
    expected, _, _ = asyncio.run(lives(folder / "whole", shape, []))
    world.__init__()
    told.clear()
    value, _, _ = asyncio.run(lives(folder / "cut", shape, cuts))
    assert value == expected
    told.clear()
    world.__init__()


@pytest.fixture(autouse=True)
def _nothing_told():
    told.clear()


def test_a_step_asked_for_before_another_changed_its_arguments_is_of_the_changed_ones(path):
    """Executed again with another first step, the second one makes of its arguments what plain execution would."""

    def first(items):
        items.append(1)

    def edited_first(items):
        items.append(10)

    def second(items):
        world.do(list(items))
        items.append(2)
        return sum(items)

    def body(fn):
        async def cell_code():
            items = []
            a, b = durable.run("a", fn, items), durable.run("b", second, items)
            await a
            return await b, items

        return cell_code

    async def main():
        async with kernel(path) as engine:
            for inputs, fn, expected in [("1", first, [1, 2]), ("2", first, [1, 2]), ("3", edited_first, [10, 2])]:
                assert await cell(engine, body(fn), inputs=inputs) == (sum(expected), expected)
        assert world.done == [[1], [10]]

    asyncio.run(main())


def test_a_generator_or_coroutine_as_an_argument_is_refused_before_anything_runs(path):
    """Two of them can't be told apart, and an attempt that failed has used it up."""

    async def main():
        async def answer():
            return 1

        coroutine = answer()
        async with kernel(path) as engine:
            for value, kind in [((x for x in [1]), "generator"), (coroutine, "coroutine"), (asyncio.Future(), "Future")]:

                async def body(value=value):
                    return await durable.run("a", work, value)

                with pytest.raises(TypeError, match=f"'a' was given a {kind}.*nothing was run"):
                    await cell(engine, body)
        coroutine.close()
        assert world.done == []

    asyncio.run(main())


def test_a_cells_run_that_was_cancelled_while_it_was_interrupted_is_over(path):
    """The next execution begins a new one, which nobody has cancelled: with the steps that are kept, and timers of its own."""

    async def main():
        async def interrupted():
            await durable.run("a", work, "a")
            await durable.sleep("wait", "1h")

        async def again():
            await durable.run("a", work, "a")
            await asyncio.sleep(2.5 * WATCH_S)
            await durable.sleep("wait", "1h")
            return "end"

        async with kernel(path) as engine:
            engine.clock.holding = True
            run = await begun(engine)
            task = asyncio.ensure_future(finished(run, interrupted))
            await engine.clock.asleep.wait()
            task.cancel()
            await asyncio.wait({task})
            Workflows(engine).cancel(run.id, "no more")
            engine.clock.holding = False
            engine.clock.advance(1800)
            assert await cell(engine, again) == "end"
            assert sum(engine.clock.slept) == 3600
            assert Workflows(engine).snapshot(run.id).status == "cancelled"
        assert world.done == ["a"]

    asyncio.run(main())


@pytest.mark.parametrize("end", ["interrupt", "timeout"])
def test_a_body_that_ends_its_work_when_it_is_cancelled_is_recorded(path, end):
    """Under a timeout too: no twin is begun while it tidies up, and what it returns counts."""

    async def stubborn():
        world.do("begun")
        world.start("stubborn").set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0.05)
            world.do("paid")
            return "receipt"

    async def body():
        limit = 0.01 if end == "timeout" else 60
        return await durable.run("a", durable.step(stubborn, timeout=limit))

    async def main():
        async with kernel(path) as engine:
            if end == "interrupt":
                task = asyncio.ensure_future(cell(engine, body))
                await world.start("stubborn").wait()
                task.cancel()
                await asyncio.wait({task})
            assert await cell(engine, body) == "receipt"
        assert world.done == ["begun", "paid"]

    asyncio.run(main())


def test_a_method_that_is_a_step_is_given_to_run_as_it_is(path):
    class Shop:
        @durable.step(retries=1, backoff=0)
        def charge(self, cart):
            world.do(cart)
            if world.done.count(cart) < 2:
                raise ConnectionError("down")
            return f"{cart} charged"

    async def body():
        shop = Shop()
        named = await durable.run("charge", shop.charge, "a")
        world.do("b")
        return named, await durable.run("again", durable.step(shop.charge, retries=0), cart="b")

    async def main():
        async with kernel(path) as engine:
            assert await cell(engine, body) == ("a charged", "b charged")
        assert world.done == ["a", "a", "b", "b"]

    asyncio.run(main())


@pytest.mark.parametrize("then", ["fails", "goes on"])
def test_a_timeout_ends_the_wait_for_a_thread_whose_result_is_recorded_when_it_ends(path, then):
    """The cell gets StepTimeout; run again it waits for the same thread, as long again, and gets no twin."""

    async def body():
        step = durable.step(thread_work, timeout=0.05, retries=0)
        if then == "fails":
            return await durable.run("slow", step, "slow")
        with suppress(StepTimeout):
            return await durable.run("slow", step, "slow")
        return "went on"

    async def main():
        async with kernel(path) as engine:
            for _ in range(2):
                if then == "fails":
                    with pytest.raises(StepTimeout, match=r"longer than its timeout of 50 ms; its thread.*goes on"):
                        await cell(engine, body)
                else:
                    assert await cell(engine, body) == "went on"
            world.thread_gate("slow").set()
            await until(lambda: not engine.bodies, "the thread's end")
            await until(lambda: not engine.ownership.held, "the lease let go")
        async with kernel(path) as engine:
            assert await cell(engine, body) == "slow done"
        assert world.done == ["slow begun", "slow"]

    asyncio.run(main())


def test_two_tasks_that_sleep_under_one_name_keep_their_own_beginnings(path):
    """The second asked later. Gone on with, whichever asks first takes the other's beginning neither: none wakes early."""
    clock = FakeClock()
    order = ["first", "second"]
    woken = {}

    async def first():
        await durable.sleep("pause", 100)
        woken["first"] = clock.wall_s - T0

    async def second():
        if order[0] == "first":
            await world.gate("late").wait()
        await durable.sleep("pause", 100)
        woken["second"] = clock.wall_s - T0

    async def body():
        tasks = {"first": first, "second": second}
        await asyncio.gather(*(tasks[name]() for name in ("first", "second")))

    async def main():
        clock.holding = True
        async with kernel(path, clock) as engine:
            run = await begun(engine)
            task = asyncio.ensure_future(run.execute(body()))
            await clock.asleep.wait()
            clock.advance(60)
            clock.asleep.clear()
            world.gate("late").set()
            await clock.asleep.wait()
            engine.die()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        clock.holding = False
        order.reverse()
        async with kernel(path, clock) as engine:
            run = await begun(engine)
            await finished(run, body)
        assert woken["first"] >= 100
        assert woken["second"] >= 160

    asyncio.run(main())


def test_a_helper_that_was_renamed_goes_on_with_its_sleep(path):
    clock = FakeClock()

    async def before():
        await durable.sleep("pause", 100)

    async def after():
        await durable.sleep("pause", 100)

    async def body(helper):
        await asyncio.create_task(helper())

    async def main():
        clock.holding = True
        async with kernel(path, clock) as engine:
            run = await begun(engine)
            task = asyncio.ensure_future(run.execute(body(before)))
            await clock.asleep.wait()
            engine.die()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        clock.holding = False
        clock.advance(90)
        async with kernel(path, clock) as engine:
            run = await begun(engine)
            await finished(run, lambda: body(after))
        assert clock.wall_s - T0 == 100

    asyncio.run(main())


async def large_work(what: str) -> bytes:
    """Waits for its gate; what it returns lies in a file of its own."""
    world.start(what).set()
    await world.gate(what).wait()
    world.do(what)
    return b"x" * (1 << 20)


@pytest.mark.parametrize("fn", [held_work, large_work])
def test_given_up_in_whatever_moment_a_body_that_has_run_is_recorded(path, fn):
    """Between its end and the commit the task that waits for it may be cancelled in any turn of the loop."""

    def giving_up(name, turns):
        async def body():
            asking = asyncio.create_task(durable.run(name, fn, name))
            await world.start(name).wait()
            world.gate(name).set()
            for _ in range(turns):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

        return body

    async def main():
        async with kernel(path) as engine:
            for turns in range(12):
                name = f"b{turns}"
                await cell(engine, giving_up(name, turns), name=name)
                assert len(await cell(engine, lambda name=name: ask_again(name), name=name)) > 5
                assert world.done.count(name) == 1, f"given up {turns} turns after the end"
                assert not engine.ownership.held

    async def ask_again(name):
        return await durable.run(name, fn, name)

    asyncio.run(main())


def test_two_executions_at_once_execute_a_step_with_a_large_result_once(path):
    """The second hears of the body's end while the file of the result is being written."""

    async def body():
        return await durable.run("b", durable.step(large_work, timeout=60), "b")

    async def main():
        async with kernel(path) as engine:
            first = asyncio.ensure_future(cell(engine, body, inputs="k1"))
            await world.start("b").wait()
            second = asyncio.ensure_future(cell(engine, body, inputs="k2"))
            await until(lambda: len(engine.active) == 2)
            for _ in range(20):
                await asyncio.sleep(0.005)
            world.gate("b").set()
            assert await first == await second
        assert world.done == ["b"]

    asyncio.run(main())


def test_a_thread_that_outlives_two_executions_is_recorded_once(path):
    """Each of the two has taken it for its own."""

    def thread_grows(what: str) -> str:
        world.do(f"{what} begun")
        assert world.thread_gate(what).wait(30)
        world.do(what)
        return f"{what} done"

    async def one():
        return await durable.run("t", thread_grows, "t")

    async def main():
        async with kernel(path) as engine:
            kept = []
            keep = engine.shared.keep
            engine.shared.keep = lambda recording, run_id: kept.append(run_id) or keep(recording, run_id)
            for _ in range(3):
                await interrupted(engine, one, lambda: "t begun" in world.done)
            world.thread_gate("t").set()
            await until(lambda: engine.store.journal.scan("step/"), "the outcome")
            await until(lambda: not engine.ownership.held, "the lease let go")
            assert len(kept) == 1
            assert await cell(engine, one) == "t done"
        assert world.done == ["t begun", "t"]

    asyncio.run(main())


async def shielded_thread():
    return await asyncio.shield(asyncio.create_task(one_thread()))


def test_a_thread_whose_task_was_shielded_from_the_interrupt_is_recorded_when_it_ends(path):
    """The task still waits for it when the execution is over; the lease stays ours until the result is on disk."""

    async def main():
        async with kernel(path) as engine:
            await interrupted(engine, shielded_thread, lambda: world.done == ["t begun"])
            assert engine.ownership.held
            world.thread_gate("t").set()
            await until(lambda: engine.store.journal.scan("step/"), "the outcome")
            await until(lambda: not engine.ownership.held, "the lease let go")
            assert await cell(engine, shielded_thread) == "t done"
        assert world.done == ["t begun", "t"]

    asyncio.run(main())


def test_a_retry_that_is_shielded_from_the_interrupt_begins_no_body_after_it(path):
    async def body():
        await asyncio.shield(asyncio.create_task(durable.run("f", flaky, "f", 2)))

    async def main():
        clock = FakeClock()
        clock.holding = True
        async with kernel(path, clock) as engine:
            run = await begun(engine)
            task = asyncio.ensure_future(stopped(finished(run, body)))
            await clock.asleep.wait()
            before = asyncio.all_tasks()
            run.interrupt()
            assert isinstance(await task, KeyboardInterrupt)
            assert world.done == ["f"]
            await until(lambda: all(other.done() for other in before if "_step" in repr(other.get_coro())))
            clock.holding = False
            await cell(engine, body)
        assert world.done == ["f", "f"]

    asyncio.run(main())


noted: list[Any] = []


def notes_and_gives(what: Any) -> Any:
    """Changes a global of its own, which is therefore no part of its identity."""
    noted.append(what)
    world.do(what)
    return threading.Lock() if what == "a lock" else what


def test_a_result_that_cannot_be_stored_leaves_nothing_settled(path):
    """A step of the same name has failed so before: what it changes itself is on record with the next one all the same."""

    async def body():
        with suppress(UnserializableError):
            await durable.run("note", notes_and_gives, "a lock")
        return await durable.run("note", notes_and_gives, "a text")

    async def good():
        return await durable.run("note", notes_and_gives, "a text")

    async def main():
        noted.clear()
        async with kernel(path) as engine:
            assert await cell(engine, body) == "a text"
        noted[:] = ["something else by now"]
        async with kernel(path) as engine:
            assert await cell(engine, good) == "a text"
        assert world.done == ["a lock", "a text"]

    asyncio.run(main())


def test_a_given_up_body_whose_result_cannot_be_stored_is_told(path):
    async def gives_a_lock():
        await world.gate("lock").wait()
        return threading.Lock()

    async def body():
        with suppress(TimeoutError):
            await asyncio.wait_for(durable.run("lock", gives_a_lock), 0.01)
        world.gate("lock").set()

    async def main():
        async with kernel(path) as engine:
            run = await begun(engine)
            await finished(run, body)
            assert any("can't be stored" in notice for notice in run.quiet.notices), run.quiet.notices

    asyncio.run(main())
