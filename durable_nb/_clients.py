"""Clients of httpx and httpx2 whose requests are steps when made in a run, and plain requests elsewhere.

Each is a client of its library with every transport wrapped: in a run, the wrapper asks for a step whose body sends the request
through the wrapped transport and takes the response down. In a cell the reader gets the chunks while they are recorded; a
workflow's code, and whoever is given a recorded response, gets the same chunks from the record. The end of a stream is told
when it is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import importlib.util
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from datetime import timedelta
from types import ModuleType
from typing import Any

from durable_nb import _exchange, _secrets, _usage
from durable_nb._current import Run, StandsFor, StepRequest, current_body, current_run, note_usage
from durable_nb._door import wait_for
from durable_nb._exchange import Credentials, Line, Reader, Recorded, Recorder, StatusError
from durable_nb._redaction import redact, said
from durable_nb._retry import RetryPolicy
from durable_nb.errors import NotSupportedError

_REST_S, _DRAIN_S = 0.2, 60.0
"""A reader that closes a stream has what it wants, and what was paid for is recorded: so long the rest is waited for when its
last event has come, and when it has not."""

_ASK_S = 0.1
"""So often synchronous code asks whether it is to stop."""

_ONCE = RetryPolicy(retries=0)
"""SDKs try again by themselves."""


def _revealed(request: Any) -> Any:
    """The request with values in place of references to secrets, where it has some."""
    body = vars(request).get("_content", b"")  # a stream that was not read has none
    in_body = bool(_secrets.names_in(body))
    if not in_body and not any(_secrets.has_reference(text) for text in (str(request.url), *request.headers.values())):
        return request
    headers = [(k, _secrets.reveal(v.decode("latin-1")).encode("latin-1")) for k, v in request.headers.raw]
    url, more = _secrets.reveal(str(request.url)), request.extensions
    if in_body:
        body = _secrets.reveal(body.decode("latin-1")).encode("latin-1")
        headers = [(k, v) for k, v in headers if k.lower() != b"content-length"]
        return type(request)(request.method, url, headers=headers, content=body, extensions=more)
    return type(request)(request.method, url, headers=headers, stream=request.stream, extensions=more)


# -- a response that is being recorded ------------------------------------------------------------------------------------


class _Channel(Reader):
    """Takes a response from the step that records it to whoever reads it. The reader's side is on the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._chunks: deque[bytes] = deque()
        self._end_within: Callable[[float], None] = lambda _: None
        self._recorder: Recorder | None = None
        self.step: asyncio.Task[Recorded]
        self.response: Any = None

    # what the step's body tells, on the loop or in a thread

    def begin(self, response: Any, recorder: Recorder) -> None:
        self._tell(self._begin, response, recorder)

    def chunk(self, data: bytes) -> None:
        self._tell(self._chunks.append, data)

    def limit(self, end_within: Callable[[float], None]) -> None:
        self._end_within = end_within

    def _begin(self, response: Any, recorder: Recorder) -> None:
        self.response, self._recorder = response, recorder

    def _tell(self, note: Callable[..., None], *args: Any) -> None:
        if asyncio._get_running_loop() is self._loop:
            note(*args)
            self._changed.set()
        else:
            self._loop.call_soon_threadsafe(note, *args)
            self._loop.call_soon_threadsafe(self._changed.set)

    # what the reader asks

    async def recorded(self, step: Coroutine[Any, Any, Recorded]) -> Recorded | None:
        """What the step has recorded; None where its response begins to come."""
        self.step = asyncio.ensure_future(step)
        self.step.add_done_callback(self._ended)
        while self.response is None and not self.step.done():
            await self._wait()
        return None if self.response is not None else await self.step

    async def next(self) -> bytes | None:
        """The next chunk; None when the whole is on disk. Raises what cut it."""
        while not self._chunks:
            if self.step.done():
                await self.step
                return None
            await self._wait()
        return self._chunks.popleft()

    async def close(self) -> None:
        """The reader has enough. What was begun is recorded all the same, where its end comes soon."""
        if self.step.done():
            return
        self.is_patient = False
        is_at_end = self._recorder is not None and self._recorder.is_at_end
        self._end_within(_REST_S if is_at_end else _DRAIN_S)
        if is_at_end:
            await asyncio.wait({self.step})

    def _ended(self, step: asyncio.Task[Recorded]) -> None:
        if not step.cancelled():
            step.exception()  # who reads is told; where nobody does any more, the run has said it
        self._changed.set()

    async def _wait(self) -> None:
        self._changed.clear()
        try:
            await self._changed.wait()
        except asyncio.CancelledError:
            self.step.cancel()
            raise


# -- bodies of responses ---------------------------------------------------------------------------------------------------


class _RecordedBody:
    """A body from the record: the same chunks in the same number."""

    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        yield from self._chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk


class _LiveBody:
    """A body while it is recorded."""

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (chunk := await self._channel.next()) is not None:
            yield chunk

    async def aclose(self) -> None:
        await self._channel.close()


class _LiveBlockingBody:
    """The same for the synchronous client."""

    def __init__(self, channel: _Channel, wait: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._channel, self._wait = channel, wait

    def __iter__(self) -> Iterator[bytes]:
        while (chunk := self._wait(self._channel.next())) is not None:
            yield chunk

    def close(self) -> None:
        self._wait(self._channel.close())


# -- transports ------------------------------------------------------------------------------------------------------------


class _Transport:
    """Around one of a client's own transports. A base of both kinds."""

    family: Family

    def __init__(self, inner: Any, client: Any, vary: tuple[str, ...]) -> None:
        self._inner, self._cookies, self._vary = inner, client.cookies, vary
        self._open = set[asyncio.Task[Recorded]]()

    def _step(self, run: Run, request: Any, fn: Any, *args: Any, thread: bool = False) -> Coroutine[Any, Any, Recorded]:
        where = request.url.copy_with(userinfo=b"", query=None, fragment=None)
        if request.headers.get("upgrade") or request.url.scheme in ("ws", "wss"):
            raise NotSupportedError(
                f"{request.method} {said(request.url)}: what goes over a web socket has no end that could be recorded; nothing "
                "was sent. Do it in a step: await durable.run(name, function, ...)"
            )
        return run.step(
            StepRequest(
                kind="request",
                name=f"{request.method} {_secrets.without_names(str(where))}",
                fn=fn,
                args=args,
                described=_exchange.described(request, self._vary),
                policy=_ONCE,
                thread=thread,
                goes_on_after=_exchange.is_attempt,
            )
        )

    def _response(self, run: Run, recorded: Recorded | StatusError, credentials: Credentials) -> Any:
        """A recorded response, its body not read."""
        refused, recorded = (recorded, recorded.recorded) if isinstance(recorded, StatusError) else (None, recorded)
        values = _exchange.echoed(recorded, credentials)
        response = self.family.library.Response(
            recorded["status"],
            headers=[(k, v) for k, v in _exchange.headers_of(recorded, values) if k.lower() != b"set-cookie"],
            stream=self.family.recorded_body(list(_exchange.contents(recorded, values))),
            extensions=_exchange.extensions_of(recorded) | {"elapsed_s": recorded["elapsed_s"]},
        )
        if refused is not None:
            run.publish(StandsFor(refused, response))
        return response

    def _begun(self, request: Any, response: Any, stream: Any) -> Any:
        """A response that is still coming. Its cookies are the client's from here on; they are not recorded, so not shown."""
        library = self.family.library
        self._cookies.extract_cookies(library.Response(response.status_code, headers=response.headers, request=request))
        headers = [(k, v) for k, v in response.headers.raw if k.lower() != b"set-cookie"]
        known = {name: response.extensions[name] for name in ("http_version", "reason_phrase") if name in response.extensions}
        return library.Response(response.status_code, headers=headers, stream=stream, extensions=known)

    async def _received(self, step: Coroutine[Any, Any, Recorded], channel: _Channel) -> Recorded | StatusError | None:
        """What is recorded; None where the response begins to come."""
        try:
            return await channel.recorded(step)
        except StatusError as refused:
            return refused
        finally:
            self._open.add(channel.step)
            channel.step.add_done_callback(self._open.discard)


class _AsyncTransport(_Transport):
    async def __aenter__(self) -> Any:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._end(functools.partial(self._inner.__aexit__, *error))

    async def aclose(self) -> None:
        await self._end(self._inner.aclose)

    async def _end(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        carrier = getattr(asyncio.get_running_loop(), "carrier", None)
        if carrier is not None:  # a workflow's code has no sockets: they are the carrying loop's
            carrier.call_soon(lambda: asyncio.ensure_future(close(), loop=carrier))
            return
        if self._open:
            await asyncio.wait(self._open, timeout=_DRAIN_S)
        await close()

    async def handle_async_request(self, request: Any) -> Any:
        run = current_run.get()
        if run is None or current_body.get() is not None:
            return await self._inner.handle_async_request(_revealed(request))
        await request.aread()
        sent, credentials = _exchange.as_data(request)
        exchange = _exchange.exchange, sent, credentials, Line(self._inner.handle_async_request)
        if run.is_replayed:  # delivered when it is recorded whole
            try:
                recorded = await self._step(run, request, *exchange)
            except StatusError as refused:
                return self._response(run, refused, credentials)
            return self._response(run, recorded, credentials)
        channel = _Channel()
        found = await self._received(self._step(run, request, *exchange, channel), channel)
        if found is not None:
            return self._response(run, found, credentials)
        return self._begun(request, channel.response, self.family.live_body(channel))


class _BlockingTransport(_Transport):
    def __enter__(self) -> Any:
        self._inner.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        self._inner.__exit__(*error)

    def close(self) -> None:
        self._end()
        self._inner.close()

    def _end(self) -> None:
        for step in list(self._open):
            _waiting_on(step.get_loop())(asyncio.wait({step}, timeout=_DRAIN_S))

    def handle_request(self, request: Any) -> Any:
        run = current_run.get()
        if run is None or current_body.get() is not None:
            return self._inner.handle_request(_revealed(request))
        if run.is_replayed:
            raise NotSupportedError(
                f"{request.method} {said(request.url)}: a workflow's own code can't wait for durable.Client, which blocks the "
                "event loop; nothing was sent. Use durable.AsyncClient (AsyncOpenAI, AsyncAnthropic) and await, or do it in a "
                "step: await durable.run(name, function, ...)"
            )
        request.read()
        sent, credentials = _exchange.as_data(request)
        wait = _waiting_on(run.loop)

        async def ask() -> tuple[_Channel, Recorded | StatusError | None]:
            channel = _Channel()
            exchange = _exchange.exchange_blocking, sent, credentials, self._inner.handle_request, channel
            return channel, await self._received(self._step(run, request, *exchange, thread=True), channel)

        channel, found = wait(ask())
        if found is not None:
            return self._response(run, found, credentials)
        return self._begun(request, channel.response, self.family.live_blocking_body(channel, wait))


def _waiting_on(loop: asyncio.AbstractEventLoop) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """How synchronous code waits for work on the run's loop: on its own thread by a nested one, else as threads do."""
    if asyncio._get_running_loop() is not loop:
        return lambda work: asyncio.run_coroutine_threadsafe(work, loop).result()
    task = asyncio.current_task()
    return lambda work: wait_for(_unless_cancelled(work, task))


async def _unless_cancelled(work: Coroutine[Any, Any, Any], waiting: asyncio.Task[Any] | None) -> Any:
    """What the work comes to. A task that waits in synchronous code hears only by asking that it is cancelled, or interrupted:
    it is told by CancelledError."""
    working = asyncio.ensure_future(work)
    while not working.done():
        if waiting is not None and waiting.cancelling():
            working.cancel()
            raise asyncio.CancelledError
        await asyncio.wait({working}, timeout=_ASK_S)
    return working.result()


# -- clients ---------------------------------------------------------------------------------------------------------------


class _Client:
    """What both clients do beyond their library's."""

    family: Family

    def __init__(self, *, vary: Iterable[str] = (), http: ModuleType | None = None, **options: Any) -> None:  # noqa: ARG002
        if not {"transport", "verify", "cert"} & options.keys():
            options["verify"] = _exchange.certificates(self.family.library.__name__)
        super().__init__(**options)
        own: Any = self
        wrap = functools.partial(self._wrapped, vary=(vary,) if isinstance(vary, str) else tuple(vary))
        own._transport = wrap(own._transport)
        own._mounts = {pattern: None if inner is None else wrap(inner) for pattern, inner in own._mounts.items()}
        _exchange.redact_log_of(self.family.library.__name__)

    def _wrapped(self, inner: Any, vary: tuple[str, ...]) -> Any:
        raise NotImplementedError

    def _without_credentials(self, response: Any) -> Any:
        """What a notebook may keep holds no credentials."""
        for one in (*response.history, response):
            one.request = redact(one.request)
            if one.next_request is not None:
                one.next_request = redact(one.next_request)
            if one.is_closed:  # set, so that a notebook that keeps the response keeps it too
                recorded_s = one.extensions.pop("elapsed_s", None)
                one.elapsed = one.elapsed if recorded_s is None else timedelta(seconds=recorded_s)
        return response

    def _redacted(self, error: Any) -> None:
        with contextlib.suppress(RuntimeError):  # without a request
            if isinstance(error, self.family.library.TooManyRedirects):
                error.args = (f"{error} ({error.request.method} {said(error.request.url)})",)
            elif isinstance(error, self.family.library.HTTPStatusError):  # raised by an event hook
                error.args = (str(error).replace(str(error.request.url), said(error.request.url)),)
                self._without_credentials(error.response)
            error.request = redact(error.request)


class _AsyncClient(_Client):
    def _wrapped(self, inner: Any, vary: tuple[str, ...]) -> Any:
        return self.family.async_transport(inner, self, vary)

    async def send(self, request: Any, **options: Any) -> Any:
        if current_run.get() is None or current_body.get() is not None:
            return _noted(await super().send(request, **options))  # type: ignore[misc]
        try:
            return self._without_credentials(await super().send(request, **options))  # type: ignore[misc]
        except self.family.library.HTTPError as error:
            self._redacted(error)
            raise


class _BlockingClient(_Client):
    def _wrapped(self, inner: Any, vary: tuple[str, ...]) -> Any:
        return self.family.transport(inner, self, vary)

    def send(self, request: Any, **options: Any) -> Any:
        if current_run.get() is None or current_body.get() is not None:
            return _noted(super().send(request, **options))  # type: ignore[misc]
        try:
            return self._without_credentials(super().send(request, **options))  # type: ignore[misc]
        except self.family.library.HTTPError as error:
            self._redacted(error)
            raise


def _noted(response: Any) -> Any:
    """In a step's body: what a model's answer has cost is the step's."""
    if response.is_closed and response.status_code < 400 and current_body.get() is not None:
        note_usage(_usage.of_answer(response.content))
    return response


class Family:
    """The classes of one library."""

    def __init__(self, library: Any) -> None:
        self.library = library
        streams = library.AsyncByteStream, library.SyncByteStream
        self.recorded_body = _kind(_RecordedBody, *streams)
        self.live_body = _kind(_LiveBody, library.AsyncByteStream)
        self.live_blocking_body = _kind(_LiveBlockingBody, library.SyncByteStream)
        self.async_transport = _kind(_AsyncTransport, library.AsyncBaseTransport, family=self)
        self.transport = _kind(_BlockingTransport, library.BaseTransport, family=self)
        self.AsyncClient = _kind(_AsyncClient, library.AsyncClient, family=self, __new__=_of_family)
        self.Client = _kind(_BlockingClient, library.Client, family=self, __new__=_of_family)


def _kind(own: type, *theirs: type, **more: Any) -> Any:
    name = own.__name__.removeprefix("_").replace("BlockingClient", "Client")
    return type(name, (own, *theirs), {"__module__": "durable_nb.http", "__doc__": own.__doc__, **more})


def _of_family(cls: Any, *_: Any, http: ModuleType | None = None, **options: Any) -> Any:
    """The client of the library that `http` is, where that is another one than the class's."""
    if http is None or http is cls.family.library:
        return object.__new__(cls)
    if getattr(http, "__name__", "") not in ("httpx", "httpx2"):
        raise TypeError(f"durable.{cls.__name__}(http={http!r}): give the module httpx or httpx2")
    return getattr(family(http.__name__), cls.__name__)(**options)


@functools.cache
def family(name: str) -> Family:
    return Family(importlib.import_module(name))


def _default() -> str:
    """httpx2 where it is installed, since today's openai and anthropic packages need it."""
    return "httpx2" if importlib.util.find_spec("httpx2") is not None else "httpx"


AsyncClient, Client = family(_default()).AsyncClient, family(_default()).Client
