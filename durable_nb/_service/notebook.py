"""One execution of a notebook in a kernel, for `durable-nb run`: in a process of its own, so that waiting needs little memory.

    python -m durable_nb._service.notebook '{"notebook": ..., "out": ..., "parameters": {...}, "max_wait": "10s", "result": 3}'

Its progress goes to standard output, how it ended as JSON to the file descriptor `result`. It ends when standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, cast

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from durable_nb._clock import say_duration

_LOOK_S = 0.5
_ASK = "__import__('durable_nb._ipython.headless', fromlist=['standing']).standing(resume={resume})"

Result = dict[str, Any]


class Execution:
    """Of one notebook, from its first cell to its end, its failure, or a wait."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._path, self._out = Path(order["notebook"]), Path(order["out"])
        self._environment = {**os.environ, "JPY_SESSION_NAME": str(self._path), "JPY_PARENT_PID": str(os.getpid())}
        if order["max_wait"]:
            self._environment["DURABLE_NB_MAX_WAIT"] = order["max_wait"]
        self._waits_s = order["waits_s"]
        self._notebook = nbformat.read(self._path, as_version=4)
        if order["parameters"]:
            inject(self._notebook, order["parameters"])
        self._sockets = tempfile.TemporaryDirectory(prefix="durable-nb-", ignore_cleanup_errors=True)
        self._client = NotebookClient(
            self._notebook, timeout=None, resources={"metadata": {"path": str(self._path.parent)}}, record_timing=True
        )

    async def run(self) -> Result:
        """Execute it; how that ended."""
        for cell in self._notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        try:
            manager: Any = self._client.create_kernel_manager()
            if os.name == "posix":  # where other users of the machine can't reach them
                manager.transport, manager.ip = "ipc", str(Path(self._sockets.name, "kernel"))
            async with self._client.async_setup_kernel(env=self._environment):
                if self._client.kc is None:
                    raise DeadKernelError("the kernel did not start")  # noqa: TRY301  as one that died later
                return await self._cells() or await self._runs()
        except DeadKernelError as error:
            return {"status": "died", "error": str(error) or "the kernel died"}
        finally:
            self._save()
            self._sockets.cleanup()

    async def _cells(self) -> Result | None:
        """Execute the cells; None where all of them have ended."""
        cells = [(at, cell) for at, cell in enumerate(self._notebook.cells) if cell.cell_type == "code" and cell.source.strip()]
        for n, (at, cell) in enumerate(cells, 1):
            title = next(line for line in cell.source.splitlines() if line.strip())[:60]
            say(f"cell {n} of {len(cells)} · {title}")
            began = time.monotonic()
            try:
                await self._client.async_execute_cell(cell, at)
            except CellExecutionError as error:
                if error.ename != "RunSuspended":
                    return {"status": "failed", "cell": n, "error": f"{error.ename}: {error.evalue}"}
                standing = await self._standing(resume=False)
                say(f"  {error.evalue}")
                return {"status": "suspended", **standing}
            finally:
                self._save()
            say(f"  {say_duration(time.monotonic() - began)}")
        return None

    async def _runs(self) -> Result:
        """Wait for the runs that the notebook has started, as long as they do something."""
        standing = await self._standing(resume=True)
        if standing["runs"]:
            say(f"waits for {', '.join(standing['runs'][:5])}")
        idle_s, manager = 0.0, cast("Any", self._client.km)
        while standing["runs"]:
            if idle_s > self._waits_s:
                return {"status": "suspended", **standing, "suspended": None}
            await asyncio.sleep(_LOOK_S)
            if not await manager.is_alive():
                raise DeadKernelError("the kernel died")
            standing = await self._standing(resume=False)
            idle_s = idle_s + _LOOK_S if standing["idle"] else 0.0
        return {"status": "completed"}

    async def _standing(self, *, resume: bool) -> dict[str, Any]:
        """As `headless.standing` tells it."""
        client: Any = self._client.kc
        message_id = client.execute("", silent=True, user_expressions={"standing": _ASK.format(resume=resume)})
        reply: Any = await self._client.async_wait_for_reply(message_id)
        told = reply["content"]["user_expressions"]["standing"]
        if told["status"] != "ok":
            raise RuntimeError(f"the kernel can't tell how its runs stand: {told['ename']}: {told['evalue']}")
        found: dict[str, Any] = json.loads(_literal(told["data"]["text/plain"]))
        return found

    def _save(self) -> None:
        with contextlib.suppress(AttributeError):  # of a kernel that never started there are no widgets
            self._client.set_widgets_metadata()
        part = self._out.with_name(f".{self._out.name}.{os.getpid()}")
        nbformat.write(self._notebook, part)
        part.replace(self._out)


def inject(notebook: Any, parameters: dict[str, Any]) -> None:
    """Set parameters as papermill does: in a cell of its own behind the one tagged `parameters`, else at the top."""
    tagged = [at for at, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    source = "\n".join(["# Parameters", *(f"{name} = {value!r}" for name, value in parameters.items())])
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]})
    if notebook.nbformat_minor < 5:
        cell.pop("id", None)
    notebook.cells = [one for one in notebook.cells if "injected-parameters" not in one.metadata.get("tags", ())]
    notebook.cells.insert(tagged[0] + 1 if tagged else 0, cell)


def say(text: str) -> None:
    """A line of progress."""
    print(text, flush=True)  # noqa: T201


def _literal(text: str) -> str:
    import ast

    found: str = ast.literal_eval(text)
    return found


def _end_with_parent() -> None:
    """Whoever has started this is gone when standard input ends: the kernel ends with its own parent, this process."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Do what the order in the first argument says."""
    order = json.loads(sys.argv[1])
    _end_with_parent()
    result = asyncio.run(Execution(order).run())
    os.write(order["result"], json.dumps(result).encode())


if __name__ == "__main__":
    main()
