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
            process.communicate()
    check(lines_of(ledger), "shared" if kind == "shared" else None, 8 if kind == "shared" else 1)


def check(lines, pool, most):
    started, first, ended = {}, {}, set()
    at_work, busiest = defaultdict(set), 0
    dead = {line["pid"] for line in lines if line["what"] == "killed"}
    for number, line in enumerate(lines):
        match line["what"]:
            case "started":
                started[line["name"]] = line
            case "begins":
                holders = at_work[pool or line["key"]]
                assert all(name != line["name"] for name, _ in holders)  # nobody executes a run twice at once
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
