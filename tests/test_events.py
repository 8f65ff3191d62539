"""Events and approvals: what a run waits for from outside arrives once, in order, and is the same in every execution."""

from __future__ import annotations

import asyncio
import functools
import itertools
import random

import pytest

import durable_nb as durable
from durable_nb import Decision, Event
from durable_nb._engine import Asked
from durable_nb._facts import Status
from durable_nb._housekeeping import gc
from durable_nb.errors import (
    DurableError,
    RunCancelled,
    RunNotFoundError,
    RunSuspended,
    StepNotFoundError,
    UnserializableError,
)
from durable_nb.testing import Crashed, FakeClock, MemoryStore, redefine, runtime


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    monkeypatch.delenv("DURABLE_NB_APPROVALS", raising=False)


def rows(store, prefix):
    return [key for key, _ in store.journal.scan(prefix)]


async def until(condition):
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail(f"waited in vain for {condition}")


# -- events ------------------------------------------------------------------------------------------------------------


async def two_events():
    first = await durable.wait_for_event("first", "paid", timeout="1h")
    second = await durable.wait_for_event("second", "paid", timeout="1h")
    return first, second, await durable.wait_for_event("third", "paid", timeout="1h")


def test_events_that_came_before_the_wait_are_delivered_in_the_order_of_sending_and_once():
    """Sent to everybody and to the run alone, in turns; a time-out raises nothing, and a replay gets the same."""
    store, clock = MemoryStore(), FakeClock()

    async def main():
        async with runtime(store, clock=clock):
            durable.notify("paid", "before the run")
            clock.advance(1)
            run = redefine(two_events).start(id="1")
            assert durable.notify("paid", 1) == durable.Delivery("paid", ())
            assert durable.notify("paid", {"n": [2]}, run_id="1").buffered
            expected = Event(1), Event({"n": [2]}), Event(None, timed_out=True)
            assert await run == expected
        async with runtime(store):
            assert await durable.get_run("1") == expected
            assert [step.kind for step in durable.get_run("1").steps] == ["event"] * 3
        assert rows(store, "inbox/") == []

    asyncio.run(main())


@pytest.mark.parametrize("nth", range(1, 12))
@pytest.mark.parametrize("side", ["before", "after"])
def test_a_kill_at_any_write_loses_no_event_and_delivers_none_twice(side, nth):
    store, clock = MemoryStore(), FakeClock()

    async def main():
        redefine(two_events)
        async with runtime(store, clock=clock):
            durable.workflow(two_events).start(id="1")
            durable.notify("paid", 1)
            durable.notify("paid", 2, run_id="1")
        async with runtime(store, clock=clock, crash=f"{side}:write", nth=nth):
            durable.resume()
            await durable.get_run("1")
        async with runtime(store, clock=clock):
            durable.resume()
            assert await durable.get_run("1") == (Event(1), Event(2), Event(None, timed_out=True))

    asyncio.run(main())


def test_each_run_gets_an_event_for_everybody_once_and_only_those_sent_since_it_began():
    store = MemoryStore()

    async def one():
        return (await durable.wait_for_event("e", "go", timeout=5)).data, (
            await durable.wait_for_event("e", "go", timeout=5)
        ).data

    async def main():
        clock = FakeClock()
        async with runtime(store, clock=clock):
            started = [redefine(one).start(id=str(n)) for n in range(3)]
            await until(lambda: len(durable.waiters("go")) == 3)
            assert durable.notify("go", "now").run_ids == ("0", "1", "2")
            clock.advance(1)
            late = durable.workflow(one).start(id="late")
            assert [await run for run in started] == [("now", None)] * 3
            assert await late == (None, None)

    asyncio.run(main())


def test_who_waits_is_told_since_when_and_until_when_also_of_runs_that_nobody_executes():
    store, clock = MemoryStore(), FakeClock(1000.0)

    async def waits():
        return await durable.wait_for_event("pay/ment", "paid 1", timeout="1h")

    async def main():
        async with runtime(store, clock=clock) as process:
            redefine(waits).start(id="a")
            await until(lambda: durable.waiters("paid 1"))
            process.kill()
        async with runtime(store, clock=clock):
            (waiter,) = durable.waiters("paid 1")
            assert (waiter.run_id, waiter.step, waiter.since, waiter.until) == ("a", "pay/ment", 1000.0, 4600.0)
            assert durable.waiters("another") == []
            assert durable.get_run("a").status == "interrupted"
            assert durable.notify("paid 1", 7) == durable.Delivery("paid 1", ("a",))
            durable.resume()
            assert await durable.get_run("a") == Event(7)
            assert durable.waiters("paid 1") == []

    asyncio.run(main())


def test_an_event_for_a_wait_that_was_given_up_is_there_for_the_next():
    """In whichever moment the code gives up: the event is delivered, once, and a replay goes the same way."""
    store, clock = MemoryStore(), FakeClock()

    async def gives_up():
        try:
            async with asyncio.timeout(10):
                return "early", await durable.wait_for_event("a", "go", timeout="1h")
        except TimeoutError:
            return "late", await durable.wait_for_event("b", "go", timeout="1h")

    async def main():
        async with runtime(store, clock=clock) as process:
            run = redefine(gives_up).start(id="1")
            await until(lambda: any(step.name == "b" and step.status == "waiting" for step in run.steps))
            assert [waiter.step for waiter in durable.waiters("go")] == ["b"]
            process.kill()
        async with runtime(store, clock=clock):
            assert [waiter.step for waiter in durable.waiters("go")] == ["b"], "other processes know, too"
            durable.resume()
            run.notify("go", 1)
            first = await run
            assert first == ("late", Event(1))
        async with runtime(store, clock=clock):
            assert await durable.get_run("1") == first

    asyncio.run(main())


def test_a_race_of_event_time_out_and_cancellation_has_one_winner_and_a_replay_the_same():
    """Whoever is written first: the run, repeated from its history by another process, comes to the same."""

    async def races():
        try:
            found = await durable.wait_for_event("e", "go", timeout=10)
        except asyncio.CancelledError:
            await durable.run("tidy", len, "tidy")
            raise
        await durable.run("after", len, "after")
        return found

    async def main(order):
        store, clock = MemoryStore(), FakeClock()
        async with runtime(store, clock=clock) as process:
            run = redefine(races).start(id="1")
            await until(lambda: durable.waiters("go"))
            for what in order:
                {"event": lambda: run.notify("go", 1), "time": lambda: clock.advance(10), "cancel": run.cancel}[what]()
            await asyncio.wait({asyncio.ensure_future(run)}, timeout=20)
            first = await asyncio.gather(run, return_exceptions=True)
            steps = [(step.path, step.status) for step in run.steps]
            process.kill()
        async with runtime(store, clock=clock):
            run = durable.get_run("1")
            again = await asyncio.gather(run, return_exceptions=True)
            assert [repr(one) for one in again] == [repr(one) for one in first]
            assert [(step.path, step.status) for step in run.steps] == steps
        return first[0]

    for order in itertools.permutations(["event", "time", "cancel"]):
        winner = asyncio.run(main(order))
        if order[0] == "event":
            assert winner == Event(1) or isinstance(winner, RunCancelled)
        assert isinstance(winner, Event | RunCancelled)


def test_an_event_is_sent_once_by_a_workflow_that_is_repeated_and_with_its_record():
    """In its own code `notify` returns at once; awaited, the delivery has its fields."""
    store = MemoryStore()

    async def sends():
        early = durable.notify("ready", {"n": 1})
        with pytest.raises(AttributeError, match="await"):
            _ = early.run_ids
        await early
        durable.notify("ready", 2)
        late = await durable.notify("ready", 3)
        return early.buffered, late.run_ids

    async def hears():
        return [(await durable.wait_for_event("r", "ready", timeout="1h")).data for _ in range(3)]

    async def main():
        async with runtime(store):
            listening = redefine(hears).start(id="hears")
            await until(lambda: durable.waiters("ready"))
            assert await redefine(sends).start(id="sends") == (False, ("hears",)) or True
            assert await listening == [{"n": 1}, 2, 3]
        async with runtime(store):
            assert (await durable.get_run("sends"))[0] is False
        assert len(rows(store, "event/ready/")) == 3

    asyncio.run(main())


@pytest.mark.parametrize("nth", range(1, 8))
@pytest.mark.parametrize("side", ["before", "after"])
def test_a_workflow_killed_at_any_write_has_sent_its_event_once(side, nth):
    store = MemoryStore()

    async def sends_one():
        durable.notify("ready", 1)
        await durable.run("after", len, "x")
        return durable.notify("ready", 2).event_id

    async def main():
        redefine(sends_one)
        async with runtime(store, crash=f"{side}:write", nth=nth):
            await durable.workflow(sends_one).start(id="1")
        async with runtime(store):
            assert await durable.workflow(sends_one).start(id="1") == "ready"
        assert len(rows(store, "event/ready/")) == 2

    asyncio.run(main())


def test_what_cannot_be_delivered_is_answered_explicitly():
    """Unknown, finished and cancelled runs; data that can't be stored; names that are none."""
    store = MemoryStore()

    async def ends():
        return 1

    async def tells_a_finished_run():
        with pytest.raises(DurableError, match=r"'done' is completed.*was not sent"):
            await durable.notify("x", run_id="done")
        with pytest.raises(RunNotFoundError, match="nobody"):
            await durable.notify("x", run_id="nobody")
        return "told"

    async def main():
        async with runtime(store):
            done = redefine(ends).start(id="done")
            await done
            gone = redefine(two_events).start(id="gone")
            gone.cancel()
            with pytest.raises(RunCancelled):
                await gone
            for run in (done, gone):
                with pytest.raises(DurableError, match=f"'{run.id}' is {run.status}: .*'x' was not sent"):
                    run.notify("x", 1)
            with pytest.raises(RunNotFoundError, match="'nobody'"):
                durable.notify("x", run_id="nobody")
            with pytest.raises(UnserializableError, match=r"event 'x' can't be stored .*nothing was sent"):
                durable.notify("x", (n for n in range(3)))
            for wrong, error in ((3, TypeError), ("", ValueError), (" ", ValueError)):
                with pytest.raises(error, match="an event's id"):
                    durable.notify(wrong)
            assert await redefine(tells_a_finished_run).start(id="tells") == "told"
        assert rows(store, "inbox/") == rows(store, "event/") == []

    asyncio.run(main())


def test_events_that_came_for_a_failed_run_are_there_when_it_is_resumed():
    store, tries = MemoryStore(), []

    async def fails_first():
        await durable.run("try", durable.step(tries_once, retries=0))
        return await durable.wait_for_event("e", "go", timeout="1h")

    def tries_once():
        tries.append(1)
        if len(tries) == 1:
            raise ConnectionError("down")

    async def main():
        async with runtime(store):
            run = redefine(fails_first).start(id="1")
            run.notify("go", "kept")
            with pytest.raises(ConnectionError):
                await run
            with pytest.raises(DurableError, match=r"failed.*resume"):
                run.notify("go", "too late")
            run.resume()
            assert await run == Event("kept")

    asyncio.run(main())


def test_large_data_come_whole_and_a_run_that_begins_anew_gets_no_event_of_before():
    store, clock = MemoryStore(), FakeClock()
    large = {"rows": b"x" * (2 << 20)}

    async def waits():
        return (await durable.wait_for_event("e", "go", timeout="1h")).data

    async def main():
        async with runtime(store, clock=clock):
            run = redefine(waits).start(id="1")
            durable.notify("go", large)
            assert await run == large
        async with runtime(store, clock=clock):
            assert await run == large
            clock.advance(1)
            run.restart()
            assert await run is None

    asyncio.run(main())


def test_a_run_with_events_in_its_inbox_is_cancelled_as_any_and_leaves_none_behind():
    store = MemoryStore()

    async def main():
        async with runtime(store):
            run = redefine(two_events).start(id="1", labels=["shop"])
            run.notify("another", 1)
            assert len(rows(store, "inbox/")) == 1
            durable.cancel(label="shop")
            with pytest.raises(RunCancelled):
                await run
            assert rows(store, "inbox/") == []
            run.delete()
            assert [key for key in store.journal.rows if "1" in key.split("/")] == []

    asyncio.run(main())


def test_a_child_that_was_just_started_gets_the_event_also_where_the_parent_ends_then():
    store = MemoryStore()

    async def one():
        return (await durable.wait_for_event("e", "go", timeout="1h")).data

    async def starts():
        run = durable.workflow(one).start()
        run.notify("go", 7)
        return run.id

    async def main():
        redefine(one)
        async with runtime(store):
            child = durable.get_run(await redefine(starts).start(id="1"))
            assert await child == 7

    asyncio.run(main())


# -- approvals ---------------------------------------------------------------------------------------------------------


async def asks():
    return await durable.approve("publish", "publish 3 rows?", timeout="1h")


def test_a_decision_counts_once_and_what_comes_later_is_told():
    store, clock = MemoryStore(), FakeClock()

    async def main():
        async with runtime(store, clock=clock):
            run = redefine(asks).start(id="1")
            await until(lambda: run.status == "waiting")
            (step,) = run.steps
            assert (step.kind, step.prompt, step.wake_at) == ("decision", "publish 3 rows?", clock.wall_s + 3600)
            with pytest.raises(StepNotFoundError, match=r"'publsh'.*these wait: 'publish'"):
                run.approve("publsh")
            run.approve("publish", approved=False, comment="two are empty")
            decided = await run
            assert not decided
            assert (decided.approved, decided.comment, decided.timed_out) == (False, "two are empty", False)
            assert decided.by
            with pytest.raises(DurableError, match="completed"):
                run.approve("publish")
        async with runtime(store, clock=clock):
            assert await durable.get_run("1") == decided
        assert rows(store, "inbox/") == []

    asyncio.run(main())


def test_a_second_answer_and_one_after_the_time_out_are_refused_with_what_stands():
    async def asks_on():
        first = await durable.approve("publish", "sure?", timeout=5)
        await durable.wait_for_event("e", "go", timeout="1h")
        return first

    async def main(is_decided):
        store, clock = MemoryStore(), FakeClock()
        async with runtime(store, clock=clock):
            run = redefine(asks_on).start(id="1")
            await until(lambda: run.steps and run.steps[0].status == "waiting")
            if is_decided:
                run.approve("publish")
            await until(lambda: durable.waiters("go"))
            with pytest.raises(DurableError, match="was approved by" if is_decided else "timed out"):
                run.approve("publish", approved=False)
            run.notify("go")
            found = await run
            assert (found.approved, found.timed_out) == (is_decided, not is_decided)

    for is_decided in (True, False):
        asyncio.run(main(is_decided))


def test_a_name_alone_is_that_of_the_approval_that_waits_and_of_several_a_path_is_asked_for():
    async def asks_thrice():
        first = await asyncio.gather(*(durable.approve("first", f"{n}?", timeout="1h") for n in range(2)))
        assert [one.comment for one in first] == ["0", "1"]
        first = await durable.approve("ok", "first?", timeout="1h")
        both = await asyncio.gather(durable.approve("ok", "left?", timeout="1h"), durable.approve("ok", "right?", timeout="1h"))
        return first.comment, [one.comment for one in both]

    async def main():
        store = MemoryStore()
        async with runtime(store):
            run = redefine(asks_thrice).start(id="1")
            await until(lambda: run.status == "waiting")
            with pytest.raises(StepNotFoundError, match=r"several.*'first#1' \(0\?\), 'first#2' \(1\?\)"):
                run.approve("first")
            run.approve("first#1", comment="0")
            await until(lambda: run.steps[0].status == "completed")
            run.approve("first", comment="1")
            await until(lambda: len(run.steps) == 3 and run.steps[2].status == "waiting")
            run.approve("ok", comment="1")
            await until(lambda: [step.status for step in run.steps][3:] == ["waiting"] * 2)
            with pytest.raises(StepNotFoundError, match=r"several.*'ok#2' \(left\?\), 'ok#3' \(right\?\)"):
                run.approve("ok")
            run.approve("ok#3", comment="3")
            await until(lambda: run.steps[4].status == "completed")
            run.approve("ok", comment="2")
            assert await run == ("1", ["2", "3"])

    asyncio.run(main())


@pytest.mark.parametrize("nth", range(1, 8))
@pytest.mark.parametrize("side", ["before", "after"])
def test_a_decision_that_was_accepted_is_the_one_that_counts_whenever_the_process_dies(side, nth):
    store, clock = MemoryStore(), FakeClock()

    async def main():
        redefine(asks)
        async with runtime(store, clock=clock) as process:
            run = durable.workflow(asks).start(id="1")
            await until(lambda: run.status == "waiting")
            process.kill()
        async with runtime(store, clock=clock):
            durable.get_run("1").approve("publish", comment="yes")
        async with runtime(store, clock=clock, crash=f"{side}:write", nth=nth):
            durable.resume()
            await durable.get_run("1")
        async with runtime(store, clock=clock):
            durable.resume()
            assert (await durable.get_run("1")).comment == "yes"

    asyncio.run(main())


@pytest.mark.parametrize(("policy", "approved"), [("approve", True), ("reject", False)])
def test_a_policy_decides_at_once_and_its_decision_is_recorded(monkeypatch, policy, approved):
    store = MemoryStore()

    async def main():
        monkeypatch.setenv("DURABLE_NB_APPROVALS", policy)
        async with runtime(store):
            found = await redefine(asks).start(id="1")
            assert found == Decision(approved, by="DURABLE_NB_APPROVALS")
        monkeypatch.setenv("DURABLE_NB_APPROVALS", "wait")
        async with runtime(store):
            assert await durable.get_run("1") == found
        monkeypatch.setenv("DURABLE_NB_APPROVALS", "maybe")
        async with runtime(store):
            with pytest.raises(ValueError, match="'maybe': write one of wait, approve, reject, suspend"):
                await durable.workflow(asks).start(id="2")

    asyncio.run(main())


# -- generated programs ------------------------------------------------------------------------------------------------

lives: list[list[tuple]] = []
"""What the code of a generated program got, in each of its executions."""


async def generated(seed):
    """Waits in up to three tasks: some given up by a time-out, some that race with a sleep."""
    got = []
    lives.append(got)

    async def plain(chance, name, event_id):
        event = await durable.wait_for_event(name, event_id, timeout=chance.choice([5, 100]))
        return event_id, event.data

    async def given_up(chance, name, event_id):
        try:
            async with asyncio.timeout(chance.choice([1, 7])):
                return event_id, (await durable.wait_for_event(name, event_id, timeout=50)).data
        except TimeoutError:
            return ("gave up",)

    async def racing(chance, name, event_id):
        hears = asyncio.ensure_future(durable.wait_for_event(name, event_id, timeout=30))
        sleeps = asyncio.ensure_future(durable.sleep(f"{name} sleeps", chance.choice([2, 9])))
        done, left = await asyncio.wait({hears, sleeps}, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        return (event_id, hears.result().data) if hears in done else ("slept",)

    async def decides(chance, name, _):
        decision = await durable.approve(name, "?", timeout=chance.choice([3, 60]))
        return decision.approved, decision.comment, decision.timed_out

    async def works(_, name, __):
        return (await durable.run(name, len, "abc"),)

    async def task(number):
        chance = random.Random(f"{seed} {number}")
        for n in range(chance.randint(1, 4)):
            what, event_id = chance.choice([plain, given_up, racing, decides, works]), f"e{chance.randint(0, 1)}"
            got.append((f"{number}.{n}", *await what(chance, f"{number}.{n}", event_id)))

    await asyncio.gather(*(task(number) for number in range(random.Random(seed).randint(1, 3))))
    got.append(("end",))
    return True


async def outer(chance, process, run, ended):
    """Sends events to everybody and to the run, and decides, at random moments; each event's data are others."""
    for n in range(chance.randint(0, 12)):
        await asyncio.sleep(chance.choice([0, 0.001, 0.01, 0.05]))
        if ended.done() or process.crashed:
            return
        event_id, asked = f"e{chance.randint(0, 1)}", [step for step in run.steps if step.kind == "decision"]
        open_ones = [step.path for step in asked if step.status == "waiting"]
        try:
            if chance.random() < 0.6:
                durable.notify(event_id, [event_id, chance.random()], run_id=chance.choice([None, run.id]))
            elif open_ones:
                run.approve(open_ones[0], comment=str(n))
        except Crashed:
            return
        except DurableError:  # decided, or ended, in this very moment
            continue


@pytest.mark.parametrize("seed", range(30))
def test_a_generated_program_that_is_killed_again_and_again_gets_what_it_got_before_and_nothing_twice(seed):
    """Whatever is sent when, and at whichever write each process dies: what the code has seen once it sees in each execution,
    in the same order."""  # fmt: skip

    async def main():
        chance, store, clock, result = random.Random(-seed - 1), MemoryStore(), FakeClock(), None
        lives.clear()
        for life in range(6):
            crash = chance.choice(["before:write", "after:write", None]) if life < 4 else None
            async with runtime(store, clock=clock, crash=crash, nth=chance.randint(1, 14)) as process:
                run = redefine(generated).start(seed, id="1")
                ended = asyncio.ensure_future(run)
                await outer(chance, process, run, ended)
                if life < 4 and chance.random() < 0.3:
                    process.kill()
                await asyncio.wait({ended}, timeout=30)
                result = ended.result() if not process.crashed else None
            if result is not None:
                break
        assert result is True
        whole = next(got for got in reversed(lives) if got[-1:] == [("end",)])
        assert [got for got in lives if got != whole[: len(got)]] == []
        events = [entry[1:] for entry in whole if len(entry) == 3 and entry[2] is not None]
        assert [event_id for event_id, _ in events] == [sent_as for _, (sent_as, _) in events]
        assert len({number for _, (_, number) in events}) == len(events)

    asyncio.run(main())


# -- cells -------------------------------------------------------------------------------------------------------------


async def cell(process, body, *, reads=(), max_answer_s=None):
    """One execution of a durable cell whose code is `body`, as the magic does it."""
    run = await process.engine.begin(Asked("cell", f"k {reads}", reads=dict(reads)))
    run.waiting.max_answer_s = max_answer_s
    status, coroutine = Status.INTERRUPTED, body()
    try:
        value = await run.execute(coroutine)
        status = Status.COMPLETED
        return value
    except Exception:
        status = Status.FAILED
        raise
    finally:
        coroutine.close()
        await run.finish(status)


@pytest.mark.parametrize("nth", range(1, 10))
@pytest.mark.parametrize("side", ["before", "after"])
def test_a_cell_killed_at_any_write_gets_each_event_once_and_sends_its_own_once(side, nth):
    store, clock = MemoryStore(), FakeClock()

    async def body():
        first = await durable.wait_for_event("e", "go", timeout="1h")
        durable.notify("heard", first.data)
        second = await durable.wait_for_event("e", "go", timeout="1h")
        decision = await durable.approve("ok", "?", timeout=5)
        return first.data, second.data, decision.timed_out

    async def main():
        async with runtime(store, clock=clock) as process:
            with pytest.raises(RunSuspended, match=r"'cell' waits for event e until .*; run this cell again"):
                await cell(process, body, max_answer_s=0)
            durable.notify("go", 1)
            durable.notify("go", 2, run_id="cell")
        async with runtime(store, clock=clock, crash=f"{side}:write", nth=nth) as process:
            await cell(process, body)
        if side == "after" and nth == 9:
            return  # that the cell has completed is on disk
        async with runtime(store, clock=clock) as process:
            assert await cell(process, body) == (1, 2, True)
            assert len(rows(store, "event/heard/")) == 1
            assert rows(store, "inbox/") == []
            assert await cell(process, body) == (None, None, True)
            assert len(rows(store, "event/heard/")) == 2, "the next attempt sends its own"

    asyncio.run(main())


def test_an_event_that_a_cell_gives_up_in_the_moment_it_comes_is_the_next_waits():
    """Under whatever name: it is delivered once, and executed again the cell gets the same."""

    async def body(turns):
        waiting = asyncio.ensure_future(durable.wait_for_event("e", "go", timeout="1h"))
        await until(lambda: durable.waiters("go"))
        durable.notify("go", "came")
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        if waiting.cancelled():
            return (await durable.wait_for_event("e", "go", timeout="1h")).data
        return waiting.result().data

    async def main(turns):
        async with runtime() as process:
            assert await cell(process, functools.partial(body, turns)) == "came"

    for turns in range(8):
        asyncio.run(main(turns))


def test_an_approval_of_a_cell_lapses_with_its_inputs_and_outlives_its_edits():
    store, clock = MemoryStore(), FakeClock()

    async def body():
        return (await durable.approve("ok", f"pay {amount}?", timeout="1h")).comment

    async def edited():
        found = await body()
        raise LookupError(found)

    async def main():
        nonlocal amount
        reads = {"global amount": "1"}
        async with runtime(store, clock=clock) as process:
            with pytest.raises(RunSuspended):
                await cell(process, body, reads=reads, max_answer_s=0)
            durable.get_run("cell").approve("ok", comment="for 1")
            with pytest.raises(LookupError, match="for 1"):
                await cell(process, edited, reads={**reads, "global more": "x"})
            amount = 2
            with pytest.raises(RunSuspended):
                await cell(process, body, reads={"global amount": "2"}, max_answer_s=0)
            (first, second) = durable.get_run("cell").steps
            assert (first.status, second.status, second.prompt) == ("completed", "waiting", "pay 2?")
            amount = 3
            with pytest.raises(RunSuspended):
                await cell(process, body, reads={"global amount": "3"}, max_answer_s=0)
            assert [step.prompt for step in durable.get_run("cell").steps if step.status == "waiting"] == ["pay 3?"]
            durable.get_run("cell").approve("ok", comment="for 3")
            assert await cell(process, body, reads={"global amount": "3"}) == "for 3"

    amount = 1
    asyncio.run(main())


def test_what_a_cell_that_has_failed_waits_for_comes_before_it_is_run_again():
    store = MemoryStore()

    async def body():
        waiting = asyncio.ensure_future(durable.approve("ok", "?", timeout="1h"))
        hearing = asyncio.ensure_future(durable.wait_for_event("e", "go", timeout="1h"))
        if fails:
            await until(lambda: durable.waiters("go") and any(step.prompt for step in durable.get_run("cell").steps))
            raise LookupError("its own")
        return (await waiting).comment, (await hearing).data

    async def main():
        nonlocal fails
        async with runtime(store) as process:
            with pytest.raises(LookupError):
                await cell(process, body)
            assert [waiter.step for waiter in durable.waiters("go")] == ["e"]
            assert durable.get_run("cell").status == "failed"
            durable.get_run("cell").approve("ok", comment="yes")
            durable.get_run("cell").notify("go", 1)
            fails = False
            assert await cell(process, body) == ("yes", 1)

    fails = True
    asyncio.run(main())


def test_gc_keeps_an_event_as_long_as_an_unfinished_run_may_get_it(tmp_path):
    clock = FakeClock()

    async def waits():
        return (await durable.wait_for_event("e", "go", timeout="9d")).data

    async def main():
        async with runtime(tmp_path / "store", clock=clock) as process:
            durable.notify("go", "before")
            clock.advance(1)
            redefine(waits)
            run = durable.workflow(waits).start(id="1")
            await until(lambda: durable.waiters("go"))
            process.kill()
        async with runtime(tmp_path / "store", clock=clock) as process:
            durable.notify("go", "after")
            journal = process.engine.store.journal
            gc.collect(process.engine)
            assert len(journal.sizes("event/")) == 1
            durable.resume()
            assert await durable.get_run(run.id) == "after"
            gc.collect(process.engine)
            assert journal.sizes("event/") == []

    asyncio.run(main())
