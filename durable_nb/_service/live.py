"""The page's sockets: each shows the dashboard or one run, and hears what its reader asks. States are those of the notebook's
views, which the same JavaScript draws."""  # fmt: skip

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any, Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect

from durable_nb._engine.workflows import Workflows
from durable_nb._housekeeping.dashboard import source_of
from durable_nb._service.door import Door, Refused
from durable_nb._view.actions import place_of, waits_for_decision
from durable_nb._view.dashboard import order_of, query_of, state_of
from durable_nb._view.listing import Query
from durable_nb._view.state import Look, Source, State, same, whole
from durable_nb._view.words import clipped
from durable_nb._workflow import Run
from durable_nb.errors import DurableError

WRONG_TOKEN = 4401
_LOOK_S = 0.5
_BEAT_S = 10.0
"""With nothing new the state is told again this often: a page that hears nothing for long says so."""
_OPENING_S = 10.0

log = logging.getLogger("durable_nb")


class View(Protocol):
    """What one socket shows. Called from threads, one call at a time."""

    def state(self, version: int) -> State: ...
    def hear(self, message: dict[str, Any]) -> None: ...


async def live(socket: WebSocket, door: Door, workflows: Workflows) -> None:
    """Serve one socket until its page is gone."""
    try:
        door.check_origin(socket)
    except Refused:
        await socket.close(4403)
        return
    await socket.accept()
    with contextlib.suppress(WebSocketDisconnect, TimeoutError, ValueError, KeyError, TypeError):
        opening = await asyncio.wait_for(socket.receive_json(), _OPENING_S)
        try:
            door.check_token(socket, str(opening["token"]))
            view = _view(workflows, opening["show"])
        except Refused:
            await socket.close(WRONG_TOKEN)
            return
        except DurableError:
            await socket.close(4404)
            return
        await _converse(socket, view)


def _view(workflows: Workflows, show: dict[str, Any]) -> View:
    if "run" not in show:
        return _Board(workflows)
    workflows.check(str(show["run"]))
    return _OneRun(workflows, str(show["run"]))


async def _converse(socket: WebSocket, view: View) -> None:
    asked = asyncio.Event()

    async def hear() -> None:
        while True:
            message = await socket.receive_json()
            await asyncio.to_thread(view.hear, message)
            asked.set()

    hearing = asyncio.create_task(hear())
    told: State = {"version": 0}
    told_at = 0.0
    try:
        while not hearing.done():
            asked.clear()
            new = await asyncio.to_thread(view.state, told["version"] + 1)
            if not same(told, new) or time.monotonic() > told_at + _BEAT_S:
                told, told_at = new, time.monotonic()
                await socket.send_json(new)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asked.wait(), _LOOK_S)
    finally:
        hearing.cancel()
        with contextlib.suppress(asyncio.CancelledError, WebSocketDisconnect, ValueError, RuntimeError):
            await hearing


class _Board:
    """The dashboard."""

    def __init__(self, workflows: Workflows) -> None:
        self._source = source_of(workflows)
        self._query, self._notice = Query(), dict[str, Any]()

    def state(self, version: int) -> State:
        page = self._source.page(self._query)
        steps = self._source.steps(self._query.open) if self._query.open else ()
        return state_of(page, self._source.actions, version=version, notice=self._notice, steps=steps)

    def hear(self, message: dict[str, Any]) -> None:
        bad = True
        try:
            match message:
                case {"ask": "look", "query": dict(asked)}:
                    self._query = query_of(asked)
                    return
                case {"ask": str(action), "run": str(run_id), **rest} if (order := order_of(rest)) is not None:
                    said, bad = self._source.send(action, run_id, *order), False
                case _:
                    said = f"refused: a message that it doesn't know: {message!r:.200}"
        except (DurableError, RuntimeError, ValueError) as error:
            said = f"refused: {error}"
        if bad:
            log.warning("the page: %s", clipped(said, 300))
        self._notice = {"n": self._notice.get("n", 0) + 1, "text": clipped(said, 600), "bad": bad}


class _OneRun:
    """The view of one run."""

    def __init__(self, workflows: Workflows, run_id: str) -> None:
        self._run, self._store = Run(run_id, workflows), source_of(workflows)
        self._source = Source(lambda: workflows.snapshot(run_id), workflows.catalog.find(run_id)[0].kind)
        self._look = Look()

    def state(self, version: int) -> State:
        return whole(self._source, self._look, version=version, now=time.time())

    def hear(self, message: dict[str, Any]) -> None:
        match message:
            case {"ask": "rows", "from": int(first), "to": int(last)}:
                self._look.at(first, last)
            case {"ask": "unfold", "row": int(row), "open": bool(unfolded)}:
                self._look.toggle(row, unfolded)
            case {"ask": "approve" | "reject", "run": self._run.id, **rest} if (order := order_of(rest)) is not None:
                self._decide(message["ask"] == "approve", *order)
            case {"ask": str(action), "run": self._run.id}:
                self._act(action)
            case _:
                log.warning("the page: a message that it doesn't know was refused: %.200r", message)

    def _decide(self, approved: bool, path: str, comment: str) -> None:
        try:
            for step in self._source.snapshot().steps:
                if step.path == path and waits_for_decision(step):
                    self._run.approve(place_of(step), approved, comment)
        except DurableError as error:
            log.warning("the page: a decision on the run %r was refused: %.300s", self._run.id, error)

    def _act(self, action: str) -> None:
        try:
            self._store.send(action, self._run.id)
        except DurableError as error:
            log.warning("the page: %r of the run %r was refused: %.300s", action, self._run.id, error)
