"""A run's inbox: what others want of it is on disk before the call returns, is delivered once, and goes with its delivery."""

from __future__ import annotations

import asyncio
import threading

import pytest

import durable_nb as durable
from durable_nb import _records as rec
from durable_nb._engine.engine import Asked
from durable_nb._engine.inbox import Inbox
from durable_nb._facts import Status
from durable_nb._journal import Commit
from durable_nb._records import Cancel, Restart
from durable_nb._store import Store
from durable_nb.errors import RunCancelled
from durable_nb.testing import MemoryStore, redefine, runtime


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    for name in ("waits", "tidies", "counts"):
        redefine(name)


async def held(began):
    """A body that ends by being cancelled only."""
    began.set()
    await asyncio.Event().wait()


def inbox_rows(store):
    return [key for key, _ in store.journal.scan("inbox/")]


def test_a_cancellation_is_on_disk_when_the_call_returns_and_survives_a_kill():
    store = MemoryStore()

    async def main():
        began = asyncio.Event()

        @durable.workflow
        async def waits():
            await durable.run("held", held, began)

        async with runtime(store) as process:
            run = waits.start(id="r/1 ü")
            await began.wait()
            run.cancel("not wanted")
            process.kill()  # before anything of it was delivered
        async with runtime(store):
            found = durable.get_run("r/1 ü")
            assert found.status == "cancelled"
            with pytest.raises(RunCancelled, match="not wanted"):
                await found

    asyncio.run(main())


def test_a_message_goes_with_the_commit_that_records_its_delivery():
    """Killed while its code tidies up, the run is cancelled by its history, and the message is not delivered again."""
    store, tidying = MemoryStore(), []

    async def main():
        began = asyncio.Event()

        @durable.workflow
        async def tidies():
            try:
                await durable.run("held", held, began)
            finally:
                tidying.append(len(tidying))
                await durable.run("tidy", asyncio.sleep, 0)

        async with runtime(store, crash="after:step"):
            run = tidies.start(id="a")
            await began.wait()
            run.cancel()
            await asyncio.sleep(3600)
        assert inbox_rows(store) == []
        async with runtime(store):
            durable.resume()
            with pytest.raises(RunCancelled):
                await durable.get_run("a")
        assert tidying == [0, 1]

    asyncio.run(main())


def test_what_ended_has_nothing_in_its_inbox():
    store = MemoryStore()

    @durable.workflow
    async def waits():
        return 1

    async def main():
        async with runtime(store):
            run = waits.start(id="a")
            assert await run == 1
            run.cancel("too late")
            assert run.status == "completed"
        assert inbox_rows(store) == []

    asyncio.run(main())


def test_senders_take_turns(tmp_path):
    """Twenty threads at once: twenty messages, none in another's place, in the order of their numbers."""
    store = Store(tmp_path / "store")
    try:
        inbox = Inbox(store)
        record = rec.RunRecord("a", "workflow", "waits", "s", 0, "", 0.0)
        row = rec.pack(store.signer, rec.run_key("a"), record)
        store.writer.commit_and_wait(Commit(puts=((rec.run_key("a"), row),)))
        threads = [threading.Thread(target=inbox.send, args=("a", row, Cancel(str(n), float(n)))) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = inbox.of("a")
        assert sorted(int(one.message.reason) for one in found) == list(range(20))
        assert [one.key for one in found] == [rec.inbox_key("a", n) for n in range(1, 21)]
        assert not inbox.send("a", b"another record by now", Cancel("x", 0.0))
        assert len(inbox.of("a")) == 20
    finally:
        store.close()


def rows_of(store, run_id):
    return [key for key, _ in store.journal.scan(rec.inbox_prefix(run_id))]


async def soon(condition):
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  what is asked has no event
            await asyncio.sleep(0.01)


def counting(began, gate):
    """A workflow that tells which keys its step was given, and that waits for the gate."""

    @durable.workflow
    async def counts(n):
        await durable.run("paid", lambda: began.append(durable.idempotency_key()))
        if not gate.is_set():
            await durable.run("held", held, asyncio.Event())
        return n, len(began)

    return counts


def test_a_restart_reaches_the_process_that_executes_the_run():
    """It stops and begins anew there, with keys of its own; whoever awaits the run gets what the new execution returns."""
    store, began = MemoryStore(), []

    async def main():
        gate = asyncio.Event()
        counts = counting(began, gate)
        async with runtime(store) as owner:
            run = counts.start(7, id="a", labels=["shop"])
            await soon(lambda: len(run.steps) == 2)
            waiting = asyncio.ensure_future(run)
            await asyncio.sleep(0)
            async with runtime(store):
                durable.get_run("a").restart()
                gate.set()
                assert await durable.get_run("a") == (7, 2)
                assert rows_of(store, "a") == []
            owner.use()
            assert await waiting == (7, 2)
            assert [step.name for step in run.steps] == ["paid"]
        assert len(set(began)) == 2

    asyncio.run(main())


@pytest.mark.parametrize("ended", ["completed", "failed", "cancelled", "interrupted"])
def test_a_restart_of_a_run_that_nobody_executes_begins_it_here(ended):
    store, began = MemoryStore(), []

    async def main():
        @durable.workflow
        async def counts():
            await durable.run("paid", lambda: began.append(durable.idempotency_key()))
            if len(began) > 1:
                return len(began)
            if ended == "failed":
                raise OSError("down")
            if ended != "completed":
                await durable.run("held", held, asyncio.Event())
            return len(began)

        async with runtime(store) as process:
            run = counts.start(id="a")
            if ended in ("cancelled", "interrupted"):
                await soon(lambda: len(run.steps) == 2)
            if ended == "cancelled":
                run.cancel()
            if ended == "interrupted":
                process.kill()
            else:
                await asyncio.wait([asyncio.ensure_future(run)])
        async with runtime(store):
            run = durable.get_run("a")
            assert run.status == ended
            assert await run.restart() == 2
            assert (run.status, [step.name for step in run.steps]) == ("completed", ["paid"])
        assert len(set(began)) == 2

    asyncio.run(main())


@pytest.mark.parametrize("how", ["resume", "restart"])
def test_a_process_without_the_workflow_asks_one_that_has_it(how):
    """The run stands as interrupted until then, and is executed once somebody that has its code lives."""
    store, began = MemoryStore(), []

    async def main():
        gate = asyncio.Event()
        counts = counting(began, gate)
        async with runtime(store) as process:
            run = counts.start(7, id="a")
            await soon(lambda: len(run.steps) == 2)
            process.kill()
        redefine("counts")
        async with runtime(store):
            getattr(durable.get_run("a"), how)()
            assert durable.get_run("a").status == "interrupted"
        gate.set()
        redefine(counts)
        async with runtime(store):
            assert durable.get_run("a").status == "interrupted"
            await soon(lambda: durable.get_run("a").status == "completed")
            assert rows_of(store, "a") == []
            assert await durable.get_run("a") == (7, 1 + (how == "restart"))

    asyncio.run(main())


def test_an_owner_that_dies_before_it_hears_of_a_restart_leaves_it_to_the_next():
    store, began = MemoryStore(), []

    async def main():
        gate = asyncio.Event()
        counts = counting(began, gate)
        async with runtime(store) as process:
            run = counts.start(7, id="a")
            await soon(lambda: len(run.steps) == 2)
            row = store.journal.get(rec.run_key("a"))
            assert process.engine.ownership.inbox.send("a", row, Restart(0.0))  # nobody is told
            process.kill()
        gate.set()
        async with runtime(store):
            assert durable.get_run("a").status == "interrupted"
            assert await durable.get_run("a").resume() == (7, 2)

    asyncio.run(main())


def test_what_is_sent_in_the_moment_of_the_end_goes_with_it():
    """A cancellation comes too late then, and leaves nothing behind; a restart is heeded all the same."""
    store, began = MemoryStore(), []

    async def main():
        gate = asyncio.Event()
        gate.set()
        counts = counting(began, gate)
        async with runtime(store) as process:
            inbox, late = process.engine.ownership.inbox, [Cancel("late", 0.0)]
            apply = store.journal.apply

            def just_before(commits):
                if late and any(commit.sweeps for commit in commits):
                    rows = [(key, row) for key, row in [inbox.next_row("a", message) for message in late]]
                    late.clear()
                    apply([Commit(inserts=tuple(rows))])
                return apply(commits)

            store.journal.apply = just_before
            run = counts.start(7, id="a")
            assert await run == (7, 1)
            assert (run.status, rows_of(store, "a"), late) == ("completed", [], [])
            late.append(Restart(0.0))
            run.restart()
            await soon(lambda: len(began) == 3)
            await soon(lambda: run.status == "completed")
            assert rows_of(store, "a") == []

    asyncio.run(main())


@pytest.mark.parametrize("owner", ["lives", "dies"])
def test_what_is_sent_after_a_restart_is_for_the_execution_that_it_begins(owner):
    """A cancellation then cancels, also where all of it waits in the inbox."""
    store, began = MemoryStore(), []

    async def main():
        counts = counting(began, asyncio.Event())
        async with runtime(store) as process:
            run = counts.start(7, id="a")
            await soon(lambda: len(run.steps) == 2)
            for message in (Cancel("before", 0.0), Restart(0.0), Cancel("after", 0.0)):
                assert process.engine.ownership.inbox.send("a", store.journal.get(rec.run_key("a")), message)  # nobody is told
            if owner == "dies":
                process.kill()
            else:
                with pytest.raises(RunCancelled, match="after"):
                    await run
                assert rows_of(store, "a") == []
        async with runtime(store):
            assert durable.get_run("a").status == "cancelled"
            with pytest.raises(RunCancelled, match="after" if owner == "lives" else "before|after"):
                await durable.get_run("a")
            await asyncio.sleep(0)
        assert len(began) == 1 or owner == "lives"

    asyncio.run(main())


def test_a_cells_run_that_fails_in_the_moment_of_its_cancellation_has_failed():
    """The message goes with the end, and the cell's next execution goes on with that run."""
    store = MemoryStore()

    async def main():
        async with runtime(store) as process:
            engine, apply, late = process.engine, store.journal.apply, [Cancel("late", 0.0)]

            def just_before(commits):
                if late and any(commit.sweeps for commit in commits):
                    apply([Commit(inserts=(engine.ownership.inbox.next_row(run.id, late.pop()),))])
                return apply(commits)

            async def code():
                await durable.run("one", len, "abc")
                raise ValueError("no")

            run = await engine.begin(Asked("cell", "inputs"))
            store.journal.apply = just_before
            with pytest.raises(ValueError, match="no"):
                await run.execute(code())
            await run.finish(Status.FAILED, "ValueError: no")
            assert (late, rows_of(store, run.id)) == ([], [])
            assert durable.get_run(run.id).status == "failed"
            again = await engine.begin(Asked("cell", "inputs"))
            assert (again.id, again.resumed) == (run.id, True)
            await again.finish(Status.COMPLETED)

    asyncio.run(main())
