"""The formats that were promised before this one: each is a whole fingerprinter, kept as it was.

When `FORMAT` rises, the modules of this package are copied as they stand into a package `_formatN` beside them, where N is the
old number, and N is added to `EARLIER`. Nothing in the copy changes any more. A step's record keeps the format of its identity;
before a body runs, the identities that earlier formats give to the same call are looked up too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._tokens import FORMAT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._graph import Fingerprint

EARLIER: tuple[int, ...] = ()


def in_format(number: int) -> Any:
    """The fingerprinter of a format: this package, or a copy of what it was. ValueError for one that isn't known here."""
    if number == FORMAT:
        return importlib.import_module(__package__)
    if number not in EARLIER:
        known = ", ".join(map(str, (*EARLIER, FORMAT)))
        raise ValueError(f"fingerprint format {number} is not known to this version of durable_nb; it knows {known}")
    return importlib.import_module(f"{__package__}._format{number}")


def in_earlier_formats(ask: Callable[[Any], Fingerprint]) -> Iterator[Fingerprint]:
    """What each earlier format gives, the oldest first. Something that one of them can't read has no identity in it."""
    for number in EARLIER:
        fingerprinter = in_format(number)
        try:
            yield ask(fingerprinter)
        except fingerprinter.Unhashable:
            continue
