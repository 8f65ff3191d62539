"""Environment variables, read past `os.environ`'s own methods, which a durable cell watches: what is read here is no input."""

from __future__ import annotations

import os
from typing import Any


def variable(name: str) -> str:
    """Return the value of an environment variable; '' where there is none."""
    value = _data().get(name.upper() if os.name == "nt" else os.fsencode(name))
    return _decoded(value) if value is not None else ""


def variables() -> dict[str, str]:
    """Return all of them."""
    return {_decoded(name): _decoded(value) for name, value in list(_data().items())}


def _data() -> dict[Any, Any]:
    data: dict[Any, Any] = vars(os.environ)["_data"]
    return data


def _decoded(raw: Any) -> str:
    return raw if isinstance(raw, str) else os.fsdecode(raw)
