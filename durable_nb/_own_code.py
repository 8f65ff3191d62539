"""What a workflow's own code calls that gives something else each time, and what to write instead.

A replay repeats the code: the clock, randomness, a file or a server would tell it something else then. It is looked for where
the workflow is defined, in calls that its own lines make; functions that it defines are left alone, since they may be steps.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import logging
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

log = logging.getLogger("durable_nb")

_STEP = "a step: await durable.run('a name', function, ...)"
_NOW, _RANDOM, _UUID, _SLEEP = "durable.now()", "durable.random()", "durable.uuid4()", "await durable.sleep('a name', seconds)"
_CALL = "await durable.call('a name', url), a durable.AsyncClient, or " + _STEP
_KNOWN = {
    "builtins": {"open": _STEP, "input": _STEP},
    "io": {"open": _STEP, "open_code": _STEP},
    "os": {"open": _STEP, "urandom": _RANDOM, "getrandom": _RANDOM},
    "time": {
        "sleep": _SLEEP,
        **dict.fromkeys(("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "localtime"), _NOW),
        **dict.fromkeys(("gmtime", "ctime", "clock_gettime", "process_time", "strftime"), _NOW),
    },
    "datetime.datetime": dict.fromkeys(("now", "utcnow", "today"), _NOW),
    "datetime.date": {"today": f"{_NOW}.date()"},
    "uuid": dict.fromkeys(("uuid1", "uuid4", "uuid6", "uuid7"), _UUID),
    "secrets": dict.fromkeys(
        ("token_hex", "token_bytes", "token_urlsafe", "randbelow", "randbits", "choice"), f"{_UUID}, or {_STEP}"
    ),
    "urllib.request": dict.fromkeys(("urlopen", "urlretrieve"), _CALL),
}
"""Modules and classes, and what of them is looked for."""
_RANDOM_MODULES = ("random", "numpy.random")
_SEEDED = ("Random", "RandomState", "Generator", "default_rng", "seed", "getstate", "setstate", "get_state", "set_state")
"""What of these gives the same each time, given a seed."""
_HTTP = ("requests", "httpx", "httpx2", "aiohttp", "urllib3", "http")
_SENDS = (
    *("get", "post", "put", "patch", "delete", "head", "options", "request", "stream", "Client", "AsyncClient", "Session"),
    *("session", "ClientSession", "PoolManager", "HTTPConnection", "HTTPSConnection"),
)

_told: set[tuple[str, str, str]] = set()


def advise(function: Any, name: str) -> None:
    """Tell once, in one line each, what a workflow's own code should not call."""
    for called, instead in found_in(function):
        about = getattr(function, "__module__", ""), name, called
        if about not in _told:
            _told.add(about)
            log.warning(
                "workflow %r calls %s() in its own code, where a replay would get something else: write %s instead",
                *(name, called, instead),
            )


def found_in(function: Any) -> Iterator[tuple[str, str]]:
    """What is called there as it is written, and what to write instead; nothing where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return
    defined = next((node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)), None)
    seen = set[str]()
    for call in _calls(defined.body if defined is not None else []):
        instead = _instead_of(call.func, function)
        written = ast.unparse(call.func)
        if instead and written not in seen:
            seen.add(written)
            yield written, instead


def _calls(nodes: list[Any]) -> Iterator[ast.Call]:
    for node in nodes:
        if isinstance(node, ast.Call):
            yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield from _calls(list(ast.iter_child_nodes(node)))


def _enclosed(function: Any) -> dict[str, Any]:
    """The variables around it that have a value already."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # empty until the function around it gets to it
            found[name] = cell.cell_contents
    return found


def _instead_of(written: ast.expr, function: Any) -> str:
    """What to write in place of a call of this; '' where it is nothing that is known."""
    names: list[str] = []
    while isinstance(written, ast.Attribute):
        names.insert(0, written.attr)
        written = written.value
    if not isinstance(written, ast.Name) or written.id in function.__code__.co_varnames:
        return ""
    target = _enclosed(function).get(written.id, function.__globals__.get(written.id, _NOTHING))
    target = getattr(builtins, written.id, _NOTHING) if target is _NOTHING else target
    owner: Any = None
    for name in names:  # modules and classes only: no property of the user's is executed
        if isinstance(target, ModuleType):
            owner, target = target, getattr(target, name, _NOTHING)
        elif isinstance(target, type):
            owner, target = target, inspect.getattr_static(target, name, _NOTHING)
        else:
            return ""
    if target is _NOTHING:
        return ""
    last = names[-1] if names else getattr(target, "__name__", "")
    return _of_place(_place_of(owner, target), last)


def _place_of(owner: Any, target: Any) -> str:
    """The module or class that the called thing comes from."""
    if isinstance(owner, ModuleType):
        return owner.__name__
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}"
    own = getattr(target, "__self__", None)
    if own is not None and not isinstance(own, ModuleType):
        return f"{type(own).__module__}" if not isinstance(own, type) else f"{own.__module__}.{own.__qualname__}"
    module = str(getattr(target, "__module__", "") or "")
    return {"_io": "io"}.get(module, module)


def _of_place(place: str, name: str) -> str:
    if place in _RANDOM_MODULES:
        return "" if name in _SEEDED else _RANDOM
    if place in _KNOWN:
        return _KNOWN[place].get(name, "")
    return _CALL if place.partition(".")[0] in _HTTP and name in _SENDS else ""


_NOTHING = object()
