"""Due times of cron expressions, in a time zone. cronsim reads the expressions: it does nothing else, and knows summer time.

A local time that comes twice in autumn is due once, at its first; one that doesn't come in spring is due at the change.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from functools import cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError


def check(cron: str, tz: str) -> None:
    """ValueError where the expression or the zone is none, or the expression never comes."""
    zone = _zone(tz)
    try:
        due = next(CronSim(cron, datetime.now(zone)), None)
    except CronSimError as error:
        raise ValueError(
            f"cron={cron!r}: {str(error)[0].lower()}{str(error)[1:]}. Write five fields, minute hour day month weekday as in "
            "'0 7 * * mon-fri', or six, with seconds first"
        ) from None
    if due is None:
        raise ValueError(f"cron={cron!r} never comes")


def local_zone() -> str:
    """The name of this machine's time zone."""
    from tzlocal import get_localzone_name

    return get_localzone_name() or "UTC"


def after(cron: str, tz: str, at_s: float) -> Iterator[datetime]:
    """The due times after a moment, in order; unix seconds in, local times out."""
    return _once(CronSim(cron, datetime.fromtimestamp(at_s, _zone(tz))))


def last_before(cron: str, tz: str, at_s: float) -> datetime | None:
    """The newest due time up to a moment."""
    due = datetime.fromtimestamp(int(at_s) + 1, _zone(tz))
    return next(_once(CronSim(cron, due, reverse=True)), None)


def _once(found: Iterator[datetime]) -> Iterator[datetime]:
    return (due for due in found if not due.fold)


@cache
def _zone(tz: str) -> ZoneInfo:
    try:
        return ZoneInfo(tz)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"tz={tz!r} is no time zone; write a name such as 'Europe/Berlin' or 'UTC'") from None
