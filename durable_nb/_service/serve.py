"""`durable-nb serve MODULE`: a worker that can be asked over HTTP."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import uvicorn

from durable_nb._current import use_engine
from durable_nb._engine import Engine
from durable_nb._engine.workflows import Workflows
from durable_nb._service.door import MAX_BODY, Door, is_loopback
from durable_nb._service.mounted import TOKEN
from durable_nb._service.web import Face
from durable_nb._service.worker import PATIENCE_S, imported, log, take_runs
from durable_nb._store import Store
from durable_nb.errors import DurableError

_SIGNALS = signal.SIGTERM, signal.SIGINT


def serve(
    module: str, store: Path, host: str, port: int, *, say: Callable[[str], object] = print, max_body: int = MAX_BODY
) -> None:
    """Serve until SIGTERM or Ctrl-C; `say` is told the address. DurableError where that can't be, and nothing was run."""
    token = os.environ.get(TOKEN, "")
    if not token and not is_loopback(host):
        raise DurableError(
            f"the address {host!r} can be reached from elsewhere, so a token is needed: set {TOKEN} to a long random text, and "
            "clients send it as 'Authorization: Bearer TOKEN'. Nothing was started"
        )
    imported(module)
    listening = _listening(host, port)
    opened = Store(store)
    try:
        asyncio.run(_serve(opened, listening, Door(token, own_names=is_loopback(host)), say, max_body))
    finally:
        opened.close()


class _Server(uvicorn.Server):
    """Its own way with signals ends the process before the runs are let go."""

    capture_signals = nullcontext  # type: ignore[assignment]


async def _serve(store: Store, listening: socket.socket, door: Door, say: Callable[[str], object], max_body: int) -> None:
    workflows = Workflows(Engine(store))
    use_engine(lambda: workflows)
    face = Face(lambda: workflows, door, max_body=max_body)
    server = _Server(uvicorn.Config(face, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1))
    stopping = asyncio.Event()
    taking = asyncio.create_task(take_runs(workflows, stopping))
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.should_exit = True
        for number in _SIGNALS:  # told again, it ends at once
            loop.remove_signal_handler(number)

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    host, port = listening.getsockname()[:2]
    say(f"page http://{f'[{host}]' if ':' in host else host}:{port}")
    try:
        await server.serve([listening])
    finally:
        log.info("stops; others go on with its runs")
        stopping.set()
        await taking
        await workflows.retire(PATIENCE_S)


def _listening(host: str, port: int) -> socket.socket:
    """A socket at that address; DurableError where it is in use, or none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(1024)
    except OSError as error:
        found.close()
        why = error.strerror or str(error)
        raise DurableError(f"can't listen on {host}:{port}: {why}; nothing was started. Choose another --port") from None
    return found
