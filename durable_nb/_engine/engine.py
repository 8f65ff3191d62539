"""The embedded engine of one store in this process: begins the runs of cells. `Workflows` begins those of workflows."""

from __future__ import annotations

import contextlib
import functools
import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from durable_nb import _records as rec
from durable_nb._adoption import Origin, exists_beside, may_adopt
from durable_nb._clock import Clock
from durable_nb._engine.attempt import Attempt
from durable_nb._engine.cell_run import CellRun
from durable_nb._engine.inbox import wish
from durable_nb._engine.shared import Shared
from durable_nb._facts import Status
from durable_nb._records import Cancel, Generation, Lease, RunRecord, unpack
from durable_nb._store import Store
from durable_nb.errors import StoreError, UntrustedStoreError


@dataclass(frozen=True, slots=True)
class Asked:
    """An execution of a cell."""

    owner: str
    """What its steps belong to: the cell's name, or what stands for one."""
    inputs: str
    """Digest of its code and of what it reads."""
    label: str = ""
    """How messages call it, where not so."""
    rerun: bool = False
    rerun_step: str = ""
    origin: Origin = field(default_factory=Origin)
    reads: dict[str, str] = field(default_factory=dict)
    """What it reads, by component: a digest each, without its own code."""

    @property
    def scope(self) -> str:
        """The cell in the journal's keys."""
        return rec.scope_of(self.owner)


class Engine:
    """All runs of one store in this process."""

    def __init__(self, store: Store, *, clock: Clock | None = None, jitter: Callable[[], float] = random.random) -> None:
        self.shared = Shared(store, clock, jitter)
        self.store, self.clock = store, self.shared.clock
        self.ownership = self.shared.ownership

    @property
    def workflows(self) -> Any:
        """What starts and finds the runs of workflows of this store, and awaits them; None before it is made."""
        return vars(self.shared).get("workflows")

    @property
    def active(self) -> dict[str, Any]:
        """Runs that are executed here, by id."""
        return self.ownership.active

    @property
    def bodies(self) -> dict[str, Attempt]:
        """Bodies at work here, by idempotency key."""
        return self.shared.bodies

    async def begin(self, asked: Asked) -> CellRun | None:
        """A run of that cell with those inputs: its unfinished one, or a new one.

        None where a live process is executing the cell with the same inputs: wait for its entry. With `rerun`, steps are
        counted from a new generation, unless the unfinished run is itself such a rerun whose kernel died; with `rerun_step` the
        steps of that name are, likewise. LookupError where the cell has recorded no step of that name.
        """
        while True:
            found = await self.store.writer.call(lambda: self._unfinished(asked.scope, forgiving=asked.rerun))
            if any(run.inputs == asked.inputs and self.ownership.is_owned(run.id, lease) for run, lease in found.runs):
                return None
            adopted = self._adopted(asked, found)
            starting = adopted[0].id if adopted else new_id()
            self.ownership.changing.add(starting)
            run = None
            try:
                run = await self._claim(asked, found, adopted, starting)
                if run is None:
                    continue
                await run.load()
                died = adopted is not None and self._died(adopted[1])
                if asked.rerun_step and not (died and adopted and adopted[0].rerun_step == asked.rerun_step):
                    await run.forget_step(asked.rerun_step)
            except BaseException:
                if run is not None:
                    run.abandon()
                raise
            finally:
                self.ownership.changing.discard(starting)
            return run

    def _adopted(self, asked: Asked, found: _Unfinished) -> tuple[RunRecord, Lease] | None:
        """The unfinished run that the cell goes on with: of those that nobody executes, and that it may adopt, one of its own
        notebook before others, with these inputs before others, the newest."""  # fmt: skip
        asking = replace(asked.origin, process=self.store.process.id)
        free = [
            (run, lease)
            for run, lease in found.runs
            if run.generation == found.generation
            and not self.ownership.is_owned(run.id, lease)
            and may_adopt(run.origin, asking, functools.partial(exists_beside, self.store.path))
        ]
        adopted = max(
            free,
            key=lambda pair: (
                pair[0].origin.notebook == asking.notebook,
                pair[0].inputs == asked.inputs,
                pair[0].started_at,
            ),
            default=None,
        )
        if asked.rerun and adopted and not (adopted[0].rerun and self._died(adopted[1])):
            return None
        return adopted

    def _died(self, lease: Lease) -> bool:
        """Was its owner killed, and didn't let go of it itself?"""
        return lease.owner not in ("", self.store.process.id)

    async def close_finished(self, asked: Asked) -> None:
        """Close a run that was killed between storing its cell's entry and saying that it was complete.

        Left open, its timers would count for the next inputs. There is hardly ever one, and a hit waits for this look: it is
        made here, not on the writer's thread.
        """
        if not self.store.journal.scan(rec.open_prefix(asked.scope)):
            return
        found = await self.store.writer.call(lambda: self._unfinished(asked.scope))
        for run, lease in found.runs:
            if run.inputs == asked.inputs and not self.ownership.is_owned(run.id, lease):
                claimed = await self._claim(asked, found, (run, lease), run.id)
                if claimed is not None:
                    await claimed.finish(Status.COMPLETED)

    def _unfinished(self, scope: str, *, forgiving: bool = False) -> _Unfinished:
        """Runs on the writer's thread. What somebody else signed counts as not there, but for the steps: they are refused when
        they are asked for. `forgiving`: nor does what can't be read, since all is made anew."""  # fmt: skip
        journal, signer = self.store.journal, self.store.signer
        ignored = StoreError if forgiving else UntrustedStoreError
        runs = []
        for key, _ in journal.scan(rec.open_prefix(scope)):
            with contextlib.suppress(ignored):
                found = self.ownership.read_run(key.rsplit("/", 1)[1])
                if found is not None and found[1] is not None and not self._was_cancelled(*found):
                    runs.append((found[0], found[1]))
        row = journal.get(rec.generation_key(scope))
        try:
            generation = unpack(signer, rec.generation_key(scope), row, Generation).number if row else 0
        except ignored:
            used = [int(key.split("/")[2]) for key, _ in journal.scan(f"step/{scope}/")]
            generation = max(used, default=0)
        return _Unfinished(generation, row, runs)

    def _was_cancelled(self, run: RunRecord, lease: Lease | None) -> bool:
        """Was it cancelled while nobody executed it, or its executor killed before hearing of it?"""
        return isinstance(wish(run, self.ownership.inbox.of(run.id)), Cancel) and not self.ownership.is_owned(run.id, lease)

    async def _claim(
        self, asked: Asked, found: _Unfinished, adopted: tuple[RunRecord, Lease] | None, new: str
    ) -> CellRun | None:
        """Become the one executor of a cell's run; None where another was faster.

        A new run is begun only while the cell's `generation` row is as it was read, and changes it: of two that find nothing
        to adopt at the same moment, one begins, and the other looks again.
        """
        origin = replace(asked.origin, process=self.store.process.id)
        if adopted:
            record = replace(adopted[0], inputs=asked.inputs, status="running", ended_at=None, error="", origin=origin)
            held = await self.ownership.claim(record, adopted[1])
        else:
            generation = found.generation + asked.rerun
            began = self.clock.now().wall_s
            of = "cell", asked.label or asked.owner, asked.scope, generation, asked.inputs, began
            record = RunRecord(new, *of, rerun=asked.rerun, origin=origin)
            begun = Generation(generation, record.id)
            held = await self.ownership.claim(record, None, first=(rec.generation_key(asked.scope), found.counter, begun))
        if held is None:
            return None
        run = CellRun(self.shared, record, held, resumed=adopted is not None)
        run.waiting.reads = asked.reads
        return run


def new_id() -> str:
    """A run's id: when it began, and some randomness."""
    return f"{datetime.now().astimezone():%y%m%d-%H%M%S}-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class _Unfinished:
    generation: int
    counter: bytes | None
    """The row that holds it, and changes with every run that is begun."""
    runs: list[tuple[RunRecord, Lease]]
