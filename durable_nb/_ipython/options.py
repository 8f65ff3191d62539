"""The line after `%%durable`: a name and options."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from IPython.core.error import UsageError

from durable_nb._clock import parse_duration

_FLAGS = {"--rerun": "rerun", "--time": "time", "--quiet": "quiet"}
_VALUES = {"--max-wait": "max_wait_s"}
_USAGE = "%%durable [NAME] [--rerun | --rerun=STEP] [--max-wait DURATION] [--time] [--quiet]"


@dataclass(slots=True)
class Options:
    """What the user asked for."""

    name: str = ""
    rerun: bool = False
    rerun_step: str = ""
    time: bool = False
    quiet: bool = False
    max_wait_s: float | None = None
    capture: str | None = None
    """The line of a `%%capture` above."""


def parse(line: str, stack: list[str]) -> Options:
    """The options of a cell whose magics above `%%durable` are `stack`. UsageError says what to type."""
    try:
        words = shlex.split(line)
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
                if not words:
                    raise UsageError(f"%%durable: {option} needs a duration, as in '{option} 10m'; nothing was run")
                value = words.pop(0)
            options.max_wait_s = _duration(option, value)
        elif word.startswith("-"):
            raise UsageError(f"%%durable: unknown option {word!r}; nothing was run. Write {_USAGE}")
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


def _duration(option: str, value: str) -> float:
    try:
        return parse_duration(float(value) if value.replace(".", "", 1).isdecimal() else value).total_seconds()
    except ValueError as error:
        raise UsageError(f"%%durable {option}: {error}; nothing was run") from None
