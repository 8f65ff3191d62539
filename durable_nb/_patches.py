"""What code has changed in place: an object's new content, and putting it into the live object.

Whoever else holds the object sees the change, as after plain execution.
"""

from __future__ import annotations

import abc
import collections
import functools
import io
import random
import sys
import types
import weakref
from _abc import _get_dump  # type: ignore[import-not-found]
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from durable_nb import _figures, _sqlite
from durable_nb._pickling import References, Unpickler
from durable_nb._readback import pickled

Place = tuple[str, int]
"""Where a mutable object is among the inputs: in which component, and as which one in it."""
Patch = tuple[Any, Any]
"""A live object, stored as its place, and its new content."""


class UnpatchableError(Exception):
    """What this object holds can't be put into an earlier one."""


_PLAIN = (list, dict, set, collections.deque, bytearray, collections.OrderedDict, collections.defaultdict, collections.Counter)


_OTHERS = (random.Random, functools.partial, types.CellType, types.SimpleNamespace)


class Standing:
    """What can't be told of objects any more once code has run: how arrays lay, which indexes frames had, and what those hold
    of which the content can't be put back."""

    def __init__(self, objects: Iterable[Any], code: Iterable[Any], digest: Callable[[Any], str]) -> None:
        """`code`: functions and classes; `digest` gives '' for what can't be told by its content."""
        numpy: Any = sys.modules.get("numpy")
        self._sizes: dict[int, Any] = {}
        self._axes: dict[int, list[Any]] = {}
        self._digests: dict[int, str] = {}
        self._digest = digest
        self._members = {id(obj): dict(vars(obj)) if isinstance(obj, type) else {"": obj.__code__} for obj in code}
        self._registered = {id(obj): _registered(obj) for obj in code}
        self._keep = [*objects, *code]
        for obj in objects:
            kind = type(obj)
            if kind in _PLAIN:
                continue
            if numpy is not None and isinstance(obj, numpy.ndarray):
                self._sizes[id(obj)] = obj.size, obj.dtype
            elif _is_frame(obj):
                self._axes[id(obj)] = obj.axes
            elif not (kind in _OTHERS or _is_of_python(kind) or _is_index(obj) or _is_generator(obj) or _is_of_sqlite(obj)):
                self._digests[id(obj)] = self._digest_of(obj)

    def _digest_of(self, obj: Any) -> str:
        try:
            return self._digest(obj)
        except Exception:  # it can't be read
            return ""

    def is_unchanged(self, obj: Any) -> bool:
        """Is it as it was, though what it holds couldn't be put back?"""
        before = self._digests.get(id(obj), "")
        return bool(before) and before == self._digest_of(obj)

    def resized(self, array: Any) -> bool:
        """Does an array have another size or type than before?"""
        return bool(self._sizes.get(id(array), (array.size, array.dtype)) != (array.size, array.dtype))

    def dtype(self, array: Any) -> Any:
        """What type of elements an array had."""
        return self._sizes.get(id(array), (0, None))[1]

    def members(self, obj: Any) -> dict[str, Any]:
        """A class's attributes as they were; of a function, its code under ''."""
        return self._members.get(id(obj), {})

    def registered(self, cls: Any) -> dict[int, Any]:
        """The virtual subclasses that an abstract class had, by id."""
        return self._registered.get(id(cls), {})

    def kept(self, frame: Any) -> list[bool]:
        """Of each axis: is it the very index that the frame had?"""
        before = self._axes.get(id(frame), [None, None])
        return [now is old for now, old in zip(frame.axes, before, strict=False)]


def _is_frame(obj: Any) -> bool:
    pandas: Any = sys.modules.get("pandas")
    return pandas is not None and type(obj) in (pandas.DataFrame, pandas.Series)


def _held_by_polars(obj: Any) -> str:
    """The attribute in which a frame or series of polars has its content; '' of anything else."""
    polars: Any = sys.modules.get("polars")
    return "" if polars is None else {polars.DataFrame: "_df", polars.Series: "_s"}.get(type(obj), "")


def _is_of_sqlite(obj: Any) -> bool:
    sqlite: Any = sys.modules.get("sqlite3")
    return sqlite is not None and isinstance(obj, (sqlite.Connection, sqlite.Cursor))


def _is_index(obj: Any) -> bool:
    pandas: Any = sys.modules.get("pandas")
    return pandas is not None and isinstance(obj, pandas.Index)


def _is_generator(obj: Any) -> bool:
    numpy: Any = sys.modules.get("numpy")
    return numpy is not None and isinstance(obj, (numpy.random.Generator, numpy.random.RandomState))


def _is_resizable(array: Any, standing: Standing) -> bool:
    """Only the cell's own `resize` can have given it another size, which numpy allows where no view would be left behind."""
    return bool(array.flags.owndata and array.dtype == standing.dtype(array) and not array.dtype.hasobject)


def _is_masked(obj: Any) -> bool:
    numpy: Any = sys.modules.get("numpy")
    return numpy is not None and type(obj) is numpy.ma.MaskedArray and not obj.hardmask and not obj.dtype.names


def _is_array(obj: Any) -> bool:
    array: Any = sys.modules.get("array")
    return array is not None and type(obj) is array.array


_FILES = (io.StringIO, io.BytesIO)
"""Files in memory."""
_ITERATORS: tuple[type, ...] = (type(iter([])), type(iter(())))


def content_of(obj: Any, standing: Standing | None = None) -> Any:
    """The content of a changed object, as new objects of plain kind, for `fits` and `put`; UnpatchableError where that isn't
    all there is."""  # fmt: skip
    return _kind(obj), _content_of(obj, standing)


def _kind(obj: Any) -> str:
    return f"{type(obj).__module__}.{type(obj).__qualname__}"


def _content_of(obj: Any, standing: Standing | None) -> Any:
    kind = type(obj)
    if _is_of_sqlite(obj):
        try:
            return _sqlite.standing(obj) if _sqlite.is_connection(obj) else _sqlite.place(obj)
        except _sqlite.UntoldError as error:
            raise UnpatchableError(kind.__name__) from error
    if _figures.is_part(obj):
        return _figures.content_of(obj)
    if _is_array(obj):
        return obj.typecode, obj.tobytes()
    if kind in _FILES:
        return obj.__getstate__()
    if kind in _ITERATORS:
        return obj.__reduce__()
    if kind in (list, set, collections.deque, bytearray):
        return (bytes if kind is bytearray else list)(obj)
    if kind in _PLAIN:
        return list(obj.items())
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and kind is numpy.ndarray:
        if standing is not None and standing.resized(obj) and not _is_resizable(obj, standing):
            raise UnpatchableError(kind.__name__)
        content = numpy.array(obj, copy=True)
        content.flags.writeable = obj.flags.writeable
        return content
    if _is_masked(obj):
        if standing is not None and standing.resized(obj):
            raise UnpatchableError(kind.__name__)
        return obj.copy()
    if _is_generator(obj):
        if isinstance(obj, numpy.random.RandomState):
            return obj.get_state()
        return obj.bit_generator.state, getattr(obj.bit_generator.seed_seq, "n_children_spawned", 0)
    if _is_frame(obj):
        kept = standing.kept(obj) if standing is not None else [False] * obj.ndim
        return obj.copy(deep=False), kept, obj.attrs
    if _held_by_polars(obj):
        return obj.clone()
    if _is_index(obj):
        return list(obj.names)
    if kind is random.Random:
        return obj.getstate()
    if kind is functools.partial:
        return obj.__reduce__()[2]
    if kind is types.CellType:
        return obj.cell_contents
    if kind is types.SimpleNamespace:
        return dict(vars(obj)), {}, None
    if _is_of_python(kind):
        base = next(base for base in kind.__mro__ if not base.__flags__ & _HEAPTYPE)
        inner = _BASES[base](obj) if base in _BASES else None
        return dict(getattr(obj, "__dict__", {})), {name: slot.__get__(obj) for name, slot in _slots(obj)}, inner
    if kind is object:
        return None
    raise UnpatchableError(kind.__name__)


def content_of_code(obj: Any, standing: Standing) -> Any:
    """What of a function or class may be changed in place: of a class, the data among its attributes that are others now."""
    before = standing.members(obj)
    if isinstance(obj, types.FunctionType):
        if before.get("") is not obj.__code__:
            raise UnpatchableError(obj.__name__)
        return _kind(obj), (dict(vars(obj)), obj.__defaults__, obj.__kwdefaults__)
    now = vars(obj)
    changed = [
        name for name in {**before, **now} if before.get(name, obj) is not now.get(name, obj) and name != "__slotnames__"
    ]
    others = [name for name in changed if not all(_is_data(name, held[name]) for held in (before, now) if name in held)]
    if not before or others or type(obj) not in _CLASSES or standing.registered(obj).keys() != _registered(obj).keys():
        raise UnpatchableError(obj.__name__)
    return _kind(obj), ({name: now[name] for name in changed if name in now}, [name for name in changed if name not in now])


_CLASSES = (type, abc.ABCMeta)


def _registered(cls: Any) -> dict[int, Any]:
    """Held, as `abc` itself refers to them weakly: one that has died since would lend its id to the next."""
    found = [reference() for reference in _get_dump(cls)[0]] if type(cls) is abc.ABCMeta else []
    return {id(subclass): subclass for subclass in found}


def _is_data(name: str, value: Any) -> bool:
    """May it be set on a class as it is? Not what the class is made of itself."""
    if isinstance(value, (types.FunctionType, staticmethod, classmethod, property)):
        return name not in _MAKING
    return not name.startswith("__") and not hasattr(type(value), "__get__") and not isinstance(value, type)


_MAKING = frozenset("__new__ __init_subclass__ __class_getitem__ __set_name__ __getattribute__ __hash__ __eq__".split())


def fits(obj: Any, content: Any) -> bool:
    """Can `content` be put into the live object as it is now? Where another kind of object is now, it can't."""
    kind, content = content
    if kind != _kind(obj):
        return False
    if _is_array(obj):
        return bool(obj.typecode == content[0])
    if type(obj) in _FILES:
        return not obj.closed
    if _sqlite.is_connection(obj):
        return _sqlite.is_closed(obj) == (content is None) or not _sqlite.is_reading(obj)
    if type(obj).__module__ == "numpy" and hasattr(obj, "shape"):
        lies_well = obj.shape == content.shape or obj.flags.forc
        alike = obj.size == content.size and obj.dtype == content.dtype and lies_well
        if obj.size != content.size and obj.dtype == content.dtype:
            return bool(obj.flags.owndata and obj.flags.writeable and obj.flags.forc)
        return bool(alike and (obj.flags.writeable or _is_same(obj, content)))
    if _is_frame(obj):
        frame, kept, _ = content
        return all(live.equals(index) for live, index, same in zip(obj.axes, frame.axes, kept, strict=True) if same)
    return True


def _is_same(array: Any, content: Any) -> bool:
    """A read-only array, as of a frame's column, can't have been written to: it is among what changed, and hasn't."""
    return array.shape == content.shape and not array.dtype.hasobject and array.tobytes() == content.tobytes()


def put(obj: Any, content: Any) -> None:
    """Give the live object its new content."""
    _, content = content
    kind = type(obj)
    library = kind.__module__.partition(".")[0]
    if _is_of_sqlite(obj):
        (_sqlite.bring if _sqlite.is_connection(obj) else _sqlite.bring_cursor)(obj, content)
    elif _figures.is_part(obj):
        _figures.put(obj, content)
    elif _is_array(obj):
        del obj[:]
        obj.frombytes(content[1])
    elif kind in _FILES:
        obj.__setstate__(content)
    elif kind in _ITERATORS:
        _put_iterator(obj, content)
    elif kind in (list, bytearray):
        obj[:] = content
    elif kind in (set, collections.deque):
        obj.clear()
        (obj.update if kind is set else obj.extend)(content)
    elif kind in _PLAIN:
        obj.clear()
        for key, value in content:  # Counter.update would count the pairs
            obj[key] = value
    elif kind is object:
        return
    elif _is_frame(obj):
        _put_frame(obj, *content)
    elif held := _held_by_polars(obj):
        setattr(obj, held, getattr(content, held))
    elif _is_index(obj):
        obj.names = content
    elif library == "numpy" and kind.__name__ == "ndarray":
        if not obj.flags.writeable:
            return  # it fits, so it is the same
        if obj.shape != content.shape:
            obj.resize(content.shape, refcheck=False)  # mostly of the same size: only the shape is set
        obj[...] = content
        if not content.flags.writeable:
            obj.flags.writeable = False
    elif _is_masked(obj):
        obj._data[...] = content._data
        obj.mask, obj.fill_value = content.mask, content.fill_value
    elif library == "numpy" and kind.__name__ == "RandomState":
        obj.set_state(content)
    elif library == "numpy":
        obj.bit_generator.state, spawned = content
        if spawned:
            obj.bit_generator.seed_seq.spawn(spawned - obj.bit_generator.seed_seq.n_children_spawned)
    elif kind is random.Random:
        obj.setstate(content)
    elif kind is functools.partial:
        obj.__setstate__(content)
    elif kind is types.CellType:
        obj.cell_contents = content
    elif kind is types.FunctionType:
        attributes, obj.__defaults__, obj.__kwdefaults__ = content
        vars(obj).clear()
        vars(obj).update(attributes)
    elif kind in _CLASSES:
        attributes, deleted = content
        for name, value in attributes.items():
            setattr(obj, name, value)
        for name in deleted:
            delattr(obj, name)
    else:
        _put_attributes(obj, *content)


def _put_iterator(iterator: Any, content: Any) -> None:
    """Iterators of Python's own sequences, which tell by how many items they are ahead, or that they are at their end."""
    if len(content) == 3:
        iterator.__setstate__(content[2])
        return
    collections.deque(iterator, maxlen=0)


def _put_frame(frame: Any, content: Any, kept: list[bool], attrs: dict[Any, Any]) -> None:
    for axis, (live, index, same) in enumerate(zip(frame.axes, content.axes, kept, strict=True)):
        if same:  # whoever else holds the index sees its new name
            live.names = index.names
            content._mgr.set_axis(frame.ndim - 1 - axis, live)
    frame._update_inplace(content)
    object.__setattr__(frame, "_attrs", attrs)  # the setter copies them, and others may hold the very dict
    frame.flags.allows_duplicate_labels = content.flags.allows_duplicate_labels
    if frame.ndim == 1:
        frame.name = content.name


def _put_attributes(obj: Any, attributes: dict[str, Any], slots: dict[str, Any], inner: Any) -> None:
    if inner is not None:
        base: Any = next(base for base in type(obj).__mro__ if base in _BASES)
        base.clear(obj)
        for item in inner:
            if base is dict:
                dict.__setitem__(obj, *item)
            else:
                (list.append if base is list else set.add)(obj, item)
    for _, slot in _slots(obj):
        slot.__delete__(obj)
    for name, value in slots.items():
        object.__setattr__(obj, name, value)
    if hasattr(obj, "__dict__"):
        vars(obj).clear()
        vars(obj).update(attributes)


_BASES: dict[type, Callable[[Any], list[Any]]] = {
    list: lambda obj: list(list.__iter__(obj)),
    set: lambda obj: list(set.__iter__(obj)),
    dict: lambda obj: list(dict.items(obj)),
}
"""What a class of Python may be derived from, and the items that an instance holds."""
_FIXED = (tuple, frozenset, str, bytes, int, float)
"""And what it holds that can't change."""
_HEAPTYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code defines


def _is_of_python(kind: Any) -> bool:
    """Is all that an instance holds in its `__dict__`, its slots, and as items of a list, dict or set?"""
    known = _of_python.get(kind)
    if known is None:
        base = next(base for base in kind.__mro__ if not base.__flags__ & _HEAPTYPE)
        own = [vars(cls) for cls in kind.__mro__ if cls.__flags__ & _HEAPTYPE]
        slots = sum(isinstance(held, types.MemberDescriptorType) for names in own for held in names.values())
        room = base.__basicsize__ + _POINTER * (slots + 2)  # and for __dict__ and __weakref__
        made_in_c = [names for names in own if isinstance(names.get("__new__"), types.BuiltinFunctionType)]
        usual = "__dict__" not in {name for names in own for name in names if isinstance(names[name], property)}
        is_told = base is object or base in _BASES or base in _FIXED
        known = is_told and kind is not base and kind.__basicsize__ <= room and not made_in_c and usual
        known = known and not issubclass(kind, (type, types.ModuleType))
        _of_python[kind] = known
    return known


_POINTER = 8
_of_python: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _slots(obj: Any) -> list[tuple[str, Any]]:
    """The slots of an instance that are filled."""
    found = {
        name: held
        for cls in type(obj).__mro__
        for name, held in vars(cls).items()
        if isinstance(held, types.MemberDescriptorType) and cls.__flags__ & _HEAPTYPE
    }
    return [(name, slot) for name, slot in found.items() if _is_filled(slot, obj)]


def _is_filled(slot: Any, obj: Any) -> bool:
    try:
        slot.__get__(obj)
    except AttributeError:
        return False
    return True


def pack(patches: list[tuple[Place, Any]], returned: Any, places: Mapping[Place, Any]) -> bytes | None:
    """New contents of the objects at these places, and what was returned, if one of them is in it; None for neither. Raises
    whatever pickling raises."""  # fmt: skip
    keys = {id(obj): place for place, obj in reversed(list(places.items()))}
    references = References(keys, places.values(), places.__getitem__)
    if not references.keys:
        return None
    linked = pickled(returned, references, apart=True).referred
    return pickled((linked, returned if linked else None, patches), references).stream if linked or patches else None


def apply(packed: bytes, places: Mapping[Place, Any], value: Any) -> Any:
    """Make the changes that `pack` wrote again, to the objects that are at these places now; what was returned: `value`, or
    what holds the live objects. KeyError, and nothing is changed, where a place holds nothing that fits."""  # fmt: skip
    try:
        linked, returned, patches = Unpickler(packed, resolve=places.__getitem__).load()
    except ValueError as error:
        raise KeyError("an array with another memory layout") from error
    live = [(places[place], content) for place, content in patches]
    if not all(fits(obj, content) for obj, content in live):
        raise KeyError("an object of another kind, or an array of another shape")
    for obj, content in live:
        put(obj, content)
    return returned if linked else value
