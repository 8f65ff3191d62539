"""Figures of matplotlib, and all that they consist of, changed in place: what of an object is its content, how it gets another.

matplotlib says by `__getstate__` what of an object lasts. What it leaves out belongs to the process: the canvas, who is told
that something is stale, weak references. That stays, or is made anew, in the live object.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import re
import sys
import types
import weakref
from typing import Any

_LIBRARIES = ("matplotlib", "mpl_toolkits")


@functools.lru_cache(maxsize=1024)
def _tells_its_state(kind: Any) -> bool:
    teller = next(base for base in kind.__mro__ if "__getstate__" in vars(base) or base is object)
    return teller.__module__.partition(".")[0] in _LIBRARIES


def is_part(obj: Any) -> bool:
    """Is it an object of matplotlib that is more than its attributes?"""
    kind: Any = type(obj)
    return "matplotlib" in sys.modules and _tells_its_state(kind)


def content_of(obj: Any) -> dict[str, Any]:
    """What of it lasts."""
    kinds = _Kinds()
    if isinstance(obj, kinds.registry):
        return _callbacks(obj)
    state: dict[str, Any] = dict(obj.__getstate__())
    if isinstance(obj, kinds.node):
        state["_parents"] = [parent for parent in state["_parents"].values() if parent is not None]
    if isinstance(obj, kinds.artist):
        state["stale_callback"] = obj.stale_callback is not None
    for name in ("__mpl_version__", "_restore_to_pylab"):
        state.pop(name, None)
    return state


def put(obj: Any, content: dict[str, Any]) -> None:
    """Give a live object its new content."""
    kinds, state = _Kinds(), dict(content)
    if isinstance(obj, kinds.registry):
        _put_callbacks(obj, state)
    elif isinstance(obj, kinds.node):
        parents = [*filter(None, (known() for known in obj._parents.values())), *state.pop("_parents")]
        vars(obj).clear()
        vars(obj).update(state, _parents={})
        for parent in parents:
            _know_parent(obj._parents, parent)
    elif isinstance(obj, kinds.artist):
        _put_artist(obj, state)
    elif isinstance(getattr(type(obj), "__setstate__", None), types.FunctionType):
        obj.__setstate__(state)
    else:
        vars(obj).clear()
        vars(obj).update(state)


def _know_parent(known: dict[int, Any], parent: Any) -> None:
    key = id(parent)
    known[key] = weakref.ref(parent, lambda _: known.pop(key, None))


def _put_artist(artist: Any, state: dict[str, Any]) -> None:
    own = vars(artist)
    for name, siblings in (state.pop("_shared_axes", None) or {}).items():
        artist._shared_axes[name].join(*siblings)
    if siblings := state.pop("_twinned_axes", None):
        artist._twinned_axes.join(*siblings)
    kept = {name: own[name] for name in ("canvas", "_contour_generator") if own.get(name) is not None}
    callback = own.get("stale_callback") if state["stale_callback"] else None
    own.clear()
    own.update(state, stale_callback=callback, **kept)


class _Kinds:
    """Classes of matplotlib; it is loaded, or there would be no object of it."""

    def __init__(self) -> None:
        self.registry: Any = sys.modules["matplotlib.cbook"].CallbackRegistry
        self.node: Any = getattr(sys.modules.get("matplotlib.transforms"), "TransformNode", ())
        self.artist: Any = getattr(sys.modules.get("matplotlib.artist"), "Artist", ())


def _callbacks(registry: Any) -> dict[str, Any]:
    """`__getstate__` would count on."""
    lasting = registry._pickled_cids
    called = {s: {cid: way() for cid, way in ways.items() if cid in lasting} for s, ways in registry.callbacks.items()}
    number = re.search(r"\d+", repr(registry._cid_gen))
    state = {name: value for name, value in vars(registry).items() if name not in ("_func_cid_map", "_cid_gen", "callbacks")}
    return {**state, "callbacks": called, "_cid_gen": int(number[0]) if number else 0}


def _put_callbacks(registry: Any, state: dict[str, Any]) -> None:
    """Those of the process, which its canvas and its backend have, stay."""
    cbook: Any = sys.modules["matplotlib.cbook"]
    now: dict[str, dict[int, Any]] = {
        s: {cid: way for cid, way in ways.items() if cid not in registry._pickled_cids}
        for s, ways in registry.callbacks.items()
    }
    for signal, functions in state.pop("callbacks").items():
        for cid, function in functions.items():
            forget = functools.partial(registry._remove_proxy, signal)
            now.setdefault(signal, {})[cid] = cbook._weak_or_strong_ref(function, forget)
        now.setdefault(signal, {})
    count = state.pop("_cid_gen")
    vars(registry).update(state, callbacks=now, _cid_gen=itertools.count(count))
    registry._func_cid_map = cbook._UnhashDict(((s, way), cid) for s, ways in now.items() for cid, way in ways.items())


# -- pyplot's ----------------------------------------------------------------------------------------------------------


def open_ones() -> dict[str, Any]:
    """The figures that pyplot keeps, by their numbers, and in which order they were in use. Inline ones end with their cell."""
    helpers: Any = sys.modules.get("matplotlib._pylab_helpers")
    figures = (
        {f"{number}": manager.canvas.figure for number, manager in helpers.Gcf.figs.items()} if helpers is not None else {}
    )
    return {**figures, _ORDER: list(figures)} if figures else {}


_ORDER = "order"


def keep_open(changes: dict[str, Any], gone: str) -> None:
    """Have pyplot keep these figures, under these numbers, in this order; those that are `gone` it closes."""
    helpers: Any = sys.modules["matplotlib._pylab_helpers"]
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    gcf = helpers.Gcf
    changes = dict(changes)
    order = changes.pop(_ORDER, gone)
    managers = {id(manager.canvas.figure): manager for manager in gcf.figs.values()}
    for name, figure in changes.items():
        number = int(name)
        if type(figure) is str:
            gcf.destroy(number)
            continue
        manager = managers.get(id(figure))
        if manager is None:
            manager = pyplot._get_backend_mod().new_figure_manager_given_figure(number, figure)
        elif gcf.figs.get(manager.num) is manager:  # it came back as the next one
            del gcf.figs[manager.num]
        manager.num = number
        gcf._set_new_active_manager(manager)
    for name in order if type(order) is list else ():
        gcf.figs.move_to_end(int(name))
