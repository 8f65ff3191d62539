"""What models' answers have cost, as a reader is told: tokens, and money where prices are known."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from durable_nb import _usage
from durable_nb._variables import variable

if TYPE_CHECKING:
    from durable_nb._facts import Step

log = logging.getLogger("durable_nb")


def usage_of(steps: Iterable[Step]) -> _usage.Usage:
    """Return what the models' answers of these steps have cost together."""
    found: _usage.Usage = {}
    for step in steps:
        if step.usage:
            _usage.add(found, step.usage)
    return found


def tokens(usage: _usage.Usage) -> int:
    """Return the tokens read and written."""
    return sum(counts.get(_usage.INPUT, 0) + counts.get(_usage.OUTPUT, 0) for counts in usage.values())


def money(usage: _usage.Usage) -> str:
    """Return the price as text, `$0.0021`; '' where one is not known."""
    prices = _prices(variable("DURABLE_NB_PRICES").strip())
    spent = sum(_usage.cost(counts, model, prices) for model, counts in usage.items())
    return "" if math.isnan(spent) or not usage else f"${spent:.4f}"


@functools.lru_cache(maxsize=1)
def _prices(text: str) -> _usage.Prices:
    """Return what `DURABLE_NB_PRICES` says: JSON, or the file that holds it; empty where it says nothing."""
    if not text:
        return {}
    try:
        found = json.loads(text if text.startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = error
    if _usage.are_prices(found):
        return cast("_usage.Prices", found)
    log.warning("DURABLE_NB_PRICES: write %r, or the name of a file that holds it (%.200s)", '{"gpt-5": [1.25, 10]}', found)
    return {}
