"""Pickle for values of a notebook: what lives in `__main__` comes back bound to the live notebook.

Stock pickle names a notebook's classes and functions and finds nothing in the next kernel; cloudpickle copies them, so that
`isinstance(restored, MyClass)` is False and a restored function sees a frozen copy of the globals. Here a class of the
notebook comes back as the live class of its name (a copy only where there is none), and a function of the notebook comes
back with the notebook's own namespace as its globals.
"""

from __future__ import annotations

import builtins
import io
import linecache
import os
import pickle
import sys
import types
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

    def persistent_id(self, obj: object) -> Any:
        if obj is self._namespace:
            return (_NAMESPACE,)
        if isinstance(obj, types.ModuleType) and sys.modules.get(obj.__name__) is obj:
            return (_MODULE, obj.__name__)
        if self._reference is not None and (key := self._reference(obj)) is not None:
            return (_OTHER, key)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type) and self._is_live(obj) and not self._copied(obj):
            return _live_class, (obj.__qualname__, dumps(obj, copied=lambda _cls: True))
        if isinstance(obj, types.FunctionType) and obj.__globals__ is self._namespace:
            return _reduce_function(obj)
        if isinstance(obj, types.CellType):
            return _reduce_cell(obj)
        if type(obj) in _FILES and obj.closed:
            return _closed_file, (type(obj).__name__, obj.name, obj.mode, getattr(obj, "encoding", None))
        return super().reducer_override(obj)

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
    attributes = {
        "__defaults__": fn.__defaults__,
        "__kwdefaults__": fn.__kwdefaults__,
        "__doc__": fn.__doc__,
        "__name__": fn.__name__,
        "__qualname__": fn.__qualname__,
        "__module__": fn.__module__,
        "__annotations__": fn.__annotations__,
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
