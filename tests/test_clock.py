"""Durations, points in time, and how much of a wait is left."""

from __future__ import annotations

import math
import time
from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durable_nb._clock import Instant, SystemClock, parse_duration, parse_when, remaining_s, say_duration

# -- durations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (0, 0),
        (0.0, 0),
        ("0s", 0),
        (90, 90),
        (1.5, 1.5),
        (timedelta(minutes=3), 180),
        ("90s", 90),
        ("15m", 900),
        ("2h", 7200),
        ("7d", 7 * 24 * 3600),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        (" 1d 2h 3m 4s ", 93784),
        ("1.5h", 5400),
        ("0.25s", 0.25),
        ("7days", 7 * 24 * 3600),
        ("1 hour 2 mins 3 seconds", 3723),
    ],
)
def test_durations_as_people_write_them(written, seconds):
    assert parse_duration(written) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "written",
    [
        "",
        " ",
        "90",
        "7 dayz",
        "1w",
        "1h30",
        "h",
        "-5s",
        "5s!",
        "1e3s",
        "5S",
        "s5",
        ".5s",
        -1,
        -0.001,
        timedelta(seconds=-1),
        math.nan,
        math.inf,
        -math.inf,
        None,
        True,
        False,
        [5],
        b"5s",
        date(2027, 1, 1),
        1e300,
        "9" * 400 + "d",
        10**400,
    ],
    ids=lambda written: repr(written)[:12],
)
def test_what_is_no_duration_is_refused_and_quoted(written):
    with pytest.raises(ValueError, match="is not a duration") as caught:
        parse_duration(written)
    assert repr(written) in str(caught.value)


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_every_combination_of_units_adds_up(d, h, m, s):
    assert parse_duration(f"{d}d{h}h{m}m{s}s") == timedelta(days=d, hours=h, minutes=m, seconds=s)


# -- what is left of a wait -------------------------------------------------------------------------------------------

DURATIONS = st.floats(0, 1e7)
TIMES = st.floats(0, 4e9)
SHORT = st.floats(0, 1e7)


@given(DURATIONS, TIMES, TIMES, SHORT, st.floats(-4e9, 4e9))
def test_within_one_boot_the_wall_clock_says_nothing(duration, wall, boot, passed, set_by):
    """Set forward it makes no timer early, set back none longer."""
    started = Instant(wall, "a", boot)
    left = remaining_s(started, duration, Instant(wall + passed + set_by, "a", boot + passed))
    assert left == pytest.approx(max(duration - passed, 0), abs=1e-5)
    assert 0 <= left <= duration


@given(DURATIONS, TIMES, st.floats(-4e9, 4e9), TIMES)
def test_across_boots_a_wait_is_never_longer_than_it_was(duration, wall, passed, boot):
    started = Instant(wall, "a", 500.0)
    left = remaining_s(started, duration, Instant(wall + passed, "b", boot))
    assert 0 <= left <= duration
    if passed >= 0:
        assert left == pytest.approx(max(duration - passed, 0), abs=1e-5)


@pytest.mark.parametrize("boot", ["a", "b", ""])
def test_a_wait_is_over_exactly_when_its_time_has_passed(boot):
    started = Instant(1000.0, boot, 50.0)
    assert remaining_s(started, 10, Instant(1009.5, boot, 59.5)) == 0.5
    assert remaining_s(started, 10, Instant(1010.0, boot, 60.0)) == 0
    assert remaining_s(started, 0, started) == 0


def test_where_the_boot_is_unknown_the_wall_clock_decides():
    """Two machines or boots without a name aren't taken for one."""
    assert remaining_s(Instant(1000.0, "", 5000.0), 60, Instant(1040.0, "", 1.0)) == 20


def test_the_machines_clock_goes_forward_in_one_boot():
    clock = SystemClock()
    first, second = clock.now(), clock.now()
    assert first.boot == second.boot
    assert second.boot_s >= first.boot_s


# -- points in time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "unix_s"),
    [
        (0, 0),
        (1_700_000_000, 1_700_000_000),
        (1_700_000_000.25, 1_700_000_000.25),
        (datetime(2027, 1, 31, 9, tzinfo=UTC), 1_801_386_000),
        (datetime(2027, 1, 31, 9, tzinfo=timezone(timedelta(hours=-5))), 1_801_404_000),
        ("2027-01-31T09:00:00+00:00", 1_801_386_000),
        ("2027-01-31T09:00Z", 1_801_386_000),
        ("2027-01-31 10:00+01:00", 1_801_386_000),
    ],
)
def test_points_in_time_as_people_write_them(written, unix_s):
    when = parse_when(written)
    assert when.tzinfo is not None
    assert when.timestamp() == unix_s


@pytest.mark.parametrize("naive", [datetime(2027, 1, 31, 9), "2027-01-31T09:00", "2027-07-31"])  # noqa: DTZ001
def test_without_a_zone_local_time_is_meant(naive):
    text = naive if isinstance(naive, str) else naive.isoformat()
    assert parse_when(naive).timestamp() == datetime.fromisoformat(text).timestamp()


@pytest.mark.parametrize(
    "written",
    ["", "soon", "90s", "2027-13-01", None, True, date(2027, 1, 1), timedelta(1), math.nan, math.inf, 1e300, 10**400, b"2027"],
)
def test_what_is_no_point_in_time_is_refused_and_quoted(written):
    with pytest.raises(ValueError, match="is not a point in time") as caught:
        parse_when(written)
    assert repr(written) in str(caught.value)


# -- saying durations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 ms"),
        (0.0614, "61 ms"),
        (1, "1.0 s"),
        (3.21, "3.2 s"),
        (60, "1 min"),
        (725, "12 min 5 s"),
        (3600, "1 h"),
        (7380, "2 h 3 min"),
        (86_400, "1 d"),
        (6 * 86_400 + 23 * 3600 + 59, "6 d 23 h"),
    ],
)
def test_durations_are_said_shortly(seconds, said):
    assert say_duration(seconds) == said


@pytest.mark.parametrize(("seconds", "said"), [(0.9996, "1.0 s"), (59.97, "1 min"), (59.6 * 60, "59 min 36 s")])
def test_rounding_never_gives_sixty_seconds_or_a_thousand_milliseconds(seconds, said):
    assert say_duration(seconds) == said


def test_an_hour_that_the_clocks_skip_is_not_before_the_one_that_they_show(monkeypatch):
    """02:30 on the morning when 02:00 becomes 03:00: the moment that would have been 02:30, an hour and a half after 01:00."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert parse_when("2027-03-28T02:30") == datetime(2027, 3, 28, 1, 30, tzinfo=UTC)
        assert parse_when("2027-03-28T01:00") == datetime(2027, 3, 28, 0, 0, tzinfo=UTC)
    finally:
        monkeypatch.undo()
        time.tzset()
