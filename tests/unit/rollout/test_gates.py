"""Stages, gates, halting, rolling back, completion."""

from __future__ import annotations

import pytest
from groundswell.device.v1 import device_pb2
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import events_pb2, rollout_pb2

from libs.errors import AbortedError, FailedPreconditionError, InvalidArgumentError
from services.rollout.domain import Control, StageReleaseRefused, gates
from services.rollout.domain.state import Counts
from tests.simulation.rollout.world import PRODUCT, Rollout, Status
from tests.unit.rollout.conftest import Small

FAILED = device_pb2.ATTEMPT_STATE_FAILED
Gate = rollout_pb2.Gate
NAME = f"{PRODUCT}/rollouts/r"


def test_the_limit_counts_failures_of_every_kind() -> None:
    gate = Gate(failure_limit=3)
    assert not gates.tripped(gate, Counts(failed=1, reverted=1))
    assert gates.tripped(gate, Counts(failed=1, reverted=1, dark=1)) == "FAILURE_LIMIT"


def test_the_share_counts_only_once_the_sample_is_there() -> None:
    gate = Gate(failure_limit=100, failure_limit_ppm=200_000, min_sample=10)
    assert not gates.tripped(gate, Counts(confirmed=3, failed=2))
    assert gates.tripped(gate, Counts(confirmed=8, failed=2)) == "FAILURE_LIMIT_SHARE"
    assert not gates.tripped(gate, Counts(confirmed=9, failed=1))


def test_soaked_confirmations_pass_and_others_do_not() -> None:
    gate = Gate(min_sample=2, success_ppm=500_000)
    assert not gates.passes(gate, Counts(confirmed=2, soaked=0))
    assert not gates.passes(gate, Counts(confirmed=1, soaked=1))
    assert gates.passes(gate, Counts(confirmed=1, soaked=1, failed=1))


def fail(small: Small, device, attempt: str) -> None:  # type: ignore[no-untyped-def]
    device.report(FAILED, "UNHEALTHY", attempt)
    small.said(device)


def test_the_third_failure_trips_a_limit_of_three_and_the_next_device_gets_nothing(small: Small) -> None:
    small.start(small.stage(failure_limit=3))
    pairs = [(device := small.device(f"d{index}"), small.confirmed(device)) for index in range(3)]
    for device, attempt in pairs[:2]:
        fail(small, device, attempt)
    assert small.leader.plan("r").state == Rollout.STATE_RUNNING
    epoch = small.leader.plan("r").control_epoch
    fail(small, *pairs[2])
    plan = small.leader.plan("r")
    assert (plan.state, plan.state_reason, plan.control_epoch) == (Rollout.STATE_HALTED, "FAILURE_LIMIT", epoch + 1)
    refused = small.claim(small.device("d9"))
    assert [reason.code for reason in refused.reasons] == ["ROLLOUT_HALTED"]


def test_a_failure_in_this_very_check_in_trips_before_anything_is_granted(small: Small) -> None:
    small.start(small.stage(failure_limit=1))
    bad, other = small.device("d1"), small.device("d2")
    attempt = small.confirmed(bad)
    bad.report(FAILED, "UNHEALTHY", attempt)
    results = small.claim_many([(bad, bad.item(), []), (other, other.item(), None)])
    assert not results[1].HasField("offer")


def test_a_stage_passes_after_soak_and_the_next_opens_by_a_task(small: Small) -> None:
    small.start(small.stage("canary"), small.stage("beta"))
    small.confirmed(small.device())
    assert small.counts(1).state == Status.STATE_PENDING
    assert all(release.rollout == "" for release in small.releases.graphs[small.stage("beta").cohort])
    small.beat(11)
    assert small.counts(0).state == Status.STATE_PASSED
    assert small.counts(1).state == Status.STATE_OPENING
    small.releases.run_tasks()
    assert small.counts(1).state == Status.STATE_OPEN
    assert small.counts(1).release.endswith("/cohorts/beta/releases/r-2")
    small.granted(small.device("d2"))
    assert small.counts(0).in_flight == 1, "a passed stage stays open for stragglers"


def test_two_stages_of_one_cohort_share_its_release(small: Small) -> None:
    small.start(small.stage("canary", count=1), small.stage(display_name="rest"))
    small.confirmed(small.device())
    small.beat(11)
    plan = small.leader.plan("r")
    assert plan.current_stage == 1
    assert plan.stage_statuses[1].state == Status.STATE_OPEN
    assert plan.stage_statuses[0].release == plan.stage_statuses[1].release
    assert small.attempt(small.granted(small.device("d2"))).stage == 1


def test_manual_approval_waits_for_an_operator(small: Small) -> None:
    small.start(small.stage("canary", manual_approval=True), small.stage("beta"))
    small.confirmed(small.device())
    small.beat(11)
    assert small.counts(0).state == Status.STATE_AWAITING_APPROVAL
    small.control("advance", "r")
    assert small.counts(0).state == Status.STATE_PASSED
    assert small.counts(1).state == Status.STATE_OPEN


def test_a_stage_that_cannot_pass_in_its_time_stalls_and_is_advanced_with_a_reason(small: Small) -> None:
    small.start(small.stage("canary", stall_after=20), small.stage("beta"))
    small.beat(22)
    assert small.counts(0).state == Status.STATE_STALLED
    with pytest.raises(InvalidArgumentError):
        small.control("advance", "r")
    small.control("advance", "r", "nobody polls at night")
    assert small.leader.plan("r").current_stage == 1


def test_a_rollout_completes_when_the_last_gate_passed_and_none_is_in_flight(small: Small) -> None:
    small.start()
    small.confirmed(small.device("d1"))
    straggler = small.device("d2")
    small.granted(straggler)
    small.beat(11)
    assert small.leader.plan("r").state == Rollout.STATE_RUNNING
    straggler.report(device_pb2.ATTEMPT_STATE_INSTALLED)
    small.ask_go(straggler)
    straggler.reports.clear()
    straggler.switch()
    small.said(straggler)
    assert small.leader.plan("r").state == Rollout.STATE_COMPLETED
    small.releases.run_tasks()
    assert small.claim(small.device("d3")).HasField("offer"), "the release became a plain one"


def test_withdrawals_after_completion_count_for_one_soak_and_are_events_only_later(small: Small) -> None:
    small.start()
    early, late = small.device("d1"), small.device("d2")
    names = [small.confirmed(early), small.confirmed(late)]
    small.beat(11)
    assert small.leader.plan("r").state == Rollout.STATE_COMPLETED
    fail(small, early, names[0])
    assert (small.counts().failed, small.counts().confirmed) == (1, 1)
    small.beat(12)
    fail(small, late, names[1])
    assert small.attempt(names[1]).state == FAILED
    assert (small.counts().failed, small.counts().confirmed) == (1, 1)


def test_a_resume_after_a_halt_accepts_the_failures_so_far(small: Small) -> None:
    small.start(small.stage(failure_limit=1))
    device = small.device("d1")
    fail(small, device, small.confirmed(device))
    assert small.leader.plan("r").state == Rollout.STATE_HALTED
    small.control("resume", "r")
    assert small.leader.plan("r").state == Rollout.STATE_RUNNING
    other = small.device("d2")
    fail(small, other, small.confirmed(other))
    assert small.leader.plan("r").state == Rollout.STATE_HALTED


def test_a_conflict_on_the_release_of_a_stage_halts_with_its_reason(small: Small) -> None:
    image = Rollout(stages=[small.stage()])
    small.create("r", "2.0.0", image)
    small.leader.do(Control("start", NAME))
    task = next(iter(small.leader.tasks))
    small.leader.do(StageReleaseRefused(task, "RELEASE_CONFLICT"))
    plan = small.leader.plan("r")
    assert (plan.state, plan.state_reason) == (Rollout.STATE_HALTED, "RELEASE_CONFLICT")
    assert not small.leader.tasks


# Rolling back.


def test_rolling_back_goes_under_the_cap_to_where_each_came_from(low: Small) -> None:
    small = low
    small.start(small.stage(max_in_flight=2, failure_limit=9), back=True)
    devices = [small.device(f"d{index}") for index in range(4)]
    for device in devices:
        small.confirmed(device)
    small.control("roll_back", "r")
    results = [small.claim(device) for device in devices]
    assert [result.HasField("offer") for result in results] == [True, True, False, False]
    assert results[0].offer.kind == rollout_pb2.Attempt.KIND_ROLLBACK
    assert results[0].offer.release == small.base["canary"]
    assert [reason.code for reason in results[3].reasons] == ["STAGE_AT_CAPACITY"]
    assert small.counts().in_flight == 2


@pytest.fixture
def low() -> Small:
    """2.0.0 raises no floor, so that going back is allowed."""
    world = Small()
    world.add_bundle("2.0.0", 0)
    return world


def test_every_device_comes_back_and_then_the_rollout_is_rolled_back(low: Small) -> None:
    low.start(low.stage(failure_limit=9), back=True)
    devices = [low.device(f"d{index}") for index in range(3)]
    for device in devices:
        low.confirmed(device)
    low.control("roll_back", "r")
    for index, device in enumerate(devices):
        assert low.leader.plan("r").state == Rollout.STATE_ROLLING_BACK, index
        low.confirmed(device)
    plan = low.leader.plan("r")
    assert plan.state == Rollout.STATE_ROLLED_BACK
    assert (plan.stage_statuses[0].rolled_back, plan.stage_statuses[0].in_flight) == (3, 0)
    assert {device.running.release for device in devices} == {low.base["canary"]}
    published = [it.change for _, it in low.leader.public if isinstance(it, events_pb2.AttemptChanged)]
    assert published.count("device.rolled_back") == 3


def test_a_device_behind_the_security_floor_is_held_once_and_listed(small: Small) -> None:
    small.start(small.stage(failure_limit=9), back=True)
    device = small.device()
    small.confirmed(device)
    small.control("roll_back", "r")
    for _ in range(2):
        refused = small.claim(device)
        assert [reason.code for reason in refused.reasons] == ["SECURITY_FLOOR"]
    held = [event.payload for event in small.leader.log if isinstance(event.payload, events_pb2.DeviceHeld)]
    assert [it.device for it in held] == [device.name]
    assert small.counts().held == 1
    assert small.leader.plan("r").state == Rollout.STATE_ROLLED_BACK, "held devices are not waited for"


def test_a_device_that_came_from_no_release_is_held(low: Small) -> None:
    low.start(low.stage(failure_limit=9), back=True)
    factory = low.add_device("f1", "canary", version="1.0.0")
    low.confirmed(factory)
    low.control("roll_back", "r")
    assert [reason.code for reason in low.claim(factory).reasons] == ["CAME_FROM_NO_RELEASE"]


def test_a_rollback_is_refused_while_the_release_is_not_retracted(low: Small) -> None:
    low.start(low.stage(failure_limit=9))
    device = low.device()
    low.confirmed(device)
    asked = [releases_pb2.Candidate(rollback_of=device.running.release)]
    assert [reason.code for reason in low.claim(device, candidates=asked).reasons] == ["RELEASE_NOT_RETRACTED"]


def test_stopping_many_attempts_is_done_in_chunks(small: Small) -> None:
    small.start(small.stage(max_in_flight=2000))
    devices = [small.device(f"d{index}") for index in range(1100)]
    small.claim_many([(device, device.item(), None) for device in devices])
    small.leader.sizes.clear()
    small.control("abort", "r")
    assert small.counts().in_flight == 0
    assert small.leader.plan("r").state == Rollout.STATE_ABORTED
    assert len(small.leader.sizes) >= 3
    assert max(small.leader.sizes) <= 505


# What a plan must satisfy.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"min_sample": 6, "count": 5}, "MIN_SAMPLE_UNREACHABLE"),
        ({"share_ppm": 5, "count": 5}, "INVALID_FIELD"),
        ({"cohort": "organizations/other/products/p/cohorts/c"}, "INVALID_FIELD"),
        ({"display_name": ""}, "INVALID_FIELD"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_at_creation(
    small: Small, change: dict[str, object], reason: str
) -> None:
    size = len(small.leader.log)
    with pytest.raises(InvalidArgumentError) as refused:
        small.create("r", "2.0.0", Rollout(stages=[small.stage(**change)]))
    assert refused.value.reason == reason
    assert len(small.leader.log) == size


def test_one_active_rollout_per_cohort(small: Small) -> None:
    small.start()
    small.create("r2", "2.0.0", Rollout(stages=[small.stage()]))
    with pytest.raises(FailedPreconditionError) as refused:
        small.control("start", "r2")
    assert refused.value.reason == "COHORT_BUSY"
    small.control("abort", "r")
    small.control("start", "r2")


def test_a_stale_etag_and_a_wrong_state_are_refused(small: Small) -> None:
    small.start()
    with pytest.raises(AbortedError):
        small.leader.do(Control("pause", NAME, etag="1"))
    with pytest.raises(FailedPreconditionError) as refused:
        small.control("start", "r")
    assert refused.value.reason == "WRONG_STATE"
    small.leader.do(Control("pause", NAME, etag=small.leader.plan("r").etag))
