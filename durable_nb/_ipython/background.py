"""Cells that are executed in the background: on a snapshot of the notebook, and bound into it between two other cells."""

from __future__ import annotations

import asyncio
import sys
import traceback
import types
from collections.abc import Callable, Collection
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, Protocol

from IPython.core.error import UsageError

from durable_nb.errors import RunSuspended

_POLL_S = 0.1
_NOTHING = object()


class Execution(Protocol):
    """One execution of a cell."""

    label: str

    def detach(self) -> Snapshot:
        """From here on, the cell is executed on a snapshot of the notebook."""
        ...

    async def run(self) -> None:
        """Execute it."""
        ...


class Snapshot:
    """The notebook's names as they are now. Functions of the notebook read them there, whatever is bound in it later."""

    def __init__(self, live: dict[str, Any]) -> None:
        self.live = live
        self.before = dict(live)
        """What the notebook holds."""
        self.namespace = dict(live)
        self._originals: dict[int, Any] = {}
        for name, value in self.before.items():
            if isinstance(value, types.FunctionType) and value.__globals__ is live:
                copy = self.namespace[name] = _with_globals(value, self.namespace)
                self._originals[id(copy)] = value
        self._held = dict(self.namespace)

    def bound(self) -> dict[str, Any]:
        """What code that was executed here has bound, as the notebook gets it; `_NOTHING` stands for a deleted name."""
        names = {*self._held, *self.namespace}
        changed = (n for n in names if self._held.get(n, _NOTHING) is not self.namespace.get(n, _NOTHING) and n[:1] != "_")
        return {name: self._for_notebook(self.namespace.get(name, _NOTHING)) for name in sorted(changed)}

    def _for_notebook(self, value: Any) -> Any:
        """Functions that were defined here read the notebook's names from now on, and methods of classes do."""
        if id(value) in self._originals:
            return self._originals[id(value)]
        if isinstance(value, types.FunctionType) and value.__globals__ is self.namespace:
            return _with_globals(value, self.live)
        if isinstance(value, type):
            for name, member in list(vars(value).items()):
                if isinstance(member, types.FunctionType) and member.__globals__ is self.namespace:
                    setattr(value, name, _with_globals(member, self.live))
        return value


def _with_globals(function: types.FunctionType, names: dict[str, Any]) -> types.FunctionType:
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, function.__annotations__
    copy.__module__, copy.__qualname__, copy.__doc__ = function.__module__, function.__qualname__, function.__doc__
    copy.__dict__.update(function.__dict__)
    return copy


@dataclass(eq=False)
class _Running:
    label: str
    names: frozenset[str]
    """What it is to bind."""
    snapshot: Snapshot
    context: Context
    """What it prints there is shown below its cell."""
    task: asyncio.Task[None] | None = None
    error: BaseException | None = None


@dataclass
class BackgroundCells:
    """Of one notebook."""

    in_cell: bool = False
    """Is a cell being executed? Names are bound between two of them."""
    count: int = 0
    """So many cells have been executed."""
    _running: list[_Running] = field(default_factory=list)
    _ended: list[_Running] = field(default_factory=list)

    def check(self, label: str, names: Collection[str]) -> None:
        """UsageError where another cell that is executed in the background binds one of these names, too."""
        for one in self._running:
            if shared := sorted(one.names.intersection(names)):
                what = "is" if one.label == label else f"binds {', '.join(shared)}, too, and is"
                who = f"this cell, {label!r}," if one.label == label else f"the cell {one.label!r}"
                raise UsageError(
                    f"%%durable --background: {who} {what} being executed in the background already; nothing was run. Run this "
                    "one when that has ended, or give the variable another name"
                )

    def start(self, execution: Execution, names: Collection[str], ended: Callable[[], None]) -> None:
        """Execute a cell from here on, on a snapshot. `ended` is called when it has been."""
        snapshot = execution.detach()
        one = _Running(execution.label, frozenset(names), snapshot, copy_context())

        async def execute() -> None:
            try:
                await execution.run()
            except (KeyboardInterrupt, RunSuspended, asyncio.CancelledError) as stopped:
                one.error = stopped
                sys.stderr.write(f"durable_nb: {execution.label} · {type(stopped).__name__}: {stopped}\n")
            except BaseException as error:
                one.error = error
                traceback.print_exception(error)
            finally:
                self._running.remove(one)
                self._ended.append(one)
                ended()
                if not self.in_cell:
                    self.bind()

        self._running.append(one)
        one.task = asyncio.get_running_loop().create_task(execute(), context=one.context, name=f"durable_nb cell {one.label}")

    def pending(self, names: Collection[str]) -> list[tuple[str, list[str]]]:
        """The cells that are to bind some of these names, with the names."""
        found = [(one.label, sorted(one.names.intersection(names))) for one in self._running]
        return [(label, shared) for label, shared in found if shared]

    async def settle(self, names: Collection[str]) -> None:
        """Wait until these names are bound, as far as they are computed in the background. UsageError where that fails."""
        awaited = [one for one in self._running if not one.names.isdisjoint(names)]
        while any(one in self._running for one in awaited):  # noqa: ASYNC110  nothing else wakes a loop that an interrupt finds idle
            await asyncio.sleep(_POLL_S)
        self.bind()
        for one in awaited:
            if one.error is not None:
                missing = ", ".join(sorted(one.names.intersection(names)))
                raise UsageError(
                    f"%%durable: {missing} was to come from the cell {one.label!r}, which ended in the background with "
                    f"{type(one.error).__name__}: {one.error}; nothing was run. Run that cell again first"
                )

    def bind(self) -> None:
        """Bind what cells that have ended have computed, unless it was bound anew meanwhile."""
        ended, self._ended = self._ended, []
        for one in ended:
            if one.error is None:
                one.context.copy().run(self._bind, one)

    def _bind(self, one: _Running) -> None:
        live, before, kept = one.snapshot.live, one.snapshot.before, []
        for name, value in one.snapshot.bound().items():
            if live.get(name, _NOTHING) is not before.get(name, _NOTHING):
                kept.append(name)
            elif value is _NOTHING:
                live.pop(name, None)
            else:
                live[name] = value
        if kept:
            sys.stderr.write(
                f"durable_nb: {one.label} · {', '.join(kept)} was bound anew while the cell was executed in the background, "
                "and stays as it is\n"
            )
