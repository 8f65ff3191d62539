"""What the live view is told of a run, and where that comes from: the one module of the views that meets the engine's facts.

    {"version": 7, "has_children": false, "now": 1700000000.0, "since": 1699999990.0, "again": "run",
     "run": {"id": "run-1", "name": "nightly", "status": "running", "why": "first run", "started": 1699999990.0},
     "total": 30, "done": 12, "rate": 3.1, "left": 5.8, "counts": {"restored": 2, "completed": 10, "running": 18},
     "saved": "2 steps were restored, which saved 41 s",
     "length": 2, "rows": [{"at": 0, "id": 1, "name": "charge", "status": "restored"},
                           {"at": 1, "id": 2, "name": "fold", "n": 29, "status": "running", "strip": "ccccccrr…"}],
     "panels": [{"at": 0, "id": 1, "arguments": "...", "result": "...", "log": [], "traceback": "..."}],
     "approvals": [{"path": "publish", "prompt": "...", "deadline": 1700000000.0}],
     "actions": {"cancel": "", "retry": "the run has not ended", "restart": ..., "approve": ...}}

`length` rows are to be seen; `rows` are those that fit and that somebody looks at. An action's text is the reason why it can't
be asked for. Times are unix seconds; what is unknown is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from durable_nb._clock import say_duration
from durable_nb._facts import Snapshot, Status
from durable_nb._preview import redacted
from durable_nb._view.actions import Actions, actions_of, waits_for_decision
from durable_nb._view.costs import money, tokens, usage_of
from durable_nb._view.fold import Group, Row, flat, fold, told
from durable_nb._view.words import ACTIVE, clipped, counted, error_of, plain, word

if TYPE_CHECKING:
    from durable_nb._facts import Step
    from durable_nb._usage import Usage

LIMIT = 24 * 1024
"""Bytes of a state. The message that opens the widget holds the JavaScript too, and 64 KiB have to suffice for both."""
_LATELY_S = 15.0
"""Of the steps that have ended since then how fast a run goes is told."""
_QUESTIONS = 5
"""Decisions that are asked for at once."""
_PATH = 400
"""Of a decision that buttons send; those of longer ones are a line of code."""
_FOR_ROWS = LIMIT // 4
"""Of these, at least, whatever is unfolded."""
PAGE = 40
"""Rows at each end that are told unasked."""
NAME = 160
ERROR = 300
NOTE = 120
"""Of what a step says of itself while it is at work."""
HINT = 60
"""Of what a step is given, beside its name."""
TEXT = 2000
"""Of a panel's arguments and result."""
TRACEBACK = 6000
LINES = 60

ENDED = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.INTERRUPTED})

State = dict[str, Any]

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Detail:
    """What a step tells when it is unfolded, beside the previews of its arguments and result."""

    log: tuple[str, ...] = ()
    """Its last lines, while it runs and after."""
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Extra:
    """What is told of a step besides its facts."""

    note: str = ""
    """What it says while it is at work: the end of a model's answer."""


class Source:
    """A run as its view sees it. Give it more by overriding."""

    def __init__(self, snapshot: Callable[[], Snapshot], kind: str = "workflow") -> None:
        """`kind`: a `workflow`'s run, or a `cell`'s."""
        self._snapshot, self._kind = snapshot, kind

    def snapshot(self) -> Snapshot:
        """Return the run as it stands."""
        return self._snapshot()

    def total(self) -> int | None:
        """Return how many steps there will be, if that is known."""
        return None

    def extras(self) -> Mapping[str, Extra]:
        """Return, by the steps' paths, what there is besides their facts."""
        return {}

    def detail(self, path: str) -> Detail:  # noqa: ARG002
        """Return what the step of that path tells when it is unfolded."""
        return Detail()

    def actions(self, status: Status) -> Actions:
        """Return which buttons act for a run of that status."""
        return actions_of(status, self._kind)


@dataclass(slots=True)
class Look:
    """What the readers of one view have asked to see."""

    opened: set[str] = field(default_factory=set)
    """Keys of the rows that are unfolded."""
    windows: list[tuple[int, int]] = field(default_factory=list)
    """Places that are looked at, the latest first."""
    _ids: dict[str, int] = field(default_factory=dict)
    _keys: dict[int, str] = field(default_factory=dict)

    def id_of(self, key: str) -> int:
        """Return a number that stands for a row's key, whatever its length."""
        found = self._ids.setdefault(key, len(self._ids) + 1)
        self._keys[found] = key
        return found

    def toggle(self, row: int, unfolded: bool) -> None:
        """Unfold a row, or fold it; nothing where there is no such row."""
        if (key := self._keys.get(row)) is not None:
            (self.opened.add if unfolded else self.opened.discard)(key)

    def at(self, first: int, last: int) -> None:
        """Somebody looks at these places. Two views of a run may be open at once."""
        self.windows = [(first, min(last, first + 3 * PAGE)), *self.windows[:1]]


def whole(source: Source, look: Look, *, version: int, now: float, why: str = "", again: str = "run") -> State:
    """Return all that a view needs; rows that nobody looks at are left out until it fits into `LIMIT` bytes."""
    snapshot, extras = source.snapshot(), source.extras()
    words = [word(step) for step in snapshot.steps]
    counts = counted(words)
    rows = flat(fold(snapshot.steps), look.opened)
    asked = [step for step in snapshot.steps if waits_for_decision(step) and len(step.path) <= _PATH]
    state: State = {
        "version": version,
        "now": now,
        "since": since(snapshot),
        "again": again,
        "run": _known(
            id=clipped(snapshot.id, NAME),
            name=plain(snapshot.name, NAME),
            status=snapshot.status.value,
            why=clipped(f"waits for {snapshot.waits_for}" if snapshot.waits_for else why, NAME) or None,
            started=snapshot.started_at,
            ended=snapshot.ended_at,
        ),
        "counts": counts,
        **progress(snapshot, counts, source.total(), now),
        "saved": saved(snapshot),
        "length": len(rows),
        "has_children": any(step.child is not None and step.status in ACTIVE for step in snapshot.steps),
        "approvals": [
            _known(path=step.path, prompt=clipped(step.prompt, TEXT), deadline=step.wake_at) for step in asked[:_QUESTIONS]
        ],
        "more_approvals": max(len(asked) - _QUESTIONS, 0) or None,
        "actions": asdict(source.actions(snapshot.status)) | ({"approve": ""} if asked else {}),
        "panels": [
            _panel(at, look.id_of(row.key), source, row.step)
            for at, row in enumerate(rows)
            if not row.is_group and row.key in look.opened
        ][:40]
        if look.opened
        else [],
    }
    places = list(dict.fromkeys(_places(len(rows), look.windows)))
    found: list[State] = []
    left = LIMIT - size(state)
    if left < _FOR_ROWS:  # many panels of much text: the later ones tell less
        _shorten(state["panels"], _FOR_ROWS - left)
        left = LIMIT - size(state)
    for at in places:
        row = _row(at, rows[at], look, extras)
        left -= size(row) + 2
        if left < 0:
            break
        found.append(row)
    state["rows"] = sorted(found, key=lambda row: int(row["at"]))
    return state


def same(old: State, new: State) -> bool:
    """Tell whether a reader would see no difference; the time of asking is none."""
    passing = ("version", "now", "rate", "left")
    return {k: v for k, v in old.items() if k not in passing} == {k: v for k, v in new.items() if k not in passing}


def size(state: State) -> int:
    """Return the bytes that this takes on the wire."""
    return len(json.dumps(state, ensure_ascii=False, separators=(", ", ": ")).encode())


def since(snapshot: Snapshot) -> float:
    """Return where the timeline begins: restored steps ran in another life and would squeeze this one to a dot."""
    begun = (step.started_at for step in snapshot.steps if step.started_at is not None and not step.restored)
    return min(begun, default=snapshot.started_at)


def progress(snapshot: Snapshot, counts: dict[str, int], total: int | None, now: float) -> State:
    """Return how far a run is; how fast it goes and how long it will take, where several of its steps are still to come."""
    done = counts.get("completed", 0) + counts.get("restored", 0)
    known = max(total or 0, len(snapshot.steps))
    unfinished = known - done - sum(counts.get(name, 0) for name in ("failed", "cancelled"))
    facts: State = {"done": done, "total": known}
    if total is None and unfinished <= 1:
        return facts if snapshot.status in ENDED else {**facts, "open": True}
    waits = any(counts.get(name) for name in ("sleeping", "waiting"))
    executed, took = counts.get("completed", 0), now - since(snapshot)
    if executed >= 3 and took > 1 and unfinished > 0 and snapshot.status is Status.RUNNING and not waits:
        # of late: steps of another kind, which were ten times as quick, say nothing of those to come
        from_s = now - min(took, _LATELY_S)
        lately = sum(s.ended_at is not None and s.ended_at >= from_s and word(s) == "completed" for s in snapshot.steps)
        rate = lately / min(took, _LATELY_S) if lately >= 3 else executed / took
        facts |= {"rate": round(rate, 3), "left": round(unfinished / rate, 1)}
    return facts


def saved(snapshot: Snapshot) -> str:
    """Return a line on what restoring saved; '' where nothing was restored."""
    restored = [step for step in snapshot.steps if step.restored and step.status is Status.COMPLETED]
    if not restored:
        return ""
    seconds = sum(s.ended_at - s.started_at for s in restored if s.ended_at and s.started_at and s.kind != "sleep")
    parts = [say_duration(seconds)] if seconds >= 0.001 else []
    if usage := usage_of(restored):
        parts.append(" · ".join([f"{tokens(usage):,} tokens", *filter(None, [money(usage)])]))
    what = "1 step was restored" if len(restored) == 1 else f"{len(restored):,} steps were restored"
    return f"{what}, which saved {' and '.join(parts)}" if parts else what


def _places(length: int, windows: Sequence[tuple[int, int]]) -> list[int]:
    """Return which rows to tell, the most wanted first."""
    asked = [at for first, last in windows for at in range(max(first, 0), min(last + 1, length))]
    return [*asked, *range(length - 1, max(length - PAGE, 0) - 1, -1), *range(min(PAGE, length))]


def _row(at: int, row: Row, look: Look, extras: Mapping[str, Extra]) -> State:
    common = {
        "at": at,
        "id": look.id_of(row.key),
        "name": plain(row.name, NAME),
        "depth": row.depth or None,
        "open": True if row.key in look.opened else None,
    }
    if row.is_group:
        waits = next((step.waits_for for step in row.steps if step.waits_for is not None), None)
        return _known(**common, **_group(told(row), len(row.steps)), **{"for": waits and clipped(waits, HINT)})
    return _known(**common, **_step(row.step, extras.get(row.step.path)), parent=True if row.below else None)


def _group(group: Group, n: int) -> State:
    broken = group.counts.get("failed", 0) + group.counts.get("interrupted", 0)
    return {
        "n": n,
        "status": group.status,
        "done": group.done,
        "broken": broken or None,
        "median": group.median_s,
        "strip": group.strip,
        "started": group.started_at,
        "ended": group.ended_at,
        "wake": group.wake_at,
        "error": clipped(group.error, ERROR) if group.error else None,
        **_spent(group.usage),
    }


def _step(step: Step, extra: Extra | None) -> State:
    facts: State = {
        "path": plain(step.path, NAME) if step.path != step.name else None,
        "status": word(step),
        "started": step.started_at,
        "ended": step.ended_at,
        "attempts": step.attempts if step.attempts > 1 else None,
        "wake": step.wake_at,
        "error": clipped(error_of(step), ERROR) if step.error else None,
        "given": clipped(step.preview.arguments, HINT) or None,
        "for": clipped(step.waits_for, HINT) if step.waits_for else None,
        **_spent(step.usage),
    }
    if step.status in ACTIVE and (extra is not None or step.progress is not None):
        note = step.progress.note if step.progress is not None else ""
        note = note or (extra.note if extra is not None else "")
        facts["note"] = plain(redacted(note[:1000]), NOTE) or None
    if step.status in ACTIVE and step.progress is not None:
        facts["progress"] = [step.progress.done, step.progress.total]
    return facts


def _spent(usage: Usage) -> State:
    return {"tokens": tokens(usage), "cost": money(usage) or None} if usage else {}


def _panel(at: int, row: int, source: Source, step: Step) -> State:
    detail = source.detail(step.path)
    error = failure(step, detail)
    return _known(
        at=at,
        id=row,
        arguments=clipped(step.preview.arguments, TEXT) or None,
        result=clipped(step.preview.result, TEXT) or None,
        log=[clipped(line, ERROR) for line in detail.log[-LINES:]] or None,
        traceback=_end_of(error, TRACEBACK) or None,
    )


def failure(step: Step, detail: Detail) -> str:
    """Return how a step has failed, as far as it is known; '' of one whose later attempt has succeeded."""
    return "" if step.status is Status.COMPLETED else detail.traceback or error_of(step)


def _end_of(text: str, length: int) -> str:
    """Return a traceback's end, where the error is, without its colours."""
    text = _COLOUR.sub("", text)
    kept = text if len(text) <= length else "…" + text[1 - length :]
    return clipped(kept, length)


def _shorten(panels: list[State], by: int) -> None:
    for panel in reversed(panels):
        if by <= 0:
            return
        before = size(panel)
        for name in ("log", "arguments", "result", "traceback"):
            panel.pop(name, None)
        panel["cut"] = True
        by -= before - size(panel)


def _known(**facts: Any) -> State:
    return {name: round(fact, 3) if isinstance(fact, float) else fact for name, fact in facts.items() if fact is not None}
