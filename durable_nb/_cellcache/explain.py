"""Why a cell runs, in detail: what its key was made of, in words, then and now.

An entry carries notes for this: the cell's source, that of its helpers, and a few words about each value. No text of the
user's is among them: a string, which may be a password, is a length and a keyed mark, by which it is known again.
"""

from __future__ import annotations

import ast
import builtins
import copy
import datetime as dt
import decimal
import difflib
import fractions
import re
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from durable_nb._cellcache.keys import CellKey, said, turned
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


def notes_of(
    key: CellKey, tree: ast.Module, namespace: Mapping[str, Any], mark: Callable[[bytes], str]
) -> tuple[Notes, dict[str, str]]:
    """Notes on a cell that is about to run, and the texts that its marks stand for: those are for memory only.

    `mark`: a short keyed digest, so that a mark tells nothing to whom the key isn't known.
    """
    masking = _Masking(mark)
    code = {}
    for label, function in key.functions().items():
        source = masking.source(source_of(function))
        if source:
            code[label] = source
    values = {label: words for label in key.components if (words := _words_at(label, namespace))}
    notes = Notes(masking.source(tree), code, values, list(key.opaque))
    return notes, {mark: text for mark, text in masking.texts.items() if mark not in masking.secrets}


def differences(
    old: Mapping[str, str], old_notes: Notes, new: Mapping[str, str], new_notes: Notes, texts: Mapping[str, str]
) -> Iterator[Difference]:
    """What differs between two keys' components, the code first."""
    for label in sorted({*old, *new}, key=lambda label: (label != "code", label)):
        if old.get(label) == new.get(label):
            continue
        what = turned(label, old, new)
        if label == "code":
            details = _diff(old_notes.source, new_notes.source, texts)
        elif label in old_notes.code or label in new_notes.code:
            details = _diff(old_notes.code.get(label, ""), new_notes.code.get(label, ""), texts) if what == "changed" else ()
        else:
            before, after = old_notes.values.get(label), new_notes.values.get(label)
            details = (f"{before or '?'} → {after or '?'}",) if before != after and what == "changed" else ()
            if before == after and before and what == "changed":
                details = (f"{before}, with other content",)
        yield Difference(f"{said(label)} {what}", details)


def package_changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Packages that are of another version now; that changes no key."""
    return [f"{name} {old[name]} → {new[name]}" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]


# -- values ------------------------------------------------------------------------------------------------------------

_SAID_WHOLE = (bool, int, float, complex, dt.date, dt.time, dt.timedelta, decimal.Decimal, fractions.Fraction, uuid.UUID)
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
    if kind in _SAID_WHOLE:
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


class _Masking(ast.NodeTransformer):
    """Puts marks in place of all texts, and drops those that only document."""

    def __init__(self, mark: Callable[[bytes], str]) -> None:
        self._mark = mark
        self.texts: dict[str, str] = {}
        self.secrets: set[str] = set()
        """Marks of texts that are not to be shown: by what they are called, or by their looks."""
        self._secret = False

    def source(self, node: ast.AST) -> str:
        """The code in its normal form, masked; '' where it is too long to keep."""
        source = ast.unparse(self.visit(copy.deepcopy(node)))
        return source if len(source) <= _LONGEST_SOURCE else ""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        masked = self._mask(node.value, "⟨⟩")
        return node if masked is None else ast.Name(masked, ast.Load())

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        for part in node.values:
            if isinstance(part, ast.Constant):
                part.value = self._mask(part.value, "«»") or part.value
            else:
                self.visit(part)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return ast.Pass()
        self.generic_visit(node)
        return node

    def visit_keyword(self, node: ast.keyword) -> Any:
        return self._visit(node, secret=bool(node.arg and _SECRET.search(node.arg)))

    def visit_Assign(self, node: ast.Assign) -> Any:
        return self._visit(node, secret=any(_SECRET.search(ast.unparse(target)) for target in node.targets))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        return self._visit(node, secret=bool(_SECRET.search(ast.unparse(node.target))))

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        secret = [key is not None and bool(_SECRET.search(ast.unparse(key))) for key in node.keys]
        node.keys = [key and self.visit(key) for key in node.keys]
        node.values = [
            self._visit(value, secret=hidden, itself=True) for value, hidden in zip(node.values, secret, strict=True)
        ]
        return node

    def _visit(self, node: Any, *, secret: bool, itself: bool = False) -> Any:
        outer, self._secret = self._secret, self._secret or secret
        try:
            return self.visit(node) if itself else self.generic_visit(node)
        finally:
            self._secret = outer

    def _mask(self, value: object, brackets: str) -> str | None:
        if not isinstance(value, str | bytes):
            return None
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        mark = self._mark(data)
        self.texts[mark] = value if brackets == "«»" and isinstance(value, str) else repr(value)
        if self._secret or _GENERATED.fullmatch(data):
            self.secrets.add(mark)
        unit = "character" if isinstance(value, str) else "byte"
        return f"{brackets[0]}{_count(len(value), unit)} #{mark}{brackets[1]}"


def _diff(before: str, after: str, texts: Mapping[str, str]) -> tuple[str, ...]:
    """The lines that differ, with a line around them; texts that the code still holds are shown."""
    if not before or not after:
        return ()

    def unmasked(line: str) -> str:
        return _MASKED.sub(lambda found: texts.get(found[1], found[0]), line)

    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=1, lineterm="")
    return tuple(unmasked(line) for line in lines if not line.startswith(("---", "+++", "@@")))
