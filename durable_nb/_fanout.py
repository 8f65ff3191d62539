"""Fan-out: one function over many items, a step for each, so many at a time.

In a cell an item is asked for when there is room for it, so that 10,000 of them take no more memory than their results. In a
workflow, whose history tells what was asked for between two deliveries, all are asked for at once and begin when there is room.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from contextvars import copy_context
from typing import Any

from durable_nb._clock import Clock, parse_rate
from durable_nb._current import CalledOff, Items, Limit, Run, StandsFor, run_for
from durable_nb._limits import checked_limit
from durable_nb._misuse import explained, missing_name
from durable_nb._retry import asked_delay_s
from durable_nb._verbs import READ_ONCE, as_step, check_name
from durable_nb.errors import LeaseLost, NestedStepError, NonDeterminismError, NotInRunError, NotSupportedError, StoreError

_AHEAD = 256
"""So many items may wait, for their turn or for another attempt, beside those at work: a server that is down must not have
the whole list wait for it."""
_TURN = 64
"""So many items are asked for at a time where all of them are."""
_LOOK_S = 1.0
"""So soon whoever waits for its time sees that nobody wants it any more."""
_MOST_THREADS = 1000

_NO_ITEMS = (StoreError, LeaseLost, NonDeterminismError, NotInRunError, NestedStepError, NotSupportedError)
"""Not an item's own failure: not collected."""


@explained
def map(  # noqa: A001  the word users say
    name: str,
    fn: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    concurrency: int = 8,
    rate: str | None = None,
    on_error: str = "raise",
    limit: Limit | None = None,
) -> Coroutine[Any, Any, list[Any]]:
    """Run `fn(item)` as a step `name[0]`, `name[1]`, ... for each of the items; their results in order.

    In a cell a step is identified by `name`, the code of `fn` and the item, not by its place: executed again, new items run and
    the others are restored, in whatever order they come. `durable.step(fn, retries=5, timeout="30s")` in place of `fn` says how
    each of them is run.

    concurrency  so many bodies are at work at once; an item that waits for its next attempt is not counted. Plain functions run
                 in worker threads, of which there may be 1,000
    rate         at most so many attempts in a time, evenly spaced: "60/min", "5/s", "1000/h". A server that asks for a pause
                 (Retry-After, or RetryAfter raised by `fn`) gets it from all items
    on_error     "raise": after the first item that fails for good none begins, those at work are finished and recorded, and its
                 exception is raised. "collect": all are tried, and the exception stands in the item's place
    limit        what `durable.limit` returns: each attempt holds a share of it, beside `concurrency` and `rate`
    """
    __tracebackhide__ = True
    if callable(name) and not isinstance(name, str):
        raise TypeError(missing_name("map", (name, fn)))
    name = check_name("map", name)
    if not callable(fn):
        raise TypeError(f"durable.map({name!r}, {fn!r}, ...): the second argument is the function, the third its items")
    rows = _rows(name, items)
    _check_concurrency(name, concurrency)
    interval_s = 0.0 if rate is None else _interval_s(name, rate)
    if limit is not None:
        checked_limit(f"durable.map({name!r}, ...)", limit)
    if on_error not in ("raise", "collect"):
        raise ValueError(f"durable.map({name!r}, ..., on_error={on_error!r}): write 'raise' or 'collect'; nothing was run")
    run = run_for("map")
    step, before, options = as_step(fn)
    if concurrency > _MOST_THREADS and step.in_thread:
        raise ValueError(
            f"durable.map({name!r}, ..., concurrency={concurrency}): a plain function runs in threads, of which there may be "
            f"{_MOST_THREADS:,}; nothing was run. Make it an async function, or write concurrency={_MOST_THREADS}"
        )
    throttle = Throttle(concurrency, interval_s)
    many = Items(name, len(rows))
    run.publish(many)

    def ask(place: int) -> Coroutine[Any, Any, Any]:
        given = (*before, rows[place])
        more = {
            "pace": throttle,
            "threads": concurrency,
            "item": place,
            "items": many,
            "awaited_at_once": not run.is_replayed,
        }
        return step.ask("map", name, given, options, (limit,) if limit is not None else (), **more)

    if run.is_replayed:
        first = [ask(place) for place in range(min(_TURN, len(rows)))]  # asked for now, so that a missing 'await' is told

        def asked(place: int) -> Coroutine[Any, Any, Any]:
            return first[place] if place < _TURN else ask(place)

        return _results(run, asked, many, throttle, math.inf, on_error == "collect")
    return _results(run, ask, many, throttle, concurrency + _AHEAD, on_error == "collect")


async def _results(
    run: Run,
    ask: Callable[[int], Coroutine[Any, Any, Any]],
    many: Items,
    throttle: Throttle,
    room: float,
    collecting: bool,
) -> list[Any]:
    """What the items come to. Raises the first failure, or what stops the wait; then no body begins any more."""
    loop = asyncio.get_running_loop()
    values: list[Any] = [None] * many.count
    tasks: set[asyncio.Task[None]] = set()
    failed: list[BaseException] = []
    changed = asyncio.Event()

    async def one(place: int) -> None:
        try:
            values[place] = await ask(place)
        except Exception as error:
            if not collecting or isinstance(error, _NO_ITEMS):
                raise
            run.publish(StandsFor(error, error))
            values[place] = error

    def ended(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            failed.append(error)
        changed.set()

    async def fewer_than(most: float) -> None:
        while len(tasks) >= most and not failed:
            changed.clear()
            await changed.wait()
        if failed:
            raise failed[0]

    try:
        for place in range(many.count):
            await fewer_than(room)
            if room == math.inf and place % _TURN == _TURN - 1:
                await asyncio.sleep(0)  # of many, the kernel's loop has a turn between
            # With a context of its own, an item belongs to the task that has called `map`, whichever others there are.
            task = loop.create_task(one(place), context=copy_context())
            tasks.add(task)
            task.add_done_callback(ended)
        await fewer_than(1)
    except BaseException:
        run.publish(CalledOff(many))
        raise
    finally:
        throttle.close()
        for task in tasks:
            task.cancel()
    return values


class Throttle:
    """Lets so many bodies be at work at once, begins them evenly spaced, and holds all of them back where a server asks for it.

    Who comes first is let in first. While a result is being written the next item may begin, for one in four of the places: a
    slow disk must not leave the server idle, nor a kill have many items asked again. As `_current.Pace` has it.
    """

    def __init__(self, concurrency: int, interval_s: float) -> None:
        self._concurrency, self._interval_s = concurrency, interval_s
        self._at_work = self._writing = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._clock: Clock | None = None
        self._next_s = -math.inf
        """When the next may begin, by the clock of this boot."""
        self._closed = False

    async def enter(self, clock: Clock) -> None:
        self._clock = clock
        await self._take_place()
        try:
            while (left_s := self._next_s - clock.now().boot_s) > 0:
                await clock.sleep(min(left_s, _LOOK_S))
                self.check()
        except BaseException:
            self.leave(returned=False)
            raise
        self._next_s = clock.now().boot_s + self._interval_s

    def heed(self, error: BaseException) -> None:
        if self._clock is not None and (pause_s := asked_delay_s(error)) is not None:
            self._next_s = max(self._next_s, self._clock.now().boot_s + pause_s)

    def returned(self) -> None:
        self._at_work -= 1
        self._writing += 1
        self._let_in()

    def leave(self, *, returned: bool) -> None:
        if returned:
            self._writing -= 1
        else:
            self._at_work -= 1
        self._let_in()

    def close(self) -> None:
        """Nothing begins any more."""
        self._closed = True
        for waiter in self._waiting:
            waiter.cancel()
        self._waiting.clear()

    def check(self) -> None:
        if self._closed:
            raise asyncio.CancelledError

    async def _take_place(self) -> None:
        self.check()
        if self._has_room():
            self._at_work += 1
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():  # the place was given already
                self.leave(returned=False)
            raise

    def _has_room(self) -> bool:
        return self._at_work + max(self._writing - self._concurrency // 4, 0) < self._concurrency

    def _let_in(self) -> None:
        while self._waiting and self._has_room():
            waiter = self._waiting.popleft()
            if not waiter.done():
                self._at_work += 1
                waiter.set_result(None)


def _rows(name: str, items: Any) -> list[Any]:
    __tracebackhide__ = True
    what = f"durable.map({name!r}, ...)"
    if isinstance(items, (str, bytes)):
        raise TypeError(
            f"{what}: the items are a {type(items).__name__}, whose items are letters; give a list, [{items!r:.40}]"
        )
    if hasattr(items, "__dataframe__") or type(items).__name__ == "DataFrame":
        raise TypeError(
            f"{what}: a frame's items are its columns; nothing was run. Give its rows, frame.to_dict('records'), or one column "
            "of it, frame['text']"
        )
    if not isinstance(items, Iterable):
        hint = "; read it first: [item async for item in ...]" if hasattr(items, "__aiter__") else ""
        raise TypeError(f"{what}: the third argument is the items, a list for instance, not a {type(items).__name__}{hint}")
    rows = list(items)
    for place, row in enumerate(rows):
        if isinstance(row, READ_ONCE):
            raise TypeError(
                f"{what}: item {place} is a {type(row).__name__}, which can be read only once; nothing was run. Give what it "
                "yields or returns"
            )
    return rows


def _check_concurrency(name: str, concurrency: object) -> None:
    __tracebackhide__ = True
    if not isinstance(concurrency, int) or isinstance(concurrency, bool) or concurrency < 1:
        raise ValueError(
            f"durable.map({name!r}, ..., concurrency={concurrency!r}): write how many may be at work at once, 1 or more; "
            "nothing was run"
        )


def _interval_s(name: str, rate: object) -> float:
    __tracebackhide__ = True
    try:
        return parse_rate(rate)
    except ValueError as error:
        raise ValueError(f"durable.map({name!r}, ..., rate=...): {error}; nothing was run") from None
