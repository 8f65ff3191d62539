"""Forgetting a cell: its entries, the outcomes of its steps, and its runs."""

from __future__ import annotations

from dataclasses import dataclass

from durable_nb import _records as rec
from durable_nb._cellcache.entries import Entries
from durable_nb._engine import Engine
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Generation, RunRecord, pack, unpack
from durable_nb.errors import DurableError


@dataclass(frozen=True, slots=True)
class Forgotten:
    """How much there was."""

    entries: int
    steps: int
    runs: int


def forget(engine: Engine, name: str) -> Forgotten:
    """Forget all of the cell `name`. Its steps get idempotency keys of their own when they run again, as after `--rerun`.

    DurableError while the cell runs, in any process; then nothing is forgotten.
    """
    store, scope = engine.store, rec.scope_of(name)
    journal, counter = store.journal, rec.generation_key(scope)
    while True:
        begun = journal.get(counter)
        for key, _ in journal.sizes(rec.open_prefix(scope)):
            _take(engine, key.rpartition("/")[2], name)
        steps = [key for key, _ in journal.sizes(f"step/{scope}/")]
        rows = [key for prefix in ("try", "excluded", "again", "open") for key, _ in journal.sizes(f"{prefix}/{scope}/")]
        records = [unpack(store.signer, key, row, RunRecord) for key, row in journal.scan("run/")]
        runs = [record.id for record in records if record.scope == scope]
        for run_id in runs:
            rows += [rec.run_key(run_id), rec.lease_key(run_id), rec.facts_key(run_id)]
            own = (
                rec.inbox_prefix,
                rec.timer_prefix,
                rec.arrived_prefix,
                rec.decided_prefix,
                rec.value_prefix,
                rec.progress_prefix,
            )
            rows += [key for prefix in own for key, _ in journal.sizes(prefix(run_id))]
        number = unpack(store.signer, counter, begun, Generation).number if begun else 0
        put = counter, pack(store.signer, counter, Generation(number + 1))
        deletes = (*steps, *rows)
        verdict = store.writer.commit_and_wait(Commit((counter, begun), puts=(put,), deletes=deletes))
        if verdict is Verdict.APPLIED:  # else it was begun in this very moment: look again
            break
    for run_id in runs:
        engine.ownership.held.pop(run_id, None)
    entries = 0
    for entry in Entries(store.cells, store.signer).all(scope):
        entry.path.unlink(missing_ok=True)
        entries += 1
    return Forgotten(entries, len(steps), len(runs))


def _take(engine: Engine, run_id: str, name: str) -> None:
    """Keep everybody from executing an unfinished run that nobody executes."""
    lease = engine.ownership.reserve(run_id)
    if lease is not None:
        owner = f" by process {lease.owner.partition('-')[0]}" if lease.owner else ""
        raise DurableError(
            f"cell {name!r} is being run{owner}, so nothing of it was forgotten. Let it end, or interrupt it; then forget it"
        )
