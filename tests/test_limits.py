"""Limits of the store: so many at once and so often, for all its processes, whoever dies meanwhile.

What several processes do is played on a store in memory, and done by real ones in `test_limits_of_processes.py`.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import pickle
from collections import Counter

import pytest

import durable_nb as durable
from durable_nb import _current
from durable_nb._clock import Instant
from durable_nb._engine.limits import grant
from durable_nb._facts import Status
from durable_nb._fingerprint import hash_value
from durable_nb._records import Figures
from durable_nb.errors import NotSupportedError, RunCancelled, StoreError
from durable_nb.testing import FakeClock, MemoryStore, redefine, runtime

done: list[object] = []
"""What bodies and runs did, in order."""
at_work: Counter[str] = Counter()
most: Counter[str] = Counter()
gates: dict[str, asyncio.Event] = {}


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    before = dict(_current.workflow_functions), dict(_current.workflow_limits), dict(_current.limits)
    for each in (done, at_work, most, gates):
        each.clear()
    yield
    _current.use_engine(None)
    for kept, was in zip((_current.workflow_functions, _current.workflow_limits, _current.limits), before, strict=True):
        kept.clear()
        kept.update(was)


async def busy(what, turns=3):
    at_work[what] += 1
    most[what] = max(most[what], at_work[what])
    for _ in range(turns):
        await asyncio.sleep(0.001)
    at_work[what] -= 1
    done.append(what)
    return what


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.002)


def on_loop(test):
    @functools.wraps(test)
    def ran(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return ran


def workflow(fn=None, **options):
    """A workflow that may be defined in each test anew."""

    def wrap(function):
        redefine(function.__name__)
        return durable.workflow(**options)(function)

    return wrap if fn is None else wrap(fn)


# -- what a look comes to, pure -------------------------------------------------------------------------------------------


def at(seconds):
    return Instant(1000.0 + seconds, "boot", seconds)


@pytest.mark.parametrize(
    ("figures", "held", "last", "waiting", "expected"),
    [
        (None, 3, None, 2, (2, None)),
        (Figures(4, None, 0), 3, None, 2, (1, None)),
        (Figures(4, None, 0), 4, None, 2, (0, None)),
        (Figures(4, None, 0), 6, None, 2, (0, None)),  # others were declared meanwhile
        (Figures(None, "1/s", 0), 0, None, 2, (1, 1.0)),
        (Figures(None, "1/s", 0), 0, at(9.5), 2, (0, 0.5)),
        (Figures(None, "1/s", 0), 0, at(9.0), 1, (1, None)),
        (Figures(1, "1/s", 0), 1, at(9.9), 1, (0, None)),  # no room: the rate is not what holds it back
        (Figures(1, "1/h", 0), 0, Instant(5000.0, "earlier boot", 77.0), 1, (0, 3600.0)),  # the clock was set back
    ],
)
def test_how_many_may_begin(figures, held, last, waiting, expected):
    found = grant(figures, held, last, waiting, at(10.0))
    assert (found.count, found.left_s) == expected


# -- what a limit is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: durable.limit("a", concurrency=0), ValueError, "concurrency=0; write how many"),
        (lambda: durable.limit("a", concurrency=-1), ValueError, "concurrency=-1"),
        (lambda: durable.limit("a", concurrency=math.nan), ValueError, "concurrency=nan"),
        (lambda: durable.limit("a", concurrency=math.inf), ValueError, "concurrency=inf"),
        (lambda: durable.limit("a", concurrency=2.5), ValueError, "concurrency=2.5"),
        (lambda: durable.limit("a", concurrency=True), ValueError, "concurrency=True"),
        (lambda: durable.limit("a", concurrency="8"), ValueError, "concurrency='8'"),
        (lambda: durable.limit("a", rate="often"), ValueError, "'often' is not a rate: write how many in what time"),
        (lambda: durable.limit("a", rate="0/min"), ValueError, "'0/min' is not a rate"),
        (lambda: durable.limit("a", rate="-3/min"), ValueError, "'-3/min' is not a rate"),
        (lambda: durable.limit("a", rate="nan/min"), ValueError, "'nan/min' is not a rate"),
        (lambda: durable.limit("a", rate="5/0s"), ValueError, "'5/0s' is not a rate"),
        (lambda: durable.limit("a", rate=60), ValueError, "60 is not a rate"),
        (lambda: durable.limit("a"), ValueError, "it limits nothing; give concurrency=8"),
        (lambda: durable.limit(""), ValueError, "the name is empty"),
        (lambda: durable.limit(8), TypeError, "the limit's name, a text"),
        (lambda: durable.limit("a", concurency=8), TypeError, "did you mean concurrency=?"),
        (lambda: durable.step(busy, limit=8), TypeError, "durable.step: limit=8; give what durable.limit"),
        (lambda: durable.workflow(limit="a"), TypeError, "limit='a'; give what durable.limit"),
        (lambda: durable.map("m", busy, [1], limit=3), TypeError, "limit=3; give what durable.limit"),
        (lambda: durable.workflow(key=len), TypeError, "a key is of a limit"),
        (lambda: durable.workflow(limit=durable.limit("a", concurrency=1), key="x"), TypeError, "key='x'"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(make, error, said):
    with pytest.raises(error) as raised:
        make()
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@on_loop
async def test_other_figures_under_a_used_name_win_and_are_told(caplog):
    store = MemoryStore()
    first = durable.limit("model", concurrency=8)
    assert not caplog.records
    second = durable.limit("model", concurrency=2, rate="60/min")
    assert "the limit 'model' was 8 at once, and is 2 at once, 60/min from now on" in caplog.text
    assert first.name == second.name

    caplog.clear()
    durable.limit("model", concurrency=2)
    step = durable.step(busy, limit=first)

    @workflow
    async def many():
        await asyncio.gather(*(durable.run(f"s{n}", step, "a") for n in range(6)))

    async with runtime(store):
        await many.start(id="1")
    assert most["a"] == 2

    caplog.clear()
    durable.limit("model", concurrency=2)
    async with runtime(store):  # as a restart
        durable.limit("model", concurrency=2)
        assert not caplog.records
        _current.limits.clear()  # of another process
        durable.limit("model", concurrency=3)
        assert "the limit 'model' of this store was 2 at once, and is 3 at once from now on" in caplog.text
        await many.start(id="2")
    assert most["a"] == 3


# -- steps ----------------------------------------------------------------------------------------------------------------


@on_loop
async def test_steps_hold_a_share_for_each_attempt_and_none_between_two():
    limit = durable.limit("model", concurrency=2)
    failing = Counter()

    async def flaky(n):
        failing[n] += 1
        await busy("a")
        if failing[n] == 1 and n % 2:
            raise ConnectionError("once")

    @workflow
    async def many():
        await asyncio.gather(*(durable.run("s", durable.step(flaky, limit=limit, backoff=3600), n) for n in range(10)))

    async with runtime() as process:
        await many.start(id="1")
        assert most["a"] == 2
        assert sum(failing.values()) == 15
        rows = process._store.journal.scan("shares/")
        await until(lambda: not process._store.journal.scan("shares/"))
        assert len(rows) <= 1
        assert not process._store.journal.scan("waiting/")


@on_loop
async def test_a_map_is_under_its_limit_and_under_its_own():
    limit = durable.limit("model", concurrency=3)

    @workflow
    async def many():
        await durable.map("m", durable.step(busy, limit=limit), ["a"] * 12, limit=limit, concurrency=6)
        await durable.map("n", busy, ["b"] * 12, limit=limit, concurrency=2)

    async with runtime():
        await many.start(id="1")
    assert (most["a"], most["b"]) == (3, 2)


@on_loop
async def test_what_waits_is_pending_and_says_for_what():
    limit = durable.limit("model", concurrency=1)
    gates["open"] = asyncio.Event()

    async def body(n):
        await gates["open"].wait()

    @workflow
    async def two():
        await asyncio.gather(*(durable.run(f"s{n}", durable.step(body, limit=limit), n) for n in range(2)))

    async with runtime():
        run = two.start(id="1")
        await until(lambda: any(step.waits_for for step in run.steps))
        assert [(step.status, step.waits_for) for step in run.steps] == [("running", None), ("pending", "limit 'model'")]
        gates["open"].set()
        await run
        assert [(step.status, step.waits_for) for step in run.steps] == [("completed", None)] * 2


@on_loop
async def test_a_step_that_is_given_up_while_it_waits_leaves_its_place():
    limit = durable.limit("model", concurrency=1)
    gates["open"] = asyncio.Event()

    async def body(n):
        done.append(n)
        await gates["open"].wait()

    step = durable.step(body, limit=limit)

    @workflow
    async def first():
        await durable.run("s", step, "first")

    @workflow
    async def second():
        await durable.run("s", step, "second")

    async with runtime() as process:
        one, two = first.start(id="1"), second.start(id="2")
        await until(lambda: done == ["first"] and two.steps and two.steps[0].waits_for)
        two.cancel()
        with pytest.raises(RunCancelled):
            await two
        gates["open"].set()
        await one
        await until(lambda: not process._store.journal.scan("shares/"))
    assert done == ["first"]


@on_loop
async def test_a_step_that_its_code_gives_up_while_it_waits_never_begins():
    limit, store = durable.limit("model", concurrency=1), MemoryStore()
    gates["open"] = asyncio.Event()

    async def body(n):
        done.append(n)
        await gates["open"].wait()

    step = durable.step(body, limit=limit)

    @workflow
    async def impatient():
        first = asyncio.create_task(durable.run("first", step, 1))
        try:
            await asyncio.wait_for(durable.run("second", step, 2), 0.5)
        except TimeoutError:
            gates["open"].set()
        await first
        await durable.run("third", step, 3)
        return "done"

    async with runtime(store) as process:
        run = impatient.start(id="1")
        assert await run == "done"
        assert [step.name for step in run.steps if step.status == "completed"] == ["first", "third"]
        await until(lambda: not process._store.journal.scan("shares/") + process._store.journal.scan("waiting/"))
    assert done == [1, 3]


@on_loop
async def test_a_step_under_the_limit_that_its_run_holds_is_refused():
    limit = durable.limit("model", concurrency=1)

    @workflow(limit=limit)
    async def outer():
        await durable.run("s", durable.step(busy, limit=limit), "a")

    async with runtime():
        with pytest.raises(NotSupportedError, match="would wait for itself"):
            async with asyncio.timeout(20):
                await outer.start(id="1")


@on_loop
async def test_a_child_under_the_limit_that_its_parent_holds_is_refused():
    limit = durable.limit("model", concurrency=2)

    @workflow(limit=limit)
    async def child():
        return 1

    @workflow
    async def between():
        return await durable.invoke("child", child)

    @workflow(limit=limit)
    async def parent():
        return await durable.invoke("between", between)

    @workflow(limit=limit, key=lambda n: n)
    async def countdown(n):
        return [n, *(await durable.invoke("less", countdown, n - 1) if n else [])]

    async with runtime():
        with pytest.raises(NotSupportedError, match="it would never begin"):
            async with asyncio.timeout(20):
                await parent.start(id="1")
        assert await countdown.start(3, id="2") == [3, 2, 1, 0]


# -- runs -----------------------------------------------------------------------------------------------------------------


@on_loop
async def test_a_run_holds_its_share_to_its_end_and_the_others_are_pending_in_order():
    limit = durable.limit("orders", concurrency=2)

    @workflow(limit=limit)
    async def order(n):
        at_work["run"] += 1
        most["run"] = max(most["run"], at_work["run"])
        done.append(n)
        await durable.sleep("a while", "1h")
        await durable.run("s", busy, "a")
        at_work["run"] -= 1

    async with runtime() as process:
        runs = [order.start(n, id=f"{n}") for n in range(9)]
        assert [run.status for run in runs[2:]] == [Status.PENDING] * 7
        await runs[4]
        assert runs[8].status in (Status.PENDING, Status.RUNNING, Status.SLEEPING)
        for run in runs:
            await run
        await until(lambda: not process._store.journal.scan("shares/") + process._store.journal.scan("waiting/"))
    assert most["run"] == 2
    assert [n for n in done if isinstance(n, int)][:3] == [0, 1, 2]


@on_loop
async def test_each_key_has_the_limit_for_itself():
    limit = durable.limit("one each", concurrency=1)
    gates["jane"], gates["bob"] = asyncio.Event(), asyncio.Event()

    @workflow(limit=limit, key=lambda email, cart: email)
    async def buy(email, cart=0):
        done.append((email, cart))
        await durable.run("wait", gates[email].wait)

    async with runtime():
        runs = [buy.start(*of) for of in [("jane", 1), ("jane", 2), ("bob", 1), ("jane", 3), ("bob", 2)]]
        await until(lambda: len(done) == 2)
        assert [run.status for run in runs] == ["running", "pending", "running", "pending", "pending"]
        assert runs[1]._snapshot().waits_for == "limit 'one each'"
        gates["bob"].set()
        await until(lambda: ("bob", 2) in done)
        assert ("jane", 2) not in done
        gates["jane"].set()
        for run in runs:
            await run
    assert [cart for email, cart in done if email == "jane"] == [1, 2, 3]


@pytest.mark.parametrize("fails", [lambda n: 1 / 0, lambda n: n.missing, lambda: 1, lambda n: object(), lambda n: [n]])
@on_loop
async def test_a_run_whose_key_function_fails_is_refused(fails):
    @workflow(limit=durable.limit("keyed", concurrency=1), key=fails)
    async def order(n):
        done.append(n)

    async with runtime() as process:
        with pytest.raises((ValueError, TypeError)) as raised:
            order.start(7, id="1")
        assert "order.start(...): its key function" in str(raised.value)
        assert "nothing was started" in str(raised.value)
        assert "\n" not in str(raised.value)
        assert durable.runs() == []
        assert not process._store.journal.scan("waiting/")


@on_loop
async def test_a_pending_run_is_cancelled_and_never_begins():
    limit = durable.limit("orders", concurrency=1)
    gates["open"] = asyncio.Event()

    @workflow(limit=limit)
    async def order(n):
        done.append(n)
        await durable.run("wait", gates["open"].wait)

    async with runtime() as process:
        first, second, third = (order.start(n, id=f"{n}") for n in range(3))
        await until(lambda: done == [0])
        second.cancel("changed my mind")
        with pytest.raises(RunCancelled, match="changed my mind"):
            await second
        gates["open"].set()
        await first
        await third
        await until(lambda: not process._store.journal.scan("shares/") + process._store.journal.scan("waiting/"))
    assert done == [0, 2]


@on_loop
async def test_the_time_that_a_run_is_pending_counts_for_its_time_out():
    limit = durable.limit("orders", concurrency=1)

    @workflow(limit=limit)
    async def long(n):
        await durable.sleep("a while", "3h")

    @workflow(limit=limit, timeout="1h")
    async def short(n):
        done.append(n)

    async with runtime() as process:
        first, second = long.start(1, id="1"), short.start(2, id="2")
        with pytest.raises(durable.RunTimeout):
            await second
        await first
        assert (second.status, done) == ("failed", [])
        await until(lambda: not process._store.journal.scan("shares/") + process._store.journal.scan("waiting/"))


@on_loop
async def test_a_run_that_goes_on_stands_where_it_was_started():
    """And a dead process's shares are free at once."""
    limit, store, clock = durable.limit("orders", concurrency=1), MemoryStore(), FakeClock()
    gates["open"] = asyncio.Event()

    @workflow(limit=limit)
    async def order(n):
        done.append(n)
        await durable.run("wait", gates["open"].wait)

    async with runtime(store, clock=clock) as first:
        early = [order.start(n, id=f"{n}") for n in range(3)]
        await until(lambda: done == [0])
        async with runtime(store, clock=clock) as second:
            late = [order.start(n, id=f"{n}") for n in (3, 4)]
            await until(lambda: late[0]._snapshot().waits_for)
            first.use()
            assert [run.status for run in (*early, *late)] == ["running", *["pending"] * 4]
            assert {run.id for run in durable.runs(status="pending")} == {"1", "2", "3", "4"}
            assert durable.get_run("4")._snapshot().waits_for == "limit 'orders'"
            second.use()
            first.kill()
            assert [run.status for run in early] == ["interrupted"] * 3
            await until(lambda: done == [0, 3])
            for run in early[1:]:
                durable.get_run(run.id).resume()
            pool = second.engine.shared.limits._pools["orders", ""]
            await until(lambda: [waiter.run_id for waiter in pool.waiting] == ["1", "2", "4"])
            gates["open"].set()
            for n in range(1, 5):
                await durable.get_run(f"{n}")
    assert done == [0, 3, 1, 2, 4]


@on_loop
async def test_of_several_processes_never_more_hold_shares_than_there_are():
    limit, store, clock = durable.limit("orders", concurrency=3), MemoryStore(), FakeClock()

    @workflow(limit=limit)
    async def order(n):
        await durable.run("s", busy, "a")
        done.append(n)

    async with runtime(store, clock=clock) as one, runtime(store, clock=clock) as two, runtime(store, clock=clock) as three:
        runs = []
        for n in range(60):
            (one, two, three)[n % 3].use()
            runs.append(order.start(n, id=f"{n}"))
        async with asyncio.timeout(30):
            await asyncio.gather(*runs)
        for process in (one, two, three):
            process.use()
            assert Counter(run.status for run in durable.runs(workflow="order")) == {"completed": 60}
    assert most["a"] == 3
    assert sorted(n for n in done if isinstance(n, int)) == list(range(60))


# -- rates ----------------------------------------------------------------------------------------------------------------


@on_loop
async def test_a_rate_is_spaced_evenly_over_runs_processes_and_restarts():
    limit, store, clock = durable.limit("model", rate="6/min"), MemoryStore(), FakeClock()
    times = []

    async def body(n):
        times.append(clock.now().wall_s)

    @workflow
    async def three(n):
        await asyncio.gather(*(durable.run("s", durable.step(body, limit=limit), k) for k in range(3)))

    async with runtime(store, clock=clock):
        await asyncio.gather(*(three.start(n, id=f"{n}") for n in range(2)))
    async with runtime(store, clock=clock):
        await three.start(2, id="2")
    assert len(times) == 9
    assert all(math.isclose(b - a, 10.0, abs_tol=0.1) for a, b in itertools.pairwise(times)), times


@on_loop
async def test_a_rate_of_runs_and_a_limit_of_both_kinds():
    limit, clock = durable.limit("orders", concurrency=1, rate="1/h"), FakeClock()
    times = []

    @workflow(limit=limit)
    async def order(n):
        times.append(clock.now().wall_s)
        await durable.sleep("a while", "90m" if n == 0 else 0)

    async with runtime(clock=clock):
        for run in [order.start(n, id=f"{n}") for n in range(3)]:
            await run
    assert [round((t - times[0]) / 60) for t in times] == [0, 90, 150]


# -- what else ------------------------------------------------------------------------------------------------------------


@on_loop
async def test_a_journal_that_refuses_tells_whoever_waits():
    limit, store = durable.limit("model", concurrency=1), MemoryStore()
    async with runtime(store) as process:
        limits = process.engine.shared.limits
        (share,) = await limits.enter([limit], lambda _: None)
        store.journal.rows["shares/model/"] = b"damaged"
        with pytest.raises(StoreError):
            await limits.enter([limit], lambda _: None)
        share.leave()


@on_loop
async def test_a_limit_survives_pickling_and_is_no_part_of_an_identity():
    one = durable.limit("model", concurrency=8)
    again = pickle.loads(pickle.dumps(one))
    assert (again.name, again.figures) == ("model", "8 at once")
    assert hash_value(one) == hash_value(durable.limit("model", concurrency=4))


@on_loop
async def test_rows_that_say_nothing_any_more_are_outdated():
    """Of dead processes, and of keys of which nobody holds a share."""
    store, clock = MemoryStore(), FakeClock()
    gates["open"] = asyncio.Event()

    @workflow(limit=durable.limit("orders", concurrency=1, rate="1/min"), key=lambda n: n % 2)
    async def order(n):
        done.append(n)
        await durable.run("wait", gates["open"].wait)

    async with runtime(store, clock=clock) as first, runtime(store, clock=clock) as second:
        first.use()
        for n in range(4):
            order.start(n, id=f"{n}")
        await until(lambda: done == [0, 1])
        limits = second.engine.shared.limits
        assert list(limits.outdated()) == []
        first.kill()
        assert {key.split("/")[0] for key, _ in limits.outdated()} == {"waiting"}  # the rate is still to be kept
        clock.advance("1m")
        assert {key for key, _ in limits.outdated()} == {
            key for p in ("waiting/", "shares/") for key, _ in store.journal.scan(p)
        }
