"""Notebooks as people write them show and hold the same whether their cells are durable or not: `make books` runs all."""

from __future__ import annotations

from books import books


def test_every_book_has_cells_and_an_edit():
    """What an edit replaces is in its cell: `read` says so otherwise."""
    assert len(books()) == 20
    for book in books():
        assert 15 <= len(book.cells) <= 40, book.name
        assert sum(cell.edited != cell.source for cell in book.cells) == 1, book.name
