"""What lies in a store: its cells, its runs, its files. Plain facts, for tables and for `--json`."""

from __future__ import annotations

import contextlib
import difflib
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from durable_nb import _records as rec
from durable_nb._cellcache.entries import Entries, Kept
from durable_nb._engine import Engine
from durable_nb._engine.workflows import Workflows
from durable_nb._facts import FINISHED, Snapshot, Status
from durable_nb._records import RunRecord
from durable_nb._view.actions import place_of, waits_for_decision
from durable_nb._view.listing import PAGE, CellFacts, Page, Query, Question, RunFacts, page_of
from durable_nb.errors import RunNotFoundError, StoreError

_ASLEEP = (Status.SLEEPING, Status.WAITING, Status.RETRYING)
_OF_RUN = rec.scope_of("~run ")
NAMELESS = "(without a name)"
"""All cells without a name, as one."""


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """The store as a whole."""

    path: str
    id: str
    size: int
    journal_mode: str
    rows: dict[str, int]
    """How many of each kind."""
    parts: dict[str, int]
    """Bytes of each folder."""
    processes: int
    """Live ones that have it open."""
    unreadable: int
    """Entries that are damaged, or signed with another key."""


class Inventory:
    """Looks at the store of an engine. Nothing is changed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._journal, self._signer = engine.store.journal, engine.store.signer
        self.path = engine.store.path
        self.entries = Entries(engine.store.cells, self._signer)
        self._workflows = engine.workflows or Workflows(engine)

    def runs(self) -> list[RunFacts]:
        """All runs, the newest first; what can't be read is left out."""
        return list(map(self._whole, self._brief()))

    def cells(self) -> list[CellFacts]:
        """All durable cells, those that ran last first."""
        return self._cells(self._brief(), list(self.entries.all()))

    def page(self, query: Query, most: int = PAGE) -> Page:
        """What a reader who asks this sees: one answer for the dashboard, `%durable`, `%durable runs` and `durable-nb ls`."""
        runs, entries = self._brief(), list(self.entries.all())
        unread = sum(1 for _ in self._journal.sizes(rec.run_key(""))) - len(runs)
        unread = max(unread, 0) + sum(entry.manifest is None for entry in entries)
        cells = self._cells(runs, entries)
        return page_of(str(self.path), time.time(), runs, cells, query, unread=unread, whole=self._whole, most=most)

    def _cells(self, runs: list[RunFacts], entries: list[Kept]) -> list[CellFacts]:
        kept, last = defaultdict[str, list[Kept]](list), dict[str, RunFacts]()
        scopes = defaultdict[str, set[str]](set)
        for entry in entries:
            if entry.manifest is not None:
                kept[entry.manifest.name or NAMELESS].append(entry)
                scopes[entry.manifest.name or NAMELESS].add(entry.scope)
        for run in runs:
            if run.kind == "cell":
                last.setdefault(run.name, run)
        if NAMELESS in {*kept, *last}:
            recorded = (key.split("/", 2)[1] for key, _ in self._journal.sizes("step/~"))
            scopes[NAMELESS] |= {scope for scope in recorded if not scope.startswith(_OF_RUN)}
        cells = [self._cell(name, last.get(name), kept[name], scopes[name]) for name in {**last, **kept}]
        return sorted(cells, key=lambda cell: cell.last_run_at or 0.0, reverse=True)

    def _cell(self, name: str, last: RunFacts | None, kept: list[Kept], scopes: set[str]) -> CellFacts:
        newest = max(kept, key=lambda entry: entry.stored_at, default=None)
        manifest = newest.manifest if newest else None
        if name != NAMELESS:
            scopes = {rec.scope_of(name)}
        return CellFacts(
            name,
            last.status if last else "stored",
            last.started_at if last else manifest.created_at if manifest else None,
            sum(map(self._outcomes, scopes)),
            len(manifest.bound) if manifest else 0,
            len(kept),
            sum(entry.size for entry in kept),
            last.ended_at - last.started_at if last and last.ended_at else None,
            manifest.took_s if manifest else None,
            _wake_of(self._snapshot_of(last)) if last else None,
        )

    def unread(self) -> int:
        """Runs and entries that are damaged, or signed with another key: no listing shows them."""
        return self.page(Query()).unread

    def find_run(self, said: str) -> RunFacts:
        """The run of that id, else the last one of the cell or workflow of that name; RunNotFoundError with the nearest."""
        runs = self._brief()
        for run in (*(r for r in runs if r.id == said), *(r for r in runs if r.name == said)):
            return self._whole(run)
        known = nearest(said, (run.name for run in runs), (run.id for run in runs))
        raise RunNotFoundError(f"no run or cell {said!r} in the store {self._engine.store.path}{known}")

    def run(self, run_id: str) -> RunFacts:
        """The run of exactly that id; RunNotFoundError."""
        record, lease = self._workflows.catalog.find(run_id)
        if record.id != run_id:  # a cell's name
            raise RunNotFoundError(f"no run {run_id!r} in the store {self.path}")
        return self._whole(self._facts(record, self._workflows.catalog.status(record, lease)))

    def steps_of(self, run: RunFacts) -> Snapshot:
        """The run with its steps."""
        return self._workflows.snapshot(run.id)

    def store(self) -> StoreFacts:
        """Sizes and counts."""
        store = self._engine.store
        rows: Counter[str] = Counter(key.partition("/")[0] for key, _ in self._journal.sizes())
        parts: Counter[str] = Counter()
        for path in store.path.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    parts[path.relative_to(store.path).parts[0]] += path.stat().st_size
        folders = {name: parts.get(name, 0) for name in ("journal", "values", "cells")}
        unreadable = sum(entry.manifest is None for entry in self.entries.all())
        alive = len(store.process.others()) + 1
        return StoreFacts(
            str(store.path), store.id, sum(parts.values()), self._journal.mode, dict(rows), folders, alive, unreadable
        )

    # -- records -------------------------------------------------------------------------------------------------------

    def _brief(self) -> list[RunFacts]:
        """All runs, the newest first, without what takes a look at the records of each."""
        return [self._facts(record, status) for record, _, status in self._workflows.catalog.chosen()]

    def _facts(self, record: RunRecord, status: Status) -> RunFacts:
        name = _cell_of(record.scope, record.name) if record.kind == "cell" else record.name
        of = record.id, record.kind, name, status.value, record.started_at, record.ended_at
        return RunFacts(*of, None, record.error, record.labels, None)

    def _whole(self, run: RunFacts) -> RunFacts:
        steps = self._outcomes(_OF_RUN + rec.scope_of(run.id)) if run.kind == "workflow" else None
        found = self._snapshot_of(run)
        waiting = [step for step in found.steps if waits_for_decision(step)] if found is not None else []
        asks = [Question(place_of(step), step.prompt, step.wake_at) for step in waiting]
        return replace(run, steps=steps, wake_at=_wake_of(found), asks=tuple(asks))

    def _outcomes(self, scope: str) -> int:
        """Outcomes of a scope's newest generation."""
        generations = Counter(key.split("/", 3)[2] for key, _ in self._journal.sizes(f"step/{scope}/"))
        return generations[max(generations)] if generations else 0

    def _snapshot_of(self, run: RunFacts) -> Snapshot | None:
        """Of a run that is not finished, where it can be read."""
        if run.status in FINISHED:
            return None
        try:
            return self._workflows.snapshot(run.id)
        except StoreError:  # `show` tells of it
            return None


def _wake_of(found: Snapshot | None) -> float | None:
    if found is None:
        return None
    wakes = [step.wake_at for step in found.steps if step.status in _ASLEEP]
    return min((at for at in (found.wake_at, *wakes) if at), default=None)


def nearest(said: str, *known: Iterable[str]) -> str:
    """'; did you mean ...?', or what there is, for an error about a name that isn't known."""
    names = list(dict.fromkeys(name for group in known for name in group if name))
    meant = difflib.get_close_matches(said, names, n=1)
    if meant:
        return f"; did you mean {meant[0]!r}?"
    return (
        f"; there are {', '.join(names[:16])}" + (" and others" if len(names) > 16 else "") if names else "; it holds none yet"
    )


def _cell_of(scope: str, name: str) -> str:
    from urllib.parse import unquote

    return NAMELESS if scope.startswith("~") else name or unquote(scope, errors="surrogatepass")
