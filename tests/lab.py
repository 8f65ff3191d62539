"""A real JupyterLab in a real Chromium, for promises about what a user sees.

A test file that wants it says `pytest_plugins = ["lab"]` and asks for the fixture `lab`. One server and one browser
serve a whole session; each test opens a notebook of its own, with a kernel of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

CHROMIUM = Path(os.environ.get("DURABLE_NB_CHROMIUM", "/usr/bin/chromium"))
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_PATIENCE_S = 60.0
_PANEL = "window.jupyterapp.shell.currentWidget"
_SETTLED = f"""() => {{
  const kernel = {_PANEL}?.sessionContext?.session?.kernel;
  return kernel?.status === "idle" && kernel.connectionStatus === "connected";
}}"""


class Lab:
    """One JupyterLab server and one browser page on it. All files are below `home`; `root` holds the notebooks."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.root = home / "notebooks"
        self.console: list[tuple[str, str]] = []
        """The warnings and errors of the page, as (kind, text), since the last `open` or `reload`."""
        self.outside: list[str] = []
        """Addresses beyond this machine that the page asked for, ever."""
        self._server: subprocess.Popen[bytes] | None = None
        self.page: Any = None
        """Playwright's page. It lives on a thread of its own: use it within `on_page` only."""
        # playwright's blocking face leaves a running loop on its thread, and asyncio.run would refuse to run there
        self._browser_thread = ThreadPoolExecutor(1, "browser")

    def start(self) -> None:
        """Start server and browser; return when both answer."""
        self.root.mkdir(parents=True)
        self._keep_quiet()
        self._start_server()
        self.on_page(self._start_browser)

    def close(self) -> None:
        """Stop the browser, the server and its kernels. Also right after a start that failed half-way."""
        with contextlib.suppress(Exception):
            self.on_page(self._stop_browser)
        self._browser_thread.shutdown()
        if self._server is None:
            return
        self._server.terminate()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._log.close()

    # notebooks

    def write_notebook(self, cells: Sequence[str], name: str | None = None) -> str:
        """Write a notebook of code cells; return its name."""
        name = name or f"{uuid.uuid4().hex[:8]}.ipynb"
        body = [
            {
                "cell_type": "code",
                "id": f"cell-{i}",
                "metadata": {},
                "source": source,
                "outputs": [],
                "execution_count": None,
            }
            for i, source in enumerate(cells)
        ]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        notebook = {"cells": body, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
        (self.root / name).write_text(json.dumps(notebook))
        return name

    def open(self, name: str) -> None:
        """Open a notebook, alone on the page; return when its kernel is connected and idle."""
        self.console.clear()
        self.on_page(lambda page: page.goto(f"{self.base}/lab/tree/{name}?reset", wait_until="domcontentloaded"))
        self._settle()

    def reload(self) -> None:
        """Load the page again, as F5 does: the kernel lives on. Returns when the notebook is drawn."""
        self.console.clear()
        self.on_page(lambda page: page.reload(wait_until="domcontentloaded"))
        self.on_page(lambda page: page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=_PATIENCE_S * 1000))

    def run_all(self) -> None:
        """Start to run all cells; return when the kernel is at it. `wait_idle` waits for the end."""
        self.evaluate(
            f"""() => {{
              window.durableBusy = false;
              {_PANEL}.sessionContext.session.kernel.statusChanged.connect((_, status) => {{
                if (status === "busy") window.durableBusy = true;
              }});
            }}"""
        )
        for _ in range(8):  # while the session settles JupyterLab drops the command without a word
            self.command("notebook:run-all-cells")
            with contextlib.suppress(TimeoutError):
                self.wait("() => window.durableBusy", 2.5)
                return
        raise RuntimeError("JupyterLab never ran the cells")

    def wait_idle(self, patience_s: float = _PATIENCE_S) -> None:
        """Wait until no cell is running and none is queued."""
        self.wait(
            f"""() => {_PANEL}.sessionContext.session?.kernel?.status === "idle"
              && [...{_PANEL}.content.model.cells].every((cell) => (cell.executionState ?? "idle") === "idle")""",
            patience_s,
        )

    def outputs(self, cell: int) -> list[dict[str, Any]]:
        """Return a cell's outputs as the notebook would save them now."""
        found: list[dict[str, Any]] = self.evaluate(f"(cell) => {_PANEL}.content.model.cells.get(cell).outputs.toJSON()", cell)
        return found

    def save(self) -> None:
        """Save the notebook to its file."""
        self.evaluate(f"() => {_PANEL}.context.save().then(() => true)")

    # kernels

    def kernel_pid(self) -> int:
        """Return the process id of the open notebook's kernel; it may be busy."""
        import psutil

        assert self._server is not None
        kernel_id = self.evaluate(f"() => {_PANEL}.sessionContext.session.kernel.id")
        for process in psutil.Process(self._server.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(f"kernel-{kernel_id}.json" in part for part in process.cmdline()):
                    return int(process.pid)
        raise RuntimeError("the notebook has no kernel process")

    def kill_kernel(self) -> None:
        """SIGKILL the kernel, as the system does that is out of memory. `wait_reborn` waits for the next."""
        os.kill(self.kernel_pid(), signal.SIGKILL)

    def wait_reborn(self) -> None:
        """After `kill_kernel`: answer JupyterLab's dialog; return when the kernel that the server started is idle."""
        self.on_page(lambda page: page.click(".jp-Dialog button.jp-mod-accept", timeout=_PATIENCE_S * 1000))
        # the dead kernel's last status stays for a moment: believe only an answer
        self.wait(
            f"""() => Promise.race([
              {_PANEL}.sessionContext.session.kernel.requestKernelInfo().then((reply) => Boolean(reply), () => false),
              new Promise((resolve) => setTimeout(() => resolve(false), 1000)),
            ])""",
            _PATIENCE_S,
        )
        self._settle()

    def restart_kernel(self) -> None:
        """Restart the kernel as the menu does, without its question; return when the new one is idle."""
        self.evaluate(f"() => {_PANEL}.sessionContext.restartKernel().then(() => true)")
        self._settle()

    # page

    def command(self, name: str, **args: Any) -> None:
        """Start one of JupyterLab's commands; don't wait for its end."""
        self.evaluate("([name, args]) => { window.jupyterapp.commands.execute(name, args); }", [name, args])

    def theme(self, name: str) -> None:
        """Put on a theme: `JupyterLab Light` or `JupyterLab Dark`."""
        self.evaluate(
            "(theme) => window.jupyterapp.commands.execute('apputils:change-theme', { theme }).then(() => true)", name
        )
        light = "false" if "Dark" in name else "true"
        self.wait(
            f"""() => document.body.dataset.jpThemeLight === '{light}'
              && !document.getElementById("jupyterlab-splash")"""
        )

    def text(self, selector: str = ".jp-Notebook .jp-OutputArea") -> str:
        """Return the text now shown in the first element that matches, or nothing."""
        found = self.on_page(lambda page: [node.inner_text() for node in page.query_selector_all(selector)[:1]])
        return found[0] if found else ""

    def wait_text(self, text: str, selector: str = ".jp-Notebook .jp-OutputArea", patience_s: float = 20) -> None:
        """Wait until `text` is shown in the first element that matches."""
        try:
            self.wait(
                "([selector, text]) => document.querySelector(selector)?.innerText.includes(text)",
                patience_s,
                [selector, text],
            )
        except TimeoutError:
            raise AssertionError(f"{text!r} never came in {selector}, which shows: {self.text(selector)!r}") from None

    def wait(self, condition: str, patience_s: float = 20, arg: Any = None) -> None:
        """Wait until a JavaScript function returns something true."""
        import playwright.sync_api

        try:
            self.on_page(lambda page: page.wait_for_function(condition, arg=arg, timeout=patience_s * 1000, polling=50))
        except playwright.sync_api.TimeoutError as error:
            raise TimeoutError(f"in {patience_s} s never true: {condition}") from error

    def evaluate(self, function: str, arg: Any = None) -> Any:
        """Return what a JavaScript function returns."""
        return self.on_page(lambda page: page.evaluate(function, arg))

    def click(self, selector: str) -> None:
        self.on_page(lambda page: page.click(selector, timeout=10_000))

    def screenshot(self, path: Path | str, selector: str = ".jp-Notebook") -> None:
        self.on_page(lambda page: page.locator(selector).first.screenshot(path=str(path)))

    def on_page(self, do: Callable[[Any], T]) -> T:
        """Run `do(page)` on the browser's thread and return what it returns."""
        return self._browser_thread.submit(lambda: do(self.page)).result()

    # starting and stopping

    def _keep_quiet(self) -> None:
        """Switch off the question for news, which covers a corner of the page."""
        quiet = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
        config = self.home / "config" / "labconfig"
        config.mkdir(parents=True)
        (config / "page_config.json").write_text(json.dumps(quiet))

    def _start_server(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.base = f"http://127.0.0.1:{port}"
        package = find_spec("durable_nb")
        assert package is not None
        assert package.submodule_search_locations is not None
        here = str(Path(next(iter(package.submodule_search_locations))).parent)
        self._log = (self.home / "server.log").open("wb")
        self._server = subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-m",
                    "jupyterlab",
                    "--no-browser",
                    "--allow-root",
                    "--ip=127.0.0.1",
                    f"--port={port}",
                ),
                "--ServerApp.port_retries=0",
                f"--ServerApp.root_dir={self.root}",
                "--IdentityProvider.token=",
                "--ServerApp.password=",
                "--LabApp.news_url=None",
                "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
                "--LabApp.expose_app_in_browser=True",
            ],
            cwd=self.root,
            env={
                **os.environ,
                # the kernels import the package that is being tested, be it a checkout or an installed wheel
                "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
                "JUPYTER_CONFIG_DIR": str(self.home / "config"),
                "JUPYTER_DATA_DIR": str(self.home / "data"),
                "JUPYTER_RUNTIME_DIR": str(self.home / "runtime"),
                "IPYTHONDIR": str(self.home / "ipython"),
            },
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline and self._server.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.base}/api", timeout=2):
                return
            time.sleep(0.1)
        raise RuntimeError(f"JupyterLab never answered: {(self.home / 'server.log').read_text()[-2000:]}")

    def _start_browser(self, _page: None) -> None:
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=str(CHROMIUM), headless=True, args=FLAGS)
        self.page = self._browser.new_page(viewport={"width": 1300, "height": 900})
        self.page.on("request", self._note_request)
        self.page.on("console", self._note_console)
        self.page.on("pageerror", lambda error: self.console.append(("error", str(error))))

    def _stop_browser(self, _page: Any) -> None:
        self._browser.close()
        self._playwright.stop()

    def _note_request(self, request: Any) -> None:
        if not request.url.startswith((self.base, self.base.replace("http", "ws", 1), "data:", "blob:")):
            self.outside.append(request.url)

    def _note_console(self, message: Any) -> None:
        # JupyterLab's own, of a kernel that is restarted while its debugger is asked
        if message.type in {"error", "warning"} and "restore the debugger state" not in message.text:
            self.console.append((message.type, message.text))

    def _settle(self) -> None:
        self.on_page(lambda page: page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=_PATIENCE_S * 1000))
        self.wait(_SETTLED, _PATIENCE_S)


def missing() -> str:
    """Return what this machine lacks for a `Lab`, or nothing."""
    wanted = ["jupyterlab", "playwright", "psutil"]
    lacking = [name for name in wanted if find_spec(name) is None]
    if not CHROMIUM.exists():
        lacking.append(str(CHROMIUM))
    return ", ".join(lacking)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A started JupyterLab. Without a Chromium tests that ask for it are skipped, but in CI they fail."""
    if lacking := missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"a browser test needs {lacking}")
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        lab.start()
        yield lab
    finally:
        lab.close()
