"""What a cell does to modules of the project that it imports: their values are compared as import left them.

A module that the notebook imported before is an input of the cells that use it, and compared as such; of one that the cell
imports itself nothing is known before. So what it holds is noted when the import ends, or before the cell where another
one has loaded it.
"""

from __future__ import annotations

import ast
import contextlib
import sys
import types
import weakref
from collections.abc import Collection
from typing import Any

from durable_nb._cellcache.imports import telling
from durable_nb._cellcache.settings import Same
from durable_nb._fingerprint import data_in, hash_value, is_installed, nodes


class Modules:
    """What modules of the project hold before a cell changes them."""

    def __init__(self, tree: ast.Module, words: frozenset[str]) -> None:
        """`words`: the names that the cell's code and its helpers' mention."""
        self._held: dict[str, dict[str, tuple[Same, str]]] = {}
        imports = any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes(tree))
        for name, module in _loaded.of_project():
            if imports or name.rpartition(".")[2] in words:
                self._note(name, module)

    def noticing(self) -> contextlib.AbstractContextManager[None]:
        """Meanwhile, what a module holds is noted as soon as its import has ended."""
        return telling(self._imported)

    def _imported(self, module: types.ModuleType) -> None:
        if _is_of_project(module):
            self._note(module.__name__, module)

    def _note(self, name: str, module: types.ModuleType) -> None:
        with contextlib.suppress(Exception):  # what can't be compared is not looked at: a cell that uses it is told elsewhere
            self._held[name] = _values(module)

    def changed(self, patched: set[int], bound: Collection[tuple[str, str]]) -> list[str]:
        """What the cell has changed in them, as `module.name`, but for objects of these ids, and these globals."""
        found = []
        for name, before in self._held.items():
            module = sys.modules.get(name)
            after = _values(module) if module is not None else before
            different = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
            kept = {key for key, (now, _) in after.items() if (name, key) in bound or id(now.held) in patched}
            found += [f"{name}.{key}" for key in different if key not in kept]
        return found


class _Loaded:
    """Which modules are the user's own, among thousands that each cell would have to look at."""

    def __init__(self) -> None:
        self._seen: dict[str, weakref.ref[types.ModuleType]] = {}
        self._of_project: list[str] = []
        self._last = (0, "")

    def of_project(self) -> list[tuple[str, types.ModuleType]]:
        """Those that are loaded, by name."""
        loaded: dict[str, Any] = sys.modules
        last = len(loaded), next(reversed(loaded), "")
        if last != self._last:  # else nothing was imported since
            for name, module in list(loaded.items()):
                if name not in self._seen or self._seen[name]() is not module:
                    self._look_at(name, module)
            self._last = last
        for name in list(self._of_project):
            if name not in loaded or self._seen[name]() is not loaded[name]:
                self._look_at(name, loaded.get(name))
        return [(name, loaded[name]) for name in self._of_project]

    def _look_at(self, name: str, module: Any) -> None:
        if name in self._of_project:
            self._of_project.remove(name)
        self._seen.pop(name, None)
        if isinstance(module, types.ModuleType):  # not whatever else somebody has put there
            self._seen[name] = weakref.ref(module)
            if _is_of_project(module):
                self._of_project.append(name)


_loaded = _Loaded()


def _is_of_project(module: Any) -> bool:
    """Has it a source, and is it the user's own?"""
    return (
        isinstance(module, types.ModuleType) and bool(getattr(module, "__file__", None)) and not is_installed(module.__name__)
    )


def _values(module: types.ModuleType) -> dict[str, tuple[Same, str]]:
    """By name, which values with which digests that a module holds, and of what its classes hold."""
    return {name: (Same(vars(module)[name]), hash_value(data)) for name, data in data_in(module).items()}
