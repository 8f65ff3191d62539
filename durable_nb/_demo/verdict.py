"""Given what three kernels asked of the shop, what was proved. Pure: the runner gathers the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from durable_nb._housekeeping.tables import count

STEPS = {"charge": "/charge", "order": "/orders", "receipt": "/receipts", "sleep": "", "review": "/reviews"}
"""The notebook's steps in order, and where each asks the shop."""

KILLS = {
    "charge": "inside the charge: the shop had taken the money, the step was not recorded",
    "sleep": "in the wait",
    "receipt": "inside the receipt: the shop had sent it, the step was not recorded",
}
"""Where the first kernel can be killed, and what that means."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen."""

    killed: str
    requests: tuple[Mapping[str, int], ...]
    """By kernel, how often the shop was asked, by step."""
    performed: Mapping[str, int]
    """How often the shop did what was asked."""
    keys: Mapping[str, int]
    """Different idempotency keys that came."""
    charged: float
    nap_s: float
    paused_s: float
    """From the receipt's answer to the request for a review, the new kernel's start included."""
    waited_s: float
    """How long the second kernel was in the sleep."""
    same_deadline: bool
    """The sleep's record was never rewritten."""
    third_line: str
    """What the third kernel showed above the cell's output."""


def expected(killed: str, step: str) -> tuple[int, int, int]:
    """How often each kernel executes a step, if what is finished never runs again and the killed step runs once more."""
    order = list(STEPS)
    if step == killed:
        return 1, 1, 0
    return (1, 0, 0) if order.index(step) < order.index(killed) else (0, 1, 0)


def faults(seen: Evidence) -> list[str]:
    """What broke the promise, a sentence each; empty when it was kept. The shop's own count is the judge."""
    found = []
    for step in filter(STEPS.get, STEPS):
        found += [
            f"{step}: the shop saw {_times(asked.get(step, 0))} in kernel {kernel} instead of {_times(right)}"
            for kernel, (asked, right) in enumerate(zip(seen.requests, expected(seen.killed, step), strict=True), 1)
            if asked.get(step, 0) != right
        ]
        if (times := seen.performed.get(step, 0)) != 1:
            found.append(f"{step}: the shop did it {_times(times)} instead of once")
        if (keys := seen.keys.get(step, 0)) != 1:
            found.append(f"{step}: it came under {keys} different idempotency keys instead of one")
    if not seen.same_deadline:
        found.append("sleep: the deadline that kernel 1 wrote was changed")
    if seen.paused_s < seen.nap_s:
        found.append(f"sleep: the review was asked for after {seen.paused_s:.2f} s, before the {seen.nap_s:g} s were over")
    if " · restored " not in seen.third_line:
        found.append(f"kernel 3 did not restore the cell as a whole but showed {seen.third_line!r}")
    return found


def table(seen: Evidence) -> str:
    """What ran where, step by step."""
    rows = [["step", "executed in kernel 1", "executed in kernel 2", "restored in kernel 2", "server saw", "charged"]]
    for step, path in STEPS.items():
        cut = step == seen.killed
        if path:
            first, second = (asked.get(step, 0) for asked in seen.requests[:2])
            total = sum(asked.get(step, 0) for asked in seen.requests)
            performed, keys = seen.performed.get(step, 0), seen.keys.get(step, 0)
            server = f"{count(total, 'request')}, {count(keys, 'key')}, done {_times(performed)}"
            charged = f"{_times(performed)}, {seen.charged:.2f}" if step == "charge" else ""
            restored = "yes" if first and not cut and not second else "no"
            rows.append([step, _yes(first) + " (killed inside)" * cut, _yes(second), restored, server, charged])
        elif cut:
            rest = f"the rest, {seen.waited_s:.1f} of {seen.nap_s:g} s"
            rows.append([step, "yes (killed inside)", rest, "its deadline" if seen.same_deadline else "no", "", ""])
        else:
            rows.append([step, "no", f"yes, {seen.waited_s:.1f} s", "no", "", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-|-".join("-" * width for width in widths), *lines[1:]])


def closing(killed: str) -> str:
    """The sentence that says what was proved."""
    finished = [step for step in filter(STEPS.get, STEPS) if expected(killed, step) == (1, 0, 0)]
    kept = f"{', '.join(finished)} did not run again, " if finished else ""
    if killed == "sleep":
        proof = "the new kernel waited only for the rest"
    else:
        proof = "the shop got the same idempotency key twice and acted on it once"
    where = "in the wait" if killed == "sleep" else f"inside {killed!r}"
    return f"Proved: the kernel was killed with SIGKILL {where}; {kept}{proof}, and the customer was charged once."


def _yes(n: int) -> str:
    return {0: "no", 1: "yes"}.get(n, f"{n} times")


def _times(n: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(n, f"{n} times")
