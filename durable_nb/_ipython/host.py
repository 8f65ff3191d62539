"""The notebook as the host of a run: where its steps show things, and what they see of the world."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from durable_nb._cellcache.world import Watch, World, watching_step
from durable_nb._cellrun import CellRun
from durable_nb._ipython import capture
from durable_nb._run import Stage

if TYPE_CHECKING:
    from durable_nb._ipython.cell import CellExecution


class NotebookHost(Stage):
    """One durable cell as the host of its run."""

    def __init__(self, cell: CellExecution, run: CellRun) -> None:
        self._cell = cell
        self._run = run
        self._view: Any = None

    @contextlib.contextmanager
    def recording(self, path: str) -> Iterator[Callable[[], tuple[bytes, bytes]]]:
        watch = Watch((), self._cell.engine.store.path)
        with self._cell.recorder.step(path) as shown, watching_step(watch):

            def noted() -> tuple[bytes, bytes]:
                world = watch.read()
                return shown(), msgspec.msgpack.encode(world) if world.files else b""

            yield noted

    def show_again(self, shown: bytes, seen: bytes) -> None:
        capture.show_again(self._cell.shell, shown, lambda _n, _forms: None)
        if seen and self._cell.watch is not None:
            self._cell.watch.saw(msgspec.msgpack.decode(seen, type=World))

    def holds(self, seen: bytes) -> bool:
        return not msgspec.msgpack.decode(seen, type=World).changes({})

    def notice(self, text: str) -> None:
        if not self._cell.live:  # with a front end the view shows it
            self._cell.status.warn(text)

    def advise(self, text: str) -> None:
        self._cell.status.advise(text)

    def changed(self) -> None:
        if self._cell.options.quiet:
            return
        if self._view is None:
            if not self._run.snapshot().steps:  # a plain cell gets no view
                return
            from durable_nb._view import RunView

            self._view = RunView(self._run.snapshot, live=self._cell.live)
            self._view.open()
        self._view.changed()

    def close(self) -> None:
        if self._view is not None:
            self._view.close()
