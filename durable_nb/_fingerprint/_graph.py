"""Code as a graph: functions, classes, modules and globals, each a component, linked to each other.

A component's value is its own digest and the labels it links to. The labels of roots (a call, an argument, a name that a cell
reads) are part of an identity. Those of functions, classes and globals below them are for people: an identity holds which of
them link to which, in the order in which they are reached, so that code may be renamed and moved.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from . import _memo
from ._annotations import annotations_of
from ._classes import class_of
from ._methods import bound
from ._modules import CODE, attributes_of, imports_of, module_of, reached
from ._owners import installed_name, is_installed, is_installed_file, version
from ._source import Paths, Reading, docstring, imported, looks_of, normalise, read, written
from ._tokens import DIGEST_BYTES, FORMAT, PERSON, SCALARS, raw, text
from ._values import enter
from ._walk import (
    ANNOTATIONS,
    DOCSTRINGS,
    MISSING,
    MODULES,
    NAMES,
    SOURCE,
    Looks,
    Opaque,
    Unhashable,
    Walk,
    look_up,
    named,
)

if TYPE_CHECKING:
    import ast
    from collections.abc import Callable, Container, ItemsView, Iterable, Iterator, KeysView, ValuesView


@dataclass(frozen=True)
class Fingerprint:
    """An identity and what it is made of: two of them differ where their components do."""

    digest: str
    components: dict[str, str]
    opaque: tuple[Opaque, ...]
    versions: dict[str, str]
    lasting: bool
    """Nothing of it can change while the same call runs: no mutable object was met, and no global variable."""
    places: Callable[[], Mapping[tuple[str, int], Any]] = field(compare=False, repr=False)
    """The mutable objects met, by component and number within it."""
    earlier: Callable[[], Iterable[Fingerprint]] = field(default=tuple, compare=False, repr=False)
    """What earlier formats give to the same call or value, the oldest first. It is worked out when asked for, so it is to be
    asked before the body runs."""
    format: int = FORMAT


class Fingerprinter:
    """Collects what an identity depends on, piece by piece; `result()` may be asked at any time.

    Mutable objects shared between pieces are remembered, and count: `K = L` is another input than `K = L[:]`.
    A piece that can't be read raises `Unhashable` and leaves the rest as it was. With `memory`, overlapping
    arrays count as well; values that went through pickle have lost that.
    """

    def __init__(
        self,
        *,
        looks: Looks = frozenset(),
        memory: bool = True,
        earlier: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
        ignored: Container[str] = (),
    ) -> None:
        """`earlier`: a namespace and what it held at an earlier time, which counts in its place, for functions in it too.
        `ignored`: names of the notebook that don't count, whoever reads them."""
        self.met_ignored: set[str] = set()
        self._ignored = ignored
        self.looks = looks
        self._earlier = earlier
        self._memory = self.whole = memory
        self._looked: Looks = frozenset()
        self._components: dict[str, str] = {}
        self._roots: set[str] = set()
        self.namespaces: dict[str, Mapping[str, Any]] = {}
        self._labels: dict[int, str] = {}
        self._nodes: dict[str, Any] = {}
        """What the labels of functions, classes and modules stand for."""
        self._globals: dict[tuple[int, str], str] = {}
        self._names: dict[str, str] = {}
        """What data is called where the component of that label is read."""
        self._keep: list[Any] = []
        self._taken: set[str] = set()
        self._pending: deque[tuple[str, Callable[[Walk], Iterator[Any]], types.FunctionType | None]] = deque()
        self._walks: list[Walk] = []
        self._opaque: set[Opaque] = set()
        self._packages: set[str] = set()
        self._tokens: dict[int, tuple[bytes | None, str, Any]] = {}
        self._added: list[Callable[[Fingerprinter], None]] = []

    # ---- adding ----

    def add_code(self, label: str, tree: ast.AST) -> None:
        """Code by its normal form and the project's modules that it imports; the names it reads are added apart.

        What is found out about `tree` is kept with it: it must not be changed afterwards.
        """
        looked, imports = _about(tree)
        self._looked |= looked

        def children(walk: Walk) -> Iterator[Any]:
            walk.out += b"A" + raw(_normal(tree, DOCSTRINGS in self.looks))
            imports_of(walk, imports, None)
            return iter(())

        self._add(self._root(label), children)
        self._added.append(lambda other: other.add_code(label, tree))

    def add_name(self, name: str, namespace: Mapping[str, Any], uses: Paths = None) -> None:
        """What `name` stands for in `namespace` or builtins, or that it stands for nothing, as "global NAME".

        `uses`, from `attribute_uses`, narrows a project's module to the attributes that are read.
        """
        if self._is_ignored(name, namespace):
            return
        self.namespaces.setdefault(str(namespace.get("__name__")), namespace)
        value = look_up(name, self._held_by(namespace))
        label = self._global_label(name, namespace)
        self._roots.add(label)
        if label in self._components:
            return
        self._added.append(lambda other: other.add_name(name, namespace, uses))

        def children(walk: Walk) -> Iterator[Any]:
            if value is MISSING:
                walk.out += b"undefined"
            elif isinstance(value, types.ModuleType) and uses is not None:
                yield from attributes_of(walk, value, uses)
            else:
                yield value

        self._add(label, children)

    def add_value(self, label: str, value: Any) -> None:
        if label in TOOLS:
            self._looked |= {DOCSTRINGS, ANNOTATIONS, NAMES}
        write = SCALARS.get(type(value))
        if write is not None:  # what a walk of it would give
            self._components[self._root(label)] = blake2b(write(value), digest_size=DIGEST_BYTES, person=PERSON).hexdigest()
        else:
            self._add(self._root(label), lambda _: iter((value,)))
        self._added.append(lambda other: other.add_value(label, value))

    def add_function(self, label: str, fn: Any) -> None:
        """As `add_value`, and as the first piece. One whose code and constants are what they were isn't walked again."""
        known = _memo.KNOWN.get(id(fn)) if not self.looks else None
        if known is not None and known.fn is fn and known.holds(self):
            self._components, self._packages = dict(known.components), set(known.packages)
            self._labels, self._globals = dict(known.labels), dict(known.globals)
            self._taken, self._roots = set(known.components), {label}
            self._keep = [known]
            self._added.append(lambda other: other.add_value(label, fn))
            return
        self._packages.clear()  # of things looked at in vain
        self.add_value(label, fn)
        sources = None if self.looks or self._looked or self._opaque else _memo.sources(self, fn)
        if sources is not None and not any(walk.memos[0] or walk.arrays for walk in self._walks):
            if len(_memo.KNOWN) >= _memo.KNOWN_LIMIT:
                _memo.KNOWN.clear()
            parts, said = dict(self._components), self._with_roots_marked()
            lasting = not any(part.startswith("global ") for part in parts)
            labels, names, packages = dict(self._labels), dict(self._globals), set(self._packages)
            _memo.KNOWN[id(fn)] = _memo.Known(fn, *sources, parts, labels, names, packages, said, joined(said), lasting)

    def _add(self, label: str, children: Callable[[Walk], Iterator[Any]]) -> None:
        self._pending.append((label, children, None))
        failed: Exception | None = None
        while self._pending:
            label, children, fn = self._pending.popleft()
            if fn is not None and self._recalled(label, fn):
                continue
            walk = Walk(self, label, enter)
            try:
                digest = walk.digest(_started(children, walk)).hex()
                self._components[label] = "|".join((digest, *walk.edges))
            except Exception as error:
                failed = failed or error
                self._labels = {key: known for key, known in self._labels.items() if known != label}
                self._globals = {key: known for key, known in self._globals.items() if known != label}
                continue
            self._walks.append(walk)
            self._opaque |= walk.opaque
            if fn is not None and not (self.looks or walk.memos[0] or walk.arrays or walk.opaque):
                self._remember(fn, digest, walk.edges)
        if failed is not None:
            raise failed

    def _recalled(self, label: str, fn: types.FunctionType) -> bool:
        """Whether the function says what it said when it was walked last; then that is its component."""
        known = _memo.NODES.get(id(fn))
        namespace = fn.__globals__
        if known is None or self.looks or not known.holds(self, fn, self._held_by(namespace)):
            return False
        if any(self._is_ignored(name, namespace) for name, _ in known.names):
            return False
        self.namespaces.setdefault(str(namespace.get("__name__")), namespace)
        edges = [self._link_to(name, namespace) if name else self.node(obj) for name, obj in known.links]
        self._components[label] = "|".join((known.digest, *edges))
        return True

    def _remember(self, fn: types.FunctionType, digest: str, edges: list[str]) -> None:
        if any(self._is_ignored(name, fn.__globals__) for name in read(fn.__code__).executed):
            return
        links = tuple((self._names.get(edge, ""), self._nodes.get(edge)) for edge in edges)
        known = _memo.node_of(self, fn, self._held_by(fn.__globals__), digest, links)
        if known is not None and all(name or obj is not None for name, obj in links):
            if len(_memo.NODES) >= _memo.NODES_LIMIT:
                _memo.NODES.clear()
            _memo.NODES[id(fn)] = known

    def walked(self, label: str, value: Any) -> Walk | None:
        """The walk of a value that leads to nothing but data; None where it leads to anything else."""
        walk = Walk(self, label, enter)
        try:
            walk.digest(iter((value,)))
        except Unhashable:
            return None
        leads_on = walk.edges or walk.arrays or walk.opaque or self._packages or self._looked or self._pending
        return None if leads_on else walk

    def static(self, label: str, children: Callable[[Walk], Iterator[Any]]) -> None:
        """A component that is known by its label alone, and looked at once."""
        if label not in self._taken:
            self._taken.add(label)
            self._pending.append((label, children, None))

    # ---- the result ----

    def result(self) -> Fingerprint:
        if self._looked - self.looks:
            looking = Fingerprinter(
                looks=self._looked | self.looks, memory=self._memory, earlier=self._earlier, ignored=self._ignored
            )
            for add in self._added:
                add(looking)
            return looking.result()
        components = self._with_roots_marked()
        aliases = _aliases(self._walks, self._memory, components)
        if aliases:
            components[ALIASES] = aliases.hex()
        return Fingerprint(
            digest_of(components),
            components,
            tuple(sorted(self._opaque)),
            {name: found for name in sorted(self._packages) if (found := version(name))} if self._packages else {},
            not self._opaque
            and not any(walk.memos[0] or walk.arrays for walk in self._walks)
            and not any(label.startswith("global ") for label in components),
            self.places,
        )

    def _with_roots_marked(self) -> dict[str, str]:
        return {label: found if label in self._roots else "~" + found for label, found in self._components.items()}

    def places(self) -> Mapping[tuple[str, int], Any]:
        """The mutable objects met so far, by component and number within it: the same for equal values in every process."""
        return Places(tuple(self._walks))

    @property
    def packages(self) -> frozenset[str]:
        """The installed packages of which something was met so far."""
        return frozenset(self._packages)

    def functions(self) -> dict[str, types.FunctionType]:
        """The user's functions met so far, methods and closures included, by component."""
        return {
            label: obj for label, obj in self._nodes.items() if isinstance(obj, types.FunctionType) and id(obj) in self._labels
        }

    def classes(self) -> dict[str, type]:
        """The user's classes met so far, by component."""
        return {label: obj for label, obj in self._nodes.items() if isinstance(obj, type) and id(obj) in self._labels}

    # ---- what a walk asks ----

    def outline(self, obj: Any) -> bytes:
        token = self.by_name(obj)
        if token is not None:
            return token
        if not isinstance(obj, types.FunctionType):
            module = getattr(obj, "__module__", None) or getattr(obj, "__name__", "")
            return b"l:" + text(f"{module}.{getattr(obj, '__qualname__', '')}")
        reading = read(obj.__code__)
        held = [cell.cell_contents for cell in obj.__closure__ or () if _is_filled(cell)]
        held += [*(obj.__defaults__ or ()), *(value for _, value in sorted((obj.__kwdefaults__ or {}).items()))]
        simple = b"".join(SCALARS[type(value)](value) if type(value) in SCALARS else b"-" for value in held)
        return b"l:" + text(obj.__code__.co_qualname) + reading.form()[0] + raw(simple)

    def by_name(self, obj: Any) -> bytes | None:
        """The token of something installed that is reached by its qualified name; None for everything else."""
        known = self._tokens.get(id(obj))
        if known is None:
            found, token = installed_name(obj), None
            module, qualname = found or ("", "")
            if found is not None:
                token = b"nM" + text(module) if isinstance(obj, types.ModuleType) else b"n" + text(module) + text(qualname)
            known = self._tokens[id(obj)] = (token, module, obj)  # kept with the object, whose id could be another's later
        if known[0] is not None:
            self.met(known[1])
        return known[0]

    def enter_function(self, walk: Walk, fn: types.FunctionType) -> Iterator[Any] | None:
        module = fn.__globals__.get("__name__")
        filename = fn.__code__.co_filename
        if not (is_installed(module) if filename.startswith("<") else is_installed_file(filename)):
            walk.refer(fn)
            return None
        token = self.by_name(fn)
        if token is not None and not _carries_users_code(fn):
            walk.out += token
            return None
        return self._installed_function(walk, fn, str(module))

    def enter_method_called(self, walk: Walk, method: types.MethodType) -> Iterator[Any] | None:
        return bound(walk, method)

    def reads_data(self, fn: Any) -> bool:
        """Whether the code of a function looks up variables that are neither functions, classes nor modules."""
        if not isinstance(fn, types.FunctionType):
            return False
        held = (look_up(name, fn.__globals__) for name in read(fn.__code__).executed)
        code = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
        return any(value is not MISSING and not isinstance(value, code) for value in held)

    def met(self, module: str) -> None:
        """Something of an installed package counts: which one is recorded, its version doesn't count."""
        root = module.partition(".")[0]
        if root not in sys.stdlib_module_names and root != "durable_nb":
            self._packages.add(root)

    def _installed_function(self, walk: Walk, fn: types.FunctionType, module: str) -> Iterator[Any]:
        """A function that an installed package made for the user: by name, and by what it carries of theirs."""
        qualname = fn.__code__.co_qualname
        self.met(module)
        walk.out += b"Xmade;" + text(module) + text(qualname)
        if walk.seen(fn):
            return
        if qualname == "singledispatch.<locals>.wrapper":  # its other cells are caches
            yield tuple(fn.registry.items())  # type: ignore[attr-defined]
            return
        if "<lambda>" in qualname:
            walk.out += read(fn.__code__).form()[0]
        if "<" in qualname:
            yield from (fn.__defaults__, fn.__kwdefaults__)
        yield fn.__closure__
        # of what else hangs on it only functions count: tenacity, for one, keeps its statistics there
        carried = (types.FunctionType, types.MethodType, functools.partial)
        yield from named(walk, {name: value for name, value in fn.__dict__.items() if isinstance(value, carried)})

    def alone(self, value: Any) -> str:
        """The digest of a value by itself."""
        found = Fingerprinter(memory=False)
        found.add_value("value", value)
        return found.result().digest

    # ---- nodes ----

    def node(self, obj: Any) -> str:
        label = self._labels.get(id(obj))
        if label is not None:
            return label
        children: Callable[[Walk], Iterator[Any]]
        if isinstance(obj, types.FunctionType):
            name = _qualified(obj.__globals__.get("__name__"), obj.__code__.co_qualname)
            label, children = f"function {name}", lambda walk: self._function(walk, obj)
        elif isinstance(obj, types.ModuleType):
            label, children = f"module {obj.__name__}", lambda walk: module_of(walk, obj)
        elif isinstance(obj, type):
            label = f"class {_qualified(obj.__module__, obj.__qualname__)}"
            children = lambda walk: class_of(walk, obj)  # noqa: E731
        else:
            raise TypeError(f"no code: {type(obj).__name__}")
        label = self._unique(label)
        self._labels[id(obj)] = label
        self._nodes[label] = obj
        self._pending.append((label, children, obj if isinstance(obj, types.FunctionType) else None))
        return label

    def _root(self, label: str) -> str:
        label = self._unique(label)
        self._roots.add(label)
        return label

    def _unique(self, label: str) -> str:
        number, unique = 1, label
        while unique in self._taken:
            number += 1
            unique = f"{label}#{number}"
        self._taken.add(unique)
        return unique

    def _held_by(self, namespace: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._earlier[1] if self._earlier is not None and namespace is self._earlier[0] else namespace

    def _global_label(self, name: str, namespace: Mapping[str, Any]) -> str:
        key = (id(namespace), name)
        label = self._globals.get(key)
        if label is None:
            label = self._unique(f"global {_qualified(namespace.get('__name__'), name)}")
            self._globals[key] = label
            self._names[label] = name
            self._keep.append(namespace)
        return label

    def _function(self, walk: Walk, fn: types.FunctionType) -> Iterator[Any]:
        reading = read(fn.__code__)
        self._looked |= reading.looks
        self.namespaces.setdefault(str(fn.__globals__.get("__name__")), fn.__globals__)
        found = self._resolved(reading, fn.__globals__)
        form, order = reading.form(frozenset(found), self.looks)
        walk.out += form
        if NAMES in self.looks:
            walk.out += text(fn.__name__) + text(fn.__qualname__)
        if MODULES in self.looks:
            walk.out += text(str(fn.__module__))
        if SOURCE in self.looks:
            walk.out += text(written(fn))
        if DOCSTRINGS in self.looks:
            yield docstring(fn.__doc__)
        if ANNOTATIONS in self.looks:
            yield from annotations_of(walk, fn, fn.__globals__)
        yield fn.__defaults__
        keywords = fn.__kwdefaults__
        if keywords:
            yield from named(walk, keywords)
        walk.out += b"closure"
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            walk.out += text(name)
            yield cell
        walk.out += b"dict"
        yield from named(walk, fn.__dict__)
        walk.out += b"code"
        for path in order:
            yield found[path]
        walk.out += b"globals"
        placed = frozenset(order)
        for name in reading.names if ANNOTATIONS in self.looks else reading.executed:
            uses = reading.uses.get(name)
            left = None if uses is None else frozenset(path for path in uses if not _is_below(placed, (name, *path)))
            if (name,) in placed or (uses and not left):
                continue
            walk.out += text(name)
            yield from self._global(walk, name, fn.__globals__, left)
        imports_of(walk, reading.imports, fn.__globals__)

    def _resolved(self, reading: Reading, namespace: dict[str, Any]) -> dict[tuple[str, ...], Any]:
        """The user's functions, classes and modules by the names by which code reads them."""
        found: dict[tuple[str, ...], Any] = {}
        for name in reading.renamable:
            if self._is_ignored(name, namespace):
                continue
            value, uses = look_up(name, self._held_by(namespace)), reading.uses.get(name)
            if not isinstance(value, types.ModuleType) or uses is None:
                if self._is_followed(value):
                    found[name,] = value
                continue
            for path in uses:
                held, length = reached(value, path)
                if self._is_followed(held):
                    found[name, *path[:length]] = held
        return found

    def _is_followed(self, value: Any) -> bool:
        return isinstance(value, types.FunctionType | type | types.ModuleType) and self.by_name(value) is None

    def _is_ignored(self, name: str, namespace: Mapping[str, Any]) -> bool:
        if name not in self._ignored or namespace.get("__name__") not in {"__main__", None}:
            return False
        self.met_ignored.add(name)
        return True

    def _global(self, walk: Walk, name: str, namespace: dict[str, Any], uses: Paths) -> Iterator[Any]:
        if self._is_ignored(name, namespace):
            walk.out += b"ignored"
            return
        value = look_up(name, self._held_by(namespace))
        if value is MISSING:
            walk.out += b"undefined"
        elif isinstance(value, types.ModuleType) and uses is not None:
            yield from attributes_of(walk, value, uses)
        elif isinstance(value, CODE):
            yield value
        else:
            self.value_of(walk, name, namespace, value)

    def value_of(self, walk: Walk, name: str, namespace: Mapping[str, Any], value: Any) -> None:
        walk.link(self._link_to(name, namespace, value))

    def _link_to(self, name: str, namespace: Mapping[str, Any], value: Any = MISSING) -> str:
        """The component of data that a name stands for."""
        known = (id(namespace), name) in self._globals
        label = self._global_label(name, namespace)
        if not known:
            held = look_up(name, self._held_by(namespace)) if value is MISSING else value
            self._pending.append((label, lambda _: iter((held,)), None))
        return label


class Places(Mapping[tuple[str, int], Any]):
    """Put together when they are first asked for: most looks at a large input need none."""

    def __init__(self, walks: tuple[Walk, ...]) -> None:
        self._walks = walks

    @functools.cached_property
    def _found(self) -> dict[tuple[str, int], Any]:
        found: dict[tuple[str, int], Any] = {}
        for walk in self._walks:
            objects = {id(obj): obj for obj in walk.keep}
            found.update({(walk.label, number): objects[key] for key, number in walk.memos[0].items() if key in objects})
        return found

    def __getitem__(self, place: tuple[str, int]) -> Any:
        return self._found[place]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    # those of a dict, which need no call for each of a million places
    def keys(self) -> KeysView[tuple[str, int]]:
        return self._found.keys()

    def items(self) -> ItemsView[tuple[str, int], Any]:
        return self._found.items()

    def values(self) -> ValuesView[Any]:
        return self._found.values()


# ---- code that is asked about again and again ----


@functools.lru_cache(maxsize=256)
def _about(tree: ast.AST) -> tuple[Looks, tuple[tuple[int, str], ...]]:
    return looks_of(tree), tuple(sorted(imported(tree)))


@functools.lru_cache(maxsize=256)
def _normal(tree: ast.AST, docstrings: bool) -> bytes:
    return normalise(tree, docstrings=docstrings)


# ---- small questions ----


def _started(children: Callable[[Walk], Iterator[Any]], walk: Walk) -> Iterator[Any]:
    yield from children(walk)


def _qualified(module: Any, name: str) -> str:
    return name if module in {"__main__", None} else f"{module}.{name}"


def _is_below(paths: frozenset[tuple[str, ...]], path: tuple[str, ...]) -> bool:
    return any(path[:length] in paths for length in range(1, len(path) + 1))


def _carries_users_code(fn: types.FunctionType) -> bool:
    """Whether something of the user's was registered with an installed function: then its name doesn't say enough."""
    held = [*(cell.cell_contents for cell in fn.__closure__ or () if _is_filled(cell)), *fn.__dict__.values()]
    held += [value for found in held if isinstance(found, dict | types.MappingProxyType) for value in found.values()]
    held += [value for found in held if isinstance(found, list | tuple) for value in found]
    return any(isinstance(found, types.FunctionType) and not is_installed_file(found.__code__.co_filename) for found in held)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _aliases(walks: list[Walk], memory: bool, components: Mapping[str, str]) -> bytes:
    """Where one mutable object, or one stretch of array memory, is reached from several components."""
    shared: set[int] = set()
    once: set[int] = set()
    for walk in walks:
        shared |= once & walk.memos[0].keys()
        once |= walk.memos[0].keys()
    if not shared and not (memory and any(walk.arrays for walk in walks)):
        return b""
    places: dict[int, list[bytes]] = {}
    known = numbers_of(components)
    said = {label: text(label) if value[0] != "~" else b"%d;" % known[label] for label, value in components.items()}
    for walk in walks if shared else ():
        for key in shared & walk.memos[0].keys():
            places.setdefault(key, []).append(said[walk.label] + b"%d;" % walk.memos[0][key])
    groups = sorted(b"".join(sorted(found)) for found in places.values())
    if memory:
        groups += _overlaps(walks, said)
    if not groups:
        return b""
    return blake2b(b"".join(raw(group) for group in groups), digest_size=DIGEST_BYTES, person=PERSON).digest()


def _overlaps(walks: list[Walk], said: Mapping[str, bytes]) -> list[bytes]:
    arrays = [(said[walk.label] + b"%d;" % number, array) for walk in walks for number, array in walk.arrays if number >= 0]
    if len(arrays) < 2:
        return []
    from ._arrays import byte_bounds

    spans = sorted((*byte_bounds(array), label, id(array)) for label, array in arrays if array.size)
    found: list[bytes] = []
    open_spans: list[tuple[int, int, bytes, int]] = []
    for start, stop, label, key in spans:
        open_spans = [span for span in open_spans if span[1] > start]
        for other_start, _, other, other_key in open_spans:
            if other_key != key:
                one, two = sorted(((other, 0), (label, start - other_start)))
                found.append(one[0] + two[0] + b"%d;" % (two[1] - one[1]))
        open_spans.append((start, stop, label, key))
    return sorted(found)


ALIASES = "aliases"
TOOLS = {"arg tools", "arg functions"}
"""Arguments whose functions are shown to a language model, with their names, annotations and docstrings."""


def digest_of(components: Mapping[str, str]) -> str:
    """The digest of a fingerprint that has these components; what is left out of them counts as left out."""
    return blake2b(joined(components), digest_size=DIGEST_BYTES, person=PERSON).hexdigest()


def joined(components: Mapping[str, str]) -> bytes:
    """The bytes that a fingerprint's digest is of. A call comes first: what follows it are its arguments."""
    if len(components) == 1:
        ((label, value),) = components.items()
        if "|" not in value and value[0] != "~":  # what the general way gives
            return b"%b%b;" % (text(label), value.encode())
    numbers = numbers_of(components)
    out: list[bytes] = []
    for label in numbers:
        value = components.get(label, "")
        own, *edges = value.lstrip("~").split("|")
        name = b"" if value[:1] in {"~", ""} else text(label)
        out += (name, own.encode(), b"".join([b">%d" % numbers[edge] for edge in edges]), b";")
    return b"".join(out)


def numbers_of(components: Mapping[str, str]) -> dict[str, int]:
    """Components in an order that no label but those of roots has a part in: as they are reached, breadth first."""
    roots = sorted((label for label, value in components.items() if value[0] != "~"), key=_rank)
    numbers: dict[str, int] = {}
    for root in roots:
        pending = deque([root])
        while pending:
            label = pending.popleft()
            if label in numbers:
                continue
            numbers[label] = len(numbers)
            pending.extend(components.get(label, "").split("|")[1:])
    return numbers


def _rank(label: str) -> tuple[int, str]:
    return {"call": 0, ALIASES: 2}.get(label, 1), label
