"""What a stranger tried in real kernels and found right: it shall stay so."""

from __future__ import annotations

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
