"""The notebook as the host of a run: where its steps show things, and what they see of the external."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from durable_nb._cellcache.mentions import looks_up_anything
from durable_nb._cellcache.steps import StepWatches, see_again, seen_by, still_holds
from durable_nb._cellcache.watch import Watch, watching_step
from durable_nb._current import StepRequest
from durable_nb._engine.cell_run import CellRun
from durable_nb._engine.muting import Muting
from durable_nb._engine.observing import Changed, Notice, Observation, Said
from durable_nb._ipython import capture
from durable_nb._ipython.capture import Recorder
from durable_nb._ipython.details import DetailedSource, Details
from durable_nb._ipython.runs import send
from durable_nb._view import RunView
from durable_nb.errors import StoreError

if TYPE_CHECKING:
    from durable_nb._cellcache.external import Around
    from durable_nb._facts import Snapshot
    from durable_nb._fingerprint import Fingerprint
    from durable_nb._ipython.status import StatusLine


class NotebookHost:
    """One durable cell as the host of its run."""

    watch: Watch | None = None
    """Of what the cell reads, once it is watched: what a restored step saw counts for the cell, too."""

    def __init__(
        self, run: CellRun, shell: Any, recorder: Recorder, status: StatusLine, around: Around, *, live: bool, quiet: bool
    ) -> None:
        """`around`: what records of the external state are compared with; `live`: there is a front end; `quiet`: no view."""
        self._run, self._shell, self._recorder, self._status = run, shell, recorder, status
        self._live, self._quiet = live, quiet
        self.view: RunView | None = None
        self._details = Details(recorder.written_by)
        self._watches = StepWatches(around)

    @contextlib.contextmanager
    def recording(
        self, path: str, request: StepRequest, found: Fingerprint | None
    ) -> Iterator[Callable[[], tuple[bytes, bytes]]]:
        if request.kind != "run":  # a body of ours: it looks at nothing of the user's but what it was given
            with self._recorder.step(path) as shown:
                yield lambda: (shown(), b"")
            return
        watch = self._watches.watch(
            request.fn, (*request.args, *request.kwargs.values()), found.versions if found is not None else ()
        )
        if looks_up_anything(watch.mentions):
            self._status.advise(
                f"step {request.name!r} looks names up while it runs, which can't be followed to the end: it runs again where "
                "variables change that its texts name"
            )
        with self._recorder.step(path) as shown, watching_step(watch):
            yield lambda: (shown(), seen_by(watch))

    def show_again(self, shown: bytes, seen: bytes) -> None:
        capture.show_again(self._shell, shown, lambda _n, _forms: None)
        if seen and self.watch is not None:
            see_again(seen, self.watch)

    def holds(self, seen: bytes) -> bool:
        return still_holds(seen, self._watches.around)

    def observe(self, observation: Observation) -> None:
        """What the run says."""
        match observation:
            case Changed():
                self._show()
            case Notice(text, is_advice):
                if is_advice:
                    self._status.advise(text)
                elif not self._live:  # with a front end the view shows it
                    self._status.warn(text)
            case _ if not self._quiet:
                self._details.note(observation)
                if isinstance(observation, Said) and self.view is not None:
                    self.view.changed()

    def _snapshot(self) -> Snapshot:
        """The run's, with the steps of the children that it has invoked: those take a look at the store."""
        found: Snapshot = self._run.snapshot()
        if any(step.child is not None for step in found.steps):
            with contextlib.suppress(StoreError):  # `show` tells of it
                found = replace(found, steps=self._run.runs.snapshot(self._run.id).steps)
        return found

    def _show(self) -> None:
        if self._quiet:
            return
        if self.view is None:
            if not self._run.snapshot().steps:  # a plain cell gets no view
                return
            self.view = RunView(
                DetailedSource(self._snapshot, self._details, "cell"),
                live=self._live,
                place=self._status.place,
                send=send,
                line=self._status.line,
                why=lambda: self._status.why,
                again="cell",
            )
            self.view.open()
        self.view.changed()


class NotebookMuting(Muting):
    """Keeps what a repeated workflow displays from the notebook as well."""

    def __init__(self, shell: Any) -> None:
        super().__init__()
        self._publisher = shell.display_pub

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        register = getattr(self._publisher, "register_hook", None)  # ipykernel's: it calls the hooks of this thread
        if register is not None:
            register(self._passed)
        try:
            with super().installed():
                yield
        finally:
            if register is not None:
                self._publisher.unregister_hook(self._passed)

    def _passed(self, message: Any) -> Any:
        return None if self.swallows() else message
