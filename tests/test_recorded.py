"""`now`, `uuid4`, `random` and `patched`: got once, and the same in every execution."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from kernels import kernel as kernel_in
from test_engine import begun, cell, finished, kernel, killed, world
from test_engine import path as path  # noqa: PLC0414  a fixture

import durable_nb as durable
from durable_nb import _current
from durable_nb import _records as rec
from durable_nb._engine.run_log import read_log
from durable_nb._engine.workflows import Workflows
from durable_nb._housekeeping.forget import forget
from durable_nb.errors import NestedStepError, NonDeterminismError, NotInRunError
from durable_nb.testing import FakeClock, MemoryStore, redefine, runtime

done = []
"""What bodies did, in order."""
seen = []
"""What the code got, by execution."""
keys = []


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    before = dict(_current.workflow_functions)
    world.__init__()
    for world_of in (done, seen, keys):
        world_of.clear()
    yield
    _current.use_engine(None)
    _current.workflow_functions.clear()
    _current.workflow_functions.update(before)


def work(what):
    done.append(what)
    keys.append(durable.idempotency_key())
    return what


def got():
    return durable.now(), durable.uuid4(), durable.random()


# -- a workflow's run --------------------------------------------------------------------------------------------------


async def charging():
    first = got()
    await durable.run("a", work, str(first[1]))
    second = got()
    seen.append((first, second))
    await durable.run("b", work, str(second[1]))
    return first, second


@pytest.mark.parametrize("crash", ["before:step", "after:step", "before:write", "after:write"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
def test_what_a_body_was_given_stays_the_same_wherever_the_process_dies(crash, nth):
    """No body begins before what it may have been given is on disk: so a step that was cut off is asked for with the same
    arguments, and under the same idempotency key."""

    async def main():
        clock, store = FakeClock(), MemoryStore()
        workflow = redefine(charging)
        async with runtime(store, clock=clock, crash=crash, nth=nth):
            await workflow.start(id="1")
        clock.advance("3d")
        async with runtime(store, clock=clock):
            first, second = await workflow.start(id="1")
            assert await durable.get_run("1") == (first, second)
            names = [step.name for step in durable.get_run("1").steps]
        assert len(set(done)) == len(set(keys)) == 2, "a body that was cut off has been given something else"
        assert set(done) == {str(first[1]), str(second[1])}
        assert all(one[0] == first for one in seen)
        assert names == ["a", "b"], "what is recorded in passing is no step"

    asyncio.run(main())


def test_time_is_the_run_s_clock_s_and_an_aware_datetime():
    async def telling():
        before = durable.now()
        await durable.sleep("a week", "7d")
        return before, durable.now()

    async def main():
        clock = FakeClock()
        workflow = redefine(telling)
        async with runtime(clock=clock):
            before, after = await workflow.start()
        assert before == datetime.fromtimestamp(1_700_000_000, UTC)
        assert timedelta(days=7) <= after - before < timedelta(days=7, seconds=1)
        assert before.tzinfo is UTC

    asyncio.run(main())


def test_several_tasks_get_their_own_back():
    async def many():
        async def one(n):
            mine = durable.uuid4()
            await durable.run("s", work, f"{n} {mine}")
            return mine, durable.random()

        found = await asyncio.gather(*(one(n) for n in range(5)))
        await durable.run("last", work, "last")
        return found

    async def main():
        store, clock = MemoryStore(), FakeClock()
        workflow = redefine(many)
        async with runtime(store, clock=clock, crash="after:step", nth=6):
            await workflow.start(id="1")
        assert done[-1] == "last"
        before = set(done)
        async with runtime(store, clock=clock):
            found = await workflow.start(id="1")
        assert len({mine for mine, _ in found}) == len({number for _, number in found}) == 5
        assert set(done) == before == {"last", *(f"{n} {mine}" for n, (mine, _) in enumerate(found))}
        assert len(done) == 6

    asyncio.run(main())


def test_a_resumed_run_gives_a_task_that_went_on_what_it_had_got():
    """Its sibling's failure ended the run: what it did meanwhile is recorded under what it had got."""
    mended = []

    def fails():
        if not mended:
            raise ValueError("not yet")

    async def two():
        async def good():
            await durable.run("first", work, "first")
            mine = durable.uuid4()
            await durable.run("paid", work, str(mine))
            return mine

        async def bad():
            await durable.run("fails", fails)

        return (await asyncio.gather(good(), bad()))[0]

    async def main():
        store, clock = MemoryStore(), FakeClock()
        workflow = redefine(two)
        async with runtime(store, clock=clock):
            run = workflow.start(id="1")
            with suppress(ValueError):
                await run
            before = list(done)
            mended.append(True)
            assert run.status == "failed"
            mine = await run.resume()
        assert done[: len(before)] == before
        assert done.count("first") == done.count(str(mine)) == 1
        assert len(done) == 2

    asyncio.run(main())


def test_a_failed_run_is_resumed_with_what_it_had_got():
    async def fails():
        seen.append(durable.uuid4())
        if len(seen) == 1:
            raise ValueError("once")
        return seen[-1]

    async def main():
        workflow = redefine(fails)
        async with runtime():
            run = workflow.start(id="1")
            with suppress(ValueError):
                await run
            assert await run.resume() == seen[0] == seen[1]

    asyncio.run(main())


@pytest.mark.parametrize("edit", ["inserted", "removed"])
def test_an_edited_run_that_asks_otherwise_is_told(edit):
    async def before():
        if edit == "removed":
            durable.now()
        await durable.run("a", work, "a")
        await durable.run("b", work, "b")

    async def after():
        if edit == "inserted":
            durable.now()
        await durable.run("a", work, "a")
        await durable.run("b", work, "b")

    async def main():
        store = MemoryStore()
        async with runtime(store, crash="after:step", nth=1):
            await redefine(before, name="w").start(id="1")
        workflow = redefine(after, name="w")
        async with runtime(store):
            with pytest.raises(NonDeterminismError, match=r"now\(\)"):
                await workflow.start(id="1")
        assert done == ["a"]

    asyncio.run(main())


# -- patched -----------------------------------------------------------------------------------------------------------


async def old():
    await durable.run("a", work, "a")
    await durable.run("old", work, "old")
    await durable.run("c", work, "c")


async def new():
    await durable.run("a", work, "a")
    if durable.patched("the new way"):
        await durable.run("new", work, "new")
    else:
        await durable.run("old", work, "old")
    await durable.run("c", work, "c")
    seen.append(durable.patched("the new way"))


@pytest.mark.parametrize(("crash", "nth", "had_passed"), [("before:step", 1, False), ("before:step", 2, False),
                                                          ("after:step", 1, False), ("after:step", 2, True),
                                                          ("before:step", 3, True), ("after:step", 3, True)])  # fmt: skip
def test_a_run_takes_the_new_way_where_it_had_not_passed_it(crash, nth, had_passed):
    async def main():
        store, clock = MemoryStore(), FakeClock()
        async with runtime(store, clock=clock, crash=crash, nth=nth):
            await redefine(old, name="w").start(id="1")
        workflow = redefine(new, name="w")
        for _ in range(2):  # and stays on it
            async with runtime(store, clock=clock, crash="after:step", nth=1):
                await workflow.start(id="1")
        async with runtime(store, clock=clock):
            await workflow.start(id="1")
        assert ("new" in done) is not had_passed
        assert seen
        assert set(seen) == {not had_passed}

    asyncio.run(main())


def test_a_step_that_is_at_work_when_the_process_dies_was_passed(monkeypatch):
    """It is on record that it was asked for, and it may have been done: the new way would ask for something else."""

    async def main():
        monkeypatch.setattr("durable_nb._engine.outbox._RECORD_AFTER_S", 0.0)
        at_work, store = asyncio.Event(), MemoryStore()

        async def endless(what):
            done.append(what)
            at_work.set()
            if done.count(what) == 1:
                await asyncio.Event().wait()

        async def before():
            await durable.run("a", work, "a")
            await durable.run("old", endless, "old")

        async def after():
            await durable.run("a", work, "a")
            if durable.patched("x"):
                await durable.run("new", work, "new")
            else:
                await durable.run("old", endless, "old")

        async with runtime(store) as process:
            redefine(before, name="w").start(id="1")
            await at_work.wait()
            opened = process.engine.store
            while not any(  # noqa: ASYNC110
                asked.name == "old"
                for _, _, row in read_log(
                    opened.journal, opened.signer, rec.RunRecord("1", "workflow", "", rec.scope_of("~run 1"), 0, "", 0.0)
                )
                for asked in row.asked
            ):
                await asyncio.sleep(0.01)
            process.kill()
        workflow = redefine(after, name="w")
        async with runtime(store):
            await workflow.start(id="1")
        assert done == ["a", "old", "old"]

    asyncio.run(main())


def test_the_call_can_go_when_no_old_run_is_left():
    async def without():
        await durable.run("a", work, "a")
        await durable.run("new", work, "new")
        await durable.run("c", work, "c")

    async def main():
        for nth in (1, 2, 3):
            store = MemoryStore()
            done.clear()
            async with runtime(store, crash="after:step", nth=nth):
                await redefine(new, name="w").start(id="1")
            workflow = redefine(without, name="w")
            async with runtime(store):
                await workflow.start(id="1")
            assert done == ["a", "new", "c"]

    asyncio.run(main())


# -- a cell ------------------------------------------------------------------------------------------------------------


def test_a_cell_keeps_them_over_kills_and_edits_until_it_completes(path):
    async def main():
        reached = asyncio.Event()

        async def first():
            seen.append(got())
            await durable.run("a", work, "a")
            reached.set()
            await asyncio.Event().wait()

        async def edited():
            found = got()
            assert durable.patched("anything")
            await durable.run("b", work, "b")
            return found, durable.random()

        async with kernel(path) as one:
            await killed(one, first, reached)
        async with kernel(path) as two:
            kept, more = await cell(two, edited)
            assert kept == seen[0]
            assert more != kept[2]
            after, _ = await cell(two, edited)
            assert after[1] != kept[1], "it had completed: the next attempt gets its own"

    asyncio.run(main())


async def paid(what, how):
    """Of its first attempt nothing is heard."""
    world.do((what, durable.idempotency_key()))
    world.start("paid").set()
    if len(world.done) == 1:
        if how == "failed":
            raise ValueError(what)
        await asyncio.Event().wait()
    return what


@pytest.mark.parametrize("how", ["killed", "failed", "interrupted"])
def test_what_a_cell_s_step_was_given_is_on_disk_before_it_begins(path, how):
    async def main():
        reached = world.start("paid")

        async def code():
            return await durable.run("paid", paid, str(durable.uuid4()), how)

        async with kernel(path) as one:
            if how == "killed":
                await killed(one, code, reached)
            elif how == "failed":
                with pytest.raises(ValueError):
                    await cell(one, code)
            else:
                run = await begun(one)
                task = asyncio.ensure_future(finished(run, code))
                await reached.wait()
                run.stop(asyncio.CancelledError())
                with suppress(asyncio.CancelledError):
                    await task
        async with kernel(path) as two:
            assert await cell(two, code) == world.done[0][0]
        assert len(set(world.done)) == 1, "another argument, or another idempotency key"
        assert len(world.done) == 2

    asyncio.run(main())


def test_tasks_of_a_cell_get_their_own_back_in_whatever_order_they_ask(path):
    async def main():
        orders = [[0, 1, 2], [2, 0, 1]]
        ended = asyncio.Event()

        async def code():
            order, gates = orders[0], [asyncio.Event() for _ in range(3)]
            found = {}

            async def one(n):
                await gates[n].wait()
                found[n] = durable.uuid4()

            tasks = [asyncio.create_task(one(n)) for n in range(3)]
            for n in order:
                gates[n].set()
                await tasks[n]
            await durable.run("keep", work, "keep")
            seen.append(found)
            ended.set()
            if len(orders) == 2:
                await asyncio.Event().wait()

        async with kernel(path) as one_kernel:
            await killed(one_kernel, code, ended)
        orders.pop(0)
        async with kernel(path) as other:
            await cell(other, code)
        assert seen[0] == seen[1]
        assert len(set(seen[0].values())) == 3

    asyncio.run(main())


def test_children_that_were_started_with_them_are_found_again(path):
    async def child(given):
        return await durable.run("c", work, given)

    async def main():
        workflow = redefine(child)
        ended = asyncio.Event()

        async def code():
            run = workflow.start(str(durable.uuid4()))
            value = await run
            seen.append((run.id, value))
            ended.set()
            if len(seen) == 1:
                await asyncio.Event().wait()

        async with kernel(path) as one:
            first = Workflows(one)
            _current.use_engine(lambda: first)
            await killed(one, code, ended)
        async with kernel(path) as two:
            second = Workflows(two)
            _current.use_engine(lambda: second)
            await cell(two, code)
        assert seen[0] == seen[1]
        assert len(done) == 1

    asyncio.run(main())


@pytest.mark.kernel
def test_in_a_notebook_they_are_kept_over_a_kill_and_an_edit_and_a_restored_cell_has_them(tmp_path):
    cell_of = """%%durable order
at, order_id, draw = durable.now(), durable.uuid4(), durable.random()
def keep(what):
    open("seen.txt", "a").write(what + "\\n")
await durable.run("keep", keep, f"{at.isoformat()} {order_id} {draw}")
"""
    notebook = tmp_path / "shop.ipynb"  # known by name: else an edited cell would begin an attempt of its own
    with kernel_in(tmp_path, env={"JPY_SESSION_NAME": str(notebook)}) as k:
        k.send(cell_of + 'import asyncio; open("at work", "w").write("\\n"); await asyncio.Event().wait()')
        k.wait_until(tmp_path / "at work")
        k.kill()
        assert k.run(cell_of + "edited = True").status == "ok"
        kept, *more = (tmp_path / "seen.txt").read_text().splitlines()
        assert more == []
        assert k.value("f'{at.isoformat()} {order_id} {draw}'") == kept
        k.restart()
        assert k.run(cell_of + "edited = True").status == "ok"
        assert k.value("f'{at.isoformat()} {order_id} {draw}'") == kept
        assert (tmp_path / "seen.txt").read_text().splitlines() == [kept]


def test_what_is_forgotten_takes_them_along(path):
    async def main():
        async def code():
            got()
            await durable.run("a", work, "a")

        async with kernel(path) as one:
            await cell(one, code)
            assert len(one.store.journal.scan("value/")) == 3
            await asyncio.to_thread(forget, one, "cell")
            assert one.store.journal.scan("value/") == []

    asyncio.run(main())


# -- where they can't be used --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [durable.now, durable.uuid4, durable.random, lambda: durable.patched("x")])
def test_they_belong_into_a_run_and_not_into_a_body(call, path):
    with pytest.raises(NotInRunError):
        call()

    async def main():
        async with kernel(path) as one:
            with pytest.raises(NestedStepError):
                await cell(one, nesting)

    async def nesting():
        await durable.run("nested", lambda: call())

    asyncio.run(main())


def test_a_change_has_a_name():
    with pytest.raises(TypeError, match="patched"):
        durable.patched(1)
    with pytest.raises(ValueError, match="empty"):
        durable.patched(" ")
