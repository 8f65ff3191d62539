"""Everything that durable_nb raises on purpose.

    DurableError
    ├── NotInRunError         a verb outside any run
    ├── NestedStepError       a verb inside a step's body
    ├── NonRetryableError     raised by a step: don't try this again
    ├── RetryAfter            raised by a step: try this again after so long
    ├── UnserializableError   a result that can't be written to the journal
    ├── LeaseLost             another process has taken this run over
    └── StoreError            the folder can't be used as it is
        ├── CorruptStoreError     bytes that are not what was written
        └── UntrustedStoreError   written under another signing key
    RunSuspended (BaseException)  the cell ended at a wait that is longer than it may last

A message tells what was found, what is safe, and what to type next. All of them survive pickle: their data is in `args`.
"""

from __future__ import annotations


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

    The attempt counts like any other; after the last one this exception is what the step raises.
    """

    def __init__(self, delay: object, message: str = "") -> None:
        super().__init__(delay, message)
        self.delay = delay

    def __str__(self) -> str:
        return self.args[1] or f"asked to be tried again after {self.delay}"


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
    """The cell ended at a wait longer than `--max-wait`. Run it again: it goes on from there."""
