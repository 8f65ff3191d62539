"""Executes the notebooks that come with the package and saves them with what they show: `make notebooks`.

Each runs in a folder and a store of its own, in a new kernel, in UTC, as a front end would run it. What is saved names no
place and no person: paths of that folder are left out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat

HERE = Path(__file__).parent.parent
NOTEBOOKS = HERE / "notebooks"
COPIES = {"01_order.ipynb": HERE / "durable_nb" / "_demo" / "01_order.ipynb"}
"""The demo ships the same notebook."""
_CELL_FILE = re.compile(r"\S*/ipykernel_\d+/\d+\.py")


class Client(nbclient.NotebookClient):
    """nbclient, which asks as a front end does: so the lines and the views are shown."""

    async def async_start_new_kernel_client(self, **options: Any) -> Any:
        client = await super().async_start_new_kernel_client(**options)
        client.allow_stdin = True
        return client


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook after all its cells were executed in `folder`, without what tells of this machine."""
    notebook = nbformat.read(path, as_version=4)
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("ORDER_", "DURABLE_NB_"))},
        "DURABLE_NB_KEY_FILE": str(folder.parent / "key"),
        "IPYTHONDIR": str(folder.parent / "ipython"),
        "JUPYTER_DATA_DIR": str(folder.parent / "jupyter"),
        "TZ": "UTC",
    }
    resources = {"metadata": {"path": str(folder)}}
    client = Client(
        notebook, kernel_name="python3", timeout=600, record_timing=False, store_widget_state=False, resources=resources
    )
    client.execute(env=env, stderr=subprocess.DEVNULL)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [placeless(output, folder) for output in cell.outputs]
    return notebook


def placeless(node: Any, folder: Path) -> Any:
    """The same without the paths of this machine, in all its texts."""
    if isinstance(node, str):
        return _CELL_FILE.sub("the cell", node).replace(f"{folder}/", "").replace(str(folder), ".")
    if isinstance(node, list):
        return [placeless(part, folder) for part in node]
    if isinstance(node, dict):
        return nbformat.from_dict({name: placeless(part, folder) for name, part in node.items()})
    return node


def main(names: list[str]) -> None:
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if names and not any(name in path.name for name in names):
            continue
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made).resolve() / "notebooks"
            shutil.copytree(NOTEBOOKS, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "data", "*.log"))
            notebook = executed(path, folder)
        nbformat.write(notebook, path)
        if copy := COPIES.get(path.name):
            copy.write_bytes(path.read_bytes())
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
