"""The dashboard: the cells and runs of a store, live in a notebook, as html where it is saved, as text in a terminal.

The display is the html form alone, so that a saved notebook never shows a widget that is gone. Where a kernel lives, a
model without a view finds that html in the page and draws the live form in its place (`dashboard.js`). Its state:

    {"version": 3, "now": 1700000000.0, "store": ".durable_nb",
     "query": {"status": "", "kind": "", "workflow": "", "label": "", "page": 0, "cells_page": 0},
     "cells": {"total": 1, "pages": 1, "rows": [{"name": "load", "status": "completed", "at": 1699999990.0, ...}]},
     "runs": {"total": 9, "matched": 2, "pages": 1, "most": 25, "rows": [{"id": "order-42", "actions": [...], ...}]},
     "counts": {"running": 2}, "names": [["workflow", "order", 9]], "labels": [["shop", 4]],
     "steps": {"run": "order-42", "total": 3, "rows": [{"i": 0, "name": "charge", "status": "completed", ...}]},
     "unread": 0, "trouble": "", "notice": {"n": 1, "text": "...", "bad": false}}

Times are unix seconds; what is unknown is left out. It hears `{"ask": "look", "query": {...}}`, which it also takes for a sign
that somebody looks on, and `{"ask": ACTION, "run": ID}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from durable_nb._facts import Status, Step
from durable_nb._view import terminal
from durable_nb._view.assets import script, style
from durable_nb._view.listening import listening
from durable_nb._view.listing import KINDS, Page, Query, RunFacts
from durable_nb._view.printed import blocks, html, shown_path, text
from durable_nb._view.words import clipped, error_of, plain, word
from durable_nb.errors import DurableError

log = logging.getLogger("durable_nb")

LIMIT = 25 * 1024
"""Bytes of a state. The message that opens the model holds the JavaScript too, and 64 KiB have to suffice for both."""
_NAME, _ERROR, _LABELS, _STEPS = 160, 300, 8, 40
_LONGEST = 1000
"""Characters of what a page asks for."""
_COMMENT = 2000
_ASKS = 3
"""Decisions of a run that are asked for at once."""
_EVERY_S = 1.0
"""Between two looks at the store."""
_SHARE = 20
"""A look is followed by a pause this many times as long as its work took, ten thousand runs cost a tenth of a second."""
_LONGEST_S = 60.0
_GAP_S = 0.2
"""Between two looks that the page asks for."""
_BEAT_S = 10.0
"""With nothing new the state is told again this often: a page that hears nothing for long says so."""
_ATTENDED_S = 40.0
"""A page that looks on says so every 12 s; without one the store is left alone."""
_AT_MOST = 8
"""Dashboards of a session that stay live, the newest: each execution of a cell makes one."""

State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Action:
    """What can be asked of a run, or why it can't be."""

    name: str
    """As it is sent."""
    label: str
    refusal: str = ""


class Source(Protocol):
    """Where a dashboard looks, from any thread, and whom its buttons tell, on the kernel's loop."""

    path: str
    """The store's folder."""

    def page(self, query: Query) -> Page:
        """What there is now; StoreError."""
        ...

    def steps(self, run_id: str) -> Sequence[Step]:
        """Those of a run, in the order in which they were asked for; RunNotFoundError, StoreError."""
        ...

    def actions(self, run: RunFacts) -> Sequence[Action]:
        """What may be asked of a run."""
        ...

    def send(self, action: str, run_id: str, step: str = "", comment: str = "") -> str:
        """Ask it of the run; what to tell who asked. DurableError where it is refused, and nothing was sent. `step`: which
        decision to `approve` or `reject`."""  # fmt: skip
        ...


class Dashboard:
    """A store's cells and runs. Display it: as a cell's last expression, with `display`, or printed."""

    def __init__(self, source: Source, query: Query | None = None, *, live: Callable[[], bool] = lambda: False) -> None:
        """`live`: is there a front end that could show a live form?"""
        self._source, self._query, self._live = source, query or Query(), live

    def page(self) -> Page:
        """What there is now."""
        return _seen(self._source, self._query)

    def __repr__(self) -> str:
        return text(self.page())

    def show(self) -> None:
        """Write it to standard output, as a terminal shows it best."""
        terminal.show(blocks(self.page()))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:  # noqa: ARG002  IPython's protocol
        page = self.page()
        anchor = f"dnb-at-{uuid.uuid4().hex}"
        data = {"text/html": f'<div class="durable-nb-still {anchor}">\n{html(page)}\n</div>', "text/plain": text(page)}
        if self._live():
            _Live(self._source, page, anchor)
        return data, {"durable_nb": {"command": "dashboard"}}


class _Live:
    """The model of one display. A thread looks at the store as long as a page looks on, whatever the user's code does."""

    _all: ClassVar[OrderedDict[str, _Live]] = OrderedDict()

    def __init__(self, source: Source, page: Page, anchor: str) -> None:
        self._source, self._query = source, page.query
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        with contextlib.suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()  # the kernel's: this is called in a cell
        self._notice: State = {}
        self._attended_until = time.monotonic() + _ATTENDED_S
        self._told_at = time.monotonic()
        self._closed = False
        self._panel = _panel_class()(anchor, self._state(page, 0))
        self._panel.on_msg(self._heard)
        self._thread: threading.Thread | None = None
        _cells()
        self._attend()
        self._all[anchor] = self
        while len(self._all) > _AT_MOST:
            self._all.popitem(last=False)[1].close()

    def close(self) -> None:
        self._closed = True
        self._wanted.set()
        self._panel.layout.close()
        self._panel.close()

    def _heard(self, _widget: object, content: object, _buffers: object) -> None:
        match content:
            case {"ask": "look", "query": dict(asked)}:
                try:
                    self._query = query_of(asked)
                except ValueError as error:
                    self._refuse(f"a question that it doesn't understand ({error})")
            case {"ask": str(action), "run": str(run_id), **rest} if (order := order_of(rest)) is not None:
                self._on_loop(self._do, action, run_id, *order)
            case _:
                self._refuse(f"a message that it doesn't know: {plain(repr(content), 200)}")
        self._attend()

    def _do(self, action: str, run_id: str, step: str, comment: str) -> None:
        try:
            told = self._source.send(action, run_id, step, comment)
        except (DurableError, RuntimeError) as error:  # a RuntimeError where no loop could execute the run
            self._refuse(f"{action!r} of the run {run_id!r}: {error}")
        else:
            self._notice = {"n": self._notice.get("n", 0) + 1, "text": clipped(told, 2 * _ERROR), "bad": False}
        self._wanted.set()

    def _refuse(self, what: str) -> None:
        log.warning("the dashboard refused %s", clipped(what, 4 * _ERROR))
        self._notice = {"n": self._notice.get("n", 0) + 1, "text": clipped(f"refused: {what}", 2 * _ERROR), "bad": True}

    def _on_loop(self, do: Callable[..., None], *args: Any) -> None:
        """Call on the kernel's loop: ipykernel 7.1 hears messages on a thread with a loop of its own, which executes no run."""
        if self._loop is None:
            do(*args)
            return
        with contextlib.suppress(RuntimeError):  # it has ended, and nobody looks on
            self._loop.call_soon_threadsafe(do, *args)

    def _attend(self) -> None:
        with self._lock:
            self._attended_until = time.monotonic() + _ATTENDED_S
            self._wanted.set()
            if self._thread is None and not self._closed:
                self._on_loop(listening.begin, self)
                self._thread = threading.Thread(target=self._look_on, name="durable_nb dashboard", daemon=True)
                self._thread.start()

    def _look_on(self) -> None:
        while True:
            self._wanted.clear()
            used = time.thread_time()
            self._look()
            pause = max(_EVERY_S, min((time.thread_time() - used) * _SHARE, _LONGEST_S))
            time.sleep(_GAP_S)
            self._wanted.wait(pause - _GAP_S)
            # Messages wait while the user's code is executed: then nobody can say that they look on.
            busy = _cells().is_busy
            with self._lock:
                if self._closed or (time.monotonic() > self._attended_until and not busy):
                    self._thread = None
                    self._on_loop(listening.end, self)
                    return

    def _look(self) -> None:
        old = self._panel.now
        try:
            new = self._state(_seen(self._source, self._query), old["version"] + 1)
        except Exception as error:
            if "changed size during iteration" in str(error):  # a run that is executed here went on meanwhile: look again
                self._wanted.set()
                return
            log.exception("the dashboard could not look at the store")
            trouble = Page(self._source.path, time.time(), self._query, trouble=f"{type(error).__name__}: {error}")
            new = state_of(trouble, lambda _: (), version=old["version"] + 1, notice=self._notice)
        passing = {"version": 0, "now": 0}
        if {**old, **passing} == {**new, **passing} and time.monotonic() < self._told_at + _BEAT_S:
            return
        self._told_at = time.monotonic()
        self._panel.now = new
        self._panel.send_state("state")

    def _state(self, page: Page, version: int) -> State:
        steps: Sequence[Step] = ()
        if page.query.open and not page.trouble:
            with contextlib.suppress(DurableError):  # it is gone, or damaged: it has none to show
                steps = self._source.steps(page.query.open)
        return state_of(page, self._source.actions, version=version, notice=self._notice, steps=steps)


def order_of(rest: dict[Any, Any]) -> tuple[str, str] | None:
    """Return the step and the comment of a message; None where they are not texts."""
    step, comment = rest.get("step", ""), rest.get("comment", "")
    return (step, comment[:_COMMENT]) if isinstance(step, str) and isinstance(comment, str) else None


class _Cells:
    """Whether this notebook's kernel is executing a cell."""

    def __init__(self) -> None:
        from IPython.core.getipython import get_ipython

        self.is_busy = True  # the one that makes the first dashboard
        events = get_ipython().events  # type: ignore[union-attr]  # there is a front end
        events.register("pre_execute", self._begin)
        events.register("post_execute", self._end)

    def _begin(self) -> None:
        self.is_busy = True

    def _end(self) -> None:
        self.is_busy = False


_cells = functools.cache(_Cells)


def _seen(source: Source, query: Query) -> Page:
    """The page, or what keeps it from being told."""
    try:
        return source.page(query)
    except (DurableError, OSError) as error:
        return Page(source.path, time.time(), query, trouble=str(error))


def query_of(asked: dict[Any, Any]) -> Query:
    """The query of a message; ValueError."""
    usual = asdict(Query())
    for name, value in asked.items():
        if name not in usual or type(value) is not type(usual[name]) or len(str(value)) > _LONGEST:
            raise ValueError(plain(f"{name!r}: {value!r}", 200))
    query = Query(**asked)
    if query.status not in ("", "stored", *Status) or query.kind not in ("", *KINDS):
        raise ValueError(plain(f"{query.status!r}, {query.kind!r}", 200))
    return query


def state_of(
    page: Page,
    actions: Callable[[RunFacts], Sequence[Action]],
    *,
    version: int,
    notice: State | None = None,
    steps: Sequence[Step] = (),
) -> State:
    """Return what the JavaScript is told, with as much of long texts and of the names to choose from as fits into `LIMIT`."""
    length, named = _ERROR, 60
    while True:
        state = _state(page, actions, length, named)
        state |= {"version": version, "now": round(page.at, 3), "notice": notice or {}}
        if page.query.open:
            state["steps"] = _steps(page.query.open, steps, length)
        if len(json.dumps(state, ensure_ascii=False).encode()) <= LIMIT or length < 4:
            return state
        length, named = length * 2 // 3, named // 2


def _state(page: Page, actions: Callable[[RunFacts], Sequence[Action]], length: int, named: int) -> State:
    name = min(_NAME, length)
    return {
        "store": clipped(shown_path(page.path), name),
        "query": asdict(page.query),
        "cells": {
            "total": page.cells_total,
            "pages": page.cells_pages,
            "most": page.most,
            "rows": [
                _known(
                    name=clipped(cell.name, name),
                    status=cell.status,
                    at=cell.last_run_at,
                    steps=cell.steps,
                    variables=cell.variables,
                    size=cell.size,
                    took=cell.took_s,
                    saves=cell.saves_s,
                    wake=cell.wake_at,
                )
                for cell in page.cells
            ],
        },
        "runs": {
            "total": page.total,
            "matched": page.matched,
            "pages": page.pages,
            "most": page.most,
            "rows": [
                _known(
                    id=_told_id(run),
                    kind=run.kind,
                    name=clipped(run.name, name),
                    status=run.status,
                    started=run.started_at,
                    ended=run.ended_at,
                    steps=run.steps,
                    wake=run.wake_at,
                    error=clipped(run.error, length) if run.error else None,
                    asks=_asks(run, length) or None,
                    labels=[clipped(label, min(60, length)) for label in run.labels[:_LABELS]] or None,
                    actions=[
                        _known(name=action.name, label=action.label, refusal=clipped(_refusal(run, action), length) or None)
                        for action in actions(run)
                    ],
                )
                for run in page.runs
            ],
        },
        "counts": page.counts,
        # a name that is cut would choose nothing
        "names": [[kind, known, n] for kind, known, n in page.names if len(known) <= _NAME][:named],
        "labels": [[label, n] for label, n in page.labels if len(label) <= _NAME][:named],
        "unread": page.unread,
        "trouble": clipped(page.trouble, 4 * _ERROR),
    }


def _asks(run: RunFacts, length: int) -> list[State]:
    """What a run waits to have decided; those that a button can send."""
    asked = [ask for ask in run.asks if len(ask.path) <= _NAME and ask.path.isprintable() and _told_id(run) == run.id]
    return [_known(path=ask.path, prompt=clipped(ask.prompt, length), deadline=ask.until) for ask in asked[:_ASKS]]


def _steps(run_id: str, steps: Sequence[Step], length: int) -> State:
    """Of many steps those that are not done with, and the last ones."""
    places = [i for i, step in enumerate(steps) if step.status not in (Status.COMPLETED, Status.PENDING)][-_STEPS:]
    room = _STEPS - len(places)
    places = sorted({*places, *range(max(len(steps) - room, 0), len(steps))})
    return {
        "run": run_id,
        "total": len(steps),
        "rows": [
            _known(
                i=i,
                name=clipped(step.path, min(_NAME, length)),
                status=word(step),
                started=step.started_at,
                ended=step.ended_at,
                attempts=step.attempts if step.attempts > 1 else None,
                wake=step.wake_at,
                error=clipped(error_of(step), length) if step.error else None,
                given=clipped(step.preview.arguments, length) or None,
                gave=clipped(step.preview.result, length) or None,
            )
            for i, step in ((i, steps[i]) for i in places)
        ],
    }


def _told_id(run: RunFacts) -> str:
    """The run's id, which its buttons send; of a very long one enough to tell it from others."""
    if len(run.id) <= _NAME and run.id.isprintable():
        return run.id
    return f"{plain(run.id, 60)} {hashlib.blake2b(run.id.encode(errors='surrogatepass'), digest_size=6).hexdigest()}"


def _refusal(run: RunFacts, action: Action) -> str:
    odd = "its id is too long, or too odd, for a button: use durable.get_run(id)"
    return action.refusal if _told_id(run) == run.id else odd


def _known(**facts: Any) -> State:
    return {name: round(fact, 3) if isinstance(fact, float) else fact for name, fact in facts.items() if fact is not None}


@functools.cache
def _panel_class() -> Any:
    """Make the model's class on first use: anywidget and ipywidgets take a quarter of a second to import."""
    import anywidget
    import traitlets

    class Panel(anywidget.AnyWidget):
        _esm = script("dashboard")
        _css = style("dashboard")
        anchor = traitlets.Unicode().tag(sync=True)
        # Not the trait's value but what was told last, as of now: a page that is loaded again asks for it.
        state = traitlets.Dict().tag(sync=True, to_json=lambda _value, panel: {**panel.now, "now": time.time()})

        def __init__(self, anchor: str, state: State) -> None:
            self.now = state
            super().__init__(anchor=anchor)

    return Panel
