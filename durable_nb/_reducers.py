"""How instances that pickle refuses, or of which it loses a part, are pickled: what makes them again, and from what."""

from __future__ import annotations

import copyreg
import csv
import functools
import gc
import io
import operator
import re
import types
from collections.abc import Callable
from typing import Any

from durable_nb import _sqlite

_DIALECT = ("delimiter", "doublequote", "escapechar", "lineterminator", "quotechar", "quoting", "skipinitialspace", "strict")
_DISPATCHER = getattr(functools.singledispatch(lambda _: None), "__code__", None)


def _reduce_match(match: re.Match[Any]) -> Any:
    """It is found again, in the way that finds this very one."""
    made_from = match.re, match.string, match.pos, match.endpos
    for way in ("match", "search", "fullmatch"):
        if _is(_found_again(way, *made_from), match):
            return _found_again, (way, *made_from)
    if any(_is(again, match) for again in match.re.finditer(*made_from[1:])):
        return _found_at, (match.start(), match.end(), *made_from)
    raise TypeError("cannot pickle 're.Match' object")


def _is(again: re.Match[Any] | None, match: re.Match[Any]) -> bool:
    return again is not None and (again.regs, again.lastindex) == (match.regs, match.lastindex)


def _found_again(way: str, pattern: re.Pattern[Any], text: Any, pos: int, endpos: int) -> Any:
    return getattr(pattern, way)(text, pos, endpos)


def _found_at(start: int, end: int, pattern: re.Pattern[Any], text: Any, pos: int, endpos: int) -> Any:
    return next(found for found in pattern.finditer(text, pos, endpos) if found.span() == (start, end))


def _reduce_csv_writer(writer: Any) -> Any:
    """All that it is: where it writes, and how."""
    files = [way.__self__ for way in gc.get_referents(writer) if isinstance(way, (types.BuiltinMethodType, types.MethodType))]
    if len(files) != 1:
        raise TypeError("cannot pickle '_csv.writer' object")
    return _csv_writer, (files[0], {name: getattr(writer.dialect, name) for name in _DIALECT})


def _csv_writer(file: Any, dialect: dict[str, Any]) -> Any:
    return csv.writer(file, **dialect)


def reduction_of(obj: Any) -> Any:
    """Its reduction; None where pickle's own way, or that of its class, serves."""
    kind = type(obj)
    reduce = _REDUCERS.get(kind)
    if reduce is not None:
        return reduce(obj)
    if kind is types.FunctionType:
        return _reduce_dispatcher(obj) if obj.__code__ is _DISPATCHER else None
    if kind.__module__ == "sqlite3":
        return _sqlite.reduction_of(obj)
    if kind.__module__.startswith("patsy.") and "no_pickling" in str(getattr(kind, "__reduce__", "")):
        return _as, (obj.view(kind.__base__), kind), (dict(vars(obj)), {}), None, None, _fill  # an array with attributes
    held = attributes_of(obj)
    return None if held is None else (_new, (kind,), held, None, None, _fill)


def _reduce_dispatcher(fn: Any) -> Any:
    """What functools.singledispatch makes of a function: which one it has chosen for which type is no part of it."""
    own = {name: value for name, value in vars(fn).items() if name not in ("register", "dispatch", "registry", "_clear_cache")}
    return _dispatcher, (), (list(fn.registry.items()), own), None, None, _fill_dispatcher


def _dispatcher() -> Any:
    return functools.singledispatch(lambda _: None)


def _fill_dispatcher(fn: Any, state: tuple[list[tuple[type, Any]], dict[str, Any]]) -> None:
    chosen, own = state
    for kind, function in chosen:
        fn.register(kind, function)
    functools.update_wrapper(fn, chosen[0][1])
    vars(fn).update(own)


_REDUCERS: dict[type, Callable[[Any], Any]] = {
    re.Match: _reduce_match,
    type(csv.writer(io.StringIO())): _reduce_csv_writer,
}


@functools.lru_cache(maxsize=256)
def _is_by_attributes(kind: type) -> bool:
    """Are its instances what their attributes hold, though pickle is refused it, or given less?

    statsmodels leaves a formula's design out, to evaluate the formula again: not finding the notebook's functions.
    """
    if kind.__module__.startswith("patsy."):
        return any("__getstate__" in vars(base) for base in kind.__mro__[:-1])
    return any((base.__module__, base.__name__) == ("statsmodels.base.data", "ModelData") for base in kind.__mro__)


def attributes_of(obj: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """All that an instance is, in its `__dict__` and in its slots; None where its own reduction tells it."""
    kind: Any = type(obj)
    if not _is_by_attributes(kind):
        return None
    slots = {name: getattr(obj, name) for name in copyreg._slotnames(kind) if hasattr(obj, name)}  # type: ignore[attr-defined]
    return dict(getattr(obj, "__dict__", {})), slots


def reduced_by_itself(obj: Any, protocol: int) -> Any:
    """What its class says, or `copyreg`; the object stays as it is, though some take out of the live one what they won't pickle
    (statsmodels the callback of a fit)."""  # fmt: skip
    registered = copyreg.dispatch_table.get(type(obj))
    if registered is not None:
        return registered(obj)
    is_written = lambda way: isinstance(getattr(type(obj), way, None), types.FunctionType)  # noqa: E731
    # Of others `__dict__` is not asked for: that of an exception would be made by the asking, and told.
    own = getattr(obj, "__dict__", None) if any(map(is_written, _WAYS)) else None
    if type(own) is not dict:
        return obj.__reduce_ex__(protocol)
    held = [(each, each.copy()) for each in (own, *own.values()) if type(each) in (dict, list, set)]
    reduced = obj.__reduce_ex__(protocol)
    for each, before in held:
        if not _is_the_same(each, before):
            each.clear()
            (each.extend if type(each) is list else each.update)(before)
    return reduced


_WAYS = ("__reduce_ex__", "__reduce__", "__getstate__")


def _is_the_same(now: Any, before: Any) -> bool:
    """Do two containers hold the very same objects?"""
    same = len(now) == len(before) and all(map(operator.is_, now, before))
    return same and (type(now) is not dict or all(map(operator.is_, now.values(), before.values())))


def _new(kind: Any) -> Any:
    return kind.__new__(kind)


def _as(array: Any, kind: Any) -> Any:
    return array.view(kind)


def _fill(obj: Any, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    attributes, slots = state
    if attributes:
        vars(obj).update(attributes)
    for name, value in slots.items():
        object.__setattr__(obj, name, value)
