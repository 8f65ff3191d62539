"""Who else has a file open, as Linux tells it of processes of the same user."""

from __future__ import annotations

import os
from pathlib import Path

_WRITES = os.O_WRONLY | os.O_RDWR


def is_written_elsewhere(path: str) -> bool:
    """Does another program have that file open for writing?

    inotify tells that a file was opened, not by whom: a log that somebody follows looks like one that a step reads. What a
    running program writes is no input that could be the same again. What our own children write doesn't count here.
    """
    try:
        wanted = os.stat(path)
        processes = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return False
    ours = _family(processes)
    return any(_writes(process, wanted) for process in processes if process not in ours)


def _family(processes: list[str]) -> set[str]:
    """This process and those below it."""
    parents = {process: _parent(process) for process in processes}
    ours, new = {str(os.getpid())}, {str(os.getpid())}
    while new := {process for process, parent in parents.items() if parent in new} - ours:
        ours |= new
    return ours


def _parent(process: str) -> str:
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[1]
    except (OSError, IndexError):  # it has ended
        return ""


def _writes(process: str, wanted: os.stat_result) -> bool:
    try:
        held = os.listdir(f"/proc/{process}/fd")
    except OSError:  # it has ended, or is another user's
        return False
    for descriptor in held:
        try:
            if os.path.samestat(os.stat(f"/proc/{process}/fd/{descriptor}"), wanted):
                about = Path("/proc", process, "fdinfo", descriptor).read_text()
                if int(about.partition("flags:")[2].split()[0], 8) & _WRITES:
                    return True
        except (OSError, ValueError, IndexError):  # closed meanwhile
            continue
    return False
