"""`durable-nb worker`: real processes that execute a module's runs while no notebook is open."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from workers import until

SHOP = """
import asyncio, os, time
from pathlib import Path
import durable_nb as durable

DONE = Path(__file__).with_name("done")
GATE = Path(__file__).with_name("gate")

def note(what):
    with DONE.open("a") as file:
        file.write(f"{os.getpid()} {what}\\n")

async def charge(n):
    note(f"charge {n}")

def pack(n):
    note(f"packs {n}")
    while not GATE.exists():
        time.sleep(0.01)
    note(f"packed {n}")

@durable.workflow
async def order(n):
    await durable.run("charge", charge, n)
    await durable.run("pack", pack, n)
    await durable.sleep("a moment", "0.2s")
    note(f"ends {n}")
    return n

@durable.workflow
async def other(n):
    note(f"other {n}")
"""


@pytest.fixture
def shop(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    monkeypatch.setenv("DURABLE_NB_DIR", str(tmp_path / "store"))
    (tmp_path / "shop.py").write_text(SHOP)
    return tmp_path


def program(shop, code):
    """Another process: a notebook, say, that is closed when this returns."""
    return subprocess.run(
        [sys.executable, "-c", f"import asyncio, os, durable_nb as durable\n{code}"],
        cwd=shop, check=True, capture_output=True, text=True, timeout=60,
    ).stdout  # fmt: skip


def started(shop, count):
    """Runs that nobody executes: the process that has started them is dead."""
    program(
        shop,
        "import shop\nasync def main():\n  durable.open(os.environ['DURABLE_NB_DIR'])\n"
        f"  for n in range({count}): shop.order.start(n, id=f'order-{{n}}')\n  os._exit(0)\n"
        "asyncio.run(main())",
    )


@contextmanager
def worker(shop, module="shop"):
    log = shop / f"log-{len(list(shop.glob('log-*')))}"
    with log.open("w") as file:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("durable-nb"), "worker", module], cwd=shop, stdout=file, stderr=file
        )
    process.log = log
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def done(shop, what=""):
    path = shop / "done"
    return [line for line in path.read_text().splitlines() if what in line] if path.exists() else []


def test_a_worker_finishes_what_a_dead_process_has_started_and_nothing_of_other_modules(shop):
    (shop / "gate").touch()
    program(
        shop,
        "@durable.workflow\nasync def order(n): ...\n"
        "async def main():\n  durable.open(os.environ['DURABLE_NB_DIR'])\n  order.start(7, id='not ours')\n  os._exit(0)\n"
        "asyncio.run(main())",
    )
    started(shop, 3)
    with worker(shop):
        until(lambda: len(done(shop, "ends")) == 3, "three orders to end")
        assert len(done(shop, "charge")) == 3
    assert "not ours" not in "".join(done(shop))
    assert (
        program(shop, "durable.open(os.environ['DURABLE_NB_DIR']); print(durable.get_run('not ours').status)")
        == "interrupted\n"
    )


def test_a_killed_worker_is_succeeded_at_once_and_several_share_the_runs(shop):
    started(shop, 60)
    with worker(shop) as first, worker(shop) as second:
        until(lambda: len(done(shop, "packs")) == 60, "all to be charged, and on record")
        assert {line.split()[0] for line in done(shop, "charge")} == {str(first.pid), str(second.pid)}
        first.kill()
        (shop / "gate").touch()
        until(lambda: len({line.split()[2] for line in done(shop, "ends")}) == 60, "all to end")
    assert len(done(shop, "charge")) == 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_a_worker_records_what_has_begun_and_leaves_the_rest_to_others(shop, number):
    started(shop, 1)
    with worker(shop) as first:
        until(lambda: done(shop, "packs"), "the body to begin")
        first.send_signal(number)
        until(lambda: "stops" in first.log.read_text(), "the worker to hear of it")
        (shop / "gate").touch()
        assert first.wait(30) == 0
    assert [line.split()[1] for line in done(shop)] == ["charge", "packs", "packed"]
    with worker(shop):
        until(lambda: done(shop, "ends"), "the rest")
    assert [line.split()[1] for line in done(shop)] == ["charge", "packs", "packed", "ends"]


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("nowhere", None, "can't be imported: ModuleNotFoundError"),
        ("broken.py", "import this is wrong", "can't be imported: SyntaxError"),
        ("empty", "x = 1", "has no workflow"),
    ],
)
def test_a_module_that_is_none_is_told_in_one_line(shop, module, source, says):
    if source is not None:
        (shop / f"{module.removesuffix('.py')}.py").write_text(source)
    told = subprocess.run(
        [Path(sys.executable).with_name("durable-nb"), "worker", module],
        cwd=shop, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert told.returncode == 1
    assert says in told.stderr
    assert told.stderr.count("\n") == 1
    assert not (shop / "store").exists()
