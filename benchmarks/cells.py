"""What cells cost: a small hit, and the restoring and comparing of a large array and a large frame.

Run with `make bench` or `python benchmarks/cells.py`; DURABLE_NB_BENCH_BYTES=100000000 is a quick run. Cells run in a real
IPython shell in this process; beside them stand hits of joblib.Memory, marimo's persistent_cache and diskcache, raw pickle
(protocol 5), raw xxh3_128 and joblib.hash. All take turns. The page cache is warm for everybody.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import pickle
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import xxhash
from bench import Notebook, Point, Times, machine, missing, size

from durable_nb._cellcache import inotify
from durable_nb._cellcache.mentions import mentions_of, places_of
from durable_nb._fingerprint import Fingerprinter

HITS = size("HITS", 200)
BYTES = size("BYTES", 1 << 30)
TURNS = size("TURNS", 5)

SMALL = "%%durable small --quiet\nx = {'a': 1, 'b': [1, 2, 3]}\ny = 'text'"
BIG = "%%durable big_{kind} --quiet\nbig = {kind}_of(BYTES)"

MARIMO = """
import marimo

app = marimo.App()


@app.cell
def _():
    import marimo

    @marimo.persistent_cache
    def answer(n):
        return {"a": n, "b": [1, 2, 3]}, "text"

    return (answer,)
"""


def answer(n: int) -> Any:
    return {"a": n, "b": [1, 2, 3]}, "text"


def array_of(count: int) -> Any:
    return np.random.default_rng(1).integers(0, 256, count, dtype=np.uint8).view(np.float64)


def frame_of(count: int) -> Any:
    """Ten columns of Arrow strings of 12 characters, each with an offset of 8 bytes."""
    rows = count // 200
    rng = np.random.default_rng(1)
    columns = {}
    for number in range(10):
        numbers = pa.array(rng.integers(10**11, 10**12, rows)).cast(pa.large_string())
        columns[f"c{number}"] = pd.array(numbers, dtype=pd.StringDtype("pyarrow", na_value=np.nan))
    return pd.DataFrame(columns)


# ---- peers, each ready to be asked for what it holds ----


def joblib_hit(folder: Path) -> Callable[[int], Any]:
    from joblib import Memory

    warnings.filterwarnings("ignore", module="joblib")
    return Memory(folder / "joblib", verbose=0).cache(answer)


def marimo_hit(folder: Path) -> Callable[[int], Any]:
    logging.getLogger("marimo").setLevel(logging.ERROR)
    (folder / "marimo_notebook.py").write_text(MARIMO)
    sys.path.insert(0, str(folder))
    _, defined = importlib.import_module("marimo_notebook").app.run()
    return defined["answer"]


def diskcache_hit(folder: Path) -> Callable[[int], Any]:
    import diskcache

    return diskcache.Cache(str(folder / "diskcache")).memoize()(answer)


PEERS = {"joblib.Memory": joblib_hit, "marimo persistent_cache": marimo_hit, "diskcache memoize": diskcache_hit}


async def small_hits(notebook: Notebook, folder: Path) -> None:
    hits: dict[str, Callable[[int], Any]] = {}
    for peer, make in PEERS.items():
        try:
            hits[peer] = make(folder)
            hits[peer](1)
        except Exception as error:
            missing(peer, error)
    notebook.names["hits"] = hits
    cells = {"a durable cell, --quiet": SMALL, "a cell 'pass'": "pass"}
    cells |= {f"a cell with a hit of {peer}": f"x, y = hits[{peer!r}](1)" for peer in hits}
    times = {name: Times() for name in (*cells, *hits)}
    for _ in range(3):
        await notebook.cell(SMALL)
    for _ in range(HITS):
        for name, source in cells.items():
            with times[name].taken():
                await notebook.cell(source)
        for name, hit in hits.items():
            with times[name].taken():
                hit(1)
    print(f"\nA small hit, medians of {HITS}")
    for name, taken in times.items():
        print(f"  {name:<46}{taken.ms:7.3f} ms,{taken.cpu_ms:7.3f} ms of CPU")
    joblib = times.get("joblib.Memory")
    if joblib:
        for unit, of in (("by the clock", lambda taken: taken.ms), ("of CPU", lambda taken: taken.cpu_ms)):
            ours, in_cell = of(times["a durable cell, --quiet"]), of(times["a cell with a hit of joblib.Memory"])
            own = ours - of(times["a cell 'pass'"])
            print(f"  {unit}: a durable cell is {ours / in_cell:.1f} x a cell with a joblib hit; without the cell 'pass' it is "
                  f"{own / of(joblib):.1f} x the joblib hit alone (target 3)")  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory; -1 where the system doesn't tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return -1


def dropped(notebook: Notebook) -> None:
    notebook.names.pop("big", None)
    gc.collect()


async def restoring(notebook: Notebook, folder: Path, kind: str, target: float, memory: float) -> None:
    source, file = BIG.format(kind=kind), folder / f"{kind}.pickle"
    stored, restored, loaded = Times(), Times(), Times()
    with stored.taken():
        await notebook.cell(source)
    with file.open("wb") as out:
        pickle.dump(notebook.names["big"], out, protocol=5)
    count = file.stat().st_size
    dropped(notebook)
    added: dict[str, list[int]] = {"restored": [], "loaded": []}
    for _ in range(TURNS):
        before = resident()
        with restored.taken():
            await notebook.cell(source)
        added["restored"].append(resident() - before)
        assert len(notebook.names["big"])
        dropped(notebook)
        before = resident()
        with loaded.taken(), file.open("rb") as data:
            notebook.names["big"] = pickle.load(data)
        added["loaded"].append(resident() - before)
        dropped(notebook)
    file.unlink()
    ours, theirs = (sorted(found)[TURNS // 2] / count for found in added.values())
    grown = f"{ours:.1%} of its size in memory (target {memory:.0%}), pickle {theirs:.0%}" if resident() >= 0 else ""
    print(f"\n{count / 1e9:.2f} GB of {kind}, medians of {TURNS}")
    print(f"  stored with the cell in {stored.ms / 1000:.2f} s, restored in {restored.ms:.1f} ms = "
          f"{restored.ms / loaded.ms:.3f} x pickle 5 load ({loaded.ms:.0f} ms; target {target}); {grown}")  # fmt: skip


def buffers_of(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        return [value.view(np.uint8)]
    chunks = [chunk for name in value for chunk in value[name].array._pa_array.chunks]
    return [buffer for chunk in chunks for buffer in chunk.buffers() if buffer is not None]


def hashing(kind: str, make: Callable[[int], Any], target: float) -> None:
    value = make(BYTES)
    ours, raw, peer = Times(), Times(), Times()
    buffers = buffers_of(value)
    count = sum(memoryview(buffer).nbytes for buffer in buffers)
    try:
        from joblib import hash as joblib_hash
    except ImportError as error:
        missing("joblib.hash", error)
        joblib_hash = None
    for _ in range(TURNS):
        with ours.taken():
            look_at(value)
        with raw.taken():
            for buffer in buffers:
                xxhash.xxh3_128_digest(buffer)
        if joblib_hash and len(peer.wall) < 2:
            with peer.taken():
                joblib_hash(value)
    beside = f"; joblib.hash {peer.ms:.0f} ms" if joblib_hash else ""
    print(f"  {count / 1e9:.2f} GB of {kind} compared as an input: {ours.ms:.0f} ms = {ours.ms / raw.ms:.2f} x raw xxh3_128 "
          f"({raw.ms:.0f} ms; target {target}){beside}")  # fmt: skip


PLAIN: dict[str, tuple[Callable[[], Any], float]] = {
    "100,000 small dicts": (
        lambda: [{"id": i, "name": f"user {i}", "score": i * 0.5, "tags": ["a", "b", str(i)]} for i in range(100_000)],
        0.25,
    ),
    "300,000 nested dicts and lists": (
        lambda: {f"k{i}": {"a": i, "b": {"c": str(i), "d": [i, i + 1]}} for i in range(100_000)},
        0.25,
    ),
    "200,000 dataclass instances": (lambda: [Point(i, i * 0.5, f"n{i}") for i in range(200_000)], 1),
    "a set of 300,000 strings": (lambda: {f"string {i * 7919}" for i in range(300_000)}, 1),
}


def plain_data() -> None:
    """One look each at plain Python data, beside joblib.hash; in CPU time of this process, turn by turn."""
    from joblib import hash as joblib_hash

    print("\nInputs of plain Python data, one look")
    for what, (make, target) in PLAIN.items():
        value = make()
        taken: dict[str, list[float]] = {"ours": [], "joblib": []}
        for _ in range(TURNS):
            for name, look in (("ours", look_at), ("joblib", joblib_hash)):
                gc.collect()
                began = time.process_time()
                look(value)
                taken[name].append(time.process_time() - began)
        ours, peer = (sorted(found)[len(found) // 2] for found in taken.values())
        print(f"  {what:<32}{ours * 1000:7.0f} ms = {ours / peer:.2f} x joblib.hash ({peer * 1000:.0f} ms; target {target})")


def look_at(value: Any) -> None:
    found = Fingerprinter()
    found.add_name("big", {"big": value})
    found.result()


def many_classes() -> None:
    """A function that reads 300 classes of 20 methods, in a module of its own: the first look, and those after it."""
    source = "\n".join(
        f"class C{n}:\n"
        + "\n".join(f"    def m{k}(self, x):\n        return x + {k} + len(str(self)) + {n}" for k in range(20))
        for n in range(300)
    )
    Path("classes.py").write_text(source + "\nALL = [" + ", ".join(f"C{n}" for n in range(300)) + "]\n")
    sys.path.insert(0, str(Path.cwd()))
    classes = importlib.import_module("classes").ALL
    took = []
    for _ in range(TURNS + 1):
        began = time.process_time()
        look_at(classes)
        took.append(time.process_time() - began)
    later = sorted(took[1:])[TURNS // 2]
    print(f"  300 classes of 20 methods: {took[0] * 1000:.0f} ms the first time, {later * 1000:.0f} ms each time after")


async def watching_files(notebook: Notebook, folder: Path) -> None:
    """What it costs to see the files that native code opens: set once, then at each miss; a hit doesn't look."""
    if not sys.platform.startswith("linux"):
        missing("watching files", OSError("inotify is of Linux"))
        return
    many, deep = folder / "watched", folder / "most"
    for n in range(1_000):
        (many / f"{n // 100}" / f"{n}").mkdir(parents=True)
    for n in range(10_000):
        (deep / f"{n // 1000}" / f"{n}").mkdir(parents=True)
    print("\nWatching files")
    for name, top in (("1,000 folders", many), ("10,000 folders, 8,192 of them", deep)):
        taken = Times()
        for _ in range(TURNS):
            watcher = inotify.Watcher()
            with taken.taken():
                watcher.watch(str(top))
            watcher.close()
        print(f"  {name} watched, once per kernel, in the background: {taken.ms:.1f} ms, {taken.cpu_ms:.1f} ms of CPU")
    cell = "%%durable watched --quiet --rerun\nz = open('watched/0/0/x').read(), len(paths)"
    (many / "0" / "0" / "x").write_text("1")
    notebook.names["paths"] = [f"watched/{n // 100}/{n}" for n in range(20)]
    with_, without = Times(), Times()
    known = inotify._watcher
    for _ in range(HITS):
        for taken, found in ((with_, known), (without, None)):
            inotify._watcher = found
            with taken.taken():
                await notebook.cell(cell)
    inotify._watcher = known
    print(f"  a cell that runs: {with_.ms:.2f} ms, {without.ms:.2f} ms with nothing watched: {with_.ms - without.ms:+.2f} ms, "
          f"{with_.cpu_ms - without.cpu_ms:+.2f} ms of CPU (target 1)")  # fmt: skip
    reading = Times()
    texts = [f"name of {n}" for n in range(10_000)]
    for _ in range(TURNS):
        with reading.taken():
            places_of(mentions_of([texts]), str(folder))
    print(f"  10,000 texts looked up, the most that a miss may take: {reading.ms:.1f} ms, {reading.cpu_ms:.1f} ms of CPU")


async def measure(folder: Path) -> None:
    notebook = Notebook()
    await small_hits(notebook, folder)
    notebook.names.update(array_of=array_of, frame_of=frame_of, BYTES=BYTES)
    await restoring(notebook, folder, "array", 0.01, 0.01)
    await restoring(notebook, folder, "frame", 0.2, 0.2)
    await watching_files(notebook, folder)
    print("\nInputs")
    hashing("array", array_of, 1.5)
    hashing("frame", frame_of, 5)
    plain_data()
    many_classes()


def main() -> None:
    print(machine())
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            asyncio.run(measure(Path(folder)))
        finally:
            os.chdir(home)


if __name__ == "__main__":
    main()
