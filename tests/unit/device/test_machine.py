"""The update as a pure machine, driven without a disk, a network or a clock."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from clients.device import machine
from clients.device.machine import Phase, State, Trial, factory, step
from clients.device.model import Answer, Go, Offer
from tests.unit.device.offering import ATTEMPT, Signer, offer, rules

SIGNER = Signer()
RULES = rules(SIGNER)


def answer(kind: str = "none", **parts: object) -> machine.Answered:
    return machine.Answered(Answer(kind, 1.0, 0, **parts))  # type: ignore[arg-type]


def offered(**changes: Any) -> machine.Answered:
    return answer("offer", offer=offer(SIGNER, **changes))


def go(attempt: str = ATTEMPT) -> machine.Answered:
    return answer("go", go=Go(attempt, 5.0))


def play(state: State, *inputs: machine.Input) -> tuple[State, list[machine.Effect]]:
    effects: list[machine.Effect] = []
    for one in inputs:
        state, effects = step(RULES, state, one)
    return state, effects


def reports(effects: list[machine.Effect]) -> list[tuple[str, str]]:
    return [(one.state, one.code) for one in effects if isinstance(one, machine.QueueReport)]


def kinds(effects: list[machine.Effect]) -> set[type]:
    return {type(one) for one in effects}


NEW = factory("instance", "1.0.0", 1)
INSTALLED = play(NEW, offered(), machine.Downloaded(), machine.Installed())[0]
SWITCHED = play(INSTALLED, machine.SwitchAllowed(ATTEMPT))[0]
BEGUN = play(SWITCHED, machine.TrialBegins())[0]
BOOTED = play(BEGUN, machine.BootEnded())[0]
CONFIRMED = play(BOOTED, machine.HealthJudged(healthy=True))[0]
ALL = {
    "new": NEW,
    "accepted": play(NEW, offered())[0],
    "downloaded": play(NEW, offered(), machine.Downloaded())[0],
    "installed": INSTALLED,
    "switched": SWITCHED,
    "begun": BEGUN,
    "booted": BOOTED,
    "confirmed": CONFIRMED,
}


def test_the_whole_way_moves_the_pointer_once_and_the_floor_last() -> None:
    assert [ALL[name].active for name in ALL] == ["a", "a", "a", "a", "b", "b", "b", "b"]
    assert [ALL[name].floor for name in ALL] == [1] * 7 + [2]
    assert CONFIRMED.work is None
    assert CONFIRMED.trial is None
    assert CONFIRMED.running().version == "2.0.0"


@pytest.mark.parametrize("name", ALL)
def test_every_state_survives_the_disk(name: str) -> None:
    state = ALL[name]
    assert State.from_json(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.parametrize("name", ALL)
def test_after_a_kill_at_any_state_some_confirmed_or_new_slot_runs(name: str) -> None:
    state, effects = step(RULES, ALL[name], machine.Started())
    assert state.slots[state.active] is not None
    if name in {"begun", "booted"}:
        assert state.active == "a"
        assert reports(effects) == [("REVERTED", "TRIAL_INTERRUPTED")]
        assert machine.Boot("a") in effects
    elif name == "switched":
        assert effects == [machine.BeginTrial()]
    else:
        assert effects[0] == machine.Boot(state.active)
        assert reports(effects) == []


def test_no_go_is_in_any_state() -> None:
    state, effects = play(INSTALLED, go())
    assert state == INSTALLED
    assert machine.Switch(ATTEMPT, 5.0) in effects
    assert state.asks_go()


def test_a_go_for_another_attempt_or_too_early_switches_nothing() -> None:
    assert machine.Switch not in kinds(play(INSTALLED, go("other"))[1])
    assert machine.Switch not in kinds(play(ALL["accepted"], go())[1])
    assert play(INSTALLED, machine.SwitchAllowed("other"))[0] == INSTALLED
    assert play(ALL["downloaded"], machine.SwitchAllowed(ATTEMPT))[0] == ALL["downloaded"]


@pytest.mark.parametrize("name", ["accepted", "downloaded", "installed"])
def test_a_cancel_before_the_switch_forgets_the_attempt_for_good(name: str) -> None:
    state, effects = play(ALL[name], answer("cancel", attempt=ATTEMPT))
    assert state.work is None
    assert reports(effects) == []
    again, effects = play(state, offered())
    assert again == state
    assert machine.Download not in kinds(effects)


@pytest.mark.parametrize("name", ["begun", "booted"])
def test_a_trial_hears_no_cancel_and_no_offer(name: str) -> None:
    for heard in (answer("cancel", attempt=ATTEMPT), offered(attempt="another"), go()):
        assert play(ALL[name], heard)[0] == ALL[name]


def test_a_failed_boot_reverts_and_the_attempt_is_not_tried_again() -> None:
    state, effects = play(BEGUN, machine.BootEnded("BOOT_FAILED", "division by zero"))
    assert (state.active, state.trial, state.work, state.floor) == ("a", None, None, 1)
    assert reports(effects) == [("REVERTED", "BOOT_FAILED")]
    assert play(state, offered())[0] == state


def test_a_healthy_verdict_before_a_check_in_is_not_asked_for() -> None:
    assert machine.CheckHealth not in kinds(play(BEGUN, machine.BootEnded())[1])
    assert machine.CheckHealth("b") in play(BOOTED, answer())[1]


def test_the_watchdog_bites_only_in_a_trial() -> None:
    assert reports(play(BOOTED, machine.TrialExpired())[1]) == [("REVERTED", "WATCHDOG_EXPIRED")]
    assert play(CONFIRMED, machine.TrialExpired()) == (CONFIRMED, [])


def test_falling_ill_after_confirmation_is_told_once_and_changes_no_slot() -> None:
    ill = machine.HealthJudged(healthy=False, code="UNHEALTHY")
    state, effects = play(CONFIRMED, ill)
    assert state.active == "b"
    assert reports(effects) == [("FAILED", "UNHEALTHY")]
    assert play(state, ill) == (state, [])
    assert play(NEW, ill) == (NEW, [])


def test_a_refused_offer_is_reported_once() -> None:
    state, effects = play(NEW, offered(security_version=0))
    assert reports(effects) == [("FAILED", "SECURITY_VERSION_TOO_LOW")]
    assert state.work is None
    state, effects = play(state, offered(security_version=0))
    assert reports(effects) == []


def test_the_same_offer_again_renews_only_its_links() -> None:
    accepted = ALL["accepted"]
    fresh = offer(SIGNER)
    fresh = replace(fresh, binaries=tuple(replace(one, url=one.url + "x") for one in fresh.binaries))
    state, effects = play(accepted, answer("offer", offer=fresh))
    assert state.work is not None
    assert [one.url[-1] for one in state.work.offer.binaries] == ["x", "x"]
    assert reports(effects) == []
    assert machine.Download not in kinds(effects)


def test_a_new_attempt_replaces_one_that_the_server_has_ended() -> None:
    state, effects = play(ALL["accepted"], offered(attempt="second"))
    assert state.work is not None
    assert state.work.offer.attempt == "second"
    assert ATTEMPT in state.ended
    assert reports(effects)[0] == ("ACCEPTED", "")


def test_the_inactive_slot_is_forgotten_before_it_is_overwritten() -> None:
    state, effects = play(CONFIRMED, offered(attempt="second"), machine.Downloaded())
    assert state.slots["a"] is None
    assert state.active == "b"
    assert any(isinstance(one, machine.Install) and one.slot == "a" for one in effects)


def test_going_back_is_the_same_way_with_the_floor_kept() -> None:
    back: Offer = offer(SIGNER, attempt="back", kind="rollback", version="1.0.0", security_version=2)
    state = play(
        CONFIRMED,
        answer("offer", offer=back),
        machine.Downloaded(),
        machine.Installed(),
        machine.SwitchAllowed("back"),
        machine.TrialBegins(),
        machine.BootEnded(),
        machine.HealthJudged(healthy=True),
    )[0]
    assert (state.running().version, state.floor, state.active) == ("1.0.0", 2, "a")


def test_inputs_that_do_not_fit_change_nothing() -> None:
    for state in ALL.values():
        for wrong in (machine.SwitchAllowed("x"), machine.Installed(), machine.Downloaded(), machine.TrialBegins()):
            fits = (
                (isinstance(wrong, machine.Installed) and state is ALL["downloaded"])
                or (isinstance(wrong, machine.Downloaded) and state is ALL["accepted"])
                or (isinstance(wrong, machine.TrialBegins) and state.trial is Trial.PENDING)
            )
            assert fits or step(RULES, state, wrong) == (state, [])
    assert ALL["installed"].work is not None
    assert ALL["installed"].work.phase is Phase.INSTALLED
