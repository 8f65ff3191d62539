"""What a cell evaluates (`eval`, `exec`, in the notebook's own helpers too): the variables that this looks up are its inputs.

The interpreter tells of each piece of code that is executed (PEP 578), and a piece of code tells which globals it may load.
"""

from __future__ import annotations

import builtins
import types
from collections.abc import Container, Iterator, Mapping
from typing import Any

from durable_nb._cellcache.external import UNBOUND, name_digest
from durable_nb._cellcache.names import EVALUATING, looks_up
from durable_nb._fingerprint import Fingerprinter, names_loaded, nested_codes


class Evaluated:
    """Sees what one execution of a cell evaluates."""

    def __init__(self, namespace: Mapping[str, Any], counted: Container[str], *, mentioned: bool) -> None:
        """`counted`: names that are inputs of the cell anyway; `mentioned`: its code speaks of evaluating, and so a package may
        do it for it."""  # fmt: skip
        self._namespace, self._counted, self._mentioned = namespace, counted, mentioned
        self._held = dict(namespace)
        self.names: dict[str, str] = {}
        """Digests of what variables held when they were looked up first, but for those that the cell had bound by then."""
        self._ways: set[str] = set()

    def event(self, code: Any, frame: types.FrameType) -> None:
        """`code` is about to be executed, on behalf of `frame`."""
        module = str(frame.f_globals.get("__name__"))
        by_user = module == "__main__" or (self._mentioned and not module.startswith(("durable_nb", "importlib", "_frozen")))
        if not by_user or not isinstance(code, types.CodeType):
            return
        self._ways |= looks_up(code) - EVALUATING
        stored = {name for inner in nested_codes(code) for name in inner.co_names} & self._namespace.keys()
        for name in sorted(names_loaded(code) | stored):
            here = self._namespace.get(name, _NOTHING)
            is_own = here is not self._held.get(name, _NOTHING)
            if is_own or name in self.names or name in self._counted or (here is _NOTHING and hasattr(builtins, name)):
                continue
            self.names[name] = name_digest(self._namespace, name)

    def problems(self) -> Iterator[str]:
        """Why what the cell left can't be kept, if it can't."""
        for way in sorted(self._ways):
            yield f"what it evaluates looks names up by {way}, which can't be followed"
        for name, digest in self.names.items():
            if digest == UNBOUND:
                continue
            if name_digest(self._held, name) != digest:
                yield f"it changes {name} in place"
            found = Fingerprinter()
            found.add_name(name, self._held)
            if any(looks_up(function.__code__) for function in found.functions().values()):
                yield f"what it evaluates may look names up dynamically, by {name}, which can't be followed"


_NOTHING = object()
