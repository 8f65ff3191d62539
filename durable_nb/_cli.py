"""The command line: `durable-nb`, also as `jupyter durable`.

A command is a function that adds its parser and says what it runs. Status 0: done; 1: tried, and failed; 2: bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import durable_nb
from durable_nb.errors import DurableError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except DurableError as error:
        print(f"durable-nb: {error}", file=sys.stderr)  # noqa: T201  a command line program speaks
        return 1
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Bad input is told in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see '{self.prog} --help'\n")


def _parser() -> _Parser:
    parser = _Parser(prog="durable-nb", description="Durable functions for Jupyter.")
    parser.add_argument("--version", action="version", version=f"durable-nb {durable_nb.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    from durable_nb._housekeeping.commands import add_to

    _demo(commands)
    _run(commands)
    _worker(commands)
    _serve(commands)
    add_to(commands)
    return parser


def _demo(commands: Any) -> None:
    from durable_nb._demo.verdict import KILLS

    parser = commands.add_parser(
        "demo",
        help="run an order flow in a real kernel, kill it half-way, and prove what ran how often",
        description="Runs a notebook in a real kernel and kills that with SIGKILL half-way; then twice in new kernels. Prints "
        "which step ran where. Status 0 only if no finished step ran twice and the customer was charged once.",
    )
    parser.add_argument("--kill", choices=list(KILLS), default="sleep", help="the step in which the kernel is killed")

    def run(arguments: argparse.Namespace) -> int:
        from durable_nb._demo.runner import demo

        return demo(arguments.kill)

    parser.set_defaults(run=run)


def _run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="execute a notebook to its end, over crashes and long waits",
        description="Executes a notebook in a kernel. At a wait longer than --max-wait the kernel ends, and is started again "
        "when the time has come or what it waits for is there; completed durable cells are restored, plain cells run again. "
        "Status 0: done; 1: a cell has failed, or the kernel died again and again; 75, with --once: it waits.",
    )
    parser.add_argument("notebook", metavar="NOTEBOOK", type=Path)
    parser.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set a parameter, as papermill does: in a cell behind the one tagged 'parameters'",
    )  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, help="where the executed notebook is saved; default NOTEBOOK.out.ipynb")
    parser.add_argument("--once", action="store_true", help="end at a long wait, with status 75, instead of waiting")
    parser.add_argument("--max-wait", default="10s", help="a longer wait ends the kernel; default 10s")
    parser.add_argument("--json", action="store_true", help="print how it ended as JSON, and no progress")

    def run(arguments: argparse.Namespace) -> int:
        import json

        from durable_nb._service import headless

        notebook, out = arguments.notebook, arguments.out
        parameters = {name: headless.value_of(value) for name, value in arguments.parameter}
        order = headless.Order(notebook, out or notebook.with_suffix(".out.ipynb"), parameters, arguments.max_wait)
        try:
            order.check()
        except ValueError as error:
            parser.error(str(error))
        status, facts = headless.run(order, once=arguments.once, say=headless.quietly if arguments.json else _say)
        if arguments.json:
            print(json.dumps(facts))  # noqa: T201
        elif status == 1:
            print(f"durable-nb: {facts['error']}", file=sys.stderr)  # noqa: T201
        return status

    parser.set_defaults(run=run)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  a command line program speaks


def _worker(commands: Any) -> None:
    parser = commands.add_parser(
        "worker",
        help="execute the runs of a module's workflows while no notebook is open",
        description="Goes on with interrupted runs of the module's workflows, starts what is due by the clock, and takes what "
        "others resume, until SIGTERM or Ctrl-C. Several workers on one store share the runs; killed, a worker is succeeded "
        "at once.",
    )
    parser.add_argument("module", metavar="MODULE", help="a module's name, or the path of its file")
    parser.add_argument("--store", type=Path, help="the store's folder; default DURABLE_NB_DIR, else .durable_nb")

    def run(arguments: argparse.Namespace) -> int:
        from durable_nb._files import default_store
        from durable_nb._service.worker import work

        _log("worker")
        work(arguments.module, (arguments.store or default_store()).absolute())
        return 0

    parser.set_defaults(run=run)


def _serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="start, control and follow the runs of a module's workflows over HTTP",
        description="A worker that can be asked over HTTP. Listens on this machine only, unless --host says otherwise and "
        "DURABLE_NB_TOKEN holds what clients must show.",
    )
    parser.add_argument("module", metavar="MODULE", help="a module's name, or the path of its file")
    parser.add_argument("--store", type=Path, help="the store's folder; default DURABLE_NB_DIR, else .durable_nb")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; default 127.0.0.1")
    parser.add_argument("--port", type=int, default=8910, help="default 8910; 0 for any that is free")
    parser.add_argument("--url", default="", help="where it is reached from outside, for webhooks; default DURABLE_NB_URL")

    def run(arguments: argparse.Namespace) -> int:
        from durable_nb._files import default_store

        try:
            from durable_nb._service.serve import serve
        except ImportError as error:
            raise DurableError(f"{error.name} is not installed: pip install 'durable-nb[serve]'") from None
        _log("serve")
        if arguments.url:
            os.environ["DURABLE_NB_URL"] = arguments.url
        serve(arguments.module, (arguments.store or default_store()).absolute(), arguments.host, arguments.port)
        return 0

    parser.set_defaults(run=run)


def _log(command: str) -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s durable-nb {command}: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
