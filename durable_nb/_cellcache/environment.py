"""Environment variables as inputs: which are read is seen while a cell or step runs, and compared by a keyed digest.

Variables that are named like secrets are no inputs, so that rotating a key costs nothing, and no digest of one is kept.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from durable_nb._cellcache.files import is_elsewhere

UNSET = ""
ALL = "*"
"""After the beginning of a name: all variables that begin so."""

_SECRET = re.compile(
    r"(^|_)(key|keys|token|secrets?|passwords?|passwd|pass|pwd|credentials?|signature|cookies?|auth|authorization|pat)(_|$)"
    r"|(api_?key|access_?key|private_?key|token|secret|password|passwd|credentials?)$",
    re.IGNORECASE,
)
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

_OF_THE_SESSION = re.compile(
    r"(HOME|PATH|USER|USERNAME|LOGNAME|TMPDIR|TEMP|TMP|TERM|COLUMNS|LINES|SHELL|PWD|OLDPWD|LANG|LANGUAGE|DISPLAY|HOSTNAME"
    r"|COLORTERM|NO_COLOR|FORCE_COLOR|TTY_\w+|CI|BROWSER|EDITOR|VISUAL|PAGER|PS1|SHLVL|_|VIRTUAL_ENV|PARENT_PID"
    r"|(LC|JPY|JUPYTER|IPY\w*|IPYTHON|XDG|PYTHON\w*|MPL\w*|CONDA|SSH|VSCODE|TERM|KERNEL|DURABLE_NB|OMP|MKL|OPENBLAS|NUMEXPR"
    r"|LOKY|JOBLIB|PYDEVD|PYTEST|NUMBA|GIT|TQDM|WSL|DBUS|WAYLAND|TMUX|GDK|QT|GTK)(_\w*)?)"
)
"""What differs between sessions, machines and users. It counts where the user's own code reads it, not where a library does."""

Read = Callable[[str, str | None, bool], None]
"""Is told the name, the value, and whether it was met in going through all of them."""


def is_secret(name: str) -> bool:
    """Is the variable named like a secret?"""
    return bool(_SECRET.search(name) or _SECRET.search(_WORDS.sub("_", name)))


def value_of(name: str) -> str | None:
    """What is set now; of `BEGINNING*` all such variables, as one text. None where nothing is."""
    if not name.endswith(ALL):
        return os.environ.get(name)
    found = sorted((k, v) for k, v in os.environ.items() if k.startswith(name[:-1]) and not is_secret(k))
    return "\0".join(f"{k}={v}" for k, v in found) if found else None


def named_by(name: str, words: Iterable[str], texts: Iterable[str]) -> str:
    """Of a variable that was passed when the whole environment was gone through: under what name does it count for code that
    has these words and texts? '' where the code doesn't speak of it."""  # fmt: skip
    if name in texts:
        return name
    beginning = max((text for text in texts if _is_beginning(text) and name.startswith(text)), key=len, default="")
    if beginning:
        return beginning + ALL
    lower = name.lower()
    return name if any(lower == word.lower() for word in words) else ""


def _is_beginning(text: str) -> bool:
    return bool(re.fullmatch(r"[A-Z][A-Z0-9]*_[A-Z0-9_]*", text))


_NAME = re.compile(r"[A-Za-z]\w{2,}", re.ASCII)
_IN_TEXT = re.compile(r"\$\{?([A-Za-z_]\w*)|\b([A-Z][A-Z0-9_]+)\b", re.ASCII)


def not_met(words: Iterable[str], texts: Iterable[str]) -> set[str]:
    """The variables of which code with these words and texts speaks, whether they are set or not: whoever has gone through
    the whole environment has seen that they were not."""  # fmt: skip
    found = {text + ALL for text in texts if _is_beginning(text)}
    found |= {text for text in texts if _NAME.fullmatch(text) and text.isupper()}
    found |= {word.upper() for word in words if _NAME.fullmatch(word)}
    return {name for name in found if not is_secret(name) and not _OF_THE_SESSION.fullmatch(name)}


def given_to_children(texts: Iterable[str]) -> set[str]:
    """The variables that a child process may look up which has one of these texts as its program: `$NAME`, or a name in
    capitals."""  # fmt: skip
    found = set()
    for text in texts:
        for said, bare in _IN_TEXT.findall(text):
            if said or not _OF_THE_SESSION.fullmatch(bare):
                found.add(said or bare)
    return {name for name in found if not is_secret(name)}


@contextmanager
def use_noticed(read: Read, written: Callable[[str], None], passed: Callable[[], None]) -> Iterator[None]:
    """Meanwhile tell of all variables that are looked up in `os.environ`, or set there, and when all of them are gone
    through."""  # fmt: skip
    environment: Any = os.environ
    encode, decode = environment.encodekey, environment.decodekey
    passing = threading.local()

    def decoding(raw: Any) -> Any:
        name = decode(raw)
        passed()
        vars(passing).setdefault("names", set()).add(name)  # whoever goes through all of them asks for their values then
        return name

    def encoding(name: Any) -> Any:
        raw = encode(name)
        how = sys._getframe(1).f_code.co_name
        if how == "__getitem__":
            names = vars(passing).get("names", ())
            is_passed = name in names
            if is_passed:
                names.discard(name)
            if not (_OF_THE_SESSION.fullmatch(name) and _is_library(sys._getframe(2))):
                value = environment._data.get(raw)
                read(name, None if value is None else environment.decodevalue(value), is_passed)
        elif how in ("__setitem__", "__delitem__"):
            written(name)
        return raw

    environment.encodekey, environment.decodekey = encoding, decoding
    try:
        yield
    finally:
        environment.encodekey, environment.decodekey = encode, decode


_LOOKING_UP = frozenset({os.__file__, "<frozen os>", "<frozen _collections_abc>"})


def _is_library(frame: Any) -> bool:
    """Who looks the variable up?"""
    while frame is not None and (
        frame.f_code.co_filename in _LOOKING_UP or frame.f_code.co_filename.endswith("_collections_abc.py")
    ):
        frame = frame.f_back
    filename = frame.f_code.co_filename if frame is not None else "<frozen"
    return filename.startswith(("<frozen", _HERE)) or is_elsewhere(filename)


_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
