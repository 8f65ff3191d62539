"""A model server on loopback, for tests and demos: real sockets, deterministic answers, and faults on request.

    with ModelServer() as server:
        client = openai.OpenAI(base_url=server.openai_url, api_key="any")
        server.next(Fault(429, retry_after=0.5), Fault(cut_after=3))
        ...
        assert server.count == 3

It speaks as much of OpenAI's chat completions, responses, embeddings and models, and of Anthropic's messages, as their packages
need, streaming and tool calls included. `GET /requests` tells other processes how many requests there were.
"""

from __future__ import annotations

import array
import asyncio
import base64
import hashlib
import json
import re
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import urlsplit

Reply = Callable[[str, list[dict[str, Any]]], str]
"""The system prompt and the other messages, as plain text -> what the model says."""


@dataclass(frozen=True)
class Received:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Fault:
    """What happens to a request instead of an answer, or in the middle of one."""

    status: int = 0
    """Answer with this status; 0: with the right answer."""
    retry_after: float | str | None = None
    """A header of that name."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """None: an error as the real service writes it."""
    cut_after: int | None = None
    """The connection is cut after so many events of a stream; an answer that isn't streamed has 0, or 1 for half of it."""
    hang_after: int | None = None
    """As `cut_after`, but nothing more comes, until the client goes away."""


class ModelServer:
    """Serves in a thread of its own from `start` (or the beginning of a `with` block) to `stop`.

    port         0: any free one
    reply        what the model says; by default it repeats the last message
    latency_s    before each answer
    event_s      between the events of a stream
    api_key      the only one that isn't answered with 401; None: any
    failing      of so many distinct requests (0.05: one in twenty, told by their bodies) the first attempt fails: with 429 and
                 `Retry-After: 0.05`, with 500, or by a cut connection
    """

    def __init__(
        self,
        port: int = 0,
        *,
        reply: Reply | None = None,
        latency_s: float = 0.0,
        event_s: float = 0.0,
        api_key: str | None = None,
        failing: float = 0.0,
    ) -> None:
        self.port, self.reply = port, reply or _repeat
        self.latency_s, self.event_s, self.api_key, self.failing = latency_s, event_s, api_key, failing
        self.requests: list[Received] = []
        """All that came, but those to `/requests`."""
        self.answered: Counter[str] = Counter()
        """By digest of the request's body: how often it was answered in full, with a status below 400."""
        self.open_streams = 0
        """Streams that have begun and not ended."""
        self.faults: deque[Fault | None] = deque()
        """Those that `next` has announced and that have not happened."""
        self._seen: Counter[str] = Counter()
        self.connections: set[asyncio.Task[None]] = set()
        """One for each connection that is open."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping: asyncio.Event | None = None

    @property
    def count(self) -> int:
        """How many requests came."""
        return len(self.requests)

    @property
    def url(self) -> str:
        """Also the `base_url` of an Anthropic client."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def openai_url(self) -> str:
        """The `base_url` of an OpenAI client."""
        return f"{self.url}/v1"

    def next(self, *faults: Fault | None) -> None:
        """These happen to the requests that come next, one to each; None: nothing happens to that one."""
        self.faults.extend(faults)

    def start(self) -> Self:
        """Serve. The port is open when this returns; OSError where it is taken."""
        begun: list[BaseException] = []
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready, begun), name="model server", daemon=True)
        self._thread.start()
        ready.wait()
        if begun:
            self._thread.join()
            raise begun[0]
        return self

    def stop(self) -> None:
        """Close the port and all connections; a client is refused from now on."""
        if self._loop is not None and self._stopping is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
        self._thread = self._loop = None

    def serve_forever(self) -> None:
        """Serve as a process of its own: says its address on the first line, and ends with the process."""
        self.start()
        print(self.url, flush=True)  # noqa: T201
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- serving -------------------------------------------------------------------------------------------------------

    def _serve(self, ready: threading.Event, failed: list[BaseException]) -> None:
        async def main() -> None:
            self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
            try:
                server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=1024)
            except OSError as error:
                failed.append(error)
                return
            self.port = server.sockets[0].getsockname()[1]
            ready.set()
            await self._stopping.wait()
            server.close()
            for connection in list(self.connections):
                connection.cancel()
            await asyncio.gather(*self.connections, return_exceptions=True)

        try:
            asyncio.run(main())
        finally:
            ready.set()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self.connections.add(task)
        try:
            while (request := await _read(reader)) is not None:
                await self._answer(request, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, or a fault or `stop` says that it is cut
        finally:
            if task is not None:
                self.connections.discard(task)
            writer.transport.abort()

    async def _answer(self, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = urlsplit(request.path).path
        if path == "/requests":
            await _send(writer, 200, json.dumps({"count": self.count}).encode())
            return
        self.requests.append(request)
        number = f"{self.count:06d}"
        digest = hashlib.blake2b(request.body, digest_size=8).hexdigest()
        self._seen[digest] += 1
        fault = self.faults.popleft() if self.faults else self._chance(digest)
        await asyncio.sleep(self.latency_s)
        if fault is not None and fault.status:
            headers = fault.headers | ({} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)})
            body = _error(path, fault.status, "a fault on request") if fault.body is None else fault.body
            await _send(writer, fault.status, body, headers)
            return
        if self.api_key is not None and self.api_key not in (
            request.headers.get("authorization", "").removeprefix("Bearer "),
            request.headers.get("x-api-key"),
        ):
            await _send(writer, 401, _error(path, 401, "invalid api key"))
            return
        handler = _HANDLERS.get((request.method, path))
        if handler is None:
            await _send(writer, 404, _error(path, 404, f"there is no {request.method} {path}"))
            return
        try:
            asked = json.loads(request.body) if request.body else {}
            answer = handler(self, asked, number)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            await _send(writer, 400, _error(path, 400, f"{type(error).__name__}: {error}"))
            return
        if isinstance(answer, dict):
            data = json.dumps(answer).encode()
            if fault is not None:
                half = data[: len(data) // 2 if fault.cut_after or fault.hang_after else 0]
                await _fail(reader, writer, half, fault, len(data))
            await _send(writer, 200, data)
        else:
            await self._stream(reader, writer, answer, fault)
        self.answered[digest] += 1

    async def _stream(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, events: Iterator[str], fault: Fault | None
    ) -> None:
        self.open_streams += 1
        try:
            writer.write(_head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}))
            for n, event in enumerate(events):
                if n and self.event_s:
                    await asyncio.sleep(self.event_s)
                if fault is not None and n in (fault.cut_after, fault.hang_after):
                    await _fail(reader, writer, b"", fault, None)
                data = event.encode()
                writer.write(b"%x\r\n%b\r\n" % (len(data), data))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        finally:
            self.open_streams -= 1

    def _chance(self, digest: str) -> Fault | None:
        """Does the first attempt at this request fail, and how? The same in every life of the server."""
        if self._seen[digest] > 1 or int(digest[:8], 16) >= self.failing * 2**32:
            return None
        return (Fault(429, retry_after=0.05), Fault(500), Fault(cut_after=0))[int(digest[8:], 16) % 3]

    # -- what a model says ---------------------------------------------------------------------------------------------

    def _chat(self, asked: dict[str, Any], number: str) -> dict[str, Any] | Iterator[str]:
        messages = asked["messages"]
        system = "\n".join(_text(m.get("content")) for m in messages if m["role"] in ("system", "developer"))
        others = [m for m in messages if m["role"] not in ("system", "developer")]
        call = _tool_call(asked, others, lambda tool: (tool["function"]["name"], tool["function"].get("parameters", {})))
        text = "" if call else self.reply(system, [{**m, "content": _text(m.get("content"))} for m in others])
        read, written = _usage(messages, text or json.dumps(call))
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        base = {"id": f"chatcmpl-{number}", "created": 1_700_000_000, "model": asked["model"]}
        finish = "tool_calls" if call else "stop"
        if asked.get("stream"):
            base["object"] = "chat.completion.chunk"
            return self._chat_events(base, number, text, call, finish, usage if _wants_usage(asked) else None)
        message: dict[str, Any] = {"role": "assistant", "content": None if call else text}
        if call:
            function = {"name": call[0], "arguments": json.dumps(call[1])}
            message["tool_calls"] = [{"id": f"call_{number}", "type": "function", "function": function}]
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        return base | {"object": "chat.completion", "choices": [choice], "usage": usage}

    def _chat_events(
        self,
        base: dict[str, Any],
        number: str,
        text: str,
        call: tuple[str, dict[str, Any]] | None,
        finish: str,
        usage: dict[str, int] | None,
    ) -> Iterator[str]:
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None if call else ""}]
        if call:
            head = {"index": 0, "id": f"call_{number}", "type": "function", "function": {"name": call[0], "arguments": ""}}
            deltas.append({"tool_calls": [head]})
            deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": p}}]} for p in _pieces(json.dumps(call[1]))]
        deltas += [{"content": piece} for piece in _pieces(text)]
        more: dict[str, Any] = {} if usage is None else {"usage": None}
        for delta in deltas:
            yield _data(base | more | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        yield _data(base | more | {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        if usage is not None:
            yield _data(base | {"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    def _responses(self, asked: dict[str, Any], number: str) -> dict[str, Any] | Iterator[str]:
        given = asked["input"]
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
        text = self.reply(asked.get("instructions") or "", [m | {"content": _text(m.get("content"))} for m in messages])
        read, written = _usage(messages, text)
        usage = {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + written,
        }
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        item = {"id": f"msg_{number}", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
        base = {
            "id": f"resp_{number}",
            "object": "response",
            "created_at": 1_700_000_000,
            "model": asked["model"],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }
        whole = base | {"status": "completed", "output": [item], "usage": usage}
        return self._response_events(base, item, whole, text) if asked.get("stream") else whole

    def _response_events(self, base: dict[str, Any], item: dict[str, Any], whole: dict[str, Any], text: str) -> Iterator[str]:
        begun = base | {"status": "in_progress", "output": []}
        at = {"output_index": 0, "item_id": item["id"], "content_index": 0}
        part = item["content"][0]
        events: list[dict[str, Any]] = [
            {"type": "response.created", "response": begun},
            {"type": "response.output_item.added", "output_index": 0, "item": item | {"status": "in_progress", "content": []}},
            {"type": "response.content_part.added", **at, "part": part | {"text": ""}},
            *({"type": "response.output_text.delta", **at, "delta": piece, "logprobs": []} for piece in _pieces(text)),
            {"type": "response.output_text.done", **at, "text": text, "logprobs": []},
            {"type": "response.content_part.done", **at, "part": part},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {"type": "response.completed", "response": whole},
        ]
        for n, event in enumerate(events):
            yield _named(event | {"sequence_number": n})

    def _messages(self, asked: dict[str, Any], number: str) -> dict[str, Any] | Iterator[str]:
        messages = asked["messages"]
        call = _tool_call(asked, messages, lambda tool: (tool["name"], tool.get("input_schema", {})))
        said = [m | {"content": _text(m["content"])} for m in messages]
        text = "" if call else self.reply(_text(asked.get("system")), said)
        read, written = _usage(messages, text or json.dumps(call))
        block = (
            {"type": "tool_use", "id": f"toolu_{number}", "name": call[0], "input": call[1]}
            if call
            else {"type": "text", "text": text}
        )
        message = {
            "id": f"msg_{number}",
            "type": "message",
            "role": "assistant",
            "model": asked["model"],
            "content": [block],
            "stop_reason": "tool_use" if call else "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": read, "output_tokens": written},
        }
        return self._message_events(message, block, call) if asked.get("stream") else message

    def _message_events(
        self, message: dict[str, Any], block: dict[str, Any], call: tuple[str, dict[str, Any]] | None
    ) -> Iterator[str]:
        usage = message["usage"]
        begun = message | {"content": [], "stop_reason": None, "usage": usage | {"output_tokens": 1}}
        yield _named({"type": "message_start", "message": begun})
        nothing: dict[str, Any] = {"input": {}} if call else {"text": ""}
        empty = block | nothing
        yield _named({"type": "content_block_start", "index": 0, "content_block": empty})
        yield _named({"type": "ping"})
        for piece in _pieces(json.dumps(call[1]) if call else block["text"]):
            delta = {"type": "input_json_delta", "partial_json": piece} if call else {"type": "text_delta", "text": piece}
            yield _named({"type": "content_block_delta", "index": 0, "delta": delta})
        yield _named({"type": "content_block_stop", "index": 0})
        ended = {"stop_reason": message["stop_reason"], "stop_sequence": None}
        yield _named({"type": "message_delta", "delta": ended, "usage": {"output_tokens": usage["output_tokens"]}})
        yield _named({"type": "message_stop"})

    def _embeddings(self, asked: dict[str, Any], _: str) -> dict[str, Any]:
        texts = [asked["input"]] if isinstance(asked["input"], str) else asked["input"]
        vectors = [[byte / 127.5 - 1 for byte in hashlib.blake2b(str(t).encode(), digest_size=8).digest()] for t in texts]
        if asked.get("encoding_format") == "base64":  # what the openai package asks for
            coded: list[Any] = [base64.b64encode(array.array("f", vector).tobytes()).decode() for vector in vectors]
        else:
            coded = vectors
        read = sum(_words(str(text)) for text in texts)
        return {
            "object": "list",
            "model": asked["model"],
            "data": [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(coded)],
            "usage": {"prompt_tokens": read, "total_tokens": read},
        }

    def _models(self, _: dict[str, Any], __: str) -> dict[str, Any]:
        model = {"id": "small", "object": "model", "created": 1_700_000_000, "owned_by": "durable_nb"}
        return {"object": "list", "data": [model]}


_HANDLERS: dict[tuple[str, str], Callable[[ModelServer, dict[str, Any], str], dict[str, Any] | Iterator[str]]] = {
    ("POST", "/v1/chat/completions"): ModelServer._chat,
    ("POST", "/v1/responses"): ModelServer._responses,
    ("POST", "/v1/messages"): ModelServer._messages,
    ("POST", "/v1/embeddings"): ModelServer._embeddings,
    ("GET", "/v1/models"): ModelServer._models,
}


# -- what a model says -----------------------------------------------------------------------------------------------------


def _repeat(system: str, messages: list[dict[str, Any]]) -> str:  # noqa: ARG001
    return f"You said: {messages[-1]['content']}"


def _text(content: Any) -> str:
    """The text of a message: a string, or parts that have some."""
    if content is None or isinstance(content, str):
        return content or ""
    return " ".join(_text(part.get("text") or part.get("content")) for part in content)


def _tool_call(
    asked: dict[str, Any], messages: list[dict[str, Any]], told: Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]
) -> tuple[str, dict[str, Any]] | None:
    """The first tool that is offered is called, with arguments made up from its schema, unless a tool has answered already."""
    tools, choice, last = asked.get("tools"), asked.get("tool_choice"), messages[-1]
    results = last["content"] if isinstance(last.get("content"), list) else []
    answered = last["role"] == "tool" or any(part.get("type") == "tool_result" for part in results)
    if not tools or answered or choice == "none" or (isinstance(choice, dict) and choice.get("type") == "none"):
        return None
    name, schema = told(tools[0])
    made_up: dict[str, Any] = {"string": _text(last["content"]), "integer": 1, "number": 1.5, "boolean": True, "array": []}
    properties = schema.get("properties", {})
    return name, {key: made_up.get(str(described.get("type"))) for key, described in properties.items()}


def _wants_usage(asked: dict[str, Any]) -> bool:
    return bool((asked.get("stream_options") or {}).get("include_usage"))


def _words(text: str) -> int:
    return len(text.split())


def _usage(messages: list[dict[str, Any]], text: str) -> tuple[int, int]:
    """A word is a token."""
    return sum(_words(_text(message.get("content"))) for message in messages), _words(text)


def _pieces(text: str) -> list[str]:
    """Words, each with what follows it."""
    return re.findall(r"\S+\s*|\s+", text)


def _data(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


def _named(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\n{_data(event)}"


def _error(path: str, status: int, message: str) -> bytes:
    kind = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}.get(
        status, "api_error" if status >= 500 else "invalid_request_error"
    )
    error = {"type": kind, "message": message}
    if path == "/v1/messages":
        return json.dumps({"type": "error", "error": error}).encode()
    return json.dumps({"error": error | {"code": kind, "param": None}}).encode()


# -- HTTP ------------------------------------------------------------------------------------------------------------------


async def _read(reader: asyncio.StreamReader) -> Received | None:
    """The next request of a connection; None where there is none any more."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    method, path, _ = head[0].split(" ", 2)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:]) if name}
    if "chunked" in headers.get("transfer-encoding", ""):
        body = b"".join([chunk async for chunk in _chunks(reader)])
    else:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Received(method, path, headers, body)


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    while (await reader.readline()).strip():
        pass  # trailers


def _head(status: int, headers: dict[str, str]) -> bytes:
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
    lines = [f"HTTP/1.1 {status} {phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def _send(writer: asyncio.StreamWriter, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    named = {"Content-Type": "application/json", **(headers or {}), "Content-Length": str(len(body))}
    writer.write(_head(status, named) + body)
    await writer.drain()


async def _fail(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, part: bytes, fault: Fault, length: int | None
) -> None:
    """The answer goes no further than this; ends by an exception."""
    if part and length is not None:
        writer.write(_head(200, {"Content-Type": "application/json", "Content-Length": str(length)}) + part)
    await writer.drain()
    if fault.hang_after is not None:
        await reader.read()  # until the client goes away
    raise ConnectionAbortedError
