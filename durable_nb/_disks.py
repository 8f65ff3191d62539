"""On which kind of file system a folder lies, and whether SQLite's write-ahead log (WAL) works there.

WAL shares memory between processes by a mapped file, which network file systems don't offer across machines and some others
offer badly. So WAL is for those that are known to be fit; nothing is concluded from a name that isn't known.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FIT = frozenset({"ext", "xfs", "btrfs", "zfs", "tmpfs", "apfs", "overlay"})
_NETWORK = frozenset({"nfs", "cifs", "smb", "smbfs", "afs", "afpfs", "webdav", "ceph", "lustre", "gpfs", "9p"})
_LINUX_MAGIC = {  # statfs(2), linux/magic.h
    0xEF53: "ext",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x2FC12FC1: "zfs",
    0x01021994: "tmpfs",
    0x794C7630: "overlay",
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb",
    0x517B: "smb",
    0x5346414F: "afs",
    0x00C36400: "ceph",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x01021997: "9p",
    0x65735546: "fuse",
}
_MACOS_NAME_AT = 72


@dataclass(frozen=True, slots=True)
class FileSystem:
    """What is known of a file system."""

    name: str
    """'ext', 'nfs' ...; '' where it isn't known."""

    @property
    def is_fit(self) -> bool:
        """Does SQLite's WAL work on it?"""
        return self.name in _FIT

    @property
    def advice(self) -> str:
        """What users of a store on it should know, as a sentence; '' where there is nothing to say."""
        if self.is_fit:
            return ""
        what = "a network file system" if self.name in _NETWORK else "a file system not known to be fit for SQLite's WAL"
        return (
            f"the store is on {what}{f' ({self.name})' if self.name else ''}, so its journal is a rollback journal, which "
            "is slower; set DURABLE_NB_DIR to a folder on a local disk"
        )


def file_system_of(path: Path) -> FileSystem:
    """Of the folder, or of the nearest parent that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    name = _name(path)
    if name == "overlay":
        # Changes go to the upper folder, which decides. A container doesn't see its own; those of container engines are
        # local: NFS can't be one (docs.kernel.org/filesystems/overlayfs.html, "Upper and Lower").
        upper = _upper_of(path)
        if upper is not None and upper.exists():
            return file_system_of(upper)
    return FileSystem(name)


def _name(path: Path) -> str:
    found = ctypes.create_string_buffer(4096)
    if sys.platform == "darwin":
        libc = _libc()
        statfs = getattr(libc, "statfs$INODE64", None) or libc.statfs
        if statfs(os.fsencode(path), found) == 0:
            return found.raw[_MACOS_NAME_AT : _MACOS_NAME_AT + 16].partition(b"\0")[0].decode()
    elif sys.platform == "linux" and _libc().statfs(os.fsencode(path), found) == 0:
        magic = ctypes.c_long.from_buffer(found).value & 0xFFFFFFFF
        return _LINUX_MAGIC.get(magic, f"type {magic:#x}")
    return ""


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _upper_of(path: Path) -> Path | None:
    """The upper folder of the overlay that `path` is on (/proc/self/mountinfo, proc(5))."""
    best, upper = "", None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, rest = line.partition(" - ")
        point, options = mount.split()[4], rest.split()[-1]
        if path.resolve().is_relative_to(point) and len(point) >= len(best):
            named = [option[len("upperdir=") :] for option in options.split(",") if option.startswith("upperdir=")]
            best, upper = point, Path(named[0]) if named else None
    return upper
