"""Schedules: workflows that begin by the clock, in whichever process runs and defines them.

A due time is one run: its id says schedule and time, so that processes that fire it at the same moment start one run. The row
of the schedule moves on after the run is on disk; killed between the two, the next process finds the run and moves it on.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from contextvars import Context
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol

from durable_nb import _codec, _cron
from durable_nb import _records as rec
from durable_nb._clock import RECHECK_S
from durable_nb._current import ScheduleRequest, StartRequest, limit_of, workflow_functions
from durable_nb._engine.engine import Engine
from durable_nb._engine.observing import log
from durable_nb._engine.ownership import WATCH_S
from durable_nb._engine.run_log import BLOB_BYTES
from durable_nb._facts import ScheduleFacts, Status
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Schedule, pack, unpack
from durable_nb.errors import DurableError, RunNotFoundError, StoreError, UnserializableError

_AT_ONCE = 50
"""So many due times of a schedule are fired in one look; the rest in the next."""


class Starter(Protocol):
    """What starts runs."""

    engine: Engine

    def start(self, request: StartRequest) -> str: ...
    def status_of(self, run_id: str) -> Status: ...
    def home_of(self, function: Any) -> str: ...


class Schedules:
    """All of one store. `watch` fires those whose workflow is defined here."""

    def __init__(self, workflows: Starter) -> None:
        self._workflows = workflows
        self._store, self._clock = workflows.engine.store, workflows.engine.clock
        self.watching: asyncio.Task[None] | None = None
        self._looked_s: float | None = None
        """When this process has looked last. What was due before it began to look, and was not fired, was missed."""

    # -- changing ------------------------------------------------------------------------------------------------------

    def put(self, request: ScheduleRequest) -> None:
        """Make a schedule, or replace the one of that name: what it has fired, and whether it is paused, stay."""
        function = workflow_functions.get(request.workflow)
        now_s = self._clock.now().wall_s
        form, value = _encoded(request)
        new = Schedule(
            *(request.name, request.workflow, request.cron, request.tz, form, value, request.labels, request.catch_up),
            skips=request.overlap == "skip",
            home=self._workflows.home_of(function),
            settled_s=now_s,
        )

        def replaced(old: Schedule | None) -> Schedule:
            if old is None:
                return new
            # Other times are due from now on: what they would have been before was never promised.
            settled_s = old.settled_s if (old.cron, old.tz) == (new.cron, new.tz) else now_s
            return replace(new, settled_s=settled_s, last_run=old.last_run, is_paused=old.is_paused)

        self._change(request.name, replaced)
        self.watch()

    def pause(self, name: str, *, paused: bool) -> None:
        """Fire no due time until it is resumed; those in between are dropped."""
        now_s = self._clock.now().wall_s

        def change(old: Schedule | None) -> Schedule:
            found = _there(name, old)
            return found if found.is_paused == paused else replace(found, is_paused=paused, settled_s=now_s)

        self._change(name, change)

    def trigger(self, name: str) -> str:
        """Start a run of it now, whatever its due times are; the run's id."""
        row = self._store.journal.get(rec.schedule_key(name))
        schedule = _there(name, self._read(name, row) if row else None)
        moment = datetime.fromtimestamp(self._clock.now().wall_s).astimezone()
        return self._start(schedule, f"{name}@{moment.isoformat(timespec='microseconds')}")

    def delete(self, name: str) -> None:
        """Forget it. The runs that it has started stay."""
        key = rec.schedule_key(name)
        while True:
            row = self._store.journal.get(key)
            _there(name, self._read(name, row) if row else None)
            if self._store.writer.commit_and_wait(Commit((key, row), deletes=(key,))) is Verdict.APPLIED:
                return

    def all(self) -> list[ScheduleFacts]:
        """Those there are, by name."""
        found = []
        for schedule in self._scan():
            due = None if schedule.is_paused else next(_cron.after(schedule.cron, schedule.tz, self._clock.now().wall_s), None)
            of = schedule.name, schedule.workflow, schedule.cron, schedule.tz, schedule.is_paused
            found.append(ScheduleFacts(*of, due.timestamp() if due else None, schedule.last_run))
        return found

    def _change(self, name: str, change: Any) -> None:
        key = rec.schedule_key(name)
        while True:
            row = self._store.journal.get(key)
            changed = change(self._read(name, row) if row else None)
            put = key, pack(self._store.signer, key, changed)
            if self._store.writer.commit_and_wait(Commit((key, row), puts=(put,))) is Verdict.APPLIED:
                return

    def _read(self, name: str, row: bytes) -> Schedule:
        return unpack(self._store.signer, rec.schedule_key(name), row, Schedule)

    def _scan(self) -> Iterator[Schedule]:
        for key, row in self._store.journal.scan(rec.schedule_key("")):
            with contextlib.suppress(StoreError):  # one that can't be read is told of by `doctor`, and stops no other
                yield unpack(self._store.signer, key, row, Schedule)

    # -- firing --------------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Fire what is due, for as long as this process has the store open. Needs the loop that executes runs."""
        with contextlib.suppress(RuntimeError):  # a program without a loop makes schedules for others
            loop = asyncio.get_running_loop()
            if self.watching is None or self.watching.done() or self.watching.get_loop() is not loop:
                self.watching = loop.create_task(self._watch_on(), context=Context(), name="durable_nb schedules")

    def retire(self) -> None:
        """Fire nothing any more."""
        if self.watching is not None:
            self.watching.cancel()

    async def _watch_on(self) -> None:
        while not self._store.writer.closed:
            pause_s = WATCH_S
            with contextlib.suppress(StoreError):  # a full disk, say: tried again
                schedules = await self._store.writer.call(lambda: list(self._scan()))
                now_s = self._clock.now().wall_s
                looked_s, self._looked_s = self._looked_s, now_s
                if looked_s is None or now_s - looked_s > RECHECK_S:  # it has just begun, or was suspended
                    looked_s = now_s
                for schedule in schedules:
                    if self._is_ours(schedule):
                        self._fire(schedule, now_s, looked_s)
                        due = next(_cron.after(schedule.cron, schedule.tz, now_s), None)
                        if due is not None:
                            pause_s = min(pause_s, max(0.0, due.timestamp() - self._clock.now().wall_s))
            await asyncio.sleep(pause_s)

    def _is_ours(self, schedule: Schedule) -> bool:
        function = workflow_functions.get(schedule.workflow)
        return not schedule.is_paused and function is not None and self._workflows.home_of(function) == schedule.home

    def _fire(self, schedule: Schedule, now_s: float, missed_s: float) -> None:
        """Start a run for each due time up to now. Those up to `missed_s` were missed, and are caught up with as it says."""
        last_run, settled_s = schedule.last_run, schedule.settled_s
        for moment in _due(schedule, now_s, missed_s):
            settled_s = moment.timestamp()
            if schedule.skips and last_run and self._is_unfinished(last_run):
                continue
            last_run = f"{schedule.name}@{moment.isoformat()}"
            try:
                self._start(schedule, last_run)
            except StoreError:
                raise
            except DurableError as error:  # the id is used by something else, say: the next due time has another
                log.warning("the schedule %r could not start the run %r: %s", schedule.name, last_run, error)
        if settled_s > schedule.settled_s:
            key = rec.schedule_key(schedule.name)
            before, after = (
                pack(self._store.signer, key, one)
                for one in (schedule, replace(schedule, settled_s=settled_s, last_run=last_run))
            )
            self._store.writer.commit_and_wait(Commit((key, before), puts=((key, after),)))  # else another was faster

    def _is_unfinished(self, run_id: str) -> bool:
        try:
            return self._workflows.status_of(run_id) not in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)
        except RunNotFoundError:  # deleted
            return False

    def _start(self, schedule: Schedule, run_id: str) -> str:
        args, kwargs = _codec.decode(schedule.form, schedule.value)
        of = schedule.workflow, args, kwargs
        return self._workflows.start(StartRequest(*of, run_id, schedule.labels, "keep", *limit_of(*of)))


def _encoded(request: ScheduleRequest) -> tuple[str, bytes]:
    """Its arguments, as they lie in its row."""
    try:
        form, value = _codec.encode((request.args, request.kwargs))
    except Exception as error:
        raise UnserializableError(
            f"the schedule {request.name!r} can't be made with these arguments ({type(error).__name__}: {error}); nothing was "
            "recorded. Give it plain data"
        ) from error
    if len(value) >= BLOB_BYTES:
        raise UnserializableError(
            f"the arguments of the schedule {request.name!r} take {len(value)} bytes, and it is looked at twice a second; "
            "nothing was recorded. Give it the name of a file"
        )
    return form, value


def _due(schedule: Schedule, now_s: float, missed_s: float) -> list[datetime]:
    """The times that are to be fired, in order."""
    since_s, found = schedule.settled_s, list[datetime]()
    if since_s < missed_s and schedule.catch_up != "all":
        last = _cron.last_before(schedule.cron, schedule.tz, missed_s) if schedule.catch_up == "last" else None
        if last is not None and last.timestamp() > since_s:
            found.append(last)
        since_s = missed_s
    coming = itertools.takewhile(lambda due: due.timestamp() <= now_s, _cron.after(schedule.cron, schedule.tz, since_s))
    return [*found, *itertools.islice(coming, _AT_ONCE)]


def _there(name: str, found: Schedule | None) -> Schedule:
    if found is None:
        raise RunNotFoundError(f"no schedule {name!r} in this store; 'durable-nb schedule' lists those there are")
    return found
