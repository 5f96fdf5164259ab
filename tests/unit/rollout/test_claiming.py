"""Grants: no offer without one, and every reason for a refusal."""

from __future__ import annotations

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.device.v1 import device_pb2
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import events_pb2, rollout_pb2

from libs.errors import PermissionDeniedError
from tests.simulation.rollout.world import PRODUCT, Device, Rollout, bundle_name, device_name, fact, uid_of
from tests.unit.rollout.conftest import Small

GO = rollout_pb2.AuthorizeSwitchResponse
SWITCH = {"go": GO.ANSWER_GO, "wait": GO.ANSWER_WAIT, "cancel": GO.ANSWER_CANCEL}


def codes(result: rollout_pb2.ClaimResult) -> list[str]:
    return [reason.code for reason in result.reasons]


def test_a_grant_is_one_event_with_reasons_steps_and_where_the_device_came_from(small: Small) -> None:
    small.start()
    device = small.device()
    size = len(small.leader.log)
    result = small.claim(device)
    assert codes(result) == ["GRANTED"]
    granted = small.leader.log[-1].payload
    assert isinstance(granted, events_pb2.AttemptGranted)
    assert (granted.came_from_release, granted.in_flight_after, granted.cap) == (small.base["canary"], 1, 5)
    assert [step.code for step in granted.steps] == ["RESOLVED"]
    assert len(small.leader.log) == size + 2, "what it runs, and the grant"


def test_a_live_attempt_is_answered_again_without_a_new_grant_until_accepted(small: Small) -> None:
    small.start()
    device = small.device()
    first = small.claim(device).offer.attempt
    again = small.claim(device)
    assert again.offer.attempt == first
    device.take(again.offer)
    assert not small.claim(device).HasField("offer"), "accepted: the agent has it"
    assert sum(isinstance(event.payload, events_pb2.AttemptGranted) for event in small.leader.log) == 1


def test_a_hundred_polls_race_for_the_last_slot_and_one_gets_it(small: Small) -> None:
    small.start(small.stage(max_in_flight=1))
    devices = [small.device(f"d{index}") for index in range(100)]
    results = small.claim_many([(device, device.item(), None) for device in devices])
    assert sum(result.HasField("offer") for result in results) == 1
    assert codes(results[-1]) == ["STAGE_AT_CAPACITY"]
    assert results[-1].closed_for_ms > 0
    assert results[-1].closed_plan == f"{PRODUCT}/rollouts/r"


def test_a_refusal_writes_nothing(small: Small) -> None:
    small.start(small.stage(max_in_flight=1))
    small.granted(small.device("d1"))
    other = small.device("d2")
    small.claim(other)
    size = len(small.leader.log)
    assert codes(small.claim(other)) == ["STAGE_AT_CAPACITY"]
    assert len(small.leader.log) == size


def test_a_device_not_heard_of_is_told_to_come_back_and_never_created(small: Small) -> None:
    small.start()
    stranger = Device(device_name("new"), small.device().cohort, device_pb2.CheckInItem().running)
    result = small.claim(stranger, candidates=[])
    assert codes(result) == ["DEVICE_NOT_YET_KNOWN"]
    assert result.closed_for_ms == 2000
    assert stranger.name not in small.leader.state.devices


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({"quarantined": True}, "DEVICE_QUARANTINED"),
        ({"state": 2}, "DEVICE_RETIRED"),
        ({"uid": uid_of("x")}, "IDENTITY_MISMATCH"),
    ],
)
def test_a_device_that_takes_no_part_gets_nothing(small: Small, facts: dict[str, object], code: str) -> None:
    small.start()
    assert codes(small.claim(small.device(**facts))) == [code]


def test_a_device_of_another_cohort_is_refused_whatever_the_gateway_resolved(small: Small) -> None:
    small.start()
    stranger = small.device("d9", "beta")
    wanted = small.releases.candidates(small.device())
    assert codes(small.claim(stranger, candidates=wanted)) == ["COHORT_MISMATCH"]


def test_tags_count_and_rate_of_a_stage(small: Small) -> None:
    small.start(small.stage(tags=["blue"], count=1))
    assert codes(small.claim(small.device("d1"))) == ["TAGS_NOT_MATCHED"]
    small.granted(small.device("d2", tags=["blue", "red"]))
    assert codes(small.claim(small.device("d3", tags=["blue"]))) == ["COUNT_REACHED"]


def test_grants_per_minute_come_from_a_bucket_of_a_tenth_of_a_minute(small: Small) -> None:
    small.start(small.stage(max_grants_per_minute=20, max_in_flight=100))
    devices = [small.device(f"d{index}") for index in range(40)]
    results = small.claim_many([(device, device.item(), None) for device in devices])
    assert [result.HasField("offer") for result in results] == [True] * 2 + [False] * 38
    assert codes(results[2]) == ["STAGE_RATE_LIMITED"]
    assert results[2].closed_for_ms == 3_000, "the next token comes after a twentieth of a minute"
    small.leader.now_ms += 2_999
    assert codes(small.claim(devices[2])) == ["STAGE_RATE_LIMITED"]
    small.leader.now_ms += 1
    assert small.claim(devices[2]).HasField("offer")

    granted = 0
    for _ in range(600):  # a minute of everybody asking, ten times a second
        small.leader.now_ms += 100
        free = [device for device in devices if not small.leader.state.seen[device.name].live]
        if free:
            granted += small.claim(free[0]).HasField("offer")
    assert granted == 20


def test_a_share_takes_some_by_bucket_and_the_same_ones_again(small: Small) -> None:
    small.start(small.stage(share_ppm=500_000, max_in_flight=100))
    devices = [small.device(f"d{index}") for index in range(40)]
    inside = {device.name for device in devices if small.claim(device).HasField("offer")}
    assert 8 < len(inside) < 32
    assert inside == {device.name for device in devices if small.claim(device).HasField("offer")}


def test_a_refusal_on_the_security_floor_ends_the_list(small: Small) -> None:
    small.start()
    device = small.device()
    small.confirmed(device)
    assert small.leader.state.seen[device.name].floor == 1
    small.add_bundle("3.0.0", 0)
    low = small.add_release("canary", "3.0.0")
    small.add_bundle("2.5.0", 1)
    fine = small.add_release("canary", "2.5.0")
    asked = [releases_pb2.Candidate(release=name) for name in (low, fine)]
    assert codes(small.claim(device, candidates=asked)) == ["SECURITY_FLOOR"]
    assert small.claim(device, candidates=asked[1:]).HasField("offer")


def test_the_first_admissible_candidate_is_granted_and_the_refused_ones_are_in_the_receipt(small: Small) -> None:
    small.start()
    device = small.device()
    asked = [releases_pb2.Candidate(release=f"{device.cohort}/releases/ghost"), *small.releases.candidates(device)]
    result = small.claim(device, candidates=asked)
    assert codes(result) == ["RELEASE_NOT_YET_KNOWN", "GRANTED"]


def test_a_plain_release_is_an_implicit_plan_without_cap(small: Small) -> None:
    small.add_release("canary", "2.0.0", "plain")
    devices = [small.device(f"d{index}") for index in range(30)]
    results = small.claim_many([(device, device.item(), None) for device in devices])
    assert all(result.HasField("offer") for result in results)


def test_a_bundle_that_lost_its_signatures_is_not_offered_and_stops_at_go(small: Small) -> None:
    small.start()
    device = small.device()
    small.granted(device)
    small.add_bundle("2.0.0", 1, offerable=False)
    answer = small.ask_go(device)
    assert answer.answer == GO.ANSWER_CANCEL
    assert codes(small.claim(small.device("d2"))) == ["BUNDLE_NOT_OFFERABLE"]


def test_a_parked_record_of_its_resource_stops_a_grant(small: Small) -> None:
    small.start()
    device = small.device()
    small.leader.parked.add(device.cohort)
    assert codes(small.claim(device)) == ["RESOURCE_PARKED"]
    small.leader.parked.clear()
    assert small.claim(device).HasField("offer")


def test_a_leader_that_is_behind_grants_nothing_and_gives_no_go(small: Small) -> None:
    small.start()
    device = small.device()
    stale = small.claim_many([(device, device.item(), None)], lag_ms=2001)[0]
    assert codes(stale) == ["INBOX_STALE"]
    small.granted(device)
    assert small.ask_go(device, lag_ms=2001).answer == GO.ANSWER_WAIT


def test_an_override_is_granted_only_while_active_and_to_its_devices(small: Small) -> None:
    device, other = small.device("d1"), small.device("d2")
    name = f"{PRODUCT}/bundleOverrides/o1"
    override = releases_pb2.BundleOverride(
        name=name, bundle=bundle_name("2.0.0"), devices=[device.name], start_time=Timestamp(seconds=1)
    )
    small.leader.do(fact("releases", name, releases_events.BundleOverrideChanged(bundle_override=override)))
    asked = [releases_pb2.Candidate(bundle=override.bundle, bundle_override=name)]
    assert codes(small.claim(other, candidates=asked)) == ["OVERRIDE_MISMATCH"]
    offer = small.claim(device, candidates=asked).offer
    assert (offer.release, offer.bundle) == ("", override.bundle)
    gone = releases_events.BundleOverrideChanged(bundle_override=override, deleted=True)
    small.leader.do(fact("releases", name, gone))
    device.take(offer)
    assert small.ask_go(device).answer == GO.ANSWER_CANCEL


# Leave to switch.


def test_go_is_in_the_log_before_it_is_given_and_a_repeat_commits_again(small: Small) -> None:
    small.start()
    device = small.device()
    name = small.granted(device)
    for _ in range(2):
        assert small.ask_go(device).answer == GO.ANSWER_GO
        device.reports.clear()
        assert isinstance(small.leader.log[-1].payload, events_pb2.GoGiven)
    assert small.attempt(name).go


def test_a_strangers_attempt_is_an_error(small: Small) -> None:
    small.start()
    name = small.granted(small.device("d1"))
    with pytest.raises(PermissionDeniedError) as refused:
        small.ask_go(small.device("d2"), name)
    assert refused.value.reason == "ATTEMPT_NOT_YOURS"


@pytest.mark.parametrize(
    ("verb", "answer", "code"),
    [
        ("pause", "wait", "ROLLOUT_PAUSED"),
        ("abort", "cancel", "ATTEMPT_ENDED"),
        ("roll_back", "cancel", "ATTEMPT_ENDED"),
    ],
)
def test_a_device_that_asks_after_the_rollout_was_stopped(small: Small, verb: str, answer: str, code: str) -> None:
    small.start()
    device = small.device()
    small.granted(device)
    small.control(verb, "r")
    said = small.ask_go(device)
    assert said.answer == SWITCH[answer]
    assert said.reasons[0].code == code


def test_after_go_nothing_is_cancelled_but_a_device_that_asks_again_is_told_to_forget_it(small: Small) -> None:
    small.start()
    device = small.device()
    name = small.granted(device)
    small.ask_go(device)
    small.control("abort", "r")
    assert small.attempt(name).in_flight
    assert small.ask_go(device).answer == GO.ANSWER_CANCEL
    assert small.attempt(name).state == device_pb2.ATTEMPT_STATE_FAILED


def test_a_device_that_slept_through_its_lease_gets_no_go(small: Small) -> None:
    small.start(small.stage(max_in_flight=1))
    sleeper, other = small.device("d1"), small.device("d2")
    small.granted(sleeper)
    small.beat(31)
    small.granted(other)
    said = small.ask_go(sleeper)
    assert said.answer == GO.ANSWER_CANCEL
    assert small.counts().in_flight == 1


def test_live_attempts_beyond_a_stage_that_re_opened_wait(small: Small) -> None:
    small.start(small.stage("canary", failure_limit=2, soak=1), small.stage("beta"))
    first, later = small.device("d1"), small.device("d2", "beta")
    confirmed = small.confirmed(first)
    small.beat(2)
    small.releases.run_tasks()
    small.granted(later)
    first.report(device_pb2.ATTEMPT_STATE_FAILED, "UNHEALTHY", confirmed)
    small.said(first)
    assert small.leader.plan("r").current_stage == 0
    said = small.ask_go(later)
    assert (said.answer, said.reasons[0].code) == (GO.ANSWER_WAIT, "STAGE_NOT_CURRENT")
    assert codes(small.claim(small.device("d3", "beta"))) == ["STAGE_NOT_CURRENT"]
    small.confirmed(small.device("d4"))
    small.beat(2)
    assert small.leader.plan("r").current_stage == 0, "one of two is not all"


def test_pause_stops_grants_and_resume_goes_on(small: Small) -> None:
    small.start()
    device = small.device()
    epoch = small.leader.plan("r").control_epoch
    assert small.control("pause", "r").control_epoch == epoch + 1
    refused = small.claim(device)
    assert codes(refused) == ["ROLLOUT_PAUSED"]
    small.control("resume", "r")
    assert small.claim(device).HasField("offer")
    assert small.leader.plan("r").state == Rollout.STATE_RUNNING


def test_a_failed_device_gets_no_further_attempt_at_that_release(small: Small) -> None:
    small.start(small.stage(failure_limit=9))
    device = small.device()
    small.granted(device)
    device.report(device_pb2.ATTEMPT_STATE_FAILED, "NO_SPACE")
    device.end()
    small.said(device)
    assert codes(small.claim(device)) == ["ALREADY_FAILED"]


def test_an_agent_that_works_on_an_expired_attempt_first_forgets_it_and_is_then_offered_anew(small: Small) -> None:
    small.start()
    device = small.device()
    name = small.granted(device)
    small.beat(31)
    told = small.claim(device)
    assert (told.cancel_attempt, told.HasField("offer")) == (name, False)
    device.end()
    offer = small.claim(device).offer
    assert offer.attempt not in ("", name)
    assert small.attempt(offer.attempt).ordinal == 2


def test_a_device_whose_attempt_went_dark_gets_no_other_before_the_outcome_is_known(small: Small) -> None:
    small.start(small.stage(failure_limit=9))
    device = small.device()
    name = small.granted(device)
    small.ask_go(device)
    device.reports.clear()
    small.beat(30)
    assert codes(small.claim(device)) == ["WENT_DARK"]
    assert small.ask_go(device).answer == GO.ANSWER_CANCEL
    device.end()
    assert codes(small.claim(device)) == ["ALREADY_FAILED"]
    assert small.attempt(name).state == device_pb2.ATTEMPT_STATE_REVERTED
    assert small.counts().dark == 0
