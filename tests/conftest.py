"""What `make test` asks beyond the tests: that they meet the installed wheel, and that nothing is skipped unnoticed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pytest_plugins = ["lab", "twin_sessions"]

MAY_BE_SKIPPED = {
    "pickle refuses it": "some values that have a fingerprint have no pickle, so there is nothing to compare",
    "type statements and type parameters came with Python 3.12": "older Pythons have no such syntax to analyse",
    "annotations are evaluated when they are asked for from Python 3.14 on": "on older Pythons such a definition is an error",
    "mounting a small file system needs rights": "a full disk is made of a tmpfs, which only root can mount",
    "a file system of its own can't be mounted": "a full or read-only disk is a tmpfs, which only root can mount",
    "root may write everywhere": "what happens in a folder without the right to write can't be seen as root",
    "file systems are compared with what GNU stat says": "other systems have another stat",
}
"""How a skip's reason begins, and why the test may be skipped."""

if not os.environ.get("CI"):
    MAY_BE_SKIPPED["a browser test needs"] = "a developer's machine may lack Chromium; continuous integration may not"

_unknown_skips = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser):
    group = parser.getgroup("durable_nb")
    group.addoption("--installed", action="store_true", help="fail unless durable_nb is the one that is installed")
    group.addoption(
        "--known-skips-only", action="store_true", help="fail if a test is skipped for a reason that conftest lacks"
    )


def pytest_configure(config):
    config.stash[_unknown_skips] = {}
    if config.getoption("--installed"):
        import durable_nb

        if not Path(durable_nb.__file__).is_relative_to(sys.prefix):
            raise pytest.UsageError(
                f"the tests would meet {durable_nb.__file__}, which is not what is installed in {sys.prefix}"
            )
    if config.getoption("--known-skips-only"):
        config.pluginmanager.register(_Skips(config), "durable_nb skips")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(config, items):
    """All tests in the browser share one server and one browser, so they go to one worker."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if "lab" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group("lab"))


class _Skips:
    def __init__(self, config):
        self.unknown = config.stash[_unknown_skips]

    def pytest_runtest_logreport(self, report):
        self._note(report)

    def pytest_collectreport(self, report):
        self._note(report)

    def _note(self, report):
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not reason.startswith(tuple(MAY_BE_SKIPPED)):
            self.unknown[report.nodeid] = reason

    def pytest_sessionfinish(self, session):
        if self.unknown and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for test, reason in self.unknown.items():
            terminalreporter.write_line(
                f"SKIPPED FOR NO KNOWN REASON {test}: {reason} (MAY_BE_SKIPPED in conftest.py)", red=True
            )
