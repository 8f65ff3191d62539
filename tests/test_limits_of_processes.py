"""A limit that four processes share, two of which are killed: never more at once, none lost, in order for each key.

`make stress` has the full size.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from kernels import kernel
from workers import ForkServer, read_oracle
from workers import until as until_true

from durable_nb._locks import process_state

WORKER = Path(__file__).with_name("limit_worker.py")
RUNS = int(os.environ.get("DURABLE_NB_LIMITED_RUNS", "120"))
PATIENCE_S = 60 + RUNS / 2


def lines_of(ledger):
    return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []


def until(condition, processes, what):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        for process in processes:
            assert process.poll() in (None, 0, -signal.SIGKILL), process.stderr.read()
        time.sleep(0.005)


@pytest.mark.parametrize("kind", ["shared", "keyed"])
def test_through_a_limit_of_four_processes_of_which_two_are_killed(tmp_path, kind):
    ledger, each = tmp_path / "ledger", RUNS // 4
    command = [sys.executable, str(WORKER), str(tmp_path / "store"), str(ledger), kind, str(each), str(4 * each)]
    environment = {**os.environ, "DURABLE_NB_KEY_FILE": str(tmp_path / "signing.key")}
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    killed = processes[:2]
    try:
        until(lambda: len(lines_of(ledger)) == 4, processes, "all open the store")
        Path(f"{ledger}.go").touch()

        def ends():
            return sum(line["what"] == "ends" for line in lines_of(ledger))

        for n, process in enumerate(killed, 1):
            until(lambda n=n: ends() >= n * each // 2, processes, "runs end")
            until(lambda: sum(line["what"] == "started" for line in lines_of(ledger)) == 4 * each, processes, "all are started")
            os.kill(process.pid, signal.SIGSTOP)  # what it holds isn't free
            until(lambda process=process: process_state(process.pid) == "stopped", (), "it is stopped")
            before = ends()
            with ledger.open("a") as file:  # before its shares are free
                file.write(json.dumps({"what": "killed", "pid": process.pid}) + "\n")
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert ends() >= before
        until(lambda: all(process.poll() == 0 for process in processes[2:]), processes[2:], "the others execute all runs")
    finally:
        for process in processes:
            process.kill()
        told = [process.communicate()[1] for process in processes]
    check(lines_of(ledger), "shared" if kind == "shared" else None, 8 if kind == "shared" else 1, told)


def check(lines, pool, most, told):
    started, first, ended = {}, {}, set()
    at_work, busiest = defaultdict(set), 0
    dead = {line["pid"] for line in lines if line["what"] == "killed"}
    for number, line in enumerate(lines):
        match line["what"]:
            case "started":
                started[line["name"]] = line
            case "begins":
                holders = at_work[pool or line["key"]]
                twice = [one for one in lines if one.get("name") == line["name"]]
                assert all(name != line["name"] for name, _ in holders), f"executed twice at once: {twice}, {told}"
                holders.add((line["name"], line["pid"]))
                busiest = max(busiest, len(holders))
                assert len(holders) <= most, f"{len(holders)} at once in line {number}"
                first.setdefault(line["name"], number)
            case "ends":
                at_work[pool or line["key"]].discard((line["name"], line["pid"]))
                ended.add(line["name"])
            case "killed":
                for holders in at_work.values():
                    holders -= {holder for holder in holders if holder[1] == line["pid"]}
    assert len(started) == len(ended) == RUNS // 4 * 4
    assert busiest == most
    by_key = defaultdict(list)
    for name, line in started.items():
        by_key[line["key"]].append((line["before"], line["after"], line["pid"] in dead, name))
    for runs in by_key.values():
        for _, after, was_killed, name in runs:
            for before, _, is_killed, later in runs:
                same = name.split("-")[0] == later.split("-")[0]
                if after < before and not (was_killed or is_killed) and (same or most == 1):
                    assert first[name] < first[later], f"{later} began before {name}, which was started earlier"


# -- one at a time --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = ForkServer(tmp_path_factory.mktemp("key") / "signing.key")
    yield made
    made.close()


@pytest.fixture
def oracle(tmp_path):
    return tmp_path / "oracle"


def begins(oracle, name):
    return any(line[1:3] == ("begin", name) for line in read_oracle(oracle))


def wait_for(condition, what):
    """Returns after how many seconds it holds."""
    began = time.monotonic()
    until_true(condition, what)
    return time.monotonic() - began


def bodies_of(oracle, worker):
    return sum(line[0] == worker.pid for line in read_oracle(oracle))


@pytest.fixture
def run_of(server, tmp_path, oracle):
    """Starts a run in a process of its own; it ends when the file of its name is there."""

    def start(name, **more):
        args = {"store": str(tmp_path / "store"), "oracle": str(oracle), "gate": str(tmp_path / f"{name} ends")}
        return server.start("limited_run", name=name, **args, **more)

    return start


def test_what_a_stopped_process_holds_is_not_free_and_what_a_dead_one_held_is_at_once(run_of, oracle, tmp_path):
    with run_of("first") as first:
        wait_for(lambda: begins(oracle, "first"), "the first one begins")
        with run_of("second") as second:
            assert second.said() == "pending"
            first.stop()
            watched_until = time.monotonic() + 1
            while time.monotonic() < watched_until:
                assert not begins(oracle, "second")
                time.sleep(0.02)
            first.kill()
            assert wait_for(lambda: begins(oracle, "second"), "the second one begins") < 2
            (tmp_path / "second ends").touch()
            assert second.result() == "second"


def test_a_stopped_process_that_is_next_keeps_nobody_waiting(run_of, oracle, tmp_path):
    with run_of("first") as first:
        assert first.said() in ("pending", "running")
        wait_for(lambda: begins(oracle, "first"), "the first one begins")
        with run_of("second") as second:
            assert second.said() == "pending"
            with run_of("third") as third:
                assert third.said() == "pending"
                second.stop()
                (tmp_path / "first ends").touch()
                assert first.result() == "first"
                wait_for(lambda: begins(oracle, "third"), "the third one begins")
                assert not begins(oracle, "second")
                second.signal(signal.SIGCONT)
                (tmp_path / "third ends").touch()
                (tmp_path / "second ends").touch()
                assert (second.result(), third.result()) == ("second", "third")


def test_a_run_that_is_taken_over_from_a_stopped_process_brings_its_share_along(run_of, oracle, tmp_path):
    with run_of("first") as first:
        wait_for(lambda: begins(oracle, "first"), "the first one begins")
        first.stop()
        with run_of("heir", resume="first", take_over=True) as heir:
            (tmp_path / "first ends").touch()
            assert heir.said() in ("pending", "running")
            assert heir.result() == "first"


# -- steps ----------------------------------------------------------------------------------------------------------------


def test_steps_of_several_processes_share_a_limit(server, tmp_path, oracle):
    """One of them is stopped, and killed."""
    args = {"store": str(tmp_path / "store"), "oracle": str(oracle), "count": 60}
    with (
        server.start("limited_steps", **args) as one,
        server.start("limited_steps", **args) as two,
        server.start("limited_steps", **args) as three,
    ):
        for worker in (one, two, three):
            worker.said()
        for worker in (one, two, three):
            worker.tell("go")
        wait_for(lambda: all(bodies_of(oracle, worker) > 5 for worker in (one, two, three)), "all are at work")
        two.stop()
        with oracle.open("a") as file:  # before its shares are free
            file.write(f"{two.pid}\tkilled\t\t\n")
        two.kill()
        assert (one.result(), three.result()) == (60, 60)
    at_work, most = set(), 0
    for pid, what, name, _ in read_oracle(oracle):
        match what:
            case "begin":
                at_work.add((pid, name))
                most = max(most, len(at_work))
            case "end":
                at_work.discard((pid, name))
            case "killed":
                at_work = {holder for holder in at_work if holder[0] != pid}
    assert most == 3


def test_a_rate_is_kept_by_several_processes(server, tmp_path, oracle):
    args = {"store": str(tmp_path / "store"), "oracle": str(oracle), "count": 10}
    with server.start("paced_steps", **args) as one, server.start("paced_steps", **args) as two:
        for worker in (one, two):
            worker.said()
        began = time.monotonic()
        for worker in (one, two):
            worker.tell("go")
        assert (one.result(60), two.result(60)) == (10, 10)
        took = time.monotonic() - began
    assert took >= 1.9  # twenty of them, a tenth of a second apart


# -- kernels --------------------------------------------------------------------------------------------------------------

CELL = """\
%%durable NAME
def work(name):
    import pathlib, time
    pathlib.Path(f"{name} began").write_text("x\\n")
    while not pathlib.Path(f"{name} ends").exists():
        time.sleep(0.01)
    return name

done = await durable.run("work", durable.step(work, limit=durable.limit("gpu", concurrency=1)), "NAME")
"""


@pytest.mark.kernel
def test_a_cell_that_waits_for_another_kernels_share_says_so_and_has_it_when_that_kernel_dies(tmp_path):
    with kernel(tmp_path) as first, kernel(tmp_path) as second:
        first.send(CELL.replace("NAME", "first"))
        first.wait_until(tmp_path / "first began")
        asked = second.send(CELL.replace("NAME", "second"))
        second.wait_for_text(asked, "waits for limit 'gpu'")
        assert not (tmp_path / "second began").exists()
        os.kill(first.pid, signal.SIGKILL)
        assert wait_for(lambda: (tmp_path / "second began").exists(), "the second one begins") < 5
        (tmp_path / "second ends").touch()
        assert second.wait(asked).status == "ok"
        assert second.value("done") == "second"
        told = second.run("more = durable.limit('gpu', concurrency=2)")
        assert "the limit 'gpu' of this store was 1 at once, and is 2 at once from now on" in told.stderr
        assert "concurrency=0; write how many" in second.run("durable.limit('gpu', concurrency=0)").error
