"""A second engine behind the seam, in memory: it knows `durable_nb._current`, and nothing of the embedded engine.

It keeps nothing, and executes every body elsewhere: from the bytes that a worker in another place would get.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections import Counter
from contextvars import copy_context
from dataclasses import replace
from datetime import datetime
from functools import partial
from inspect import isawaitable

from durable_nb._current import (
    Body,
    InvokeRequest,
    Reported,
    WorkflowOptions,
    current_body,
    current_run,
    workflow_functions,
    workflow_options,
)
from durable_nb._events import Delivery, Waiter, came
from durable_nb._facts import Snapshot, Status, Step
from durable_nb._portable import execute, portable, settled
from durable_nb._retry import note_failure, retry_delay_s, run_timed_out, timed_out
from durable_nb.errors import (
    DurableError,
    NotSupportedError,
    RunCancelled,
    RunConflictError,
    RunNotFoundError,
    RunTimeout,
    StepNotFoundError,
)

ENDED = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


class MemoryRun:
    """Implements `_current.Run`."""

    is_replayed = True

    def __init__(self, engine, run_id, request):
        self.id, self.runs, self.request, self.clock = run_id, engine, request, engine.clock
        self.label = f"run {run_id!r} of workflow {request.workflow!r}"
        self.loop = asyncio.get_running_loop()
        self.began_at, self.ended_at = self.clock.now().wall_s, None
        self.status, self.error, self.value, self.cancelled = Status.RUNNING, None, None, None
        self.steps, self._names, self._children, self._closing = {}, Counter(), itertools.count(1), []
        self._bodies, self.waiting = set(), {}
        context = copy_context()
        context.run(current_run.set, self)
        context.run(current_body.set, None)
        self.facts, self._invoked, self.is_pending = {}, set(), request.delay_s > 0
        self.task = self.loop.create_task(self._drive(), context=context)

    async def _drive(self):
        options = workflow_options.get(self.request.workflow, WorkflowOptions())
        try:
            if self.is_pending:
                await self.clock.sleep(self.request.delay_s)
                self.is_pending = False
            if options.timeout_s is not None:
                timeout = self.loop.create_task(self._time_out(options.timeout_s))
                self._closing.append(partial(_cancelled, timeout))
            args, kwargs = copy.deepcopy((self.request.args, self.request.kwargs))
            async with self.runs.shares(self.request.limit, self.request.limit_key):
                self.value = await workflow_functions[self.request.workflow](*args, **kwargs)
            status = Status.COMPLETED
        except asyncio.CancelledError:
            self.error = self.cancelled or RunCancelled(f"{self.label} ended with a CancelledError of its own code")
            status = Status.FAILED if isinstance(self.error, RunTimeout) else Status.CANCELLED
        except Exception as error:
            self.error, status = error, Status.FAILED
        while self._bodies:  # those that have begun end
            await asyncio.wait(self._bodies)
        for close in self._closing:
            await close()
        if status is Status.FAILED and options.on_failure is not None:
            current_body.set(Body("on_failure", f"{self.id} on_failure"))
            told = options.on_failure(self.id, self.error)
            await told if isawaitable(told) else told
        for path, step in self.steps.items():
            if step.status not in (Status.COMPLETED, Status.FAILED, Status.CANCELLED):
                self.steps[path] = replace(step, status=Status.INTERRUPTED)
        self.status, self.ended_at = status, self.clock.now().wall_s

    def cancel(self, why):
        self.cancelled = self.cancelled or why
        self.task.cancel()
        for child in self._invoked:
            self.runs.cancel(child, "")
        for body in self._bodies:
            body.cancel()

    async def _time_out(self, seconds):
        def is_busy():
            return any(run._bodies or run._invoked for run in self.runs.all())

        await self.clock.wait(seconds, is_busy)
        self.cancel(run_timed_out(self.label, self.id, seconds))

    def at_end(self, close):
        self._closing.append(close)

    def _add(self, kind, name, item=-1):
        name_here = name if item < 0 else f"{name}[{item}]"
        self._names[name_here] += 1
        path = name_here if self._names[name_here] == 1 else f"{name_here}#{self._names[name_here]}"
        self.steps[path] = Step(name, path, kind, Status.PENDING)
        return partial(self._tell, path)

    def _tell(self, path, status, **news):
        self.steps[path] = replace(self.steps[path], status=status, **news)

    def step(self, request):
        if isinstance(request, InvokeRequest):
            return self._awaited(partial(self._invoke, request, self._add("invoke", request.name)))
        tell = self._add(request.kind, request.name, request.item)
        return self._awaited(partial(self._perform, request, tell))

    async def _invoke(self, request, tell):
        body = Body(request.name, f"{self.id}/{request.name}/{next(self._children)}")
        current_body.set(body)
        self._invoked.add(body.idempotency_key)
        try:
            tell(Status.RUNNING, attempts=1, child=body.idempotency_key)
            value = await request.body()
        except asyncio.CancelledError:
            tell(Status.CANCELLED)
            raise
        except Exception as error:
            note_failure(error, request.name, self.label, 1, "call the run's resume()")
            tell(Status.FAILED, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            self._invoked.discard(body.idempotency_key)
        tell(Status.COMPLETED)
        return value

    async def _awaited(self, work):
        """Whoever gives up waiting doesn't stop it."""
        body = self.loop.create_task(work())
        self._bodies.add(body)
        body.add_done_callback(self._bodies.discard)
        return await asyncio.shield(body)

    async def _perform(self, request, tell):
        checkpoint = Checkpoint()
        for attempt in itertools.count(1):
            if request.pace is not None:
                await request.pace.enter(self.clock)
            shares = [self.runs.shares(limit) for limit in sorted(request.limits, key=lambda limit: limit.name)]
            try:
                for share in shares:
                    await share.acquire()
                tell(Status.RUNNING, attempts=attempt)
                returned = await self._attempt(request, checkpoint)
                value = settled(request, returned)
            except asyncio.CancelledError:
                tell(Status.CANCELLED)
                raise
            except Exception as error:
                if request.pace is not None:
                    request.pace.heed(error)
                delay_s = retry_delay_s(request.policy, attempt, error, 0.0)
                if delay_s is None:
                    note_failure(error, request.name, self.label, attempt, "call the run's resume()")
                    tell(Status.FAILED, error=f"{type(error).__name__}: {error}")
                    raise
                tell(Status.RETRYING)
            else:
                tell(Status.COMPLETED)
                return value
            finally:
                for share in shares:
                    share.release()
                if request.pace is not None:
                    request.pace.leave(returned=False)
            await self.clock.sleep(delay_s)
        return None

    async def _attempt(self, request, checkpoint):
        try:
            async with asyncio.timeout(request.timeout_s):
                return await asyncio.create_task(execute(portable(request), f"{self.id} {request.name}", checkpoint.next()))
        except TimeoutError:
            raise timed_out(request.name, self.label, request.timeout_s) from None

    def wait(self, request):
        tell = self._add(request.kind, request.name)
        return self._wait(request, tell) if request.kind == "sleep" else self._hear(request, tell, f"{len(self.steps)}")

    async def _hear(self, request, tell, wait):
        """An event or a decision, or the time-out."""
        key = request.of if request.kind == "event" else (self.id, wait)
        waiting = self.loop.create_future()
        self.waiting[wait] = (request, key, waiting)
        tell(Status.WAITING)
        self.runs.deliver()
        due_s = self.clock.now().wall_s + request.wake.total_seconds()
        while not waiting.done() and (left_s := due_s - self.clock.now().wall_s) > 0:
            await self.clock.listen(left_s, waiting, lambda: bool(self._bodies))
        self.waiting.pop(wait, None)
        tell(Status.COMPLETED)
        timed_out = not waiting.done()
        value = (None if request.kind == "event" else (False, "", "")) if timed_out else waiting.result()
        return came(request.kind, value, timed_out=timed_out)

    def send(self, request):
        self._add("notify", request.event_id)(Status.COMPLETED)
        return self.runs.send(request)

    async def _wait(self, request, tell):
        tell(Status.SLEEPING)
        now_s = self.clock.now().wall_s
        until_s = request.wake.timestamp() if isinstance(request.wake, datetime) else now_s + request.wake.total_seconds()
        while (left_s := until_s - self.clock.now().wall_s) > 0:
            await self.clock.sleep(left_s)
        tell(Status.COMPLETED)

    def start_many(self, requests):
        return list(map(self._start, requests))

    def _start(self, request):
        self._add("start", request.workflow)(Status.COMPLETED)
        run_id = request.run_id or f"{self.id}/{next(self._children)}"
        return self.runs.start(replace(request, run_id=run_id), self.id)

    def result_of(self, run_id):
        return self.runs.outcome(run_id)

    def record(self, request):
        return request.make(self.clock.now())

    def publish(self, published):
        if isinstance(published, Reported):
            self.facts.update(published.facts)


class Checkpoint:
    """What a step's body has reported. Implements `_current.Heartbeat`."""

    latest = given = None

    def next(self):
        self.given = self.latest
        return self

    def report(self, progress, form, data):
        self.latest = copy.deepcopy(progress)

    def last(self):
        return self.given


class MemoryEngine:
    """Implements `_current.Engine`."""

    store_id = "memory"

    def __init__(self, clock):
        self.clock, self._runs, self._sent = clock, {}, []
        self.running_loop = asyncio.get_running_loop()
        self._shares = {}

    def declare(self, limit):
        """Its figures come with each request."""

    def shares(self, limit, key=""):
        if limit is None or limit.concurrency is None:
            return asyncio.Semaphore()
        return self._shares.setdefault((limit.name, key), asyncio.Semaphore(limit.concurrency))

    def start(self, request, parent=""):
        run_id = request.run_id or f"run {len(self._runs)}"
        found = self._runs.setdefault(run_id, None) or MemoryRun(self, run_id, request)
        self._runs[run_id] = found
        if request.on_conflict == "fail" or (found.request.args, found.request.kwargs) != (request.args, request.kwargs):
            raise RunConflictError(f"the run id {run_id!r} is used already")
        return run_id

    def start_many(self, requests, parent=""):
        return [self.start(request, parent) for request in requests]

    def all(self):
        return [run for run in self._runs.values() if run is not None]

    def facts_of(self, run_id):
        return dict(self._of(run_id).facts)

    def _of(self, run_id):
        if run_id not in self._runs:
            raise RunNotFoundError(f"no run {run_id!r}")
        return self._runs[run_id]

    async def outcome(self, run_id):
        run = self._of(run_id)
        await asyncio.wait({run.task})
        if run.error is not None:
            raise run.error
        return run.value

    def cancel(self, run_id, reason):
        why = f"the run {run_id!r} was cancelled" + (f": {reason}" if reason else "")
        self._of(run_id).cancel(RunCancelled(why))

    def restart(self, run_id):
        found = self._of(run_id)
        found.task.cancel()
        self._runs[run_id] = MemoryRun(self, run_id, found.request)

    def fork(self, run_id, at):
        raise NotSupportedError(f"fork({run_id!r}, {at!r}): what a run did is not kept here")

    def cancel_all(self, *, status, workflow, label, reason):
        found = [
            run.id for run in self.snapshots(status=status, workflow=workflow, label=label) if not self._of(run.id).task.done()
        ]
        for run_id in found:
            self.cancel(run_id, reason)
        return found

    def delete(self, run_id):
        if not self._of(run_id).task.done():
            raise DurableError(f"the run {run_id!r} has not ended")
        del self._runs[run_id]

    def status_of(self, run_id):
        run = self._of(run_id)
        return Status.PENDING if run.is_pending and run.status is Status.RUNNING else run.status

    def check(self, run_id):
        self._of(run_id)

    def snapshot(self, run_id):
        run = self._of(run_id)
        said = f"{type(run.error).__name__}: {run.error}" if run.error is not None else None
        of = run.id, run.request.workflow, run.status, run.began_at, run.ended_at
        steps = tuple(one for step in run.steps.values() for one in (step, *self._of_child(step)))
        return Snapshot(*of, steps, run.request.labels, said)

    def _of_child(self, step):
        steps = self.snapshot(step.child).steps if step.child in self._runs else ()
        return [replace(one, path=f"{step.path}/{one.path}") for one in steps]

    def snapshots(self, *, status=None, workflow=None, label=None, limit=None, before=None, steps=False):
        ids = list(reversed(self._runs))
        found = [self.snapshot(run_id) for run_id in (ids if before is None else ids[ids.index(before) + 1 :])]
        kept = [run for run in found if status in (None, run.status) and workflow in (None, run.name)]
        kept = [run for run in kept if label is None or label in run.labels][:limit]
        return kept if steps else [replace(run, steps=()) for run in kept]

    def send(self, request):
        if request.run_id is not None and self._of(request.run_id).status in ENDED:
            raise DurableError(f"the run {request.run_id!r} has ended")
        ids = [(waiter.run_id) for waiter in self.waiters(request.event_id) if request.run_id in (None, waiter.run_id)]
        began = {run_id for run_id, run in self._runs.items() if run is not None and run.status not in ENDED}
        self._sent.append((request, began, set()))
        self.deliver()
        return Delivery(request.event_id, tuple(dict.fromkeys(ids)))

    def deliver(self):
        """Give what was sent to the waits asked for first."""
        for run in self._runs.values():
            for request, key, waiting in list(run.waiting.values() if run is not None else ()):
                for sent, began, had in self._sent:
                    mine = run.id in began and run.id not in had and sent.run_id in (None, run.id)
                    if request.kind == "event" and sent.event_id == key and mine and not waiting.done():
                        had.add(run.id)
                        waiting.set_result(copy.deepcopy(sent.data))

    def waiters(self, event_id):
        found = [(run.id, one) for run in self._runs.values() if run is not None for one in run.waiting.values()]
        return [Waiter(run_id, one[0].name, 0.0, 0.0) for run_id, one in found if one[1] == event_id and not one[2].done()]

    def decide(self, run_id, step, *, approved, comment, by):
        run = self._of(run_id)
        waiting = [one[2] for one in run.waiting.values() if one[0].kind == "decision" and one[0].name == step]
        if not waiting or waiting[0].done():
            raise StepNotFoundError(f"{step!r} doesn't wait")
        waiting[0].set_result((approved, by, comment))

    def interrupted(self):
        return []  # a process that dies takes all of them with it

    resume_own = used = interrupted

    def resume(self, run_id, *, take_over):
        """Those that have ended stay as they are."""


async def _cancelled(task):
    task.cancel()
