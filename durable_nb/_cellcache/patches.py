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
from collections.abc import Iterable, Mapping
from typing import Any

from durable_nb._fingerprint._arrays import byte_bounds
from durable_nb._patches import Patch, Place, UnpatchableError, content_of


def patches_for(labels: list[str], places: Mapping[Place, Any]) -> list[Patch]:
    """The new contents of all objects in the changed components; UnpatchableError, naming the component, where one can't be
    told."""  # fmt: skip
    found: list[Patch] = []
    for label in labels:
        objects = [obj for (component, _), obj in places.items() if component == label]
        if label != "aliases" and not (objects and label.startswith("global ")):
            raise UnpatchableError(label)
        for obj in objects:
            try:
                found.append((obj, content_of(obj)))
            except UnpatchableError as error:
                raise UnpatchableError(label) from error
    return found


class Links:
    """Which objects of earlier cells a stored value refers to, instead of holding them."""

    def __init__(self, places: Mapping[Place, Any], names: Mapping[str, Any], imported: Mapping[int, str]) -> None:
        """`names`: inputs whose objects have no place, such as functions; they are referred to by name. `imported`: by id, what
        the cell took out of modules; it is taken from there again, as `module:name`."""  # fmt: skip
        self._places: dict[int, Any] = {id(obj): name for name, obj in names.items() if isinstance(obj, _NAMED)}
        self._places |= imported
        self._places |= {id(obj): place for place, obj in reversed(list(places.items()))}
        self._keep = places, names  # ids hold only while their objects live

    def reference(self, obj: Any) -> Any:
        """The place or name of an earlier object; UnpatchableError for an array that is a view of one."""
        place = self._places.get(id(obj))
        if place is not None:
            return place
        base = getattr(obj, "base", None) if type(obj).__name__ == "ndarray" else None
        while base is not None:
            if id(base) in self._places:
                raise UnpatchableError("an array that shares memory with an earlier one")
            base = getattr(base, "base", None)
        return None


_SCALARS = (type(None), bool, int, float, complex, str, bytes, types.ModuleType)
_NAMED = (types.FunctionType, types.MethodType, type, type(functools.lru_cache(len)))


def imported_by(tree: ast.Module, namespace: Mapping[str, Any]) -> dict[int, str]:
    """What `from module import name` in the cell gave it, by id: `module:name`. Scalars are values like any other."""
    found: dict[int, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            module = sys.modules.get(node.module)
            names = vars(module) if module is not None and node.names[0].name == "*" else [alias.name for alias in node.names]
            for name in names:
                value = getattr(module, name, None)
                if not isinstance(value, _SCALARS) and any(value is held for held in namespace.values()):
                    found[id(value)] = f"{node.module}:{name}"
    return found


def attributes_set(tree: ast.AST, namespace: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(module, attribute) of each attribute of a module that the cell assigns or deletes."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            path: list[str] = []
            base: ast.expr = node.value
            while isinstance(base, ast.Attribute):
                path.append(base.attr)
                base = base.value
            owner = namespace.get(base.id) if isinstance(base, ast.Name) else None
            for name in reversed(path):
                owner = getattr(owner, name, None) if isinstance(owner, types.ModuleType) else None
            if isinstance(owner, types.ModuleType):
                found.append((owner.__name__, node.attr))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            owner = namespace.get(getattr(node.args[0] if node.args else None, "id", ""))
            if isinstance(owner, types.ModuleType):
                found.append((owner.__name__, "attributes"))
    return found


def submodules_imported_by(tree: ast.Module) -> list[str]:
    """`a.b` of each `import a.b`: binding `a` alone would not load it."""
    aliases = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return sorted({name for name in aliases if "." in name and name in sys.modules})


def shares_memory(values: Mapping[str, Any], places: Mapping[Place, Any]) -> str:
    """The name of an array that is a view of another one's memory: each would come back with memory of its own. '' for none.

    Of a frame and an array, where the array may be written to. That frames share memory can't be seen (copy on write).
    """
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return ""
    pandas: Any = sys.modules.get("pandas")
    frames: dict[int, tuple[str, Any]] = {}
    arrays: dict[int, tuple[str, Any]] = {id(a): ("", a) for a in places.values() if type(a) is numpy.ndarray}
    if pandas is not None:
        frames = {id(f): ("", f) for f in places.values() if isinstance(f, (pandas.DataFrame, pandas.Series))}
    waiting = [(name, value) for name, value in values.items()]
    seen: set[int] = set()
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, numpy.ndarray):
            arrays.setdefault(id(value), (name, value))
        elif pandas is not None and isinstance(value, (pandas.DataFrame, pandas.Series)):
            frames.setdefault(id(value), (name, value))
        elif type(value) in (list, tuple, set):
            waiting += [(name, inner) for inner in value]
        elif type(value) is dict:
            waiting += [(name, inner) for inner in value.values()]
        elif type(value).__module__ == "__main__" and hasattr(value, "__dict__") and not isinstance(value, type):
            waiting += [(name, inner) for inner in vars(value).values()]
    spans = _spans(arrays.values())
    reach, holder = 0, ""
    for start, end, name in spans:
        if start < reach and (name or holder):
            return name or holder
        if end > reach:
            reach, holder = end, name
    writable = _spans((name, array) for name, array in arrays.values() if array.flags.writeable)
    columns = _spans((name, column) for name, frame in frames.values() for column in _columns(frame))
    for start, end, name in writable if columns else ():
        for first, last, other in columns:
            if start < last and first < end and (name or other):
                return name or other
    return ""


def _spans(arrays: Iterable[tuple[str, Any]]) -> list[tuple[int, int, str]]:
    return sorted((*byte_bounds(array), name) for name, array in arrays if array.size and not array.dtype.hasobject)


def _columns(frame: Any) -> list[Any]:
    """The plain arrays that a frame consists of."""
    blocks = [block.values for block in frame._mgr.blocks]
    numpy = sys.modules["numpy"]
    return [values for values in blocks if isinstance(values, numpy.ndarray)]


def resolver(places: Mapping[Place, Any], names: Mapping[str, Any]) -> Any:
    """Gives the live object for what `Links` wrote."""

    def resolve(written: Any) -> Any:
        if not isinstance(written, str):
            return places[tuple(written)]
        module, colon, name = written.partition(":")
        return getattr(importlib.import_module(module), name) if colon else names[written]

    return resolve
