"""What a step sees of the external state, as bytes that its record keeps: the same machinery as for cells.

A step's look-up has to be cheap, thousands of times over: what its function mentions is found out once per function, and a
step that sees nothing has an empty record.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import msgspec

from durable_nb._cellcache.external import Around, ExternalState, members
from durable_nb._cellcache.files import CODE, LISTED, LOOKED_FOR, MATCHED, READ, here, looking_away
from durable_nb._cellcache.generators import generators, set_generator
from durable_nb._cellcache.mentions import NOWHERE, PLAIN, Mentions, Places, mentions_of, places_of
from durable_nb._cellcache.watch import Watch, prepare

_NOTHING = Mentions()
_SEEN = (READ, LISTED, LOOKED_FOR, MATCHED, CODE)
"""Files that a step made are its doing, and no condition for taking its result; the cell's result depends on them."""


class _Seen(msgspec.Struct, array_like=True):
    external: ExternalState
    states: bytes
    """Of random generators, pickled: as the step left them."""


class StepWatches:
    """What the steps of one execution of a cell mention."""

    def __init__(self, around: Around) -> None:
        self.around = around
        self._known: dict[int, tuple[Any, Mentions, Places, dict[str, str]]] = {}

    def watch(self, function: Callable[..., Any], args: tuple[Any, ...], packages: Iterable[str]) -> Watch:
        """Sees what a step that is about to call `function` with these arguments looks at."""
        while isinstance(function, functools.partial):
            args, function = (*function.args, *function.keywords.values(), *args), function.func
        with looking_away():
            mentions, places, added = self._of_function(function)
            given = _NOTHING if PLAIN.issuperset(map(type, args)) else mentions_of(args)
            if given.texts or given.words:
                more = places_of(given, here())
                prepare(more)
                mentions, places = mentions.with_more(given), places.with_more(more)
            return Watch(self.around, mentions, places, packages, members=added)

    def _of_function(self, function: Any) -> tuple[Mentions, Places, dict[str, str]]:
        known = self._known.get(id(function))
        if known is None or known[0] is not function:
            mentions = mentions_of([function])
            places = places_of(mentions, here()) if mentions.texts else NOWHERE
            prepare(places)
            known = self._known[id(function)] = function, mentions, places, members(mentions.words)
        return known[1:]


def seen_by(watch: Watch) -> bytes:
    """What it has seen, encoded; empty where there is nothing that could change."""
    if watch.has_seen_nothing:
        return b""
    try:
        external, problems = watch.external()
        states = watch.moved_states(external)
        seen = _Seen(replace(external, unsure=problems), pickle.dumps(states) if states else b"")
        return msgspec.msgpack.encode(seen) if seen.external else b""
    except Exception as error:  # its outcome is paid for, and recorded; but nobody can say that it would come again
        unsure = ExternalState(unsure=[f"what it saw can't be compared ({type(error).__name__}: {error})"])
        return msgspec.msgpack.encode(_Seen(unsure, b""))


def still_holds(seen: bytes, around: Around) -> bool:
    """Would the step see the same now?"""
    try:
        external = msgspec.msgpack.decode(seen, type=_Seen).external
        return not replace(external, files=[file for file in external.files if file.how in _SEEN]).changes(around)
    except Exception:  # an odd value under a name that it looked up; a record of another version
        return False


def see_again(seen: bytes, cell: Watch) -> None:
    """The step is restored: what it saw counts for the cell, and random generators continue from the states it left them in."""
    found = msgspec.msgpack.decode(seen, type=_Seen)
    cell.saw(found.external)
    now = generators() if found.states else {}
    for name, state in pickle.loads(found.states).items() if found.states else ():
        if name not in now or now[name].before() == found.external.generators.get(name):
            set_generator(name, state)
