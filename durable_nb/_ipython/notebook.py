"""Which notebook this is, as far as the front end tells."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from IPython.core.error import UsageError

from durable_nb._adoption import Origin
from durable_nb._ipython.options import Options, parse
from durable_nb._ipython.transform import split_cell

_SESSION = "JPY_SESSION_NAME"


def origin_of(code: str, namespace: Mapping[str, Any], folder: Path, store: Path) -> Origin:
    """The origin of a run of a cell with that code. `folder`: where the kernel was when the extension was loaded."""
    absolute = file_of(namespace, folder)
    if not absolute:
        return Origin(code=code)
    try:  # so that a project's folder may be moved, or seen from a container
        path = os.path.relpath(absolute, store)
    except ValueError:  # another drive, on Windows
        path = absolute
    return Origin(path, os.path.exists(absolute), code)  # noqa: PTH110  False for what is not a path at all


def file_of(namespace: Mapping[str, Any], folder: Path) -> str:
    """The path of the notebook's file, which need not be there; '' where it is not known."""
    path = path_of(namespace)
    if not path or os.path.isabs(path):  # noqa: PTH117
        return path
    # Jupyter may tell the path within its server's root folder; the kernel starts in the notebook's own folder.
    return os.path.join(folder, os.path.basename(path))  # noqa: PTH118,PTH119


@dataclass(frozen=True, slots=True)
class Written:
    """A durable cell as the notebook's file has it."""

    options: Options
    body: str


def durable_cells(path: str) -> tuple[dict[str, Written], float]:
    """The named durable cells of a notebook's file, in its order, and when it was saved (unix seconds); none of a file that
    can't be read."""  # fmt: skip
    found: dict[str, Written] = {}
    try:
        saved_at = os.stat(path).st_mtime  # noqa: PTH116
        cells = json.loads(Path(path).read_bytes())["cells"]
        for cell in cells:
            source = cell["source"] if cell["cell_type"] == "code" else ""
            parts = split_cell("".join(source).splitlines(keepends=True))
            if parts is not None:
                with suppress(UsageError):  # it says so when it is executed
                    options = parse(parts[0], parts[2])
                    found[options.name] = Written(options, parts[1])
    except (OSError, ValueError, LookupError, TypeError):
        return {}, 0.0
    found.pop("", None)
    return found, saved_at


def path_of(namespace: Mapping[str, Any]) -> str:
    """The notebook's path; '' where it is not known."""
    told = namespace.get("__vsc_ipynb_file__")  # VS Code; what it tells a Jupyter server is a made-up name
    if isinstance(told, str) and told:
        return told
    path = os.environ.get(_SESSION, "")
    return "" if _is_inherited(path) else path


@lru_cache(maxsize=1)
def _is_inherited(path: str) -> bool:
    """Was this kernel started by the notebook of that path, say by papermill in one of its cells?"""
    try:
        environment = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:  # macOS
        return False
    return os.fsencode(f"{_SESSION}={path}") in environment.split(b"\0")
