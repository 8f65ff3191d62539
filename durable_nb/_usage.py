"""What a model's answer has cost, in tokens: read out of answers as OpenAI's and Anthropic's services give them.

By model: `{"gpt-5": {"requests": 1, "input_tokens": 120, "output_tokens": 30}}`. Money is a matter of prices, which change.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

Usage = dict[str, dict[str, int]]
"""By model: requests, input_tokens, output_tokens."""

REQUESTS, INPUT, OUTPUT = COUNTS = ("requests", "input_tokens", "output_tokens")

_INPUTS = ("prompt_tokens", "input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
"""Anthropic counts what was read from or written to its cache apart, OpenAI within."""
_OUTPUTS = ("completion_tokens", "output_tokens")
_MOST = 1000
"""So many things of a list are looked at."""


Prices = Mapping[str, tuple[float, float]]
"""By model, what a million input and a million output tokens cost."""
_PER = 1_000_000


def cost(counts: Mapping[str, int], model: str, prices: Prices) -> float:
    """Of a model's tokens. A model's dated versions have its price, unless they have their own; NaN: it is not known."""
    known = [name for name in prices if model == name or model.startswith((f"{name}-", f"{name}@", f"{name}:"))]
    if not known:
        return math.nan
    read, written = prices[max(known, key=len)]
    return (counts[INPUT] * read + counts[OUTPUT] * written) / _PER


def are_prices(value: object) -> bool:
    """Is it a table of prices?"""
    return isinstance(value, Mapping) and all(map(_is_price, value.values()))


def _is_price(value: object) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(price, (int, float)) and not isinstance(price, bool) and 0 <= price < math.inf for price in value)
    )


def add(to: Usage, more: Mapping[str, Mapping[str, int]]) -> None:
    """Count these too."""
    for model, counts in more.items():
        mine = to.setdefault(model, dict.fromkeys(COUNTS, 0))
        for name, number in counts.items():
            mine[name] = mine.get(name, 0) + number


def of_answer(content: bytes) -> Usage:
    """Of the body of an answer: JSON, or the events of a stream. Empty where it isn't a model's."""
    if b'"usage"' not in content:
        return {}
    try:
        return _of_mapping(json.loads(content))
    except ValueError:
        return _of_events(content)


def of_step(noted: Usage, kind: str, value: Any) -> Usage:
    """Of a step that has returned this: what its body's requests have noted, else what can be told from the value."""
    if noted or kind != "run":
        return noted
    try:
        return of_value(value)
    except Exception:  # whatever is odd about the object's attributes: it is no model's answer
        return {}


def of_value(value: Any) -> Usage:
    """Of what a step returned: an answer as a package gives it, plain data, or some of these in a list, tuple or dict."""
    found: Usage = {}
    if isinstance(value, (list, tuple)):
        for one in value[:_MOST]:
            add(found, _of_one(one))
    else:
        add(found, _of_one(value))
    return found


def _of_one(value: Any) -> Usage:
    if isinstance(value, Mapping):
        return _of_mapping(value)
    usage, model = getattr(value, "usage", None), getattr(value, "model", "")
    if usage is None or callable(usage) or isinstance(value, type):
        return {}
    counted = usage if isinstance(usage, Mapping) else getattr(usage, "__dict__", None)
    return _counts(counted, model) if isinstance(counted, Mapping) else {}


def _of_mapping(answer: Any) -> Usage:
    if not isinstance(answer, Mapping):
        return {}
    usage = answer.get("usage")
    return _counts(usage, answer.get("model")) if isinstance(usage, Mapping) else {}


def _counts(usage: Mapping[str, Any], model: Any) -> Usage:
    given, taken = ([number for name in names if isinstance(number := usage.get(name), int)] for names in (_INPUTS, _OUTPUTS))
    if not given and not taken:
        return {}
    return {model if isinstance(model, str) else "": {REQUESTS: 1, INPUT: sum(given), OUTPUT: sum(taken)}}


def _of_events(content: bytes) -> Usage:
    """OpenAI tells it in the last event; Anthropic the input in the first one, and the rest later."""
    usage: dict[str, Any] = {}
    model = ""
    for line in re.findall(rb"^data: ?(\{.*\"usage\".*\})\s*$", content, re.MULTILINE):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        inner = event.get("message") or event.get("response") or event
        model = inner.get("model") or model
        usage |= {name: n for name, n in (inner.get("usage") or event.get("usage") or {}).items() if isinstance(n, int)}
    return _counts(usage, model)
