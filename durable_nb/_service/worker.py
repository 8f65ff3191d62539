"""`durable-nb worker MODULE`: executes the runs of a module's workflows while no notebook is open."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import random
import signal
import sys
from pathlib import Path

from durable_nb._current import use_engine, workflow_functions
from durable_nb._engine import WATCH_S, Engine
from durable_nb._engine.workflows import Workflows
from durable_nb._records import Lease
from durable_nb._store import Store
from durable_nb.errors import DurableError

AT_ONCE = 20
"""So many runs a worker takes at a time: beside others on the same store, each gets its share."""
PATIENCE_S = 20.0
"""So long a worker that is told to stop waits for step bodies that have begun."""

log = logging.getLogger("durable_nb")


def work(module: str, store: Path, *, patience_s: float = PATIENCE_S) -> None:
    """Execute runs until SIGTERM or Ctrl-C. DurableError where the module doesn't import or has no workflow."""
    imported(module)
    opened = Store(store)
    try:
        asyncio.run(_work(Workflows(Engine(opened)), patience_s))
    finally:
        opened.close()


def imported(module: str) -> list[str]:
    """Import a module, by its name or its file's; the names of the workflows that there are now."""
    folder, name = str(Path.cwd()), module
    if module.endswith(".py"):
        path = Path(module).absolute()
        folder, name = str(path.parent), path.stem
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        importlib.import_module(name)
    except Exception as error:
        raise DurableError(
            f"the module {module!r} can't be imported: {type(error).__name__}: {error}; nothing was run"
        ) from error
    if not workflow_functions:
        raise DurableError(f"the module {module!r} has no workflow: an async function below @durable.workflow. Nothing was run")
    return sorted(workflow_functions)


async def _work(workflows: Workflows, patience_s: float) -> None:
    use_engine(lambda: workflows)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    log.info("works for %s on %s", ", ".join(sorted(workflow_functions)), workflows.engine.store.path)
    await take_runs(workflows, stop)
    for number in (signal.SIGTERM, signal.SIGINT):  # told again, it ends at once
        loop.remove_signal_handler(number)
    log.info("stops; others go on with its runs")
    await workflows.retire(patience_s)


async def take_runs(workflows: Workflows, stop: asyncio.Event) -> None:
    """Execute the runs that nobody executes and what is due by the clock, until told to stop."""
    workflows.schedules.watch()
    known: dict[tuple[str, bytes], Lease | None] = {}
    while not stop.is_set():
        free = await workflows.engine.store.writer.call(lambda: workflows.free(known))
        for run_id in random.sample(free, min(AT_ONCE, len(free))):
            workflows.take(run_id, unasked=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), WATCH_S)
