"""Whole notebooks as people write them, each in five ways: plainly, durably, durably again in a new kernel, with every second
cell durable, and edited. What they show and hold is compared cell by cell with plain execution.

`python tests/books.py [-v] [NAME ...]` runs those in `tests/books/` whose file names contain NAME, and prints a table. In a
book's text `# %%` begins a cell; `# %% edit: OLD -> NEW` says what the edit replaces in that one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from kernels import Shown, kernel

BOOKS = Path(__file__).parent / "books"
_TIMES = re.compile(r"(CPU times|Wall time).*")
_PLACES = re.compile(r"0x[0-9a-f]{6,}|/tmp/ipykernel_\d+/\d+\.py(:\d+)?|(?<=Cell In\[)\d+")
_GENERATORS = {"(random)": re.compile(r"(?<!np\.)random\.seed\("), "(numpy random)": re.compile(r"np\.random\.seed\(")}
"""Where no seed was given, what a generator holds is chance."""
LONG_S = 10.0
"""A book that takes as long is judged by ratios, a shorter one by milliseconds a cell."""


@dataclass(frozen=True)
class Cell:
    source: str
    edited: str


@dataclass(frozen=True)
class Book:
    name: str
    cells: list[Cell]


@dataclass
class Played:
    """One executed cell."""

    shown: list[str]
    state: dict[str, str]
    seconds: float
    cpu: float
    line: str = ""
    """The status line at its end."""
    began: str = ""
    """And at its beginning."""
    status: str = "ok"
    error: str = ""

    @property
    def restored(self) -> bool:
        return " · restored" in self.line

    @property
    def why(self) -> str:
        """Why it was not stored."""
        return self.line.partition(" · not stored: ")[2]


def read(path: Path) -> Book:
    cells = []
    for part in re.split(r"^# %%", path.read_text(), flags=re.MULTILINE)[1:]:
        head, _, source = part.partition("\n")
        source, edited = source.strip(), source.strip()
        if "edit:" in head:
            old, new = head.partition("edit:")[2].strip().split(" -> ")
            assert source.count(old) >= 1, f"{path.name}: {old!r} is not in its cell"
            edited = source.replace(old, new)
        cells.append(Cell(source, edited))
    return Book(path.stem, cells)


def books(*wanted: str) -> list[Book]:
    return [read(path) for path in sorted(BOOKS.glob("*.ipy")) if not wanted or any(name in path.stem for name in wanted)]


# -- playing ------------------------------------------------------------------------------------------------------------


def play(folder: Path, book: Book, durable: Callable[[int], bool], *, edited: bool = False) -> list[Played]:
    """Execute the book in a new kernel in `folder`; the cells for whose number `durable` holds as durable cells."""
    env = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
        "PYTHONHASHSEED": "random",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "POLARS_MAX_THREADS": "1",
    }
    with kernel(folder, env=env) as running:
        notes = folder.parent / f"{folder.name}.json"
        running.value("__import__('describe').used()")
        before = float(running.value("__import__('describe').used()"))
        played = []
        for number, cell in enumerate(book.cells):
            source = cell.edited if edited else cell.source
            shown = running.run(durably(source, number) if durable(number) else source, timeout=600)
            after = float(running.value(f"__import__('describe').noted(get_ipython().user_ns, {str(notes)!r})"))
            played.append(_played(shown, json.loads(notes.read_text()), after - before))
            before = float(running.value("__import__('describe').used()"))
        return played


def durably(source: str, number: int) -> str:
    """With the magic; a cell magic that can't stand below it stays as it is."""
    first, _, rest = source.partition("\n")
    if first.startswith(("%%time", "%%capture")):
        return f"{first}\n%%durable c{number:02}\n{rest}"
    return source if first.startswith("%%") else f"%%durable c{number:02}\n{source}"


def _played(shown: Shown, state: dict[str, str], cpu: float) -> Played:
    outputs = [_plain(f"stdout {shown.stdout}"), _plain(f"stderr {_warnings(shown.stderr)}"), _plain(f"result {shown.result}")]
    outputs.append(f"error {shown.error}")
    outputs += [_plain(json.dumps([d["data"], d["metadata"]], sort_keys=True)) for d in shown.displays]
    told = shown.told or [""]
    return Played(outputs, state, shown.seconds, cpu, told[-1], told[0], shown.status, shown.error)


def _warnings(text: str) -> str:
    """Without the numbers of lines, which the magic's own line moves."""
    return re.sub(r"^(\S+\.py):\d+: ", r"\1: ", text, flags=re.MULTILINE)


def _plain(text: str) -> str:
    return _PLACES.sub("@", _TIMES.sub("times", text))


# -- comparing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Differs:
    way: str
    cell: int
    what: str
    plain: str
    durable: str

    def __str__(self) -> str:
        place = f"{self.way} c{self.cell:02} {self.what}"
        return f"{place}:\n      plain   {_cut(self.plain, self.durable)}\n      durable {_cut(self.durable, self.plain)}"


def _cut(text: str, other: str, around: int = 60) -> str:
    """The text about where it differs from the other."""
    place = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return text[max(0, place - around) : place + 2 * around]


def chances(plain: list[Played], twin: list[Played]) -> set[tuple[int, str]]:
    found = set()
    for number, (a, b) in enumerate(zip(plain, twin, strict=True)):
        found |= {(number, f"output {i}") for i, (x, y) in enumerate(zip(a.shown, b.shown, strict=False)) if x != y}
        found |= {(number, f"state {name}") for name in a.state if a.state[name] != b.state.get(name)}
    return found


@dataclass
class Report:
    """How one book went."""

    book: Book
    plain: list[Played]
    chance: set[tuple[int, str]]
    """(cell, what) that two plain executions don't have in common: memory that was never written, a clock's time."""
    first: list[Played]
    second: list[Played]
    differs: list[Differs] = field(default_factory=list)
    half: list[Played] = field(default_factory=list)
    edited: list[Played] = field(default_factory=list)

    @property
    def can_hit(self) -> list[int]:
        """Cells that ran to their end, and can be durable."""
        durable = ["%%durable" in durably(cell.source, 0) for cell in self.book.cells]
        return [i for i, cell in enumerate(self.plain) if cell.status == "ok" and durable[i]]

    @property
    def hits(self) -> int:
        return sum(self.second[i].restored for i in self.can_hit)

    @property
    def not_stored(self) -> dict[int, str]:
        return {i: self.first[i].why for i in self.can_hit if self.first[i].why}

    @property
    def needless(self) -> dict[int, str]:
        """Cells that were stored and ran again all the same, with the reason they gave."""
        again = [i for i in self.can_hit if not self.first[i].why and not self.second[i].restored]
        return {i: self.second[i].began.partition(" · running: ")[2] for i in again}

    def other(self, kind: str) -> list[Differs]:
        return [d for d in self.differs if d.what.startswith(kind)]

    def seconds(self, way: str, unit: str = "seconds") -> float:
        return sum(getattr(cell, unit) for cell in getattr(self, way))

    def more_ms(self, way: str, unit: str = "seconds") -> float:
        """Milliseconds more than plain execution, a cell."""
        return (self.seconds(way, unit) - self.seconds("plain", unit)) / len(self.plain) * 1000

    def line(self) -> str:
        plain = self.seconds("plain")
        ratios = [
            self.seconds(way, unit) / self.seconds("plain", unit) for way in ("first", "second") for unit in ("seconds", "cpu")
        ]
        more = [self.more_ms(way, unit) for way in ("first", "second") for unit in ("seconds", "cpu")]
        return (
            f"{self.book.name:24}{len(self.plain):4}{self.hits:4}{len(self.not_stored):5}{len(self.needless):5}"
            f"{len(self.other('output')):5}{len(self.other('state')):5}{plain:8.2f}"
            f"{ratios[0]:7.2f} ({ratios[1]:4.2f}){ratios[2]:7.2f} ({ratios[3]:4.2f})"
            f"{more[0]:8.1f} ({more[1]:5.1f}){more[2]:8.1f} ({more[3]:5.1f})"
        )


HEAD = (
    f"{'book':24}{'':1}cells hit  n/s  ndl  out  st.{'plain s':>8}{'first (cpu)':>14}{'second (cpu)':>14}"
    f"{'first +ms (cpu)':>16}{'second +ms (cpu)':>16}"
)


def compare(
    way: str, book: Book, plain: list[Played], other: list[Played], chance: Collection[tuple[int, str]] = ()
) -> list[Differs]:
    """What differs after each cell, but for `chance`. A difference in state is told where it is seen first."""
    found, told = [], set()
    for number, (expected, now) in enumerate(zip(plain, other, strict=True)):
        for i in range(max(len(expected.shown), len(now.shown))):
            a, b = (cell.shown[i] if i < len(cell.shown) else "nothing" for cell in (expected, now))
            if a != b and (number, f"output {i}") not in chance:
                found.append(Differs(way, number, f"output {i}", a, b))
        for name in sorted(expected.state.keys() | now.state.keys()):
            if name.startswith("(") and (name not in expected.state or name not in now.state):
                continue  # a library that is loaded in one of them only
            a, b = expected.state.get(name, "unbound"), now.state.get(name, "unbound")
            if name in _GENERATORS and not any(_GENERATORS[name].search(cell.source) for cell in book.cells[: number + 1]):
                continue
            if a != b and name not in told and (number, f"state {name}") not in chance:
                told.add(name)
                found.append(Differs(way, number, f"state {name}", a, b))
    return found


def report(book: Book, folder: Path, *, ways: tuple[str, ...] = ("half", "edited")) -> Report:
    """Play a book in all ways, in folders below `folder`."""
    one, two, three = (folder / name / "work" for name in ("plain", "durable", "twin"))
    for each in (one, two, three):
        each.mkdir(parents=True)
    plain = play(one, book, lambda _: False)
    twin = play(three, book, lambda _: False)
    chance = chances(plain, twin)
    first = play(two, book, lambda _: True)
    second = play(two, book, lambda _: True)
    found = Report(book, plain, chance, first, second)
    found.differs = compare("first", book, plain, first, chance) + compare("second", book, plain, second, chance)
    if "half" in ways:
        found.half = play(two, book, lambda number: number % 2 == 0)
        found.differs += compare("half", book, plain, found.half, chance)
    if "edited" in ways and any(cell.edited != cell.source for cell in book.cells):
        found.edited = play(two, book, lambda _: True, edited=True)
        found.differs += compare("edited", book, play(one, book, lambda _: False, edited=True), found.edited, chance)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("-v", "--verbose", action="store_true", help="show every difference")
    parser.add_argument("--plain", action="store_true", help="only show which cells fail in plain execution")
    asked = parser.parse_args()
    os.nice(10)
    if asked.plain:
        for book in books(*asked.names):
            with tempfile.TemporaryDirectory() as folder:
                played = play(Path(folder), book, lambda _: False)
            print(f"{book.name:30}{len(played):4} cells{sum(cell.seconds for cell in played):8.2f} s")
            for number, cell in enumerate(played):
                if cell.status != "ok":
                    print(f"    c{number:02} {cell.status}: {cell.error}")
        return
    print(HEAD)
    reports = []
    for book in books(*asked.names):
        with tempfile.TemporaryDirectory() as folder:
            made = report(book, Path(folder))
        reports.append(made)
        print(made.line(), flush=True)
        names = sorted({what.removeprefix("state ") for _, what in made.chance})
        print(f"    chance: {', '.join(names)}") if names else None
        for number, why in made.not_stored.items():
            print(f"    c{number:02} not stored: {why}")
        for number, why in made.needless.items():
            print(f"    c{number:02} ran again: {why} | {book.cells[number].source.splitlines()[0][:60]}")
        if asked.verbose:
            more = [now.cpu - before.cpu for now, before in zip(made.first, made.plain, strict=True)]
            dear = sorted(range(len(more)), key=lambda number: -more[number])[:4]
            print("    dearest in the first run: " + ", ".join(f"c{n:02} {more[n] * 1000:+.0f} ms" for n in dear))
        found: dict[tuple[int, str, str], Differs] = {}
        for differs in made.differs:  # what every way shows is said once
            found.setdefault((differs.cell, differs.what, differs.durable), differs)
        for differs in list(found.values())[: None if asked.verbose else 12]:
            print(f"    {differs}")
    print(summary(reports))


def summary(reports: list[Report]) -> str:
    can, hits = sum(len(r.can_hit) for r in reports), sum(r.hits for r in reports)
    lines = [f"{len(reports)} books, {can} cells, {hits} hits ({hits / can:.1%})"]
    long = [r for r in reports if r.seconds("plain") >= LONG_S]
    for way in ("first", "second"):
        for unit, name in (("seconds", "wall"), ("cpu", "CPU")):
            if long:
                ratio = statistics.median(r.seconds(way, unit) / r.seconds("plain", unit) for r in long)
                lines.append(f"{way} run, {name}: {ratio:.2f} x plain (median of {len(long)} books of {LONG_S:.0f} s and more)")
            short = [r.more_ms(way, unit) for r in reports if r not in long]
            if short:
                lines.append(
                    f"{way} run, {name}: {statistics.median(short):+.1f} ms a cell (median of {len(short)} shorter books)"
                )
    reasons = Counter(re.sub(r"\b\d+\b", "N", why) for r in reports for why in r.not_stored.values())
    return "\n".join([*lines, *(f"  {n} x not stored: {why}" for why, n in reasons.most_common())])


if __name__ == "__main__":
    sys.exit(main())
