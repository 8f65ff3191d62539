"""Given what three kernels ran and what the shop saw, what was proved. Pure: the runner gathers the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STEPS = {"charge": "/charge", "order": "/orders", "receipt": "/receipts", "sleep": "", "review": "/reviews"}
"""The notebook's steps in order, and where each asks the shop."""

LOGGED = ("charge", "receipt", "review")
"""Steps whose bodies note in a log that they run; the order is a `durable.call`, which has no body of the notebook's."""

KILLS = {
    "charge": "inside the charge: the shop had taken the money, the step was not recorded",
    "sleep": "in the wait",
    "receipt": "inside the receipt: the shop had sent it, the step was not recorded",
}
"""Where the first kernel can be killed, and what that means."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen. Tuples hold one entry for each of the three kernels; requests and bodies are counted by step."""

    killed: str
    requests: tuple[Mapping[str, int], ...]
    """As the shop counted them."""
    bodies: tuple[Mapping[str, int], ...]
    """As the steps' bodies noted them."""
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
    """What the third kernel said above the cell's output."""
    third_took_s: float


def expected(killed: str, step: str) -> tuple[int, int, int]:
    """How often each kernel executes a step, if what is finished never runs again and the killed step runs once more."""
    order = list(STEPS)
    if step == killed:
        return 1, 1, 0
    return (1, 0, 0) if order.index(step) < order.index(killed) else (0, 1, 0)


def faults(seen: Evidence) -> list[str]:
    """What broke the promise, a sentence each; empty when it was kept. The shop's own count is the judge."""
    found = []
    for step, path in STEPS.items():
        if not path:
            continue
        wanted = expected(seen.killed, step)
        counts = {"the shop saw": seen.requests} | ({"its log shows": seen.bodies} if step in LOGGED else {})
        for witness, counted in counts.items():
            found += [
                f"{step}: {witness} {_times(count.get(step, 0))} in kernel {kernel} instead of {_times(right)}"
                for kernel, (count, right) in enumerate(zip(counted, wanted, strict=True), 1)
                if count.get(step, 0) != right
            ]
        if seen.performed.get(step) != 1:
            found.append(f"{step}: the shop did it {_times(seen.performed.get(step, 0))} instead of once")
        if seen.keys.get(step) != 1:
            found.append(f"{step}: it came under {seen.keys.get(step, 0)} different idempotency keys instead of one")
    if not seen.same_deadline:
        found.append("sleep: the deadline that kernel 1 wrote was changed")
    if seen.paused_s < seen.nap_s:
        found.append(f"sleep: the review was asked for after {seen.paused_s:.2f} s, before the {seen.nap_s:g} s were over")
    if not restored_whole(seen):
        found.append(f"kernel 3 did not restore the cell as a whole but said {seen.third_line!r}")
    return found


def restored_whole(seen: Evidence) -> bool:
    """Did the third kernel take the cell from its entry, and ask the shop nothing?"""
    return " · restored " in seen.third_line and not any(seen.requests[2].values())


def table(seen: Evidence) -> str:
    """Who executed what."""
    rows = [["step", "executed in kernel 1", "executed in kernel 2", "restored in kernel 2", "server saw", "charged"]]
    for step, path in STEPS.items():
        rows.append(_row(seen, step) if path else _sleep_row(seen))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-|-".join("-" * width for width in widths), *lines[1:]])


def closing(seen: Evidence) -> str:
    """The sentence that says what was proved."""
    finished = [step for step in STEPS if STEPS[step] and expected(seen.killed, step) == (1, 0, 0)]
    if seen.killed == "sleep":
        return (
            f"Proved: the kernel was killed with SIGKILL in the wait; {_listed(finished)} did not run again, the new kernel "
            "waited only for the rest, and the customer was charged once."
        )
    kept = f"{_listed(finished)} did not run again, " if finished else ""
    return (
        f"Proved: the kernel was killed with SIGKILL inside {seen.killed!r}; {kept}the shop got the same idempotency key twice "
        "and acted on it once, and the customer was charged once."
    )


def _row(seen: Evidence, step: str) -> list[str]:
    first, second = (count.get(step, 0) for count in seen.requests[:2])
    performed, keys = seen.performed.get(step, 0), seen.keys.get(step, 0)
    cut = " (killed inside)" if step == seen.killed and first else ""
    saw = f"{_count(sum(c.get(step, 0) for c in seen.requests), 'request')}, {_count(keys, 'key')}, done {_times(performed)}"
    return [
        step,
        _yes(first) + cut,
        _yes(second),
        "yes" if first and not cut and not second else "no",
        saw,
        f"{_times(performed)}, {seen.charged:.2f}" if step == "charge" else "",
    ]


def _sleep_row(seen: Evidence) -> list[str]:
    if seen.killed != "sleep":
        return ["sleep", "no", f"yes, {seen.waited_s:.1f} s", "no", "", ""]
    rest = f"the rest, {seen.waited_s:.1f} of {seen.nap_s:g} s"
    return ["sleep", "yes (killed inside)", rest, "its deadline" if seen.same_deadline else "no", "", ""]


def _yes(count: int) -> str:
    return "no" if not count else "yes" if count == 1 else f"{count} times"


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""
