"""What lies in a store as its readers see it: cells and runs, chosen by a query, counted, a page at a time. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from durable_nb._view.words import counted

PAGE = 25
NAMED = 200
"""Workflows, cells and labels that a page names as choices, those of most runs first."""
KINDS = ("cell", "workflow")


@dataclass(frozen=True, slots=True)
class Question:
    """A decision that a run waits for."""

    path: str
    """As a decision names it."""
    prompt: str
    until: float | None


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run: a cell's attempt or a workflow's. Times are unix seconds."""

    id: str
    kind: str
    """`cell` or `workflow`."""
    name: str
    status: str
    started_at: float
    ended_at: float | None
    steps: int | None
    """Outcomes on record; None for a cell, whose runs share theirs."""
    error: str
    labels: tuple[str, ...]
    wake_at: float | None
    """When its next sleep or retry is due, of a run that is not finished: if a process executes it then."""
    asks: tuple[Question, ...] = ()
    """What it waits to have decided."""


@dataclass(frozen=True, slots=True)
class CellFacts:
    """One durable cell."""

    name: str
    status: str
    """Of its last run; `stored` where only its entries are left."""
    last_run_at: float | None
    steps: int
    """Outcomes that its next execution could take."""
    variables: int
    """That its newest entry restores."""
    entries: int
    size: int
    """Bytes of all its entries."""
    took_s: float | None
    """How long its last run took."""
    saves_s: float | None
    """What the cell takes in full, and a hit on its newest entry saves."""
    wake_at: float | None
    """Of its last run."""


@dataclass(frozen=True, slots=True)
class Query:
    """Which runs, and which page of them. '' chooses all."""

    status: str = ""
    kind: str = ""
    """`cell` or `workflow`; '' both."""
    workflow: str = ""
    """A workflow's name, or with the kind `cell` a cell's."""
    label: str = ""
    page: int = 0
    cells_page: int = 0
    with_cells: bool = True
    open: str = ""
    """A run whose steps are asked for as well."""

    @property
    def chooses(self) -> bool:
        """Does it leave any run out?"""
        return bool(self.status or self.kind or self.workflow or self.label)

    def wants(self, run: RunFacts) -> bool:
        """Is the run chosen, whatever its status is?"""
        return self.kind in ("", run.kind) and self.workflow in ("", run.name) and (not self.label or self.label in run.labels)


@dataclass(frozen=True, slots=True)
class Page:
    """What a reader sees of a store at one moment."""

    path: str
    """The store's folder."""
    at: float
    """When it was looked at."""
    query: Query
    """As it was answered: its pages are ones that there are."""
    cells: tuple[CellFacts, ...] = ()
    cells_total: int = 0
    runs: tuple[RunFacts, ...] = ()
    matched: int = 0
    """Runs that the query chooses."""
    total: int = 0
    """Runs of the store."""
    counts: dict[str, int] = field(default_factory=dict)
    """By status, the runs that the query would choose if it asked for that status."""
    names: tuple[tuple[str, str, int], ...] = ()
    """The workflows and cells that have runs: kind, name, and how many."""
    labels: tuple[tuple[str, int], ...] = ()
    unread: int = 0
    """Runs and entries that are damaged, or signed with another key."""
    trouble: str = ""
    """Why nothing can be told of the store."""
    most: int = PAGE
    """Runs on a page, and cells."""

    @property
    def pages(self) -> int:
        """How many pages of runs there are; one where there is none."""
        return max(-(-self.matched // self.most), 1)

    @property
    def cells_pages(self) -> int:
        """The same of cells."""
        return max(-(-self.cells_total // self.most), 1)


def page_of(
    path: str,
    at: float,
    runs: Sequence[RunFacts],
    cells: Sequence[CellFacts],
    query: Query,
    *,
    unread: int = 0,
    whole: Callable[[RunFacts], RunFacts] = lambda run: run,
    most: int = PAGE,
) -> Page:
    """Choose from all `runs` and `cells`, newest first. `whole` completes the facts of the runs that are on the page."""
    wanted = [run for run in runs if query.wants(run)]
    chosen = [run for run in wanted if query.status in ("", run.status)]
    shown = _of_cells(cells, query)
    query = replace(query, page=_within(query.page, len(chosen), most), cells_page=_within(query.cells_page, len(shown), most))
    return Page(
        path,
        at,
        query,
        tuple(shown[query.cells_page * most : (query.cells_page + 1) * most]),
        len(shown),
        tuple(map(whole, chosen[query.page * most : (query.page + 1) * most])),
        len(chosen),
        len(runs),
        counted(run.status for run in wanted),
        tuple((kind, name, n) for (kind, name), n in Counter((run.kind, run.name) for run in runs).most_common(NAMED)),
        tuple(Counter(label for run in runs for label in set(run.labels)).most_common(NAMED)),
        unread,
        most=most,
    )


def _of_cells(cells: Sequence[CellFacts], query: Query) -> list[CellFacts]:
    """Those whose runs a query of that kind, name and status is about; a label is a workflow's run's alone."""
    if not query.with_cells or query.kind == "workflow" or query.label or (query.workflow and not query.kind):
        return []
    return [cell for cell in cells if query.workflow in ("", cell.name) and query.status in ("", cell.status)]


def _within(page: int, found: int, most: int) -> int:
    return min(max(page, 0), max(-(-found // most) - 1, 0))
