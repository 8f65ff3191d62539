"""Runs are controlled by whoever finds them: forked, deleted, cancelled and listed by the thousand."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from kernels import kernel
from workers import ForkServer, read_oracle
from workers import until as wait_until

import durable_nb as durable
from durable_nb import _records as rec
from durable_nb._housekeeping import doctor
from durable_nb._housekeeping.dashboard import dashboard_of
from durable_nb._housekeeping.inventory import Inventory
from durable_nb._housekeeping.listings import steps_table
from durable_nb._journal import blobs
from durable_nb._store import Store
from durable_nb.errors import (
    DurableError,
    NotSupportedError,
    RunCancelled,
    RunConflictError,
    RunNotFoundError,
    StepNotFoundError,
)
from durable_nb.testing import FakeClock, MemoryStore, outcomes, redefine, runtime

NAMES = ("shop", "wide", "mapped", "parent", "child", "keeps", "waits", "drawn", "timed", "large", "fails", "raced", "quick")

ran: list[str] = []
"""Bodies, in the order in which they began."""


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    ran.clear()
    for name in NAMES:
        redefine(name)


def body(name, value=None):
    ran.append(name)
    return name if value is None else value


async def held(name):
    ran.append(name)
    await asyncio.Event().wait()


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  what is asked has no event
            await asyncio.sleep(0.01)


def rows_about(store, run_id):
    return [key for key, _ in store.journal.scan("") if run_id in key]


# -- fork ----------------------------------------------------------------------------------------------------------------


def test_a_fork_keeps_what_came_before_its_step_and_executes_the_rest():
    """At every step of a sequence. The old run stays as it is, the new one has an id and keys of its own."""
    store = MemoryStore()

    async def main():
        keys = []

        def keyed(name):
            keys.append((name, durable.idempotency_key()))
            return body(name)

        @durable.workflow
        async def shop(cart):
            got = [await durable.run(name, keyed, name) for name in ("charge", "order")]
            await durable.sleep("week", "7d")
            return cart, [*got, await durable.run("receipt", keyed, "receipt")]

        async with runtime(store):
            run = shop.start("cart", id="r", labels=["shop"])
            result = await run
            steps = ["charge", "order", "week", "receipt"]
            for n, at in enumerate(steps):
                ran.clear()
                before = run.status, run.steps, rows_about(store, "~run r")
                fork = run.fork(at=at)
                assert await fork == result
                assert ran == [name for name in steps[n:] if name != "week"]
                assert [step.name for step in fork.steps] == steps
                assert (run.status, run.steps, rows_about(store, "~run r")) == before
                assert fork.id != "r"
                assert fork.id in [found.id for found in durable.runs(label="shop", workflow="shop")]
        assert len({key for _, key in keys}) == len(keys)

    asyncio.run(main())


def test_what_was_asked_for_before_stands_though_it_ended_later():
    """Of steps that run at the same time, too: those before the step keep their outcomes, it and those after it run."""
    store = MemoryStore()

    async def main():
        order = ["b", "c", "a", "d"]
        gates = {name: asyncio.Event() for name in order}

        async def gated(name):
            ran.append(name)
            await gates[name].wait()
            return name

        @durable.workflow
        async def wide():
            first = await asyncio.gather(*(durable.run(name, gated, name) for name in "abcd"))
            return [*first, await durable.run("last", body, "last")]

        async with runtime(store):
            run = wide.start(id="r")
            for name in order:
                gates[name].set()
                await until(lambda name=name: any((s.name, s.status) == (name, "completed") for s in run.steps))
            assert await run == ["a", "b", "c", "d", "last"]
            for at, again in (("a", "abcd"), ("b", "bcd"), ("c", "cd"), ("d", "d"), ("last", "")):
                ran.clear()
                assert await run.fork(at=at) == ["a", "b", "c", "d", "last"]
                assert sorted(ran) == sorted([*again, "last"])

    asyncio.run(main())


def test_a_fork_is_made_of_a_path():
    """An item of a map, the second of a name; a bare name is the first of that name."""
    store = MemoryStore()

    async def main():
        @durable.workflow
        async def mapped():
            doubled = await durable.map("double", lambda n: body(f"double {n}", 2 * n), range(4), concurrency=1)
            twice = [await durable.run("twice", body, "twice") for _ in range(2)]
            return doubled, twice

        async with runtime(store):
            run = mapped.start(id="r")
            result = await run
            paths = [step.path for step in run.steps]
            assert paths == ["double[0]", "double[1]", "double[2]", "double[3]", "twice", "twice#2"]
            for at, again in (
                ("double[2]", ["double 2", "double 3", "twice", "twice"]),
                ("double", ["double 0", "double 1", "double 2", "double 3", "twice", "twice"]),
                ("twice", ["twice", "twice"]),
                ("twice#2", ["twice"]),
            ):
                ran.clear()
                fork = run.fork(at=at)
                assert await fork == result
                assert ran == again
                assert [step.path for step in fork.steps] == paths
            for unknown in ("thrice", "twice#3", "double[4]", ""):
                with pytest.raises(StepNotFoundError, match=f"no step {unknown!r}".replace("[", r"\[")) as told:
                    run.fork(at=unknown)
                assert "'double[0]', 'double[1]'" in str(told.value)
            with pytest.raises(TypeError, match=r"fork\(at=3"):
                run.fork(at=3)
            assert len(durable.runs(workflow="mapped")) == 5

    asyncio.run(main())


def test_a_fork_keeps_the_children_that_were_started_before():
    """A fork at a later step gets the child's result without executing it; at the start itself, a child of its own."""
    store = MemoryStore()

    async def main():
        @durable.workflow
        async def child(n):
            return await durable.run("inner", body, "inner", n)

        @durable.workflow
        async def parent():
            run = child.start(7)
            got = await run
            return run.id, got, await durable.run("after", body, "after")

        async with runtime(store):
            run = parent.start(id="r")
            result = await run
            ran.clear()
            assert await run.fork(at="after") == result
            assert ran == ["after"]
            ran.clear()
            own = await run.fork(at="child")
            assert own[0] != result[0]
            assert own[1:] == result[1:]
            assert ran == ["inner", "after"]

    asyncio.run(main())


def test_a_fork_gets_the_same_in_passing_and_takes_the_code_as_it_is_now():
    store = MemoryStore()

    async def main():
        @durable.workflow
        async def drawn():
            first = durable.uuid4()
            await durable.run("one", body, "one")
            return first, durable.uuid4(), await durable.run("two", body, "two")

        async with runtime(store):
            run = drawn.start(id="r")
            first, second, _ = await run

            @redefine
            @durable.workflow(name="drawn ")
            async def drawn():
                got = durable.uuid4()
                await durable.run("one", body, "one")
                return got, durable.uuid4(), await durable.run("another", body, "another")

            redefine(drawn, name="drawn")
            ran.clear()
            got = await run.fork(at="two")
            assert got[0] == first
            assert got[2] == "another"
            assert ran == ["another"]
        assert second

    asyncio.run(main())


def test_a_failed_run_is_forked_with_its_failure_tried_again():
    """Before the step that failed, at it, and while the old run is executed."""
    store, clock = MemoryStore(), FakeClock()

    async def main():
        good = []

        def flaky():
            ran.append("flaky")
            if not good:
                raise ValueError("not yet")
            return "well"

        @durable.workflow
        async def fails():
            with suppress(durable.UnserializableError):
                await durable.run("caught", body, "caught", asyncio)
            await durable.run("ready", body, "ready")
            return await durable.run("flaky", flaky)

        async with runtime(store, clock=clock):
            run = fails.start(id="r")
            with pytest.raises(ValueError, match="not yet"):
                await run
            good.append(1)
            ran.clear()
            assert await run.fork(at="flaky") == "well"
            assert ran == ["flaky"]
            ran.clear()
            assert await run.fork(at="ready") == "well"
            assert ran == ["ready", "flaky"]
            assert run.status == "failed"
            assert await run.resume() == "well"
            assert await run.fork("flaky").fork("ready") == "well"

    asyncio.run(main())


def test_a_fork_of_a_run_that_is_executed_goes_its_own_way():
    store = MemoryStore()

    async def main():
        @durable.workflow
        async def waits():
            await durable.run("one", body, "one")
            await durable.run("two", body, "two")
            if len(ran) == 2:
                await durable.run("held", held, "held")
            return list(ran)

        async with runtime(store):
            run = waits.start(id="r")
            await until(lambda: "held" in ran)
            assert await run.fork(at="two") == ["one", "two", "held", "two"]
            assert run.status == "running"
            run.cancel()
            with pytest.raises(RunCancelled):
                await run

    asyncio.run(main())


def test_a_forks_time_goes_on_from_the_step():
    """A time-out around the step hasn't passed, however long ago the old run was; and a kill of the fork loses nothing."""
    store, clock = MemoryStore(), FakeClock()

    async def main():
        @durable.workflow
        async def timed():
            await durable.run("one", body, "one")
            async with asyncio.timeout(3600):
                await durable.sleep("half", "30m")
                await durable.run("two", body, "two")
            await durable.sleep("week", "7d")
            return "in time"

        async with runtime(store, clock=clock) as process:
            run = timed.start(id="r")
            assert await run == "in time"
            fork = run.fork(at="two")
            await until(lambda: len(fork.steps) == 4)
            process.kill()
        assert ran == ["one", "two", "two"]
        async with runtime(store, clock=clock):
            assert await durable.get_run(fork.id).resume() == "in time"
        assert ran == ["one", "two", "two"]

    asyncio.run(main())


def test_a_process_without_the_workflow_forks_a_run_for_one_that_has_it():
    store = MemoryStore()

    async def main():
        @durable.workflow
        async def quick():
            return await durable.run("one", body, "one")

        async with runtime(store):
            assert await quick.start(id="r") == "one"
        redefine("quick")
        async with runtime(store):
            fork = durable.get_run("r").fork(at="one")
            assert fork.status == "interrupted"
        redefine(quick)
        async with runtime(store):
            await until(lambda: durable.get_run(fork.id).status == "completed")
            assert await durable.get_run(fork.id) == "one"

    asyncio.run(main())


# -- delete --------------------------------------------------------------------------------------------------------------


def test_a_deleted_run_is_gone_with_its_values(tmp_path):
    """Not what others name: an equal value of another run's stays, and so does the other run."""
    store = tmp_path / "store"

    async def main():
        @durable.workflow
        async def large(n, mine):
            await durable.run("both", lambda: b"both" * 500_000)
            await durable.run("mine", lambda: (b"%d" % mine) * 2_000_000)
            return b"x" * 2_000_000 * n

        async with runtime(store) as process:
            journal = process.engine.store.journal
            runs = [large.start(n, n, id=f"r{n}") for n in (1, 2)]
            for run in runs:
                await run
            files = {path.name for path in (store / "values").iterdir()}
            runs[0].delete()
            left = {path.name for path in (store / "values").iterdir()}
            assert len(files - left) == 2
            assert [key for key, _ in journal.sizes("") if "r1" in key] == []
            assert [run.id for run in durable.runs()] == ["r2"]
            with pytest.raises(RunNotFoundError, match="'r1'"):
                durable.get_run("r1")
            assert await runs[1] == b"x" * 4_000_000
            assert [step.status for step in runs[1].steps] == ["completed"] * 2
            again = large.start(1, 1, id="r1")
            assert len(await again) == 2_000_000
            assert again.status == "completed"
        async with runtime(store):
            assert await durable.get_run("r2") == b"x" * 4_000_000

    asyncio.run(main())


@pytest.mark.parametrize("status", ["running", "interrupted", "sleeping"])
def test_an_unfinished_run_is_not_deleted(status):
    store, clock = MemoryStore(), FakeClock()

    async def main():
        @durable.workflow
        async def waits():
            await (durable.sleep("nap", "1h") if status == "sleeping" else durable.run("held", held, "held"))

        class Still(FakeClock):
            async def sleep(self, seconds):
                await asyncio.Event().wait()

        async with runtime(store, clock=Still() if status == "sleeping" else clock) as process:
            run = waits.start(id="r")
            await until(
                lambda: (
                    run.status == ("running" if status == "interrupted" else status)
                    and run.steps
                    and run.steps[0].status != "pending"
                )
            )
            if status == "interrupted":
                process.kill()
                async with runtime(store):
                    _refused(status)
            else:
                _refused(status)

    def _refused(status):
        before = rows_about(store, "")
        with pytest.raises(DurableError, match=f"'r' is {status}.*nothing was deleted.*cancel"):
            durable.get_run("r").delete()
        assert rows_about(store, "") == before

    asyncio.run(main())


@pytest.mark.parametrize("how", ["completed", "failed", "cancelled", "cancelled while nobody executed it"])
def test_whatever_way_a_run_has_ended_it_can_be_deleted(how):
    store = MemoryStore()

    async def main():
        @durable.workflow
        async def keeps():
            await durable.run("one", body, "one")
            if how == "failed":
                raise OSError("down")
            if how != "completed":
                await durable.run("held", held, "held")

        async with runtime(store) as process:
            run = keeps.start(id="r")
            if how.startswith("cancelled"):
                await until(lambda: "held" in ran)
                if "nobody" in how:
                    process.kill()
                else:
                    run.cancel()
                    await asyncio.wait([asyncio.ensure_future(run)])
            else:
                await asyncio.wait([asyncio.ensure_future(run)])
        async with runtime(store):
            run = durable.get_run("r")
            if "nobody" in how:
                run.cancel()
            run.delete()
            assert (durable.runs(), outcomes(store)) == ([], [])
            assert {key.partition("/")[0] for key in rows_about(store, "")} <= {"store"}

    asyncio.run(main())


# -- many ----------------------------------------------------------------------------------------------------------------


def test_many_are_cancelled_by_what_they_have_in_common():
    """Here and in another process, running and interrupted; nothing else, and nothing where nothing is named."""
    store = MemoryStore()

    async def main():
        @durable.workflow
        async def waits():
            await durable.run("held", held, "held")

        @durable.workflow
        async def keeps():
            await durable.run("held", held, "held")

        async with runtime(store) as dead:
            for n in range(3):
                waits.start(id=f"dead-{n}", labels=["a" if n else "b"])
            await until(lambda: len(ran) == 3)
            dead.kill()
        async with runtime(store):
            for n in range(3):
                waits.start(id=f"there-{n}", labels=["a" if n else "b"])
            keeps.start(id="kept", labels=["a"])
            await until(lambda: len(ran) == 7)
            async with runtime(store):
                for arguments, error in (({}, TypeError), ({"status": "asleep"}, ValueError)):
                    with pytest.raises(error, match=r"asleep|name a label"):
                        durable.cancel(**arguments)
                assert {run.status for run in durable.runs()} == {"running", "interrupted"}
                assert durable.cancel(label="c") == []
                found = durable.cancel(label="a", workflow="waits", reason="too many")
                assert sorted(run.id for run in found) == ["dead-1", "dead-2", "there-1", "there-2"]
                await until(lambda: {durable.get_run(run.id).status for run in found} == {"cancelled"})
                with pytest.raises(RunCancelled, match="too many"):
                    await durable.get_run("there-2")
                assert [run.id for run in durable.cancel(status="interrupted")] == ["dead-0"]
                assert sorted(run.id for run in durable.cancel(status="running")) == ["kept", "there-0"]
                await until(lambda: {run.status for run in durable.runs()} == {"cancelled"})
        assert rows_about(store, "inbox/there") == []

    asyncio.run(main())


def test_ten_thousand_runs_are_listed_a_page_at_a_time():
    """Each once, the newest first; and cancelled all together."""
    store = MemoryStore()

    async def main():
        @durable.workflow
        async def keeps():
            """Of which there are many."""

        async with runtime(store) as process:
            engine, commits = process.engine, []
            for n in range(10_000):
                ended = {"status": ("completed", "failed")[n % 2], "ended_at": 5.0} if n % 10 else {}
                of = f"r{n:05}", "workflow", "keeps", rec.scope_of(f"~run r{n:05}"), 0, "", float(n // 3)
                record = rec.RunRecord(*of, labels=(f"l{n % 7}",), **ended)
                commits.append(durable._journal.Commit(puts=(engine.ownership.pack(rec.run_key(record.id), record),)))
            store.journal.apply(commits)
            seen, last = [], None
            while page := durable.runs(limit=2500, before=last):
                seen += [run.id for run in page]
                last = page[-1]
            assert seen == [f"r{n:05}" for n in sorted(range(10_000), key=lambda n: (-(n // 3), n))]
            some = durable.runs(status="failed", label="l3", limit=2, before="r00100")
            assert [run.id for run in some] == ["r00101", "r00087"]  # the first began at the same moment
            assert len(durable.runs(status="interrupted", limit=10_000)) == 1000
            assert durable.runs(limit=0) == []
            with pytest.raises(RunNotFoundError, match="'no such'"):
                durable.runs(before="no such")
            with pytest.raises(ValueError, match="limit=-1"):
                durable.runs(limit=-1)
            assert len(durable.cancel(workflow="keeps")) == 1000
            assert durable.runs(status="interrupted") == []
            assert len(durable.runs(status="cancelled", limit=10_000)) == 1000

    asyncio.run(main())


def test_a_run_that_no_process_executes_says_so_and_when_it_would_wake():
    """In whatever way it is looked at; a run that is executed, or has ended, says nothing of it."""
    store, clock = MemoryStore(), FakeClock()

    class Still(FakeClock):
        async def sleep(self, seconds):
            await asyncio.Event().wait()

    async def main():
        @durable.workflow
        async def waits():
            await durable.run("one", body, "one")
            await durable.sleep("nap", "1h")

        async with runtime(store, clock=Still()) as process:
            run = waits.start(id="r")
            await until(lambda: run.status == "sleeping")
            assert repr(run) == "<run 'r' of 'waits': sleeping>"
            process.kill()
        async with runtime(store, clock=clock) as process:
            run = durable.get_run("r")
            assert re.fullmatch(
                r"<run 'r' of 'waits': interrupted, next wake [-0-9: ]+, no process is running this>", repr(run)
            )
            inventory = Inventory(process.engine)
            for text in (steps_table(inventory.find_run("r"), inventory).text(), repr(dashboard_of(process._workflows))):
                assert re.search(r"next wake|[0-9]:[0-9]+, no process", text)
                assert "no process is running this" in text
            run.cancel()
            assert repr(run) == "<run 'r' of 'waits': cancelled>"
            assert "no process" not in repr(dashboard_of(process._workflows))

    asyncio.run(main())


# -- from another process ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = ForkServer(tmp_path_factory.mktemp("key") / "signing.key")
    yield made
    made.close()


@pytest.fixture
def shared(tmp_path):
    return {"store": str(tmp_path / "store"), "oracle": str(tmp_path / "oracle")}


def begun(shared, name):
    """The processes that began the step's body, in order."""
    lines = read_oracle(Path(shared["oracle"]))
    return [pid for pid, what, step, _ in lines if (what, step) == ("begin", name)]


@pytest.mark.parametrize("owner_is", ["idle", "busy", "stopped", "dead"])
@pytest.mark.parametrize("what", ["cancel", "cancel all", "resume", "restart", "fork"])
def test_control_from_another_process_reaches_the_owner_whatever_it_does(server, shared, tmp_path, what, owner_is):
    """An owner that is busy or stopped hears of it when it goes on; a dead one's run takes it at once, in the other process."""
    gate, busy = tmp_path / "gate", tmp_path / "busy"
    with server.start("own", **shared, gate=str(gate), busy_until=str(busy) if owner_is == "busy" else "") as owner:
        assert owner.said() == "owns it"
        wait_until(lambda: begun(shared, "held"), "the step that waits")
        if owner_is == "stopped":
            owner.stop()
        if owner_is == "dead":
            assert owner.kill()
        with server.start("act", **shared, what=what) as other:
            told = other.said()
            assert told["took"] < 5  # it waits for nobody
            alive = owner_is != "dead"
            if what.startswith("cancel"):
                assert told["status"] == ("cancelled" if not alive else "running")
            if what == "restart" and alive:  # the gate is opened when the new execution has begun
                go_on(owner, owner_is, busy)
                wait_until(lambda: len(begun(shared, "held")) == 2, "the owner to begin anew")
            if not what.startswith("cancel"):
                gate.touch()
            go_on(owner, owner_is, busy)
            other.tell("wait")
            came = other.result()
            mine = owner.result() if alive else None
    one, held, two = (begun(shared, name) for name in ("one", "held", "two"))
    if what.startswith("cancel"):
        assert came["error"].startswith("RunCancelled")
        assert mine in (None, came)
        assert (one, held) == ([owner.pid], [owner.pid])
    elif what == "resume":
        executor = owner.pid if alive else other.pid
        assert (one, held[-1], two) == ([owner.pid], executor, [executor])
        assert mine in (None, came)
    elif what == "restart":
        executor = owner.pid if alive else other.pid
        assert (one, held, two) == ([owner.pid, executor], [owner.pid, executor], [executor])
        assert mine in (None, came)
    else:
        assert (one, held) == ([owner.pid, other.pid], [owner.pid, other.pid])
        assert sorted(two) == sorted([other.pid, *([owner.pid] if alive else [])])
        assert mine != came


def go_on(owner, owner_is, busy):
    busy.touch()
    if owner_is == "stopped":
        owner.signal(signal.SIGCONT)


@pytest.mark.parametrize("what", ["resume", "restart", "fork late"])
def test_a_process_that_lacks_the_workflow_reaches_a_live_one_that_has_it(server, shared, tmp_path, what):
    """A command line, another notebook's dashboard: the run is executed in the idle process that defines its workflow."""
    gate, good = tmp_path / "gate", tmp_path / "good"
    gate.touch()
    with server.start("own", **shared, gate=str(gate), fails=str(good)) as owner:
        assert owner.said() == "owns it"
        assert owner.said() == {"error": "ValueError: not yet"}
        good.touch()
        with server.start("act", **shared, what=what, lacks_workflow=True) as other:
            other.said()
            other.tell("wait")
            assert "value" in other.result()
    assert set(begun(shared, "two")) == {owner.pid}
    assert len(begun(shared, "one")) == (2 if what == "restart" else 1)
    assert len(begun(shared, "two")) == (2 if what != "resume" else 1)


def test_the_command_line_asks_the_process_that_can(server, shared, tmp_path):
    """An idle one that defines the workflow; and where none lives, it says so, and the run waits."""
    gate, good = tmp_path / "gate", tmp_path / "good"
    env = {**os.environ, "DURABLE_NB_KEY_FILE": str(server.key_file), "DURABLE_NB_DIR": shared["store"]}

    def tell(*words, status=0):
        code = "import sys; from durable_nb._cli import main; sys.exit(main())"
        done = subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == status, (done.stdout, done.stderr)
        assert (done.stdout == "", done.stderr == "") == (status != 0, status == 0)
        return done.stdout + done.stderr

    def stands():
        return {run["id"]: run["status"] for run in json.loads(tell("ls", "--json"))["runs"]}

    with server.start("own", **shared, gate=str(gate), fails=str(good)) as owner:
        assert owner.said() == "owns it"
        assert f"'r' is running in process {owner.pid}, so nothing was deleted" in tell("delete", "r", status=1)
        assert f"in process {owner.pid}" in tell("resume", "r")  # nothing to do
        assert f"r · begins anew in process {owner.pid}" in tell("restart", "r")
        wait_until(lambda: len(begun(shared, "held")) == 2, "the owner to begin anew")
        gate.touch()
        assert "error" in owner.said()
        good.touch()
        tell("resume", "r")
        wait_until(lambda: stands() == {"r": "completed"}, "the owner to resume it")
        fork = tell("fork", "r", "two").partition(" ")[0]
        wait_until(lambda: stands() == {"r": "completed", fork: "completed"}, "the owner to execute the fork")
        assert set(begun(shared, "two")) == {owner.pid}
        assert "has no step 'no such step'" in tell("fork", "r", "no such step", status=1)
        assert tell("delete", fork) == f"{fork} · is deleted, and its values with it\n"
        assert stands() == {"r": "completed"}
        gate.unlink()
        tell("restart", "r")
        wait_until(lambda: len(begun(shared, "held")) == 3, "the owner to begin anew")
        assert owner.kill()
    assert tell("cancel", "r") == "r · is cancelled\n"
    tell("resume", "r")
    assert stands() == {"r": "interrupted"}
    assert "no process is running this" in tell("show", "r")
    tell("cancel", "r", "--reason", "sold out")
    assert "the run 'r' was cancelled: sold out" in tell("show", "r")
    tell("delete", "r")
    assert stands() == {}


@pytest.mark.parametrize("owner_is", ["idle", "stopped", "dead"])
def test_a_run_that_a_live_process_executes_is_neither_deleted_nor_robbed_unasked(server, shared, tmp_path, owner_is):
    gate = tmp_path / "gate"
    with server.start("own", **shared, gate=str(gate)) as owner:
        assert owner.said() == "owns it"
        if owner_is == "stopped":
            owner.stop()
        if owner_is == "dead":
            owner.kill()
        refused = server.do("act", **shared, what="delete")["refused"]
        if owner_is == "dead":
            assert re.search(r"'r' is interrupted, so nothing was deleted.*cancel\(\)", refused)
            return
        assert re.search(rf"'r' is running in process {owner.pid}, so nothing was deleted.*cancel\(\)", refused)
        with server.start("act", **shared, what="take over") as heir:
            heir.said()
            wait_until(lambda: heir.pid in begun(shared, "held"), "the heir to execute it")
            gate.touch()
            heir.tell("wait")
            came = heir.result()
            owner.signal(signal.SIGCONT)
            assert owner.result() == came  # of the heir's execution; its own was given up
            assert begun(shared, "two") == [heir.pid]


def log_of(store, run_id):
    """The keys of a run's log in order, each with its number."""
    keys = [key for key, _ in store.journal.scan("") if re.search(rf"/~run%20{run_id}/\d{{6}}/\d{{8}}$", key)]
    return sorted((int(key.rpartition("/")[2]), key) for key in keys if not key.startswith("try/"))


def test_a_kernel_hears_what_another_kernel_wants_of_its_runs(tmp_path):
    """Idle at once, busy in blocking code when that ends, dead never: then it is so at once. The other lacks the workflow."""
    code = """
    import asyncio, pathlib, time
    def charge():
        with open('charged', 'a') as file:
            file.write('x\\n')
    @durable.workflow
    async def order():
        await durable.run('charge', charge)
        await durable.sleep('a while', 600)
    run = order.start(id='order-42')
    while run.status != 'sleeping': await asyncio.sleep(0.01)
    """.replace("\n    ", "\n")
    look = "durable.get_run('order-42').status.value"

    def tell(line):
        shown = two.run(line)
        assert shown.status == "ok", shown.error
        return shown.told[-1]

    with kernel(tmp_path) as one, kernel(tmp_path) as two:
        one.run(code)
        assert tell("%durable restart order-42") == f"order-42 · begins anew in process {one.pid}"
        one.wait_until(tmp_path / "charged", lines=2)
        sent = one.send("while not pathlib.Path('go on').exists(): time.sleep(0.05)\nopen('went on', 'w').write('x\\n')")
        one.send("while run.status != 'cancelled': await asyncio.sleep(0.01)\nopen('cancelled', 'w').write('x\\n')")
        assert tell("%durable cancel order-42").startswith(f"order-42 · is being cancelled in process {one.pid}")
        assert two.value(look) in ("running", "sleeping")
        (tmp_path / "go on").touch()
        one.wait(sent)
        one.wait_until(tmp_path / "cancelled")
        assert two.value(look) == "cancelled"
        assert "until one lives, no process is running this" in tell("%durable resume order-42")
        wait_until(lambda: two.value(look) == "sleeping", "the idle kernel to resume the run")
        fork = tell("%durable fork order-42 charge").partition(" ")[0]
        one.wait_until(tmp_path / "charged", lines=3)
        one.kill()
        assert two.value(look) == "interrupted"
        assert "no process is running this" in tell(f"%durable show {fork}")
        assert "no process is running this" in two.value("repr(durable.get_run('order-42'))")
        for run in ("order-42", fork):
            assert "nothing was deleted" in two.run(f"%durable delete {run}").stderr + two.run(f"%durable delete {run}").error
            assert tell(f"%durable cancel {run}") == f"{run} · is cancelled; its completed steps are kept"
            assert tell(f"%durable delete {run}") == f"{run} · is deleted, and its values with it"
        assert two.value("durable.runs()") == []


# -- what is lost, and what changes over a kill -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["failed", "cancelled", "interrupted"])
def test_a_row_that_is_lost_at_the_logs_end_is_noticed(how):
    """Nothing runs: what it recorded may have been paid for. A restart begins anew."""
    store = MemoryStore()

    async def main():
        @durable.workflow
        async def keeps():
            await durable.run("one", body, "one")
            await durable.run("two", body, "two")
            if how != "failed":
                await asyncio.Event().wait()
            raise OSError("down")

        async with runtime(store):
            run = keeps.start(id="r")
            await until(lambda: [step.status for step in run.steps] == ["completed"] * 2)
            if how == "cancelled":
                run.cancel()
            if how != "interrupted":
                await asyncio.wait([asyncio.ensure_future(run)])
        rows = log_of(store, "r")
        for lost in (rows[-1:], rows[-2:]):
            kept = dict(store.journal.rows)
            for _, key in lost:
                del store.journal.rows[key]
            ran.clear()
            async with runtime(store):
                run = durable.get_run("r")
                with pytest.raises(durable.CorruptStoreError, match=rf"row {lost[0][0]} of the log of the run 'r' is missing"):
                    await run.resume()
                assert ran == []
            store.journal.rows.clear()
            store.journal.rows.update(kept)
        async with runtime(store):
            run = durable.get_run("r").restart()
            await until(lambda: ran == ["one", "two"])

    asyncio.run(main())


def test_after_a_kill_a_row_lost_at_the_logs_end_is_as_if_the_kill_had_come_before_it():
    """The step runs again under the same idempotency key, by which the far end knows that it was paid; nothing else changes."""
    store = MemoryStore()

    async def main():
        keys = []

        def paid():
            keys.append(durable.idempotency_key())
            return len(keys)

        @durable.workflow
        async def keeps():
            first = await durable.run("one", body, "one")
            second = await durable.run("paid", paid)
            if len(keys) == 1 and not gone:
                await durable.run("held", held, "held")
            return first, second

        gone = []
        async with runtime(store) as process:
            keeps.start(id="r")
            await until(lambda: "held" in ran)
            process.kill()
        last = log_of(store, "r")[-1][1]
        del store.journal.rows[last]
        gone.append(last)
        ran.clear()
        async with runtime(store):
            assert await durable.get_run("r").resume() == ("one", 2)
        assert keys[0] == keys[1]
        assert ran == []

    asyncio.run(main())


@pytest.mark.parametrize("fails_at", ["value", "row"])
def test_a_disk_that_is_full_between_a_large_value_and_its_row_loses_nothing(tmp_path, monkeypatch, fails_at):
    """The run is interrupted and says why; with room again the step runs once more, and nothing is in its way."""
    store = tmp_path / "store"
    full, put = [], []

    async def main():
        @durable.workflow
        async def large():
            await durable.run("one", body, "one")
            return len(await durable.run("large", lambda: body("large") and os.urandom(2_000_000)))

        async with runtime(store) as process:
            disk = process.engine.store.journal.inner
            writing, write_file = type(disk._database).writing, blobs.write_file

            def write(path, parts, *more, **options):
                if fails_at == "value" and not full:
                    full.append(path)
                    raise OSError(errno.ENOSPC, "No space left on device")
                write_file(path, parts, *more, **options)
                put.append(path)

            @contextmanager
            def refuse(database):
                if fails_at == "row" and put and not full:
                    full.append(put[0])
                    raise sqlite3.OperationalError("database or disk is full")
                with writing(database) as sql:
                    yield sql

            monkeypatch.setattr(blobs, "write_file", write)
            monkeypatch.setattr(type(disk._database), "writing", refuse)
            run = large.start(id="r")
            with pytest.raises(durable.StoreError, match=r"disk is full|No space left"):
                await run
            assert (run.status, full != []) == ("interrupted", True)
            assert [step.name for step in run.steps if step.status == "completed"] == ["one"]
            assert await run.resume() == 2_000_000
            assert ran == ["one", "large", "large"]
        found = durable_doctor(store)
        assert found.findings == ()

    def durable_doctor(path):
        opened = Store(path)
        try:
            return doctor.examine(opened)
        finally:
            opened.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("edit", "comes_to"),
    [
        ("body", "the recorded result stands"),
        ("appended", "the new step runs"),
        ("inserted", "nothing runs, and put back the run goes on"),
        ("patched", "the old way is gone on"),
    ],
)
def test_an_edit_together_with_a_kill(server, shared, tmp_path, edit, comes_to):
    """The process is killed and its successor has other code: what is recorded is never executed again."""
    gate = tmp_path / "gate"
    args = {**shared, "gate": str(gate)}
    with server.start("execute_version", **args, version="first") as owner:
        wait_until(lambda: begun(shared, "held"), "the step that waits")
        assert owner.kill()
    gate.touch()
    with server.start("execute_version", **args, version=edit) as heir:
        heard = heir.hear()
    if edit == "inserted":
        assert heard["error"] == "NonDeterminismError"
        assert {pid for step in ("one", "inserted", "held", "two") for pid in begun(shared, step)} == {owner.pid}
        with server.start("execute_version", **args, version="first") as heir:
            heard = heir.hear()
    values = heard["result"]
    assert begun(shared, "one") == [owner.pid], comes_to
    assert begun(shared, "held") == [owner.pid, heir.pid]
    made = {name: value for _, what, name, value in read_oracle(Path(shared["oracle"])) if what == "end"}
    assert values["one"] == made["one"]
    assert ("appended" in values) == (edit == "appended")
    assert begun(shared, "appended") == ([heir.pid] if edit == "appended" else [])
    assert begun(shared, "inserted") == []


# -- twice, too late, and at once -----------------------------------------------------------------------------------------


def test_a_second_cancellation_ends_the_run_at_once():
    """From another process too; the first lets the code tidy up, a third comes to nothing, and a resumption goes on."""
    store = MemoryStore()

    async def main():
        @durable.workflow
        async def waits():
            try:
                await durable.run("held", held, "held")
            finally:
                await durable.run("tidy", held, "tidy")

        async with runtime(store) as owner:
            waits.start(id="r")
            await until(lambda: "held" in ran)
            async with runtime(store):
                run = durable.get_run("r")
                run.cancel("first")
                await until(lambda: "tidy" in ran)
                await asyncio.sleep(0)
                assert run.status == "running"
                run.cancel("second")
                with pytest.raises(RunCancelled, match="first"):
                    await run
                run.cancel("third")
                assert (run.status, rows_about(store, "inbox/")) == ("cancelled", [])
            owner.use()
            assert next(step.status for step in durable.get_run("r").steps) == "cancelled"
            ran.clear()
            run = durable.get_run("r").resume()
            await until(lambda: "held" in ran)
            run.cancel()
            run.cancel()
            with pytest.raises(RunCancelled):
                await run

    asyncio.run(main())


@pytest.mark.parametrize("act", ["resume", "restart", "cancel", "delete"])
def test_two_processes_that_want_the_same_at_once_get_it_once(act):
    """One executes the run, and both get what comes of it."""
    store = MemoryStore()

    async def main():
        good = []

        @durable.workflow
        async def fails():
            await durable.run("one", body, "one")
            if not good:
                raise ValueError("not yet")
            return len(ran)

        async with runtime(store):
            with pytest.raises(ValueError, match="not yet"):
                await fails.start(id="r")
        ran.clear()
        good.append(1)
        came = []
        async with runtime(store) as left, runtime(store) as right:
            runs = []
            for process in (left, right):
                process.use()
                run = durable.get_run("r") if not (act == "delete" and runs) else durable.Run("r")
                if act == "delete" and runs:
                    with pytest.raises(RunNotFoundError):
                        run.delete()
                else:
                    getattr(run, act)()
                runs.append(run)
            if act in ("resume", "restart"):
                for process in (left, right):
                    process.use()
                    came.append(await durable.get_run("r"))
                assert came[0] == came[1] == (0 if act == "resume" else 1)
                assert ran == ([] if act == "resume" else ["one"])
                assert durable.get_run("r").status == "completed"
            elif act == "cancel":
                assert durable.get_run("r").status == "failed"
        assert rows_about(store, "inbox/") == []

    asyncio.run(main())


# -- bad input, and what is said -----------------------------------------------------------------------------------------


def test_what_is_not_a_workflows_run_or_is_unknown_is_refused_by_name():
    store = MemoryStore()

    async def main():
        async with runtime(store):
            for act in (durable.get_run, lambda run: durable.Run(run).restart(), lambda run: durable.Run(run).delete()):
                with pytest.raises(RunNotFoundError, match="'no such run'"):
                    act("no such run")
            with pytest.raises(RunNotFoundError, match="'no such run'"):
                durable.Run("no such run").fork(at="x")

    asyncio.run(main())


def test_in_a_workflows_own_code_control_is_a_matter_for_a_step():
    store = MemoryStore()

    async def main():
        @durable.workflow
        async def keeps():
            for act in (
                lambda run: run.restart(),
                lambda run: run.fork(at="x"),
                lambda run: run.delete(),
                lambda run: durable.cancel(label="x"),
                lambda run: durable.runs(),
            ):
                with pytest.raises(NotSupportedError, match="in a step"):
                    act(durable.Run("other"))
            return "refused"

        async with runtime(store):
            assert await keeps.start() == "refused"

    asyncio.run(main())


def test_a_restart_by_start_of_a_run_that_another_process_executes_names_it():
    store = MemoryStore()

    async def main():
        @durable.workflow
        async def waits():
            await durable.run("held", held, "held")

        async with runtime(store) as owner:
            waits.start(id="r")
            await until(lambda: ran)
            async with runtime(store):
                process = owner.engine.store.process.id
                for how in ("restart", "fail"):
                    with pytest.raises(RunConflictError, match=f"in process {process}.*get_run"):
                        waits.start(id="r", on_conflict=how)
            owner.use()
            with pytest.raises(RunConflictError, match=r"in this process.*cancel"):
                waits.start(id="r", on_conflict="restart")

    asyncio.run(main())
