"""`%load_ext durable_nb`: the magic, its input transformer, and the session that executes durable cells."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from durable_nb._cellcache import inotify
from durable_nb._cellcache.world import seeds_noticed
from durable_nb._current import use_engine
from durable_nb._files import default_store
from durable_nb._ipython.transform import DurableTransformer

if TYPE_CHECKING:
    from durable_nb._engine import Engine
    from durable_nb._ipython.cell import Story
    from durable_nb._ipython.itinerary import Itinerary
    from durable_nb._workflows import Workflows


class Session:
    """The extension in one shell. The store's path is fixed at load; it is opened by the first durable cell."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.path: Path = default_store()
        self.folder = Path.cwd()
        self._engine: Any = None
        self._found: Any = None
        self._set_variables: list[tuple[Any, Any]] = []
        self.stories: dict[str, Story] = {}
        """How the last execution of each named cell went, in the order in which they were executed first."""
        self.rerun_next: set[str] = set()
        """Cells that are to run anew at their next execution."""
        self._itinerary: Itinerary | None = None
        self._noticing = contextlib.ExitStack()
        self._transformer = DurableTransformer(shell)

    def load(self) -> None:
        """Register everything."""
        shell = self.shell
        shell.register_magic_function(self.magic, "cell", "durable")
        shell.register_magic_function(self.line_magic, "line", "durable")
        shell.input_transformers_cleanup.append(self._transformer)
        shell.events.register("pre_execute", self._enter_cell)
        shell.events.register("post_execute", self._leave_cell)
        shell._durable_run, shell._durable_wait = self.run, self.wait
        self._noticing.enter_context(seeds_noticed())
        inotify.start(str(self.folder))
        use_engine(self.workflows)

    def unload(self) -> None:
        """Take everything back; the store is closed."""
        shell = self.shell
        for kind in ("cell", "line"):
            shell.magics_manager.magics[kind].pop("durable", None)
        with contextlib.suppress(ValueError):
            shell.input_transformers_cleanup.remove(self._transformer)
        shell.events.unregister("pre_execute", self._enter_cell)
        shell.events.unregister("post_execute", self._leave_cell)
        del shell._durable_run, shell._durable_wait
        self._noticing.close()
        use_engine(None)
        if self._engine is not None:
            self._engine.store.close()

    def _enter_cell(self) -> None:
        self._transformer.in_cell = True

    def _leave_cell(self) -> None:
        self._transformer.in_cell = False
        # A durable cell runs in a task; this is called in the context that later cells run in. What the cell set there
        # (numpy's print options are a context variable) holds on, as after a plain cell.
        for variable, value in self._set_variables:
            variable.set(value)
        self._set_variables = []

    def magic(self, line: str, cell: str) -> None:
        """Run the cell as a durable function: its steps and its result are kept on disk.

        %%durable [NAME] [--rerun | --rerun=STEP] [--ttl DURATION] [--ignore NAMES] [--skip NAMES] [--extra EXPR]
                  [--max-wait DURATION] [--time] [--quiet]

        Run again with nothing changed, by a new kernel too, the cell's variables and outputs are restored and no code of it
        runs. Interrupted, failed or killed, it goes on after the last completed step: await durable.run("name", function,
        ...), durable.call(...), durable.sleep(...) are its steps.

        --rerun      run the cell and all its steps anew; --rerun=STEP: only the steps of that name
        --ttl        run the cell where its entry is older than this ("12h", "7d")
        --ignore     variables, with commas between them, that don't count as inputs
        --skip       variables that are not stored, and so not restored
        --extra      an expression whose value counts as an input besides: --extra "model.version"
        --max-wait   end the cell where it would wait longer than this ("90s", "15m"); run it again to go on
        --time       print the time it took
        --quiet      no line above the output, no view
        """
        self.wait(line, f"# %%durable {line}\n{cell}", [])

    def line_magic(self, line: str) -> None:
        """Look at what durable cells have kept, and say what is to become of it.

        %durable                   the cells and runs of this store
        %durable plan              what Run All would run, and what that is known to take
        %durable why NAME          why the cell ran, or would run: what changed since it was stored
        %durable rerun NAME        run the cell and all its steps anew at its next execution
        %durable forget NAME       forget its entries, steps and runs
        %durable runs              the runs, newest first
        %durable show RUN          a run's steps; RUN is an id, or the name of a cell or workflow
        %durable resume [RUN]      go on with a workflow's run, or with all interrupted ones
        %durable cancel RUN        stop a workflow's run
        %durable gc [--max-size 2GB]   remove what nothing refers to, and the entries worth least above that size
        %durable store             where the store is, and what lies in it
        %durable help              these lines
        """
        from durable_nb._ipython.magic import LineMagic

        with _one_line_errors():
            LineMagic(self)(line)

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
        with _one_line_errors():
            engine = self.engine()
        request = self._request()
        live = bool(request.get("content", {}).get("allow_stdin"))
        cell_id = str(request.get("metadata", {}).get("cellId") or "")
        with _captured(self.shell, options.capture):
            asked = replace(options, rerun=True, rerun_step="") if options.name in self.rerun_next else options
            execution = cells.CellExecution(self.shell, engine, asked, body, live=live, cell_id=cell_id, folder=self.folder)
            execution.story.options = options
            before = dict(self.shell.user_ns)
            if options.name:
                self.itinerary().enter(options.name)
            try:
                await execution.run()
                self._set_variables = execution.set_variables
            except BaseException as error:
                show_users_lines(self.shell, error)
                raise
            finally:
                if execution.begun:
                    self.rerun_next.discard(options.name)
                if options.name and (execution.begun or execution.story.restored):
                    self.stories[options.name] = execution.story
                    self._note_visit(execution.story, before)

    def _note_visit(self, story: Story, before: dict[str, Any]) -> None:
        """A named cell was executed; `before`: what the notebook held."""
        from durable_nb._ipython.itinerary import NOT_COMPLETED, Visit

        now = self.shell.user_ns
        changed = {label.partition(" ")[2] for label in story.changed}
        made = {name for name, value in now.items() if name in changed or before.get(name, before) is not value}
        read = {label.partition(" ")[2] for label in story.components if label.startswith("global ")}
        unstored = f"not stored: {story.not_stored}" if story.not_stored else NOT_COMPLETED
        visit = Visit(
            story.key,
            story.components.get("code", ""),
            story.at,
            self.itinerary().sources(read, before),
            tuple(sorted(name for name in made if not name.startswith("_"))),
            "" if story.kept is not None else unstored,
            story.options.ttl_s,
            story.options.rerun,
        )
        self.itinerary().note(story.options.name, visit, now)

    def itinerary(self) -> Itinerary:
        """What is known of the order in which this notebook's cells are executed."""
        from durable_nb._ipython.itinerary import Itinerary
        from durable_nb._ipython.notebook import file_of

        notebook = file_of(self.shell.user_ns, self.folder)
        if self._itinerary is None or self._itinerary.notebook != notebook:
            self._itinerary = Itinerary(self.path, notebook)
        return self._itinerary

    def engine(self) -> Engine:
        """The engine on this session's store, which is opened now if it wasn't, or is no longer where it was."""
        if self._engine is not None and not self._engine.store.is_in_place():
            self._engine.store.close()
            self._engine = self._found = None
            sys.stderr.write(f"durable_nb: the store {self.path} was deleted or replaced; it is opened anew\n")
        if self._engine is None:
            from durable_nb._engine import Engine
            from durable_nb._ipython.host import NotebookMuting
            from durable_nb._ipython.notebook import path_of
            from durable_nb._store import Store
            from durable_nb._workflows import Workflows

            self._engine = Engine(Store(self.path))
            self._engine.muting = lambda: NotebookMuting(self.shell)
            self._found = Workflows(self._engine, main=lambda: path_of(self.shell.user_ns))
        return cast("Engine", self._engine)

    def workflows(self) -> Workflows:
        """The engine for workflows, on the same store."""
        self.engine()
        return cast("Workflows", self._found)

    def _request(self) -> dict[str, Any]:
        """The message that asked for this cell; empty where no kernel is."""
        kernel = getattr(self.shell, "kernel", None)
        return (kernel.get_parent("shell") or {}) if kernel is not None else {}


@contextlib.contextmanager
def _one_line_errors() -> Any:
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


def load(shell: Any) -> None:
    """Load the extension into `shell` and say where its store is."""
    session = Session(shell)
    session.load()
    shell._durable_session = session
    print(f"durable_nb: this notebook's store is {session.path}{_on_disk(session.path)}{_waiting(session)}")  # noqa: T201  what loading says


def _on_disk(store: Path) -> str:
    from durable_nb._disks import file_system_of

    advice = file_system_of(store).advice
    return f"\ndurable_nb: {advice}" if advice else ""


def _waiting(session: Session) -> str:
    """What there is to be gone on with, and how; a line each for cells and for runs of workflows. Cells of another notebook
    beside this one are its own affair."""  # fmt: skip
    from durable_nb._adoption import exists_beside, may_adopt
    from durable_nb._glance import waiting

    runs = waiting(session.path)
    others = [repr(run.id) for run in runs if run.kind != "cell"]
    cells = [run for run in runs if run.kind == "cell"]
    if cells:
        from durable_nb._ipython.notebook import origin_of

        here = origin_of("", session.shell.user_ns, session.folder, session.path)
        exists = partial(exists_beside, session.path)
        cells = [run for run in cells if may_adopt(run.origin, replace(here, code=run.origin.code), exists)]
    names = list(dict.fromkeys(f"cell {run.name!r}" for run in cells))
    said = f"\ndurable_nb: run {_listed(names)} again to go on from where it stopped" if names else ""
    return said + (f"\ndurable_nb: durable.resume() goes on with {_listed(others)}" if others else "")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def unload(shell: Any) -> None:
    """Undo `load`."""
    shell._durable_session.unload()
    del shell._durable_session
