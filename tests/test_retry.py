"""Whether and when a failed attempt is tried again."""

from __future__ import annotations

import asyncio
import math
import time
import urllib.error
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import format_datetime

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import durable_nb as durable
from durable_nb._retry import RetryPolicy, asked_delay_s, http_status, is_transient, retry_delay_s
from durable_nb.errors import (
    DurableError,
    LeaseLost,
    NestedStepError,
    NonRetryableError,
    NotInRunError,
    RetryAfter,
    StoreError,
    UnserializableError,
)

DEFAULT = RetryPolicy()


def answered(status, **headers):
    """What httpx's raise_for_status raises."""
    request = httpx.Request("GET", "http://far.end/")
    response = httpx.Response(status, headers=headers, request=request)
    return httpx.HTTPStatusError("no", request=request, response=response)


class OwnStatus(Exception):
    """An exception that carries its status itself, under one of the usual names."""

    def __init__(self, name, status):
        super().__init__(name, status)
        setattr(self, name, status)


WORTH_IT = [
    ConnectionError(),
    ConnectionResetError(),
    BrokenPipeError(),
    TimeoutError(),
    asyncio.IncompleteReadError(b"", 1),
    OSError("disk"),
    InterruptedError(),
    BlockingIOError(),
    RuntimeError("rate limited"),
    Exception("who knows"),
    EOFError(),
    MemoryError(),
    httpx.ConnectError("no"),
    httpx.ReadTimeout("slow"),
    RetryAfter(1),
    ExceptionGroup("several", [ValueError()]),
]
POINTLESS = [
    TypeError(),
    NameError(),
    UnboundLocalError(),
    AttributeError(),
    SyntaxError(),
    IndentationError(),
    ImportError(),
    ModuleNotFoundError(),
    AssertionError(),
    NotImplementedError(),
    ValueError(),
    UnicodeDecodeError("utf-8", b"", 0, 1, "no"),
    LookupError(),
    KeyError(),
    IndexError(),
    ArithmeticError(),
    ZeroDivisionError(),
    OverflowError(),
    FileNotFoundError(),
    FileExistsError(),
    IsADirectoryError(),
    NotADirectoryError(),
    PermissionError(),
    NonRetryableError(),
    DurableError(),
    UnserializableError(),
    NestedStepError(),
    NotInRunError(),
    LeaseLost(),
    StoreError(),
]


@pytest.mark.parametrize("error", WORTH_IT, ids=repr)
def test_what_may_pass_is_tried_again(error):
    assert is_transient(error)
    assert retry_delay_s(DEFAULT, 1, error, 0.5) is not None


@pytest.mark.parametrize("error", POINTLESS, ids=repr)
def test_what_cannot_pass_is_not(error):
    assert not is_transient(error)
    assert retry_delay_s(DEFAULT, 1, error, 0.5) is None


def test_of_the_4xx_statuses_only_408_and_429_are_tried_again():
    refused = {status for status in range(100, 600) if not is_transient(answered(status))}
    assert refused == set(range(400, 500)) - {408, 429}


@pytest.mark.parametrize("name", ["status_code", "status", "code"])
@pytest.mark.parametrize(("status", "again"), [(404, False), (429, True), (503, True)])
def test_a_status_is_found_under_every_usual_name(name, status, again):
    error = OwnStatus(name, status)
    assert http_status(error) == status
    assert is_transient(error) is again


def test_the_statuses_of_urllib():
    """HTTPError is an OSError, which alone would be tried again."""
    for status in (404, 503):
        with urllib.error.HTTPError("http://far.end/", status, "no", Message(), None) as error:
            assert is_transient(error) is (status == 503)


@pytest.mark.parametrize("value", ["404", None, 4, 1000, 40.4, "E404", lambda: 404])
def test_what_is_no_http_status_is_not_taken_for_one(value):
    """`code` and `status` are common names: of exit codes, gRPC codes, and texts."""
    assert http_status(OwnStatus("code", value)) is None
    assert is_transient(OwnStatus("status", value))


def test_a_response_without_a_status_is_no_trouble():
    error = RuntimeError()
    error.response = None
    assert is_transient(error)


# -- when -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.floats(0, 1, exclude_max=True))
def test_the_default_backoff_doubles_from_one_second_to_sixty_with_jitter(attempt, jitter):
    """Between half and the whole of 1, 2, 4 ... 60 s, however many attempts there were."""
    step = min(60.0, 2.0 ** min(attempt - 1, 10))
    delay = retry_delay_s(RetryPolicy(retries=10_000), attempt, ConnectionError(), jitter)
    assert step / 2 <= delay <= step


def test_the_number_of_retries_is_kept():
    policy = RetryPolicy(retries=2)
    assert [retry_delay_s(policy, n, ConnectionError(), 0.0) is not None for n in (1, 2, 3)] == [True, True, False]
    assert retry_delay_s(RetryPolicy(retries=0), 1, ConnectionError(), 0.0) is None
    assert retry_delay_s(RetryPolicy(retries=0), 1, RetryAfter(1), 0.0) is None


@pytest.mark.parametrize(
    ("backoff", "delays"),
    [
        (5, [5, 5, 5]),
        (0, [0, 0, 0]),
        (lambda attempt: attempt * 10, [10, 20, 30]),
        (lambda attempt: timedelta(minutes=attempt), [60, 120, 180]),
        (lambda attempt: f"{attempt}h", [3600, 7200, 10800]),
    ],
)
def test_a_backoff_of_ones_own_is_taken_without_jitter(backoff, delays):
    policy = RetryPolicy(backoff=backoff)
    assert [retry_delay_s(policy, n, ConnectionError(), 0.7) for n in (1, 2, 3)] == delays


@pytest.mark.parametrize(("delay", "seconds"), [(7, 7), ("90s", 90), (timedelta(hours=1), 3600), (0, 0)])
def test_retry_after_says_when(delay, seconds):
    for policy in (DEFAULT, RetryPolicy(backoff=3), RetryPolicy(retry_on=KeyError), RetryPolicy(retry_on=lambda _: False)):
        assert retry_delay_s(policy, 1, RetryAfter(delay), 0.5) == seconds


def test_a_delay_or_a_rule_that_is_none_is_told_where_it_is_written():
    """Not when the step has failed, instead of its error."""
    with pytest.raises(ValueError, match="'90x' is not a duration"):
        RetryAfter("90x")
    for rule in ("OSError", ("OSError",)):
        with pytest.raises(TypeError, match="give exception types, or a function"):
            durable.step(len, retry_on=rule)
    for right in (OSError, (OSError, KeyError), lambda error: True, None):
        durable.step(len, retry_on=right)


@pytest.mark.parametrize("status", [429, 503])
def test_the_retry_after_header_in_seconds(status):
    assert retry_delay_s(DEFAULT, 1, answered(status, **{"Retry-After": "17"}), 0.5) == 17


def test_the_retry_after_header_as_a_date():
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 95 <= asked_delay_s(answered(503, **{"retry-after": later})) <= 100
    past = format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)
    assert asked_delay_s(answered(503, **{"retry-after": past})) == 0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "Retry-After": "1"}, 0.25),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0.5s"}, 360.5),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}, 0.02),
        ({"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "6m0s"}, None),
        ({"ratelimit-remaining": "0", "ratelimit-reset": "30"}, 30),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "soon"}, None),
        ({"anthropic-ratelimit-requests-remaining": "0", "anthropic-ratelimit-requests-reset": "2020-01-01T00:00:00Z"}, 0),
        ({"Retry-After": "2", "x-ratelimit-remaining": "0", "x-ratelimit-reset": "99"}, 2),
    ],
)
def test_what_the_headers_of_an_answer_ask_for(headers, seconds):
    """Retry-After, else when a rate limit that is used up is reset."""
    assert asked_delay_s(answered(429, **headers)) == seconds


def test_a_rate_limit_may_be_reset_at_a_point_in_time():
    at = str(int(time.time()) + 3000)
    assert 2900 < asked_delay_s(answered(429, **{"x-ratelimit-remaining": "0", "x-ratelimit-reset": at})) <= 3000


@pytest.mark.parametrize(
    "text",
    ["", "soon", "-5", "1.5", "\u00b2", "Wed", "9" * 400, "99999999999999", "Wed, 99 Foo 2020 99:99:99 GMT", "1 Jan 1 -0000"],
)
def test_a_senseless_header_leaves_a_delay_one_can_wait_for(text):
    """The far end's header decides how long, never that the step breaks or waits for ever."""
    error = answered(503)
    error.response = httpx.Response(503, headers=[(b"retry-after", text.encode())])
    delay = retry_delay_s(DEFAULT, 1, error, 0.5)
    assert math.isfinite(delay)
    assert timedelta(seconds=delay) + datetime.now(UTC)  # as a wake-up time it can be said and stored


# -- what is retried, by the user's word ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "retry_on",
    [KeyError, LookupError, (ZeroDivisionError, KeyError), lambda error: error.args == ("k",)],
    ids=["class", "base", "tuple", "function"],
)
def test_retry_on_replaces_the_default_rule(retry_on):
    policy = RetryPolicy(retry_on=retry_on)
    assert retry_delay_s(policy, 1, KeyError("k"), 0.0) == 0.5
    assert retry_delay_s(policy, 1, ConnectionError(), 0.0) is None
    assert retry_delay_s(policy, 4, KeyError("k"), 0.0) is None


@pytest.mark.parametrize("retry_on", [None, Exception, NonRetryableError, lambda _: True])
def test_non_retryable_gives_up_whatever_is_asked(retry_on):
    class Own(NonRetryableError):
        pass

    for error in (NonRetryableError("no"), Own()):
        assert retry_delay_s(RetryPolicy(retry_on=retry_on, retries=9), 1, error, 0.0) is None


def test_an_empty_tuple_retries_nothing():
    assert retry_delay_s(RetryPolicy(retry_on=()), 1, ConnectionError(), 0.0) is None
