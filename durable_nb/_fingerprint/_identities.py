"""Whole identities: of calls and of values."""

from __future__ import annotations

import ast
import dis
import functools
import sys
import types
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from . import _memo
from ._formats import EARLIER, in_earlier_formats, in_format
from ._graph import TOOLS, Fingerprint, Fingerprinter, Places, joined
from ._objects import configure
from ._owners import version
from ._source import read
from ._tokens import DIGEST_BYTES, PERSON, SCALARS
from ._walk import Unhashable, Walk

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def object_of(label: str) -> Any:
    """What a component "global NAME" or "function NAME" stands for now; None where it can't be told."""
    where, _, name = label.partition(" ")[2].rpartition(".")
    module = sys.modules.get(where or "__main__")
    return getattr(module, name, None)


def source_of(function: types.FunctionType) -> ast.AST:
    """A function's definition; an empty module where no source is known to be its own."""
    return read(function.__code__).node or ast.Module([], [])


@functools.lru_cache(maxsize=4096)
def globals_stored(code: types.CodeType) -> frozenset[str]:
    """Names that a function's code binds in its module (`global x; x = ...`), nested code included."""
    found = frozenset(i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"))
    nested = (globals_stored(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return found.union(*nested)


def _of_known(fn: Any, args: tuple[Any, ...]) -> Fingerprint | None:
    """What `of_call` gives, where the function is as it was met before and its arguments are data: only these are walked."""
    known = _memo.KNOWN.get(id(fn))
    if known is None or known.fn is not fn or type(fn) is not types.FunctionType:
        return None
    given: dict[str, str] = {}
    walks: list[Walk] = []
    graph = None
    for label, value in zip(_labels_of(fn.__code__, len(args)), args, strict=True):
        write = SCALARS.get(type(value))
        if write is not None:
            given[label] = blake2b(write(value), digest_size=DIGEST_BYTES, person=PERSON).hexdigest()
        elif type(value) in _CONTAINERS and label not in TOOLS:
            graph = graph or Fingerprinter(memory=False)
            walk = graph.walked(label, value)
            if walk is None or any(walk.memos[0].keys() & other.memos[0].keys() for other in walks):
                return None
            given[label] = walk.sinks[0].hexdigest()
            walks.append(walk)
        else:
            return None
    if len(given) != len(args) or not known.holds(Fingerprinter(memory=False) if known.installed else None):
        return None
    digest = blake2b(known.joined + joined(given), digest_size=DIGEST_BYTES, person=PERSON).hexdigest()  # a call comes first
    components = given | known.said
    versions = {name: found for name in sorted(known.packages) if (found := version(name))} if known.packages else {}
    if not any(walk.memos[0] for walk in walks):
        return Fingerprint(digest, components, (), versions, known.lasting, dict)
    return Fingerprint(digest, components, (), versions, False, lambda: Places(tuple(walks)))


_CONTAINERS = frozenset({list, dict, tuple})


@functools.lru_cache(maxsize=4096)
def _labels_of(code: types.CodeType, count: int) -> tuple[str, ...]:
    """What the components of so many positional arguments are called."""
    named = range(code.co_posonlyargcount, code.co_argcount)
    return tuple(f"arg {code.co_varnames[number] if number in named else number}" for number in range(count))


_VARIABLE_KEYWORDS = 0x08


def of_call(fn: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Fingerprint:
    """The identity of a call: the code of `fn`, followed transitively, and its arguments by parameter name."""
    found = _of_call(fn, args, kwargs)
    if not EARLIER:
        return found
    return replace(found, earlier=lambda: in_earlier_formats(lambda fingerprinter: fingerprinter.of_call(fn, args, kwargs)))


def _of_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Fingerprint:
    if not kwargs and (quick := _of_known(fn, args)) is not None:
        return quick
    found = Fingerprinter(memory=False)
    keywords = kwargs or {}
    found.add_function("call", fn)
    code = getattr(fn, "__code__", None)
    offset = 0
    if isinstance(fn, types.MethodType):
        code, offset = getattr(fn.__func__, "__code__", None), 1
    names: tuple[str, ...] = ()
    if isinstance(code, types.CodeType):
        names = code.co_varnames[offset : code.co_argcount]
        first_named = max(code.co_posonlyargcount - offset, 0)
    else:
        first_named = 0
    for number, value in enumerate(args):
        label = names[number] if first_named <= number < len(names) else str(number)
        found.add_value(f"arg {label}", value)
    for name, value in keywords.items():
        found.add_value(f"arg {name}" if name.isidentifier() else f"arg {name!r}", value)
    if len(keywords) > 1 and not (isinstance(code, types.CodeType) and not code.co_flags & _VARIABLE_KEYWORDS):
        known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if isinstance(code, types.CodeType) else ()
        order = tuple(name for name in keywords if name not in known)
        if len(order) > 1:
            found.add_value("keyword order", order)
    return found.result()


def of_value(value: Any) -> Fingerprint:
    """The identity of one value; its content is component "value", code that it holds has components of its own."""
    found = Fingerprinter(memory=False)
    found.add_value("value", value)
    if not EARLIER:
        return found.result()
    return replace(found.result(), earlier=lambda: in_earlier_formats(lambda fingerprinter: fingerprinter.of_value(value)))


def identify(type: type, fn: Callable[[Any], Any], /) -> None:  # noqa: A002  the word users say
    """Say how objects of `type`, and of its subclasses, count as inputs: by what `fn(obj)` gives, and by nothing else.

    For connections, clients and the like, whose state says nothing: `identify(Client, lambda c: (c.url, c.model))`. Plain
    data, which becomes a digest; leave passwords out all the same. Where `fn` raises, or gives something that is opaque
    itself, the object counts as unknown, and a cell that reads it runs. For this process; say it once, before the cells.
    """
    if not isinstance(type, _TYPE):
        raise TypeError(f"durable.identify({type!r}, ...): give a class, such as type(client)")
    if not callable(fn):
        raise TypeError(f"durable.identify({type.__name__}, {fn!r}): give a function of the object that returns plain data")

    def configuration(obj: Any) -> str:
        found = of_value(fn(obj))
        unknown = [opaque.type_name for opaque in found.opaque if not opaque.configured]
        if unknown:
            raise Unhashable(type.__name__, f"identify gives a {unknown[0]}")
        return found.digest

    configure(type, configuration)
    for number in EARLIER:
        in_format(number).identify(type, fn)


_TYPE = type


def hash_value(value: Any) -> str:
    """The digest of `of_value`, without asking for package versions."""
    found = Fingerprinter(memory=False)
    found.add_value("value", value)
    found._packages.clear()
    return found.result().digest
