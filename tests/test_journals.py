"""Journals that earlier releases wrote keep replaying. Each archive holds the cells that made it, and what they gave."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
from kernels import kernel
from stored_journal import JOURNALS, VALUES, write


@pytest.mark.kernel
@pytest.mark.parametrize("archive", sorted(JOURNALS.glob("*.zip")), ids=lambda path: path.stem)
def test_a_stored_journal_is_replayed_and_nothing_recorded_is_executed_again(archive, tmp_path):
    """The completed cell, the interrupted one, and runs that are completed, failed and asleep."""
    replay(archive, tmp_path)


@pytest.mark.kernel
def test_what_this_version_writes_can_be_stored_and_replayed(tmp_path):
    """`python tests/stored_journal.py` makes the archive of the next release in the same way."""
    write(tmp_path / "now.zip")
    (tmp_path / "replayed").mkdir()
    replay(tmp_path / "now.zip", tmp_path / "replayed")


def replay(archive: Path, folder: Path) -> None:
    """Execute the archive's cells again on its store, in a new kernel that has its key; more only where it was stopped."""
    with zipfile.ZipFile(archive) as stored:
        stored.extractall(folder)
    about = json.loads((folder / "cells.json").read_text())
    log, cells = folder / "executed.log", about["cells"]
    with kernel(folder, env={"DURABLE_NB_KEY_FILE": str(folder / "signing.key")}) as k:

        def run(cell: str, *executes: str, error: str = ""):
            log.write_text("")
            shown = k.run(cell, timeout=120)
            assert shown.error == error, shown.traceback
            assert log.read_text().splitlines() == list(executes)
            return shown

        run(cells["setup"])
        shown = run(cells["completed"])
        assert shown.stdout == "answer 1\n"
        if about["python"] == f"{sys.version_info.major}.{sys.version_info.minor}":  # else its steps are restored, one by one
            assert " · restored " in shown.told[-1]
        assert run(cells["interrupted"], "paid 11").told[0].startswith("interrupted · running: resumes from")
        assert k.value("before['text'], after['text']") == ("answer 10", "answer 11")
        stands = "[str(durable.get_run(id).status) for id in ('order-1', 'failing-1', 'sleeping-1')]"
        assert k.value(stands) == ["completed", "failed", "interrupted"]
        run(cells["runs"] + "\n(before, more), blob = await run, 1 << 20", "paid 303")
        assert json.loads(json.dumps(k.value(VALUES))) == about["values"]
        assert k.value("before[1:], more['text']")[1] == "answer 303"
        assert k.value("before[0]['text'], before[1], before[3] == blob") == ("answer 300", "order 300 is sold out", True)
        again = "failed = durable.get_run('failing-1')\nfailed.resume()\nawait failed"
        run(again, "broken", error="ValueError: order 200 is sold out")
