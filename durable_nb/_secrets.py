"""Credentials by name. What code holds and passes on is a reference; the value is looked up where a request is sent.

A reference is a text that stands for the value: it may be put into headers and URLs, formatted, and given to a client as its
`api_key`. It holds a digest under the user's signing key, so nobody else can write one into a text that we send.
"""

from __future__ import annotations

import hmac
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Self

from durable_nb._preview import hide
from durable_nb._redaction import REDACTED
from durable_nb._variables import variable
from durable_nb.errors import NonRetryableError

_NAME = r"[A-Za-z_][A-Za-z0-9_.]*"
_REFERENCE = re.compile(rf"durable-secret-({_NAME})-([0-9a-f]{{32}})")

_ways: dict[str, Callable[[], str]] = {}
"""How secrets that are not in the environment are got in this process, by name."""
_got: dict[str, str] = {}


class Secret(str):
    """A reference. Its text is no secret: only this user's processes can make the value of it, and only in sending a request
    or beginning a step's body."""  # fmt: skip

    __slots__ = ("name",)
    name: str

    def __new__(cls, name: str) -> Self:
        made = super().__new__(cls, f"durable-secret-{name}-{_digest(name)}")
        made.name = name
        return made

    def __repr__(self) -> str:
        return f"durable.secret({self.name!r})"

    def __reduce__(self) -> Any:
        return Secret, (self.name,)


def secret(name: str, get: Callable[[], str] | None = None) -> str:
    """A reference to the secret `name`, to be passed to a step or put into a header, a URL or a client's `api_key`.

    Its value is the environment variable of that name, else what `get()` returns, which is called once in a process. It is
    looked up in the body of the step that uses it, so it is never recorded and no part of an identity: change it, and nothing
    runs again. As an argument of a step it arrives as its value. NonRetryableError, in the body, where there is none.

        client = AsyncOpenAI(api_key=durable.secret("OPENAI_API_KEY"), http_client=durable.AsyncClient())
        await durable.call("me", url, headers={"Authorization": f"Bearer {durable.secret('TOKEN', getpass)}"})
    """
    if not isinstance(name, str):
        raise TypeError(f"durable.secret({type(name).__name__}): give the secret's name, such as 'OPENAI_API_KEY'")
    if not re.fullmatch(_NAME, name):
        raise ValueError(
            "durable.secret(...): the name has other characters than letters, digits, '_' and '.'; give the name of an "
            "environment variable, such as 'OPENAI_API_KEY', never the secret itself"
        )
    if get is not None:
        if not callable(get):
            raise TypeError(f"durable.secret({name!r}, ...): give a function that returns the secret, such as getpass.getpass")
        if _ways.get(name) is not get:
            _ways[name] = get
            _got.pop(name, None)
    return Secret(name)


def value_of(name: str) -> str:
    """The secret itself."""
    if found := variable(name):
        hide(found)
        return found
    if name not in _got and name in _ways:
        found = _ways[name]()
        if not isinstance(found, str):
            raise NonRetryableError(f"the function given to durable.secret({name!r}, ...) returned no text")
        _got[name] = found
        hide(found)
    if not _got.get(name):
        raise NonRetryableError(
            f"the secret {name!r} is missing: the environment has no variable {name}, and no function gives it. Set it before "
            f"you start (export {name}=...), or write durable.secret({name!r}, getpass.getpass) to be asked"
        )
    return _got[name]


def reveal(text: str) -> str:
    """The text with the values of the secrets that it refers to."""
    return _REFERENCE.sub(lambda found: value_of(found[1]) if _is_own(found) else found[0], text) if _MARK in text else text


def without_names(text: str) -> str:
    """The text with the same word in place of every reference: as an identity sees it."""
    return _REFERENCE.sub(lambda found: "secret" if _is_own(found) else found[0], text) if _MARK in text else text


def has_reference(text: str) -> bool:
    """Does it refer to a secret?"""
    return _MARK in text and any(map(_is_own, _REFERENCE.finditer(text)))


def names_in(text: str | bytes) -> list[str]:
    """Of the secrets that it refers to."""
    if (_MARK if isinstance(text, str) else _MARK.encode()) not in text:  # type: ignore[operator]
        return []
    text = text if isinstance(text, str) else text.decode("latin-1")
    return [found[1] for found in _REFERENCE.finditer(text) if _is_own(found)]


def template(text: str) -> tuple[str, ...]:
    """The text for another user's process: parts, of which every second one is a secret's name."""
    parts, at = list[str](), 0
    for found in filter(_is_own, _REFERENCE.finditer(text)):
        parts += [text[at : found.start()], found[1]]
        at = found.end()
    return (*parts, text[at:])


def from_template(parts: Iterable[str]) -> str:
    """The text that `template` was given, with references of this user."""
    return "".join(Secret(part) if n % 2 else part for n, part in enumerate(parts))


def holds_secret(value: Any, depth: int = 2) -> bool:
    """Does it refer to a secret: a text, or a small list, tuple or dict with such a text among what it holds?"""
    kind = type(value)
    if kind is str or kind is Secret:
        return has_reference(value)
    if kind not in (list, tuple, dict) or not depth or len(value) > _SMALL:
        return False
    return any(holds_secret(held, depth - 1) for held in (value.values() if kind is dict else value))


def revealed(value: Any, values: set[str]) -> Any:
    """The same with values in place of the references that `holds_secret` finds; they are added to `values`."""
    if isinstance(value, str):
        if _MARK in value:
            values.update(value_of(found[1]) for found in _REFERENCE.finditer(value) if _is_own(found))
        return reveal(value)
    if not holds_secret(value, 3):
        return value
    if isinstance(value, dict):
        return {key: revealed(held, values) for key, held in value.items()}
    return type(value)(revealed(held, values) for held in value)


def call_revealed(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`fn(*args, **kwargs)` with values in place of references. What it raises says none of the values: it is recorded."""
    values: set[str] = set()
    given, named = revealed(args, values), revealed(kwargs, values)
    try:
        result = fn(*given, **named)
    except Exception as error:
        _redact(error, values)
        raise
    return _awaited(result, values) if inspect.isawaitable(result) else result


async def _awaited(result: Awaitable[Any], values: set[str]) -> Any:
    try:
        return await result
    except Exception as error:
        _redact(error, values)
        raise


def _redact(error: BaseException | None, values: set[str]) -> None:
    """Take the values out of an error's text, and of what caused it."""
    met = list[BaseException]()
    while error is not None and not any(error is one for one in met):
        met.append(error)
        error.args = tuple(_without(arg, values) for arg in error.args)
        error = error.__cause__ or error.__context__


def _without(text: Any, values: set[str]) -> Any:
    for value in values if isinstance(text, str) else ():
        text = text.replace(value, REDACTED)
    return text


_MARK = "durable-secret-"
_SMALL = 64
"""So many things a container holds at most to be looked into: a step's arguments may be large."""


def _digest(name: str) -> str:
    from durable_nb._codec import keyed_digest  # loading the extension needs none of it

    return keyed_digest(f"durable_nb reference {name}")


def _is_own(found: re.Match[str]) -> bool:
    return hmac.compare_digest(_digest(found[1]), found[2])
