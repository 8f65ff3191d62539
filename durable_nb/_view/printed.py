"""The cells and runs of a store as text and as static html: for terminals, for saved notebooks, for sites without scripts."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from durable_nb._facts import Status
from durable_nb._view import terminal
from durable_nb._view.listing import CellFacts, Page, RunFacts
from durable_nb._view.words import COLOURS, ICONS, TERMINAL, clipped, plain, say_seconds, say_size

EMPTY = "nothing yet: put '%%durable NAME' above a cell"
_PATH = 160
_FOLDED = 1200

CELLS = ("cell", "status", "last run", "steps", "variables", "stored", "took", "a hit saves", "next wake")
RUNS = ("run", "of", "status", "began", "took", "steps", "next wake", "labels", "error")
_RIGHT = frozenset({"steps", "variables", "stored", "took", "a hit saves"})
_SPARE = ("labels", "variables", "stored", "steps", "took")


def text(page: Page) -> str:
    """Return the page as plain text."""
    return terminal.text(blocks(page))


def blocks(page: Page) -> list[terminal.Block]:
    """Return the page as tables of texts."""
    store, notes = shown_path(page.path), _notes(page)
    if page.trouble:
        return [terminal.Block(f"the store {store} can't be read", notes=[f"  {page.trouble}"])]
    if not page.total and not page.cells_total:
        lines = [f"  {EMPTY}"] if not page.unread else []
        return [terminal.Block(f"durable cells in {store}", notes=[*lines, *notes])]
    none = ["  none that match"] if page.query.chooses else ["  none"]
    found = []
    if page.query.with_cells:
        rows = [_cell_texts(cell, page.at, dated=False) for cell in page.cells]
        below = [f"  {_where(page.query.cells_page, page.most, page.cells_total, 'cells')}"] if page.cells_pages > 1 else []
        found.append(terminal.Block(f"durable cells in {store}", CELLS, rows, below if rows else none, TERMINAL, _SPARE))
    rows = [_run_texts(run, page.at, dated=False) for run in page.runs]
    below = [f"  {_where(page.query.page, page.most, page.matched, 'runs')}"] if page.pages > 1 else []
    below = [*(below if rows else none), *notes]
    return [*found, terminal.Block(f"runs in {store}", RUNS, rows, below, TERMINAL, _SPARE)]


def html(page: Page) -> str:
    """Return the page as html that needs no script and no style sheet; whatever a user named or raised is escaped."""
    store = escape(plain(shown_path(page.path), _PATH))
    if page.trouble:
        return f"<p><strong>the store {store} can't be read</strong><br>{escape(page.trouble)}</p>"
    statuses = ", ".join(f"{count:,} {status}" for status, count in page.counts.items())
    lines = [
        f"<p><strong>Durable cells and runs</strong> · <code>{store}</code> · as of {_moment(page.at, page.at, dated=True)}</p>"
    ]
    if not page.total and not page.cells_total:
        lines.append(f"<p>{escape(EMPTY)}</p>" if not page.unread else "")
    if page.cells_total:
        rows = [_cell_texts(cell, page.at, dated=True) for cell in page.cells]
        more = _where(page.query.cells_page, page.most, page.cells_total, "cells") if page.cells_pages > 1 else ""
        lines.append(_section("Cells", f"{page.cells_total:,}", CELLS, rows, more))
    if page.total:
        rows = [_run_texts(run, page.at, dated=True) for run in page.runs]
        more = _where(page.query.page, page.most, page.matched, "runs") if page.pages > 1 else ""
        about = f"{page.matched:,}: {statuses}" if page.matched else "none that match"
        lines.append(_section("Runs", about, RUNS, rows, more))
    lines += [f"<p><em>{escape(note.strip())}</em></p>" for note in _notes(page)]
    return "\n".join(lines)


def shown_path(path: str) -> str:
    """Return the folder as its user knows it: from the working directory, where it lies below that."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def _cell_texts(cell: CellFacts, now: float, *, dated: bool) -> tuple[str, ...]:
    return (
        cell.name,
        cell.status,
        _moment(cell.last_run_at, now, dated=dated),
        str(cell.steps),
        str(cell.variables),
        say_size(cell.size) if cell.entries else "",
        say_seconds(cell.took_s),
        say_seconds(cell.saves_s),
        _wake(cell.wake_at, cell.status, now, dated=dated),
    )


def _run_texts(run: RunFacts, now: float, *, dated: bool) -> tuple[str, ...]:
    return (
        run.id,
        run.name if run.kind != "cell" else f"cell {run.name}",
        run.status,
        _moment(run.started_at, now, dated=dated),
        say_seconds(run.ended_at - run.started_at if run.ended_at else None),
        "" if run.steps is None else str(run.steps),
        _wake(run.wake_at, run.status, now, dated=dated),
        ", ".join(run.labels),
        run.error,
    )


def _notes(page: Page) -> list[str]:
    if not page.unread:
        return []
    what = "1 run or entry" if page.unread == 1 else f"{page.unread:,} runs and entries"
    return [f"  {what} can't be read: see 'durable-nb doctor'"]


def _where(page: int, most: int, total: int, what: str) -> str:
    return f"{page * most + 1:,} to {min((page + 1) * most, total):,} of {total:,} {what}, the newest first"


def _moment(at: float | None, now: float, *, dated: bool) -> str:
    if at is None:
        return ""
    then, today = datetime.fromtimestamp(at).astimezone(), datetime.fromtimestamp(now).astimezone()
    return f"{then:%Y-%m-%d %H:%M}" if dated or then.date() != today.date() else f"{then:%H:%M:%S}"


def _wake(at: float | None, status: str, now: float, *, dated: bool) -> str:
    """When a sleep or a retry is due; nothing wakes without a process."""
    nobody = ", no process is running this" if at is not None and status == Status.INTERRUPTED else ""
    return _moment(at, now, dated=dated) + nobody


def _section(title: str, about: str, columns: Sequence[str], rows: Sequence[Sequence[str]], more: str) -> str:
    """A table that folds."""
    filled = [n for n in range(len(columns)) if any(row[n] for row in rows)]
    sides = {n: "right" if columns[n] in _RIGHT else "left" for n in filled}
    head = "".join(f'<th scope="col" style="text-align: {sides[n]}">{escape(columns[n])}</th>' for n in filled)
    lines = [f"<details open><summary><strong>{title}</strong> · {escape(about)}</summary>"]
    if rows:
        lines += ['<div style="overflow-x: auto">', f"<table><thead><tr>{head}</tr></thead>", "<tbody>"]
        for row in rows:
            cells = {n: _badge(row[n]) if columns[n] == "status" else _prose(row[n]) for n in filled}
            style = "vertical-align: top; text-align: "
            lines.append("<tr>" + "".join(f'<td style="{style}{sides[n]}">{cell}</td>' for n, cell in cells.items()) + "</tr>")
        lines += ["</tbody></table>", "</div>"]
    if more:
        lines.append(f"<p><em>{escape(more)}</em></p>")
    return "\n".join([*lines, "</details>"])


def _badge(status: str) -> str:
    colour = f' style="color: {COLOURS[status]}"' if status in COLOURS else ""
    return f"<span{colour}>{ICONS.get(status, ICONS['completed'])}</span>&nbsp;{escape(status)}"


def _prose(words: str) -> str:
    """A cell of a table: a long text folds."""
    line = escape(plain(words, terminal.LONGEST))
    if len(words) <= terminal.LONGEST and "\n" not in words:
        return line
    whole = "".join(char if char.isprintable() or char in "\n\t" else " " for char in clipped(words, _FOLDED))
    pre = '<pre style="white-space: pre-wrap; overflow-wrap: anywhere">'
    return f"<details><summary>{line}</summary>{pre}{escape(whole)}</pre></details>"
