"""Which cell has made what a variable holds: `%durable plan` goes by it."""

from __future__ import annotations

import weakref

import pytest

from durable_nb._cellcache.executions import LastExecution, LastExecutions


@pytest.fixture
def executions(tmp_path):
    """The cell "make" has bound x, an object of the class that is given."""

    def made(kind):
        found, namespace = LastExecutions(tmp_path, ""), {"x": kind()}
        found.note("make", LastExecution("key", "code", 1.0, made=("x",)), namespace)
        assert found.sources(["x"], namespace) == {"x": ("make", "key")}
        return found, namespace

    return made


class Plain:
    pass


def test_an_object_at_the_address_of_one_that_is_gone_was_made_by_nobody(executions):
    """It is another one, though its id is the same, as it mostly is of the next that is made."""
    found, namespace = executions(Plain)
    gone = weakref.ref(namespace.pop("x"))
    assert gone() is None
    others = [Plain() for _ in range(1000)]
    assert all(found.sources(["x"], {"x": other}) == {} for other in others)


@pytest.mark.parametrize("kind", [list, dict, Plain, lambda: 10**30], ids=["list", "dict", "object", "number"])
def test_what_a_later_cell_has_bound_anew_was_not_made_by_the_durable_one(executions, kind):
    """Lists can't be referred to weakly: they are forgotten when the cell that bound the name anew has ended."""
    found, namespace = executions(kind)
    del namespace["x"]
    found.cell_ended(namespace)
    others = [kind() for _ in range(1000)]
    assert all(found.sources(["x"], {"x": other}) == {} for other in others)
