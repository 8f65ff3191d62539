"""Which random generators a cell seeds before it does anything else: what state they were in doesn't matter to it."""

from __future__ import annotations

import ast
import sys
import types
from collections.abc import Mapping
from typing import Any


def seeded_at_once(tree: ast.Module, namespace: Mapping[str, Any]) -> frozenset[str]:
    """The generators that a cell seeds before it calls anything else."""
    modules = {name: value for name, value in namespace.items() if isinstance(value, types.ModuleType)}
    found = set()
    for statement in tree.body:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                loaded = sys.modules.get(alias.name if alias.asname else alias.name.partition(".")[0])
                modules[alias.asname or alias.name.partition(".")[0]] = loaded  # type: ignore[assignment]  # None: not yet
            continue
        generator = _seeded_by(statement, modules)
        if generator:
            found.add(generator)
        elif any(not isinstance(node, _QUIET) for node in ast.walk(statement)):
            break
    return frozenset(found)


_QUIET = (
    ast.ImportFrom,
    ast.alias,
    ast.Assign,
    ast.Expr,
    ast.Name,
    ast.Constant,
    ast.Pass,
    ast.List,
    ast.Tuple,
    ast.Dict,
    ast.expr_context,
)
"""What of a statement draws no numbers, whatever the names in it stand for."""
_SEEDING = frozenset({"seed", "setstate", "set_state"})


def _seeded_by(statement: ast.stmt, modules: Mapping[str, Any]) -> str:
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute) or call.func.attr not in _SEEDING:
        return ""
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    if not given or any(not isinstance(value, ast.Name | ast.Constant) or _is_none(value) for value in given):
        return ""
    owner, path = call.func.value, list[str]()
    while isinstance(owner, ast.Attribute):
        path.insert(0, owner.attr)
        owner = owner.value
    module = modules.get(owner.id) if isinstance(owner, ast.Name) else None
    for name in path:
        module = getattr(module, name, None)
    return next((name for name in ("random", "numpy.random") if module is not None and module is sys.modules.get(name)), "")


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None
