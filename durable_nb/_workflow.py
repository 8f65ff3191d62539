"""Workflows: async functions whose runs are durable, found again by id, and gone on with after a crash."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping
from datetime import timedelta
from typing import Any, Generic, ParamSpec, TypeVar, overload

from durable_nb._clock import parse_duration, say_duration, say_when
from durable_nb._current import (
    Engine,
    InvokeRequest,
    Limit,
    StartRequest,
    WorkflowOptions,
    current_body,
    current_run,
    engine,
    limit_of,
    refuse_in_workflow,
    run_for,
    workflow_functions,
    workflow_limits,
    workflow_options,
)
from durable_nb._events import Delivery
from durable_nb._facts import Snapshot, Status, Step
from durable_nb._limits import checked_limit, key_of
from durable_nb._misuse import did_you_mean, explained, missing_name
from durable_nb._outside import decide, request_of, send
from durable_nb._own_code import advise
from durable_nb._records import plain
from durable_nb._retry import RetryPolicy
from durable_nb._validation import Validation, validation_of
from durable_nb._verbs import check_name
from durable_nb.errors import NotInRunError

_P = ParamSpec("_P")
_T = TypeVar("_T")

_ON_CONFLICT = ("attach", "fail", "restart")
_START_OPTIONS = ("id", "labels", "delay", "on_conflict")
_ITEM_KEYS = ("args", "kwargs", "id", "labels", "delay")
_RESERVED = (*_START_OPTIONS, "engine")


class Workflow(Generic[_P, _T]):
    """An async function that can be started as a run. Called in a workflow or a cell, it is part of that run; elsewhere
    NotInRunError says how to start it. `.fn` is the function itself."""  # fmt: skip

    def __init__(
        self,
        fn: Callable[_P, Coroutine[Any, Any, _T]],
        name: str,
        limit: Limit | None = None,
        key: Callable[..., Any] | None = None,
        options: WorkflowOptions | None = None,
        validated: Validation | None = None,
    ) -> None:
        self.fn, self.name, self.limit, self.key = fn, name, limit, key
        self.options, self._validated = options or WorkflowOptions(), validated
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> Coroutine[Any, Any, _T]:
        __tracebackhide__ = True
        if current_run.get() is None:
            called = self.fn.__name__
            raise NotInRunError(
                f"the workflow {called}(...) was called outside a run, where nothing can be recorded; nothing was run. Start a "
                f"run of it: run = {called}.start(...), then 'await run' for what it returns"
            )
        return self.fn(*args, **kwargs)

    def start(
        self,
        *args: Any,
        id: str | None = None,
        labels: Iterable[str] = (),
        delay: float | str | timedelta | None = None,
        on_conflict: str = "attach",
        **kwargs: Any,
    ) -> Run:
        """Begin a run and return at once. It is on disk before its first line is executed.

        id           a name of yours makes the start idempotent: started again with the same arguments, it is the same run.
                     If that one is interrupted and nobody executes it, it goes on; a failed one stays failed. Without a name
                     it is a run of its own; in a durable cell or a workflow its id is the same in every execution, so that
                     going on after a crash doesn't start it again
        labels       texts that `durable.runs(label=...)` finds it by
        delay        its first line is executed so much later (seconds, timedelta, "2h"); until then it is `pending`, over
                     restarts too
        on_conflict  what happens where the id is known: "attach" to its run, "fail" with RunConflictError, or "restart" it

        RunConflictError where the id belongs to another workflow or to other arguments, UnserializableError where the
        arguments can't be stored; then nothing is recorded. Needs a running event loop, as a notebook's cell has.
        """
        __tracebackhide__ = True
        return _started([self._request(args, kwargs, id=id, labels=labels, delay=delay, on_conflict=on_conflict)])[0]

    def start_many(
        self,
        starts: Iterable[tuple[Any, ...] | Mapping[str, Any]],
        *,
        labels: Iterable[str] = (),
        delay: float | str | timedelta | None = None,
        on_conflict: str = "attach",
    ) -> list[Run]:
        """Begin many runs by one commit, and return at once: either all of them are on disk, or none is.

        starts  each a tuple of the workflow's arguments, or a dict {"args": (...), "kwargs": {...}, "id": ..., "labels": ...,
                "delay": ...}, of which each may be left out

        The options are those of `start`, for all that don't say otherwise. Errors as of `start`: nothing is started then.
        """
        __tracebackhide__ = True
        usual = {"id": None, "labels": labels, "delay": delay, "on_conflict": on_conflict}
        requests = []
        for n, given in enumerate(starts):
            args, kwargs, options = _item_of(self.name, n, given)
            requests.append(self._request(args, kwargs, **{**usual, **options}))
        return _started(requests) if requests else []

    def _request(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        id: str | None = None,
        labels: Iterable[str] = (),
        delay: float | str | timedelta | None = None,
        on_conflict: str = "attach",
    ) -> StartRequest:
        """What is asked of an engine to start such a run. Complains about what doesn't fit, before anything is recorded."""
        __tracebackhide__ = True
        try:
            inspect.signature(self.fn).bind(*args, **kwargs)
        except TypeError as error:  # now, not in the run
            unknown = [key for key in kwargs if key not in inspect.signature(self.fn).parameters]
            options = did_you_mean(unknown[0], _START_OPTIONS) if unknown else ""
            raise TypeError(f"{self.name}.start(...): {error}{options}; nothing was started") from None
        if self._validated is not None:
            args, kwargs = self._validated(args, kwargs)
        if id is not None:
            id = _checked_id(id)  # noqa: A001
        if on_conflict not in _ON_CONFLICT:
            raise ValueError(
                f"on_conflict={on_conflict!r}: write one of {', '.join(map(repr, _ON_CONFLICT))}; nothing was started"
            )
        texts = (labels,) if isinstance(labels, str) else tuple(labels)
        for label in texts:
            if not isinstance(label, str):
                raise TypeError(f"start(..., labels={labels!r}): {label!r} is not text; nothing was started")
        delay_s = 0.0 if delay is None else parse_duration(delay).total_seconds()
        limit, limit_key = limit_of(self.name, args, kwargs)
        return StartRequest(self.name, args, kwargs, id, texts, on_conflict, limit, limit_key, delay_s)


def _started(requests: list[StartRequest]) -> list[Run]:
    parent = current_run.get()
    if parent is not None and current_body.get() is None:
        return [Run(run_id, parent.runs) for run_id in parent.start_many(requests)]
    return [Run(run_id) for run_id in engine().start_many(requests)]


def _item_of(workflow: str, n: int, given: Any) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """The positional and keyword arguments and the options of one item of `start_many`."""
    __tracebackhide__ = True
    if isinstance(given, (tuple, list)):
        return tuple(given), {}, {}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{workflow}.start_many(...): item {n} is {given!r}; give each start as a tuple of arguments, such as "
            f"({given!r},), or as a dict with 'args', 'kwargs', 'id', 'labels', 'delay'; nothing was started"
        )
    unknown = [key for key in given if key not in _ITEM_KEYS]
    if unknown:
        raise TypeError(
            f"{workflow}.start_many(...): item {n} has a key {unknown[0]!r}; there are {', '.join(map(repr, _ITEM_KEYS))}; "
            "nothing was started"
        )
    args, kwargs = given.get("args", ()), given.get("kwargs", {})
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping):
        raise TypeError(
            f"{workflow}.start_many(...): item {n}: 'args' is a tuple or list, and 'kwargs' a dict; nothing was started"
        )
    return tuple(args), dict(kwargs), {key: given[key] for key in _ITEM_KEYS[2:] if key in given}


defined: dict[str, Workflow[..., Any]] = {}
"""By name, the workflows of this process."""


@explained
def invoke(name: str, workflow: Workflow[..., _T], /, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, _T]:
    """Run a workflow as a child, and take what it returns.

    The child is a run of its own: it has an id, `runs()` finds it, and its steps are listed behind the step `name`, as
    `name/step`. Killed while the parent waits, both go on where they were. What it returns is recorded in the parent as a
    step's result is; its exception is raised here, with a note that names the run. Cancelling the parent cancels its children.
    `resume()` of a failed parent resumes the child that failed; so does executing the cell again.
    """
    __tracebackhide__ = True
    if isinstance(name, Workflow):
        raise TypeError(missing_name("invoke", (name, workflow, *args)))
    name = check_name("invoke", name)
    if not isinstance(workflow, Workflow):
        raise TypeError(
            f"durable.invoke({name!r}, {workflow!r}): give a workflow, a function under @durable.workflow; nothing was run"
        )
    parent = run_for("invoke")
    start = workflow._request(args, kwargs)
    policy = RetryPolicy(0, None, None)
    of = "invoke", name, workflow.fn, start.args, start.kwargs
    return parent.step(InvokeRequest(*of, policy=policy, workflow=workflow.name))


@overload
def workflow(fn: Callable[_P, Coroutine[Any, Any, _T]], /) -> Workflow[_P, _T]: ...
@overload
def workflow(
    *,
    name: str | None = None,
    timeout: float | str | timedelta | None = None,
    on_failure: Callable[[Run, BaseException], Any] | None = None,
    limit: Limit | None = None,
    key: Callable[..., Any] | None = None,
    validate: bool = False,
) -> Callable[[Callable[_P, Coroutine[Any, Any, _T]]], Workflow[_P, _T]]: ...
@explained
def workflow(
    fn: Any = None,
    /,
    *,
    name: str | None = None,
    timeout: float | str | timedelta | None = None,
    on_failure: Callable[[Run, BaseException], Any] | None = None,
    limit: Limit | None = None,
    key: Callable[..., Any] | None = None,
    validate: bool = False,
) -> Any:
    """Make an async function a workflow, named after the function or `name`.

    A run finds its code by that name after a restart. Defining a function again replaces it, as running its cell again does;
    ValueError where another function has the name.

    timeout     of a whole run (seconds, timedelta, "2h"), from its beginning, with the time in which nobody executed it: its
                code is cancelled then, and when it has tidied up (`finally`) the run fails with RunTimeout
    on_failure  called as on_failure(run, error) when a run fails, before that is recorded: killed in it, it is called again;
                never again once the failure is on record. A plain function is called in a thread. It may not use verbs. What
                it raises is told, and changes nothing. Not called for a NonDeterminismError: put the code right, and resume
    limit       what `durable.limit` returns: a run holds a share of it from its first line to its end, sleeping and waiting
                included; the others are `pending`, in the order in which they were started
    key         a function of the workflow's arguments, `key=lambda email, cart: email`: each key has the limit for itself. It
                is called by `start`; where it raises, nothing is started
    validate    arguments are checked against the annotations when a run is started, and converted as pydantic does it;
                without pydantic they are not, and one line says so
    """
    __tracebackhide__ = True
    if limit is not None:
        checked_limit("durable.workflow", limit)
    if key is not None and limit is None:
        raise TypeError("durable.workflow(key=...): a key is of a limit; give limit=durable.limit('a name', concurrency=1) too")
    if key is not None and not callable(key):
        raise TypeError(f"durable.workflow(key={key!r}): give a function of its arguments, such as key=lambda email: email")
    options = WorkflowOptions(
        None if timeout is None else parse_duration(timeout).total_seconds(),
        None if on_failure is None else _with_handle(on_failure),
    )

    def wrap(function: Any) -> Workflow[..., Any]:
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"durable.workflow({function!r}): give an async function ('async def')")
        called = name or function.__name__
        check_name("workflow", called)
        for parameter in inspect.signature(function).parameters:
            if parameter in _RESERVED:
                raise TypeError(
                    f"the workflow {called!r} has a parameter {parameter!r}, an option of start: give it another "
                    f"name than {', '.join(_RESERVED)}"
                )
        before = workflow_functions.get(called)
        if before is not None and _home(before) != _home(function):
            raise ValueError(
                f"two workflows are named {called!r}: {'.'.join(_home(before))} and {'.'.join(_home(function))}. Their "
                "runs could not be told apart after a restart: give one another name, @durable.workflow(name=...)"
            )
        made = Workflow(function, called, limit, key, options, validation_of(function, called) if validate else None)
        defined[called] = made
        workflow_functions[called], workflow_options[called] = function, options
        workflow_limits.pop(called, None)
        if limit is not None:
            workflow_limits[called] = functools.partial(_limited, called, function, limit, key)
        advise(function, called)
        return made

    return wrap if fn is None else wrap(fn)


def _limited(
    name: str, fn: Any, limit: Limit, key: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Limit, str]:
    __tracebackhide__ = True
    if key is None:
        return limit, ""
    bound = inspect.signature(fn).bind(*args, **kwargs)
    bound.apply_defaults()
    return limit, key_of(f"{name}.start(...)", key, bound.args, bound.kwargs)


def _with_handle(on_failure: Any) -> Callable[[str, BaseException], Any]:
    """The user's function, given a run's id."""
    if not callable(on_failure):
        raise TypeError(f"durable.workflow(on_failure={on_failure!r}): give a function (run, error)")
    if not inspect.iscoroutinefunction(on_failure):
        return lambda run_id, error: on_failure(Run(run_id), error)

    async def tell(run_id: str, error: BaseException) -> None:
        await on_failure(Run(run_id), error)

    return tell


def _checked_id(run_id: object) -> str:
    __tracebackhide__ = True
    if not isinstance(run_id, str):
        raise TypeError(f"start(..., id={run_id!r}): a run's id is a text, such as id='order-42'; nothing was started")
    if not run_id.strip():
        raise ValueError(
            f"start(..., id={run_id!r}): a run's id is not empty; leave it out for one of its own. Nothing was started"
        )
    return plain(run_id)


def _home(function: Any) -> tuple[str, str]:
    return function.__module__, function.__qualname__


class Run:
    """A run of a workflow, or of a cell. Everything but awaiting it is a plain call."""

    def __init__(self, run_id: str, store: Engine | None = None) -> None:
        self.id = run_id
        self._home = store if store is not None else engine()

    @property
    def _engine(self) -> Engine:
        """The engine of the run's own store: the one in use, unless another store was opened meanwhile."""
        current = engine()
        return current if current.store_id == self._home.store_id else self._home

    @property
    def status(self) -> Status:
        """`interrupted` is a run that is not finished and that no process executes. Reads no step's value."""
        refuse_in_workflow("run.status")
        return self._engine.status_of(self.id)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps so far, in the order in which they were asked for."""
        return self._snapshot().steps

    def _snapshot(self) -> Snapshot:
        refuse_in_workflow("a run's status and steps")
        return self._engine.snapshot(self.id)

    @property
    def facts(self) -> dict[str, Any]:
        """What its code has reported so far (`durable.report`), in this process or in another one; of each name the latest."""
        refuse_in_workflow("run.facts")
        return self._engine.facts_of(self.id)

    def __await__(self) -> Generator[Any, Any, Any]:
        """What the workflow returns; its exception, or RunCancelled. An interrupted run goes on."""
        parent = current_run.get()
        if parent is not None and parent.is_replayed and current_body.get() is None:
            return parent.result_of(self.id).__await__()
        return self._engine.outcome(self.id).__await__()

    def result(self, timeout: float | str | timedelta | None = None) -> Any:
        """The same for synchronous code, a cell's too. TimeoutError after `timeout` (seconds, timedelta, "90s"); the run
        goes on."""  # fmt: skip
        import asyncio

        from durable_nb._door import wait_for

        refuse_in_workflow("run.result()")
        limit_s = None if timeout is None else parse_duration(timeout).total_seconds()

        async def outcome() -> Any:
            asked = asyncio.ensure_future(self._engine.outcome(self.id))
            try:
                ended, _ = await asyncio.wait({asked}, timeout=limit_s)
                if ended:
                    return asked.result()
            finally:
                asked.cancel()
            raise TimeoutError(f"the run {self.id!r} is {self.status} after {say_duration(limit_s or 0.0)}; it goes on")

        loop = self._engine.running_loop
        if loop is not None and asyncio._get_running_loop() is None:  # another thread than the loop's
            return asyncio.run_coroutine_threadsafe(outcome(), loop).result()
        return wait_for(outcome())

    def resume(self, *, take_over: bool = False) -> Run:
        """Go on with the run where it stopped; nothing where it is completed, or executed already.

        A failed run is tried again from the step that failed. `take_over` takes the run from a live process that executes it:
        that one's commits are refused from then on, and its code is cancelled.
        """
        refuse_in_workflow("run.resume()")
        self._engine.resume(self.id, take_over=take_over)
        return self

    def restart(self) -> Run:
        """Begin the run anew: it keeps its id and its arguments, and its outcomes are discarded.

        Steps get idempotency keys of their own, so that what was charged is charged again. A run that a live process executes
        is stopped there at once, as by a kill, and begins anew there.
        """
        refuse_in_workflow("run.restart()")
        self._engine.restart(self.id)
        return self

    def fork(self, at: str) -> Run:
        """Begin a new run of the same workflow, with the same arguments, that keeps what this one did before the step `at`.

        at  a step's path, as `run.steps` tells it, or its name: the first of that name. That step and all that were asked for
            after it are executed anew, with keys of their own

        This run stays as it is, whoever executes it. StepNotFoundError for a step that it hasn't asked for.
        """
        refuse_in_workflow("run.fork()")
        if not isinstance(at, str):
            raise TypeError(f"fork(at={at!r}): give a step's path or name, as in fork(at='charge'); nothing was started")
        return Run(self._engine.fork(self.id, at), self._home)

    def delete(self) -> None:
        """Remove the run and its values, for good. Its id is free: a run started under it begins anew.

        DurableError, and nothing is removed, unless the run has completed, failed or been cancelled.
        """
        refuse_in_workflow("run.delete()")
        self._engine.delete(self.id)

    def cancel(self, reason: str = "") -> None:
        """Stop the run at its next await. Completed steps are kept; whoever waits for it gets RunCancelled."""
        refuse_in_workflow("run.cancel()")
        if not isinstance(reason, str):
            raise TypeError(f"cancel({reason!r}): the reason is a text; nothing was cancelled")
        self._engine.cancel(self.id, reason)

    def notify(self, event_id: str, data: object = None) -> Delivery:
        """Send an event to this run: `durable.notify(event_id, data, run_id=run.id)`."""
        __tracebackhide__ = True
        return send(request_of(event_id, data, self.id), lambda: self._engine)

    def approve(self, name: str, approved: bool = True, comment: str = "") -> None:
        """Answer an approval that the run waits for, wherever it is executed, or will be.

        name  the approval's, or its path where several of that name wait

        StepNotFoundError where none of that name was asked for or several wait, DurableError where it is decided already or has
        timed out: the first decision stands.
        """
        decide(self.id, name, approved=approved, comment=comment, at=lambda: self._engine)

    def __repr__(self) -> str:
        found = self._snapshot()
        said = [found.status.value]
        if found.status is Status.INTERRUPTED:  # and nothing wakes without a process
            wakes = [step.wake_at for step in found.steps if step.wake_at is not None]
            said += [f"next wake {say_when(min(wakes))}"] if wakes else []
            said.append("no process is running this")
        return f"<run {self.id!r} of {found.name!r}: {', '.join(said)}>"


def this_run() -> Run:
    """The run that the calling code belongs to: a workflow's, a cell's, or that of the step being executed. NotInRunError
    elsewhere."""  # fmt: skip
    run = current_run.get()
    if run is None:
        raise NotInRunError(
            "durable.current_run() was called outside a durable run. Call it in a workflow, in a cell under '%%durable NAME', "
            "or in the body of a step; durable.get_run(id) finds a run from elsewhere"
        )
    return Run(run.id, run.runs)


def get_run(run_id: str) -> Run:
    """The run of that id; RunNotFoundError where there is none."""
    refuse_in_workflow("durable.get_run()")
    run_id = plain(run_id)
    engine().check(run_id)
    return Run(run_id)


def runs(
    status: str | None = None,
    workflow: str | None = None,
    label: str | None = None,
    limit: int = 100,
    *,
    before: Run | str | None = None,
) -> list[Run]:
    """The newest runs of the store, cells' too, as far as they fit.

    limit   how many at most
    before  only runs that began before this one, a Run or its id: with the last of a page, the next page

    ValueError for a status that there isn't, RunNotFoundError for an unknown `before`.
    """
    refuse_in_workflow("durable.runs()")
    _check_status(status)
    if limit < 0:
        raise ValueError(f"durable.runs(limit={limit!r}): give how many runs at most")
    place = before.id if isinstance(before, Run) else before
    found = engine().snapshots(status=status, workflow=workflow, label=label, limit=limit, before=place)
    return [Run(run.id) for run in found]


def cancel(*, label: str | None = None, workflow: str | None = None, status: str | None = None, reason: str = "") -> list[Run]:
    """Cancel every unfinished run of a workflow that has this label, workflow's name and status, and return these runs.

    TypeError where nothing is named, ValueError for a status that there isn't; then nothing is cancelled.
    """
    refuse_in_workflow("durable.cancel()")
    if label is None and workflow is None and status is None:
        raise TypeError(
            "durable.cancel(): name a label, a workflow or a status, as in cancel(label='shop'); nothing was cancelled"
        )
    _check_status(status)
    return [Run(run) for run in engine().cancel_all(status=status, workflow=workflow, label=label, reason=reason)]


def _check_status(status: str | None) -> None:
    if status is not None and status not in list(Status):
        raise ValueError(f"no status {status!r}; there are {', '.join(Status)}")


def resume() -> list[Run]:
    """Resumes every interrupted run that this notebook or module has started, and returns those runs.

    One line tells of each run whose workflow is not defined here. Another notebook's or program's runs are left to it, whatever
    their workflow is named.
    """
    refuse_in_workflow("durable.resume()")
    return [Run(run_id) for run_id in engine().resume_own()]
