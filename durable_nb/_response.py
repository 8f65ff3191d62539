"""What `durable.call` returns."""

from __future__ import annotations

from typing import Any

import httpx

from durable_nb._redaction import said


class Response(httpx.Response):
    """httpx's, which names its step where it can't be read as what it should be."""

    step_name = ""

    def json(self, **options: Any) -> Any:
        try:
            return super().json(**options)
        except ValueError as error:
            kind = self.headers.get("content-type", "without a content type")
            error.add_note(
                f"durable.call({self.step_name!r}, ...): the answer of {said(self.request.url)} ({self.status_code}, {kind}) "
                "isn't JSON; response.text is what came"
            )
            raise

    def raise_for_status(self) -> Response:
        super().raise_for_status()
        return self
