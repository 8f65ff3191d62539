"""The execution report: how a cell's last execution in this process went."""

from __future__ import annotations

from dataclasses import dataclass, field

from durable_nb._cellcache.entries import Manifest
from durable_nb._cellcache.explain import Difference


@dataclass(slots=True)
class ExecutionReport:
    """How one execution of a cell went, for whoever asks why it ran, or whether it would run again."""

    at: float
    """When it began, unix seconds."""
    restored: bool = False
    why: str = ""
    """Why it ran."""
    not_stored: str = ""
    """Why it has no entry."""
    nearest: Manifest | None = None
    """The entry it was restored from; or the one most like the cell before it ran."""
    differences: tuple[Difference, ...] = ()
    """From that one."""
    kept: Manifest | None = None
    """The entry that holds how it went: restored from, or stored now."""
    opaque: tuple[str, ...] = ()
    key: str = ""
    components: dict[str, str] = field(default_factory=dict)
    """Of its key, before it ran."""
    changed: tuple[str, ...] = ()
    """Components that it changed in place."""

    def inputs(self) -> set[str]:
        """Variables of the notebook that the cell and its helpers read."""
        return {label.partition(" ")[2] for label in self.components if label.startswith("global ")}

    def names_changed(self) -> set[str]:
        """Variables whose objects it changed in place."""
        return {label.partition(" ")[2] for label in self.changed}
