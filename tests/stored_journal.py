"""Writes a store that all later releases must keep replaying: `python tests/stored_journal.py` makes `journals/VERSION.zip`.

A real kernel executes CELLS, is interrupted in one of them and killed in the end. The archive holds the store, the signing key,
and `cells.json`: the cells as they were, and what they gave. An archive of a release is never written again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from kernels import kernel

import durable_nb

JOURNALS = Path(__file__).with_name("journals")

CELLS = {
    "setup": """
def note(what):
    with open("executed.log", "a") as log:
        print(what, file=log)


def paid(n):
    note(f"paid {n}")
    return {"n": n, "text": f"answer {n}"}


def large(n):
    note("large")
    return bytes(range(256)) * n


def broken(order):
    note("broken")
    raise ValueError(f"order {order} is sold out")


@durable.workflow
async def order(n):
    first = await durable.run("paid", paid, n)
    try:
        await durable.run("broken", durable.step(broken, retries=0), n)
    except ValueError as error:
        reason = str(error)
    many = await durable.map("each", paid, [n + 1, n + 2])
    blob = await durable.run("large", large, 1 << 12)
    return first, reason, many, len(blob)


@durable.workflow
async def failing(n):
    await durable.run("paid", paid, n)
    await durable.run("broken", durable.step(broken, retries=0), n)


@durable.workflow
async def sleeping(n):
    before = await order.fn(n)
    await durable.sleep("night", "20s")
    return before, await durable.run("after", paid, n + 3)
""",
    "completed": """%%durable completed
first = await durable.run("paid", paid, 1)
size = len(await durable.run("large", large, 1 << 12))
many = await durable.map("each", paid, [2, 3])
print(first["text"])
""",
    "interrupted": """%%durable interrupted
before = await durable.run("paid", paid, 10)
await durable.sleep("night", "20s")
after = await durable.run("after", paid, 11)
""",
    "runs": """
ended = await order.start(100, id="order-1")
try:
    await failing.start(200, id="failing-1")
except ValueError as error:
    reason = str(error)
run = sleeping.start(300, id="sleeping-1")
""",
}
VALUES = "first, size, many, ended, reason"
"""What the cells have made."""


def write(target: Path) -> None:
    """Make the archive. Nothing is awaited by the clock: the kernel is stopped when the sleeps are recorded."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "executed.log").touch()
        environment = {"DURABLE_NB_KEY_FILE": str(folder / "signing.key")}
        with kernel(folder, env=environment) as k:
            for cell in ("setup", "completed"):
                shown = k.run(CELLS[cell])
                assert shown.status == "ok", shown.traceback
            waiting = k.send(CELLS["interrupted"])
            _until(lambda: "sleeping" in [step["status"] for step in _ask(folder, "show", "interrupted").get("steps", ())])
            k.interrupt()
            assert k.wait(waiting).status == "error"
            shown = k.run(CELLS["runs"])
            assert shown.status == "ok", shown.traceback
            _until(lambda: k.value("str(run.status)") == "sleeping")
            values = k.value(VALUES)
            k.load = False
            k.kill()
        assert _ask(folder, "doctor")["findings"] == []  # and the last to close the journal leaves it in one file
        shutil.rmtree(folder / ".durable_nb" / "locks")
        (folder / ".durable_nb" / "locks").mkdir(mode=0o700)
        about = {"python": f"{sys.version_info.major}.{sys.version_info.minor}", "cells": CELLS, "values": values}
        (folder / "cells.json").write_text(json.dumps(about, indent=1))
        target.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted([folder / "cells.json", folder / "signing.key", *(folder / ".durable_nb").rglob("*")]):
                archive.write(path, path.relative_to(folder))


def _ask(folder: Path, *command: str) -> dict:
    """What the command line tells as JSON; nothing where it fails, as where there is no such run yet."""
    program = "import sys; from durable_nb._cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *command, "--json", "--store", str(folder / ".durable_nb")],
        capture_output=True,
        text=True,
        env={**os.environ, "DURABLE_NB_KEY_FILE": str(folder / "signing.key")},
        check=False,
    )
    return json.loads(done.stdout) if done.returncode == 0 else {}


def _until(holds) -> None:
    deadline = time.monotonic() + 15  # the sleeps are of 20 s
    while not holds():
        assert time.monotonic() < deadline, "the sleep was not recorded in time"
        time.sleep(0.05)


if __name__ == "__main__":
    path = JOURNALS / f"{durable_nb.__version__}.zip"
    write(path)
    print(f"{path}: {path.stat().st_size} bytes")
