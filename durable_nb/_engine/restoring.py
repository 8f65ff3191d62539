"""What is recorded of a cell's steps, as its code gets it again."""

from __future__ import annotations

import contextlib
from pathlib import PurePath
from typing import Any

from durable_nb import _codec, _patches, _usage
from durable_nb._engine.execution import Execution
from durable_nb._engine.performer import StepCall
from durable_nb._engine.recalling import unreadable
from durable_nb._engine.recording import Recording
from durable_nb._fingerprint import Unhashable
from durable_nb._records import Outcome, StepKey
from durable_nb.errors import StoreError


class Restoring:
    """Of one execution of a cell."""

    def __init__(self, execution: Execution, recording: Recording) -> None:
        self._execution, self._recording, self._log = execution, recording, execution.log
        self.unrepeated: list[tuple[str, str]] = []
        """Restored steps, and the inputs that their bodies would have changed."""
        self._origins = {execution.record.id}
        """Runs whose steps were met, and whose notebook is known therefore."""

    def outcome(self, key: StepKey, call: StepCall) -> Outcome | None:
        """What is recorded of the step."""
        try:
            return self._recording.records.outcome(key.outcome)
        except StoreError as error:
            raise self._unreadable(call, error) from error

    async def value(self, key: StepKey, call: StepCall, outcome: Outcome, *, show: bool) -> Any:
        """The recorded value. `show`: the code gets it from no body, so what that displayed and changed is made again."""
        try:
            data = await self._log.blob(outcome.blob) if outcome.blob else outcome.value
        except StoreError as error:
            raise self._unreadable(call, error) from error
        is_changed = self._recording.identity.is_changed_already(key)
        if is_changed:
            self.unrepeated.append((call.request.name, "what it was given was changed by it already"))
        elif show and outcome.changes:
            self.unrepeated.append((call.request.name, f"{', '.join(outcome.changes)} not, which it changes"))
        if show:
            self.show(outcome)
            if outcome.usage:
                _usage.add(self._recording.used, outcome.usage)
                self._execution.shared.savings.add(self._execution.record.id, outcome.usage)
        value = _codec.decode(outcome.form, data)
        is_patched = bool(outcome.patches or outcome.patches_blob)
        return await self.patched(key, call, outcome, value) if is_patched and show and not is_changed else value

    def show(self, outcome: Outcome) -> None:
        """Display what the body displayed, and note what it saw."""
        if outcome.shown or outcome.seen:
            self._execution.performer.host.show_again(outcome.shown, outcome.seen)

    async def patched(self, key: StepKey, call: StepCall, outcome: Outcome, value: Any) -> Any:
        """Change the arguments as the body did; what it returned, which may be one of them."""
        packed = outcome.patches
        try:
            if outcome.patches_blob:
                packed = await self._log.blob(outcome.patches_blob)
        except StoreError as error:
            raise self._unreadable(call, error) from error
        if not packed:
            return value
        try:
            result = _patches.apply(packed, call.inputs.objects, value)
        except (KeyError, Unhashable):
            self.unrepeated.append((call.request.name, "what it was given is not as when it ran: it can't be changed again"))
            return value
        self._recording.note_changes(call.inputs, key, call.inputs.after())
        return result

    def advise_of_origin(self, key: StepKey) -> None:
        """Steps are shared by the notebooks of a folder; one line tells of it."""
        with contextlib.suppress(StoreError):  # whoever asks for the step is told
            outcome = self._recording.records.outcome(key.outcome)
            if outcome is None or outcome.run_id in self._origins:
                return
            self._origins.add(outcome.run_id)
            found = self._execution.shared.ownership.read_run(outcome.run_id)
            mine, theirs = self._execution.record.origin.notebook, found[0].origin.notebook if found else ""
            if mine and theirs and mine != theirs:
                self._execution.observers.advise(f"steps come from {PurePath(theirs).name}, which has them in common")

    def _unreadable(self, call: StepCall, error: StoreError) -> StoreError:
        return unreadable(call.request.name, self._execution.wording, error)
