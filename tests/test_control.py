"""The command line's control of runs, through the installed program, in real processes: without a worker, and beside one."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from workers import until

from durable_nb._cli import main

PROGRAM = Path(sys.executable).with_name("durable-nb")
SHOP = """
from pathlib import Path
import durable_nb as durable

def note(what):
    with Path(__file__).with_name("done").open("a") as file:
        file.write(what + "\\n")

def breaks():
    if not Path(__file__).with_name("mended").exists():
        raise ValueError("broken")

@durable.workflow
async def order(item):
    await durable.run("charge", note, f"charge {item}")
    decision = await durable.approve("publish", "Publish?")
    await durable.run("end", note, f"{decision.approved} {decision.comment}")

@durable.workflow(limit=durable.limit("one at a time", concurrency=1))
async def fails():
    await durable.run("first", note, "first")
    await durable.run("breaks", breaks)
"""


@pytest.fixture
def shop(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    monkeypatch.setenv("DURABLE_NB_DIR", str(tmp_path / "store"))
    (tmp_path / "shop.py").write_text(SHOP)
    return tmp_path


def command(shop, *words):
    return subprocess.run([PROGRAM, *words], cwd=shop, capture_output=True, text=True, timeout=60, check=False)


def done(shop, *words):
    found = command(shop, *words, "--json")
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def refused(shop, *words, status=1):
    found = command(shop, *words)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (status, "", 1), found
    return found.stderr


def program(shop, code):
    main = f"async def main():\n  durable.open(os.environ['DURABLE_NB_DIR'])\n  {code}\nasyncio.run(main())"
    subprocess.run(
        [sys.executable, "-c", f"import asyncio, os, shop, durable_nb as durable\n{main}"], cwd=shop, check=True, timeout=60
    )


@contextmanager
def worker(shop):
    process = subprocess.Popen([PROGRAM, "worker", "shop"], cwd=shop, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def lines(shop):
    return (shop / "done").read_text().splitlines() if (shop / "done").exists() else []


def status(shop, run_id):
    with contextlib.redirect_stdout(io.StringIO()) as told:  # asked again and again: in this process
        assert main(["show", run_id, "--json"]) == 0
    return json.loads(told.getvalue())["run"]["status"]


def test_without_a_worker_what_is_asked_for_is_recorded_and_says_who_will_do_it(shop):
    program(shop, "try: await shop.fails.start(id='f')\n  except ValueError: os._exit(0)")
    assert "durable-nb worker shop" in command(shop, "resume", "f").stdout
    assert status(shop, "f") == "interrupted"
    (shop / "mended").touch()
    fork = done(shop, "fork", "f", "breaks")["id"]
    assert done(shop, "limit")["limits"] == [{"name": "one at a time", "concurrency": 1, "rate": None, "held": 0, "waiting": 0}]
    with worker(shop):
        until(lambda: (status(shop, "f"), status(shop, fork)) == ("completed", "completed"), "both to end")
    assert lines(shop) == ["first"]
    assert "durable-nb worker shop" in command(shop, "restart", "f").stdout
    with worker(shop):
        until(lambda: lines(shop) == ["first", "first"] and status(shop, "f") == "completed", "it to run anew")


def test_beside_a_worker_a_run_is_approved_notified_and_cancelled(shop):
    program(shop, "shop.order.start('tea', id='a'); shop.order.start('cups', id='b'); os._exit(0)")
    with worker(shop) as process:
        until(lambda: (status(shop, "a"), status(shop, "b")) == ("waiting", "waiting"), "both questions")
        assert done(shop, "approve", "a", "publish", "--comment", "well done") == {
            "id": "a",
            "step": "publish",
            "approved": True,
        }
        until(lambda: "True well done" in lines(shop), "the answer")
        assert "that stands" in refused(shop, "approve", "a", "publish", "--reject") or status(shop, "a") == "completed"
        assert f"in process {process.pid}" in command(shop, "cancel", "b", "--reason", "sold out").stdout
        until(lambda: status(shop, "b") == "cancelled", "the cancellation")
        assert done(shop, "notify", "news", '{"a": [1]}') == {"event_id": "news", "run_ids": [], "buffered": True}
    assert lines(shop).count("charge tea") == 1


def test_what_makes_no_sense_is_told_in_one_line_and_does_nothing(shop):
    assert "no store in" in refused(shop, "cancel", "a")
    program(shop, "shop.order.start('tea', id='a'); os._exit(0)")
    for words in (["resume", "b"], ["fork", "b", "x"], ["approve", "b", "x"], ["notify", "e", "--run", "b"]):
        assert "no run 'b'" in refused(shop, *words)
    assert "'nothing'" in refused(shop, "fork", "a", "nothing")
    assert "is not JSON" in refused(shop, "notify", "e", "{", status=2)
    assert "is not JSON" in refused(shop, "notify", "e", "[" * 100_000, status=2)
    assert command(shop, "cancel", "a").stdout == "a · is cancelled\n"
    assert "cancelled already" in refused(shop, "cancel", "a")
