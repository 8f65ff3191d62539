"""Durable HTTP: a request whose response is recorded, so that it is sent once.

`call` is on httpx. A response is recorded as status, headers and content, and made anew from that, live and restored alike;
credentials of the request are in neither.
"""

from __future__ import annotations

import base64
import re
import ssl
from collections.abc import Callable, Coroutine, Iterable, Mapping
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from durable_nb import _codec
from durable_nb._clock import parse_duration
from durable_nb._current import Run, StepRequest, current_body, run_for
from durable_nb._misuse import explained
from durable_nb._retry import RetryPolicy, is_transient
from durable_nb._verbs import check_name

if TYPE_CHECKING:
    import httpx

TIMEOUT_S, CONNECT_TIMEOUT_S = 60.0, 10.0

REDACTED = "[redacted]"

_SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key", "api-key"})
_SECRET_PARAMETER = re.compile(r"key|token|secret|signature|password", re.IGNORECASE)


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
    retries: int = 3,
    vary: Iterable[str] = (),
) -> Coroutine[Any, Any, httpx.Response]:
    """Send a request as the step `name`, or return its recorded response.

    Identified by name, method, URL, body, the headers Accept, Content-Type and `anthropic-*`, and those named in `vary`.
    Network errors, 408, 429 and 5xx are tried again (Retry-After counts); after that, and for any other status, the response
    is returned whatever its status: `response.raise_for_status()` is yours to call. One with a status of 400 or more is not
    kept, so the next execution asks again. On other methods than GET an `Idempotency-Key` is sent unless `headers` has one.

    `timeout`: of connecting, sending and each read; default 60 s, 10 s for connecting. The response carries a request without
    credentials; `Set-Cookie` is redacted. Redirects are not followed, as in httpx.
    """
    __tracebackhide__ = True
    import httpx

    name = check_name("call", name)
    run = run_for("call")
    limit = httpx.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S) if timeout is None else parse_duration(timeout).total_seconds()
    try:
        request = httpx.Request(method, url, headers=headers, params=params, json=json, content=content, data=data)
    except (httpx.InvalidURL, TypeError, ValueError) as error:
        raise ValueError(
            f"durable.call({name!r}, {_said(url)!r}): {error}; nothing was sent"
        ) from None  # its cause may hold a header's value
    if request.url.scheme not in ("http", "https") or not request.url.host:
        raise ValueError(
            f"durable.call({name!r}, {_said(url)!r}): the URL needs http:// or https:// and a host; nothing was sent"
        )
    step = run.step(
        StepRequest(
            kind="call",
            name=name,
            fn=_send,
            args=(name, request, limit),
            described=_describe(request, vary),
            policy=RetryPolicy(retries, retry_on=_is_worth_retrying),
        )
    )
    return _answer(run, step, request)


async def _send(name: str, request: httpx.Request, limit: httpx.Timeout | float) -> dict[str, Any]:
    """The body of the step: the response as plain data."""
    import httpx

    body = current_body.get()
    if request.method != "GET" and body is not None:
        request.headers.setdefault("Idempotency-Key", body.idempotency_key)
    async with httpx.AsyncClient(timeout=limit, verify=_ssl_context()) as client:
        try:
            response = await client.send(request)
        except httpx.LocalProtocolError:  # its text has the header's value
            raise ValueError(
                f"durable.call({name!r}, ...): the request can't be sent as HTTP: a header holds a line break or another "
                "control character"
            ) from None
        except httpx.RequestError as error:  # what a workflow's run records of it has its request as well
            error.request = redact(request)
            raise
    recorded = _record(response)
    if response.status_code >= 400:
        raise StatusError(recorded)
    return recorded


@lru_cache(maxsize=1)
def _ssl_context() -> ssl.SSLContext:
    """httpx's own, made once: loading the certificates takes longer than many a request."""
    import httpx

    return httpx.create_ssl_context()


class StatusError(Exception):
    """A response with a status of 400 or more: an attempt that failed, unless it was the last one. Notices show its name."""

    def __init__(self, recorded: dict[str, Any]) -> None:
        super().__init__(f"{recorded['status']} {recorded['reason']}".strip())
        self.recorded = recorded
        self.response = _restore(recorded, None)

    def __reduce__(self) -> Any:
        return type(self), (self.recorded,)


def _is_worth_retrying(error: BaseException) -> bool:
    import httpx

    if isinstance(error, StatusError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol) and is_transient(error)


async def _answer(run: Run, step: Coroutine[Any, Any, Any], request: httpx.Request) -> httpx.Response:
    try:
        return _restore(await step, request)
    except StatusError as refused:
        response = _restore(refused.recorded, request)
        run.stands_for(refused, response)
        return response


def _describe(request: httpx.Request, vary: Iterable[str]) -> dict[str, Any]:
    """What the response may depend on, as far as the step's identity goes."""
    kept = {"accept", "content-type", *(header.lower() for header in vary)}
    headers = [(k.lower(), v) for k, v in request.headers.multi_items()]
    headers = sorted((k, v) for k, v in headers if k in kept or k.startswith("anthropic-"))
    url = _without_secrets(request.url, _codec.keyed_digest)
    return {"method": request.method, "url": str(url), "headers": headers, "body": request.read()}


def _without_secrets(url: httpx.URL, stand_in: Callable[[str], str]) -> httpx.URL:
    """The URL with something else in place of its userinfo and of query parameters named like a secret."""
    if url.userinfo:
        url = url.copy_with(userinfo=REDACTED.encode())
    for parameter in url.params:
        if _SECRET_PARAMETER.search(parameter):
            url = url.copy_merge_params({parameter: [stand_in(value) for value in url.params.get_list(parameter)]})
    return url


def _said(url: str) -> str:
    """An URL as messages quote it, even one that can't be parsed: without the credentials it holds."""
    url = re.sub(r"//[^/?#]*@", f"//{REDACTED}@", url)
    return re.sub(rf"([?&][^=&#]*(?:{_SECRET_PARAMETER.pattern})[^=&#]*=)[^&#]*", rf"\1{REDACTED}", url, flags=re.IGNORECASE)


def _record(response: httpx.Response) -> dict[str, Any]:
    """A response as plain data."""
    headers = [(k, REDACTED if k.lower() in _SECRET_HEADERS else v) for k, v in response.headers.multi_items()]
    # The content is decoded already, so what says how it was encoded or how long that was goes.
    headers = [(k, v) for k, v in headers if k.lower() not in ("content-encoding", "transfer-encoding", "content-length")]
    return {
        "status": response.status_code,
        "headers": [list(pair) for pair in headers],
        "content": base64.b64encode(response.content).decode(),
        "http_version": response.http_version,
        "reason": response.reason_phrase,
        "elapsed_s": response.elapsed.total_seconds(),
    }


def _restore(recorded: dict[str, Any], request: httpx.Request | None) -> httpx.Response:
    """The response that was recorded, with a request that holds no credentials."""
    import httpx

    response = httpx.Response(
        recorded["status"],
        headers=[tuple(pair) for pair in recorded["headers"]],
        content=base64.b64decode(recorded["content"]),
        request=None if request is None else redact(request),
        extensions={"http_version": recorded["http_version"].encode(), "reason_phrase": recorded["reason"].encode()},
    )
    response.elapsed = timedelta(seconds=recorded["elapsed_s"])
    return response


def redact(request: httpx.Request) -> httpx.Request:
    """The same request without its credentials: headers, URL userinfo, and query parameters named like one."""
    import httpx

    url = _without_secrets(request.url, lambda _: REDACTED)
    headers = [(k, REDACTED if k.lower() in _SECRET_HEADERS else v) for k, v in request.headers.multi_items()]
    return httpx.Request(request.method, url, headers=headers, content=request.content)
