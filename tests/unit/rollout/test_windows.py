"""Maintenance windows: an opening for each local date, whatever the clocks do (T82)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from groundswell.registry.v1 import registry_pb2
from groundswell.rollout.v1 import rollout_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from services.rollout.domain.windows import UNKNOWN_ZONE_MS, Window, closed_for_ms, window_of
from tests.simulation.rollout.world import PRODUCT, Rollout, fact, registry_events, seconds
from tests.unit.rollout.conftest import Small

VIENNA = ZoneInfo("Europe/Vienna")
DAILY = frozenset(range(1, 8))
MINUTE = 60_000
HOUR = 60 * MINUTE
Answer = rollout_pb2.AuthorizeSwitchResponse


def ms(*when: int, zone: ZoneInfo | None = None) -> int:
    at = datetime(*when, tzinfo=zone or UTC)  # type: ignore[misc,arg-type]
    return round(at.timestamp() * 1000)


def openings(window: Window, start_ms: int, days: int) -> list[tuple[int, int]]:
    """Every span in which it is open, minute by minute."""
    spans: list[tuple[int, int]] = []
    began = -1
    for at in range(start_ms, start_ms + days * 24 * HOUR, MINUTE):
        is_open = closed_for_ms(window, at) == 0
        if is_open and began < 0:
            began = at
        if not is_open and began >= 0:
            spans.append((began, at))
            began = -1
    return spans


def test_no_window_is_always_open() -> None:
    assert window_of(registry_pb2.ConfigurationPolicy()) is None
    assert closed_for_ms(None, 0) == 0


def test_it_says_when_it_opens() -> None:
    window = Window("Europe/Vienna", 2 * 60, 2 * HOUR, frozenset({7}))
    friday = ms(2026, 7, 3, 12, zone=VIENNA)
    assert friday + closed_for_ms(window, friday) == ms(2026, 7, 5, 2, zone=VIENNA)
    assert closed_for_ms(window, ms(2026, 7, 5, 2, zone=VIENNA)) == 0
    assert closed_for_ms(window, ms(2026, 7, 5, 3, 59, zone=VIENNA)) == 0
    closed = ms(2026, 7, 5, 4, zone=VIENNA)
    assert closed + closed_for_ms(window, closed) == ms(2026, 7, 12, 2, zone=VIENNA)


def test_one_that_goes_past_midnight_belongs_to_the_day_on_which_it_opened() -> None:
    window = Window("UTC", 23 * 60, 3 * HOUR, frozenset({1}))
    assert closed_for_ms(window, ms(2026, 7, 7, 1, 59)) == 0, "Tuesday night of Monday's window"
    assert closed_for_ms(window, ms(2026, 7, 8, 1)) > 0


@pytest.mark.parametrize("start_minute", [90, 120, 150, 179, 180])
def test_t82_a_change_of_clocks_opens_no_window_twice_and_none_not_at_all(start_minute: int) -> None:
    window = Window("Europe/Vienna", start_minute, HOUR, DAILY)
    for first in ((2026, 3, 27), (2026, 10, 23)):  # clocks go forward on 29 March and back on 25 October
        spans = openings(window, ms(*first, 12, zone=VIENNA), 4)
        assert len(spans) == 4
        assert all(end - begin == HOUR for begin, end in spans)


def test_t82_a_window_of_a_whole_day_has_no_gap_when_the_day_has_25_hours() -> None:
    week = frozenset({6, 7, 1})
    window = Window("Europe/Vienna", 0, 24 * HOUR, week)
    spans = openings(window, ms(2026, 10, 23, 12, zone=VIENNA), 4)
    assert spans == [(ms(2026, 10, 24, 0, zone=VIENNA), ms(2026, 10, 27, 0, zone=VIENNA))]


def test_a_time_zone_that_is_not_known_here_opens_nothing() -> None:
    assert closed_for_ms(Window("Middle/Earth", 0, HOUR, DAILY), 0) == UNKNOWN_ZONE_MS
    assert closed_for_ms(Window("../../etc/passwd", 0, HOUR, DAILY), 0) == UNKNOWN_ZONE_MS


@given(
    zone=st.sampled_from(["UTC", "Europe/Vienna", "America/New_York", "Australia/Lord_Howe", "Pacific/Apia"]),
    start=st.integers(0, 1439),
    length=st.integers(15, 24 * 60),
    days=st.sets(st.integers(1, 7), min_size=1),
    minute=st.integers(0, 30 * 365 * 24 * 60),
)
@settings(max_examples=300, deadline=None)
def test_it_opens_exactly_when_it_said(zone: str, start: int, length: int, days: set[int], minute: int) -> None:
    window = Window(zone, start, length * MINUTE, frozenset(days))
    now = ms(2010, 1, 1) + minute * MINUTE
    left = closed_for_ms(window, now)
    if left:
        assert left <= 9 * 24 * HOUR
        assert closed_for_ms(window, now + left) == 0
        assert closed_for_ms(window, now + left - 1) == 1
    local = datetime.fromtimestamp((now + left) / 1000, ZoneInfo(zone))
    reachable = {(local - timedelta(minutes=back)).isoweekday() for back in range(0, length + 120, 15)}
    assert reachable & days


# What it does to grants and go.


def policy(small: Small, **window: object) -> None:
    product = registry_pb2.Product(name=PRODUCT)
    product.policy.poll_interval.CopyFrom(seconds(2))
    product.policy.poll_jitter.CopyFrom(seconds(1))
    if window:
        product.policy.maintenance_window.start_minute = window["start_minute"]  # type: ignore[assignment]
        product.policy.maintenance_window.length.CopyFrom(seconds(window["length"]))  # type: ignore[arg-type]
    small.leader.do(fact("registry", PRODUCT, registry_events.ProductChanged(product=product)))


def minute_of_day(small: Small, ahead: int = 0) -> int:
    return (small.leader.now_ms // MINUTE + ahead) % 1440


def test_outside_the_window_nothing_is_granted_and_the_answer_says_for_how_long(small: Small) -> None:
    small.start()
    policy(small, start_minute=minute_of_day(small, 30), length=3600)
    refused = small.claim(small.device())
    assert [reason.code for reason in refused.reasons] == ["MAINTENANCE_WINDOW_CLOSED"]
    assert 0 < refused.closed_for_ms <= 30 * MINUTE
    assert refused.closed_plan == f"{PRODUCT}/rollouts/r"
    small.leader.now_ms += refused.closed_for_ms
    assert small.claim(small.device("d2")).HasField("offer")


def test_plain_releases_overrides_and_ways_back_wait_for_the_window_too(small: Small) -> None:
    policy(small, start_minute=minute_of_day(small, 30), length=3600)
    small.add_release("canary", "2.0.0")
    refused = small.claim(small.device())
    assert [reason.code for reason in refused.reasons] == ["MAINTENANCE_WINDOW_CLOSED"]


def test_a_device_that_is_ready_after_the_window_waits_for_the_next_one_and_pays_with_no_try(small: Small) -> None:
    policy(small, start_minute=minute_of_day(small), length=900)
    small.start()
    device = small.device()
    name = small.granted(device)
    small.leader.now_ms += 15 * MINUTE
    answer = small.ask_go(device)
    assert (answer.answer, answer.reasons[0].code) == (Answer.ANSWER_WAIT, "MAINTENANCE_WINDOW_CLOSED")
    assert 0 < answer.closed_for_ms <= 24 * HOUR
    small.beat(31)
    assert small.attempt(name).code == "LEASE_EXPIRED_WAITING"
    assert small.counts().expired == 0
    assert small.counts().cancelled == 1
    small.leader.now_ms += 24 * HOUR - 20 * MINUTE
    assert small.claim(device, candidates=[]).cancel_attempt == name
    device.end()
    small.leader.now_ms += 10 * MINUTE
    assert small.granted(device) != name


def test_an_expedited_rollout_does_not_wait_for_the_window(small: Small) -> None:
    policy(small, start_minute=minute_of_day(small, 30), length=3600)
    image = Rollout(stages=[small.stage()], expedited=True)
    small.create("fix", "2.0.0", image)
    small.control("start", "fix")
    device = small.device()
    small.granted(device)
    assert small.ask_go(device).answer == Answer.ANSWER_GO


def test_the_policys_failure_action_is_taken_when_the_rollout_names_none(small: Small) -> None:
    product = registry_pb2.Product(name=PRODUCT)
    product.policy.default_failure_action = registry_pb2.DEFAULT_FAILURE_ACTION_ROLL_BACK
    small.leader.do(fact("registry", PRODUCT, registry_events.ProductChanged(product=product)))
    assert small.create("a", "2.0.0", Rollout(stages=[small.stage()])).failure_action == (
        Rollout.FAILURE_ACTION_ROLL_BACK
    )
    named = Rollout(stages=[small.stage()], failure_action=Rollout.FAILURE_ACTION_PAUSE)
    assert small.create("b", "2.0.0", named).failure_action == Rollout.FAILURE_ACTION_PAUSE
