"""The store: one folder that holds everything durable, and who of several processes is alive.

    .durable_nb/
        .gitignore      *
        store.json      format, and the store's own id
        journal/        rows (diskcache, SQLite)
        values/         large results of steps, which entries of cells may refer to
        cells/          restored cells
        locks/          one file for each live process, held by an OS lock

The journal's first row holds the store's id. Everything is made in this order, so that a kill at any instant leaves either a
store or something that the next opening completes: .gitignore (whose folder is ours), locks, values, cells, the journal,
its first row, and last store.json. Where store.json is, all the others must be: a journal that is gone, or without its first
row, is damage and not a new store, since finished steps would run again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from durable_nb._codec import Signer, load_key
from durable_nb._disks import file_system_of
from durable_nb._files import sync_folder, without_a_trace, write_new
from durable_nb._journal import Commit, Journal
from durable_nb._journal.disk import DiskJournal
from durable_nb._journal.writer import Writer
from durable_nb._locks import LockFile, is_locked, let_go_in_children
from durable_nb.errors import CorruptStoreError, StoreError, UntrustedStoreError

FORMAT = 1
ID_KEY = "store"
"""The journal's first row: the store's id."""
_FOLDERS = ("locks", "values", "cells", "journal")
_OURS = re.compile(rf"{'|'.join(_FOLDERS)}|values\.lock|\.gitignore|\.\.gitignore\..*|\.store\.json\..*")
_IGNORE_ALL = b"*\n"
_DIGEST = re.compile(rb"[0-9a-f]{64}")
_AT_ONCE = 500
ENTRY_SUFFIX = ".cell"
ENTRY_HEAD = struct.Struct("<8sQ16s")
"""Begins the file of a cell's entry: what it is, how many bytes what it says of itself takes, which follow, and their MAC."""


class Store:
    """An open store."""

    def __init__(self, path: str | Path) -> None:
        """Opens `path`, and makes it (mode 0700) where it isn't there, or is an empty folder.

        StoreError where the folder can't be used, is something else, or was written in a newer format, and CorruptStoreError
        where a part of it is gone; then nothing in it is changed.
        """
        if not str(path):
            raise StoreError("'' is not a folder; nothing was made. Name the store's folder, as in open('.durable_nb')")
        self.path = Path(path).absolute()
        self.cells = self.path / "cells"
        self.signer = Signer(load_key())
        try:
            about = self.path / "store.json"
            known = _check(self.path, about.read_bytes()) if about.exists() else None
            if known is None:
                _make_folders(self.path)
            self.process = Process(self.path / "locks")
        except OSError as error:
            raise StoreError(
                f"the store folder {self.path} can't be used ({error.strerror}); nothing was run. Make it writable, or set "
                "DURABLE_NB_DIR to a folder you may write and restart the kernel"
            ) from error
        try:
            self.journal, self.id = self._opened(known)
        except BaseException:
            self.process.end()
            raise
        self.writer = Writer(self.journal)
        self._database = self._found()
        let_go_in_children(self.writer)

    def _opened(self, known: str | None) -> tuple[Journal, str]:
        """The journal and the id; `known`: what store.json says, None where the store is just being made."""
        try:
            journal = DiskJournal(self.path / "journal", self.path / "values", must_exist=known is not None)
        except CorruptStoreError as error:
            raise self._lost(str(error)) from error
        try:
            return journal, self._identified(journal, known)
        except BaseException:
            journal.close()
            raise

    def _identified(self, journal: Journal, known: str | None) -> str:
        """The id in the journal's first row, which is made, and store.json after it, where the store is just being made."""
        if known is None:
            journal.apply([Commit(inserts=((ID_KEY, self.signer.sign(ID_KEY, secrets.token_hex(8).encode())),))])
        row = journal.get(ID_KEY)
        if row is None:
            raise self._lost("the journal is empty")
        try:
            first = self.signer.verify(ID_KEY, row).decode()
        except UntrustedStoreError:
            if known is None:
                raise
            return known  # the rows that matter are refused one by one; `trust` must be able to open the store
        if known is None:
            write_new(self.path / "store.json", json.dumps({"format": FORMAT, "id": first}).encode())
        elif first != known:
            raise self._lost(f"the journal is another store's ({first})")
        return first

    def _lost(self, what: str) -> CorruptStoreError:
        return CorruptStoreError(
            f"the store {self.path} has lost its journal, which store.json says it had: {what}. Nothing was run or changed: "
            "finished steps would run again. Restore the folder from a backup; or delete all of it to begin anew, or set "
            "DURABLE_NB_DIR to another folder"
        )

    @property
    def advice(self) -> str:
        """What its users should know of the disk that it is on; '' where there is nothing to say."""
        return file_system_of(self.path).advice

    def is_in_place(self) -> bool:
        """Is the store still where it was opened? What is written in a folder that was deleted is lost."""
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


def values_named(text: bytes) -> set[str]:
    """The large values that a row, or what an entry says of itself, names. Whatever looks like a name counts, in what can't be
    read too."""  # fmt: skip
    return {digest.decode() for digest in _DIGEST.findall(text)}


def texts_that_name(store: Store) -> Iterator[bytes]:
    """Every row, and what every cell's entry says of itself, as it is written: only there large values are named."""
    keys = [key for key, _ in store.journal.sizes()]
    for start in range(0, len(keys), _AT_ONCE):
        yield from store.journal.get_many(keys[start : start + _AT_ONCE]).values()
    for path in store.cells.glob(f"*/[!.]*{ENTRY_SUFFIX}"):
        with contextlib.suppress(OSError, struct.error), open(path, "rb", opener=without_a_trace) as file:
            yield file.read(min(ENTRY_HEAD.unpack(file.read(ENTRY_HEAD.size))[1], path.stat().st_size))


class Process:
    """This process's sign of life: a file that it keeps locked, which the system frees at death, however it comes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)
        self.id, self._file = self._signed_in()
        self.others()  # what killed ones have left goes

    def _signed_in(self) -> tuple[str, LockFile]:
        while True:
            process_id = f"{os.getpid()}-{secrets.token_hex(6)}"
            path = self._path(process_id)
            file = LockFile(path, new=True)
            with contextlib.suppress(FileNotFoundError):
                if file.try_lock() and path.stat().st_ino == os.fstat(file.descriptor).st_ino:
                    return process_id, file
            file.close()  # another process asked in between, and took it for a dead one's

    def is_alive(self, process_id: str) -> bool:
        """Does the process of this id still run? '' is nobody."""
        if process_id == self.id:
            return self._file.is_open
        if not process_id:
            return False
        return is_locked(self._path(process_id), else_remove=True)  # ids are never used again

    def others(self) -> list[str]:
        """The live processes beside this one. What dead ones left is removed; one that is just signing in does so again."""
        stems = sorted(path.stem for path in self._folder.glob("*.lock"))
        return [process_id for process_id in stems if process_id != self.id and self.is_alive(process_id)]

    def end(self) -> None:
        """Give the sign of life up."""
        self._file.close()
        self._path(self.id).unlink(missing_ok=True)

    def _path(self, process_id: str) -> Path:
        return self._folder / f"{process_id}.lock"


def _make_folders(path: Path) -> None:
    """Make all but the journal and store.json. What a killed process made of it is taken; another folder is not."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    there = {child.name for child in path.iterdir()}
    ignore = path / ".gitignore"
    begun = ignore.read_bytes() == _IGNORE_ALL if ignore.exists() else all(name.startswith("..") for name in there)
    if not begun or not all(map(_OURS.fullmatch, there)):
        raise StoreError(
            f"the folder {path} is not empty and not a store; nothing in it was changed. Name a folder of the store's own, as "
            f"in {str(path / '.durable_nb')!r}"
        )
    path.chmod(0o700)
    write_new(ignore, _IGNORE_ALL)
    for name in _FOLDERS[:-1]:
        (path / name).mkdir(mode=0o700, exist_ok=True)
    sync_folder(path.parent)


def _check(path: Path, text: bytes) -> str:
    """The id that store.json says."""
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
