"""One execution of a durable cell: restored, or run and stored."""

from __future__ import annotations

import ast
import asyncio
import builtins
import contextlib
import functools
import inspect
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from typing import Any

from IPython.core.error import UsageError
from IPython.display import display

from durable_nb._cellcache import explain
from durable_nb._cellcache.cache import After, Before, CellCache, CellCode, Hit, Stored
from durable_nb._cellcache.entries import Entries
from durable_nb._cellcache.keys import CellKey, Terms
from durable_nb._cellcache.report import ExecutionReport
from durable_nb._cellcache.watch import watching
from durable_nb._clock import say_duration
from durable_nb._engine import Asked, Engine
from durable_nb._engine.cell_run import CellRun
from durable_nb._facts import Status
from durable_nb._housekeeping.tables import say_past
from durable_nb._ipython import capture
from durable_nb._ipython.background import BackgroundCells, Snapshot
from durable_nb._ipython.capture import Recorder
from durable_nb._ipython.compile import compile_body, turn_on_features
from durable_nb._ipython.host import NotebookHost
from durable_nb._ipython.interrupts import interruptible
from durable_nb._ipython.notebook import file_of, origin_of
from durable_nb._ipython.options import Options, max_wait_s
from durable_nb._ipython.questions import durable_questions
from durable_nb._ipython.settings import settings_of
from durable_nb._ipython.status import StatusLine
from durable_nb.errors import RunSuspended, StoreError

HEADLESS_SLEEP_S = 600.0
"""The longest pause without a front end, where nobody sees why the notebook takes so long."""
HEADLESS_ANSWER_S = 0.0
"""The longest wait for an event or a decision there: who could answer doesn't know of it before the notebook has ended."""

_BUSY_POLL_S = 0.1
_NOTHING = object()


class CellExecution:
    """One execution: what it needs to know, and how it goes."""

    def __init__(
        self,
        shell: Any,
        engine: Engine,
        options: Options,
        body: str,
        *,
        rerun: bool = False,
        live: bool,
        cell_id: str,
        folder: Path,
        background: BackgroundCells,
    ) -> None:
        """`rerun`: `%durable rerun` asks for it, whatever the options say."""
        self.shell, self.engine, self.live, self.folder = shell, engine, live, folder
        self.options = replace(options, rerun=True, rerun_step="") if rerun else options
        self._rerun_by_magic = rerun and not options.rerun
        self._max_wait_s = options.max_wait_s if options.max_wait_s is not None else max_wait_s()
        self.compiled = compile_body(shell, body)
        self.code = CellCode(options.name, self.compiled.tree, self.compiled.names)
        own = [str(engine.store.path), *filter(None, [file_of(shell.user_ns, folder)])]
        self.cache = CellCache(Entries(engine.store.cells, engine.store.signer), own, settings_of(shell))
        self.label = options.name or "cell"
        # Without a name the entry has none in its key; the cell's steps belong to its id in the notebook, or to its code.
        self.owner = options.name or (f"~id {cell_id}" if cell_id else f"~code {_digest_of(self.code.tree)}")
        self.status = StatusLine(self.label, shown=not options.quiet, live=live)
        self.results: list[Any] = []
        self.set_variables: list[tuple[Any, Any]] = []
        self.recorder = Recorder(shell)
        self.report = ExecutionReport(time.time())
        self.begun = False
        self.namespace: dict[str, Any] = shell.user_ns
        self._background, self._others = background, 0
        self._detached = False
        self._process: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        """The process as a cell in front finds it."""
        self._notes = explain.Notes()
        self._ruled_out = ""

    async def run(self) -> None:
        """Leave the notebook as plain execution would."""
        began = time.perf_counter()
        try:
            await self._restore_or_execute(began)
        except asyncio.CancelledError:
            if not self.begun:
                raise KeyboardInterrupt(f"cell {self.label!r} was interrupted before it began; nothing was run") from None
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # the cell's own
                raise
            raise KeyboardInterrupt(f"cell {self.label!r} was interrupted") from None  # by the kernel's handler
        finally:
            if self.options.time:
                print(f"Wall time: {say_duration(time.perf_counter() - began)}")  # noqa: T201  what %%time prints

    async def _restore_or_execute(self, began: float) -> None:
        if not self.options.name:
            self.status.advise("name the cell ('%%durable NAME') to keep its steps when it is edited elsewhere")
        key = await self._key()
        for name in sorted(self.options.ignore - key.ignored):
            self.status.advise(f"--ignore {name}: neither the cell nor a helper of it reads that name")
        self.report.key, self.report.components = key.key, key.components
        run, waited, parts = None, False, None
        while run is None:
            options = self.options
            if not options.rerun and not options.rerun_step and await self._restored(key, began):
                return
            if parts is None:
                parts = self.compiled.parts()  # what can't be compiled is told before anything is begun
            try:
                run = await self.engine.begin(self._asked(key))
            except LookupError as error:
                raise UsageError(f"%%durable --rerun={options.rerun_step}: {error.args[0]}; nothing was run") from None
            if run is None:
                if not waited:
                    self.status.show("waiting", "another kernel is running this cell with the same inputs")
                waited = True
                await asyncio.sleep(_BUSY_POLL_S)
        self.begun = True
        self.report.why = self._why(key, run)
        self.status.show("running", self.report.why + (", in the background" if self._detached else ""))
        await self._execute(run, key, began, parts or [])

    async def _key(self) -> CellKey:
        """What identifies the execution, once all that the cell reads is bound."""
        if not self._detached or not self.report.key:
            self.code = replace(self.code, terms=terms_of(self.shell, self.options))
        while True:
            key = self.cache.key(self.code, self.namespace)
            reads = {*self.code.names.read, *key.names}
            pending = self._background.pending(reads) if not self._detached else []
            if not pending:
                return key
            said = "; ".join(f"{', '.join(names)} comes from the cell {label!r} in the background" for label, names in pending)
            self.status.show("waiting", said)
            await self._background.settle(reads)

    @property
    def reads(self) -> set[str]:
        """Names that it may read."""
        return {*self.code.names.read, *self.cache.key(self.code, self.namespace).names}

    @property
    def binds(self) -> frozenset[str]:
        """Names that it may bind."""
        return frozenset(self.code.names.bound)

    async def restored(self) -> str:
        """The key of its entry, or '' where there was one: then the notebook is as it says. Begins nothing."""
        began = time.perf_counter()
        key = await self._key()
        self.report.key, self.report.components = key.key, key.components
        anew = self.options.rerun or self.options.rerun_step
        return "" if not anew and await self._restored(key, began) else key.key

    def is_executed_already(self) -> None:
        """Say that this is so, in the background."""
        self.status.show("running", "in the background already")

    def detach(self) -> Snapshot:
        """From here on, the cell is executed on a snapshot of the notebook."""
        snapshot = Snapshot(self.shell.user_ns)
        self.namespace, self._detached, self._others = snapshot.namespace, True, self._background.count
        self._process = functools.partial(_with_hooks, self.shell, sys.excepthook, sys.displayhook, builtins.input)
        return snapshot

    def _asked(self, key: CellKey) -> Asked:
        code = key.components.get("code") or _digest_of(self.code.tree)
        origin = origin_of(code, self.shell.user_ns, self.folder, self.engine.store.path)
        reads = {label: digest for label, digest in key.components.items() if label not in ("code", "aliases")}
        return Asked(self.owner, key.key, self.label, self.options.rerun, self.options.rerun_step, origin, reads)

    # -- a hit ---------------------------------------------------------------------------------------------------------

    async def _restored(self, key: CellKey, began: float) -> bool:
        """Was there an entry, and is the notebook now as it says?"""
        with capture.muted(self.shell):
            found = self.cache.lookup(self.code, self.namespace, key)
        if not isinstance(found, Hit):
            self._ruled_out = self._ruled_out or found.why
            for warning in found.warnings:
                self.status.warn(warning)
            return False
        await self.engine.close_finished(Asked(self.owner, key.key))
        manifest = found.manifest
        self.cache.entries.used(found.entry)
        self.engine.shared.savings.add(manifest.run, manifest.usage)
        self.engine.shared.savings.write()
        self.report.restored, self.report.opaque = True, key.opaque
        self.report.nearest = self.report.kept = manifest
        others = explain.package_changes(manifest.versions, key.versions)
        if others:
            text = f"stored with another version: {', '.join(others)}; --rerun runs it anew"
            self.status.advise(text) if self.live else self.status.warn(text)
        if manifest.skipped:
            self.status.advise(f"without {', '.join(manifest.skipped)}, as --skip says")
        for name, failed in found.failed.items():
            text = f"{name} is not bound: making it again failed ({failed})"
            self.status.advise(text) if self.live else self.status.warn(text)
        outside = copy_context()
        with capture.muted(self.shell):
            found.apply(self.namespace)
        self.set_variables = [(v, value) for v, value in copy_context().items() if outside.get(v, _NOTHING) is not value]
        if found.patched:
            names = self.namespace.items()
            self.report.changed = tuple(f"global {n}" for n, v in names if any(v is obj for obj in found.patched))
        turn_on_features(self.shell, self.code.tree)
        took = time.perf_counter() - began
        self.status.restored(found.variables, manifest.outputs_count, manifest.size, took, manifest.took_s)

        def show(n: int, forms: Any) -> None:
            with capture.formatted(self.shell, found.results[n], forms):
                sys.displayhook(found.results[n])

        capture.show_again(self.shell, found.entry.outputs, show)
        return True

    # -- a miss --------------------------------------------------------------------------------------------------------

    def _why(self, key: CellKey, run: CellRun) -> str:
        """Why the cell runs, in a few words; what differs from the nearest entry is noted in the report."""
        why = self.cache.why(self.code, self.namespace, key)
        self._notes = why.notes
        self.report.opaque, self.report.differences = key.opaque, why.differences
        self.report.nearest = why.nearest
        if run.resumed:
            return f"resumes from {say_past(run.started_at)}"
        if self._rerun_by_magic:
            return "asked for by %durable rerun"
        if self.options.rerun or self.options.rerun_step:
            return "asked for by --rerun" + (f"={self.options.rerun_step}" if self.options.rerun_step else "")
        if key.unknown:
            return key.unknown[0]
        if self._ruled_out:
            return self._ruled_out
        if why.nearest is None:
            return "first run"
        more = f" and {len(why.found) - 3} more" if len(why.found) > 3 else ""
        return ", ".join(why.found[:3]) + more or "its entry was lost"

    async def _execute(self, run: CellRun, key: CellKey, began: float, parts: list[tuple[types.CodeType, bool]]) -> None:
        around = self.cache.around(self.namespace)
        host = NotebookHost(run, self.shell, self.recorder, self.status, around, live=self.live, quiet=self.options.quiet)
        run.host = host
        run.observers.subscribe(host.observe)
        self._bound_waits(run)
        with self._process():
            before = self.cache.begin(self.code, self.namespace, key, self._notes)
        host.watch = before.watch
        ended, error = Status.INTERRUPTED, ""
        body = self._body(parts)
        # An interrupt is for the cell in front.
        in_front = contextlib.nullcontext() if self._detached else interruptible(run)
        questions = contextlib.nullcontext() if self._detached else durable_questions()
        with in_front:
            try:
                with self.recorder.recording(), watching(before.watch), before.effects.noticing(), questions:
                    try:
                        await run.execute(body)
                    finally:
                        body.close()
                    inline = sys.modules.get("matplotlib_inline.backend_inline")
                    if (
                        inline is not None
                        and not self._detached
                        and inline.flush_figures in self.shell.events.callbacks.get("post_execute", ())
                    ):
                        inline.flush_figures()  # they are shown after the cell, which ends here: they are among its outputs
                    cost = time.perf_counter() - began + run.spent_before_s()
                    outputs = self.recorder.outputs()
                ended = Status.COMPLETED
                forgotten = [step.name for step in run.snapshot().steps if step.status is Status.PENDING]
                if forgotten:
                    self._not_stored(f"step {forgotten[0]!r} was called and never awaited: write 'await' before it")
                elif run.restoring.unrepeated:
                    step, names = run.restoring.unrepeated[0]
                    self._not_stored(f"step {step!r} was restored, and {names}")
                else:
                    self._store(run, before, outputs, cost)
            except (asyncio.CancelledError, KeyboardInterrupt, RunSuspended):
                raise
            except BaseException as raised:
                ended, error = run.ends_as(raised), f"{type(raised).__name__}: {raised}"
                raise
            finally:
                self.set_variables = run.scope.set_variables
                try:
                    await run.finish(ended, error)
                except StoreError as failed:
                    self.status.warn(f"how the run ended could not be written: {failed}")
                for step in run.left_running():
                    self.status.still_running(step)
                self.status.ended(ended, time.perf_counter() - began, run.snapshot(), host.view)

    def _bound_waits(self, run: CellRun) -> None:
        """Say for how long the run may wait: where nobody looks on, for no answer at all. At a terminal somebody does."""
        given, is_terminal = self._max_wait_s, getattr(self.shell, "kernel", None) is None
        is_free = given is not None or self.live or self._detached  # in the background a wait keeps nobody
        run.waiting.max_wait_s = given if is_free else HEADLESS_SLEEP_S
        run.waiting.max_answer_s = given if is_free or is_terminal else HEADLESS_ANSWER_S
        if not self.live:
            run.waiting.tell = self.status.warn

    async def _body(self, parts: list[tuple[types.CodeType, bool]]) -> None:
        names = (self.namespace,) if self._detached else (self.shell.user_global_ns, self.namespace)
        for code, shown in parts:
            value = eval(code, *names)  # noqa: S307  the user's own cell
            if code.co_flags & inspect.CO_COROUTINE:
                value = await value
            if self._detached:
                if shown and value is not None:
                    display(value)  # type: ignore[no-untyped-call]  # `Out` and `_` are the cell's in front
                continue
            if shown and value is not None:
                self.results.append(value)
                with self.recorder.result(value, len(self.results) - 1):
                    sys.displayhook(value)  # under Out[n], and as `_`

    # -- storing -------------------------------------------------------------------------------------------------------

    def _not_stored(self, why: str) -> None:
        self.report.not_stored = why
        self.status.not_stored(why)

    def _store(self, run: CellRun, before: Before, outputs: list[capture.Output], cost_s: float) -> None:
        after = After(
            self.results,
            capture.encode(outputs),
            len(outputs),
            cost_s,
            tuple(run.scope.set_variables),
            steps=bool(run.snapshot().steps),
            problems=tuple(self.recorder.problems),
            run=run.id,
            usage=run.recording.used,
            alone=not self._detached or self._background.count == self._others,
        )
        with self._process():
            saved = self.cache.save(before, after)
        self.report.changed = saved.changed
        if isinstance(saved, Stored):
            self.report.kept = saved.manifest
        else:
            self._not_stored(saved.why)


def terms_of(shell: Any, options: Options) -> Terms:
    """What the options say about the key; `--extra` is evaluated, now. UsageError where that fails."""
    if not options.extra:
        return Terms(options.ignore, ttl_s=options.ttl_s, skip=options.skip)
    try:
        value = eval(options.extra, shell.user_global_ns, shell.user_ns)  # noqa: S307  the user's own
    except Exception as error:
        raise UsageError(
            f"%%durable --extra: {options.extra!r} raises {type(error).__name__}: {error}; nothing was run"
        ) from None
    return Terms(options.ignore, (value,), options.ttl_s, options.skip)


@contextlib.contextmanager
def _with_hooks(shell: Any, *hooks: Any) -> Iterator[None]:
    """Meanwhile they are those that IPython and ipykernel set for the time of each cell, and so are the builtins: that they
    come and go beside a cell in the background is no effect of it."""  # fmt: skip
    before = sys.excepthook, sys.displayhook, builtins.input
    sys.excepthook, sys.displayhook, builtins.input = hooks
    try:
        with shell.builtin_trap:
            yield
    finally:
        sys.excepthook, sys.displayhook, builtins.input = before


def _digest_of(tree: ast.Module) -> str:
    from durable_nb._fingerprint import hash_value, normalise

    return hash_value(normalise(tree))
