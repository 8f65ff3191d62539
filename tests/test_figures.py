"""Figures over several cells: what later cells draw on an earlier figure is drawn by a hit, and pyplot keeps its figures."""

from __future__ import annotations

import pytest
from twins import twins

SETUP = """
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt, numpy as np
x = np.linspace(0, 3, 20)
"""
LOOK = """
import hashlib, io
from matplotlib._pylab_helpers import Gcf
def drawn(figure):
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=40)
    return hashlib.sha256(file.getvalue()).hexdigest()
print([(number, drawn(manager.canvas.figure)) for number, manager in Gcf.figs.items()])
print([ax is Gcf.get_active().canvas.figure.axes[0] for ax in [globals().get('ax')] if ax])
"""


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    with twins(tmp_path_factory.mktemp("sessions")) as started:
        yield started


CELLS = {
    "axes that are drawn on": ("fig, ax = plt.subplots()\nheld = [ax]", "line, = ax.plot(x, np.sin(x), label='s')\nax.set_title('t'); ax.legend()", "held[0].lines[0].set_color('r'); ax.set_xlim(0, 1)", "fig.suptitle('S'); fig.savefig('o.png')\nprint(line.axes is ax, ax.get_legend().texts[0].get_text())"),
    "figures that no name holds": ("plt.figure(figsize=(3, 2))", "plt.plot(x, x ** 2);", "plt.title('T'); plt.legend(['a']);", "plt.savefig('o.png')\nn = len(plt.gca().lines)"),
    "two of them": ("plt.figure(1)\nplt.plot([1, 2]);", "plt.figure(2)\nplt.plot([2, 1]);", "plt.figure(1)\nplt.plot([3, 3]);", "plt.close(2)"),
    "shared axes, and a twin": ("fig, axes = plt.subplots(2, 2, sharex=True, sharey='row')\nax = axes[0, 0]", "axes[0, 0].plot(x, x)\naxes[1, 1].scatter(x, -x, c=x);", "axes[0, 1].set_ylim(-1, 9)\nb = axes[1, 0].twinx()\nb.plot(x, -x);", "b.set_ylabel('r'); axes[0, 0].set_xlim(1, 2)\nfig.subplots_adjust(hspace=0.5)"),
    "lines that go and axes that are cleared": ("fig, ax = plt.subplots()\na, = ax.plot(x, x)\nb, = ax.plot(x, -x)", "a.remove()", "ax.cla()", "bars = ax.bar([1, 2, 3], [3, 2, 1])\nbars[0].set_color('k')\nax.bar_label(bars);"),
    "an image": ("fig, ax = plt.subplots()\nim = ax.imshow(np.arange(12).reshape(3, 4))", "im.set_cmap('gray')", "im.set_data(np.ones((3, 4)) * 5)"),
    "in three dimensions": ("fig = plt.figure()\nax = fig.add_subplot(projection='3d')", "ax.plot(x, x, x)", "ax.view_init(20, 50)"),
    "by pandas, on the axes in use": ("import pandas as pd\ns = pd.Series([1, 3, 2])\nax = s.plot()", "s.mul(2).plot()", "pd.DataFrame({'a': [1, 2]}).plot()\ndel ax"),
    "formatters that are functions of the notebook": ("fig, ax = plt.subplots()\nax.plot(x);", "k = 3\nax.xaxis.set_major_formatter(plt.FuncFormatter(lambda v, p: f'{v * k:.1f}'))", "k = 5"),
    "a grid of seaborn": ("import seaborn as sns, pandas as pd\nd = pd.DataFrame({'a': [1, 2, 3, 4], 'b': [2, 1, 4, 3], 'c': list('xyxy')})\ng = sns.FacetGrid(d, col='c')", "g.map(plt.scatter, 'a', 'b')", "g.set_axis_labels('A', 'B')\ng.figure.subplots_adjust(wspace=0.3)"),
}  # fmt: skip


@pytest.mark.parametrize("cells", CELLS.values(), ids=CELLS.keys())
def test_what_later_cells_draw_on_an_earlier_figure_is_drawn_again(sessions, tmp_path, cells):
    """Every cell is restored, and the pictures are the same."""
    plain = sessions.run([SETUP, *cells, LOOK], tmp_path)
    assert not [shown[2] for shown in plain["shown"] if shown[2]]
    durable = [SETUP, *(f"%%durable c{number}\n{cell}" for number, cell in enumerate(cells)), LOOK]
    for told in ([], ["restored"] * len(cells)):
        found = sessions.run(durable, tmp_path)
        assert found["shown"][-1] == plain["shown"][-1]
        assert [line for line in found["told"] if line.startswith(("not stored", "restored"))] == told


def test_what_pyplot_keeps_is_an_input_of_cells_that_draw(sessions, tmp_path):
    """A figure that is another now is drawn anew, and no reason for other cells to run."""
    told = []
    for line in ("[1, 2]", "[1, 2]", "[2, 1]"):
        cells = [
            SETUP,
            f"plt.plot({line});",
            "%%durable draw\nn = plt.gca().lines[0].get_ydata().tolist()",
            "%%durable other\ny = 1",
        ]
        found = sessions.run([*cells, "print(n)"], tmp_path)
        assert found["shown"][-1][0] == f"{line}\n"
        told.append([line for line in found["told"] if line.startswith(("running", "restored"))])
    assert told[0] == ["running: first run"] * 2
    assert told[1] == ["restored"] * 2
    assert told[2] == ["running: what pyplot keeps changed", "restored"]
