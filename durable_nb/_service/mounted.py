"""`durable.asgi(...)`: the HTTP face inside somebody's own application."""

from __future__ import annotations

import os
from types import ModuleType
from typing import TYPE_CHECKING, cast

from durable_nb._current import engine
from durable_nb._engine.workflows import Workflows
from durable_nb._service.worker import imported
from durable_nb.errors import DurableError, NotSupportedError

if TYPE_CHECKING:
    from durable_nb._service.web import Face

TOKEN = "DURABLE_NB_TOKEN"  # noqa: S105  its name


def asgi(*modules: str | ModuleType) -> Face:
    """An ASGI application that starts, controls and tells of runs, to be mounted in a Starlette or FastAPI application, after
    `durable.open(path)`: `app.mount("/durable", durable.asgi("shop"))`.

    It is what `durable-nb serve` serves, the page included, and executes the store's runs of the modules' workflows from its
    first request on. With `DURABLE_NB_TOKEN` set clients must show that; without, it answers this machine only.

    DurableError for a module that doesn't import or has no workflow, NotInRunError where no store is open.
    """  # fmt: skip
    try:
        from durable_nb._service.door import Door
        from durable_nb._service.web import Face
    except ImportError as error:
        raise DurableError(f"{error.name} is not installed: pip install 'durable-nb[serve]'") from None
    for module in modules:
        if not isinstance(module, ModuleType):
            imported(module)
    if not isinstance(engine(), Workflows):
        raise NotSupportedError("durable.asgi() serves a store; the engine in use keeps its runs elsewhere")
    return Face(lambda: cast("Workflows", engine()), Door(os.environ.get(TOKEN, "")), begins=True)
