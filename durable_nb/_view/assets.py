"""The widgets' JavaScript and style: one module and one sheet each, with what all views share before it. No build step."""

from __future__ import annotations

import functools
import re
from importlib import resources

_SPARE = re.compile(r"^[ \t]+|^/\*.*?\*/\n", re.MULTILINE | re.DOTALL)
"""Indentation, and comments that begin a line: a fifth of what the message that opens a widget would hold."""


@functools.cache
def script(view: str) -> str:
    """Return the module of a view: `shared.js`, then its own file."""
    return f"{_text('shared.js')}\n{_text(f'{view}.js')}"


@functools.cache
def style(view: str) -> str:
    """Return the style of a view: `shared.css`, then its own file."""
    return f"{_text('shared.css')}\n{_text(f'{view}.css')}"


def _text(name: str) -> str:
    return _SPARE.sub("", resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
