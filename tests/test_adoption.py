"""An unfinished run is gone on with by the notebook that began it, and by no other while that one's file is there."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
from kernels import LOAD, kernel

from durable_nb._adoption import Origin, may_adopt
from durable_nb._ipython.notebook import origin_of

A, B = "../a.ipynb", "../b.ipynb"


@pytest.mark.parametrize(
    ("began", "asking", "there", "may"),
    [
        (Origin(A, True, "code"), Origin(A, True, "edited"), [A], True),
        (Origin(A, True, "code"), Origin(B, True, "code"), [A, B], False),  # a copy beside its living original
        (Origin(A, True, "code"), Origin(B, True, "edited"), [B], True),  # renamed, and edited
        (Origin(A, False, "code"), Origin(B, False, "code"), [], False),  # never were files here: nothing is gone
        (Origin(A, False, "code"), Origin(A, False, "edited"), [], True),
        (Origin(A, True, "code"), Origin("", False, "code"), [A], True),  # headless
        (Origin(A, True, "code"), Origin("", False, "edited"), [A], False),
        (Origin(A, True, "code"), Origin("", False, "edited"), [], True),
        (Origin("", False, "code"), Origin(B, True, "code"), [B], True),
        (Origin("", False, "code"), Origin(B, True, "other"), [B], False),
        (Origin("", False, "code"), Origin("", False, "other"), [], False),
        (Origin("", False, "code", "1-a"), Origin("", False, "edited", "1-a"), [], True),  # edited in the same kernel
        (Origin("", False, "code", "1-a"), Origin("", False, "other", "1-b"), [], False),
    ],
)
def test_an_unfinished_run_is_adopted_as_far_as_it_is_known_whose_it_is(began, asking, there, may):
    """By its notebook; where that isn't told, by the same code; by any where the notebook's file is gone."""
    assert may_adopt(began, asking, there.__contains__) is may


def test_who_may_adopt_may_go_on_with_what_it_made_itself():
    """Whatever is known of a cell: executed again, unedited, it goes on."""
    for notebook, is_saved, code, exists in itertools.product(("", A), (False, True), ("", "code"), (False, True)):
        origin = Origin(notebook, is_saved, code)
        assert may_adopt(origin, origin, lambda _, exists=exists: exists)


PAID = "def paid():\n    open('paid', 'a').write('x\\n'); return 1"
WAIT = """%%durable wait
x = await durable.run('paid', paid)
open('asleep', 'a').write('x\\n')
await durable.sleep('nap', '1h')"""


@pytest.mark.kernel
def test_notebooks_in_a_folder_with_a_cell_of_one_name_leave_each_others_waits_alone(tmp_path):
    """A copy begins its own wait, with the steps they have in common, and says whose; one that was renamed goes on."""

    loaded: list[str] = []

    def told_until_interrupted(notebook: str, naps: int) -> str:
        with kernel(tmp_path, env={"JPY_SESSION_NAME": str(tmp_path / notebook)}, load=False) as home:
            loaded.append(home.run(LOAD).stdout)
            home.run(PAID)
            sent = home.send(WAIT)
            home.wait_until(tmp_path / "asleep", naps)
            home.interrupt()
            return " ".join(home.wait(sent).told)

    (tmp_path / "a.ipynb").touch()
    (tmp_path / "b.ipynb").touch()
    assert "first run" in told_until_interrupted("a.ipynb", 1)
    copy = told_until_interrupted("b.ipynb", 2)
    assert "first run" in copy
    assert "steps come from a.ipynb" in copy
    again = told_until_interrupted("a.ipynb", 3)
    assert "resumes" in again
    assert "come from" not in again
    (tmp_path / "a.ipynb").rename(tmp_path / "c.ipynb")
    assert "resumes" in told_until_interrupted("c.ipynb", 4)
    assert (tmp_path / "paid").read_text() == "x\n"
    waits = ["run cell 'wait' again" in said for said in loaded]
    assert waits == [False, False, True, True], "told of another notebook's"


def test_a_notebook_is_known_as_its_front_end_tells_it(tmp_path, monkeypatch):
    """From the store's folder, so that the whole may be moved; VS Code's own variable before a Jupyter server's name."""
    monkeypatch.setenv("JPY_SESSION_NAME", "work/a.ipynb")  # as seen from the server's root
    (tmp_path / "a.ipynb").touch()
    assert origin_of("code", {}, tmp_path, tmp_path / ".durable_nb") == Origin("../a.ipynb", True, "code")
    told = {"__vsc_ipynb_file__": str(tmp_path / "b.ipynb")}
    assert origin_of("code", told, tmp_path, tmp_path / ".durable_nb") == Origin("../b.ipynb", False, "code")
    monkeypatch.delenv("JPY_SESSION_NAME")
    assert origin_of("code", {}, tmp_path, tmp_path / ".durable_nb") == Origin(code="code")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the parent's environment can't be seen")
def test_what_a_notebook_executes_headless_does_not_pass_for_that_notebook(tmp_path):
    """papermill in a cell hands the environment down."""
    asks = "from durable_nb._ipython.notebook import origin_of as o; from pathlib import Path; p = Path('/w')"
    asks += "; import sys, subprocess; print(o('', {}, p, p).notebook or 'unknown', flush=True)"
    child = f"{asks}; subprocess.run([sys.executable, '-c', {asks!r}], check=True)"
    env = {**os.environ, "JPY_SESSION_NAME": "/w/a.ipynb"}
    ran = subprocess.run([sys.executable, "-c", child], env=env, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["a.ipynb", "unknown"]
