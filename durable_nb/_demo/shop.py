"""The far end of the demo: a small local shop that counts what reaches it.

POST /charge /orders /receipts /reviews. Each does something the first time; a request whose `Idempotency-Key` it knows gets the
first answer again and does nothing, as at a payment provider. GET /counts tells what was asked and what was done.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from contextlib import contextmanager, suppress
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self
from urllib.request import urlopen

if TYPE_CHECKING:
    from collections.abc import Iterator

PORT = 8765
"""Of a shop that a notebook opens for itself: always the same one, since a URL is part of what a step is known by."""

PATHS = {"/charge": "payment", "/orders": "order", "/receipts": "receipt", "/reviews": "review"}

_PATIENCE_S = 60.0


class Shop:
    """An open shop on a port of this machine (0: any free one), until `close` or the end of the block."""

    def __init__(self, *, port: int = 0, delay_s: float = 0.5) -> None:
        self._delay_s, self._lock = delay_s, threading.Lock()
        never = {"received": 0, "performed": 0, "answered": 0, "first_at": 0.0, "answered_at": 0.0}
        self._counts: dict[str, dict[str, Any]] = {path: {**never, "keys": {}} for path in PATHS}
        self._answers: dict[tuple[str, str], dict[str, Any]] = {}
        self._charged = 0.0
        self._hold = _hold("")
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("_Handler", (_Handler,), {"shop": self}))
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that was killed has hung up
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="durable_nb shop", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @contextmanager
    def hold(self, path: str) -> Iterator[threading.Event]:
        """Answer no request for `path` in the block: whoever asks is then in the middle of a step. The event tells that a
        request has come, and that its effect has happened; it never gets an answer."""  # fmt: skip
        hold = self._hold = _hold(path)
        try:
            yield hold.reached
        finally:
            self._hold = _hold("")
            hold.dropped.set()

    def counts(self) -> dict[str, dict[str, Any]]:
        """By path, how often it was asked, did something and answered; requests by idempotency key; and, by `time.monotonic()`,
        when the first request came and the last answer left (0 for never)."""  # fmt: skip
        with self._lock:
            return copy.deepcopy(self._counts)

    def charged(self) -> float:
        """What the customer has paid in all."""
        with self._lock:
            return self._charged

    def serve(self, path: str, key: str, order: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to one request, after the shop's delay; None where it was held."""
        with self._lock:
            counts, hold = self._counts[path], self._hold
            counts["received"] += 1
            counts["first_at"] = counts["first_at"] or time.monotonic()
            counts["keys"][key] = counts["keys"].get(key, 0) + 1
            answer = self._answers.get((path, key)) if key else None
            if answer is None:
                counts["performed"] += 1
                answer = {"id": f"{PATHS[path]}-{counts['performed']}", "amount": order.get("total", 0)}
                self._answers[path, key] = answer
                self._charged += answer["amount"] if path == "/charge" else 0
        if hold.path == path:
            hold.reached.set()
            hold.dropped.wait(_PATIENCE_S)
            return None
        time.sleep(self._delay_s)
        with self._lock:
            counts["answered"] += 1
            counts["answered_at"] = time.monotonic()
        return answer


def _hold(path: str) -> SimpleNamespace:
    return SimpleNamespace(path=path, reached=threading.Event(), dropped=threading.Event())


class _Handler(BaseHTTPRequestHandler):
    shop: Shop

    def do_GET(self) -> None:
        self._answer(self.shop.counts() if self.path == "/counts" else None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        key = self.headers.get("Idempotency-Key") or ""
        self._answer(self.shop.serve(self.path, key, json.loads(body or b"{}")) if self.path in PATHS else None)

    def _answer(self, content: dict[str, Any] | None) -> None:
        """None hangs up: the request was held, or there is nothing of that path."""
        if content is None:
            self.close_connection = True
            return
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  http.server's own name
        """The notebook is no place for an access log."""


def open_shop() -> str:
    """The address of a shop for a notebook: the one that is open on port 8765, else a new one in this process.

    It ends with the kernel, and so do its counts: after a restart, an empty count says that nothing was asked again. If
    another program has the port, the shop is on a free one, and steps done under the old address are not recognised.
    """
    url = f"http://127.0.0.1:{PORT}"
    try:
        return Shop(port=PORT).url
    except OSError:
        with suppress(OSError, ValueError, AttributeError, HTTPException), urlopen(f"{url}/counts", timeout=5) as answer:  # noqa: S310
            if json.load(answer).keys() == PATHS.keys():
                return url
        return Shop().url
