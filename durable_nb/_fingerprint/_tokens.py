"""Scalars as tokens: each starts with a tag and says how long it is, so no two sequences of tokens run together.

Large ones enter by their xxh3_128, everything else as it is.
"""

from __future__ import annotations

import datetime as dt
import decimal
import fractions
import marshal
import math
import operator
import pathlib
import re
import struct
import uuid
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

FORMAT = 1
PERSON = b"durable-nb %d" % FORMAT
DIGEST_BYTES = 16
BULK_BYTES = 1 << 16


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    if len(data) >= BULK_BYTES:
        return b"S%d:%b" % (len(data), xxh3_128_digest(data))
    return b"s%d:%b" % (len(data), data)


def raw(value: bytes) -> bytes:
    if len(value) >= BULK_BYTES:
        return b"B%d:%b" % (len(value), xxh3_128_digest(value))
    return b"b%d:%b" % (len(value), value)


def integer(value: int) -> bytes:
    if -(1 << 63) <= value < 1 << 63:
        return b"i%d;" % value
    size = value.bit_length() // 8 + 1
    data = value.to_bytes(size, "little", signed=True)
    if size >= BULK_BYTES:
        return b"J%d:%b" % (size, xxh3_128_digest(data))
    return b"I%d:%b" % (size, data)


_pack = struct.Struct("<d").pack


def real(value: float) -> bytes:
    return b"f" + _pack(value) if value == value else b"q"  # noqa: PLR0124  every NaN is the same NaN


def _imaginary(value: complex) -> bytes:
    return b"c" + real(value.real) + real(value.imag)


def _decimal(value: decimal.Decimal) -> bytes:
    sign, digits, exponent = value.as_tuple()
    return b"D" + integer(sign) + text("".join(map(str, digits))) + text(str(exponent))


def _path(value: pathlib.PurePath) -> bytes:
    return b"P" + text(type(value).__name__) + text(str(value))


def _pattern(value: re.Pattern[Any]) -> bytes:
    source = value.pattern
    return b"R" + (text(source) if isinstance(source, str) else raw(source)) + integer(value.flags)


def _range(value: range) -> bytes:
    return b"g" + integer(value.start) + integer(value.stop) + integer(value.step)


def _timedelta(value: dt.timedelta) -> bytes:
    return b"m" + integer(value.days) + integer(value.seconds) + integer(value.microseconds)


SCALARS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"N",
    bool: lambda value: b"T" if value else b"F",
    int: integer,
    float: real,
    complex: _imaginary,
    str: text,
    bytes: raw,
    type(Ellipsis): lambda _: b".",
    type(NotImplemented): lambda _: b"!",
    range: _range,
    decimal.Decimal: _decimal,
    fractions.Fraction: lambda value: b"/" + integer(value.numerator) + integer(value.denominator),
    uuid.UUID: lambda value: b"U" + raw(value.bytes),
    dt.date: lambda value: b"y" + text(value.isoformat()),
    dt.timedelta: _timedelta,
    pathlib.PosixPath: _path,
    pathlib.PurePosixPath: _path,
    pathlib.WindowsPath: _path,
    pathlib.PureWindowsPath: _path,
    re.Pattern: _pattern,
}


# ---- members of sets ----

SIMPLE = frozenset({type(None), bool, int, float, complex, str, bytes})


def plain_members(members: Collection[Any]) -> bytes | None:
    """The members of a set in an order of their own; None where they aren't all plain scalars."""
    if not SIMPLE.issuperset(map(type, members)):
        return None
    kinds = set(map(type, members))
    if len(kinds) == 1 and kinds <= {str, bytes, int}:
        return marshal.dumps(sorted(members), 2)
    return b"".join(sorted([marshal.dumps(member, 2) for member in with_one_nan(list(members))]))


def with_one_nan(scalars: list[Any]) -> list[Any]:
    """Every NaN is the same NaN, whatever its bits."""
    if not {float, complex} & set(map(type, scalars)) or not any(map(operator.ne, scalars, scalars)):
        return scalars
    return [_without_payload(value) if value != value else value for value in scalars]  # noqa: PLR0124


def _without_payload(value: complex) -> complex:
    if isinstance(value, float):
        return math.nan
    return complex(*(math.nan if part != part else part for part in (value.real, value.imag)))  # noqa: PLR0124
