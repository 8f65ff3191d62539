"""A run as static html and as text: what stays in a saved notebook, on GitHub, in a log. Pure functions of the facts.

The html is one line that unfolds (`<details>`), so that the cell's result stands where people look. It needs no style sheet and
no script, for a saved notebook has neither; where inline styles are dropped as well only the colours and the strip are lost.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING, Any

from durable_nb._clock import say_duration
from durable_nb._facts import Snapshot, Status, Step
from durable_nb._view.costs import money, tokens
from durable_nb._view.fold import LETTERS, Group, Row, fold, strip, timeline, told
from durable_nb._view.state import Detail, Source, failure, saved, since
from durable_nb._view.terminal import Block
from durable_nb._view.words import (
    ACTIVE,
    BROKEN,
    COLOURS,
    ICONS,
    TERMINAL,
    clipped,
    columns,
    counted,
    error_of,
    plain,
    waits_for,
    word,
)

if TYPE_CHECKING:
    from durable_nb._usage import Usage

UNFINISHED = "Saved while the run was unfinished: run the cell again and it resumes after its last completed step."

FIRST = 20
LAST = 30
WHOLE = 60
"""A run of so few rows is shown without gaps."""
BROKEN_ROWS = 40
_NAME = 60
_ERROR = 1000
_DETAILS = 40
"""Rows that unfold, at most: a saved notebook is a file that people mail."""

_QUIET = "color: var(--jp-ui-font-color2, #757575)"
_FONT = "font: 13px/1.5 var(--jp-ui-font-family, system-ui, sans-serif); font-variant-numeric: tabular-nums"
_INDENT = "16px"
"""What the triangle of a line that unfolds takes."""
_BELOW = f"padding-left: {_INDENT}"
_LABEL = f"{_QUIET}; font-size: 12px"
_CODE = (
    "margin: 2px 0 6px; padding: 0; max-height: 16em; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; "
    "background: none; font: 12px/1.45 var(--jp-code-font-family, monospace)"
)
_CLEAR = "rgba(128, 128, 128, 0.18)"
_COLOUR_OF = {letter: COLOURS.get(name, "rgba(128, 128, 128, 0.55)") for name, letter in LETTERS.items()} | {" ": _CLEAR}


def bundle(source: Source, *, line: str = "", now: float | None = None, note: str = "", anchor: str = "") -> dict[str, str]:
    """Return both forms, as a display's data. `line` is what stands above; without it the run says how it ended. `anchor`: the
    class by which a live page finds the html."""  # fmt: skip
    snapshot = source.snapshot()
    said: dict[str, Any] = {"line": line, "now": now, "note": note}
    found = html(snapshot, **said, detail=source.detail, footer=saved(snapshot))
    return {
        "text/html": f'<div class="{anchor}">\n{found}\n</div>' if anchor else found,
        "text/plain": text(snapshot, **said),
    }


def headline(snapshot: Snapshot, now: float | None = None) -> str:
    """Return how a run stands: `nightly · completed in 12.4 s · 4 steps, 2 restored`."""
    now = _last_known(snapshot) if now is None else now
    status = snapshot.status
    link = "in" if status is Status.COMPLETED else "for" if status in ACTIVE or status is Status.PENDING else "after"
    total = len(snapshot.steps)
    counts = counted(word(step) for step in snapshot.steps)
    if status is Status.COMPLETED:
        counts.pop("completed", None)
    steps = ", ".join([f"{total:,} step{'' if total == 1 else 's'}", *_told(counts)])
    took = say_duration(max((snapshot.ended_at or now) - snapshot.started_at, 0.0))
    parts = plain(snapshot.name, _NAME), f"{status.value} {link} {took}", waits_for(snapshot), steps
    return " · ".join(filter(None, parts))


def text(snapshot: Snapshot, *, line: str = "", now: float | None = None, note: str = "") -> str:
    """Return an aligned table. `now` is the end of what hasn't ended; without it the last known time is."""
    now = _last_known(snapshot) if now is None else now
    rows = [["step", "status", "time", "attempts"]]
    below: dict[int, str] = {}
    for part in _parts(fold(snapshot.steps)):
        if isinstance(part, str):
            below[len(rows) - 1] = "\n".join(filter(None, [below.get(len(rows) - 1), f"  … {part}"]))
            continue
        said = _Said(part, now)
        rows.append([plain(part.name, _NAME) + said.count, said.status, said.time, said.attempts])
        if said.error:
            below[len(rows) - 1] = f"    {plain(said.error, 110)}"
    head = line or headline(snapshot, now)
    lines = [head, *_aligned(rows, below)] if snapshot.steps else [head]
    return "\n".join([*lines, note] if note else lines)


def block(snapshot: Snapshot, *, line: str = "") -> Block:
    """Return the same for a terminal with colours; errors and gaps stand below."""
    now = _last_known(snapshot)
    rows, notes = [], []
    for part in _parts(fold(snapshot.steps)):
        if isinstance(part, str):
            notes.append(f"  … {part}")
            continue
        said = _Said(part, now)
        rows.append([plain(part.name, _NAME) + said.count, said.status, said.time, said.attempts])
        if said.error:
            notes.append(f"  {plain(part.name, _NAME)}: {plain(said.error, 110)}")
    columns_ = ("step", "status", "time", "attempts")
    return Block(line or headline(snapshot, now), columns_, rows, notes, TERMINAL, ("attempts",))


def html(
    snapshot: Snapshot,
    *,
    line: str = "",
    now: float | None = None,
    note: str = "",
    detail: Callable[[str], Detail] | None = None,
    footer: str = "",
) -> str:
    """Return the same as html; whatever a user named or raised is escaped."""
    now = _last_known(snapshot) if now is None else now
    head = _head(snapshot, line or headline(snapshot, now), now)
    if not snapshot.steps:
        return f'<div style="{_FONT}">{head}</div>'
    lines = [
        f'<details style="{_FONT}">',
        f'<summary style="cursor: pointer">{head}</summary>',
        *_table(snapshot, now, detail),
    ]
    lines += [f'<div style="{_QUIET}"><em>{escape(words)}</em></div>' for words in (footer, note) if words]
    return "\n".join([*lines, "</details>"])


def _how_far(step: Step) -> str:
    """What the step's body says of its progress, or what keeps it from beginning."""
    found, waits = step.progress, waits_for(step)
    if found is None or step.status not in ACTIVE:
        return f" · {waits}" if waits else ""
    far = f"{found.done:,} of {found.total:,}" if found.total is not None else f"{found.done:,}"
    return " · ".join(["", far, *filter(None, [plain(found.note, _NAME)])])


class _Said:
    """What one row says, in either form."""

    def __init__(self, row: Row, now: float) -> None:
        group: Group | None = told(row) if row.is_group else None
        step = row.step
        self.strip = group.strip if group else ""
        self.count = self.attempts = ""
        if group is None:
            self.word = word(step)
            self.status, self.time, self.error = self.word, _time(step, now), error_of(step)
            self.attempts = str(step.attempts) if step.attempts > 1 else ""
            self.count = _spent(step.usage) + _how_far(step)
            return
        self.word, self.error = group.status, group.error or ""
        middle = f" · median {say_duration(group.median_s)}" if group.median_s is not None else ""
        self.count = f" × {len(row.steps):,}{middle}{_spent(group.usage)}"
        whole = len(group.counts) == 1
        self.status = next(iter(group.counts)) if whole else ", ".join(_told(group.counts))
        end = group.ended_at or now
        self.time = say_duration(end - group.started_at) if group.started_at is not None else ""


def _spent(usage: Usage) -> str:
    return " · ".join(["", f"{tokens(usage):,} tokens", *filter(None, [money(usage)])]) if usage else ""


def _head(snapshot: Snapshot, line: str, now: float) -> str:
    """Return the line and, where there is one, the strip of the timeline."""
    words = [word(step) for step in snapshot.steps]
    begun = any(step.started_at is not None and not step.restored for step in snapshot.steps)
    letters = timeline(snapshot.steps, since(snapshot), max(now, since(snapshot) + 0.001)) if begun else strip(words)
    return f"{_icon(snapshot.status.value)} {escape(line)}{_strip(letters, 160)}"


def _strip(letters: str, width: int) -> str:
    """Return letters of states as one bar: one element, however many there are."""
    if not letters:
        return ""
    stops, start = [], 0
    for i, letter in enumerate(letters):
        if i + 1 == len(letters) or letters[i + 1] != letter:
            edges = f"{100 * start / len(letters):.3g}% {100 * (i + 1) / len(letters):.3g}%"
            stops.append(f"{_COLOUR_OF[letter]} {edges}")
            start = i + 1
    return (
        f'<span aria-hidden="true" style="display: inline-block; width: {width}px; max-width: 100%; height: 8px; '
        f'margin-left: 10px; border-radius: 4px; background: linear-gradient(90deg, {", ".join(stops)})"></span>'
    )


def _icon(name: str) -> str:
    colour = f' style="color: {COLOURS[name]}"' if name in COLOURS else ""
    return f'<span aria-hidden="true"{colour}>{ICONS.get(name, "·")}</span>'


def _table(snapshot: Snapshot, now: float, detail: Callable[[str], Detail] | None) -> list[str]:
    parts = _parts(fold(snapshot.steps))
    said = {id(part): _Said(part, now) for part in parts if isinstance(part, Row)}
    with_attempts = any(one.attempts for one in said.values())
    names = ["step", "status", "time", "attempts"] if with_attempts else ["step", "status", "time"]
    asked = iter(range(_DETAILS))
    rows = [
        f'<tr><td colspan="{len(names)}" style="text-align: left"><em>… {part}</em></td></tr>'
        if isinstance(part, str)
        else _row(part, said[id(part)], len(names), detail if next(asked, None) is not None else None)
        for part in parts
    ]
    heads = "".join(_cell(name, right=i > 1, tag="th") for i, name in enumerate(names))
    style = "border-collapse: collapse; margin: 4px 0"
    return [f'<table style="{style}">', f"<thead><tr>{heads}</tr></thead>", "<tbody>", *rows, "</tbody>", "</table>"]


def _parts(rows: list[Row]) -> list[Row | str]:
    """Return what a table shows of a run, from top to bottom; a text stands for rows that are left out."""
    if len(rows) <= WHOLE:
        return list(rows)
    kept = {*range(FIRST), *range(len(rows) - LAST, len(rows))}
    kept |= set(
        [i for i, row in enumerate(rows) if any(s.status in BROKEN or s.status in ACTIVE for s in row.steps)][:BROKEN_ROWS]
    )
    parts: list[Row | str] = []
    gap: list[str] = []
    for i, row in enumerate(rows):
        if i not in kept:
            gap += [word(step) for step in row.steps]
            continue
        if gap:
            parts.append(_gap(gap))
            gap = []
        parts.append(row)
    return parts


def _gap(words: list[str]) -> str:
    counts = counted(words)
    if len(counts) == 1:
        return f"{len(words):,} more {next(iter(counts))}"
    return f"{len(words):,} more: {', '.join(_told(counts))}"


def _told(counts: dict[str, int]) -> list[str]:
    return [f"{count:,} {name}" for name, count in counts.items()]


def _time(step: Step, now: float) -> str:
    if step.wake_at is not None and step.status in {Status.SLEEPING, Status.RETRYING, Status.INTERRUPTED}:
        return f"until {datetime.fromtimestamp(step.wake_at, UTC):%Y-%m-%d %H:%M:%S} UTC"
    if step.started_at is None or step.restored:
        return ""
    end = now if step.ended_at is None and step.status in ACTIVE else step.ended_at
    return "" if end is None else say_duration(end - step.started_at)


def _row(row: Row, said: _Said, columns_: int, detail: Callable[[str], Detail] | None) -> str:
    name = f'{escape(clipped(row.name, _NAME))}<span style="{_QUIET}">{escape(said.count)}</span>{_strip(said.strip, 120)}'
    if row.is_group:
        broken = [step for step in row.steps if step.status in BROKEN and step.error][:10]
        below = "".join(_text_of(f"{step.path}: {error_of(step)}") for step in broken)
        summary = f"{name}{_small(plain(said.error, 110))}"
        name = _details(summary, below) if broken else _plain(name)
    else:
        name = _unfolds(name, row.step, detail(row.step.path) if detail is not None else Detail())
    cells = [
        _cell(name),
        _cell(f"{_icon(said.word)} {said.status}"),
        _cell(said.time, right=True),
        _cell(said.attempts, right=True),
    ]
    return f"<tr>{''.join(cells[:columns_])}</tr>"


def _unfolds(name: str, step: Step, detail: Detail) -> str:
    """Return a step's name, which unfolds where there is more to tell."""
    error = failure(step, detail)
    first = plain(error_of(step), 110)
    texts = [("arguments", step.preview.arguments), ("result", step.preview.result), ("log", "\n".join(detail.log))]
    if error and (error != error_of(step) or len(error) > 110 or "\n" in error):
        texts.append(("error", error))
    below = "".join(f'<div style="{_LABEL}">{label}</div>{_text_of(words)}' for label, words in texts if words)
    named = f"{name}{_small(first) if first else ''}"
    return _details(named, below) if below else _plain(named)


def _details(summary: str, below: str) -> str:
    return f'<details><summary>{summary}</summary><div style="{_BELOW}">{below}</div></details>'


def _plain(name: str) -> str:
    """Return the same where nothing unfolds: the names of a table stand below each other."""
    return f'<div style="{_BELOW}">{name}</div>'


def _small(error: str) -> str:
    return f'<br><small style="color: {COLOURS["failed"]}; padding-left: {_INDENT}">{escape(error)}</small>'


def _text_of(words: str) -> str:
    return f'<pre style="{_CODE}">{escape(clipped(words, _ERROR * 2))}</pre>'


def _cell(content: str, *, right: bool = False, tag: str = "td") -> str:
    side = "right" if right else "left"
    return f'<{tag} align="{side}" style="text-align: {side}; vertical-align: top; padding: 2px 12px 2px 0">{content}</{tag}>'


def _last_known(snapshot: Snapshot) -> float:
    """Return the run's end, or the latest time in its facts: the same facts always give the same table."""
    if snapshot.ended_at is not None:
        return snapshot.ended_at
    times = (time for step in snapshot.steps for time in (step.started_at, step.ended_at) if time is not None)
    return max(snapshot.started_at, max(times, default=snapshot.started_at))


def _aligned(rows: list[list[str]], below: dict[int, str]) -> list[str]:
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(columns(row[i]) for row in rows) for i in used}
    lines = []
    for place, row in enumerate(rows):
        spaces = {i: " " * (widths[i] - columns(row[i])) for i in used}
        cells = [spaces[i] + row[i] if i > 1 else row[i] + spaces[i] for i in used]
        lines.append(f"  {'  '.join(cells)}".rstrip())
        lines += below.get(place, "").splitlines()
    return lines
