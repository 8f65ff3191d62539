"""One traversal of one component: what was met in it, what it links to, and its digest.

Mutable objects met again become back-references, numbered in visiting order; blake2b closes. The walk keeps its own stack:
nesting is limited by memory only.
"""

from __future__ import annotations

import builtins
import types
from hashlib import blake2b
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ._owners import public_module
from ._tokens import BULK_BYTES, DIGEST_BYTES, PERSON, SCALARS, plain_members, raw, text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    Enter = Callable[["Walk", Any], Iterator[Any] | None]

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
    def enter_method_called(self, walk: Walk, method: types.MethodType) -> Iterator[Any] | None: ...
    def reads_data(self, fn: Any) -> bool: ...
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


class Walk:
    """One traversal of one component. A memo maps ids of mutable objects to visit numbers; `keep` holds them alive."""

    __slots__ = (
        "_enter",
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

    def __init__(self, graph: Graph, label: str, enter: Enter) -> None:
        """`enter`: writes the header of anything but a scalar and hands back its children, or None where it has none."""
        self.graph = graph
        self._enter = enter
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
        out, scalars, enter, stack = self.out, SCALARS, self._enter, []
        while True:
            for obj in children:
                write = scalars.get(type(obj))
                if write is not None:
                    out += write(obj)
                    if len(out) > BULK_BYTES:
                        self._flush()
                    continue
                if len(out) > BULK_BYTES:
                    self._flush()
                inner = enter(self, obj)
                if inner is not None:
                    stack.append(children)
                    children = inner
                    break
            else:
                if not stack:
                    return
                children = stack.pop()

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


def pairs(walk: Walk, mapping: Mapping[Any, Any]) -> Iterator[Any]:
    items = tuple(mapping.items())
    walk.out += b"d%d:" % len(items)
    return chain.from_iterable(items)


def named(walk: Walk, attributes: Mapping[str, Any]) -> Iterator[Any]:
    """Children of a namespace whose order says nothing, sorted by name."""
    items = tuple(attributes.items())
    walk.out += b"a%d:" % len(items)
    ordered: list[tuple[str, Any]] = sorted(items, key=lambda item: item[0])
    return chain.from_iterable(ordered)
