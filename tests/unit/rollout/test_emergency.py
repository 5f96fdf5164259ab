"""Expedited rollouts, the kill switch, retries: the rules of an emergency."""

from __future__ import annotations

import pytest
from groundswell.device.v1 import device_pb2
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import events_pb2, rollout_pb2

from libs.errors import DomainError, FailedPreconditionError
from services.rollout.domain import Control, RetryAttempt
from services.rollout.domain.admission import RETRY_BUDGET
from services.rollout.domain.stages import TASK_DISABLE
from services.rollout.domain.state import CANCELLED, EXPIRED, FAILED
from tests.simulation.rollout.world import PRODUCT, Device, Rollout, Status, bundle_name, cohort, fact
from tests.unit.rollout.conftest import Small

Answer = rollout_pb2.AuthorizeSwitchResponse
NAME = f"{PRODUCT}/rollouts/r"
FIX = f"{PRODUCT}/rollouts/fix"


def codes(result) -> list[str]:  # type: ignore[no-untyped-def]
    return [reason.code for reason in result.reasons]


def start_fix(small: Small, *stages: rollout_pb2.Stage, rollout_id: str = "fix") -> None:
    if "3.0.0" not in "".join(small.leader.state.bundles):
        small.add_bundle("3.0.0", 1)
    image = Rollout(stages=stages or [small.stage(tags=["exposed"])], expedited=True)
    small.create(rollout_id, "3.0.0", image)
    small.control("start", rollout_id)


def plan(small: Small, rollout_id: str = "r") -> Rollout:
    return small.leader.plan(rollout_id)


def fail(small: Small, device: Device) -> str:
    name = small.granted(device)
    device.report(device_pb2.ATTEMPT_STATE_FAILED, "NO_SPACE")
    small.said(device)
    device.end()
    return name


# Superseding.


def test_an_expedited_rollout_pauses_the_running_one_of_its_cohorts_with_a_reason(small: Small) -> None:
    small.start()
    epoch = plan(small).control_epoch
    start_fix(small)
    older = plan(small)
    assert (older.state, older.state_reason, older.superseded_by) == (Rollout.STATE_PAUSED, "SUPERSEDED", FIX)
    assert older.control_epoch == epoch + 1, "links of what it offered die"
    assert codes(small.claim(small.device("d1"))) == ["TAGS_NOT_MATCHED", "ROLLOUT_SUPERSEDED"]
    assert small.granted(small.device("d2", tags=["exposed"]))


def test_one_in_other_cohorts_goes_on(small: Small) -> None:
    small.start(small.stage("beta"))
    start_fix(small)
    assert plan(small).state == Rollout.STATE_RUNNING


@pytest.mark.parametrize("end", ["complete", "abort", "kill", "roll_back"])
def test_the_older_one_goes_on_whichever_way_the_expedited_one_ends(small: Small, end: str) -> None:
    small.start()
    start_fix(small)
    if end == "complete":
        small.confirmed(small.device("d2", tags=["exposed"]))
        small.beat(11)
        assert plan(small, "fix").state == Rollout.STATE_COMPLETED
    else:
        small.control(end, "fix")
    older = plan(small)
    assert (older.state, older.state_reason, older.superseded_by) == (Rollout.STATE_RUNNING, "", "")
    assert small.claim(small.device("d3")).HasField("offer")
    published = [it.change for name, it in small.leader.public if name == NAME]
    assert published[-3:] == ["rollout.stage_opened", "rollout.paused", "rollout.resumed"]


def test_what_an_operator_had_paused_stays_paused(small: Small) -> None:
    small.start()
    small.control("pause", "r")
    start_fix(small)
    small.control("abort", "fix")
    assert plan(small).state == Rollout.STATE_PAUSED


def test_pausing_a_superseded_rollout_keeps_it_paused_afterwards(small: Small) -> None:
    small.start()
    start_fix(small)
    small.control("pause", "r", "not tonight")
    small.control("abort", "fix")
    assert (plan(small).state, plan(small).state_reason) == (Rollout.STATE_PAUSED, "PAUSED_BY_OPERATOR")


def test_a_superseded_rollout_cannot_be_resumed_beside_the_emergency(small: Small) -> None:
    small.start()
    start_fix(small)
    with pytest.raises(FailedPreconditionError) as refused:
        small.control("resume", "r")
    assert refused.value.reason == "COHORT_BUSY"
    assert plan(small).superseded_by == FIX, "nothing changed"


def test_two_emergencies_in_one_cohort_are_refused(small: Small) -> None:
    start_fix(small)
    with pytest.raises(FailedPreconditionError) as refused:
        start_fix(small, rollout_id="other")
    assert refused.value.reason == "COHORT_BUSY"


def test_one_overtaken_twice_goes_on_when_the_last_emergency_of_its_cohorts_ends(small: Small) -> None:
    small.start(small.stage("canary"), small.stage("beta"))
    start_fix(small)
    start_fix(small, small.stage("beta"), rollout_id="other")
    small.control("abort", "fix")
    older = plan(small)
    assert (older.state, older.superseded_by) == (Rollout.STATE_PAUSED, f"{PRODUCT}/rollouts/other")
    small.control("abort", "other")
    assert plan(small).state == Rollout.STATE_RUNNING


def test_a_gate_that_trips_while_it_is_overtaken_halts_it_for_good(small: Small) -> None:
    small.start()
    device = small.device()
    name = small.granted(device)
    small.ask_go(device)
    device.reports.clear()
    start_fix(small)
    device.report(device_pb2.ATTEMPT_STATE_FAILED, "BROKEN", name)
    small.said(device)
    assert (plan(small).state, plan(small).superseded_by) == (Rollout.STATE_HALTED, "")
    small.control("abort", "fix")
    assert plan(small).state == Rollout.STATE_HALTED


def test_an_emergency_beside_a_rollout_on_its_way_back_lets_it_go_back(small: Small) -> None:
    small.add_bundle("2.0.0", 0)
    small.start(back=True)
    device = small.device("d1", tags=["exposed"])
    small.confirmed(device)
    small.control("roll_back", "r")
    start_fix(small)
    assert plan(small).state == Rollout.STATE_ROLLING_BACK
    assert small.claim(device).offer.kind == rollout_pb2.Attempt.KIND_ROLLBACK


def test_t80_a_device_at_work_for_the_older_rollout_drops_it_for_the_emergency_that_means_it(small: Small) -> None:
    small.start()
    meant, other = small.device("d1", tags=["exposed"]), small.device("d2")
    names = [small.granted(meant), small.granted(other)]
    start_fix(small)
    answer = small.ask_go(meant)
    assert (answer.answer, codes(answer)) == (Answer.ANSWER_CANCEL, ["ROLLOUT_SUPERSEDED"])
    assert small.attempt(names[0]).state == CANCELLED
    answer = small.ask_go(other)
    assert (answer.answer, codes(answer)) == (Answer.ANSWER_WAIT, ["ROLLOUT_SUPERSEDED"])
    meant.end()
    meant.reports.clear()
    assert small.claim(meant).offer.version == "3.0.0"
    small.control("kill", "fix")
    assert small.ask_go(other).answer == Answer.ANSWER_GO, "the older one goes on where it was"


def test_a_device_with_go_ends_what_it_began_whatever_supersedes(small: Small) -> None:
    small.start()
    device = small.device("d1", tags=["exposed"])
    name = small.granted(device)
    small.ask_go(device)
    start_fix(small)
    device.reports.clear()
    device.switch()
    small.said(device)
    assert small.attempt(name).state == device_pb2.ATTEMPT_STATE_CONFIRMED
    assert small.counts().confirmed == 1


def test_t80_override_rollout_and_emergency_have_one_order(small: Small) -> None:
    """An override hides releases; without one the emergency comes before the rollout it paused."""
    small.start()
    start_fix(small, small.stage())
    device = small.device()
    asked = small.releases.candidates(device)
    assert small.claim(device, candidates=asked).offer.version == "3.0.0"


def test_the_release_of_a_completed_emergency_stays_with_the_tagged_devices(small: Small) -> None:
    start_fix(small)
    small.confirmed(small.device("d1", tags=["exposed"]))
    small.beat(11)
    small.releases.run_tasks()
    assert plan(small, "fix").state == Rollout.STATE_COMPLETED
    assert codes(small.claim(small.device("d2"))) == ["TAGS_NOT_MATCHED"]
    assert small.claim(small.device("d3", tags=["exposed"])).HasField("offer")
    graph = small.releases.graphs[cohort("canary")]
    graph[-1].phase.CopyFrom(releases_pb2.Phase(share_ppm=1_000_000))
    small.releases.publish(cohort("canary"))
    assert small.claim(small.device("d4")).HasField("offer"), "a phase of its own opens it to all"


def test_the_soak_of_an_emergency_that_names_none_is_short(small: Small) -> None:
    stage = rollout_pb2.Stage(display_name="all", cohort=cohort("canary"))
    small.create("e", "2.0.0", Rollout(stages=[stage], expedited=True))
    small.create("n", "2.0.0", Rollout(stages=[stage]))
    soaks = [small.leader.state.rollouts[f"{PRODUCT}/rollouts/{name}"].policies[0].soak_ms for name in "en"]
    assert soaks == [60_000, 300_000]


# The kill switch.


@pytest.mark.parametrize("before", ["", "pause", "roll_back"])
def test_a_kill_ends_grants_go_and_links_at_the_commit(small: Small, before: str) -> None:
    small.start()
    waiting, switching = small.device("d1"), small.device("d2")
    names = [small.granted(waiting), small.granted(switching)]
    assert small.ask_go(switching).answer == Answer.ANSWER_GO
    if before:
        small.control(before, "r")
    epoch = plan(small).control_epoch
    killed = small.control("kill", "r", "bricks boards")
    assert (killed.state, killed.state_reason) == (Rollout.STATE_KILLED, "KILLED_BY_OPERATOR")
    assert killed.control_epoch == epoch + 1
    assert killed.HasField("end_time")
    assert small.attempt(names[0]).state == CANCELLED
    assert small.ask_go(waiting, names[0]).answer == Answer.ANSWER_CANCEL
    assert small.claim(waiting).cancel_attempt == names[0]
    release = small.leader.state.rollouts[NAME].control.stage_statuses[0].release
    asked = [releases_pb2.Candidate(release=release)]
    assert not small.claim(small.device("d3"), candidates=asked).HasField("offer")
    switching.reports.clear()
    switching.switch()
    small.said(switching)
    assert small.counts().confirmed == 1, "what had go ends as it ends"


def test_a_device_that_asks_for_go_again_after_a_kill_must_forget_it(small: Small) -> None:
    small.start()
    device = small.device()
    name = small.granted(device)
    assert small.ask_go(device).answer == Answer.ANSWER_GO
    small.leader.do(Control("kill", NAME))  # before the release is disabled in its service
    answer = small.ask_go(device)
    assert (answer.answer, codes(answer)) == (Answer.ANSWER_CANCEL, ["ROLLOUT_KILLED"])
    assert small.attempt(name).state == FAILED


def test_a_kill_stops_the_way_back_too(small: Small) -> None:
    small.add_bundle("2.0.0", 0)
    small.start(back=True)
    device = small.device()
    small.confirmed(device)
    small.control("roll_back", "r")
    back = small.granted(device)
    small.control("kill", "r")
    assert small.attempt(back).state == CANCELLED
    assert small.counts().in_flight == 0
    device.end()
    device.reports.clear()
    assert codes(small.claim(device)) == ["ROLLOUT_NOT_ROLLING_BACK"]


def test_a_kill_disables_each_release_also_one_that_is_still_being_made(small: Small) -> None:
    small.create("r", "2.0.0", Rollout(stages=[small.stage()]))
    small.leader.do(Control("start", NAME))
    small.leader.do(Control("kill", NAME))
    small.releases.run_tasks()
    assert [task.kind for task in small.leader.tasks.values()] == [TASK_DISABLE]
    small.releases.run_tasks()
    assert small.releases.graphs[cohort("canary")][-1].disabled


@pytest.mark.parametrize("end", ["abort", "kill"])
def test_what_has_ended_cannot_be_killed_or_resumed(small: Small, end: str) -> None:
    small.start()
    small.control(end, "r")
    for verb in ("kill", "resume", "retry", "abort", "roll_back", "pause", "start"):
        with pytest.raises(FailedPreconditionError) as refused:
            small.control(verb, "r")
        assert refused.value.reason == "WRONG_STATE"


def test_t78_a_thousand_grants_are_stopped_by_one_kill_in_chunks(small: Small) -> None:
    small.start(small.stage(max_in_flight=2000))
    devices = [small.device(f"d{index}") for index in range(1100)]
    for first in range(0, 1000, 500):
        small.claim_many([(device, device.item(), None) for device in devices[first : first + 500]])
    assert small.counts().in_flight == 1000
    small.leader.sizes.clear()
    small.control("kill", "r")
    assert small.counts().in_flight == 0
    assert max(small.leader.sizes) <= 505
    at = len(small.leader.log)
    release = small.leader.state.rollouts[NAME].control.stage_statuses[0].release
    asked = [releases_pb2.Candidate(release=release)]
    results = small.claim_many([(device, device.item(), asked) for device in devices[900:]])
    assert not any(result.HasField("offer") for result in results)
    late = devices[0]
    late.attempt = small.leader.state.seen[late.name].attempts[-1]
    late.report(device_pb2.ATTEMPT_STATE_CONFIRMED)
    small.said(late)
    assert not [
        e for e in small.leader.log[at:] if isinstance(e.payload, events_pb2.AttemptGranted | events_pb2.GoGiven)
    ]
    assert small.counts().confirmed == 0, "late reports are harmless"


def test_t77_a_hundred_polls_race_for_the_last_slot(small: Small) -> None:
    small.start(small.stage(max_in_flight=5))
    devices = [small.device(f"d{index}") for index in range(104)]
    small.claim_many([(device, device.item(), None) for device in devices[:4]])
    results = small.claim_many([(device, device.item(), None) for device in devices[4:]])
    assert sum(result.HasField("offer") for result in results) == 1
    assert (small.counts().in_flight, small.counts().peak_in_flight) == (5, 5)


# Retries.


def test_a_failed_device_gets_another_try_only_when_somebody_retries_it(small: Small) -> None:
    small.start(small.stage(failure_limit=9))
    device = small.device()
    first = fail(small, device)
    assert codes(small.claim(device)) == ["ALREADY_FAILED"]
    assert small.control("retry", "r", "flash was full").retries == 1
    second = small.granted(device)
    assert (small.attempt(second).ordinal, small.attempt(first).superseded) == (2, True)
    assert (small.counts().failed, small.counts().in_flight, small.counts().claimed) == (0, 1, 1)
    device.report(device_pb2.ATTEMPT_STATE_FAILED, "NO_SPACE")
    small.said(device)
    device.end()
    assert codes(small.claim(device)) == ["ALREADY_FAILED"], "one retry is one try"


def test_a_retry_of_all_is_one_event_and_one_of_named_devices_is_theirs_alone(small: Small) -> None:
    small.start(small.stage(failure_limit=9))
    devices = [small.device(f"d{index}") for index in range(3)]
    for device in devices:
        fail(small, device)
    small.leader.sizes.clear()
    small.leader.do(Control("retry", NAME, devices=(devices[0].name,)))
    assert [small.claim(device).HasField("offer") for device in devices] == [True, False, False]
    small.leader.sizes.clear()
    small.leader.do(Control("retry", NAME))
    assert small.leader.sizes == [1]
    assert [small.claim(device).HasField("offer") for device in devices] == [True, True, True]


def test_there_must_be_something_to_retry(small: Small) -> None:
    small.start(small.stage(failure_limit=9))
    with pytest.raises(FailedPreconditionError) as refused:
        small.control("retry", "r")
    assert refused.value.reason == "NOTHING_TO_RETRY"
    fail(small, small.device("d1"))
    size = len(small.leader.log)
    with pytest.raises(FailedPreconditionError) as refused:
        small.leader.do(Control("retry", NAME, devices=(small.device("d2").name,)))
    assert refused.value.reason == "NOTHING_TO_RETRY"
    assert len(small.leader.log) == size + 1, "nothing but the new device's fact"


def test_the_retry_budget_is_spent_after_ten_failures(small: Small) -> None:
    small.start(small.stage(failure_limit=99))
    device = small.device()
    for number in range(RETRY_BUDGET):
        if number:
            small.control("retry", "r")
        fail(small, device)
    small.control("retry", "r")
    assert codes(small.claim(device)) == ["RETRY_BUDGET_SPENT"]
    with pytest.raises(FailedPreconditionError) as refused:
        small.leader.do(Control("retry", NAME, devices=(device.name,)))
    assert refused.value.reason == "RETRY_BUDGET_SPENT"


def test_t79_a_device_that_moves_between_cohorts_takes_its_failures_with_it(small: Small) -> None:
    small.start(small.stage(failure_limit=9, min_sample=1, success_ppm=1), small.stage("beta"))
    small.confirmed(small.device("d0"))
    small.beat(11)
    small.releases.run_tasks()
    assert plan(small).current_stage == 1
    device = small.device()
    fail(small, device)
    device.cohort = cohort("beta")
    small.device_fact(device)
    assert codes(small.claim(device)) == ["ALREADY_FAILED"]
    small.control("retry", "r")
    assert small.granted(device)
    assert small.attempt(device.attempt).stage == 1


def test_t79_leases_that_ran_out_in_one_cohort_count_in_the_next(small: Small) -> None:
    small.start(small.stage(failure_limit=9, success_ppm=1), small.stage("beta"))
    small.confirmed(small.device("d0"))
    small.beat(11)
    small.releases.run_tasks()
    device = small.device()
    for index, name in enumerate(("canary", "beta", "canary")):
        device.cohort = cohort(name)
        small.device_fact(device)
        attempt = small.granted(device)
        small.beat(31)
        device.end()
        device.reports.clear()
        assert small.attempt(attempt).state == (FAILED if index == 2 else EXPIRED)
    assert codes(small.claim(device)) == ["ALREADY_FAILED"]


def test_t79_plain_releases_of_one_bundle_share_a_devices_failures(small: Small) -> None:
    for name in ("canary", "beta"):
        small.add_release(name, "2.0.0")
    device = small.device()
    fail(small, device)
    device.cohort = cohort("beta")
    small.device_fact(device)
    assert codes(small.claim(device)) == ["ALREADY_FAILED"]


def test_a_failure_accepted_at_a_resume_and_then_retried_is_not_accepted_twice(small: Small) -> None:
    small.start(small.stage(failure_limit=2))
    devices = [small.device(f"d{index}") for index in range(2)]
    for device in devices:
        fail(small, device)
    assert plan(small).state == Rollout.STATE_HALTED
    small.control("retry", "r")
    small.control("resume", "r")
    for device in devices:
        fail(small, device)
    assert plan(small).state == Rollout.STATE_HALTED


def test_a_retry_does_not_re_open_a_stage_that_passed(small: Small) -> None:
    small.start(small.stage(failure_limit=9, min_sample=2, success_ppm=500_000), small.stage("beta"))
    small.confirmed(small.device("d1"))
    failed = small.device("d2")
    fail(small, failed)
    small.beat(11)
    assert plan(small).current_stage == 1
    small.control("retry", "r")
    small.granted(failed)
    assert (plan(small).current_stage, small.counts(0).state) == (1, Status.STATE_PASSED)


def retry(small: Small, name: str) -> rollout_pb2.Attempt:
    result = small.leader.do(RetryAttempt(name, "new battery"))
    assert isinstance(result, rollout_pb2.Attempt)
    return result


def test_a_device_that_failed_a_plain_release_tries_again_once_when_its_attempt_is_retried(small: Small) -> None:
    for name in ("canary", "beta"):
        small.add_release(name, "2.0.0")
    device = small.device()
    first = fail(small, device)
    assert codes(small.claim(device)) == ["ALREADY_FAILED"]
    assert retry(small, first).name == first
    size = len(small.leader.log)
    retry(small, first)
    assert len(small.leader.log) == size, "said twice, it is one try"
    device.cohort = cohort("beta")
    small.device_fact(device)
    second = small.granted(device)
    device.report(device_pb2.ATTEMPT_STATE_FAILED, "NO_SPACE")
    small.said(device)
    device.end()
    assert codes(small.claim(device)) == ["ALREADY_FAILED"]
    retry(small, second)
    small.leader.replay()
    assert small.granted(device) not in (first, second)


def test_a_device_that_failed_an_override_tries_again_when_its_attempt_is_retried(small: Small) -> None:
    device = small.device()
    override = releases_pb2.BundleOverride(name=f"{PRODUCT}/bundleOverrides/o", bundle=bundle_name("2.0.0"))
    override.devices.append(device.name)
    small.leader.do(fact("releases", override.name, releases_events.BundleOverrideChanged(bundle_override=override)))
    wanted = [releases_pb2.Candidate(bundle=override.bundle, bundle_override=override.name)]
    offer = small.claim(device, candidates=wanted).offer
    device.take(offer)
    device.report(device_pb2.ATTEMPT_STATE_FAILED, "NO_SPACE")
    small.said(device)
    device.end()
    assert codes(small.claim(device, candidates=wanted)) == ["ALREADY_FAILED"]
    retry(small, offer.attempt)
    assert small.claim(device, candidates=wanted).HasField("offer")


def test_after_a_rollout_has_ended_well_those_that_failed_may_still_try(small: Small) -> None:
    small.start(small.stage(failure_limit=9, success_ppm=1, min_sample=1))
    device = small.device()
    first = fail(small, device)
    small.confirmed(small.device("d0"))
    small.beat(11)
    small.releases.run_tasks()
    assert plan(small).state == Rollout.STATE_COMPLETED
    assert codes(small.claim(device)) == ["ALREADY_FAILED"]
    retry(small, first)
    assert small.granted(device)


def test_what_is_not_there_has_not_failed_or_is_over_is_not_retried(small: Small) -> None:
    small.start(small.stage(failure_limit=9))
    device, other = small.device(), small.device("d2")
    first, going = fail(small, device), small.granted(other)
    size = len(small.leader.log)

    def refused(name: str) -> str:
        with pytest.raises(DomainError) as caught:
            retry(small, name)
        return caught.value.reason

    assert refused(f"{device.name}/attempts/none") == "RESOURCE_NOT_FOUND"
    assert refused(going) == "NOTHING_TO_RETRY"
    assert len(small.leader.log) == size
    retry(small, first)
    small.granted(device)
    assert refused(first) == "NOTHING_TO_RETRY"
    small.control("abort", "r", "enough")
    assert refused(first) == "WRONG_STATE"


def test_a_device_has_so_many_tries_and_no_more(small: Small) -> None:
    small.add_release("canary", "2.0.0")
    device = small.device()
    for _ in range(RETRY_BUDGET):
        name = fail(small, device)
        if small.leader.state.tries[f"{device.name} {bundle_name('2.0.0')}"].failed < RETRY_BUDGET:
            retry(small, name)
    with pytest.raises(DomainError) as caught:
        retry(small, name)
    assert caught.value.reason == "RETRY_BUDGET_SPENT"
