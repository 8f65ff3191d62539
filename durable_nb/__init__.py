"""Durable functions for Jupyter: `%load_ext durable_nb`, then `%%durable NAME` above a cell.

import durable_nb as durable

await durable.run("charge", charge, cart)
await durable.sleep("cool off", "7d")
response = await durable.call("rates", "https://example.com/rates.json")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from durable_nb._cellcache.resources import remake as remake
    from durable_nb._chat import ChatResult as ChatResult
    from durable_nb._chat import chat as chat
    from durable_nb._engine.workflows import open_store as open  # noqa: A004, F401
    from durable_nb._events import Decision as Decision
    from durable_nb._events import Delivery as Delivery
    from durable_nb._events import Event as Event
    from durable_nb._facts import Progress as Progress
    from durable_nb._fanout import map as map  # noqa: A004
    from durable_nb._fingerprint import identify as identify
    from durable_nb._housekeeping.dashboard import dashboard as dashboard
    from durable_nb._ledger import ledger as ledger
    from durable_nb._limits import limit as limit
    from durable_nb._outside import approve as approve
    from durable_nb._outside import notify as notify
    from durable_nb._outside import wait_for_event as wait_for_event
    from durable_nb._outside import waiters as waiters
    from durable_nb._progress import last_progress as last_progress
    from durable_nb._progress import progress as progress
    from durable_nb._schedule import Schedule as Schedule
    from durable_nb._schedule import schedule as schedule
    from durable_nb._secrets import secret as secret
    from durable_nb._service.mounted import asgi as asgi
    from durable_nb._verbs import idempotency_key as idempotency_key
    from durable_nb._verbs import now as now
    from durable_nb._verbs import patched as patched
    from durable_nb._verbs import random as random
    from durable_nb._verbs import report as report
    from durable_nb._verbs import run as run
    from durable_nb._verbs import sleep as sleep
    from durable_nb._verbs import sleep_until as sleep_until
    from durable_nb._verbs import step as step
    from durable_nb._verbs import uuid4 as uuid4
    from durable_nb._webhook import Webhook as Webhook
    from durable_nb._webhook import webhook as webhook
    from durable_nb._workflow import Run as Run
    from durable_nb._workflow import cancel as cancel
    from durable_nb._workflow import get_run as get_run
    from durable_nb._workflow import invoke as invoke
    from durable_nb._workflow import resume as resume
    from durable_nb._workflow import runs as runs
    from durable_nb._workflow import this_run as current_run  # noqa: F401
    from durable_nb._workflow import workflow as workflow
    from durable_nb.errors import CorruptStoreError as CorruptStoreError
    from durable_nb.errors import DurableError as DurableError
    from durable_nb.errors import LeaseLost as LeaseLost
    from durable_nb.errors import NestedStepError as NestedStepError
    from durable_nb.errors import NonDeterminismError as NonDeterminismError
    from durable_nb.errors import NonRetryableError as NonRetryableError
    from durable_nb.errors import NotInRunError as NotInRunError
    from durable_nb.errors import NotSupportedError as NotSupportedError
    from durable_nb.errors import RetryAfter as RetryAfter
    from durable_nb.errors import RunCancelled as RunCancelled
    from durable_nb.errors import RunConflictError as RunConflictError
    from durable_nb.errors import RunNotFoundError as RunNotFoundError
    from durable_nb.errors import RunSuspended as RunSuspended
    from durable_nb.errors import RunTimeout as RunTimeout
    from durable_nb.errors import StepFailed as StepFailed
    from durable_nb.errors import StepInterrupted as StepInterrupted
    from durable_nb.errors import StepNotFoundError as StepNotFoundError
    from durable_nb.errors import StepTimeout as StepTimeout
    from durable_nb.errors import StoreError as StoreError
    from durable_nb.errors import UnserializableError as UnserializableError
    from durable_nb.errors import UntrustedStoreError as UntrustedStoreError
    from durable_nb.http import AsyncClient as AsyncClient
    from durable_nb.http import Client as Client
    from durable_nb.http import call as call

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("AsyncClient", "Client", "call"), "durable_nb.http"),
    **dict.fromkeys(("Schedule", "schedule"), "durable_nb._schedule"),
    "asgi": "durable_nb._service.mounted",
    **dict.fromkeys(("Webhook", "webhook"), "durable_nb._webhook"),
    **dict.fromkeys(("Decision", "Delivery", "Event"), "durable_nb._events"),
    **dict.fromkeys(("approve", "notify", "wait_for_event", "waiters"), "durable_nb._outside"),
    "secret": "durable_nb._secrets",
    "dashboard": "durable_nb._housekeeping.dashboard",
    "ChatResult": "durable_nb._chat",
    "chat": "durable_nb._chat",
    "identify": "durable_nb._fingerprint",
    "ledger": "durable_nb._ledger",
    "limit": "durable_nb._limits",
    "map": "durable_nb._fanout",
    "open": "durable_nb._engine.workflows",
    "remake": "durable_nb._cellcache.resources",
    **dict.fromkeys(
        ("Run", "cancel", "current_run", "get_run", "invoke", "resume", "runs", "workflow"), "durable_nb._workflow"
    ),
    **dict.fromkeys(("last_progress", "progress"), "durable_nb._progress"),
    "Progress": "durable_nb._facts",
    **dict.fromkeys(
        ("idempotency_key", "now", "patched", "random", "report", "run", "sleep", "sleep_until", "step", "uuid4"),
        "durable_nb._verbs",
    ),
    **dict.fromkeys(
        (
            "CorruptStoreError",
            "DurableError",
            "LeaseLost",
            "NestedStepError",
            "NonRetryableError",
            "NotInRunError",
            "NotSupportedError",
            "RetryAfter",
            "NonDeterminismError",
            "RunCancelled",
            "RunConflictError",
            "RunNotFoundError",
            "StepFailed",
            "StepInterrupted",
            "StepNotFoundError",
            "StepTimeout",
            "RunSuspended",
            "RunTimeout",
            "StoreError",
            "UnserializableError",
            "UntrustedStoreError",
        ),
        "durable_nb.errors",
    ),
}

_WITHIN = {"open": "open_store", "current_run": "this_run"}
"""What is called something else where it lives."""

__all__: list[str] = []
"""`from durable_nb import *` brings nothing: `run` and `sleep` are too common as names."""


def __getattr__(name: str) -> Any:
    """Load what is asked for, when it is asked for: loading the extension takes a few milliseconds."""
    if name not in _HOMES:
        import difflib

        meant = [f"did you mean {near!r}?" for near in difflib.get_close_matches(name, _HOMES, n=1)]
        raise AttributeError(
            f"module 'durable_nb' has no attribute {name!r}; {''.join(meant) or 'it has ' + ', '.join(sorted(_HOMES))}"
        )
    value = getattr(import_module(_HOMES[name]), _WITHIN.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_HOMES, "__version__"})


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext durable_nb`."""
    from durable_nb._ipython.extension import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """`%unload_ext durable_nb`."""
    from durable_nb._ipython.extension import unload

    unload(shell)
