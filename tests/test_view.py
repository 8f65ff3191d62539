"""What a reader sees of a run: live in JupyterLab, and for good in the saved notebook."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from durable_nb._facts import Snapshot, Status, Step
from durable_nb._view import RunView, static, widget
from durable_nb._view.state import LIMIT, difference, size, whole
from durable_nb._view.window import by_interest, window
from durable_nb._view.words import word

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from lab import Lab

pytest_plugins = ["lab"]

MESSAGE = 64 * 1024


def done(i: int, **facts: Any) -> Step:
    return replace(Step(f"step {i}", f"step {i}", "call", Status.COMPLETED, 1, 100.0 + i, 100.5 + i), **facts)


def run_of(*steps: Step, **facts: Any) -> Snapshot:
    return replace(Snapshot("run-1", "nightly", Status.RUNNING, 100.0, None, steps), **facts)


class TestStatic:
    """A finished run as html and as text."""

    def test_text_is_an_aligned_table(self) -> None:
        snapshot = run_of(
            Step("charge", "charge", "call", Status.COMPLETED, 1, 1.0, 2.0, restored=True),
            Step("load", "load", "call", Status.COMPLETED, 1, 1.0, 2.0, restored=True),
            Step("fetch the rates", "fetch", "call", Status.COMPLETED, 3, 101.0, 112.25, error="OSError: no\n\troute"),
            Step("计算", "计算", "run", Status.COMPLETED, 1, 101.0, 101.34),
            status=Status.COMPLETED,
            ended_at=112.4,
        )
        assert static.text(snapshot).splitlines() == [
            "nightly · completed in 12.4 s · 4 steps, 2 restored",
            "  step             status       time  attempts",
            "  charge           restored",
            "  load             restored",
            "  fetch the rates  completed  11.2 s         3",
            "    OSError: no route",
            "  计算             completed  340 ms",
        ]

    def test_a_column_that_nobody_needs_is_left_out(self) -> None:
        assert "attempts" not in static.text(run_of(done(1)))
        assert "attempts" not in static.html(run_of(done(1)))

    def test_whatever_a_user_wrote_is_escaped(self) -> None:
        evil = "<script>alert('x')</script>"
        snapshot = run_of(done(1, name=evil, error=evil), done(2, error=f"{evil}\n{evil}"), name=evil, status=Status.FAILED)
        html = static.html(snapshot, note=evil)
        assert "<script" not in html
        assert html.count("&lt;script&gt;") == 7

    def test_text_moves_no_cursor_and_stays_on_its_line(self) -> None:
        lines = static.text(run_of(done(1, name="\x1b[31mred\r\nx", error="\x07" * 3))).splitlines()
        assert all(line.isprintable() for line in lines)
        assert len(lines) == 4

    def test_a_long_run_shows_its_ends_and_its_failures(self) -> None:
        steps = [done(i, restored=i < 5000) for i in range(10_000)]
        steps[5000] = replace(steps[5000], status=Status.FAILED, error="ValueError: 7")
        snapshot = run_of(*steps, status=Status.FAILED, ended_at=20_000.0)
        text = static.text(snapshot)
        assert "  … 4,980 more restored\n  step 5000  failed" in text
        assert "  … 4,949 more completed\n" in text
        assert len(text.splitlines()) < 100
        assert len(static.html(snapshot)) < MESSAGE

    def test_a_run_without_steps_has_no_table(self) -> None:
        assert static.text(run_of(), now=101.0) == "nightly · running for 1.0 s · 0 steps"
        assert "<table" not in static.html(run_of())

    def test_the_same_facts_always_give_the_same_table(self) -> None:
        """Else a notebook that is run again has a diff although nothing changed."""
        sleeping = done(1, status=Status.SLEEPING, ended_at=None, wake_at=1_700_000_000.0)
        snapshot = run_of(sleeping, done(2, status=Status.RUNNING, ended_at=None))
        assert "until 2023-11-14 22:13:20 UTC" in static.text(snapshot)
        assert static.bundle(snapshot) == static.bundle(snapshot)


class TestState:
    """What the live view is told."""

    @pytest.mark.parametrize("status", [Status.COMPLETED, Status.RUNNING, Status.FAILED])
    @pytest.mark.parametrize("awful", ["x", "\N{PILE OF POO}", "\ud800"])
    def test_ten_thousand_steps_fit_into_one_message(self, status: Status, awful: str) -> None:
        """Whatever their state, and however long their names and errors."""
        steps = [
            done(i, name=awful * 5000, path=f"{i}{awful * 5000}", status=status, error=awful * 9000, attempts=9)
            for i in range(10_000)
        ]
        state = whole(run_of(*steps), version=1, now=200.0, pages=(300, 9000))
        assert size(state) <= LIMIT
        assert len(state["rows"]) > 3
        assert len(state["rows"]) + sum(gap["to"] - gap["from"] for gap in state["gaps"]) == 10_000

    def test_what_is_active_or_broken_is_always_shown(self) -> None:
        steps = [done(i) for i in range(10_000)]
        for i in range(30, 9000, 100):
            steps[i] = replace(steps[i], status=Status.RUNNING if i < 5000 else Status.FAILED)
        shown = {row["i"] for row in whole(run_of(*steps), version=1, now=200.0)["rows"]}
        assert shown >= {*range(20), *range(30, 9000, 100), *range(9950, 10_000)}

    def test_a_difference_holds_the_changed_rows_only_and_leads_to_the_new_state(self) -> None:
        steps = [done(i) for i in range(10_000)]
        steps[500] = replace(steps[500], status=Status.RUNNING, ended_at=None)
        old = whole(run_of(*steps), version=1, now=200.0)
        steps[500] = done(500)
        steps[600] = replace(steps[600], status=Status.FAILED, error="E: x")
        new = whole(run_of(*steps, done(10_000)), version=2, now=201.0)
        message = difference(old, new)
        assert [row["i"] for row in message["rows"]] == [600, 10_000]
        assert size(message) < 1024

        rows = {row["i"]: row for row in old["rows"]} | {row["i"]: row for row in message["rows"]}
        out_of_sight = {i for gap in message["gaps"] for i in range(gap["from"], gap["to"])}
        assert [rows[i] for i in sorted(rows.keys() - out_of_sight)] == new["rows"]

    def test_the_gaps_count_what_they_hide(self) -> None:
        steps = [done(i, restored=i % 2 == 0) for i in range(1000)]
        view = window([word(step) for step in steps], by_interest(steps, pages=(100,)))
        assert [(gap.start, gap.stop, gap.counts) for gap in view.gaps] == [
            (20, 100, {"restored": 40, "completed": 40}),
            (150, 950, {"restored": 400, "completed": 400}),
        ]

    def test_a_gap_is_never_of_one_step(self) -> None:
        steps = [done(i) for i in range(1000)]
        steps[21] = replace(steps[21], status=Status.RUNNING)
        view = window([word(step) for step in steps], by_interest(steps))
        assert [(gap.start, gap.stop) for gap in view.gaps] == [(22, 950)]


class FastLoop(asyncio.SelectorEventLoop):
    """A loop on which nobody waits: when nothing is ready the clock jumps to the next timer."""

    now = 1000.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        waiting = [handle.when() for handle in self._scheduled if not handle.cancelled()]
        if waiting and not self._ready:
            self.now = max(self.now, min(waiting))
        super()._run_once()


class Desk:
    """A view under test: its run, the messages of its widget as they go on the wire, and its display."""

    def __init__(self) -> None:
        self.facts = run_of(done(0))
        self.sent: list[tuple[float, str, dict[str, Any]]] = []
        self.shown: list[dict[str, Any]] = []
        self.view = RunView(lambda: self.facts, live=True)

    def set(self, **facts: Any) -> None:
        self.facts = replace(self.facts, **facts)
        self.view.changed()

    def display(self, data: dict[str, Any], run_id: str) -> Desk:
        self.shown.append(data)
        return self

    def update(self, data: dict[str, Any], *, raw: bool, metadata: dict[str, Any]) -> None:
        assert raw
        assert metadata == {"durable_nb": {"view": "run-1"}}
        self.shown.append(data)

    def run(self, story: Callable[[], Awaitable[None]]) -> None:
        async def told() -> None:
            await story()

        with asyncio.Runner(loop_factory=FastLoop) as runner:
            runner.run(told())

    def updates(self) -> list[dict[str, Any]]:
        return [data for _, kind, data in self.sent if kind == "comm_msg"]


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    import comm
    from ipywidgets.widgets.widget import _instances as alive

    desk = Desk()

    class Wire(comm.DummyComm):
        def publish_msg(self, msg_type: str, data: Any = None, **rest: Any) -> None:
            try:
                now = asyncio.get_running_loop().time()
            except RuntimeError:
                now = 0.0
            desk.sent.append((now, msg_type, json.loads(json.dumps(data or {}))))

    monkeypatch.setattr(comm, "create_comm", Wire)
    monkeypatch.setattr(widget, "_display", desk.display)
    before = set(alive)
    yield desk
    desk.view.close()
    assert set(alive) == before, "a closed view leaves widgets behind"


class TestLive:
    """The widget's messages, and the life of a view."""

    def test_thousands_of_changes_become_eight_updates_a_second(self, desk: Desk) -> None:
        async def story() -> None:
            desk.view.open()
            for i in range(10_000):  # in ten seconds
                desk.set(steps=(done(0, attempts=i),))
                await asyncio.sleep(0.001)

        desk.run(story)
        assert 70 <= len(desk.updates()) <= 81
        times = [at for at, kind, _ in desk.sent if kind == "comm_msg"]
        assert min(b - a for a, b in itertools.pairwise(times)) > 0.124

    def test_a_change_alone_is_shown_at_once_and_the_last_one_is_never_lost(self, desk: Desk) -> None:
        async def story() -> None:
            desk.view.open()
            desk.set(steps=(done(0), done(1)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert len(desk.updates()) == 1
            desk.set(steps=(done(0), done(1), done(2)))
            await asyncio.sleep(1)

        desk.run(story)
        assert desk.updates()[-1]["state"]["state"]["total"] == 3

    def test_nothing_new_sends_nothing(self, desk: Desk) -> None:
        async def story() -> None:
            desk.view.open()
            for _ in range(10):
                desk.view.changed()
                await asyncio.sleep(0.5)

        desk.run(story)
        assert desk.updates() == []

    def test_a_silent_run_is_told_every_ten_seconds(self, desk: Desk) -> None:
        """A front end takes longer silence for a dead kernel."""

        async def story() -> None:
            desk.view.open()
            await asyncio.sleep(61)

        desk.run(story)
        assert len(desk.updates()) == 6

    def test_of_ten_thousand_steps_differences_are_sent_and_soon_the_whole(self, desk: Desk) -> None:
        """The whole repairs a front end that missed a difference."""
        steps = [done(i, name=f"a name of some length {i}") for i in range(10_000)]

        async def story() -> None:
            desk.facts = run_of(*steps)
            desk.view.open()
            for i in range(8):
                steps.append(done(10_000 + i))
                desk.set(steps=tuple(steps))
                await asyncio.sleep(0.2)
            await asyncio.sleep(5)

        desk.run(story)
        assert all(len(json.dumps(data)) <= MESSAGE for _, _, data in desk.sent)
        *differences, last = desk.updates()
        assert len(differences) == 8
        assert all(len(json.dumps(message)) < 2000 for message in differences)
        assert last["method"] == "update"
        assert last["state"]["state"]["version"] == 9
        assert last["state"]["state"]["total"] == 10_008

    def test_the_message_that_opens_the_widget_is_small_enough(self, desk: Desk) -> None:
        """JavaScript, style and the state of a long run in one."""

        async def story() -> None:
            desk.facts = run_of(*(done(i, error="E: " + "x" * 3000) for i in range(10_000)))
            desk.view.open()

        desk.run(story)
        opening = max(len(json.dumps(data)) for _, kind, data in desk.sent if kind == "comm_open")
        assert LIMIT < opening <= MESSAGE

    def test_a_reader_may_ask_for_the_steps_in_a_gap(self, desk: Desk) -> None:
        async def story() -> None:
            desk.facts = run_of(*(done(i) for i in range(10_000)))
            desk.view.open()
            for question in ({"ask": "page", "from": 20}, {"ask": "page", "from": "x"}, "nonsense", {"ask": None}):
                desk.view._heard(None, question, [])
            await asyncio.sleep(1)

        desk.run(story)
        (message,) = desk.updates()[:1]
        assert [row["i"] for row in message["content"]["rows"]] == list(range(20, 70))

    def test_changes_may_come_from_any_thread(self, desk: Desk) -> None:
        async def story() -> None:
            desk.view.open()
            for i in range(3):
                thread = threading.Thread(target=desk.set, kwargs={"steps": (done(0), done(i))})
                thread.start()
                thread.join()
                await asyncio.sleep(1)

        desk.run(story)
        assert len(desk.updates()) == 3
        desk.set(name="after the loop has ended")

    def test_the_live_display_carries_text_for_a_notebook_saved_meanwhile(self, desk: Desk) -> None:
        async def story() -> None:
            desk.view.open()
            desk.view.open()

        desk.run(story)
        (live,) = desk.shown
        assert "run the cell again" in live["text/plain"]
        assert "step 0" in live["text/html"]
        assert "application/vnd.jupyter.widget-view+json" in live

    def test_close_puts_static_forms_in_its_place_once(self, desk: Desk) -> None:
        async def story() -> None:
            desk.view.open()
            desk.set(status=Status.COMPLETED, ended_at=105.0)
            desk.view.close()
            desk.view.close()
            desk.view.open()
            desk.view.changed()
            await asyncio.sleep(5)

        desk.run(story)
        _, final = desk.shown
        assert final.keys() == {"text/html", "text/plain"}
        assert final["text/plain"].startswith("nightly · completed in 5.0 s")
        assert desk.updates() == []

    def test_without_a_front_end_there_is_only_the_end(self, desk: Desk) -> None:
        desk.view = RunView(lambda: desk.facts, live=False)
        desk.view.open()
        desk.view.changed()
        assert (desk.shown, desk.sent) == ([], [])
        desk.view.close()
        (final,) = desk.shown
        assert final.keys() == {"text/html", "text/plain"}

    def test_a_view_never_opened_shows_nothing(self, desk: Desk) -> None:
        desk.view.changed()
        desk.view.close()
        assert (desk.shown, desk.sent) == ([], [])


# A run of fakes, driven through the view as the engine drives it.
DRIVE = '''
import asyncio, pathlib, time
from dataclasses import replace
from durable_nb._facts import Snapshot, Status, Step
from durable_nb._ipython.status import StatusLine
from durable_nb._view import RunView

class Run:
    def __init__(self, name, *, live=True):
        self.facts = Snapshot("run-1", name, Status.RUNNING, time.time(), None, ())
        self.view = RunView(lambda: self.facts, live=live)
    def step(self, name, **facts):
        """Add a step, or change it."""
        steps = {step.path: step for step in self.facts.steps}
        steps[name] = replace(steps.get(name, Step(name, name, "call", Status.PENDING)), **facts)
        self.facts = replace(self.facts, steps=tuple(steps.values()))
        self.view.changed()
    def end(self, status):
        self.facts = replace(self.facts, status=status, ended_at=time.time())
        self.view.close()

async def until(path):
    while not pathlib.Path(path).exists():
        await asyncio.sleep(0.02)
'''

NIGHTLY = """
run = Run("nightly")
run.view.open()
now = time.time()
run.step("load customers", status=Status.COMPLETED, restored=True, started_at=now - 500, ended_at=now - 480)
run.step("fetch rates", status=Status.COMPLETED, started_at=now, ended_at=now + 0.34)
run.step("charge <img src=x onerror=alert(1)>", status=Status.FAILED, started_at=now + 0.3, ended_at=now + 0.9,
         attempts=3, error="CardError: <script>alert(1)</script> declined\\nask for another card")
run.step("cool down", kind="sleep", status=Status.SLEEPING, started_at=now, wake_at=now + 300)
run.step("score", status=Status.RUNNING, started_at=now)
run.step("send mail", status=Status.RETRYING, started_at=now, wake_at=now + 3700, attempts=2, error="OSError: no route")
run.step("publish")
await until("nightly-go")
for name in ("score", "cool down", "send mail", "publish"):
    run.step(name, status=Status.COMPLETED, ended_at=time.time())
await until("nightly-end")
run.end(Status.COMPLETED)
"""

QUIET = """
run = Run("quiet", live=False)
run.view.open()
run.step("one", status=Status.COMPLETED, restored=True)
run.end(Status.COMPLETED)
"""

LONG = """
run = Run("long")
now = time.time()
rows = [f"row {i}" for i in range(10_000)]
steps = [Step(row, row, "call", Status.COMPLETED, 1, now, now + 1, restored=i < 9000) for i, row in enumerate(rows)]
run.facts = replace(run.facts, steps=tuple(steps))
StatusLine("long", shown=True, live=True).show("running", "first run")
run.view.open()
for tick in range(100_000):
    steps.append(Step(f"row {len(steps)}", f"row {len(steps)}", "call", Status.RUNNING, 1, time.time()))
    if len(steps) > 10_100:
        steps[-101] = replace(steps[-101], status=Status.COMPLETED, ended_at=time.time())
    run.facts = replace(run.facts, steps=tuple(steps))
    run.view.changed()
    await asyncio.sleep(0.05)
"""

ROWS = "[...document.querySelectorAll('.durable-nb .dnb-row th')].map((cell) => cell.textContent)"
OUTPUT = ".jp-Cell:nth-child(2) .jp-OutputArea"


def shoot(lab: Lab, name: str) -> None:
    """Take pictures in both themes, if somebody wants to look at them."""
    if folder := os.environ.get("DURABLE_NB_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for theme in ("Dark", "Light"):
            lab.theme(f"JupyterLab {theme}")
            lab.screenshot(Path(folder) / f"{name}-{theme.lower()}.png", ".jp-Cell:has(.jp-OutputArea-output)")


def ours(console: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(kind, text) for kind, text in console if kind == "error"]


@pytest.mark.browser
class TestBrowser:
    """In a real JupyterLab."""

    def test_a_run_is_seen_live_and_stays_as_static_html(self, lab: Lab) -> None:
        name = lab.write_notebook([DRIVE, NIGHTLY, QUIET])
        lab.open(name)
        lab.run_all()
        lab.wait_text("publish", ".durable-nb")
        head = lab.text(".dnb-head")
        assert "running" in head
        assert "7 steps · 1 restored · 1 pending · 1 running · 1 sleeping · 1 retrying · 1 failed" in head
        table = lab.text(".durable-nb table")
        assert "retries in 1:01:" in table
        assert "charge <img src=x onerror=alert(1)>" in table
        assert "340 ms" in table
        (output,) = lab.outputs(1)
        assert output["data"].keys() == {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"}
        assert output["metadata"] == {"durable_nb": {"view": "run-1"}}
        self.counts_down(lab)
        self.unfolds(lab)
        assert lab.evaluate("() => document.querySelectorAll('.durable-nb [aria-live]').length") == 1
        assert lab.text(".dnb-spoken") == "nightly running, 1 failed"
        shoot(lab, "live")

        (lab.root / "nightly-go").touch()
        lab.wait_text("7 steps · 1 restored · 1 failed", ".dnb-head")
        (lab.root / "nightly-end").touch()
        lab.wait_idle()
        lab.wait_text("completed in", OUTPUT)
        (output,) = lab.outputs(1)
        assert output["data"].keys() == {"text/html", "text/plain"}
        assert output["metadata"] == {"durable_nb": {"view": "run-1"}}
        assert "quiet · completed in" in lab.outputs(2)[0]["data"]["text/plain"]
        assert lab.text(".durable-nb") == ""
        shoot(lab, "static")
        assert ours(lab.console) == []

        lab.save()
        lab.reload()
        lab.wait_text("completed in", OUTPUT)
        page = lab.text("body")
        assert "nightly · completed in" in page
        assert "model not found" not in page.lower()
        assert "error displaying" not in page.lower()
        assert ours(lab.console) == []
        assert lab.outside == []

    def counts_down(self, lab: Lab) -> None:
        shown = "/wakes in (\\d:\\d\\d)/.exec(document.querySelector('.durable-nb').innerText)?.[1]"
        before = lab.evaluate(f"() => {shown}")
        assert before in {"5:00", "4:59", "4:58", "4:57"}
        lab.wait(f"() => {shown} < '{before}'", 5)

    def unfolds(self, lab: Lab) -> None:
        assert "ask for another card" not in lab.text(".durable-nb")
        lab.click(".dnb-error summary")
        lab.wait_text("ask for another card", ".durable-nb")

    def test_ten_thousand_steps_survive_a_reload_and_a_dead_kernel_is_told(self, lab: Lab) -> None:
        name = lab.write_notebook([DRIVE, LONG])
        lab.open(name)
        lab.run_all()
        lab.wait_text(" more: 8,980 restored", ".durable-nb")
        self.moves(lab)
        lab.save()
        lab.reload()
        lab.wait_text(" more: 8,980 restored", ".durable-nb")
        self.moves(lab)
        assert lab.evaluate(f"() => {ROWS}.length") < 300

        assert "row 25" not in lab.evaluate(f"() => {ROWS}")
        lab.click(".dnb-gap button")
        lab.wait(f"() => {ROWS}.includes('row 25')")
        shoot(lab, "long")
        assert "long · running: first run" in lab.text(OUTPUT)
        lab.kill_kernel()
        lab.evaluate("() => { const now = Date.now; Date.now = () => now() + 60_000; }")
        # A last message may arrive after the clock was set; then the silence is counted from there.
        lab.wait_text("no word from the kernel for ", ".dnb-head", patience_s=60)
        lab.wait_text("long · began: first run", OUTPUT)
        shoot(lab, "lost")
        assert lab.outside == []

    def moves(self, lab: Lab) -> None:
        """New rows come in, and none is lost between a whole state and a difference."""
        newest = int(lab.evaluate(f"() => {ROWS}.at(-1)").split()[1])
        lab.wait(f"() => {ROWS}.includes('row {newest + 30}')")
        rows = [int(row.split()[1]) for row in lab.evaluate(f"() => {ROWS}")]
        assert rows[-50:] == list(range(rows[-50], rows[-1] + 1))
