"""Values and rows as bytes: what goes in comes back, and nothing that isn't ours is decoded."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import math
import os
import pickle
import subprocess
import sys
import textwrap
import uuid
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from durable_nb import _codec
from durable_nb import _records as rec
from durable_nb._clock import Instant
from durable_nb._codec import JSON, PICKLE, Signer, decode, encode, load_key
from durable_nb.errors import CorruptStoreError, StoreError, UntrustedStoreError

KEY, OTHER_KEY = b"k" * 32, b"o" * 32


def round_trip(value):
    form, data = encode(value)
    assert type(data) is bytes
    return decode(form, data)


def identical(a, b):
    """The same types and the same values all the way down, NaN and -0.0 and the order of dicts included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, complex):
        return identical(a.real, b.real) and identical(a.imag, b.imag)
    if isinstance(a, (list, tuple, collections.deque)):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    return a == b


# -- values -----------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec=None, exclude_categories=())) | st.sampled_from(["a\r\nb", "\ud800", "\ufeff", "\0", "'"])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
SCALARS = PLAIN | st.integers(-(2**6000), 2**6000) | st.binary() | st.complex_numbers()
HASHABLE = st.none() | st.booleans() | st.integers() | TEXT | st.binary()
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(HASHABLE, inner)
        | st.sets(HASHABLE)
        | st.frozensets(HASHABLE)
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(VALUES)
def test_any_value_comes_back_exactly(value):
    assert identical(round_trip(value), value)


@settings(deadline=None)
@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=20))
def test_json_is_used_only_where_it_is_exact(value):
    form, data = encode(value)
    assert identical(decode(form, data), value)
    if form == JSON:
        assert b"NaN" not in data or "NaN" in repr(value)


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (None, JSON),
        (True, JSON),
        (0, JSON),
        (-0.0, JSON),
        (1e308, JSON),
        (5e-324, JSON),
        ("line\r\nend", JSON),
        ("\u2028", JSON),
        ({"a": [1, {"b": None}]}, JSON),
        (2**4096 - 1, JSON),
        (2**20_000, PICKLE),
        (math.nan, PICKLE),
        ([math.inf], PICKLE),
        ("\ud800", PICKLE),
        ({"\udfff": 1}, PICKLE),
        ({1: 2}, PICKLE),
        ({None: 2}, PICKLE),
        ({True: 1, 2: 0}, PICKLE),
        ((1, 2), PICKLE),
        ([()], PICKLE),
        (b"\r\n\0", PICKLE),
        (bytearray(b"x"), PICKLE),
        ({1, 2}, PICKLE),
        (frozenset({1}), PICKLE),
        (range(3), PICKLE),
        (collections.OrderedDict(b=1, a=2), PICKLE),
        (collections.deque([1, 2], maxlen=5), PICKLE),
        (decimal.Decimal("1.10"), PICKLE),
        (fractions.Fraction(1, 3), PICKLE),
        (dt.datetime(2027, 1, 1, tzinfo=dt.UTC), PICKLE),
        (uuid.UUID(int=7), PICKLE),
        (PurePosixPath("/a"), PICKLE),
        (3 + 4j, PICKLE),
        (..., PICKLE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_form_and_the_value_of(value, form):
    assert encode(value)[0] == form
    assert identical(round_trip(value), value)


class Text(str):
    __slots__ = ("mark",)


class Colour(enum.IntEnum):
    RED = 1


class Flags(dict):
    pass


@dataclasses.dataclass
class Order:
    email: str
    items: list[object]


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: float


Pair = collections.namedtuple("Pair", "a b")  # noqa: PYI024


@pytest.mark.parametrize(
    "value",
    [Text("t"), Colour.RED, Flags(a=1), Pair(1, 2), Order("j", [Frozen(math.inf)]), True, [Colour.RED]],
    ids=repr,
)
def test_a_subclass_or_dataclass_keeps_its_type(value):
    back = round_trip(value)
    assert back == value
    assert type(back) is type(value)


def test_an_object_in_two_places_stays_one_object():
    shared = [1]
    first, second = round_trip([shared, shared])
    assert first is second
    outer = round_trip({"a": shared, "b": {"c": shared}})
    assert outer["a"] is outer["b"]["c"]


def test_containers_that_hold_themselves_come_back():
    cyclic = [1]
    cyclic.append(cyclic)
    back = round_trip(cyclic)
    assert back[1] is back
    knot = {}
    knot["self"] = [knot]
    back = round_trip(knot)
    assert back["self"][0] is back


@pytest.mark.parametrize("depth", [49, 51, 200])
def test_deep_values_come_back(depth):
    value = leaf = []
    for _ in range(depth):
        leaf.append([])
        leaf = leaf[0]
    assert round_trip(value) == value


def test_equal_but_separate_objects_stay_separate():
    back = round_trip([[], []])
    assert back[0] is not back[1]


# -- what lives in __main__ -------------------------------------------------------------------------------------------

MAKES = """
    import dataclasses, sys
    from durable_nb._codec import encode

    scale = 10

    @dataclasses.dataclass
    class Point:
        x: int
        def scaled(self): return self.x * scale

    def times(n): return n * scale
    def counter():
        n = 0
        def more():
            nonlocal n
            n += 1
            return n
        return more
    more = counter(); more()

    form, data = encode({"point": Point(3), "cls": Point, "fn": times, "more": more, "lambda": lambda n: n + scale})
    assert form == "pickle"
    sys.stdout.buffer.write(data)
"""
READS = """
    import sys
    from durable_nb._codec import decode

    data = open(sys.argv[1], "rb").read()
    LIVE
    back = decode("pickle", data)
    assert back["point"].x == 3
    assert back["fn"](2) == 2 * scale
    assert back["lambda"](2) == 2 + scale
    assert back["more"]() == 2
    assert back["point"].scaled() == 3 * scale
    assert type(back["point"]) is back["cls"]
    print(back["cls"].__name__, back["point"].scaled())
"""
LIVE = """
    import dataclasses
    scale = 100
    @dataclasses.dataclass
    class Point:
        x: int
        def scaled(self): return -self.x * scale
    times = None
"""


def in_python(tmp_path, name, source, *args):
    file = tmp_path / name
    file.write_text(textwrap.dedent(source))
    done = subprocess.run([sys.executable, file, *args], capture_output=True, check=False)
    assert not done.returncode, done.stderr.decode()
    return done.stdout


def test_objects_of_the_notebook_come_back_in_another_kernel(tmp_path):
    """Functions see the live notebook's variables; a class that isn't defined there comes along, with its methods."""
    data = tmp_path / "data"
    data.write_bytes(in_python(tmp_path, "makes.py", MAKES))
    said = in_python(tmp_path, "reads.py", READS.replace("LIVE", "scale = 7"), str(data))
    assert said.split() == [b"Point", b"21"]


def test_a_class_that_the_notebook_defines_is_the_live_one(tmp_path):
    """`isinstance` holds after a restart, and edited methods are the ones that run."""
    data = tmp_path / "data"
    data.write_bytes(in_python(tmp_path, "makes.py", MAKES))
    reads = READS.replace("LIVE", LIVE.strip()).replace("3 * scale", "-3 * scale")
    reads += '    assert back["cls"] is Point\n'
    assert in_python(tmp_path, "reads.py", reads, str(data)).split() == [b"Point", b"-300"]


# -- the signer ---------------------------------------------------------------------------------------------------------


@given(st.text(), st.binary())
def test_a_signed_row_is_verified_under_its_key_and_name(name, body):
    assert Signer(KEY).verify(name, Signer(KEY).sign(name, body)) == body


@given(st.binary(), st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_a_row_of_another_key_is_refused_as_untrusted(body, mine, other):
    if mine != other:
        with pytest.raises(UntrustedStoreError, match="another key"):
            Signer(mine).verify("n", Signer(other).sign("n", body))


@given(st.binary(max_size=30), st.data())
def test_a_flipped_bit_anywhere_is_seen(body, data):
    row = bytearray(Signer(KEY).sign("n", body))
    bit = data.draw(st.integers(0, len(row) * 8 - 1))
    row[bit // 8] ^= 1 << bit % 8
    with pytest.raises((CorruptStoreError, UntrustedStoreError), match="'n'"):
        Signer(KEY).verify("n", bytes(row))


@given(st.binary(max_size=30), st.data())
def test_a_row_cut_short_or_prolonged_is_seen(body, data):
    row = Signer(KEY).sign("n", body)
    cut = data.draw(st.integers(0, len(row) - 1))
    for changed in (row[:cut], row + row[cut:]):
        with pytest.raises((CorruptStoreError, UntrustedStoreError)):
            Signer(KEY).verify("n", changed)


@given(st.text(), st.text(), st.binary())
def test_a_row_moved_to_another_key_is_refused(name, other, body):
    if name != other:
        with pytest.raises(CorruptStoreError):
            Signer(KEY).verify(other, Signer(KEY).sign(name, body))


@given(st.binary(), st.binary(), st.integers(0, 8))
def test_the_border_between_name_and_body_is_signed(a, b, at):
    whole = a + b
    at = min(at, len(whole))
    if whole[:at] != a:
        assert Signer(KEY).mac(a, b) != Signer(KEY).mac(whole[:at], whole[at:])


@given(st.binary())
def test_arbitrary_bytes_are_no_row(row):
    with pytest.raises((CorruptStoreError, UntrustedStoreError)):
        Signer(KEY).verify("n", row)


def test_nothing_of_a_foreign_row_is_unpickled():
    class Bomb:
        def __reduce__(self):
            return os.abort, ()

    row = Signer(OTHER_KEY).sign("n", pickle.dumps(Bomb()))
    with pytest.raises(UntrustedStoreError):
        Signer(KEY).verify("n", row)


# -- records ----------------------------------------------------------------------------------------------------------

NOW = Instant(1.5, "boot", 2.5)
SAID = "\u00e9\U0001f600\r\n\0"
RECORDS = [
    rec.Outcome("run", SAID, "b", "r", PICKLE, b"\0\xff", 2, 1.0, 2.0, rec.Provenance(1, {"code": SAID}, {"numpy": "2"})),
    rec.Attempts("run", "s", "r", 2, f"OSError: {SAID}", 1.0, NOW, 4.0),
    rec.Timer(SAID, NOW, 4.0, None),
    rec.RunRecord("r", "cell", SAID, "scope", 0, "k", 1.0, error=SAID),
    rec.Lease(3, "p"),
    rec.Generation(4),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_from_its_row(record):
    signer = Signer(KEY)
    assert rec.unpack(signer, "key", rec.pack(signer, "key", record), type(record)) == record


def test_a_signed_row_that_is_no_such_record_is_corrupt():
    signer = Signer(KEY)
    for body in (b"", b"\xc1", b"\x80", rec.pack(signer, "k", rec.Generation(1))[24:]):
        with pytest.raises(CorruptStoreError, match="'k'"):
            rec.unpack(signer, "k", signer.sign("k", body), rec.Lease)


def test_a_record_of_a_later_release_with_more_fields_is_read():
    """Fields may be added: an older reader passes over them."""
    import msgspec

    signer = Signer(KEY)
    body = msgspec.msgpack.encode({"epoch": 1, "owner": "p", "format": 1, "news": 5})
    assert rec.unpack(signer, "k", signer.sign("k", body), rec.Lease) == rec.Lease(1, "p")


def test_names_that_differ_have_scopes_that_differ_and_prefixes_that_do_not_meet():
    names = ["a", "a/b", "a%2Fb", "A", "a ", "~id 1", "~", "a/000000/", "\u00e9", "e\u0301"]
    prefixes = [rec.step_prefix(rec.scope_of(name), 0) for name in names]
    assert len(set(prefixes)) == len(names)
    assert not any(p != q and p.startswith(q) for p in prefixes for q in prefixes)


# -- the signing key --------------------------------------------------------------------------------------------------


@pytest.fixture
def key_file(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "er" / "signing.key"
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(file))
    return file


def test_the_key_is_made_once_with_mode_0600(key_file):
    key = load_key()
    assert len(key) == 32
    assert load_key() == key
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert key_file.parent.stat().st_mode & 0o077 == 0
    assert [file.name for file in key_file.parent.iterdir()] == [key_file.name]


def test_the_key_lies_in_jupyters_data_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("DURABLE_NB_KEY_FILE", raising=False)
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    key = load_key()
    assert (tmp_path / "jupyter" / "durable_nb" / "signing.key").read_bytes() == key


def test_processes_that_start_at_once_get_one_key(key_file):
    source = """
        import sys
        from durable_nb._codec import load_key
        print("ready", flush=True)
        sys.stdin.readline()
        print(load_key().hex())
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(5)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    keys = {racer.communicate()[0].strip() for racer in racers}
    assert keys == {load_key().hex()}
    assert [file.name for file in key_file.parent.iterdir()] == [key_file.name]


@pytest.mark.parametrize("held", [b"", b"k" * 31, b"k" * 33])
def test_a_damaged_key_file_is_told_and_left_alone(key_file, held):
    key_file.parent.mkdir(parents=True)
    key_file.write_bytes(held)
    with pytest.raises(StoreError, match=f"holds {len(held)} bytes instead of 32") as caught:
        load_key()
    assert str(key_file) in str(caught.value)
    assert key_file.read_bytes() == held


def test_a_key_file_that_cannot_be_made_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "file" / "signing.key"))
    with pytest.raises(StoreError, match="DURABLE_NB_KEY_FILE"):
        load_key()


@given(st.text(st.characters(codec=None, exclude_categories=())), st.text())
def test_a_secrets_stand_in_depends_on_the_secret_and_never_holds_it(first, second):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_codec, "load_key", lambda: KEY)
        digest = _codec.keyed_digest(first)
        assert (digest == _codec.keyed_digest(second)) is (first == second)
        patch.setattr(_codec, "load_key", lambda: OTHER_KEY)
        assert _codec.keyed_digest(first) != digest
