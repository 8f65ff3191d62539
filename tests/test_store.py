"""The store's folder, and who of several processes is alive."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from contextlib import closing, contextmanager, suppress

import diskcache
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import durable_nb as durable
from durable_nb import _locks, _store
from durable_nb._disks import FileSystem
from durable_nb._files import default_store
from durable_nb._journal import Commit, database
from durable_nb._locks import LockFile
from durable_nb._store import FORMAT, Process, Store
from durable_nb.errors import CorruptStoreError, StoreError


@pytest.fixture(autouse=True)
def _own_key(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path_factory.getbasetemp() / "store-tests.key"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".durable_nb"


@contextmanager
def opened(path):
    store = Store(path)
    try:
        yield store
    finally:
        store.close()


def contents(folder):
    return {
        file.relative_to(folder).as_posix(): (file.read_bytes() if file.is_file() else None, file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
    }


# -- the folder -------------------------------------------------------------------------------------------------------


def test_a_new_store_is_private_and_unseen_by_git(path):
    with opened(path) as store:
        assert path.stat().st_mode & 0o777 == 0o700
        assert (path / ".gitignore").read_text() == "*\n"
        assert json.loads((path / "store.json").read_text()) == {"format": FORMAT, "id": store.id}
        assert len(store.id) == 16


def test_a_store_keeps_its_id(path):
    ids = []
    for _ in range(2):
        with opened(path) as store:
            ids.append(store.id)
    with opened(path.parent / "other") as other:
        assert ids[0] == ids[1] != other.id


def test_an_umask_does_not_open_the_store(path):
    before = os.umask(0)
    try:
        with opened(path):
            shared = [
                f.relative_to(path).as_posix() for f in [path, path / "locks", path / "store.json"] if f.stat().st_mode & 0o077
            ]
            assert shared == []
    finally:
        os.umask(before)


def test_where_the_store_is(tmp_path, monkeypatch):
    monkeypatch.delenv("DURABLE_NB_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert default_store() == tmp_path / ".durable_nb"
    monkeypatch.setenv("DURABLE_NB_DIR", "elsewhere")
    assert default_store() == tmp_path / "elsewhere"


def test_a_later_chdir_does_not_move_the_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with opened(_store.Path(".durable_nb")) as store:
        monkeypatch.chdir("/")
        assert store.path == tmp_path / ".durable_nb"
        assert store.cells.is_absolute()


def test_a_store_whose_making_was_cut_short_is_made_whole(path):
    """store.json is written last: a folder without it is no store yet."""
    path.mkdir()
    (path / ".gitignore").write_text("*\n")
    with opened(path) as store:
        assert (path / "store.json").exists()
        assert store.id


def only_gitignore(path):
    (path / ".gitignore").write_text("*\n")


def only_a_draft(path):
    (path / "..gitignore.12.abcd").write_text("")


def up_to_the_journal(path):
    for name in ("locks", "values", "cells", "journal"):
        (path / name).mkdir()
    only_gitignore(path)


def without_store_json(path):
    Store(path).close()
    (path / "store.json").unlink()


@pytest.mark.parametrize("left", [lambda path: None, only_gitignore, only_a_draft, up_to_the_journal, without_store_json])
def test_an_empty_folder_or_what_was_left_of_making_a_store_becomes_one(path, left):
    path.mkdir(mode=0o755)
    left(path)
    with opened(path) as store:
        assert json.loads((path / "store.json").read_text())["id"] == store.id
        assert path.stat().st_mode & 0o777 == 0o700


def of_a_project(path):
    (path / "notebook.ipynb").write_text("{}")


def of_a_virtual_environment(path):
    (path / ".gitignore").write_text("*\n")
    (path / "bin").mkdir()


def with_an_ignore_file(path):
    (path / ".gitignore").write_text("*.pyc\n")


def with_a_folder_of_values(path):
    (path / "values").mkdir()


@pytest.mark.parametrize(
    "filled", [of_a_project, of_a_virtual_environment, with_an_ignore_file, with_a_folder_of_values], ids=lambda f: f.__name__
)
def test_a_folder_that_is_something_else_is_refused_and_not_touched(path, filled):
    path.mkdir(mode=0o755)
    filled(path)
    before = contents(path)
    with pytest.raises(StoreError, match=r"is not empty and not a store; nothing in it was changed.*\.durable_nb"):
        Store(path)
    assert contents(path) == before
    assert path.stat().st_mode & 0o777 == 0o755


def test_no_name_is_no_folder(tmp_path, monkeypatch):
    """The working directory isn't meant, even where it is empty."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="'' is not a folder"):
        durable.open("")
    assert list(tmp_path.iterdir()) == []


def database_deleted(path):
    (path / "journal" / "cache.db").unlink()


def journal_deleted(path):
    shutil.rmtree(path / "journal")


def all_but_store_json_deleted(path):
    for child in path.iterdir():
        if child.name != "store.json":
            shutil.rmtree(child) if child.is_dir() else child.unlink()


def database_truncated(path):
    (path / "journal" / "cache.db").write_bytes(b"")


def another_database(path):
    database_deleted(path)
    with closing(sqlite3.connect(path / "journal" / "cache.db")) as sql:
        sql.execute("CREATE TABLE t (x)")


def a_new_cache(path):
    journal_deleted(path)
    diskcache.Cache(str(path / "journal")).close()


def emptied_by_sql(path):
    with closing(sqlite3.connect(path / "journal" / "cache.db")) as sql:
        sql.execute("DELETE FROM Cache")
        sql.commit()


def cleared_by_diskcache(path):
    with diskcache.Cache(str(path / "journal")) as cache:
        cache.clear()


def another_stores_journal(path):
    Store(path.parent / "other").close()
    journal_deleted(path)
    shutil.copytree(path.parent / "other" / "journal", path / "journal")


@pytest.mark.parametrize(
    "damage",
    [
        database_deleted,
        journal_deleted,
        all_but_store_json_deleted,
        database_truncated,
        another_database,
        a_new_cache,
        emptied_by_sql,
        cleared_by_diskcache,
        another_stores_journal,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_journal_that_is_gone_or_empty_is_damage_and_never_a_new_store(path, damage):
    """Else finished steps would run, and charge, again without a word."""
    with opened(path) as store:
        store.journal.apply([Commit(inserts=(("step/a", b"1"),))])
    damage(path)
    for _ in range(2):
        with pytest.raises(CorruptStoreError, match=r"has lost its journal.*Nothing was run.*[Rr]estore.*backup"):
            Store(path)
    assert not list((path / "locks").glob("*.lock"))
    assert json.loads((path / "store.json").read_text())["id"] == store.id


def test_a_store_that_was_deleted_while_open_does_not_claim_that_its_steps_are_safe(path):
    with opened(path) as store:
        store.journal.apply([Commit(inserts=(("step/a", b"1"),))])
        shutil.rmtree(path)
        assert not store.is_in_place()
        with pytest.raises(StoreError, match="what was recorded there is gone with it") as caught:
            store.writer.commit_and_wait(Commit(inserts=(("step/b", b"1"),)))
        assert "safe" not in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "mode", "advice"),
    [
        ("ext", "wal", ""),
        ("overlay", "wal", ""),
        ("nfs", "persist", "on a network file system (nfs)"),
        ("9p", "persist", "on a network file system (9p)"),
        ("fuse", "persist", "a file system not known to be fit for SQLite's WAL (fuse)"),
        ("", "persist", "a file system not known to be fit for SQLite's WAL,"),
    ],
)
def test_wal_is_used_on_file_systems_known_to_be_fit_and_others_are_told(path, monkeypatch, name, mode, advice):
    found = FileSystem(name)
    monkeypatch.setattr(database, "file_system_of", lambda _: found)
    monkeypatch.setattr(_store, "file_system_of", lambda _: found)
    with opened(path) as store:
        assert store.journal.mode == mode
        assert advice in store.advice
        assert bool(advice) == ("DURABLE_NB_DIR" in store.advice)


OPENS = """
    import sys
    from pathlib import Path
    from durable_nb._store import Store
    print("ready", flush=True)
    sys.stdin.readline()
    print(Store(Path(sys.argv[1])).id, flush=True)
"""


def test_processes_that_open_a_new_store_at_once_agree_on_its_id(path):
    command = [sys.executable, "-c", textwrap.dedent(OPENS), str(path)]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    ids = {racer.communicate()[0].strip() for racer in racers}
    assert ids == {json.loads((path / "store.json").read_text())["id"]}
    assert [file.name for file in path.iterdir() if file.name.startswith(".") and file.name != ".gitignore"] == []


def test_a_newer_format_is_refused_and_nothing_in_the_folder_is_changed(path):
    with opened(path):
        pass
    (path / "store.json").unlink()
    (path / "store.json").write_text(json.dumps({"format": FORMAT + 1, "id": "x", "news": 1}))
    before = contents(path)
    with pytest.raises(StoreError, match=rf"newer durable_nb \(store format {FORMAT + 1}.*pip install -U durable-nb"):
        Store(path)
    assert contents(path) == before


DAMAGED = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"3",
    b"{}",
    b'{"format": 1}',
    b'{"id": "x"}',
    b'{"format": null, "id": "x"}',
    b'{"format": "one", "id": "x"}',
    b'{"format": Infinity, "id": "x"}',
    b'{"format": NaN, "id": "x"}',
    b"\xff\xfe\x00",
    b'{"format": 1, "id": "\xff"}',
    b"\0" * 64,
    b"[" * 100_000,
]


@pytest.mark.parametrize("held", DAMAGED, ids=lambda held: repr(held[:24]))
def test_a_damaged_store_file_is_told_and_nothing_in_the_folder_is_changed(path, held):
    with opened(path):
        pass
    (path / "store.json").unlink()
    (path / "store.json").write_bytes(held)
    before = contents(path)
    with pytest.raises(CorruptStoreError, match=r"store\.json is damaged.*DURABLE_NB_DIR"):
        Store(path)
    assert contents(path) == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40))
def test_no_damage_to_the_store_file_gives_another_error(tmp_path_factory, held):
    path = tmp_path_factory.mktemp("store")
    (path / "store.json").write_bytes(held)
    with pytest.raises(StoreError):
        Store(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_told(path):
    path.mkdir(mode=0o500)
    with pytest.raises(StoreError, match=r"can't be used.*DURABLE_NB_DIR"):
        Store(path)


@pytest.mark.parametrize("how", ["a file in its place", "below a file", "read-only file system"])
def test_a_folder_that_cannot_be_used_is_told(path, monkeypatch, how):
    if how == "a file in its place":
        path.write_text("no folder")
    elif how == "below a file":
        path.write_text("no folder")
        path = path / "store"
    else:

        def refuses(*_args, **_kwargs):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(_store, "write_new", refuses)
    with pytest.raises(
        StoreError, match=r"can't be used \((Not a directory|File exists|Read-only file system)\).*DURABLE_NB_DIR"
    ):
        Store(path)


def test_a_store_that_cannot_be_opened_leaves_no_sign_of_life(path):
    """Else its runs would wait for a process that never had them."""
    with opened(path):
        pass
    journal = path / "journal" / "cache.db"
    journal.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError):
        Store(path)
    assert list((path / "locks").iterdir()) == []


def test_closing_lets_others_take_over(path):
    with opened(path) as first, opened(path) as second:
        assert second.process.is_alive(first.process.id)
        first.close()
        assert not second.process.is_alive(first.process.id)
        assert not first.process.is_alive(first.process.id)


# -- who is alive -----------------------------------------------------------------------------------------------------

LIVES = """
    import multiprocessing, os, subprocess, sys, time
    from pathlib import Path
    from durable_nb._store import Process

    def wait():
        os.write(1, b"child\\n")
        time.sleep(60)

    if __name__ == "__main__":
        process = Process(Path(sys.argv[1]))
        kind = sys.argv[2]
        child = 0
        if kind == "fork":
            child = os.fork()
            if not child:
                wait()
                os._exit(0)
        elif kind == "subprocess":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False).pid
        elif kind in ("multiprocessing fork", "multiprocessing spawn"):
            worker = multiprocessing.get_context(kind.split()[1]).Process(target=wait, daemon=True)
            worker.start()
            child = worker.pid
        elif kind == "pool":
            pool = multiprocessing.get_context("fork").Pool(1)
            pool.apply(os.write, (1, b"child\\n"))
            child = pool._pool[0].pid
        elif kind == "grandchild":
            child = os.fork()
            if not child:
                child = os.fork()
                if child:
                    os._exit(0)
                wait()
                os._exit(0)
            os.waitpid(child, 0)
            child = 0
        elif kind == "shell":
            child = subprocess.Popen("sleep 60 & sleep 60", shell=True).pid
        os.write(1, f"{process.id} {child}\\n".encode())
        sys.stdin.read()
"""
CHILDREN = ["none", "fork", "subprocess", "multiprocessing fork", "multiprocessing spawn", "pool", "grandchild", "shell"]


@contextmanager
def living(tmp_path, folder, kind):
    """A process that holds its sign of life, in a process group of its own, with a child of that kind: (process, id)."""
    script = tmp_path / "lives.py"
    script.write_text(textwrap.dedent(LIVES))
    command = [sys.executable, str(script), str(folder), kind]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        told = [process.stdout.readline().split() for _ in range(1 if kind in {"none", "subprocess", "shell"} else 2)]
        ((process_id, child),) = [line for line in told if line != ["child"]]
        yield process, process_id, int(child)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("kind", CHILDREN)
def test_a_process_is_alive_until_it_is_killed_and_dead_at_once_whatever_child_survives(tmp_path, kind):
    me = Process(tmp_path / "locks")
    try:
        with living(tmp_path, tmp_path / "locks", kind) as (process, process_id, child):
            for _ in range(3):
                assert me.is_alive(process_id)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not me.is_alive(process_id)
            if child and kind != "pool":
                os.kill(child, 0)  # it survives
            assert not me.is_alive(process_id)
    finally:
        me.end()
    assert list((tmp_path / "locks").iterdir()) == []


def test_a_stopped_process_is_alive(tmp_path):
    me = Process(tmp_path / "locks")
    with living(tmp_path, tmp_path / "locks", "none") as (process, process_id, _):
        process.send_signal(signal.SIGSTOP)
        assert me.is_alive(process_id)
    me.end()


def test_two_who_ask_at_once_do_not_take_each_other_for_the_dead_one(tmp_path, monkeypatch):
    """Asking takes a lock for a moment; another's question must not be answered by that."""
    dead = Process(tmp_path / "locks")
    asking, another = Process(tmp_path / "locks"), Process(tmp_path / "locks")
    dead._file.close()
    answers, real = [], _locks._try_lock

    def try_lock(descriptor, *, shared):
        got = real(descriptor, shared=shared)
        if not answers:
            answers.append(None)
            answers[0] = another.is_alive(dead.id)
        return got

    monkeypatch.setattr(_locks, "_try_lock", try_lock)
    assert not asking.is_alive(dead.id)
    assert answers == [False]
    asking.end()
    another.end()


def test_asking_does_not_end_the_life_asked_about(tmp_path):
    """lockf would: any close of the file frees its lock."""
    me, other = Process(tmp_path / "locks"), Process(tmp_path / "locks")
    with (tmp_path / "locks" / f"{me.id}.lock").open("rb"):
        pass
    assert other.is_alive(me.id)
    assert other.is_alive(me.id)
    assert me.is_alive(me.id)
    assert me.is_alive(other.id)
    me.end()
    other.end()


def test_nobody_is_not_alive(tmp_path):
    me = Process(tmp_path / "locks")
    assert not me.is_alive("")
    assert not me.is_alive("12345-abcdef")
    assert me.is_alive(me.id)
    me.end()
    assert not me.is_alive(me.id)
    me.end()


def test_ids_are_never_used_again(tmp_path):
    seen = set()
    for _ in range(50):
        process = Process(tmp_path / "locks")
        seen.add(process.id)
        process.end()
    assert len(seen) == 50
    assert list((tmp_path / "locks").iterdir()) == []


def test_what_killed_processes_left_behind_goes_when_a_store_is_opened(tmp_path):
    """And nobody takes for dead who is just signing in."""
    folder = tmp_path / "locks"
    dead = [Process(folder) for _ in range(3)]
    for process in dead:
        process._file.close()
    living = []
    threads = [threading.Thread(target=lambda: living.extend(Process(folder) for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {file.stem for file in folder.iterdir()} == {process.id for process in living}
    assert all(living[0].is_alive(process.id) for process in living)
    for process in living:
        process.end()


def test_a_process_that_is_about_to_sign_in_is_never_taken_for_dead_behind_its_back(tmp_path, monkeypatch):
    """While its file is being removed it can't get the lock: it notices, and takes another id."""
    asking = Process(tmp_path / "locks")
    path = tmp_path / "locks" / "1-abc.lock"
    file = LockFile(path, new=True)
    tried, unlink = [], type(path).unlink

    def remove(self, **options):
        assert not file.try_lock()
        tried.append(self)
        unlink(self, **options)

    monkeypatch.setattr(type(path), "unlink", remove)
    assert not asking.is_alive("1-abc")
    monkeypatch.undo()
    assert tried == [path]
    file.close()
    asking.end()
