"""One execution of a durable cell: restored, or run and stored."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib
import inspect
import io
import os
import re
import secrets
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
from IPython.core.displayhook import DisplayHook
from IPython.core.error import UsageError

import durable_nb
from durable_nb import _records as rec
from durable_nb._cellcache import explain
from durable_nb._cellcache.entries import DriftError, Entries, Entry, Manifest, Result
from durable_nb._cellcache.keys import CellKey, Terms, changes, globals_held, key_of, mutated, said, stored_by
from durable_nb._cellcache.names import Names, names_of
from durable_nb._cellcache.patches import (
    Links,
    attributes_set,
    imported_by,
    patches_for,
    resolver,
    shares_memory,
    submodules_imported_by,
)
from durable_nb._cellcache.world import (
    CellWatch,
    Watch,
    World,
    mentioned_paths,
    name_digest,
    set_generator,
    watching,
    watching_step,
)
from durable_nb._cellrun import CellRun
from durable_nb._clock import say_duration
from durable_nb._engine import Asked, Engine
from durable_nb._facts import Status
from durable_nb._ipython import capture
from durable_nb._ipython.capture import Recorder
from durable_nb._ipython.notebook import origin_of
from durable_nb._ipython.options import Options
from durable_nb._ipython.status import StatusLine
from durable_nb._patches import UnpatchableError, fits, put
from durable_nb._pickling import Pickler
from durable_nb._run import Stage
from durable_nb.errors import CorruptStoreError, RunSuspended, StoreError, UntrustedStoreError

HEADLESS_SLEEP_S = 600.0
"""The longest wait without a front end, where nobody sees why the notebook takes so long."""

_BUSY_POLL_S = 0.1
_RESULTS, _STATES, _PATCHES, _MODULES, _ELSEWHERE = "<results>", "<generators>", "<patches>", "<modules>", "<elsewhere>"
"""Names under which an entry keeps what is no variable."""
_HIDDEN = re.compile(r"_{1,3}|_\d+|_i{1,3}|_i\d+|_[ioh]h|_dh|In|Out|get_ipython|exit|quit")
_OWN_FOLDER = str(Path(durable_nb.__file__).parent) + os.sep


@dataclass(frozen=True, slots=True)
class Code:
    """A cell's body, compiled: parts to execute in order, each with whether its value is displayed."""

    parts: Callable[[], list[tuple[types.CodeType, bool]]]
    """Compiles it; a restored cell needs none of it."""
    tree: ast.Module
    names: Names


@dataclass(slots=True)
class Story:
    """How a cell's last execution in this kernel went: what `%durable why` and `plan` tell of."""

    options: Options
    source: str
    at: float
    """When it began, unix seconds."""
    restored: bool = False
    why: str = ""
    """Why it ran."""
    not_stored: str = ""
    nearest: Manifest | None = None
    """The entry it was restored from; or the one most like the cell before it ran."""
    differences: tuple[explain.Difference, ...] = ()
    """From that one."""
    kept: Manifest | None = None
    """The entry that holds how it went: restored from, or stored now."""
    opaque: tuple[str, ...] = ()
    components: dict[str, str] = field(default_factory=dict)
    """Of its key, before it ran."""
    changed: tuple[str, ...] = ()
    """Components that it changed in place."""


class CellExecution:
    """What one execution needs to know; `run` is its story."""

    def __init__(
        self, shell: Any, engine: Engine, options: Options, body: str, *, live: bool, cell_id: str, folder: Path
    ) -> None:
        self.shell, self.engine, self.options, self.live, self.folder = shell, engine, options, live, folder
        self.code = compile_body(shell, body)
        self.entries = Entries(engine.store.cells, engine.store.seal)
        self.label = options.name or "cell"
        # Without a name the entry has none in its key; the cell's steps belong to its id in the notebook, or to its code.
        self.owner = options.name or (f"~id {cell_id}" if cell_id else f"~code {_digest_of(self.code.tree)}")
        self.scope = rec.scope_of(options.name) if options.name else "~"
        self.status = StatusLine(self.label, shown=not options.quiet, live=live)
        self.results: list[Any] = []
        self.set_variables: list[tuple[Any, Any]] = []
        self.watch: Watch | None = None
        self.elsewhere: dict[tuple[str, str], Any] = {}
        self.recorder = Recorder(shell)
        self.story = Story(options, body, time.time())
        self.begun = False
        self._terms = Terms(options.ignore)
        self._notes = explain.Notes()
        self._too_old = ""

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
        self._terms = terms_of(self.shell, self.options)
        key = self._key()
        for name in sorted(self.options.ignore - key.ignored):
            self.status.advise(f"--ignore {name}: neither the cell nor a helper of it reads that name")
        self.story.components = key.components
        run, waited, parts = None, False, None
        while run is None:
            options = self.options
            if not options.rerun and not options.rerun_step and await self._restored(key, began):
                return
            if parts is None:
                parts = self.code.parts()  # what can't be compiled is told before anything is begun
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
        self._notes, texts = self._noted(key)
        self.story.why = self._why(key, run, texts)
        self.status.show("running", self.story.why)
        await self._execute(run, key, began, parts or [])

    def _asked(self, key: CellKey) -> Asked:
        code = key.components.get("code") or _digest_of(self.code.tree)
        origin = origin_of(code, self.shell.user_ns, self.folder, self.engine.store.path)
        return Asked(self.owner, key.key, self.label, self.options.rerun, self.options.rerun_step, origin)

    def _noted(self, key: CellKey) -> tuple[explain.Notes, dict[str, str]]:
        """Notes on what the cell is about to run with, and the texts that they mask."""
        try:
            return explain.notes_of(key, self.code.tree, self.shell.user_ns, self.entries.mark)
        except Exception:  # an explanation is no reason for a cell not to run
            return explain.Notes(), {}

    def _key(self) -> CellKey:
        try:
            return key_of(self.options.name, self.code.tree, self.code.names, self.shell.user_ns, self._terms)
        except Exception as error:  # whatever is odd about an input, the cell itself must run
            unknown = f"its inputs can't be compared ({type(error).__name__}: {error})"
            return CellKey(secrets.token_hex(20), {}, {}, (unknown,), {})

    # -- a hit ---------------------------------------------------------------------------------------------------------

    async def _restored(self, key: CellKey, began: float) -> bool:
        """Was there an entry, and is the notebook now as it says?"""
        if key.unknown:
            return False
        found = self._find(key)
        if found is None:
            return False
        await self.engine.close_finished(Asked(self.owner, key.key))
        manifest = found[0].manifest
        self.entries.used(found[0])
        self.story.restored, self.story.opaque = True, key.opaque
        self.story.nearest = self.story.kept = manifest
        others = explain.package_changes(manifest.versions, key.versions)
        if others:
            text = f"stored with another version: {', '.join(others)}; --rerun runs it anew"
            self.status.advise(text) if self.live else self.status.warn(text)
        if manifest.skipped:
            self.status.advise(f"without {', '.join(manifest.skipped)}, as --skip says")
        self._apply(*found, began)
        return True

    def _find(self, key: CellKey) -> tuple[Entry, dict[str, Any]] | None:
        """The entry that holds in the world as it is now, decoded. Nothing of the notebook has changed when this returns."""
        try:
            for entry in self.entries.of_key(self.scope, key.key):
                stale = ruled_out(self.options, entry.manifest)
                self._too_old = self._too_old or stale
                if stale or entry.manifest.world.changes(self.shell.user_ns):
                    continue
                values = entry.values(resolver(key.places, self.shell.user_ns))
                if all(fits(obj, content) for obj, content in values[_PATCHES]):
                    return entry, values
        except (CorruptStoreError, UntrustedStoreError) as error:
            self.status.warn(f"what was stored of this cell is not used: {error}; the cell runs and is stored anew")
        except Exception as error:  # a class or module that its values need is gone
            what = f"{type(error).__name__}: {error}"
            self.status.warn(f"what was stored of this cell can't be restored ({what}); the cell runs and is stored anew")
        return None

    def _apply(self, entry: Entry, values: dict[str, Any], began: float) -> None:
        namespace, manifest = self.shell.user_ns, entry.manifest
        results, states, patches, modules = (values.pop(own) for own in (_RESULTS, _STATES, _PATCHES, _MODULES))
        for (module, name), value in values.pop(_ELSEWHERE).items():
            setattr(importlib.import_module(module), name, value)
        for module in modules:
            importlib.import_module(module)
        for obj, content in patches:
            put(obj, content)
        namespace.update(values)
        for name in manifest.deleted:
            namespace.pop(name, None)
        for name, state in states.items():
            set_generator(name, state)
        took = time.perf_counter() - began
        self.status.restored(len(values), manifest.outputs_count, manifest.size, took, manifest.took_s)
        capture.show_again(self.shell, entry.outputs, lambda n, forms: self._display_again(results[n], forms))

    # -- a miss --------------------------------------------------------------------------------------------------------

    def _why(self, key: CellKey, run: CellRun, texts: dict[str, str]) -> str:
        """Why the cell runs, in a few words; what differs from the nearest entry is noted in the story."""
        self.story.opaque = key.opaque
        nearest, found = self._nearest(key)
        if nearest is not None:
            before = explain.decode(self.entries.notes(self.scope, nearest))
            components = explain.differences(nearest.components, before, key.components, self._notes, texts)
            world = nearest.world.changes(self.shell.user_ns)
            self.story.nearest = nearest
            self.story.differences = (*components, *(explain.Difference(what) for what in world))
        if run.resumed:
            return f"goes on from {datetime.fromtimestamp(run.record.started_at).astimezone():%a %H:%M}"
        if self.options.rerun and not self.story.options.rerun:
            return "asked for by %durable rerun"
        if self.options.rerun or self.options.rerun_step:
            return "asked for by --rerun" + (f"={self.options.rerun_step}" if self.options.rerun_step else "")
        if key.unknown:
            return key.unknown[0]
        if self._too_old:
            return self._too_old
        if nearest is None:
            return "first run"
        return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "") or "its entry was lost"

    def _nearest(self, key: CellKey) -> tuple[Manifest | None, list[str]]:
        """The entry that is most like this cell, and what differs from it."""
        nearest: Manifest | None = None
        fewest: list[str] = []
        for manifest in self.entries.manifests(self.scope) if self.options.name else ():
            found = changes(manifest.components, key.components) or manifest.world.changes(self.shell.user_ns)
            if nearest is None or len(found) < len(fewest):
                nearest, fewest = manifest, found
        return nearest, fewest

    async def _execute(self, run: CellRun, key: CellKey, began: float, parts: list[tuple[types.CodeType, bool]]) -> None:
        stage = _Stage(self, run)
        run.stage = stage
        run.max_wait_s = (
            self.options.max_wait_s if self.options.max_wait_s is not None else None if self.live else HEADLESS_SLEEP_S
        )
        before, self.elsewhere = dict(self.shell.user_ns), globals_held(key)
        inputs = {name: before[name] for name in self.code.names.read if name in before}
        watch = self.watch = CellWatch(mentioned_paths(self.code.tree, inputs), self.engine.store.path, key.words)
        ended, error = Status.INTERRUPTED, ""
        body = self._body(parts)
        with _interruptible(run):
            try:
                with self.recorder.recording(), watching(watch):
                    try:
                        await run.execute(body)
                    finally:
                        body.close()
                    self._flush_figures()
                    cost = time.perf_counter() - began + run.spent_before_s()
                    outputs = self.recorder.outputs()
                ended = Status.COMPLETED
                forgotten = [step.name for step in run.snapshot().steps if step.status is Status.PENDING]
                if forgotten:
                    self._not_stored(f"step {forgotten[0]!r} was called and never awaited: write 'await' before it")
                elif run.unrepeated:
                    step, names = run.unrepeated[0]
                    self._not_stored(f"step {step!r} was restored, and {names}")
                else:
                    self._store(run, key, before, watch, outputs, cost)
            except (asyncio.CancelledError, KeyboardInterrupt, RunSuspended):
                raise
            except BaseException as raised:
                ended, error = run.ends_as(raised), f"{type(raised).__name__}: {raised}"
                raise
            finally:
                self.set_variables = run.set_variables
                try:
                    await run.finish(ended, error)
                except StoreError as failed:
                    self.status.warn(f"how the run ended could not be written: {failed}")
                stage.close()
                self.status.ended(ended, time.perf_counter() - began, run.snapshot())

    async def _body(self, parts: list[tuple[types.CodeType, bool]]) -> None:
        namespace = self.shell.user_ns
        for code, shown in parts:
            value = eval(code, self.shell.user_global_ns, namespace)  # noqa: S307  the user's own cell
            if code.co_flags & inspect.CO_COROUTINE:
                value = await value
            if shown and value is not None:
                self.results.append(value)
                with self.recorder.result(value, len(self.results) - 1):
                    self._display(value)

    def _display(self, value: Any) -> None:
        """As the value of a cell's last expression: under Out[n], and as `_`."""
        sys.displayhook(value)

    def _display_again(self, value: Any, forms: Any) -> None:
        with capture.formatted(self.shell, value, forms):
            self._display(value)

    def _flush_figures(self) -> None:
        """Inline figures are shown after the cell; the cell ends here, and they are among its outputs."""
        inline = sys.modules.get("matplotlib_inline.backend_inline")
        if inline is not None and inline.flush_figures in self.shell.events.callbacks.get("post_execute", ()):
            inline.flush_figures()

    # -- storing -------------------------------------------------------------------------------------------------------

    def _not_stored(self, why: str) -> None:
        self.story.not_stored = why
        self.status.not_stored(why)

    def _store(
        self, run: CellRun, key: CellKey, before: dict[str, Any], watch: CellWatch, outputs: list[capture.Output], cost_s: float
    ) -> None:
        namespace = self.shell.user_ns
        if key.unknown:
            self._not_stored(key.unknown[0])
            return
        names = self.code.names
        touched = {
            n for n in {*before, *namespace} if n in names.certain or before.get(n, _HIDDEN) is not namespace.get(n, _HIDDEN)
        }
        # What the key tells of a name need not be compared again; and it may have been changed in place since.
        unread = {n for n in (*names.bound, *stored_by(key)) if f"global {n}" not in key.components}
        alone = {n for n in unread if n in namespace and n not in touched}
        touched, alone = ({n for n in found if n in names.bound or not _HIDDEN.fullmatch(n)} for found in (touched, alone))
        deleted, skipped = sorted(touched - namespace.keys()), sorted(touched & namespace.keys() & self.options.skip)
        touched, alone = touched - self.options.skip, alone - self.options.skip - self.options.ignore
        bound = {n: namespace[n] for n in sorted(touched) if n in namespace}
        try:
            changed, problems = mutated(key, self.code.tree, self.code.names, namespace, before, self._terms)
            self.story.changed = tuple(changed)
            world, unseen = watch.world()
            problems += unseen
            world = replace(world, names={name: name_digest(namespace, name) for name in sorted(alone)})
        except Exception as error:
            self._not_stored(f"its inputs can't be compared any more ({type(error).__name__}: {error})")
            return
        try:
            patches = patches_for(changed, key.places)
        except UnpatchableError as error:
            problems.append(f"it changes {said(str(error))} in place")
        problems += [f"{name} can't be compared" for name, digest in world.names.items() if not digest]
        problems += [f"it sets {module}.{name}" for module, name in attributes_set(self.code.tree, namespace)]
        problems += key.sets
        problems += [f"it sets the context variable {variable.name}" for variable, _ in run.set_variables]
        if problems:
            self._not_stored(problems[0])
            return
        view = shares_memory(bound, key.places)
        if view:
            self._not_stored(f"{view} shares its memory with another array or frame; .copy() gives it its own")
            return
        values = {
            **bound,
            _RESULTS: self.results,
            _STATES: watch.moved_states(world),
            _PATCHES: patches,
            _MODULES: submodules_imported_by(self.code.tree),
            _ELSEWHERE: {place: now for place, now in globals_held(key).items() if now is not self.elsewhere.get(place)},
        }
        imported = imported_by(self.code.tree, bound)
        links = Links(key.places, {n: before[n] for n in names.read if n in before}, imported)
        try:
            self.story.kept = self.entries.store(
                self.scope,
                key.key,
                Result(values, world, deleted, capture.encode(outputs), len(outputs), cost_s, skipped),
                name=self.options.name,
                components=key.components,
                versions=key.versions,
                created_at=time.time(),
                reference=links.reference,
                copied=lambda cls: any(cls is value for value in bound.values()),
                resolve=resolver(key.places, before),
                notes=explain.encode(self._notes),
            )
        except OSError as error:
            self._not_stored(f"the store can't be written ({error.strerror})")
        except UnpatchableError as error:
            self._not_stored(f"it binds {error}")
        except DriftError as error:
            self._not_stored(f"a {error} does not come back whole from its own pickle")
        except Exception as error:
            self._not_stored(self._unpicklable(values, links, error))

    def _unpicklable(self, values: dict[str, Any], links: Links, error: Exception) -> str:
        """Name the variable that is to blame."""
        for name, value in values.items():
            if not _is_picklable(value, links):
                named = name.isidentifier()
                what = f"{name} ({type(value).__name__})" if named else "the displayed value"
                if inspect.iscoroutine(value):
                    return f"{what} can't be pickled: 'await' is missing before what made it"
                kept = "its steps are kept: put what costs time or money into durable.run(...)"
                return f"{what} can't be pickled; {kept}" + (f", or leave it out with --skip {name}" if named else "")
        return f"its variables can't be pickled together ({type(error).__name__}: {error})"


def terms_of(shell: Any, options: Options) -> Terms:
    """What the options say about the key; `--extra` is evaluated, now. UsageError where that fails."""
    if not options.extra:
        return Terms(options.ignore)
    try:
        value = eval(options.extra, shell.user_global_ns, shell.user_ns)  # noqa: S307  the user's own
    except Exception as error:
        raise UsageError(
            f"%%durable --extra: {options.extra!r} raises {type(error).__name__}: {error}; nothing was run"
        ) from None
    return Terms(options.ignore, (value,))


def ruled_out(options: Options, manifest: Manifest) -> str:
    """Why the options don't let this entry count; '' where they do."""
    age_s, ttl_s = time.time() - manifest.created_at, options.ttl_s
    if ttl_s is not None and age_s >= ttl_s:
        return f"its entry is {say_duration(age_s)} old, and --ttl says {say_duration(ttl_s)}"
    missing = set(manifest.skipped) - options.skip
    return f"its entry is without {', '.join(sorted(missing))}, which --skip left out" if missing else ""


def source_of(shell: Any, body: str) -> tuple[ast.Module, Names]:
    """What a cell's key is made of: its normal tree, and the names in it."""
    return _normal(shell.transform_cell(body))


def _is_picklable(value: Any, links: Links) -> bool:
    try:
        Pickler(io.BytesIO(), reference=links.reference, buffer_callback=lambda _: False).dump(value)
    except Exception:
        return False
    return True


class _Stage(Stage):
    """The notebook as the stage of a run."""

    def __init__(self, cell: CellExecution, run: CellRun) -> None:
        self._cell = cell
        self._run = run
        self._view: Any = None

    @contextlib.contextmanager
    def recording(self, path: str) -> Iterator[Callable[[], tuple[bytes, bytes]]]:
        watch = Watch((), self._cell.engine.store.path)
        with self._cell.recorder.step(path) as shown, watching_step(watch):

            def noted() -> tuple[bytes, bytes]:
                world = watch.read()
                return shown(), msgspec.msgpack.encode(world) if world.files else b""

            yield noted

    def show_again(self, shown: bytes, seen: bytes) -> None:
        capture.show_again(self._cell.shell, shown, lambda _n, _forms: None)
        if seen and self._cell.watch is not None:
            self._cell.watch.saw(msgspec.msgpack.decode(seen, type=World))

    def holds(self, seen: bytes) -> bool:
        return not msgspec.msgpack.decode(seen, type=World).changes({})

    def notice(self, text: str) -> None:
        if not self._cell.live:  # with a front end the view shows it
            self._cell.status.warn(text)

    def advise(self, text: str) -> None:
        self._cell.status.advise(text)

    def changed(self) -> None:
        if self._cell.options.quiet:
            return
        if self._view is None:
            if not self._run.snapshot().steps:  # a plain cell gets no view
                return
            from durable_nb._view import RunView

            self._view = RunView(self._run.snapshot, live=self._cell.live)
            self._view.open()
        self._view.changed()

    def close(self) -> None:
        if self._view is not None:
            self._view.close()


@contextlib.contextmanager
def _interruptible(run: CellRun) -> Iterator[None]:
    """Make an interrupt stop the cell at once.

    The kernel's own handler doesn't wake a loop that idles in an await. And a KeyboardInterrupt may be raised only where
    one of the run's own tasks executes the user's code: out of anything else it would end the kernel.
    """
    if threading.current_thread() is not threading.main_thread():  # a subshell: it gets no signals
        yield
        return
    loop = asyncio.get_running_loop()

    def on_interrupt(_signum: int, frame: types.FrameType | None) -> None:
        run.interrupt()
        if run.may_be_left(asyncio.current_task(loop) if asyncio._get_running_loop() is loop else None, frame):
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def compile_body(shell: Any, body: str) -> Code:
    """A cell's body as IPython would compile it, with top-level await; tracebacks show the user's lines."""
    source = shell.transform_cell(body)

    def parts() -> list[tuple[types.CodeType, bool]]:
        number = max(shell.execution_count - 1, 1)  # IPython has counted this cell already
        filename = shell.compile.cache(source, number, raw_code=body)
        tree = shell.transform_ast(shell.compile.ast_parse(source, filename=filename))
        quiet = bool(DisplayHook.semicolon_at_end_of_expression(body))  # type: ignore[no-untyped-call]
        found = []
        with shell.compile.extra_flags(ast.PyCF_ALLOW_TOP_LEVEL_AWAIT):
            for node, shown in _parts(tree, shell.ast_node_interactivity, quiet=quiet):
                mode = "eval" if isinstance(node, ast.Expression) else "exec"
                found.append((shell.compile(node, filename, mode), shown))
        return found

    try:
        tree, names = _normal(source)
    except SyntaxError:
        parts()  # raises it with the user's lines
        raise
    return Code(parts, tree, names)


@lru_cache(maxsize=256)
def _normal(source: str) -> tuple[ast.Module, Names]:
    tree = ast.parse(source)
    return tree, names_of(tree)


def _parts(tree: ast.Module, interactivity: str, *, quiet: bool) -> Iterator[tuple[ast.Module | ast.Expression, bool]]:
    """The statements in runs, and each expression whose value IPython would display."""
    body = list(tree.body)
    last = body[-1] if body else None
    if interactivity == "last_expr_or_assign" and isinstance(last, ast.Assign) and isinstance(last.targets[0], ast.Name):
        body.append(ast.copy_location(ast.Expr(ast.copy_location(ast.Name(last.targets[0].id, ast.Load()), last)), last))
    waiting: list[ast.stmt] = []
    for i, node in enumerate(body):
        is_last = i == len(body) - 1
        shown = interactivity == "all" or (interactivity != "none" and is_last)
        if isinstance(node, ast.Expr) and shown and not (is_last and quiet):
            if waiting:
                yield ast.Module(waiting, []), False
                waiting = []
            yield ast.Expression(node.value), True
        else:
            waiting.append(node)
    if waiting:
        yield ast.Module(waiting, []), False


def _digest_of(tree: ast.Module) -> str:
    from durable_nb._fingerprint import hash_value, normalise

    return hash_value(normalise(tree))


def users_traceback(error: BaseException) -> None:
    """Take the package's own frames out of an exception's tracebacks, and of those it came from."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        exception = waiting.pop()
        if exception is None or id(exception) in seen:
            continue
        seen.add(id(exception))
        frames = []
        trace = exception.__traceback__
        while trace is not None:
            if not _is_ours(trace.tb_frame.f_code.co_filename):
                frames.append(trace)
            trace = trace.tb_next
        kept: types.TracebackType | None = None
        for frame in reversed(frames):
            kept = types.TracebackType(kept, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
        exception.__traceback__ = kept
        waiting += [exception.__cause__, exception.__context__]
        if isinstance(exception, BaseExceptionGroup):
            waiting += exception.exceptions


def _is_ours(filename: str) -> bool:
    return filename.startswith(_OWN_FOLDER)


def show_users_lines(shell: Any, error: BaseException) -> None:
    """Make IPython show an error as if the cell had run plainly."""
    if isinstance(error, (KeyboardInterrupt, RunSuspended)):
        shown = [f"{type(error).__name__}: {error}"]
    else:
        users_traceback(error)
        shown = None
    trace = error.__traceback__

    # IPython reads the traceback after it has gone through the frames of the magic, so it is rendered from here.
    def render() -> list[str]:
        return shown or shell.InteractiveTB.structured_traceback(type(error), error, trace, tb_offset=0)

    with contextlib.suppress(AttributeError):  # an exception class with __slots__: its traceback shows more than it should
        error._render_traceback_ = render  # type: ignore[attr-defined]
