"""Checks what a workflow is started with against its annotations, where pydantic is installed."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, get_type_hints

Validation = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""Given positional and keyword arguments: the same, converted."""

log = logging.getLogger("durable_nb")


def validation_of(function: Any, name: str) -> Validation | None:
    """Raises ValueError in one line for arguments that don't fit. None, and one line says so, without pydantic."""
    try:
        import pydantic
    except ImportError:
        log.warning("workflow %r: pydantic is not installed, so its arguments are not checked (pip install pydantic)", name)
        return None

    @functools.wraps(function)
    def taken(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    del taken.__dict__["__wrapped__"]  # else pydantic calls the workflow itself
    hints = _hints_of(function, name)
    signature = inspect.signature(function)
    parameters = [one.replace(annotation=hints.get(one.name, one.annotation)) for one in signature.parameters.values()]
    taken.__annotations__ = {one.name: hints[one.name] for one in parameters if one.name in hints}
    taken.__signature__ = signature.replace(parameters=parameters, return_annotation=Any)  # type: ignore[attr-defined]
    check = pydantic.validate_call(config={"arbitrary_types_allowed": True})(taken)

    def validated(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        __tracebackhide__ = True
        try:
            return check(*args, **kwargs)
        except pydantic.ValidationError as error:
            raise ValueError(f"{name}.start(...): {_said(function, error)}; nothing was started") from None

    return validated


def _hints_of(function: Any, name: str) -> dict[str, Any]:
    """The annotations by value. Written as text, they may name what is local where the workflow is defined."""
    frame = inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] == __package__:
        frame = frame.f_back
    try:
        return get_type_hints(function, localns=dict(frame.f_locals) if frame is not None else {}, include_extras=True)
    except Exception as error:
        raise TypeError(
            f"workflow {name!r}: validate=True can't read its annotations ({type(error).__name__}: {error}); define what they "
            "name before it"
        ) from error


def _said(function: Any, error: Any) -> str:
    """`email: value is not a valid address, cart.count: Input should be a valid integer`: no value, which may be a secret."""
    names = list(inspect.signature(function).parameters)
    found = []
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        first, *rest = one["loc"] or ("",)
        place = names[first] if isinstance(first, int) and first < len(names) else first
        found.append(f"{'.'.join(map(str, (place, *rest)))}: {' '.join(one['msg'].split())}")
    return ", ".join(found)
