"""A pickle and the memory of its arrays as one run of bytes, in which each large buffer begins where a page of memory does.

    magic, size of the pickle, number of buffers | for each: offset, size, read-only, digest | pickle | padding | buffers

So others may refer to a buffer where it lies: a cell that binds what a step returned stores no second copy of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import xxhash

LARGE_BYTES = 1 << 20
"""Buffers from this size on are worth a page of their own, and to be referred to."""

_MAGIC = b"dnbpack1"
_HEAD, _BUFFER = struct.Struct("<8sQI"), struct.Struct("<QQ?16s")
_PAGE, _WORD = 4096, 16


class Place(NamedTuple):
    """Where a buffer lies, and what it must be."""

    offset: int
    size: int
    readonly: bool
    digest: str
    """xxh3_128."""


def packed(stream: bytes, buffers: Sequence[memoryview]) -> bytes:
    """Both as one."""
    at = _HEAD.size + len(buffers) * _BUFFER.size + len(stream)
    head = [_HEAD.pack(_MAGIC, len(stream), len(buffers))]
    parts: list[bytes | memoryview] = [stream]
    for buffer in buffers:
        padding = -at % (_PAGE if buffer.nbytes >= LARGE_BYTES else _WORD)
        parts += [bytes(padding), buffer]
        at += padding
        head.append(_BUFFER.pack(at, buffer.nbytes, buffer.readonly, xxhash.xxh3_128_digest(buffer)))
        at += buffer.nbytes
    return b"".join([*head, *parts])


def places(data: bytes) -> list[Place]:
    """The buffers in what `packed` gave; none in anything else."""
    if not data.startswith(_MAGIC):
        return []
    count = _HEAD.unpack_from(data)[2]
    found = (_BUFFER.unpack_from(data, _HEAD.size + n * _BUFFER.size) for n in range(count))
    return [Place(offset, size, readonly, digest.hex()) for offset, size, readonly, digest in found]


def unpacked(data: bytes) -> tuple[bytes, list[Any]]:
    """The pickle and copies of its buffers, of which each may be written to as it could before."""
    size, count = _HEAD.unpack_from(data)[1:]
    begin, whole = _HEAD.size + count * _BUFFER.size, memoryview(data)
    kinds = {True: bytes, False: bytearray}
    buffers = [kinds[at.readonly](whole[at.offset : at.offset + at.size]) for at in places(data)]
    return data[begin : begin + size], buffers
