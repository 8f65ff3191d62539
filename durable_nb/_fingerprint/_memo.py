"""Functions that were asked about before: what they say holds as long as all that it follows from is the same.

`NODES` holds single functions, however they are reached; `KNOWN` whole calls of those that follow from code and constants only.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._modules import CODE
from ._owners import is_installed, is_installed_file
from ._source import read
from ._tokens import BULK_BYTES, SCALARS
from ._walk import MISSING, look_up

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._walk import Graph


@dataclass(frozen=True, slots=True)
class Node:
    """A function without closure and attributes, whose defaults are scalars: its own digest, and the names it reads."""

    fn: types.FunctionType
    code: types.CodeType
    defaults: tuple[Any, ...] | None
    digest: str
    names: tuple[tuple[str, Any], ...]
    """With what they stood for; MISSING for data, which are components of their own."""
    installed: tuple[tuple[Any, bytes], ...]
    links: tuple[tuple[str, Any], ...]
    """What it links to, in order: a name of data, or '' and a function, class or module."""

    def holds(self, graph: Graph, fn: types.FunctionType, namespace: Mapping[str, Any]) -> bool:
        return (
            self.fn is fn
            and fn.__code__ is self.code
            and fn.__defaults__ is self.defaults
            and not (fn.__kwdefaults__ or fn.__dict__)
            and all(
                (value is not MISSING and not isinstance(value, CODE)) if was is MISSING else value is was
                for name, was in self.names
                for value in (look_up(name, namespace),)
            )
            and all(graph.by_name(obj) == token for obj, token in self.installed)
        )


NODES: dict[int, Node] = {}
NODES_LIMIT = 50_000


def node_of(
    graph: Graph, fn: types.FunctionType, namespace: Mapping[str, Any], digest: str, links: tuple[tuple[str, Any], ...]
) -> Node | None:
    """What is to be remembered of a function that was walked just now; None where it follows from more than a node holds."""
    if fn.__closure__ or fn.__dict__ or fn.__kwdefaults__ or any(type(value) not in SCALARS for value in fn.__defaults__ or ()):
        return None
    reading = read(fn.__code__)
    if reading.imports or reading.looks:
        return None
    names: list[tuple[str, Any]] = []
    installed: list[tuple[Any, bytes]] = []
    for name in reading.executed:
        value = look_up(name, namespace)
        if isinstance(value, types.ModuleType) and not is_installed(value.__name__):
            return None  # its attributes may be other ones by then
        if value is MISSING or not isinstance(value, CODE):
            names.append((name, MISSING))
            if value is MISSING:
                return None
            continue
        names.append((name, value))
        token = graph.by_name(value)
        if token is not None:
            installed.append((value, token))
        elif isinstance(value, types.FunctionType) and (value.__closure__ or value.__dict__):
            return None
    return Node(fn, fn.__code__, fn.__defaults__, digest, tuple(names), tuple(installed), links)


@dataclass(frozen=True, slots=True)
class Known:
    """The components of a function, and all that they follow from. What could change without a trace here is not in them."""

    fn: types.FunctionType
    functions: tuple[tuple[types.FunctionType, types.CodeType, tuple[Any, ...] | None], ...]
    names: tuple[tuple[dict[str, Any], str, Any], ...]
    installed: tuple[tuple[Any, bytes], ...]
    components: dict[str, str]
    labels: dict[int, str]
    globals: dict[tuple[int, str], str]
    packages: set[str]
    said: dict[str, str]
    joined: bytes
    """The components as `digest_of` puts them together."""
    lasting: bool

    def holds(self, graph: Graph | None) -> bool:
        """Is all of it what it was? `graph` is needed only where something `installed` is among it."""
        for fn, code, defaults in self.functions:
            if fn.__code__ is not code or fn.__defaults__ is not defaults or fn.__kwdefaults__ or fn.__dict__:
                return False
        for namespace, name, value in self.names:
            if look_up(name, namespace) is not value:
                return False
        return all(graph is not None and graph.by_name(obj) == token for obj, token in self.installed)


KNOWN: dict[int, Known] = {}
KNOWN_LIMIT = 1000


def sources(graph: Graph, fn: Any) -> tuple[Any, Any, Any] | None:
    """What the components of `fn` follow from; None where that is more than code, constants and installed things."""
    functions: dict[int, Any] = {}
    names: list[tuple[dict[str, Any], str, Any]] = []
    installed: list[tuple[Any, bytes]] = []
    pending = [fn]
    while pending:
        found = pending.pop()
        if id(found) in functions:
            continue
        if type(found) is not types.FunctionType or found.__closure__ or found.__dict__ or found.__kwdefaults__:
            return None
        code, namespace = found.__code__, found.__globals__
        module = namespace.get("__name__")
        if is_installed_file(code.co_filename) or (code.co_filename.startswith("<") and module not in {None, "__main__"}):
            return None
        reading = read(code)
        if (
            graph.by_name(found) is not None
            or reading.imports
            or any(type(value) not in SCALARS for value in found.__defaults__ or ())
        ):
            return None
        functions[id(found)] = (found, code, found.__defaults__)
        names.append((namespace, "__name__", look_up("__name__", namespace)))
        for name in reading.names:
            value = look_up(name, namespace)
            names.append((namespace, name, value))
            if value is MISSING:
                continue
            if type(value) in SCALARS:
                if isinstance(value, str | bytes) and len(value) >= BULK_BYTES:  # not to be kept alive from here
                    return None
                continue
            if type(value) is types.FunctionType and not is_installed_file(value.__code__.co_filename):
                pending.append(value)
                continue
            simple = type(value) is not types.FunctionType or not (value.__closure__ or value.__dict__)
            token = graph.by_name(value) if isinstance(value, CODE) and simple else None
            if token is None:
                return None
            installed.append((value, token))
    return tuple(functions.values()), tuple(names), tuple(installed)
