"""A replay goes the way the run went: generated programs with deaths, edits and failures, and the shapes that broke it once."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from programs import EDITS, Life, World, edited, generate, unique

import durable_nb as durable
from durable_nb import _current
from durable_nb.errors import NonDeterminismError
from durable_nb.testing import FakeClock, MemoryStore, outcomes, redefine, runtime

PROGRAMS = int(os.environ.get("DURABLE_NB_PROGRAMS", "120"))
"""How many programs each of the fuzzers executes."""
SEED = int(os.environ.get("DURABLE_NB_SEED", "0")) * 1_000_000


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    before = dict(_current.workflow_functions)
    yield
    _current.workflow_functions.clear()
    _current.workflow_functions.update(before)


class Trial:
    """One run of one program, over all its lives."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.program = generate(self.rng)
        self.world, self.store, self.clock = World(seed), MemoryStore(), FakeClock()
        self.life = Life(self.world)

    async def live(self, *, nth: int | None = None, resume: bool = False) -> tuple[str, Any]:
        """One process: how the run ended in it, or 'died'. `nth`: it dies at that write."""
        before = self.acknowledged()
        self.life = Life(self.world)
        program, life = self.program, self.life

        async def body():
            await life.go(program)

        order = redefine(body, name="order")
        side = self.rng.choice(["before", "after"])
        end: tuple[str, Any] = "died", None
        crash = {"crash": f"{side}:write", "nth": nth} if nth else {}
        async with runtime(self.store, clock=self.clock, **crash) as process:
            run = durable.get_run("42").resume() if resume else order.start(id="42")
            try:
                await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(_outcome(run))), 20)
                end = "returned", None
            except TimeoutError:
                return "stuck", None
            except Exception as error:
                end = type(error).__name__, error
        again = {(name, arg) for name, arg, _ in self.life.done if not isinstance(arg, list)} & before
        self.others = [(asked, got) for *asked, got in self.life.wrong]
        self.again = again
        return ("died", None) if process.crashed else end

    def acknowledged(self) -> set[tuple[str, Any]]:
        """Steps asked for once at most that are on record."""
        recorded = {outcome.name for outcome in outcomes(self.store) if not outcome.failed}
        return {step for step in unique(self.program) if step[0] in recorded and _is_only_one(self.program, step[0])}


async def _outcome(run: Any) -> Any:
    return await run


def _is_only_one(program: Any, name: str) -> bool:
    return str(program).count(f"'step', '{name}'") == 1


def _prefix(one: list[Any], other: list[Any]) -> bool:
    n = min(len(one), len(other))
    return one[:n] == other[:n]


def test_generated_programs_killed_again_and_again_go_the_way_they_went():
    """No answer is given to another request, nothing recorded runs again, no false NonDeterminismError, and what was told comes
    again in the same order."""

    async def one(seed: int) -> None:
        trial = Trial(seed)
        told: list[Any] = []
        for _ in range(trial.rng.randrange(1, 5)):
            end, error = await trial.live(nth=trial.rng.randrange(1, 14))
            assert end in ("died", "returned", "RuntimeError", "ExceptionGroup", "RunCancelled"), (end, error)
            assert not trial.others, f"answers to somebody else's question: {trial.others}"
            assert _prefix(told, trial.life.trace), (told, trial.life.trace)
            assert not trial.again, f"recorded, and executed again: {trial.again}"
            told = max(told, trial.life.trace, key=len)
            if end != "died":
                return
        end, error = await trial.live()
        assert end in ("returned", "RuntimeError", "ExceptionGroup", "RunCancelled"), (end, error)
        assert not trial.others, f"answers to somebody else's question: {trial.others}"
        assert not trial.life.trace or trial.life.trace[: len(told)] == told  # it was over, or goes the same way
        assert not trial.again, f"recorded, and executed again: {trial.again}"

    _each(one, 0)


def test_generated_programs_forked_at_any_step_run_nothing_that_came_before_it():
    """Of runs that returned, failed or were killed. Every request gets its own answer."""

    async def one(seed: int) -> None:
        trial = Trial(seed)
        await trial.live(nth=trial.rng.randrange(3, 25) if trial.rng.random() < 0.4 else None)
        async with runtime(trial.store, clock=trial.clock):
            runs = durable.runs(workflow="order")
            steps = runs[0].steps if runs else ()
            if not steps:
                return
            n = trial.rng.randrange(len(steps))
            before = {step.name for step in steps[:n] if step.status == "completed"} & {
                name for name, _ in trial.acknowledged()
            }
            life, program = Life(trial.world), trial.program

            async def body():
                await life.go(program)

            redefine(body, name="order")
            fork = runs[0].fork(at=steps[n].path)
            with contextlib.suppress(RuntimeError, ExceptionGroup, durable.RunCancelled):
                await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(_outcome(fork))), 60)
            assert not life.wrong
            assert not before & {name for name, _, _ in life.done}
            assert fork.status in ("completed", "failed", "cancelled")

    _each(one, 5, PROGRAMS // 4)


def test_generated_edits_are_told_before_anything_runs_or_give_no_wrong_answer(caplog):
    """Eight kinds of edits of a killed run's program. Either the run goes on, and every request gets its own answer; or it is
    told, and then nothing was executed, and with the code put back the run goes on."""

    async def one(seed: int) -> None:
        trial = Trial(seed)
        end, _ = await trial.live(nth=trial.rng.randrange(2, 25))
        if end != "died":
            return
        original, how = trial.program, trial.rng.choice(EDITS)
        changed = edited(original, trial.rng, how)
        if changed is None:
            return
        trial.program = changed
        end, error = await trial.live()
        if end != "NonDeterminismError":
            assert end in ("returned", "RuntimeError", "ExceptionGroup", "RunCancelled"), (how, end, error)
            # A computed argument may be another one now: the recorded result stands, and is told. Never another step's.
            assert all(asked[0] == got[0] for asked, got in trial.others), trial.others
            assert not trial.others or any("recorded result stands" in message for message in caplog.messages)
            return
        assert trial.life.done == [], (how, "executed before it was told")
        assert "recorded" in str(error)
        trial.program = original
        end, error = await trial.live(resume=True)
        assert end in ("returned", "RuntimeError", "ExceptionGroup", "RunCancelled"), (how, end, error)

    _each(one, 1)


def test_generated_failed_runs_come_to_their_end_when_the_world_is_set_right():
    """resume() keeps what was recorded, tries the failure again, and makes progress whatever the code did after it; also when
    it is killed in the middle."""

    async def one(seed: int) -> None:
        trial = Trial(seed)
        end, error = await trial.live()
        if end not in ("RuntimeError", "ExceptionGroup"):
            return
        trial.world.is_mended = True
        end, error = await trial.live(nth=trial.rng.randrange(1, 9) if seed % 2 else None, resume=True)
        if end == "died":
            end, error = await trial.live(resume=True)
        told = set[str]()
        while end != "returned":  # a failure that came before the one that ended the run was the code's to handle: it stands
            assert end in ("RuntimeError", "ExceptionGroup"), (end, error)
            assert str(error) not in told, f"no progress: {error}"
            told.add(str(error))
            end, error = await trial.live(resume=True)
        assert not trial.others, f"answers to somebody else's question: {trial.others}"
        assert trial.again <= _compensations(trial), f"recorded, and executed again: {trial.again}"

    _each(one, 2)


def _compensations(trial: Trial) -> set[Any]:
    """Steps that may follow a failure: what it has caused is forgotten."""
    return unique(trial.program)


def _each(one: Any, salt: int, programs: int = PROGRAMS) -> None:
    for n in range(programs):
        seed = SEED + 100_000 * salt + n
        try:
            asyncio.run(one(seed))
        except BaseException as error:
            error.add_note(f"program {seed}")
            raise
        if not n % 50:
            gc.collect()


# -- shapes that an order of tasks would replay otherwise -------------------------------------------------------------------


class Shop:
    """Bodies, what they did, and gates that hold them until a test opens them."""

    def __reduce__(self) -> Any:  # the same value always: what it notes is the outer world
        return Shop, ()

    def __init__(self) -> None:
        self.done: list[Any] = []
        self._gates: dict[Any, asyncio.Event] = {}

    def gate(self, name: Any) -> asyncio.Event:
        return self._gates.setdefault(name, asyncio.Event())

    async def held(self, name: Any) -> Any:
        await self.gate(name).wait()
        self.done.append(name)
        return name

    async def do(self, name: Any) -> Any:
        self.done.append(name)
        return name

    async def refuse(self, name: Any) -> Any:
        raise KeyError(name)


async def until(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("waited in vain")


def names(store: MemoryStore) -> list[str]:
    return [outcome.name for outcome in outcomes(store)]


def _killed_and_resumed(body: Any, when: Any, then: Any, *, clock: FakeClock | None = None) -> Any:
    """What the run comes to that is killed when `when(store)` has come true (a coroutine function), after `then()`."""

    async def main() -> Any:
        order, store = redefine(body, name="order"), MemoryStore()
        async with runtime(store, clock=clock) as process:
            order.start(id="42")
            await when(store)
            process.kill()
        then()
        async with runtime(store, clock=clock):
            return await asyncio.wait_for(_outcome(durable.get_run("42").resume()), 20)

    return asyncio.run(main())


def test_of_parallel_quotes_each_is_charged_once_in_the_order_in_which_they_came():
    shop = Shop()

    async def body():
        charged = {}
        for nearest in asyncio.as_completed([durable.run("quote", shop.held, n) for n in range(6)]):
            n = await nearest
            charged[n] = await durable.run("charge", shop.do, f"charge {n}")
        return charged

    async def when(store):
        for k, n in enumerate((4, 1, 5), 1):
            shop.gate(n).set()
            await until(lambda k=k: len(names(store)) == 2 * k)

    result = _killed_and_resumed(body, when, lambda: [shop.gate(n).set() for n in range(6)])
    assert result == {n: f"charge {n}" for n in range(6)}
    assert sorted(map(str, shop.done)) == sorted(map(str, [*range(6), *(f"charge {n}" for n in range(6))]))


def test_a_supplier_that_answered_first_is_the_first_again():
    shop = Shop()

    async def body():
        tasks = [asyncio.create_task(durable.run(f"offer {n}", shop.held, n)) for n in "ab"]
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        bought = await durable.run("buy", shop.do, next(t for t in tasks if t in ended).result())
        return bought, await durable.run("last", shop.held, "last")

    async def when(store):
        shop.gate("b").set()
        await until(lambda: "buy" in names(store))
        shop.gate("a").set()
        await until(lambda: "offer a" in names(store))

    assert _killed_and_resumed(body, when, shop.gate("last").set) == ("b", "last")
    assert shop.done == ["b", "b", "a", "last"]


def test_a_durable_time_out_falls_where_it_fell_and_what_it_cut_off_is_not_executed():
    shop = Shop()

    async def slow(name):
        await asyncio.sleep(0.15)
        return await shop.do(name)

    async def body():
        try:
            async with asyncio.timeout(0.22):
                await durable.run("reserve", slow, "reserve")
                await durable.run("charge", slow, "charge")
        except TimeoutError:
            await durable.run("fall back", shop.do, "fall back")
        return await durable.run("last", shop.held, "last")

    async def when(store):
        await until(lambda: "fall back" in names(store))

    assert _killed_and_resumed(body, when, shop.gate("last").set) == "last"
    assert [name for name in shop.done if name != "charge"] == ["reserve", "fall back", "last"]
    assert shop.done.count("charge") <= 1  # the first life's body may have ended before it died; the second begins none


def test_a_sleep_of_asyncios_own_is_durable():
    """It ends an hour after it began, whatever happened meanwhile, and no row of its own is needed for its beginning."""
    shop, clock = Shop(), FakeClock()
    told = []

    async def body():
        await durable.run("a", shop.do, "a")
        began = clock.wall_s
        await asyncio.sleep(3600)
        told.append(clock.wall_s - began)
        return await durable.run("b", shop.do, "b")

    async def main():
        order, store = redefine(body, name="order"), MemoryStore()
        async with runtime(store, clock=clock, crash="after:step") as process:
            with suppress(BaseException):
                await order.start(id="42")
        assert process.crashed
        began = clock.wall_s
        clock.advance("50m")
        async with runtime(store, clock=clock):
            assert await durable.get_run("42").resume() == "b"
        assert clock.wall_s - began == pytest.approx(3600, abs=1)

    asyncio.run(main())


def test_a_deleted_parallel_step_beside_one_that_is_recorded_is_told_before_anything_runs():
    """`report` was still at work when the process died: deleted from the code, `charge` must not be executed again."""
    shop = Shop()

    async def before():
        return await asyncio.gather(durable.run("report", shop.held, "report"), durable.run("charge", shop.do, "charge"))

    async def after():
        return await asyncio.gather(durable.run("charge", shop.do, "charge"))

    async def main():
        store = MemoryStore()
        async with runtime(store) as process:
            redefine(before, name="order").start(id="42")
            await until(lambda: names(store) == ["charge"])
            process.kill()
        shop.gate("report").set()
        redefine(after, name="order")
        async with runtime(store):
            with pytest.raises(NonDeterminismError, match=r"run 'report'.*nothing was executed"):
                await durable.get_run("42").resume()
        assert shop.done == ["charge"]
        redefine(before, name="order")
        async with runtime(store):
            assert await durable.get_run("42").resume() == ["report", "charge"]
        assert shop.done == ["charge", "report"]

    asyncio.run(main())


def test_a_deleted_start_of_a_child_is_told_too():
    shop = Shop()

    async def child(n):
        return await durable.run("c", shop.do, n)

    async def before():
        start = durable.workflow(name="child")(_current.workflow_functions["child"]).start
        start(1)
        await durable.run("charge", shop.do, "charge")
        return await durable.run("last", shop.held, "last")

    async def after():
        await durable.run("charge", shop.do, "charge")
        return await durable.run("last", shop.held, "last")

    async def main():
        store = MemoryStore()
        redefine(child, name="child")
        async with runtime(store) as process:
            redefine(before, name="order").start(id="42")
            await until(lambda: {"charge", "c"} <= set(names(store)))
            process.kill()
        shop.gate("last").set()
        redefine(after, name="order")
        async with runtime(store):
            with pytest.raises(NonDeterminismError, match="start 'child'"):
                await durable.get_run("42").resume()
        assert sorted(map(str, shop.done)) == ["1", "charge"]

    asyncio.run(main())


def test_what_is_called_and_never_awaited_fails_the_run_and_is_named():
    shop = Shop()

    async def body():
        durable.run("charge", shop.do, "charge")
        return await durable.run("receipt", shop.do, "receipt")

    async def main():
        async with runtime():
            run = redefine(body, name="order").start()
            with pytest.raises(durable.DurableError, match=r"called step 'charge' and never awaited it.*write 'await'"):
                await run
            assert run.status == "failed"
        assert shop.done == ["receipt"]

    asyncio.run(main())


def test_a_cut_off_step_whose_failure_the_code_caught_is_not_executed_by_a_later_resume():
    """It was recorded as cut off; the failure that came afterwards is what is tried again."""
    shop = Shop()

    async def body():
        try:
            await durable.run("pay", durable.step(shop.held, at_most_once=True), "pay")
        except durable.StepInterrupted:
            await durable.run("call the bank", shop.do, "bank")
        return await durable.run("receipt", durable.step(flaky, retries=0))

    async def flaky():
        if not shop.gate("mended").is_set():
            raise ConnectionError
        return "sent"

    async def main():
        store = MemoryStore()
        order = redefine(body, name="order")
        async with runtime(store) as process:
            order.start(id="42")
            await until(lambda: any(key.startswith("try/") for key in store.journal.rows))
            process.kill()
        shop.gate("pay").set()
        async with runtime(store):
            with pytest.raises(ConnectionError):
                await durable.get_run("42").resume()
            shop.gate("mended").set()
            assert await durable.get_run("42").resume() == "sent"
        assert shop.done == ["bank"]

    asyncio.run(main())


def test_a_failed_child_is_resumed_with_its_parent():
    shop = Shop()

    async def flaky():
        if not shop.gate("mended").is_set():
            raise ConnectionError("down")
        return "sent"

    async def child():
        return await durable.run("send", durable.step(flaky, retries=0))

    async def body():
        start = durable.workflow(name="child")(_current.workflow_functions["child"]).start
        await durable.run("a", shop.do, "a")
        return await start(id="inner")

    async def main():
        redefine(child, name="child")
        async with runtime():
            run = redefine(body, name="order").start(id="42")
            with pytest.raises(ConnectionError):
                await run
            shop.gate("mended").set()
            assert await run.resume() == "sent"
        assert shop.done == ["a"]

    asyncio.run(main())


def test_compensations_are_forgotten_with_the_failure_that_caused_them_and_told(caplog):
    shop = Shop()

    async def flaky():
        if not shop.gate("mended").is_set():
            raise ConnectionError("down")
        return await shop.do("paid")

    async def body():
        await durable.run("lock", shop.do, "lock")
        try:
            await durable.run("pay", durable.step(flaky, retries=0))
        finally:
            await durable.run("unlock", shop.do, "unlock")
        return "fine"

    async def main():
        async with runtime():
            run = redefine(body, name="order").start(id="42")
            with pytest.raises(ConnectionError):
                await run
            assert shop.done == ["lock", "unlock"]
            shop.gate("mended").set()
            assert await run.resume() == "fine"
        assert shop.done == ["lock", "unlock", "paid", "unlock"]
        assert any("forgotten: 'unlock'" in message for message in caplog.messages)

    asyncio.run(main())


# -- what a workflow's own code can't do -----------------------------------------------------------------------------------


async def _in_thread(_: Any) -> None:
    await asyncio.to_thread(os.getpid)


async def _in_executor(_: Any) -> None:
    await asyncio.get_running_loop().run_in_executor(None, os.getpid)


async def _socket(_: Any) -> None:
    await asyncio.open_connection("127.0.0.1", 9)


async def _subprocess(_: Any) -> None:
    await asyncio.create_subprocess_exec("true")


async def _signal(_: Any) -> None:
    asyncio.get_running_loop().add_signal_handler(2, print)


async def _status(shop: Any) -> None:
    assert shop.run.status


async def _result(shop: Any) -> None:
    shop.run.result()


async def _event(shop: Any) -> None:
    await shop.gate("of the notebook").wait()


async def _future(shop: Any) -> None:
    await shop.future


async def _nothing(_: Any) -> None:
    await asyncio.Event().wait()


async def _spinning(_: Any) -> None:
    while True:  # noqa: ASYNC110
        await asyncio.sleep(0)


REFUSED = [_in_thread, _in_executor, _socket, _subprocess, _signal, _status, _result, _event, _future, _nothing, _spinning]


@pytest.mark.parametrize("code", REFUSED, ids=lambda code: code.__name__.strip("_"))
def test_what_a_replay_would_not_see_is_told_and_never_hangs(code):
    shop = Shop()

    async def body():
        await durable.run("a", shop.do, "a")
        await code(shop)

    async def main():
        async with runtime():
            shop.future = asyncio.get_running_loop().create_future()
            shop.run = redefine(body, name="order").start(id="42")
            with pytest.raises((durable.DurableError, RuntimeError)) as raised:
                await asyncio.wait_for(_outcome(shop.run), 15)
            told = str(raised.value) + "".join(getattr(raised.value, "__notes__", []))
            assert "step" in told or "Await the task" in told, told
            assert shop.run.status == "failed"

    asyncio.run(main())


def test_an_event_that_the_notebook_sets_fails_the_run_and_leaves_the_notebook_alone():
    shop = Shop()

    async def body():
        await durable.run("a", shop.do, "a")
        await shop.gate("of the notebook").wait()

    async def main():
        async with runtime() as process:
            run = redefine(body, name="order").start(id="42")
            await until(lambda: shop.done == ["a"] and process.engine.active["42"]._stepper._idle is not None)
            shop.gate("of the notebook").set()
            with pytest.raises(durable.NotSupportedError, match=r"Do this in a step"):
                await asyncio.wait_for(_outcome(run), 15)

    asyncio.run(main())


def test_an_interrupt_in_the_codes_own_line_ends_the_execution_as_a_kill_would():
    """Nothing of it is recorded, no `finally` asks for a step; resumed, the run goes on."""
    shop = Shop()

    async def body():
        await durable.run("a", shop.do, "a")
        try:
            if not shop.gate("again").is_set():
                raise KeyboardInterrupt
            return await durable.run("b", shop.do, "b")
        finally:
            if not shop.gate("again").is_set():
                with suppress(BaseException):
                    await durable.run("tidy up", shop.do, "tidy up")

    async def main():
        async with runtime():
            run = redefine(body, name="order").start(id="42")
            await until(lambda: run.status == "interrupted")
            assert shop.done == ["a"]
            shop.gate("again").set()
            assert await run.resume() == "b"
        assert shop.done == ["a", "b"]

    asyncio.run(main())


def test_recursion_without_end_fails_the_run():
    async def body():
        def deeper(n):
            return deeper(n + 1)

        return deeper(0)

    async def main():
        async with runtime():
            with pytest.raises(RecursionError):
                await redefine(body, name="order").start()

    asyncio.run(main())


@pytest.mark.parametrize("sdk", ["openai", "anthropic"])
def test_what_the_sdks_ask_about_the_platform_is_answered_at_once(sdk):
    def get_platform():
        return "Linux"

    get_platform.__module__ = f"{sdk}._base_client"

    async def body():
        return await asyncio.to_thread(get_platform)

    async def main():
        async with runtime():
            assert await redefine(body, name="order").start() == "Linux"

    asyncio.run(main())


def test_async_generators_are_held_until_the_run_ends():
    """Dropped by the code, one is not closed when the collector happens to find it: its `finally` asks for no step."""
    shop = Shop()

    async def body():
        async def numbers():
            try:
                for n in range(3):
                    yield await durable.run("n", shop.do, n)
            finally:
                await durable.run("closed", shop.do, "closed")

        async for _ in numbers():
            break
        gc.collect()
        return await durable.run("last", shop.do, "last")

    async def main():
        async with runtime():
            assert await redefine(body, name="order").start() == "last"
        assert shop.done == [0, "last"]

    asyncio.run(main())


def test_a_line_inserted_before_the_only_recorded_step_of_its_name_is_told():
    """Else the new line would get the recorded value, and the old one be executed again."""
    shop = Shop()

    async def before():
        return await durable.run("quote", shop.do, 1), await durable.run("last", shop.held, "last")

    async def after():
        first = await durable.run("quote", shop.do, 0)
        return first, await durable.run("quote", shop.do, 1), await durable.run("last", shop.held, "last")

    async def main():
        store = MemoryStore()
        async with runtime(store, crash="after:step") as process:
            with suppress(BaseException):
                await redefine(before, name="order").start(id="42")
        assert process.crashed
        shop.gate("last").set()
        redefine(after, name="order")
        async with runtime(store):
            with pytest.raises(NonDeterminismError, match="a line was inserted"):
                await durable.get_run("42").resume()
        assert shop.done == [1]

    asyncio.run(main())


def test_bodies_see_the_context_variables_of_the_code_that_awaits_them():
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")

    def in_thread():
        return tenant.get()

    async def on_loop():
        return tenant.get()

    async def body():
        tenant.set("jane")
        return [await durable.run("a", in_thread), await asyncio.create_task(durable.run("b", on_loop))]

    async def main():
        async with runtime():
            assert await redefine(body, name="order").start() == ["jane", "jane"]

    asyncio.run(main())


def test_a_cancelled_run_that_waits_in_vain_ends_all_the_same():
    shop = Shop()

    async def body():
        try:
            await durable.run("a", shop.held, "a")
        finally:
            await asyncio.Event().wait()

    async def main():
        async with runtime():
            run = redefine(body, name="order").start()
            await until(lambda: run.steps and run.steps[0].status == "running")
            run.cancel()
            with pytest.raises(durable.RunCancelled):
                await asyncio.wait_for(_outcome(run), 15)

    asyncio.run(main())


def test_a_closed_over_list_that_grew_is_no_edit(caplog):
    shop, told = Shop(), []

    async def body():
        async def note(what):
            told.append(what)
            return what

        await durable.run("note", note, "x")
        return await durable.run("last", shop.held, "last")

    async def when(store):
        await until(lambda: names(store) == ["note"])

    assert _killed_and_resumed(body, when, shop.gate("last").set) == "last"
    assert not any("edited" in message for message in caplog.messages)


# -- the same with real processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(int(os.environ.get("DURABLE_NB_KILLED_PROGRAMS", "6"))))
def test_generated_programs_killed_for_real_go_the_way_they_went(seed, tmp_path):
    """SIGKILL at any moment of real processes on a store on disk: nothing recorded runs again, nobody gets another's answer."""
    store, ledger, rng = tmp_path / "store", tmp_path / "ledger", random.Random(SEED + seed)
    ledger.touch()
    only_once = {name for name, _ in unique(generate(random.Random(SEED + seed)))}
    program = str(generate(random.Random(SEED + seed)))
    only_once = {name for name in only_once if program.count(f"'step', '{name}'") == 1}
    command = [sys.executable, str(Path(__file__).with_name("program_worker.py")), str(store), str(SEED + seed), str(ledger)]
    for life in range(5):
        done_before = len(ledger.read_text().splitlines())
        recorded = {outcome.name for outcome in outcomes(store) if not outcome.failed} if store.exists() else set()
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            if life < 4:
                _wait_for_some_work(process, ledger, done_before + rng.randrange(4), rng)
                process.kill()
            _, told = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), told
        again = [json.loads(line)[0] for line in ledger.read_text().splitlines()[done_before:]]
        assert not recorded & only_once & set(again), "recorded, and executed again"
        if process.returncode == 0:
            return
    pytest.fail("the last life was not killed, and did not end")


def _wait_for_some_work(process: subprocess.Popen[str], ledger: Path, lines: int, rng: random.Random) -> None:
    """Until the process has done so much, or has ended; and then for an instant more, which may fall anywhere."""
    deadline = time.monotonic() + 30
    while process.poll() is None and len(ledger.read_text().splitlines()) < lines and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(rng.random() * 0.005)


def test_what_was_begun_and_nobody_awaits_is_executed_by_the_life_that_ends_the_run():
    """Fire and forget: the log step was at work when the process died, after the run's last line."""
    shop = Shop()

    async def body():
        shop.task = asyncio.create_task(durable.run("log", shop.held, "log"))
        return await durable.run("main", shop.do, "main")

    async def when(store):
        await until(lambda: names(store) == ["main"])

    assert _killed_and_resumed(body, when, shop.gate("log").set) == "main"
    assert sorted(shop.done) == ["log", "main"]


def test_a_thousand_parallel_steps_with_a_list_each_take_turns_with_the_kernels_loop():
    """Each is compared with none of the others, and they don't begin all in one turn."""

    async def work(items):
        return items[0]

    async def body():
        return await asyncio.gather(*(durable.run("s", work, [n]) for n in range(1000)))

    async def main():
        turns = 0
        async with runtime():
            run = redefine(body, name="order").start()
            waiting = asyncio.ensure_future(_outcome(run))
            while not waiting.done():
                await asyncio.sleep(0)
                turns += 1
            assert waiting.result() == list(range(1000))
        assert turns > 1000 / 32

    asyncio.run(main())


def test_all_failed_children_are_resumed_at_once():
    shop = Shop()

    async def flaky(n):
        if not shop.gate("mended").is_set():
            raise ConnectionError("down")
        return n

    async def child(n):
        return await durable.run("send", durable.step(flaky, retries=0), n)

    async def body():
        start = durable.workflow(name="child")(_current.workflow_functions["child"]).start
        return await asyncio.gather(*(start(n) for n in range(3)))

    async def main():
        redefine(child, name="child")
        async with runtime():
            run = redefine(body, name="order").start(id="42")
            with pytest.raises(ConnectionError):
                await run
            await until(lambda: [r.status for r in durable.runs(workflow="child")] == ["failed"] * 3)
            shop.gate("mended").set()
            assert await run.resume() == [0, 1, 2]

    asyncio.run(main())


def test_an_interrupt_in_a_steps_body_interrupts_the_run():
    shop = Shop()

    async def body():
        def work():
            if not shop.gate("again").is_set():
                raise KeyboardInterrupt
            return "done"

        return await durable.run("a", work)

    async def main():
        async with runtime():
            run = redefine(body, name="order").start(id="42")
            await until(lambda: run.status == "interrupted")
            shop.gate("again").set()
            assert await run.resume() == "done"

    asyncio.run(main())


def test_ctrl_c_reaches_code_that_never_yields():
    """Within a second, and the run can be resumed."""
    shop = Shop()

    async def body():
        await durable.run("a", shop.do, "a")
        began = time.monotonic()
        busy.set()
        while not shop.gate("again").is_set() and time.monotonic() - began < 20:
            pass
        return "done"

    def interrupt():
        busy.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    async def main():
        signal.signal(signal.SIGINT, lambda *_: told.append("handled"))
        async with runtime():
            run = redefine(body, name="order").start(id="42")
            threading.Thread(target=interrupt, daemon=True).start()
            began = time.monotonic()
            await until(lambda: run.status == "interrupted")
            assert time.monotonic() - began < 10
            assert told == ["handled"]  # the kernel's own handler hears of it as well
            shop.gate("again").set()
            assert await run.resume() == "done"

    busy, told = threading.Event(), list[str]()
    before = signal.getsignal(signal.SIGINT)
    try:
        asyncio.run(main())
    finally:
        signal.signal(signal.SIGINT, before)
