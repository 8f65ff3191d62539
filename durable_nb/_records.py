"""What the journal remembers, row by row.

| row | holds |
|---|---|
| `step/SCOPE/GENERATION/IDENTITY/N` | the outcome of the Nth step among equals: written once, never changed |
| `try/SCOPE/GENERATION/IDENTITY/N` | failed attempts of a step that is not finished, and when the next one is due |
| `step/SCOPE/GENERATION/SEQ` | the same of a workflow's run, as the SEQth row of its log |
| `timer/SCOPE/GENERATION/SEQ` | a row of a workflow run's log with which a wait began |
| `log/SCOPE/GENERATION/SEQ` | any other row of a run's log: requests made, timers fired, children ended, a cancellation |
| `try/SCOPE/GENERATION/REQUEST` | failed attempts of a workflow's step, by the number of its request |
| `timer/RUN/KIND/NAME/N` | when a wait of a cell (a sleep, or one for an event or a decision) began, how long it is at most |
| `arrived/RUN/KIND/NAME/N` | the event or decision that such a wait has got, or that it timed out |
| `decided/RUN/WAIT` | that an approval is decided, or timed out: whoever writes this row first has decided |
| `value/RUN/KIND/N` | a time, a UUID or a random number that a cell has got |
| `inbox/RUN/SEQ` | what somebody wants of the run, a message: it goes in the commit that records its delivery |
| `event/EVENT/SEQ` | an event for whichever run waits for it, or will; it goes when no unfinished run is older |
| `progress/RUN/STEP` | how far a step has come, as its body has reported; it goes with its outcome |
| `limit/NAME` | the figures of a limit, as they were declared last |
| `shares/NAME/KEY` | who holds shares of a limit, and when it let the last one begin |
| `waiting/NAME/KEY/PROCESS/PLACE` | that process waits for a share, and since when |
| `run/RUN` | a run: what it is of, when it began and how it ended |
| `arguments/RUN` | what a workflow's run was started with |
| `facts/RUN` | what its code has reported |
| `result/RUN` | what it returned, or the exception it raised |
| `open/SCOPE/RUN` | a run of this cell that is not finished; the row goes when it completes |
| `lease/RUN` | who may write for this run: every commit of the run is conditional on this row's exact bytes |
| `excluded/SCOPE/GENERATION/STEP` | globals that a step's body changes itself, which are therefore no part of its identity |
| `again/SCOPE/GENERATION/STEP` | how often the steps of this name were asked to be executed anew (`--rerun=STEP`) |
| `saved/RUN/PROCESS` | tokens that restoring steps of this run has saved, as far as that process knows |
| `once/RUN/NAME` | something was sent to the run under this name, and is not sent again: a webhook's post |
| `schedule/NAME` | when a workflow is started again and again, and up to when that was done |
| `generation/SCOPE` | how often the cell was asked to start anew (`--rerun`) |

A SCOPE is one durable cell. Every record carries the version of its form; fields may be added, with defaults, and none is
ever renamed or given another meaning.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, get_args
from urllib.parse import quote, unquote

import msgspec

from durable_nb._adoption import Origin
from durable_nb._clock import Instant
from durable_nb._codec import Signer
from durable_nb._preview import NONE, Preview
from durable_nb.errors import CorruptStoreError, StoreError

FORMAT = 1

Sequence = tuple[int, int]
"""The epoch of a run's lease, and a count that rises while it is held."""


class StepKey:
    """Which step of those whose outcomes have keys that begin with `prefix`: `identity` is a digest over kind, name and
    fingerprint, `n` counts equal ones from 0."""  # fmt: skip

    __slots__ = ("identity", "outcome")

    def __init__(self, prefix: str, identity: str, n: int) -> None:
        self.identity = identity
        self.outcome = f"{prefix}{identity}/{n:06}"
        """Key of the row that holds the outcome."""

    @property
    def attempts(self) -> str:
        """Key of the row that holds the failed attempts so far."""
        return f"try{self.outcome[4:]}"


class _Row(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Of which there is one for each step: made, written and read in a third of the time that a dataclass takes."""


class Provenance(_Row, frozen=True):
    """What an identity was made of, so that a change can be explained and an old format recognised."""

    fingerprint_format: int
    components: dict[str, str]
    versions: dict[str, str] = {}
    python: str = ""
    digest: str = ""
    """Of the whole fingerprint."""
    code: str = ""
    """Of a workflow's step: digest of its function's own code, as this Python compiles it."""


class Outcome(_Row, frozen=True):
    """A step that has ended."""

    kind: str
    name: str
    branch: str
    """The task of the run that asked for it; '' is the cell's own code."""
    run_id: str
    form: str
    """Of `value`: `json` or `pickle`; with `blob` set, `value` is empty and the bytes lie in that file."""
    value: bytes
    attempts: int
    started_at: float
    ended_at: float
    provenance: Provenance
    blob: str = ""
    failed: bool = False
    """`value` is the exception that the step raised; workflow runs only, where the code may have caught it."""
    changes: tuple[str, ...] = ()
    """Inputs that the body changed itself, which restoring the step does not."""
    patches: bytes = b""
    """Arguments that the body changed in place, which restoring the step changes again; as `_patches` packs them."""
    patches_blob: str = ""
    """Large ones lie in this file."""
    seen: bytes = b""
    """Files that the body read, encoded; where they have changed, the outcome doesn't count."""
    shown: bytes = b""
    """What the body displayed, encoded; shown again when the step is restored."""
    error: str = ""
    """Failed: `TypeName: message`."""
    sequences: tuple[Sequence, Sequence] = ((0, 0), (0, 0))
    """When the last attempt began and when it ended, beside the run's other events: clocks can be set, this can't."""
    request: int = -1
    """Of a workflow's run: which of its requests this ends. What follows is told of the log's row."""
    asked: tuple[Asked, ...] = ()
    """Requests made since the row before."""
    closed: int = -1
    """Every request of the activations up to this one is on record with this row."""
    at: float = 0.0
    """The run's time, in seconds."""
    again: bool = False
    """The outcome of an equal request of before a resumption."""
    is_attempt: bool = False
    """Failed: the same request, made next by the same task, goes on with this one."""
    preview: Preview = NONE
    """Arguments and result as short texts, without secrets: for people, not for the run."""
    usage: dict[str, dict[str, int]] = {}
    """What models' answers have cost, as `_usage` has it."""
    item: int = -1
    """Of a fan-out: which of its items it was given."""
    format: int = msgspec.field(default_factory=lambda: FORMAT)  # never left out, unlike other defaults

    what: ClassVar[str] = "ended"


class Event(_Row, frozen=True):
    """A row of a run's log that is no step's outcome.

    what      `asked`: requests only; `fired`: a sleep or timer is over; `ended`: a child run's start or end, or an event that
              was sent; `arrived`: an event or a decision came, or the wait for it timed out; `cancel`: the run's cancellation;
              `timeout`: it took too long; `dropped`: a body that was stopped; `moved`: a wait's deadline, by another boot's
              clock; `resumed`: the run goes on before its delivery `cut`; `forked`: another run's log up to here, of which
              what was asked for before `request` counts
    """

    what: str
    request: int = -1
    asked: tuple[Asked, ...] = ()
    closed: int = -1
    at: float = 0.0
    wall_s: float = 0.0
    again: bool = False
    form: str = ""
    value: bytes = b""
    blob: str = ""
    failed: bool = False
    error: str = ""
    timer: Timer | None = None
    cut: int = -1
    ended_by: tuple[int, ...] = ()
    source: str = ""
    """Of what arrived: the row that brought it. None: the wait timed out, or the process's policy has decided."""
    timed_out: bool = False
    format: int = msgspec.field(default_factory=lambda: FORMAT)


@dataclass(frozen=True, slots=True)
class Attempts:
    """A step that has failed so far and is to be tried again."""

    kind: str
    name: str
    run_id: str
    failed: int
    error: str
    """`TypeName: message` of the last one."""
    started_at: float
    """When the first attempt began."""
    since: Instant
    delay_s: float
    """The next attempt is due this long after `since`."""
    begun: bool = False
    """One more attempt has begun, of a step that is tried at most once."""
    branch: str = ""
    sequence: Sequence = (0, 0)
    """When the last attempt began."""
    item: int = -1
    """Of a fan-out: which of its items it is given."""
    arguments: str = ""
    """As a short text, without secrets."""
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Timer:
    """A wait: until `duration_s` after `since`, or until the unix time `until_s`."""

    name: str
    since: Instant
    duration_s: float
    until_s: float | None = None
    branch: str = ""
    sequence: Sequence = (0, 0)
    """When it was first asked for, beside the run's other events."""
    kind: str = "sleep"
    """`sleep`; or what ends it earlier: an `event`, or a `decision`."""
    of: str = ""
    """The event's id, or the question that is to be decided."""
    reads: dict[str, str] = field(default_factory=dict)
    """Of a cell's decision: what the cell read when it was asked for, by component."""
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Arrived:
    """What a wait of a cell has come to."""

    kind: str
    name: str
    form: str
    """Of `value`, as in `Outcome`: an event's data, or [approved, by, comment]; '' of an event that timed out."""
    value: bytes
    blob: str = ""
    source: str = ""
    """The row that brought it."""
    timed_out: bool = False
    at_s: float = 0.0
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Decided:
    """How an approval is decided. Nobody else can."""

    approved: bool
    by: str
    at_s: float
    comment: str = ""
    timed_out: bool = False
    given_up: bool = False
    """Of a workflow's wait, for an event too: its code doesn't wait for it any more."""
    format: int = FORMAT


class Asked(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request that a workflow's code has made."""

    id: int
    """The how manieth of the run, from 0."""
    activation: int
    """Between which deliveries: after this many."""
    kind: str
    name: str
    digest: str
    """Of its arguments."""
    n: int = 0
    """Which among its equals."""
    lane: tuple[int, ...] = ()
    """Where the task that made it stands in the tree of the run's tasks."""
    timer: Timer | None = None
    """Of a wait: when it is over."""
    item: int = -1
    """Of a fan-out: which of its items it is given."""
    value: float | str | bool | None = None
    """Of what is recorded in passing (`now`, `uuid4`, `random`, `patched`): what the code got."""

    @property
    def what(self) -> tuple[str, str, str]:
        return self.kind, self.name, self.digest


@dataclass(frozen=True, slots=True)
class Arguments:
    """(args, kwargs) of a workflow's run, encoded as `form` says."""

    form: str
    value: bytes
    blob: str = ""
    """Large ones lie in this file."""
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Result:
    """What a workflow returned or, failed or cancelled, the exception that whoever awaits the run gets."""

    form: str
    value: bytes
    blob: str = ""
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Reports:
    """What a run's code has reported: by name, how it is encoded, and the bytes."""

    facts: dict[str, tuple[str, bytes]]
    generation: int
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run. `status` is `running` until it ends; whether anybody runs it now is told by its lease's owner."""

    id: str
    kind: str
    name: str
    scope: str
    generation: int
    inputs: str
    """Key of the cell that this run executes; of a workflow's run, the digest of its arguments."""
    started_at: float
    status: str = "running"
    ended_at: float | None = None
    error: str = ""
    rerun: bool = False
    """It began with `--rerun`."""
    rerun_step: str = ""
    """It began with `--rerun=STEP`."""
    labels: tuple[str, ...] = ()
    origin: Origin = field(default_factory=Origin)
    """Of a cell's run: the cell that executed it last."""
    home: str = ""
    """Of a workflow: the module or notebook that defines it, '' where that can't be told. `resume()` resumes its own."""
    parent: str = ""
    """The run that started it."""
    since: Instant | None = None
    """Of a workflow: at this moment the run's time was `since_s`. It stands still while the run has failed, and is below 0
    before the run is to begin."""  # fmt: skip
    since_s: float = 0.0
    ended_by: tuple[int, ...] = ()
    """Failed: the requests whose exceptions ended it."""
    limit: str = ""
    """Of a workflow: it holds a share of that limit while it is executed."""
    limit_key: str = ""
    place: int = 0
    """When it was started, among those that wait for the limit."""
    is_invoked: bool = False
    """It is cancelled with its parent."""
    counts_from_s: float = 0.0
    """Of a workflow: its time-out counts from this time of the run's."""
    rows: int = 0
    """Of a workflow: so many its log had at least when an execution ended. Of fewer, some are lost."""
    progress: str = ""
    renewed_at: float | None = None
    """When it was begun anew last. Events for whoever waits that were sent before that are none of its."""
    format: int = FORMAT


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """The run is to unwind; a second time, to end at once."""

    reason: str
    sent_at: float
    format: int = FORMAT


class Resume(msgspec.Struct, frozen=True, tag="resume"):
    """Nobody executes the run, and whoever asks can't: a process that has its workflow is to resume it."""

    sent_at: float
    format: int = FORMAT


class Restart(msgspec.Struct, frozen=True, tag="restart"):
    """Whoever executes the run is to stop, and to begin it anew."""

    sent_at: float
    format: int = FORMAT


class Notification(msgspec.Struct, frozen=True, tag="event"):
    """An event was sent: to one run, in its inbox, or to all that wait for it or will."""

    event_id: str
    form: str
    """Of `value`, its data; as in `Outcome`."""
    value: bytes
    blob: str
    sent_at: float
    format: int = FORMAT


class Answer(msgspec.Struct, frozen=True, tag="decision"):
    """An approval was decided: its `decided` row tells how."""

    wait: str
    """Which: the rest of that row's key."""
    sent_at: float
    format: int = FORMAT


Message = Cancel | Resume | Restart | Notification | Answer
"""What somebody wants of a run. `_engine/inbox.py` tells who consumes each."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Who may write: process `owner` ('' nobody), for the `epoch`th time that the run changed hands."""

    epoch: int
    owner: str
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Generation:
    """How often a cell was started anew, and the run of it that was begun last."""

    number: int
    last_run: str = ""
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far a step has come, as its body has reported it last."""

    done: float
    total: float | None
    note: str
    form: str
    """Of `state`; '' where there is none."""
    state: bytes
    path: str
    """As views call the step."""
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a limit."""

    concurrency: int | None
    rate: str | None
    declared_at: float
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Shares:
    """Of a limit, for one key."""

    held: tuple[tuple[str, str], ...] = ()
    """By whom: the process, and the run ('' for a step). A dead process's don't count."""
    last: Instant | None = None
    """When the last one began, where there is a rate."""
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Excluded:
    """What is left out of the identity of the steps of this kind and name: sets of components, the newest last."""

    kind: str
    name: str
    left_out: tuple[tuple[str, ...], ...]
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Again:
    """How often the steps of this name were asked to be executed anew: a number that is part of their identity."""

    name: str
    number: int
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Passing:
    """What a cell's code got, and gets again while its attempt is open."""

    kind: str
    """`now`, `uuid4` or `random`."""
    value: float | str | bool
    branch: str = ""
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Saved:
    """What restoring steps of a run has saved, as one process has counted it."""

    usage: dict[str, dict[str, int]]
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Schedule:
    """Starts of a workflow by the clock."""

    name: str
    workflow: str
    cron: str
    tz: str
    form: str
    """Of `value`, its runs' (args, kwargs)."""
    value: bytes
    labels: tuple[str, ...]
    catch_up: str
    """Of due times that passed while nobody fired them: `all`, `last` or `none` are started later."""
    skips: bool = False
    """A due time is dropped while the last run is unfinished."""
    home: str = ""
    """The module or notebook that defines the workflow: it fires the schedule."""
    settled_s: float = 0.0
    """Every due time up to here was fired, or is dropped."""
    last_run: str = ""
    is_paused: bool = False
    format: int = FORMAT


Record = (
    Again
    | Answer
    | Arguments
    | Arrived
    | Attempts
    | Cancel
    | Decided
    | Event
    | Excluded
    | Figures
    | Generation
    | Lease
    | Notification
    | Outcome
    | Passing
    | Reports
    | Checkpoint
    | Result
    | Restart
    | Resume
    | RunRecord
    | Saved
    | Schedule
    | Shares
    | Timer
)
_R = TypeVar("_R", bound=Record)

_encode = msgspec.msgpack.Encoder().encode


class _Formatted(msgspec.Struct):
    """What every record has."""

    format: int = 0


_formats = msgspec.msgpack.Decoder(_Formatted)
_decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {kind: msgspec.msgpack.Decoder(kind) for kind in get_args(Record)}
_messages = msgspec.msgpack.Decoder(Message)


def pack(signer: Signer, key: str, record: Record) -> bytes:
    """The sealed row of a record."""
    return signer.sign(key, _encode(record))


def unpack(signer: Signer, key: str, row: bytes, kind: type[_R]) -> _R:
    """The record in a row; CorruptStoreError or UntrustedStoreError where it isn't one of ours."""
    return _unpacked(signer, key, row, _decoders[kind])  # type: ignore[no-any-return]  # a decoder of that kind


def unpack_message(signer: Signer, key: str, row: bytes) -> Message:
    """The message in a row of an inbox; errors as of `unpack`."""
    return _unpacked(signer, key, row, _messages)  # type: ignore[no-any-return]


def _unpacked(signer: Signer, key: str, row: bytes, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    body = signer.verify(key, row)
    try:
        record = decoder.decode(body)
    except msgspec.MsgspecError as error:
        _check_format(key, body)
        raise CorruptStoreError(f"the record {key!r} can't be read: {error}") from error
    if record.format > FORMAT:
        _check_format(key, body)
    return record


def _check_format(key: str, body: bytes) -> None:
    """StoreError for a record of a later version."""
    with contextlib.suppress(msgspec.MsgspecError):
        form = _formats.decode(body).format
        if form > FORMAT:
            raise StoreError(
                f"the record {key!r} was written by a newer durable_nb (record format {form}, this one reads up to {FORMAT}); "
                "nothing was run or changed. Upgrade with 'pip install -U durable-nb'"
            )


def scope_of(name: str) -> str:
    """A cell's name as one part of a key."""
    return quote(name, safe="", errors="surrogatepass")


def plain(text: str) -> str:
    """Text that can be stored: what is no Unicode text (a lone surrogate, of a file's name for instance) is written out."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def step_prefix(scope: str, generation: int) -> str:
    """Keys of all outcomes of a cell."""
    return f"step/{scope}/{generation:06}/"


def attempts_prefix(scope: str, generation: int) -> str:
    """Keys of all unfinished retries of a cell."""
    return f"try/{scope}/{generation:06}/"


def log_prefixes(scope: str, generation: int) -> tuple[str, str, str]:
    """Keys of a workflow run's log: outcomes of steps, sleeps that began, and the rest. They share one count."""
    return step_prefix(scope, generation), f"timer/{scope}/{generation:06}/", f"log/{scope}/{generation:06}/"


def log_key(scope: str, generation: int, seq: int, row: Outcome | Event) -> str:
    """Key of the SEQth row of a workflow run's log."""
    steps, sleeps, others = log_prefixes(scope, generation)
    prefix = steps if isinstance(row, Outcome) else sleeps if any(one.timer for one in row.asked) else others
    return f"{prefix}{seq:08}"


def arguments_key(run_id: str) -> str:
    """Key of what a run was started with."""
    return f"arguments/{run_id}"


def facts_key(run_id: str) -> str:
    """Key of what a run's code has reported."""
    return f"facts/{run_id}"


def result_key(run_id: str) -> str:
    """Key of what a run came to."""
    return f"result/{run_id}"


def excluded_prefix(scope: str, generation: int) -> str:
    """Keys of what a cell's steps change themselves."""
    return f"excluded/{scope}/{generation:06}/"


def again_prefix(scope: str, generation: int) -> str:
    """Keys of what was asked to be executed anew."""
    return f"again/{scope}/{generation:06}/"


def timer_prefix(run_id: str) -> str:
    """Keys of all timers of a run."""
    return f"timer/{quote(run_id, safe='')}/"


def run_of_timer(key: str) -> str:
    """The run that a timer, or what a wait has come to, belongs to."""
    return unquote(key.split("/", 2)[1])


def wait_of(kind: str, name: str, n: int) -> str:
    """The Nth wait of that kind and name in a cell's run, as keys call it."""
    return f"{kind}/{quote(name, safe='')}/{n:06}"


def wait_of_request(generation: int, request: int) -> str:
    """The same of a workflow's run: the wait that a request of that number is."""
    return f"{generation:06}/{request:08}"


def timer_key(run_id: str, wait: str) -> str:
    """Key of how long that wait of a cell's run is."""
    return f"{timer_prefix(run_id)}{wait}"


def arrived_prefix(run_id: str) -> str:
    """Keys of what the waits of a cell's run have come to."""
    return f"arrived/{quote(run_id, safe='')}/"


def arrived_key(run_id: str, wait: str) -> str:
    """Key of what that wait has come to."""
    return f"{arrived_prefix(run_id)}{wait}"


def decided_prefix(run_id: str) -> str:
    """Keys of the rows that say how the approvals of a run are decided."""
    return f"decided/{quote(run_id, safe='')}/"


def decided_key(run_id: str, wait: str) -> str:
    """Key of the row that says how that approval is decided."""
    return f"{decided_prefix(run_id)}{wait}"


def once_key(run_id: str, name: str) -> str:
    """Key of the row that says that a run was sent something under that name."""
    return f"once/{quote(run_id, safe='')}/{name}"


def event_prefix(event_id: str) -> str:
    """Keys of the events of that id that were sent to no run in particular; of nothing, of all."""
    return f"event/{quote(event_id, safe='')}/" if event_id else "event/"


def value_prefix(run_id: str) -> str:
    """Keys of what a cell's run has recorded in passing."""
    return f"value/{quote(run_id, safe='')}/"


def value_key(run_id: str, kind: str, n: int) -> str:
    """Key of the Nth such value of that kind."""
    return f"{value_prefix(run_id)}{kind}/{n:06}"


def run_key(run_id: str) -> str:
    """Key of a run."""
    return f"run/{run_id}"


def lease_key(run_id: str) -> str:
    """Key of a run's lease."""
    return f"lease/{run_id}"


def inbox_prefix(run_id: str) -> str:
    """Keys of what others want of a run; of nothing, those of all runs."""
    return f"inbox/{quote(run_id, safe='')}/" if run_id else "inbox/"


def inbox_key(run_id: str, seq: int) -> str:
    """Key of the SEQth message."""
    return f"{inbox_prefix(run_id)}{seq:06}"


def seq_of(key: str) -> int:
    """The number of a row of an inbox, or of an event."""
    return int(key.rpartition("/")[2].partition(".")[0])


def run_of_inbox(key: str) -> str:
    """The run that a message is for."""
    return unquote(key.split("/", 2)[1])


def saved_prefix(run_id: str) -> str:
    """Keys of what was saved of a run by restoring; of nothing, of all runs."""
    return f"saved/{quote(run_id, safe='')}/" if run_id else "saved/"


def saved_key(run_id: str, process_id: str) -> str:
    """Key of what a process has saved of a run."""
    return f"{saved_prefix(run_id)}{process_id}"


def run_of_saved(key: str) -> str:
    """The run that was restored from."""
    return unquote(key.split("/", 2)[1])


def schedule_key(name: str) -> str:
    """Key of a schedule; of nothing, their prefix."""
    return f"schedule/{quote(name, safe='')}"


def progress_prefix(run_id: str) -> str:
    """Keys of what bodies of a run have reported of their progress."""
    return f"progress/{quote(run_id, safe='')}/"


def progress_key(run_id: str, step: str) -> str:
    """The same of one step, by its idempotency key."""
    return f"{progress_prefix(run_id)}{step}"


def limit_key(name: str) -> str:
    """Key of a limit's figures."""
    return f"limit/{scope_of(name)}"


def shares_key(name: str, key: str) -> str:
    """Key of a limit's shares."""
    return f"shares/{scope_of(name)}/{scope_of(key)}"


def waiting_prefix(name: str, key: str, process_id: str = "") -> str:
    """Keys of those that wait for a limit: of one process, or of all."""
    return f"waiting/{scope_of(name)}/{scope_of(key)}/{process_id}{'/' * bool(process_id)}"


def waiting_key(name: str, key: str, process_id: str, place: int) -> str:
    """Key of what shows others since when a process waits."""
    return f"{waiting_prefix(name, key, process_id)}{place:020}"


def place_of_waiting(key: str) -> tuple[str, int]:
    """The process that waits, and its place."""
    process_id, place = key.rsplit("/", 2)[1:]
    return process_id, int(place)


def open_prefix(scope: str) -> str:
    """Keys of a cell's unfinished runs."""
    return f"open/{scope}/"


def generation_key(scope: str) -> str:
    """Key of a cell's generation."""
    return f"generation/{scope}"
