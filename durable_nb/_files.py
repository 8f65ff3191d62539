"""Where the store is, and files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path


def default_store() -> Path:
    """`DURABLE_NB_DIR`, else `.durable_nb` in the working directory."""
    return Path(os.environ.get("DURABLE_NB_DIR") or ".durable_nb").absolute()


def write_file(path: Path, parts: Iterable[bytes | memoryview], mode: int = 0o400, *, lasting: bool = True) -> None:
    """Make `path` hold these parts, replacing what was there; on disk when this returns. OSError leaves no draft behind. Not
    `lasting`: its name may be gone after a power cut, which saves half of the time."""  # fmt: skip
    draft = _draft(path, parts, mode)
    try:
        draft.replace(path)
    except OSError:
        draft.unlink()
        raise
    if lasting:
        sync_folder(path.parent)


def write_new(path: Path, data: bytes, mode: int = 0o600) -> None:
    """The same, but a file that is there already stays: of two processes that start at once, the first one counts."""
    draft = _draft(path, [data], mode)
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def without_a_trace(path: str, flags: int) -> int:
    """Opens a file for who only lists it, which is no use: the access time stays."""
    try:
        return os.open(path, flags | getattr(os, "O_NOATIME", 0))
    except PermissionError:  # somebody else's file
        return os.open(path, flags)


def _draft(path: Path, parts: Iterable[bytes | memoryview], mode: int) -> Path:
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    return draft


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is lost in a power cut otherwise. Not on Windows, which opens no folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
