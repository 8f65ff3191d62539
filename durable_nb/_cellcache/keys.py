"""What a durable cell's result depends on: its code and every input, as one key and as components that explain it."""

from __future__ import annotations

import ast
import hashlib
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from durable_nb import _figures
from durable_nb._cellcache.external import RCPARAMS, settings_used
from durable_nb._cellcache.mentions import packages_imported
from durable_nb._cellcache.names import EVALUATING, Names, dynamic_reads, looks_up
from durable_nb._cellcache.patches import attributes_set
from durable_nb._fingerprint import (
    FORMAT,
    Fingerprinter,
    Unhashable,
    attribute_uses,
    digest_of,
    globals_stored,
    nested_codes,
    nodes,
    source_of,
)

EXTRA = "extra"
"""The component that `--extra` adds."""
FIGURES = "figures"
"""The component of the figures that pyplot keeps from one cell to the next."""
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True, slots=True)
class CellKey:
    """The identity of one execution of a cell, taken before it runs."""

    key: str
    components: dict[str, str]
    versions: dict[str, str]
    unknown: tuple[str, ...]
    """Why the result can't be taken from the cache nor put there; empty where it can."""
    places: Mapping[tuple[str, int], Any]
    """The mutable objects that the inputs consist of, by component and number within it."""
    words: frozenset[str] = frozenset()
    """Every name that the code of the cell and of its helpers mentions; of the cell's, `name.attribute` too."""
    stores: frozenset[tuple[str, str]] = frozenset()
    """(module, name) of the globals that functions of the project's modules may bind; `__main__` is the notebook."""
    sets: tuple[str, ...] = ()
    """Attributes of modules that helpers assign, said as such."""
    functions: Callable[[], Mapping[str, types.FunctionType]] = dict
    """Gives the helpers, by component."""
    classes: Callable[[], Mapping[str, type]] = dict
    opaque: tuple[str, ...] = ()
    """Inputs known by their type, or type and address, only: in words."""
    ignored: frozenset[str] = frozenset()
    """Names that the cell or its helpers read, and that were not to count."""

    @property
    def names(self) -> frozenset[str]:
        """The notebook's names that count."""
        return frozenset(label.removeprefix("global ") for label in self.components if label.startswith("global "))


@dataclass(frozen=True, slots=True)
class Terms:
    """What the user says about a cell's key, and about its entry."""

    ignored: frozenset[str] = frozenset()
    """Names that don't count."""
    extra: tuple[Any, ...] = ()
    """A value that counts besides."""
    ttl_s: float | None = None
    """Entries as old as this don't count."""
    skip: frozenset[str] = frozenset()
    """Names that are not stored."""


def key_of(
    name: str,
    tree: ast.Module,
    names: Names,
    namespace: Mapping[str, Any],
    terms: Terms = Terms(),
) -> CellKey:
    """The key of a cell called `name` ('' for none) that is about to run in `namespace`."""
    found, unknown = _fingerprint(tree, names.read, namespace, terms)
    unknown += [f"it looks names up by {way}, which can't be followed" for way in sorted(dynamic_reads(tree) - EVALUATING)]
    print_ = found.result()
    for label, function in found.functions().items():
        ways = looks_up(function.__code__)
        # what it evaluates in the notebook is seen, but not what a module's variables are
        if ways - EVALUATING or (ways and function.__globals__.get("__name__") != "__main__"):
            unknown.append(f"{describe(label)} may look names up dynamically, which can't be followed")
    words, asks = _words(tree, found), _INPUT in print_.components and "input" not in namespace
    if "getpass" in words and "getuser" not in words:
        unknown.append("it calls getpass(), which asks at every execution")
    unknown += [
        f"{describe(o.label)} holds a {o.type_name}, which can't be compared" + _way_out(o.label)
        for o in print_.opaque
        if (not o.configured and not (asks and o.label == _INPUT))
        or o.type_name.startswith("_io.")
        or (o.type_name.endswith("Shell") and o.label != _OWN_SHELL)
    ]
    return CellKey(
        _key(name, print_.digest),
        dict(print_.components),
        dict(print_.versions),
        tuple(unknown),
        found.places(),
        words,
        frozenset(
            (str(function.__globals__.get("__name__")), name)
            for function in found.functions().values()
            for name in globals_stored(function.__code__)
        ),
        tuple(
            f"{describe(label)} sets {module}.{name}"
            for label, function in found.functions().items()
            for module, name in attributes_set(source_of(function), function.__globals__)
        ),
        found.functions,
        found.classes,
        tuple(
            f"{describe(o.label)}: {o.type_name}, by its type"
            + (" and what is known of its configuration" if o.configured else "")
            for o in print_.opaque
        ),
        frozenset(found.met_ignored),
    )


def _words(tree: ast.Module, found: Fingerprinter) -> frozenset[str]:
    codes = [code for function in found.functions().values() for code in nested_codes(function.__code__)]
    return _words_in(tree).union(*(code.co_names for code in codes))


@lru_cache(maxsize=256)  # as with `_uses`
def _words_in(tree: ast.Module) -> frozenset[str]:
    found = set[str]()
    for node in nodes(tree):
        fields = [getattr(node, field, None) for field in ("id", "attr", "name", "value", "module")]
        texts = [field for field in fields if isinstance(field, str)]
        found.update(part for text in texts for part in (text, text.rpartition(".")[2]) if part.isidentifier())
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
    return frozenset(found)


_INPUT = "global input"
_OWN_SHELL = "global get_ipython"
"""IPython writes `!command` as a call of it, in helpers too."""


def key_from(name: str, components: Mapping[str, str]) -> str:
    """The key of a cell whose components are these."""
    return _key(name, digest_of(components))


def _key(name: str, digest: str) -> str:
    whole = "\0".join((str(FORMAT), PYTHON, name, digest))
    return hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()


def mutated(
    before: CellKey,
    tree: ast.Module,
    names: Names,
    namespace: Mapping[str, Any],
    old: Mapping[str, Any],
    terms: Terms = Terms(),
) -> tuple[list[str], list[str]]:
    """(components of inputs that the cell changed in place, what can't be compared any more); `old` is what `namespace`
    held before it ran.

    A name that the cell bound anew has not changed in place: what it held before is looked at.
    """
    found, unknown = _fingerprint(tree, names.read, namespace, terms, earlier=old)
    after = found.result().components
    return [label for label, digest in before.components.items() if after.get(label) != digest], unknown


def code_of(key: CellKey) -> dict[str, Any]:
    """The functions and classes among the inputs, by component."""
    return {**key.functions(), **key.classes()}


def stored_by(key: CellKey) -> set[str]:
    """The notebook's names that functions which the cell may call bind themselves (`global x; x = ...`)."""
    return {name for module, name in key.stores if module == "__main__"}


def globals_held(key: CellKey) -> dict[tuple[str, str], Any]:
    """What the globals of modules that helpers may bind hold now."""
    return {
        (module, name): vars(sys.modules[module]).get(name)
        for module, name in key.stores
        if module != "__main__" and module in sys.modules
    }


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """What differs between two cells' components, in words."""
    labels = sorted({*old, *new}, key=lambda label: (label != "code", label))
    return [f"{describe(label)} {how_changed(label, old, new)}" for label in labels if old.get(label) != new.get(label)]


def how_changed(label: str, old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """What has become of a component that differs. One may count in one of them only by --ignore, too."""
    return "changed" if label in old and label in new else "counts now" if label in new else "counts no more"


def _fingerprint(
    tree: ast.Module,
    read: Iterable[str],
    namespace: Mapping[str, Any],
    terms: Terms,
    earlier: Mapping[str, Any] | None = None,
) -> tuple[Fingerprinter, list[str]]:
    found = Fingerprinter(earlier=None if earlier is None else (namespace, earlier), ignored=terms.ignored)
    unknown: list[str] = []
    found.add_code("code", tree)
    for value in terms.extra:
        try:
            found.add_value(EXTRA, value)
        except Exception as error:
            unknown.append(f"what --extra gives can't be compared ({type(error).__name__}: {error})")
    uses = _uses(tree)
    for name in sorted(read):
        try:
            found.add_name(name, namespace, uses.get(name))
        except Unhashable as error:
            unknown.append(f"{describe(error.label)} can't be compared ({error.reason})")
        except Exception as error:
            unknown.append(f"{name} can't be compared ({type(error).__name__}: {error})")
    figures = _figures.open_ones()
    if figures and _draws(tree, found):
        found.add_value(FIGURES, figures)
    return found, unknown


def _draws(tree: ast.Module, found: Fingerprinter) -> bool:
    """May the cell use the figures that pyplot keeps?"""
    packages, words = {*found.packages, *packages_imported(tree)}, _words(tree, found)
    by_pandas = "pandas" in packages and not words.isdisjoint({"plot", "hist", "boxplot"})
    return by_pandas or RCPARAMS in settings_used(tuple(packages), frozenset(words))


_uses = lru_cache(maxsize=256)(attribute_uses)  # a cell's tree is kept as long as its text is executed again and again


def _way_out(label: str) -> str:
    kind, _, name = label.partition(" ")
    return f" (--ignore {name} accepts it)" if kind == "global" and name.isidentifier() else ""


def describe(label: str) -> str:
    """A component's label as its user would say it."""
    kind, _, rest = label.partition(" ")
    match kind:
        case "function":
            return f"helper {rest}"
        case "global":
            return rest
        case "aliases":
            return "which names share an object"
        case "extra":
            return "what --extra gives"
        case "figures":
            return "what pyplot keeps"
    return label
