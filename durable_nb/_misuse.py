"""What was meant by a call that Python refuses: a name that is missing, an option that is misspelt."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


def explained(fn: _F) -> _F:
    """A public function whose TypeErrors about its own arguments say what to write. Costs nothing while all is well."""

    @functools.wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        try:
            return fn(*args, **kwargs)
        except TypeError:
            signature = inspect.signature(fn)
            try:
                signature.bind(*args, **kwargs)
            except TypeError:
                explanation = _explanation(fn.__name__, signature, args, kwargs)
                if explanation:
                    raise TypeError(explanation) from None
            raise

    return called  # type: ignore[return-value]  # wraps keeps its face


def _explanation(verb: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    parameters = signature.parameters
    unknown = [key for key in kwargs if key not in parameters]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if unknown and not takes_any:
        options = [name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
        return f"durable.{verb}({unknown[0]}=...): there is no such option{did_you_mean(unknown[0], options)}; nothing was run"
    if next(iter(parameters), "") == "name" and len(args) == 1 and "name" not in kwargs:
        return missing_name(verb, args)
    return ""


def missing_name(verb: str, args: tuple[Any, ...]) -> str:
    """What to say of a verb whose first argument is no name."""
    said = ", ".join(map(_said, args))
    name = getattr(args[0], "__name__", "")
    example = repr(name) if name.isidentifier() else "'a name'"
    return f"durable.{verb}({said}): the step's name is missing, write durable.{verb}({example}, {said}); nothing was run"


def did_you_mean(word: str, known: Collection[str]) -> str:
    """The nearest of these, to be put behind what was found; all of them, where none is near."""
    meant = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {meant[0]}=?" if meant else f"; there are {', '.join(known)}" if known else ""


def _said(value: Any) -> str:
    """A short form that holds nobody's secrets: an URL may have some."""
    if callable(value):
        return getattr(value, "__name__", "...")
    text = repr(value)
    return text if isinstance(value, (str, int, float)) and len(text) <= 20 and "//" not in text else "..."
