"""One of several processes whose runs are under one limit: `limit_worker.py STORE LEDGER KIND COUNT TOTAL`.

Starts COUNT runs, and goes on with whatever nobody executes until TOTAL are completed. A line of the ledger tells when a run is
started, when its code begins (again, where it was interrupted) and when it ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import durable_nb as durable

STORE, LEDGER, KIND = sys.argv[1:4]
COUNT, TOTAL = map(int, sys.argv[4:6])
KEYS = 10

LIMIT = durable.limit("lane", concurrency=8 if KIND == "shared" else 1)
by_key: Callable[[str, str], str] | None = None if KIND == "shared" else lambda key, name: key


def note(what: str, key: str, name: str, **more: Any) -> None:
    line = json.dumps({"what": what, "key": key, "name": name, "pid": os.getpid(), **more})
    file = os.open(LEDGER, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{line}\n".encode())
    os.close(file)


async def work(seconds: float) -> None:
    await asyncio.sleep(seconds)


@durable.workflow(limit=LIMIT, key=by_key)
async def job(key: str, name: str) -> str:
    note("begins", key, name)
    await durable.run("work", work, durable.random() * 0.01)
    await durable.sleep("rest", 0.005)
    note("ends", key, name)
    return name


async def main() -> None:
    durable.open(STORE)
    note("opened", "", "")
    while not Path(f"{LEDGER}.go").exists():  # noqa: ASYNC110, ASYNC240  nobody tells
        await asyncio.sleep(0.01)
    runs = []
    for n in range(COUNT):
        key, name = f"key {n % KEYS}", f"{os.getpid()}-{n}"
        before = time.monotonic()
        runs.append(job.start(key, name, id=name))
        note("started", key, name, before=before, after=time.monotonic())
        if n % 10 == 9:
            await asyncio.sleep(0)
    await asyncio.gather(*runs)
    while len(durable.runs(workflow="job", status="completed", limit=TOTAL)) < TOTAL:
        durable.resume()
        await asyncio.sleep(0.2)


if __name__ == "__main__":
    asyncio.run(main())
