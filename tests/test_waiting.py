"""Cells that wait for the outside, in real kernels: answered from another process while the kernel is idle, busy or dead."""

from __future__ import annotations

import contextlib
import time

import nbformat
import papermill
import pytest
from kernels import LOAD, kernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import durable_nb as durable
from durable_nb import _current
from durable_nb._engine import Engine
from durable_nb._engine.workflows import Workflows
from durable_nb._store import Store
from durable_nb.errors import DurableError

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def _one_key(tmp_path, monkeypatch):
    """Kernels and this process sign alike."""
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    monkeypatch.delenv("DURABLE_NB_APPROVALS", raising=False)
    monkeypatch.delenv("DURABLE_NB_MAX_WAIT", raising=False)


@contextlib.contextmanager
def outside(folder):
    """This process, on the kernel's store: another process than the kernel's."""
    store = Store(folder / ".durable_nb")
    workflows = Workflows(Engine(store))
    _current.use_engine(lambda: workflows)
    try:
        yield
    finally:
        _current.use_engine(None)
        store.close()


def waits(run, status="waiting", timeout=30):
    """Wait until a step of the cell has that status."""
    deadline = time.monotonic() + timeout
    while True:
        with contextlib.suppress(LookupError):
            if any(step.status == status for step in durable.get_run(run).steps):
                return
        assert time.monotonic() < deadline, f"no step of {run} was {status} after {timeout} s"
        time.sleep(0.02)


def lines(path):
    return path.read_text().split() if path.exists() else []


ASKS = """%%durable publish
n = await durable.run('count', lambda: open('counted', 'a').write('x\\n'))
decision = await durable.approve('ok', f'publish {amount}?', timeout='1h')
await durable.run('publish', lambda: open('published', 'a').write('x\\n'))
decision.comment"""


def test_a_pending_approval_outlives_restarts_and_goes_on_into_the_later_cells(tmp_path):
    """Interrupted, killed, run again with the cells after it: the question comes again with its first deadline, and is answered
    from another process while the kernel waits."""  # fmt: skip
    with kernel(tmp_path) as k, outside(tmp_path):
        k.run("amount = 1")
        first = k.send(ASKS)
        waits("publish")
        until = durable.get_run("publish").steps[-1].wake_at
        k.interrupt()
        stopped = k.wait(first)
        assert stopped.error.startswith("KeyboardInterrupt: cell 'publish' was interrupted")
        k.kill()
        k.run("amount = 1")
        asking, later = k.send(ASKS), k.send("%%durable later\nafter = decision.approved")
        waits("publish")
        assert durable.get_run("publish").steps[-1].wake_at == pytest.approx(until, abs=0.5)
        durable.get_run("publish").approve("ok", comment="fine")
        with pytest.raises(DurableError, match=r"was approved by|is completed"):
            durable.get_run("publish").approve("ok", approved=False)
        shown = k.wait(asking)
        assert (shown.status, shown.result) == ("ok", "'fine'"), shown.traceback
        assert k.wait(later).status == "ok"
        assert k.value("after") is True
        assert (lines(tmp_path / "counted"), lines(tmp_path / "published")) == (["x"], ["x"])
        k.restart()
        k.run("amount = 1")
        assert "restored" in k.run(ASKS).told[-1]
        assert lines(tmp_path / "published") == ["x"]


def test_an_edit_keeps_an_approval_and_other_inputs_let_it_lapse(tmp_path):
    """What was approved is what the cell reads; another amount is another question, and one line says so."""
    fails = ASKS.replace("await durable.run('publish'", "1 / 0\nawait durable.run('publish'")
    with kernel(tmp_path) as k, outside(tmp_path):
        k.run("amount = 1")
        asking = k.send(fails)
        waits("publish")
        durable.get_run("publish").approve("ok")
        assert "ZeroDivisionError" in k.wait(asking).error
        assert k.run(ASKS.replace("decision.comment", "amount, decision.approved"), timeout=20).result == "(1, True)"
        # The cell has completed: what it is given next is to be approved anew.
        k.run("amount = 2")
        asking = k.send(fails)
        waits("publish")
        durable.get_run("publish").approve("ok")
        assert "ZeroDivisionError" in k.wait(asking).error
        k.run("amount = 3")
        asking = k.send(ASKS)
        waits("publish")
        assert durable.get_run("publish").steps[-1].prompt == "publish 3?"
        durable.get_run("publish").approve("ok", approved=False, comment="not 3")
        assert k.wait(asking).result == "'not 3'"


def test_events_reach_a_cell_whose_kernel_is_idle_busy_or_dead(tmp_path):
    """Each once, in the order of sending; a finished cell is restored, and what it sent is not sent again."""
    hears = """%%durable hears
import time
async def block():
    await durable.run('begun', lambda: open('begun', 'a').write('x\\n'))
    time.sleep(1.5)
first, _ = await asyncio.gather(durable.wait_for_event('first', 'go'), block())
second = await durable.wait_for_event('second', 'go')
third = await durable.wait_for_event('third', 'go')
durable.notify('heard', [first.data, second.data, third.data])
first.data, second.data, third.data"""
    with kernel(tmp_path) as k, outside(tmp_path):
        k.run("import asyncio")
        cell = k.send(hears)
        k.wait_until(tmp_path / "begun")
        assert len(durable.waiters("go")) == 1
        durable.notify("go", "while it is busy")
        waits("hears", "completed")
        deadline = time.monotonic() + 30
        while [waiter.step for waiter in durable.waiters("go")] != ["second"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        durable.notify("go", {"while": "it waits"})
        while [waiter.step for waiter in durable.waiters("go")] != ["third"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        k.kill()
        run_id = durable.waiters("go")[0].run_id
        assert durable.notify("go", 3).run_ids == (run_id,)
        assert durable.notify("go", 4, run_id="hears").buffered is False
        k.run("import asyncio")
        shown = k.wait(k.send(hears))
        assert shown.result == "('while it is busy', {'while': 'it waits'}, 3)", (shown.error, shown.traceback)
        assert lines(tmp_path / "begun") == ["x"]
        assert cell
        k.restart()
        k.run("import asyncio")
        assert "restored" in k.run(hears).told[-1]
        assert sum(1 for _ in _current.engine()._store.journal.scan("event/heard/")) == 1
        with pytest.raises(DurableError, match=r"'hears' is completed.*was not sent"):
            durable.notify("go", 5, run_id="hears")


def test_a_cell_waits_no_longer_than_it_is_told(tmp_path, monkeypatch):
    """`--max-wait`, `DURABLE_NB_MAX_WAIT` and the policy `suspend`: RunSuspended names what it waits for and until when."""
    with kernel(tmp_path) as k, outside(tmp_path):
        k.run("amount = 1")
        shown = k.run(ASKS.replace("%%durable publish", "%%durable publish --max-wait 0.5s"))
        assert shown.error.startswith("RunSuspended: cell 'publish' waits for approval ok until "), shown
        assert "run this cell again" in shown.error
        assert len(shown.traceback.splitlines()) == 1
        k.run("import os; os.environ['DURABLE_NB_MAX_WAIT'] = '0.5s'")
        assert k.run(ASKS).error == shown.error
        k.run("os.environ['DURABLE_NB_MAX_WAIT'] = 'soon'")
        assert "DURABLE_NB_MAX_WAIT: 'soon' is not a duration" in k.run(ASKS).stderr
        k.run("del os.environ['DURABLE_NB_MAX_WAIT']; os.environ['DURABLE_NB_APPROVALS'] = 'suspend'")
        assert k.run(ASKS).error == shown.error
        waiting = k.run("%%durable hears --max-wait 0\nawait durable.wait_for_event('paid', 'paid-1')")
        assert waiting.error.startswith("RunSuspended: cell 'hears' waits for event paid until ")
        k.run("os.environ['DURABLE_NB_APPROVALS'] = 'approve'")
        assert k.run(ASKS).result == "''"
        assert lines(tmp_path / "counted") == ["x"]
        durable.notify("paid-1", 7)
        told = k.run("%%durable hears --max-wait 0\nawait durable.wait_for_event('paid', 'paid-1')")
        assert told.result == "Event(data=7, timed_out=False)"


def test_the_magics_notify_and_approve(tmp_path):
    with kernel(tmp_path) as k, outside(tmp_path):
        shown = k.run('%durable notify "paid 1" {"n": [1, 2], "it": "it\'s"}')
        assert "no run waits for it" in str(shown.displays[-1] if shown.displays else shown), shown
        assert "is not JSON" in k.run("%durable notify paid {n: 1}").stderr
        k.run("amount = 1")
        k.run(ASKS, front_end=False)
        assert "no approval 'no'" in k.run("%durable approve publish no").stderr
        k.run("%durable approve publish ok --reject --comment='not today'")
        assert "was rejected by" in k.run("%durable approve publish ok").stderr
        assert k.run(ASKS).result == "'not today'"


ORDER = """@durable.workflow
async def order(item):
    decision = await durable.approve('ship', f'ship {item}?')
    await durable.run('ship', lambda: open('shipped', 'a').write('x\\n'))
    payment = await durable.wait_for_event('payment', 'paid-1')
    return decision.comment, payment.data"""


def test_a_workflow_hears_between_cells_and_when_it_is_resumed(tmp_path):
    """Decided from another process while its kernel idles; the event is sent while the kernel is dead."""
    with kernel(tmp_path) as k, outside(tmp_path):
        assert k.run(f"{ORDER}\nrun = order.start('a book', id='o1')").status == "ok"
        waits("o1")
        durable.get_run("o1").approve("ship", comment="by air")
        deadline = time.monotonic() + 30
        while not durable.waiters("paid-1"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        k.kill()
        assert durable.get_run("o1").status == "interrupted"
        assert durable.notify("paid-1", {"amount": 12.5}).run_ids == ("o1",)
        assert k.run(f"{ORDER}\n[run] = durable.resume()\nawait run").result == "('by air', {'amount': 12.5})"
        assert lines(tmp_path / "shipped") == ["x"]
        with pytest.raises(DurableError, match=r"'o1' is completed.*was not sent"):
            durable.get_run("o1").notify("paid-1", 1)


def answered(k, source, *answers, **options):
    """Execute a cell, and answer its questions; the prompts, and what it showed."""
    message, prompts = k.send(source, **options), []
    for answer in answers:
        asked = k.client.get_stdin_msg(timeout=30)["content"]
        prompts.append(asked["prompt"])
        k.client.input(answer)
    return prompts, k.wait(message)


def test_the_answer_to_input_is_recorded_and_getpass_asks_every_time(tmp_path):
    """A killed kernel doesn't ask again; another prompt is another question; the cell is restored, headless too."""
    asks = "%%durable asks\nname = input('Name? ')\nother = input('Name? ')\n"
    asks += "town = input('Town? ')\n1 / divisor, name, other, town"
    secret = "%%durable secret\nfrom getpass import getpass\nlength = len(getpass('Key? '))\nlength"
    with kernel(tmp_path) as k:
        k.run("divisor = 0")
        cell = k.send(asks)
        assert k.client.get_stdin_msg(timeout=30)["content"]["prompt"] == "Name? "
        k.client.input("jane")
        assert k.client.get_stdin_msg(timeout=30)["content"]["prompt"] == "Name? "
        assert cell
        k.kill()
        k.run("divisor = 0")
        prompts, shown = answered(k, asks, "joe", "york")
        assert prompts == ["Name? ", "Town? "]
        assert "ZeroDivisionError" in shown.error
        k.run("divisor = 1")
        prompts, shown = answered(k, asks)
        assert shown.result == "(1.0, 'jane', 'joe', 'york')"
        k.restart()
        k.run("divisor = 1")
        assert k.run(asks, front_end=False).result == shown.result
        assert "restored" in k.run(asks).told[-1]
        prompts, shown = answered(k, asks.replace("Town", "Which town"), "leeds")
        assert (prompts, shown.result) == (["Which town? "], "(1.0, 'jane', 'joe', 'leeds')")
        prompts, shown = answered(k, asks.replace("asks", "asks --rerun", 1), "a", "b", "c")
        assert shown.result == "(1.0, 'a', 'b', 'c')"
        for key in ("secret", "longer secret"):
            prompts, shown = answered(k, secret, key)
            assert (prompts, shown.result) == (["Key? "], str(len(key)))
            assert "not stored: it calls getpass(), which asks at every execution" in shown.told[-1]
        prompts, shown = answered(k, "%%durable step\nawait durable.run('ask', lambda: input('In a step? '))", "yes")
        assert shown.result == "'yes'"


def _notebook(folder, name):
    cells = [LOAD, "amount = 1", ASKS, "open('later', 'a').write('x\\n')"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, folder / name)
    return folder / name


@pytest.mark.parametrize("how", ["nbclient", "papermill"])
def test_headless_the_notebook_ends_at_the_pending_approval_and_the_next_run_goes_through(tmp_path, how, monkeypatch):
    """With a clear message; nothing that was done is done again."""
    path = _notebook(tmp_path, "report.ipynb")

    def execute():
        if how == "papermill":
            papermill.execute_notebook(
                str(path), str(tmp_path / "out.ipynb"), cwd=str(tmp_path), progress_bar=False, kernel_name="python3"
            )
        else:
            NotebookClient(nbformat.read(path, 4), resources={"metadata": {"path": str(tmp_path)}}, timeout=60).execute()

    errors = CellExecutionError if how == "nbclient" else papermill.exceptions.PapermillExecutionError
    with outside(tmp_path):
        for _ in range(2):
            with pytest.raises(errors, match="RunSuspended") as raised:
                execute()
            assert "waits for approval ok until" in str(raised.value)
        assert lines(tmp_path / "later") == []
        durable.get_run("publish").approve("ok", comment="fine")
        for _ in range(2):
            execute()
        assert [lines(tmp_path / name) for name in ("counted", "published", "later")] == [["x"], ["x"], ["x", "x"]]


SLOW = """%%durable slow --background
n = await durable.run('count', lambda: open('counted', 'a').write('x\\n'))
await durable.wait_for_event('gate', 'go')
def scaled(k):
    return helper(k) + factor
total, other = helper(10), 5
print('done')"""
BEFORE = "factor = 2\ndef helper(k): return k * factor"


def test_a_background_cell_works_on_a_snapshot_and_is_bound_between_cells(tmp_path):
    """Names rebound since stay; a durable cell that reads a pending name waits for it; killed, it resumes; completed, it is
    restored."""  # fmt: skip
    with kernel(tmp_path) as k, outside(tmp_path):
        k.run(BEFORE)
        began = k.run(SLOW)
        assert (began.status, began.stdout) == ("ok", "")
        waits("slow")
        assert k.run("factor, other = 100, 7\n'total' in globals()").result == "False"
        clash = k.run("%%durable clash --background\nother = 3")
        assert (
            "the cell 'slow' binds other, too, and is being executed in the background already; nothing was run" in clash.stderr
        )
        assert "this cell, 'slow', is being executed in the background already" in k.run(SLOW).stderr, "with another factor"
        assert k.run("factor = 2").status == "ok"
        assert k.run(SLOW).told == ["slow · running: in the background already"]
        chained = k.run("%%durable chained --background\nchain = total + 1")
        assert (chained.status, k.value("'chain' in globals()")) == ("ok", False), "it waits in the background"
        k.run("factor = 100")
        reads = k.send("%%durable reads\ndouble = total * 2\ndouble, scaled(1)")
        k.wait_for_text(reads, "waiting: scaled, total comes from the cell 'slow' in the background")
        durable.notify("go")
        shown = k.wait(reads)
        assert shown.result == "(40, 200)", "what the cell computed is of the snapshot, what it defined reads the notebook"
        assert k.value("total, other, factor") == (20, 7, 100)
        assert k.run("%%durable links\nchain").result == "21"
        k.restart()
        k.run(BEFORE)
        assert lines(tmp_path / "counted") == ["x"]
        restored = k.run(SLOW)
        assert "restored" in restored.told[-1]
        assert restored.stdout == "done\n"
        assert k.value("total, other, scaled(1)") == (20, 5, 4)
        # Killed half-way, it goes on after its last step.
        edited = SLOW.replace("helper(10)", "helper(11)")
        k.run(edited)
        waits("slow")
        k.kill()
        durable.notify("go")
        k.run(BEFORE)
        k.run(edited)
        assert k.run("%%durable again\ntotal").result == "22"
        assert lines(tmp_path / "counted") == ["x"]


def test_what_goes_wrong_in_a_background_cell_is_told_to_whoever_waits_for_it(tmp_path):
    with kernel(tmp_path) as k, outside(tmp_path):
        k.run(BEFORE)
        k.run(SLOW.replace("total, other = helper(10), 5", "total = 1 / 0"))
        reads = k.send("%%durable reads\ntotal + 1")
        k.wait_for_text(reads, "waiting: total comes from")
        waits("slow")
        durable.notify("go")
        said = k.wait(reads).stderr
        assert "total was to come from the cell 'slow', which ended in the background with ZeroDivisionError" in said
        assert "nothing was run. Run that cell again first" in said
        assert "NameError" in k.run("total").error
        k.run(SLOW)  # the event that it has got is kept until it completes
        assert k.run("%%durable reads\ntotal + 1").result == "21"
        k.run("factor = 3")
        k.run(SLOW)
        k.interrupt()
        stopped = k.send("%%durable waits\ntotal + 2")
        k.wait_for_text(stopped, "waiting: total comes from")
        k.interrupt()
        assert "interrupted before it began" in k.wait(stopped).error
        waits("slow")
        durable.notify("go")
        assert k.run("%%durable waits\ntotal + 2").result == "32", "the interrupt was for the cell in front"
