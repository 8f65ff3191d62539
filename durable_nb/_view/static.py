"""A run as static html and as text: what stays in a saved notebook, on GitHub, in a log. Pure functions of the facts.

The html needs no style, for GitHub drops it: the inline ones only undo what JupyterLab does to a table's alignment.
"""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape

from durable_nb._clock import say_duration
from durable_nb._facts import Snapshot, Status, Step
from durable_nb._view.window import Gap, by_interest, window
from durable_nb._view.words import ACTIVE, COLOURS, ICONS, clipped, columns, counted, plain, word

UNFINISHED = "Saved while the run was going on: run the cell again and it goes on from its last completed step."

_NAME = 60
_ERROR = 1000


def bundle(snapshot: Snapshot, *, now: float | None = None, note: str = "") -> dict[str, str]:
    """Return both forms, as a display's data."""
    return {"text/html": html(snapshot, now=now, note=note), "text/plain": text(snapshot, now=now, note=note)}


def text(snapshot: Snapshot, *, now: float | None = None, note: str = "") -> str:
    """Return an aligned table. `now` is the end of what hasn't ended; without it the last known time is."""
    now = _last_known(snapshot) if now is None else now
    rows = [["step", "status", "time", "attempts"]]
    below: dict[int, str] = {}
    for part in _parts(snapshot):
        if isinstance(part, Gap):
            below[len(rows) - 1] = "\n".join(filter(None, [below.get(len(rows) - 1), f"  … {_gap(part)}"]))
            continue
        rows.append([plain(part.name, _NAME), word(part), _time(part, now), _attempts(part)])
        if part.error:
            below[len(rows) - 1] = f"    {plain(part.error, 110)}"
    head = " · ".join([plain(snapshot.name, _NAME), *_summary(snapshot, now)])
    lines = [head, *_aligned(rows, below)] if snapshot.steps else [head]
    return "\n".join([*lines, note] if note else lines)


def html(snapshot: Snapshot, *, now: float | None = None, note: str = "") -> str:
    """Return the same table as html; whatever a user named or raised is escaped."""
    now = _last_known(snapshot) if now is None else now
    parts = _parts(snapshot)
    with_attempts = any(isinstance(part, Step) and _attempts(part) for part in parts)
    columns = 4 if with_attempts else 3
    head = " · ".join(escape(part) for part in _summary(snapshot, now))
    lines = [f"<p><strong>{escape(clipped(snapshot.name, _NAME))}</strong> · {head}</p>"]
    if parts:
        names = ["step", "status", "time", "attempts"][:columns]
        lines += [
            '<table style="border-collapse: collapse">',
            f"<thead><tr>{''.join(_cell(name, right=i > 1, tag='th') for i, name in enumerate(names))}</tr></thead>",
            "<tbody>",
            *(
                f'<tr><td colspan="{columns}" style="text-align: left"><em>… {_gap(part)}</em></td></tr>'
                if isinstance(part, Gap)
                else _row(part, now, columns)
                for part in parts
            ),
            "</tbody>",
            "</table>",
        ]
    if note:
        lines.append(f"<p><em>{escape(note)}</em></p>")
    return "\n".join(lines)


def _parts(snapshot: Snapshot) -> list[Step | Gap]:
    """Return what a table shows of a run, from top to bottom."""
    words = [word(step) for step in snapshot.steps]
    view = window(words, by_interest(snapshot.steps))
    parts: list[tuple[int, Step | Gap]] = [(i, snapshot.steps[i]) for i in view.shown]
    parts += [(gap.start, gap) for gap in view.gaps]
    return [part for _, part in sorted(parts, key=lambda placed: placed[0])]


def _summary(snapshot: Snapshot, now: float) -> list[str]:
    """Return the head of a table after the run's name: `completed in 12.4 s`, `4 steps, 2 restored`."""
    status = snapshot.status
    link = "in" if status is Status.COMPLETED else "for" if status in ACTIVE or status is Status.PENDING else "after"
    total = len(snapshot.steps)
    counts = counted(word(step) for step in snapshot.steps)
    if status is Status.COMPLETED:
        counts.pop("completed", None)
    steps = ", ".join([f"{total:,} step{'' if total == 1 else 's'}", *_told(counts)])
    return [f"{status.value} {link} {say_duration((snapshot.ended_at or now) - snapshot.started_at)}", steps]


def _gap(gap: Gap) -> str:
    if len(gap.counts) == 1:
        return f"{gap.stop - gap.start:,} more {next(iter(gap.counts))}"
    return f"{gap.stop - gap.start:,} more: {', '.join(_told(gap.counts))}"


def _told(counts: dict[str, int]) -> list[str]:
    return [f"{count:,} {name}" for name, count in counts.items()]


def _time(step: Step, now: float) -> str:
    if step.wake_at is not None and step.status in {Status.SLEEPING, Status.RETRYING, Status.INTERRUPTED}:
        return f"until {datetime.fromtimestamp(step.wake_at, UTC):%Y-%m-%d %H:%M:%S} UTC"
    if step.started_at is None or step.restored:
        return ""
    end = now if step.ended_at is None and step.status in ACTIVE else step.ended_at
    return "" if end is None else say_duration(end - step.started_at)


def _attempts(step: Step) -> str:
    return str(step.attempts) if step.attempts > 1 else ""


def _row(step: Step, now: float, columns: int) -> str:
    name = escape(clipped(step.name, _NAME))
    if step.error:
        name += _error(clipped(step.error, _ERROR))
    said = word(step)
    colour = f' style="color: {COLOURS[said]}"' if said in COLOURS else ""
    status = f"<span{colour}>{ICONS[said]}</span> {said}"
    cells = [_cell(name), _cell(status), _cell(_time(step, now), right=True), _cell(_attempts(step), right=True)]
    return f"<tr>{''.join(cells[:columns])}</tr>"


def _error(error: str) -> str:
    first, _, rest = error.partition("\n")
    if not rest and len(first) <= 110:
        return f"<br><small><code>{escape(first)}</code></small>"
    return f"<details><summary><code>{escape(plain(first, 110))}</code></summary><pre>{escape(error)}</pre></details>"


def _cell(content: str, *, right: bool = False, tag: str = "td") -> str:
    side = "right" if right else "left"
    return f'<{tag} align="{side}" style="text-align: {side}; vertical-align: top">{content}</{tag}>'


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
