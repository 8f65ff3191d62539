"""One canonical, typed byte stream per value: equal values give equal bytes in every process, unequal ones never do."""

from __future__ import annotations

import collections
import datetime as dt
import functools
import re
import sys
import types
import typing
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

from ._objects import HOLDS, OPAQUE_TYPES, SAID, added, configuration
from ._plain import WORTH_IT, layers
from ._reductions import reduced
from ._tokens import SCALARS, raw, text
from ._walk import Looks, Opaque, Walk, named, pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


# ---- handlers: write the header, hand back the children ----


def _list(walk: Walk, obj: list[Any]) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    if len(obj) >= WORTH_IT and len(walk.memos) == 1:
        return layers(walk, obj)
    items = tuple(obj)
    walk.out += b"l%d:" % len(items)
    return iter(items)


def _tuple(walk: Walk, obj: tuple[Any, ...]) -> Iterator[Any] | None:
    if len(obj) >= WORTH_IT and len(walk.memos) == 1:
        return layers(walk, obj)
    walk.out += b"t%d:" % len(obj)
    return iter(obj)


def _dict(walk: Walk, obj: dict[Any, Any]) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    return layers(walk, obj) if len(obj) >= WORTH_IT and len(walk.memos) == 1 else pairs(walk, obj)


def _set(walk: Walk, obj: set[Any]) -> Iterator[Any] | None:
    return None if walk.seen(obj) else walk.elements(b"e", obj)


def _frozenset(walk: Walk, obj: frozenset[Any]) -> Iterator[Any] | None:
    return walk.elements(b"E", obj)


def _bytearray(walk: Walk, obj: bytearray) -> Iterator[Any] | None:
    if not walk.seen(obj):
        walk.out += b"Y" + raw(bytes(obj))
    return None


def _memoryview(walk: Walk, obj: memoryview) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    walk.out += b"V"
    return iter((obj.format, obj.shape, obj.readonly, obj.tobytes()))


def _deque(walk: Walk, obj: collections.deque[Any]) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    items = tuple(obj)
    walk.out += b"Q%d:" % len(items)
    return chain((obj.maxlen,), items)


def _dict_like(tag: bytes) -> Callable[[Walk, Any], Iterator[Any] | None]:
    def enter(walk: Walk, obj: dict[Any, Any]) -> Iterator[Any] | None:
        if walk.seen(obj):
            return None
        walk.out += tag
        return chain((getattr(obj, "default_factory", None), vars(obj) or None), pairs(walk, obj))

    return enter


def _defaultdict(walk: Walk, obj: collections.defaultdict[Any, Any]) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    walk.out += b"XD"
    items = tuple(obj.items())
    walk.out += b"%d:" % len(items)
    return chain((obj.default_factory,), chain.from_iterable(items))


def _tagged(tag: bytes, *fields: str) -> Callable[[Walk, Any], Iterator[Any] | None]:
    """Handler of an immutable kind that consists of its attributes `fields`."""

    def enter(walk: Walk, obj: Any) -> Iterator[Any] | None:
        walk.out += b"X" + tag + b";"
        return iter([getattr(obj, field) for field in fields])

    return enter


def _time_zone(walk: Walk, obj: dt.timezone) -> Iterator[Any] | None:
    walk.out += b"z"
    return iter(obj.__reduce__()[1])


def _namespace(walk: Walk, obj: types.SimpleNamespace) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    walk.out += b"Xns;"
    return named(walk, vars(obj))


def _proxy(walk: Walk, obj: types.MappingProxyType[Any, Any]) -> Iterator[Any] | None:
    walk.out += b"Xmp;"
    return pairs(walk, obj)


def _view(tag: bytes) -> Callable[[Walk, Any], Iterator[Any] | None]:
    def enter(walk: Walk, obj: Any) -> Iterator[Any] | None:
        walk.out += b"X" + tag + b";"
        return iter((tuple(obj),))

    return enter


def _cell(walk: Walk, obj: types.CellType) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    try:
        content = obj.cell_contents
    except ValueError:
        walk.out += b"Xempty;"
        return None
    walk.out += b"Xcell;"
    return iter((content,))


def _code(walk: Walk, obj: types.CodeType) -> Iterator[Any] | None:
    """A code object without its file, lines and name; what remains depends on the Python minor version."""
    walk.out += b"Xcode;"
    counts = (obj.co_argcount, obj.co_posonlyargcount, obj.co_kwonlyargcount, obj.co_flags)
    return iter(
        (
            sys.version_info[:2],
            counts,
            obj.co_code,
            obj.co_exceptiontable,
            obj.co_names,
            obj.co_varnames,
            obj.co_freevars,
            obj.co_cellvars,
            _constants(obj),
        )
    )


def _constants(code: types.CodeType) -> tuple[Any, ...]:
    """Those that instructions load: from 3.14 `x in {"a", "b"}` leaves one of the two strings behind, by hash seed."""
    import dis

    loaded = {found.arg for found in dis.get_instructions(code) if found.opcode in dis.hasconst and found.arg is not None}
    return tuple(code.co_consts[number] for number in sorted(loaded))


def _method(walk: Walk, obj: types.MethodType) -> Iterator[Any] | None:
    token = walk.graph.by_name(obj)
    if token is not None:
        walk.out += token
        return None
    if walk.label == "call" and not walk.graph.looks and isinstance(obj.__func__, types.FunctionType):
        children = walk.graph.enter_method_called(walk, obj)
        if children is not None:
            return children
    walk.out += b"Xmethod;"
    return iter((obj.__func__, obj.__self__))


def _builtin(walk: Walk, obj: types.BuiltinFunctionType) -> Iterator[Any] | None:
    token = walk.graph.by_name(obj)
    if token is not None:
        walk.out += token
        return None
    owner = obj.__self__
    if owner is None or isinstance(owner, types.ModuleType):
        walk.out += b"Xbuiltin;" + text(obj.__module__ or "") + text(obj.__qualname__)
        return None
    walk.out += b"Xbound;" + text(obj.__qualname__)
    return iter((owner,))


def _descriptor(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.out += b"Xdescriptor;" + text(obj.__name__)
    return iter((obj.__objclass__,))


def _method_wrapper(walk: Walk, obj: types.MethodWrapperType) -> Iterator[Any] | None:
    walk.out += b"Xwrapper;" + text(obj.__name__)
    return iter((obj.__self__,))


def _partial(walk: Walk, obj: functools.partial[Any]) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    walk.out += b"Xpartial;"
    return chain((obj.func, obj.args), pairs(walk, obj.keywords), named(walk, vars(obj)))


def _cached(walk: Walk, obj: Any) -> Iterator[Any] | None:
    # what lru_cache remembers is no input: calling the function must not change its identity
    walk.out += b"Xlru;"
    if obj.cache_info().currsize and walk.graph.reads_data(obj.__wrapped__):
        # unless it remembers what the function gave when the variables that it reads held something else
        walk.opaque.add(Opaque(walk.label, "functools.lru_cache that is filled", configured=False))
    return iter((obj.__wrapped__,))


def _alias_type(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.out += b"Xgeneric;"
    return iter((obj.__origin__, obj.__args__))


def _union_type(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.out += b"Xunion;"
    return iter((obj.__args__,))


def _node(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.refer(obj)
    return None


def _function(walk: Walk, obj: types.FunctionType) -> Iterator[Any] | None:
    return walk.graph.enter_function(walk, obj)


def _type_variable(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.out += b"Xtypevar;"
    return iter((obj.__name__, obj.__bound__, obj.__constraints__, obj.__covariant__, obj.__contravariant__))


def _weak(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.by_type(obj)
    return None


_empty: dict[str, int] = {}
HANDLERS: dict[type, Callable[[Walk, Any], Iterator[Any] | None]] = {
    list: _list,
    tuple: _tuple,
    dict: _dict,
    set: _set,
    frozenset: _frozenset,
    bytearray: _bytearray,
    memoryview: _memoryview,
    slice: _tagged(b"slice", "start", "stop", "step"),
    dt.datetime: _tagged(b"datetime", "year", "month", "day", "hour", "minute", "second", "microsecond", "fold", "tzinfo"),
    dt.time: _tagged(b"time", "hour", "minute", "second", "microsecond", "fold", "tzinfo"),
    dt.timezone: _time_zone,
    collections.deque: _deque,
    collections.OrderedDict: _dict_like(b"XO"),
    collections.Counter: _dict_like(b"XC"),
    collections.defaultdict: _defaultdict,
    types.SimpleNamespace: _namespace,
    types.MappingProxyType: _proxy,
    type(_empty.keys()): _view(b"keys"),
    type(_empty.values()): _view(b"values"),
    type(_empty.items()): _view(b"items"),
    re.Match: _tagged(b"match", "re", "string", "pos", "endpos", "regs"),
    types.CellType: _cell,
    types.CodeType: _code,
    types.MethodType: _method,
    types.BuiltinFunctionType: _builtin,
    types.MethodDescriptorType: _descriptor,
    types.WrapperDescriptorType: _descriptor,
    types.ClassMethodDescriptorType: _descriptor,
    types.GetSetDescriptorType: _descriptor,
    types.MemberDescriptorType: _descriptor,
    types.MethodWrapperType: _method_wrapper,
    types.FunctionType: _function,
    types.ModuleType: _node,
    types.GenericAlias: _alias_type,
    types.UnionType: _union_type,
    typing.NewType: _tagged(b"newtype", "__name__", "__supertype__"),
    typing.TypeVar: _type_variable,
    type: _node,
    functools.partial: _partial,
    type(functools.lru_cache(len)): _cached,
    functools.cached_property: _tagged(b"cached", "func"),
    functools.partialmethod: _tagged(b"partialmethod", "func", "args", "keywords"),
    property: _tagged(b"property", "fget", "fset", "fdel"),
    staticmethod: _tagged(b"staticmethod", "__func__"),
    classmethod: _tagged(b"classmethod", "__func__"),
    types.GeneratorType: _weak,
    types.CoroutineType: _weak,
    types.AsyncGeneratorType: _weak,
    types.FrameType: _weak,
    types.TracebackType: _weak,
}


def enter(walk: Walk, obj: Any) -> Iterator[Any] | None:
    """Write the header of anything but a scalar; its children, or None where it has none."""
    handler = HANDLERS.get(type(obj))
    return handler(walk, obj) if handler is not None else _enter_other(walk, obj)


# ---- everything else: by what its type inherits from ----


def _enter_other(walk: Walk, obj: Any) -> Iterator[Any] | None:
    kind = type(obj)
    if kind in walk.plain:
        return reduced(walk, obj)
    if issubclass(kind, type) or issubclass(kind, types.ModuleType):
        walk.refer(obj)
        return None
    if kind.__module__ == "typing" and kind.__qualname__ == "_UnionGenericAlias":  # Python 3.14 made it types.UnionType
        return _union_type(walk, obj)
    lineage = [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]
    for name in lineage:
        if name == "enum.Enum":
            walk.out += b"Xenum;"
            walk.refer(kind)
            return iter((obj._name_, obj._value_))
        if name in _LASTING:
            return _by_parts(walk, obj, _LASTING[name](obj))
        if name == "zoneinfo.ZoneInfo" and obj.key is not None:
            walk.out += b"Z" + text(obj.key)
            return None
        holds = HOLDS.get(name)
        if holds is not None:
            return _parts_held(walk, obj, name, holds)
        asked = configuration(name)
        if asked is not None or name in OPAQUE_TYPES:
            return _outer(walk, obj, asked)
        root = name.partition(".")[0]
        if root in {"numpy", "pandas", "pyarrow"}:
            from . import _arrays

            walk.graph.met(root)
            handler = _arrays.handler(name, obj)
            if handler is not None:
                return handler(walk, obj)
    token = walk.graph.by_name(obj)
    if token is not None:
        walk.out += token
        return None
    if isinstance(obj, types.BuiltinFunctionType):  # such as `re.compile("x").sub`, whose type is another one
        return _builtin(walk, obj)
    if not callable(obj):
        walk.plain.add(kind)
    return reduced(walk, obj)


def _callbacks(obj: Any) -> list[Any]:
    """Of the registry that every figure, axes and norm of matplotlib has: its state counts how often it was asked for."""
    kept = obj._pickled_cids
    found = [(name, [way() for cid, way in ways.items() if cid in kept]) for name, ways in obj.callbacks.items()]
    return [(name, functions) for name, functions in found if functions]


def _kd_tree(obj: Any) -> list[Any]:
    """Of scipy's, whose state holds addresses."""
    return [obj.data, obj.leafsize, obj.indices, obj.boxsize, getattr(obj, "__dict__", {})]


_LASTING: dict[str, Callable[[Any], list[Any]]] = {
    "matplotlib.cbook.CallbackRegistry": _callbacks,
    "scipy.spatial._ckdtree.cKDTree": _kd_tree,
}


def lasting_parts(obj: Any) -> list[Any] | None:
    """What an object is, where its state holds more than that; None for most."""
    for base in type(obj).__mro__:
        ask = _LASTING.get(f"{base.__module__}.{base.__qualname__}")
        if ask is not None:
            return ask(obj)
    return None


def _by_parts(walk: Walk, obj: Any, parts: list[Any]) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    walk.out += b"Xparts;"
    walk.refer(type(obj))
    walk.keep.append(parts)
    return iter(parts)


def _parts_held(walk: Walk, obj: Any, name: str, holds: Callable[[Any], Any]) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    found: tuple[Any, ...] | None = None
    with suppress(Exception):
        found = holds(obj)
    if found is None:
        walk.by_type(obj)
        return None
    walk.out += b"Xholds;" + text(name)
    walk.keep.append(found)
    return iter(found)


def _outer(walk: Walk, obj: Any, asked: Callable[[Any], Any] | None) -> Iterator[Any] | None:
    """Something of the outer world, by its type and configuration, and by what a user's class adds to it."""
    if walk.seen(obj):
        return None
    found, unknown = None, asked is None
    if asked is not None:
        try:
            found = asked(obj)
        except Exception:  # a closed connection, a file without a name
            unknown = True
    walk.by_type(obj, configured=not unknown)
    own = {} if asked in SAID or walk.graph.by_name(type(obj)) is not None else added(obj)
    walk.keep.append((found, own))
    return _configured(walk, obj, found, own)


def _configured(walk: Walk, obj: Any, found: Any, own: Mapping[str, Any]) -> Iterator[Any]:
    yield found
    if walk.graph.by_name(type(obj)) is None:
        walk.refer(type(obj))
        yield from named(walk, own)


# ---- constants ----


class _Alone:
    """The graph of a value that holds no code, such as a constant in source."""

    whole = False
    looks: Looks = frozenset()

    def __init__(self) -> None:
        self.namespaces: dict[str, Mapping[str, Any]] = {}

    def met(self, module: str) -> None:
        del module

    def node(self, obj: Any) -> str:
        raise TypeError(f"a constant holds {type(obj).__name__}")

    def outline(self, obj: Any) -> bytes:
        return self.node(obj).encode()

    def enter_function(self, walk: Walk, fn: types.FunctionType) -> Iterator[Any] | None:
        walk.refer(fn)
        return None

    def enter_method_called(self, walk: Walk, method: types.MethodType) -> Iterator[Any] | None:
        del walk, method
        return None

    def reads_data(self, fn: Any) -> bool:
        del fn
        return False

    def by_name(self, obj: Any) -> bytes | None:
        del obj
        return None

    def value_of(self, walk: Walk, name: str, namespace: Mapping[str, Any], value: Any) -> None:
        del walk, name, namespace
        self.node(value)

    def static(self, label: str, children: Callable[[Walk], Iterator[Any]]) -> None:
        del children
        raise TypeError(f"a constant needs {label}")

    def alone(self, value: Any) -> str:
        return constant(value).hex()


def constant(value: Any) -> bytes:
    """The canonical bytes of a constant in source, or the digest of one that isn't scalar (a code object, a tuple)."""
    write = SCALARS.get(type(value))
    return write(value) if write is not None else b"K" + Walk(_Alone(), "constant", enter).digest(iter((value,)))
