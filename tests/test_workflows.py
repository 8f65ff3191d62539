"""Runs of workflows: found by id, gone on with after any death, their steps identified by place.

Most run on a store in memory that several processes share (`durable_nb.testing`), where a process dies at a named write;
what has to do with bytes and files runs on the real disk.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import logging
import math
import pickle
import re
import socket
import sys
import threading
import types
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.error import URLError

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import durable_nb as durable
from durable_nb import _current, testing
from durable_nb import _records as rec
from durable_nb._engine import WATCH_S
from durable_nb._journal import Commit
from durable_nb.errors import (
    CorruptStoreError,
    DurableError,
    LeaseLost,
    NonDeterminismError,
    NotInRunError,
    RunCancelled,
    RunConflictError,
    RunNotFoundError,
    StepFailed,
    StepInterrupted,
    StepTimeout,
    StoreError,
    UnserializableError,
)
from durable_nb.testing import FakeClock, MemoryStore, redefine, runtime

done: list[Any] = []
"""What bodies did to the outer world, in order. No record of the journal's."""
told: list[str] = []
"""Steps whose result the workflow has seen."""
gates: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    before = dict(_current.workflow_functions)
    _forget()
    yield
    for gate in gates.values():
        gate.set()
    _current.workflow_functions.clear()
    _current.workflow_functions.update(before)


def _forget():
    done.clear()
    told.clear()
    gates.clear()


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else tmp_path / "store"


def gate(name):
    return gates.setdefault(name, asyncio.Event())


def work(what):
    done.append(what)
    return f"{what} done"


async def work_async(what):
    done.append(what)
    await asyncio.sleep(0)
    return f"{what} done"


async def held(what):
    """Says that it has begun, waits for its gate, then does it."""
    gate(f"{what} begun").set()
    await gate(what).wait()
    done.append(what)
    return f"{what} done"


async def flaky(what, good_from):
    """Fails until it is tried for the `good_from`th time in the world's history."""
    done.append(what)
    if done.count(what) < good_from:
        raise ConnectionError(f"{what} is down")
    return f"{what} done"


async def broken(what):
    done.append(what)
    raise ConnectionError(f"{what} is down")


async def fixable(what):
    """Fails until the world is set right."""
    done.append(what)
    if not gate("fixed").is_set():
        raise RuntimeError(f"{what} is to be fixed")
    return f"{what} done"


def define(fn, name="order"):
    """`fn` as the workflow of that name, whatever had it before: the code was edited."""
    _current.workflow_functions.pop(name, None)
    return durable.workflow(name=name)(fn)


def two_steps(fn=work):
    async def body():
        a = await durable.run("a", fn, "a")
        return [a, await durable.run("b", fn, "b")]

    return body


async def until(condition, what=""):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail(f"waited in vain: {what or condition}")


async def outcome(run):
    """What a run returns or raises, as something to compare."""
    try:
        return "returned", await run
    except Exception as error:
        return "raised", type(error), error.args


# -- one run for one id -----------------------------------------------------------------------------------------------


def test_started_twice_under_an_id_it_is_one_run(store):
    """In the same tick, after it has ended, and from another process."""

    async def main():
        order = define(two_steps())
        async with runtime(store):
            first, second = order.start(id="42"), order.start(id="42")
            assert first.id == second.id == "42"
            assert await asyncio.gather(first, second) == [["a done", "b done"]] * 2
            assert await order.start(id="42") == ["a done", "b done"]
        async with runtime(store) as other:
            again = order.start(id="42")
            assert again.status == "completed"
            assert await again == ["a done", "b done"]
            assert len(other.engine.store.journal.scan("run/")) == 1
        assert done == ["a", "b"]

    asyncio.run(main())


def test_started_in_two_living_processes_it_is_one_run_and_both_get_its_result(store):
    async def main():
        order = define(two_steps(held))
        async with runtime(store) as first, runtime(store) as second:
            first.use()
            mine = order.start(id="42")
            await gate("a begun").wait()
            second.use()
            theirs = order.start(id="42")
            waiting = asyncio.ensure_future(outcome(theirs))
            await asyncio.sleep(0.05)
            assert theirs.status == "running"
            gate("a").set()
            gate("b").set()
            first.use()
            assert await mine == ["a done", "b done"]
            assert await waiting == ("returned", ["a done", "b done"])
        assert done == ["a", "b"]

    asyncio.run(main())


def test_a_run_that_another_process_started_and_completed_in_the_moment_of_starting_it_stays_completed(store):
    async def body():
        told.append("executed")
        return await durable.run("a", work, "a")

    async def main():
        order = define(body)
        async with runtime(store) as first, runtime(store) as second:
            first.use()
            await order.start(id="42")
            record, lease = first.engine.ownership.read_run("42")
            assert lease is None
            second.use()
            looked = second._workflows.catalog.seen
            looks = []
            second._workflows.catalog.seen = lambda run_id: (
                looked(run_id) if looks else looks.append(run_id)
            )  # before it was there
            assert await order.start(id="42") == "a done"
            assert second.engine.ownership.read_run("42") == (record, None)
        assert (done, told) == (["a"], ["executed"])

    asyncio.run(main())


def test_without_an_id_each_start_is_a_run_of_its_own():
    async def main():
        order = define(two_steps())
        async with runtime():
            first, second = order.start(), order.start()
            await asyncio.gather(first, second)
            assert first.id != second.id
            assert {run.id for run in durable.runs()} == {first.id, second.id}
        assert Counter(done) == {"a": 2, "b": 2}

    asyncio.run(main())


def test_a_run_started_by_a_workflow_is_started_once_however_often_that_goes_on(store):
    """Also without an id; two that are equal are two, and edited arguments are no reason to start it again."""

    async def child(what):
        return await durable.run("a", work, what)

    def parent(last):
        async def body():
            inner = _current.workflow_functions["child"]
            start = durable.workflow(name="child")(inner).start
            runs = [start("x"), start("x"), start(last)]
            values = [await run for run in runs]
            await durable.run("held", held, "held")
            return values

        return body

    async def main():
        define(child, "child")
        order = define(parent("y"))
        async with runtime(store) as process:
            order.start(id="42")
            await gate("held begun").wait()
            process.kill()
        order = define(parent("z"))
        gate("held").set()
        async with runtime(store):
            assert await order.start(id="42") == ["x done", "x done", "y done"]
            assert len(durable.runs(workflow="child")) == 3
        assert sorted(done) == ["held", "x", "x", "y"]

    asyncio.run(main())


def test_a_used_id_with_other_arguments_or_for_another_workflow_is_a_conflict(store):
    async def one(what, *, n=0):
        return await durable.run("a", work, what)

    async def main():
        order, other = define(one), define(one, "other")
        async with runtime(store):
            assert await order.start("x", n=1, id="42") == "x done"
            for start in (
                lambda: order.start("y", n=1, id="42"),
                lambda: order.start("x", n=True, id="42"),
                lambda: order.start("x", id="42"),
                lambda: other.start("x", n=1, id="42"),
            ):
                with pytest.raises(RunConflictError, match=r"'42'.*nothing was started"):
                    start()
            with pytest.raises(RunConflictError, match="completed"):
                order.start("x", n=1, id="42", on_conflict="fail")
            with pytest.raises(ValueError, match="'attach', 'fail', 'restart'"):
                order.start("x", n=1, id="new", on_conflict="ask")
            with pytest.raises(RunNotFoundError):
                durable.get_run("new")
        assert done == ["x"]

    asyncio.run(main())


def test_a_fault_in_the_call_is_found_before_anything_is_recorded():
    async def one(what):
        return what

    async def main():
        order = define(one)
        async with runtime() as process:
            for bad in (threading.Lock(), (i for i in ()), [{"deep": threading.Lock()}]):
                with pytest.raises(UnserializableError, match=r"'order'.*nothing was recorded"):
                    order.start(bad, id="42")
            with pytest.raises(TypeError):
                order.start(id="42")
            with pytest.raises(ValueError, match="empty"):
                order.start("x", id=" ")
            assert process.engine.store.journal.scan("r") == []

    asyncio.run(main())


def test_restarted_a_run_keeps_id_and_arguments_and_does_everything_anew(store):
    async def body(what):
        await durable.run("a", work, what)
        await durable.sleep("pause", "1h")
        return await durable.run("b", work, f"{what} later")

    async def main():
        order, clock = define(body), FakeClock()
        async with runtime(store, clock=clock):
            await order.start("x", id="42")
            await order.start("x", id="42", on_conflict="restart")
            assert done == ["x", "x later"] * 2
            assert clock.wall_s - 1_700_000_000 == 7200
            assert len(durable.runs()) == 1

    asyncio.run(main())


def test_a_run_that_is_executed_is_not_restarted_under_its_executor(store):
    """Neither here nor in another process: one run has one executor."""

    async def main():
        order = define(two_steps(held))
        async with runtime(store) as first, runtime(store) as second:
            first.use()
            run = order.start(id="42")
            await gate("a begun").wait()
            for process in (first, second):
                process.use()
                with pytest.raises(RunConflictError, match="running"):
                    order.start(id="42", on_conflict="restart")
            gate("a").set()
            gate("b").set()
            first.use()
            assert await run == ["a done", "b done"]
        assert done == ["a", "b"]

    asyncio.run(main())


# -- any death, any shape ---------------------------------------------------------------------------------------------


async def ask(name, fn, *args, **options):
    value = await durable.run(name, durable.step(fn, **options) if options else fn, *args)
    told.append(name)
    return value


async def shaped(shape, place="r"):
    """A workflow that does what its argument says. Steps are named by where they are in it."""
    kind, *rest = shape
    match kind:
        case "step":
            return await ask(place, (work, work_async)[rest[0]], place)
        case "flaky":
            return await ask(place, flaky, place, rest[0])
        case "once":
            return await ask(place, work_async, place, at_most_once=True)
        case "broken":
            return await ask(place, broken, place, retries=rest[0])
        case "fixable":
            return await ask(place, fixable, place, retries=0)
        case "sleep":
            return await durable.sleep(place, rest[0])
        case "seq":
            return [await shaped(part, f"{place}.{n}") for n, part in enumerate(rest)]
        case "loop":
            return [await shaped(rest[1], f"{place}.{n}") for n in range(rest[0])]
        case "gather":
            return await asyncio.gather(*(shaped(part, f"{place}.{n}") for n, part in enumerate(rest)))
        case "map":
            return await asyncio.gather(*(ask(f"{place}.{n}", work_async, f"{place}.{n}") for n in range(rest[0])))
        case "task":
            return await asyncio.create_task(shaped(rest[0], f"{place}.t"))
        case "group":
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(shaped(part, f"{place}.{n}")) for n, part in enumerate(rest)]
            return [task.result() for task in tasks]
        case "try":
            try:
                return await shaped(rest[0], f"{place}.try")
            except ConnectionError as error:
                return [f"caught {error}", await shaped(rest[1], f"{place}.except")]
    raise AssertionError(shape)


STEP, ASYNC, FLAKY, PAUSE, BROKEN = ["step", 0], ["step", 1], ["flaky", 3], ["sleep", 40], ["broken", 1]
SHAPES = {
    "sequence": ["seq", STEP, ASYNC, STEP],
    "loop": ["loop", 4, ASYNC],
    "gather": ["gather", STEP, ASYNC, STEP, ASYNC],
    "map": ["map", 5],
    "tasks": ["gather", ["task", ["seq", ASYNC, ["task", STEP]]], ["seq", ["task", ASYNC], ASYNC]],
    "group": ["group", ["seq", ASYNC, STEP], ["group", ASYNC, ["loop", 2, ASYNC]], PAUSE],
    "try": ["seq", ["try", ["seq", ASYNC, BROKEN, ASYNC], ASYNC], ["try", STEP, STEP]],
    "failed": ["seq", STEP, BROKEN, STEP],
    "retries": ["seq", ASYNC, FLAKY, STEP],
    "sleeps": ["seq", STEP, PAUSE, ["gather", PAUSE, ["seq", PAUSE, ASYNC]], STEP],
}


def recorded(store):
    """Names of the steps whose outcome is in the store."""
    rows = store.journal.scan("step/")
    return {rec.unpack(store.signer, key, row, rec.Outcome).name for key, row in rows}


def succeeded(store):
    rows = [rec.unpack(store.signer, key, row, rec.Outcome) for key, row in store.journal.scan("step/")]
    return {outcome.name for outcome in rows if not outcome.failed}


async def life(store, clock, shape, crash=None, nth=1):
    """One process: (has it died, what the run came to). Nothing recorded runs again, nothing was told that isn't recorded."""
    order = define(shaped)
    before, kept = len(done), recorded(store)
    result = None
    async with runtime(store, clock=clock, crash=crash, nth=nth) as process:
        result = await outcome(order.start(shape, id="42"))
    while process.engine.shared.workers._busy:  # a process that dies takes its threads along; here they have to end first  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    again = kept & set(done[before:])
    assert not again, f"{again} ran again"
    assert set(told) <= recorded(store), "a result was handed out that is not in the store"
    clock.advance(7)
    return process.crashed, result


async def lives(shape, cuts):
    """Die at each of `cuts`, then live on: (what the run came to, how many deaths there were, the clock)."""
    _forget()
    store, clock, deaths = MemoryStore(), FakeClock(), 0
    for crash, nth in cuts:
        crashed, _ = await life(store, clock, shape, crash, nth)
        deaths += crashed
    _, result = await life(store, clock, shape)
    return result, deaths, clock


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dead_at_any_write_the_run_goes_on_and_repeats_nothing(shape, side):
    """For every single write of the run: dead before or after it, the next process comes to the same end."""

    async def main():
        expected, _, _ = await lives(shape, [])
        for nth in itertools.count(1):
            result, deaths, clock = await lives(shape, [(f"{side}:write", nth)])
            assert result == expected
            if "sleep" in str(shape):
                assert clock.wall_s - 1_700_000_000 <= 3 * 40 + 2 * 7 + 5
            if not deaths:
                return nth
        raise AssertionError

    assert asyncio.run(main()) > 4


@pytest.mark.parametrize("side", ["before", "after"])
def test_dead_at_any_write_on_disk_the_run_goes_on(tmp_path, side):
    """The same with the journal that people have."""
    shape = ["seq", ["gather", STEP, ["seq", ASYNC, FLAKY]], PAUSE, ["try", BROKEN, STEP]]

    async def main():
        await lives(shape, [])
        order, ends, whole = define(shaped), set(), Counter(done)
        for nth in itertools.count(1):
            _forget()
            clock = FakeClock()
            async with runtime(tmp_path / f"{nth}", clock=clock, crash=f"{side}:write", nth=nth) as process:
                await outcome(order.start(shape, id="42"))
            async with runtime(tmp_path / f"{nth}", clock=clock):
                ends.add(str(await outcome(order.start(shape, id="42"))))
            assert Counter(done) <= whole + Counter(set(whole)), "one death, one more attempt at most"
            if not process.crashed:
                return ends
        raise AssertionError

    assert len(asyncio.run(main())) == 1


def _shapes(*more_leaves):
    """Random shapes. What fails is caught by the code around it, or ends the run."""
    leaf = st.sampled_from([STEP, ASYNC, ["flaky", 2], FLAKY, PAUSE, ["sleep", 5], ["map", 3], *more_leaves])

    def more(inner):
        several = st.lists(inner, min_size=1, max_size=3)
        return st.one_of(
            several.map(lambda parts: ["seq", *parts]),
            several.map(lambda parts: ["gather", *parts]),
            several.map(lambda parts: ["group", *parts]),
            st.tuples(st.integers(1, 3), inner).map(lambda t: ["loop", *t]),
            inner.map(lambda part: ["task", part]),
            st.tuples(inner, inner).map(lambda t: ["try", ["seq", t[0], ["broken", 1]], t[1]]),
            st.tuples(inner, inner).map(lambda t: ["try", *t]),
        )

    return st.recursive(leaf, more, max_leaves=7)


_cuts = st.lists(st.tuples(st.sampled_from(["before:write", "after:write"]), st.integers(1, 12)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_shapes(), _cuts)
def test_dead_again_and_again_any_shape_comes_to_the_same_end(shape, cuts):
    async def main():
        expected, _, _ = await lives(shape, [])
        whole = Counter(done)
        result, _, _ = await lives(shape, cuts)
        assert result == expected
        assert set(done) == set(whole)

    asyncio.run(main())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_shapes(["fixable"], ["fixable"]), st.integers(1, 10))
@example(["task", ["try", ["seq", STEP, BROKEN], ["seq", STEP, ["fixable"]]]], 3)  # the fallback of a failure fails
def test_any_failed_shape_resumed_comes_to_its_end_and_repeats_no_success(shape, nth):
    """Whatever failed, with the world set right resume() goes on from there, with a death in between too."""

    async def main():
        _forget()
        gate("fixed").set()
        whole, expected = MemoryStore(), None
        async with runtime(whole):
            expected = await outcome(define(shaped).start(shape, id="42"))
        _forget()
        store, clock = MemoryStore(), FakeClock()
        async with runtime(store, clock=clock):
            run = define(shaped).start(shape, id="42")
            await outcome(run)
        gate("fixed").set()
        for crash in ("after:write", None):
            kept, before = succeeded(store), len(done)
            result = None
            async with runtime(store, clock=clock, crash=crash, nth=nth):
                result = await outcome(durable.get_run("42").resume())
            assert not kept & set(done[before:])
        assert result == expected

    asyncio.run(main())


@pytest.mark.parametrize("order_of_ends", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_the_order_in_which_parallel_steps_end_never_matters(order_of_ends, kept):
    """Ended in any order, dead after `kept` of them: each gets its own result back, only the others run."""

    async def body():
        async def branch(n):
            return [await durable.run("part", held, f"p{n}{m}") for m in range(2)]

        return await asyncio.gather(*(branch(n) for n in range(3)), durable.run("part", held, "p3"))

    async def main():
        order, store = define(body), MemoryStore()
        async with runtime(store) as process:
            order.start(id="42")
            await until(lambda: "p30 begun" in gates or "p3 begun" in gates)
            for count, n in enumerate(order_of_ends[:kept], 1):
                gate(f"p{n}0").set()
                await until(lambda count=count: len(store.journal.scan("step/")) == count)
            process.kill()
        before = list(done)
        assert before == [f"p{n}0" for n in order_of_ends[:kept]]
        names = [f"p{n}{m}" for n in reversed(order_of_ends) for m in range(2)] + ["p3"]
        for name in names:
            gate(name).set()
        async with runtime(store):
            assert await durable.get_run("42").resume() == [*([f"p{n}0 done", f"p{n}1 done"] for n in range(3)), "p3 done"]
        assert sorted(done) == sorted(names)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["group", "gather"])
def test_a_failure_among_siblings_that_the_code_catches_is_no_change_of_the_code(how):
    """TaskGroup cancels the others, gather lets them run: replayed, they get less far than they did, which is no fault."""
    turn = gates["turn"] = asyncio.Event()

    async def after_the_others():
        await turn.wait()

    async def body():
        async def three():
            for n in range(3):
                await durable.run(f"s{n}", work_async, f"s{n}")
                await asyncio.sleep(0.001)
            turn.set()

        async def fails():
            await durable.run("wait", after_the_others)
            await durable.run("broken", durable.step(broken, retries=0), "broken")

        try:
            if how == "group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(fails())
                    group.create_task(three())
            else:
                await asyncio.gather(fails(), three())
        except (ConnectionError, ExceptionGroup):
            return await durable.run("instead", work_async, "instead")

    async def main():
        order, store = define(body), MemoryStore()
        async with runtime(store, crash="before:run", nth=2) as process:
            await outcome(order.start(id="42"))
        assert process.crashed
        async with runtime(store):
            assert await order.start(id="42") == "instead done"
        assert done == ["s0", "s1", "s2", "broken", "instead"]

    asyncio.run(main())


# -- edited code ------------------------------------------------------------------------------------------------------


async def stopped_after(store, body, nth, *args):
    """Start `body` as run 42 and die right after its `nth` outcome is in the store."""
    async with runtime(store, crash="after:step", nth=nth) as process:
        await outcome(define(body).start(*args, id="42"))
    assert process.crashed


def test_an_edited_body_or_argument_keeps_the_recorded_result_and_says_so_once(store, caplog):
    async def edited(what):
        done.append(f"edited {what}")
        return "edited"

    async def before():
        return [await durable.run("a", work, f"a{n}") for n in range(3)] + [await durable.run("b", work, "b")]

    async def after():
        return [await durable.run("a", edited, f"a{n}") for n in range(3)] + [await durable.run("b", work, "c")]

    async def main():
        await stopped_after(store, before, 3)
        order = define(after)
        async with runtime(store):
            assert await order.start(id="42") == ["a0 done", "a1 done", "a2 done", "c done"]
        (notice,) = caplog.messages
        assert re.match(r"step 'a'.*was edited.*recorded result stands", notice)
        assert done == ["a0", "a1", "a2", "c"]

    asyncio.run(main())


def test_an_unchanged_step_is_not_called_edited(store, caplog):
    async def main():
        await stopped_after(store, two_steps(), 1)
        order = define(two_steps())
        async with runtime(store):
            await order.start(id="42")
        assert caplog.messages == []

    asyncio.run(main())


async def _original():
    await durable.run("charge", work, "charge")
    await durable.run("order", work, "order")
    return await durable.run("receipt", work, "receipt")


async def _renamed():
    await durable.run("charge", work, "charge")
    await durable.run("book", work, "book")
    return await durable.run("receipt", work, "receipt")


async def _other_kind():
    await durable.run("charge", work, "charge")
    await durable.sleep("order", 5)
    return await durable.run("receipt", work, "receipt")


async def _other_order():
    await durable.run("order", work, "order")
    await durable.run("charge", work, "charge")
    return await durable.run("receipt", work, "receipt")


async def _inserted():
    await durable.run("charge", work, "charge")
    await durable.run("tax", work, "tax")
    await durable.run("order", work, "order")
    return await durable.run("receipt", work, "receipt")


async def _shortened():
    return await durable.run("charge", work, "charge")


async def _swallowing():
    await durable.run("charge", work, "charge")
    for name in ("book", "pack", "receipt"):
        with suppress(Exception):
            await durable.run(name, work, name)
    with suppress(Exception):
        await durable.sleep("pause", 5)
    return "fine"


async def _all_at_once():
    return await asyncio.gather(*(durable.run(name, work, name) for name in ("charge", "book", "receipt")))


EDITS = {
    "renamed": (_renamed, ["run 'order'", "run 'book'"]),
    "other kind": (_other_kind, ["run 'order'", "sleep 'order'"]),
    "other order": (_other_order, ["run 'charge'", "run 'order'"]),
    "inserted": (_inserted, ["run 'order'", "run 'tax'"]),
    "shortened": (_shortened, ["run 'order'", ""]),
    "swallowing": (_swallowing, ["run 'order'", "run 'book'"]),
    "all at once": (_all_at_once, ["run 'order'", "run 'book'"]),
}


@pytest.mark.parametrize(("edited", "columns"), EDITS.values(), ids=EDITS)
def test_code_that_asks_for_other_steps_is_told_so_and_executes_nothing(edited, columns):
    """Both columns are in the message, the run has failed, and with the code put back it goes on from where it was."""

    async def main():
        store = MemoryStore()
        await stopped_after(store, _original, 2)
        before = dict(store.journal.rows)
        order = define(edited)
        async with runtime(store):
            run = order.start(id="42")
            with pytest.raises(NonDeterminismError, match=r"nothing was executed.*resume") as raised:
                await run
            assert "recorded" in str(raised.value)
            assert "asked for" in str(raised.value)
            marked = next(line for line in str(raised.value).splitlines() if line.endswith("<-"))
            assert all(column in marked for column in columns), marked
            assert run.status == "failed"
            assert done == ["charge", "order"]
            with pytest.raises(NonDeterminismError):
                await order.start(id="42")
        same = {key: row for key, row in store.journal.rows.items() if key.startswith(("step/", "timer/", "try/"))}
        assert same == {key: row for key, row in before.items() if key in same or key.startswith(("step/", "timer/", "try/"))}
        define(_original)
        async with runtime(store):
            assert await durable.get_run("42").resume() == "receipt done"
        assert done == ["charge", "order", "receipt"]

    asyncio.run(main())


def test_a_sleep_that_became_a_step_is_told_so():
    async def before():
        await durable.sleep("pause", 5)
        await durable.run("a", work, "a")
        await durable.run("b", work, "b")

    async def after():
        await durable.run("pause", work, "pause")
        await durable.run("a", work, "a")

    async def main():
        store = MemoryStore()
        await stopped_after(store, before, 1)
        define(after)
        async with runtime(store):
            with pytest.raises(NonDeterminismError, match=r"run 'pause' where sleep 'pause' is recorded"):
                await durable.get_run("42").resume()
        assert done == ["a"]

    asyncio.run(main())


def test_after_a_changed_step_every_later_verb_raises_the_same():
    seen = []

    async def edited():
        await durable.run("charge", work, "charge")
        for verb in (
            lambda: durable.run("book", work, "book"),
            lambda: durable.run("order", work, "order"),
            lambda: durable.run("new", work, "new"),
            lambda: durable.sleep("pause", 5),
        ):
            try:
                await verb()
            except NonDeterminismError as error:
                seen.append(error)
        return "fine"

    async def main():
        store = MemoryStore()
        await stopped_after(store, _original, 2)
        define(edited)
        async with runtime(store):
            with pytest.raises(NonDeterminismError):
                await durable.get_run("42").resume()
        assert len(seen) == 4
        assert len(set(map(str, seen))) == 1

    asyncio.run(main())


def test_a_parallel_step_that_is_recorded_alone_is_missed_too():
    """Of three at once the last had ended when the process died: code that asks for the first two only has changed."""

    async def before():
        return await asyncio.gather(*(durable.run(name, held, name) for name in "abc"))

    async def after():
        return await asyncio.gather(*(durable.run(name, held, name) for name in "ab"))

    async def main():
        store = MemoryStore()
        async with runtime(store, crash="after:step"):
            run = define(before).start(id="42")
            gate("c").set()
            await run
        for name in "abc":
            gate(name).set()
        define(after)
        async with runtime(store):
            with pytest.raises(NonDeterminismError, match="2 of 3 recorded") as raised:
                await durable.get_run("42").resume()
            assert "3  run 'c'" in str(raised.value)
            define(before)
            assert await durable.get_run("42").resume() == ["a done", "b done", "c done"]
        assert sorted(done) == ["a", "b", "c"]

    asyncio.run(main())


def test_steps_appended_to_the_code_are_no_change(store):
    async def longer():
        return [await _original(), await durable.run("more", work, "more")]

    async def main():
        await stopped_after(store, _original, 3)
        define(longer)
        async with runtime(store):
            assert await durable.get_run("42").resume() == ["receipt done", "more done"]
        assert done == ["charge", "order", "receipt", "more"]

    asyncio.run(main())


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["same process", "another process"])
def test_a_failed_run_stays_failed_until_it_is_resumed_from_the_step_that_failed(store, how):
    good_from = 2

    async def body():
        caught = ""
        try:
            await durable.run("optional", durable.step(broken, retries=0), "optional")
        except ConnectionError as error:
            caught = str(error)
        a = await durable.run("a", work, "a")
        b = await durable.run("b", durable.step(flaky, retries=0), "b", good_from)
        return [caught, a, b, await durable.run("c", work, "c")]

    async def main():
        order = define(body)

        async def fails():
            run = order.start(id="42")
            with pytest.raises(ConnectionError, match="b is down"):
                await run
            assert run.status == "failed"
            with pytest.raises(ConnectionError, match="b is down") as raised:
                await order.start(id="42")
            assert "step 'b'" in raised.value.__notes__[0]
            assert done == ["optional", "a", "b"]

        async def goes_on():
            run = durable.get_run("42").resume()
            assert await run == ["optional is down", "a done", "b done", "c done"]
            assert run.status == "completed"

        async with runtime(store):
            await fails()
            if how == "same process":
                await goes_on()
        if how != "same process":
            async with runtime(store):
                assert [run.id for run in durable.runs("failed")] == ["42"]
                await goes_on()
        assert done == ["optional", "a", "b", "b", "c"]

    asyncio.run(main())


def test_resumed_after_a_gather_the_failed_step_is_tried_again_though_its_sibling_ended_later(store):
    async def slow():
        done.append("slow")
        await until(lambda: "a" in done)
        await asyncio.sleep(0.02)
        return "slow"

    async def body():
        return await asyncio.gather(durable.run("a", durable.step(flaky, retries=0), "a", 2), durable.run("slow", slow))

    async def main():
        async with runtime(store):
            run = define(body).start(id="42")
            with pytest.raises(ConnectionError):
                await run
            assert await run.resume() == ["a done", "slow"]
        assert Counter(done) == {"a": 2, "slow": 1}

    asyncio.run(main())


def test_a_failure_that_the_code_caught_is_replayed_as_the_same_exception(store):
    seen = []

    async def fails(what):
        done.append(what)
        raise KeyError(what, 3)

    async def body():
        try:
            await durable.run("a", fails, "a")
        except KeyError as error:
            seen.append((type(error), error.args, tuple(error.__notes__)))
        await durable.run("b", work, "b")
        return await durable.run("c", work, "c")

    async def main():
        await stopped_after(store, body, 2)
        async with runtime(store):
            assert await durable.get_run("42").resume() == "c done"
        assert len(seen) == 2
        assert seen[0] == seen[1]
        assert done == ["a", "b", "c"]

    asyncio.run(main())


def test_a_failure_that_the_code_slept_upon_is_no_reason_to_ask_for_other_steps(store):
    """It was caught: what is tried again is the later one."""

    async def body():
        try:
            await durable.run("a", durable.step(broken, retries=0), "a")
        except ConnectionError:
            await durable.sleep("cool down", "1h")
        return await durable.run("b", durable.step(fixable, retries=0), "b")

    async def main():
        order = define(body)
        async with runtime(store):
            with pytest.raises(RuntimeError, match="to be fixed"):
                await order.start(id="42")
            gate("fixed").set()
            assert await durable.get_run("42").resume() == "b done"
        assert done == ["a", "b", "b"]

    asyncio.run(main())


def test_a_failure_that_the_code_raised_again_after_a_sleep_is_tried_again(store):
    async def body():
        await durable.sleep("first", "1h")
        try:
            return await durable.run("a", durable.step(fixable, retries=0), "a")
        except RuntimeError:
            await durable.sleep("cool down", "1h")
            raise

    async def main():
        order = define(body)
        async with runtime(store):
            with pytest.raises(RuntimeError, match="to be fixed"):
                await order.start(id="42")
            gate("fixed").set()
            assert await durable.get_run("42").resume() == "a done"
        assert done == ["a", "a"]

    asyncio.run(main())


def test_a_clock_that_is_set_changes_nothing_of_what_is_tried_again(store):
    clock = FakeClock()

    async def body():
        with suppress(ConnectionError):
            await durable.run("a", durable.step(broken, retries=0), "a")
        clock.jump(-86400)
        await durable.run("b", work, "b")
        clock.jump(-86400)
        return await durable.run("c", durable.step(fixable, retries=0), "c")

    async def main():
        order = define(body)
        async with runtime(store, clock=clock):
            with pytest.raises(RuntimeError, match="to be fixed"):
                await order.start(id="42")
            gate("fixed").set()
            assert await durable.get_run("42").resume() == "c done"
        assert done == ["a", "b", "c", "c"]

    asyncio.run(main())


@pytest.mark.parametrize("how", ["awaited", "left"])
def test_the_loser_of_a_race_that_the_code_cancels_is_no_change_of_the_code(store, how):
    """In each execution it gets differently far."""

    async def slow():
        for n in range(9):
            await durable.run(f"slow {n}", work, n)
        gate("slow").set()
        await asyncio.Event().wait()

    async def quick():
        return await durable.run("quick", held, "quick")

    async def body():
        loser, winner = asyncio.create_task(slow()), asyncio.create_task(quick())
        await asyncio.wait({loser, winner}, return_when=asyncio.FIRST_COMPLETED)
        loser.cancel()
        if how == "awaited":
            with suppress(asyncio.CancelledError):
                await loser
        return winner.result()

    async def main():
        order = define(body)
        async with runtime(store, crash="before:run", nth=2) as process:
            run = order.start(id="42")
            await gate("slow").wait()
            gate("quick").set()
            await run
        assert process.crashed
        async with runtime(store):
            assert await order.start(id="42") == "quick done"
        assert done == [*range(9), "quick"]

    asyncio.run(main())


@pytest.mark.parametrize(
    "error", [ExceptionGroup("two", [KeyError("k"), OSError(2, "x")]), URLError(OSError(1, "no"))], ids=repr
)
def test_an_exception_that_holds_exceptions_is_itself_live_and_replayed(store, error):
    """A group for instance, as TaskGroup raises it: `except*` works, in the run and in who waits for it."""
    seen = []

    async def fails():
        raise error

    async def body():
        try:
            await durable.run("a", durable.step(fails, retries=0))
        except type(error) as caught:
            seen.append(repr(caught))
        await durable.run("b", work, "b")
        raise error

    async def main():
        await stopped_after(store, body, 2)
        async with runtime(store):
            run = durable.get_run("42").resume()
            assert (await outcome(run))[:2] == (await outcome(run))[:2] == ("raised", type(error))
        assert seen == [repr(error)] * 2

    asyncio.run(main())


def test_an_exception_whose_str_raises_fails_its_run(store):
    class MuteError(Exception):
        def __str__(self):
            raise ValueError("no words")

    async def body(in_step):
        if in_step:
            await durable.run("a", durable.step(fails, retries=0))
        await fails()

    async def fails():
        raise MuteError("x")

    async def main():
        order = define(body)
        async with runtime(store):
            for in_step in (True, False):
                run = order.start(in_step)
                with pytest.raises(StepFailed, match="MuteError"):
                    await run
                assert run.status == "failed"

    asyncio.run(main())


def test_an_exception_that_cannot_be_pickled_is_stepfailed_live_and_replayed(store):
    seen = []

    class LocalError(Exception):
        def __init__(self, a, b):
            super().__init__(f"{a} {b}")
            self.lock = threading.Lock()

    async def fails():
        raise LocalError("card", "declined")

    async def body():
        try:
            await durable.run("a", durable.step(fails, retries=0))
        except StepFailed as error:
            seen.append((error.args, str(error), error.type_name, tuple(error.__notes__)))
        await durable.run("b", work, "b")
        raise LocalError("no", "way")

    async def main():
        await stopped_after(store, body, 2)
        async with runtime(store):
            run = durable.get_run("42").resume()
            live = await outcome(run)
            assert live == await outcome(run)
            assert live[1] is StepFailed
        assert len(seen) == 2
        assert seen[0] == seen[1]
        assert "LocalError: card declined" in seen[0][1]

    asyncio.run(main())


def test_pending_retries_survive_a_death_with_their_count_and_their_date(store):
    async def body():
        return await durable.run("a", durable.step(flaky, retries=2, backoff="1h"), "a", 4)

    async def main():
        clock = FakeClock()
        async with runtime(store, clock=clock, crash="after:try", nth=2) as process:
            await outcome(define(body).start(id="42"))
        assert process.crashed
        clock.advance("20m")
        async with runtime(store, clock=clock):
            with pytest.raises(ConnectionError):
                await durable.get_run("42").resume()
        assert done == ["a"] * 3
        assert clock.wall_s - 1_700_000_000 == 7200

    asyncio.run(main())


def test_what_cannot_be_stored_fails_the_step_or_the_run_and_says_so(store):
    async def lock():
        done.append("lock")
        return threading.Lock()

    async def in_step():
        await durable.run("a", lock)

    async def in_run():
        await durable.run("a", work, "a")
        return threading.Lock()

    async def main():
        async with runtime(store):
            for body, what in ((in_step, "step 'a'"), (in_run, "run 'in_run'")):
                run = define(body, body.__name__).start(id=body.__name__)
                with pytest.raises(UnserializableError, match=what):
                    await run
                assert run.status == "failed"
        assert done == ["lock", "a"]

    asyncio.run(main())


# -- once, and in time ------------------------------------------------------------------------------------------------


def test_an_interrupted_attempt_at_an_at_most_once_step_is_not_made_again(store):
    """StepInterrupted instead, kept until resume()."""

    async def body():
        await durable.run("a", work, "a")
        return await durable.run("charge", durable.step(held, at_most_once=True), "charge")

    async def main():
        order = define(body)
        async with runtime(store) as process:
            order.start(id="42")
            await gate("charge begun").wait()
            process.kill()
        gate("charge").set()
        async with runtime(store):
            for _ in range(2):
                with pytest.raises(StepInterrupted, match=r"'charge'.*resume\(\)"):
                    await order.start(id="42")
            assert done == ["a"]
        async with runtime(store):
            assert await durable.get_run("42").resume() == "charge done"
        assert done == ["a", "charge"]

    asyncio.run(main())


def test_a_stepinterrupted_that_the_code_catches_is_replayed_as_such(store):
    async def body():
        try:
            await durable.run("charge", durable.step(held, at_most_once=True), "charge")
        except StepInterrupted:
            await durable.run("look", work, "look")
            await durable.run("report", work, "report")
            return "looked"

    async def main():
        order = define(body)
        async with runtime(store) as process:
            order.start(id="42")
            await gate("charge begun").wait()
            process.kill()
        gate("charge").set()
        async with runtime(store, crash="after:step") as process:
            await outcome(order.start(id="42"))
        assert process.crashed
        async with runtime(store):
            assert await order.start(id="42") == "looked"
        assert done == ["look", "report"]

    asyncio.run(main())


def test_a_finished_at_most_once_step_is_an_ordinary_one():
    async def main():
        shape = ["seq", ["once"], ["once"]]
        for crash in ("after:step", "after:run"):
            result, deaths, _ = await lives(shape, [(crash, 1)])
            assert deaths == 1
            assert result == ("returned", ["r.0 done", "r.1 done"])
            assert done == ["r.0", "r.1"]

    asyncio.run(main())


def test_a_timed_out_async_attempt_is_cancelled_and_made_again():
    async def slow_first(what):
        done.append(what)
        if done.count(what) < 2:
            try:
                await asyncio.Event().wait()
            finally:
                done.append("cancelled")
        return f"{what} done"

    async def body():
        return await durable.run("a", durable.step(slow_first, timeout=0.05, retry_on=StepTimeout), "a")

    async def main():
        async with runtime():
            assert await define(body).start() == "a done"
        assert done == ["a", "cancelled", "a"]

    asyncio.run(main())


def test_after_the_last_timeout_it_is_the_step_that_failed():
    async def forever():
        await asyncio.Event().wait()

    async def body():
        await durable.run("a", durable.step(forever, timeout=0.02, retries=1, retry_on=StepTimeout))

    async def main():
        async with runtime():
            with pytest.raises(StepTimeout, match=r"'a'.*20 ms"):
                await define(body).start()

    asyncio.run(main())


@pytest.mark.parametrize("ends", ["while it is waited for", "afterwards"])
def test_a_timed_out_thread_gets_no_twin_and_the_wait_for_it_ends(ends, caplog):
    """Attempts that can't begin while the thread lives count as timed out; so the wait is bounded, a later result dropped."""
    release = gates["thread"] = threading.Event()

    def slow():
        done.append("begun")
        assert release.wait(20)
        done.append("ended")
        return "done"

    async def body():
        return await durable.run("a", durable.step(slow, timeout=0.2 if ends == "afterwards" else 20, retries=1))

    async def main():
        store = MemoryStore()
        async with runtime(store):
            run = define(body).start(id="42")
            await until(lambda: done == ["begun"])
            if ends == "afterwards":
                with pytest.raises(StepTimeout, match="200 ms"):
                    await run
                release.set()
                await until(lambda: done == ["begun", "ended"])
                await until(lambda: any("dropped" in message for message in caplog.messages))
                with pytest.raises(StepTimeout):
                    await order_again()
            else:
                release.set()
                assert await run == "done"
        assert done == ["begun", "ended"]

    async def order_again():
        return await durable.get_run("42")

    asyncio.run(main())


# -- one executor -----------------------------------------------------------------------------------------------------


def test_a_dead_owner_is_succeeded_at_once_a_living_one_is_not_robbed(store):
    async def main():
        order = define(two_steps(held))
        async with runtime(store) as first, runtime(store) as second:
            first.use()
            run = order.start(id="42")
            await gate("a begun").wait()
            second.use()
            assert run.status == "running"
            assert run.resume() is run
            assert durable.resume() == []
            await asyncio.sleep(0.05)
            assert done == []
            first.kill()
            assert run.status == "interrupted"
            gate("a").set()
            gate("b").set()
            assert await run.resume() == ["a done", "b done"]
        assert done == ["a", "b"]

    asyncio.run(main())


def test_a_taken_over_run_is_lost_to_its_old_owner(store):
    """Its late commit is refused, its code cancelled; who waited there hears the result from the new owner."""
    unwound = []

    async def body():
        try:
            await durable.run("a", held, "a")
            await durable.run("b", work, "b")
            return "done"
        except asyncio.CancelledError:
            unwound.append("cancelled")
            raise

    async def main():
        order = define(body)
        async with runtime(store) as first, runtime(store) as second:
            first.use()
            run = order.start(id="42")
            there = first._workflows._tasks["42"]
            waiting = asyncio.ensure_future(outcome(run))
            await gate("a begun").wait()
            second.use()
            run.resume(take_over=True)
            await until(lambda: "42" in second.engine.ownership.held)
            gate("a").set()
            assert await run == "done"
            with pytest.raises(LeaseLost, match="taken over"):
                await there
            assert await waiting == ("returned", "done")
            first.use()
            assert await outcome(order.start(id="42")) == ("returned", "done")
            assert unwound == ["cancelled"]
        assert Counter(done) == {"a": 2, "b": 1}  # both were in the body of `a` when it changed hands

    asyncio.run(main())


def test_resuming_what_is_completed_or_executed_here_does_nothing(store):
    async def main():
        order = define(two_steps(held))
        async with runtime(store):
            run = order.start(id="42")
            await gate("a begun").wait()
            run.resume()
            run.resume(take_over=True)
            gate("a").set()
            gate("b").set()
            await run
            run.resume()
            assert run.status == "completed"
        assert done == ["a", "b"]

    asyncio.run(main())


@pytest.mark.parametrize("run_id", [42, ""])
def test_an_id_that_is_none_starts_nothing(store, run_id):
    async def main():
        order = define(two_steps())
        async with runtime(store):
            with pytest.raises((TypeError, ValueError), match=r"a run's id is .*othing was started"):
                order.start(id=run_id)
            assert durable.runs() == []

    asyncio.run(main())


def test_durable_resume_goes_on_with_every_interrupted_run(store):
    async def main():
        order = define(two_steps(held))
        async with runtime(store) as process:
            for n in range(3):
                order.start(id=f"r{n}")
            await gate("a begun").wait()
            process.kill()
        gate("a").set()
        gate("b").set()
        async with runtime(store):
            assert {run.status for run in durable.runs()} == {"interrupted"}
            resumed = durable.resume()
            assert {run.id for run in resumed} == {"r0", "r1", "r2"}
            assert await asyncio.gather(*resumed) == [["a done", "b done"]] * 3
            assert durable.resume() == []
            assert {run.status for run in durable.runs()} == {"completed"}

    asyncio.run(main())


def test_durable_resume_robs_nobody_who_was_faster(store, monkeypatch):
    async def main():
        order = define(two_steps(held))
        async with runtime(store) as process:
            order.start(id="42")
            await gate("a begun").wait()
            process.kill()
        gate("a").set()
        async with runtime(store) as one, runtime(store) as other:
            found = other._workflows.interrupted()
            assert found == [("42", "order")]
            one.use()
            run = durable.get_run("42").resume()
            await gate("b begun").wait()
            monkeypatch.setattr(other._workflows, "interrupted", lambda: found)  # it looked before the first one took the run
            other.use()
            assert durable.resume() == []
            gate("b").set()
            one.use()
            assert await run == ["a done", "b done"]

    asyncio.run(main())


def test_a_process_that_ends_leaves_its_runs_interrupted_and_its_steps_kept(store):
    async def body():
        await durable.run("a", work, "a")
        return await durable.run("b", held, "b")

    async def main():
        order = define(body)
        async with runtime(store):
            order.start(id="42")
            await gate("b begun").wait()
        gate("b").set()
        async with runtime(store):
            assert durable.get_run("42").status == "interrupted"
            assert await durable.get_run("42").resume() == "b done"
        assert done == ["a", "b"]

    asyncio.run(main())


def test_a_synchronous_result_waits_and_times_out():
    async def main():
        order = define(two_steps(held))
        async with runtime():
            run = order.start(id="42")
            await gate("a begun").wait()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(_current.engine().outcome("42"), 0.02)
            assert run.status == "running"
            gate("a").set()
            gate("b").set()
            assert await run == ["a done", "b done"]

    asyncio.run(main())


def test_a_run_that_is_taken_over_while_it_awaits_something_of_its_own_is_told(store):
    """It needn't come to a step to hear that it was lost."""

    async def body():
        await durable.run("a", work, "a")
        if done.count("waits") == 1:
            return "done"
        done.append("waits")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            done.append("unwound")
            raise

    async def main():
        order = define(body)
        async with runtime(store) as first, runtime(store) as second:
            first.use()
            run = order.start(id="42")
            await until(lambda: "waits" in done)
            second.use()
            run.resume(take_over=True)
            assert await run == "done"
            await until(lambda: "unwound" in done)
        assert done == ["a", "waits", "unwound"]

    asyncio.run(main())


def test_a_run_whose_end_could_not_be_written_is_free_for_others_once_the_disk_serves_again(store, monkeypatch):
    refused = []

    async def main():
        order = define(two_steps())
        async with runtime(store) as first, runtime(store) as second:
            first.use()
            journal = first.engine.store.journal

            def full(commits):
                if refused != ["over"] and "b" in done:
                    refused.append("disk full")
                    raise StoreError("the disk is full")
                return type(journal).apply(journal, commits)

            monkeypatch.setattr(journal, "apply", full)
            run = order.start(id="42")
            with pytest.raises(StoreError, match="disk is full"):
                await run
            assert len(refused) >= 2
            refused[:] = ["over"]
            second.use()
            await until(lambda: run.status == "interrupted", "the lease to be let go")
            assert await run.resume() == ["a done", "b done"]
        assert Counter(done) == {"a": 1, "b": 2}  # the second was never acknowledged

    asyncio.run(main())


# -- how a run stands -------------------------------------------------------------------------------------------------


class Stuck(FakeClock):
    """Time that never comes."""

    async def sleep(self, seconds):
        gate("asleep").set()
        await asyncio.Event().wait()


@pytest.mark.parametrize("status", ["sleeping", "retrying", "running"])
def test_the_status_tells_what_a_run_waits_for_here_and_in_another_process(store, status):
    async def body():
        await durable.run("a", work, "a")
        if status == "sleeping":
            await durable.sleep("pause", "7d")
        elif status == "retrying":
            await durable.run("b", broken, "b")
        else:
            await durable.run("b", held, "b")

    async def main():
        order = define(body)
        async with runtime(store, clock=Stuck()) as first, runtime(store, clock=Stuck()) as second:
            first.use()
            run = order.start(id="42")
            await (gate("b begun") if status == "running" else gate("asleep")).wait()
            assert run.status == status
            second.use()
            await until(lambda: run.status == status)
            assert [run.id for run in durable.runs(status=status)] == ["42"]
            first.kill()
            assert run.status == "interrupted"

    asyncio.run(main())


def test_a_step_at_work_beside_a_sleep_is_a_run_at_work():
    async def body():
        await asyncio.gather(durable.sleep("pause", "7d"), durable.run("b", held, "b"))

    async def main():
        async with runtime(clock=Stuck()):
            run = define(body).start()
            await gate("b begun").wait()
            await gate("asleep").wait()
            assert run.status == "running"
            gate("b").set()
            await until(lambda: run.status == "sleeping")

    asyncio.run(main())


# -- cancelling -------------------------------------------------------------------------------------------------------


def test_cancelled_from_another_process_a_run_unwinds_where_it_is_executed(store):
    async def body():
        try:
            await durable.run("a", work, "a")
            done.append("waits")
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            done.append("unwound")
            raise

    async def main():
        order = define(body)
        async with runtime(store) as first, runtime(store) as second:
            first.use()
            waiting = asyncio.ensure_future(outcome(order.start(id="42")))
            await until(lambda: "waits" in done)
            second.use()
            run = durable.get_run("42")
            run.cancel("sold out")
            with pytest.raises(RunCancelled, match=r"'42'.*sold out"):
                await run
            assert run.status == "cancelled"
            assert await waiting == ("raised", RunCancelled, ("the run '42' was cancelled: sold out",))
            assert second.engine.store.journal.scan("cancel/") == []
        assert done == ["a", "waits", "unwound"]

    asyncio.run(main())


def test_cancelled_from_another_process_a_run_is_left_to_tidy_up(store):
    """It hears of the cancellation once, however long its code takes to unwind."""

    async def body():
        try:
            await durable.run("a", work, "a")
            done.append("waits")
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(2.5 * WATCH_S)
            done.append("tidy")

    async def main():
        order = define(body)
        async with runtime(store) as first, runtime(store) as second:
            first.use()
            waiting = asyncio.ensure_future(outcome(order.start(id="42")))
            await until(lambda: "waits" in done)
            second.use()
            durable.get_run("42").cancel()
            assert (await waiting)[1] is RunCancelled
        assert done == ["a", "waits", "tidy"]

    asyncio.run(main())


def test_a_run_whose_owner_dies_before_it_hears_of_a_cancellation_is_cancelled_all_the_same(store):
    """Nothing goes on with it but an explicit resume."""

    async def main():
        order = define(two_steps(held))
        async with runtime(store) as first, runtime(store) as second:
            first.use()
            run = order.start(id="42")
            await gate("a begun").wait()
            second.use()
            run.cancel("sold out")
            first.kill()
            assert run.status == "cancelled"
            assert durable.resume() == []
            with pytest.raises(RunCancelled, match="sold out"):
                await order.start(id="42")
            gate("a").set()
            gate("b").set()
            assert await run.resume() == ["a done", "b done"]
            assert run.status == "completed"
        assert done == ["a", "b"]

    asyncio.run(main())


def test_a_run_that_awaits_a_cancelled_one_has_failed_itself(store):
    async def main():
        inner = define(two_steps(held), "inner")

        async def body():
            await inner.start(id="inner")

        async with runtime(store):
            run = define(body).start(id="outer")
            await gate("a begun").wait()
            durable.get_run("inner").cancel("sold out")
            with pytest.raises(RunCancelled, match="sold out"):
                await run
            assert run.status == "failed"

    asyncio.run(main())


@pytest.mark.parametrize("where", ["step", "sleep", "own await", "not begun"])
def test_a_cancelled_run_unwinds_at_its_next_await_and_says_so_to_who_waits(store, where):
    async def body():
        try:
            await durable.run("a", work, "a")
            if where == "step":
                await durable.run("b", held, "b")
            elif where == "sleep":
                await durable.sleep("b", "7d")
            else:
                gate("b begun").set()
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            done.append("unwound")
            raise

    async def main():
        order = define(body)
        async with runtime(store, clock=Stuck()):
            run = order.start(id="42")
            if where != "not begun":
                await gate("asleep" if where == "sleep" else "b begun").wait()
            run.cancel("the customer changed her mind")
            with pytest.raises(RunCancelled, match=r"'42'.*changed her mind"):
                await asyncio.wait_for(outcome_or_raise(run), 5)
            assert run.status == "cancelled"
            assert done in (["a", "unwound"], [])
            run.cancel()
        async with runtime(store):
            with pytest.raises(RunCancelled, match="changed her mind"):
                await order.start(id="42")
            assert durable.resume() == []

    asyncio.run(main())


async def outcome_or_raise(run):
    return await run


def test_a_cancelled_thread_goes_on_alone_and_resume_attaches_to_it():
    release = gates["thread"] = threading.Event()

    def slow():
        done.append("begun")
        assert release.wait(20)
        return "done"

    async def body():
        return await durable.run("a", slow)

    async def main():
        async with runtime():
            run = define(body).start()
            await until(lambda: done == ["begun"])
            run.cancel()
            with pytest.raises(RunCancelled):
                await run
            run.resume()
            await until(lambda: run.status == "running")
            release.set()
            assert await run == "done"
        assert done == ["begun"]

    asyncio.run(main())


def test_a_step_that_exits_fails_its_run_and_leaves_the_loop_alive():
    def leave():
        raise SystemExit(3)

    async def body():
        await durable.run("a", leave)

    async def main():
        async with runtime():
            run = define(body).start()
            await until(lambda: run.status == "failed")
            with pytest.raises(SystemExit):
                await run

    asyncio.run(main())


def test_a_waiter_that_gives_up_stops_nothing():
    async def main():
        order = define(two_steps(held))
        async with runtime():
            run = order.start()
            await gate("a begun").wait()
            waiting = asyncio.ensure_future(outcome(run))
            await asyncio.sleep(0)
            waiting.cancel()
            gate("a").set()
            gate("b").set()
            assert await run == ["a done", "b done"]

    asyncio.run(main())


def test_a_run_that_cancels_itself_has_ended_and_is_not_executed_again_and_again():
    async def body():
        await durable.run("a", work, "a")
        mine = asyncio.ensure_future(asyncio.sleep(60))
        mine.cancel()
        done.append("again")
        await mine

    async def main():
        async with runtime():
            run = define(body).start()
            with pytest.raises(RunCancelled, match="its own code"):
                await asyncio.wait_for(outcome_or_raise(run), 5)
            assert run.status == "cancelled"
        assert done == ["a", "again"]

    asyncio.run(main())


def test_an_interrupted_run_is_cancelled_without_executing_it_and_completed_ones_stay(store):
    async def main():
        await stopped_after(store, two_steps(), 1)
        order = define(two_steps())
        async with runtime(store):
            run = durable.get_run("42")
            run.cancel("enough")
            with pytest.raises(RunCancelled, match="enough"):
                await run
            assert done == ["a"]
            other = order.start(id="43")
            await other
            other.cancel()
            assert other.status == "completed"

    asyncio.run(main())


def test_a_cancelled_run_goes_on_when_it_is_resumed(store):
    async def main():
        order = define(two_steps(held))
        async with runtime(store):
            run = order.start(id="42")
            gate("a").set()
            await gate("b begun").wait()
            run.cancel()
            await outcome(run)
            gate("b").set()
            assert await run.resume() == ["a done", "b done"]
        assert done == ["a", "b"]

    asyncio.run(main())


# -- asking for what isn't there --------------------------------------------------------------------------------------


def test_an_unknown_id_or_status_is_quoted_back():
    async def main():
        async with runtime():
            for ask_for in (
                lambda: durable.get_run("nope"),
                lambda: durable.Run("nope").status,
                lambda: durable.Run("nope").resume(),
                lambda: durable.Run("nope").cancel(),
                lambda: repr(durable.Run("nope")),
            ):
                with pytest.raises(RunNotFoundError, match="'nope'"):
                    ask_for()
            with pytest.raises(RunNotFoundError, match="'nope'"):
                await durable.Run("nope")
            with pytest.raises(ValueError, match=r"'finished'.*completed"):
                durable.runs("finished")
            assert durable.runs(workflow="nope") == []

    asyncio.run(main())


def test_runs_are_found_by_status_workflow_and_label():
    async def main():
        order, other = define(two_steps()), define(two_steps(), "other")
        async with runtime() as process:
            await order.start(id="1", labels=["shop", "eu"])
            process.engine.clock.advance(1)
            await other.start(id="2", labels="shop")
            process.engine.clock.advance(1)
            await order.start(id="3")

            def ids(*args, **kw):
                return [run.id for run in durable.runs(*args, **kw)]

            assert ids() == ["3", "2", "1"]
            assert ids(limit=2) == ["3", "2"]
            assert ids(workflow="order") == ["3", "1"]
            assert ids(label="shop") == ["2", "1"]
            assert ids("completed", label="eu") == ["1"]
            assert ids("failed") == []

    asyncio.run(main())


def test_without_a_store_or_a_loop_it_says_what_to_do():
    async def main():
        with pytest.raises(NotInRunError, match=r"load_ext|durable\.open"):
            define(two_steps()).start(id="42")

    before = _current._engines[:]
    _current.use_engine(None)
    try:
        asyncio.run(main())
    finally:
        _current._engines[:] = before


def test_a_run_whose_workflow_is_gone_stays_interrupted_and_says_so(store, caplog):
    async def main():
        await stopped_after(store, two_steps(), 1)
        del _current.workflow_functions["order"]
        async with runtime(store):
            run = durable.get_run("42")
            run.resume()
            assert "'42' waits: its workflow 'order' is not defined here" in caplog.messages[-1]
            caplog.clear()
            assert durable.resume() == []
            assert "'42' waits: its workflow 'order' is not defined here" in caplog.messages[-1]
            assert run.status == "interrupted"
            assert durable.resume() == []
            with pytest.raises(DurableError, match="'order' is not defined here"):
                await run
            assert run.status == "interrupted"
            define(two_steps())
            assert await run.resume() == ["a done", "b done"]
        assert done == ["a", "b"]

    asyncio.run(main())


def test_without_a_running_loop_nothing_is_recorded(tmp_path):
    order = define(two_steps())
    before = _current._engines[:]
    durable.open(tmp_path / "store")
    opened = _current.engine()
    try:
        with pytest.raises(RuntimeError, match="running event loop"):
            order.start(id="42")
        assert durable.runs() == []
    finally:
        opened.engine.store.close()
        _current._engines[:] = before


def test_an_opened_store_serves_one_loop_after_another(tmp_path):
    """What was left unfinished when the first loop ended goes on in the second, in the same process."""

    async def first():
        order.start(id="42")
        await gate("b begun").wait()

    async def second():
        gates.clear()
        gate("b").set()
        return await durable.get_run("42").resume()

    async def body():
        return [await durable.run("a", work, "a"), await durable.run("b", held, "b")]

    order = define(body)
    before = _current._engines[:]
    durable.open(tmp_path / "store")
    opened = _current.engine()
    try:
        asyncio.run(first())
        assert durable.get_run("42").status == "interrupted"
        assert asyncio.run(second()) == ["a done", "b done"]
        assert done == ["a", "b"]
    finally:
        opened.engine.store.close()
        _current._engines[:] = before


def test_arguments_that_cannot_be_read_any_more_leave_the_run_interrupted():
    """Their class isn't defined yet in the new kernel: an error for who waits, and the run goes on when it is."""
    module = types.ModuleType("durable_nb_test_shop")
    exec("class Item:\n    pass", module.__dict__)

    async def body(item):
        await durable.run("a", work, "a")
        return await durable.run("b", work, "b")

    async def main():
        store = MemoryStore()
        sys.modules[module.__name__] = module
        try:
            await stopped_after(store, body, 1, module.Item())
            del sys.modules[module.__name__]
            async with runtime(store):
                run = durable.get_run("42")
                with pytest.raises(ImportError, match="durable_nb_test_shop"):
                    await run.resume()
                assert run.status == "interrupted"
                sys.modules[module.__name__] = module
                assert await run.resume() == "b done"
        finally:
            sys.modules.pop(module.__name__, None)
        assert done == ["a", "b"]

    asyncio.run(main())


@pytest.mark.parametrize("ids", [("a/b", "a"), ("a%2Fb", "a/b"), ("naïve 日本/…", "naïve 日本"), ("\ud800", "\\ud801")])
def test_the_id_of_a_run_may_be_any_text_and_runs_keep_apart(store, ids):
    async def body(what):
        await durable.sleep("wait", "1h")
        return await durable.run("a", work, what)

    async def other(what):
        return await durable.run("b", work, what)

    async def main():
        orders = define(body), define(other, "other")
        async with runtime(store):
            runs = [order.start(run_id, id=run_id) for order, run_id in zip(orders, ids, strict=True)]
            assert [await run for run in runs] == [f"{run_id} done" for run_id in ids]
            assert [len(durable.get_run(run_id).steps) for run_id in ids] == [2, 1]
            await define(other, "other").start(ids[1], id=ids[1], on_conflict="restart")
            assert [len(durable.get_run(run_id).steps) for run_id in ids] == [2, 1]

    asyncio.run(main())


def test_a_run_that_is_started_in_a_steps_body_has_steps_of_its_own(store):
    async def inner(what):
        return await durable.run("a", work, what)

    async def main():
        inner_order = define(inner, "inner")

        async def starts():
            return await inner_order.start("a", id="child")

        async def body():
            return await durable.run("start", starts)

        async with runtime(store):
            assert await define(body).start(id="42") == "a done"
            assert [step.name for step in durable.get_run("child").steps] == ["a"]

    asyncio.run(main())


def test_the_credentials_of_a_request_that_failed_are_nowhere(tmp_path, caplog):
    """Not in the recorded exception, its cause, a message or a notice; it is raised as what it is, live and replayed."""
    secret = "hunter2"
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        there = f"127.0.0.1:{nobody.getsockname()[1]}/x?api_key={secret}"

    async def body(case):
        bearer = {"Authorization": f"Bearer {secret}"}
        if case == "refused":
            return await durable.call("c", f"http://me:{secret}@{there}", headers=bearer, retries=1)
        if case == "scheme":
            return await durable.call("c", f"ftp://me:{secret}@{there}")
        header = {"text": f"{secret}…", "line": f"{secret}\n{secret}"}[case]
        return await durable.call("c", url, headers={"Authorization": header})

    async def answers(reader, writer):
        await reader.read(1)
        writer.close()

    async def main():
        nonlocal url
        async with await asyncio.start_server(answers, "127.0.0.1", 0) as server, runtime(tmp_path / "store"):
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            order = define(body)
            for case, error in {
                "refused": httpx.ConnectError,
                "scheme": ValueError,
                "text": ValueError,
                "line": ValueError,
            }.items():
                for _ in range(2):
                    run = order.start(case, id=case)
                    with pytest.raises(error) as raised:
                        await run
                    assert secret not in f"{raised.value!r} {getattr(raised.value, '__notes__', '')} {run.steps}"
                if case == "refused":
                    assert raised.value.request.headers["Authorization"] == "[redacted]"

    url = ""
    asyncio.run(main())
    assert secret not in caplog.text
    assert not [file for file in (tmp_path / "store").rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]


def test_two_workflows_of_one_name_are_refused_and_defining_one_again_is_not():
    def first():
        async def buy():
            return 1

        return durable.workflow(buy)

    def second():
        async def buy():
            return 2

        return durable.workflow(buy)

    first()
    first()
    with pytest.raises(ValueError, match=r"two workflows are named 'buy'.*first.*second"):
        second()
    with pytest.raises(TypeError, match="async def"):
        durable.workflow(work)
    with pytest.raises(ValueError, match="empty"):
        durable.workflow(name=" ")(work_async)


def test_a_workflow_called_plainly_is_a_part_of_what_calls_it():
    async def main():
        inner = define(two_steps(), "inner")

        async def outer():
            return [await inner(), await durable.run("c", work, "c")]

        async with runtime():
            run = define(outer).start(id="42")
            assert await run == [["a done", "b done"], "c done"]
            assert [step.name for step in run.steps] == ["a", "b", "c"]
            assert len(durable.runs()) == 1

    asyncio.run(main())


def test_the_steps_of_a_run_that_is_over_are_known_from_its_records(store):
    """In the same order, under the same paths."""

    async def apart():
        await durable.run("a", work, "a")
        await durable.run("a", work, "a")

    async def body():
        await durable.run("a", work, "a")
        await durable.sleep("pause", 60)
        await asyncio.gather(apart(), durable.sleep("pause", 60))
        with suppress(ConnectionError):
            await durable.run("b", durable.step(broken, retries=0), "b")
        await durable.run("end", held, "end")

    def told_of(run):
        return [(step.path, step.kind, step.status, step.error, step.started_at) for step in run.steps]

    async def main():
        order = define(body)
        async with runtime(store):
            run = order.start(id="42")
            await gate("end begun").wait()
            live = told_of(run)[:-1]
            gate("end").set()
            await run
        assert [what[:4] for what in live] == [
            ("a", "run", "completed", None),
            ("pause", "sleep", "completed", None),
            ("pause#2", "sleep", "completed", None),
            ("a#2", "run", "completed", None),
            ("a#3", "run", "completed", None),
            ("b", "run", "failed", "ConnectionError: b is down"),
        ]
        async with runtime(store):
            steps = told_of(durable.get_run("42"))[:-1]
            assert [step[0] for step in steps if "#2" not in step[0]] == [step[0] for step in live if "#2" not in step[0]]
            assert sorted(steps) == sorted(live)

    asyncio.run(main())


def test_large_arguments_and_results_lie_in_files_of_their_own(store):
    """The run's row, which is written several times, stays small."""
    text = "durable " * 300_000

    async def body(given):
        return given.upper()

    async def main():
        order = define(body)
        async with runtime(store) as process:
            assert await order.start(text, id="42") == text.upper()
            ((_, row),) = process.engine.store.journal.scan("run/")
            assert len(row) < 10_000
        async with runtime(store):
            assert await order.start(text, id="42") == text.upper()
            with pytest.raises(RunConflictError, match="other arguments"):
                order.start(text + "!", id="42")
            again = order.start(text, id="42", on_conflict="restart")
            assert await again == text.upper()

    asyncio.run(main())


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before:timer", "after:timer"])
def test_a_death_neither_shortens_nor_lengthens_a_sleep(store, moment):
    async def body():
        await durable.sleep("pause", "2h")
        return await durable.run("a", work, "a")

    async def main():
        order, clock = define(body), FakeClock(0)
        async with runtime(store, clock=clock, crash=moment) as process:
            await outcome(order.start(id="42"))
        assert process.crashed
        clock.advance("30m")
        clock.reboot()
        async with runtime(store, clock=clock):
            assert await order.start(id="42") == "a done"
        assert clock.wall_s == 7200 + (1800 if moment == "before:timer" else 0)

    asyncio.run(main())


def test_a_wall_clock_that_is_set_changes_no_sleep_within_a_boot():
    async def body():
        await durable.run("set", set_clock)
        await durable.sleep("pause", "1h")

    clock = FakeClock()

    def set_clock():
        clock.jump(-7200)

    async def main():
        async with runtime(clock=clock):
            before = clock.now().boot_s
            await define(body).start()
            assert clock.now().boot_s - before == 3600

    asyncio.run(main())


# -- values -----------------------------------------------------------------------------------------------------------


@dataclass
class Cart:
    lines: list
    note: str = "a\r\nb"


def _values():
    import numpy as np
    import pandas as pd

    shared = [1]
    return {
        "bytes": b"\x00\xff\r\n",
        "crlf": "a\r\nb\rc\nd\u2028\0",
        "nan": [math.nan, -0.0, math.inf, 5e-324],
        "big ints": [2**53 + 1, -(10**5000), True],
        "tuples": (1, (2, [3, ()])),
        "sets": {1, frozenset({"a"})},
        "keys": {1: "int", "1": "str", None: 0, (1, 2): 3},
        "dataclass": Cart(["x"]),
        "shared": [shared, shared],
        "array": np.arange(12, dtype=">i2").reshape(3, 4).T,
        "array nan": np.array([1.5, -0.0, np.nan]),
        "frame": pd.DataFrame({"a": [1, 2], "b": ["x", None]}, index=pd.Index([3, 4], name="i")),
        "large": "x" * 3_000_000,
        "surrogate": "\udcff",
    }


def _same(one, other):
    import numpy as np
    import pandas as pd

    assert type(one) is type(other)
    if isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    elif isinstance(one, float):
        assert pickle.dumps(one) == pickle.dumps(other)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            _same(mine, theirs)
    else:
        assert one == other


NAMES = [
    *("bytes", "crlf", "nan", "big ints", "tuples", "sets", "keys", "dataclass", "shared"),
    *("array", "array nan", "frame", "large", "surrogate"),
]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_results_come_back_as_they_were(tmp_path, name):
    """An argument, a step's result and the run's result, in the process that made them and in its successors."""
    value, seen = _values()[name], []

    async def make():
        return value

    async def body(argument):
        seen.append(argument)
        result = await durable.run("make", make)
        seen.append(result)
        await durable.run("a", work, "a")
        return (argument, result)

    async def main():
        folder = tmp_path / "store"
        await stopped_after(folder, body, 2, value)
        order = define(body)
        async with runtime(folder):
            seen.extend(await order.start(value, id="42"))
        async with runtime(folder):
            seen.extend(await durable.get_run("42"))
            seen.extend(await order.start(value, id="42"))
        assert len(seen) == 10
        for one in seen:
            _same(value, one)
        if name == "shared":
            assert seen[-1][0] is seen[-1][1]

    asyncio.run(main())


@pytest.mark.parametrize("side", ["before", "after"])
def test_dead_while_a_large_result_is_written(side):
    async def large():
        done.append("large")
        return b"x" * (1 << 21)

    async def body():
        return len(await durable.run("large", large))

    async def main():
        order, store = define(body), MemoryStore()
        async with runtime(store, crash=f"{side}:value") as process:
            await outcome(order.start(id="42"))
        assert process.crashed
        async with runtime(store):
            assert await order.start(id="42") == 1 << 21
        assert done == ["large", "large"]

    asyncio.run(main())


# -- durable_nb.testing -----------------------------------------------------------------------------------------------


def test_the_page_on_testing_runs_as_it_is(tmp_path):
    """Every block of docs/do/test-a-workflow.md, in order."""
    page = Path(__file__).parents[1] / "docs" / "do" / "test-a-workflow.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    (tmp_path / "page.py").write_text("\n".join(blocks))
    spec = importlib.util.spec_from_file_location("page", tmp_path / "page.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_of_several_sleeps_the_earliest_ends_first_and_none_takes_time():
    async def main():
        clock, ends = FakeClock(0), []

        async def sleeper(seconds):
            await clock.sleep(seconds)
            ends.append((seconds, clock.wall_s))

        await asyncio.gather(*(sleeper(s) for s in (7, 5, 600, 5, 0)))
        assert ends == [(0, 0), (5, 5), (5, 5), (7, 7), (600, 600)]

    asyncio.run(main())


def test_a_time_out_that_began_beside_a_body_ends_before_a_longer_sleep():
    """However often, though the fake clock looks only now and then whether the body has ended."""

    async def body():
        try:
            async with asyncio.timeout(50):
                await durable.run("work", asyncio.sleep, 0)
                await durable.sleep("long", 100)
        except TimeoutError:
            return "timed out"
        return "slept"

    async def main():
        order = redefine(body, name="order")
        async with runtime():
            assert [await order.start(id=str(n)) for n in range(20)] == ["timed out"] * 20

    asyncio.run(main())


def test_what_is_left_of_a_wait_passes_however_short_it_is():
    async def main():
        clock = FakeClock(0)
        before = clock.now()
        await clock.sleep(1e-20)
        assert clock.now().boot_s > before.boot_s
        assert clock.now().wall_s > before.wall_s

    asyncio.run(main())


def test_a_clock_that_is_set_or_rebooted():
    clock = FakeClock(1000)
    first = clock.now()
    clock.advance("1h")
    clock.jump(-60)
    clock.jump(timedelta(seconds=30))
    then = clock.now()
    assert (then.wall_s, then.boot, then.boot_s - first.boot_s) == (1000 + 3600 - 30, first.boot, 3600)
    clock.reboot()
    assert clock.now().boot != first.boot
    assert clock.now().boot_s < first.boot_s
    with pytest.raises(ValueError, match="negative"):
        clock.advance(-1)


def test_an_unknown_crash_point_is_refused_with_the_list_of_those_there_are():
    async def main():
        for point, nth, match in (("after:lunch", 1, "'after:lunch'.*before:step, after:step"), ("after:step", 0, "nth=0")):
            with pytest.raises(ValueError, match=match):
                async with runtime(crash=point, nth=nth):
                    pytest.fail("the block was entered")

    asyncio.run(main())


@pytest.mark.parametrize("point", testing.CRASH_POINTS)
def test_every_crash_point_is_reached(store, point):
    """Dead there, the run is found unfinished, or, after its last write, not at all."""

    async def large():
        return "x" * (1 << 21)

    async def body():
        await durable.run("large", large)
        await durable.sleep("pause", 60)
        return await durable.run("a", flaky, "a", 2)

    async def main():
        order, clock = define(body), FakeClock()
        async with runtime(store, clock=clock, crash=point) as process:
            await order.start(id="42")
            pytest.fail("the block went on after the death")
        assert process.crashed
        async with runtime(store, clock=clock) as process:
            assert [run.status for run in durable.runs()] == (
                [] if point in ("before:write", "before:run") else ["interrupted"]
            )
            assert await order.start(id="42") == "a done"
        assert not process.crashed

    asyncio.run(main())


def test_a_runtime_puts_back_what_was_in_use():
    async def main():
        before = _current._engines[:]
        async with runtime() as first:
            async with runtime(crash="before:run") as second:
                define(two_steps()).start(id="42")
            assert second.crashed
            assert _current.engine() is first._workflows
            with pytest.raises(ZeroDivisionError):
                async with runtime():
                    raise ZeroDivisionError
            with pytest.raises(RunNotFoundError):
                durable.get_run("42")
        assert _current._engines == before

    asyncio.run(main())


def test_a_cancellation_from_outside_is_not_taken_for_a_crash():
    async def main():
        async def test():
            async with runtime(crash="after:run", nth=9):
                await asyncio.Event().wait()

        task = asyncio.create_task(test())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


# -- what replay shows, whose runs are whose, and calls from anywhere -------------------------------------------------------


def test_what_the_code_prints_and_logs_is_shown_once(store, capsys, caplog):
    async def body():
        print("before a")
        await durable.run("a", work, "a")
        print("before b")
        logging.getLogger("shop").warning("before b")
        await durable.run("b", held, "b")
        print("at the end")

    async def main():
        order = define(body)
        async with runtime(store) as process:
            order.start(id="42")
            await gate("b begun").wait()
            await until(lambda: len(outcomes_of(store)) == 1)
            process.kill()
        gate("b").set()
        async with runtime(store):
            await durable.get_run("42").resume()

    asyncio.run(main())
    printed = capsys.readouterr().out
    assert printed.count("before a") == 1
    assert printed.count("at the end") == 1
    assert printed.index("before a") < printed.index("before b") < printed.index("at the end")


def outcomes_of(store):
    return testing.outcomes(store) if isinstance(store, MemoryStore) else [None]


@pytest.mark.parametrize("what", [{"labels": [2026]}, {"labels": ("shop", None)}])
def test_labels_and_reasons_that_are_no_texts_are_refused_before_anything_is_written(what):
    """Written, such a row could not be read: it would hide all other runs."""

    async def main():
        store = MemoryStore()
        async with runtime(store):
            order = define(two_steps())
            with pytest.raises(TypeError, match=r"is not text; nothing was started"):
                order.start(id="41", **what)
            run = order.start(id="42")
            with pytest.raises(TypeError, match=r"cancel\(5\): the reason is a text"):
                run.cancel(5)
            await run
            assert [run.id for run in durable.runs()] == ["42"]

    asyncio.run(main())


@pytest.mark.parametrize("row", ["run/43", "lease/43", "cancel/43"])
def test_one_damaged_row_hurts_one_run_only(row):
    async def main():
        store = MemoryStore()
        async with runtime(store):
            order = define(two_steps())
            await order.start(id="42")
            held_one = define(two_steps(held), "held").start(id="44")
            await gate("a begun").wait()
            if row in store.journal.rows or row == "cancel/43":
                store.journal.rows[row] = b"nothing of ours"
            store.journal.rows["run/43"] = store.journal.rows.get("run/43", b"nothing of ours")
            assert {"42", "44"} <= {run.id for run in durable.runs()}
            await asyncio.sleep(WATCH_S * 1.2)  # whoever watches for news of the run looks at all of them
            gate("a").set()
            gate("b").set()
            assert await held_one == ["a done", "b done"]

    asyncio.run(main())


def test_a_row_lost_from_the_middle_of_the_log_is_damage(store):
    """Replayed without it, the step would be executed again."""

    async def main():
        order = define(two_steps(held))
        gate("a").set()
        async with runtime(store) as process:
            order.start(id="42")
            await gate("b begun").wait()
            await until(lambda: any(key.startswith("step/") for key, _ in process._journal.scan("step/")))
            (key,) = [key for key, _ in process._journal.scan("step/")]
            process.kill()
        async with runtime(store) as process:
            for other in ("log", "timer"):
                assert process._journal.scan(f"{other}/") == []
            row = process._journal.get(key)
            later = key[:-8] + "00000002"
            process._journal.apply([Commit(puts=((later, row),), deletes=(key,))])
            with pytest.raises(CorruptStoreError):
                await durable.get_run("42").resume()
            assert durable.get_run("42").status == "interrupted"
        assert done == ["a"]

    asyncio.run(main())


def test_resume_takes_the_runs_of_this_module_only(store):
    """Another program's workflow of the same name is left alone; by its id any run can be resumed."""

    async def main():
        async with runtime(store) as process:
            define(two_steps(held)).start(id="mine")
            await gate("a begun").wait()
            process.kill()
        gate("a").set()
        gate("b").set()
        theirs = two_steps(work)
        theirs.__module__ = "another_program"
        define(theirs)
        async with runtime(store):
            assert durable.resume() == []
            assert durable.get_run("mine").status == "interrupted"
            define(two_steps(held))
            assert [run.id for run in durable.resume()] == ["mine"]
            assert await durable.get_run("mine") == ["a done", "b done"]

    asyncio.run(main())


def test_a_handle_and_a_child_stay_in_their_own_store(tmp_path):
    """Another store is opened while the run is executed."""

    async def child(what):
        return await durable.run("c", work, what)

    async def body():
        await durable.run("a", held, "a")
        start = durable.workflow(name="child")(_current.workflow_functions["child"]).start
        return await start("inner", id="inner")

    async def main():
        define(child, "child")
        order = define(body)
        async with runtime(tmp_path / "one") as first:
            run = order.start(id="42")
            await gate("a begun").wait()
            async with runtime(tmp_path / "two"):
                assert run.status == "running"
                assert durable.runs() == []
                gate("a").set()
                assert await run == "inner done"
                assert durable.runs() == []
            first.use()
            assert {run.id for run in durable.runs()} == {"42", "inner"}

    asyncio.run(main())


def test_control_calls_from_another_thread_reach_an_idle_loop():
    async def main():
        async with runtime():
            order = define(two_steps(held))
            run = order.start(id="42")
            await gate("a begun").wait()
            await asyncio.to_thread(run.cancel, "enough")
            with pytest.raises(RunCancelled, match="enough"):
                await asyncio.wait_for(outcome_or_raise(run), 5)
            gate("a").set()
            gate("b").set()
            await asyncio.to_thread(run.resume)
            assert await asyncio.wait_for(outcome_or_raise(run), 5) == ["a done", "b done"]
            other = await asyncio.to_thread(order.start, id="43")
            assert await asyncio.wait_for(outcome_or_raise(other), 5) == ["a done", "b done"]
            assert other.result("20s") == ["a done", "b done"]
            assert await asyncio.to_thread(other.result, "20s") == ["a done", "b done"]
            assert await asyncio.to_thread(order.start(id="44").result, "20s") == ["a done", "b done"]

    asyncio.run(main())


def test_an_interrupt_inside_start_leaves_no_run_that_others_take_for_running(store, monkeypatch):
    async def main():
        order = define(two_steps())
        async with runtime(store) as first, runtime(store) as second:
            first.use()
            spawn = first._workflows._spawn

            def interrupted(*_):
                raise KeyboardInterrupt

            monkeypatch.setattr(first._workflows, "_spawn", interrupted)
            with pytest.raises(KeyboardInterrupt):
                order.start(id="42")
            monkeypatch.setattr(first._workflows, "_spawn", spawn)
            second.use()
            assert durable.get_run("42").status == "interrupted"
            assert await durable.get_run("42").resume() == ["a done", "b done"]

    asyncio.run(main())


def test_a_call_that_is_refused_returns_its_answer_in_a_workflow_too_and_is_asked_again_by_resume(store):
    """The answer stands while the run goes on; the run that failed with it asks anew."""
    asked = []

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        asked.append(len(asked))
        status = b"404 Not Found" if len(asked) == 1 else b"200 OK"
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
        await writer.drain()
        writer.close()

    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]

        async def body():
            answer = await durable.call("page", f"http://127.0.0.1:{port}/x")
            told.append(answer.status_code)
            await durable.run("b", held, "b")
            return answer.raise_for_status().text

        order = define(body)
        async with runtime(store) as process:
            order.start(id="42")
            await gate("b begun").wait()
            process.kill()
        gate("b").set()
        async with runtime(store):
            with pytest.raises(StepFailed, match="HTTPStatusError: Client error '404"):  # it can't be pickled
                await durable.get_run("42").resume()
            assert told == [404, 404]
            assert asked == [0]
            assert await durable.get_run("42").resume() == "hi"
        assert asked == [0, 1]
        assert done.count("b") == 1
        server.close()
        await server.wait_closed()

    asyncio.run(main())


@pytest.mark.parametrize("size", [1, 1 << 20])
@pytest.mark.parametrize("end", ["cancelled", "interrupted"])
def test_stopped_in_whatever_moment_a_run_has_the_body_that_has_run_on_record(size, end):
    """Between a body's end and its commit, in any turn of the loop, also while the file of a large value is being written."""

    async def stopped_after(turns):
        done, began, gate = [], asyncio.Event(), asyncio.Event()

        async def body():
            began.set()
            await gate.wait()
            done.append(turns)
            return b"x" * size

        @redefine
        async def order():
            return len(await durable.run("b", body))

        async with runtime() as process:
            run = order.start(id="r")
            await began.wait()
            gate.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            if end == "cancelled":
                run.cancel()
                with suppress(RunCancelled):
                    await run
                run.resume()
            elif "r" in process.engine.active:  # else it has ended by then
                process.engine.active["r"].stop(KeyboardInterrupt())
            assert await run == size
        assert done == [turns]

    for turns in range(10):
        asyncio.run(stopped_after(turns))
