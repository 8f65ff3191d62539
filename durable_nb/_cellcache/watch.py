"""Sees what a cell or step looks at while it runs, and what it does to files.

Reading by Python raises audit events (PEP 578), whether the file is there or not. Asking whether a file is there raises none:
`os.path` and `pathlib` are given an `os` that tells, for the time of a cell. Environment variables are looked up in one
place. What native code opens is seen by `inotify`, or, where that can't see, taken from what is mentioned. What the cell
itself wrote first is no input of it, but its result: gone or changed, the cell has to run again.
"""

from __future__ import annotations

import ast
import contextlib
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from durable_nb._cellcache import environment, inotify
from durable_nb._cellcache.evaluated import Evaluated
from durable_nb._cellcache.external import (
    OF_LIBRARIES,
    Around,
    ExternalState,
    name_digest,
    settings,
    settings_used,
)
from durable_nb._cellcache.files import (
    ABSENT,
    ADDED,
    CHANGING,
    CODE,
    DATABASE,
    FOLDER,
    LISTED,
    LOOKED_FOR,
    MADE,
    MATCHED,
    MOST_IN_FOLDER,
    READ,
    REMOVED,
    Counting,
    FileState,
    Stat,
    away,
    here,
    is_above,
    is_elsewhere,
    kind_of,
    looking_away,
    stat_of,
    state_of,
)
from durable_nb._cellcache.generators import ANY, UNSEEDED, generators
from durable_nb._cellcache.mentions import (
    Mentions,
    Places,
    looked_up,
    modules_named,
)
from durable_nb._cellcache.open_files import is_written_elsewhere
from durable_nb._fingerprint import imported

_MOST_LOOKED_FOR = 10_000
_SETTING_STATES = frozenset({"setstate", "set_state"})
_DRAWING = _SETTING_STATES | frozenset(
    "seed random randint randrange uniform choice choices sample shuffle gauss betavariate expovariate normalvariate "
    "lognormvariate triangular vonmisesvariate paretovariate weibullvariate getrandbits randbytes binomialvariate".split()
)
"""Words without one of which code of no package draws no random numbers. Looking at the generators costs more than the rest."""
_TICK_NS = 10 * 10**6
"""The file system's clock is behind by up to so much."""
_SETTING_UP_S = 2.0
"""How long the first cells wait for the notebook's folder to be watched."""


class Watch:
    """What one execution of a cell or step sees."""

    def __init__(
        self,
        around: Around,
        mentions: Mentions,
        places: Places,
        packages: Iterable[str],
        *,
        displays: bool = False,
        evaluated: Evaluated | None = None,
        seeded: frozenset[str] = frozenset(),
        members: dict[str, str] | None = None,
    ) -> None:
        """`places`: where the mentions lead; `packages`: those that the code uses; `displays`: what it displays may be of
        others; `evaluated` is told what it evaluates; `seeded`: the random generators that the code seeds before anything
        else; `members`: what the code speaks of that was added to others' classes. It sees from now on."""  # fmt: skip
        self._around, self.mentions, self._places, self._packages = around, mentions, places, tuple(packages)
        self._evaluated, self._seeded_at_once = evaluated, seeded
        self._folder = here()
        self._counts = Counting(around.own, places.hidden)
        self._lock = threading.Lock()
        self._first: dict[str, tuple[str, str, Stat]] = {}
        """By absolute path: the name used, how it was touched first, and its state then."""
        self._listed: dict[str, str] = {}
        self._looked_for: dict[str, tuple[str, str, bool]] = {}
        """By absolute path: the name used, what was there, and whether more than that was asked."""
        self._given: dict[str, FileState] = {}
        """What restored steps saw when they ran."""
        self._given_variables: dict[str, str] = {}
        self._given_settings: dict[str, str] = {}
        self._added = members or {}
        self._imported: dict[str, None] = {}
        self._variables: dict[str, tuple[str | None, bool]] = {}
        self._set: set[str] = set()
        self._is_passed = self._is_inherited = False
        """Has it gone through the whole environment, or left it to a child process?"""
        self._names = {name: name_digest(around.namespace, name) for name in sorted(looked_up(mentions, around.namespace))}
        used = settings_used(self._packages, mentions.words)
        self._settings = settings(used | OF_LIBRARIES if displays else used)
        draws = displays or bool(self._packages) or not mentions.words.isdisjoint(_DRAWING)
        self._generators = generators() if draws else None
        self._asks = not mentions.words.isdisjoint({"stat", "lstat"})  # of which nobody hears, where it is os's own
        self._before = {where: stat_of(where) for where in places.files}
        self._watcher = inotify.watcher()
        self._position = self._watcher.position() if self._watcher is not None else (0, 0)
        self._events: list[inotify.FileEvent] | None = None
        self._began_ns = time.time_ns() - _TICK_NS
        known = mentions.texts or self._names or used or self._added or draws
        self._is_certain = not (known or places.files or places.folders)
        """Only what happens from now on can make its outcome depend on anything. Settings count where they are usual, too."""
        self.alone = True
        """No other step was at work meanwhile, which may have drawn random numbers as well."""

    def restart(self) -> None:
        """It sees natively opened files from now on only."""
        if self._watcher is not None:
            self._position = self._watcher.position()

    def close(self) -> None:
        """It sees until now."""
        if self._watcher is not None:
            self._events = self._watcher.since(self._position)

    # -- what happens --------------------------------------------------------------------------------------------------

    def event(self, event: str, args: tuple[Any, ...]) -> None:
        """One audit event. Called inside the call that raises it: must be quick, and must not raise."""
        if event in _CHILDREN:
            self._is_inherited |= event not in _GIVING or args[-1] is None or len(args[-1]) >= len(os.environ)
            return
        path = args[0]
        if event == "exec":
            if self._evaluated is not None:
                self._evaluated.event(path, sys._getframe(2))
            return
        if event == "import":
            self._imported[str(path)] = None
            return
        if isinstance(path, int) or (path is None and event == "open"):
            return
        name, where = self._place(path if path is not None else ".")
        if is_elsewhere(where) or where.startswith(self._around.own):
            return
        with self._lock:
            if event in ("os.listdir", "os.scandir"):
                if where not in self._listed and not _imports(sys._getframe(2)) and not _watches_folders(sys._getframe(2)):
                    self._listed[where] = name
                return
            if event == "os.rename":
                self._touch(where, name, REMOVED, None)
                event, args = "open", (args[1], "w", os.O_WRONLY | os.O_TRUNC)
                name, where = self._place(args[0])
            if event in ("os.remove", "os.rmdir", "os.mkdir"):
                if args[-1] != -1:  # relative to a folder's descriptor
                    return
                if event == "os.mkdir" or where not in self._first:
                    self._first[where] = name, FOLDER if event == "os.mkdir" else REMOVED, None
                return
            how = _how(event, args)
            if how == READ and os.path.isdir(where):  # to remove or to walk it by its descriptor
                return
            if event == "sqlite3.connect" and not os.path.exists(where):
                how = DATABASE  # which it makes; what is put into it then is outside
            if how == READ and where.endswith((".py", ".pyc")) and _imports(sys._getframe(2)):
                return
            self._touch(where, name, how, stat_of(where))

    def _touch(self, where: str, name: str, how: str, state: Stat) -> None:
        if where not in self._first:
            self._first[where] = name, how, state

    def _place(self, path: Any) -> tuple[str, str]:
        """The path as it is written down, and where it leads."""
        name = os.fsdecode(path)
        now = here()
        where = os.path.normpath(os.path.join(now, name))
        return (name if now == self._folder else where), where

    def looked_for(self, path: Any, found: str, *, closely: bool) -> None:
        """Somebody asked whether there is such a file: 'file', 'folder' or ''. `closely`: how large it is, and the like."""
        name, where = self._place(path)
        if where not in self._looked_for and len(self._looked_for) < _MOST_LOOKED_FOR:
            self._looked_for[where] = name, found, closely
        elif closely and not self._looked_for.get(where, ("", "", True))[2]:
            self._looked_for[where] = *self._looked_for[where][:2], True

    def variable_read(self, name: str, value: str | None, is_passed: bool) -> None:
        """An environment variable was looked up."""
        if name in self._set or environment.is_secret(name) or not name.isidentifier():
            return
        if name not in self._variables or (self._variables[name][1] and not is_passed):
            self._variables[name] = value, is_passed

    def variables_passed(self) -> None:
        """Somebody goes through all of them."""
        self._is_passed = True

    def variable_set(self, name: str) -> None:
        """What it looks up after that is its own."""
        if name not in self._variables:
            self._set.add(name)

    @property
    def variables_set(self) -> frozenset[str]:
        """Environment variables that it has set or deleted, before it looked at them."""
        return frozenset(self._set)

    def saw(self, external: ExternalState) -> None:
        """A step that is restored saw this when it ran."""
        with self._lock:
            for file in external.files:
                where = os.path.normpath(os.path.join(self._folder, file.path))
                if file.how in (READ, LISTED, LOOKED_FOR, MATCHED, CODE):
                    self._given.setdefault(f"{file.how} {where}", file)
                elif state_of(file.how, file.path) == file.digest:
                    self._touch(where, file.path, file.how, stat_of(where))
            self._given_variables |= {n: digest for n, digest in external.variables.items() if n not in self._set}
            self._given_settings |= external.settings

    # -- what came of it -----------------------------------------------------------------------------------------------

    @property
    def has_seen_nothing(self) -> bool:
        """Is it known without a look at anything that the outcome depends on nothing external?"""
        events = self._first or self._listed or self._looked_for or self._imported or self._events
        variables = self._variables or self._is_passed or self._is_inherited or self._set
        given = self._given or self._given_variables or self._given_settings
        return self._is_certain and not (events or variables or given)

    def external(self, results: Iterable[Any] = ()) -> tuple[ExternalState, list[str]]:
        """What was seen, now that it has ended; and why the outcome can't be kept, if it can't. `results`: displayed values."""
        with looking_away():
            files, problems = self._files()
            packages = (*self._packages, *(type(value).__module__.partition(".")[0] for value in results))
            used = settings_used(packages, self.mentions.words)
            kept = {what: self._settings.get(what, "") for what in used} | self._given_settings | self._added
            names = self._names
            if self._evaluated is not None:
                names = names | self._evaluated.names
                problems += self._evaluated.problems()
            return ExternalState(files, self._moved(), kept, names, self._seen_variables()), problems

    def _moved(self) -> dict[str, str]:
        """Generators whose numbers were drawn, each with the state that it was in, or that nobody had seeded it."""
        if not self.alone or self._generators is None:
            return {}
        found: dict[str, str] = {}
        for name, after in generators().items():
            before = self._generators.get(name)
            if name in self._seeded_at_once:
                found[name] = ANY
            elif before is None:
                found |= {name: UNSEEDED} if after.seeded else {}
            elif not before.is_at(after) or (after.seeded and self._may_seed()):
                found[name] = before.before()
        return found

    def _may_seed(self) -> bool:
        """Where it has left a generator as it was, has it maybe seeded it again?"""
        return any("seed" in word.lower() or word in _SETTING_STATES for word in self.mentions.words)

    def moved_states(self, external: ExternalState) -> dict[str, Any]:
        """The states that seeded generators have now, of those that were moved: what comes after must continue from there."""
        now = generators() if external.generators else {}
        return {name: g.state for name, g in now.items() if name in external.generators and g.seeded}

    def _seen_variables(self) -> dict[str, str]:
        found = dict(self._given_variables)
        for name, (value, is_passed) in self._variables.items():
            counts = environment.named_by(name, self.mentions.words, self.mentions.texts) if is_passed else name
            if counts == name:
                found[name] = self._around.digest(name, value)
            elif counts:
                found[counts] = self._around.variable(counts)
        others = environment.not_met(self.mentions.words, self.mentions.texts) if self._is_passed else set()
        others |= environment.given_to_children(self.mentions.texts) if self._is_inherited else set()
        for name in others - found.keys() - self._variables.keys() - self._set:
            found[name] = self._around.variable(name)
        return found

    def _files(self) -> tuple[list[FileState], list[str]]:
        found: dict[tuple[str, str], FileState] = {}
        problems: list[str] = []

        def add(where: str, name: str, how: str) -> None:
            if how in (READ, LISTED, LOOKED_FOR) and not self._counts(where):
                return
            digest = state_of(how, where)
            if digest == CHANGING:
                problems.append(f"{name} changed while it was compared")
            found.setdefault((how, where), FileState(name, how, digest))

        for where, (name, how, before) in self._first.items():
            if how == READ and stat_of(where) != before:
                if self._counts(where):
                    problems.append(f"{name} changed after it had read it")
            elif (
                (how == READ and (before is None or os.path.isfile(where)))
                or (how == MADE and os.path.isfile(where))
                or (how == REMOVED and not os.path.lexists(where))
                or (how == FOLDER and os.path.isdir(where))
                or (how == DATABASE and os.path.lexists(where))
            ):
                add(where, name, how)
        for where, name in self._listed.items():
            add(where, name, LISTED)
        for where, (name, kind, closely) in self._looked_for.items():
            is_kept = where not in self._first and kind_of(where) == kind  # else it has made or removed it itself
            if is_kept and (kind != "folder" or self._counts(os.path.join(where, ""))):
                add(where, name, READ if closely and kind == "file" else LOOKED_FOR)
        opened = list(self._opened_natively(problems))
        for where, name, how in opened:
            add(where, name, how)
        for where in self._links_to({where for where, _, how in opened if how == READ}):
            add(where, self._places.as_written(where, self._folder), READ)
        for where, name, how in self._mentioned():
            if where not in self._first:
                add(where, name, how)
        for where in self._modules():
            add(where, self._places.as_written(where, self._folder), CODE)
        for file in self._given.values():
            where = os.path.normpath(os.path.join(self._folder, file.path))
            if state_of(file.how, where) != file.digest:
                problems.append(f"{file.path} changed after a step had read it")
            found.setdefault((file.how, where), file)
        return list(found.values()), problems

    def _opened_natively(self, problems: list[str]) -> Iterator[tuple[str, str, str]]:
        """What inotify saw and Python didn't."""
        history: dict[str, list[str]] = {}
        for event in self._events or ():
            history.setdefault(event.path, []).append(event.what)
        for where, whats in history.items():
            name = self._places.as_written(where, self._folder)
            if where in self._first or where in self._listed or not self._counts(where):
                continue
            if whats[0] == inotify.LISTED:
                if self._places.is_mentioned(where) and not is_above(where, self._folder):
                    yield where, name, LISTED
                continue
            if where not in self._places.files and where.endswith(_NO_DATA):
                continue
            if not os.path.isfile(where):
                if not os.path.lexists(where) and whats[0] != inotify.CREATED and inotify.GONE in whats:
                    yield where, name, REMOVED
            elif whats[0] == inotify.CREATED:
                yield where, name, MADE
            elif inotify.OPENED in whats:
                first_end = next((what for what in whats if what in (inotify.CLOSED, inotify.WRITTEN)), inotify.CLOSED)
                is_changed = inotify.WRITTEN in whats and os.stat(where).st_mtime_ns >= self._began_ns
                if is_changed and first_end == inotify.CLOSED:
                    problems.append(f"{name} changed after it had been read")
                elif where in self._places.files or not is_written_elsewhere(where):
                    yield where, name, MADE if is_changed else READ

    def _links_to(self, files: set[str]) -> list[str]:
        """What is mentioned and leads to one of these by a link: it may lead elsewhere the next time."""
        return [
            where
            for where in (self._places.files if files else ())
            if where not in self._first and where not in files and os.path.realpath(where) in files
        ]

    def _mentioned(self) -> Iterator[tuple[str, str, str]]:
        """What counts as it stands: where nobody sees what is opened, and what is not there."""
        places = self._places
        for where in places.files:
            if (not self._is_seen(where) or self._asks) and os.path.isfile(where) and not is_elsewhere(where):
                name = places.as_written(where, self._folder)
                yield where, name, READ if stat_of(where) == self._before[where] else MADE
        for where in places.folders:
            if self._is_seen(os.path.join(where, "")) or is_above(where, self._folder) or not self._counts(where):
                continue
            yield where, places.as_written(where, self._folder), LISTED
            for inner in _files_in(where):
                yield inner, places.as_written(inner, self._folder), READ
        for text in places.absent:
            where = os.path.normpath(os.path.join(self._folder, os.path.expanduser(text)))
            if kind_of(where) == ABSENT:
                yield where, text, LOOKED_FOR
        for pattern in places.patterns:
            where = os.path.normpath(os.path.join(self._folder, pattern))
            if state_of(MATCHED, where):
                yield where, pattern, MATCHED

    def _is_seen(self, where: str) -> bool:
        return self._events is not None and self._watcher is not None and self._watcher.sees(where)

    def _modules(self) -> Iterator[str]:
        """The files of the project's modules that were imported, or may have been asked for by a computed name."""
        waiting, seen = [*self._imported, *modules_named(self.mentions)], set[str]()
        while waiting:
            name = waiting.pop()
            if name in seen or name.partition(".")[0] == "durable_nb":
                continue
            seen.add(name)
            filename = getattr(sys.modules.get(name), "__file__", None)
            if isinstance(filename, str) and filename.endswith(".py") and self._counts(filename):
                yield filename
                waiting += _imports_in(filename, stat_of(filename), name)


_NO_DATA = (".py", ".pyc", ".pyi", ".so", ".pyd", ".ipynb", ".lock")
"""Modules are compared as code; notebooks are opened and written by those who edit them, while cells run."""


def _how(event: str, args: tuple[Any, ...]) -> str:
    if event != "open":
        return READ
    flags = args[2] if isinstance(args[2], int) else 0
    if flags & (os.O_TRUNC | os.O_EXCL):
        return MADE
    if flags & os.O_APPEND or (flags & os.O_WRONLY and not flags & os.O_RDWR):
        return ADDED
    return READ


def _files_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.path for entry in entries if not entry.name.startswith(".") and entry.is_file())[
                :MOST_IN_FOLDER
            ]
    except OSError:
        return []


@lru_cache(maxsize=1024)
def _imports_in(filename: str, _stat: Stat, name: str) -> tuple[str, ...]:
    try:
        with open(filename, "rb") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return ()
    package = name if os.path.basename(filename) == "__init__.py" else name.rpartition(".")[0]
    return tuple(_absolute(level, module, package) for level, module in imported(tree))


def _absolute(level: int, module: str, package: str) -> str:
    above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
    return ".".join([*above, module] if module else above)


# -- who is told -------------------------------------------------------------------------------------------------------

_watches: list[Watch] = []
_noticing = contextlib.ExitStack()
"""Of what the process is asked, while there are any."""
_of_step: ContextVar[Watch | None] = ContextVar("durable_nb_watch", default=None)
_steps: list[Watch] = []
_hooked = False
_GIVING = frozenset({"subprocess.Popen", "os.posix_spawn"})
"""Children may be given another environment, by the last argument."""
_CHILDREN = _GIVING | {"os.system", "os.fork", "os.forkpty"}
_EVENTS = frozenset(
    {"open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "sqlite3.connect", "import", "exec"}
    | _CHILDREN
)


def prepare(places: Places) -> None:
    """Have what is mentioned watched. Call it before whoever mentions it runs."""
    watcher = inotify.watcher()
    if watcher is None:
        return
    watcher.wait(_SETTING_UP_S)
    with looking_away(), contextlib.suppress(OSError):  # no watches left
        for where in places.files:
            if not watcher.sees(where) and not is_elsewhere(where):
                watcher.watch(where)
        for where in places.folders:
            if where not in (os.sep, os.path.expanduser("~")) and not is_elsewhere(where + os.sep):
                watcher.watch(where)


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Tell `watch` what happens meanwhile, on any thread."""
    global _hooked  # noqa: PLW0603  an audit hook is for the whole process and can't be taken back
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True
    with contextlib.ExitStack() as stack:
        watcher = inotify.watcher()
        if watcher is not None:
            stack.enter_context(watcher.listening())
            watch.restart()
        if not _watches:
            _noticing.enter_context(environment.use_noticed(_variable_read, _variable_set, _variables_passed))
            _noticing.enter_context(_questions_noticed())
        _watches.append(watch)
        try:
            yield
        finally:
            _watches.remove(watch)
            watch.close()
            if not _watches:  # the last one, whichever began first: a cell in the background may outlast others
                _noticing.close()


@contextmanager
def watching_step(watch: Watch) -> Iterator[None]:
    """Tell `watch` what the calling task does meanwhile, in worker threads too."""
    for other in _steps:
        other.alone = watch.alone = False
    _steps.append(watch)
    token = _of_step.set(watch)
    try:
        yield
    finally:
        _of_step.reset(token)
        _steps.remove(watch)
        watch.close()


def _listening() -> Iterator[Watch]:
    step = _of_step.get()
    yield from _watches
    if step is not None:
        yield step


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watches or event not in _EVENTS or getattr(away, "on", False):
        return
    away.on = True
    try:
        for watch in _listening():
            watch.event(event, args)
    finally:
        away.on = False


def _variable_read(name: str, value: str | None, is_passed: bool) -> None:
    if not getattr(away, "on", False):
        for watch in _listening():
            watch.variable_read(name, value, is_passed)


def _variables_passed() -> None:
    if not getattr(away, "on", False):
        for watch in _listening():
            watch.variables_passed()


def _variable_set(name: str) -> None:
    if not getattr(away, "on", False):
        for watch in _listening():
            watch.variable_set(name)


_ASKING: tuple[types.ModuleType, ...] = tuple(
    module for name in ("genericpath", "posixpath", "pathlib", "pathlib._local", "pathlib._os")
    if (module := sys.modules.get(name)) is not None and "os" in vars(module)
)  # fmt: skip
"""Modules whose functions ask `os.stat` whether a file is there."""
_CLOSELY = frozenset({"getsize", "getmtime", "getctime", "getatime", "samefile", "stat"})
_ONLY_WHETHER = frozenset("exists is_file is_dir is_symlink is_mount lexists isfile isdir islink".split())


class _AskingOs(types.ModuleType):
    """`os`, but for the two functions that ask for a file."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    @staticmethod
    def stat(path: Any, *args: Any, **options: Any) -> Any:
        return _asked(os.stat, path, args, options)

    @staticmethod
    def lstat(path: Any, *args: Any, **options: Any) -> Any:
        return _asked(os.lstat, path, args, options)


def _asked(function: Callable[..., Any], path: Any, args: Any, options: Any) -> Any:
    if getattr(away, "on", False) or isinstance(path, int) or options.get("dir_fd") is not None:
        return function(path, *args, **options)
    try:
        found = function(path, *args, **options)
    except (OSError, ValueError):
        _note_asked(path, ABSENT, closely=False)
        raise
    kind = "folder" if found.st_mode & 0o170000 == 0o040000 else "file"
    frame = sys._getframe(2)
    closely = frame.f_code.co_name in _CLOSELY and (frame.f_back is None or frame.f_back.f_code.co_name not in _ONLY_WHETHER)
    _note_asked(path, kind, closely=closely)
    return found


def _note_asked(path: Any, kind: str, *, closely: bool) -> None:
    away.on = True
    try:
        for watch in _listening():
            watch.looked_for(path, kind, closely=closely)
    except (TypeError, ValueError):  # what is not a path at all
        pass
    finally:
        away.on = False


@contextmanager
def _questions_noticed() -> Iterator[None]:
    telling = _AskingOs("os")
    for module in _ASKING:
        module.os = telling  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in _ASKING:
            module.os = os  # type: ignore[attr-defined]


def _watches_folders(frame: Any) -> bool:
    """Was it inotify's thread, which looks into each new folder for more?"""
    return frame is not None and frame.f_globals.get("__name__") == inotify.__name__


def _imports(frame: Any) -> bool:
    """Was it the import system? What it reads counts by the fingerprint of the code."""
    return frame is not None and "importlib" in frame.f_code.co_filename
