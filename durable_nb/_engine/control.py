"""What is done about a run from outside, whoever executes it: a fork is made of it, or it is deleted.

To cancel, resume and restart it are messages (`inbox`); here it is left as it is, or it is over.
"""

from __future__ import annotations

import time
from dataclasses import replace

from durable_nb import _records as rec
from durable_nb._engine.by_history import forked
from durable_nb._engine.catalog import Catalog
from durable_nb._engine.engine import new_id
from durable_nb._engine.limits import next_place
from durable_nb._engine.run_log import read_log
from durable_nb._engine.shared import Shared
from durable_nb._facts import FINISHED
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Arguments, Lease, RunRecord, unpack
from durable_nb._store import texts_that_name, values_named
from durable_nb.errors import CorruptStoreError, DurableError


def fork_of(shared: Shared, catalog: Catalog, run_id: str, at: str) -> tuple[RunRecord, list[tuple[str, bytes]]]:
    """A new run's record, and the rows with which it begins where the other one asked for the step at that path."""
    record, _ = catalog.find(run_id)
    if record.kind != "workflow":
        raise DurableError(
            f"{record.id!r} is a run of the cell {record.name!r}, so nothing was started: edit the cell and run it again"
        )
    journal, signer, now = shared.store.journal, shared.store.signer, shared.clock.now()
    row = journal.get(rec.arguments_key(record.id))
    if row is None:
        raise CorruptStoreError(f"what the run {record.id!r} was started with is missing; nothing was started")
    number = catalog.request_of(record, at)
    log = forked([one for _, _, one in read_log(journal, signer, record)], number)
    arguments = unpack(signer, rec.arguments_key(record.id), row, Arguments)
    new = new_id()
    of = new, "workflow", record.name, rec.scope_of(f"~run {new}"), 0, record.inputs, now.wall_s
    at_s = log[-1].at
    fork = RunRecord(*of, labels=record.labels, home=record.home, since=now, since_s=at_s, counts_from_s=at_s)
    if record.limit:
        fork = replace(fork, limit=record.limit, limit_key=record.limit_key, place=next_place(shared.clock))
    rows = [
        (rec.arguments_key(new), arguments),
        *((rec.log_key(fork.scope, 0, seq, one), one) for seq, one in enumerate(log, 1)),
    ]
    return fork, [shared.ownership.pack(key, one) for key, one in rows]


def delete(shared: Shared, catalog: Catalog, run_id: str) -> None:
    """Remove a finished run of a workflow: its rows by one commit, then those of its large values that nothing else names."""
    journal, began_at = shared.store.journal, time.time()  # as files have it
    while True:
        record, lease, row = catalog.found(run_id)
        _refuse_unless_over(shared, catalog, record, lease)
        own = rec.run_key, rec.lease_key, rec.arguments_key, rec.facts_key, rec.result_key
        rows = journal.get_many(key(record.id) for key in own)
        for prefix in (
            *(f"{kind}/{record.scope}/" for kind in ("step", "timer", "log", "try")),
            rec.inbox_prefix(record.id),
            rec.decided_key(record.id, ""),
            rec.saved_prefix(record.id),
        ):
            rows.update(journal.scan(prefix))
        deletes = *rows, rec.open_prefix(record.scope) + record.id
        guard = rec.run_key(record.id), row
        if shared.store.writer.commit_and_wait(Commit(guard, deletes=deletes)) is Verdict.APPLIED:
            break  # else somebody has resumed it in this very moment
    shared.ownership.held.pop(record.id, None)
    named = set[str]().union(*map(values_named, rows.values()))
    if named:
        still = set[str]().union(*(named & values_named(text) for text in texts_that_name(shared.store)))
        # A value that was put again since then is about to be named by another run.
        journal.drop_blobs(began_at, lambda digest: digest not in named or digest in still)


def _refuse_unless_over(shared: Shared, catalog: Catalog, record: RunRecord, lease: Lease | None) -> None:
    """DurableError for a run that is not to be deleted as it stands."""
    if record.kind != "workflow":
        raise DurableError(
            f"{record.id!r} is a run of the cell {record.name!r}, so nothing was deleted; '%durable forget' forgets it"
        )
    if catalog.status(record, lease) not in FINISHED:
        raise DurableError(
            f"the run {record.id!r} is {catalog.said(record, lease)}, so nothing was deleted. Cancel it first, with the run's "
            "cancel()"
        )
    if lease is not None and shared.store.process.is_alive(lease.owner):
        raise DurableError(
            f"a step of the run {record.id!r} is still executed{catalog.executor(lease)}, so nothing was deleted. Delete it "
            "when that has ended"
        )
