"""Time as a run sees it: two clocks, durations as people write them, and how much of a wait is left."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

RECHECK_S = 30.0
"""A suspended laptop stops the loop's clock: no wait trusts it for longer than this."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d)(?![a-z])")
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*/\s*(\d*(?:\.\d+)?\s*[a-z]+)")
_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # macOS: its monotonic clock counts while asleep


@dataclass(frozen=True, slots=True)
class Instant:
    """One moment on both clocks: unix seconds, and seconds since the boot named by `boot` ('' where unknown)."""

    wall_s: float
    boot: str
    boot_s: float


class Clock(Protocol):
    """Where a run gets its time from."""

    def now(self) -> Instant:
        """This moment."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` of the loop's time pass."""
        ...

    async def wait(self, seconds: float, is_busy: Callable[[], bool]) -> bool:
        """The same for a time-out, beside bodies that may be at work; True where the time is over, whatever `now` says."""
        ...

    async def listen(self, seconds: float, arrival: asyncio.Future[Any], is_busy: Callable[[], bool]) -> None:
        """The same, or less, where something may come from outside: returns at once when `arrival` is done. `is_busy`: is a
        body at work that may bring it?"""  # fmt: skip
        ...


class SystemClock:
    """The machine's clocks."""

    def __init__(self) -> None:
        try:
            self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:  # not Linux: waits that cross a restart of the kernel go by the wall clock
            self._boot = ""

    def now(self) -> Instant:
        return Instant(time.time(), self._boot, time.clock_gettime(_BOOTTIME))

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def wait(self, seconds: float, is_busy: Callable[[], bool]) -> bool:  # noqa: ARG002  all time is real
        await asyncio.sleep(seconds)
        return False

    async def listen(self, seconds: float, arrival: asyncio.Future[Any], is_busy: Callable[[], bool]) -> None:  # noqa: ARG002
        await asyncio.wait({arrival}, timeout=min(seconds, RECHECK_S))


def elapsed_s(since: Instant, now: Instant) -> float:
    """Seconds that have passed: by the boot clock within one boot; across boots by the wall clock, 0 where it was set back."""
    same = since.boot and since.boot == now.boot
    return max(now.boot_s - since.boot_s if same else now.wall_s - since.wall_s, 0.0)


def remaining_s(started: Instant, duration_s: float, now: Instant) -> float:
    """Seconds left of a wait; 0 when it is over.

    Within one boot the boot clock decides, which nobody can set. Across boots the wall clock does; set back, it can't
    make the wait longer than it was.
    """
    if started.boot and started.boot == now.boot:
        left = duration_s - (now.boot_s - started.boot_s)
    else:
        left = min(duration_s, duration_s - (now.wall_s - started.wall_s))
    return max(left, 0.0)


def parse_duration(value: object) -> timedelta:
    """Seconds, a timedelta, or text such as "90s", "15m", "2h", "7d", "1h30m" (7d = 168 h), "7 days".

    ValueError where it is negative, NaN, infinite, or text without units.
    """
    __tracebackhide__ = True
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        text = value.replace(" ", "")
        parts = _PART.findall(text)
        if not parts or "".join(n + u for n, u in parts) != text:
            raise ValueError(
                f"{value!r} is not a duration: write seconds as a number, or text like '90s', '15m', '1h30m', '7d'"
            )
        seconds = sum(float(n) * _UNITS[u[0]] for n, u in parts)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            seconds = float(value)
        except OverflowError:
            seconds = math.inf
    else:
        raise ValueError(f"{value!r} is not a duration: write seconds, a timedelta, or text like '90s'")  # noqa: TRY004  one error for one mistake
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{value!r} is not a duration: it must be finite and not negative")
    try:
        return timedelta(seconds=seconds)
    except OverflowError:
        raise ValueError(f"{value!r} is not a duration: it is longer than {timedelta.max.days} days") from None


def parse_rate(value: object) -> float:
    """Seconds from one to the next of "60/min", "5/s", "1000/h", "10/15min". ValueError for anything else."""
    __tracebackhide__ = True
    if isinstance(value, str) and (found := _RATE.fullmatch(value.strip())) is not None:
        count, each = float(found[1]), found[2].strip()
        with contextlib.suppress(ValueError):
            each_s = parse_duration(each if each[0].isdigit() else f"1{each}").total_seconds()
            if count > 0 and each_s > 0:
                return each_s / count
    raise ValueError(f"{value!r} is not a rate: write how many in what time, such as '60/min', '5/s' or '1000/h'")


def parse_when(value: object) -> datetime:
    """A datetime (naive = local time), ISO text, or unix seconds, as an aware datetime. ValueError otherwise."""
    __tracebackhide__ = True
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            if value.tzinfo is None:  # astimezone puts an hour that the clocks skip in spring before the gap
                value = datetime.fromtimestamp(value.timestamp(), UTC)
            return value.astimezone()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        pass
    raise ValueError(f"{value!r} is not a point in time: write a datetime, ISO text like '2027-01-31T09:00', or unix seconds")


def say_duration(seconds: float) -> str:
    """Short, as people say it: '61 ms', '3.2 s', '12 min 5 s', '2 h 3 min', '6 d 23 h'."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, big, small_size, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small_size
            return f"{whole // size} {big}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"


def say_when(at: float | None) -> str:
    """A moment, in unix seconds: the time where it is today, else the day too; '' where there is none."""
    if at is None:
        return ""
    then, today = datetime.fromtimestamp(at).astimezone(), datetime.now().astimezone()
    return f"{then:%H:%M:%S}" if then.date() == today.date() else f"{then:%Y-%m-%d %H:%M}"
