"""Events and decisions on their way to runs: sending them, and telling who waits for them.

An event for one run is a row of its inbox; one for whoever waits, or will, is a row of the store, which each run that is old
enough reads once. A decision is a row of the inbox too, beside one that only the first who decides can write.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from durable_nb import _records as rec
from durable_nb._current import SendRequest
from durable_nb._engine.catalog import Catalog, Waiting
from durable_nb._engine.run_log import BLOB_BYTES
from durable_nb._events import Waiter
from durable_nb._facts import Status
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Answer, Decided, Message, Notification, RunRecord, pack
from durable_nb.errors import DurableError, StepNotFoundError

if TYPE_CHECKING:
    from durable_nb._engine.shared import Shared


@dataclass(frozen=True, slots=True)
class Letter:
    """An event that is about to be sent."""

    row: tuple[str, bytes]
    """To be inserted."""
    guard: tuple[str, bytes] | None
    """While this row holds these bytes: of a run that has ended nobody would take the event."""
    event_id: str
    to: str
    """The run that it is for; '' for everybody."""
    run_ids: tuple[str, ...]
    """The runs that wait for it now."""


class Events:
    """Of one store. Calls may come from any thread."""

    def __init__(self, shared: Shared, catalog: Catalog) -> None:
        self._shared, self._catalog = shared, catalog
        self._journal, self._writer, self._signer = shared.store.journal, shared.store.writer, shared.store.signer
        self._sent_at = 0.0
        self._last: dict[str, int] = {}
        """By prefix: the highest number that was given to a row here. Rows that are not on disk yet have theirs already."""

    def send(self, request: SendRequest, *, once: str = "") -> tuple[str, ...]:
        """Send an event; the runs that waited for it. It is on disk when this returns. `once`: sent to that run under this name
        before, it is not sent again."""  # fmt: skip
        while True:
            letter = self.letter(request)
            rows = [letter.row]
            if once:
                key = rec.once_key(letter.to, once)
                rows.append((key, self._signer.sign(key, b"")))
            verdict = self._writer.commit_and_wait(Commit(letter.guard, inserts=tuple(rows)))
            if verdict is Verdict.APPLIED:
                self.tell(letter)
            if verdict is Verdict.APPLIED or (once and verdict is Verdict.EXISTS):
                return letter.run_ids

    def letter(self, request: SendRequest) -> Letter:
        """The row that an event is. RunNotFoundError, and DurableError of a run that has ended."""
        value, blob = request.packed, ""
        if len(value) >= BLOB_BYTES:
            value, blob = b"", self._journal.put_blob(value)
        # Later than the one before, whatever the clock says: runs merge the events of their inbox with everybody's.
        self._sent_at = max(self._shared.clock.now().wall_s, math.nextafter(self._sent_at, math.inf))
        message = Notification(request.event_id, request.form, value, blob, self._sent_at)
        if request.run_id is None:
            waiting = tuple(dict.fromkeys(waiter.run_id for waiter in self.waiters(request.event_id)))
            row = self._row(rec.event_prefix(request.event_id), message)
            return Letter(row, None, request.event_id, "", waiting)
        record, guard = self._unfinished(request.run_id, f"the event {request.event_id!r} was not sent")
        waits = any(wait.timer.of == request.event_id for wait in self._catalog.waits(record, "event") if wait.is_open)
        row = self._row(rec.inbox_prefix(record.id), message)
        return Letter(row, guard, request.event_id, record.id, (record.id,) if waits else ())

    def tell(self, letter: Letter) -> None:
        """It is on disk: runs that this process executes hear of it at once. Others look for themselves."""
        ownership = self._shared.ownership
        for run in list(ownership.active.values()):
            if run.id == letter.to:
                run.hear_soon(ownership.inbox.of(run.id))
            elif not letter.to and letter.event_id in run.event_ids:
                run.hear_soon(ownership.inbox.events({letter.event_id}))

    def waiters(self, event_id: str) -> list[Waiter]:
        """The open waits for that event, the first asked first."""
        found = [
            Waiter(record.id, wait.path, wait.timer.since.wall_s, wait.until_s)
            for record in self._catalog.unfinished()
            for wait in self._catalog.waits(record, "event", event_id)
            if wait.is_open
        ]
        return sorted(found, key=lambda waiter: waiter.since)

    def decide(self, run_id: str, step: str, *, approved: bool, comment: str, by: str) -> None:
        """As `_current.Engine.decide` has it."""
        run_id, step = self._catalog.place_of(run_id, step)
        while True:
            record, guard = self._unfinished(run_id, f"nothing was decided of {step!r}")
            wait = self._asked_for(record, step)
            now_s = self._shared.clock.now().wall_s
            key = rec.decided_key(record.id, wait.id)
            decided = key, pack(self._signer, key, Decided(approved, by, now_s, comment))
            row = self._row(rec.inbox_prefix(record.id), Answer(wait.id, now_s))
            if self._writer.commit_and_wait(Commit(guard, inserts=(decided, row))) is Verdict.APPLIED:
                run = self._shared.ownership.active.get(record.id)
                if run is not None:
                    run.hear_soon(self._shared.ownership.inbox.of(record.id))
                return  # else it was decided, or has timed out, or the run has changed hands or ended, in this very moment

    def _asked_for(self, record: RunRecord, step: str) -> Waiting:
        """The approval that is meant, of those of the run."""
        asked = self._catalog.waits(record, "decision")
        waiting = [wait for wait in asked if wait.is_open]
        # The first of a name has the bare name as its path; where others of the name wait too, it is meant by `NAME#1`.
        named = [wait for wait in asked if wait.timer.name == step]
        meant = named or [wait for wait in asked if step in (wait.path, f"{wait.path}#1")]
        of = f"{record.kind} {record.name!r}" if record.kind == "cell" else f"run {record.id!r}"
        if not meant:
            known = f"; these wait: {_listed(waiting)}" if waiting else "; no approval waits in it"
            raise StepNotFoundError(f"{of} has asked for no approval {step!r}, so nothing was decided{known}")
        open_ones = [wait for wait in meant if wait.is_open]
        if len(open_ones) > 1:
            raise StepNotFoundError(
                f"several approvals of {of} named {step!r} wait, so nothing was decided: name one of "
                + _listed(open_ones, among_equals=True)
            )
        if open_ones:
            return open_ones[0]
        last = meant[-1]
        if last.decided is not None and last.decided.given_up:
            at_s, what = last.decided.at_s, "was given up by the code"
        elif last.decided is None or last.decided.timed_out:
            at_s, what = last.until_s, "timed out"
        else:
            at_s, what = last.decided.at_s, "was approved" if last.decided.approved else "was rejected"
            what += f" by {last.decided.by}" if last.decided.by else ""
        at = datetime.fromtimestamp(at_s).astimezone()
        raise DurableError(
            f"the approval {last.path!r} of {of} {what}, {at:%a %d %b %H:%M:%S}; that stands, and nothing was decided now"
        )

    def _unfinished(self, run_id: str, otherwise: str) -> tuple[RunRecord, tuple[str, bytes]]:
        """A run that takes what is sent to it, and what a commit that sends it is conditional on."""
        record, _ = self._catalog.find(run_id)
        key = rec.run_key(record.id)
        row = self._journal.get(key)
        record, lease = self._catalog.find(record.id)  # read after the row: what has changed meanwhile makes the commit fail
        status = self._catalog.status(record, lease)
        is_over = status in (Status.COMPLETED, Status.CANCELLED) or (status is Status.FAILED and record.kind != "cell")
        if row is None or is_over:  # the attempt of a cell that has failed goes on when the cell is run again
            hint = f" Resume it first, with durable.get_run({run_id!r}).resume()" if status is Status.FAILED else ""
            raise DurableError(f"the run {run_id!r} is {status}: nothing waits in it, and {otherwise}.{hint}")
        return record, (key, row)

    def _row(self, prefix: str, message: Message) -> tuple[str, bytes]:
        # The next number, and something of its own: the row may be part of a larger commit, which another sender that took the
        # same number must not make fail.
        keys = [key for key, _ in self._journal.sizes(prefix)]
        highest = max((rec.seq_of(key) for key in keys), default=0)
        seq = self._last[prefix] = max(highest, self._last.get(prefix, 0)) + 1
        key = f"{prefix}{seq:06}.{secrets.token_hex(4)}"
        return key, pack(self._signer, key, message)


def _listed(waits: list[Waiting], *, among_equals: bool = False) -> str:
    paths = [f"{wait.path}#1" if among_equals and wait.path == wait.timer.name else wait.path for wait in waits]
    return ", ".join(f"{path!r} ({wait.timer.of})" for path, wait in zip(paths, waits, strict=True))
