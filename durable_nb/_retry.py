"""Given a failed attempt, whether and when to try again. Pure: the engine writes the answer down and obeys it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from durable_nb._clock import parse_duration, say_duration
from durable_nb.errors import DurableError, NonRetryableError, RetryAfter, RunTimeout, StepTimeout

BASE_S, FACTOR, CAP_S = 1.0, 2.0, 60.0
LONGEST_S = 86400.0
"""A server that asks for a longer pause than a day is asked again after one."""

Backoff = Callable[[int], Any]
RetryOn = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]

PROGRAMMING_ERRORS = (
    TypeError,
    NameError,
    AttributeError,
    SyntaxError,
    ImportError,
    AssertionError,
    NotImplementedError,
)
"""Trying again can't help: the code is wrong."""

DATA_ERRORS = (
    ValueError,
    LookupError,
    ArithmeticError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
"""Trying again gives the same answer: the data or the path is wrong."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, how long apart, and after what."""

    retries: int = 3
    backoff: float | Backoff | None = None
    """Seconds, a function (attempt) -> seconds, or None: 1 s, doubling up to 60 s, with jitter."""
    retry_on: RetryOn | None = None
    total_s: float | None = None
    """No attempt begins later than this after the first one."""


USUAL = RetryPolicy()


def http_status(error: BaseException) -> int | None:
    """The HTTP status an exception carries, by the attributes that httpx, requests, aiohttp, urllib, openai use."""
    for holder in (getattr(error, "response", None), error):
        for name in ("status_code", "status", "code"):
            status = getattr(holder, name, None)
            if isinstance(status, int) and 100 <= status <= 599:
                return status
    return None


def asked_delay_s(error: BaseException) -> float | None:
    """How long the failed call asked to be left alone: RetryAfter, or what the headers of the response that it carries say,
    Retry-After (RFC 9110, 10.2.3: seconds or a date) or, of a used-up rate limit, when it is reset."""
    if isinstance(error, RetryAfter):
        return parse_duration(error.delay).total_seconds()
    found = [getattr(holder, "headers", None) for holder in (getattr(error, "response", None), error)]
    named = next(({k.lower(): str(v).strip() for k, v in dict(headers).items()} for headers in found if headers), {})
    for header, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = named.get(header, "")
        if re.fullmatch(r"\d{1,20}(\.\d{1,20})?", text):
            return min(float(text) * unit_s, LONGEST_S)
    if (at := _date_of(named.get("retry-after", ""))) is not None:
        return min(max(at - time.time(), 0.0), LONGEST_S)
    used_up = [k.replace("remaining", "reset") for k, v in named.items() if "ratelimit" in k and "remaining" in k and v == "0"]
    resets = [delay for header in used_up if (delay := _reset_delay_s(named.get(header, ""))) is not None]
    return min(max(resets), LONGEST_S) if resets else None


def _date_of(text: str) -> float | None:
    """Unix seconds of a date as HTTP writes it."""
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_EPOCH_S = 1e9
"""A larger number is a point in time: as a delay it would be thirty years."""


def _reset_delay_s(text: str) -> float | None:
    """Seconds until a rate limit is reset: "6m0s" (OpenAI), "2026-01-01T00:00:00Z" (Anthropic), seconds, or unix seconds."""
    if re.fullmatch(r"\d{1,15}(\.\d{1,15})?", text):
        number = float(text)
        return number if number < _EPOCH_S else max((number / 1000 if number > _EPOCH_S * 1000 else number) - time.time(), 0.0)
    if re.fullmatch(r"(\d{1,15}(\.\d{1,15})?(ms|s|m|h|d))+", text):
        return sum(float(n) * _UNITS_S[unit] for n, _, unit in re.findall(r"(\d+(\.\d+)?)(ms|s|m|h|d)", text))
    try:
        return max(datetime.fromisoformat(text).astimezone().timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def is_transient(error: BaseException) -> bool:
    """Could the same call succeed later? The default answer, where the user gives no `retry_on`."""
    if isinstance(error, (RetryAfter, StepTimeout)):
        return True
    if isinstance(error, (DurableError, *PROGRAMMING_ERRORS, *DATA_ERRORS)):
        return False
    status = http_status(error)
    return status is None or status in (408, 429) or not 400 <= status <= 499


def note_failure(error: BaseException, step: str, of: str, attempts: int, resume_hint: str) -> str:
    """Say in a note of the error, which the user gets, which step has failed for good; "3 attempts"."""
    tried = f"{attempts} attempt{'s' if attempts > 1 else ''}"
    error.add_note(
        f"durable_nb: step {step!r} of {of} failed after {tried}. Completed steps are kept: {resume_hint} to go on from here"
    )
    return tried


def timed_out(step: str, of: str, timeout_s: float, more: str = "") -> StepTimeout:
    """An attempt took longer than it may."""
    return StepTimeout(f"step {step!r} of {of} took longer than its timeout of {say_duration(timeout_s)}{more}")


def run_timed_out(of: str, run_id: str, timeout_s: float) -> RunTimeout:
    """A run took longer than it may."""
    return RunTimeout(
        f"{of} took longer than {say_duration(timeout_s)}, its workflow's timeout; its completed steps are kept. "
        f"durable.get_run({run_id!r}).resume() gives it that time again"
    )


def retry_delay_s(policy: RetryPolicy, attempt: int, error: BaseException, jitter: float, spent_s: float = 0.0) -> float | None:
    """Seconds until attempt number `attempt` + 1, or None to give up. `jitter` is a random number in [0, 1), `spent_s` how long
    ago the first attempt began."""
    delay = _delay_s(policy, attempt, error, jitter)
    return delay if delay is None or policy.total_s is None or spent_s + delay <= policy.total_s else None


def _delay_s(policy: RetryPolicy, attempt: int, error: BaseException, jitter: float) -> float | None:
    if attempt > policy.retries or isinstance(error, NonRetryableError) or not isinstance(error, Exception):
        return None
    wanted = policy.retry_on
    if isinstance(error, RetryAfter) or wanted is None:
        again = is_transient(error)
    elif isinstance(wanted, (type, tuple)):
        again = isinstance(error, wanted)
    else:
        again = bool(wanted(error))
    if not again:
        return None
    if (asked := asked_delay_s(error)) is not None:
        return asked
    if policy.backoff is None:
        # Between half and the whole of the exponential step: "equal jitter",
        # https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/
        return min(CAP_S, BASE_S * FACTOR ** min(attempt - 1, 30)) * (0.5 + jitter / 2)
    delay = policy.backoff(attempt) if callable(policy.backoff) else policy.backoff
    return parse_duration(delay).total_seconds()
