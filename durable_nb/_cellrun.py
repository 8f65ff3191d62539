"""One execution of a durable cell. Its steps are identified by content: editing the cell is normal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING

from durable_nb import _fingerprint
from durable_nb import _records as rec
from durable_nb._current import SleepRequest, StepRequest
from durable_nb._facts import Status
from durable_nb._journal import Commit
from durable_nb._records import Again, Attempts, Loose, Outcome, RunRecord, StepKey, Timer, unpack
from durable_nb._replay import Occurrences
from durable_nb._request import Changed, Request, changed, changed_by_itself, fingerprint_of, fixed
from durable_nb._run import Ended, Held, Run, Work, digest_of
from durable_nb.errors import StepTimeout, StoreError

if TYPE_CHECKING:
    from durable_nb._engine import Engine
    from durable_nb._fingerprint import Fingerprint


class CellRun(Run):
    """What verbs ask, in a durable cell."""

    again = "run the cell again"
    shows_interrupts = True

    def __init__(self, engine: Engine, record: RunRecord, held: Held, *, resumed: bool) -> None:
        super().__init__(engine, record, held, resumed=resumed)
        self.what = f"cell {record.name!r}"
        self._occurrences = Occurrences({})
        self._sleeps = Occurrences({})
        self._counts: dict[str, int] = {}
        self._again: dict[str, int] = {}
        self._checked: set[str] = set()
        self._origins = {record.id}
        """Runs whose steps were met, and whose notebook is known therefore."""
        self._loose: dict[tuple[str, str], tuple[tuple[str, ...], ...]] = {}
        self._changed = list(engine.changed[record.scope]) if resumed else []
        self._taken: set[Changed] = set()
        self._earlier = [work for work in engine.works.values() if work.run_id == record.id]
        """Attempts that an execution began which was interrupted."""

    def _loaded(self, loose: dict[str, bytes], again: dict[str, bytes]) -> None:
        recorded: dict[str, set[int]] = {}
        for key in (*self._outcomes, *self._attempts):
            identity, number = key.rsplit("/", 2)[1:]
            recorded.setdefault(identity, set()).add(int(number))
        self._occurrences = Occurrences(recorded)
        sleeps: dict[str, set[int]] = {}
        for key, row in self._timers.items():
            name = unpack(self.engine.store.seal, key, row, Timer).name
            sleeps.setdefault(name, set()).add(int(key.rpartition("/")[2]))
        self._sleeps = Occurrences(sleeps)
        for key, row in loose.items():
            known = unpack(self.engine.store.seal, key, row, Loose)
            self._loose[known.kind, known.name] = known.left_out
        for key, row in again.items():
            asked = unpack(self.engine.store.seal, key, row, Again)
            self._again[asked.name] = asked.number

    async def forget_step(self, name: str) -> None:
        """Execute the steps of that name anew, under identities and idempotency keys of their own."""
        seal = self.engine.store.seal
        names = {unpack(seal, key, row, Outcome).name for key, row in self._outcomes.items()}
        names |= {unpack(seal, key, row, Attempts).name for key, row in self._attempts.items()}
        if name not in names:
            await (self.finish(Status.INTERRUPTED) if self.resumed else self._discard())
            known = f"; it has {', '.join(map(repr, sorted(names)))}" if names else ""
            raise LookupError(f"{self.what} has recorded no step {name!r}{known}")
        self._again[name] = self._again.get(name, 0) + 1
        key = rec.again_prefix(self.record.scope, self.record.generation) + digest_of(name)
        marked = self.engine.pack(rec.run_key(self.id), replace(self.record, rerun_step=name))
        await self._commit(Commit(self._held.guard, puts=(self.engine.pack(key, Again(name, self._again[name])), marked)))

    async def _discard(self) -> None:
        """Leave no trace of a run that was begun and has executed nothing."""
        own = (rec.run_key(self.id), rec.open_prefix(self.record.scope) + self.id, rec.lease_key(self.id))
        self.engine.held.pop(self.id, None)
        await self._commit(Commit(self._held.guard, deletes=own))

    def _place(self, request: StepRequest, branch: str) -> tuple[StepKey, Fingerprint | None]:
        found = fingerprint_of(request)
        again = self._asked_again(request, found)
        if again is not None:
            return again.key, found
        loose = self._loose.get((request.kind, request.name), ())
        forms = *found.earlier(), found  # what an earlier format of fingerprints recorded is not paid for again
        identities = [self._identity(request, form, labels) for form in forms for labels in (*reversed(loose), ())]
        for identity in identities:
            for n in tuple(self._occurrences.rivals(identity)):
                if not self._still_holds(self._key(identity, n), request.ttl_s):
                    self._occurrences.leave_out(identity, n)
        own = identities[-1 - len(loose)]
        identity = next((known for known in identities if self._occurrences.rivals(known)), own)
        rivals = self._occurrences.rivals(identity)
        branches = {n: self._branch_of(self._key(identity, n)) for n in rivals} if len(rivals) > 1 else None
        key = self._key(identity, self._occurrences.take(identity, branches, branch))
        self._tell_origin(key)
        return key, found

    def _tell_origin(self, key: StepKey) -> None:
        """Steps are shared by the notebooks of a folder; one line tells of it."""
        with contextlib.suppress(StoreError):  # whoever asks for the step is told
            outcome = self._recorded(key.outcome)
            if outcome is None or outcome.run_id in self._origins:
                return
            self._origins.add(outcome.run_id)
            found, mine = self.engine.read_run(outcome.run_id), self.record.origin.notebook
            theirs = found[0].origin.notebook if found else ""
            if mine and theirs and mine != theirs:
                self.stage.advise(f"steps come from {PurePath(theirs).name}, which has them in common")

    def _patience_s(self, asked: Request) -> float | None:
        return asked.request.timeout_s

    def _is_late(self, work: Work, late: StepTimeout) -> None:
        work.overdue = True
        work.tell(Ended(error=late))

    def _note(self, step: Changed) -> None:
        self.engine.changed[self.record.scope].append(step)

    def _renewed(self, asked: Request) -> Request:
        """Called and not awaited at once, it may get a list that another step or the cell's own code has appended to since."""
        if asked.found is None or asked.request.kind != "run" or fingerprint_of(asked.request).digest == asked.found.digest:
            return asked
        key, found = self._place(asked.request, asked.branch)
        return Request(key, asked.request, found, asked.branch, asked.fact.path)

    def _asked_again(self, request: StepRequest, found: Fingerprint) -> Changed | None:
        """The step, of those that this run has executed in this kernel, that has left what is given to it now as it is."""
        if found.lasting:
            return None
        for n, step in enumerate(self._changed):
            if step not in self._taken and step.is_asked_again(request, found, self._changed[n + 1 :]):
                self._taken.add(step)
                number = int(step.key.outcome.rpartition("/")[2])
                if number in self._occurrences.rivals(step.key.identity):
                    self._occurrences.leave_out(step.key.identity, number)
                return step
        return None

    def _is_changed_already(self, asked: Request) -> bool:
        return any(asked.key is step.key for step in self._taken)

    def _identity(self, request: StepRequest, found: Fingerprint, left_out: tuple[str, ...] = ()) -> str:
        """What a step is recorded under: kind, name and fingerprint, but for components that its body changes itself."""
        again = self._again.get(request.name)
        parts = (request.kind, request.name) if again is None else (request.kind, request.name, f"again {again}")
        if not left_out:
            return digest_of(*parts, found.digest)
        kept = {label: digest for label, digest in found.components.items() if label not in left_out}
        return digest_of(*parts, _fingerprint.in_format(found.format).digest_of(kept), *left_out)

    def _work_on(self, asked: Request) -> Work | None:
        found = super()._work_on(asked)
        if found is not None:
            return found
        for work in self._earlier:  # its body may have changed a global already that is part of the key
            if work.task.done() or work in self._works or fixed(work.asked) != fixed(asked):
                continue
            if changed(work.asked, asked.components) == changed_by_itself(work.asked, asked.components):
                return work
        return None

    def _settle(self, asked: Request, after: dict[str, str]) -> tuple[StepKey, tuple[tuple[str, bytes], ...], set[str]]:
        """Globals that the body changes itself are no input to compare: a list that it appends to, a counter that it raises.

        Arguments are compared all the same: two calls that differ in them only must not be mistaken for each other.
        """
        own = changed_by_itself(asked, after)
        place = asked.request.kind, asked.request.name
        known = self._loose.get(place, ())
        if not own or asked.found is None:
            return asked.key, (), own
        labels = tuple(sorted(own | {"aliases"} | set(known[-1] if known else ())))
        identity = self._identity(asked.request, asked.found, labels)
        if identity == asked.key.identity:
            return asked.key, (), own
        key = self._key(identity, self._occurrences.take(identity))
        if known and known[-1] == labels:
            return key, (), own
        self._loose[place] = (*known, labels)
        names = ", ".join(sorted(label.partition(" ")[2] for label in own))
        self.stage.advise(f"step {place[1]!r} changes {names}: restoring the step won't, and {names} is not compared")
        loose_key = rec.loose_prefix(self.record.scope, self.record.generation) + digest_of(*place)
        row = self.engine.pack(loose_key, Loose(*place, self._loose[place]))
        return key, (row,), own

    def _still_holds(self, key: StepKey, ttl_s: float | None) -> bool:
        """Not where a file that the step read has changed since, nor where it is as old as `ttl_s`."""
        if key.outcome in self._checked:
            return True
        self._checked.add(key.outcome)
        try:
            outcome = self._recorded(key.outcome)
        except StoreError:
            return True  # whoever asks for it is told
        if outcome is None:
            return True
        if ttl_s is not None and self._now_s() - outcome.ended_at >= ttl_s:
            return False
        return not outcome.seen or self.stage.holds(outcome.seen)

    def _branch_of(self, key: StepKey) -> str:
        outcome = self._recorded(key.outcome)
        return outcome.branch if outcome is not None else ""

    def _timer_key(self, request: SleepRequest, branch: str) -> str:
        """The sleep of this task that was recorded, else one of a task that isn't there any more (a helper was renamed), else
        a new one: of two tasks that sleep under one name, neither takes the other's beginning."""  # fmt: skip
        recorded = {n: self._sleeper(request.name, n) for n in self._sleeps.rivals(request.name)}
        own = [n for n, sleeper in recorded.items() if sleeper == branch]
        left = [n for n, sleeper in recorded.items() if not self._branch.has_made(sleeper)]
        n = next(iter((*own, *left)), None)
        if n is None:
            n = self._sleeps.new(request.name)
        else:
            self._sleeps.leave_out(request.name, n)
        return rec.timer_key(self.id, request.name, n)

    def _sleeper(self, name: str, n: int) -> str:
        key = rec.timer_key(self.id, name, n)
        return unpack(self.engine.store.seal, key, self._timers[key], Timer).branch

    def _child_key(self, workflow: str, branch: str, arguments: Callable[[], str]) -> str:  # noqa: ARG002
        identity = digest_of("start", workflow, arguments())
        n = self._counts.get(identity, 0)
        self._counts[identity] = n + 1
        return f"{identity}/{n}"

    def _timer(self, recorded: Timer | None, asked: Timer) -> Timer:  # noqa: ARG002
        return asked  # an edited duration counts from the first asking

    async def _give_up(self, asked: Request, attempt: int, began: float, error: BaseException) -> Ended:  # noqa: ARG002
        """A failed step isn't kept: the next execution tries anew."""
        if asked.request.is_continued:
            self._occurrences.give_back(asked.key.identity, int(asked.key.outcome.rpartition("/")[2]))
        if asked.key.attempts in self._attempts:
            await self._commit(Commit(self._held.guard, deletes=(asked.key.attempts,)))
            self._learn_attempts(asked.key, None)
        return Ended(error=error)

    def _try_again(self, step: str) -> str:
        return f"run the cell once with --rerun={step}"
