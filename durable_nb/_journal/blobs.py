"""Large values as files named by their content, which never change."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from durable_nb._files import write_file
from durable_nb._locks import LockFile
from durable_nb._packed import LARGE_BYTES, places
from durable_nb.errors import CorruptStoreError, StoreError

_CHUNK = 1 << 22


def blob_digest(data: bytes) -> str:
    """A content's name."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


_MOST_BUFFERS = 10_000
_buffers: dict[tuple[str, int, str], tuple[str, int]] = {}
"""Large buffers that this process has written or read here, by folder, size and digest: the file, and where in it."""


class Blobs:
    """A folder of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, digest: str) -> Path:
        """Of its file."""
        return self._folder / digest

    def holding(self, buffer: memoryview, digest: str) -> tuple[str, int] | None:
        """The file that holds just these bytes, and where in it; None where this process has met none. It stays for the time
        that it takes to write down who refers to it."""  # fmt: skip
        name, offset = _buffers.get((str(self._folder), buffer.nbytes, digest), ("", 0))
        if not name:
            return None
        try:
            with self._locked(shared=True), self.path(name).open("rb") as file:
                os.utime(self.path(name))
                file.seek(offset)
                plain = buffer.cast("B")
                for start in range(0, plain.nbytes, _CHUNK):
                    expected = plain[start : start + _CHUNK]
                    if file.read(expected.nbytes) != expected:
                        return None
        except OSError:  # it is gone, or is another user's
            return None
        return name, offset

    def _note(self, name: str, data: bytes) -> None:
        if len(_buffers) > _MOST_BUFFERS:
            _buffers.clear()
        large = [place for place in places(data) if place.size >= LARGE_BYTES]
        _buffers.update({(str(self._folder), at.size, at.digest): (name, at.offset) for at in large})

    def put(self, data: bytes) -> str:
        digest = blob_digest(data)
        path = self._folder / digest
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            # On disk and fsynced when this returns, and only then is a row committed that names it: no row ever names a value
            # that is not there. `drop` locks exclusively, so a value found here cannot go before its time is renewed.
            with self._locked(shared=True):
                try:
                    self.get(digest)
                except CorruptStoreError:
                    write_file(path, [data])
                else:
                    os.utime(path)  # a row that names it is about to be written
            self._note(digest, data)
        except OSError as error:
            raise StoreError(
                f"a large value could not be written to {self._folder} ({error.strerror}). Steps acknowledged before are "
                "safe; free the disk, and run the cell again"
            ) from error
        return digest

    def drop(self, before: float, needed: Callable[[str], bool]) -> int:
        """Remove files put before that time which nobody needs; the bytes that were freed.

        While it looks and removes, nobody puts one: a value found to be there already must still be there afterwards.
        """
        freed = 0
        for path in sorted(self._folder.glob("[!.]*")):
            with contextlib.suppress(FileNotFoundError):  # another process is making room too
                if path.stat().st_mtime >= before or needed(path.name):
                    continue
                with self._locked():
                    found = path.stat()
                    if found.st_mtime < before:
                        path.unlink()
                        freed += found.st_size
        return freed

    @contextlib.contextmanager
    def _locked(self, *, shared: bool = False) -> Iterator[None]:
        file = LockFile(self._folder.with_name(f"{self._folder.name}.lock"))
        try:
            with file.locked(shared=shared):
                yield
        finally:
            file.close()

    def get(self, digest: str) -> bytes:
        try:
            data = (self._folder / digest).read_bytes()
        except OSError as error:
            raise CorruptStoreError(f"the large value {digest} can't be read ({error.strerror})") from error
        if blob_digest(data) != digest:
            raise CorruptStoreError(f"the large value {digest} is damaged: its bytes are not what was written")
        self._note(digest, data)
        return data
