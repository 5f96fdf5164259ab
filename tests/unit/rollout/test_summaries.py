"""What GetRollout, WatchRollout and ListAttempts show: folded, bounded, the same for every reader."""

from __future__ import annotations

import pytest
from groundswell.device.v1 import device_pb2
from groundswell.rollout.v1 import rollout_pb2
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import InvalidArgumentError, NotFoundError
from libs.rpc import page_in_order
from services.rollout import views
from services.rollout.domain import summary
from tests.simulation.rollout.world import PRODUCT, Rollout, Status, World, cohort
from tests.unit.rollout.conftest import Small

NAME = f"{PRODUCT}/rollouts/r"


def shown(small: Small) -> rollout_pb2.StageStatus:
    return views.rollout_of(small.leader.state, NAME, small.leader.now_ms).stage_statuses[0]


def listed(small: Small, filter_: str = "", parent: str = NAME) -> list[rollout_pb2.Attempt]:
    request = rollout_pb2.ListAttemptsRequest(parent=parent, filter=filter_)
    return page_in_order(views.attempts_of(small.leader.state, parent), request)[0]


# Durations.


def test_durations_are_percentiles_of_a_histogram(small: Small) -> None:
    small.start(small.stage(max_in_flight=100))
    for index in range(20):
        device = small.device(f"d{index}")
        small.granted(device)
        small.ask_go(device)
        device.reports.clear()
        small.leader.now_ms += 60_000 if index == 19 else 3_900
        device.switch()
        small.said(device)
    took = shown(small).grant_to_confirmed
    assert took.count == 20
    assert took.p50.ToMilliseconds() == 4_000
    assert took.p95.ToMilliseconds() == 4_000
    assert summary.percentile_ms(small.leader.state.rollouts[NAME].summaries[0].durations, 96) == 64_000


@given(st.lists(st.integers(0, 10**9), min_size=1), st.integers(1, 100))
def test_a_percentile_is_never_below_the_true_one_by_more_than_a_step(values: list[int], per_cent: int) -> None:
    told = summary.Summary()
    for value in values:
        told = summary.took(told, value)
    assert sum(told.durations) == len(values)
    exact = sorted(values)[-(-len(values) * per_cent // 100) - 1]
    found = summary.percentile_ms(told.durations, per_cent)
    assert found >= min(exact, summary.BOUNDS_MS[-1])
    assert found <= max(1000, round(exact * 1.42))


def test_a_dark_device_that_shows_up_is_no_measurement(small: Small) -> None:
    small.start(small.stage(failure_limit=9))
    device = small.device()
    small.granted(device)
    small.ask_go(device)
    device.reports.clear()
    small.beat(40)
    assert shown(small).dark == 1
    device.switch()
    small.said(device)
    assert (shown(small).confirmed, shown(small).grant_to_confirmed.count) == (1, 0)


# Failure codes.


def test_failure_codes_are_counted_and_the_ten_most_frequent_shown(small: Small) -> None:
    small.start(small.stage(failure_limit=999, max_in_flight=500))
    wanted = [f"CODE_{index}" for index in range(12) for _ in range(index + 1)]
    for index, code in enumerate(wanted):
        device = small.device(f"d{index}")
        small.granted(device)
        device.report(device_pb2.ATTEMPT_STATE_FAILED, code)
        small.said(device)
    found = [(it.code, it.count) for it in shown(small).failure_codes]
    assert found == [(f"CODE_{index}", index + 1) for index in range(11, 1, -1)]


def test_distinct_codes_are_bounded() -> None:
    told = summary.Summary()
    for index in range(100):
        told = summary.ended_with(told, f"C{index}")
    assert len(told.codes) == summary.MAX_CODES + 1
    assert told.codes["OTHER"] == 100 - summary.MAX_CODES


# Metrics.


def test_metrics_of_devices_in_the_stage_are_summed_up(small: Small) -> None:
    small.start()
    device, idle = small.device("d1"), small.device("d2")
    small.granted(device)
    for value in (20.0, 30.0, 70.0):
        item = device.item()
        item.metrics["temperature"] = value
        item.metrics["bad"] = float("nan")
        item.metrics["x" * 65] = 1.0
        small.claim(device, item, [])
    item = idle.item()
    item.metrics["temperature"] = 1000.0
    small.claim(idle, item, [])
    found = {it.name: (it.count, it.min, it.mean, it.max) for it in shown(small).metrics}
    assert found == {"temperature": (3, 20.0, 40.0, 70.0)}
    small.leader.replay()


def test_names_of_metrics_are_bounded_whatever_devices_say(small: Small) -> None:
    small.start()
    device = small.device()
    small.granted(device)
    for first in range(0, 60, 20):
        item = device.item()
        for index in range(first, first + 20):
            item.metrics[f"m{index:03}"] = 1e308 if index == 3 else index
        small.claim(device, item, [])
    names = [it.name for it in shown(small).metrics]
    assert len(names) == summary.MAX_METRICS
    assert "m003" not in names
    assert all(it.mean < 1e300 for it in shown(small).metrics)


# Pace.


def test_grants_of_the_last_minute(small: Small) -> None:
    small.start(small.stage(max_in_flight=100))
    small.leader.now_ms += 60_000 - small.leader.now_ms % 60_000
    for index in range(30):
        small.leader.now_ms += 1_000
        small.granted(small.device(f"d{index}"))
    assert shown(small).grants_per_minute == 30
    small.leader.now_ms += 60_000
    assert shown(small).grants_per_minute == 15
    small.leader.now_ms += 60_000
    assert shown(small).grants_per_minute == 0


@given(st.integers(1, 5000), st.lists(st.integers(0, 400), min_size=1, max_size=600))
def test_no_minute_sees_more_than_the_rate_and_one_bucket(rate: int, gaps: list[int]) -> None:
    pace, now, times = summary.NO_PACE, 0, []
    for gap in gaps:
        now += gap
        if not summary.wait_ms(pace, now, rate):
            pace = summary.granted(pace, now, rate)
            times.append(now)
    for index, at in enumerate(times):
        within = [other for other in times[index:] if other < at + 60_000]
        assert len(within) <= rate + summary.burst_of(rate)


# Lists.


def test_attempts_are_filtered_by_state_device_and_stage(small: Small) -> None:
    small.start(small.stage("canary", failure_limit=9))
    failed, live = small.device("d1"), small.device("d2")
    small.granted(failed)
    failed.report(device_pb2.ATTEMPT_STATE_FAILED, "X")
    small.said(failed)
    small.granted(live)
    assert [it.device for it in listed(small, "state = FAILED")] == [failed.name]
    assert [it.code for it in listed(small, f'device = "{failed.name}" AND stage = 0')] == ["X"]
    assert listed(small, "stage = 1") == []
    assert [it.state for it in listed(small, parent=live.name)] == [device_pb2.ATTEMPT_STATE_GRANTED]
    with pytest.raises(InvalidArgumentError):
        listed(small, "no_such_field = 1")
    with pytest.raises(NotFoundError):
        listed(small, parent=f"{PRODUCT}/rollouts/none")


def test_held_devices_are_listed_with_reasons_until_they_go(small: Small) -> None:
    small.start(small.stage(failure_limit=9), back=True)
    device = small.device()
    small.confirmed(device)
    small.control("roll_back", "r")
    small.claim(device)
    held = [it for _, it in views.held_in(small.leader.state, NAME)("")]
    assert [(it.device, it.reason.code, it.stage) for it in held] == [(device.name, "SECURITY_FLOOR", 0)]
    assert held[0].release.endswith("/releases/r-1")
    with pytest.raises(NotFoundError):
        views.held_in(small.leader.state, f"{PRODUCT}/rollouts/none")
    small.add_bundle("1.0.0", 1)
    assert small.claim(device).HasField("offer")
    assert list(views.held_in(small.leader.state, NAME)("")) == []
    assert shown(small).held == 0
    small.leader.replay()


def test_recent_attempts_are_the_live_ones_and_those_that_ended_last(small: Small) -> None:
    small.start(small.stage(failure_limit=999, max_in_flight=500))
    for index in range(60):
        device = small.device(f"d{index}")
        small.granted(device)
        if index < 50:
            device.report(device_pb2.ATTEMPT_STATE_FAILED, "X")
            small.said(device)
    recent = views.recent_attempts(small.leader.state, NAME)
    assert [it.state for it in recent[:11]] == [device_pb2.ATTEMPT_STATE_GRANTED] * 10 + [
        device_pb2.ATTEMPT_STATE_FAILED
    ]
    assert recent[10].device.endswith("/d49")
    assert len(recent) == 10 + 32


# Stages.


def test_an_approval_that_a_withdrawal_undid_is_asked_for_again(small: Small) -> None:
    small.start(small.stage(manual_approval=True, failure_limit=9, min_sample=2), small.stage("beta"))
    devices = [small.device(f"d{index}") for index in range(3)]
    names = [small.confirmed(device) for device in devices[:2]]
    small.beat(11)
    assert shown(small).state == Status.STATE_AWAITING_APPROVAL
    devices[0].report(device_pb2.ATTEMPT_STATE_FAILED, "SICK", names[0])
    small.said(devices[0])
    assert shown(small).state == Status.STATE_OPEN
    small.control("retry", "r")
    devices[0].running.CopyFrom(devices[2].running)
    small.confirmed(devices[0])
    small.beat(11)
    assert shown(small).state == Status.STATE_AWAITING_APPROVAL


def test_a_stalled_stage_still_passes_by_itself(small: Small) -> None:
    small.start(small.stage("canary", stall_after=20), small.stage("beta"))
    small.beat(22)
    assert shown(small).state == Status.STATE_STALLED
    small.confirmed(small.device())
    small.beat(11)
    assert shown(small).state == Status.STATE_PASSED


def test_a_stage_over_tags_takes_devices_with_any_of_them(small: Small) -> None:
    small.start(small.stage(tags=["lab", "west"]))
    for serial, tags, offered in (("a", ["lab"], True), ("b", ["west", "x"], True), ("c", ["x"], False)):
        assert small.claim(small.device(serial, tags=tags)).HasField("offer") is offered


def test_a_device_that_lost_the_stages_tags_gets_no_go(small: Small) -> None:
    small.start(small.stage(tags=["lab"]))
    device = small.device(tags=["lab"])
    small.granted(device)
    small.device_fact(device)
    answer = small.ask_go(device)
    assert [reason.code for reason in answer.reasons] == ["TAGS_NOT_MATCHED"]
    assert answer.answer == answer.ANSWER_CANCEL


def test_a_plan_of_many_devices_starts_with_a_handful_of_events(small: Small) -> None:
    world: World = small
    for index in range(500):
        small.device(f"d{index}")
    at = len(world.leader.log)
    small.create("r", "2.0.0", Rollout(stages=[small.stage()]))
    small.control("start", "r")
    own = [event for event in world.leader.log[at:] if event.resource == NAME]
    others = [event for event in world.leader.log[at:] if event.resource not in (NAME, cohort("canary"))]
    assert (len(own), others) == (3, [])
