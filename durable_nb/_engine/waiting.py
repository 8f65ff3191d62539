"""What a cell waits for: sleeps, events and decisions, which its open attempt keeps over restarts and edits."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import datetime
from typing import Any

from durable_nb import _codec
from durable_nb import _records as rec
from durable_nb._clock import say_duration
from durable_nb._current import WaitRequest
from durable_nb._engine.arrivals import is_addressed
from durable_nb._engine.branches import branch_name
from durable_nb._engine.execution import Execution, Patience, of_this_boot, timer_of
from durable_nb._engine.inbox import Received
from durable_nb._engine.recording import Recording
from durable_nb._engine.task_scope import TaskScope, enters_engine_code
from durable_nb._events import approvals_policy, came
from durable_nb._facts import Status, Step
from durable_nb._journal import Verdict
from durable_nb._records import Arrived, Notification, Timer
from durable_nb.errors import RunSuspended

_WAITS = (Status.SLEEPING, Status.WAITING, Status.RETRYING)
_FEW_DAYS_S = 6 * 86400.0


class Waiting:
    """Of one execution of a cell."""

    def __init__(
        self,
        execution: Execution,
        recording: Recording,
        scope: TaskScope,
        stop: Callable[[BaseException], None],
        give_way: Callable[[], BaseException],
    ) -> None:
        """`stop` ends the execution with that; `give_way` one whose run is another process's, and what it returns is raised."""
        self._execution, self._recording, self._scope = execution, recording, scope
        self._stop, self._give_way = stop, give_way
        self._log, self._facts, self._clock = execution.log, execution.facts, execution.shared.clock
        self.max_wait_s: float | None = None
        """A pause that is longer suspends the run; None: any is waited for."""
        self.max_answer_s: float | None = None
        """After so long without the event or decision that it waits for, the run is suspended."""
        self.tell: Callable[[str], object] = lambda _: None
        """Told what the cell waits for, before it does."""
        self._writing: dict[str, asyncio.Future[Verdict]] = {}
        """What waits have come to, on its way to the disk."""
        self.reads: dict[str, str] = {}
        """What the cell reads, by component: approvals that were asked for when that was something else lapse."""

    def ask(self, request: WaitRequest) -> Coroutine[Any, Any, Any]:
        """The wait that the code asks for; which one it is, is fixed now."""
        branch = branch_name()
        wait = self._recording.identity.wait(request.kind, request.name, branch, self._scope.branch.has_made)
        path = self._facts.take(branch, request.name)
        prompt = request.of if request.kind == "decision" else ""
        self._facts.add(Step(request.name, path, request.kind, Status.PENDING, prompt=prompt))
        return (self._sleep if request.kind == "sleep" else self._hear)(request, wait, path, branch)

    def pause(self, seconds: float, doing: str) -> None:
        """A pause begins whose end is known: suspend the run where it is longer than the cell may wait."""
        if self.max_wait_s is not None and seconds > self.max_wait_s:
            limit = f"longer than it may wait here ({say_duration(self.max_wait_s)}); everything so far is kept"
            self._suspend(
                f"{doing} until {self._when(seconds)}, {limit}: run this cell again then, or with a longer --max-wait"
            )

    # -- the kinds of waits ----------------------------------------------------------------------------------------------

    @enters_engine_code
    async def _sleep(self, request: WaitRequest, wait: str, path: str, branch: str) -> None:
        is_known = wait in self._recording.records.timers
        timer = await self._deadline(request, wait, branch)
        was_left = await self._execution.sleep(timer, path, timer.since, self.pause)
        self._ended(path, timer, restored=is_known and not was_left)

    @enters_engine_code
    async def _hear(self, request: WaitRequest, wait: str, path: str, branch: str) -> Any:
        records = self._recording.records
        if (writing := self._writing.get(wait)) is not None:  # for one that was given up in this very moment
            await asyncio.wait({writing})
        recorded = records.what_came(wait)
        restored = recorded is not None
        timer = records.timer(wait) or timer_of(request, self._clock.now())
        if recorded is None:
            with self._execution.expecting(wait, path, timer) as found:
                timer = await self._deadline(request, wait, branch)
                arrived, key = await (self._event if request.kind == "event" else self._decision)(timer, wait, path, found)
            recorded = await self._write_down(wait, branch, arrived, key)
        data = await self._log.blob(recorded.blob) if recorded.blob else recorded.value
        value = _codec.decode(recorded.form, data) if recorded.form else None
        self._ended(path, timer, restored=restored)
        return came(request.kind, value, timed_out=recorded.timed_out)

    async def _event(self, timer: Timer, wait: str, path: str, found: asyncio.Future[Received]) -> tuple[Arrived, str]:
        """What has come, and the row that goes with its delivery."""
        sent = f"once it was sent, by durable.notify({timer.of!r}) for instance"
        patience = self._patience(self.max_answer_s, "event", timer, sent)
        received = await self._execution.event(timer, path, wait, found, patience)
        if received is None:
            return Arrived("event", timer.name, "", b"", timed_out=True, at_s=self._execution.now_s()), ""
        message = received.message
        assert isinstance(message, Notification)  # noqa: S101  what events are
        of = "event", timer.name, message.form, message.value, message.blob, received.key
        return Arrived(*of, at_s=self._execution.now_s()), received.key if is_addressed(received) else ""

    async def _decision(self, timer: Timer, wait: str, path: str, found: asyncio.Future[Received]) -> tuple[Arrived, str]:
        policy, label = approvals_policy(), self._execution.record.name
        how = f"once it is decided, by durable.get_run({label!r}).approve({path!r}) for instance"
        patience = self._patience(0.0 if policy == "suspend" else self.max_answer_s, "approval", timer, how)
        decided, key = await self._execution.decision(timer, path, wait, found, policy, patience)
        form, data = _codec.encode([decided.approved, decided.by, decided.comment])
        return Arrived("decision", timer.name, form, data, timed_out=decided.timed_out, at_s=decided.at_s), key

    # -- their records ---------------------------------------------------------------------------------------------------

    async def _deadline(self, request: WaitRequest, wait: str, branch: str) -> Timer:
        """The timer of a wait, on disk."""
        records, key = self._recording.records, rec.timer_key(self._execution.record.id, wait)
        recorded, now = records.timer(wait), self._clock.now()
        if recorded is None:
            timer = timer_of(request, now)
            sequence, reads = self._execution.held.next_sequence(), self.reads if request.kind == "decision" else {}
            timer = replace(timer, branch=branch, sequence=sequence, reads=reads)
        else:  # an edited duration counts from the first asking
            timer = replace(timer_of(request, recorded.since), branch=branch, sequence=recorded.sequence, reads=recorded.reads)
        timer = of_this_boot(timer, now)
        if timer != recorded:
            row = self._log.pack(key, timer)
            await self._recording.commit(puts=(row,), deletes=() if recorded else self._lapsed(request))
            records.timers[wait] = row[1]
        return timer

    def _lapsed(self, request: WaitRequest) -> tuple[str, ...]:
        """An approval is asked for: those of its name that nobody has decided, and that are about something else, go."""
        if request.kind != "decision" or not (lapsed := self._recording.identity.lapsed.pop(request.name, None)):
            return ()
        self._execution.observers.notice(
            f"approval {request.name!r} is asked for anew: what the cell reads has changed since it was asked for"
        )
        records, run_id = self._recording.records, self._execution.record.id
        return tuple(rec.timer_key(run_id, wait) for wait in lapsed if records.what_came(wait) is None)

    async def _write_down(self, wait: str, branch: str, arrived: Arrived, source: str) -> Arrived:
        """What ended a wait is on disk, and the message that brought it goes. Given up meanwhile, it stands for the next wait
        of that name."""  # fmt: skip
        records, identity = self._recording.records, self._recording.identity
        row = self._log.pack(rec.arrived_key(self._execution.record.id, wait), arrived)
        commit = self._recording.handed_over(inserts=(row,), deletes=(source,) if source else ())

        def learn(done: asyncio.Future[Verdict]) -> None:
            del self._writing[wait]
            if not done.cancelled() and done.exception() is None and done.result() is Verdict.APPLIED:
                records.arrived[wait] = row[1]

        self._writing[wait] = commit
        commit.add_done_callback(learn)
        try:
            verdict = await asyncio.shield(commit)
        except asyncio.CancelledError:
            identity.give_back_wait(arrived.kind, arrived.name, branch, wait)
            raise
        if verdict is not Verdict.APPLIED:
            raise self._give_way()
        return arrived

    def _ended(self, path: str, timer: Timer, *, restored: bool) -> None:
        ended_at, since_s = self._execution.now_s(), timer.since.wall_s
        of = {"started_at": since_s, "ended_at": ended_at, "restored": restored, "wake_at": None}
        self._facts.update(path, status=Status.COMPLETED, **of)

    # -- suspending ------------------------------------------------------------------------------------------------------

    def _patience(self, seconds: float | None, what: str, timer: Timer, how: str) -> Patience:
        def begins(left_s: float) -> None:
            self.tell(f"waits for {what} {timer.name} until {self._when(left_s)}; it goes on {how}")

        def give_up(left_s: float) -> None:
            until = self._when(left_s)
            self._suspend(f"waits for {what} {timer.name} until {until}; run this cell again {how}. Everything so far is kept")

        return Patience(math.inf if seconds is None else seconds, begins, give_up)

    def _suspend(self, why: str) -> None:
        suspended = RunSuspended(f"{self._execution.wording.label} {why}")
        suspended.run_id = self._execution.record.id
        suspended.steps = tuple(step.path for step in self._facts.steps() if step.status in _WAITS)
        self._stop(suspended)
        raise asyncio.CancelledError

    def _when(self, seconds: float) -> str:
        until = datetime.fromtimestamp(self._execution.now_s() + seconds).astimezone()
        return (
            f"{until:%a %H:%M:%S}"
            if seconds < 3600
            else f"{until:%a %H:%M}"
            if seconds < _FEW_DAYS_S
            else f"{until:%a %d %b %H:%M}"
        )
