"""What a run says while it is executed, and where its steps show things.

Whoever wants to know (a view, a log, a command line) subscribes; the engine knows none of them. A host is something else: it
captures what a step displays and reads, which is part of the step's record.
"""

from __future__ import annotations

import asyncio
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

_SAYS_EVERY_S = 0.25
"""So often at most a step says how far it has come."""


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


@dataclass(frozen=True, slots=True)
class Said:
    """So far the body of a step has come that is at work: the end of a model's answer, for instance. It isn't recorded."""

    path: str
    text: str


Observation = Changed | Notice | Raised | Said
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

    def __bool__(self) -> bool:
        """Does anybody listen?"""
        return bool(self._observers)

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


class Sayings:
    """What the bodies of a run's steps say while they are at work, published a few times a second for each."""

    def __init__(self, observers: Observers, loop: asyncio.AbstractEventLoop) -> None:
        self._observers, self._loop = observers, loop
        self._texts: dict[str, Callable[[], str]] = {}
        """By path: what is to be said next."""
        self._silent: set[str] = set()
        """Who has said something a moment ago."""

    def say(self, path: str, text: Callable[[], str]) -> None:
        """Publish that text, now or in a moment, where somebody listens then. From any thread."""
        if not self._observers:
            return
        if asyncio._get_running_loop() is not self._loop:
            self._loop.call_soon_threadsafe(self.say, path, text)
            return
        self._texts[path] = text
        if path not in self._silent:
            self._publish(path)

    def _publish(self, path: str) -> None:
        self._silent.discard(path)
        if (text := self._texts.pop(path, None)) is not None:
            self._silent.add(path)
            self._loop.call_later(_SAYS_EVERY_S, self._publish, path)
            self._observers.publish(Said(path, text()))


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
