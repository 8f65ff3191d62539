"""What `durable.call` returns."""

from __future__ import annotations

import json
from typing import Any

import httpx

from durable_nb._redaction import said


class Response(httpx.Response):
    """httpx's, which names its step where it isn't JSON."""

    step_name = ""

    def json(self, **options: Any) -> Any:
        try:
            return super().json(**options)
        except json.JSONDecodeError as error:
            kind = self.headers.get("content-type", "no content type")
            where = f"step {self.step_name!r}, {said(self.request.url)}: the answer ({self.status_code}, {kind}) isn't JSON"
            raise json.JSONDecodeError(f"{error.msg} ({where})", error.doc, error.pos) from None

    def raise_for_status(self) -> Response:
        super().raise_for_status()
        return self
