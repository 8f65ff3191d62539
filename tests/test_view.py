"""What a reader sees of a run: live in JupyterLab, and for good in the saved notebook."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import os
import re
import threading
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kernels
import pytest

from durable_nb._facts import Progress, Snapshot, Status, Step
from durable_nb._preview import Preview
from durable_nb._view import Actions, Detail, Extra, Place, RunView, Source, static, terminal, widget
from durable_nb._view.fold import CELLS, flat, fold, strip, timeline, told
from durable_nb._view.state import LIMIT, Look, size, whole

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from lab import Lab


pytest_plugins = ["lab"]

MESSAGE = 64 * 1024


def done(i: int, **facts: Any) -> Step:
    return replace(Step(f"step {i}", f"step {i}", "call", Status.COMPLETED, 1, 100.0 + i, 100.5 + i), **facts)


def run_of(*steps: Step, **facts: Any) -> Snapshot:
    return replace(Snapshot("run-1", "nightly", Status.RUNNING, 100.0, None, steps), **facts)


class Known(Source):
    """A run of which everything is known."""

    def __init__(self, snapshot: Snapshot | Callable[[], Snapshot], **known: Any) -> None:
        super().__init__(snapshot if callable(snapshot) else lambda: snapshot)
        self.known = known

    def total(self) -> int | None:
        return self.known.get("total")

    def extras(self) -> Mapping[str, Extra]:
        return self.known.get("extras", {})

    def detail(self, path: str) -> Detail:
        return self.known.get("details", {}).get(path, Detail())

    def actions(self, status: Status) -> Actions:
        return self.known.get("actions") or super().actions(status)


def state_of(snapshot: Snapshot, look: Look | None = None, now: float = 200.0, **known: Any) -> dict[str, Any]:
    return whole(Known(snapshot, **known), look or Look(), version=1, now=now)


class TestFold:
    """A run's steps as rows."""

    def test_equal_names_fold_into_one_row_where_the_first_was_asked_for(self) -> None:
        steps = [done(0), *(done(i, name="fold", path=f"fold#{i}") for i in range(1, 21)), done(30)]
        rows = fold(steps)
        assert [(row.name, len(row.steps), row.is_group) for row in rows] == [
            ("step 0", 1, False),
            ("fold", 20, True),
            ("step 30", 1, False),
        ]
        assert [row.step.path for row in flat(rows, {rows[1].key})[2:4]] == ["fold#1", "fold#2"]

    def test_items_and_children_fold_into_their_parent(self) -> None:
        steps = [
            done(0, name="score", path="score", kind="map"),
            *(done(i, name=f"score[{i}]", path=f"score[{i}]") for i in range(3)),
            done(4, name="ship", path="ship", kind="invoke"),
            done(5, name="pack", path="ship/pack"),
            done(6, name="send", path="ship/send"),
            done(7, name="lone", path="/branch#1/lone"),
        ]
        rows = fold(steps)
        assert [row.name for row in rows] == ["score", "ship", "lone"]
        opened = flat(rows, {row.key for row in rows})
        assert [(row.depth, row.name) for row in opened] == [
            (0, "score"),
            (1, "score"),
            (0, "ship"),
            (1, "pack"),
            (1, "send"),
            (0, "lone"),
        ]
        assert len(opened[1].steps) == 3

    def test_what_a_row_says_of_many(self) -> None:
        steps = [done(i, name="fold", path=f"fold#{i}", ended_at=100.0 + i + i) for i in range(1, 6)]
        steps[3] = replace(steps[3], status=Status.FAILED, error="ValueError: 7")
        steps[4] = replace(steps[4], status=Status.RUNNING, ended_at=None)
        (row,) = fold(steps)
        said = told(row)
        assert (said.status, said.done, said.median_s, said.strip, said.error) == ("running", 3, 2.5, "cccfr", "ValueError: 7")
        assert (said.started_at, said.ended_at) == (101.0, None)

    def test_a_strip_of_ten_thousand_hides_no_failure(self) -> None:
        words = ["completed"] * 10_000
        words[7777] = "failed"
        shown = strip(words)
        assert len(shown) == CELLS
        assert set(shown) == {"c", "f"}

    def test_the_timeline_says_what_was_at_work_when(self) -> None:
        steps = [
            done(0, started_at=0.0, ended_at=10.0),
            done(1, started_at=30.0, ended_at=40.0, kind="sleep"),
            done(2, restored=True),
        ]
        shown = timeline(steps, 0.0, 40.0)
        assert [len(list(group)) for _, group in itertools.groupby(shown)] == [12, 24, 12]
        assert shown[0] + shown[20] + shown[40] == "c p", "a sleep that is over is nothing to look at"


class TestStatic:
    """A finished run as html and as text."""

    def test_text_is_an_aligned_table(self) -> None:
        snapshot = run_of(
            Step("charge", "charge", "call", Status.COMPLETED, 1, 1.0, 2.0, restored=True),
            Step("load", "load", "call", Status.COMPLETED, 1, 1.0, 2.0, restored=True),
            Step("fetch the rates", "fetch", "call", Status.COMPLETED, 3, 101.0, 112.25, error="OSError: no\n\troute"),
            Step("计算", "计算", "run", Status.COMPLETED, 1, 101.0, 101.34),
            *(done(i, name="fold", path=f"fold#{i}", ended_at=101.5 + i) for i in range(20)),
            status=Status.COMPLETED,
            ended_at=112.4,
        )
        assert static.text(snapshot).splitlines() == [
            "nightly · completed in 12.4 s · 24 steps, 2 restored",
            "  step                      status       time  attempts",
            "  charge                    restored",
            "  load                      restored",
            "  fetch the rates           completed  11.2 s         3",
            "    OSError: no route",
            "  计算                      completed  340 ms",
            "  fold × 20 · median 1.5 s  completed  20.5 s",
        ]

    def test_the_line_above_is_the_cells_own(self) -> None:
        assert static.text(run_of(done(1)), line="a · ran in 3.1 s").splitlines()[0] == "a · ran in 3.1 s"
        html = static.html(run_of(done(1)), line="a · ran in 3.1 s")
        assert html.index("a · ran in 3.1 s") < html.index("</summary>") < html.index("<table")

    def test_a_column_that_nobody_needs_is_left_out(self) -> None:
        assert "attempts" not in static.text(run_of(done(1)))
        assert "attempts" not in static.html(run_of(done(1)))

    def test_whatever_a_user_wrote_is_escaped(self) -> None:
        evil = "<script>alert('x')</script>"
        snapshot = run_of(
            done(1, name=evil, path="1", error=evil),
            done(2, path="2", error=f"{evil}\n{evil}"),
            *(done(i, name=f"{evil}s", path=f"{evil}{i}", status=Status.FAILED, error=evil) for i in range(3, 6)),
            name=evil,
            status=Status.FAILED,
        )
        snapshot = replace(snapshot, steps=tuple(replace(step, preview=Preview(evil, evil)) for step in snapshot.steps))
        detail = Detail((evil, evil), evil)
        html = static.html(snapshot, note=evil, footer=evil, detail=lambda _: detail)
        assert "<script" not in html
        assert html.count("&lt;script&gt;") > 20

    def test_text_moves_no_cursor_and_stays_on_its_line(self) -> None:
        lines = static.text(run_of(done(1, name="\x1b[31mred\r\n\u202ex", error="\x07" * 3))).splitlines()
        assert all(line.isprintable() for line in lines)
        assert len(lines) == 4

    def test_a_long_run_shows_its_ends_and_its_failures(self) -> None:
        steps = [done(i, restored=i < 5000) for i in range(10_000)]
        steps[5000] = replace(steps[5000], status=Status.FAILED, error="ValueError: 7")
        snapshot = run_of(*steps, status=Status.FAILED, ended_at=20_000.0)
        text = static.text(snapshot)
        assert "  … 4,980 more restored\n  step 5000  failed" in text
        assert "  … 4,969 more completed\n" in text
        assert len(text.splitlines()) < 100
        snapshot = replace(snapshot, steps=tuple(replace(s, preview=Preview("x" * 5000, "y" * 5000)) for s in snapshot.steps))
        much = Detail(("z" * 200,) * 60, "t" * 9000)
        assert len(static.html(snapshot, detail=lambda _: much)) < 6 * MESSAGE

    def test_a_run_without_steps_is_one_line(self) -> None:
        assert static.text(run_of(), now=101.0) == "nightly · running for 1.0 s · 0 steps"
        assert "<details" not in static.html(run_of())

    def test_the_same_facts_always_give_the_same_table(self) -> None:
        """Else a notebook that is run again has a diff although nothing changed."""
        sleeping = done(1, status=Status.SLEEPING, ended_at=None, wake_at=1_700_000_000.0)
        snapshot = run_of(sleeping, done(2, status=Status.RUNNING, ended_at=None))
        assert "until 2023-11-14 22:13:20 UTC" in static.text(snapshot)
        assert static.bundle(Known(snapshot)) == static.bundle(Known(snapshot))

    def test_a_site_that_strips_scripts_and_styles_shows_it_all(self) -> None:
        """What GitHub keeps of html: these elements, no style, no script, no attribute of ours."""
        import bleach

        steps = (
            done(1, error="E: one\nE: two", status=Status.FAILED),
            *(done(i, name="fold", path=f"fold#{i}") for i in range(2, 22)),
        )
        html = static.html(run_of(*steps, status=Status.FAILED), line="nightly · failed after 3 s", footer="saved")
        tags = {"details", "summary", "table", "thead", "tbody", "tr", "th", "td", "span", "small", "br", "pre", "div", "em"}
        kept = bleach.clean(html, tags=tags, attributes={"td": ["colspan", "align"]}, strip=True)
        for words in ("✗ nightly · failed after 3 s", "fold × 20 · median 500 ms", "E: two", "saved"):
            assert words in re.sub("<[^>]*>", "", kept)
        assert kept.count("<details>") == 2

    def test_a_terminal_gets_colours_and_nothing_else_of_its_codes(self) -> None:
        steps = (done(1, name="\x1b[2Jclear"), done(2, status=Status.FAILED, error="E: \x1b]0;title\x07"))
        shown = terminal.coloured([static.block(run_of(*steps), line="a · failed after 3 s")])
        assert "\x1b[31mfailed" in shown
        assert "\x1b[1ma · failed after 3 s" in shown
        assert re.sub("\x1b\\[[0-9;]*m", "", shown).replace("\n", "").isprintable()

    def test_what_restoring_saved_stands_below(self) -> None:
        usage = {"gpt-5": {"requests": 1, "input_tokens": 1400, "output_tokens": 100}}
        steps = (done(1, restored=True, ended_at=142.0, usage=usage), done(2, restored=True), done(3))
        html = static.bundle(Known(run_of(*steps)))["text/html"]
        assert "2 steps were restored, which saved 41.5 s and 1,500 tokens" in html


class TestState:
    """What the live view is told."""

    @pytest.mark.parametrize("status", [Status.COMPLETED, Status.RUNNING, Status.FAILED])
    @pytest.mark.parametrize("awful", ["x", "\N{PILE OF POO}", "\ud800"])
    def test_ten_thousand_steps_fit_into_one_message(self, status: Status, awful: str) -> None:
        """Whatever their state, however long their names and errors, and with fifty of them unfolded."""
        steps = [
            done(i, name=f"{i}{awful * 5000}", path=f"{i}{awful * 5000}", status=status, error=awful * 9000, attempts=9)
            for i in range(10_000)
        ]
        steps = [replace(step, preview=Preview(awful * 9000, awful * 9000)) for step in steps]
        look = Look()
        look.at(300, 340)
        look.opened |= {step.path for step in steps[:50]}
        much = Detail((awful * 900,) * 900, awful * 9000)
        state = state_of(run_of(*steps), look, details={step.path: much for step in steps[:50]})
        assert size(state) <= LIMIT + 2048
        assert len(state["rows"]) > 3
        assert state["length"] == 10_000

    def test_the_rows_that_are_looked_at_are_told_and_those_at_the_ends(self) -> None:
        look = Look()
        look.at(5000, 5020)
        rows = [row["at"] for row in state_of(run_of(*(done(i) for i in range(10_000))), look)["rows"]]
        assert rows == [*range(40), *range(5000, 5021), *range(9960, 10_000)]

    def test_an_unfolded_row_tells_what_there_is(self) -> None:
        look = Look()
        failed = done(1, status=Status.FAILED, error="ValueError: 7", preview=Preview("cart=7", "'ok'"))
        snapshot = run_of(done(0), failed)
        ids = [row["id"] for row in state_of(snapshot, look)["rows"]]
        look.toggle(ids[1], True)
        look.toggle(4711, True)
        detail = Detail(("one", "two"), "\x1b[31mTraceback\x1b[0m: 7")
        state = state_of(snapshot, look, details={"step 1": detail})
        panel = {
            "at": 1,
            "id": ids[1],
            "arguments": "cart=7",
            "result": "'ok'",
            "log": ["one", "two"],
            "traceback": "Traceback: 7",
        }
        assert state["panels"] == [panel]
        assert state["rows"][1]["open"]
        assert state_of(snapshot, look)["panels"][0]["traceback"] == "ValueError: 7"

    def test_names_turn_no_text_around_them(self) -> None:
        odd = "pay\u202eyap\x1b[31m\x00\n"
        state = state_of(run_of(done(0, name=odd, path=f"child/{odd}"), name=odd))
        row = state["rows"][0]
        assert all(text.isprintable() for text in (row["name"], row["path"], state["run"]["name"]))
        assert row["name"].startswith("pay yap")

    def test_how_far_how_fast_and_how_long(self) -> None:
        waiting = [done(i, status=Status.PENDING, started_at=None, ended_at=None) for i in range(10, 30)]
        steps = [done(i, started_at=100.0, ended_at=104.0) for i in range(10)]
        state = state_of(run_of(*steps, *waiting), now=105.0)
        assert (state["done"], state["total"], state["rate"], state["left"]) == (10, 30, 2.0, 10.0)
        assert state_of(run_of(*steps), total=40, now=105.0)["left"] == 15.0
        quick = [done(i, started_at=70.0, ended_at=71.0) for i in range(30, 1000)]
        assert state_of(run_of(*quick, *steps, *waiting), now=105.0)["left"] == 30.0, "as fast as of late"
        assert "left" not in state_of(run_of(*steps), now=105.0)
        assert "left" not in state_of(run_of(*steps, *waiting[1:], replace(waiting[0], status=Status.SLEEPING)), now=105.0)

    def test_questions_and_progress(self) -> None:
        waits = done(1, kind="decision", status=Status.WAITING, ended_at=None, prompt="Publish?", wake_at=900.0)
        usage = {"gpt-5": {"requests": 1, "input_tokens": 3, "output_tokens": 4}}
        told = Progress(3, 10, "batch \x1b[31m3\u202e Bearer abcdefghijkl")
        works = done(2, status=Status.RUNNING, ended_at=None, usage=usage, progress=told)
        extras = {"step 2": Extra("the end of an answer")}
        state = state_of(run_of(waits, works), extras=extras)
        assert state["approvals"] == [{"path": "step 1", "prompt": "Publish?", "deadline": 900.0}]
        row = state["rows"][1]
        assert (row["progress"], row["note"], row["tokens"]) == ([3, 10], "batch  [31m3  Bearer [redacted]", 7)
        assert state_of(run_of(replace(works, progress=None)), extras=extras)["rows"][0]["note"] == "the end of an answer"


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


class Desk(Place):
    """A view under test: its run, the messages of its widget as they go on the wire, and its display."""

    def __init__(self) -> None:
        super().__init__()
        self.facts = run_of(done(0))
        self.sent: list[tuple[float, str, dict[str, Any]]] = []
        self.shown: list[dict[str, Any]] = []
        self.orders: list[tuple[str, str, str | None, str]] = []
        self.view = self.make()

    def make(self, **options: Any) -> RunView:
        source = Known(lambda: self.facts, actions=options.pop("actions", None))
        return RunView(source, **{"live": True, "place": self, "send": self.send, **options})

    def send(self, action: str, run_id: str, step: str | None = None, comment: str = "") -> None:
        self.orders.append((action, run_id, step, comment))

    def set(self, **facts: Any) -> None:
        self.facts = replace(self.facts, **facts)
        self.view.changed()

    def show(self, data: dict[str, Any], **mark: str) -> None:
        assert mark == {"view": "run-1"}
        self.shown.append(data)

    def run(self, story: Callable[[], Awaitable[None]]) -> None:
        async def told() -> None:
            await story()
            desk.view.close()
            await asyncio.sleep(6)

        desk = self
        with asyncio.Runner(loop_factory=FastLoop) as runner:
            runner.run(told())

    async def opened(self) -> None:
        self.view.open()
        await asyncio.sleep(0.2)

    def updates(self) -> list[dict[str, Any]]:
        return [data["state"]["state"] for _, kind, data in self.sent if kind == "comm_msg"]


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
    before = set(alive)
    yield desk
    desk.view.close()
    widget.forget("run-1")
    assert set(alive) == before, "a closed view leaves widgets behind"


class TestLive:
    """The widget's messages, and the life of a view."""

    def test_thousands_of_changes_become_eight_updates_a_second(self, desk: Desk) -> None:
        async def story() -> None:
            await desk.opened()
            for i in range(10_000):  # in ten seconds
                desk.set(steps=(done(0, attempts=i),))
                await asyncio.sleep(0.001)

        desk.run(story)
        assert 60 <= len(desk.updates()) <= 81
        times = [at for at, kind, _ in desk.sent if kind == "comm_msg"]
        assert min(b - a for a, b in itertools.pairwise(times)) > 0.124

    def test_a_change_alone_is_shown_at_once_and_the_last_one_is_never_lost(self, desk: Desk) -> None:
        async def story() -> None:
            await desk.opened()
            desk.set(steps=(done(0), done(1)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert len(desk.updates()) == 1
            desk.set(steps=(done(0), done(1), done(2)))
            await asyncio.sleep(1)

        desk.run(story)
        assert desk.updates()[-1]["total"] == 3

    def test_nothing_new_sends_nothing(self, desk: Desk) -> None:
        async def story() -> None:
            await desk.opened()
            for _ in range(10):
                desk.view.changed()
                await asyncio.sleep(0.5)

        desk.run(story)
        assert desk.updates() == []

    def test_a_silent_run_is_told_every_ten_seconds(self, desk: Desk) -> None:
        """A front end takes longer silence for a dead kernel."""

        async def story() -> None:
            await desk.opened()
            await asyncio.sleep(61)

        desk.run(story)
        assert len(desk.updates()) == 6

    def test_a_run_that_is_over_at_once_makes_no_widget(self, desk: Desk) -> None:
        async def story() -> None:
            desk.view.open()
            desk.set(status=Status.COMPLETED, ended_at=100.1)
            await asyncio.sleep(0.05)
            desk.view.close()
            await asyncio.sleep(1)

        desk.run(story)
        assert desk.sent == []
        assert [data.keys() for data in desk.shown] == [{"text/html", "text/plain"}]

    def test_messages_are_small(self, desk: Desk) -> None:
        """JavaScript, style and the state of a long run in the first; whatever is looked at and unfolded."""

        async def story() -> None:
            desk.facts = run_of(*(done(i, name=f"{i}" + "n" * 300, error="E: " + "x" * 3000) for i in range(10_000)))
            await desk.opened()
            for row in range(1, 60):
                desk.view._heard(None, {"ask": "unfold", "row": row, "open": True}, [])
            desk.view._heard(None, {"ask": "rows", "from": 0, "to": 10_000}, [])
            await asyncio.sleep(1)

        desk.run(story)
        sizes = {kind: max(len(json.dumps(data)) for _, kind_, data in desk.sent if kind_ == kind) for _, kind, _ in desk.sent}
        assert LIMIT < sizes["comm_open"] <= MESSAGE
        assert sizes["comm_msg"] <= MESSAGE

    def test_a_reader_scrolls_and_unfolds(self, desk: Desk) -> None:
        async def story() -> None:
            desk.facts = run_of(*(done(i, name="fold", path=f"fold#{i}") for i in range(10_000)))
            await desk.opened()
            desk.view._heard(None, {"ask": "unfold", "row": 1, "open": True}, [])
            await asyncio.sleep(0.2)
            desk.view._heard(None, {"ask": "rows", "from": 5000, "to": 5020}, [])
            await asyncio.sleep(0.2)
            desk.view._heard(None, {"ask": "unfold", "row": 1, "open": False}, [])
            await asyncio.sleep(0.2)

        desk.run(story)
        unfolded, scrolled, folded = desk.updates()
        assert (unfolded["length"], folded["length"]) == (10_001, 1)
        assert [row["at"] for row in scrolled["rows"]] == [*range(40), *range(5000, 5021), *range(9961, 10_001)]

    def test_buttons_send_once_and_only_what_can_be_asked(self, desk: Desk) -> None:
        async def story() -> None:
            names = ("publish", "other", "decided")
            asked = [done(i, name=name, path=name, kind="decision", prompt="?") for i, name in enumerate(names)]
            waiting = [replace(step, status=Status.WAITING, ended_at=None) for step in asked[:2]]
            desk.facts = run_of(*waiting, asked[2])
            await desk.opened()
            for step in ("decided", "unknown", None):
                desk.view._heard(None, {"ask": "approve", "run": "run-1", "step": step}, [])
            ask = {"ask": "approve", "run": "run-1", "step": "publish", "comment": "fine" * 1000}
            for message in (ask, ask, {**ask, "ask": "reject"}, {**ask, "step": "other", "comment": ""}):
                desk.view._heard(None, message, [])
            for action in ("cancel", "cancel", "retry"):
                desk.view._heard(None, {"ask": action, "run": "run-1"}, [])
            await asyncio.sleep(1)

        desk.run(story)
        assert desk.orders == [
            ("approve", "run-1", "publish", ("fine" * 1000)[:2000]),
            ("approve", "run-1", "other", ""),
            ("cancel", "run-1", None, ""),
        ]

    def test_a_forged_message_is_refused_and_logged(self, desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
        forged: list[Any] = [
            {"ask": "explode", "run": "run-1"},
            {"ask": "cancel", "run": "run-2"},
            {"ask": "cancel"},
            {"ask": "approve", "run": "run-1", "step": 7},
            {"ask": "approve", "run": "run-1", "step": "a", "comment": ["x"]},
            {"ask": "rows", "from": "0", "to": 7},
            {"ask": "unfold", "row": 1, "open": "yes"},
            {"ask": None},
            "cancel",
            None,
        ]

        async def story() -> None:
            await desk.opened()
            for message in forged:
                desk.view._heard(None, message, [])
            desk.view._heard(None, {"ask": "rows", "from": -(10**30), "to": 10**30}, [])
            desk.view._heard(None, {"ask": "unfold", "row": 10**30, "open": True}, [])
            await asyncio.sleep(1)

        with caplog.at_level(logging.WARNING, "durable_nb"):
            desk.run(story)
        assert desk.orders == []
        assert len([text for text in caplog.messages if "was refused" in text]) == len(forged)

    def test_what_could_not_be_sent_may_be_asked_again(self, desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
        def fail(*_: Any, **__: Any) -> None:
            desk.orders.append(("cancel", "", None, ""))
            raise OSError("disk full")

        desk.view = desk.make(send=fail)

        async def story() -> None:
            await desk.opened()
            for _ in range(2):
                desk.view._heard(None, {"ask": "cancel", "run": "run-1"}, [])

        desk.run(story)
        assert len(desk.orders) == 2
        assert "could not be sent" in caplog.text

    def test_messages_and_changes_may_come_from_any_thread(self, desk: Desk) -> None:
        threads: list[str] = []
        desk.view = desk.make(send=lambda *_, **__: threads.append(threading.current_thread().name))

        async def story() -> None:
            await desk.opened()
            for i in range(3):
                thread = threading.Thread(target=desk.set, kwargs={"steps": (done(0), done(i))})
                thread.start()
                thread.join()
                await asyncio.sleep(1)
            thread = threading.Thread(target=desk.view._heard, args=(None, {"ask": "cancel", "run": "run-1"}, []))
            thread.start()
            thread.join()
            await asyncio.sleep(0.1)

        desk.run(story)
        assert threads == ["MainThread"]
        assert len(desk.updates()) == 3
        desk.set(name="after the loop has ended")

    def test_the_live_display_carries_text_for_a_notebook_saved_meanwhile(self, desk: Desk) -> None:
        desk.view = desk.make(line=lambda: "a · running: first run")

        async def story() -> None:
            await desk.opened()
            desk.view.open()

        desk.run(story)
        live, _ = desk.shown
        assert live["text/plain"].startswith("a · running: first run\n")
        assert "run the cell again" in live["text/plain"]
        assert "step 0" in live["text/html"]
        assert live.keys() == {"text/html", "text/plain"}, (
            "a widget that is shown says 'model not found' when its kernel is gone"
        )

    def test_close_puts_static_forms_in_its_place_once(self, desk: Desk) -> None:
        async def story() -> None:
            await desk.opened()
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

    def test_a_failed_run_can_be_retried_while_the_kernel_lives(self, desk: Desk) -> None:
        async def story() -> None:
            await desk.opened()
            desk.set(status=Status.FAILED, ended_at=105.0)
            desk.view.close()
            for _ in range(2):
                desk.view._heard(None, {"ask": "retry", "run": "run-1"}, [])

        desk.run(story)
        assert desk.shown[-1].keys() == {"text/html", "text/plain"}
        ended = {"ended": "run-1", "again": "run", "offered": ["retry", "restart"], "now": 0}
        assert desk.updates()[-1] | {"now": 0} == ended
        assert desk.orders[0] == ("retry", "run-1", None, "")

    def test_a_cells_run_that_nobody_executes_can_be_cancelled_once_and_says_so(self, desk: Desk) -> None:
        desk.view = desk.make(again="cell", line=lambda: "nightly · stopped: run the cell again to resume")

        async def story() -> None:
            await desk.opened()
            desk.set(status=Status.INTERRUPTED, ended_at=105.0)
            desk.view.close()
            for _ in range(3):
                desk.view._heard(None, {"ask": "cancel", "run": "run-1"}, [])

        desk.run(story)
        assert desk.orders == [("cancel", "run-1", None, "")]
        before, after = (shown["text/plain"].splitlines()[0] for shown in desk.shown[-2:])
        assert before == "nightly · stopped: run the cell again to resume"
        assert after.startswith("nightly · cancelled after 5.0 s")

    def test_without_a_front_end_there_is_only_the_end(self, desk: Desk) -> None:
        desk.view = desk.make(live=False)
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


LOAD = "%load_ext durable_nb\nimport durable_nb as durable"


@pytest.mark.kernel
def test_a_button_acts_while_the_cell_runs(tmp_path: Path) -> None:
    """Whatever ipykernel does with a widget's messages meanwhile. A forged one does nothing, two presses no more than one."""
    with kernels.kernel(tmp_path) as k:
        k.run("import logging\nlogging.getLogger('durable_nb').addHandler(logging.FileHandler('log'))")
        cell = k.send("%%durable slow\nprint(await durable.run('one', lambda: 1))\nawait durable.sleep('a week', '7d')")
        widget, run = "", ""
        while not (widget and run):
            message = k.client.get_iopub_msg(timeout=60)
            content = message["content"]
            if message["msg_type"] == "comm_open" and "_esm" in content["data"].get("state", {}):
                widget = content["comm_id"]
            if message["msg_type"] == "update_display_data" and "view" in content["metadata"].get("durable_nb", {}):
                run = content["metadata"]["durable_nb"]["view"]
        for ask in ({"ask": "explode", "run": run}, {"ask": "cancel", "run": "another"}, *[{"ask": "cancel", "run": run}] * 2):
            data = {"method": "custom", "content": ask}
            k.client.shell_channel.send(k.client.session.msg("comm_msg", {"comm_id": widget, "data": data}))
        shown = k.wait(cell)
        assert shown.error.startswith("RunCancelled: the run")
        assert shown.told[-1].startswith("slow · stopped after")
        assert (tmp_path / "log").read_text().count("was refused") == 2
        k.run("1 + 1")
        assert k.value("str(durable.runs()[0].status)") == "cancelled"


TELLING = """%%durable telling
class Cart:
    def __repr__(self):
        raise SystemExit
    def __reduce__(self):
        return Cart, ()
def charge(cart, api_key, *, retry=False):
    print("charging", cart["id"], "Authorization: Bearer hunter22")
    return {"paid": True, "token": "hunter22"}
def fail(cart):
    raise ValueError(f"declined <b>{cart['id']}</b> at https://pay.example/?token=hunter22")
answer = {"model": "gpt-5", "usage": {"input_tokens": 1200, "output_tokens": 34}, "text": "fine"}
await durable.run("charge", charge, {"id": 7, "items": range(3)}, "hunter22", retry=True)
await durable.run("opaque", lambda cart: Cart(), Cart())
await durable.run("ask", lambda: answer)
await durable.run("fail", durable.step(fail, retries=0), {"id": 7})"""


@pytest.mark.kernel
def test_rows_unfold_to_what_their_steps_were_given_and_gave(tmp_path: Path) -> None:
    """Also where they are restored; no `__repr__` of the user's is called, and no secret is told."""
    prices = '{"gpt-5": [1.25, 10]}'
    with kernels.kernel(tmp_path, env={"DURABLE_NB_PRICES": prices}) as k:
        for again in (False, True):
            shown = k.run(TELLING)
            assert shown.error.startswith("ValueError: declined")
            html = shown.views[-1]["text/html"]
            assert "hunter22" not in html
            for words in (
                "{'id': 7, 'items': range(0, 3, 1)}, [redacted], retry=True",
                "{'paid': True, 'token': [redacted]}",
                "&lt;Cart&gt;",
                "declined &lt;b&gt;7&lt;/b&gt; at https://pay.example/?token=[redacted]",
                "in fail",
            ):
                assert words in unescape(html) or words in html, words
            assert again or "Authorization: [redacted]" in html, "what it prints, while it runs"
            assert ("3 steps were restored, which saved" in html) is again
            assert (" and 1,234 tokens" in html) is again
            assert "ask · 1,234 tokens · $0.0018" in shown.views[-1]["text/plain"]
            k.restart()


# Steps that wait until a file is there, so that a page can be looked at meanwhile.
HELPERS = f"""
{LOAD}
import asyncio, pathlib, time
async def until(path):
    while not pathlib.Path(path).exists():
        await asyncio.sleep(0.02)
def fold(n):
    time.sleep(0.01 * n)
    return n
async def score(go):
    for epoch in range(3):
        print("epoch", epoch)
    await until(go)
    return {{"score": 0.93}}
@durable.step(retries=1, backoff=3600)
async def flaky():
    raise OSError("no route <b>to</b> host")
"""

NIGHTLY = """%%durable nightly
folds = await asyncio.gather(*(durable.run("fold", fold, n) for n in range(20)))
evil = "<img src=x onerror=window.pwned=1>\\u202e<script>window.pwned=1</script>" + "x" * 500
await durable.run(evil, fold, 1)
async with asyncio.timeout(None) as patience:
    async def give_up():
        await until("nightly-go")
        task.cancel()
    task = asyncio.create_task(flaky())
    asyncio.create_task(give_up())
    await durable.run("score", score, "nightly-go")
    await asyncio.gather(task, return_exceptions=True)
sum(folds)"""

THREE_HUNDRED = """%%durable many
rows = []
for n in range(300):
    rows.append(await durable.run(f"row {n}", fold, n / 1000))
await durable.run("score", score, "many-go")
"the result of " + str(len(rows))"""

# A run of fakes with everything that a view can show, driven through it as the engine drives it.
DRIVE = '''
import asyncio, pathlib, time
from dataclasses import replace
from durable_nb._facts import Snapshot, Status, Step
from durable_nb._preview import Preview
from durable_nb._view import Actions, Detail, Extra, Place, RunView, Source

class Run(Source):
    def __init__(self, name, steps=(), **options):
        self.facts = Snapshot("run-1", name, Status.RUNNING, time.time(), None, tuple(steps))
        super().__init__(lambda: self.facts)
        said = {"send": self.send, "why": lambda: "helper clean changed"}
        self.view = RunView(self, live=True, place=Place(cell=name), **said, **options)
        self.view.open()
    def detail(self, path):
        return Detail(("line one", "line two")) if path == "charge" else Detail()
    def actions(self, status):
        return Actions(retry="the run has not ended")
    def send(self, action, run_id, step=None, comment=""):
        with open("sent", "a") as file:
            file.write(f"{action} {step} {comment}\\n")
        self.step(step, status=Status.COMPLETED, ended_at=time.time()) if step else None
    def step(self, name, **facts):
        """Add a step, or change it."""
        steps = {step.path: step for step in self.facts.steps}
        steps[name] = replace(steps.get(name, Step(name, name, "call", Status.PENDING)), **facts)
        self.facts = replace(self.facts, steps=tuple(steps.values()))
        self.view.changed()

async def until(path):
    while not pathlib.Path(path).exists():
        await asyncio.sleep(0.02)
'''

ASKING = """
run = Run("release")
now = time.time()
run.step("charge", status=Status.COMPLETED, started_at=now - 2, ended_at=now, preview=Preview("cart=<b>7</b>", "'paid'"))
run.step("cool down", kind="sleep", status=Status.SLEEPING, started_at=now, wake_at=now + 300)
asks = {"prompt": "Publish <b>it</b>?", "wake_at": now + 7200}
run.step("publish", kind="decision", status=Status.WAITING, started_at=now, **asks)
await until("release-go")
"""

LONG = """
now = time.time()
rows = [Step(f"row {i}", f"row {i}", "call", Status.COMPLETED, 1, now, now + 1, restored=i < 9000) for i in range(10_000)]
run = Run("long", rows)
run.step("the last", status=Status.RUNNING, started_at=now)
await until("long-go")
"""

CELL = ".jp-Cell:nth-child(2)"
VIEW = f"{CELL} .dnb-run"
LIST = f"{VIEW} .dnb-list"
OUTPUT = f"{CELL} .jp-OutputArea"


def shoot(lab: Lab, name: str, selector: str = f"{CELL} .jp-Cell-outputWrapper") -> None:
    """Take pictures in both themes, if somebody wants to look at them."""
    if folder := os.environ.get("DURABLE_NB_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for theme in ("Dark", "Light"):
            lab.theme(f"JupyterLab {theme}")
            lab.screenshot(Path(folder) / f"{name}-{theme.lower()}.png", selector)


def errors(lab: Lab) -> list[str]:
    # anywidget allows a widget two seconds to load, which a busy machine exceeds
    return [text for kind, text in lab.console if kind == "error" and "Failed to initialize model" not in text]


def top(lab: Lab, selector: str) -> float:
    """Return where on the screen the first element that matches begins, in pixels."""
    return float(lab.evaluate("(selector) => document.querySelector(selector).getBoundingClientRect().top", selector))


def press(lab: Lab, name: str, cell: int = 1) -> None:
    """Press the button of that name in a cell's output, as a user does."""
    lab.on_page(lambda page: page.locator(".jp-Cell").nth(cell).get_by_role("button", name=name).click(timeout=10_000))


def button(lab: Lab, name: str, *, disabled: bool) -> int:
    """Return how many buttons of that accessible name there are."""
    return int(lab.on_page(lambda page: page.get_by_role("button", name=name, disabled=disabled).count()))


@pytest.mark.browser
class TestBrowser:
    """In a real JupyterLab, by what is to be seen and where."""

    def test_a_run_from_its_first_line_to_the_saved_notebook(self, lab: Lab) -> None:
        name = lab.write_notebook([HELPERS, NIGHTLY, "print('after')"])
        lab.open(name)
        lab.run_all()
        lab.wait_text("retrying", VIEW)
        lab.wait_text("running", f"{LIST} [data-status=running]")
        head = lab.text(f"{VIEW} .dnb-head")
        assert all(words in head for words in ("running", "nightly", "first run", "21 of 23"))
        lines = lab.evaluate(
            "(output) => document.querySelector(output).innerText.split('\\n').filter((line) => line === 'nightly')", OUTPUT
        )
        assert lines == ["nightly"], "one header, not two"
        rows = lab.text(LIST)
        assert "fold × 20 · median" in rows
        assert "retries in " in rows
        assert "OSError: no route <b>to</b> host" in rows
        assert "<img src=x onerror=window.pwned=1>" in rows
        assert lab.evaluate("() => window.pwned") is None
        assert (button(lab, "Cancel", disabled=False), button(lab, "Retry: the run has not ended", disabled=True)) == (1, 1)
        assert (
            lab.on_page(lambda page: page.get_by_role("progressbar", name="Steps done").get_attribute("aria-valuenow")) == "21"
        )
        self.unfolds_by_keyboard(lab)
        self.fits_into_400_pixels(lab)
        shoot(lab, "running", f"{CELL}")

        at = top(lab, f"{VIEW} .dnb-name")
        lab.evaluate("() => { const list = document.querySelector('.jp-WindowedPanel-outer'); window.was = list.scrollTop; }")
        (lab.root / "nightly-go").touch()
        lab.wait_idle()
        lab.wait_text("nightly · ran in", OUTPUT)
        assert abs(top(lab, f"{CELL} summary") - at) < 12, "the header stays where it was"
        assert lab.evaluate("() => document.querySelector('.jp-WindowedPanel-outer').scrollTop === window.was")
        assert top(lab, f"{CELL} .jp-OutputArea-executeResult") - at < 120, "the result stands below one line"
        assert "fold" not in lab.text(f"{CELL} .jp-OutputArea-output"), "the rest is folded"
        shoot(lab, "completed", f"{CELL}")
        assert errors(lab) == []
        lab.save()
        self.stays_without_a_kernel(lab, name)
        assert lab.outside == []

    def unfolds_by_keyboard(self, lab: Lab) -> None:
        """The rows are a tree grid; JupyterLab's own keys don't get in between."""
        lab.on_page(lambda page: page.locator(LIST).focus())
        cells = lab.evaluate("() => document.querySelectorAll('.jp-Cell').length")
        for key in ("Home", "ArrowRight"):
            lab.on_page(lambda page, key=key: page.keyboard.press(key))
        lab.wait("(list) => document.querySelector(list).getAttribute('aria-rowcount') === '24'", arg=LIST)
        lab.on_page(lambda page: page.keyboard.press("ArrowLeft"))
        lab.wait("(list) => document.querySelector(list).getAttribute('aria-rowcount') === '4'", arg=LIST)
        for key in ("End", "Enter"):
            lab.on_page(lambda page, key=key: page.keyboard.press(key))
        lab.wait_text("epoch 0\nepoch 1\nepoch 2", f"{LIST} .dnb-panel")
        lab.on_page(lambda page: page.keyboard.press("Enter"))
        assert lab.evaluate("() => document.querySelectorAll('.jp-Cell').length") == cells

    def fits_into_400_pixels(self, lab: Lab) -> None:
        lab.on_page(lambda page: page.set_viewport_size({"width": 700, "height": 900}))
        lab.wait("(view) => document.querySelector(view).clientWidth < 420", arg=VIEW)
        lab.wait(
            """(view) => {
              const edge = document.querySelector(view).getBoundingClientRect().right + 1;
              const kinds = ["button", ".dnb-row", ".dnb-time", ".dnb-far"].map((kind) => `${view} ${kind}`);
              const parts = [...document.querySelectorAll(kinds.join())];
              return parts.length > 8 && parts.every((part) => part.getBoundingClientRect().right <= edge);
            }""",
            arg=VIEW,
        )
        assert "fold × 20" in lab.text(LIST)
        shoot(lab, "narrow", f"{CELL}")
        lab.on_page(lambda page: page.set_viewport_size({"width": 1300, "height": 900}))

    def stays_without_a_kernel(self, lab: Lab, name: str) -> None:
        """Loaded again, with the kernel's end, by a fresh kernel, and as a page without scripts."""
        for again in (lab.reload, lab.restart_kernel, lambda: lab.open(name)):
            again()
            lab.wait_text("nightly · ran in", OUTPUT)
            page = lab.text("body").lower()
            assert "model not found" not in page
            assert "error displaying" not in page
        lab.click(f"{OUTPUT} summary")
        lab.wait_text("fold × 20 · median", OUTPUT)
        assert errors(lab) == []

    def test_three_hundred_steps_never_push_the_result_off_the_screen(self, lab: Lab) -> None:
        name = lab.write_notebook([HELPERS, THREE_HUNDRED])
        lab.open(name)
        lab.run_all()
        lab.wait_text("epoch 2", OUTPUT, 60)
        lab.wait_text("300 done", VIEW)
        lab.evaluate("(cell) => document.querySelector(cell).scrollIntoView()", CELL)
        height = lab.evaluate("() => window.innerHeight")
        bottom = f"() => document.querySelector('{CELL}').getBoundingClientRect().bottom"
        assert lab.evaluate(bottom) < height, "the live view is no higher than the screen"
        (lab.root / "many-go").touch()
        lab.wait_text("the result of 300", OUTPUT)
        lab.wait_text("many · ran in", OUTPUT)
        assert lab.evaluate(bottom) < height
        assert top(lab, f"{CELL} .jp-OutputArea-executeResult") < height - 100
        assert errors(lab) == []

    def test_questions_are_answered_and_ten_thousand_rows_scroll(self, lab: Lab) -> None:
        name = lab.write_notebook([DRIVE, ASKING, LONG])
        lab.open(name)
        lab.run_all()
        lab.wait_text("Publish <b>it</b>?", VIEW)
        assert lab.on_page(lambda page: page.get_by_role("group", name="Decision: Publish <b>it</b>?").count()) == 1
        assert "times out in " in lab.text(f"{VIEW} .dnb-asks")
        lab.on_page(lambda page: page.locator(f"{LIST} .dnb-row").first.click())
        lab.wait_text("cart=<b>7</b>", f"{LIST} .dnb-panel")
        assert "line one\nline two" in lab.text(f"{LIST} .dnb-panel")
        assert lab.text(f"{VIEW} [role=status]") == "release running, waits for a decision"
        shoot(lab, "waiting")
        before = lab.text(LIST).partition("wakes in ")[2][:4]
        lab.wait("([list, was]) => !document.querySelector(list).innerText.includes(was)", 5, [LIST, f"wakes in {before}"])
        lab.on_page(lambda page: page.get_by_label("Comment on publish").fill("fine by me"))
        lab.on_page(lambda page: page.get_by_role("button", name="Approve").dblclick(timeout=10_000))
        lab.wait("(view) => !document.querySelector(view).innerText.includes('Publish')", arg=VIEW)
        assert (lab.root / "sent").read_text() == "approve publish fine by me\n"
        (lab.root / "release-go").touch()

        rows = ".jp-Cell:nth-child(3) .dnb-list"
        lab.wait_text("the last", rows)
        assert lab.on_page(lambda page: page.locator(rows).get_attribute("aria-rowcount")) == "10001"
        lab.evaluate("(rows) => { document.querySelector(rows).scrollTop = 26 * 5000; }", rows)
        lab.wait_text("row 5003", rows)
        assert self.slowest_frame_ms(lab, rows) < 100
        assert lab.evaluate("(rows) => document.querySelectorAll(rows + ' .dnb-row').length", rows) < 60
        lab.evaluate("(rows) => document.querySelector(rows).scrollIntoView()", rows)
        shoot(lab, "ten-thousand", ".jp-Cell:nth-child(3)")
        lab.save()
        lab.reload()
        lab.wait_text("row 9999", rows)
        assert errors(lab) == []
        lab.kill_kernel()
        lab.evaluate("() => { const now = Date.now; Date.now = () => now() + 60_000; }")
        # JupyterLab may have restarted the kernel by then. A last message may arrive after the clock was set.
        head = ".jp-Cell:nth-child(3) .dnb-head"
        said = "/no word from the kernel for|the kernel was restarted/"
        lab.wait(f"(head) => {said}.test(document.querySelector(head)?.innerText)", 60, head)
        lab.open(name)
        lab.wait_text("long · running for", ".jp-Cell:nth-child(3) .jp-OutputArea summary")
        lab.click(".jp-Cell:nth-child(3) .jp-OutputArea summary")
        lab.wait_text("Saved while the run was unfinished", ".jp-Cell:nth-child(3) .jp-OutputArea")
        assert "model not found" not in lab.text("body").lower()
        assert lab.outside == []

    def slowest_frame_ms(self, lab: Lab, rows: str) -> float:
        """Of the quietest of several scrolls through all rows; without what frames take in which nothing is scrolled, for the
        machine may have other things to do."""  # fmt: skip
        scroll = """async (rows) => {
          const list = document.querySelector(rows);
          const slowest = async (step) => {
            const times = [];
            for (let last, i = 0; i <= 60; i += 1) {
              step(i);
              const now = await new Promise((resolve) => requestAnimationFrame(resolve));
              if (last !== undefined) times.push(now - last);
              last = now;
            }
            return Math.max(...times);
          };
          const still = await slowest(() => {});
          const moved = await slowest((i) => { list.scrollTop = (i * list.scrollHeight) / 60; });
          return moved - Math.max(still - 17, 0);
        }"""
        slowest = math.inf
        for _ in range(10):
            slowest = min(slowest, float(lab.evaluate(scroll, rows)))
            if slowest < 100:
                break
        return slowest

    def test_cancel_and_retry(self, lab: Lab) -> None:
        failing = (
            "%%durable pay\nawait durable.run('fold', fold, 1)\nawait until('pay-go')\nawait durable.run('charge', charge, 7)"
        )
        charge = "\ndef charge(n):\n    if not pathlib.Path('paid').exists():\n        raise ValueError(f'declined <b>{n}</b>')"
        name = lab.write_notebook([HELPERS + charge, failing, "%%durable week\nawait durable.sleep('a week', '7d')"])
        lab.open(name)
        lab.run_all()
        lab.wait_text("fold", VIEW)
        (lab.root / "pay-go").touch()
        lab.wait_idle()
        lab.wait_text("pay · failed after", OUTPUT)
        lab.click(f"{OUTPUT} summary")
        lab.wait_text("ValueError: declined <b>7</b>", f"{OUTPUT} table")
        shoot(lab, "failed", CELL)
        (lab.root / "paid").touch()
        press(lab, "Retry")
        lab.wait_text("1 of 2 steps restored", OUTPUT)
        assert button(lab, "Retry", disabled=False) == 0
        lab.on_page(lambda page: page.locator(".jp-Cell").nth(2).locator(".jp-InputArea").click())
        lab.command("notebook:run-cell")
        lab.wait_text("sleeping", ".jp-Cell:nth-child(3) .dnb-run")
        press(lab, "Cancel", 2)
        lab.wait_text("week · stopped after", ".jp-Cell:nth-child(3) .jp-OutputArea")
        lab.wait("() => document.querySelectorAll('.dnb-again button').length === 1")
        lab.save()
        lab.reload()
        lab.wait("() => document.querySelectorAll('.dnb-again button').length === 1")
        assert errors(lab) == []
        lab.restart_kernel()
        lab.wait("() => document.querySelectorAll('.dnb-again button').length === 0")
        assert "week · stopped after" in lab.text(".jp-Cell:nth-child(3) .jp-OutputArea")
        lab.run_all()
        lab.wait_text("sleeping", ".jp-Cell:nth-child(3) .dnb-run")
        lab.restart_kernel()
        head = ".jp-Cell:nth-child(3) .dnb-run .dnb-head"
        lab.wait_text("the kernel was restarted: run the cell again", head)
        lab.on_page(lambda page: page.locator(".jp-Cell").nth(0).locator(".jp-InputArea").click())
        lab.command("notebook:run-cell")
        lab.wait_idle()
        press(lab, "Retry", 2)
        lab.wait_text("sleeping", head)

    def test_a_workflows_run_is_live_between_cells(self, lab: Lab) -> None:
        flow = """
@durable.workflow
async def order(n):
    await asyncio.gather(*(durable.run("charge", fold, i) for i in range(n)))
    await durable.run("wait", until, "truck")
    return await durable.run("ship", fold, 1)
"""
        name = lab.write_notebook([HELPERS + flow, "order.start(5, id='order-42')", "print('the next cell')"])
        lab.open(name)
        lab.run_all()
        lab.wait_idle()
        lab.wait_text("charge × 5", VIEW)
        (lab.root / "truck").touch()
        lab.wait_text("order · completed in", OUTPUT)
        (output,) = lab.outputs(1)
        assert output["data"].keys() == {"text/html", "text/plain"}
        assert "&#x27;truck&#x27;" in output["data"]["text/html"], "what its steps were given"
        assert errors(lab) == []

    def test_a_run_that_nobody_executes_is_retried_restarted_or_cancelled(self, lab: Lab) -> None:
        """By the view of it, displayed by a kernel that knows it from the store alone: what its steps were given, too."""
        flow = """
import os
@durable.workflow
async def left(n):
    await durable.run("charge", fold, n)
    await durable.run("wait", until, f"left-{n}")
if not os.path.exists("left-seen"):
    pathlib.Path("left-seen").touch()
    runs = [left.start(n, id=f"left-{n}") for n in range(2)]
    while not all(run.steps and run.steps[0].status == "completed" for run in runs):
        await asyncio.sleep(0.02)
    os.kill(os.getpid(), 9)
"""
        name = lab.write_notebook([HELPERS, flow, "durable.get_run('left-0')", "durable.get_run('left-1')"])
        lab.open(name)
        lab.run_all()
        lab.wait_reborn()
        lab.run_all()
        lab.wait_idle()
        for cell, n in ((2, 0), (3, 1)):
            output = f".jp-Cell:nth-child({cell + 1}) .jp-OutputArea"
            lab.wait_text("left · interrupted after", output)
            lab.click(f"{output} summary")
            lab.click(f"{output} td summary")
            lab.wait_text(f"arguments\n{n}\nresult\n{n}", f"{output} table")
            names = "(output) => [...document.querySelectorAll(output + ' button')].map((node) => node.innerText)"
            lab.wait(f"(output) => String(({names})(output)) === 'Retry,Restart,Cancel'", 20, output)
        press(lab, "Cancel", 2)
        lab.wait_text("left · cancelled after", ".jp-Cell:nth-child(3) .jp-OutputArea")
        press(lab, "Restart", 3)
        press(lab, "Discard what is recorded?", 3)
        view = ".jp-Cell:nth-child(4) .dnb-run"
        lab.wait_text("running", f"{view} .dnb-list [data-status=running]")
        assert "1 restored" not in lab.text(f"{view} .dnb-head")
        (lab.root / "left-1").touch()
        lab.wait_text("left · completed in", ".jp-Cell:nth-child(4) .jp-OutputArea")
        assert errors(lab) == []

    def test_an_approval_outlives_its_kernel_and_later_cells_run_when_it_is_given(self, lab: Lab) -> None:
        """With a comment; asked again with its first deadline; whoever presses twice, or after somebody else, decides once."""
        asking = """%%durable publish
paid = await durable.run("charge", fold, 1)
answers = await asyncio.gather(*(durable.approve("publish", f"Publish <b>{n}</b>?", timeout="2h") for n in range(2)))
[(answer.approved, answer.comment) for answer in answers]"""
        name = lab.write_notebook([HELPERS, asking, "print('later', answers[0].comment)"])
        lab.open(name)
        lab.run_all()
        lab.wait_text("Publish <b>1</b>?", VIEW)
        assert "waiting" in lab.text(f"{VIEW} .dnb-head")
        lab.wait_text("times out in 1:59:5", f"{VIEW} .dnb-asks")
        lab.wait("(asks) => !document.querySelector(asks).innerText.includes('1:59:5')", 20, f"{VIEW} .dnb-asks")
        lab.restart_kernel()
        lab.run_all()
        lab.wait("(asks) => /times out in 1:59:[0-4]/.test(document.querySelector(asks)?.innerText)", 30, f"{VIEW} .dnb-asks")
        assert "later" not in lab.text(".jp-Cell:nth-child(3) .jp-Cell-outputWrapper")
        cards = "Decision: Publish <b>{}</b>?"
        lab.on_page(lambda page: page.get_by_label("Comment on publish", exact=True).fill("fine <i>by</i> me"))
        lab.on_page(lambda page: page.get_by_role("group", name=cards.format(0)).get_by_text("Approve").dblclick())
        lab.on_page(lambda page: page.get_by_role("group", name=cards.format(0)).wait_for(state="detached"))
        lab.on_page(lambda page: page.get_by_role("group", name=cards.format(1)).get_by_text("Reject").click())
        lab.wait_idle()
        lab.wait_text("[(True, 'fine <i>by</i> me'), (False, '')]", f"{CELL} .jp-OutputArea-executeResult")
        lab.wait_text("later fine <i>by</i> me", ".jp-Cell:nth-child(3) .jp-Cell-outputWrapper")
        lab.wait_text("publish · ran in", OUTPUT)
        assert errors(lab) == []

    def test_a_childs_steps_fold_into_their_parent_and_its_question_is_answered_there(self, lab: Lab) -> None:
        flow = """
@durable.workflow
async def kid(n):
    await durable.map("part", fold, range(n))
    return (await durable.approve("sure", "Really <b>sure</b>?")).comment
"""
        name = lab.write_notebook([HELPERS + flow, "%%durable parent\nawait durable.invoke('kid', kid, 3)"])
        lab.open(name)
        lab.run_all()
        lab.wait_text("Really <b>sure</b>?", f"{VIEW} .dnb-asks", 30)
        assert "part" not in lab.text(LIST)
        lab.on_page(lambda page: page.locator(f"{LIST} .dnb-row").first.click())
        lab.wait_text("part × 3", LIST)
        lab.on_page(lambda page: page.get_by_label("Comment on kid/sure").fill("as can be"))
        press(lab, "Approve")
        lab.wait_text("as can be", f"{CELL} .jp-OutputArea-executeResult")
        lab.wait_text("parent · ran in", OUTPUT)
        assert errors(lab) == []
