"""Real ipykernel processes for tests: run cells, interrupt, kill -9, start afresh."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_client import KernelManager

import durable_nb

LOAD = "%load_ext durable_nb\nimport durable_nb as durable"


@dataclass
class Shown:
    """What one executed cell showed."""

    status: str = "?"
    stdout: str = ""
    stderr: str = ""
    result: str | None = None
    displays: list[dict[str, Any]] = field(default_factory=list)
    """Messages' contents, updates included, the package's own left out."""
    told: list[str] = field(default_factory=list)
    """What the status line said, in order."""
    views: list[dict[str, Any]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    error: str = ""
    traceback: str = ""
    seconds: float = 0.0


class Kernel:
    """A kernel whose working directory is `folder`, with everything of Jupyter's kept below it."""

    def __init__(self, folder: Path, *, env: dict[str, str] | None = None, load: bool = True) -> None:
        self.folder, self.load = folder, load
        self.env = {
            **os.environ,
            "IPYTHONDIR": str(folder / "home" / "ipython"),
            "JUPYTER_DATA_DIR": str(folder / "home" / "jupyter"),
            "MPLCONFIGDIR": str(folder / "home" / "matplotlib"),
            **(env or {}),
        }
        self.start()

    def start(self) -> None:
        """A new process, with the extension loaded."""
        for left in (2, 1, 0):
            self.manager = KernelManager(kernel_name="python3")
            self.manager.start_kernel(cwd=str(self.folder), env=self.env, stderr=subprocess.DEVNULL)
            self.client = self.manager.client()
            self.client.start_channels()
            try:
                self.client.wait_for_ready(timeout=60)
                break
            except RuntimeError:  # its ports were taken between being chosen and being bound: another worker's kernel has them
                self.close()
                if not left:
                    raise
        if self.load:
            shown = self.run(LOAD)
            assert shown.status == "ok", shown.traceback
            # A relative PYTHONPATH leads elsewhere from the kernel's folder: to whatever version is installed.
            met = self.value("durable.__file__")
            assert met == durable_nb.__file__, f"the kernel imports {met}, and the tests {durable_nb.__file__}"

    @property
    def pid(self) -> int:
        return self.manager.provisioner.process.pid

    def send(self, source: str, *, front_end: bool = True) -> str:
        return self.client.execute(source, allow_stdin=front_end)

    def run(self, source: str, *, timeout: float = 60, front_end: bool = True) -> Shown:
        return self.wait(self.send(source, front_end=front_end), timeout)

    def wait(self, message_id: str, timeout: float = 60) -> Shown:
        """Collect a cell's messages until it is done; status 'died' if the kernel is gone."""
        shown, began = Shown(), time.monotonic()
        while True:
            assert time.monotonic() - began < timeout, f"the cell is still busy after {timeout} s: {shown}"
            try:
                message = self.client.get_iopub_msg(timeout=0.2)
            except queue.Empty:
                if not self.manager.is_alive():
                    shown.status = "died"
                    return shown
                continue
            if message["parent_header"].get("msg_id") != message_id:
                continue
            content = message["content"]
            match message["msg_type"]:
                case "stream":
                    setattr(shown, content["name"], getattr(shown, content["name"]) + content["text"])
                    shown.order.append(f"{content['name']} {content['text']}")
                case "display_data" | "update_display_data" as kind:
                    self._displayed(shown, kind, content)
                case "execute_result":
                    shown.result = content["data"].get("text/plain", "")
                    shown.order.append(f"result {shown.result}")
                case "error":
                    shown.error = f"{content['ename']}: {content['evalue']}"
                    shown.traceback = "\n".join(content["traceback"])
                case "status" if content["execution_state"] == "idle":
                    break
        while True:
            reply = self.client.get_shell_msg(timeout=10)
            if reply["parent_header"].get("msg_id") == message_id:
                shown.status = reply["content"]["status"]
                break
        shown.seconds = time.monotonic() - began
        return shown

    def wait_for_text(self, message_id: str, text: str, timeout: float = 60) -> None:
        """Wait until a running cell has displayed that; what it said until then is gone."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with suppress(queue.Empty):
                message = self.client.get_iopub_msg(timeout=0.2)
                mine = message["parent_header"].get("msg_id") == message_id
                if mine and text in str(message["content"].get("data", {}).get("text/plain", "")):
                    return
        raise AssertionError(f"{text!r} was not displayed within {timeout} s")

    @staticmethod
    def _displayed(shown: Shown, kind: str, content: dict[str, Any]) -> None:
        ours = content["metadata"].get("durable_nb")
        if ours is None:
            shown.displays.append(content)
            shown.order.append(f"{kind} {' '.join(sorted(content['data']))}")
            return
        text = content["data"]["text/plain"]
        if "view" in ours:
            shown.views.append(content["data"])
            text = text.partition("\n")[0]
        if "cell" in ours or "view" not in ours:
            shown.told += [text] if shown.told[-1:] != [text] else []

    def value(self, expression: str) -> Any:
        """An expression's value, by way of its repr."""
        message_id = self.client.execute("", silent=True, user_expressions={"v": f"repr(({expression}))"})
        while True:
            reply = self.client.get_shell_msg(timeout=30)
            if reply["parent_header"].get("msg_id") == message_id:
                value = reply["content"]["user_expressions"]["v"]
                assert value["status"] == "ok", value
                return eval(eval(value["data"]["text/plain"]))

    def wait_until(self, path: Path, lines: int = 1, timeout: float = 30) -> None:
        """Wait until a file that the cell writes has that many lines."""
        deadline = time.monotonic() + timeout
        while not (path.exists() and len(path.read_text().splitlines()) >= lines):
            assert time.monotonic() < deadline, f"{path} has not {lines} lines after {timeout} s"
            time.sleep(0.01)

    def interrupt(self) -> None:
        self.manager.interrupt_kernel()

    def kill(self) -> None:
        """kill -9, as an out-of-memory killer would; then a new kernel in its place."""
        os.kill(self.pid, signal.SIGKILL)
        while self.manager.is_alive():
            time.sleep(0.01)
        self.client.stop_channels()
        self.manager.cleanup_resources()
        self.start()

    def restart(self) -> None:
        """A new kernel: everything in memory is gone."""
        self.close()
        self.start()

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@contextmanager
def kernel(folder: Path, **options: Any) -> Iterator[Kernel]:
    """A kernel for the duration of a block."""
    started = Kernel(folder, **options)
    try:
        yield started
    finally:
        started.close()
