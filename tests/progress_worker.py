"""A process with one long step, to be killed: `progress_worker.py STORE LOG [finish]`."""

import asyncio
import sys
import time
from pathlib import Path

import durable_nb as durable

LOG = Path(sys.argv[2])
FINISH = len(sys.argv) > 3


def note(line):
    with LOG.open("a") as log:
        log.write(f"{line}\n")


def train():
    before = durable.last_progress()
    begun = before.state["n"] if before is not None else 0
    if FINISH:
        note(f"from={begun}")
        return
    for n in range(begun, 10_000):
        durable.progress(n, 10_000, note="training", n=n)
        note(f"{n}:{time.monotonic()}")
        time.sleep(0.1)


@durable.workflow
async def job():
    await durable.run("train", train)


async def main():
    durable.open(sys.argv[1])
    await job.start(id="1")


asyncio.run(main())
