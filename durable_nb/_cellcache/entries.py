"""A cell's result as one file.

    magic, length of the manifest, HMAC of the manifest | manifest | pickle | outputs | padding | buffers, 4 KiB-aligned | notes

The manifest carries digests of the pickle and the outputs, so its HMAC vouches for all that is decoded. The buffers of
arrays and frames lie out of band (pickle protocol 5): large ones come back as private copy-on-write maps of the file, at no
cost until they are touched, and writing to them never reaches it. A file is written to a draft, fsynced and renamed; it is
never changed after that, only unlinked, since truncating a mapped file kills whoever reads it. A large buffer that lies in the
file of a step's result already is referred to there, by name and offset. The notes explain what the key was made of; a hit
never reads them. When an entry was used last is the file's access time.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import io
import itertools
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from durable_nb._cellcache.external import ExternalState
from durable_nb._codec import Signer
from durable_nb._files import without_a_trace, write_file
from durable_nb._journal.blobs import Blobs
from durable_nb._pickling import NO_REFERENCES, References, Unpickler
from durable_nb._readback import pickled
from durable_nb._store import ENTRY_HEAD, ENTRY_SUFFIX
from durable_nb._usage import Usage
from durable_nb.errors import CorruptStoreError, UntrustedStoreError

FORMAT = 2

MAPPED_BYTES = 1 << 20
"""Buffers from this size on are mapped; smaller ones are read."""
CHECKED_BYTES = 64 << 20
"""Buffers up to this size are compared with their digest at each restore."""

_MAGIC = b"dnbcell1"
_ALIGN = 4096
_CHUNK = 1 << 22
_USED_NS = 60 * 10**9
"""Use within a minute of the last one is not written down."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """One out-of-band buffer: where it lies, counted from the first one, and what it must be."""

    offset: int
    size: int
    digest: str
    readonly: bool
    blob: str = ""
    """The large value that holds it, a step's: `offset` is in its file then."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of an entry without decoding its values."""

    name: str
    key: str
    components: dict[str, str]
    versions: dict[str, str]
    bound: list[str]
    deleted: list[str]
    created_at: float
    took_s: float
    """What the cell took to run: what a hit saves."""
    pickle_size: int
    pickle_digest: str
    outputs_size: int
    outputs_digest: str
    outputs_count: int
    external: ExternalState = field(default_factory=ExternalState)
    buffers: list[Buffer] = field(default_factory=list)
    format: int = FORMAT
    skipped: list[str] = field(default_factory=list)
    """Names that the cell bound and its user did not want stored (`--skip`)."""
    notes_size: int = 0
    notes_digest: str = ""
    run: str = ""
    """The cell's run that it is of."""
    usage: Usage = field(default_factory=dict)
    """What models' answers cost that its steps were given: what a hit saves."""

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.key}-{self.external.digest()}{ENTRY_SUFFIX}"

    @property
    def size(self) -> int:
        """Bytes of all that is restored."""
        return self.pickle_size + self.outputs_size + sum(b.size for b in self.buffers)


@dataclass(frozen=True, slots=True)
class CellResult:
    """What a cell left behind."""

    values: dict[str, Any]
    """By name; besides, under names that no variable can have, what the notebook layer keeps for itself."""
    external: ExternalState
    deleted: list[str]
    outputs: bytes
    outputs_count: int
    took_s: float
    skipped: list[str] = field(default_factory=list)
    run: str = ""
    usage: Usage = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kept:
    """An entry as it lies in the store, looked at from outside."""

    path: Path
    scope: str
    manifest: Manifest | None
    """None where it can't be read: damaged, or signed with another key."""
    size: int
    """Of the file."""
    stored_at: float
    used_at: float
    """When a cell was restored from it last; until then, when it was stored."""
    inode: int


class Entries:
    """All entries of a store: `FOLDER/SCOPE/KEY-WORLD.cell`. One key has an entry for each state of the files it read."""

    def __init__(self, folder: Path, signer: Signer) -> None:
        self._folder, self.signer, self._blobs = folder, signer, Blobs(folder.parent / "values")

    def store(
        self,
        scope: str,
        key: str,
        result: CellResult,
        *,
        name: str,
        components: dict[str, str],
        versions: dict[str, str],
        created_at: float,
        references: References = NO_REFERENCES,
        copied: Callable[[Any], bool] = lambda _: False,
        notes: bytes = b"",
    ) -> Manifest:
        """Write the entry; its bytes are on disk when this returns. Raises what pickling raises, OSError, DriftError where a
        value comes back as another one, InseparableError where arrays share memory in a way that can't be stored. `copied`:
        the classes and functions that the cell defines."""
        stream, raw, *_ = pickled(result.values, references, copied=copied, apart=True)
        buffers: list[Buffer] = []
        own: list[memoryview] = []
        offset = 0
        for buffer in raw:
            digest = xxhash.xxh3_128_hexdigest(buffer)
            held = self._blobs.holding(buffer, digest) if buffer.nbytes >= MAPPED_BYTES else None
            if held is not None:
                buffers.append(Buffer(held[1], buffer.nbytes, digest, buffer.readonly, held[0]))
                continue
            buffers.append(Buffer(offset, buffer.nbytes, digest, buffer.readonly))
            own.append(buffer)
            offset += _aligned(buffer.nbytes)
        manifest = Manifest(
            name,
            key,
            components,
            versions,
            sorted(name for name in result.values if name.isidentifier()),
            result.deleted,
            created_at,
            result.took_s,
            len(stream),
            _digest(stream),
            len(result.outputs),
            _digest(result.outputs),
            result.outputs_count,
            result.external,
            buffers,
            skipped=result.skipped,
            notes_size=len(notes),
            notes_digest=_digest(notes),
            run=result.run,
            usage=result.usage,
        )
        path = self._folder / scope / manifest.file
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Without its name, after a power cut, the cell runs again, and its steps are restored.
        write_file(path, self._parts(manifest, stream, result.outputs, own, notes), lasting=False)
        return manifest

    def _parts(
        self, manifest: Manifest, stream: bytes, outputs: bytes, raw: list[memoryview], notes: bytes
    ) -> Iterable[bytes | memoryview]:
        packed = msgspec.msgpack.encode(manifest)
        head = ENTRY_HEAD.pack(_MAGIC, len(packed), self.signer.mac(_MAGIC, manifest.key.encode(), packed))
        yield head + packed
        yield stream
        yield outputs
        if raw:
            used = len(head) + len(packed) + len(stream) + len(outputs)
            yield bytes(_aligned(used) - used)
        for buffer in raw:
            yield buffer
            yield bytes(_aligned(buffer.nbytes) - buffer.nbytes)
        yield notes

    def of_key(self, scope: str, key: str) -> Iterator[Entry]:
        """The authenticated entries of a key, newest first; CorruptStoreError, UntrustedStoreError at one that isn't."""
        for name in self._names(scope, f"{key}-"):
            yield self._open(self._folder / scope / name, key)

    def manifests(self, scope: str, limit: int = 20) -> Iterator[Manifest]:
        """Of the newest entries of a cell, newest first. Unreadable ones are left out: they could never be a hit."""
        for name in self._names(scope)[:limit]:
            with contextlib.suppress(CorruptStoreError, UntrustedStoreError):
                yield self._manifest(self._folder / scope / name)

    def all(self, scope: str | None = None) -> Iterator[Kept]:
        """Every entry of the store, or of one cell, in no order."""
        for folder in [self._folder / scope] if scope is not None else sorted(self._folder.glob("*")):
            for path in sorted(folder.glob(f"[!.]*{ENTRY_SUFFIX}")):
                try:
                    found = path.stat()
                    yield Kept(
                        path,
                        folder.name,
                        self._manifest(path),
                        found.st_size,
                        found.st_mtime,
                        max(found.st_atime, found.st_mtime),
                        found.st_ino,
                    )
                except (CorruptStoreError, UntrustedStoreError):
                    yield Kept(path, folder.name, None, found.st_size, found.st_mtime, found.st_mtime, found.st_ino)
                except FileNotFoundError:  # another process has cleared it meanwhile
                    continue

    @staticmethod
    def used(entry: Entry) -> None:
        """A cell was restored from it: those that nobody uses go first when room is needed."""
        now = time.time_ns()
        if now - entry.accessed_ns > _USED_NS:
            with contextlib.suppress(OSError):  # a store that is only read
                os.utime(entry.path, ns=(now, entry.path.stat().st_mtime_ns))

    def notes(self, scope: str, manifest: Manifest) -> bytes:
        """What explains the entry; empty where there is nothing, or it is gone."""
        try:
            with open(self._folder / scope / manifest.file, "rb", opener=without_a_trace) as file:
                return _notes(file, manifest)
        except (OSError, CorruptStoreError):
            return b""

    def verify(self, path: Path) -> None:
        """Compare every byte of an entry with what was written; CorruptStoreError, UntrustedStoreError."""
        try:
            with open(path, "rb", opener=without_a_trace) as file:
                manifest, start = self._head(file, _key_in(path))
                self._body(file, manifest, start, checked=None)
                _notes(file, manifest)
        except OSError as error:
            raise CorruptStoreError(f"its file can't be read ({error.strerror})") from error

    def sign(self, path: Path) -> None:
        """Sign an entry that another key has signed, if it is whole: whoever wrote it is trusted from here on."""
        key = _key_in(path)
        with open(path, "rb", opener=without_a_trace) as file:
            manifest, start = self._head(file, key, signed=False)
            if manifest.key != key:
                raise CorruptStoreError("its file is damaged: it is the entry of another key")
            self._body(file, manifest, start, checked=None)
            _notes(file, manifest)
            file.seek(ENTRY_HEAD.size)
            packed = file.read(start - ENTRY_HEAD.size)
            head = ENTRY_HEAD.pack(_MAGIC, len(packed), self.signer.mac(_MAGIC, key.encode(), packed))
            write_file(path, itertools.chain([head, packed], iter(lambda: file.read(_CHUNK), b"")))

    def _manifest(self, path: Path) -> Manifest:
        try:
            with open(path, "rb", opener=without_a_trace) as file:
                return self._head(file, _key_in(path))[0]
        except OSError as error:
            raise CorruptStoreError(f"its file can't be read ({error.strerror})") from error

    def _names(self, scope: str, beginning: str = "") -> list[str]:
        """Newest first. Cells without a name share a folder, which may be large: only those asked for are looked at."""
        try:
            with os.scandir(self._folder / scope) as found:
                names = (file for file in found if file.name.startswith(beginning) and file.name.endswith(ENTRY_SUFFIX))
                files = [(file.stat().st_mtime_ns, file.name) for file in names]
        except FileNotFoundError:
            return []
        return [name for _, name in sorted(files, reverse=True)]

    def _open(self, path: Path, key: str) -> Entry:
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                manifest, start = self._head(file, key)
                body = self._body(file, manifest, start, checked=CHECKED_BYTES)
                return Entry(manifest, *body, path, found.st_atime_ns)
        except OSError as error:
            raise CorruptStoreError(f"its file can't be read ({error.strerror})") from error

    def _head(self, file: io.BufferedReader, key: str, *, signed: bool = True) -> tuple[Manifest, int]:
        """The authenticated manifest, and where what follows it begins."""
        head = file.read(ENTRY_HEAD.size)
        size = os.fstat(file.fileno()).st_size
        if len(head) < ENTRY_HEAD.size or not head.startswith(_MAGIC):
            raise CorruptStoreError("its file is damaged: it does not begin as an entry")
        _, packed_size, mac = ENTRY_HEAD.unpack(head)
        if packed_size > size:
            raise CorruptStoreError("its file is damaged: it is cut short")
        packed = file.read(packed_size)
        if signed and not hmac.compare_digest(mac, self.signer.mac(_MAGIC, key.encode(), packed)):
            raise UntrustedStoreError("its file is damaged, or was signed with another key; nothing of it was unpickled")
        try:
            manifest = msgspec.msgpack.decode(packed, type=Manifest)
        except msgspec.MsgspecError as error:
            raise CorruptStoreError("another version of durable-nb wrote it") from error
        if manifest.format != FORMAT:
            raise CorruptStoreError("another version of durable-nb wrote it")
        start = ENTRY_HEAD.size + packed_size
        data = start + manifest.pickle_size + manifest.outputs_size
        own = [_aligned(b.size) for b in manifest.buffers if not b.blob]  # they may all be empty
        if size != (_aligned(data) + sum(own) if own else data) + manifest.notes_size:
            raise CorruptStoreError("its file is damaged: it is cut short")
        return manifest, start

    def _body(
        self, file: io.BufferedReader, manifest: Manifest, start: int, *, checked: int | None
    ) -> tuple[bytes, bytes, list[Any]]:
        """The pickle, the outputs and the buffers, of which those of up to `checked` bytes (None: all) are compared."""
        stream, outputs = file.read(manifest.pickle_size), file.read(manifest.outputs_size)
        if _digest(stream) != manifest.pickle_digest or _digest(outputs) != manifest.outputs_digest:
            raise CorruptStoreError("its file is damaged: its bytes are not what was written")
        first = _aligned(start + manifest.pickle_size + manifest.outputs_size)
        return stream, outputs, self._buffers(file, first, manifest.buffers, checked)

    def _buffers(self, file: io.BufferedReader, start: int, wanted: list[Buffer], checked: int | None) -> list[Any]:
        found: list[Any] = []
        maps: dict[str, mmap.mmap] = {}
        for buffer in wanted:
            begin = buffer.offset if buffer.blob else start + buffer.offset
            data: Any
            if buffer.size >= MAPPED_BYTES:
                if buffer.blob not in maps:
                    maps[buffer.blob] = self._mapped(file, buffer.blob)
                data = memoryview(maps[buffer.blob])[begin : begin + buffer.size]
                if data.nbytes != buffer.size:
                    raise CorruptStoreError(f"the large value {buffer.blob} is damaged: it is cut short")
            else:
                file.seek(begin)
                data = bytearray(file.read(buffer.size))
            if (checked is None or buffer.size <= checked) and xxhash.xxh3_128_hexdigest(data) != buffer.digest:
                raise CorruptStoreError("its file is damaged: its bytes are not what was written")
            if buffer.size >= MAPPED_BYTES and begin % mmap.PAGESIZE == 0 and hasattr(mmap, "MADV_DONTNEED"):
                # Nobody has written to it: it is read again when touched.
                maps[buffer.blob].madvise(mmap.MADV_DONTNEED, begin, buffer.size)
            found.append(memoryview(data).toreadonly() if buffer.readonly else data)
        return found

    def _mapped(self, file: io.BufferedReader, blob: str) -> mmap.mmap:
        """All of an entry's own file, or of a large value."""
        if not blob:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        with open(self._blobs.path(blob), "rb", opener=without_a_trace) as held:
            return mmap.mmap(held.fileno(), 0, access=mmap.ACCESS_COPY)


@dataclass(frozen=True, slots=True)
class Entry:
    """An authenticated entry, not yet decoded."""

    manifest: Manifest
    _stream: bytes
    outputs: bytes
    _buffers: list[Any]
    path: Path
    accessed_ns: int
    """When its file was read last, before now."""

    def values(self, resolve: Callable[[Any], object]) -> dict[str, Any]:
        """The values by name, references given to `resolve`. Raises whatever unpickling raises."""
        values: dict[str, Any] = Unpickler(self._stream, resolve=resolve, buffers=self._buffers).load()
        return values


def _notes(file: io.BufferedReader, manifest: Manifest) -> bytes:
    if not manifest.notes_size:
        return b""
    file.seek(-manifest.notes_size, os.SEEK_END)
    found = file.read()
    if _digest(found) != manifest.notes_digest:
        raise CorruptStoreError("its notes are damaged: they are not what was written")
    return found


def _key_in(path: Path) -> str:
    return path.name.partition("-")[0]


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
