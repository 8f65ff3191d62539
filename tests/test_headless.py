"""Cells that are restored, run, stored, planned and explained in a plain process: no shell, and no IPython to import."""

import ast
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from durable_nb._cellcache.cache import After, CellCache, CellCode, Hit, Stored
from durable_nb._cellcache.entries import Entries
from durable_nb._cellcache.forecast import Executed, Notebook, Planned, run_all
from durable_nb._cellcache.names import names_of
from durable_nb._cellcache.report import ExecutionReport
from durable_nb._cellcache.watch import watching
from durable_nb._codec import Signer
from durable_nb._housekeeping.planning import plan_table, why_table


class Runner:
    """A namespace and a cache: the smallest runner of cells there is."""

    def __init__(self, folder: Path) -> None:
        self.namespace = {"__name__": "__main__"}
        self.cache = CellCache(Entries(folder / "cells", Signer(b"k" * 32)), [str(folder)])
        self.executed = {}

    def run(self, name: str, source: str) -> ExecutionReport:
        """Restore the cell, or execute and store it."""
        tree = ast.parse(textwrap.dedent(source))
        code = CellCode(name, tree, names_of(tree))
        report = ExecutionReport(time.time())
        key = self.cache.key(code, self.namespace)
        report.key, report.components = key.key, key.components
        found = self.cache.lookup(code, self.namespace, key)
        if isinstance(found, Hit):
            found.apply(self.namespace)
            report.restored, report.nearest, report.kept = True, found.manifest, found.manifest
        else:
            why = self.cache.why(code, self.namespace, key)
            report.why, report.nearest, report.differences = ", ".join(why.found) or "first run", why.nearest, why.differences
            before = self.cache.begin(code, self.namespace, key, why.notes)
            with watching(before.watch), before.effects.noticing():
                exec(compile(tree, name, "exec"), self.namespace)
            saved = self.cache.save(before, After([], b"", 0, 1.0))
            report.changed = saved.changed
            if isinstance(saved, Stored):
                report.kept = saved.manifest
            else:
                report.not_stored = saved.why
        self.executed[name] = Executed(Planned(code), report)
        return report

    def plan(self, **edited: str):
        """What Run All would do, were these cells edited so."""
        cells = dict(self.executed)
        for name, source in edited.items():
            tree = ast.parse(source)
            cells[name] = Executed(Planned(CellCode(name, tree, names_of(tree))), cells[name].report)
        return run_all(self.cache.entries, self.namespace, cells)


LOAD, TOTAL = "rows = [1, 2, 3]", "total = sum(rows)"


@pytest.fixture
def book(tmp_path):
    return Runner(tmp_path)


def test_a_cell_is_run_stored_and_restored_without_a_shell(tmp_path, book):
    """A second runner on the same store, with a namespace of its own, restores what the first one computed."""
    assert [book.run("load", LOAD).why, book.run("total", TOTAL).why] == ["first run", "first run"]
    again = Runner(tmp_path)
    assert [again.run("load", LOAD).restored, again.run("total", TOTAL).restored] == [True, True]
    assert again.namespace["total"] == 6


def test_plan_and_why_tell_what_an_edit_will_cost_without_a_shell(book):
    """`plan` forecasts hits, the edited cell's run and what depends on it; `why` shows the lines that differ."""
    book.run("load", LOAD)
    book.run("total", TOTAL)
    assert [(one.name, one.what) for one in book.plan()] == [("load", "hit"), ("total", "hit")]
    edited = book.plan(load="rows = [1, 2, 4]")
    assert [(one.what, one.why) for one in edited] == [("run", "code changed"), ("depends", "on what load makes")]
    assert "1 cell would run, 1.0 s as recorded; 1 cell may run, up to 1.0 s" in plan_table(edited, {}).text()
    broken = {**book.executed, "load": Executed(Planned(None), book.executed["load"].report)}
    found = run_all(book.cache.entries, book.namespace, broken)
    assert (found[0].what, found[0].why) == ("run", "its code can't be compiled")
    book.namespace["rows"] = [5]
    report = book.run("total", TOTAL)
    assert report.why == "rows changed"
    text = why_table(book.cache.entries, book.namespace, "total", book.executed["total"], book.plan()[1]).text()
    assert "ran: rows changed" in text
    assert "list of 3 → list of 1" in text


def test_what_another_process_executed_is_planned_from_its_record_alone(book):
    """A new process knows a cell by its last execution and its text in the notebook's file; it has no values."""
    from durable_nb._cellcache.executions import LastExecution

    report = book.run("load", LOAD)
    last = {"load": LastExecution(report.key, report.components["code"], report.at)}
    tree = ast.parse("rows = []")
    written = {"load": Planned(CellCode("load", tree, names_of(tree)))}
    ask = lambda *known: run_all(book.cache.entries, {}, {}, Notebook(("load",), last, *known))[0]
    assert (ask().what, ask(written, report.at - 1).what) == ("hit", "hit")
    assert (ask(written, report.at + 1).what, ask(written, report.at + 1).why) == ("run", "code changed")
    broken = {"load": Planned(None)}
    assert ask(broken, report.at + 1).what == "run"


def test_none_of_it_imports_ipython(tmp_path):
    """In a process in which IPython can't be imported, the tests above pass."""
    code = f"""
        import sys
        sys.modules.update(dict.fromkeys(["IPython", "ipykernel", "ipywidgets", "anywidget"]))  # importing them fails
        from pathlib import Path
        import test_headless as t
        book = t.Runner(Path({str(tmp_path)!r}))
        book.run("load", t.LOAD); book.run("total", t.TOTAL)
        assert book.run("total", t.TOTAL).restored
        print([one.what for one in book.plan()])
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    assert (found.returncode, found.stdout.strip()) == (0, "['hit', 'hit']"), found.stderr
