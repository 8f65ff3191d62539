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
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

from ._reductions import is_known_by_reduction
from ._tokens import SCALARS, SIMPLE, plain_members, raw, with_one_nan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._walk import Walk

WORTH_IT = 16
"""Containers of fewer elements are walked one by one, unless a larger one holds them."""

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


def layers(walk: Walk, root: Any) -> Iterator[Any]:
    """Write what `root`, a container that has been met just now, holds; what isn't plain is yielded at the end."""
    say: Callable[[Any], bytes] = lambda value: raw(_marshal(value, 2))  # noqa: E731
    odd: list[Any] = []
    walk.out += b"W"
    layer, below = [root], False
    while layer:
        kinds = set(map(type, layer))
        if kinds <= SIMPLE:
            walk.out += b"Z" + say(with_one_nan(layer))
            break
        known = {kind: _KINDS[kind] if kind in _KINDS else _WRITTEN if kind in SCALARS else _code(walk, kind) for kind in kinds}
        codes = bytes(map(known.__getitem__, map(type, layer)))
        if below:
            codes, again = _met(walk, layer, codes)
            walk.out += say(again)
        below = True
        pick = partial(_pick, layer, codes)
        walk.out += b"%d:" % len(layer) + raw(codes) + say(with_one_nan(pick(_SCALAR)))
        walk.out += b"".join([SCALARS[type(value)](value) for value in pick(_WRITTEN)])
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
                walk.out += b"k" + say(with_one_nan(keys))
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
        code = walk.layered[kind] = _INSTANCE if is_plain(kind) else _ODD
    return code


def is_plain(kind: type) -> bool:
    """Whether an instance is its class and its attributes and nothing else, for pickle and for us."""
    *bases, last = kind.__mro__
    return (
        last is object
        and type(kind) is type
        and all(base.__flags__ & _HEAP_TYPE and not _SPECIAL & vars(base).keys() for base in bases)
        and kind not in copyreg.dispatch_table
        and ("__dict__" in dir(kind)) != bool(_slots(kind))
        and is_known_by_reduction(kind)
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
