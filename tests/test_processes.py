"""What survives when processes are killed, stopped, doubled, and when their disk is full or damaged.

Real processes, a real journal on disk, real signals. What step bodies did is told by a file outside the store, the oracle
(see `workers`). `DURABLE_NB_KILLS` says how often a process is killed at a random moment, `DURABLE_NB_OPENINGS` how often the
journal is opened by several at once: `make stress` kills 2,000 times, and opens 4,000 times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import tempfile
import time
from contextlib import ExitStack, closing, suppress
from itertools import pairwise
from pathlib import Path

import pytest
from workers import ForkServer, predicted, read_oracle, until

from durable_nb._journal.disk import DiskJournal
from durable_nb._locks import LockFile

KILLS = int(os.environ.get("DURABLE_NB_KILLS", "60"))
OPENINGS = int(os.environ.get("DURABLE_NB_OPENINGS", "40"))
FLIPS = max(40, KILLS // 4)
SEED = int(os.environ.get("DURABLE_NB_SEED", "1"))


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    return tmp_path_factory.mktemp("key") / "signing.key"


@pytest.fixture(scope="module")
def server(key_file):
    made = ForkServer(key_file)
    yield made
    made.close()


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")


@pytest.fixture
def oracle(tmp_path):
    return tmp_path / "oracle"


def begun(oracle, name):
    """The processes that began the step's body, in order."""
    return [pid for pid, what, step, _ in read_oracle(oracle) if (what, step) == ("begin", name)]


def wait_for_line(oracle, *wanted):
    until(lambda: any(line[1:3] == wanted for line in read_oracle(oracle)), f"the oracle's line {wanted}")


def broken_promises(lines, values):
    """What the oracle's lines have against a run that returned `values`."""
    acknowledged, found = {}, []
    for n, (_, what, name, value) in enumerate(lines):
        if what == "ack":
            if acknowledged.setdefault(name, value) != value:
                found.append(f"line {n}: {name} was acknowledged as {acknowledged[name]}, and then as {value}")
        elif what == "begin" and name in acknowledged:
            found.append(f"line {n}: {name} ran again after it was acknowledged")
        elif what == "done" and json.loads(value) != values:
            found.append(f"line {n}: another process got {value}, not {values}")
    made = {(name, value) for _, what, name, value in lines if what == "end"}
    found += [f"{name}={value} is missing" for name, value in acknowledged.items() if values.get(name) != value]
    found += [f"{name}={value} was made by no body" for name, value in values.items() if (name, value) not in made]
    return found


# -- killed at any moment -----------------------------------------------------------------------------------------------


def test_a_kill_at_any_moment_loses_no_acknowledged_step_and_repeats_none(server, store, tmp_path):
    """Every run comes to its end, and everybody who asks gets the same result."""
    chance = random.Random(SEED)
    killed, runs, moments = 0, 0, []
    while killed < KILLS:
        runs += 1
        run_id, oracle = f"run-{runs}", tmp_path / f"oracle-{runs}"
        if chance.random() < 0.3:
            store = str(tmp_path / f"store-{runs}")  # the making of a store is cut short as well
        args = {"store": store, "oracle": str(oracle), "run_id": run_id}

        def worker(args=args):
            return server.start("travel", **args, how=chance.choice(["start", "resume", "all", "await"]))

        with ExitStack() as stack:
            mine = stack.enter_context(worker())
            for _ in range(chance.randrange(1, 9)):
                heir = stack.enter_context(worker()) if chance.random() < 0.2 else None
                if chance.random() < 0.5:
                    moment = chance.uniform(0, 0.12)
                    time.sleep(moment)
                else:
                    lines = len(read_oracle(oracle)) + chance.randrange(1, 12)
                    give_up = time.monotonic() + 1
                    while len(read_oracle(oracle)) < lines and mine.exit_code() is None and time.monotonic() < give_up:
                        pass
                over = not mine.kill()
                killed += not over
                moments.append(len(read_oracle(oracle)))
                mine = heir or stack.enter_context(worker())
                if over:
                    break
            values = mine.result()
        assert server.do("travel", **args, how="await") == values
        assert broken_promises(read_oracle(oracle), values) == [], f"seed {SEED}, {run_id}, in {store}"
        assert len(values) == 13
    assert len(set(moments)) > min(KILLS / 4, 30), "the kills came at many different moments"


def test_parallel_steps_that_end_in_any_order_are_killed_and_resumed_and_go_the_way_they_went(server, store, tmp_path):
    """`gather` and `TaskGroup`: each task gets its own values, in the order in which the code saw them at first. And children,
    eight at once: each is begun once, and goes on."""  # fmt: skip
    chance = random.Random(SEED)
    killed, runs, orders = 0, 0, set()
    while killed < KILLS // 7:
        runs += 1
        how, oracle = ("gather", "group", "family")[runs % 3], tmp_path / f"oracle-{runs}"
        args = {"store": store, "oracle": str(oracle), "workflow": "parallel", "argument": how, "run_id": f"run-{runs}"}
        for life in range(6):
            with server.start("live", **args, more=[8]) as process:
                if life < 5:
                    lines = len(read_oracle(oracle)) + chance.randrange(1, 30)
                    while len(read_oracle(oracle)) < lines and process.exit_code() is None:
                        pass
                    if process.kill():
                        killed += 1
                        continue
                values, seen, seen_before = process.result()["value"]
            break
        assert broken_promises(read_oracle(oracle), values) == [], f"seed {SEED}, run {runs}"
        assert seen == seen_before
        assert sorted(seen) == [f"{how}-{n}" for n in range(8)]
        orders.add(tuple(seen))
    assert len(orders) > runs / 3, "they ended in many orders"


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: fsync takes no time there, and a kill doesn't need it."""
    parent = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=parent if os.access(parent, os.W_OK) else tmp_path))
    yield folder
    shutil.rmtree(folder)


def test_a_kill_at_any_instant_of_making_a_store_leaves_no_damage(server, memory):
    """Whoever opens it next completes it, and the id that was known stays."""
    instants = server.do("make_store", store=str(memory / "whole"))["instants"]
    killed = 0
    for n in range(1, instants + 1, max(1, 3 * instants // KILLS)):
        store = memory / str(n)
        with server.start("make_store", store=str(store), dies_at=n) as worker:
            until(lambda worker=worker: worker.exit_code() is not None, "the worker's death")
            killed += worker.exit_code() == -signal.SIGKILL
        file = store / "store.json"
        known = json.loads(file.read_text())["id"] if file.exists() else None
        opened = server.do("make_store", store=str(store))["id"]
        assert opened == (known or opened)
        assert server.do("make_store", store=str(store))["id"] == opened == json.loads(file.read_text())["id"]
    assert killed > min(KILLS / 3, instants) / 2


def test_a_step_that_is_tried_at_most_once_is_not_run_again_after_a_kill(server, store, tmp_path, oracle):
    """Until somebody says so: then once more."""
    gate = tmp_path / "gate"
    args = {"store": store, "oracle": str(oracle), "gate": str(gate)}
    with server.start("dare", **args, resume=False) as owner:
        wait_for_line(oracle, "begin", "held")
        assert owner.kill()
    gate.touch()
    for _ in range(2):
        with server.start("dare", **args, resume=False) as heir:
            assert heir.hear()["error"] == "StepInterrupted"
    assert begun(oracle, "held") == [owner.pid]
    with server.start("dare", **args, resume=True) as heir:
        value = heir.result()
    assert begun(oracle, "held") == [owner.pid, heir.pid]
    assert server.do("dare", **args, resume=False) == value


# -- two at once --------------------------------------------------------------------------------------------------------


def test_of_two_processes_that_start_the_same_run_at_once_one_executes_it(server, store, tmp_path, oracle):
    """And both get its result. A hundred times."""
    meeting = tmp_path / "meeting"
    meeting.write_bytes(bytes(2 * 4096))
    args = {"store": store, "oracle": str(oracle), "meeting": str(meeting), "count": 100}
    with server.start("start_together", **args, me=0) as left, server.start("start_together", **args, me=1) as right:
        assert left.result() == right.result()
    for n in range(1, 101):
        who = {pid for pid, _, name, _ in read_oracle(oracle) if name.startswith(f"{n}-")}
        assert len(who) == 1, f"run {n} was executed by {who}"
        assert len(begun(oracle, f"{n}-one")) == len(begun(oracle, f"{n}-two")) == 1


def test_processes_that_open_a_new_store_at_once_all_get_it(server, tmp_path):
    meeting = tmp_path / "meeting"
    meeting.write_bytes(bytes(4 * 4096))
    args = {"folder": str(tmp_path), "meeting": str(meeting), "others": 4, "times": 6}
    with ExitStack() as stack:
        openers = [stack.enter_context(server.start("open_together", **args, me=me)) for me in range(4)]
        assert [opener.result() for opener in openers] == 4 * [[]]


def test_a_run_that_ends_while_another_process_looks_at_it_is_not_executed_again(server, store, tmp_path, oracle):
    """Its result doesn't change."""
    gates = [str(tmp_path / "first gate"), str(tmp_path / "last gate")]
    args = {"store": store, "oracle": str(oracle), "run_id": "r"}
    with server.start("keep", **args, gates=gates, thread=False) as owner:
        wait_for_line(oracle, "begin", "held")
        with server.start("look_slowly", **args) as reader:
            assert reader.said() == "between the rows of run and lease"
            for gate in gates:
                Path(gate).touch()
            values = owner.result()["value"]
            reader.tell("go on")
            assert reader.result() == values
    assert {pid for pid, *_ in read_oracle(oracle)} == {owner.pid}


def test_a_forked_child_that_starts_a_run_without_opening_the_store_is_served_or_told_so(server, store):
    assert server.do("use_in_a_child", store=store) == 0


# -- a stopped owner ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["thread", "inline", "loop"])
@pytest.mark.parametrize(("how", "status"), [("return", 0), ("raise", 1), ("exit", 3)])
def test_a_child_that_a_steps_body_forks_ends_where_the_body_ends(server, store, where, how, status):
    """It doesn't go on in the parent's place, nor wait for jobs of the parent's for ever."""
    assert server.do("fork_in_a_step", store=store, how=how, where=where) == [status, ["forks"]]


@pytest.mark.parametrize("thread", [False, True], ids=["coroutine", "thread"])
@pytest.mark.parametrize("returns", ["while the run goes on", "after the run's end"])
def test_a_stopped_owner_is_not_robbed_but_may_be_taken_over(server, store, tmp_path, oracle, thread, returns):
    """Others wait for it. Taken over and then woken up, its commit is refused, its code is cancelled, and it runs no step."""
    gates = [str(tmp_path / "first gate"), str(tmp_path / "last gate")]
    args = {"store": store, "oracle": str(oracle), "run_id": "r", "gates": gates, "thread": thread}
    with server.start("keep", **args) as owner:
        wait_for_line(oracle, "begin", "held")
        owner.stop()
        with server.start("attach", **args) as heir:
            assert heir.said() == {"done": False, "status": "running"}
            assert begun(oracle, "held") == [owner.pid]
            heir.tell("take over")
            until(lambda: heir.pid in begun(oracle, "held"), "the heir to run the step that was not acknowledged")
            (tmp_path / "first gate").touch()
            until(lambda: heir.pid in begun(oracle, "end"), "the heir to go on")
            if returns == "after the run's end":
                (tmp_path / "last gate").touch()
                values = heir.result()
                owner.signal(signal.SIGCONT)
            else:
                owner.signal(signal.SIGCONT)
                wait_for_line(oracle, "cancelled", "code")
                (tmp_path / "last gate").touch()
                values = heir.result()
            assert owner.result() in ({"value": values}, {"lost": True})
        assert begun(oracle, "before") == [owner.pid]
        assert begun(oracle, "held") == [owner.pid, heir.pid]
        assert begun(oracle, "after") == begun(oracle, "end") == [heir.pid]
        assert [line[:2] for line in read_oracle(oracle) if line[2] == "code"] == [(owner.pid, "cancelled")]
    lines = [line for line in read_oracle(oracle) if line[1] == "ack" and line[2] == "held"]
    assert [(pid, value) for pid, _, _, value in lines] == [(heir.pid, values["held"])]


@pytest.mark.parametrize("thread", [False, True], ids=["coroutine", "thread"])
def test_a_run_is_cancelled_by_a_process_that_does_not_execute_it(server, store, tmp_path, oracle, thread):
    """Its owner hears of it, unwinds the code, and both know why. A thread that is at work goes on and is recorded."""
    gates = [str(tmp_path / "first gate"), str(tmp_path / "last gate")]
    args = {"store": store, "oracle": str(oracle), "run_id": "r", "gates": gates, "thread": thread}
    with server.start("keep", **args) as owner:
        wait_for_line(oracle, "begin", "held")
        with server.start("attach", **args) as other:
            assert other.said() == {"done": False, "status": "running"}
            other.tell("cancel")
            assert owner.result() == other.result() == {"cancelled": "the run 'r' was cancelled: sold out"}
        lines = [line[:3] for line in read_oracle(oracle)]
        assert (owner.pid, "cancelled", "code") in lines
        assert begun(oracle, "after") == []


@pytest.mark.parametrize("kind", ["fork", "popen", "mp fork", "mp spawn"])
def test_a_killed_owner_whose_child_lives_on_is_succeeded_at_once(server, store, tmp_path, oracle, kind):
    """The child, however it was made, doesn't hold the dead process's sign of life."""
    gate = tmp_path / "gate"
    args = {"store": store, "oracle": str(oracle), "kind": kind.removeprefix("mp "), "gate": str(gate)}
    child = 0
    try:
        with server.start("rear", **args) as owner:
            wait_for_line(oracle, "begin", "held")
            child = int(next(value for _, what, _, value in read_oracle(oracle) if what == "ack"))
            assert owner.kill()
            gate.touch()
            began = time.monotonic()
            assert server.do("rear", **args) == child
            assert time.monotonic() - began < 5
        os.kill(child, 0)  # it lives
        assert len(begun(oracle, "held")) == 2
        assert sum(what == "child" for _, what, _, _ in read_oracle(oracle)) == 1
    finally:
        if child:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


# -- a disk that is full, or can't be written ---------------------------------------------------------------------------


SIZES = {"small rows": (40, 20), "large rows": (5, 300_000), "files": (5, 1_500_000)}
"""Steps, and the bytes that each returns."""


class SmallDisk:
    """A fork server whose workers see a file system of 16 MiB, and fill it with the run of `growing`."""

    def __init__(self, server, disk, oracle):
        self.server, self._disk, self._oracle = server, disk, oracle
        self._filler = disk / "filler"

    def grow(self, values, how, leave=0):
        steps, size = SIZES[values]
        growth = {"steps": steps, "size": size, "filler": str(self._filler), "leave": leave}
        return self.server.start("grow", store=str(self._disk / "store"), oracle=str(self._oracle), how=how, **growth)

    def make_room(self):
        self.server.do("delete", path=str(self._filler))

    def remount(self, *, read_only):
        self.server.do("remount", path=str(self._disk), read_only=read_only)

    def check_full(self, said):
        """The error is of the tree and says what is the matter, and what was acknowledged can be read."""
        assert said["error"] == "StoreError", said
        assert "full" in said["text"] or "No space" in said["text"], said["text"]
        steps = {name for name, status in said["steps"] if status == "completed"}
        assert {name for _, what, name, _ in read_oracle(self._oracle) if what == "ack"} == steps
        assert said["status"] != "completed"

    def check_result(self, values, result):
        assert broken_promises(read_oracle(self._oracle), result) == []
        assert len(result) == SIZES[values][0]


@pytest.fixture
def small_disk(tmp_path, key_file, oracle):
    disk = tmp_path / "disk"
    disk.mkdir()
    server = ForkServer(key_file, tmpfs=disk, kilobytes=16 << 10)
    if server.trouble:
        server.close()
        pytest.skip(f"a file system of its own can't be mounted: {server.trouble}")
    yield SmallDisk(server, disk, oracle)
    server.close()


@pytest.mark.parametrize("leave", [0, 8192], ids=["brim", "a little room"])
@pytest.mark.parametrize("values", ["small rows", "large rows", "files"])
def test_a_full_disk_is_said_and_with_room_again_the_process_goes_on(small_disk, values, leave):
    """Nothing acknowledged is lost, and nothing acknowledged runs again."""
    with small_disk.grow(values, "start", leave) as worker:
        small_disk.check_full(worker.said())
        small_disk.make_room()
        worker.tell("go on")
        small_disk.check_result(values, worker.result())


@pytest.mark.parametrize(
    "how",
    [
        "resume",
        "start",
    ],
)
@pytest.mark.parametrize("values", ["small rows", "large rows"])
def test_after_a_full_disk_another_process_goes_on(small_disk, values, how):
    """While the disk is full it is told so; with room again it goes on where the dead process stopped."""
    with small_disk.grow(values, "start") as worker:
        small_disk.check_full(worker.said())
    with small_disk.grow(values, how) as worker:
        heard = worker.hear()
        assert heard.get("said", heard)["error"] == "StoreError", heard
    small_disk.make_room()
    with small_disk.grow(values, how) as worker:
        small_disk.check_result(values, worker.result())


def test_a_run_whose_end_did_not_fit_on_the_disk_is_free_for_others(small_disk):
    """Though the process that gave it up lives on."""
    with small_disk.grow("small rows", "start") as worker:
        assert worker.said()["status"] == "interrupted"
        small_disk.make_room()
        with small_disk.grow("small rows", "resume") as other:
            small_disk.check_result("small rows", other.result(seconds=3))


def test_a_disk_that_became_read_only_is_said_and_used_again_when_it_can_be(small_disk):
    with small_disk.grow("small rows", "start") as worker:
        small_disk.check_full(worker.said())
    small_disk.make_room()
    small_disk.remount(read_only=True)
    with small_disk.grow("small rows", "resume") as worker:
        heard = worker.hear()
        assert heard["error"] == "StoreError", heard
        assert "Read-only file system" in heard["text"]
        assert "nothing was run" in heard["text"]
    small_disk.remount(read_only=False)
    with small_disk.grow("small rows", "resume") as worker:
        small_disk.check_result("small rows", worker.result())


# -- damage -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sound(server, tmp_path):
    """A store with a completed run, a run that was killed after all its steps, and the oracle of both."""
    store = tmp_path / "sound"
    assert server.do("predict", store=str(store)) == predicted()
    return store


def check_damage(outcomes):
    """Right, or an error of the tree: nothing else may come out."""
    bad = [(trial, found) for trial, found in outcomes if found != "right" and not (found.get("durable"))]
    assert bad == [], f"{len(bad)} of {len(outcomes)}: {bad[0]}"


def damaged(server, store, tmp_path, trials):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    some = [trials[n : n + 40] for n in range(0, len(trials), 40)]
    return [found for part in some for found in server.do("damage", store=str(store), scratch=str(scratch), trials=part)]


def some_bits(file, name, count, spans=None):
    """Trials: bits of a file, chosen in these spans of bytes where it isn't empty."""
    data = file.read_bytes()
    places = [place for span in spans or [range(len(data))] for place in span if data[place]]
    chance = random.Random(SEED)
    return [{"file": name, "bit": chance.choice(places) * 8 + chance.randrange(8)} for _ in range(count)]


def pages(database, *, of_rows):
    """The database's pages that hold the journal's rows and their index, or the others: SQLite's and diskcache's own."""
    with closing(sqlite3.connect(database)) as connection:
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        roots = connection.execute("SELECT rootpage FROM sqlite_master WHERE tbl_name = 'Settings'").fetchall()
    own = {1, *(root for (root,) in roots)}
    return [range((n - 1) * size, n * size) for n in range(1, database.stat().st_size // size + 1) if (n in own) != of_rows]


@pytest.mark.parametrize(
    "of_rows",
    [
        True,
        False,
    ],
    ids=["rows", "settings"],
)
def test_a_bit_flipped_in_the_database_is_an_error_or_a_miss(server, sound, tmp_path, of_rows):
    database = sound / "journal" / "cache.db"
    check_damage(
        damaged(server, sound, tmp_path, some_bits(database, "journal/cache.db", FLIPS, pages(database, of_rows=of_rows)))
    )


@pytest.mark.parametrize("part", ["value", "store.json", "key"])
def test_a_bit_flipped_in_another_file_is_an_error_or_a_miss(server, sound, tmp_path, key_file, part):
    file = {"value": next((sound / "values").iterdir()), "store.json": sound / "store.json", "key": key_file}[part]
    name = str(file) if part == "key" else str(file.relative_to(sound))
    outcomes = damaged(
        server,
        sound,
        tmp_path,
        [*some_bits(file, name, FLIPS // 4), {"file": name, "cut": 5}, {"file": name, "cut": 0}, {"file": name, "gone": True}],
    )
    check_damage(outcomes)


def test_a_bit_flipped_in_a_cells_entry_is_a_miss(server, tmp_path):
    """The cell runs again, in a real IPython, and its entry is whole again."""
    outcomes, ran = server.do("damage_entry", folder=str(tmp_path), seed=SEED, trials=20)
    assert outcomes == 20 * [{"error": None, "right": True}]
    assert ran > 15


def test_a_truncated_database_is_an_error_or_a_miss(server, sound, tmp_path):
    database = sound / "journal" / "cache.db"
    size = database.stat().st_size
    cuts = [0, 1, 99, 100, 4096, 4097, *range(8192, size, 4096), size - 1]
    outcomes = damaged(server, sound, tmp_path, [{"file": "journal/cache.db", "cut": cut} for cut in cuts])
    check_damage(outcomes)


# -- many at once -------------------------------------------------------------------------------------------------------


def test_two_processes_work_in_a_store_while_a_third_opens_it_as_a_forgetful_cache(server, store, oracle):
    """Nothing is evicted: each of them finds the others' runs complete.

    With a rollback journal: a program that doesn't take turns may corrupt a database in WAL mode where SQLite has its race.
    """
    without_wal = {"without_wal": True}
    server.do("predict", store=store, **without_wal)
    groups = [[f"{side}-{n}" for n in range(12)] for side in ("left", "right")]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(server.start("many_journeys", store=store, oracle=str(oracle), names=names, **without_wal))
            for names in groups
        ]
        meddler = stack.enter_context(server.start("meddle", journal=str(store + "/journal")))
        assert meddler.said() == "meddling"
        for worker in workers:
            assert worker.said() == "open"
            worker.tell("go")
        results = [worker.result() for worker in workers]
        meddler.tell("stop")
        assert meddler.result() > 1
    found = dict(zip([name for names in groups for name in names], [v for vs in results for v in vs], strict=True))
    acknowledged = {name: value for _, what, name, value in read_oracle(oracle) if what == "ack"}
    assert acknowledged == {
        f"{name}-{step}": value for name, values in found.items() for step, value in zip(("one", "two"), values, strict=True)
    }
    assert len([line for line in read_oracle(oracle) if line[1] == "begin"]) == 2 * len(found)
    for names, values in zip(groups, results, strict=True):
        with server.start("many_journeys", store=store, oracle=str(oracle), names=names, **without_wal) as again:
            again.said()
            again.tell("go")
            assert again.result() == values
    with closing(sqlite3.connect(f"{store}/journal/cache.db")) as sql:
        assert sql.execute("PRAGMA journal_mode").fetchone() == ("delete",), "not WAL, which the file would remember"


# -- whose turn it is to write ------------------------------------------------------------------------------------------


@pytest.fixture
def meeting(tmp_path):
    file = tmp_path / "meeting"
    file.write_bytes(bytes(4096))
    return str(file)


@pytest.fixture(params=[False, True], ids=["WAL", "rollback journal"])
def journal(server, store, request):
    """What jobs that use the journal by itself are given."""
    (Path(store)).mkdir()
    given = {"store": store, "without_wal": request.param}
    server.do("commit", **given, key="first")
    return given


def keys_of(journal):
    """The keys in the journal, which is sound."""
    looked_at = DiskJournal(Path(journal["store"], "journal"), Path(journal["store"], "values"), wal=not journal["without_wal"])
    try:
        assert looked_at.problems() == []
        return {key for key, _ in looked_at.sizes()}
    finally:
        looked_at.close()


def test_processes_that_open_write_checkpoint_and_close_at_the_same_moment_leave_the_journal_sound(server, journal, meeting):
    """Which is when an SQLite with the race corrupts a database in WAL mode, were it not for the turns."""
    others = 3
    times = OPENINGS if not journal["without_wal"] else min(OPENINGS, 20)
    with ExitStack() as stack:
        workers = [
            stack.enter_context(server.start("open_write_close", **journal, meeting=meeting, me=me, others=others, times=times))
            for me in range(others)
        ]
        assert [worker.result(30 + times) for worker in workers] == [[]] * others
    assert keys_of(journal) >= {f"{me}/{times - 1:06}" for me in range(others)}


@pytest.mark.parametrize("during", ["nothing", "write", "checkpoint"])
def test_a_process_that_is_killed_during_its_turn_keeps_nobody_waiting(server, journal, during):
    """What it had not committed is not there, and the journal is sound."""
    for n in range(3):
        with server.start("hold_the_turn", **journal, during=during) as holder:
            assert holder.said() == "holding"
            with server.start("commit", **journal, key=f"next/{n}") as waiting:
                assert holder.kill()
                assert waiting.result() == ["applied"]
        assert keys_of(journal) == {"first", *(f"next/{k}" for k in range(n + 1))}


def test_a_process_that_was_stopped_during_its_turn_is_named(server, journal):
    """By those whose commits waited for it in vain; when it goes on, so do they."""
    with server.start("hold_the_turn", **journal, during="write") as holder:
        assert holder.said() == "holding"
        holder.stop()
        with server.start("commit", **journal, key="vain", patience_s=0.3) as waiting:
            heard = waiting.hear()
        assert heard["error"] == "StoreError"
        assert f"process {holder.pid} (stopped) holds its lock" in heard["text"]
        assert f"kill -CONT {holder.pid}" in heard["text"]
        with server.start("commit", **journal, key="patient") as waiting:
            holder.signal(signal.SIGCONT)
            holder.tell("let go")
            assert waiting.result() == ["applied"]
    assert keys_of(journal) == {"first", "patient"}


def test_a_process_that_was_stopped_while_it_waited_for_its_turn_keeps_nobody_waiting(server, journal):
    with server.start("hold_the_turn", **journal, during="nothing") as holder:
        assert holder.said() == "holding"
        with server.start("commit", **journal, key="stopped") as waiting:
            until(lambda: _is_waited_for(journal), "somebody to wait for the turn")
            waiting.stop()
            holder.tell("let go")
            assert holder.result() is None
            assert server.do("commit", **journal, key="another") == ["applied"]
            waiting.signal(signal.SIGCONT)
            assert waiting.result() == ["applied"]
    assert keys_of(journal) == {"first", "stopped", "another"}


def _is_waited_for(journal):
    return is_locked_at_all(Path(journal["store"], "journal", "cache.db.waiting"))


def is_locked_at_all(path):
    file = LockFile(path)
    try:
        return not file.try_lock()
    finally:
        file.close()


@pytest.mark.parametrize("rows", [1, 60], ids=["small commits", "large ones"])
def test_of_four_processes_that_write_flat_out_none_starves(server, journal, meeting, rows):
    """Between two commits of one, the others make few, and no commit waits longer than they take."""
    others, times = 4, 150 if rows == 1 else 40
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                server.start("commit_flat_out", **journal, meeting=meeting, me=me, others=others, times=times, rows=rows)
            )
            for me in range(others)
        ]
        told = [worker.result(120) for worker in workers]
    order = sorted((rowid, me) for me in range(others) for rowid in told[me]["rowids"])
    assert len(order) == others * times
    for me in range(others):
        mine = [place for place, (_, whose) in enumerate(order) if whose == me]
        assert max(after - before for before, after in pairwise(mine)) < times
    keys_of(journal)
