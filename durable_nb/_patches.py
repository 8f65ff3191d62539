"""What code has changed in place: an object's new content, and putting it into the live object.

Whoever else holds the object sees the change, as after plain execution.
"""

from __future__ import annotations

import collections
import io
import random
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any

from durable_nb._pickling import Pickler, Unpickler

Place = tuple[str, int]
"""Where a mutable object is among the inputs: in which component, and as which one in it."""
Patch = tuple[Any, Any]
"""A live object, stored as its place, and its new content."""


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
            content = numpy.array(obj, copy=True)
            content.flags.writeable = obj.flags.writeable
            return content
        if isinstance(obj, numpy.random.Generator):
            return obj.bit_generator.state, getattr(obj.bit_generator.seed_seq, "n_children_spawned", 0)
        if isinstance(obj, numpy.random.RandomState):
            return obj.get_state()
    pandas: Any = sys.modules.get("pandas")
    if pandas is not None and kind in (pandas.DataFrame, pandas.Series):
        return obj.copy(deep=False)
    if kind is random.Random:
        return obj.getstate()
    if kind is types.SimpleNamespace or _is_plain_instance(kind):
        return dict(vars(obj))
    raise UnpatchableError(kind.__name__)


def fits(obj: Any, content: Any) -> bool:
    """Can `content` be put into the live object as it is now?"""
    if type(obj).__module__ == "numpy":
        return bool(obj.shape == content.shape and obj.dtype == content.dtype and obj.flags.writeable)
    return True


def put(obj: Any, content: Any) -> None:
    """Give the live object its new content."""
    kind = type(obj)
    library = kind.__module__.partition(".")[0]
    if kind in (list, bytearray):
        obj[:] = content
    elif kind in (set, collections.deque):
        obj.clear()
        (obj.update if kind is set else obj.extend)(content)
    elif kind in _PLAIN:
        obj.clear()
        for key, value in content:  # Counter.update would count the pairs
            obj[key] = value
    elif library == "pandas":
        obj._update_inplace(content)
        obj.attrs = content.attrs
        obj.flags.allows_duplicate_labels = content.flags.allows_duplicate_labels
        if kind.__name__ == "Series":
            obj.name = content.name
    elif library == "numpy" and kind.__name__ == "ndarray":
        obj[...] = content
        obj.flags.writeable = content.flags.writeable
    elif library == "numpy" and kind.__name__ == "RandomState":
        obj.set_state(content)
    elif library == "numpy":
        obj.bit_generator.state, spawned = content
        if spawned:
            obj.bit_generator.seed_seq.spawn(spawned - obj.bit_generator.seed_seq.n_children_spawned)
    elif kind is random.Random:
        obj.setstate(content)
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


def pack(patches: Iterable[tuple[Place, Any]], returned: Any, places: Mapping[Place, Any]) -> bytes:
    """New contents of the objects at these places, and at which place `returned` is. Raises whatever pickling raises."""
    known = {id(obj): place for place, obj in reversed(list(places.items()))}
    file = io.BytesIO()
    Pickler(file, reference=lambda obj: known.get(id(obj))).dump((known.get(id(returned)), list(patches)))
    return file.getvalue()


def apply(packed: bytes, places: Mapping[Place, Any], value: Any) -> Any:
    """Make the changes that `pack` wrote again, to the objects that are at these places now; what was returned: `value`, or the
    object that it was. KeyError, and nothing is changed, where a place holds nothing that fits."""  # fmt: skip
    returned, patches = Unpickler(io.BytesIO(packed), resolve=lambda place: places[tuple(place)]).load()
    live = [(places[tuple(place)], content) for place, content in patches]
    if not all(fits(obj, content) for obj, content in live):
        raise KeyError("an array of another shape")
    result = value if returned is None else places[tuple(returned)]
    for obj, content in live:
        put(obj, content)
    return result
