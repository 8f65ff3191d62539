"""What the benchmarks share: a notebook in this process, the floor under every commit, turns, and medians.

Everything that is compared takes turns with everything else, so that a busy machine troubles all alike.
"""

from __future__ import annotations

import dataclasses
import io
import os
import platform
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from durable_nb._disks import file_system_of

MODE = "wal" if file_system_of(Path(tempfile.gettempdir())).is_fit else "persist"


def size(name: str, default: int) -> int:
    """A number that the environment may set: DURABLE_NB_BENCH_NAME."""
    return int(os.environ.get(f"DURABLE_NB_BENCH_{name}", str(default)))


def machine() -> str:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        models = [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if line.startswith("model name")]
        model = models[0] if models else model
    python, system = platform.python_version(), f"{platform.system()} {platform.release()}"
    return (
        f"{os.cpu_count()} x {model}, {system}, Python {python}, SQLite {sqlite3.sqlite_version}, journal mode {MODE}, "
        "synchronous FULL"
    )


class Times:
    """How long something took each time: wall clock, and the CPU of the whole process."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    @contextmanager
    def taken(self) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    @property
    def ms(self) -> float:
        """The median."""
        return statistics.median(self.wall) * 1000

    @property
    def cpu_ms(self) -> float:
        return statistics.median(self.cpu) * 1000


@dataclasses.dataclass
class Point:
    """Plain data, of a module that can be imported: joblib pickles it by name."""

    x: int
    y: float
    name: str


class Floor:
    """One row a commit in raw SQLite, and one append with fdatasync, of as many bytes as a step's row has."""

    def __init__(self, folder: Path, key_size: int, row_size: int) -> None:
        self.row_size = row_size
        self._key, self._row = key_size, row_size * b"x"
        self._sql = sqlite3.connect(folder / "raw.db", isolation_level=None, check_same_thread=False)
        self._sql.execute(f"PRAGMA journal_mode={MODE}")
        self._sql.execute("PRAGMA synchronous=2")
        self._sql.execute("CREATE TABLE row (key TEXT PRIMARY KEY, value BLOB)")
        self._file = os.open(folder / "raw.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.commit, self.append = Times(), Times()

    def take_turn(self) -> None:
        key = f"{time.perf_counter_ns():0{self._key}}"
        with self.commit.taken():
            self._sql.execute("INSERT INTO row VALUES (?, ?)", (key, self._row))
        sync = getattr(os, "fdatasync", os.fsync)
        with self.append.taken():
            os.write(self._file, self._row)
            sync(self._file)

    def fill(self, count: int) -> None:
        """As many rows as the journal has got, in one commit."""
        began = time.perf_counter_ns()
        self._sql.execute("BEGIN")
        rows = ((f"{began + n:0{self._key}}", self._row) for n in range(count))
        self._sql.executemany("INSERT INTO row VALUES (?, ?)", rows)
        self._sql.execute("COMMIT")


class Notebook:
    """An IPython shell in this process whose cells are executed as ipykernel does it."""

    def __init__(self) -> None:
        from IPython.core.interactiveshell import InteractiveShell

        self.shell = InteractiveShell.instance()
        self.shell.run_line_magic("load_ext", "durable_nb")
        self._notices = io.StringIO()
        self.names: dict[str, Any] = self.shell.user_ns

    async def cell(self, source: str, *, may_raise: bool = False) -> None:
        """Execute a cell. Tracebacks and notices are not shown; the error is raised, unless it is part of the plan."""
        shell = self.shell
        with redirect_stderr(self._notices), redirect_stdout(self._notices):
            result = await shell.run_cell_async(source, store_history=False, transformed_cell=shell.transform_cell(source))
            shell.events.trigger("post_execute")
        if not may_raise:
            result.raise_error()


def missing(peer: str, error: Exception) -> None:
    """Say that a peer can't be compared."""
    print(f"NOT COMPARED with {peer}: {type(error).__name__}: {error} (pip install 'durable-nb[bench]' has it)")
