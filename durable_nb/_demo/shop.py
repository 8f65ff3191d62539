"""The far end of the demo: a small local shop that counts what reaches it.

POST /charge /orders /receipts /reviews. Each does something the first time, as often as it likes to wait before it answers;
a request whose `Idempotency-Key` it knows gets the first answer again and does nothing, as at a payment provider. GET /counts
tells what was asked and what was done.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.request import urlopen

PORT = 8765
"""Of a shop that a notebook opens for itself: always the same one, since a URL is part of what a step is known by."""

PATHS = {"/charge": "payment", "/orders": "order", "/receipts": "receipt", "/reviews": "review"}

_PATIENCE_S = 60.0


@dataclass(slots=True)
class Tally:
    """What one path has seen. Times are `time.monotonic()`, 0 for never."""

    received: int = 0
    performed: int = 0
    """Requests that did something: the first one of each key."""
    answered: int = 0
    keys: dict[str, int] = field(default_factory=dict)
    """Requests by idempotency key."""
    first_at: float = 0.0
    """When the first request came."""
    answered_at: float = 0.0
    """When the last answer left."""


class Shop:
    """An open shop on a port of this machine (0: any free one). Enter it, or call `close`."""

    def __init__(self, *, port: int = 0, delay_s: float = 0.5) -> None:
        self.delay_s = delay_s
        self._lock = threading.Lock()
        self._tallies = {path: Tally() for path in PATHS}
        self._answers: dict[tuple[str, str], dict[str, Any]] = {}
        self._charged = 0.0
        self._held = Hold("")
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.shop = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="durable_nb shop", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def hold(self, path: str) -> Hold:
        """Answer no request for `path` until the hold is dropped: whoever asks is then in the middle of a step."""
        self._held = Hold(path)
        return self._held

    def counts(self) -> dict[str, dict[str, Any]]:
        """All tallies as they stand, by path."""
        with self._lock:
            return {path: asdict(tally) for path, tally in self._tallies.items()}

    def charged(self) -> float:
        """What the customer has paid in all."""
        with self._lock:
            return self._charged

    def serve(self, path: str, key: str, order: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to one request, after the shop's delay; None where the hold on it was dropped."""
        with self._lock:
            tally = self._tallies[path]
            tally.received += 1
            tally.first_at = tally.first_at or time.monotonic()
            tally.keys[key] = tally.keys.get(key, 0) + 1
            answer = self._answers.get((path, key)) if key else None
            if answer is None:
                tally.performed += 1
                answer = {"id": f"{PATHS[path]}-{tally.performed}", "amount": order.get("total", 0)}
                self._answers[path, key] = answer
                self._charged += answer["amount"] if path == "/charge" else 0
        hold = self._held
        if hold.path == path:
            hold.reached.set()
            hold.dropped.wait(_PATIENCE_S)
            return None
        time.sleep(self.delay_s)
        with self._lock:
            tally.answered += 1
            tally.answered_at = time.monotonic()
        return answer


class Hold:
    """A path whose requests are kept waiting."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.reached = threading.Event()
        """A request has come, and its effect has happened."""
        self.dropped = threading.Event()

    def drop(self) -> None:
        """Give up the waiting requests without an answer; later ones are served."""
        self.path = ""
        self.dropped.set()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    shop: Shop

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed has hung up: nothing to say."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self._answer(self.server.shop.counts() if self.path == "/counts" else None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        key = self.headers.get("Idempotency-Key") or ""
        self._answer(self.server.shop.serve(self.path, key, json.loads(body or b"{}")) if self.path in PATHS else None)

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
