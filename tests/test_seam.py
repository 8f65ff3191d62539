"""The seam between verbs and engines: one corpus of workflows, two engines, and nothing to tell them apart by.

The second engine (`memory_engine`) knows the seam only, and executes every body from its portable form.
"""

from __future__ import annotations

import ast
import asyncio
import threading
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import memory_engine
import pytest
from memory_engine import MemoryEngine

import durable_nb as durable
from durable_nb import Event, _current
from durable_nb._arguments import apply, changeable, changed, difference, fingerprint_of
from durable_nb._current import StepRequest
from durable_nb._portable import execute, portable, settled
from durable_nb.errors import RunCancelled
from durable_nb.testing import FakeClock, MemoryStore, redefine, runtime

tries: list[str] = []
"""What bodies did in the outer world."""


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    before = dict(_current.workflow_functions)
    tries.clear()
    yield
    _current.use_engine(None)
    _current.workflow_functions.clear()
    _current.workflow_functions.update(before)


# -- what bodies do ------------------------------------------------------------------------------------------------------


def double(n):
    return 2 * n


async def double_later(n):
    await asyncio.sleep(0)
    return 2 * n


def flaky(what, good_from):
    tries.append(what)
    if tries.count(what) < good_from:
        raise ConnectionError(f"{what} is down")
    return f"{what} after {tries.count(what)}"


def broken(what):
    raise ValueError(f"{what} is broken")


def append(items, more):
    items.append(more)
    return items


def count(counts, *, word):
    counts[word] = counts.get(word, 0) + 1


at_work: list[object] = []


async def busy(what):
    """How many of its kind are at work."""
    kind = what if isinstance(what, str) else "number"
    at_work.append(kind)
    await asyncio.sleep(0.005)
    found = at_work.count(kind)
    at_work.remove(kind)
    return found


def long():
    before = durable.last_progress()
    tries.append(before.state["n"] if before is not None else None)
    durable.progress(len(tries), 3, n=len(tries))
    if len(tries) < 3:
        raise ConnectionError("again")
    return before.done


async def endless():
    await asyncio.Event().wait()


# -- the corpus: workflows, what they are given, and how they end --------------------------------------------------------


async def sequential(n):
    for _ in range(3):
        n = await durable.run("double", double, n)
        n = await durable.run("later", double_later, n)
    return n


async def decorated(n):
    @durable.step(name="twice")
    def inner(n):
        return n + n

    return await inner(n), await inner(n=n + 1)


async def gathered(n):
    return await asyncio.gather(*(durable.run("double", double, k) for k in range(n)))


async def grouped(n):
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(durable.run("double", double_later, k)) for k in range(n)]
    return [task.result() for task in tasks]


async def a_group_that_fails():
    async with asyncio.TaskGroup() as group:
        group.create_task(durable.run("good", double, 1))
        group.create_task(durable.run("bad", broken, "one"))


async def as_completed(n):
    return sorted([await done for done in asyncio.as_completed([durable.run("double", double, k) for k in range(n)])])


async def retried():
    policy = durable.step(flaky, retries=4, backoff=lambda attempt: 60 * attempt)
    before = durable.now()
    return await durable.run("flaky", policy, "server", 4), (durable.now() - before).total_seconds() // 60


async def retried_in_vain():
    await durable.run("flaky", durable.step(flaky, retries=2, backoff=1), "server", 9)


async def not_retried():
    await durable.run("broken", broken, "cart")


async def caught():
    try:
        await durable.run("broken", broken, "cart")
    except ValueError as error:
        return str(error), error.__notes__, await durable.run("double", double, 1)


async def timed_out():
    await durable.run("endless", durable.step(endless, retries=0, timeout=0.05))


async def sleeping():
    before = durable.now()
    await durable.sleep("a week", "7d")
    await durable.sleep_until("later", durable.now().timestamp() + 3600)
    return (durable.now() - before).days


async def changed_arguments():
    items, counts = ["a"], {}
    alias = items
    same = await durable.run("append", append, items, "b")
    await durable.run("count", count, counts, word="x")
    await durable.run("count", count, counts, word="x")
    return items, alias is items, same is items, counts


async def changed_at_once():
    mine, yours = [], []
    await asyncio.gather(durable.run("append", append, mine, 1), durable.run("append", append, yours, 2))
    return mine, yours


async def mapped(n):
    return await durable.map("double", double, range(n), concurrency=3)


async def collected():
    async def one(n):
        if n == 1:
            raise ValueError(n)
        return n

    found = await durable.map("one", one, range(3), on_error="collect")
    return [repr(item) for item in found], [getattr(item, "__notes__", None) for item in found]


async def asked(url):
    response = await durable.call("ask", f"{url}/fine", params={"q": "x"})
    refused = await durable.call("refused", f"{url}/refused", method="POST", json={"a": 1}, retries=0)
    return response.status_code, response.json(), refused.status_code, refused.text


async def child(n):
    return await durable.run("double", double, n)


async def parent():
    runs = [child_of.start(n) for n in range(3)]
    same = child_of.start(7, id="mine"), child_of.start(7, id="mine")
    return [await run for run in runs], same[0].id == same[1].id, await same[0]


async def parent_of_a_failure():
    try:
        await failing_child.start()
    except ValueError as error:
        return str(error)


async def invoking():
    one = await durable.invoke("one", child_of, 1)
    return one, await asyncio.gather(*(durable.invoke("more", child_of, n) for n in range(3)))


async def invoking_a_failure():
    try:
        await durable.invoke("failing", failing_child)
    except ValueError as error:
        return str(error), len(error.__notes__)


async def recorded():
    first = durable.now(), durable.uuid4(), durable.random(), durable.patched("x")
    return (durable.now() - first[0]).days, first[1] != durable.uuid4(), 0 <= first[2] < 1, first[3]


async def hears():
    first = await durable.wait_for_event("first", "paid", timeout="1h")
    both = await asyncio.gather(*(durable.wait_for_event("both", "paid", timeout="1h") for _ in range(2)))
    return first.data, [one.data for one in both], await durable.wait_for_event("none", "paid", timeout=5)


async def decided():
    found = [await durable.approve("ok", f"{n}?", timeout="1h") for n in range(2)]
    return [(bool(one), one.comment) for one in found], (await durable.approve("late", "?", timeout=5)).timed_out


async def sends():
    sent = await durable.notify("paid", {"n": [1]})
    return sent.run_ids, sent.buffered, [(await durable.wait_for_event("e", "paid", timeout=5)).data for _ in range(2)]


async def cancelled():
    try:
        await durable.run("endless", endless)
    finally:
        await durable.run("tidy", double, 1)


async def limited(n):
    limit = durable.limit("two at a time", concurrency=2)
    step = durable.step(busy, limit=limit)
    found = await asyncio.gather(*(durable.run("busy", step, k) for k in range(n)))
    return max(found), max(await durable.map("many", busy, range(n), limit=limit))


async def limited_children():
    return [await child for child in [limited_child.start(k, k % 2) for k in range(6)]]


async def one_at_a_time(k, key):
    return await durable.run("busy", busy, f"key {key}")


async def goes_on():
    return await durable.run("long", durable.step(long, backoff=1))


async def cancelled_with_a_child():
    try:
        await durable.invoke("endless", endless_child)
    finally:
        await durable.run("tidy", double, 1)


async def too_long():
    try:
        await durable.sleep("long", "7d")
    finally:
        durable.report(stage="tidies up")
        await durable.run("tidy", double, 1)


async def not_run():
    raise LookupError("its own")


CORPUS = [
    (sequential, (1,), "completed"),
    (decorated, (3,), "completed"),
    (gathered, (9,), "completed"),
    (grouped, (5,), "completed"),
    (a_group_that_fails, (), "failed"),
    (as_completed, (6,), "completed"),
    (retried, (), "completed"),
    (retried_in_vain, (), "failed"),
    (not_retried, (), "failed"),
    (caught, (), "completed"),
    (timed_out, (), "failed"),
    (sleeping, (), "completed"),
    (changed_arguments, (), "completed"),
    (changed_at_once, (), "completed"),
    (mapped, (10,), "completed"),
    (collected, (), "completed"),
    (parent, (), "completed"),
    (parent_of_a_failure, (), "completed"),
    (invoking, (), "completed"),
    (invoking_a_failure, (), "completed"),
    (recorded, (), "completed"),
    (sends, (), "completed"),
    (limited, (7,), "completed"),
    (limited_children, (), "completed"),
    (goes_on, (), "completed"),
    (not_run, (), "failed"),
]


child_of = failing_child = limited_child = endless_child = None


def define():
    global child_of, failing_child, limited_child, endless_child
    child_of, failing_child, endless_child = redefine(child), redefine(not_retried), redefine(cancelled, name="endless")
    redefine("one_at_a_time")
    limit = durable.limit("one at a time", concurrency=1)
    limited_child = durable.workflow(limit=limit, key=lambda k, key: key)(one_at_a_time)


@asynccontextmanager
async def embedded():
    clock = FakeClock()
    async with runtime(MemoryStore(), clock=clock):
        yield clock


@asynccontextmanager
async def in_memory():
    engine = MemoryEngine(FakeClock())
    _current.use_engine(lambda: engine)
    try:
        yield engine.clock
    finally:
        _current.use_engine(None)


def said(error):
    inner = [said(one) for one in getattr(error, "exceptions", ())]
    return type(error).__name__, str(error), getattr(error, "__notes__", None), inner


async def lived(engine, function, args, meanwhile=None):
    """All that can be told of one run on that engine."""
    tries.clear()
    async with engine():
        define()
        run = redefine(function).start(*args, id="1")
        waiting = asyncio.ensure_future(run)
        if meanwhile is not None:
            await meanwhile(run)
        await asyncio.wait({waiting}, timeout=30)
        error = waiting.exception()
        found = _current.engine().snapshot("1")
        steps = [(step.path, step.kind, step.status, step.error) for step in run.steps]
        attempts = [step.attempts for step in run.steps if step.kind == "run" and step.status != "cancelled"]
        outcome = said(error) if error is not None else waiting.result()
        return outcome, run.status, found.error, steps, attempts, list(tries)


def both(function, args, meanwhile=None):
    async def main():
        return [await lived(engine, function, args, meanwhile) for engine in (embedded, in_memory)]

    one, other = asyncio.run(main())
    assert one == other
    return one


@pytest.mark.parametrize(("function", "args", "status"), CORPUS, ids=[function.__name__ for function, _, _ in CORPUS])
def test_two_engines_give_the_same_results_errors_notes_statuses_and_changed_arguments(function, args, status):
    outcome, ended, error, *_ = both(function, args)
    assert ended == status
    assert (error is not None) is (status == "failed")
    assert outcome is not None


def test_two_engines_cancel_alike():
    async def cancel(run):
        while not any(step.status == "running" for step in run.steps):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        run.cancel("enough")

    outcome, status, error, steps, *_ = both(cancelled, (), cancel)
    assert outcome[:2] == (RunCancelled.__name__, "the run '1' was cancelled: enough")
    assert status == "cancelled"
    assert "enough" in error
    assert [(name, ended) for name, _, ended, _ in steps] == [("endless", "cancelled"), ("tidy", "completed")]


def test_two_engines_cancel_children_with_their_parents():
    async def cancel(run):
        while not any(step.path == "endless/endless" and step.status == "running" for step in run.steps):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        run.cancel("enough")
        while durable.runs(workflow="endless")[0].status != "cancelled":  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    outcome, _, _, steps, *_ = both(cancelled_with_a_child, (), cancel)
    assert outcome[0] == RunCancelled.__name__
    assert [(path, status) for path, _, status, _ in steps] == [
        ("endless", "cancelled"),
        ("endless/endless", "cancelled"),
        ("endless/tidy", "completed"),
        ("tidy", "completed"),
    ]


def test_two_engines_begin_runs_later_and_many_at_once_and_end_them_in_time_alike():
    async def lived(engine):
        async with engine() as clock:
            told = []

            def on_failure(run, error):
                told.append((run.id, type(error).__name__, str(error)))

            define()
            began = clock.wall_s
            runs = child_of.start_many(
                [(1,), {"args": (2,), "id": "two", "labels": ["x"], "delay": "2h"}, {"kwargs": {"n": 3}}]
            )
            assert runs[1].status == "pending"
            values = [await run for run in runs]
            assert [run.id for run in durable.runs(label="x")] == ["two"]
            assert clock.wall_s - began >= 7200
            redefine("slow")
            slow = durable.workflow(name="slow", timeout="1h", on_failure=on_failure)(too_long).start(id="slow")
            with pytest.raises(durable.RunTimeout) as raised:
                await slow
            steps = [(step.path, step.kind, step.status) for step in slow.steps if step.name == "tidy"]
            return values, str(raised.value), slow.status, slow.facts, steps, told

    one, other = (asyncio.run(lived(engine)) for engine in (embedded, in_memory))
    assert one == other
    assert one[0] == [2, 4, 6]
    assert one[2:4] == ("failed", {"stage": "tidies up"})
    assert one[5] == [("slow", "RunTimeout", one[1])]


def test_two_engines_deliver_events_and_decisions_alike():
    async def send(run):
        for n in range(3):
            run.notify("paid", [n])

    async def decide(run):
        for n in range(2):
            while sum(step.status == "waiting" for step in run.steps) != 1 or len(run.steps) != n + 1:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            run.approve("ok", approved=bool(n), comment=str(n))

    outcome, status, _, steps, *_ = both(hears, (), send)
    assert (outcome, status) == (([0], [[1], [2]], Event(None, timed_out=True)), "completed")
    assert [kind for _, kind, *_ in steps] == ["event"] * 4
    outcome, *_ = both(decided, (), decide)
    assert outcome == ([(False, "0"), (True, "1")], True)


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self._answer(200, b'{"fine": true}')

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(422, b"not that")

    def _answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_two_engines_send_the_same_requests():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        outcome, *_ = both(asked, (f"http://127.0.0.1:{server.server_port}",))
        server.shutdown()
    assert outcome == (200, {"fine": True}, 422, "not that")


def test_runs_are_found_alike():
    async def main(engine):
        async with engine() as clock:
            define()
            for n in range(4):
                clock.advance(1)
                run = child_of.start(n, id=str(n), labels=["even"] if n % 2 == 0 else [])
                await run
            with pytest.raises(ValueError):
                await failing_child.start(id="bad")
            found = _current.engine().snapshots
            assert [run.id for run in durable.runs(label="even")] == ["2", "0"]
            assert [run.id for run in durable.runs(status="failed")] == ["bad"]
            assert [run.id for run in durable.runs(workflow="child", limit=2)] == ["3", "2"]
            assert all(run.steps == () for run in found())
            assert [len(run.steps) for run in found(workflow="child", steps=True)] == [1] * 4
            assert found(status="failed")[0].error == "ValueError: cart is broken"
            assert {run.error for run in found(status="completed")} == {None}

    for engine in (embedded, in_memory):
        asyncio.run(main(engine))


def test_the_second_engine_knows_nothing_of_the_embedded_one():
    tree = ast.parse(Path(memory_engine.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {module for module in imported if module.startswith("durable_nb")}
    assert ours == {
        *(
            "durable_nb._current",
            "durable_nb._events",
            "durable_nb._facts",
            "durable_nb._portable",
            "durable_nb._retry",
            "durable_nb.errors",
        )
    }


# -- the portable form -----------------------------------------------------------------------------------------------------


def test_a_portable_step_touches_nothing_here_until_it_is_settled():
    """What the notebook defines goes along, and what the body changes comes back as a difference."""
    items, namespace = [1], {}
    exec("def f(xs, extra):\n    xs.append(extra + offset)\n    return xs\noffset = 10", namespace)
    request = StepRequest("run", "f", namespace["f"], (items, 5))

    async def main():
        packed = portable(request)
        namespace["offset"] = 99  # sent already
        returned = await execute(packed, "key")
        assert items == [1]
        assert settled(request, returned) is items
        assert items == [1, 15]

    asyncio.run(main())


def test_a_difference_is_told_by_what_was_and_what_is():
    def of(items, table):
        return StepRequest("run", "f", append, (items, table))

    there, here = ([1], {"a": 1}), ([1], {"a": 1})
    before = fingerprint_of(of(*there))
    places, components = changeable(before), before.components
    assert changed(components, fingerprint_of(of(*there)).components) == set()
    there[0].append(2)
    labels = changed(components, fingerprint_of(of(*there)).components)
    packed = difference(places, labels, there[0])
    assert apply(packed, changeable(fingerprint_of(of(*here))), [1, 2]) is here[0]
    assert here == ([1, 2], {"a": 1})
    assert difference(places, set(), 3) is None
