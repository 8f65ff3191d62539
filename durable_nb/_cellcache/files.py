"""Files and folders as inputs of cells and steps: which ones count, and the state that one is in."""

from __future__ import annotations

import ast
import contextlib
import glob
import hashlib
import os
import re
import stat as stats
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import xxhash

from durable_nb._cellcache import inotify
from durable_nb._fingerprint import normalise

ABSENT = ""
CHANGING = "changing"
"""In place of a digest, of a file that is being written to."""

READ, LISTED, MADE, REMOVED, FOLDER = "read", "listed", "made", "removed", "folder"
ADDED, DATABASE = "added to", "database"
LOOKED_FOR, MATCHED, CODE = "looked for", "matched", "code"
"""Is it there, and is it a file; which files does a pattern name; what does a module say."""

MOST_IN_FOLDER = 1000
"""Files of a mentioned folder that count where nobody can see which of them are read."""

_CHUNK = 1 << 22
_FRESH_NS = 100 * 10**6
"""A file may be changed twice within a tick of the file system's clock: what was written just now isn't remembered."""

Stat = tuple[int, int, int, int] | None


@dataclass(frozen=True, slots=True)
class FileState:
    """A file or folder as it was named (relative names stay relative), and the digest of what was seen of it ('' absent)."""

    path: str
    how: str
    digest: str


def here() -> str:
    """The working directory; the root where it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return os.sep


def stat_of(path: str) -> Stat:
    """What changes when a file is written to; None where there is nothing."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def state_of(how: str, path: str) -> str:
    """The digest of what is seen of a file or folder now, looked at in this way."""
    return _STATES.get(how, content_digest)(path)


def content_digest(path: str) -> str:
    """Of a file's bytes, remembered for as long as inode, size and times stay; '' where there is no file."""
    where = os.path.abspath(path)
    before = stat_of(where)
    if before is None or not os.path.isfile(where):
        return ABSENT
    try:
        is_fresh = time.time_ns() - before[2] < _FRESH_NS
        digest = (_digest_of.__wrapped__ if is_fresh else _digest_of)(where, before)
    except OSError:  # not ours to read
        return ABSENT
    return digest if stat_of(where) == before else CHANGING


@lru_cache(maxsize=4096)
def _digest_of(path: str, _stat: Stat) -> str:
    digest = xxhash.xxh3_128()
    with looking_away(), _opened(path) as file:
        while chunk := os.read(file, _CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _opened(path: str) -> Iterator[int]:
    watcher = inotify.watcher()
    with watcher.unseen(path) if watcher is not None else contextlib.nullcontext():
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


def _listing(path: str) -> str:
    try:
        return _digest_of_names(_names_in(path or "."))
    except OSError:
        return ABSENT


def _names_in(path: str) -> list[str]:
    watcher = inotify.watcher()
    with looking_away(), watcher.unseen(os.path.abspath(path)) if watcher is not None else contextlib.nullcontext():
        return sorted(os.listdir(path))


def _digest_of_names(names: list[str]) -> str:
    return hashlib.blake2b("\0".join(names).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _folder(path: str) -> str:
    return "a folder" if os.path.isdir(path) else ABSENT


def _presence(path: str) -> str:
    return "there" if os.path.lexists(path) else ABSENT


def kind_of(path: str) -> str:
    """'file' or 'folder', '' where there is nothing."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return ABSENT
    return "folder" if stats.S_ISDIR(mode) else "file"


def _matches(pattern: str) -> str:
    """By their names below the first folder that the pattern leaves open: it may be given from anywhere."""
    where = os.path.abspath(pattern)
    above = os.path.dirname(_OPEN.split(where)[0])
    with looking_away():
        found = sorted(os.path.relpath(name, above) for name in glob.glob(where, recursive="**" in where))
    return _digest_of_names(found) if found else ABSENT


_OPEN = re.compile(r"[*?\[]")


def _code(path: str) -> str:
    before = stat_of(os.path.abspath(path))
    return ABSENT if before is None else _code_of(os.path.abspath(path), before)


@lru_cache(maxsize=1024)
def _code_of(path: str, _stat: Stat) -> str:
    try:
        with looking_away(), _opened(path) as file:
            source = b"".join(iter(lambda: os.read(file, _CHUNK), b""))
    except OSError:
        return ABSENT
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        source = normalise(ast.parse(source))
    return hashlib.blake2b(source, digest_size=16).hexdigest()


_STATES: dict[str, Callable[[str], str]] = {
    LISTED: _listing,
    FOLDER: _folder,
    REMOVED: _presence,
    DATABASE: _presence,
    LOOKED_FOR: kind_of,
    MATCHED: _matches,
    CODE: _code,
}


# -- what counts -------------------------------------------------------------------------------------------------------


class Counting:
    """Which files count in one execution. Paths are absolute and normal."""

    def __init__(self, own: tuple[str, ...], named: frozenset[str] = frozenset()) -> None:
        """`own`: the store and the notebook; `named`: hidden folders that the code names, which count for that."""
        self._own, self._named = own, named
        self._folder = here()

    def __call__(self, where: str) -> bool:
        """May this be an input at all?"""
        if is_elsewhere(where) or any(where == own or where.startswith(own + os.sep) for own in self._own):
            return False
        return _is_visible(os.path.dirname(where), self._folder, self._named)


@lru_cache(maxsize=4096)
def _is_visible(folder: str, base: str, named: frozenset[str]) -> bool:
    """Is it in no hidden folder, virtual environment or cache? The folder that the notebook lies in hides nothing."""
    if folder == base or base.startswith(folder + os.sep) or folder == os.sep:
        return True
    name = os.path.basename(folder)
    if inotify.is_skipped(name) and name not in named:
        return False
    if any(os.path.lexists(os.path.join(folder, mark)) for mark in inotify.MARKS):
        return False
    return _is_visible(os.path.dirname(folder), base, named)


def is_above(folder: str, base: str) -> bool:
    """Is it so wide that its mention says nothing: the root, the home folder, `base` itself or a folder above that?"""
    return folder in (os.sep, os.path.expanduser("~"), base) or base.startswith(folder.rstrip(os.sep) + os.sep)


@lru_cache(maxsize=4096)
def is_elsewhere(path: str) -> bool:
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
        str(Path(__file__).parents[1]),
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


def looks_like_path(text: str) -> bool:
    """Of a text that names nothing: could it be meant as a file? It is written down, so no URL with a key in it may be."""
    return not re.search(r"[\s?&=@:;<>{}()]", text) and ("/" in text or bool(os.path.splitext(text)[1]))


# -- the package's own reading -----------------------------------------------------------------------------------------

away = threading.local()


@contextmanager
def looking_away() -> Iterator[None]:
    """What the package itself reads meanwhile is not the cell's doing."""
    before = getattr(away, "on", False)
    away.on = True
    try:
        yield
    finally:
        away.on = before
