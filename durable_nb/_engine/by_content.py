"""Which record a step, a sleep or a child of a cell is: told by content. Editing the cell is normal.

Without a loop: it is given what is recorded and what is asked, and says under which key.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from durable_nb import _fingerprint
from durable_nb import _records as rec
from durable_nb._arguments import fingerprint_of
from durable_nb._codec import digest_of
from durable_nb._current import StepRequest
from durable_nb._engine.in_place import Changed, Inputs, changed, changed_by_itself, fixed
from durable_nb._engine.run_log import CellRecords
from durable_nb._fingerprint import Fingerprint
from durable_nb._records import Excluded, Outcome, StepKey
from durable_nb._replay import Occurrences
from durable_nb.errors import StoreError


@dataclass(frozen=True, slots=True)
class Settled:
    """What a step is recorded under, after its body has run."""

    key: StepKey
    own: frozenset[str] = frozenset()
    """Globals that its body has changed itself."""
    excluded: Excluded | None = None
    """To be recorded with it: from now on these are left out of the identity of such steps."""


class ByContent:
    """The identities of one execution of a cell."""

    def __init__(
        self,
        records: CellRecords,
        scope: str,
        generation: int,
        run_id: str,
        *,
        holds: Callable[[Outcome], bool],
        now_s: Callable[[], float],
        changed_before: Iterable[Changed],
        reads: Mapping[str, str],
    ) -> None:
        """`holds`: is the world that a step saw still what it was? `changed_before`: steps of this run that have changed live
        objects of this process. `reads`: what the cell reads now, by component."""  # fmt: skip
        self._records, self._run_id = records, run_id
        self._prefix = rec.step_prefix(scope, generation)
        self._holds, self._now_s = holds, now_s
        self._changed = list(changed_before)
        self._taken: set[Changed] = set()
        self._checked: set[str] = set()
        self._counts: dict[str, int] = {}
        self.lapsed: dict[str, list[str]] = {}
        """By name: approvals that were asked for when the cell read something else."""
        recorded: defaultdict[str, list[int]] = defaultdict(list)
        for key in (*records.outcomes, *records.attempts):
            _, identity, number = key.rsplit("/", 2)
            recorded[identity].append(int(number))
        self._occurrences = Occurrences(recorded)
        timers = [(wait, timer) for wait in records.timers if (timer := records.timer(wait))]
        self._waits = _OfTasks((wait, timer.kind + "/" + timer.name, timer.branch) for wait, timer in timers)
        for wait, timer in timers:
            if timer.kind == "decision" and any(reads.get(label, was) != was for label, was in timer.reads.items()):
                self._waits.leave_out(timer.kind + "/" + timer.name, int(wait.rpartition("/")[2]))
                self.lapsed.setdefault(timer.name, []).append(wait)
        self._values = _OfTasks((key, got.kind, got.branch) for key in records.values if (got := records.value(key)))

    def step(self, request: StepRequest, branch: str) -> tuple[StepKey, Fingerprint]:
        """The record of a step that is asked for now."""
        found = fingerprint_of(request)
        again = self._asked_again(request, found)
        if again is not None:
            return again.key, found
        excluded = self._records.excluded.get((request.kind, request.name), ())
        forms = *found.earlier(), found  # what an earlier format of fingerprints recorded is not paid for again
        identities = [self._identity(request, form, labels) for form in forms for labels in (*reversed(excluded), ())]
        for identity in identities:
            for n in self._occurrences.candidates(identity):
                if not self._still_holds(self._key(identity, n), request.ttl_s):
                    self._occurrences.leave_out(identity, n)
        own = identities[-1 - len(excluded)]
        identity = next((known for known in identities if self._occurrences.candidates(known)), own)
        candidates = self._occurrences.candidates(identity)
        branches = {n: self._branch_of(self._key(identity, n)) for n in candidates} if len(candidates) > 1 else None
        return self._key(identity, self._occurrences.take(identity, branches, branch)), found

    def wait(self, kind: str, name: str, branch: str, has_made: Callable[[str], bool]) -> str:
        """Which wait of that kind (`sleep`, `event`, `decision`) it is, as keys call it."""
        return rec.wait_of(kind, name, self._waits.take(f"{kind}/{name}", branch, has_made))

    def give_back_wait(self, kind: str, name: str, branch: str, wait: str) -> None:
        """Nobody took what it has come to: the next one of that name does."""
        self._waits.give_back(f"{kind}/{name}", int(wait.rpartition("/")[2]), branch)

    def value(self, kind: str, branch: str, has_made: Callable[[str], bool]) -> str:
        """The record of a value that the code gets in passing."""
        return rec.value_key(self._run_id, kind, self._values.take(kind, branch, has_made))

    def child(self, workflow: str, arguments: str) -> str:
        """Which of the runs started in this one it is that is started now."""
        identity = digest_of("start", workflow, arguments)
        n = self._counts.get(identity, 0)
        self._counts[identity] = n + 1
        return f"{identity}/{n}"

    def settle(self, key: StepKey, inputs: Inputs, after: dict[str, str]) -> Settled:
        """What a step is recorded under now that its body has run: globals that it changes itself are no input to compare, such
        as a list that it appends to.

        Arguments are compared all the same: two calls that differ in them only must not be mistaken for each other.
        """
        if after is inputs.components:  # nothing that could have changed
            return Settled(key)
        own = changed_by_itself(inputs, after)
        place = inputs.request.kind, inputs.request.name
        known = self._records.excluded.get(place, ())
        if not own or inputs.found is None:
            return Settled(key, frozenset(own))
        labels = tuple(sorted(own | {"aliases"} | set(known[-1] if known else ())))
        identity = self._identity(inputs.request, inputs.found, labels)
        if identity == key.identity:
            return Settled(key, frozenset(own))
        key = self._key(identity, self._occurrences.take(identity))
        if known and known[-1] == labels:
            return Settled(key, frozenset(own))
        self._records.excluded[place] = (*known, labels)
        return Settled(key, frozenset(own), Excluded(*place, self._records.excluded[place]))

    def give_back(self, key: StepKey) -> None:
        """A step came to nothing: the next request that is equal to it takes its place among equals."""
        self._occurrences.give_back(key.identity, int(key.outcome.rpartition("/")[2]))

    def is_changed_already(self, key: StepKey) -> bool:
        """Is what the step was given still as its recorded execution has left it?"""
        return any(key is step.key for step in self._taken)

    @staticmethod
    def is_same_but_for_own_changes(earlier: Inputs, inputs: Inputs) -> bool:
        """Was an attempt with these inputs begun for the step that is asked for now? Its body may have changed a global already
        that is part of the key."""  # fmt: skip
        now = inputs.components
        return fixed(earlier) == fixed(inputs) and changed(earlier, now) == changed_by_itself(earlier, now)

    def _asked_again(self, request: StepRequest, found: Fingerprint) -> Changed | None:
        """The step, of those that this run has executed in this kernel, that has left what is given to it now as it is."""
        if found.lasting:
            return None
        for n, step in enumerate(self._changed):
            if step not in self._taken and step.is_asked_again(request, found, self._changed[n + 1 :]):
                self._taken.add(step)
                number = int(step.key.outcome.rpartition("/")[2])
                if number in self._occurrences.candidates(step.key.identity):
                    self._occurrences.leave_out(step.key.identity, number)
                return step
        return None

    def _identity(self, request: StepRequest, found: Fingerprint, left_out: tuple[str, ...] = ()) -> str:
        """What a step is recorded under: kind, name and fingerprint, but for components that its body changes itself."""
        again = self._records.again.get(request.name)
        parts = (request.kind, request.name) if again is None else (request.kind, request.name, f"again {again}")
        if not left_out:
            return digest_of(*parts, found.digest)
        kept = {label: digest for label, digest in found.components.items() if label not in left_out}
        return digest_of(*parts, _fingerprint.in_format(found.format).digest_of(kept), *left_out)

    def _still_holds(self, key: StepKey, ttl_s: float | None) -> bool:
        """Not where a file that the step read has changed since, nor where it is as old as `ttl_s`."""
        if key.outcome in self._checked:
            return True
        self._checked.add(key.outcome)
        try:
            outcome = self._records.outcome(key.outcome)
        except StoreError:
            return True  # whoever asks for it is told
        if outcome is None:
            return True
        if ttl_s is not None and self._now_s() - outcome.ended_at >= ttl_s:
            return False
        return not outcome.seen or self._holds(outcome)

    def _branch_of(self, key: StepKey) -> str:
        outcome = self._records.outcome(key.outcome)
        return outcome.branch if outcome is not None else ""

    def _key(self, identity: str, n: int) -> StepKey:
        return StepKey(self._prefix, identity, n)


class _OfTasks:
    """Records of the open attempt that have no content to be known by: told apart by name, task and order."""

    def __init__(self, recorded: Iterable[tuple[str, str, str]]) -> None:
        """(key, name, branch) of each."""
        self._free: defaultdict[str, dict[int, str]] = defaultdict(dict)
        for key, name, branch in sorted(recorded):
            self._free[name][int(key.rpartition("/")[2])] = branch
        self._next = {name: max(free) + 1 for name, free in self._free.items()}

    def take(self, name: str, branch: str, has_made: Callable[[str], bool]) -> int:
        """That of this task, else one of a task that there is no more (a helper was renamed), else a new one. Of two tasks that
        ask under one name, neither takes the other's."""  # fmt: skip
        free = self._free[name]
        n = next((n for n, of in free.items() if of == branch), None)
        if n is None:
            n = next((n for n, of in free.items() if not has_made(of)), None)
        if n is None:
            n = self._next.get(name, 0)
            self._next[name] = n + 1
        free.pop(n, None)
        return n

    def leave_out(self, name: str, n: int) -> None:
        """This record doesn't count any more."""
        self._free[name].pop(n)

    def give_back(self, name: str, n: int, branch: str) -> None:
        """Whoever took this record has done nothing with it."""
        self._free[name][n] = branch
