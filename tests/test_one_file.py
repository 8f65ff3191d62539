"""What a step returned and its cell bound is one file: both restore it, whatever becomes of the other's record."""

from __future__ import annotations

import os
import time

import numpy as np
import pandas as pd
import pytest
from kernels import kernel

from durable_nb import _codec
from durable_nb._cellcache.entries import CellResult, Entries
from durable_nb._cellcache.external import ExternalState
from durable_nb._codec import PACKED, Signer
from durable_nb._engine import Engine
from durable_nb._housekeeping import gc
from durable_nb._housekeeping.doctor import examine
from durable_nb._journal.blobs import Blobs
from durable_nb._store import Store
from durable_nb.errors import CorruptStoreError

MB = 1_000_000
SETUP = """
import os, numpy as np, pandas as pd
def array(): return np.arange(3_000_000.).reshape(1000, 3000)
def frame(): return pd.DataFrame({"a": np.arange(500_000), "b": np.arange(500_000) * 0.5})
def data(): return os.urandom(7_000_000)
def text(): return "0123456789" * 800_000
"""
CELL = """%%durable big
a = await durable.run("array", array)
f = await durable.run("frame", frame)
d = await durable.run("data", data)
t = await durable.run("text", text)
"""
HELD = "__import__('hashlib').md5(a.tobytes() + d + f.to_csv().encode() + t.encode()).hexdigest()"
SIZES = "(a.nbytes, int(f.memory_usage(index=False).sum()), len(d), len(t))"


def large(store):
    """Sizes of the large files, by name; every link of one counts."""
    return {path: path.stat().st_size for path in store.rglob("*") if path.is_file() and path.stat().st_size > MB}


def test_what_steps_return_and_their_cell_binds_is_on_disk_once(tmp_path):
    store = tmp_path / ".durable_nb"
    with kernel(tmp_path) as running:
        assert running.run(SETUP).status == "ok"
        first = running.run(CELL)
        assert first.status == "ok", first.traceback
        assert "not stored" not in first.told[-1]
        known = running.value(HELD)
        files = large(store)
        assert len(files) == 4
        assert sum(files.values()) < sum(running.value(SIZES)) + 100_000
        assert all(path.stat().st_mode & 0o777 == 0o400 for path in files)

        running.restart()
        running.run(SETUP)
        again = running.run(CELL)
        assert "restored 4 variables" in again.told[-1], again
        assert running.value(HELD) == known
        # Written to, they stay what they are on disk; another cell that uses the steps stores no copy either.
        other = running.run("a[0, 0] = -1.0; f.iloc[0, 0] = 9\n")
        assert other.status == "ok", other.traceback
        other = running.run(CELL + "n = len(d)")
        assert "4 of 4 steps restored" in other.told[-1], other
        assert running.value("float(a[0, 0]), int(f.iloc[0, 0])") == (0.0, 0)
        assert large(store).keys() == files.keys()

        # What a cell has changed of it is its own.
        changed = running.run(CELL.replace("big", "changed") + "a[0, 0] = 5.0")
        assert "not stored" not in changed.told[-1], changed
        assert len(large(store)) == len(files) + 2  # other random bytes, and the array that was changed


def test_a_value_that_is_gone_or_damaged_is_told_and_made_again_by_rerun(tmp_path):
    store = tmp_path / ".durable_nb"
    cell = "%%durable one\na = await durable.run('array', array)"
    with kernel(tmp_path) as running:
        running.run(SETUP)
        running.run(cell)
        (file,) = large(store)
        good = file.read_bytes()
        for damage in (None, good[: len(good) // 2], bytes([good[-1] ^ 1]).join((good[:-1], b""))):
            file.unlink(missing_ok=True)
            if damage is not None:
                file.write_bytes(damage)
                file.chmod(0o400)
            shown = running.run(cell)
            assert "what was stored of this cell is not used" in str(shown.told) + shown.stderr, shown
            assert "step 'array' of cell 'one' is recorded, but" in shown.error
            shown = running.run(cell.replace("one", "one --rerun"))
            assert shown.status == "ok", shown.traceback
            running.run("del a")
            shown = running.run(cell)
            assert "restored 1 variable" in shown.told[-1], shown
            assert running.value("bool(a.sum() == array().sum())")
            assert list(large(store).values()) == [len(good)]


@pytest.fixture
def engine(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    found = Engine(Store(tmp_path / "store"))
    yield found
    found.store.close()


def freed(engine):
    return gc.collect(engine).values  # noqa: PD011  bytes


def keep(entries, values, key="k"):
    result = CellResult(values, ExternalState(), [], b"", 0, 1.0)
    return entries.store("cell", key, result, name="cell", components={}, versions={}, created_at=time.time())


def test_room_is_made_of_values_that_no_entry_names(engine):
    store = engine.store
    array = np.arange(1_000_000.0)
    form, data = _codec.encode({"x": array, "few": [1, 2]})
    assert form == PACKED
    digest = store.journal.put_blob(data)
    entries = Entries(store.cells, store.signer)
    keep(entries, {"y": array})
    file = Blobs(store.path / "values").path(digest)
    long_ago = time.time() - 2 * gc.GRACE_S

    os.utime(file, (long_ago, long_ago))
    assert freed(engine) == 0  # no row names it, and an entry does
    (entry,) = entries.of_key("cell", "k")
    assert (entry.values(None)["y"] == array).all()
    assert examine(store, verify=True).findings == ()

    # An entry that refers to it now keeps it from a collection that began before.
    keep(entries, {"z": array}, "other")
    assert file.stat().st_mtime > long_ago
    os.utime(file, (long_ago, long_ago))

    first, second = sorted((store.cells / "cell").iterdir())
    first.unlink()
    assert freed(engine) == 0
    second.unlink()
    assert freed(engine) == len(data)
    assert not file.exists()


def test_entries_of_another_user_keep_the_values_they_name(engine):
    store = engine.store
    array = np.arange(1_000_000.0)
    digest = store.journal.put_blob(_codec.encode(array)[1])
    keep(Entries(store.cells, Signer(b"o" * 32)), {"y": array})
    file = Blobs(store.path / "values").path(digest)
    os.utime(file, (1.0, 1.0))
    assert freed(engine) == 0
    assert file.exists()


def test_a_file_that_holds_other_bytes_than_it_should_is_not_referred_to(engine):
    store = engine.store
    array = np.arange(1_000_000.0)
    digest = store.journal.put_blob(_codec.encode(array)[1])
    file = Blobs(store.path / "values").path(digest)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()
    file.write_bytes(data)
    entries = Entries(store.cells, store.signer)
    keep(entries, {"y": array})
    (entry,) = entries.of_key("cell", "k")
    assert (entry.values(None)["y"] == array).all()
    assert all(not buffer.blob for buffer in entry.manifest.buffers)


def test_verification_tells_of_a_value_that_an_entry_names(engine):
    store = engine.store
    array = np.arange(20_000_000.0)
    digest = store.journal.put_blob(_codec.encode(array)[1])
    entries = Entries(store.cells, store.signer)
    keep(entries, {"y": array})
    file = Blobs(store.path / "values").path(digest)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()
    file.write_bytes(data)
    (finding,) = examine(store, verify=True).findings
    assert finding.where.startswith("cells/")
    file.unlink()
    with pytest.raises(CorruptStoreError):
        list(entries.of_key("cell", "k"))


@pytest.mark.parametrize(
    "value",
    [
        np.arange(600_000.0).reshape(2, -1).T,
        pd.DataFrame({"a": np.arange(200_000), "s": ["é", "b"] * 100_000}),
        "é" * 1_100_000,
        b"\x00" * 1_100_000,
        {"text": "t" * 1_100_000, "bytes": b"b" * 1_100_000, "deep": ["t" * 3]},
        "\ud800" * 1_100_000,
        [np.zeros(200_000), np.ones(3), "short"],
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_large_values_of_steps_come_back(value):
    form, data = _codec.encode(value)
    back = _codec.decode(form, data)
    assert form == PACKED
    assert _codec.encode(back)[1] == data
    assert type(back) is type(value)
    if isinstance(value, np.ndarray):
        assert back.flags == value.flags
        assert (back == value).all()
        back[0, 0] = 7
    elif not isinstance(value, (list, pd.DataFrame)):
        assert back == value


def test_what_two_names_hold_is_one_object_after_it_came_back():
    long = "t" * 2_000_000
    array = np.arange(400_000.0)
    back = _codec.decode(*_codec.encode({"a": long, "b": [long], "x": array, "y": array[10:]}))
    assert back["a"] is back["b"][0]
    back["x"][10] = -1
    assert back["y"][0] == -1
