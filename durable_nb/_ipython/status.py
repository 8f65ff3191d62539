"""The one line above a durable cell's output: why it runs, and what it took or what restoring saved. Between the two, where
the cell has steps, the view of its run stands in its place."""

from __future__ import annotations

import html
import sys

from durable_nb._clock import say_duration, say_when
from durable_nb._facts import Snapshot, Status
from durable_nb._housekeeping.tables import count
from durable_nb._view import Place, RunView
from durable_nb._view.words import say_size

_STYLE = "color:var(--jp-ui-font-color2,#616161);font-size:var(--jp-ui-font-size1,13px)"


class StatusLine:
    """A display that is updated in place. Without a front end only misses and warnings are told, on stderr."""

    def __init__(self, label: str, *, shown: bool, live: bool) -> None:
        self._label, self._shown, self._live = label, shown, live
        self.place = Place(cell=label)
        """The display that holds the line, and meanwhile the view."""
        self.why = ""
        """The reason for which the cell runs."""
        self._text = ""
        self._notes: list[str] = []

    def show(self, state: str, text: str) -> None:
        """The cell is in `state` (running, waiting)."""
        self.why = text if state == "running" else ""
        if self._live:
            self._display(state, f"{state}: {text}")
        elif state == "running":
            self.warn(f"running: {text}")

    def line(self) -> str:
        """Return what the line says now."""
        return " · ".join([f"{self._label} · {self._text}", *self._notes])

    def advise(self, text: str) -> None:
        """Something the user may want to do, told at the end."""
        if text not in self._notes:
            self._notes.append(text)

    def still_running(self, step: str) -> None:
        """The cell was stopped, and the thread of that step could not be."""
        text = f"step {step!r} is still running in the background; run the cell again to wait for it"
        if self._live and self._shown:
            self.advise(text)
        else:
            self.warn(text)

    def not_stored(self, why: str) -> None:
        """The cell will run again next time, and why."""
        text = f"not stored: {why}"
        if self._live and self._shown:
            self._notes.insert(0, text)
        else:
            self.warn(text)

    def restored(self, variables: int, outputs: int, size: int, took_s: float, saved_s: float) -> None:
        """The cell was taken from the store."""
        if not self._live:
            return
        counts = (
            ", ".join(count(n, what) for n, what in ((variables, "variable"), (outputs, "output")) if n) or "nothing to show"
        )
        saved = f", saved {say_duration(saved_s)}" if saved_s > took_s else ""
        self._display("restored", f"restored {counts}, {say_size(size)} in {say_duration(took_s)}{saved}")

    def ended(self, status: Status, took_s: float, run: Snapshot, view: RunView | None) -> None:
        """The cell ran; its view becomes the line, and unfolds."""
        kept = sum(step.status is Status.COMPLETED for step in run.steps)
        restored = sum(step.restored for step in run.steps)
        steps = f", {restored} of {count(len(run.steps), 'step')} restored" if restored else ""
        if status is Status.COMPLETED:
            text = f"ran in {say_duration(took_s)}{steps}"
        else:
            word = "failed" if status is Status.FAILED else "stopped"
            wakes = min(
                (step.wake_at for step in run.steps if step.wake_at and step.status is Status.INTERRUPTED), default=None
            )
            held = [f"{count(kept, 'step')} kept"] if kept else []
            held += [f"next wake {say_when(wakes)}"] if wakes is not None and status is not Status.FAILED else []
            text = f"{word} after {say_duration(took_s)}"
            text += f", {', '.join(held)}: run the cell again to resume" if held else ""
        if view is not None:
            self._text = text
            self.place.mark["state"] = status.value
            view.close()
        elif self._live:
            self._display(status.value, text)

    def warn(self, text: str) -> None:
        """One line on stderr."""
        sys.stderr.write(f"durable_nb: {self._label} · {text}\n")
        sys.stderr.flush()

    def _display(self, state: str, text: str) -> None:
        self._text = text
        if self._shown:
            line = self.line()
            bundle = {"text/plain": line, "text/html": f'<div style="{_STYLE}">{html.escape(line)}</div>'}
            self.place.show(bundle, state=state)
