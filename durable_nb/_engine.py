"""The embedded engine: which runs this process executes, and by what right.

A run has one executor. Who may write for it is told by its lease's row, which every commit is conditional on; who of
several processes is alive, by an OS lock that frees itself at death. A dead owner is succeeded at once, a live one never.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from durable_nb import _records as rec
from durable_nb._clock import Clock, SystemClock
from durable_nb._facts import Status
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Generation, Lease, RunRecord, pack, unpack
from durable_nb._run import CellRun, Held, Work
from durable_nb._store import Store
from durable_nb._workers import Workers


class Engine:
    """All runs of one store in this process."""

    def __init__(self, store: Store, *, clock: Clock | None = None, jitter: Callable[[], float] = random.random) -> None:
        self.store = store
        self.clock = clock or SystemClock()
        self.jitter = jitter
        self.workers = Workers()
        self.held: dict[str, Held] = {}
        self.active: dict[str, CellRun] = {}
        self.works: dict[str, Work] = {}
        """Attempts that are being made now, by their outcome's key; some outlive the execution that began them."""

    def pack(self, key: str, record: rec.Record) -> tuple[str, bytes]:
        """A record as the row that a commit takes."""
        return key, pack(self.store.seal, key, record)

    async def begin(self, name: str, inputs: str, *, rerun: bool = False, label: str = "") -> CellRun | None:
        """A run of the cell `name` (said as `label`) with the inputs of that digest: its unfinished one, or a new one.

        None where a live process is executing the cell with the same inputs: wait for its entry. With `rerun`, steps are
        counted from a new generation, unless the unfinished run is itself such a rerun whose kernel died.
        """
        scope = rec.scope_of(name)
        while True:
            found = await self.store.writer.call(lambda: self._unfinished(scope))
            generation = found.generation
            if any(run.inputs == inputs and self._is_executing(run, lease) for run, lease in found.runs):
                return None
            free = [(run, lease) for run, lease in found.runs if not self._is_executing(run, lease)]
            free = [pair for pair in free if pair[0].generation == generation]
            free.sort(key=lambda pair: (pair[0].inputs == inputs, pair[0].started_at))
            adopted = free[-1] if free else None
            if rerun and adopted and not (adopted[0].rerun and adopted[1].owner not in ("", self.store.process.id)):
                adopted = None
            if rerun and not adopted:
                generation += 1
            run = await self._claim(scope, label or name, inputs, generation, rerun, adopted)
            if run is not None:
                await run.load()
                return run

    async def close_finished(self, name: str, inputs: str) -> None:
        """Close a run that was killed between storing its cell's entry and saying that it was complete.

        Left open, its timers would count for the next inputs.
        """
        found = await self.store.writer.call(lambda: self._unfinished(rec.scope_of(name)))
        for run, lease in found.runs:
            if run.inputs == inputs and not self._is_executing(run, lease):
                claimed = await self._claim(run.scope, name, inputs, found.generation, run.rerun, (run, lease))
                if claimed is not None:
                    await claimed.finish(Status.COMPLETED)

    def _unfinished(self, scope: str) -> _Unfinished:
        """Runs on the writer's thread."""
        journal, seal = self.store.journal, self.store.seal
        runs = []
        for key, _ in journal.scan(rec.open_prefix(scope)):
            run_id = key.rsplit("/", 1)[1]
            run_row, lease_row = journal.get(rec.run_key(run_id)), journal.get(rec.lease_key(run_id))
            if run_row is not None and lease_row is not None:
                run = unpack(seal, rec.run_key(run_id), run_row, RunRecord)
                runs.append((run, unpack(seal, rec.lease_key(run_id), lease_row, Lease)))
        row = journal.get(rec.generation_key(scope))
        generation = unpack(seal, rec.generation_key(scope), row, Generation).number if row else 0
        return _Unfinished(generation, runs)

    def _is_executing(self, run: RunRecord, lease: Lease) -> bool:
        if lease.owner == self.store.process.id:
            return run.id in self.active
        return self.store.process.is_alive(lease.owner)

    async def _claim(
        self, scope: str, name: str, inputs: str, generation: int, rerun: bool, adopted: tuple[RunRecord, Lease] | None
    ) -> CellRun | None:
        """Become the run's one executor; None where another process was faster."""
        if adopted:
            old, lease = adopted
            record = replace(old, inputs=inputs, status="running", ended_at=None, error="")
            lease_key = rec.lease_key(old.id)
            held = self.held.get(old.id)
            if held is None:
                before: bytes | None = pack(self.store.seal, lease_key, lease)
                held = self._new_hold(old.id, lease.epoch + 1)
            else:  # ours already: a body of an earlier execution still writes under it
                before = held.row
        else:
            run_id = f"{datetime.now().astimezone():%y%m%d-%H%M%S}-{secrets.token_hex(4)}"
            record = RunRecord(run_id, "cell", name, scope, generation, inputs, self.clock.now().wall_s, rerun=rerun)
            lease_key, before = rec.lease_key(run_id), None
            held = self._new_hold(run_id, 1)
        open_key = rec.open_prefix(scope) + record.id
        verdict = await self.store.writer.commit(
            Commit(
                guard=(lease_key, before),
                puts=(
                    (lease_key, held.row),
                    self.pack(rec.run_key(record.id), record),
                    self.pack(rec.generation_key(scope), Generation(generation)),
                    (open_key, self.store.seal.close(open_key, b"")),
                ),
            )
        )
        if verdict is not Verdict.APPLIED:
            return None
        self.held[record.id] = held
        return CellRun(self, record, held, resumed=adopted is not None)

    def _new_hold(self, run_id: str, epoch: int) -> Held:
        key = rec.lease_key(run_id)
        return Held(run_id, epoch, pack(self.store.seal, key, Lease(epoch, self.store.process.id)))


@dataclass(frozen=True, slots=True)
class _Unfinished:
    generation: int
    runs: list[tuple[RunRecord, Lease]]
