"""The live view of one run: an anywidget that is told what changed, and what takes its place when the run ends."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Protocol

from durable_nb._facts import Status
from durable_nb._view import static, terminal
from durable_nb._view.actions import NO_APPROVALS, waits_for_decision
from durable_nb._view.assets import script, style
from durable_nb._view.listening import listening
from durable_nb._view.place import Place, is_terminal
from durable_nb._view.state import NAME, Look, Source, State, same, whole
from durable_nb._view.words import clipped

_PAUSE_S = 1 / 8
"""Between two updates."""
_SHARE = 25
"""An update that took long to work out is followed by a pause this many times as long: the loop is the user's."""
_LONGEST_PAUSE_S = 2.0
_BEAT_S = 10.0
"""With nothing new the state is told again this often: a front end that hears nothing for long says so."""
_CHILDREN_S = 0.5
"""So often a run is looked at whose children are at work: they are runs of their own, and say nothing of it here."""
_SOON_S = 0.15
"""A run that is over by then is only shown as it ended: a widget costs more than it tells."""
_AT_LEAST_S = 5.0
"""A widget that was made lives so long."""

ACTIONS = frozenset({"cancel", "retry", "restart", "approve", "reject"})
_COMMENT = 2000

log = logging.getLogger("durable_nb")


class Send(Protocol):
    """Puts a request of the reader's into the run's inbox; called on the kernel's loop."""

    def __call__(self, action: str, run_id: str, step: str | None = None, comment: str = "") -> None: ...


class RunView:
    """The live view of one run in the notebook.

    `live` says that a front end listens. Without one (nbclient, papermill, a terminal) nothing is shown until the end.
    A view that was never opened shows nothing, at the end neither. `place`: the display that it takes over, and leaves then.
    """

    def __init__(
        self,
        source: Source,
        *,
        live: bool,
        place: Place | None = None,
        send: Send | None = None,
        line: Callable[[], str] = str,
        why: Callable[[], str] = str,
        again: str = "run",
    ) -> None:
        """`line`: what stands above when the run has ended, and for those who see no widget; '' for what the run itself
        says. `why`: the reason for which the run began. `again`: what Retry executes, the `cell` or the `run`."""  # fmt: skip
        self._source, self._live, self._send = source, live, send
        self._place = place if place is not None else Place()
        self._line, self._why, self._again = line, why, again
        self._look = Look()
        self._opened = self._closed = self._due = False
        self._lock = threading.RLock()
        self._run_id = self._told_id = ""
        self._panel: Any = None
        self._anchor = f"dnb-at-{uuid.uuid4().hex}"
        """The class of its html. The display is html alone: a widget that is shown says 'model not found' for ever once its
        kernel is gone. The widget's model has no view; its script finds the html in the page and draws in its place."""
        self._asked: set[tuple[str, str]] = set()
        """What has been sent already: a button is pressed twice, its message sent again."""
        self._began = self._rest_until = self._told_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._beat: asyncio.TimerHandle | None = None
        self._show: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Show the run where its line is, or below the cell's output so far. Call it in the cell, on the kernel's loop."""
        if self._opened or self._closed:
            return
        self._opened = True
        # later messages belong to this cell, whichever step's context they are caused in
        self._context = contextvars.copy_context()
        snapshot = self._source.snapshot()
        self._run_id, self._told_id = snapshot.id, clipped(snapshot.id, NAME)
        self._stay_as = f"cell {snapshot.name}" if self._again == "cell" else snapshot.id
        forget(self._stay_as)
        if not self._live:
            return
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._show = self._loop.call_later(_SOON_S, self._appear, context=self._context)

    def changed(self) -> None:
        """Note that the run's facts changed: an update follows soon, at most eight a second. From any thread."""
        if self._panel is None or self._due or self._closed:
            return
        self._due = True
        self._hand_on(self._plan)

    def close(self) -> None:
        """Put the run's last state in the place of the live display, for good. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._opened:
                self._context.run(self._leave)

    @property
    def is_open(self) -> bool:
        """Does it show, or is it about to?"""
        return self._opened and not self._closed

    def _hand_on(self, what: Callable[..., None], *args: Any) -> None:
        """Call `what` on the kernel's loop: ipykernel 7.1 hears messages on a thread of its own."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody looks on
            if threading.get_ident() == self._thread:
                what(*args)
            else:
                self._loop.call_soon_threadsafe(functools.partial(what, *args), context=self._context)

    def _appear(self) -> None:
        with self._lock:
            if self._closed:
                return
            now = time.time()
            self._state = whole(self._source, self._look, version=0, now=now, why=self._why(), again=self._again)
            self._panel = panel_class()(self._anchor, self._state)
            self._appeared = self._loop.time()
            self._panel.on_msg(self._heard)
            listening.begin(self)
            self._told_at = self._loop.time()
            self._look_again(within_s=_CHILDREN_S)
            forms = static.bundle(self._source, line=self._line(), now=now, note=static.UNFINISHED, anchor=self._anchor)
            self._place.show(forms, view=self._run_id)

    def _plan(self) -> None:
        if self._timer is None:
            when = max(self._loop.time(), self._rest_until)
            self._timer = self._loop.call_at(when, self._update, context=self._context)

    def _update(self) -> None:
        with self._lock:
            self._timer = None
            if self._closed:
                return
            self._began = self._loop.time()
            used = time.thread_time()
            self._due = False  # before the facts are read: what changes from now on wants another update
            self._tell()
            rest = max(_PAUSE_S, min((time.thread_time() - used) * _SHARE, _LONGEST_PAUSE_S))
            self._rest_until = self._began + rest

    def _tell(self) -> None:
        old = self._state
        new = whole(self._source, self._look, version=old["version"] + 1, now=time.time(), why=self._why(), again=self._again)
        if not same(old, new) or self._loop.time() >= self._told_at + _BEAT_S:
            self._state = self._panel.now = new
            self._panel.send_state("state")
            self._told_at = self._loop.time()
        self._look_again(within_s=_CHILDREN_S if new["has_children"] else _BEAT_S)

    def _look_again(self, within_s: float) -> None:
        """Look at the run even where nobody says that it has changed."""
        if self._beat is not None:
            self._beat.cancel()
        when = min(self._loop.time() + within_s, self._told_at + _BEAT_S)
        self._beat = self._loop.call_at(when, self.changed, context=self._context)

    # -- what the reader asks ------------------------------------------------------------------------------------------

    def _heard(self, _widget: object, content: object, _buffers: object) -> None:
        match content:
            case {"ask": "rows", "from": int(first), "to": int(last)}:
                self._hand_on(self._look_at, first, last)
            case {"ask": "unfold", "row": int(row), "open": bool(unfolded)}:
                self._hand_on(self._unfold, row, unfolded)
            case {"ask": str(action), "run": self._told_id, **rest} if action in ACTIONS and _is_order(rest):
                self._hand_on(self._act, action, rest.get("step"), str(rest.get("comment", ""))[:_COMMENT])
            case _:
                self._refuse(content)

    def _look_at(self, first: int, last: int) -> None:
        self._look.at(first, last)
        self._answer()

    def _unfold(self, row: int, unfolded: bool) -> None:
        self._look.toggle(row, unfolded)
        self._answer()

    def _answer(self) -> None:
        """A reader waits: the pause for what took long to work out is not kept, only that between two updates."""
        self._rest_until = min(self._rest_until, self._began + _PAUSE_S)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due = True
        self._plan()

    def _act(self, action: str, step: str | None, comment: str) -> None:
        kind = "decide" if action in {"approve", "reject"} else action
        reason = self._refusal(action, step)
        if self._send is None or reason or (kind, step or "") in self._asked:
            log.info("view of run %r: %r was not sent: %s", self._run_id, action, reason or "it was sent before")
            return
        if kind not in ("retry", "restart"):  # a run may fail again
            self._asked.add((kind, step or ""))
        try:
            self._send(action, self._run_id, step, comment)
        except Exception:
            self._asked.discard((kind, step or ""))
            log.exception("view of run %r: %r could not be sent", self._run_id, action)
        else:
            if action == "cancel" and self._closed and self._again == "cell":
                self._cancelled()
        self.changed()

    def _refusal(self, action: str, step: str | None) -> str:
        """Return why that can't be asked for now; '' where it can."""
        snapshot = self._source.snapshot()
        if action in ("approve", "reject"):
            waits = any(one.path == step and waits_for_decision(one) for one in snapshot.steps)
            return "" if waits else NO_APPROVALS
        return str(asdict(self._source.actions(snapshot.status))[action])

    def _cancelled(self) -> None:
        """Nobody executes the cell's run, and from now on it is a cancelled one: no execution is there to say so."""
        ended = replace(self._source.snapshot(), status=Status.CANCELLED)
        self._source, self._line = Source(lambda: ended, "cell"), str
        self._context.run(self._leave)

    def _refuse(self, content: object) -> None:
        log.warning("view of run %r: a message that it doesn't know was refused: %.200r", self._run_id, content)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        listening.end(self)
        for timer in (self._timer, self._beat, self._show):
            if timer is not None:
                timer.cancel()
        reasons = asdict(self._source.actions(self._source.snapshot().status))
        offered = [name for name in ("retry", "restart", "cancel") if not reasons[name]]
        may_retry = self._live and "retry" in offered
        forms = static.bundle(self._source, line=self._line(), anchor=self._anchor if may_retry else "")
        if is_terminal():
            forms["text/plain"] = terminal.coloured([static.block(self._source.snapshot(), line=self._line())])
        self._place.show(forms, view=self._run_id)
        if may_retry:
            ended = {"ended": self._told_id, "again": self._again, "offered": offered}
            if self._panel is None:
                self._panel = panel_class()(self._anchor, ended)
                self._panel.on_msg(self._heard)
            self._panel.stay(self._stay_as, ended)
        elif self._panel is not None:
            # a page that is still loading the widget says 'failed to initialize' of one that is closed meanwhile
            left = self._appeared + _AT_LEAST_S - self._loop.time()
            if left > 0 and not self._loop.is_closed():
                self._loop.call_later(left, self._panel.leave)
            else:
                self._panel.leave()


def _is_order(rest: dict[Any, Any]) -> bool:
    return isinstance(rest.get("step"), str | None) and isinstance(rest.get("comment", ""), str)


_KEPT = 20
"""Runs that have failed, and whose button Retry acts as long as the kernel lives."""
_kept: dict[str, Any] = {}


@functools.cache
def panel_class() -> Any:
    """Make the widget's class on first use: anywidget and ipywidgets take a quarter of a second to import."""
    import anywidget
    import traitlets

    class Panel(anywidget.AnyWidget):
        _esm = script("run")
        _css = style("run")
        anchor = traitlets.Unicode().tag(sync=True)
        # Not the trait's value but what was told last, as of now: a page that is loaded again asks for it.
        state = traitlets.Dict().tag(sync=True, to_json=lambda _value, panel: {**panel.now, "now": time.time()})

        def __init__(self, anchor: str, state: State) -> None:
            self.now = state
            super().__init__(anchor=anchor)

        def stay(self, name: str, state: State) -> None:
            """Show nothing any more, but go on to hear what is asked, in place of what stayed for that name before."""
            forget(name)
            _kept[name] = self
            self.now = state
            self.send_state("state")
            while len(_kept) > _KEPT:
                forget(next(iter(_kept)))

        def leave(self) -> None:
            self.layout.close()
            self.close()

    return Panel


def forget(name: str) -> None:
    """Close the widget that has stayed for runs of that name, if there is one."""
    if (panel := _kept.pop(name, None)) is not None:
        panel.leave()
