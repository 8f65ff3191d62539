"""What an upgrade costs: a table of values and code keeps its digests over processes, Pythons, libraries, and for all time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import identity_table
import pytest

HERE = Path(__file__).parent
PROMISED = json.loads((HERE / "identities.json").read_text())
"""The digests of the format that is promised. They don't change any more: a change is a new format."""


def told_by_another_process(folder, **env):
    """The table as a process tells it that has a hash seed, a folder, a home and a user of its own."""
    command = [sys.executable, str(HERE / "identity_table.py")]
    inherited = {name: value for name, value in os.environ.items() if name not in {"PWD", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"}}
    path = os.pathsep.join(str(Path(found).resolve()) for found in sys.path if found and "site-packages" not in found)
    env = {**inherited, "PYTHONPATH": path, "HOME": str(folder), **env}
    return json.loads(subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def here():
    return identity_table.environment()


def test_identities_are_the_same_whatever_the_hash_seed_the_folder_and_the_user(tmp_path, here):
    made = []
    for seed, user in (("1", "ann"), ("2", "bob")):
        folder = tmp_path / user
        folder.mkdir()
        made.append(told_by_another_process(folder, PYTHONHASHSEED=seed, USER=user, LOGNAME=user))
    assert identity_table.differing({"one": made[0], "other": made[1]}) == {}
    assert identity_table.differing({"here": here, "there": made[0]}) == {}
    assert len(here["rows"]) > 200


def test_identities_are_those_that_were_promised(here):
    """From the first release on: who has a store pays for a row that changes. A value that is missing here is not compared."""
    assert here["format"] == PROMISED["format"]
    wanted = {}
    for row, digests in PROMISED["rows"].items():
        if isinstance(digests, dict):
            (generation,) = digests.keys() - {"else"}
            digests = digests[generation if generation in here["generations"] else "else"]
        wanted[row] = digests
    changed = [row for row, digest in here["rows"].items() if wanted.get(row) != digest]
    assert changed == []


def test_the_docs_say_which_identities_an_upgrade_changes_and_why():
    page = (HERE.parent / "docs" / "understand" / "identities-over-upgrades.md").read_text()
    listed = set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))
    assert listed == {row for row, digests in PROMISED["rows"].items() if isinstance(digests, dict)}
