"""What a run says while it is executed, and where its steps show things.

Whoever wants to know (a view, a log, a command line) subscribes; the engine knows none of them. A host is something else: it
captures what a step displays and reads, which is part of the step's record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from durable_nb._current import StepRequest
    from durable_nb._fingerprint import Fingerprint

log = logging.getLogger("durable_nb")
"""Notices of programs without a notebook. Not configured, Python writes them to stderr."""


@dataclass(frozen=True, slots=True)
class Changed:
    """The run's facts are others now: its snapshot tells which. Comes often."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that the user is told about the run, which is no output of theirs."""

    text: str
    is_advice: bool = False
    """Worth knowing, once: nothing has gone wrong."""


@dataclass(frozen=True, slots=True)
class Raised:
    """An attempt at a step's body has failed."""

    path: str
    error: BaseException


Observation = Changed | Notice | Raised
Observer = Callable[[Observation], object]

CHANGED = Changed()


class Observers:
    """Those who have subscribed to one run. Where nobody has, notices go to the log."""

    def __init__(self) -> None:
        self._observers: list[Observer] = []

    def subscribe(self, observer: Observer) -> Callable[[], None]:
        """Call `observer` with every observation from now on, on the loop's thread; the callable ends that."""
        self._observers.append(observer)
        return lambda: self._observers.remove(observer)

    def publish(self, observation: Observation) -> None:
        for observer in self._observers:
            observer(observation)
        if not self._observers and isinstance(observation, Notice):
            log.warning(observation.text)

    def changed(self) -> None:
        self.publish(CHANGED)

    def notice(self, text: str) -> None:
        self.publish(Notice(text))

    def advise(self, text: str) -> None:
        self.publish(Notice(text, is_advice=True))


class Host(Protocol):
    """Where the bodies of a run's steps are executed: captures what they display and see, and shows it again."""

    def recording(
        self, path: str, request: StepRequest, found: Fingerprint | None
    ) -> AbstractContextManager[Callable[[], tuple[bytes, bytes]]]:
        """While entered, note what the calling task displays and what it sees of the world; the callable gives both, encoded.
        `found`: what the step is identified by."""  # fmt: skip
        ...

    def show_again(self, shown: bytes, seen: bytes) -> None:
        """Display what was recorded, and note what was seen as seen."""
        ...

    def holds(self, seen: bytes) -> bool:
        """Is the world that a step saw still what it was?"""
        ...


class NoHost:
    """Of programs without a notebook: nothing is captured."""

    def recording(
        self,
        path: str,  # noqa: ARG002
        request: StepRequest,  # noqa: ARG002
        found: Fingerprint | None,  # noqa: ARG002
    ) -> AbstractContextManager[Callable[[], tuple[bytes, bytes]]]:
        return nullcontext(_nothing)

    def show_again(self, shown: bytes, seen: bytes) -> None:
        pass

    def holds(self, seen: bytes) -> bool:  # noqa: ARG002
        return True


def _nothing() -> tuple[bytes, bytes]:
    return b"", b""
