"""A cell's result as one file: what is stored comes back, and nothing else ever does."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import threading

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from durable_nb._cellcache.entries import CHECKED_BYTES, MAPPED_BYTES, CellResult, Entries
from durable_nb._cellcache.external import ExternalState
from durable_nb._codec import Signer
from durable_nb._pickling import NO_REFERENCES, References
from durable_nb.errors import CorruptStoreError, UntrustedStoreError

SIGNER = Signer(b"k" * 32)
ALLOWED = (CorruptStoreError, UntrustedStoreError)


@pytest.fixture
def entries(tmp_path):
    return Entries(tmp_path / "cells", SIGNER)


def keep(entries, values, *, scope="cell", key="key", outputs=b"", deleted=(), references=NO_REFERENCES):
    result = CellResult(values, ExternalState(), list(deleted), outputs, 1 if outputs else 0, 1.5)
    return entries.store(
        scope,
        key,
        result,
        name="cell",
        components={"code": "c"},
        versions={"numpy": "2"},
        created_at=1.0,
        references=references,
    )


def unknown(key):
    raise KeyError(key)


def entry(entries, scope="cell", key="key"):
    found = list(entries.of_key(scope, key))
    assert len(found) == 1
    return found[0]


def back(entries, **where):
    return entry(entries, **where).values(unknown)


def file_of(entries, scope="cell"):
    (file,) = (entries._folder / scope).iterdir()
    return file


def rewrite(file, data):
    file.unlink()
    file.write_bytes(data)


# -- round trips ------------------------------------------------------------------------------------------------------

BIG = MAPPED_BYTES // 8
ARRAYS = {
    "small": np.arange(10.0),
    "empty": np.empty((0, 3)),
    "zero-dimensional": np.array(3.5),
    "just below a map": np.arange(BIG - 1, dtype="f8"),
    "a map": np.arange(BIG, dtype="f8"),
    "beyond a map": np.arange(3 * BIG + 5, dtype="i8").reshape(-1, 1),
    "Fortran order": np.asfortranarray(np.arange(2.0 * BIG).reshape(2, BIG)),
    "a view": np.arange(4 * BIG)[::2],
    "reversed": np.arange(100)[::-1],
    "records": np.array([(1, b"a"), (2, b"b")], dtype=[("n", "i4"), ("s", "S3")]),
    "text": np.array(["a", "\u00e9\0b"]),
    "objects": np.array([1, "x", None, [2]], dtype=object),
    "big endian": np.arange(5, dtype=">i4"),
    "booleans": np.array([True, False]),
    "dates": np.array(["2027-01-01", "NaT"], dtype="M8[s]"),
    "NaN payloads": np.frombuffer(struct.pack("<QQ", 0x7FF8000000000001, 0xFFF8000000000000), dtype="f8").copy(),
}


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS.keys())
def test_an_array_comes_back_as_it_was(entries, array, readonly):
    """Bytes, shape, order, dtype, and, where numpy's own pickle says it, whether it may be written to."""
    array = array.copy(order="K")
    array.flags.writeable = not readonly or array.dtype.kind in "OM"
    keep(entries, {"x": array})
    got = back(entries)["x"]
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert got.strides == array.strides or not array.size, "an empty array has no bytes to step over"
    assert list(got.ravel()) == list(array.ravel()) if got.dtype == object else got.tobytes() == array.tobytes()
    assert got.flags.writeable is array.flags.writeable


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from("abc"),
        st.recursive(
            st.none() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=5000),
            lambda inner: st.lists(inner) | st.dictionaries(st.integers(), inner) | st.tuples(inner, inner),
        ),
    ),
    st.binary(max_size=100),
)
def test_any_values_and_outputs_come_back(tmp_path_factory, values, outputs):
    entries = Entries(tmp_path_factory.mktemp("cells"), SIGNER)
    manifest = keep(entries, values, outputs=outputs, deleted=["gone"])
    found = entry(entries)
    assert found.values(unknown) == values
    assert found.outputs == outputs
    assert found.manifest == manifest
    assert manifest.bound == sorted(values)
    assert manifest.deleted == ["gone"]


def test_aliases_among_the_values_survive(entries):
    shared, array = [1], np.arange(2.0 * BIG)
    keep(entries, {"a": shared, "b": {"in": shared}, "x": array, "same": array})
    got = back(entries)
    assert got["a"] is got["b"]["in"]
    assert got["x"] is got["same"]


def test_writing_to_a_restored_array_never_reaches_the_file(entries):
    """The map is private: the next restore finds what was stored, and so does another array of the same file."""
    array = np.zeros(2 * BIG)
    keep(entries, {"x": array, "y": np.ones(2 * BIG), "small": np.zeros(5)})
    before = file_of(entries).read_bytes()
    first, beside = back(entries), back(entries)
    first["x"][:] = 7
    first["small"][:] = 7
    assert (beside["x"] == 0).all()
    assert (first["y"] == 1).all()
    assert (back(entries)["x"] == 0).all()
    assert (back(entries)["small"] == 0).all()
    assert file_of(entries).read_bytes() == before


def test_a_restored_array_outlives_its_file(entries):
    keep(entries, {"x": np.arange(2.0 * BIG)})
    got = back(entries)["x"]
    file_of(entries).unlink()
    assert got.sum() == np.arange(2.0 * BIG).sum()
    got += 1
    assert got[0] == 1


def test_a_restored_value_of_a_replaced_entry_keeps_its_bytes(entries):
    keep(entries, {"x": np.zeros(2 * BIG)})
    got = back(entries)["x"]
    keep(entries, {"x": np.ones(2 * BIG)})
    assert (got == 0).all()
    assert (back(entries)["x"] == 1).all()


def test_frames_come_back_and_can_be_written(entries):
    frame = pd.DataFrame({"a": np.arange(2 * BIG), "b": "text", "c": pd.Categorical(["x", "y"] * BIG)})
    keep(entries, {"frame": frame, "column": frame["a"]})
    got = back(entries)
    pd.testing.assert_frame_equal(got["frame"], frame)
    got["frame"].loc[0, "a"] = -1
    got["frame"]["new"] = 1
    assert got["frame"].loc[0, "a"] == -1


def test_bytes_and_bytearrays_of_every_size_come_back(entries):
    values = {f"{kind.__name__}_{n}": kind(os.urandom(n)) for kind in (bytes, bytearray) for n in (0, 1, 4095, 4096, 2 << 20)}
    keep(entries, values)
    got = back(entries)
    assert got == values
    assert {name: type(value) for name, value in got.items()} == {name: type(value) for name, value in values.items()}


def test_references_are_stored_as_their_names(entries):
    live = [1, 2, 3]
    keep(entries, {"x": {"holds": live}}, references=References({id(live): "live"}))
    assert entry(entries).values({"live": live}.__getitem__)["x"]["holds"] is live


def test_an_entry_is_found_by_scope_and_key_only(entries):
    keep(entries, {"x": 1}, key="one")
    keep(entries, {"x": 2}, key="two")
    keep(entries, {"x": 3}, scope="other", key="one")
    assert back(entries, key="one") == {"x": 1}
    assert back(entries, key="two") == {"x": 2}
    assert back(entries, scope="other", key="one") == {"x": 3}
    assert list(entries.of_key("cell", "on")) == []
    assert list(entries.of_key("none", "one")) == []
    assert {m.key for m in entries.manifests("cell")} == {"one", "two"}
    assert list(entries.manifests("none")) == []


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_file_is_read_only_whole_and_alone(entries):
    keep(entries, {"x": np.arange(2.0 * BIG)}, outputs=b"o")
    file = file_of(entries)
    assert file.stat().st_mode & 0o777 == 0o400
    assert file.parent.stat().st_mode & 0o077 == 0
    assert file.suffix == ".cell"


def test_buffers_lie_where_pages_begin(entries):
    """Aligned, so that a map costs nothing until it is touched."""
    keep(entries, {"x": np.arange(1.0 * BIG), "y": np.full(3 * BIG + 1, 7.0)})
    data = file_of(entries).read_bytes()
    for needle in (np.arange(1.0 * BIG).tobytes(), np.full(3 * BIG + 1, 7.0).tobytes()):
        assert data.index(needle[:4096]) % 4096 == 0


class Refuses:
    def __reduce__(self):
        raise RuntimeError("no pickle of me")


@pytest.mark.parametrize("value", [Refuses(), threading.Lock(), (i for i in "x")], ids=["own error", "lock", "generator"])
def test_a_failed_pickle_leaves_nothing_behind(entries, value):
    with pytest.raises((RuntimeError, TypeError, pickle.PicklingError)):
        keep(entries, {"x": np.arange(2.0 * BIG), "bad": value})
    folder = entries._folder / "cell"
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_full_disk_leaves_the_entry_that_was_there(entries, monkeypatch):
    keep(entries, {"x": 1})

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        keep(entries, {"x": 2})
    monkeypatch.undo()
    assert back(entries) == {"x": 1}
    assert len(list((entries._folder / "cell").iterdir())) == 1


# -- damage -----------------------------------------------------------------------------------------------------------


def sample(folder):
    """An entry of every part: values, outputs, a read and a mapped buffer."""
    entries = Entries(folder, SIGNER)
    small, large = np.arange(700.0), np.frombuffer(np.random.default_rng(1).bytes(MAPPED_BYTES + 100), "u1").copy()
    values = {"small": small, "large": large, "text": "t" * 50, "n": 10**20}
    keep(entries, values, outputs=b"shown" * 20)
    return entries, values


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    entries, values = sample(tmp_path_factory.mktemp("whole"))
    return entries, values, file_of(entries).read_bytes()


def never_a_wrong_value(whole, data):
    """Opening and reading what is in the file gives the stored values, or one of the two errors."""
    entries, values, original = whole
    rewrite(file_of(entries), data)
    try:
        found = entry(entries)
        got, outputs = found.values(unknown), found.outputs
    except ALLOWED:
        return False
    finally:
        rewrite(file_of(entries), original)
    assert outputs == b"shown" * 20
    assert got.keys() == values.keys()
    assert all(np.array_equal(got[name], values[name]) for name in values)
    return True


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_cut_short_anywhere_it_is_an_error(whole, data):
    original = whole[2]
    heads = st.integers(0, min(3000, len(original) - 1))
    cut = data.draw(st.integers(0, len(original) - 1) | heads)
    assert not never_a_wrong_value(whole, original[:cut])


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=1, max_size=5000))
def test_prolonged_it_is_an_error(whole, more):
    assert not never_a_wrong_value(whole, whole[2] + more)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_flipped_bit_anywhere_gives_an_error_or_lies_in_padding(whole, data):
    original = whole[2]
    position = data.draw(st.integers(0, len(original) - 1) | st.integers(0, 2500))
    damaged = bytearray(original)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    survived = never_a_wrong_value(whole, bytes(damaged))
    assert not survived or original[position] == 0


def test_every_byte_of_the_head_counts(whole):
    """Magic, length, HMAC, and the manifest's every byte."""
    original = whole[2]
    (packed,) = struct.unpack_from("<Q", original, 8)
    for position in range(32 + packed):
        damaged = bytearray(original)
        damaged[position] ^= 0xFF
        assert not never_a_wrong_value(whole, bytes(damaged)), position


@pytest.mark.parametrize("size", [0, 1 << 40, 1 << 62, (1 << 64) - 1])
def test_an_absurd_length_is_an_error_and_no_gigabytes_are_read(whole, size):
    damaged = bytearray(whole[2])
    struct.pack_into("<Q", damaged, 8, size)
    assert not never_a_wrong_value(whole, bytes(damaged))


@pytest.mark.parametrize("data", [b"", b"\0" * 5000, b"dnbcell1", os.urandom(10_000), b"dnbcell1" + b"\xff" * 100])
def test_a_file_that_is_no_entry_is_an_error(whole, data):
    assert not never_a_wrong_value(whole, data)


def test_one_entrys_head_on_anothers_body_is_an_error(tmp_path):
    first, second = Entries(tmp_path / "a", SIGNER), Entries(tmp_path / "b", SIGNER)
    keep(first, {"x": "first"})
    keep(second, {"x": "other"})
    one, two = file_of(first).read_bytes(), file_of(second).read_bytes()
    assert len(one) == len(two)
    (packed,) = struct.unpack_from("<Q", one, 8)
    rewrite(file_of(first), one[: 32 + packed] + two[32 + packed :])
    with pytest.raises(ALLOWED):
        back(first)


def test_an_entry_moved_to_another_key_is_refused(entries):
    keep(entries, {"x": 1}, key="mine")
    file = file_of(entries)
    file.rename(file.with_name(file.name.replace("mine", "other")))
    with pytest.raises(ALLOWED):
        list(entries.of_key("cell", "other"))


def test_an_entry_of_another_signing_key_is_refused_and_not_unpickled(tmp_path):
    unpickled = []

    class Bomb:
        def __reduce__(self):
            return _Bomb, ()

    class _Bomb(Bomb):
        def __new__(cls):
            unpickled.append(cls)
            return object.__new__(Bomb)

    stranger = Entries(tmp_path, Signer(b"s" * 32))
    keep(stranger, {"x": Bomb()})
    unpickled.clear()
    mine = Entries(tmp_path, SIGNER)
    with pytest.raises(UntrustedStoreError, match="another key"):
        list(mine.of_key("cell", "key"))
    assert list(mine.manifests("cell")) == []
    assert unpickled == []


@pytest.mark.parametrize("change", [{"FORMAT": 9}, {"Manifest": int}], ids=["a newer format", "a manifest of another shape"])
def test_an_entry_of_another_version_is_an_error_and_no_hit(entries, monkeypatch, change):
    keep(entries, {"x": 1})
    for name, value in change.items():
        monkeypatch.setattr(f"durable_nb._cellcache.entries.{name}", value)
    with pytest.raises(CorruptStoreError, match="another version of durable-nb"):
        list(entries.of_key("cell", "key"))
    assert list(entries.manifests("cell")) == []


def test_a_damaged_entry_hides_no_other_from_the_listing(entries):
    for key in ("one", "two", "three"):
        keep(entries, {"x": 1}, key=key)
    for file in (entries._folder / "cell").iterdir():
        if file.name.startswith("two"):
            rewrite(file, b"damaged")
    assert {manifest.key for manifest in entries.manifests("cell")} == {"one", "three"}


def test_an_entry_that_vanishes_while_it_is_looked_for_is_no_trouble(entries, monkeypatch):
    """Another process may clear the cache at any moment: a miss or one of the two errors, nothing else."""
    keep(entries, {"x": 1})
    file = file_of(entries)
    real = Entries._names

    def names(self, *asked):
        found = real(self, *asked)
        file.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Entries, "_names", names)
    with contextlib.suppress(*ALLOWED):
        assert list(entries.of_key("cell", "key")) == []
    assert list(entries.manifests("cell")) == []


def test_stray_files_in_the_folder_are_passed_over(entries):
    keep(entries, {"x": 1})
    folder = entries._folder / "cell"
    (folder / ".key-0.cell.123.abcd").write_bytes(b"a draft that a killed process left")
    (folder / "notes.txt").write_text("mine")
    assert back(entries) == {"x": 1}


def test_buffers_too_large_to_check_are_still_bounded(entries):
    """Above CHECKED_BYTES a changed byte is a stated limit, a changed size is not."""
    keep(entries, {"x": np.zeros(CHECKED_BYTES + 8, "u1")})
    file = file_of(entries)
    data = file.read_bytes()
    rewrite(file, data[:-4096])
    with pytest.raises(ALLOWED):
        back(entries)
