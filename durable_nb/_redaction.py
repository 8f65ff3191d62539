"""What requests hold of credentials, and the same without them: for messages, records and errors. httpx and httpx2 alike."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

REDACTED = "[redacted]"

SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key", "api-key"})
SECRET_PARAMETER = re.compile(r"key|token|secret|signature|password", re.IGNORECASE)


def without_secrets(url: httpx.URL, stand_in: Callable[[str], str] = lambda _: REDACTED) -> httpx.URL:
    """The URL with something else in place of its userinfo and of query parameters named like a secret."""
    if url.userinfo:
        url = url.copy_with(userinfo=REDACTED.encode())
    for parameter in url.params if url.query else ():  # taking a URL apart takes its time
        if SECRET_PARAMETER.search(parameter):
            url = url.copy_merge_params({parameter: [stand_in(value) for value in url.params.get_list(parameter)]})
    return url


def said(url: object) -> str:
    """An URL as messages quote it, even one that can't be parsed: without the credentials it holds."""
    text = re.sub(r"//[^/?#]*@", f"//{REDACTED}@", str(url))
    return re.sub(rf"([?&][^=&#]*(?:{SECRET_PARAMETER.pattern})[^=&#]*=)[^&#]*", rf"\1{REDACTED}", text, flags=re.IGNORECASE)


def redact(request: Any) -> Any:
    """The same request without its credentials: headers, URL userinfo, and query parameters named like one."""
    headers = [(k, REDACTED if k.lower() in SECRET_HEADERS else v) for k, v in request.headers.multi_items()]
    content = vars(request).get("_content")  # one that was not read has none
    return type(request)(request.method, without_secrets(request.url), headers=headers, content=content)


def without_credentials(obj: Any) -> Any:
    """A request of httpx or httpx2, or the response to one, without the request's credentials; anything else as it is."""
    kind = type(obj)
    if kind.__module__.partition(".")[0] not in ("httpx", "httpx2"):
        return obj
    if kind.__name__ == "Request":
        return redact(obj)
    if kind.__name__ == "Response" and vars(obj).get("_request") is not None:
        made = copy.copy(obj)
        made.request = redact(obj.request)
        return made
    return obj
