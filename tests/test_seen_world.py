"""What a cell or step looks at beyond its names is an input: files that native code opens, the environment, what is looked up
by name. One promise for both: as long as it is the same they are restored, when it changes they run again."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from kernels import Kernel, kernel

import durable_nb as durable
from durable_nb._cellcache import environment, inotify
from durable_nb._cellcache.external import Around, ExternalState
from durable_nb._cellcache.files import content_digest, state_of
from durable_nb._cellcache.mentions import LONGEST_TEXT, MOST_TEXTS, mentions_of, places_of
from durable_nb._cellcache.watch import Watch, prepare, watching
from durable_nb._codec import Signer

SETUP = """
import contextlib, glob, importlib, os, random, subprocess, sys
from dataclasses import dataclass
from pathlib import Path
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.dataset
import pyarrow.parquet as pq
base = '{folder}/data'
counter = '{folder}/home/ran'
def write(value, name='p.parquet', folder=base):
    os.makedirs(folder, exist_ok=True)
    pd.DataFrame({{'a': [value]}}).to_parquet(os.path.join(folder, name))
def read(path):
    return pq.read_table(path).column('a').to_pylist()
"""

FILES = {
    "f-string": ("", "return read(f'{base}/p.parquet')"),
    "os.path.join": ("parts = [base, 'p' + '.parquet']", "return read(os.path.join(*parts))"),
    "Path": ("root = Path(base)", "return read(root / 'p.parquet')"),
    "dict": ("paths = {'in': [base + '/p.parquet']}", "return pd.read_parquet(paths['in'][0]).a.tolist()"),
    "class attribute": ("class Config:\n    where = base\nclass Child(Config):\n    pass", "return read(Child.where + '/p.parquet')"),
    "instance": ("@dataclass\nclass Job:\n    folder: Path\n    def load(self): return read(self.folder / 'p.parquet')\njob = Job(Path(base))", "return job.load()"),
    "default argument": ("def load(path=base + '/p.parquet'): return read(path)", "return load()"),
    "closure": ("def loader(path):\n    return lambda: read(path)\nload2 = loader(base + '/p.parquet')", "return load2()"),
    "glob": ("", "return [read(path) for path in sorted(glob.glob(base + '/*.parquet'))][0]"),
    "pattern of polars": ("", "return pl.read_parquet(base + '/*.parquet')['a'].to_list()[:1]"),
    "folder of pyarrow": ("", "return pyarrow.dataset.dataset(base, format='parquet', exclude_invalid_files=True).to_table().column('a').to_pylist()[:1]"),
    "query of duckdb": ("", "return [duckdb.sql(f\"select sum(a) from '{base}/p.parquet'\").fetchall()[0][0]]"),
    "child process": ("", "return [len(subprocess.run(['cat', base + '/p.parquet'], capture_output=True).stdout) and read(base + '/p.parquet')[0]]"),
    "table of paths": ("table = pd.DataFrame({'path': [base + '/p.parquet']})", "return [read(path) for path in table.path][0]"),
    "environment": ("os.environ['DATA_FOLDER'] = base", "return read(os.environ['DATA_FOLDER'] + '/p.parquet')"),
    "relative": ("", "return read('data/' + 'p.parquet')"),
}  # fmt: skip
"""Where a path comes from: what stands above, and the body of the function that reads it."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seen")
    with kernel(folder) as started:
        (folder / "home").mkdir(exist_ok=True)
        shown = started.run(SETUP.format(folder=folder))
        assert shown.status == "ok", shown.traceback
        yield started


def ran(k: Kernel) -> int:
    path = k.folder / "home" / "ran"
    return len(path.read_text()) if path.exists() else 0


def define(k: Kernel, before: str, body: str) -> None:
    lines = "\n    ".join(body.splitlines())
    shown = k.run(f"{before}\ndef look():\n    open(counter, 'a').write('x')\n    {lines}")
    assert shown.status == "ok", shown.traceback


class Cell:
    """Calls `look` as a durable cell, or as a step of one that is edited each time."""

    def __init__(self, k: Kernel, name: str, *, step: bool) -> None:
        self.k, self.name, self.step, self.edits = k, "".join(c if c.isalnum() else "_" for c in name), step, 0
        self.shown = None

    def run(self):
        """(did it run, what it gave)"""
        self.edits += 1
        call = f"await durable.run('look', look)\nedit = {self.edits}" if self.step else "look()"
        before = ran(self.k)
        self.shown = self.k.run(f"%%durable {'s' if self.step else 'c'}_{self.name}\ny = {call}")
        assert self.shown.status == "ok", self.shown.traceback
        return ran(self.k) > before, self.k.value("y")


def test_a_file_that_native_code_reads_is_an_input_wherever_its_path_comes_from(home):
    """pyarrow, polars, duckdb and a child process raise no audit event. Nothing changed, nothing runs; a rewritten file makes
    cell and step run again; and a file beside it that nobody reads doesn't."""  # fmt: skip
    wrong = []
    for name, (before, body) in FILES.items():
        home.run("write(1); write(1, 'q.parquet')")
        define(home, before, body)
        cells = [Cell(home, name, step=step) for step in (False, True)]
        found = [[cell.run() for cell in cells], [cell.run() for cell in cells]]
        home.run("write(2)")
        found.append([cell.run() for cell in cells])
        found.append([cell.run() for cell in cells])
        expected = [[(True, [1])] * 2, [(False, [1])] * 2, [(True, [2])] * 2, [(False, [2])] * 2]
        if found != expected:
            wrong.append((name, found, cells[0].shown.told))
    assert not wrong


def test_a_file_that_comes_into_a_folder_is_an_input_of_what_lists_it_natively(home):
    for name, body in {
        "dataset": "return sorted(pyarrow.dataset.dataset(many, format='parquet').to_table().column('a').to_pylist())",
        "pattern": "return sorted(pl.read_parquet(many + '/*.parquet')['a'].to_list())",
        "relative pattern": "return sorted(pl.read_parquet('many_relative pattern/*.parquet')['a'].to_list())",
    }.items():
        home.run(f"many = '{{}}/many_{name}'.format(str(Path.cwd()))\nwrite(1, 'one.parquet', many)")
        define(home, "", body)
        cells = [Cell(home, f"many {name}", step=step) for step in (False, True)]
        assert [cell.run() for cell in cells] == [(True, [1])] * 2, name
        assert [cell.run() for cell in cells] == [(False, [1])] * 2, name
        home.run("write(2, 'two.parquet', many)")
        assert [cell.run() for cell in cells] == [(True, [1, 2])] * 2, name


LOOKED_UP = {
    "environment": ("", "return os.getenv('MODEL')", "os.environ['MODEL'] = 'a'", "os.environ['MODEL'] = 'b'"),
    "variable not set": ("", "return os.environ.get('NOT_' + 'SET')", "os.environ.pop('NOT_SET', None)", "os.environ['NOT_SET'] = 'b'"),
    "all variables of a beginning": ("", "return {k: v for k, v in os.environ.items() if k.startswith('APP_')}", "os.environ['APP_A'] = '1'; os.environ.pop('APP_B', None)", "os.environ['APP_B'] = '1'"),
    "none of a beginning yet": ("", "return {k: v for k, v in os.environ.items() if k.startswith('NEW_')}", "os.environ.pop('NEW_A', None)", "os.environ['NEW_A'] = '1'"),
    "copied environment": ("", "return dict(os.environ).get('LEVEL')", "os.environ.pop('LEVEL', None)", "os.environ['LEVEL'] = '1'"),
    "environment of a child": ("", "return subprocess.getoutput('echo $colour')", "os.environ['colour'] = '1'", "os.environ['colour'] = '2'"),
    "environment of a child, not set": ("", "return subprocess.getoutput('printenv TONE')", "os.environ.pop('TONE', None)", "os.environ['TONE'] = '2'"),
    "absent file": ("", "return os.path.exists(f'{base}/dl_{1}.csv')", "Path(base, 'dl_1.csv').unlink(missing_ok=True)", "Path(base, 'dl_1.csv').touch()"),
    "absent Path": ("", "return (Path(base) / 'dl2.csv').exists()", "Path(base, 'dl2.csv').unlink(missing_ok=True)", "Path(base, 'dl2.csv').touch()"),
    "absent native": ("", "with contextlib.suppress(FileNotFoundError):\n    return read('later.parquet')", "Path('later.parquet').unlink(missing_ok=True)", "write(1, 'later.parquet', '.')"),
    "size": ("", "return os.path.getsize(base + '/sized')", "Path(base, 'sized').write_text('1')", "Path(base, 'sized').write_text('12')"),
    "query": ("frame = pd.DataFrame({'a': [1, 2, 3]})", "return len(frame.query('a > @K'))", "K = 1", "K = 2"),
    "query from a variable": ("frame = pd.DataFrame({'a': [1, 2, 3]})\nq = {'where': 'a > @K'}", "return len(frame.query(q['where']))", "K = 1", "K = 2"),
    "table of duckdb": ("", "return duckdb.sql('select sum(a) from dfq').fetchall()[0][0]", "dfq = pd.DataFrame({'a': [1]})", "dfq = pd.DataFrame({'a': [2]})"),
    "pandas' options": ("", "return pd.Series([1/3]).to_string()", "pd.reset_option('display.precision')", "pd.set_option('display.precision', 3)"),
    "options of a library that the function imports": ("", "import numpy\nreturn str(numpy.array([1 / 3]))", "np.set_printoptions(precision=8)", "np.set_printoptions(precision=3)"),
    "polars' options": ("", "return str(pl.DataFrame({'a': [1 / 3]}))", "x = pl.Config.set_float_precision(None)", "x = pl.Config.set_float_precision(2)"),
    "what was added to frames": ("def add(n):\n    def size2(df): return n\n    pd.DataFrame.size2 = size2", "return pd.DataFrame({'a': [1]}).size2()", "add(1)", "add(2)"),
    "time zone": ("import time", "return time.strftime('%H', time.localtime(0))", "os.environ['TZ'] = 'UTC'; time.tzset()", "os.environ['TZ'] = 'Asia/Tokyo'; time.tzset()"),
    "size by os": ("", "return os.stat('stated').st_size", "Path('stated').write_text('1')", "Path('stated').write_text('12')"),
    "longest field of csv": ("import csv", "try:\n    return len(next(csv.reader(['a' * 50]))[0])\nexcept csv.Error:\n    return 0", "x = csv.field_size_limit(131072)", "x = csv.field_size_limit(10)"),
    "level of a logger": ("import logging", "return logging.getLogger('mine').isEnabledFor(10)", "logging.getLogger('mine').setLevel(0)", "logging.getLogger('mine').setLevel(10)"),
    "seeded generator": ("", "return random.random()", "random.seed(1)", "random.seed(2)"),
    "module by a computed name": ("name = 'plugin'; sys.path.insert(0, str(Path.cwd())); sys.dont_write_bytecode = True", "return importlib.import_module(name).K",
                                  "sys.modules.pop('plugin', None); Path('plugin.py').write_text('K = 1')", "sys.modules.pop('plugin', None); Path('plugin.py').write_text('K = 23')"),
}  # fmt: skip
"""What stands above, the function's body, the world before, and what changes it."""


def test_what_is_looked_up_is_an_input_of_cells_and_steps(home):
    home.run("write(1)")
    wrong = []
    for name, (before, body, first, then) in LOOKED_UP.items():
        for step in (False, True):
            define(home, before, body)
            cell = Cell(home, name, step=step)
            found = []
            for world in (first, first, then, first):
                shown = home.run(world)
                assert shown.status == "ok", shown.traceback
                found.append(cell.run())
            did, values = zip(*found, strict=True)
            # A cell keeps an entry for each state of the world that it has seen, a step its last outcome.
            if did[:3] != (True, False, True) or values[0] != values[1] or values[2] == values[0] or values[3] != values[0]:
                wrong.append((name, "step" if step else "cell", found, cell.shown.told))
    assert not wrong


NAMES = {
    "globals()": "return globals()['K']",
    "globals() by a computed name": "return globals()[which]",
    "eval": "return eval(text)",
    "__main__": "import __main__\nreturn __main__.K",
    "sys.modules": "return sys.modules['__main__'].K",
    "method of the notebook": "return look.__globals__['K']",
}


def test_a_step_that_looks_a_name_up_runs_again_when_its_variable_changes_and_says_so_once(home):
    """What the texts name that the code can reach is compared; that it can't be followed to the end is told."""
    for name, body in NAMES.items():
        define(home, "which = 'K'\ntext = 'K * 1'", body)
        home.run("K = 1")
        cell = Cell(home, f"names {name}", step=True)
        assert cell.run() == (True, 1), name
        assert cell.shown.told[-1].count("looks names up while it runs") == 1, name
        assert cell.run() == (False, 1), name
        home.run("K = 2\nunrelated = 5")
        assert cell.run() == (True, 2), name


def test_a_step_that_names_no_text_runs_again_when_a_setting_that_it_uses_changes(home):
    """Also one that was as it is by default when the step ran; and a file that it opens all the same is an input of it."""
    home.run(
        "from decimal import Decimal, getcontext\n"
        "def third(): return Decimal(1) / Decimal(3)\n"
        "def folder_of(): return os.getcwd()\n"
        "def first_of(read): return read()\n"
        "class Reads:\n    def __reduce__(self): return Reads, ()\n    def __call__(self): return open(chr(122)).read()\n"
        "began_in = os.getcwd()\n"
        "put = lambda value: open(os.path.join(began_in, 'z'), 'w').write(value)\n"
        "os.makedirs('other', exist_ok=True)\nput('1')"
    )
    steps = "[str(await durable.run('third', third)), await durable.run('folder', folder_of) == began_in, await durable.run('z', first_of, Reads())]"

    def seen(edit):
        shown = home.run(f"%%durable no_text\ny = {steps}\nedit = {edit}")
        assert shown.status == "ok", shown.traceback
        return home.value("y")

    assert seen(1) == [f"0.{28 * '3'}", True, "1"]
    home.run("getcontext().prec = 5\nput('2')")
    assert seen(2) == ["0.33333", True, "2"]
    home.run("os.chdir('other'); open('z', 'w').write('3')")
    assert seen(3) == ["0.33333", False, "3"]
    home.run("os.chdir(began_in); getcontext().prec = 28")


def test_what_never_counts_makes_nothing_run_again(home):
    """The notebook and its checkpoints, the store, hidden folders, environments and caches, keys, what the cell itself wrote
    first, files that nobody reads, settings of libraries that it doesn't use."""  # fmt: skip
    folder = home.folder
    for path in (".hidden/x", ".ipynb_checkpoints/x", "venv/x", "cache/x", "nb.ipynb", "unread.csv"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("1")
    (folder / "venv" / "pyvenv.cfg").touch()
    (folder / "cache" / "CACHEDIR.TAG").touch()
    home.run("write(1)\nhere = Path.cwd()\nos.environ['SOME_API_KEY'] = '1'")
    body = (
        "names = [chr(46) + 'hidden', chr(46) + 'ipynb_checkpoints', 'ven' + 'v', 'cach' + 'e']\n"
        "for name in names:\n    subprocess.run(['cat', here / name / 'x'], capture_output=True)\n"
        "subprocess.run(['cat', here / ('nb' + chr(46) + 'ipynb')], capture_output=True)\n"
        "write(5, 'own.parquet'); read(base + '/own.parquet')\n"
        "mentioned = base + '/p.parquet'\n"
        "return [os.environ['SOME_API_KEY'] and 1, os.path.expanduser('~') and 2]"
    )
    define(home, "", body)
    cells = [Cell(home, "never", step=step) for step in (False, True)]
    assert [cell.run() for cell in cells] == [(True, [1, 2])] * 2
    for path in (".hidden/x", ".ipynb_checkpoints/x", "venv/x", "cache/x", "nb.ipynb", "unread.csv"):
        (folder / path).write_text("2")
    (folder / "new.csv").write_text("2")
    home.run(
        "write(2)\nos.environ['SOME_API_KEY'] = '2'\nos.environ['SOME_OTHER'] = '2'\nimport decimal\ndecimal.getcontext().prec = 5"
    )
    assert [cell.run() for cell in cells] == [(False, [1, 2])] * 2, [cell.shown.told for cell in cells]
    home.run("decimal.getcontext().prec = 28")


def test_a_result_that_native_code_wrote_is_made_again_when_it_is_gone_or_changed(home):
    """And a file that the cell deleted is a miss when it is there again."""
    define(home, "", "pq.write_table(pq.read_table(base + '/p.parquet'), f'{base}/out_{1}.parquet')\nreturn 1")
    cell = Cell(home, "native result", step=False)
    made = home.folder / "data" / "out_1.parquet"
    assert [cell.run()[0], cell.run()[0]] == [True, False]
    made.unlink()
    assert [cell.run()[0], made.exists(), cell.run()[0]] == [True, True, False]
    made.write_bytes(b"spoilt")
    assert [cell.run()[0], cell.run()[0]] == [True, False]
    gone = home.folder / "data" / "old.csv"
    define(home, "", "subprocess.run(['rm', '-f', base + '/old.csv'])\nreturn 1")
    gone.touch()
    cell = Cell(home, "native removal", step=False)
    assert [cell.run()[0], gone.exists(), cell.run()[0]] == [True, False, False]
    gone.touch()
    assert [cell.run()[0], gone.exists()] == [True, False]


def test_a_cell_never_stores_what_came_from_a_step_whose_file_has_changed(home):
    """The step is executed anew, and the cell that took its result depends on the file too."""
    home.run("write(1)")
    define(home, "", "return read(base + '/p.parquet')")
    cell = "%%durable whole\ny = await durable.run('look', look)\nz = y[0] * 10"
    for value in (1, 2, 1):
        home.run(f"write({value})")
        home.run(cell)
        assert home.value("y, z") == ([value], value * 10)
    edited = cell + "\nedit = 1"  # the cell runs, its step is restored
    before = ran(home)
    home.run(edited)
    assert (ran(home), home.value("z")) == (before, 10)
    home.run("write(7)")
    home.run(edited)
    assert home.value("y, z") == ([7], 70)


def test_random_numbers_go_on_after_a_restored_step(home):
    """A step that draws from a seeded generator leaves it as it did when it ran."""
    define(home, "", "return random.random()")
    cell = Cell(home, "drawing", step=True)
    home.run("random.seed(3)")
    assert cell.run()[0]
    then = home.value("y, random.random()")
    home.run("random.seed(3)")
    assert not cell.run()[0]
    assert home.value("y, random.random()") == then


# -- in this process ---------------------------------------------------------------------------------------------------


@pytest.fixture
def around():
    return Around({}, Signer(b"k" * 32))


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A watcher of its own, in a folder that is the working directory."""
    if not sys.platform.startswith("linux"):
        pytest.skip("inotify is of Linux")
    monkeypatch.chdir(tmp_path)
    found = inotify.Watcher()
    monkeypatch.setattr(inotify, "_watcher", found)
    return found


def seen(around: Around, do, mentioned=()) -> dict[str, str]:
    """What is seen while `do` is called: how, by name."""
    world, problems = world_of(around, do, mentioned)
    return {file.path: file.how for file in world.files} | dict.fromkeys(problems, "problem")


def world_of(around: Around, do, mentioned=()) -> tuple[ExternalState, list[str]]:
    """What is seen while `do` is called, and why its outcome can't be kept."""
    mentions = mentions_of(mentioned)
    places = places_of(mentions, str(Path.cwd()))
    prepare(places)
    watch = Watch(around, mentions, places, ())
    with watching(watch):
        do()
    return watch.external()


def cat(*paths) -> None:
    subprocess.run(["/bin/cat", *map(str, paths)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def test_what_a_client_holds_is_not_mentioned(tmp_path):
    """Requests on their way, of thousands of other steps for instance. What a step's function and a user's own client hold is."""

    class Mine(httpx.Client):
        folder = "data"

    with httpx.Client(headers={"X-File": "a.csv"}) as plain, durable.Client() as ours, Mine() as mine:
        mine.file = "b.csv"
        step = durable.step(lambda: (plain, ours, mine, "c.csv"))
        found = mentions_of([step]).texts
    assert {"b.csv", "c.csv"} <= set(found)
    assert "a.csv" not in found
    assert len(found) < 40


def test_without_inotify_what_is_mentioned_counts_as_it_stands(tmp_path, monkeypatch, around):
    """On macOS, on a network's file system, where no watch is left: a file by its content, a folder by its listing and the
    files directly in it; the working directory and what is above it say nothing."""  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inotify, "_watcher", None)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.csv", "b.csv", ".hidden"):
        (data / name).touch()
    (tmp_path / "c.csv").touch()
    assert seen(around, lambda: None, [str(data), "c.csv", str(tmp_path), "..", "/"]) == {
        str(data): "listed", str(data / "a.csv"): "read", str(data / "b.csv"): "read", "c.csv": "read",
    }  # fmt: skip


def test_a_full_queue_makes_mentions_count(watched, tmp_path, around, monkeypatch):
    (tmp_path / "a.csv").touch()
    monkeypatch.setattr(watched, "since", lambda _position: None)
    assert seen(around, lambda: None, ["a.csv"]) == {"a.csv": "read"}


def test_no_watches_left_makes_mentions_count(watched, tmp_path, around, monkeypatch):
    (tmp_path / "a.csv").touch()
    monkeypatch.setattr(inotify, "MOST_WATCHES", 0)
    assert seen(around, lambda: None, ["a.csv"]) == {"a.csv": "read"}


def test_what_is_mentioned_and_not_opened_does_not_count_where_that_can_be_seen(watched, tmp_path, around):
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.csv").touch()
    assert seen(around, lambda: cat("b.csv"), ["a.csv", "b.csv"]) == {"b.csv": "read"}


def test_a_circle_of_links_and_a_link_to_a_folder_are_watched_once(watched, tmp_path, around):
    data, elsewhere = tmp_path / "data", tmp_path / "real"
    data.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.csv").touch()
    (data / "round").symlink_to(data)
    (data / "linked").symlink_to(elsewhere)
    (data / "broken").symlink_to(data / "nothing")
    found = seen(around, lambda: cat(data / "linked" / "a.csv"), ["data"])
    assert found == {"data/linked/a.csv": "read"}


def test_a_link_that_leads_to_another_file_is_a_change(watched, tmp_path, around):
    """Native code opens what it leads to, which stays as it was."""
    data = tmp_path / "data"
    data.mkdir()
    for content in "12":
        (data / f"v{content}").write_text(content)
    link = data / "current"
    link.symlink_to(data / "v1")
    world, problems = world_of(around, lambda: cat(data / "v1"), ["data", "data/current"])
    assert ({file.path: file.how for file in world.files}, problems) == ({"data/current": "read", "data/v1": "read"}, [])
    assert world.changes(around) == []
    link.unlink()
    link.symlink_to(data / "v2")
    assert world.changes(around) == ["data/current changed"]


def test_a_folder_that_appears_while_a_cell_runs_is_watched_too(watched, tmp_path, around):
    def made():
        subprocess.run(["/bin/sh", "-c", "mkdir data/new && echo 1 > data/new/x.csv"], check=True)

    (tmp_path / "data").mkdir()
    assert seen(around, made, ["data"])["data/new/x.csv"] == "made"


def test_a_file_that_changes_while_it_is_read_is_told(watched, tmp_path, around):
    path = tmp_path / "a.csv"
    path.write_text("1")

    def changing():
        path.read_text()
        path.write_text("12")

    _, problems = world_of(around, changing)
    assert problems == [f"{path} changed after it had read it"]
    world, problems = world_of(around, path.read_text)
    assert ([(file.path, file.how) for file in world.files], problems) == ([(str(path), "read")], [])


def test_a_file_that_was_written_just_now_is_not_remembered_by_its_times(tmp_path):
    """Within a tick of the clock two contents of one length look alike."""
    path = tmp_path / "a"
    path.write_text("1")
    times = path.stat().st_mtime_ns
    first = content_digest(str(path))
    path.write_text("2")
    os.utime(path, ns=(times, times))
    assert content_digest(str(path)) != first


def test_unreadable_folders_and_files_are_passed_over(watched, tmp_path, around, monkeypatch):
    """As another user's; tests may run as root, whom nothing is refused."""
    (tmp_path / "data" / "closed").mkdir(parents=True)
    (tmp_path / "data" / "a.csv").touch()
    scandir = os.scandir

    def refusing(path=".", *args):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path, *args)

    monkeypatch.setattr(os, "scandir", refusing)
    assert seen(around, lambda: cat("data/a.csv"), ["data"]) == {"data/a.csv": "read"}
    assert state_of("listed", str(tmp_path / "nothing")) == ""


def test_texts_are_collected_up_to_a_limit_and_nobodys_code_runs():
    """Ten thousand texts of at most 1,024 characters; numbers are passed over."""

    class Odd:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was asked for")

        def __iter__(self):
            raise AssertionError("it was iterated")

        __fspath__ = __iter__

    odd = Odd()
    odd.path = Path("kept/in/a/dict")
    loop: list = ["in a circle"]
    loop.append(loop)
    found = mentions_of(
        [odd, loop, list(range(50_000)), "x" * LONGEST_TEXT, "y" * (LONGEST_TEXT + 1), {"deep": ({"er": "text"},)}]
    )
    assert {"kept/in/a/dict", "in a circle", "x" * LONGEST_TEXT, "text"} <= set(found.texts)
    assert "y" * (LONGEST_TEXT + 1) not in found.texts
    assert len(mentions_of([[str(n) for n in range(MOST_TEXTS * 2)]]).texts) == MOST_TEXTS


def test_variables_named_like_secrets_are_told_from_others():
    """MAX_TOKENS is none."""
    secret = (
        "OPENAI_API_KEY HF_TOKEN AWS_SECRET_ACCESS_KEY PGPASSWORD DB_PASS apiKey dbPassword GITHUB_PAT SESSION_COOKIE APP_AUTH"
    )
    plain = "MODEL MAX_TOKENS TOKENIZERS_PARALLELISM MONKEY KEYBOARD PASSENGERS COMPASS OPENAI_BASE_URL AUTHOR PATH COMPATIBLE"
    assert [name for name in secret.split() if not environment.is_secret(name)] == []
    assert [name for name in plain.split() if environment.is_secret(name)] == []


def test_a_huge_environment_costs_little_and_is_no_input_as_a_whole(around, monkeypatch):
    """A copy of it, as it is made for every child process, isn't a look at each variable, but at those that the code names."""
    for n in range(5_000):
        monkeypatch.setenv(f"HUGE_{n}", "x" * 100)
    watch = Watch(around, mentions_of(["MODEL"]), places_of(mentions_of([]), str(Path.cwd())), ())
    began = time.perf_counter()
    with watching(watch):
        copied = {**os.environ, "MORE": "1"}
        os.environ.copy()
        os.getenv("HUGE_7")
    world, _ = watch.external()
    assert len(copied) > 5_000
    assert sorted(world.variables) == ["HUGE_7", "MODEL"]
    assert time.perf_counter() - began < 5
    assert not world.changes(around)
    monkeypatch.setenv("HUGE_7", "y")
    assert world.changes(around) == ["the environment variable HUGE_7 changed"]


def test_a_folder_of_many_files_is_watched_and_listed(watched, tmp_path, around):
    data = tmp_path / "data"
    data.mkdir()
    for n in range(20_000):
        (data / f"{n}.csv").touch()
    assert seen(around, lambda: cat(data / "777.csv"), ["data"]) == {"data/777.csv": "read"}


def test_what_another_program_writes_and_somebody_reads_while_a_step_runs_is_no_input(tmp_path):
    """inotify does not tell who opens a file: a log beside the notebook that somebody follows is read in that moment, too."""
    log, over = tmp_path / "progress", threading.Event()

    def follow():
        while not over.is_set():
            log.read_text()

    with log.open("w") as writer, kernel(tmp_path) as k:
        writer.write("line\n")
        writer.flush()
        follower = threading.Thread(target=follow)
        follower.start()
        try:
            define = "import time\ndef paid():\n    open('ran', 'a').write('x')\n    time.sleep(0.3)"
            cell = "%%durable pays\nawait durable.run('paid', paid)\nassert again"
            assert k.run(f"again = False\n{define}").status == "ok"
            assert k.run(cell).error.startswith("AssertionError")
            writer.write("another\n")
            writer.flush()
            k.restart()
            assert k.run(f"again = True\n{define}").status == "ok"
            assert k.run(cell).status == "ok"
        finally:
            over.set()
            follower.join()
    assert (tmp_path / "ran").read_text() == "x"
