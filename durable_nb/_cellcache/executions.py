"""How the durable cells of a notebook were executed last, in its order: what `%durable plan` goes by in a new kernel.

A small file of the store for each notebook, to which each execution adds a line. It holds names and digests, no code and no
values, and nothing is restored by it: one that is lost or behind the times costs an answer. So it is written without waiting
for the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

FOLDER, SUFFIX = "plans", ".lines"
_LONG_BYTES = 1 << 16
NOT_COMPLETED = "it was not completed"


@dataclass(frozen=True, slots=True)
class LastExecution:
    """How a cell was executed last: restored or run."""

    key: str
    code: str
    """Digest of the cell's own code."""
    at: float
    """When, unix seconds."""
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Of the names that it read: the durable cell that had made them, and by which key."""
    made: tuple[str, ...] = ()
    """Names that it bound, or whose objects it changed."""
    unstored: str = ""
    """Why it has no entry."""
    ttl_s: float | None = None
    rerun: bool = False
    """Its line says --rerun."""


_Line = list[str] | dict[str, LastExecution | None]
"""The notebook's order, or what is new of a cell: None where it is to be forgotten."""


class LastExecutions:
    """The cells of one notebook, as far as they were executed."""

    def __init__(self, store: Path, notebook: str) -> None:
        """`notebook`: what it is known by; '' shares one file with all that aren't known."""
        self.notebook = notebook
        name = hashlib.blake2b(os.fsencode(notebook), digest_size=8).hexdigest()
        self._path = store / FOLDER / f"{name}{SUFFIX}"
        self._before: str | None = None
        self._met: set[str] = set()
        self._makers: dict[str, tuple[str, str, Callable[[Any], bool]]] = {}
        """In this kernel: by variable, the cell and key that made it, and whether what it holds is that object."""
        self.last = _read(self._path)
        """By name, in the order of the notebook as far as executing it has shown it."""

    def elsewhere(self) -> dict[str, LastExecution]:
        """The last executions of cells that this notebook isn't known to have executed: it may have had another name."""
        found: dict[str, LastExecution] = {}
        for path in self._path.parent.glob(f"[!.]*{SUFFIX}"):
            for name, last in _read(path).items():
                if name not in self.last and (name not in found or found[name].at < last.at):
                    found[name] = last
        return found

    def sources(self, read: Iterable[str], namespace: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        """Which cells have made what these names hold now."""
        found = {}
        for name in read:
            maker = self._makers.get(name)
            if maker is not None and name in namespace and maker[2](namespace[name]):
                found[name] = maker[:2]
        return found

    def enter(self, name: str) -> None:
        """A cell is about to be executed: should the kernel be killed meanwhile, its place is known."""
        if self._put_in_order(name):
            self._add(list(self.last))

    def note(self, name: str, last: LastExecution, namespace: MutableMapping[str, Any]) -> None:
        """A cell was executed. Where that tells anything new, it is written down."""
        for made in last.made:
            if made in namespace:
                self._makers[made] = name, last.key, _recogniser(namespace[made])
        known, names = self.last.get(name), list(self.last)
        from_here = {*names[names.index(name) :]} if name in names else {name}
        if known is not None and known.code == last.code and from_here.intersection(m for m, _ in last.sources.values()):
            last = known  # it was executed once more, with what it or a later cell has made: no Run All does that
        if known is None or replace(known, at=last.at) != last:
            self.last[name] = last
            self._add({name: last})

    def cell_ended(self, namespace: Mapping[str, Any]) -> None:
        """Any cell was executed: what it has bound otherwise, no durable cell has made."""
        self._makers = {n: maker for n, maker in self._makers.items() if n in namespace and maker[2](namespace[n])}

    def forget(self, name: str) -> None:
        """The cell is not to be known any more."""
        if self.last.pop(name, None) is not None:
            self._add({name: None})

    def _put_in_order(self, name: str) -> bool:
        """Executed for the first time in this kernel, a cell stands after the one that was so before it; was that news?"""
        if name in self._met:
            return False
        before, self._before = self._before, name
        self._met.add(name)
        names = list(self.last)
        known = name in names
        if known and (before is None or before not in names or names.index(name) > names.index(before)):
            return False
        if known:
            names.remove(name)
        names.insert(names.index(before) + 1 if before in names else len(names), name)
        self.last = _in_order(names, self.last)
        return True

    def _add(self, line: _Line) -> None:
        # It begins with the line's end: one that was cut short spoils no other.
        data = b"\n" + msgspec.json.encode(line)
        with contextlib.suppress(OSError):  # a store that is only read
            try:
                _append(self._path, data)
            except FileNotFoundError:
                self._path.parent.mkdir(mode=0o700, exist_ok=True)
                _append(self._path, data)


def _recogniser(obj: Any) -> Callable[[Any], bool]:
    """Tells whether it is given this very object, which is not kept alive but for numbers and texts: when it is gone, its
    address may be another's."""  # fmt: skip
    with contextlib.suppress(TypeError):
        known = weakref.ref(obj)
        return lambda other: known() is other
    if type(obj) in (int, float, complex, bool, str, bytes, type(None)):
        return lambda other: other is obj
    address = id(obj)  # of a list, say: whoever binds its name anew is met at the end of that cell
    return lambda other: id(other) == address


def _in_order(names: list[str], found: Mapping[str, LastExecution]) -> dict[str, LastExecution]:
    """Those of these names first, and all of them."""
    return {**{name: found.get(name, _NOT_YET) for name in names}, **{n: v for n, v in found.items() if n not in names}}


_NOT_YET = LastExecution("", "", 0.0, unstored=NOT_COMPLETED)


def _append(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, data)
    finally:
        os.close(file)


def _read(path: Path) -> dict[str, LastExecution]:
    """What all lines come to; where most of them say nothing any more, it is written anew as two."""
    try:
        data = path.read_bytes()
    except OSError:
        return {}
    found: dict[str, LastExecution] = {}
    for text in data.split(b"\n"):
        with contextlib.suppress(msgspec.MsgspecError):
            line = msgspec.json.decode(text, type=_Line)
            if isinstance(line, list):
                found = _in_order(line, found)
                continue
            for name, last in line.items():
                if last is None:
                    found.pop(name, None)
                else:
                    found[name] = last
    short = b"".join(b"\n" + msgspec.json.encode(line) for line in (list(found), found))
    if len(data) > _LONG_BYTES + 4 * len(short):
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):
            draft.write_bytes(short)
            draft.replace(path)
    return found
