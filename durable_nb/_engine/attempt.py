"""One execution of a step's body, on the kernel's loop or in a worker thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import Context, copy_context
from inspect import isawaitable
from typing import Any

from durable_nb._current import current_body
from durable_nb._engine.heartbeats import Heartbeat
from durable_nb._engine.in_place import Inputs
from durable_nb._engine.task_scope import enters_user_code
from durable_nb._engine.workers import Workers
from durable_nb._forks import children_end_here
from durable_nb._usage import Usage


class Attempt:
    """A body that has been begun. It ends once, and is never begun again."""

    def __init__(
        self,
        run_id: str,
        inputs: Inputs,
        workers: Workers,
        context: Context,
        recording: AbstractContextManager[Callable[[], tuple[bytes, bytes]]],
    ) -> None:
        """Begin it, in this context; `recording` notes what it displays and sees."""
        loop = asyncio.get_running_loop()
        self.run_id, self.inputs, self.request = run_id, inputs, inputs.request
        self.shown = self.seen = b""
        """What it has displayed and seen, encoded, when it is over."""
        self.value: Any = None
        self.error: BaseException | None = asyncio.CancelledError()  # also of one that is cancelled before its first line
        self.in_thread = self.request.thread
        """Nothing can stop it: it ends by itself."""
        self.was_interrupted = False
        """A KeyboardInterrupt has ended it."""
        self.is_overdue = False
        """Nobody waits for it: its last time-out is over."""
        self.owner: Callable[[Attempt], object] | None = None
        """Who is told of the end where nobody waits for it any more."""
        self.heartbeat: Heartbeat | None = None
        body = context.get(current_body)
        self.used: Usage = body.usage if body is not None else {}
        """What the models' answers that it got have cost."""
        self._workers, self._recording = workers, recording
        self._began: asyncio.Future[None] = loop.create_future()
        self._waiting: list[asyncio.Future[None]] = []
        self.task = loop.create_task(self._execute(), context=context)
        self.task.add_done_callback(self._wake)

    @property
    def is_over(self) -> bool:
        """Has the body ended? `value` and `error` tell how; a cancelled one has a CancelledError."""
        return self.task.done()

    def cancel(self) -> None:
        """Stop the body at its next await. A thread goes on."""
        if not self.in_thread:
            self.task.cancel()

    def when_over(self, tell: Callable[[], object]) -> None:
        """Call that on the loop when the body has ended."""
        self.task.add_done_callback(lambda _: tell())

    def when_begun(self, tell: Callable[[], object]) -> None:
        """Call that on the loop when the body has begun."""
        self._began.add_done_callback(lambda _: tell())

    async def ends_within(self, timeout_s: float | None) -> bool:
        """Wait for the end, for so long after the body began: not while it waited for one of the threads. Did it come?

        What can be stopped is stopped after that; one that goes on to its end all the same has come to it, as with
        `asyncio.timeout`. Cancelling the wait stops nothing.
        """
        if timeout_s is None:
            if not self.task.done():
                self._waiting.append(waiting := asyncio.get_running_loop().create_future())
                await waiting
            return True
        await asyncio.wait({self.task, self._began}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({self.task}, timeout=timeout_s)
        if self.task.done():
            return True
        if self.in_thread:
            return False
        self.task.cancel()
        await asyncio.wait({self.task})
        return self.error is None

    async def _execute(self) -> None:
        """Nothing but CancelledError leaves this: a KeyboardInterrupt or SystemExit would end the kernel's loop."""
        try:
            with self._recording as noted:
                self.value = await self._called()
            self.shown, self.seen = noted()
            self.error = None
        except asyncio.CancelledError:
            raise
        except KeyboardInterrupt as interrupt:
            self.was_interrupted = True
            raise asyncio.CancelledError from interrupt
        except BaseException as raised:
            self.error = raised
        finally:
            self.in_thread = False
            self._wake()  # now: the task's own callbacks are called a turn of the loop later

    def _wake(self, _: object = None) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    @enters_user_code
    async def _called(self) -> Any:
        value: Any
        if self.in_thread:
            began = self._begin if self.request.timeout_s is not None or self.request.limits else None
            context = copy_context()  # one that is entered only there
            value = await self._workers.submit(self.request.body, context, began, most=self.request.threads)
            self.in_thread = False
        with children_end_here():
            if not self.request.thread:
                self._begin()
                value = self.request.body()
            return await value if isawaitable(value) else value

    def _begin(self) -> None:
        if not self._began.done():
            self._began.set_result(None)
