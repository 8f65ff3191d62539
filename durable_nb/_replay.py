"""Given the records and one request, what to do next. Pure: the engine obeys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from durable_nb._clock import Instant, remaining_s
from durable_nb._records import Attempts, Outcome, Timer


@dataclass(frozen=True, slots=True)
class Recall:
    """Take the recorded outcome; no body runs."""

    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do for so long; then ask again."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Retry(Wait):
    """The next attempt is due in so long, after these that failed."""

    failures: Attempts


@dataclass(frozen=True, slots=True)
class Perform:
    """Run the body, as this attempt (from 1)."""

    attempt: int


@dataclass(frozen=True, slots=True)
class CutOff:
    """An attempt at a step that is tried at most once began and never ended."""

    failures: Attempts


@dataclass(frozen=True, slots=True)
class Done:
    """The time has come."""


def decide(outcome: Outcome | None, attempts: Attempts | None, now: Instant) -> Recall | Retry | Perform | CutOff:
    """What a step's request gets, given its outcome and its failed attempts so far."""
    if outcome is not None:
        return Recall(outcome)
    if attempts is None:
        return Perform(1)
    if attempts.begun:
        return CutOff(attempts)
    left = remaining_s(attempts.since, attempts.delay_s, now)
    return Retry(left, attempts) if left > 0 else Perform(attempts.failed + 1)


def decide_sleep(timer: Timer, now: Instant) -> Wait | Done:
    """What a sleep gets, given its record."""
    left = timer.until_s - now.wall_s if timer.until_s is not None else remaining_s(timer.since, timer.duration_s, now)
    return Wait(left) if left > 0 else Done()


class Occurrences:
    """Which of several equal steps a request is.

    Steps with one identity are told apart by counting. A request takes the first record of its own branch that nobody
    took, else the first of any, else a new number: so two tasks that each ask twice get their own answers back, in
    whatever order they run.
    """

    def __init__(self, recorded: Mapping[str, Iterable[int]]) -> None:
        self._free = {identity: tuple(sorted(set(numbers))) for identity, numbers in recorded.items()}
        """Tuples: of 100,000 identities with a number each, a list for each costs the garbage collector a second."""
        self._next: defaultdict[str, int] = defaultdict(int)
        for identity, numbers in self._free.items():
            self._next[identity] = numbers[-1] + 1

    def take(self, identity: str, branches: Mapping[int, str] | None = None, branch: str = "") -> int:
        """The number of this request. `branches` tells in which branch each recorded one was asked for."""
        free = self._free.get(identity)
        if not free:
            return self.new(identity)
        number = next((n for n in free if branches is not None and branches.get(n) == branch), free[0])
        self.leave_out(identity, number)
        return number

    def new(self, identity: str) -> int:
        """A number that no record has."""
        number = self._next[identity]
        self._next[identity] = number + 1
        return number

    def give_back(self, identity: str, number: int) -> None:
        """What took this number came to nothing: the next request that is equal to it takes it."""
        self._free[identity] = tuple(sorted({*self._free.get(identity, ()), number}))

    def leave_out(self, identity: str, number: int) -> None:
        """This record doesn't count any more."""
        self._free[identity] = tuple(n for n in self._free[identity] if n != number)

    def candidates(self, identity: str) -> tuple[int, ...]:
        """The recorded numbers that a request could take; where there are several, their branches decide."""
        return self._free.get(identity, ())
