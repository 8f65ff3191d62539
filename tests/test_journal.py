"""The journal: guarded commits, on disk and in memory alike, and a disk journal that loses nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path

import diskcache
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from durable_nb._journal import Commit, Verdict
from durable_nb._journal import database as database_module
from durable_nb._journal import disk as disk_module
from durable_nb._journal.database import has_race
from durable_nb._journal.disk import DiskJournal
from durable_nb._journal.memory import MemoryJournal
from durable_nb._journal.writer import GROUP_LIMIT, Writer
from durable_nb.errors import CorruptStoreError, StoreError

APPLIED, GUARD_FAILED, EXISTS = Verdict.APPLIED, Verdict.GUARD_FAILED, Verdict.EXISTS


@pytest.fixture(params=["disk", "memory"])
def journal(request, tmp_path):
    made = MemoryJournal() if request.param == "memory" else DiskJournal(tmp_path / "journal", tmp_path / "values")
    yield made
    made.close()


@pytest.fixture
def disk(tmp_path):
    made = DiskJournal(tmp_path / "journal", tmp_path / "values")
    yield made
    made.close()


def rows(**named):
    return tuple((key, value.encode()) for key, value in named.items())


# -- the contract, for both -------------------------------------------------------------------------------------------


def test_a_row_comes_back_byte_by_byte(journal):
    for value in (b"", b"\0", b"\r\n", b"a\r\nb" * 20_000, bytes(range(256)), os.urandom(300_000)):
        assert journal.apply([Commit(puts=(("k", value),))]) == [APPLIED]
        assert journal.get("k") == value
        assert journal.scan("k") == [("k", value)]


def test_a_missing_row_is_none(journal):
    assert journal.get("k") is None
    assert journal.scan("k") == []


def test_an_insert_must_be_new_or_nothing_of_its_commit_is_applied(journal):
    assert journal.apply([Commit(inserts=rows(a="1"))]) == [APPLIED]
    clash = Commit(inserts=rows(b="2", a="3"), puts=rows(c="4"), deletes=("a",))
    assert journal.apply([clash]) == [EXISTS]
    assert [journal.get(key) for key in "abc"] == [b"1", None, None]


def test_a_put_replaces_and_a_delete_of_nothing_is_no_trouble(journal):
    journal.apply([Commit(puts=rows(a="1"))])
    assert journal.apply([Commit(puts=rows(a="2"), deletes=("gone",))]) == [APPLIED]
    assert journal.get("a") == b"2"
    assert journal.apply([Commit(deletes=("a",))]) == [APPLIED]
    assert journal.get("a") is None


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("commit", ["insert", "put", "delete", "several"])
def test_a_guard_is_compared_byte_by_byte(journal, alone, commit):
    """In every kind of commit, the ones with a fast path of their own included."""
    made = {
        "insert": {"inserts": rows(new="n")},
        "put": {"puts": rows(new="n")},
        "delete": {"deletes": ("old",)},
        "several": {"inserts": rows(new="n", new2="m"), "puts": rows(p="p"), "deletes": ("old",)},
    }[commit]
    journal.apply([Commit(puts=rows(lease="mine", old="o"))])
    before = journal.scan("n") + journal.scan("o") + journal.scan("p")
    for guard in (
        ("lease", b"min"),
        ("lease", b"mine\0"),
        ("lease", b"MINE"),
        ("lease", None),
        ("none", b""),
        ("none", b"mine"),
    ):
        others = [] if alone else [Commit(puts=rows(beside="x"))]
        assert journal.apply([Commit(guard, **made), *others])[0] is GUARD_FAILED
        assert journal.scan("n") + journal.scan("o") + journal.scan("p") == before
    assert journal.apply([Commit(("lease", b"mine"), **made)]) == [APPLIED]
    assert journal.scan("n") + journal.scan("o") + journal.scan("p") != before


def test_a_guard_on_absence_holds_only_while_there_is_no_row(journal):
    first = Commit(("lease", None), puts=rows(lease="a"))
    assert journal.apply([first]) == [APPLIED]
    assert journal.apply([first]) == [GUARD_FAILED]
    journal.apply([Commit(puts=(("empty", b""),))])
    assert journal.apply([Commit(("empty", None), puts=rows(x="1"))]) == [GUARD_FAILED]
    assert journal.apply([Commit(("empty", b""), puts=rows(x="1"))]) == [APPLIED]


def test_a_failed_guard_counts_before_an_existing_row(journal):
    journal.apply([Commit(puts=rows(lease="a", k="1"))])
    assert journal.apply([Commit(("lease", b"b"), inserts=rows(k="2"))]) == [GUARD_FAILED]
    assert journal.apply([Commit(("lease", b"a"), inserts=rows(k="2"))]) == [EXISTS]
    assert journal.get("k") == b"1"


def test_commits_of_one_call_are_applied_in_order_each_seeing_the_last(journal):
    takes_over = Commit(("lease", b"a"), puts=rows(lease="b"))
    late = Commit(("lease", b"a"), inserts=rows(k="late"))
    new = Commit(("lease", b"b"), inserts=rows(k="new"))
    journal.apply([Commit(puts=rows(lease="a"))])
    assert journal.apply([takes_over, late, new, new]) == [APPLIED, GUARD_FAILED, APPLIED, EXISTS]
    assert journal.get("k") == b"new"


@pytest.mark.parametrize("alone", [True, False])
def test_a_commit_that_follows_another_lands_only_after_it(journal, alone):
    """In the fast path of one new row, and in a group."""
    others = [] if alone else [Commit(puts=rows(beside="x"))]
    journal.apply([Commit(puts=rows(lease="mine"))])
    guard = ("lease", b"mine")
    second = Commit(guard, inserts=rows(second="2"), follows="first")
    assert journal.apply([second, *others])[0] is Verdict.MISSING
    assert journal.get("second") is None
    assert journal.apply([Commit(guard, inserts=rows(first="1")), *others])[0] is APPLIED
    assert journal.apply([second, *others])[0] is APPLIED
    assert journal.get("second") == b"2"


def test_no_commits_no_verdicts(journal):
    assert journal.apply([]) == []


ODD = [
    "a/",
    "a/b",
    "a/b/c",
    "a0",
    "a.",
    "a",
    "aa",
    "A",
    "a\u00e9",
    "\u00e9",
    "a\uffff",
    "a\U0001f600",
    "a%",
    "a_",
    "a*",
    "a'b",
    'a"',
    "a\\",
]


@pytest.mark.parametrize("prefix", ["a", "a/", "a/b", "A", "\u00e9", "a\uffff", "a\U0001f600", "a%", "a_", "a*", "a'", "zz"])
def test_a_scan_gives_the_rows_of_its_prefix_in_key_order(journal, prefix):
    """No character of a prefix is a wildcard, and no neighbour slips in."""
    journal.apply([Commit(puts=tuple((key, key.encode()) for key in ODD))])
    wanted = sorted(key for key in ODD if key.startswith(prefix))
    assert journal.scan(prefix) == [(key, key.encode()) for key in wanted]


@pytest.mark.parametrize("n", [0, 1, 2, 499, 500, 501, 1200])
def test_many_rows_are_read_at_once(journal, n):
    journal.apply([Commit(puts=tuple((f"k{i}", b"%d" % i) for i in range(n)))])
    wanted = [f"k{i}" for i in range(n)]
    assert journal.get_many([*wanted, "none", "k", "%"]) == {f"k{i}": b"%d" % i for i in range(n)}
    assert journal.get_many(iter(wanted[:3] * 2)) == {key: key[1:].encode() for key in wanted[:3]}


def test_sizes_are_told_without_reading_values(journal):
    journal.apply([Commit(puts=(("b", b"xyz"), ("a/1", b""), ("a/2", bytes(100_000))))])
    assert journal.sizes("a/") == [("a/1", 0), ("a/2", 100_000)]
    assert journal.sizes() == [("a/1", 0), ("a/2", 100_000), ("b", 3)]


def test_large_values_that_nobody_needs_are_dropped(journal):
    old, kept = journal.put_blob(b"old"), journal.put_blob(b"kept")
    assert journal.drop_blobs(0.0, lambda _: False) == 0
    assert journal.drop_blobs(time.time() + 10, lambda digest: digest == kept) == 3
    assert journal.get_blob(kept) == b"kept"
    with pytest.raises(CorruptStoreError):
        journal.get_blob(old)


def test_a_sound_journal_has_no_problems(journal):
    journal.apply([Commit(puts=rows(a="1", b="2"), deletes=("c",)), Commit(deletes=("a",))])
    assert journal.problems() == []


def test_a_closed_journal_is_opened_by_the_next_that_is_asked_of_it(journal):
    journal.apply([Commit(puts=rows(a="1"))])
    for _ in range(2):
        journal.close()
        assert journal.get("a") == b"1"
        journal.close()
        assert journal.apply([Commit(puts=rows(a="1"))]) == [APPLIED]


def test_large_values_are_found_by_their_digest(journal):
    data = os.urandom(3 << 20)
    digest = journal.put_blob(data)
    assert journal.put_blob(bytes(data)) == digest
    assert journal.get_blob(digest) == data
    assert journal.put_blob(b"") != digest
    assert journal.get_blob(journal.put_blob(b"")) == b""
    with pytest.raises(CorruptStoreError, match="0000"):
        journal.get_blob("0" * 64)


def test_every_method_may_be_called_from_any_thread(journal):
    failures = []

    def work(me):
        try:
            for i in range(20):
                assert journal.apply([Commit(inserts=((f"{me}/{i:02}", b"x"),))]) == [APPLIED]
                assert len(journal.scan(f"{me}/")) == i + 1
                assert journal.apply([Commit(inserts=((f"all/{i}", me.encode()),))])[0] in (APPLIED, EXISTS)
        except BaseException as error:
            failures.append(error)
        finally:
            journal.close()  # the others' calls open it again

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(journal.scan("all/")) == 20


# -- the twins --------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(["a", "a/b", "b", "\u00e9", "lease"])
BYTES = st.sampled_from([b"", b"1", b"2", b"\0"])
ROWS = st.lists(st.tuples(KEYS, BYTES), max_size=2).map(tuple)
COMMITS = st.builds(
    Commit,
    guard=st.none() | st.tuples(KEYS, st.none() | BYTES),
    inserts=ROWS,
    puts=ROWS,
    deletes=st.lists(KEYS, max_size=2).map(tuple),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(COMMITS, min_size=1, max_size=3), max_size=8))
def test_both_journals_say_and_hold_the_same(tmp_path_factory, groups):
    folder = tmp_path_factory.mktemp("twins")
    disk, memory = DiskJournal(folder / "journal", folder / "values"), MemoryJournal()
    try:
        for group in groups:
            assert disk.apply(group) == memory.apply(group)
            held = {key: disk.get(key) for key in ("a", "a/b", "b", "\u00e9", "lease")}
            assert held == {key: memory.get(key) for key in held}
            assert disk.get_many(held) == memory.get_many(held)
        for prefix in ("a", "a/", "l", "\u00e9"):
            assert disk.scan(prefix) == memory.scan(prefix)
            assert disk.sizes(prefix) == memory.sizes(prefix)
        assert disk.sizes() == memory.sizes()
    finally:
        disk.close()
        shutil.rmtree(folder)


# -- diskcache beneath ------------------------------------------------------------------------------------------------

SAFE = {"eviction_policy": "none", "cull_limit": 0}


def in_force(folder):
    with sqlite3.connect(f"file:{folder / 'cache.db'}?mode=ro", uri=True) as connection:
        settings = dict(connection.execute("SELECT key, value FROM Settings").fetchall())
    connection.close()
    return settings


@contextmanager
def connections(journal):
    """The connection that writes, and one that reads."""
    with journal._database.writing() as writer, journal._database.reading() as reader:
        yield writer, reader


@pytest.mark.parametrize("wal", [True, False])
def test_the_settings_that_lose_no_steps_are_in_force(tmp_path, wal):
    disk = DiskJournal(tmp_path / "journal", tmp_path / "values", wal=wal)
    said = in_force(tmp_path / "journal")
    assert {key: said[key] for key in SAFE} == SAFE
    assert said["sqlite_mmap_size"] == 0
    assert said["sqlite_journal_mode"] == disk.mode == ("wal" if wal else "persist")
    with connections(disk) as both:
        for sql in both:
            assert sql.execute("PRAGMA synchronous").fetchone() == (2,)
            assert sql.execute("PRAGMA mmap_size").fetchone() in {(0,), None}
        assert both[0].execute("PRAGMA journal_mode").fetchone() == (disk.mode,)
    disk.close()


@pytest.mark.parametrize("wal", [True, False])
def test_only_one_connection_of_a_process_writes(tmp_path, wal):
    """In WAL mode a second one is the race of old SQLites."""
    disk = DiskJournal(tmp_path / "journal", tmp_path / "values", wal=wal)
    with connections(disk) as (_, reader):
        for statement in ("DELETE FROM Cache", "PRAGMA user_version = 3", "VACUUM"):
            with pytest.raises(sqlite3.OperationalError, match=r"readonly|read-only|query_only"):
                reader.execute(statement)
    disk.close()


def test_a_reader_does_not_checkpoint_even_where_it_is_the_last_to_close(disk, tmp_path):
    disk.apply([Commit(puts=rows(a="1"))])
    assert disk.mode == "wal"
    disk.get("a")
    disk._database._close_writer()
    log = (tmp_path / "journal" / "cache.db-wal").stat()
    assert log.st_size > 0
    disk._database._close_readers()
    assert (tmp_path / "journal" / "cache.db-wal").stat().st_ino == log.st_ino
    assert disk.get("a") == b"1"


@pytest.mark.parametrize("wal", [True, False])
def test_a_journal_may_be_reopened_in_the_other_mode(tmp_path, wal):
    for mode in (wal, not wal, wal):
        journal = DiskJournal(tmp_path / "journal", tmp_path / "values", wal=mode)
        journal.apply([Commit(puts=rows(k="v"))])
        assert journal.get("k") == b"v"
        assert journal.mode == ("wal" if mode else "persist")
        journal.close()


@pytest.mark.parametrize("left", ["wal", "delete", "persist", "truncate"])
@pytest.mark.parametrize("wal", [True, False])
def test_a_store_that_another_sqlite_left_in_any_mode_opens(tmp_path, wal, left):
    """Killed in the middle of a write, too: what it had committed is there."""
    DiskJournal(tmp_path / "journal", tmp_path / "values", wal=not wal).close()
    source = """
        import os, signal, sqlite3, sys
        sql = sqlite3.connect(sys.argv[1], isolation_level=None)
        print(sql.execute(f"PRAGMA journal_mode = {sys.argv[2]}").fetchone())
        sql.execute("PRAGMA cache_size = 1")
        put = "INSERT INTO Cache(key, raw, value, mode) VALUES (?, 1, ?, 1)"
        sql.execute(put, ("kept", b"v"))
        sql.execute("BEGIN")
        sql.executemany(put, [(f"lost/{n}", bytes(3000)) for n in range(100)])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(source), str(tmp_path / "journal" / "cache.db"), left]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    journal = DiskJournal(tmp_path / "journal", tmp_path / "values", wal=wal)
    assert journal.mode == ("wal" if wal else "persist")
    assert journal.scan("kept") == [("kept", b"v")]
    assert journal.scan("lost") == []
    assert journal.problems() == []
    journal.close()


@pytest.mark.parametrize(
    ("version", "race"),
    [
        ((3, 6, 23), False),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 0), True),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 52, 0), False),
        ((4, 0, 0), False),
    ],
)
def test_which_sqlites_have_the_race_of_wal(version, race):
    assert has_race(version) is race


def test_an_open_journal_survives_a_copy_of_its_folder_in_its_own_process(tmp_path):
    """Closing a file drops SQLite's locks on it: another process then removes the log (WAL) that this one writes to."""
    journal = DiskJournal(tmp_path / "journal", tmp_path / "values")
    journal.apply([Commit(puts=rows(a="1", lease="l"))])
    source = "import sys; from pathlib import Path; from durable_nb._journal.disk import DiskJournal\n"
    source += "j = DiskJournal(Path(sys.argv[1], 'journal'), Path(sys.argv[1], 'values')); print(*dict(j.scan('a'))); j.close()"
    for name, commit in (("aa", Commit(puts=rows(aa="2"))), ("aaa", Commit(("lease", b"l"), inserts=rows(aaa="3")))):
        shutil.copytree(tmp_path / "journal", tmp_path / f"copy-{name}")
        subprocess.run([sys.executable, "-c", source, str(tmp_path)], check=True, capture_output=True)
        assert journal.get("a") == b"1"
        assert journal.apply([commit]) == [APPLIED]
    seen = subprocess.run([sys.executable, "-c", source, str(tmp_path)], check=True, capture_output=True, text=True).stdout
    assert seen.split() == ["a", "aa", "aaa"]
    journal.close()


@pytest.mark.parametrize("wal", [True, False])
@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_what_is_written_after_the_folder_was_deleted_is_not_acknowledged(tmp_path, wal, how):
    """And nobody is told that what was recorded in it is safe."""
    journal = DiskJournal(tmp_path / "journal", tmp_path / "values", wal=wal)
    journal.apply([Commit(puts=rows(lease="l"))])
    shutil.rmtree(tmp_path / "journal")
    if how == "replaced":
        DiskJournal(tmp_path / "journal", tmp_path / "values", wal=wal).close()
    for commit in (Commit(puts=rows(b="2")), Commit(("lease", b"l"), inserts=rows(b="2"))):
        with pytest.raises(StoreError, match="was deleted or replaced") as caught:
            journal.apply([commit])
        assert "safe" not in str(caught.value)
    with pytest.raises(StoreError, match="was deleted or replaced"):
        journal.get("lease")
    journal.close()


@pytest.mark.parametrize("wal", [True, False])
def test_a_journal_that_is_only_looked_at_shows_everything_and_changes_nothing(tmp_path, wal):
    def files():
        return {file.name: file.stat().st_mtime_ns for file in (tmp_path / "journal").iterdir() if file.suffix != ".db-shm"}

    journal = DiskJournal(tmp_path / "journal", tmp_path / "values", wal=wal)
    journal.apply([Commit(puts=rows(a="1"))])
    before = files()
    for left in ("open", "closed"):
        look = DiskJournal(tmp_path / "journal", tmp_path / "values", only_look=True)
        assert look.scan("a") == [("a", b"1")]
        with pytest.raises(StoreError, match="nothing was written"):
            look.apply([Commit(puts=rows(b="2"))])
        look.close()
        assert files() == before, left
        journal.close()
        before = files()


def test_where_there_is_no_journal_looking_makes_none(tmp_path):
    for option in ("only_look", "must_exist"):
        with pytest.raises(CorruptStoreError, match=r"cache\.db is missing or empty"):
            DiskJournal(tmp_path / "journal", tmp_path / "values", **{option: True})
    assert list(tmp_path.iterdir()) == []


def test_a_lost_row_is_among_the_problems(disk, tmp_path):
    """SQLite's check doesn't see it where table and index lost it together; its triggers have counted."""
    disk.apply([Commit(puts=rows(a="1", b="2"))])
    assert disk.problems() == []
    with closing(sqlite3.connect(tmp_path / "journal" / "cache.db")) as sql:
        sql.execute("DROP TRIGGER Settings_count_delete")
        sql.execute("DELETE FROM Cache WHERE key = 'a'")
        sql.commit()
    assert disk.problems() == ["1 rows are there, 2 were counted"]


@pytest.mark.parametrize("commit", [Commit(puts=rows(n="1")), Commit(("lease", b"mine"), inserts=rows(n="1"))])
def test_settings_that_another_program_changed_are_repaired_by_the_next_commit(disk, tmp_path, commit):
    disk.apply([Commit(puts=rows(lease="mine"))])
    stranger = diskcache.Cache(str(tmp_path / "journal"), eviction_policy="least-recently-stored", cull_limit=10)
    stranger.close()
    assert in_force(tmp_path / "journal")["cull_limit"] == 10
    assert disk.apply([commit]) == [APPLIED]
    said = in_force(tmp_path / "journal")
    assert {key: said[key] for key in SAFE} == SAFE


def test_more_than_a_gigabyte_of_rows_would_stay(disk, tmp_path):
    """diskcache culls above its size limit: none of ours is ever in reach of it."""
    disk.apply([Commit(puts=tuple((f"k{i:03}", b"x") for i in range(100)))])
    with diskcache.Cache(str(tmp_path / "journal")) as stock:
        assert stock.size_limit >= 2**60
        stock.cull()
        stock.expire()
        stock.evict(None)
    assert len(disk.scan("k")) == 100


def test_stock_diskcache_reads_the_rows(disk, tmp_path):
    disk.apply([Commit(inserts=rows(a="1", b="2"))])
    with diskcache.Cache(str(tmp_path / "journal")) as stock:
        assert stock.get("a") == b"1"
        assert sorted(stock) == ["a", "b"]
        assert len(stock) == 2
        assert stock.check() == []


def test_what_stock_diskcache_pickled_there_is_never_unpickled(disk, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.abort, ()

    with diskcache.Cache(str(tmp_path / "journal")) as stock:
        stock.set("bomb", Bomb())
        stock.set("text", "t")
        stock.set("big", b"x" * 100_000)
        stock.set(1, b"number")
    for key in ("bomb", "text", "big", "1"):
        assert disk.get(key) is None or isinstance(disk.get(key), bytes)
    assert all(isinstance(value, bytes) for prefix in "btn1" for _, value in disk.scan(prefix))


def test_a_damaged_or_missing_large_value_is_corrupt_and_healed_by_writing_it_again(disk, tmp_path):
    digest = disk.put_blob(b"x" * 5000)
    (file,) = (tmp_path / "values").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o400
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    for damaged in (b"x" * 4999, b"x" * 4999 + b"y", b""):
        file.unlink()
        file.write_bytes(damaged)
        with pytest.raises(CorruptStoreError, match=digest):
            disk.get_blob(digest)
    file.unlink()
    with pytest.raises(CorruptStoreError, match=digest):
        disk.get_blob(digest)
    assert disk.put_blob(b"x" * 5000) == digest
    assert disk.get_blob(digest) == b"x" * 5000


def test_a_large_value_damaged_without_changing_its_size_is_healed_too(disk, tmp_path):
    digest = disk.put_blob(b"x" * 5000)
    (file,) = (tmp_path / "values").iterdir()
    file.unlink()
    file.write_bytes(b"y" * 5000)
    assert disk.put_blob(b"x" * 5000) == digest
    assert disk.get_blob(digest) == b"x" * 5000


# -- death ------------------------------------------------------------------------------------------------------------

COMMITS_IN_A_LOOP = """
    import itertools, os, sys
    from pathlib import Path
    from durable_nb._journal import Commit
    from durable_nb._journal.disk import DiskJournal

    folder, told = Path(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    journal = DiskJournal(folder / "journal", folder / "values")
    me = os.getpid()
    journal.apply([Commit(puts=(("lease", b"%d" % me),))])
    for i in itertools.count():
        rows = [(f"k/{me}/{i}/{n}", b"v" * 100) for n in range(1 + i % 3)]
        group = [Commit(("lease", b"%d" % me), inserts=(row,), deletes=("x",) * (i % 2)) for row in rows]
        journal.apply(group)
        for commit in group:
            os.write(told, commit.inserts[0][0].encode() + b"\\n")
"""


def test_no_acknowledged_row_is_missing_after_sigkill(tmp_path):
    """Ten kills at arbitrary instants of a process that commits in a loop; each successor opens what is there."""
    told = tmp_path / "told"
    command = [sys.executable, "-c", textwrap.dedent(COMMITS_IN_A_LOOP), str(tmp_path), str(told)]
    for kill in range(10):
        size = told.stat().st_size if told.exists() else 0
        process = subprocess.Popen(command)
        while not told.exists() or told.stat().st_size < size + 500 * (1 + kill % 3):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    journal = DiskJournal(tmp_path / "journal", tmp_path / "values")
    kept = {key for key, value in journal.scan("k/") if value == b"v" * 100}
    assert journal.problems() == []
    journal.close()
    acknowledged = told.read_text().split()
    assert len(acknowledged) > 100
    assert set(acknowledged) - kept == set()


def test_processes_that_commit_at_once_all_succeed(tmp_path):
    source = """
        import sys
        from pathlib import Path
        from durable_nb._journal import Commit
        from durable_nb._journal.disk import DiskJournal
        folder, me = Path(sys.argv[1]), sys.argv[2]
        journal = DiskJournal(folder / "journal", folder / "values")
        won = 0
        for i in range(60):
            journal.apply([Commit(inserts=((f"own/{me}/{i:02}", b"x"),))])
            won += journal.apply([Commit(("gate", None), inserts=((f"all/{i:02}", me.encode()),))])[0].value == "applied"
        print(won)
    """
    command = [sys.executable, "-c", textwrap.dedent(source), str(tmp_path)]
    racers = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(3)]
    won = [int(racer.communicate()[0]) for racer in racers]
    journal = DiskJournal(tmp_path / "journal", tmp_path / "values")
    assert sum(won) == 60
    assert len(journal.scan("own/")) == 180
    assert [sum(v == str(n).encode() for _, v in journal.scan("all/")) for n in range(3)] == won
    journal.close()


# -- a disk that refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "group",
    [
        [Commit(puts=rows(new="n"))],
        [Commit(("lease", b"mine"), inserts=rows(new="n"))],
        [Commit(("lease", b"mine"), inserts=rows(new="n")), Commit(puts=rows(new2="n"))],
    ],
    ids=["put", "one statement", "group"],
)
def test_a_disk_that_refuses_is_a_store_error_and_what_was_there_stays_readable(disk, group):
    disk.apply([Commit(puts=rows(lease="mine", old="o"))])
    with connections(disk) as (writer, _):
        writer.execute("PRAGMA query_only = 1")
    with pytest.raises(StoreError, match=r"could not be written.*Steps acknowledged before are safe.*DURABLE_NB_DIR"):
        disk.apply(group)
    assert disk.get("old") == b"o"
    assert disk.scan("new") == []
    assert not writer.in_transaction
    writer.execute("PRAGMA query_only = 0")
    assert disk.apply(group) == [APPLIED] * len(group)


def test_a_refusal_in_the_middle_of_a_group_applies_none_of_it(disk, monkeypatch):
    real = disk_module._applied

    def applied(sql, commit):
        if commit.puts == rows(bad="b"):
            raise sqlite3.OperationalError("database or disk is full")
        return real(sql, commit)

    monkeypatch.setattr(disk_module, "_applied", applied)
    with pytest.raises(StoreError, match="disk is full"):
        disk.apply([Commit(puts=rows(good="g")), Commit(puts=rows(bad="b"))])
    assert disk.get("good") is None
    assert disk.apply([Commit(puts=rows(good="g"))]) == [APPLIED]


def test_a_full_disk_is_a_store_error_and_space_makes_it_good(tmp_path):
    """On a file system of one megabyte, where this machine lets us mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs rights that this process hasn't got")
    try:
        journal = DiskJournal(folder / "journal", folder / "values")
        ballast = folder / "ballast"
        ballast.write_bytes(bytes(200_000))
        kept = []
        with pytest.raises(StoreError, match="could not be written"):
            for i in range(1000):
                journal.apply([Commit(puts=((f"k{i:04}", os.urandom(20_000)),))])
                kept.append(f"k{i:04}")
        assert len(kept) > 5
        assert [key for key, _ in journal.scan("k")] == kept
        with pytest.raises(StoreError, match="No space"):
            journal.put_blob(os.urandom(2 << 20))
        assert not list((folder / "values").iterdir())
        ballast.unlink()
        assert journal.apply([Commit(puts=rows(k_last="s"))]) == [APPLIED]
        assert [key for key, _ in journal.scan("k")] == [*kept, "k_last"]
        journal.close()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_that_is_no_database_is_a_store_error(tmp_path):
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "cache.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreError, match="could not be opened"):
        DiskJournal(tmp_path / "journal", tmp_path / "values")


def test_a_writer_that_never_lets_go_is_a_store_error_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(database_module, "PATIENCE_S", 0.05)
    journal = DiskJournal(tmp_path / "journal", tmp_path / "values")
    journal.apply([Commit(puts=rows(a="1", lease="l"))])
    other = sqlite3.connect(tmp_path / "journal" / "cache.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for commit in (Commit(puts=rows(b="2")), Commit(("lease", b"l"), inserts=rows(b="2"))):
        with pytest.raises(StoreError, match="locked"):
            journal.apply([commit])
    assert journal.get("a") == b"1"
    other.execute("ROLLBACK")
    other.close()
    assert journal.apply([Commit(puts=rows(b="2"))]) == [APPLIED]
    journal.close()


# -- the writer -------------------------------------------------------------------------------------------------------


class Watched(MemoryJournal):
    """Counts the groups that reach it, and can hold the first."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[int] = []
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.refused: bytes | None = None

    def apply(self, commits):
        self.groups.append(len(commits))
        self.entered.set()
        assert self.gate.wait(30)
        if any(self.refused in dict(c.puts).values() for c in commits):
            raise StoreError("refused")
        return super().apply(commits)


def put(n, value=b"v"):
    return Commit(puts=((f"k{n:05}", value),))


def test_commits_that_wait_at_the_same_time_share_one_transaction():
    async def main():
        journal = Watched()
        writer = Writer(journal)
        first = writer.commit(put(0))
        await asyncio.to_thread(journal.entered.wait)
        others = [writer.commit(put(n)) for n in range(1, 1001)]
        journal.gate.set()
        assert await asyncio.gather(first, *others) == [APPLIED] * 1001
        assert journal.groups == [1, 1000]
        writer.close()

    asyncio.run(main())


def test_a_group_has_a_limit():
    async def main():
        journal = Watched()
        writer = Writer(journal)
        first = writer.commit(put(0))
        await asyncio.to_thread(journal.entered.wait)
        others = [writer.commit(put(n)) for n in range(1, 2 * GROUP_LIMIT + 11)]
        journal.gate.set()
        await asyncio.gather(first, *others)
        assert journal.groups == [1, GROUP_LIMIT, GROUP_LIMIT, 10]
        writer.close()

    asyncio.run(main())


def test_one_bad_commit_fails_alone():
    async def main():
        journal = Watched()
        journal.refused = b"bad"
        writer = Writer(journal)
        first = writer.commit(put(0))
        await asyncio.to_thread(journal.entered.wait)
        others = [writer.commit(put(n, b"bad" if n == 3 else b"v")) for n in range(1, 6)]
        journal.gate.set()
        told = await asyncio.gather(first, *others, return_exceptions=True)
        assert [type(t) for t in told] == [Verdict, Verdict, Verdict, StoreError, Verdict, Verdict]
        assert sorted(journal.rows) == ["k00000", "k00001", "k00002", "k00004", "k00005"]
        writer.close()

    asyncio.run(main())


def test_calls_keep_their_place_among_commits_and_their_errors():
    async def main():
        journal = Watched()
        journal.gate.set()
        writer = Writer(journal)
        seen = []
        writer.commit(put(1))
        look = writer.call(lambda: seen.append(sorted(journal.rows)))
        writer.commit(put(2))
        fails = writer.call(lambda: 1 / 0)
        await look
        with pytest.raises(ZeroDivisionError):
            await fails
        assert seen == [["k00001"]]
        assert await writer.commit(put(3)) is APPLIED
        writer.close()

    asyncio.run(main())


def test_the_commit_of_a_cancelled_future_still_lands():
    async def main():
        complaints = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        journal = Watched()
        writer = Writer(journal)
        first, second = writer.commit(put(0)), writer.commit(put(1))
        await asyncio.to_thread(journal.entered.wait)
        first.cancel()
        second.cancel()
        journal.gate.set()
        assert await writer.commit(put(2)) is APPLIED
        assert sorted(journal.rows) == ["k00000", "k00001", "k00002"]
        assert complaints == []
        writer.close()

    asyncio.run(main())


def test_closing_writes_what_was_handed_over():
    async def main():
        journal = Watched()
        writer = Writer(journal)
        futures = [writer.commit(put(n)) for n in range(20)]
        journal.gate.set()
        await asyncio.to_thread(writer.close)
        assert len(journal.rows) == 20
        assert await asyncio.gather(*futures) == [APPLIED] * 20

    asyncio.run(main())


def test_what_is_handed_over_to_a_closed_writer_is_refused_and_waits_for_nothing():
    """A thread that outlives its store must not leave its cell waiting for ever."""

    async def main():
        writer = Writer(MemoryJournal())
        writer.close()
        with pytest.raises((StoreError, RuntimeError)):
            await asyncio.wait_for(writer.commit(put(1)), 2)

    asyncio.run(main())


def test_a_loop_that_ended_takes_only_its_own_waiters_along():
    journal = Watched()
    writer = Writer(journal)

    async def leaves():
        writer.commit(put(1))
        await asyncio.to_thread(journal.entered.wait)

    async def stays():
        commit = writer.commit(put(2))
        journal.gate.set()
        return await commit

    asyncio.run(leaves())
    assert asyncio.run(stays()) is APPLIED
    assert sorted(journal.rows) == ["k00001", "k00002"]
    writer.close()


def test_a_future_resolves_after_its_commit_is_on_disk(disk, tmp_path):
    async def main():
        writer = Writer(disk)
        for n, insert in product(range(3), (False, True)):
            commit = Commit(inserts=((f"i{n}", b"v"),)) if insert else put(n)
            await writer.commit(commit)
            other = DiskJournal(tmp_path / "journal", tmp_path / "values")
            assert other.get((commit.inserts or commit.puts)[0][0]) == b"v"
            other.close()
        writer.close()

    asyncio.run(main())


def test_diskcache_is_met_in_one_module_only():
    package = Path(disk_module.__file__).parents[1]
    users = {file.relative_to(package).as_posix() for file in package.rglob("*.py") if "import diskcache" in file.read_text()}
    assert users == {"_journal/database.py"}


@pytest.mark.parametrize(("expected", "most"), [(100, 10), (3, 40)], ids=["many are at work", "few are"])
def test_where_many_steps_are_at_work_their_commits_keep_each_other_company(expected, most):
    """Forty commits that come one after the other; alone, none waits."""
    journal = MemoryJournal()
    groups = []
    apply = journal.apply
    journal.apply = lambda commits: groups.append(len(commits)) or apply(commits)

    async def main():
        writer = Writer(journal)
        left = expected

        def ended(_):
            nonlocal left
            left -= 1

        writer.expected = lambda: left
        waiting = []
        for n in range(40):
            waiting.append(writer.commit(Commit(inserts=((f"k{n}", b"x"),))))
            waiting[-1].add_done_callback(ended)
            await asyncio.sleep(0.0005)
        assert await asyncio.gather(*waiting) == 40 * [Verdict.APPLIED]
        writer.close()

    asyncio.run(main())
    assert sum(groups) == 40
    assert len(groups) <= most
    if expected < 20:
        assert len(groups) > 10
