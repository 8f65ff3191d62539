"""What annotations say, by value: types by what they are, texts by themselves and by what their names stand for."""

from __future__ import annotations

import ast
import sys
import types
import typing
from typing import TYPE_CHECKING, Any

from ._tokens import SCALARS, text
from ._walk import MISSING, look_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ._walk import Walk


def annotations_of(walk: Walk, owner: Any, namespace: Mapping[str, Any]) -> Iterator[Any]:
    """The annotations of a function or a class, in order; names in texts are looked up in `namespace`."""
    found = own_annotations(owner)
    walk.out += b"annotations%d:" % len(found)
    for name, annotation in found.items():
        walk.out += text(name)
        yield from annotation_parts(walk, annotation, namespace)


def own_annotations(owner: Any) -> Mapping[str, Any]:
    """The annotations that a function, class or module has itself. Looking leaves nothing behind."""
    if sys.version_info >= (3, 14):
        found = _evaluated(owner)
    else:
        found = vars(owner).get("__annotations__", {}) if isinstance(owner, type) else getattr(owner, "__annotations__", {})
    return found if isinstance(found, dict) else {}


def _evaluated(owner: Any) -> Any:
    """From Python 3.14 annotations are code. Asking for `__annotations__` would run it and keep what it gives now for good."""
    held = vars(owner)
    if not isinstance(owner, type):
        annotate = getattr(owner, "__annotate__", None)
        found = getattr(owner, "__annotations__", {}) if annotate is None else None
    else:
        annotate = held.get("__annotate__", held.get("__annotate_func__"))
        found = held.get("__annotations__", held.get("__annotations_cache__"))
    if sys.version_info >= (3, 14) and found is None and isinstance(annotate, types.FunctionType):  # in a C class it is none
        import annotationlib

        found = annotationlib.call_annotate_function(annotate, annotationlib.Format.FORWARDREF, owner=owner)
    return found


def annotation_parts(walk: Walk, annotation: Any, namespace: Mapping[str, Any]) -> Iterator[Any]:
    """One annotation, the same whichever Python spells its union."""
    name = getattr(annotation, "__forward_arg__", None) if not isinstance(annotation, str) else annotation
    if isinstance(name, str):
        walk.out += b"Xtext;" + text(name)
        yield from _named_in(name, namespace)
        return
    origin, args = typing.get_origin(annotation), getattr(annotation, "__args__", None)
    if origin is None and isinstance(annotation, type):
        yield annotation
    elif isinstance(annotation, list | tuple):
        walk.out += b"Xargs%d;" % len(annotation)
        for part in annotation:
            yield from annotation_parts(walk, part, namespace)
    elif isinstance(args, tuple) and origin is not None:
        walk.out += b"Xof%d;" % len(args)
        yield typing.Union if origin is types.UnionType else origin
        for part in args:
            if origin is typing.Literal:
                yield part
            else:
                yield from annotation_parts(walk, part, namespace)
        metadata = getattr(annotation, "__metadata__", ())
        walk.out += b"Xmeta%d;" % len(metadata)
        yield from metadata
    elif type(annotation) in SCALARS:
        yield annotation
    elif type(annotation).__module__ == "typing" and not callable(getattr(annotation, "__supertype__", None)):
        walk.out += b"Xspecial;" + text(str(getattr(annotation, "_name", None) or getattr(annotation, "__name__", "")))
        yield from (getattr(annotation, "__bound__", None), getattr(annotation, "__constraints__", ()))
    else:
        yield annotation


def types_in(annotation: Any) -> Iterator[type]:
    """The classes that an annotation consists of."""
    args = getattr(annotation, "__args__", None)
    if isinstance(args, tuple) and typing.get_origin(annotation) is not typing.Literal:
        for part in args:
            yield from types_in(part)
    elif isinstance(annotation, type):
        yield annotation


def _named_in(source: str, namespace: Mapping[str, Any]) -> Iterator[Any]:
    """The user's types that a text names: another one under the same name is another annotation."""
    try:
        tree = ast.parse(source, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
        value = look_up(name, namespace)
        if value is not MISSING:
            yield value
