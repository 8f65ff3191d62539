"""Is a store sound, and whose is it? What `durable-nb doctor` finds, and what `durable-nb trust` signs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from durable_nb._cellcache.entries import Entries
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Arguments, Outcome, Result, unpack
from durable_nb._store import Store
from durable_nb.errors import CorruptStoreError, StoreError, UntrustedStoreError

_AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be."""

    where: str
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Examined:
    """What was looked at, and what was found wrong."""

    rows: int
    values: int
    entries: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    """What is as it should be, and yet to be known."""


def examine(store: Store, *, verify: bool = False) -> Examined:
    """Look at everything; nothing is changed. `verify` compares every byte of entries, however large."""
    findings = [Finding("journal", problem, _RESTORE) for problem in store.journal.problems()]
    if store.path.stat().st_mode & 0o077:
        findings.append(Finding(str(store.path), "others may read it", f"chmod 700 {store.path}"))
    rows, values, entries = store.journal.sizes(), dict[str, _Holder](), list(Entries(store.cells, store.signer).all())
    findings += _of_rows(store, [key for key, _ in rows], values)
    findings += _of_values(store, values)
    findings += _of_entries(store, [entry.path for entry in entries if entry.manifest is None or verify])
    notes = (*filter(None, [store.advice]), *store.journal.caveats())
    return Examined(len(rows), len(values), len(entries), tuple(findings), notes)


_RESTORE = "restore the folder from a backup"
_Holder = tuple[str, str]
"""What refers to a large value, and what to do where that is damaged."""


def _of_rows(store: Store, keys: list[str], values: dict[str, _Holder]) -> Iterator[Finding]:
    """What is wrong with rows; `values` is filled with the large values that they name."""
    signer, foreign = store.signer, Counter[str]()
    for key in keys:
        row = store.journal.get(key)
        try:
            if row is None:  # deleted meanwhile
                continue
            signer.verify(key, row)
            if key.startswith("step/"):
                outcome = unpack(signer, key, row, Outcome)
                holder = f"step {outcome.name!r}", f"--rerun={outcome.name} executes the step anew"
                values |= dict.fromkeys(filter(None, (outcome.blob, outcome.patches_blob)), holder)
            elif key.startswith(("arguments/", "result/")):
                kind: type[Arguments | Result] = Arguments if key.startswith("arguments/") else Result
                holder = f"run {key.partition('/')[2]!r}", "start the workflow again, under another id"
                values |= dict.fromkeys(filter(None, (unpack(signer, key, row, kind).blob,)), holder)
        except UntrustedStoreError:
            foreign[key.partition("/")[0]] += 1
        except CorruptStoreError as error:
            yield Finding(
                key, str(error), ("run the cell once with --rerun, or " if key.startswith("step/") else "") + _RESTORE
            )
    if foreign:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(foreign.items()))
        yield Finding("journal", f"rows signed with another key: {kinds}", f"durable-nb trust {store.path}")


def _of_values(store: Store, values: dict[str, _Holder]) -> Iterator[Finding]:
    for digest, (whose, remedy) in values.items():
        try:
            store.journal.get_blob(digest)
        except StoreError as error:
            yield Finding(f"values/{digest}", f"{whose}: {error}", remedy)


def _of_entries(store: Store, paths: list[Path]) -> Iterator[Finding]:
    entries = Entries(store.cells, store.signer)
    for path in paths:
        name = str(path.relative_to(store.path))
        try:
            entries.verify(path)
        except UntrustedStoreError:
            remedy = f"delete it, and the cell is stored anew; or, if you know whose it is, durable-nb trust {store.path}"
            yield Finding(name, "damaged, or signed with another key", remedy)
        except CorruptStoreError as error:
            yield Finding(name, str(error), "nothing to do: the cell will run, and is stored anew")


@dataclass(frozen=True, slots=True)
class Foreign:
    """What another key has signed."""

    rows: tuple[str, ...]
    entries: int


def foreign(store: Store) -> Foreign:
    """What `trust` would sign."""
    rows = tuple(key for key, _ in store.journal.sizes() if not store.signer.is_own(store.journal.get(key) or b""))
    return Foreign(rows, sum(entry.manifest is None for entry in Entries(store.cells, store.signer).all()))


def trust(store: Store) -> tuple[int, int]:
    """Sign anew what another key has signed: (rows, entries). From here on they are unpickled, which runs what they say.

    StoreError while another process uses the store: it would lose its runs.
    """
    others = store.process.others()
    if others:
        pids = ", ".join(other.partition("-")[0] for other in others)
        raise StoreError(f"the store {store.path} is in use (process {pids}); nothing was signed. Stop it first")
    signed = 0
    puts: list[tuple[tuple[str, bytes], tuple[str, bytes]]] = []
    for key in foreign(store).rows:
        row = store.journal.get(key)
        if row is None:
            continue
        try:
            puts.append(((key, row), (key, store.signer.sign_anew(key, row))))
        except CorruptStoreError:
            continue  # `doctor` tells of it
    for start in range(0, len(puts), _AT_ONCE):
        some = puts[start : start + _AT_ONCE]
        verdict = store.writer.commit_and_wait(Commit(some[0][0], puts=tuple(put for _, put in some)))
        signed += len(some) if verdict is Verdict.APPLIED else 0
    entries = Entries(store.cells, store.signer)
    done = 0
    for entry in entries.all():
        if entry.manifest is None:
            times = entry.stored_at, entry.used_at
            try:
                entries.sign(entry.path)
            except CorruptStoreError:
                continue
            os.utime(entry.path, (times[1], times[0]))
            done += 1
    return signed, done
