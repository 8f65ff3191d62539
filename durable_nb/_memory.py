"""Arrays that share memory, in one pickle: each comes back as a view of the same memory.

Pickle knows an object that it meets twice, but not that two arrays lie in one memory. Whether they do is told by their byte
bounds, whatever holds them: a list, an object of a library, the blocks of a frame. Of each such memory one array is the owner
and stored with its bytes; the others are stored as place in it, shape and strides. The owner may be an earlier array, which
is only referred to.
"""

from __future__ import annotations

import bisect
import ctypes
import sys
from collections.abc import Iterable
from typing import Any


class InseparableError(Exception):
    """Arrays that share memory in a way that can't be made again."""


class Sharing:
    """Which arrays share memory. Holds for the objects given, as long as they are not changed."""

    def __init__(self, arrays: Iterable[Any], earlier: Iterable[Any] = ()) -> None:
        """`arrays` are stored; `earlier`, arrays and frames, are referred to, and may lend their memory."""
        self._groups: list[tuple[int, int, Any]] = []
        """(first byte, end, owner) of every memory in which two arrays lie, in order."""
        new = {id(array): array for array in arrays}
        spans = [(*byte_bounds(array), array, None) for array in new.values() if array.size]
        if spans:
            spans += [
                (*byte_bounds(array), array, source)
                for array, source in _arrays_of(earlier)
                if array.size and id(array) not in new
            ]
        spans.sort(key=lambda span: span[:2])
        members: list[tuple[int, int, Any, Any]] = []
        end = 0
        for span in [*spans, (sys.maxsize, sys.maxsize, None, None)]:
            if span[0] >= end:
                if len(members) > 1 and any(source is None for *_, source in members):
                    self._groups.append((members[0][0], end, _owner(members[0][0], end, members)))
                members, end = [], 0
            members.append(span)
            end = max(end, span[1])

    def __bool__(self) -> bool:
        return bool(self._groups)

    def reduced(self, array: Any, *, lent: bool) -> Any:
        """How an array is made again out of the memory that it shares; None where it has its own, or is the owner. `lent`: an
        earlier array's memory may be used."""  # fmt: skip
        if not array.size:
            return None
        low, _ = byte_bounds(array)
        at = bisect.bisect_right(self._groups, low, key=lambda group: group[0]) - 1
        if at < 0 or low >= self._groups[at][1]:
            return None
        owner, source = self._groups[at][2]
        if owner is array or (source is not None and not lent):
            return None
        kind, numpy = type(array), sys.modules["numpy"]
        if kind not in (numpy.ndarray, numpy.matrix, numpy.recarray, numpy.memmap):
            raise InseparableError(f"a {kind.__name__} that shares its memory with another array")
        if source is not None and array.flags.writeable and not owner.flags.writeable:
            raise InseparableError("an array that shares memory with an earlier one, which is read-only")
        offset = array.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
        layout = _layout(owner)
        made_from = owner if source is None else source
        return _view, (made_from, layout, kind, array.dtype, array.shape, array.strides, offset, array.flags.writeable)


def byte_bounds(array: Any) -> tuple[int, int]:
    """The first address that an array's elements occupy, and the one after the last."""
    low = high = array.__array_interface__["data"][0]
    for length, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            low += (length - 1) * stride
        else:
            high += (length - 1) * stride
    return low, high + array.itemsize


def _arrays_of(earlier: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Each array among earlier objects, and what stands for it in a pickle: itself, or its frame and the block's number."""
    numpy: Any = sys.modules["numpy"]
    pandas: Any = sys.modules.get("pandas")
    frames = (pandas.DataFrame, pandas.Series) if pandas is not None else ()
    found: list[tuple[Any, Any]] = []
    for obj in earlier:
        if isinstance(obj, numpy.ndarray):
            found.append((obj, obj))
        elif isinstance(obj, frames):
            blocks = enumerate(block.values for block in obj._mgr.blocks)
            found += [(values, (obj, n)) for n, values in blocks if type(values) is numpy.ndarray]
    return found


def _owner(begin: int, end: int, members: list[tuple[int, int, Any, Any]]) -> tuple[Any, Any]:
    """(the array whose memory the members share, what refers to it if it is an earlier one)."""
    numpy: Any = sys.modules["numpy"]
    whole = [(array, source) for low, high, array, source in members if (low, high) == (begin, end)]
    earlier = [pair for pair in whole if pair[1] is not None]
    if earlier:
        return earlier[0]
    if any(source is not None and isinstance(source, numpy.ndarray) for *_, source in members):
        raise InseparableError("an array that shares memory with an earlier one")
    new = [array for _, _, array, source in members if source is None]
    written = any(array.flags.writeable for array in new)
    fit = [
        array
        for array, _ in whole
        if type(array) is numpy.ndarray and array.flags.forc and (array.flags.writeable or not written)
    ]
    if fit:
        return max(fit, key=lambda array: array.flags.owndata), None
    if any(array.dtype.hasobject for array in new):
        raise InseparableError("arrays of objects that share their memory")
    memory = numpy.frombuffer((ctypes.c_char * (end - begin)).from_address(begin), dtype="u1")
    return memory, None


def _layout(array: Any) -> tuple[Any, ...]:
    """The stride of a dimension of one says nothing: numpy chooses another one when the array comes back."""
    return array.shape, tuple(s for n, s in zip(array.shape, array.strides, strict=True) if n > 1), array.dtype.str


def _view(
    owner: Any,
    layout: tuple[Any, ...],
    kind: Any,
    dtype: Any,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int,
    writeable: bool,
) -> Any:
    """A view of the owner's memory. ValueError where that lies otherwise than when the view was stored."""
    numpy: Any = sys.modules["numpy"]
    if isinstance(owner, tuple):
        frame, number = owner
        owner = frame._mgr.blocks[number].values
    if layout != _layout(owner):
        raise ValueError("the array that another one is a view of is another now")
    if owner.flags.forc and not dtype.hasobject:
        array = numpy.ndarray(shape, dtype, owner if owner.flags.c_contiguous else owner.T, offset, strides)
    else:
        array = numpy.asarray(_Window(owner, dtype, shape, strides, offset))
        array.dtype = dtype
    if kind is not numpy.ndarray:
        array = array.view(kind)
    if array.flags.writeable and not writeable:
        array.flags.writeable = False
    return array


class _Window:
    """Tells numpy where a view lies, and keeps its memory alive."""

    def __init__(self, owner: Any, dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> None:
        interface = dict(owner.__array_interface__)
        address, readonly = interface["data"]
        interface |= {"shape": shape, "strides": strides, "typestr": dtype.str, "data": (address + offset, readonly)}
        interface.pop("descr", None)
        self.__array_interface__ = interface
        self.base = owner


# -- frames --------------------------------------------------------------------------------------------------------------


def is_frame(obj: Any) -> bool:
    """Is it a frame, series or index of pandas?"""
    pandas: Any = sys.modules.get("pandas")
    return pandas is not None and isinstance(obj, (pandas.DataFrame, pandas.Series, pandas.Index))


class Frames:
    """Frames and indexes met while something is pickled. pandas copies a column that two frames share when one writes to it,
    and knows that they share it by their blocks' common `refs`, which its own pickle loses."""  # fmt: skip

    def __init__(self) -> None:
        self._met: dict[int, Any] = {}
        self._held: dict[int, Any] = {}

    def note(self, obj: Any) -> None:
        """A frame, series or index is pickled."""
        self._met.setdefault(id(obj), obj)
        columns = [block.values for block in obj._mgr.blocks] if hasattr(obj, "_mgr") else [getattr(obj, "_data", None)]
        for column in columns:
            inner = [getattr(column, name, None) for name in ("_ndarray", "_data", "_mask", "_codes")]
            self._held |= {id(array): array for array in (column, *inner) if array is not None}

    def hold(self, array: Any) -> bool:
        """Does one of them consist of that very array?"""
        return id(array) in self._held

    def shared(self) -> list[list[tuple[Any, int]]]:
        """Those that share columns, as (frame, number of the block), (index, -1)."""
        groups: dict[int, list[tuple[Any, int]]] = {}
        for obj in self._met.values():
            for number, holder in enumerate(obj._mgr.blocks) if hasattr(obj, "_mgr") else [(-1, obj)]:
                refs = _refs_of(holder)
                if refs is not None:
                    groups.setdefault(id(refs), []).append((obj, number))
        return [group for group in groups.values() if len(group) > 1 and any(number >= 0 for _, number in group)]


def share(groups: list[list[tuple[Any, int]]]) -> None:
    """Make pandas know again which frames share columns."""
    for group in groups:
        holders = [obj if number < 0 else obj._mgr.blocks[number] for obj, number in group]
        refs = next(holder.refs for holder, (_, number) in zip(holders, group, strict=True) if number >= 0)
        for (obj, number), holder in zip(group, holders, strict=True):
            if _refs_of(holder) is refs:
                continue
            if number < 0:
                obj._references = refs
                refs.add_index_reference(obj)
            else:
                holder.refs = refs
                refs.add_reference(holder)


def _refs_of(holder: Any) -> Any:
    return getattr(holder, "refs", None) if hasattr(holder, "refs") else getattr(holder, "_references", None)
