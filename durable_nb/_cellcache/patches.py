"""Earlier objects that a cell refers to or has changed: where they are among its inputs, and how the change is made again.

An input is walked in one canonical order, so every mutable object in it has a place, (component, number), which is the same in
any execution with equal inputs. A stored value refers to such an object by its place, and a change is stored as the object's
new content, applied to the live object: whoever else holds it sees the change, as after plain execution.
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
import types
import typing
from collections.abc import Callable, Container, Mapping
from typing import Any

from durable_nb import _sqlite
from durable_nb._cellcache.resources import Resources, either
from durable_nb._fingerprint import is_installed, nodes, of_value
from durable_nb._patches import Patch, Place, Standing, UnpatchableError, content_of, content_of_code
from durable_nb._pickling import References


def patches_for(
    labels: list[str], places: Mapping[Place, Any], standing: Standing, names: Mapping[str, Any], code: Mapping[str, Any]
) -> list[Patch]:
    """The new contents of all objects in the changed components; UnpatchableError, naming the component, where one can't be
    told. `names`: the inputs by name; `code`: functions and classes by component; `standing`: how the objects were before."""
    found: list[Patch] = []
    for label in labels:
        if label == "aliases":
            continue
        kind, _, name = label.partition(" ")
        objects = [obj for (component, _), obj in places.items() if component == label]
        if kind == "global" and not objects and name in names:
            objects = [names[name]]
        try:
            if label in code:
                found.append((code[label], content_of_code(code[label], standing)))
            elif kind not in ("global", "figures") or not objects:
                raise UnpatchableError(label)  # noqa: TRY301  the handler adds the label to the others' reasons only
            for obj in objects:
                try:
                    found.append((obj, content_of(obj, standing)))
                except UnpatchableError:
                    if not standing.is_unchanged(obj):
                        raise
        except UnpatchableError as error:
            raise UnpatchableError(label) from error
    return found


def patch_of(name: str, obj: Any, places: Mapping[Place, Any], found: list[Patch]) -> list[Patch]:
    """The new content of a resource that stands otherwise than before, if it isn't among `found` yet; UnpatchableError."""
    if any(obj is patched for patched, _ in found):
        return []
    if not _sqlite.is_connection(obj) or not any(obj is held for held in places.values()):
        raise UnpatchableError(name)
    try:
        return [(obj, content_of(obj))]
    except UnpatchableError as error:
        raise UnpatchableError(name) from error


def digest_if_whole(obj: Any) -> str:
    """The digest of an object; '' where its content isn't all told."""
    found = of_value(obj)
    return "" if found.opaque else found.digest


def links(
    places: Mapping[Place, Any],
    names: Mapping[str, Any],
    imported: Mapping[int, str],
    code: Mapping[str, Any],
    resources: Resources,
) -> References:
    """Which objects of earlier cells a stored value refers to, instead of holding them. `names`: inputs whose objects have no
    place, such as functions; they are referred to by name. `imported`: by id, what the cell took out of modules; it is taken
    from there again, as `module:name`. `resources` are made again."""  # fmt: skip
    pandas: Any = sys.modules.get("pandas")
    named = _NAMED if pandas is None else (*_NAMED, pandas.Index)
    keys: dict[int, Any] = {id(obj): name for name, obj in names.items() if isinstance(obj, named)}
    keys |= imported
    keys |= {id(obj): label for label, obj in code.items() if id(obj) not in keys}
    keys |= {id(obj): place for place, obj in reversed(list(places.items()))}
    keys = {**resources.references, **keys}
    return References(keys, places.values(), either(resources, resolver(places, names, lambda: code)))


_SCALARS = (type(None), bool, int, float, complex, str, bytes, types.ModuleType)
_NAMED = (
    *(types.FunctionType, types.MethodType, type, type(functools.lru_cache(len))),
    *(typing.TypeVar, typing.ParamSpec, typing.TypeVarTuple, typing.NewType),
)


def imported_by(tree: ast.Module, namespace: Mapping[str, Any]) -> dict[int, str]:
    """What `from module import name` in the cell gave it, by id: `module:name`. Scalars are values like any other."""
    found: dict[int, str] = {}
    for node in nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            module = sys.modules.get(node.module)
            names = vars(module) if module is not None and node.names[0].name == "*" else [alias.name for alias in node.names]
            for name in names:
                value = getattr(module, name, None)
                if not isinstance(value, _SCALARS) and any(value is held for held in namespace.values()):
                    found[id(value)] = f"{node.module}:{name}"
    return found


def attributes_set(tree: ast.AST, namespace: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(owner, attribute) of each attribute that the code assigns or deletes of a module, or of what an installed one holds:
    a class, an object with settings."""  # fmt: skip
    found = []
    for node in nodes(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            owner = _owner(node.value, namespace)
            if owner and owner not in _SET_AGAIN:
                found.append((owner, node.attr))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            owner = _owner(node.args[0], namespace) if node.args else ""
            if owner:
                found.append((owner, "attributes"))
    return found


_SET_AGAIN = {"pandas.options", "pandas.options.display", "pandas.options.mode", "pandas.options.plotting", "pandas.options.io"}
"""Settings that a hit sets again."""


def _owner(expression: ast.expr, namespace: Mapping[str, Any]) -> str:
    """The name of the module, or of the object in an installed one, that an expression such as `os.path` gives; else ''."""
    path: list[str] = []
    while isinstance(expression, ast.Attribute):
        path.insert(0, expression.attr)
        expression = expression.value
    owner = namespace.get(expression.id) if isinstance(expression, ast.Name) else None
    if isinstance(owner, type) and not path and is_installed(owner.__module__):
        return f"{owner.__module__}.{owner.__qualname__}"
    if not isinstance(owner, types.ModuleType):
        return ""
    said = owner.__name__
    for name in path:
        said = owner.__name__ if isinstance(owner, types.ModuleType) else said
        owner = getattr(owner, name, None)
        said = f"{said}.{name}"
    if isinstance(owner, types.ModuleType):
        return owner.__name__
    return said if owner is not None and is_installed(said.partition(".")[0]) else ""


def modules_imported_by(tree: ast.Module, loaded: Container[str]) -> list[str]:
    """`a.b` of each `import a.b`: binding `a` alone would not load it. And `a` of `from a import b` where that was `loaded`
    before: what loading it does besides was not seen."""  # fmt: skip
    aliases = [alias.name for node in nodes(tree) if isinstance(node, ast.Import) for alias in node.names]
    sources = [node.module for node in nodes(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    found = {name for name in aliases if "." in name} | {name for name in sources if name and name in loaded}
    return sorted(name for name in found if name in sys.modules)


def resolver(
    places: Mapping[Place, Any], names: Mapping[str, Any], code: Callable[[], Mapping[str, Any]]
) -> Callable[[Any], object]:
    """Gives the live object for what `links` wrote."""

    def resolve(written: Any) -> object:
        if not isinstance(written, str):
            return places[written]
        if " " in written:  # a component's label
            return code()[written]
        module, colon, name = written.partition(":")
        return getattr(importlib.import_module(module), name) if colon else names[written]

    return resolve
