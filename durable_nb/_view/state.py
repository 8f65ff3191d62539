"""What the live view is told: a whole state that fits in one message, or what has changed since the last one.

    {"version": 7, "now": 1700000000.0, "since": 1699999990.0, "total": 3,
     "run": {"name": "nightly", "status": "running", "started": 1699999990.0},
     "counts": {"restored": 1, "completed": 1, "running": 1},
     "rows": [{"i": 0, "name": "charge", "status": "restored"}, ...],
     "gaps": [{"from": 20, "to": 950, "counts": {"restored": 930}}, ...]}

A difference is the same with `base`, the version it builds on, and only those rows that are new or have changed: a row
of the base that lies in none of the difference's gaps stays as it was. Times are unix seconds; what is unknown is left
out.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from durable_nb._view.window import by_interest, window
from durable_nb._view.words import clipped, counted, word

if TYPE_CHECKING:
    from durable_nb._facts import Snapshot, Step

LIMIT = 40 * 1024
"""Bytes of a state. The message that opens the widget holds the JavaScript too, and 64 KiB have to suffice for both."""
NAME = 160
ERROR = 2000

State = dict[str, Any]


def whole(snapshot: Snapshot, *, version: int, now: float, pages: tuple[int, ...] = ()) -> State:
    """Return all that a view needs, the least interesting rows left out until it fits into `LIMIT` bytes."""
    words = [word(step) for step in snapshot.steps]
    places = by_interest(snapshot.steps, pages)
    state: State = {
        "version": version,
        "now": now,
        "since": _since(snapshot),
        "run": _known(
            name=clipped(snapshot.name, NAME),
            status=snapshot.status.value,
            started=snapshot.started_at,
            ended=snapshot.ended_at,
        ),
        "total": len(words),
        "counts": counted(words),
    }
    while True:
        chosen = window(words, places)
        state["rows"] = [_row(i, snapshot.steps[i], words[i]) for i in chosen.shown]
        state["gaps"] = [{"from": gap.start, "to": gap.stop, "counts": gap.counts} for gap in chosen.gaps]
        if size(state) <= LIMIT:
            return state
        places = places[: len(places) * 3 // 4]


def difference(old: State, new: State) -> State:
    """Return `new` without the rows that `old` has told already."""
    told = {row["i"]: row for row in old["rows"]}
    rows = [row for row in new["rows"] if told.get(row["i"]) != row]
    return {**new, "base": old["version"], "rows": rows}


def same(old: State, new: State) -> bool:
    """Tell whether a reader would see no difference; the time of asking is none."""
    passing = ("version", "now")
    return {k: v for k, v in old.items() if k not in passing} == {k: v for k, v in new.items() if k not in passing}


def size(state: State) -> int:
    """Return the bytes that this takes on the wire."""
    return len(json.dumps(state, ensure_ascii=False, separators=(", ", ": ")).encode())


def _row(i: int, step: Step, word: str) -> State:
    return _known(
        i=i,
        name=clipped(step.name, NAME),
        path=clipped(step.path, NAME) if step.path != step.name else None,
        status=word,
        started=step.started_at,
        ended=step.ended_at,
        attempts=step.attempts if step.attempts > 1 else None,
        wake=step.wake_at,
        error=clipped(step.error, ERROR) if step.error else None,
    )


def _since(snapshot: Snapshot) -> float:
    """Return where the timeline begins: restored steps ran in another life and would squeeze this one to a dot."""
    begun = (step.started_at for step in snapshot.steps if step.started_at is not None and not step.restored)
    return min(begun, default=snapshot.started_at)


def _known(**facts: Any) -> State:
    return {name: round(fact, 3) if isinstance(fact, float) else fact for name, fact in facts.items() if fact is not None}
