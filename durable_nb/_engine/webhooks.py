"""Webhooks of runs: addresses that only this store's key can make, and posts that only whoever knows the secret can send.

Token and secret are MACs under the signing key over store, run and name, so nothing of them is on disk but the token's digest,
in the name of the event that a post becomes. Posts are signed as https://www.standardwebhooks.com says.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from durable_nb import _codec
from durable_nb._current import SendRequest
from durable_nb._engine.events import Events
from durable_nb.errors import DurableError, RunNotFoundError

if TYPE_CHECKING:
    from durable_nb._engine.shared import Shared

TOLERANCE_S = 300.0
"""A post whose time is further away from now is an old one, sent again."""


class UnsignedError(DurableError):
    """A post that its sender has not signed as agreed."""


class Webhooks:
    """Of one store."""

    def __init__(self, shared: Shared, events: Events) -> None:
        self._shared, self._events = shared, events

    def token(self, run_id: str, name: str) -> str:
        """What an address ends with: run and name, and a MAC that nobody else can make."""
        of = base64.urlsafe_b64encode(json.dumps([run_id, name]).encode()).decode().rstrip("=")
        return f"{of}.{self._mac('token', run_id, name).hex()}"

    def secret(self, run_id: str, name: str) -> str:
        """What its posts are signed with, as Standard Webhooks writes it."""
        key = self._mac("secret", run_id, name) + self._mac("secret, second half", run_id, name)
        return f"whsec_{base64.b64encode(key).decode()}"

    def event_id(self, run_id: str, name: str) -> str:
        """The event that a post becomes."""
        return f"webhook {hashlib.blake2b(self.token(run_id, name).encode(), digest_size=16).hexdigest()}"

    def receive(self, token: str, headers: Mapping[str, str], body: bytes) -> None:
        """Send a post on to its run; one that was received before is dropped. It is on disk when this returns.

        RunNotFoundError for a token that this store has not made, UnsignedError for a signature or a time that is not right.
        """
        run_id, name = self._of(token)
        sent = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
        self._check(self.secret(run_id, name), *sent, headers.get("webhook-signature", ""), body)
        value = _content(body)
        form, packed = _codec.encode(value)
        digest = hashlib.blake2b(f"{token}\0{sent[0]}".encode(), digest_size=16).hexdigest()
        self._events.send(SendRequest(self.event_id(run_id, name), value, form, packed, run_id), once=digest)

    def _of(self, token: str) -> tuple[str, str]:
        encoded = token.partition(".")[0]
        try:
            run_id, name = json.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
            made = self.token(run_id, name)
        except (ValueError, TypeError, binascii.Error):
            made = ""
        if not hmac.compare_digest(made.encode(), token.encode(errors="replace")):
            raise RunNotFoundError("no webhook of that address in this store")
        return run_id, name

    def _check(self, secret: str, post_id: str, sent_at: str, signatures: str, body: bytes) -> None:
        if not post_id or not sent_at.isdigit() or not signatures:
            raise UnsignedError(
                "a post needs the headers webhook-id, webhook-timestamp and webhook-signature (Standard Webhooks)"
            )
        if abs(self._shared.clock.now().wall_s - int(sent_at)) > TOLERANCE_S:
            raise UnsignedError("the post's webhook-timestamp is more than five minutes away from this server's clock")
        signed = f"{post_id}.{sent_at}.".encode() + body
        key = base64.b64decode(secret.removeprefix("whsec_"))
        right = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest())
        given = [one.partition(",") for one in signatures.split(" ")]
        if not any(hmac.compare_digest(right, one.encode()) for version, _, one in given if version == "v1"):
            raise UnsignedError("the post's webhook-signature is not that of its content under the webhook's secret")

    def _mac(self, what: str, run_id: str, name: str) -> bytes:
        parts = "webhook", what, self._shared.store.id, run_id, name
        return self._shared.store.signer.mac(*(part.encode() for part in parts))


def _content(body: bytes) -> Any:
    """What the run gets: of JSON what it says, else the text, else the bytes."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        try:
            return body.decode()
        except UnicodeDecodeError:
            return body
