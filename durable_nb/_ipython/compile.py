"""A cell's body as IPython would compile it, with top-level await."""

from __future__ import annotations
import __future__

import ast
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import IPython
from IPython.core.displayhook import DisplayHook

from durable_nb._cellcache.names import Names, names_of
from durable_nb._ipython.transform import imports_features, transformed


@dataclass(frozen=True, slots=True)
class Code:
    """A cell's body, compiled: parts to execute in order, each with whether its value is displayed."""

    parts: Callable[[], list[tuple[types.CodeType, bool]]]
    """Compiles it; a restored cell needs none of it."""
    tree: ast.Module
    names: Names


def tree_of(shell: Any, body: str) -> tuple[ast.Module, Names]:
    """What a cell's key is made of: its normal tree, and the names in it."""
    return _normal(shell.transform_cell(body), _features(shell))


def turn_on_features(shell: Any, tree: ast.Module) -> None:
    """What `from __future__ import ...` in a cell means for later ones: IPython's compiler remembers it."""
    for name in _imported_features(tree):
        shell.compile.flags |= getattr(__future__, name).compiler_flag


def _features(shell: Any) -> tuple[str, ...]:
    """What earlier cells have turned on."""
    flags = shell.compile.flags
    return tuple(name for name in __future__.all_feature_names if flags & getattr(__future__, name).compiler_flag)


def _imported_features(tree: ast.Module) -> set[str]:
    return {alias.name for node in tree.body if imports_features(node) for alias in node.names}


def compile_body(shell: Any, body: str) -> Code:
    """A cell's body as IPython would compile it, with top-level await; tracebacks show the user's lines."""
    source = transformed(shell, body)
    number = max(shell.execution_count - 1, 1)  # IPython has counted this cell already
    filename = shell.compile.cache(source, number, raw_code=body)  # of restored functions, too

    def parts() -> list[tuple[types.CodeType, bool]]:
        tree = shell.transform_ast(shell.compile.ast_parse(source, filename=filename))
        quiet = bool(DisplayHook.semicolon_at_end_of_expression(body))  # type: ignore[no-untyped-call]
        found = []
        with shell.compile.extra_flags(ast.PyCF_ALLOW_TOP_LEVEL_AWAIT):
            for node, shown in _parts(tree, shell.ast_node_interactivity, quiet=quiet):
                mode = "eval" if isinstance(node, ast.Expression) else "exec"
                found.append((shell.compile(node, filename, mode), shown))
        return found

    try:
        tree, names = _normal(source, _features(shell))
    except SyntaxError:
        parts()  # raises it with the user's lines
        raise
    return Code(parts, tree, names)


@lru_cache(maxsize=256)
def _normal(source: str, features: tuple[str, ...]) -> tuple[ast.Module, Names]:
    tree = _timed_in(source)
    swallows = IPython.version_info < (9, 4)  # %time showed an error and went on
    names = names_of(_timed_in(source, swallows=True) if swallows and "run_line_magic" in source else tree)
    earlier = sorted(set(features) - _imported_features(tree))
    if earlier:  # the cell means what it would mean with this line at its top
        line = ast.ImportFrom("__future__", [ast.alias(name) for name in earlier], 0, lineno=1, col_offset=0)
        tree = ast.Module([line, *tree.body], [])  # another one: what is known of that one is remembered
    return tree, names


def _timed_in(source: str, *, swallows: bool = False) -> ast.Module:
    tree = ast.parse(source)
    if "run_line_magic" in source:
        _Timed(swallows=swallows).visit(tree)
    return tree


class _Timed(ast.NodeTransformer):
    """`%time v = f(x)` as what it executes: the text in `get_ipython().run_line_magic('time', 'v = f(x)')` is code."""

    def __init__(self, *, swallows: bool = False) -> None:
        self._swallows = swallows
        """The cell continues after an error in it."""

    def visit_Expr(self, node: ast.Expr) -> Any:
        timed = _timed(node.value)
        if timed is None:
            return node
        body: list[ast.stmt] = [*timed.body]
        if self._swallows:
            body = [ast.Try(body, [ast.ExceptHandler(None, None, [ast.Pass()])], [], [])]
        magic = ast.parse("get_ipython().run_line_magic('time', '')").body  # it prints: the cell is another one without it
        return [ast.fix_missing_locations(ast.copy_location(part, node)) for part in (*magic, *body)]


def _timed(node: ast.expr) -> ast.Module | None:
    """The code that a call of %time executes; None for anything else."""
    match node:
        case ast.Call(
            func=ast.Attribute(value=ast.Call(func=ast.Name(id="get_ipython")), attr="run_line_magic"),
            args=[ast.Constant(value="time"), ast.Constant(value=str(text))],
        ):
            with suppress(SyntaxError, ValueError):  # an option, or a magic within
                return ast.parse(text)
    return None


def _parts(tree: ast.Module, interactivity: str, *, quiet: bool) -> Iterator[tuple[ast.Module | ast.Expression, bool]]:
    """The statements in runs, and each expression whose value IPython would display."""
    body = list(tree.body)
    last = body[-1] if body else None
    if interactivity == "last_expr_or_assign" and isinstance(last, ast.Assign) and isinstance(last.targets[0], ast.Name):
        body.append(ast.copy_location(ast.Expr(ast.copy_location(ast.Name(last.targets[0].id, ast.Load()), last)), last))
    waiting: list[ast.stmt] = []
    for i, node in enumerate(body):
        is_last = i == len(body) - 1
        shown = interactivity == "all" or (interactivity != "none" and is_last)
        if isinstance(node, ast.Expr) and shown and not (is_last and quiet):
            if waiting:
                yield ast.Module(waiting, []), False
                waiting = []
            yield ast.Expression(node.value), True
        else:
            if waiting and imports_features(node):  # it may stand below other code in a cell, but not in what is compiled
                yield ast.Module(waiting, []), False
                waiting = []
            waiting.append(node)
    if waiting:
        yield ast.Module(waiting, []), False
