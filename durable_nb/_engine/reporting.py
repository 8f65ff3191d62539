"""What a run's code reports, on its way to disk: others read it while the run is executed."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Any

from durable_nb import _codec
from durable_nb import _records as rec
from durable_nb._engine.run_log import RunLog
from durable_nb._records import Reports, unpack
from durable_nb.errors import UnserializableError

_MOST_BYTES = 1 << 16
_TOGETHER_S = 0.2
"""Facts that are reported within this time share a commit."""


class Reporting:
    """Of one execution. `report` and `facts` may be called by any thread."""

    def __init__(self, log: RunLog) -> None:
        self._log, self._key = log, rec.facts_key(log.record.id)
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._recorded: dict[str, tuple[str, bytes]] = {}
        """On disk. Never changed: another takes its place."""
        self._reported: dict[str, tuple[str, bytes]] = {}
        """By this execution, on disk or not. Neither is this."""
        self._is_held = True
        """The code is repeated: what it reports was reported before, and what came later stands."""
        self._writing: asyncio.TimerHandle | None = None

    async def load(self) -> None:
        """Read what earlier executions have reported."""
        row = await self._log.read_row(self._key) if self._log.held.epoch > 1 else None  # else there was none
        if row is not None:
            found = unpack(self._log.signer, self._key, row, Reports)
            if found.generation == self._log.record.generation:
                self._recorded = found.facts

    def report(self, facts: dict[str, Any]) -> None:
        """Of each name the latest stands. UnserializableError where one can't be stored; then none is reported."""
        found = {rec.plain(name): _encoded(name, value) for name, value in facts.items()}
        with self._lock:
            self._reported = {**self._reported, **found}
        if not self._is_held:
            with suppress(RuntimeError):  # the loop is closed, and the run with it
                self._loop.call_soon_threadsafe(self._write_soon)

    def facts(self) -> dict[str, Any]:
        """The latest of each name."""
        return decoded(self._recorded if self._is_held else {**self._recorded, **self._reported})

    def release(self) -> None:
        """The code is not repeated any more."""
        if self._is_held:
            self._is_held = False
            self._write_soon()

    def write(self) -> None:
        """Hand over what is not on disk; of a run that ends, before its end."""
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        now = {**self._recorded, **self._reported}
        if now != self._recorded and not self._is_held:
            self._recorded = now
            self._log.commit(puts=(self._log.pack(self._key, Reports(now, self._log.record.generation)),))

    def _write_soon(self) -> None:
        if self._writing is None and any(self._recorded.get(name) != fact for name, fact in self._reported.items()):
            self._writing = self._loop.call_later(_TOGETHER_S, self.write)


def _encoded(name: str, value: Any) -> tuple[str, bytes]:
    try:
        form, data = _codec.encode(value)
    except Exception as error:
        raise UnserializableError(
            f"durable.report({name}=...): a {type(value).__qualname__} can't be stored ({type(error).__name__}: {error}); "
            "nothing was reported. Report plain data: numbers, text, lists, dicts"
        ) from error
    if len(data) > _MOST_BYTES:
        raise UnserializableError(
            f"durable.report({name}=...): {len(data):,} bytes, where a fact has at most {_MOST_BYTES:,}; nothing was reported. "
            "Return large values from steps, and report what they are about"
        )
    return form, data


def decoded(facts: dict[str, tuple[str, bytes]]) -> dict[str, Any]:
    """The facts as they were reported."""
    return {name: _codec.decode(*fact) for name, fact in facts.items()}
