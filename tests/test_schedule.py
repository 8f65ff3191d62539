"""Workflows that are started by the clock: each due time once, whoever runs, whatever dies."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from contextlib import ExitStack
from datetime import datetime, timedelta
from itertools import islice

import pytest
from kernels import kernel
from workers import ForkServer, read_oracle
from workers import until as wait

import durable_nb as durable
from durable_nb import _cron
from durable_nb._cli import main as cli
from durable_nb.testing import FakeClock, MemoryStore, redefine, runtime

SECONDS = int(os.environ.get("DURABLE_NB_SECONDS", "6"))


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    redefine("report")


def workflow(does=None):
    @durable.workflow
    async def report(*args):
        if does is not None:
            await does(*args)
        return args

    return report


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  of another process, as it were
            await asyncio.sleep(0.01)


def looked(process):
    return process.engine.workflows.schedules._looked_s


def ids():
    return sorted(run.id for run in durable.runs(limit=10_000))


@pytest.mark.parametrize(
    ("cron", "after", "due"),
    [
        ("0 7 * * mon-fri", "2026-10-23T12:00+02:00", ["2026-10-26T07:00+01:00", "2026-10-27T07:00+01:00"]),
        ("30 2 * * *", "2026-10-24T12:00+02:00", ["2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"]),
        ("30 2 * * *", "2026-10-25T02:30+02:00", ["2026-10-26T02:30+01:00"]),
        ("*/30 2 * * *", "2026-10-25T02:00+02:00", ["2026-10-25T02:30+02:00", "2026-10-26T02:00+01:00"]),
        ("30 2 * * *", "2026-03-28T12:00+01:00", ["2026-03-29T03:00+02:00", "2026-03-30T02:30+02:00"]),
        ("*/20 * * * *", "2026-03-29T01:40+01:00", ["2026-03-29T03:00+02:00", "2026-03-29T03:20+02:00"]),
        ("*/10 * * * * *", "2026-03-28T12:00:05+01:00", ["2026-03-28T12:00:10+01:00", "2026-03-28T12:00:20+01:00"]),
    ],
)
def test_local_times_that_come_twice_or_not_at_all_are_due_once(cron, after, due):
    found = _cron.after(cron, "Europe/Berlin", datetime.fromisoformat(after).timestamp())
    assert [one.isoformat() for one in islice(found, len(due))] == [datetime.fromisoformat(one).isoformat() for one in due]


def test_each_due_time_starts_one_run_whose_id_says_schedule_and_time():
    async def main():
        clock = FakeClock(datetime.fromisoformat("2026-11-27T06:59:58+01:00").timestamp())
        async with runtime(clock=clock):
            report = workflow()
            durable.schedule("nightly", report, cron="0 7 * * *", tz="Europe/Berlin", args=["a"], labels=["night"])
            durable.schedule("often", report, cron="* * * * * *", tz="Europe/Berlin")
            await until(lambda: ids() == [])
            for _ in range(3):
                clock.advance(1)
                seen = len(ids())
                await until(lambda: len(ids()) > seen)  # noqa: B023
            expected = [f"often@2026-11-27T0{time}+01:00" for time in ("6:59:59", "7:00:00", "7:00:01")]
            nightly = "nightly@2026-11-27T07:00:00+01:00"
            await until(lambda: ids() == [nightly, *expected])
            assert await durable.get_run(nightly) == ("a",)
            assert [run.id for run in durable.runs(label="night")] == [nightly]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("catch_up", "missed"), [("last", ["10:00"]), ("all", ["08:00", "09:00", "10:00"]), ("none", [])], ids=str
)
def test_what_passed_while_no_process_ran_is_caught_up_with_as_the_schedule_says(catch_up, missed):
    async def main():
        clock, store = FakeClock(datetime.fromisoformat("2026-11-27T07:30Z").timestamp()), MemoryStore()
        how = {"cron": "0 * * * *", "tz": "UTC", "catch_up": catch_up}
        report = workflow()
        async with runtime(store, clock=clock):
            durable.schedule("hourly", report, **how)
        clock.advance("3h")
        for _ in range(2):  # caught up with once
            async with runtime(store, clock=clock):
                durable.schedule("hourly", report, **how)
                clock.advance(20)
                durable.schedule("now", report, cron="30 10 * * *", tz="UTC").trigger()
                await until(lambda: len(ids()) > len(missed))
                await asyncio.sleep(0)
                found = [one for one in ids() if one.startswith("hourly")]
                assert found == [f"hourly@2026-11-27T{time}:00+00:00" for time in missed]
        async with runtime(store, clock=clock) as process:
            durable.schedule("hourly", report, **how)
            clock.advance(datetime.fromisoformat("2026-11-27T11:00:05Z").timestamp() - clock.wall_s)
            await until(lambda: looked(process) == clock.wall_s)
            assert ("hourly@2026-11-27T11:00:00+00:00" in ids()) == bool(missed)  # it was suspended, as far as it can tell
            clock.advance("59m40s")
            await until(lambda: looked(process) == clock.wall_s)
            clock.advance(20)  # what is due while it looks is not missed, whatever it catches up with
            await until(lambda: "hourly@2026-11-27T12:00:00+00:00" in ids())

    asyncio.run(main())


def test_a_paused_schedule_drops_what_is_due_and_the_same_name_again_keeps_it_paused():
    async def main():
        clock = FakeClock(datetime.fromisoformat("2026-11-27T07:30:00.5Z").timestamp())
        async with runtime(clock=clock):
            report = workflow()
            how = {"cron": "*/10 * * * * *", "tz": "UTC", "catch_up": "all"}
            schedule = durable.schedule("often", report, **how)
            schedule.pause()
            again = durable.schedule("often", report, **how)
            assert again.paused
            assert again.next_at is None
            assert "paused" in repr(again)
            clock.advance(25)
            assert again.trigger().id in ids()  # paused or not
            schedule.resume()
            assert schedule.next_at == datetime.fromisoformat("2026-11-27T07:30:30Z")
            clock.advance(5)
            await until(lambda: len(ids()) == 2)
            assert "often@2026-11-27T07:30:30+00:00" in ids()
            schedule.delete()
            for gone in (schedule.pause, schedule.trigger, schedule.delete):
                with pytest.raises(durable.RunNotFoundError, match="often"):
                    gone()

    asyncio.run(main())


def test_a_due_time_can_be_skipped_while_the_last_run_is_unfinished():
    async def main():
        clock = FakeClock(datetime.fromisoformat("2026-11-27T07:30:00.5Z").timestamp())
        async with runtime(clock=clock):
            ends = asyncio.Event()

            async def does():
                await durable.run("held", held, ends)

            async def held(ends):
                await ends.wait()

            durable.schedule("slow", workflow(does), cron="* * * * * *", tz="UTC", overlap="skip")
            clock.advance(1)
            await until(lambda: len(ids()) == 1)
            clock.advance(1)
            await asyncio.sleep(0.7)
            assert ids() == ["slow@2026-11-27T07:30:01+00:00"]
            ends.set()
            await durable.get_run("slow@2026-11-27T07:30:01+00:00")
            clock.advance(1)
            await until(lambda: ids()[1:] == ["slow@2026-11-27T07:30:03+00:00"])

    asyncio.run(main())


def test_a_changed_expression_counts_from_now():
    async def main():
        clock, store = FakeClock(datetime.fromisoformat("2026-11-27T07:30Z").timestamp()), MemoryStore()
        report = workflow()
        async with runtime(store, clock=clock):
            durable.schedule("nightly", report, cron="0 7 * * *", tz="UTC")
        clock.advance(timedelta(hours=3))
        async with runtime(store, clock=clock):
            schedule = durable.schedule("nightly", report, cron="0 * * * *", tz="UTC")
            assert schedule.next_at == datetime.fromisoformat("2026-11-27T11:00Z")
            await asyncio.sleep(0.05)
            assert ids() == []

    asyncio.run(main())


def test_processes_that_fire_together_start_one_run_a_due_time():
    async def main():
        clock, store = FakeClock(datetime.fromisoformat("2026-11-27T07:30:00.5Z").timestamp()), MemoryStore()
        report = workflow()
        async with runtime(store, clock=clock):
            durable.schedule("often", report, cron="* * * * * *", tz="UTC")
            async with runtime(store, clock=clock) as dies:
                durable.schedule("often", report, cron="* * * * * *", tz="UTC")
                for seconds in range(1, 11):
                    clock.advance(1)
                    if seconds == 5:
                        dies.kill()
                    await asyncio.sleep(0.15)
            await until(lambda: len(ids()) == 10)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"cron": "0 0 30 2 *"}, ValueError, "bad day-of-month.*five fields"),
        ({"cron": "tomorrow"}, ValueError, "wrong number of fields"),
        ({"cron": 7}, TypeError, "cron=7.*text"),
        ({"tz": "Mars/Base"}, ValueError, "no time zone.*Europe/Berlin"),
        ({"kwargs": {"b": 1}}, TypeError, "unexpected keyword argument .b."),
        ({"catch_up": "some"}, ValueError, "'last', 'all', 'none'"),
        ({"overlap": "maybe"}, ValueError, "'allow', 'skip'"),
        ({"labels": [1]}, TypeError, "is not text"),
        ({"args": [threading.Lock()]}, durable.UnserializableError, "nothing was recorded"),
        ({"args": ["x" * 2_000_000]}, durable.UnserializableError, "name of a file"),
        ({"name": " "}, ValueError, "empty"),
        ({"workflow": print}, TypeError, "@durable.workflow"),
        ({"unknown": 1}, TypeError, "unknown"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_in_one_line(change, error, says):
    async def main():
        async with runtime() as process:
            given = {"name": "nightly", "workflow": workflow(), "cron": "0 7 * * *", **change}
            with pytest.raises(error, match=says) as refused:
                durable.schedule(given.pop("name"), given.pop("workflow"), **given)
            assert "\n" not in str(refused.value)
            assert process.engine.store.journal.scan("schedule/") == []

    asyncio.run(main())


def test_three_processes_fire_each_second_once_though_one_is_killed(tmp_path):
    """Real processes on one store, going by the real clock. `DURABLE_NB_SECONDS` says for how long."""
    store, oracle = str(tmp_path / "store"), tmp_path / "oracle"
    server = ForkServer(tmp_path / "signing.key")
    try:
        with ExitStack() as stack:
            first, *_ = [stack.enter_context(server.start("fire", store=store, oracle=str(oracle))) for _ in range(3)]
            for seconds in range(1, SECONDS + 1):
                wait(lambda: len(read_oracle(oracle)) >= 2 * seconds, f"the runs of {seconds} seconds")  # noqa: B023
                if seconds == SECONDS // 2:
                    first.kill()
        fired = sorted(server.do("all_runs", store=store))
        began = datetime.fromisoformat(fired[0].partition("@")[2])
        assert len(fired) >= SECONDS - 1
        assert fired == [f"each second@{(began + timedelta(seconds=n)).isoformat()}" for n in range(len(fired))]
    finally:
        server.close()


def test_the_command_line_lists_schedules(tmp_path, capsys):
    async def main():
        async with runtime(tmp_path / "store"):
            durable.schedule("nightly", workflow(), cron="0 7 * * *", tz="Europe/Berlin")
            durable.schedule("often", workflow(), cron="* * * * * *", tz="UTC").pause()

    asyncio.run(main())
    assert cli(["schedule", "--store", str(tmp_path / "store")]) == 0
    shown = capsys.readouterr().out
    assert "2 schedules" in shown
    assert "0 7 * * * Europe/Berlin" in shown
    assert "paused" in shown
    assert cli(["schedule", "--json", "--store", str(tmp_path / "store")]) == 0
    nightly, often = json.loads(capsys.readouterr().out)["schedules"]
    assert (nightly["name"], nightly["workflow"], often["next_at"]) == ("nightly", "report", None)


@pytest.mark.kernel
def test_a_notebooks_schedule_is_fired_after_a_restart_where_only_its_workflow_is_defined(tmp_path):
    defined = "@durable.workflow\nasync def tick(): return 1"
    with kernel(tmp_path) as k:
        assert k.run(defined).status == "ok"
        assert k.run("durable.schedule('each second', tick, cron='* * * * * *', tz='UTC')").status == "ok"
        k.kill()
        assert k.run(defined).status == "ok"
        seen = k.value("len(durable.runs())")
        wait(lambda: k.value("len(durable.runs())") > seen, "one more run")
