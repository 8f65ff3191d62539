"""What a piece of code says: its syntax without layout, found where the source provably is the code that runs."""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import linecache
import re
from dataclasses import dataclass, field
from hashlib import blake2b
from types import CodeType
from typing import TYPE_CHECKING, Any

from ._tokens import DIGEST_BYTES, PERSON, text
from ._trees import children, nodes
from ._values import constant
from ._walk import ANNOTATIONS, DOCSTRINGS, MODULES, NAMES, SOURCE, Looks

if TYPE_CHECKING:
    from collections.abc import Iterator

Paths = frozenset[tuple[str, ...]] | None
Order = tuple[tuple[str, ...], ...]
_Index = dict[str, tuple[tuple[CodeType, ast.AST], ...]]

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_LEFT_OUT = {"ctx", "type_comment", "kind", "type_ignores"}
_FUTURE = functools.reduce(lambda mask, name: mask | getattr(__future__, name).compiler_flag, __future__.all_feature_names, 0)
_LOADS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS", "LOAD_CLASSDEREF"}


def normalise(tree: ast.AST, *, docstrings: bool = False) -> bytes:
    """The same bytes for the same program text under Python 3.11 and later, whatever its comments and layout."""
    return _Form(docstrings, annotations=True).of(tree)


class _Form:
    """One way to write code down."""

    def __init__(self, docstrings: bool, annotations: bool, links: frozenset[tuple[str, ...]] = frozenset()) -> None:
        """`links`: dotted names that are written by their order only; `annotations`: those of functions and their variables."""
        self._docstrings, self._annotations, self._links = docstrings, annotations, links
        self.order: dict[tuple[str, ...], int] = {}
        """The links that were written, and where each came first."""

    def of(self, tree: ast.AST) -> bytes:
        out: list[bytes] = []
        stack: list[Any] = [tree]
        classes = set() if self._annotations else _class_statements(tree)
        while stack:
            item = stack.pop()
            if isinstance(item, _Token):
                out.append(item)
            elif isinstance(item, ast.Constant):
                out.append(b"(C" + constant(item.value) + b")")
            elif isinstance(item, ast.AST):
                link = self._link(item)
                if link is not None:
                    out.append(link)
                    continue
                bare = not self._annotations and item not in classes
                if bare and isinstance(item, ast.AnnAssign) and item.value is not None:
                    stack.append(ast.Assign([item.target], item.value))
                    continue
                out.append(b"(" + type(item).__name__.encode())
                stack.append(_Token(b")"))
                for name in sorted(item._fields, reverse=True):
                    if name in _LEFT_OUT or (bare and name in {"annotation", "returns"}):
                        continue
                    value = _field(item, name, self._docstrings)
                    if value is not None and value != []:
                        stack.append(value)
                        stack.append(_Token(b":" + text(name)))
            elif isinstance(item, list):
                out.append(b"[")
                stack.append(_Token(b"]"))
                stack.extend(reversed(item))
            else:
                out.append(constant(item))
        return b"".join(out)

    def _link(self, node: ast.AST) -> bytes | None:
        path = dotted(node) if self._links and isinstance(node, ast.Name | ast.Attribute) else ()
        if path not in self._links:
            return None
        return b"(G%d)" % self.order.setdefault(path, len(self.order))


def dotted(node: ast.AST) -> tuple[str, ...]:
    """`("a", "b")` of `a.b`, where it is read; empty for other expressions."""
    path: list[str] = []
    while isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        path.append(node.attr)
        node = node.value
    return (node.id, *reversed(path)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) else ()


def _class_statements(tree: ast.AST) -> set[ast.AST]:
    """What stands directly in a class inside of `tree`: annotations there make fields."""
    found: set[ast.AST] = set()
    for cls in nodes(tree):
        pending: list[ast.AST] = list(cls.body) if isinstance(cls, ast.ClassDef) else []
        while pending:
            node = pending.pop()
            if not isinstance(node, (*_DEFINITIONS, ast.ClassDef)):
                found.add(node)
                pending.extend(children(node))
    return found


class _Token(bytes):
    """Bytes that are part of the output, not of the tree."""

    __slots__ = ()


def _field(node: ast.AST, name: str, docstrings: bool) -> Any:
    value = getattr(node, name, None)
    if name in {"body", "orelse", "finalbody"} and isinstance(value, list):
        if (
            name == "body"
            and not docstrings
            and isinstance(node, _WITH_DOCSTRING)
            and ast.get_docstring(node, False) is not None
        ):
            value = value[1:]
        return [statement for statement in value if not isinstance(statement, ast.Pass)]
    if name == "values" and isinstance(node, ast.JoinedStr):
        return _joined(node)
    if name == "format_spec" and isinstance(value, ast.JoinedStr) and not _joined(value):
        return None  # f"{x:}" is f"{x}"
    return value


def _joined(node: ast.JoinedStr) -> list[ast.expr]:
    """An f-string's parts with neighbouring constants merged: versions cut them differently."""
    parts: list[ast.expr] = []
    for part in node.values:
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            if not part.value:
                continue
            last = parts[-1] if parts else None
            if isinstance(last, ast.Constant) and isinstance(last.value, str):
                parts[-1] = ast.Constant(last.value + part.value)
                continue
        parts.append(part)
    return parts


def written(found: Any) -> str:
    """The source as it is written, comments too; '' where none is found."""
    try:
        return f"{inspect.getcomments(found) or ''}{inspect.getsource(found)}"
    except (OSError, TypeError, SyntaxError):
        return ""


def docstring(found: Any) -> Any:
    """A docstring without its margin, which Python itself takes away from 3.13 on."""
    return inspect.cleandoc(found) if isinstance(found, str) else found


def nested_codes(code: CodeType) -> Iterator[CodeType]:
    stack = [code]
    while stack:
        found = stack.pop()
        yield found
        stack.extend(const for const in reversed(found.co_consts) if isinstance(const, CodeType))


def names_loaded(code: CodeType) -> set[str]:
    """The globals that `code`, or code nested in it, really loads; `co_names` holds attributes as well."""
    import dis

    return {
        instruction.argval
        for inner in nested_codes(code)
        for instruction in dis.get_instructions(inner)
        if instruction.opname in _LOADS and isinstance(instruction.argval, str)
    } - set(code.co_freevars)


def attribute_uses(tree: ast.AST) -> dict[str, Paths]:
    """By name the attribute paths it is read by (`m.a.b` gives `("a", "b")`), or None once it is used whole."""
    uses: dict[str, set[tuple[str, ...]] | None] = {}
    consumed: set[int] = set()
    for node in nodes(tree):
        if id(node) in consumed:
            continue
        if isinstance(node, ast.Name):
            uses[node.id] = None
        elif isinstance(node, ast.Attribute):
            path: list[str] = []
            base: ast.expr = node
            while isinstance(base, ast.Attribute):
                path.append(base.attr)
                consumed.add(id(base))
                base = base.value
            if isinstance(base, ast.Name):
                consumed.add(id(base))
                found = uses.setdefault(base.id, set())
                if not isinstance(node.ctx, ast.Load):
                    uses[base.id] = None
                elif found is not None:
                    found.add(tuple(reversed(path)))
        elif isinstance(node, ast.Global | ast.Nonlocal):
            uses.update(dict.fromkeys(node.names))
    return {name: None if paths is None else frozenset(paths) for name, paths in uses.items()}


def imported(tree: ast.AST) -> frozenset[tuple[int, str]]:
    """Modules that `tree` imports, as (level, dotted name); `from a import b` counts as `a` and `a.b`."""
    found: set[tuple[int, str]] = set()
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            found.update((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found.add((node.level, module))
            found.update((node.level, f"{module}.{alias.name}".lstrip(".")) for alias in node.names if alias.name != "*")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name, how = node.args[0].value, node.func
            if isinstance(name, str) and getattr(how, "attr", getattr(how, "id", "")) in {"import_module", "__import__"}:
                found.add((0, name))
    return frozenset(found)


def looks_of(tree: ast.AST) -> Looks:
    """What the code looks at of functions and classes beside what they do, as far as it says so."""
    words: set[str] = set()
    for node in nodes(tree):
        if isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words |= {node.attr, f".{node.attr}"}
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str) and node.value.startswith("__"):
                words |= {node.value, f".{node.value}"}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            words |= {*str(getattr(node, "module", None)).split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.keyword):
            words.add(f"{node.arg}=")
    return _looks(words)


def _looks(words: set[str]) -> Looks:
    return frozenset(look for look, by in _LOOKING.items() if words & by)


_BY_ALL = {"inspect", "pydoc", "tool", "function_tool", "beta_tool", "bind_tools", "tools=", "functions=", ".tools"}
"""Modules that look at all of a function, and the ways in which functions become tools of language models."""
_LOOKING = {
    DOCSTRINGS: {"__doc__", "help", "getdoc", *_BY_ALL},
    ANNOTATIONS: {
        "__annotations__", "__annotate__", "get_type_hints", "get_annotations", "annotationlib", "signature", "getfullargspec",
        "create_model", "TypeAdapter", "is_typeddict", *_BY_ALL,
    },
    NAMES: {".__name__", ".__qualname__", *_BY_ALL},
    MODULES: {".__module__", "inspect"},
    SOURCE: {"getsource", "getsourcelines", "findsource", "getcomments"},
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """All that is known about one code object, the same as long as it lives."""

    names: tuple[str, ...]
    executed: tuple[str, ...]
    """Names without those that only annotations of functions say."""
    renamable: tuple[str, ...]
    """Names that nothing else in the code says: what they stand for may be called otherwise."""
    uses: dict[str, Paths]
    imports: tuple[tuple[int, str], ...]
    looks: Looks
    node: ast.AST | None  # None where no source was found that compiles to this very code
    _body: ast.AST | None
    _bytecode: bytes
    _scope: str
    """Of what private names belong to."""
    _forms: dict[tuple[frozenset[tuple[str, ...]], Looks], tuple[bytes, tuple[tuple[str, ...], ...]]] = field(
        default_factory=dict
    )

    def form(self, links: frozenset[tuple[str, ...]] = frozenset(), looks: Looks = frozenset()) -> tuple[bytes, Order]:
        """A digest of the normal form, with `links` by their order only, and that order."""
        known = self._forms.get((links, looks))
        if known is not None:
            return known
        if self._body is None:
            known = self._bytecode, ()
        else:
            form = _Form(DOCSTRINGS in looks, ANNOTATIONS in looks, links)
            data = text(self._scope) + form.of(self._body)
            known = blake2b(data, digest_size=DIGEST_BYTES, person=PERSON).digest(), tuple(form.order)
        self._forms[links, looks] = known
        return known


_READINGS: dict[int, tuple[CodeType, Reading]] = {}


def read(code: CodeType) -> Reading:
    known = _READINGS.get(id(code))
    if known is not None and known[0] is code:
        return known[1]
    if len(_READINGS) >= 20_000:
        _READINGS.clear()
    reading = _read(code)
    _READINGS[id(code)] = (code, reading)
    return reading


def _read(code: CodeType) -> Reading:
    names = tuple(sorted(names_loaded(code)))
    node = _verified_node(code)
    if node is None:
        consts = {f".{c}" for inner in nested_codes(code) for c in inner.co_consts if isinstance(c, str) and c[:2] == "__"}
        co_names = {name for inner in nested_codes(code) for name in inner.co_names}
        looks = _looks(co_names | consts | {c[1:] for c in consts} | {f".{name}" for name in co_names - set(names)})
        return Reading(names, names, (), {}, tuple(sorted(_imports_of(code))), looks, None, None, b"K" + constant(code), "")
    body = _as_written(node)
    # a private name means something else in every class: `self.__x` is `_Class__x`
    scope = code.co_qualname.split(".")[-2] if _mangles(body) and "." in code.co_qualname else ""
    annotated, said = _annotation_names(body), _names_said(body)
    executed = tuple(name for name in names if name not in annotated)
    return Reading(
        names,
        executed,
        tuple(name for name in executed if name not in said) if not _DYNAMIC & set(names) else (),
        attribute_uses(body),
        tuple(sorted(imported(body))),
        looks_of(body),
        node,
        body,
        b"",
        scope,
    )


_DYNAMIC = {"eval", "exec", "globals", "locals", "vars", "compile"}


def _annotation_names(tree: ast.AST) -> set[str]:
    """Names that only annotations of functions and of their variables say."""
    classes = _class_statements(tree)
    inside: set[str] = set()
    outside: set[str] = set()
    stack: list[tuple[ast.AST, bool]] = [(tree, False)]
    while stack:
        node, is_annotation = stack.pop()
        if isinstance(node, ast.Name):
            (inside if is_annotation else outside).add(node.id)
        bare = node not in classes
        for name, value in ast.iter_fields(node):
            found = is_annotation or (bare and name in {"annotation", "returns"})
            stack.extend(
                (child, found) for child in (value if isinstance(value, list) else [value]) if isinstance(child, ast.AST)
            )
    return inside - outside


def _names_said(tree: ast.AST) -> set[str]:
    """Names that code binds itself, or says in a text: renaming one of them may change what it does."""
    found: set[str] = set()
    for node in nodes(tree):
        for name in ("arg", "name", "asname", "rest"):
            value = getattr(node, name, None)
            if isinstance(value, str) and not isinstance(node, ast.keyword):
                found |= {value, value.partition(".")[0]}
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            found.update(node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update(re.findall(r"[^\W\d]\w*", node.value))
    return found


def _mangles(tree: ast.AST) -> bool:
    return any(
        value.startswith("__") and not value.endswith("__")
        for node in nodes(tree)
        for field in ("id", "attr", "arg", "name")
        if isinstance(value := getattr(node, field, None), str)
    )


def _imports_of(code: CodeType) -> set[tuple[int, str]]:
    """Modules imported by code without source, with what is taken from them."""
    import dis

    found: set[tuple[int, str]] = set()
    for inner in nested_codes(code):
        level, module, constants = 0, "", []
        for instruction in dis.get_instructions(inner):
            if instruction.opname in {"LOAD_CONST", "LOAD_SMALL_INT", "RETURN_CONST"}:
                constants.append(instruction.argval)
            elif instruction.opname == "IMPORT_NAME":
                module = instruction.argval
                level = next((value for value in reversed(constants) if isinstance(value, int)), 0)
                found.add((level, module))
            elif instruction.opname == "IMPORT_FROM":
                found.add((level, f"{module}.{instruction.argval}".lstrip(".")))
    return found


def _as_written(node: ast.AST) -> ast.AST:
    """A definition without its name, decorators and defaults: all three are taken from the live function."""
    arguments: ast.arguments = node.args  # type: ignore[attr-defined]  # one of _DEFINITIONS
    bare = ast.arguments(
        posonlyargs=arguments.posonlyargs,
        args=arguments.args,
        vararg=arguments.vararg,
        kwonlyargs=arguments.kwonlyargs,
        kw_defaults=[],
        kwarg=arguments.kwarg,
        defaults=[],
    )
    if isinstance(node, ast.Lambda):
        return ast.Lambda(args=bare, body=node.body)
    fields = {name: getattr(node, name) for name in node._fields}
    return type(node)(**{**fields, "name": "", "args": bare, "decorator_list": []})


# ---- finding the source ----


def _verified_node(code: CodeType) -> ast.AST | None:
    """The definition whose compilation is `code`. A file edited since it was loaded compiles to something else."""
    filename = code.co_filename
    before: list[str] = []
    for refresh in (False, True):
        if refresh:
            linecache.checkcache(filename)
        lines = linecache.getlines(filename)
        if not lines or lines == before:
            continue
        before = lines
        found = _find(code, _indexed(filename, lines, code.co_flags & _FUTURE))
        if found is not None:
            return found
    return None


_INDEXED: dict[tuple[str, int], tuple[list[str], _Index]] = {}
"""Of files read last: their lines, as linecache keeps them, and what is in them."""


def _indexed(filename: str, lines: list[str], future: int) -> _Index:
    known = _INDEXED.get((filename, future))
    if known is None or known[0] is not lines:
        if len(_INDEXED) >= 64:
            _INDEXED.clear()
        known = _INDEXED[filename, future] = (lines, _index("".join(lines), future))
    return known[1]


def _find(code: CodeType, index: _Index) -> ast.AST | None:
    candidates = index.get(code.co_qualname, ())
    same = [(other, node) for other, node in candidates if other == code]
    if not same:  # the same code elsewhere in the file: lines above it were edited
        wanted = constant(code)
        same = [(other, node) for other, node in candidates if constant(other) == wanted]
    if len(same) > 1:
        where = list(code.co_positions())
        same = [pair for pair in same if list(pair[0].co_positions()) == where] or same
    if len(same) == 1:
        return same[0][1]
    forms = {normalise(_as_written(node), docstrings=True) for _, node in same}
    return same[0][1] if len(forms) == 1 else None


@functools.lru_cache(maxsize=64)
def _index(source: str, future: int) -> _Index:
    """Every function in `source` by its qualified name, as what it compiles to and how it is written."""
    try:
        tree = ast.parse(source)
        flags = future | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        whole = compile(source, "<source>", "exec", flags=flags, dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    places: dict[tuple[str, int], list[ast.AST]] = {}
    for node in nodes(tree):
        if isinstance(node, _DEFINITIONS):
            first_line = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
            places.setdefault((getattr(node, "name", "<lambda>"), first_line), []).append(node)
    found: dict[str, list[tuple[CodeType, ast.AST]]] = {}
    for code in nested_codes(whole):
        begun = places.get((code.co_name, code.co_firstlineno), [])
        definition = begun[0] if len(begun) == 1 else _containing(code, begun)
        if definition is not None:
            found.setdefault(code.co_qualname, []).append((code, definition))
    return {name: tuple(pairs) for name, pairs in found.items()}


def _containing(code: CodeType, definitions: list[Any]) -> ast.AST | None:
    """The innermost of several lambdas on a line whose body holds all that `code` executes."""
    spans = [
        ((line, start), (end_line, end))
        for line, end_line, start, end in code.co_positions()
        if line is not None and end_line is not None and start is not None and end is not None
        if (line, start) < (end_line, end)
    ]
    if not spans or not definitions:
        return None
    first, last = min(span[0] for span in spans), max(span[1] for span in spans)

    def extent(node: Any) -> tuple[tuple[int, int], tuple[int, int]]:
        body = node.body
        return (body.lineno, body.col_offset), (body.end_lineno, body.end_col_offset)

    lambdas = [node for node in definitions if isinstance(node, ast.Lambda)]
    holding = [node for node in lambdas if extent(node)[0] <= first and last <= extent(node)[1]]
    if not holding:
        return None
    return max(holding, key=lambda node: (extent(node)[0], tuple(-part for part in extent(node)[1])))
