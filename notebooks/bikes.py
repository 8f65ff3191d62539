"""What 03_llm_pipeline needs beside itself: a server on this machine that answers by rules in place of a language model."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from typing import Any

from durable_nb.testing import ModelServer

PORT = 8727
HINTS = {
    "billing": "charge bill invoice pay paid fee refund price card voucher discount receipt bank euro plan debit credit money "
    "subscription deposit cost rate promo tip",
    "app": "app map code scan update notification widget pin login screen phone location profile password link account chat",
    "station": "dock docks station rack racks kiosk terminus terminal ramp canopy",
    "praise": "thank thanks love great wonderful kind best compliments joy highlight bravo perfect cheerful honest patience "
    "friendly recommend happy relief shining town quicker lovely feel like new smiled reason learned years",
    "bike": "brake brakes saddle chain tyre tyres wheel pedal pedals light gears handlebar spoke motor seat bell "
    "crank steering mudguard lock grip screw fork battery frame stem reflector gear kickstand basket bracket strap bike",
}
_WORD = re.compile(r"[a-z]+")


def topic_of(message: str) -> str:
    """The topic of which the message has the most hints; of several the first."""
    words = Counter(_WORD.findall(message.lower()))
    return max(HINTS, key=lambda topic: sum(words[hint] for hint in set(HINTS[topic].split())))


def summary_of(messages: list[str], *, with_example: bool) -> str:
    """What the messages speak of most, and the shortest of them."""
    small = set(
        "the a an and of to in on at is are was were i my me you your it its for with that not from as by when this".split()
    )
    words = Counter(
        word for text in messages for word in set(_WORD.findall(text.lower())) if len(word) > 3 and word not in small
    )
    most = ", ".join(word for word, _ in words.most_common(3))
    example = f' One writes: "{min(messages, key=len)}"' if with_example else ""
    return f"{len(messages)} messages, above all about {most}.{example}"


def reply(system: str, messages: list[dict[str, Any]]) -> str:
    """Says one word where one is asked for, else a summary of the lines."""
    text = messages[-1]["content"]
    if "one word" in system:
        return topic_of(text)
    return summary_of(text.splitlines(), with_example="example" in system)


def model_server() -> str:
    """The address of a model server: `OPENAI_BASE_URL`, or one that is begun here, or by another notebook, on a fixed port."""
    server = ModelServer(PORT, reply=reply, latency_s=0.05)
    with contextlib.suppress(OSError):  # another notebook of this machine has one
        if "OPENAI_BASE_URL" not in os.environ:
            server.start()
    return os.environ.get("OPENAI_BASE_URL", server.openai_url)
