"""The verbs of a run that meet the outside: `wait_for_event` and `approve` wait for it, `notify` and `decide` come from it."""

from __future__ import annotations

import getpass
from collections.abc import Callable, Coroutine
from datetime import timedelta

from durable_nb import _codec
from durable_nb._clock import parse_duration
from durable_nb._current import (
    Engine,
    SendRequest,
    WaitRequest,
    current_body,
    current_run,
    engine,
    refuse_in_workflow,
    run_for,
)
from durable_nb._events import Decision, Delivery, Event, Waiter, approvals_policy
from durable_nb._misuse import explained
from durable_nb._records import plain
from durable_nb._verbs import READ_ONCE, check_name
from durable_nb.errors import UnserializableError

_WEEK = "7d"


@explained
def wait_for_event(name: str, event_id: str, *, timeout: float | str | timedelta = _WEEK) -> Coroutine[object, object, Event]:
    """Wait for an event that somebody sends with `durable.notify(event_id, data)`: an `Event` with its `data`.

    Events that were sent since the run began count, also those sent before this call and while no kernel ran; each is delivered
    once to a run, the first sent first. After `timeout` (seconds, timedelta, "7d"), counted from the first asking, the event
    has `timed_out` and nothing is raised. What ended the wait is recorded: executed again, the code gets the same.
    """
    __tracebackhide__ = True
    name, event_id = check_name("wait_for_event", name), _checked_event("wait_for_event", event_id)
    return run_for("wait_for_event").wait(WaitRequest(name, parse_duration(timeout), "event", event_id))


@explained
def approve(name: str, prompt: str, *, timeout: float | str | timedelta = _WEEK) -> Coroutine[object, object, Decision]:
    """Ask somebody to decide: a `Decision`, true where it approves, with `approved`, `by`, `comment` and `timed_out`.

    The view of the run shows `prompt` with the buttons Approve and Reject; `run.approve(name)`, `%durable approve RUN STEP` and
    `durable-nb approve` decide from elsewhere, whether or not a process executes the run. The first decision counts. After
    `timeout` it is a rejection that has `timed_out`. In a cell an approval is kept until the cell completes, and lapses when
    what the cell reads changes.

    `DURABLE_NB_APPROVALS` decides for the whole process: `approve`, `reject`, `suspend` the cell, or `wait`. ValueError for
    another setting.
    """
    __tracebackhide__ = True
    name = check_name("approve", name)
    if not isinstance(prompt, str):
        raise TypeError(
            f"durable.approve({name!r}, {prompt!r}): the prompt is a text, the question to decide; nothing was asked"
        )
    approvals_policy()
    return run_for("approve").wait(WaitRequest(name, parse_duration(timeout), "decision", plain(prompt)))


def notify(event_id: str, data: object = None, *, run_id: str | None = None) -> Delivery:
    """Send an event to the runs that wait for it, or will: to one, where `run_id` is given. From a cell, a script, anywhere.

    The event is on disk when this returns. In a durable cell or a workflow it is a step: sent once, however often the code is
    executed; in a workflow's own code it is committed when that awaits next, and `await` gives the `Delivery` its fields.

    Raises UnserializableError for data that can't be stored, RunNotFoundError for an unknown run, and DurableError for one that
    has ended; then nothing is sent.
    """
    __tracebackhide__ = True
    return send(request_of(event_id, data, run_id))


def send(request: SendRequest, at: Callable[[], Engine] = engine) -> Delivery:
    """Send an event: in a run's own code as a step of the run, elsewhere by that engine."""
    __tracebackhide__ = True
    if current_run.get() is not None and current_body.get() is None:
        return run_for("notify").send(request)
    return at().send(request)


def request_of(event_id: str, data: object, run_id: str | None) -> SendRequest:
    """What is asked of an engine, its data encoded as they are now."""
    __tracebackhide__ = True
    event_id = _checked_event("notify", event_id)
    if run_id is not None and not isinstance(run_id, str):
        raise TypeError(f"durable.notify({event_id!r}, run_id={run_id!r}): a run's id is a text; nothing was sent")
    try:
        if isinstance(data, READ_ONCE):
            raise TypeError(f"a {type(data).__name__} can be read only once")  # noqa: TRY301  told as the others are
        form, packed = _codec.encode(data)
    except Exception as error:
        raise UnserializableError(
            f"the data of event {event_id!r} can't be stored ({type(error).__name__}: {error}); nothing was sent. Send plain "
            "data: texts, numbers, lists, dicts"
        ) from error
    return SendRequest(event_id, data, form, packed, None if run_id is None else plain(run_id))


def waiters(event_id: str) -> list[Waiter]:
    """Which runs wait for that event, since when and until when; also those that no process executes now."""
    refuse_in_workflow("durable.waiters()")
    return engine().waiters(_checked_event("waiters", event_id))


def decide(
    run_id: str, step: str, *, approved: bool = True, comment: str = "", by: str = "", at: Callable[[], Engine] = engine
) -> None:
    """Answer an approval of a run, or of the cell of that name: for buttons, magics and command lines.

    step  its path; a name alone is that of the approval that waits
    by    who decides; '' for this process's user
    at    the engine that has the run

    The decision is on disk when this returns. StepNotFoundError where no approval of that name was asked for, or where several
    wait; DurableError where it is decided already, has timed out, or the run has ended.
    """
    for text in (step, comment, by):
        if not isinstance(text, str):
            raise TypeError(f"approve({step!r}): {text!r} is not a text; nothing was decided")
    if not isinstance(approved, bool):
        raise TypeError(f"approve({step!r}, approved={approved!r}): write True or False; nothing was decided")
    refuse_in_workflow("run.approve()")
    at().decide(plain(run_id), plain(step), approved=approved, comment=plain(comment), by=plain(by or _user()))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user without a name
        return ""


def _checked_event(verb: str, event_id: object) -> str:
    __tracebackhide__ = True
    if not isinstance(event_id, str):
        raise TypeError(f"durable.{verb}(): an event's id is a text such as 'paid-42', not {event_id!r}; nothing was done")
    if not event_id.strip():
        raise ValueError(f"durable.{verb}(): an event's id is not empty; nothing was done")
    return plain(event_id)
