"""What a cell stores of its values: after a hit they are what plain execution leaves, in identity and memory too."""

from __future__ import annotations

import re
import types

import pytest
from twin_sessions import comparing

from durable_nb import _patches


@pytest.fixture
def executed(sessions, tmp_path):
    """Compares all variables, after plain execution and after a durable cell; gives the last line of the durable cell."""
    run = comparing(sessions, tmp_path)
    return lambda *cells: run(*cells)[-1]


PLT = "import matplotlib\nmatplotlib.use('agg')\nimport matplotlib.pyplot as plt"
NP, PD = "import numpy as np", "import numpy as np, pandas as pd"
MEMORY = {
    "a view": (NP, "a = np.arange(10.)\nb = a[2:8:2]\nr = a[::-1]", "b[:] = 0; r[0] = 7; l = a.tolist(), r.base is a, b.base is a"),
    "a large view": (NP, "a = np.arange(500_000.)\nb = a.reshape(1000, 500)[3:7, ::5]", "b[:] = 0; l = a.sum()"),
    "of an earlier array": (NP + "\ngrid = np.arange(12).reshape(3, 4)", "row, col, t = grid[1], grid[:, 2], grid.T", "row[:] = 0; col[:] = 9; t[0] = 5; l = grid.tolist()"),
    "of an earlier view": (NP + "\na = np.arange(20)\nh = a[2:18:2]", "g = h[1:3]", "g[:] = -1; l = a.tolist()"),
    "of an earlier array that changed": (NP + "\ngrid = np.arange(4)", "grid[0] = 9\nrow = grid[:2]", "row[1] = 7; l = grid.tolist()"),
    "Fortran order": (NP, "f = np.asfortranarray(np.arange(6.).reshape(2, 3))\nv = f[:, 1]", "v[:] = 0; l = f.tolist(), f.flags.f_contiguous"),
    "another dtype": (NP, "a = np.zeros(4)\nbits = a.view('u8')\nre = np.zeros(3, complex)\nim = re.imag", "bits[0] = 1; im[1] = 5; l = a.tolist(), re.tolist()"),
    "a field": (NP, "rec = np.zeros(3, [('x', 'i4'), ('y', 'f8')])\nx = rec['x']", "x[:] = 4; l = rec.tolist()"),
    "an empty view": (NP, "v = np.arange(8.).reshape(4, 2)[4:]", "l = v.shape"),
    "a displayed view": (NP + "\nA = np.arange(12).reshape(3, 4)", "A[1:3]", "_[0] = 9; l = A.tolist()"),
    "a displayed view of a large array": (NP + "\nA = np.arange(300_000.).reshape(3, -1)", "A[1:3]", "_[0] = 9; l = A.sum()"),
    "of a frame of one column of its kind": (PD, "d = pd.DataFrame({'a': np.arange(9.), 's': list('abcabcabc')})\nd['b'] = d.a * 2\nd.loc[[3], 'b'] = np.nan\nd = d.dropna()\nd[-5:]", "l = d.b.tolist(), _.b.tolist()"),
    "objects": (NP, "o = np.array([[1], 'b', None, {}], dtype=object)\np = o[1:3]", "p[0] = 'new'; l = o.tolist()"),
    "two views of something gone": (NP, "a = np.arange(10)\nu, v = a[:6], a[4:]\ndel a", "u[5] = 99; l = v.tolist()"),
    "a matrix": (NP, "m = np.matrix([[1, 2], [3, 4]])\nr = m[0]", "r[0, 0] = 9; l = m.tolist(), type(r).__name__"),
    "read-only": (NP, "a = np.arange(4)\nb = a[1:]\nb.flags.writeable = False", "a[1] = 7; l = b.tolist(), b.flags.writeable"),
    "of a read-only owner": (NP, "a = np.arange(4)\nb = a[1:]\na.flags.writeable = False", "b[0] = 7; l = a.tolist(), a.flags.writeable"),
    "in odd containers": (NP + "\nimport collections, types", "a = np.arange(6)\no = collections.OrderedDict(v=a[1:])\nd = collections.defaultdict(list, v=a[2:])\nq = collections.deque([a[3:]])\nn = types.SimpleNamespace(v=a[4:])", "a[:] = 0; l = o['v'].tolist(), d['v'].tolist(), q[0].tolist(), n.v.tolist()"),
    "in a library's object": ("import numpy as np\nfrom sklearn.utils import Bunch\ndata = Bunch(X=np.arange(6.))", "b = Bunch(d=np.arange(4.))\nv, w = b.d[1:], data.X[2:]", "v[:] = 0; w[:] = 0; l = b.d.tolist(), data.X.tolist()"),
    "a frame's": (PD, "a = np.arange(4.0)\nd = pd.DataFrame({'a': a}, copy=False)", "a[0] = 9; l = d.a.tolist()"),
    "of an earlier frame": (PD + "\nd = pd.DataFrame({'a': [1., 2.], 'b': [3., 4.]})", "v = d.to_numpy()", "d.loc[0, 'a'] = 9; l = v.tolist(), v.flags.writeable"),
    "frames that share columns": (PD, "d = pd.DataFrame({'a': [1, 2], 's': ['x', 'y']})\ne = d.copy(deep=False)\nf = d.rename(columns={'a': 'z'})\ns = d['a']", "e.loc[0, 'a'] = 9; f.loc[1, 'z'] = 8; s[0] = 5; d.loc[0, 's'] = 'q'; l = d.to_dict('list'), e.to_dict('list'), f.to_dict('list'), s.tolist()"),
    "an index out of a column": (PD, "d = pd.DataFrame({'a': [1, 2], 'b': [3, 4]})\ne = d.set_index('a', drop=False)\ni = pd.Index(d['a'])", "d.loc[0, 'a'] = 9; e.loc[1, 'a'] = 7; l = e.index.tolist(), i.tolist(), d.a.tolist()"),
    "dates that frames share": (PD, "d = pd.DataFrame({'t': pd.to_datetime(['2027-01-01', None]), 'c': pd.Categorical(['x', 'y'])})\ne = d.copy(deep=False)", "e.loc[0, 't'] = pd.Timestamp('2020-01-01'); e.loc[0, 'c'] = 'y'; l = d.t.tolist(), d.c.tolist()"),
}  # fmt: skip
"""Before, body, after."""

VALUES = {
    "a NaN is the NaN": (NP + "\nimport math", "d = {np.nan: 1, math.nan: 2}\nq = [np.nan, float('nan')]\no = np.array([np.nan], dtype=object)", "l = d.get(np.nan), d.get(math.nan), q[0] is np.nan, q[1] is np.nan, o[0] is np.nan, np.nan in q"),
    "a dict that is its own namespace": ("", "class Bunch(dict):\n    def __init__(self, **k):\n        super().__init__(**k)\n        self.__dict__ = self\nb = Bunch(x=1)", "b.y = 2; l = b['y'], b.x, b.__dict__ is b"),
    "an array that owns its memory": (NP, "a = np.arange(4)\nb = a.view()\nc = a.copy()\nc.flags.writeable = False", "l = a.flags.owndata, b.flags.owndata, a.base, b.base is a, c.flags.owndata, c.flags.writeable"),
    "a Bunch of scikit-learn": ("import numpy as np", "from sklearn.utils import Bunch\nb = Bunch(x=np.arange(3), y=[1])", "b.z = 2; l = b['z'], b.x.tolist()"),
    "an error from None": ("", "try:\n    try: 1 / 0\n    except ZeroDivisionError: raise ValueError('v') from None\nexcept ValueError as e: keep = e", "l = keep.__suppress_context__, keep.__cause__, keep.args"),
    "the order of class attributes": ("", "class C:\n    z = 1\n    def b(self): pass\n    a = 2\nc = C()", "l = [name for name in vars(C) if name[0] != '_']"),
    "functions have sources of their own": ("", "def f(): return 1\ndef g(x):\n    return x / 0\nh = lambda: 3", "import inspect\nl = inspect.getsource(f), inspect.getsource(g), inspect.getsource(h)"),
    "functions belong to their cell": ("", "def f(): return 1\nclass C:\n    def m(self): return 1 / 0", "names = get_ipython().compile._filename_map\nl = names[f.__code__.co_filename], names[C.m.__code__.co_filename]\ndel names"),
    "a new type": ("", "from typing import NewType\nUser = NewType('User', int)\nu = User(3)", "l = User(4), User.__name__, User.__supertype__ is int"),
    "an earlier type variable": ("from typing import Generic, NewType, TypeVar\nT = TypeVar('T')\nU = NewType('U', int)", "class S(Generic[T]):\n    def __init__(self): self.i = []\ns = S[int]()\nkinds = [T, U]", "l = S.__parameters__[0] is T, kinds[0] is T, kinds[1] is U, type(s) is S"),
    "an earlier function by name": ("def f(): return 1\ntable = {'f': f}", "g = table['f']\nh = [f, g]", "l = g is f, h[0] is f, h[1] is table['f']"),
    "a figure": ("import matplotlib; matplotlib.use('agg')\nimport matplotlib.pyplot as plt", "fig, ax = plt.subplots()\nlines = ax.plot([1, 2])\nax.set_title('t'); plt.close(fig)", "l = fig.axes[0] is ax, ax.lines[0] is lines[0], ax.get_title(), lines[0].get_ydata().tolist()\ndel fig, ax, lines"),
    "an estimator": ("from sklearn.linear_model import LinearRegression", "m = LinearRegression().fit([[0.], [1.]], [1., 3.])", "l = m.predict([[2.]]).round(6).tolist(), m.get_params()"),
    "named tuples and enums": ("", "import collections, enum\nP = collections.namedtuple('P', 'x y')\np = P(1, [2])\nclass E(enum.Enum):\n    A = 1\ne = [E.A]", "l = p.x, type(p) is P, e[0] is E.A"),
    "frozen dataclasses in a set": ("import dataclasses", "@dataclasses.dataclass(frozen=True)\nclass K:\n    a: int\ns = {K(1), K(2)}\nd = {K(3): [1]}", "l = K(1) in s, d[K(3)]"),
    "an enumeration in the order of its class": ("import enum", "class C(enum.Enum):\n    R = 1\n    G = 2\n    @property\n    def shown(self): return hex(self.value)\n    @property\n    def a(self): return 1\n    def z(self): return 2", "l = list(vars(C)), C.R.shown, list(C), C['G'].a"),
    "members that have attributes": ("import enum", "class P(enum.Enum):\n    E = (5.9, 6.3)\n    M = (3.3, 2.4)\n    def __init__(self, m, r):\n        print('made')\n        self.mass, self.radius = m, r\nx = P.E\nP.M.next = P.E", "l = x.mass, P((3.3, 2.4)) is P.M, vars(P.E), P.M.next is x"),
    "members that are texts": ("import enum", "class C(str, enum.Enum):\n    R = 'r', 1\n    G = 'g', 2\n    def __new__(cls, v, n):\n        o = str.__new__(cls, v); o._value_ = v; o.n = n\n        return o\nm = [C.R, C.G]", "l = C('r') is C.R, C.R.n, C.R + 'x', m[0] is C.R, str(C.R), hash(C.R) == hash('r'), {C.R: 1}[C.R]"),
    "members of a dataclass": ("import enum, dataclasses", "@dataclasses.dataclass\nclass D:\n    a: int\n    b: list = dataclasses.field(default_factory=list)\nclass E(D, enum.Enum):\n    X = 1\n    Y = 2, [3]", "l = E.X.a, E.Y.b, E.X.value"),
    "flags, aliases, nested and generated ones": ("import enum", "class O:\n    class K(enum.IntEnum):\n        A = enum.auto()\n        ALIAS = 1\n        @classmethod\n        def of(cls, n): return cls(n)\nclass F(enum.Flag):\n    A = enum.auto()\n    B = enum.auto()\n    AB = A | B\nf, rw = F.A | F.B, O.K.of(1)\nG = enum.Enum('G', 'X Y')\nclass L(enum.Enum):\n    def _generate_next_value_(name, *_): return name.lower()\n    X = enum.auto()\n    @classmethod\n    def _missing_(cls, v): return cls.X", "l = f is F.AB, list(F), F(3), rw is O.K.A, O.K.ALIAS.name, ~F.A, list(G), G.__module__, L('other') is L.X, L.X.value"),
    "objects in each other's sets and dicts, with a hash of their own": ("import dataclasses", "class Node:\n    def __init__(s, n): s.n = n; s.kids = set(); s.at = {}\n    def __repr__(s): return f'N{s.n}'\n    def __hash__(s): return hash(s.n)\n    def __eq__(s, o): return s.n == o.n\nr = Node(1); k = Node(2); k.parent = r; r.kids.add(k); r.at[k] = 1; k.at[r] = 2\nclass S:\n    __slots__ = ('k', 'near')\n    def __init__(s, *k): s.k = k; s.near = set()\n    def __hash__(s): return hash(s.k)\n    def __eq__(s, o): return s.k == o.k\np = S(1, 2); q = S(3); p.near.add(q); q.near.add(p)\n@dataclasses.dataclass(unsafe_hash=True)\nclass D:\n    n: int\n    peers: set = dataclasses.field(default_factory=set, hash=False, compare=False, repr=False)\nx = D(1); x.peers.add(x)", "l = k in r.kids, k.parent is r, r.at[Node(2)], k.at[r], list(vars(k)), next(iter(r.kids)) is k, q in p.near, p in q.near, x in x.peers; del r, k, p, q, x"),
    "members in sets, keys and defaults": ("import enum", "class E(enum.Enum):\n    A = [1]\n    B = {'k': 2}\ns = {E.A, E.B}; d = {E.A: [E.B]}\ndef f(e=E.A): return e", "l = E.A in s, d[E.A][0] is E.B, f() is E.A, E([1]) is E.A"),
}  # fmt: skip
IRIS = "import numpy as np\nX = np.arange(20.).reshape(10, 2); y = np.arange(10) % 2\n"
CHANGED = {
    "results of a frame, which is read-only": (PD + "\nimport statsmodels.api as sm\nd = pd.DataFrame({'a': np.arange(6.)})\nr = sm.OLS(pd.Series([1., 2, 2, 4, 5, 7]), sm.add_constant(d)).fit()", "q = float(r.rsquared)\nt = str(r.summary())[:40]", "l = r.rsquared == q; del r"),
    "a frame's index renamed": (PD + "\nix = pd.Index([1, 2]); df = pd.DataFrame({'a': [1, 2]}, index=ix)", "df.index.name = 'k'\ndf.columns.name = 'c'", "l = ix.name, df.index.name, df.index is ix, df.columns.name"),
    "an index replaced by one of another name": (PD + "\nix = pd.Index([1, 2]); df = pd.DataFrame({'a': [1, 2]}, index=ix)", "df.index = df.index.rename('k')", "l = ix.name, df.index.name, df.index is ix"),
    "what a function remembers": ("def memo(f):\n    cache = {}\n    def g(n):\n        if n not in cache: cache[n] = f(n)\n        return cache[n]\n    g.cache = cache\n    return g\n@memo\ndef fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\nc = fib.cache", "x = fib(6)", "l = len(c), fib.cache is c, fib(7), len(c)"),
    "a variable of a closure": ("def make():\n    n = 0\n    def inc():\n        nonlocal n\n        n += 1\n        return n\n    return inc\ninc = make()", "a = inc(), inc()", "l = inc()"),
    "an attribute of a function": ("def f():\n    f.calls += 1\nf.calls = 0\ng = f", "f(); f()\nf.by = [f]", "l = g.calls, g is f, g.by[0] is f"),
    "an attribute of a class": ("class C:\n    n = 0\n    made = []\n    def __init__(self):\n        C.n += 1\n        C.made.append(self.n)\nD, m = C, C.made", "a, b = C(), C()\nC.late = 'x'", "l = D.n, D.made, m is D.made, C is D, D.late"),
    "a partial's arguments": ("import functools\np = functools.partial(dict, a=[1]); q = p", "p.keywords['b'] = 2\np.tag = 1", "l = q(), q.tag, q is p"),
    "an index renamed": (PD + "\nix = pd.Index([1, 2]); df = pd.DataFrame({'a': [1, 2]}, index=ix)", "ix.name = 'k'", "l = ix.name, df.index.name, df.index is ix"),
    "a series' index renamed": (PD + "\ns = pd.Series([1, 2], index=[3, 4]); ix = s.index", "s.index.name = 'k'\ns.name = 'n'", "l = ix.name, s.index is ix, s.name"),
    "a frame around an earlier index": (PD + "\nix = pd.Index([1, 2], name='k')", "df = pd.DataFrame({'a': [1, 2]}, index=ix)", "l = df.index is ix"),
    "a method of a class": ("class Room:\n    def d(self): return 1\n    k = 2\nr = Room()", "def f(self): return 5\nRoom.describe = Room.d = f\nRoom.p = property(lambda s: 2)\nRoom.s = staticmethod(len)\nRoom.__repr__ = lambda s: 'R'\ndel Room.k", "l = r.describe(), r.d(), Room.d is f, r.p, r.s('ab'), repr(r), hasattr(r, 'k')"),
    "another size of an array": (NP + "\na = np.arange(4); b = [a]", "a.resize((2, 3), refcheck=False)\na[1] = 7", "l = a.tolist(), b[0] is a"),
    "an array of Python's": ("import array\ns = array.array('i', [1]); t = s", "s.append(2)", "l = list(s), t is s"),
    "files in memory": ("import io\nb = io.StringIO(); c = io.BytesIO(b'xyz'); held = [b, c]", "b.write('abc')\nx = c.read(1)", "l = b.getvalue(), b.tell(), c.tell(), held[0] is b; del b, c, held"),
    "where an iterator is": ("i = iter([1, 2, 3]); j = iter((4, 5)); k = i", "x = next(i), list(j)", "l = list(k), list(j), k is i"),
    "a shape set": (NP + "\na = np.arange(6); b = a", "a.shape = 2, 3\na[0, 0] = 9", "l = a.tolist(), b is a, b.shape"),
    "slots": ("class S:\n    __slots__ = ('x', 'y')\n    def __init__(self): self.x = 1\ns = S(); t = s", "s.x += 1\ns.y = [s]", "l = s.x, s.y[0] is s, t is s"),
    "a list of one's own": ("class L(list):\n    pass\nx = L([1]); y = x", "x.append(2); x.tag = 'k'", "l = list(y), y.tag, y is x"),
    "a dict of one's own": ("class D(dict):\n    __getattr__ = dict.get\nx = D(a=1); y = x", "x['b'] = [x]", "l = sorted(y), y.b[0] is x"),
    "one with a state of its own": ("import threading\nclass A:\n    def __init__(self): self.n = 0; self.log = []\n    def __getstate__(self): return {'n': self.n}\n    def __setstate__(self, s): self.n, self.log = s['n'], []\na = A(); log = a.log", "a.n += 1\na.log.append(3)", "l = a.n, a.log, a.log is log"),
    "a model is fitted": (IRIS + "from sklearn.linear_model import LogisticRegression\nm = LogisticRegression(); held = [m]", "m.fit(X, y);", "l = held[0] is m, m.predict(X).tolist(), m.n_features_in_"),
    "a model is fitted again": (IRIS + "from sklearn.ensemble import RandomForestClassifier\nm = RandomForestClassifier(n_estimators=3, random_state=0).fit(X, y); held = [m]", "m.fit(X, 1 - y)\np = m.predict(X)", "l = held[0] is m, m.predict(X).tolist(), len(m.estimators_)"),
    "a pipeline": (IRIS + "from sklearn.pipeline import make_pipeline\nfrom sklearn.preprocessing import StandardScaler\nfrom sklearn.neighbors import KNeighborsClassifier\nscale = StandardScaler()\npipe = make_pipeline(scale, KNeighborsClassifier(2))", "pipe.fit(X, y)\ns = pipe.score(X, y)", "l = pipe.predict(X).tolist(), pipe.steps[0][1] is scale, scale.mean_.tolist()"),
    "groups are aggregated": (PD + "\ndf = pd.DataFrame({'k': list('abab'), 'v': [1, 2, 3, 4]})\ng = df.groupby('k')", "m = g.mean()\nn = g.ngroups", "l = g.sum().to_dict(), m.to_dict(), g.obj is df"),
    "a match": ("import re", "m = re.search('b(.)', 'abcd')\nk = list(re.finditer('a', 'banana'))[1]\nf = re.compile('x').fullmatch('x')", "l = m.group(1), m.span(), k.span(), k.string is not None, f.re.pattern"),
    "a csv writer": ("import csv, io", "with open('w.csv', 'w') as f:\n    w = csv.writer(f, delimiter=';')\nbuffer = io.StringIO()\nv = csv.writer(buffer)", "v.writerow([1, 2]); l = buffer.getvalue(), w.dialect.delimiter, f.closed; del buffer, v"),
    "a function that dispatches": ("import functools", "@functools.singledispatch\ndef tell(x):\n    'Tells.'\n    return 'any'\n@tell.register\ndef of_int(x: int): return 'int', tell('a')\ntell(3)", "tell.register(list, len); l = tell(3), tell([1, 2]), tell.__doc__, tell.__name__, tell.registry[object] is tell.__wrapped__"),
    "numpy's global generator": ("import numpy as np, random\nfrom scipy import stats", "n = stats.norm(2)\npick = random.choice\ng = np.random.mtrand._rand", "np.random.seed(3); random.seed(3); l = n.rvs(2).tolist(), pick(range(99)), g is np.random.mtrand._rand"),
    "records": (NP, "r = np.rec.array([(1, 2.)], dtype=[('x', 'i4'), ('y', 'f8')])", "l = r.x.tolist(), r[0].y, type(r) is np.recarray"),
    "a formula's design": ("import numpy as np, patsy\nx = {'a': np.arange(4.), 'g': list('uvuv')}\ndef twice(v): return 2 * v", "d = patsy.dmatrix('twice(a) + C(g)', x)", "l = d.design_info.column_names, np.asarray(patsy.build_design_matrices([d.design_info], x)[0]).tolist()"),
    "a formula's results": ("import numpy as np, pandas as pd, statsmodels.formula.api as smf\nf = pd.DataFrame({'a': np.arange(6.), 'y': [1., 2, 2, 4, 5, 7]})\ndef twice(v): return 2 * v", "r = smf.ols('y ~ twice(a)', f).fit()", "l = r.predict(pd.DataFrame({'a': [1.]})).round(6).tolist(), r.params.round(6).tolist()"),
    "classes that hear of their subclasses": ("", "class Base:\n    def __init_subclass__(cls, **k): Base.kinds = [*getattr(Base, 'kinds', []), cls.__name__]\nclass A(Base):\n    x = 1\nclass B(A): pass", "class C(B): pass\nl = Base.kinds, [c.__name__ for c in Base.__subclasses__()], B.__mro__ == (B, A, Base, object), A.x"),
    "abstract and generic classes": ("import abc, typing", "class S(abc.ABC):\n    def __init_subclass__(cls, **k): S.kinds = [*getattr(S, 'kinds', []), cls.__name__]\nclass C(S): pass\nclass Q(S):\n    __slots__ = ('side',)\nT = typing.TypeVar('T')\nclass Box(typing.Generic[T]): pass", "l = S.kinds, C.__mro__[1] is S, issubclass(Q, S), Box[int].__args__, Box.__parameters__ == (T,); del S, C, Q, Box, T"),
    "a class made by another": ("made = []", "class Meta(type):\n    def __new__(m, name, bases, space):\n        print('made', name)\n        return super().__new__(m, name, bases, {**space, 'by': 'Meta'})\nclass T(metaclass=Meta):\n    n = 1", "class U(T): pass\nl = type(T) is Meta, T.by, U.by, T.n"),
    "a figure and its axes": (PLT, "fig, ax = plt.subplots()\nline, = ax.plot([1, 2])\nax.legend(['a'])\nplt.close(fig)", "line.remove(); ax.set_title('t'); l = fig.axes[0] is ax, ax.figure is fig, len(ax.lines), ax.get_legend().texts[0].get_text(); del fig, ax, line"),
    "a search of two grids": (NP + "\nfrom sklearn.linear_model import Ridge\nfrom sklearn.model_selection import GridSearchCV", "g = GridSearchCV(Ridge(), [{'alpha': [1.]}, {'tol': [.1]}], cv=2).fit(np.eye(6), np.arange(6.))", "l = g.best_params_, g.cv_results_['param_tol'].mask.tolist(), g.cv_results_['param_tol'].fill_value; del g"),
    "a search tree": ("import numpy as np\nfrom scipy.spatial import KDTree", "t = KDTree(np.arange(12.).reshape(6, 2))", "l = t.query([4., 5.])[1].item(); del t"),
    "results that remember what was read": (IRIS + "import statsmodels.api as sm\nr = sm.OLS(y, sm.add_constant(X[:, :1])).fit()", "q = float(r.rsquared)\np = r.pvalues.round(6).tolist()\nt = str(r.summary())[:40]", "l = r.rsquared == q, len(r.params)"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("before", "body", "after"), {**MEMORY, **VALUES, **CHANGED}.values(), ids=[*MEMORY, *VALUES, *CHANGED]
)
def test_values_come_back_as_they_were(executed, before, body, after):
    """What is written to one of two arrays in one memory is seen in the other, as after plain execution."""
    assert not executed(before, body, after).startswith("not stored")
    assert executed(before, body, after) == "restored"


REFUSED = {
    "an open file": ("open('f.txt', 'w').close()", "f = open('f.txt')", "f (TextIOWrapper) can't be pickled"),
    "objects in sets by what they are yet to hold": ("", "class Node:\n    def __repr__(s): return str(s.n)\n    def __init__(s, n): s.n = [n]; s.kids = set()\n    def __hash__(s): return hash(s.n[0])\n    def __eq__(s, o): return s.n == o.n\nr = Node(1); k = Node(2); k.parent = r; r.kids.add(k)", "k (Node) holds a Node, which does not come back whole"),
    "a state that drops": ("class A:\n    def __init__(self): self.c = [1]\n    def __getstate__(self): return {'x': 1}", "a = A()", "a (A) holds a A, which does not come back whole"),
    "known by its name only": ("", "class A:\n    def __reduce__(self): return 'a'\na = A()", "a (A) can't be pickled"),
}  # fmt: skip


@pytest.mark.parametrize(("before", "body", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_come_back_is_not_stored(executed, before, body, why):
    """And it is said when the cell runs first."""
    for _ in range(2):
        assert executed(before, body).startswith(f"not stored: {why}")


STEPS = {
    "a function of the notebook": ("def helper(x): return x + 1\ndef f(): return helper\ndef g(): return [helper, len]", "h = STEP(f)\nq = STEP(g)", "l = h is helper, q[0] is helper, q[1] is len"),
    "a global object": ("CONFIG = {'a': [1]}\ndef f(): return CONFIG\ndef g(): return [CONFIG['a'], 5]", "c = STEP(f)\nq = STEP(g)", "l = c is CONFIG, q[0] is CONFIG['a'], q"),
    "its argument": ("rows = [[1], [2]]\ndef f(r): return r\ndef g(r): return {'first': r[0]}\ndef h(r):\n    r.append([3])\n    return r, r[-1]", "a = STEP(f, rows)\nb = STEP(g, rows)\nc = STEP(h, rows)", "l = a is rows, b['first'] is rows[0], c[0] is rows, c[1] is rows[2], rows"),
    "a view of its argument": (NP + "\na = np.arange(6)\ndef f(x): return x[2:]\ndef g(x):\n    x[0] = 9\n    return x[:2]", "v = STEP(f, a)\nw = STEP(g, a)", "v[0] = 7; w[1] = 8; l = a.tolist()"),
    "a model fitted in place": (IRIS + "from sklearn.linear_model import LogisticRegression\nm = LogisticRegression()\ndef fit(m, X, y): return m.fit(X, y)", "n = STEP(fit, m, X, y)", "l = n is m, m.predict(X).tolist()"),
    "a NaN": (NP + "\ndef f(): return [np.nan, 1.5]", "v = STEP(f)", "l = v[0] is np.nan, v[1]"),
    "views of one array": (NP + "\ndef f():\n    a = np.arange(6)\n    return a, a[2:]", "a, v = STEP(f)", "v[0] = 7; l = a.tolist()"),
}  # fmt: skip
"""Before, body with steps, after."""


@pytest.mark.parametrize(("before", "body", "after"), STEPS.values(), ids=STEPS.keys())
def test_what_a_step_returned_comes_back_as_it_was(sessions, tmp_path, before, body, after):
    """Restored in an edited cell, with the identity that it had."""
    counted = before.replace("(): return", "():\n    open('ran', 'a').write('x')\n    return")
    durable = re.sub(r"STEP\((\w+)", r"await durable.run('\1', \1", body)
    plain = re.sub(r"STEP\((\w+)(, )?", r"\1(", body)
    for edit in ("edit = 1", "edit = 2"):
        expected = sessions.run([counted, f"{plain}\n{edit}", after], tmp_path)
        (tmp_path / "ran").unlink(missing_ok=True)
        found = sessions.run([counted, f"%%durable cell\n{durable}\n{edit}", after], tmp_path)
        assert found["state"] == expected["state"]
        assert not [line for line in found["told"] if line.startswith(("not stored", "warning"))]
    assert not (tmp_path / "ran").exists(), "a step was executed again"


def test_a_step_that_returns_an_open_file_is_refused(sessions, tmp_path):
    """It can't come back; what would is a copy of its text."""
    before = "open('f.txt', 'w').close()\ndef f(): return open('f.txt')"
    shown = sessions.run([before, "%%durable cell\nv = await durable.run('f', f)"], tmp_path)["shown"][-1]
    assert "can't be stored (TypeError: cannot pickle an open file" in shown[2]


def test_a_change_is_made_again_to_an_object_of_its_kind_only():
    """Where one of the places holds another kind of object by now, none of them is touched."""
    stored = {("step", 0): [1, 2], ("step", 1): types.SimpleNamespace(a=1)}
    packed = _patches.pack([(place, _patches.content_of(obj)) for place, obj in stored.items()], None, stored)
    live = {("step", 0): [1], ("step", 1): [5]}
    with pytest.raises(KeyError):
        _patches.apply(packed, live, None)
    assert live == {("step", 0): [1], ("step", 1): [5]}
    live["step", 1] = types.SimpleNamespace()
    _patches.apply(packed, live, None)
    assert live == stored
