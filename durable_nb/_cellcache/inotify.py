"""Files that native code opens, on Linux: pyarrow, polars, duckdb and child processes raise no audit event, but inotify tells.

One watcher serves the process. Folders are watched, never whole file systems: the notebook's, once, in the background, and
those that a cell's code or inputs mention, when it is about to run. What is not watched, and whatever happens while the
kernel's queue is full, is not seen, and `sees` says so: then mentions count as they stand.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from durable_nb._disks import file_system_of

MOST_WATCHES = 8192
_MOST_ENTRIES = 400_000
"""Entries of folders looked at for folders among them, in one walk."""

OPENED, CLOSED, WRITTEN, CREATED, GONE, LISTED = "opened", "closed", "written", "created", "gone", "listed"
"""Closed: after it had been opened for reading only; written: it was open for writing and was closed."""

_IN_OPEN, _IN_CLOSE_WRITE, _IN_CLOSE_NOWRITE, _IN_CREATE, _IN_DELETE = 0x20, 0x8, 0x10, 0x100, 0x200
_IN_MOVED_FROM, _IN_MOVED_TO, _IN_MOVE_SELF = 0x40, 0x80, 0x800
_IN_ISDIR, _IN_IGNORED, _IN_Q_OVERFLOW = 0x40000000, 0x8000, 0x4000
# Closing is told apart from opening also because the kernel merges equal events that follow each other.
_MASK = _IN_OPEN | _IN_CLOSE_WRITE | _IN_CLOSE_NOWRITE | _IN_CREATE | _IN_DELETE | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_MOVE_SELF
_HEAD = struct.Struct("iIII")
_BUFFER_BYTES = 1 << 18
_DRAINED_EVERY_S = 0.05

_SKIPPED = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules"})
MARKS = frozenset({"pyvenv.cfg", "CACHEDIR.TAG"})
"""Files that say of their folder: a virtual environment, a cache."""


@dataclass(frozen=True, slots=True)
class FileEvent:
    """One thing that happened to a file or folder, by whichever process."""

    what: str
    path: str


class Watcher:
    """What happens in the folders that are watched. OSError where the system has no inotify left."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._paths: dict[int, str] = {}
        self._watched: dict[str, int] = {}
        self._log: list[FileEvent] = []
        self._dropped = 0
        """Events that the log held once: positions keep counting."""
        self._listeners = 0
        self._listening = threading.Event()
        self._overflows = 0
        self._setting_up: threading.Thread | None = None
        self._drainer: threading.Thread | None = None

    def close(self) -> None:
        """Watch nothing any more."""
        os.close(self._fd)

    # -- what is watched -----------------------------------------------------------------------------------------------

    def watch_in_background(self, folder: str) -> None:
        """Watch a folder with all below it, from another thread; `wait` waits for that."""
        self._setting_up = threading.Thread(target=self.watch, args=(folder,), name="durable_nb inotify", daemon=True)
        self._setting_up.start()

    def wait(self, timeout_s: float) -> None:
        """Return when what was begun in the background is watched, or the time is over: the rest isn't seen then."""
        if self._setting_up is not None:
            self._setting_up.join(timeout_s)
            if not self._setting_up.is_alive():
                self._setting_up = None

    def watch(self, path: str) -> None:
        """Watch a file, or a folder with all below it but hidden folders, caches and virtual environments."""
        if path in self._watched:  # with all below it
            return
        with contextlib.suppress(OSError):
            if os.path.isdir(path):
                self._walk(path)
            else:
                self._add(path)

    def _walk(self, top: str, *, telling: bool = False) -> None:
        """`telling`: the files are new, and what happened to them before the folder was watched is told now."""
        waiting, left = deque([top]), _MOST_ENTRIES
        while waiting and left > 0:
            folder = waiting.popleft()
            if not self._add(folder):  # known already, as is what lies below; a link may lead round in a circle
                continue
            below: list[str] = []
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        left -= 1
                        if entry.name in MARKS and folder != top:
                            with self._lock:
                                self._forget(folder)
                            below = []
                            break
                        if entry.is_dir():
                            if not is_skipped(entry.name):
                                below.append(entry.path)
                        elif telling:
                            self._publish(FileEvent(CREATED, entry.path))
                        if left <= 0:
                            break
            except OSError:  # not ours to read, or gone meanwhile
                continue
            waiting += below

    def _add(self, path: str) -> bool:
        """Is it watched now that was not before?"""
        with self._lock:
            if path in self._watched or len(self._watched) >= MOST_WATCHES:
                return False
            number = self._libc.inotify_add_watch(self._fd, os.fsencode(path), _MASK)
            if number < 0:
                if ctypes.get_errno() == errno.ENOSPC:  # fs.inotify.max_user_watches, which all processes of a user share
                    raise OSError(errno.ENOSPC, "no inotify watches left")
                return False
            self._watched[path] = number
            return self._paths.setdefault(number, path) == path  # else the same folder, reached by a link

    def _forget(self, folder: str) -> None:
        below = {number for path, number in self._watched.items() if path == folder or path.startswith(folder + os.sep)}
        self._watched = {path: number for path, number in self._watched.items() if number not in below}
        for number in below:
            if self._paths.pop(number, None) is not None:
                self._libc.inotify_rm_watch(self._fd, number)

    def sees(self, path: str) -> bool:
        """Is whatever happens to this file or folder seen?"""
        if self._pid != os.getpid():  # a forked child, which has our descriptor but not our thread
            return False
        return (os.path.dirname(path) in self._watched or path in self._watched) and is_local(path)

    # -- what happens --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Keep events while entered."""
        with self._lock:
            self.drain()
            self._listeners += 1
            if self._drainer is None:
                self._drainer = threading.Thread(target=self._drain_always, name="durable_nb inotify events", daemon=True)
                self._drainer.start()
            self._listening.set()
        try:
            yield
        finally:
            with self._lock:
                self._listeners -= 1
                if not self._listeners:
                    self._listening.clear()
                    self._dropped += len(self._log)
                    self._log = []

    def position(self) -> tuple[int, int]:
        """Now, for `since`."""
        with self._lock:
            self.drain()
            return self._dropped + len(self._log), self._overflows

    def since(self, position: tuple[int, int]) -> list[FileEvent] | None:
        """What has happened since then, in order; None where that is not known, since the queue was full."""
        with self._lock:
            self.drain()
            return None if self._overflows != position[1] else self._log[position[0] - self._dropped :]

    @contextlib.contextmanager
    def unseen(self, path: str) -> Iterator[None]:
        """Opening that file or folder meanwhile is the package's own doing. Enter it for the opening only."""
        with self._lock:
            self.drain()
            before = len(self._log)
            try:
                yield
            finally:
                self.drain()
                self._log[before:] = [event for event in self._log[before:] if event.path != path]

    def drain(self) -> None:
        """Take over what the kernel's queue holds."""
        with self._lock:
            while True:
                try:
                    data = os.read(self._fd, _BUFFER_BYTES)
                except BlockingIOError:
                    return
                at = 0
                while at < len(data):
                    number, mask, _, size = _HEAD.unpack_from(data, at)
                    name = data[at + _HEAD.size : at + _HEAD.size + size].rstrip(b"\0")
                    at += _HEAD.size + size
                    self._take(number, mask, os.fsdecode(name))

    def _take(self, number: int, mask: int, name: str) -> None:
        if mask & _IN_Q_OVERFLOW:
            self._overflows += 1
            return
        folder = self._paths.get(number)
        if folder is None:
            return
        if mask & (_IN_IGNORED | _IN_MOVE_SELF):  # gone, or no longer where it was, nor is what is below it
            self._forget(folder)
            return
        path = os.path.join(folder, name) if name else folder
        if mask & _IN_ISDIR:
            if mask & (_IN_CREATE | _IN_MOVED_TO) and not is_skipped(name):
                with contextlib.suppress(OSError):
                    self._walk(path, telling=True)
            elif mask & _IN_OPEN:
                self._publish(FileEvent(LISTED, path))
        elif mask & _IN_OPEN:
            self._publish(FileEvent(OPENED, path))
        elif mask & _IN_CLOSE_NOWRITE:
            self._publish(FileEvent(CLOSED, path))
        elif mask & _IN_CLOSE_WRITE:
            self._publish(FileEvent(WRITTEN, path))
        elif mask & (_IN_CREATE | _IN_MOVED_TO):
            self._publish(FileEvent(CREATED, path))
        elif mask & (_IN_DELETE | _IN_MOVED_FROM):
            self._publish(FileEvent(GONE, path))

    def _publish(self, event: FileEvent) -> None:
        if self._listeners and (not self._log or self._log[-1] != event):
            self._log.append(event)

    def _drain_always(self) -> None:
        """While somebody listens, keep the queue from filling up."""
        while self._listening.wait():
            select.select([self._fd], [], [], _DRAINED_EVERY_S)
            self.drain()
            time.sleep(_DRAINED_EVERY_S)  # many come at once: they are taken together, and the cell has the interpreter


def is_skipped(name: str) -> bool:
    """Is a folder of this name never watched?"""
    return name.startswith(".") or name in _SKIPPED


_local: dict[int, bool] = {}


def is_local(path: str) -> bool:
    """Does whatever happens on the file system of `path`, or of the folder that it would be in, pass through this kernel?"""
    for known in (path, os.path.dirname(path)):
        with contextlib.suppress(OSError):
            device = os.stat(known).st_dev
            if device not in _local:
                _local[device] = file_system_of(Path(known)).is_fit
            return _local[device]
    return False


_watcher: Watcher | None = None
_tried = False


def start(folder: str) -> None:
    """Begin to watch the notebook's folder, once per process. Nothing happens where the system has no inotify left."""
    global _tried, _watcher  # noqa: PLW0603  one queue of events for the process
    if _tried or not sys.platform.startswith("linux"):
        return
    _tried = True
    try:
        _watcher = Watcher()
    except (OSError, AttributeError):  # max_user_instances; a C library without it
        return
    _watcher.watch_in_background(folder)


def watcher() -> Watcher | None:
    """The one of this process; None where nothing can be seen."""
    return _watcher
