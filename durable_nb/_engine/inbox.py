"""What others want of a run: messages in its inbox. Buttons, command lines and other processes are senders, and nothing more.

A sender inserts the next row `inbox/RUN/SEQ`. The run's owner looks every half second; a sender in the owner's own process
tells it at once. What is sent while nobody executes the run waits there. A row goes in the commit that records its delivery.

| message | a process executes the run, idle or busy | nobody does |
|---|---|---|
| `Cancel` | its code unwinds; a second one ends the run at once | the run is cancelled from that moment, by the row alone |
| `Restart` | the execution stops, and the run begins anew | whoever resumes the run begins it anew |
| `Resume` | it is done with already | any process that has the workflow resumes the run |
| `Notification` | the wait for it that was asked for first takes it, or the next one | the next execution hears it |
| `Answer` | the approval that it is for is decided, as its `decided` row says | the next execution hears it |

A `Notification` for whoever waits, or will, is no message of an inbox but a row of the store: each run reads it once.

A process that is busy in blocking code hears when its loop has a turn; one that died has no more turns, so its runs are
nobody's. `Execution.news` gives an execution what it has not heard of; `WorkflowRun.hear` and `CellRun.hear` say what each
message does; `Ownership` hands what is for nobody's runs to `Workflows`.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from durable_nb import _records as rec
from durable_nb._facts import Status
from durable_nb._journal import Commit, Verdict
from durable_nb._records import Answer, Cancel, Message, Notification, Restart, Resume, RunRecord, pack, unpack_message
from durable_nb._store import Store
from durable_nb.errors import StoreError


@dataclass(frozen=True, slots=True)
class Received:
    """A message that is in an inbox."""

    key: str
    row: bytes
    """Tells it from another one that had the same key, before or after."""
    message: Message


class Restarted(Exception):  # noqa: N818  it says what happened
    """Ends an execution whose run is to begin anew. Nothing more of it is written down."""


def outlasts(message: Message) -> bool:
    """Is it for the run itself, whichever execution comes to it? What else is sent is about the execution there is."""
    return isinstance(message, Notification | Answer)


def up_to_restart(inbox: list[Received]) -> list[Received]:
    """What was sent before the last restart, and that: the execution that it begins is to hear what came after it."""
    last = max((n for n, one in enumerate(inbox) if isinstance(one.message, Restart)), default=-1)
    return inbox[: last + 1]


def wish(record: RunRecord, inbox: Iterable[Received]) -> Message | None:
    """What counts of the inbox of a run that nobody executes: the cancellation or the restart that was sent last."""
    found: Message | None = None
    for message in (one.message for one in inbox):
        match message:
            case Cancel() if record.status == Status.RUNNING or isinstance(found, Restart):
                found = found if isinstance(found, Cancel) else message
            case Restart():
                found = message
            case Resume():
                found = found or message
    return found


class Inbox:
    """Of all runs of a store. May be used by any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def send(self, run_id: str, run_row: bytes, message: Message) -> bool:
        """Put a message on disk. False, and nothing is written, where the run's record is not `run_row` any more."""
        while True:
            row = self.next_row(run_id, message)
            guard = rec.run_key(run_id), run_row  # of a run that has ended nobody would take it out again
            verdict = self._store.writer.commit_and_wait(Commit(guard, inserts=(row,)))
            if verdict is not Verdict.EXISTS:  # else another sender was faster
                return verdict is Verdict.APPLIED

    def send_all(self, run_rows: Mapping[str, bytes], message: Message) -> list[str]:
        """The same to many runs, whose records' rows these are, in few commits; those that did not get it."""
        used = Counter[str]()
        for key, _ in self._store.journal.sizes(rec.inbox_prefix("")):
            run_id = rec.run_of_inbox(key)
            used[run_id] = max(used[run_id], rec.seq_of(key))
        commits = []
        for run_id, run_row in run_rows.items():
            key = rec.inbox_key(run_id, used[run_id] + 1)
            commits.append(Commit((rec.run_key(run_id), run_row), inserts=((key, pack(self._store.signer, key, message)),)))
        given = [self._store.writer.hand_over(commit) for commit in commits]
        return [run_id for run_id, done in zip(run_rows, given, strict=True) if done.result() is not Verdict.APPLIED]

    def next_row(self, run_id: str, message: Message) -> tuple[str, bytes]:
        """The row that a message is, to be inserted: another sender may be faster."""
        keys = [key for key, _ in self._store.journal.sizes(rec.inbox_prefix(run_id))]
        key = rec.inbox_key(run_id, max(map(rec.seq_of, keys), default=0) + 1)
        return key, pack(self._store.signer, key, message)

    def of(self, run_id: str) -> list[Received]:
        """What is in one run's inbox, in the order in which it was sent."""
        return self._read(rec.inbox_prefix(run_id)).get(run_id, [])

    def all(self) -> dict[str, list[Received]]:
        """The same of every run that has something in its inbox: one scan."""
        return self._read(rec.inbox_prefix(""))

    def events(self, event_ids: Iterable[str], known: Container[str] = ()) -> list[Received]:
        """The events of these ids that were sent to nobody in particular, in the order in which they were sent, but for the
        rows of these keys."""  # fmt: skip
        journal, found = self._store.journal, list[Received]()
        for event_id in event_ids:
            keys = [key for key, _ in journal.sizes(rec.event_prefix(event_id)) if key not in known]
            for key, row in sorted(journal.get_many(keys).items()):
                with contextlib.suppress(StoreError):
                    found.append(Received(key, row, unpack_message(self._store.signer, key, row)))
        return found

    def _read(self, prefix: str) -> dict[str, list[Received]]:
        found: defaultdict[str, list[Received]] = defaultdict(list)
        for key, row in sorted(self._store.journal.scan(prefix)):
            with contextlib.suppress(StoreError):  # one that can't be read is told of by `doctor`, and stops no other
                found[rec.run_of_inbox(key)].append(Received(key, row, unpack_message(self._store.signer, key, row)))
        return found
