"""Durable cells in real kernels: run, killed, interrupted, failed, restored."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest
from kernels import LOAD, Kernel, kernel
from nbclient import NotebookClient

pytestmark = pytest.mark.kernel

BUSY_LOOP = "import time\nt = time.monotonic()\nwhile time.monotonic() - t < 30: pass"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One kernel for the tests that don't hurt theirs."""
    with kernel(tmp_path_factory.mktemp("shared")) as started:
        yield started


@pytest.fixture
def server():
    """Counts requests by path; /flaky fails twice, /missing is never there."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("content-length") or 0)).decode()
            path = self.path.split("?")[0]
            seen.append((self.command, self.path, body, dict(self.headers)))
            n = sum(p.split("?")[0] == path for _, p, _, _ in seen)
            status = 503 if path == "/flaky" and n < 3 else 404 if path == "/missing" else 200
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("set-cookie", "session=swordfish")
            if status == 503:
                self.send_header("retry-after", "0")
            self.end_headers()
            self.wfile.write(json.dumps({"n": n, "body": body}).encode())

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    seen = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    http.url, http.seen = f"http://127.0.0.1:{http.server_port}", seen
    yield http
    http.shutdown()
    thread.join()
    http.server_close()


def plain(text: str) -> str:
    """Without a terminal's colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def wait_for_row(folder: Path, prefix: str, timeout: float = 30) -> None:
    """Until the journal holds a row whose key begins so."""
    database = folder / ".durable_nb" / "journal" / "cache.db"
    deadline = time.monotonic() + timeout
    while True:
        assert time.monotonic() < deadline, f"no row {prefix}* after {timeout} s"
        with (
            contextlib.suppress(sqlite3.OperationalError),
            contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db,
        ):
            if db.execute("SELECT 1 FROM Cache WHERE key GLOB ?", (f"{prefix}*",)).fetchone():
                return
        time.sleep(0.01)


ORDER = """%%durable order
import sys
from IPython.display import display, HTML
def charge(cart):
    open('charged', 'a').write('x\\n')
    print('charging', cart)
    return {'paid': cart * 2}
print('begin')
paid = await durable.run('charge', charge, 21)
answer = await durable.call('notify', 'URL/notify', method='POST', json=paid)
open('reached', 'a').write('x\\n')
await durable.sleep('a while', 2.5)
display(HTML('<b>slept</b>'))
print('warned', file=sys.stderr)
total = paid['paid']
answer.status_code, total"""


def test_a_cell_killed_in_its_sleep_goes_on_in_a_new_kernel_and_is_then_restored(tmp_path, server):
    """Steps done are not executed again, the request is not sent again, the sleep waits only for its rest; run a third
    time, in a fresh kernel, variables and output are restored without running the body."""
    cell = ORDER.replace("URL", server.url)
    with kernel(tmp_path) as k:
        k.send(cell)
        wait_for_row(tmp_path, "timer/")
        began = time.time()
        k.kill()
        second = k.run(cell)
        slept = time.time() - began
        assert second.status == "ok", second.traceback
        assert second.result == "(200, 42)"
        assert slept > 2.3, "the sleep ended early"
        # What the kernel's restart took counts towards the sleep: it waits for what is left of 2.5 s, however slow that was.
        assert second.seconds < 2.5, "the sleep began anew"
        assert (tmp_path / "charged").read_text() == "x\n"
        assert [path for _, path, _, _ in server.seen] == ["/notify"]
        assert "charging 21" in second.stdout, "a restored step shows what it showed"

        k.restart()
        third = k.run(cell)
        assert third.told == [third.told[0]]
        assert "restored" in third.told[0]
        assert "".join(third.order).replace("stdout ", "") == "".join(second.order).replace("stdout ", "")
        assert (third.result, third.stdout, third.stderr) == ("(200, 42)", "begin\ncharging 21\n", "warned\n")
        assert k.value("total") == 42
        assert k.value("answer.json()['body'], paid") == ('{"paid":42}', {"paid": 42})
        assert k.value("charge.__globals__ is globals()") is True
        assert (tmp_path / "charged").read_text() == "x\n"
        assert (tmp_path / "reached").read_text() == "x\nx\n"
        assert len(server.seen) == 1


def test_an_idle_await_is_interrupted_at_once_and_finished_steps_are_kept(tmp_path):
    """Median 0.2 s, never above 1 s; the kernel lives; the next execution goes on."""
    count = "await durable.run('count', lambda: open('ran', 'a').write('x\\n'))"
    cell = f"%%durable nap\nn = {count}\nawait durable.sleep('long', 600)"
    with kernel(tmp_path) as k:
        took = []
        pid = k.pid
        for _ in range(5):
            sent = k.send(cell)
            k.wait_until(tmp_path / "ran")
            time.sleep(0.2)  # into the idle await
            began = time.monotonic()
            k.interrupt()
            shown = k.wait(sent)
            took.append(time.monotonic() - began)
            assert (shown.status, shown.error.split(":")[0]) == ("error", "KeyboardInterrupt")
            assert len(plain(shown.traceback).splitlines()) == 1
        assert sorted(took)[2] < 0.2, took
        assert max(took) < 1, took
        assert k.pid == pid
        assert k.run("1 + 1").result == "2"
        assert (tmp_path / "ran").read_text() == "x\n"


@pytest.mark.parametrize(
    "waiting",
    [BUSY_LOOP, "import time\ntime.sleep(30)", "import asyncio\nawait asyncio.sleep(30)", "await durable.run('s', pause)"],
    ids=["loop", "blocking", "await", "async step"],
)
def test_an_interrupt_stops_whatever_the_cell_does(shared, waiting):
    """Python code, a blocking call, an await or an async step: stopped; neither `except Exception` nor the kernel notices."""
    shared.run("import asyncio\nasync def pause():\n    await asyncio.sleep(30)")
    body = "\n".join(f"    {line}" for line in waiting.splitlines())
    sent = shared.send(
        f"%%durable stop\nopen('begun', 'w').write('x\\n')\ntry:\n{body}\nexcept Exception:\n    print('swallowed')"
    )
    shared.wait_until(shared.folder / "begun")
    time.sleep(0.2)
    began = time.monotonic()
    shared.interrupt()
    shown = shared.wait(sent)
    assert time.monotonic() - began < 2
    assert shown.error.startswith("KeyboardInterrupt")
    assert shown.stdout == ""
    assert shared.run("1 + 1").result == "2"
    (shared.folder / "begun").unlink()


def test_a_thread_that_outlives_an_interrupt_is_recorded_and_gets_no_twin(tmp_path):
    """Running the cell again attaches to the body that is still running."""
    (tmp_path / "go").mkdir()
    setup = """
def slow():
    import os, time
    open('begun', 'a').write('x\\n')
    while not os.path.exists('go/on'): time.sleep(0.01)
    return 'paid once'"""
    cell = "%%durable thread\nresult = await durable.run('slow', slow)"
    with kernel(tmp_path) as k:
        k.run(setup)
        sent = k.send(cell)
        k.wait_until(tmp_path / "begun")
        k.interrupt()
        assert k.wait(sent).error.startswith("KeyboardInterrupt")
        again = k.send(cell)
        time.sleep(0.3)
        (tmp_path / "go" / "on").touch()
        assert k.wait(again).status == "ok"
        assert k.value("result") == "paid once"
        assert (tmp_path / "begun").read_text() == "x\n"


def test_a_cell_that_attached_to_a_body_has_its_output_and_the_files_it_read(tmp_path):
    """The body began in an execution that was interrupted; the one that goes on is restored as a whole all the same."""
    (tmp_path / "go").mkdir()
    (tmp_path / "rate").write_text("3")
    setup = """
def slow():
    import os, time
    rate = int(open(name()).read())
    print('the rate is', rate)
    open('begun', 'a').write('x\\n')
    while not os.path.exists('go/on'): time.sleep(0.01)
    return rate
def name():
    return ''.join(['ra', 'te'])"""
    cell = "%%durable thread\nresult = await durable.run('slow', slow)"
    with kernel(tmp_path) as k:
        k.run(setup)
        sent = k.send(cell)
        k.wait_until(tmp_path / "begun")
        k.interrupt()
        assert k.wait(sent).error.startswith("KeyboardInterrupt")
        again = k.send(cell)
        k.wait_for_text(again, "resumes")
        (tmp_path / "go" / "on").touch()
        assert k.wait(again).stdout == "the rate is 3\n"
        k.restart()
        k.run(setup)
        restored = k.run(cell)
        assert "· restored" in restored.told[-1]
        assert restored.stdout == "the rate is 3\n"
        (tmp_path / "rate").write_text("4")
        k.run(cell)
        assert k.value("result") == 4


def test_a_failing_step_is_tried_again_and_its_exception_shows_the_users_lines(shared):
    """The original exception after the last attempt, with a note; frames and line numbers are the user's own."""
    shown = shared.run(
        "%%durable retry\n"
        "tries = 0\n"
        "def flaky():\n"
        "    global tries\n"
        "    tries += 1\n"
        "    raise ConnectionError('down')\n"
        "value = await durable.run('flaky', durable.step(flaky, retries=2, backoff=0.01))"
    )
    assert shown.error == "ConnectionError: down"
    assert shared.value("tries") == 3
    trace = plain(shown.traceback)
    assert re.findall(r"Cell In\[\d+\], line (\d+)", trace) == ["7", "6"]
    assert "site-packages" not in trace
    assert "durable_nb/" not in trace
    assert "step 'flaky' of cell 'retry' failed after 3 attempts" in trace
    assert "3" in shown.views[-1]["text/plain"]


def test_a_step_succeeds_in_a_later_attempt(shared):
    """Attempts are counted in the view."""
    shown = shared.run(
        "%%durable later\nleft = [1, 2]\ndef flaky():\n    if left: left.pop(); raise OSError('not yet')\n    return 'done'\n"
        "value = await durable.run('flaky', durable.step(flaky, backoff=0.01))"
    )
    assert shown.status == "ok", shown.traceback
    assert shared.value("value") == "done"
    assert re.search(r"flaky\s+completed\s.*\s3\b", shown.views[-1]["text/plain"])


def test_bad_data_is_not_tried_again(shared):
    """A ValueError would come again."""
    shown = shared.run(
        "%%durable bad\ncount = 0\ndef bad():\n    global count\n    count += 1\n    int('x')\nawait durable.run('bad', bad)"
    )
    assert shown.error.startswith("ValueError")
    assert shared.value("count") == 1


def test_an_exception_in_the_cell_shows_only_the_users_lines(shared):
    """As in a plain cell, one line further down for the magic."""
    broken = "def inner():\n    return 1 / 0\n\ninner()"
    durable = plain(shared.run(f"%%durable broken\n{broken}").traceback)
    expected = plain(shared.run(f"# %%durable broken\n{broken}").traceback)
    number = re.compile(r"Cell In\[\d+\]")
    assert number.sub("Cell", durable) == number.sub("Cell", expected)


@pytest.mark.parametrize("wrong", ["x = (1,", "for", "x = 1\n  y = 2", "return 5", "f(", "a b"])
def test_a_syntax_error_is_reported_as_ipython_would(shared, wrong):
    """Same error, same line, nothing runs."""
    durable = shared.run(f"%%durable wrong\nopen('never', 'w')\n{wrong}")
    assert wrong == "return 5" or not (shared.folder / "never").exists(), "IPython finds a stray return when it comes to it"
    expected = shared.run(f"# %%durable wrong\nopen('never', 'w')\n{wrong}")
    (shared.folder / "never").unlink(missing_ok=True)
    file = re.compile(r"\(\d+\.py, |Cell In\[\d+\]")
    assert durable.error.split(":")[0] in ("SyntaxError", "IndentationError", "_IncompleteInputError")
    assert file.sub("", durable.error) == file.sub("", expected.error)
    assert file.sub("", plain(durable.traceback)) == file.sub("", plain(expected.traceback))


def test_calls_are_retried_and_returned_whatever_their_status(shared, server):
    """503 is tried again, 404 is returned and not kept, and no credential is on disk."""
    shared.run(f"url = {server.url!r}")
    shown = shared.run(
        "%%durable calls\n"
        "flaky = await durable.call('flaky', url + '/flaky?api_key=sesame', headers={'Authorization': 'Bearer hunter2'})\n"
        "missing = await durable.call('missing', url + '/missing')\n"
        "posted = await durable.call('posted', url + '/post', method='POST', json={'a': 1})\n"
        "flaky.json()['n'], missing.status_code, flaky.request.headers['authorization'], flaky.headers['set-cookie']"
    )
    assert shown.status == "ok", shown.traceback
    assert shown.result == "(3, 404, '[redacted]', '[redacted]')"
    assert "sesame" not in shared.value("str(flaky.request.url)")
    post = next(headers for method, _, _, headers in server.seen if method == "POST")
    assert len(post["Idempotency-Key"]) == 32
    stored = b"".join(p.read_bytes() for p in (shared.folder / ".durable_nb").rglob("*") if p.is_file())
    assert not [secret for secret in (b"sesame", b"hunter2", b"swordfish") if secret in stored]
    before = len(server.seen)
    again = shared.run(
        "%%durable calls\n"
        "flaky = await durable.call('flaky', url + '/flaky?api_key=sesame', headers={'Authorization': 'Bearer other'})\n"
        "missing = await durable.call('missing', url + '/missing')"
    )
    assert again.status == "ok", again.traceback
    assert [path for _, path, _, _ in server.seen[before:]] == ["/missing"], "only what failed is asked again"


def test_concurrent_steps_are_all_recorded_when_one_fails(shared):
    """gather raises the first failure; bodies that have begun end, and are not executed again."""
    shared.run(
        "import asyncio\n"
        "async def slow(n):\n    await asyncio.sleep(0.3)\n    open('slow', 'a').write(f'{n}\\n')\n    return n\n"
        "async def fails():\n    await asyncio.sleep(0.1)\n    raise ValueError('one of them')"
    )
    gathered = "await asyncio.gather(*(durable.run('slow', slow, n) for n in range(3)), {last})"
    shown = shared.run("%%durable both\nvalues = " + gathered.format(last="durable.run('fails', fails)"))
    assert shown.error == "ValueError: one of them"
    shown = shared.run("%%durable both\nvalues = " + gathered.format(last="durable.run('slow', slow, 9)"))
    assert shown.status == "ok", shown.traceback
    assert shared.value("values") == [0, 1, 2, 9]
    assert sorted((shared.folder / "slow").read_text().split()) == ["0", "1", "2", "9"]


def test_two_kernels_run_a_cell_once(tmp_path):
    """The second waits for the first and takes what it stored."""
    cell = "%%durable once\nimport time\nopen('ran', 'a').write('x\\n')\ntime.sleep(1)\ny = 5"
    with kernel(tmp_path) as one, kernel(tmp_path) as two:
        first = one.send(cell)
        one.wait_until(tmp_path / "ran")
        second = two.send(cell)
        assert one.wait(first).status == two.wait(second).status == "ok"
        assert (one.value("y"), two.value("y")) == (5, 5)
    assert (tmp_path / "ran").read_text() == "x\n"


@pytest.mark.parametrize("above", ["%%time", "\n%%time", "%%time\n"], ids=["right above", "after a blank", "with a blank"])
def test_time_may_stand_above(shared, above):
    """It prints the wall time, whether the cell runs or is restored."""
    cell = f"{above}\n%%durable timed{len(above) + above.index('%')}\nimport asyncio\nawait asyncio.sleep(0)\nz = 3\nz"
    for _ in range(2):
        shown = shared.run(cell)
        assert shown.status == "ok", shown.traceback
        assert "Wall time:" in shown.stdout
        assert shown.result == "3"


@pytest.mark.parametrize(("below", "remedy"), [("%%time", "put it above %%durable"), ("%%bash", "give it a cell of its own")])
def test_a_cell_magic_below_is_told_where_to_stand(shared, below, remedy):
    shown = shared.run(f"%%durable stacked\n\n{below}\necho = 1")
    assert (shown.status, shown.told) == ("error", [])
    assert f"%%durable: {below} can't stand below it, so nothing was run; {remedy}\n" in shown.stderr


def test_capture_may_stand_above(shared):
    """The output goes into the variable, whether the cell runs or is restored."""
    for _ in range(2):
        shown = shared.run("%%capture out\n%%durable captured\nprint('hidden')\nawait durable.run('a', len, [1])\n7")
        assert (shown.status, shown.stdout, shown.result) == ("ok", "", None), shown.traceback
        assert shared.value("out.stdout") == "hidden\n"


def test_the_magic_works_from_synchronous_code_and_without_autoawait(shared):
    """run_cell_magic and %autoawait off go by the one door that nests loops."""
    shown = shared.run("get_ipython().run_cell_magic('durable', 'inner', 'm = await durable.run(\"a\", len, [1, 2])')")
    assert shown.status == "ok", shown.traceback
    assert shared.value("m") == 2
    shared.run("%autoawait off")
    shown = shared.run("%%durable blocking\nm = await durable.run('a', len, [1, 2, 3])")
    shared.run("%autoawait on")
    assert shown.status == "ok", shown.traceback
    assert shared.value("m") == 3


def test_quiet_shows_nothing_but_the_cells_own_output(shared):
    """Neither the line above nor the view."""
    shown = shared.run("%%durable hush --quiet\nprint('mine')\nawait durable.run('a', len, [])")
    assert (shown.told, shown.views, shown.stdout) == ([], [], "mine\n")


def test_rerun_executes_the_cell_and_its_steps_anew(shared):
    """And what it stored counts afterwards."""
    cell = "%%durable anew {}\nv = await durable.run('count', lambda: open('anew', 'a').write('x\\n'))"
    for options, lines in (("", 1), ("", 1), ("--rerun", 2), ("", 2)):
        assert shared.run(cell.format(options)).status == "ok"
        assert len((shared.folder / "anew").read_text().splitlines()) == lines


def test_one_step_can_be_executed_anew(shared):
    """--rerun=STEP: that one and no other, with an idempotency key of its own; an unknown name is told with those there are."""
    steps = "".join(
        f"{n} = await durable.run('{n}', lambda: (open('one_{n}', 'a').write('x\\n'), durable.idempotency_key())[1])\n"
        for n in "ab"
    )
    cell = "%%durable one {}\n" + steps
    assert shared.run(cell.format("")).status == "ok"
    first = shared.value("a, b")
    shown = shared.run(cell.format("--rerun=b"))
    assert shown.status == "ok", shown.traceback
    assert shown.told[0] == "one · running: asked for by --rerun=b"
    again = shared.value("a, b")
    assert (again[0] == first[0], again[1] == first[1]) == (True, False)
    assert [len((shared.folder / f"one_{n}").read_text().splitlines()) for n in "ab"] == [1, 2]
    assert (
        "--rerun=c: cell 'one' has recorded no step 'c'; it has 'a', 'b'; nothing was run"
        in shared.run(cell.format("--rerun=c")).stderr
    )
    runs = shared.value("[run.status.value for run in durable.runs() if \"of 'one'\" in repr(run)]")
    assert runs == ["completed", "completed"], "a refused --rerun left a run"

    assert "restored" in shared.run(cell.format("")).told[-1]


def test_a_step_tried_at_most_once_is_not_repeated_after_a_kill(tmp_path):
    """StepInterrupted until --rerun=STEP says that the far end was looked at."""
    cell = (
        "%%durable once {}\ndef pay():\n    import os, time\n    open('begun', 'a').write('x\\n')\n"
        "    while not os.path.exists('on'): time.sleep(0.01)\n    return 'paid'\n"
        "result = await durable.run('pay', durable.step(pay, at_most_once=True))"
    )
    with kernel(tmp_path) as k:
        k.send(cell.format(""))
        k.wait_until(tmp_path / "begun")
        k.kill()
        (tmp_path / "on").touch()
        for _ in range(2):
            shown = k.run(cell.format(""))
            assert shown.error.startswith("StepInterrupted: step 'pay' of cell 'once' was cut off"), shown.error
        assert "--rerun=pay" in shown.error
        assert (tmp_path / "begun").read_text() == "x\n"
        assert k.run(cell.format("--rerun=pay")).status == "ok"
        assert k.value("result") == "paid"


def test_stop_reaches_a_workflows_code_that_never_yields(tmp_path):
    """The cell that awaits it ends, and the run can be resumed."""
    define = (
        "import pathlib, time\n@durable.workflow\nasync def busy():\n    await durable.run('a', int)\n"
        "    pathlib.Path('busy').write_text('x\\n')\n    until = time.monotonic() + 30\n"
        "    while time.monotonic() < until and not pathlib.Path('again').exists():\n        pass\n    return 'done'"
    )

    with kernel(tmp_path) as k:
        k.run(define)
        sent = k.send("run = busy.start(id='b1')\nawait run")
        k.wait_until(tmp_path / "busy")
        began = time.monotonic()
        k.interrupt()
        assert k.wait(sent).error
        assert time.monotonic() - began < 20
        assert k.value("run.status.value") == "interrupted"
        (tmp_path / "again").touch()
        assert k.run("await run.resume()").result == "'done'"


def test_workflows_run_between_cells_and_go_on_in_a_new_kernel(tmp_path):
    """start() returns at once; after a kill the same id goes on with what is recorded."""
    define = (
        "def pay(x):\n    open('paid', 'a').write('x\\n')\n    return x * 2\n"
        "@durable.workflow\nasync def order(x):\n    paid = await durable.run('pay', pay, x)\n"
        "    await durable.sleep('nap', 1.5)\n    return paid"
    )
    with kernel(tmp_path) as k:
        k.run(define)
        shown = k.run("run = order.start(21, id='order-1')\norder.start(21, id='order-1').id")
        assert shown.result == "'order-1'", shown.traceback
        wait_for_row(tmp_path, "timer/")
        k.kill()
        k.run(define)
        assert k.value("durable.get_run('order-1').status.value") == "interrupted"
        assert k.run("await order.start(21, id='order-1')").result == "42"
        assert k.run("order.start(21, id='order-1').result()").result == "42"
        assert k.run("order.start(22, id='order-1')").error.startswith("RunConflictError: the run id 'order-1' is used already")
        assert (tmp_path / "paid").read_text() == "x\n"


def test_without_a_front_end_misses_are_told_on_stderr_and_a_table_is_left(tmp_path):
    """nbclient runs it like any notebook; a second run restores the cell, and the saved notebook shows it."""
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(LOAD),
            nbformat.v4.new_code_cell(
                "%%durable headless\nprint('hello')\nn = await durable.run('count', lambda: open('ran', 'a').write('x\\n'))\n"
                "await durable.sleep('short', 0.1)\nn + 40"
            ),
        ]
    )
    for _ in range(2):
        client = NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}, timeout=60)
        outputs = client.execute().cells[1].outputs
        assert [o.text for o in outputs if o.get("name") == "stdout"] == ["hello\n"]
        assert [o.data["text/plain"] for o in outputs if o.output_type == "execute_result"] == ["42"]
        assert not [o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
        if _ == 0:
            assert "headless · running: first run" in "".join(o.text for o in outputs if o.get("name") == "stderr")
            assert any("count" in o.get("data", {}).get("text/html", "") for o in outputs)
    assert (tmp_path / "ran").read_text() == "x\n"


def test_a_long_sleep_without_a_front_end_ends_the_cell_and_says_what_to_do(tmp_path):
    """Nobody would see why the notebook takes a week; --max-wait says how long is fine."""
    with kernel(tmp_path) as k:
        shown = k.run(
            "%%durable week\nn = await durable.run('count', len, [1])\nawait durable.sleep('week', '7d')", front_end=False
        )
        assert shown.error.startswith("RunSuspended: cell 'week' sleeps 'week' until")
        assert "run this cell again" in shown.error
        assert len(plain(shown.traceback).splitlines()) == 1
        shown = k.run(
            "%%durable week --max-wait 1s\nn = await durable.run('count', len, [1])\nawait durable.sleep('week', '7d')"
        )
        assert shown.error.startswith("RunSuspended")


def test_terminal_ipython_runs_and_restores(tmp_path):
    """The same cell in `ipython` at a terminal's prompt: the second process restores it, output included."""
    script = (
        f"{LOAD}\n\n"
        "%%durable term\nprint('from the cell')\nn = await durable.run('count', lambda: open('ran', 'a').write('x\\n'))\n"
        "await durable.sleep('short', 0.1)\nn + 40\n\n\nprint('n is', n)\n"
    )
    for _ in range(2):
        ran = subprocess.run(
            [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", "--simple-prompt"],
            input=script,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={
                **__import__("os").environ,
                "IPYTHONDIR": str(tmp_path / "ipython"),
                "JUPYTER_DATA_DIR": str(tmp_path / "jupyter"),
            },
            timeout=60,
            check=False,
        )
        assert "from the cell" in ran.stdout, ran
        assert re.search(r"Out\[\d+\]: 42", ran.stdout), ran
        assert "n is 2" in ran.stdout, ran
        assert "Traceback" not in ran.stdout + ran.stderr, ran
    assert (tmp_path / "ran").read_text() == "x\n"


def test_at_a_terminal_a_cell_waits_and_says_for_what(tmp_path):
    """Somebody sits there; another process decides."""
    env = {
        **__import__("os").environ,
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_DATA_DIR": str(tmp_path / "jupyter"),
        "DURABLE_NB_KEY_FILE": str(tmp_path / "key"),
    }
    terminal = subprocess.Popen(
        [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", "--simple-prompt"],
        **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
        text=True,
        cwd=tmp_path,
        env=env,
    )
    with terminal:
        terminal.stdin.write(f"{LOAD}\n\n%%durable term\n(await durable.approve('ok', 'sure?')).comment\n\n\n")
        terminal.stdin.flush()
        said = next(line for line in terminal.stderr if "waits for approval" in line)
        assert "durable_nb: term · waits for approval ok until " in said
        decides = "import durable_nb as d; d.open('.durable_nb'); d.get_run('term').approve('ok', comment='fine')"
        subprocess.run([sys.executable, "-c", decides], cwd=tmp_path, env=env, check=True, timeout=60)
        stdout, _ = terminal.communicate("exit()\n", timeout=60)
    assert re.search(r"Out\[\d+\]: 'fine'", stdout), stdout


NESTED = """%%durable a
async def b():
    import asyncio
    await asyncio.sleep(0)
    await durable.sleep('s', 0)
await durable.run('outer', b)"""


SLOW = "%%durable a\ndef slow(x):\n    return x\n"
WORKFLOW = "@durable.workflow\nasync def order(email): return email\n"


@pytest.mark.parametrize(
    ("cell", "error"),
    [
        ("%%durable a --nonsense\nx = 1", r"UsageError: %%durable: unknown option '--nonsense'; nothing was run"),
        ("%%durable a b\nx = 1", r"UsageError: %%durable: a second name 'b' after 'a'; nothing was run"),
        ("%%durable 'a\nx = 1", r"UsageError: %%durable 'a: No closing quotation; nothing was run"),
        ("%%durable a --max-wait soon\nx = 1", r"UsageError: %%durable --max-wait: 'soon' is not a duration"),
        ("%%durable a\nawait durable.sleep('s', '5 parsecs')", r"ValueError: '5 parsecs' is not a duration: write"),
        ("%%durable a\nawait durable.sleep('s', -1)", r"ValueError: -1 is not a duration: it must be finite and not negative"),
        ("%%durable a\nawait durable.run('', len, [])", r"ValueError: durable.run\(''.*the step's name is empty"),
        ("%%durable a\nawait durable.run(3, len, [])", r"TypeError: durable.run\(3.*the first argument is the step's name"),
        ("%%durable a\nawait durable.run('x', 3)", r"TypeError: durable.run\('x', 3\): give the function itself"),
        (SLOW + "await durable.run(slow, 3)", r"TypeError: durable.run\(slow, 3\): .* write durable.run\('slow', slow, 3\)"),
        (SLOW + "await durable.run(slow)", r"TypeError: durable.run\(slow\): .* write durable.run\('slow', slow\)"),
        ("%%durable a\nawait durable.sleep('1s')", r"TypeError: durable.sleep\('1s'\): .* durable.sleep\('a name', '1s'\)"),
        ("%%durable a\nawait durable.call('http://x/?key=1')", r"TypeError: durable.call\(...\): the step's name is missing"),
        (
            SLOW + "await durable.run('s', slow, 3, retries=5)",
            r"TypeError: slow takes no argument 'retries'.*step\(slow, retries=5\)",
        ),
        (
            SLOW + "await durable.run('s', slow, 3, retires=5)",
            r"TypeError: slow takes no argument 'retires'.*step\(slow, retries=5\)",
        ),
        (SLOW + "await durable.run('s', durable.step(slow, retires=5), 3)", r"TypeError: .*retires=.* did you mean retries="),
        ("%%durable a\nawait durable.call('x', 'http://x', timout=3)", r"TypeError: .*timout=.* did you mean timeout="),
        (WORKFLOW + "await order('jane')", r"NotInRunError: the workflow order\(...\) was .* run = order.start\(...\)"),
        (WORKFLOW + "order.start('jane', label='x')", r"TypeError: order.start\(...\): .*'label', did you mean labels="),
        ("durable.slepp('x', 1)", r"AttributeError: module 'durable_nb' has no attribute 'slepp'; did you mean 'sleep'"),
        (
            "%%durable a\nimport asyncio\nawait asyncio.to_thread(lambda: durable.run('x', len, []))",
            r"NotInRunError: durable.run\(\) was called in the thread 'asyncio_0', which belongs to no run; nothing was run",
        ),
        (
            "import concurrent.futures as c\nwith c.ThreadPoolExecutor() as p: p.submit(durable.run, 'x', len, []).result()",
            r"NotInRunError: durable.run\(\) was called in the thread 'ThreadPool",
        ),
        ("%%durable a\nawait durable.call('x', 'nowhere')", r"ValueError: durable.call\('x', 'nowhere'\): the URL needs http"),
        ("durable.run('x', len, [])", r"NotInRunError: durable.run\(\) was called outside .*'%%durable NAME'"),
        (
            NESTED,
            r"NestedStepError: durable.sleep\(\) was called inside the body of step 'outer'",
        ),
        (
            "%%durable a\nawait durable.run('x', lambda: (i for i in [1]))",
            r"UnserializableError: step 'x' of cell 'a' returned a generator",
        ),
    ],
)
def test_bad_input_gets_one_clear_line(shared, cell, error):
    """What was found, and what to type instead."""
    shown = shared.run(cell)
    assert shown.status == "error"
    assert re.search(error, shown.error or shown.stderr), (shown.error, shown.stderr)
    assert shared.run("%%durable fine\nok = await durable.run('x', len, [])").status == "ok"


def test_options_of_a_step_may_be_arguments_of_its_function(shared):
    """Only what the function doesn't take was meant for the step."""
    shown = shared.run(
        "%%durable mine\ndef slow(x, retries, timeout=0): return x, retries, timeout\ndef any_of(**options): return options\n"
        "[await durable.run('s', slow, 1, retries=5, timeout=2), await durable.run('o', any_of, retries=3, retires=4),"
        " await durable.run('p', dict, retries=1)]"
    )
    assert shown.result == "[(1, 5, 2), {'retries': 3, 'retires': 4}, {'retries': 1}]", shown.traceback


def test_the_line_may_end_in_a_comment_and_units_may_be_written_out(shared):
    """A '#' in quotes is none."""
    assert shared.run("%%durable 'no # comment' --ttl 7days --max-wait '1 hour'  # don't ask\nn = 1").status == "ok"
    assert "no # comment" in shared.run("%durable why 'no # comment'  # note").told[0]
    assert "%durable plan" in shared.run("%durable help").told[0]


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda store: store.write_text("a file"), r"StoreError: the store folder .* can't be used \(.*nothing was run"),
        (lambda store: store.symlink_to("/proc/nowhere"), r"StoreError: the store folder .* can't be used \(.*nothing was run"),
        (
            lambda store: [store.mkdir(), (store / "store.json").write_text('{"format": 2, "id": "0123456789abcdef"}')],
            r"StoreError: the store .* was written by a newer durable_nb \(store format 2",
        ),
        (
            lambda store: [store.mkdir(), (store / "store.json").write_text("{")],
            r"CorruptStoreError: .*store.json is damaged",
        ),
    ],
    ids=["file", "unwritable", "newer", "damaged"],
)
def test_a_store_that_cannot_be_used_is_told_in_one_line(tmp_path, spoil, error):
    """Nothing runs, nothing in it changes, and the kernel goes on."""
    store = tmp_path / "store"
    spoil(store)
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    with kernel(tmp_path, env={"DURABLE_NB_DIR": str(store)}) as k:
        shown = k.run("%%durable a\nopen('ran', 'w')\ny = 1")
        assert re.match(error, shown.error), shown.error
        assert plain(shown.traceback).count("\n") == 0
        assert not (tmp_path / "ran").exists()
        assert k.run("1 + 1").result == "2"
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before


def test_loading_says_where_the_store_is_and_a_later_chdir_does_not_move_it(tmp_path):
    """The folder is that of the kernel at %load_ext."""
    (tmp_path / "elsewhere").mkdir()
    with kernel(tmp_path, load=False) as k:
        assert k.run(LOAD).stdout == f"durable_nb: this notebook's store is {tmp_path / '.durable_nb'}\n"
        k.run("%cd -q elsewhere\n")
        assert k.run("%%durable a\ny = 1").status == "ok"
        k.restart()
        k.run("import durable_nb._disks as disks\ndisks._name = lambda path: 'nfs'")
        assert k.run(LOAD).stdout.splitlines()[1].startswith("durable_nb: the store is on a network file system (nfs), so its")
        assert "set DURABLE_NB_DIR to a folder on a local disk" in k.run("%reload_ext durable_nb").stdout
        assert k.run("%%durable a --rerun\ny = 1").status == "ok"
        assert (tmp_path / ".durable_nb" / "journal" / "cache.db-journal").exists(), "a rollback journal, not WAL"
    assert (tmp_path / ".durable_nb" / "store.json").exists()
    assert (tmp_path / ".durable_nb").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / ".durable_nb" / ".gitignore").read_text() == "*\n"


def test_the_extension_can_be_unloaded_and_loaded_again(tmp_path):
    """Nothing of it stays behind, and the store is free for others."""
    with kernel(tmp_path) as k:
        assert k.run("%%durable a\ny = 1").status == "ok"
        assert k.run("%unload_ext durable_nb").status == "ok"
        assert "not found" in k.run("%%durable a\ny = 1").stderr
        assert k.run("%load_ext durable_nb").status == "ok"
        assert "restored" in k.run("%%durable a\ny = 1").told[-1]


def test_help_shows_how_the_magic_is_used(shared: Kernel, tmp_path: Path):
    """`%%durable?` as for any magic."""
    assert "--rerun" in shared.value("get_ipython().find_cell_magic('durable').__doc__")


def test_a_step_that_changes_a_global_is_known_again_in_the_kernel_that_ran_it(shared):
    """A list that it appends to, a counter that it raises: left out of its identity, and one line says so."""
    shared.run("paid = []\ncount = 0\ndef pay(n):\n    global count\n    count += 1\n    paid.append(n)\n    return n")
    cell = "%%durable charges\nfor n in range({}):\n    await durable.run('pay', pay, n)\nraise ValueError('later')"
    first = shared.run(cell.format(3))
    assert "step 'pay' changes count, paid: restoring the step won't, and count, paid is not compared" in first.told[-1]
    for rows in (3, 4):
        shared.run(cell.format(rows))
        assert shared.value("paid, count") == (list(range(rows)), rows)


def test_a_thread_that_has_changed_a_global_already_gets_no_twin(tmp_path):
    """Interrupted, and run again while it lives: attached to, whatever its body has done meanwhile. Another input isn't."""
    (tmp_path / "go").mkdir()
    setup = (
        "begun = []\nrate = 1\ndef slow():\n    import os, time\n    begun.append(1)\n"
        "    at = rate\n    open('begun', 'a').write('x\\n')\n"
        "    while not os.path.exists('go/on'): time.sleep(0.01)\n    return at"
    )
    cell = "%%durable thread\nresult = await durable.run('slow', slow)"
    with kernel(tmp_path) as k:
        k.run(setup)
        sent = k.send(cell)
        k.wait_until(tmp_path / "begun")
        k.interrupt()
        assert k.wait(sent).error.startswith("KeyboardInterrupt")
        again = k.send(cell)
        time.sleep(0.3)
        k.interrupt()
        assert k.wait(again).error.startswith("KeyboardInterrupt")
        assert (tmp_path / "begun").read_text() == "x\n"
        k.run("rate = 2")
        other = k.send(cell)
        k.wait_until(tmp_path / "begun", 2)
        (tmp_path / "go" / "on").touch()
        assert k.wait(other).status == "ok"
        assert k.value("result") == 2


def test_in_somebody_elses_store_a_cell_without_steps_runs_and_is_stored_anew(tmp_path):
    """What they signed is neither read nor in the way."""
    cell = "%%durable a\nprint('computed')\nx = 41 + 1"
    for key, told, ran in [
        ("theirs", "first run", True),
        ("mine", "signed with another key", True),
        ("mine", "restored", False),
    ]:
        with kernel(tmp_path, env={"DURABLE_NB_KEY_FILE": str(tmp_path / key)}) as one:
            shown = one.run(cell)
            assert shown.status == "ok", shown.error
            assert told in " ".join(shown.told) + shown.stderr
            assert ("running" in " ".join(shown.told)) == ran
            assert one.run("print(x)").stdout == "42\n"
            assert one.value("len(durable.runs())") == 1


STORING = """
import os, signal
from durable_nb._ipython import cell as _cells
_store = _cells.CellExecution._store
def _storing(*args):
    {before}
    _store(*args)
    {after}
_cells.CellExecution._store = _storing
"""
NAPPING = (
    "%%durable nap\nimport time\nbegan = time.time()\nawait durable.sleep('nap', {n})\nx = {n}\nopen('ran', 'a').write('x')"
)


def test_killed_between_its_entry_and_the_end_of_its_run_a_cell_is_restored_and_its_run_closed(tmp_path):
    """Left open, the run's sleep would count for the next inputs."""
    with kernel(tmp_path) as one:
        one.run(STORING.format(before="", after="os.kill(os.getpid(), signal.SIGKILL)"))
        assert one.run(NAPPING.format(n=0.4)).status == "died"
    with kernel(tmp_path) as two:
        assert two.value("[run.status.value for run in durable.runs()]") == ["interrupted"]
        assert "restored" in two.run(NAPPING.format(n=0.4)).told[-1]
        assert two.value("[run.status.value for run in durable.runs()]") == ["completed"]
        assert two.run(NAPPING.format(n=0.5)).status == "ok"
        assert two.value("__import__('time').time() - began > 0.5")
    assert (tmp_path / "ran").read_text() == "xx"


def test_an_interrupt_while_a_cell_is_stored_loses_nothing_and_spares_the_kernel(tmp_path):
    with kernel(tmp_path) as k:
        k.run(STORING.format(before="os.kill(os.getpid(), signal.SIGINT)", after=""))
        shown = k.run(NAPPING.format(n=0))
        assert shown.status == "ok", shown.error
        k.restart()
        assert "restored" in k.run(NAPPING.format(n=0)).told[-1]
        assert k.value("x") == 0
    assert (tmp_path / "ran").read_text() == "x"


def test_an_interrupt_in_the_engines_own_code_keeps_the_step_and_spares_the_kernel(tmp_path):
    """It comes while what the body returned is made into bytes: the cell stops, and the step is not run again."""
    with kernel(tmp_path) as k:
        pid = k.pid
        k.run(
            "import asyncio, os, signal\nclass Seven:\n    def __reduce__(self):\n"
            "        if not os.path.exists('hit'):\n            open('hit', 'w').close()\n"
            "            os.kill(os.getpid(), signal.SIGINT)\n        return Seven, ()\n"
            "def seven():\n    open('ran', 'a').write('x')\n    return Seven()"
        )
        shown = k.run("%%durable a\nx = await durable.run('s', seven)\nawait asyncio.sleep(60)")
        assert shown.error == "KeyboardInterrupt: cell 'a' was interrupted"
        assert k.run("%%durable a\nx = await durable.run('s', seven)").status == "ok"
        assert (k.value("type(x) is Seven"), k.pid) == (True, pid)
    assert (tmp_path / "ran").read_text() == "x"


def test_an_interrupt_that_the_kernels_own_handler_gets_says_so_too(tmp_path):
    """It comes between the beginning of the run and that of the cell's code."""
    with kernel(tmp_path) as k:
        k.run(
            "import os, signal\nfrom durable_nb._ipython import cell\nbefore = cell.CellExecution._why\n"
            "def why(self, *args):\n    os.kill(os.getpid(), signal.SIGINT)\n    return before(self, *args)\n"
            "cell.CellExecution._why = why"
        )
        shown = k.run("%%durable a\nx = await durable.run('s', lambda: 7)")
        assert shown.error == "KeyboardInterrupt: cell 'a' was interrupted"
        k.run("cell.CellExecution._why = before")
        assert k.run("%%durable a\nx = await durable.run('s', lambda: 7)").status == "ok"
        assert k.value("x") == 7


def test_a_store_deleted_under_a_living_kernel_is_made_anew(tmp_path):
    """`rm -rf .durable_nb` is how one forgets all."""
    cell = "%%durable a\nopen('ran', 'a').write('x\\n')\ny = await durable.run('s', lambda: 7)"
    with kernel(tmp_path) as k:
        assert k.run(cell).status == "ok"
        shutil.rmtree(tmp_path / ".durable_nb")
        shown = k.run(cell)
        assert "deleted or replaced" in shown.stderr
        assert (shown.status, shown.told[-1][:7]) == ("ok", "a · ran"), shown
        k.kill()
        assert "restored" in k.run(cell).told[-1]
        assert k.value("y") == 7
    assert (tmp_path / "ran").read_text() == "x\nx\n"


def test_a_cell_interrupted_before_it_began_says_so(tmp_path):
    """Here, while another kernel executes it."""
    cell = "%%durable once\nimport time\nopen('ran', 'a').write('x\\n')\ntime.sleep(60)"
    with kernel(tmp_path) as one, kernel(tmp_path) as two:
        one.send(cell)
        one.wait_until(tmp_path / "ran")
        waiting = two.send(cell)
        two.wait_for_text(waiting, "another kernel is running")
        two.interrupt()
        shown = two.wait(waiting)
        assert shown.error == "KeyboardInterrupt: cell 'once' was interrupted before it began; nothing was run"
        assert two.value("40 + 2") == 42


def test_a_run_started_by_a_cell_is_started_once_however_often_the_cell_goes_on(tmp_path):
    define = "@durable.workflow\nasync def order(n):\n    open('ran', 'a').write('x\\n')\n    return n + 1"
    cell = "%%durable a\nrun = order.start({n})\ny = await run\nopen('begun', 'a').write('x\\n')\n{then}"
    with kernel(tmp_path) as k:
        k.run(define)
        k.send(cell.format(n=1, then="await durable.sleep('long', '1h')"))
        k.wait_until(tmp_path / "begun")
        k.kill()
        k.run(define)
        shown = k.run(cell.format(n=1, then=""))
        assert shown.status == "ok", shown.error
        assert k.value("y") == 2
        assert k.run(cell.format(n=2, then="")).status == "ok"
        assert k.value("y") == 3
    assert (tmp_path / "ran").read_text() == "x\nx\n"


FORKS = """%%durable forks
import os, signal

def body():
    pid = os.fork()
    if not pid:
        signal.alarm(20)  # where the child goes on, not for long
        print('of the child')
        return 'of the child'
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

async def on_the_loop():
    return body()

x = await durable.run('in a thread', body), await durable.run('on the loop', on_the_loop)
"""


def test_a_child_that_a_steps_body_forks_in_a_kernel_ends_where_the_body_ends(tmp_path):
    """It answers no message of the kernel's, and the kernel goes on as if there had been none."""
    with kernel(tmp_path) as k:
        assert k.run(FORKS).status == "ok"
        assert k.value("x") == (0, 0)
        assert k.run("1 + 1").result == "2"


def test_loading_says_what_waits_to_be_gone_on_with(tmp_path):
    """Not what a living kernel executes, nor what has ended."""
    workflow = "@durable.workflow\nasync def order():\n    await durable.sleep('long', '1h')\nrun = order.start(id='order-42')"
    with kernel(tmp_path) as one:
        one.run("%%durable done\nx = 1")
        one.run("%%durable failed\n1/0")
        one.run(workflow + "\nimport asyncio\nwhile run.status != 'sleeping': await asyncio.sleep(0.01)")
        one.send("%%durable night\nopen('began', 'w').write('x\\n')\nawait durable.sleep('long', '1h')")
        one.wait_until(tmp_path / "began")
        with kernel(tmp_path, load=False) as two:
            place = f"durable_nb: this notebook's store is {tmp_path / '.durable_nb'}\n"
            assert two.run(LOAD).stdout == place
            one.kill()
            two.restart()
            assert two.run(LOAD).stdout == (
                place + "durable_nb: run cell 'night' again to resume from where it stopped\n"
                "durable_nb: durable.resume() resumes 'order-42'\n"
            )


def test_a_cell_with_a_step_that_is_never_awaited_says_so_and_is_not_stored(shared):
    cell = "%%durable forgotten\nawait durable.run('one', len, [1])\ndurable.run('two', len, [2])\nx = 1"
    for _ in range(2):
        told = shared.run(cell).told[-1]
        assert "not stored: step 'two' was called and never awaited: write 'await' before it" in told
