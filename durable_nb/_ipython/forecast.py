"""What Run All would do: for each durable cell that this kernel has executed, a hit, a run, or that it depends.

A cell is weighed with the values that the notebook holds now, but for names that the cell itself or a later one binds or
changes: those stood otherwise when it ran, and Run All will make them anew; they count as at its last execution. So do the
global random generators that it moves, which Run All will seed anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from IPython.core.error import UsageError

from durable_nb._cellcache import explain
from durable_nb._cellcache.cache import ruled_out
from durable_nb._cellcache.entries import Entries, Manifest
from durable_nb._cellcache.keys import CellKey, changes, key_from, key_of
from durable_nb._cellcache.names import Names
from durable_nb._cellcache.world import World
from durable_nb._ipython.cell import Story, terms_of
from durable_nb._ipython.compile import source_of
from durable_nb._records import scope_of

HIT, RUN, DEPENDS = "hit", "run", "depends"


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one cell would do."""

    name: str
    what: str
    """`hit`, `run`, or `depends` on what a cell before it makes."""
    why: str
    cost_s: float | None
    """What running it is known to take, and a hit to save."""


def forecasts(shell: Any, entries: Entries, stories: Mapping[str, Story], rerun: set[str]) -> list[Forecast]:
    """For all cells in the order in which they were executed first."""
    known = {name: source_of(shell, story.source) for name, story in stories.items()}
    found: list[Forecast] = []
    unsure: dict[str, str] = {}  # names that are bound by a cell which may run: the cell
    later = {name: _made(names, story) for (name, (_, names)), story in zip(known.items(), stories.values(), strict=True)}
    for name, story in stories.items():
        clobbered = set().union(*later.values())
        del later[name]
        tree, names = known[name]
        manifest, what, why = _of_one(shell, entries, story, tree, names, clobbered, rerun=name in rerun)
        if what == HIT:
            sources = sorted({unsure[read] for read in names.read if read in unsure})
            if sources:
                what, why = DEPENDS, f"on what {', '.join(sources)} makes"
        found.append(Forecast(name, what, why, manifest.took_s if manifest else None))
        if what != HIT:
            unsure.update(dict.fromkeys(_made(names, story), name))
    return found


def differences(shell: Any, entries: Entries, story: Story) -> tuple[Manifest | None, list[explain.Difference]]:
    """The entry that is most like the cell as things are now, and what differs from it."""
    tree, names = source_of(shell, story.source)
    key = key_of(story.options.name, tree, names, shell.user_ns, terms_of(shell, story.options))
    scope = scope_of(story.options.name)
    manifests = entries.manifests(scope, limit=1000)
    nearest = min(manifests, key=lambda m: len(changes(m.components, key.components)), default=None)
    if nearest is None:
        return None, []
    now, texts = explain.notes_of(key, tree, shell.user_ns, entries.mark)
    found = explain.differences(nearest.components, explain.decode(entries.notes(scope, nearest)), key.components, now, texts)
    return nearest, [*found, *(explain.Difference(what) for what in nearest.world.changes(shell.user_ns))]


def _made(names: Names, story: Story) -> set[str]:
    """Names that the cell binds, or whose objects it changes."""
    return {*names.bound, *(label.partition(" ")[2] for label in story.changed)}


def _of_one(
    shell: Any, entries: Entries, story: Story, tree: Any, names: Names, clobbered: set[str], *, rerun: bool
) -> tuple[Manifest | None, str, str]:
    options = story.options
    try:
        terms = terms_of(shell, options)
    except UsageError as error:  # --extra can't be evaluated now
        return None, RUN, str(error)
    key = key_of(options.name, tree, names, shell.user_ns, terms)
    now = _as_it_would_be(key, story, clobbered)
    manifests = list(entries.manifests(scope_of(options.name), limit=1000))
    likest = min(manifests, key=lambda m: len(changes(m.components, now)), default=None)
    if rerun:
        return likest, RUN, "asked for by %durable rerun"
    if options.rerun or options.rerun_step:
        return likest, RUN, "asked for by --rerun"
    if key.unknown:
        return likest, RUN, key.unknown[0]
    whole = key_from(options.name, now)
    reason = ""
    for manifest in manifests:
        if manifest.key == whole:
            world = _world_to_compare(manifest, story, clobbered)
            said = ruled_out(terms, manifest) or ", ".join(world.changes(shell.user_ns)[:3])
            if not said:
                return manifest, HIT, ""
            reason = reason or said
    if reason:
        return likest, RUN, reason
    if story.not_stored:
        return likest, RUN, f"not stored: {story.not_stored}"
    if likest is None:
        return None, RUN, "nothing is stored of it"
    return likest, RUN, ", ".join(changes(likest.components, now)[:3])


def _world_to_compare(manifest: Manifest, story: Story, clobbered: set[str]) -> World:
    """The entry's world without what was as at the last execution then, and will be so again."""
    world, then = manifest.world, story.kept.world if story.kept else World()
    return replace(
        world,
        generators={name: state for name, state in world.generators.items() if then.generators.get(name) != state},
        names={name: digest for name, digest in world.names.items() if name not in clobbered or then.names.get(name) != digest},
    )


def _as_it_would_be(key: CellKey, story: Story, clobbered: set[str]) -> dict[str, str]:
    """The components of the key, with what is not as it will be taken from the last execution."""
    labels = {f"global {name}" for name in clobbered}
    touched = labels & {*key.components, *story.components}
    then = touched | ({"aliases"} if touched else set())
    now = {label: digest for label, digest in key.components.items() if label not in then}
    return now | {label: digest for label, digest in story.components.items() if label in then}
