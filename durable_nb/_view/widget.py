"""The live view of one run: an anywidget that is told what changed, and what takes its place when the run ends."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import threading
import time
from typing import TYPE_CHECKING, Any

from durable_nb._view import static
from durable_nb._view.assets import script, style
from durable_nb._view.state import State, difference, same, size, whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from durable_nb._facts import Snapshot

_PAUSE_S = 1 / 8
"""Between two updates."""
_SHARE = 10
"""An update that took long to work out is followed by a pause this many times as long: the loop is the user's."""
_REPAIR_S = 2.0
"""A front end that missed a difference is told the whole state within this time."""
_BEAT_S = 10.0
"""With nothing new the state is told again this often: a front end that hears nothing for long says so."""
_SMALL = 4 * 1024
"""Bytes up to which a whole state costs no more than a difference is worth."""
_OPEN_PAGES = 4


class RunView:
    """The live view of one run in the notebook.

    `live` says that a front end listens. Without one (nbclient, papermill, a terminal) nothing is shown until the end.
    A view that was never opened shows nothing, at the end neither.
    """

    def __init__(self, snapshot: Callable[[], Snapshot], *, live: bool) -> None:
        self._snapshot = snapshot
        self._live = live
        self._opened = False
        self._closed = False
        self._lock = threading.RLock()
        self._run_id = ""
        self._panel: Any = None
        self._handle: Any = None
        self._pages: tuple[int, ...] = ()
        self._due = False
        self._repair_at = 0.0
        self._rest_until = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._repair: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Display the run below the cell's output so far. Call it in the cell, on the kernel's loop."""
        if self._opened or self._closed:
            return
        self._opened = True
        # later messages belong to this cell, whichever step's context they are caused in
        self._context = contextvars.copy_context()
        snapshot = self._snapshot()
        self._run_id = snapshot.id
        if not self._live:
            return
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._repair_in(_BEAT_S)
        now = time.time()
        self._state = whole(snapshot, version=0, now=now)
        self._panel = _panel_class()(self._state)
        self._panel.on_msg(self._heard)
        view = {"version_major": 2, "version_minor": 0, "model_id": self._panel.model_id}
        self._handle = _display(
            {
                "application/vnd.jupyter.widget-view+json": view,
                **static.bundle(snapshot, now=now, note=static.UNFINISHED),
            },
            self._run_id,
        )

    def changed(self) -> None:
        """Note that the run's facts changed: an update follows soon, at most eight a second. From any thread."""
        if self._panel is None or self._due or self._closed:
            return
        self._due = True
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody looks on
            if threading.get_ident() == self._thread:
                self._plan()
            else:
                self._loop.call_soon_threadsafe(self._plan, context=self._context)

    def close(self) -> None:
        """Put the run's last state in the place of the live display, for good. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._opened:
                self._context.run(self._leave)

    def _plan(self) -> None:
        if self._timer is None:
            when = max(self._loop.time(), self._rest_until)
            self._timer = self._loop.call_at(when, self._update, context=self._context)

    def _update(self) -> None:
        with self._lock:
            self._timer = None
            if self._closed:
                return
            began = self._loop.time()
            self._due = False  # before the facts are read: what changes from now on wants another update
            self._tell(began)
            took = self._loop.time() - began
            self._rest_until = began + max(_PAUSE_S, took * _SHARE)

    def _tell(self, now: float) -> None:
        old = self._state
        new = whole(self._snapshot(), version=old["version"] + 1, now=time.time(), pages=self._pages)
        repair = now >= self._repair_at
        if same(old, new) and not repair:
            return
        self._state = self._panel.now = new
        if repair or size(new) <= _SMALL:
            self._panel.send_state("state")
            self._repair_in(_BEAT_S)
            return
        self._panel.send(difference(old, new))
        if self._repair_at > now + _REPAIR_S:
            self._repair_in(_REPAIR_S)

    def _repair_in(self, seconds: float) -> None:
        if self._repair is not None:
            self._repair.cancel()
        self._repair_at = self._loop.time() + seconds
        self._repair = self._loop.call_at(self._repair_at, self.changed, context=self._context)

    def _heard(self, _widget: object, content: object, _buffers: object) -> None:
        # ipykernel 7.1 calls this on a thread of its own: only hand it on
        match content:
            case {"ask": "page", "from": int(start)}:
                self._loop.call_soon_threadsafe(self._turn_to, start, context=self._context)

    def _turn_to(self, start: int) -> None:
        self._pages = (start, *(page for page in self._pages if page != start))[:_OPEN_PAGES]
        self.changed()

    def _leave(self) -> None:
        for timer in (self._timer, self._repair):
            if timer is not None:
                timer.cancel()
        data = static.bundle(self._snapshot())
        if self._handle is None:
            _display(data, self._run_id)
        else:
            self._handle.update(data, raw=True, metadata=_mark(self._run_id))
        if self._panel is not None:
            self._panel.layout.close()
            self._panel.close()


def _mark(run_id: str) -> dict[str, Any]:
    """Return the metadata by which a captured output is known as the package's own."""
    return {"durable_nb": {"view": run_id}}


def _display(data: dict[str, Any], run_id: str) -> Any:
    from IPython.core.getipython import get_ipython
    from IPython.display import display

    if get_ipython() is None:  # a plain script: `display` would print the bundle's repr
        return None
    return display(data, raw=True, display_id=True, metadata=_mark(run_id))  # type: ignore[no-untyped-call]


@functools.cache
def _panel_class() -> Any:
    """Make the widget's class on first use: anywidget and ipywidgets take a quarter of a second to import."""
    import anywidget
    import traitlets

    class Panel(anywidget.AnyWidget):
        _esm = script("run")
        _css = style("run")
        # Not the trait's value but what was told last, as of now: a page that is loaded again asks for it.
        state = traitlets.Dict().tag(sync=True, to_json=lambda _value, panel: {**panel.now, "now": time.time()})

        def __init__(self, state: State) -> None:
            self.now = state
            super().__init__()

    return Panel
