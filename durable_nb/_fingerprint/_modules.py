"""What a module of the project says: what is read of it, all that it holds, or, before it is loaded, its file."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import types
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ._owners import is_installed, source_file
from ._source import imported, normalise, read
from ._tokens import raw, text
from ._walk import DOCSTRINGS, MISSING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ._walk import Walk

CODE = (types.FunctionType, type, types.ModuleType, types.BuiltinFunctionType)
"""Kinds that are followed where they are met, while other values are components of their own."""


def attributes_of(walk: Walk, module: types.ModuleType, uses: Iterable[tuple[str, ...]]) -> Iterator[Any]:
    """The attributes of a module that are read, each a component; of an installed one its name says enough."""
    for path in sorted(uses):
        walk.out += text(".".join(path))
        yield from _attribute(walk, module, path)
    walk.out += b"end"


def _attribute(walk: Walk, module: types.ModuleType, path: tuple[str, ...]) -> Iterator[Any]:
    owner = module
    for step, part in enumerate(path):
        token = walk.graph.by_name(owner)
        if token is not None:
            walk.out += token + text(".".join(path[step:]))
            return
        value = vars(owner).get(part, MISSING)
        if isinstance(value, types.ModuleType):
            owner = value
            continue
        if value is MISSING:
            walk.out += b"undefined"
            if "__getattr__" in vars(owner):
                yield owner
        elif isinstance(value, CODE):
            yield value
        else:
            walk.graph.value_of(walk, part, vars(owner), value)
        return
    yield owner


def reached(module: types.ModuleType, path: tuple[str, ...]) -> tuple[Any, int]:
    """What of the project a path leads to, and how much of the path does; MISSING where it is something installed."""
    owner = module
    for length, part in enumerate(path):
        if is_installed(owner.__name__):
            return MISSING, 0
        value = vars(owner).get(part, MISSING)
        if not isinstance(value, types.ModuleType):
            return value, length + 1
        owner = value
    return owner, len(path)


def module_of(walk: Walk, module: types.ModuleType) -> Iterator[Any]:
    """A project's module used as a whole: all that it holds now."""
    walk.out += b"M"
    for name, value in sorted(vars(module).items()):
        if name.startswith("__") and name.endswith("__") and name not in {"__getattr__", "__all__", "__version__"}:
            continue
        walk.out += text(name)
        yield value
    walk.out += b"end"


def imports_of(walk: Walk, names: Iterable[tuple[int, str]], namespace: Mapping[str, Any] | None) -> None:
    """Modules that code imports when it runs: by source, as they may not be loaded yet; installed ones are noted as met."""
    for level, name in names:
        absolute = name
        if level:
            package = str((namespace or {}).get("__package__") or "")
            try:
                absolute = importlib.util.resolve_name("." * level + name, package)
            except (ImportError, ValueError):
                continue
        if is_installed(absolute):
            walk.graph.met(absolute)
        elif source_file(absolute) is not None:
            label = f"import {absolute}"
            walk.graph.static(label, partial(_import, name=absolute))
            walk.link(label)


def _import(walk: Walk, name: str) -> Iterator[Any]:
    filename = source_file(name)
    with open(str(filename), "rb") as file:  # noqa: PTH123
        source = file.read()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        walk.out += raw(source)
        return
    walk.out += raw(normalise(tree, docstrings=DOCSTRINGS in walk.graph.looks))
    package = name if os.path.basename(str(filename)) == "__init__.py" else name.rpartition(".")[0]  # noqa: PTH119
    imports_of(walk, sorted(imported(tree)), {"__package__": package})
    loaded = sys.modules.get(name)
    if loaded is not None:
        yield from _changed_since_import(walk, loaded, tree)


_AS_IMPORTED: WeakKeyDictionary[types.ModuleType, dict[str, str]] = WeakKeyDictionary()


def remember_import(module: types.ModuleType, digests: dict[str, str]) -> None:
    """The import of a module has ended: `digests` are of what `data_in` gives then."""
    _AS_IMPORTED[module] = digests


def data_in(module: types.ModuleType) -> dict[str, Any]:
    """What a module of the project holds besides code, by name; of a class that it defines, what that holds besides methods."""
    found: dict[str, Any] = {}
    for name, value in list(vars(module).items()):
        if name.startswith("__") or isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.ModuleType):
            continue
        if not isinstance(value, type):
            found[name] = value
        elif value.__module__ == module.__name__:
            named = {k: v for k, v in vars(value).items() if not k.startswith("__") and not isinstance(v, (*CODE, *_METHODS))}
            found[name] = {k: v for k, v in named.items() if not hasattr(v, "__get__")}
    return found


_METHODS = (property, staticmethod, classmethod)


def _changed_since_import(walk: Walk, module: types.ModuleType, tree: ast.Module) -> Iterator[Any]:
    """What a loaded module holds that its file doesn't say: constants set since, functions of an older text, and whatever is
    not as it was when the import ended, as far as that was seen."""  # fmt: skip
    members = vars(module)
    told = set()
    bound = [name for node in tree.body for name in _bound(node)]
    for node in tree.body:
        names = _bound(node)
        if len(names) != 1 or bound.count(names[0]) != 1 or names[0] not in members:
            continue
        value = members[names[0]]
        told.add(names[0])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.decorator_list:
            written = isinstance(value, types.FunctionType) and read(value.__code__).node
            if written and normalise(written) == normalise(node):
                continue
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            try:
                literal = ast.literal_eval(node.value)  # type: ignore[arg-type]  # None raises as well
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                told.discard(names[0])
                continue
            if walk.graph.alone(literal) == walk.graph.alone(value):
                continue
        else:
            told.discard(names[0])
            continue
        walk.out += b"now" + text(names[0])
        yield value
    known = _AS_IMPORTED.get(module, {})
    for name, data in sorted(data_in(module).items()) if module in _AS_IMPORTED else ():
        if name not in told and walk.graph.alone(data) != known.get(name):
            walk.out += b"now" + text(name)
            yield data


def _bound(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    if len(targets) == 1 and isinstance(targets[0], ast.Name):
        return [targets[0].id]
    return [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)]
