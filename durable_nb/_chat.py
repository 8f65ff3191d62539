"""`durable.chat`: a model's answer as a step, from OpenAI-compatible endpoints and from Anthropic's."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx

from durable_nb import _exchange
from durable_nb._clock import parse_duration
from durable_nb._current import Run, StandsFor, current_body, run_for
from durable_nb._exchange import Credentials, Line, Recorded, Sent, StatusError
from durable_nb._misuse import explained
from durable_nb._redaction import redact, said
from durable_nb._secrets import secret
from durable_nb._verbs import check_name
from durable_nb.http import ask

TIMEOUT_S, CONNECT_TIMEOUT_S = 600.0, 10.0
"""A long answer takes minutes, and comes all at once."""
_MAX_TOKENS = 4096
"""Anthropic wants to be told."""


@dataclass(frozen=True)
class ChatResult:
    """What a model has answered."""

    text: str
    """'' where it has said nothing, but called tools."""
    message: dict[str, Any]
    """The assistant's message, to be put behind the others in the next call."""
    usage: dict[str, Any]
    """Tokens, as the service counts them."""
    raw: dict[str, Any]
    """The whole answer."""


class ChatError(httpx.HTTPStatusError):
    """The service refused. httpx's own can't be pickled, so whoever awaits a workflow would be given another one."""

    def __reduce__(self) -> Any:
        return _refused, (str(self), self.request, self.response)


def _refused(text: str, request: httpx.Request, response: httpx.Response) -> ChatError:
    return ChatError(text, request=request, response=response)


@dataclass(frozen=True)
class _Api:
    """One way of asking."""

    name: str
    base_url: str
    path: str
    key: str
    """The environment variable that holds the key; with `base` in place of `key`, the address."""
    base: str
    headers: Callable[[str], dict[str, str]]
    body: Callable[[list[Any], dict[str, Any]], dict[str, Any]]
    message: Callable[[dict[str, Any]], dict[str, Any]]
    """The assistant's message; KeyError, IndexError or TypeError where the answer has none."""


@explained
def chat(
    name: str,
    *,
    model: str,
    messages: Sequence[Mapping[str, Any]],
    base_url: str | None = None,
    api_key: str | None = None,
    api: str = "openai",
    timeout: float | str | timedelta | None = None,
    retries: int = 3,
    **options: Any,
) -> Coroutine[Any, Any, ChatResult]:
    """Ask a model as the step `name`, or return its recorded answer.

    base_url   of a service with OpenAI's interface; default `OPENAI_BASE_URL`, else OpenAI's. `{base_url}/chat/completions` is
               asked
    api_key    default: the environment's `OPENAI_API_KEY`, looked up when the request is sent; a text, `durable.secret(name)`,
               or '' for a server that wants none. It is recorded nowhere and no part of the step's identity
    api        "anthropic" asks `{base_url}/v1/messages`; the names are `ANTHROPIC_BASE_URL` and `ANTHROPIC_API_KEY` then, and
               messages of the role "system" go where Anthropic wants them
    timeout    of each attempt as a whole; default 10 min
    retries    after network errors, 408, 429, 5xx and answers that can't be read; pauses that the server asks for are kept
    options    go into the request: `temperature`, `max_tokens`, `tools`, `response_format` ...

    httpx.HTTPStatusError for a status of 400 or more; in a cell it isn't kept, so the next execution asks again. For streams
    use `AsyncOpenAI(http_client=durable.AsyncClient())`.
    """
    __tracebackhide__ = True
    name = check_name("chat", name)
    run = run_for("chat")
    what = f"durable.chat({name!r}, ...)"
    _check(what, model, messages, api, api_key, options)
    kind = _APIS[api]
    limit_s = TIMEOUT_S if timeout is None else parse_duration(timeout).total_seconds()
    url = f"{(base_url or os.environ.get(kind.base) or kind.base_url).rstrip('/')}{kind.path}"
    headers = {} if api_key == "" else kind.headers(api_key if api_key is not None else secret(kind.key))
    try:
        request = httpx.Request(
            "POST",
            url,
            headers=headers,
            json={"model": model, **kind.body(list(messages), options)},
            extensions={"timeout": httpx.Timeout(limit_s, connect=min(CONNECT_TIMEOUT_S, limit_s)).as_dict()},
        )
    except (httpx.InvalidURL, TypeError, ValueError) as error:
        raise ValueError(f"{what}, {said(url)!r}: {error}; nothing was sent") from None  # its cause may hold the key
    if request.url.scheme not in ("http", "https") or not request.url.host:
        raise ValueError(f"{what}: base_url={said(url)!r} needs http:// or https:// and a host; nothing was sent")
    sent, credentials = _exchange.as_data(request, keyed=True, limit_s=limit_s)
    _exchange.redact_log_of("httpx")
    step = ask(run, "chat", name, answered, (api, sent, credentials), _exchange.described(request, ()), retries)
    return _result(run, step, name, kind, request)


async def answered(api: str, sent: Sent, credentials: Credentials) -> Recorded:
    """The body of the step. httpx.DecodingError where a status below 400 comes with something else than a model's answer."""
    recorded = await _exchange.exchange(sent, credentials, Line())
    try:
        _APIS[api].message(_json(recorded))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        body = current_body.get()
        raise httpx.DecodingError(
            f"step {body.name if body is not None else ''!r}, {sent.method} {said(sent.url)}: {_misread(recorded, error)}; "
            f"nothing was recorded. Is the address that of a service with {_APIS[api].name}'s interface?",
            request=None,
        ) from None
    return recorded


async def _result(run: Run, step: Coroutine[Any, Any, Recorded], name: str, api: _Api, request: httpx.Request) -> ChatResult:
    try:
        recorded = await step
    except StatusError as refused:
        response = _exchange.restored(refused.recorded, httpx, request)  # without credentials: the error may be recorded
        run.publish(StandsFor(refused, response))
        where, why = said(str(request.url)), f"{_reason(response)}{_remedy(response.status_code, api)}"
        raise ChatError(
            f"step {name!r}: {where} answered {refused}: {why}",
            request=redact(request),
            response=response,
        ) from None
    raw = _json(recorded)
    message = api.message(raw)
    return ChatResult(_text(message.get("content")), message, raw.get("usage") or {}, raw)


def _json(recorded: Recorded) -> Any:
    return _exchange.restored(recorded, httpx, None).json()


def _text(content: Any) -> str:
    """Of a message: a text, parts that have some, or nothing."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or () if isinstance(part.get("text"), str))


def _check(what: str, model: object, messages: object, api: object, api_key: object, options: dict[str, Any]) -> None:
    __tracebackhide__ = True
    if not isinstance(model, str) or not model.strip():
        raise ValueError(f"{what}: model={model!r}: give the model's name, such as 'gpt-5-mini'; nothing was sent")
    if api not in _APIS:
        raise ValueError(f"{what}: api={api!r}: write 'openai' or 'anthropic'; nothing was sent")
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise TypeError(
            f"{what}: messages is {_kind(messages)}; give a list of dicts, [{{'role': 'user', 'content': '...'}}]. Nothing was "
            "sent"
        )
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(
                f"{what}: messages[{place}] is {_kind(message)} without a 'role'; write {{'role': 'user', 'content': '...'}}. "
                "Nothing was sent"
            )
    if api_key is not None and not isinstance(api_key, str):
        raise TypeError(f"{what}: api_key is {_kind(api_key)}; give a text, or durable.secret('NAME'). Nothing was sent")
    if options.get("stream"):
        raise ValueError(
            f"{what}: chat gives the whole answer; nothing was sent. For a stream use "
            "AsyncOpenAI(http_client=durable.AsyncClient())"
        )


def _kind(value: object) -> str:
    return f"an empty {type(value).__name__}" if isinstance(value, Sequence) and not value else f"a {type(value).__name__}"


def _misread(recorded: Recorded, error: Exception) -> str:
    content = recorded["content"]
    text = content if isinstance(content, str) else content[:100].decode("utf-8", "replace")
    begins = f"{' '.join(text.split())[:60]!r}"
    found = "is not JSON" if isinstance(error, ValueError) else "holds no model's message"
    return f"the answer {found}, it begins with {begins}" if text else "the answer is empty"


def _reason(response: httpx.Response) -> str:
    """What the service says in its own words, on one line."""
    try:
        said_so = response.json()["error"]
        text = said_so["message"] if isinstance(said_so, dict) else said_so
    except (ValueError, LookupError, TypeError):
        text = response.text
    return " ".join(str(text).split())[:300] or "no reason is given"


def _remedy(status: int, api: _Api) -> str:
    if status in (401, 403):
        return f". Set {api.key}, or give api_key=..., and ask again"
    if status == 404:
        return f". Look at model= and base_url= ({api.base})"
    return ""


# -- OpenAI's way and Anthropic's ------------------------------------------------------------------------------------------


def _anthropic_body(messages: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    system = [_text(message["content"]) for message in messages if message["role"] == "system"]
    body = {"messages": [message for message in messages if message["role"] != "system"], "max_tokens": _MAX_TOKENS}
    return body | ({"system": "\n\n".join(system)} if system else {}) | options


def _anthropic_message(answer: dict[str, Any]) -> dict[str, Any]:
    return {"role": answer["role"], "content": [dict(block) for block in answer["content"]]}


_APIS = {
    "openai": _Api(
        "OpenAI",
        "https://api.openai.com/v1",
        "/chat/completions",
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        headers=lambda key: {"Authorization": f"Bearer {key}"},
        body=lambda messages, options: {"messages": messages, **options},
        message=lambda answer: dict(answer["choices"][0]["message"]),
    ),
    "anthropic": _Api(
        "Anthropic",
        "https://api.anthropic.com",
        "/v1/messages",
        "ANTHROPIC_API_KEY",
        "ANTHROPIC_BASE_URL",
        headers=lambda key: {"x-api-key": key, "anthropic-version": "2023-06-01"},
        body=_anthropic_body,
        message=_anthropic_message,
    ),
}
