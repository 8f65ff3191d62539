"""Durable HTTP: a request whose response is recorded, so that it is sent once.

`call` is a verb, on httpx; `AsyncClient` and `Client` are httpx's own, or httpx2's, whose requests are steps when made in a
run. A response is recorded as it came and made anew from that, live and restored alike; credentials of the request are in
neither.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from durable_nb import _exchange
from durable_nb._clock import parse_duration
from durable_nb._current import Run, StandsFor, StepRequest, run_for
from durable_nb._exchange import Credentials, Line, StatusError
from durable_nb._misuse import explained
from durable_nb._redaction import said
from durable_nb._retry import RetryPolicy, is_transient
from durable_nb._verbs import check_name

if TYPE_CHECKING:
    import httpx

    from durable_nb._clients import AsyncClient as AsyncClient  # noqa: PLC0414  # handed on
    from durable_nb._clients import Client as Client  # noqa: PLC0414

TIMEOUT_S, CONNECT_TIMEOUT_S = 60.0, 10.0


@explained
def call(
    name: str,
    url: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
    json: Any = None,
    content: str | bytes | None = None,
    data: Mapping[str, Any] | None = None,
    timeout: float | str | timedelta | None = None,
    total_timeout: float | str | timedelta | None = None,
    retries: int = 3,
    vary: Iterable[str] = (),
) -> Coroutine[Any, Any, httpx.Response]:
    """Send a request as the step `name`, or return its recorded response.

    Identified by name, method, URL, body, the headers Accept, Content-Type and `anthropic-*`, and those named in `vary`.
    Network errors, 408, 429 and 5xx are tried again (Retry-After and rate-limit headers count); after that, and for any other
    status, the response is returned whatever its status: `response.raise_for_status()` is yours to call. One with a status of
    400 or more is not kept in a cell, so the next execution asks again. On other methods than GET an `Idempotency-Key` is sent
    unless `headers` has one.

    `timeout`: of each attempt as a whole; by default 60 s for sending and each read, 10 s for connecting. `total_timeout`: no
    attempt begins later than this after the first one, pauses and restarts included. The response carries
    a request without credentials; `Set-Cookie` is redacted. Redirects are not followed, as in httpx. `durable.secret(name)`
    may stand in headers, in the URL and in the body.
    """
    __tracebackhide__ = True
    import httpx

    name = check_name("call", name)
    run = run_for("call")
    if isinstance(content, Iterable) and not isinstance(content, (str, bytes, bytearray, memoryview)):
        raise TypeError(
            f"durable.call({name!r}, {said(url)!r}): content is a {type(content).__name__}, which can be read only once, and a "
            "request may have to be sent again; nothing was sent. Give bytes or text: b''.join(content)"
        )
    url = str(url) if type(url).__name__ == "URL" else url  # of httpx or httpx2
    if not isinstance(method, str) or not isinstance(url, str):
        raise TypeError(f"durable.call({name!r}, ...): the URL and the method are texts; nothing was sent")
    if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
        raise ValueError(f"durable.call({name!r}, {said(url)!r}, retries={retries!r}): write how many attempts may follow the "
                         "first one, 0 or more; nothing was sent")  # fmt: skip
    try:
        limit_s, total_s = (
            None if limit is None else parse_duration(limit).total_seconds() for limit in (timeout, total_timeout)
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"durable.call({name!r}, {said(url)!r}, timeout=...): {error}; nothing was sent") from None
    connect_s = CONNECT_TIMEOUT_S if limit_s is None else limit_s
    limits = httpx.Timeout(TIMEOUT_S if limit_s is None else limit_s, connect=connect_s).as_dict()
    try:
        request = httpx.Request(
            method,
            url,
            headers=headers,
            params=params,
            json=json,
            content=content,
            data=data,
            extensions={"timeout": limits},
        )
    except (httpx.InvalidURL, TypeError, ValueError) as error:
        raise ValueError(
            f"durable.call({name!r}, {said(url)!r}): {error}; nothing was sent"
        ) from None  # its cause may hold a header's value
    if request.url.scheme not in ("http", "https") or not request.url.host:
        raise ValueError(
            f"durable.call({name!r}, {said(url)!r}): the URL needs http:// or https:// and a host; nothing was sent"
        )
    sent, credentials = _exchange.as_data(request, keyed=method.upper() != "GET", limit_s=limit_s)
    _exchange.redact_log_of("httpx")
    step = ask(
        run, "call", name, _exchange.exchange, (sent, credentials, Line()), _exchange.described(request, vary), retries, total_s
    )
    return _answer(run, step, name, request, credentials)


def ask(
    run: Run,
    kind: str,
    name: str,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    described: Any,
    retries: int,
    total_s: float | None = None,
) -> Coroutine[Any, Any, Any]:
    """A step that sends a request by `fn(*args)`: what it has recorded. StatusError for a status of 400 or more."""
    policy = RetryPolicy(retries, retry_on=_is_worth_retrying, total_s=total_s)
    return run.step(StepRequest(kind=kind, name=name, fn=fn, args=args, described=described, policy=policy))


def _is_worth_retrying(error: BaseException) -> bool:
    import httpx

    if isinstance(error, StatusError):
        return error.recorded["status"] in (408, 429) or error.recorded["status"] >= 500
    if isinstance(error, httpx.DecodingError):  # half an answer, or a proxy's page in place of one
        return True
    if not isinstance(error, httpx.TransportError) or isinstance(error, httpx.UnsupportedProtocol):
        return False
    return is_transient(error) and "CERTIFICATE_VERIFY_FAILED" not in str(error)  # the certificate stays what it is


async def _answer(
    run: Run, step: Coroutine[Any, Any, Any], name: str, request: httpx.Request, credentials: Credentials
) -> httpx.Response:
    try:
        return _restored(await step, name, request, credentials)
    except StatusError as refused:
        response = _restored(refused.recorded, name, request, credentials)
        run.publish(StandsFor(refused, response))
        return response


def _restored(recorded: dict[str, Any], name: str, request: httpx.Request, credentials: Credentials) -> httpx.Response:
    import httpx

    from durable_nb._response import Response

    response: Response = _exchange.restored(recorded, httpx, request, credentials, Response)
    response.step_name = name
    return response


def __getattr__(name: str) -> Any:
    """`AsyncClient` and `Client` need httpx, or httpx2, which take their time to load."""
    if name not in ("AsyncClient", "Client"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from durable_nb import _clients

    return getattr(_clients, name)
