"""What lies in a store: its cells, its runs, its files. Plain facts, for tables and for `--json`."""

from __future__ import annotations

import contextlib
import difflib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from durable_nb import _records as rec
from durable_nb._cellcache.entries import Entries, Kept
from durable_nb._engine import Engine
from durable_nb._facts import Snapshot, Status
from durable_nb._records import Lease, RunRecord, unpack
from durable_nb._workflows import Workflows
from durable_nb.errors import RunNotFoundError, StoreError

_ASLEEP = (Status.SLEEPING, Status.RETRYING)
NAMELESS = "(without a name)"
"""All cells without a name, as one."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run: a cell's attempt or a workflow's. Times are unix seconds."""

    id: str
    kind: str
    """`cell` or `workflow`."""
    name: str
    status: str
    started_at: float
    ended_at: float | None
    steps: int | None
    """Outcomes on record; None for a cell, whose runs share theirs."""
    error: str
    labels: tuple[str, ...]
    wake_at: float | None
    """When its next sleep or retry is due, of a run that is not finished: if a process executes it then."""


@dataclass(frozen=True, slots=True)
class CellFacts:
    """One durable cell."""

    name: str
    status: str
    """Of its last run; `stored` where only its entries are left."""
    last_run_at: float | None
    steps: int
    """Outcomes that its next execution could take."""
    variables: int
    """That its newest entry restores."""
    entries: int
    size: int
    """Bytes of all its entries."""
    took_s: float | None
    """How long its last run took."""
    saves_s: float | None
    """What the cell takes in full, and a hit on its newest entry saves."""
    wake_at: float | None
    """Of its last run."""


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
        self._journal, self._seal = engine.store.journal, engine.store.seal
        self.path = engine.store.path
        self.entries = Entries(engine.store.cells, self._seal)
        self._workflows = engine.workflows or Workflows(engine)

    def runs(self) -> list[RunFacts]:
        """All runs, the newest first; what can't be read is left out."""
        steps = self._steps()
        found = [self._facts(record, lease, steps) for record, lease in self._records()]
        return sorted(found, key=lambda run: run.started_at, reverse=True)

    def cells(self) -> list[CellFacts]:
        """All durable cells, those that ran last first."""
        steps, kept, runs = self._steps(), defaultdict[str, list[Kept]](list), defaultdict[str, list[RunFacts]](list)
        outcomes: Counter[str] = Counter()
        for entry in self.entries.all():
            if entry.manifest is not None:
                kept[entry.manifest.name or NAMELESS].append(entry)
        for record, lease in self._records():
            if record.kind == "cell":
                runs[_cell_of(record.scope, record.name)].append(self._facts(record, lease, steps))
        for scope, n in steps.items():
            if not scope.startswith("~run"):
                outcomes[_cell_of(scope, "")] += n
        cells = [self._cell(name, runs[name], kept[name], outcomes) for name in sorted({*kept, *runs})]
        return sorted(cells, key=lambda cell: cell.last_run_at or 0.0, reverse=True)

    @staticmethod
    def _cell(name: str, runs: list[RunFacts], kept: list[Kept], outcomes: Counter[str]) -> CellFacts:
        last = max(runs, key=lambda run: run.started_at, default=None)
        newest = max(kept, key=lambda entry: entry.stored_at, default=None)
        manifest = newest.manifest if newest else None
        return CellFacts(
            name,
            last.status if last else "stored",
            last.started_at if last else manifest.created_at if manifest else None,
            outcomes[rec.scope_of(name)] if name != NAMELESS else outcomes[NAMELESS],
            len(manifest.bound) if manifest else 0,
            len(kept),
            sum(entry.size for entry in kept),
            last.ended_at - last.started_at if last and last.ended_at else None,
            manifest.took_s if manifest else None,
            last.wake_at if last else None,
        )

    def unread(self) -> int:
        """Runs and entries that are damaged, or signed with another key: no listing shows them."""
        runs = sum(1 for _ in self._journal.sizes("run/")) - sum(1 for _ in self._records())
        return runs + sum(entry.manifest is None for entry in self.entries.all())

    def find_run(self, said: str) -> RunFacts:
        """The run of that id, else the last one of the cell or workflow of that name; RunNotFoundError with the nearest."""
        runs = self.runs()
        for run in (*(r for r in runs if r.id == said), *(r for r in runs if r.name == said)):
            return run
        known = nearest(said, (run.name for run in runs), (run.id for run in runs))
        raise RunNotFoundError(f"no run or cell {said!r} in the store {self._engine.store.path}{known}")

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

    def _records(self) -> Iterable[tuple[RunRecord, Lease | None]]:
        for key, row in self._journal.scan("run/"):
            with contextlib.suppress(StoreError):  # `doctor` tells of it
                found = self._workflows.catalog.seen(unpack(self._seal, key, row, RunRecord).id)
                if found is not None:
                    yield found

    def _steps(self) -> dict[str, int]:
        """Outcomes of each scope's newest generation."""
        found: Counter[tuple[str, int]] = Counter()
        for key, _ in self._journal.sizes("step/"):
            scope, generation = key.split("/")[1:3]
            found[scope, int(generation)] += 1
        newest: dict[str, int] = {}
        for (scope, _), n in sorted(found.items()):
            newest[scope] = n
        return newest

    def _facts(self, record: RunRecord, lease: Lease | None, steps: dict[str, int]) -> RunFacts:
        return RunFacts(
            record.id,
            record.kind,
            _cell_of(record.scope, record.name) if record.kind == "cell" else record.name,
            self._workflows.catalog.status(record, lease).value,
            record.started_at,
            record.ended_at,
            None if record.kind == "cell" else steps.get(record.scope, 0),
            record.error,
            record.labels,
            self._wake_at(record),
        )

    def _wake_at(self, record: RunRecord) -> float | None:
        if record.status != Status.RUNNING:  # over
            return None
        try:
            steps = self._workflows.snapshot(record.id).steps
        except StoreError:  # `show` tells of it
            return None
        return min((step.wake_at for step in steps if step.wake_at and step.status in _ASLEEP), default=None)


def nearest(said: str, *known: Iterable[str]) -> str:
    """'; did you mean ...?', or what there is, for an error about a name that isn't known."""
    names = list(dict.fromkeys(name for group in known for name in group if name))
    meant = difflib.get_close_matches(said, names, n=1)
    if meant:
        return f"; did you mean {meant[0]!r}?"
    return (
        f"; there are {', '.join(names[:12])}" + (" and others" if len(names) > 12 else "") if names else "; it holds none yet"
    )


def _cell_of(scope: str, name: str) -> str:
    from urllib.parse import unquote

    return NAMELESS if scope.startswith("~") else name or unquote(scope, errors="surrogatepass")
