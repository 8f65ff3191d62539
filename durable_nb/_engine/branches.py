"""Which of a run's tasks is asking: a name for each task that is the same in every execution.

A task's branch is fixed when the task is created, by a task factory that stands before the loop's own for as long as a run
is active. Branches count their children per coroutine function, so that a library's helper tasks shift nobody's number.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

from durable_nb._current import current_body


class Branch:
    """One task of a run. The run's own code is the branch ''."""

    def __init__(self, name: str = "", root: Branch | None = None) -> None:
        self.name = name
        self._root = root or self
        self._children: Counter[str] = Counter()
        self._made = {name}
        """Of the root: all branches that there have been."""

    def child(self, coro: Coroutine[Any, Any, Any]) -> Branch:
        """The branch of a task that runs `coro`."""
        kind = getattr(coro, "__qualname__", type(coro).__name__)
        self._children[kind] += 1
        name = f"{self.name}/{kind}#{self._children[kind]}"
        self._root._made.add(name)
        return Branch(name, self._root)

    def has_made(self, name: str) -> bool:
        """Of the root: has there been a task of that name in this execution?"""
        return name in self._made


current_branch: ContextVar[Branch | None] = ContextVar("durable_nb_branch", default=None)

_installed: dict[asyncio.AbstractEventLoop, int] = {}


@contextmanager
def branching(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Name the tasks that are created meanwhile. Runs may overlap: the factory goes when the last one ends."""
    if loop not in _installed:
        _install(loop)
    _installed[loop] = _installed.get(loop, 0) + 1
    try:
        yield
    finally:
        _installed[loop] -= 1
        factory = loop.get_task_factory()
        if not _installed[loop]:
            del _installed[loop]
            if isinstance(factory, _Factory):  # else somebody chained theirs to ours, which passes everything through
                loop.set_task_factory(factory.inner)


class _Factory:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
        parent = current_branch.get()
        # A context of the caller's own is left alone, and what a step's body starts is part of that step.
        if parent is not None and options.get("context") is None and current_body.get() is None:
            context = options["context"] = copy_context()
            branch = parent.child(coro)
            context.run(current_branch.set, branch)
        return self._made(loop, coro, options)

    def _made(self, loop: asyncio.AbstractEventLoop, coro: Any, options: dict[str, Any]) -> Any:
        if self.inner is not None:
            return self.inner(loop, coro, **options)
        return asyncio.Task(coro, loop=loop, **options)


def _install(loop: asyncio.AbstractEventLoop) -> None:
    loop.set_task_factory(_Factory(loop.get_task_factory()))


def branch_name() -> str:
    """The task of the run that asks."""
    branch = current_branch.get()
    return branch.name if branch else ""
