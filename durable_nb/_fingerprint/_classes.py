"""What a class says: its bases and what its statement wrote, without what Python and frameworks add to it."""

from __future__ import annotations

import builtins
import copyreg
import enum
import sys
import types
from _abc import _get_dump  # type: ignore[import-not-found]
from abc import ABCMeta
from typing import TYPE_CHECKING, Any

from ._annotations import annotation_parts, annotations_of, own_annotations, types_in
from ._owners import is_installed_file
from ._source import docstring, written
from ._tokens import text
from ._walk import ANNOTATIONS, DOCSTRINGS, MODULES, NAMES, SOURCE, named

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ._walk import Walk


def class_of(walk: Walk, cls: type) -> Iterator[Any]:
    members = vars(cls)
    walk.out += b"class" + text(cls.__name__)
    if NAMES in walk.graph.looks:
        walk.out += text(cls.__qualname__)
    if MODULES in walk.graph.looks:
        walk.out += text(cls.__module__)
    if SOURCE in walk.graph.looks:
        walk.out += text(written(cls))
    yield cls.__bases__
    yield None if type(cls) is type else type(cls)
    fields = members.get("__pydantic_fields__")
    fields = fields if isinstance(fields, dict) else None
    if DOCSTRINGS in walk.graph.looks or fields is not None:
        yield docstring(members.get("__doc__"))
    if ANNOTATIONS in walk.graph.looks or _makes_fields_of_annotations(cls):
        yield from annotations_of(walk, cls, _namespace(walk, cls))
    walk.out += b"special"
    if issubclass(cls, enum.Enum):
        for name, member in cls.__members__.items():
            walk.out += text(name)
            yield (member._name_, member._value_)
            yield from named(walk, {key: value for key, value in vars(member).items() if not _by_enum(key, value)})
    if isinstance(cls, ABCMeta):
        registered = [found for reference in _get_dump(cls)[0] if (found := reference()) is not None]
        yield from walk.elements(b"registered", registered)
    reduce = copyreg.dispatch_table.get(cls)
    if reduce is not None:
        walk.out += b"reduce"
        yield reduce
    yield from _dataclass_fields(walk, cls)
    if "__struct_fields__" in dir(cls):  # msgspec keeps its defaults outside the namespace
        yield (cls.__struct_fields__, cls.__struct_encode_fields__)  # type: ignore[attr-defined]
        for default in cls.__struct_defaults__:  # type: ignore[attr-defined]
            walk.out += text(type(default).__name__)
            yield default.factory if type(default).__name__ == "Factory" else default
    if fields is not None:
        yield from _schema(walk, cls, fields)
    walk.out += b"members"
    for name, value in sorted(_members(cls)):
        walk.out += text(name)
        yield value
    walk.out += b"end"


def _namespace(walk: Walk, cls: type) -> Mapping[str, Any]:
    """The globals of the class statement."""
    return walk.graph.namespaces.get(cls.__module__) or vars(sys.modules.get(cls.__module__, builtins))


def _makes_fields_of_annotations(cls: type) -> bool:
    """Whether a framework reads what the class's annotations say: dataclasses, typing, pydantic, attrs, msgspec."""
    members = vars(cls)
    frameworks = {"__dataclass_fields__", "__total__", "_field_defaults", "__pydantic_fields__", "__attrs_attrs__"}
    return bool(frameworks & members.keys()) or "__struct_fields__" in dir(cls)


def _dataclass_fields(walk: Walk, cls: type) -> Iterator[Any]:
    members = vars(cls)
    fields = members.get("__dataclass_fields__")
    if fields is None:
        return
    params = members["__dataclass_params__"]
    yield tuple(getattr(params, name) for name in ("init", "repr", "eq", "order", "unsafe_hash", "frozen"))
    for field in fields.values():
        walk.out += text(field.name) + text(field._field_type.name)
        if field.name not in own_annotations(cls):  # inherited, or made by make_dataclass()
            yield from annotation_parts(walk, field.type, _namespace(walk, cls))
        yield from (field.default, field.default_factory, field.metadata)
        yield (field.init, field.repr, field.hash, field.compare, field.kw_only)


def _schema(walk: Walk, cls: type, fields: Mapping[str, Any]) -> Iterator[Any]:
    """All that shows in the schema of a pydantic model, which may be a prompt, and that validates or dumps it."""
    namespace = _namespace(walk, cls)
    for name, field in fields.items():
        walk.out += text(name)
        yield from annotation_parts(walk, field.annotation, namespace)
        for leaf in types_in(field.annotation):
            if walk.graph.by_name(leaf) is None:
                yield docstring(vars(leaf).get("__doc__"))
        yield from (getattr(field, part, None) for part in type(field).__slots__ if part[0] != "_" and part != "annotation")
    decorators = vars(cls).get("__pydantic_decorators__")
    for kind in getattr(decorators, "__dataclass_fields__", ()):
        for name, decorator in sorted(getattr(decorators, kind).items()):
            if not hasattr(decorator, "info"):
                continue
            walk.out += text(name)
            yield decorator.info
    for name, private in sorted((vars(cls).get("__private_attributes__") or {}).items()):
        walk.out += text(name)
        yield (getattr(private, "default", None), getattr(private, "default_factory", None))


_NO_MEMBERS = {
    "__dict__", "__weakref__", "__module__", "__doc__", "__qualname__", "__firstlineno__", "__static_attributes__",
    "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__conditional_annotations__",
    "__parameters__", "__orig_bases__", "__abstractmethods__", "__dataclass_fields__", "__dataclass_params__",
    "__slotnames__", "__signature__", "__class_vars__", "__private_attributes__", "__type_params__",
    "__classcell__", "__classdictcell__", "__mutable_keys__", "__readonly_keys__", "__closed__", "__extra_items__",
    "__protocol_attrs__", "__non_callable_proto_members__", "__callable_proto_members_only__",
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
        if "_is_protocol" in members and name in {"__init__", "__subclasshook__"} and _by_typing(value):
            continue
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


def _by_typing(value: Any) -> bool:
    fn = getattr(value, "__func__", value)
    return isinstance(fn, types.FunctionType) and fn.__globals__.get("__name__") == "typing"


def _by_namedtuple(value: Any) -> bool:
    if type(value).__name__ == "_tuplegetter":
        return True
    fn = getattr(value, "__func__", value)
    if not isinstance(fn, types.FunctionType):
        return False
    maker = str(fn.__globals__.get("__name__"))
    return maker.startswith("namedtuple_") or is_installed_file(fn.__code__.co_filename)


def _by_enum(name: str, value: Any) -> bool:
    if name.startswith("_") and name.endswith("_") and not name.startswith("__"):
        return True
    code = getattr(value, "__code__", None)
    return name.startswith("__") and (code is None or is_installed_file(code.co_filename))
