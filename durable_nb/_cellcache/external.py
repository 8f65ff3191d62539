"""What a cell or step depends on beyond its names, as it is recorded: files, folders, environment variables, settings,
random generators, variables that are looked up by name. `watch` sees it while the cell or step runs."""  # fmt: skip

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import Any

from durable_nb._cellcache import environment
from durable_nb._cellcache.files import ABSENT, FileState, looking_away, state_of
from durable_nb._cellcache.generators import ANY, UNSEEDED, generators
from durable_nb._cellcache.settings import KNOWN, POLARS, POLARS_DIRECT, Setting, look, members_added
from durable_nb._codec import Signer
from durable_nb._fingerprint import hash_value, is_installed

UNBOUND = "unbound"


@dataclass(frozen=True, slots=True)
class Around:
    """What a record is compared with."""

    namespace: Mapping[str, Any]
    """The notebook's variables."""
    signer: Signer
    """Its key makes digests of environment variables, of which nobody else can find out anything."""
    own: tuple[str, ...] = ()
    """Files and folders that never count: the store, the notebook."""
    known: tuple[Setting, ...] = KNOWN
    """The settings that cells set."""

    def variable(self, name: str) -> str:
        """The keyed digest of what an environment variable is now."""
        return self.digest(name, environment.value_of(name))

    def digest(self, name: str, value: str | None) -> str:
        """The keyed digest of an environment variable's value; '' where it is not set."""
        if value is None:
            return environment.UNSET
        return self.signer.mac(b"environment", os.fsencode(name), os.fsencode(value))[:16].hex()


@dataclass(frozen=True, slots=True)
class ExternalState:
    """All of it, for one execution of a cell or step."""

    files: list[FileState] = field(default_factory=list)
    generators: dict[str, str] = field(default_factory=dict)
    """Of the random generators that it moved: the state they were in, or that nobody had seeded them; ANY where it seeded them
    itself, before anything else."""
    settings: dict[str, str] = field(default_factory=dict)
    """Digests of what was set for the whole process, of libraries that it uses; '' where that was as it is by default. And of
    what the user has added to classes of pandas and polars that the code speaks of, as `DataFrame.name`."""
    names: dict[str, str] = field(default_factory=dict)
    """Digests of variables that it may have looked up by name, or left alone, or bound to the very object that they held."""
    variables: dict[str, str] = field(default_factory=dict)
    """Keyed digests of environment variables."""
    unsure: list[str] = field(default_factory=list)
    """What can't be compared, in words: whoever recorded this can't be restored."""
    unchanged: dict[str, dict[str, str]] = field(default_factory=dict)
    """Digests of settings that it may have set to what they were, by key and what they are of: it is not known to set them."""

    def __bool__(self) -> bool:
        found = self.files, self.generators, self.settings, self.unchanged, self.names, self.variables, self.unsure
        return any(found)

    def digest(self) -> str:
        """Tells executions of one cell apart that saw different files."""
        parts = [f"{f.how}\0{f.path}\0{f.digest}" for f in self.files]
        named = (self.generators, self.names, self.settings, self.variables, *self.unchanged.values())
        parts += [f"{k}\0{v}" for found in named for k, v in sorted(found.items())]
        return hashlib.blake2b("\0\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()

    def changes(self, around: Around) -> list[str]:
        """What is different now, in words; empty where what is executed now would see the same again."""
        with looking_away():
            return self._changes(around)

    def _changes(self, around: Around) -> list[str]:
        found = list(self.unsure)
        found += [f"{name} changed" for name, digest in self.names.items() if name_digest(around.namespace, name) != digest]
        for file in self.files:
            now = state_of(file.how, file.path)
            if now != file.digest:
                found.append(f"{file.path} {'is gone' if now == ABSENT else 'changed' if file.digest else 'is new'}")
        for name, digest in self.variables.items():
            now = around.variable(name)
            if now != digest:
                what = "is not set" if now == environment.UNSET else "changed" if digest else "is set"
                found.append(f"the environment variable {name} {what}")
        now_set = settings(self.settings) | members(map(_last_part, self.settings)) if self.settings else {}
        found += [f"{w} changed" for w, digest in self.settings.items() if now_set.get(w, "") != digest]
        for setting in around.known if self.unchanged else ():
            was = self.unchanged.get(setting.what, {})
            now_unusual = setting.unusual(look(setting)) if was else {}
            keys = [key for key, digest in was.items() if key not in now_unusual or hash_value(now_unusual[key]) != digest]
            found += [f"{setting.what} changed"] if keys else []
        seen = {name: generator.before() for name, generator in generators().items()} if self.generators else {}
        found += [
            f"the state of {n} changed"
            for n, state in self.generators.items()
            if state != ANY and seen.get(n, UNSEEDED) != state
        ]
        return found


def name_digest(namespace: Mapping[str, Any], name: str) -> str:
    """Of what a name holds; '' where that can't be compared."""
    if name not in namespace:
        return UNBOUND
    with contextlib.suppress(Exception):
        return hash_value(namespace[name])
    return ABSENT


# -- settings ---------------------------------------------------------------------------------------------------------


def settings(wanted: Container[str]) -> dict[str, str]:
    """By what they are of, digests of the wanted settings that are not as they are by default. A library that isn't loaded has
    none."""  # fmt: skip
    found = {}
    for what, (module, ask) in _SETTINGS.items():
        if what not in wanted:
            continue
        loaded = sys.modules.get(module)
        unusual = ask(loaded) if loaded is not None else None
        if unusual:
            found[what] = hash_value(unusual)
    return found


def members(words: Iterable[str]) -> dict[str, str]:
    """By label, digests of what the user has added to classes of pandas and polars under these names."""
    added = members_added(frozenset(words)).items()
    return {label: hash_value(member) for label, member in added if not is_installed(getattr(member, "__module__", None))}


def _last_part(label: str) -> str:
    return label.rpartition(".")[2]


_NUMPY_PRINTS = {
    "edgeitems": 3, "threshold": 1000, "precision": 8, "suppress": False, "linewidth": 75, "nanstr": "nan", "infstr": "inf",
    "sign": "-", "formatter": None, "floatmode": "maxprec", "legacy": False, "override_repr": None,
}  # fmt: skip
_NUMPY_ERRORS = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn", "errcall": None}


def _unusual(now: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """What isn't as it is by default: most of it is the very object, which need not be compared."""
    return {k: v for k, v in now.items() if (known := usual.get(k)) is not v and known != v}


def _unusual_in_numpy(numpy: Any) -> dict[str, Any]:
    now = {**numpy.get_printoptions(), **numpy.geterr(), "errcall": numpy.geterrcall()}
    return _unusual(now, {**_NUMPY_PRINTS, **_NUMPY_ERRORS})


def _unusual_in_pandas(config: Any) -> dict[str, Any]:
    found = {}
    for key, option in config._registered_options.items():
        now = config._global_config  # get_option() asks each time whether the option is deprecated
        for part in key.split("."):
            now = now[part]
        if now != option.defval:
            found[key] = now
    return found


def _unusual_in_matplotlib(matplotlib: Any) -> dict[str, Any]:
    # Not by `rcParams[...]`, which would choose a backend.
    now, usual = (dict(dict.items(getattr(matplotlib, name, {}))) for name in ("rcParams", "rcParamsDefault"))
    found = _unusual(now, usual)
    for chosen in ("backend", "backend_fallback", "interactive"):  # by the front end
        found.pop(chosen, None)
    return found


def _unusual_in_decimal(decimal: Any) -> tuple[Any, ...]:
    now, usual = (
        (c.prec, c.rounding, c.Emin, c.Emax, c.capitals, c.clamp, sorted(str(t) for t, on in c.traps.items() if on))
        for c in (decimal.getcontext(), decimal.DefaultContext)
    )
    return () if now == usual else now


_STARTED_IN = os.getcwd()


def _elsewhere(_os: Any) -> str:
    """The working directory, where it isn't that of the beginning: a folder that was moved as a whole is no other one."""
    now = os.getcwd()
    return "" if now == _STARTED_IN else now


def _unusual_in_sklearn(sklearn: Any) -> dict[str, Any]:
    return _unusual(dict(sklearn.get_config()), dict(sklearn._config._global_config))


def _unusual_in_polars(polars: Any) -> dict[str, Any]:
    return {key: value for key, value in POLARS.look(polars).items() if value is not None and POLARS_DIRECT.get(key) != value}


def _unusual_in_csv(csv: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"": csv.field_size_limit()} if csv.field_size_limit() != 131072 else {}
    for name in csv.list_dialects():
        dialect = csv.get_dialect(name)
        if name not in ("excel", "excel-tab", "unix"):
            found[name] = {part: getattr(dialect, part) for part in dir(dialect) if not part.startswith("_")}
    return found


def _errors(warnings: Any) -> list[Any]:
    """Of the filters of warnings, those that make errors of them."""
    return [
        (getattr(message, "pattern", message), category, getattr(module, "pattern", module), line)
        for action, message, category, module, line in warnings.filters
        if action == "error"
    ]


def _levels(logging: Any) -> dict[str, Any]:
    loggers = {name: log for name, log in list(logging.root.manager.loggerDict.items()) if hasattr(log, "level")}
    levels = {name: (log.level, log.disabled) for name, log in loggers.items()}
    levels[""] = logging.root.level, logging.root.manager.disable
    return {name: level for name, level in levels.items() if any(level)}


RCPARAMS = "matplotlib's rcParams"
_SETTINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "numpy's options": ("numpy", _unusual_in_numpy),
    "pandas' options": ("pandas._config.config", _unusual_in_pandas),
    RCPARAMS: ("matplotlib", _unusual_in_matplotlib),
    "the decimal context": ("decimal", _unusual_in_decimal),
    "scikit-learn's configuration": ("sklearn", _unusual_in_sklearn),
    "polars' options": ("polars", _unusual_in_polars),
    "the working directory": ("os", _elsewhere),
    "the time zone": ("os", lambda _: os.environ.get("TZ")),
    "the recursion limit": ("sys", lambda _: sys.getrecursionlimit()),
    "the dialects of csv": ("csv", _unusual_in_csv),
    "levels of loggers": ("logging", _levels),
    "the filters of warnings": ("warnings", _errors),
}
OF_LIBRARIES = frozenset({"numpy's options", "pandas' options", RCPARAMS, "scikit-learn's configuration", "polars' options"})
"""Those that count for whatever is displayed, too."""


_WHERE = frozenset(
    "getcwd getcwdb cwd abspath realpath resolve absolute system getoutput getstatusoutput subprocess Popen check_output "
    "check_call".split()
)
_BY_WORDS: dict[str, frozenset[str]] = {
    "the working directory": _WHERE,
    "the decimal context": frozenset({"decimal", "Decimal", "getcontext", "localcontext", "setcontext"}),
    "the time zone": frozenset("localtime mktime strftime fromtimestamp astimezone tzname timezone ctime".split()),
    "the recursion limit": frozenset({"getrecursionlimit"}),
    "the dialects of csv": frozenset({"csv"}),
    "levels of loggers": frozenset({"isEnabledFor", "getEffectiveLevel"}),
    "the filters of warnings": frozenset(
        "warn warnings Warning UserWarning RuntimeWarning FutureWarning DeprecationWarning".split()
    ),
}


@lru_cache(maxsize=1024)
def settings_used(packages: tuple[str, ...], words: frozenset[str]) -> frozenset[str]:
    """The settings that count for code that uses these packages and has these words."""
    behind = frozenset().union(*(_required(package) for package in packages))
    of_libraries = {what: _SETTINGS[what][0].partition(".")[0] for what in OF_LIBRARIES}
    found = {what for what, library in of_libraries.items() if library in behind}
    return frozenset(found | {what for what, speaking in _BY_WORDS.items() if not speaking.isdisjoint(words)})


@lru_cache(maxsize=1024)
def _required(package: str) -> frozenset[str]:
    """A package with all that it requires: seaborn draws by matplotlib's settings."""
    found: set[str] = set()
    waiting = [package]
    while waiting:
        name = waiting.pop().replace("-", "_").lower()
        if name in found:
            continue
        found.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [match[0] for line in required if "extra ==" not in line and (match := re.match(r"[\w.-]+", line))]
    return frozenset(found)
