"""A table of values and code by name, each as its digest: run under two environments, the two tables say what an upgrade costs.

    python tests/identity_table.py                the table of this environment, as JSON
    python tests/identity_table.py A.json …       which rows differ between tables that were stored
    python tests/identity_table.py --promise A.json …    the same tables as what tests/identities.json holds

Values are made anew by each process; code is defined as notebook cells are. What a library that isn't installed would give is
left out.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import itertools
import json
import linecache
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

from durable_nb import _fingerprint as fp

VALUES = {
    "": """
        none: None
        true: True
        small integers: [0, 1, -1, 255, 2**63 - 1, -2**63]
        a large integer: 7**200
        floats: [0.0, -0.0, 1.5, 1e300, float("inf"), 0.1 + 0.2]
        not a number: float("nan")
        a complex number: 1 - 2j
        text: "größe \\u4e16\\U0001f40d"
        a lone surrogate: "\\udcff"
        long text: "abc" * 50_000
        bytes: b"\\0\\xff"
        a bytearray: bytearray(b"ab")
        a memoryview: memoryview(b"ab")
        a range: range(1, 9, 2)
        a slice: slice(1, None, 2)
        an ellipsis: ...
        a tuple: (1, "a", (2.0,))
        nested lists: [[1], [2, [3]], []]
        a dict: {"a": 1, 2: [3], (4, 5): {"b": None}}
        a set of strings: {"a", "b", "c"}
        a mixed set: {1, "a", None, (2, "b"), frozenset({3})}
        a shared list: (lambda x: [x, x])([1])
        a cycle: (lambda x: x.append(x) or x)([1])
    """,
    "import collections, types": """
        an ordered dict: collections.OrderedDict(b=1, a=2)
        a defaultdict: collections.defaultdict(list, a=[1])
        a counter: collections.Counter("abca")
        a deque: collections.deque([1, 2], maxlen=5)
        a chain map: collections.ChainMap({"a": 1}, {"b": 2})
        a namespace: types.SimpleNamespace(a=1, b=[2])
        a mapping proxy: types.MappingProxyType({"a": 1})
        dict views: [{"a": 1}.keys(), {"a": 1}.values(), {"a": 1}.items()]
        a user dict: collections.UserDict(a=1)
        a library's classes: [collections.OrderedDict, collections.Counter, collections.abc.Mapping, types.SimpleNamespace]
        the types of things without a name: [type(None), type(...), type({}.keys()), type(len), type(lambda: 0), type((i for i in ()))]
    """,
    "import datetime as dt, zoneinfo": """
        a date: dt.date(2026, 11, 26)
        a datetime: dt.datetime(2026, 11, 26, 12, 30, 1, 5)
        a datetime with a zone: dt.datetime(2026, 11, 26, 12, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
        a datetime in UTC: dt.datetime(2026, 11, 26, 12, tzinfo=dt.timezone.utc)
        a time: dt.time(1, 2, fold=1)
        a timedelta: dt.timedelta(days=-1, microseconds=3)
        an offset: dt.timezone(dt.timedelta(hours=2), "here")
        classes of datetime: [dt.date, dt.datetime, dt.timedelta, dt.timezone]
    """,
    "import decimal, fractions, uuid, random, statistics, ipaddress, array, numbers, math, operator": """
        a decimal: decimal.Decimal("1.10")
        a decimal context: decimal.Context(prec=5)
        a fraction: fractions.Fraction(1, 3)
        a uuid: uuid.UUID(int=5)
        a generator of random numbers: random.Random(1)
        its system's one: random.SystemRandom()
        methods of the hidden generator: [random.random, random.choice]
        a normal distribution: statistics.NormalDist(1, 2)
        addresses: [ipaddress.ip_address("10.0.0.1"), ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_address("::1")]
        an array: array.array("d", [1.0, 2.0])
        getters: [operator.itemgetter(1), operator.attrgetter("a.b"), operator.methodcaller("m", 1, k=2)]
        functions of C modules: [len, print, sorted, math.sqrt, operator.add, math.pi]
        bound methods of builtins: ["x".join, [1].append, {}.get, dict.fromkeys]
        unbound methods of builtins: [str.upper, list.append, dict.items, int.__add__]
    """,
    "import pathlib, re, os, string, io, json, enum, http, logging, argparse, signal": """
        a path: pathlib.Path("a") / "b.csv"
        a pure path: pathlib.PurePosixPath("/a")
        classes of paths: [pathlib.Path, pathlib.PurePath, pathlib.PosixPath]
        a pattern: re.compile("a+", re.I | re.M)
        a match: re.match("(a)(b)?", "ac")
        flags: [re.I, re.I | re.M, http.HTTPStatus.OK, signal.SIGINT]
        a template: string.Template("$a")
        streams in memory: [io.StringIO("ab"), io.BytesIO(b"ab")]
        classes of streams: [io.StringIO, io.BytesIO, io.TextIOWrapper, io.RawIOBase]
        functions of modules: [os.path.join, json.loads, json.dumps, os.getcwd, open, string.capwords]
        encoders: [json.JSONEncoder(indent=2), json.JSONEncoder, json.JSONDecoder]
        a logger: logging.getLogger("a.b")
        arguments: argparse.Namespace(a=1)
        an environment: os.path
    """,
    "import asyncio, threading, queue, contextvars, concurrent.futures, subprocess, weakref, sqlite3": """
        primitives of asyncio: [asyncio.Semaphore(3), asyncio.Lock(), asyncio.Queue(5), asyncio.Event()]
        classes of asyncio: [asyncio.Semaphore, asyncio.Queue, asyncio.TimeoutError, asyncio.CancelledError, asyncio.TaskGroup]
        functions of asyncio: [asyncio.sleep, asyncio.gather, asyncio.to_thread, asyncio.run]
        primitives of threading: [threading.Lock(), threading.RLock(), threading.Event(), threading.Semaphore(2)]
        queues: [queue.Queue(3), queue.SimpleQueue()]
        executors: concurrent.futures.ThreadPoolExecutor(2)
        classes of executors: [concurrent.futures.ThreadPoolExecutor, concurrent.futures.Future, concurrent.futures.wait]
        errors of modules: [subprocess.CalledProcessError(1, "a"), sqlite3.OperationalError("a"), queue.Empty()]
        a database in memory: sqlite3.connect(":memory:")
    """,
    "import functools, itertools, typing, collections.abc, dataclasses, abc, contextlib": """
        partials: [functools.partial(int, base=2), functools.partial(sorted, key=len)]
        errors: [ValueError("a", 1), KeyError("k"), OSError(2, "gone", "f"), ExceptionGroup("g", [ValueError(1)]), StopIteration()]
        iterators: [iter([1, 2]), iter((1,)), zip([1], [2]), map(len, ["a"]), enumerate(["a"]), reversed([1]), iter({"a": 1})]
        iterators of itertools: [itertools.count(3), itertools.chain([1], [2]), itertools.product("ab", repeat=2), itertools.repeat(1)]
        builtin generics: [list[int], dict[str, list[int]], tuple[int, ...], type[int]]
        unions: [int | None, typing.Optional[int], typing.Union[int, None], typing.Union[int, str]]
        typing's generics: [typing.List[int], typing.Dict[str, int], typing.Callable[[int], str], typing.Iterable[int]]
        special forms: [typing.Any, typing.ClassVar[int], typing.Literal["a", 1], typing.Annotated[int, "m"], typing.NoReturn]
        callables of collections: collections.abc.Callable[[int], str]
        a type variable: typing.TypeVar("T", bound=int)
        a new type: typing.NewType("UserId", int)
        decorators: [functools.lru_cache, functools.wraps, functools.cached_property, contextlib.contextmanager, dataclasses.dataclass]
        functions of functools: [functools.reduce, functools.cmp_to_key(max)]
        context managers: [contextlib.nullcontext(1), contextlib.suppress(ValueError)]
        bases: [abc.ABC, abc.ABCMeta, typing.Protocol, typing.NamedTuple, typing.TypedDict, typing.Generic]
    """,
    "import urllib.parse, email.message, xml.etree.ElementTree as ET, csv, struct, tempfile, copy, hashlib": """
        a parsed address: urllib.parse.urlparse("https://a/b?c=1")
        a struct: struct.Struct("<i")
        functions of libraries: [urllib.parse.urlencode, copy.deepcopy, hashlib.sha256, tempfile.mkdtemp, csv.reader, ET.fromstring]
        classes of libraries: [ET.Element, email.message.EmailMessage, csv.DictReader, tempfile.TemporaryDirectory]
    """,
    "import numpy as np": """
        an array of integers: np.arange(6).reshape(2, 3)
        an array of floats: np.linspace(0, 1, 5)
        a large array: np.arange(100_000.0)
        a column-major array: np.asfortranarray(np.arange(6).reshape(2, 3))
        a strided view: np.arange(10)[::2]
        a read-only array: (lambda a: a.setflags(write=False) or a)(np.arange(3))
        an array of booleans: np.array([True, False])
        an array of text: np.array(["a", "bcd"])
        an array of bytes: np.array([b"a", b"bcd"])
        an array of objects: np.array([1, "a", None], dtype=object)
        an array of dates: np.array(["2026-11-26", "NaT"], dtype="datetime64[s]")
        an array of durations: np.array([1, 2], dtype="timedelta64[ms]")
        a record array: np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
        a masked array: np.ma.array([1, 2], mask=[False, True])
        numpy's integers: [np.int64(1), np.int32(1), np.uint8(1), np.intp(1), np.longlong(1), np.int16(-1)]
        numpy's floats: [np.float64(1.5), np.float32(1.5), np.float16(1.5), np.float64("nan")]
        numpy's booleans: [np.bool_(True), np.bool_(False)]
        numpy's text: [np.str_("a"), np.bytes_(b"a")]
        numpy's dates: [np.datetime64("2026-11-26"), np.timedelta64(1, "h")]
        types of elements: [np.dtype("f8"), np.dtype("U3"), np.dtype("bool"), np.dtype("O"), np.dtype("M8[ns]"), np.dtype(">i4")]
        classes of numpy: [np.ndarray, np.float64, np.int64, np.bool_, np.dtype, np.random.Generator, np.generic, np.str_]
        functions of numpy: [np.mean, np.linalg.norm, np.add, np.concatenate, np.random.default_rng, np.fft.fft, np.asarray]
        methods of numpy's hidden generator: [np.random.rand, np.random.seed]
        a generator of numpy: np.random.default_rng(0)
        numpy's old generator: np.random.RandomState(0)
        a polynomial: np.poly1d([1, 2])
        a new polynomial: np.polynomial.Polynomial([1, 2])
        a vectorised function: np.vectorize(len)
        a matrix: np.matrix([[1, 2]])
    """,
    "import pandas as pd, numpy as np": """
        a series of integers: pd.Series([1, 2, 3], name="n")
        a series of floats: pd.Series([1.0, None])
        a series of booleans: pd.Series([True, False])
        a series of text: pd.Series(["a", "b"])
        a series of text with a gap: pd.Series(["a", None])
        a series of objects: pd.Series([1, "a", None], dtype=object)
        a series of dates: pd.Series(pd.to_datetime(["2026-11-26", "2026-11-27"]))
        a series of dates in ns: pd.Series(np.array(["2026-11-26"], dtype="datetime64[ns]"))
        a series of dates with a zone: pd.Series(pd.to_datetime(["2026-11-26"]).tz_localize("Europe/Berlin"))
        a series of durations: pd.Series(pd.to_timedelta(["1h", "2h"]))
        a series of categories: pd.Series([1, 2, 1], dtype="category")
        a series of text categories: pd.Series(["a", "b", "a"], dtype="category")
        a nullable series: pd.Series([1, None], dtype="Int64")
        a series of python strings: pd.Series(["a", None], dtype="string[python]")
        a series of arrow strings: pd.Series(["a", None], dtype="string[pyarrow]")
        an arrow series: pd.Series([1, None], dtype="int64[pyarrow]")
        a sparse series: pd.Series([0, 0, 1], dtype="Sparse[int64]")
        a series of periods: pd.Series(pd.period_range("2026-01", periods=2, freq="M"))
        a series of intervals: pd.Series(pd.interval_range(0, 2))
        a series with labels: pd.Series([1, 2], index=["a", "b"])
        a frame: pd.DataFrame({"a": [1, 2], "b": [1.0, None]})
        a frame of text: pd.DataFrame({"a": ["x", "y"]})
        a frame without labels: pd.DataFrame([[1, 2], [3, 4]])
        a frame with an index: pd.DataFrame({"a": [1, 2]}, index=pd.MultiIndex.from_tuples([("x", 1), ("y", 2)], names=["k", "n"]))
        a frame with dates: pd.DataFrame({"v": [1.0, 2.0]}, index=pd.date_range("2026-11-26", periods=2))
        an index of integers: pd.Index([3, 1])
        an index of labels: pd.Index(["a", "b"])
        a range index: pd.RangeIndex(5)
        an index of dates: pd.date_range("2026-11-26", periods=3, freq="D")
        an index of categories: pd.CategoricalIndex(["a", "b"])
        a categorical: pd.Categorical([1, 2], categories=[1, 2, 3], ordered=True)
        extension arrays: [pd.array([1, None], dtype="Int64"), pd.array([True, None], dtype="boolean"), pd.array([1.5], dtype="Float64")]
        a timestamp: pd.Timestamp("2026-11-26 12:30")
        a timestamp of parts: pd.Timestamp(2026, 11, 26)
        a timestamp with a zone: pd.Timestamp("2026-11-26 12:30", tz="Europe/Berlin")
        a timestamp in ns: pd.Timestamp("2026-11-26 12:30:00.123456789")
        timestamps of other units: [pd.Timestamp("2026-11-26").as_unit("ns"), pd.Timestamp("2026-11-26").as_unit("ms")]
        a timedelta of pandas: pd.Timedelta("1h")
        a timedelta of parts: pd.Timedelta(hours=1, minutes=2)
        nothing in pandas: [pd.NaT, pd.NA]
        a period: pd.Period("2026-11", freq="M")
        an interval: pd.Interval(0, 1, closed="both")
        offsets: [pd.offsets.Day(2), pd.offsets.MonthEnd(), pd.DateOffset(months=1), pd.offsets.BusinessDay(), pd.offsets.Hour(3)]
        types of columns: [pd.CategoricalDtype(["a"]), pd.Int64Dtype(), pd.DatetimeTZDtype("ns", "UTC"), pd.PeriodDtype("M")]
        classes of pandas: [pd.DataFrame, pd.Series, pd.Index, pd.Timestamp, pd.Categorical, pd.Timedelta, pd.MultiIndex, pd.Grouper]
        functions of pandas: [pd.concat, pd.merge, pd.to_datetime, pd.isna, pd.date_range, pd.cut]
        readers of pandas: [pd.read_csv, pd.read_parquet, pd.read_json, pd.read_excel]
        methods of pandas: [pd.DataFrame.mean, pd.Series.map, pd.DataFrame.groupby]
        a grouper: pd.Grouper(key="a")
        a named aggregate: pd.NamedAgg("a", "mean")
        attributes of a frame: (lambda f: f.attrs.update(a=1) or f)(pd.DataFrame([[1]]))
        errors of pandas: [pd.errors.EmptyDataError("a"), pd.errors.ParserError]
    """,
    "import pyarrow as pa": """
        an arrow array: pa.array([1, None])
        an arrow table: pa.table({"a": [1, 2], "b": ["x", None]})
        arrow types: [pa.int64(), pa.string(), pa.list_(pa.int8()), pa.timestamp("us", "UTC")]
        an arrow schema: pa.schema([("a", pa.int64())])
        functions of pyarrow: [pa.array, pa.table, pa.Table]
    """,
    "import httpx": """
        an address of httpx: httpx.URL("https://a/b")
        parts of httpx: [httpx.Timeout(5), httpx.Headers({"a": "b"}), httpx.Limits(max_connections=3), httpx.QueryParams(a=1)]
        classes of httpx: [httpx.Client, httpx.AsyncClient, httpx.Response, httpx.HTTPStatusError]
        a client of httpx: httpx.Client(base_url="https://a")
    """,
    "import sklearn.linear_model, sklearn.preprocessing, sklearn.pipeline": """
        estimators: [sklearn.linear_model.LinearRegression(), sklearn.preprocessing.StandardScaler(with_mean=False)]
        a pipeline: sklearn.pipeline.make_pipeline(sklearn.preprocessing.StandardScaler(), sklearn.linear_model.Ridge(alpha=2))
        classes of scikit-learn: [sklearn.linear_model.Ridge, sklearn.pipeline.Pipeline]
    """,
    "import scipy.sparse, scipy.stats": """
        a sparse matrix: scipy.sparse.csr_matrix([[0, 1], [2, 0]])
        functions of scipy: [scipy.stats.zscore, scipy.sparse.eye]
    """,
    "import polars as pl": """
        a frame of polars: pl.DataFrame({"a": [1, None], "b": ["x", "y"]})
        a series of polars: pl.Series("n", [1.0, 2.0])
        classes of polars: [pl.DataFrame, pl.LazyFrame, pl.Int64, pl.col]
    """,
}

CODE = {
    "a function": "def f(a, b=2, *c, d=3, **e): return a + b",
    "a function with a path": "from pathlib import Path\ndef f(x): return Path(x).read_text()",
    "a function with an import inside": "def f(x):\n    from pathlib import Path\n    return Path(x)",
    "a function with modules": "import json, os.path\ndef f(x): return json.dumps(os.path.join('a', x))",
    "a lambda": "f = lambda x: x * 2",
    "a closure": "def make(k):\n    def inner(x): return x + k\n    return inner\nf = make(3)",
    "a comprehension": "K = 3\ndef f(x): return [K * i for i in x if i], {i: K for i in x}, {K for _ in x}",
    "nested comprehensions": "def f(x): return [[y * z for y in x] for z in x]",
    "a generator": "def f(x):\n    yield from (i for i in x)",
    "a coroutine": "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return [i async for i in x]",
    "an f-string": "def f(x): return f'{x!r:>{3}} {{}} {x=} a' 'b'",
    "nested f-strings": "def f(x): return f'{x + f\"{x}\"}'",
    "a match": "def f(x):\n    match x:\n        case {'a': [1, *r]} | {'b': r}: return r\n        case str() as s if s: return s\n        case _: return None",
    "a try": "def f(x):\n    try: return 1\n    except* ValueError as e: x = e\n    finally: pass",
    "a walrus": "def f(x): return (y := x) and y",
    "a global": "K = [1, 2]\ndef f(): return K",
    "a helper": "def g(x): return x + 1\ndef f(x): return g(x)",
    "a decorated function": "import functools\ndef d(fn):\n    @functools.wraps(fn)\n    def inner(*a): return fn(*a)\n    return inner\n@d\ndef f(x): return x",
    "a cached function": "import functools\n@functools.lru_cache\ndef f(x): return x",
    "annotations": "from typing import Optional\ndef f(x: Optional[int] = None, y: 'list[str]' = ()) -> dict[str, int]: return x",
    "a docstring": "def f(x):\n    '''Does.\n\n        Indented.\n    '''\n    return x",
    "a docstring that is read": "def g():\n    '''Does.\n\n        Indented.\n    '''\ndef f(): return g.__doc__",
    "a class": "class f:\n    k = 1\n    def __init__(self, a): self.a = a\n    @property\n    def p(self): return self.a\n    @staticmethod\n    def s(): return 1\n    @classmethod\n    def c(cls): return cls",
    "a class with annotations": "class f:\n    a: int\n    b: 'str' = 'x'\n    c: list[int] | None = None",
    "a class with paths": "from pathlib import Path\nclass f:\n    a: Path\n    b: Path | None = None",
    "a subclass": "class A:\n    def m(self): return 1\nclass f(A):\n    def m(self): return super().m()",
    "slots": "class f:\n    __slots__ = ('a', 'b')\n    def __init__(self): self.a = 1",
    "a dataclass": "import dataclasses\n@dataclasses.dataclass\nclass f:\n    a: int\n    b: list = dataclasses.field(default_factory=list)",
    "a frozen dataclass with slots": "import dataclasses\n@dataclasses.dataclass(frozen=True, slots=True, order=True)\nclass f:\n    a: int = 1",
    "an enumeration": "import enum\nclass f(enum.Enum):\n    A = 1\n    B = 'b'\n    def m(self): return 1",
    "a flag": "import enum\nclass f(enum.IntFlag):\n    A = enum.auto()\n    B = enum.auto()",
    "a string enumeration": "import enum\nclass f(enum.StrEnum):\n    A = 'a'",
    "a named tuple": "import typing\nclass f(typing.NamedTuple):\n    a: int\n    b: str = 'x'",
    "an old named tuple": "import collections\nf = collections.namedtuple('f', 'a b', defaults=[1])",
    "a typed dict": "import typing\nclass f(typing.TypedDict, total=False):\n    a: int\n    b: typing.Required[str]",
    "a protocol": "import typing\n@typing.runtime_checkable\nclass f(typing.Protocol):\n    def m(self) -> int: ...",
    "a generic class": "import typing\nT = typing.TypeVar('T')\nclass f(typing.Generic[T]):\n    def m(self, x: T) -> T: return x",
    "an abstract class": "import abc\nclass f(abc.ABC):\n    @abc.abstractmethod\n    def m(self): return 1",
    "a metaclass": "class M(type):\n    def __call__(cls): return 1\nclass f(metaclass=M): pass",
    "a descriptor": "class D:\n    def __get__(self, o, t): return 1\n    def __set_name__(self, o, n): self.n = n\nclass f:\n    d = D()",
    "cached properties": "import functools\nclass f:\n    @functools.cached_property\n    def p(self): return 1\n    @functools.singledispatchmethod\n    def m(self, x): return x",
    "a dispatching function": "import functools\n@functools.singledispatch\ndef f(x): return 0\n@f.register\ndef _(x: int): return 1",
    "a context manager": "import contextlib\n@contextlib.contextmanager\ndef f(x): yield x",
    "an exception": "class f(ValueError):\n    def __init__(self, a): super().__init__(a)",
    "private names": "class f:\n    def __secret(self): return self.__x\n    def m(self): return self.__secret()",
    "an instance": "class C:\n    def __init__(self): self.a = 1; self.b = [2]\nf = C()",
    "an instance of a dataclass": "import dataclasses\n@dataclasses.dataclass\nclass C:\n    a: int = 1\nf = C()",
    "a bound method": "class C:\n    def m(self): return 1\nf = C().m",
    "a member": "import enum\nclass C(enum.Enum):\n    A = 1\nf = C.A",
    "an instance of a named tuple": "import typing\nclass C(typing.NamedTuple):\n    a: int = 1\nf = C()",
    "a partial": "import functools\ndef g(a, b): return a\nf = functools.partial(g, 1, b=2)",
    "an own exception": "class E(Exception): pass\nf = E('a')",
    "a subclass of dict": "class D(dict): pass\nf = D(a=1)",
    "a function with numpy": "import numpy as np\nfrom numpy import mean\ndef f(x): return np.linalg.norm(x) + mean(x)",
    "a function with pandas": "import pandas as pd\nfrom pandas import DataFrame, read_csv\ndef f(x): return DataFrame(pd.concat([read_csv(x)]))",
    "a subclass of a frame": "import pandas as pd\nclass f(pd.DataFrame):\n    def m(self): return 1",
    "a model": "import pydantic\nclass f(pydantic.BaseModel):\n    '''A prompt.'''\n    a: int = pydantic.Field(description='d', ge=1)\n    b: list[str] | None = None",
    "an instance of a model": "import pydantic\nclass C(pydantic.BaseModel):\n    a: int = 1\nf = C()",
    "an estimator of one's own": "from sklearn.base import BaseEstimator\nclass f(BaseEstimator):\n    def fit(self, x): return self",
}  # fmt: skip


def _cell(source: str, number: int) -> dict[str, Any]:
    """The namespace after a notebook cell ran: its text is in linecache, its module is __main__."""
    filename = f"/tmp/ipykernel_1/identity_table_{number}.py"
    source = textwrap.dedent(source)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, filename, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True), space)
    return space


def _is_installed(source: str) -> bool:
    names = {
        alias.name.partition(".")[0] if isinstance(node, ast.Import) else str(node.module).partition(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    return all(importlib.util.find_spec(name) for name in names)


def values() -> dict[str, Any]:
    """Every value of the table, made now."""
    made: dict[str, Any] = {}
    for imports, rows in VALUES.items():
        if not _is_installed(imports):
            continue
        space: dict[str, Any] = {"__name__": "table"}
        exec(imports, space)
        for row in textwrap.dedent(rows).strip().splitlines():
            name, _, expression = row.partition(": ")
            made[name] = eval(expression, space)
    return made


def code() -> dict[str, Any]:
    """Every function and class of the table, and instances of such."""
    numbers = itertools.count()
    return {name: _cell(source, next(numbers))["f"] for name, source in CODE.items() if _is_installed(source)}


def table() -> dict[str, str]:
    """By name the digest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {**values(), **code()}
        found = {name: fp.of_value(value).digest for name, value in made.items()}
    for value in made.values():
        if type(value).__name__ in {"Connection", "Client"}:
            value.close()
    return found


GENERATIONS = {
    "Python below 3.14": lambda: sys.version_info < (3, 14),
    "pandas 2": lambda: importlib.metadata.version("pandas").startswith("2."),
    "numpy 1": lambda: importlib.metadata.version("numpy").startswith("1."),
}
"""What an environment may be that makes values themselves others."""


def generations() -> list[str]:
    return [name for name, holds in GENERATIONS.items() if holds()]


def environment() -> dict[str, Any]:
    return {"generations": generations(), "format": fp.FORMAT, "rows": table()}


def differing(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """By row the environments of each digest, where there is more than one."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, held in tables.items():
        for row, digest in held["rows"].items():
            found.setdefault(row, {}).setdefault(digest, []).append(name)
    return {row: digests for row, digests in found.items() if len(digests) > 1}


def promised(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """One digest a row; two, where they follow from one generation."""
    rows: dict[str, Any] = {}
    for row in dict.fromkeys(row for held in tables for row in held["rows"]):
        having = [(held["generations"], held["rows"][row]) for held in tables if row in held["rows"]]
        if len({digest for _, digest in having}) == 1:
            rows[row] = having[0][1]
            continue
        for name in GENERATIONS:
            by_generation = {is_so: {digest for those, digest in having if (name in those) is is_so} for is_so in (True, False)}
            if all(len(digests) == 1 for digests in by_generation.values()):
                rows[row] = {name: by_generation[True].pop(), "else": by_generation[False].pop()}
                break
        else:
            raise SystemExit(f"{row}: no generation tells its digests apart")
    return {"format": tables[0]["format"], "rows": rows}


if __name__ == "__main__":
    paths = [argument for argument in sys.argv[1:] if argument != "--promise"]
    stored = {path: json.loads(Path(path).read_text()) for path in paths}
    if sys.argv[1:2] == ["--promise"]:
        print(json.dumps(promised(list(stored.values())), indent=1))
    elif paths:
        for row, digests in differing(stored).items():
            print(f"{row}: " + " | ".join(" ".join(environments) for environments in digests.values()))
    else:
        print(json.dumps(environment(), indent=1))
