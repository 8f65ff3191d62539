"""The view of a run: live while it goes on, static html and text for good once it has ended."""

from __future__ import annotations

from durable_nb._view.widget import RunView

__all__ = ["RunView"]
