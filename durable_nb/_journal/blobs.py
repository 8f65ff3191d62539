"""Large values as files named by their content, which never change."""

from __future__ import annotations

import hashlib
from pathlib import Path

from durable_nb._files import write_file
from durable_nb.errors import CorruptStoreError, StoreError


def blob_digest(data: bytes) -> str:
    """A content's name."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


class Blobs:
    """A folder of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, data: bytes) -> str:
        digest = blob_digest(data)
        path = self._folder / digest
        if not self._holds(digest):
            try:
                self._folder.mkdir(mode=0o700, exist_ok=True)
                write_file(path, [data])
            except OSError as error:
                raise StoreError(
                    f"a large value could not be written to {self._folder} ({error.strerror}). Steps acknowledged before are "
                    "safe; free the disk, and go on from here"
                ) from error
        return digest

    def _holds(self, digest: str) -> bool:
        try:
            self.get(digest)
        except CorruptStoreError:
            return False
        return True

    def get(self, digest: str) -> bytes:
        try:
            data = (self._folder / digest).read_bytes()
        except OSError as error:
            raise CorruptStoreError(f"the large value {digest} can't be read ({error.strerror})") from error
        if blob_digest(data) != digest:
            raise CorruptStoreError(f"the large value {digest} is damaged: its bytes are not what was written")
        return data
