"""The history of a run as others may follow it: its committed rows, numbered, whoever looks and whenever."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from durable_nb import _records as rec
from durable_nb._codec import Signer
from durable_nb._engine.by_history import TIMER
from durable_nb._engine.run_log import read_log
from durable_nb._facts import Paths
from durable_nb._journal import Journal
from durable_nb._records import Outcome, RunRecord, unpack

_GENERATION = 100_000_000
"""Rows of a restarted run are numbered from here on, twice restarted from twice that: no number comes again."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row."""

    seq: int
    at: float
    """Unix seconds."""
    what: str
    """`completed` or `failed`: a step; `asked`: the code has asked for something; else what an event's row says."""
    step: str = ""
    """Path of the step that has ended; '' where it is none."""
    kind: str = ""
    error: str = ""
    asked: tuple[str, ...] = ()
    """Paths of steps that were asked for since the row before."""


def timeline(journal: Journal, signer: Signer, record: RunRecord, after: int = 0) -> Iterator[Entry]:
    """The rows of a run whose number is above `after`, in order. Reads all of them: what they are called depends on it."""
    rows = _of_workflow if record.kind == "workflow" else _of_cell
    return (entry for entry in rows(journal, signer, record) if entry.seq > after)


def is_behind(journal: Journal, record: RunRecord, last: int) -> bool:
    """May there be rows after that number? A quick look, for whoever asks again and again."""
    if record.kind != "workflow" or last // _GENERATION != record.generation:
        return True
    row = f"{last % _GENERATION + 1:08}"
    return any(journal.get(prefix + row) is not None for prefix in rec.log_prefixes(record.scope, record.generation))


def _of_workflow(journal: Journal, signer: Signer, record: RunRecord) -> Iterator[Entry]:
    paths, called = Paths(), dict[int, tuple[str, str]]()
    for seq, (_, _, row) in enumerate(read_log(journal, signer, record), 1):
        asked = []
        for one in row.asked:
            if one.kind not in (TIMER, "result") and one.value is None:
                called[one.id] = paths.take("", one.name, one.item), one.kind
                asked.append(called[one.id][0])
        step, kind = called.get(row.request, ("", ""))
        is_step = isinstance(row, Outcome)
        at = row.ended_at if isinstance(row, Outcome) else row.wall_s
        what = ("failed" if row.failed else "completed") if is_step else row.what
        yield Entry(seq + record.generation * _GENERATION, at, what, step, kind, row.error, tuple(asked))


def _of_cell(journal: Journal, signer: Signer, record: RunRecord) -> Iterator[Entry]:
    """A cell's records bear no number: they count in the order in which they were made."""
    paths, outcomes = Paths(), list[Outcome]()
    for key, row in journal.scan(rec.step_prefix(record.scope, record.generation)):
        outcome = unpack(signer, key, row, Outcome)
        if outcome.run_id == record.id:
            outcomes.append(outcome)
    called = {id(one): paths.take(one.branch, one.name, one.item) for one in sorted(outcomes, key=lambda one: one.sequences[0])}
    for seq, one in enumerate(sorted(outcomes, key=lambda one: one.sequences[1]), 1):
        what = "failed" if one.failed else "completed"
        yield Entry(seq + record.generation * _GENERATION, one.ended_at, what, called[id(one)], one.kind, one.error)
