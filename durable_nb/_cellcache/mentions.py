"""Texts that the code of a cell or step and its inputs hold: what they could name is looked at, and watched while it runs.

Files that native code opens can't be known beforehand, but their names, or those of their folders, come from somewhere:
a constant, an argument, a list, an attribute, the value of an environment variable. The same texts name variables to code
that looks them up (`eval`, `df.query("a > @k")`, `duckdb.sql("select * from df")`) and modules to code that imports them.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import os
import re
import sys
import tempfile
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePath
from typing import Any

from durable_nb._cellcache.environment import is_secret
from durable_nb._cellcache.files import ABSENT, is_elsewhere, kind_of, looks_like_path
from durable_nb._fingerprint import names_loaded, nested_codes, nodes

MOST_TEXTS = 10_000
LONGEST_TEXT = 1024
_MOST_OBJECTS = 200_000
"""Objects looked at for texts among them."""

_PIECES = re.compile(r"""[\s'"`(),;=<>|&\[\]{}]+""")
_NAMES = re.compile(r"[^\W\d]\w*")
PLAIN = frozenset({int, float, bool, complex, type(None), types.BuiltinFunctionType, types.GetSetDescriptorType, type(...)})
"""Types of what mentions nothing."""
_MANY = (list, tuple, set, frozenset, deque)
_TABULAR = ("numpy", "pandas", "polars", "pyarrow")


@dataclass(frozen=True, slots=True)
class Mentions:
    """What is mentioned, in the order in which it was met."""

    texts: tuple[str, ...] = ()
    words: frozenset[str] = frozenset()
    """Names that the code uses: variables, attributes, functions."""
    free: frozenset[str] = frozenset()
    """Those of them that are variables."""
    near: tuple[str, ...] = ()
    """Texts that are written in the code, or inputs themselves: none that lie in data."""

    def with_more(self, other: Mentions) -> Mentions:
        """Both."""
        if not other.texts and not other.words:
            return self
        texts = tuple(dict.fromkeys((*self.texts, *other.texts)))[:MOST_TEXTS]
        near = tuple(dict.fromkeys((*self.near, *other.near)))
        return Mentions(texts, self.words | other.words, self.free | other.free, near)


def mentions_of(objects: Iterable[Any], code: Iterable[ast.AST] = ()) -> Mentions:
    """What these objects and this code mention, with whatever they lead to. Nobody's code runs: no property, no iterator."""
    collector = _Collector()
    for tree in code:
        collector.met(_of_tree(tree))
    inputs = list(objects)
    for obj in inputs:
        if isinstance(obj, (str, PurePath)):
            collector.add((str(obj),), near=True)
    collector.walk(inputs)
    return Mentions(tuple(collector.texts), frozenset(collector.words), frozenset(collector.free), tuple(collector.near))


class _Collector:
    def __init__(self) -> None:
        self.texts: dict[str, None] = {}
        self.near: dict[str, None] = {}
        self.words: set[str] = set()
        self.free: set[str] = set()
        self._seen: set[int] = set()
        self._keep: list[Any] = []

    def add(self, texts: Iterable[str], *, near: bool = False) -> None:
        for text in texts:
            if len(self.texts) >= MOST_TEXTS:
                return
            if 0 < len(text) <= LONGEST_TEXT and "\0" not in text:
                self.texts[text] = None
                if near:
                    self.near[text] = None

    def met(self, code: _Said) -> None:
        self.add(code.texts, near=True)
        self.words |= code.words
        self.free |= code.free

    def walk(self, objects: Iterable[Any]) -> None:
        """Breadth first: what is named at the top counts before what lies deep in data."""
        waiting: deque[Any] = deque(objects)
        left = _MOST_OBJECTS
        while waiting and left > 0 and len(self.texts) < MOST_TEXTS:
            obj = waiting.popleft()
            left -= 1
            kind = type(obj)
            if kind is str:
                self.add((obj,))
                continue
            if kind in PLAIN or id(obj) in self._seen:
                continue
            self._seen.add(id(obj))
            self._keep.append(obj)  # or its id could become another's
            if kind is bytes:
                if len(obj) <= LONGEST_TEXT:
                    self.add((os.fsdecode(obj),))
            elif kind in _MANY:
                left -= len(obj) // 8  # passing over a number costs little
                waiting.extend(itertools.islice((one for one in list(obj) if type(one) not in PLAIN), left))
            elif kind in (dict, types.MappingProxyType):
                left -= len(obj) // 8
                waiting.extend(one for pair in list(obj.items())[:left] for one in pair if type(one) not in PLAIN)
            else:
                with contextlib.suppress(Exception):  # an odd object: what it would lead to isn't mentioned
                    waiting.extend(self._parts(obj, kind))

    def _parts(self, obj: Any, kind: type) -> Iterator[Any]:
        """What an object of another kind leads to."""
        if issubclass(kind, types.FunctionType):
            yield from self._function(obj)
        elif issubclass(kind, types.MethodType):
            yield from (obj.__func__, obj.__self__)
        elif issubclass(kind, functools.partial):
            yield from (obj.func, obj.args, obj.keywords)
        elif issubclass(kind, type):
            if not _is_installed(sys.modules.get(obj.__module__)):
                yield from obj.__bases__
                yield from (value for name, value in vars(obj).items() if name not in _OF_CLASSES)
        elif issubclass(kind, types.ModuleType):
            if not _is_installed(obj):
                yield from (value for name, value in vars(obj).items() if name == "__file__" or not name.startswith("__"))
        elif kind is types.CellType:
            yield from _filled(obj)
        elif issubclass(kind, os.PathLike) and (issubclass(kind, PurePath) or _is_installed(sys.modules.get(kind.__module__))):
            yield os.fspath(obj)
        elif kind.__module__.partition(".")[0] in _TABULAR:
            yield from _texts_in(obj, kind)
        elif kind.__module__ == "durable_nb.http" or kind.__module__.partition(".")[0] in _CLIENTS:
            return
        elif issubclass(kind, (property, staticmethod, classmethod, functools.cached_property)):
            yield from (getattr(obj, name, None) for name in ("fget", "func", "__func__"))
        else:
            yield kind
            if issubclass(kind, str):
                yield str.__str__(obj)
            elif issubclass(kind, dict):
                yield dict(dict.items(obj))
            for plain in _MANY:
                if issubclass(kind, plain):
                    yield list(plain.__iter__(obj))  # not its own, which may run anything
            yield from _attributes(obj, kind)

    def _function(self, fn: types.FunctionType) -> Iterator[Any]:
        if _is_installed(sys.modules.get(str(fn.__globals__.get("__name__")))):
            yield from (fn.__closure__, fn.__dict__)  # what a package's decorator wraps
            return
        code = _of_code(fn.__code__)
        self.met(code)
        yield from (fn.__defaults__, fn.__kwdefaults__, fn.__closure__, fn.__dict__)
        for name in code.free:
            value = fn.__globals__.get(name)
            if type(value) is types.ModuleType and not _is_installed(value):  # of a project's module what is used of it
                yield from (vars(value)[word] for word in code.words if word in vars(value))
            else:
                yield value


_CLIENTS = frozenset("anthropic anyio h11 h2 httpcore httpcore2 httpx httpx2 openai requests urllib3".split())
"""What their objects hold is no input: requests on their way, with their texts, other ones each time."""

_MOST_COLUMNS = 100
_OF_CLASSES = frozenset({"__module__", "__qualname__", "__doc__"})


def _attributes(obj: Any, kind: type) -> Iterator[Any]:
    with contextlib.suppress(AttributeError):
        yield object.__getattribute__(obj, "__dict__")
    for cls in kind.__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots if isinstance(slots, (tuple, list)) else ():
            slot = vars(cls).get(name)
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    yield slot.__get__(obj, kind)
                except AttributeError:  # never set
                    continue


def _texts_in(obj: Any, kind: type) -> Iterator[Any]:
    """Texts in columns: a table of files is a list of them."""
    if kind.__name__ == "DataFrame":
        count = min(obj.shape[1], _MOST_COLUMNS)
        columns = [obj.iloc[:, n] for n in range(count)] if hasattr(obj, "iloc") else obj.get_columns()[:count]
    else:
        columns = [obj] if kind.__name__ in ("Series", "Index", "ndarray") else []
    for column in columns:
        if str(column.dtype).lower().startswith(("object", "str", "<u", "category")):
            flat = column.reshape(-1) if kind.__name__ == "ndarray" else column
            values = flat[:MOST_TEXTS]
            values = values.to_list() if hasattr(values, "to_list") else values.tolist()
            yield [value for value in values if isinstance(value, (str, os.PathLike))]


def _filled(cell: types.CellType) -> Iterator[Any]:
    try:
        yield cell.cell_contents
    except ValueError:
        return


def _is_installed(module: types.ModuleType | None) -> bool:
    filename = getattr(module, "__file__", None)
    if not isinstance(filename, str):  # built in, or the notebook
        return module is not None and module.__name__ != "__main__"
    return is_elsewhere(filename) or filename.startswith(_HERE)


_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@dataclass(frozen=True, slots=True)
class _Said:
    """What one piece of code mentions."""

    texts: tuple[str, ...]
    words: frozenset[str]
    free: frozenset[str]


@lru_cache(maxsize=256)  # a cell's tree is kept as long as its text is executed again and again
def _of_tree(tree: ast.AST) -> _Said:
    texts: dict[str, None] = {}
    words: set[str] = set()
    free: set[str] = set()
    for node in nodes(tree):
        match node:
            case ast.Constant(value=str() | bytes() as value):
                texts[os.fsdecode(value)] = None
            case ast.Name(id=name):
                free.add(name)
            case ast.Attribute(attr=name):
                words.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                words.update(part for alias in names for part in alias.name.split("."))
                words.update((getattr(node, "module", None) or "").split("."))
    return _Said(tuple(texts), frozenset(words | free), frozenset(free))


@lru_cache(maxsize=4096)
def _of_code(code: types.CodeType) -> _Said:
    texts: dict[str, None] = {}
    words: set[str] = set()
    for inner in nested_codes(code):
        words.update(part for name in inner.co_names for part in name.split("."))
        waiting: list[Any] = list(inner.co_consts)
        while waiting:
            constant = waiting.pop()
            if isinstance(constant, (str, bytes)):
                texts[os.fsdecode(constant)] = None
            elif isinstance(constant, (tuple, frozenset)):
                waiting += constant
    return _Said(tuple(texts), frozenset(words), frozenset(names_loaded(code)))


@lru_cache(maxsize=256)
def packages_imported(tree: ast.AST) -> frozenset[str]:
    """The packages that code imports."""
    found: set[str] = set()
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return frozenset(found)


def pieces(text: str) -> Iterator[str]:
    """What a command or a query names: `cat a.csv`, `select * from 'a.parquet'`."""
    if not text.isidentifier():
        parts = _PIECES.split(text)
        if len(parts) > 1:
            yield from (part for part in parts if part)


# -- names that are looked up ------------------------------------------------------------------------------------------

_LOOKING_UP = frozenset({"eval", "exec", "globals", "get_ipython"})
_NAMESPACES = frozenset("__main__ __globals__ f_globals f_locals user_ns user_global_ns".split())
"""Code that loads one of these, or has such an attribute, may look up whatever its texts and attributes name."""
_MARKED = frozenset({"query", "eval"})
"""`@name` in a text is a variable."""
_OF_TABLES = frozenset({"sql", "execute", "query", "eval", "evaluate", "sqldf", "read_sql", "from_query"})
"""Names in a text may be the caller's frames or arrays."""


def looks_up_anything(mentions: Mentions) -> bool:
    """Has the code ways to look up whatever it likes, which nobody can follow to the end?"""
    return bool(mentions.free & _LOOKING_UP or mentions.words & _NAMESPACES) or (
        "__main__" in mentions.near and "__name__" not in mentions.words
    )


def looked_up(mentions: Mentions, namespace: Mapping[str, Any]) -> frozenset[str]:
    """The notebook's variables that the code may look up by a name in some text."""
    found: set[str] = set()
    if looks_up_anything(mentions):
        found |= (_names_in(mentions.texts) | mentions.words) & namespace.keys()
    if mentions.words & _MARKED:
        found |= {name for text in mentions.texts for name in re.findall(r"@([^\W\d]\w*)", text)} & namespace.keys()
    if mentions.words & _OF_TABLES:
        texts = [text for text in mentions.texts if not text.isidentifier()]
        found |= {name for name in _names_in(texts) & namespace.keys() if _is_table(namespace[name])}
    if "patsy" in sys.modules or "formulaic" in sys.modules:
        found |= _names_in([text for text in mentions.texts if "~" in text]) & namespace.keys()
    return frozenset(name for name in found if not name.startswith("_") and name not in _OF_THE_SHELL)


def _names_in(texts: Iterable[str]) -> set[str]:
    return {name for text in texts for name in _NAMES.findall(text)}


_OF_THE_SHELL = frozenset({"In", "Out", "exit", "quit", "get_ipython", "open", "durable"})


def _is_table(value: Any) -> bool:
    kind = type(value)
    return kind.__module__.partition(".")[0] in (*_TABULAR, "duckdb", "datasets") and not isinstance(value, types.ModuleType)


_IMPORTING = frozenset({"import_module", "__import__", "exec_module", "spec_from_file_location", "entry_points", "run_path",
                        "run_module", "load_module", "iter_modules", "pydoc", "locate", "resolve_name"})  # fmt: skip


def modules_named(mentions: Mentions) -> frozenset[str]:
    """Modules of the project, loaded already, that the code may ask for by a name in some text."""
    if not mentions.words & _IMPORTING:
        return frozenset()
    return frozenset(text for text in mentions.texts if text in sys.modules and not _is_installed(sys.modules[text]))


# -- files that are mentioned ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Places:
    """What the texts name in the file system. Absolute paths, each with the text."""

    files: dict[str, str]
    folders: dict[str, str]
    """Of a text that begins like a path and names nothing (`data/part_`, to be completed), the folder it begins with."""
    patterns: tuple[str, ...]
    absent: tuple[str, ...]
    """Texts of the code, and inputs, that look like paths and name nothing."""
    hidden: frozenset[str]
    """Hidden folders that a text speaks of."""

    def with_more(self, other: Places) -> Places:
        """Both."""
        return Places(
            self.files | other.files,
            self.folders | other.folders,
            (*self.patterns, *other.patterns),
            (*self.absent, *other.absent),
            self.hidden | other.hidden,
        )

    def is_mentioned(self, where: str) -> bool:
        """Is it one of the files, or somewhere below one of the folders?"""
        if where in self.files:
            return True
        while where not in self.folders:
            above = os.path.dirname(where)
            if above == where:
                return False
            where = above
        return True

    def as_written(self, where: str, base: str) -> str:
        """The path as it is written down: relative to the folder `base` where it lies below, if the code says it so."""
        if not where.startswith(base.rstrip(os.sep) + os.sep):
            return where
        above = where
        while len(above) > len(base):
            text = self.files.get(above) or self.folders.get(above)
            if text is not None and os.path.isabs(text):
                return where
            above = os.path.dirname(above)
        return os.path.relpath(where, base)


NOWHERE = Places({}, {}, (), (), frozenset())
_WILD = re.compile(r"[*?\[]")


def places_of(mentions: Mentions, base: str) -> Places:
    """Look the texts up, relative to the folder `base`. Costs a few microseconds each."""
    found = _Places(base)
    if mentions.words & {"home", "expanduser"}:
        found.bases.append(os.path.expanduser("~"))
    if mentions.words & {"gettempdir", "tempdir"}:
        found.bases.append(tempfile.gettempdir())
    environment = [os.environ[text] for text in mentions.texts if text in os.environ and not is_secret(text)]
    near = frozenset(mentions.near)
    for text in (*mentions.texts, *environment):
        found.add(text)
        if text in near or "/" in text:  # a command or a query
            for piece in pieces(text):
                found.add(piece)
    absent = [text for text in mentions.near if looks_like_path(text) and not _WILD.search(text) and not found.names(text)]
    return Places(found.files, found.folders, tuple(found.patterns), tuple(absent), frozenset(found.hidden))


class _Places:
    def __init__(self, base: str) -> None:
        self.bases = [base]
        self.files: dict[str, str] = {}
        self.folders: dict[str, str] = {}
        self.patterns: dict[str, None] = {}
        self.hidden: set[str] = set()
        self._seen: set[str] = set()
        self._above: dict[str, str] = {}

    def names(self, text: str) -> bool:
        return kind_of(os.path.join(self.bases[0], os.path.expanduser(text))) != ABSENT

    def add(self, text: str) -> None:
        if text in self._seen or "://" in text or len(text) > LONGEST_TEXT or "\n" in text:
            return
        self._seen.add(text)
        if "/." in text or text.startswith("."):
            self.hidden.update(part for part in text.split(os.sep) if part.startswith(".") and part.strip("."))
        if "*" in text or "?" in text or "[" in text:
            if os.sep in text or "." in text:
                self.patterns[text] = None
            text = text[: _WILD.search(text).start()]  # type: ignore[union-attr]
            if not text:
                return
        expanded = os.path.expanduser(text) if text[0] == "~" else text
        for base in self.bases:
            where = os.path.join(base, expanded)
            kind = kind_of(where)
            if kind:
                self._found(os.path.normpath(where), kind, text)
            elif os.sep in text:
                above = os.path.dirname(where)
                if above not in self._above:
                    self._above[above] = kind_of(above)
                if self._above[above] == "folder" and os.path.normpath(above) != base:
                    self.folders.setdefault(os.path.normpath(above), text)

    def _found(self, where: str, kind: str, text: str) -> None:
        if kind == "folder":
            self.folders.setdefault(where, text)
            return
        self.files.setdefault(where, text)
        if text.endswith(".py"):  # Path(__file__).parent / "data"
            self.folders.setdefault(os.path.dirname(where), text)
