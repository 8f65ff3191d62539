"""One canonical, typed byte stream per value: equal values give equal bytes in every process, unequal ones never do.

A token starts with a tag and says how long it is, so no two sequences of tokens run together. Mutable objects met again
become back-references, numbered in visiting order. Large buffers enter by their xxh3_128, everything else as it is, and
blake2b closes. The walk keeps its own stack: nesting is limited by memory only.
"""

from __future__ import annotations

import builtins
import collections
import copyreg
import datetime as dt
import decimal
import fractions
import functools
import pathlib
import re
import struct
import sys
import types
import typing
import uuid
import warnings
from contextlib import suppress
from hashlib import blake2b
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from xxhash import xxh3_128_digest

from durable_nb._reducers import attributes_of, reduced_by_itself

from ._objects import CONFIGURED, HOLDS, OPAQUE_TYPES, SAID, added, configuration
from ._owners import public_module
from ._plain import WORTH_IT, layers, plain_members

if TYPE_CHECKING:
    import enum
    from collections.abc import Callable, Iterable, Iterator, Mapping

FORMAT = 1
PERSON = b"durable-nb %d" % FORMAT
DIGEST_BYTES = 16
BULK_BYTES = 1 << 16
MISSING = object()


class Unhashable(Exception):  # noqa: N818  it names what the value is, as the caller shows it
    """A value that could not be read to its end: it changed meanwhile, or its own code failed."""

    def __init__(self, label: str, reason: str) -> None:
        super().__init__(label, reason)
        self.label = label
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.label}: {self.reason}"


class Opaque(NamedTuple):
    """A value inside the component `label` that is known by its type only, or also by its `configured` address."""

    label: str
    type_name: str
    configured: bool

    def __str__(self) -> str:
        return f"{self.label} ({self.type_name})"


Looks = frozenset[str]
DOCSTRINGS, ANNOTATIONS, NAMES, MODULES, SOURCE = "docstrings", "annotations", "names", "modules", "source"


class Graph(Protocol):
    """What a walk asks about code: functions, classes and modules are nodes of their own, linked to by label."""

    whole: bool
    """Attributes that an object keeps out of its pickle count as well; a value that went through pickle has lost them."""
    looks: Looks
    """What some code looks at, and what counts therefore, though it changes nothing that is executed."""

    namespaces: dict[str, Mapping[str, Any]]
    """The globals of modules that were met, by the modules' names: those of a notebook aren't always in sys.modules."""

    def met(self, module: str) -> None: ...
    def node(self, obj: Any) -> str: ...
    def outline(self, obj: Any) -> bytes: ...
    def enter_function(self, walk: Walk, fn: types.FunctionType) -> Iterator[Any] | None: ...
    def by_name(self, obj: Any) -> bytes | None: ...
    def value_of(self, walk: Walk, name: str, namespace: Mapping[str, Any], value: Any) -> None: ...
    def static(self, label: str, children: Callable[[Walk], Iterator[Any]]) -> None: ...
    def alone(self, value: Any) -> str: ...


def look_up(name: str, namespace: Mapping[str, Any]) -> Any:
    """What a global name stands for, builtins included, or MISSING."""
    value = namespace.get(name, MISSING)
    if value is not MISSING:
        # IPython puts an `open` of its own into the notebook's names: what calls it may be moved into a module
        return builtins.open if name == "open" and getattr(value, "__wrapped__", None) is builtins.open else value
    found = namespace.get("__builtins__", builtins)
    return (found if isinstance(found, dict) else vars(found)).get(name, MISSING)


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    if len(data) >= BULK_BYTES:
        return b"S%d:%b" % (len(data), xxh3_128_digest(data))
    return b"s%d:%b" % (len(data), data)


def raw(value: bytes) -> bytes:
    if len(value) >= BULK_BYTES:
        return b"B%d:%b" % (len(value), xxh3_128_digest(value))
    return b"b%d:%b" % (len(value), value)


def integer(value: int) -> bytes:
    if -(1 << 63) <= value < 1 << 63:
        return b"i%d;" % value
    size = value.bit_length() // 8 + 1
    data = value.to_bytes(size, "little", signed=True)
    if size >= BULK_BYTES:
        return b"J%d:%b" % (size, xxh3_128_digest(data))
    return b"I%d:%b" % (size, data)


_pack = struct.Struct("<d").pack


def real(value: float) -> bytes:
    return b"f" + _pack(value) if value == value else b"q"  # noqa: PLR0124  every NaN is the same NaN


def _imaginary(value: complex) -> bytes:
    return b"c" + real(value.real) + real(value.imag)


def _decimal(value: decimal.Decimal) -> bytes:
    sign, digits, exponent = value.as_tuple()
    return b"D" + integer(sign) + text("".join(map(str, digits))) + text(str(exponent))


def _path(value: pathlib.PurePath) -> bytes:
    return b"P" + text(type(value).__name__) + text(str(value))


def _pattern(value: re.Pattern[Any]) -> bytes:
    source = value.pattern
    return b"R" + (text(source) if isinstance(source, str) else raw(source)) + integer(value.flags)


def _range(value: range) -> bytes:
    return b"g" + integer(value.start) + integer(value.stop) + integer(value.step)


def _timedelta(value: dt.timedelta) -> bytes:
    return b"m" + integer(value.days) + integer(value.seconds) + integer(value.microseconds)


SCALARS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"N",
    bool: lambda value: b"T" if value else b"F",
    int: integer,
    float: real,
    complex: _imaginary,
    str: text,
    bytes: raw,
    type(Ellipsis): lambda _: b".",
    type(NotImplemented): lambda _: b"!",
    range: _range,
    decimal.Decimal: _decimal,
    fractions.Fraction: lambda value: b"/" + integer(value.numerator) + integer(value.denominator),
    uuid.UUID: lambda value: b"U" + raw(value.bytes),
    dt.date: lambda value: b"y" + text(value.isoformat()),
    dt.timedelta: _timedelta,
    pathlib.PosixPath: _path,
    pathlib.PurePosixPath: _path,
    pathlib.WindowsPath: _path,
    pathlib.PureWindowsPath: _path,
    re.Pattern: _pattern,
}


class Walk:
    """One traversal of one component. A memo maps ids of mutable objects to visit numbers; `keep` holds them alive."""

    __slots__ = (
        "again",
        "arrays",
        "deferred",
        "edges",
        "graph",
        "keep",
        "label",
        "later",
        "layered",
        "lenient",
        "memos",
        "opaque",
        "out",
        "own",
        "plain",
        "sinks",
    )

    def __init__(self, graph: Graph, label: str) -> None:
        self.graph = graph
        self.label = label
        self.out = bytearray()
        self.edges: list[str] = []  # labels of the components that it refers to, in order; no label is in its digest
        self.sinks = [blake2b(digest_size=DIGEST_BYTES, person=PERSON)]
        self.memos: list[dict[int, int]] = [{}]
        self.again: set[int] = set()  # ids of mutable objects that were met more than once
        self.keep: list[Any] = []
        self.arrays: list[tuple[int, Any]] = []
        self.opaque: set[Opaque] = set()
        self.deferred: list[list[Any]] = []
        self.plain: set[type] = set()  # types met whose instances are known by reduction
        self.layered: dict[type, int] = {}  # types met, and how `_plain` writes their instances
        self.own: dict[type, bool] = {}  # types met, and whether the user defined them
        self.later: dict[type, dict[str, Any]] = {}  # by type met, what only some Pythons keep in its instances
        self.lenient = 0  # levels of attributes among which an opaque value is none to tell of

    def digest(self, roots: Iterator[Any]) -> bytes:
        """Walk everything that `roots` yields, in order; whatever goes wrong on the way is an `Unhashable`."""
        try:
            self._run(roots)
        except Unhashable:
            raise
        except Exception as error:
            raise Unhashable(self.label, f"{type(error).__name__}: {error}") from error
        self._flush()
        return self.sinks[0].digest()

    def _flush(self) -> None:
        self.sinks[-1].update(self.out)
        self.out.clear()

    def _run(self, children: Iterator[Any]) -> None:
        out, scalars, stack = self.out, SCALARS, []
        while True:
            for obj in children:
                write = scalars.get(type(obj))
                if write is not None:
                    out += write(obj)
                    if len(out) > BULK_BYTES:
                        self._flush()
                    continue
                inner = self._enter(obj)
                if inner is not None:
                    stack.append(children)
                    children = inner
                    break
            else:
                if not stack:
                    return
                children = stack.pop()

    def _enter(self, obj: Any) -> Iterator[Any] | None:
        if len(self.out) > BULK_BYTES:
            self._flush()
        handler = HANDLERS.get(type(obj))
        if handler is not None:
            return handler(self, obj)
        return _enter_other(self, obj)

    def seen(self, obj: Any) -> bool:
        """Whether `obj`, a mutable object, was visited: then a back-reference is written, else it gets a number."""
        key = id(obj)
        memos = self.memos
        for up in range(len(memos)):
            number = memos[-1 - up].get(key)
            if number is not None:
                self.out += b"r%d.%d;" % (up, number)
                self.again.add(key)
                return True
        memos[-1][key] = len(memos[-1])
        self.keep.append(obj)
        return False

    def refer(self, obj: Any) -> None:
        """Write a function, class or module: by label, or in a set by outline, as a set has no order to label by."""
        if self.deferred:
            self.out += self.graph.outline(obj)
            self.deferred[-1].append(obj)
            return
        token = self.graph.by_name(obj)
        if token is not None:
            self.out += token
        else:
            self.link(self.graph.node(obj))

    def link(self, label: str) -> None:
        """Write that the component `label` comes here: which one it is shows in the order of links only."""
        self.out += b"L"
        self.edges.append(label)

    def by_type(self, obj: Any, *, configured: bool = False) -> None:
        """Write the type of something that is not known by content. `configured`: all that counts of it follows."""
        kind = type(obj)
        if not self.lenient:
            self.opaque.add(Opaque(self.label, f"{kind.__module__}.{kind.__qualname__}", configured))
        if self.graph.by_name(kind) is None:
            self.out += b"?own" + text(kind.__name__)
        else:
            self.out += b"?" + text(f"{public_module(kind)}.{kind.__qualname__}")

    def is_own(self, kind: type) -> bool:
        """Whether the user defined `kind`, and all that its instances hold counts."""
        known = self.own.get(kind)
        if known is None:
            known = self.own[kind] = self.graph.whole and self.graph.by_name(kind) is None
        return known

    def is_known_by_reduction(self, kind: type) -> bool:
        """Whether instances of a class that reduces as object does are no special case of this module's."""
        lineage = {f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__}
        if not lineage.isdisjoint(HOLDS.keys() | CONFIGURED.keys() | OPAQUE_TYPES | _LATER.keys()) or {
            "numpy",
            "pandas",
            "pyarrow",
        } & {name.partition(".")[0] for name in lineage}:
            return False
        return not any(type(found) is functools.cached_property for base in kind.__mro__ for found in vars(base).values())

    def elements(self, tag: bytes, members: Iterable[Any]) -> Iterator[Any]:
        """Write an unordered collection: each element to a digest of its own, sorted; then what elements share."""
        members = tuple(members)
        plain = plain_members(members)
        if plain is not None:
            self.out += b"%b%d=%b" % (tag, len(members), raw(plain))
            return
        found: list[tuple[bytes, dict[int, int], list[Any]]] = []
        for member in members:
            write = SCALARS.get(type(member))
            if write is not None:
                found.append((blake2b(write(member), digest_size=DIGEST_BYTES, person=PERSON).digest(), {}, []))
                continue
            self._flush()
            self.sinks.append(blake2b(digest_size=DIGEST_BYTES, person=PERSON))
            self.memos.append({})
            self.deferred.append([])
            yield member
            self._flush()
            found.append((self.sinks.pop().digest(), self.memos.pop(), self.deferred.pop()))
        found.sort(key=lambda entry: entry[0])
        self.out += b"%b%d:" % (tag, len(found))
        memo = self.memos[-1]
        shared: list[bytes] = []
        for position, (digest, inner, _) in enumerate(found):
            self.out += digest
            for key, number in inner.items():
                if key in memo:
                    shared.append(b"%d.%d=%d;" % (position, number, memo[key]))
                else:
                    memo[key] = len(memo)
        self.out += raw(b"".join(shared))
        for _, _, nodes in found:
            for node in nodes:
                self.refer(node)


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
    return write(value) if write is not None else b"K" + Walk(_Alone(), "constant").digest(iter((value,)))


# ---- handlers: write the header, hand back the children ----


def _list(walk: Walk, obj: list[Any]) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    if len(obj) >= WORTH_IT and len(walk.memos) == 1:
        return layers(walk, obj, raw, SCALARS)
    items = tuple(obj)
    walk.out += b"l%d:" % len(items)
    return iter(items)


def _tuple(walk: Walk, obj: tuple[Any, ...]) -> Iterator[Any] | None:
    if len(obj) >= WORTH_IT and len(walk.memos) == 1:
        return layers(walk, obj, raw, SCALARS)
    walk.out += b"t%d:" % len(obj)
    return iter(obj)


def pairs(walk: Walk, mapping: Mapping[Any, Any]) -> Iterator[Any]:
    items = tuple(mapping.items())
    walk.out += b"d%d:" % len(items)
    return chain.from_iterable(items)


def _dict(walk: Walk, obj: dict[Any, Any]) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    return layers(walk, obj, raw, SCALARS) if len(obj) >= WORTH_IT and len(walk.memos) == 1 else pairs(walk, obj)


def _set(walk: Walk, obj: set[Any]) -> Iterator[Any] | None:
    return None if walk.seen(obj) else walk.elements(b"e", obj)


def _frozenset(walk: Walk, obj: frozenset[Any]) -> Iterator[Any] | None:
    return walk.elements(b"E", obj)


def named(walk: Walk, attributes: Mapping[str, Any]) -> Iterator[Any]:
    """Children of a namespace whose order says nothing, sorted by name."""
    items = tuple(attributes.items())
    walk.out += b"a%d:" % len(items)
    ordered: list[tuple[str, Any]] = sorted(items, key=lambda item: item[0])
    return chain.from_iterable(ordered)


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
        from ._methods import bound

        children = bound(walk, obj)
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
    if obj.cache_info().currsize and _reads_data(obj.__wrapped__):
        # unless it remembers what the function gave when the variables that it reads held something else
        walk.opaque.add(Opaque(walk.label, "functools.lru_cache that is filled", configured=False))
    return iter((obj.__wrapped__,))


def _reads_data(fn: Any) -> bool:
    if not isinstance(fn, types.FunctionType):
        return False
    from ._source import read

    held = (look_up(name, fn.__globals__) for name in read(fn.__code__).executed)
    code = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
    return any(value is not MISSING and not isinstance(value, code) for value in held)


def _alias_type(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.out += b"Xgeneric;"
    return iter((obj.__origin__, obj.__args__))


def _union_type(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.out += b"Xunion;"
    return iter((obj.__args__,))


def _is_union(kind: type) -> bool:
    """typing's own, before Python 3.14 made the two one."""
    return kind.__module__ == "typing" and kind.__qualname__ == "_UnionGenericAlias"


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


# ---- everything else: by what its type inherits from ----


def _enter_other(walk: Walk, obj: Any) -> Iterator[Any] | None:
    kind = type(obj)
    if kind in walk.plain:
        return _reduced(walk, obj)
    if issubclass(kind, type) or issubclass(kind, types.ModuleType):
        walk.refer(obj)
        return None
    if _is_union(kind):
        return _union_type(walk, obj)
    lineage = [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]
    for name in lineage:
        if name == "enum.Enum":
            return _member(walk, obj)
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
    return _reduced(walk, obj)


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
    return _told(walk, obj, found, own)


def _told(walk: Walk, obj: Any, found: Any, own: Mapping[str, Any]) -> Iterator[Any]:
    yield found
    if walk.graph.by_name(type(obj)) is None:
        walk.refer(type(obj))
        yield from named(walk, own)


def _member(walk: Walk, obj: enum.Enum) -> Iterator[Any] | None:
    walk.out += b"Xenum;"
    walk.refer(type(obj))
    return iter((obj._name_, obj._value_))


_IMMUTABLE_NAMES = {"Period", "Interval"}


def _is_plain_immutable(obj: Any, kind: type) -> bool:
    """Whether the identity of `obj` can't matter: a namedtuple, a plain str subclass, a pandas Period."""
    if isinstance(obj, tuple | str | int | float | complex | bytes | dt.date | dt.time | dt.tzinfo):
        return not getattr(obj, "__dict__", None)
    return kind.__module__.partition(".")[0] == "pandas" and kind.__name__ in _IMMUTABLE_NAMES


def _reduced(walk: Walk, obj: Any) -> Iterator[Any] | None:
    """An instance by its type and what its own reduction says; where that fails or is nonsense, by type alone."""
    kind = type(obj)
    if not _is_plain_immutable(obj, kind) and walk.seen(obj):
        return None
    if isinstance(obj, set | frozenset):
        walk.out += b"Xset;"
        walk.refer(kind)
        base: Any = set if isinstance(obj, set) else frozenset
        return chain(walk.elements(b"e", base.__iter__(obj)), named(walk, _attributes(walk, obj, getattr(obj, "__dict__", {}))))
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
            state = {**state, "__dict__": _attributes(walk, obj, state["__dict__"])}
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
            yield from named(walk, _attributes(walk, obj, half or {}))  # no attributes yet, or none but cached ones: the same
        else:
            yield half


def _attributes(walk: Walk, obj: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """`found` without what functools.cached_property left there: having been looked at is no part of a value."""
    kind = type(obj)
    own = walk.is_own(kind)
    return {
        name: value
        for name, value in _without_passing(walk, kind, found).items()
        if own or type(_static(kind, name)) is not functools.cached_property
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


def _static(kind: type, name: str) -> Any:
    for base in kind.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return None
