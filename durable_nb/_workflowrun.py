"""One execution of a workflow's run. Its steps are identified by place: the Nth request of a branch has the Nth record.

So the recorded result stands when a step's body or arguments were edited since: editing `charge` must never charge again.
Code that asks for something else than was recorded is told so, with both columns, before anything is executed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from durable_nb import _codec
from durable_nb import _records as rec
from durable_nb._facts import Status
from durable_nb._fingerprint import Unhashable
from durable_nb._records import Attempts, Outcome, RunRecord, StepKey, Timer, unpack
from durable_nb._replay import Places
from durable_nb._request import Request
from durable_nb._run import Ended, Held, Run, digest_of, say
from durable_nb.errors import NonDeterminismError, RunCancelled, StoreError

if TYPE_CHECKING:
    from durable_nb._current import SleepRequest, StepRequest
    from durable_nb._engine import Engine
    from durable_nb._fingerprint import Fingerprint

_SLEEP = "sleep"
_SURE_S = 0.1
"""A commit that was applied so short a time ago says as much as looking. A stopped process's time passes too."""
_LOOKS = 100
"""So many recorded steps of one name are looked at for edits. Comparing is most of what a replay costs, and the first tell."""


class WorkflowRun(Run):
    """What verbs ask, in a workflow's run."""

    again = "call its resume()"

    def __init__(self, engine: Engine, record: RunRecord, held: Held, *, resumed: bool) -> None:
        super().__init__(engine, record, held, resumed=resumed)
        self.what = f"run {record.id!r} of workflow {record.name!r}"
        self._places = Places()
        self._there: dict[str, dict[int, tuple[str, str]]] = {}
        """By branch and place: kind and key of the record."""
        self._asked: defaultdict[str, list[str]] = defaultdict(list)
        self._broken: NonDeterminismError | None = None
        self._looked: Counter[str] = Counter()
        """By name, how many recorded steps were compared with what is asked for now."""
        self._digests: dict[str, str] = {}

    def _loaded(self, loose: dict[str, bytes], again: dict[str, bytes]) -> None:  # noqa: ARG002  places need neither
        self._there = {}
        for kind, keys in ((Outcome, self._outcomes), (Attempts, self._attempts), (Timer, self._timers)):
            for key in keys:
                branch, place = key.rsplit("/", 2)[1:]
                self._there.setdefault(branch, {})[int(place)] = (kind.__name__, key)

    def _refusal(self) -> BaseException | None:
        return self._broken

    def _place(self, request: StepRequest, branch: str) -> tuple[StepKey, Fingerprint | None]:
        place = self._take(request.kind, request.name, branch)
        key = self._key(self._digest_of(branch), place)
        recorded = self._recorded(key.outcome)
        if recorded is not None and self._looked[request.name] >= _LOOKS:
            return key, None
        try:
            found = request.fingerprint()
        except Unhashable:  # it explains, and identifies nothing: an argument that can't be read is no reason to fail
            return key, None
        if recorded is not None:
            self._look(recorded, found)
        return key, found

    def _look(self, recorded: Outcome, now: Fingerprint) -> None:
        """Say once of a step that was edited that this changes nothing."""
        self._looked[recorded.name] += 1
        if _own(recorded.provenance.components) != _own(now.components):
            self._looked[recorded.name] = _LOOKS
            self.stage.notice(
                f"step {recorded.name!r} of {self.what} was edited, or has other arguments, since it was recorded; the "
                "recorded result stands"
            )

    def _digest_of(self, branch: str) -> str:
        known = self._digests.get(branch)
        if known is None:
            known = self._digests[branch] = digest_of(branch)
        return known

    def _take(self, kind: str, name: str, branch: str) -> int:
        """The place of a request, which must be what was recorded there."""
        __tracebackhide__ = True
        if self._broken is not None:
            raise self._broken
        place = self._places.take(branch)
        self._asked[branch].append(f"{kind} {name!r}")
        recorded = self._said(branch, place)
        if recorded is not None and recorded != self._asked[branch][place]:
            raise self._breaks(branch, f"asks for {self._asked[branch][place]} where {recorded} is recorded")
        return place

    def check_complete(self) -> None:
        """The code has returned: every recorded step must have been asked for.

        But for other tasks than the code's own, where a step has failed, and for those that the code cancelled, as the
        losers of a race: what is cut short gets differently far in every execution.
        """
        if self._broken is not None:
            raise self._broken
        names = {digest_of(branch): branch for branch in self._asked}
        cut_short = any(fact.status is Status.FAILED for fact in self._facts.values())
        for branch_digest, places in self._there.items():
            if cut_short and branch_digest != digest_of(""):
                continue
            branch = names.get(branch_digest)
            asked = self._places.asked(branch) if branch is not None else 0
            if max(places) >= asked:  # of parallel steps a later one may be recorded without an earlier one
                where = branch if branch is not None else self._branch_recorded(branch_digest)
                if not self._branch.was_cancelled(where):
                    raise self._breaks(where, f"returned after {asked} of {max(places) + 1} recorded steps")

    def _branch_recorded(self, branch_digest: str) -> str:
        seal = self.engine.store.seal
        for kind, key in self._there[branch_digest].values():
            outcome = self._recorded(key) if kind == Outcome.__name__ else None
            if outcome is not None:
                return outcome.branch
            if kind == Timer.__name__:
                return unpack(seal, key, self._timers[key], Timer).branch
        return ""

    def _said(self, branch: str, place: int) -> str | None:
        """The record at a place, as messages say it."""
        found = self._there.get(self._digest_of(branch), {}).get(place)
        if found is None:
            return None
        kind, key = found
        seal = self.engine.store.seal
        if kind == Timer.__name__:
            return f"{_SLEEP} {unpack(seal, key, self._timers[key], Timer).name!r}"
        outcome = self._recorded(key)
        if outcome is not None:
            return f"{outcome.kind} {outcome.name!r}"
        row = self._attempts.get(key)
        if row is None:
            return None
        attempts = unpack(seal, key, row, Attempts)
        return f"{attempts.kind} {attempts.name!r}"

    def _breaks(self, branch: str, what: str) -> NonDeterminismError:
        places = self._there.get(self._digest_of(branch), {})
        asked = self._asked.get(branch, [])
        rows = [("recorded", "asked for")]
        count = max(len(asked), *(n + 1 for n in places), 0)
        rows += [(self._said(branch, n) or "", asked[n] if n < len(asked) else "") for n in range(count)]
        width = max(len(left) for left, _ in rows)
        table = "\n".join(
            f"  {n or ' '}  {left:<{width}}  {right}{'   <-' if n and left != right else ''}".rstrip()
            for n, (left, right) in enumerate(rows)
        )
        where = f" in {branch.lstrip('/')}" if branch else ""
        self._broken = NonDeterminismError(
            f"{self.what} {what}{where}; nothing was executed, and the records are as they were. Put the code back as it was "
            f"and call the run's resume(), or begin a new run\n{table}"
        )
        return self._broken

    def _timer_key(self, request: SleepRequest, branch: str) -> str:
        __tracebackhide__ = True
        return rec.timer_key(self.id, self._digest_of(branch), self._take(_SLEEP, request.name, branch))

    def _child_key(self, workflow: str, branch: str, arguments: Callable[[], str]) -> str:  # noqa: ARG002
        return f"{self._digest_of(branch)}/{self._take('start', workflow, branch)}"

    def _timer(self, recorded: Timer | None, asked: Timer) -> Timer:
        return recorded or asked

    async def _give_up(self, asked: Request, attempt: int, began: float, error: BaseException) -> Ended:
        """A failure is an outcome: the code may have caught it and gone on."""
        form, data, shown = _codec.encode_error(error)
        outcome = self._outcome_of(asked, attempt, began, form, data, failed=True, error=say(error))
        ended = await self._record(asked, outcome, None)
        return Ended(error=shown) if ended.outcome is not None else ended

    async def _may_begin(self) -> None:
        """A run that was taken over begins no body any more, even where it has nothing to commit."""
        if time.monotonic() - self._held.confirmed_s < _SURE_S:
            return
        key, store = rec.lease_key(self.id), self.engine.store
        if await store.writer.call(lambda: store.journal.get(key)) != self._held.row:
            raise self._give_way()

    def _try_again(self, step: str) -> str:  # noqa: ARG002
        return "call the run's resume()"

    async def drive(self, function: Any) -> Any:
        """Execute the workflow's function from its recorded arguments; what it returns or raises, written down."""
        journal, recorded = self.engine.store.journal, self.record
        data = recorded.arguments
        if recorded.arguments_blob:
            data = await self.engine.store.writer.call(lambda: journal.get_blob(recorded.arguments_blob))
        args, kwargs = _codec.decode(recorded.form, data)
        result: Any = None
        body = _called(function, args, kwargs)
        try:
            result = await self.execute(body)
            self.check_complete()
            form, data = self._encoded_result(result)
        except (asyncio.CancelledError, KeyboardInterrupt) as stopped:
            if self._stopped is None and not isinstance(stopped.__cause__, KeyboardInterrupt):  # nobody did: gone on with,
                own = RunCancelled(f"{self.what} ended with a CancelledError of its own code")  # it would do so again
                await self.finish(Status.CANCELLED, str(own), result=_codec.encode_error(own)[:2])
                raise own from None
            await self.finish(Status.INTERRUPTED)
            raise
        except StoreError:  # the disk's failure is none of the run's: it goes on once the cause is gone
            with contextlib.suppress(StoreError):
                await self.finish(Status.INTERRUPTED)
            raise
        except BaseException as raised:
            error = self._broken or raised
            form, data, shown = _codec.encode_error(error)
            await self.finish(self.ends_as(error), say(error), result=(form, data))
            if not isinstance(shown, Exception):  # SystemExit: out of a task, it would end the loop; the record has it
                return None
            raise shown from None
        finally:
            body.close()  # cancelled before its first line, it was never awaited
        await self.finish(Status.COMPLETED, result=(form, data))
        return result

    def _encoded_result(self, result: Any) -> tuple[str, bytes]:
        return self.encoded(result, f"{self.what} returned")


def _own(components: dict[str, str]) -> dict[str, str]:
    """A step's code and arguments, without the globals that it reads, which change for many reasons."""
    return {label: digest for label, digest in components.items() if label != "aliases" and not label.startswith("global ")}


async def _called(function: Any, args: Any, kwargs: Any) -> Any:
    return await function(*args, **kwargs)
