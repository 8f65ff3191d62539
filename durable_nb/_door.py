"""The one door by which synchronous code waits for work on the kernel's loop.

Where the loop already runs, that needs a nested one, and nest_asyncio patches the whole process for it: so it is loaded
here only, on first use. nest_asyncio2, its maintained continuation, is used where it is installed (ipykernel 7 brings it).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


def wait_for(work: Coroutine[Any, Any, _T]) -> _T:
    """Run `work` to its end on this thread's loop, from code that can't await."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        from IPython.core.async_helpers import get_asyncio_loop

        terminal: asyncio.AbstractEventLoop = get_asyncio_loop()  # type: ignore[no-untyped-call]
        return terminal.run_until_complete(work)
    try:
        import nest_asyncio2 as nesting
    except ImportError:
        import nest_asyncio as nesting
    nesting.apply(loop)
    return loop.run_until_complete(work)
