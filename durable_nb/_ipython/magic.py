"""The `%durable` line magic: a look at what is kept, why cells run, and what can be done about it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from IPython.core.error import UsageError

from durable_nb._cellcache import explain
from durable_nb._cellcache.entries import Manifest
from durable_nb._cellcache.keys import said
from durable_nb._cellcache.world import Around
from durable_nb._clock import say_duration
from durable_nb._current import workflow_functions
from durable_nb._facts import Status
from durable_nb._housekeeping import gc
from durable_nb._housekeeping.forget import forget
from durable_nb._housekeeping.inventory import NAMELESS, Inventory, RunFacts, nearest
from durable_nb._housekeeping.listings import cells_table, gc_table, runs_table, say_seconds, steps_table, store_table
from durable_nb._housekeeping.tables import Table, count, say_when
from durable_nb._ipython.forecast import (
    DEPENDS,
    HIT,
    NOTHING_STORED,
    RUN,
    UNKNOWN,
    Forecast,
    differences,
    known_of,
    of_machine,
    run_all,
)
from durable_nb._ipython.itinerary import NOT_COMPLETED
from durable_nb._ipython.notebook import file_of
from durable_nb._ipython.options import split
from durable_nb._records import scope_of
from durable_nb.errors import DurableError

if TYPE_CHECKING:
    from durable_nb._engine import Engine
    from durable_nb._ipython.cell import Story
    from durable_nb._ipython.extension import Session

_RUNS_SHOWN = 30


@dataclass(frozen=True, slots=True)
class _Command:
    run: Callable[[LineMagic, list[str]], Table]
    usage: str
    least: int = 0
    most: int = 0


class LineMagic:
    """One session's `%durable`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, line: str) -> None:
        """Execute one line. UsageError, in one line, for whatever is wrong with it; then nothing was changed."""
        try:
            words = split(line)
        except ValueError as error:
            raise UsageError(f"%durable {line}: {error}; nothing was done") from None
        name, arguments = (words[0], words[1:]) if words else ("", [])
        command = _COMMANDS.get(name)
        if command is None:
            known = nearest(name, [c for c in _COMMANDS if c])
            raise UsageError(f"%durable: unknown command {name!r}, so nothing was done{known}")
        if not command.least <= len(arguments) <= command.most:
            raise UsageError(f"%durable {name}: write '%durable {command.usage}'; nothing was done")
        try:
            show(command.run(self, arguments), name or "table")
        except DurableError as error:
            raise UsageError(f"%durable {name}: {error}") from None

    @property
    def _engine(self) -> Engine:
        return self._session.engine()

    @property
    def _stories(self) -> dict[str, Story]:
        return self._session.stories

    def help(self, _: list[str]) -> Table:
        return Table("", notes=inspect.cleandoc(type(self._session).line_magic.__doc__ or "").splitlines())

    # -- looking -------------------------------------------------------------------------------------------------------

    def table(self, _: list[str]) -> Table:
        inventory = Inventory(self._engine)
        cells, runs = inventory.cells(), [run for run in inventory.runs() if run.kind != "cell"]
        notes = []
        if runs:
            notes = ["", runs_table("runs of workflows", runs[:10]).text()]
        if not cells:
            notes = ["  none" if runs or inventory.unread() else "nothing yet: put '%%durable NAME' above a cell", *notes]
        return cells_table(inventory, cells, notes)

    def plan(self, _: list[str]) -> Table:
        found = self._run_all()
        going_on = {cell.name: cell.wake_at for cell in Inventory(self._engine).cells() if cell.status == Status.INTERRUPTED}
        for n, forecast in enumerate(found):
            if forecast.why in (NOT_COMPLETED, NOTHING_STORED) and forecast.name in going_on:
                wake_at = going_on[forecast.name]
                wakes = f", next wake {say_when(wake_at)}" if wake_at is not None else ""
                found[n] = replace(forecast, why=f"goes on from where it stopped{wakes}")
        rows = [(f.name, f.what, f.why, say_seconds(f.cost_s)) for f in found]
        return Table("Run All, as things are now", ("cell", "would", "why", "takes"), rows, [_sum(found)])

    def _run_all(self, of: str = "") -> list[Forecast]:
        inventory, session = Inventory(self._engine), self._session
        shell, itinerary = session.shell, session.itinerary()
        path = file_of(shell.user_ns, session.folder)
        known = known_of(itinerary.visits, itinerary.elsewhere(), self._stories, path)
        if not known.written:  # the store is all that is known
            stored = [cell.name for cell in reversed(inventory.cells()) if cell.name != NAMELESS]
            known = replace(known, order=tuple(dict.fromkeys((*known.order, *stored))))
        return run_all(shell, inventory.entries, self._stories, session.rerun_next, known, of)

    def why(self, arguments: list[str]) -> Table:
        (name,) = arguments
        self._check_cell(name)
        entries = Inventory(self._engine).entries
        story = self._stories.get(name)
        newest = next(entries.manifests(scope_of(name), limit=1), None)
        now = next((forecast for forecast in self._run_all(name) if forecast.name == name), None)
        if story is not None and now is not None:
            return Table("", notes=[*_told(story, now), *self._differences_now(story, now)])
        would = [f"executed now, it would {_said(now)}"] if now is not None and now.what != UNKNOWN else []
        if newest is None:
            return Table("", notes=[f"{name} · no entry is stored, and it was not executed in this kernel", *would])
        notes = explain.decode(entries.notes(scope_of(name), newest))
        changes = of_machine(newest.world).changes(Around({}, entries.seal))
        return Table("", notes=[*_entry_tree(name, newest, notes, changes), *would])

    def _differences_now(self, story: Story, now: Forecast) -> list[str]:
        """Where the cell would run now, what differs from what is stored."""
        if now.what != RUN:
            return []
        try:
            nearest, found = differences(self._session.shell, Inventory(self._engine).entries, story)
        except UsageError:  # --extra can't be evaluated now, as `now` says
            return []
        if nearest is None or not found:
            return []
        return [f"compared with the entry of {say_when(nearest.created_at)}:", *_branches([(d.what, d.details) for d in found])]

    def runs(self, _: list[str]) -> Table:
        runs = Inventory(self._engine).runs()
        table = runs_table(f"runs in {self._engine.store.path}", runs[:_RUNS_SHOWN])
        more = len(runs) - _RUNS_SHOWN
        return Table(table.title, table.columns, table.rows, [f"and {count(more, 'older one')}"] if more > 0 else [])

    def show(self, arguments: list[str]) -> Table:
        inventory = Inventory(self._engine)
        run = inventory.find_run(arguments[0])
        return steps_table(run, inventory)

    def store(self, _: list[str]) -> Table:
        return store_table(Inventory(self._engine))

    # -- doing ---------------------------------------------------------------------------------------------------------

    def rerun(self, arguments: list[str]) -> Table:
        (name,) = arguments
        self._check_cell(name)
        self._session.rerun_next.add(name)
        return Table(f"{name} · runs anew, with all its steps, at its next execution in this kernel")

    def forget(self, arguments: list[str]) -> Table:
        (name,) = arguments
        self._check_cell(name)
        gone = forget(self._engine, name)
        self._stories.pop(name, None)
        self._session.rerun_next.discard(name)
        self._session.itinerary().forget(name)
        what = f"{count(gone.entries, 'entry', 'entries')}, {count(gone.steps, 'step')} and {count(gone.runs, 'run')}"
        return Table(f"{name} · forgot {what}; variables in the kernel stay")

    def resume(self, arguments: list[str]) -> Table:
        inventory, workflows = Inventory(self._engine), self._session.workflows()
        if arguments:
            run = inventory.find_run(arguments[0])
            self._check_workflow(run, "run the cell again to go on with it")
            if run.status == Status.COMPLETED:
                return Table(f"{run.id} · is completed; nothing to do")
            waiting = [run]
        else:
            waiting = [run for run in inventory.runs() if run.kind != "cell" and run.status == Status.INTERRUPTED]
        lines = []
        for run in waiting:
            if run.name in workflow_functions:
                try:
                    workflows.resume(run.id, take_over=False)
                except RuntimeError as error:  # a terminal has no loop that goes on between inputs
                    raise UsageError(f"%durable resume: {error}") from None
                lines.append(f"{run.id} · goes on ({run.name})")
            else:
                lines.append(f"{run.id} · waits: its workflow {run.name!r} is not defined here. Run the cell that defines it")
        return Table("", notes=lines or ["no interrupted run"])

    def cancel(self, arguments: list[str]) -> Table:
        run = Inventory(self._engine).find_run(arguments[0])
        self._check_workflow(run, f"interrupt the kernel to stop it, or '%durable forget {run.name}' to drop what it kept")
        if run.status in (Status.COMPLETED, Status.FAILED, Status.CANCELLED):
            return Table(f"{run.id} · is {run.status} already")
        self._session.workflows().cancel(run.id, "by %durable cancel")
        return Table(f"{run.id} · is being cancelled; its completed steps are kept")

    def gc(self, arguments: list[str]) -> Table:
        try:
            max_size = gc.default_max_size()
            if arguments:
                option, _, value = arguments[0].partition("=")
                if option != "--max-size" or (value and len(arguments) > 1) or not (value or arguments[1:]):
                    raise UsageError(f"%durable gc: write '%durable {_COMMANDS['gc'].usage}'; nothing was removed")
                max_size = gc.parse_size(value or arguments[1])
        except ValueError as error:
            raise UsageError(f"%durable gc: {error}; nothing was removed") from None
        return gc_table(gc.collect(self._engine, max_size))

    # -- checks --------------------------------------------------------------------------------------------------------

    def _check_cell(self, name: str) -> None:
        known = [*self._stories, *(cell.name for cell in Inventory(self._engine).cells())]
        if name == NAMELESS:
            raise DurableError("a cell without a name can't be told from others here: name it; nothing was done")
        if name not in known:
            named = [cell for cell in known if cell != NAMELESS]
            raise DurableError(f"no durable cell {name!r}, so nothing was done{nearest(name, named)}")

    @staticmethod
    def _check_workflow(run: RunFacts, instead: str) -> None:
        if run.kind == "cell":
            raise DurableError(f"{run.id} is a run of the cell {run.name!r}: {instead}; nothing was done")


_COMMANDS = {
    "": _Command(LineMagic.table, ""),
    "plan": _Command(LineMagic.plan, "plan"),
    "why": _Command(LineMagic.why, "why NAME", 1, 1),
    "rerun": _Command(LineMagic.rerun, "rerun NAME", 1, 1),
    "forget": _Command(LineMagic.forget, "forget NAME", 1, 1),
    "runs": _Command(LineMagic.runs, "runs"),
    "show": _Command(LineMagic.show, "show RUN", 1, 1),
    "resume": _Command(LineMagic.resume, "resume [RUN]", 0, 1),
    "cancel": _Command(LineMagic.cancel, "cancel RUN", 1, 1),
    "gc": _Command(LineMagic.gc, "gc [--max-size 2GB]", 0, 2),
    "store": _Command(LineMagic.store, "store"),
    "help": _Command(LineMagic.help, "help"),
}


def show(table: Table, command: str) -> None:
    """Display it: html where there is a front end for it, text everywhere."""
    from IPython.core.getipython import get_ipython
    from IPython.display import display

    if getattr(get_ipython(), "kernel", None) is None:
        sys.stdout.write(table.text() + "\n")
        return
    bundle = {"text/plain": table.text(), "text/html": table.html()}
    display(bundle, raw=True, metadata={"durable_nb": {"command": command}})  # type: ignore[no-untyped-call]


# -- trees -------------------------------------------------------------------------------------------------------------


def _sum(found: list[Forecast]) -> str:
    if not found:
        return "no durable cell was executed in this kernel, and none is stored"
    by = {what: [f for f in found if f.what == what] for what in (RUN, DEPENDS, HIT, UNKNOWN)}
    cost = {what: sum(f.cost_s or 0.0 for f in some) for what, some in by.items()}
    parts = []
    if by[RUN]:
        recorded = f", {say_duration(cost[RUN])} as recorded" if any(f.cost_s is not None for f in by[RUN]) else ""
        parts.append(f"{count(len(by[RUN]), 'cell')} would run{recorded}")
    if by[DEPENDS]:
        parts.append(f"{count(len(by[DEPENDS]), 'cell')} may run, up to {say_duration(cost[DEPENDS])}")
    if by[HIT]:
        parts.append(f"{count(len(by[HIT]), 'cell')} would be restored, which saves {say_duration(cost[HIT])}")
    if by[UNKNOWN]:
        parts.append(f"{count(len(by[UNKNOWN]), 'cell')} not executed here yet: their code is known when they are")
    return "; ".join(parts)


def _said(now: Forecast) -> str:
    """What a cell would do, after 'it would'."""
    return {HIT: "be restored", RUN: f"run: {now.why}"}.get(now.what, f"be restored or run, depending {now.why}")


def _told(story: Story, now: Forecast) -> list[str]:
    name, nearest = story.options.name, story.nearest
    if story.restored and nearest is not None:
        saved = f"saved {say_duration(nearest.took_s)}"
        lines = [f"{name} · {say_when(story.at)} restored from the entry of {say_when(nearest.created_at)}, {saved}"]
    else:
        lines = [f"{name} · {say_when(story.at)} ran: {story.why}"]
        if nearest is not None:
            lines.append(f"compared with the entry of {say_when(nearest.created_at)}:")
            lines += _branches([(d.what, d.details) for d in story.differences] or [("nothing differs", ())])
        if story.not_stored:
            lines.append(f"not stored: {story.not_stored}")
    lines += _opaque(list(story.opaque))
    return [*lines, f"executed again now, it would {_said(now)}"]


def _entry_tree(name: str, manifest: Manifest, notes: explain.Notes, changes: list[str]) -> list[str]:
    lines = [f"{name} · not executed in this kernel; its newest entry, of {say_when(manifest.created_at)}, was made of:"]
    branches: list[tuple[str, tuple[str, ...]]] = []
    for label in manifest.components:
        words = notes.values.get(label)
        branches.append((said(label), (words,) if words else ()))
    branches += [(f"{file.path} ({file.how})", ()) for file in manifest.world.files]
    branches += [(f"{package} {version}", ()) for package, version in manifest.versions.items()]
    lines += _branches(branches)
    lines += _opaque(notes.opaque)
    return [*lines, f"since then: {', '.join(changes)}" if changes else "the files it read are as they were"]


def _opaque(opaque: list[str]) -> list[str]:
    return ["inputs that are known in part only:", *_branches([(text, ()) for text in opaque])] if opaque else []


def _branches(found: list[tuple[str, tuple[str, ...]]]) -> list[str]:
    lines = []
    for n, (what, details) in enumerate(found):
        last = n == len(found) - 1
        lines.append(("└─ " if last else "├─ ") + what)
        lines += [("   " if last else "│  ") + f"  {line}" for line in details]
    return lines
