"""`%load_ext durable_nb`: registers the magics and the input transformer of a session with the shell."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from durable_nb._cellcache import inotify
from durable_nb._cellcache.generators import seeds_noticed
from durable_nb._cellcache.imports import imports_noticed
from durable_nb._cellcache.settings import KNOWN, remember_beginning
from durable_nb._current import use_engine
from durable_nb._ipython.session import Session, one_line_errors
from durable_nb._ipython.settings import settings_of
from durable_nb._ipython.transform import DurableTransformer

if TYPE_CHECKING:
    from durable_nb._records import RunRecord


class Extension:
    """What is registered with one shell, on behalf of its session."""

    def __init__(self, shell: Any) -> None:
        self._shell, self.session = shell, Session(shell)
        self._noticing = contextlib.ExitStack()
        self._transformer = DurableTransformer(shell)

    def load(self) -> None:
        """Register everything, and say where the store is."""
        shell, session = self._shell, self.session
        shell.register_magic_function(self.magic, "cell", "durable")
        shell.register_magic_function(self.line_magic, "line", "durable")
        shell.input_transformers_cleanup.append(self._transformer)
        shell.events.register("pre_execute", self._enter_cell)
        shell.events.register("post_execute", self._leave_cell)
        shell._durable_run, shell._durable_wait = session.run, session.wait
        self._noticing.enter_context(seeds_noticed())
        self._noticing.enter_context(imports_noticed())
        remember_beginning((*KNOWN, *settings_of(shell)))
        inotify.start(str(session.folder))
        use_engine(session.workflows)
        self._displays = shell.display_formatter.ipython_display_formatter
        self._displays.for_type_by_name("durable_nb._workflow", "Run", _show_run)
        from durable_nb._disks import file_system_of

        advice = file_system_of(session.path).advice
        said = f"durable_nb: this notebook's store is {session.path}" + (f"\ndurable_nb: {advice}" if advice else "")
        print(said + _waiting(session))  # noqa: T201  what loading says
        with contextlib.suppress(RuntimeError):  # a terminal has no loop yet
            asyncio.get_running_loop().call_later(_IDLE_S, _load_the_rest, session)

    def unload(self) -> None:
        """Take everything back; the store is closed."""
        shell = self._shell
        for kind in ("cell", "line"):
            shell.magics_manager.magics[kind].pop("durable", None)
        with contextlib.suppress(ValueError):
            shell.input_transformers_cleanup.remove(self._transformer)
        shell.events.unregister("pre_execute", self._enter_cell)
        shell.events.unregister("post_execute", self._leave_cell)
        del shell._durable_run, shell._durable_wait
        self._noticing.close()
        use_engine(None)
        self._displays.pop("durable_nb._workflow.Run", None)
        self.session.close()

    def _enter_cell(self) -> None:
        self._transformer.in_cell = True
        self.session.background.in_cell = True
        self.session.background.count += 1

    def _leave_cell(self) -> None:
        self._transformer.in_cell = False
        # A durable cell runs in a task; this is called in the context that later cells run in. What the cell set there
        # (numpy's print options are a context variable) holds on, as after a plain cell.
        for variable, value in self.session.set_variables:
            variable.set(value)
        self.session.set_variables = []
        self.session.background.in_cell = False
        self.session.background.bind()
        self.session.cell_ended()

    def magic(self, line: str, cell: str) -> None:
        """Run the cell as a durable function: its steps and its result are kept on disk.

        %%durable [NAME] [--rerun | --rerun=STEP] [--ttl DURATION] [--ignore NAMES] [--skip NAMES] [--extra EXPR]
                  [--max-wait DURATION] [--background] [--time] [--quiet]

        Run again with nothing changed, by a new kernel too, the cell's variables and outputs are restored and no code of it
        runs. Interrupted, failed or killed, it resumes after the last completed step: await durable.run("name", function,
        ...), durable.call(...), durable.sleep(...) are its steps.

        --rerun      run the cell and all its steps anew; --rerun=STEP: only the steps of that name
        --ttl        run the cell where its entry is older than this ("12h", "7d")
        --ignore     variables, with commas between them, that don't count as inputs
        --skip       variables that are not stored, and so not restored
        --extra      an expression whose value counts as an input besides: --extra "model.version"
        --max-wait   end the cell where it would wait longer than this ("90s", "15m"); run it again to resume
        --background return at once: the cell is executed on the notebook as it is now, and binds its names when it has ended
        --time       print the time it took
        --quiet      no line above the output, no view
        """
        self.session.wait(line, f"# %%durable {line}\n{cell}", [])

    def line_magic(self, line: str) -> None:
        """Look at what durable cells have kept, and say what is to become of it.

        %durable                   the cells and runs of this store: durable.dashboard()
        %durable plan              what Run All would run, and what that is known to take
        %durable why NAME          why the cell ran, or would run: what changed since it was stored
        %durable rerun NAME        run the cell and all its steps anew at its next execution
        %durable forget NAME       forget its entries, steps and runs
        %durable runs              the runs, newest first
        %durable show RUN          a run's steps; RUN is an id, or the name of a cell or workflow
        %durable resume [RUN]      resume a workflow's run, or all interrupted ones
        %durable restart RUN       begin a workflow's run anew
        %durable fork RUN STEP     begin a new run that keeps what this one did before that step
        %durable cancel RUN        stop a workflow's run
        %durable delete RUN        remove a finished run of a workflow
        %durable notify EVENT [JSON]   send an event to the runs that wait for it, or will
        %durable approve RUN STEP [--reject] [--comment=TEXT]   decide an approval that waits
        %durable gc [--max-size 2GB]   remove what nothing refers to, and the entries worth least above that size
        %durable store             where the store is, and what lies in it
        %durable help              these lines
        """
        from durable_nb._ipython.magic import LineMagic

        with one_line_errors():
            LineMagic(self.session, self.line_magic.__doc__ or "")(line)


_IDLE_S = 0.05
"""After so long a front end has heard that the extension is loaded."""


def _load_the_rest(session: Session) -> None:
    """What the first durable cell needs, while the kernel is idle or between two cells; not in a thread, since a process that
    is forked meanwhile could not import. Where the store has schedules, they are fired from here on."""  # fmt: skip
    for name in ("durable_nb._engine.workflows", "durable_nb._ipython.cell"):
        importlib.import_module(name)
    if session.path.exists() and keys_of(session, "schedule/"):
        session.workflows().schedules.watch()


def load(shell: Any) -> None:
    """Load the extension into `shell`."""
    shell._durable_extension = Extension(shell)
    shell._durable_extension.load()


def unload(shell: Any) -> None:
    """Undo `load`."""
    shell._durable_extension.unload()
    del shell._durable_extension


def _show_run(run: Any) -> None:
    from durable_nb._ipython.runs import show

    show(run)


def _waiting(session: Session) -> str:
    """Which runs can be resumed, and how; a line each for cells and for runs of workflows. Cells of another notebook beside
    this one are left to it."""  # fmt: skip
    runs = _interrupted(session) if session.path.exists() else []
    if not runs:
        return ""
    from durable_nb._adoption import exists_beside, may_adopt

    others = [repr(run.id) for run in runs if run.kind != "cell"]
    cells = [run for run in runs if run.kind == "cell"]
    if cells:
        from durable_nb._ipython.notebook import origin_of

        here = origin_of("", session.shell.user_ns, session.folder, session.path)
        exists = partial(exists_beside, session.path)
        cells = [run for run in cells if may_adopt(run.origin, replace(here, code=run.origin.code), exists)]
    names = list(dict.fromkeys(f"cell {run.name!r}" for run in cells))
    said = f"\ndurable_nb: run {_listed(names)} again to resume from where it stopped" if names else ""
    return said + (f"\ndurable_nb: durable.resume() resumes {_listed(others)}" if others else "")


def _interrupted(session: Session) -> list[RunRecord]:
    """The runs that nobody executes, the newest first. The store is opened only where it has an unfinished run."""
    from durable_nb.errors import StoreError

    found: list[RunRecord] = []
    for key in keys_of(session, "open/"):
        with contextlib.suppress(StoreError):  # what can't be read is told by whoever needs it
            catalog = session.workflows().catalog
            seen = catalog.seen(key.split("/", 2)[2])
            if seen is not None and catalog.status(*seen) == "interrupted":
                found.append(seen[0])
    return sorted(found, key=lambda run: run.started_at, reverse=True)


def keys_of(session: Session, prefix: str) -> list[str]:
    """Rows of the store, which is not opened for it; none where that can't be told now."""
    from durable_nb._journal.disk import DiskJournal
    from durable_nb.errors import StoreError

    with contextlib.suppress(StoreError):
        journal = DiskJournal(session.path / "journal", session.path / "values", only_look=True)
        try:
            return [key for key, _ in journal.sizes(prefix)]
        finally:
            journal.close()
    return []


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
