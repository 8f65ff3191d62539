"""The demo, as a reader types it: what it prints has been proved."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from durable_nb._cli import main
from durable_nb._demo.shop import Shop
from durable_nb._demo.verdict import KILLS, STEPS, Evidence, expected, faults

HERE = Path(__file__).parent


def demo(*options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from durable_nb._cli import main; sys.exit(main())", "demo", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=folder, check=False)


def rows(shown: str) -> dict[str, list[str]]:
    """The printed table by step, its other columns as they are."""
    table = [[cell.strip() for cell in line.split("|")] for line in shown.splitlines() if line.count("|") == 5]
    assert table[0] == [
        "step",
        "executed in kernel 1",
        "executed in kernel 2",
        "restored in kernel 2",
        "server saw",
        "charged",
    ]
    return {row[0]: row[1:] for row in table[2:]}


@pytest.mark.kernel
class TestDemo:
    """A real kernel, killed half-way."""

    def test_killed_in_the_wait_nothing_finished_runs_again(self, tmp_path):
        """The new kernel restores three steps, waits for the rest of the sleep and asks for the review."""
        ended = demo(folder=tmp_path)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        table = rows(ended.stdout)
        for step in ("charge", "order", "receipt"):
            assert table[step][:4] == ["yes", "no", "yes", "1 request, 1 key, done once"]
        assert table["sleep"][0] == "yes (killed inside)"
        assert table["sleep"][1].startswith("the rest, ")
        assert table["sleep"][2] == "its deadline"
        assert table["review"][:4] == ["no", "yes", "no", "1 request, 1 key, done once"]
        assert table["charge"][4] == "once, 128.50"
        assert "waited only for the rest" in ended.stdout.splitlines()[-1]
        assert re.search(
            r"^Kernel 3 restored the whole cell in \d+ ms and asked the shop nothing\.$", ended.stdout, re.MULTILINE
        )
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("step", ["charge", "receipt"])
    def test_killed_inside_a_step_its_effect_happens_once(self, step, tmp_path):
        """The step runs again under the same idempotency key, which the shop recognises."""
        ended = demo("--kill", step, folder=tmp_path)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        table = rows(ended.stdout)
        assert table[step][:4] == ["yes (killed inside)", "yes", "no", "2 requests, 1 key, done once"]
        before = list(STEPS)[: list(STEPS).index(step)]
        for other in table.keys() - {step, "sleep"}:
            ran = ["yes", "no", "yes"] if other in before else ["no", "yes", "no"]
            assert table[other][:4] == [*ran, "1 request, 1 key, done once"]
        assert table["charge"][4] == "once, 128.50"
        assert ended.stdout.splitlines()[-1].startswith(f"Proved: the kernel was killed with SIGKILL inside '{step}'")

    def test_a_reader_who_opens_the_notebook_alone_can_run_it(self, tmp_path):
        """Without ORDER_SERVER it opens a shop of its own; run again by a new kernel, nothing is asked of it."""
        import nbclient
        import nbformat

        names = {"ORDER_SERVER": "", "ORDER_SLEEP": "0s", "IPYTHONDIR": str(tmp_path / "i"), "JUPYTER_DATA_DIR": str(tmp_path)}
        shown = []
        for _ in range(2):
            notebook = nbformat.read(HERE.parent / "notebooks" / "01_order.ipynb", as_version=4)
            client = nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
            client.execute(env={**os.environ, **names})
            shown.append(notebook.cells[-1].outputs[0].text)
        assert (tmp_path / "executed.log").read_text().split()[::2] == ["charge", "receipt", "review"]
        assert [line.split()[1:] for line in shown[0].splitlines()] == [["1", "requests,", "1", "done"]] * 4

    def test_the_notebook_in_the_wheel_is_the_one_in_the_repository(self):
        shipped = resources.files("durable_nb._demo").joinpath("01_order.ipynb").read_bytes()
        assert shipped == (HERE.parent / "notebooks" / "01_order.ipynb").read_bytes()


class TestVerdict:
    """The shop's count is the judge."""

    @staticmethod
    def kept(killed: str) -> Evidence:
        """What is seen when the promise is kept."""
        asked = [step for step, path in STEPS.items() if path]
        counts = tuple(Counter({step: expected(killed, step)[kernel] for step in asked}) for kernel in range(3))
        once = dict.fromkeys(asked, 1)
        line = "order · restored 5 variables, 1 output, 1 KB in 12 ms"
        return Evidence(killed, counts, once, once, 128.5, 3.0, 3.4, 1.2, same_deadline=True, third_line=line)

    @pytest.mark.parametrize("killed", KILLS)
    def test_a_kept_promise_has_no_faults(self, killed):
        assert faults(self.kept(killed)) == []

    def test_a_finished_step_that_runs_again_is_a_fault(self):
        seen = self.kept("sleep")
        again = (seen.requests[0], seen.requests[1] + Counter(charge=1), seen.requests[2])
        assert faults(replace(seen, requests=again)) == ["charge: the shop saw once in kernel 2 instead of never"]

    def test_a_killed_step_must_come_again_and_act_once(self):
        seen = self.kept("charge")
        assert faults(replace(seen, performed={**seen.performed, "charge": 2})) == [
            "charge: the shop did it twice instead of once"
        ]
        assert "different idempotency keys" in faults(replace(seen, keys={**seen.keys, "charge": 2}))[0]

    def test_a_timer_that_fires_early_or_starts_anew_is_a_fault(self):
        seen = self.kept("sleep")
        assert "before the 3 s were over" in faults(replace(seen, paused_s=2.9))[0]
        assert "deadline" in faults(replace(seen, same_deadline=False))[0]

    def test_steps_that_are_restored_one_by_one_are_no_restored_cell(self):
        seen = replace(self.kept("sleep"), third_line="order · ran in 3.1 s, 4 of 5 steps restored")
        assert "kernel 3 did not restore the cell" in faults(seen)[0]


class TestShop:
    """What the demo leans on."""

    @staticmethod
    def post(shop: Shop, path: str, key: str) -> dict[str, object]:
        request = urllib.request.Request(shop.url + path, b'{"total": 5}', {"Idempotency-Key": key})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def test_a_known_key_gets_the_first_answer_and_nothing_happens(self):
        with Shop(delay_s=0) as shop:
            first, again, other = (self.post(shop, "/charge", key) for key in ("a", "a", "b"))
            counts = shop.counts()["/charge"]
            assert first == again != other
            assert (counts["received"], counts["performed"], counts["keys"]) == (3, 2, {"a": 2, "b": 1})
            assert shop.charged() == 10

    def test_a_held_request_has_had_its_effect_and_gets_no_answer(self):
        with Shop(delay_s=0) as shop:
            failed = []

            def ask():
                try:
                    self.post(shop, "/charge", "a")
                except OSError as error:
                    failed.append(error)

            asking = threading.Thread(target=ask)
            with shop.hold("/charge") as reached:
                asking.start()
                assert reached.wait(10)
                assert shop.counts()["/charge"]["performed"] == 1
            asking.join(10)
            assert failed
            assert shop.counts()["/charge"]["answered"] == 0
            assert self.post(shop, "/charge", "a")["id"] == "payment-1"


class TestCommandLine:
    """Statuses and one-line complaints."""

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["dmeo"], "durable-nb: argument COMMAND: invalid choice: 'dmeo'"),
            ([], "durable-nb: the following arguments are required: COMMAND"),
            (["demo", "--kill", "order"], "durable-nb demo: argument --kill: invalid choice: 'order'"),
            (["demo", "--klil"], "durable-nb: unrecognized arguments: --klil"),
        ],
    )
    def test_bad_input_is_told_in_one_line_with_status_2(self, words, said, capsys):
        with pytest.raises(SystemExit) as ended:
            main(words)
        shown = capsys.readouterr()
        assert ended.value.code == 2
        assert shown.out == ""
        assert shown.err.startswith(said)
        assert shown.err.count("\n") == 1

    def test_the_version_is_the_package_s(self, capsys):
        import durable_nb

        with pytest.raises(SystemExit) as ended:
            main(["--version"])
        assert ended.value.code == 0
        assert capsys.readouterr().out == f"durable-nb {durable_nb.__version__}\n"
