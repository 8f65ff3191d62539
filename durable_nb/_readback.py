"""Pickles that are known to come back: what is stored is read again at once, and compared with what it was made of.

Not where the kinds of all that was met prove it. Both values are walked side by side. Buffers are not compared: the second
value lies over the memory of the first. Classes and modules must be the very same.
"""

from __future__ import annotations

import contextlib
import struct
import sys
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

from durable_nb import _pickling, _sqlite
from durable_nb._fingerprint import hash_value, lasting_parts, without_passing
from durable_nb._memory import byte_bounds
from durable_nb._pickling import _REDUCERS, NO_REFERENCES, Key, Pickled, References, Unpickler, class_at, is_installed
from durable_nb._reducers import reduced_by_itself, reduction_of


class DriftError(Exception):
    """A value comes back from its pickle as another one, or not at all; says of which type it is."""


def pickled(
    value: Any, references: References = NO_REFERENCES, *, copied: Callable[[Any], bool] = lambda _: False, apart: bool = False
) -> Pickled:
    """As `_pickling.pickled`; DriftError where what is read again isn't `value`."""
    done = _pickling.pickled(value, references=references, copied=copied, apart=apart)
    if done.unproven:
        try:
            with _undisturbed():
                _check(value, references, done, apart=apart)
        except DriftError:
            raise
        except Exception as error:
            raise DriftError(type(done.unproven[0]).__name__) from error
    return done


def _check(value: Any, references: References, done: Pickled, *, apart: bool) -> None:
    classes: dict[str, type] = {}
    if done.classes or not apart:  # a class made a second time would register itself a second time
        done = _pickling.pickled(value, references=references, apart=True, live_classes=classes)
    compare(value, _Reader(done, classes, references.resolve).load())


class _Reader(Unpickler):
    """Reads as another kernel will, but for the classes of users, which stay the live ones."""

    def __init__(self, done: Pickled, classes: dict[str, type], resolve: Callable[[Key], object] | None) -> None:
        super().__init__(done.stream, resolve=resolve, buffers=done.buffers)
        self._classes = classes

    def find_class(self, module: str, name: str) -> Any:
        if module == "__main__":
            raise DriftError(name)  # it is there now; in the next kernel nothing may have defined it
        found = super().find_class(module, name)
        if found is _sqlite.cursor_again:
            return lambda kind, con, _: kind(con)  # the connection is the live one, and counts what cursors do
        return self._classes.__getitem__ if found is class_at else found


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """What reading the values again does besides is not seen: warnings, and figures that register themselves."""
    pylab: Any = sys.modules.get("matplotlib._pylab_helpers")
    figures = dict(pylab.Gcf.figs) if pylab is not None else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            if pylab is not None and list(pylab.Gcf.figs.items()) != list(figures.items()):
                pylab.Gcf.figs.clear()
                pylab.Gcf.figs.update(figures)


def compare(before: Any, after: Any) -> None:
    """DriftError at the first thing in `after` that isn't as in `before`. Raises whatever the values' own code raises."""
    pairs: list[tuple[Any, Any, Any]] = [(before, after, before)]
    there: dict[int, Any] = {}
    back: dict[int, Any] = {}
    keep: list[Any] = []
    while pairs:
        one, other, holder = pairs.pop()
        if one is other:
            continue
        kind = type(one)
        if kind is not type(other):
            raise DriftError(type(holder).__name__)
        if kind.__module__.startswith(_REBUILT):
            continue
        scalar = _SCALARS.get(kind)
        if scalar is not None:
            if not scalar(one, other):
                raise DriftError(type(holder).__name__)
            continue
        if id(one) in there or id(other) in back:
            if there.get(id(one)) is other:
                continue
            if kind in _CONTAINERS or hasattr(one, "__dict__"):  # aliases of what can be changed can be seen
                raise DriftError(kind.__name__)
        there[id(one)], back[id(other)] = other, one
        parts = _parts(one), _parts(other)
        keep += (one, other, *parts)
        if len(parts[0]) != len(parts[1]):
            raise DriftError(kind.__name__)
        pairs += [(a, b, one) for a, b in zip(*parts, strict=True)]


_REBUILT = ("matplotlib.", "mpl_toolkits.", "sqlite3")
"""matplotlib numbers anew, when its objects come back, what calls what: no two are alike. Cursors are not brought to where they
were while they are looked at."""
_CONTAINERS = (list, dict, set, deque, OrderedDict)


def _same_float(one: float, other: float) -> bool:
    return struct.pack("<d", one) == struct.pack("<d", other) or (one != one and other != other)  # noqa: PLR0124  NaN


_SCALARS: dict[type, Any] = {
    type(None): lambda _a, _b: True,
    float: _same_float,
    **dict.fromkeys((bool, int, str, bytes, bytearray), lambda a, b: a == b),
    **dict.fromkeys((complex, range), lambda a, b: repr(a) == repr(b)),
    **dict.fromkeys((types.ModuleType, type), lambda a, b: a is b),
}


def _parts(obj: Any) -> list[Any]:
    """What an object consists of, in an order that is the same for equal ones."""
    kind = type(obj)
    if kind in (list, tuple, deque):
        return list(obj)
    if kind in (dict, OrderedDict):
        return [part for item in obj.items() for part in item]
    if kind in (set, frozenset):
        return [hash_value(obj)]
    reduce = _REDUCERS.get(kind)
    special = reduce(obj) if reduce is not None else reduction_of(obj)
    if isinstance(special, tuple):
        return list(special)
    lasting = lasting_parts(obj)
    if lasting is not None:
        return lasting
    if isinstance(obj, types.FunctionType):
        return _function(obj)
    if isinstance(obj, types.CellType):
        try:
            return [obj.cell_contents]
        except ValueError:
            return []
    if isinstance(obj, types.CodeType):
        return [obj.co_code, obj.co_names, obj.co_varnames, [c for c in obj.co_consts if not isinstance(c, frozenset)]]
    if isinstance(obj, types.MethodType):
        return [obj.__func__, obj.__self__]
    if isinstance(
        obj, types.BuiltinFunctionType
    ):  # the method of an object, made anew each time it is asked for, or a function
        is_bound = obj.__self__ is not None and not isinstance(obj.__self__, types.ModuleType)
        return [obj.__name__, obj.__self__] if is_bound else [id(obj)]
    if isinstance(obj, type):
        return [id(obj)]
    root = kind.__module__.partition(".")[0]
    if root == "numpy" and hasattr(obj, "__array_interface__"):
        found = _array(obj)
        if found is not None:
            return found
    if root == "pyarrow":
        return [hash_value(obj)]
    return _reduced(obj, kind)


def _function(fn: types.FunctionType) -> list[Any]:
    held = fn.__code__, fn.__defaults__, fn.__kwdefaults__, fn.__closure__, fn.__dict__
    return [*held, fn.__name__, fn.__qualname__, fn.__module__, fn.__doc__]


def _array(array: Any) -> list[Any] | None:
    numpy: Any = sys.modules["numpy"]
    if type(array) is numpy.ma.MaskedArray:  # pickle writes down the usual fill value, which wasn't asked for yet
        return [array.view(numpy.ndarray), numpy.ma.getmaskarray(array), array.fill_value, array.hardmask]
    if type(array) not in (numpy.ndarray, numpy.matrix, numpy.recarray, numpy.memmap) and not isinstance(array, numpy.generic):
        return None
    told = [str(array.dtype), array.shape]
    if array.dtype.hasobject:
        return [*told, numpy.asarray(array).ravel().tolist() if array.dtype.kind == "O" else hash_value(array)]
    if isinstance(array, numpy.generic):
        return [*told, array.tobytes()]
    return [*told, _Memory(array)]


class _Memory:
    """Bytes of an array, in the order of its elements."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def same(self, other: _Memory) -> bool:
        """Equal bytes; at once where they are the very same ones."""
        numpy: Any = sys.modules["numpy"]
        a, b = self.array, other.array
        if byte_bounds(a) == byte_bounds(b) and a.strides == b.strides:
            return True
        return bool(numpy.ascontiguousarray(a).tobytes() == numpy.ascontiguousarray(b).tobytes())


_SCALARS[_Memory] = _Memory.same


def _filled(held: Any) -> Any:
    """What a library keeps weakly may be gone, and its place empty or none."""
    return {key: value for key, value in held.items() if value is not None} if type(held) is dict else held


def _reduced(obj: Any, kind: type) -> list[Any]:
    reduced = reduced_by_itself(obj, 5)
    if isinstance(reduced, str):
        return [reduced]
    made_by, args, state, items, pairs = (*reduced, None, None, None, None)[:5]
    state = without_passing(kind, state) if isinstance(state, dict) else state
    if isinstance(state, dict) and hasattr(kind, "__setstate__") and is_installed(kind):
        state = {name: _filled(state[name]) for name in sorted(state, key=str)}
    found = [made_by, args, state]
    found += [None if part is None else list(part) for part in (items, pairs)]
    if isinstance(obj, BaseException):
        found += [obj.__cause__, obj.__suppress_context__]
    told = state[0] if isinstance(state, tuple) and len(state) == 2 else state
    own = getattr(obj, "__dict__", None)
    if isinstance(own, dict) and not (isinstance(told, dict) and told.keys() == own.keys()) and not is_installed(kind):
        found += [own]
    return found
