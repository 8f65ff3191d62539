"""Who may come in: the checks that every request passes before anything else looks at it.

A page of another origin that the user has open must not start runs; a stranger on the network must not either. A browser tells
where a request comes from, and which name it asked for; on a loopback address only this machine's own names are answered, so
that a name that was pointed here meanwhile (DNS rebinding) gets nothing.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
from dataclasses import dataclass
from typing import Any

from starlette.requests import HTTPConnection, Request

MAX_BODY = 1 << 20
"""Bytes of a request's body, unless the server says otherwise."""


Keys = dict[str, type | tuple[type, ...]]
"""What a JSON object may hold: of which type each value is."""


class Refused(Exception):  # noqa: N818  it says what happened
    """A request that isn't answered: its status, and why in one line."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


@dataclass(frozen=True, slots=True)
class Door:
    """Of one server."""

    token: str = ""
    """What clients must show; '' serves this machine alone."""
    own_names: bool = False
    """Answer requests for this machine's own names only: the server listens on a loopback address."""

    def check_origin(self, connection: HTTPConnection) -> None:
        """Refused where a browser asks on behalf of somebody else's page."""
        host = connection.headers.get("host", "")
        if self.own_names and not is_loopback(host.rsplit(":", 1)[0] if not host.endswith("]") else host):
            raise Refused(403, f"this server answers to localhost, not to {host[:100]!r}")
        origin = connection.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refused(403, f"a page of {origin[:100]!r} asked for this, which is another origin")

    def check_token(self, connection: HTTPConnection, shown: str | None = None) -> None:
        """Refused without the token. `shown`: where it isn't in the header."""
        if not self.token:
            client = connection.client.host if connection.client else ""
            if client and not is_loopback(client):
                raise Refused(401, "this server has no token, and serves its own machine only: set DURABLE_NB_TOKEN")
            return
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        given = shown if shown is not None else given if scheme.lower() == "bearer" else ""
        if not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            raise Refused(401, "a token is needed, and this is not it: send 'Authorization: Bearer TOKEN'")


def is_loopback(host: str) -> bool:
    """Is that this machine, seen from itself?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


async def body_of(request: Request, most: int = MAX_BODY) -> bytes:
    """The body; Refused where it is longer than `most`, whatever its header says."""
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > most:
        raise Refused(413, f"the body has {length[:20]} bytes, and {most} are the most")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise Refused(413, f"the body has more than {most} bytes")
    return body


async def json_of(request: Request, known: Keys, most: int = MAX_BODY) -> dict[str, Any]:
    """The JSON object of a body ({} for none) with these keys, all optional; Refused."""
    body = await body_of(request, most)
    try:
        found = json.loads(body, parse_constant=_no_number) if body.strip() else {}
    except (ValueError, RecursionError) as error:
        what = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise Refused(400, f"the body is no JSON: {what}") from None
    if not isinstance(found, dict):
        raise Refused(422, f"the body is a JSON object, not {type(found).__name__}")
    for name, value in found.items():
        if name not in known:
            raise Refused(422, f"unknown key {name[:100]!r}; there are {', '.join(known) or 'none'}")
        if not isinstance(value, known[name]) or (isinstance(value, bool) and known[name] not in (bool, object)):
            raise Refused(422, f"{name!r} can't be {json.dumps(value)[:100]}")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")
