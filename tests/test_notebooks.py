"""The notebooks that come with the package, as a reader runs them: all cells, then a restart and all cells again."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from durable_nb._demo.shop import Shop
from durable_nb.testing import ModelServer

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
DURABLE = ["load", "clean", "profile", "bootstrap", "model", "themes", "letter"]
"""Of the coffee review."""

pytestmark = [pytest.mark.kernel, pytest.mark.xdist_group("notebooks")]


@dataclass(frozen=True)
class Ran:
    """What a notebook looks like after all its cells were executed."""

    outputs: list[list[Any]]
    """By code cell, what is saved with the notebook, without what the package says of itself."""
    told: dict[str, str]
    """By durable cell, its status line at the end."""
    executed: list[str]
    """What the notebook's own log says was really done this time."""

    @property
    def not_restored(self) -> list[str]:
        return [cell for cell, line in self.told.items() if f"{cell} · restored" not in line]


class Client(nbclient.NotebookClient):
    """nbclient, which asks as a front end does: so the status lines are shown."""

    sockets = ""

    def create_kernel_manager(self):
        manager = super().create_kernel_manager()
        manager.transport, manager.ip = "ipc", self.sockets  # a TCP port may be taken between being chosen and being bound
        return manager

    async def async_start_new_kernel_client(self, **options):
        client = await super().async_start_new_kernel_client(**options)
        client.allow_stdin = True
        return client


class Desk:
    """A copy of the notebooks in a folder of their own, with everything of Jupyter's kept in `home`."""

    def __init__(self, folder: Path, home: Path, **env: str) -> None:
        self.folder, self.home, self.kernels = folder, home, 0
        shutil.copytree(NOTEBOOKS, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "data", "*.log"))
        names = {"IPYTHONDIR": "ipython", "JUPYTER_DATA_DIR": "jupyter", "MPLCONFIGDIR": "matplotlib"}
        self.env = {**os.environ, **{name: str(home / where) for name, where in names.items()}, **env}

    def run_all(self, name: str, *edits: tuple[str, str]) -> Ran:
        """Execute the notebook with these texts replaced, in a new kernel."""
        notebook = nbformat.read(self.folder / name, as_version=4)
        for old, new in edits:
            cells = [cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source]
            assert len(cells) == 1, f"{old!r} is in {len(cells)} cells"
            cells[0].source = cells[0].source.replace(old, new)
        log = self.folder / "executed.log"
        before = len(log.read_text().splitlines()) if log.exists() else 0
        self.kernels += 1
        client = Client(notebook, kernel_name="python3", timeout=120, resources={"metadata": {"path": str(self.folder)}})
        client.sockets = str(self.folder.parent / f"k{self.kernels}")
        client.execute(env=self.env, stderr=subprocess.DEVNULL)
        outputs, told = [], {}
        for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
            outputs.append([output for output in cell.outputs if "durable_nb" not in output.get("metadata", {})])
            for output in cell.outputs:
                ours = output.get("metadata", {}).get("durable_nb", {})
                if "cell" in ours:
                    told[ours["cell"]] = output.data["text/plain"]
        return Ran(outputs, told, log.read_text().splitlines()[before:] if log.exists() else [])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory, home):
    """A desk where the coffee review was run once, and how that went."""
    desk = Desk(tmp_path_factory.mktemp("desk") / "notebooks", home, DURABLE_NB_NOTEBOOK_SCALE="0.02")
    return desk, desk.run_all("02_coffee.ipynb")


def unchanged(ran: Ran, first: Ran) -> None:
    """The reader sees what was there before, figures, warnings and all."""
    for now, before in zip(ran.outputs, first.outputs, strict=True):
        assert now == before


def test_every_notebook_has_its_test():
    names = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
    assert names == ["01_order.ipynb", "02_coffee.ipynb", "03_llm_pipeline.ipynb"]


@pytest.mark.parametrize(("name", "figures"), [("01_order.ipynb", 0), ("02_coffee.ipynb", 3), ("03_llm_pipeline.ipynb", 0)])
def test_it_is_saved_with_what_it_shows_and_names_no_place_and_no_person(name, figures):
    """People who look at it on the web see figures and views without running it. `make notebooks` saves them anew."""
    text = (NOTEBOOKS / name).read_text()
    cells = [cell for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") == figures
    assert "application/vnd.jupyter.widget-view+json" not in kinds
    views = [output for output in outputs if "view" in output.get("metadata", {}).get("durable_nb", {})]
    assert len(views) == sum(bool(re.search(r"await durable\.(run|map)\(", cell.source)) for cell in cells)
    assert all("completed" in view["data"]["text/html"] for view in views)
    assert not re.search(r"/(home|root|tmp|Users|work|private|var)/|ipykernel_\d", text)
    assert getpass.getuser() == "root" or getpass.getuser() not in text
    assert len(text) < 400_000


def test_the_order_is_whole_after_a_restart(tmp_path, home):
    """Its output is the same, and the shop is asked nothing."""
    with Shop(delay_s=0) as shop:
        desk = Desk(tmp_path / "notebooks", home, ORDER_SERVER=shop.url, ORDER_SLEEP="0s")
        first = desk.run_all("01_order.ipynb")
        again = desk.run_all("01_order.ipynb")
    assert [line.split()[0] for line in first.executed] == ["charge", "receipt", "review"]
    assert first.told.keys() == {"order"}
    assert "not stored" not in first.told["order"]
    unchanged(again, first)
    assert (again.not_restored, again.executed) == ([], [])


class TestCoffee:
    """pandas, numpy, matplotlib, steps and plain cells: a day's work."""

    def test_the_first_run_stores_every_durable_cell(self, reviewed):
        _, first = reviewed
        assert list(first.told) == DURABLE
        assert [line for line in first.told.values() if " · ran in " not in line or "not stored" in line] == []
        assert (len(first.executed), len(set(first.executed))) == (1 + 20 + 24 + 1, 46)
        shown = [{kind for output in cell for kind in output.get("data", {})} for cell in first.outputs]
        assert sum("image/png" in kinds for kinds in shown) == 3
        assert "25 orders of customers that nobody knows" in str(
            [o for cell in first.outputs for o in cell if "stderr" in o.values()]
        )

    def test_a_row_more_in_a_file_runs_what_reads_it_and_one_row_of_steps(self, reviewed):
        """Without the row, `load` is restored again, as the next test sees."""
        desk, _ = reviewed
        file = desk.folder / "data" / "comments.csv"
        before = file.read_bytes()
        file.write_bytes(before + b"c0007,Zu wenig Auswahl.\r\n")
        try:
            again = desk.run_all("02_coffee.ipynb")
        finally:
            file.write_bytes(before)
        assert again.not_restored == ["load", "themes", "letter"]
        assert "24 of 26 steps restored" in again.told["themes"]
        assert again.executed == ["ask: Translate: Zu wenig Auswahl.", "ask: Comment: Zu wenig Auswahl.", "letter"]

    def test_restart_and_run_all_shows_the_same_and_runs_no_durable_cell(self, reviewed):
        """Plain cells show the same too, though they read frames and draw from generators that durable cells change."""
        desk, first = reviewed
        again = desk.run_all("02_coffee.ipynb")
        unchanged(again, first)
        assert list(again.told) == DURABLE
        assert (again.not_restored, again.executed) == ([], [])

    def test_comments_and_layout_run_nothing_and_a_helper_that_gives_the_same_its_cell_only(self, reviewed):
        """Cells are known by the values they read: what comes after `clean` finds the same frames and is restored."""
        desk, first = reviewed
        again = desk.run_all(
            "02_coffee.ipynb",
            ("gaps = np.empty(draws)", "# one for each draw\n    gaps  =  np.empty( draws )"),
            ('    """Logistic regression with', '    # by hand\n    """A model with'),
            ("read = []\n", "read = []  # what they say\n\n"),
            ('said = await durable.run("classify", ask, PROMPT.format(comment=english))',
             'said = await durable.run(\n        "classify", ask, PROMPT.format(comment=english),\n    )'),
            ("return 0.0", "return float(0)"),
        )  # fmt: skip
        assert (again.not_restored, again.executed) == (["clean"], [])
        assert again.told["clean"].startswith("clean · ran in")
        assert without_stderr(again) == without_stderr(first)

    def test_a_helper_that_gives_something_else_runs_what_depends_on_it(self, reviewed):
        """Gifts are worth something now: all of the sales is computed anew, what the customers say is not."""
        desk, first = reviewed
        again = desk.run_all("02_coffee.ipynb", ("return 0.0", "return 5.0"))
        assert again.not_restored == ["clean", "profile", "bootstrap", "model"]
        assert again.executed == first.executed[:21]

    def test_another_prompt_asks_it_and_nothing_else_and_the_module_beside_the_notebook_is_followed(self, reviewed):
        """Twelve comments are classified anew, none is translated anew; the letter reads the same themes and is restored. The
        function edited in the module is one that `clean` alone calls, though `themes` calls another one of it."""
        desk, first = reviewed
        module = desk.folder / "coffee.py"
        before = module.read_bytes()
        module.write_bytes(before.replace(b"if text.strip().lower() in {", b"if text.lower().strip() in {"))
        assert module.read_bytes() != before
        try:
            again = desk.run_all("02_coffee.ipynb", ("You read comments on a coffee shop.", "You read what customers say."))
        finally:
            module.write_bytes(before)
        assert again.not_restored == ["clean", "themes"]
        assert "12 of 24 steps restored" in again.told["themes"]
        assert again.executed == [line for line in first.executed if line.startswith("ask: Comment:")]
        assert without_stderr(again) == without_stderr(first)


class TestPipeline:
    """210 messages sorted by a model and summed up by topic, against a server of the test's own."""

    KEY = "sk-test-0123456789abcdef"
    EDITED = ("sharing service in two sentences.", "sharing service in two sentences, with an example.")

    def test_each_question_is_paid_for_once_and_an_edited_prompt_asks_its_own_step_only(self, tmp_path, home):
        """Then a message more, which is sorted, and summed up with those of its topic; last everything again, with the server
        stopped."""
        spec = spec_from_file_location("bikes", NOTEBOOKS / "bikes.py")
        bikes = module_from_spec(spec)
        spec.loader.exec_module(bikes)
        with ModelServer(reply=bikes.reply, api_key=self.KEY) as server:
            desk = Desk(tmp_path / "notebooks", home, OPENAI_BASE_URL=server.openai_url, OPENAI_API_KEY=self.KEY)

            def asked(*edits):
                """How often each prompt was asked."""
                before = server.count
                ran = desk.run_all("03_llm_pipeline.ipynb", *edits)
                prompts = (request.json["messages"][0]["content"].split()[0] for request in server.requests[before:])
                return ran, dict(Counter(prompts))

            first, prompts = asked()
            assert prompts == {"Sort": 210, "Sum": 5}
            assert first.told.keys() == {"review"}
            assert "not stored" not in first.told["review"]
            again, prompts = asked()
            assert (again.not_restored, prompts) == ([], {})
            unchanged(Ran(again.outputs[:-1], {}, []), Ran(first.outputs[:-1], {}, []))
            assert "215" in str(again.outputs[-1])
            edited, prompts = asked(self.EDITED)
            assert prompts == {"Sum": 5}
            assert "210 of 215 steps restored" in edited.told["review"]
            assert "One writes:" in str(edited.outputs[-2])
            with (desk.folder / "bike_messages.txt").open("a") as file:
                file.write("The brake of the bike is loose.\n")
            more, prompts = asked(self.EDITED)
            assert prompts == {"Sort": 1, "Sum": 1}
            assert "214 of 216 steps restored" in more.told["review"]
        assert desk.run_all("03_llm_pipeline.ipynb", self.EDITED).not_restored == []
        with_key = [path for path in desk.folder.rglob("*") if path.is_file() and self.KEY.encode() in path.read_bytes()]
        assert with_key == []


def without_stderr(ran: Ran) -> list[list[Any]]:
    """Outputs, but for warnings: they name the cell's file, which is another one in each kernel that runs it."""
    return [[output for output in cell if output.get("name") != "stderr"] for cell in ran.outputs]
