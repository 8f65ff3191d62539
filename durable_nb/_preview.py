"""A short text of a value, for people: what a step was given and what it returned. Pure, bounded, and free of secrets.

No code of the user's is called: values of exactly the builtin types, and arrays and frames of numpy and pandas, are shown by
what they hold; everything else by its type's name. A `repr` may raise, hang, be a megabyte, or print a password.
"""

from __future__ import annotations

import datetime as dt
import decimal
import fractions
import functools
import json
import pathlib
import re
import sys
import time
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from durable_nb._variables import variables

LENGTH = 240
"""Characters of a preview, unless it is asked for another length."""


class Preview(NamedTuple):
    """What a step was given and what it gave, as short texts."""

    arguments: str = ""
    result: str = ""


NONE = Preview()

HIDDEN = "[redacted]"

_SECRET_NAME = re.compile(r"key|token|secret|signature|passw|authorization|cookie|credential", re.IGNORECASE)
_NUMBER_TOO = re.compile(r"passw|secret|credential", re.IGNORECASE)
"""Under such names a number is hidden as well; under `tokens` it is a count."""
_IN_TEXT = re.compile(
    r"(?P<userinfo>(?<=://)[^/?#@\s'\"]+(?=@))"
    r"|(?P<parameter>(?<=[?&])[^=&#\s'\"]*(?:key|token|secret|signature|passw)[^=&#\s'\"]*=)[^&#\s'\"]*"
    r"|(?P<header>\b(?:proxy-authorization|authorization|set-cookie|cookie|x-api-key|api[-_]key|password|passwd|secret|"
    r"client_secret|private_key|(?:access_|refresh_|id_|auth_)?token)\b['\"]?\s*[:=]\s*)"
    r"[^\r\n,;}]+"
    r"|(?P<scheme>\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}"
    r"|\b(?:sk|pk|rk|ghp|gho|ghs|github_pat|xox[abprs]|glpat|hf)[-_][\w-]{10,}"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|\beyJ[\w-]{10,}\.[\w-]{5,}\.[\w-]*",
    re.IGNORECASE,
)
_MARKS = (
    *("@", "authorization", "cookie", "api-key", "api_key", "passw", "secret", "private_key", "token", "bearer", "basic"),
    *("sk-", "sk_", "pk-", "pk_", "rk-", "rk_", "ghp", "gho", "ghs", "github_pat", "xox", "glpat", "hf-", "hf_", "akia", "eyj"),
)
"""One of these is in every text that `_IN_TEXT` finds anything in, but for a URL's parameters. Looking for them takes a
hundredth of the time."""
_SHORTEST_FORM = 13
"""Characters of the shortest name or word that is a credential by its form."""
_SHORTEST_SECRET = 8
_ITEMS = 20
_DEPTH = 4
_BITS = 2000


def preview(value: Any, length: int = LENGTH, *, of: str = "") -> str:
    """Return a text of at most `length` characters that tells what `value` is.

    `of`: the name of the step or function that has returned it. A text that `get_token` returns is a token.
    """
    try:
        return _finished(_Budget(length).show(value, of if type(value) in _TEXTS else ""), length)
    except Exception:  # a library's value in an odd state: a text about it is no reason for a step to fail
        return f"<{type_name(type(value))}>"


def preview_call(arguments: Sequence[Any], named: Mapping[str, Any], names: Sequence[str] = (), length: int = LENGTH) -> str:
    """Return the arguments of a call, as they would be written. `names`: of the positional ones, as far as known."""
    if not arguments and not named:
        return ""
    try:
        budget = _Budget(length)
        known = [*names[: len(arguments)], *[""] * (len(arguments) - len(names))]
        parts = [budget.show(value, name) for value, name in zip(arguments, known, strict=True) if budget.left > 0]
        parts += [f"{redacted(name)}={budget.show(value, name)}" for name, value in named.items() if budget.left > 0]
        return _finished(", ".join(parts), length)
    except Exception:  # as above
        return ", ".join(f"<{type_name(type(value))}>" for value in arguments[:_ITEMS])


def preview_request(described: Any, length: int = LENGTH) -> str:
    """Return what an HTTP request asks for, of the plain data that identify it: `GET https://example.org/rates`."""
    match described:
        case {"method": str(method), "url": str(url), "body": str() | bytes() as body}:
            text = body if isinstance(body, str) else body[: 2 * length].decode("utf-8", "replace")
            said = redacted(f"{method} {url} {text[: 2 * length]}").strip()
            return _finished(" ".join(said.split()), length)
    return preview(described, length)


def preview_answer(recorded: Any, length: int = LENGTH) -> str:
    """Return what an HTTP response says, as it is recorded; of a model's answer its text: `200 OK · The parcel is late.`"""
    match recorded:
        case {"status": int(status), "reason": str(reason), "content": str() | bytes() as content}:
            text = content if isinstance(content, str) else content[:_ANSWER].decode("utf-8", "replace")
            if '"choices"' in text or '"content_block' in text or '"stop_reason"' in text:
                text = "".join(_unquoted(part) for part in _SAID.findall(text[:_ANSWER])) or text
            said = redacted(text[: 2 * length + 200])
            return _finished(" ".join(f"{status} {reason} · {said}".split()).strip(" ·"), length)
    return preview(recorded, length)


_ANSWER = 64 * 1024
"""Characters of an answer that are looked through for what a model says."""
_SAID = re.compile(r'"(?:content|text)": ?("(?:[^"\\]|\\.)*")')


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return ""


def redacted(text: str) -> str:
    """Return `text` without what looks like a credential, and without the secrets that this process knows."""
    return _hide_known(_without_forms(text))


def _without_forms(text: str) -> str:
    if len(text) < _SHORTEST_FORM and text.isidentifier():
        return text
    folded = text.casefold()
    may_hold = any(mark in folded for mark in _MARKS) or ("=" in folded and ("?" in folded or "&" in folded))
    return _IN_TEXT.sub(_hide, text) if may_hold else text


def _hide(found: re.Match[str]) -> str:
    kept = found["parameter"] or found["header"] or found["scheme"] or ""
    return f"{kept}{HIDDEN}"


_known: tuple[float, tuple[str, ...]] = (float("-inf"), ())
_told: set[str] = set()


def hide(secret: str) -> None:
    """From now on no preview of this process tells `secret`."""
    if len(secret) >= _SHORTEST_SECRET:
        _told.add(secret)


def _hide_known(text: str) -> str:
    """Hide what environment variables that are named like a secret hold, wherever it came from, and what `hide` was told."""
    global _known  # noqa: PLW0603  a memory of a second: looking through the environment takes longer than a preview
    if time.monotonic() - _known[0] > 1.0:
        found = variables().items()
        values = {value for name, value in found if len(value) >= _SHORTEST_SECRET and _is_secret(name)}
        _known = time.monotonic(), tuple(sorted(values, key=len, reverse=True))
    for secret in _known[1]:
        if secret in text:
            text = text.replace(secret, HIDDEN)
    for secret in tuple(_told):
        if secret in text:
            text = text.replace(secret, HIDDEN)
    return text


def _finished(text: str, length: int) -> str:
    text = _cut(_hide_known(text), length)
    # names of columns and of keywords may hold anything; what can't be printed can't be stored as UTF-8 either
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


class _Budget:
    """Walks a value until as many characters are spent as may be shown."""

    def __init__(self, length: int) -> None:
        self.left = length

    def show(self, value: Any, name: str = "", depth: int = 0) -> str:
        """Return the text of `value`, which is found under `name`."""
        kind = type(value)
        hides = bool(name) and _is_secret(name)
        if kind in _CONTAINERS:
            return self._container(value, kind, name if hides else "", depth)
        if hides and (kind is str or kind in _BYTES or _NUMBER_TOO.search(name)) and value is not None:
            text = HIDDEN
        elif kind is str or kind in _PATHS:
            text = _text(str(value), self.left)
        elif kind in _LEAVES:
            text = _LEAVES[kind](value)
        else:
            text = _of_library(value, kind, self) or f"<{type_name(kind)}>"
        self.left -= len(text)
        return text

    def _container(self, value: Any, kind: type, name: str, depth: int) -> str:
        opens, closes = _CONTAINERS[kind]
        total = len(value)
        if depth >= _DEPTH or self.left <= 0:
            return f"{opens}… {total} …{closes}" if total else opens + closes
        self.left -= len(opens) + len(closes)
        parts: list[str] = []
        try:
            for item in islice(value.items() if isinstance(value, dict) else value, _ITEMS):
                if self.left <= 0:
                    break
                parts.append(self._item(item, kind, name, depth))
                self.left -= 2
        except RuntimeError:  # another thread changes it
            return f"{opens}… {total} …{closes}"
        if len(parts) < total:
            parts.append(f"… {total:,} in all")
        elif kind is tuple and total == 1:
            return f"({parts[0]},)"
        return opens + ", ".join(parts) + closes if total or kind is not set else "set()"

    def _item(self, item: Any, kind: type, name: str, depth: int) -> str:
        if kind not in _MAPPINGS:
            return self.show(item, name, depth + 1)
        key, value = item
        called = key if type(key) is str else ""
        shown = self.show(key, depth=depth + 1)
        return f"{shown}: {self.show(value, called if _is_secret(called) else name, depth + 1)}"


def _is_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None


def type_name(kind: type) -> str:
    """Return the name of a class; a metaclass of the user's is not asked."""
    return str(type.__dict__["__name__"].__get__(kind))


def _belongs(kind: type, library: Any) -> bool:
    """Tell whether a class is the very one that the library has under that name: a subclass may override anything."""
    return getattr(library, type_name(kind), None) is kind


def _text(value: str, left: int) -> str:
    if len(value) < _SHORTEST_SECRET and value.isidentifier():
        return f"'{value}'"
    # a secret that the cut goes through is found too: more is searched than shown
    most = max(left, 20)
    shown = redacted(value[: most + 200])
    shown = shown if len(value) <= most else shown[:most]
    # `repr` of exactly a str: quotes it, and escapes what would move a cursor or turn the text around it
    return f"{repr(shown)[:-1]}…' ({len(value):,} characters)" if len(value) > most else repr(shown)


def _int(value: int) -> str:
    return str(value) if value.bit_length() <= _BITS else f"<int of {value.bit_length():,} bits>"


def _decimal(value: decimal.Decimal) -> str:
    return str(value) if len(value.as_tuple().digits) < _BITS else "<Decimal>"


def _moment(value: Any) -> str:
    # a tzinfo of the user's would be asked for its offset
    known = value.tzinfo is None or value.tzinfo is dt.UTC
    return str(value) if known else f"{value.replace(tzinfo=None)} (zone)"


def _function(value: Any) -> str:
    return f"<function {_cut(value.__name__, 80)}>"


_BYTES = (bytes, bytearray)
_TEXTS = frozenset({str, *_BYTES})
_PATHS = frozenset({pathlib.PosixPath, pathlib.PurePosixPath, pathlib.WindowsPath, pathlib.PureWindowsPath})
_LEAVES: dict[type, Callable[[Any], str]] = {
    type(None): str,
    bool: str,
    int: _int,
    float: str,
    complex: str,
    bytes: lambda value: f"<bytes, {len(value):,} bytes>",
    bytearray: lambda value: f"<bytearray, {len(value):,} bytes>",
    memoryview: lambda _: "<memoryview>",
    type(...): str,
    type(NotImplemented): str,
    range: lambda value: f"range({_int(value.start)}, {_int(value.stop)}, {_int(value.step)})",
    dt.datetime: _moment,
    dt.time: _moment,
    dt.date: str,
    dt.timedelta: str,
    decimal.Decimal: _decimal,
    fractions.Fraction: lambda value: f"{_int(value.numerator)}/{_int(value.denominator)}",
    uuid.UUID: str,
    types.FunctionType: _function,
    types.BuiltinFunctionType: _function,
    types.ModuleType: lambda _: "<module>",
    type: lambda value: f"<class {type_name(value)}>",
}
_MAPPINGS = frozenset({dict, defaultdict, OrderedDict, Counter})
_CONTAINERS: dict[type, tuple[str, str]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    dict: ("{", "}"),
    set: ("{", "}"),
    frozenset: ("frozenset({", "})"),
    deque: ("deque([", "])"),
    defaultdict: ("defaultdict({", "})"),
    OrderedDict: ("{", "}"),
    Counter: ("Counter({", "})"),
}


# -- numpy and pandas, where they have been imported ---------------------------------------------------------------------


def _of_library(value: Any, kind: type, budget: _Budget) -> str:
    secrets = sys.modules.get("durable_nb._secrets")
    if secrets is not None and kind is secrets.Secret:
        return repr(value)
    numpy, pandas = sys.modules.get("numpy"), sys.modules.get("pandas")
    if numpy is not None:
        if kind is getattr(numpy, "ndarray", None):
            return _array(value, budget)
        if issubclass(kind, numpy.generic) and _belongs(kind, numpy):
            return _scalar(value, numpy)
    if pandas is not None:
        if kind is getattr(pandas, "DataFrame", None):
            return _frame(value, budget)
        if kind is getattr(pandas, "Series", None):
            return f"<Series, {len(value):,} × {_dtype(value.dtype)}>"
        if kind is getattr(pandas, "Timestamp", None) or kind is getattr(pandas, "Timedelta", None):
            return str(value) if getattr(value, "tzinfo", None) is None else str(value.tz_localize(None)) + " (zone)"
        if issubclass(kind, pandas.Index) and _belongs(kind, pandas):
            return f"<{type_name(kind)}, {len(value):,} × {_dtype(value.dtype)}>"
    return ""


def _scalar(value: Any, numpy: Any) -> str:
    if isinstance(value, (numpy.number, numpy.bool_)):
        return str(value.item()) if value.dtype.itemsize <= 16 else f"<{type_name(type(value))}>"
    if type(value) is numpy.str_:
        return _text(str(value), LENGTH)
    return f"<{type_name(type(value))}>"


def _array(value: Any, budget: _Budget) -> str:
    shape = " × ".join(f"{n:,}" for n in value.shape) or "scalar"
    head = f"array {shape} {_dtype(value.dtype)}"
    if value.dtype.kind not in "biuf" or not value.size or budget.left < len(head) + 20:
        return f"<{head}>"
    first = value.flat[:6].tolist()
    shown = ", ".join(f"{item:.6g}" if isinstance(item, float) else str(item) for item in first)
    return f"<{head}: {shown}{', …' if value.size > len(first) else ''}>"


def _frame(value: Any, budget: _Budget) -> str:
    rows, columns = value.shape
    head = f"DataFrame {rows:,} × {columns:,}"
    budget.left -= len(head) + 4
    shown = []
    for name, dtype in islice(zip(value.columns, value.dtypes, strict=True), _ITEMS):
        if budget.left <= 0:
            break
        called = _cut(_IN_TEXT.sub(_hide, name), 40) if type(name) is str else budget.show(name)
        shown.append(f"{called} {_dtype(dtype)}")
        budget.left -= len(shown[-1]) + 2
    more = ", …" if len(shown) < columns else ""
    return f"<{head}: {', '.join(shown)}{more}>" if shown else f"<{head}>"


def _dtype(dtype: Any) -> str:
    numpy, pandas = sys.modules.get("numpy"), sys.modules.get("pandas")
    if numpy is not None and isinstance(dtype, numpy.dtype):
        return str(dtype) if dtype.names is None else f"{len(dtype.names)} fields"
    # an extension type of the user's would be asked for its name
    return str(dtype) if pandas is not None and _belongs(type(dtype), pandas) else type_name(type(dtype))


def names_of(function: Any) -> tuple[str, ...]:
    """Return the names of the positional parameters of a function or method; nothing for any other callable."""
    bound = 0
    while type(function) is functools.partial:
        bound, function = bound + len(function.args), function.func
    if type(function) is types.MethodType:
        bound, function = bound + 1, function.__func__
    if type(function) is not types.FunctionType:
        return ()
    code = function.__code__
    return code.co_varnames[bound : code.co_argcount]


def last_lines(texts: Iterable[str], lines: int, length: int) -> list[str]:
    """Return the last `lines` of what was written, each cut to `length` and without what looks like a credential."""
    kept: deque[str] = deque(maxlen=lines)
    for text in texts:
        kept.extend(_cut(redacted(line[: length + 200]), length) for line in text.splitlines())
    return list(kept)
