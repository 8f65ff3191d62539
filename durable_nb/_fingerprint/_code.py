"""Code as a graph: functions, classes, modules and globals, each a component, linked to each other by label."""

from __future__ import annotations

import ast
import builtins
import dis
import enum
import functools
import importlib.util
import os
import sys
import types
from collections import deque
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from ._source import (
    Paths,
    imported,
    normalise,
    read,
    shows_docstrings,
)
from ._values import (
    BULK_BYTES,
    DIGEST_BYTES,
    MISSING,
    PERSON,
    SCALARS,
    Opaque,
    Unhashable,
    Walk,
    configure,
    named,
    raw,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping

_HEAP_TYPE = 1 << 9  # a class made by a class statement or the like; others are C, such as NoneType
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # noqa: PTH100, PTH120  pathlib would double our import time
_STDLIB = tuple({os.path.dirname(os.__file__) + os.sep, os.path.realpath(os.path.dirname(os.__file__)) + os.sep})  # noqa: PTH120


@dataclass(frozen=True)
class Fingerprint:
    """An identity and what it is made of: two of them differ where their components do."""

    digest: str
    components: dict[str, str]
    opaque: tuple[Opaque, ...]
    versions: dict[str, str]
    lasting: bool
    """Nothing of it can change while the same call goes on: no mutable object was met, and no global variable."""
    places: Callable[[], dict[tuple[str, int], Any]] = field(compare=False, repr=False)
    """The mutable objects met, by component and number within it."""


_CODE = (types.FunctionType, type, types.ModuleType, types.BuiltinFunctionType)


# ---- whose code is it ----


@functools.lru_cache(maxsize=4096)
def _is_installed_file(filename: str) -> bool:
    if filename.startswith("<frozen"):
        return True
    path = os.path.realpath(filename)
    if path.startswith(_HERE) or filename.startswith(_HERE):
        return True
    parts = path.replace(os.sep, "/").split("/")
    return "site-packages" in parts or "dist-packages" in parts or path.startswith(_STDLIB)


def _is_installed(module_name: str | None) -> bool:
    """Whether a module is Python's own, an installed package's, or ours; the user's project is none of these."""
    if not module_name or module_name == "__main__":
        return False
    module = sys.modules.get(module_name)
    filename = getattr(module, "__file__", None)
    if isinstance(filename, str):
        return _is_installed_file(filename)
    root = module_name.partition(".")[0]
    if root in sys.stdlib_module_names:
        return True
    if module is None:
        return root in sys.modules and root != module_name and _is_installed(root)
    path = getattr(module, "__path__", None)
    if path is not None:
        return any(_is_installed_file(os.path.join(str(part), "")) for part in path)  # noqa: PTH118
    if root != module_name and getattr(module, "__spec__", None) is None:
        return _is_installed(root)  # made by an extension module
    return False


def _leads_to(module_name: str | None, qualname: str, obj: Any) -> bool:
    found: Any = sys.modules.get(module_name or "")
    for part in qualname.split("."):
        try:
            found = getattr(found, part, None)
        except Exception:
            return False
    return found is obj


class Fingerprinter:
    """Collects what an identity depends on, piece by piece; `result()` may be asked at any time.

    Mutable objects shared between pieces are remembered, and count: `K = L` is another input than `K = L[:]`.
    A piece that can't be read raises `Unhashable` and leaves the rest as it was. With `memory`, overlapping
    arrays count as well; values that went through pickle have lost that.
    """

    def __init__(
        self,
        *,
        docstrings: bool = False,
        memory: bool = True,
        earlier: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
        ignored: Container[str] = (),
    ) -> None:
        """`earlier`: a namespace and what it held at an earlier time, which counts in its place, for functions in it too.
        `ignored`: names of the notebook that don't count, whoever reads them."""
        self.met_ignored: set[str] = set()
        self._ignored = ignored
        self._docstrings = docstrings
        self._earlier = earlier
        self._memory = self.whole = memory
        self._shows_docstrings = False
        self._components: dict[str, bytes] = {}
        self._labels: dict[int, str] = {}
        self._globals: dict[tuple[int, str], str] = {}
        self._keep: list[Any] = []
        self._taken: set[str] = set()
        self._pending: deque[tuple[str, Callable[[Walk], Iterator[Any]]]] = deque()
        self._walks: list[Walk] = []
        self._opaque: set[Opaque] = set()
        self._packages: set[str] = set()
        self._added: list[Callable[[Fingerprinter], None]] = []

    # ---- adding ----

    def add_code(self, label: str, tree: ast.AST) -> None:
        """Code by its normal form and the project's modules that it imports; the names it reads are added apart.

        What is found out about `tree` is kept with it: it must not be changed afterwards.
        """
        shows, imports = _about(tree)
        self._shows_docstrings |= shows

        def children(walk: Walk) -> Iterator[Any]:
            walk.out += b"A" + raw(_normal(tree, self._docstrings))
            self._imports(walk, imports, None)
            return iter(())

        self._add(self._unique(label), children)
        self._added.append(lambda other: other.add_code(label, tree))

    def add_name(self, name: str, namespace: Mapping[str, Any], uses: Paths = None) -> None:
        """What `name` stands for in `namespace` or builtins, or that it stands for nothing, as "global NAME".

        `uses`, from `attribute_uses`, narrows a project's module to the attributes that are read.
        """
        if self._is_ignored(name, namespace):
            return
        value = _look_up(name, self._held_by(namespace))
        label = self._global_label(name, namespace)
        if label in self._components:
            return
        self._added.append(lambda other: other.add_name(name, namespace, uses))

        def children(walk: Walk) -> Iterator[Any]:
            if value is MISSING:
                walk.out += b"undefined"
            elif isinstance(value, types.ModuleType) and uses is not None:
                yield from self._attributes(walk, value, uses)
            else:
                yield value

        self._add(label, children)

    def add_value(self, label: str, value: Any) -> None:
        write = SCALARS.get(type(value))
        if write is not None:  # what a walk of it would give
            self._components[self._unique(label)] = blake2b(write(value), digest_size=DIGEST_BYTES, person=PERSON).digest()
        else:
            self._add(self._unique(label), lambda _: iter((value,)))
        self._added.append(lambda other: other.add_value(label, value))

    def add_function(self, label: str, fn: Any) -> None:
        """As `add_value`, and as the first piece. One whose code and constants are what they were isn't walked again."""
        known = _KNOWN.get(id(fn)) if not self._docstrings else None
        if known is not None and known.fn is fn and known.holds(self):
            self._components, self._packages = dict(known.components), set(known.packages)
            self._labels, self._globals = dict(known.labels), dict(known.globals)
            self._taken = set(known.components)
            self._keep = [known]
            self._added.append(lambda other: other.add_value(label, fn))
            return
        self._packages.clear()  # of things looked at in vain
        self.add_value(label, fn)
        sources = None if self._docstrings or self._shows_docstrings or self._opaque else _sources(self, fn)
        if sources is not None and not any(walk.memos[0] or walk.arrays for walk in self._walks):
            if len(_KNOWN) >= _KNOWN_LIMIT:
                _KNOWN.clear()
            parts = dict(self._components)
            said = {part: digest.hex() for part, digest in parts.items()}
            joined = b"".join([text(part) + parts[part] for part in sorted(parts)])
            lasting = not any(part.startswith("global ") for part in parts)
            labels, names, packages = dict(self._labels), dict(self._globals), set(self._packages)
            _KNOWN[id(fn)] = _Known(fn, *sources, parts, labels, names, packages, said, joined, lasting)

    def _add(self, label: str, children: Callable[[Walk], Iterator[Any]]) -> None:
        self._pending.append((label, children))
        failed: Exception | None = None
        while self._pending:
            label, children = self._pending.popleft()
            walk = Walk(self, label)
            try:
                self._components[label] = walk.digest(_started(children, walk))
            except Exception as error:
                failed = failed or error
                self._labels = {key: known for key, known in self._labels.items() if known != label}
                self._globals = {key: known for key, known in self._globals.items() if known != label}
                continue
            self._walks.append(walk)
            self._opaque |= walk.opaque
        if failed is not None:
            raise failed

    # ---- the result ----

    def result(self) -> Fingerprint:
        if self._shows_docstrings and not self._docstrings:
            documented = Fingerprinter(docstrings=True, memory=self._memory, earlier=self._earlier, ignored=self._ignored)
            for add in self._added:
                add(documented)
            return documented.result()
        components = dict(self._components)
        aliases = _aliases(self._walks, self._memory)
        if aliases:
            components["aliases"] = aliases
        said = {label: digest.hex() for label, digest in components.items()}
        return Fingerprint(
            digest_of(said),
            said,
            tuple(sorted(self._opaque)),
            {name: found for name in sorted(self._packages) if (found := _version(name))} if self._packages else {},
            not self._opaque
            and not any(walk.memos[0] or walk.arrays for walk in self._walks)
            and not any(label.startswith("global ") for label in said),
            self.places,
        )

    def places(self) -> dict[tuple[str, int], Any]:
        """The mutable objects met so far, by component and number within it: the same for equal values in every process."""
        found: dict[tuple[str, int], Any] = {}
        for walk in self._walks:
            objects = {id(obj): obj for obj in walk.keep}
            found.update({(walk.label, number): objects[key] for key, number in walk.memos[0].items() if key in objects})
        return found

    def functions(self) -> dict[str, types.FunctionType]:
        """The user's functions met so far, methods and closures included, by component."""
        return {
            self._labels[id(obj)]: obj for obj in self._keep if isinstance(obj, types.FunctionType) and id(obj) in self._labels
        }

    # ---- what a walk asks ----

    def refer(self, obj: Any) -> bytes:
        token = self.by_name(obj)
        return token if token is not None else b"L" + text(self._node(obj))

    def outline(self, obj: Any) -> bytes:
        token = self.by_name(obj)
        if token is not None:
            return token
        if not isinstance(obj, types.FunctionType):
            return b"l:" + text(f"{_module_of(obj)}.{getattr(obj, '__qualname__', '')}")
        reading = read(obj.__code__)
        held = [cell.cell_contents for cell in obj.__closure__ or () if _is_filled(cell)]
        held += [*(obj.__defaults__ or ()), *(value for _, value in sorted((obj.__kwdefaults__ or {}).items()))]
        simple = b"".join(SCALARS[type(value)](value) if type(value) in SCALARS else b"-" for value in held)
        return b"l:" + text(obj.__code__.co_qualname) + reading.plain + raw(simple)

    def by_name(self, obj: Any) -> bytes | None:
        """The token of something installed that is reached by its qualified name; None for everything else."""
        if isinstance(obj, types.ModuleType):
            name = obj.__name__
            if not _is_installed(name) or sys.modules.get(name) is not obj:
                return None
            self._met(name)
            return b"nM" + text(name)
        if isinstance(obj, type):
            module, qualname = obj.__module__, obj.__qualname__
        elif isinstance(obj, types.MethodType | types.BuiltinMethodType) and _is_bound(obj):
            exporter = _exporter(obj)
            if exporter is None:
                return None
            self._met(exporter)
            return b"n" + text(exporter) + text(obj.__name__)
        elif callable(obj):
            module, qualname = _claimed(obj)
        else:
            return None
        if not isinstance(module, str) or not isinstance(qualname, str) or not _is_installed(module):
            return None
        if not _leads_to(module, qualname, obj) and not (isinstance(obj, type) and not obj.__flags__ & _HEAP_TYPE):
            return None
        self._met(module)
        return b"n" + text(module) + text(qualname)

    def enter_function(self, walk: Walk, fn: types.FunctionType) -> Iterator[Any] | None:
        module = fn.__globals__.get("__name__")
        filename = fn.__code__.co_filename
        if not (_is_installed(module) if filename.startswith("<") else _is_installed_file(filename)):
            walk.refer(fn)
            return None
        token = None if fn.__closure__ or fn.__dict__ else self.by_name(fn)
        if token is not None:
            walk.out += token
            return None
        return self._installed_function(walk, fn, str(module))

    def _met(self, module: str) -> None:
        root = module.partition(".")[0]
        if root not in sys.stdlib_module_names and root != "durable_nb":
            self._packages.add(root)

    def _installed_function(self, walk: Walk, fn: types.FunctionType, module: str) -> Iterator[Any]:
        """A function that an installed package made for the user: by name, and by what it carries of theirs."""
        qualname = fn.__code__.co_qualname
        self._met(module)
        walk.out += b"Xmade;" + text(module) + text(qualname)
        if walk.seen(fn):
            return
        if qualname == "singledispatch.<locals>.wrapper":  # its other cells are caches
            yield tuple(fn.registry.items())  # type: ignore[attr-defined]
            return
        if "<lambda>" in qualname:
            walk.out += read(fn.__code__).plain
        if "<" in qualname:
            yield from (fn.__defaults__, fn.__kwdefaults__)
        yield fn.__closure__
        # of what else hangs on it only functions count: tenacity, for one, keeps its statistics there
        carried = (types.FunctionType, types.MethodType, functools.partial)
        yield from named(walk, {name: value for name, value in fn.__dict__.items() if isinstance(value, carried)})

    # ---- nodes ----

    def _node(self, obj: Any) -> str:
        label = self._labels.get(id(obj))
        if label is not None:
            return label
        children: Callable[[Walk], Iterator[Any]]
        if isinstance(obj, types.FunctionType):
            name = _qualified(obj.__globals__.get("__name__"), obj.__code__.co_qualname)
            label, children = f"function {name}", lambda walk: self._function(walk, obj)
        elif isinstance(obj, types.ModuleType):
            label, children = f"module {obj.__name__}", lambda walk: self._module(walk, obj)
        elif isinstance(obj, type):
            label = f"class {_qualified(obj.__module__, obj.__qualname__)}"
            children = lambda walk: self._class(walk, obj)  # noqa: E731
        else:
            raise TypeError(f"no code: {type(obj).__name__}")
        label = self._unique(label)
        self._labels[id(obj)] = label
        self._keep.append(obj)
        self._pending.append((label, children))
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
            self._keep.append(namespace)
        return label

    def _function(self, walk: Walk, fn: types.FunctionType) -> Iterator[Any]:
        reading = read(fn.__code__)
        self._shows_docstrings |= reading.shows_docstrings
        walk.out += reading.documented if self._docstrings else reading.plain
        walk.out += text(fn.__name__) + text(fn.__qualname__)
        if self._docstrings:
            yield fn.__doc__
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
        walk.out += b"globals"
        for name in reading.names:
            walk.out += text(name)
            yield from self._global(walk, name, fn.__globals__, reading.uses.get(name))
        self._imports(walk, reading.imports, fn.__globals__)

    def _is_ignored(self, name: str, namespace: Mapping[str, Any]) -> bool:
        if name not in self._ignored or namespace.get("__name__") not in {"__main__", None}:
            return False
        self.met_ignored.add(name)
        return True

    def _global(self, walk: Walk, name: str, namespace: dict[str, Any], uses: Paths) -> Iterator[Any]:
        if self._is_ignored(name, namespace):
            walk.out += b"ignored"
            return
        value = _look_up(name, self._held_by(namespace))
        if value is MISSING:
            walk.out += b"undefined"
        elif isinstance(value, types.ModuleType) and uses is not None:
            yield from self._attributes(walk, value, uses)
        elif isinstance(value, _CODE):
            yield value
        else:
            self._value_of(walk, name, namespace, value)

    def _value_of(self, walk: Walk, name: str, namespace: Mapping[str, Any], value: Any) -> None:
        known = (id(namespace), name) in self._globals
        label = self._global_label(name, namespace)
        if not known:
            self._pending.append((label, lambda _: iter((value,))))
        walk.out += b"L" + text(label)

    def _attributes(self, walk: Walk, module: types.ModuleType, uses: Iterable[tuple[str, ...]]) -> Iterator[Any]:
        """The attributes of a module that are read, each a component; of an installed one its name says enough."""
        for path in sorted(uses):
            walk.out += text(".".join(path))
            yield from self._attribute(walk, module, path)
        walk.out += b"end"

    def _attribute(self, walk: Walk, module: types.ModuleType, path: tuple[str, ...]) -> Iterator[Any]:
        owner = module
        for step, part in enumerate(path):
            token = self.by_name(owner)
            if token is not None:
                walk.out += token + text(".".join(path[step:]))
                return
            value = vars(owner).get(part, MISSING)
            if isinstance(value, types.ModuleType):
                owner = value
                continue
            if value is MISSING:
                walk.out += b"undefined"
                if "__getattr__" in vars(owner):
                    yield owner
            elif isinstance(value, _CODE):
                yield value
            else:
                self._value_of(walk, part, vars(owner), value)
            return
        yield owner

    # ---- modules ----

    def _module(self, walk: Walk, module: types.ModuleType) -> Iterator[Any]:
        """A project's module used as a whole: all that it holds now."""
        walk.out += b"M" + text(module.__name__)
        for name, value in sorted(vars(module).items()):
            if name.startswith("__") and name.endswith("__") and name not in {"__getattr__", "__all__", "__version__"}:
                continue
            walk.out += text(name)
            yield value
        walk.out += b"end"

    def _imports(self, walk: Walk, names: Iterable[tuple[int, str]], namespace: Mapping[str, Any] | None) -> None:
        """Modules that code imports when it runs: by source, as they may not be loaded yet."""
        for level, name in names:
            absolute = name
            if level:
                package = str((namespace or {}).get("__package__") or "")
                try:
                    absolute = importlib.util.resolve_name("." * level + name, package)
                except (ImportError, ValueError):
                    continue
            if self._is_project_module(absolute):
                walk.out += b"L" + text(self._static(absolute))

    def _is_project_module(self, name: str) -> bool:
        return not _is_installed(name) and _source_file(name) is not None

    def _static(self, name: str) -> str:
        label = f"import {name}"
        if label not in self._taken:
            self._taken.add(label)
            self._pending.append((label, lambda walk: self._import(walk, name)))
        return label

    def _import(self, walk: Walk, name: str) -> Iterator[Any]:
        filename = _source_file(name)
        with open(str(filename), "rb") as file:  # noqa: PTH123
            source = file.read()
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            walk.out += raw(source)
            return
        walk.out += raw(normalise(tree, docstrings=self._docstrings))
        package = name if os.path.basename(str(filename)) == "__init__.py" else name.rpartition(".")[0]  # noqa: PTH119
        self._imports(walk, sorted(imported(tree)), {"__package__": package})
        loaded = sys.modules.get(name)
        if loaded is not None:
            yield from self._changed_since_import(walk, loaded, tree)

    def _changed_since_import(self, walk: Walk, module: types.ModuleType, tree: ast.Module) -> Iterator[Any]:
        """What a loaded module holds that its file doesn't say: constants set since, functions of an older text."""
        members = vars(module)
        bound = [name for node in tree.body for name in _bound(node)]
        for node in tree.body:
            names = _bound(node)
            if len(names) != 1 or bound.count(names[0]) != 1 or names[0] not in members:
                continue
            value = members[names[0]]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.decorator_list:
                written = isinstance(value, types.FunctionType) and read(value.__code__).node
                if written and normalise(written) == normalise(node):
                    continue
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                try:
                    literal = ast.literal_eval(node.value)  # type: ignore[arg-type]  # None raises as well
                except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                    continue
                if _alone(literal) == _alone(value):
                    continue
            else:
                continue
            walk.out += b"now" + text(names[0])
            yield value

    # ---- classes ----

    def _class(self, walk: Walk, cls: type) -> Iterator[Any]:
        members = vars(cls)
        walk.out += b"class" + text(cls.__qualname__)
        yield cls.__bases__
        yield None if type(cls) is type else type(cls)
        if self._docstrings:
            yield members.get("__doc__")
        for name, annotation in _annotations(cls):
            walk.out += text(name) + text(annotation_text(annotation))
        walk.out += b"special"
        if issubclass(cls, enum.Enum):
            for name, member in cls.__members__.items():
                walk.out += text(name)
                yield (member._name_, member._value_)
                yield from named(walk, {key: value for key, value in vars(member).items() if not _by_enum(key, value)})
        fields = members.get("__dataclass_fields__")
        if fields is not None:
            params = members["__dataclass_params__"]
            yield tuple(getattr(params, name) for name in ("init", "repr", "eq", "order", "unsafe_hash", "frozen"))
            for field in fields.values():
                walk.out += text(field.name) + text(annotation_text(field.type)) + text(field._field_type.name)
                yield from (field.default, field.default_factory, field.metadata)
                yield (field.init, field.repr, field.hash, field.compare, field.kw_only)
        if "__struct_fields__" in dir(cls):  # msgspec keeps its defaults outside the namespace
            yield (cls.__struct_fields__, cls.__struct_encode_fields__)  # type: ignore[attr-defined]
            for default in cls.__struct_defaults__:  # type: ignore[attr-defined]
                walk.out += text(type(default).__name__)
                yield default.factory if type(default).__name__ == "Factory" else default
        for name, field in (members.get("__pydantic_fields__") or {}).items():
            walk.out += text(name)
            yield field.annotation
            yield from (getattr(field, part, None) for part in _FIELD_INFO)
        walk.out += b"members"
        for name, value in sorted(_members(cls)):
            walk.out += text(name)
            yield value
        walk.out += b"end"


_FIELD_INFO = ("default", "default_factory", "alias", "validation_alias", "title", "description", "metadata", "frozen")
_NO_MEMBERS = {
    "__dict__", "__weakref__", "__module__", "__doc__", "__qualname__", "__firstlineno__", "__static_attributes__",
    "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__conditional_annotations__",
    "__parameters__", "__orig_bases__", "__abstractmethods__", "__dataclass_fields__", "__dataclass_params__",
    "__slotnames__", "__signature__", "__class_vars__", "__private_attributes__", "__type_params__",
}  # fmt: skip


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """What the class statement wrote; what Python and frameworks add follows from it."""
    members = vars(cls)
    generated = "__dataclass_fields__" in members
    is_enum = issubclass(cls, enum.Enum)
    for name, value in members.items():
        if name in _NO_MEMBERS or name.startswith("__pydantic_"):
            continue
        if isinstance(value, types.GetSetDescriptorType | types.MemberDescriptorType):
            continue
        if type(value).__module__ == "_abc":
            continue
        code = getattr(value, "__code__", None)
        if generated and code is not None and _by_dataclass(value, code):
            continue
        if code is not None and code.co_filename.startswith("<attrs generated"):
            continue
        if "_field_defaults" in members and _by_namedtuple(value):
            continue
        if is_enum and (name in cls.__members__ or _by_enum(name, value)):  # type: ignore[attr-defined]
            continue
        yield name, value


def _by_dataclass(value: Any, code: types.CodeType) -> bool:
    return code.co_qualname.startswith("__create_fn__") or value.__globals__.get("__name__") in {
        "dataclasses",
        "reprlib",
    }


def _by_namedtuple(value: Any) -> bool:
    if type(value).__name__ == "_tuplegetter":
        return True
    fn = getattr(value, "__func__", value)
    if not isinstance(fn, types.FunctionType):
        return False
    maker = str(fn.__globals__.get("__name__"))
    return maker.startswith("namedtuple_") or _is_installed_file(fn.__code__.co_filename)


def _by_enum(name: str, value: Any) -> bool:
    if name.startswith("_") and name.endswith("_") and not name.startswith("__"):
        return True
    code = getattr(value, "__code__", None)
    return name.startswith("__") and (code is None or _is_installed_file(code.co_filename))


def _annotations(cls: type) -> list[tuple[str, Any]]:
    if sys.version_info >= (3, 14):
        import annotationlib

        found = annotationlib.get_annotations(cls, format=annotationlib.Format.FORWARDREF)
    else:
        found = vars(cls).get("__annotations__", {})
    return list(found.items()) if isinstance(found, dict) else []


def annotation_text(annotation: Any) -> str:
    """An annotation in words that are the same whichever Python spells its union."""
    if isinstance(annotation, str):
        return annotation
    if issubclass(type(annotation), type):
        return f"{annotation.__module__}.{annotation.__qualname__}"
    origin, args = getattr(annotation, "__origin__", None), getattr(annotation, "__args__", None)
    if isinstance(annotation, types.UnionType) or getattr(origin, "_name", None) == "Union":
        origin = "typing.Union"
    if isinstance(args, tuple) and origin is not None:
        more = [getattr(annotation, "__metadata__", None)]
        inner = ", ".join(annotation_text(arg) for arg in [*args, *(part for part in more if part)])
        return f"{annotation_text(origin)}[{inner}]"
    if isinstance(annotation, tuple | list):
        return "(" + ", ".join(annotation_text(part) for part in annotation) + ")"
    if type(annotation) in SCALARS:
        return repr(annotation)
    named_ = getattr(annotation, "__forward_arg__", None) or getattr(annotation, "__name__", None)
    kind = type(annotation)
    return f"{kind.__module__}.{kind.__qualname__} {named_ or getattr(annotation, '_name', '')}"


# ---- code that is asked about again and again ----


@functools.lru_cache(maxsize=256)
def _about(tree: ast.AST) -> tuple[bool, tuple[tuple[int, str], ...]]:
    return shows_docstrings(tree), tuple(sorted(imported(tree)))


@functools.lru_cache(maxsize=256)
def _normal(tree: ast.AST, docstrings: bool) -> bytes:
    return normalise(tree, docstrings=docstrings)


@dataclass(frozen=True, slots=True)
class _Known:
    """The components of a function, and all that they follow from. What could change without a trace here is not in them."""

    fn: types.FunctionType
    functions: tuple[tuple[types.FunctionType, types.CodeType, str, str, tuple[Any, ...] | None], ...]
    names: tuple[tuple[dict[str, Any], str, Any], ...]
    installed: tuple[tuple[Any, bytes], ...]
    components: dict[str, bytes]
    labels: dict[int, str]
    globals: dict[tuple[int, str], str]
    packages: set[str]
    said: dict[str, str]
    joined: bytes
    """The components as `digest_of` puts them together."""
    lasting: bool

    def holds(self, graph: Fingerprinter) -> bool:
        return (
            all(
                fn.__code__ is code
                and fn.__name__ == name
                and fn.__qualname__ == qualname
                and fn.__defaults__ is defaults
                and not (fn.__kwdefaults__ or fn.__dict__)
                for fn, code, name, qualname, defaults in self.functions
            )
            and all(_look_up(name, namespace) is value for namespace, name, value in self.names)
            and all(graph.by_name(obj) == token for obj, token in self.installed)
        )


_KNOWN: dict[int, _Known] = {}
_KNOWN_LIMIT = 1000


def _sources(graph: Fingerprinter, fn: Any) -> tuple[Any, Any, Any] | None:
    """What the components of `fn` follow from; None where that is more than code, constants and installed things."""
    functions: dict[int, Any] = {}
    names: list[tuple[dict[str, Any], str, Any]] = []
    installed: list[tuple[Any, bytes]] = []
    pending = [fn]
    while pending:
        found = pending.pop()
        if id(found) in functions:
            continue
        if type(found) is not types.FunctionType or found.__closure__ or found.__dict__ or found.__kwdefaults__:
            return None
        code, namespace = found.__code__, found.__globals__
        module = namespace.get("__name__")
        if _is_installed_file(code.co_filename) or (code.co_filename.startswith("<") and module not in {None, "__main__"}):
            return None
        reading = read(code)
        if (
            graph.by_name(found) is not None
            or reading.imports
            or any(type(value) not in SCALARS for value in found.__defaults__ or ())
        ):
            return None
        functions[id(found)] = (found, code, found.__name__, found.__qualname__, found.__defaults__)
        names.append((namespace, "__name__", _look_up("__name__", namespace)))
        for name in reading.names:
            value = _look_up(name, namespace)
            names.append((namespace, name, value))
            if value is MISSING:
                continue
            if type(value) in SCALARS:
                if isinstance(value, str | bytes) and len(value) >= BULK_BYTES:  # not to be kept alive from here
                    return None
                continue
            if type(value) is types.FunctionType and not _is_installed_file(value.__code__.co_filename):
                pending.append(value)
                continue
            simple = type(value) is not types.FunctionType or not (value.__closure__ or value.__dict__)
            token = graph.by_name(value) if isinstance(value, _CODE) and simple else None
            if token is None:
                return None
            installed.append((value, token))
    return tuple(functions.values()), tuple(names), tuple(installed)


# ---- small questions ----


def _started(children: Callable[[Walk], Iterator[Any]], walk: Walk) -> Iterator[Any]:
    yield from children(walk)


def _qualified(module: Any, name: str) -> str:
    return name if module in {"__main__", None} else f"{module}.{name}"


def _module_of(obj: Any) -> str:
    return str(getattr(obj, "__module__", None) or getattr(obj, "__name__", ""))


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_bound(obj: Any) -> bool:
    return obj.__self__ is not None and not isinstance(obj.__self__, types.ModuleType)


def _exporter(method: Any) -> str | None:
    """The installed module that offers a method of a hidden object as a function, as `random.random` is one."""
    owner = method.__self__
    module = str((owner if isinstance(owner, type) else type(owner)).__module__)
    while module and _is_installed(module):
        if module != "builtins" and vars(sys.modules.get(module, builtins)).get(method.__name__) == method:
            return module
        module = module.rpartition(".")[0]
    return None


def _claimed(obj: Any) -> tuple[Any, Any]:
    if not _is_installed(type(obj).__module__) and not isinstance(obj, types.FunctionType):
        return None, None
    try:
        return obj.__module__, obj.__qualname__
    except Exception:
        return None, None


def _look_up(name: str, namespace: Mapping[str, Any]) -> Any:
    value = namespace.get(name, MISSING)
    if value is not MISSING:
        return value
    found = namespace.get("__builtins__", builtins)
    return (found if isinstance(found, dict) else vars(found)).get(name, MISSING)


def _source_file(name: str) -> str | None:
    """The file of a project's module, loaded or not; nothing is imported to find it."""
    module = sys.modules.get(name)
    if module is not None:
        filename = getattr(module, "__file__", None)
        return filename if isinstance(filename, str) and filename.endswith(".py") else None
    parent, _, _ = name.rpartition(".")
    root = name.partition(".")[0]
    if not name or root in sys.stdlib_module_names:
        return None
    try:
        if parent:
            above = _source_file(parent)
            if above is None or os.path.basename(above) != "__init__.py":  # noqa: PTH119
                return None
            search: list[str] | None = [os.path.dirname(above)]  # noqa: PTH120
        else:
            search = None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, search)
    except (ImportError, ValueError, AttributeError):
        return None
    origin = spec.origin if spec is not None else None
    if not origin or not origin.endswith(".py") or _is_installed_file(origin):
        return None
    return origin


def _bound(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    if len(targets) == 1 and isinstance(targets[0], ast.Name):
        return [targets[0].id]
    return [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)]


def _alone(value: Any) -> str:
    return of_value(value).digest


def _aliases(walks: list[Walk], memory: bool) -> bytes:
    """Where one mutable object, or one stretch of array memory, is reached from several components."""
    places: dict[int, list[bytes]] = {}
    for walk in walks:
        for key, number in walk.memos[0].items():
            places.setdefault(key, []).append(text(walk.label) + b"%d;" % number)
    groups = sorted(b"".join(sorted(found)) for found in places.values() if len(found) > 1)
    if memory:
        groups += _overlaps(walks)
    if not groups:
        return b""
    return blake2b(b"".join(raw(group) for group in groups), digest_size=DIGEST_BYTES, person=PERSON).digest()


def _overlaps(walks: list[Walk]) -> list[bytes]:
    arrays = [(text(walk.label) + b"%d;" % number, array) for walk in walks for number, array in walk.arrays if number >= 0]
    if len(arrays) < 2:
        return []
    bounds = sys.modules["numpy"].lib.array_utils.byte_bounds
    spans = sorted((*bounds(array), label, id(array)) for label, array in arrays if array.size)
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


@functools.lru_cache(maxsize=1024)
def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except Exception:
        found = _distributions().get(package)
    try:
        return metadata.version(found[0]) if found else None
    except Exception:
        return None


@functools.lru_cache(maxsize=1)
def _distributions() -> Mapping[str, list[str]]:
    from importlib import metadata

    return metadata.packages_distributions()


# ---- whole identities ----


def digest_of(components: Mapping[str, str]) -> str:
    """The digest of a fingerprint that has these components."""
    parts = b"".join([text(label) + bytes.fromhex(components[label]) for label in sorted(components)])
    return blake2b(parts, digest_size=DIGEST_BYTES, person=PERSON).hexdigest()


def object_of(label: str) -> Any:
    """What a component "global NAME" or "function NAME" stands for now; None where it can't be told."""
    where, _, name = label.partition(" ")[2].rpartition(".")
    module = sys.modules.get(where or "__main__")
    return getattr(module, name, None)


def source_of(function: types.FunctionType) -> ast.AST:
    """A function's definition; an empty module where no source is known to be its own."""
    return read(function.__code__).node or ast.Module([], [])


@functools.lru_cache(maxsize=4096)
def globals_stored(code: types.CodeType) -> frozenset[str]:
    """Names that a function's code binds in its module (`global x; x = ...`), nested code included."""
    found = frozenset(i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"))
    nested = (globals_stored(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return found.union(*nested)


def _of_known(fn: Any, args: tuple[Any, ...]) -> Fingerprint | None:
    """What `of_call` gives, where the function is as it was met before and its arguments are scalars: nothing is walked."""
    known = _KNOWN.get(id(fn))
    if known is None or known.fn is not fn or type(fn) is not types.FunctionType:
        return None
    code, parts = fn.__code__, {}
    for number, value in enumerate(args):
        write = SCALARS.get(type(value))
        if write is None:
            return None
        named = code.co_posonlyargcount <= number < code.co_argcount
        label = f"arg {code.co_varnames[number] if named else number}"
        parts[label] = blake2b(write(value), digest_size=DIGEST_BYTES, person=PERSON)
    if len(parts) != len(args) or not known.holds(Fingerprinter(memory=False)):
        return None
    given = b"".join([text(label) + parts[label].digest() for label in sorted(parts)])  # "arg" sorts before the others
    digest = blake2b(given + known.joined, digest_size=DIGEST_BYTES, person=PERSON).hexdigest()
    components = {label: part.hexdigest() for label, part in parts.items()} | known.said
    versions = {name: found for name in sorted(known.packages) if (found := _version(name))} if known.packages else {}
    return Fingerprint(digest, components, (), versions, known.lasting, dict)


_VARIABLE_KEYWORDS = 0x08


def of_call(fn: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Fingerprint:
    """The identity of a call: the code of `fn`, followed transitively, and its arguments by parameter name."""
    if not kwargs and (quick := _of_known(fn, args)) is not None:
        return quick
    found = Fingerprinter(memory=False)
    keywords = kwargs or {}
    found.add_function("call", fn)
    code = getattr(fn, "__code__", None)
    offset = 0
    if isinstance(fn, types.MethodType):
        code, offset = getattr(fn.__func__, "__code__", None), 1
    names: tuple[str, ...] = ()
    if isinstance(code, types.CodeType):
        names = code.co_varnames[offset : code.co_argcount]
        first_named = max(code.co_posonlyargcount - offset, 0)
    else:
        first_named = 0
    for number, value in enumerate(args):
        label = names[number] if first_named <= number < len(names) else str(number)
        found.add_value(f"arg {label}", value)
    for name, value in keywords.items():
        found.add_value(f"arg {name}" if name.isidentifier() else f"arg {name!r}", value)
    if len(keywords) > 1 and not (isinstance(code, types.CodeType) and not code.co_flags & _VARIABLE_KEYWORDS):
        known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if isinstance(code, types.CodeType) else ()
        order = tuple(name for name in keywords if name not in known)
        if len(order) > 1:
            found.add_value("keyword order", order)
    return found.result()


def of_value(value: Any) -> Fingerprint:
    """The identity of one value; its content is component "value", code that it holds has components of its own."""
    found = Fingerprinter(memory=False)
    found.add_value("value", value)
    return found.result()


def identify(type: type, fn: Callable[[Any], Any], /) -> None:  # noqa: A002  the word users say
    """Say how objects of `type`, and of its subclasses, count as inputs: by what `fn(obj)` gives, and by nothing else.

    For connections, clients and the like, whose state says nothing: `identify(Client, lambda c: (c.url, c.model))`. Plain
    data, which becomes a digest; leave passwords out all the same. Where `fn` raises, or gives something that is opaque
    itself, the object counts as unknown, and a cell that reads it runs. For this process; say it once, before the cells.
    """
    if not isinstance(type, _TYPE):
        raise TypeError(f"durable.identify({type!r}, ...): give a class, such as type(client)")
    if not callable(fn):
        raise TypeError(f"durable.identify({type.__name__}, {fn!r}): give a function of the object that returns plain data")

    def configuration(obj: Any) -> str:
        found = of_value(fn(obj))
        unknown = [opaque.type_name for opaque in found.opaque if not opaque.configured]
        if unknown:
            raise Unhashable(type.__name__, f"identify gives a {unknown[0]}")
        return found.digest

    configure(type, configuration)


_TYPE = type


def hash_value(value: Any) -> str:
    """The digest of `of_value`, without asking for package versions."""
    found = Fingerprinter(memory=False)
    found.add_value("value", value)
    found._packages.clear()
    return found.result().digest
