"""What a cell does beyond its variables: resources are made again, settings set again; all else keeps it from being stored."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from kernels import kernel
from twin_sessions import comparing

LIBRARY = """
class Settings:
    model = 'small'
    limits = {'n': 1}
settings = Settings()
state = {}
rate = 1
def init(size): state['size'] = size
def ask(): return settings.model
"""


@pytest.fixture
def executed(sessions, tmp_path):
    """Compares what `look` is, after plain execution and after a durable cell; gives what the durable cell said."""
    (tmp_path / "library.py").write_text(LIBRARY)
    (tmp_path / "setting.py").write_text("import os\nos.environ['DURABLE_NB_MODE'] = 'fast'\nVALUE = 3\n")
    return comparing(sessions, tmp_path, only="look", made="made.db")


REMADE = {
    "an httpx client": ("", "import httpx\nclient = httpx.AsyncClient(base_url='http://x', timeout=httpx.Timeout(3), headers={'a': 'b'})", "look = str(client.base_url), client.timeout.read, client.headers['a'], client.is_closed"),
    "an openai client": ("import os\nos.environ['OPENAI_API_KEY'] = 'k1'", "from openai import OpenAI, AsyncOpenAI\nllm = OpenAI()\nother = AsyncOpenAI(base_url='http://y', api_key=os.environ['OPENAI_API_KEY'], max_retries=7)", "look = llm.api_key, str(other.base_url), other.max_retries, other.api_key"),
    "an anthropic client": ("", "import anthropic\nclaude = anthropic.Anthropic(api_key='k')", "look = claude.api_key, claude.is_closed()"),
    "a client of a client": ("", "import httpx, openai\nhttp = httpx.Client(timeout=9)\nllm = openai.OpenAI(api_key='k', http_client=http)", "look = llm._client is http, http.timeout.read"),
    "arguments of this cell and of earlier ones": ("import httpx\nbase = 'http://x'", "path = '/v1'\noptions = {'timeout': 4}\nclient = httpx.Client(base_url=f'{base}{path}', **options)", "look = str(client.base_url), client.timeout.read"),
    "asyncio's": ("import asyncio", "sem = asyncio.Semaphore(20)\nlock, event = asyncio.Lock(), asyncio.Event()\nqueue = asyncio.Queue(maxsize=3)\nevent.set()", "look = sem._value, lock.locked(), event.is_set(), queue.maxsize, queue.empty()"),
    "asyncio's, after use": ("import asyncio", "sem = asyncio.Semaphore(1)\nqueue = asyncio.Queue()\nasync def use(n):\n    async with sem:\n        await queue.put(n)\n        await asyncio.sleep(0)\n        return await queue.get()\ndone = await asyncio.gather(*map(use, range(3)))\nqueue.task_done(); queue.task_done(); queue.task_done()", "look = done, sem._value, queue.qsize()"),
    "threading's": ("", "import threading, queue\nlock = threading.Lock()\nrlock: object = threading.RLock()\nsem = threading.BoundedSemaphore(2)\nevent = threading.Event()\nq = queue.Queue(2)\nlocal = threading.local()\ncond = threading.Condition()\nbar = threading.Barrier(2)", "look = lock.locked(), sem._value, event.is_set(), q.maxsize, bar.parties, type(rlock).__name__, vars(local)"),
    "an executor": ("", "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(max_workers=3)\nsquares = list(pool.map(pow, [1, 2], [2, 2]))", "look = pool._max_workers, squares, pool.submit(len, 'abc').result()"),
    "an executor that a with has shut down": ("", "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(2) as pool:\n    squares = list(pool.map(pow, [1, 2], [2, 2]))", "look = squares, pool._shutdown"),
    "a client that a with has closed": ("", "import httpx\nwith httpx.Client() as client:\n    pass\nasync with httpx.AsyncClient() as other:\n    pass", "look = client.is_closed, other.is_closed"),
    "a connection": ("", "import sqlite3\ncon = sqlite3.connect('made.db')\ncon.row_factory = sqlite3.Row\ncur = con.cursor()", "con.execute('create table if not exists t (a)')\nlook = con.execute('select count(*) as n from t').fetchone()['n'], cur.connection is con"),
    "a connection that has written": ("", "import sqlite3\ncon = sqlite3.connect('made.db')\ncon.row_factory = lambda c, row: {d[0]: v for d, v in zip(c.description, row)}\ncon.executescript('drop table if exists t; create table t (a); insert into t values (1), (2), (3); delete from t');", "look = con.total_changes, con.execute('select last_insert_rowid() as n').fetchone()['n'], con.in_transaction"),
    "a connection that was closed": ("", "import sqlite3\nfrom contextlib import closing\nwith closing(sqlite3.connect('made.db')) as con:\n    one = con.execute('select 1').fetchone()", "try: con.execute('select 1')\nexcept sqlite3.ProgrammingError as e: look = str(e), one"),
    "a database in memory": ("import sqlite3", "con = sqlite3.connect(':memory:')\ncon.execute('PRAGMA foreign_keys = ON')\ncur = con.cursor()\ncur.execute('create table t (a)')\ncur.executemany('insert into t values (?)', [(9,), (8,)])\ncon.commit()\nrows = con.execute('select a as n from t')\nall = rows.fetchall()", "look = con.execute('select * from t').fetchall(), con.total_changes, con.in_transaction, con.execute('select last_insert_rowid()').fetchone(), con.execute('PRAGMA foreign_keys').fetchone(), (cur.lastrowid, cur.rowcount, cur.description), rows.description, rows.fetchone(), cur.connection is con"),
    "an empty database in memory": ("import sqlite3", "con = sqlite3.connect(':memory:')", "con.execute('create table t (a)')\nlook = con.execute('select count(*) from t').fetchone()"),
    "an engine": ("", "from sqlalchemy import create_engine\nfrom sqlalchemy.orm import sessionmaker\nurl = 'sqlite:///made.db'\nengine = create_engine(url, echo=False)\nSession = sessionmaker(bind=engine)", "from sqlalchemy import text\nwith engine.connect() as c: one = c.execute(text('select 1')).scalar()\nlook = one, str(engine.url), Session().get_bind() is engine"),
    "a bar at its end": ("", "from tqdm import tqdm\nbar = tqdm(range(5), desc='rows', bar_format='{desc}{n}', mininterval=99)\nfor _ in bar: pass", "look = bar.n, bar.total, bar.desc, bar.disable"),
    "a bar half way": ("", "from tqdm import tqdm\nbar = tqdm(total=10, bar_format='{n}', mininterval=99)\nx = bar.update(4)", "x = bar.update(1)\nlook = bar.n, bar.total, bar.disable"),
    "held by other values": ("import asyncio", "sem = asyncio.Semaphore(2)\nclass Agent:\n    def __init__(self, sem): self.sem = sem\nagent = Agent(sem)\nboth = {'s': sem, 'a': agent}\ndef f(s=sem): return s", "look = agent.sem is sem, both['s'] is sem, both['a'] is agent, f() is sem, sem._value"),
    "two names": ("import asyncio", "a = b = asyncio.Lock()", "look = a is b, a.locked()"),
    "a type of one's own": ("import durable_nb as durable\n@durable.remake\nclass Gate:\n    def __init__(self, n): self.n, self.f = n, lambda: n\n    def __reduce__(self): raise TypeError('no')", "gate = Gate(3)\nn = 4", "look = gate.f(), n"),
}  # fmt: skip
"""Before, body, what is looked at."""


@pytest.mark.parametrize(("before", "body", "after"), REMADE.values(), ids=REMADE.keys())
def test_a_live_resource_is_made_again(executed, before, body, after):
    """By the statement that bound it; it stands as the cell left it."""
    assert not [line for line in executed(before, body, after) if "not stored" in line or "warning" in line]
    assert executed(before, body, after)[-1] == "restored"


STATEFUL = {
    "a held lock": ("", "import threading\nlock = threading.Lock()\nx = lock.acquire()", "look = lock.locked()", "lock (lock) holds a held lock"),
    "a semaphore that was taken": ("import asyncio", "sem = asyncio.Semaphore(3)\nx = await sem.acquire()", "look = sem._value", "sem (Semaphore) holds state that the cell put into it"),
    "a queue with items": ("import asyncio", "q = asyncio.Queue()\nq.put_nowait(1)", "look = q.qsize()", "q (Queue) holds state"),
    "temporary tables": ("import sqlite3", "con = sqlite3.connect(':memory:')\nx = con.execute('create temp table t (a)')\ndel x", "look = con.execute('select count(*) from t').fetchone()", "con (Connection) holds temporary tables"),
    "rows that are yet to come": ("import sqlite3\ncon = sqlite3.connect(':memory:')", "cur = con.execute('select 1')", "look = cur.fetchall()", "cur (Cursor) can't be pickled"),
    "tables in memory, of an engine": ("from sqlalchemy import create_engine, text", "engine = create_engine('sqlite://')\nwith engine.begin() as c:\n    c.execute(text('create table t (a)'))\ndel c", "with engine.connect() as c: look = c.execute(text('select count(*) from t')).scalar()", "engine (Engine) holds tables in memory"),
    "an open transaction": ("import sqlite3", "con = sqlite3.connect('made.db')\nx = con.execute('create table if not exists t (a)') and con.execute('insert into t values (1)') and 1", "look = con.in_transaction\ncon.rollback()", "con (Connection) holds an open transaction"),
    "a function given to a connection": ("import sqlite3", "con = sqlite3.connect(':memory:')\ncon.create_function('twice', 1, lambda a: 2 * a)", "look = con.execute('select twice(4)').fetchone()", "con (Connection) holds what create_function() gave it"),
    "an attribute set on a client": ("import httpx", "client = httpx.Client()\nclient.base_url = 'http://x'", "look = str(client.base_url)", "client (Client) holds an attribute 'base_url'"),
    "headers given to a client": ("import httpx\ndef tell(c): c.headers.update({'x-a': 'b'})", "client = httpx.Client()\ntell(client)", "look = client.headers['x-a']", "client (Client) was configured otherwise after it was made"),
    "bound in a branch": ("import sqlite3", "if True:\n    con = sqlite3.connect(':memory:')", "look = con.execute('select 1').fetchone()", "con (Connection) can't be pickled"),
    "bound twice": ("import sqlite3", "con = None\ncon = sqlite3.connect(':memory:')", "look = con.execute('select 1').fetchone()", "con (Connection) can't be pickled"),
    "an argument that is bound again": ("import sqlite3", "file = ':memory:'\ncon = sqlite3.connect(file)\nfile = 'other'", "look = con.execute('select 1').fetchone()", "con (Connection) can't be pickled"),
    "an argument that is computed": ("import sqlite3\ndef where(): return ':memory:'", "con = sqlite3.connect(where())", "look = con.execute('select 1').fetchone()", "con (Connection) can't be made again: its arguments call where()"),
}  # fmt: skip
"""Before, body, what is looked at, why it is not stored."""


@pytest.mark.parametrize(("before", "body", "after", "why"), STATEFUL.values(), ids=STATEFUL.keys())
def test_a_resource_that_would_come_back_otherwise_keeps_the_cell_from_being_stored(executed, before, body, after, why):
    """It says so the first time, and is right each time."""
    for _ in range(2):
        told = executed(before, body, after)
        assert [line for line in told if line.startswith(f"not stored: {why}")], told


SET_AGAIN = {
    "the environment": ("import os", "os.environ['DURABLE_NB_TEST'] = '1'", "look = os.environ['DURABLE_NB_TEST']"),
    "a variable that is deleted": ("import os\nos.environ['DURABLE_NB_OLD'] = '1'", "x = os.environ.pop('DURABLE_NB_OLD')", "look = 'DURABLE_NB_OLD' in os.environ"),
    "%env": ("import os", "%env DURABLE_NB_TEST=2", "look = os.environ['DURABLE_NB_TEST']"),
    "an imported module that sets the environment": ("import os", "from setting import VALUE", "look = os.environ['DURABLE_NB_MODE'], VALUE"),
    "the working directory": ("import os\nos.makedirs('sub', exist_ok=True)", "%cd -q sub", "look = os.path.basename(os.getcwd())\nos.chdir('..')"),
    "the filters of warnings": ("import warnings", "warnings.filterwarnings('ignore', category=UserWarning)\nwarnings.simplefilter('error', DeprecationWarning)", "look = [f[:1] + f[2:3] for f in warnings.filters[:2]]"),
    "loggers": ("import logging", "logging.basicConfig(level=logging.INFO, format='%(message)s', force=True)\nlogging.getLogger('mine').setLevel(10)", "look = logging.root.level, len(logging.root.handlers), logging.root.handlers[0].formatter._fmt, logging.getLogger('mine').level"),
    "the locale": ("import locale", "x = locale.setlocale(locale.LC_NUMERIC, 'C.UTF-8')", "look = locale.setlocale(locale.LC_NUMERIC)"),
    "the decimal context": ("import decimal", "decimal.getcontext().prec = 5", "look = decimal.Decimal(1) / 3"),
    "the recursion limit": ("import sys", "sys.setrecursionlimit(4321)", "look = sys.getrecursionlimit()"),
    "the time-out of sockets": ("", "import socket\nsocket.setdefaulttimeout(7)", "look = socket.getdefaulttimeout()"),
    "the umask": ("import os", "os.umask(0o077);", "look = os.umask(0o022)"),
    "MIME types": ("", "import mimetypes\nmimetypes.add_type('x/qq', '.qq')", "look = mimetypes.guess_type('a.qq')"),
    "garbage collection": ("import gc", "gc.disable()", "look = gc.isenabled()"),
    "numpy's print options": ("import numpy as np", "np.set_printoptions(precision=2, suppress=True)", "look = str(np.array([1.23456]))"),
    "numpy's errors": ("import numpy as np", "old = np.seterr(divide='ignore')", "look = np.geterr()['divide']"),
    "pandas' options": ("import pandas as pd", "pd.set_option('display.max_rows', 5)\npd.options.display.precision = 2\npd.set_option('display.float_format', '{:.1f}'.format)", "look = str(pd.Series([1.2345] * 9))"),
    "rcParams": ("", "import matplotlib\nimport matplotlib.pyplot as plt\nplt.rc('font', size=9)\nplt.rcParams['figure.figsize'] = (3, 2)", "look = plt.rcParams['font.size'], plt.rcParams['figure.figsize']"),
    "a style": ("", "import matplotlib.pyplot as plt\nplt.style.use('ggplot')", "look = plt.rcParams['axes.facecolor'], plt.rcParams['axes.prop_cycle'].by_key()"),
    "a theme of seaborn": ("", "import seaborn as sns\nsns.set_theme(style='darkgrid', palette='deep', color_codes=True)", "import matplotlib.colors as mc, matplotlib as m\nlook = m.rcParams['axes.facecolor'], mc.to_rgb('b')"),
    "matplotlib.use": ("", "import matplotlib\nmatplotlib.use('svg')", "look = matplotlib.get_backend()"),
    "plt.ioff": ("", "import matplotlib; matplotlib.use('agg')\nimport matplotlib.pyplot as plt\nplt.ion()", "look = plt.isinteractive()"),
    "sklearn.set_config": ("", "import sklearn\nsklearn.set_config(transform_output='pandas')", "look = sklearn.get_config()['transform_output']"),
    "polars' options": ("", "import polars as pl\nx = pl.Config.set_tbl_rows(3).set_fmt_float('full') and 1", "look = str(pl.DataFrame({'a': [float(n) for n in range(9)]}))"),
    "a context variable": ("import contextvars\nv = contextvars.ContextVar('v')", "t = v.set([1])\ndel t", "look = v.get()"),
    "what numexpr remembers": ("import pandas as pd, numpy as np, numexpr\nd = pd.DataFrame({'a': np.arange(200_000.0)})", "q = len(d.query('a > 100'))\nv = numexpr.evaluate('a + 1', {'a': d.a.values}).sum()", "look = q, float(v)"),
    "nest_asyncio": ("", "import nest_asyncio\nnest_asyncio.apply()", "import asyncio\nlook = asyncio.run(asyncio.sleep(0, 5))"),
    "%precision": ("", "%precision 2", "f = get_ipython().display_formatter.formatters['text/plain']\nlook = f(1.23456)\ndel f"),
    "%pprint": ("", "%pprint", "look = get_ipython().display_formatter.formatters['text/plain'].pprint"),
    "%xmode": ("", "%xmode Minimal", "look = get_ipython().InteractiveTB.mode"),
    "%config": ("", "%config InteractiveShell.ast_node_interactivity = 'all'", "look = get_ipython().ast_node_interactivity\n%config InteractiveShell.ast_node_interactivity = 'last_expr'"),
    "%load_ext": ("", "%load_ext autoreload\n%autoreload 2", "m = get_ipython().magics_manager\nlook = 'autoreload' in m.magics['line'], m.registry['AutoreloadMagics']._reloader.check_all\n%autoreload 0\ndel m"),
    "a magic that is registered": ("k = 5", "from IPython.core.magic import register_line_magic\n@register_line_magic\ndef zz(line): return k", "look = get_ipython().run_line_magic('zz', ''), get_ipython().magics_manager.magics['line']['zz'] is zz"),
    "import this, which prints": ("", "import this", "look = this.s[:5]"),
}  # fmt: skip
"""Before, body, what is looked at."""


@pytest.mark.parametrize(("before", "body", "after"), SET_AGAIN.values(), ids=SET_AGAIN.keys())
def test_what_a_cell_sets_is_set_again(executed, before, body, after):
    """As values, by the library's own functions."""
    assert not [line for line in executed(before, body, after) if "not stored" in line]
    assert executed(before, body, after)[-1] == "restored"


REFUSED = {
    "settings of a module that the cell imports": ("", "from library import settings\nsettings.model = 'big'", "import library\nlook = library.ask(), settings is library.settings", "it changes library.settings"),
    "what a function of such a module changes": ("", "import library\nlibrary.init('big')", "look = library.state", "it changes library.state"),
    "a class of such a module": ("", "import library\nlibrary.Settings.model = 'big'", "look = library.ask()", "it changes library.Settings"),
    "a module that was loaded before": ("import library\nask = library.ask\ndel library", "from library import settings\nsettings.model = 'big'", "look = ask()", "it changes library.settings"),
    "tqdm.pandas()": ("import pandas as pd", "from tqdm.auto import tqdm\ntqdm.pandas()", "import io\ntqdm.pandas(file=io.StringIO())\nlook = pd.Series([1]).progress_apply(lambda x: x + 1).tolist()", "it adds DataFrame.progress_apply"),
    "an accessor": ("import pandas as pd", "@pd.api.extensions.register_dataframe_accessor('mine')\nclass Mine:\n    def __init__(self, df): self.n = len(df)", "look = pd.DataFrame({'a': [1, 2]}).mine.n", "it adds DataFrame.mine"),
    "an accessor in place of one": ("import pandas as pd, warnings\nwarnings.simplefilter('ignore')\n@pd.api.extensions.register_dataframe_accessor('mine')\nclass Old:\n    def __init__(self, df): self.n = -1", "@pd.api.extensions.register_dataframe_accessor('mine')\nclass Mine:\n    def __init__(self, df): self.n = len(df)", "look = pd.DataFrame({'a': [1, 2]}).mine.n", "it adds DataFrame.mine"),
    "an accessor of polars": ("", "import polars as pl\n@pl.api.register_dataframe_namespace('mine')\nclass Mine:\n    def __init__(self, df): self.n = df.height", "look = pl.DataFrame({'a': [1, 2]}).mine.n", "it adds DataFrame.mine"),
    "an attribute of a class": ("from IPython.core.interactiveshell import InteractiveShell", "InteractiveShell.ast_node_interactivity = 'all'", "look = InteractiveShell.ast_node_interactivity\nInteractiveShell.ast_node_interactivity = 'last_expr'", "it sets IPython.core.interactiveshell.InteractiveShell.ast_node_interactivity"),
    "a secret in the environment": ("import os", "os.environ['MY_API_KEY'] = 'k'", "look = os.environ['MY_API_KEY']", "it sets MY_API_KEY in the environment, which looks like a secret"),
    "a thread": ("import threading", "e = None\nthreading.Timer(30, print).start()", "look = [t.cancel() for t in threading.enumerate() if isinstance(t, threading.Timer)]", "it leaves the thread"),
    "a handler of a logger": ("import logging", "logging.getLogger('mine').addHandler(logging.NullHandler())", "look = len(logging.getLogger('mine').handlers)", "it gives the logger 'mine' a NullHandler"),
    "a handler of a signal": ("import signal", "x = signal.signal(signal.SIGUSR1, signal.SIG_IGN) and 1", "look = signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN", "it sets a handler for signal"),
    "builtins": ("import builtins", "setattr(builtins, 'zzz', 1)", "look = zzz", "it sets builtins.attributes"),
    "a module of its own making": ("import sys, types", "sys.modules['stub'] = types.ModuleType('stub')", "import stub\nlook = stub.__name__", "it puts stub into sys.modules"),
    "how a type is pickled": ("class T: pass", "from copyreg import pickle\npickle(T, lambda t: (T, ()))", "import copyreg\nlook = T in copyreg.dispatch_table", "it registers how T is pickled"),
    "a function for the end of the process": ("import atexit", "atexit.register(str);", "look = 1", "it registers a function for the end of the process"),
    "an earlier lock that is held": ("import threading\nlock = threading.Lock()", "lock.acquire();", "look = lock.locked()\ndel lock", "it changes lock in place"),
    "an earlier semaphore": ("import threading\ns = threading.Semaphore(3)", "s.acquire();", "look = s._value\ndel s", "it changes s in place"),
    "functions of an earlier connection": ("import sqlite3\ncon = sqlite3.connect(':memory:')", "con.create_function('twice', 1, lambda a: 2 * a)", "look = con.execute('select twice(4)').fetchone()\ndel con", "it changes con in place"),
    "functions of a connection that something holds": ("import sqlite3\nclass D: con = sqlite3.connect('made.db')\nd = D()", "d.con.create_function('twice', 1, lambda a: 2 * a)", "look = d.con.execute('select twice(4)').fetchone()\ndel d, D", "it changes class D in place"),
    "a transaction of an earlier connection": ("import sqlite3\ncon = sqlite3.connect(':memory:')\ncon.execute('create table t (a)');", "con.execute('insert into t values (1)');", "look = con.in_transaction\ndel con", "it changes con in place"),
    "a database attached to an earlier connection": ("import sqlite3\ncon = sqlite3.connect(':memory:')", "con.execute(\"attach ':memory:' as other\");", "look = [name for _, name, _ in con.execute('pragma database_list')][-1]\ndel con", "it changes con in place"),
    "an earlier bar": ("from tqdm import tqdm\nbar = tqdm(total=5, file=open('/dev/null', 'w'))", "bar.update(2);", "look = bar.n\ndel bar", "it changes bar in place"),
    "a hook of Python": ("import sys", "def hook(*a): pass\nsys.__dict__['excepthook'] = hook", "look = sys.excepthook is hook", "it sets sys.excepthook"),
    "sys.path": ("import sys", "sys.path.append('lib')", "look = 'lib' in sys.path", "it changes sys.path"),
    "a hook of IPython": ("", "import IPython\ndef told(*a): pass\nIPython.get_ipython().events.register('pre_run_cell', told)", "look = told in get_ipython().events.callbacks['pre_run_cell']\nget_ipython().events.unregister('pre_run_cell', told)", "it sets IPython's callbacks of pre_run_cell"),
    "how a type is shown": ("class T: pass", "import IPython\nx = IPython.get_ipython().display_formatter.formatters['text/plain'].for_type(T, lambda o, p, c: p.text('t'))", "look = IPython.get_ipython().display_formatter.formatters['text/plain'](T())", "it registers how __main__.T as text/plain is shown"),
}  # fmt: skip
"""Before, body, what is looked at, why it is not stored."""


@pytest.mark.parametrize(("before", "body", "after", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_can_not_be_done_again_keeps_the_cell_from_being_stored(executed, before, body, after, why):
    """One line says what it was; the cell runs each time."""
    for _ in range(2):
        told = executed(before, body, after)
        assert [line for line in told if line.startswith(f"not stored: {why}")], told


_ONCE = ("import this", "an earlier lock that is held")  # says something once; would wait for itself for ever
REPEATED = {name: case[:3] for name, case in {**SET_AGAIN, **REFUSED}.items() if not name.startswith(_ONCE)}
MOVED = {
    "a seed": ("import random", "random.seed(3)", "look = random.random()"),
    "a seed and numbers": ("import numpy as np", "np.random.seed(3)\nx = np.random.rand()", "look = np.random.rand()"),
    "a seed in a helper": ("import random\ndef begin(n): random.seed(n)", "begin(3)", "look = random.random()"),
    "names of levels": ("import logging", "logging.addLevelName(25, 'NOTE')", "look = logging.getLevelName(25)"),
    "a logger of a name with dots": ("import logging", "logging.getLogger('my.own').setLevel(10)", "look = logging.getLogger('my.own').level"),
    "the size of stacks": ("import threading", "threading.stack_size(262144);", "look = threading.stack_size()"),
    "a hook that a function of the same session is": ("import sys\ndef hook(*a): pass\ndef begin(): sys.__dict__['excepthook'] = hook", "begin()", "look = sys.excepthook is hook"),
    "a signal's handler": ("import signal", "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\nx = 1", "look = signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN"),
    "an accessor of a class that stays": ("import pandas as pd, warnings\nwarnings.simplefilter('ignore')\nclass Mine:\n    def __init__(self, df): self.n = len(df)", "pd.api.extensions.register_dataframe_accessor('mine')(Mine);", "look = pd.DataFrame({'a': [1]}).mine.n"),
    "a codec": ("import codecs\ndef search(name): return codecs.lookup('utf8') if name == 'zzcodec' else None", "codecs.register(search)", "look = 'a'.encode('zzcodec')"),
    "an opener of URLs": ("import urllib.request as u\nopener = u.build_opener()", "u.install_opener(opener)", "look = u._opener is opener\ndel opener"),
    "tracing of memory": ("import tracemalloc", "tracemalloc.start()", "look = tracemalloc.is_tracing()\ntracemalloc.stop()"),
    "a limit of the process": ("import resource", "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))", "look = resource.getrlimit(resource.RLIMIT_CORE)"),
    "the class of loggers": ("import logging\nclass L(logging.Logger): pass", "logging.setLoggerClass(L)", "look = logging.getLoggerClass() is L"),
    "the environment that an imported module sets": ("import os", "from setting import VALUE", "look = os.environ['DURABLE_NB_MODE'], VALUE"),
}  # fmt: skip
"""Before, body, what is looked at."""


@pytest.mark.parametrize(("before", "body", "after"), {**REPEATED, **MOVED}.values(), ids={**REPEATED, **MOVED}.keys())
def test_what_was_set_before_the_cell_set_it_again_is_right_in_a_new_session(executed, sessions, tmp_path, before, body, after):
    """A plain cell did it first, and the cell twice more: nothing that can be seen has changed then."""
    sessions.run([before, body, f"%%durable cell\n{body}", f"%%durable cell --rerun\n{body}"], tmp_path)
    executed(before, body, after)


BODIES = {
    "a cell that imports it": ("", "import library\ny = library.ask()"),
    "a cell that imports from it": ("", "from library import ask\ny = ask()"),
    "a helper that imports it": ("def f():\n    import library\n    return library.ask()", "y = f()"),
    "a function of the cell's own": ("", "def f():\n    import library\n    return library.ask()\ny = f()"),
    "a step": ("def f():\n    import library\n    return library.ask()", "y = await durable.run('ask', f)"),
}
"""Before, and the durable cell."""


@pytest.mark.parametrize(("before", "body"), BODIES.values(), ids=BODIES.keys())
def test_what_a_module_of_the_project_holds_counts_for_whoever_imports_it(sessions, tmp_path, before, body):
    """An earlier cell has changed an object in it: as it is when the import has ended, it is no other one than unloaded."""
    (tmp_path / "library.py").write_text(LIBRARY)
    change = "import library as l\nl.Settings.model = {!r}\ndel l"
    said = {}
    for model in ("", "small", "big", "huge", "big", ""):
        cells = [change.format(model) if model else "", before, f"%%durable cell\n{body}", f"# {model}\nlook = y"]
        found = sessions.run(cells, tmp_path)
        assert found["state"]["look"] == f"\"str '{model or 'small'}'\""
        said.setdefault(model or "small", []).append(found["told"][-1])
    assert {model: told[1:] for model, told in said.items()} == {"small": ["restored"] * 2, "big": ["restored"], "huge": []}


SEEDED = {
    "Python's": ("", "import random\nrandom.seed(1)\nx = random.random()", "look = x, random.random()"),
    "numpy's": ("import numpy as np\nn = 3", "np.random.seed(n)\nx = np.random.rand()", "look = x, np.random.rand()"),
    "both, after what is no call": ("import numpy as np, random", "'text'\nfrom math import pi\nN = 10\nnp.random.seed(seed=N); random.seed(N)\nx = random.random()", "look = x, random.random(), np.random.rand()"),
}  # fmt: skip
"""Before, body, what is looked at."""


@pytest.mark.parametrize(("before", "body", "after"), SEEDED.values(), ids=SEEDED.keys())
def test_a_cell_that_seeds_a_generator_first_is_restored_in_whatever_state_it_is(executed, before, body, after):
    """Also a second time in one session, and after one in which something else was drawn; its numbers go on as ever."""
    assert not [line for line in executed(before, body, after) if "restored" in line]
    assert executed(before, body, after)[-1] == "restored"
    drawn = f"{before}\nimport random, numpy\nrandom.seed(7); numpy.random.seed(7)"
    assert executed(drawn, body, after)[-1] == "restored"


def test_what_is_drawn_before_a_cell_seeds_counts(sessions, tmp_path):
    """And what a function that seeds draws before it does."""
    for body in (
        "x = random.random()\nrandom.seed(1)",
        "begin(random.random())\nrandom.seed(1)\nx = 1",
        "random.seed(random.random())\nx = random.random()",
    ):
        for seed in (1, 2):
            cells = ["import random\ndef begin(n): return n", f"random.seed({seed})", f"%%durable cell\n{body}"]
            assert "restored" not in sessions.run(cells, tmp_path)["told"], (body, seed)


HELD = {
    "an import hook": ("class Hook:\n    def find_spec(self, *a): return None\nhook = Hook()\nsys.meta_path.append(hook)", "Settings(KNOWN, {'meta_path'})", "sys.meta_path.remove(hook)"),
    "a module of its own making": ("import types\nhook = sys.modules['stub'] = types.ModuleType('stub')", "Settings(KNOWN, {'modules'})", "del sys.modules['stub']"),
    "a method of a library's class": ("import pandas as pd\ndef hook(df): pass\npd.DataFrame.mine = hook", "Settings(KNOWN, set())", "del pd.DataFrame.mine"),
    "a hook of IPython": ("class Hook:\n    def __call__(self, *a): pass\nhook = Hook()\nip.events.register('pre_run_cell', hook)", "Settings(settings_of(ip), set())", "ip.events.unregister('pre_run_cell', hook)"),
    "how a type is shown": ("class T: pass\ndef hook(o, p, c): pass\nshown = ip.display_formatter.formatters['text/plain']\nshown.for_type(T, hook);", "Settings(settings_of(ip), set())", "shown.pop(T);"),
    "a value of a module": ("import library\nclass Value: pass\nhook = library.rate = Value()", "Modules(ast.parse('import library'), frozenset())", "del library.rate"),
    "a virtual subclass": ("from abc import ABC\nclass Base(ABC): pass\nclass hook: pass\nBase.register(hook);", "Standing([], [Base], str)", ""),
}  # fmt: skip
"""An object that was there before a cell, how what was there is remembered, how the object goes."""


@pytest.mark.parametrize(("before", "remembered", "goes"), HELD.values(), ids=HELD.keys())
def test_what_goes_while_a_cell_runs_does_not_lend_its_address_to_what_comes(sessions, tmp_path, before, remembered, goes):
    """What is compared by identity is held: else an object put in the place of another could be taken for it."""
    (tmp_path / "library.py").write_text(LIBRARY)
    names = (
        "import ast, gc, sys, weakref\nfrom durable_nb._cellcache.modules import Modules\n"
        "from durable_nb._cellcache.settings import KNOWN, Settings\nfrom durable_nb._ipython.settings import settings_of\n"
        "from durable_nb._patches import Standing\nip = get_ipython()"
    )
    after = f"{goes}\nreference = weakref.ref(hook)\ndel hook\ngc.collect();\nlook = reference() is not None"
    found = sessions.run([names, before, f"remembered = {remembered}", after], tmp_path)
    assert found["state"]["look"] == '"bool True"', found["shown"]


CON = "import sqlite3\ncon = sqlite3.connect(':memory:')\nx = con.executescript('create table t (a); insert into t values ({})') and con.commit()"
CHANGED = {
    "rows": ("with con:\n    con.executemany('insert into t values (?)', [(2,), (3,)])", "look = con.execute('select * from t').fetchall(), con.total_changes, con.execute('select last_insert_rowid()').fetchone()"),
    "tables, by a script whose cursor is shown": ("con.executescript('drop table t; create table u (b); insert into u values (4)')", "look = con.execute('select * from u').fetchall(), _.connection is con, _.description"),
    "how it gives rows": ("con.row_factory = sqlite3.Row\nrow = con.execute('select a, 5 as b from t').fetchone()", "look = row['b'], row.keys(), con.row_factory is sqlite3.Row, type(con.execute('select 1').fetchone())"),
    "a setting": ("con.execute('pragma foreign_keys = on')", "look = con.execute('pragma foreign_keys').fetchone()"),
    "nothing but counts": ("con.execute('insert into t values (5)')\ncon.rollback()\nn = con.execute('select count(*) from t').fetchone()[0]", "look = n, con.in_transaction, con.total_changes"),
    "that it is open": ("con.close()", "try: con.execute('select 1')\nexcept sqlite3.ProgrammingError as e: look = str(e)"),
    "an earlier cursor": ("cur = con.cursor()\ncur.execute('insert into t values (9)')\ncon.commit()", "look = cur.lastrowid, cur.rowcount, con.total_changes, cur.description"),
    "by pandas": ("import pandas as pd\npd.DataFrame({'a': [1, 2]}).to_sql('q', con, index=False)", "look = pd.read_sql('select * from q', con).a.tolist()"),
}  # fmt: skip
"""What a cell does to an earlier connection, what is looked at."""


@pytest.mark.parametrize(("body", "after"), CHANGED.values(), ids=CHANGED.keys())
def test_what_a_cell_does_to_an_earlier_connection_is_done_again(executed, body, after):
    """A database in memory comes back with its content, and the connection stands as the cell left it."""
    assert not [line for line in executed(CON.format(1), body, f"{after}\ndel con") if "not stored" in line]
    assert executed(CON.format(1), body, f"{after}\ndel con")[-1] == "restored"


def test_cells_that_fill_a_database_in_memory_one_after_the_other_are_restored(sessions, tmp_path):
    """What one of them has put there is what the next one finds."""
    cells = [
        "import sqlite3\ncon = sqlite3.connect(':memory:')\ncon.execute('PRAGMA foreign_keys = ON')",
        "con.executescript('create table t (a); create table u (b)')",
        "with con:\n    con.executemany('insert into t values (?)', [(1,), (2,)])",
        "cursor = con.execute('select a from t')\nrows = cursor.fetchall()",
        "con.execute('insert into u select a * 2 from t')\ncon.commit()",
    ]
    look = "print(*con.iterdump(), con.total_changes, rows)"
    plain = sessions.run([*cells, look], tmp_path)["shown"][-1]
    for told in ([], ["restored"] * 5):
        found = sessions.run([*(f"%%durable c{n}\n{cell}" for n, cell in enumerate(cells)), look], tmp_path)
        assert found["shown"][-1] == plain
        assert [line for line in found["told"] if line.startswith(("not stored", "restored"))] == told


ENGINE = "import pandas as pd\nfrom sqlalchemy import create_engine\ncon = create_engine('sqlite://')\nx = pd.DataFrame({{'a': [{}]}}).to_sql('t', con, index=False)"


@pytest.mark.parametrize("before", [CON, ENGINE], ids=["sqlite3", "SQLAlchemy"])
def test_a_database_in_memory_counts_by_what_it_holds(sessions, tmp_path, before):
    """It is no outside: a cell that reads other rows is another one."""
    read = "%%durable read\nimport pandas as pd\nrows = pd.read_sql('select a from t', con).a.tolist()"
    told = [sessions.run([before.format(value), read], tmp_path) for value in (1, 1, 2, 1)]
    assert [found["told"][-1] == "restored" for found in told] == [False, True, False, True]
    assert [found["state"]["rows"] for found in told][2] != told[0]["state"]["rows"]


DUCKDB = "import duckdb\ncon = duckdb.connect()\ncon.execute('create table t as select {} a');"


def test_a_database_of_duckdb_in_memory_is_no_input_that_could_be_compared(sessions, tmp_path):
    """A cell that reads it or writes to it runs each time, and says so."""
    for body in ("rows = con.execute('select a from t').fetchall()", "con.execute('insert into t values (5)');"):
        for value in (1, 1, 2):
            look = "look = con.execute('select * from t').fetchall()"
            plain = sessions.run([DUCKDB.format(value), body, look], tmp_path)
            found = sessions.run([DUCKDB.format(value), f"%%durable duck\n{body}", look], tmp_path)
            assert (found["state"]["look"], found["state"].get("rows")) == (plain["state"]["look"], plain["state"].get("rows"))
            assert found["told"][-1].startswith("not stored: con holds a _duckdb.DuckDBPyConnection, which can't be compared")


def test_a_key_that_a_client_is_made_with_is_read_anew_and_never_written_to_disk(sessions, tmp_path):
    """A rotated one costs nothing, and is the one that the restored client has."""
    cell = "%%durable client\nimport os, openai\nllm = openai.OpenAI(api_key=os.environ['OPENAI_API_KEY'])"
    for key, told in (("sk-one-and-only", "running: first run"), ("sk-another", "restored")):
        before = f"import os\nos.environ['OPENAI_API_KEY'] = '{key}'"
        found = sessions.run([before, cell, "look = llm.api_key"], tmp_path)
        assert (found["told"][-1], found["state"]["look"]) == (told, f"\"str '{key}'\"")
    written = [path for path in (tmp_path / ".durable_nb").rglob("*") if path.is_file()]
    assert not [path for path in written if b"sk-one-and-only" in path.read_bytes()]


def test_a_database_in_a_file_is_outside(sessions, tmp_path):
    """What was read through a connection of an earlier cell is kept, whatever the file holds now."""
    before = "import sqlite3\ncon = sqlite3.connect('outside.db')\nx = con.executescript('create table if not exists t (a); insert into t values (1);')\ndel x"
    read = "%%durable outside\nn = con.execute('select count(*) from t').fetchone()"
    first, second = (sessions.run([before, read], tmp_path) for _ in range(2))
    assert second["told"][-1] == "restored"
    assert second["state"]["n"] == first["state"]["n"]


SCRIPT = "import lib\nprint(lib.N, open('data.txt').read())"
CHILD = "import subprocess, sys\ny = subprocess.run([sys.executable, 'script.py'], capture_output=True, text=True).stdout"
OUTSIDE = {
    "what a child's script imports": ("", CHILD, {"lib.py": ("N = 1", "N = 22")}, "restored"),
    "what a child's script reads, which is none of it": ("", CHILD, {"data.txt": ("1", "22")}, "running: data.txt changed"),
    "a child's script, which is none of it": ("", CHILD, {"script.py": (SCRIPT, f"{SCRIPT}\nprint(1)")}, "running: script.py changed"),
    "attributes set on installed packages": ("import textwrap\ntextwrap.mine = len(open('data.txt').read())\n", "y = textwrap.mine", {"data.txt": ("1", "22")}, "restored"),
    "times of files": ("import os", "y = os.path.getmtime('data.txt')", {"data.txt": ("1", "1")}, "restored"),
}  # fmt: skip
"""Before, body, files as they are at first and then, what is said then."""


@pytest.mark.parametrize(("before", "body", "files", "said"), OUTSIDE.values(), ids=OUTSIDE.keys())
def test_what_lies_outside_changes_unseen(sessions, tmp_path, before, body, files, said):
    """As the table says; what stands beside it there is seen."""
    (tmp_path / "lib.py").write_text("N = 1")
    (tmp_path / "data.txt").write_text("1")
    (tmp_path / "script.py").write_text(SCRIPT)
    told = []
    for turn in (0, 0, 1):
        for name, contents in files.items():
            (tmp_path / name).write_text(contents[turn])
        told.append(sessions.run([before, f"%%durable cell\n{body}"], tmp_path)["told"][-1])
    assert told == ["running: first run", "restored", said]


def test_an_exception_comes_back_without_its_traceback(sessions, tmp_path):
    """Frames can't be stored."""
    cell = "%%durable cell\ntry: 1 / 0\nexcept ZeroDivisionError as e: keep = e"
    for lost in (False, True):
        found = sessions.run([cell, "look = keep.__traceback__ is None, str(keep)"], tmp_path)
        assert found["state"]["look"] == f'["builtins.tuple", "bool {lost}", "str \'division by zero\'"]'


def test_every_row_of_the_table_names_a_test_that_is_there():
    """docs/understand: what counts, what is made again, what is refused, what lies outside."""
    text = (Path(__file__).parents[1] / "docs" / "understand" / "what-a-hit-restores.md").read_text()
    within, outside = text.split("## What lies outside")
    rows = [line for line in within.splitlines() if line.startswith("| ") and "shown by" not in line]
    assert len(rows) > 30
    assert not [row for row in rows if "::test_" not in row]
    for file, name in re.findall(r"`(test_\w+\.py)::(test_\w+)`", within + outside):
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(), (file, name)


# -- in a real kernel ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with kernel(tmp_path_factory.mktemp("effects")) as started:
        yield started


LEFT_RUNNING = {
    "a task": ("async def go(): done.append(await asyncio.sleep(0.01, 1))\nasyncio.ensure_future(go());", "it leaves the task go running"),
    "a timer": ("asyncio.get_running_loop().call_later(0.01, done.append, 1);", "it leaves a timer that will call list.append()"),
    "a thread": ("import threading\nthreading.Thread(target=lambda: done.append(1) or __import__('time').sleep(2)).start()", "it leaves the thread"),
}  # fmt: skip


@pytest.mark.kernel
def test_what_goes_on_after_a_cell_keeps_it_from_being_stored(home):
    """Each time it is started anew."""
    for _ in range(2):
        for name, (body, why) in LEFT_RUNNING.items():
            shown = home.run(f"%%durable {name.split()[1]}\nimport asyncio\ndone = []\n{body}")
            assert shown.status == "ok", shown.traceback
            assert f"not stored: {why}" in shown.told[-1], shown.told
            home.run("import asyncio\nwhile not done: await asyncio.sleep(0.01)")
            assert home.value("done") == [1]
    assert (
        "not stored"
        not in home.run("%%durable calm\nawait asyncio.gather(asyncio.sleep(0.01), asyncio.sleep(0))\nx = 1").told[-1]
    )


@pytest.mark.kernel
def test_inline_figures_come_in_the_format_that_a_restored_cell_chose(home):
    """`%matplotlib inline`, `%config InlineBackend`, `plt.ioff()` hold for the cells below, and nothing shows twice."""
    setup = (
        "%%durable setup\n%matplotlib inline\n%config InlineBackend.figure_formats = ['svg']\n"
        "import this\nimport matplotlib.pyplot as plt\nplt.rc('figure', figsize=(1, 1))"
    )
    draw = "plt.plot([1, 2]);"
    seen = []
    for cell in (setup.partition("\n")[2], setup, setup):
        home.restart()
        first = home.run(cell)
        assert first.status == "ok", first.traceback
        seen.append((first.stdout, [sorted(d["data"]) for d in home.run(draw).displays], home.run("plt.get_fignums()").result))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][1] == [["image/svg+xml", "text/plain"]]
    assert "restored" in first.told[-1]


@pytest.mark.kernel
def test_a_figure_that_fails_to_draw_fails_each_time(home):
    """Its traceback is a message of its own, which nobody can show again."""
    home.restart()
    home.run("%matplotlib inline\nimport matplotlib.pyplot as plt")
    cell = "%%durable broken\nplt.plot([1])\nplt.title('$\\\\nonsense{$');\nx = 1"
    for _ in range(2):
        shown = home.run(cell)
        assert "ParseException" in shown.error or "ValueError" in shown.error, shown
        assert "not stored: it shows a traceback" in shown.told[-1]


@pytest.mark.kernel
def test_a_bar_in_the_notebook_shows_its_end_when_it_is_restored(home):
    """Its widget is gone with the kernel; what stands for it says how far it came."""
    cell = "%%durable bar\nfrom tqdm.notebook import tqdm\nfor _ in tqdm(range(7), desc='rows'): pass\nbar = tqdm(total=3)\nx = bar.update(3)\nbar.close()"
    for ran in (True, False):
        home.restart()
        shown = home.run(cell)
        assert shown.status == "ok", shown.traceback
        assert ("restored" in shown.told[-1]) is not ran, shown.told
        assert home.value("bar.n, bar.total") == (3, 3)
    texts = [display["data"]["text/plain"] for display in shown.displays]
    assert len(texts) == 2, texts
    assert texts[0].startswith("rows: 100%"), texts
    assert "7/7" in texts[0]
    assert "3/3" in texts[1]


@pytest.mark.kernel
def test_a_constructor_that_fails_leaves_its_name_unbound_and_everything_else_restored(home):
    """One line says so."""
    gate = "@durable.remake\nclass Gate:\n    def __init__(self, n):\n        if n > 3: raise RuntimeError('full')\n        self.n = lambda: n"
    cell = "%%durable fails --ignore n\ngate = Gate(n)\nx = 5"
    for n, bound in ((1, True), (2, True), (4, False)):
        home.restart()
        home.run(f"{gate}\nn = {n}")
        shown = home.run(cell)
        assert home.value("'gate' in globals(), x") == (bound, 5), shown.told
        assert not bound or home.value("gate.n()") == n
    assert any("gate is not bound: making it again failed (RuntimeError: full)" in line for line in shown.told), shown.told
    assert "restored" in shown.told[-1]
