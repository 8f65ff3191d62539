"""What Run All would do, and why a cell ran or would run, as tables for the notebook and the command line alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from durable_nb._cellcache import explain
from durable_nb._cellcache.entries import Entries
from durable_nb._cellcache.executions import NOT_COMPLETED
from durable_nb._cellcache.forecast import (
    DEPENDS,
    HIT,
    NOTHING_STORED,
    RUN,
    UNKNOWN,
    Executed,
    Forecast,
    changed_since,
    differences_now,
)
from durable_nb._cellcache.keys import describe
from durable_nb._clock import say_duration, say_when
from durable_nb._housekeeping.tables import Table, count
from durable_nb._records import scope_of
from durable_nb._view.words import say_seconds


def plan_table(found: list[Forecast], interrupted: Mapping[str, float | None]) -> Table:
    """One row for each cell. `interrupted`: cells that a run of theirs will resume, and when the next of its sleeps ends."""
    rows = []
    for forecast in found:
        why = forecast.why
        if why in (NOT_COMPLETED, NOTHING_STORED) and forecast.name in interrupted:
            wake_at = interrupted[forecast.name]
            why = "resumes from where it stopped" + (f", next wake {say_when(wake_at)}" if wake_at is not None else "")
        rows.append((forecast.name, forecast.what, why, say_seconds(forecast.cost_s)))
    return Table("Run All, as things are now", ("cell", "would", "why", "takes"), rows, [_sum(found)])


def why_table(
    entries: Entries, namespace: Mapping[str, Any], name: str, executed: Executed | None, now: Forecast | None
) -> Table:
    """Why the cell ran, or what its newest entry was made of, and what it would do now, as far as that is known."""
    if executed is not None and now is not None:
        return Table("", notes=[*_execution(name, executed, now), *_differences_now(entries, namespace, executed, now)])
    would = [f"executed now, it would {_in_words(now)}"] if now is not None and now.what != UNKNOWN else []
    newest = next(entries.manifests(scope_of(name), limit=1), None)
    if newest is None:
        return Table("", notes=[f"{name} · no entry is stored, and it was not executed in this kernel", *would])
    notes = explain.decode(entries.notes(scope_of(name), newest))
    lines = [f"{name} · not executed in this kernel; its newest entry, of {say_when(newest.created_at)}, was made of:"]
    inputs = [(describe(label), tuple(filter(None, [notes.values.get(label)]))) for label in newest.components]
    files = [(f"{file.path} ({file.how})", ()) for file in newest.external.files]
    packages = [(f"{package} {version}", ()) for package, version in newest.versions.items()]
    lines += _branches([*inputs, *files, *packages])
    changes = changed_since(newest, entries)
    since = f"since then: {', '.join(changes)}" if changes else "the files it read are as they were"
    return Table("", notes=[*lines, *_opaque(notes.opaque), since, *would])


def _execution(name: str, executed: Executed, now: Forecast) -> list[str]:
    report = executed.report
    nearest = report.nearest
    if report.restored and nearest is not None:
        saved = f"saved {say_duration(nearest.took_s)}"
        lines = [f"{name} · {say_when(report.at)} restored from the entry of {say_when(nearest.created_at)}, {saved}"]
    else:
        lines = [f"{name} · {say_when(report.at)} ran: {report.why}"]
        if nearest is not None:
            lines.append(f"compared with the entry of {say_when(nearest.created_at)}:")
            lines += _branches([(d.what, d.details) for d in report.differences] or [("nothing differs", ())])
        if report.not_stored:
            lines.append(f"not stored: {report.not_stored}")
    return [*lines, *_opaque(report.opaque), f"executed again now, it would {_in_words(now)}"]


def _differences_now(entries: Entries, namespace: Mapping[str, Any], executed: Executed, now: Forecast) -> list[str]:
    """Where the cell would run now, what differs from what is stored."""
    code = executed.cell.code
    if now.what != RUN or code is None or executed.cell.refused:
        return []
    nearest, found = differences_now(entries, namespace, code)
    if nearest is None or not found:
        return []
    return [f"compared with the entry of {say_when(nearest.created_at)}:", *_branches([(d.what, d.details) for d in found])]


def _sum(found: list[Forecast]) -> str:
    if not found:
        return "no durable cell was executed in this kernel, and none is stored"
    by = {what: [f for f in found if f.what == what] for what in (RUN, DEPENDS, HIT, UNKNOWN)}
    cost = {what: sum(f.cost_s or 0.0 for f in some) for what, some in by.items()}
    parts = []
    if by[RUN]:
        recorded = f", {say_duration(cost[RUN])} as recorded" if any(f.cost_s is not None for f in by[RUN]) else ""
        parts.append(f"{count(len(by[RUN]), 'cell')} would run{recorded}")
    if by[DEPENDS]:
        parts.append(f"{count(len(by[DEPENDS]), 'cell')} may run, up to {say_duration(cost[DEPENDS])}")
    if by[HIT]:
        parts.append(f"{count(len(by[HIT]), 'cell')} would be restored, which saves {say_duration(cost[HIT])}")
    if by[UNKNOWN]:
        parts.append(f"{count(len(by[UNKNOWN]), 'cell')} not executed here yet: their code is known when they are")
    return "; ".join(parts)


def _in_words(now: Forecast) -> str:
    """What a cell would do, after 'it would'."""
    return {HIT: "be restored", RUN: f"run: {now.why}"}.get(now.what, f"be restored or run, depending {now.why}")


def _opaque(opaque: Iterable[str]) -> list[str]:
    lines = _branches([(text, ()) for text in opaque])
    return ["inputs that are known in part only:", *lines] if lines else []


def _branches(found: Sequence[tuple[str, tuple[str, ...]]]) -> list[str]:
    lines = []
    for n, (what, details) in enumerate(found):
        last = n == len(found) - 1
        lines.append(("└─ " if last else "├─ ") + what)
        lines += [("   " if last else "│  ") + f"  {line}" for line in details]
    return lines
