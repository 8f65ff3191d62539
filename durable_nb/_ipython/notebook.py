"""Which notebook this is, as far as the front end tells."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from durable_nb._adoption import Origin

_SESSION = "JPY_SESSION_NAME"


def origin_of(code: str, namespace: Mapping[str, Any], folder: Path, store: Path) -> Origin:
    """The origin of a run of a cell with that code. `folder`: where the kernel was when the extension was loaded."""
    path = _path(namespace)
    if not path:
        return Origin(code=code)
    # Jupyter may tell the path within its server's root folder; the kernel starts in the notebook's own folder.
    absolute = path if os.path.isabs(path) else os.path.join(folder, os.path.basename(path))  # noqa: PTH117,PTH118,PTH119
    try:  # so that a project's folder may be moved, or seen from a container
        path = os.path.relpath(absolute, store)
    except ValueError:  # another drive, on Windows
        path = absolute
    return Origin(path, os.path.exists(absolute), code)  # noqa: PTH110  False for what is no path at all


def _path(namespace: Mapping[str, Any]) -> str:
    """The notebook's path; '' where it is not known."""
    told = namespace.get("__vsc_ipynb_file__")  # VS Code; what it tells a Jupyter server is a made-up name
    if isinstance(told, str) and told:
        return told
    path = os.environ.get(_SESSION, "")
    return "" if _is_inherited(path) else path


def _is_inherited(path: str) -> bool:
    """Was this kernel started by the notebook of that path, say by papermill in one of its cells?"""
    try:
        environment = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:  # macOS
        return False
    return os.fsencode(f"{_SESSION}={path}") in environment.split(b"\0")
