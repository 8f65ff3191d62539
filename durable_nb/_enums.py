"""Enumerations of the notebook in a pickle: the members with all that they hold, the class with everything in its place.

cloudpickle makes such a class again of names and values: what `__init__` or `__new__` gave a member is lost, or computed anew
by the user's code. Here the class comes back without a line of it being executed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cloudpickle

_WITHOUT = {"__dict__", "__weakref__", "__annotations_cache__", "__annotate_func__", "__annotate__"}
"""What a class gets anew."""
_INNER: dict[type, Callable[[Any], Any]] = {
    object: lambda _: None,
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    bytes: lambda member: bytes.__getitem__(member, slice(None)),
    tuple: lambda member: tuple.__getitem__(member, slice(None)),
}
"""What a member may be besides being one, and how that is taken out of it."""


def reduced_class(cls: Any, tracked: str | None) -> Any:
    """The reduction of an enumeration; None where cloudpickle's own has to serve. `tracked`: cloudpickle's id for it."""
    native, members = _native(cls), cls._member_map_
    hooked = any("__init_subclass__" in vars(base) for base in cls.__mro__[1:] if base.__module__ not in ("enum", "builtins"))
    slots = any(vars(base).get("__slots__") for base in cls.__mro__)
    if native not in _INNER or hooked or slots or "_abc_impl" in vars(cls) or any(type(m) is not cls for m in members.values()):
        return None
    held = {name: value for name, value in vars(cls).items() if name not in _WITHOUT}
    # Composite flags are made when they are asked for, and found by their value then.
    named = {id(member) for member in members.values()}
    held["_value2member_map_"] = {value: m for value, m in cls._value2member_map_.items() if id(m) in named}
    inner = {name: _INNER[native](member) for name, member in members.items()}
    canonical = {name: member._name_ for name, member in members.items()}
    made_from = (type(cls), cls.__name__, cls.__qualname__, cls.__bases__, list(held), inner, canonical, tracked)
    return _class, made_from, (held, {name: vars(member) for name, member in members.items()}), None, None, _fill


def _native(cls: Any) -> Any:
    return next(base for base in cls.__mro__ if not base.__flags__ & _HEAPTYPE)


_HEAPTYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code defines


def _class(
    meta: Any,
    name: str,
    qualname: str,
    bases: tuple[type, ...],
    names: list[str],
    inner: dict[str, Any],
    canonical: dict[str, str],
    tracked: str | None,
) -> Any:
    """The class, with its members, without anything in either. The metaclass doesn't hear of it: it would make them anew."""
    cls = type.__new__(meta, name, bases, dict.fromkeys(names))
    native = _native(cls)
    members: dict[str, Any] = {}
    for own, canon in canonical.items():
        given = () if native is object else (inner[own],)
        members[own] = members[canon] if canon in members else native.__new__(cls, *given)
    type.__setattr__(cls, "__qualname__", qualname)
    type.__setattr__(cls, "_member_map_", members)
    return cloudpickle.cloudpickle._lookup_class_or_track(tracked, cls)


def _fill(cls: Any, state: tuple[dict[str, Any], dict[str, dict[str, Any]]]) -> None:
    held, attributes = state
    for name, value in held.items():
        if name != "__qualname__":
            type.__setattr__(cls, name, value)
    for name, found in attributes.items():
        vars(held["_member_map_"][name]).update(found)


def reduced_member(member: Any) -> Any:
    """The reduction of a member with a name; None of a composite flag. Its class may be empty yet when it comes back."""
    kind: Any = type(member)
    return (_member, (kind, member._name_)) if kind._member_map_.get(member._name_) is member else None


def _member(cls: Any, name: str) -> Any:
    return vars(cls)["_member_map_"][name]
