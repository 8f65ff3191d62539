"""Objects of the outer world, and those that pickle refuses: what they hold or how they are configured, secrets left out.

Types are known by their names, as none of their packages is imported here.
"""

from __future__ import annotations

import contextlib
import copyreg
import dis
import functools
import gc
import os
import re
import sys
import types
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128

from durable_nb import _sqlite

from ._owners import is_installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_SECRET = re.compile(r"key|token|secret|signature|password|passwd|authorization|cookie|credential", re.IGNORECASE)
_OF_THE_LIBRARY = {"accept", "accept-encoding", "connection", "user-agent"}
"""Headers that an HTTP library sets itself, from version to version differently."""


# ---- what they hold ----


def _referent(obj: Any) -> tuple[Any, ...]:
    return (obj(),)


def _behind_proxy(obj: Any) -> tuple[Any, ...]:
    return (obj.__repr__.__self__,)


def _outcome(obj: Any) -> tuple[Any, ...] | None:
    """Read past the methods: asking a task for its exception tells it that somebody has seen it."""
    if obj._state != "FINISHED":
        return None
    return obj._exception, obj._result


def _variable(obj: Any) -> tuple[Any, ...]:
    try:
        return obj.name, obj.get()
    except LookupError:
        return (obj.name,)


def _element(obj: Any) -> tuple[Any, ...]:
    """A node of a document is one place in all of it."""
    etree = sys.modules["lxml.etree"]
    document = obj.getroottree()
    return etree.tostring(document), document.getpath(obj)


def _reader(obj: Any) -> tuple[Any, ...]:
    dialect = obj.dialect
    source = [found for found in gc.get_referents(obj) if type(found).__module__ != "_csv" and not isinstance(found, type)]
    names = ("delimiter", "doublequote", "escapechar", "lineterminator", "quotechar", "quoting", "skipinitialspace", "strict")
    return (obj.line_num, tuple(getattr(dialect, name) for name in names), *source)


def _queue(obj: Any) -> tuple[Any, ...]:
    held = getattr(obj, "queue", None)  # of threading; asyncio's is private
    return obj.maxsize, list(obj._queue if held is None else held)


def _cursor(obj: Any) -> tuple[Any, ...] | None:
    if _sqlite.is_closed(obj.connection):
        return (obj.connection,)
    try:
        return obj.connection, tuple(_sqlite.place(obj))
    except _sqlite.UntoldError:
        return None


HOLDS: dict[str, Callable[[Any], tuple[Any, ...] | None]] = {
    "weakref.ReferenceType": _referent,
    "weakref.WeakMethod": _referent,
    "weakref.ProxyType": _behind_proxy,
    "weakref.CallableProxyType": _behind_proxy,
    "weakref.WeakKeyDictionary": lambda obj: (list(obj.items()),),
    "weakref.WeakValueDictionary": lambda obj: (dict(obj.items()),),
    "_weakrefset.WeakSet": lambda obj: (set(obj),),
    "_contextvars.ContextVar": _variable,
    "concurrent.futures._base.Future": _outcome,
    "_asyncio.Future": _outcome,
    "_asyncio.Task": _outcome,
    "asyncio.futures.Future": _outcome,
    "_csv.reader": _reader,
    "queue.Queue": _queue,
    "sqlite3.Cursor": _cursor,
    "sqlite3.Row": lambda obj: (tuple(obj.keys()), tuple(obj)),
    "asyncio.queues.Queue": _queue,
    # neither in how many chunks they lie nor whether they were found to be sorted says anything
    "polars.dataframe.frame.DataFrame": lambda obj: (obj.height, obj.get_columns()),
    "polars.series.series.Series": lambda obj: (obj.name, str(obj.dtype), obj.rechunk().to_arrow()),
    "lxml.etree._Element": _element,
    "lxml.etree._ElementTree": lambda obj: _element(obj.getroot()),
    **dict.fromkeys(
        (
            "patsy.design_info.DesignInfo",
            "patsy.design_info.FactorInfo",
            "patsy.design_info.SubtermInfo",
            "patsy.eval.EvalFactor",
            "patsy.eval.EvalEnvironment",
            "patsy.desc.Term",
            "patsy.desc.ModelDesc",
            "patsy.user_util.LookupFactor",
            "patsy.origin.Origin",
        ),
        lambda obj: (dict(vars(obj)),),
    ),
    "pydantic.types._SecretBase": lambda _: (),
    "pydantic._internal._validate_call.ValidateCallWrapper": lambda obj: (
        obj.function,
        obj.function.__annotations__,
        obj.validate_return,
        obj.config_wrapper.config_dict,
    ),
}
"""The parts of an object that is nothing but these; None where it can't be told, as while a future is pending."""


# ---- how they are configured ----


def _database(obj: Any) -> Any:
    if _sqlite.is_closed(obj):
        return "closed"
    # one in memory is nowhere else
    return [(name, file or xxh3_128(_content(obj, name)).hexdigest()) for name, file in _sqlite.databases(obj)]


def _content(connection: Any, name: str) -> bytes:
    """A database in memory as a file, whatever SQLite wrote it: without what its header counts and the version there."""
    content = bytearray(_sqlite.content(connection, name))
    for counted in (slice(24, 28), slice(40, 44), slice(92, 100)):
        content[counted] = bytes(len(content[counted]))
    return bytes(content)


def _engine(obj: Any) -> Any:
    sync = getattr(obj, "sync_engine", obj)
    said = obj.url.render_as_string(hide_password=True)
    if sync is not obj or sync.url.get_backend_name() != "sqlite" or sync.url.database not in (None, "", ":memory:"):
        return said
    with contextlib.closing(sync.raw_connection()) as borrowed:
        return said, _database(borrowed.driver_connection)


def _http(obj: Any) -> Any:
    headers = [(key, value) for key, value in obj.headers.multi_items() if key.lower() not in _OF_THE_LIBRARY or _is_own(value)]
    return {
        "url": _address(obj.base_url),
        "headers": _without_secrets(headers),
        "params": _without_secrets(obj.params.multi_items()),
        "timeout": obj.timeout.as_dict(),
        "redirects": (obj.follow_redirects, obj.max_redirects),
        "environment": obj.trust_env,
        "auth": type(obj.auth).__qualname__,
        "hooks": obj.event_hooks,
    }


def _address(url: Any) -> str:
    """Without a name and password; taking these out costs as much as all the rest, and hardly any URL has them."""
    return str(url.copy_with(userinfo=b"") if url.userinfo else url)


def _is_own(value: str) -> bool:
    """Whether the user set a header that the library sets, too."""
    return not re.match(r"python-httpx|\*/\*|gzip|keep-alive", value)


def _sdk(obj: Any) -> Any:
    """Clients of OpenAI and Anthropic, and of all others that are generated as theirs are."""
    names = (
        "organization", "project", "_api_version", "_azure_deployment", "websocket_base_url", "max_retries",
        "_strict_response_validation",
    )  # fmt: skip
    timeout = obj.timeout
    return {
        "url": _address(obj.base_url),
        **{name: getattr(obj, name, None) for name in names},
        "timeout": timeout.as_dict() if hasattr(timeout, "as_dict") else timeout if isinstance(timeout, float) else None,
        "headers": _without_secrets(obj._custom_headers.items()),
        "query": _without_secrets(obj._custom_query.items()),
        "http": None if type(obj._client).__qualname__.endswith("HttpxClientWrapper") else obj._client,
    }


def _session(obj: Any) -> Any:
    """A session of requests."""
    headers = [(key, value) for key, value in obj.headers.items() if not value.startswith("python-requests")]
    return {
        "headers": _without_secrets((k, v) for k, v in headers if k.lower() not in _OF_THE_LIBRARY or _is_own(v)),
        "params": _without_secrets(dict(obj.params).items()),
        "verify": (obj.verify, obj.trust_env, obj.max_redirects, obj.proxies),
        "auth": type(obj.auth).__qualname__,
    }


def _orm_session(obj: Any) -> Any:
    if obj.new or obj.dirty or obj.deleted:
        raise ValueError("changes are pending")
    return obj.bind, obj.autoflush, obj.expire_on_commit


def _without_secrets(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[str, Any]]:
    return sorted(
        (str(key).lower(), value if isinstance(value, str) else str(value))
        for key, value in pairs
        if not _SECRET.search(str(key))
    )


def _file(obj: Any) -> Any:
    """A file by its name and how it is open; one that is read also by what it holds, and how far it has been read.

    It is read past the object, whose position must not move.
    """
    known = (obj.name, obj.mode, getattr(obj, "encoding", None), getattr(obj, "errors", None))
    if not obj.readable():
        return known
    position, number = obj.tell(), obj.fileno()  # a file that is being iterated doesn't tell: it counts as unknown
    found = os.fstat(number)
    return (*known, position, _content_of_file(number, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))


@functools.lru_cache(maxsize=256)
def _content_of_file(number: int, *_state: int) -> str:
    """The digest of an open file, remembered for as long as its size and modification time stay."""
    content, at = xxh3_128(), 0
    while chunk := os.pread(number, 1 << 20, at):
        content.update(chunk)
        at += len(chunk)
    return content.hexdigest()


def _pool(obj: Any) -> Any:
    context = obj._create_worker_context() if sys.version_info >= (3, 14) else None
    begun = (obj._initializer, obj._initargs) if context is None else (context.initializer, context.initargs)
    given = None if re.fullmatch(r"ThreadPoolExecutor-\d+", obj._thread_name_prefix) else obj._thread_name_prefix
    return obj._max_workers, given, obj._shutdown, *begun


def _processes(obj: Any) -> Any:
    return obj._max_workers, obj._shutdown_thread, obj._initializer, obj._initargs


CONFIGURED: dict[str, Callable[[Any], Any]] = {
    "sqlite3.Connection": _database,
    "sqlalchemy.engine.base.Engine": _engine,
    "sqlalchemy.engine.base.Connection": lambda obj: _engine(obj.engine),
    "sqlalchemy.ext.asyncio.engine.AsyncEngine": _engine,
    "httpx.BaseClient": _http,
    "httpx.Client": _http,
    "httpx.AsyncClient": _http,
    "httpx2.BaseClient": _http,
    "httpx2.Client": _http,
    "httpx2.AsyncClient": _http,
    "requests.sessions.Session": _session,
    "durable_nb._secrets.Secret": lambda _: (),  # which one, and what it is, changes nothing
    "durable_nb._current.Limit": lambda _: (),  # when something is done is no part of what it comes to
    "sqlalchemy.orm.session.Session": _orm_session,
    "IPython.core.interactiveshell.InteractiveShell": lambda _: "the notebook's own",
    "_io.FileIO": _file,
    "_io.TextIOWrapper": _file,
    "_io.BufferedReader": _file,
    "_io.BufferedWriter": lambda obj: (obj.name, obj.mode),
    "_io.BufferedRandom": _file,
    # who holds a lock just now is chance: steps at work side by side are asked about while others hold it
    **dict.fromkeys(
        ("_thread.lock", "_thread.RLock", "asyncio.locks.Lock", "asyncio.locks.Semaphore", "threading.Semaphore"), lambda _: ()
    ),
    "asyncio.locks.Event": lambda obj: obj.is_set(),
    "threading.Event": lambda obj: obj.is_set(),
    # how far a bar has come is what steps beside this one do to it
    "tqdm.std.tqdm": lambda obj: tuple(getattr(obj, name, None) for name in ("iterable", "total", "desc", "unit", "disable")),
    "concurrent.futures.thread.ThreadPoolExecutor": _pool,
    "concurrent.futures.process.ProcessPoolExecutor": _processes,
}
"""All that is known of how an object of the outer world is configured; whatever raises is unknown."""

OPAQUE_TYPES = {
    "threading.Thread",
    "_thread._local",
    "subprocess.Popen",
    "concurrent.futures._base.Executor",
    "concurrent.futures._base.Future",
    "asyncio.events.AbstractEventLoop",
    "_asyncio.Future",
    "asyncio.futures.Future",
    "multiprocessing.process.BaseProcess",
    "multiprocessing.pool.Pool",
    "aiohttp.client.ClientSession",
    "ipykernel.kernelbase.Kernel",
}
"""Stateful neighbours of the outer world whose reduction, where they have one, says nothing lasting."""


def configuration(name: str) -> Callable[[Any], Any] | None:
    """How a type of that full name is asked for its configuration; None where nothing is known."""
    found = CONFIGURED.get(name)
    if found is None and (name.endswith(("._base_client.BaseClient", "httpx._client.BaseClient", "httpx2._client.BaseClient"))):
        return _http if "httpx" in name else _sdk
    return found


def configure(kind: type, configuration: Callable[[Any], str]) -> None:
    """From now on values of `kind` count by their type and the text `configuration(value)`."""
    CONFIGURED[f"{kind.__module__}.{kind.__qualname__}"] = configuration
    SAID.add(configuration)


SAID: set[Callable[[Any], Any]] = set()
"""Configurations that `configure` got: they tell all, whatever else instances of a user's class hold."""


# ---- what a user's class adds ----


def added(obj: Any) -> Mapping[str, Any]:
    """The attributes that a user's class keeps in its instances beside those of the installed class it extends."""
    kind = type(obj)
    theirs = frozenset().union(*(_attributes_stored(base) for base in kind.__mro__ if is_installed(base.__module__)))
    slots = copyreg._slotnames(kind)  # type: ignore[attr-defined]  # private to the stubs
    held = {**getattr(obj, "__dict__", {}), **{name: getattr(obj, name) for name in slots if hasattr(obj, name)}}
    return {name: value for name, value in held.items() if name not in theirs}


@functools.lru_cache(maxsize=256)
def _attributes_stored(kind: type) -> frozenset[str]:
    """The names under which methods of a class keep things in its instances."""
    functions = [getattr(member, "fset", member) for member in vars(kind).values()]
    return frozenset(
        instruction.argval
        for function in functions
        if isinstance(function, types.FunctionType)
        for instruction in dis.get_instructions(function)
        if instruction.opname == "STORE_ATTR"
    ) | {name for name in vars(kind) if isinstance(vars(kind)[name], types.MemberDescriptorType)}
