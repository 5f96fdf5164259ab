"""One test for each row of both tables of choices, and the steps they rest on."""

from __future__ import annotations

import pytest

from libs.resolution import Code, OverrideFacts, PlanFacts, PlanStage, resolve
from tests.unit.resolution.fleet import NOW, ask, blocking, bundle, chain, codes, device, offered

THREE = chain({}, {}, {})


# Steps 0 to 2.


def test_quarantine_hides_releases_and_overrides() -> None:
    override = OverrideFacts("o", "bx", 0)
    found = ask(device(quarantined=True, release="r0"), THREE, overrides=[override], bundles=[bundle("bx")])
    assert (offered(found), blocking(found)) == ([], ["QUARANTINED"])


def test_retired_gets_nothing() -> None:
    found = ask(device(retired=True, release="r0"), THREE)
    assert (offered(found), blocking(found)) == ([], ["DEVICE_RETIRED"])


def test_no_cohort_means_no_releases_but_overrides_still_apply() -> None:
    lonely = device(cohort="")
    assert blocking(ask(lonely, None)) == ["NO_COHORT"]
    found = ask(lonely, None, overrides=[OverrideFacts("o", "bx", 0)], bundles=[bundle("bx")])
    assert offered(found) == ["override:bx"]


def test_a_cohort_without_releases_says_so() -> None:
    assert blocking(ask(device(), None)) == ["NO_RELEASES"]


def test_an_active_override_hides_releases() -> None:
    found = ask(device(release="r0"), THREE, overrides=[OverrideFacts("o", "bx", 0)], bundles=[bundle("bx")])
    assert offered(found) == ["override:bx"]
    assert found.candidates[0].bundle_override == "o"


def test_a_device_on_the_overrides_bundle_gets_nothing() -> None:
    found = ask(device(release="r0", bundle="bx"), THREE, overrides=[OverrideFacts("o", "bx", 0)])
    assert (offered(found), blocking(found)) == ([], ["OVERRIDE_ALREADY_INSTALLED"])


@pytest.mark.parametrize(
    ("start", "end", "active"),
    [(NOW, 0, True), (NOW + 1, 0, False), (0, NOW, False), (0, NOW + 1, True), (0, 0, True)],
)
def test_an_override_is_active_from_its_start_to_before_its_end(start: int, end: int, active: bool) -> None:
    found = ask(device(release="r1"), THREE, overrides=[OverrideFacts("o", "bx", start, end)], bundles=[bundle("bx")])
    assert offered(found) == (["override:bx"] if active else ["r2"])


def test_among_overrides_the_latest_start_then_the_latest_created_then_the_smallest_id() -> None:
    bundles = [bundle(f"b-{name}") for name in "abcd"]
    first, second, third, fourth = (
        OverrideFacts("a", "b-a", 5, created_ms=9),
        OverrideFacts("d", "b-d", 6, created_ms=1),
        OverrideFacts("c", "b-c", 6, created_ms=2),
        OverrideFacts("b", "b-b", 6, created_ms=2),
    )
    for overrides in ([first, second, third, fourth], [fourth, third, second, first]):
        assert offered(ask(device(), THREE, overrides=overrides, bundles=bundles)) == ["override:b-b"]
    assert offered(ask(device(), THREE, overrides=[first, second, third], bundles=bundles)) == ["override:b-c"]


# The first table of choices.


def test_on_the_latest_by_release_stops_even_where_a_version_would_match() -> None:
    graph = chain({}, {"requirement": ">= 0.0.0"})
    found = ask(device(release="r1", version="1.1.0"), graph)
    assert (offered(found), codes(found)) == ([], ["CURRENT_BY_RELEASE", "UP_TO_DATE"])


def test_a_reported_release_of_another_cohort_falls_through_to_bundle_and_version() -> None:
    assert offered(ask(device(release="elsewhere", bundle="b1"), THREE)) == ["r2"]
    graph = chain({}, {"requirement": "< 1.1.0"})
    assert offered(ask(device(release="elsewhere", version="1.0.0"), graph)) == ["r1"]


def test_nothing_reported_is_offered_nothing() -> None:
    found = ask(device(), chain({"requirement": ">= 0.0.0"}))
    assert (offered(found), blocking(found)) == ([], ["NOTHING_REPORTED"])


def test_a_required_release_stops_the_walk_and_is_validated_all_the_same() -> None:
    graph = chain({}, {"required": True}, {})
    found = ask(device(release="r0"), graph)
    assert (offered(found), Code.REQUIRED_STOP in codes(found)) == (["r1"], True)
    graph = chain({}, {"required": True, "tags": frozenset({"lab"})}, {})
    found = ask(device(release="r0"), graph)
    assert (offered(found), blocking(found)) == ([], ["TAGS_NOT_MATCHED"])


def test_required_and_disabled_blocks_the_path_after_the_release_before_it() -> None:
    graph = chain({}, {}, {"required": True, "disabled": True}, {})
    assert offered(ask(device(release="r0"), graph)) == ["r1"]
    assert offered(ask(device(release="r1"), graph)) == []


def test_step_8_failing_gives_nothing_older_in_its_place() -> None:
    found = ask(device(release="r0"), THREE, bundles=[bundle("b2", offerable=False, reason="BINARY_DESTROYED")])
    assert (offered(found), blocking(found)) == ([], ["BUNDLE_NOT_OFFERABLE"])
    assert "BINARY_DESTROYED" in found.steps[-1].message


def test_a_numeric_phase_leaves_the_release_on_the_list_for_the_leader() -> None:
    found = ask(device(release="r0"), chain({}, {}, {"share_ppm": 1, "salt": bytes(16)}))
    assert offered(found) == ["r2", "r1"]
    assert Code.NOT_IN_SHARE in codes(found)
    assert blocking(found) == []


@pytest.mark.parametrize("number", [1_000_000, 1])
def test_a_share_of_all_needs_no_note(number: int) -> None:
    found = ask(device(release="r0"), chain({}, {"share_ppm": number, "salt": bytes(16)}))
    assert (Code.NOT_IN_SHARE in codes(found)) is (number == 1)


def test_equal_lowest_versions_are_told_apart_by_age_then_id() -> None:
    same = {"version": "1.0.0", "bundle": "b", "requirement": "< 2.0.0"}
    old = chain(same | {"created_ms": 5}, same | {"created_ms": 4}, {"version": "2.0.0"})
    assert codes(ask(device(bundle="b"), old))[0] == "CURRENT_BY_BUNDLE"
    assert ask(device(bundle="b"), old).steps[0].subject == "r1"
    assert ask(device(version="0.1.0"), old).steps[0].subject == "r1"
    tied = chain(same | {"created_ms": 4, "name": "r0"}, same | {"created_ms": 4, "name": "r1"}, {"version": "2.0.0"})
    assert ask(device(bundle="b"), tied).steps[0].subject == "r0"
    assert ask(device(version="0.1.0"), tied).steps[0].subject == "r0"


def test_pre_releases_are_compared_and_may_satisfy() -> None:
    graph = chain({}, {"version": "2.0.0", "requirement": "< 2.0.0"})
    assert offered(ask(device(version="2.0.0-rc.1"), graph)) == ["r1"]


# Settled, so that two implementations agree.


def test_ties_are_settled_by_the_smallest_id_in_byte_order() -> None:
    nodes = ({"name": "Z", "bundle": "b", "version": "", "created_ms": 1, "next": "a"},
             {"name": "a", "bundle": "b", "version": "", "created_ms": 1, "next": "end"},
             {"name": "end"})  # fmt: skip
    assert ask(device(bundle="b"), chain(*nodes)).steps[0].subject == "Z"


def test_step_4_without_versions_takes_the_earliest_created() -> None:
    graph = chain({"bundle": "b", "version": "", "created_ms": 7}, {"bundle": "b", "version": "", "created_ms": 3}, {})
    assert ask(device(bundle="b"), graph).steps[0].subject == "r1"


def test_step_4_prefers_any_release_with_a_version_and_of_these_the_lowest() -> None:
    graph = chain(
        {"bundle": "b", "version": "", "created_ms": 0},
        {"bundle": "b", "version": "3.0.0"},
        {"bundle": "b", "version": "2.0.0"},
        {},
    )
    assert ask(device(bundle="b"), graph).steps[0].subject == "r2"


def test_7b_without_a_reported_version_takes_that_of_the_current_release() -> None:
    graph = chain({}, {"requirement": "== 1.0.0"})
    assert offered(ask(device(release="r0"), graph)) == ["r1"]
    assert offered(ask(device(bundle="b0"), graph)) == ["r1"]
    nameless = chain({"version": ""}, {"requirement": "== 1.0.0"})
    assert blocking(ask(device(release="r0"), nameless)) == ["VERSION_NOT_SATISFIED"]


def test_7b_asks_a_requirement_of_a_release_without_a_version_too() -> None:
    graph = chain({}, {"version": "", "requirement": "== 9.9.9"})
    assert offered(ask(device(release="r0", version="1.0.0"), graph)) == []


@pytest.mark.parametrize(("schedule", "passed"), [(NOW, True), (NOW + 1, False), (NOW - 1, True)])
def test_7c_a_schedule_that_is_now_has_passed(schedule: int, passed: bool) -> None:
    found = ask(device(release="r0"), chain({}, {"schedule_ms": schedule}))
    assert offered(found) == (["r1"] if passed else [])
    assert blocking(found) == ([] if passed else ["NOT_YET_SCHEDULED"])


def test_7_steps_back_over_what_fails_until_the_start() -> None:
    graph = chain({}, {}, {"tags": frozenset({"lab", "pilot"})}, {"disabled": True})
    assert offered(ask(device(release="r0"), graph)) == ["r1"]
    assert offered(ask(device(release="r0", tags=frozenset({"pilot"})), graph)) == ["r2", "r1"]
    assert offered(ask(device(release="r1"), graph)) == []


def test_the_list_ends_before_the_first_release_that_fails_step_8() -> None:
    graph = chain({}, {}, {}, {})
    assert offered(ask(device(release="r0"), graph, bundles=[bundle("b2", offerable=False)])) == ["r3"]


def test_a_release_that_step_7_drops_does_not_end_the_list_by_step_8() -> None:
    graph = chain({}, {}, {"disabled": True})
    assert offered(ask(device(release="r0"), graph, bundles=[bundle("b2", offerable=False)])) == ["r1"]


def test_the_security_floor_ends_the_list_without_stepping_back() -> None:
    graph = chain({}, {"security_version": 3}, {"security_version": 1}, {"security_version": 2})
    found = ask(device(release="r0", security_floor=2), graph)
    assert (offered(found), blocking(found)) == (["r3"], ["SECURITY_VERSION_BELOW_FLOOR"])


def test_the_security_floor_holds_for_overrides() -> None:
    low = bundle("bx", security_version=1)
    found = ask(device(security_floor=2), THREE, overrides=[OverrideFacts("o", "bx", 0)], bundles=[low])
    assert (offered(found), blocking(found)) == ([], ["SECURITY_VERSION_BELOW_FLOOR"])


def test_a_portable_binary_fits_every_target() -> None:
    found = ask(device(release="r1", target="odd"), THREE, bundles=[bundle("b2", targets=frozenset({"portable"}))])
    assert offered(found) == ["r2"]


def test_a_reported_version_that_is_none_satisfies_nothing() -> None:
    graph = chain({"requirement": ">= 0.0.0"})
    assert blocking(ask(device(version="latest"), graph)) == ["NO_MATCH"]
    assert offered(ask(device(release="r0", version="x"), chain({}, {"requirement": ">= 0.0.0"}))) == []


def test_an_empty_reported_version_is_as_if_none_was_reported() -> None:
    assert blocking(ask(device(version=""), chain({"requirement": ">= 0.0.0"}))) == ["NOTHING_REPORTED"]


def test_a_destroyed_bundle_on_the_latest_offers_nothing_older_either() -> None:
    found = ask(device(version="1.0.0"), chain({"requirement": "< 9.0.0"}, {}), bundles=[bundle("b1", offerable=False)])
    assert offered(found) == []


def test_a_bundle_without_a_binary_for_the_target_is_no_candidate_and_stepped_over() -> None:
    found = ask(device(release="r0"), THREE, bundles=[bundle("b2", targets=frozenset({"other"}))])
    assert (offered(found), blocking(found)) == (["r1"], ["TARGET_NOT_SUPPORTED"])


def test_a_bundle_that_is_not_known_here_ends_the_list() -> None:
    found = resolve(device(release="r0"), THREE, (), {"b1": bundle("b1")}, (), NOW)
    assert (offered(found), blocking(found)) == ([], ["BUNDLE_UNKNOWN"])


def test_an_override_that_cannot_be_offered_gives_neither_the_next_override_nor_releases() -> None:
    overrides = [OverrideFacts("new", "bad", 2), OverrideFacts("old", "bx", 1)]
    bundles = [bundle("bad", offerable=False), bundle("bx")]
    found = ask(device(release="r0"), THREE, overrides=overrides, bundles=bundles)
    assert (offered(found), blocking(found)) == ([], ["BUNDLE_NOT_OFFERABLE"])


def test_a_release_whose_bundle_already_runs_is_offered() -> None:
    assert offered(ask(device(release="r0", bundle="same"), chain({"bundle": "same"}, {"bundle": "same"}))) == ["r1"]


def test_a_lower_version_by_step_5_is_offered() -> None:
    graph = chain({"version": "1.0.0", "requirement": "> 1.0.0"})
    assert offered(ask(device(version="2.0.0"), graph)) == ["r0"]


# Retracted releases.


def test_on_a_retracted_release_the_way_back_is_the_only_candidate() -> None:
    graph = chain({}, {"retracted": True, "disabled": True}, {})
    found = ask(device(release="r1", bundle="b1", version="1.1.0"), graph)
    assert (offered(found), codes(found)) == (["back:r1"], ["CURRENT_BY_RELEASE", "STEP_BACK_TO_ORIGIN"])


def test_a_retracted_release_is_never_offered_even_if_its_disabled_flag_is_missing() -> None:
    graph = chain({"requirement": "< 9.0.0"}, {"retracted": True})
    found = ask(device(version="0.1.0"), graph)
    assert (offered(found), blocking(found)) == (["r0"], ["RELEASE_RETRACTED"])


# Rollouts that hold a version back.


def plan(state: str, *, opened: int, current: int = 0) -> PlanFacts:
    stages = tuple(PlanStage(name, name, index < opened) for index, name in enumerate(("canary", "beta", "main")))
    return PlanFacts("ro", "2.0.0", state, current, stages, "GATE_FAILED" if state == "HALTED" else "")


def test_a_stage_that_is_not_open_says_why_not_this_version() -> None:
    found = ask(device(release="r2", version="1.2.0"), THREE, plans=[plan("HALTED", opened=1)])
    step = found.steps[-1]
    assert (offered(found), step.code, step.blocking, step.subject) == ([], "STAGE_NOT_OPEN", True, "ro")
    assert dict(step.metadata) == {
        "version": "2.0.0", "stage": "main", "current_stage": "canary", "state": "HALTED",
        "state_reason": "GATE_FAILED",
    }  # fmt: skip
    assert "2.0.0" in step.message
    assert "main never opened" in step.message


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ("PAUSED", "ROLLOUT_PAUSED"),
        ("HALTED", "ROLLOUT_HALTED"),
        ("ROLLING_BACK", "ROLLOUT_ROLLING_BACK"),
        ("ROLLED_BACK", "ROLLOUT_ROLLED_BACK"),
        ("ABORTED", "ROLLOUT_ABORTED"),
    ],
)
def test_a_stopped_rollout_says_so_where_its_stage_is_open(state: str, code: str) -> None:
    found = ask(device(release="r2"), THREE, plans=[plan(state, opened=3, current=2)])
    assert codes(found)[-1] == code


def test_a_draft_says_that_it_was_not_started() -> None:
    assert codes(ask(device(release="r2"), THREE, plans=[plan("DRAFT", opened=0)]))[-1] == "ROLLOUT_NOT_STARTED"


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETED"])
def test_a_working_rollout_adds_nothing_where_its_stage_is_open(state: str) -> None:
    assert codes(ask(device(release="r2"), THREE, plans=[plan(state, opened=3)]))[-1] == "UP_TO_DATE"


def test_a_device_on_that_version_or_above_is_told_nothing_about_it() -> None:
    assert "STAGE_NOT_OPEN" not in codes(ask(device(version="2.0.0"), THREE, plans=[plan("RUNNING", opened=1)]))
    assert "STAGE_NOT_OPEN" in codes(ask(device(version="1.9.9"), THREE, plans=[plan("RUNNING", opened=1)]))


def test_every_blocking_step_says_what_it_is_about_and_what_would_have_to_change() -> None:
    found = [
        ask(device(quarantined=True), THREE),
        ask(device(cohort=""), None),
        ask(device(version="x"), THREE),
        ask(device(release="r0"), chain({}, {"disabled": True}, {"tags": frozenset({"t"})})),
        ask(device(release="r2"), THREE, plans=[plan("RUNNING", opened=1)]),
    ]
    for resolution in found:
        for step in resolution.steps:
            assert step.subject
            if step.blocking:
                assert ":" in step.message
