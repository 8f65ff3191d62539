"""Checks what a workflow is started with against its annotations, where pydantic is installed."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

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
    taken.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    check = pydantic.validate_call(config={"arbitrary_types_allowed": True})(taken)

    def validated(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        __tracebackhide__ = True
        try:
            return check(*args, **kwargs)
        except pydantic.ValidationError as error:
            raise ValueError(f"{name}.start(...): {_said(function, error)}; nothing was started") from None

    return validated


def _said(function: Any, error: Any) -> str:
    """`email: value is not a valid address, cart.count: Input should be a valid integer`: no value, which may be a secret."""
    names = list(inspect.signature(function).parameters)
    found = []
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        first, *rest = one["loc"] or ("",)
        place = names[first] if isinstance(first, int) and first < len(names) else first
        found.append(f"{'.'.join(map(str, (place, *rest)))}: {' '.join(one['msg'].split())}")
    return ", ".join(found)
