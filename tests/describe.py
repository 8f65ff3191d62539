"""What a kernel's notebook holds, as text to compare with another kernel's: it is walked without the package's hashing.

A harness in another process evaluates `noted(namespace, path)` in the kernel between two cells.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import inspect
import json
import os
import re
import struct
import sys
import time
import types
from pathlib import Path

HIDDEN = re.compile(r"_{2,3}|_\d+|_i{1,3}|_i\d+|_[ioh]h|_dh|__\w+__|In|Out|get_ipython|exit|quit|open|durable|load_ext")
CHANCE, TIMES, NEVER = re.compile("time_$|_id$"), re.compile("_(fit|score)_time$"), re.compile("(?!)")
"""Of scikit-learn's objects: how long something took, and an address."""
_ORDERED = re.compile("_")
"""Members of a class that are Python's, or a library's, own: nobody sees in which order they come; the others keep theirs."""
LONG = 600
"""Characters from which on a text is told by its digest."""


def noted(namespace: dict, path: str) -> float:
    """Write what `namespace` holds into a file. Returns the CPU seconds that the process had used before."""
    used = time.process_time()
    lines = Description(namespace).lines()
    Path(path).write_text(json.dumps(lines))
    return used


def used() -> float:
    return time.process_time()


class Description:
    """The notebook's variables as text. An object met again is written as the path by which it was met first."""

    def __init__(self, namespace: dict) -> None:
        self._namespace = namespace
        self._paths: dict[int, str] = {}
        self._keep: list = []
        self._arrays: list = []

    def lines(self) -> dict[str, str]:
        sys.setrecursionlimit(max(sys.getrecursionlimit(), 5000))
        names = sorted(n for n in self._namespace if not HIDDEN.fullmatch(n))
        found = {name: self._of(self._namespace[name], name) for name in names}
        found = {name: json.dumps(value) for name, value in found.items()}
        return found | {"(memory shared)": self._shared()} | {f"({what})": text for what, text in process().items()}

    def _shared(self) -> str:
        if not self._arrays:
            return "[]"
        bounds = sys.modules["numpy"].lib.array_utils.byte_bounds
        spans = sorted((*bounds(a), path) for path, a in self._arrays if a.size and not a.dtype.hasobject)
        pairs, open_ = [], []
        for start, end, path in spans:
            open_ = [(first, last, other) for first, last, other in open_ if last > start]
            pairs += [(*sorted([path, other]), start - first) for first, _, other in open_]
            open_.append((start, end, path))
        return str(sorted(pairs))

    def _of(self, obj, path: str):
        kind = type(obj)
        if obj is None or kind in (bool, int, type(...), type(NotImplemented), range, slice):
            return f"{kind.__name__} {obj!r}"
        if kind in (str, bytes):
            return f"{kind.__name__} {short(repr(obj))}"
        if kind in (float, complex):
            return f"{kind.__name__} {obj!r} {struct.pack('>dd', obj.real, obj.imag).hex()}"
        if obj is self._namespace:
            return "the namespace"
        if isinstance(obj, types.ModuleType):
            return f"module {obj.__name__}"
        if kind is not tuple and not (
            kind.__module__ == "numpy" and "ndarray" not in kind.__name__
        ):  # as scalars are: by chance one
            first = self._paths.setdefault(id(obj), path)
            if first != path:
                return f"see {first}"
            self._keep.append(obj)
        elif path.count(".") > 100:
            return "deep"
        return [f"{kind.__module__}.{kind.__qualname__}", *self._parts(obj, kind, path)]

    def _each(self, objects, path: str) -> list:
        return [self._of(obj, f"{path}.{i}") for i, obj in enumerate(objects)]

    def _items(self, pairs, path: str) -> list:
        return [[self._of(k, f"{path}.key {i}"), self._of(v, f"{path}.{k!r:.40}")] for i, (k, v) in enumerate(pairs)]

    def _parts(self, obj, kind, path: str) -> list:
        library = kind.__module__.partition(".")[0].strip("_")
        own = getattr(self, f"_{library}", None)
        found = own(obj, kind, path) if own is not None else None
        if found is not None:
            return found
        if isinstance(obj, type):
            return self._class(obj, path)
        if isinstance(obj, types.FunctionType):
            return self._function(obj, path)
        if isinstance(obj, (types.MethodType, types.BuiltinFunctionType)):
            return [obj.__qualname__, self._of(obj.__self__, f"{path}.self")]
        if isinstance(obj, types.CellType):
            try:
                return [self._of(obj.cell_contents, f"{path}.cell")]
            except ValueError:
                return ["empty"]
        if isinstance(obj, functools.partial):
            return [
                self._of(obj.func, f"{path}.func"),
                self._of(obj.args, f"{path}.args"),
                self._of(obj.keywords, f"{path}.kw"),
            ]
        if hasattr(obj, "cache_info") and hasattr(obj, "__wrapped__"):
            return [self._of(obj.__wrapped__, f"{path}.wrapped")]
        if isinstance(obj, (types.GeneratorType, types.CoroutineType)):
            return [obj.__qualname__, str(inspect.getgeneratorstate(obj)) if inspect.isgenerator(obj) else ""]
        if isinstance(obj, (staticmethod, classmethod)):
            return [self._of(obj.__func__, f"{path}.func")]
        if isinstance(obj, re.Match):
            return [self._of(obj.re, f"{path}.re"), repr((obj.string, obj.pos, obj.endpos, obj.regs, obj.lastindex))]
        if isinstance(obj, re.Pattern):
            return [obj.pattern, str(obj.flags)]
        if isinstance(obj, (list, tuple, collections.deque)):
            return [*self._each(iter(obj), path), *self._attributes(obj, path)]
        if isinstance(obj, dict):
            extra = [self._of(obj.default_factory, f"{path}.factory")] if hasattr(obj, "default_factory") else []
            same = vars(obj) is obj if hasattr(obj, "__dict__") else False  # self.__dict__ = self
            pairs = [(k, v) for k, v in dict.items(obj) if not (isinstance(k, str) and TIMES.search(k))]
            return [*extra, str(same), *self._items(pairs, path), *([] if same else self._attributes(obj, path))]
        if isinstance(obj, (set, frozenset)):
            return [*sorted(short(repr(x)) for x in obj), *self._attributes(obj, path)]
        attributes = self._attributes(obj, path)
        if attributes:
            return attributes
        try:
            return self._each(obj.__reduce_ex__(4), path)
        except Exception:
            return [masked(repr(obj))]

    def _attributes(self, obj, path: str) -> list:
        chance = CHANCE if type(obj).__module__.startswith("sklearn") else NEVER
        slots = [s for base in type(obj).__mro__ for s in slots_of(base) if hasattr(obj, s)]
        found = [(s, getattr(obj, s)) for s in slots if s not in ("__dict__", "__weakref__")]
        held = getattr(obj, "__dict__", {})
        # the order of a library's attributes is its own business, and often that of a set
        for name, value in (
            held.items() if type(obj).__module__ == "__main__" else sorted(held.items(), key=lambda item: str(item[0]))
        ):
            if not isinstance(inspect.getattr_static(type(obj), name, None), functools.cached_property) and not chance.search(
                name
            ):
                found.append((name, value))
        return self._items(found, path)

    def _function(self, fn, path: str) -> list:
        if fn.__globals__ is not self._namespace:
            return [fn.__module__, fn.__qualname__]
        try:
            source = inspect.getsource(fn)
        except (OSError, TypeError) as error:
            source = f"no source: {error}"
        names = (
            "__defaults__",
            "__kwdefaults__",
            "__closure__",
            "__dict__",
            "__module__",
            "__doc__",
            "__name__",
            "__qualname__",
        )
        annotations = masked(repr(fn.__annotations__))
        return [source, annotations, *self._items([(name, getattr(fn, name)) for name in names], path)]

    def _class(self, cls, path: str) -> list:
        if cls.__module__ != "__main__":
            return [f"{cls.__module__}.{cls.__qualname__}"]
        skipped = {"__dict__", "__weakref__", "__abstractmethods__", "_abc_impl", "__slotnames__", "__firstlineno__"}
        members = [
            (name, value)
            for name, value in sorted(vars(cls).items(), key=lambda item: item[0] if _ORDERED.match(item[0]) else "~")
            if name not in skipped and not isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType))
        ]
        return [cls.__qualname__, self._each(cls.__bases__, f"{path}.bases"), self._items(members, path)]

    # -- libraries: each gives the parts of an object of its own, or None for the general way -------------------------------

    def _numpy(self, obj, kind, path: str):
        import numpy as np

        if obj is np.random.mtrand._rand:
            return ["the global one"]
        if isinstance(obj, np.ma.MaskedArray):
            return [masked(repr(obj)), digest(obj.filled().tobytes()), str(obj.mask.tolist())]
        if isinstance(obj, np.dtype):
            return [str(obj.descr if obj.names else obj.str)]
        if isinstance(obj, (np.ndarray, np.generic)):
            parts = [str(obj.dtype.descr), str(obj.shape)]
            if isinstance(obj, np.ndarray):
                self._arrays.append((path, obj))
                fortran = obj.flags.f_contiguous and not obj.flags.c_contiguous
                parts += ["Fortran" if fortran else "C", str(obj.flags.writeable)]
            if obj.dtype.hasobject:
                return parts + self._each(obj.ravel().tolist(), path)
            packed = np.ascontiguousarray(obj)
            if obj.dtype.names:  # what lies between the fields is chance
                packed = packed.astype(np.dtype([(name, obj.dtype[name]) for name in obj.dtype.names]))
            return [*parts, str(obj.ravel()[:20].tolist()), digest(packed.tobytes())]
        return None

    def _pandas(self, obj, kind, path: str):
        import pandas as pd

        if isinstance(obj, pd.DataFrame):
            columns = [self._column(obj.iloc[:, i], f"{path}.{i}") for i in range(obj.shape[1])]
            parts = [self._of(obj.columns, f"{path}.columns"), self._of(obj.index, f"{path}.index"), short(obj.to_csv())]
            return [*parts, columns, self._of(obj.attrs, f"{path}.attrs"), str(obj.flags.allows_duplicate_labels)]
        if isinstance(obj, pd.Series):
            return [
                repr(obj.name),
                self._of(obj.index, f"{path}.index"),
                self._column(obj, path),
                self._of(obj.attrs, f"{path}.attrs"),
            ]
        if isinstance(obj, pd.Index):
            self._paths.pop(id(obj), None)  # which frames share an index is pandas' own business
            levels = [[str(level.dtype), short(str(level.tolist()))] for level in getattr(obj, "levels", ())]
            return [str(obj.dtype), repr(obj.names), short(str(obj.tolist())), repr(getattr(obj, "freq", None)), levels]
        if hasattr(obj, "ngroups"):  # a groupby
            return [repr(obj.keys), short(str({k: list(v) for k, v in obj.groups.items()})), self._of(obj.obj, f"{path}.obj")]
        if isinstance(
            obj, (pd.Timestamp, pd.Timedelta, pd.Interval, pd.Period, pd.offsets.BaseOffset, type(pd.NA), type(pd.NaT))
        ):
            return [repr(obj)]
        if hasattr(obj, "rolling") or type(obj).__name__ in (
            "Rolling",
            "Expanding",
            "ExponentialMovingWindow",
            "DatetimeIndexResampler",
        ):
            return [masked(repr(obj)), self._of(obj.obj, f"{path}.obj")]
        return None

    def _column(self, column, path: str) -> list:
        dtype = column.dtype
        categories = [str(dtype.categories.tolist()), str(dtype.ordered)] if hasattr(dtype, "categories") else []
        values = self._each(column.tolist(), path) if str(dtype) == "object" else [short(str(column.tolist()))]
        return [str(dtype), type(column.array).__name__, *categories, *values]

    def _matplotlib(self, obj, kind, path: str):
        import matplotlib.artist
        import matplotlib.figure

        if isinstance(obj, matplotlib.figure.FigureBase):
            return [
                str(obj.get_size_inches().tolist()),
                str(obj.dpi),
                *[self._of(a, f"{path}.axes{i}") for i, a in enumerate(obj.axes)],
            ]
        if isinstance(obj, matplotlib.artist.Artist):
            figure = obj.get_figure()
            whole = [self._of(figure, f"{path}.figure")] if figure is not None else []
            if hasattr(obj, "get_children") and hasattr(obj, "get_xlim"):
                text = [obj.get_title(), obj.get_xlabel(), obj.get_ylabel(), str(obj.get_xlim()), str(obj.get_ylim())]
                text += [obj.get_xscale(), obj.get_yscale()] + [t.get_text() for t in obj.get_xticklabels()]
                whole += text + [self._of(child, f"{path}.child{i}") for i, child in enumerate(obj.get_children())]
            for way in (
                "get_text",
                "get_xydata",
                "get_offsets",
                "get_paths",
                "get_array",
                "get_bbox",
                "get_color",
                "get_facecolor",
            ):
                if hasattr(obj, way) and not hasattr(obj, "get_xlim"):
                    try:
                        found = getattr(obj, way)()
                    except Exception as error:
                        found = type(error).__name__
                    whole.append(f"{way} {short(masked(str(getattr(found, 'tolist', lambda found=found: found)())))}")
            label = obj.get_label()  # an axis' is a text, placed anew at each drawing
            label = label if isinstance(label, str) else ""
            return [*whole, str(obj.get_visible()), str(obj.get_alpha()), label, str(obj.get_zorder())]
        if isinstance(obj, dict):
            return [short(masked(str(dict(obj))))]
        return [masked(type(obj).__name__)]

    _mpl_toolkits = _matplotlib

    def _seaborn(self, obj, kind, path: str):
        figure = getattr(obj, "figure", None)
        return None if figure is None or isinstance(obj, type) else [self._of(figure, f"{path}.figure")]

    def _polars(self, obj, kind, path: str):
        import polars as pl

        if isinstance(obj, pl.DataFrame):
            return [str(obj.schema), short(str(obj.to_dict(as_series=False)))]
        if isinstance(obj, pl.Series):
            return [obj.name, str(obj.dtype), short(str(obj.to_list()))]
        if isinstance(obj, pl.LazyFrame):
            return [masked(obj.explain())]
        return [masked(str(obj))]

    def _sqlite3(self, obj, kind, path: str):
        import sqlite3

        if isinstance(obj, sqlite3.Connection):
            factory = obj.row_factory
            try:
                obj.row_factory = None
                return [short("\n".join(obj.iterdump())), str(obj.in_transaction), str(factory), str(obj.total_changes > 0)]
            except sqlite3.ProgrammingError as error:
                return [str(error)]
            finally:
                obj.row_factory = factory
        return [masked(repr(obj))] if not isinstance(obj, type) else None

    def _logging(self, obj, kind, path: str):
        return [obj.name, str(obj.level), str(obj.disabled), str(len(obj.handlers))] if kind.__name__ == "Logger" else None

    def _decimal(self, obj, kind, path: str):
        return [repr(obj)] if not isinstance(obj, type) else None

    _fractions = _datetime = _zoneinfo = _uuid = _pathlib = _decimal
    _io = _decimal

    def _statsmodels(self, obj, kind, path: str):
        if isinstance(obj, (type, types.FunctionType, types.MethodType)) or not hasattr(obj, "__dict__"):
            return None
        kept = {name: value for name, value in vars(obj).items() if name not in ("_cache", "_data_attr", "data_in_cache")}
        return self._items(sorted(kept.items(), key=lambda item: str(item[0])), path)

    def _patsy(self, obj, kind, path: str):
        return [masked(repr(obj))[:LONG]] if not isinstance(obj, type) else None

    def _itertools(self, obj, kind, path: str):
        return [kind.__name__] if not isinstance(obj, type) else None


def process() -> dict[str, str]:
    """The settings of the process, of libraries where they are loaded."""
    loaded = sys.modules
    environment = {k: v for k, v in os.environ.items() if not re.match("JPY_|JUPYTER_|IPYTHON|MPLCONFIG|PWD|KERNEL|PYDEVD", k)}
    found = {"folder": Path.cwd().name, "environment": str(sorted(environment.items()))}
    if "matplotlib" in loaded:
        found["rcParams"] = str({k: v for k, v in loaded["matplotlib"].rcParams.items() if k != "backend"})
        found["backend"] = str(loaded["matplotlib"].rcParams._get_backend_or_none()).replace(
            "module://matplotlib_inline.backend_inline", "inline"
        )
    if "matplotlib.pyplot" in loaded:
        found["figures"] = str(loaded["matplotlib.pyplot"].get_fignums())
        found["interactive"] = str(loaded["matplotlib"].is_interactive())
    if "numpy" in loaded:
        found["numpy options"] = str(loaded["numpy"].get_printoptions())
        found["numpy errors"] = str(loaded["numpy"].geterr())
        found["numpy random"] = digest(
            str(loaded["numpy"].random.get_state()[1:]).encode() + loaded["numpy"].random.get_state()[1].tobytes()
        )
    if "random" in loaded:
        found["random"] = digest(str(loaded["random"].getstate()))
    if "pandas" in loaded:
        found["pandas options"] = str(pandas_options(loaded["pandas"]))
    if "sklearn" in loaded and hasattr(loaded["sklearn"], "get_config"):
        found["sklearn options"] = str(loaded["sklearn"].get_config())
    if "decimal" in loaded:
        found["decimal context"] = str(loaded["decimal"].getcontext())
    if "locale" in loaded:
        found["locale"] = str(loaded["locale"].setlocale(loaded["locale"].LC_ALL))
    found["warnings"] = str(sorted({(f[0], f[2].__name__) for f in sys.modules["warnings"].filters}))
    return found


def pandas_options(pandas) -> dict:
    names = ["display.max_rows", "display.max_columns", "display.width", "display.precision", "display.float_format",
             "display.max_colwidth", "mode.copy_on_write", "plotting.backend"]  # fmt: skip
    found = {}
    for name in names:
        try:
            found[name] = masked(str(pandas.get_option(name)))
        except (KeyError, AttributeError):
            continue
    return found


def slots_of(cls: type) -> list[str]:
    slots = vars(cls).get("__slots__", ())
    return [slots] if isinstance(slots, str) else [s for s in slots if isinstance(s, str)]


def masked(text: str) -> str:
    return re.sub("0x[0-9a-f]{6,}", "0x", text)


def digest(data) -> str:
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def short(text: str) -> str:
    return text if len(text) <= LONG else f"{text[:200]} … {len(text)} characters, {digest(text)}"
