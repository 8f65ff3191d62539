"""The HTTP face: starts, controls and tells of runs. No logic of its own: it asks the engine what a notebook would ask.

Paths are matched by their segments as they were sent, and decoded then: an id with a slash, `%2F`, is one segment.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from durable_nb._engine import WATCH_S
from durable_nb._engine.timeline import is_behind, timeline
from durable_nb._engine.webhooks import UnsignedError
from durable_nb._engine.workflows import Workflows
from durable_nb._facts import Snapshot, Status, Step
from durable_nb._outside import decide, request_of, send
from durable_nb._service.door import MAX_BODY, Door, Keys, Refused, body_of, json_of
from durable_nb._service.live import live
from durable_nb._service.worker import take_runs
from durable_nb._view.assets import script, style
from durable_nb._workflow import Run, defined
from durable_nb.errors import DurableError, RunConflictError, RunNotFoundError, StepNotFoundError, StoreError

_ALIVE_S = 15.0
"""A stream without news says so this often: what stands between may close a silent one."""
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data:"
_ENDED = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})
_STATUS = ((RunNotFoundError, 404), (StepNotFoundError, 404), (RunConflictError, 409), (StoreError, 503), (DurableError, 409))

Handler = Callable[..., Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    """`{}` in a path stands for one segment, which the handler is given."""

    method: str
    path: str
    handler: Handler

    def match(self, segments: list[str]) -> list[str] | None:
        wanted = self.path.strip("/").split("/")
        if len(wanted) != len(segments) or any(w not in ("{}", s) for w, s in zip(wanted, segments, strict=True)):
            return None
        return [unquote(s) for w, s in zip(wanted, segments, strict=True) if w == "{}"]


class Face:
    """An ASGI application over one engine."""

    def __init__(
        self, workflows: Callable[[], Workflows], door: Door, *, max_body: int = MAX_BODY, begins: bool = False
    ) -> None:
        """`begins`: it executes the store's runs as a worker does; else whoever serves it does."""
        self._begins = begins
        self._provider, self._door, self._max_body = workflows, door, max_body
        self._taking: asyncio.Task[None] | None = None
        self._routes = [
            Route("POST", "/workflows/{}/runs", self._start),
            Route("GET", "/runs", self._runs),
            Route("GET", "/runs/{}", self._run),
            Route("GET", "/runs/{}/events", self._events),
            Route("POST", "/runs/{}/cancel", self._cancel),
            Route("POST", "/runs/{}/resume", self._resume),
            Route("POST", "/runs/{}/restart", self._restart),
            Route("POST", "/runs/{}/fork", self._fork),
            Route("POST", "/runs/{}/decisions/{}", self._decide),
            Route("POST", "/events/{}", self._notify),
            Route("POST", "/webhooks/{}", self._receive),
            Route("GET", "/healthz", self._health),
            Route("GET", "/", self._page),
            Route("GET", "/page/{}", self._asset),
        ]
        self._open = (self._health, self._page, self._asset, self._receive)
        """Answered without the token: the page asks for it itself, and posts to webhooks are signed."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and self._begins:
            self._begin()
        if scope["type"] == "websocket":
            socket = WebSocket(scope, receive, send)
            if _segments(scope) == ["page", "live"]:
                await live(socket, self._door, self._workflows)
            else:
                await socket.close(4404)
        elif scope["type"] == "http":
            request = Request(scope, receive)
            try:
                answer = await self._answered(request)
            except Refused as refused:
                headers = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else None
                answer = JSONResponse({"error": refused.why}, refused.status, headers)
            await answer(scope, receive, send)

    def _begin(self) -> None:
        """Mounted in an application, it executes the runs on that one's loop, from the first request on."""
        if self._taking is None or self._taking.done():
            workflows, loop = self._provider(), asyncio.get_running_loop()
            workflows.execute_on(loop)
            self._taking = loop.create_task(take_runs(workflows, asyncio.Event()))

    async def _answered(self, request: Request) -> Response:
        segments = _segments(request.scope)
        self._door.check_origin(request)
        matched = [(route, found) for route in self._routes if (found := route.match(segments)) is not None]
        if not any(route.handler in self._open for route, _ in matched):
            self._door.check_token(request)
        for route, found in matched:
            if route.method == request.method or (request.method == "HEAD" and route.method == "GET"):
                try:
                    return await route.handler(request, *found)
                except (DurableError, TypeError, ValueError) as error:
                    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 422)
                    raise Refused(status, f"{error}") from error
        if matched:
            raise Refused(405, f"{request.method} isn't done here; {', '.join(route.method for route, _ in matched)} is")
        raise Refused(404, f"nothing at {request.url.path[:200]!r}")

    @property
    def _workflows(self) -> Workflows:
        return self._provider()

    # -- what can be asked -------------------------------------------------------------------------------------------------

    async def _start(self, request: Request, name: str) -> Response:
        known: Keys = {"args": list, "kwargs": dict, "id": str, "labels": list, "delay": (str, int, float)}
        asked = await json_of(request, known, self._max_body)
        if name not in defined:
            raise Refused(404, f"no workflow {name!r} here; there are {', '.join(sorted(defined))}")
        [run] = await asyncio.to_thread(defined[name].start_many, [asked])
        return JSONResponse({"id": run.id}, 202, {"Location": f"/runs/{run.id}"})

    async def _runs(self, request: Request) -> Response:
        asked = dict(request.query_params)
        for name in asked:
            if name not in ("status", "workflow", "label", "limit"):
                raise Refused(422, f"unknown parameter {name[:100]!r}; there are status, workflow, label, limit")
        limit = asked.pop("limit", "100")
        if not limit.isdigit() or not 0 < int(limit) <= 10_000:
            raise Refused(422, f"limit={limit[:20]!r} is not a number from 1 to 10000")
        status = asked.get("status")
        if status is not None and status not in list(Status):
            raise Refused(422, f"no status {status[:100]!r}; there are {', '.join(Status)}")
        found = await asyncio.to_thread(lambda: self._workflows.snapshots(**asked, limit=int(limit), steps=True))
        return JSONResponse({"runs": [_listed(run) for run in found]})

    async def _run(self, _request: Request, run_id: str) -> Response:
        found = await asyncio.to_thread(self._workflows.snapshot, run_id)
        return JSONResponse({**_listed(found), "error": found.error, "steps": [_step(step) for step in found.steps]})

    async def _cancel(self, request: Request, run_id: str) -> Response:
        asked = await json_of(request, {"reason": str}, self._max_body)
        return await self._control(run_id, lambda run: run.cancel(asked.get("reason", "")))

    async def _resume(self, request: Request, run_id: str) -> Response:
        await json_of(request, {}, self._max_body)
        return await self._control(run_id, lambda run: run.resume())

    async def _restart(self, request: Request, run_id: str) -> Response:
        await json_of(request, {}, self._max_body)
        return await self._control(run_id, lambda run: run.restart())

    async def _fork(self, request: Request, run_id: str) -> Response:
        asked = await json_of(request, {"at": str}, self._max_body)
        if "at" not in asked:
            raise Refused(422, "'at' is missing: a step's path")

        def fork() -> str:
            self._workflows.check(run_id)
            return Run(run_id, self._workflows).fork(at=asked["at"]).id

        return JSONResponse({"id": await asyncio.to_thread(fork)}, 202)

    async def _control(self, run_id: str, ask: Callable[[Run], object]) -> Response:
        workflows = self._workflows

        def asked() -> Status:
            workflows.check(run_id)
            ask(Run(run_id, workflows))
            return workflows.status_of(run_id)

        return JSONResponse({"id": run_id, "status": await asyncio.to_thread(asked)}, 202)

    async def _decide(self, request: Request, run_id: str, step: str) -> Response:
        asked = await json_of(request, {"approved": bool, "comment": str}, self._max_body)
        if "approved" not in asked:
            raise Refused(422, "'approved' is missing: true or false")
        decided = functools.partial(decide, run_id, step, **asked, by="over HTTP", at=self._provider)
        await asyncio.to_thread(decided)
        return JSONResponse({"id": run_id, "step": step, "approved": asked["approved"]})

    async def _notify(self, request: Request, event_id: str) -> Response:
        asked = await json_of(request, {"data": object, "run_id": str}, self._max_body)
        sent = await asyncio.to_thread(
            lambda: send(request_of(event_id, asked.get("data"), asked.get("run_id")), self._provider)
        )
        return JSONResponse({"event_id": event_id, "run_ids": list(sent.run_ids), "buffered": sent.buffered}, 202)

    async def _receive(self, request: Request, token: str) -> Response:
        body = await body_of(request, self._max_body)
        try:
            await asyncio.to_thread(self._workflows.webhooks.receive, token, request.headers, body)
        except UnsignedError as error:
            raise Refused(401, str(error)) from None
        return JSONResponse({})

    async def _health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    # -- the page ----------------------------------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        if not request.url.path.endswith("/"):  # mounted: what the page asks for is relative to it
            return RedirectResponse(f"{request.url.path}/")
        return Response(_asset("page.html"), media_type="text/html", headers={"Content-Security-Policy": _POLICY})

    async def _asset(self, _request: Request, name: str) -> Response:
        match name:
            case "dashboard.js" | "run.js":
                return Response(script(name.removesuffix(".js")), media_type="text/javascript")
            case "views.css":
                return Response(f"{style('dashboard')}\n{style('run')}", media_type="text/css")
            case "page.js" | "page.css":
                return Response(_asset(name), media_type="text/javascript" if name == "page.js" else "text/css")
        raise Refused(404, f"nothing at {name[:100]!r}")

    # -- following ---------------------------------------------------------------------------------------------------------

    async def _events(self, request: Request, run_id: str) -> Response:
        last = request.headers.get("last-event-id", "") or "0"
        if not last.isdigit():
            raise Refused(422, f"Last-Event-ID {last[:20]!r} is not a number")
        await asyncio.to_thread(self._workflows.check, run_id)
        _, news = await asyncio.to_thread(self._news, run_id, int(last))
        if request.headers.get("last-event-id") and not news and await self._has_ended(run_id):
            return Response(status_code=204)  # all of it is known: a browser asks no more
        return StreamingResponse(
            self._told(request, run_id, int(last)),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def _told(self, request: Request, run_id: str, last: int) -> AsyncIterator[str]:
        silent_s = 0.0
        while not await request.is_disconnected():
            status, news = await asyncio.to_thread(self._news, run_id, last)
            for seq, text in news:
                last = seq
                yield f"id: {last}\ndata: {text}\n\n"
            if status in _ENDED:  # looked at before the rows were
                yield f"event: end\nid: {last}\ndata: {json.dumps({'status': status})}\n\n"
                return
            silent_s = 0.0 if news else silent_s + WATCH_S
            if silent_s > _ALIVE_S:
                silent_s = 0.0
                yield ":\n\n"
            await asyncio.sleep(WATCH_S / 2)

    def _news(self, run_id: str, last: int) -> tuple[Status, list[tuple[int, str]]]:
        """How the run stands, and its rows after that one."""
        workflows = self._workflows
        record, lease = workflows.catalog.find(run_id)
        status = workflows.catalog.status(record, lease)
        store = workflows.engine.store
        if not is_behind(store.journal, record, last):
            return status, []
        rows = timeline(store.journal, store.signer, record, last)
        return status, [(row.seq, json.dumps({k: v for k, v in asdict(row).items() if v not in ("", ())})) for row in rows]

    async def _has_ended(self, run_id: str) -> bool:
        return await asyncio.to_thread(self._workflows.status_of, run_id) in _ENDED


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("page", name).read_text(encoding="utf-8")


def _segments(scope: Scope) -> list[str]:
    """The path below where the application is mounted, in segments as they were sent."""
    path: str = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1").partition("?")[0]
    root = scope.get("root_path", "")
    return path.removeprefix(root).strip("/").split("/")


def _listed(run: Snapshot) -> dict[str, Any]:
    wakes = [at for at in (run.wake_at, *(step.wake_at for step in run.steps)) if at is not None]
    return {
        "id": run.id,
        "workflow": run.name,
        "status": run.status,
        "labels": list(run.labels),
        "started_at": run.started_at,
        "next_wake": min(wakes, default=None) if run.status not in _ENDED else None,
    }


def _step(step: Step) -> dict[str, Any]:
    return {"name": step.name, "path": step.path, "status": step.status, "attempts": step.attempts, "error": step.error}
