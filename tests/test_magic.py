"""The `%durable` line magic and the options of `%%durable`, in real kernels."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import nbformat
import pytest
from kernels import LOAD, kernel
from nbclient import NotebookClient

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One kernel for the tests that don't hurt theirs."""
    with kernel(tmp_path_factory.mktemp("shared")) as started:
        yield started


def ran(shown) -> bool:
    """Did the durable cell run, as opposed to being restored?"""
    assert shown.status == "ok", shown.traceback
    return any("· running: " in line for line in shown.told)


def why(shown) -> str:
    (line,) = [line for line in shown.told if "· running: " in line]
    return line.partition("· running: ")[2]


def tell(k, command: str) -> str:
    """What a line of `%durable` shows."""
    shown = k.run(command)
    assert shown.status == "ok", (command, shown.stderr, shown.traceback)
    (text,) = shown.told
    return text


def refusal(k, source: str) -> str:
    """The one line with which something is refused."""
    shown = k.run(source)
    assert shown.status == "error"
    line = shown.stderr.strip() or shown.error
    assert "\n" not in line
    assert "Traceback" not in shown.traceback
    return line


# -- looking ----------------------------------------------------------------------------------------------------------


def test_the_table_shows_each_cell_with_what_a_hit_saves(tmp_path):
    with kernel(tmp_path) as k:
        assert "nothing yet" in tell(k, "%durable")
        k.run("%%durable first cell\nx = 1")  # a second word is no name: nothing runs
        k.run("%%durable load\nn = await durable.run('count', len, [1, 2])\nm = n + 1")
        k.run("%%durable 'fit it'\n1/0")
        k.run("@durable.workflow\nasync def order(): return 1\nawait order.start(id='order-42')")
        text = tell(k, "%durable")
    rows = {line.split("  ")[1].strip(): line for line in text.splitlines() if line.startswith("  ")}
    assert "completed" in rows["load"]
    assert re.search(r"completed +\d\d:\d\d:\d\d +1 +2 +\d+ (B|KB) +\S+ ms +\S+ ms", rows["load"]), rows["load"]
    assert "failed" in rows["fit it"]
    assert "completed" in rows["order-42"]
    assert "first" not in rows


def test_it_is_an_html_table_for_a_front_end_and_text_in_a_terminal_and_under_nbclient(tmp_path, shared):
    source = "%%durable <b>\nx = 1"
    shared.run("%%durable '<b>'\nx = 1")
    shown = shared.run("from IPython.display import display\n%durable")
    assert shown.status == "ok"
    message_id = shared.send("%durable runs")
    bundles = []
    while True:
        message = shared.client.get_iopub_msg(timeout=30)
        if message["parent_header"].get("msg_id") != message_id:
            continue
        if message["msg_type"] == "display_data":
            bundles.append(message["content"]["data"])
        if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
            break
    shared.client.get_shell_msg(timeout=30)
    (bundle,) = bundles
    assert "<table>" in bundle["text/html"]
    assert "cell &lt;b&gt;" in bundle["text/html"]
    assert "cell <b>" in bundle["text/plain"]

    cells = ["%load_ext durable_nb", "%%durable a\nx = 1", "%durable"]
    script = f"for cell in {cells!r}: shell.run_cell(cell)\n"
    script = (
        "from IPython.terminal.interactiveshell import TerminalInteractiveShell\nshell = TerminalInteractiveShell()\n" + script
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False
    )
    assert "durable cells in" in done.stdout, done.stdout + done.stderr
    assert "a hit saves" in done.stdout

    sources = (LOAD, source, "%durable plan", "%durable")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "would be restored" in notebook.cells[2].outputs[0]["data"]["text/plain"]
    assert notebook.cells[3].outputs[0]["data"].keys() == {"text/html", "text/plain"}
    assert "widgets" not in notebook.metadata


def test_why_tells_what_changed_since_the_nearest_entry(shared):
    """The helper's diff, a value then and now, a file, and what an earlier text was is told by its length only."""
    k = shared
    folder = k.folder
    (folder / "data.csv").write_text("1\n")
    k.run("def clean(v):\n    # comment\n    return [x for x in v if x > 1]\nlimit, style = 3, 'terse'")
    cell = (
        "%%durable analyse\nrows = clean([1, 2, 3])\ntop = rows[:limit]\nask = f'{style}: go on'\nd = open('data.csv').read()"
    )
    assert why(k.run(cell)) == "first run"
    assert "executed again now, it would be restored" in tell(k, "%durable why analyse")
    assert not ran(k.run(cell))
    assert "restored from the entry of" in tell(k, "%durable why analyse")

    k.run("def clean(v):\n    return [x for x in v if x > 2]\nlimit = 4")
    assert "it would run: helper clean changed, limit changed" in tell(k, "%durable why analyse")
    assert ran(k.run(cell))
    text = tell(k, "%durable why analyse")
    assert "├─ helper clean changed" in text
    assert "-    return [x for x in v if x > 1]" in text
    assert "+    return [x for x in v if x > 2]" in text
    assert "3 → 4" in text
    assert "style" not in text

    assert ran(k.run(cell.replace("go on", "stop")))
    text = tell(k, "%durable why analyse")
    assert "code changed" in text
    assert "+ask = f'{style}: stop'" in text
    assert re.search(r"-ask = f'\{style\}«7 characters #[0-9a-f]+»'", text), text

    (folder / "data.csv").write_text("2\n")
    assert "it would run: data.csv changed" in tell(k, "%durable why analyse")


def test_why_in_a_new_kernel_tells_what_the_newest_entry_was_made_of(tmp_path):
    with kernel(tmp_path) as k:
        k.run("import numpy as np\nlimit, grid = 3, np.zeros((2, 3))")
        k.run("%%durable a\ny = np.sum(grid) * limit")
        k.restart()
        text = tell(k, "%durable why a")
    assert "not executed in this kernel" in text
    assert re.search(r"limit\n.*3\n", text), text
    assert "ndarray 2 x 3 float64" in text
    assert re.search(r"numpy \d", text)


def test_no_text_of_a_cell_or_its_inputs_is_in_the_store_for_the_sake_of_explaining(tmp_path):
    """Neither literals of the cell and its helpers, nor comments, nor the values that they read."""
    with kernel(tmp_path) as k:
        k.run("token = 'swordfish1'\ndef sign(x, key='swordfish2'):\n    'swordfish3'\n    return len(x + key)")
        cell = "%%durable a\n# swordfish4\nn = sign(token)\nm = len(f'swordfish5 {n}')\n"
        cell += "o = dict(password='swordfish6')['password'] > 'a'"
        assert ran(k.run(cell))
        assert ran(k.run(cell.replace("> 'a'", "> 'b'")))
        text = tell(k, "%durable why a")
        assert "'b'" in text
        assert "swordfish6" not in text
    files = [path for path in (tmp_path / ".durable_nb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".cell" for path in files)
    assert not [path for path in files if b"swordfish" in path.read_bytes()]


# -- plan -------------------------------------------------------------------------------------------------------------

NOTEBOOK = {
    "setup": "import random\nx, factor, once = 1, 2, (i for i in range(3))\nrandom.seed(3)",
    "load": "%%durable load\nrows = [1, 2, 3] * factor",
    "count": "%%durable count\nx += len(rows)",
    "grow": "%%durable grow\nrows.append(x)",
    "apart": "%%durable apart\nz = factor + 1",
    "draw": "%%durable draw\nsample = random.sample(range(100), 3)",
    "opaque": "%%durable opaque\nz2 = once is None",
    "old": "%%durable old --ttl 0\nz3 = 1",
}


def plan_of(k) -> dict[str, str]:
    lines = tell(k, "%durable plan").splitlines()
    return {line.split()[0]: line.split()[1] for line in lines[2:] if line.startswith("  ")}


@pytest.mark.parametrize("edit", ["nothing", "factor", "apart", "equal"])
def test_what_plan_says_is_what_run_all_then_does(tmp_path, edit):
    """Cells that change their own inputs, or draw from a global generator, are weighed as these stood then. A cell that reads
    what one before it makes depends on that: where it comes out the same, it is restored."""
    source = dict(NOTEBOOK)
    with kernel(tmp_path) as k:
        for cell in source.values():
            assert k.run(cell).status == "ok"
        if edit == "factor":
            source["setup"] = source["setup"].replace("1, 2", "1, 3")
            k.run("factor = 3")
        elif edit == "apart":
            k.run(source["apart"])
            k.run("%durable forget apart")
            k.run(source["apart"] + " + 1")
            source["apart"] += " + 2"
            k.run(source["apart"])
            k.run("%durable rerun apart")
        elif edit == "equal":
            k.run("%durable rerun load")
        planned = plan_of(k)
        assert planned.keys() == source.keys() - {"setup"}
        if edit in ("nothing", "factor"):
            k.restart()
        else:
            k.run("%reset_selective -f ^(x|rows|z|z2|z3)$")
        done = {name: k.run(cell) for name, cell in source.items()}
    done = {name: ran(shown) for name, shown in done.items()}
    for name, what in planned.items():
        if what != "depends":
            assert done[name] == (what == "run"), (name, planned, done)
    expected = {
        "nothing": {"load": "hit", "count": "hit", "grow": "hit", "apart": "hit"},
        "factor": {"load": "run", "count": "depends", "grow": "depends", "apart": "run"},
        "apart": {"load": "hit", "count": "hit", "grow": "hit", "apart": "run"},
        "equal": {"load": "run", "count": "depends", "grow": "depends", "apart": "hit"},
    }[edit]
    assert planned == {**expected, "draw": "hit", "opaque": "run", "old": "run"}


def test_plan_in_a_new_kernel_compares_the_files_that_cells_read(tmp_path):
    (tmp_path / "data.csv").write_text("1\n")
    with kernel(tmp_path) as k:
        k.run("%%durable reads\nd = open('data.csv').read()")
        k.run("%%durable counts\nn = 1")
        k.restart()
        (tmp_path / "data.csv").write_text("2\n")
        text = tell(k, "%durable plan")
    assert re.search(r"reads +run +data.csv changed", text), text
    assert re.search(r"counts +hit ", text), text


CHAIN = {
    "setup": "n = 3",
    "load": "%%durable load\nrows = list(range(n))",
    "clean": "%%durable clean\nclean = [row + 1 for row in rows]",
    "apart": "%%durable apart\nz = open('data').read()",
    "total": "%%durable total\ntotal = sum(clean) + len(z)",
    "grow": "%%durable grow\nclean.append(total)",
    "fails": "%%durable fails\nclean.index('x')",
    "last": "%%durable last\nlast = clean[-1]",
}


def as_planned(k, cells: dict[str, str]) -> dict[str, str]:
    """What is planned in a new kernel; Run All shows that it was right."""
    k.restart()
    planned = plan_of(k)
    done = {name: k.run(cell) for name, cell in cells.items()}
    ran = {name: any("· running: " in line for line in shown.told) for name, shown in done.items()}
    for name, what in planned.items():
        if what != "depends" and name in ran:
            assert ran[name] == (what == "run"), (name, planned, ran)
    return planned


@pytest.mark.parametrize("told", [False, True], ids=["headless", "with a notebook's file"])
def test_plan_right_after_a_restart_says_what_run_all_then_does(tmp_path, told):
    """In the notebook's order; also where cells depend on each other, and some were executed apart from the rest."""
    cells = dict(CHAIN)
    file = tmp_path / "n.ipynb"

    def save() -> None:
        code = [nbformat.v4.new_code_cell(cell) for cell in cells.values()]
        nbformat.write(nbformat.v4.new_notebook(cells=code), file)

    (tmp_path / "data").write_text("1")
    with kernel(tmp_path, env={"JPY_SESSION_NAME": str(file)} if told else {}) as k:
        for cell in cells.values():
            k.run(cell)
        save()
        hits = dict.fromkeys(("load", "clean", "apart", "total", "grow"), "hit")
        whole = {**hits, "fails": "run", "last": "hit"}
        planned = as_planned(k, cells)
        assert planned == whole
        assert list(planned) == list(whole), "not in the notebook's order"
        assert list(as_planned(k, {name: cells[name] for name in ("setup", "load", "apart", "clean")})) == list(whole)

        (tmp_path / "data").write_text("22")
        depends = {"total": "depends", "grow": "depends", "last": "depends"}
        assert as_planned(k, {name: cells[name] for name in ("setup", "load", "clean")}) == {**whole, "apart": "run", **depends}
        (tmp_path / "data").write_text("1")

        cells["load"] += " + [7]"
        k.run(cells["setup"])
        k.run(cells["load"])  # and nothing of what reads it
        save()
        assert as_planned(k, cells) == {**whole, "clean": "depends", **depends}
        assert as_planned(k, cells) == whole
        text = tell(k, "%durable plan")
        assert re.search(r"1 cell would run; 6 cells would be restored, which saves \d+ ms", text), text
        if told:
            cells["apart"] += " + '!'"
            cells["new"] = "%%durable new  # not yet executed\nx = 1"
            save()
            assert as_planned(k, cells) == {**whole, "apart": "run", **depends, "new": "run"}


# -- doing ------------------------------------------------------------------------------------------------------------


def test_rerun_counts_for_the_next_execution_and_no_further(shared):
    k = shared
    cell = "%%durable again\nkey = await durable.run('key', durable.idempotency_key)"
    k.run(cell)
    first = k.value("key")
    assert "runs anew" in tell(k, "%durable rerun again")
    assert why(k.run(cell)) == "asked for by %durable rerun"
    assert k.value("key") != first, "its steps were not run anew"
    assert not ran(k.run(cell))


def test_forget_drops_a_cells_entries_steps_and_runs_and_no_others(shared):
    k = shared
    cell = "%%durable NAME\nopen('paid-NAME', 'a').write('x\\n')\nkey = await durable.run('pay', durable.idempotency_key)"
    one, other = cell.replace("NAME", "one"), cell.replace("NAME", "one-b")
    k.run(other)
    k.run(one)
    key = k.value("key")
    assert tell(k, "%durable forget one") == "one · forgot 1 entry, 1 step and 1 run; variables in the kernel stay"
    assert why(k.run(one)) == "first run"
    assert k.value("key") != key, "what the far end has seen would not be charged anew"
    assert not ran(k.run(one))
    assert not ran(k.run(other))


def test_forget_is_refused_while_the_cell_runs_in_another_kernel(tmp_path):
    """And nothing of it is lost then; once it has stopped, it can be forgotten."""
    cell = "%%durable slow\nn = await durable.run('n', len, [1])\nopen('reached', 'a').write('x\\n')\n"
    cell += "await durable.sleep('s', 600)"
    with kernel(tmp_path) as one, kernel(tmp_path) as two:
        sent = one.send(cell)
        one.wait_until(tmp_path / "reached")
        refused = refusal(two, "%durable forget slow")
        assert "cell 'slow' is being run by process" in refused
        assert "nothing of it was forgotten" in refused
        one.interrupt()
        one.wait(sent)
        assert "forgot 0 entries, 1 step and 1 run" in tell(two, "%durable forget slow")
        assert "no durable cell 'slow'" in refusal(two, "%durable forget slow")


def test_runs_of_workflows_are_shown_resumed_and_cancelled(tmp_path):
    code = """
    @durable.workflow
    async def order(path):
        await durable.run('charge', len, [1])
        await durable.sleep('a while', 600)
    """.replace("\n    ", "\n")
    with kernel(tmp_path) as k:
        k.run(code)
        k.run("run = order.start('x', id='order-42')")
        k.run("import asyncio\nwhile len(run.steps) < 2: await asyncio.sleep(0.01)")
        k.restart()
        assert "order-42 · order · interrupted" in tell(k, "%durable show order-42")
        assert "is not defined here" in tell(k, "%durable resume")
        k.run(code)
        assert tell(k, "%durable resume order-42") == "order-42 · resumes (order)"
        k.run("import asyncio\nrun = durable.get_run('order-42')\nwhile run.status != 'sleeping': await asyncio.sleep(0.01)")
        assert k.run("run.result(timeout=0.1)").error == "TimeoutError: the run 'order-42' is sleeping after 100 ms; it goes on"
        steps = tell(k, "%durable show order")
        assert re.search(r"charge +run +completed", steps), steps
        assert "is being cancelled" in tell(k, "%durable cancel order-42")
        k.run("import asyncio\nwhile run.status != 'cancelled': await asyncio.sleep(0.01)")
        assert "is cancelled already" in tell(k, "%durable cancel order-42")
        assert re.search(r"order-42 +order +cancelled", tell(k, "%durable runs"))


def test_gc_and_store_tell_what_lies_in_it(shared):
    k = shared
    for n in range(3):
        k.run(f"%%durable big\nb = b'{n}' * 100_000")
    assert re.search(r"size +\d", tell(k, "%durable store"))
    text = tell(k, "%durable gc --max-size 100KB")
    assert "2 entries of big" in text
    assert "that is more than 100 KB" in text
    assert not ran(k.run("%%durable big\nb = b'2' * 100_000"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("%durable pln", r"unknown command 'pln', so nothing was done; did you mean 'plan'\?"),
        ("%durable xyz", r"there are plan, why, .*, resume, restart, fork, cancel, delete, notify"),
        ("%durable why lode", r"no durable cell 'lode', so nothing was done; did you mean 'lode1'\?"),
        ("%durable forget '(without a name)'", r"a cell without a name can't be told from others here: name it"),
        ("%durable rerun", r"write '%durable rerun NAME'; nothing was done"),
        ("%durable plan now", r"write '%durable plan'; nothing was done"),
        ("%durable show nothing-like-it", r"no run or cell 'nothing-like-it' in the store"),
        ("%durable cancel lode1", r"is a run of the cell 'lode1': interrupt the kernel"),
        ("%durable resume lode1", r"is a run of the cell 'lode1': run the cell again"),
        ("%durable gc --max-size lots", r"'lots' is not a size: write it like '500MB' or '2GB'; nothing was removed"),
        ("%durable gc 2GB", r"write '%durable gc \[--max-size 2GB\]'; nothing was removed"),
        ("%durable why 'lode", r"No closing quotation; nothing was done"),
        ("%%durable lode1 --tll 7d\nx = 2", r"unknown option '--tll', did you mean '--ttl'\?; nothing was run"),
        ("%%durable lode1 --ttl\nx = 2", r"--ttl needs a duration, as in '--ttl 7d'; nothing was run"),
        ("%%durable lode1 --ttl week\nx = 2", r"--ttl: 'week' is not a duration"),
        ("%%durable lode1 --ignore --quiet\nx = 2", r"--ignore needs names of variables"),
        ("%%durable lode1 --skip a-b\nx = 2", r"--skip: 'a-b' is not a variable's name; nothing was run"),
        ("%%durable lode1 --extra '1 +'\nx = 2", r"--extra: '1 \+' is not an expression .*; nothing was run"),
        ("%%durable lode1 --extra missing\nx = 2", r"--extra: 'missing' raises NameError: .*; nothing was run"),
    ],
)
def test_a_slip_is_told_in_one_line_and_loses_nothing(shared, line, said):
    shared.run("%%durable lode1\nx = 1")
    assert re.search(said, refusal(shared, line))
    assert not ran(shared.run("%%durable lode1\nx = 1"))


def test_unloading_takes_the_line_magic_away(tmp_path):
    with kernel(tmp_path) as k:
        k.run("%unload_ext durable_nb")
        assert "`%durable` not found" in k.run("%durable").stderr


# -- options ----------------------------------------------------------------------------------------------------------


def test_an_entry_older_than_its_ttl_is_a_miss_and_says_so(shared):
    k = shared
    cell = "%%durable rates --ttl 7d\nr = 1"
    assert ran(k.run(cell))
    assert not ran(k.run(cell))
    k.run("import time\nreal = time.time\ntime.time = lambda: real() + 8 * 86400")
    assert why(k.run(cell)) == "its entry is 8 d old, and --ttl says 7 d"
    assert not ran(k.run(cell))
    k.run("time.time = real")
    assert not ran(k.run("%%durable rates\nr = 1"))


def test_a_step_older_than_its_ttl_runs_anew(shared):
    """The cell's other steps don't, and its key is another: the far end is asked anew."""
    k = shared
    k.run("def fetch(): return durable.idempotency_key()\ndef pay(): return durable.idempotency_key()")
    cell = "%%durable fetching\nf = await durable.run('fetch', durable.step(fetch, ttl='7d'))\n"
    cell += "p = await durable.run('pay', pay)\n1/0"
    k.run(cell)
    first = k.value("(f, p)")
    k.run(cell)
    assert k.value("(f, p)") == first
    k.run("import time\nreal = time.time\ntime.time = lambda: real() + 8 * 86400")
    k.run(cell)
    second = k.value("(f, p)")
    assert second[0] != first[0]
    assert second[1] == first[1]
    k.run(cell)
    assert k.value("(f, p)") == second
    k.run("time.time = real")


def test_an_ignored_name_does_not_count_in_the_cell_nor_in_its_helpers(shared):
    k = shared
    k.run(
        "log, feed, level = [], (n for n in 'ab'), 1\n"
        "def noisy(x):\n    if feed is not None:\n        log.append(x)\n    return x * level"
    )
    plain = "%%durable quiet\ny = noisy(2)"
    k.run(plain)
    assert "(--ignore feed accepts it)" in why(k.run(plain))
    cell = "%%durable quiet --ignore log,feed\ny = noisy(2)"
    assert ran(k.run(cell))
    assert not ran(k.run(cell))
    k.run("log, feed = ['other'], (n for n in 'a')")
    assert not ran(k.run(cell))
    k.run("level = 3")
    assert why(k.run(cell)) == "level changed"
    assert k.value("y") == 6
    shown = k.run("%%durable quiet --ignore log,feed,fed\ny = noisy(2)")
    assert "--ignore fed: neither the cell nor a helper of it reads that name" in shown.told[-1]


def test_a_skipped_name_is_not_stored_and_wanted_again_it_is_made_again(tmp_path):
    with kernel(tmp_path) as k:
        cell = "%%durable db --skip con\nimport sqlite3\nfor _ in '1': con = sqlite3.connect(':memory:')\nn = 41 + 1"
        assert ran(k.run(cell))
        k.restart()
        shown = k.run(cell)
        assert not ran(shown)
        assert "without con, as --skip says" in shown.told[-1]
        assert k.value("n, 'con' in globals()") == (42, False)
        whole = k.run(cell.replace(" --skip con", ""))
        assert why(whole) == "its entry is without con, which --skip left out"
        assert "con (Connection) can't be pickled" in whole.told[-1]
        assert "--skip con" in whole.told[-1]
        assert k.value("con.execute('select 1').fetchone()") == (1,)


def test_a_name_that_was_bound_before_and_is_skipped_is_left_alone_by_a_hit(shared):
    k = shared
    cell = "%%durable partly --skip keep\nkeep = 'new'\ny = 1"
    k.run("keep = 'old'")
    k.run(cell)
    assert k.value("keep") == "new"
    k.run("keep = 'mine'")
    assert not ran(k.run(cell))
    assert k.value("keep") == "mine"


def test_an_input_that_is_ignored_from_now_on_is_not_said_to_be_gone(shared):
    shared.run("heed = 1")
    shared.run("%%durable heeding\nheeded = heed")
    assert why(shared.run("%%durable heeding --ignore heed\nheeded = heed")) == "heed counts no more"


def test_a_forgotten_await_is_told(shared):
    shared.run("async def later(): return 1")
    shown = shared.run("%%durable forgetful\nn = later()")
    assert "not stored: n (coroutine) can't be pickled: 'await' is missing" in shown.told[-1]


def test_an_extra_expression_is_part_of_the_key(shared):
    k = shared
    k.run("model = {'version': 1}")
    cell = "%%durable scored --extra \"model['version']\"\ns = 1"
    assert ran(k.run(cell))
    assert not ran(k.run(cell))
    k.run("model['version'] = 2")
    assert why(k.run(cell)) == "what --extra gives changed"
    k.run("model['version'] = 1")
    assert not ran(k.run(cell))


def test_identify_says_how_an_opaque_object_counts(shared):
    """By what the function gives: plain data of the same content is the same client; what is opaque itself is refused."""
    k = shared
    k.run("class Client:\n    def __init__(self, url):\n        self.url, self.feed = url, (n for n in url)\nc = Client('a')")
    cell = "%%durable asks\nu = c.url"
    k.run(cell)
    assert "can't be compared" in why(k.run(cell))
    k.run("durable.identify(Client, lambda client: {'url': client.url})")
    assert ran(k.run(cell))
    k.run("c = Client('a')")
    assert not ran(k.run(cell))
    k.run("c = Client('b')")
    assert why(k.run(cell)) == "c changed"
    assert "Client, by its type and what is known of its configuration" in tell(k, "%durable why asks")
    k.run("durable.identify(Client, lambda client: client.feed)")
    assert "can't be compared" in why(k.run(cell))
    assert "give a class" in k.run("durable.identify(c, len)").error


def test_a_package_of_another_version_is_told_when_a_cell_is_restored(shared):
    """It is no miss: functions of installed packages count by name."""
    k = shared
    k.run("import numpy as np")
    cell = "%%durable summed\ns = np.sum([1, 2])"
    k.run(cell)
    k.run("import importlib.metadata as m, durable_nb._fingerprint._owners as c\nreal = m.version\nc.version.cache_clear()")
    k.run("m.version = lambda name: '0.0.1' if name == 'numpy' else real(name)")
    shown = k.run(cell)
    k.run("m.version = real\nc._version.cache_clear()")
    assert re.search(r"restored .*stored with another version: numpy \S+ → 0.0.1; --rerun runs it anew", shown.told[-1])


def test_why_tells_what_differs_now_before_the_cell_is_executed_again(tmp_path):
    with kernel(tmp_path) as k:
        k.run("rate = 2\ndef clean(v):\n    return v * rate")
        k.run("%%durable prepare\ntidy = clean(3)")
        k.run("rate = 3\ndef clean(v):\n    return v + rate")
        told = tell(k, "%durable why prepare")
        assert "executed again now, it would run: helper clean changed, rate changed" in told
        assert "+    return v + rate" in told
        assert "2 → 3" in told


def test_the_listing_says_how_a_run_stands_as_the_run_itself_does(shared):
    shared.run("import asyncio\n@durable.workflow\nasync def long_one():\n    await durable.sleep('long', '1h')")
    shared.run("run = long_one.start(id='long-one')\nwhile run.status != 'sleeping': await asyncio.sleep(0.01)")
    (line,) = [line for line in tell(shared, "%durable runs").splitlines() if "long-one" in line]
    assert "sleeping" in line
    shared.run("run.cancel()\nwhile run.status != 'cancelled': await asyncio.sleep(0.01)")
    (line,) = [line for line in tell(shared, "%durable runs").splitlines() if "long-one" in line]
    assert "cancelled" in line


def test_what_the_first_durable_cell_needs_is_imported_while_the_kernel_is_idle(tmp_path):
    """Loading waits for none of it."""
    loaded = "[name in __import__('sys').modules for name in ('durable_nb._ipython.cell', 'durable_nb._engine.workflows')]"
    with kernel(tmp_path, load=False) as k:
        first = k.run("%load_ext durable_nb\nimport sys\n'durable_nb._fingerprint' in sys.modules")
        assert first.result == "False"
        deadline = time.monotonic() + 30
        while not all(k.value(loaded)):
            assert time.monotonic() < deadline


def test_when_an_interrupted_sleep_wakes_is_told_wherever_it_is_listed(tmp_path):
    """With the word that nothing wakes by itself; after a kill as after Stop."""
    cell = "%%durable nap\nawait durable.sleep('rest', '2h')"
    with kernel(tmp_path) as k:
        sent = k.send(cell)
        listed = [sys.executable, "-c", "from durable_nb._cli import main; raise SystemExit(main(['ls']))"]

        def ls() -> str:
            return subprocess.run(listed, cwd=tmp_path, env=k.env, capture_output=True, text=True, check=False).stdout

        deadline = time.monotonic() + 30
        while not (asleep := re.search(r"sleeping.* (\d\d:\d\d:\d\d|[\d-]+ \d\d:\d\d)$", ls(), re.MULTILINE)):
            assert time.monotonic() < deadline
        wake = asleep[1]
        k.interrupt()
        stopped = k.wait(sent)
        assert f"next wake {wake}: run the cell again to resume" in stopped.told[-1]
        assert "until " in stopped.views[-1]["text/plain"]
        for restarted in (False, True):
            for command in ("%durable", "%durable runs", "%durable show nap"):
                assert f"{wake}, no process is running this" in tell(k, command), (command, restarted)
            assert f"resumes from where it stopped, next wake {wake}" in tell(k, "%durable plan")
            if not restarted:
                k.kill()
        assert f"{wake}, no process is running this" in ls()
