"""Everything that durable_nb raises on purpose.

    DurableError
    ├── NotInRunError         a verb outside any run
    ├── NestedStepError       a verb inside a step's body
    ├── NonRetryableError     raised by a step: don't try this again
    ├── RetryAfter            raised by a step: try this again after so long
    ├── StepFailed            stands in for an exception that can't be pickled
    ├── StepTimeout           an attempt took longer than the step's timeout (also a TimeoutError)
    ├── StepInterrupted       an attempt at an `at_most_once` step was cut off, and may have had its effect
    ├── RunCancelled          the run was cancelled
    ├── RunTimeout            the run took longer than its workflow's timeout (also a TimeoutError)
    ├── RunConflictError      a run id that is used already, for something else
    ├── RunNotFoundError      no run of that id
    ├── StepNotFoundError     a run has no such step, or several (also a LookupError)
    ├── NonDeterminismError   the workflow asks for other steps than it did when they were recorded
    ├── NotSupportedError     what a workflow's own code can't do: threads, sockets, another loop's futures
    ├── UnserializableError   a result that can't be written to the journal
    ├── LeaseLost             another process has taken this run over
    └── StoreError            the folder can't be used as it is
        ├── CorruptStoreError     bytes that are not what was written
        └── UntrustedStoreError   written under another signing key
    RunSuspended (BaseException)  the cell ended at a wait that is longer than it may last

A message tells what was found, what is safe, and what to type next. All of them survive pickle: their data is in `args`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from durable_nb._clock import parse_duration

if TYPE_CHECKING:
    from datetime import timedelta


class DurableError(Exception):
    """Base of all errors that durable_nb raises."""


class NotInRunError(DurableError):
    """A verb was called where no run is: outside a `%%durable` cell, or in a task that outlived its cell."""


class NestedStepError(DurableError):
    """A verb was called inside a step's body. A step is one unit: it is recorded whole or not at all."""


class NonRetryableError(DurableError):
    """Raise it in a step's body to give up at once, whatever retries are left."""


class RetryAfter(DurableError):  # noqa: N818  the name is a contract, and says what the engine does
    """Raise it in a step's body to be tried again after `delay` (seconds, timedelta or "90s"), instead of the backoff.

    The attempt counts like any other; after the last one this exception is what the step raises. ValueError for a delay that
    is not a duration.
    """  # fmt: skip

    def __init__(self, delay: float | timedelta | str, message: str = "") -> None:
        parse_duration(delay)
        super().__init__(delay, message)
        self.delay = delay

    def __str__(self) -> str:
        return self.args[1] or f"asked to be tried again after {self.delay}"


class StepFailed(DurableError):  # noqa: N818  a contract's name
    """Stands in for a step's exception that can't be pickled: its type, its message and its traceback as text."""

    def __init__(self, type_name: str, message: str, traceback: str = "") -> None:
        super().__init__(type_name, message, traceback)
        self.type_name = type_name
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.args[1]}"


class StepTimeout(DurableError, TimeoutError):  # noqa: N818  a contract's name
    """An attempt took longer than the step's `timeout`. It is retried like a network error."""


class StepInterrupted(DurableError):  # noqa: N818  a contract's name
    """An attempt at an `at_most_once` step was cut off: it may have had its effect, so its body is not run again.

    Look at the far end; then run the cell once with `--rerun=STEP`, or call `run.resume()`.
    """


class RunCancelled(DurableError):  # noqa: N818  a contract's name
    """The run was cancelled; its completed steps are kept."""


class RunTimeout(DurableError, TimeoutError):  # noqa: N818  a contract's name
    """A run took longer than its workflow's `timeout`. Its completed steps are kept; `run.resume()` gives it that time anew."""


class RunConflictError(DurableError):
    """The run id is used already, with other arguments or by another workflow. Nothing was started."""


class RunNotFoundError(DurableError, LookupError):
    """The store has no run of that id."""


class StepNotFoundError(DurableError, LookupError):
    """The run has no step of that name, or several of which none is meant more than the others."""


class NonDeterminismError(DurableError):
    """The workflow's code asks for other steps than it did when they were recorded. Nothing was executed.

    Put the code back as it was, or guard the change, and `run.resume()`.
    """


class NotSupportedError(DurableError):
    """What was asked for can't be done here. In a workflow's own code: threads, sockets, subprocesses, another loop's futures,
    whatever a replay would not see. Do it in a step: `await durable.run(name, function, ...)`."""  # fmt: skip


class UnserializableError(DurableError, TypeError):
    """A step's result can't be stored. The body has run; nothing was recorded for it."""


class LeaseLost(DurableError):  # noqa: N818  a contract's name
    """Another process owns this run now. What was acknowledged before is safe; the commit that met this error was refused."""


class StoreError(DurableError):
    """The store's folder or journal can't be used as it is."""


class CorruptStoreError(StoreError):
    """A record is not what was written: it fails its authentication under the key that signed it."""


class UntrustedStoreError(StoreError):
    """A record was signed with another key, so nothing of it was unpickled."""


class RunSuspended(BaseException):
    """The cell ended at a wait longer than `--max-wait`. Run it again: it resumes from there."""

    run_id = ""
    """The run that waits."""
    steps: tuple[str, ...] = ()
    """Paths of the steps that it waits for."""
