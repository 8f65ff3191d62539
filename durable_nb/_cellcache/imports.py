"""Tells when a module of the project has been imported, whoever imports it: what it holds then is what its file makes of it."""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_STDLIB = os.path.dirname(os.__file__) + os.sep  # noqa: PTH120  pathlib would have to be loaded
_LIBRARY = re.compile(rf"[/\\\\](site|dist)-packages[/\\\\]|^{re.escape(_STDLIB)}")
"""Files of which it is clear at once that they are not the project's: thousands are imported."""
Told = Callable[[types.ModuleType], None]
_told: list[Told] = []


@contextmanager
def imports_noticed() -> Iterator[None]:
    """For the time that the extension is loaded."""
    loader: Any = importlib.machinery.SourceFileLoader  # which inherits how it executes
    execute = loader.exec_module

    def exec_module(own: Any, module: types.ModuleType) -> None:
        execute(own, module)
        filename = str(getattr(module, "__file__", None) or _STDLIB)
        if _LIBRARY.search(filename) is None and not module.__name__.startswith("durable_nb."):
            with contextlib.suppress(Exception):  # whatever is odd about it: it is imported
                _remember(module)
            for told in _told:
                told(module)

    loader.exec_module = exec_module
    try:
        yield
    finally:
        if vars(loader).get("exec_module") is exec_module:
            del loader.exec_module


@contextmanager
def telling(told: Told) -> Iterator[None]:
    """Meanwhile `told` is called as well, where imports are noticed."""
    _told.append(told)
    try:
        yield
    finally:
        _told.remove(told)


def _remember(module: types.ModuleType) -> None:
    from durable_nb._fingerprint import data_in, hash_value, is_installed, remember_import  # not before it is needed

    if is_installed(module.__name__):
        return
    digests = {}
    for name, value in data_in(module).items():
        with contextlib.suppress(Exception):  # what can't be compared is not known
            digests[name] = hash_value(value)
    remember_import(module, digests)
