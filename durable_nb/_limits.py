"""`limit`: how many runs or steps of all processes of a store may be at work at once, and how often one may begin."""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from datetime import date, time
from typing import Any
from uuid import UUID

from durable_nb._clock import parse_rate
from durable_nb._current import Limit, declared, is_engine_in_use, limits
from durable_nb._misuse import explained
from durable_nb._records import plain

log = logging.getLogger("durable_nb")

_PLAIN = (int, float, bytes, UUID, date, time, enum.Enum, type(None))


@explained
def limit(name: str, *, concurrency: int | None = None, rate: str | None = None) -> Limit:
    """A limit of the store under that name, shared by all its processes and kept over restarts.

    It is given to `@durable.workflow(limit=...)`, `durable.step(fn, limit=...)` and `durable.map(..., limit=...)`, and may be
    made at import, before a store is open. Called again under a used name with other figures, in whatever process, the last
    figures hold, and one line tells of it.

    concurrency  so many at once: runs from their first line to their end, asleep or not; steps while an attempt is at work
    rate         at most so many in a time, evenly spaced: "60/min", "5/s", "1000/h"

    A process that dies, however it dies, gives its shares back at once; one that is stopped keeps them.
    """
    __tracebackhide__ = True
    if not isinstance(name, str):
        raise TypeError(f"durable.limit({name!r}): the first argument is the limit's name, a text such as 'openai'")
    if not name.strip():
        raise ValueError(f"durable.limit({name!r}): the name is empty; write one such as 'openai'")
    what = f"durable.limit({name!r}, ...)"
    if concurrency is None and rate is None:
        raise ValueError(f"{what}: it limits nothing; give concurrency=8, rate='60/min' or both")
    if concurrency is not None and (not isinstance(concurrency, int) or isinstance(concurrency, bool) or concurrency < 1):
        raise ValueError(f"{what}: concurrency={concurrency!r}; write how many may be at work at once, 1 or more")
    if rate is not None:
        try:
            parse_rate(rate)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
    name = plain(name)
    before, made = limits.get(name), declared(name, concurrency, rate)
    if before is not None and before.figures != made.figures and not is_engine_in_use():  # else that has told of it
        log.warning("the limit %r was %s, and is %s from now on", name, before.figures, made.figures)
    return made


def checked_limit(what: str, value: object) -> Limit:
    """The limit that was given as an option; TypeError where it is something else."""
    __tracebackhide__ = True
    if not isinstance(value, Limit):
        raise TypeError(f"{what}: limit={value!r}; give what durable.limit('a name', concurrency=8) returns; nothing was run")
    return value


def key_of(what: str, key: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What a workflow's key function says of these arguments, as a text. ValueError where it raises, TypeError where it says
    something that is not the same in every process."""  # fmt: skip
    __tracebackhide__ = True
    try:
        found = key(*args, **kwargs)
    except Exception as error:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ValueError(f"{what}: its key function raised {said}; nothing was started") from error
    if isinstance(found, str):
        return plain(found)
    if isinstance(found, _PLAIN) or (isinstance(found, tuple) and all(isinstance(part, (str, *_PLAIN)) for part in found)):
        return repr(found)
    raise TypeError(
        f"{what}: its key function returned a {type(found).__name__}; nothing was started. Return a text, a number or "
        "a tuple of these"
    )
