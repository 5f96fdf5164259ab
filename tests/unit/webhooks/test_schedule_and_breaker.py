"""The schedule of retries and the breaker, on a clock that the test moves."""

from __future__ import annotations

import pytest

from services.webhooks.breaker import FIRST_PAUSE_MS, MOST_PAUSE_MS, WINDOW_MS, Breaker, Phase
from services.webhooks.schedule import (
    STEPS_MS,
    THROTTLED_AT_LEAST_MS,
    jittered_step,
    next_delay_ms,
    parse_retry_after,
)


def phase(breaker: Breaker) -> Phase:
    """Asked anew each time: a type checker would think that it cannot change."""
    return breaker.phase


IDS = [f"msg_{number}" for number in range(200)]


def test_ten_attempts_over_about_three_days() -> None:
    assert len(STEPS_MS) == 10
    assert sum(STEPS_MS) / 3_600_000 == pytest.approx(75.58, abs=0.01)


@pytest.mark.parametrize("attempts", range(1, 10))
def test_jitter_stays_within_a_fifth_and_uses_that_range(attempts: int) -> None:
    shares = [jittered_step(each, attempts) / STEPS_MS[attempts] for each in IDS]
    assert min(shares) >= 0.8
    assert max(shares) <= 1.2
    assert max(shares) - min(shares) > 0.3


def test_the_same_delivery_gets_the_same_times_after_a_restart() -> None:
    assert [next_delay_ms("msg_a", n) for n in range(1, 11)] == [next_delay_ms("msg_a", n) for n in range(1, 11)]
    assert next_delay_ms("msg_a", 3) != next_delay_ms("msg_b", 3)


def test_after_the_last_attempt_there_is_no_next() -> None:
    assert next_delay_ms("msg_a", 9) is not None
    assert next_delay_ms("msg_a", 10) is None


@pytest.mark.parametrize("asked_s", [0.0, 1.0, 400.0, 1e9])
def test_retry_after_is_clamped_between_one_and_two_steps(asked_s: float) -> None:
    step = jittered_step("msg_a", 2)
    delay = next_delay_ms("msg_a", 2, retry_after_s=asked_s)
    assert delay is not None
    assert step <= delay <= 2 * step
    if step < asked_s * 1000 < 2 * step:
        assert delay == asked_s * 1000


def test_an_overloaded_receiver_gets_a_minute() -> None:
    assert next_delay_ms("msg_a", 1, throttled=True) == THROTTLED_AT_LEAST_MS
    later = next_delay_ms("msg_a", 4, throttled=True)
    assert later == jittered_step("msg_a", 4)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120.0),
        (" 7 ", 7.0),
        ("Thu, 01 Jan 1970 00:01:00 GMT", 50.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", None),
        ("", None),
        ("-5", None),
        ("99999999999999", None),
        ("²", None),
    ],
)
def test_both_forms_of_retry_after(text: str, seconds: float | None) -> None:
    assert parse_retry_after(text, 10_000) == seconds


def test_ten_failures_in_a_row_open_the_breaker_and_nine_do_not() -> None:
    breaker = Breaker()
    for at in range(9):
        breaker.failed(at)
    assert phase(breaker) is Phase.CLOSED
    breaker.failed(9)
    assert phase(breaker) is Phase.OPEN
    assert not breaker.may_probe(9 + FIRST_PAUSE_MS - 1)
    assert breaker.may_probe(9 + FIRST_PAUSE_MS)


def test_seven_of_ten_failures_open_it_without_ten_in_a_row() -> None:
    breaker = Breaker()
    for at, good in enumerate([True, False, False, True, False, False, True, False, False]):
        breaker.succeeded(at) if good else breaker.failed(at)
    assert phase(breaker) is Phase.CLOSED
    breaker.failed(10)
    assert phase(breaker) is Phase.OPEN


def test_failures_older_than_the_window_do_not_count() -> None:
    breaker = Breaker()
    for at in range(7):
        breaker.failed(at)
    breaker.succeeded(7)
    breaker.succeeded(8)
    breaker.failed(WINDOW_MS + 100)
    assert phase(breaker) is Phase.CLOSED


def test_a_failed_probe_doubles_the_pause_up_to_a_bound_and_a_success_closes() -> None:
    breaker, now = Breaker(), 0
    for _ in range(10):
        breaker.failed(now)
    pauses = []
    for _ in range(10):
        now = breaker.probe_at_ms
        assert breaker.may_probe(now)
        breaker.probing()
        assert not breaker.may_probe(now)
        breaker.failed(now, probe=True)
        pauses.append(breaker.probe_at_ms - now)
    assert pauses[:2] == [2 * FIRST_PAUSE_MS, 4 * FIRST_PAUSE_MS]
    assert pauses[-1] == MOST_PAUSE_MS
    breaker.probing()
    breaker.succeeded(now)
    assert phase(breaker) is Phase.CLOSED
    breaker.failed(now)
    assert phase(breaker) is Phase.CLOSED
