"""`durable-nb run`: real notebooks in real kernels, parked, killed, approved from outside, and finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.kernel

PROGRAM = Path(sys.executable).with_name("durable-nb")
BEGIN = """
%load_ext durable_nb
import durable_nb as durable, os
from pathlib import Path

def note(what):
    with open("done", "a") as file:
        file.write(f"{what}\\n")
    return what
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    monkeypatch.delenv("DURABLE_NB_DIR", raising=False)
    monkeypatch.delenv("DURABLE_NB_MAX_WAIT", raising=False)
    return tmp_path


def write(folder, *sources, tags=()):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (BEGIN, *sources)])
    for at, tag in tags:
        notebook.cells[at].metadata["tags"] = [tag]
    nbformat.write(notebook, folder / "report.ipynb")


def run(folder, *options):
    done = subprocess.run(
        [PROGRAM, "run", "report.ipynb", "--json", *options],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout) if done.stdout.startswith("{") else done.stderr


@contextmanager
def running(folder, *options):
    log = (folder / "log").open("a")
    process = subprocess.Popen([PROGRAM, "run", "report.ipynb", *options], cwd=folder, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        log.close()


def until(condition, what):
    """Several kernels start one after another, on a machine that may be busy."""
    give_up = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < give_up, f"waited in vain: {what}"
        time.sleep(0.02)


def said(folder):
    return (folder / "log").read_text()


def done(folder):
    return (folder / "done").read_text().split() if (folder / "done").exists() else []


def descendants(pid):
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += [int(child), *descendants(child)]
    return found


def texts(folder):
    cells = nbformat.read(folder / "report.out.ipynb", as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def test_a_notebook_is_finished_over_a_killed_kernel_and_two_parkings_and_repeats_nothing(folder):
    write(
        folder,
        """%%durable nap
def once():
    note("charge")
    if not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), 9)
await durable.run("first", note, "first")
await durable.run("once", once)
await durable.sleep("nap", "12s")""",
        """%%durable publish
decision = await durable.approve("publish", "Publish?")
await durable.run("last", note, decision.comment)""",
        "print('comment', decision.comment)",
    )
    with running(folder, "--max-wait", "1s") as process:
        until(lambda: "parked: waits for nap (sleep until" in said(folder), "the first parking")
        until(lambda: "parked: waits for publish (approval until" in said(folder), "the second one")
        assert descendants(process.pid) == []
        resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        assert resident < 60 * 2**20
        subprocess.run([PROGRAM, "approve", "publish", "publish", "--comment", "fine"], cwd=folder, check=True)
        assert process.wait(180) == 0
    assert done(folder) == ["first", "charge", "charge", "fine"]  # the step that was killed ran again, and nothing else
    assert "comment fine" in texts(folder)


def test_once_ends_with_75_and_the_time_to_come_back(folder):
    write(
        folder,
        "x = 0",
        "%%durable wait\ny = await durable.run('x', note, x)\nawait durable.sleep('nap', '2h')",
        tags=[(1, "parameters")],
    )
    status, told = run(folder, "--once", "-p", "x", "7")
    assert (status, told["status"]) == (75, "suspended")
    assert told["waits_for"][0]["step"] == "nap"
    assert told["wake_at"] == told["waits_for"][0]["until"]
    assert done(folder) == ["7"]
    write(folder, "x = 0", "%%durable wait\nevent = await durable.wait_for_event('news', 'headline')", "print(event.data)")
    status, told = run(folder, "--once", "--max-wait", "0s")
    assert (status, told["wake_at"]) == (75, None)
    assert told["waits_for"][0] | {"run": "", "until": ""} == {
        "run": "",
        "kind": "event",
        "step": "news",
        "until": "",
        "event": "headline",
    }
    subprocess.run([PROGRAM, "notify", "headline", '"it rains"'], cwd=folder, check=True)
    assert run(folder, "--once", "--max-wait", "0s") == (0, {"status": "completed", "output": "report.out.ipynb"})
    assert "it rains" in texts(folder)


def test_it_ends_when_the_runs_that_it_started_have_ended(folder):
    write(
        folder,
        "@durable.workflow\nasync def order(n):\n    await durable.run('one', note, f'one-{n}')\n"
        "    await durable.sleep('a moment', n)\n    await durable.run('two', note, f'two-{n}')",
        "run = order.start(12, id='a'); quick = order.start(0.1, id='b')",
    )
    with running(folder, "--max-wait", "1s") as process:
        until(lambda: "parked: waits for a moment" in said(folder), "the parking")
        assert sorted(done(folder)) == ["one-0.1", "one-12", "two-0.1"]
        assert process.wait(180) == 0
    assert sorted(done(folder)) == ["one-0.1", "one-12", "two-0.1", "two-12"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_it_leaves_no_kernel_and_goes_on_when_it_is_run_again(folder, number):
    write(
        folder,
        "import time\ndef gate(): Path('gate').exists() or time.sleep(60)",
        "%%durable work\nawait durable.run('one', note, 'one')\nawait durable.run('gate', gate)",
    )
    with running(folder) as process:
        until(lambda: done(folder) == ["one"], "the first step")
        below = descendants(process.pid)
        assert below
        process.send_signal(number)
        process.wait(30)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), "the end of its kernel")
    (folder / "gate").touch()
    assert run(folder)[0] == 0
    assert done(folder) == ["one"]


def test_what_fails_is_told_and_its_output_is_saved(folder):
    write(folder, "print('before')\n1 / 0", "print('after')")
    status, told = run(folder)
    assert (status, told["status"], told["cell"]) == (1, "failed", 2)
    assert "ZeroDivisionError" in told["error"]
    assert "before" in texts(folder)
    write(folder, "note('dies')\nos.kill(os.getpid(), 9)")
    status, told = run(folder)
    assert (status, told["status"], done(folder)) == (1, "died", ["dies"] * 4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["nothing.ipynb"], "no notebook 'nothing.ipynb'"),
        (["empty.ipynb"], "is no notebook"),
        (["report.ipynb", "-p", "not a name", "1"], "no name of a variable"),
        (["report.ipynb", "--max-wait", "soon"], "soon"),
        (["report.ipynb", "-o", "nowhere/out.ipynb"], "no folder"),
    ],
)
def test_bad_input_is_told_in_one_line(folder, options, says):
    write(folder)
    (folder / "empty.ipynb").write_text("{}")
    told = subprocess.run([PROGRAM, "run", *options], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert says in told.stderr
