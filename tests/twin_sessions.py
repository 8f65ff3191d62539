"""A cell executed plainly and as a durable one, each in a session of its own without a kernel: what differs is an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from twins import Twins, twins


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """The server of sessions, which has imported what they need."""
    with twins(tmp_path_factory.mktemp("sessions")) as started:
        yield started


def comparing(sessions: Twins, folder: Path, *, only: str = "", made: str = "") -> Callable[..., list[str]]:
    """Gives a function of before, body and after that returns what the durable cell said.

    `only`: the one variable that is compared; `made`: a file that the plain cell leaves, and the durable one makes anew.
    """

    @functools.cache
    def plainly(*cells: str) -> dict:
        found = sessions.run(cells, folder)
        if made:
            (folder / made).unlink(missing_ok=True)
        return found

    def run(before: str, body: str, after: str = "") -> list[str]:
        plain = plainly(before, f"# plain\n{body}", after)
        durable = sessions.run([before, f"%%durable cell\n{body}", after], folder)
        assert durable["shown"] == plain["shown"]
        if only:
            assert not plain["shown"][-1][2], plain["shown"][-1]
            assert only in plain["state"]
            assert durable["state"].get(only) == plain["state"][only]
        else:
            assert durable["state"] == plain["state"]
        return durable["told"]

    return run
