"""The verbs of a run, `run` and `sleep`; what it records in passing, `now`, `uuid4`, `random`, `patched`; and `step`, which
says how a function is to be run."""  # fmt: skip

from __future__ import annotations

import asyncio
import difflib
import dis
import functools
import inspect
import sys
import types
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from random import SystemRandom
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload
from uuid import UUID
from uuid import uuid4 as new_uuid4

from durable_nb._clock import Instant, parse_duration, parse_when
from durable_nb._current import Limit, RecordRequest, Reported, StepRequest, WaitRequest, current_body, current_run, run_for
from durable_nb._limits import checked_limit
from durable_nb._misuse import explained, missing_name
from durable_nb._records import plain
from durable_nb._retry import USUAL, Backoff, RetryOn, RetryPolicy
from durable_nb.errors import NotInRunError

READ_ONCE = (types.GeneratorType, types.AsyncGeneratorType, types.CoroutineType, asyncio.Future)

_P = ParamSpec("_P")
_T = TypeVar("_T")


@explained
def run(name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
    """Run `fn(*args, **kwargs)` as the step `name`, or return its recorded result.

    The step is identified by `name`, the code of `fn` (followed into what it calls) and the arguments, at the moment of
    this call. An async function runs on the loop, a plain one in a worker thread. When the await returns, the result is on
    disk; executed again, by a new kernel too, it comes from there and no code of `fn` runs.

    A failing step is tried again three times, 1 s, 2 s, 4 s apart (with jitter); programming errors and bad data are not.
    `durable.step(fn, retries=0)` in place of `fn` says otherwise. After the last attempt its exception is raised.

    Raises NotInRunError outside a durable cell, NestedStepError inside another step, UnserializableError where the result
    can't be stored.
    """
    __tracebackhide__ = True
    if callable(name) and not isinstance(name, str):
        raise TypeError(missing_name("run", (name, fn, *args)))
    if not callable(fn):
        raise TypeError(f"durable.run({name!r}, {fn!r}): give the function itself and its arguments, as in "
                        "durable.run('charge', charge, cart), not the result of calling it")  # fmt: skip
    step_fn, before, options = as_step(fn)
    at_once = is_awaited(sys._getframe(2))  # behind `explained`
    return step_fn.ask("run", name, (*before, *args), {**options, **kwargs}, awaited_at_once=at_once)


@explained
def sleep(name: str, duration: float | str | timedelta) -> Coroutine[Any, Any, None]:
    """Pause for `duration`: seconds, a timedelta, or "90s" "15m" "2h" "7d" "1h30m".

    The deadline is written before the wait begins, so a restarted kernel waits only for the rest. Nothing wakes by itself
    while no kernel runs: the cell resumes when it is executed again. A duration edited meanwhile counts from the beginning.
    """
    __tracebackhide__ = True
    name = check_name("sleep", name)
    return _sleep("sleep", name, parse_duration(duration))


@explained
def sleep_until(name: str, when: datetime | str | float) -> Coroutine[Any, Any, None]:
    """Pause until `when`: a datetime (naive = local time), ISO text, or unix seconds; by the wall clock."""
    __tracebackhide__ = True
    name = check_name("sleep_until", name)
    return _sleep("sleep_until", name, parse_when(when))


def _sleep(verb: str, name: str, wake: timedelta | datetime) -> Coroutine[Any, Any, None]:
    __tracebackhide__ = True
    return run_for(verb).wait(WaitRequest(name, wake))


def now() -> datetime:
    """The time, in UTC. Executed again, the code gets what it got the first time.

    Like `uuid4` and `random`: in a workflow as long as the run lives; in a cell until it completes, through restarts and edits,
    where several are told apart by their order. What is got is on disk before a step, sleep or child that may depend on it
    begins.
    """
    __tracebackhide__ = True
    return datetime.fromtimestamp(cast("float", run_for("now").record(RecordRequest("now", _wall_s))), UTC)


def uuid4() -> UUID:
    """A random UUID, the same when the code is executed again; see `now`."""
    __tracebackhide__ = True
    return UUID(cast("str", run_for("uuid4").record(RecordRequest("uuid4", _new_uuid))))


def random() -> float:
    """A random number from 0 to below 1, the same when the code is executed again; see `now`. `random.seed` has nothing to do
    with it."""  # fmt: skip
    __tracebackhide__ = True
    return cast("float", run_for("random").record(RecordRequest("random", _new_random)))


def patched(change_id: str) -> bool:
    """Does the run take the new way? False only in a workflow's run that had passed this point before the change was made.

    Write `if durable.patched("mail twice"):` around what was added, and what it replaces under `else`. The first answer stands
    for the whole run. When no run is left that began before the change, the call and the `else` can go. In a cell, True.
    """
    __tracebackhide__ = True
    name = check_name("patched", change_id)
    return cast("bool", run_for("patched").record(RecordRequest("patched", _yes, name)))


def _wall_s(at: Instant) -> float:
    return at.wall_s


def _new_uuid(_: Instant) -> str:
    return str(new_uuid4())


def _new_random(_: Instant) -> float:
    return SystemRandom().random()


def _yes(_: Instant) -> bool:
    return True


def report(**facts: Any) -> None:
    """Let others know how the run stands: `run.facts` is all that was reported so far, of each name the latest.

    Also in a step's body, and in its threads. Other processes see it within half a second, and when the run has ended. It is
    no step: a replay reports the same again. NotInRunError outside a run; UnserializableError for what can't be stored, or
    takes more than 64 kB.
    """
    run = current_run.get()
    if run is None:
        raise NotInRunError(
            "durable.report() was called outside a durable run. Call it in a workflow, in a cell under '%%durable NAME', or in "
            "the body of a step"
        )
    run.publish(Reported(facts))


def idempotency_key() -> str:
    """A key that is the same for every attempt at the step being executed, and for no other: 32 hex characters.

    Hand it to the far end ("Idempotency-Key"), and an effect that happened just before a crash happens once. LookupError
    outside a step's body.
    """
    body = current_body.get()
    if body is None:
        raise LookupError(
            "durable.idempotency_key() belongs in the body of a step: call it inside the function given to durable.run()"
        )
    return body.idempotency_key


@dataclass(eq=False)
class Step(Generic[_P, _T]):
    """A function with the options of `step`. Calling it gives an awaitable: in a run a step named after the function,
    elsewhere a plain call. `.fn` is the function itself."""  # fmt: skip

    fn: Callable[_P, _T]
    name: str | None = None
    policy: RetryPolicy = USUAL
    thread: bool = True
    timeout: timedelta | None = None
    at_most_once: bool = False
    ttl: timedelta | None = None
    limit: Limit | None = None

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> Coroutine[Any, Any, Any]:
        if current_run.get() is None:
            return self._plain(args, kwargs)
        name = self.name or str(getattr(self.fn, "__name__", type(self.fn).__name__))
        return self.ask("step", name, args, kwargs, awaited_at_once=is_awaited(sys._getframe(1)))

    @property
    def in_thread(self) -> bool:
        """Is the function called in a worker thread?"""
        return self.thread and not _is_async(self.fn)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    async def _plain(self, args: Any, kwargs: Any) -> Any:
        value = self.fn(*args, **kwargs)
        return await value if inspect.isawaitable(value) else value

    def ask(
        self, verb: str, name: str, args: Any, kwargs: Any, limits: tuple[Limit, ...] = (), **more: Any
    ) -> Coroutine[Any, Any, Any]:
        """Ask the current run for it as the step `name`. `limits`: beside its own. `more`: what else the verb has to say of the
        request."""  # fmt: skip
        __tracebackhide__ = True
        name = check_name(verb, name)
        current = run_for(verb)
        if kwargs:
            _check_options(verb, name, self.fn, kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, READ_ONCE):
                raise TypeError(
                    f"step {name!r} was given a {type(value).__name__}, which can be read only once and can't be compared with "
                    "what it was given before; nothing was run. Pass what it gives: list(...) of a generator, the awaited "
                    "result of a coroutine or task"
                )
        return current.step(
            StepRequest(
                kind="run",
                name=name,
                fn=self.fn,
                args=args,
                kwargs=kwargs,
                policy=self.policy,
                thread=self.in_thread,
                timeout_s=None if self.timeout is None else self.timeout.total_seconds(),
                at_most_once=self.at_most_once,
                ttl_s=None if self.ttl is None else self.ttl.total_seconds(),
                limits=self._limits(limits),
                **more,
            )
        )

    def _limits(self, more: tuple[Limit, ...]) -> tuple[Limit, ...]:
        """Of each name one: nobody waits for a share while he holds one of the same limit."""
        own = (self.limit,) if self.limit is not None else ()
        return tuple({limit.name: limit for limit in (*own, *more)}.values()) if more else own


def as_step(fn: Any) -> tuple[Step[..., Any], tuple[Any, ...], dict[str, Any]]:
    """A function with its options, and what it is given already: the object, where it is a method that is a step."""
    if isinstance(fn, functools.partial) and isinstance(fn.func, Step):
        return fn.func, fn.args, fn.keywords
    return (fn if isinstance(fn, Step) else Step(fn)), (), {}


@overload
def step(
    fn: Callable[_P, _T],
    /,
    *,
    name: str | None = ...,
    retries: int = ...,
    backoff: float | Backoff | None = ...,
    timeout: float | str | timedelta | None = ...,
    retry_on: RetryOn | None = ...,
    at_most_once: bool = ...,
    ttl: float | str | timedelta | None = ...,
    thread: bool = ...,
    limit: Limit | None = ...,
) -> Step[_P, _T]: ...
@overload
def step(
    *,
    name: str | None = ...,
    retries: int = ...,
    backoff: float | Backoff | None = ...,
    timeout: float | str | timedelta | None = ...,
    retry_on: RetryOn | None = ...,
    at_most_once: bool = ...,
    ttl: float | str | timedelta | None = ...,
    thread: bool = ...,
    limit: Limit | None = ...,
) -> Callable[[Callable[_P, _T]], Step[_P, _T]]: ...
@explained
def step(
    fn: Any = None,
    /,
    *,
    name: str | None = None,
    retries: int = 3,
    backoff: float | Backoff | None = None,
    timeout: float | str | timedelta | None = None,
    retry_on: RetryOn | None = None,
    at_most_once: bool = False,
    ttl: float | str | timedelta | None = None,
    thread: bool = True,
    limit: Limit | None = None,
) -> Any:
    """Say how a function is run as a step: a decorator, or inline as `durable.run("charge", durable.step(charge, retries=0))`.

    retries   attempts after the first one; a retry that is due survives a restart
    backoff   seconds between attempts, or a function (attempt from 1) -> seconds; default 1 s, doubling up to 60 s, jittered
    retry_on  exception types, or a function (exception) -> bool, instead of the default rule: everything but programming
              errors (TypeError, NameError ...), bad data (ValueError, LookupError, ArithmeticError), missing files and
              permissions, NonRetryableError, and HTTP statuses 4xx other than 408 and 429
    timeout   of each attempt (seconds, timedelta, "90s"); StepTimeout after it, which is retried. A plain function's thread
              can't be stopped: no other attempt begins while it lives; an attempt that could not begin therefore counts as
              timed out, so the wait is at most the sum of time-outs and pauses. What the thread returns after the last of
              them is recorded in a cell, which waits for the same thread when it is run again; a workflow drops it and says
              so, since the time-out was the step's outcome
    at_most_once  an attempt that was cut off (killed, interrupted) is not made again: StepInterrupted until you say so
    ttl       in a cell, an outcome older than this (seconds, timedelta, "7d") is not recalled: the step runs anew, under an
              idempotency key of its own. In a workflow's run what is recorded stands
    limit     what `durable.limit` returns: each attempt holds a share of it, a pause before the next one doesn't
    thread    False calls a plain function on the kernel's thread, for connections that are bound to it; the notebook is
              blocked meanwhile
    """
    if name is not None:
        check_name("step", name)
    if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
        raise ValueError(f"durable.step(retries={retries!r}): write how many attempts may follow the first one, 0 or more")
    if backoff is not None and not callable(backoff):
        parse_duration(backoff)
    kinds = retry_on if isinstance(retry_on, tuple) else (retry_on,)
    if not callable(retry_on) and not all(kind is None or isinstance(kind, type) for kind in kinds):
        raise TypeError(f"durable.step(retry_on={retry_on!r}): give exception types, or a function (exception) -> bool")
    policy = RetryPolicy(retries, backoff, retry_on)
    most = None if timeout is None else parse_duration(timeout)
    if limit is not None:
        checked_limit("durable.step", limit)
    lifetime = None if ttl is None else parse_duration(ttl)

    def wrap(function: Any) -> Step[Any, Any]:
        if isinstance(function, Step):
            function = function.fn
        elif isinstance(function, functools.partial) and isinstance(function.func, Step):
            function = functools.partial(function.func.fn, *function.args, **function.keywords)
        if not callable(function):
            raise TypeError(f"durable.step({function!r}): give a function")
        made = Step(function, name, policy, thread, most, at_most_once, lifetime, limit)
        functools.update_wrapper(made, function, updated=())
        return made

    return wrap if fn is None else wrap(fn)


def _check_options(verb: str, name: str, fn: Any, kwargs: dict[str, Any]) -> None:
    """TypeError for an option of `step` among the arguments of a function that doesn't take it."""
    __tracebackhide__ = True
    code = getattr(fn, "__code__", None)
    if isinstance(code, types.CodeType) and set(kwargs) <= set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]):
        return  # nearly every call
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # a builtin that doesn't tell
        return
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    options = list(inspect.signature(step).parameters)[1:]
    for key, value in kwargs.items():
        if key in parameters:
            continue
        meant = key if key in options else next(iter(difflib.get_close_matches(key, options, n=1)), None)
        if meant is not None:
            called = getattr(fn, "__name__", "function")
            shown = f"{meant}={value!r}" if isinstance(value, (int, float, str)) else f"{meant}=..."
            written = f"durable.run({name!r}, durable.step({called}, {shown}), ...)"
            raise TypeError(
                f"{called} takes no argument {key!r}; an option of the step goes into durable.step({called}, {shown}), as in "
                f"{written if verb == 'run' else f'@durable.step({shown})'}; nothing was run"
            )


def is_awaited(frame: types.FrameType) -> bool:
    """Does this frame await what the call that it is in returns, with nothing in between?"""
    return frame.f_lasti in _awaited_calls(frame.f_code)


@functools.lru_cache(maxsize=1024)
def _awaited_calls(code: types.CodeType) -> frozenset[int]:
    """Offsets of the calls, with the caches behind them: in some Pythons a frame that waits for a call stands there."""
    calls = [(call, then) for call, then in pairwise(dis.get_instructions(code)) if then.opname == "GET_AWAITABLE"]
    return frozenset(offset for call, then in calls for offset in range(call.offset, then.offset))


def check_name(verb: str, name: object) -> str:
    """The name as it is recorded. Complains, before anything is, about one that can't identify a step."""
    __tracebackhide__ = True
    if not isinstance(name, str):
        raise TypeError(
            f"durable.{verb}({name!r}, ...): the first argument is the step's name, a text such as 'charge'; nothing was run"
        )
    if not name.strip():
        raise ValueError(
            f"durable.{verb}({name!r}, ...): the step's name is empty; give it one, such as 'charge'. Nothing was run"
        )
    return plain(name)


_ASYNC_FLAGS = inspect.CO_COROUTINE


def _is_async(fn: Any) -> bool:
    if type(fn) is types.FunctionType:  # nearly always
        return bool(fn.__code__.co_flags & _ASYNC_FLAGS) or (bool(fn.__dict__) and inspect.iscoroutinefunction(fn))  # marked
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004
