"""How a `%%durable` cell becomes code that IPython awaits.

An ordinary cell magic is called synchronously and could only nest event loops. So an input transformer turns the cell into
one `await` before IPython looks for magics; IPython's own autoawait then runs it on the kernel's loop. Magics stacked above
`%%durable` can't hold an await either: those that make sense there are taken over.
"""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from typing import Any, TypeGuard

_MAGIC = re.compile(r"%%durable(?:\s|$)")
_STACKED = re.compile(r"%%(time|capture)\b")


def split_cell(lines: list[str]) -> tuple[str, str, list[str], int] | None:
    """(what follows `%%durable` in its line, the body, the magics above it, how many lines stand above it) of a durable cell;
    None for any other."""  # fmt: skip
    above = 0
    while above < len(lines) and (_STACKED.match(lines[above]) or not lines[above].strip()):
        above += 1
    if above == len(lines) or not _MAGIC.match(lines[above]):
        return None
    # The magics' lines stay as comments: line numbers are those of the user's cell, and tracebacks show it.
    body = "".join(f"# {text}" for text in lines[: above + 1]) + "".join(lines[above + 1 :])
    stack = [line.strip()[2:] for line in lines[:above] if line.strip()]
    return lines[above].rstrip("\n").removeprefix("%%durable").strip(), body, stack, above


class DurableTransformer:
    """A cleanup transform: lines in, lines out."""

    has_side_effects = True  # so that completeness checks skip it, and a terminal waits for the end of the cell

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self.in_cell = False
        """A cell is being executed: whoever transforms now is synchronous code inside it."""

    def __call__(self, lines: list[str]) -> list[str]:
        parts = split_cell(lines)
        if parts is None:
            return lines
        line, body, stack, above = parts
        if not self._compiles(body):
            return ["\n"] * (above + 1) + lines[above + 1 :]  # IPython reports it as it would
        if self.in_cell or not self._shell.autoawait:
            return [f"get_ipython()._durable_wait({line!r}, {body!r}, {stack!r})\n"]
        return [f"await get_ipython()._durable_run({line!r}, {body!r}, {stack!r})\n"]

    def _compiles(self, body: str) -> bool:
        try:
            source = self._shell.transform_cell(body)
        except SyntaxError:
            return False
        _transformed[:] = [(body, source)]
        return _is_code(source)


_transformed: list[tuple[str, str]] = []
"""The body that was looked at last, and what IPython makes of it."""


def transformed(shell: Any, body: str) -> str:
    """What IPython makes of a durable cell's body; transforming it is most of what a small hit costs, so it is done once."""
    known = _transformed.pop() if _transformed else ("", "")
    return known[1] if known[0] == body else str(shell.transform_cell(body))


@lru_cache(maxsize=256)
def _is_code(source: str) -> bool:
    try:
        tree = ast.parse(source)
        # Statements will be compiled one by one, as IPython does it: these may stand below others.
        tree.body.sort(key=lambda node: not imports_features(node))
        compile(tree, "<durable>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError):
        return False
    return True


def imports_features(node: ast.stmt) -> TypeGuard[ast.ImportFrom]:
    """Is it `from __future__ import ...`?"""
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"
