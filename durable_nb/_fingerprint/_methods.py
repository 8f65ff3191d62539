"""What of its object's class the call of a bound method can reach: the methods beside it may be edited freely."""

from __future__ import annotations

import ast
import functools
import types
from typing import TYPE_CHECKING, Any

from ._plain import attributes_of_plain, is_plain
from ._reductions import static
from ._source import read
from ._trees import nodes
from ._walk import MISSING, named

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._walk import Walk


def bound(walk: Walk, method: types.MethodType) -> Iterator[Any] | None:
    """The children of a method that is called: its function, the members it uses, its object's attributes.

    None where it hands its object on, so that more of the class may be used than its code says.
    """
    owner, kind = method.__self__, type(method.__self__)
    simple = is_plain(kind) and all(static(kind, name) is getattr(object, name, MISSING) for name in _ACCESS)
    members = _members_used(method.__func__, kind) if simple else None
    return None if members is None else _children(walk, method.__func__, owner, members)


def _children(walk: Walk, fn: Any, owner: Any, members: dict[str, Any]) -> Iterator[Any]:
    walk.out += b"Xcalled;"
    yield fn
    yield from named(walk, members)
    if walk.seen(owner):
        return
    yield from named(walk, attributes_of_plain(owner))
    if id(owner) in walk.again:  # it leads back to itself: whoever holds it there may call anything
        yield type(owner)


def _members_used(fn: Any, kind: type) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    pending, seen = [fn], set()
    while pending:
        method = pending.pop()
        if id(method) in seen:
            continue
        seen.add(id(method))
        names = _attributes_of_self(read(method.__code__).node) if isinstance(method, types.FunctionType) else None
        if names is None or "__class__" in method.__code__.co_freevars:  # super()
            return None
        for name in names:
            member = static(kind, name)
            if member is MISSING:
                continue
            found[name] = member
            if isinstance(member, types.FunctionType):
                pending.append(member)
            elif isinstance(member, property):
                pending += [part for part in (member.fget, member.fset, member.fdel) if part is not None]
            elif isinstance(member, functools.cached_property):
                pending.append(member.func)
            elif hasattr(type(member), "__get__") and not isinstance(member, staticmethod | types.MemberDescriptorType):
                return None  # it is given the object, or its class
    return found


def _attributes_of_self(node: ast.AST | None) -> frozenset[str] | None:
    """The names by which a method uses its object, which are all it does with it; None if it does anything else."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    arguments = [*node.args.posonlyargs, *node.args.args]
    if not arguments:
        return None
    own, names, whole = arguments[0].arg, set(), 0
    for inner in nodes(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id == own:
            names.add(inner.attr)
            whole -= 1
        elif isinstance(inner, ast.Name) and inner.id == own:
            whole += 1
        elif isinstance(inner, ast.arg) and inner.arg == own and inner is not arguments[0]:
            return None
        if isinstance(inner, ast.Name) and inner.id in _LOOK_AT_VARIABLES:
            return None
    return None if whole or any(name.startswith("__") for name in names) else frozenset(names)


_ACCESS = ("__getattr__", "__getattribute__", "__setattr__", "__delattr__")
_LOOK_AT_VARIABLES = {"locals", "vars", "eval", "exec", "super", "__class__", "dir"}
