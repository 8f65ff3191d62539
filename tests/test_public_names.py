"""The names that `durable_nb` hands on."""

from __future__ import annotations

import ast
from pathlib import Path

import durable_nb as durable


def test_every_name_is_there_for_editors_and_at_run_time():
    tree = ast.parse(Path(durable.__file__).read_text())
    [typed] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {name.asname or name.name for node in typed.body for name in node.names}
    assert seen == set(durable._HOMES) == {name for name in dir(durable) if name != "__version__"}
    for name in seen:
        assert getattr(durable, name) is not None
    assert durable.__all__ == []


def test_what_a_run_can_do_has_its_names():
    names = "workflow invoke report current_run get_run runs resume cancel Run RunTimeout RunCancelled RunConflictError"
    assert set(names.split()) <= set(dir(durable))
    assert issubclass(durable.RunTimeout, TimeoutError)
    handle = "id status steps facts result resume restart cancel fork delete notify approve"
    assert {name for name in handle.split() if name != "id"} <= set(dir(durable.Run))
