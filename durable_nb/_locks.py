"""Locks that processes take on files, and the only module that knows how an operating system locks.

A lock belongs to the open file. The system frees it when the process dies, however it dies. A forked child lets go of its copy
at once, and a child of exec never has one (Python's files are close-on-exec), so no child keeps a dead process's lock.
`flock`, not `lockf`: a lock of `lockf` is freed when the process closes *any* descriptor of that file.

On Windows one byte far behind the end is locked with `msvcrt`. There are no shared locks there, so shared ones exclude each
other as well. This branch is untested.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

_POLL_S = 0.0002
"""How often a process that waits for a lock asks for it, in the first second; after that, a hundred times less often."""
_COURTESY_S = 0.001
"""How long a process that wants a lock lets those go first that wait already."""

if sys.platform == "win32":
    import msvcrt

    _BYTE = 1 << 30

    def _try_lock(descriptor: int, *, shared: bool) -> bool:  # noqa: ARG001  there are no shared ones
        os.lseek(descriptor, _BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, _BYTE, os.SEEK_SET)
        with contextlib.suppress(OSError):  # it wasn't locked
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try_lock(descriptor: int, *, shared: bool) -> bool:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


class HeldTooLongError(Exception):
    """A lock wasn't to be had in time: `str()` names the process that holds it, and its state."""

    def __init__(self, pid: int, state: str) -> None:
        super().__init__(pid, state)
        self.pid, self.state = pid, state

    def __str__(self) -> str:
        return f"process {self.pid} ({self.state})" if self.pid else "an unknown process"


class LockFile:
    """A file that is open to be locked, made (mode 0600) where it isn't there."""

    def __init__(self, path: Path, *, new: bool = False) -> None:
        """`new`: FileExistsError where it is there. OSError."""
        self._descriptor: int | None = None  # `close` runs for one that can't be opened, too
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_EXCL if new else 0), 0o600)
        self._path, self._opened = str(path), os.fstat(self._descriptor)
        let_go_in_children(self)

    @property
    def descriptor(self) -> int:
        """Of the open file; ValueError where it is closed."""
        if self._descriptor is None:
            raise ValueError("the lock file is closed")
        return self._descriptor

    @property
    def is_open(self) -> bool:
        """Can it be locked? It can't after `close`, and in a forked child."""
        return self._descriptor is not None

    def is_in_place(self) -> bool:
        """Is this the file that others lock? Else it was removed, and the next that opens the path makes another one."""
        try:
            return os.path.samestat(os.stat(self._path), self._opened)  # noqa: PTH116  at each commit, so it must be quick
        except FileNotFoundError:
            return False

    def try_lock(self, *, shared: bool = False) -> bool:
        """Take the lock; False where another open file has it."""
        return _try_lock(self.descriptor, shared=shared)

    @contextlib.contextmanager
    def locked(self, *, shared: bool = False) -> Iterator[None]:
        """Hold the lock for a while; wait for it as long as it takes."""
        began = time.monotonic()
        while not self.try_lock(shared=shared):
            _pause(began)
        try:
            yield
        finally:
            self.unlock()  # closing alone wouldn't: a child that C code forked has the file open too

    def unlock(self) -> None:
        """Give the lock back, if this file has it."""
        _unlock(self.descriptor)

    def close(self) -> None:
        """Close the file, which frees its lock."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    let_go = close
    """In a forked child: the parent's lock stays, it belongs to the file that the parent has open as well."""
    __del__ = close


class FairLock:
    """A lock on the file `path`, exclusive among processes and threads, for which none waits without end.

    Two that lock by turns must not overtake a third for ever. One that waits shows it by a shared lock on a second file; one
    that comes meanwhile steps back for a moment. For a moment only, since a process that was stopped keeps waiting.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = threading.RLock()
        self._files: tuple[LockFile, LockFile] | None = None
        let_go_in_children(self)

    @contextlib.contextmanager
    def locked(self, patience_s: float) -> Iterator[None]:
        """Holds the lock. HeldTooLongError where it is not to be had within that time, OSError.

        A thread that holds it must not lock it again.
        """
        # An interrupt may come after any line. Giving back what one hasn't got does no harm, the other way round would.
        deadline = time.monotonic() + patience_s
        try:
            if not self._thread.acquire(timeout=patience_s):
                raise HeldTooLongError(os.getpid(), "this one, in another thread")
            try:
                while not self._has_locked(deadline):
                    self._close()
                yield
            finally:
                if self._files is not None:
                    self._files[0].unlock()
        finally:
            with contextlib.suppress(RuntimeError):
                self._thread.release()

    def _has_locked(self, deadline: float) -> bool:
        """False where the files were removed, so that others would lock other ones."""
        if self._files is None:
            self._files = LockFile(self._path), LockFile(self._path.with_suffix(".waiting"))
        lock, waiting = self._files
        if waiting.try_lock():
            waiting.unlock()
        else:
            time.sleep(_COURTESY_S)
        began, shown = time.monotonic(), False
        try:
            while not lock.try_lock():
                shown = shown or waiting.try_lock(shared=True)  # False in the moment in which another process looks
                if time.monotonic() >= deadline:
                    raise HeldTooLongError(*_holder(lock))
                _pause(began)
        finally:
            if shown:
                waiting.unlock()
        with contextlib.suppress(OSError):  # it only informs, and a full disk is told by what is written next
            os.lseek(lock.descriptor, 0, os.SEEK_SET)
            os.write(lock.descriptor, b"%-12d" % os.getpid())
        return lock.is_in_place()

    def close(self) -> None:
        """Close the files, unless a thread holds the lock or waits for it; locking opens them again."""
        if self._thread.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._thread.release()

    def _close(self) -> None:
        files, self._files = self._files, None
        for file in files or ():
            file.close()

    def let_go(self) -> None:
        """In a forked child, which may have been forked while another thread held the lock."""
        self._thread, self._files = threading.RLock(), None


def is_locked(path: Path, *, else_remove: bool = False) -> bool:
    """Does a process hold an exclusive lock on this file? `else_remove`: it is removed where none does, and none can get the
    lock before it is gone."""  # fmt: skip
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        if not _try_lock(descriptor, shared=True):  # shared: two who ask at once don't mistake each other
            return True
        if else_remove:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
    return False


def process_state(pid: int) -> str:
    """What a process is doing, for a message: 'stopped', 'running' ..."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return "not a process of this machine or container"
        said = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)  # noqa: S603, S607
        letter = said.stdout.strip()[:1]
    known = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for the disk", "R": "running", "Z": "dead"}
    return known.get(letter, "asleep" if letter else "not a process of this machine or container")


def _holder(lock: LockFile) -> tuple[int, str]:
    os.lseek(lock.descriptor, 0, os.SEEK_SET)
    text = os.read(lock.descriptor, 12).strip()
    pid = int(text) if text.isdigit() else 0
    return pid, process_state(pid) if pid else ""


def _pause(began: float) -> None:
    time.sleep(_POLL_S if time.monotonic() - began < 1 else _POLL_S * 100)


# -- children ----------------------------------------------------------------------------------------------------------


class HasLetGo(Protocol):
    """What holds something that a forked child must not keep."""

    def let_go(self) -> None:
        """In the child, right after the fork."""
        ...


_to_let_go: weakref.WeakSet[HasLetGo] = weakref.WeakSet()


def let_go_in_children(holder: HasLetGo) -> None:
    """Call `let_go` of this object in each forked child, as long as the object lives."""
    _to_let_go.add(holder)


def _in_child() -> None:
    for holder in list(_to_let_go):
        holder.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
