"""Why a cell runs, in detail: what its key was made of, in words, then and now.

An entry carries notes for this: the cell's source, that of its helpers, and a few words about each value. No text of the
user's is among them: a string, which may be a password, is a length and a keyed mark, by which it is known again.
"""

from __future__ import annotations

import ast
import builtins
import datetime as dt
import decimal
import difflib
import fractions
import re
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgspec

from durable_nb._cellcache.keys import CellKey, describe, how_changed
from durable_nb._codec import Signer
from durable_nb._fingerprint import object_of, source_of

_LONGEST_SOURCE = 50_000
_SECRET = re.compile(r"key|token|secret|signature|password|passwd|authorization|cookie|credential", re.IGNORECASE)
_GENERATED = re.compile(rb"(?=\S*\d)(?=\S*[A-Za-z])\S{16,}")
"""A long word with digits in it: how keys look."""
_MASKED = re.compile(r"[⟨«]\d+ (?:characters?|bytes?) #([0-9a-f]+)[⟩»]")


@dataclass(frozen=True, slots=True)
class Notes:
    """What an entry's key was made of. Sources are normal forms: no comments, no layout, texts masked."""

    source: str = ""
    code: dict[str, str] = field(default_factory=dict)
    """Sources of helpers, by component."""
    values: dict[str, str] = field(default_factory=dict)
    """A few words about each value, by component."""
    opaque: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not what it was."""

    what: str
    details: tuple[str, ...] = ()
    """Lines: a diff, or before and after."""


def encode(notes: Notes) -> bytes:
    """Notes as bytes."""
    return msgspec.msgpack.encode(notes)


def decode(data: bytes) -> Notes:
    """What `encode` was given; empty notes where there are none."""
    return msgspec.msgpack.decode(data, type=Notes) if data else Notes()


def notes_of(key: CellKey, tree: ast.Module, namespace: Mapping[str, Any], signer: Signer) -> tuple[Notes, dict[str, str]]:
    """Notes on a cell that is about to run, and the texts that its marks stand for: those are for memory only.

    `signer` makes the marks, so that one tells nothing to whom its key isn't known.
    """
    masked = {label: _masked(source_of(function), signer) for label, function in key.functions().items()}
    masked["code"] = _masked(tree, signer)
    code = {label: found.source for label, found in masked.items() if found.source and label != "code"}
    values = {label: words for label in key.components if (words := _words_at(label, namespace))}
    secrets = frozenset().union(*(found.secrets for found in masked.values()))
    texts = {mark: text for found in masked.values() for mark, text in found.texts.items() if mark not in secrets}
    return Notes(masked["code"].source, code, values, list(key.opaque)), texts


def differences(
    old: Mapping[str, str], old_notes: Notes, new: Mapping[str, str], new_notes: Notes, texts: Mapping[str, str]
) -> Iterator[Difference]:
    """What differs between two keys' components, the code first."""
    for label in sorted({*old, *new}, key=lambda label: (label != "code", label)):
        if old.get(label) == new.get(label):
            continue
        what = how_changed(label, old, new)
        if label == "code":
            details = _diff(old_notes.source, new_notes.source, texts)
        elif label in old_notes.code or label in new_notes.code:
            details = _diff(old_notes.code.get(label, ""), new_notes.code.get(label, ""), texts) if what == "changed" else ()
        else:
            before, after = old_notes.values.get(label), new_notes.values.get(label)
            details = (f"{before or '?'} → {after or '?'}",) if before != after and what == "changed" else ()
            if before == after and before and what == "changed":
                details = (f"{before}, with other content",)
        yield Difference(f"{describe(label)} {what}", details)


def package_changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Packages that are of another version now; that changes no key."""
    return [f"{name} {old[name]} → {new[name]}" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]


# -- values ------------------------------------------------------------------------------------------------------------

_SHOWN_WHOLE = (bool, int, float, complex, dt.date, dt.time, dt.timedelta, decimal.Decimal, fractions.Fraction, uuid.UUID)
_COUNTED = (list, tuple, dict, set, frozenset, bytearray)
_TABULAR = ("numpy", "pandas", "pyarrow", "polars")
_LONGEST_NUMBER = 60


def _words_at(label: str, namespace: Mapping[str, Any]) -> str:
    kind, _, name = label.partition(" ")
    if kind != "global" or "#" in name:
        return ""
    if "." in name:
        return words_of(object_of(label))
    return words_of(namespace[name]) if name in namespace else "" if hasattr(builtins, name) else "undefined"


def words_of(value: object) -> str:
    """A value in a few words: numbers as they are, texts by their length, the rest by type and size."""
    kind = type(value)
    if value is None:
        return "None"
    if kind in (str, bytes):
        return f"{kind.__name__}, {_count(len(value), 'character' if kind is str else 'byte')}"  # type: ignore[arg-type]
    if kind in _SHOWN_WHOLE:
        if kind is int and value.bit_length() > _LONGEST_NUMBER * 3:  # type: ignore[attr-defined]
            return f"int of {value.bit_length()} bits"  # type: ignore[attr-defined]
        return str(value)
    if kind in _COUNTED:
        return f"{kind.__name__} of {len(value)}"  # type: ignore[arg-type]
    if kind.__module__.partition(".")[0] in _TABULAR:
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple):
            size = " x ".join(str(n) for n in shape) or "scalar"
            dtype = getattr(value, "dtype", None)
            return f"{kind.__name__} {size}" + (f" {dtype}" if dtype is not None else "")
    if isinstance(value, type | types.FunctionType | types.ModuleType):
        return f"{kind.__name__} {value.__name__}"
    return kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


# -- sources -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Masked:
    """A piece of code with marks in place of its texts."""

    source: str
    """In its normal form; '' where it is too long to keep."""
    texts: Mapping[str, str]
    """What the marks stand for."""
    secrets: frozenset[str]
    """Marks of texts that are not to be shown: by what they are called, or by their looks."""


@lru_cache(maxsize=1024)  # helpers are asked for again and again
def _masked(tree: ast.AST, signer: Signer) -> _Masked:
    masking = _Masking(signer)
    source = ast.unparse(masking.visit(tree))
    return _Masked(source if len(source) <= _LONGEST_SOURCE else "", masking.texts, frozenset(masking.secrets))


class _Masking:
    """Copies code with marks in place of all texts, and without those that only document."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer
        self.texts: dict[str, str] = {}
        self.secrets: set[str] = set()
        self._secret = False

    def visit(self, node: ast.AST) -> Any:
        """The copy: the nodes themselves are shared with all who ask about this code."""
        match node:
            case ast.Constant(value=value):
                masked = self._mask(value, "⟨⟩")
                return node if masked is None else ast.Name(masked, ast.Load())
            case ast.Expr(value=ast.Constant(value=str())):
                return ast.Pass()
            case ast.JoinedStr(values=parts):
                return ast.JoinedStr([self._text(part) for part in parts])
            case ast.Dict(keys=keys, values=values):
                pairs = zip(keys, values, strict=True)
                known = [self._within(value, self.visit, secret=key is not None and _is_secret(key)) for key, value in pairs]
                return ast.Dict([key and self.visit(key) for key in keys], known)
            case ast.keyword(arg=str(name)):
                return self._within(node, self._copy, secret=bool(_SECRET.search(name)))
            case ast.Assign(targets=targets):
                return self._within(node, self._copy, secret=any(_is_secret(target) for target in targets))
            case ast.AnnAssign(target=target):
                return self._within(node, self._copy, secret=_is_secret(target))
        return self._copy(node)

    def _copy(self, node: ast.AST) -> Any:
        copy = type(node).__new__(type(node))
        for name, value in vars(node).items():
            parts = value if isinstance(value, list) else [value]
            copied = [self.visit(part) if isinstance(part, ast.AST) else part for part in parts]
            setattr(copy, name, copied if isinstance(value, list) else copied[0])
        return copy

    def _within(self, node: ast.AST, visit: Callable[[ast.AST], Any], *, secret: bool) -> Any:
        outer, self._secret = self._secret, self._secret or secret
        try:
            return visit(node)
        finally:
            self._secret = outer

    def _text(self, part: ast.expr) -> Any:
        if isinstance(part, ast.Constant):
            return ast.Constant(self._mask(part.value, "«»") or part.value)
        return self.visit(part)

    def _mask(self, value: object, brackets: str) -> str | None:
        if not isinstance(value, str | bytes):
            return None
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        mark = self._signer.mac(b"mark", data)[:3].hex()  # six characters, which only the key's holder could try guesses with
        self.texts[mark] = value if brackets == "«»" and isinstance(value, str) else repr(value)
        if self._secret or _GENERATED.fullmatch(data):
            self.secrets.add(mark)
        unit = "character" if isinstance(value, str) else "byte"
        return f"{brackets[0]}{_count(len(value), unit)} #{mark}{brackets[1]}"


def _is_secret(named: ast.expr) -> bool:
    return bool(_SECRET.search(named.id if isinstance(named, ast.Name) else ast.unparse(named)))


def _diff(before: str, after: str, texts: Mapping[str, str]) -> tuple[str, ...]:
    """The lines that differ, with a line around them; texts that the code still holds are shown."""
    if not before or not after:
        return ()

    def unmasked(line: str) -> str:
        return _MASKED.sub(lambda found: texts.get(found[1], found[0]), line)

    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=1, lineterm="")
    return tuple(unmasked(line) for line in lines if not line.startswith(("---", "+++", "@@")))
