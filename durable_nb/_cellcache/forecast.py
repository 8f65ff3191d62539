"""What Run All would do: for each durable cell of the notebook a hit, a run, or that it depends.

A cell that this process has executed is weighed with the values that the notebook holds now, but for names that the cell itself
or a later one binds or changes: those stood otherwise when it ran, and Run All will make them anew; they count as at its last
execution. So do the global random generators that it moves, which Run All will seed anew.

Of any other cell it is known how it was executed last: the entry that it had then, and by which cells and keys its inputs were
made. Where those would be restored by the same keys, so would it. Cells that aren't durable count as they were.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from durable_nb._cellcache import explain
from durable_nb._cellcache.cache import CellCode, ruled_out
from durable_nb._cellcache.entries import Entries, Manifest
from durable_nb._cellcache.executions import LastExecution
from durable_nb._cellcache.external import Around, ExternalState
from durable_nb._cellcache.keys import CellKey, Terms, changes, key_from, key_of
from durable_nb._cellcache.report import ExecutionReport
from durable_nb._fingerprint import Fingerprinter
from durable_nb._records import scope_of

HIT, RUN, DEPENDS, UNKNOWN = "hit", "run", "depends", "?"
NOTHING_STORED = "nothing of it is stored"


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one cell would do."""

    name: str
    what: str
    """`hit`, `run`, or `depends` on what a cell before it makes."""
    why: str
    cost_s: float | None
    """What running it is known to take, and a hit to save."""
    key: str = ""
    """Of the entry that it would be restored from."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A cell as its next execution finds it."""

    code: CellCode | None
    """None where it can't be compiled."""
    refused: str = ""
    """Why its options can't be followed now."""
    rerun: bool = False
    """Its options ask for a run."""


@dataclass(frozen=True, slots=True)
class Executed:
    """A cell that this process has executed, and how that went."""

    cell: Planned
    report: ExecutionReport


@dataclass(frozen=True, slots=True)
class Notebook:
    """What is known of a notebook besides what this process has executed."""

    order: tuple[str, ...] = ()
    """Of its durable cells."""
    last: Mapping[str, LastExecution] = field(default_factory=dict)
    written: Mapping[str, Planned] = field(default_factory=dict)
    """The cells in the notebook's file; empty where that isn't known."""
    saved_at: float = 0.0
    """When the file was written, unix seconds."""


def order_of(known: Iterable[str], executed: Iterable[str]) -> tuple[str, ...]:
    """The notebook's order: one that was executed and isn't known yet stands behind the one executed before it."""
    order, before = list(known), None
    for name in executed:
        if name not in order:
            order.insert(order.index(before) + 1 if before is not None else len(order), name)
        before = name
    return tuple(order)


def run_all(
    entries: Entries,
    namespace: Mapping[str, Any],
    executed: Mapping[str, Executed],
    notebook: Notebook = Notebook(),
    rerun: Iterable[str] = (),
    of: str = "",
) -> list[Forecast]:
    """For all cells of the notebook, in its order, or in that of `executed`. `rerun`: cells that are to run whatever is stored.
    `of`: for this one, and those that have made what it reads."""  # fmt: skip
    order = notebook.order or tuple(executed)
    if of:
        makers = _makers(of, notebook.last)
        order = tuple(name for name in order if name in makers)
    executed = {name: executed[name] for name in order if name in executed}
    weighed = {forecast.name: forecast for forecast in _weighed(entries, namespace, executed, set(rerun))}
    found: dict[str, Forecast] = {}
    for name in order:
        forecast, last = weighed.get(name), notebook.last.get(name)
        if forecast is None:
            forecast = _of_last(entries, name, last, notebook) if last else _of_stored(entries, name)
            sources = last.sources.values() if last else ()
            same = last is not None and forecast.key == last.key
            unsure = {maker for maker, key in sources if not same or maker not in found or found[maker].key != key}
        else:
            read = {label.partition(" ")[2] for label in executed[name].report.components}
            others = {maker: v for maker, v in notebook.last.items() if maker in found and maker not in weighed}
            unsure = {maker for maker, v in others.items() if found[maker].what != HIT and read.intersection(v.made)}
        if forecast.what == HIT and unsure:
            forecast = replace(forecast, what=DEPENDS, why=f"on what {', '.join(sorted(unsure))} makes", key="")
        found[name] = forecast
    return list(found.values())


def differences_now(
    entries: Entries, namespace: Mapping[str, Any], code: CellCode
) -> tuple[Manifest | None, list[explain.Difference]]:
    """The entry that is most like the cell as things are now, and what differs from it."""
    key = key_of(code.name, code.tree, code.names, namespace, code.terms)
    manifests = entries.manifests(code.scope, limit=1000)
    nearest = min(manifests, key=lambda m: len(changes(m.components, key.components)), default=None)
    if nearest is None:
        return None, []
    now, texts = explain.notes_of(key, code.tree, namespace, entries.signer)
    notes = explain.decode(entries.notes(code.scope, nearest))
    found = explain.differences(nearest.components, notes, key.components, now, texts)
    return nearest, [
        *found,
        *(explain.Difference(what) for what in nearest.external.changes(Around(namespace, entries.signer))),
    ]


def changed_since(manifest: Manifest, entries: Entries) -> list[str]:
    """What a new process finds otherwise than it was when the entry was stored, of what it finds at all: what the notebook's
    own cells make is not there yet, environment variables that they set among it."""  # fmt: skip
    external = manifest.external
    variables = {name: digest for name, digest in external.variables.items() if not digest or name in os.environ}
    found = replace(external, names={}, generators={}, settings={}, variables=variables)
    return found.changes(Around({}, entries.signer))


def _makers(name: str, known: Mapping[str, LastExecution]) -> set[str]:
    """The cell, those that made what it reads, and so on."""
    found, waiting = {name}, [name]
    while waiting:
        last = known.get(waiting.pop())
        new = {maker for maker, _ in last.sources.values()} - found if last else set()
        found |= new
        waiting += new
    return found


def _of_last(entries: Entries, name: str, last: LastExecution, notebook: Notebook) -> Forecast:
    """Of a cell that another process has executed."""
    manifests = list(entries.manifests(scope_of(name), limit=1000))
    cost_s = next((m.took_s for m in manifests if m.key == last.key), manifests[0].took_s if manifests else None)
    written = notebook.written.get(name)
    code = _digest_of(written.code.tree if written.code else None) if written and notebook.saved_at > last.at else last.code
    if written.rerun if written else last.rerun:
        return Forecast(name, RUN, "asked for by --rerun", cost_s)
    ttl_s = last.ttl_s if written is None else written.code.terms.ttl_s if written.code else None
    reason = "" if code == last.code else "code changed"
    for manifest in manifests:
        if manifest.key == last.key if code == last.code else manifest.components.get("code") == code:
            terms = Terms(ttl_s=ttl_s, skip=frozenset(manifest.skipped))
            why = ruled_out(terms, manifest) or ", ".join(changed_since(manifest, entries)[:3])
            if not why:
                return Forecast(name, HIT, "", manifest.took_s, manifest.key)
            reason = reason or why
    return Forecast(name, RUN, reason or last.unstored or "its entry is gone", cost_s)


def _digest_of(tree: ast.Module | None) -> str:
    """The digest of a cell's code, as keys have it; '' where it can't be compiled."""
    if tree is None:
        return ""
    found = Fingerprinter()
    found.add_code("code", tree)
    return found.result().components["code"]


def _of_stored(entries: Entries, name: str) -> Forecast:
    """Of a cell of which nothing is known but its entries: only files can be compared."""
    newest = next(entries.manifests(scope_of(name), limit=1), None)
    found = changed_since(newest, entries) if newest is not None else [NOTHING_STORED]
    cost_s = newest.took_s if newest else None
    if found:
        return Forecast(name, RUN, ", ".join(found[:3]), cost_s)
    return Forecast(name, UNKNOWN, "the files it read are as they were", cost_s)


def _weighed(
    entries: Entries, namespace: Mapping[str, Any], executed: Mapping[str, Executed], rerun: set[str]
) -> list[Forecast]:
    """Of the cells that this process has executed, in the order of the notebook."""
    found: list[Forecast] = []
    unsure: dict[str, str] = {}  # names that are bound by a cell which may run: the cell
    made = {
        name: {*(one.cell.code.names.bound if one.cell.code else ()), *one.report.names_changed()}
        for name, one in executed.items()
    }
    later = dict(made)
    for name, one in executed.items():
        clobbered = set().union(*later.values())  # by the cell itself, too
        del later[name]
        manifest, what, why = _of_executed(entries, namespace, one, clobbered, rerun=name in rerun)
        if what == HIT and one.cell.code:
            sources = sorted({unsure[read] for read in one.cell.code.names.read if read in unsure})
            if sources:
                what, why = DEPENDS, f"on what {', '.join(sources)} makes"
        key = manifest.key if manifest and what == HIT else ""
        found.append(Forecast(name, what, why, manifest.took_s if manifest else None, key))
        if what != HIT:
            unsure.update(dict.fromkeys(made[name], name))
    return found


def _of_executed(
    entries: Entries, namespace: Mapping[str, Any], one: Executed, clobbered: set[str], *, rerun: bool
) -> tuple[Manifest | None, str, str]:
    code, report = one.cell.code, one.report
    if code is None or one.cell.refused:
        return None, RUN, one.cell.refused or "its code can't be compiled"
    key = key_of(code.name, code.tree, code.names, namespace, code.terms)
    now = _as_it_would_be(key, report, clobbered)
    manifests = list(entries.manifests(code.scope, limit=1000))
    likest = min(manifests, key=lambda m: len(changes(m.components, now)), default=None)
    if rerun:
        return likest, RUN, "asked for by %durable rerun"
    if one.cell.rerun:
        return likest, RUN, "asked for by --rerun"
    if key.unknown:
        return likest, RUN, key.unknown[0]
    whole = key_from(code.name, now)
    reason = ""
    for manifest in manifests:
        if manifest.key == whole:
            external = _state_to_compare(manifest, report, clobbered)
            found = ruled_out(code.terms, manifest) or ", ".join(external.changes(Around(namespace, entries.signer))[:3])
            if not found:
                return manifest, HIT, ""
            reason = reason or found
    if reason:
        return likest, RUN, reason
    if report.not_stored:
        return likest, RUN, f"not stored: {report.not_stored}"
    if likest is None:
        return None, RUN, NOTHING_STORED
    return likest, RUN, ", ".join(changes(likest.components, now)[:3])


def _state_to_compare(manifest: Manifest, report: ExecutionReport, clobbered: set[str]) -> ExternalState:
    """The entry's external state without what was then as at the last execution, and will be so again."""
    found, then = manifest.external, report.kept.external if report.kept else ExternalState()
    return replace(
        found,
        generators={name: state for name, state in found.generators.items() if then.generators.get(name) != state},
        names={name: digest for name, digest in found.names.items() if name not in clobbered or then.names.get(name) != digest},
    )


def _as_it_would_be(key: CellKey, report: ExecutionReport, clobbered: set[str]) -> dict[str, str]:
    """The components of the key, with what is not as it will be taken from the last execution."""
    labels = {f"global {name}" for name in clobbered}
    touched = labels & {*key.components, *report.components}
    then = touched | ({"aliases"} if touched else set())
    now = {label: digest for label, digest in key.components.items() if label not in then}
    return now | {label: digest for label, digest in report.components.items() if label in then}
