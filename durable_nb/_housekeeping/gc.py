"""Making room: what nothing refers to any more goes, and under a size cap the entries that are worth least.

Other processes may use the store meanwhile. Files are unlinked, never truncated: whoever has one mapped keeps it. Rows go only
while the row that made them superfluous is what it was; drafts and large values only when nobody can be about to name them.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from durable_nb import _records as rec
from durable_nb._cellcache.entries import Entries, Kept
from durable_nb._engine import Engine
from durable_nb._engine.catalog import is_open_attempt
from durable_nb._facts import Status
from durable_nb._housekeeping.inventory import NAMELESS
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Generation, RunRecord, unpack, unpack_message
from durable_nb._store import Store, texts_that_name, values_named
from durable_nb.errors import StoreError

LIVE_S = 30 * 86400.0
"""A cell is live when it was run or restored within this time."""
HALF_LIFE_S = 7 * 86400.0
"""An entry that nobody used for this long is worth half as much."""
GRACE_S = 3600.0
"""Drafts and large values that are younger may belong to a write that has not ended."""

_DELETES_AT_ONCE = 500
_OF_RUN = rec.scope_of("~run ")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An entry, as far as weighing it goes."""

    cell: str
    size: int
    cost_s: float
    """What running the cell again would take."""
    stored_at: float
    used_at: float

    def worth(self, now: float) -> float:
        """Seconds of recomputing that a byte saves, halved for each week without use."""
        idle_s = max(now - self.used_at, 0.0)
        return self.cost_s / max(self.size, 1) * math.exp2(-idle_s / HALF_LIFE_S)


def to_drop(candidates: Sequence[Candidate], excess: int, now: float) -> list[int]:
    """Which of them go to free `excess` bytes, by position, the least worth first; fewer bytes where the rest must stay.

    The newest entry of a live cell stays.
    """
    newest: dict[str, int] = {}
    live: set[str] = set()
    for n, entry in enumerate(candidates):
        if entry.cell not in newest or entry.stored_at > candidates[newest[entry.cell]].stored_at:
            newest[entry.cell] = n
        if now - entry.used_at < LIVE_S:
            live.add(entry.cell)
    kept = {n for cell, n in newest.items() if cell in live}
    chosen = []
    for n in sorted(range(len(candidates)), key=lambda n: (candidates[n].worth(now), -candidates[n].size)):
        if excess <= 0:
            break
        if n not in kept:
            chosen.append(n)
            excess -= candidates[n].size
    return chosen


@dataclass(slots=True)
class Collected:
    """What was removed."""

    rows: int = 0
    """Of the journal: records of steps before a `--rerun`, and of runs that are gone."""
    values: int = 0
    """Bytes of large values that no record names."""
    drafts: int = 0
    """Files that killed processes left."""
    entries: list[str] = field(default_factory=list)
    """Of which cells entries went."""
    freed: int = 0
    size: int = 0
    """Of the store now."""
    max_size: int | None = None


def collect(engine: Engine, max_size: int | None = None) -> Collected:
    """Make room; what was removed. `max_size` in bytes, of the whole store; None: only what nothing refers to goes."""
    store = engine.store
    before, now = size_of(store.path), time.time()
    store.process.others()  # removes what dead processes left
    result = Collected(max_size=max_size)
    result.rows = sum(_delete(engine, guard, keys) for guard, keys in _superfluous(engine))
    for draft in (path for kind in ("cells/*/.*", "values/.*", ".store.json.*") for path in store.path.glob(kind)):
        with contextlib.suppress(FileNotFoundError):
            if now - draft.stat().st_mtime > GRACE_S:
                draft.unlink()
                result.drafts += 1
    result.values = store.journal.drop_blobs(now - GRACE_S, _needed(store))
    if max_size is not None:
        entries = list(Entries(store.cells, store.signer).all())
        excess = size_of(store.path) - max_size
        for n in to_drop([_candidate(entry) for entry in entries], excess, now):
            if _unlink(entries[n]):
                manifest = entries[n].manifest
                result.entries.append("(unreadable)" if manifest is None else manifest.name or NAMELESS)
    result.size = size_of(store.path)
    result.freed = max(before - result.size, 0)
    return result


def parse_size(text: str) -> int:
    """Bytes: '2GB', '500 MB', '1.5GiB', '1000000'. ValueError otherwise."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is not a size: write it like '500MB' or '2GB'")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def default_max_size() -> int | None:
    """`DURABLE_NB_MAX_SIZE`; None where it isn't set. ValueError."""
    text = os.environ.get("DURABLE_NB_MAX_SIZE")
    try:
        return parse_size(text) if text else None
    except ValueError as error:
        raise ValueError(f"DURABLE_NB_MAX_SIZE: {error}") from None


def size_of(folder: Path) -> int:
    """Bytes of all files below it, without those that SQLite keeps only while somebody uses the database."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.name.startswith("cache.db-"):
                total += path.stat().st_size
    return total


# -- rows --------------------------------------------------------------------------------------------------------------

_Guard = tuple[str, bytes | None] | None
_BY_QUOTED_RUN = ("timer/", "arrived/", "decided/", "value/", "inbox/", "saved/", "once/", "progress/")
"""Prefixes that the run's id follows as one part of the key."""


def _superfluous(engine: Engine) -> Iterator[tuple[_Guard, list[str]]]:
    """Keys that nothing will ask for again, with the row that must still be what it was when they go."""
    journal, signer = engine.store.journal, engine.store.signer
    of_runs = f"timer/{_OF_RUN}"  # rows of a log; else of a cell's run
    by_run = [
        key
        for prefix in (*_BY_QUOTED_RUN, "lease/", "open/", "arguments/", "facts/", "result/")
        for key, _ in journal.sizes(prefix)
        if not key.startswith(of_runs)
    ]
    of_steps = [key for prefix in ("step/", of_runs, "log/", "try/", "excluded/", "again/") for key, _ in journal.sizes(prefix)]
    # The runs are read last: what was begun meanwhile has its run's row.
    runs = dict(journal.scan("run/"))
    current: dict[str, tuple[int, _Guard]] = {}
    for key, row in journal.scan("generation/"):
        with contextlib.suppress(StoreError):
            current[key.partition("/")[2]] = unpack(signer, key, row, Generation).number, (key, row)
    busy = set()
    for key, row in runs.items():
        with contextlib.suppress(StoreError):
            record = unpack(signer, key, row, RunRecord)
            if record.kind == "workflow":
                current[record.scope] = record.generation, (key, row)
            found = engine.ownership.read_run(record.id)
            if found is not None and engine.ownership.is_owned(record.id, found[1]):
                busy.add((record.scope, record.generation))
    old = defaultdict[str, list[str]](list)
    for key in of_steps:
        scope, generation = key.split("/")[1:3]
        if scope.startswith(_OF_RUN) and rec.run_key(run := unquote(scope)[len("~run ") :]) not in runs:
            yield (rec.run_key(run), None), [key]
        elif scope in current and int(generation) < current[scope][0] and (scope, int(generation)) not in busy:
            old[scope].append(key)
    for scope, keys in old.items():
        yield current[scope][1], keys
    for key in by_run:
        kind, _, rest = key.partition("/")  # ids may have slashes in them
        is_quoted = f"{kind}/" in _BY_QUOTED_RUN
        run = rec.run_key(rec.run_of_timer(key) if is_quoted else rest.partition("/")[2] if kind == "open" else rest)
        if run not in runs:
            yield (run, None), [key]
    yield None, _outdated_events(engine, runs)
    for key, row in engine.shared.limits.outdated():
        yield (key, row), [key]


def _outdated_events(engine: Engine, runs: dict[str, bytes]) -> list[str]:
    """Keys of the events for whoever waits that no unfinished run is old enough to get. Runs that begin now are younger."""
    signer, oldest = engine.store.signer, math.inf
    for key, row in runs.items():
        try:
            record = unpack(signer, key, row, RunRecord)
        except StoreError:
            return []  # it may be older than any
        if record.status == Status.RUNNING or is_open_attempt(record):
            oldest = min(oldest, record.started_at)
    found = []
    for key, row in engine.store.journal.scan(rec.event_prefix("")):
        with contextlib.suppress(StoreError):
            event = unpack_message(signer, key, row)
            if event.sent_at < oldest:
                found.append(key)
    return found


def _delete(engine: Engine, guard: _Guard, keys: Sequence[str]) -> int:
    """Delete rows while the guard holds; how many."""
    deleted = 0
    for start in range(0, len(keys), _DELETES_AT_ONCE):
        some = tuple(keys[start : start + _DELETES_AT_ONCE])
        if engine.store.writer.commit_and_wait(Commit(guard, deletes=some)) is not Verdict.APPLIED:
            break
        deleted += len(some)
    return deleted


# -- files -------------------------------------------------------------------------------------------------------------


def _needed(store: Store) -> Callable[[str], bool]:
    """Tells whether any row or entry names a large value."""
    named: set[str] | None = None

    def is_needed(digest: str) -> bool:
        nonlocal named
        if named is None:
            named = set().union(*map(values_named, texts_that_name(store)))
        return digest in named

    return is_needed


def _candidate(entry: Kept) -> Candidate:
    manifest = entry.manifest
    if manifest is None:  # no hit for this user; but it may be another's, signed with their key
        return Candidate(f"unreadable {entry.scope}", entry.size, 0.0, entry.stored_at, entry.used_at)
    cell = manifest.name or f"~ {manifest.components.get('code', '')}"
    return Candidate(cell, entry.size, manifest.took_s, entry.stored_at, entry.used_at)


def _unlink(entry: Kept) -> bool:
    """Remove an entry, unless it has been written anew meanwhile."""
    try:
        found = entry.path.stat()
        if (found.st_ino, found.st_mtime) != (entry.inode, entry.stored_at):
            return False
        entry.path.unlink()
    except FileNotFoundError:
        return False
    return True
