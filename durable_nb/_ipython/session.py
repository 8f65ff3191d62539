"""A notebook's session: its store and engine, and what is known of the cells that it has executed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from durable_nb._files import default_store
from durable_nb._ipython.background import BackgroundCells

if TYPE_CHECKING:
    from durable_nb._cellcache.executions import LastExecutions
    from durable_nb._cellcache.report import ExecutionReport
    from durable_nb._engine import Engine
    from durable_nb._engine.muting import Muting
    from durable_nb._engine.workflows import Workflows
    from durable_nb._ipython.options import Options


@dataclass(frozen=True, slots=True)
class ExecutedText:
    """A cell that this kernel has executed: its options, its text, and how that went."""

    options: Options
    body: str
    report: ExecutionReport


class Session:
    """The extension in one shell. The store's path is fixed at load; it is opened by the first durable cell."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.path: Path = default_store()
        self.folder = Path.cwd()
        self.background = BackgroundCells()
        self._engine: Any = None
        self._workflows: Any = None
        self.set_variables: list[tuple[Any, Any]] = []
        """Context variables that the last durable cell set."""
        self.executed: dict[str, ExecutedText] = {}
        """The last execution of each named cell, in the order in which they were executed first."""
        self.rerun_next: set[str] = set()
        """Cells that are to run anew at their next execution."""
        self._executions: LastExecutions | None = None

    def close(self) -> None:
        """Close the store."""
        if self._engine is not None:
            self._engine.store.close()

    def wait(self, line: str, body: str, stack: list[str]) -> None:
        """`run`, for synchronous code."""
        from durable_nb._door import wait_for

        wait_for(self.run(line, body, stack))

    async def run(self, line: str, body: str, stack: list[str]) -> None:
        """Execute one durable cell; the transformer's code awaits this."""
        from durable_nb._ipython import cell as cells
        from durable_nb._ipython.options import parse, refuse_magic_below
        from durable_nb._ipython.tracebacks import show_users_lines

        options = parse(line, stack)
        refuse_magic_below(body)
        with one_line_errors():
            engine = self.engine()
        kernel = getattr(self.shell, "kernel", None)
        request = (kernel.get_parent("shell") or {}) if kernel is not None else {}  # the message that asked for this cell
        live = bool(request.get("content", {}).get("allow_stdin"))
        cell_id = str(request.get("metadata", {}).get("cellId") or "")
        with _captured(self.shell, options.capture):
            rerun = options.name in self.rerun_next
            execution = cells.CellExecution(
                self.shell,
                engine,
                options,
                body,
                rerun=rerun,
                live=live,
                cell_id=cell_id,
                folder=self.folder,
                background=self.background,
            )
            before = dict(self.shell.user_ns)
            if options.name:
                self.executions().enter(options.name)

            def ended() -> None:
                if execution.begun:
                    self.rerun_next.discard(options.name)
                if options.name and (execution.begun or execution.report.restored):
                    self.executed[options.name] = ExecutedText(options, body, execution.report)
                    self._note(options, execution.report, before)

            in_front = True
            try:
                if options.background and kernel is None:
                    execution.status.warn("a terminal executes nothing between two inputs: the cell is executed in front")
                if options.background and kernel is not None:
                    in_front = False
                    await self.background.begin(execution, ended)
                else:
                    await execution.run()
                self.set_variables = execution.set_variables
            except BaseException as error:
                show_users_lines(self.shell, error)
                raise
            finally:
                if in_front:
                    ended()

    def _note(self, options: Options, report: ExecutionReport, before: dict[str, Any]) -> None:
        """A named cell was executed; `before`: what the notebook held."""
        from durable_nb._cellcache.executions import NOT_COMPLETED, LastExecution

        now, changed = self.shell.user_ns, report.names_changed()
        made = {name for name, value in now.items() if name in changed or before.get(name, before) is not value}
        unstored = f"not stored: {report.not_stored}" if report.not_stored else NOT_COMPLETED
        last = LastExecution(
            report.key,
            report.components.get("code", ""),
            report.at,
            self.executions().sources(report.inputs(), before),
            tuple(sorted(name for name in made if not name.startswith("_"))),
            "" if report.kept is not None else unstored,
            options.ttl_s,
            options.rerun,
        )
        self.executions().note(options.name, last, now)

    def cell_ended(self) -> None:
        """Any cell was executed, durable or not."""
        if self._executions is not None:
            self._executions.cell_ended(self.shell.user_ns)

    def executions(self) -> LastExecutions:
        """What is known of the order in which this notebook's cells are executed."""
        from durable_nb._cellcache.executions import LastExecutions
        from durable_nb._ipython.notebook import file_of

        notebook = file_of(self.shell.user_ns, self.folder)
        if self._executions is None or self._executions.notebook != notebook:
            self._executions = LastExecutions(self.path, notebook)
        return self._executions

    def engine(self) -> Engine:
        """The engine on this session's store, which is opened now if it wasn't, or is no longer where it was."""
        if self._engine is not None and not self._engine.store.is_in_place():
            self._engine.store.close()
            self._engine = self._workflows = None
            sys.stderr.write(f"durable_nb: the store {self.path} was deleted or replaced; it is opened anew\n")
        if self._engine is None:
            from durable_nb._engine import Engine
            from durable_nb._engine.workflows import Workflows
            from durable_nb._ipython.notebook import path_of
            from durable_nb._store import Store

            self._engine = Engine(Store(self.path))
            self._engine.shared.muting = self._muting
            self._workflows = Workflows(self._engine, main=lambda: path_of(self.shell.user_ns))
        return cast("Engine", self._engine)

    def _muting(self) -> Muting:
        from durable_nb._ipython.host import NotebookMuting  # loading the extension may open the store, and needs none of it

        return NotebookMuting(self.shell)

    def workflows(self) -> Workflows:
        """The engine for workflows, on the same store."""
        self.engine()
        return cast("Workflows", self._workflows)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What went wrong before anything ran needs no traceback."""
    from durable_nb.errors import DurableError

    try:
        yield
    except DurableError as error:
        line = f"{type(error).__name__}: {error}"
        error._render_traceback_ = lambda: [line]  # type: ignore[attr-defined]
        raise


@contextlib.contextmanager
def _captured(shell: Any, line: str | None) -> Any:
    """What a `%%capture` above the magic asks for; its own implementation runs cells synchronously."""
    if line is None:
        yield
        return
    from IPython.core import magic_arguments
    from IPython.core.magics.execution import ExecutionMagics
    from IPython.utils.capture import capture_output

    wanted = magic_arguments.parse_argstring(ExecutionMagics.capture, line)  # type: ignore[no-untyped-call]
    with capture_output(not wanted.no_stdout, not wanted.no_stderr, not wanted.no_display) as captured:
        yield
    if wanted.output:
        shell.user_ns[wanted.output] = captured
