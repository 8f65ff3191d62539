"""The command line's part for runs: `resume`, `cancel`, `restart`, `fork`, `delete`, `notify`, `approve`, and `limit`.

It sends, and executes nothing: what it asks for is on disk when it returns, and a line says who does it.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from durable_nb._current import use_engine
from durable_nb._engine import Engine
from durable_nb._engine.workflows import Workflows
from durable_nb._facts import Status
from durable_nb._housekeeping.tables import Table, count
from durable_nb._outside import decide, notify
from durable_nb._workflow import Run
from durable_nb.errors import DurableError

Listing = Callable[..., Any]
"""Adds the parser of a command."""
Opened = Callable[[Path | None], Any]
"""Opens a store for the duration of a block."""


def add_to(commands: Any, listing: Listing, opened: Opened) -> None:
    """Add the parsers of all of them."""

    def add(name: str, about: str, do: Callable[[argparse.Namespace, Workflows], tuple[str, dict[str, Any]]], more: str) -> Any:
        parser = listing(commands, name, about, more)

        def run(arguments: argparse.Namespace) -> int:
            with opened(arguments.store) as engine:
                text, facts = do(arguments, _sender(engine))
            if arguments.json:
                print(json.dumps(facts, default=str))  # noqa: T201  a command line program speaks
            else:
                print(text)  # noqa: T201
            return 0

        parser.set_defaults(run=run)
        return parser

    recorded = "What is asked for is on disk then, and a line says which process does it."
    for name, about, do in (
        ("resume", "go on with a run that was interrupted, has failed or was cancelled", _resume),
        ("restart", "begin a run anew; what is recorded of it is discarded", _restart),
    ):
        add(name, about, do, recorded).add_argument("of", metavar="RUN", help="a run's id")
    parser = add("cancel", "stop a run at its next await; completed steps are kept", _cancel, recorded)
    parser.add_argument("of", metavar="RUN", help="a run's id")
    parser.add_argument("--reason", default="", help="told to whoever waits for the run")
    parser = add("fork", "begin a new run that keeps what this one did before a step", _fork, recorded)
    parser.add_argument("of", metavar="RUN", help="a run's id")
    parser.add_argument("at", metavar="STEP", help="a step's path; it and what was asked for after it are executed anew")
    parser = add("delete", "remove a run that has ended, with its values", _delete, "Its id is free then.")
    parser.add_argument("of", metavar="RUN", help="a run's id")
    parser = add("notify", "send an event to the runs that wait for it, or will", _notify, "")
    parser.add_argument("event", metavar="EVENT", help="the event's id")
    parser.add_argument("data", metavar="JSON", nargs="?", default="null", type=_json, help="what the runs get; default null")
    parser.add_argument("--run", metavar="RUN", dest="to", default=None, help="send it to that run only")
    parser = add("approve", "answer an approval that a run waits for", _approve, "The first answer stands.")
    parser.add_argument("of", metavar="RUN", help="a run's id, or the name of a cell")
    parser.add_argument("step", metavar="STEP", help="the approval's name or path")
    parser.add_argument("--reject", action="store_true", help="answer no")
    parser.add_argument("--comment", default="", help="why")
    _limit(commands, listing, opened)


def _sender(engine: Engine) -> Workflows:
    """What sends, on that store. No workflow is defined in this process: what it is told of that is told here instead."""
    logging.getLogger("durable_nb").setLevel(logging.ERROR)
    workflows = Workflows(engine)
    use_engine(lambda: workflows)
    return workflows


def _resume(arguments: argparse.Namespace, workflows: Workflows) -> tuple[str, dict[str, Any]]:
    run = _found(arguments, workflows)
    status = workflows.status_of(run.id)
    if status is Status.COMPLETED:
        raise DurableError(f"the run {run.id!r} is completed; there is nothing to resume")
    run.resume()
    return _told(workflows, run.id, "goes on")


def _restart(arguments: argparse.Namespace, workflows: Workflows) -> tuple[str, dict[str, Any]]:
    run = _found(arguments, workflows)
    run.restart()
    return _told(workflows, run.id, "begins anew")


def _cancel(arguments: argparse.Namespace, workflows: Workflows) -> tuple[str, dict[str, Any]]:
    run = _found(arguments, workflows)
    status = workflows.status_of(run.id)
    if status in (Status.COMPLETED, Status.FAILED, Status.CANCELLED):
        raise DurableError(f"the run {run.id!r} is {status} already")
    run.cancel(arguments.reason)
    record, lease = workflows.catalog.find(run.id)
    executor = workflows.catalog.executor(lease)
    said = f"is being cancelled{executor}; its completed steps are kept" if executor else "is cancelled"
    return f"{run.id} · {said}", {"id": run.id, "status": workflows.catalog.status(record, lease)}


def _fork(arguments: argparse.Namespace, workflows: Workflows) -> tuple[str, dict[str, Any]]:
    fork = _found(arguments, workflows).fork(at=arguments.at)
    return _told(workflows, fork.id, f"is a fork of {arguments.of} at {arguments.at}: it begins")


def _delete(arguments: argparse.Namespace, workflows: Workflows) -> tuple[str, dict[str, Any]]:
    _found(arguments, workflows).delete()
    return f"{arguments.of} · is deleted, and its values with it", {"id": arguments.of}


def _notify(arguments: argparse.Namespace, _: Workflows) -> tuple[str, dict[str, Any]]:
    sent = notify(arguments.event, arguments.data, run_id=arguments.to)
    waited = f"delivered to {', '.join(sent.run_ids)}" if sent.run_ids else "no run waits for it; kept for those that will"
    facts = {"event_id": sent.event_id, "run_ids": list(sent.run_ids), "buffered": sent.buffered}
    return f"{sent.event_id} · {waited}", facts


def _approve(arguments: argparse.Namespace, _: Workflows) -> tuple[str, dict[str, Any]]:
    approved = not arguments.reject
    decide(arguments.of, arguments.step, approved=approved, comment=arguments.comment)
    said = "approved" if approved else "rejected"
    return f"{arguments.of} · {arguments.step} is {said}", {
        "id": arguments.of, "step": arguments.step, "approved": approved,
    }  # fmt: skip


def _found(arguments: argparse.Namespace, workflows: Workflows) -> Run:
    workflows.check(arguments.of)
    return Run(arguments.of, workflows)


def _told(workflows: Workflows, run_id: str, what: str) -> tuple[str, dict[str, Any]]:
    """Who does what was asked for."""
    record, lease = workflows.catalog.find(run_id)
    executor = workflows.catalog.executor(lease).removeprefix(" in ")
    if executor:
        who = f"in {executor}"
    elif record.home and not record.home.endswith((".py", ".ipynb")):
        who = f"when a process runs that imports {record.home!r}: durable-nb worker {record.home}"
    else:
        who = f"when {record.home or 'the notebook that defines it'} runs: durable.resume() there"
    status = workflows.catalog.status(record, lease)
    facts = {"id": record.id, "workflow": record.name, "status": status, "executor": executor or None, "home": record.home}
    return f"{record.id} · {what} {who}", facts


def _limit(commands: Any, listing: Listing, opened: Opened) -> None:
    parser = listing(commands, "limit", "the limits of a store: who holds shares, and how many wait")

    def run(arguments: argparse.Namespace) -> int:
        with opened(arguments.store) as engine:
            found = engine.shared.limits.all()
            path = engine.store.path
        if arguments.json:
            print(json.dumps({"store": str(path), "limits": found}))  # noqa: T201
        else:
            rows = [
                (one["name"], str(one["concurrency"] or ""), one["rate"] or "", str(one["held"]), str(one["waiting"]))
                for one in found
            ]
            Table(f"{count(len(rows), 'limit')} of {path}", ("limit", "at once", "rate", "held", "waiting"), rows).show()
        return 0

    parser.set_defaults(run=run)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is not JSON ({error}); a text goes in double quotes") from None
