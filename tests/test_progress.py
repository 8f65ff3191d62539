"""How far a step has come: shown while it runs, on disk within a second, and given to the next attempt."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from kernels import kernel

import durable_nb as durable
from durable_nb import _current
from durable_nb._engine.heartbeats import _SHOWN_S, _WRITTEN_S
from durable_nb._facts import Progress
from durable_nb._view import state
from durable_nb._view.static import text
from durable_nb.errors import UnserializableError
from durable_nb.testing import FakeClock, MemoryStore, redefine, runtime

WORKER = Path(__file__).with_name("progress_worker.py")

given: list[Progress | None] = []
"""What attempts were given."""


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    before = dict(_current.workflow_functions)
    given.clear()
    yield
    _current.use_engine(None)
    _current.workflow_functions.clear()
    _current.workflow_functions.update(before)


def on_loop(test):
    @functools.wraps(test)
    def ran(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return ran


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.002)


def workflow_of(body, **options):
    redefine("job")

    @durable.workflow(name="job")
    async def job():
        return await durable.run("train", durable.step(body, **options))

    return job


def rows_of(process):
    return process._store.journal.scan("progress/")


@pytest.mark.parametrize("in_thread", [False, True])
@on_loop
async def test_an_attempt_is_given_what_the_one_before_has_reported_last(in_thread):
    seen = []

    def attempt():
        given.append(durable.last_progress())
        number = len(given)
        seen.append(number)
        durable.progress(number, 10, note=f"attempt {number}", weights=seen)
        durable.progress(number + 0.5, 10, note=f"attempt {number}", weights=seen)
        seen.append("changed after it was reported")
        assert durable.last_progress() == given[-1]
        if number < 3:
            raise ConnectionError("again")
        return number

    async def on_the_loop():
        return attempt()

    job = workflow_of(attempt if in_thread else on_the_loop)
    async with runtime() as process:
        assert await job.start(id="1") == 3
        await until(lambda: not rows_of(process))
    changed = "changed after it was reported"
    assert given == [
        None,
        Progress(1.5, 10, "attempt 1", {"weights": [1]}),
        Progress(2.5, 10, "attempt 2", {"weights": [1, changed, 2]}),
    ]


@pytest.mark.parametrize("crash", ["kill", "fail"])
@on_loop
async def test_another_process_goes_on_from_the_checkpoint(crash):
    store, clock, reported = MemoryStore(), FakeClock(), asyncio.Event()

    async def train():
        given.append(durable.last_progress())
        if len(given) > 1:
            return "done"
        durable.progress(3, 10, "epoch", weights=np.arange(3))
        reported.set()
        if crash == "fail":
            raise ValueError("broken")
        return await asyncio.Event().wait()

    job = workflow_of(train)
    async with runtime(store, clock=clock) as first:
        run = job.start(id="1")
        await reported.wait()
        if crash == "kill":
            await until(lambda: rows_of(first) and first._store.journal.scan("log/"))
            first.kill()
        else:
            with pytest.raises(ValueError, match="broken"):
                await run
            await until(lambda: rows_of(first))
    async with runtime(store, clock=clock) as second:
        if crash == "kill":
            (step,) = durable.get_run("1").steps
            assert (step.progress.done, step.progress.total, step.progress.note) == (3, 10, "epoch")
        assert await durable.get_run("1").resume() == "done"
        await until(lambda: not rows_of(second))
    assert (given[0], given[1].done, list(given[1].state["weights"])) == (None, 3, [0, 1, 2])


@on_loop
async def test_a_run_that_begins_anew_has_no_checkpoint():
    async def train():
        given.append(durable.last_progress())
        durable.progress(1)
        if len(given) == 1:
            raise ValueError("broken")

    job = workflow_of(train)
    async with runtime():
        run = job.start(id="1")
        with pytest.raises(ValueError, match="broken"):
            await run
        await job.start(id="1", on_conflict="restart")
        await job.start(id="2")
    assert given == [None, None, None]


@on_loop
async def test_what_is_reported_is_on_disk_within_a_second_though_the_loop_is_held(tmp_path):
    found = []

    async def train():
        journal = process._store.journal
        for n in range(3):
            durable.progress(n, 3)
            deadline = time.monotonic() + 10
            began = time.monotonic()
            while not (rows := journal.scan("progress/")) or rows in found:
                assert time.monotonic() < deadline
                time.sleep(0.01)  # noqa: ASYNC251  so it holds the loop
            found.append(rows)
            took.append(time.monotonic() - began)

    took = []
    job = workflow_of(train)
    async with runtime(tmp_path / "store") as process:
        await job.start(id="1")
    assert len(found) == 3
    assert min(took) >= _WRITTEN_S * 0.9  # not each by itself
    assert _WRITTEN_S < 0.6


@on_loop
async def test_the_view_shows_a_bar_and_a_note_at_most_four_times_a_second():
    began, told, go_on = threading.Event(), [], threading.Event()

    def train():
        began.wait()
        end = time.monotonic() + 3 * _SHOWN_S
        n = 0
        while time.monotonic() < end:
            n += 1
            durable.progress(n, 1000, note=f"batch {n}")
            time.sleep(0.001)
        durable.progress(999, 1000, note="nearly")
        go_on.wait()

    job = workflow_of(train)
    async with runtime() as process:
        run = job.start(id="1")
        await until(lambda: run.steps and run.steps[0].status == "running")

        def observed(_):
            step = run.steps[0]
            if step.progress is not None and (not told or told[-1] != step.progress):
                told.append(step.progress)

        process._workflows.observers_of("1").subscribe(observed)
        began.set()
        await until(lambda: told and told[-1].note == "nearly")
        source = state.Source(run._snapshot)
        (row,) = state.whole(source, state.Look(), version=1, now=time.time())["rows"]
        assert (row["progress"], row["note"]) == ([999, 1000], "nearly")
        assert "train · 999 of 1,000 · nearly" in text(run._snapshot())
        go_on.set()
        await run
        assert run.steps[0].progress is None
    assert 2 <= len(told) <= 7


@on_loop
async def test_many_reports_cost_few_commits(tmp_path):
    async def train():
        for n in range(2000):
            durable.progress(n)

    commits = []
    job = workflow_of(train)
    async with runtime(tmp_path / "store") as process:
        apply = process._journal.apply
        process._journal.apply = lambda group: commits.extend(group) or apply(group)
        await job.start(id="1")
    assert sum(key.startswith("progress/") for commit in commits for key, _ in commit.puts) <= 3


@pytest.mark.parametrize(
    ("report", "error", "said"),
    [
        (lambda: durable.progress("3"), TypeError, "done='3' is not a number"),
        (lambda: durable.progress(True), TypeError, "done=True is not a number"),
        (lambda: durable.progress(float("nan")), ValueError, "done=nan; write a finite number"),
        (lambda: durable.progress(-1), ValueError, "done=-1"),
        (lambda: durable.progress(1, float("inf")), ValueError, "total=inf"),
        (lambda: durable.progress(1, 2, 3), TypeError, "note=3 is not text"),
        (lambda: durable.progress(1, lock=threading.Lock()), UnserializableError, "lock=... is a lock that can't be stored"),
        (lambda: durable.progress(1, big=b"x" * (1 << 25)), UnserializableError, "and may have 16,777,216"),
    ],
)
@on_loop
async def test_what_can_not_be_reported_is_told_and_what_was_before_stands(report, error, said):
    attempts = []

    async def train():
        attempts.append(durable.last_progress())
        if len(attempts) == 2:
            return
        durable.progress(np.int64(2), np.float64(4.0), good=1)
        with pytest.raises(error, match=r"durable.progress\(\) in step 'train'") as raised:
            report()
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)
        raise ConnectionError("again")

    job = workflow_of(train)
    async with runtime():
        await job.start(id="1")
    assert attempts == [None, Progress(2, 4.0, "", {"good": 1})]


@on_loop
async def test_outside_a_step_it_does_nothing_or_says_where_it_belongs():
    @durable.step
    async def train():
        durable.progress(1, 2)
        return durable.last_progress()

    assert durable.progress(1) is None
    assert durable.last_progress() is None
    assert await train() is None  # a plain call
    redefine("job")

    @durable.workflow
    async def job(what):
        what()

    async with runtime():
        for n, what in enumerate((lambda: durable.progress(1), durable.last_progress)):
            with pytest.raises(LookupError, match="belongs in the body of a step"):
                await job.start(what, id=f"{n}")


def test_a_step_that_was_killed_goes_on_from_its_own_checkpoint(tmp_path):
    """A real process, a plain function's thread."""
    command = [sys.executable, str(WORKER), str(tmp_path / "store"), str(tmp_path / "log")]
    environment = {**os.environ, "DURABLE_NB_KEY_FILE": str(tmp_path / "signing.key")}
    first = subprocess.Popen(command, env=environment)
    log, deadline = tmp_path / "log", time.monotonic() + 60
    try:
        while not log.exists() or len(log.read_text().split()) < 30:
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.01)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    lines = [line.split(":") for line in log.read_text().split()]
    done, killed_at = int(lines[-1][0]), float(lines[-1][1])
    safe = max(int(n) for n, at in lines if float(at) <= killed_at - 1.0)
    subprocess.run([*command, "finish"], env=environment, check=True, timeout=60)
    last = log.read_text().split()[-1]
    assert last.startswith("from=")
    assert safe <= int(last[len("from=") :]) <= done + 1


LONG = """\
%%durable training
import time
limit = durable.limit("gpu", concurrency=1)

def train(epochs):
    before = durable.last_progress()
    begun = before.state["epoch"] if before is not None else 0
    with open("begun", "a") as file:
        file.write(f"{begun}\\n")
    for epoch in range(begun, epochs):
        durable.progress(epoch, epochs, note="training", epoch=epoch)
        with open("epochs", "a") as file:
            file.write(f"{epoch}\\n")
        time.sleep(0.05)
        if epoch == 60 and begun < 60:
            raise ValueError("not enough memory")
    return begun

begun = await durable.run("train", durable.step(train, limit=limit), 70)
"""


@pytest.mark.kernel
def test_in_a_kernel_that_was_killed_a_cells_step_goes_on_from_its_checkpoint(tmp_path):
    """And from where it failed for good, or was interrupted; once the cell has completed nothing is left of it."""
    with kernel(tmp_path) as k:
        k.send(LONG)
        k.wait_until(tmp_path / "epochs", 30)
        k.kill()
        reached = len((tmp_path / "epochs").read_text().splitlines())

        shown = k.run(LONG)
        assert "ValueError: not enough memory" in shown.error
        second = int((tmp_path / "begun").read_text().splitlines()[1])
        assert reached - 22 <= second <= reached  # a second is twenty epochs
        assert any("of 70 · training" in view["text/plain"] for view in shown.views)

        k.restart()
        (tmp_path / "epochs").unlink()
        asked = k.send(LONG)
        k.wait_until(tmp_path / "epochs", 2)
        k.interrupt()
        k.wait(asked)
        third = k.run(LONG)
        assert third.status == "ok", third.traceback
        begun = [int(line) for line in (tmp_path / "begun").read_text().splitlines()]
        assert begun[:3] == [0, second, 60]
        assert k.value("begun") == begun[-1] >= 60
        assert k.value("durable.get_run('training').steps[0].progress") is None
        assert k.value("limit.name") == "gpu"

        k.restart()
        restored = k.run(LONG)
        assert "restored" in restored.told[-1], restored.told
        assert k.value("(limit.figures, begun)") == ("1 at once", begun[-1])
