"""One process that executes a generated program as a run on disk, to be killed: `program_worker.py STORE SEED LEDGER`.

What bodies do is a line each in the ledger. Exits with 0 when the run is over; with 1 and a line when a request was given
somebody else's answer, or when the run ended as it can't have ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from programs import Life, World, generate

import durable_nb as durable


class Outside(World):
    """A world that other processes see."""

    def __init__(self, seed: int, ledger: Path) -> None:
        super().__init__(seed)
        self._ledger = ledger

    def do(self, name: str, arg: Any, life: Life) -> tuple[str, Any, int]:
        line = f"{json.dumps([name, arg])}\n"
        file = os.open(self._ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, line.encode())
        os.close(file)
        return name, arg, os.getpid()


class RealLife(Life):
    """One whose sleeps are short."""

    async def _sleep(self, name: str, seconds: float) -> None:
        await durable.sleep(name, min(seconds, 0.05))


async def main(store: str, seed: int, ledger: Path) -> None:
    program, life = generate(random.Random(seed)), RealLife(Outside(os.getpid(), ledger))

    @durable.workflow(name="order")
    async def order() -> None:
        await life.go(program)

    durable.open(store)
    try:
        await order.start(id="42")
    except (RuntimeError, ExceptionGroup, durable.RunCancelled):
        pass  # a step that always fails
    except durable.DurableError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if life.wrong:
        sys.exit(f"answers to somebody else's question: {life.wrong}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
