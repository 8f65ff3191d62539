"""Limits of the store: who of its processes holds a share, who is next, and when.

Who holds shares of a limit stands on one row, `shares/NAME/KEY`. It is changed only by commits that are guarded by its very
bytes: of two processes that see room for one more, one is refused, and looks again. What a dead process holds doesn't count, as
its lock tells (`Process.is_alive`); what a stopped one holds does.

Who came first is served first. A process shows the others since when it waits by rows `waiting/NAME/KEY/PROCESS/PLACE`: a run's
is in the commit that begins it, so that no later one can overtake it; of steps, one row stands for all that wait.

One thread does this for all limits of a store in a process, whatever their loops do. A share that goes from a step to another
one of the same process needs no commit, nor does one that is taken again within a moment.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote

from durable_nb import _current
from durable_nb import _records as rec
from durable_nb._clock import RECHECK_S, Clock, Instant, parse_rate, remaining_s
from durable_nb._current import Limit
from durable_nb._engine.observing import log
from durable_nb._engine.ticker import Ticker
from durable_nb._journal import Commit, Verdict
from durable_nb._locks import let_go_in_children, process_state
from durable_nb._records import Figures, RunRecord, Shares, pack, unpack
from durable_nb._store import Store
from durable_nb.errors import StoreError

LINGER_S = 0.1
"""A step's share that nobody here wants stays so long with the process: the next step may want it."""
_SOON_S, _LATE_S = 0.01, 0.25
"""Between two looks at what another process holds: soon after something has happened, and after a while."""
_ALONE_S = 2.0
"""The same where only this process holds shares: another one can only declare other figures."""
_BEGINS_S = 0.25, 5.0
"""Who has been let in should be at work by then: at least, and at most."""
_STOPPED_S, _PATIENCE_S = 0.25, 5.0
"""There is room, and who is next doesn't take it: passed over after so long where its process is stopped, and in any case."""
_AGAIN_S = 1.0
"""After a disk that refused."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Granted:
    """What may begin now, of those who wait."""

    count: int
    """So many, from the first on."""
    last: Instant | None
    """When the last one began, with these."""
    left_s: float | None
    """Seconds until the next may, where only the rate holds it back."""


def grant(figures: Figures | None, held: int, last: Instant | None, waiting: int, now: Instant) -> Granted:
    """How many of those who wait may begin, with so many shares held. Pure."""
    if figures is None or not waiting:
        return Granted(waiting, last, None)
    room = waiting if figures.concurrency is None else min(waiting, max(figures.concurrency - held, 0))
    if figures.rate is None or not room:
        return Granted(room, last, None)
    interval_s = parse_rate(figures.rate)
    left_s = remaining_s(last, interval_s, now) if last is not None else 0.0
    if left_s > 0:
        return Granted(0, last, left_s)
    return Granted(1, now, interval_s if room > 1 else None)  # evenly spaced: one at a time


_last_place = 0


def next_place(clock: Clock) -> int:
    """Where one that comes now stands among those that wait: nanoseconds since 1970, and later than whoever came before."""
    global _last_place  # noqa: PLW0603  of all stores: a fake clock may stand still
    _last_place = max(int(clock.now().wall_s * 1e9), _last_place + 1)
    return _last_place


class Share:
    """What lets its holder be at work."""

    def __init__(self, limits: Limits, pool: _Pool, run_id: str) -> None:
        self._limits, self._pool, self._run_id = limits, pool, run_id
        self._is_held = self._is_beginning = True

    def begun(self) -> None:
        """Its holder is at work: the next may wait for the rate, by a clock that may skip time."""
        if self._is_beginning:
            self._is_beginning = False
            self._limits.begun(self._pool)

    def leave(self) -> None:
        """Give it back; once."""
        self.begun()
        if self._is_held:
            self._is_held = False
            self._limits.left(self._pool, self._run_id)


class _Waiter:
    """One that waits."""

    __slots__ = ("future", "is_granted", "is_told", "loop", "place", "run_id", "waits")

    def __init__(self, place: int, run_id: str, waits: Callable[[], object]) -> None:
        self.place, self.run_id = place, run_id
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[float] = self.loop.create_future()
        """Seconds until it is worth while to ask again; 0: it has its share."""
        self.is_granted = self.is_told = False
        self.waits: Callable[[], object] | None = waits
        """Called on the loop, once, when there is nothing for it at once."""

    def tell(self, seconds: float) -> None:
        self._soon(lambda: self.future.set_result(seconds))

    def refuse(self, error: Exception) -> None:
        self._soon(lambda: self.future.set_exception(error))

    def say_so(self) -> None:
        waits, self.waits = self.waits, None
        if waits is not None:
            self._soon(waits)

    def _soon(self, call: Callable[[], object]) -> None:
        """On its loop, unless it has given up by then."""
        try:
            self.loop.call_soon_threadsafe(lambda: None if self.future.done() else call())
        except RuntimeError:
            if not self.loop.is_closed():  # with its loop gone, nobody waits any more
                raise


class _Pool:
    """The shares of one limit for one key, as this process knows them."""

    def __init__(self, name: str, key: str) -> None:
        self.name, self.key = name, key
        self.shares_key = rec.shares_key(name, key)
        self.waiting: list[_Waiter] = []
        """By place."""
        self.using: list[str] = []
        """By what of this process: runs, and '' for each step."""
        self.beginning: list[float] = []
        """For each that was let in and isn't at work yet: until when the next one heeds that."""
        self.rows: set[int] = set()
        """Places that stand on disk for this process."""
        self.stale: set[int] = set()
        """Of these, where nobody waits any more."""
        self.unsaid: list[_Waiter] = []
        """Who came since the last look."""
        self.runs: Counter[str] = Counter()
        """Runs of this process that wait or hold a share."""
        self.seen: tuple[bytes | None, str] = None, ""
        """What stood on disk at the last look."""
        self.changed_s = time.monotonic()
        """When that was something else than before."""
        self.slow: dict[str, float] = {}
        """Rows of other processes that could have a share and don't take it, and since when."""
        self.passed_over: set[str] = set()
        """Of these, who was waited for long enough."""

    def gives_back(self, run_id: str) -> None:
        """A share that was held here."""
        self.using.remove(run_id)
        self.runs[run_id] -= 1

    def forgets(self, waiter: _Waiter) -> None:
        """It has left, without a share."""
        self.runs[waiter.run_id] -= 1
        self.stale |= {waiter.place} & self.rows

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.using or self.rows)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What stands on disk."""

    row: bytes | None
    shares: Shares
    figures: Figures | None
    others: tuple[tuple[str, str], ...]
    """Shares that other processes hold; where somebody waits here, only live ones."""
    first: str
    """The row of who waits elsewhere, comes before all others, and is to be let go first; '' where nobody does."""
    dead: tuple[str, ...]
    """Rows of dead processes."""


@dataclass(slots=True)
class _Plan:
    """What is to be done about a pool."""

    pool: _Pool
    granted: list[_Waiter]
    left_s: float | None
    """Seconds until the next one may begin, where only the rate holds it back."""
    look_s: float | None
    """Until the next look, where somebody waits for another process."""
    commit: Commit | None
    shown: set[int]
    """Places that stand on disk for this process after that, and did not before."""
    gone: set[int]
    """The other way round."""
    written: Future[Verdict] | None = None


class Limits:
    """All limits of one store in this process. Its calls may come from any thread."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock
        self._pools: dict[tuple[str, str], _Pool] = {}
        self._declared: dict[str, float] = {}
        """By name, which declaration of this process the store knows of."""
        self._ticker = Ticker("durable_nb limits", self._work)
        let_go_in_children(self)

    # -- figures -------------------------------------------------------------------------------------------------------

    def declare(self, limit: Limit) -> None:
        """These figures hold from now on, unless others were declared later. On disk when this returns."""
        if self._declared.get(limit.name, -math.inf) >= limit.declared_at:
            return
        key = rec.limit_key(limit.name)
        figures = Figures(limit.concurrency, limit.rate, limit.declared_at)
        while True:
            row = self._store.journal.get(key)
            known = unpack(self._store.signer, key, row, Figures) if row else None
            before = known and Limit(limit.name, known.concurrency, known.rate, 0.0)
            is_new = known is None or (known.declared_at < limit.declared_at and before and before.figures != limit.figures)
            if is_new:
                commit = Commit((key, row), puts=((key, pack(self._store.signer, key, figures)),))
                if self._store.writer.commit_and_wait(commit) is not Verdict.APPLIED:
                    continue
                if before:
                    said = "the limit %r of this store was %s, and is %s from now on"
                    log.warning(said, limit.name, before.figures, limit.figures)
            break
        self._declared[limit.name] = limit.declared_at
        with self._ticker.lock:
            for pool in self._pools.values():
                if pool.name == limit.name:
                    self._ticker.soon(pool)

    # -- shares --------------------------------------------------------------------------------------------------------

    def all(self) -> list[dict[str, Any]]:
        """The limits of the store by name: their figures, how many shares living processes hold, and places that wait."""
        journal, signer, alive = self._store.journal, self._store.signer, dict[str, bool]()
        found = []
        for key, row in journal.scan(rec.limit_key("")):
            figures, scope = unpack(signer, key, row, Figures), key.partition("/")[2]
            shares = [unpack(signer, key, row, Shares) for key, row in journal.scan(f"shares/{scope}/")]
            held = sum(self._is_alive(owner, alive) for one in shares for owner, _ in one.held)
            places = [rec.place_of_waiting(key)[0] for key, _ in journal.sizes(f"waiting/{scope}/")]
            waiting = sum(self._is_alive(process_id, alive) for process_id in places)
            of = {"concurrency": figures.concurrency, "rate": figures.rate, "held": held, "waiting": waiting}
            found.append({"name": unquote(scope), **of})
        return found

    async def enter(
        self,
        limits: Iterable[Limit],
        waits: Callable[[Limit], object],
        pause: Callable[[float, str], object] = lambda _seconds, _doing: None,
    ) -> list[Share]:
        """Return when a step may begin, with a share of each.

        waits  is called where there is none at once
        pause  is told of a wait for the rate before it begins, and may raise
        """
        shares: list[Share] = []
        try:
            for limit in sorted(limits, key=lambda limit: limit.name):  # one order for all: no two wait for each other
                self.know(limit)
                waiter = _Waiter(next_place(self._clock), "", lambda limit=limit: waits(limit))  # type: ignore[misc]
                shares.append(await self._enter(limit.name, "", waiter, pause))
        except BaseException:
            for share in shares:
                share.leave()
            raise
        return shares

    async def enter_run(self, record: RunRecord, waits: Callable[[], object]) -> Share:
        """Return when a run may begin. The row that shows that it waits may be on disk already."""
        waiter = _Waiter(record.place, record.id, waits)
        is_shown = self.is_waiting(record, self._store.process.id)
        return await self._enter(record.limit, record.limit_key, waiter, lambda _seconds, _doing: None, is_shown=is_shown)

    def is_waiting(self, record: RunRecord, process_id: str) -> bool:
        """Does the run wait for its share, in that process?"""
        key = rec.waiting_key(record.limit, record.limit_key, process_id, record.place)
        return self._store.journal.get(key) is not None

    def waiting_row(self, record: RunRecord) -> tuple[str, bytes]:
        """What shows that a run of this process waits, to be put with the commit that claims it."""
        key = rec.waiting_key(record.limit, record.limit_key, self._store.process.id, record.place)
        return key, self._store.signer.sign(key, record.id.encode())

    def know(self, limit: Limit) -> None:
        """Before it is used: the store has the figures that this process declared last."""
        newest = _current.limits.get(limit.name, limit)
        if self._declared.get(limit.name) != newest.declared_at:
            self.declare(newest)

    async def _enter(
        self, name: str, key: str, waiter: _Waiter, pause: Callable[[float, str], object], *, is_shown: bool = False
    ) -> Share:
        with self._ticker.lock:
            pool = self._pools.setdefault((name, key), _Pool(name, key))
            bisect.insort(pool.waiting, waiter, key=lambda one: one.place)
            pool.unsaid.append(waiter)
            pool.runs[waiter.run_id] += 1
            if is_shown:
                pool.rows.add(waiter.place)
                pool.stale.discard(waiter.place)
            self._ticker.soon(pool)
        try:
            while (left_s := await waiter.future) > 0:
                waiter.future = waiter.loop.create_future()
                pause(left_s, f"waits for the limit {name!r}")
                await self._clock.sleep(min(left_s, RECHECK_S))
                with self._ticker.lock:
                    waiter.is_told = False
                    self._ticker.soon(pool)
        except BaseException:
            with self._ticker.lock:
                if waiter.is_granted:
                    pool.gives_back(waiter.run_id)
                elif waiter in pool.waiting:
                    pool.waiting.remove(waiter)
                    pool.forgets(waiter)
                self._ticker.soon(pool)
            raise
        return Share(self, pool, waiter.run_id)

    def begun(self, pool: _Pool) -> None:
        """One that was let in is at work."""
        with self._ticker.lock:
            if pool.beginning:
                pool.beginning.pop()
                self._ticker.soon(pool)

    def left(self, pool: _Pool, run_id: str) -> None:
        """A share is given back."""
        with self._ticker.lock:
            pool.gives_back(run_id)
            self._ticker.soon(pool, 0.0 if pool.waiting or run_id else LINGER_S)

    def outdated(self) -> Iterator[tuple[str, bytes]]:
        """Rows that say nothing any more: of keys of which nobody holds a share, and of processes that are dead."""
        journal, signer, alive = self._store.journal, self._store.signer, {self._store.process.id: True}
        for key, row in journal.scan("waiting/"):
            if not self._is_alive(rec.place_of_waiting(key)[0], alive):
                yield key, row
        for key, row in journal.scan("shares/"):
            with contextlib.suppress(StoreError):
                shares, figures = unpack(signer, key, row, Shares), self._figures(unquote(key.split("/")[1]))
                is_due = grant(figures, 0, shares.last, 1, self._clock.now()).count > 0
                if is_due and not any(self._is_alive(owner, alive) for owner, _ in shares.held):
                    yield key, row

    # -- the thread ----------------------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """In a forked child, which holds nothing."""
        self._pools = {}

    def _work(self, due: list[_Pool]) -> None:
        plans = [plan for pool in due if (plan := self._tried(pool, lambda pool=pool: self._planned(pool)))]  # type: ignore[misc]
        for plan in plans:  # handed over together, they share one fsync
            if plan.commit is not None:
                plan.written = self._tried(plan.pool, lambda plan=plan: self._store.writer.hand_over(plan.commit))  # type: ignore[misc]
        for plan in plans:
            if plan.commit is None:
                self._done(plan)
            elif plan.written is not None:
                verdict = self._tried(plan.pool, plan.written.result)
                if verdict is Verdict.APPLIED:
                    self._done(plan)
                elif verdict is not None:  # another process was faster
                    self._ticker.soon(plan.pool)

    def _tried(self, pool: _Pool, do: Callable[[], _T]) -> _T | None:
        """None where the disk refuses. Whoever waits is told; what is to be given back is tried again."""
        try:
            return do()
        except Exception as error:  # a StoreError, or one of our own: none may end the thread, and leave all waiting
            with self._ticker.lock:
                waiting, pool.waiting = pool.waiting, []
                for waiter in waiting:
                    pool.forgets(waiter)
                    waiter.refuse(error)
                if not (self._store.writer.closed or pool.is_idle):
                    self._ticker.soon(pool, _AGAIN_S)
            return None

    # -- looking -------------------------------------------------------------------------------------------------------

    def _planned(self, pool: _Pool) -> _Plan:
        """Look at what stands on disk, and say what is to be done."""
        if self._store.writer.closed:  # looking would open the journal again
            raise StoreError("the store is closed; nothing was run. Load the extension, or open the store, again")
        seen, now = self._look(pool, is_waited_for=bool(pool.waiting)), self._clock.now()
        figures = seen.figures
        counts = figures is not None and figures.concurrency is not None
        paces = figures is not None and figures.rate is not None
        with self._ticker.lock:  # thousands may wait: nothing here looks at all of them
            before = len(pool.waiting)
            if seen.first:
                first = rec.place_of_waiting(seen.first)[1]
                before = bisect.bisect_left(pool.waiting, first, key=lambda waiter: waiter.place)
            granted = grant(figures, len(seen.others) + len(pool.using), seen.shares.last, before, now)
            begin = pool.waiting[: granted.count]
            left = pool.waiting[granted.count] if granted.count < len(pool.waiting) else None
            using = (*pool.using, *(waiter.run_id for waiter in begin)) if counts else ()
            gone = pool.stale | ({waiter.place for waiter in begin} & pool.rows)
            shows = left if left is not None and left.place not in pool.rows else None
            # Of a step any row will do, as long as nobody else waits: he would let this process go first.
            is_shown = shows is None or bool(pool.rows and not shows.run_id and not seen.first)
        held = (*seen.others, *((self._store.process.id, run_id) for run_id in using)) if counts else ()
        new = Shares(held, granted.last if paces else None)
        if left is None and not held and new.last and figures and grant(figures, 0, new.last, 1, now).count:
            new = Shares()  # nobody needs to know any more when the last one began
        is_other = sorted(new.held) != sorted(seen.shares.held) or new.last != seen.shares.last
        commit, shown = None, set[int]()
        if is_other or not is_shown or (gone and (seen.first or left is None)):
            commit = self._commit(pool, seen, new, shows, gone)
            shown = {shows.place} if shows is not None else shown
        else:
            gone = set()
        if left is None or granted.left_s is not None:
            look_s = None
        elif seen.others or seen.first:
            look_s = min(max((time.monotonic() - pool.changed_s) / 4, _SOON_S), _LATE_S)
        else:
            look_s = _ALONE_S
        return _Plan(pool, begin, granted.left_s, look_s, commit, shown, gone)

    def _look(self, pool: _Pool, *, is_waited_for: bool) -> _Seen:
        journal, signer = self._store.journal, self._store.signer
        row, figures = journal.get(pool.shares_key), self._figures(pool.name)
        shares = unpack(signer, pool.shares_key, row, Shares) if row else Shares()
        alive: dict[str, bool] = {self._store.process.id: True}
        others = tuple(
            (owner, run_id)
            for owner, run_id in shares.held
            # A run that was taken over from a process that is stopped brings its share along.
            if owner != self._store.process.id and not (run_id and pool.runs[run_id])
            if not is_waited_for or self._is_alive(owner, alive)
        )
        first, dead = "", list[str]()
        if is_waited_for:
            has_room = grant(figures, len(others) + len(pool.using), shares.last, 1, self._clock.now()).count > 0
            first, dead = self._first_elsewhere(pool, alive, has_room=has_room)
        if (row, first) != pool.seen:
            pool.seen, pool.changed_s = (row, first), time.monotonic()
        return _Seen(row, shares, figures, others, first, tuple(dead))

    def _figures(self, name: str) -> Figures | None:
        key = rec.limit_key(name)
        row = self._store.journal.get(key)
        return unpack(self._store.signer, key, row, Figures) if row else None

    def _first_elsewhere(self, pool: _Pool, alive: dict[str, bool], *, has_room: bool) -> tuple[str, list[str]]:
        """Who of the others is to be let go first, and rows of dead ones."""
        journal, firsts, dead = self._store.journal, list[str](), list[str]()
        of, key = (pool.name, pool.key), ""
        while key := journal.first(rec.waiting_prefix(*of), key) or "":
            process_id = rec.place_of_waiting(key)[0]
            if not self._is_alive(process_id, alive):
                dead += [key for key, _ in journal.sizes(rec.waiting_prefix(*of, process_id))]
            elif process_id != self._store.process.id:
                firsts.append(key)
            key = rec.waiting_prefix(*of, process_id) + "~"  # behind all of that process
        # A process that is stopped, or that has other things to do, must not keep all others waiting.
        now_s = time.monotonic()
        pool.passed_over &= set(firsts)
        pool.slow = {key: pool.slow.get(key, now_s) for key in firsts} if has_room else {}
        pool.passed_over |= {key for key, since_s in pool.slow.items() if _is_too_slow(key, now_s - since_s)}
        waiting = [key for key in firsts if key not in pool.passed_over]
        return min(waiting, key=lambda key: rec.place_of_waiting(key)[1], default=""), dead

    def _is_alive(self, process_id: str, known: dict[str, bool]) -> bool:
        if process_id not in known:
            known[process_id] = self._store.process.is_alive(process_id)
        return known[process_id]

    def _commit(self, pool: _Pool, seen: _Seen, new: Shares, shows: _Waiter | None, gone: set[int]) -> Commit:
        """The shares' row, a row for who waits, and without those of who doesn't any more."""
        signer, of = self._store.signer, (pool.name, pool.key, self._store.process.id)
        puts: list[tuple[str, bytes]] = []
        deletes = [*seen.dead, *(rec.waiting_key(*of, place) for place in gone)]
        if shows is not None:
            key = rec.waiting_key(*of, shows.place)
            puts.append((key, signer.sign(key, shows.run_id.encode())))
        if new.held or new.last:
            puts.append((pool.shares_key, pack(signer, pool.shares_key, new)))
        elif seen.row:
            deletes.append(pool.shares_key)
        return Commit((pool.shares_key, seen.row), puts=tuple(puts), deletes=tuple(deletes))

    def _done(self, plan: _Plan) -> None:
        """What was planned is on disk."""
        pool = plan.pool
        with self._ticker.lock:
            pool.rows = (pool.rows - plan.gone) | plan.shown
            pool.stale -= plan.gone
            for waiter in plan.granted:
                if waiter in pool.waiting:
                    pool.waiting.remove(waiter)
                    pool.using.append(waiter.run_id)
                    pool.stale |= {waiter.place} & pool.rows  # where a step was let in without a commit
                    waiter.is_granted = True
                    waiter.tell(0.0)
                else:  # it has given up meanwhile: what was taken for it is given back
                    self._ticker.soon(pool)
            unsaid, pool.unsaid = pool.unsaid, []
            for waiter in unsaid:
                if not waiter.is_granted:
                    waiter.say_so()
            now_s = time.monotonic()
            if plan.left_s is not None:
                pool.beginning = [until_s for until_s in pool.beginning if until_s > now_s]
                until_s = now_s + min(max(plan.left_s / 4, _BEGINS_S[0]), _BEGINS_S[1])
                pool.beginning += [until_s] * len(plan.granted)
            if pool.waiting and plan.left_s is not None and pool.beginning:
                self._ticker.soon(pool, min(pool.beginning) - now_s)
            elif pool.waiting and plan.left_s is not None and not pool.waiting[0].is_told:
                pool.waiting[0].is_told = True
                pool.waiting[0].tell(plan.left_s)
            if pool.waiting and plan.look_s is not None:
                self._ticker.soon(pool, plan.look_s)
            if pool.is_idle and not self._ticker.is_due(pool):
                self._pools.pop((pool.name, pool.key), None)


def _is_too_slow(key: str, waited_s: float) -> bool:
    """Does the process of that row not take what it could have, so long already?"""
    pid = rec.place_of_waiting(key)[0].partition("-")[0]
    is_stopped = waited_s >= _STOPPED_S and pid.isdigit() and process_state(int(pid)).startswith("stopped")
    return is_stopped or waited_s >= _PATIENCE_S
