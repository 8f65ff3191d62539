"""Settings of the notebook itself that a cell makes by magics and otherwise: IPython's traits, magics, formatters, hooks."""

from __future__ import annotations

import copy
import sys
import types
from typing import Any

from durable_nb._cellcache.settings import GONE, Same, Setting, UnsettableError


def settings_of(shell: Any) -> tuple[Setting, ...]:
    """Those of this shell. Extensions come first: they bring magics and hooks of their own."""
    return (
        Setting(
            "loaded extensions",
            "IPython",
            lambda _: _extensions(shell),
            lambda _, found: _load(shell, found),
            setters=frozenset({"load_ext", "reload_ext", "unload_ext", "load_extension", "unload_extension"}),
        ),
        Setting(
            "IPython's configuration",
            "IPython",
            lambda _: _traits(shell),
            lambda _, found: _set_traits(shell, found),
            keeps=lambda before, new: _chosen(shell, before, new),
            setters=frozenset({"precision", "pprint", "xmode", "set_mode", "colors", "config"}),
            by_name=True,
        ),
        Setting("inline figures", "matplotlib_inline", lambda _: _inline(shell), lambda _, found: _set_inline(shell, found)),
        Setting(
            "magics",
            "IPython",
            lambda _: _magics(shell),
            lambda _, found: _register(shell, found),
            keeps=lambda _, new: _kept(shell, new),
            setters=frozenset({"register_magic_function", "register_magics", "register_line_magic", "register_cell_magic"}),
        ),
        Setting(
            "autoreload",
            "IPython",
            lambda _: _autoreload(shell),
            lambda _, found: _set_autoreload(shell, found),
            setters=frozenset({"autoreload"}),
        ),
        Setting(
            "how types are shown",
            "IPython",
            lambda _: _printers(shell),
            said=lambda key: f"it registers how {key} is shown",
            setters=frozenset({"for_type", "for_type_by_name", "type_printers"}),
        ),
        Setting(
            "IPython's hooks",
            "IPython",
            lambda _: _hooks(shell),
            said=lambda key: f"it sets IPython's {key}",
            setters=frozenset(
                "events ast_transformers input_transformers_cleanup input_transformers_post set_custom_exc".split()
            ),
        ),
    )


def _extensions(shell: Any) -> dict[str, Any]:
    return dict.fromkeys(shell.extension_manager.loaded, True)


def _load(shell: Any, found: dict[str, Any]) -> None:
    for name, loaded in found.items():
        if loaded is GONE:
            shell.extension_manager.unload_extension(name)
        else:
            shell.extension_manager.load_extension(name)


def _configurables(shell: Any) -> dict[str, Any]:
    formatters = shell.display_formatter.formatters.values()
    return {type(c).__name__: c for c in (*shell.configurables, *formatters)}


_ITS_OWN = {"type_printers", "singleton_printers", "deferred_printers", "active_types", "display_page", "quiet"}
"""Traits that IPython sets by itself, and printers, which are looked at on their own."""


def _traits(shell: Any) -> dict[str, Any]:
    """Of the configurable traits, those that have a value: the others have their defaults."""
    found: dict[str, Any] = {}
    for configurable in _configurables(shell).values():
        configured = _configured(type(configurable))
        for trait, value in configurable._trait_values.items():
            if trait in configured and isinstance(value, _PLAIN):  # a copy: it may be changed in place
                found[configured[trait]] = copy.copy(value) if type(value) in (list, dict, set) else value
    found["traceback mode"] = shell.InteractiveTB.mode
    return found


_PLAIN = (str, bytes, int, float, bool, type(None), list, tuple, dict, set, frozenset)
_names: dict[type, dict[str, str]] = {}


def _configured(kind: Any) -> dict[str, str]:
    """What can be configured of it: each trait's name, and with the class's."""
    if kind not in _names:
        traits = kind.class_trait_names(config=True)
        _names[kind] = {name: f"{kind.__name__}.{name}" for name in traits if name not in _ITS_OWN}
    return _names[kind]


def _chosen(shell: Any, before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Without traits that have got their default, since somebody has asked for it."""
    configurables = _configurables(shell)
    kept = {}
    for key, value in found.items():
        name, _, trait = key.partition(".")
        known = configurables[name].traits().get(trait) if key not in before else None
        if known is None or value != known.default(configurables[name]):
            kept[key] = value
    return kept


def _set_traits(shell: Any, found: dict[str, Any]) -> None:
    configurables = _configurables(shell)
    for key, value in found.items():
        if key == "traceback mode":
            shell.InteractiveTB.set_mode(mode=value)
            continue
        name, _, trait = key.partition(".")
        owner = configurables.get(name) or _new(shell, name)
        if owner is None:
            continue
        if value is GONE:
            owner._trait_values.pop(trait, None)  # its default holds again
        else:
            setattr(owner, trait, value)


def _new(shell: Any, name: str) -> Any:
    """InlineBackend configures itself when it is first asked for."""
    if name != "InlineBackend":
        return None
    from matplotlib_inline.config import InlineBackend

    found = InlineBackend.instance(parent=shell)
    found.shell = shell
    if found not in shell.configurables:
        shell.configurables.append(found)
    return found


def _inline(shell: Any) -> dict[str, Any]:
    backend: Any = sys.modules.get("matplotlib_inline.backend_inline")
    flush = getattr(backend, "flush_figures", None)
    return {"on": flush is not None and flush in shell.events.callbacks.get("post_execute", ())}


def _set_inline(shell: Any, found: dict[str, Any]) -> None:
    if found["on"]:
        shell.enable_matplotlib("inline")


def _magics(shell: Any) -> dict[str, Any]:
    return {f"{kind}:{name}": magic for kind, found in shell.magics_manager.magics.items() for name, magic in found.items()}


def _kept(shell: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Not those that IPython loads when they are first used, nor those that an extension brings."""
    brought = {"IPython", *(name.partition(".")[0] for name in shell.extension_manager.loaded)}
    kept = {}
    for key, magic in found.items():
        owner = getattr(magic, "__self__", magic)
        module = str(getattr(owner, "__module__", None) or type(owner).__module__)
        if magic is not GONE and module.partition(".")[0] in brought:
            continue
        if magic is not GONE and not isinstance(magic, types.FunctionType):  # of a class, which is bound to the shell
            raise UnsettableError(f"it registers the magic %{key.partition(':')[2]}")
        kept[key] = magic
    return kept


def _register(shell: Any, found: dict[str, Any]) -> None:
    for key, magic in found.items():
        kind, _, name = key.partition(":")
        if magic is GONE:
            shell.magics_manager.magics[kind].pop(name, None)
        else:
            shell.register_magic_function(magic, kind, name)


def _autoreload(shell: Any) -> dict[str, Any]:
    magics = shell.magics_manager.registry.get("AutoreloadMagics")
    reloader = getattr(magics, "_reloader", None)
    if reloader is None:
        return {}
    if not reloader.enabled:
        return {"mode": "0"}
    return {"mode": ("3" if reloader.autoload_obj else "2") if reloader.check_all else "1"}


def _set_autoreload(shell: Any, found: dict[str, Any]) -> None:
    if found["mode"] is not GONE:
        shell.run_line_magic("autoreload", found["mode"])


def _printers(shell: Any) -> dict[str, Any]:
    """One that waits for its type to be imported is the same then. Not figures', which inline display sets with its formats."""
    found = {}
    for mime, formatter in shell.display_formatter.formatters.items():
        for kind, printer in (*formatter.type_printers.items(), *formatter.deferred_printers.items()):
            label = _labels.get((kind, mime))
            if label is None:
                module, name = kind if isinstance(kind, tuple) else (kind.__module__, kind.__name__)
                label = _labels[kind, mime] = "" if module.startswith("matplotlib") else f"{module}.{name} as {mime}"
            if label:
                found[label] = Same(printer)
    return found


_labels: dict[tuple[Any, str], str] = {}
"""By type, or its module and name, and by MIME type; '' for what isn't looked at."""


def _hooks(shell: Any) -> dict[str, Any]:
    """What is called around each cell, and made of its text. Inline display has its own."""
    called = {
        event: [Same(c) for c in found if not str(getattr(c, "__module__", "")).startswith(_OURS)]
        for event, found in shell.events.callbacks.items()
    }
    return {
        **{f"callbacks of {event}": found for event, found in called.items()},
        "syntax transformers": list(map(Same, shell.ast_transformers)),
        "text transformers": list(map(Same, shell.input_transformers_cleanup + shell.input_transformers_post)),
        "handler of exceptions": shell.custom_exceptions,
    }


_OURS = ("matplotlib", "durable_nb", "ipykernel", "IPython")
