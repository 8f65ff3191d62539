"""What a step is given, and what its body has changed of that. Pure: nothing here knows who executes it, or where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from durable_nb import _fingerprint, _patches
from durable_nb._current import StepRequest
from durable_nb._fingerprint import Fingerprint
from durable_nb._patches import Place


def fingerprint_of(request: StepRequest) -> Fingerprint:
    """What a step's outcome depends on now: its digest identifies the step in a cell."""
    if request.described is not None:
        return _fingerprint.of_value(request.described)
    return _fingerprint.of_call(request.fn, request.args, request.kwargs)


def changeable(found: Fingerprint | None) -> Mapping[Place, Any]:
    """The objects among them that a body may change in place."""
    return found.places() if found is not None and not found.lasting else {}


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    """Of these components: the arguments, and the object whose method is called, as far as they are something else now."""
    return {label for label, was in before.items() if label.startswith(("arg ", "call")) and after.get(label) != was}


def difference(places: Mapping[Place, Any], labels: set[str], value: Any) -> bytes | None:
    """The changed components, to be changed again by `apply`, and which of the objects `value` is or holds. None where there is
    nothing of both, or where it can't be done again."""  # fmt: skip
    try:
        now = [(place, obj) for place, obj in places.items() if place[0] in labels]
        patches = [(place, _patches.content_of(obj)) for place, obj in now]
        return _patches.pack(patches, value, places) if {place[0] for place, _ in now} == labels else None
    except Exception:  # whatever is odd about an argument, the outcome itself is recorded
        return None


def apply(packed: bytes, places: Mapping[Place, Any], value: Any) -> Any:
    """Make the changes to the objects that are at these places now; what the body returned, which may be one of them. KeyError,
    and nothing is changed, where a place holds nothing that fits."""  # fmt: skip
    return _patches.apply(packed, places, value)
