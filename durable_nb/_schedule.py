"""Schedules: a workflow that is started by the clock, by whichever process runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from durable_nb import _cron
from durable_nb._current import Engine, ScheduleRequest, engine, refuse_in_workflow
from durable_nb._facts import ScheduleFacts
from durable_nb._misuse import explained
from durable_nb._verbs import check_name
from durable_nb._workflow import Run, Workflow
from durable_nb.errors import RunNotFoundError

_CATCH_UP = ("last", "all", "none")
_OVERLAP = ("allow", "skip")


class Schedule:
    """A schedule of the store. Its methods are plain calls, on disk when they return."""

    def __init__(self, name: str, home: Engine) -> None:
        self.name = name
        self._schedules = home.schedules

    def pause(self) -> None:
        """Start nothing until `resume()`; what is due in between is dropped."""
        self._schedules.pause(self.name, paused=True)

    def resume(self) -> None:
        """Go on from the next due time."""
        self._schedules.pause(self.name, paused=False)

    def trigger(self) -> Run:
        """Start a run of it now, paused or not."""
        return Run(self._schedules.trigger(self.name))

    def delete(self) -> None:
        """Forget the schedule. Runs that it has started stay."""
        self._schedules.delete(self.name)

    @property
    def paused(self) -> bool:
        """Is it paused?"""
        return self._facts().paused

    @property
    def next_at(self) -> datetime | None:
        """The next due time, in the schedule's zone's local time of this machine; None while it is paused."""
        at_s = self._facts().next_at
        return None if at_s is None else datetime.fromtimestamp(at_s).astimezone()

    def _facts(self) -> ScheduleFacts:
        for facts in self._schedules.all():
            if facts.name == self.name:
                return facts
        raise RunNotFoundError(f"the schedule {self.name!r} was deleted")

    def __repr__(self) -> str:
        found = self._facts()
        due = "paused" if self.next_at is None else f"next {self.next_at:%Y-%m-%d %H:%M:%S}"
        return f"<schedule {self.name!r} of {found.workflow!r}: {found.cron} {found.tz}, {due}>"


@explained
def schedule(
    name: str,
    workflow: Workflow[..., Any],
    *,
    cron: str,
    tz: str | None = None,
    args: Iterable[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    labels: Iterable[str] = (),
    catch_up: str = "last",
    overlap: str = "allow",
) -> Schedule:
    """Start runs of a workflow by the clock. On disk when this returns; the same name again replaces it, keeping what was
    started and whether it is paused.

    Whichever process runs and defines the workflow starts them, each due time once, as run `NAME@TIME`: a kernel, `durable-nb
    worker`, a program after `durable.open`. While none runs, nothing is started.

    cron      five fields, minute hour day month weekday, as in "0 7 * * mon-fri", or six with seconds first. A local time that
              comes twice in autumn starts one run, at its first; one that doesn't come in spring starts it at the change
    tz        a time zone, as in "Europe/Berlin"; default: this machine's
    catch_up  of the due times that passed while no process ran: "last" (one run), "all" or "none" are started later
    overlap   "allow", or "skip" a due time while the last run is unfinished

    ValueError for an expression or zone that is none or never comes, TypeError for arguments that the workflow doesn't take,
    UnserializableError for arguments that can't be stored; nothing is recorded then.
    """  # fmt: skip
    __tracebackhide__ = True
    refuse_in_workflow("durable.schedule()")
    check_name("schedule", name)
    if not isinstance(workflow, Workflow):
        raise TypeError(
            f"schedule({name!r}, {workflow!r}): give a workflow, an async function below @durable.workflow; nothing was "
            "recorded"
        )
    for what, value in (("cron", cron), ("tz", "" if tz is None else tz)):
        if not isinstance(value, str):
            raise TypeError(f"schedule(..., {what}={value!r}): write a text; nothing was recorded")
    texts = (labels,) if isinstance(labels, str) else tuple(labels)
    for label in texts:
        if not isinstance(label, str):
            raise TypeError(f"schedule(..., labels={labels!r}): {label!r} is not text; nothing was recorded")
    given = tuple(args), dict(kwargs or {})
    try:
        inspect.signature(workflow.fn).bind(*given[0], **given[1])
    except TypeError as error:
        raise TypeError(f"schedule({name!r}, {workflow.name}): {error}; nothing was recorded") from None
    for what, value, known in (("catch_up", catch_up, _CATCH_UP), ("overlap", overlap, _OVERLAP)):
        if value not in known:
            raise ValueError(f"{what}={value!r}: write one of {', '.join(map(repr, known))}; nothing was recorded")
    zone = _cron.local_zone() if tz is None else tz
    _cron.check(cron, zone)
    home = engine()
    home.schedules.put(ScheduleRequest(name, workflow.name, cron, zone, *given, texts, catch_up, overlap))
    return Schedule(name, home)
