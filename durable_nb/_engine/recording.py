"""What a cell's run writes down: what its steps have come to, and what its code got in passing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from msgspec import structs

from durable_nb import _codec, _usage
from durable_nb import _records as rec
from durable_nb._codec import digest_of
from durable_nb._current import SendRequest, StepRequest
from durable_nb._engine.by_content import ByContent
from durable_nb._engine.execution import Execution
from durable_nb._engine.in_place import Changed, Inputs, described, provenance_of, sent
from durable_nb._engine.performer import Ended, StepCall
from durable_nb._engine.run_log import CellRecords, say
from durable_nb._facts import Status
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Again, Attempts, Outcome, Passing, StepKey
from durable_nb._usage import Usage
from durable_nb.errors import CorruptStoreError, UnserializableError


class Recording:
    """Of one execution of a cell: its records, as they are on disk and as it adds to them."""

    identity: ByContent
    """Once the records are loaded."""

    def __init__(self, execution: Execution, give_way: Callable[[], BaseException]) -> None:
        """`give_way` ends an execution whose run is another process's; what it returns is raised."""
        self._execution, self._give_way = execution, give_way
        self._shared, self._log = execution.shared, execution.log
        self.records = CellRecords(execution.log)
        self.used: Usage = {}
        """What models' answers cost that the steps were given, in this execution or an earlier one."""
        self._unrecorded: list[tuple[str, bytes]] = []
        """Rows of what the code got in passing, which ride with the next commit."""

    async def load(self, *, resumed: bool, reads: Mapping[str, str]) -> None:
        """Read what was recorded. `reads`: what the cell reads now, by component."""
        record, performer = self._execution.record, self._execution.performer
        self._shared.records[record.id].add(self.records)  # first: a body that ends meanwhile adds to them
        await self.records.load()
        self.identity = ByContent(
            self.records,
            record.scope,
            record.generation,
            record.id,
            holds=lambda outcome: performer.host.holds(outcome.seen),
            now_s=self._execution.now_s,
            changed_before=self._shared.changed[record.scope] if resumed else (),
            reads=reads,
        )
        self._execution.arrivals.know(self.records.taken())

    async def forget(self, name: str) -> None:
        """From now on, the steps of that name have identities and idempotency keys of their own."""
        record, log, again = self._execution.record, self._log, self.records.again
        again[name] = again.get(name, 0) + 1
        key = rec.again_prefix(record.scope, record.generation) + digest_of(name)
        marked = log.pack(rec.run_key(record.id), replace(record, rerun_step=name))
        await self.commit(puts=(log.pack(key, Again(name, again[name])), marked))

    async def commit(self, *, puts: Iterable[tuple[str, bytes]] = (), deletes: tuple[str, ...] = ()) -> None:
        """Write these rows, and what was got in passing."""
        if await self._log.commit(puts=(*self._riding(), *puts), deletes=deletes) is not Verdict.APPLIED:
            raise self._give_way()

    def handed_over(self, *, inserts: tuple[tuple[str, bytes], ...], deletes: tuple[str, ...] = ()) -> asyncio.Future[Verdict]:
        """The same with rows that are new, without waiting for the disk."""
        return self._log.commit(inserts=inserts, puts=self._riding(), deletes=deletes)

    # -- in passing ----------------------------------------------------------------------------------------------------

    def got(self, key: str, passing: Passing) -> None:
        """The code got that: it is on disk before anything begins that may depend on it."""
        self._unrecorded.append(self._log.pack(key, passing))

    async def flush(self) -> None:
        """What was got in passing is on disk: killed now and executed again, the code gets the same."""
        if self._unrecorded:
            await self.commit()

    def hand_over(self) -> None:
        """What was got in passing is handed over, before the commit that follows: of both, that is not there alone."""
        if self._unrecorded:
            self._log.commit(puts=self._riding())

    def _riding(self) -> tuple[tuple[str, bytes], ...]:
        rows, self._unrecorded = tuple(self._unrecorded), []
        return rows

    # -- what plain calls ask for -----------------------------------------------------------------------------------------

    def send(self, request: SendRequest, branch: str) -> tuple[Outcome, bool]:
        """Send an event, once in all executions until the cell completes: it goes in the commit of its outcome. Was it sent
        before?"""
        events = self._shared.events
        letters = []

        def write() -> tuple[list[str], tuple[str, bytes]]:
            letters.append(events.letter(request))
            return list(letters[-1].run_ids), letters[-1].row

        # Of the open attempt, as waits are: executed with other inputs next week, the cell sends it again.
        of = digest_of(self._execution.record.id, sent(request))
        outcome, was_sent = self._at_once("notify", request.event_id, of, branch, write)
        if not was_sent:
            events.tell(letters[-1])
        return outcome, was_sent

    def answer(self, prompt: str, ask: Callable[[], str], branch: str) -> tuple[Outcome, bool]:
        """The answer to a question, which is asked for once in all executions. Was it given before?"""
        return self._at_once("input", rec.plain(prompt).strip() or "input", prompt, branch, lambda: (ask(), None))

    def _at_once(
        self, kind: str, name: str, of: str, branch: str, make: Callable[[], tuple[Any, tuple[str, bytes] | None]]
    ) -> tuple[Outcome, bool]:
        """The outcome of what is done now, unless it was before, and recorded when this returns. `make` gives its value, and a
        row that goes in the same commit. Known by `of`, as a step is by its arguments."""  # fmt: skip
        store, held, now_s = self._shared.store, self._execution.held, self._execution.now_s
        asked = StepRequest(kind, name, _nothing, described=(kind, of))
        key, found = self.identity.step(asked, branch)
        while (recorded := self.records.outcome(key.outcome)) is None:
            began, sequence = now_s(), held.next_sequence()
            try:
                value, more = make()
            except BaseException:
                self.identity.give_back(key)
                raise
            form, data = _codec.encode(value)
            run_id, ended = self._execution.record.id, held.next_sequence()
            of_it = kind, name, branch, run_id, form, data, 1, began, now_s(), provenance_of(Inputs(asked, found))
            row = self._log.pack(key.outcome, Outcome(*of_it, sequences=(sequence, ended)))
            riding = self._riding()
            inserts = (row,) if more is None else (row, more)
            verdict = store.writer.commit_and_wait(Commit(held.guard, inserts=inserts, puts=riding))
            if verdict is Verdict.GUARD_FAILED:
                raise self._give_way()
            if verdict is Verdict.EXISTS:  # an execution with other inputs was faster: its outcome stands
                self._unrecorded = [*riding, *self._unrecorded]
                row = key.outcome, store.journal.get(key.outcome) or b""
            for records in self._shared.records[run_id]:
                records.outcomes[key.outcome] = row[1]
            if verdict is Verdict.APPLIED:
                return self._recorded(key), False
        return recorded, True

    def _recorded(self, key: StepKey) -> Outcome:
        outcome = self.records.outcome(key.outcome)
        assert outcome is not None  # noqa: S101  it was put there just now
        return outcome

    # -- steps ---------------------------------------------------------------------------------------------------------

    async def look(self, key: StepKey) -> None:
        """Another execution of the cell may have recorded it."""
        row = await self._log.read_row(key.outcome)
        if row is not None:
            self.records.outcomes[key.outcome] = row

    async def note(self, key: StepKey, failures: Attempts) -> None:
        """Attempts of the step have failed, and it goes on."""
        row = self._log.pack(key.attempts, failures)
        await self.commit(puts=(row,))
        self._learn_attempts(key, row[1])

    async def failed(self, key: StepKey, call: StepCall, ended: Ended) -> BaseException:
        """What a step raises that has failed. It is not kept: the next execution tries anew."""
        error = ended.error
        try:
            if error is None or isinstance(error, asyncio.CancelledError):
                return asyncio.CancelledError()
            now_s = self._execution.now_s()
            self._execution.facts.update(call.path, status=Status.FAILED, error=say(error), ended_at=now_s)
            if call.request.goes_on_after is not None:
                self.identity.give_back(key)
            if key.attempts in self.records.attempts:
                await self.commit(deletes=(key.attempts,))
                self._learn_attempts(key, None)
            return error
        finally:
            call.leave()

    async def ended(self, key: StepKey, call: StepCall, ended: Ended) -> Outcome | None:
        """Write down what a step's body has returned; None where another execution was faster, whose outcome stands."""
        try:
            return await self._written(key, call, ended)
        except UnserializableError as unserializable:
            raise await self.failed(key, call, replace(ended, error=unserializable)) from None
        finally:
            call.leave()

    async def _written(self, key: StepKey, call: StepCall, ended: Ended) -> Outcome | None:
        after = ended.inputs.after()
        outcome = await self._execution.performer.outcome_of(call, ended, after)
        # What can't be stored has raised by now: nothing is settled that will not be on disk.
        settled = self.identity.settle(key, ended.inputs, after)
        if settled.own:
            outcome = structs.replace(outcome, changes=tuple(sorted({*outcome.changes, *map(described, settled.own)})))
        more: tuple[tuple[str, bytes], ...] = ()
        if settled.excluded is not None:
            names = ", ".join(sorted(map(described, settled.own)))
            advice = f"step {call.request.name!r} changes {names}: restoring the step won't, and {names} is not compared"
            self._execution.observers.advise(advice)
            record, of = self._execution.record, (settled.excluded.kind, settled.excluded.name)
            excluded_key = rec.excluded_prefix(record.scope, record.generation) + digest_of(*of)
            more = (self._log.pack(excluded_key, settled.excluded),)
        row = self._log.pack(settled.key.outcome, outcome)
        stale = (*((key.attempts,) if key.attempts in self.records.attempts else ()), *call.progress_rows)
        riding = self._riding()
        verdict = await self._log.commit(inserts=(row,), puts=(*riding, *more), deletes=stale)
        if verdict is Verdict.GUARD_FAILED:
            raise self._give_way()
        if verdict is Verdict.EXISTS:  # a run of the same cell with other inputs was faster: its outcome stands
            self._unrecorded = [*riding, *self._unrecorded]  # nothing of that commit was written
            await self.look(settled.key)
            if settled.key.outcome not in self.records.outcomes:
                raise CorruptStoreError(f"the record {settled.key.outcome!r} disappeared while it was read")
            return None
        _usage.add(self.used, outcome.usage)
        for records in self._shared.records[self._execution.record.id]:
            records.outcomes[settled.key.outcome] = row[1]
            records.attempts.pop(key.attempts, None)
        self.note_changes(ended.inputs, settled.key, after)
        return outcome

    def note_changes(self, inputs: Inputs, key: StepKey, after: dict[str, str]) -> None:
        """A step has changed what it was given: executed again in this kernel, it is known by how it left that."""
        if given := inputs.given(after):
            self._shared.changed[self._execution.record.scope].append(Changed(inputs, key, given, after))

    def _learn_attempts(self, key: StepKey, row: bytes | None) -> None:
        for records in self._shared.records[self._execution.record.id]:
            if row is None:
                records.attempts.pop(key.attempts, None)
            else:
                records.attempts[key.attempts] = row


def _nothing() -> None:
    """What an event does here."""
