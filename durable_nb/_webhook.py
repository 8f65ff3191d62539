"""`durable.webhook(name)`: an address for somebody else's service, and a wait for what it posts."""

from __future__ import annotations

import os
from collections.abc import Coroutine
from datetime import timedelta

from durable_nb._clock import parse_duration
from durable_nb._current import Engine, WaitRequest, current_body, current_run, run_for
from durable_nb._events import Event
from durable_nb._misuse import explained
from durable_nb._verbs import check_name
from durable_nb.errors import DurableError, NotInRunError

URL = "DURABLE_NB_URL"


class Webhook:
    """A webhook of a run. It holds nothing secret: `url` and `secret` are made when they are asked for."""

    def __init__(self, name: str, run_id: str, timeout: timedelta) -> None:
        self.name, self.run_id, self._timeout = name, run_id, timeout

    @property
    def url(self) -> str:
        """The address to be given to the service, the same in every execution. DurableError where this process doesn't know
        under which address `durable-nb serve` is reached: set DURABLE_NB_URL."""  # fmt: skip
        at = os.environ.get(URL, "").rstrip("/")
        if not at:
            raise DurableError(
                f"the address of the webhook {self.name!r} is not known: set {URL} to where 'durable-nb serve' is reached from "
                "outside, as in https://example.com, or start it with --url"
            )
        return f"{at}/webhooks/{self._engine().webhooks.token(self.run_id, self.name)}"

    @property
    def secret(self) -> str:
        """What the service signs its posts with, `whsec_...`, as Standard Webhooks has it."""
        return self._engine().webhooks.secret(self.run_id, self.name)

    def wait(self) -> Coroutine[object, object, Event]:
        """Wait for the next post: an `Event` whose `data` is what was posted (of JSON what it says, else text or bytes). Each
        is delivered once, the first posted first, also those that came before this call. After the time-out the event has
        `timed_out`, and nothing is raised."""  # fmt: skip
        __tracebackhide__ = True
        of = self._engine().webhooks.event_id(self.run_id, self.name)
        return run_for("webhook(...).wait").wait(WaitRequest(self.name, self._timeout, "event", of))

    def _engine(self) -> Engine:
        run = current_run.get()
        if run is None:
            raise NotInRunError(f"the webhook {self.name!r} is one of the run {self.run_id!r}: use it in that run's own code")
        return run.runs

    def __repr__(self) -> str:
        return f"<webhook {self.name!r} of run {self.run_id!r}>"


@explained
def webhook(name: str, *, timeout: float | str | timedelta = "7d") -> Webhook:
    """An address that somebody else's service can post to, for this run alone; `await hook.wait()` is what it posts.

    A plain call, in a workflow or a durable cell. `timeout` is that of each wait. Posts come in through `durable-nb serve`
    (or `durable.asgi`) on the same store, and count only if they are signed with `hook.secret`.
    """
    __tracebackhide__ = True
    name, waits = check_name("webhook", name), parse_duration(timeout)
    run = current_run.get()
    if run is None or current_body.get() is not None:
        run = run_for("webhook")
    return Webhook(name, run.id, waits)
