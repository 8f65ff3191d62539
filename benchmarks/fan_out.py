"""What a fan-out over a model server costs: `durable.map` beside httpx alone, and 10,000 rows with failures.

Run with `make bench` or `python benchmarks/http.py`; DURABLE_NB_BENCH_ROWS=500 DURABLE_NB_BENCH_FAN_OUT=1000 is a quick run.
The server is a process of its own that takes 20 ms for an answer. Cells run in a real IPython shell in this process.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from bench import Notebook, Times, machine, size

ROWS = size("ROWS", 2000)
ROUNDS = size("ROUNDS", 5)
FAN_OUT = size("FAN_OUT", 10_000)
CONCURRENCY = 8
LATENCY_S = 0.02
RETRIES = 3

SERVER = "from durable_nb.testing import ModelServer; ModelServer(latency_s={}, failing={}).serve_forever()"
NOTEBOOK = """
import durable_nb as durable
import httpx

client = httpx.AsyncClient(timeout=30)


async def label(row):
    asked = {"model": "small", "messages": [{"role": "user", "content": f"Which label has row {row['n']}?"}]}
    answer = (await client.post(URL, json=asked)).raise_for_status()
    return answer.json()["choices"][0]["message"]["content"]
"""
MAP = "%%durable {} --quiet\nlabels = await durable.map('label', label, rows, concurrency={})"


@contextmanager
def server(failing: float = 0.0) -> Iterator[str]:
    """Its address."""
    code = SERVER.format(LATENCY_S, failing)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def memory_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def plain(notebook: Notebook) -> list[str]:
    """As one writes it without the package: so many at a time, three attempts more."""
    label, rows = notebook.names["label"], notebook.names["rows"]
    places = asyncio.Semaphore(CONCURRENCY)

    async def one(row: dict) -> str:
        for left in reversed(range(RETRIES + 1)):
            async with places:
                try:
                    return await label(row)
                except httpx.HTTPError:
                    if not left:
                        raise
            await asyncio.sleep(0.5)
        raise AssertionError("the last attempt returns or raises")

    return await asyncio.gather(*map(one, rows))


async def throughput(notebook: Notebook) -> None:
    names = notebook.names
    with server() as url:
        names["URL"] = f"{url}/v1/chat/completions"
        names["rows"] = [{"n": n} for n in range(ROWS)]
        await notebook.cell(NOTEBOOK)
        await plain(notebook)  # opens the connections
        ours, theirs, ratios = Times(), Times(), []
        for number in range(ROUNDS):
            with theirs.taken():
                expected = await plain(notebook)
            with ours.taken():
                await notebook.cell(MAP.format(f"round_{number}", CONCURRENCY))
            assert names["labels"] == expected
            ratios.append(theirs.wall[-1] / ours.wall[-1])
        again = Times()
        with again.taken():
            await notebook.cell(MAP.format(f"round_{number}", CONCURRENCY).replace("labels", "again"))
        await names["client"].aclose()
    print(f"\n{ROWS:,} rows, {CONCURRENCY} at a time, a server that takes {LATENCY_S * 1000:.0f} ms, medians of {ROUNDS}")
    print(f"  httpx alone {ROWS / theirs.ms * 1000:.0f} a second, durable.map {ROWS / ours.ms * 1000:.0f}: "
          f"{statistics.median(ratios):.2f} of it (target 0.9; {min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    print(f"  CPU of this process: {theirs.cpu_ms / ROWS:.2f} and {ours.cpu_ms / ROWS:.2f} ms a row; restored: "
          f"{again.ms / ROWS:.2f} ms a row")  # fmt: skip


async def fan_out(notebook: Notebook) -> None:
    names = notebook.names
    with server(failing=0.05) as url:
        names["URL"] = f"{url}/v1/chat/completions"
        names["rows"] = [{"n": n} for n in range(FAN_OUT)]
        await notebook.cell(NOTEBOOK)
        before, began = memory_mb(), time.perf_counter()
        halfway = asyncio.create_task(at_half(url))
        await notebook.cell(MAP.format("fan_out", 32))
        took, grown = time.perf_counter() - began, memory_mb() - before
        first_half, asked = await halfway - before, await requests_at(url)
        await names["client"].aclose()
    assert [label.split()[-1] for label in names["labels"]] == [f"{n}?" for n in range(FAN_OUT)]
    print(f"\n{FAN_OUT:,} rows, 32 at a time, one in twenty fails at first (429, 500, a cut connection)")
    print(f"  {took:.0f} s; every row answered, {asked - FAN_OUT:,} of {asked:,} requests were second attempts")
    print(f"  memory: {first_half:+.0f} MB for the first half, {grown - first_half:+.0f} MB for the second")


async def at_half(url: str) -> float:
    """Memory when half of the requests have come."""
    while await requests_at(url) < FAN_OUT / 2:  # noqa: ASYNC110  another process's count
        await asyncio.sleep(0.2)
    return memory_mb()


async def requests_at(url: str) -> int:
    async with httpx.AsyncClient() as client:
        return (await client.get(f"{url}/requests")).json()["count"]


async def measure() -> None:
    notebook = Notebook()
    await throughput(notebook)
    await fan_out(notebook)


def main() -> None:
    print(machine())
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            asyncio.run(measure())
        finally:
            os.chdir(home)


if __name__ == "__main__":
    main()
