"""Tables as text, by rich: in colour where a terminal shows them, plain where they are kept."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from durable_nb._view.words import columns, plain

if TYPE_CHECKING:
    from rich.console import Console

LONGEST = 80
"""Characters of one cell."""
_WIDE = 2000
"""Columns where no terminal limits them."""
_NARROW = 18
"""Columns below which none gives way before the spare ones have gone."""
_INDENT = _BETWEEN = 2
_NUMERIC = frozenset("0123456789")


@dataclass(frozen=True, slots=True)
class Block:
    """A title, rows of texts under columns, and lines that follow. A column in which no row has anything is not shown.

    `styles` are rich's, by the text of a cell: `{"failed": "red"}`.
    """

    title: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    styles: dict[str, str] | None = None
    spare: Sequence[str] = ()
    """Columns that a narrow terminal does without, the first of them first."""


def text(blocks: Iterable[Block]) -> str:
    """Return them as plain text, however wide."""
    from rich.console import Console

    written = io.StringIO()
    _write(blocks, Console(file=written, width=_WIDE, color_system=None, **_LITERAL))
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def show(blocks: Iterable[Block]) -> None:
    """Write them to standard output: for a terminal in colour and as wide as it is."""
    from rich.console import Console

    if sys.stdout.isatty():
        _write(blocks, Console(**_LITERAL))
    else:
        sys.stdout.write(text(blocks) + "\n")


def coloured(blocks: Iterable[Block]) -> str:
    """Return them as the terminal shows them, as wide as it is."""
    from rich.console import Console

    written = io.StringIO()
    width = shutil.get_terminal_size().columns
    _write(blocks, Console(file=written, width=width, force_terminal=True, color_system="standard", **_LITERAL))
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


_LITERAL: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "force_jupyter": False}
"""No text of a user's means anything to rich, and what is kept is not displayed at once."""


def _write(blocks: Iterable[Block], console: Console) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    for block in blocks:
        if block.title:
            console.print(Text(plain(block.title, _WIDE), "bold"), overflow="fold")
        widths = _fitted(block, console.width - _INDENT)
        if widths:
            table = Table(box=None, padding=(0, _BETWEEN, 0, 0), pad_edge=False, header_style="dim")
            for n, width in widths.items():
                right = all(row[n][0] in _NUMERIC and not {"-", ","} & set(row[n]) for row in block.rows if row[n])
                justify: Any = "right" if right else "left"
                table.add_column(block.columns[n], width=width, justify=justify, no_wrap=True, overflow="ellipsis")
            for row in block.rows:
                cells = (plain(row[n], LONGEST) for n in widths)
                table.add_row(*(Text(cell, (block.styles or {}).get(cell, "")) for cell in cells))
            console.print(Padding(table, (0, 0, 0, _INDENT)))
        for note in block.notes:
            console.print(Text(note), overflow="fold")


def _fitted(block: Block, room: int) -> dict[int, int]:
    """The columns that are shown, and how wide: of too many the spare ones go, of the others the widest give way."""
    filled = [n for n in range(len(block.columns)) if any(row[n] for row in block.rows)]
    widths = {n: max(columns(plain(row[n], LONGEST)) for row in (block.columns, *block.rows)) for n in filled}
    spare = [n for name in block.spare for n in filled if block.columns[n] == name]

    def too_wide() -> bool:
        return sum(widths.values()) + _BETWEEN * (len(widths) - 1) > room

    while too_wide():
        widest = max(widths, key=lambda n: widths[n])
        if widths[widest] <= _NARROW and spare:
            widths.pop(spare.pop(0))
        elif widths[widest] > 1:
            widths[widest] -= 1
        else:
            break
    return widths
