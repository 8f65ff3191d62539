"""What Run All would do: for each durable cell of the notebook a hit, a run, or that it depends.

A cell that this kernel has executed is weighed with the values that the notebook holds now, but for names that the cell itself
or a later one binds or changes: those stood otherwise when it ran, and Run All will make them anew; they count as at its last
execution. So do the global random generators that it moves, which Run All will seed anew.

Of any other cell it is known how it was executed last: the entry that it had then, and by which cells and keys its inputs were
made. Where those would be restored by the same keys, so would it. Cells that aren't durable count as they were.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from IPython.core.error import UsageError

from durable_nb._cellcache import explain
from durable_nb._cellcache.cache import ruled_out
from durable_nb._cellcache.entries import Entries, Manifest
from durable_nb._cellcache.keys import CellKey, Terms, changes, key_from, key_of
from durable_nb._cellcache.names import Names
from durable_nb._cellcache.world import Around, World
from durable_nb._fingerprint import Fingerprinter
from durable_nb._ipython.cell import Story, terms_of
from durable_nb._ipython.compile import source_of
from durable_nb._ipython.itinerary import Visit
from durable_nb._ipython.notebook import Written, durable_cells
from durable_nb._records import scope_of

HIT, RUN, DEPENDS, UNKNOWN = "hit", "run", "depends", "?"
NOTHING_STORED = "nothing is stored of it"


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one cell would do."""

    name: str
    what: str
    """`hit`, `run`, or `depends` on what a cell before it makes."""
    why: str
    cost_s: float | None
    """What running it is known to take, and a hit to save."""
    key: str = ""
    """Of the entry that it would be restored from."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a notebook besides what this kernel has executed."""

    order: tuple[str, ...]
    """Of its durable cells."""
    visits: Mapping[str, Visit]
    written: Mapping[str, Written]
    """The cells in the notebook's file; empty where that isn't known."""
    saved_at: float = 0.0


def known_of(visits: Mapping[str, Visit], elsewhere: Mapping[str, Visit], executed: Iterable[str], path: str) -> Known:
    """`executed`: cells of this kernel, in order; `path`: the notebook's file, where that is known."""
    written, saved_at = durable_cells(path) if path else ({}, 0.0)
    order = list(written or visits)
    before: str | None = None
    for name in executed:  # one that isn't in the file yet stands behind the one that was executed before it
        if name not in order:
            order.insert(order.index(before) + 1 if before is not None else len(order), name)
        before = name
    return Known(tuple(order), {**elsewhere, **visits}, written, saved_at)


def run_all(
    shell: Any, entries: Entries, stories: Mapping[str, Story], rerun: set[str], known: Known, of: str = ""
) -> list[Forecast]:
    """For all cells of the notebook, in its order. `of`: for this one, and those that have made what it reads."""
    if of:
        known = replace(known, order=tuple(name for name in known.order if name in _makers(of, known.visits)))
    stories = {name: _as_written(stories[name], name, known) for name in known.order if name in stories}
    weighed = {forecast.name: forecast for forecast in forecasts(shell, entries, stories, rerun)}
    found: dict[str, Forecast] = {}
    for name in known.order:
        forecast, visit = weighed.get(name), known.visits.get(name)
        if forecast is None:
            forecast = _of_visit(shell, entries, name, visit, known) if visit else _of_stored(entries, name)
            makers = visit.sources.values() if visit else ()
            same = visit is not None and forecast.key == visit.key
            unsure = {maker for maker, key in makers if not same or maker not in found or found[maker].key != key}
        else:
            read = {label.partition(" ")[2] for label in stories[name].components}
            others = {maker: v for maker, v in known.visits.items() if maker in found and maker not in weighed}
            unsure = {maker for maker, v in others.items() if found[maker].what != HIT and read.intersection(v.made)}
        if forecast.what == HIT and unsure:
            forecast = replace(forecast, what=DEPENDS, why=f"on what {', '.join(sorted(unsure))} makes", key="")
        found[name] = forecast
    return list(found.values())


def _makers(name: str, visits: Mapping[str, Visit]) -> set[str]:
    """The cell, those that made what it reads, and so on."""
    found, waiting = {name}, [name]
    while waiting:
        visit = visits.get(waiting.pop())
        new = {maker for maker, _ in visit.sources.values()} - found if visit else set()
        found |= new
        waiting += new
    return found


def _as_written(story: Story, name: str, known: Known) -> Story:
    """With the cell's text from the file, where that was saved after the cell was executed."""
    written = known.written.get(name)
    if written is None or known.saved_at <= story.at:
        return story
    return replace(story, options=written.options, source=written.body)


def _of_visit(shell: Any, entries: Entries, name: str, visit: Visit, known: Known) -> Forecast:
    manifests = list(entries.manifests(scope_of(name), limit=1000))
    cost_s = next((m.took_s for m in manifests if m.key == visit.key), manifests[0].took_s if manifests else None)
    written = known.written.get(name)
    code = _code_of(shell, written) if written and known.saved_at > visit.at else visit.code
    if written.options.rerun or written.options.rerun_step if written else visit.rerun:
        return Forecast(name, RUN, "asked for by --rerun", cost_s)
    ttl_s = written.options.ttl_s if written else visit.ttl_s
    reason = "" if code == visit.code else "code changed"
    for manifest in manifests:
        if manifest.key == visit.key if code == visit.code else manifest.components.get("code") == code:
            terms = Terms(ttl_s=ttl_s, skip=frozenset(manifest.skipped))
            why = ruled_out(terms, manifest) or ", ".join(of_machine(manifest.world).changes(Around({}, entries.seal))[:3])
            if not why:
                return Forecast(name, HIT, "", manifest.took_s, manifest.key)
            reason = reason or why
    return Forecast(name, RUN, reason or visit.unstored or "its entry is gone", cost_s)


def _of_stored(entries: Entries, name: str) -> Forecast:
    """Of a cell of which nothing is known but its entries: only files can be compared."""
    newest = next(entries.manifests(scope_of(name), limit=1), None)
    changes = of_machine(newest.world).changes(Around({}, entries.seal)) if newest is not None else [NOTHING_STORED]
    cost_s = newest.took_s if newest else None
    if changes:
        return Forecast(name, RUN, ", ".join(changes[:3]), cost_s)
    return Forecast(name, UNKNOWN, "the files it read are as they were", cost_s)


def of_machine(world: World) -> World:
    """What of a world a new kernel finds as it was: what the notebook's own cells make is not there yet, environment variables
    that they set among it."""  # fmt: skip
    variables = {name: digest for name, digest in world.variables.items() if not digest or name in os.environ}
    return replace(world, names={}, generators={}, settings={}, variables=variables)


def _code_of(shell: Any, written: Written) -> str:
    """The digest of a cell's code, as keys have it."""
    try:
        tree, _ = source_of(shell, written.body)
    except SyntaxError:
        return ""
    found = Fingerprinter()
    found.add_code("code", tree)
    return found.result().components["code"]


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
        key = manifest.key if manifest and what == HIT else ""
        found.append(Forecast(name, what, why, manifest.took_s if manifest else None, key))
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
    return nearest, [*found, *(explain.Difference(what) for what in nearest.world.changes(Around(shell.user_ns, entries.seal)))]


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
            said = ruled_out(terms, manifest) or ", ".join(world.changes(Around(shell.user_ns, entries.seal))[:3])
            if not said:
                return manifest, HIT, ""
            reason = reason or said
    if reason:
        return likest, RUN, reason
    if story.not_stored:
        return likest, RUN, f"not stored: {story.not_stored}"
    if likest is None:
        return None, RUN, NOTHING_STORED
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
