"""Earlier objects that a cell refers to or has changed: where they are among its inputs, and how the change is made again.

An input is walked in one canonical order, so every mutable object in it has a place, (component, number), which is the same in
any execution with equal inputs. A stored value refers to such an object by its place, and a change is stored as the object's
new content, applied to the live object: whoever else holds it sees the change, as after plain execution.
"""

from __future__ import annotations

import collections
import sys
import types
from collections.abc import Mapping
from typing import Any

Place = tuple[str, int]
Patch = tuple[Any, Any]
"""A live object, stored as its place, and its new content."""


def patches_for(labels: list[str], places: Mapping[Place, Any]) -> list[Patch]:
    """The new contents of all objects in the changed components; UnpatchableError, naming the component, where one can't be
    told."""  # fmt: skip
    found: list[Patch] = []
    for label in labels:
        objects = [obj for (component, _), obj in places.items() if component == label]
        if label != "aliases" and not (objects and label.startswith("global ")):
            raise UnpatchableError(label)
        for obj in objects:
            try:
                found.append((obj, content_of(obj)))
            except UnpatchableError as error:
                raise UnpatchableError(label) from error
    return found


class UnpatchableError(Exception):
    """What this object holds can't be put into an earlier one."""


_PLAIN = (list, dict, set, collections.deque, bytearray, collections.OrderedDict, collections.defaultdict, collections.Counter)


def content_of(obj: Any) -> Any:
    """The content of a changed object, as a new object of plain kind; UnpatchableError where that isn't all there is."""
    kind = type(obj)
    if kind in (list, set, collections.deque, bytearray):
        return (bytes if kind is bytearray else list)(obj)
    if kind in _PLAIN:
        return list(obj.items())
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        if kind is numpy.ndarray:
            return numpy.array(obj, copy=True)
        if isinstance(obj, numpy.random.Generator):
            return obj.bit_generator.state
        if isinstance(obj, numpy.random.RandomState):
            return obj.get_state()
    pandas: Any = sys.modules.get("pandas")
    if pandas is not None and kind in (pandas.DataFrame, pandas.Series):
        return obj.copy(deep=False)
    if _is_plain_instance(kind):
        return dict(vars(obj))
    raise UnpatchableError(kind.__name__)


def fits(obj: Any, content: Any) -> bool:
    """Can `content` be put into the live object as it is now?"""
    if type(obj).__name__ == "ndarray":
        return bool(obj.shape == content.shape and obj.dtype == content.dtype and obj.flags.writeable)
    return True


def put(obj: Any, content: Any) -> None:
    """Give the live object its new content."""
    kind = type(obj)
    if kind in (list, bytearray):
        obj[:] = content
    elif kind in _PLAIN:
        obj.clear()
        (obj.extend if kind is collections.deque else obj.update)(content)
    elif kind.__name__ == "ndarray":
        obj[...] = content
    elif kind.__name__ in ("DataFrame", "Series"):
        obj._update_inplace(content)
        obj.attrs = content.attrs
        if kind.__name__ == "Series":
            obj.name = content.name
    elif hasattr(obj, "bit_generator"):
        obj.bit_generator.state = content
    elif kind.__name__ == "RandomState":
        obj.set_state(content)
    else:
        vars(obj).clear()
        vars(obj).update(content)


_HEAPTYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code defines


def _is_plain_instance(kind: Any) -> bool:
    """Is all that an instance holds in its `__dict__`?"""
    if not kind.__dictoffset__ or hasattr(kind, "__setstate__"):
        return False
    for base in kind.__mro__[:-1]:  # but for object
        own = vars(base)
        if (
            not base.__flags__ & _HEAPTYPE
            or own.get("__slots__")
            or {"__reduce__", "__reduce_ex__", "__getstate__"} & own.keys()
        ):
            return False
    return True


class Links:
    """Which objects of earlier cells a stored value refers to, instead of holding them."""

    def __init__(self, places: Mapping[Place, Any], names: Mapping[str, Any]) -> None:
        """`names`: inputs whose objects have no place, such as functions; they are referred to by name."""
        self._places: dict[int, Any] = {id(obj): name for name, obj in names.items() if isinstance(obj, _NAMED)}
        self._places |= {id(obj): place for place, obj in reversed(list(places.items()))}
        self._keep = places, names  # ids hold only while their objects live

    def reference(self, obj: Any) -> Any:
        """The place or name of an earlier object; UnpatchableError for an array that is a view of one."""
        place = self._places.get(id(obj))
        if place is not None:
            return place
        base = getattr(obj, "base", None) if type(obj).__name__ == "ndarray" else None
        while base is not None:
            if id(base) in self._places:
                raise UnpatchableError("an array that shares memory with an earlier one")
            base = getattr(base, "base", None)
        return None


_NAMED = (types.FunctionType, types.MethodType, type)


def resolver(places: Mapping[Place, Any], names: Mapping[str, Any]) -> Any:
    """Gives the live object for what `Links` wrote."""
    return lambda written: names[written] if isinstance(written, str) else places[tuple(written)]
