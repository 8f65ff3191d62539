"""The line after `%%durable`: a name and options."""

from __future__ import annotations

import difflib
import keyword
import os
import re
import shlex
from dataclasses import dataclass

from IPython.core.error import UsageError

from durable_nb._clock import parse_duration

_FLAGS = {"--rerun": "rerun", "--time": "time", "--quiet": "quiet", "--background": "background"}
_VALUES = {
    "--max-wait": "a duration, as in '--max-wait 10m'",
    "--ttl": "a duration, as in '--ttl 7d'",
    "--ignore": "names of variables, as in '--ignore client,log'",
    "--skip": "names of variables, as in '--skip connection'",
    "--extra": "an expression, as in '--extra \"model.version\"'",
}
_COMMENT = re.compile(r"""\A((?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^"'\\])*?)(?<!\S)\#.*\Z""", re.DOTALL)
"""A '#' behind a space or at the beginning, and what follows it; in quotes it is none."""
_USAGE = (
    "%%durable [NAME] [--rerun | --rerun=STEP] [--ttl DURATION] [--ignore NAMES] [--skip NAMES] [--extra EXPR] "
    "[--max-wait DURATION] [--background] [--time] [--quiet]"
)


@dataclass(slots=True)
class Options:
    """What the user asked for."""

    name: str = ""
    rerun: bool = False
    rerun_step: str = ""
    time: bool = False
    background: bool = False
    quiet: bool = False
    max_wait_s: float | None = None
    ttl_s: float | None = None
    ignore: frozenset[str] = frozenset()
    skip: frozenset[str] = frozenset()
    extra: str = ""
    capture: str | None = None
    """The line of a `%%capture` above."""


def split(line: str) -> list[str]:
    """The words of a magic's line, without a comment at its end; ValueError for a quotation that is not closed."""
    return shlex.split(_COMMENT.sub(r"\1", line))


def refuse_magic_below(body: str) -> None:
    """UsageError if the first line of code below `%%durable` is a cell magic, which IPython would take for a line magic."""
    first = next((text for text in body.splitlines() if text.strip() and not text.startswith("#")), "")
    if first.startswith("%%") and not body.startswith("%%"):
        magic = first.split()[0]
        where = "put it above %%durable" if magic in ("%%time", "%%capture") else "give it a cell of its own"
        raise UsageError(f"%%durable: {magic} can't stand below it, so nothing was run; {where}")


def parse(line: str, stack: list[str]) -> Options:
    """The options of a cell whose magics above `%%durable` are `stack`. UsageError says what to type."""
    try:
        words = split(line)
    except ValueError as error:
        raise UsageError(f"%%durable {line}: {error}; nothing was run. Write {_USAGE}") from None
    options = Options()
    while words:
        word = words.pop(0)
        option, has_value, value = word.partition("=")
        if option == "--rerun" and has_value:
            if not value:
                raise UsageError("%%durable: --rerun= needs a step's name, as in '--rerun=charge'; nothing was run")
            options.rerun_step = value
        elif word in _FLAGS:
            setattr(options, _FLAGS[word], True)
        elif option in _VALUES:
            if not has_value:
                value = words.pop(0) if words and not words[0].startswith("--") else ""
            if not value.strip():
                raise UsageError(f"%%durable: {option} needs {_VALUES[option]}; nothing was run")
            _set(options, option, value)
        elif word.startswith("-"):
            meant = difflib.get_close_matches(option, [*_FLAGS, *_VALUES], n=1)
            said = f"unknown option {word!r}" + (f", did you mean {meant[0]!r}?" if meant else "")
            raise UsageError(f"%%durable: {said}; nothing was run. Write {_USAGE}")
        elif options.name:
            raise UsageError(
                f"%%durable: a second name {word!r} after {options.name!r}; nothing was run. Write {_USAGE}, and put a "
                "name with spaces in quotes"
            )
        else:
            options.name = word
    for above in stack:
        magic, _, rest = above.partition(" ")
        if magic == "time":
            options.time = True
        else:
            options.capture = rest
    return options


def max_wait_s() -> float | None:
    """`DURABLE_NB_MAX_WAIT`; None where it isn't set. UsageError where it is no duration."""
    value = os.environ.get("DURABLE_NB_MAX_WAIT", "")
    return _duration("DURABLE_NB_MAX_WAIT", value) if value.strip() else None


def _set(options: Options, option: str, value: str) -> None:
    match option:
        case "--max-wait":
            options.max_wait_s = _duration(f"%%durable {option}", value)
        case "--ttl":
            options.ttl_s = _duration(f"%%durable {option}", value)
        case "--ignore":
            options.ignore |= _names(option, value)
        case "--skip":
            options.skip |= _names(option, value)
        case _:
            options.extra = _expression(value)


def _names(option: str, value: str) -> frozenset[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise UsageError(
                f"%%durable {option}: {name!r} is not a variable's name; nothing was run. It needs {_VALUES[option]}"
            )
    return frozenset(names)


def _expression(value: str) -> str:
    try:
        compile(value, "--extra", "eval")
    except (SyntaxError, ValueError) as error:
        raise UsageError(
            f"%%durable --extra: {value!r} is not an expression ({error.args[0]}); nothing was run. Put it in double quotes"
        ) from None
    return value


def _duration(said: str, value: str) -> float:
    try:
        return parse_duration(float(value) if value.replace(".", "", 1).isdecimal() else value).total_seconds()
    except ValueError as error:
        raise UsageError(f"{said}: {error}; nothing was run") from None
