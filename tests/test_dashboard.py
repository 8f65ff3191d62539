"""The dashboard: what it says of a store, the same everywhere, and what it does in a real JupyterLab."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lab import Lab
from rich.cells import cell_len

import durable_nb as durable
from durable_nb import _records as rec
from durable_nb._cli import main
from durable_nb._current import use_engine
from durable_nb._engine import Engine
from durable_nb._engine.workflows import Workflows
from durable_nb._housekeeping.dashboard import actions_of, dashboard_of
from durable_nb._housekeeping.inventory import Inventory
from durable_nb._journal import Commit
from durable_nb._records import RunRecord
from durable_nb._store import Store
from durable_nb._view import dashboard as live
from durable_nb._view import printed, terminal
from durable_nb._view.assets import script, style
from durable_nb._view.dashboard import LIMIT, state_of
from durable_nb._view.listing import CellFacts, Query, RunFacts, page_of
from durable_nb.testing import FakeClock, MemoryStore, runtime

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = 1_800_000_000.0
HOSTILE = '<img src=x onerror="window.hacked=1"> \x1b[31mred\x1b[0m \u202eright\u202c \x00'


def run_of(i: int, **facts) -> RunFacts:
    usual = RunFacts(f"r-{i}", "workflow", "order", "completed", NOW - i, NOW - i + 0.5, 2, "", (), None)
    return replace(usual, **facts)


def cell_of(name: str, **facts) -> CellFacts:
    return replace(CellFacts(name, "completed", NOW, 1, 2, 1, 3000, 1.0, 4.0, None), **facts)


def page(runs=(), cells=(), query=None, **options):
    return page_of("/somewhere/store", NOW, runs, cells, query or Query(), **options)


# -- choosing -----------------------------------------------------------------------------------------------------------


def test_a_status_a_workflow_and_a_label_choose_together_and_every_status_is_counted_without_its_own_choice():
    runs = [
        run_of(1, status="failed", labels=("shop", "eu")),
        run_of(2, labels=("shop",)),
        run_of(3, name="report", status="failed"),
        run_of(4, kind="cell", name="order", status="failed"),
    ]
    found = page(runs, query=Query(status="failed", kind="workflow", workflow="order", label="shop"))
    assert [run.id for run in found.runs] == ["r-1"]
    assert found.counts == {"completed": 1, "failed": 1}
    assert (found.matched, found.total) == (1, 4)
    assert [run.id for run in page(runs, query=Query(kind="cell")).runs] == ["r-4"]
    assert found.labels == (("shop", 2), ("eu", 1))
    assert set(found.names) == {("workflow", "order", 2), ("workflow", "report", 1), ("cell", "order", 1)}


def test_ten_thousand_runs_come_in_pages_and_a_page_that_there_is_not_is_the_last_one():
    runs = [run_of(i) for i in range(10_000)]
    looked: list[str] = []

    def whole(run):
        looked.append(run.id)
        return run

    last = page(runs, query=Query(page=10**9), whole=whole)
    assert [run.id for run in last.runs] == looked == [f"r-{i}" for i in range(9_975, 10_000)]
    assert (last.query.page, last.pages) == (399, 400)
    assert page(runs, query=Query(page=-3)).query.page == 0
    assert "9,976 to 10,000 of 10,000 runs" in printed.text(last)
    assert "9,976 to 10,000 of 10,000 runs" in printed.html(last)


def test_cells_leave_the_page_where_only_workflows_are_asked_for():
    cells = [cell_of("load"), cell_of("fit", status="failed")]
    assert [cell.name for cell in page((), cells, Query(status="failed")).cells] == ["fit"]
    assert [cell.name for cell in page((), cells, Query(kind="cell", workflow="load")).cells] == ["load"]
    assert page((), cells, Query(kind="workflow")).cells == page((), cells, Query(label="x")).cells == ()


# -- what is said ---------------------------------------------------------------------------------------------------------


def test_hostile_texts_are_texts_in_every_form():
    """No tag, no control character and no turned line leaves a name, a label or an error."""
    run = run_of(1, name=HOSTILE, error=HOSTILE + "x" * 5000, labels=(HOSTILE,), status="failed")
    found = page([run], [cell_of(HOSTILE)])
    html, text = printed.html(found), printed.text(found)
    assert "<img" not in html
    assert "&lt;img src=x" in html
    assert not re.search(r"[\x00\x1b\u202e]", text)
    assert "<img src=x" in text
    assert not re.search(r"[\x00\x1b]", html)
    state = json.dumps(state_of(found, actions_of, version=1))
    assert len(state) <= LIMIT


def test_a_state_fits_into_a_message_however_long_the_texts_are():
    long = "漢" * 5000
    runs = [run_of(i, id=f"{i}-{'漢' * 150}", name=long, error=long, labels=(long,) * 50, status="failed") for i in range(300)]
    found = page(runs, [cell_of(f"{i}{long}") for i in range(100)])
    state = state_of(found, actions_of, version=1)
    assert len(json.dumps(state, ensure_ascii=False).encode()) <= LIMIT
    assert [row["id"] for row in state["runs"]["rows"]] == [run.id for run in runs[:25]]
    opening = {"_esm": script("dashboard"), "_css": style("dashboard"), "state": state}
    assert len(json.dumps(opening, ensure_ascii=False).encode()) <= 62 * 1024
    endless = replace(found, runs=tuple(run_of(i, id="漢" * 9000 + str(i), status="failed") for i in range(25)))
    state = state_of(endless, actions_of, version=1)
    assert len(json.dumps(state, ensure_ascii=False).encode()) <= LIMIT
    assert len({row["id"] for row in state["runs"]["rows"]}) == 25
    assert "too long" in state["runs"]["rows"][0]["actions"][0]["refusal"]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_in_a_narrow_terminal_the_widest_columns_give_way_and_the_spare_ones_go(width):
    """Nothing wraps; with 80 columns every status is whole."""
    from rich.console import Console

    names = ("a workflow of a long name", "漢字漢字漢字漢字漢字漢字")
    runs = [run_of(i, name=names[i % 2], status="failed", error="E: " + "x" * 200, labels=("shop", "weekly")) for i in range(4)]
    written = io.StringIO()
    console = Console(file=written, width=width, color_system=None, **terminal._LITERAL)
    terminal._write(printed.blocks(page(runs)), console)
    lines = written.getvalue().splitlines()
    assert max(cell_len(line.rstrip()) for line in lines) <= width
    assert len([line for line in lines if "r-" in line]) == 4
    if width >= 80:
        assert sum(" failed " in line for line in lines) == 4


def test_a_sleeping_run_that_nobody_executes_says_so_and_when_it_was_to_wake():
    found = page([run_of(1, status="interrupted", ended_at=None, wake_at=NOW + 60)])
    assert "no process is running this" in printed.text(found)
    assert "no process is running this" in printed.html(found)


def test_an_action_that_can_not_act_says_why_and_a_completed_run_has_none():
    again = "retry restart"
    defined = {"failed": again, "cancelled": again, "interrupted": f"{again} cancel", "running": "cancel", "completed": ""}
    for status, names in defined.items():
        assert " ".join(action.name for action in actions_of(run_of(1, status=status))) == names
    for action in actions_of(run_of(1, name="gone", status="failed")):
        assert action.refusal == "its workflow 'gone' is not defined in this kernel"
    assert actions_of(run_of(1, kind="cell", status="failed")) == []
    assert [action.name for action in actions_of(run_of(1, kind="cell", status="interrupted"))] == ["cancel"]


# -- one answer -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "key"))
    monkeypatch.chdir(tmp_path)
    opened = Engine(Store(tmp_path / ".durable_nb"))
    yield opened
    opened.store.close()


def record(engine: Engine, i: int, **facts) -> None:
    scope = rec.scope_of(f"~run r-{i}")
    run = RunRecord(f"r-{i}", "workflow", "order", scope, 0, "", NOW - i, status="completed", ended_at=NOW - i + 0.5)
    run = replace(run, **facts)
    engine.store.writer.commit_and_wait(Commit(puts=(engine.ownership.pack(rec.run_key(run.id), run),)))


def test_an_empty_store_says_what_to_do(engine, capsys):
    found = Inventory(engine).page(Query())
    assert "nothing yet: put '%%durable NAME' above a cell" in printed.text(found)
    assert "nothing yet" in printed.html(found)
    assert main(["ls", "--store", ".durable_nb"]) == 0
    assert "nothing yet" in capsys.readouterr().out


def test_what_is_damaged_is_left_out_and_counted_and_a_broken_journal_is_told(engine, capsys):
    for i in range(3):
        record(engine, i)
    engine.store.writer.commit_and_wait(Commit(puts=(("run/r-1", b"rubbish"),)))
    found = Inventory(engine).page(Query())
    assert [run.id for run in found.runs] == ["r-0", "r-2"]
    assert "1 run or entry can't be read: see 'durable-nb doctor'" in printed.text(found)
    assert main(["ls", "--store", ".durable_nb"]) == 0
    assert "r-2" in (said := capsys.readouterr().out)
    assert "1 run or entry can't be read" in said

    workflows = Workflows(engine)
    shown = dashboard_of(workflows)
    engine.store.journal.close()
    database = engine.store.path / "journal" / "cache.db"
    for file in database.parent.glob("cache.db*"):
        file.write_bytes(b"no database" * 1000)
    assert "the store .durable_nb can't be read" in repr(shown)
    data, _ = shown._repr_mimebundle_()
    assert "can't be read" in data["text/html"]


def test_the_command_line_chooses_as_the_dashboard_does(engine, capsys):
    record(engine, 1, status="failed", error="ValueError: <b>", labels=("shop",))
    record(engine, 2, labels=("shop",))
    record(engine, 3, name="report", status="failed")
    for words, query, expected in [
        ([], Query(), {"r-1", "r-2", "r-3"}),
        (["--status", "failed"], Query(status="failed"), {"r-1", "r-3"}),
        (["--workflow", "order"], Query(kind="workflow", workflow="order"), {"r-1", "r-2"}),
        (["--label", "shop", "--status", "failed"], Query(status="failed", label="shop"), {"r-1"}),
    ]:
        assert main(["ls", "--store", ".durable_nb", *words]) == 0
        printed_out = capsys.readouterr().out
        assert set(re.findall(r"\br-\d\b", printed_out)) == expected
        assert printed_out.strip() == printed.text(Inventory(engine).page(query, 100)).strip()
        assert main(["ls", "--store", ".durable_nb", "--json", *words]) == 0
        assert {run["id"] for run in json.loads(capsys.readouterr().out)["runs"]} == expected
    assert main(["ls", "--store", ".durable_nb", "--limit", "1"]) == 0
    assert "1 to 1 of 3 runs" in capsys.readouterr().out
    for wrong in (["--status", "done"], ["--limit", "0"], ["--limit", "many"]):
        with pytest.raises(SystemExit) as ended:
            main(["ls", "--store", ".durable_nb", *wrong])
        assert ended.value.code == 2


def test_dashboard_in_a_program_is_the_table_and_its_buttons_reach_the_engine(engine, caplog):
    """A program prints it; what the page sends goes through the same calls as `run.cancel()` and `run.resume()`."""

    async def story() -> None:
        workflows = Workflows(engine)
        use_engine(lambda: workflows)

        @durable.workflow(name="board order")
        async def order(cart):
            await durable.sleep("a week", "7d")

        @durable.workflow(name="board looks")
        async def looks():
            durable.dashboard()

        with pytest.raises(durable.NotSupportedError, match="Do it in a step"):
            await looks.start(id="looks-1")
        run = order.start("cart", id="order-1", labels=["shop"])
        while run.status != "sleeping":  # noqa: ASYNC110  a run has no event for it
            await asyncio.sleep(0.01)
        shown = durable.dashboard()
        assert re.search(r"order-1 +board order +sleeping", repr(shown))
        assert "shop" in repr(shown)
        data, metadata = shown._repr_mimebundle_()
        assert data.keys() == {"text/html", "text/plain"}
        assert metadata == {"durable_nb": {"command": "dashboard"}}

        panel = live._Live.__new__(live._Live)
        panel._source, panel._notice, panel._query, panel._loop = shown._source, {}, Query(), None
        panel._wanted = threading.Event()
        panel._attend = lambda: None
        with caplog.at_level(logging.WARNING, "durable_nb"):
            for forged in (
                {"ask": "explode", "run": "order-1"},
                {"ask": "retry", "run": "order-1"},
                {"ask": "cancel", "run": "of-another-store"},
                {"ask": "cancel", "run": ["order-1"]},
                {"ask": "look", "query": {"status": "nonsense"}},
                {"ask": "look", "query": {"page": "1"}},
                {"ask": "look", "query": {"__class__": 1}},
                {"ask": "look", "query": {"label": "x" * 100_000}},
                {"do": "cancel"},
                "cancel",
                None,
            ):
                caplog.clear()
                panel._heard(None, forged, [])
                (line,) = caplog.records
                assert line.getMessage().startswith("the dashboard refused ")
                assert panel._notice["bad"] is True
                assert run.status == "sleeping"
        panel._heard(None, {"ask": "cancel", "run": "order-1"}, [])
        assert panel._notice == {"n": 12, "text": "order-1 is being cancelled; its completed steps are kept", "bad": False}
        with pytest.raises(durable.RunCancelled):
            await run
        panel._heard(None, {"ask": "cancel", "run": "order-1"}, [])
        assert "refused" in panel._notice["text"]
        await decided(panel, caplog)

    try:
        asyncio.run(story())
    finally:
        use_engine(None)


async def decided(panel, caplog) -> None:
    """A run that waits for decisions: what is asked, and who answers is believed once."""

    @durable.workflow(name="board asks")
    async def asks():
        first = durable.approve("publish", "Publish <b>it</b>?")
        return await asyncio.gather(first, durable.approve("publish", "And the \u202eother\u202c one?"))

    run = asks.start(id="asks-1")
    while [step.status for step in run.steps] != ["waiting", "waiting"]:  # noqa: ASYNC110  as above
        await asyncio.sleep(0.01)
    state = state_of(panel._source.page(Query()), actions_of, version=1)
    (row,) = (row for row in state["runs"]["rows"] if row["id"] == "asks-1")
    assert [(ask["path"], ask["prompt"]) for ask in row["asks"]] == [
        ("publish#1", "Publish <b>it</b>?"),
        ("publish#2", "And the \u202eother\u202c one?"),
    ]
    sent = {"ask": "approve", "run": "asks-1", "step": "publish#1", "comment": "fine <i>by</i> me"}
    with caplog.at_level(logging.WARNING, "durable_nb"):
        for forged in ({"step": ["publish#1"]}, {"comment": 7}, {"step": "charge"}, {"step": "publish"}, {"run": "asks-2"}):
            caplog.clear()
            panel._heard(None, {**sent, **forged}, [])
            (line,) = caplog.records
            assert line.getMessage().startswith("the dashboard refused ")
        panel._heard(None, sent, [])
        assert panel._notice["text"] == "publish of asks-1 is approved"
        caplog.clear()
        panel._heard(None, {**sent, "ask": "reject"}, [])
        assert "was approved by" in panel._notice["text"]
        panel._heard(None, {**sent, "ask": "reject", "step": "publish#2", "comment": ""}, [])
    first, second = await run
    assert (first.approved, first.comment, second.approved) == (True, "fine <i>by</i> me", False)


SEEN_ELSEWHERE = """
import asyncio, os, signal
import durable_nb as durable

class Cart:
    def __repr__(self): raise SystemExit("a repr was called")
    def __reduce__(self): return Cart, ()

def charge(cart, api_key, *, note):
    cart["items"].append("changed by the body")
    return {"paid": True, "access_token": "hunter22"}
def get_token(login): return "hunter22"
def decline(cart): raise durable.RetryAfter(3600)
def kill(): os.kill(os.getpid(), signal.SIGKILL)

@durable.workflow(name="seen elsewhere")
async def order(cart):
    await durable.run("charge", charge, cart, "hunter22", note=f"for {os.environ['SHOP_PASSWORD']}")
    await durable.run("get_token", get_token, durable.secret("LOGIN", lambda: "correct horse"))
    await durable.run("opaque", lambda cart: Cart(), Cart())
    declined = asyncio.ensure_future(durable.run("decline", decline, {"id": 7}))
    await durable.run("wait", asyncio.sleep, 0.5, list(range(10_000)))
    await durable.run("kill", kill)

async def main():
    durable.open(".durable_nb")
    await order.start({"id": 7, "items": []}, id="order-7")

asyncio.run(main())
"""


def test_another_process_sees_what_steps_were_given_and_gave(engine, capsys):
    """Of a run whose own process was killed, by every listing: as it was before the body changed it, without secrets, without
    a `__repr__` of the user's, and in a few bytes."""  # fmt: skip
    environment = {**os.environ, "SHOP_PASSWORD": "battery staple"}
    ended = subprocess.run([sys.executable, "-c", SEEN_ELSEWHERE], env=environment, capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr
    inventory = Inventory(engine)
    run = inventory.find_run("order-7")
    told = {step.name: tuple(step.preview) for step in inventory.steps_of(run).steps}
    assert told["charge"] == (
        "{'id': 7, 'items': []}, [redacted], note='for [redacted]'",
        "{'paid': True, 'access_token': [redacted]}",
    )
    assert told["get_token"] == ("durable.secret('LOGIN')", "[redacted]")
    assert told["opaque"] == ("<Cart>", "<Cart>")
    assert told["decline"] == ("{'id': 7}", "")
    assert told["wait"][0].startswith("0.5, [0, 1, 2,")
    assert "10,000 in all" in told["wait"][0]
    assert len("".join(told["wait"])) < 500
    for words in ([], ["--json"]):
        assert main(["show", "order-7", "--store", ".durable_nb", *words]) == 0
        said = capsys.readouterr().out
        assert "{'paid': True, 'access_token': [redacted]}" in said
        assert not re.search("hunter22|correct horse|battery staple", said)
    shown = dashboard_of(Workflows(engine), Query(open="order-7"))
    state = state_of(shown.page(), actions_of, version=1, steps=inventory.steps_of(run).steps)
    assert state["steps"]["rows"][0]["given"] == told["charge"][0]
    kept = b"".join(file.read_bytes() for file in engine.store.path.rglob("cache.db*"))
    assert b"correct horse" not in kept
    assert b"battery staple" not in kept


def test_it_shows_a_store_in_memory():
    """As a test of workflows has it."""

    @durable.workflow(name="board in memory")
    async def order():
        await durable.run("count", len, [1])

    async def story() -> None:
        async with runtime(MemoryStore(), clock=FakeClock()):
            await order.start(id="order-1", labels=["shop"])
            assert re.search(r"order-1 +board in memory +completed .* shop", repr(durable.dashboard()))

    asyncio.run(story())


# -- in a real JupyterLab -------------------------------------------------------------------------------------------------

DEFINE = """%load_ext durable_nb
import asyncio, os, time
import durable_nb as durable

@durable.workflow
async def order(cart):
    await durable.run("charge", len, cart)
    await durable.sleep("a week", "7d")

def mend():
    if not os.path.exists("mended"):
        raise ValueError("not mended: " + HOSTILE)
    return "mended"

@durable.workflow
async def report():
    return await durable.run("mend", mend)

HOSTILE = '<img src=x onerror="window.hacked=1">'
for i in range(3):
    order.start("abc", id=f"order-{i}", labels=["shop", HOSTILE])
failing = report.start(id="report-1", labels=["weekly"])
while failing.status != "failed":
    await asyncio.sleep(0.02)
"""
CELL = "%%durable load\nrows = await durable.run('count', len, [1, 2])"
MANY = """from durable_nb import _records as rec
from durable_nb._current import engine
from durable_nb._journal import Commit
store, now, rows = engine().engine.store, time.time() - 86400, []
for i in range(10_000):
    scope = rec.scope_of(f"~run past-{i:05}")
    past = rec.RunRecord(f"past-{i:05}", "workflow", "past", scope, 0, "", now - i, status="completed", ended_at=now - i + 1)
    rows.append((rec.run_key(past.id), rec.pack(store.signer, rec.run_key(past.id), past)))
_ = store.writer.commit_and_wait(Commit(puts=tuple(rows)))
"""
NAP = "%%durable nap\nimport os\nif os.path.exists('nap'):\n    await durable.sleep('nap', '1h')"
BUSY = "import pathlib\nwhile not pathlib.Path('free').exists(): time.sleep(0.05)"

ELSEWHERE = """
import asyncio, pathlib, sys
import durable_nb as durable

def wait():
    while not pathlib.Path("finish").exists():
        import time; time.sleep(0.02)

@durable.workflow
async def far():
    await durable.run("wait", wait)

async def main():
    durable.open(".durable_nb")
    await far.start(id="far-1")

asyncio.run(main())
"""

BOARD = ".dnb-board"


def rows(lab: Lab) -> list[str]:
    """The runs that are shown, each as the text of its line."""
    return lab.evaluate(
        """() => [...document.querySelectorAll('.dnb-board [role="table"][aria-label="Runs"] [role="rowgroup"] > *')]
          .map((line) => line.innerText.replace(/\\s+/g, " "))"""
    )


def line_of(lab: Lab, run: str, *words: str) -> None:
    """Wait until the line of a run says these words."""
    deadline = time.monotonic() + 30
    while True:
        found = [line for line in rows(lab) if run in line]
        if found and all(word in found[0] for word in words):
            return
        assert time.monotonic() < deadline, f"{run}: {words} never came: {rows(lab)}"
        time.sleep(0.05)


def shown(lab: Lab, lines: int) -> None:
    """Wait until so many runs are shown."""
    lab.wait(f"() => document.querySelectorAll('{BOARD} [aria-label=\"Runs\"] [role=rowheader]').length === {lines}")


def press(lab: Lab, name: str, role: str = "button") -> None:
    lab.on_page(lambda page: page.locator(BOARD).get_by_role(role, name=name, exact=True).click(timeout=15_000))


def choose(lab: Lab, name: str, option: str) -> None:
    lab.on_page(lambda page: page.locator(BOARD).get_by_label(name, exact=True).select_option(label=option, timeout=15_000))


def shoot(lab: Lab, name: str) -> None:
    """Take pictures in both themes, if somebody wants to look at them."""
    if folder := os.environ.get("DURABLE_NB_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for theme in ("Dark", "Light"):
            lab.theme(f"JupyterLab {theme}")
            lab.screenshot(Path(folder) / f"dashboard-{name}-{theme.lower()}.png", f".jp-Cell:has({BOARD})")


@pytest.mark.browser
def test_a_reader_finds_filters_pages_and_stops_runs_of_this_and_of_other_kernels(lab: Lab) -> None:
    """One dashboard from its first sight to a fresh kernel that shows the saved notebook."""
    before = len(lab.outside)
    name = lab.write_notebook([DEFINE, CELL, MANY, BUSY, "durable.dashboard()", NAP])
    (lab.root / "free").touch()
    lab.open(name)
    lab.run_all()
    lab.wait_idle()
    lab.wait_text("Durable cells and runs", BOARD)
    seen_at_first(lab)
    shoot(lab, "many")
    another_kernels_run_comes_and_ends(lab)
    filtered_and_paged(lab)
    cancelled_and_retried(lab)
    by_keyboard(lab)
    narrow(lab)
    while_a_cell_blocks(lab)
    a_cell_is_cancelled(lab)
    kept(lab)
    assert [text for kind, text in lab.console if kind == "error"] == []
    assert lab.outside[before:] == []
    assert lab.evaluate("() => window.hacked") is None


def seen_at_first(lab: Lab) -> None:
    text = lab.text(BOARD)
    assert "load" in text
    assert re.search(r"all\s+10,00[4-6]", text)
    assert re.search(r"failed\s+1\b", text)
    line_of(lab, "order-2", "sleeping", "in 6 d 23", "shop", '<img src=x onerror="window.hacked=1">', "Cancel")
    line_of(lab, "report-1", "failed", "ValueError: not mended", "Retry")
    assert "1 to 25 of 10,00" in text


def another_kernels_run_comes_and_ends(lab: Lab) -> None:
    """Nobody touches the page meanwhile."""
    environment = {**os.environ, "JUPYTER_DATA_DIR": str(lab.home / "data"), "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.Popen([sys.executable, "-c", ELSEWHERE], cwd=lab.root, env=environment)
    try:
        line_of(lab, "far-1", "running", "Cancel")
        (lab.root / "finish").touch()
        line_of(lab, "far-1", "completed")
        assert other.wait(30) == 0
    finally:
        other.kill()
        other.wait()


def filtered_and_paged(lab: Lab) -> None:
    press(lab, "sleeping 3")
    shown(lab, 3)
    assert all("sleeping" in line for line in rows(lab))
    choose(lab, "Workflow or cell", "report (1)")
    lab.wait_text("None that match.", BOARD)
    press(lab, "all 1")
    line_of(lab, "report-1", "failed")
    shown(lab, 1)
    choose(lab, "Workflow or cell", "cell load (1)")
    lab.wait_text("cell load", f"{BOARD} [role=table][aria-label=Runs]")
    choose(lab, "Workflow or cell", "all")
    choose(lab, "Label", "weekly (1)")
    line_of(lab, "report-1")
    shown(lab, 1)
    choose(lab, "Label", "all")
    choose(lab, "Workflow or cell", "past (10,000)")
    lab.wait_text("1 to 25 of 10,000", BOARD)
    press(lab, "Older")
    lab.wait_text("26 to 50 of 10,000", BOARD)
    assert "past-00025" in rows(lab)[0]
    press(lab, "Oldest")
    lab.wait_text("9,976 to 10,000 of 10,000", BOARD)
    assert "past-09999" in rows(lab)[-1]
    disabled = lab.evaluate(
        f"() => [...document.querySelectorAll('{BOARD} nav button')].filter((b) => b.textContent === 'Older')"
        ".at(-1).getAttribute('aria-disabled')"
    )
    assert disabled == "true"
    choose(lab, "Workflow or cell", "all")
    line_of(lab, "order-2")


def cancelled_and_retried(lab: Lab) -> None:
    lab.on_page(lambda page: page.locator(BOARD).get_by_role("button", name="Cancel run order-1").dblclick(timeout=15_000))
    line_of(lab, "order-1", "cancelled", "Retry", "Restart")
    lab.wait_text("order-1 is being cancelled; its completed steps are kept", BOARD)
    press(lab, "Steps of run report-1")
    line_of(lab, "report-1", "failed mend", "not mended: <img src=x")
    (lab.root / "mended").touch()
    press(lab, "Retry run report-1")
    line_of(lab, "report-1", "completed")
    press(lab, "Restart run order-1")
    line_of(lab, "order-1", "cancelled", "Discard what is recorded?")
    press(lab, "Discard what is recorded?")
    lab.wait_text("order-1 begins anew; what was recorded of it is discarded", BOARD)
    line_of(lab, "order-1", "sleeping", "Cancel")
    press(lab, "Cancel run order-1")
    line_of(lab, "order-1", "cancelled")


def by_keyboard(lab: Lab) -> None:
    """Tab reaches the filters and the buttons, and Enter presses them."""
    chip = f"document.querySelector('{BOARD} .dnb-chip')"
    lab.evaluate(f"() => {chip}.focus()")
    lab.on_page(lambda page: page.keyboard.press("Tab"))
    word = lab.evaluate("() => document.activeElement.innerText.split(/\\s/)[0]")
    assert word in {"sleeping", "running", "completed"}
    lab.on_page(lambda page: page.keyboard.press("Enter"))
    lab.wait(
        f"() => document.activeElement.getAttribute('aria-pressed') === 'true' && document.activeElement.closest('{BOARD}')"
    )
    unnamed = lab.evaluate(
        f"""() => [...document.querySelectorAll('{BOARD} button, {BOARD} select')]
          .filter((node) => !(node.innerText || node.getAttribute("aria-label") || node.labels?.length)).length"""
    )
    assert unnamed == 0
    press(lab, lab.evaluate(f"() => {chip}.innerText.replace(/\\s+/g, ' ')"))


def narrow(lab: Lab) -> None:
    """At 400 px all is within reach: nothing is cut off at the side."""
    lab.on_page(lambda page: page.set_viewport_size({"width": 400, "height": 800}))
    lab.command("application:toggle-left-area")
    try:
        lab.wait(f"() => document.querySelector('{BOARD}').getBoundingClientRect().right <= 401")
        beyond = lab.evaluate(
            f"""() => [...document.querySelectorAll('{BOARD} button, {BOARD} .dnb-name, {BOARD} select')]
              .filter((node) => node.getClientRects().length && node.getBoundingClientRect().right > 401)
              .map((node) => node.outerHTML)"""
        )
        assert beyond == []
        shoot(lab, "narrow")
    finally:
        lab.command("application:toggle-left-area")
        lab.on_page(lambda page: page.set_viewport_size({"width": 1300, "height": 900}))


def while_a_cell_blocks(lab: Lab) -> None:
    """A cell that never awaits keeps messages waiting, and the dashboard goes on telling."""
    (lab.root / "free").unlink()
    lab.evaluate(
        "() => { const nb = window.jupyterapp.shell.currentWidget.content; nb.activeCellIndex = 3; nb.deselectAll(); }"
    )
    lab.command("notebook:run-cell")
    environment = {**os.environ, "JUPYTER_DATA_DIR": str(lab.home / "data"), "PYTHONPATH": os.pathsep.join(sys.path)}
    program = ELSEWHERE.replace("far-1", "far-2")
    try:
        done = subprocess.run([sys.executable, "-c", program], cwd=lab.root, env=environment, timeout=60, check=False)
        assert done.returncode == 0
        line_of(lab, "far-2", "completed")
    finally:
        (lab.root / "free").touch()
    lab.wait_idle()


def a_cell_is_cancelled(lab: Lab) -> None:
    """While it runs in this very kernel."""
    (lab.root / "nap").touch()
    lab.evaluate("() => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = 5; }")
    lab.command("notebook:run-cell")
    line_of(lab, "cell nap", "sleeping", "in 59:", "Cancel")
    run = next(line for line in rows(lab) if "cell nap" in line).split("cell nap ")[1].split()[0]
    press(lab, f"Cancel run {run}")
    lab.wait_text("RunCancelled", ".jp-Cell:nth-child(6) .jp-OutputArea")
    line_of(lab, run, "cancelled")
    lab.wait_idle()


def kept(lab: Lab) -> None:
    """Reloaded it lives on; in a fresh kernel the saved notebook shows what was, as html."""
    lab.save()
    lab.reload()
    lab.wait_text("Durable cells and runs", BOARD, patience_s=60)
    line_of(lab, "order-1", "cancelled")
    assert [text for kind, text in lab.console if kind == "error"] == []
    lab.restart_kernel()
    press(lab, lab.evaluate(f"() => document.querySelector('{BOARD} .dnb-chip').innerText.replace(/\\s+/g, ' ')"))
    lab.wait_text("the kernel was restarted: run the cell again", BOARD)
    assert "Cannot send" not in str(lab.console)  # JupyterLab has something to say of its own
    name = lab.evaluate("() => window.jupyterapp.shell.currentWidget.context.path")
    lab.open(name)
    still = ".jp-Cell:nth-child(5) .jp-OutputArea"
    lab.wait_text("as of ", still)
    text = lab.text("body")
    assert "order-2" in lab.text(still)
    assert "model not found" not in text.lower()
    assert "error displaying" not in text.lower()
    assert lab.text(BOARD) == ""


# -- without scripts ------------------------------------------------------------------------------------------------------


def read_without_scripts(lab: Lab, html: str, file: Path, read: Callable[[Any], None]) -> None:
    """Open a page with scripts off, and read it; nothing of it is fetched from elsewhere."""
    file.write_text(html)
    asked: list[str] = []

    def look(page: Any) -> None:
        context = page.context.browser.new_context(java_script_enabled=False, viewport={"width": 1000, "height": 900})
        try:
            still = context.new_page()
            still.on("request", lambda request: asked.append(request.url))
            still.goto(file.as_uri())
            read(still)
        finally:
            context.close()

    lab.on_page(look)
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


@pytest.mark.browser
def test_a_saved_dashboard_is_read_where_no_script_runs_and_where_styles_are_stripped(lab: Lab, engine: Engine) -> None:
    """nbconvert's page, also with no more than GitHub lets pass: tables to read, folds to open."""
    import bleach
    import nbformat
    from nbconvert import HTMLExporter

    for i in range(30):
        record(engine, i, labels=("<script>window.hacked=1</script>",), error="ValueError: " + "long " * 60, status="failed")
    data, metadata = dashboard_of(Workflows(engine))._repr_mimebundle_()
    tags = {*bleach.ALLOWED_TAGS, *"div p br pre span details summary table thead tbody tr th td".split()}
    stripped = bleach.clean(data["text/html"], tags=tags, attributes={"details": ["open"]}, strip=True)

    def read(page: Any) -> None:
        text = page.locator("body").inner_text()
        assert "Durable cells and runs" in text
        assert "<script>window.hacked=1</script>" in text
        assert page.get_by_text("1 to 25 of 30 runs").is_visible()
        fold = page.locator("details", has_text="long long").locator("details").first
        assert not fold.locator("pre").is_visible()
        fold.locator("summary").click()
        assert fold.locator("pre").is_visible()
        page.locator("summary", has_text="Runs").first.click()
        assert not page.get_by_text("1 to 25 of 30 runs").is_visible()

    for n, shown in enumerate((data["text/html"], stripped)):
        output = nbformat.v4.new_output("display_data", data={**data, "text/html": shown}, metadata=metadata)
        cell = nbformat.v4.new_code_cell("%durable", outputs=[output], execution_count=1)
        html, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
        read_without_scripts(lab, html, engine.store.path.parent / f"saved-{n}.html", read)


@pytest.mark.browser
def test_a_notebook_of_the_package_is_read_where_no_script_runs(lab: Lab, tmp_path: Path) -> None:
    """Its figures are seen, its views and its dashboard are read, and whatever folds, unfolds."""
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter().from_filename(str(Path(__file__).parent.parent / "notebooks" / "02_coffee.ipynb"))

    def read(page: Any) -> None:
        figures = page.locator(".jp-OutputArea img")
        assert figures.count() == 3
        assert all(figures.nth(i).bounding_box()["height"] > 100 for i in range(3))
        folded = page.locator(".jp-OutputArea details:not([open]) > summary:visible")
        for _ in range(1000):  # one that is opened leaves the list, and may bring others into it
            if not folded.count():
                break
            folded.first.click()
        assert folded.count() == 0
        assert "bootstrap" in page.locator(".durable-nb-still").inner_text()
        if folder := os.environ.get("DURABLE_NB_SCREENSHOTS"):
            page.screenshot(path=str(Path(folder) / "coffee.png"), full_page=True)

    read_without_scripts(lab, html, tmp_path / "coffee.html", read)


@pytest.mark.browser
def test_the_script_needs_no_widget(lab: Lab) -> None:
    """Any page may show it that has an object to ask: `get`, `on`, `off`, `send`."""
    runs = [run_of(1, name="</script><img src=x onerror=window.hacked=1>", status="failed", error=HOSTILE), run_of(2)]
    states = [
        state_of(page(runs, query=query), actions_of, version=n) for n, query in enumerate([Query(), Query(status="failed")])
    ]
    module = f"""
      {script("dashboard")}
      const [first, second] = {json.dumps(states).replace("<", chr(92) + "u003c")};
      const heard = new Set();
      window.sent = [];
      window.model = {{
        state: first,
        get(name) {{ return name === "anchor" ? "dnb-at-here" : this.state; }},
        on(_, f) {{ heard.add(f); }},
        off(_, f) {{ heard.delete(f); }},
        send(message) {{ window.sent.push(message); }},
        tell() {{ this.state = second; for (const f of heard) f(); }},
      }};
      window.unmount = mount({{ model: window.model, el: document.body }});
      window.listeners = heard;
      window.begin = () => initialize({{ model: window.model }});
    """

    def look(tab) -> None:
        fresh = tab.context.browser.new_page()
        try:
            fresh.set_content(f"<style>{style('dashboard')}</style><body><script type=module>{module}</script>")
            board = fresh.locator(".dnb-board")
            board.wait_for()
            assert fresh.evaluate("window.sent") == [{"ask": "look", "query": states[0]["query"]}]
            board.get_by_role("button", name="failed 1", exact=True).click()
            assert fresh.evaluate("window.sent.at(-1)")["query"]["status"] == "failed"
            fresh.evaluate("window.model.tell()")
            board.get_by_text("1 of 2").wait_for()
            retry = board.get_by_role("button", name="Retry: its workflow")
            assert retry.get_attribute("aria-disabled") == "true"
            sent = fresh.evaluate("window.sent.length")
            retry.click(force=True)
            assert fresh.evaluate("window.sent.length") == sent
            assert fresh.evaluate("window.hacked") is None
            fresh.evaluate("window.unmount()")
            assert fresh.evaluate("window.listeners.size") == 0
            assert not board.is_visible()

            # in the place of what the kernel displayed, wherever that is, when it comes, and when it comes back
            fresh.evaluate("() => { window.leave = window.begin(); }")
            place = "<div class=dnb-at-here><p>as of 12:00</p></div>"
            fresh.evaluate(f"document.body.insertAdjacentHTML('beforeend', '{place}')")
            board.wait_for()
            still = fresh.get_by_text("as of 12:00")
            assert not still.is_visible()
            fresh.evaluate("window.place = document.querySelector('.dnb-at-here'); window.place.remove()")
            fresh.evaluate("() => new Promise((seen) => setTimeout(seen, 400))")  # longer than it takes to be missed
            fresh.evaluate("document.body.append(window.place)")
            assert board.is_visible()
            assert board.count() == 1
            fresh.evaluate("window.leave()")
            assert still.is_visible()
            assert not board.is_visible()
        finally:
            fresh.close()

    lab.on_page(look)
