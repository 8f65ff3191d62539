"""The `%durable` line magic: a look at what is kept, why cells run, and what can be done about it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from IPython.core.error import UsageError

from durable_nb._cellcache.cache import CellCode
from durable_nb._cellcache.forecast import Executed, Forecast, Notebook, Planned, order_of, run_all
from durable_nb._facts import Status
from durable_nb._housekeeping import gc
from durable_nb._housekeeping.acts import Acts
from durable_nb._housekeeping.dashboard import dashboard_of
from durable_nb._housekeeping.forget import forget
from durable_nb._housekeeping.inventory import NAMELESS, Inventory, nearest
from durable_nb._housekeeping.listings import gc_table, steps_table, store_table
from durable_nb._housekeeping.planning import plan_table, why_table
from durable_nb._housekeeping.tables import Table, count
from durable_nb._ipython.cell import terms_of
from durable_nb._ipython.compile import tree_of
from durable_nb._ipython.notebook import durable_cells, file_of
from durable_nb._ipython.options import Options, split
from durable_nb._outside import decide, notify
from durable_nb._view.dashboard import Dashboard
from durable_nb._view.listing import Query
from durable_nb.errors import DurableError

if TYPE_CHECKING:
    from durable_nb._engine import Engine
    from durable_nb._ipython.session import Session


@dataclass(frozen=True, slots=True)
class _Command:
    run: Callable[[LineMagic, list[str]], Table | Dashboard]
    usage: str
    least: int = 0
    most: int = 0


class LineMagic:
    """One session's `%durable`."""

    def __init__(self, session: Session, usage: str) -> None:
        """`usage`: what `%durable help` shows."""
        self._session, self._usage = session, usage

    def __call__(self, line: str) -> None:
        """Execute one line. UsageError, in one line, for whatever is wrong with it; then nothing was changed."""
        try:
            words = _event_words(line) or split(line)
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
            show(command.run(self, arguments), name)
        except DurableError as error:
            raise UsageError(f"%durable {name}: {error}") from None

    @property
    def _engine(self) -> Engine:
        return self._session.engine()

    @property
    def _acts(self) -> Acts:
        return Acts(self._session.workflows())

    def help(self, _: list[str]) -> Table:
        return Table("", notes=inspect.cleandoc(self._usage).splitlines())

    # -- looking -------------------------------------------------------------------------------------------------------

    def table(self, _: list[str]) -> Dashboard:
        return self._dashboard(Query())

    def runs(self, _: list[str]) -> Dashboard:
        return self._dashboard(Query(with_cells=False))

    def _dashboard(self, query: Query) -> Dashboard:
        return dashboard_of(self._session.workflows(), query)

    def plan(self, _: list[str]) -> Table:
        cells = Inventory(self._engine).cells()
        interrupted = {cell.name: cell.wake_at for cell in cells if cell.status == Status.INTERRUPTED}
        return plan_table(self._run_all()[0], interrupted)

    def why(self, arguments: list[str]) -> Table:
        (name,) = arguments
        self._check_cell(name)
        found, executed = self._run_all(name)
        now = next((forecast for forecast in found if forecast.name == name), None)
        entries, namespace = Inventory(self._engine).entries, self._session.shell.user_ns
        return why_table(entries, namespace, name, executed.get(name), now)

    def _run_all(self, of: str = "") -> tuple[list[Forecast], dict[str, Executed]]:
        """What Run All would do, and the cells that this kernel has executed as it would find them."""
        inventory, session, shell = Inventory(self._engine), self._session, self._session.shell
        path = file_of(shell.user_ns, session.folder)
        written, saved_at = durable_cells(path) if path else ({}, 0.0)
        executed = {}
        for name, one in session.executed.items():
            newer = written.get(name) if saved_at > one.report.at else None
            cell = self._planned(newer.options, newer.body) if newer else self._planned(one.options, one.body)
            executed[name] = Executed(cell, one.report)
        last = session.executions().last
        order = order_of(written or last, executed)
        if not written:  # the store is all that is known
            stored = [cell.name for cell in reversed(inventory.cells()) if cell.name != NAMELESS]
            order = tuple(dict.fromkeys((*order, *stored)))
        cells = {name: self._planned(one.options, one.body, with_extra=False) for name, one in written.items()}
        notebook = Notebook(order, {**session.executions().elsewhere(), **last}, cells, saved_at)
        return run_all(inventory.entries, shell.user_ns, executed, notebook, session.rerun_next, of), executed

    def _planned(self, options: Options, body: str, *, with_extra: bool = True) -> Planned:
        """A cell as its next execution finds it. `with_extra`: what `--extra` gives counts: the user's code is called."""
        shell = self._session.shell
        try:
            tree, names = tree_of(shell, body)
            terms = terms_of(shell, options if with_extra else replace(options, extra=""))
        except SyntaxError:
            return Planned(None)
        except UsageError as error:  # --extra can't be evaluated now
            return Planned(CellCode(options.name, tree, names), str(error))
        return Planned(CellCode(options.name, tree, names, terms), rerun=bool(options.rerun or options.rerun_step))

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
        self._session.executed.pop(name, None)
        self._session.rerun_next.discard(name)
        self._session.executions().forget(name)
        what = f"{count(gone.entries, 'entry', 'entries')}, {count(gone.steps, 'step')} and {count(gone.runs, 'run')}"
        return Table(f"{name} · forgot {what}; variables in the kernel stay")

    def resume(self, arguments: list[str]) -> Table:
        try:
            lines = [self._acts.resume(arguments[0])] if arguments else self._acts.resume_all()
        except RuntimeError as error:  # a terminal has no loop that runs between inputs
            raise UsageError(f"%durable resume: {error}") from None
        return Table("", notes=lines or ["no interrupted run"])

    def restart(self, arguments: list[str]) -> Table:
        return Table(self._acts.restart(arguments[0]))

    def fork(self, arguments: list[str]) -> Table:
        return Table(self._acts.fork(*arguments))

    def cancel(self, arguments: list[str]) -> Table:
        return Table(self._acts.cancel(arguments[0], "by %durable cancel"))

    def delete(self, arguments: list[str]) -> Table:
        return Table(self._acts.delete(arguments[0]))

    def notify(self, arguments: list[str]) -> Table:
        event_id, text = arguments[0], arguments[1] if len(arguments) > 1 else "null"
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UsageError(
                f"%durable notify: {text!r} is not JSON ({error}), so nothing was sent; a text goes in double quotes"
            ) from None
        self._session.workflows()
        sent = notify(event_id, data)
        waited = f"delivered to {', '.join(sent.run_ids)}" if sent.run_ids else "no run waits for it; kept for those that will"
        return Table(f"{event_id} · {waited}")

    def approve(self, arguments: list[str]) -> Table:
        words, approved, comment = list(arguments), True, ""
        if "--reject" in words:
            words.remove("--reject")
            approved = False
        for word in words:
            option, has_value, value = word.partition("=")
            if option == "--comment" and has_value:
                words.remove(word)
                comment = value
                break
        if len(words) != 2 or any(word.startswith("--") for word in words):
            raise UsageError(f"%durable approve: write '%durable {_COMMANDS['approve'].usage}'; nothing was decided")
        self._session.workflows()
        decide(*words, approved=approved, comment=comment)
        return Table(f"{words[0]} · {words[1]} is {'approved' if approved else 'rejected'}")

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
        known = [*self._session.executed, *(cell.name for cell in Inventory(self._engine).cells())]
        if name == NAMELESS:
            raise DurableError("a cell without a name can't be told from others here: name it; nothing was done")
        if name not in known:
            named = [cell for cell in known if cell != NAMELESS]
            raise DurableError(f"no durable cell {name!r}, so nothing was done{nearest(name, named)}")


_COMMANDS = {
    "": _Command(LineMagic.table, ""),
    "plan": _Command(LineMagic.plan, "plan"),
    "why": _Command(LineMagic.why, "why NAME", 1, 1),
    "rerun": _Command(LineMagic.rerun, "rerun NAME", 1, 1),
    "forget": _Command(LineMagic.forget, "forget NAME", 1, 1),
    "runs": _Command(LineMagic.runs, "runs"),
    "show": _Command(LineMagic.show, "show RUN", 1, 1),
    "resume": _Command(LineMagic.resume, "resume [RUN]", 0, 1),
    "restart": _Command(LineMagic.restart, "restart RUN", 1, 1),
    "fork": _Command(LineMagic.fork, "fork RUN STEP", 2, 2),
    "cancel": _Command(LineMagic.cancel, "cancel RUN", 1, 1),
    "delete": _Command(LineMagic.delete, "delete RUN", 1, 1),
    "notify": _Command(LineMagic.notify, "notify EVENT [JSON]", 1, 2),
    "approve": _Command(LineMagic.approve, "approve RUN STEP [--reject] [--comment=TEXT]", 2, 4),
    "gc": _Command(LineMagic.gc, "gc [--max-size 2GB]", 0, 2),
    "store": _Command(LineMagic.store, "store"),
    "help": _Command(LineMagic.help, "help"),
}


_NOTIFY = re.compile(r"""\s*(notify)\s+("[^"]*"|'[^']*'|\S+)(?:\s+(.*\S))?\s*""", re.DOTALL)


def _event_words(line: str) -> list[str]:
    """The words of a `notify`, whose JSON is one word as it stands; [] for any other line."""
    found = _NOTIFY.fullmatch(line)
    if found is None:
        return []
    words = [found[1], found[2].strip("\"'"), *([found[3]] if found[3] else [])]
    return [*words[:2], *(word[1:-1] if word[0] == word[-1] == "'" else word for word in words[2:])]


def show(found: Table | Dashboard, command: str) -> None:
    """Display it: html where there is a front end for it, text everywhere."""
    from IPython.core.getipython import get_ipython
    from IPython.display import display

    if getattr(get_ipython(), "kernel", None) is None:
        found.show()
    elif isinstance(found, Dashboard):
        display(found)  # type: ignore[no-untyped-call]
    else:
        bundle = {"text/plain": found.text(), "text/html": found.html()}
        display(bundle, raw=True, metadata={"durable_nb": {"command": command}})  # type: ignore[no-untyped-call]
