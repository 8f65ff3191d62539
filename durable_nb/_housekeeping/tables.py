"""Facts as a table: aligned text, html, or plain data."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from durable_nb._clock import say_duration
from durable_nb._view import terminal

_NUMERIC = frozenset("0123456789")
_AS_TEXT = "white-space:pre-wrap;font-family:var(--jp-code-font-family,monospace)"


@dataclass(frozen=True, slots=True)
class Table:
    """A title, rows of texts under columns, and lines that follow. A column in which no row has anything is not shown."""

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    spare: Sequence[str] = ()
    """Columns that a narrow terminal does without, the first of them first."""

    def text(self) -> str:
        """As plain text."""
        return terminal.text([self._block()])

    def show(self) -> None:
        """Write it to standard output, as a terminal shows it best."""
        terminal.show([self._block()])

    def _block(self) -> terminal.Block:
        return terminal.Block(self.title, self.columns, self.rows, self.notes, spare=self.spare)

    def html(self) -> str:
        """For a notebook; all texts are escaped."""
        parts = [f"<div><b>{html.escape(self.title)}</b></div>"] if self.title else []
        if self.rows:
            align = {n: "right" if self._is_numeric(n) else "left" for n in self._filled()}
            head = "".join(_cell("th", self.columns[n], a) for n, a in align.items())
            body = "".join("<tr>" + "".join(_cell("td", row[n], a) for n, a in align.items()) + "</tr>" for row in self.rows)
            parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        if self.notes:
            parts.append(f'<div style="{_AS_TEXT}">{html.escape(chr(10).join(self.notes))}</div>')
        return "".join(parts)

    def _filled(self) -> list[int]:
        """The columns in which a row has something."""
        return [n for n in range(len(self.columns)) if any(row[n] for row in self.rows)]

    def _is_numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column]]
        return bool(cells) and all(cell[0] in _NUMERIC and not {"-", ","} & set(cell) for cell in cells)


def _cell(tag: str, text: str, align: str) -> str:
    return f'<{tag} style="text-align:{align}">{html.escape(text)}</{tag}>'


def say_past(at: float) -> str:
    """A moment of the past and how long ago it is: '05:10, 12 min ago'; before today with the day."""
    then, now = datetime.fromtimestamp(at).astimezone(), datetime.now().astimezone()
    ago = max((now - then).total_seconds(), 0.0)
    day = "" if then.date() == now.date() else f"{then:%a} " if ago < 6 * 86400 else f"{then:%Y-%m-%d} "
    return f"{day}{then:%H:%M}, {say_duration(ago // 60 * 60)} ago" if ago >= 60 else f"{round(ago)} s ago"


def count(n: int, what: str, many: str = "") -> str:
    """'1 step', '2 steps'."""
    return f"{n} {what if n == 1 else many or what + 's'}"
