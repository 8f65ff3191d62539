"""Steps that are executed: attempts at a body, the pauses between them, and what is to be recorded of the last one.

Whoever asks decides what a step is identified by, and records what it has come to: a cell by content, a workflow by history.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from typing import Any

from durable_nb import _codec, _usage
from durable_nb import _records as rec
from durable_nb._arguments import fingerprint_of
from durable_nb._clock import RECHECK_S, remaining_s, say_duration
from durable_nb._current import Body, InvokeRequest, Limit, StepRequest, current_body
from durable_nb._engine.attempt import Attempt
from durable_nb._engine.heartbeats import Heartbeat
from durable_nb._engine.in_place import Inputs, Sharing, described, packed_changes, provenance_of
from durable_nb._engine.limits import Share
from durable_nb._engine.observing import Host, NoHost, Observers, Raised, Sayings
from durable_nb._engine.run_log import Held, RunLog, say
from durable_nb._engine.shared import Shared
from durable_nb._facts import Facts, Progress, Status, Step
from durable_nb._fingerprint import Unhashable
from durable_nb._preview import Preview, names_of, preview, preview_answer, preview_call, preview_request
from durable_nb._records import Attempts, Outcome
from durable_nb._replay import CutOff, Perform, Retry, decide
from durable_nb._retry import note_failure, retry_delay_s, timed_out
from durable_nb._usage import Usage
from durable_nb.errors import LeaseLost, NotSupportedError, StepInterrupted, StepTimeout, UnserializableError


@dataclass(frozen=True, slots=True)
class Wording:
    """How messages speak of a run."""

    label: str
    """What they call it: "cell 'a'"."""
    resume_hint: str
    """What a user does to resume it."""
    rerun_hint: str
    """What a user does to have a step that was cut off executed again."""
    unreadable_hint: str
    """What a user does where a step's record can't be read."""


@dataclass(frozen=True, slots=True)
class RunPolicy:
    """What executions of cells and of workflows do differently with a step."""

    keeps_late_results: bool
    """What a thread comes to after its last time-out is recorded for the next execution. Else it is dropped: the time-out was
    the outcome."""  # fmt: skip
    verifies_lease: bool
    """Whoever may have lost the run looks before a body begins, where the last commit is a while ago."""


class StepCall:
    """A step that the code has asked for and that is not on record."""

    __slots__ = (
        "_arguments",
        "_inputs",
        "_key",
        "began",
        "branch",
        "context",
        "failures",
        "has_returned",
        "heartbeat",
        "is_admitted",
        "is_at_work",
        "path",
        "request",
        "shares",
    )

    def __init__(
        self, request: StepRequest, key: str | tuple[str, ...], path: str, branch: str = "", inputs: Inputs | None = None
    ) -> None:
        """`key`: the idempotency key, or what it is the digest of."""
        self.request, self._inputs = request, inputs
        self._arguments: str | None = None
        self._key = key
        self.path, self.branch = path, branch
        self.context: Context | None = None
        """Its body sees these context variables; None: those of the task that asks."""
        self.failures: Attempts | None = None
        """The attempts that have failed so far."""
        self.began: rec.Sequence = (0, 0)
        """When the last attempt began."""
        self.is_admitted = False
        """Its limit counts it."""
        self.has_returned = False
        """Its limit knows that what it came to is being written."""
        self.heartbeat: Heartbeat | None = None
        """Of the last attempt."""
        self.is_at_work = False
        """Its body has begun, and what that came to is not on disk."""
        self.shares: list[Share] = []
        """Of the limits that it is under, while an attempt is made."""

    @property
    def key(self) -> str:
        """The idempotency key."""
        if not isinstance(self._key, str):
            self._key = _codec.digest_of(*self._key)
        return self._key

    @property
    def inputs(self) -> Inputs:
        """What its body is given, as it was when this was looked at first: thousands may wait for their limit."""
        if self._inputs is None:
            try:
                found = fingerprint_of(self.request)
            except Unhashable:  # it explains, and identifies nothing: an argument that can't be read is no reason to fail
                found = None
            self._inputs = Inputs(self.request, found)
        return self._inputs

    @property
    def arguments(self) -> str:
        """What its body is given, as a short text: made when this is looked at first, before a body can change it."""
        if self._arguments is None:
            request = self.request
            if request.described is not None:  # its arguments hold more than counts: a client, a key
                self._arguments = preview_request(request.described)
            else:
                self._arguments = preview_call(request.args, request.kwargs, names_of(request.fn))
        return self._arguments

    def returned(self) -> None:
        """The body has ended, and what it came to is handed over to be written."""
        self.give_back()
        if self.is_admitted and self.request.pace is not None:
            self.has_returned = True
            self.request.pace.returned()

    @property
    def progress_rows(self) -> tuple[str, ...]:
        """Rows that go with its outcome: it needs no checkpoint any more."""
        return self.heartbeat.rows() if self.heartbeat is not None else ()

    def give_back(self) -> None:
        """No body is at work for it any more: others that are under the same limits may begin."""
        shares, self.shares = self.shares, []
        for share in shares:
            share.leave()

    def leave(self) -> None:
        """What an attempt has come to is on disk: the next that keeps the same pace may begin."""
        self.give_back()
        if self.is_admitted and self.request.pace is not None:
            self.is_admitted = False
            self.request.pace.leave(returned=self.has_returned)


@dataclass(frozen=True, slots=True)
class Ended:
    """What a step has come to, to be recorded."""

    inputs: Inputs
    """Of the attempt that ended it; it may have been an earlier execution's, with objects of its own."""
    attempt: int
    began_at: float
    value: Any = None
    error: BaseException | None = None
    """A CancelledError: the body was stopped, and nothing is to be recorded."""
    was_interrupted: bool = False
    """A KeyboardInterrupt has stopped it."""
    shown: bytes = b""
    seen: bytes = b""
    used: Usage = field(default_factory=dict)
    """What the models' answers that the body got have cost."""


class Performer:
    """Executes the steps of one execution of a run."""

    def __init__(
        self, shared: Shared, log: RunLog, held: Held, facts: Facts, observers: Observers, wording: Wording, policy: RunPolicy
    ) -> None:
        self._shared, self._log, self._held, self._facts = shared, log, held, facts
        self._observers, self._wording, self._policy = observers, wording, policy
        self._sayings = Sayings(observers, asyncio.get_running_loop())
        self.host: Host = NoHost()
        self.bodies: dict[str, Attempt] = {}
        """At work now for this execution, by idempotency key."""
        self.is_over = False
        """The execution has ended."""
        self._sharing = Sharing()
        self._run_id = log.record.id

    async def perform(
        self,
        call: StepCall,
        note: Callable[[Attempts], Awaitable[None]],
        keep: Callable[[Ended], Coroutine[Any, Any, None]],
        wait: Callable[[float, str], None] = lambda _seconds, _doing: None,
        earlier: Attempt | None = None,
    ) -> Ended:
        """Execute a step until it has come to its end. Whoever has recorded that calls `call.leave()`.

        note     records the attempts that have failed, or (of a step that is tried at most once) that one begins
        keep     records what a body comes to that goes on when nobody waits for it any more
        wait     is told of a pause before it begins, and may raise
        earlier  an attempt that an earlier execution has begun: it is the first
        """
        late = self._taken_over(call, earlier)
        began_at, is_held = self._now_s(), False
        body: Attempt | None = None  # whose end nobody has looked at
        try:
            while True:
                failures = self._of_this_boot(call)
                if late is not None and late.is_over and late.error is None:
                    return self._ended(late, failures.failed if failures else 1, began_at)
                match decide(None, failures, self._shared.clock.now()):
                    case CutOff() if late is None:
                        raise self._cut_off(call.request)  # noqa: TRY301  not admitted by its limit
                    case Retry() as later:
                        await self._pause(call, later, wait, late)
                        continue
                    case Perform(attempt):
                        pass
                    case _:
                        attempt = (failures.failed if failures else 0) + 1
                if call.request.pace is not None and late is None:
                    await call.request.pace.enter(self._shared.clock)
                    call.is_admitted, call.has_returned = True, False
                    began_at = self._now_s()
                if call.request.limits and late is None:
                    await self._enter_limits(call, wait)
                    if call.request.pace is not None:
                        call.request.pace.check()
                    began_at = self._now_s()
                if not is_held:
                    self._sharing.hold(call.inputs)
                    is_held = True
                if failures is not None:
                    began_at = failures.started_at
                self._facts.update(
                    call.path,
                    status=Status.RUNNING,
                    attempts=attempt,
                    started_at=began_at,
                    error=None,
                    wake_at=None,
                    waits_for=None,
                    preview=Preview(call.arguments),
                )
                body = late if late is not None and not late.is_over else await self._begun(call, note, attempt, began_at)
                late = None
                if await body.ends_within(call.request.timeout_s):
                    error = body.error
                    if error is None or isinstance(error, asyncio.CancelledError):
                        call.returned()
                        return self._ended(body, attempt, began_at)
                else:
                    error = self._timed_out(call.request)
                    late = body if body.in_thread else None
                body = None
                if call.request.pace is not None:
                    call.request.pace.heed(error)
                self._observers.publish(Raised(call.path, error))
                delay = self._delay(call.request, attempt, error, began_at)
                if delay is None:
                    if late is not None:
                        self._give_up(call, late, keep, attempt, began_at)
                    return Ended(call.inputs, attempt, began_at, error=error)
                await self._note_failure(call, note, attempt, error, began_at, delay)
                if late is None:
                    call.leave()
                else:
                    late.when_over(call.leave)
        except BaseException:
            running = self.bodies.get(call.key)
            if running is None:
                call.leave()
                if body is not None and body.is_over:  # in the very moment in which its end was to be looked at
                    self._keep(keep, self._ended(body, attempt, began_at))
            else:
                running.when_over(call.leave)
                tried = call.failures.failed + 1 if call.failures else 1
                running.owner = lambda body: self._keep(keep, self._ended(body, tried, began_at))
            raise
        finally:
            if is_held:
                self._sharing.release(call.inputs)

    async def _enter_limits(self, call: StepCall, wait: Callable[[float, str], None]) -> None:
        """Wait for a share of each limit that the step is under."""
        record = self._log.record

        def waits(limit: Limit) -> None:
            self._facts.update(call.path, status=Status.PENDING, wake_at=None, waits_for=f"limit {limit.name!r}")

        for limit in call.request.limits:
            if limit.name == record.limit and not record.limit_key and limit.concurrency is not None:
                raise NotSupportedError(
                    f"step {call.request.name!r} of {self._wording.label} is under the limit {limit.name!r}, of which its run "
                    "holds a share until its end: where no other is left it would wait for itself. Give one of the two a limit "
                    "of its own; the step was not run"
                )
        call.shares = await self._shared.limits.enter(call.request.limits, waits, wait)

    def _taken_over(self, call: StepCall, earlier: Attempt | None) -> Attempt | None:
        """An attempt of an earlier execution's belongs to this one from now on."""
        if earlier is not None:
            earlier.owner, earlier.run_id = None, self._run_id
            self._shared.bodies.pop(call.key, None)
            call.is_at_work = True
            call.heartbeat = earlier.heartbeat
            if call.heartbeat is not None:
                call.heartbeat.moves_to(self._log, call.path, self._shows(call.path))
            if not earlier.is_over:
                self._at_work(call, earlier)
        return earlier

    def _ended(self, body: Attempt, attempt: int, began_at: float) -> Ended:
        values = body.value, body.error, body.was_interrupted, body.shown, body.seen, body.used
        return Ended(body.inputs, attempt, began_at, *values)

    async def _begun(
        self, call: StepCall, note: Callable[[Attempts], Awaitable[None]], attempt: int, began_at: float
    ) -> Attempt:
        """A new attempt at the body."""
        if self.is_over:  # a pause has outlasted the execution
            raise asyncio.CancelledError
        if self._policy.verifies_lease and not await self._log.is_ours():
            raise LeaseLost
        call.began, call.is_at_work = self._held.next_sequence(), True
        if call.request.at_most_once:  # on disk before the body: without an end, it was cut off
            await note(self._attempts(call, attempt - 1, "", began_at, 0.0, begun=True))
        context = call.context.copy() if call.context is not None else copy_context()
        before = call.heartbeat.latest if call.heartbeat is not None else None
        call.heartbeat = Heartbeat(self._shared.heartbeats, self._log, call.key, call.path, before, self._shows(call.path))
        says = functools.partial(self._sayings.say, call.path)
        context.run(current_body.set, Body(call.request.name, call.key, say=says, heartbeat=call.heartbeat))
        recording = self.host.recording(call.path, call.request, call.inputs.found)
        body = Attempt(self._run_id, call.inputs, self._shared.workers, context, recording)
        for share in call.shares:
            body.when_begun(share.begun)
        body.heartbeat = call.heartbeat
        self._at_work(call, body)
        return body

    def _shows(self, path: str) -> Callable[[Progress], object]:
        return lambda progress: self._facts.update(path, progress=progress)

    def _at_work(self, call: StepCall, body: Attempt) -> None:
        key = call.key
        self.bodies[key] = self._shared.bodies[key] = body

        def over() -> None:
            if body.heartbeat is not None:
                body.heartbeat.close(has_value=body.error is None)
            if self.bodies.get(key) is body:
                del self.bodies[key]
            is_left = body.owner is not None and self.is_over and self._run_id in self._shared.ownership.active
            if not is_left:  # else the execution that goes on with the run asks for it, or lets it be recorded at its end
                if self._shared.bodies.get(key) is body:
                    del self._shared.bodies[key]
                owner, body.owner = body.owner, None  # once: an execution that took it over is told as well
                if owner is not None:
                    owner(body)
            self._shared.ownership.let_go(self._run_id)

        body.when_over(over)

    def _keep(self, keep: Callable[[Ended], Coroutine[Any, Any, None]], ended: Ended) -> None:
        """Nobody waits for it any more; it was paid for."""
        if ended.error is None and self._shared.ownership.holds(self._held):
            self._shared.keep(keep(ended), self._run_id)

    def _give_up(
        self, call: StepCall, late: Attempt, keep: Callable[[Ended], Coroutine[Any, Any, None]], attempt: int, began_at: float
    ) -> None:
        """That was the last time-out, and its thread goes on."""
        late.is_overdue = True
        shares, call.shares = call.shares, []
        for share in shares:
            late.when_over(share.leave)
        if self._policy.keeps_late_results:
            late.owner = lambda body: self._keep(keep, self._ended(body, attempt, began_at))
        else:
            late.owner = lambda _: self._observers.notice(
                f"step {call.request.name!r} of {self._wording.label}: the thread that had timed out has ended; what it came "
                "to is dropped"
            )

    async def _pause(self, call: StepCall, later: Retry, wait: Callable[[float, str], None], late: Attempt | None) -> None:
        """A part of the wait for a retry; a thread that ends after its time-out ends it."""
        call.is_at_work = False
        self._facts.update(
            call.path,
            status=Status.RETRYING,
            attempts=later.failures.failed,
            started_at=later.failures.started_at,
            error=later.failures.error,
            wake_at=self._now_s() + later.seconds,
        )
        wait(later.seconds, f"waits to try step {call.request.name!r} again")
        waiting = asyncio.ensure_future(self._shared.clock.sleep(min(later.seconds, RECHECK_S)))
        try:
            if late is None or late.is_over:
                await waiting
            else:
                ended = asyncio.ensure_future(late.ends_within(None))
                await asyncio.wait({waiting, ended}, return_when=asyncio.FIRST_COMPLETED)
                ended.cancel()
        finally:
            waiting.cancel()

    def _of_this_boot(self, call: StepCall) -> Attempts | None:
        """Noted in another boot: from here on this boot's clock decides when the retry is due."""
        failures, now = call.failures, self._shared.clock.now()
        if failures is not None and failures.since.boot != now.boot:
            failures = replace(failures, since=now, delay_s=remaining_s(failures.since, failures.delay_s, now))
            call.failures = failures
        return failures

    def _delay(self, request: StepRequest, attempt: int, error: BaseException, began_at: float) -> float | None:
        """Seconds until the next attempt; None: that was the last."""
        try:
            spent_s = self._shared.clock.now().wall_s - began_at
            delay = retry_delay_s(request.policy, attempt, error, self._shared.jitter(), spent_s)
        except Exception as policy_error:  # of the user's own functions; the step's error is what they want to see
            error.add_note(f"durable_nb: its retry policy failed as well ({say(policy_error)}), so it was not tried again")
            delay = None
        if delay is None:
            attempts = note_failure(error, request.name, self._wording.label, attempt, self._wording.resume_hint)
            self._observers.notice(f"step {request.name!r} failed after {attempts}: {say(error)}")
        return delay

    async def _note_failure(
        self,
        call: StepCall,
        note: Callable[[Attempts], Awaitable[None]],
        attempt: int,
        error: BaseException,
        began_at: float,
        delay: float,
    ) -> None:
        request = call.request
        self._observers.notice(
            f"step {request.name!r} failed (attempt {attempt} of {request.policy.retries + 1}): {say(error)}; trying again in "
            f"{say_duration(delay)}"
        )
        await note(self._attempts(call, attempt, say(error), began_at, delay))

    def _attempts(
        self, call: StepCall, failed: int, error: str, began_at: float, delay_s: float, *, begun: bool = False
    ) -> Attempts:
        of, now = (call.request.kind, call.request.name, self._run_id), self._shared.clock.now()
        asked = call.branch, call.began, call.request.item
        call.failures = Attempts(*of, failed, error, began_at, now, delay_s, begun, *asked, arguments=call.arguments)
        return call.failures

    def _timed_out(self, request: StepRequest) -> StepTimeout:
        kept = f"; what it returns is recorded, {self._wording.resume_hint} then" if self._policy.keeps_late_results else ""
        goes_on = f"; its thread can't be stopped and goes on{kept}" if request.thread else ""
        return timed_out(request.name, self._wording.label, request.timeout_s or 0.0, goes_on)

    def _cut_off(self, request: StepRequest) -> StepInterrupted:
        return StepInterrupted(
            f"step {request.name!r} of {self._wording.label} was cut off in an earlier execution, and may have had its effect; "
            "as it is tried at most once, its body was not run again. Look at the far end, then "
            + self._wording.rerun_hint.replace("STEP", request.name)
        )

    def leave_children(self) -> None:
        """The code is over: nobody waits for the runs that it has invoked. They go on, and tell of themselves."""
        for body in list(self.bodies.values()):
            if isinstance(body.request, InvokeRequest):
                body.cancel()

    # -- what is recorded ------------------------------------------------------------------------------------------------

    async def outcome_of(self, call: StepCall, ended: Ended, after: dict[str, str]) -> Outcome:
        """The record of a step that has come to a value; UnserializableError where that can't be stored.

        after  the components of its inputs now
        """
        inputs, request = ended.inputs, call.request
        form, data = encoded(ended.value, f"step {request.name!r} of {self._wording.label} returned")
        data, blob = await self._log.kept(data)
        given = inputs.given(after)
        patches, patches_blob = b"", ""
        if (packed := packed_changes(inputs, given, ended.value)) is not None:
            (patches, patches_blob), given = await self._log.kept(packed), set()
        if given:
            names = ", ".join(sorted(map(described, given)))
            self._observers.advise(f"step {request.name!r} changes {names}: restoring the step won't")
        changes = tuple(sorted(map(described, given)))
        return self._outcome(
            call,
            ended,
            form,
            data,
            blob=blob,
            changes=changes,
            patches=patches,
            patches_blob=patches_blob,
            shown=ended.shown,
            seen=ended.seen,
            usage=_usage.of_step(ended.used, request.kind, ended.value),
            preview=Preview(call.arguments, _result(request, ended.value)),
        )

    def failure_of(self, call: StepCall, ended: Ended) -> tuple[Outcome, BaseException]:
        """The record of a step that has failed for good, and the error as a replay will give it."""
        error = ended.error or RuntimeError("it has not failed")
        form, data, shown = _codec.encode_error(error)
        goes_on_after, told = call.request.goes_on_after, Preview(call.arguments)
        is_attempt = goes_on_after is not None and goes_on_after(error)
        more = {"failed": True, "error": say(error), "is_attempt": is_attempt, "preview": told}
        return self._outcome(call, ended, form, data, **more), shown

    def _outcome(self, call: StepCall, ended: Ended, form: str, data: bytes, **more: Any) -> Outcome:
        of = call.request.kind, call.request.name, call.branch, self._run_id
        times = ended.attempt, ended.began_at, self._now_s()
        provenance, sequences = provenance_of(ended.inputs), (call.began, self._held.next_sequence())
        return Outcome(*of, form, data, *times, provenance, sequences=sequences, item=call.request.item, **more)

    def _now_s(self) -> float:
        return self._shared.clock.now().wall_s


def _result(request: StepRequest, value: Any) -> str:
    return preview(value, of=request.name) if request.described is None else preview_answer(value)


def encoded(value: Any, what: str) -> tuple[str, bytes]:
    """A value as bytes; UnserializableError, beginning with `what`, where it can't be stored."""
    try:
        return _codec.encode(value)
    except Exception as error:
        raise UnserializableError(
            f"{what} a {type(value).__qualname__} that can't be stored ({type(error).__name__}: {error}). Its body has run "
            "and nothing was recorded: return plain data (numbers, text, lists, dicts, arrays, frames), and make "
            "connections and the like outside, from that data"
        ) from error


def ended_step(of: Step, outcome: Outcome, *, restored: bool) -> Step:
    """A step that is on record, as views show it."""
    status = Status.RETRYING if outcome.is_attempt else Status.FAILED if outcome.failed else Status.COMPLETED
    times = outcome.attempts, outcome.started_at, outcome.ended_at
    told = outcome.preview, outcome.usage
    return Step(of.name, of.path, of.kind, status, *times, restored, outcome.error or None, None, *told, child=of.child)
