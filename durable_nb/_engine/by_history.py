"""What a workflow's run has asked for and been given, in order, and which recorded request a request is. Pure.

The log of a run is linear. A row tells which requests the code has made since the row before, and what ended: a step, a
sleep, a timer, a child's run, or the run's being cancelled. What the code does between two deliveries is an *activation*;
activation 0 is before the first. A replay delivers what is recorded, one at a time and in recorded order, and matches what
the code asks for against what was asked in the same activation. So whatever asyncio construct chose the run's course chooses
it again, and a difference is found before anything is executed.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import msgspec

from durable_nb._records import Asked, Event, Outcome
from durable_nb.errors import StepInterrupted

Row = Outcome | Event
Value = float | str | bool
_NONE: list[Asked] = []

TIMER = "timer"
"""The kind of `asyncio.sleep` and time-outs in a workflow's code: no step, shown nowhere."""
PATCHED = "patched"
"""The kind of a question whether the run takes the new way. It can go from the code, together with the old way."""


class Request:
    """What the code asks for, to be matched: its kind, its name, and a digest of its arguments, made when it is needed."""

    __slots__ = ("_digest", "id", "kind", "n", "name", "recorded_digest")

    def __init__(self, kind: str, name: str, digest: str | Callable[[], str]) -> None:
        self.kind, self.name = kind, name
        self._digest = digest
        self.id = -1
        """Which request of the run it is; -1 until its activation closes."""
        self.n = 0
        """Which among its equals, in the order of asking."""
        self.recorded_digest: str | None = None
        """Under which digest it is recorded; it stays, whatever the arguments are now."""

    @property
    def digest(self) -> str:
        if not isinstance(self._digest, str):
            self._digest = self._digest()
        return self._digest

    @property
    def described(self) -> str:
        return f"{self.kind} {self.name!r}" if self.name else f"{self.kind}()"


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event of the past, to be delivered again: the end of request `id`, or (id -1) the run's cancellation."""

    id: int
    row: Row
    closed: int
    """Every request of the activations up to this one is on record."""


@dataclass(frozen=True, slots=True)
class _Course:
    """A run's history, as far as it counts."""

    asked: dict[int, Asked] = field(default_factory=dict)
    deliveries: tuple[Delivery, ...] = ()
    kept: tuple[tuple[Asked, Row], ...] = ()
    """Outcomes that stand, though the requests that earned them are set aside: whoever asks for the same gets them."""
    taken: tuple[Asked, ...] = ()
    """Requests set aside whose place among their equals isn't given away again."""
    values: tuple[Asked, ...] = ()
    """Of these, what the code got in passing: it gets that again, so that what it asks for then is the same."""


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """While a long history is made or repeated: all of it lives, and the collector would look through it again and again."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Mismatch(Exception):  # noqa: N818  told on as NonDeterminismError, with the run's name
    """The code asks for something else than is recorded."""


class History:
    """One replay: deliveries are taken in order, activations closed one by one."""

    def __init__(self, rows: Iterable[Row]) -> None:
        course = _course_of(rows)
        self._asked, self._deliveries = course.asked, course.deliveries
        self._ends: dict[int, Row] = {}
        """By request, once somebody asks."""
        self._by_activation: dict[int, list[Asked]] = {}
        self._equals: dict[tuple[str, str, str], int] = {}
        """By kind, name and digest: how many such requests there have been."""
        equals, by_activation = self._equals, self._by_activation
        last = -1
        for asked in course.asked.values():
            by_activation.setdefault(asked.activation, []).append(asked)
            what = asked.kind, asked.name, asked.digest
            equals[what] = max(equals.get(what, 0), asked.n + 1)
            last = max(last, asked.id)
        self._recorded = frozenset(equals)
        self._kept: defaultdict[tuple[str, str, str], deque[tuple[Asked, Row]]] = defaultdict(deque)
        for asked, row in course.kept:
            self._kept[asked.what].append((asked, row))
        for asked in course.taken:
            equals[asked.what] = max(equals.get(asked.what, 0), asked.n + 1)
            last = max(last, asked.id)
        self._closed = max((delivery.closed for delivery in course.deliveries), default=-1)
        self._next_id = last + 1
        self._edited: set[tuple[str, str, str]] = set()
        """What is recorded, and was taken by a request with other arguments."""
        self._values: defaultdict[tuple[str, str, tuple[int, ...]], deque[Asked]] = defaultdict(deque)
        for asked in course.values:
            self._values[asked.kind, asked.name, asked.lane].append(asked)
        self._drawing, self._drawn = -1, defaultdict[tuple[str, str], deque[Asked]](deque)
        """Of that activation, what is recorded in passing and was not asked for yet."""
        self._asked_for: list[str] = []
        self._bound: set[int] = set()
        """Requests of this activation that were matched before it closed."""
        self.activation = 0
        """The one that the code is in: how many deliveries there were."""

    @property
    def is_empty(self) -> bool:
        """Is nothing recorded?"""
        return not (self._deliveries or self._asked)

    def is_replaying(self) -> bool:
        """Is there something left to deliver?"""
        return self.activation < len(self._deliveries)

    def is_repeating(self) -> bool:
        """Has the code done this before? All that it did up to a recorded delivery, and up to the last recorded request."""
        return self.activation <= self._closed or self.is_replaying()

    def peek(self) -> Delivery:
        """What is delivered next."""
        return self._deliveries[self.activation]

    def undelivered(self) -> set[int]:
        """Requests whose ends are on record and were delivered to nobody: the code was done before."""
        return {delivery.id for delivery in self._deliveries[self.activation :]}

    def end_of(self, request_id: int) -> Row | None:
        """What ended that request, where it is on record."""
        if not self._ends:
            self._ends = {delivery.id: delivery.row for delivery in self._deliveries}
        return self._ends.get(request_id)

    def recorded(self, request_id: int) -> Asked | None:
        """That request, where it is on record."""
        return self._asked.get(request_id)

    def close(self, requests: Sequence[Request]) -> list[Request]:
        """The activation is over, and asked for these: each gets its id; those that are not on record.

        Mismatch where something recorded isn't asked for any more, or where something new is asked for in an activation all
        of whose requests are on record. Equal requests are matched in order. One whose arguments were edited takes the record
        of the same kind and name, in order, where there are as many of these as of the records left.
        """
        recorded = self._by_activation.get(self.activation, _NONE)
        free = requests
        if self._bound:
            recorded = [asked for asked in recorded if asked.id not in self._bound]
            free = [request for request in requests if request.id < 0]
            for request in requests:
                if request.id >= 0:
                    self._check_edited(request)
            self._bound.clear()
        self._asked_for += [request.described for request in requests if request.kind != TIMER]
        if not recorded:
            new = list(free)
        elif len(recorded) == len(free) == 1 and self._is_plainly(free[0], recorded[0]):
            self._take(free[0], recorded[0])
            new = []
        else:
            new = self._matched(free, recorded)
        if self._edited and self.activation <= len(self._deliveries):  # nothing has begun
            for request in new:
                if (request.kind, request.name, request.digest) in self._edited:
                    raise Mismatch(
                        f"asks for {request.described} with the arguments of a recorded one, which another one took: a line "
                        f"was inserted{self._columns()}"
                    )
        if new and self.activation <= self._closed:
            raise Mismatch(f"asks for {new[0].described}, which is not recorded here{self._columns()}")
        for request in new:
            self._number(request)
        return new

    def bind(self, request: Request, before: Iterable[Request]) -> None:
        """Match a request now, which must know its place among its equals before its activation closes. `before`: the requests
        of this activation that were made before it."""  # fmt: skip
        free = [asked for asked in self._by_activation.get(self.activation, []) if asked.id not in self._bound]
        free = [asked for asked in free if (asked.kind, asked.name) == (request.kind, request.name)]
        found = next((asked for asked in free if asked.digest == request.digest), free[0] if free else None)
        if found is not None:
            self._bound.add(found.id)
            self._take(request, found)
        else:
            what = request.kind, request.name, request.digest
            unbound = sum(other.id < 0 and (other.kind, other.name, other.digest) == what for other in before)
            request.n = self._equals.get(what, 0) + unbound

    def draw(self, request: Request, lane: tuple[int, ...]) -> Value | None:
        """What is recorded of a value that the code gets in passing, matched at its call; None: nothing. In an activation they
        are told apart by their order, which a replay repeats."""  # fmt: skip
        if self._drawing != self.activation:
            self._drawing = self.activation
            self._drawn.clear()
            for asked in self._by_activation.get(self.activation, _NONE):
                if asked.value is not None:
                    self._drawn[asked.kind, asked.name].append(asked)
        if free := self._drawn.get((request.kind, request.name)):
            asked = free.popleft()
            self._bound.add(asked.id)
            self._take(request, asked)
            return asked.value
        aside = self._values.get((request.kind, request.name, lane))
        return aside.popleft().value if aside else None

    def has_passed(self, made: Iterable[Request]) -> bool:
        """Has the code been here before, and gone on? `made`: what this activation has asked for up to here."""
        if self.is_repeating():
            return True
        # The last activation on record: it went on from here where it has asked for more.
        left = Counter(asked.kind == TIMER for asked in self._by_activation.get(self.activation, _NONE))
        left.subtract(Counter(request.kind == TIMER for request in made))
        return any(count > 0 for count in left.values())

    def kept(self, request: Request) -> Row | None:
        """An outcome that an equal request earned before the run was resumed; it is given away once."""
        found = self._kept.get((request.kind, request.name, request.digest))
        if not found:
            return None
        asked, row = found.popleft()
        request.n = asked.n
        return row

    def check_delivery(self, delivery: Delivery, open_ids: Iterable[int]) -> None:
        """What ended must have been asked for."""
        if delivery.id >= 0 and delivery.id not in open_ids:
            raise self._missing(self._asked[delivery.id])

    def check_returned(self) -> None:
        """The code is done: whatever was asked for in later activations is missing."""
        later = [one for one in self._asked.values() if one.activation > self.activation and one.kind not in (TIMER, PATCHED)]
        if later:
            raise self._missing(later[0])

    def _missing(self, recorded: Asked, instead: Request | None = None) -> Mismatch:
        if instead is not None:
            return Mismatch(f"asks for {instead.described} where {_described(recorded)} is recorded{self._columns()}")
        count = sum(asked.kind != TIMER for asked in self._asked.values())
        return Mismatch(
            f"asks for {len(self._asked_for)} of {count} recorded steps; {_described(recorded)} is missing{self._columns()}"
        )

    def _is_plainly(self, request: Request, asked: Asked) -> bool:
        if (request.kind, request.name) != (asked.kind, asked.name):
            return False
        return asked.kind == TIMER or request.digest == asked.digest

    def _matched(self, requests: Sequence[Request], recorded: Sequence[Asked]) -> list[Request]:
        free: defaultdict[tuple[str, str, str], deque[Asked]] = defaultdict(deque)
        for asked in recorded:
            free[asked.what].append(asked)
        others: defaultdict[tuple[str, str], list[Request]] = defaultdict(list)
        for request in requests:
            same = free.get((request.kind, request.name, request.digest))
            if same:
                self._take(request, same.popleft())
            else:
                others[request.kind, request.name].append(request)
        left: defaultdict[tuple[str, str], list[Asked]] = defaultdict(list)
        for asked in recorded:
            if asked in free[asked.what]:
                left[asked.kind, asked.name].append(asked)
        for place, rows in left.items():
            if place[0] == PATCHED:
                continue
            edited = others.pop(place, [])
            if len(edited) != len(rows):
                raise self._missing(rows[0], next((rest[0] for rest in others.values() if rest), None))
            for request, asked in zip(edited, rows, strict=True):
                self._take(request, asked)
                self._check_edited(request)
        return [request for rest in others.values() for request in rest]

    def _check_edited(self, request: Request) -> None:
        """Of a request that took the record of another: have its arguments been edited, or is it another one that moved?"""
        if request.kind == TIMER or request.recorded_digest == request.digest:
            return
        if (request.kind, request.name, request.digest) in self._recorded:
            raise Mismatch(
                f"asks for {request.described} with the arguments of another recorded one: a line was inserted, deleted or "
                f"moved{self._columns()}"
            )

    def _take(self, request: Request, asked: Asked) -> None:
        request.id, request.n, request.recorded_digest = asked.id, asked.n, asked.digest
        if asked.kind != TIMER and asked.digest != request.digest:
            self._edited.add(asked.what)

    def _number(self, request: Request) -> None:
        request.id, self._next_id = self._next_id, self._next_id + 1
        what = request.kind, request.name, request.digest
        request.n = self._equals.get(what, 0)
        self._equals[what] = request.n + 1

    def _columns(self) -> str:
        """What is recorded and what was asked for, side by side."""
        recorded = [_described(asked) for _, asked in sorted(self._asked.items()) if asked.kind != TIMER]
        count = max(len(recorded), len(self._asked_for))
        rows = [("recorded", "asked for"), *zip_longest(recorded, self._asked_for, fillvalue="")]
        width = max(len(left) for left, _ in rows)
        first = next((n for n, (left, right) in enumerate(rows) if n and left != right), count)
        shown = [n for n in range(len(rows)) if not n or first - 5 <= n <= first + 20]
        lines = [
            f"  {n or ' '}  {rows[n][0]:<{width}}  {rows[n][1]}{'   <-' if n and rows[n][0] != rows[n][1] else ''}".rstrip()
            for n in shown
        ]
        return "\n" + "\n".join(lines)


def set_aside(rows: Iterable[Row], ended_by: Sequence[int], *, cancelled: bool) -> tuple[int, list[Asked]]:
    """Where a resumed run goes on from: the place of the delivery that ended it (-1: none did), and the requests whose recorded
    outcomes don't count any more, because that delivery caused them (compensations)."""  # fmt: skip
    course = _course_of(rows)
    place = next((n for n, d in enumerate(course.deliveries) if d.id in ended_by or (cancelled and d.id < 0)), -1)
    if place < 0:
        return -1, []
    ended = {delivery.id for delivery in course.deliveries}
    return place, [asked for asked in _caused(course, place, ended_by) if asked.id in ended and asked.kind != TIMER]


def requests_of(rows: Iterable[Row]) -> set[int]:
    """The numbers of the requests that count: those that a resumption has set aside don't."""
    return set(_course_of(rows).asked)


def deliveries_of(rows: Iterable[Row]) -> tuple[Delivery, ...]:
    """What a replay of these rows delivers, in order."""
    return _course_of(rows).deliveries


def open_attempts(rows: Iterable[Row]) -> set[int]:
    """The requests whose last attempt has failed, and that the task that was told so may go on with."""
    lanes: dict[int, tuple[int, ...]] = {}
    found: dict[tuple[int, ...], int] = {}
    for row in rows:
        for asked in row.asked:
            lanes[asked.id] = asked.lane
            if asked.kind != TIMER and asked.value is None:
                found.pop(asked.lane, None)
        if isinstance(row, Outcome):
            lane = lanes.get(row.request, ())
            if row.is_attempt:
                found[lane] = row.request
            elif found.get(lane) == row.request:
                del found[lane]
    return set(found.values())


def ends_of(rows: Iterable[Row]) -> tuple[list[Asked], dict[int, Row]]:
    """The requests that stand, in order, and by their numbers the rows that ended them."""
    course = _course_of(rows)
    return [asked for _, asked in sorted(course.asked.items())], {one.id: one.row for one in course.deliveries if one.id >= 0}


def forked(rows: Sequence[Row], at: int) -> list[Row]:
    """The log of a run that goes its own way from the request `at` on.

    What was asked for before it stands with what it came to; that request and what followed are asked for anew. The rows are
    those of the old log, without the values that don't count any more, and one more.
    """
    fork = Event("forked", at)
    course = _course_of([*rows, fork])
    stand = {id(delivery.row) for delivery in course.deliveries} | {id(row) for _, row in course.kept}
    at_s = max((delivery.row.at for delivery in course.deliveries), default=0.0)
    return [*(row if id(row) in stand else _emptied(row, at_s) for row in rows), msgspec.structs.replace(fork, at=at_s)]


def _emptied(row: Row, at_s: float) -> Row:
    """A row of which only the requests count. The run's time goes on from where it was."""
    row = msgspec.structs.replace(row, form="", value=b"", blob="", at=min(row.at, at_s))
    return msgspec.structs.replace(row, patches=b"", patches_blob="", seen=b"", shown=b"") if isinstance(row, Outcome) else row


def _course_of(rows: Iterable[Row]) -> _Course:
    """The rows in order, with every resumption applied where it happened."""
    asked: dict[int, Asked] = {}
    deliveries: list[Delivery] = []
    course = _Course(asked)
    for row in rows:
        for one in row.asked:
            asked[one.id] = one
            if one.value is not None and course.values:
                drawn = next((was for was in course.values if _is_drawn(was, one)), None)
                course = replace(course, values=tuple(was for was in course.values if was is not drawn))
        if row.what == "resumed" and isinstance(row, Event):
            course = _resumed(replace(course, deliveries=tuple(deliveries)), row.cut, row.ended_by)
            asked, deliveries = course.asked, list(course.deliveries)
        elif row.what == "forked":
            course = _forked(replace(course, deliveries=tuple(deliveries)), row.request)
            asked, deliveries = course.asked, list(course.deliveries)
        elif row.what == "moved" and isinstance(row, Event):
            asked[row.request] = msgspec.structs.replace(asked[row.request], timer=row.timer)
        elif row.what != "asked":
            deliveries.append(Delivery(row.request, row, row.closed))
            if row.again:
                what = asked[row.request].what
                spent = next((pair for pair in course.kept if pair[0].what == what), None)
                course = replace(course, kept=tuple(pair for pair in course.kept if pair is not spent))
    return replace(course, deliveries=tuple(deliveries))


def _resumed(course: _Course, cut: int, ended_by: Sequence[int]) -> _Course:
    """A failed or cancelled run goes on before the delivery `cut`: what that has caused is set aside.

    Outcomes of requests that were made before it stand, and are delivered after what was delivered before it; others are
    kept for whoever asks for the same, but for those that the delivery has caused.
    """
    if cut < 0:
        return course
    caused = {asked.id for asked in _caused(course, cut, ended_by)}
    before = {n: asked for n, asked in course.asked.items() if asked.activation <= cut}
    deliveries = [replace(delivery, closed=min(delivery.closed, cut)) for delivery in course.deliveries[:cut]]
    kept = list(course.kept)
    # Of these, whatever came later is for the attempt that the code makes next.
    attempted = {delivery.id for delivery in deliveries}
    went_on = {asked.activation - 1 for asked in course.asked.values() if asked.kind != TIMER}
    for n, delivery in enumerate(course.deliveries[cut:], cut):
        if delivery.row.failed and n not in went_on and not delivery.row.error.startswith(StepInterrupted.__name__):
            continue  # a sibling's failure that nothing followed was not caught: it would end the run again
        if delivery.id < 0 or delivery.id in ended_by or delivery.row.what == "dropped":
            continue
        if course.asked[delivery.id].kind == TIMER:
            continue  # the run's time goes on from the cut: the timer falls due again
        if delivery.id in before and delivery.id not in attempted:
            deliveries.append(replace(delivery, closed=cut))
            attempted.add(delivery.id)
        elif delivery.id not in caused:
            kept.append((course.asked[delivery.id], delivery.row))
    others = [asked for n, asked in course.asked.items() if n not in before]
    values = [asked for asked in others if asked.value is not None and asked.id not in caused]
    return _Course(before, tuple(deliveries), tuple(kept), (*course.taken, *others), (*course.values, *values))


def _forked(course: _Course, at: int) -> _Course:
    """A run begins with another one's history up to the request `at`, whose activation is left open.

    What was asked for before it, and came to something later, is delivered after the rest; of several attempts the first, the
    others when the code makes them. A failure then isn't: what failed is tried again. What an earlier resumption had kept is
    kept, where it was asked for before.
    """
    place = course.asked[at].activation
    before = {n: asked for n, asked in course.asked.items() if n < at}
    deliveries = [replace(one, closed=min(one.closed, place - 1)) for one in course.deliveries[:place]]
    delivered, more = {one.id for one in deliveries}, list[tuple[Asked, Row]]()
    for one in course.deliveries[place:]:
        if one.id not in before or before[one.id].kind == TIMER or one.row.failed or one.row.what == "dropped":
            continue
        if one.id in delivered:
            more.append((before[one.id], one.row))
        else:
            deliveries.append(replace(one, closed=place - 1))
            delivered.add(one.id)
    others = tuple(asked for n, asked in course.asked.items() if n >= at)
    kept = (*(pair for pair in course.kept if pair[0].id < at), *more)
    values = tuple(asked for asked in course.values if asked.id < at)
    return _Course(before, tuple(deliveries), kept, (*course.taken, *others), values)


def _is_drawn(aside: Asked, asked: Asked) -> bool:
    return (aside.kind, aside.name, aside.lane, aside.value) == (asked.kind, asked.name, asked.lane, asked.value)


def _caused(course: _Course, cut: int, ended_by: Sequence[int]) -> list[Asked]:
    """Requests made because of the delivery `cut`: by what it woke, and by what that woke; or by the task that failed, or one
    that it comes from, since its failure is what they went on with. An answer with a status of 400 or more is a value that the
    code went on with: what followed it may be paid for, and stands."""  # fmt: skip
    errors = {delivery.id: delivery.row.error for delivery in course.deliveries}
    failures = [n for n in ended_by if n in course.asked and not errors.get(n, "").startswith("StatusError")]
    lanes = [course.asked[n].lane for n in failures]
    caused: dict[int, Asked] = {}
    for asked in sorted(course.asked.values(), key=lambda one: (one.activation, one.id)):
        if asked.activation <= cut:
            continue
        cause = course.deliveries[asked.activation - 1].id
        own = any(asked.lane == lane[: len(asked.lane)] for lane in lanes)
        if cause < 0 or cause in failures or cause in caused or own:
            caused[asked.id] = asked
    return list(caused.values())


def _described(asked: Asked) -> str:
    if asked.kind == TIMER:
        return "a pause (asyncio.sleep, or a time-out)"
    return f"{asked.kind} {asked.name!r}" if asked.name else f"{asked.kind}()"
