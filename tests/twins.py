"""Notebooks without a kernel, each in a process of its own, by the dozen per second: what a session left behind, as text.

`python twins.py` is a server that has imported what sessions need, and forks for each: the child has a real IPython shell and
the real extension, but no ipykernel. What it left behind is described independently of the package's own hashing.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import struct
import subprocess
import sys
import traceback
import types
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

HIDDEN = {"In", "exit", "quit", "get_ipython", "durable"}


# -- the side of the test -----------------------------------------------------------------------------------------------


class Twins:
    """Runs sessions; `run` gives what one left behind."""

    def __init__(self, folder: Path) -> None:
        environ = {
            **os.environ,
            "OPENBLAS_NUM_THREADS": "1",
            "IPYTHONDIR": str(folder / "home" / "ipython"),
            "JUPYTER_DATA_DIR": str(folder / "home" / "jupyter"),
            "MPLCONFIGDIR": str(folder / "home" / "matplotlib"),
        }
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True
        )

    def run(self, cells: list[str], folder: Path | None = None) -> dict:
        """A new session in `folder`, its extension loaded, executes `cells`."""
        self._server.stdin.write(json.dumps({"folder": str(folder or self._folder), "cells": cells}) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the session ended before its time"
        left = json.loads(answer)
        assert "crash" not in left, left["crash"]
        return left

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()


@contextmanager
def twins(folder: Path):
    started = Twins(folder)
    try:
        yield started
    finally:
        started.close()


# -- the side of the session --------------------------------------------------------------------------------------------


def serve() -> None:
    import numpy as np  # noqa: F401  imported once, for all sessions
    import pandas as pd  # noqa: F401

    import durable_nb._engine
    import durable_nb._store  # noqa: F401

    shell, told = new_shell()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        out, into = os.pipe()
        child = os.fork()
        if not child:
            os.close(out)
            try:
                answer = session(shell, told, request["folder"], request["cells"])
            except BaseException:
                answer = {"crash": traceback.format_exc()}
            with os.fdopen(into, "w") as pipe:
                json.dump(answer, pipe)
            os._exit(0)
        os.close(into)
        with os.fdopen(out) as pipe:
            found = pipe.read()
        os.waitpid(child, 0)
        answers.write((found or '{"crash": "no answer"}') + "\n")
        answers.flush()


def new_shell():
    """A shell that tells its displays to stdout, and a status line that only takes notes."""
    from IPython.core.displaypub import DisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    from durable_nb._ipython import cell, status

    class Publisher(DisplayPublisher):
        stream = None  # not sys.stdout: what is published is not printed

        def publish(self, data, metadata=None, transient=None, update=False, **_):
            self.stream.write(f"<display {sorted(data.items())} {metadata or {}} {transient or {}} {update}>")

        def clear_output(self, wait=False):
            self.stream.write(f"<clear {wait}>")

    class Line(status.StatusLine):
        told: ClassVar[list[str]] = []

        def show(self, state, text):
            self.told.append(f"{state}: {text}")

        def restored(self, *_):
            self.told.append("restored")

        def not_stored(self, why):
            self.told.append(f"not stored: {why}")

        def warn(self, text):
            self.told.append(f"warning: {text}")

    cell.StatusLine = Line
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    InteractiveShell.display_pub_class = Publisher
    return InteractiveShell.instance(config=config), Line.told


def session(shell, told: list[str], folder: str, cells: list[str]) -> dict:
    """Execute the cells; `told` is what the status lines said."""
    os.chdir(folder)
    sys.path.insert(0, "")
    executed(shell, "%load_ext durable_nb\nimport durable_nb as durable")
    shown = [executed(shell, source) for source in cells]
    return {"state": Picture(shell.user_ns).lines(), "shown": shown, "told": told}


def executed(shell, source: str) -> tuple[str, str, str]:
    """What a cell showed on stdout and stderr, and how it failed."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    shell.display_pub.stream = sys.stdout
    try:
        result = shell.run_cell(source, store_history=True)
        shown = [re.sub("0x[0-9a-f]{6,}", "0x", stream.getvalue()) for stream in (sys.stdout, sys.stderr)]
    finally:
        sys.stdout, sys.stderr = before
    failed = result.error_before_exec or result.error_in_exec
    return (*shown, "") if failed is None else ("", "", f"{type(failed).__name__}: {failed}")


class Picture:
    """The notebook's variables as text. An object met again is written as the path by which it was met first."""

    def __init__(self, namespace: dict) -> None:
        self._namespace = namespace
        self._paths: dict[int, str] = {}
        self._keep: list = []
        self._arrays: list = []

    def lines(self) -> dict[str, str]:
        import numpy as np

        names = [n for n in self._namespace if n not in HIDDEN and not (n.startswith("_") and n != "_")]
        found = {name: json.dumps(self._of(self._namespace[name], name)) for name in sorted(names)}
        shared = [
            (p, q, a.__array_interface__["data"][0] - b.__array_interface__["data"][0])
            for p, a in self._arrays
            for q, b in self._arrays
            if p < q and np.shares_memory(a, b)
        ]
        return {**found, "(shared memory)": str(shared)}

    def _of(self, obj, path: str):
        kind = type(obj)
        if obj is None or kind in (bool, int, str, bytes, type(...), range):
            return f"{kind.__name__} {hex(obj) if kind is int else repr(obj)}"
        if kind in (float, complex):
            return f"{kind.__name__} {struct.pack('>dd', obj.real, obj.imag).hex()}"
        if obj is self._namespace:
            return "the namespace"
        if kind is not tuple:  # whether equal tuples are one is chance
            first = self._paths.setdefault(id(obj), path)
            if first != path:
                return f"see {first}"
            self._keep.append(obj)
        elif path.count(".") > 200:
            return "deep"
        return [f"{kind.__module__}.{kind.__qualname__}", *self._parts(obj, kind, path)]

    def _each(self, objects, path: str) -> list:
        return [self._of(obj, f"{path}.{i}") for i, obj in enumerate(objects)]

    def _items(self, pairs, path: str) -> list:
        return [[self._of(k, f"{path}.key {i}"), self._of(v, f"{path}.{k!r}")] for i, (k, v) in enumerate(pairs)]

    def _parts(self, obj, kind, path: str) -> list:
        import numpy as np
        import pandas as pd

        if isinstance(obj, (np.ndarray, np.generic)):
            parts = [str(obj.dtype.descr), str(obj.shape)]
            if isinstance(obj, np.ndarray):
                self._arrays.append((path, obj))
                fortran = obj.flags.f_contiguous and not obj.flags.c_contiguous
                parts += ["Fortran" if fortran else "C", str(obj.flags.writeable)]
            return parts + (self._each(obj.ravel().tolist(), path) if obj.dtype.hasobject else [obj.tobytes().hex()])
        if isinstance(obj, pd.Index):
            del self._paths[id(obj)]  # which frames share one is pandas' own business
            return [str(obj.dtype), repr(obj.names), self._each(obj.tolist(), path), repr(getattr(obj, "freq", None))]
        if isinstance(obj, pd.Series):
            return [
                str(obj.dtype),
                repr(obj.name),
                self._of(obj.index, f"{path}.index"),
                self._each(obj.tolist(), path),
                repr(obj.attrs),
            ]
        if isinstance(obj, pd.DataFrame):
            columns = [
                [str(obj.dtypes.iloc[i]), self._each(obj.iloc[:, i].tolist(), f"{path}.{i}")] for i in range(obj.shape[1])
            ]
            return [self._of(obj.columns, f"{path}.columns"), self._of(obj.index, f"{path}.index"), columns, repr(obj.attrs)]
        if isinstance(obj, (list, tuple)):
            return [
                *self._each(
                    kind.__base__.__iter__(obj)
                    if kind.__module__ == "__main__" and hasattr(kind.__base__, "__iter__")
                    else obj,
                    path,
                ),
                *self._attributes(obj, path),
            ]
        if isinstance(obj, dict):
            extra = [self._of(obj.default_factory, f"{path}.factory")] if hasattr(obj, "default_factory") else []
            return extra + self._items(obj.items(), path) + self._attributes(obj, path)
        if isinstance(obj, (set, frozenset)):
            return [*sorted(repr(x) for x in obj), *self._attributes(obj, path)]
        if isinstance(obj, types.FunctionType):
            return self._function(obj, path)
        if isinstance(obj, types.ModuleType):
            return [obj.__name__]
        if isinstance(obj, type):
            return self._class(obj, path)
        if isinstance(obj, types.CellType):
            try:
                return [self._of(obj.cell_contents, f"{path}.cell")]
            except ValueError:
                return ["empty"]
        if isinstance(obj, (types.MethodType, types.BuiltinFunctionType)):
            return [obj.__qualname__, self._of(obj.__self__, f"{path}.self")]
        if kind.__module__ == "__main__":
            return [self._of(kind, f"{path}.type"), *self._attributes(obj, path)]
        try:
            return self._each(obj.__reduce_ex__(4), path)
        except Exception:
            return ["?"]

    def _attributes(self, obj, path: str) -> list:
        if type(obj).__module__ != "__main__":
            return []
        slots = [s for base in type(obj).__mro__ for s in vars(base).get("__slots__", ()) if hasattr(obj, s)]
        found = [(s, getattr(obj, s)) for s in slots if s not in ("__dict__", "__weakref__")]
        return self._items([*found, *getattr(obj, "__dict__", {}).items()], path)

    def _function(self, fn, path: str) -> list:
        if fn.__globals__ is not self._namespace:
            return [fn.__module__, fn.__qualname__]
        names = (
            "__defaults__",
            "__kwdefaults__",
            "__closure__",
            "__dict__",
            "__annotations__",
            "__module__",
            "__doc__",
            "__name__",
        )
        return [fn.__qualname__, self._code(fn.__code__), self._items([(name, getattr(fn, name)) for name in names], path)]

    def _code(self, code) -> list:
        inner = [
            self._code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts if not isinstance(c, frozenset)
        ]
        return [code.co_code.hex(), inner, code.co_names, code.co_varnames, code.co_freevars]

    def _class(self, cls, path: str) -> list:
        if cls.__module__ != "__main__":
            return [f"{cls.__module__}.{cls.__qualname__}"]
        skipped = {"__dict__", "__weakref__", "__abstractmethods__", "_abc_impl", "__slotnames__", "__firstlineno__"}
        # from 3.13 and 3.14: a set in no order, and annotations in several states of being evaluated
        skipped |= {"__static_attributes__", "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"}
        members = [
            (name, value)
            for name, value in sorted(vars(cls).items())
            if name not in skipped and not isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType))
        ]
        members.append(("__annotations__", inspect.get_annotations(cls)))
        return [cls.__qualname__, self._each(cls.__bases__, f"{path}.bases"), self._items(members, path)]


if __name__ == "__main__":
    serve()
