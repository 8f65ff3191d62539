"""What a stranger tried in real kernels and found right: it shall stay so."""

from __future__ import annotations

import re
import time

import pytest
from kernels import kernel

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A kernel that is restarted by the tests that need a fresh one."""
    with kernel(tmp_path_factory.mktemp("stranger")) as started:
        yield started


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("mixed", "print('a', end='')\nimport sys\nprint('b')\nsys.stderr.write('e\\n')\ndisplay({'x': 1})\nprint('c')\n42"),
        ("cleared", "from IPython.display import clear_output\nfor i in range(3):\n    clear_output(wait=True); print(i)"),
        ("updated", "handle = display('one', display_id=True)\nhandle.update('two')\nprint('x')"),
        ("processes", "import os, subprocess\nos.write(1, b'raw\\n')\nsubprocess.run(['echo', 'child'])"),
        (
            "redirected",
            "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as s:\n    print(1)\nprint(s.getvalue())",
        ),
        ("silent", "5;"),
    ],
)
def test_outputs_are_shown_again_in_their_order(home, name, body):
    """The miss and the hit show what the plain cell shows."""
    plain = home.run(body)
    cell = f"%%durable {name}\n{body}"
    for shown in (home.run(cell), home.run(cell)):
        assert (shown.stdout, shown.stderr, shown.result) == (plain.stdout, plain.stderr, plain.result)
        assert [sorted(d["data"]) for d in shown.displays] == [sorted(d["data"]) for d in plain.displays]


def test_classes_of_one_durable_cell_serve_the_values_of_another(home):
    """Restored in a fresh kernel, instances belong to the restored classes."""
    for _ in range(2):
        home.restart()
        home.run(
            "%%durable classes\nfrom dataclasses import dataclass\nfrom enum import Enum\n@dataclass\nclass D:\n    x: int = 0"
            "\nclass Color(Enum):\n    RED = 1\nclass Sub(D):\n    def twice(self):\n        return self.x * 2"
        )
        home.run("%%durable instances\nd, color, sub = D(4), Color.RED, Sub(3)")
        found = home.value("isinstance(d, D), d == D(4), color is Color.RED, isinstance(sub, D), sub.twice()")
        assert found == (True, True, True, True, 6)


def test_a_module_on_disk_counts_as_it_is_loaded(home):
    """Edited and not reloaded, nothing changes; reloaded, the cell runs."""
    home.restart()
    module = home.folder / "strange.py"
    module.write_text("def fn():\n    return 1\n")
    home.run("import strange, importlib")
    cell = "%%durable module\nvalue = strange.fn()"
    home.run(cell)
    module.write_text("def fn():\n    return 22\n")
    home.run(cell)
    assert home.value("value") == 1
    home.run("importlib.reload(strange)")
    home.run(cell)
    assert home.value("value") == 22


def test_a_waiting_kernel_takes_over_from_a_killed_one(home):
    """Of the steps, only the one that was cut off runs twice."""
    step = "import time\ndef log(i):\n    open('taken', 'a').write(f'{i}\\n'); time.sleep(0.3); return i"
    cell = "%%durable taken\nvalues = [await durable.run('log', log, i) for i in range(4)]"
    taken = home.folder / "taken"
    with kernel(home.folder) as other:
        home.run(step)
        other.run(step)
        home.send(cell)
        home.wait_until(taken, 2)
        waiting = other.send(cell)
        time.sleep(0.1)
        home.kill()
        assert other.wait(waiting).status == "ok"
        assert other.value("values") == [0, 1, 2, 3]
    assert sorted(set(taken.read_text().split())) == ["0", "1", "2", "3"]
    assert len(taken.read_text().split()) <= 5


def test_steps_in_the_order_of_their_ends_are_stored_with_what_the_loop_leaves_behind(home):
    """as_completed's coroutines are awaited, all of them: nobody is told to await them."""
    cell = (
        "%%durable turns\nimport asyncio\nasync def nap(i):\n    await asyncio.sleep(i / 50); return i\nturn = []\n"
        "for step in asyncio.as_completed([durable.run('nap', nap, i) for i in (2, 0, 1)]):\n    turn.append(await step)"
    )
    home.restart()
    assert "not stored" not in home.run(cell).told[-1]
    home.restart()
    assert "restored" in home.run(cell).told[-1]
    assert home.value("turn, type(step).__name__, step.cr_frame") == ([0, 1, 2], "coroutine", None)


def test_a_keyboard_interrupt_of_the_cells_own_code_shows_as_itself(home):
    """With the user's lines, as in a plain cell; the kernel lives on."""
    plain = home.run("def stop():\n    raise KeyboardInterrupt('enough')\nstop()")
    shown = home.run("%%durable enough\ndef stop():\n    raise KeyboardInterrupt('enough')\nstop()")
    assert (plain.error, shown.error) == ("KeyboardInterrupt: enough", "KeyboardInterrupt: enough")
    assert "KeyboardInterrupt(" in shown.traceback
    assert "_run.py" not in shown.traceback
    assert home.value("1 + 1") == 2


def test_what_time_executes_is_code(home):
    """`%time v = ...` binds v and reads what it reads, no more: run again the cell is restored."""
    home.restart()
    home.run("from contextlib import nullcontext\nn, sum_of, k = 10, sum, 1")
    cell = "%%durable timed\n%time v = sum_of(range(n))\nwith nullcontext():\n    %time w = v + 1\nw"
    assert home.run(cell).result == "46"
    again = home.run(cell)
    assert "restored" in again.told[0]
    assert again.stdout.count("Wall time") == 2
    home.run("n = 11")
    assert "running: n changed" in home.run(cell).told[0]
    assert home.value("v, w") == (55, 56)
    assert "running: code changed" in home.run(cell.replace("%time ", "")).told[0], "it prints nothing now"
    assert "running" in home.run("%%durable failing\n%time k = 1 / 0\nx = k").told[0]
    home.run("k = 2")
    assert "running" in home.run("%%durable failing\n%time k = 1 / 0\nx = k").told[0]


def test_where_a_name_hides_the_builtin_input_is_no_question(home):
    home.run("input = 3")
    assert "first run" in home.run("%%durable answered\ny = input + 1").told[0]
    home.run("del input")


def test_a_stopped_cell_says_that_its_thread_goes_on(home):
    """Run again, it waits for that thread, and says since when it goes on."""
    cell = "%%durable threads\nimport time\ndef slow():\n    open('slow', 'a').write('x\\n'); time.sleep(1.5)\n    return 7\n"
    cell += "x = await durable.run('slow one', slow)"
    sent = home.send(cell)
    home.wait_until(home.folder / "slow")
    home.interrupt()
    said = "step 'slow one' is still running in the background; run the cell again to wait for it"
    assert said in home.wait(sent).told[-1]
    again = home.run(cell)
    assert re.search(r"resumes from \d+ s ago", again.told[0]), again.told
    assert (home.folder / "slow").read_text() == "x\n"
    assert home.value("x") == 7
