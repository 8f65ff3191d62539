"""Whatever a notebook does, its durable cells leave what plain ones leave: generated notebooks, run in all three ways."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernels import kernel

BEFORE = """
import numpy as np, pandas as pd, warnings
warnings.simplefilter("ignore")
class P:
    def __init__(self, v): self.v = v
def touch(o, add=0):
    if isinstance(o, list): o.append(add)
    elif isinstance(o, dict): o[add] = len(o)
    elif isinstance(o, P): o.touched = add
    return o
calls = []
def counted(v):
    calls.append(v)
    return len(calls)
a = [1, [2], 'x']; b = {'k': [1], 2: a}; c = np.arange(4.0); d = pd.DataFrame({'a': [1, 2], 'b': ['x', 'y']})
e = P([1]); f = a; g = {1, 2}; h = c[1:3]
"""
"""What the first cell, a plain one, defines."""
KINDS = dict(zip("abcdefgh", ("list", "dict", "array", "frame", "instance", "list", "set", "array"), strict=True))

MAKE = {
    "list": ["[1, [2], 'x']", "[{x}, {x}]", "[q * 2 for q in range(3)]", "list(range(3))", "[float('nan'), -0.0, True]"],
    "dict": ["{{'in': {x}}}", "{{q: [q] for q in 'ba'}}", "dict(z=1, y=({x}, 2))"],
    "set": ["{{3, 'q'}}", "{{q % 2 for q in range(5)}}"],
    "array": ["np.arange(6).reshape(2, 3)", "np.asfortranarray(np.ones((2, 2)))", "np.array([None, {x}], dtype=object)",
              "np.array(['a', 'bc'])", "np.arange(3, dtype='>i2')"],
    "frame": ["pd.DataFrame({{'a': [1.5, None], 'b': ['u', None]}})", "pd.DataFrame({{'a': [1], 'b': [[1]]}}, index=['r'])",
              "pd.DataFrame({{'a': pd.Categorical(['x', 'y']), 'b': pd.to_datetime(['2027-01-01', None])}})"],
    "instance": ["P({x})", "P([3])"],
    "function": ["lambda v={x}: v", "touch"],
    "scalar": ["7", "'text'", "len(str(type({x})))", "counted(2)", "(1, {x})", "touch({x})", "None", "2 ** 70"],
}  # fmt: skip
CHANGE = {
    "list": ["{n}.append({x})", "{n}.reverse()", "{n} += [1]", "{n}.insert(0, {n})", "{n}[:1] = [{x}]", "touch({n}, 5)"],
    "dict": ["{n}['n'] = {x}", "{n}.setdefault('l', []).append({x})", "{n}.pop(next(iter({n}), 0), None)", "touch({n}, 'w')"],
    "set": ["{n}.add(9)", "{n}.clear()", "{n} |= {{4}}"],
    "array": ["{n}.flat[0] = 5", "{n}[...] = {n}[::-1].copy()"],
    "frame": ["{n}['c'] = 1", "{n}.drop(columns='b', inplace=True, errors='ignore')", "{n}.attrs['s'] = 1",
              "{n}.rename(columns=str.upper, inplace=True)"],
    "instance": ["{n}.w = {x}", "{n}.v = [{n}.v]", "touch({n}, 3)"],
    "function": ["print({n}.__name__)"],
    "scalar": ["print(type({n}))"],
}  # fmt: skip
WRAP = [
    "{s}",
    "{s}",
    "for turn in range(2):\n    {s}",
    "if len(str({x})) % 2:\n    {s}",
    "try:\n    {s}\nfinally:\n    done = True",
    "def inner():\n    global {n}\n    {s}\ninner()",
    "with open('log.txt', 'a') as log:\n    {s}",
]


@st.composite
def cells(draw, kinds):
    """The text of a cell that runs without error where `kinds` tells what names hold; `kinds` is brought up to date."""
    lines = []
    for _ in range(draw(st.integers(1, 4))):
        names = sorted(kinds)
        n, x = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        what = draw(st.sampled_from(["make", "make", "alias", "change", "change", "change", "delete", "define", "show"]))
        if what == "make":
            new, kind = draw(st.sampled_from("ijklmab")), draw(st.sampled_from(sorted(MAKE)))
            lines.append(f"{new} = " + draw(st.sampled_from(MAKE[kind])).format(x=x))
            kinds[new] = kind
        elif what == "alias":
            lines.append(f"{draw(st.sampled_from('ijk'))} = {x}")
            kinds[lines[-1][0]] = kinds[x]
        elif what == "change":
            statement = draw(st.sampled_from(CHANGE[kinds[n]])).format(n=n, x=x)
            lines.append(draw(st.sampled_from(WRAP)).format(s=statement, n=n, x=x))
        elif what == "delete" and len(kinds) > 4:
            lines.append(f"del {n}")
            del kinds[n]
        elif what == "define":
            new = draw(st.sampled_from("stu"))
            lines.append(
                draw(
                    st.sampled_from(
                        [
                            f"def {new}(v={x}):\n    return v, {x}",
                            f"class {new}(P):\n    held = {x}\n    __slots__ = ('z',)",
                            f"def _make(v):\n    def inside(): return v\n    return inside\n{new} = _make({x})",
                        ]
                    )
                )
            )
            kinds[new] = "function"
        else:
            lines.append(f"print(type({x}).__name__, {len(lines)})")
    return "\n".join([*lines, draw(st.sampled_from([*sorted(kinds), "None"])) + draw(st.sampled_from(["", ";"]))])


@st.composite
def notebooks(draw):
    kinds = dict(KINDS)
    return [draw(cells(kinds)) for _ in range(draw(st.integers(1, 3)))]


numbers = itertools.count()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(notebooks())
def test_a_hit_leaves_what_plain_execution_leaves(sessions, tmp_path_factory, notebook):
    """Variables, what shares what, types, dtypes, order, outputs; and what was stored is not run again."""
    folder = tmp_path_factory.mktemp("notebook")
    plain = sessions.run([BEFORE, *(f"# {i}\n{cell}" for i, cell in enumerate(notebook))], folder)
    durable = [BEFORE, *(f"%%durable c{i}\n{cell}" for i, cell in enumerate(notebook))]
    for told in ("", "restored"):
        found = sessions.run(durable, folder)
        assert found["state"] == plain["state"]
        assert found["shown"] == plain["shown"]
        if not told:
            refused = sum(line.startswith("not stored") for line in found["told"])
            assert not [line for line in found["told"] if line.startswith("warning")]
    assert found["told"].count("restored") == len(notebook) - refused, found["told"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    tests = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), tests]))
    with kernel(tmp_path_factory.mktemp("kernel"), env={"PYTHONPATH": path}) as started:
        yield started


def in_kernel(k, cells):
    """What the cells leave and show in a kernel that was just started; and what each was said to have done."""
    k.restart()
    shown = [k.run(cell) for cell in cells]
    state = k.value("__import__('twins').Picture(globals()).lines()")
    looks = [([re.sub("0x[0-9a-f]+", "", line) for line in s.order], s.displays, s.error) for s in shown]
    return (state, looks), [s.told[-1] for s in shown if s.told]


@pytest.mark.kernel
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.generate])
@given(notebook=notebooks())
def test_so_it_is_in_real_kernels(home, notebook):
    """Restarted in between, with the streams and displays of ipykernel."""
    number = next(numbers)
    plain, _ = in_kernel(home, [BEFORE, *notebook])
    durable = [BEFORE, *(f"%%durable n{number}c{i}\n{cell}" for i, cell in enumerate(notebook))]
    first, said = in_kernel(home, durable)
    again, said_again = in_kernel(home, durable)
    assert first == plain
    assert again == plain
    stored = sum("not stored" not in line for line in said)
    assert sum("· restored" in line for line in said_again) == stored, (said, said_again)
