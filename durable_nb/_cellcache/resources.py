"""Live resources that a cell binds: clients, locks, executors, connections, progress bars. A hit makes them again.

Nothing of a resource is stored but how it came to be: the name's own statement, evaluated anew. That is right only where
the statement gives the same thing again and the cell has put no state into it; both are looked at when the cell is stored.
"""

from __future__ import annotations

import ast
import asyncio
import collections
import contextlib
import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from durable_nb import _sqlite
from durable_nb._cellcache.silence import silenced
from durable_nb._fingerprint import is_installed, nodes, walk

_MADE = "<made>"
_SECRET = ("authorization", "api-key", "x-api-key", "cookie", "proxy-authorization")


# -- kinds -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of a type whose instances are made again."""

    configuration: Callable[[Any], Any] = lambda _: None
    """How it is configured, and how it stands. What is made again must tell the same, or the cell runs."""
    put_in: Callable[[Any], str] = lambda _: ""
    """The state that code has put into it and that nobody can make again, in words."""
    end: Callable[[Any], Any] = lambda _: None
    """What is done to a new one besides, as something picklable: closed, at its end."""
    brought_to: Callable[[Any, Any], None] = lambda _new, _end: None
    """Does it."""
    cheap: bool = False
    """Making one costs and touches nothing: it is tried when the cell is stored."""
    tried_if_used: bool = False
    """It costs some, and touches nothing: it is tried where the cell does more with it than make it."""
    factories: frozenset[str] = frozenset()
    """Functions and methods that make one, by name, besides the type itself."""
    stands: Callable[[Any], Any] = lambda _: None
    """What its configuration doesn't say, since steps side by side change it. A cell that changes it is not stored."""


def _locked(value: Any) -> str:
    return "" if "unlocked" in repr(value) else "a held lock"


def _attributes(*names: str) -> Callable[[Any], Any]:
    """What these attributes say, waiting lines by their length: one that is missing says nothing."""

    def configuration(value: Any) -> Any:
        found = (getattr(value, name, None) for name in names)
        return [len(f) if isinstance(f, (collections.deque, list, set, dict)) else f for f in found]

    return configuration


def _set(new: Any, was_set: Any) -> None:
    if was_set:
        new.set()


def _closed(value: Any) -> bool:
    found = getattr(value, "is_closed", None)
    return bool(found() if callable(found) else found)


def _close(new: Any, closed: Any) -> None:
    if not closed:
        return
    ending = new.close() if hasattr(new, "close") else new.aclose()
    if asyncio.iscoroutine(ending):  # a client that was never used has nothing to wait for
        try:
            ending.send(None)
        except StopIteration:
            return
        ending.close()
        raise RuntimeError("closing it needs an await")


def _headers(headers: Any) -> list[tuple[str, str]]:
    return sorted((k.lower(), v) for k, v in dict(headers or {}).items() if isinstance(v, str) and k.lower() not in _SECRET)


def _http_client(client: Any) -> Any:
    hooks = {name: len(found) for name, found in client.event_hooks.items()}
    url, params, timeout = str(client.base_url), str(client.params), repr(client.timeout)
    limits = client.follow_redirects, client.max_redirects, client.trust_env, type(client._transport).__name__
    return url, params, timeout, _headers(client.headers), len(client.cookies), hooks, limits, client.auth is None


def _sdk_client(client: Any) -> Any:
    own = {name: str(vars(client).get(name)) for name in ("organization", "project", "_api_version", "max_retries", "timeout")}
    return str(client.base_url), own, _headers(client._custom_headers), sorted(map(str, dict(client._custom_query).items()))


def _is_idle(executor: Any) -> str:
    """'' once it is. Whoever has just given its result may need a moment to sit down again."""
    deadline = time.monotonic() + 0.05
    while _is_busy(executor):
        if time.monotonic() > deadline:
            return "unfinished work"
        time.sleep(0.001)
    return ""


def _is_busy(executor: Any) -> bool:
    if executor._shutdown:
        return any(thread.is_alive() for thread in executor._threads)
    return bool(executor._work_queue.qsize()) or executor._idle_semaphore._value < len(executor._threads)


def _shut_down(new: Any, was: Any) -> None:
    if was:
        new.shutdown()


def _sqlite_held(con: Any) -> str:
    try:
        _sqlite.standing(con)
    except _sqlite.UntoldError as error:
        return str(error)
    return ""


def _sqlite_stands(con: Any) -> Any:
    closed = _sqlite.is_closed(con)
    return _sqlite.looks(con), closed or (con.in_transaction, _sqlite.databases(con))


def _engine_held(engine: Any) -> str:
    engine = getattr(engine, "sync_engine", engine)
    if engine.url.get_backend_name() != "sqlite" or engine.url.database not in (None, "", ":memory:"):
        return ""
    with contextlib.closing(engine.raw_connection()) as borrowed:
        known = _sqlite.databases(borrowed.driver_connection)
        return "tables in memory" if any(_sqlite.content(borrowed.driver_connection, name) for name, _ in known) else ""


def _engine_configuration(engine: Any) -> Any:
    sync = getattr(engine, "sync_engine", engine)
    return engine.url.render_as_string(hide_password=True), type(sync.pool).__name__, bool(sync.echo)


def _session_held(session: Any) -> str:
    if session.new or session.dirty or session.deleted:
        return "objects not yet written"
    return "an open transaction" if session.in_transaction() else ""


def _bar_end(bar: Any) -> Any:
    elapsed = (getattr(bar, "last_print_t", 0.0) or 0.0) - (getattr(bar, "start_t", 0.0) or 0.0)
    texts = {name: getattr(bar, name, None) for name in ("desc", "postfix", "unit", "total")}
    return bool(bar.disable), bar.n, elapsed, {name: text for name, text in texts.items() if text is not None}


def _bar_at(new: Any, end: Any) -> None:
    """A bar shows how far it came, and not that it was made again: nothing of it is drawn now."""
    closed, n, elapsed, texts = end
    now = time.time()
    vars(new).update(texts, n=n, last_print_n=n, start_t=now - elapsed, last_print_t=now)
    if closed:
        new.close()


_clients = Kind(_http_client, end=_closed, brought_to=_close, tried_if_used=True)
_sdks = Kind(_sdk_client, end=_closed, brought_to=_close, tried_if_used=True)
_locks = Kind(put_in=_locked, cheap=True, factories=frozenset({"allocate_lock", "lock", "RLock", "Lock"}), stands=_locked)
_queues = Kind(
    _attributes("maxsize", "_queue", "queue", "_unfinished_tasks", "unfinished_tasks", "_getters", "_putters"), cheap=True
)
_events = Kind(end=lambda event: event.is_set(), brought_to=_set, cheap=True)
_semaphores = Kind(_attributes("_value", "_bound_value", "_initial_value"), cheap=True, stands=_attributes("_value"))
_barriers = Kind(_attributes("parties", "n_waiting", "broken"), cheap=True)
_engines = Kind(_engine_configuration, _engine_held, factories=frozenset({"create_engine", "create_async_engine"}))
_no_factory: frozenset[str] = frozenset()

KINDS: dict[str, Kind] = {  # by the qualified name of the type or of one it inherits from
    "httpx._client.BaseClient": _clients,
    "httpx.Client": _clients,
    "httpx.AsyncClient": _clients,
    "httpx2._client.BaseClient": _clients,
    "httpx2.Client": _clients,
    "httpx2.AsyncClient": _clients,
    "openai._base_client.BaseClient": _sdks,
    "anthropic._base_client.BaseClient": _sdks,
    "asyncio.locks.Lock": _locks,
    "asyncio.locks.Condition": _locks,
    "asyncio.locks.Event": _events,
    "asyncio.locks.Semaphore": _semaphores,
    "asyncio.locks.Barrier": _barriers,
    "asyncio.queues.Queue": _queues,
    "_thread.lock": _locks,
    "_thread.RLock": _locks,
    "threading.Condition": Kind(put_in=lambda c: _locked(c._lock), cheap=True),
    "threading.Event": _events,
    "threading.Semaphore": _semaphores,
    "threading.Barrier": _barriers,
    "_thread._local": Kind(put_in=lambda local: "values" if vars(local) else "", cheap=True),
    "queue.Queue": _queues,
    "_queue.SimpleQueue": Kind(lambda q: q.qsize(), cheap=True),
    "concurrent.futures.thread.ThreadPoolExecutor": Kind(
        _attributes("_max_workers"), _is_idle, lambda e: bool(e._shutdown), _shut_down
    ),
    "concurrent.futures.process.ProcessPoolExecutor": Kind(
        _attributes("_max_workers"),
        lambda e: "unfinished work" if e._pending_work_items else "",
        lambda e: bool(e._shutdown_thread),
        _shut_down,
    ),
    "sqlite3.Connection": Kind(
        put_in=_sqlite_held,
        end=_sqlite.standing,
        brought_to=lambda new, standing: _sqlite.bring(new, standing, counts=False),  # its cursors count as well
        factories=frozenset({"connect"}),
        stands=_sqlite_stands,
    ),
    "sqlalchemy.engine.base.Engine": _engines,
    "sqlalchemy.ext.asyncio.engine.AsyncEngine": _engines,
    "sqlalchemy.engine.base.Connection": Kind(
        put_in=lambda c: "an open transaction" if not c.closed and c.in_transaction() else "",
        end=lambda c: c.closed,
        brought_to=lambda new, closed: new.close() if closed else None,
        factories=frozenset({"connect"}),
    ),
    "sqlalchemy.orm.session.sessionmaker": Kind(),
    "sqlalchemy.orm.session.Session": Kind(put_in=_session_held),
    "tqdm.std.tqdm": Kind(
        end=_bar_end,
        brought_to=_bar_at,
        factories=frozenset({"trange", "tqdm_notebook", "tnrange"}),
        stands=_attributes("n", "disable"),
    ),
}  # fmt: skip

_ANY_FACTORY = Kind()
"""What the user names is made again by whatever call made it."""


def remake(kind: type) -> type:
    """Make instances of `kind` again when a cell that binds one is restored, by the statement that bound it.

    That the cell puts no state into it is yours to know. Also usable as a decorator.
    """
    if not isinstance(kind, type):
        raise TypeError(f"durable.remake() takes a type, such as remake(SomeClient), not {kind!r}")
    KINDS[_name_of(kind)] = _ANY_FACTORY
    return kind


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def kind_of(value: Any) -> Kind | None:
    """None where it is no resource."""
    for base in type(value).__mro__:
        found = KINDS.get(_name_of(base))
        if found is not None:
            # A subclass of the user's may hold anything, unless the user says so of itself.
            return found if found is _ANY_FACTORY or is_installed(type(value).__module__) else None
    return None


def standing_of(names: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By name, the resources among these values, each with how it stands."""
    return {name: (value, _stands(kind, value)) for name, value in names.items() if (kind := kind_of(value)) is not None}


def moved_on(before: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Those that stand otherwise than `standing_of` said, by name."""
    return [name for name, (value, stood) in before.items() if (kind := kind_of(value)) and _stands(kind, value) != stood]


def _stands(kind: Kind, value: Any) -> Any:
    with contextlib.suppress(Exception):  # a connection of another thread
        return kind.stands(value)
    return None


# -- how a name came to be ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Construction:
    """The call by which a name is bound once, at top level."""

    call: ast.Call
    reads: frozenset[str]
    at: int
    """Which statement of the cell it is in."""


@functools.lru_cache(maxsize=256)
def constructions(tree: ast.Module) -> dict[str, Construction]:
    """By name. A name that is bound by anything else too has none."""
    bound = _bindings(tree)
    found: dict[str, Construction] = {}
    for at, statement in enumerate(tree.body):
        for target, value in _bound_by(statement):
            call = value
            match value:
                case ast.Call(func=ast.Name(id="closing") | ast.Attribute(attr="closing"), args=[inner], keywords=[]):
                    call = inner  # `x` of `closing(x)`, which gives just that to its block
            if isinstance(target, ast.Name) and isinstance(call, ast.Call) and len(bound[target.id]) == 1 and _is_plain(call):
                reads = frozenset(node.id for node in walk(call) if isinstance(node, ast.Name))
                if all(len(bound[name]) <= 1 and all(place < at for place in bound[name]) for name in reads):
                    found[target.id] = Construction(call, reads, at)
    return found


def _bound_by(statement: ast.stmt) -> Iterator[tuple[ast.expr, ast.expr]]:
    match statement:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                if isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List)):
                    if len(target.elts) == len(value.elts):
                        yield from zip(target.elts, value.elts, strict=True)
                else:
                    yield target, value
        case ast.AnnAssign(target=target, value=ast.expr() as value):
            yield target, value
        case ast.With(items=items) | ast.AsyncWith(items=items):
            for item in items:
                if item.optional_vars is not None:
                    yield item.optional_vars, item.context_expr
        case (
            ast.For(iter=ast.NamedExpr(target=target, value=value)) | ast.Expr(value=ast.NamedExpr(target=target, value=value))
        ):
            yield target, value


def _bindings(tree: ast.Module) -> dict[str, list[int]]:
    """By name, the statements that may bind it, each as often as it does."""
    found: dict[str, list[int]] = collections.defaultdict(list)
    for at, statement in enumerate(tree.body):
        for node in walk(statement):
            match node:
                case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                    found[name].append(at)
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    found[name].append(at)
                case ast.Import(names=names) | ast.ImportFrom(names=names):
                    for alias in names:
                        found[alias.asname or alias.name.partition(".")[0]].append(at)
                case ast.Global(names=names):  # whenever the function is called
                    for name in names:
                        found[name] += [at, len(tree.body)]
                case (
                    ast.ExceptHandler(name=str() as name) | ast.MatchAs(name=str() as name) | ast.MatchStar(name=str() as name)
                ):
                    found[name].append(at)
                case ast.MatchMapping(rest=str() as name):
                    found[name].append(at)
    return found


_PLAIN = (
    ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.JoinedStr,
    ast.FormattedValue, ast.UnaryOp, ast.BinOp, ast.Call, ast.keyword, ast.Starred, ast.Slice,
    ast.expr_context, ast.operator, ast.unaryop,
)  # fmt: skip


def _is_plain(call: ast.Call) -> bool:
    return all(isinstance(node, _PLAIN) for node in walk(call))


# -- storing -----------------------------------------------------------------------------------------------------------


class NotRemadeError(Exception):
    """A resource that the cell bound could not be made again; says why, the name first."""


@dataclass(slots=True)
class Resources:
    """The resources among what a cell bound."""

    tree: ast.Module
    bound: Mapping[str, Any]
    """What the cell bound."""
    namespace: Mapping[str, Any]
    """All names."""
    references: dict[int, Any] = field(default_factory=dict)
    """By id, how a resource is written down."""

    def __post_init__(self) -> None:
        """NotRemadeError where one of them could not be made again and could not be stored otherwise either."""
        known = constructions(self.tree)
        for name, value in self.bound.items():
            kind = kind_of(value)
            if kind is None or id(value) in self.references or name not in known:
                continue
            held = kind.put_in(value) or _touched(self.tree, name, value)
            if held:
                raise NotRemadeError(f"{name} ({type(value).__name__}) holds {held}, which can't be made again")
            why = self._refused(kind, known[name])
            if why:
                raise NotRemadeError(f"{name} ({type(value).__name__}) {why}")
            if kind.cheap:
                again = _evaluate(known[name].call, self.namespace, {})
                kind.brought_to(again, kind.end(value))
                if kind.configuration(again) != kind.configuration(value):
                    raise NotRemadeError(f"{name} ({type(value).__name__}) holds state that the cell put into it")
            elif kind.tried_if_used and _is_used(self.tree, name):
                again = _evaluate(known[name].call, self.namespace, {})
                same = kind.configuration(again) == kind.configuration(value)
                kind.brought_to(again, True)
                if not same:
                    raise NotRemadeError(f"{name} ({type(value).__name__}) was configured otherwise after it was made")
            own = {read: self.bound[read] for read in sorted(known[name].reads) if read in self.bound}
            self.references[id(value)] = (_MADE, name, own, kind.end(value), _digest(kind.configuration(value)))

    def _refused(self, kind: Kind, made: Construction) -> str:
        """Why the call is none that may be made again; '' where it is one."""
        for node in walk(made.call):
            if isinstance(node, ast.Call):
                try:
                    callee = _evaluate(node.func, self.namespace, {})
                except Exception as error:
                    return f"can't be made again ({type(error).__name__}: {error})"
                if not _makes(callee, kind if node is made.call else None):
                    return f"can't be made again: its arguments call {ast.unparse(node.func)}()"
        return ""

    def resolve(self, written: Any) -> Any:
        """The live object for one of `references`: a stored value that is read again for comparison."""
        return self.bound[written[1]]


def either(resources: Resources | Remaker, resolve: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Gives the resource, or the earlier object, that a stored value refers to."""
    return lambda written: resources.resolve(written) if type(written) is tuple and written[0] == _MADE else resolve(written)


def _makes(callee: Any, kind: Kind | None) -> bool:
    """Is calling it just making something: a resource of this kind, or a plain value for its arguments (None)?"""
    if kind is _ANY_FACTORY:
        return True
    if isinstance(callee, type):
        return is_installed(callee.__module__) and not hasattr(callee, "__next__")
    name = getattr(callee, "__name__", "")
    if kind is not None and (name in kind.factories or kind_of(callee) is not None):
        owner = getattr(callee, "__self__", None)
        module = getattr(callee, "__module__", None)
        return kind_of(callee) is not None or kind_of(owner) is not None or is_installed(module)
    owner = getattr(callee, "__self__", None)
    if name == "get" and (owner is os.environ or type(owner) is dict):
        return True
    return callee is os.getenv or (name == "secret" and getattr(callee, "__module__", "").startswith("durable_nb"))


_PRAGMA = re.compile(r"\s*pragma\s+(?:\w+\.)?(\w+)\s*[=(]", re.IGNORECASE)


def _touched(tree: ast.Module, name: str, value: Any) -> str:
    """State that nobody can see in the object, but the cell's code shows: '' for none."""
    sqlite = type(value).__module__.startswith("sqlite3")
    for node in nodes(tree):
        match node:
            case ast.Attribute(attr=attribute) if sqlite and attribute in _sqlite.SEEN_BY_NOBODY:
                return f"what {attribute}() gave it"
            case ast.Constant(value=str() as text) if sqlite and _sets_what_nobody_tells(text):
                return f"what {text.strip()!r} set"
            case ast.Attribute(attr="listens_for" | "listen") if type(value).__module__.startswith("sqlalchemy"):
                return "listeners"
            case ast.Attribute(value=ast.Name(id=found), attr=attribute, ctx=ast.Store()) if found == name:
                if not (sqlite and attribute in ("row_factory", "text_factory", "isolation_level")):
                    return f"an attribute {attribute!r} that the cell sets"
    return ""


def _is_used(tree: ast.Module, name: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load) for node in nodes(tree))


def _sets_what_nobody_tells(text: str) -> bool:
    found = _PRAGMA.match(text)
    return found is not None and found[1].lower() not in (*_sqlite.PRAGMAS, *_TELLING)


_TELLING = ("table_info", "table_xinfo", "index_list", "index_info", "foreign_key_list", "foreign_key_check", "integrity_check",
            "quick_check", "optimize", "user_version", "application_id")  # fmt: skip
"""Pragmas that tell of what they are given, or set what is a part of the content."""


def _digest(configuration: Any) -> str:
    return hashlib.blake2b(repr(configuration).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


# -- restoring ---------------------------------------------------------------------------------------------------------


class Unmade:
    """Stands for a resource whose constructor failed."""

    def __init__(self, why: str) -> None:
        self.why = why


class OtherwiseError(Exception):
    """What was made again is configured otherwise than what the cell bound."""


@dataclass(slots=True)
class Remaker:
    """Makes the resources of one restored cell."""

    tree: ast.Module
    namespace: Mapping[str, Any]
    _made: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """By name, why a constructor failed."""

    _connections: list[tuple[Any, Any]] = field(default_factory=list)
    """Those of sqlite3 that were made, each with how it has to stand."""

    def resolve(self, written: Any) -> Any:
        """The resource for one of `Resources.references`. OtherwiseError."""
        _, name, own, end, configuration = written
        if name not in self._made:
            made = self._made[name] = self._make(name, own, end, configuration)
            if _sqlite.is_connection(made):
                self._connections.append((made, end))
        return self._made[name]

    def finish(self) -> None:
        """All that consists of the resources has come back, cursors among it."""
        for con, end in self._connections:
            if not _sqlite.is_closed(con):
                _sqlite.bring(con, end)

    def _make(self, name: str, own: Mapping[str, Any], end: Any, configuration: str) -> Any:
        call = constructions(self.tree)[name].call
        try:
            if any(isinstance(value, Unmade) for value in own.values()):
                raise RuntimeError("what it is made of could not be made")  # noqa: TRY301
            made = _evaluate(call, self.namespace, own)
            kind = kind_of(made)
            if kind is not None:
                with silenced():
                    kind.brought_to(made, end)
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}"
            return Unmade(self.failed[name])
        if kind is not None and _digest(kind.configuration(made)) != configuration:
            raise OtherwiseError(f"{name} would be configured differently now")
        return made


def _evaluate(expression: ast.expr, namespace: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """The value of a plain expression; what it shows is not shown."""
    names: MutableMapping[str, Any] = collections.ChainMap(dict(own), dict(namespace))
    code = compile(ast.Expression(expression), "<made again>", "eval")
    with silenced():
        return eval(code, {"__builtins__": __builtins__}, names)  # noqa: S307  the user's own statement
