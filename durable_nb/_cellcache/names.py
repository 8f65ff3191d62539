"""Which names a cell's code may read before it has bound them itself: its inputs. And which it binds.

A definite-assignment pass over the statements, as a compiler does it: a name that some path may read unbound is an input.
What a function of the cell reads counts where the function is first mentioned after its definition, since only then can it
be called; so helpers may be defined in any order. Where this can't be told, a name counts as read.
"""

from __future__ import annotations

import ast
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from durable_nb._fingerprint import children, nested_codes, nodes, walk

_Bound = frozenset[str] | None
"""Names bound for certain at a place in the code; None where the place is never reached."""

_NEVER_SUPPRESS = frozenset(
    "open closing chdir redirect_stdout redirect_stderr nullcontext catch_warnings TemporaryDirectory NamedTemporaryFile "
    "TemporaryFile Lock RLock localcontext no_grad inference_mode errstate option_context scandir ZipFile TarFile urlopen "
    "Client AsyncClient ThreadPoolExecutor ProcessPoolExecutor Pool TaskGroup timeout Session connect".split()
)
"""Context managers known to let exceptions pass; after any other, what its block binds may be unbound."""


@dataclass(frozen=True, slots=True)
class Names:
    """What a cell does to the notebook's names."""

    read: frozenset[str]
    """May be read before the cell binds them; builtins included."""
    bound: frozenset[str]
    """May be bound or deleted by the cell."""
    certain: frozenset[str]
    """Are bound by the cell, whatever path it takes to its end."""


def names_of(tree: ast.Module) -> Names:
    """The names that the cell `tree` reads and binds in the notebook."""
    walk = _Walk()
    end = walk.block(tree.body, frozenset())
    walk.mention(set(walk.deferred), end)
    declared = {name for node in nodes(tree) if isinstance(node, ast.Global) for name in node.names}
    for call in _shell_calls(tree):
        # Every word of a magic's or a command's line may be a variable: `%timeit f(x)`, `!grep {word} $path`.
        words = {word for arg in call.args for word in re.findall(r"[^\W\d]\w*", str(arg.value))}  # type: ignore[attr-defined]
        walk.mention(words, frozenset())
    texts = [node.value for node in nodes(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    walk.mention(
        {name for text in texts for name in re.findall(r"@([^\W\d]\w*)", text)}, frozenset()
    )  # pandas' query("a > @b")
    return Names(frozenset(walk.read - {"get_ipython"}), frozenset(walk.stored | declared), end or frozenset())


@lru_cache(maxsize=256)
def dynamic_reads(tree: ast.Module) -> frozenset[str]:
    """Ways by which a cell can read names that nobody sees in its code, as far as the code mentions them."""
    plain = {id(call.func.value.func) for call in _shell_calls(tree)}  # type: ignore[attr-defined]
    used = {node.id for node in nodes(tree) if isinstance(node, ast.Name) and id(node) not in plain}
    found = set(used & _LOOKING_UP)
    is_main = {id(node) for test in nodes(tree) if isinstance(test, ast.Compare) for node in test.comparators}
    for node in nodes(tree):
        match node:
            case ast.Attribute(attr=name) if name in NAMESPACES:
                found.add(name)
            case ast.Import(names=names) if any(alias.name == "__main__" for alias in names):
                found.add("__main__")
            case ast.ImportFrom(module="__main__"):
                found.add("__main__")
            case ast.Constant(value="__main__") if id(node) not in is_main:  # if __name__ == "__main__":
                found.add("__main__")
    magics = {call.args[0].value for call in _shell_calls(tree) if call.args}  # type: ignore[attr-defined]
    return frozenset(found | {f"%{magic}" for magic in magics & {"who", "whos", "who_ls", "psearch", "store", "save"}})


_LOOKING_UP = {"eval", "exec", "globals", "locals", "vars", "get_ipython"}
NAMESPACES = frozenset({"__globals__", "f_globals", "f_locals", "user_ns", "user_global_ns"})
"""Attributes that are a whole namespace."""

EVALUATING = frozenset({"eval", "exec"})
"""What they look up is seen when they do."""


def looks_up(code: types.CodeType) -> frozenset[str]:
    """Ways by which a function may read names that its code doesn't show."""
    found: set[str] = set()
    for inner in nested_codes(code):
        names = set(inner.co_names)
        found |= names & (EVALUATING | NAMESPACES | {"globals", "__main__"})
        found |= {"__main__"} if "__main__" in inner.co_consts and "__name__" not in names else set()
        found |= {"get_ipython"} if "get_ipython" in names and not names & set(SHELL_METHODS) else set()
    return frozenset(found)


SHELL_METHODS = ("system", "getoutput", "run_line_magic", "run_cell_magic")


def _shell_calls(tree: ast.AST) -> list[ast.Call]:
    """`!command` and `%magic`, as IPython's transform writes them: get_ipython().system("...") with text arguments."""
    return [
        node
        for node in nodes(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in SHELL_METHODS
        and isinstance(node.func.value, ast.Call)
        and isinstance(node.func.value.func, ast.Name)
        and node.func.value.func.id == "get_ipython"
        and all(isinstance(argument, ast.Constant) for argument in node.args)
    ]


class _Walk:
    def __init__(self) -> None:
        self.read: set[str] = set()
        self.stored: set[str] = set()
        self.deferred: dict[str, set[str]] = {}
        """By name of a function or class of this cell: the global names that its bodies read when called."""
        self._reached: set[str] = set()
        """Names that some function which has been mentioned reads: what is defined under one of them can be called."""
        self._loops: list[list[_Bound]] = []

    def mention(self, names: set[str], bound: _Bound) -> None:
        """These names are read here; functions among them may be called, and then read what they read."""
        waiting, seen = list(names), set(names)
        while waiting:
            name = waiting.pop()
            if bound is not None and name not in bound:
                self.read.add(name)
            inner = self.deferred.get(name, set())
            self._reached |= inner
            waiting += inner - seen
            seen |= inner

    def _define(self, name: str, inner: set[str], bound: _Bound) -> None:
        """A function or class of that name, whose bodies read `inner` when called: from its first mention on."""
        self.deferred[name] = self.deferred.get(name, set()) | inner
        if name in self._reached:
            self.mention(inner, _and(bound, {name}))

    # -- statements ----------------------------------------------------------------------------------------------------

    def block(self, statements: Iterable[ast.stmt], bound: _Bound) -> _Bound:
        for statement in statements:
            bound = self.statement(statement, bound)
        return bound

    def statement(self, node: ast.stmt, bound: _Bound) -> _Bound:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                for part in (*node.decorator_list, *_defaults(node.args)):
                    bound = self.expression(part, bound)
                self._type_parameters(node, bound)
                for part in _annotations(node):
                    self.expression(part, _and(bound, _own_types(node)))
                inner = _reads(node)
                if node.decorator_list:
                    self.mention(inner, _and(bound, {node.name}))
                else:
                    self._define(node.name, inner, bound)
                return self._bind({node.name}, bound)
            case ast.ClassDef():
                return self._class(node, bound)
            case ast.If():
                bound = self.expression(node.test, bound)
                return _meet(self.block(node.body, bound), self.block(node.orelse, bound))
            case ast.While():
                bound = self.expression(node.test, bound)
                after_body, exits = self._loop(node.body, bound)
                self.expression(node.test, after_body)
                forever = isinstance(node.test, ast.Constant) and bool(node.test.value)
                after = self.block(node.orelse, None if forever else _meet(bound, after_body))
                return _meet(after, *exits)
            case ast.For() | ast.AsyncFor():
                bound = self.expression(node.iter, bound)
                after_body, exits = self._loop(node.body, self._target(node.target, bound))
                return _meet(self.block(node.orelse, _meet(bound, after_body)), *exits)
            case ast.Try() | ast.TryStar():
                return self._try(node, bound)
            case ast.With() | ast.AsyncWith():
                for item in node.items:
                    bound = self.expression(item.context_expr, bound)
                    if item.optional_vars is not None:
                        bound = self._target(item.optional_vars, bound)
                after = self.block(node.body, bound)
                safe = all(_callee(item.context_expr) in _NEVER_SUPPRESS for item in node.items)
                return after if safe else _meet(bound, after) if after is not None else bound
            case ast.Match():
                return self._match(node, bound)
            case ast.Return() | ast.Raise():
                for child in children(node):
                    bound = self.expression(child, bound)
                return None
            case ast.Break() | ast.Continue():
                if self._loops:
                    self._loops[-1].append(bound if isinstance(node, ast.Break) else None)
                return None
            case ast.Assert():
                bound = self.expression(node.test, bound)
                if node.msg is not None:
                    self.expression(node.msg, bound)
                return bound
            case ast.Assign():
                bound = self.expression(node.value, bound)
                if isinstance(node.value, ast.Lambda) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                    self._define(node.targets[0].id, _reads(node.value), bound)
                for target in node.targets:
                    bound = self._target(target, bound)
                return bound
            case ast.AugAssign():
                if isinstance(node.target, ast.Name):
                    self.mention({node.target.id}, bound)
                bound = self.expression(node.value, bound)
                return self._target(node.target, bound)
            case ast.AnnAssign():
                bound = self.expression(node.annotation, bound)
                if node.value is None:
                    return bound
                return self._target(node.target, self.expression(node.value, bound))
            case ast.Delete():
                for target in node.targets:
                    bound = self._delete(target, bound)
                return bound
            case ast.Import() | ast.ImportFrom():
                return self._bind({a.asname or a.name.split(".")[0] for a in node.names if a.name != "*"}, bound)
            case ast.Global() | ast.Nonlocal() | ast.Pass():
                return bound
        if type(node).__name__ == "TypeAlias":  # Python 3.12: type X = ...; its value is evaluated when it is asked for
            self.mention(_reads(node), bound)
            return self._bind({node.name.id}, bound)  # type: ignore[attr-defined]
        for child in children(node):
            bound = self.expression(child, bound)
        return bound

    def _loop(self, body: list[ast.stmt], bound: _Bound) -> tuple[_Bound, list[_Bound]]:
        self._loops.append([])
        after = self.block(body, bound)
        exits = self._loops.pop()
        # A `continue` reaches the loop's head with no more than what was bound there.
        after = bound if None in exits else after
        if after is not None:  # the second time round, what was defined below may be called above
            self._loops.append([])
            self.block(body, after)
            self._loops.pop()
        return after, [e for e in exits if e is not None]

    def _try(self, node: ast.Try | ast.TryStar, bound: _Bound) -> _Bound:
        after_body = self.block(node.body, bound)
        ends = [self.block(node.orelse, after_body)]
        for handler in node.handlers:
            inside = self.expression(handler.type, bound) if handler.type else bound
            if handler.name:
                inside = self._bind({handler.name}, inside)
            end = self.block(handler.body, inside)
            ends.append(end - {handler.name} if end is not None and handler.name else end)
        after = _meet(*ends)
        finally_from_anywhere = self.block(node.finalbody, bound)
        if finally_from_anywhere is None or after is None:
            return None
        return after | finally_from_anywhere

    def _match(self, node: ast.Match, bound: _Bound) -> _Bound:
        bound = self.expression(node.subject, bound)
        ends: list[_Bound] = []
        exhaustive = False
        for case in node.cases:
            names = {n for p in walk(case.pattern) if (n := getattr(p, "name", None) or getattr(p, "rest", None))}
            for part in walk(case.pattern):
                if isinstance(part, ast.MatchValue):
                    self.expression(part.value, bound)
                elif isinstance(part, ast.MatchClass):
                    self.expression(part.cls, bound)
                elif isinstance(part, ast.MatchMapping):
                    for key in part.keys:
                        self.expression(key, bound)
            inside = self._bind(names, bound)
            if case.guard is not None:
                inside = self.expression(case.guard, inside)
            elif isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None:
                exhaustive = True
            ends.append(self.block(case.body, inside))
        return _meet(*ends) if exhaustive else _meet(bound, *ends)

    def _class(self, node: ast.ClassDef, bound: _Bound) -> _Bound:
        """Its own statements run now, in a scope of their own; its methods when they are called."""
        for part in node.decorator_list:
            bound = self.expression(part, bound)
        self._type_parameters(node, bound)
        for part in (*node.bases, *(k.value for k in node.keywords)):
            self.expression(part, _and(bound, _own_types(node)))
        body = _Walk()
        body.block(node.body, _and(bound, _own_types(node)))
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        called = {name for child in node.body if not isinstance(child, functions) for name in _reads(child)}
        self.mention(body.read | (called & self.deferred.keys()), bound)
        later = {name for child in walk(node) if isinstance(child, (*functions, ast.Lambda)) for name in _reads(child)}
        if node.decorator_list or node.bases or node.keywords:  # a decorator, __init_subclass__ or a metaclass may call them
            self.mention(later, _and(bound, {node.name}))
        else:
            self._define(node.name, later, bound)
        return self._bind({node.name}, bound)

    def _type_parameters(self, node: ast.AST, bound: _Bound) -> None:
        """Their bounds and defaults are evaluated when they are asked for, which may be at once."""
        for parameter in getattr(node, "type_params", ()):
            self.mention(_reads(parameter) - _own_types(node), bound)

    # -- names ---------------------------------------------------------------------------------------------------------

    def _bind(self, names: set[str], bound: _Bound) -> _Bound:
        self.stored |= names
        return _and(bound, names)

    def _target(self, node: ast.expr, bound: _Bound) -> _Bound:
        match node:
            case ast.Name():
                return self._bind({node.id}, bound)
            case ast.Tuple() | ast.List():
                for element in node.elts:
                    bound = self._target(element, bound)
                return bound
            case ast.Starred():
                return self._target(node.value, bound)
        return self.expression(node, bound)  # x.y = ..., x[i] = ...: reads x and i

    def _delete(self, node: ast.expr, bound: _Bound) -> _Bound:
        if isinstance(node, ast.Tuple | ast.List):
            for element in node.elts:
                bound = self._delete(element, bound)
            return bound
        if not isinstance(node, ast.Name):
            return self.expression(node, bound)
        self.mention({node.id}, bound)
        self.stored.add(node.id)
        return None if bound is None else bound - {node.id}

    def expression(self, node: ast.AST, bound: _Bound) -> _Bound:
        """Read what `node` reads; only walrus targets that are certainly reached count as bound after it."""
        self.mention(_reads(node), bound)
        walrus = {n.target.id for n in walk(node) if isinstance(n, ast.NamedExpr)}
        self.stored |= walrus
        if isinstance(node, ast.NamedExpr):
            return _and(bound, {node.target.id})
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.NamedExpr):
            return _and(bound, {node.left.target.id})
        return bound


def _reads(node: ast.AST) -> set[str]:
    """Global names that `node` may read, in the functions, lambdas and comprehensions inside it too."""
    found: set[str] = set()
    _Reads(frozenset(), found).visit(node)
    return found


class _Reads(ast.NodeVisitor):
    """Collects names that are read and are local to no scope between here and the module."""

    def __init__(self, local: frozenset[str], found: set[str]) -> None:
        self._local, self._found = local, found

    def generic_visit(self, node: ast.AST) -> None:
        for child in children(node):
            self.visit(child)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id not in self._local and not isinstance(node.ctx, ast.Store):
            self._found.add(node.id)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name) and node.target.id not in self._local:
            self._found.add(node.target.id)  # `global x; x += 1` reads what it stores
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for part in (*node.decorator_list, *_defaults(node.args)):
            self.visit(part)
        inner = _Reads(self._local | _own_types(node), self._found)
        for part in (*getattr(node, "type_params", ()), *_annotations(node)):
            inner.visit(part)
        inner._scope(node.body, _arguments(node.args))

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for part in _defaults(node.args):
            self.visit(part)
        self._scope([node.body], _arguments(node.args))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in node.decorator_list:
            self.visit(part)
        inner = _Reads(self._local | _own_types(node), self._found)
        for part in (*getattr(node, "type_params", ()), *node.bases, *(k.value for k in node.keywords)):
            inner.visit(part)
        for child in node.body:  # a class's own names are no locals of its methods
            inner.visit(child)

    def visit_TypeAlias(self, node: Any) -> None:
        _Reads(self._local | _own_types(node), self._found).generic_visit(node)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        names = [n for g in node.generators for n in walk(g.target) if isinstance(n, ast.Name)]
        targets = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        self.visit(node.generators[0].iter)
        inner = _Reads(self._local | targets, self._found)
        for i, generator in enumerate(node.generators):
            for part in (generator.target, *([generator.iter] if i else []), *generator.ifs):
                inner.visit(part)
        for part in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
            inner.visit(part)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension

    def _scope(self, body: Iterable[ast.AST], arguments: set[str]) -> None:
        body = list(body)
        own, declared = _bound_in_scope(body)
        local = (self._local | arguments | own) - declared
        inner = _Reads(frozenset(local), self._found)
        for child in body:
            inner.visit(child)


def _bound_in_scope(body: list[ast.AST]) -> tuple[set[str], set[str]]:
    """(names bound in a function's own scope, names it declares global)."""
    bound: set[str] = set()
    declared: set[str] = set()
    waiting = list(body)
    while waiting:
        node = waiting.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                bound.add(node.name)
                continue
            case ast.Lambda():
                continue
            case ast.Name(ctx=ast.Store() | ast.Del()):
                bound.add(node.id)
            case ast.Global():
                declared.update(node.names)
            case ast.Import() | ast.ImportFrom():
                bound.update(a.asname or a.name.split(".")[0] for a in node.names)
            case ast.ExceptHandler(name=str()):
                bound.add(node.name)  # type: ignore[arg-type]
            case ast.MatchAs(name=str()) | ast.MatchStar(name=str()):
                bound.add(node.name)  # type: ignore[arg-type]
            case ast.MatchMapping(rest=str()):
                bound.add(node.rest)  # type: ignore[arg-type]
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                # Its targets are its own, but a walrus inside binds out here.
                bound.update(n.target.id for n in walk(node) if isinstance(n, ast.NamedExpr))
                continue
        waiting += children(node)
    return bound, declared


def _arguments(arguments: ast.arguments) -> set[str]:
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return {argument.arg for argument in every if argument is not None}


def _defaults(arguments: ast.arguments) -> list[ast.expr]:
    return [default for default in (*arguments.defaults, *arguments.kw_defaults) if default is not None]


def _annotations(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.expr]:
    a = node.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
    return [n for n in (*(x.annotation for x in every if x is not None), node.returns) if n is not None]


def _own_types(node: ast.AST) -> set[str]:
    """`T` and `K` of `def f[T, K]`, which mean nothing outside."""
    return {parameter.name for parameter in getattr(node, "type_params", ())}


def _callee(node: ast.expr) -> str:
    """`open` of `open(...)`, `chdir` of `contextlib.chdir(...)`."""
    called = node.func if isinstance(node, ast.Call) else node
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""


def _and(bound: _Bound, names: set[str]) -> _Bound:
    return None if bound is None else bound | names


def _meet(*ends: _Bound) -> _Bound:
    """What is bound for certain where these ways come together."""
    reached = [end for end in ends if end is not None]
    return frozenset.intersection(*reached) if reached else None
