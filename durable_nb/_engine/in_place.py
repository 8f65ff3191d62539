"""A step that was asked for: what its outcome depends on, and what of that its body has changed.

A body may append to a list that it was given, or raise a counter. What it changed of its arguments is recorded with its outcome
and made again when that is restored; a global that it changes itself is no part of its identity.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from durable_nb import _arguments, _fingerprint
from durable_nb._arguments import changeable, difference, fingerprint_of
from durable_nb._current import SendRequest, StartRequest, StepRequest
from durable_nb._fingerprint import globals_stored, object_of
from durable_nb._records import Provenance, StepKey

if TYPE_CHECKING:
    from durable_nb._fingerprint import Fingerprint


class Inputs:
    """What a step is given, as it was when it was asked for."""

    def __init__(self, request: StepRequest, found: Fingerprint | None) -> None:
        self.request, self.found = request, found
        """`found`: what its outcome depends on; None where that can't be told, or needn't."""
        self.components = found.components if found is not None else {}
        self.objects = changeable(found)
        """What its body may change in place."""
        self.shared = False
        """Other bodies that were at work meanwhile may have changed the same objects."""
        changing = self.components if found is not None and not found.lasting else ()
        self.globals = {label: object_of(label) for label in changing if label.startswith("global ")}
        """What the step may read beside its arguments, as it was when it was asked for."""

    def given(self, after: dict[str, str]) -> set[str]:
        """The arguments, and the object whose method is called, as far as they are something else now."""
        return set() if after is self.components else _arguments.changed(self.components, after)

    def objects_of(self, label: str) -> list[Any]:
        """What may change of that component."""
        return _of(self.objects, label)

    def after(self) -> dict[str, str]:
        """Its components now that the body has run."""
        if self.request.kind != "run" or self.found is None or self.found.lasting:
            return self.components
        try:
            return fingerprint_of(self.request).components
        except Exception:  # an input can't be read any more: the outcome is recorded as it was asked for
            return self.components


class Sharing:
    """Which objects the bodies that are at work now could change, and whose."""

    def __init__(self) -> None:
        self._holders: dict[int, set[Inputs]] = {}
        """By identity of an object. Inputs keep theirs alive."""

    def hold(self, inputs: Inputs) -> None:
        """A body is given these. Where another has one of the objects, whose change is whose can't be told."""
        for obj in inputs.objects.values():
            holders = self._holders.setdefault(id(obj), set())
            holders.add(inputs)
            if len(holders) > 1:  # all of them are marked as soon as there are two
                for holder in holders:
                    holder.shared = True

    def release(self, inputs: Inputs) -> None:
        for obj in inputs.objects.values():
            holders = self._holders.get(id(obj), set())
            holders.discard(inputs)
            if not holders:
                self._holders.pop(id(obj), None)


class Changed:
    """A step, of a run that is not finished, that has changed live objects which it was given.

    Executed again in this kernel the code gives it the same objects, which would make it another step: so it is known by how
    it left them.
    """

    def __init__(self, inputs: Inputs, key: StepKey, given: set[str], after: dict[str, str]) -> None:
        """`given`: the arguments that it has changed; `after`: the components of its inputs afterwards."""
        self.key = key
        self.rest = _without(inputs.request, inputs.components, given)
        self.objects = {label: inputs.objects_of(label) for label in given}
        self.left_as = {label: after.get(label, "") for label in given}

    def is_asked_again(self, asked: StepRequest, found: Fingerprint, later: list[Changed]) -> bool:
        """Is this the same step, given the same objects, which only the steps after it have changed since?"""
        if _without(asked, found.components, set(self.objects)) != self.rest:
            return False
        places = found.places()
        for label, objects in self.objects.items():
            if not _same(_of(places, label), objects):
                return False
            left_as = self.left_as[label]
            for other in later:
                left_as = next((other.left_as[name] for name, seen in other.objects.items() if _same(seen, objects)), left_as)
            if found.components.get(label) != left_as:
                return False
        return True


def arguments_of(request: StepRequest | StartRequest) -> str:
    """Digest of what a function or workflow is given, of a partial what it holds too: which of a workflow's recorded requests
    of this name it is. '' where something in it can't be read: such requests are told apart by their order."""  # fmt: skip
    args, kwargs = request.args, request.kwargs
    if isinstance(request, StepRequest):
        if request.described is not None:
            return _fingerprint.hash_value(request.described)
        fn = request.fn
        while isinstance(fn, functools.partial):
            args, kwargs, fn = (*fn.args, *args), {**fn.keywords, **kwargs}, fn.func
    try:
        if not kwargs and _SCALARS.issuperset(map(type, args)):
            return hashlib.blake2b(msgspec.msgpack.encode(args), digest_size=8).hexdigest()
        return _fingerprint.hash_value((args, kwargs))
    except Exception:  # whatever is odd about an argument
        return ""


def sent(request: SendRequest) -> str:
    """The same of an event that is sent."""
    try:
        return _fingerprint.hash_value((request.data, request.run_id))
    except Exception:  # whatever is odd about its data
        return hashlib.blake2b(request.packed, digest_size=8).hexdigest()


_SCALARS = {int, str, bool, float, bytes, type(None)}


def _of(places: Mapping[tuple[str, int], Any], label: str) -> list[Any]:
    return [obj for (component, _), obj in places.items() if component == label]


def _same(one: list[Any], other: list[Any]) -> bool:
    """Are these the same argument? Its outermost object tells: more may have been put into it since."""
    return bool(one) and bool(other) and one[0] is other[0]


def _without(request: StepRequest, components: dict[str, str], labels: set[str]) -> tuple[str, str, dict[str, str]]:
    kept = {label: digest for label, digest in components.items() if label not in labels and label != "aliases"}
    return request.kind, request.name, kept


def described(label: str) -> str:
    """A changed input as messages call it."""
    return label.partition(" ")[2] or "the object it belongs to"


def packed_changes(asked: Inputs, given: set[str], value: Any) -> bytes | None:
    """The arguments that the body has changed, to be changed again when the step is restored, and which of its inputs it
    returned. None where there is nothing of both, or where it can't be done again."""  # fmt: skip
    if asked.shared or not asked.objects:  # shared: whose change is whose can't be told
        return None
    if not given and type(value) in _SCALARS:  # it is none of them, and holds none
        return None
    return difference(asked.objects, given, value)


def fixed(asked: Inputs) -> tuple[str, str, dict[str, str]]:
    """What no body can change: the step's kind and name, its code and its arguments."""
    parts = {k: v for k, v in asked.components.items() if k != "aliases" and not k.startswith("global ")}
    return asked.request.kind, asked.request.name, parts


def changed(asked: Inputs, now: dict[str, str]) -> set[str]:
    """The globals that are not what they were when the step was asked for."""
    return {label for label in asked.globals if now.get(label) != asked.components[label]}


def changed_by_itself(asked: Inputs, now: dict[str, str]) -> set[str]:
    """Those that the step's own code changed, or may have: in place, or bound anew by a `global` statement."""
    stored = {name for code in _codes(asked.components, asked.request.fn) for name in globals_stored(code)}
    return {
        label
        for label in changed(asked, now)
        if object_of(label) is asked.globals[label] or label.rpartition(".")[2].split()[-1] in stored
    }


def _codes(components: dict[str, str], body: Any) -> list[types.CodeType]:
    """The code that a step executes, as far as it can be found by name."""
    while isinstance(body, functools.partial):
        body = body.func
    functions = [body, *(object_of(label) for label in components if label.startswith("function "))]
    return [code for fn in functions if isinstance(code := getattr(fn, "__code__", None), types.CodeType)]


PYTHON = platform.python_version()


def provenance_of(inputs: Inputs) -> Provenance:
    """What a step's outcome depends on, as its record keeps it."""
    code, found = code_of(inputs.request.fn), inputs.found
    if found is None:
        return Provenance(_fingerprint.FORMAT, {}, {}, PYTHON, code=code)
    return Provenance(found.format, found.components, found.versions, PYTHON, found.digest, code)


def code_of(body: Any) -> str:
    """Digest of the code of a step's function itself: neither of what it holds, nor of what it calls."""
    while isinstance(body, functools.partial):
        body = body.func
    code = getattr(body, "__code__", None)
    return _digest_of_code(code) if isinstance(code, types.CodeType) else ""


@functools.lru_cache(maxsize=1000)
def _digest_of_code(code: types.CodeType) -> str:
    consts = [_digest_of_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return hashlib.blake2b(repr((code.co_code, code.co_names, consts)).encode(), digest_size=8).hexdigest()
