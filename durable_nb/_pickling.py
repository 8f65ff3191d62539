"""Pickle for values of a notebook: what lives in `__main__` comes back bound to the live notebook.

Stock pickle names a notebook's classes and functions and finds nothing in the next kernel; cloudpickle copies them, so that
`isinstance(restored, MyClass)` is False and a restored function sees a frozen copy of the globals. Here a class of the
notebook comes back as the live class of its name (a copy only where there is none), and a function of the notebook comes
back with the notebook's own namespace as its globals.
"""

from __future__ import annotations

import builtins
import copyreg
import functools
import gc
import inspect
import io
import linecache
import os
import pickle
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

_NAMESPACE = "namespace"
_MODULE = "module"
_OTHER = "other"

Reference = Callable[[object], Any]
"""Gives a picklable id for an object that shall be stored as a reference, else None."""


def main_namespace() -> dict[str, Any]:
    """The notebook's variables (`__main__`'s dict)."""
    return sys.modules["__main__"].__dict__


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """Protocol 5.

    `reference` names objects that are stored as a reference instead of by value; `copied` tells which classes of the
    notebook are stored by value, because nothing else will define them.
    """

    def __init__(
        self,
        file: io.BytesIO,
        *,
        reference: Reference | None = None,
        copied: Callable[[type], bool] = lambda _cls: False,
        buffer_callback: Callable[[pickle.PickleBuffer], object] | None = None,
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffer_callback)
        self._namespace = main_namespace()
        self._reference = reference
        self._copied = copied
        self.by_own_reduction: list[Any] = []
        """Instances of users' classes that pickle themselves in a way of their own: what comes back need not be the same."""

    def persistent_id(self, obj: object) -> Any:
        if obj is self._namespace:
            return (_NAMESPACE,)
        if isinstance(obj, types.ModuleType) and sys.modules.get(obj.__name__) is obj:
            return (_MODULE, obj.__name__)
        if self._reference is not None and (key := self._reference(obj)) is not None:
            return (_OTHER, key)
        return None

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if isinstance(obj, type):
            if not self._is_live(obj):
                return _with_slots(obj, super().reducer_override(obj))
            if not self._copied(obj):
                return _live_class, (obj.__qualname__, dumps(obj, copied=lambda _cls: True))
            return _with_slots(obj, super().reducer_override(obj), anew=self._reference is not None)
        if isinstance(obj, types.FunctionType) and obj.__globals__ is self._namespace:
            return _reduce_function(obj)
        reduce = _REDUCERS.get(kind)
        if reduce is not None:
            return reduce(obj)
        if kind in _FILES and obj.closed:
            return _closed_file, (kind.__name__, obj.name, obj.mode, getattr(obj, "encoding", None))
        if kind.__module__ == "numpy":
            return _reduce_array(obj)
        if isinstance(obj, BaseException):
            return self._exception(obj)
        if _reduces_itself(kind):
            self.by_own_reduction.append(obj)
        return super().reducer_override(obj)

    def _exception(self, obj: BaseException) -> Any:
        if not _is_installed(type(obj)):
            self.by_own_reduction.append(obj)  # its constructor is called with `args`, which may not be what it takes
        reduced = obj.__reduce_ex__(5)
        if obj.__cause__ is None or not isinstance(reduced, tuple) or len(reduced) > 3:
            return NotImplemented
        made_from, state = reduced[:2], reduced[2] if len(reduced) == 3 else None
        return *made_from, (state, obj.__cause__), None, None, _fill_exception

    def _is_live(self, cls: type) -> bool:
        return cls.__module__ == "__main__" and _find(self._namespace, cls.__qualname__) is cls


class Unpickler(pickle.Unpickler):
    """Reads what `Pickler` wrote. The bytes must have been authenticated before they come here."""

    def __init__(self, file: io.BytesIO, *, resolve: Callable[[Any], object] | None = None, buffers: Any = None) -> None:
        super().__init__(file, buffers=buffers)
        self._resolve = resolve

    def persistent_load(self, pid: Any) -> object:
        kind, *rest = pid
        if kind == _NAMESPACE:
            return main_namespace()
        if kind == _MODULE:
            __import__(rest[0])
            return sys.modules[rest[0]]
        if kind == _OTHER and self._resolve is not None:
            return self._resolve(rest[0])
        raise pickle.UnpicklingError(f"unknown reference {pid!r}")


def dumps(value: object, *, copied: Callable[[type], bool] = lambda _cls: False) -> bytes:
    """`value` as one pickle. Raises whatever its own pickling raises."""
    file = io.BytesIO()
    Pickler(file, copied=copied).dump(value)
    return file.getvalue()


def loads(data: bytes) -> Any:
    """The value that `dumps` was given."""
    return Unpickler(io.BytesIO(data)).load()


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
    # The source goes along: without it the function would be another one to whoever compares code.
    filename = fn.__code__.co_filename
    source = "" if Path(filename).exists() else "".join(linecache.getlines(filename))
    made_from = (fn.__code__, fn.__globals__, fn.__closure__, source)
    return _bare_function, made_from, (attributes, fn.__dict__), None, None, _fill_function


def _bare_function(code: types.CodeType, namespace: dict[str, Any], closure: Any, source: str = "") -> types.FunctionType:
    namespace.setdefault("__builtins__", builtins)
    if source and code.co_filename not in linecache.cache:
        linecache.cache[code.co_filename] = (len(source), None, source.splitlines(keepends=True), code.co_filename)
    return types.FunctionType(code, namespace, None, None, closure)


def _fill_function(fn: types.FunctionType, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    attributes, own_dict = state
    for name, value in attributes.items():
        setattr(fn, name, value)
    fn.__dict__.update(own_dict)


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
    if _is_installed(wrapped) or not isinstance(wrapped, types.FunctionType):
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
}


def _reduce_array(obj: Any) -> Any:
    """numpy's own pickle, but for what it loses: that an array without one plain buffer is read-only, and what is in a file."""
    numpy: Any = sys.modules["numpy"]
    if type(obj) is numpy.memmap and obj._mmap is not None and obj.mode != "c" and obj.flags.writeable:
        raise TypeError("cannot pickle a writable 'memmap' object")
    if type(obj) not in (numpy.ndarray, numpy.memmap) or obj.flags.writeable:
        return NotImplemented
    plain = type(obj) is numpy.ndarray and obj.flags.forc and not obj.dtype.hasobject
    return NotImplemented if plain else (_read_only, (obj.copy(order="A"),))


def _read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


def _fill_exception(error: BaseException, content: tuple[Any, BaseException]) -> None:
    state, error.__cause__ = content
    if state:
        vars(error).update(state)


def _with_slots(cls: type, reduced: Any, *, anew: bool = False) -> Any:
    """cloudpickle makes classes again without `__qualname__` and `__slots__`: instances would get a `__dict__`. And where the
    class still lives it writes into that one, unless there is no id to know it by (`anew`), as a class statement makes a new
    class."""  # fmt: skip
    if not isinstance(reduced, tuple) or not reduced[0].__name__.startswith("_make_skeleton"):
        return reduced
    make, (*arguments, tracked, extra), *more = reduced
    slots = vars(cls).get("__slots__")
    if isinstance(arguments[-1], dict) and not (issubclass(cls, tuple) and hasattr(cls, "_fields")):
        more_slots = {} if slots is None else {"__slots__": slots}
        arguments[-1] = {**arguments[-1], "__qualname__": cls.__qualname__, **more_slots}
    return make, (*arguments, None if anew else tracked, extra), *more


def _is_installed(kind: Any) -> bool:
    """Does a class, or function, come with Python or an installed package?"""
    module = sys.modules.get(getattr(kind, "__module__", None) or "__main__")
    filename = getattr(module, "__file__", None)
    if module is None or module.__name__ == "__main__":
        return False
    return filename is None or "site-packages" in filename or filename.startswith(_STDLIB)


_STDLIB = str(Path(os.__file__).parent) + os.sep
_REDUCTION = {"__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__"}


def _reduces_itself(kind: type) -> bool:
    """Is there code of the user's own in how an instance is pickled?"""
    known = _own_reductions.get(kind)
    if known is None:
        own = [base for base in kind.__mro__ if not _is_installed(base)]
        ways = [way for base in own for name, way in vars(base).items() if name in _REDUCTION]
        known = bool(own) and (kind in copyreg.dispatch_table or not all(_is_installed(way) for way in ways))
        _own_reductions[kind] = known
    return known


_own_reductions: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()
_FILES = (io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.FileIO)


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


__all__ = ["Pickler", "Reference", "Unpickler", "dumps", "loads", "main_namespace"]
