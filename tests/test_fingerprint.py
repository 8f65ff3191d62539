"""Identities: equal things get equal digests in every process, unequal things never do."""

# Sources and values stand in tables, one to a line; plain namedtuples and naive datetimes are among the values.
# ruff: noqa: E501, DTZ001, PYI024, SLOT000, FLY002, FURB167, ICN001, PTH118

from __future__ import annotations

import ast
import asyncio
import base64
import collections
import concurrent.futures
import contextvars
import copy
import csv
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import importlib
import importlib.util
import io
import itertools
import linecache
import os
import pathlib
import pickle
import queue
import re
import sqlite3
import subprocess
import sys
import textwrap
import threading
import types
import uuid
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pyarrow as pa
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings

from durable_nb import _fingerprint as fp
from durable_nb._fingerprint import _identities

ROOT = pathlib.Path(__file__).resolve().parents[1]
counter = itertools.count()


def hashed(value):
    return fp.hash_value(value)


def wide(value):
    """So many neighbours that the whole is written layer by layer, not node by node."""
    return [value, *range(20)]


def cell(source, **names):
    """A namespace after `source` ran in it as a notebook cell: its text is in linecache, its module is __main__."""
    filename = f"/tmp/ipykernel_1/{next(counter)}.py"
    source = textwrap.dedent(source)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    space = {"__name__": "__main__", **names}
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    exec(compile(source, filename, "exec", flags, dont_inherit=True), space)
    return space


def step(source, name="f", *args, **names):
    return fp.of_call(cell(source, **names)[name], args).digest


def differ(*sources, name="f"):
    digests = [step(source, name) for source in sources]
    assert len(set(digests)) == len(digests)


def same(*sources, name="f"):
    assert len({step(source, name) for source in sources}) == 1


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self, a):
        self.a = a


@dataclasses.dataclass
class Item:
    name: str
    price: float = 1.0
    tags: list = dataclasses.field(default_factory=list)


class MyList(list):
    pass


class MyDict(dict):
    pass


class MyInt(int):
    pass


class MyStr(str):
    pass


class MySet(set):
    pass


class Same(collections.namedtuple("Same", "a b")):
    __slots__ = ()


Pair = collections.namedtuple("Pair", "a b")
Other = collections.namedtuple("Other", "a b")


# ---- values ----

# in pandas 2 a column of texts is one of objects, so the second is no other value there
_TEXTS_AS_OBJECTS = [pd.Series(["a"], dtype=object)] if pd.Series(["a"]).dtype != object else []

DISTINCT = [
    None, False, True, 0, 1, -1, 0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf"), 1j, complex(0.0, -0.0), 0j,
    2**63, 2**64, -(2**63), -(2**63) - 1, 2**100, 10**5000, "", "1", "a", "\ud800", b"", b"a", b"1", bytearray(b"a"),
    memoryview(b"a"), (), [], {}, set(), frozenset(), [()], [[]], ([],), ((),), [1], (1,), {1}, frozenset([1]), [True],
    [1, 2], [2, 1], [[1], 2], [[1, 2]], {"a": 1}, {"a": 1.0}, {"a": 1, "b": 2}, {"b": 2, "a": 1}, {1: "a"}, {True: "a"},
    range(3), range(0, 3, 2), slice(3), slice(0, 3), ..., NotImplemented, datetime.date(2020, 1, 1),
    datetime.datetime(2020, 1, 1), datetime.datetime(2020, 1, 1, fold=1),
    datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), datetime.time(1), datetime.time(1, fold=1),
    datetime.timedelta(1), datetime.timedelta(0, 1), datetime.timezone(datetime.timedelta(hours=1)),
    datetime.timezone(datetime.timedelta(hours=1), "x"), decimal.Decimal("1.0"), decimal.Decimal("1.00"),
    decimal.Decimal("-0"), decimal.Decimal(0), decimal.Decimal("NaN"), decimal.Decimal("sNaN"),
    fractions.Fraction(1), fractions.Fraction(1, 3), uuid.UUID(int=1), pathlib.Path("a"), pathlib.PurePosixPath("a"),
    pathlib.PureWindowsPath("a"), re.compile("a"), re.compile(b"a"), re.compile("a", re.I), Colour.RED, Colour.BLUE,
    types.SimpleNamespace(a=1), types.SimpleNamespace(a=2), types.MappingProxyType({"a": 1}),
    collections.deque([1]), collections.deque([1], 3), collections.OrderedDict(a=1), collections.Counter(a=1),
    collections.defaultdict(int, a=1), collections.defaultdict(list, a=1), Pair(1, 2), Other(1, 2), (1, 2), Same(1, 2),
    ValueError("a"), TypeError("a"), ValueError("b"), Point(1, 2), Point(2, 1), Slotted(1), Slotted(2), Item("a"),
    Item("a", 2.0), MyList(), MyList([1]), MyDict(), MyDict(a=1), MyInt(1), MyStr("a"), MySet(), MySet([1]), int, float, len,
    print, [].append, [1].append, list[int], list[str], int | str, os, sys, os.path.join, collections.OrderedDict,
    functools.partial(int, 2), functools.partial(int, 3), functools.partial(float, 2), object(), {}.keys(), {}.values(),
    "a" * 100_000, "b" * 100_000, b"a" * 100_000, 1 << 1_000_000, (1 << 1_000_000) + 1,
    np.int64(1), np.int32(1), np.float64(1), np.float64(0.0), np.float64(-0.0), np.bool_(True), np.str_("a"),
    np.datetime64("2020-01-01"), np.datetime64("2020-01-01T00"), np.float64("nan"), np.float32("nan"),
    np.dtype("int64"), np.dtype(">i8"), np.dtype([("a", "i4")]), np.dtype([("b", "i4")]), np.add, np.sum, np,
    np.array(1), np.array([1]), np.array([[1]]), np.array([1, 2]), np.array([[1, 2]]), np.array([[1], [2]]),
    np.array([1], "i4"), np.array([1], ">i8"), np.array([1], "u8"), np.array([1.0]), np.array([0.0]), np.array([-0.0]),
    np.array([], "i8"), np.array([], "f8"), np.zeros((0, 2)), np.zeros((2, 0)), np.array([1], object),
    np.array([True], object), np.array([1.0], object), np.array(["a"]), np.array(["a"], "U2"), np.array([b"a"]),
    np.array([(1,)], [("a", "i4")]), np.array([(1,)], [("b", "i4")]), np.array([1], "M8[s]"), np.array([1], "M8[ms]"),
    np.array([1], "m8[s]"), np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2], mask=[1, 0]), np.ma.array([1, 2]),
    np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]], order="F"), np.array([[1, 3], [2, 4]]),
    pd.Timestamp("2020"), pd.Timestamp("2020", tz="UTC"), pd.Timedelta(1), pd.NaT, pd.NA, pd.Period("2020"),
    pd.Series([1]), pd.Series([1], name="a"), pd.Series([1], index=[1]), pd.Series([1.0]), pd.Series([1], dtype="Int64"),
    pd.Series([1], dtype="int32"), pd.Series(["a"], dtype="str"), *_TEXTS_AS_OBJECTS,
    pd.Series(["a"], dtype="string[pyarrow]"), pd.Series(["a"], dtype="string[python]"),
    pd.Series(["a"], dtype="category"), pd.Series(["a"], dtype=pd.CategoricalDtype(["a", "b"])),
    pd.Series(["a"], dtype=pd.CategoricalDtype(["a"], ordered=True)), pd.Series([1], dtype=pd.ArrowDtype(pa.int64())),
    pd.Series([None, "a"], dtype="str"), pd.Series(["", "a"], dtype="str"), pd.Series(["a", ""], dtype="str"),
    pd.Series(["ab", ""], dtype="str"), pd.Series(["a", "b"], dtype="str"), pd.Series([1, None], dtype="Int64"),
    pd.Series([1, 0], dtype="Int64"), pd.Series([1], dtype="Sparse[int]"), pd.Series(pd.date_range("2020", periods=1)),
    pd.Series(pd.date_range("2020", periods=1, tz="UTC")), pd.Series(pd.date_range("2020", periods=1, tz="Europe/Paris")),
    pd.Index([1]), pd.Index([1], name="a"), pd.RangeIndex(1), pd.Index([0]), pd.MultiIndex.from_tuples([(1, 2)]),
    pd.MultiIndex.from_tuples([(1, 2)], names=["a", "b"]), pd.date_range("2020", periods=3),
    pd.DatetimeIndex(list(pd.date_range("2020", periods=3))), pd.interval_range(0, 2), pd.interval_range(0, 2, closed="left"),
    pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [1]}), pd.DataFrame({"a": [1.0]}), pd.DataFrame({"a": [1], "b": [2]}),
    pd.DataFrame({"b": [2], "a": [1]}), pd.DataFrame({"a": [1]}, index=["x"]), pd.DataFrame({"a": []}), pd.DataFrame(),
    pd.DataFrame({"a": [[1]]}), pd.DataFrame({"a": [1]}).set_flags(allows_duplicate_labels=False),
    pa.array([1]), pa.array([1], pa.int32()), pa.array([1, None]), pa.array([1, 0]), pa.array(["a"]),
    pa.array(["a"], pa.large_string()), pa.array([[1], []]), pa.array([[], [1]]), pa.array([{"a": 1}]),
    pa.array([{"b": 1}]), pa.array([True]), pa.array([False]), pa.array([None]), pa.array(["a"]).dictionary_encode(),
    pa.chunked_array([[1]]), pa.table({"a": [1]}), pa.table({"b": [1]}), pa.int64(), pa.int32(), pa.scalar(1),
    pa.scalar(2), pa.scalar(None), pa.table({"a": [1]}).schema, pa.table({"a": [1]}).replace_schema_metadata({"k": "v"}),
]  # fmt: skip


def test_no_two_distinct_values_share_a_digest():
    """Type, dtype, order, sign of zero, names, shape, time zone …: whatever tells two values apart tells their digests apart."""
    seen = {}
    for value in DISTINCT:
        for wrapped in (
            value,
            ["in", value],
            ("in", value),
            {"in": value},
            wide(value),
            tuple(wide(value)),
            wide(["in", value]),
        ):
            digest = hashed(wrapped)
            assert digest not in seen, (wrapped, seen[digest])
            seen[digest] = wrapped


def test_every_distinct_value_is_known_by_content():
    """None of the values above is opaque."""
    for value in DISTINCT:
        assert fp.of_value(value).opaque == (), value


@pytest.mark.parametrize("value", DISTINCT, ids=lambda value: type(value).__name__)
def test_a_value_that_went_through_pickle_keeps_its_digest(value):
    """The restored value is the same input, unless pickle itself has turned it into something else."""
    try:
        restored = pickle.loads(pickle.dumps(value, protocol=5))
    except TypeError:
        pytest.skip("pickle refuses it")
    assert hashed(restored) == hashed(value)
    assert hashed(wide(restored)) == hashed(wide(value))


def test_looking_changes_nothing():
    """Hashing twice gives the same digest."""
    for value in DISTINCT:
        assert hashed(value) == hashed(value)


def test_looking_at_annotations_leaves_them_unevaluated():
    """From Python 3.14 they are code, and what they gave when they were first asked for stays."""
    source = """
        import inspect, typing
        T = int
        class A:
            a: T
        class B(typing.NamedTuple):
            a: T
        def f(x: T = 0, y: "later" = 1): return inspect.signature(f), inspect.signature(A), B
    """
    space = cell(source)
    classes = [space["A"], space["B"]]
    before = [dict(vars(cls)) for cls in classes]
    found = fp.of_call(space["f"]).digest
    assert [dict(vars(cls)) for cls in classes] == before
    assert step(source.replace("T = int", "T = str")) != found
    if sys.version_info >= (3, 14):
        space["T"] = str
        assert space["f"].__annotations__ == {"x": str, "y": "later"}


@pytest.mark.skipif(sys.version_info < (3, 14), reason="annotations are evaluated when they are asked for from Python 3.14 on")
def test_annotations_that_name_nothing_yet_are_no_hindrance():
    space = cell(
        "class A:\n    a: later\n    def m(self, x: later) -> A: return x\ndef f(x: later): return A, inspect\nimport inspect"
    )
    assert fp.of_call(space["f"]).opaque == ()


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text(max_size=4) | st.binary(max_size=4)
)
keys = st.booleans() | st.integers(-3, 3) | st.text(max_size=2) | st.floats(allow_nan=False) | st.tuples(st.integers(0, 2))
nested = st.recursive(
    scalars | st.sampled_from([0, 0.0, -0.0, False, 1, True, 1.0, "", b""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=3)
        | st.sets(keys, max_size=3)
        | st.frozensets(keys, max_size=3)
    ),
    max_leaves=6,
)


def identical(a, b):
    """Strict, typed equality with dict order; the specification that the hasher is held to."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a.hex() == b.hex()
    if isinstance(a, complex):
        return identical(a.real, b.real) and identical(a.imag, b.imag)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, dict):
        return identical(list(a.items()), list(b.items()))
    if isinstance(a, set | frozenset):
        left = list(b)
        for one in a:
            match = next((i for i, two in enumerate(left) if identical(one, two)), None)
            if match is None:
                return False
            left.pop(match)
        return not left
    return a == b


@settings(max_examples=400, deadline=None)
@given(nested, nested)
def test_digests_are_equal_exactly_when_values_are_identical(a, b):
    assert (hashed(a) == hashed(b)) == identical(a, b)
    assert (hashed(wide(a)) == hashed(wide(b))) == identical(a, b)


def unshared(value):
    """A deep copy in which no mutable object is met twice, strings are new objects, sets are built in another order."""
    if isinstance(value, list | tuple):
        return type(value)([unshared(item) for item in value])
    if isinstance(value, dict):
        return {unshared(key): unshared(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return type(value)(reversed([unshared(item) for item in value]))
    return pickle.loads(pickle.dumps(value))


@settings(max_examples=200, deadline=None)
@given(nested)
def test_a_rebuilt_value_has_the_same_digest(value):
    """Interning, addresses and the insertion order of sets don't matter."""
    assert hashed(unshared(value)) == hashed(unshared(unshared(value)))
    assert hashed(wide(unshared(value))) == hashed(wide(unshared(unshared(value))))


@settings(max_examples=100, deadline=None)
@given(st.lists(nested, max_size=3), st.lists(nested, max_size=3))
def test_neighbours_never_run_together(a, b):
    assert (hashed([a, b]) == hashed([unshared(a), unshared(b)])) or hashed([a, b]) != hashed([a + b])
    if a or b:
        assert hashed([a, b]) != hashed([a + b, []]) or not b


dtypes = st.sampled_from(["i1", "<i4", ">i4", "f4", "f8", "?", "M8[s]", "M8[D]", "U2", "S2", "c8", [("n", "i2"), ("x", "f4")]])


@st.composite
def arrays(draw):
    """Small arrays of few contents, so that equal ones come up: dtype, shape, memory order, bytes, NaN payloads included."""
    dtype = np.dtype(draw(dtypes))
    shape = draw(st.sampled_from([(), (0,), (2,), (4,), (2, 2), (1, 4), (0, 2)]))
    size = int(np.prod(shape)) * dtype.itemsize
    data = bytes(draw(st.sampled_from([0, 1, 128, 255])) if dtype.kind != "U" else 65 * (i % 4 == 0) for i in range(size))
    array = np.frombuffer(data, dtype).reshape(shape) if dtype.kind != "?" else (np.frombuffer(data, "u1") > 0).reshape(shape)
    return array.copy(order=draw(st.sampled_from("CF")))


def same_array(a, b):
    fortran = [x.flags.f_contiguous and not x.flags.c_contiguous for x in (a, b)]
    return (a.dtype, a.shape, a.tobytes(), fortran[0]) == (b.dtype, b.shape, b.tobytes(), fortran[1])


columns = st.lists(st.sampled_from([1, True, 1.0, "1", None]), min_size=2, max_size=2).map(tuple)


@st.composite
def frames(draw):
    """Frames of two rows: names, order and dtypes of columns, index and its name, time zones, categories, attrs."""
    names = draw(st.lists(st.sampled_from("abc"), max_size=2, unique=True))
    made = {}
    for name in names:
        values, kind = draw(columns), draw(st.sampled_from(["object", "category", "tz", "naive", "Int64", "ordered"]))
        if kind in ("tz", "naive"):
            made[name] = pd.Series(pd.to_datetime(["2027-01-01", None])).dt.tz_localize("UTC" if kind == "tz" else None)
        elif kind == "Int64":
            made[name] = pd.Series([1, draw(st.sampled_from([0, None]))], dtype="Int64")
        elif kind == "ordered":
            levels = draw(st.permutations(["x", "y"]))
            made[name] = pd.Series(pd.Categorical(["x", "y"], levels, ordered=draw(st.booleans())))
        else:
            made[name] = pd.Series([repr(v) for v in values] if kind == "category" else list(values), dtype=kind)
    frame = pd.DataFrame(made)
    frame.index = pd.Index(
        draw(st.sampled_from([[0, 1], [1, 0], ["0", "1"]]))[: len(frame)], name=draw(st.sampled_from([None, "i"]))
    )
    frame.attrs = draw(st.sampled_from([{}, {"u": 1}]))
    return frame


def same_frame(a, b):
    def told(frame):
        parts = [list(frame.columns), frame.index.dtype, frame.index.name, frame.attrs]
        for name in frame:
            column = frame[name]
            levels = (list(column.cat.categories), column.cat.ordered) if column.dtype == "category" else None
            parts.append((str(column.dtype), levels, [(type(v).__name__, repr(v)) for v in column]))
        return [*parts, [(type(v).__name__, repr(v)) for v in frame.index]]

    return told(a) == told(b)


@settings(max_examples=300, deadline=None)
@given(arrays(), arrays())
def test_digests_of_arrays_are_equal_exactly_when_arrays_are_identical(a, b):
    assert (hashed(a) == hashed(b)) == same_array(a, b)
    assert hashed(a) == hashed(a.copy(order="K"))


@settings(max_examples=150, deadline=None)
@given(frames(), frames())
def test_digests_of_frames_are_equal_exactly_when_frames_are_identical(a, b):
    assert (hashed(a) == hashed(b)) == same_frame(a, b)
    assert hashed(a) == hashed(a.copy())


ELSEWHERE = """
import base64, pickle, sys
sys.path.insert(0, {root!r})
from durable_nb import _fingerprint as fp
for line in sys.stdin:
    print(fp.hash_value(pickle.loads(base64.b64decode(line))), flush=True)
"""


@pytest.fixture(scope="module")
def elsewhere():
    """Asks processes with other hash seeds for the digest of a value."""
    asked = [
        subprocess.Popen(
            [sys.executable, "-c", ELSEWHERE.format(root=str(ROOT))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": ""},
        )
        for seed in ("11", "12")
    ]  # fmt: skip

    def digests(value):
        for process in asked:
            process.stdin.write(base64.b64encode(pickle.dumps(value)).decode() + "\n")
            process.stdin.flush()
        return {process.stdout.readline().strip() for process in asked}

    yield digests
    for process in asked:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(nested | arrays() | frames() | st.lists(nested | arrays(), max_size=3))
def test_a_value_has_one_digest_whatever_the_hash_seed(elsewhere, value):
    """Sets iterate in other orders there, strings are other objects, arrays lie elsewhere."""
    restored = pickle.loads(pickle.dumps(value))  # which objects are shared inside is what pickle makes of it
    assert elsewhere(value) == {hashed(restored)}


class Drops:
    def __init__(self, kept, dropped):
        self.kept, self.dropped = kept, dropped

    def __getstate__(self):
        return {"kept": self.kept}


class Claims:
    def __init__(self, held):
        self.held = held

    def __reduce__(self):
        return int, (5,)


def of_a_cell(value):
    found = fp.Fingerprinter()
    found.add_value("value", value)
    return found.result()


@pytest.mark.parametrize("make", [lambda x: Drops(1, x), Claims], ids=["a state that drops", "a reduction that lies"])
def test_what_an_instance_keeps_out_of_its_pickle_counts_for_cells(make):
    """A cell sees all of it; a step's argument may have gone through pickle before, and is what is left."""
    assert of_a_cell(make([1])).digest == of_a_cell(make([1])).digest
    assert of_a_cell(make([1])).digest != of_a_cell(make([2])).digest
    assert hashed(make([1])) == hashed(make([2]))
    assert of_a_cell(make(threading.Lock())).opaque == (), "a lock is why things are kept out"


PROCESS = """
import collections, datetime, decimal, pathlib, re, enum, functools, dataclasses, sys, json, fractions, uuid, typing
sys.path.insert(0, {root!r})
from durable_nb import _fingerprint as fp
class Colour(enum.Enum):
    RED = "r"; BLUE = "b"
    def paint(self): return self.value
class Flag(enum.Flag):
    A = 1; B = 2
@dataclasses.dataclass(order=True)
class Item:
    name: str; price: "float" = 1.0; tags: list = dataclasses.field(default_factory=list); o: typing.Optional[int] = None
@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    a: int = 1
class Base:
    limit = frozenset(["x", "y", "z"])
    def size(self): return len(self.limit)
class Model(Base):
    def __init__(self, k): self.k = k; self.c = Colour.RED
    @property
    def double(self): return self.k * 2
    @functools.cached_property
    def slow(self): return super().size()
    @classmethod
    def make(cls): return cls(LIMITS)
    @staticmethod
    def stat(): return Pair(1, 2)
Pair = collections.namedtuple("Pair", "a b")
class Typed(typing.NamedTuple):
    a: int
    b: str = "x"
LIMITS = {{"a", "b", "c", ("d", 1), frozenset(["e", "f"])}}
def deco(fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs): return fn(*args, **kwargs)
    return wrapper
@functools.lru_cache(maxsize=None)
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
@deco
def helper(x, *, rate=0.5):
    '''doc'''
    if x in {{"k1", "k2", "k3"}}: return f"{{x!r:>{{rate}}}} {{x}}" "tail" f"{{rate:.2f}}"
    return [y for y in LIMITS if (lambda z: z in LIMITS)(y)] + [fib(3)]
def step(a, b=Model(3), *args: int, **kw) -> str:
    class Inner:
        q = LIMITS
        def m(self): return [q for q in self.q]
    try:
        return helper(a) + Inner().m()
    except* (ValueError, KeyError) as group:
        pass
async def fetch(url):
    async with url as u:
        return [x async for x in u if await x]
match_ = lambda v: (lambda w: w + 1)(v)
def classify(v):
    match v:
        case {{"a": 1, **rest}} | {{"b": None, **rest}}: return rest
        case [1, *_] as q: return q
        case Item(name="x"): return None
values = [LIMITS, frozenset(LIMITS), {{Colour.RED, Colour.BLUE}}, Flag.A | Flag.B, Item("a"), Frozen(3), Model(2), Model,
    Pair(1, "x"), Typed(1), pathlib.Path("/a/b"), re.compile("x", re.I), datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
    decimal.Decimal("1.50"), fractions.Fraction(1, 3), uuid.UUID(int=5), collections.OrderedDict(a=1), collections.Counter("abca"),
    collections.deque([1, 2], 3), step, helper, fib, fetch, match_, {{Model, Item}}, {{helper, fib, match_}}, Exception("a", 1),
    functools.partial(step, 1, k=2), Model(1).size, int.__add__, "".join, typing.List[int], [len, print, json.dumps]]
print(json.dumps([fp.hash_value(v) for v in values] + [fp.of_call(step, (1, {{"x", "y"}}), {{"k": LIMITS}}).digest,
    fp.of_call(classify, (1,)).digest]))
"""


def run_process(tmp_path, python, seed):
    script = tmp_path / "notebook.py"
    script.write_text(PROCESS.format(root=str(ROOT)))
    return subprocess.run(
        [python, "-W", "error", str(script)],
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_digests_agree_between_processes(tmp_path):
    """Whatever the hash seed, and whatever other Python from 3.11 is found here: the same digests."""
    first = run_process(tmp_path, sys.executable, "1")
    assert first.returncode == 0, first.stderr
    for seed in ("2", "3"):
        assert run_process(tmp_path, sys.executable, seed).stdout == first.stdout
    for python in os.environ.get("DURABLE_NB_OTHER_PYTHONS", "").split():
        other = run_process(tmp_path, python, "4")
        assert other.returncode == 0, other.stderr
        assert other.stdout == first.stdout, python


# ---- identity of objects ----


@pytest.mark.parametrize("held", [lambda value: value, wide], ids=["alone", "among many"])
def test_sharing_inside_a_value_counts(held):
    """`[a, a]` isn't `[a, a.copy()]`: appending to the first shows in the second."""

    def hashed(value):
        return fp.hash_value(held(value))

    a = [1]
    assert hashed([a, a]) != hashed([a, a.copy()])
    assert hashed([a, a]) == hashed([b := [1], b])
    d = {}
    assert hashed([d, d, {}]) != hashed([d, {}, d])
    p = Point(1, 2)
    assert hashed([p, p]) != hashed([p, copy.copy(p)])
    x = np.zeros(2)
    assert hashed([x, x]) != hashed([x, x.copy()])
    e = bytearray(b"a")
    assert hashed([e, e]) != hashed([e, bytearray(b"a")])


@pytest.mark.parametrize("held", [lambda value: value, wide], ids=["alone", "among many"])
def test_sharing_of_immutable_values_never_counts(held):
    """Whether Python interned them is chance."""

    def hashed(value):
        return fp.hash_value(held(value))

    for make in (
        lambda: "".join(["a", "b"]), lambda: (1, 2.5), lambda: float("1.5"), lambda: 10**30, lambda: frozenset([1]),
        lambda: decimal.Decimal("1.1"), lambda: datetime.datetime(2020, 1, 1), lambda: pd.Timestamp("2020"),
        lambda: np.float64(1), lambda: Pair(1, 2), lambda: pd.Index([1]), lambda: MyStr("a"),
    ):  # fmt: skip
        a = make()
        assert hashed([a, a]) == hashed([make(), make()])


@pytest.mark.parametrize("held", [lambda value: value, wide], ids=["alone", "among many"])
def test_sharing_with_a_member_of_a_set_counts(held):
    def hashed(value):
        return fp.hash_value(held(value))

    p = Point(1, 2)
    assert hashed([p, {p}]) != hashed([p, {Point(1, 2)}])
    assert hashed([{p}, p]) != hashed([{Point(1, 2)}, p])
    inner = [1]
    assert hashed({Point(inner, 1), Point(inner, 2)}) != hashed({Point([1], 1), Point([1], 2)})


@pytest.mark.parametrize("items", [list, tuple, lambda found: dict(enumerate(found)), lambda found: [found, found[:]]])
def test_many_instances_count_by_class_and_attributes(items):
    """They are written by the thousand: each attribute of each counts, which class it has, and what they share."""

    def points(change=lambda _: None):
        found = [Point(n, [n]) for n in range(100)]
        change(found)
        return hashed(items(found))

    def put(**attributes):
        return lambda found: vars(found[50]).update(attributes)

    def other(found):
        found[50] = Item("a")

    def shared(found):
        found[50].y = found[49].y

    def itself(found):
        found[50].y = found[50]

    def twice(found):
        found[50] = found[49]

    def less(found):
        del found[50].y

    def slotted(found):
        found[50] = Slotted(1)

    def odd(found):
        found[50].y = pd.Series([1])

    changes = [put(), put(x=-1), put(x=50.0), put(y=[51]), put(z=1), other, shared, itself, twice, less, slotted, odd]
    assert len({points(change) for change in changes}) == len(changes)
    assert points() == points(put())
    assert points(put(x=50)) == points(lambda found: vars(found[50]).update(y=vars(found[50]).pop("y"), x=50))


def test_places_of_many_objects_are_those_of_equal_ones():
    """What a body changed of its argument is made again in the equal object of another kernel: by component and number."""

    def found():
        rows = [{"n": n, "tags": [str(n), {n}], "point": Point(n, n)} for n in range(30)]
        rows[7]["tags"] = rows[3]["tags"]
        looked = fp.Fingerprinter(memory=False)
        looked.add_value("arg rows", rows)
        looked.add_value("arg first", rows[0])
        return looked.result(), rows

    (one, rows), (other, others) = found(), found()
    assert one == other
    places, again = one.places(), other.places()
    assert places.keys() == again.keys()
    assert sum(obj is rows for obj in places.values()) == 1
    for at in (rows[3]["tags"], rows[29], rows[29]["point"], rows[29]["tags"][1]):
        (place,) = [place for place, obj in places.items() if obj is at]
        assert hashed(again[place]) == hashed(at)
    assert rows[0] in [obj for (label, _), obj in places.items() if label == "arg first"]
    assert others is not rows


def test_cycles_end():
    a = []
    a.append(a)
    b = []
    b.append(b)
    assert hashed(a) == hashed(b) != hashed([[]])
    p = Point(1, None)
    p.y = {"self": p, "set": {p}}
    assert hashed(p)


def test_aliases_between_inputs_count():
    """A cell reading K and L where `L = K` has another input than where `L = K[:]`, and the difference has a name."""
    k = [1]

    def inputs(**names):
        found = fp.Fingerprinter()
        for name in names:
            found.add_name(name, names)
        return found.result()

    shared, apart = inputs(K=k, L=k), inputs(K=k, L=[1])
    assert shared.digest != apart.digest
    assert shared.components["global L"] == apart.components["global L"]
    assert set(shared.components) - set(apart.components) == {"aliases"}
    again = [1]
    assert inputs(L=again, K=again).digest == shared.digest
    assert inputs(K=k, L=[k]).digest != inputs(K=k, L=[[1]]).digest
    x = np.arange(4)
    assert inputs(K=x, L=x[1:]).digest != inputs(K=x, L=x[1:].copy()).digest
    assert inputs(K=x[:2], L=x[2:]).digest == inputs(K=x[:2].copy(), L=x[2:].copy()).digest


def test_deep_nesting_is_no_limit():
    """A list of depth 100,000 and a linked list of as many nodes are hashed; each level counts."""

    def deep(levels, leaf):
        for _ in range(levels):
            leaf = [leaf]
        return leaf

    a, b, c = deep(100_000, 1), deep(100_000, 2), deep(99_999, 1)
    assert len({hashed(a), hashed(b), hashed(c)}) == 3
    node = None
    for _ in range(100_000):
        node = Point(1, node)
    assert hashed(node)
    while node is not None:
        node = node.y
    nest = frozenset([1])
    for _ in range(5_000):
        nest = frozenset([nest])
    assert hashed(nest)


# ---- objects ----


def test_attribute_order_is_no_part_of_an_object():
    p, q = Point(1, 2), Point.__new__(Point)
    q.y, q.x = 2, 1
    assert hashed(p) == hashed(q)


def test_a_cached_property_that_was_read_changes_nothing():
    class Frame:
        def __init__(self):
            self.rows = [1, 2]

        @functools.cached_property
        def total(self):
            return sum(self.rows)

    frame = Frame()
    before = hashed(frame)
    assert frame.total == 3
    assert hashed(frame) == before
    frame.rows.append(3)
    assert hashed(frame) != before


def test_having_copied_an_instance_does_not_change_its_class():
    """`copy` and `pickle` leave `__slotnames__` on the class."""

    class Fresh:
        pass

    before = hashed(Fresh)
    copy.copy(Fresh())
    assert "__slotnames__" in vars(Fresh)
    assert hashed(Fresh) == before


def test_pandas_caches_change_nothing():
    """Looking things up in a frame fills caches of its index; the frame stays the same input."""
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}, index=["p", "q"])
    before = hashed(frame)
    assert frame.loc["p", "a"] == 1
    assert frame.index.is_unique
    assert frame.columns.get_loc("b") == 1
    assert list(frame["a"]) == [1, 2]
    assert hashed(frame) == before
    frame.loc["p", "a"] = 5
    assert hashed(frame) != before


def test_layout_of_a_frame_is_no_part_of_it():
    """Blocks, chunks, offsets and memory order may differ between equal frames."""
    whole = pd.DataFrame(np.arange(12).reshape(4, 3), columns=list("abc"))
    parts = pd.DataFrame({"a": [0, 3, 6, 9]})
    parts["b"] = [1, 4, 7, 10]
    parts["c"] = [2, 5, 8, 11]
    assert hashed(whole) == hashed(parts) == hashed(whole.copy())
    words = pd.DataFrame({"w": ["a", None, "ccc", "dd"]}, dtype="str")
    glued = pd.concat([words.iloc[:2], words.iloc[2:]])
    assert hashed(glued["w"].array) == hashed(words["w"].array) == hashed(pd.concat([words, words])["w"].array[:4])
    assert hashed(words.iloc[1:3]) == hashed(words.iloc[1:3].copy()) == hashed(pickle.loads(pickle.dumps(words.iloc[1:3])))
    assert hashed(whole.attrs) and hashed(whole) != hashed(_with_attrs(whole))
    masked = pd.array([1, 2, 3], dtype="Int64")
    other = pd.array([1, 7, 3], dtype="Int64")
    masked[1] = pd.NA
    other[1] = pd.NA
    assert hashed(masked) == hashed(other)


def _with_attrs(frame):
    found = frame.copy()
    found.attrs["unit"] = "kg"
    return found


@pytest.mark.parametrize(
    "items",
    [
        [1, None, 3, 4], ["a", "bb", None, ""], [True, None, False, True], [[1], None, [2, 3], []], [{"a": 1}, None, {"a": None}, {"a": 4}],
        [decimal.Decimal("1.1"), None, None, decimal.Decimal("2.2")], [b"a", None, b"b", b""], [1.5, float("nan"), None, 2.0],
        [[["a"], None], None, [], [["b", "c"]]],
    ],
)  # fmt: skip
def test_arrow_data_is_hashed_logically(items):
    """A slice equals its copy, chunks leave no trace, and every change of a value or of a null shows."""
    array = pa.array(items)
    sliced = pa.array([items[0], *items, items[-1]]).slice(1, 4)
    assert hashed(array) == hashed(sliced)
    chunked = [pa.chunked_array([array.slice(0, cut), array.slice(cut)]) for cut in range(5)]
    assert len({hashed(one) for one in chunked}) == 1
    for position in range(4):
        changed = list(items)
        changed[position] = items[(position + 1) % 4]
        if repr(changed) != repr(items):
            assert hashed(pa.array(changed, array.type)) != hashed(array)


def test_strided_and_foreign_arrays():
    base = np.arange(24).reshape(4, 6)
    assert hashed(base[::2, ::3]) == hashed(base[::2, ::3].copy())
    assert hashed(base.T) == hashed(base.T.copy(order="F")) != hashed(base.T.copy())
    padded = np.dtype({"names": ["a", "b"], "formats": ["i1", "i4"], "offsets": [0, 4], "itemsize": 8})
    one, two = np.zeros(2, padded), np.full(16, 255, np.uint8).view(padded).copy()
    two["a"], two["b"] = 0, 0
    assert hashed(one) == hashed(two)
    rng, other = np.random.default_rng(1), np.random.default_rng(1)
    assert hashed(rng) == hashed(other)
    rng.random()
    assert hashed(rng) != hashed(other)


def test_memory_map_counts_by_content(tmp_path):
    def mapped(name, value):
        array = np.memmap(tmp_path / name, "i8", "w+", shape=(3,))
        array[:] = value
        return array

    assert hashed(mapped("a", 1)) == hashed(mapped("b", 1)) != hashed(mapped("c", 2))


def test_the_last_element_of_a_large_array_counts():
    """Never a sample."""
    a = np.zeros(1_000_003)
    b = a.copy()
    b[-2] = 1
    frame = pd.DataFrame({"a": a})
    assert hashed(a) != hashed(b)
    assert hashed(frame) != hashed(pd.DataFrame({"a": b}))


class Lying:
    def __init__(self, answer):
        self.answer = answer

    def __reduce_ex__(self, protocol):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    "answer",
    [RuntimeError("no"), 5, None, (), (1,), (int, 5), ("int", ()), (int, (), 1, 2, 3, 4, 5), (int, (), None, 5)],
)
def test_an_instance_whose_reduction_fails_or_lies_counts_by_its_attributes(answer):
    found = fp.of_value([Lying(answer)])
    assert found.opaque == ()
    other = Lying(answer)
    other.model = "b"
    assert fp.of_value([other]).digest != found.digest == fp.of_value([Lying(answer)]).digest


def test_what_refuses_pickling_beneath_a_users_class_is_opaque():
    class Holder(type(threading.local())):
        pass

    class Handle(threading.Thread):
        pass

    holder = Holder()
    holder.a = 1
    assert [opaque.configured for opaque in fp.of_value(holder).opaque] == [False]
    assert [opaque.configured for opaque in fp.of_value(Handle()).opaque] == [False]


class Client(httpx.Client):
    def __init__(self, model, **configuration):
        super().__init__(**configuration)
        self.model = model


def sdk(kind, **configuration):
    return getattr(importlib.import_module("anthropic" if "nthropic" in kind else "openai"), kind)(**configuration)


AZURE = {"api_key": "k", "azure_endpoint": "https://x.example", "api_version": "2024-06-01"}


@pytest.mark.parametrize(
    ("make", "one", "others"),
    [
        (httpx.Client, {"base_url": "https://a"}, [{"base_url": "https://b"}, {}, {"base_url": "https://a", "headers": {"X-Team": "a"}},
            {"base_url": "https://a", "params": {"v": "1"}}, {"base_url": "https://a", "timeout": 7}, {"base_url": "https://a", "follow_redirects": True},
            {"base_url": "https://a", "headers": {"User-Agent": "me"}}]),
        (httpx.AsyncClient, {"base_url": "https://a"}, [{"base_url": "https://b"}]),
        (Client, {"model": "a"}, [{"model": "b"}, {"model": "a", "base_url": "https://a"}]),
        (functools.partial(sdk, "OpenAI"), {"api_key": "k"}, [{"api_key": "k", "organization": "o"}, {"api_key": "k", "project": "p"},
            {"api_key": "k", "default_headers": {"X": "1"}}, {"api_key": "k", "default_query": {"a": "1"}}, {"api_key": "k", "base_url": "http://b"},
            {"api_key": "k", "max_retries": 7}, {"api_key": "k", "timeout": 7.0}]),
        (functools.partial(sdk, "AzureOpenAI"), AZURE, [AZURE | {"api_version": "2023-01-01"}, AZURE | {"azure_endpoint": "https://y.example"},
            AZURE | {"azure_deployment": "d"}]),
        (functools.partial(sdk, "AsyncOpenAI"), {"api_key": "k"}, [{"api_key": "k", "organization": "o"}]),
        (functools.partial(sdk, "Anthropic"), {"api_key": "k"}, [{"api_key": "k", "base_url": "http://b"}, {"api_key": "k", "default_headers": {"X": "1"}}]),
        (lambda **names: contextvars.ContextVar("model", **names), {"default": "a"}, [{"default": "b"}, {}]),
    ],
)  # fmt: skip
def test_all_known_configuration_of_an_object_counts(make, one, others):
    digests = [hashed(make(**configuration)) for configuration in [one, *others]]
    assert len(set(digests)) == len(digests)
    assert hashed(make(**one)) == digests[0]
    assert all(opaque.configured for opaque in fp.of_value(make(**one)).opaque)


@pytest.mark.parametrize(
    ("make", "one", "other"),
    [
        (httpx.Client, {"headers": {"Authorization": "a"}, "params": {"key": "a"}}, {"headers": {"Authorization": "b"}, "params": {"key": "b"}}),
        (httpx.Client, {"base_url": "https://me:a@x"}, {"base_url": "https://me:b@x"}),
        (functools.partial(sdk, "OpenAI"), {"api_key": "a"}, {"api_key": "b"}),
        (functools.partial(sdk, "OpenAI"), {"api_key": "a", "default_headers": {"X-Api-Key": "a"}}, {"api_key": "a", "default_headers": {"X-Api-Key": "b"}}),
        (pydantic.SecretStr, {"secret_value": "a"}, {"secret_value": "b"}),
    ],
)  # fmt: skip
def test_a_rotated_key_changes_nothing(make, one, other):
    assert hashed(make(**one)) == hashed(make(**other))


def finished(value, kind=concurrent.futures.Future):
    future = kind()
    future.set_exception(value) if isinstance(value, Exception) else future.set_result(value)
    return future


def test_objects_that_pickle_refuses_count_by_what_they_hold(tmp_path):
    def thing(value):
        made = Point(value, None)
        kept.append(made)
        return made

    kept = []
    (tmp_path / "a.csv").write_text("a\n1\n")
    (tmp_path / "b.csv").write_text("a\n2\n")

    def opened(name, read=0):
        file = (tmp_path / f"{name}.csv").open()
        file.read(read)
        kept.append(file)
        return file

    def reader(name, rows=0, **dialect):
        found = csv.reader((tmp_path / f"{name}.csv").read_text().splitlines(), **dialect)
        for _ in range(rows):
            next(found)
        return found

    def queued(*values):
        held = queue.Queue()
        for value in values:
            held.put(value)
        return held

    makers = [
        lambda: weakref.ref(thing(1)), lambda: weakref.ref(thing(2)), lambda: weakref.proxy(thing(1)), lambda: weakref.proxy(thing(2)),
        lambda: weakref.WeakSet([thing(1)]), lambda: weakref.WeakSet([thing(2)]),
        lambda: weakref.WeakValueDictionary(a=thing(1)), lambda: weakref.WeakValueDictionary(a=thing(2)),
        lambda: finished(1), lambda: finished(2), lambda: finished(ValueError("a")), lambda: finished(ValueError("b")),
        lambda: reader("a"), lambda: reader("b"), lambda: reader("a", 1), lambda: reader("a", delimiter=";"),
        lambda: csv.DictReader(["a", "1"]), lambda: csv.DictReader(["a", "2"]),
        lambda: queued(1), lambda: queued(2), lambda: re.match("a(b)", "abc"), lambda: re.match("a(b)", "abd"),
        lambda: pydantic.validate_call(lambda x: x),
    ]  # fmt: skip
    digests = [hashed(make()) for make in makers]
    assert len(set(digests)) == len(digests)
    assert [hashed(make()) for make in makers] == digests
    assert all(fp.of_value(make()).opaque == () for make in makers)
    files = [lambda: opened("a"), lambda: opened("b"), lambda: opened("a", 1)]
    digests = [hashed(make()) for make in files]
    assert len(set(digests)) == len(digests)
    assert [hashed(make()) for make in files] == digests
    file = opened("a", 2)
    hashed(file)
    assert file.read() == "1\n"
    for held in kept:
        if isinstance(held, io.IOBase):
            held.close()
    assert [opaque.configured for opaque in fp.of_value([concurrent.futures.Future(), file]).opaque] == [False, False]


def test_an_address_and_a_version_are_no_part_of_an_estimator():
    from sklearn.feature_extraction.text import TfidfVectorizer

    one, other = TfidfVectorizer().fit(["aa bb"]), TfidfVectorizer().fit(["aa bb"])
    other._stop_words_id = 5
    assert "_sklearn_version" in one.__getstate__()
    assert hashed(one) == hashed(other)


def test_opening_a_file_is_the_same_in_a_notebook_and_in_a_module():
    """IPython puts a function of its own under the name `open` into the notebook."""

    @functools.wraps(open)
    def opened(*args):
        return open(*args)  # noqa: PTH123

    source = "def f(path): return open(path)"
    assert step(source, "f", "a", open=opened) == step(source, "f", "a")
    assert step(source, "f", "a", open=len) != step(source, "f", "a")


LIBRARIES = [
    ("import polars as pl\nx = pl.DataFrame({'a': [1, 2]})", "[1, 2]", "[1, 3]"),
    ("import polars as pl\nx = pl.Series('a', ['u', 'v'])", "'v'", "'w'"),
    ("import lxml.etree as e\nx = e.fromstring('<a><b/><c/></a>')[0]", "[0]", "[1]"),
    ("import lxml.etree as e\nx = e.fromstring('<a><b/><c/></a>')[0]", "<c/>", "<d/>"),
    ("import patsy\ndef g(a): return a\nx = patsy.dmatrix('g(a)', {'a': [1.0, 2.0]}).design_info", "return a", "return a * 2"),
    ("from tqdm import tqdm\nx = tqdm([1, 2], disable=True)", "[1, 2]", "[1, 3]"),
    ("import sqlalchemy\nx = sqlalchemy.create_engine('sqlite:///a.db')", "a.db", "b.db"),
    ("import sqlalchemy.orm\nx = sqlalchemy.orm.Session(sqlalchemy.create_engine('sqlite:///a.db'))", "a.db", "b.db"),
    ("from concurrent.futures import ThreadPoolExecutor\nx = ThreadPoolExecutor(3)", "3", "4"),
    ("import sqlite3\nx = sqlite3.connect(':memory:')\nx.execute('create table a (b)')", "(b)", "(c)"),
    (
        "import sqlite3\nx = sqlite3.connect(':memory:')\nx.row_factory = lambda c, r: dict(zip('abc', r))\nx.execute('create table a (b)')",
        "(b)",
        "(c)",
    ),
    ("import requests\nx = requests.Session()\nx.headers['X'] = 'a'", "'a'", "'b'"),
]


@pytest.mark.parametrize(("source", "old", "new"), LIBRARIES)
def test_what_people_keep_in_variables_counts_by_what_it_is(source, old, new):
    """The same in each kernel; another where it is another; and nothing of it unknown, so that a cell that reads it may hit."""
    one, again, other = (fp.of_value(cell(text)["x"]) for text in (source, source, source.replace(old, new)))
    assert one.digest == again.digest != other.digest
    assert all(opaque.configured for opaque in one.opaque)


def test_who_holds_a_lock_and_how_far_a_bar_has_come_is_chance():
    """Steps at work side by side use them: a step's identity must not depend on what its neighbours do just then."""
    from tqdm import tqdm

    lock, semaphore, pool, bar = threading.Lock(), asyncio.Semaphore(2), ThreadPoolExecutor(1), tqdm([1, 2], disable=True)
    held = [lock, threading.RLock(), semaphore, threading.Semaphore(2), pool, bar]
    before = hashed(held)
    waiting = threading.Event()
    with lock:
        asyncio.run(semaphore.acquire())
        begun = [pool.submit(waiting.wait, 10) for _ in range(3)]
        bar.n = 1
        assert hashed(held) == before
    waiting.set()
    assert all(future.result() for future in begun)
    pool.shutdown()
    assert all(opaque.configured for opaque in fp.of_value(held).opaque)


def test_what_a_cache_remembers_of_other_variables_is_told():
    """`lru_cache` may have been filled when they held something else. A cell that reads it runs; a step counts it as ever."""
    source = "import functools\nK = 1\n@functools.lru_cache\ndef g(x): return x + K\n@functools.lru_cache\ndef h(x): return abs(x)\ndef f(): return g(1), h(1)"
    space = cell(source)
    before = fp.of_call(space["f"])
    space["h"](1)
    assert fp.of_call(space["f"]).opaque == before.opaque == ()
    space["g"](1)
    after = fp.of_call(space["f"])
    assert after.digest == before.digest
    assert [(opaque.type_name, opaque.configured) for opaque in after.opaque] == [("functools.lru_cache that is filled", False)]


def test_chunks_of_a_polars_frame_say_nothing():
    import polars as pl

    for make in (lambda *rows: pl.DataFrame({"a": rows, "b": [str(row) for row in rows]}), lambda *rows: pl.Series("a", rows)):
        assert hashed(pl.concat([make(1), make(2, 3)])) == hashed(make(1, 2, 3)) == hashed(make(0, 1, 2, 3)[1:])


def test_tools_of_a_language_model_count_by_name_annotations_and_docstring():
    source = "def paint(c: int): 'Paint it.'\ndef f(q, tools): return q, tools"

    def ask(source):
        space = cell(source)
        return fp.of_call(space["f"], ("q",), {"tools": [space.get("paint") or space["draw"]]}).digest

    edits = [(": int", ": str"), ("Paint it.", "Draw it."), ("def paint", "def draw")]
    assert len({ask(source), *(ask(source.replace(old, new)) for old, new in edits)}) == 4


def test_a_context_variable_counts_by_its_value():
    source = "import contextvars\nv = contextvars.ContextVar('v')\nv.set({})\ndef f(): return v.get()"
    differ(source.format(1), source.format(2))
    space = cell(source.format(1))
    before = fp.of_call(space["f"]).digest
    space["v"].set(2)
    assert fp.of_call(space["f"]).digest != before


VALIDATED = "import pydantic\n@pydantic.validate_call(validate_return=True)\ndef g(x: int): return x\ndef f(): return g(1)"


def test_functions_whose_calls_pydantic_validates_count_by_code_and_annotations():
    differ(
        VALIDATED,
        VALIDATED.replace("int", "str"),
        VALIDATED.replace("return x", "return -x"),
        VALIDATED.replace("=True", "=False"),
    )
    same(VALIDATED, VALIDATED.replace("def g(x", "# one\ndef g(x"))


MODEL = """
import enum, pydantic
from typing import Annotated, Optional
class Colour(enum.Enum):
    "A colour."
    RED = 1
class Inner(pydantic.BaseModel):
    "Inside."
    q: int = 1
class Model(pydantic.BaseModel):
    "Extract the price."
    model_config = pydantic.ConfigDict(title="A title")
    a: int = pydantic.Field(1, examples=["e"], json_schema_extra={"x": "y"}, alias="al", exclude=False, description="What")
    b: list[Inner] = []
    c: Colour = Colour.RED
    d: Optional[Annotated[str, pydantic.Field(min_length=2)]] = None
    _p: int = pydantic.PrivateAttr(3)
    @pydantic.field_validator("a")
    @classmethod
    def check(cls, x): return x
    @pydantic.computed_field(description="Doubled")
    @property
    def twice(self) -> int: return self.a * 2
def f(): return Model.model_json_schema()
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Extract the price.", "Extract the total."), ("Inside.", "Within."), ("A colour.", "The colour."), ("A title", "Another"),
        ('"e"', '"f"'), ('"y"', '"z"'), ('"al"', '"am"'), ("exclude=False", "exclude=True"), ('"What"', '"Which"'),
        ("min_length=2", "min_length=3"), ("Attr(3)", "Attr(4)"), ('validator("a")', 'validator("b")'), ("Doubled", "Twofold"),
        ("* 2", "* 3"), ("q: int", "q: float"), ("return x", "return -x"), ("class Model", "class Price"), ("b: list", "z: list"),
    ],
)  # fmt: skip
def test_the_schema_of_a_pydantic_model_counts_whole(old, new):
    """It is a prompt, or part of one."""
    assert old in MODEL
    other = MODEL.replace(old, new)
    differ(MODEL, other.replace("Model.model_json", "Price.model_json") if new == "class Price" else other)
    same(MODEL, MODEL.replace("class Inner", "# a comment\nclass Inner"))


def test_a_method_of_a_pattern_may_be_a_default():
    source = "import re\ndef g(t, sub=re.compile('a').sub): return sub('', t)\ndef f(t): return g(t)"
    differ(source, source.replace("'a'", "'b'"))


@pytest.mark.parametrize(
    ("make", "data"),
    [
        ("from sklearn.feature_extraction.text import TfidfVectorizer as M\nm = M(stop_words='english').fit({})", [["a b", "c dd"], ["a b", "c ee"]]),
        ("from sklearn.neighbors import KNeighborsClassifier as M\nm = M(1).fit({}, [0, 1])", [[[1.0], [2.0]], [[1.0], [3.0]]]),
        ("from sklearn.neighbors import KNeighborsClassifier as M\nm = M(1, algorithm='ball_tree').fit({}, [0, 1])", [[[1.0], [2.0]], [[1.0], [3.0]]]),
        ("from sklearn.ensemble import RandomForestClassifier as M\nm = M(2, random_state=1).fit({}, [0, 1, 0])", [[[1.0], [2.0], [3.0]], [[10.0], [20.0], [3.0]]]),
        ("from sklearn.pipeline import make_pipeline as P\nfrom sklearn.preprocessing import StandardScaler as S\nfrom sklearn.linear_model import LogisticRegression as M\nm = P(S(), M()).fit({}, [0, 1])", [[[1.0], [2.0]], [[1.0], [3.0]]]),
        ("from sklearn.svm import SVC as M\nm = M().fit({}, [0, 1])", [[[1.0], [2.0]], [[1.0], [3.0]]]),
        ("from sklearn.ensemble import GradientBoostingClassifier as M\nm = M(n_estimators=2, random_state=0).fit({}, [0, 1])", [[[1.0], [2.0]], [[1.0], [3.0]]]),
    ],
)  # fmt: skip
def test_fitted_models_count_by_what_they_have_learnt(make, data):
    one, other = (cell(make.format(rows))["m"] for rows in data)
    again = cell(make.format(data[0]))["m"]
    assert hashed(one) == hashed(again) != hashed(other)
    assert hashed(pickle.loads(pickle.dumps(one))) == hashed(one)
    assert hashed(copy.deepcopy(one)) == hashed(one)
    assert fp.of_value(one).opaque == ()


def test_opaque_values_are_listed_and_count_by_type_and_configuration(tmp_path):
    """Locks and generators by type; a database connection by its file."""
    lock = threading.Lock()
    found = fp.of_value({"lock": lock, "rows": (x for x in [1])})
    assert [opaque.type_name for opaque in found.opaque] == ["_thread.lock", "builtins.generator"]
    assert hashed(lock) == hashed(threading.Lock()) != hashed(threading.RLock())
    one, two, again = (sqlite3.connect(tmp_path / name) for name in ("one.db", "two.db", "one.db"))
    assert hashed(one) == hashed(again) != hashed(two)
    assert fp.of_value(one).opaque == (fp.Opaque("value", "sqlite3.Connection", True),)
    one.executescript("CREATE TEMP TABLE x (a); DROP TABLE x")
    assert hashed(one) == hashed(again)  # an empty temporary schema, which SQLite makes when it is first asked for
    one.execute("CREATE TEMP TABLE x (a)")
    assert hashed(one) != hashed(again)
    one.execute("DROP TABLE x")
    for connection in (one, two, again):
        connection.close()


def test_a_figure_is_what_it_shows_drawn_or_not_and_survives_pickle():
    """matplotlib's registries of callbacks count how often they were asked for their state; its transforms go by address."""
    from matplotlib.figure import Figure

    def drawn(*heights):
        figure = Figure()
        axes = figure.add_subplot(projection="polar")
        axes.plot(heights, label="a")
        axes.legend()
        return figure

    figure = drawn(1, 2)
    before = hashed(figure)
    assert hashed(figure) == before == hashed(drawn(1, 2)) != hashed(drawn(1, 3))
    figure.savefig(os.devnull, format="png")
    after = hashed(figure)
    assert after == hashed(pickle.loads(pickle.dumps(figure))) == hashed(figure)


def test_numpys_global_generator_counts_by_name_whoever_holds_it():
    holder = {"generator": np.random.mtrand._rand, "bound": np.random.rand}
    before = hashed(holder)
    np.random.rand()  # noqa: NPY002
    assert hashed(holder) == before != hashed({**holder, "generator": np.random.RandomState(0)})


def test_search_trees_count_by_what_they_search():
    """The state of scipy's holds addresses."""
    from scipy.spatial import KDTree
    from sklearn.neighbors import KNeighborsClassifier

    points = np.random.default_rng(0).random((100, 3))
    assert hashed(KDTree(points)) == hashed(pickle.loads(pickle.dumps(KDTree(points)))) != hashed(KDTree(points[1:]))
    assert hashed(KDTree(points)) != hashed(KDTree(points, leafsize=5))
    fitted = KNeighborsClassifier(algorithm="kd_tree").fit(points, points[:, 0] > 0.5)
    assert hashed(fitted) == hashed(pickle.loads(pickle.dumps(fitted)))


def test_an_integer_type_counts_by_its_size():
    """C's long long comes back from pickle as an int64."""
    whole = np.arange(3).astype(np.longlong)
    assert hashed(whole) == hashed(pickle.loads(pickle.dumps(whole))) != hashed(whole.astype(np.ulonglong))


def test_identify_adds_a_configuration():
    class Robot:
        def __init__(self, address):
            self.address = address
            self.lock = threading.Lock()

    fp.identify(Robot, lambda robot: robot.address)
    assert hashed(Robot("a")) == hashed(Robot("a")) != hashed(Robot("b"))
    assert all(opaque.configured for opaque in fp.of_value(Robot("a")).opaque)


def test_a_failing_component_raises_unhashable_and_leaves_the_rest():
    fingerprinter = fp.Fingerprinter()
    fingerprinter.add_value("a", 1)
    frame = pd.DataFrame({"a": [1]})
    frame._metadata = 5
    with pytest.raises(fp.Unhashable) as caught:
        fingerprinter.add_value("b", [frame])
    assert caught.value.label == "b"
    assert pickle.loads(pickle.dumps(caught.value)).label == "b"
    fingerprinter.add_value("c", 2)
    assert set(fingerprinter.result().components) == {"a", "c"}


# ---- code ----

BASE = """
RATE = 2
def inner(x):
    return x * RATE
def helper(x):
    return inner(x) + 1
def f(cart, unit="kg"):
    return {k: helper(v) for k, v in cart.items()}
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RATE = 2", "RATE = 3"), ("RATE = 2", "RATE = 2.0"), ("x * RATE", "x + RATE"), ("inner(x) + 1", "inner(x) + 2"),
        ('unit="kg"', 'unit="g"'), ("helper(v)", "helper(k)"), ("+ 1", "+ True"), ("RATE = 2", "pass"),
    ],
)  # fmt: skip
def test_a_real_edit_changes_the_digest(old, new):
    """However many calls away: body, default, constant, helper's helper."""
    differ(BASE, BASE.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RATE = 2", "# two\n\n\nRATE = 2"), ("    return inner(x) + 1", "    '''Doc.'''\n    return (inner(x)\n        + 1)  # one"),
        ('"kg"', "'kg'"), ("RATE = 2", "RATE = 2\ndef unrelated(): pass\nOTHER = 3"), ("    return x * RATE", "    pass\n    return x*RATE"),
    ],
)  # fmt: skip
def test_comments_layout_and_docstrings_do_not_matter(old, new):
    same(BASE, BASE.replace(old, new))


def test_components_say_what_differs():
    one, two = (fp.of_call(cell(BASE.replace("x * RATE", body))["f"], ({},)) for body in ("x * RATE", "x + RATE"))
    assert set(one.components) == {"call", "function f", "function helper", "function inner", "global RATE", "arg cart"}
    assert {label for label in one.components if one.components[label] != two.components[label]} == {"function inner"}


def test_docstrings_matter_where_code_looks_at_them():
    source = "def g():\n    '''{}'''\ndef f():\n    return g.__doc__"
    differ(source.format("one"), source.format("two"))
    source = "def g():\n    '''{}'''\ndef f():\n    return getattr(g, '__doc__')"
    differ(source.format("one"), source.format("two"))


def test_the_source_as_it_is_written_matters_where_code_looks_at_it():
    """Comments too, of functions and what they are in."""
    source = "import inspect\ndef g():\n    return 1  # {}\ndef f():\n    return inspect.getsource(g)"
    differ(source.format("one"), source.format("two"))
    same(source.format("one").replace("getsource", "isclass"), source.format("two").replace("getsource", "isclass"))


@pytest.mark.parametrize(
    ("source", "old", "new"),
    [
        ("def make(k):\n    def g(): return k\n    return g\nf = make(1)", "make(1)", "make(2)"),
        ("def make(k):\n    return lambda: k['a']\nf = make({'a': 1})", "'a': 1", "'a': 2"),
        ("import functools\ndef deco(g):\n    @functools.wraps(g)\n    def w(): return g() + 1\n    return w\n@deco\ndef f(): return 1", "+ 1", "+ 2"),
        ("import functools\ndef deco(g):\n    @functools.wraps(g)\n    def w(): return g() + 1\n    return w\n@deco\ndef f(): return 1", "f(): return 1", "f(): return 2"),
        ("import functools\ndef deco(n):\n    def d(g):\n        @functools.wraps(g)\n        def w(): return g() * n\n        return w\n    return d\n@deco(3)\ndef f(): return 1", "deco(3)", "deco(4)"),
        ("class A:\n    k = 1\n    def m(self): return self.k\ndef f(): return A().m()", "k = 1", "k = 2"),
        ("class A:\n    k = 1\n    def m(self): return self.k\ndef f(): return A().m()", "self.k", "-self.k"),
        ("class B:\n    def m(self): return 1\nclass A(B): pass\ndef f(): return A().m()", "return 1", "return 2"),
        ("class A:\n    @property\n    def m(self): return 1\ndef f(): return A().m", "return 1", "return 2"),
        ("class A:\n    @classmethod\n    def m(cls): return 1\ndef f(): return A.m()", "return 1", "return 2"),
        ("class A:\n    @staticmethod\n    def m(): return 1\ndef f(): return A.m()", "return 1", "return 2"),
        ("class A:\n    class I:\n        z = 1\ndef f(): return A.I.z", "z = 1", "z = 2"),
        ("class M(type):\n    def m(cls): return 1\nclass A(metaclass=M): pass\ndef f(): return A.m()", "return 1", "return 2"),
        ("def g(): return 1\nTABLE = {'a': [g]}\ndef f(): return TABLE['a'][0]()", "return 1", "return 2"),
        ("import functools\n@functools.lru_cache\ndef g(): return 1\ndef f(): return g()", "return 1", "return 2"),
        ("import functools\n@functools.lru_cache\ndef f(): return 1", "return 1", "return 2"),
        ("import functools\ndef g(x): return x\nf = functools.partial(g, 1)", "return x", "return -x"),
        ("import functools\ndef g(x): return x\nf = functools.partial(g, 1)", "g, 1", "g, 2"),
        ("import numpy as np\ndef g(x): return x\nh = np.vectorize(g)\ndef f(): return h([1])", "return x", "return -x"),
        ("import contextlib\n@contextlib.contextmanager\ndef g(): yield 1\ndef f():\n    with g() as x: return x", "yield 1", "yield 2"),
        ("import functools\n@functools.singledispatch\ndef g(x): return 1\n@g.register\ndef _(x: int): return 2\ndef f(): return g(1)", "return 2", "return 3"),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 1\ndef f(): return A().x", "= 1", "= 2"),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: list = dataclasses.field(default_factory=list)\ndef f(): return A().x", "factory=list", "factory=set"),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\n    y: int\ndef f(): return A(1, 2).x", "x: int\n    y: int", "y: int\n    x: int"),
        ("import enum\nclass A(enum.Enum):\n    X = 1\ndef f(): return A.X.value", "X = 1", "X = 2"),
        ("import enum\nclass A(enum.Enum):\n    X = 1\n    def m(self): return 1\ndef f(): return A.X.m()", "return 1", "return 2"),
        ("import abc\nclass B(abc.ABC):\n    @abc.abstractmethod\n    def m(self): return 1\nclass A(B):\n    def m(self): return super().m()\ndef f(): return A().m()", "return 1", "return 2"),
        ("def f(*, k=1): return k", "k=1", "k=2"), ("def f(x): return x\nf.rate = 1", "rate = 1", "rate = 2"),
        ("def f(a, b): return a", "a, b", "b, a"), ("def f(a): return a", "(a)", "(*a)"), ("def f(a): return a", "(a)", "(a, /)"),
        ("def f(): return {'a', 'b'}", "'b'", "'c'"), ("def f(): return 0.0", "0.0", "-0.0"), ("def f(): return 1", "1", "1.0"),
        ("def f(): return 'x'", "'x'", "b'x'"), ("def f(x): return f'{x!r}'", "!r", "!s"), ("def f(x): return f'{x:>3}'", ">3", ">4"),
        ("def f(x): return f'{x}a'", "{x}a", "a{x}"), ("def f(x): return x.a", ".a", ".b"), ("def f(x): return x(a=1)", "a=1", "b=1"),
        ("def f(): return open", "open", "print"), ("def f(): return missing", "missing", "absent"),
        ("async def f(): return 1", "async def", "def"), ("f = lambda: 1", "1", "2"), ("def f():\n    import json", "json", "ast"),
        ("def f(x):\n    match x:\n        case {'a': 1}: return 1", "'a': 1", "'a': 2"), ("def f(x):\n    match x:\n        case None: return 1", "None", "True"),
        ("x = [1]\nclass A:\n    def __init__(self): self.x = x\na = A()\ndef f(): return a.x", "[1]", "[2]"),
        ("import typing\nclass A(typing.NamedTuple):\n    x: int = 1\ndef f(): return A().x", "= 1", "= 2"),
        ("def f(x):\n    if x:\n        a = 1\n    return 2", "    return 2", "        return 2"),
        ("def f(x):\n    for _ in x: pass\n    else: return 1", "else: return 1", "return 1"),
        ("class A:\n    def m(self, x=1): return x\na = A()\nf = a.m", "x=1", "x=2"),
    ],
)  # fmt: skip
def test_every_way_code_is_reached_is_followed(source, old, new):
    """Closures, decorators, classes, containers, wrappers of installed packages: no edit of the user's code is missed."""
    assert source.replace(old, new) != source
    differ(source, source.replace(old, new))
    same(source, "# moved\n\n" + source)


def test_calling_a_function_does_not_change_what_it_is():
    """What caches have remembered is no input."""
    for source, call in [
        ("import functools\n@functools.lru_cache\ndef g(n): return n\ndef f(): return g(1)", "f()"),
        ("import numpy as np\ng = np.vectorize(lambda x: x + 1)\ndef f(): return g([1, 2])", "f()"),
        ("import functools\n@functools.singledispatch\ndef g(x): return 1\ndef f(): return g(1)", "f()"),
        (
            "import functools\nclass A:\n    @functools.cached_property\n    def x(self): return 1\na = A()\ndef f(): return a.x",
            "f()",
        ),
    ]:
        space = cell(source)
        before = fp.of_call(space["f"]).digest
        eval(call, space)
        assert fp.of_call(space["f"]).digest == before, source


def test_recursion_ends():
    """Direct, mutual and by closure; which of two is called still counts."""
    source = "def f(n): return n and g(n - 1)\ndef g(n): return n and f(n - 2)"
    space = cell(source)
    assert fp.of_call(space["f"]).digest != fp.of_call(space["g"]).digest
    differ(source, source.replace("n - 2", "n - 3"))
    source = "def make():\n    def h(n): return n and h(n - 1)\n    return h\nf = make()"
    differ(source, source.replace("n - 1", "n - 2"))
    source = "def g(): return TABLE\nTABLE = [g, {'x': g}]\ndef f(): return TABLE"
    differ(source, source + "\nTABLE[0] = f")


def test_lambdas_on_one_line_are_told_apart():
    space = cell(
        "a, b, c = lambda x: x + 1, lambda x: x + 2, (lambda: lambda x: x + 1)()\npair = (lambda k: (lambda: k, lambda: -k))(1)"
    )
    digests = {name: fp.of_call(space[name]).components for name in "abc"}
    assert len({tuple(sorted(found.items())) for found in digests.values()}) == 3
    assert fp.of_call(space["pair"][0]).digest != fp.of_call(space["pair"][1]).digest


def test_functions_in_a_set_are_followed():
    source = "def g(): return 1\ndef h(): return g()\ndef k(): return 5\nS = {h, k}\ndef f(): return S"
    differ(source, source.replace("return 1", "return 2"), source.replace("return 5", "return 6"))
    source = "S = {lambda: 1, lambda: 2, lambda: 3}\ndef f(): return S"
    assert len({step(source) for _ in range(10)}) == 1


def test_code_without_source_counts_by_its_bytecode():
    def made(source):
        space = {"__name__": "__main__"}
        exec(source, space)
        return fp.of_call(space["f"]).digest

    assert made("def f(x): return x in {'a', 'b'}") == made("\n\ndef f(x):  return x in {'b', 'a'}")
    assert made("def f(x): return x + 1") != made("def f(x): return x + 2")
    assert made("def f(x): return 1") != made("def f(x): return True")
    assert made("K = 1\ndef f(): return K") != made("K = 2\ndef f(): return K")
    assert made("def f(): return lambda: 1") != made("def f(): return lambda: 2")


def test_source_that_is_too_deep_does_not_crash():
    source = "def f(a): return " + "+".join(["a"] * 900)
    assert step(source) != step(source + "+a")
    deep = ast.Name("a", ast.Load())
    for _ in range(100_000):
        deep = ast.BinOp(deep, ast.Add(), ast.Name("a", ast.Load()))
    assert fp.normalise(deep)
    assert fp.attribute_uses(deep) == {"a": None}
    while isinstance(deep, ast.BinOp):
        deep = deep.left


def test_private_names_belong_to_their_class():
    source = "class {0}:\n    def m(self): return self.__x\n    _A__x, _B__x = 1, 2\nf = {0}.m"
    differ(source.format("A"), source.format("B"))


def test_normal_form_of_f_strings():
    def form(source):
        return fp.normalise(ast.parse(source))

    assert form("f'a' 'b' f'{x}'") == form("f'ab{x}'")
    assert form("f'{x:}'") == form("f'{x}'")
    assert form("f'{x}'") != form("f'{y}'") != form("'{x}'")
    assert form("class A:\n    'doc'") == form("class A: pass")
    assert form("class A:\n    'doc'") != fp.normalise(ast.parse("class A:\n    'doc'"), docstrings=True)
    assert form("{**a}") != form("{None: a}")
    assert form("f(a)") != form("f(*a)")


def test_names_loaded_are_globals_only():
    def g(a):
        b = ast.parse(a)
        return [os.path.join(x, re) for x in b], lambda: linecache

    assert fp.names_loaded(g.__code__) == {"ast", "os", "re", "linecache"}


def test_uses_of_a_name():
    uses = fp.attribute_uses(ast.parse("m.a.b(); m.c; n.x = 1; k.a; f(k)"))
    assert uses == {"m": frozenset({("a", "b"), ("c",)}), "n": None, "k": None, "f": None}


def test_functions_that_draw_from_a_hidden_generator_count_by_name():
    """`from random import random` brings a method of a hidden object, whose state is no input of the code."""
    import random

    space = cell("from random import random\nfrom numpy.random import normal\ndef f(): return random(), normal()")
    before = fp.of_call(space["f"]).digest
    random.random()
    np.random.random()  # noqa: NPY002
    assert fp.of_call(space["f"]).digest == before
    assert hashed(random.Random(1).random) != hashed(random.Random(2).random)


# ---- what a function is called, and where it lies ----

SHOP = """
RATE = 2
def helper(x): return x * RATE
def charge(cart, unit="kg"):
    total: float = 0
    for item in cart:
        total += helper(item)
    return total, unit
"""


@pytest.mark.parametrize(
    "other",
    [
        SHOP.replace("charge", "bill"),
        SHOP.replace("helper", "tidy"),
        SHOP.replace("(cart, unit", "(cart: list, unit: str").replace('"kg"):', '"kg") -> tuple:'),
        SHOP.replace("helper(x)", "helper(x: 'int') -> float"),
        SHOP.replace("total: float = 0", "total = 0"),
        "def helper(x): return x * RATE\n" + SHOP.replace("def helper(x): return x * RATE\n", ""),
        "from __future__ import annotations\n" + SHOP,
    ],
)
def test_names_and_annotations_are_no_part_of_a_function(other):
    name = "bill" if "bill" in other else "charge"
    assert step(SHOP, "charge", [1, 2]) == step(other, name, [1, 2])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def f(x): return f(x - 1) if x else 0", "def g(x): return g(x - 1) if x else 0\nf = g"),
        ("def a(x): return b(x)\ndef b(x): return a(x) if x else 1\ndef f(x): return a(x)", "def p(x): return q(x)\ndef q(x): return p(x) if x else 1\ndef f(x): return p(x)"),
        ("class A:\n    k = 1\n    def m(self): return A.k\ndef make(): return A()\ndef f(x): return make().m()", "class A:\n    k = 1\n    def m(self): return A.k\ndef build(): return A()\ndef f(x): return build().m()"),
    ],
)  # fmt: skip
def test_functions_that_call_each_other_may_be_renamed(one, other):
    assert step(one, "f", 1) == step(other, "f", 1)


def test_renaming_is_told_from_another_wiring():
    """Names are no part of what a function is; which function is called where is."""
    source = "def a(): return 1\ndef b(): return 2\ndef f(): return a() - b()"
    differ(source, *(source.replace("a() - b()", other) for other in ("b() - a()", "a() - a()", "b() - b()")))
    same(source, "def b(): return 1\ndef a(): return 2\ndef f(): return b() - a()")
    source = "def a(x): return x\ndef f(): return a(1), (lambda a: a(2))"
    differ(source, source.replace("lambda a: a(2)", "lambda c: a(2)"))
    source = "def a(): return 1\ndef f(): return a(), {}"
    differ(source.format("'a'"), source.format("'b'"))
    source = "def a(): return 1\ndef f(): return eval('a()') + a()"
    differ(source, source.replace("def a", "def b").replace("+ a", "+ b"))


def test_a_function_may_be_moved_into_a_module_and_the_module_renamed(project):
    shop, till = project("shop", SHOP), project("till", SHOP.replace("RATE = 2", '"""A till."""\nRATE = 2'))
    here = fp.of_call(cell(SHOP)["charge"], ([1],))
    assert here.digest == fp.of_call(shop.charge, ([1],)).digest == fp.of_call(till.charge, ([1],)).digest
    assert here.components.keys() != fp.of_call(shop.charge, ([1],)).components.keys()
    for spelling in (
        "import shop\ndef f(): return shop.charge([1])",
        "from shop import charge\ndef f(): return charge([1])",
        "import till as shop\ndef f(): return shop.charge([1])",
        "import till\ndef f(): return till.charge([1])",
    ):
        assert step(spelling) == step(SHOP + "def f(): return charge([1])")
    assert step("import shop\ndef f(): return shop.charge([1])") != step("import shop\ndef f(): return shop.helper([1])")
    project("shop", SHOP.replace("RATE = 2", "RATE = 3"))
    assert here.digest != fp.of_call(sys.modules["shop"].charge, ([1],)).digest


def test_a_class_may_be_moved(project):
    source = (
        "import dataclasses\n@dataclasses.dataclass\nclass Item:\n    price: float\n    def total(self): return self.price\n"
    )
    found = [fp.of_value([space["Item"](2.0)]).digest for space in (cell(source), vars(project("items", source)))]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("source", "old", "new"),
    [
        ("def g(): pass\ndef f(): return g.__name__", "g", "h"),
        ("def g(x: int): pass\ndef f(): return g.__annotations__", "int", "str"),
        ("import inspect\ndef g(x: int): pass\ndef f(): return inspect.signature(g)", "int", "str"),
        ("from typing import Literal, get_type_hints\nC = Literal['a']\ndef g(x: 'C'): pass\ndef f(): return get_type_hints(g)", "['a']", "['b']"),
        ("from typing import Literal\nimport inspect\nC = Literal['a']\ndef g(x: C): pass\ndef f(): return inspect.signature(g)", "['a']", "['b']"),
        ("def g(x): 'Doc.'\ndef f(ask): return ask(tools=[g])", "Doc.", "Other."),
        ("def g(x): 'Doc.'\ndef f(ask): return ask(tools=[g])", "g", "h"),
        ("def g(x: int): 'Doc.'\ndef f(ask): return ask(tools=[g])", "int", "str"),
        ("import dataclasses\nT = int\n@dataclasses.dataclass\nclass A:\n    x: T = 1\ndef f(): return dataclasses.fields(A)", "T = int", "T = float"),
        ("from typing import TypedDict\nclass I(TypedDict):\n    a: int\nclass O(TypedDict):\n    i: I\ndef f(): return O", "a: int", "a: str"),
        ("from typing import TypedDict\nclass I(TypedDict):\n    a: int\nclass O(TypedDict):\n    i: 'I'\ndef f(): return O", "a: int", "a: int\n    b: int"),
        ("from typing import NamedTuple, Literal\nC = Literal[1]\nclass A(NamedTuple):\n    x: C = 1\ndef f(): return A", "[1]", "[2]"),
        ("from typing import NewType\nU = NewType('U', int)\ndef f(): return U", "int", "str"),
        ("import abc\nclass A(abc.ABC): pass\nclass B: pass\nA.register(B)\ndef f(): return isinstance(B(), A)", "A.register(B)", "pass"),
    ],
)  # fmt: skip
def test_names_annotations_and_docstrings_count_where_something_looks_at_them(source, old, new):
    differ(source, re.sub(rf"\b{re.escape(old)}\b" if old.isidentifier() else re.escape(old), new, source))


CALLED_METHOD = """
class Base:
    def tax(self): return 1.2
    def far(self): return 0
class Shop(Base):
    kinds = {"a": 1}
    def __init__(self, k): self.k = k
    @property
    def rate(self): return self.half
    @property
    def half(self): return self.k / 2
    @staticmethod
    def rounded(x): return round(x)
    def charge(self, c):
        self.last = [self.step(x) for x in c]
        return self.rounded(self.rate * self.tax()) + self.kinds["a"]
    def step(self, x): return x + 1
    def other(self): return 1000
    def __repr__(self): return "shop"
shop = Shop(3)
charge = shop.charge
"""


def test_other_methods_of_a_called_objects_class_may_be_edited():
    def charge(*edits):
        source = CALLED_METHOD
        for old, new in edits:
            assert old in source
            source = source.replace(old, new)
        return step(source, "charge", [1])

    for edit in [
        ("1000", "2000"), ("return 0", "return 7"), ('"shop"', '"a shop"'), ("self.k = k", "self.k = 1 * k"),
        ("class Shop(Base):", "class Shop(Base):\n    new = 1"),
    ]:  # fmt: skip
        assert charge(edit) == charge(), edit
    for edit in [
        ("self.k / 2", "self.k / 3"), ("x + 1", "x + 2"), ("1.2", "1.3"), ("round(x)", "int(x)"), ('"a": 1', '"a": 2'),
        ("Shop(3)", "Shop(4)"),
    ]:  # fmt: skip
        assert charge(edit) != charge(), edit
    for way in [
        "self", "other(self)", "getattr(self, 'other')", "super().other()", "self.__class__", "type(self)", "(lambda: self)()",
        "vars()", "lambda self: self.other()", "locals()",
    ]:  # fmt: skip
        handed = ("return x + 1", f"return {way}")
        assert charge(handed) != charge(handed, ("1000", "2000")), way
    led_back = ("self.k = k", "self.k = k; self.me = [self]")
    assert charge(led_back) != charge(led_back, ("1000", "2000"))


# ---- modules of the project ----


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Writes and imports modules of a project; `project(name, source)` again writes the file and reloads it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = []

    def write(name, source, load=True):
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(source))
        os.utime(path, (len(names), len(names)))
        names.append(name)
        importlib.invalidate_caches()
        if not load:
            return None
        sys.modules.pop(name, None)
        linecache.checkcache()
        return importlib.import_module(name)

    yield write
    for name in names:
        sys.modules.pop(name, None)


LMOD = "K = 1\nUNREAD = 1\ndef helper(): return K\ndef f(): return helper()\ndef other(): return 1\nclass A:\n    def m(self): return 1\n"


def test_of_a_module_only_what_is_read_counts(project):
    """`lmod.f()` depends on f and what f reads; a comment, or an unrelated function of the module, doesn't matter."""
    code = "def f(): return lmod.f()"

    def of(source):
        return step(code, lmod=project("lmod", source))

    base = of(LMOD)
    assert of("# comment\n" + LMOD) == base
    assert of(LMOD.replace("def other(): return 1", "def other(): return 2")) == base
    assert of(LMOD.replace("UNREAD = 1", "UNREAD = 2")) == base
    assert of(LMOD.replace("K = 1", "K = 2")) != base
    assert of(LMOD.replace("return K", "return -K")) != base


def test_a_module_used_as_a_whole_counts_as_a_whole(project):
    def of(source):
        return step("def f(): return vars(lmod)", lmod=project("lmod", source))

    base = of(LMOD)
    assert of("# comment\n" + LMOD) == base
    for old, new in [("def other(): return 1", "def other(): return 2"), ("UNREAD = 1", "UNREAD = 2")]:
        assert of(LMOD.replace(old, new)) != base


def test_a_module_imported_inside_a_function_counts(project):
    """Whether it is loaded yet makes no difference; that a constant was set since does."""
    code = "def f():\n    import lmod\n    return lmod.f()"
    project("lmod", LMOD, load=False)
    sys.modules.pop("lmod", None)
    unloaded = step(code)
    module = project("lmod", LMOD)
    assert step(code) == unloaded
    module.K = 5
    assert step(code) != unloaded
    project("lmod", LMOD.replace("K = 1", "K = 7"))
    assert step(code) != unloaded
    project("lmod2", "import lmod\n", load=False)
    through = "def f():\n    from lmod2 import lmod"
    before = step(through)
    project("lmod", LMOD)
    assert step(through) != before


def test_a_file_edited_but_not_reloaded_is_not_mistaken_for_what_runs(project, tmp_path):
    """The loaded function is what will run: its digest is neither that of the new text, nor is the new text's its."""
    module = project("lmod", LMOD)
    loaded = module.f
    old = fp.of_call(loaded).digest
    path = tmp_path / "lmod.py"
    path.write_text(LMOD.replace("return helper()", "return helper() + 1"))
    os.utime(path, (999, 999))
    linecache.checkcache()
    fresh = types.FunctionType(loaded.__code__.replace(co_firstlineno=loaded.__code__.co_firstlineno), loaded.__globals__, "f")
    stale = fp.of_call(fresh).digest
    reloaded = fp.of_call(project("lmod", path.read_text()).f).digest
    assert reloaded not in {old, stale}


def test_lines_added_above_a_loaded_function_do_not_matter(project, tmp_path):
    module = project("lmod", LMOD)
    path = tmp_path / "lmod.py"
    path.write_text("# a comment\n" + LMOD)
    os.utime(path, (999, 999))
    linecache.checkcache()
    edited = fp.of_call(module.f).digest
    assert fp.of_call(project("lmod", LMOD).f).digest == edited


def test_installed_packages_count_by_name_and_their_versions_are_recorded():
    found = fp.of_call(cell("import numpy as np\nimport json\ndef f(x): return np.sum(json.loads(x))")["f"], (1,))
    assert found.versions == {"numpy": np.__version__}
    assert set(found.components) == {"call", "function f", "arg x"}


def test_functions_of_different_modules_share_no_label(project):
    one = project("lmod", "def g(): return 1\n").g
    space = cell("def g(): return 2\ndef f(): return g(), one()", one=one)
    assert {"function g", "function lmod.g"} <= set(fp.of_call(space["f"]).components)
    space = cell("def make(k):\n    def g(): return k\n    return g\nA, B = make(1), make(2)\ndef f(): return A(), B()")
    assert "function make.<locals>.g#2" in fp.of_call(space["f"]).components


# ---- calls and cells ----


def test_arguments_are_known_by_parameter_name():
    f = cell("def f(a, b=2, *args, **kw): return a")["f"]
    assert fp.of_call(f, (1,)).digest == fp.of_call(f, (), {"a": 1}).digest
    assert fp.of_call(f, (1, 2)).digest != fp.of_call(f, (2, 1)).digest
    assert fp.of_call(f, (1, 2), {"x": 1, "y": 2}).digest != fp.of_call(f, (1, 2), {"y": 2, "x": 1}).digest
    assert fp.of_call(f, (1,), {"b": 2}).digest == fp.of_call(f, (), {"b": 2, "a": 1}).digest
    assert set(fp.of_call(f, (1, 2, 3)).components) >= {"arg a", "arg b", "arg 2"}


def test_a_bound_method_counts_with_its_object():
    space = cell("class A:\n    def __init__(self, k): self.k = k\n    def m(self): return self.k")
    assert fp.of_call(space["A"](1).m).digest != fp.of_call(space["A"](2).m).digest


def test_a_name_may_stand_for_nothing():
    def of(**names):
        found = fp.Fingerprinter()
        found.add_code("code", ast.parse("x + len(y)"))
        for name in ("x", "len", "y"):
            found.add_name(name, names)
        return found.result()

    assert len({of().digest, of(x=None).digest, of(x=1).digest, of(x=1, len=max).digest, of(x="undefined").digest}) == 5


def test_the_order_in_which_names_are_added_does_not_matter():
    space = {"x": [1], "y": {"a"}, "z": None}

    def of(order):
        found = fp.Fingerprinter()
        for name in order:
            found.add_name(name, space)
        return found.result().digest

    assert len({of(order) for order in itertools.permutations("xyz")}) == 1


def test_two_shared_cells_of_one_notebook_are_one_input():
    """A counter that two closures share is another thing than two counters."""
    source = "def make():\n    n = [0]\n    def a(): n[0] += 1\n    def b(): return n[0]\n    return a, b\na, b = {}\ndef f(): return a(), b()"
    differ(source.format("make()"), source.format("make()[0], make()[1]"))


def test_import_is_fast_and_brings_no_array_library():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import durable_nb._fingerprint; print([m for m in ('numpy', 'pandas', 'pyarrow', 'importlib.metadata') if m in sys.modules])"
    assert (
        subprocess.check_output(
            [
                sys.executable,
                "-S",
                "-c",
                f"import sys; sys.path += {[p for p in sys.path if 'packages' in p]!r}; {code}",
            ],
            text=True,
        ).strip()
        == "[]"
    )


CALLED = """
import math
K = 3
def helper(x, y=1): return x * K + y
def f(x): return helper(x) + math.sqrt(len(str(x)))
"""


CHANGES = [
    "K = 4",
    "K = [3]; f.last = f; del f.last",
    "def helper(x, y=1): return x",
    "helper.__defaults__ = (2,)",
    "helper.__kwdefaults__ = {'y': 5}",
    "helper.note = 1",
    "helper = abs",
    "f.__code__ = helper.__code__",
    "def len(x): return 0",
    "import cmath as math",
    "del K",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_function_asked_about_again_is_compared_as_it_is_now(change):
    """What it calls and reads may change between two steps of one loop."""
    space, unasked = cell(CALLED), cell(CALLED)
    before = fp.of_call(space["f"], (1,))
    assert fp.of_call(space["f"], (1,)) == before
    for changed in (space, unasked):
        exec(change, changed)
    after = fp.of_call(space["f"], (1,))
    assert after.digest != before.digest
    assert after == fp.of_call(unasked["f"], (1,))


@pytest.mark.parametrize("change", CHANGES)
def test_a_name_asked_about_again_is_compared_as_it_is_now(change):
    """What cells read is looked at in each of them; functions that say what they said aren't walked again."""

    def looked(names):
        found = fp.Fingerprinter()
        found.add_name("g", names)
        return found.result()

    source = CALLED + "def g(x): return [f(x)]"
    space, unasked = cell(source), cell(source)
    before = looked(space)
    assert looked(space) == before
    for changed in (space, unasked):
        exec(change, changed)
    after = looked(space)
    assert after.digest != before.digest
    assert after == looked(unasked)


def test_many_classes_are_walked_once(monkeypatch):
    source = "\n".join(
        f"class C{n}:\n    def m(self, x): return x + {n} + K\n    def o(self): return C{n}().m(1)" for n in range(40)
    )
    space = cell("K = 1\n" + source + "\nmany = [C1, C2, C39]\ndef f(): return [" + ", ".join(f"C{n}" for n in range(40)) + "]")
    before = fp.of_call(space["f"])
    walked = []
    monkeypatch.setattr(fp.Fingerprinter, "_function", lambda *_: walked.append(1) or iter(()))
    assert fp.of_call(space["f"]) == before
    assert len(walked) <= 1  # what `f` itself says isn't remembered where it reads classes
    monkeypatch.undo()
    space["K"] = 2
    assert fp.of_call(space["f"]).digest != before.digest


def test_a_list_read_by_a_function_is_compared_each_time():
    space = cell(CALLED, extra=[1])
    exec("def f(x): return helper(x) + len(extra)", space)
    digests = []
    for _ in range(3):
        digests.append(fp.of_call(space["f"], (1,)).digest)
        space["extra"].append(1)
    assert len(set(digests)) == 3
    del space["extra"][1:]
    assert fp.of_call(space["f"], (1,)).digest == digests[0]


def test_an_installed_function_that_was_replaced_in_its_module_is_compared(monkeypatch):
    """`dedent` is known by its name only as long as its module gives it under that name."""
    source = "from textwrap import dedent\ndef f(x): return dedent(x)"
    space, unasked = cell(source), cell(source)
    before = fp.of_call(space["f"], (1,))
    monkeypatch.setattr("textwrap.dedent", str)
    after = fp.of_call(space["f"], (1,))
    assert after.digest != before.digest
    assert after == fp.of_call(unasked["f"], (1,))


@pytest.mark.parametrize("args", [(), (1,), (1, "two"), (1, 2.5, None), (b"x", True, 1, 2, 3)])
def test_a_known_functions_identity_is_the_one_that_walking_it_gives(args, monkeypatch):
    def fn(a=0, /, b=0, *rest):
        return a, b, rest, len(str(a))

    walked = _identities.of_call(fn, args)
    quick = _identities.of_call(fn, args)
    monkeypatch.setattr(_identities, "_of_known", lambda *_: None)
    for other in (quick, _identities.of_call(fn, args)):
        assert other == walked
        assert fp.digest_of(other.components) == other.digest


def test_no_two_sequences_of_texts_share_an_engines_digest():
    from durable_nb._codec import digest_of

    sequences = [
        ("a\0b", "c"),
        ("a", "b\0c"),
        ("a", "b", "c"),
        ("a\0b\0c",),
        ("abc",),
        ("ab", "c"),
        ("", "abc"),
        ("1:a", "b"),
        ("\ud800",),
    ]
    assert len({digest_of(*sequence) for sequence in sequences}) == len(sequences)
