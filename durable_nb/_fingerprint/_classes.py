"""What a class says: its bases and what its statement wrote, without what Python and frameworks add to it."""

from __future__ import annotations

import enum
import sys
import types
from typing import TYPE_CHECKING, Any

from ._owners import is_installed_file
from ._values import SCALARS, named, text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._values import Walk


def class_of(walk: Walk, cls: type) -> Iterator[Any]:
    members = vars(cls)
    walk.out += b"class" + text(cls.__qualname__)
    yield cls.__bases__
    yield None if type(cls) is type else type(cls)
    if walk.graph.docstrings:
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
    "__classcell__", "__classdictcell__", "__mutable_keys__", "__readonly_keys__", "__closed__", "__extra_items__",
    "__protocol_attrs__", "__non_callable_proto_members__",
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


def _annotations(cls: type) -> list[tuple[str, Any]]:
    if sys.version_info >= (3, 14):
        import annotationlib

        if isinstance(vars(cls).get("__annotate__"), types.GetSetDescriptorType):  # a C class whose instances have some
            return []
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
