"""The golden rule, in real kernels: after a durable cell, hit or miss, the notebook is as plain execution leaves it."""

from __future__ import annotations

import pytest
from kernels import Kernel, kernel
from twin_sessions import comparing

pytestmark = pytest.mark.kernel

COUNT = "open('ran', 'a').write('x\\n')\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A kernel that is restarted by the tests that need a fresh one."""
    with kernel(tmp_path_factory.mktemp("golden")) as started:
        yield started


def runs(k: Kernel, cell: str) -> bool:
    """Execute a durable cell; did its body run?"""
    ran = k.folder / "ran"
    before = len(ran.read_text()) if ran.exists() else 0
    magic, _, body = cell.partition("\n")
    shown = k.run(f"{magic}\n{COUNT}{body}")
    assert shown.status == "ok", shown.traceback
    return (len(ran.read_text()) if ran.exists() else 0) > before


def test_a_changed_data_file_is_read_again_and_the_old_one_is_remembered(home):
    """Opened by Python, or named by the cell for a reader that Python doesn't see."""
    opened = "%%durable opened\ny = open('data.txt').read()"
    native = "%%durable native\nlines = !cat data.txt\nz = list(lines)"
    for content, expected in (("one", True), ("one", False), ("two", True), ("one", False), ("two", False)):
        (home.folder / "data.txt").write_text(content)
        home.restart()
        assert (runs(home, opened), runs(home, native)) == (expected, expected), content
        assert home.value("y, z") == (content, [content])


def test_a_file_that_appears_was_an_input_when_it_was_not_there(home):
    """`except FileNotFoundError` saw something too."""
    cell = "%%durable missing\ntry:\n    w = open('later.txt').read()\nexcept FileNotFoundError:\n    w = None"
    assert (runs(home, cell), runs(home, cell), home.value("w")) == (True, False, None)
    (home.folder / "later.txt").write_text("here")
    assert (runs(home, cell), home.value("w")) == (True, "here")


def test_a_result_file_that_is_gone_or_changed_is_made_again(home):
    """Appending isn't checked: the count above is an append."""
    cell = "%%durable made\nwith open('made.txt', 'w') as f:\n    n = f.write('made')"
    made = home.folder / "made.txt"
    assert (runs(home, cell), runs(home, cell)) == (True, False)
    made.unlink()
    assert (runs(home, cell), made.read_text()) == (True, "made")
    made.write_text("spoilt")
    assert (runs(home, cell), made.read_text()) == (True, "made")


def test_a_folders_listing_is_an_input(home):
    """A new file in it is a change; importing in the cell lists no folder of the user's."""
    (home.folder / "many").mkdir()
    (home.folder / "many" / "a").touch()
    cell = "%%durable listed\nimport os, colorsys\nnames = sorted(os.listdir('many'))"
    assert (runs(home, cell), runs(home, cell)) == (True, False)
    (home.folder / "many" / "b").touch()
    assert (runs(home, cell), home.value("names")) == (True, ["a", "b"])


@pytest.mark.parametrize("module", ["random", "np.random"])
def test_a_seeded_generator_goes_on_where_the_cell_left_it(home, module):
    """Its state is an input, and after a hit the next draw is the one that would have come."""
    cell = f"%%durable draw_{module[:2]}\ny = {module}.random()"

    def draws(seed):
        home.restart()
        home.run(f"import random, numpy as np\n{module}.seed({seed})")
        ran = runs(home, cell)
        return ran, home.value(f"float(y), float({module}.random())")

    ran, first = draws(0)
    assert ran
    assert draws(0) == (False, first)
    ran, other = draws(1)
    assert ran
    assert other != first


def test_an_unseeded_generator_is_no_input(home):
    """What it gave is kept, as the clock's time would be."""
    cell = "%%durable frozen\nimport random, time\ny = random.random(), time.time()"
    home.restart()
    assert runs(home, cell)
    before = home.value("y")
    home.restart()
    assert (runs(home, cell), home.value("y")) == (False, before)


IN_PLACE = {
    "list": ("items = [1]\nalias = items\nbox = {'l': items}", "items.append(2)\nn = len(items)", "items, alias is items, box['l'] is items, n"),
    "nested": ("rows = [[1], {'k': [2]}]\ninner = rows[1]['k']", "rows[1]['k'].append(3)\nrows.append(4)", "rows, inner is rows[1]['k'], inner"),
    "set and deque": ("import collections\ns = {1}\nd = collections.deque([1], maxlen=3)", "s.add(2); d.extend([2, 3, 4])", "sorted(s), list(d), d.maxlen"),
    "default dict": ("import collections\nc = collections.defaultdict(list)\nk = c", "c['a'].append(1)\nc['b']", "dict(c), k is c, c.default_factory is list"),
    "instance": ("class P:\n    def __init__(self): self.x = [1]\np = P()\nx = p.x", "p.x.append(2)\np.y = p", "p.x, p.x is x, p.y is p"),
    "array": ("import numpy as np\na = np.zeros(4)\nb = a", "a[1] = 5\na *= 2", "a.tolist(), b is a"),
    "generator": ("import numpy as np\nrng = np.random.default_rng(0)", "x = rng.random()", "float(x), float(rng.random())"),
    "column": ("import pandas as pd\ndf = pd.DataFrame({'a': [1, 2]})\nalias = df", "df['b'] = df.a * 2\ndf.attrs['src'] = 'db'", "df.to_dict('list'), alias is df, df.attrs"),
    "attributes of a frame": ("import pandas as pd\ndf = pd.DataFrame({'a': [1, 2]})\ndf.attrs['u'] = 1\nheld = df.attrs", "df['b'] = 1\ndf.attrs['v'] = 2\nview = df[['a']]\nown = view.attrs", "df.attrs, held is df.attrs, held, own is view.attrs, own"),
    "cell of a frame": ("import pandas as pd\ndf = pd.DataFrame({'a': [1, 2], 'b': ['x', 'y']})", "df.loc[0, 'a'] = 9\ndf.loc[1, 'b'] = 'z'", "df.to_dict('list')"),
    "rows of a frame": ("import pandas as pd\ndf = pd.DataFrame({'a': [3, 1, 2]})", "df.sort_values('a', inplace=True)\ndf.drop(index=0, inplace=True)", "df.a.tolist(), df.index.tolist()"),
    "series": ("import pandas as pd\ns = pd.Series([1, 2], name='n')\nt = s", "s[0] = 7\ns.name = 'm'", "s.tolist(), t is s, s.name"),
    "shared with a new name": ("rows = [[1], [2]]", "first = rows[0]\nboth = (rows, first)\nfirst.append(5)", "first is rows[0], both[0] is rows, rows"),
}  # fmt: skip
"""What happened before, what the cell does, what is looked at."""


@pytest.mark.parametrize(("before", "body", "looked_at"), IN_PLACE.values(), ids=IN_PLACE.keys())
def test_an_earlier_object_is_changed_for_all_who_hold_it(home, before, body, looked_at):
    """Restored as it is run: in place, nothing else touched, parts of earlier objects still shared."""
    home.restart()
    home.run(before)
    home.run(body)
    plain = home.value(looked_at)
    for ran in (True, False):
        home.restart()
        home.run(before)
        name = "".join(filter(str.isalnum, body))[:20]
        assert runs(home, f"%%durable change_{name}\n{body}") is ran
        assert home.value(looked_at) == plain


def test_an_object_of_which_not_all_can_be_told_keeps_the_cell_from_being_stored(home):
    """It runs again instead."""
    for _ in range(2):
        home.restart()
        home.run("import itertools\ns = itertools.count(3)")
        assert runs(home, "%%durable in_c\nx = next(s)")
        assert home.value("x, next(s)") == (3, 4)


def test_a_name_bound_to_an_equal_object_is_restored_whatever_it_held_before(home):
    """Small integers are one object: identity can't tell that the cell bound the name."""
    cell = "%%durable same\ny = 7"
    home.run("y = 7")
    assert runs(home, cell)
    home.run("y = 'other'")
    assert (runs(home, cell), home.value("y")) == (False, 7)


def test_a_name_that_was_left_alone_keeps_what_it_holds(home):
    """Bound on another path, or by a helper to the very object it held: what is restored must not be an earlier value of it."""
    cell = "%%durable maybe\nif flag:\n    left = 5"
    helper = "def put():\n    global held\n    held = 5"
    other = "%%durable helper\nput()"
    home.run(f"flag = False\nleft = 1\nheld = 5\n{helper}")
    assert (runs(home, cell), runs(home, other)) == (True, True)
    home.run("left = 10\nheld = 7")
    runs(home, cell)
    runs(home, other)
    assert home.value("left, held") == (10, 5)
    for _ in range(2):
        home.restart()
        home.run("flag = False\nleft = 1\n")
        assert not runs(home, cell)
        assert home.value("left") == 1


def test_a_loop_leaves_its_variable_and_is_restored_in_the_same_kernel(home):
    """What the cell itself left behind is no new input of it."""
    cell = "%%durable loop\nsquares = []\nfor i in range(4):\n    squares.append(i * i)"
    home.restart()
    assert (runs(home, cell), runs(home, cell)) == (True, False)
    assert home.value("i, squares") == (3, [0, 1, 4, 9])


def test_a_cell_that_sets_the_process_up_runs_each_time(home):
    """sys.path, the working directory: a restored cell would not have set them."""
    home.run("import sys, os")
    assert runs(home, "%%durable path\nsys.path.append('lib')")
    home.restart()
    home.run("import sys, os")
    assert runs(home, "%%durable path\nsys.path.append('lib')")
    assert home.value("'lib' in sys.path") is True


def test_a_cell_that_looks_names_up_dynamically_runs(home):
    """What it reads can't be told from its code."""
    for value in (1, 2):
        home.run(f"hidden = {value}")
        assert runs(home, "%%durable dynamic\ny = globals()['hidden']")
        assert home.value("y") == value


def test_a_helper_edited_two_levels_down_is_an_input_and_a_comment_is_none(home):
    """Code counts by what it does, transitively."""
    helpers = "def inner(x):\n    return x + {}  # {}\ndef outer(x):\n    return inner(x) * 2"
    cell = "%%durable deep\ny = outer(3)"
    home.run(helpers.format(1, "one"))
    assert (runs(home, cell), home.value("y")) == (True, 8)
    home.run(helpers.format(1, "a comment"))
    assert not runs(home, cell)
    home.run(helpers.format(2, "one"))
    shown = home.run(f"{cell.splitlines()[0]}\n{COUNT}{cell.splitlines()[1]}")
    assert shown.told[0] == "deep · running: helper inner changed"
    assert home.value("y") == 10


def test_a_closed_file_comes_back_closed(home):
    """`with open(...) as f` leaves one behind, which must not keep the cell from being stored."""
    (home.folder / "text.txt").write_text("text")
    cell = "%%durable closed\nwith open('text.txt') as f:\n    t = f.read()\nwith open('text.txt', 'rb') as g:\n    pass"
    for ran in (True, False):
        home.restart()
        assert runs(home, cell) is ran
        assert home.value("t, f.closed, f.name, f.mode, f.encoding, type(f).__name__, g.closed, g.name, g.mode") == (
            "text", True, "text.txt", "r", "UTF-8", "TextIOWrapper", True, "text.txt", "rb",
        )  # fmt: skip


def test_a_name_that_the_cell_and_its_helper_read_and_rebind_is_no_change_in_place(home):
    """Bound anew, a helper sees the new object; the old one is as it was."""
    cell = "%%durable rebound\ny = helper() + rate\nrate = rate * 2\nz = helper()"
    for ran in (True, False):
        home.restart()
        home.run("rate = 10\ndef helper(): return rate")
        assert runs(home, cell) is ran
        assert home.value("y, z, rate") == (20, 20, 20)


def test_an_unpicklable_variable_is_named_and_the_cell_runs_again(home):
    """One line names it, and what to do about what was paid for; steps are said to be kept only where there are some."""
    shown = home.run("%%durable lines\nlines = (n for n in range(3))\ny = 5")
    assert "not stored: lines (generator) can't be pickled; leave it out with --skip lines, or put" in shown.told[-1]
    paid = "%%durable paid\nz = await durable.run('pay', pow, 2, 3)\nlines = (n for n in range(3))"
    for _ in range(2):
        shown = home.run(paid)
        assert (
            "not stored: lines (generator) can't be pickled; its steps are kept; leave it out with --skip lines"
            in shown.told[-1]
        )
    assert "1 of 1 step restored" in shown.told[-1]


def test_class_instances_and_functions_of_the_cell_come_back_live(home):
    """Classes of the cell are one object again, functions see the notebook's names."""
    cell = (
        "%%durable live\nclass P:\n    def v(self): return k\np = P()\nq = [p, P]\n"
        "def f(): return k + 1\n"
        "def counter():\n    n = 0\n    def inc():\n        nonlocal n\n        n += 1\n"
        "        return n\n    return inc\nc = counter(); _ = c()"
    )
    for ran in (True, False):
        home.restart()
        home.run("k = 10")
        assert runs(home, cell) is ran
        assert home.value("type(p) is P, q[1] is P, q[0] is p, p.v(), f(), f.__globals__ is globals(), c()") == (
            True, True, True, 10, 11, True, 2,
        )  # fmt: skip


def test_what_is_imported_comes_back_from_its_module(home):
    """Not as a frozen copy: environ, sys.path, the global generators' methods, submodules."""
    cell = "%%durable imports\nfrom os import environ\nfrom sys import path\nfrom random import random, seed\nimport xml.dom.minidom"
    look = "environ is os.environ, path is sys.path, random.__self__ is r._inst, bool(xml.dom.minidom.parseString)"
    for ran in (True, False):
        home.restart()
        home.run("import os, sys, random as r")
        assert runs(home, cell) is ran
        assert home.value(look) == (True, True, True, True)


def test_arrays_that_share_memory_keep_sharing_it(home):
    """A view must not come back as a copy."""
    cells = ("%%durable view\na = np.arange(10.)\nb = a[2:5]", "%%durable row\nfirst = grid[0]")
    for _ in range(2):
        home.restart()
        home.run("import numpy as np\ngrid = np.arange(10).reshape(2, 5)")
        for cell in cells:
            runs(home, cell)
        home.run("b[:] = 0\nfirst[:] = 0")
        assert home.value("a[2:5].tolist(), grid[0].tolist()") == ([0, 0, 0], [0] * 5)


def test_a_function_restored_from_a_cell_is_the_function_it_was(home):
    """Its source comes along, so that steps which call it are known again."""
    define = "%%durable define\ndef charge(x):\n    open('charged', 'a').write('x\\n')\n    return x"
    pay = "%%durable pay\npaid = await durable.run('charge', charge, 5)\nraise ValueError('later')"
    for ran in (True, False):
        home.restart()
        assert runs(home, define) is ran
        assert home.run(pay).error == "ValueError: later"
    assert (home.folder / "charged").read_text() == "x\n"


@pytest.mark.parametrize(
    ("before", "body", "change"),
    [
        ("import pandas as pd\ndf = pd.DataFrame({'a': [1, 2, 3]})\nthr = 1", "y = len(df.query('a > @thr'))", "thr = 2"),
        ("c = 1", "def inc():\n    global c\n    c += 1\ninc()\ny = c", "c = 10"),
        (
            "import os",
            "y = os.path.exists('shows/up.txt')",
            "os.makedirs('shows', exist_ok=True); open('shows/up.txt', 'w').close()",
        ),
        ("def look(n):\n    return eval(n)\nk = 1", "y = look('k')", "k = 2"),
        ("open('lines.txt', 'w').write('1\\n2\\n')\nfh = open('lines.txt')", "y = fh.readline()", "pass"),
    ],
    ids=["query", "augmented in a function", "exists", "eval in a helper", "open file"],
)
def test_what_a_cell_reads_by_a_side_door_is_an_input(home, before, body, change):
    """The second execution sees what plain execution would."""
    home.restart()
    home.run(before)
    cell = f"%%durable side_{''.join(filter(str.isalnum, body))[:16]}\n{body}"
    runs(home, cell)
    home.run(change)
    runs(home, cell)
    durable_sees = home.value("y")
    home.restart()
    home.run(before)
    home.run(body)
    home.run(change)
    home.run(body)
    if "exists" not in body:
        assert durable_sees == home.value("y")
    else:
        assert durable_sees is True


def test_print_options_and_nested_classes_hold(home):
    """numpy's print options are a context variable; an instance of a nested class is one of the live class."""
    home.restart()
    home.run("import numpy as np\nclass Outer:\n    class Inner: pass")
    assert runs(home, "%%durable options\nnp.set_printoptions(precision=2)")
    assert home.value("str(np.array([1.23456]))") == "[1.23]"
    cell = "%%durable nested\nx = Outer.Inner()"
    assert runs(home, cell)
    home.run("del x")
    assert (runs(home, cell), home.value("type(x) is Outer.Inner")) == (False, True)


def test_a_step_that_read_a_file_is_executed_again_when_the_file_has_changed(home):
    """And a cell whose step was restored depends on what the step had read."""
    data = home.folder / "config.txt"
    home.run("def read():\n    open('reads', 'a').write('x\\n')\n    return open('config.txt').read()")
    cell = "%%durable config\nv = await durable.run('read', read){}"
    for content, edit, reads in (
        ("one", "", 1),
        ("one", "\nw = 1", 1),
        ("two", "", 2),
        ("two", "\nw = 2", 2),
        ("three", "\nw = 2", 3),
    ):
        data.write_text(content)
        assert home.run(cell.format(edit)).status == "ok"
        assert home.value("v") == content
        assert len((home.folder / "reads").read_text().splitlines()) == reads, (content, edit)


def test_a_step_that_changes_what_it_was_given_says_so_and_its_restored_change_is_never_stored(home):
    """The step's result is kept; the cell that lacks the change is not taken for a complete one."""
    cell = "%%durable given\nd = await durable.run('clean', clean, rows)\n{}"
    for _ in range(2):
        home.restart()
        home.run("rows = [1]\ndef clean(d):\n    d.append(2)\n    return len(d)")
        shown = home.run(cell.format("raise ValueError('later')"))
    assert shown.error == "ValueError: later"
    shown = home.run(cell.format("pass"))
    assert "not stored" in shown.told[-1] or home.value("rows") == [1, 2]


def test_figures_are_shown_again_after_the_value(home):
    """Inline figures come after the cell's value, as they do plainly, and none leaks into the next cell."""
    home.run("%matplotlib inline\nimport matplotlib.pyplot as plt")
    cell = "%%durable figure\nplt.plot([1, 2])\n'value'"
    plain = home.run("plt.plot([1, 2])\n'value'").order
    assert [word.split()[0] for word in plain] == ["result", "display_data"]
    assert home.run(cell).order == plain
    assert home.run(cell).order == plain
    assert home.run("len(plt.get_fignums())").result == "0"


TOOL = """
class Tool:
    kind = 'tool'
    def __init__(self, x=0): self.x = x
    def __repr__(self): return f'Tool({self.x})'
    def __eq__(self, other): return self.x == other.x
    def __getattr__(self, name): raise AttributeError(name)
    def __len__(self): return 1
    def __bool__(self): return True
    def __iter__(self): return iter([1])
    def __call__(self): return self.x
    def __contains__(self, x): return True
    def __format__(self, spec): return 'tool'
    def __dir__(self): return []
    @property
    def double(self): return self.x * 2
def helper(x): return x + 1
"""
PROFILE = """
import sys, threading
executed = []
def profile(frame, event, arg):
    code = frame.f_code
    if event == 'call' and ('ipykernel_' in code.co_filename or code.co_filename.endswith('/toolbox.py')):
        ours = {'_durable_run', 'setprofile'} & {*code.co_names} or code is profile.__code__
        if not ours and frame.f_locals.get('name') != '__setstate__':  # which unpickling looks for
            executed.append(f'{code.co_filename}: {code.co_name}')
threading.setprofile(profile)
sys.setprofile(profile)
"""


def test_a_hit_executes_none_of_the_users_code(home):
    """Neither the cell's, nor a function, method, operator or `__repr__` of the notebook's or its modules'."""
    (home.folder / "toolbox.py").write_text(TOOL)
    before = f"import toolbox\n{TOOL}\ntools = [Tool(1), toolbox.Tool(2)]\nby_name = {{'t': tools[0]}}\nalias = tools[1]"
    cell = (
        "%%durable traced\nmore = [Tool(helper(toolbox.helper(3))), toolbox.Tool(4), tools[0]]\ntools[0].note = [tools[1].double]\n"
        "class Own(Tool): pass\nown = Own(5)\ndef late(v=helper(1)): return v\nprint(f'{own:x}', tools[0] == own)\nmore"
    )
    for ran in (True, False):
        home.restart()
        home.run(before)
        home.run(PROFILE)
        assert runs(home, cell) is ran
        home.run("sys.setprofile(None)\nthreading.setprofile(None)")
        executed = home.value("executed")
        assert bool(executed) is ran, executed
        assert home.value("more[2] is tools[0], own(), late(), type(own) is Own, tools[0].note, alias is tools[1]") == (
            True, 5, 2, True, [4], True,
        )  # fmt: skip


# -- side doors, in sessions without a kernel ----------------------------------------------------------------------------

LIBRARY = "L = []\nvalue = 1\ndef put(v):\n    global value\n    value = v\ndef f(x):\n    return x + 1\n"


@pytest.fixture
def executed(sessions, tmp_path):
    """Compares all variables, after plain execution and after a durable cell; gives the last line of the durable cell."""
    (tmp_path / "library.py").write_text(LIBRARY)
    run = comparing(sessions, tmp_path)
    return lambda *cells: run(*cells)[-1]


RESTORED = {
    "a counter counts on": ("import collections\nc = collections.Counter('aab')", "c.update('b')", "top = c.most_common(1)"),
    "an ordered dict is reordered": ("import collections\no = collections.OrderedDict(a=1, b=2)", "o.move_to_end('a')", "l = list(o)"),
    "labels are to be unique": ("import pandas as pd\nd = pd.DataFrame({'a': [1]})", "d.flags.allows_duplicate_labels = False", "l = d.flags.allows_duplicate_labels"),
    "an array is made read-only": ("import numpy as np\na = np.arange(3)", "a.flags.writeable = False", ""),
    "a read-only array without a buffer": ("import numpy as np", "b = np.broadcast_to(np.arange(3), (2, 3))\nd = np.diagonal(np.eye(3))", ""),
    "a generator that spawned": ("import numpy as np\nr = np.random.default_rng(0)", "k = r.spawn(1)[0].random()", "l = r.spawn(1)[0].random()"),
    "a Random": ("import random\nr = random.Random(3)", "x = r.random()", "y = r.random()"),
    "a simple namespace": ("import types\nn = types.SimpleNamespace(a=1)", "n.b = [n]", ""),
    "a property that was cached": ("import functools\nclass A:\n    @functools.cached_property\n    def v(self): return [1]\na = A()", "y = a.v", "same = a.v is y"),
    "views of a dict": ("d = {'a': 1}", "import types\nk = d.keys(), d.items(), types.MappingProxyType(d)", "d['b'] = 2\nl = [list(v) for v in k]"),
    "classes with slots": ("", "import dataclasses\n@dataclasses.dataclass(slots=True, frozen=True)\nclass S:\n    x: int = 1\ns = S(4)\nclass T:\n    __slots__ = ('y',)", "h = hasattr(s, '__dict__'), hasattr(T(), '__dict__')"),
    "a class of a function": ("def make():\n    class Local: pass\n    return Local", "C = make()\nc = C()", "n = repr(type(c))"),
    "a cached function": ("", "import functools\n@functools.lru_cache(maxsize=7)\ndef f(x): return [x]", "l = f(1) is f(1), f.cache_parameters()['maxsize'], f.__name__"),
    "the cause of an error": ("", "try:\n    try: 1 / 0\n    except ZeroDivisionError as e: raise ValueError('v') from e\nexcept ValueError as e2: keep = e2", "l = type(keep.__cause__).__name__"),
    "an underscore": ("", "for _ in range(3): pass\n'shown'", "l = _"),
    "a list changed in a loop": ("a = [1]", "for _turn in range(2):\n    a += [1]", ""),
    "a helper that rebinds its module's global": ("import library", "library.put(5)", "l = library.value"),
    "matplotlib's defaults": ("import matplotlib as m\nm.use('agg')\nm.interactive(True)", "m.rcParams.update(m.rcParamsDefault)", "l = m.is_interactive()"),
    "a type variable": ("", "import typing\nT = typing.TypeVar('T')\nclass Box(typing.Generic[T]): pass\nclass Shown(typing.Protocol):\n    def show(self) -> str: ...", "l = T.__module__, Box.__parameters__[0] is T, Shown._is_protocol"),
    "what a library adds to a class": ("from sklearn.base import BaseEstimator, ClassifierMixin", "class C(ClassifierMixin, BaseEstimator):\n    def fit(self, X, y, sample_weight=None): return self\n    def late(self): pass", "l = [n for n in vars(C) if not n.startswith('_')]"),
    "an abstract class counts": ("import abc\nclass S(abc.ABC):\n    n = 0\n    def __init__(self): S.n += 1\nclass C(S): pass", "made = [C(), C()]", "l = S.n, C.n, isinstance(made[0], S)"),
    "a match of an earlier pattern": ("import re\nword = re.compile(r'(a)\\w')", "found = word.match('ab'), re.compile(b'b'), re.compile('(?i)c', re.A)", "l = found[0].re is word, found[1].flags, found[2].flags"),
    "polars in place": ("import polars as pl\nd = pl.DataFrame({'a': [1, 2]})\ns = pl.Series('s', [1])\nalias = d, s", "d.insert_column(0, pl.Series('z', [5, 6]))\nd[0, 'a'] = 9\ns.append(pl.Series([2]))\nn = len(s)", "l = d.to_dict(as_series=False), s.to_list(), alias[0] is d, alias[1] is s"),
    "what has occurred in decimals": ("", "import decimal\ny = decimal.Decimal(1) / 3", "l = sorted(s.__name__ for s, on in decimal.getcontext().flags.items() if on)"),
    "what a state takes out of the live object": ("", "class A:\n    def __init__(self): self.kept = {'f': len, 'n': 1}\n    def __getstate__(self):\n        self.kept['f'] = None\n        return self.__dict__\na = A()\nkept = a.kept", "l = a.kept, a.kept is kept"),
    "a repr that counts": ("", "class R:\n    n = 0\n    def __repr__(self):\n        R.n += 1\n        return f'R{R.n}'\nR()", "l = R.n"),
    "the first import of matplotlib": ("", "import matplotlib; matplotlib.use('agg')\nimport matplotlib.pyplot as plt\nx = 1", ""),
    "a temporary folder": ("", "import tempfile\nwith tempfile.TemporaryDirectory() as t:\n    open(t + '/x', 'w').write('1')\n    y = open(t + '/x').read()\ndel t", ""),
    "a class whose instances went before": ("class P: pass\nold = P()", "class P: pass\nnew = P()", "l = isinstance(old, P), isinstance(new, P)"),
}  # fmt: skip
"""Before, body, after."""


@pytest.mark.parametrize(("before", "body", "after"), RESTORED.values(), ids=RESTORED.keys())
def test_a_hit_leaves_what_the_cell_would_have_left(executed, before, body, after):
    """In another process, with nothing of the first one left."""
    assert not executed(before, body, after).startswith("not stored")
    assert executed(before, body, after) == "restored"


DIFFERENT = {
    "a print option": ("import numpy as np\nnp.set_printoptions(precision={})", "t = str(np.array([1.23456]))", "2", "4"),
    "an option of pandas": ("import pandas as pd\npd.set_option('display.precision', {})", "t = str(pd.Series([1.23456]))", "2", "4"),
    "a setting of matplotlib": ("import matplotlib as m\nm.rcParams['font.size'] = {}", "t = m.rcParams['font.size']", "9", "12"),
    "the decimal context": ("import decimal\ndecimal.getcontext().prec = {}", "t = decimal.Decimal(1) / 3", "5", "9"),
    "what an instance keeps out of its pickle": ("class A:\n    def __init__(self, c): self.c = c\n    def __getstate__(self): return {{}}\na = A({})", "y = a.c", "1", "2"),
    "what a reduction lies about": ("class A:\n    def __init__(self, c): self.c = c\n    def __reduce__(self): return int, (5,)\na = A({})", "y = a.c", "1", "2"),
    "what a singleton holds": ("class A:\n    def __init__(self, c): self.c = c\n    def __reduce__(self): return 'a'\na = A({})", "y = a.c", "1", "2"),
    "a module imported by its name": ("open('other.py', 'w').write('def f(): return {}')", "import importlib\ny = importlib.import_module('other').f()", "1", "222"),
}  # fmt: skip
"""Before with a gap, body, two fillings."""


@pytest.mark.parametrize(("before", "body", "one", "two"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_what_differs_in_an_odd_way_is_another_input(executed, before, body, one, two):
    """And both results stay known."""
    said = [executed(before.format(value), body) for value in (one, two, one, two)]
    assert [line == "restored" for line in said] == [False, False, True, True]


REFUSED = {
    "__main__": ("k = 1", "import __main__\ny = __main__.k", "it looks names up by __main__"),
    "the module of the notebook": ("import sys\nk = 1", "y = sys.modules['__main__'].k", "it looks names up by __main__"),
    "a frame": ("import inspect\nk = 1", "y = inspect.currentframe().f_globals['k']", "it looks names up by f_globals"),
    "a function's globals": ("k = 1\ndef f(): pass", "y = f.__globals__['k']", "it looks names up by __globals__"),
    "a method that looks names up": ("k = 1\nclass A:\n    def f(self): return globals()['k']\na = A()", "y = a.f()", "helper A.f may look names up"),
    "the names there are": ("k = 1", "%who", "it looks names up by %who"),
    "an attribute of a module": ("import string", "string.mine = 1", "it sets string.mine"),
    "an attribute that a helper sets": ("import string\ndef f(): string.mine = 1", "f()", "helper f sets string.mine"),
    "what a cached function remembers": ("", "import functools\n@functools.lru_cache\ndef f(x): return [x]\na = f(1)", "f (_lru_cache_wrapper) can't be pickled"),
    "a state that drops": ("class A:\n    def __init__(self): self.c = [1]\n    def __getstate__(self): return {'x': 1}", "a = A()", "a (A) holds a A, which does not come back whole"),
    "a reduction that lies": ("class A:\n    def __reduce__(self): return int, (5,)", "a = A()", "a (A) holds a A, which does not come back whole"),
    "an error that can't be made again": ("class E(Exception):\n    def __init__(self, a, b): super().__init__(a)", "e = E(1, 2)", "e (E) holds a E, which does not come back whole"),
    "a class registered with an abstract one": ("import abc\nclass S(abc.ABC):\n    n = 0\nclass C: pass", "S.register(C)\nS.n += 1\ny = isinstance(C(), S)", "it changes class S in place"),
    "a memoryview": ("", "m = memoryview(bytearray(b'abc'))", "m (memoryview) can't be pickled"),
}  # fmt: skip
"""Before, body, why it is not stored."""


@pytest.mark.parametrize(("before", "body", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_a_cell_of_which_not_all_can_be_restored_runs_each_time_and_says_why(executed, before, body, why):
    """One line; what it leaves is right each time."""
    for _ in range(2):
        assert executed(before, body).startswith(f"not stored: {why}")


def test_a_folder_made_or_removed_must_be_as_the_cell_left_it(sessions, tmp_path):
    """Else the cell runs again."""
    cells = [
        "import os, shutil",
        "%%durable folders\nos.makedirs('new/deep', exist_ok=True)\nshutil.rmtree('old', ignore_errors=True)",
    ]
    (tmp_path / "old").mkdir()
    told = [sessions.run(cells, tmp_path)["told"][-1] for _ in range(2)]
    (tmp_path / "old").mkdir()
    told.append(sessions.run(cells, tmp_path)["told"][-1])
    (tmp_path / "new" / "deep").rmdir()
    told.append(sessions.run(cells, tmp_path)["told"][-1])
    assert told == ["running: first run", "restored", "running: old is new", "running: new/deep is gone"]
    assert (tmp_path / "new" / "deep").is_dir()
    assert not (tmp_path / "old").exists()


def test_in_another_working_directory_a_cell_is_another_one(home, tmp_path):
    """In the one that the kernel was started in it hits, wherever that folder is by now."""
    cell = "%%durable where\nimport os\nhere = os.path.basename(os.getcwd())"
    home.restart()
    assert home.run(cell).status == "ok"
    home.run("import os, tempfile\nbefore = os.getcwd()\nos.chdir(tempfile.mkdtemp())")
    shown = home.run(cell)
    assert "the working directory changed" in shown.told[0]
    assert home.value("here == os.path.basename(os.getcwd())")
    home.run("os.chdir(before)")
    assert "restored" in home.run(cell).told[-1]
    assert home.value("here == os.path.basename(before)")


def test_a_future_import_holds_for_later_cells_of_a_new_kernel_and_is_part_of_what_they_mean(home):
    """IPython's compiler remembers it, restored or run."""
    imports = "%%durable future\nfrom __future__ import annotations"
    uses = "%%durable tree\nclass Tree:\n    def grow(self) -> Tree: ..."
    hinted = "%%durable hinted\ndef f(t: int): ..."
    home.restart()
    assert (home.run(imports).told[0], runs(home, uses)) == ("future · running: first run", True)
    home.restart()
    assert "future · restored" in home.run(imports).told[0]
    assert (home.run("def later(t: NotThere): ...").error, runs(home, uses)) == ("", False)
    home.restart()
    assert (runs(home, hinted), home.value("f.__annotations__['t'] is int")) == (True, True)
    assert "future · restored" in home.run(imports).told[0]
    assert (runs(home, hinted), home.value("f.__annotations__")) == (True, {"t": "int"})
    below = "%%durable below\nx = 1\nfrom __future__ import annotations\ndef g(t: NotThere): ..."
    for ran in (True, False):
        home.restart()
        assert (runs(home, below), home.value("x, g.__annotations__")) == (ran, (1, {"t": "NotThere"}))
