"""How every view says a status, and what it makes of a user's texts before they are shown."""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import TYPE_CHECKING

from durable_nb._clock import say_duration
from durable_nb._facts import Snapshot, Status, Step
from durable_nb._preview import redacted

if TYPE_CHECKING:
    from collections.abc import Iterable

ACTIVE = frozenset({Status.RUNNING, Status.SLEEPING, Status.WAITING, Status.RETRYING})
BROKEN = frozenset({Status.FAILED, Status.INTERRUPTED})

ICONS = {
    "restored": "↺",
    "completed": "✓",
    "running": "▸",
    "sleeping": "◷",
    "waiting": "‖",
    "retrying": "↻",
    "pending": "·",
    "failed": "✗",
    "interrupted": "!",
    "cancelled": "⊘",
}
COLOURS = {
    "restored": "var(--jp-success-color2, #81c784)",
    "completed": "var(--jp-success-color1, #2e7d32)",
    "running": "var(--jp-brand-color1, #1976d2)",
    "sleeping": "var(--jp-warn-color1, #b26a00)",
    "waiting": "var(--jp-warn-color1, #b26a00)",
    "retrying": "var(--jp-warn-color1, #b26a00)",
    "interrupted": "var(--jp-warn-color1, #b26a00)",
    "failed": "var(--jp-error-color1, #d32f2f)",
}
"""For html that stays without our style sheet; a status without one has the colour of the text around it."""

TERMINAL = {
    "completed": "green",
    "restored": "green",
    "running": "blue",
    "sleeping": "yellow",
    "waiting": "yellow",
    "retrying": "yellow",
    "interrupted": "yellow",
    "failed": "red",
}
"""By rich."""

_ERROR = 8000
_ORDER = ("restored", *Status)


def word(step: Step) -> str:
    """Return what a reader is told of a step: its status, or `restored` where no body ran to complete it."""
    return "restored" if step.restored and step.status is Status.COMPLETED else step.status.value


def waits_for(what: Step | Snapshot) -> str:
    """Return what keeps a run or a step from beginning; '' where nothing does."""
    return f"waits for {what.waits_for}" if what.waits_for is not None and what.status is Status.PENDING else ""


def counted(words: Iterable[str]) -> dict[str, int]:
    """Return how often each word occurs, in the order in which a reader expects them."""
    found = Counter(words)
    return {str(name): found[name] for name in _ORDER if name in found}


def error_of(step: Step) -> str:
    """Return what a step's last failure said, without what looks like a credential; '' where it did not fail."""
    return redacted(step.error[:_ERROR]) if step.error else ""


def clipped(text: str, length: int) -> str:
    """Return `text` cut to `length`, and free of lone surrogates, which no message can carry."""
    kept = text if len(text) <= length else text[: length - 1] + "…"
    return kept.encode(errors="replace").decode()


def plain(text: str, length: int) -> str:
    """Return one line that can't move the cursor, colour the terminal or turn the text around it."""
    line = " ".join(text[: length * 4].split())
    return clipped("".join(char if char.isprintable() else " " for char in line), length)


def columns(cell: str) -> int:
    """Return the columns that a terminal gives to `cell`: two for a Chinese character, none for a combining accent."""
    return sum(0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in cell)


def say_size(size: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def say_seconds(seconds: float | None) -> str:
    """A duration; '' for None."""
    return "" if seconds is None else say_duration(seconds)
