"""Processes that tests kill: forked from one that has imported everything already, so that a trial takes milliseconds.

A test asks a `ForkServer` for workers; each does one of the jobs below, and talks with the test over a socket of its own.
Step bodies write down what they do in a file outside the store, the oracle: one O_APPEND write for each line.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import mmap
import multiprocessing
import os
import random
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import diskcache

import durable_nb as durable
from durable_nb._current import engine as current_engine
from durable_nb._disks import FileSystem
from durable_nb._journal import Commit, database
from durable_nb._journal.disk import DiskJournal
from durable_nb._store import Store
from durable_nb.testing import redefine

PATIENCE_S = 30.0
"""After so long a condition that a test waits for counts as never coming."""


def until(condition, what):
    """Wait for a condition; its value, as soon as that is true."""
    give_up = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        if time.monotonic() > give_up:
            raise AssertionError(f"waited {PATIENCE_S:.0f} s in vain: {what}")
        time.sleep(0.001)
    return value


class ForkServer:
    """The process whose children the workers are. With `tmpfs`, it and they see a small file system of their own there."""

    def __init__(self, key_file, *, tmpfs="", kilobytes=0):
        self.key_file = key_file
        ours, theirs = socket.socketpair()
        self._requests = ours
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys, workers; workers.serve(*sys.argv[1:])",
                str(theirs.fileno()),
                str(tmpfs),
                str(kilobytes),
            ],
            cwd=Path(__file__).parent,
            env={**os.environ, "DURABLE_NB_KEY_FILE": str(key_file), "PYTHONHASHSEED": "random"},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        ours.settimeout(PATIENCE_S)
        self.trouble = self._hear()["trouble"]
        """Why there is no file system of their own; '' where all is well."""

    def start(self, job, /, **args):
        """A worker that does the job called `job`."""
        ours, theirs = socket.socketpair()
        socket.send_fds(self._requests, [json.dumps({"job": job, "args": args}).encode()], [theirs.fileno()])
        theirs.close()
        return Worker(self, self._hear()["pid"], ours)

    def do(self, job, /, **args):
        """What a worker returns that does one job."""
        with self.start(job, **args) as worker:
            return worker.result()

    def exit_code(self, pid):
        """None while it runs; minus the signal where one ended it."""
        self._requests.sendall(json.dumps({"wait": pid}).encode())
        return self._hear()["exit_code"]

    def close(self):
        self._requests.close()
        self._process.wait(PATIENCE_S)

    def _hear(self):
        text = b""
        while not text.endswith(b"\n"):
            part = self._requests.recv(1 << 16)
            if not part:
                raise AssertionError("the fork server is gone")
            text += part
        return json.loads(text)


class Worker:
    """A process that does one job. Left as a context manager it is killed, if it still lives."""

    def __init__(self, server, pid, channel):
        self._server, self.pid, self._channel = server, pid, channel
        channel.settimeout(PATIENCE_S)
        self._lines = channel.makefile("rb")
        self._exit_code = None

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.kill()
        self._lines.close()
        self._channel.close()

    def hear(self):
        """What the worker says next: {"said": ...}, {"result": ...} or {"error": name, "text": ..., "durable": bool}."""
        line = self._lines.readline()
        assert line, f"worker {self.pid} said nothing more; exit code {self.exit_code()}"
        return json.loads(line)

    def said(self):
        """What the worker says next with `Channel.say`."""
        heard = self.hear()
        assert "said" in heard, heard
        return heard["said"]

    def result(self, seconds=PATIENCE_S):
        """What the job returns."""
        self._channel.settimeout(seconds)
        heard = self.hear()
        assert "result" in heard, heard
        return heard["result"]

    def tell(self, value):
        self._channel.sendall(json.dumps(value).encode() + b"\n")

    def exit_code(self):
        if self._exit_code is None:
            self._exit_code = self._server.exit_code(self.pid)
        return self._exit_code

    def signal(self, number):
        if self.exit_code() is None:
            os.kill(self.pid, number)

    def kill(self):
        """SIGKILL; True where that is what ended it."""
        self.signal(signal.SIGKILL)
        until(lambda: self.exit_code() is not None, "the end of a killed process")
        return self.exit_code() == -signal.SIGKILL

    def stop(self):
        """SIGSTOP; it has stopped when this returns."""
        self.signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self.pid}/stat")
        if stat.exists():
            until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "a process to stop")


# -- in the server and its children ------------------------------------------------------------------------------------


def serve(descriptor, tmpfs, kilobytes):
    requests = socket.socket(fileno=int(descriptor))
    trouble = _mount_own(tmpfs, int(kilobytes)) if tmpfs else ""
    import durable_nb._engine.workflows  # noqa: F401  all of it, before the first fork

    children = set()
    _send(requests, {"trouble": trouble})
    while True:
        text, descriptors, _, _ = socket.recv_fds(requests, 1 << 16, 1)
        if not text:
            break
        asked = json.loads(text)
        if "wait" in asked:
            pid, status = os.waitpid(asked["wait"], os.WNOHANG)
            children.discard(pid)
            _send(requests, {"exit_code": os.waitstatus_to_exitcode(status) if pid else None})
            continue
        pid = os.fork()
        if not pid:
            requests.close()
            os.set_inheritable(descriptors[0], False)
            _work(Channel(socket.socket(fileno=descriptors[0])), asked["job"], asked["args"])
        os.close(descriptors[0])
        children.add(pid)
        _send(requests, {"pid": pid})
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _send(to, value):
    to.sendall(json.dumps(value).encode() + b"\n")


class Channel:
    """The worker's end of its talk with the test."""

    def __init__(self, end):
        self._end, self._lines = end, end.makefile("rb")

    def say(self, value):
        _send(self._end, {"said": value})

    def send(self, message):
        _send(self._end, message)

    def wait(self):
        return json.loads(self._lines.readline())

    async def hear(self):
        return json.loads(await asyncio.to_thread(self._lines.readline))


def _work(channel, job, args):
    code = 1
    try:
        warnings.simplefilter("ignore")  # notices of retries and the like
        if args.pop("without_wal", False):
            database.file_system_of = lambda _: FileSystem("")
        channel.send(_outcome(globals()[job](channel, **args)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # as a process ends that has no tests and no fork server in it


def _outcome(job):
    """A coroutine's result or error as a message."""
    try:
        return {"result": asyncio.run(job)}
    except BaseException as error:
        return _error(error)


def _error(error):
    about = {"error": type(error).__name__, "text": str(error), "durable": isinstance(error, durable.DurableError)}
    return about | {"trace": "".join(traceback.format_exception(error))}


def _mount_own(path, kilobytes):
    """A tmpfs at `path` that this process and its children see, and nobody else; why not, where that can't be."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    new_mounts, new_user = 0x00020000, 0x10000000
    unshared = getattr(libc, "unshare", None)
    if unshared is None or unshared(new_mounts if user == 0 else new_mounts | new_user):
        return f"no mount namespace of its own ({errno.errorcode.get(ctypes.get_errno(), 'no unshare')})"
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    recursive_private = 0x4000 | 0x40000
    if libc.mount(b"none", b"/", None, recursive_private, None):
        return f"no private mounts ({errno.errorcode[ctypes.get_errno()]})"
    if libc.mount(b"tmpfs", path.encode(), b"tmpfs", 0, f"size={kilobytes}k".encode()):
        return f"no tmpfs ({errno.errorcode[ctypes.get_errno()]})"
    return ""


def _remount(path, *, read_only):
    libc = ctypes.CDLL(None, use_errno=True)
    remount = 0x20
    if libc.mount(b"none", path.encode(), None, remount | read_only, None):
        raise OSError(ctypes.get_errno(), "remount")


# -- the oracle ---------------------------------------------------------------------------------------------------------

_oracle = _oracle_path = None


def note(what, name, value=""):
    """One line of the oracle: who, what (begin, end, ack ...), of which step, its value."""
    if _oracle is not None:
        os.write(_oracle, f"{os.getpid()}\t{what}\t{name}\t{value}\n".encode())


def _open_oracle(path):
    global _oracle, _oracle_path
    _oracle_path = Path(path)
    _oracle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def read_oracle(path):
    """[(pid, what, name, value)] in the order in which they were written."""
    text = path.read_text() if path.exists() else ""
    return [(int(pid), *rest) for pid, *rest in (line.split("\t") for line in text.splitlines())]


# -- workflows ----------------------------------------------------------------------------------------------------------


async def quick(name):
    """Its value is another one each time, so that a second execution can't be taken for a recorded one."""
    note("begin", name)
    await asyncio.sleep(0.001)
    value = secrets.token_hex(8)
    note("end", name, value)
    return value


def in_thread(name):
    note("begin", name)
    time.sleep(0.001)
    value = secrets.token_hex(8)
    note("end", name, value)
    return value


def large(name):
    note("begin", name)
    value = secrets.token_hex(8)
    note("end", name, value)
    return value + "x" * (1 << 20)


async def flaky(name, oracle):
    note("begin", name)
    if sum(line[1:3] == ("fail", name) for line in read_oracle(Path(oracle))) < 2:
        note("fail", name)
        raise OSError("try again")
    value = secrets.token_hex(8)
    note("end", name, value)
    return value


@durable.workflow
async def journey(oracle):
    """A sequence, a gather with a retry in it, short sleeps, threads, and a value that has a file of its own."""
    values = {}

    async def go(name, fn, *more):
        value = await durable.run(name, fn, name, *more)
        values[name] = value[:16]
        note("ack", name, value[:16])

    async def branch(n):
        await go(f"left-{n}", quick)
        await durable.sleep(f"nap-{n}", 0.002 * n)
        await go(f"right-{n}", in_thread if n % 2 else quick)

    await go("first", quick)
    await go("second", in_thread)
    await asyncio.gather(*(branch(n) for n in range(3)), go("flaky", durable.step(flaky, retries=2, backoff=0.003), oracle))
    await durable.sleep("rest", 0.005)
    await go("large", large)
    for n in range(3):
        await go(f"last-{n}", quick)
    return values


@durable.workflow
async def twice(n):
    values = []
    for name in ("one", "two"):
        values.append(await durable.run(name, quick, f"{n}-{name}"))
        note("ack", f"{n}-{name}", values[-1])
    return values


async def held(name, gate):
    """Ends when the file `gate` is there."""
    note("begin", name)
    while not os.path.exists(gate):  # noqa: ASYNC110, ASYNC240, PTH110  another process opens it
        await asyncio.sleep(0.002)
    note("end", name)
    return secrets.token_hex(8)


def held_in_thread(name, gate):
    note("begin", name)
    while not Path(gate).exists():
        time.sleep(0.002)
    note("end", name)
    return secrets.token_hex(8)


@durable.workflow
async def gated(first_gate, last_gate, thread):
    values = {}
    try:
        for name, fn in (
            ("before", quick),
            ("held", functools.partial(held_in_thread if thread else held, gate=first_gate)),
            ("after", quick),
            ("end", functools.partial(held, gate=last_gate)),
        ):
            values[name] = await durable.run(name, fn, name)
            note("ack", name, values[name])
    except asyncio.CancelledError:
        note("cancelled", "code")
        raise
    return values


def offspring(kind):
    """Start a child that outlives this process; its pid."""
    if kind == "fork":
        pid = os.fork()
        if not pid:
            while True:
                signal.pause()
    elif kind == "popen":
        pid = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid
    else:
        process = multiprocessing.get_context(kind).Process(target=time.sleep, args=(1000,))
        process.start()
        pid = process.pid
    note("child", kind, pid)
    return pid


@durable.workflow
async def parent(kind, gate):
    pid = await durable.run("offspring", offspring, kind)
    note("ack", "offspring", pid)
    await durable.run("held", held, "held", gate)
    return pid


@durable.workflow
async def careful(gate):
    """Its step is tried at most once."""
    value = await durable.run("held", durable.step(held, at_most_once=True), "held", gate)
    note("ack", "held", value)
    return value


def plain_value(n):
    note("begin", f"plain-{n}")
    return {"n": n, "text": f"value {n} " * 20}


def plain_large(n):
    note("begin", f"large-{n}")
    return f"large {n} " * 150_000


@durable.workflow
async def predictable(count):
    """Steps whose values are the same whenever they are made."""
    values = [await durable.run(f"plain-{n}", plain_value, n) for n in range(count)]
    values.append(digest_of(await durable.run("large", plain_large, 1)))
    return values


PREDICTED = 6


def digest_of(text):
    return hashlib.sha256(text.encode()).hexdigest()


def predicted():
    return [*({"n": n, "text": f"value {n} " * 20} for n in range(PREDICTED)), digest_of("large 1 " * 150_000)]


def sized(name, size):
    note("begin", name)
    value = secrets.token_hex(8)
    note("end", name, value)
    return value + "y" * size


@durable.workflow
async def growing(steps, size, filler, leave):
    """After the second step the disk is filled but for `leave` bytes, once."""
    values = {}
    for n in range(steps):
        value = await durable.run(f"grow-{n}", sized, f"grow-{n}", size)
        values[f"grow-{n}"] = value[:16]
        note("ack", f"grow-{n}", value[:16])
        if n == 1 and not any(line[1] == "filled" for line in read_oracle(_oracle_path)):
            note("filled", "disk")
            _fill(filler, leave)
    return values


def _fill(path, leave):
    with open(path, "ab") as file:  # noqa: PTH123
        for size in (1 << 16, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    os.write(file.fileno(), bytes(size))
    os.truncate(path, max(Path(path).stat().st_size - leave, 0))


# -- jobs ---------------------------------------------------------------------------------------------------------------


async def travel(channel, store, oracle, run_id, how):
    """Bring the run `run_id` of `journey` to its end, found in one of the ways in which users find it."""
    _open_oracle(oracle)
    durable.open(store)
    run = None
    if how == "resume":
        with contextlib.suppress(durable.RunNotFoundError):
            run = durable.get_run(run_id).resume()
    elif how == "all":
        run = next((found for found in durable.resume() if found.id == run_id), None)
    elif how == "await":
        with contextlib.suppress(durable.RunNotFoundError):
            run = durable.get_run(run_id)
    run = run or journey.start(oracle, id=run_id)
    values = await run
    note("done", run_id, json.dumps(values))
    return values


async def start_together(channel, store, oracle, meeting, me, count):
    """Start `count` runs, each in the same instant as another process does."""
    _open_oracle(oracle)
    durable.open(store)
    with open(meeting, "r+b") as file:  # noqa: ASYNC230, PTH123
        arrivals = mmap.mmap(file.fileno(), 2 * 4096)
    waiting = []
    for n in range(1, count + 1):
        arrivals[me * 4096] = n
        while arrivals[(1 - me) * 4096] < n:
            os.sched_yield()
        waiting.append(asyncio.ensure_future(_awaited(twice.start(n, id=f"run-{n}"))))
        await asyncio.sleep(0)
    return await asyncio.gather(*waiting)


async def _awaited(run):
    return await run


async def keep(channel, store, oracle, run_id, gates, thread):
    """Own a run of `gated` until it ends or is lost."""
    _open_oracle(oracle)
    durable.open(store)
    run = gated.start(*gates, thread, id=run_id)
    try:
        return {"value": await run}
    except durable.LeaseLost:
        return {"lost": True}
    except durable.RunCancelled as cancelled:
        return {"cancelled": str(cancelled)}


async def attach(channel, store, oracle, run_id, gates, thread):
    """Wait for a run that another process executes; take it over when told to."""
    _open_oracle(oracle)
    durable.open(store)
    run = gated.start(*gates, thread, id=run_id)
    task = asyncio.ensure_future(_awaited(run))
    await asyncio.wait({task}, timeout=0.5)  # several looks at the journal
    run.resume()  # owned: nothing happens
    await asyncio.wait({task}, timeout=0.1)
    channel.say({"done": task.done(), "status": run.status})
    match await channel.hear():
        case "take over":
            durable.get_run(run_id).resume(take_over=True)
        case "cancel":
            durable.get_run(run_id).cancel("sold out")
    try:
        return await task
    except durable.RunCancelled as cancelled:
        return {"cancelled": str(cancelled)}


@durable.workflow
async def controlled(gate, fails):
    """Three steps, of which one waits for the file `gate`; fails behind them where the file `fails` isn't there."""
    one = await durable.run("one", quick, "one")
    await durable.run("held", held, "held", gate)
    two = await durable.run("two", quick, "two")
    if fails:
        await durable.run("needs", needs, fails)
    return {"one": one, "two": two}


def needs(file):
    if not Path(file).exists():
        raise ValueError("not yet")


async def own(channel, store, oracle, gate, busy_until="", fails=""):
    """Own a run of `controlled`; in code that blocks the loop until the file `busy_until` is there."""
    _open_oracle(oracle)
    durable.open(store)
    run = controlled.start(gate, fails, id="r", labels=["mine"])
    while "held" not in [name for _, what, name, _ in read_oracle(Path(oracle)) if what == "begin"]:  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    channel.say("owns it")
    while busy_until and not os.path.exists(busy_until):  # noqa: ASYNC240, PTH110
        time.sleep(0.005)  # noqa: ASYNC251  the loop is to be blocked
    ended = await _ended(run)
    if fails:
        channel.say(ended)
        await channel.hear()
    return ended


async def act(channel, store, oracle, what, lacks_workflow=False):
    """Do something about the run that another process may execute; then wait for what comes of it."""
    _open_oracle(oracle)
    durable.open(store)
    if lacks_workflow:
        redefine("controlled")
    run, began = durable.get_run("r"), time.monotonic()
    try:
        other = {
            "cancel": run.cancel,
            "cancel all": lambda: durable.cancel(label="mine"),
            "resume": run.resume,
            "take over": lambda: run.resume(take_over=True),
            "restart": run.restart,
            "fork": lambda: run.fork(at="one"),
            "fork late": lambda: run.fork(at="two"),
            "delete": run.delete,
        }[what]()
    except durable.DurableError as refused:
        return {"refused": str(refused)}
    took = time.monotonic() - began
    run = other if isinstance(other, durable.Run) else run
    channel.say({"took": took, "status": run.status, "says": repr(run)})
    await channel.hear()
    if lacks_workflow:
        while run.status not in ("completed", "failed"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return await _ended(run)


async def execute_version(channel, store, oracle, gate, version):
    """Bring a run to its end whose code is what it was first, or has been edited since."""
    _open_oracle(oracle)

    async def edited(name):
        note("begin", name)
        return "of the edited body"

    @durable.workflow(name="versions")
    async def versions():
        values = {}
        if version == "inserted" or (version == "patched" and durable.patched("a step before")):
            values["inserted"] = await durable.run("inserted", quick, "inserted")
        values["one"] = await durable.run("one", edited if version == "body" else quick, "one")
        await durable.run("held", held, "held", gate)
        values["two"] = await durable.run("two", quick, "two")
        if version == "appended":
            values["appended"] = await durable.run("appended", quick, "appended")
        return values

    durable.open(store)
    run = versions.start(id="r")
    return await (run.resume() if run.status == "failed" else run)


async def _ended(run):
    try:
        return {"value": await run}
    except (durable.RunCancelled, durable.LeaseLost, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


async def rear(channel, store, oracle, kind, gate):
    _open_oracle(oracle)
    durable.open(store)
    return await parent.start(kind, gate, id="parent")


async def dare(channel, store, oracle, gate, resume):
    _open_oracle(oracle)
    durable.open(store)
    return await (durable.get_run("careful").resume() if resume else careful.start(gate, id="careful"))


async def predict(channel, store, oracle="", run_id="run"):
    if oracle:
        _open_oracle(oracle)
    durable.open(store)
    return await predictable.start(PREDICTED, id=run_id)


@durable.workflow
async def each_second():
    await durable.run("one", quick, "one")


async def fire(channel, store, oracle):
    """Fire a schedule until killed."""
    _open_oracle(oracle)
    durable.open(store)
    durable.schedule("each second", each_second, cron="* * * * * *", tz="UTC")
    await asyncio.Event().wait()


async def all_runs(channel, store):
    durable.open(store)
    return [run.id for run in durable.runs(limit=10_000)]


async def look(channel, store, run_id="run"):
    """Everything that the public face tells of a run, and its result."""
    durable.open(store)
    durable.runs()
    run = durable.get_run(run_id)
    steps = [(step.name, step.status) for step in run.steps]
    return {"status": run.status, "steps": steps, "values": await run}


async def damage(channel, store, scratch, trials):
    """Open copies of a store in which one thing is broken: [(trial, outcome)], each in a process of its own.

    A trial is {"file": path in the store, "bit": n}, {"file": ..., "cut": bytes}, or {"file": ..., "gone": True}.
    """
    outcomes = []
    for n, trial in enumerate(trials):
        copy = Path(scratch) / str(n)
        shutil.copytree(store, copy)
        path = copy / trial["file"] if not trial["file"].startswith("/") else Path(trial["file"])
        sound = path.read_bytes()
        path.chmod(0o600)
        if "bit" in trial:
            broken = bytearray(sound)
            broken[trial["bit"] // 8] ^= 1 << trial["bit"] % 8
            path.write_bytes(broken)
        elif "cut" in trial:
            os.truncate(path, trial["cut"])
        else:
            path.unlink()
        try:
            outcomes.append((trial, _apart(copy)))
        finally:
            path.write_bytes(sound)
            shutil.rmtree(copy)
    return outcomes


async def damage_entry(channel, folder, seed, trials):
    """Restore a durable cell from an entry in which one bit is flipped, in a real IPython: what came of each trial."""
    return await asyncio.to_thread(_damage_entry, Path(folder), random.Random(seed), trials)


def _damage_entry(folder, chance, trials):
    from IPython.core.interactiveshell import InteractiveShell

    os.chdir(folder)
    os.environ["IPYTHONDIR"] = str(folder / "ipython")
    shell = InteractiveShell.instance()
    shell.run_cell("%load_ext durable_nb").raise_error()
    cell = f"%%durable damaged --quiet\nwith open({str(folder / 'ran')!r}, 'a') as file: file.write('x')\nx = list(range(1000))"
    outcomes = []
    for _ in range(trials):
        shell.user_ns["x"] = None
        result = shell.run_cell(cell)
        error = result.error_in_exec or result.error_before_exec
        right = shell.user_ns["x"] == list(range(1000))
        outcomes.append({"error": None if error is None else repr(error), "right": right})
        (entry,) = (folder / ".durable_nb" / "cells").rglob("*.cell")
        broken = bytearray(entry.read_bytes())
        bit = chance.randrange(len(broken) * 8)
        broken[bit // 8] ^= 1 << bit % 8
        entry.chmod(0o600)
        entry.write_bytes(broken)
    return [outcomes, len((folder / "ran").read_text())]


def _apart(store):
    """What a process of its own finds in `store`: "right", or {"error": ...}; a process that died is {"died": code}."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reading)
            asyncio.events._set_running_loop(None)
            heard = _outcome(_look_and_predict(str(store)))
            if heard.get("result") == predicted():
                heard = "right"
            elif "result" in heard:
                heard = {"wrong": str(heard)[:2000]}
            with os.fdopen(writing, "w") as file:
                json.dump(heard, file)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(text) if text else {"died": os.waitstatus_to_exitcode(status)}


async def _look_and_predict(store):
    async with asyncio.timeout(20):
        durable.open(store)
        with contextlib.suppress(durable.StoreError, durable.RunNotFoundError):
            durable.runs()
            [step.name for step in durable.get_run("run").steps]
        return await predictable.start(PREDICTED, id="run")


async def grow(channel, store, oracle, how, **arguments):
    """Run `growing`, or go on with it; after an error say how things stand, and go on when the test says so."""
    _open_oracle(oracle)
    durable.open(store)
    run = growing.start(**arguments, id="run") if how == "start" else durable.get_run("run").resume()
    try:
        return await run
    except durable.StoreError as error:
        found = durable.get_run("run")
        steps = [[step.name, step.status] for step in found.steps]
        channel.say(_error(error) | {"status": found.status, "steps": steps})
    await channel.hear()
    return await durable.get_run("run").resume()


async def delete(channel, path):
    Path(path).unlink()  # noqa: ASYNC240


async def open_together(channel, folder, meeting, me, others, times):
    """Open new stores, each in the same instant as other processes do; what went wrong."""
    with open(meeting, "r+b") as file:  # noqa: ASYNC230, PTH123
        arrivals = mmap.mmap(file.fileno(), 0)
    trouble = []
    for n in range(1, times + 1):
        arrivals[me * 4096] = n
        while any(arrivals[other * 4096] < n for other in range(others)):
            os.sched_yield()
        try:
            durable.open(f"{folder}/{n}")
            await twice.start(me, id=f"run-{me}")
        except Exception as error:
            trouble.append(repr(error))
    return trouble


async def look_slowly(channel, store, oracle, run_id):
    """Wait for a run, and be slow in the middle of a look at it: the test says when to go on."""
    _open_oracle(oracle)
    durable.open(store)
    journal = current_engine().engine.store.journal
    get, looks = journal.get, []

    def slowly(key):
        if key.startswith("lease/") and not looks:
            looks.append(key)
            channel.say("between the rows of run and lease")
            channel.wait()
        return get(key)

    journal.get = slowly
    return await durable.Run(run_id)


def forking(how):
    pid = os.fork()
    if not pid:
        signal.alarm(10)  # where it goes on, not for long
        if how == "raise":
            raise ValueError("the child's")
        if how == "exit":
            sys.exit(3)
        return "the child's"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


async def forking_on_the_loop(how):
    await asyncio.sleep(0)
    return forking(how)


@durable.workflow
async def forks(how, where):
    if where == "loop":
        return await durable.run("forks", forking_on_the_loop, how)
    return await durable.run("forks", durable.step(forking, thread=where == "thread"), how)


async def fork_in_a_step(channel, store, how, where):
    durable.open(store)
    return [await forks.start(how, where, id="run"), [step.name for step in durable.get_run("run").steps]]


async def use_in_a_child(channel, store):
    """Start a run in a process that was forked from one with an open store: its exit code."""
    durable.open(store)
    await twice.start(1, id="parents")
    pid = os.fork()
    if not pid:
        signal.alarm(2)
        asyncio.events._set_running_loop(None)
        heard = _outcome(_awaited_start(2, "childs"))
        os._exit(0 if heard.get("durable") or "result" in heard else 3)
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    return os.waitstatus_to_exitcode(status)


async def _awaited_start(n, run_id):
    return await twice.start(n, id=run_id)


async def remount(channel, path, read_only):
    _remount(path, read_only=read_only)


async def meddle(channel, journal):
    """Open the journal as a cache that forgets, again and again, until told to stop."""
    stop = asyncio.ensure_future(channel.hear())
    times = 0
    while not stop.done():
        forgetful = {"eviction_policy": "least-recently-used", "cull_limit": 10, "size_limit": 1000, "statistics": 1}
        # diskcache itself gives up at once when it finds the schema locked: then it didn't get in this time.
        with contextlib.suppress(sqlite3.OperationalError), diskcache.Cache(journal, **forgetful):
            times += 1
            if times == 1:
                channel.say("meddling")
        await asyncio.sleep(0.02)
    return times


# -- the journal by itself ------------------------------------------------------------------------------------------------


def _journal(store):
    return DiskJournal(Path(store) / "journal", Path(store) / "values")


async def open_write_close(channel, store, meeting, me, others, times):
    """Open a journal, commit, checkpoint and close it, each in the same moment as other processes do; what was wrong then."""
    together = _Together(meeting, me, others)
    trouble = []
    for n in range(times):
        together.wait()
        journal = _journal(store)
        journal.apply([Commit(inserts=((f"{me}/{n:06}", bytes(n % 5 * 3000)),), deletes=(f"{me}/{n - 20:06}",))])
        if n % 3 != 2:
            with journal._database.writing() as sql:
                sql.execute(f"PRAGMA wal_checkpoint({('PASSIVE', 'TRUNCATE')[n % 2]})").fetchone()
        if n % 4 == 3:
            together.wait()  # all close at once
        journal.close()
        together.wait()
        if me == n % others:
            journal = _journal(store)
            trouble += [f"{n}: {problem}" for problem in journal.problems()]
            kept = {key for key, _ in journal.sizes()}
            trouble += [f"{n}: {other} lost its row" for other in range(others) if f"{other}/{n:06}" not in kept]
            journal.close()
    return trouble


async def make_store(channel, store, dies_at=0):
    """Make or open a store, and be killed at that of the instants at which something changes on the disk; its id otherwise."""
    instants = 0

    def instant(event, _):
        nonlocal instants
        if event in {"open", "os.mkdir", "os.chmod", "os.link", "os.rename", "os.remove", "sqlite3.connect", "sql"}:
            instants += 1
            if instants == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    class Connection(sqlite3.Connection):
        def execute(self, *args):
            instant("sql", ())
            return super().execute(*args)

    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **options: connect(*args, **options, factory=Connection)
    sys.addaudithook(instant)
    opened = Store(store)
    told = {"id": opened.id, "instants": instants}
    opened.close()
    return told


async def hold_the_turn(channel, store, during):
    """Have the journal for oneself, until told to let go."""
    journal = _journal(store)
    with journal._database.writing() as sql:
        if during == "write":
            sql.execute("PRAGMA cache_size = 1")  # so that unfinished pages reach the disk
            sql.execute("BEGIN IMMEDIATE")
            for n in range(50):
                sql.execute("INSERT INTO Cache(key, raw, value, mode) VALUES (?, 1, ?, 1)", (f"half/{n}", bytes(3000)))
        elif during == "checkpoint":
            sql.execute("PRAGMA wal_checkpoint(FULL)").fetchone()
        channel.say("holding")
        channel.wait()


async def commit(channel, store, key, patience_s=60):
    database.PATIENCE_S = patience_s
    journal = _journal(store)
    try:
        return [verdict.value for verdict in journal.apply([Commit(inserts=((key, b"v"),))])]
    finally:
        journal.close()


async def commit_flat_out(channel, store, meeting, me, others, times, rows):
    """As many commits as there can be; the rowid of each one's last row, and how long it took."""
    journal = _journal(store)
    _Together(meeting, me, others).wait()
    took = []
    for n in range(times):
        began = time.monotonic()
        journal.apply([Commit(inserts=((f"{me}/{n:06}/{row}", b"v" * 200),)) for row in range(rows)])
        took.append(time.monotonic() - began)
    with journal._database.reading() as sql:
        mine = sql.execute(
            "SELECT max(rowid) FROM Cache WHERE key LIKE ? GROUP BY substr(key, 1, 8) ORDER BY 1", (f"{me}/%",)
        ).fetchall()
    journal.close()
    return {"rowids": [rowid for (rowid,) in mine], "took": took}


class _Together:
    """Where processes wait until all have come, as often as they like."""

    def __init__(self, meeting, me, others):
        with open(meeting, "r+b") as file:  # noqa: PTH123
            self._arrivals = mmap.mmap(file.fileno(), 0)
        self._me, self._others, self._n = me, others, 0

    def wait(self):
        self._n += 1
        self._arrivals[8 * self._me : 8 * self._me + 8] = self._n.to_bytes(8, "little")
        while any(
            int.from_bytes(self._arrivals[8 * other : 8 * other + 8], "little") < self._n for other in range(self._others)
        ):
            os.sched_yield()


async def many_journeys(channel, store, oracle, names):
    _open_oracle(oracle)
    durable.open(store)
    channel.say("open")
    await channel.hear()
    return await asyncio.gather(*(_awaited(twice.start(name, id=name)) for name in names))


async def wander(name):
    """Takes another while each time."""
    note("begin", name)
    await asyncio.sleep(random.SystemRandom().random() * 0.02)
    value = secrets.token_hex(8)
    note("end", name, value)
    return value


def wander_in_thread(name):
    note("begin", name)
    time.sleep(random.SystemRandom().random() * 0.02)
    value = secrets.token_hex(8)
    note("end", name, value)
    return value


@durable.workflow
async def kid(how, n):
    """What `one` in `parallel` does, as a run of its own."""
    name = f"{how}-{n}"
    value = await durable.run(name, wander, name)
    note("ack", name, value)
    await durable.sleep("nap", 0.005 * (n % 3))
    return await durable.run(f"{name}-after", wander_in_thread, f"{name}-after"), value


@durable.workflow
async def parallel(how, count):
    """Steps that end in any order; each value with its step's name, and the order in which the code saw them."""
    seen = []

    async def one(n):
        name = f"{how}-{n}"
        value = await durable.run(name, wander_in_thread if n % 3 == 0 else wander, name)
        seen.append(name)
        note("ack", name, value)
        return await durable.run(f"{name}-after", wander, f"{name}-after"), value

    if how == "family":
        found = await asyncio.gather(*(durable.invoke("kid", kid, how, n) for n in range(count)))
        seen = [f"{how}-{n}" for n in range(count)]
    elif how == "gather":
        found = await asyncio.gather(*map(one, range(count)))
    else:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(n)) for n in range(count)]
        found = [task.result() for task in tasks]
    values = {f"{how}-{n}": value for n, (_, value) in enumerate(found)}
    values |= {f"{how}-{n}-after": value for n, (value, _) in enumerate(found)}
    return values, seen, await durable.run("last", lambda: list(seen))


# -- what a run can do ---------------------------------------------------------------------------------------------------


@durable.workflow
async def shop(week_s):
    """The order flow, with a shorter week."""
    payment = await durable.run("charge", effect, "charge")
    order = await durable.run("order", effect, "order")
    await durable.run("receipt", effect, "receipt")
    await durable.sleep("a week", week_s)
    return payment, order, await durable.run("review", effect, "review")


def effect(name):
    note("begin", name, durable.idempotency_key())
    return name


@durable.workflow
async def leaf(gate):
    await durable.run("paid", effect, "paid")
    durable.report(stage="paid", pid=os.getpid())
    try:
        return await durable.run("held", held, gate, gate)
    finally:
        await durable.run("tidy", effect, "tidy")


@durable.workflow
async def family(gate):
    first = await durable.run("first", effect, "first")
    return first, await durable.invoke("child", leaf, gate)


@durable.workflow
async def later(gate):
    note("begin", "later")
    return await durable.run("late", effect, "late")


def tell_of_failure(run, error):
    note("told", run.id, type(error).__name__)
    while not Path(told_gate[0]).exists():
        time.sleep(0.002)


told_gate = [""]


@durable.workflow(on_failure=tell_of_failure)
async def failing(gate):
    told_gate[0] = gate
    await durable.run("broken", durable.step(break_down, retries=0))


def break_down():
    note("begin", "broken")
    raise ConnectionError("down")


@durable.workflow(timeout=1.5)
async def slow(gate):
    try:
        await durable.sleep("long", 60)
    finally:
        await durable.run("tidy", effect, "tidy")


async def live(channel, store, oracle, workflow, argument, run_id="42", more=(), **options):
    """Start that run, or attach to it, and bring it to its end; what it comes to."""
    _open_oracle(oracle)
    durable.open(store)
    run = globals()[workflow].start(argument, *more, id=run_id, **options)
    try:
        return {"value": await run, "steps": [step.path for step in run.steps]}
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error), "status": run.status}


async def regard(channel, store, run_id="42"):
    """How a run stands, as a process sees it that doesn't execute it."""
    durable.open(store)
    try:
        run = durable.get_run(run_id)
    except durable.RunNotFoundError:
        return {"status": "", "facts": {}, "steps": []}
    return {"status": run.status, "facts": run.facts, "steps": [(step.path, step.status) for step in run.steps]}


async def call_off(channel, store, run_id="42"):
    durable.open(store)
    durable.get_run(run_id).cancel("enough")


# -- limits -------------------------------------------------------------------------------------------------------------


@durable.workflow(limit=durable.limit("one at a time", concurrency=1))
async def alone(name, gate):
    note("run begins", name)
    await durable.run("held", held, name, gate)
    note("run ends", name)
    return name


async def limited_run(channel, store, oracle, name, gate, resume="", take_over=False):
    """Start a run under a limit of one, or go on with another process's, and wait for its end."""
    _open_oracle(oracle)
    durable.open(store)
    run = durable.get_run(resume).resume(take_over=take_over) if resume else alone.start(name, gate, id=name)
    channel.say(run.status)
    return await run


@durable.workflow
async def limited_map(oracle, count):
    limit = durable.limit("three at a time", concurrency=3)
    return await durable.map("m", durable.step(quick, retries=0), [f"{os.getpid()}-{n}" for n in range(count)], limit=limit)


async def limited_steps(channel, store, oracle, count):
    _open_oracle(oracle)
    durable.open(store)
    channel.say("open")
    await channel.hear()
    return len(await limited_map.start(oracle, count, id=f"{os.getpid()}"))


@durable.workflow
async def paced(count):
    step = durable.step(quick, limit=durable.limit("paced", rate="10/s"))
    return await asyncio.gather(*(durable.run("s", step, f"{n}") for n in range(count)))


async def paced_steps(channel, store, oracle, count):
    _open_oracle(oracle)
    durable.open(store)
    channel.say("open")
    await channel.hear()
    return len(await paced.start(count))
