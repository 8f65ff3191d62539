"""A step as bytes, to be executed where neither the objects of this process are nor the names of its notebook.

The function and its arguments go as cloudpickle copies them. What the body changes of its arguments comes back as a difference,
and is made to the objects that the step was given here.
"""

from __future__ import annotations

import asyncio
import pickle
from dataclasses import dataclass, replace
from inspect import isawaitable
from typing import Any, cast

from durable_nb import _codec, _pickling
from durable_nb._arguments import apply, changeable, changed, difference, fingerprint_of
from durable_nb._current import Body, Heartbeat, StepRequest, current_body, current_run
from durable_nb._fingerprint import Unhashable
from durable_nb._retry import USUAL


@dataclass(frozen=True, slots=True)
class Returned:
    """What one attempt has come to there."""

    form: str
    value: bytes
    """As `form` says: what the body returned, or the exception it raised."""
    failed: bool = False
    changes: bytes | None = None
    """What it changed of its arguments."""


def portable(request: StepRequest) -> bytes:
    """The request without what belongs to its engine: retries, limits, and how views call it. Raises whatever an argument's
    own pickling raises."""  # fmt: skip
    return _pickling.portable(replace(request, policy=USUAL, pace=None, limits=(), items=None))


async def execute(packed: bytes, idempotency_key: str, heartbeat: Heartbeat | None = None) -> Returned:
    """Call the function that `portable` has packed, once. A plain one in a worker thread, where the request says so.

    heartbeat  hears of the body's progress, and knows what the attempt before has reported
    """
    request = cast("StepRequest", pickle.loads(packed))
    current_run.set(None)
    current_body.set(Body(request.name, idempotency_key, heartbeat=heartbeat))
    before = _looked_at(request)
    try:
        value = await asyncio.to_thread(request.body) if request.thread else request.body()
        value = await value if isawaitable(value) else value
        form, data = _codec.encode(value)
    except Exception as error:
        form, data, _ = _codec.encode_error(error)
        return Returned(form, data, failed=True)
    after = _looked_at(request)
    changes = None
    if before is not None and after is not None:
        changes = difference(changeable(before), changed(before.components, after.components), value)
    return Returned(form, data, changes=changes)


def settled(request: StepRequest, returned: Returned) -> Any:
    """What the step returns here, its arguments changed as the body has changed them there; raises what that has raised."""
    value = _codec.decode(returned.form, returned.value)
    if returned.failed:
        raise value
    if returned.changes is None:
        return value
    return apply(returned.changes, changeable(_looked_at(request)), value)


def _looked_at(request: StepRequest) -> Any:
    try:
        return fingerprint_of(request)
    except Unhashable:  # what can't be read can't be compared
        return None
