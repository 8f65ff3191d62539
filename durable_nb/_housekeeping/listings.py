"""The facts about a store as tables, for the notebook and the command line alike."""

from __future__ import annotations

from durable_nb._clock import say_when
from durable_nb._facts import Status
from durable_nb._housekeeping import gc
from durable_nb._housekeeping.inventory import Inventory
from durable_nb._housekeeping.tables import Table, count
from durable_nb._view.listing import RunFacts
from durable_nb._view.words import say_seconds, say_size


def steps_table(run: RunFacts, inventory: Inventory) -> Table:
    """A run and its steps."""
    of = f"cell {run.name}" if run.kind == "cell" else run.name
    columns = ("step", "kind", "status", "attempts", "began", "took", "wakes", "arguments", "result", "error")
    rows = [
        (
            step.name,
            step.kind,
            step.status.value,
            str(step.attempts) if step.attempts else "",
            say_when(step.started_at),
            say_seconds(step.ended_at - step.started_at if step.ended_at and step.started_at else None),
            say_when(step.wake_at) if step.status in (Status.SLEEPING, Status.RETRYING) else "",
            *step.preview,
            step.error or "",
        )
        for step in inventory.steps_of(run).steps
    ]
    notes = [run.error] if run.error else []
    if run.wake_at is not None or run.status == Status.INTERRUPTED:
        wake = [f"next wake {say_when(run.wake_at)}"] if run.wake_at is not None else []
        nobody = ["no process is running this"] if run.status == Status.INTERRUPTED else []  # and nothing wakes without one
        notes.append(", ".join((*wake, *nobody)))
    notes = notes if rows else ["no steps recorded", *notes]
    return Table(f"{run.id} · {of} · {run.status}", columns, rows, notes, ("arguments", "result", "kind", "began"))


def store_table(inventory: Inventory) -> Table:
    """The store as a whole."""
    facts = inventory.store()
    rows = [("size", say_size(facts.size)), ("journal mode", facts.journal_mode)]
    rows += [(f"{name}/", say_size(size)) for name, size in facts.parts.items()]
    rows += [(f"{kind} records", str(n)) for kind, n in sorted(facts.rows.items())]
    rows.append(("open in", count(facts.processes, "process", "processes")))
    if facts.unreadable:
        rows.append(("entries that can't be read", f"{facts.unreadable}: see 'durable-nb doctor'"))
    return Table(f"store {facts.path}", ("what", "is"), rows)


def gc_table(done: gc.Collected) -> Table:
    """What was removed."""
    by_cell = {cell: done.entries.count(cell) for cell in done.entries}
    lines = [f"{count(n, 'entry', 'entries')} of {cell}" for cell, n in by_cell.items()]
    if done.rows:
        lines.append(count(done.rows, "record that nothing refers to", "records that nothing refers to"))
    if done.values:
        lines.append(f"{say_size(done.values)} of large values that no record names")
    if done.drafts:
        lines.append(count(done.drafts, "unfinished file"))
    title = f"freed {say_size(done.freed)}; the store holds {say_size(done.size)}"
    if done.max_size is not None and done.size > done.max_size:
        over = "the newest entry of a cell in use, and steps, are never removed: '%durable forget NAME' does"
        lines.append(f"that is more than {say_size(done.max_size)}: {over}")
    return Table(title, notes=[f"  {line}" for line in lines])
