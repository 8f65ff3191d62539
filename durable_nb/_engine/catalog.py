"""How the runs of a store stand: the one answer, whoever asks (`run.status`, `runs()`, the tables, the command line).

It is told from summary rows that hold no values, the runs' leases, and what this process executes itself.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from durable_nb import _records as rec
from durable_nb import _usage
from durable_nb._clock import remaining_s
from durable_nb._codec import digest_of
from durable_nb._engine.by_history import TIMER, ends_of, open_attempts, requests_of, without_collector
from durable_nb._engine.inbox import Received, wish
from durable_nb._engine.performer import ended_step
from durable_nb._engine.reporting import decoded
from durable_nb._engine.request_tasks import key_of
from durable_nb._engine.run_log import cancelled, read_log
from durable_nb._engine.run_time import due_in_s
from durable_nb._engine.scans import Row, Scans
from durable_nb._facts import FINISHED, Paths, Progress, Snapshot, Status, Step, Used, standing
from durable_nb._preview import Preview
from durable_nb._records import (
    Asked,
    Attempts,
    Cancel,
    Checkpoint,
    Decided,
    Event,
    Generation,
    Lease,
    Outcome,
    Reports,
    Restart,
    RunRecord,
    Sequence,
    Timer,
    unpack,
)
from durable_nb._replay import Wait, decide_sleep
from durable_nb._usage import Usage
from durable_nb.errors import CorruptStoreError, RunNotFoundError, StepNotFoundError, StoreError

if TYPE_CHECKING:
    from durable_nb._engine.shared import Shared


Scan = Callable[[str], list[Row]]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A wait for an event or a decision that a run has asked for."""

    id: str
    path: str
    timer: Timer
    until_s: float
    """When it is over at the latest: unix seconds."""
    decided: Decided | None
    is_open: bool
    """Nothing has come for it, and its time is not over."""


def is_open_attempt(record: RunRecord) -> bool:
    """Is it an attempt of a cell that has failed, which goes on when the cell is run again?"""
    return record.kind == "cell" and record.status == Status.FAILED


class Catalog:
    """Looks, and changes nothing."""

    def __init__(self, shared: Shared, is_started: Callable[[str], bool]) -> None:
        """`is_started`: has this process begun to execute that run, or is it about to?"""
        self._shared, self._ownership, self._is_started = shared, shared.ownership, is_started
        self._journal, self._signer = shared.store.journal, shared.store.signer
        self._known: dict[str, tuple[bytes, RunRecord]] = {}
        """Rows of runs as the last listing read them: most are as they were at the next one."""

    def find(self, run_id: str) -> tuple[RunRecord, Lease | None]:
        """The run of that id, or the last one of the cell of that name; RunNotFoundError."""
        found = self.seen(run_id) or self._last_of_cell(run_id)
        if found is None:
            raise RunNotFoundError(
                f"no run {run_id!r} in the store {self._shared.store.path}; durable.runs() lists those there are"
            )
        return found

    def found(self, run_id: str) -> tuple[RunRecord, Lease | None, bytes]:
        """The same, and its record's row: what is written on condition of it fails where the run stands otherwise by then."""
        record, _ = self.find(run_id)
        row = self._journal.get(rec.run_key(record.id)) or b""
        return *self.find(record.id), row  # what has changed meanwhile is read after the row

    def seen(self, run_id: str) -> tuple[RunRecord, Lease | None] | None:
        """A run as it stands: what is wanted of it counts where nobody executes it."""
        found = self._ownership.read_run(run_id)
        if found is None or self.is_owned(run_id, found[1]):
            return found
        return self._heeding(found[0], self._ownership.inbox.of(run_id)), found[1]

    def all(self) -> Iterator[tuple[RunRecord, Lease | None]]:
        """Every run that can be read, the newest first. One that is damaged, or that another key signed, is left out: `doctor`
        tells of it."""  # fmt: skip
        return ((record, lease) for record, lease, _ in self._among(lambda _: True))

    def chosen(
        self, status: str | None = None, workflow: str | None = None, label: str | None = None
    ) -> Iterator[tuple[RunRecord, Lease | None, Status]]:
        """Those of them that fit, and how they stand. That is looked up only where the rest fits, and where it may be so."""

        def fits(record: RunRecord) -> bool:
            return workflow in (None, record.name) and (label is None or label in record.labels)

        scan = Scans(self._journal)
        for record, lease, is_sure in self._among(fits):
            if status is None or not is_sure or self._may_stand(record, lease, status):
                with contextlib.suppress(StoreError):
                    stands = self.status(record, lease, scan)
                    if status in (None, stands):
                        yield record, lease, stands

    def _among(self, fits: Callable[[RunRecord], bool]) -> Iterator[tuple[RunRecord, Lease | None, bool]]:
        """The same as `seen`, of many runs; and is it all that there is to know, since this process doesn't execute it?"""
        inboxes, records = self._ownership.inbox.all(), list[RunRecord]()
        known, read = self._known, dict[str, tuple[bytes, RunRecord]]()
        with without_collector():
            for key, row in self._journal.scan(rec.run_key("")):
                before = known.get(key)
                with contextlib.suppress(StoreError):
                    same = before is not None and before[0] == row
                    record = before[1] if before is not None and same else unpack(self._signer, key, row, RunRecord)
                    read[key] = row, record
                    if fits(record):
                        records.append(record)
        self._known = read
        records.sort(key=_newest_first)
        leases: dict[str, bytes] | None = None
        owners: dict[str, bool] = {}
        for record in records:
            if record.status != Status.RUNNING and record.id not in inboxes and not self._is_started(record.id):
                yield record, None, True
                continue
            if leases is None:
                leases = dict(self._journal.scan(rec.lease_key("")))
            lease = None
            with contextlib.suppress(StoreError):
                row = leases.get(key := rec.lease_key(record.id), b"")
                lease = unpack(self._signer, key, row, Lease) if row else None
            owner = lease.owner if lease else ""
            is_mine = owner == self._shared.store.process.id or self._is_started(record.id)
            if owner not in owners or is_mine:
                owners[owner] = self.is_owned(record.id, lease)
            if owners[owner]:
                yield record, lease, not is_mine
            else:
                free = replace(lease, owner="") if lease else None
                yield self._heeding(record, inboxes.get(record.id, [])), free, not is_mine

    def _may_stand(self, record: RunRecord, lease: Lease | None, status: str) -> bool:
        if record.status != Status.RUNNING:
            return record.status == status
        return status not in FINISHED and (status == Status.INTERRUPTED) == (lease is None or not lease.owner)

    def snapshots(
        self,
        status: str | None,
        workflow: str | None,
        label: str | None,
        limit: int | None,
        *,
        before: str | None = None,
        steps: bool,
    ) -> list[Snapshot]:
        """As `_current.Engine.snapshots` has it."""
        after = None if before is None else _newest_first(self.find(before)[0])
        found = (run for run in self.chosen(status, workflow, label) if after is None or _newest_first(run[0]) > after)
        return [self.snapshot(run[0].id) if steps else self._summary(run[0], run[2]) for run in islice(found, limit)]

    def used(self) -> list[Used]:
        """What models' answers have cost, by run, the newest first. Records that can't be read are left out."""
        spent, saved = defaultdict[str, Usage](dict), defaultdict[str, Usage](dict)
        for key, row in self._journal.scan("step/"):
            with contextlib.suppress(StoreError):
                outcome = unpack(self._signer, key, row, Outcome)
                _usage.add(spent[outcome.run_id], outcome.usage)
        for run_id, usage in self._shared.savings.all():
            _usage.add(saved[run_id], usage)
        runs = [record for record, _ in self.all() if spent.get(record.id) or saved.get(record.id)]
        found = [Used(run.id, run.name, run.started_at, spent[run.id], saved[run.id]) for run in runs]
        return sorted(found, key=lambda used: used.started_at, reverse=True)

    def snapshot(self, run_id: str) -> Snapshot:
        """A run with its steps, and those of the children that it has invoked."""
        record, lease = self.find(run_id)
        run = self._ownership.active.get(record.id)
        try:
            found = run.snapshot() if run is not None else self.summary(record, lease, self._steps(record))
        except CorruptStoreError:
            if self.find(run_id)[0] != record:  # it was deleted, or begun anew, while its rows were read
                return self.snapshot(run_id)
            raise
        if found.status is Status.INTERRUPTED and self.find(run_id) != (record, lease):
            return self.snapshot(run_id)  # it ended or changed hands while another thread looked
        if all(step.child is None for step in found.steps):
            return found
        return replace(found, steps=tuple(one for step in found.steps for one in (step, *self._of_child(step))))

    def status_of(self, run_id: str) -> Status:
        """How the run of that id stands; also where it ends or changes hands while another thread looks."""
        found = self.find(run_id)
        while (status := self.status(*found)) is Status.INTERRUPTED and (again := self.find(run_id)) != found:
            found = again
        return status

    def place_of(self, run_id: str, path: str) -> tuple[str, str]:
        """The run that asks for a decision at this path, and where in that run: `child/step` is an invoked child's, and so is a
        name that nothing in the run itself bears, where one decision of that name waits."""
        steps = self.snapshot(run_id).steps
        invoked = [step for step in steps if step.child is not None]
        if not invoked:
            return run_id, path
        own = (step for step in steps if not any(step.path.startswith(f"{one.path}/") for one in invoked))
        if all(path not in (step.name, step.path) for step in own):
            waiting = [one.path for one in steps if (one.kind, one.name, one.status) == ("decision", path, Status.WAITING)]
            path = waiting[0] if len(waiting) == 1 else path
        for step in invoked:
            is_there = any(path in (one.path, f"{one.path}#1") for one in steps)
            if step.child is not None and path.startswith(f"{step.path}/") and is_there:
                return self.place_of(step.child, path.removeprefix(f"{step.path}/"))
        return run_id, path

    def _of_child(self, step: Step) -> Iterator[Step]:
        """The steps of the run that an `invoke` has begun."""
        if step.child is not None and self.seen(step.child) is not None:
            for one in self.snapshot(step.child).steps:
                yield replace(one, path=f"{step.path}/{one.path}")

    def child_of(self, parent: RunRecord, asked: Asked) -> str:
        """The id of the run that this request has invoked."""
        return key_of(self._shared.store.id, parent, asked.kind, asked.name, asked.digest, asked.n)

    def reported(self, run_id: str) -> dict[str, Any]:
        """What the code of a run has reported."""
        record, _ = self.find(run_id)
        run = self._ownership.active.get(record.id)
        if run is not None:
            return run.reported()
        key = rec.facts_key(record.id)
        row = self._journal.get(key)
        found = unpack(self._signer, key, row, Reports) if row else None
        return decoded(found.facts) if found is not None and found.generation == record.generation else {}

    def unfinished(self) -> Iterator[RunRecord]:
        """The runs that have not ended, whether or not a process executes them; those that can be read."""
        for key, _ in self._journal.sizes("open/"):
            with contextlib.suppress(StoreError):
                found = self.seen(key.split("/", 2)[2])
                if found is not None and (found[0].status == Status.RUNNING or is_open_attempt(found[0])):
                    yield found[0]

    def waits(self, record: RunRecord, kind: str, of: str = "") -> list[Waiting]:
        """What the run has asked for of that kind (`event`, `decision`) and of that event, given one; in their order."""
        timers = [one for one in self._timers(record) if one[1].kind == kind and of in ("", one[1].of)]
        if timers and record.kind == "workflow":
            log = read_log(self._journal, self._signer, record)
            standing = requests_of(row for _, _, row in log)
            timers = [one for one in timers if one[0][1] in standing]
        if not timers:
            return []
        came, now = self._came(record), self._shared.clock.now()
        prefix = rec.decided_prefix(record.id)
        rows = self._journal.scan(prefix)
        decided = {key[len(prefix) :]: unpack(self._signer, key, row, Decided) for key, row in rows}
        paths = {sequence: step.path for sequence, step in self._with_paths(record)}
        run = self._ownership.active.get(record.id)
        paths_here = {wait.id: wait.path for wait in run.waits} if run is not None else {}
        given_up = run.given_up if run is not None else ()
        found = []
        for sequence, timer, wait_id in sorted(timers, key=itemgetter(0)):
            left = decide_sleep(timer, now)
            is_open = isinstance(left, Wait) and not any(wait_id in gone for gone in (came, decided, given_up))
            until_s = now.wall_s + left.seconds if isinstance(left, Wait) else timer.since.wall_s + timer.duration_s
            path = paths_here.get(wait_id) or paths.get(sequence, timer.name)
            found.append(Waiting(wait_id, path, timer, until_s, decided.get(wait_id), is_open))
        return found

    def _came(self, record: RunRecord) -> set[str]:
        """The waits of the run that something has come for, or that have timed out."""
        if record.kind == "cell":
            prefix = rec.arrived_prefix(record.id)
            return {key[len(prefix) :] for key, _ in self._journal.sizes(prefix)}
        rows = self._journal.scan(rec.log_prefixes(record.scope, record.generation)[2])
        events = [unpack(self._signer, key, row, Event) for key, row in rows]
        return {rec.wait_of_request(record.generation, event.request) for event in events if event.what == "arrived"}

    def summary(self, record: RunRecord, lease: Lease | None, steps: tuple[Step, ...] = ()) -> Snapshot:
        return self._summary(record, self.status(record, lease), steps)

    def _summary(self, record: RunRecord, status: Status, steps: tuple[Step, ...] = ()) -> Snapshot:
        now = self._shared.clock.now()
        left_s = due_in_s(record, now) if record.status == Status.RUNNING else 0.0
        waits_for = f"limit {record.limit!r}" if record.limit and status is Status.PENDING and left_s <= 0 else None
        of = record.id, record.name, status, record.started_at, record.ended_at
        return Snapshot(*of, steps, record.labels, record.error or None, waits_for, now.wall_s + left_s if left_s > 0 else None)

    def status(self, record: RunRecord, lease: Lease | None, scan: Scan | None = None) -> Status:
        """How a run stands, given its record and its lease. `scan`: what reads rows, for one of many."""
        run = self._ownership.active.get(record.id)
        if run is not None:
            return run.standing()
        if self._is_started(record.id):
            return Status.PENDING
        if record.status != Status.RUNNING:
            return Status(record.status)
        if not self.is_owned(record.id, lease):
            return Status.INTERRUPTED
        if due_in_s(record, self._shared.clock.now()) > 0:
            return Status.PENDING
        if record.limit and lease is not None and self._shared.limits.is_waiting(record, lease.owner):
            return Status.PENDING
        return standing(step.status for _, _, step in self._waits(record, scan))

    def said(self, record: RunRecord, lease: Lease | None) -> str:
        """The same for a message, with the process that executes it."""
        return f"{self.status(record, lease)}{self.executor(lease)}"

    def executor(self, lease: Lease | None) -> str:
        """Which process that is: ' in process 1234'; '' where none does."""
        process = self._shared.store.process
        if lease is None or not process.is_alive(lease.owner):
            return ""
        return " in this process" if lease.owner == process.id else f" in process {lease.owner.partition('-')[0]}"

    def is_owned(self, run_id: str, lease: Lease | None) -> bool:
        """Does a live process, this one or another, execute the run?"""
        return self._is_started(run_id) or self._ownership.is_owned(run_id, lease)

    def _heeding(self, record: RunRecord, inbox: list[Received]) -> RunRecord:
        """The run as it is wanted, where nobody executes it: cancelled; or unfinished, since it is to begin anew."""
        match wish(record, inbox):
            case Cancel(reason):
                return replace(record, status=Status.CANCELLED.value, error=str(cancelled(record.id, reason)))
            case Restart():
                return replace(record, status=Status.RUNNING.value, ended_at=None, error="")
        return record

    def _last_of_cell(self, name: str) -> tuple[RunRecord, Lease | None] | None:
        key = rec.generation_key(rec.scope_of(name))
        row = self._journal.get(key)
        return self.seen(unpack(self._signer, key, row, Generation).last_run) if row else None

    def request_of(self, record: RunRecord, path: str) -> int:
        """The number of the request at that path of a workflow's run; of those of that name, the first. StepNotFoundError."""
        paths, known = Paths(), list[str]()
        found = [(number, step.name, paths.take("", step.name, item)) for number, item, step in self._logged(record)]
        for wanted in (2, 1):  # a path before a name
            for request in found:
                if request[wanted] == path:
                    return request[0]
        known = [place for _, _, place in found]
        listed = (
            f"it has {', '.join(map(repr, known[:20]))}" + (" and others" if len(known) > 20 else "")
            if known
            else "it has none"
        )
        raise StepNotFoundError(
            f"the run {record.id!r} of workflow {record.name!r} has no step {path!r}; {listed}. Nothing was started"
        )

    # -- steps, from the records alone: of a run that is not executed here -------------------------------------------------

    def _steps(self, record: RunRecord) -> tuple[Step, ...]:
        rows = self._journal.scan(rec.progress_prefix(record.id))
        reported = {found.path: found for found in (unpack(self._signer, *row, Checkpoint) for row in rows)}
        return tuple(_with_progress(step, reported.get(step.path)) for _, step in self._with_paths(record))

    def _with_paths(self, record: RunRecord) -> list[tuple[Any, Step]]:
        """The steps, each with when it was asked for."""
        found = self._logged(record) if record.kind == "workflow" else self._of_cell(record)
        paths = Paths()
        return [
            (sequence if record.kind == "cell" else (0, sequence), replace(step, path=paths.take(step.path, step.name, item)))
            for sequence, item, step in sorted(found, key=itemgetter(0))
        ]

    def _logged(self, record: RunRecord) -> list[tuple[int, int, Step]]:
        """What a workflow's run has asked for, and how it ended: by the request's number, each with its item's."""
        rows = [row for _, _, row in read_log(self._journal, self._signer, record)]
        requests, ends = ends_of(rows)
        waits = {number[1]: step for number, _, step in self._waits(record)}
        retrying = open_attempts(rows) if record.status == Status.RUNNING else set[int]()
        steps = []
        for asked in (one for one in requests if one.kind not in (TIMER, "result") and one.value is None):
            end = ends.get(asked.id)
            of = asked.name, "", asked.kind
            child = self.child_of(record, asked) if asked.kind == "invoke" else None
            if isinstance(end, Outcome):
                step = ended_step(Step(*of, Status.RUNNING), end, restored=False)
                if end.is_attempt and asked.id not in retrying:
                    step = replace(step, status=Status.FAILED)
            elif isinstance(end, Event):
                status = Status.FAILED if end.failed else Status.CANCELLED if end.what == "dropped" else Status.COMPLETED
                began = asked.timer.since.wall_s if asked.timer else end.wall_s
                step = Step(*of, status, 0, began, end.wall_s, error=end.error or None)
            else:
                step = waits.get(asked.id) or Step(*of, Status.RUNNING if asked.timer is None else Status.PENDING)
                if record.status != Status.RUNNING:
                    step = replace(step, status=Status.INTERRUPTED)
            steps.append((asked.id, asked.item, step if child is None else replace(step, child=child)))
        return steps

    def _of_cell(self, record: RunRecord) -> list[tuple[Sequence, int, Step]]:
        """What a cell's run did itself."""
        found = self._waits(record)
        for key, row in self._journal.scan(rec.step_prefix(record.scope, record.generation)):
            o = unpack(self._signer, key, row, Outcome)
            if o.run_id == record.id:
                child = digest_of(self._shared.store.id, key) if o.kind == "invoke" else None
                step = ended_step(Step(o.name, o.branch, o.kind, Status.RUNNING, child=child), o, restored=False)
                found.append((o.sequences[0], o.item, step))
        return found

    def _waits(self, record: RunRecord, scan: Scan | None = None) -> list[tuple[Sequence, int, Step]]:
        """The waits, and the steps that have failed and are to be tried again: when asked for (a cell's by its sequence, a
        workflow's by the request's number), and with a branch as path."""  # fmt: skip
        now = self._shared.clock.now()
        found: list[tuple[Sequence, int, Step]] = []
        scan = scan or self._journal.scan
        timers = list(self._timers(record, scan))
        came = self._came(record) if any(timer.kind != "sleep" for _, timer, _ in timers) else set()
        for sequence, t, wait_id in timers:
            began, left = t.since.wall_s, decide_sleep(t, now)
            of = t.name, t.branch, t.kind
            prompt = t.of if t.kind == "decision" else ""
            if isinstance(left, Wait) and record.status != Status.COMPLETED and wait_id not in came:
                status = Status.SLEEPING if t.kind == "sleep" else Status.WAITING
                step = Step(*of, status, 0, began, wake_at=now.wall_s + left.seconds, prompt=prompt)
            elif record.kind == "workflow":
                continue
            else:
                until = t.until_s if t.until_s is not None else began + t.duration_s
                step = Step(*of, Status.COMPLETED, 0, began, min(until, now.wall_s), prompt=prompt)
            found.append((sequence, -1, step))
        for key, row in scan(rec.attempts_prefix(record.scope, record.generation)):
            a = unpack(self._signer, key, row, Attempts)
            if a.run_id == record.id:
                wake_at = now.wall_s + remaining_s(a.since, a.delay_s, now)
                status = Status.RUNNING if a.begun else Status.RETRYING
                of, more = (a.name, a.branch, a.kind), (wake_at, Preview(a.arguments))
                step = Step(*of, status, a.failed, a.started_at, None, False, a.error or None, *more)
                sequence = (0, int(key.rpartition("/")[2])) if record.kind == "workflow" else a.sequence
                found.append((sequence, a.item, step))
        return found

    def _timers(self, record: RunRecord, scan: Scan | None = None) -> Iterator[tuple[Sequence, Timer, str]]:
        """The waits of a run, each with when it was asked for and what keys call it."""
        scan = scan or self._journal.scan
        if record.kind == "workflow":
            for key, row in scan(rec.log_prefixes(record.scope, record.generation)[1]):
                for asked in unpack(self._signer, key, row, Event).asked:
                    if asked.timer is not None:
                        yield (0, asked.id), asked.timer, rec.wait_of_request(record.generation, asked.id)
        else:
            prefix = rec.timer_prefix(record.id)
            for key, row in scan(prefix):
                timer = unpack(self._signer, key, row, Timer)
                yield timer.sequence, timer, key[len(prefix) :]


def _newest_first(record: RunRecord) -> tuple[float, str]:
    """Sorts runs; those that began at the same moment by their ids."""
    return -record.started_at, record.id


def _with_progress(step: Step, found: Checkpoint | None) -> Step:
    if found is None or step.ended_at is not None:
        return step
    return replace(step, progress=Progress(found.done, found.total, found.note))
