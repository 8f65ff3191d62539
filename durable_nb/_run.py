"""One execution of a run, a cell's or a workflow's: its steps performed or recalled, as `_replay` and `_retry` say.

User code runs on the kernel's loop (synchronous bodies in worker threads); only the disk lives on the writer's thread. A
step's body runs in a task of the engine's own, which also commits the outcome: when the code stops waiting for it, because
another step failed or the user interrupted a thread that can't be stopped, the work that was paid for is still recorded.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import time
import types
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from datetime import datetime
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from durable_nb import _codec, _patches, _usage
from durable_nb import _records as rec
from durable_nb._branches import Branch, branching, current_branch
from durable_nb._clock import RECHECK_S, remaining_s, say_duration
from durable_nb._current import Body, SleepRequest, StartRequest, StepRequest, current_body, current_run
from durable_nb._facts import Paths, Snapshot, Status, Step, standing
from durable_nb._fingerprint import Unhashable
from durable_nb._forks import children_end_here
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Attempts, Lease, Outcome, RunRecord, StepKey, Timer, unpack
from durable_nb._replay import CutOff, Perform, Recall, Retry, Wait, decide, decide_sleep
from durable_nb._request import Changed, Request, arguments_of, fingerprint_of, packed_changes, provenance_of, said
from durable_nb._retry import retry_delay_s
from durable_nb._usage import Usage
from durable_nb.errors import (
    CorruptStoreError,
    LeaseLost,
    NotInRunError,
    RunCancelled,
    RunSuspended,
    StepInterrupted,
    StepTimeout,
    StoreError,
    UnserializableError,
    UntrustedStoreError,
)

if TYPE_CHECKING:
    from durable_nb._engine import Engine
    from durable_nb._fingerprint import Fingerprint

BLOB_BYTES = 1 << 20
"""Values from this size on lie in files of their own."""

_UNWIND_S = 2.0
"""How long an interrupted cell waits for cancelled bodies to unwind."""


log = logging.getLogger("durable_nb")
"""Notices of programs without a notebook. Not configured, Python writes them to stderr."""


class Stage:
    """Where steps show things. This one is for programs without a notebook: nothing is recorded, notices go to the log."""

    def recording(
        self,
        path: str,  # noqa: ARG002
        request: StepRequest,  # noqa: ARG002
        found: Fingerprint | None,  # noqa: ARG002
    ) -> AbstractContextManager[Callable[[], tuple[bytes, bytes]]]:
        """While entered, note what the calling task displays and what it sees of the world; the callable gives both, encoded.
        `found`: what the step is identified by."""  # fmt: skip
        return nullcontext(lambda: (b"", b""))

    def show_again(self, shown: bytes, seen: bytes) -> None:
        """Display what was recorded, and note what was seen as seen."""

    def holds(self, seen: bytes) -> bool:  # noqa: ARG002
        """Is the world that a step saw still what it was?"""
        return True

    def notice(self, text: str) -> None:
        """Tell the user something about the run that is no output of theirs."""
        log.warning(text)

    def advise(self, text: str) -> None:
        """Tell the user something worth knowing, once."""
        log.warning(text)

    def changed(self) -> None:
        """The run's facts changed. Called often, must be cheap."""


@dataclass(slots=True)
class Held:
    """This process's right to write for a run: every commit is guarded by the exact bytes of the lease's row."""

    run_id: str
    epoch: int
    row: bytes
    _count: int = 0
    confirmed_s: float = float("-inf")
    """When a commit was handed over, by the monotonic clock, that was the last to be applied under this row."""

    def turn(self) -> rec.Turn:
        """Now, as the run's own events tell it: later than every turn before, in this process and in former owners."""
        self._count += 1
        return self.epoch, self._count

    @property
    def guard(self) -> tuple[str, bytes]:
        return rec.lease_key(self.run_id), self.row


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended: recorded, failed for good, or neither (look at the records again)."""

    outcome: Outcome | None = None
    value: Any = None
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class Work:
    """An attempt that is being made."""

    task: asyncio.Task[Ended]
    run_id: str
    asked: Request
    in_thread: bool
    """Nothing can stop it: it ends by itself, and is recorded then."""
    overdue: bool = False
    """Nobody waits for it any more."""
    followers: list[asyncio.Future[Ended]] = field(default_factory=list)

    def follow(self) -> asyncio.Future[Ended]:
        """How it ends. Cancelling the future stops nothing. Sooner heard than the task, which says it two turns later."""
        follower: asyncio.Future[Ended] = self.task.get_loop().create_future()
        self.followers.append(follower)
        if self.task.done():
            self.tell_of_task()
        return follower

    def tell(self, ended: Ended) -> None:
        for follower in self.followers:
            if not follower.done():
                follower.set_result(ended)

    def tell_of_task(self) -> None:
        """The task is over, however it went."""
        for follower in self.followers:
            if follower.done():
                continue
            if self.task.cancelled():
                follower.cancel()
            elif (error := self.task.exception()) is not None:
                follower.set_exception(error)
            else:
                follower.set_result(self.task.result())

    def cancel(self) -> None:
        if not self.in_thread:
            self.task.cancel()


class Run:
    """One execution of a run. Implements what verbs ask (`_current.Run`); how a step is identified is told by subclasses."""

    is_replayed = False
    what: str
    """How messages call the run: "cell 'a'"."""
    again: str
    """What a user does to go on with it."""
    shows_interrupts = False
    """A KeyboardInterrupt that its code raises may leave `execute`: no task of ours waits there, which it would break."""

    def __init__(self, engine: Engine, record: RunRecord, held: Held, *, resumed: bool) -> None:
        self.engine, self.record = engine, record
        self.resumed = resumed
        """It goes on with a run that an earlier execution left unfinished."""
        self.id, self.name = record.id, record.name
        self.stage = Stage()
        self.max_wait_s: float | None = None
        """A wait with more than this left suspends the run; None: any wait is waited for."""
        self.status = Status.RUNNING
        self.began_at = self._now_s()
        self.ended_at: float | None = None
        self._held = held
        self._outcomes: dict[str, bytes] = {}
        self._last_read: tuple[str, Outcome | None] = "", None
        self._attempts: dict[str, bytes] = {}
        self._timers: dict[str, bytes] = {}
        self._paths = Paths()
        self._facts: dict[str, Step] = {}
        self.used: Usage = {}
        """What models' answers cost that its steps were given, in this execution or an earlier one."""
        self.unrepeated: list[tuple[str, str]] = []
        """Restored steps, and the inputs that their bodies would have changed."""
        self.set_variables: list[tuple[ContextVar[Any], Any]] = []
        """Context variables that the code set: it ran in a context of its own."""
        self._branch = Branch()
        self._main: asyncio.Task[Any] | None = None
        self._works: set[Work] = set()
        """Attempts being made that this execution began or waits for."""
        self._stopped: BaseException | None = None
        self._ended = self._step_failed = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        assert self._main is not None  # noqa: S101  its code asks
        return self._main.get_loop()

    # -- facts ---------------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """How the run and its steps stand now."""
        steps = tuple(self._facts.values())
        status = standing(steps) if self.status is Status.RUNNING else self.status
        return Snapshot(self.id, self.name, status, self.began_at, self.ended_at, steps)

    def standing(self) -> Status:
        """How the run stands now."""
        return self.snapshot().status

    def stop_soon(self, why: BaseException) -> None:
        """The same as `stop`, from any thread."""
        if self._main is None:
            self._stopped = self._stopped or why
        else:
            self._main.get_loop().call_soon_threadsafe(self.stop, why)

    def _now_s(self) -> float:
        return self.engine.clock.now().wall_s

    def spent_before_s(self) -> float:
        """What the steps of this run took before this execution began: a restored one all, a sleep what had passed."""
        times = ((f.started_at, min(f.ended_at or self.began_at, self.began_at)) for f in self._facts.values())
        return sum(max(until - since, 0.0) for since, until in times if since is not None)

    def _tell(self, fact: Step) -> None:
        self._facts[fact.path] = fact
        self.stage.changed()

    async def load(self) -> None:
        """Read what was recorded. Called once, before `execute`."""
        prefixes = (
            rec.step_prefix(self.record.scope, self.record.generation),
            rec.attempts_prefix(self.record.scope, self.record.generation),
            rec.timer_prefix(self.id),
            rec.loose_prefix(self.record.scope, self.record.generation),
            rec.again_prefix(self.record.scope, self.record.generation),
        )
        journal = self.engine.store.journal
        self.engine.active[self.id] = self  # before the scan: a body that ends meanwhile tells us itself
        outcomes, attempts, timers, loose, again = await self.engine.store.writer.call(
            lambda: [dict(journal.scan(p)) for p in prefixes]
        )
        self._outcomes = outcomes | self._outcomes
        self._attempts = attempts | self._attempts
        self._timers = timers
        self._loaded(loose, again)

    # -- what cells and workflows do differently -----------------------------------------------------------------------

    def _loaded(self, loose: dict[str, bytes], again: dict[str, bytes]) -> None:
        """The records are here: `loose` of what steps change themselves, `again` of what is to be executed anew."""
        raise NotImplementedError

    def _place(self, request: StepRequest, branch: str) -> tuple[StepKey, Fingerprint | None]:
        """Which record a step has, fixed now."""
        raise NotImplementedError

    def _work_on(self, asked: Request) -> Work | None:
        """An attempt at this step that is being made now, by this execution or by one that was interrupted."""
        return self.engine.works.get(asked.key.outcome)

    def _is_changed_already(self, asked: Request) -> bool:  # noqa: ARG002
        """Is what the step was given still as its recorded execution has left it?"""
        return False

    def _settle(
        self,
        asked: Request,
        after: dict[str, str],  # noqa: ARG002
    ) -> tuple[StepKey, tuple[tuple[str, bytes], ...], set[str]]:
        """The body has run, and its inputs are these now: the key that its outcome is recorded under, rows to be written with
        it, globals it has changed."""  # fmt: skip
        return asked.key, (), set()

    def _timer_key(self, request: SleepRequest, branch: str) -> str:
        """Which record a sleep has, fixed now."""
        raise NotImplementedError

    def _child_key(self, workflow: str, branch: str, arguments: Callable[[], str]) -> str:
        """Which of the runs started in this one it is that is started now, as an identity."""
        raise NotImplementedError

    def _timer(self, recorded: Timer | None, asked: Timer) -> Timer:
        """The timer that counts, of the recorded one and the one that the code asks for now."""
        raise NotImplementedError

    async def _give_up(self, asked: Request, attempt: int, began: float, error: BaseException) -> Ended:
        """The last attempt at a step has failed: write down what is to be known of it."""
        raise NotImplementedError

    # -- executing the code --------------------------------------------------------------------------------------------

    async def execute(self, body: Coroutine[Any, Any, Any]) -> Any:
        """Run the cell's code as this run; what it returns or raises.

        Started bodies end and are recorded before this returns. RunSuspended, LeaseLost and KeyboardInterrupt come from
        here, never from inside the code: there it is CancelledError, which no `except Exception` swallows.
        """
        loop = asyncio.get_running_loop()
        before, context = copy_context(), copy_context()
        with branching(loop):
            context.run(current_run.set, self)
            context.run(current_branch.set, self._branch)
            self._main = main = loop.create_task(_caught(body), context=context)
            if self._stopped is not None:
                main.cancel()
            try:
                await asyncio.wait({main})
            except asyncio.CancelledError as cancelled:
                self.stop(cancelled)
                await asyncio.wait({main}, timeout=_UNWIND_S)
            self._ended = True  # no step starts from here on
            await self._drain()
        own = (current_run, current_branch)
        self.set_variables = [
            (v, value) for v, value in context.items() if v not in own and (v not in before or before[v] is not value)
        ]
        if self._stopped is not None:
            raise self._stopped
        value, error = main.result()
        if isinstance(error, KeyboardInterrupt) and not self.shows_interrupts:
            raise asyncio.CancelledError from error
        if error is not None:  # a KeyboardInterrupt is the code's own: the user's has come as `stop`, too
            raise error
        return value

    def interrupt(self) -> None:
        """Stop at the next await, keeping what is recorded. Safe in a signal handler."""
        self.stop_soon(KeyboardInterrupt(f"{self.what} was interrupted"))

    def stop(self, why: BaseException) -> None:
        """Cancel the cell's code; `execute` raises `why`. Bodies are cancelled too, but for a suspension."""
        self._stopped = self._stopped or why
        if self._main is not None:
            self._main.cancel()
        if not isinstance(why, RunSuspended):
            for work in set(self._works):
                work.cancel()

    def die(self) -> None:
        """End as a kill would."""
        self.stop(asyncio.CancelledError())

    def may_be_left(self, task: asyncio.Task[Any] | None, frame: types.FrameType | None) -> bool:
        """Is the user's code executing there, in a task of this run's own? It may be left by a KeyboardInterrupt; out of the
        engine's code one would leave the task, and end the kernel process."""  # fmt: skip
        if task is None or not (task is self._main or any(task is work.task for work in self._works)):
            return False
        innermost = frame
        while frame is not None:
            if frame.f_code in (Run._call_body.__code__, _caught.__code__):
                return frame is not innermost
            if frame.f_code is Run._step.__code__:
                return False
            frame = frame.f_back
        return False

    def abandon(self) -> None:
        """Its execution never began: whoever asks next may have the run."""
        self.engine.active.pop(self.id, None)

    def left_running(self) -> list[str]:
        """The steps whose threads go on, though the execution has ended."""
        alive = [work for work in self.engine.works.values() if work.run_id == self.id and not work.task.done()]
        return [work.asked.fact.name for work in alive]

    def _is_worked_on(self) -> bool:
        """Does a body of this run still live, of this execution or of an earlier one?"""
        return any(work.run_id == self.id and not work.task.done() for work in self.engine.works.values())

    def _busy(self) -> set[asyncio.Task[Ended]]:
        return {work.task for work in self._works if not (work.task.done() or work.overdue)}

    async def _drain(self) -> None:
        """Let bodies that have begun end. Stopped ones get a moment to unwind; threads go on alone."""
        while (busy := self._busy()) and (self._stopped is None or isinstance(self._stopped, RunSuspended)):
            await asyncio.wait(busy, timeout=0.5)
        unwinding = {work.task for work in self._works if not work.task.done() and not work.in_thread}
        if unwinding:
            await asyncio.wait(unwinding, timeout=_UNWIND_S)

    async def finish(self, status: Status, error: str = "") -> None:
        """Write down how the run ended. A completed one is closed; any other stays, to be gone on with."""
        self.status, self.ended_at = status, self._now_s()
        self.engine.active.pop(self.id, None)
        self.engine.savings.write()
        for path, fact in self._facts.items():
            if fact.status not in _FINAL:
                self._facts[path] = replace(fact, status=Status.INTERRUPTED)
        self.stage.changed()
        if isinstance(self._stopped, LeaseLost):
            return
        is_over = status in (*_FINAL, Status.CANCELLED)
        self.engine.changing.add(self.id)
        try:
            record = replace(
                self.record,
                status=status.value if is_over else Status.RUNNING.value,
                ended_at=self.ended_at if is_over else None,
                error=rec.plain(error),
            )
            puts = [self.engine.pack(rec.run_key(self.id), record)]
            deletes = [rec.cancel_key(self.id)] if is_over else []
            if status in (Status.COMPLETED, Status.CANCELLED):
                deletes.append(rec.open_prefix(self.record.scope) + self.id)
            running = self._is_worked_on()
            if status is Status.COMPLETED:
                self.engine.changed.pop(self.record.scope, None)
            if status is Status.COMPLETED and not running:
                deletes.append(rec.lease_key(self.id))
            elif not running:
                puts.append(self.engine.pack(rec.lease_key(self.id), Lease(self._held.epoch, "")))
            commit = Commit(self._held.guard, puts=tuple(puts), deletes=tuple(deletes))
            verdict = await self.engine.store.writer.commit(commit)
            if not running:
                self.engine.held.pop(self.id, None)
        finally:
            self.engine.changing.discard(self.id)
        if verdict is not Verdict.APPLIED:
            raise self._lost()

    def ends_as(self, error: BaseException) -> Status:
        """The status that an error leaves the run in."""
        return Status.CANCELLED if error is self._stopped and isinstance(error, RunCancelled) else Status.FAILED

    def _lost(self) -> LeaseLost:
        return LeaseLost(
            f"{self.what} was taken over by another process; what was acknowledged before is safe, this commit was refused. "
            f"{self.again[0].upper()}{self.again[1:]} to attach to it"
        )

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self, request: StepRequest) -> Coroutine[Any, Any, Any]:
        __tracebackhide__ = True
        self._check_open(request.name)
        branch = branch_name()
        key, found = self._place(request, branch)
        asked = Request(key, request, found, branch, request.path or self._paths.take(branch, request.name))
        self._tell(asked.fact)
        return self._step(asked)

    def expect(self, name: str, count: int) -> list[str]:
        branch = branch_name()
        paths = [self._paths.take(branch, name, item) for item in range(count)]
        self._facts.update((path, Step(name, path, "run", Status.PENDING)) for path in paths)
        self.stage.changed()
        return paths

    def call_off(self, paths: list[str]) -> None:
        for path in paths:
            if self._facts[path].status is Status.PENDING:
                del self._facts[path]
        self.stage.changed()

    async def _step(self, asked: Request) -> Any:
        engine = self.engine
        performed = False
        if asked.objects and not asked.request.awaited_at_once:
            asked = self._renewed(asked)
        while True:
            work = self._work_on(asked)
            patience_s = self._patience_s(asked) if work is not None else None
            if work is None:
                recorded = self._outcome(asked)
                failures = self._failures(asked) if recorded is None else None
                match decide(recorded, failures, engine.clock.now()):
                    case Recall(outcome):
                        value = await self._recall(asked, outcome, show=not performed)
                        self._tell(_ended_fact(asked, outcome, restored=not performed))
                        if outcome.failed:
                            raise value
                        return value
                    case CutOff():
                        raise self._cut_off(asked)
                    case Retry() as later:
                        await self._pause(asked, later)
                        continue
                    case Perform(attempt):
                        if not await self._is_admitted(asked):
                            continue
                        work = self._begin(asked, attempt, failures)
            performed = True
            ended = await self._follow(work, patience_s)
            if ended.error is not None:
                self._step_failed = True
                fact = self._facts[asked.fact.path]
                self._tell(replace(fact, status=Status.FAILED, error=say(ended.error), ended_at=self._now_s()))
                raise ended.error
            if ended.outcome is not None:
                self._tell(_ended_fact(asked, ended.outcome, restored=False))
                if work.asked is not asked:  # an earlier execution's cell got what it displayed, and noted what it read
                    self.stage.show_again(ended.outcome.shown, ended.outcome.seen)
                if work.asked is not asked and _has_patches(ended.outcome):  # it was given objects of an earlier execution
                    return await self._patch(asked, ended.outcome, ended.value)
                return ended.value

    async def _is_admitted(self, asked: Request) -> bool:
        """Wait until the request's limit lets its next attempt begin. False: another has been made meanwhile."""
        limit = asked.request.limit
        if limit is None:
            return True
        await limit.enter(self.engine.clock)
        if self._stopped is None and not self._ended and self._work_on(asked) is None and self._outcome(asked) is None:
            return True
        limit.leave()
        self._check_open(asked.request.name)
        return False

    def _begin(self, asked: Request, attempt: int, failures: Attempts | None) -> Work:
        """Start an attempt in a task of its own, which records how it ends."""
        self._check_open(asked.request.name)
        asked.began = self._held.turn()
        began = failures.started_at if failures else self._now_s()
        self._tell(replace(asked.fact, status=Status.RUNNING, attempts=attempt, started_at=began))
        idempotency_key = digest_of(self.engine.store.id, asked.key.outcome)
        context = copy_context()
        context.run(current_body.set, Body(asked.request.name, idempotency_key))
        attempting = self._attempt(asked, attempt, began)
        work = Work(asyncio.get_running_loop().create_task(attempting, context=context), self.id, asked, asked.request.thread)
        for other in self._works if asked.objects else ():
            if not other.task.done() and asked.shares_objects_with(other.asked):
                asked.shared = other.asked.shared = True
        self.engine.works[asked.key.outcome] = work
        self._works.add(work)
        work.task.add_done_callback(lambda _: self._work_ended(asked.key.outcome, work))
        return work

    def _patience_s(self, asked: Request) -> float | None:  # noqa: ARG002
        """How long to wait for a thread that an earlier execution began."""
        return None

    def _is_late(self, work: Work, late: StepTimeout) -> None:
        """A thread takes longer than its step's timeout. It can't be stopped, and no other attempt may begin while it lives."""

    async def _follow(self, work: Work, patience_s: float | None) -> Ended:
        """Wait for an attempt. Cancelled by the cell's own code, it is stopped; but after a step has failed, work that its
        siblings have begun is finished, since it is paid for."""  # fmt: skip
        if not work.task.done():
            self._works.add(work)  # it may have been begun by an earlier execution of the cell
        try:
            follower = work.follow()
            if patience_s is not None and work.in_thread:
                await asyncio.wait({follower}, timeout=patience_s)
                if not follower.done():
                    work.overdue = True
                    return Ended(error=self._late(work.asked, patience_s))
            return await follower
        except asyncio.CancelledError:
            if not self._step_failed and self._stopped is None:
                work.cancel()
            raise

    def _work_ended(self, key: str, work: Work) -> None:
        if self.engine.works.get(key) is work:
            del self.engine.works[key]
        self._works.discard(work)
        if work.asked.request.limit is not None:
            work.asked.request.limit.leave()
        work.tell_of_task()
        if not work.task.cancelled():
            work.task.exception()  # seen: who waits for the step gets it; where nobody does, the next execution tries again
        self.engine.let_go(self.id)

    async def _attempt(self, asked: Request, attempt: int, began: float) -> Ended:
        """Run the body once, record how it ended, and say so."""
        ended = await self._made(asked, attempt, began)
        self.engine.works.pop(asked.key.outcome).tell(ended)
        return ended

    async def _made(self, asked: Request, attempt: int, began: float) -> Ended:
        with self.stage.recording(asked.fact.path, asked.request, asked.found) as noted:
            try:
                if asked.request.at_most_once:
                    await self._note_beginning(asked, attempt, began)
                value, error = await self._perform(asked), None
            except asyncio.CancelledError:
                raise
            except KeyboardInterrupt as interrupt:  # out of a task it would end the kernel
                raise asyncio.CancelledError from interrupt
            except BaseException as raised:  # SystemExit as well
                value, error = None, raised
        if error is not None:
            return await self._failed(asked, attempt, began, error)
        try:
            outcome = await self._encode(asked, attempt, began, value, *noted())
        except UnserializableError as unserializable:
            return await self._give_up(asked, attempt, began, unserializable)
        return await self._record(asked, outcome, value)

    async def _perform(self, asked: Request) -> Any:
        limit = asked.request.timeout_s
        if limit is None:
            return await self._call_body(asked)
        body = asyncio.get_running_loop().create_task(self._call_body(asked), context=copy_context())
        try:
            await asyncio.wait({body}, timeout=limit)
        except asyncio.CancelledError:
            body.cancel()
            await asyncio.wait({body})
            if not body.cancelled():  # it went on to its end all the same: that is paid for
                return body.result()
            raise
        if body.done():
            return body.result()
        work = self.engine.works[asked.key.outcome]
        late = self._late(asked, limit)
        if not work.in_thread:
            body.cancel()
            await asyncio.wait({body})
            if not body.cancelled() and body.exception() is None:  # as with asyncio.timeout
                return body.result()
            raise late
        self._tell(replace(self._facts[asked.fact.path], error=say(late)))
        self._is_late(work, late)
        await asyncio.wait({body})
        return body.result()

    def _late(self, asked: Request, limit_s: float) -> StepTimeout:
        took = f"step {asked.request.name!r} of {self.what} took longer than its timeout of {say_duration(limit_s)}"
        thread = "; its thread can't be stopped and goes on: what it returns is recorded, run the cell again then"
        return StepTimeout(took + (thread if asked.request.thread else ""))

    async def _call_body(self, asked: Request) -> Any:
        if asked.request.thread:
            value = await self.engine.workers.submit(asked.request.body, copy_context(), most=asked.request.threads)
            self.engine.works[asked.key.outcome].in_thread = False
        else:
            with children_end_here():
                value = asked.request.body()
        with children_end_here():
            return await value if isawaitable(value) else value

    async def _note_beginning(self, asked: Request, attempt: int, began: float) -> None:
        """Written before the body of a step that is tried at most once: without an end, it was cut off."""
        now = self.engine.clock.now()
        of = asked.request.kind, asked.request.name, self.id
        record = Attempts(*of, attempt - 1, "", began, now, 0.0, begun=True, branch=asked.branch, turn=asked.began)
        await self._commit(Commit(self._held.guard, puts=(self.engine.pack(asked.key.attempts, record),)))
        self._learn_attempts(asked.key, self.engine.pack(asked.key.attempts, record)[1])

    def _cut_off(self, asked: Request) -> StepInterrupted:
        return StepInterrupted(
            f"step {asked.request.name!r} of {self.what} was cut off in an earlier execution, and may have had its effect; "
            "as it is tried at most once, its body was not run again. Look at the far end, then "
            + self._try_again(asked.request.name)
        )

    def _try_again(self, step: str) -> str:
        """What a user types to have a step that was cut off executed again."""
        raise NotImplementedError

    async def _encode(self, asked: Request, attempt: int, began: float, value: Any, shown: bytes, seen: bytes) -> Outcome:
        form, data = encoded(value, f"step {asked.request.name!r} of {self.what} returned")
        data, blob = await self._kept(data)
        body = current_body.get()
        usage = _usage.of_step(body.usage if body is not None else {}, asked.request.kind, value)
        _usage.add(self.used, usage)
        return self._outcome_of(asked, attempt, began, form, data, blob=blob, shown=shown, seen=seen, usage=usage)

    async def _kept(self, data: bytes) -> tuple[bytes, str]:
        """What goes into a row: the bytes themselves or, large, the name of the file that holds them now."""
        if len(data) < BLOB_BYTES:
            return data, ""
        journal = self.engine.store.journal
        return b"", await self.engine.store.writer.call(lambda: journal.put_blob(data))

    def _outcome_of(self, asked: Request, attempt: int, began: float, form: str, data: bytes, **more: Any) -> Outcome:
        kind, name = asked.request.kind, asked.request.name
        times = attempt, began, self._now_s()
        turns = asked.began, self._held.turn()
        provenance = provenance_of(asked.found)
        return Outcome(kind, name, asked.branch, self.id, form, data, *times, provenance, turns=turns, **more)

    async def _record(self, asked: Request, outcome: Outcome, value: Any) -> Ended:
        after = self._inputs_now(asked)
        key, more, lost = self._settle(asked, after)
        given = asked.given(after)
        patches, blob = b"", ""
        changed = Changed(asked, key, given, after) if given else None
        if (packed := packed_changes(asked, given, value)) is not None:
            (patches, blob), given = await self._kept(packed), set()
        if given:
            names = ", ".join(sorted(map(said, given)))
            self.stage.advise(f"step {asked.request.name!r} changes {names}: restoring the step won't")
        changes = tuple(sorted(map(said, lost | given)))
        outcome = replace(outcome, changes=changes, patches=patches, patches_blob=blob)
        row = self.engine.pack(key.outcome, outcome)
        stale = (asked.key.attempts,) if asked.key.attempts in self._attempts else ()
        commit = Commit(self._held.guard, inserts=(row,), puts=more, deletes=stale)
        began_s = time.monotonic()
        verdict = await self.engine.store.writer.commit(commit)
        if verdict is Verdict.GUARD_FAILED:
            raise self._give_way()
        self._held.confirmed_s = began_s
        if verdict is Verdict.EXISTS:  # a run of the same cell with other inputs was faster: its outcome stands
            theirs = await self.engine.store.writer.call(lambda: self.engine.store.journal.get(key.outcome))
            if theirs is None:
                raise CorruptStoreError(f"the record {key.outcome!r} disappeared while it was read")
            self._learn(key, theirs)
            return Ended()
        self._learn_attempts(asked.key, None)
        self._learn(key, row[1])
        if changed is not None:
            self._note(changed)
        return Ended(outcome, value)

    def _note(self, step: Changed) -> None:
        """A step has changed live objects, and may be asked for again with them."""

    def _renewed(self, asked: Request) -> Request:
        """The request as its body would begin with it now: its arguments may have changed since it was called."""
        return asked

    def _inputs_now(self, asked: Request) -> dict[str, str]:
        """The components of a step's inputs after its body has run."""
        if asked.request.kind != "run" or asked.found is None or asked.found.lasting:
            return asked.components
        try:
            return fingerprint_of(asked.request).components
        except Exception:  # an input can't be read any more: the outcome is recorded as it was asked for
            return asked.components

    async def _failed(self, asked: Request, attempt: int, began: float, error: BaseException) -> Ended:
        """Note a failed attempt and when the next is due, or give up."""
        request = asked.request
        if request.limit is not None:
            request.limit.heed(error)
        try:
            delay = retry_delay_s(request.policy, attempt, error, self.engine.jitter())
        except Exception as policy_error:  # of the user's own functions; the step's error is what they want to see
            error.add_note(f"durable_nb: its retry policy failed as well ({say(policy_error)}), so it was not tried again")
            delay = None
        if delay is None:
            attempts = f"{attempt} attempt{'s' if attempt > 1 else ''}"
            error.add_note(
                f"durable_nb: step {request.name!r} of {self.what} failed after {attempts}. Completed steps are kept: "
                f"{self.again} to go on from here"
            )
            self.stage.notice(f"step {request.name!r} failed after {attempts}: {say(error)}")
            return await self._give_up(asked, attempt, began, error)
        now = self.engine.clock.now()
        of = request.kind, request.name, self.id
        record = Attempts(*of, attempt, say(error), began, now, delay, branch=asked.branch, turn=asked.began)
        row = self.engine.pack(asked.key.attempts, record)
        self.stage.notice(
            f"step {request.name!r} failed (attempt {attempt} of {request.policy.retries + 1}): {say(error)}; "
            f"trying again in {say_duration(delay)}"
        )
        await self._commit(Commit(self._held.guard, puts=(row,)))
        self._learn_attempts(asked.key, row[1])
        return Ended()

    async def _commit(self, commit: Commit) -> None:
        if await self.engine.store.writer.commit(commit) is not Verdict.APPLIED:
            raise self._give_way()

    def _listening(self) -> set[Run]:
        """This execution, and the one that is active now."""
        return {run for run in (self, self.engine.active.get(self.id)) if isinstance(run, Run)}

    def _learn_attempts(self, key: StepKey, row: bytes | None) -> None:
        for run in self._listening():
            if row is None:
                run._attempts.pop(key.attempts, None)
            else:
                run._attempts[key.attempts] = row

    def _learn(self, key: StepKey, row: bytes) -> None:
        """A body that outlived its execution tells the one that is active now."""
        for run in self._listening():
            run._outcomes[key.outcome] = row
        self._learn_attempts(key, None)

    def hear(self, lease: bytes | None, cancel: rec.Cancel | None) -> None:
        """What other processes have written about this run."""
        if self.engine.held.get(self.id) is not self._held or self.id in self.engine.changing:
            return
        if lease != self._held.row:
            self._give_way()
        elif cancel is not None and self._stopped is None:  # once: its code may be tidying up by now
            self.stop(cancelled(self.id, cancel.reason))

    def _give_way(self) -> asyncio.CancelledError:
        """Another process owns the run: unwind, so that `execute` raises LeaseLost."""
        self.engine.held.pop(self.id, None)
        self.stop(self._lost())
        return asyncio.CancelledError()

    # -- sleeping ------------------------------------------------------------------------------------------------------

    def sleep(self, request: SleepRequest) -> Coroutine[Any, Any, None]:
        __tracebackhide__ = True
        self._check_open(request.name)
        branch = branch_name()
        key = self._timer_key(request, branch)
        fact = Step(request.name, self._paths.take(branch, request.name), "sleep", Status.PENDING)
        self._tell(fact)
        return self._sleep(request, key, fact, branch)

    async def _sleep(self, request: SleepRequest, key: str, fact: Step, branch: str) -> None:
        engine = self.engine
        row, began = self._timers.get(key), engine.clock.now()
        recorded = unpack(engine.store.seal, key, row, Timer) if row else None
        since = recorded.since if recorded else began
        turn = recorded.turn if recorded else self._held.turn()
        until_s, duration_s = None, 0.0
        if isinstance(request.wake, datetime):
            until_s = request.wake.timestamp()
        else:
            duration_s = request.wake.total_seconds()
        wanted = Timer(request.name, since, duration_s, until_s, branch, turn)
        timer = self._timer(recorded, wanted)
        if timer != recorded:
            await self._commit(Commit(self._held.guard, puts=(engine.pack(key, timer),)))
        if timer.until_s is None and timer.since.boot != began.boot:
            # From here on this boot's clock decides: a wall clock that was set back must not make the wait longer again.
            timer = replace(timer, since=began, duration_s=remaining_s(timer.since, timer.duration_s, began))
            await self._commit(Commit(self._held.guard, puts=(engine.pack(key, timer),)))
        waited = False
        while isinstance(left := decide_sleep(timer, engine.clock.now()), Wait):
            waited = True
            wake_at = engine.clock.now().wall_s + left.seconds
            self._tell(replace(fact, status=Status.SLEEPING, started_at=since.wall_s, wake_at=wake_at))
            self._suspend_if_longer(left.seconds, f"sleeps {fact.name!r}")
            await engine.clock.sleep(min(left.seconds, RECHECK_S))
        now, restored = engine.clock.now().wall_s, recorded is not None and not waited
        self._tell(replace(fact, status=Status.COMPLETED, started_at=since.wall_s, ended_at=now, restored=restored))

    def start(self, request: StartRequest) -> str:
        """Begin a child; without an id of its own it has the same one in every execution."""
        self._check_open(request.workflow)
        branch, now = branch_name(), self._now_s()
        if request.run_id is None:
            key = self._child_key(request.workflow, branch, functools.partial(arguments_of, request))
            parts = self.engine.store.id, self.record.scope, str(self.record.generation), key
            request.run_id, request.on_conflict = digest_of("start", *parts), "keep"
        self._tell(Step(request.workflow, self._paths.take(branch, request.workflow), "start", Status.COMPLETED, 1, now, now))
        self.engine.workflows.start_requested(request, self.id)
        return request.run_id

    def result_of(self, run_id: str) -> Coroutine[Any, Any, Any]:
        return self.engine.workflows.outcome(run_id)  # type: ignore[no-any-return]

    def stands_for(self, error: BaseException, value: Any) -> None:
        """Of no matter here: a step that failed isn't kept."""

    @property
    def runs(self) -> Any:
        """The engine of the workflows of this store."""
        return self.engine.workflows

    async def _pause(self, asked: Request, retry: Retry) -> None:
        """A part of the wait for a retry."""
        failures = retry.failures
        self._tell(
            replace(
                asked.fact,
                status=Status.RETRYING,
                attempts=failures.failed,
                started_at=failures.started_at,
                error=failures.error,
                wake_at=self.engine.clock.now().wall_s + retry.seconds,
            )
        )
        self._suspend_if_longer(retry.seconds, f"waits to try step {asked.fact.name!r} again")
        await self.engine.clock.sleep(min(retry.seconds, RECHECK_S))

    def _suspend_if_longer(self, seconds: float, doing: str) -> None:
        if self.max_wait_s is None or seconds <= self.max_wait_s:
            return
        until = datetime.fromtimestamp(self._now_s() + seconds).astimezone()
        self.stop(
            RunSuspended(
                f"{self.what} {doing} until {until:%a %d %b %H:%M:%S}, longer than it may wait here "
                f"({say_duration(self.max_wait_s)}); everything so far is kept: run this cell again then, or with a "
                "longer --max-wait"
            )
        )
        raise asyncio.CancelledError

    # -- records -------------------------------------------------------------------------------------------------------

    def _check_open(self, name: str) -> None:
        if self._stopped is not None:
            raise asyncio.CancelledError
        if self._ended:
            raise NotInRunError(
                f"step {name!r} was asked for by a task that outlived {self.what}; nothing was run. Await the task in it "
                "(await asyncio.gather(...)), then its steps are recorded"
            )

    def _key(self, identity: str, n: int) -> StepKey:
        return StepKey(self.record.scope, self.record.generation, identity, n)

    def _recorded(self, key: str) -> Outcome | None:
        """The outcome in that row. It is asked for several times in succession."""
        if key == self._last_read[0]:
            return self._last_read[1]
        row = self._outcomes.get(key)
        if row is None:
            return None
        outcome = unpack(self.engine.store.seal, key, row, Outcome)
        self._last_read = key, outcome
        return outcome

    def _outcome(self, asked: Request) -> Outcome | None:
        try:
            return self._recorded(asked.key.outcome)
        except StoreError as error:
            raise self._unreadable(asked, error) from error

    def _failures(self, asked: Request) -> Attempts | None:
        key, row = asked.key.attempts, self._attempts.get(asked.key.attempts)
        if row is None:
            return None
        failures, now = unpack(self.engine.store.seal, key, row, Attempts), self.engine.clock.now()
        if failures.since.boot == now.boot:
            return failures
        # As with sleeps: from here on this boot's clock decides.
        failures = replace(failures, since=now, delay_s=remaining_s(failures.since, failures.delay_s, now))
        self._attempts[key] = self.engine.pack(key, failures)[1]
        return failures

    async def _recall(self, asked: Request, outcome: Outcome, *, show: bool) -> Any:
        """The recorded value; what the body displayed is shown again."""
        journal = self.engine.store.journal
        try:
            data = (
                await self.engine.store.writer.call(lambda: journal.get_blob(outcome.blob)) if outcome.blob else outcome.value
            )
        except StoreError as error:
            raise self._unreadable(asked, error) from error
        if show and (outcome.shown or outcome.seen):
            self.stage.show_again(outcome.shown, outcome.seen)
        if show and outcome.usage:
            _usage.add(self.used, outcome.usage)
            self.engine.savings.add(self.id, outcome.usage)
        if self._is_changed_already(asked):
            self.unrepeated.append((asked.request.name, "what it was given was changed by it already"))
        elif show and outcome.changes:
            self.unrepeated.append((asked.request.name, f"{', '.join(outcome.changes)} not, which it changes"))
        value = _codec.decode(outcome.form, data)
        if show and _has_patches(outcome) and not self._is_changed_already(asked):
            return await self._patch(asked, outcome, value)
        return value

    async def _patch(self, asked: Request, outcome: Outcome, value: Any) -> Any:
        """Change the arguments as the body did; what it returned, which may be one of them."""
        journal, packed = self.engine.store.journal, outcome.patches
        try:
            if outcome.patches_blob:
                packed = await self.engine.store.writer.call(lambda: journal.get_blob(outcome.patches_blob))
        except StoreError as error:
            raise self._unreadable(asked, error) from error
        try:
            places = asked.objects or fingerprint_of(asked.request).places()
            result = _patches.apply(packed, places, value)
        except (KeyError, Unhashable):  # in a workflow, whose steps may be given something else than was recorded
            self.unrepeated.append((asked.request.name, "what it was given is not as when it ran: it can't be changed again"))
            self.stage.notice(
                f"step {asked.request.name!r} of {self.what} changed its arguments when it ran; restored, it can't: they are "
                "others now"
            )
            return value
        after = self._inputs_now(asked)
        if given := asked.given(after):
            self._note(Changed(asked, asked.key, given, after))
        return result

    def _unreadable(self, asked: Request, error: StoreError) -> StoreError:
        kind = UntrustedStoreError if isinstance(error, UntrustedStoreError) else CorruptStoreError
        return kind(
            f"step {asked.request.name!r} of {self.what} is recorded, but the record can't be used: {error}. Its "
            "body was not run again, since it may have been paid for; to do so, run the cell once with --rerun"
        )


def _has_patches(outcome: Outcome) -> bool:
    return bool(outcome.patches or outcome.patches_blob)


_FINAL = (Status.COMPLETED, Status.FAILED)


async def _caught(body: Coroutine[Any, Any, Any]) -> tuple[Any, BaseException | None]:
    """What `body` returns, and what it raises. A KeyboardInterrupt or SystemExit that leaves a task's step would end the
    kernel process (asyncio raises it from the loop)."""  # fmt: skip
    try:
        return await body, None
    except asyncio.CancelledError:
        raise
    except BaseException as raised:
        return None, raised


def encoded(value: Any, what: str) -> tuple[str, bytes]:
    """A value as bytes; UnserializableError, beginning with `what`, where it can't be stored."""
    try:
        form, data = _codec.encode(value)
    except Exception as error:
        raise UnserializableError(
            f"{what} a {type(value).__qualname__} that can't be stored ({type(error).__name__}: {error}). Its body has run "
            "and nothing was recorded: return plain data (numbers, text, lists, dicts, arrays, frames), and make "
            "connections and the like outside, from that data"
        ) from error
    return form, data


def digest_of(*parts: str) -> str:
    """32 hex characters that no other sequence of texts gives."""
    texts = [part.encode("utf-8", "surrogatepass") for part in parts]  # each with its length: one may hold any character
    return hashlib.blake2b(b"".join([b"%d:%b" % (len(text), text) for text in texts]), digest_size=16).hexdigest()


def cancelled(run_id: str, reason: str) -> RunCancelled:
    """What whoever waits for a cancelled run gets."""
    return RunCancelled(f"the run {run_id!r} was cancelled" + (f": {reason}" if reason else ""))


def branch_name() -> str:
    """The task of the run that asks."""
    branch = current_branch.get()
    return branch.name if branch else ""


def say(error: BaseException) -> str:
    """`TypeName: message`."""
    text = _codec.text_of(error)
    return rec.plain(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _ended_fact(asked: Request, outcome: Outcome, *, restored: bool) -> Step:
    status = Status.FAILED if outcome.failed else Status.COMPLETED
    times = outcome.attempts, outcome.started_at, outcome.ended_at
    return Step(asked.fact.name, asked.fact.path, asked.fact.kind, status, *times, restored, outcome.error or None)
