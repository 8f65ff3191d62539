"""Whose code it is: Python's, an installed package's or ours, which is known by its name, or the user's, which is read."""

from __future__ import annotations

import builtins
import functools
import os
import re
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib import metadata

_ABSENT = object()
_HEAP_TYPE = 1 << 9  # a class made by a class statement or the like; others are C, such as NoneType
_IMMUTABLE_TYPE = 1 << 8  # C as well, such as _thread.lock
_HERE = os.path.dirname(os.path.abspath(str(sys.modules[__name__.partition(".")[0]].__file__))) + os.sep  # noqa: PTH100, PTH120  pathlib would double our import time
_STDLIB = tuple({os.path.dirname(os.__file__) + os.sep, os.path.realpath(os.path.dirname(os.__file__)) + os.sep})  # noqa: PTH120


RENAMED = {("numpy", "bool_"): "bool"}
"""Public names that another version gave."""


def is_installed_file(filename: str) -> bool:
    if filename.startswith("<frozen"):
        return True
    folder = os.path.dirname(filename)  # noqa: PTH120
    return _is_installed_folder(folder if os.path.isabs(folder) else os.path.abspath(folder))  # noqa: PTH117, PTH100


@functools.lru_cache(
    maxsize=4096
)  # following links takes its time, and a kernel has thousands of modules in hundreds of folders
def _is_installed_folder(folder: str) -> bool:
    path = os.path.join(os.path.realpath(folder), "")  # noqa: PTH118
    if path.startswith(_HERE) or os.path.join(folder, "").startswith(_HERE):  # noqa: PTH118
        return True
    parts = path.replace(os.sep, "/").split("/")
    return "site-packages" in parts or "dist-packages" in parts or path.startswith(_STDLIB)


def is_installed(module_name: str | None) -> bool:
    """Whether a module is Python's own, an installed package's, or ours; the user's project is none of these."""
    if not module_name or module_name == "__main__":
        return False
    module = sys.modules.get(module_name)
    filename = getattr(module, "__file__", None)
    if isinstance(filename, str):
        return is_installed_file(filename)
    root = module_name.partition(".")[0]
    if root in sys.stdlib_module_names:
        return True
    if module is None:
        return root in sys.modules and root != module_name and is_installed(root)
    path = getattr(module, "__path__", None)
    if path is not None:
        return any(is_installed_file(os.path.join(str(part), "")) for part in path)  # noqa: PTH118
    if root != module_name and getattr(module, "__spec__", None) is None:
        return is_installed(root)  # made by an extension module
    return False


def installed_name(obj: Any) -> tuple[str, str] | None:
    """The public module and qualified name by which something installed is reached; None for everything else."""
    if isinstance(obj, types.ModuleType):
        name = obj.__name__
        return (name, "") if is_installed(name) and sys.modules.get(name) is obj else None
    if isinstance(obj, type):
        module, qualname = obj.__module__, obj.__qualname__
    elif isinstance(obj, types.MethodType | types.BuiltinMethodType) and not isinstance(obj.__self__, types.ModuleType | None):
        exporter = _exporter(obj)
        return None if exporter is None else (exporter, obj.__name__)
    elif callable(obj):
        module, qualname = _claimed(obj)
    else:
        return None
    if not isinstance(module, str) or not isinstance(qualname, str) or not is_installed(module):
        return None
    public = _public(module, qualname, obj)
    if public is None and isinstance(obj, type) and (not obj.__flags__ & _HEAP_TYPE or obj.__flags__ & _IMMUTABLE_TYPE):
        public = _bare(module)
    return None if public is None else (public, RENAMED.get((public, qualname), qualname))


def public_module(kind: type) -> str:
    """The module of a class as its users know it: packages move their classes about beneath, from version to version."""
    return _public(kind.__module__, kind.__qualname__, kind) or _bare(kind.__module__)


def _public(module: str, qualname: str, obj: Any) -> str | None:
    """The module nearest to the package's root that offers `obj` under that name; None where none does."""
    for name in _above(module):
        if (name == module or "._" not in name) and _offers(name, qualname, name == module) is obj:
            return _bare(name)
    return None


def _offers(module: str, qualname: str, certain: bool) -> Any:
    """What a loaded module has under that name. One that imports only when asked is asked for what it promises."""
    holder: Any = sys.modules.get(module)
    first, *rest = qualname.split(".")
    try:
        members = vars(holder)
        if first in members:
            found = members[first]
        elif certain or first in members.get("__all__", ()):
            found = getattr(holder, first, _ABSENT)
        else:
            return _ABSENT
        for part in rest:
            found = getattr(found, part, _ABSENT)
    except Exception:
        return _ABSENT
    return found


@functools.lru_cache(maxsize=4096)
def _above(module: str) -> tuple[str, ...]:
    """Where to look for what says that it is of `module`: the package's root first; for `_io` also `io`."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    if module == "posix":
        return ("os", module)
    return (parts[0].lstrip("_"), *names) if parts[0].startswith("_") and parts[0].strip("_") else tuple(names)


@functools.lru_cache(maxsize=4096)
def _bare(module: str) -> str:
    """A module that only its package knows, which may be private in one version and not in the next."""
    return module if module.startswith("__") else ".".join(part.lstrip("_") or part for part in module.split("."))


def _exporter(method: Any) -> str | None:
    """The installed module that offers a method of a hidden object as a function, as `random.random` is one."""
    owner = method.__self__
    module = str((owner if isinstance(owner, type) else type(owner)).__module__)
    if not is_installed(module) or module == "builtins":
        return None
    for name in _above(module):
        if vars(sys.modules.get(name, builtins)).get(method.__name__) == method:
            return name
    return None


def _claimed(obj: Any) -> tuple[Any, Any]:
    kind = type(obj).__module__
    compiled = kind.startswith("_cython_")  # Cython's functions, whose type is named after its version
    if not compiled and not is_installed(kind) and not isinstance(obj, types.FunctionType):
        return None, None
    try:
        return obj.__module__, obj.__qualname__
    except Exception:
        return None, None


def source_file(name: str) -> str | None:
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
            above = source_file(parent)
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
    if not origin or not origin.endswith(".py") or is_installed_file(origin):
        return None
    return origin


@functools.lru_cache(maxsize=1024)
def version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except Exception:
        found = _distributions().get(package)
    try:
        return found.version if found is not None else None
    except Exception:
        return None


@functools.lru_cache(maxsize=1)
def _distributions() -> Mapping[str, metadata.Distribution]:
    """By package, who has installed it. `metadata.packages_distributions()` reads the same files in ten times the time."""
    from importlib import metadata

    found: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        declared, files = (distribution.read_text(name) or "" for name in ("top_level.txt", "RECORD"))
        for package in {*declared.split(), *_TOP_LEVEL.findall(files)}:
            found.setdefault(package, distribution)
    return found


_TOP_LEVEL = re.compile(r"^([^\W\d]\w*)(?:/|\.py,|\.[^/,]+\.so,)", re.MULTILINE)
"""Files of a package, or a module by itself, in a list of installed files."""
