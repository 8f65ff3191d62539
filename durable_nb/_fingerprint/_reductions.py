"""Objects by their own reduction: its parts, without what says nothing lasting."""

from __future__ import annotations

import copyreg
import datetime as dt
import functools
import warnings
from itertools import chain
from typing import TYPE_CHECKING, Any

from durable_nb._reducers import attributes_of, reduced_by_itself

from ._objects import CONFIGURED, HOLDS, OPAQUE_TYPES, added
from ._tokens import text
from ._walk import MISSING, named

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ._walk import Walk

_IMMUTABLE_NAMES = {"Period", "Interval"}


def _is_plain_immutable(obj: Any, kind: type) -> bool:
    """Whether the identity of `obj` can't matter: a namedtuple, a plain str subclass, a pandas Period."""
    if isinstance(obj, tuple | str | int | float | complex | bytes | dt.date | dt.time | dt.tzinfo):
        return not getattr(obj, "__dict__", None)
    return kind.__module__.partition(".")[0] == "pandas" and kind.__name__ in _IMMUTABLE_NAMES


def is_known_by_reduction(kind: type) -> bool:
    """Whether instances of a class that reduces as object does are no special case of the fingerprint's."""
    lineage = {f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__}
    if not lineage.isdisjoint(HOLDS.keys() | CONFIGURED.keys() | OPAQUE_TYPES | _LATER.keys()) or {
        "numpy",
        "pandas",
        "pyarrow",
    } & {name.partition(".")[0] for name in lineage}:
        return False
    return not any(type(found) is functools.cached_property for base in kind.__mro__ for found in vars(base).values())


def reduced(walk: Walk, obj: Any) -> Iterator[Any] | None:
    """An instance by its type and what its own reduction says; where that fails or is nonsense, by type alone."""
    kind = type(obj)
    if not _is_plain_immutable(obj, kind) and walk.seen(obj):
        return None
    if isinstance(obj, set | frozenset):
        walk.out += b"Xset;"
        walk.refer(kind)
        base: Any = set if isinstance(obj, set) else frozenset
        return chain(walk.elements(b"e", base.__iter__(obj)), named(walk, attributes(walk, obj, getattr(obj, "__dict__", {}))))
    try:
        reduction = _reduction(obj, kind)
        if isinstance(reduction, str):
            walk.out += b"Xglobal;" + text(reduction)
            walk.refer(kind)
            return named(walk, left_out) if (left_out := _left_out(walk, obj, None)) else None
        parts = _checked(reduction)
    except Exception:
        return _refusing(walk, obj, kind)
    walk.keep.append(reduction)
    return _parts(walk, obj, kind, parts)


def _refusing(walk: Walk, obj: Any, kind: type) -> Iterator[Any] | None:
    """Something that can't be pickled: an instance of a user's class is still its attributes, anything else its type."""
    if walk.graph.by_name(kind) is not None:
        walk.by_type(obj)
        return None
    if any(walk.graph.by_name(base) is not None for base in kind.__mro__[:-1]):
        walk.by_type(obj)  # what an installed class keeps beneath can't be seen
    walk.out += b"Xrefuses;"
    walk.refer(kind)
    return named(walk, added(obj))


def _reduction(obj: Any, kind: type) -> Any:
    held = attributes_of(obj)
    if held is not None:
        return copyreg.__newobj__, (kind,), held  # type: ignore[attr-defined]  # private to the stubs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # itertools warns from 3.12 that it will stop reducing
        return reduced_by_itself(obj, 4)


def _checked(reduction: Any) -> tuple[Any, tuple[Any, ...], Any, Any, Any]:
    if not isinstance(reduction, tuple) or not 2 <= len(reduction) <= 6:
        raise TypeError("no reduction")
    make, args, state, items, pairs_of = (*reduction, None, None, None, None)[:5]
    if not callable(make) or not isinstance(args, tuple):
        raise TypeError("no reduction")
    # drawn here, so that an iterator that fails makes the object opaque before anything was written about it
    return make, args, state, None if items is None else list(items), None if pairs_of is None else list(pairs_of)


def _parts(walk: Walk, obj: Any, kind: type, parts: tuple[Any, tuple[Any, ...], Any, Any, Any]) -> Iterator[Any]:
    make, args, state, items, pairs_of = parts
    default = make is copyreg.__newobj__ or make is kind  # type: ignore[attr-defined]  # private to the stubs
    walk.out += b"o" if default else b"O"
    walk.refer(kind)
    if not default:
        yield make
    if default and make is not kind and args[:1] == (kind,):
        args = args[1:]
    if isinstance(obj, list) and default:
        items = list(list.__iter__(obj))
    if isinstance(obj, dict) and default:
        pairs_of = list(dict.items(obj))
    yield args
    if state is not None and hasattr(kind, "__setstate__"):
        if isinstance(state, dict) and isinstance(state.get("__dict__"), dict):
            state = {**state, "__dict__": attributes(walk, obj, state["__dict__"])}
        yield _without_passing(walk, kind, state) if isinstance(state, dict) else state
    else:
        yield from _state(walk, obj, state)
    for found in (items, pairs_of):
        if found is None:
            walk.out += b"N"
        else:
            walk.out += b"t%d:" % len(found)
            yield from found
    if isinstance(obj, BaseException) and obj.__cause__ is not None:
        walk.out += b"Xcause;"
        yield obj.__cause__
    left_out = _left_out(walk, obj, state)
    if left_out:
        walk.out += b"Xleft;"
        walk.lenient += 1
        yield from named(walk, left_out)
        walk.lenient -= 1


def _left_out(walk: Walk, obj: Any, state: Any) -> dict[str, Any]:
    """Attributes of an instance of a user's class that its reduction doesn't tell of."""
    if not walk.is_own(type(obj)):
        return {}
    told: dict[str, Any] = {}
    for half in state if isinstance(state, tuple) else (state,):
        told |= half if isinstance(half, dict) else {}
    slots = {name: getattr(obj, name) for name in copyreg._slotnames(type(obj)) if hasattr(obj, name)}  # type: ignore[attr-defined]
    held = {**getattr(obj, "__dict__", {}), **slots}
    return {name: value for name, value in held.items() if told.get(name, MISSING) is not value}


def _state(walk: Walk, obj: Any, state: Any) -> Iterator[Any]:
    """Attributes sorted by name; `__slots__` come as the second half of a pair."""
    halves = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    for half in halves:
        if half is None or (isinstance(half, dict) and all(isinstance(key, str) for key in half)):
            yield from named(walk, attributes(walk, obj, half or {}))  # no attributes yet, or none but cached ones: the same
        else:
            yield half


def attributes(walk: Walk, obj: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """`found` without what functools.cached_property left there: having been looked at is no part of a value."""
    kind = type(obj)
    own = walk.is_own(kind)
    return {
        name: value
        for name, value in _without_passing(walk, kind, found).items()
        if own or type(static(kind, name)) is not functools.cached_property
    }


def _without_passing(walk: Walk, kind: type, found: Mapping[str, Any]) -> Mapping[str, Any]:
    passing = walk.later.get(kind)
    if passing is None:
        passing = walk.later[kind] = _passing(kind)
    return _without(passing, found)


def without_passing(kind: type, found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The attributes of an instance without those that say nothing lasting."""
    return _without(_passing(kind), found)


@functools.lru_cache(maxsize=1024)
def _passing(kind: type) -> dict[str, Any]:
    names = [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]
    return dict(chain.from_iterable(_LATER.get(name, {}).items() for name in names))


def _without(passing: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
    if not passing:
        return found
    return {
        name: value
        for name, value in found.items()
        if not (name in passing and (passing[name] is MISSING or passing[name] is value))
    }


_LATER: dict[str, dict[str, Any]] = {
    "threading.Condition": {"locked": MISSING},  # from 3.14
    "queue.Queue": {"is_shutdown": False},  # from 3.13
    "asyncio.queues.Queue": {"_is_shutdown": False},
    "functools.singledispatchmethod": {"_method_cache": MISSING},
    "sqlalchemy.sql.schema.Column": {"_creation_order": MISSING},  # counted up
    "sklearn.base.BaseEstimator": {"_sklearn_version": MISSING, "_stop_words_id": MISSING},  # an address
    "matplotlib.artist.Artist": {"_stale": MISSING},  # whether it is drawn as it is now
    "matplotlib.transforms.TransformNode": dict.fromkeys(("_parents", "_invalid", "_inverted"), MISSING),  # by address; caches
}
"""Attributes that only later Pythons have, or that say nothing lasting, by type: they count where they are not this; MISSING:
they never do."""


def static(kind: type, name: str) -> Any:
    """What stands in a class or its bases, no descriptor being asked; MISSING where nothing does."""
    for base in kind.__mro__:
        if name in vars(base):
            return vars(base)[name]
    return MISSING
