"""Given the records and one request, what to do next. Pure: the engine obeys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from durable_nb._clock import Instant, remaining_s
from durable_nb._records import Attempts, Outcome, Timer, Turn


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
        self._free = {identity: sorted(set(numbers)) for identity, numbers in recorded.items()}
        self._next: defaultdict[str, int] = defaultdict(int)
        for identity, numbers in self._free.items():
            self._next[identity] = numbers[-1] + 1

    def take(self, identity: str, branches: Mapping[int, str] | None = None, branch: str = "") -> int:
        """The number of this request. `branches` tells in which branch each recorded one was asked for."""
        free = self._free.get(identity)
        if not free:
            number = self._next[identity]
            self._next[identity] = number + 1
            return number
        own = [n for n in free if branches is not None and branches.get(n) == branch]
        number = own[0] if own else free[0]
        free.remove(number)
        return number

    def leave_out(self, identity: str, number: int) -> None:
        """This record doesn't count any more."""
        self._free[identity].remove(number)

    def rivals(self, identity: str) -> list[int]:
        """The recorded numbers that a request could take; where there are several, their branches decide."""
        return self._free.get(identity, [])


class Places:
    """Where in a workflow a request is: the Nth of its branch, steps and sleeps counted alike."""

    def __init__(self) -> None:
        self._next: defaultdict[str, int] = defaultdict(int)

    def take(self, branch: str) -> int:
        """The place of this request, from 0."""
        place = self._next[branch]
        self._next[branch] = place + 1
        return place

    def asked(self, branch: str) -> int:
        """How many requests the branch has made."""
        return self._next[branch]


class How(Enum):
    """What a recorded event of a workflow was."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SLEPT = "slept"


@dataclass(frozen=True, slots=True)
class Ending:
    """A recorded event of a workflow, as far as resuming a failed run goes. A sleep begins and ends when it is asked for."""

    key: str
    branch: str
    began: Turn
    ended: Turn
    how: How


def to_clear(endings: Iterable[Ending]) -> list[str]:
    """The failures to try again when a failed run is resumed: those after which nothing succeeded in their branch or in one
    that it came from. An earlier one was caught by the code, which went on from it.

    Code that slept after a failure has caught it as well. But where every failure was slept upon (`except: await
    sleep(...); raise`), the sleeps are forgotten with the failures that they came after: else nothing would be tried again.
    """  # fmt: skip
    every = list(endings)
    failures = [event for event in every if event.how is How.FAILED]
    open_ones = [failure for failure in failures if not _went_on(failure, every, {How.SUCCEEDED, How.SLEPT})]
    if open_ones or not failures:
        return [failure.key for failure in open_ones]
    open_ones = [failure for failure in failures if not _went_on(failure, every, {How.SUCCEEDED})]
    slept = [event for event in every if event.how is How.SLEPT and any(_follows(event, failure) for failure in open_ones)]
    return [event.key for event in (*open_ones, *slept)]


def _went_on(failure: Ending, every: list[Ending], signs: set[How]) -> bool:
    return any(later.how in signs and _follows(later, failure) for later in every)


def _follows(later: Ending, failure: Ending) -> bool:
    """An event that was under way already when the failure came is no sign of anything."""
    return later.began >= failure.ended and _comes_from(failure.branch, later.branch)


def _comes_from(branch: str, ancestor: str) -> bool:
    return branch == ancestor or branch.startswith(f"{ancestor}/")
