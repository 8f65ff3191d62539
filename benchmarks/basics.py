"""What a front end sees of a real kernel: loading the extension, the first hit, the hits after it.

Run with `make bench` or `python benchmarks/basics.py`. The kernel is a process of its own; a cell `pass` takes turns with
the hits and says what the way there and back costs.
"""

from __future__ import annotations

import tempfile

from bench import Times, machine
from jupyter_client.manager import start_new_kernel

LOAD = """
import time as _time
_began = _time.perf_counter()
get_ipython().run_line_magic("load_ext", "durable_nb")
print("LOAD", _time.perf_counter() - _began)
"""
CELL = "%%durable small --quiet\nx = {'a': 1, 'b': [1, 2, 3]}\ny = 'text'"
HITS = 50


def measure(folder: str) -> tuple[float, Times, Times]:
    """Seconds of %load_ext, hits, cells `pass`; in a new kernel."""
    manager, client = start_new_kernel(cwd=folder)
    printed: list[str] = []

    def hear(message: dict) -> None:
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])

    hits, empty = Times(), Times()
    try:
        client.execute_interactive(LOAD, output_hook=hear)
        for _ in range(HITS):
            with hits.taken():
                client.execute_interactive(CELL, output_hook=hear)
            with empty.taken():
                client.execute_interactive("pass", output_hook=hear)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    line = next(line for line in "".join(printed).splitlines() if line.startswith("LOAD"))
    return float(line.split()[1]), hits, empty


def main() -> None:
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        measure(folder)  # stores the entry, and compiles the files of the package
        load, hits, empty = measure(folder)
    print("\nA new kernel, as the front end sees it")
    print(f"  %load_ext: {load * 1000:.0f} ms (target 100)")
    print(f"  the first hit: {hits.wall[0] * 1000:.0f} ms")
    print(f"  a small hit after it: {hits.ms:.1f} ms, a cell 'pass' {empty.ms:.1f} ms, medians of {HITS}")


if __name__ == "__main__":
    main()
