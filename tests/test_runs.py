"""What a workflow's run can do: begin later, with others, or as a child; take too long; fail; say how it stands; be cancelled.

In-process tests play processes on one store (`durable_nb.testing`); what a kill means is shown with real ones (`run_worker`).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from workers import ForkServer, read_oracle
from workers import until as soon

import durable_nb as durable
from durable_nb import _current, testing
from durable_nb._engine import WATCH_S
from durable_nb._own_code import found_in
from durable_nb.errors import (
    DurableError,
    NestedStepError,
    NonDeterminismError,
    NotInRunError,
    RunCancelled,
    RunConflictError,
    RunTimeout,
    UnserializableError,
)
from durable_nb.testing import FakeClock, MemoryStore, redefine, runtime

done: list[Any] = []
"""What bodies did to the outer world, in order."""


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    before = dict(_current.workflow_functions), dict(_current.workflow_options)
    done.clear()
    yield
    for registry, was in zip((_current.workflow_functions, _current.workflow_options), before, strict=True):
        registry.clear()
        registry.update(was)


def work(what):
    done.append(what)
    return f"{what} done"


def broken(what):
    done.append(what)
    raise ConnectionError(f"{what} is down")


def define(fn, name="order", **options):
    """`fn` as the workflow of that name, whatever had it before."""
    _current.workflow_functions.pop(name, None)
    return durable.workflow(name=name, **options)(fn)


async def until(condition, what=""):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail(f"waited in vain: {what or condition}")


async def outcome(run):
    try:
        return await run
    except Exception as error:
        return type(error), str(error)


async def once(what="a"):
    return await durable.run("a", work, what)


# -- begun later ---------------------------------------------------------------------------------------------------------


def test_a_delayed_run_is_pending_until_its_time_over_deaths_and_boots_and_a_restart_neither_shortens_nor_lengthens_it():
    store, clock = MemoryStore(), FakeClock()
    began = clock.wall_s

    class Stuck(FakeClock):
        """Nothing passes by itself."""

        async def sleep(self, seconds):
            await asyncio.Event().wait()

    async def main():
        stuck = Stuck(began)
        async with runtime(store, clock=stuck) as process:
            run = define(once).start(id="42", delay="2h")
            await until(lambda: run.status == "pending")
            assert run.steps == ()
            assert "pending" in repr(run)
            [found] = _current.engine().snapshots(status="pending")
            assert (found.id, found.wake_at) == ("42", began + 7200)
            stuck.advance("30m")
            async with runtime(store, clock=stuck):  # another process sees the same
                assert durable.get_run("42").status == "pending"
                assert _current.engine().snapshots()[0].wake_at == pytest.approx(began + 7200)
            process.use()
            process.kill()
        clock.advance("30m")
        clock.reboot()
        clock.jump(-86400)  # by a clock that was set back meanwhile, no time has passed
        async with runtime(store, clock=clock):
            define(once)
            assert durable.get_run("42").status == "interrupted"
            waited = clock.wall_s
            assert await durable.get_run("42") == "a done"
            assert clock.wall_s - waited == pytest.approx(7200)
        assert done == ["a"]

    asyncio.run(main())


def test_a_delay_goes_on_where_it_was_after_a_death_within_a_boot():
    store, clock = MemoryStore(), FakeClock()

    async def main():
        async with runtime(store, clock=clock, crash="after:run"):
            define(once).start(id="42", delay=timedelta(hours=2))
            await asyncio.sleep(5)
        clock.advance("90m")
        clock.jump("5h" and 18_000)  # the wall clock is not asked
        async with runtime(store, clock=clock):
            define(once)
            passed = clock._passed_s
            await durable.get_run("42").resume()
            assert clock._passed_s - passed == pytest.approx(1800)

    asyncio.run(main())


def test_a_run_that_waits_for_its_time_is_cancelled_at_once_and_executes_nothing():
    async def main():
        store = MemoryStore()
        async with runtime(store, clock=FakeClock()) as owner:
            stuck = asyncio.Event()
            owner.engine.clock.sleep = lambda _: stuck.wait()
            run = define(once).start(id="42", delay="7d")
            other = define(once).start(id="43", delay="7d")
            await until(lambda: run.status == other.status == "pending")
            run.cancel("sold out")
            with pytest.raises(RunCancelled, match="sold out"):
                await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(outcome_of(run))), 5)
            async with runtime(store):  # from another process
                durable.get_run("43").cancel()
            owner.use()
            with pytest.raises(RunCancelled):
                await asyncio.wait_for(outcome_of(other), 10 * WATCH_S + 5)
            assert run.status == "cancelled"
        assert done == []
        clock = FakeClock(owner.engine.clock.wall_s + 6 * 86400)
        async with runtime(store, clock=clock):  # resumed, both wait for what is left
            define(once)
            clock.reboot()
            began = clock.wall_s
            assert [await durable.get_run(run_id).resume() for run_id in ("42", "43")] == ["a done"] * 2
            assert clock.wall_s - began == pytest.approx(86400)

    async def outcome_of(run):
        return await run

    asyncio.run(main())


@pytest.mark.parametrize("delay", [-1, "soon", float("nan")])
def test_a_delay_that_is_no_duration_starts_nothing(delay):
    async def main():
        async with runtime():
            with pytest.raises(ValueError, match="is not a duration"):
                define(once).start(id="42", delay=delay)
            assert durable.runs() == []

    asyncio.run(main())


def test_a_time_out_counts_from_when_a_delayed_run_begins():
    async def slow():
        await durable.sleep("a while", "50m")
        return "in time"

    async def main():
        async with runtime(clock=FakeClock()):
            assert await define(slow, timeout="1h").start(delay="3h") == "in time"

    asyncio.run(main())


# -- many at once --------------------------------------------------------------------------------------------------------


def test_many_runs_are_started_by_one_commit_or_none_is():
    store = MemoryStore()

    async def square(n, power=2):
        return await durable.run("square", pow, n, power)

    async def main():
        async with runtime(store) as process:
            order = define(square)
            commits = []
            apply = process._journal.inner.apply
            process._journal.inner.apply = lambda asked: commits.extend(asked) or apply(asked)
            runs = order.start_many(
                [(2,), {"args": (3,), "id": "three", "labels": ["odd"]}, {"kwargs": {"n": 2, "power": 5}}, [4, 3], (2,)],
                labels="x",
            )
            of_runs = [commit for commit in commits if any(key.startswith("run/") for key, _ in commit.inserts)]
            process._journal.inner.apply = apply
            assert [len([key for key, _ in commit.inserts if key.startswith("run/")]) for commit in of_runs] == [5]
            assert [await run for run in runs] == [4, 9, 32, 64, 4]
            assert len({run.id for run in runs}) == 5
            assert [run.id for run in durable.runs(label="odd")] == ["three"]
            assert len(durable.runs(label="x")) == 4
            known = len(durable.runs())
            for wrong, error in [
                ([(1,), {"args": (4,), "id": "three"}], RunConflictError),  # used already, with other arguments
                ([{"args": (1,), "id": "n"}, {"args": (2,), "id": "n"}], RunConflictError),
                ([(1,), (1, 2, 3)], TypeError),
                ([(1,), "23"], TypeError),
                ([(1,), {"arguments": (1,)}], TypeError),
                ([(1,), {"args": 1}], TypeError),
                ([(1,), {"args": (1,), "id": ""}], ValueError),
                ([(1,), {"args": (1,), "delay": "soon"}], ValueError),
                ([(1,), (threading.Lock(),)], UnserializableError),
            ]:
                with pytest.raises(error, match=r"(?i)nothing was|not a duration"):
                    order.start_many(wrong)
            assert len(durable.runs()) == known
            again = order.start_many(
                [{"args": (3,), "id": "three"}, {"args": (5,), "id": "five"}, {"args": (5,), "id": "five"}]
            )
            assert [run.id for run in again] == ["three", "five", "five"]
            assert [await run for run in again] == [9, 25, 25]
            assert order.start_many([]) == []

    asyncio.run(main())


@pytest.mark.parametrize("side", ["before", "after"])
def test_dead_while_many_runs_are_started_all_of_them_are_there_or_none(side):
    async def main():
        for nth in (1, 2, 3):
            store = MemoryStore()
            async with runtime(store, crash=f"{side}:write", nth=nth):
                define(once).start_many([(f"{n}",) for n in range(20)])
            async with runtime(store):
                define(once)
                runs = durable.runs()
                assert len(runs) == (0 if (side, nth) == ("before", 1) else 20)
                for run in runs:
                    await run.resume()

    asyncio.run(main())


def test_many_runs_started_by_a_workflow_are_the_same_after_a_death():
    store = MemoryStore()

    async def child(n):
        return await durable.run("n", work, n)

    async def parent():
        runs = redefine(child).start_many([(n,) for n in range(5)])
        return [await run for run in runs]

    async def main():
        for crash in ("after:step", "before:step"):
            async with runtime(store, crash=crash, nth=3):
                await define(parent).start(id="42")
        async with runtime(store):
            assert await define(parent).start(id="42") == [f"{n} done" for n in range(5)]
            assert len(durable.runs(workflow="child")) == 5

    asyncio.run(main())


# -- children ------------------------------------------------------------------------------------------------------------


def family(leaf, middle=None):
    """A workflow that invokes one that invokes `leaf`."""
    inner = define(leaf, "leaf")

    async def between(*args):
        got = await durable.invoke("leaf", inner, *args)
        return await durable.run("wrap", work, got)

    outer = define(middle or between, "middle")

    async def top(*args):
        first = await durable.run("first", work, "first")
        return first, await durable.invoke("child", outer, *args)

    return define(top)


def test_a_child_is_a_run_whose_result_the_parent_takes_and_whose_steps_are_listed_behind_it():
    async def main():
        async with runtime(store := MemoryStore()):
            run = family(once).start("a", id="42")
            assert await run == ("first done", "a done done")
            steps = [(step.path, step.kind, str(step.status)) for step in run.steps]
            assert steps == [
                ("first", "run", "completed"),
                ("child", "invoke", "completed"),
                ("child/leaf", "invoke", "completed"),
                ("child/leaf/a", "run", "completed"),
                ("child/wrap", "run", "completed"),
            ]
            [middle] = durable.runs(workflow="middle")
            assert [step.path for step in middle.steps] == ["leaf", "leaf/a", "wrap"]
            assert run.steps[1].child == middle.id
        async with runtime(store):  # from the records alone
            assert [(step.path, step.kind, str(step.status)) for step in durable.get_run("42").steps] == steps

    asyncio.run(main())


def test_equal_children_are_runs_of_their_own_and_each_is_started_once_however_often_the_parent_dies():
    store = MemoryStore()

    async def parent():
        one = define(once, "child")
        return await asyncio.gather(*(durable.invoke("twin", one, "x") for _ in range(3)))

    async def main():
        for nth in range(1, 12):
            async with runtime(store, crash="after:write", nth=nth) as process:
                await define(parent).start(id="42")
            if not process.crashed:
                break
        async with runtime(store):
            assert await define(parent).start(id="42") == ["x done"] * 3
            assert len(durable.runs(workflow="child")) == 3
            assert [step.path for step in durable.get_run("42").steps if step.kind == "invoke"] == ["twin", "twin#2", "twin#3"]

    asyncio.run(main())


@pytest.mark.parametrize("side", ["before", "after"])
def test_dead_at_any_write_a_family_goes_on_and_repeats_no_recorded_step(side):
    async def leaf(what):
        await durable.sleep("nap", "1h")
        return await durable.run("a", work, what)

    async def main():
        nth = 0
        while True:
            nth += 1
            store, clock = MemoryStore(), FakeClock()
            done.clear()
            async with runtime(store, clock=clock, crash=f"{side}:write", nth=nth) as process:
                await family(leaf).start("a", id="42")
            kept = [outcome.name for outcome in testing.outcomes(store)]
            before = list(done)
            async with runtime(store, clock=clock):
                assert await family(leaf).start("a", id="42") == ("first done", "a done done")
                assert len(durable.runs()) == 3
            ran = done[len(before) :]
            assert not ("first" in kept and "first" in ran), nth
            assert not ("a" in kept and "a" in ran), nth
            if not process.crashed:
                break
        assert nth > 10

    asyncio.run(main())


def test_a_childs_failure_is_the_original_exception_with_a_note_live_and_replayed_and_resuming_the_parent_resumes_the_child():
    store, fixed = MemoryStore(), []

    def fixable():
        done.append("tried")
        if not fixed:
            raise ConnectionError("down")
        return "up"

    async def leaf():
        await durable.run("before", work, "before")
        return await durable.run("fixable", durable.step(fixable, retries=0))

    async def catching():
        try:
            await durable.invoke("child", define(leaf, "leaf"))
        except ConnectionError as error:
            return str(error), [note for note in error.__notes__ if "invoked as" in note]

    async def main():
        async with runtime(store):
            said, [note] = await define(catching).start(id="caught")
            child = durable.get_run("caught").steps[0].child
            assert said == "down"
            assert child in note and "'leaf'" in note and "'child'" in note
            run = family(leaf).start(id="42")
            with pytest.raises(ConnectionError, match="down") as raised:
                await run
            assert sum("invoked as" in note for note in raised.value.__notes__) == 2
            assert run.status == "failed"
        async with runtime(store):
            family(leaf)
            with pytest.raises(ConnectionError) as again:
                await durable.get_run("42")
            assert again.value.__notes__ == raised.value.__notes__
            fixed.append(True)
            assert await durable.get_run("42").resume() == ("first done", "up done")
            assert done.count("before") == 2  # of `caught` and of this one, each once
            assert len(durable.runs(workflow="leaf")) == 2

    asyncio.run(main())


@pytest.mark.parametrize("step", ["child/leaf/publish", "publish"])
def test_what_a_child_asks_is_decided_through_its_parent(step):
    async def leaf():
        return (await durable.approve("publish", "Shall we?")).comment

    async def main():
        async with runtime(clock=NoTime()):
            run = family(leaf).start(id="42")
            await until(lambda: any(one.path == "child/leaf/publish" and one.status == "waiting" for one in run.steps))
            with pytest.raises(LookupError, match="'child/other'"):
                run.approve("child/other")
            run.approve(step, comment="yes")
            assert await run == ("first done", "yes done")

    asyncio.run(main())


@pytest.mark.parametrize("owner", ["lives", "died", "died, many"])
def test_cancelling_a_parent_cancels_its_children_and_theirs(owner):
    store = MemoryStore()

    async def leaf():
        try:
            await durable.sleep("long", "7d")
        finally:
            await durable.run("tidy", work, "tidy")

    async def main():
        class Stuck(FakeClock):
            async def sleep(self, seconds):
                await asyncio.Event().wait()

        async with runtime(store, clock=Stuck()) as process:
            run = family(leaf).start(id="42")
            await until(lambda: any(step.path == "child/leaf/long" for step in run.steps))
            if owner != "lives":
                process.kill()
            else:
                run.cancel("enough")
                with pytest.raises(RunCancelled, match="enough"):
                    await run
                leaf_run = durable.runs(workflow="leaf")[0]
                with pytest.raises(RunCancelled, match="invoked it"):
                    await leaf_run
                assert done == ["first", "tidy"]
        async with runtime(store, clock=Stuck()):
            if owner == "died":
                durable.get_run("42").cancel("enough")
            elif owner == "died, many":
                durable.cancel(workflow="order")
            assert {run.status for run in durable.runs()} == {"cancelled"}
            assert len(durable.runs()) == 3

    asyncio.run(main())


def test_a_child_that_is_started_and_not_invoked_outlives_its_parents_cancellation():
    async def parent():
        define(once, "child").start("b", id="child")
        await durable.sleep("long", "7d")

    async def main():
        clock = FakeClock()
        async with runtime(clock=clock):
            gate = asyncio.Event()
            clock.sleep = lambda _: gate.wait()
            run = define(parent).start(id="42")
            await until(lambda: run.status == "sleeping")
            run.cancel()
            await outcome(run)
            assert await durable.get_run("child") == "b done"

    asyncio.run(main())


def test_a_cancelled_parent_that_is_resumed_resumes_its_child():
    store = MemoryStore()

    async def leaf():
        await durable.run("before", work, "before")
        await durable.sleep("long", "1h")
        return "over"

    async def main():
        class Stuck(FakeClock):
            async def sleep(self, seconds):
                await asyncio.Event().wait()

        async with runtime(store, clock=Stuck()):
            run = family(leaf).start(id="42")
            await until(lambda: any(step.path == "child/leaf/long" for step in run.steps))
            run.cancel()
            await outcome(run)
            await until(lambda: {run.status for run in durable.runs()} == {"cancelled"})
        async with runtime(store):
            family(leaf)
            assert await durable.get_run("42").resume() == ("first done", "over done")
            assert done == ["first", "before", "over"]

    asyncio.run(main())


def test_a_parent_whose_code_is_over_does_not_wait_for_a_child_that_it_gave_up_or_that_a_sibling_left_alone():
    store, fixed = MemoryStore(), []

    async def leaf():
        await durable.sleep("long", "1h")
        return await durable.run("leaf", work, "leaf")

    def fails():
        if not fixed:
            raise ConnectionError("down")
        return "up"

    async def gives_up():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(durable.invoke("child", define(leaf, "leaf")), 60)
        return "gave up"

    async def beside_a_failure():
        child = durable.invoke("child", define(leaf, "leaf"))
        return await asyncio.gather(child, durable.run("fails", durable.step(fails, retries=0)))

    async def main():
        clock = FakeClock()
        async with runtime(store, clock=clock):
            began = clock.wall_s
            assert await define(gives_up).start() == "gave up"
            assert clock.wall_s - began < 3600
            run = define(beside_a_failure).start()
            with pytest.raises(ConnectionError):
                await run
            fixed.append(True)
            for child in durable.runs(workflow="leaf"):
                assert await child == "leaf done"
            assert await run.resume() == ["leaf done", "up"]
            assert len(durable.runs(workflow="leaf")) == 2
        assert done == ["leaf", "leaf"]

    asyncio.run(main())


def test_a_restarted_parent_invokes_new_children_and_the_old_ones_are_cancelled():
    store = MemoryStore()

    async def leaf():
        await durable.sleep("long", "1h")
        return await durable.run("leaf", work, "leaf")

    async def main():
        async with runtime(store, crash="after:timer"):
            await family(leaf).start(id="42")
        async with runtime(store):
            family(leaf)
            assert await durable.get_run("42").restart() == ("first done", "leaf done done")
            assert sorted(run.status for run in durable.runs(workflow="leaf")) == ["cancelled", "completed"]
        assert done.count("leaf") == 1

    asyncio.run(main())


def test_what_can_be_invoked_is_a_workflow_in_a_run_and_arguments_that_do_not_fit_are_told_before_anything_is():
    async def wrong_arguments():
        await durable.invoke("child", define(once, "child"), 1, 2, 3)

    async def no_workflow():
        await durable.invoke("child", once)

    async def no_name():
        await durable.invoke(define(once, "child"), "a")

    async def in_a_body():
        async def body():
            await durable.invoke("child", define(once, "child"))

        await durable.run("body", body)

    async def main():
        async with runtime():
            with pytest.raises(NotInRunError, match=r"durable\.invoke"):
                await durable.invoke("child", define(once, "child"))
            for code, error, message in [
                (wrong_arguments, TypeError, "nothing was started"),
                (no_workflow, TypeError, "give a workflow"),
                (no_name, TypeError, "the step's name is missing"),
                (in_a_body, NestedStepError, "inside the body"),
            ]:
                with pytest.raises(error, match=message):
                    await define(code).start()
            assert durable.runs(workflow="child") == []

    asyncio.run(main())


# -- too long, and failed ------------------------------------------------------------------------------------------------


async def slow():
    try:
        await durable.run("before", work, "before")
        await durable.sleep("long", "7d")
    finally:
        await durable.run("tidy", work, "tidy")


@pytest.mark.parametrize("dead", [False, True])
def test_a_run_that_takes_too_long_fails_when_it_has_tidied_up_and_the_time_in_which_nobody_executed_it_counts(dead):
    store, clock, failures = MemoryStore(), FakeClock(), []

    async def main():
        order = define(slow, timeout="10h", on_failure=lambda run, error: failures.append((run.id, type(error))))
        began = clock.wall_s
        if dead:
            async with runtime(store, clock=clock, crash="after:timer"):
                await order.start(id="42")
            clock.advance("9h")
        async with runtime(store, clock=clock):
            run = order.start(id="42")
            with pytest.raises(RunTimeout, match="longer than 10 h") as raised:
                await run
            assert isinstance(raised.value, TimeoutError)
            assert run.status == "failed"
            assert 36_000 <= clock.wall_s - began < 36_600
        assert done == ["before", "tidy"]
        assert failures == [("42", RunTimeout)]
        clock.advance("20h")
        async with runtime(store, clock=clock):  # resumed, it has that time again: too little once more
            resumed = clock.wall_s
            with pytest.raises(RunTimeout):
                await durable.get_run("42").resume()
            assert 36_000 <= clock.wall_s - resumed < 36_600
        assert done == ["before", "tidy", "tidy"]

    asyncio.run(main())


async def order_flow():
    payment = await durable.run("charge", work, "charge")
    await durable.run("order", work, payment)
    await durable.run("receipt", work, "receipt")
    await durable.sleep("a week", "7d")
    return await durable.run("ask for a review", work, "review")


@pytest.mark.parametrize("side", ["before", "after"])
def test_the_order_flow_dead_at_any_write_charges_once_and_asks_after_a_week(side):
    async def main():
        nth = 0
        while True:
            nth += 1
            store, clock = MemoryStore(), FakeClock()
            done.clear()
            began = clock.wall_s
            order = define(order_flow)
            async with runtime(store, clock=clock, crash=f"{side}:write", nth=nth) as process:
                await order.start(id="order-42")
            recorded = {outcome.name for outcome in testing.outcomes(store)}
            before = len(done)
            clock.advance("1d")
            async with runtime(store, clock=clock):
                assert await order.start(id="order-42") == "review done"
            again = {{"charge done": "order"}.get(what, what) for what in done[before:]}
            assert not recorded & again, nth
            slept = next(one for one in testing.outcomes(store) if one.name == "receipt").ended_at
            assert clock.wall_s - max(slept, began) >= 7 * 86400
            if not process.crashed:
                break
        assert done == ["charge", "charge done", "receipt", "review"]

    asyncio.run(main())


@pytest.mark.parametrize("side", ["before", "after"])
def test_dead_at_any_write_a_run_times_out_once_and_tidies_up(side):
    async def main():
        nth = 0
        while True:
            nth += 1
            store, clock = MemoryStore(), FakeClock()
            done.clear()
            order = define(slow, timeout="10h")
            async with runtime(store, clock=clock, crash=f"{side}:write", nth=nth) as process:
                await outcome(order.start(id="42"))
            async with runtime(store, clock=clock):
                assert (await outcome(order.start(id="42")))[0] is RunTimeout, nth
                assert done.count("tidy") <= 1 + process.crashed
            if not process.crashed:
                break
        assert nth > 6

    asyncio.run(main())


def test_a_time_out_ends_the_wait_for_a_child_and_for_what_the_code_waits_for_itself():
    async def main():
        async with runtime(clock=FakeClock()):
            child = define(slow, "child")

            async def waits_for_child():
                await durable.invoke("child", child)

            async def waits_for_itself():
                await asyncio.sleep(10**6)

            for code in (waits_for_child, waits_for_itself):
                run = define(code, timeout="1h").start()
                with pytest.raises(RunTimeout):
                    await run
            await until(lambda: durable.runs(workflow="child")[0].status == "cancelled")

    asyncio.run(main())


def test_code_that_returns_although_it_was_timed_out_has_failed_and_one_that_was_faster_has_not():
    async def stubborn():
        try:
            await durable.sleep("long", "7d")
        except asyncio.CancelledError:
            return "all the same"

    async def main():
        async with runtime(clock=FakeClock()):
            with pytest.raises(RunTimeout):
                await define(stubborn, timeout="1h").start()
            assert await define(stubborn, timeout="8d").start() is None

    asyncio.run(main())


def test_on_failure_is_told_once_with_the_run_and_its_error_and_may_use_no_verbs():
    store, told = MemoryStore(), []

    async def failing():
        await durable.run("broken", durable.step(broken, retries=0), "a")

    async def on_failure(run, error):
        told.append((run.id, run.status, type(error), str(error), durable.current_run().id))
        try:
            await durable.run("more", work, "more")
        except NestedStepError:
            told.append("no verbs")

    async def main():
        async with runtime(store):
            run = define(failing, on_failure=on_failure).start(id="42")
            with pytest.raises(ConnectionError):
                await run
            await outcome(run)
        async with runtime(store):
            define(failing, on_failure=on_failure)
            durable.resume()
            await outcome(durable.get_run("42"))
        assert told == [("42", "running", ConnectionError, "a is down", "42"), "no verbs"]
        assert done == ["a"]

    asyncio.run(main())


def test_killed_in_on_failure_it_is_called_again_and_never_once_the_failure_is_on_record():
    told = []

    async def failing():
        await durable.run("broken", durable.step(broken, retries=0), "a")

    async def main():
        nth = 0
        while True:
            nth += 1
            store = MemoryStore()
            told.clear()
            order = define(failing, on_failure=lambda run, error: told.append(durable.idempotency_key()))
            async with runtime(store, crash="before:write", nth=nth) as process:
                await outcome(order.start(id="42"))
            before = len(told)
            async with runtime(store):
                await outcome(order.start(id="42"))
                await outcome(order.start(id="42"))
                assert durable.get_run("42").status == "failed"
            assert len(told) - before == (1 if process.crashed else 0), nth
            assert len(set(told)) == 1, "a key for the far end, the same each time"
            if not process.crashed:
                break

    asyncio.run(main())


def test_an_on_failure_that_fails_itself_is_told_and_changes_nothing(caplog):
    async def failing():
        await durable.run("broken", durable.step(broken, retries=0), "a")

    def on_failure(run, error):
        raise LookupError("no address")

    async def main():
        async with runtime():
            with pytest.raises(ConnectionError):
                await define(failing, on_failure=on_failure).start(id="42")
            assert durable.get_run("42").status == "failed"
        assert "on_failure of run '42' of workflow 'order' failed itself: LookupError: no address" in caplog.text

    asyncio.run(main())


def test_on_failure_is_not_called_for_a_cancellation_a_success_or_code_that_was_changed():
    told = []

    async def waits():
        await durable.sleep("long", "7d")

    async def changed():
        await durable.run("other", work, "other")

    async def main():
        def on_failure(run, error):
            told.append(error)

        store, clock = MemoryStore(), FakeClock()
        async with runtime(store, clock=clock, crash="after:timer"):
            await define(waits, on_failure=on_failure).start(id="42")
        async with runtime(store, clock=clock):
            define(changed, on_failure=on_failure)
            with pytest.raises(NonDeterminismError):
                await durable.get_run("42")
            await define(once, on_failure=on_failure).start()
            gate = asyncio.Event()
            clock.sleep = lambda _: gate.wait()
            run = define(waits, on_failure=on_failure).start()
            await until(lambda: run.status == "sleeping")
            run.cancel()
            await outcome(run)
        assert told == []

    asyncio.run(main())


# -- what others know of it ----------------------------------------------------------------------------------------------


def test_facts_that_a_run_reports_are_seen_while_it_runs_in_other_processes_too_and_the_latest_stands(tmp_path):
    store, gate = tmp_path / "store", {}

    async def held():
        gate["begun"].set()
        await gate["go on"].wait()

    def in_a_thread():
        durable.report(by_thread=True)

    async def reporting():
        durable.report(stage="first", cart={"items": [1, 2]})
        await durable.run("thread", in_a_thread)
        await durable.run("held", held)
        durable.report(stage="last", at=timedelta(seconds=3))
        return "over"

    async def main():
        gate.update({"begun": asyncio.Event(), "go on": asyncio.Event()})
        async with runtime(store) as owner:
            run = define(reporting).start(id="42")
            await gate["begun"].wait()
            facts = {"stage": "first", "cart": {"items": [1, 2]}, "by_thread": True}
            assert run.facts == facts
            run.facts["cart"]["items"].append(3)
            assert run.facts == facts
            async with runtime(store):
                await until(lambda: durable.get_run("42").facts == facts, "another process sees them")
            owner.use()
            owner.kill()
        gate.update({"begun": asyncio.Event(), "go on": asyncio.Event()})
        async with runtime(store):
            assert durable.get_run("42").facts == facts
            define(reporting).start(id="42")
            await gate["begun"].wait()
            assert durable.get_run("42").facts == facts
            gate["go on"].set()
            assert await durable.get_run("42") == "over"
            facts |= {"stage": "last", "at": timedelta(seconds=3)}
            assert durable.get_run("42").facts == facts
        async with runtime(store):
            assert durable.get_run("42").facts == facts

    asyncio.run(main())


def test_a_restarted_run_has_reported_nothing_and_a_thousand_reports_take_few_commits():
    store, gate = MemoryStore(), []

    async def reporting():
        for n in range(1000):
            durable.report(n=n)
        if not gate:
            durable.report(first=True)
        await durable.run("a", work, "a")

    async def main():
        async with runtime(store) as process:
            commits = []
            apply = process._journal.inner.apply
            process._journal.inner.apply = lambda asked: commits.extend(asked) or apply(asked)
            run = define(reporting).start(id="42")
            await run
            assert run.facts == {"n": 999, "first": True}
            assert sum(any(key.startswith("facts/") for key, _ in commit.puts) for commit in commits) <= 2
            process._journal.inner.apply = apply
            gate.append("shut")
            await run.restart()
            assert run.facts == {"n": 999}
            run.delete()
            assert [key for key, _ in store.journal.scan("") if "42" in key] == []

    asyncio.run(main())


def test_what_cannot_be_reported_is_told_and_a_workflow_asks_for_no_facts():
    async def lock():
        durable.report(ok=1, lock=threading.Lock())

    async def large():
        durable.report(text="x" * 100_000)

    async def asks():
        return durable.current_run().facts

    async def main():
        with pytest.raises(NotInRunError, match=r"durable\.report"):
            durable.report(a=1)
        with pytest.raises(NotInRunError, match=r"durable\.current_run"):
            durable.current_run()
        async with runtime():
            for code, message in ((lock, "lock=...*can't be stored"), (large, "100,002 bytes")):
                run = define(code).start()
                with pytest.raises(UnserializableError, match=message.replace("...*", ".*")):
                    await run
                assert run.facts == {}
            with pytest.raises(DurableError, match=r"run\.facts"):
                await define(asks).start()
            assert define(once).start().facts == {}

    asyncio.run(main())


def test_code_and_bodies_know_their_run():
    async def knows():
        run = durable.current_run()
        inside = await durable.run("inside", lambda: (durable.current_run().id, str(durable.current_run().status)))
        return type(run), run.id, inside

    async def main():
        async with runtime():
            assert await define(knows).start(id="42") == (durable.Run, "42", ("42", "running"))

    asyncio.run(main())


def test_another_thread_may_ask_how_a_run_stands_while_its_steps_come_and_go():
    async def many():
        async with asyncio.TaskGroup() as group:
            for n in range(100):
                group.create_task(durable.run("short", asyncio.sleep, n % 7 * 0.001))
        await durable.map("more", work, range(50))

    async def main():
        async with runtime():
            run, over, seen = define(many).start(id="42"), threading.Event(), []
            engine = _current.engine()

            def look():
                while not over.is_set():
                    seen.append((engine.status_of("42"), len(engine.snapshot("42").steps)))

            looking = asyncio.create_task(asyncio.to_thread(look))
            await run
            over.set()
            await looking
            assert {status for status, _ in seen} <= {"pending", "running", "completed"}
            assert len(run.steps) == 150

    asyncio.run(main())


# -- cancelled -----------------------------------------------------------------------------------------------------------


async def in_a_body():
    await durable.run("wait", asyncio.Event().wait)


async def in_a_thread():
    await durable.run("wait", blocked)


async def in_a_sleep():
    await durable.sleep("wait", "7d")


async def in_a_sleep_of_asyncio():
    await asyncio.sleep(10**6)


async def in_a_gather():
    await asyncio.gather(durable.run("wait", asyncio.Event().wait), durable.sleep("wait", "7d"))


async def in_a_group():
    async with asyncio.TaskGroup() as group:
        group.create_task(durable.sleep("wait", "7d"))
        group.create_task(durable.run("wait", asyncio.Event().wait))


async def in_a_shield():
    await asyncio.shield(durable.run("wait", asyncio.Event().wait))


async def in_a_pause_between_attempts():
    await durable.run("wait", durable.step(broken, backoff=10**6), "wait")


async def in_a_queue():
    queue = asyncio.Queue()
    timer = asyncio.create_task(asyncio.sleep(10**6))
    try:
        await queue.get()
    finally:
        timer.cancel()


async def in_a_child():
    await durable.invoke("wait", define(in_a_sleep, "child"))


async def in_another_run():
    await define(in_a_sleep, "child").start(id="other")


async def in_a_map():
    async def wait(_):
        await asyncio.Event().wait()

    await durable.map("wait", wait, range(20))


async def under_a_time_out():
    async with asyncio.timeout(10**6):
        await durable.sleep("wait", "7d")


async def in_an_event():
    await durable.wait_for_event("wait", "never")


async def in_a_decision():
    await durable.approve("wait", "Shall we?")


async def in_a_limit():
    limit = durable.limit("one", concurrency=1)
    await asyncio.gather(*(durable.run("wait", durable.step(asyncio.Event().wait, limit=limit)) for _ in range(3)))


async def in_as_completed():
    for next_one in asyncio.as_completed([durable.sleep("wait", "7d"), durable.sleep("wait", "8d")]):
        await next_one


def blocked():
    while not gates[0].wait(0.05):
        pass


gates = [threading.Event()]
WAITS = [
    *(in_a_body, in_a_thread, in_a_sleep, in_a_sleep_of_asyncio, in_a_gather, in_a_group, in_a_shield, in_a_queue, in_a_child),
    *(
        in_an_event,
        in_a_decision,
        in_a_limit,
        in_a_pause_between_attempts,
        in_another_run,
        in_a_map,
        under_a_time_out,
        in_as_completed,
    ),
]


class NoTime(FakeClock):
    """No time passes."""

    async def sleep(self, seconds):
        await asyncio.Event().wait()

    async def wait(self, seconds, is_busy):
        await asyncio.Event().wait()


@pytest.mark.parametrize("shielded", [False, True], ids=["plain", "shielded"])
@pytest.mark.parametrize("waits", WAITS, ids=[waits.__name__ for waits in WAITS])
def test_cancelling_unblocks_every_kind_of_wait_and_what_tidies_up_may_use_verbs(waits, shielded):
    gates[0] = threading.Event()

    async def tidies_up():
        try:
            await waits()
        finally:
            tidying = durable.run("tidy", work, "tidy")
            await (asyncio.shield(tidying) if shielded else tidying)

    async def main():
        async with runtime(clock=NoTime()):
            run = define(tidies_up).start(id="42")
            await until(lambda: run.steps or waits in (in_a_sleep_of_asyncio, in_a_queue), "it waits")
            await asyncio.sleep(0.05)  # into the wait
            run.cancel("enough")
            with pytest.raises(RunCancelled, match="enough"):
                await asyncio.wait_for(run_of(run), 10)
            assert run.status == "cancelled"
            assert done[-1] == "tidy"
            gates[0].set()

    async def run_of(run):
        return await run

    asyncio.run(main())


def test_a_second_cancellation_ends_a_run_that_tidies_up_at_once():
    async def stubborn():
        try:
            await durable.sleep("wait", "7d")
        finally:
            await durable.run("tidy", asyncio.Event().wait)

    async def main():
        async with runtime(clock=NoTime()):
            run = define(stubborn).start(id="42")
            await until(lambda: run.status == "sleeping")
            run.cancel("once")
            await until(lambda: any((step.name, step.status) == ("tidy", "running") for step in run.steps))
            run.cancel("twice")
            with pytest.raises(RunCancelled, match="once"):
                await run
            assert run.status == "cancelled"

    asyncio.run(main())


# -- in real processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = ForkServer(tmp_path_factory.mktemp("key") / "signing.key")
    yield made
    made.close()


@pytest.fixture
def world(server, tmp_path):
    return World(server, tmp_path)


class World:
    """A store, what bodies did (the oracle), and gates that they wait for."""

    def __init__(self, server, path):
        self.server, self.path = server, path
        self.oracle = path / "oracle"

    def live(self, workflow, argument, **options):
        of = {"store": str(self.path / "store"), "oracle": str(self.oracle), "workflow": workflow, "argument": argument}
        return self.server.start("live", **of, **options)

    def regard(self, run_id="42"):
        return self.server.do("regard", store=str(self.path / "store"), run_id=run_id)

    def gate(self, name):
        return str(self.path / name)

    def open(self, name):
        (self.path / name).touch()

    def did(self, *what):
        """What bodies began, in order."""
        return [name for _, begun, name, _ in read_oracle(self.oracle) if begun == "begin" and (not what or name in what)]

    def wait_for(self, *line):
        soon(lambda: any(found[1:3] == line for found in read_oracle(self.oracle)), f"the oracle's line {line}")

    def keys(self, name):
        return {key for _, _, what, key in read_oracle(self.oracle) if what == name}


def test_the_order_flow_survives_a_kill_in_its_week_and_waits_only_for_the_rest(world):
    began = time.monotonic()
    with world.live("shop", 3) as first:
        soon(lambda: world.did() == ["charge", "order", "receipt"], "the receipt")
        soon(lambda: world.regard()["status"] == "sleeping", "the week to begin")
        assert first.kill()
    assert world.regard()["status"] == "interrupted"
    with world.live("shop", 3) as second:
        assert second.result()["value"] == ["charge", "order", "review"]
    assert 3 <= time.monotonic() - began < 30
    assert world.did() == ["charge", "order", "receipt", "review"]


def test_a_family_whose_process_is_killed_in_the_wait_goes_on_where_both_were(world):
    gate = world.gate("open")
    with world.live("family", gate) as first:
        world.wait_for("begin", gate)
        soon(lambda: world.regard()["facts"] == {} and len(world.regard()["steps"]) == 4, "the child's steps")
        assert first.kill()
    seen = world.regard()
    assert [path for path, _ in seen["steps"]] == ["first", "child", "child/paid", "child/held"]
    world.open("open")
    with world.live("family", gate) as second:
        found = second.result()
    assert found["steps"] == ["first", "child", "child/paid", "child/held", "child/tidy"]
    assert world.did("first", "paid", "tidy") == ["first", "paid", "tidy"]


def test_a_cancellation_from_another_process_unwinds_a_family(world):
    with world.live("family", world.gate("never")) as owner:
        world.wait_for("begin", world.gate("never"))
        world.server.do("call_off", store=str(world.path / "store"))
        found = owner.result()
    assert (found["error"], found["status"]) == ("RunCancelled", "cancelled")
    soon(lambda: world.did("tidy") == ["tidy"], "the child to tidy up")


def test_a_delayed_run_whose_process_is_killed_begins_in_the_next_one_when_it_was_to(world):
    began = time.monotonic()
    with world.live("later", "", delay=2.0) as first:
        soon(lambda: world.regard()["status"] == "pending", "the run to wait")
        assert first.kill()
    assert world.regard() == {"status": "interrupted", "facts": {}, "steps": []}
    with world.live("later", "") as second:
        assert second.result()["value"] == "late"
    assert 2 <= time.monotonic() - began < 30
    assert world.did() == ["later", "late"]


def test_killed_in_on_failure_the_next_process_calls_it_again_and_the_one_after_does_not(world):
    gate = world.gate("open")
    with world.live("failing", gate) as first:
        world.wait_for("told", "42")
        assert first.kill()
    world.open("open")
    for _ in range(2):
        with world.live("failing", gate) as process:
            assert process.result() | {"text": ""} == {"error": "ConnectionError", "text": "", "status": "failed"}
    assert [name for _, what, name, _ in read_oracle(world.oracle) if what == "told"] == ["42", "42"]
    assert world.did("broken") == ["broken"]


def test_a_run_that_was_dead_for_longer_than_its_time_out_fails_as_soon_as_it_is_resumed(world):
    with world.live("slow", "") as first:
        soon(lambda: world.regard()["status"] == "sleeping", "the sleep")
        assert first.kill()
    time_s = time.monotonic() + 1.6
    soon(lambda: time.monotonic() > time_s, "the time-out to pass")
    with world.live("slow", "") as second:
        found = second.result()
    assert (found["error"], found["status"]) == ("RunTimeout", "failed")
    assert world.did("tidy") == ["tidy"]


def test_facts_are_read_in_another_process_while_the_owner_is_stopped_and_when_it_is_dead(world):
    gate = world.gate("never")
    with world.live("leaf", gate) as owner:
        world.wait_for("begin", gate)
        soon(lambda: world.regard()["facts"].get("stage") == "paid", "the facts")
        owner.stop()
        assert world.regard()["facts"]["pid"] == owner.pid
        assert owner.kill()
    assert world.regard()["facts"] == {"stage": "paid", "pid": owner.pid}


# -- defined -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["id", "labels", "delay", "on_conflict", "engine"])
def test_a_workflow_whose_parameter_is_an_option_of_start_is_refused_when_it_is_defined(name):
    namespace = {}
    exec(f"async def order(cart, *, {name}=None): ...", namespace)
    with pytest.raises(TypeError, match=f"a parameter '{name}'.*give it another name"):
        durable.workflow(namespace["order"])
    assert "order" not in _current.workflow_functions


def test_arguments_are_checked_against_the_annotations_before_anything_is_written():
    import pydantic

    class Cart(pydantic.BaseModel):
        items: list[int]
        email: str

    async def order(cart: Cart, count: int = 1, *more: str, gift: bool = False):
        return type(cart).__name__, cart.items, count, more, gift

    async def main():
        async with runtime():
            checked = durable.workflow(name="checked", validate=True)(order)
            assert await checked.start({"items": ["1", 2], "email": "x"}, "3", "y", gift="yes") == (
                "Cart",
                [1, 2],
                3,
                ("y",),
                True,
            )
            assert await checked.start(Cart(items=[1], email="x")) == ("Cart", [1], 1, (), False)
            known = len(durable.runs())
            for args, kwargs, told in [
                (({"items": ["a"], "email": "x"},), {}, "cart.items.0: Input should be a valid integer"),
                (({"items": [1]}, "many"), {}, "cart.email: Field required, count: Input should be a valid integer"),
                (({"items": [1], "email": "x"},), {"gift": "secret-word"}, "gift: Input should be a valid boolean"),
            ]:
                with pytest.raises(ValueError, match=r"^checked\.start\(\.\.\.\): .*; nothing was started$") as raised:
                    checked.start(*args, **kwargs)
                assert told in str(raised.value)
                assert "\n" not in str(raised.value)
                assert "secret-word" not in str(raised.value)
            with pytest.raises(ValueError, match=r"cart: Input should be"):
                checked.start_many([({"items": [1], "email": "x"},), (3,)])
            assert len(durable.runs()) == known

    asyncio.run(main())


def test_without_pydantic_arguments_are_not_checked_and_it_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pydantic", None)

    async def order(count: int):
        return count

    async def main():
        async with runtime():
            assert await durable.workflow(name="unchecked", validate=True)(order).start("3") == "3"

    asyncio.run(main())
    assert "pydantic is not installed" in caplog.text


OWN_CODE = """
import time, random, uuid, datetime as dt, asyncio, os, secrets
from datetime import datetime
from time import time as clock_time
from uuid import uuid4
import urllib.request
import httpx, requests
import numpy as np
import durable_nb as durable
client = durable.AsyncClient
async def order(cart, open_door, client=None):
    {line}
"""


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("time.time()", "durable.now()"),
        ("time.monotonic()", "durable.now()"),
        ("clock_time()", "durable.now()"),
        ("time.sleep(3)", "await durable.sleep"),
        ("x = [datetime.now() for _ in cart]", "durable.now()"),
        ("dt.datetime.utcnow()", "durable.now()"),
        ("dt.date.today()", "durable.now().date()"),
        ("return random.choice(cart)", "durable.random()"),
        ("np.random.rand(3)", "durable.random()"),
        ("f'{uuid.uuid4()}'", "durable.uuid4()"),
        ("uuid4()", "durable.uuid4()"),
        ("secrets.token_hex()", "durable.uuid4()"),
        ("os.urandom(3)", "durable.random()"),
        ("with open('a') as f: f.read()", "a step"),
        ("httpx.get('https://example.com')", "durable.call"),
        ("requests.post('https://example.com')", "durable.call"),
        ("with requests.Session() as session: session.get('x')", "durable.call"),
        ("random.shuffle(cart)", "durable.random()"),
        ("async with httpx.AsyncClient() as c: await c.get('x')", "durable.AsyncClient"),
        ("urllib.request.urlopen('https://example.com')", "durable.call"),
        # none of these
        ("durable.now(), durable.uuid4(), durable.random()", None),
        ("await durable.run('t', time.time)", None),
        ("await durable.run('t', lambda: time.time())", None),
        ("def body(): return open('a').read()", None),
        ("await asyncio.sleep(3)", None),
        ("durable.AsyncClient()", None),
        ("random.Random(7).random(), np.random.default_rng(7).random()", None),
        ("httpx.Timeout(5), httpx.URL('https://example.com')", None),
        ("cart.open(), open_door(), client.get()", None),
        ("time = cart; time.time()", None),
        ("datetime(2020, 1, 1), dt.timedelta(3), uuid.UUID(int=3)", None),
        ("sorted(cart), len(cart), print(cart)", None),
    ],
)
def test_a_workflow_that_calls_what_a_replay_would_not_see_is_told_once_when_it_is_defined(tmp_path, caplog, line, instead):
    (tmp_path / "module_of_orders.py").write_text(OWN_CODE.format(line=line))
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"module_of_orders_{abs(hash(line))}", tmp_path / "module_of_orders.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for _ in range(2):
        _current.workflow_functions.pop("order", None)
        durable.workflow(module.order)
    told = [record.getMessage() for record in caplog.records if "in its own code" in record.getMessage()]
    if instead is None:
        assert told == []
    else:
        assert len(told) == 1
        assert instead in told[0]
        assert "workflow 'order'" in told[0]


def test_code_without_source_is_left_alone():
    namespace = {}
    exec("import time\nasync def order(): time.time()", namespace)
    assert list(found_in(namespace["order"])) == []
