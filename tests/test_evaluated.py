"""What a cell evaluates: the variables that `eval` and `exec` look up are inputs, and what they bind is restored."""

from __future__ import annotations

import pytest
from twins import twins


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    with twins(tmp_path_factory.mktemp("sessions")) as started:
        yield started


DISPLAY = "class display:\n    def __init__(self, *args): self.args = args\n    def __repr__(self): return ''.join(a + repr(eval(a)) for a in self.args)\n"
INPUTS = {
    "a text": ("k = 1", "k = 2", "y = eval('k + 1')"),
    "in a helper": ("def f(t): return eval(t)\nk = 1", "def f(t): return eval(t)\nk = 2", "y = f('k')"),
    "when it is shown": (f"{DISPLAY}t = 1", f"{DISPLAY}t = 2", "x = 1\ny = repr(display('t', 'x'))"),
    "by another name": ("e = eval\nk = 1", "e = eval\nk = 2", "y = e('k')"),
    "what an evaluated function reads": ("def g(): return c\nc = 1", "def g(): return c\nc = 2", "y = eval('g()')"),
    "what was not there": ("", "u = 4", "try: y = eval('u')\nexcept NameError: y = 0"),
    "what is bound anew": ("z = 5", "z = 7", "exec('z = 5')\ny = z"),
    "what is bound perhaps": ("z = 5; f = False", "z = 7; f = False", "exec('if f: z = 5')\ny = eval('z')"),
    "by a package": ("import pandas as pd\nk = 1\ns = pd.Series(['[k]'])", "import pandas as pd\nk = 2\ns = pd.Series(['[k]'])", "def f(t): return eval(t)\ny = s.apply(f).tolist()"),
}  # fmt: skip
"""Before, before with another input, body."""


@pytest.mark.parametrize(("before", "other", "body"), INPUTS.values(), ids=INPUTS.keys())
def test_what_a_cell_evaluates_is_an_input(sessions, tmp_path, before, other, body):
    """It is seen when it is evaluated, and compared the next time."""
    for first, restored in ((before, False), (other, False), (before, True), (other, True)):
        plain = sessions.run([first, body], tmp_path)
        found = sessions.run([first, f"%%durable cell\n{body}"], tmp_path)
        assert found["state"]["y"] == plain["state"]["y"]
        assert (found["told"][-1] == "restored") is restored, found["told"]


LEFT = {
    "names in a loop": ("", "for n in 'abc': exec(f'{n}{n} = ord(n)')"),
    "a function": ("k = 2", "exec('def g(x): return x * k')\ny = g(4)"),
    "a name deleted": ("k = 2", "exec('del k')"),
    "what the cell itself has bound": (f"import pandas as pd\n{DISPLAY}d = pd.DataFrame({{'a': [1]}})", "e = d * 2\nd['b'] = 3\ndisplay('d', 'pd.concat([d, e])')"),
    "of an input that it changes": ("rows = [1]", "n = len(rows)\nexec('rows.append(2)')"),
    "with variables of its own": ("", "y = eval('a + 1', {'a': 2})\nimport collections\nP = collections.namedtuple('P', 'x y')"),
}  # fmt: skip


@pytest.mark.parametrize(("before", "body"), LEFT.values(), ids=LEFT.keys())
def test_what_is_evaluated_leaves_comes_back(sessions, tmp_path, before, body):
    """As after plain execution."""
    plain = sessions.run([before, f"# plain\n{body}"], tmp_path)
    for last in ("running: first run", "restored"):
        found = sessions.run([before, f"%%durable cell\n{body}"], tmp_path)
        assert (found["state"], found["shown"]) == (plain["state"], plain["shown"])
        assert found["told"][-1] == last


REFUSED = {
    "a namespace": ("k = 1", "y = eval('globals()')['k']", "what it evaluates looks names up by globals"),
    "a helper that does": ("k = 1\ndef f(): return globals()['k']", "y = eval('f()')", "what it evaluates may look names up dynamically, by f"),
    "what only the text names, changed": ("rows = [1]", "exec('rows.append(2)')", "it changes rows in place"),
    "what can't be compared": ("g = (n for n in 'ab')", "y = eval('g') is g", "g holds a builtins.generator"),
}  # fmt: skip


@pytest.mark.parametrize(("before", "body", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_can_not_be_followed_keeps_the_cell_from_being_stored(sessions, tmp_path, before, body, why):
    """It is said each time."""
    for _ in range(2):
        told = sessions.run([before, f"%%durable cell\n{body}"], tmp_path)["told"]
        assert [line for line in told if line.startswith(f"not stored: {why}")], told
