"""What a cell depends on beyond its names: files it reads, folders it lists, global random generators. Seen while it runs.

Reading is seen by an audit hook (PEP 578). Native readers raise no event, so existing files that the cell's text constants
or path inputs name count as read too. What the cell wrote first is no input of it, but its result: gone or changed, the
cell has to run again.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import os
import random
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from durable_nb._fingerprint import hash_value

ABSENT = ""
READ, LISTED, MADE, REMOVED, FOLDER, DATABASE = "read", "listed", "made", "removed", "folder", "database"
UNSEEDED = "unseeded"

_CHUNK = 1 << 22
_LONGEST_PATH = 1024


@dataclass(frozen=True, slots=True)
class FileState:
    """A file or folder as the cell named it (relative names stay relative), and its content's digest ('' absent)."""

    path: str
    how: str
    digest: str


@dataclass(frozen=True, slots=True)
class World:
    """All of it, for one execution."""

    files: list[FileState] = field(default_factory=list)
    generators: dict[str, str] = field(default_factory=dict)
    """Of the random generators that the cell moved: the state they were in, or that nobody had seeded them."""
    settings: dict[str, str] | None = None
    """Digests of what is set for the whole process and shows in results, where it is not as it is by default. None for a
    step, which doesn't depend on it."""
    names: dict[str, str] = field(default_factory=dict)
    """Digests of variables that the cell may have left alone, or bound to the very object that they held."""

    def digest(self) -> str:
        """Tells executions of one cell apart that saw different files."""
        parts = [f"{f.how}\0{f.path}\0{f.digest}" for f in self.files]
        parts += [f"{k}\0{v}" for found in (self.generators, self.names, self.settings or {}) for k, v in sorted(found.items())]
        return hashlib.blake2b("\0\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()

    def changes(self, namespace: Mapping[str, Any]) -> list[str]:
        """What is different now, in words; empty where a cell that ran in this world would see the same again."""
        found = [f"{name} changed" for name, digest in self.names.items() if name_digest(namespace, name) != digest]
        for file in self.files:
            now = _STATES.get(file.how, content_digest)(file.path)
            if now != file.digest:
                found.append(f"{file.path} {'is gone' if now == ABSENT else 'changed' if file.digest else 'is new'}")
        if self.settings is not None:
            now_set = settings()
            found += [f"{w} changed" for w in {**self.settings, **now_set} if self.settings.get(w) != now_set.get(w)]
        seen = {name: generator.before() for name, generator in generators().items()} if self.generators else {}
        found += [f"the state of {n} changed" for n, state in self.generators.items() if seen.get(n, UNSEEDED) != state]
        return found


def name_digest(namespace: Mapping[str, Any], name: str) -> str:
    """Of what a name holds; '' where it holds nothing, or what can't be compared."""
    with contextlib.suppress(Exception):
        return hash_value(namespace[name])
    return ABSENT


# -- random generators -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Generator:
    """A global random generator: Python's or numpy's."""

    seeded: bool
    state: Any

    def digest(self) -> str:
        """Of the state."""
        state = [getattr(part, "tobytes", lambda part=part: part)() for part in self.state]
        return hashlib.blake2b(repr(state).encode(), digest_size=16).hexdigest()

    def before(self) -> str:
        """The state as an input: one that nobody seeded is none."""
        return self.digest() if self.seeded else UNSEEDED


_seeded = False
_restored: set[str] = set()
"""Generators that are in a state of somebody's choice because a restored cell left them in it."""


def generators() -> dict[str, Generator]:
    """The generators that are loaded, as they stand."""
    found = {"random": Generator(_seeded, random.getstate())}
    numpy_random: Any = sys.modules.get("numpy.random")
    if numpy_random is not None:
        bits = numpy_random.mtrand._rand._bit_generator
        # numpy forgets the entropy it began with when it is seeded the legacy way.
        seeded = getattr(bits, "_seed_seq", None) is None or "numpy.random" in _restored
        found["numpy.random"] = Generator(seeded, numpy_random.get_state())
    return found


def set_generator(name: str, state: Any) -> None:
    """Put a generator into a state that `generators` gave."""
    if name == "random":
        random.setstate(state)
    else:
        numpy_random: Any = importlib.import_module(name)
        numpy_random.set_state(state)
        _restored.add(name)


@contextmanager
def seeds_noticed() -> Iterator[None]:
    """Notice when somebody seeds Python's generator: nothing in its state tells."""
    before = random.seed, random.setstate

    def noticing(function: Callable[..., None]) -> Callable[..., None]:
        def seed(*args: Any, **kwargs: Any) -> None:
            global _seeded  # noqa: PLW0603  there is one such generator in a process
            function(*args, **kwargs)
            _seeded = bool(args and args[0] is not None) or bool(kwargs)

        return seed

    random.seed, random.setstate = (noticing(function) for function in before)
    try:
        yield
    finally:
        random.seed, random.setstate = before


# -- files -------------------------------------------------------------------------------------------------------------

_Stat = tuple[int, int, int] | None


def _stat(path: str) -> _Stat:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=4096)
def _digest_of(path: str, _stat: _Stat) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def content_digest(path: str) -> str:
    """Of a file's bytes, remembered for as long as inode, size and modification time stay; '' where there is no file."""
    where = os.path.abspath(path)
    stat = _stat(where)
    if stat is None or not os.path.isfile(where):
        return ABSENT
    try:
        with _looking_away():
            return _digest_of(where, stat)
    except OSError:
        return ABSENT


def _listing(path: str) -> str:
    try:
        with _looking_away():
            names = sorted(os.listdir(path or "."))
    except OSError:
        return ABSENT
    return hashlib.blake2b("\0".join(names).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _folder(path: str) -> str:
    return "a folder" if os.path.isdir(path) else ABSENT


def _presence(path: str) -> str:
    return "there" if os.path.lexists(path) else ABSENT


_STATES = {LISTED: _listing, FOLDER: _folder, REMOVED: _presence, DATABASE: _presence}


class Watch:
    """Sees what a step does to files while it runs."""

    def __init__(self, mentioned: Iterable[str], own: Path) -> None:
        """`mentioned`: paths that the cell names; `own`: the store, whose files don't count."""
        self._own = str(own)
        self._folder = os.getcwd()
        self._first: dict[str, tuple[str, str, _Stat]] = {}
        """By absolute path: the name used, how it was touched first, and its state then."""
        self._listed: dict[str, str] = {}
        self._mentioned = {path: _stat(path) for path in mentioned}
        self._lock = threading.Lock()

    def event(self, event: str, args: tuple[Any, ...]) -> None:
        """One audit event. Called inside the call that raises it: must be quick, and must not raise."""
        path = args[0]
        if isinstance(path, int) or (path is None and event == "open"):
            return
        name = os.fsdecode(path) if path is not None else "."
        where = os.path.join(self._folder, name) if os.getcwd() == self._folder else os.path.abspath(name)
        where = os.path.normpath(where)
        if _is_elsewhere(where) or where.startswith(self._own):
            return
        kept = name if os.getcwd() == self._folder else where
        with self._lock:
            if event in ("os.listdir", "os.scandir"):
                if where not in self._listed and not _imports(sys._getframe(2)):
                    self._listed[where] = kept
                    self._first.setdefault(where + "/", (kept, LISTED, None))
                return
            if event == "os.rename":
                event, args = "open", (args[1], "w", os.O_WRONLY | os.O_TRUNC)
                kept = os.fsdecode(args[0])
                where = os.path.abspath(kept)
            if event in ("os.remove", "os.rmdir", "os.mkdir"):
                if args[-1] != -1:  # relative to a folder's descriptor
                    return
                if event == "os.mkdir" or where not in self._first:
                    self._first[where] = kept, FOLDER if event == "os.mkdir" else REMOVED, None
                return
            how = self._how(event, args)
            if how == READ and os.path.isdir(where):  # to remove or to walk it by its descriptor
                return
            if event == "sqlite3.connect" and not os.path.exists(where):
                how = DATABASE  # which it makes; what is put into it then is outside
            if where not in self._first and not (
                how == READ and where.endswith((".py", ".pyc")) and _imports(sys._getframe(2))
            ):
                self._first[where] = kept, how, _stat(where)

    @staticmethod
    def _how(event: str, args: tuple[Any, ...]) -> str:
        if event != "open":
            return READ
        flags = args[2] if isinstance(args[2], int) else 0
        if flags & (os.O_TRUNC | os.O_EXCL):
            return MADE
        if flags & os.O_APPEND or (flags & os.O_WRONLY and not flags & os.O_RDWR):
            return "added to"
        return READ

    def read(self) -> World:
        """What a step has read: files that it made are its doing, and no condition for taking its result."""
        files, problems = self._files()
        return World([] if problems else [file for file in files if file.how in (READ, LISTED)])

    def _files(self) -> tuple[list[FileState], list[str]]:
        files: list[FileState] = []
        problems: list[str] = []
        for where, (name, how, before) in self._first.items():
            if how == LISTED:
                files.append(FileState(name, LISTED, _listing(name)))
            elif how == READ:
                if _stat(where) != before:
                    problems.append(f"{name} changed after it had read it")
                elif before is None or os.path.isfile(where):
                    files.append(FileState(name, READ, content_digest(where)))
            elif how == MADE and os.path.isfile(where):
                files.append(FileState(name, MADE, content_digest(where)))
            elif how == REMOVED and not os.path.lexists(where):
                files.append(FileState(name, REMOVED, ABSENT))
            elif how == DATABASE and os.path.exists(where):
                files.append(FileState(name, DATABASE, _presence(where)))
            elif how == FOLDER and os.path.isdir(where):
                files.append(FileState(name, FOLDER, _folder(where)))
        for name, before in self._mentioned.items():
            where = os.path.abspath(os.path.join(self._folder, name))
            if before is None and where not in self._first and _looks_like_path(name) and not os.path.exists(where):
                files.append(FileState(name, READ, ABSENT))  # os.path.exists() raises no audit event
            if where not in self._first and os.path.isfile(where) and not _is_elsewhere(where):
                files.append(FileState(name, READ if _stat(where) == before else MADE, content_digest(where)))
        return files, problems

    def saw(self, world: World) -> None:
        """A restored step read these files when it ran."""
        with self._lock:
            for file in world.files:
                where = os.path.abspath(file.path)
                self._first.setdefault(where + ("/" if file.how == LISTED else ""), (file.path, file.how, _stat(where)))


class CellWatch(Watch):
    """Sees what one cell does to files and to the global random generators."""

    def __init__(self, mentioned: Iterable[str], own: Path) -> None:
        super().__init__(mentioned, own)
        self._generators = generators()
        self._settings = settings()

    def world(self) -> tuple[World, list[str]]:
        """What the cell saw, now that it has ended; and why its result can't be kept, if it can't."""
        files, problems = self._files()
        after = generators()
        unmoved = {n for n, g in self._generators.items() if n in after and g.digest() == after[n].digest()}
        moved = {n: self._generators[n].before() if n in self._generators else UNSEEDED for n in after.keys() - unmoved}
        moved = {n: state for n, state in moved.items() if n in self._generators or after[n].seeded}
        return World(files, moved, self._settings), problems

    @staticmethod
    def moved_states(world: World) -> dict[str, Any]:
        """The states that seeded generators have now, of those the cell moved: what comes after must go on from there."""
        return {name: g.state for name, g in generators().items() if name in world.generators and g.seeded}


def settings() -> dict[str, str]:
    """By what they are of, digests of settings that are not as they are by default. A library that isn't loaded has none."""
    found = {}
    for what, (module, ask) in _SETTINGS.items():
        loaded = sys.modules.get(module)
        unusual = ask(loaded) if loaded is not None else None
        if unusual:
            found[what] = hash_value(unusual)
    return found


_NUMPY_PRINTS = {
    "edgeitems": 3, "threshold": 1000, "precision": 8, "suppress": False, "linewidth": 75, "nanstr": "nan", "infstr": "inf",
    "sign": "-", "formatter": None, "floatmode": "maxprec", "legacy": False, "override_repr": None,
}  # fmt: skip
_NUMPY_ERRORS = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}


def _unusual_in_numpy(numpy: Any) -> dict[str, Any]:
    usual = {**_NUMPY_PRINTS, **_NUMPY_ERRORS}
    return {k: v for k, v in {**numpy.get_printoptions(), **numpy.geterr()}.items() if usual.get(k) != v}


def _unusual_in_pandas(config: Any) -> dict[str, Any]:
    found = {}
    for key, option in config._registered_options.items():
        now = config._global_config  # get_option() asks each time whether the option is deprecated
        for part in key.split("."):
            now = now[part]
        if now != option.defval:
            found[key] = now
    return found


def _unusual_in_matplotlib(matplotlib: Any) -> dict[str, Any]:
    usual = getattr(matplotlib, "rcParamsDefault", {})
    chosen = {"backend", "backend_fallback", "interactive"}  # by the front end
    return {k: v for k, v in dict.items(getattr(matplotlib, "rcParams", {})) if k not in chosen and usual.get(k) != v}


def _unusual_in_decimal(decimal: Any) -> tuple[Any, ...]:
    now, usual = (
        (c.prec, c.rounding, c.Emin, c.Emax, c.capitals, c.clamp, sorted(str(t) for t, on in c.traps.items() if on))
        for c in (decimal.getcontext(), decimal.DefaultContext)
    )
    return () if now == usual else now


_STARTED_IN = os.getcwd()


def _elsewhere(_os: Any) -> str:
    """The working directory, where it isn't that of the beginning: a folder that was moved as a whole is no other one."""
    now = os.getcwd()
    return "" if now == _STARTED_IN else now


_SETTINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "numpy's options": ("numpy", _unusual_in_numpy),
    "pandas' options": ("pandas._config.config", _unusual_in_pandas),
    "matplotlib's rcParams": ("matplotlib", _unusual_in_matplotlib),
    "the decimal context": ("decimal", _unusual_in_decimal),
    "the working directory": ("os", _elsewhere),
}


_watches: list[Watch] = []
_of_step: ContextVar[Watch | None] = ContextVar("durable_nb_watch", default=None)
_hooked = False
_EVENTS = frozenset({"open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "sqlite3.connect"})
_away = threading.local()


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Tell `watch` what happens meanwhile, on any thread."""
    global _hooked  # noqa: PLW0603  an audit hook is for the whole process and can't be taken back
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


@contextmanager
def watching_step(watch: Watch) -> Iterator[None]:
    """Tell `watch` what the calling task does meanwhile, in worker threads too."""
    token = _of_step.set(watch)
    try:
        yield
    finally:
        _of_step.reset(token)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watches or event not in _EVENTS or getattr(_away, "on", False):
        return
    _away.on = True
    try:
        step = _of_step.get()
        for watch in (*_watches, step) if step is not None else _watches:
            watch.event(event, args)
    finally:
        _away.on = False


@contextmanager
def _looking_away() -> Iterator[None]:
    """What the package itself reads meanwhile is not the cell's doing."""
    before = getattr(_away, "on", False)
    _away.on = True
    try:
        yield
    finally:
        _away.on = before


def _imports(frame: Any) -> bool:
    """Was it the import system? What it reads counts by the fingerprint of the code."""
    return frame is not None and "importlib" in frame.f_code.co_filename


@lru_cache(maxsize=4096)
def _is_elsewhere(path: str) -> bool:
    """The interpreter's own files, caches, and the system's: no inputs of anybody's data work."""
    return path.startswith(_system_folders()) or "/__pycache__/" in path or "/site-packages/" in path or "/ipykernel_" in path


@lru_cache(maxsize=1)
def _system_folders() -> tuple[str, ...]:
    home = Path.home()
    folders = [
        sys.prefix,
        sys.base_prefix,
        "/usr",
        "/etc",
        "/proc",
        "/sys",
        "/dev",
        "/run",
        "/lib",
        "/bin",
        "/var/lib",
        str(home / ".cache"),
    ]
    variables = "MPLCONFIGDIR IPYTHONDIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR JUPYTER_CONFIG_DIR XDG_CACHE_HOME"
    folders += [os.environ.get(variable) or "" for variable in variables.split()]
    folders += [
        str(home / ".config" / "matplotlib"),
        str(home / ".ipython"),
        str(home / ".jupyter"),
        str(home / ".local" / "share" / "jupyter"),
    ]
    return tuple(folder.rstrip("/") + "/" for folder in folders if folder and folder != "/")


def _looks_like_path(text: str) -> bool:
    """Of a text that names nothing: could it be meant as a file? It is written down, so no URL with a key in it may be."""
    return not re.search(r"[\s?&=@:;<>{}()]", text) and ("/" in text or bool(os.path.splitext(text)[1]))


def mentioned_paths(tree: ast.Module, inputs: Mapping[str, Any]) -> set[str]:
    """Texts of the cell, words of its shell commands, and values of its inputs that could name a file."""
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    texts |= {word.strip("'\"") for text in texts if len(text) < _LONGEST_PATH for word in text.split()}
    texts |= {os.fspath(v) for v in inputs.values() if isinstance(v, (str, Path))}
    return {text for text in texts if 0 < len(text) < _LONGEST_PATH and "\n" not in text and "\0" not in text}
