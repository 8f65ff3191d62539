"""A request and its response as plain data: what is sent, what is recorded, and the response made anew. httpx and httpx2 alike.

`exchange` is the body of every step that sends a request: a module-level function whose arguments are data. Credentials, and
the connections that send it, are beside the data in the process that asks; pickled, they leave their values behind.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import re
import ssl
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from durable_nb import _secrets, _usage
from durable_nb._clock import say_duration
from durable_nb._codec import keyed_digest, seal, unseal
from durable_nb._current import Run, current_body, current_run, note_usage
from durable_nb._preview import redacted
from durable_nb._redaction import REDACTED, SECRET_HEADERS, SECRET_PARAMETER, redact, said, without_secrets
from durable_nb.errors import NonRetryableError

Recorded = dict[str, Any]

_TEXT_BYTES = 1 << 16
"""A text of at most so many bytes is recorded as text, whatever is longer or no text as bytes."""
_ECHOED_BYTES = 12
"""A shorter credential may occur in an answer by chance."""


# -- what is sent ----------------------------------------------------------------------------------------------------------


class Credentials:
    """What a request holds that is recorded nowhere: values of secret headers, and its URL where that holds some.

    In another process there are only those that are given as `durable.secret(name)`.
    """

    def __init__(self, url: str | None, headers: Iterable[tuple[str, str]], in_body: Iterable[str] = ()) -> None:
        """`in_body`: names of the secrets that the body refers to."""
        self.url, self.headers, self.in_body = url, tuple(headers), tuple(in_body)

    def __reduce__(self) -> Any:
        url = _secrets.template(self.url) if self.url is not None and _is_by_reference(self.url) else None
        headers = [(k, _secrets.template(v) if _secrets.has_reference(v) else None) for k, v in self.headers]
        return _credentials_elsewhere, (url, tuple(headers), self.url is not None, self.in_body)

    def values(self) -> list[tuple[str, bytes]]:
        """What an answer may repeat of it: where it stands, and the value."""
        found = [(name.lower(), _secrets.reveal(value)) for name, value in self.headers]
        named = list[tuple[str, str]]()
        for name, value in found:
            if name == "cookie":
                named += [(f"cookie {k.strip()}", v.strip()) for k, _, v in (one.partition("=") for one in value.split(";"))]
            else:  # "Bearer sk-..." is repeated without the word
                named.append((name, value.partition(" ")[2] if "authorization" in name and " " in value else value))
        if self.url is not None:
            url = _secrets.reveal(self.url)
            named += [(f"parameter {k}", v) for k, v in _parameters(url)]
            password = re.match(r"[^/]*//[^/?#@]*:([^/?#@]*)@", url)
            named += [("password", password[1])] if password else []
        texts = [value for _, value in self.headers] + ([] if self.url is None else [self.url])
        by_name = dict.fromkeys((*self.in_body, *(name for text in texts for name in _secrets.names_in(text))))
        named += [(f"secret {name}", _secrets.value_of(name)) for name in by_name]
        return [(where, value.encode("latin-1", "replace")) for where, value in named if len(value) >= _ECHOED_BYTES]


def _is_by_reference(url: str) -> bool:
    """Is every credential of an URL a reference?"""
    return _secrets.has_reference(url) and said(_secrets.without_names(url)).count(REDACTED) <= len(_secrets.template(url)) // 2


def _parameters(url: str) -> list[tuple[str, str]]:
    import httpx

    return [(k, v) for k, v in httpx.URL(url).params.multi_items() if SECRET_PARAMETER.search(k)]


def _credentials_elsewhere(
    url: tuple[str, ...] | None,
    headers: tuple[tuple[str, tuple[str, ...] | None], ...],
    had_url: bool,
    in_body: tuple[str, ...],
) -> Credentials:
    for name, parts in headers:
        if parts is None:
            raise NonRetryableError(
                f"the header {name!r} of this request stays in the process beside the run, and this is another one: give its "
                "value as durable.secret(NAME), and set NAME in the environment here"
            )
    if had_url and url is None:
        raise NonRetryableError(
            "the credentials in this request's URL stay in the process beside the run, and this is another one: give them as "
            "durable.secret(NAME), and set NAME in the environment here"
        )
    known = ((name, _secrets.from_template(parts)) for name, parts in headers if parts is not None)
    return Credentials(None if url is None else _secrets.from_template(url), known, in_body)


@dataclass(frozen=True, slots=True)
class Sent:
    """A request as data."""

    family: str
    """`httpx` or `httpx2`."""
    method: str
    url: str
    """Without credentials."""
    headers: tuple[tuple[str, str | None], ...]
    """None: the value is the next of those among the credentials."""
    body: bytes
    extensions: dict[str, Any]
    keyed: bool
    """Send an `Idempotency-Key`, unless there is one."""
    body_secrets: bool
    """Has the body references to secrets?"""
    limit_s: float | None
    """For all of it, from connecting to the last byte."""

    def request(self, credentials: Credentials) -> Any:
        """The request itself, credentials included."""
        library = _library(self.family)
        secret = iter([_secrets.reveal(value) for _, value in credentials.headers])
        headers = [(k, next(secret) if v is None else _secrets.reveal(v)) for k, v in self.headers]
        url = _secrets.reveal(self.url if credentials.url is None else credentials.url)
        body = _secrets.reveal(self.body.decode("latin-1")).encode("latin-1") if self.body_secrets else self.body
        encoded = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers]
        request = library.Request(self.method, url, headers=encoded, content=body, extensions=self.extensions)
        key = current_body.get()
        if self.keyed and key is not None:
            request.headers.setdefault("Idempotency-Key", key.idempotency_key)
        return request


def as_data(request: Any, *, keyed: bool = False, limit_s: float | None = None) -> tuple[Sent, Credentials]:
    """A request whose body was read, apart from its credentials."""
    family, in_body = type(request).__module__.partition(".")[0], _secrets.names_in(request.content)
    headers, secret = list[tuple[str, str | None]](), list[tuple[str, str]]()
    for name, value in ((k.decode("latin-1"), v.decode("latin-1")) for k, v in request.headers.raw):
        lower = name.lower()
        if lower == "transfer-encoding" or (lower == "content-length" and in_body):
            continue  # the body is sent as a whole, and with the values of secrets
        if lower in SECRET_HEADERS or _secrets.has_reference(value):
            headers.append((name, None))
            secret.append((name, value))
        else:
            headers.append((name, value))
    full, open_url = str(request.url), str(without_secrets(request.url))
    has_secret = open_url != full or _secrets.has_reference(full)
    credentials = Credentials(full if has_secret else None, secret, in_body)
    url = _secrets.without_names(open_url)
    more = dict(request.extensions), keyed, bool(in_body), limit_s
    return Sent(family, request.method, url, tuple(headers), request.content, *more), credentials


def described(request: Any, vary: Iterable[str]) -> dict[str, Any]:
    """What the response may depend on, as far as the step's identity goes. The request's body was read."""
    kept = {"accept", "content-type", *(header.lower() for header in vary)}
    headers = [(k.lower(), _secrets.without_names(v)) for k, v in request.headers.multi_items()]
    headers = sorted((k, v) for k, v in headers if k in kept or k.startswith("anthropic-"))
    url = str(without_secrets(request.url, lambda value: "secret" if _secrets.has_reference(value) else keyed_digest(value)))
    headers, body = _without_boundary(headers, request.content)
    return {"method": request.method, "url": _secrets.without_names(url), "headers": headers, "body": _as_meant(headers, body)}


def _without_boundary(headers: list[tuple[str, str]], body: bytes) -> tuple[list[tuple[str, str]], bytes]:
    """A multipart body is put together with a boundary that is another one each time."""
    said_types = [value for name, value in headers if name == "content-type" and value.lower().startswith("multipart/")]
    found = re.search(r"boundary=(?:\"([^\"]+)\"|([^;\s]+))", said_types[0], re.IGNORECASE) if said_types else None
    if found is None:
        return headers, body
    boundary = found[1] or found[2]
    headers = [(k, v.replace(boundary, "boundary") if k == "content-type" else v) for k, v in headers]
    return headers, body.replace(b"--" + boundary.encode("latin-1"), b"--boundary")


def _as_meant(headers: list[tuple[str, str]], body: bytes) -> Any:
    """A body as it counts: JSON without the white space, which another version of a package may write otherwise."""
    if not any(name == "content-type" and "json" in value.lower() for name, value in headers):
        return body
    try:
        text = json.dumps(json.loads(body), ensure_ascii=False, separators=(",", ":"))
    except (ValueError, RecursionError):
        return body
    return _secrets.without_names(text)


# -- what sends it ---------------------------------------------------------------------------------------------------------


class Line:
    """What sends a request in this process: a client's own transport, or a client that the run's calls share. In another
    process: a client for this one request."""

    def __init__(self, send: Callable[[Any], Any] | None = None) -> None:
        self.send = send

    def __reduce__(self) -> Any:
        return Line, ()

    async def __call__(self, request: Any) -> tuple[Any, Callable[[], Awaitable[None]]]:
        """The response, its body not read, and what is to be awaited when it has been."""
        if self.send is not None:
            return await self.send(request), _nothing
        run = current_run.get()
        family = type(request).__module__.partition(".")[0]
        if run is None:
            client = _client(family)
            return await client.send(request, stream=True), client.aclose
        shared = _shared.setdefault(run, {})
        if family not in shared:
            shared[family] = _client(family)
            run.at_end(shared[family].aclose)
        return await shared[family].send(request, stream=True), _nothing


_shared: WeakKeyDictionary[Run, dict[str, Any]] = WeakKeyDictionary()
"""The clients of runs."""


def _client(family: str) -> Any:
    """A client for any number of requests at once: how many there are is for the run's code to say."""
    library = _library(family)
    limits = library.Limits(max_connections=None, max_keepalive_connections=100)
    return library.AsyncClient(verify=certificates(family), limits=limits)


async def _nothing() -> None:
    pass


@cache
def _library(name: str) -> Any:
    """httpx or httpx2."""
    return importlib.import_module(name)


@lru_cache(maxsize=2)
def certificates(family: str) -> ssl.SSLContext:
    """The library's own, made once: loading the certificates takes longer than many a request."""
    made: ssl.SSLContext = _library(family).create_ssl_context()
    return made


# -- the exchange ----------------------------------------------------------------------------------------------------------


class StatusError(Exception):
    """A response with a status of 400 or more: an attempt that failed, unless it was the last one. Notices show its name."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__(f"{recorded['status']} {recorded['reason']}".strip())
        self.recorded = recorded

    @property
    def response(self) -> Any:
        import httpx

        return restored(self.recorded, httpx, None)

    def __reduce__(self) -> Any:
        return type(self), (self.recorded,)


def is_attempt(error: BaseException) -> bool:
    """Is it what an SDK tries again after: a network error, 408, 409, 429, 5xx?"""
    if isinstance(error, StatusError):
        status = error.recorded["status"]
        return status in (408, 409, 429) or status >= 500
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)  # httpx's, or httpx2's


class Reader:
    """Hears of a response while it is recorded, on the loop or in the thread that records it."""

    is_patient = True
    """False: it has gone away, and only what comes at once is worth recording."""

    def begin(self, response: Any, recorder: Recorder) -> None:
        """Status and headers are there. Of a status of 400 or more it isn't told."""

    def chunk(self, data: bytes) -> None:
        """More of the body is there."""

    def limit(self, end_within: Callable[[float], None]) -> None:
        """`end_within(seconds)` ends the reading after so many."""


_NO_READER = Reader()


def _never(seconds: float) -> None:
    """There is nothing left to end."""


async def exchange(sent: Sent, credentials: Credentials, line: Line, reader: Reader = _NO_READER) -> Recorded:
    """Send a request and record the response: the body of a step.

    Raises StatusError for a status of 400 or more, and what the library raises where there is no whole response: a stream
    that was cut isn't one.
    """
    request, began = _made(sent, credentials), time.perf_counter()
    try:
        async with asyncio.timeout(sent.limit_s):
            response, close_line = await line(request)
            try:
                recorder = Recorder(response, credentials)
                if response.status_code < 400:
                    reader.begin(response, recorder)
                try:
                    async with asyncio.timeout(None) as limit:
                        clock = asyncio.get_running_loop().time
                        reader.limit(lambda seconds: limit.reschedule(clock() + seconds))
                        async for data in response.stream:  # not aiter_raw: a user's transport may give one that was read
                            recorder.add(data)
                            reader.chunk(data)
                except (TimeoutError, recorder.library.TransportError):
                    if not recorder.is_at_end:
                        raise
                finally:
                    reader.limit(_never)  # the reading is over
                recorder.check_end()
            finally:
                await response.aclose()
                await close_line()
    except Exception as error:
        raise named(error, sent, credentials) from error.__cause__
    return _judged(recorder, time.perf_counter() - began)


def exchange_blocking(
    sent: Sent, credentials: Credentials, send: Callable[[Any], Any], reader: Reader = _NO_READER
) -> Recorded:
    """The same in a thread, for the synchronous client. A stream's last event is its end: nothing could end a wait for more."""
    request, began = _made(sent, credentials), time.perf_counter()
    try:
        response = send(request)
        try:
            recorder = Recorder(response, credentials)
            if response.status_code < 400:
                reader.begin(response, recorder)
            for data in response.stream:
                recorder.add(data)
                reader.chunk(data)
                if recorder.is_at_end or not reader.is_patient:
                    break
            recorder.check_end(is_whole=reader.is_patient)
        finally:
            response.close()
    except Exception as error:
        raise named(error, sent, credentials) from error.__cause__
    return _judged(recorder, time.perf_counter() - began)


def _made(sent: Sent, credentials: Credentials) -> Any:
    try:
        request = sent.request(credentials)
    except UnicodeEncodeError:  # says the text, which may be a secret
        raise ValueError(
            f"{_where(sent)}: a header or the URL has characters that HTTP doesn't know; nothing was sent"
        ) from None
    except NonRetryableError as missing:
        raise NonRetryableError(f"{_where(sent)}: {missing}; nothing was sent") from None
    if any(_ILLEGAL.search(value) for _, value in request.headers.raw):  # the library would log it, secret or not
        raise ValueError(f"{_where(sent)}: {_UNSENDABLE}; nothing was sent")
    return request


_ILLEGAL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]|^[ \t]|[ \t]$")
_UNSENDABLE = (
    "the request can't be sent as HTTP: a header, or the method, has a line break, a blank or a control character too many"
)


def _judged(recorder: Recorder, elapsed_s: float) -> Recorded:
    recorded = recorder.recorded(elapsed_s)
    if recorded["status"] >= 400:
        raise StatusError(recorded)
    note_usage(_usage.of_answer(recorder.content))
    return recorded


def named(error: Exception, sent: Sent, credentials: Credentials) -> Exception:
    """The error with the step and the URL in its text, and no credentials in it."""
    library, where = _library(sent.family), _where(sent)
    if isinstance(error, library.LocalProtocolError):  # its text has the header's value, and so has its cause
        error.__cause__ = None
        return ValueError(f"{where}: {_UNSENDABLE}")
    if isinstance(error, TimeoutError):
        told = "no whole answer" if sent.limit_s is None else f"no whole answer within {say_duration(sent.limit_s)}"
        error = library.ReadTimeout(told)
    if isinstance(error, library.RequestError):
        text = str(error) or _SILENT.get(type(error).__name__, type(error).__name__)
        for _, value in credentials.values():
            text = text.replace(value.decode("latin-1"), REDACTED)
        error.args = (f"{text} ({where})",)
        shown = [(k, REDACTED if v is None else v) for k, v in sent.headers]
        error.request = library.Request(sent.method, sent.url, headers=shown)  # without the values of secrets by name
    return error


_SILENT = {
    "ConnectTimeout": "no connection in time",
    "PoolTimeout": "no free connection in time",
    "ReadTimeout": "no answer in time",
    "WriteTimeout": "the server didn't take the request in time",
}
"""What errors mean that come without a text."""


def _where(sent: Sent) -> str:
    body, called = current_body.get(), f"{sent.method} {said(sent.url)}"
    return called if body is None or body.name in called else f"step {body.name!r}, {called}"


# -- what is recorded ------------------------------------------------------------------------------------------------------


class Recorder:
    """Takes down one response."""

    def __init__(self, response: Any, credentials: Credentials) -> None:
        self.library = _library(type(response).__module__.partition(".")[0])
        self._response, self._credentials = response, credentials
        self._chunks: list[bytes] = []
        self.content = b""
        """The body, decoded, once its end was checked."""
        is_events = response.headers.get("content-type", "").lower().startswith("text/event-stream")
        self._events = _Events(response.headers.get("content-encoding", "")) if is_events else None
        body = current_body.get()
        self._say = None if body is None else body.say

    @property
    def is_at_end(self) -> bool:
        """Has the last event of a stream come, whatever comes of its connection?"""
        return self._events is not None and self._events.is_at_end

    def add(self, data: bytes) -> None:
        self._chunks.append(data)
        if self._events is not None:
            self._events.add(data)
            if self._say is not None:
                self._say(self._said)

    def _said(self) -> str:
        """The end of what has come so far, without credentials."""
        text = self._events.said() if self._events is not None else ""
        for _, value in self._credentials.values():
            text = text.replace(value.decode("latin-1"), REDACTED)
        return text

    def check_end(self, *, is_whole: bool = True) -> None:
        """There is no more. Without a length, a cut connection looks like the end: a stream of a known kind tells."""
        if (not is_whole and not self.is_at_end) or (self._events is not None and self._events.is_cut):
            raise self.library.RemoteProtocolError("the stream ended before its last event")
        self.content = b"".join(self._chunks)
        if "content-encoding" in self._response.headers:  # what can't be decoded is no answer
            self.content = self.library.Response(200, headers=self._response.headers, content=self.content).content

    def recorded(self, elapsed_s: float) -> Recorded:
        values = self._credentials.values()
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in self._response.headers.raw]
        chunks, echoes = _without_echoes(self._chunks, values)
        content = b"".join(chunks)
        recorded: Recorded = {
            "status": self._response.status_code,
            "reason": self._response.reason_phrase,
            "http_version": self._response.http_version,
            "headers": [[k, REDACTED if k.lower() in SECRET_HEADERS else _kept(_hidden(v, values))] for k, v in headers],
            "content": _as_text(content),
            "elapsed_s": elapsed_s,
        }
        if len(chunks) > 1:
            recorded["chunks"] = list(map(len, chunks))
        return recorded | ({"echoes": [list(echo) for echo in echoes]} if echoes else {})


def _as_text(content: bytes) -> str | bytes:
    try:
        return content.decode() if len(content) <= _TEXT_BYTES else content
    except UnicodeDecodeError:
        return content


_LAST = re.compile(rb"^(?:data: ?\[DONE\]|event: ?(?:message_stop|response\.(?:completed|incomplete|failed))$)", re.MULTILINE)
_MAYBE_LAST = re.compile(rb'"finish_reason": ?"|^event: ?error$', re.MULTILINE)
_KNOWN = re.compile(rb'"object": ?"chat\.completion\.chunk"|^event: ?(?:message_start|response\.created)$', re.MULTILINE)


_SAID = 4000
"""Characters of an answer that are shown while it comes, its last ones."""


class _Events:
    """How far a stream of server-sent events has come, as far as its protocol is known: OpenAI's or Anthropic's."""

    def __init__(self, encoding: str) -> None:
        self.is_at_end = False
        self._is_known = self._may_end = False
        self._buffer = b""
        self._unsaid = deque[bytes](maxlen=_SAID)
        self._text = ""
        self._is_readable = encoding in ("", "identity", "gzip", "deflate")
        self._decompress = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding in ("gzip", "deflate") else None

    @property
    def is_cut(self) -> bool:
        return self._is_known and not (self.is_at_end or self._may_end)

    def add(self, data: bytes) -> None:
        if not self._is_readable:
            return
        try:
            plain = data if self._decompress is None else self._decompress.decompress(data)
        except zlib.error:
            self._is_readable = False
            return
        *whole, self._buffer = (self._buffer + plain).replace(b"\r\n", b"\n").split(b"\n\n")
        self._unsaid += whole
        for event in whole:
            self.is_at_end = self.is_at_end or _LAST.search(event) is not None
            self._may_end = self._may_end or _MAYBE_LAST.search(event) is not None
            self._is_known = self._is_known or _KNOWN.search(event) is not None
        self.is_at_end = self.is_at_end or self._buffer.startswith((b"data: [DONE]", b"data:[DONE]"))

    def said(self) -> str:
        """The end of the text that has come."""
        while self._unsaid:
            self._text += "".join(map(_delta, re.findall(rb"^data: ?(.*)$", self._unsaid.popleft(), re.MULTILINE)))
        self._text = self._text[-_SAID:]
        return self._text


def _delta(data: bytes) -> str:
    """The text in an event: what the model has said, as OpenAI's services and Anthropic's write it; the event where it is none
    of these."""  # fmt: skip
    try:
        event = json.loads(data)
    except ValueError:
        return "" if data == b"[DONE]" else f"{data.decode('utf-8', 'replace')}\n"
    if not isinstance(event, dict) or not (isinstance(event.get("choices"), list) or "type" in event):
        return f"{data.decode('utf-8', 'replace')}\n"
    found = [event.get("delta"), *(one.get("delta") or one for one in event.get("choices", ()) if isinstance(one, dict))]
    texts = [one if isinstance(one, str) else _first_text(one) for one in found if one]
    return "".join(texts)


def _first_text(delta: Any) -> str:
    named = (delta.get(name) for name in ("content", "text", "partial_json", "thinking")) if isinstance(delta, dict) else ()
    return next((text for text in named if isinstance(text, str)), "")


# -- credentials that an answer repeats: an echo service, an error that quotes the key, a link to the next page --------------


def _without_echoes(chunks: list[bytes], values: list[tuple[str, bytes]]) -> tuple[list[bytes], list[tuple[int, int, str]]]:
    """The chunks with the credentials cut out, and where they were: chunk, place in it, which one. None lies across two."""
    content = b"".join(chunks)
    present = {value: where for where, value in values if value in content}
    if not present:
        return chunks, []
    found = list(re.finditer(b"|".join(map(re.escape, sorted(present, key=len, reverse=True))), content))
    kept, echoes, begin, end = list[bytes](), list[tuple[int, int, str]](), 0, 0
    for n, chunk in enumerate(chunks):
        end += len(chunk)
        until = max(begin, next((echo.end() for echo in found if echo.start() < end < echo.end()), end))
        piece, at = b"", begin
        for echo in found:
            if begin <= echo.start() < until:
                piece += content[at : echo.start()]
                echoes.append((n, len(piece), present[echo[0]]))
                at = echo.end()
        kept.append(piece + content[at:until])
        begin = until
    return kept, echoes


def _hidden(text: str, values: list[tuple[str, bytes]]) -> str:
    for where, value in values:
        text = text.replace(value.decode("latin-1"), f"\0{where}\0")
    return text


def _kept(header: str) -> str:
    """A header's value as it is recorded. An address with credentials, such as a redirect's, is encrypted, beside what can be
    told of it: whoever goes on from there has to send them, restored or not."""
    told = said(header)
    return header if told == header else f"{told}{_SEALED}{seal(header)}"


def _given(header: str) -> str:
    """The value that `_kept` was given; what can be told of it, where another user's key sealed it."""
    told, _, sealed = header.partition(_SEALED)
    try:
        return unseal(sealed) if sealed else told
    except UnicodeDecodeError:
        return told


_SEALED = "\1"
"""No header holds it."""


def _filled(text: str, values: Mapping[str, bytes]) -> str:
    if "\0" not in text:
        return text
    return re.sub("\0([^\0]*)\0", lambda found: values.get(found[1], REDACTED.encode()).decode("latin-1"), text)


# -- the response made anew ------------------------------------------------------------------------------------------------


def contents(recorded: Recorded, values: Mapping[str, bytes]) -> Iterator[bytes]:
    """The chunks of the body as they came, not decoded."""
    content = recorded["content"]
    content = content.encode() if isinstance(content, str) else content
    echoes, at = recorded.get("echoes", ()), 0
    for n, length in enumerate(recorded.get("chunks", [len(content)])):
        piece, from_ = b"", at
        for chunk, place, where in echoes:
            if chunk == n:
                piece += content[from_ : at + place] + values.get(where, REDACTED.encode())
                from_ = at + place
        yield piece + content[from_ : at + length]
        at += length


def echoed(recorded: Recorded, credentials: Credentials | None) -> dict[str, bytes]:
    """The credentials that the answer repeats, as they are now."""
    if credentials is None or not (recorded.get("echoes") or any(_may_echo(v) for _, v in recorded["headers"])):
        return {}
    try:
        return dict(credentials.values())
    except NonRetryableError:  # a secret that is not set any more
        return {}


def _may_echo(header: str) -> bool:
    return "\0" in header or _SEALED in header


def headers_of(recorded: Recorded, values: Mapping[str, bytes]) -> list[tuple[bytes, bytes]]:
    return [(k.encode("latin-1"), _filled(_given(v), values).encode("latin-1")) for k, v in recorded["headers"]]


def extensions_of(recorded: Recorded) -> dict[str, bytes]:
    return {"http_version": recorded["http_version"].encode(), "reason_phrase": recorded["reason"].encode("latin-1")}


def restored(recorded: Recorded, library: Any, request: Any, credentials: Credentials | None = None, kind: Any = None) -> Any:
    """The response that was recorded, read to its end, with a request that holds no credentials. `kind`: its class."""
    values = echoed(recorded, credentials)
    stream = library.ByteStream(b"".join(contents(recorded, values)))
    response = (kind or library.Response)(
        recorded["status"],
        headers=headers_of(recorded, values),
        stream=stream,
        request=None if request is None else redact(request),
        extensions=extensions_of(recorded),
    )
    response.read()
    response.elapsed = timedelta(seconds=recorded["elapsed_s"])
    return response


# -- what is logged ---------------------------------------------------------------------------------------------------------


@cache
def redact_log_of(name: str) -> None:
    """From now on the loggers of httpx, or httpx2, and of its transport say no credentials: they tell each request's URL, with
    its query, and, in detail, the headers of responses."""
    for logger in (name, *(f"{name.replace('httpx', 'httpcore')}.{part}" for part in ("http11", "http2", "proxy"))):
        logging.getLogger(logger).addFilter(_redacted)


_SECRET_HEADER = re.compile(rf"\(b'((?i:{'|'.join(SECRET_HEADERS)}))', b(?:'[^']*'|\"[^\"]*\")\)")
_PARAMETER = re.compile(rf"([?&][^=&#\s'\"]*(?:{SECRET_PARAMETER.pattern})[^=&#\s'\"]*=)[^&#\s'\"]*", re.IGNORECASE)


def _redacted(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(redacted(said(arg)) if type(arg).__name__ == "URL" else arg for arg in record.args)
    if "return_value" in str(record.msg):  # the transport's: a text that is put together already
        text = _SECRET_HEADER.sub(rf"(b'\1', b'{REDACTED}')", str(record.msg))
        text = _PARAMETER.sub(rf"\1{REDACTED}", re.sub(r"//[^/?#\s'\"]*@", f"//{REDACTED}@", text))
        record.msg = redacted(text)
    return True
