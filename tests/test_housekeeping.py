"""Looking after a store: what makes room and what stays, what is found wrong, and whose signature counts."""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernels import kernel

from durable_nb import _store
from durable_nb._cli import main
from durable_nb._codec import Signer
from durable_nb._disks import FileSystem
from durable_nb._engine import Engine
from durable_nb._housekeeping import gc
from durable_nb._housekeeping.gc import LIVE_S, Candidate, parse_size, to_drop
from durable_nb._journal import Commit, disk
from durable_nb._journal.blobs import Blobs
from durable_nb._store import Store

NOW = 1_800_000_000.0
DAY = 86400.0
OLD = 2 * gc.GRACE_S


# -- which entries go -------------------------------------------------------------------------------------------------

candidates = st.lists(
    st.builds(
        Candidate,
        st.sampled_from("abc"),
        st.integers(1, 1000),
        st.floats(0, 1000),
        st.integers(0, 100).map(lambda days: NOW - days * DAY),
        st.integers(0, 100).map(lambda days: NOW - days * DAY),
    ),
    max_size=12,
)


def live_newest(found):
    """Positions that must stay, said another way than the code does."""
    keep = set()
    for cell in {entry.cell for entry in found}:
        mine = [n for n, entry in enumerate(found) if entry.cell == cell]
        if any(NOW - found[n].used_at < LIVE_S for n in mine):
            keep.add(max(mine, key=lambda n: (found[n].stored_at, -n)))
    return keep


@given(candidates, st.integers(-10, 8000))
def test_as_much_goes_as_is_asked_for_and_never_a_live_cells_newest_entry(found, excess):
    chosen = to_drop(found, excess, NOW)
    assert len(set(chosen)) == len(chosen)
    assert not live_newest(found) & set(chosen)
    freed = sum(found[n].size for n in chosen)
    if freed < excess:
        assert set(chosen) == set(range(len(found))) - live_newest(found), "there was more to drop"
    elif chosen:
        assert freed - found[chosen[-1]].size < excess, "the last one went for nothing"
    else:
        assert excess <= 0


@given(candidates, st.integers(1, 8000))
def test_what_goes_is_worth_no_more_than_what_stays(found, excess):
    chosen = to_drop(found, excess, NOW)
    stays = set(range(len(found))) - set(chosen) - live_newest(found)
    assert all(found[gone].worth(NOW) <= found[kept].worth(NOW) for gone in chosen for kept in stays)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (Candidate("x", 100, 60.0, NOW, NOW), Candidate("x", 100, 1.0, NOW, NOW)),
        (Candidate("x", 100, 60.0, NOW, NOW), Candidate("x", 10_000, 60.0, NOW, NOW)),
        (Candidate("x", 100, 60.0, NOW, NOW), Candidate("x", 100, 60.0, NOW, NOW - 7 * DAY)),
    ],
    ids=["dearer", "smaller", "used later"],
)
def test_worth_weighs_cost_size_and_recency(better, worse):
    assert better.worth(NOW) > worse.worth(NOW)


def test_a_cell_that_nobody_used_for_long_may_lose_its_newest_entry():
    dead = Candidate("dead", 100, 60.0, NOW - 90 * DAY, NOW - LIVE_S - 1)
    live = Candidate("live", 100, 1.0, NOW - 90 * DAY, NOW - LIVE_S + 1)
    assert to_drop([dead, live], 1000, NOW) == [0]


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("500m", 500 * 10**6), ("0", 0), ("12", 12), ("3kb", 3000), ("1TB", 10**12)],
)
def test_sizes_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 GBs", "lots", "1e9", "2PB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size: write it like"):
        parse_size(text)


# -- large values -----------------------------------------------------------------------------------------------------


def test_a_value_that_is_put_again_while_room_is_made_is_there_afterwards(tmp_path):
    """Found to be there already, it must not be removed before the row that names it is written."""
    blobs = Blobs(tmp_path / "values")
    data = b"x" * 100_000
    digest = blobs.put(data)
    dropped = 0
    for _ in range(200):
        path = tmp_path / "values" / digest
        if path.exists():
            os.utime(path, (0, 0))
        start = threading.Barrier(2)

        def drop(start=start):
            nonlocal dropped
            start.wait()
            dropped += blobs.drop(time.time() - gc.GRACE_S, lambda _: False) > 0

        thread = threading.Thread(target=drop)
        thread.start()
        start.wait()
        blobs.put(data)
        thread.join()
        assert blobs.get(digest) == data
    assert dropped, "nothing was ever dropped: the test shows nothing"


# -- real stores ------------------------------------------------------------------------------------------------------

CELLS = [
    "%%durable load\nbig = await durable.run('big', bytes, 2_000_000)\nn = len(big)",
    "%%durable load --rerun\nbig = await durable.run('big', bytes, 2_000_001)\nn = len(big)",
    "%%durable fit\nm = n + 1\nprint('fitted')",
    "%%durable fit\nm = n + 2\nprint('fitted')",
    "%%durable broken\nk = await durable.run('keep', len, [1])\n1/0",
    "@durable.workflow\nasync def order(): return await durable.run('charge', len, [1, 2])\nawait order.start(id='order-42')",
    "@durable.workflow\nasync def late(): await durable.sleep('a week', '7d')\nrun = late.start(id='shop/late')",
    "import asyncio\nwhile run.status != 'sleeping': await asyncio.sleep(0.01)",
]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A store that a kernel has filled: a step's value of 2 MB before a `--rerun` and one after it, three cells, a run."""
    folder = tmp_path_factory.mktemp("original")
    with kernel(folder, env={"DURABLE_NB_KEY_FILE": str(folder / "key")}) as k:
        for cell in CELLS:
            k.run(cell)
    return folder


@pytest.fixture
def folder(original, tmp_path, monkeypatch):
    """A copy of it, whose key is ours."""
    shutil.copytree(original / ".durable_nb", tmp_path / ".durable_nb")
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(original / "key"))
    monkeypatch.delenv("DURABLE_NB_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / ".durable_nb"


@contextmanager
def engine_on(folder):
    engine = Engine(Store(folder))
    try:
        yield engine
    finally:
        engine.store.close()


def command(capsys, *words):
    """(exit status, what it printed)."""
    status = main(list(words))
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def told(capsys, *words):
    status, text = command(capsys, *words, "--json")
    return status, json.loads(text)


def entries_of(folder, cell):
    return sorted((folder / "cells" / cell).glob("*.cell"), key=lambda path: path.stat().st_mtime_ns)


def age(path, seconds):
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_gc_removes_what_a_rerun_left_and_nothing_that_counts(folder):
    """The outcome before `--rerun` goes at once, its large value when it is old enough and no entry names it; what is current
    is still recalled."""  # fmt: skip
    with engine_on(folder) as engine:
        done = gc.collect(engine)
        assert (done.rows, done.values, done.entries) == (1, 0, [])
        for value in (folder / "values").glob("*"):
            age(value, OLD)
        assert gc.collect(engine).values == 0  # undoing the edit restores the cell
        entries_of(folder, "load")[0].unlink()
        assert gc.collect(engine).values == pytest.approx(2_000_000, abs=10_000)
        again = gc.collect(engine)
        assert (again.rows, again.values, again.drafts, again.entries) == (0, 0, 0, [])
    with kernel(folder.parent, env={"DURABLE_NB_KEY_FILE": os.environ["DURABLE_NB_KEY_FILE"]}) as k:
        shown = k.run("%%durable load\nbig = await durable.run('big', bytes, 2_000_001)\nn = len(big) + 0")
        assert "1 of 1 step restored" in shown.told[-1]
        assert k.value("n") == 2_000_001


def test_gc_leaves_the_rows_of_a_run_whose_id_has_slashes(folder):
    with engine_on(folder) as engine:
        before = [key for key, _ in engine.store.journal.sizes() if "shop/late" in unquote(key)]
        assert {key.partition("/")[0] for key in before} >= {"run", "lease", "timer", "open", "arguments"}
        gc.collect(engine)
        assert [key for key, _ in engine.store.journal.sizes() if "shop/late" in unquote(key)] == before


def test_gc_removes_rows_of_runs_that_are_gone(folder):
    with engine_on(folder) as engine:
        gc.collect(engine)
        engine.store.writer.commit_and_wait(Commit(deletes=("run/shop/late",)))
        assert gc.collect(engine).rows >= 3
        assert not [key for key, _ in engine.store.journal.sizes() if "shop/late" in unquote(key)]


def test_a_value_that_a_row_names_stays_even_where_the_row_cannot_be_read(folder):
    for value in (folder / "values").glob("*"):
        age(value, OLD)
    stranger = Signer(b"s" * 32)
    with engine_on(folder) as engine:
        (key,) = (key for key, size in engine.store.journal.sizes("step/load/000000/"))
        row = engine.store.journal.get(key)
        foreign = stranger.sign("event/x", engine.store.signer.verify(key, row))
        engine.store.writer.commit_and_wait(Commit(puts=(("event/x", foreign),)))
        done = gc.collect(engine)
        assert done.rows == 1
        assert done.values == 0
        assert engine.store.journal.get("event/x") == foreign


def test_gc_leaves_alone_what_another_process_may_be_writing(folder):
    """Drafts that are young stay; those of processes killed long ago go."""
    young, old = folder / "cells" / "fit" / ".k-w.cell.1.ab", folder / "values" / ".dead.1.ab"
    young.write_bytes(b"being written")
    old.write_bytes(b"left behind")
    age(old, OLD)
    with engine_on(folder) as engine:
        assert gc.collect(engine).drafts == 1
    assert young.exists()
    assert not old.exists()


def test_above_a_size_old_entries_go_and_the_newest_of_each_cell_stays(folder, capsys):
    before = [path.name for path in entries_of(folder, "fit")]
    assert len(before) == 2
    status, done = told(capsys, "gc", "--max-size", "1KB")
    assert status == 0
    assert done["entries"] == ["load", "fit"] or done["entries"] == ["fit", "load"]
    assert [path.name for path in entries_of(folder, "fit")] == before[1:]
    assert len(entries_of(folder, "load")) == 1
    status, text = command(capsys, "gc", "--max-size", "1KB")
    assert "that is more than 1 KB" in text


def test_entries_of_another_key_are_not_all_dropped(folder, tmp_path, capsys, monkeypatch):
    """Whoever makes room can't read them; the newest of each cell stays for those who can."""
    newest = [entries_of(folder, cell)[-1] for cell in ("load", "fit")]
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "mine"))
    assert told(capsys, "gc", "--max-size", "0")[1]["entries"] == ["(unreadable)"] * 2
    assert all(path.exists() for path in newest)


def test_the_cap_comes_from_the_environment_where_none_is_given(folder, capsys, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_MAX_SIZE", "1KB")
    assert told(capsys, "gc")[1]["max_size"] == 1000
    monkeypatch.setenv("DURABLE_NB_MAX_SIZE", "some")
    with pytest.raises(SystemExit) as stopped:
        main(["gc"])
    assert stopped.value.code == 2
    assert "DURABLE_NB_MAX_SIZE: 'some' is not a size" in capsys.readouterr().err


def test_a_used_entry_is_kept_before_an_unused_one(folder, capsys):
    """Being listed is no use; being restored from is."""
    first, second = entries_of(folder, "fit")
    for path in (first, second):
        age(path, 200 * DAY)  # what running them took is hardly the same
    key = {"DURABLE_NB_KEY_FILE": os.environ["DURABLE_NB_KEY_FILE"]}
    with kernel(folder.parent, env=key) as k:
        assert k.run("n = 2_000_001").status == "ok"
        assert "· restored" in k.run(CELLS[2]).told[-1]
        k.run("%%durable fit\nm = n + 3\nprint('fitted')")
    command(capsys, "ls")
    used = {path.name: path.stat().st_atime > time.time() - DAY for path in (first, second)}
    assert used == {first.name: True, second.name: False}
    shutil.rmtree(folder / "cells" / "load")
    told(capsys, "gc")
    told(capsys, "gc", "--max-size", str(gc.size_of(folder) - 200))
    assert first.exists()
    assert not second.exists()


def test_an_entry_that_a_kernel_has_mapped_can_go(folder, capsys):
    key = {"DURABLE_NB_KEY_FILE": os.environ["DURABLE_NB_KEY_FILE"]}
    cell = "%%durable grid\nimport numpy as np\ngrid = np.full(1_000_000, 7.0)"
    with kernel(folder.parent, env=key) as k:
        k.run(cell)
        k.run("del grid")
        assert "· restored" in k.run(cell).told[-1]
        k.run(cell.replace("7.0", "8.0").replace("grid =", "grid2 ="))
        (older, _) = entries_of(folder, "grid")
        told(capsys, "gc", "--max-size", "9MB")
        assert not older.exists()
        assert k.value("float(grid.sum())") == 7_000_000.0
        assert "· running" in k.run(cell).told[0]


def test_making_room_again_and_again_takes_nothing_from_a_kernel_that_works(folder):
    """Large values of steps, the entry of the cell: all are written while another process makes room, and all are kept."""
    key = {"DURABLE_NB_KEY_FILE": os.environ["DURABLE_NB_KEY_FILE"]}
    cell = "%%durable busy\nsizes = []\nfor n in range(20):\n"
    cell += "    sizes.append(len(await durable.run('big', bytes, 1_100_000 + n)))"
    script = "import os, sys\nfrom durable_nb._cli import main\nprint('on', flush=True)\nsys.stdout = open(os.devnull, 'w')\n"
    script += "while not main(['gc', '--max-size', '1KB']): pass"
    collector = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=folder.parent, env={**os.environ, **key}
    )
    try:
        assert collector.stdout.readline() == b"on\n"
        with kernel(folder.parent, env=key) as k:
            assert "ran in" in k.run(cell).told[-1]
            assert "· restored" in k.run(cell).told[-1]
            k.restart()
            assert "20 of 20 steps restored" in k.run(cell + "\nn = 0").told[-1]
            assert k.value("sizes == [1_100_000 + n for n in range(20)]")
        assert collector.poll() is None
    finally:
        collector.kill()
        collector.communicate()


# -- the command line -------------------------------------------------------------------------------------------------


def test_ls_lists_cells_and_runs(folder, capsys):
    status, facts = told(capsys, "ls")
    assert status == 0
    assert facts["store"] == str(folder)
    cells = {cell["name"]: cell for cell in facts["cells"]}
    assert cells.keys() == {"load", "fit", "broken"}
    assert (cells["load"]["status"], cells["load"]["steps"], cells["load"]["entries"]) == ("completed", 1, 2)
    assert (cells["broken"]["status"], cells["broken"]["steps"], cells["broken"]["entries"]) == ("failed", 1, 0)
    assert cells["fit"]["saves_s"] > 0
    runs = {run["id"]: run for run in facts["runs"]}
    assert (runs["order-42"]["kind"], runs["order-42"]["status"], runs["order-42"]["steps"]) == ("workflow", "completed", 1)
    text = command(capsys, "ls")[1]
    assert all(word in text for word in ("load", "fit", "broken", "order-42", "a hit saves"))


@pytest.mark.parametrize(("of", "step"), [("order-42", "charge"), ("order", "charge"), ("broken", "keep")])
def test_show_takes_an_id_or_a_name(folder, capsys, of, step):
    status, facts = told(capsys, "show", of)
    assert status == 0
    assert [(found["name"], found["status"]) for found in facts["steps"]] == [(step, "completed")]
    assert step in command(capsys, "show", of)[1]


def test_a_name_that_is_not_there_is_told_with_the_nearest(folder, capsys):
    status, text = command(capsys, "show", "ordr")
    assert status == 1
    assert text.count("\n") == 1
    assert "no run or cell 'ordr'" in text
    assert "did you mean 'order'?" in text


@pytest.mark.parametrize("words", [["ls"], ["gc"], ["doctor"], ["show", "x"], ["trust", "elsewhere"]])
def test_where_no_store_is_none_is_made(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DURABLE_NB_DIR", raising=False)
    status, text = command(capsys, *words)
    assert status == 1
    assert "no store in" in text
    assert list(tmp_path.iterdir()) == []


def test_the_installed_program_knows_the_commands(folder):
    done = subprocess.run(
        [sys.executable, "-c", "from durable_nb._cli import main; raise SystemExit(main())", "gc", "--max-size", "lots"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "'lots' is not a size" in done.stderr


# -- doctor -----------------------------------------------------------------------------------------------------------


def findings(capsys, *options):
    status, facts = told(capsys, "doctor", *options)
    assert status == bool(facts["findings"])
    return [(finding["where"], finding["what"]) for finding in facts["findings"]]


def test_a_sound_store_has_no_findings(folder, capsys):
    assert findings(capsys, "--verify") == []
    assert "sound" in command(capsys, "doctor")[1]


@pytest.mark.parametrize("race", [True, False])
def test_doctor_says_what_another_program_may_do(folder, capsys, monkeypatch, race):
    monkeypatch.setattr(disk, "has_race", lambda: race)
    assert ("can corrupt the journal when a program other than durable_nb writes" in command(capsys, "doctor")[1]) is race
    monkeypatch.setattr(_store, "file_system_of", lambda _: FileSystem("nfs"))
    _, facts = told(capsys, "doctor")
    assert any("network file system (nfs)" in note for note in facts["notes"])
    assert facts["findings"] == []


def rewrite(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.chmod(0o600)
    path.write_bytes(data)


def test_doctor_finds_what_is_damaged_and_changes_nothing(folder, capsys):
    folder.chmod(0o755)
    with closing(sqlite3.connect(folder / "journal" / "cache.db")) as db:
        (key, value) = db.execute("SELECT key, value FROM Cache WHERE key GLOB 'step/broken/*'").fetchone()
        db.execute("UPDATE Cache SET value = ? WHERE key = ?", (value[:-1] + bytes([value[-1] ^ 1]), key))
        db.commit()
    for value in (folder / "values").glob("*"):
        value.unlink()
    entry = entries_of(folder, "fit")[0]
    rewrite(entry, lambda data: data.__delitem__(slice(-5, None)))
    before = {path: path.read_bytes() for path in folder.rglob("*.cell")}
    found = dict(findings(capsys))
    assert "damaged" in found[key]
    assert "others may read it" in found[str(folder)]
    assert "cut short" in found[str(entry.relative_to(folder))]
    assert sum(where.startswith("values/") for where in found) == 2
    assert {path: path.read_bytes() for path in folder.rglob("*.cell")} == before


def test_a_flipped_bit_in_a_large_buffer_is_found_with_verify_only(tmp_path, original, capsys, monkeypatch):
    """The stated limit: buffers above 64 MiB aren't compared at each restore."""
    key = {"DURABLE_NB_KEY_FILE": str(original / "key")}
    monkeypatch.setenv(*next(iter(key.items())))
    monkeypatch.chdir(tmp_path)
    with kernel(tmp_path, env=key) as k:
        k.run("%%durable grid\nimport numpy as np\ngrid = np.zeros(9_000_000)")
    (entry,) = (tmp_path / ".durable_nb" / "cells" / "grid").glob("*.cell")
    with entry.open("rb") as file:
        file.seek(40_000_000)
        assert file.read(1) == b"\0"
    entry.chmod(0o600)
    with entry.open("r+b") as file:
        file.seek(40_000_000)
        file.write(b"\1")
    assert findings(capsys) == []
    ((_, what),) = findings(capsys, "--verify")
    assert "not what was written" in what


# -- trust ------------------------------------------------------------------------------------------------------------


def test_a_store_of_another_key_is_read_after_it_was_trusted_and_not_before(folder, tmp_path, capsys, monkeypatch):
    """Asked for where there is nobody to answer, nothing is signed. Afterwards cells and steps are restored."""
    mine = tmp_path / "mine"
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(mine))
    rows = told(capsys, "doctor")[1]["findings"]
    assert any("signed with another key" in row["what"] for row in rows)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    status, text = command(capsys, "trust", str(folder))
    assert status == 1
    assert "nothing was signed" in text
    assert told(capsys, "doctor")[1]["findings"] == rows
    assert "11 runs and entries can't be read: see 'durable-nb doctor'" in command(capsys, "ls")[1]

    with kernel(tmp_path, env={"DURABLE_NB_KEY_FILE": str(mine)}) as k:
        k.run("n = 2_000_001")
        assert "UntrustedStoreError" in k.run(CELLS[4]).error
        status, text = command(capsys, "trust", str(folder), "--yes")
        assert status == 1
        assert f"is in use (process {k.pid})" in text
    status, facts = told(capsys, "trust", str(folder), "--yes")
    assert status == 0
    assert facts["entries"] == 4
    assert findings(capsys, "--verify") == []
    with kernel(tmp_path, env={"DURABLE_NB_KEY_FILE": str(mine)}) as k:
        k.run("n = 2_000_001")
        assert "· restored" in k.run(CELLS[3]).told[-1]
        assert "1 step kept" in k.run(CELLS[4]).told[-1]
    assert told(capsys, "trust", str(folder), "--yes")[1] == {"store": str(folder), "rows": 0, "entries": 0}


def test_what_is_damaged_is_not_signed(folder, tmp_path, capsys, monkeypatch):
    entry = entries_of(folder, "fit")[0]
    rewrite(entry, lambda data: data.__setitem__(-200, data[-200] ^ 1))
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "mine"))
    assert told(capsys, "trust", str(folder), "--yes")[1]["entries"] == 3
    assert any("damaged" in what for where, what in findings(capsys) if entry.name in where)
