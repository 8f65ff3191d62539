"""What a workflow's run can do, in real kernels: children of cells, results for synchronous code, and what a kill leaves."""

from __future__ import annotations

import time
from textwrap import dedent

import pytest
from kernels import kernel

pytestmark = pytest.mark.kernel

DEFINE = dedent("""
    import asyncio, os, pathlib

    def note(what):
        with open("ledger", "a") as ledger:
            ledger.write(f"{what} {os.getpid()}\\n")
        return what

    async def held(name):
        note(name)
        while not pathlib.Path("gate").exists():
            await asyncio.sleep(0.01)
        return name

    @durable.workflow
    async def child(what):
        await durable.run("paid", note, f"paid {what}")
        durable.report(stage="paid")
        try:
            await durable.run("held", held, f"held {what}")
        finally:
            await durable.run("tidy", note, f"tidy {what}")
        return what.upper()

    failing = True

    @durable.workflow
    async def sometimes(what):
        await durable.run("before", note, f"before {what}")
        def broken():
            if not pathlib.Path("fixed").exists():
                raise ConnectionError("down")
            return "up"
        return await durable.run("broken", durable.step(broken, retries=0))
""")
CELL = "%%durable parent\nfirst = await durable.run('first', note, 'first')\ngot = await durable.invoke('kid', child, 'a')"


def ledger(folder):
    path = folder / "ledger"
    return [line.rpartition(" ")[0] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, what, timeout=30):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def test_a_cell_invokes_a_child_which_a_killed_cell_attaches_to_again(tmp_path):
    with kernel(tmp_path) as k:
        k.run(DEFINE)
        k.send(CELL)
        wait_for(lambda: "held a" in ledger(tmp_path), "the child's step")
        k.kill()
        k.run(DEFINE)
        (tmp_path / "gate").touch()
        assert k.run(CELL).status == "ok"
        assert k.value("got") == "A"
        assert [what for what in ledger(tmp_path) if "held" not in what] == ["first", "paid a", "tidy a"]
        assert k.value("[run.status.value for run in durable.runs(workflow='child')]") == ["completed"]
        steps = "[step.path for step in durable.get_run('parent').steps]"
        assert k.value(steps) == ["first", "kid", "kid/paid", "kid/held", "kid/tidy"]
        assert k.value("durable.runs(workflow='child')[0].facts") == {"stage": "paid"}
        done = ledger(tmp_path)
        assert k.run(CELL + "\n").status == "ok"  # restored
        k.run(CELL.replace("'a')", "'a')\nmore = 1"))  # edited around it
        assert k.value("(got, more)") == ("A", 1)
        assert ledger(tmp_path) == done
        assert k.run(CELL.replace("'a')", "'b')")).status == "ok"  # something else is asked of it
        assert k.value("got") == "B"
        assert k.value("len(durable.runs(workflow='child'))") == 2


def test_a_child_that_failed_is_resumed_by_executing_the_cell_again_and_an_interrupt_leaves_it_be(tmp_path):
    cell = "%%durable parent\nwhat = durable.current_run().id\ngot = await durable.invoke('kid', sometimes, 'a')"
    with kernel(tmp_path) as k:
        k.run(DEFINE)
        shown = k.run(cell)
        assert shown.error == "ConnectionError: down"
        assert "invoked as 'kid'" in shown.traceback
        (tmp_path / "fixed").touch()
        assert k.run(cell).status == "ok"
        assert k.value("got") == "up"
        assert ledger(tmp_path) == ["before a"]
        assert k.value("durable.get_run(what).status.value") == "completed"
        message = k.send(CELL)
        wait_for(lambda: "held a" in ledger(tmp_path), "the child's step")
        k.interrupt()
        assert k.wait(message).error.startswith("KeyboardInterrupt")
        assert k.value("durable.runs(workflow='child')[0].status.value") == "running"
        (tmp_path / "gate").touch()
        assert k.run(CELL).status == "ok"
        assert ledger(tmp_path).count("held a") == 1
        assert k.value("len(durable.runs(workflow='child'))") == 1


def test_cancelling_a_cells_run_cancels_the_child_that_it_invoked(tmp_path):
    with kernel(tmp_path) as k, kernel(tmp_path) as other:
        k.run(DEFINE)
        message = k.send(CELL)
        wait_for(lambda: "held a" in ledger(tmp_path), "the child's step")
        other.run("durable.get_run('parent').cancel('enough')")
        assert "RunCancelled" in k.wait(message).error
        wait_for(lambda: "tidy a" in ledger(tmp_path), "the child to tidy up")
        wait_for(lambda: other.value("durable.runs(workflow='child')[0].status.value") == "cancelled", "its end")


def test_synchronous_code_of_a_cell_waits_for_results_and_starts_many_runs(tmp_path):
    (tmp_path / "gate").touch()
    with kernel(tmp_path) as k:
        k.run(DEFINE)
        assert k.run("run = child.start('x', id='x')\nprint(run.result())").stdout == "X\n"
        assert k.run("print(child.start('y', delay=0.3).result('20s'))").stdout == "Y\n"
        shown = k.run("child.start('z', delay=60, id='z').result(timeout=0.1)")
        assert shown.error.startswith("TimeoutError: the run 'z' is pending after")
        shown = k.run("durable.get_run('z').cancel()\ndurable.get_run('z').result()")
        assert shown.error.startswith("RunCancelled")
        assert k.run(
            "def inner():\n    return [run.result() for run in child.start_many([('p',), ('q',)])]\nprint(inner())"
        ).stdout == ("['P', 'Q']\n")
        assert k.run("%%durable many\nruns = child.start_many([('p',), ('q',), ('q',)])").status == "ok"
        many = k.value("[run.id for run in runs]")
        assert len(set(many)) == 3
        k.run("%%durable --rerun many\nruns = child.start_many([('p',), ('q',), ('q',)])")
        again = k.value("[run.id for run in runs]")
        assert not set(again) & set(many), "begun anew"
        shown = k.run(
            "%%durable reports\ndurable.report(rows=3)\nmine = durable.current_run()\nawait durable.run('a', note, 'a')"
        )
        assert shown.status == "ok", shown.traceback
        assert k.value("mine.facts") == {"rows": 3}
        assert k.run("durable.report(a=1)").error.startswith("NotInRunError")
        shown = k.run("import time\n@durable.workflow\nasync def bad():\n    return time.time()")
        assert shown.stderr.count("durable.now()") == 1
        shown = k.run("@durable.workflow\nasync def worse(id): ...")
        assert "parameter 'id'" in shown.error
        shown = k.run(
            "@durable.workflow\nasync def lock():\n    import threading\n    return threading.Lock()\nlock.start().result()"
        )
        assert "UnserializableError" in shown.error
        assert "lock" in shown.error


def test_a_delayed_run_is_listed_with_its_wake_time_and_waits_in_the_next_kernel(tmp_path):
    (tmp_path / "gate").touch()
    with kernel(tmp_path) as k:
        k.run(DEFINE)
        began = time.monotonic()
        k.run("run = child.start('later', id='later', delay='6s')\nlong = child.start('long', id='long', delay='1h')")
        shown = k.run("%durable runs")
        assert "pending" in f"{shown.displays} {shown.stdout} {shown.result} {shown.told}"
        k.kill()
        shown = k.run("%durable show long")
        told = f"{shown.displays} {shown.stdout} {shown.result} {shown.told}"
        assert "next wake" in told
        assert "no process is running this" in told
        k.run(DEFINE)
        k.run("durable.resume()")
        assert k.run("print(durable.get_run('later').result())").stdout == "LATER\n"
        assert k.value("durable.get_run('long').status.value") == "pending"
        assert time.monotonic() - began >= 6
