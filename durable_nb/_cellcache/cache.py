"""What a durable cell left behind, put away and found again: `lookup` before it runs, `save` after it.

Keys, values and patches are made of the user's objects, whose code may raise anything. All of it is looked at inside `key`,
`lookup`, `why` and `save`, and an exception there means one thing: the cell runs, or is not stored. The notebook is touched
by `Hit.apply` alone, after everything that could fail while decoding has succeeded.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import secrets
import time
from collections.abc import Iterable, Mapping, MutableMapping
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from typing import Any

from durable_nb import _records as rec
from durable_nb import _sqlite
from durable_nb._cellcache import explain
from durable_nb._cellcache.effects import Effects, variables_kept
from durable_nb._cellcache.entries import CellResult, Entries, Entry, Manifest
from durable_nb._cellcache.evaluated import Evaluated
from durable_nb._cellcache.external import Around, members, name_digest
from durable_nb._cellcache.files import here
from durable_nb._cellcache.generators import set_generator
from durable_nb._cellcache.keys import CellKey, Terms, changes, code_of, describe, globals_held, key_of, mutated, stored_by
from durable_nb._cellcache.mentions import mentions_of, packages_imported, places_of
from durable_nb._cellcache.names import EVALUATING, Names
from durable_nb._cellcache.patches import (
    attributes_set,
    digest_if_whole,
    imported_by,
    links,
    modules_imported_by,
    patch_of,
    patches_for,
    resolver,
)
from durable_nb._cellcache.resources import (
    NotRemadeError,
    OtherwiseError,
    Remaker,
    Resources,
    Unmade,
    either,
    moved_on,
    standing_of,
)
from durable_nb._cellcache.seeding import seeded_at_once
from durable_nb._cellcache.settings import KNOWN, Setting, UnsettableError, set_again
from durable_nb._cellcache.silence import silenced
from durable_nb._cellcache.watch import Watch, prepare
from durable_nb._clock import say_duration
from durable_nb._memory import InseparableError
from durable_nb._patches import Standing, UnpatchableError, fits, put
from durable_nb._pickling import References
from durable_nb._readback import DriftError, pickled
from durable_nb._usage import Usage
from durable_nb.errors import CorruptStoreError, UntrustedStoreError

_RESULTS, _STATES, _PATCHES, _MODULES, _ELSEWHERE = "<results>", "<generators>", "<patches>", "<modules>", "<elsewhere>"
_SETTINGS, _VARIABLES = "<settings>", "<context variables>"
_OWN = (_RESULTS, _STATES, _PATCHES, _MODULES, _ELSEWHERE, _SETTINGS, _VARIABLES)
"""Names under which an entry keeps what is not a variable."""
_HIDDEN = re.compile(r"_{1,3}|_\d+|_i{1,3}|_i\d+|_[ioh]h|_dh|In|Out|get_ipython|exit|quit")


@dataclass(frozen=True, slots=True)
class CellCode:
    """A cell that is asked for."""

    name: str
    """'' for none: it has no key but its code then."""
    tree: ast.Module
    names: Names
    terms: Terms = field(default_factory=Terms)

    @property
    def scope(self) -> str:
        """The folder of its entries. All cells without a name share one."""
        return rec.scope_of(self.name) if self.name else "~"


@dataclass(frozen=True, slots=True)
class Hit:
    """An entry that holds in the external state as it is now, decoded. Nothing of the notebook has changed yet."""

    manifest: Manifest
    entry: Entry
    values: dict[str, Any]
    settings: tuple[Setting, ...]
    failed: Mapping[str, str]
    """Resources whose constructor failed now, by name, and why: these names are bound to nothing."""

    @property
    def variables(self) -> int:
        """How many variables it binds."""
        return len(self.values) - len(_OWN) - len(self.failed)

    @property
    def results(self) -> list[Any]:
        """The values that the cell displayed."""
        found: list[Any] = self.values[_RESULTS]
        return found

    @property
    def patched(self) -> list[Any]:
        """Objects of earlier cells that it changes."""
        return [obj for obj, _ in self.values[_PATCHES]]

    def apply(self, namespace: MutableMapping[str, Any]) -> None:
        """Leave the namespace, and what lies beyond it, as the cell left them. What imports show is among the outputs."""
        with silenced():
            for (module, name), value in self.values[_ELSEWHERE].items():
                setattr(importlib.import_module(module), name, value)
            for module in self.values[_MODULES]:
                importlib.import_module(module)
            for obj, content in self.values[_PATCHES]:
                put(obj, content)
            bound = {name: value for name, value in self.values.items() if name not in _OWN}
            namespace.update({name: value for name, value in bound.items() if type(value) is not Unmade})
            for name in [*self.manifest.deleted, *(n for n, value in bound.items() if type(value) is Unmade)]:
                namespace.pop(name, None)
            for name, state in self.values[_STATES].items():
                set_generator(name, state)
            set_again(self.settings, self.values[_SETTINGS])
            for variable, value in self.values[_VARIABLES]:
                variable.set(value)


@dataclass(frozen=True, slots=True)
class Miss:
    """The cell has to run."""

    why: str = ""
    """What rules the entry of this key out, where there is one; for everything else `CellCache.why` looks further."""
    warnings: tuple[str, ...] = ()
    """Entries that should have been a hit, and what is wrong with them."""


@dataclass(frozen=True, slots=True)
class Why:
    """Why a cell runs."""

    nearest: Manifest | None
    """The entry that is most like it."""
    found: tuple[str, ...]
    """What differs from that one, in a few words."""
    differences: tuple[explain.Difference, ...]
    """The same with details."""
    notes: explain.Notes


@dataclass(frozen=True, slots=True)
class Before:
    """What a cell is about to run with; `watch` sees what it does meanwhile."""

    code: CellCode
    key: CellKey
    namespace: MutableMapping[str, Any]
    """The live one."""
    held: dict[str, Any]
    """What it held."""
    elsewhere: dict[tuple[str, str], Any]
    """What the globals of modules held that helpers may bind."""
    watch: Watch
    """Of files and random generators."""
    effects: Effects
    """Of the process."""
    standing: Standing
    resources: dict[str, tuple[Any, Any]]
    """Those of earlier cells, by name, each with how it stands."""
    notes: explain.Notes


@dataclass(frozen=True, slots=True)
class After:
    """How a cell went."""

    results: list[Any]
    """The values that it displayed."""
    outputs: bytes
    outputs_count: int
    cost_s: float
    variables: tuple[tuple[ContextVar[Any], Any], ...] = ()
    """Context variables that it set."""
    steps: bool = False
    """Has it steps, which are kept whatever becomes of the cell?"""
    problems: tuple[str, ...] = ()
    """What else it did that no hit would do again."""
    run: str = ""
    usage: Usage = field(default_factory=dict)
    """What models' answers cost that its steps were given."""
    alone: bool = True
    """No other cell was executed meanwhile."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The entry is on disk."""

    manifest: Manifest
    changed: tuple[str, ...]
    """Components of its key that the cell changed in place."""


@dataclass(frozen=True, slots=True)
class NotStored:
    """The cell will run again."""

    why: str
    changed: tuple[str, ...] = ()


class CellCache:
    """The cells of one store."""

    def __init__(self, entries: Entries, own: Iterable[str], settings: Iterable[Setting] = ()) -> None:
        """`own`: files and folders that are no inputs: the store's folder, the notebook; `settings`: those of the notebook."""
        self.entries, self._own = entries, tuple(own)
        self._settings = (*KNOWN, *settings)

    def around(self, namespace: Mapping[str, Any]) -> Around:
        """What records of the external state are compared with."""
        return Around(namespace, self.entries.signer, self._own, self._settings)

    def key(self, code: CellCode, namespace: MutableMapping[str, Any]) -> CellKey:
        """The identity of the cell, were it to run now."""
        try:
            return key_of(code.name, code.tree, code.names, namespace, code.terms)
        except Exception as error:  # whatever is odd about an input, the cell itself must run
            unknown = f"its inputs can't be compared ({type(error).__name__}: {error})"
            return CellKey(secrets.token_hex(20), {}, {}, (unknown,), {})

    def lookup(self, code: CellCode, namespace: MutableMapping[str, Any], key: CellKey) -> Hit | Miss:
        """The entry of this key that holds in the external state as it is now, decoded."""
        if key.unknown:
            return Miss()
        why = ""
        try:
            for entry in self.entries.of_key(code.scope, key.key):
                stale = ruled_out(code.terms, entry.manifest)
                why = why or stale
                if stale or entry.manifest.external.changes(self.around(namespace)):
                    continue
                remaker = Remaker(code.tree, namespace)
                with silenced():
                    values = entry.values(either(remaker, resolver(key.places, namespace, lambda: code_of(key))))
                    remaker.finish()
                if any(type(values.get(name)) is not Unmade for name in remaker.failed):
                    continue  # another value holds what can't be made
                if all(fits(obj, content) for obj, content in values[_PATCHES]):
                    return Hit(entry.manifest, entry, values, self._settings, remaker.failed)
        except OtherwiseError as error:
            return Miss(str(error))
        except (CorruptStoreError, UntrustedStoreError) as error:
            return Miss(why, (f"what was stored of this cell is not used: {error}; the cell runs and is stored anew",))
        except Exception as error:  # a class or module that its values need is gone
            what = f"{type(error).__name__}: {error}"
            return Miss(why, (f"what was stored of this cell can't be restored ({what}); the cell runs and is stored anew",))
        return Miss(why)

    def why(self, code: CellCode, namespace: MutableMapping[str, Any], key: CellKey) -> Why:
        """What differs between the cell and the entry most like it."""
        try:
            notes, texts = explain.notes_of(key, code.tree, namespace, self.entries.signer)
        except Exception:  # an explanation is no reason for a cell not to run
            notes, texts = explain.Notes(), {}
        nearest, found = self._nearest(code, namespace, key)
        if nearest is None:
            return Why(None, (), (), notes)
        before = explain.decode(self.entries.notes(code.scope, nearest))
        components = explain.differences(nearest.components, before, key.components, notes, texts)
        external = nearest.external.changes(self.around(namespace))
        return Why(nearest, tuple(found), (*components, *(explain.Difference(what) for what in external)), notes)

    def _nearest(self, code: CellCode, namespace: MutableMapping[str, Any], key: CellKey) -> tuple[Manifest | None, list[str]]:
        nearest: Manifest | None = None
        fewest: list[str] = []
        for manifest in self.entries.manifests(code.scope) if code.name else ():
            found = changes(manifest.components, key.components) or manifest.external.changes(self.around(namespace))
            if nearest is None or len(found) < len(fewest):
                nearest, fewest = manifest, found
        return nearest, fewest

    def begin(self, code: CellCode, namespace: MutableMapping[str, Any], key: CellKey, notes: explain.Notes) -> Before:
        """Remember what the cell starts from; watch it with `watching(before.watch)` while it runs."""
        mentions = mentions_of([namespace[name] for name in sorted(code.names.read) if name in namespace], [code.tree])
        places = places_of(mentions, here())
        prepare(places)
        packages = {*key.versions, *packages_imported(code.tree)}
        evaluated = Evaluated(namespace, key.names, mentioned=not EVALUATING.isdisjoint(key.words))
        watch = Watch(
            self.around(namespace),
            mentions,
            places,
            packages,
            displays=True,
            evaluated=evaluated,
            seeded=seeded_at_once(code.tree, namespace),
            members=members(key.words),
        )
        effects = Effects(code.tree, key.words, self._settings, key.components.get("code", ""))
        standing = Standing(key.places.values(), code_of(key).values(), digest_if_whole)
        resources = standing_of({name: namespace[name] for name in code.names.read if name in namespace})
        return Before(code, key, namespace, dict(namespace), globals_held(key), watch, effects, standing, resources, notes)

    def save(self, before: Before, after: After) -> Stored | NotStored:
        """Put away what the cell left behind; on disk when this returns Stored."""
        if before.key.unknown:
            return NotStored(before.key.unknown[0])
        try:
            return _Saving(self.entries, before, after).save()
        except Exception as error:
            return NotStored(f"what it left can't be examined ({type(error).__name__}: {error})")


def ruled_out(terms: Terms, manifest: Manifest) -> str:
    """Why what the user says doesn't let this entry count; '' where it does."""
    age_s, ttl_s = time.time() - manifest.created_at, terms.ttl_s
    if ttl_s is not None and age_s >= ttl_s:
        return f"its entry is {say_duration(age_s)} old, and --ttl says {say_duration(ttl_s)}"
    missing = set(manifest.skipped) - terms.skip
    return f"its entry is without {', '.join(sorted(missing))}, which --skip left out" if missing else ""


@dataclass(slots=True)
class _Saving:
    """One cell being put away."""

    entries: Entries
    before: Before
    after: After
    changed: list[str] = field(default_factory=list)

    def save(self) -> Stored | NotStored:
        code, key, namespace, watch = self.before.code, self.before.key, self.before.namespace, self.before.watch
        held, terms = self.before.held, self.before.code.terms
        names = code.names
        touched = {
            n for n in {*held, *namespace} if n in names.certain or held.get(n, _HIDDEN) is not namespace.get(n, _HIDDEN)
        }
        # What the key tells of a name need not be compared again; and it may have been changed in place since.
        unread = {n for n in (*names.bound, *stored_by(key)) if f"global {n}" not in key.components}
        alone = {n for n in unread if n in namespace and n not in touched}
        touched, alone = ({n for n in found if n in names.bound or not _HIDDEN.fullmatch(n)} for found in (touched, alone))
        deleted, skipped = sorted(touched - namespace.keys()), sorted(touched & namespace.keys() & terms.skip)
        touched, alone = touched - terms.skip, alone - terms.skip - terms.ignored
        bound = {n: namespace[n] for n in sorted(touched) if n in namespace}
        try:
            self.changed, problems = mutated(key, code.tree, names, namespace, held, terms)
            external, unseen = watch.external(self.after.results)
            problems += unseen
            external = replace(external, names=external.names | {n: name_digest(namespace, n) for n in sorted(alone)})
        except Exception as error:
            return self._not(f"its inputs can't be compared any more ({type(error).__name__}: {error})")
        try:
            labels = [label for label in self.changed if not label.startswith("import ")]
            patches = patches_for(labels, key.places, self.before.standing, held, code_of(key))
            for name in moved_on(self.before.resources):
                patches += patch_of(name, held[name], key.places, patches)
        except UnpatchableError as error:
            problems.append(f"it changes {describe(str(error))} in place")
        problems += [f"{name} can't be compared" for name, digest in external.names.items() if not digest]
        problems += [f"it changes {describe(label)} in place" for label in self._unseen_by_anybody()]
        problems += [f"it sets {module}.{name}" for module, name in attributes_set(code.tree, namespace)]
        problems += [*key.sets, *self.after.problems]
        patched = {id(obj) for obj, _ in patches} if not problems else set()
        try:
            problems += self.before.effects.left(patched, self.before.elsewhere.keys())
            context = copy_context()  # the cell ran in one of its own, in which numpy, for one, keeps its options
            for variable, value in self.after.variables:
                context.run(variable.set, value)
            settings, unchanged = context.run(self.before.effects.settings, watch.variables_set)
            external = replace(external, unchanged=unchanged)
            variables = variables_kept(self.after.variables, held)
            resources = Resources(code.tree, bound, namespace)
        except (UnsettableError, NotRemadeError) as error:
            problems.append(str(error))
        modules = [label.removeprefix("import ") for label in self.changed if label.startswith("import ")]
        problems += [f"it changes {name}, a module that it imports" for name in modules]
        if not problems and not self.after.alone and (self.changed or external.generators or settings):
            problems.append("other cells ran meanwhile, and what they have changed can't be told from what it has")
        if problems:
            return self._not(problems[0])
        values = {
            **bound,
            _RESULTS: self.after.results,
            _STATES: watch.moved_states(external),
            _PATCHES: patches,
            _MODULES: modules_imported_by(code.tree, self.before.effects.loaded),
            _ELSEWHERE: {place: now for place, now in globals_held(key).items() if now is not self.before.elsewhere.get(place)},
            _SETTINGS: settings,
            _VARIABLES: [(variable, value) for variable, value, _ in variables],
        }
        imported = imported_by(code.tree, bound) | {id(variable): place for variable, _, place in variables}
        earlier = links(key.places, {n: held[n] for n in names.read if n in held}, imported, code_of(key), resources)
        result = CellResult(
            values,
            external,
            deleted,
            self.after.outputs,
            self.after.outputs_count,
            self.after.cost_s,
            skipped,
            self.after.run,
            self.after.usage,
        )
        return self._write(result, earlier, {id(value) for value in bound.values()})

    def _unseen_by_anybody(self) -> list[str]:
        """Inputs with connections to which the code gives functions and the like, of which no connection tells."""
        key = self.before.key
        places = key.places.items() if not _sqlite.SEEN_BY_NOBODY.isdisjoint(key.words) else ()
        return [label for (label, _), obj in places if _sqlite.is_connection(obj)]

    def _write(self, result: CellResult, earlier: References, bound: set[int]) -> Stored | NotStored:
        code, key = self.before.code, self.before.key
        try:
            manifest = self.entries.store(
                code.scope,
                key.key,
                result,
                name=code.name,
                components=key.components,
                versions=key.versions,
                created_at=time.time(),
                references=earlier,
                copied=lambda defined: id(defined) in bound,
                notes=explain.encode(self.before.notes),
            )
        except OSError as error:
            return self._not(f"the store can't be written ({error.strerror})")
        except InseparableError as error:
            return self._not(f"it binds {error}; .copy() gives it memory of its own")
        except Exception as error:
            return self._not(_unpicklable(result.values, earlier, error, steps=self.after.steps))
        return Stored(manifest, tuple(self.changed))

    def _not(self, why: str) -> NotStored:
        return NotStored(why, tuple(self.changed))


def _unpicklable(values: dict[str, Any], earlier: References, error: Exception, *, steps: bool) -> str:
    """Names the variable that is to blame, and what can be done about it."""
    for name, value in values.items():
        try:
            pickled(value, earlier, apart=True)
        except Exception as own:
            named = name.isidentifier()
            what = f"{name} ({type(value).__name__})" if named else _SAID.get(name, "the displayed value")
            if name == _PATCHES:
                what = next((w for obj, new in value if (w := _unpatchable(obj, new, earlier))), what)
            if isinstance(own, DriftError):
                return f"{what} holds a {own}, which does not come back whole from its own pickle"
            if inspect.iscoroutine(value):
                return f"{what} can't be pickled: 'await' is missing before what made it"
            kept = "; its steps are kept" if steps else ""
            paid = "put what costs time or money into durable.run(...)" if not steps else ""
            ways = [way for way in (f"leave it out with --skip {name}" if named else "", paid) if way]
            return f"{what} can't be pickled{kept}" + (f"; {', or '.join(ways)}" if ways else "")
    if isinstance(error, DriftError):
        return f"a {error} does not come back whole from its own pickle"
    return f"its variables can't be pickled together ({type(error).__name__}: {error})"


def _unpatchable(obj: Any, content: Any, earlier: References) -> str:
    try:
        pickled(content, earlier, apart=True)
    except Exception:
        return f"what it changes in place, a {type(obj).__name__},"
    return ""


_SAID = {
    _PATCHES: "what it changes in place",
    _SETTINGS: "what it sets for the whole process",
    _VARIABLES: "a context variable that it sets",
}
