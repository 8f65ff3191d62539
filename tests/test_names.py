"""Which names a cell reads from the notebook, and which it binds."""

from __future__ import annotations

import ast
import contextlib
import re
import sys
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from durable_nb._cellcache.names import dynamic_reads, names_of


def of(source):
    return names_of(ast.parse(textwrap.dedent(source)))


def reads(source):
    return " ".join(sorted(of(source).read))


def binds(source):
    return " ".join(sorted(of(source).bound))


# -- a table: code, what it reads, what it binds ----------------------------------------------------------------------

TABLE = [
    # plain statements
    ("", "", ""),
    ("1 + 1", "", ""),
    ("x", "x", ""),
    ("x = y", "y", "x"),
    ("x = x", "x", "x"),
    ("x = 1; y = x", "", "x y"),
    ("x += 1", "x", "x"),
    ("x = 1; x += 1", "", "x"),
    ("x: int = 1; x", "int", "x"),
    ("x: int", "int", ""),
    ("(a, *b), c = y; a, b, c", "y", "a b c"),
    ("a = b = c", "c", "a b"),
    ("x.y = z", "x z", ""),
    ("x[i] = z", "i x z", ""),
    ("x[i] += z", "i x z", ""),
    ("x = 1; del x", "", "x"),
    ("del x", "x", "x"),
    ("del x.y, z[0]", "x z", ""),
    ("x = 1\ndel x\nx", "x", "x"),
    ("import a.b, c as d\na, d", "", "a d"),
    ("from m import a as b, c\nb, c", "", "b c"),
    ("print(x)", "print x", ""),
    ("f'{x!r:{w}}'", "w x", ""),
    ("await x", "x", ""),
    ("assert x, y", "x y", ""),
    ("raise x from y", "x y", ""),
    # branches
    ("if c: x = 1\nx", "c x", "x"),
    ("if c: x = 1\nelse: x = 2\nx", "c", "x"),
    ("if c: x = 1\nelif d: x = 2\nx", "c d x", "x"),
    ("if c: raise E\nelse: x = 1\nx", "E c", "x"),
    ("x = 1 if c else y", "c y", "x"),
    # loops
    ("for i in s: pass\ni", "i s", "i"),
    ("for i in s: i", "s", "i"),
    ("for i in s: x = 1\nx", "s x", "i x"),
    ("for i in s: x = 1\nelse: x = 2\nx", "s", "i x"),
    ("for i in s:\n  if c: break\nelse: x = 1\nx", "c s x", "i x"),
    ("for i in s:\n  y = x\n  x = 1", "s x", "i x y"),
    ("for i in s:\n  f\n  def f(): return x\nx = 1", "f s x", "f i x"),
    ("while f():\n  def f(): return x\nx = 1", "f x", "f x"),
    ("while c: x = 1\nx", "c x", "x"),
    ("while True:\n  x = 1\n  break\nx", "", "x"),
    ("while True:\n  if c: break\n  x = 1\nx", "c x", "x"),
    ("while 1:\n  if c: continue\n  x = 1\n  break\nx", "c", "x"),
    ("while (n := f()): pass\nn", "f", "n"),
    ("for i in s:\n  if c: continue\n  x = 1\nelse: x\n", "c s x", "i x"),
    ("async for i in s: i", "s", "i"),
    # exceptions
    ("try: x = 1\nexcept E: pass\nx", "E x", "x"),
    ("try: x = 1\nexcept E: x = 2\nx", "E", "x"),
    ("try: x = 1\nexcept E as e: e\nelse: x", "E", "e x"),
    ("try: x = 1\nexcept E as e: pass\ne", "E e", "e x"),
    ("try: x = 1\nfinally: x", "x", "x"),
    ("try: f()\nfinally: x = 1\nx", "f", "x"),
    ("try: x = 1\nexcept E: raise\nx", "E", "x"),
    ("for i in s:\n  try: break\n  finally: y = 1\nelse: x = 1\nx", "s x", "i x y"),
    # with
    ("with open(p) as f: x = f\nx", "open p", "f x"),
    ("with suppress(E): x = 1\nx", "E suppress x", "x"),
    ("with m as (a, b): a, b", "m", "a b"),
    # match
    ("match s:\n  case [a, *b]: a, b\n  case {'k': c, **d}: c, d\n  case P(x=e) | Q(e): e", "P Q s", "a b c d e"),
    ("match s:\n  case [a]: pass\na", "a s", "a"),
    ("match s:\n  case 1: x = 1\n  case _: x = 2\nx", "s", "x"),
    ("match s:\n  case K.a: pass\n  case y if g(y): pass", "K g s", "y"),
    ("match s:\n  case {K.x: v}: v", "K s", "v"),
    # expressions with scopes of their own
    ("[x for x in s if x > y]", "s y", ""),
    ("[a for b in s for a in b]", "s", ""),
    ("x = 1\n[x for x in x]", "", "x"),
    ("{k: v for k, v in s}", "s", ""),
    ("[last := v for v in s]\nlast", "last s", "last"),
    ("lambda a, b=c, *d, e=f, **g: (a, b, d, e, g, h)", "c f h", ""),
    ("(y := x)\ny", "x", "y"),
    ("c and (y := x)\ny", "c x y", "y"),
    ("sum(i for i in (j for j in k))", "k sum", ""),
    # functions: read where they are first mentioned
    ("def f(a, b: T = d) -> R: return a + x", "R T d x", "f"),
    ("def f(): return x\nx = 1\nf()", "", "f x"),
    ("def f(): return x\nf()\nx = 1", "x", "f x"),
    ("def f(): return g()\ndef g(): return x\nx = 1\nf()", "", "f g x"),
    ("def f(): return f()\nf()", "", "f"),
    ("def f():\n  x = 1\n  return x\nf()", "", "f"),
    ("def f():\n  global x\n  x = 1\nf()\nx", "x", "f x"),
    ("def f():\n  def g(): return x\n  return g\nf()", "x", "f"),
    ("def f():\n  x = 1\n  def g(): return x\n  return g\nf()", "", "f"),
    ("def f():\n  from m import x\n  try: pass\n  except E as e: e\n  with x as y: y\n  for z in y: z\nf()", "E", "f"),
    ("def f():\n  return [x for x in y], x\nf()", "x y", "f"),
    ("def f():\n  if (n := y): return n\nf()", "y", "f"),
    ("@d\ndef f(): return x\nx = 1", "d x", "f x"),
    ("f = lambda: x\nf()", "x", "f"),
    ("async def f(): return await x\nx = 1\nawait f()", "", "f x"),
    # classes: their bodies run at once, their methods when the class is mentioned
    ("class A(B, m=M): x = y", "B M y", "A"),
    ("class A:\n  x = 1\n  y = x", "", "A"),
    ("class A:\n  def m(self): return x\nx = 1\nA()", "", "A x"),
    ("class A:\n  def m(self): return x\nA()\nx = 1", "x", "A x"),
    ("class A:\n  x = 1\n  def m(self): return x\nA()", "x", "A"),
    ("def f(): return x\nclass A: y = f()\nx = 1", "x", "A f x"),
]


@pytest.mark.parametrize(("source", "read", "bound"), TABLE, ids=[row[0] or "nothing" for row in TABLE])
def test_what_a_cell_reads_and_binds(source, read, bound):
    assert reads(source) == read
    assert binds(source) == bound


HIDDEN = {
    "a function called in one branch, and after it": "def f(): return x\nif c:\n  x = 1\n  f()\nf()",
    "a function called in a try, and in its handler": "def f(): return x\ntry:\n  g()\n  x = 1\n  f()\nexcept E:\n  f()",
    "a function called in a loop that may not run": "def f(): return x\nfor i in s:\n  x = 1\n  f()\nf()",
    "a function with one body in each branch": "if c:\n  def f(): return x\nelse:\n  def f(): return y\nf()",
    "a function with a fall-back": "try:\n  def f(): return x\n  g()\nexcept E:\n  def f(): return y\nf()",
    "a helper defined after its caller was handed on": "def f(): return g()\ncb = f\ndef g(): return x\ncb()\nx = 1",
    "a helper of a method": "class A:\n  def m(self): return g()\na = A()\ndef g(): return x\na.m()\nx = 1",
    "a method of a class within a class": "class A:\n  class B:\n    def m(self): return x\nA.B().m()",
    "a method under a condition": "class A:\n  if c:\n    def m(self): return x\nA().m()",
    "a method that is redefined after use": "class A:\n  def m(self): return x\n  n = m\n  def m(self): return y\nA().n()",
    "a name in an assertion's message": "assert c, (x := 1)\nx",
    "a default in a nested function": "def f():\n  def g(a=x): return a\n  return g()\nf()",
    "a subscript that a comprehension assigns to": "[0 for x[0] in s]",
    "a name bound only in a short-circuited test": "while c and (x := f()): pass\nx",
    "a name bound in the second comparison": "a < b < (x := 1)\nx",
    "the name of an except clause": "try: f()\nexcept E as x: pass\nx",
    "a generator's first source is read at once": "g = (i for i in x)\nx = 1",
    "a loop left before it binds": "for i in s:\n  break\n  x = 1\nx",
    "a function handed to a decorator": "def f(): return x\n@f\ndef g(): pass\nx = 1",
    "a nested function's global": "def f():\n  def g():\n    global x\n    return x\n  x = 5\n  return g()\nf()",
    "a class in a function": "def f():\n  class A:\n    y = x\n  return A\nf()",
    "an async comprehension": "[i async for i in x]",
    "a type parameterised by a name": "def f() -> list[x]: pass",
}


@pytest.mark.parametrize("source", HIDDEN.values(), ids=HIDDEN.keys())
def test_a_read_that_is_easily_overlooked_counts(source):
    """Each of these reads the notebook's `x` on some path: missing it would restore a result of another `x`."""
    assert "x" in of(source).read


@pytest.mark.skipif(sys.version_info < (3, 12), reason="type statements and type parameters came with Python 3.12")
@pytest.mark.parametrize(
    "source",
    [
        "type X = x",
        "type X[T] = dict[T, x]",
        "def f[T: x](a: T): pass",
        "class A[T](x): pass",
        "class A[T](Base[T, x]): pass",
        "class A:\n  def m[T: x](self, a: T) -> T: return a\nA().m(1)",
        "def f():\n  def g[T: x](a: T): return T\n  return g\nf()",
    ],
)
def test_types_read_names_too(source):
    assert "x" in of(source).read
    assert "T" not in of(source).read


def test_names_bound_inside_functions_and_comprehensions_are_not_the_notebooks():
    source = "def f(a):\n  b = [c for c in a]\n  d = lambda e: e\n  return b, d\nclass A:\n  g = 1\nf(1)"
    assert binds(source) == "A f"


def test_builtins_that_read_unseen_names_are_told():
    assert dynamic_reads(ast.parse("eval('x'); y = vars; locals()")) == {"eval", "vars", "locals"}
    assert dynamic_reads(ast.parse("def f(): exec(s); globals()")) == {"exec", "globals"}
    assert dynamic_reads(ast.parse("model.eval(); x.exec")) == set()


# -- soundness: what code reads when it runs is in the table ----------------------------------------------------------

VARIABLES, CALLABLES = ["a", "b", "c"], ["f", "g"]
POOL = VARIABLES + CALLABLES


class Thing:
    """What the notebook's names hold: anything may be done with it."""

    def __iter__(self):
        return iter((self, self))

    def __call__(self, *_):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __add__(self, _):
        return self


class Endless(Exception):
    pass


class Space(dict):
    """A namespace that notes which names are read before the code itself has bound or deleted them.

    A dict's subclass as globals makes the interpreter come by __getitem__, in functions too.
    """

    def __init__(self, names, helpers):
        super().__init__(names)
        self.update(helpers)
        self.before, self.helpers = dict(names), set(helpers)
        self.inputs, self.gone, self.steps = set(), set(), 0

    def __getitem__(self, name):
        self.steps += 1
        if self.steps > 400:
            raise Endless
        value = super().__getitem__(name)
        if name not in self.gone and value is self.before.get(name, Space):
            self.inputs.add(name)
        return value

    def __setitem__(self, name, value):
        self.gone.add(name)
        super().__setitem__(name, value)

    def __delitem__(self, name):
        self.inputs |= {name} - self.gone  # whether it was there matters
        self.gone.add(name)
        super().__delitem__(name)


def helpers(flips):
    """What generated code uses beside the pool: chance, failure, suppression, and a call of whatever it is given."""
    flips = iter(flips)

    def flip():
        return next(flips, False)

    def risky():
        if flip():
            raise ValueError

    def use(value):
        if isinstance(value, type):
            made = value()
            for part in ("m", "n", "B"):
                if hasattr(value, part):
                    use(getattr(value if part == "B" else made, part))
        elif callable(value):
            value()
        elif isinstance(value, list):
            for item in value:
                use(item)
        return value

    def pair():
        return (1, 2) if flip() else ()

    return {
        "flip": flip,
        "risky": risky,
        "use": use,
        "pair": pair,
        "suppress": lambda: contextlib.suppress(ValueError),
        "nullcontext": contextlib.nullcontext,
        "ValueError": ValueError,
        "__builtins__": {"__build_class__": __build_class__, "NameError": NameError},
        "__name__": "generated",
    }


# What code is generated from: N a variable, F a callable, E an expression, B an indented block, BB one indented twice.
EXPRESSIONS = [
    "N",
    "N",
    "F",
    "flip()",
    "use(F)",
    "use(F)",
    "[E, E]",
    "(N := E)",
    "(flip() and E)",
    "(E if flip() else E)",
    "(lambda: E)",
    "[E for N in pair()]",
    "[0 for N in pair() if E]",
]
SIMPLE = [
    "N = E",
    "N = 1",
    "N = F",
    "N, N = [E, 1]",
    "N += [1]",
    "del N",
    "use(F)",
    "use(F)",
    "use(N)",
    "risky()",
    "assert True, E",
    "def F(): return E",
    "def F(): return E",
    "def F(N=0): return E",
    "def F():\n  N = E\n  return E",
    "def F():\n  global N\n  N = E\n  return E",
    "F = lambda: E",
    "class F:\n  def m(self): return E",
]
COMPOUND = [
    "if E:\nB",
    "if flip():\nB\nelse:\nB",
    "while flip():\nB\nelse:\nB",
    "for N in pair():\nB",
    "for _ in pair():\nB\n  if flip(): break\nB\nelse:\nB",
    "for _ in pair():\nB\n  if flip(): continue\nB",
    "while True:\nB\n  if not flip(): break\nB",
    "try:\nB\n  risky()\nB\nexcept ValueError:\nB\nelse:\nB\nfinally:\nB",
    "try:\nB\nexcept ValueError as N:\nB",
    "try:\nB\nexcept NameError:\nB",
    "with suppress():\nB\n  risky()\nB",
    "with nullcontext() as N:\nB",
    "match N:\n  case [N, N] if flip():\nBB\n  case N:\nBB",
    "class F:\n  x = E\n  if flip():\n    def m(self): return E\n  class B:\n    def n(self): return E",
]
PART = re.compile(r"BB|\bB\b(?!:)|\b[NEF]\b")


@st.composite
def programs(draw):
    def filled(template, depth):
        return PART.sub(lambda part: made(part[0], depth), template)

    def made(part, depth):
        if part in "NF":
            return draw(st.sampled_from(VARIABLES if part == "N" else CALLABLES))
        if part == "E":
            return filled(draw(st.sampled_from(EXPRESSIONS if depth < 4 else ["N"])), depth + 1)
        return textwrap.indent(block(depth + 1), "  " * len(part))

    def block(depth):
        templates = SIMPLE + (COMPOUND if depth < 2 else [])
        statements = draw(st.lists(st.sampled_from(templates), min_size=1, max_size=3 if depth else 7))
        return "\n".join(filled(statement, depth) for statement in statements)

    return block(0)


@settings(max_examples=600, deadline=None)
@given(programs(), st.lists(st.booleans(), min_size=6, max_size=30))
def test_whatever_is_read_when_code_runs_was_foretold(source, flips):
    """Generated code, really run: each name it reads before binding it is in `read`, each it changes in `bound`."""
    try:
        code = compile(source, "<generated>", "exec", dont_inherit=True)
    except SyntaxError:  # a name that is global and a parameter, a rebound comprehension variable
        return
    space = Space({name: Thing() for name in POOL}, helpers(flips))
    with contextlib.suppress(Exception):
        exec(code, space)
    names = of(source)
    assert space.inputs - names.read == set()
    changed = {name for name in POOL if dict.get(space, name) is not space.before[name]}
    assert changed - names.bound == set()


def test_the_namespace_of_that_test_sees_every_read():
    """In functions too; only a class's own statements go past its mapping, and the table above has those."""
    source = "def f(): return a\nf()\nc = 1\ndel g\nc\n[(lambda: b)() for _ in '1']"
    space = Space({name: Thing() for name in POOL}, helpers([]))
    exec(source, space)
    assert space.inputs == {"a", "b", "g"}
