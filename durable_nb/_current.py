"""The seam between verbs and engines: what a verb asks of the run it is in.

Verbs know no engine. They build a request, fixed at the moment of the call, and hand it to the current run; an engine is
whatever puts a `Run` there.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol

from durable_nb import _usage
from durable_nb._clock import Clock, Instant
from durable_nb._events import Delivery, Waiter
from durable_nb._facts import Progress, ScheduleFacts, Snapshot, Status, Used
from durable_nb._retry import USUAL, RetryPolicy
from durable_nb._secrets import call_revealed, holds_secret
from durable_nb._usage import Usage
from durable_nb.errors import NestedStepError, NotInRunError, NotSupportedError, StoreError


class Pace(Protocol):
    """Says when an attempt may begin: of many at once, so many at a time."""

    async def enter(self, clock: Clock) -> None:
        """Return when it may. A retry's pause is over then, and the attempt's time-out has not begun."""
        ...

    def check(self) -> None:
        """CancelledError where nothing begins any more."""
        ...

    def heed(self, error: BaseException) -> None:
        """An attempt has failed so: it may ask for a pause."""
        ...

    def returned(self) -> None:
        """The body of an attempt has returned; `leave` follows when that is on disk."""
        ...

    def leave(self, *, returned: bool) -> None:
        """An attempt is over, and what it came to is on disk. `returned`: its limit was told before that it had returned."""
        ...


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit of the store, shared by all its processes: so many at once, and so often. What `durable.limit` returns."""

    name: str
    concurrency: int | None
    """So many at once; None: as many as come."""
    rate: str | None
    """So often, evenly spaced, as the user has written it."""
    declared_at: float
    """When, in unix seconds: of two with other figures under one name the last one wins."""

    @property
    def figures(self) -> str:
        """As messages say them: "8 at once, 60/min"."""
        at_once = f"{self.concurrency} at once" if self.concurrency is not None else None
        return ", ".join(filter(None, (at_once, self.rate)))

    def __reduce__(self) -> Any:
        """Restored, it is declared anew, as the line that a hit skips would have done."""
        return declared, (self.name, self.concurrency, self.rate)


limits: dict[str, Limit] = {}
"""By name, what this process has declared last."""


def declared(name: str, concurrency: int | None, rate: str | None) -> Limit:
    """The limit of that name with these figures, for the store that is in use, or will be."""
    limit = limits[name] = Limit(name, concurrency, rate, time.time())
    if _engines:
        with contextlib.suppress(StoreError):  # whoever uses it is told
            _engines[0]().declare(limit)
    return limit


@dataclass(slots=True)  # not frozen: one is made for each recalled step, and freezing takes longer than making it
class StepRequest:
    """One unit of work whose outcome is to be recorded: a function and its arguments, to be called here or elsewhere."""

    kind: str
    name: str
    fn: Callable[..., Any]
    """Does the work; returns the value, or an awaitable of it."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    described: Any = None
    """Plain data that identifies the step in place of `fn` and its arguments, where these hold more than counts (a secret)."""
    policy: RetryPolicy = USUAL
    thread: bool = False
    """Call `body` in a worker thread instead of on the loop."""
    timeout_s: float | None = None
    """Of each attempt."""
    at_most_once: bool = False
    """An attempt that was cut off is not made again."""
    ttl_s: float | None = None
    """In a cell, an outcome that is older than this doesn't count."""
    pace: Pace | None = None
    limits: tuple[Limit, ...] = ()
    """Each attempt takes a share of these."""
    threads: int = 0
    """So many worker threads may be at work for it and its like; 0: as many as usual."""
    item: int = -1
    """Of a fan-out: which of its items it is given. Not part of what identifies it."""
    items: Items | None = None
    """Of these, which were published before."""
    goes_on_after: Callable[[BaseException], bool] | None = None
    """The caller tries again by itself: an equal request after a failure takes no place of its own among equals. In a
    workflow it goes on with this one where that failure, given to the function, is one of an attempt."""
    awaited_at_once: bool = False
    """Nothing can happen between the request and the wait for it: what identifies the step needn't be looked at again."""

    def body(self) -> Any:
        """Calls the function, with values in place of references to secrets among its arguments."""
        if any(map(holds_secret, self.args)) or (self.kwargs and any(map(holds_secret, self.kwargs.values()))):
            return call_revealed(self.fn, self.args, self.kwargs)
        return self.fn(*self.args, **self.kwargs)


@dataclass(slots=True)
class InvokeRequest(StepRequest):
    """A step whose work is another run: a child, whose id is the step's idempotency key. `fn` is its workflow's function."""

    workflow: str = ""

    def body(self) -> Any:
        """Begins the child, or attaches to it, and waits for what it comes to."""
        return _invoked(self)


async def _invoked(request: InvokeRequest) -> Any:
    run, body = current_run.get(), current_body.get()
    if run is None or body is None:
        raise NotInRunError(f"the child {request.name!r} of a run can be begun in that run's own process only")
    child = body.idempotency_key
    of = request.workflow, request.args, request.kwargs
    run.runs.start(StartRequest(*of, child, (), "keep", *limit_of(*of), is_invoked=True), run.id)
    if not run.is_replayed and run.runs.status_of(child) in (Status.FAILED, Status.CANCELLED):
        run.runs.resume(child, take_over=False)  # a cell that is executed again tries again what has failed
    try:
        return await run.runs.outcome(child)
    except Exception as error:
        error.add_note(f"durable_nb: raised by the run {child!r} of workflow {request.workflow!r}, invoked as {request.name!r}")
        raise


@dataclass(frozen=True, slots=True)
class WaitRequest:
    """A wait that outlasts the process: for a duration from its first asking, or until a point in time."""

    name: str
    wake: timedelta | datetime
    kind: str = "sleep"
    """`sleep`; or what ends the wait earlier: an `event`, or a `decision`."""
    of: str = ""
    """The event's id, or the question that is to be decided."""


@dataclass(frozen=True, slots=True)
class SendRequest:
    """An event, to be sent to one run or, with no `run_id`, to all that wait for it or will."""

    event_id: str
    data: Any
    form: str
    packed: bytes
    """`data`, encoded as `form` says, as it was at the call."""
    run_id: str | None = None


Recorded = float | str | bool


@dataclass(frozen=True, slots=True)
class RecordRequest:
    """A value that is made once, and is the same in every execution from then on."""

    kind: str
    """`now`, `uuid4`, `random` or `patched`."""
    make: Callable[[Instant], Recorded]
    """Makes it, given the moment."""
    name: str = ""
    """Of `patched`: the change. Its value is False, whatever `make` gives, in a run that has been there without it."""


@dataclass(slots=True)
class StartRequest:
    """A run of a workflow, to be begun by another one."""

    workflow: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    run_id: str | None
    """None: one that is the same in every execution."""
    labels: tuple[str, ...]
    on_conflict: str
    """Where there is a run of that id: "attach", "fail", "restart", or "keep": attach whatever the arguments are."""
    limit: Limit | None = None
    """The run holds a share of it from its first line to its end."""
    limit_key: str = ""
    """Each key has shares of its own."""
    delay_s: float = 0.0
    """It begins so much later."""
    is_invoked: bool = False
    """It is cancelled with the run that begins it."""


@dataclass(frozen=True, slots=True)
class ScheduleRequest:
    """Runs of a workflow, to be begun by the clock."""

    name: str
    workflow: str
    cron: str
    tz: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: tuple[str, ...]
    catch_up: str
    """Due times that passed while no process fired them: "all", "last" or "none" are begun later."""
    overlap: str
    """While the last run is unfinished: "allow" the next one, or "skip" it."""


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """So many steps of that name will be asked for, one for each item. Views count them from now on."""

    name: str
    count: int


@dataclass(frozen=True, slots=True)
class CalledOff:
    """Of these items, those that have not begun will not."""

    items: Items


@dataclass(frozen=True, slots=True)
class StandsFor:
    """A verb gives the code `value` where its step raised `error`."""

    error: BaseException
    value: Any


@dataclass(frozen=True, slots=True)
class Reported:
    """Facts that the code wants others to know of the run; of each name the latest stands."""

    facts: dict[str, Any]


Published = Items | CalledOff | StandsFor | Reported
"""What verbs know of a run, beside what they ask of it. An engine may do without."""


class Run(Protocol):
    """A run, as verbs see it. Identities are fixed when a method is called; the coroutine does the rest."""

    id: str
    is_replayed: bool
    """Is its code repeated from a history? Then it may look at nothing that a replay would not see."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that executes its steps."""
        ...

    def at_end(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """`close()` is awaited on that loop when this execution is over: no body is at work any more."""
        ...

    @property
    def runs(self) -> Engine:
        """The engine of its own store: where the runs that it starts belong."""
        ...

    def step(self, request: StepRequest) -> Coroutine[Any, Any, Any]:
        """The recorded outcome, or that of doing the work now and recording it."""
        ...

    def wait(self, request: WaitRequest) -> Coroutine[Any, Any, Any]:
        """Return when the time has come: None of a sleep, else the `Event` or `Decision`. The deadline is on disk before the
        wait begins; what ended it is before this returns, and is the same in every execution."""  # fmt: skip
        ...

    def send(self, request: SendRequest) -> Delivery:
        """Send an event, once in all executions."""
        ...

    def start_many(self, requests: list[StartRequest]) -> list[str]:
        """Begin children; their ids, the same in every execution."""
        ...

    def result_of(self, run_id: str) -> Coroutine[Any, Any, Any]:
        """What another run returns or raises, when it has ended."""
        ...

    def record(self, request: RecordRequest) -> Recorded:
        """The recorded value, or one that is made now. It is on disk before anything that may depend on it begins."""
        ...

    def publish(self, published: Published) -> None:
        """Something that whoever watches the run may want to know."""
        ...


class Heartbeat(Protocol):
    """What the body of a step reports of its progress, and what was reported before. For whatever thread."""

    def report(self, progress: Progress, form: str, data: bytes) -> None:
        """It has come so far. `form`, `data`: the state, encoded."""
        ...

    def last(self) -> Progress | None:
        """What the attempt before this one has reported last."""
        ...


@dataclass(frozen=True, slots=True)
class Body:
    """The step whose body is being executed."""

    name: str
    idempotency_key: str
    usage: Usage = field(default_factory=dict)
    """What the models' answers that it has got so far have cost."""
    say: Callable[[Callable[[], str]], object] = lambda _: None
    """Tells whoever looks at the step how far it has come: the text that is asked for, a few times a second, while somebody
    looks. From any thread; recorded nowhere."""
    heartbeat: Heartbeat | None = None
    """None: nobody wants to know how far it has come."""


def note_usage(found: Usage) -> None:
    """Count what an answer has cost for the step whose body got it."""
    body = current_body.get()
    if body is not None:
        _usage.add(body.usage, found)


current_run: ContextVar[Run | None] = ContextVar("durable_nb_run", default=None)
current_body: ContextVar[Body | None] = ContextVar("durable_nb_body", default=None)


class Webhooks(Protocol):
    """The webhooks of an engine's runs: each has the same token, secret and event in every execution."""

    def token(self, run_id: str, name: str) -> str: ...
    def secret(self, run_id: str, name: str) -> str: ...
    def event_id(self, run_id: str, name: str) -> str: ...


class Schedules(Protocol):
    """The schedules of an engine. RunNotFoundError for a name that it doesn't know."""

    def put(self, request: ScheduleRequest) -> None:
        """Make one, or replace the one of that name; on disk when this returns."""
        ...

    def pause(self, name: str, *, paused: bool) -> None:
        """Fire nothing until it is resumed; what is due in between is dropped."""
        ...

    def trigger(self, name: str) -> str:
        """Begin a run of it now; its id."""
        ...

    def delete(self, name: str) -> None:
        """Forget it; its runs stay."""
        ...

    def all(self) -> list[ScheduleFacts]:
        """Those there are, by name."""
        ...


class Engine(Protocol):
    """What starts and finds the runs of workflows."""

    @property
    def store_id(self) -> str:
        """Which store it is of: several processes may be."""
        ...

    @property
    def running_loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop that executes its runs, where it is running."""
        ...

    def start(self, request: StartRequest, parent: str = "") -> str:
        """Begin a run, or attach to the one of that id; its id. What it was started with is checked before this returns.
        `parent`: the run that starts it."""  # fmt: skip
        ...

    @property
    def webhooks(self) -> Webhooks:
        """What makes the addresses to which others post events for its runs."""
        ...

    @property
    def schedules(self) -> Schedules:
        """What begins its runs by the clock."""
        ...

    def declare(self, limit: Limit) -> None:
        """These figures hold for the limit of that name from now on."""
        ...

    def start_many(self, requests: list[StartRequest], parent: str = "") -> list[str]:
        """The same of several: the new ones are begun together, or none is."""
        ...

    def interrupted(self) -> list[tuple[str, str]]:
        """The runs of workflows that are not finished and that nobody executes, newest first: (id, workflow)."""
        ...

    def resume_own(self) -> list[str]:
        """Go on with those whose workflow is defined here, by the module or notebook that has started them; their ids."""
        ...

    def check(self, run_id: str) -> None:
        """RunNotFoundError where there is no run of that id."""
        ...

    def status_of(self, run_id: str) -> Status:
        """How a run stands; reads no value."""
        ...

    def resume(self, run_id: str, *, take_over: bool) -> None:
        """Go on with a run that is not completed and that nobody executes."""
        ...

    def restart(self, run_id: str) -> None:
        """Begin a workflow's run anew, under its id and with its arguments; whoever executes it does it."""
        ...

    def fork(self, run_id: str, at: str) -> str:
        """Begin a run that keeps what the other one did before the step at that path; its id. StepNotFoundError."""
        ...

    def cancel(self, run_id: str, reason: str) -> None:
        """Stop a run at its next await."""
        ...

    def send(self, request: SendRequest) -> Delivery:
        """Send an event. RunNotFoundError for an unknown run, DurableError for one that has ended."""
        ...

    def waiters(self, event_id: str) -> list[Waiter]:
        """The waits for that event that have not ended, whether or not a process executes their runs; the first asked first."""
        ...

    def decide(self, run_id: str, step: str, *, approved: bool, comment: str, by: str) -> None:
        """Answer an approval that waits. `step`: its path, or its name where one of that name waits. StepNotFoundError where
        there is none or where there are several, DurableError where it is decided already."""  # fmt: skip
        ...

    def cancel_all(self, *, status: str | None, workflow: str | None, label: str | None, reason: str) -> list[str]:
        """The same of every unfinished run of a workflow that fits; their ids."""
        ...

    def delete(self, run_id: str) -> None:
        """Remove a finished run of a workflow, and its values. DurableError for any other."""
        ...

    def snapshot(self, run_id: str) -> Snapshot:
        """The run and its steps; RunNotFoundError."""
        ...

    async def outcome(self, run_id: str) -> Any:
        """What the run returns or raises, when it has ended."""
        ...

    def facts_of(self, run_id: str) -> dict[str, Any]:
        """What its code has reported so far."""
        ...

    def snapshots(
        self,
        *,
        status: str | None = None,
        workflow: str | None = None,
        label: str | None = None,
        limit: int | None = None,
        before: str | None = None,
        steps: bool = False,
    ) -> list[Snapshot]:
        """The newest runs first, cells' too, as far as they fit, those after the run `before`; without their steps, which take
        their time, unless asked."""  # fmt: skip
        ...

    def used(self) -> list[Used]:
        """What models' answers have cost, by run, the newest first; only runs that got some."""
        ...


workflow_functions: dict[str, Callable[..., Coroutine[Any, Any, Any]]] = {}
"""By name, the async functions that are workflows: how a run finds its code again."""

workflow_limits: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], tuple[Limit, str]]] = {}
"""By workflow: the limit that its runs are under, and the key of one that is started with these arguments."""


def limit_of(workflow: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Limit | None, str]:
    """What a run of that workflow is under; raises what is wrong with the key function."""
    __tracebackhide__ = True
    found = workflow_limits.get(workflow)
    return found(args, kwargs) if found is not None else (None, "")


@dataclass(frozen=True, slots=True)
class WorkflowOptions:
    """What is said of a workflow where it is defined, beside its function."""

    timeout_s: float | None = None
    """Of a whole run, from its beginning."""
    on_failure: Callable[[str, BaseException], Any] | None = None
    """Called with the id of a run that fails, and its error."""


workflow_options: dict[str, WorkflowOptions] = {}
"""By name."""

_engines: list[Callable[[], Engine]] = []


def use_engine(provider: Callable[[], Engine] | None) -> None:
    """Workflows of this process run on the engine that `provider` gives; None: on none."""
    _engines[:] = [] if provider is None else [provider]


def is_engine_in_use() -> bool:
    """Is there one to ask?"""
    return bool(_engines)


def engine() -> Engine:
    """The engine in use; NotInRunError where there is none."""
    if not _engines:
        raise NotInRunError("no store is open: run '%load_ext durable_nb' in a notebook, or durable.open(path) in a program")
    return _engines[0]()


def run_for(verb: str) -> Run:
    """The current run, for a verb called `verb`; NotInRunError or NestedStepError where it can't be used here."""
    __tracebackhide__ = True
    body = current_body.get()
    if body is not None:
        raise NestedStepError(
            f"durable.{verb}() was called inside the body of step {body.name!r}, which is recorded whole or not at all. "
            f"Call durable.{verb}() in the cell, before or after the step, and pass the result on"
        )
    run = current_run.get()
    if asyncio._get_running_loop() is None and threading.current_thread() is not threading.main_thread():
        raise NotInRunError(
            f"durable.{verb}() was called in the thread {threading.current_thread().name!r}, which belongs to no run; nothing "
            f"was run. Call it in the cell's or workflow's own code, for several at once with 'await asyncio.gather(...)', and "
            "leave the thread to the step: a plain function runs in one"
        )
    if run is None:
        raise NotInRunError(
            f"durable.{verb}() was called outside a durable run, where nothing can be recorded; nothing was run. Put "
            "'%%durable NAME' on the first line of the cell"
        )
    return run


def refuse_in_workflow(what: str) -> None:
    """What the code of a workflow learns by itself, a replay would not see."""
    __tracebackhide__ = True
    run = current_run.get()
    if run is not None and run.is_replayed and current_body.get() is None:
        raise NotSupportedError(
            f"{what} can't be used in a workflow's own code, since a replay would see something else. Do it in a step: "
            "await durable.run(name, function, ...)"
        )
