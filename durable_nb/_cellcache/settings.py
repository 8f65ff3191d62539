"""Settings of the whole process, Python's and of libraries: what a cell sets is noted as values and set again by a hit.

Each setting is looked at before and after the cell, as a flat dict. A library that the cell itself loads has its defaults
before. What can be seen and can't be set again keeps the cell from being stored.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # typeshed has none
import importlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from durable_nb import _figures

ENVIRONMENT = "the environment"
GONE = "<gone>"
"""In place of the value of a key that is there no more."""


@dataclass(frozen=True, slots=True, eq=False)
class Same:
    """One very object, equal to itself only. It is held: the id of one that has died may be another's by the next look."""

    held: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


class UnsettableError(Exception):
    """A change of the process that a hit could not make again; says which."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One group of settings."""

    what: str
    module: str
    """It is looked at only where this is loaded, and loaded to set it again."""
    look: Callable[[Any], dict[str, Any]]
    """Given the module. Must be quick: it is asked twice for each cell that runs."""
    put: Callable[[Any, dict[str, Any]], None] | None = None
    """Sets these keys. None where nobody can."""
    said: Callable[[str], str] = str
    """What a cell does that changes this key, where nobody can do it again."""
    usual: Callable[[Any], dict[str, Any]] = lambda _: {}
    """What `look` gives where nobody has set anything."""
    mentions: frozenset[str] = frozenset()
    """Imports change it as well, which later ones do again: it counts only where the cell's code has one of these words."""
    by_mention: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Keys for which the same holds, each with its words: the front end chooses them, too."""
    keeps: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda _before, changes: changes
    """What is stored of changes, given what was before; UnsettableError where one can't be set again."""
    setters: frozenset[str] = frozenset()
    """Words of code that sets it: where it isn't as in the beginning, code with one may have set it to what it was already."""
    by_name: bool = False
    """The same holds of keys that the code has as a word: they end in names."""

    def unusual(self, now: dict[str, Any] | None) -> dict[str, Any]:
        """Of what is set `now`, what isn't as it was when the session began; GONE for keys that are there no more."""
        module = sys.modules.get(self.module)
        if module is None or now is None:
            return {}
        beginning = _beginning.setdefault(self.what, now)
        return differences(self.usual(module) if beginning is None else beginning, now)

    def may_be_set_by(self, words: frozenset[str]) -> Callable[[str], bool] | None:
        """May code with these words set the key that is given, to what it is? None where it sets none."""
        by_all = not (self.setters if self.by_name else self.setters | self.mentions).isdisjoint(words)

        if not (by_all or self.by_name or any(not found.isdisjoint(words) for found in self.by_mention.values())):
            return None

        def is_set(key: str) -> bool:
            by_key = not self.by_mention.get(key, frozenset()).isdisjoint(words)
            return by_all or by_key or (self.by_name and key.rpartition(".")[2] in words)

        return is_set


_beginning: dict[str, dict[str, Any] | None] = {}
"""What was set when the extension was loaded, of what it is; None for a library that wasn't loaded."""
_set_by: dict[str, set[tuple[str, str]]] = {}
"""By the digest of a cell's code, which keys of which settings it has changed in this process."""


def remember_beginning(known: Iterable[Setting]) -> None:
    """What is set now is how sessions begin."""
    _beginning.update((setting.what, look(setting)) for setting in known)


class Settings:
    """What is set before a cell runs."""

    def __init__(self, known: Iterable[Setting], words: frozenset[str], code: str = "") -> None:
        """`words`: the names that the cell's code and its helpers' mention; `code`: the digest of the cell's own."""
        self._known = [s for s in known if not s.mentions or s.mentions & words]
        self._words = words
        self._set_before = _set_by.setdefault(code, set())
        self._before = {s.what: look(s) for s in self._known}

    def changed(self, variables: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
        """What has been set since, by what it is of; UnsettableError. `variables` of the environment are known to have been
        set."""  # fmt: skip
        found: dict[str, dict[str, Any]] = {}
        for setting in self._known:
            after = look(setting)
            before = self._before[setting.what]
            if before is None and after is not None:
                before = setting.usual(sys.modules[setting.module])
            changes = differences(before or {}, after or {})
            for key, words in setting.by_mention.items():
                if not words & self._words:
                    changes.pop(key, None)
            if setting.what == ENVIRONMENT:
                unusual = setting.unusual(after)
                changes |= {name: unusual[name] for name in variables if name in unusual}
            if not changes:
                continue
            if setting.put is None:
                self._set_before.update((setting.what, key) for key in changes)
                raise UnsettableError(setting.said(next(iter(changes))))
            if kept := setting.keeps(before or {}, changes):
                self._set_before.update((setting.what, key) for key in kept)
                found[setting.what] = kept
        return found

    def unchanged(self, changed: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """What the cell may have set to what it was already, by what it is of: what it does where that is not set yet is not
        known. `changed`: what it has set otherwise. UnsettableError."""  # fmt: skip
        found: dict[str, dict[str, Any]] = {}
        set_before = {what for what, _ in self._set_before}
        for setting in self._known:
            is_set = setting.may_be_set_by(self._words)
            if is_set is None and setting.what not in set_before:
                continue
            kept = {
                key: value
                for key, value in setting.unusual(self._before[setting.what]).items()
                if key not in changed.get(setting.what, ())
                and ((is_set is not None and is_set(key)) or (setting.what, key) in self._set_before)
            }
            if kept and setting.put is None:
                raise UnsettableError(setting.said(next(iter(kept))) + ", or leaves it as it was")
            if kept:
                found[setting.what] = kept
        return found


def set_again(known: Iterable[Setting], changes: Mapping[str, dict[str, Any]]) -> None:
    """Set what `Settings.changed` gave."""
    for setting in known:
        found = changes.get(setting.what)
        if found and setting.put is not None:
            setting.put(importlib.import_module(setting.module), found)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that differ, with what they hold after; GONE for nothing."""
    # Most values are the very object that was there before: among a thousand of them no other comparison is quick enough.
    others = [key for key, value in after.items() if before.get(key, _NOTHING) is not value]
    found = {key: after[key] for key in others if key not in before or not _same(before[key], after[key])}
    return found | dict.fromkeys(before.keys() - after.keys(), GONE)


_NOTHING = object()


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:  # an array's truth, a comparison that fails
        return False


def look(setting: Setting) -> dict[str, Any] | None:
    """What is set now; None where the library isn't loaded."""
    module = sys.modules.get(setting.module)
    return None if module is None else setting.look(module)


# -- Python ------------------------------------------------------------------------------------------------------------


def _interpreter(_sys: Any) -> dict[str, Any]:
    gc: Any = sys.modules.get("gc")
    digits = getattr(sys, "get_int_max_str_digits", lambda: 0)()
    return {
        "recursion limit": sys.getrecursionlimit(),
        "switch interval": sys.getswitchinterval(),
        "int digits": digits,
        "bytecode": sys.dont_write_bytecode,
        **({"gc": gc.isenabled(), "gc threshold": gc.get_threshold()} if gc is not None else {}),
    }


def _set_interpreter(_sys: Any, changes: dict[str, Any]) -> None:
    import gc

    ways: dict[str, Callable[[Any], Any]] = {
        "recursion limit": sys.setrecursionlimit,
        "switch interval": sys.setswitchinterval,
        "int digits": getattr(sys, "set_int_max_str_digits", lambda _: None),
        "bytecode": lambda on: setattr(sys, "dont_write_bytecode", on),
        "gc": lambda on: gc.enable() if on else gc.disable(),
        "gc threshold": lambda found: gc.set_threshold(*found),
    }
    for key, value in changes.items():
        ways[key](value)


_SECRET = re.compile(r"key|token|secret|passw|credential|signature|auth", re.IGNORECASE)


def _environment_kept(_before: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    secret = sorted(name for name, value in changes.items() if value is not GONE and _SECRET.search(name))
    if secret:
        raise UnsettableError(f"it sets {secret[0]} in the environment, which looks like a secret and is not written to disk")
    return changes


def _set_environment(_os: Any, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if value == GONE:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "TZ" in changes and hasattr(__import__("time"), "tzset"):
        __import__("time").tzset()


_STARTED_IN = Path.cwd()
_BEGINNING = str(_STARTED_IN)


def _working_directory(_os: Any) -> dict[str, Any]:
    """Within the folder of the beginning relative to it, which may be moved as a whole."""
    try:
        if os.getcwd() == _BEGINNING:  # noqa: PTH109  it is asked twice a cell
            return {"folder": "."}
        now = Path.cwd()
    except OSError:  # removed
        return {"folder": GONE}
    return {"folder": str(now.relative_to(_STARTED_IN) if now.is_relative_to(_STARTED_IN) else now)}


def _change_directory(_os: Any, changes: dict[str, Any]) -> None:
    os.chdir(_STARTED_IN / changes["folder"])


def _filters(_warnings: Any) -> dict[str, Any]:
    found = tuple(
        (action, getattr(message, "pattern", message), category, getattr(module, "pattern", module), lineno)
        for action, message, category, module, lineno in warnings.filters
    )
    return {"filters": found}


def _filters_kept(before: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Those that were added: whatever else is filtered comes from what is imported, now as then."""
    earlier, now = before["filters"], changes["filters"]
    if set(earlier) - set(now):
        return {"all": now}
    return {"more": tuple(item for item in now if item not in earlier)} if set(now) - set(earlier) else {"all": now}


def _set_filters(_warnings: Any, changes: dict[str, Any]) -> None:
    """By the public functions, which tell the interpreter's cache too."""
    if "all" in changes:
        warnings.resetwarnings()
    for action, message, category, module, lineno in reversed(changes.get("all") or changes["more"]):
        if message is None and module is None:
            warnings.simplefilter(action, category, lineno)
        else:
            warnings.filterwarnings(action, message or "", category, module or "", lineno)


def _loggers(_logging: Any) -> dict[str, Any]:
    found: dict[str, logging.Logger] = {"": logging.root}
    found |= {name: log for name, log in list(logging.root.manager.loggerDict.items()) if isinstance(log, logging.Logger)}
    levels = {name: (log.level, log.disabled, log.propagate, tuple(map(_handler, log.handlers))) for name, log in found.items()}
    return {**levels, "<disabled>": logging.root.manager.disable}


def _handler(handler: logging.Handler) -> Any:
    """What a handler was made of, where it is a plain one; else itself."""
    formatter = handler.formatter
    plain = (
        type(handler) is logging.StreamHandler and type(formatter) in (logging.Formatter, type(None)) and not handler.filters
    )
    if not plain:
        return handler
    # Made while the cell was noted, a handler may have got what stands in for the stream then.
    held: Any = handler.stream  # type: ignore[attr-defined]  # as `plain` says
    streams = (held, getattr(held, "_stream", None))
    stream = next((name for name in ("stdout", "stderr") if getattr(sys, name) in streams), None)
    if stream is None:
        return handler
    style = type(formatter._style).__name__ if formatter is not None else ""
    return stream, handler.level, formatter and (formatter._fmt, formatter.datefmt, style)


_STYLES = {"PercentStyle": "%", "StrFormatStyle": "{", "StringTemplateStyle": "$"}


def _loggers_kept(_before: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        for handler in value[3] if isinstance(value, tuple) else ():
            if isinstance(handler, logging.Handler):
                raise UnsettableError(f"it gives the logger {name or 'root'!r} a {type(handler).__name__}")
    # A new logger of a library is made by importing it.
    return {n: v for n, v in changes.items() if v not in ((logging.NOTSET, False, True, ()), GONE)}


def _set_loggers(_logging: Any, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if name == "<disabled>":
            logging.disable(value)
            continue
        log = logging.getLogger(name)
        level, log.disabled, log.propagate, handlers = value
        log.setLevel(level)
        if tuple(map(_handler, log.handlers)) != handlers:
            log.handlers[:] = [_new_handler(*made_of) for made_of in handlers]


def _new_handler(stream: str, level: int, formatter: Any) -> logging.Handler:
    handler = logging.StreamHandler(getattr(sys, stream))
    handler.setLevel(level)
    if formatter:
        fmt, datefmt, style = formatter
        handler.setFormatter(logging.Formatter(fmt, datefmt, _STYLES[style]))  # type: ignore[arg-type]
    return handler


def _locale(module: Any) -> dict[str, Any]:
    names = "LC_CTYPE LC_COLLATE LC_TIME LC_MONETARY LC_NUMERIC LC_MESSAGES".split()
    return {name: module.setlocale(getattr(module, name)) for name in names if hasattr(module, name)}


def _set_locale(module: Any, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        module.setlocale(getattr(module, name), value)


_CONTEXT = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")


def _decimal(module: Any) -> dict[str, Any]:
    return _context(module.getcontext())


def _context(context: Any) -> dict[str, Any]:
    return {name: getattr(context, name) for name in _CONTEXT} | {
        "traps": sorted(t.__name__ for t, on in context.traps.items() if on),
        **{f"{_FLAG}{signal.__name__}": bool(on) for signal, on in context.flags.items()},
    }


_FLAG = "flag "
"""Whether a signal has occurred: each by itself, as arithmetic sets them one by one."""


def _set_decimal(module: Any, changes: dict[str, Any]) -> None:
    context = module.getcontext()
    for name, value in changes.items():
        if name == "traps":
            for signal in context.traps:
                context.traps[signal] = signal.__name__ in value
        elif name.startswith(_FLAG):
            context.flags[getattr(module, name.removeprefix(_FLAG))] = value
        else:
            setattr(context, name, value)


def _sockets(module: Any) -> dict[str, Any]:
    return {"timeout": module.getdefaulttimeout()}


def _nested(asyncio: Any) -> dict[str, Any]:
    nested = hasattr(asyncio, "_nest_patched")
    return {"by": ("nest_asyncio2" if hasattr(asyncio, "_nest_asyncio2") else "nest_asyncio") if nested else None}


def _nest(_asyncio: Any, changes: dict[str, Any]) -> None:
    importlib.import_module(changes["by"]).apply()


def _dialects(csv: Any) -> dict[str, Any]:
    """A dialect can't be changed once it is registered."""
    return {**{name: csv.get_dialect(name) for name in csv.list_dialects()}, "": csv.field_size_limit()}


def _set_dialects(csv: Any, changes: dict[str, Any]) -> None:
    csv.field_size_limit(changes[""])


def _dialects_kept(_before: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for name in changes:
        if name and name not in ("excel", "excel-tab", "unix"):
            raise UnsettableError(f"it registers the csv dialect {name!r}")
    return {name: value for name, value in changes.items() if not name}


def _hooks(_sys: Any) -> dict[str, Any]:
    """Not the streams: whoever notes what a cell shows stands in for them."""
    return {
        "excepthook": sys.excepthook,
        "unraisablehook": sys.unraisablehook,
        "the trace function": sys.gettrace(),
        "the profile function": sys.getprofile(),
    }


def _import_hooks(_sys: Any) -> dict[str, Any]:
    return {"meta_path": list(map(Same, sys.meta_path)), "path_hooks": list(map(Same, sys.path_hooks))}


def _signals(signal: Any) -> dict[str, Any]:
    """Interrupts are a durable cell's own while it runs. The C functions: Python's make an enumeration's member of each."""
    if not _numbers:
        _numbers.update({str(int(n)): int(n) for n in signal.valid_signals() if n != signal.SIGINT})
    return {name: _signal.getsignal(number) for name, number in _numbers.items()}


_numbers: dict[str, int] = {}
"""All signals' but that of interrupts."""


def _made_modules(_sys: Any) -> dict[str, Any]:
    """Those that no import has found: somebody put them there."""
    return {name: Same(module) for name, module in list(sys.modules.items()) if getattr(module, "__spec__", None) is None}


def _reducers(copyreg: Any) -> dict[str, Any]:
    """Those of the notebook: what libraries register, importing them does again."""
    return {
        cls.__qualname__: reduce
        for cls, reduce in list(copyreg.dispatch_table.items())
        if "__main__" in (cls.__module__, getattr(reduce, "__module__", ""))
    }


def _umask(_os: Any) -> dict[str, Any]:
    """It can only be asked for by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return {"mask": mask}


def _set_umask(_os: Any, changes: dict[str, Any]) -> None:
    os.umask(changes["mask"])


def _mime_types(mimetypes: Any) -> dict[str, Any]:
    if not mimetypes.inited:
        mimetypes.init()
    return dict(mimetypes.types_map)


def _set_mime_types(mimetypes: Any, changes: dict[str, Any]) -> None:
    for ending, kind in changes.items():
        if kind != GONE:
            mimetypes.add_type(kind, ending)


def _stack_size(threading: Any) -> dict[str, Any]:
    """To ask sets it, to the default."""
    size = threading.stack_size()
    threading.stack_size(size)
    return {"bytes": size}


def _set_stack_size(threading: Any, changes: dict[str, Any]) -> None:
    threading.stack_size(changes["bytes"])


def _set_level_names(_logging: Any, changes: dict[str, Any]) -> None:
    for level, name in changes.items():
        logging.addLevelName(int(level), name)


def _logging(_logging: Any) -> dict[str, Any]:
    return {
        "class of loggers": logging.getLoggerClass(),
        "factory of records": logging.getLogRecordFactory(),
        "capture of warnings": logging._warnings_showwarning is not None,  # type: ignore[attr-defined]
    }


def _tracers(_sys: Any) -> dict[str, Any]:
    asks = {"tracemalloc": "is_tracing", "faulthandler": "is_enabled"}
    return {name: name in sys.modules and getattr(sys.modules[name], ask)() for name, ask in asks.items()}


def _builtins(module: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in ("_", "__build_class__")}


# -- libraries ---------------------------------------------------------------------------------------------------------


def _numpy(numpy: Any) -> dict[str, Any]:
    return {**numpy.get_printoptions(), **numpy.geterr(), "errcall": numpy.geterrcall()}


_NUMPY = {
    "edgeitems": 3, "threshold": 1000, "precision": 8, "suppress": False, "linewidth": 75, "nanstr": "nan", "infstr": "inf",
    "sign": "-", "formatter": None, "floatmode": "maxprec", "legacy": False, "override_repr": None,
    "divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn", "errcall": None,
}  # fmt: skip
_NUMPY_ERRORS = ("divide", "over", "under", "invalid")


def _set_numpy(numpy: Any, changes: dict[str, Any]) -> None:
    changes = dict(changes)
    errors = {name: changes.pop(name) for name in _NUMPY_ERRORS if name in changes}
    if errors:
        numpy.seterr(**errors)
    if "errcall" in changes:
        numpy.seterrcall(changes.pop("errcall"))
    if changes:
        numpy.set_printoptions(**changes)


def _pandas(config: Any) -> dict[str, Any]:
    """`get_option` asks each time whether the option is deprecated: this is the dict behind it."""
    found = {}
    for key in config._registered_options:
        now = config._global_config
        for part in key.split("."):
            now = now[part]
        found[key] = now
    return found


def _pandas_usual(config: Any) -> dict[str, Any]:
    return {key: option.defval for key, option in config._registered_options.items()}


def _set_pandas(config: Any, changes: dict[str, Any]) -> None:
    importlib.import_module("pandas")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated options
        for key, value in changes.items():
            config.set_option(key, value)


_COLORS = "bgrcmyk"


def _matplotlib(matplotlib: Any) -> dict[str, Any]:
    """Not by `rcParams[...]`, which would choose a backend."""
    colors: Any = sys.modules.get("matplotlib.colors")
    short = {f"color {c}": colors.colorConverter.colors[c] for c in _COLORS} if colors is not None else {}
    found = dict(dict.items(getattr(matplotlib, "rcParams", {})))
    for own in ("backend", "backend_fallback"):
        found.pop(own, None)
    backend = dict.get(matplotlib.rcParams, "backend") if hasattr(matplotlib, "rcParams") else None
    return {**found, **short, "backend": backend if isinstance(backend, str) else None}


_SHORT = {
    "b": (0, 0, 1),
    "g": (0, 0.5, 0),
    "r": (1, 0, 0),
    "c": (0, 0.75, 0.75),
    "m": (0.75, 0, 0.75),
    "y": (0.75, 0.75, 0),
    "k": (0, 0, 0),
}


def _matplotlib_usual(matplotlib: Any) -> dict[str, Any]:
    found = dict(dict.items(getattr(matplotlib, "rcParamsDefault", {})))
    for chosen in ("backend", "backend_fallback", "interactive"):
        found.pop(chosen, None)
    return {**found, **{f"color {c}": value for c, value in _SHORT.items()}}


def _set_matplotlib(matplotlib: Any, changes: dict[str, Any]) -> None:
    changes = dict(changes)
    colors = {c: changes.pop(f"color {c}") for c in _COLORS if f"color {c}" in changes}
    if colors:
        converter = importlib.import_module("matplotlib.colors").colorConverter
        converter.colors.update(colors)
        converter.cache.clear()
    backend, interactive = changes.pop("backend", None), changes.pop("interactive", None)
    if backend is not None:
        matplotlib.use(backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated names
        matplotlib.rcParams.update({key: value for key, value in changes.items() if value is not GONE})
    if interactive is not None:
        pyplot = importlib.import_module("matplotlib.pyplot")
        (pyplot.ion if interactive else pyplot.ioff)()  # which hooks themselves into the shell


def _polars(polars: Any) -> dict[str, Any]:
    state = json.loads(polars.Config.save())
    return {f"{group}:{key}": value for group, found in state.items() for key, value in found.items()}


def _set_polars(polars: Any, changes: dict[str, Any]) -> None:
    state: dict[str, dict[str, Any]] = {"environment": {}, "direct": {}}
    for key, value in changes.items():
        group, _, name = key.partition(":")
        state[group][name] = value
    polars.Config.load(json.dumps(state))


def _polars_usual(polars: Any) -> dict[str, Any]:
    """Where polars is loaded only now, what the environment said is its beginning."""
    return {
        key: os.environ.get(key.partition(":")[2]) if key.startswith("environment") else POLARS_DIRECT.get(key, value)
        for key, value in _polars(polars).items()
    }


POLARS_DIRECT = {
    "direct:set_fmt_float": "mixed", "direct:set_float_precision": None, "direct:set_thousands_separator": "",
    "direct:set_decimal_separator": ".", "direct:set_trim_decimal_zeros": False,
}  # fmt: skip


def _set_sklearn(sklearn: Any, changes: dict[str, Any]) -> None:
    sklearn.set_config(**changes)


def _sklearn(sklearn: Any) -> dict[str, Any]:
    return dict(sklearn.get_config())


def members_added(words: frozenset[str]) -> dict[str, Any]:
    """What others have added to classes of pandas and polars under these names."""
    found = {}
    for setting in (setting for setting in KNOWN if setting.said is _adds):
        for label, member in (look(setting) or {}).items():
            if label.rpartition(".")[2] in words:
                found[label] = _behind(member.held)
    return found


def _patched_by_others(library: str, classes: str) -> Callable[[Any], dict[str, Any]]:
    """Looks for what others have added to a library's classes: methods, and accessors that they registered."""
    known: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    paths = [path.rpartition(".")[::2] for path in classes.split()]

    def look(_module: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for module, name in paths:
            cls = getattr(sys.modules.get(module), name, None)
            if cls is None:
                continue
            members = vars(cls).copy()
            held, added = known.get(name, ({}, {}))
            if not _are_same(held, members):  # several hundred names, looked at twice a cell
                added = {
                    f"{name}.{a}": Same(v) for a, v in members.items() if _root_of(v) not in (library, "builtins", "numpy")
                }
                known[name] = members, added
            found |= added
        return found

    return look


def _are_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Have they the same names for the same objects? Equal objects that aren't the same would be no accessors."""
    try:
        return one == other
    except Exception:  # arrays, and what else refuses to be compared
        return False


def _root_of(value: Any) -> str:
    """The package that an attribute of a class comes from; 'builtins' where it doesn't tell."""
    module = getattr(_behind(value), "__module__", None)
    return str(module).partition(".")[0] if isinstance(module, str) else "builtins"


def _behind(value: Any) -> Any:
    """The class of an accessor, the function of a property."""
    of_accessor = (getattr(value, name, None) for name in ("_accessor", "_ns", "fget"))
    return next((found for found in of_accessor if callable(found)), value)


def _adds(key: str) -> str:
    return f"it adds {key}"


_FRAMES = (
    "pandas.DataFrame pandas.Series pandas.Index pandas.core.groupby.generic.DataFrameGroupBy "
    "pandas.core.groupby.generic.SeriesGroupBy pandas.core.groupby.groupby.GroupBy pandas.core.window.rolling.Rolling "
    "pandas.core.window.expanding.Expanding"
)
_POLARS = "polars.DataFrame polars.LazyFrame polars.Series polars.Expr"
_WARNING_WORDS = frozenset({"simplefilter", "filterwarnings", "resetwarnings"})
_INTERPRETER_WORDS = frozenset(
    "setrecursionlimit setswitchinterval set_int_max_str_digits dont_write_bytecode enable disable set_threshold".split()
)
_REGISTERING = frozenset(
    f"register_{what}_{kind}"
    for what in ("dataframe", "lazyframe", "series", "index", "expr")
    for kind in ("accessor", "namespace")
)
_BUILTINS_WORDS = frozenset({"builtins", "__builtins__", "__dict__", "install"})
_LOGGING_WORDS = frozenset(
    "basicConfig dictConfig fileConfig setLevel addHandler removeHandler disabled disable propagate handlers".split()
)

_BACKEND = {
    "backend": frozenset({"use", "switch_backend", "backend"}),
    "interactive": frozenset({"ion", "ioff", "interactive", "rcParamsDefault", "reset_defaults", "reset_orig"}),
}

POLARS = Setting("polars' options", "polars", _polars, _set_polars, usual=_polars_usual, setters=frozenset({"Config"}))
KNOWN: tuple[Setting, ...] = (
    Setting("the interpreter's settings", "sys", _interpreter, _set_interpreter, setters=_INTERPRETER_WORDS),
    Setting(ENVIRONMENT, "os", lambda _: dict(os.environ), _set_environment, keeps=_environment_kept),
    Setting("the working directory", "os", _working_directory, _change_directory, setters=frozenset({"chdir", "fchdir", "cd"})),
    Setting("the filters of warnings", "warnings", _filters, _set_filters, mentions=_WARNING_WORDS, keeps=_filters_kept),
    Setting(
        "loggers",
        "logging",
        _loggers,
        _set_loggers,
        mentions=_LOGGING_WORDS,
        by_mention={"": _LOGGING_WORDS, "__main__": _LOGGING_WORDS, "<disabled>": _LOGGING_WORDS},
        keeps=_loggers_kept,
        by_name=True,
    ),
    Setting("the locale", "locale", _locale, _set_locale, setters=frozenset({"setlocale"})),
    Setting("the decimal context", "decimal", _decimal, _set_decimal, usual=lambda d: _context(d.DefaultContext)),
    Setting(
        "the time-out of sockets",
        "socket",
        _sockets,
        lambda socket, found: socket.setdefaulttimeout(found["timeout"]),
        setters=frozenset({"setdefaulttimeout"}),
    ),
    Setting("nested event loops", "asyncio", _nested, _nest, setters=frozenset({"nest_asyncio", "nest_asyncio2"})),
    Setting(
        "the dialects of csv",
        "csv",
        _dialects,
        _set_dialects,
        usual=lambda _: {"": 131072},
        keeps=_dialects_kept,
        setters=frozenset({"register_dialect", "unregister_dialect", "field_size_limit"}),
    ),
    Setting(
        "sys.path",
        "sys",
        lambda _: {"path": list(sys.path)},
        said=lambda _: "it changes sys.path",
        setters=frozenset({"sys.path", "addsitedir"}),
    ),
    Setting(
        "hooks",
        "sys",
        _hooks,
        said=lambda name: f"it sets {name if name.startswith('the') else 'sys.' + name}",
        setters=frozenset({"excepthook", "unraisablehook", "settrace", "setprofile"}),
    ),
    Setting(
        "import hooks",
        "sys",
        _import_hooks,
        mentions=frozenset({"meta_path", "path_hooks"}),
        said=lambda n: f"it changes sys.{n}",
    ),
    Setting(
        "signals",
        "signal",
        _signals,
        said=lambda number: f"it sets a handler for signal {number}",
        setters=frozenset({"signal", "sigaction", "add_signal_handler", "remove_signal_handler"}),
    ),
    Setting("modules", "sys", _made_modules, mentions=frozenset({"modules"}), said=lambda n: f"it puts {n} into sys.modules"),
    Setting(
        "reducers",
        "copyreg",
        _reducers,
        said=lambda name: f"it registers how {name} is pickled",
        setters=frozenset({"copyreg", "dispatch_table"}),
    ),
    Setting(
        "functions for the end",
        "atexit",
        lambda atexit: {"n": atexit._ncallbacks()},
        mentions=frozenset({"atexit"}),
        said=lambda _: "it registers a function for the end of the process",
    ),
    Setting("the umask", "os", _umask, _set_umask, mentions=frozenset({"umask"})),
    Setting("MIME types", "mimetypes", _mime_types, _set_mime_types, mentions=frozenset({"add_type"})),
    Setting("the size of stacks", "threading", _stack_size, _set_stack_size, mentions=frozenset({"stack_size"})),
    Setting(
        "levels of loggers",
        "logging",
        lambda _: {str(level): name for level, name in logging._levelToName.items()},
        _set_level_names,
        mentions=frozenset({"addLevelName"}),
    ),
    Setting(
        "loggers' ways",
        "logging",
        _logging,
        mentions=frozenset({"setLoggerClass", "setLogRecordFactory", "captureWarnings"}),
        said=lambda name: f"it sets logging's {name}",
    ),
    Setting(
        "tracers",
        "sys",
        _tracers,
        mentions=frozenset({"tracemalloc", "faulthandler"}),
        said=lambda name: f"it turns {name} on or off",
    ),
    Setting(
        "the limits of the process",
        "resource",
        lambda resource: {str(n): resource.getrlimit(n) for name, n in vars(resource).items() if name.startswith("RLIMIT_")},
        mentions=frozenset({"setrlimit"}),
        said=lambda _: "it calls resource.setrlimit()",
    ),
    Setting(
        "the opener of URLs",
        "urllib.request",
        lambda request: {"opener": Same(request._opener)},
        mentions=frozenset({"install_opener"}),
        said=lambda _: "it calls install_opener()",
    ),
    Setting("builtins", "builtins", _builtins, said=lambda name: f"it sets builtins.{name}", setters=_BUILTINS_WORDS),
    Setting("numpy's options", "numpy", _numpy, _set_numpy, usual=lambda _: _NUMPY),
    Setting("pandas' options", "pandas._config.config", _pandas, _set_pandas, usual=_pandas_usual),
    Setting("pandas' classes", "pandas", _patched_by_others("pandas", _FRAMES), said=_adds, setters=_REGISTERING),
    Setting("matplotlib's rcParams", "matplotlib", _matplotlib, _set_matplotlib, usual=_matplotlib_usual, by_mention=_BACKEND),
    Setting(
        "pyplot's figures",
        "matplotlib._pylab_helpers",
        lambda _: _figures.open_ones(),
        lambda _, found: _figures.keep_open(found, GONE),
    ),
    POLARS,
    Setting("polars' classes", "polars", _patched_by_others("polars", _POLARS), said=_adds, setters=_REGISTERING),
    Setting(
        "scikit-learn's configuration",
        "sklearn",
        _sklearn,
        _set_sklearn,
        usual=lambda s: dict(s._config._global_config),
        setters=frozenset({"set_config", "config_context"}),
    ),
)
"""In the order in which they are set again."""
