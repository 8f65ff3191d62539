"""The one thread that writes: commits that wait at the same time share one transaction and one fsync.

User code lives on the kernel's loop and is interrupted at any instant; a transaction must not be. So the loop only hands
commits over, and hears when they are durable.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from durable_nb._journal import Commit, Journal, Verdict
from durable_nb.errors import StoreError

GROUP_LIMIT = 1000
CROWD, COMPANY, SHARE = 12, 32, 8
"""With so many more commits to be expected, those that came are held back until they are so many, or an eighth of the rest."""
PATIENCE_S = 0.03
"""At most for so long."""

_T = TypeVar("_T")


@dataclass(slots=True)
class _Job:
    work: Commit | Callable[[], Any]
    loop: asyncio.AbstractEventLoop | None
    future: asyncio.Future[Any] | Future[Any]
    """Of `loop`; without one, of a thread that waits."""
    result: Any = None
    error: Exception | None = None

    def is_commit(self) -> bool:
        return isinstance(self.work, Commit)

    def resolve(self) -> None:
        if self.future.done():  # cancelled meanwhile: the commit is durable all the same
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


class Writer:
    """Owns the thread; `commit` and `call` are for coroutines of any loop."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.expected: Callable[[], int] = lambda: 0
        """How many commits may be handed over soon, those that wait already included."""
        self.closed = False
        """Nothing more is taken."""
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="durable_nb journal", daemon=True)
        self._thread.start()

    def commit(self, commit: Commit) -> asyncio.Future[Verdict]:
        """Hand a commit over; the future resolves after its fsync. Cancelling the future doesn't take the commit back."""
        return self._submit(commit)

    def commit_and_wait(self, commit: Commit) -> Verdict:
        """For synchronous code: returns after the fsync, which takes about a millisecond."""
        return self.hand_over(commit).result()

    def hand_over(self, commit: Commit) -> Future[Verdict]:
        """For a thread that hands several over, and waits for each."""
        future: Future[Verdict] = Future()
        self._put(_Job(commit, None, future))
        return future

    def call(self, job: Callable[[], _T]) -> asyncio.Future[_T]:
        """Run `job` on the writer's thread, after the commits handed over before."""
        return self._submit(job)

    def close(self) -> None:
        """Write what was handed over, then end the thread."""
        self.closed = True  # before the sign to end: nothing may be queued behind it, where it would never be written
        self._jobs.put(None)
        self._thread.join()

    def let_go(self) -> None:
        """In a forked child, which has no such thread: refuse what is handed over."""
        self.closed = True

    def _submit(self, work: Commit | Callable[[], Any]) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._put(_Job(work, loop, future))
        return future

    def _put(self, job: _Job) -> None:
        if self.closed:
            raise StoreError("the store is closed; nothing was written. Load the extension, or open the store, again")
        self._jobs.put(job)

    def _run(self) -> None:
        # In the order in which they were handed over: a call sees every commit before it. Nothing is resolved before its
        # group has been applied, so a step that was awaited is on disk.
        ending = False
        while not ending:
            waiting = self._take()
            ending = waiting[-1] is None
            for commits, group in groupby((job for job in waiting if job), key=_Job.is_commit):
                jobs = list(group)
                if commits:
                    self._write(jobs)
                else:
                    for job in jobs:
                        _do(job)
                _resolve_all(jobs)
        self.journal.close()  # this thread's connection

    def _take(self) -> list[_Job | None]:
        """Wait for a job; with it, all that wait already. None, the sign to end, is the last.

        Of many steps that end one after the other, each would be a group of its own: the first of them waits a little.
        """
        waiting = [self._jobs.get()]
        deadline = time.monotonic() + PATIENCE_S
        while waiting[-1] is not None and len(waiting) < GROUP_LIMIT:
            try:
                if self._may_wait(waiting):
                    waiting.append(self._jobs.get(timeout=max(deadline - time.monotonic(), 0.0001)))
                else:
                    waiting.append(self._jobs.get_nowait())
            except queue.Empty:
                break
        return waiting

    def _may_wait(self, waiting: list[_Job | None]) -> bool:
        """Are there few, each the commit of a coroutine, and many to come?"""
        to_come = self.expected() - len(waiting)
        few = to_come >= CROWD and len(waiting) < max(COMPANY, to_come // SHARE)
        return few and all(job is not None and job.loop is not None and job.is_commit() for job in waiting)

    def _write(self, jobs: list[_Job]) -> None:
        try:
            verdicts = self.journal.apply([job.work for job in jobs])  # type: ignore[misc]  # all of them are commits
            for job, verdict in zip(jobs, verdicts, strict=True):
                job.result = verdict
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].error = error
                return
            for n, job in enumerate(jobs):  # one bad commit must not fail its neighbours
                self._write([job])
                if n and job.error is not None and jobs[n - 1].error is not None:
                    for rest in jobs[n + 1 :]:  # it is the disk, not the commit: don't wait for it once for each
                        rest.error = job.error
                    return


def _do(job: _Job) -> None:
    try:
        job.result = job.work()  # type: ignore[operator]  # no commit
    except Exception as error:
        job.error = error


def _resolve_all(jobs: list[_Job]) -> None:
    """Resolve the futures, with one wake-up for each loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
    for job in jobs:
        if job.loop is None:
            job.resolve()
        else:
            by_loop.setdefault(job.loop, []).append(job)
    for loop, told in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, told)
        except RuntimeError:
            if not loop.is_closed():  # a loop that ended took its waiters along; what was written stays written
                raise


def _resolve(jobs: list[_Job]) -> None:
    for job in jobs:
        job.resolve()
