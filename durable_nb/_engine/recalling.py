"""What is recorded of a workflow's steps, as the replay gives it to the code again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from durable_nb import _codec, _patches
from durable_nb._arguments import fingerprint_of
from durable_nb._engine.asking import Ask
from durable_nb._engine.by_history import History, Row
from durable_nb._engine.execution import Execution
from durable_nb._engine.in_place import PYTHON, code_of
from durable_nb._engine.performer import Wording
from durable_nb._engine.run_log import say
from durable_nb._records import Outcome
from durable_nb.errors import CorruptStoreError, StoreError, UntrustedStoreError

_LOOKS = 100
"""So many recorded steps of one name are compared with what is asked for now. Comparing is most of what a replay costs."""


class Recalled:
    """The recorded values of one history."""

    def __init__(self, execution: Execution, history: History) -> None:
        self._execution, self._history = execution, history
        self._label = execution.wording.label
        self._loaded: tuple[int, bytes, bytes] | None = None
        """Of the next delivery: large values, read from their files."""
        self._fetching: asyncio.Task[None] | None = None
        self._looked: Counter[str] = Counter()

    def is_at_hand(self, row: Row, then: Callable[[], None], failed: Callable[[BaseException], None]) -> bool:
        """Are the large values of the next delivery's record here? Else they are fetched, and `then` is called."""
        names = [row.blob, row.patches_blob if isinstance(row, Outcome) else ""]
        if not any(names):
            return True
        if self._loaded is not None and self._loaded[0] == self._history.activation:
            return True

        async def fetch() -> None:
            try:
                found = [await self._execution.log.blob(name) if name else b"" for name in names]
            except StoreError as error:
                failed(self._unreadable(row, error))
            else:
                self._loaded = self._history.activation, found[0], found[1]
                then()

        self._fetching = self._execution.loop.create_task(fetch())
        return False

    def value_of(self, row: Row, ask: Ask) -> tuple[Any, BaseException | None]:
        """What the code gets, of the delivery that is due: a value or an error. Its arguments are changed as they were."""
        data, patches = row.value, row.patches if isinstance(row, Outcome) else b""
        if self._loaded is not None and self._loaded[0] == self._history.activation - 1:
            data, patches = self._loaded[1] or data, self._loaded[2] or patches
            self._loaded = None
        try:
            value = _codec.decode(row.form, data)
        except Exception as unreadable:
            raise self._unreadable(row, unreadable) from unreadable
        if isinstance(row, Outcome):
            self._look(ask, row)
            self._execution.shared.savings.add(self._execution.record.id, row.usage)
            if patches:
                value = self._patched(ask, patches, value)
        return (None, value) if row.failed else (value, None)

    def _look(self, ask: Ask, recorded: Outcome) -> None:
        """Say once of a step that was edited that this changes nothing."""
        name = recorded.name
        if self._looked[name] >= _LOOKS or not ask.is_step:
            return
        self._looked[name] += 1
        written = recorded.provenance
        other_code = written.python == PYTHON and written.code != code_of(ask.what.fn)
        if other_code or ask.request.recorded_digest not in (None, ask.request.digest):
            self._looked[name] = _LOOKS
            self._execution.observers.notice(
                f"step {name!r} of {self._label} was edited, or has other arguments, since it was recorded; the recorded "
                "result stands"
            )

    def _patched(self, ask: Ask, packed: bytes, value: Any) -> Any:
        """Change the step's arguments as its body did; what it returned, which may be one of them."""
        try:
            places = fingerprint_of(ask.what).places()
            return _patches.apply(packed, places, value)
        except Exception:  # there is something else at these places
            self._execution.observers.notice(
                f"step {ask.request.name!r} of {self._label} changed its arguments when it ran; restored, it can't: they are "
                "others now"
            )
            return value

    def _unreadable(self, row: Row, error: Exception) -> StoreError:
        asked = self._history.recorded(row.request)
        return unreadable(asked.name if asked else "", self._execution.wording, error)


def unreadable(name: str, wording: Wording, error: Exception) -> StoreError:
    """What whoever asks for a step gets whose record can't be used."""
    kind = UntrustedStoreError if isinstance(error, UntrustedStoreError) else CorruptStoreError
    return kind(
        f"step {name!r} of {wording.label} is recorded, but the record can't be used: {say(error)}. Its body was not run "
        f"again, since it may have been paid for; to do so, {wording.unreadable_hint}"
    )
