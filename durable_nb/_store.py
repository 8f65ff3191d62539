"""The store: one folder that holds everything durable, and who of several processes is alive.

    .durable_nb/
        .gitignore      *
        store.json      format, and the store's own id
        journal/        rows (diskcache, SQLite)
        values/         large results of steps
        cells/          restored cells
        locks/          one file for each live process, held by an OS lock

`store.json` is written last when a store is made, so a folder without it is a store that was never finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from pathlib import Path
from typing import Any

from durable_nb._codec import Seal, load_key
from durable_nb._files import is_locked, write_new
from durable_nb._journal.disk import DiskJournal
from durable_nb._journal.writer import Writer
from durable_nb.errors import CorruptStoreError, StoreError

FORMAT = 1


class Store:
    """An open store."""

    def __init__(self, path: Path) -> None:
        """Open `path`, making it (mode 0700) where it isn't there.

        StoreError where the folder can't be written or was written by a newer format; then nothing in it is changed.
        """
        self.path = path.absolute()
        self.cells = self.path / "cells"
        self.seal = Seal(load_key())
        try:
            self.id = _prepare(self.path)
            self.process = Process(self.path / "locks")
        except OSError as error:
            raise StoreError(
                f"the store folder {self.path} can't be used ({error.strerror}); nothing was run. Make it writable, or set "
                "DURABLE_NB_DIR to a folder you may write and restart the kernel"
            ) from error
        try:
            self.journal = DiskJournal(self.path / "journal", self.path / "values")
        except StoreError:
            self.process.end()
            raise
        self.writer = Writer(self.journal)
        self._database = self._found()
        os.register_at_fork(after_in_child=self.writer.abandon)

    def is_in_place(self) -> bool:
        """Is the store still where it was opened? What goes on in a folder that was deleted is lost."""
        return self._found() == self._database

    def _found(self) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            found = (self.path / "journal" / "cache.db").stat()
            return found.st_dev, found.st_ino
        return None

    def close(self) -> None:
        """Write what was handed over, and let others take this process's runs."""
        self.writer.close()
        self.journal.close()
        self.process.end()


class Process:
    """This process's sign of life: a file held with flock, which the kernel frees at death, however it comes.

    flock belongs to the open file, so a forked child would keep it alive: the child closes it (`register_at_fork`), and a
    child of exec never has it (Python's files are close-on-exec). lockf won't do: any other close of the file frees it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None
        folder.mkdir(mode=0o700, exist_ok=True)
        self.id = self._signed_in()
        os.register_at_fork(after_in_child=self._close)
        self.others()  # what killed ones have left goes

    def _signed_in(self) -> str:
        while True:
            process_id = f"{os.getpid()}-{secrets.token_hex(6)}"
            path = self._path(process_id)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.stat().st_ino == os.fstat(descriptor).st_ino:
                    self._descriptor = descriptor
                    return process_id
            os.close(descriptor)  # another process asked in between, and took it for a dead one's

    def is_alive(self, process_id: str) -> bool:
        """Does the process of this id still run? '' is nobody."""
        if process_id == self.id:
            return self._descriptor is not None
        if not process_id:
            return False
        return is_locked(self._path(process_id), else_remove=True)  # ids are never used again

    def others(self) -> list[str]:
        """The live processes beside this one. What dead ones left is removed; one that is just signing in does so again."""
        stems = sorted(path.stem for path in self._folder.glob("*.lock"))
        return [process_id for process_id in stems if process_id != self.id and self.is_alive(process_id)]

    def end(self) -> None:
        """Give the sign of life up."""
        self._close()
        self._path(self.id).unlink(missing_ok=True)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _path(self, process_id: str) -> Path:
        return self._folder / f"{process_id}.lock"


def _prepare(path: Path) -> str:
    """The id of the store in `path`, which is made where it isn't there."""
    file = path / "store.json"
    if not file.exists():
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_new(path / ".gitignore", b"*\n")
        write_new(file, json.dumps({"format": FORMAT, "id": secrets.token_hex(8)}).encode())
    return _check(path, file.read_bytes())


def _check(path: Path, text: bytes) -> str:
    try:
        about: Any = json.loads(text)
        form, store_id = int(about["format"]), str(about["id"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise CorruptStoreError(
            f"{path / 'store.json'} is damaged ({text[:40]!r}); nothing was run or changed. Restore the file, or set "
            "DURABLE_NB_DIR to another folder"
        ) from error
    if form > FORMAT:
        raise StoreError(
            f"the store {path} was written by a newer durable_nb (store format {form}, this one reads up to {FORMAT}); nothing "
            "was run or changed. Upgrade with 'pip install -U durable-nb', or set DURABLE_NB_DIR to another folder"
        )
    return store_id
