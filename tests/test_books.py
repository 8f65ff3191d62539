"""Notebooks as people write them show and hold the same whether their cells are durable or not: `make books` runs all."""

from __future__ import annotations

import pytest
from books import BOOKS, books, read, report

pytestmark = [pytest.mark.kernel]

NOT_STORED: dict[str, dict[int, str]] = {
    "01_numpy_arrays": {},
    "16_sqlite_and_pandas": {10: "it changes con in place"},  # it gives the connection a function
    "17_object_models": {},
}
"""Those that run here, and which cells may run each time, with how the reason begins."""


@pytest.mark.parametrize("name", NOT_STORED)
def test_a_notebook_is_the_same_plainly_durably_again_by_halves_and_edited(name, tmp_path):
    """Outputs and state are compared after every cell; a new kernel restores whatever can be stored."""
    made = report(read(BOOKS / f"{name}.ipy"), tmp_path)
    assert [str(found) for found in made.differs] == []
    assert {number: why[:30] for number, why in made.not_stored.items()} == NOT_STORED[name]
    assert made.needless == {}
    assert len(made.can_hit) == len(made.book.cells)


def test_every_book_has_cells_and_an_edit():
    """What an edit replaces is in its cell: `read` says so otherwise."""
    assert len(books()) == 20
    for book in books():
        assert 15 <= len(book.cells) <= 40, book.name
        assert sum(cell.edited != cell.source for cell in book.cells) == 1, book.name
