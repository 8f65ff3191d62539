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

    @property
    def reads(self) -> set[str]:
        """Names that it may read."""
        ...

    @property
    def binds(self) -> frozenset[str]:
        """Names that it may bind."""
        ...

    async def restored(self) -> str:
        """The key of its entry, or '' where there was one: then the notebook is as it says. Begins nothing."""
        ...

    def is_executed_already(self) -> None:
        """Say so."""
        ...

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
    key: str
    names: frozenset[str]
    """What it is to bind."""
    context: Context
    """What it prints there is shown below its cell."""
    snapshot: Snapshot | None = None
    """Once it has begun."""
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

    async def begin(self, execution: Execution, ended: Callable[[], None]) -> None:
        """Restore a cell, or execute it from here on, on a snapshot. `ended` is called when that is done. UsageError where
        another cell in the background binds one of its names, too."""  # fmt: skip
        key = "" if self.pending(execution.reads) else await execution.restored()
        if not key and not self.pending(execution.reads):
            ended()
            return
        for one in self._running:
            if one.label == execution.label and key and one.key == key:
                execution.is_executed_already()
                return
            if shared := sorted(one.names & execution.binds):
                what = "is" if one.label == execution.label else f"binds {', '.join(shared)}, too, and is"
                who = f"this cell, {one.label!r}," if one.label == execution.label else f"the cell {one.label!r}"
                raise UsageError(
                    f"%%durable --background: {who} {what} being executed in the background already; nothing was run. Run this "
                    "one when that has ended, or give the variable another name"
                )
        one = _Running(execution.label, key, execution.binds, copy_context())
        self._running.append(one)
        work = self._execute(one, execution, ended)
        one.task = asyncio.get_running_loop().create_task(work, context=one.context, name=f"durable_nb cell {one.label}")

    async def _execute(self, one: _Running, execution: Execution, ended: Callable[[], None]) -> None:
        try:
            await self.settle(execution.reads, for_one=one)
            one.snapshot = execution.detach()
            await execution.run()
        except (KeyboardInterrupt, RunSuspended, asyncio.CancelledError, UsageError) as stopped:
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

    def pending(self, names: Collection[str]) -> list[tuple[str, list[str]]]:
        """The cells that are to bind some of these names, with the names."""
        found = [(one.label, sorted(one.names.intersection(names))) for one in self._running]
        return [(label, shared) for label, shared in found if shared]

    async def settle(self, names: Collection[str], *, for_one: _Running | None = None) -> None:
        """Wait until these names are bound, as far as they are computed in the background. UsageError where that fails.
        `for_one`: a cell that is executed there itself; else one in front, which has not begun."""  # fmt: skip
        awaited = [one for one in self._running if one is not for_one and not one.names.isdisjoint(names)]
        while any(one in self._running or (for_one is not None and one in self._ended) for one in awaited):  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)  # nothing else wakes a loop that an interrupt finds idle
        if for_one is None:
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
            if one.error is None and one.snapshot is not None:
                one.context.copy().run(self._bind, one.label, one.snapshot)

    def _bind(self, label: str, snapshot: Snapshot) -> None:
        live, before, kept = snapshot.live, snapshot.before, []
        for name, value in snapshot.bound().items():
            if live.get(name, _NOTHING) is not before.get(name, _NOTHING):
                kept.append(name)
            elif value is _NOTHING:
                live.pop(name, None)
            else:
                live[name] = value
        if kept:
            sys.stderr.write(
                f"durable_nb: {label} · {', '.join(kept)} was bound anew while the cell was executed in the background, "
                "and stays as it is\n"
            )
