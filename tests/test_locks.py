"""Locks among processes and threads, and what the disk beneath can do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from durable_nb import _disks, _locks
from durable_nb._disks import FileSystem, file_system_of
from durable_nb._locks import FairLock, HeldTooLongError, LockFile, is_locked, process_state


@pytest.fixture
def path(tmp_path):
    return tmp_path / "the.lock"


# -- locks -------------------------------------------------------------------------------------------------------------


def test_a_lock_excludes_every_other_open_file_and_shared_ones_share(path):
    one, two, three = LockFile(path), LockFile(path), LockFile(path)
    assert one.try_lock()
    assert one.try_lock(), "it has it already"
    assert not two.try_lock()
    assert not two.try_lock(shared=True)
    assert is_locked(path)
    one.unlock()
    assert two.try_lock(shared=True)
    assert three.try_lock(shared=True)
    assert not one.try_lock()
    assert not is_locked(path), "not exclusively"
    two.close()
    three.close()
    assert one.try_lock()
    one.close()
    assert not is_locked(path)


def test_a_closed_file_locks_nothing(path):
    file = LockFile(path)
    file.close()
    file.close()
    assert not file.is_open
    with pytest.raises(ValueError, match="closed"):
        file.try_lock()


def test_a_forked_child_keeps_no_lock_and_frees_none(path):
    fair, file = FairLock(path), LockFile(path.with_name("other"))
    assert file.try_lock()
    with fair.locked(1):
        told, tell = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(tell, b"open" if file.is_open or fair._files else b"let go")
                signal.pause()
            finally:
                os._exit(0)
        assert os.read(told, 10) == b"let go"
        assert is_locked(path)
        assert is_locked(path.with_name("other"))
    file.close()
    assert not is_locked(path.with_name("other"))
    assert not is_locked(path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(told)
    os.close(tell)


# -- the fair lock -----------------------------------------------------------------------------------------------------


def test_threads_lock_by_turns(path):
    turns = [FairLock(path), FairLock(path)]
    inside, most = [], []

    def work(n):
        for _ in range(30):
            with turns[n % 2].locked(30):
                inside.append(n)
                most.append(len(inside))
                inside.remove(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) == 120


@pytest.mark.parametrize("same", [True, False])
def test_who_holds_the_lock_for_too_long_is_named(path, same):
    one = FairLock(path)
    two = one if same else FairLock(path)
    heard = []

    def wait():
        try:
            with two.locked(0.05):
                pass
        except HeldTooLongError as error:
            heard.append(error)

    with one.locked(1):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
    assert [error.pid for error in heard] == [os.getpid()]
    with two.locked(1):
        pass


def test_an_exception_frees_the_lock(path):
    one, two = FairLock(path), FairLock(path)
    with pytest.raises(KeyboardInterrupt), one.locked(1):
        raise KeyboardInterrupt
    with two.locked(0.1), pytest.raises(HeldTooLongError), one.locked(0.05):
        pass
    with one.locked(0.1):
        pass


def test_a_lock_file_that_somebody_removed_excludes_all_the_same(path):
    """Who had it open goes over to the file that others make."""
    one, two = FairLock(path), FairLock(path)
    with one.locked(1):
        pass
    path.unlink()
    with two.locked(1), pytest.raises(HeldTooLongError), one.locked(0.05):
        pass
    with one.locked(1), pytest.raises(HeldTooLongError), two.locked(0.05):
        pass


def test_closing_leaves_a_lock_that_is_held(path):
    one, two = FairLock(path), FairLock(path)
    with one.locked(1):
        closer = threading.Thread(target=one.close)
        closer.start()
        closer.join()
        with pytest.raises(HeldTooLongError), two.locked(0.05):
            pass
    one.close()
    with one.locked(1):
        assert is_locked(path)


def test_who_waits_is_let_go_first(path, monkeypatch):
    """A process that comes while another one waits steps back for a moment."""
    pauses = []
    monkeypatch.setattr(_locks.time, "sleep", pauses.append)
    newcomer, waiting = FairLock(path), LockFile(path.with_suffix(".waiting"))
    with newcomer.locked(1):
        assert pauses == []
    assert waiting.try_lock(shared=True)
    with newcomer.locked(1):
        assert pauses == [_locks._COURTESY_S]
    waiting.close()


@pytest.mark.parametrize("how", ["stopped", "asleep"])
def test_what_a_process_is_doing(how):
    process = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        if how == "stopped":
            process.send_signal(signal.SIGSTOP)
        while process_state(process.pid) != how:
            assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert process_state(process.pid) == "not a process of this machine or container"


def test_only_one_module_knows_how_to_lock():
    package = Path(_locks.__file__).parent
    users = {file.name for file in package.rglob("*.py") if "fcntl" in file.read_text()}
    assert users == {"_locks.py"}


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="file systems are compared with what GNU stat says")
@pytest.mark.parametrize("folder", ["", "/dev/shm", "/proc"])
def test_file_systems_are_known_by_their_name(tmp_path, folder):
    folder = Path(folder or tmp_path)
    said = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True).stdout.strip()
    found, known = file_system_of(folder), {"ext2/ext3": "ext", "overlayfs": "overlay"}.get(said, said)
    assert found.name == known or found.name.startswith("type 0x") or known == "overlay"
    assert found.is_fit == (known in _disks._FIT) or known == "overlay"


def test_a_folder_that_is_not_there_yet_is_on_its_parents_disk(tmp_path):
    assert file_system_of(tmp_path / "a" / "b") == file_system_of(tmp_path)


@pytest.mark.parametrize(("upper", "fit"), [("ext", True), ("nfs", False), (None, True)])
def test_an_overlay_is_what_its_upper_folder_is_on(tmp_path, monkeypatch, upper, fit):
    above = tmp_path / "upper"
    above.mkdir()
    monkeypatch.setattr(_disks, "_name", lambda path: upper if path == above else "overlay")
    monkeypatch.setattr(_disks, "_upper_of", lambda _: above if upper else None)
    assert file_system_of(tmp_path).is_fit is fit


@pytest.mark.parametrize("name", ["", "fuse", "nfs", "cifs", "smb", "9p", "type 0x1", "ntfs", "vfat"])
def test_what_is_not_known_to_be_fit_is_not(name):
    assert not FileSystem(name).is_fit
    assert "rollback journal" in FileSystem(name).advice
