"""What devices say: counters, forks, instances, reports, silence; each rule against the failure it forbids."""

from __future__ import annotations

import pytest
from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import registry_pb2
from groundswell.rollout.v1 import events_pb2, rollout_pb2

from libs.errors import InvalidArgumentError
from services.rollout.domain import AuthorizeSwitch, AuthorizeSwitches, RecordObservations
from services.rollout.domain.state import DUE_BUCKET_MS
from tests.simulation.rollout.world import GATEWAY, Rollout
from tests.unit.rollout.conftest import Small

FAILED = device_pb2.ATTEMPT_STATE_FAILED
CONFIRMED = device_pb2.ATTEMPT_STATE_CONFIRMED
REVERTED = device_pb2.ATTEMPT_STATE_REVERTED
EXPIRED = device_pb2.ATTEMPT_STATE_EXPIRED
DARK = device_pb2.ATTEMPT_STATE_WENT_DARK
INSTALLED = device_pb2.ATTEMPT_STATE_INSTALLED
BOOTED = device_pb2.ATTEMPT_STATE_BOOTED


def test_the_same_check_in_twice_changes_nothing(small: Small) -> None:
    small.start()
    device = small.device()
    small.granted(device)
    item = device.item()
    small.claim(device, item, [])
    size = len(small.leader.log)
    small.claim(device, item, [])
    small.append(item)
    small.deliver()
    assert [type(event.payload).__name__ for event in small.leader.log[size:]] == ["ObservationsRecorded"]


def test_an_old_report_never_overwrites_what_runs(small: Small) -> None:
    device = small.device()
    old = device.item()
    device.running.version = "1.1.0"
    small.said(device)
    small.claim(device, old, [])
    assert small.leader.state.seen[device.name].running.version == "1.1.0"


def test_an_older_item_that_the_stream_brings_late_still_moves_its_attempt(small: Small) -> None:
    small.start()
    device = small.device()
    name = small.granted(device)
    late = device.item()
    device.reports.clear()
    small.claim(device, device.item(), [])
    assert small.attempt(name).state == device_pb2.ATTEMPT_STATE_GRANTED
    small.append(late)
    small.deliver()
    assert small.attempt(name).state == device_pb2.ATTEMPT_STATE_ACCEPTED


def test_the_same_counter_with_another_body_is_a_fork_and_ends_grants(small: Small) -> None:
    small.start()
    device = small.device()
    item = device.item()
    small.claim(device, item, [])
    twin = device_pb2.CheckInItem()
    twin.CopyFrom(item)
    twin.body_sha256 = b"x" * 32
    small.claim(device, twin, [])
    result = small.claim(device)
    assert [reason.code for reason in result.reasons] == ["IDENTITY_CLONED"]
    published = [it.change for _, it in small.leader.public if isinstance(it, events_pb2.DeviceReported)]
    assert published.count("identity.cloned") == 1


def test_a_new_instance_restarts_the_counter_and_the_old_one_never_returns(small: Small) -> None:
    device = small.device()
    device.counter = 100
    small.said(device)
    ghost = device.item()
    device.instance, device.counter = "two", 0
    device.running.version = "1.2.0"
    small.said(device)
    ghost.running.version = "9.9.9"
    small.claim(device, ghost, [])
    seen = small.leader.state.seen[device.name]
    assert (seen.instance, seen.running.version) == ("two", "1.2.0")


def test_reports_only_move_forward(small: Small) -> None:
    small.start()
    device = small.device()
    name = small.granted(device)
    device.report(INSTALLED)
    device.report(device_pb2.ATTEMPT_STATE_DOWNLOADING)
    small.said(device)
    assert small.attempt(name).state == INSTALLED


def test_a_boot_without_go_is_not_believed(small: Small) -> None:
    small.start()
    device = small.device()
    name = small.granted(device)
    device.switch()
    small.said(device)
    assert small.attempt(name).state == device_pb2.ATTEMPT_STATE_ACCEPTED
    assert small.counts().confirmed == 0


def test_a_confirmation_counts_only_from_the_new_firmware(small: Small) -> None:
    small.start()
    device = small.device()
    name = small.granted(device)
    small.ask_go(device)
    device.report(BOOTED)
    device.report(CONFIRMED)
    small.said(device)
    assert small.attempt(name).state == BOOTED, "it still says it runs the old release"


def test_a_change_of_what_runs_is_published_once(small: Small) -> None:
    device = small.device()
    small.said(device)
    small.said(device)
    reported = [it for _, it in small.leader.public if isinstance(it, events_pb2.DeviceReported)]
    assert [it.change for it in reported] == ["device.release_changed"]


# Withdrawn.


@pytest.mark.parametrize("how", ["unhealthy", "silent", "other firmware"])
def test_a_confirmation_is_withdrawn(small: Small, how: str) -> None:
    small.start(small.stage(failure_limit=9, soak=60))
    device = small.device()
    name = small.confirmed(device)
    if how == "unhealthy":
        device.report(FAILED, "UNHEALTHY", name)
        small.said(device)
    elif how == "silent":
        small.beat(25)
    else:
        device.running.release, device.running.version = small.base["canary"], "1.0.0"
        small.said(device)
    attempt, counts = small.attempt(name), small.counts()
    expected = {"unhealthy": FAILED, "silent": DARK, "other firmware": REVERTED}[how]
    assert (attempt.state, attempt.withdrawn, counts.withdrawn, counts.confirmed) == (expected, True, 1, 0)
    assert counts.in_flight == 0


def test_running_another_release_by_a_later_attempt_that_reached_go_withdraws_nothing(small: Small) -> None:
    small.start()
    device = small.device()
    first = small.confirmed(device)
    small.add_bundle("3.0.0", 1)
    small.add_release("canary", "3.0.0")
    small.confirmed(device)
    assert small.attempt(first).state == CONFIRMED


def test_a_dark_device_that_shows_up_moves_the_count_and_never_back_in_flight(small: Small) -> None:
    small.start(small.stage(failure_limit=9))
    device = small.device()
    name = small.granted(device)
    small.ask_go(device)
    device.reports.clear()
    small.beat(30)
    assert small.attempt(name).state == DARK
    assert (small.counts().dark, small.counts().in_flight) == (1, 0)
    device.switch()
    small.said(device)
    assert small.attempt(name).state == CONFIRMED
    assert (small.counts().dark, small.counts().confirmed, small.counts().in_flight) == (0, 1, 0)


# Stream time.


def test_the_third_expiry_of_a_claim_is_a_failure(small: Small) -> None:
    small.start(small.stage(failure_limit=9))
    device = small.device()
    states = []
    for _ in range(3):
        name = small.claim(device).offer.attempt
        small.beat(31)
        states.append(small.attempt(name).state)
    assert states == [EXPIRED, EXPIRED, FAILED]
    assert not small.claim(device).HasField("offer")


def test_progress_renews_the_lease_up_to_a_maximum(small: Small) -> None:
    small.start()
    device = small.device()
    name = small.granted(device)
    for _ in range(6):
        small.beat(19)
        if small.attempt(name).in_flight:
            device.report(device_pb2.ATTEMPT_STATE_DOWNLOADING)
            small.said(device)
    assert small.attempt(name).state == EXPIRED
    assert 95_000 <= small.leader.state.stream_ms <= 120_000


def test_nothing_passes_or_trips_by_the_clock_while_the_stream_stands_still(small: Small) -> None:
    small.start()
    device = small.device()
    name = small.confirmed(device)
    small.beat(1)
    small.leader.now_ms += 3_600_000
    small.append(gateway=GATEWAY, heartbeat=True)
    small.deliver()
    assert small.attempt(name).state == CONFIRMED
    assert not small.attempt(name).soaked
    assert small.leader.state.stream_ms <= 3_000, "an hour of outage is two seconds at most"


def test_one_silent_gateway_stops_the_clock_until_it_is_lost_and_its_devices_are_excused(small: Small) -> None:
    other = "organizations/platform/gateways/g2"
    small.start(small.stage(failure_limit=9, soak=100))
    name = small.confirmed(small.device())
    small.beat(3, gateways=(GATEWAY, other))
    before = small.leader.state.stream_ms
    small.beat(9, gateways=(other,))
    assert small.leader.state.stream_ms - before <= 2_000
    small.beat(3, gateways=(other,))
    assert GATEWAY in small.leader.state.lost
    small.beat(15, gateways=(other,))
    assert small.attempt(name).state == CONFIRMED, "its silence counts from the loss of its gateway"
    small.beat(12, gateways=(other,))
    assert small.attempt(name).state == DARK
    small.beat(1, gateways=(GATEWAY, other))
    assert GATEWAY not in small.leader.state.lost


def test_positions_up_to_the_watermark_change_nothing(small: Small) -> None:
    device = small.device()
    small.append(device.item())
    small.beat(1)
    size, state = len(small.leader.log), small.leader.state
    request = rollout_pb2.RecordObservationsRequest(
        source_partition=0, records=small.stream, through_position=small.stream[-1].position
    )
    answer = small.leader.do(RecordObservations(request, "~0"), "~0")
    assert len(small.leader.log) == size
    assert small.leader.state is state
    assert answer.through_position == small.stream[-1].position  # type: ignore[union-attr]


def test_the_stream_of_another_partition_is_refused(small: Small) -> None:
    request = rollout_pb2.RecordObservationsRequest(source_partition=3, through_position=4)
    with pytest.raises(InvalidArgumentError):
        small.leader.do(RecordObservations(request, "~0"), "~0")


def test_a_worker_that_catches_up_judges_silence_in_the_order_of_the_stream(small: Small) -> None:
    """Minutes of backlog in one call: the check-ins in it count where they stand, not at the end."""
    small.start(small.stage(soak=300))
    device = small.device()
    name = small.confirmed(device)
    for _ in range(60):
        small.leader.now_ms += 1000
        small.append(gateway=GATEWAY, heartbeat=True)
        small.append(device.item())
    small.deliver()
    assert small.attempt(name).state == CONFIRMED
    assert small.leader.plan("r").state == Rollout.STATE_RUNNING


def _names(small: Small, start: int) -> list[str]:
    return [type(event.payload).__name__ for event in small.leader.log[start:]]


def test_a_check_in_that_reports_a_step_is_one_event(small: Small) -> None:
    small.start()
    device = small.device()
    name = small.granted(device)
    size = len(small.leader.log)
    item = device.item()
    small.claim(device, item, [])
    assert _names(small, size) == ["AttemptMoved"]
    assert small.leader.log[-1].payload.observed.counter == item.counter
    assert small.leader.state.seen[device.name].counter == item.counter
    assert small.attempt(name).state == device_pb2.ATTEMPT_STATE_ACCEPTED


def test_a_check_in_that_reports_two_steps_says_what_it_saw_once(small: Small) -> None:
    small.start()
    device = small.device()
    small.granted(device)
    device.report(device_pb2.ATTEMPT_STATE_DOWNLOADED)
    size = len(small.leader.log)
    small.claim(device, device.item(), [])
    assert _names(small, size) == ["AttemptMoved", "AttemptMoved"]
    assert [event.payload.HasField("observed") for event in small.leader.log[size:]] == [True, False]


def test_a_report_that_is_no_step_does_not_hide_the_check_in(small: Small) -> None:
    small.start()
    device = small.device()
    small.granted(device)
    device.reports.clear()
    device.report(INSTALLED, attempt="organizations/acme/products/thermostat/devices/d1/attempts/unknown")
    size = len(small.leader.log)
    item = device.item()
    small.claim(device, item, [])
    assert _names(small, size) == ["DeviceObserved"]
    assert small.leader.state.seen[device.name].counter == item.counter


def test_a_confirmation_says_with_its_first_step_that_something_else_runs(small: Small) -> None:
    small.start()
    device = small.device()
    small.granted(device)
    small.ask_go(device)
    device.reports.clear()
    device.switch()
    size, told = len(small.leader.log), len(small.leader.public)
    small.said(device)
    assert _names(small, size)[:2] == ["AttemptMoved", "AttemptMoved"]
    assert [event.payload.HasField("observed") for event in small.leader.log[size : size + 2]] == [True, False]
    changes = [it.change for _, it in small.leader.public[told:] if hasattr(it, "change")]
    assert changes[:2] == ["device.release_changed", "device.update_confirmed"]
    small.leader.replay()


def test_running_something_else_without_a_step_is_told_by_itself(small: Small) -> None:
    small.start()
    device = small.device()
    small.granted(device)
    device.reports.clear()
    device.running = registry_pb2.ReportedState(version="0.9.0", security_version=1)
    size = len(small.leader.log)
    small.said(device)
    assert _names(small, size)[:1] == ["DeviceObserved"]


def test_leave_to_switch_holds_the_check_in_that_asked(small: Small) -> None:
    small.start()
    device = small.device()
    name = small.granted(device)
    device.reports.clear()
    size = len(small.leader.log)
    small.beat(3)
    item = device.item()
    request = rollout_pb2.AuthorizeSwitchRequest(organization="acme", attempt=name, device=device.name, check_in=item)
    answer = small.leader.do(AuthorizeSwitch(request, 0))
    assert isinstance(answer, rollout_pb2.AuthorizeSwitchResponse)
    assert answer.answer == rollout_pb2.AuthorizeSwitchResponse.ANSWER_GO
    assert [name for name in _names(small, size) if name != "ObservationsRecorded"] == ["GoGiven"]
    seen = small.leader.state.seen[device.name]
    assert (seen.counter, seen.last_seen_ms) == (item.counter, small.leader.state.stream_ms)
    small.leader.replay()


def test_a_second_agent_under_the_counter_of_a_claim_is_found_out(small: Small) -> None:
    small.start()
    device = small.device()
    small.said(device)
    item = device.item()
    assert small.claim(device, item).HasField("offer")
    small.append(item)
    small.deliver()
    other = device_pb2.CheckInItem.FromString(item.SerializeToString())
    other.body_sha256 = b"another body".ljust(32)
    small.append(other)
    small.deliver()
    assert small.leader.state.seen[device.name].cloned


def test_a_refused_switch_holds_it_too(small: Small) -> None:
    small.start()
    device = small.device()
    name = small.granted(device)
    device.reports.clear()
    small.add_device("d1", "canary", release=small.base["canary"], quarantined=True)
    item = device.item()
    size = len(small.leader.log)
    request = rollout_pb2.AuthorizeSwitchRequest(organization="acme", attempt=name, device=device.name, check_in=item)
    answer = small.leader.do(AuthorizeSwitch(request, 0))
    assert isinstance(answer, rollout_pb2.AuthorizeSwitchResponse)
    assert answer.answer == rollout_pb2.AuthorizeSwitchResponse.ANSWER_WAIT
    assert _names(small, size) == ["DeviceObserved"]
    assert small.leader.state.seen[device.name].counter == item.counter


def test_a_deadline_that_signs_of_life_moved_comes_when_it_is_due_and_not_before(small: Small) -> None:
    small.start()
    device = small.device()
    name = small.granted(device)  # a lease of 30 s
    first = small.attempt(name).bucket
    for _ in range(2):
        small.beat(20)
        device.report(device_pb2.ATTEMPT_STATE_DOWNLOADING)
        small.append(device.item())
        device.reports.clear()
        small.deliver()
    assert first < small.attempt(name).bucket <= small.attempt(name).due_ms // DUE_BUCKET_MS
    assert small.attempt(name).in_flight
    small.leader.replay()
    small.beat(29)
    assert small.attempt(name).in_flight
    small.beat(2)
    assert small.attempt(name).state == EXPIRED
    small.leader.replay()


def test_of_many_that_ask_to_switch_each_is_decided_for_itself(small: Small) -> None:
    small.start()
    one, two = small.device("d1"), small.device("d2")
    mine, other = small.granted(one), small.granted(two)
    Ask = rollout_pb2.AuthorizeSwitchRequest  # noqa: N806 - a class
    request = rollout_pb2.BatchAuthorizeSwitchRequest(
        organization="acme",
        requests=[
            Ask(organization="acme", attempt=other, device=one.name),
            Ask(organization="acme", attempt=other, device=two.name, check_in=one.item()),
            Ask(organization="acme", attempt=mine, device=one.name),
            Ask(organization="acme", attempt=f"{one.name}/attempts/none", device=one.name),
        ],
    )
    size = len(small.leader.log)
    answer = small.leader.do(AuthorizeSwitches(request))
    assert isinstance(answer, rollout_pb2.BatchAuthorizeSwitchResponse)
    assert [result.refusal.code for result in answer.results] == ["ATTEMPT_NOT_YOURS", "IDENTITY_MISMATCH", "", ""]
    assert answer.results[2].response.answer == rollout_pb2.AuthorizeSwitchResponse.ANSWER_GO
    assert answer.results[3].response.answer == rollout_pb2.AuthorizeSwitchResponse.ANSWER_CANCEL
    assert _names(small, size) == ["GoGiven"]
