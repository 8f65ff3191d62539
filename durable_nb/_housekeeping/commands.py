"""The command line's part for stores: `ls`, `show`, `schedule`, `gc`, `doctor`, `trust`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from durable_nb._clock import say_when
from durable_nb._engine import Engine
from durable_nb._engine.workflows import Workflows
from durable_nb._facts import Status
from durable_nb._files import default_store
from durable_nb._housekeeping import control, doctor, gc
from durable_nb._housekeeping.inventory import Inventory
from durable_nb._housekeeping.listings import gc_table, steps_table
from durable_nb._housekeeping.tables import Table, count
from durable_nb._store import Store
from durable_nb._view import terminal
from durable_nb._view.listing import Query
from durable_nb._view.printed import blocks
from durable_nb.errors import StoreError


def add_to(commands: Any) -> None:
    """Add the parsers of all of them."""
    for add in (_ls, _show, _schedule, _gc, _doctor, _trust):
        add(commands)
    control.add_to(commands, _listing, _opened)


def _ls(commands: Any) -> None:
    parser = _listing(commands, "ls", "the durable cells and the runs of a store")
    parser.add_argument(
        "--status", choices=[str(status) for status in Status], default="", help="cells and runs of that status"
    )
    parser.add_argument("--workflow", metavar="NAME", default="", help="runs of that workflow")
    parser.add_argument("--label", default="", help="runs with that label")
    parser.add_argument("--limit", type=_limit, default=100, help="how many of each to print, the newest; default 100")

    def run(arguments: argparse.Namespace) -> int:
        kind = "workflow" if arguments.workflow else ""
        query = Query(arguments.status, kind, arguments.workflow, arguments.label)
        with _opened(arguments.store) as engine:
            page = Inventory(engine).page(query, sys.maxsize if arguments.json else arguments.limit)
            if arguments.json:
                _tell({"store": page.path, "cells": list(map(asdict, page.cells)), "runs": list(map(asdict, page.runs))})
            else:
                terminal.show(blocks(page))
        return 0

    parser.set_defaults(run=run)


def _show(commands: Any) -> None:
    parser = _listing(commands, "show", "a run and its steps")
    parser.add_argument("of", metavar="RUN", help="a run's id, or the name of a cell or workflow: its last run")

    def run(arguments: argparse.Namespace) -> int:
        with _opened(arguments.store) as engine:
            inventory = Inventory(engine)
            found = inventory.find_run(arguments.of)
            if arguments.json:
                steps = inventory.steps_of(found).steps
                _tell({"run": asdict(found), "steps": [asdict(step) | {"preview": step.preview._asdict()} for step in steps]})
            else:
                _say(steps_table(found, inventory))
        return 0

    parser.set_defaults(run=run)


def _schedule(commands: Any) -> None:
    parser = _listing(commands, "schedule", "what is started by the clock")

    def run(arguments: argparse.Namespace) -> int:
        with _opened(arguments.store) as engine:
            found = Workflows(engine).schedules.all()
            path = engine.store.path
        if arguments.json:
            _tell({"store": str(path), "schedules": list(map(asdict, found))})
        else:
            rows = [
                (
                    one.name,
                    one.workflow,
                    f"{one.cron} {one.tz}",
                    "paused" if one.paused else say_when(one.next_at),
                    one.last_run,
                )
                for one in found
            ]
            title = f"{count(len(rows), 'schedule')} of {path}"
            _say(Table(title, ("schedule", "workflow", "due", "next", "last run"), rows))
        return 0

    parser.set_defaults(run=run)


def _gc(commands: Any) -> None:
    parser = _listing(
        commands,
        "gc",
        "make room: what nothing refers to goes, and above a size the entries worth least",
        "An entry is worth what running its cell takes, by its size, halved for each week without use. The newest entry of a "
        "cell that was used within 30 days stays, and so do all steps. Safe while kernels use the store.",
    )
    parser.add_argument("--max-size", type=_size, help="of the whole store, as in 2GB; default DURABLE_NB_MAX_SIZE, else none")

    def run(arguments: argparse.Namespace) -> int:
        try:
            max_size = gc.default_max_size() if arguments.max_size is None else arguments.max_size
        except ValueError as error:
            parser.error(str(error))
        with _opened(arguments.store) as engine:
            done = gc.collect(engine, max_size)
        if arguments.json:
            _tell(asdict(done))
        else:
            _say(gc_table(done))
        return 0

    parser.set_defaults(run=run)


def _doctor(commands: Any) -> None:
    parser = _listing(
        commands, "doctor", "look whether a store is sound", "Changes nothing. Status 1 where something is not as it should be."
    )
    parser.add_argument("--verify", action="store_true", help="compare every byte of stored cells, however large")

    def run(arguments: argparse.Namespace) -> int:
        with _opened(arguments.store) as engine:
            found = doctor.examine(engine.store, verify=arguments.verify)
            path = engine.store.path
        if arguments.json:
            _tell({"store": str(path), **asdict(found)})
        else:
            rows = [(finding.where, finding.what, finding.remedy) for finding in found.findings]
            seen = ", ".join(
                (count(found.rows, "record"), count(found.values, "large value"), count(found.entries, "entry", "entries"))
            )
            title = f"{path}: {seen}; " + (count(len(rows), "finding") if rows else "sound")
            _say(Table(title, ("where", "found", "what to do"), rows, [f"note: {note}" for note in found.notes]))
        return 1 if found.findings else 0

    parser.set_defaults(run=run)


def _trust(commands: Any) -> None:
    parser = commands.add_parser(
        "trust",
        help="sign a store that another key has signed",
        description="Signs with your key what another key has signed, after asking. Restoring it executes whatever its "
        "writer put there, so do this only with a store of your own, or of somebody whose code you would run.",
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="the store's folder")
    parser.add_argument("--yes", action="store_true", help="don't ask")
    parser.add_argument("--json", action="store_true", help="print JSON")

    def run(arguments: argparse.Namespace) -> int:
        with _opened(arguments.path) as engine:
            found = doctor.foreign(engine.store)
            what = f"{count(len(found.rows), 'record')} and {count(found.entries, 'entry', 'entries')}"
            path = engine.store.path
            if (found.rows or found.entries) and not arguments.yes and not _agreed(path, what):
                _warn(f"durable-nb trust: nothing was signed; {what} of {path} stay unread")
                return 1
            rows, entries = doctor.trust(engine.store)
        if arguments.json:
            _tell({"store": str(path), "rows": rows, "entries": entries})
        else:
            _say(Table(f"signed {count(rows, 'record')} and {count(entries, 'entry', 'entries')} of {path}"))
        return 0

    parser.set_defaults(run=run)


def _agreed(path: Path, what: str) -> bool:
    if not sys.stdin.isatty():
        _warn("durable-nb trust: there is nobody to ask here; --yes signs without asking")
        return False
    _warn(f"{what} of {path} were signed with another key.\nRestoring them can execute anything that their writer put there.")
    _warn("Sign them with your key? Type 'yes': ")
    return sys.stdin.readline().strip() == "yes"


def _listing(commands: Any, name: str, about: str, more: str = "") -> Any:
    parser = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}. {more}".strip())
    parser.add_argument("--store", type=Path, help="the store's folder; default DURABLE_NB_DIR, else .durable_nb")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[Engine]:
    """An engine on a store that is there: looking must not make one."""
    folder = (path or default_store()).absolute()
    if not (folder / "store.json").is_file():
        raise StoreError(f"no store in {folder}; nothing was made. Name its folder with --store, or set DURABLE_NB_DIR")
    engine = Engine(Store(folder))
    try:
        yield engine
    finally:
        engine.store.close()


def _size(text: str) -> int:
    try:
        return gc.parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _limit(text: str) -> int:
    try:
        found = int(text)
    except ValueError:
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of lines; write --limit 100")
    return found


def _tell(facts: object) -> None:
    sys.stdout.write(json.dumps(facts, indent=2, default=str) + "\n")


def _say(table: Table) -> None:
    table.show()


def _warn(text: str) -> None:
    sys.stderr.write(text + "\n")
