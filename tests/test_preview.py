"""What a preview tells of a value, and whom it never asks."""

from __future__ import annotations

import datetime as dt
import decimal
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from durable_nb._preview import LENGTH, last_lines, names_of, preview, preview_answer, preview_call, preview_request, redacted


class Meta(type):
    def __getattribute__(cls, name: str) -> Any:
        raise ZeroDivisionError(name)


def never(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("the user's code was called")


class Hostile:
    __repr__ = __str__ = __len__ = __iter__ = __hash__ = __bool__ = __format__ = __getattribute__ = never


class HostileClass(metaclass=Meta): ...


class HostileDict(dict[Any, Any]):
    items = __iter__ = __len__ = __repr__ = never  # type: ignore[assignment]


class HostileText(str):
    __slots__ = ()
    __getitem__ = __len__ = __repr__ = __str__ = never  # type: ignore[assignment]


class HostileArray(np.ndarray):  # type: ignore[type-arg]
    __getattribute__ = never  # type: ignore[assignment]


class HostileZone(dt.tzinfo):
    utcoffset = tzname = dst = never


def test_no_code_of_the_users_is_called() -> None:
    told = {
        "<Hostile>": Hostile(),
        "<HostileClass>": HostileClass(),
        "<HostileDict>": HostileDict(a=1),
        "<HostileText>": HostileText("x"),
        "<HostileArray>": np.zeros(3).view(HostileArray),
        "[<Hostile>, {'a': (<Hostile>,)}]": [Hostile(), {"a": (Hostile(),)}],
        "2026-01-02 03:00:00 (zone)": dt.datetime(2026, 1, 2, 3, tzinfo=HostileZone()),
        "<DataFrame 1 × 1: a object>": pd.DataFrame({"a": pd.Series([Hostile()], dtype=object)}),
        "<Series, 1 × object>": pd.Series([Hostile()], dtype=object),
    }
    for shown, value in told.items():
        assert preview(value) == shown


def test_requests_and_answers_are_told_as_people_read_them() -> None:
    asked = {"method": "POST", "url": "https://x.example/v1?api_key=[redacted]", "headers": [], "body": '{"token": "hunter22"}'}
    assert preview_request(asked) == 'POST https://x.example/v1?api_key=[redacted] {"token": [redacted]}'
    answer = {"status": 200, "reason": "OK", "content": "plain \x1b words\n and more"}
    assert preview_answer(answer) == "200 OK · plain \\x1b words and more"
    said = '{"choices": [{"message": {"role": "assistant", "content": "Late \\"again\\"."}}], "usage": {}}'
    assert preview_answer({**answer, "content": said}) == '200 OK · Late "again".'
    parts = (f'data: {{"choices":[{{"delta":{{"content":"{part}"}}}}]}}\n\n' for part in ("It ", "is ", "late."))
    assert preview_answer({**answer, "content": "".join(parts)}) == "200 OK · It is late."
    assert preview_answer({**answer, "content": b"\xff" * 9000}).startswith("200 OK · ")
    assert preview_answer({**answer, "content": ""}) == "200 OK"


def test_builtin_numpy_and_pandas_values_are_told() -> None:
    told: list[tuple[Any, str]] = [
        (None, "None"),
        (
            {"id": 7, "of": [1.5, True, None], "when": dt.date(2026, 1, 2)},
            "{'id': 7, 'of': [1.5, True, None], 'when': 2026-01-02}",
        ),
        ("it's", '"it\'s"'),
        (b"\x00" * 2048, "<bytes, 2,048 bytes>"),
        ((1,), "(1,)"),
        (set(), "set()"),
        (Counter("ab"), "Counter({'a': 1, 'b': 1})"),
        (defaultdict(list, a=[1]), "defaultdict({'a': [1]})"),
        (decimal.Decimal("1.50"), "1.50"),
        (Path("/tmp/x"), "'/tmp/x'"),
        (np.float64(1.5), "1.5"),
        (np.int8(3), "3"),
        (np.arange(12.0).reshape(3, 4), "<array 3 × 4 float64: 0, 1, 2, 3, 4, 5, …>"),
        (np.array(["a"]), "<array 1 <U1>"),
        (pd.DataFrame({"a": [1, 2], "b": [0.5, 1]}), "<DataFrame 2 × 2: a int64, b float64>"),
        (pd.Timestamp("2026-01-02"), "2026-01-02 00:00:00"),
        (pd.RangeIndex(3), "<RangeIndex, 3 × int64>"),
        (print, "<function print>"),
        (Hostile, "<class Hostile>"),
    ]
    assert [preview(value) for value, _ in told] == [shown for _, shown in told]


def test_what_is_huge_endless_or_deep_is_told_shortly_and_at_once() -> None:
    endless: list[Any] = [1]
    endless.append(endless)
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    huge = [
        endless,
        deep,
        10**1_000_000,
        "x" * 10_000_000,
        list(range(1_000_000)),
        dict.fromkeys(range(1_000_000)),
        [["a" * 999] * 999] * 999,
    ]
    began = time.perf_counter()
    texts = [preview(value) for value in huge]
    assert time.perf_counter() - began < 0.5
    assert all(len(text) <= LENGTH for text in texts)
    assert texts[2] == "<int of 3,321,929 bits>"
    assert "1,000,000 in all" in texts[4]
    while deep:  # else the collector unwinds it on a short stack
        deep = deep[0]


@pytest.mark.parametrize(
    "value",
    [
        {"password": "hunter22"},
        {"Authorization": "Bearer hunter22"},
        {"headers": [("a", 1)], "api_key": ["hunter22"]},
        {"X-Api-Key": b"hunter22"},
        {"credentials": {"user": "hunter22"}},
        {"password": 22_222_222},
        "https://user:hunter22@shop.example/x",
        "https://shop.example/x?page=1&access_token=hunter22",
        ["curl -H 'Authorization: hunter22'"],
        "Bearer hunter22hunter22",
        "sk-hunter22hunter22",
        {Path("https://shop.example/?token=hunter22")},
        "from the environment: env-hunter22",
        "a" * 380 + " sk-hunter22hunter22hunter22",
    ],
)
def test_secrets_are_never_in_a_preview(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_API_KEY", "env-hunter22")
    monkeypatch.setattr("durable_nb._preview._known", (float("-inf"), ()))
    shown = preview(value)
    assert "hunter" not in shown
    assert "22222" not in shown


def test_counts_under_names_like_token_are_shown() -> None:
    assert preview({"tokens": 512, "key": None}) == "{'tokens': 512, 'key': None}"


def test_a_call_is_shown_as_it_is_written_without_secrets() -> None:
    def charge(cart: Any, api_key: str, n: int = 1) -> None: ...

    names = names_of(charge)
    assert preview_call([{"id": 1}, "hunter22"], {"n": 3}, names) == "{'id': 1}, [redacted], n=3"
    assert names_of(Hostile()) == ()
    assert len(preview_call(["x" * 999] * 50, {}, ())) <= LENGTH


def test_what_moves_a_cursor_or_turns_the_text_around_is_escaped() -> None:
    assert preview("\u202eabc\x1b[31m\n") == r"'\u202eabc\x1b[31m\n'"


def test_log_lines_are_bounded_and_free_of_secrets() -> None:
    texts = ["one\n", "x" * 1_000_000 + "\n", "Authorization: Bearer hunter22\n"]
    assert [len(line) for line in last_lines(texts, 10, 100)] == [3, 100, len("Authorization: [redacted]")]
    assert last_lines(map(str, range(1000)), 2, 100) == ["998", "999"]
    assert redacted("a plain text, key by key") == "a plain text, key by key"
