"""N1: the reasons are a closed list, and each of them is given by some device's resolution."""

from __future__ import annotations

import pytest

from libs.resolution import Code, OverrideFacts, PlanFacts, PlanStage, Resolution
from libs.resolution.convert import reason_of
from tests.unit.resolution.fleet import ask, bundle, chain, codes, device

CHAIN = chain({"requirement": "< 1.0.0"}, {})
OVERRIDE = OverrideFacts("o", "bx", 0)


def _planned(state: str, *, opened: bool, why: str = "") -> Resolution:
    stages = (PlanStage("first", "other", open=True), PlanStage("all", "main", open=opened))
    return ask(device(release="r1"), CHAIN, plans=[PlanFacts("ro", "2.0.0", state, 0, stages, why)])


def _second(**facts: object) -> Resolution:
    return ask(device(release="r0", version="1.0.0", security_floor=1), chain({}, {"security_version": 1} | facts))


EXAMPLES = {
    Code.DEVICE_RETIRED: ask(device(retired=True), CHAIN),
    Code.QUARANTINED: ask(device(quarantined=True), CHAIN),
    Code.OVERRIDE_ACTIVE: ask(device(), CHAIN, overrides=[OVERRIDE], bundles=[bundle("bx")]),
    Code.OVERRIDE_ALREADY_INSTALLED: ask(device(bundle="bx"), CHAIN, overrides=[OVERRIDE]),
    Code.NO_COHORT: ask(device(cohort=""), None),
    Code.NO_RELEASES: ask(device(), None),
    Code.CURRENT_BY_RELEASE: ask(device(release="r0"), CHAIN),
    Code.CURRENT_BY_BUNDLE: ask(device(bundle="b0"), CHAIN),
    Code.MATCHED_BY_VERSION: ask(device(version="0.1.0"), CHAIN),
    Code.NOTHING_REPORTED: ask(device(), CHAIN),
    Code.NO_MATCH: ask(device(version="5.0.0"), CHAIN),
    Code.UP_TO_DATE: ask(device(release="r1"), CHAIN),
    Code.STEP_BACK_TO_ORIGIN: ask(device(release="r1"), chain({}, {"retracted": True})),
    Code.REQUIRED_STOP: ask(device(release="r0"), chain({}, {"required": True}, {})),
    Code.RELEASE_DISABLED: _second(disabled=True),
    Code.RELEASE_RETRACTED: _second(disabled=True, retracted=True),
    Code.VERSION_NOT_SATISFIED: _second(requirement="> 1.0.0"),
    Code.NOT_YET_SCHEDULED: _second(schedule_ms=1 << 50),
    Code.TAGS_NOT_MATCHED: _second(tags=frozenset({"lab"})),
    Code.NOT_IN_SHARE: _second(share_ppm=1, salt=bytes(16)),
    Code.BUNDLE_NOT_OFFERABLE: ask(device(release="r0"), CHAIN, bundles=[bundle("b1", offerable=False)]),
    Code.BUNDLE_UNKNOWN: ask(device(), CHAIN, overrides=[OVERRIDE]),
    Code.TARGET_NOT_SUPPORTED: ask(device(release="r0", target="odd"), CHAIN),
    Code.SECURITY_VERSION_BELOW_FLOOR: _second(security_version=0),
    Code.STAGE_NOT_OPEN: _planned("RUNNING", opened=False),
    Code.ROLLOUT_NOT_STARTED: _planned("DRAFT", opened=False),
    Code.ROLLOUT_PAUSED: _planned("PAUSED", opened=True),
    Code.ROLLOUT_HALTED: _planned("HALTED", opened=True),
    Code.ROLLOUT_ROLLING_BACK: _planned("ROLLING_BACK", opened=True),
    Code.ROLLOUT_ROLLED_BACK: _planned("ROLLED_BACK", opened=True),
    Code.ROLLOUT_ABORTED: _planned("ABORTED", opened=True),
    Code.ROLLOUT_KILLED: _planned("KILLED", opened=True),
    Code.ROLLOUT_SUPERSEDED: _planned("PAUSED", opened=True, why="SUPERSEDED"),
    Code.CANDIDATE: ask(device(release="r0"), CHAIN),
}


def test_the_list_is_complete() -> None:
    assert set(EXAMPLES) == set(Code)


@pytest.mark.parametrize("code", list(EXAMPLES))
def test_each_reason_is_given(code: Code) -> None:
    assert code in codes(EXAMPLES[code])


@pytest.mark.parametrize("code", list(EXAMPLES))
def test_an_answer_of_nothing_names_what_blocked(code: Code) -> None:
    found = EXAMPLES[code]
    assert found.candidates or any(step.blocking for step in found.steps)


@pytest.mark.parametrize("code", list(EXAMPLES))
def test_a_step_survives_being_stored(code: Code) -> None:
    for step in EXAMPLES[code].steps:
        stored = reason_of(step)
        assert (stored.code, stored.message, stored.subject, stored.blocking, dict(stored.metadata)) == (
            step.code, step.message, step.subject, step.blocking, dict(step.metadata),
        )  # fmt: skip
