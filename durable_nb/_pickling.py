"""Pickle for values of a notebook: what lives in `__main__` comes back bound to the live notebook.

Stock pickle names a notebook's classes and functions and finds nothing in the next kernel; cloudpickle copies them, so that
`isinstance(restored, MyClass)` is False and a restored function sees a frozen copy of the globals. Here a class of the
notebook comes back as the live class of its name (a copy only where there is none), and a function of the notebook comes
back with the notebook's own namespace as its globals.
"""

from __future__ import annotations

import abc
import builtins
import contextlib
import copyreg
import enum
import functools
import gc
import importlib
import inspect
import io
import linecache
import os
import pickle
import re
import sys
import types
import typing
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import cloudpickle

from durable_nb import _enums
from durable_nb._memory import Frames, Sharing, is_frame, share
from durable_nb._packed import LARGE_BYTES
from durable_nb._redaction import without_credentials
from durable_nb._reducers import reduced_by_itself, reduction_of

Key = Any
"""What a pickle holds instead of an object that is stored as a reference: a string or a tuple."""

_SINGLES = (
    *(("math", "nan"), ("math", "inf"), ("numpy", "nan"), ("numpy", "inf")),
    *(("numpy.random.mtrand", "_rand"), ("random", "_inst")),
    ("matplotlib", "rcParams[path.effects]"),
)
"""Objects that code compares by `is`, and finds as keys, though pickle takes them for numbers like others; and the global
generators, which many an object holds: a copy would not hear of `seed`. All artists of matplotlib hold one list."""


def main_namespace() -> dict[str, Any]:
    """The notebook's variables (`__main__`'s dict)."""
    return sys.modules["__main__"].__dict__


class References(NamedTuple):
    """Objects that a pickle refers to instead of holding them."""

    keys: Mapping[int, Key] = {}
    """By the object's id."""
    objects: Iterable[Any] = ()
    """Those that may lend their memory to the pickle's arrays."""
    resolve: Callable[[Key], object] | None = None
    """Gives the object for its key."""


NO_REFERENCES = References()


class Pickled(NamedTuple):
    """A value as bytes."""

    stream: bytes
    buffers: list[memoryview]
    """What lies out of band."""
    unproven: list[Any]
    """Objects of kinds that need not come back as they are."""
    classes: bool
    """Are classes of the notebook stored by value?"""
    referred: bool
    """Does it refer to anything?"""


def pickled(
    value: Any,
    *,
    references: References = NO_REFERENCES,
    copied: Callable[[Any], bool] = lambda _: False,
    apart: bool = False,
    live_classes: dict[str, type] | None = None,
) -> Pickled:
    """Pickle `value` by protocol 5; raises whatever its own pickling raises.

    `copied` tells which of the notebook's classes and functions are stored by value, because nothing else
    will define them. `apart`: buffers go out of band, those of arrays and long texts and bytes that `value` is, or that it
    holds as a dict. `live_classes` takes in the classes of users that the pickle
    then refers to instead of holding them.
    """
    frames = Frames()
    first = _pickled(value, references, None, frames, copied, apart, live_classes)
    sharing, groups = Sharing(first.arrays, references.objects), frames.shared()
    if not sharing and not groups:
        return first.done()
    return _pickled(_Together(value, groups), references, sharing, Frames(), copied, apart, live_classes).done()


def _pickled(
    value: Any,
    references: References,
    sharing: Sharing | None,
    frames: Frames,
    copied: Callable[[Any], bool],
    apart: bool,
    live_classes: dict[str, type] | None,
) -> Pickler:
    pickler = Pickler(references.keys, sharing, frames, copied, apart, live_classes)
    if apart:
        inner = value.value if isinstance(value, _Together) else value
        pickler.put_apart(found for found in (inner, *(inner.values() if type(inner) is dict else ())) if is_bulk(found))
    pickler.dump(value)
    return pickler


def is_bulk(value: object) -> bool:
    """A long text, or long bytes?"""
    return type(value) in (str, bytes) and len(value) >= LARGE_BYTES  # type: ignore[arg-type]


_BULK = "<bulk>"


class _Together:
    """A value, and which of its frames share columns."""

    def __init__(self, value: Any, groups: list[list[tuple[Any, int]]]) -> None:
        self.value, self._groups = value, groups

    def __reduce__(self) -> Any:
        return _together, (self.value, self._groups)


def _together(value: Any, groups: list[list[tuple[Any, int]]]) -> Any:
    share(groups)
    return value


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """One pass over a value."""

    def __init__(
        self,
        references: Mapping[int, Key],
        sharing: Sharing | None,
        frames: Frames,
        copied: Callable[[Any], bool],
        apart: bool,
        live_classes: dict[str, type] | None,
    ) -> None:
        self._file = io.BytesIO()
        self._buffers: list[memoryview] = []
        keep = lambda buffer: self._buffers.append(buffer.raw())  # noqa: E731  None: it is out of band
        super().__init__(self._file, protocol=5, buffer_callback=keep if apart else None)
        self._namespace = main_namespace()
        # Asked for every single object, numbers included: one look into one dict.
        self._keys: dict[int, Any] = {**references, id(self._namespace): _NAMESPACE, **_singles()}
        self._known = self._keys.get
        self._bulk: list[memoryview] = []
        self._refers, self._referred = bool(references), False
        self._sharing, self._frames = sharing, frames
        self._copied, self._live_classes = copied, live_classes
        self._plain: set[type] = set()
        self._unproven: list[Any] = []
        self._classes = False
        self.arrays: list[Any] = []
        """Arrays met, references left out."""

    def put_apart(self, values: Iterable[str | bytes]) -> None:
        """These texts and bytes go out of band, behind the buffers of arrays, the last one first."""
        for value in values:
            if id(value) not in self._keys:
                self._keys[id(value)] = _BULK, type(value) is str, len(self._bulk)
                self._bulk.append(memoryview(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value))

    def done(self) -> Pickled:
        buffers = [*self._buffers, *reversed(self._bulk)]
        return Pickled(self._file.getvalue(), buffers, self._unproven, self._classes, self._referred)

    def persistent_id(self, obj: object) -> Any:
        key = self._known(id(obj))
        if key is not None and type(key) is not int and key[0] != _BULK:
            self._referred = True
        return key

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind in self._plain:
            return NotImplemented
        if issubclass(kind, type):
            return self._class(obj)
        reduced = reduction_of(obj)
        if reduced is not None:
            self._unproven.append(obj)
            return reduced
        if kind is types.FunctionType:
            return self._function(obj)
        if isinstance(kind, enum.EnumMeta) and not is_installed(kind):
            return _enums.reduced_member(obj) or obj.__reduce_ex__(5)
        if isinstance(obj, types.ModuleType) and sys.modules.get(obj.__name__) is obj:
            return importlib.import_module, (obj.__name__,)
        reduce = _REDUCERS.get(kind)
        if reduce is not None:
            return reduce(obj)
        if isinstance(obj, BaseException):
            return self._exception(obj)
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None and isinstance(obj, numpy.ndarray):
            return self._array(obj)
        if numpy is not None and isinstance(obj, numpy.dtype):
            return _reduce_dtype(obj)
        if is_frame(obj):
            self._frames.note(obj)
            if kind.__module__.startswith("pandas"):
                return _reduce_frame(obj)
        if issubclass(kind, dict) and _is_usual_dict(kind):
            self._unproven.append(obj)
            return _reduce_dict(obj)
        if kind in (_Together, _Owned) or is_proven(kind):
            self._plain.add(kind)
            return NotImplemented
        hashed = _reduce_hashed(obj)
        if hashed is not None:
            self._unproven.append(obj)
            return hashed
        registered = self.dispatch_table.get(kind)
        reduced = registered(obj) if registered is not None else reduced_by_itself(obj, 5)
        if not isinstance(reduced, str):
            self._unproven.append(obj)
        elif getattr(obj, "__module__", None) == "__main__":
            raise pickle.PicklingError(f"{reduced} is known to pickle by its name only, which the notebook has yet to define")
        return reduced

    def _class(self, cls: type) -> Any:
        _load_module_of(cls)
        if self._live_classes is not None and not is_installed(cls):
            self._live_classes[f"{id(cls)}"] = cls
            return class_at, (f"{id(cls)}",)
        if cls.__module__ != "__main__" or _find(self._namespace, cls.__qualname__) is not cls:
            reduced = super().reducer_override(cls)
            self._classes |= reduced is not NotImplemented and not is_installed(cls)
            return _faithful(cls, reduced)
        if not self._copied(cls):
            return _live_class, (cls.__qualname__, dumps(cls, copied=lambda _: True))
        self._classes = True
        return _faithful(cls, super().reducer_override(cls), anew=self._refers)

    def _function(self, fn: types.FunctionType) -> Any:
        if fn.__globals__ is not self._namespace:
            return super().reducer_override(fn)
        if self._namespace.get(fn.__qualname__) is fn and not self._copied(fn):
            return _live_function, (fn.__qualname__, dumps(fn, copied=lambda _: True))
        return _reduce_function(fn)

    def _array(self, obj: Any) -> Any:
        self.arrays.append(obj)
        if not type(obj).__module__.startswith("numpy"):
            self._unproven.append(obj)
        shared = self._sharing.reduced(obj, lent=not self._frames.hold(obj)) if self._sharing is not None else None
        return _reduce_array(obj) if shared is None else shared

    def _exception(self, obj: BaseException) -> Any:
        if type(obj).__module__ != "builtins":
            self._unproven.append(obj)  # its constructor is called with `args`, which may not be what it takes
        reduced = obj.__reduce_ex__(5)
        is_usual = isinstance(reduced, tuple) and len(reduced) <= 3
        if is_usual and len(reduced) == 3 and type(reduced[2]) is dict:  # a client's error has the request, and the key in it
            reduced = *reduced[:2], {name: without_credentials(held) for name, held in reduced[2].items()}
        if not is_usual or (obj.__cause__ is None and not obj.__suppress_context__):
            return reduced
        made_from, state = reduced[:2], reduced[2] if len(reduced) == 3 else None
        return *made_from, (state, obj.__cause__, obj.__suppress_context__), None, None, _fill_exception


class Unpickler(pickle.Unpickler):
    """Reads what `pickled` wrote. The bytes must have been authenticated before they come here."""

    def __init__(self, stream: bytes, *, resolve: Callable[[Key], object] | None = None, buffers: Any = None) -> None:
        super().__init__(io.BytesIO(stream), buffers=buffers)
        self._resolve, self._buffers = resolve, buffers
        self._bulk: dict[int, str | bytes] = {}

    def persistent_load(self, pid: Any) -> object:
        if pid == _NAMESPACE:
            return main_namespace()
        if isinstance(pid, int):
            single = _single(*_SINGLES[pid])
            return [] if single is None else single
        if type(pid) is tuple and pid[0] == _BULK:
            _, is_text, number = pid
            if number not in self._bulk:
                data = self._buffers[-1 - number]
                self._bulk[number] = str(data, "utf-8", "surrogatepass") if is_text else bytes(data)
            return self._bulk[number]
        if self._resolve is not None:
            return self._resolve(pid)
        raise pickle.UnpicklingError(f"unknown reference {pid!r}")


_NAMESPACE = -1


def _singles() -> dict[int, int]:
    loaded = ((number, module, name) for number, (module, name) in enumerate(_SINGLES) if module in sys.modules)
    found = ((number, _single(module, name)) for number, module, name in loaded)
    return {id(single): number for number, single in found if single is not None}


def _single(module: str, name: str) -> Any:
    attribute, bracket, key = name.rstrip("]").partition("[")
    found = getattr(importlib.import_module(module), attribute, None)
    if not bracket:
        return found
    listed = dict.get(found or {}, key)
    return listed if listed == [] else None  # another one is the user's


def class_at(_key: str) -> type:
    """Stands for a live class in a pickle that is read in the process that wrote it; its reader has the table."""
    raise pickle.UnpicklingError("a class of another process")


def dumps(value: object, *, copied: Callable[[Any], bool] = lambda _: False) -> bytes:
    """`value` as one pickle. Raises whatever its own pickling raises."""
    return pickled(value, copied=copied).stream


def loads(data: bytes) -> Any:
    """The value that `dumps` was given."""
    return Unpickler(data).load()


def portable(value: object) -> bytes:
    """`value` as one pickle for a process that has none of these names: what the notebook defines goes along as it is now.
    `pickle.loads` reads it."""  # fmt: skip
    return cast("bytes", cloudpickle.dumps(value, protocol=5))


def _find(namespace: dict[str, Any], qualname: str) -> Any:
    """`Outer.Inner` in a namespace; None where there is none."""
    first, *rest = qualname.split(".")
    found = namespace.get(first)
    for name in rest:
        found = getattr(found, name, None)
    return found


def _live_class(qualname: str, copy: bytes) -> type:
    live = _find(main_namespace(), qualname)
    return live if isinstance(live, type) else loads(copy)


def _live_function(name: str, copy: bytes) -> types.FunctionType:
    """The notebook's function of that name, if it is still the one that was stored."""
    live, stored = main_namespace().get(name), loads(copy)
    if isinstance(live, types.FunctionType) and _code(live.__code__) == _code(stored.__code__):
        return live
    return stored  # type: ignore[no-any-return]


def _code(code: types.CodeType) -> types.CodeType:
    """Code without where it stands."""
    constants = tuple(_code(held) if isinstance(held, types.CodeType) else held for held in code.co_consts)
    return code.replace(co_consts=constants, co_filename="", co_firstlineno=1, co_linetable=b"")


def _reduce_function(fn: types.FunctionType) -> Any:
    # from 3.14 annotations are code, which is run when they are asked for, and may fail until then
    annotations = "__annotate__" if getattr(fn, "__annotate__", None) is not None else "__annotations__"
    attributes = {
        "__defaults__": fn.__defaults__,
        "__kwdefaults__": fn.__kwdefaults__,
        "__doc__": fn.__doc__,
        "__name__": fn.__name__,
        "__qualname__": fn.__qualname__,
        "__module__": fn.__module__,
        annotations: getattr(fn, annotations),
    }
    # File and source go along: without them the function would be another one to whoever compares code, and its tracebacks
    # would show another's lines.
    filename = fn.__code__.co_filename
    source = "" if Path(filename).exists() else "".join(linecache.getlines(filename))
    made_from = (fn.__code__, fn.__globals__, fn.__closure__, source, filename)
    return _bare_function, made_from, (attributes, fn.__dict__), None, None, _fill_function


def _bare_function(
    code: types.CodeType, namespace: dict[str, Any], closure: Any, source: str = "", filename: str = ""
) -> types.FunctionType:
    namespace.setdefault("__builtins__", builtins)
    if source:
        filename = _file_of(source) or filename
        if filename not in linecache.cache:
            linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    return types.FunctionType(_in_file(code, filename or code.co_filename), namespace, None, None, closure)


def _file_of(source: str) -> str:
    """The name under which this kernel has that very source already, as of a cell; '' where it hasn't."""
    for filename, entry in tuple(linecache.cache.items()):
        if len(entry) == 4 and entry[0] == len(source) and "".join(entry[2]) == source:
            return filename
    return ""


def _in_file(code: types.CodeType, filename: str) -> types.CodeType:
    constants = tuple(_in_file(held, filename) if isinstance(held, types.CodeType) else held for held in code.co_consts)
    return code.replace(co_filename=filename, co_consts=constants)


def _fill_function(fn: types.FunctionType, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    attributes, own_dict = state
    for name, value in attributes.items():
        setattr(fn, name, value)
    fn.__dict__.update(own_dict)


def _reduce_typevar(variable: typing.TypeVar) -> Any:
    """cloudpickle's own, which makes one of another module."""
    make, made_from = cloudpickle.cloudpickle._typevar_reduce(variable)
    return (make, made_from) if make is getattr else (_typevar, (variable.__module__, make, made_from))


def _typevar(module: str, make: Any, made_from: tuple[Any, ...]) -> Any:
    variable = make(*made_from)
    variable.__module__ = module
    return variable


def _reduce_cell(cell: types.CellType) -> Any:
    # Empty first and filled as its state, so that it is memoised in between: a function may hold itself, and two
    # functions may share a variable.
    try:
        content = (cell.cell_contents,)
    except ValueError:
        return types.CellType, ()
    return types.CellType, (), content, None, None, _fill_cell


def _fill_cell(cell: types.CellType, content: tuple[Any]) -> None:
    (cell.cell_contents,) = content


def _reduce_cached(cached: Any) -> Any:
    """A function under lru_cache; stock pickle knows it by its name only, which nothing may define in the next kernel."""
    wrapped = cached.__wrapped__
    if is_installed(wrapped) or not isinstance(wrapped, types.FunctionType):
        return NotImplemented
    if cached.cache_info().currsize:
        raise pickle.PicklingError("what functools.lru_cache remembers can't be stored")
    own = {name: value for name, value in vars(cached).items() if name not in ("__wrapped__", "cache_parameters")}
    return _cached, (wrapped, cached.cache_parameters()), own, None, None, _fill_cached


def _cached(wrapped: Any, parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(wrapped)


def _fill_cached(cached: Any, own: dict[str, Any]) -> None:
    vars(cached).update(own)


def _reduce_proxy(proxy: Any) -> Any:
    return types.MappingProxyType, tuple(gc.get_referents(proxy)[:1])  # the very mapping, which pickle would copy


def _reduce_view(view: Any) -> Any:
    return _view, (gc.get_referents(view)[0], type(view).__name__.partition("_")[2])


def _view(mapping: Any, name: str) -> Any:
    return getattr(mapping, name)()


def _reduce_coroutine(coro: Any) -> Any:
    """One that has ended, as `for task in asyncio.as_completed(...): await task` leaves behind: nothing is left of it but its
    name."""  # fmt: skip
    if inspect.getcoroutinestate(coro) != inspect.CORO_CLOSED:
        raise TypeError("cannot pickle 'coroutine' object")
    return _ended_coroutine, (coro.__name__, coro.__qualname__)


def _ended_coroutine(name: str, qualname: str) -> Any:
    async def ended() -> None: ...

    coro: Any = ended()
    coro.close()
    coro.__name__, coro.__qualname__ = name, qualname
    return coro


def _reduce_memoryview(_view: memoryview) -> Any:
    raise TypeError("cannot pickle 'memoryview' object")  # cloudpickle would make it bytes


_empty: dict[str, int] = {}
_REDUCERS: dict[type, Callable[[Any], Any]] = {
    types.CellType: _reduce_cell,
    type(functools.lru_cache(len)): _reduce_cached,
    types.MappingProxyType: _reduce_proxy,
    type(_empty.keys()): _reduce_view,
    type(_empty.values()): _reduce_view,
    type(_empty.items()): _reduce_view,
    memoryview: _reduce_memoryview,
    types.CoroutineType: _reduce_coroutine,
    typing.TypeVar: _reduce_typevar,
    # with the flags that it was compiled with, so that `re` finds the very one that it remembers
    re.Pattern: lambda obj: (re.compile, (obj.pattern, obj.flags & ~(re.UNICODE if type(obj.pattern) is str else 0))),
    typing.NewType: lambda obj: (typing.NewType, (obj.__name__, obj.__supertype__), vars(obj)),
}


_OWNED_BYTES = 1 << 16
"""Arrays up to this size come back owning their memory, as most do; larger ones lie in a buffer of the file."""


def _reduce_array(obj: Any) -> Any:
    """numpy's own pickle, but for what it loses: that an array without one plain buffer is read-only, and what is in a file."""
    numpy: Any = sys.modules["numpy"]
    is_small = type(obj) is numpy.ndarray and obj.flags.owndata and obj.nbytes <= _OWNED_BYTES
    if is_small and obj.dtype.isnative and not obj.dtype.hasobject:
        reduced = obj.__reduce__()
        return reduced if obj.flags.writeable else (_read_only, (_Owned(reduced),))
    if type(obj) is numpy.ma.MaskedArray and obj._mask is numpy.ma.nomask:
        make, made_from, state = obj.__reduce__()  # which writes a mask that there isn't
        return make, made_from, state, None, None, _fill_unmasked
    if type(obj) is numpy.memmap and obj._mmap is not None and obj.mode != "c" and obj.flags.writeable:
        raise TypeError("cannot pickle a writable 'memmap' object")
    if type(obj) not in (numpy.ndarray, numpy.memmap) or obj.flags.writeable:
        return NotImplemented
    plain = type(obj) is numpy.ndarray and obj.flags.forc and not obj.dtype.hasobject
    return NotImplemented if plain else (_read_only, (obj.copy(order="A"),))


def _reduce_dtype(obj: Any) -> Any:
    """numpy's own makes copies, and `numpy.asarray(a, float)` is `a` itself only where its type is the very one."""
    numpy: Any = sys.modules["numpy"]
    return (numpy.dtype, (obj.str,)) if obj.names is None and numpy.dtype(obj.str) is obj else NotImplemented


def _fill_unmasked(array: Any, state: Any) -> None:
    array.__setstate__(state)
    array._mask = sys.modules["numpy.ma"].nomask


class _Owned:
    """An array as part of a pickle."""

    def __init__(self, reduced: Any) -> None:
        self._reduced = reduced

    def __reduce__(self) -> Any:
        return self._reduced


def _read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


def _reduce_frame(frame: Any) -> Any:
    """pandas' own, which gives the new frame a copy of its `attrs`: whoever else holds them would not see what is added."""
    reduced = frame.__reduce_ex__(5)
    state = reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else None
    if isinstance(state, dict) and "attrs" in state:
        state["_attrs"] = state.pop("attrs")
    return reduced


def _fill_exception(error: BaseException, content: tuple[Any, BaseException | None, bool]) -> None:
    state, error.__cause__, error.__suppress_context__ = content
    if state:
        vars(error).update(state)


def _reduce_hashed(obj: Any) -> Any:
    """An instance of a user's class with a hash of its own, made with the plain values that it holds: in a cycle, a set or dict
    asks for its hash before its state is there. None where pickle's way serves."""  # fmt: skip
    kind: Any = type(obj)
    if not _hashes_itself(kind):
        return None
    state = obj.__reduce_ex__(4)[2]
    own, slots = state if isinstance(state, tuple) else (state, None)
    early = [{name: value for name, value in (held or {}).items() if _is_scalar(value)} for held in (own, slots)]
    return _early, (kind, *early), (own, slots), None, None, _fill_early


@functools.lru_cache(maxsize=1024)
def _hashes_itself(kind: Any) -> bool:
    ways = ("__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__new__", "__getnewargs_ex__", "__getnewargs__")
    usual = all(getattr(kind, way, None) is getattr(object, way, None) for way in ways) and kind not in copyreg.dispatch_table
    return usual and not is_installed(kind) and isinstance(kind.__hash__, types.FunctionType)


def _is_scalar(value: Any) -> bool:
    return type(value) in _SCALARS or (type(value) in (tuple, frozenset) and all(map(_is_scalar, value)))


_SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes})


def _early(kind: Any, own: dict[str, Any], slots: dict[str, Any]) -> Any:
    made = object.__new__(kind)
    if own:
        vars(made).update(own)
    for name, value in slots.items():
        object.__setattr__(made, name, value)
    return made


def _fill_early(obj: Any, state: tuple[dict[str, Any] | None, dict[str, Any] | None]) -> None:
    own, slots = state
    if own is not None:
        vars(obj).clear()  # all of it in its order
        vars(obj).update(own)
    for name, value in (slots or {}).items():
        object.__setattr__(obj, name, value)


def _is_usual_dict(kind: Any) -> bool:
    """Is it a class that Python code derives from dict, leaving to pickle how its instances are pickled?"""
    ways = ("__reduce_ex__", "__reduce__", "__getstate__")
    is_usual = all(getattr(kind, way, None) is getattr(object, way, None) for way in ways)
    return is_usual and bool(kind.__flags__ & _HEAPTYPE and kind.__dictoffset__)


def _reduce_dict(obj: Any) -> Any:
    """A dict of a class of its own, with attributes: those that a `__setstate__` would forget, or all of its items, where it is
    its own `__dict__`, which pickle would make a separate one."""  # fmt: skip
    own = vars(obj)
    return _new, (type(obj),), True if own is obj else own, None, iter(dict(obj).items()), _fill_dict


def _new(kind: Any) -> Any:
    return kind.__new__(kind)


def _fill_dict(obj: Any, own: Any) -> None:
    if own is True:
        obj.__dict__ = obj
    else:
        vars(obj).update(own)


def _faithful(cls: type, reduced: Any, *, anew: bool = False) -> Any:
    """cloudpickle makes classes again without `__qualname__` and `__slots__`: instances would get a `__dict__`; and with their
    attributes sorted by name. And where the class still lives it writes into that one, unless there is no id to know it by
    (`anew`), as a class statement makes a new class."""  # fmt: skip
    if not isinstance(reduced, tuple) or not reduced[0].__name__.startswith("_make_skeleton"):
        return reduced
    make, (*arguments, tracked, extra), (attributes, slot_state), *more = reduced
    if isinstance(cls, enum.EnumMeta):
        return _enums.reduced_class(cls, None if anew else tracked) or reduced
    places = {name: place for place, name in enumerate(vars(cls))}
    attributes = dict(sorted(attributes.items(), key=lambda item: places.get(item[0], -1)))
    slots = vars(cls).get("__slots__")
    if isinstance(arguments[-1], dict) and not (issubclass(cls, tuple) and hasattr(cls, "_fields")):
        more_slots = {} if slots is None else {"__slots__": slots}
        arguments[-1] = {**arguments[-1], "__qualname__": cls.__qualname__, **more_slots}
    made_from = (*arguments, None if anew else tracked, extra)
    if make.__name__ == "_make_skeleton_class":
        return _skeleton, (make, *made_from), (attributes, slot_state), *more
    return make, made_from, (attributes, slot_state), *more


def _skeleton(make: Any, constructor: Any, name: str, bases: tuple[type, ...], given: dict[str, Any], *more: Any) -> type:
    """A class without its attributes yet. No code of the user's runs: neither a metaclass's nor `__init_subclass__`, which has
    done its work when the class was defined."""  # fmt: skip
    lineage = [base for direct in bases for base in getattr(direct, "__mro__", ())]  # Generic[T] is no class
    hooked = any("__init_subclass__" in vars(base) and not is_installed(base) for base in lineage)
    if is_installed(constructor) and not hooked:
        is_new = more[0] not in cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID
        made: type = make(constructor, name, bases, given, *more)
        if is_new and constructor in (type, abc.ABCMeta):
            _without_added(made, given)
        return made
    native = next(kind for kind in constructor.__mro__ if is_installed(kind))
    cls: Any = native.__new__(constructor, name, (_silent(lineage), *bases) if hooked else bases, dict(given))
    if hooked:
        cls.__bases__ = bases
    return cloudpickle.cloudpickle._lookup_class_or_track(more[0], cls)  # type: ignore[no-any-return]


def _without_added(cls: type, given: dict[str, Any]) -> None:
    """What a library's `__init_subclass__` set (scikit-learn's `set_score_request`) is among the attributes that come yet, and
    has its place there."""  # fmt: skip
    native = (types.MemberDescriptorType, types.GetSetDescriptorType)
    for name, held in tuple(vars(cls).items()):
        if name not in given and not name.startswith(("__", "_abc_")) and not isinstance(held, native):
            delattr(cls, name)


def _silent(lineage: list[type]) -> type:
    """Stands before the bases of a class while it is made, so that their `__init_subclass__` is not called. Of the same layout:
    the bases are exchanged afterwards."""  # fmt: skip
    above = next((base.__base__ for base in reversed(lineage) if base.__dictoffset__), None)
    own = {"__init_subclass__": classmethod(lambda _cls, **_: None)}
    return type(above or object)("_Silent", (above or object,), own if above else {**own, "__slots__": ()})


def _load_module_of(cls: type) -> None:
    """A class may name a public module that nobody has imported yet (`numpy.rec`): cloudpickle would take it for the user's."""
    module = cls.__module__
    if module not in sys.modules and module.partition(".")[0] in sys.modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def is_installed(kind: Any) -> bool:
    """Does a class, or function, come with Python, an installed package, or us?"""
    module = sys.modules.get(getattr(kind, "__module__", None) or "__main__")
    filename = getattr(module, "__file__", None)
    if module is None or module.__name__ == "__main__":
        return False
    return filename is None or "site-packages" in filename or filename.startswith((_STDLIB, _HERE))


_STDLIB, _HERE = (str(Path(file).parent) + os.sep for file in (os.__file__, __file__))
_HOOKS = {
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__"),
    *("__new__", "__getattr__", "__getattribute__", "__setattr__", "__hash__", "__dict__"),
}
"""What in a class can make an instance come back otherwise. Hashes are asked for while what they hash isn't there yet."""
_TRUSTED = {
    *("builtins", "datetime", "decimal", "_decimal", "fractions", "uuid", "pathlib", "collections", "re", "zoneinfo", "enum"),
    *("pyarrow", "polars", "functools", "operator", "_operator", "array", "time", "ipaddress", "string", "types"),
    *("matplotlib", "mpl_toolkits"),
}


def is_proven(kind: type) -> bool:
    """Do instances come back as they are, if what they hold does? Known of kinds of Python and of plain classes."""
    known = _proven.get(kind)
    if known is None:
        if kind.__module__.partition(".")[0] in _TRUSTED and is_installed(kind):
            known = True
        elif kind.__module__.startswith(("numpy", "pandas")):
            known = _is_data(kind)
        elif isinstance(kind, enum.EnumMeta):
            known = True
        else:
            is_usual = type(kind) in (type, abc.ABCMeta) and kind not in copyreg.dispatch_table
            known = is_usual and all(map(_is_plain, kind.__mro__[:-1]))  # but for object
        _proven[kind] = known
    return known


def _is_data(kind: type) -> bool:
    """Numbers, arrays, columns and what describes them, of numpy and pandas."""
    numpy: Any = sys.modules["numpy"]
    known = [numpy.generic, numpy.dtype, numpy.ufunc, numpy.random.Generator, numpy.random.RandomState]
    known += [numpy.random.BitGenerator, numpy.random.SeedSequence]
    pandas: Any = sys.modules.get("pandas")
    if pandas is not None:
        known += [pandas.api.extensions.ExtensionArray, pandas.api.extensions.ExtensionDtype, pandas.Flags]
    return issubclass(kind, tuple(known)) or kind.__module__.startswith(("pandas._libs", "pandas.core.internals"))


def _is_plain(base: Any) -> bool:
    hooks = [way for name, way in vars(base).items() if name in _HOOKS and way is not None]
    own = [way for way in hooks if not isinstance(way, types.GetSetDescriptorType)]  # that of `__dict__` is everybody's
    return bool(base.__flags__ & _HEAPTYPE) and not own


_HEAPTYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code defines
_proven: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _reduce_file(file: Any) -> Any:
    if not file.closed:
        raise TypeError(f"cannot pickle an open file ({file.name!r})")  # cloudpickle would make it a StringIO
    return _closed_file, (type(file).__name__, file.name, file.mode, getattr(file, "encoding", None))


def _closed_file(kind: str, name: Any, mode: str, encoding: str | None) -> Any:
    """A closed file, which `with open(...) as f` leaves behind. The file itself isn't touched: it may be gone."""
    raw: Any = io.FileIO(
        os.devnull, mode.replace("b", "").replace("t", "").replace("x", "w") if kind != "TextIOWrapper" else "r"
    )
    raw.name = name
    file: Any = raw
    if kind in ("BufferedReader", "BufferedWriter", "BufferedRandom"):
        file = getattr(io, kind)(raw)
    elif kind == "TextIOWrapper":
        file = io.TextIOWrapper(io.BufferedReader(raw), encoding=encoding)
        file.mode = mode
    file.close()
    return file


_REDUCERS |= dict.fromkeys((io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.FileIO), _reduce_file)

__all__ = [
    "Key",
    "Pickled",
    "References",
    "Unpickler",
    "class_at",
    "dumps",
    "is_installed",
    "loads",
    "main_namespace",
    "pickled",
]
