"""Plain data at C speed: containers and simple instances layer by layer, each layer written by a few calls over all of it.

A layer is what the containers of the layer above hold. Of each the kinds are written, then the scalars, then the sizes of
containers, kind by kind. `marshal` in version 2 writes scalars the same in every Python and process: it keeps no memo, unlike
pickle, and has not changed since Python 2.5. What is not plain is handed back, in order, to be walked node by node.
"""

from __future__ import annotations

import copyreg
from functools import partial
from itertools import chain, compress, count
from marshal import dumps as _marshal
from math import nan
from operator import attrgetter, itemgetter, ne
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from ._values import Walk

WORTH_IT = 16
"""Containers of fewer elements are walked one by one, unless a larger one holds them."""

SIMPLE = frozenset({type(None), bool, int, float, complex, str, bytes})
_SCALAR, _WRITTEN, _LIST, _TUPLE, _DICT, _SET, _FROZENSET, _INSTANCE, _AGAIN, _ODD = range(10)
_KINDS: dict[type, int] = {
    **dict.fromkeys(SIMPLE, _SCALAR),
    list: _LIST,
    tuple: _TUPLE,
    dict: _DICT,
    set: _SET,
    frozenset: _FROZENSET,
}


def _selecting(*codes: int) -> bytes:
    return bytes(code in codes for code in range(256))


_ONLY = [_selecting(code) for code in range(10)]
_MUTABLE = _selecting(_LIST, _DICT, _SET, _INSTANCE)
_HEAP_TYPE = 1 << 9


def plain_members(members: Collection[Any]) -> bytes | None:
    """The members of a set in an order of their own; None where they aren't all plain scalars."""
    if not SIMPLE.issuperset(map(type, members)):
        return None
    kinds = set(map(type, members))
    if len(kinds) == 1 and kinds <= {str, bytes, int}:
        return _marshal(sorted(members), 2)
    return b"".join(sorted([_marshal(member, 2) for member in _with_one_nan(list(members))]))


def _with_one_nan(scalars: list[Any]) -> list[Any]:
    """Every NaN is the same NaN, whatever its bits."""
    if not {float, complex} & set(map(type, scalars)) or not any(map(ne, scalars, scalars)):
        return scalars
    return [_without_payload(value) if value != value else value for value in scalars]  # noqa: PLR0124


def _without_payload(value: complex) -> complex:
    if isinstance(value, float):
        return nan
    return complex(*(nan if part != part else part for part in (value.real, value.imag)))  # noqa: PLR0124


def layers(walk: Walk, root: Any, raw: Callable[[bytes], bytes], written: dict[type, Any]) -> Iterator[Any]:
    """Write what `root`, a container that has been met just now, holds; what isn't plain is yielded at the end.

    `written`: other scalars, and how each is written.
    """
    say: Callable[[Any], bytes] = lambda value: raw(_marshal(value, 2))  # noqa: E731
    odd: list[Any] = []
    walk.out += b"W"
    layer, below = [root], False
    while layer:
        kinds = set(map(type, layer))
        if kinds <= SIMPLE:
            walk.out += b"Z" + say(_with_one_nan(layer))
            break
        known = {kind: _KINDS[kind] if kind in _KINDS else _WRITTEN if kind in written else _code(walk, kind) for kind in kinds}
        codes = bytes(map(known.__getitem__, map(type, layer)))
        if below:
            codes, again = _met(walk, layer, codes)
            walk.out += say(again)
        below = True
        pick = partial(_pick, layer, codes)
        walk.out += b"%d:" % len(layer) + raw(codes) + say(_with_one_nan(pick(_SCALAR)))
        walk.out += b"".join([written[type(value)](value) for value in pick(_WRITTEN)])
        inner: list[Any] = []
        for code in (_LIST, _TUPLE):
            sequences = pick(code)
            walk.out += say(list(map(len, sequences)))
            inner.extend(chain.from_iterable(sequences))
        dicts = pick(_DICT)
        if dicts:
            walk.out += say(list(map(len, dicts)))
            keys = list(chain.from_iterable(dicts))
            if SIMPLE.issuperset(map(type, keys)):
                walk.out += b"k" + say(_with_one_nan(keys))
            else:
                walk.out += b"K"
                inner.extend(keys)
            inner.extend(chain.from_iterable(map(dict.values, dicts)))
        for code in (_SET, _FROZENSET):
            for members in pick(code):
                walk.out += b"%d:" % len(members) + raw(plain_members(members) or b"")
        instances = pick(_INSTANCE)
        if instances:
            inner.extend(_attributes(walk, instances, say))
        odd.extend(pick(_ODD))
        layer = inner
    walk.out += b"w%d;" % len(odd)
    yield from odd


def _pick(layer: list[Any], codes: bytes, code: int) -> list[Any]:
    found = codes.count(code)
    return layer if found == len(layer) else list(compress(layer, codes.translate(_ONLY[code]))) if found else []


def _met(walk: Walk, layer: list[Any], codes: bytes) -> tuple[bytes, list[int]]:
    """Number the mutable objects of a layer. Gives the codes anew, and the numbers of those that were met before."""
    if codes.find(_SET) >= 0 or codes.find(_FROZENSET) >= 0:
        held = bytearray(codes)
        for place in compress(count(), codes.translate(_selecting(_SET, _FROZENSET))):
            if not SIMPLE.issuperset(map(type, layer[place])):
                held[place] = _ODD
        codes = bytes(held)
    memo = walk.memos[0]
    mutable = list(compress(layer, codes.translate(_MUTABLE)))
    ids = list(map(id, mutable))
    distinct = set(ids)
    if len(distinct) == len(ids) and memo.keys().isdisjoint(distinct):
        memo.update(zip(ids, count(len(memo)), strict=False))
        walk.keep.extend(mutable)
        return codes, []
    found, again = bytearray(codes), []
    for place in compress(count(), codes.translate(_MUTABLE)):
        obj = layer[place]
        if id(obj) in memo:
            found[place] = _AGAIN
            again.append(memo[id(obj)])
            walk.again.add(id(obj))
        else:
            memo[id(obj)] = len(memo)
            walk.keep.append(obj)
    return bytes(found), again


# ---- instances ----


def _code(walk: Walk, kind: type) -> int:
    """How instances of a class are written, which a walk asks once."""
    code = walk.layered.get(kind)
    if code is None:
        code = walk.layered[kind] = _INSTANCE if is_plain(walk, kind) else _ODD
    return code


def is_plain(walk: Walk, kind: type) -> bool:
    """Whether an instance is its class and its attributes and nothing else, for pickle and for us."""
    *bases, last = kind.__mro__
    return (
        last is object
        and type(kind) is type
        and all(base.__flags__ & _HEAP_TYPE and not _SPECIAL & vars(base).keys() for base in bases)
        and kind not in copyreg.dispatch_table
        and ("__dict__" in dir(kind)) != bool(_slots(kind))
        and walk.is_known_by_reduction(kind)
    )


_SPECIAL = {
    "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__", "__getattribute__",
    "__call__", "__class__",
}  # fmt: skip


def _slots(kind: type) -> list[str]:
    return copyreg._slotnames(kind)  # type: ignore[attr-defined,no-any-return]  # private to the stubs


def _attributes(walk: Walk, instances: list[Any], say: Callable[[Any], bytes]) -> list[Any]:
    """Write which classes the instances have, and which attributes; gives these, sorted by name for each instance."""
    classes = list(dict.fromkeys(map(type, instances)))
    for kind in classes:
        walk.refer(kind)
    numbers = {kind: number for number, kind in enumerate(classes)}
    walk.out += say(list(map(numbers.__getitem__, map(type, instances))) if len(classes) > 1 else [])
    found: list[Any] = []
    for kind in classes:
        those = instances if len(classes) == 1 else [obj for obj in instances if type(obj) is kind]
        states = list(map(attributes_of_plain, those)) if _slots(kind) else list(map(attrgetter("__dict__"), those))
        shapes = {shape: sorted(shape) for shape in set(map(tuple, states))}
        if len(shapes) == 1:
            (names,) = shapes.values()
            walk.out += b"1" + say(names)
            if len(names) > 1:
                found.extend(chain.from_iterable(map(itemgetter(*names), states)))
            elif names:
                found.extend(map(itemgetter(*names), states))
        else:
            walk.out += b"N" + say([shapes[tuple(state)] for state in states])
            found.extend([state[name] for state in states for name in shapes[tuple(state)]])
    return found


def attributes_of_plain(obj: Any) -> dict[str, Any]:
    """What an instance of a plain class consists of."""
    slots = _slots(type(obj))
    return {name: getattr(obj, name) for name in slots if hasattr(obj, name)} if slots else vars(obj)
