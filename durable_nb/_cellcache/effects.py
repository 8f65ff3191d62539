"""What a cell does to the process, beyond the notebook's variables: settings, modules, context variables, tasks and threads."""

from __future__ import annotations

import ast
import contextlib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from durable_nb._cellcache.modules import Modules
from durable_nb._cellcache.pending import Pending
from durable_nb._cellcache.settings import Setting, Settings, UnsettableError
from durable_nb._fingerprint import hash_value


class Effects:
    """How the process stands before a cell runs; what has changed is told when it has ended."""

    def __init__(self, tree: ast.Module, words: frozenset[str], known: Iterable[Setting], code: str) -> None:
        """`words`: the names that the cell's code and its helpers' mention; `code`: the digest of the cell's own."""
        self._words, self.loaded = words, frozenset(sys.modules)
        self._settings, self._pending, self._modules = Settings(known, words, code), Pending(), Modules(tree, words)

    def noticing(self) -> contextlib.AbstractContextManager[None]:
        """For the time that the cell runs."""
        return self._modules.noticing()

    def settings(self, variables: Iterable[str]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, str]]]:
        """What it has set, to be set again, and digests of what it may have set to what it was; UnsettableError. `variables`:
        those of the environment that it has set or deleted, also to what they were."""  # fmt: skip
        changed = self._settings.changed(variables)
        unchanged = self._settings.unchanged(changed)
        return changed, {what: {key: hash_value(value) for key, value in found.items()} for what, found in unchanged.items()}

    def left(self, patched: set[int], bound: Collection[tuple[str, str]]) -> Iterator[str]:
        """What else it has done to the process that a hit would not do, in words. Objects of these ids are patched, and these
        globals of modules, (module, name), are bound again."""  # fmt: skip
        yield from self._pending.left()
        yield from (f"it calls {call}(), which a hit would not do" for call in sorted(_NOT_SEEN & self._words))
        for name in self._modules.changed(patched, bound):
            yield f"it changes {name}, in a module that it imports"


_NOT_SEEN = frozenset(
    "codecs.register codecs.register_error sys.addaudithook os.nice os.setpriority os.sched_setaffinity signal.alarm "
    "signal.setitimer faulthandler.register faulthandler.dump_traceback_later threading.settrace threading.setprofile".split()
)
"""Calls that change the process where nobody can look."""
_SETTINGS_OF = {"numpy", "decimal"}
"""Packages that keep settings in context variables, which are known as settings."""


def variables_kept(
    variables: Iterable[tuple[ContextVar[Any], Any]], names: Mapping[str, Any]
) -> list[tuple[ContextVar[Any], Any, str]]:
    """Of the context variables that a cell set, those that are to be set again: with its value, and where it is found,
    `module:name` or a name of the notebook. UnsettableError for one that is nowhere."""  # fmt: skip
    found = []
    for variable, value in variables:
        place = _place(variable, names)
        package = place.partition(":")[0].partition(".")[0] if ":" in place else ""
        if package in _SETTINGS_OF or variable.name in _BY_NAME or _is_numexprs(variable):
            continue
        if not place:
            raise UnsettableError(f"it sets the context variable {variable.name}")
        found.append((variable, value, place))
    return found


_BY_NAME = {"decimal_context", "numpy.format_options", "numpy_extobj"}
"""Of C code's, and of hidden objects."""


def _is_numexprs(variable: ContextVar[Any]) -> bool:
    """It remembers there what it was last called with: no part of any result."""
    last = getattr(sys.modules.get("numexpr.necompiler"), "_numexpr_last", None)
    return getattr(getattr(last, "l", last), "_context_data", None) is variable


def _place(variable: ContextVar[Any], names: Mapping[str, Any]) -> str:
    for name, value in names.items():
        if value is variable:
            return name
    for module_name, module in list(sys.modules.items()):
        if module_name == "__main__":
            continue
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is variable:
                return f"{module_name}:{name}"
    return ""
