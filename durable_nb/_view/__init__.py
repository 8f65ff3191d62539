"""The view of a run: live while it goes on, one line of static html that unfolds, and text, for good once it has ended."""

from __future__ import annotations

from durable_nb._view.actions import Actions
from durable_nb._view.place import Place
from durable_nb._view.state import Detail, Extra, Source
from durable_nb._view.widget import RunView

__all__ = ["Actions", "Detail", "Extra", "Place", "RunView", "Source"]
