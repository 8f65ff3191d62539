"""A run's inbox: what others want of it is on disk before the call returns, is delivered once, and goes with its delivery."""

from __future__ import annotations

import asyncio
import threading

import pytest

import durable_nb as durable
from durable_nb import _records as rec
from durable_nb._engine.inbox import Inbox
from durable_nb._journal import Commit
from durable_nb._records import Cancel
from durable_nb._store import Store
from durable_nb.errors import RunCancelled
from durable_nb.testing import MemoryStore, redefine, runtime


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    for name in ("waits", "tidies"):
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
