"""The table of attempt states, cell by cell (protocols.md section 2)."""

from __future__ import annotations

import pytest
from groundswell.device.v1 import device_pb2
from groundswell.rollout.v1 import events_pb2
from msgspec.structs import replace

from services.rollout.domain.attempts import may_move
from services.rollout.domain.state import FORWARD, PLAIN_POLICY, Attempt

NAMES = {name.removeprefix("ATTEMPT_STATE_"): number for name, number in device_pb2.AttemptState.items() if number}
PROGRESS = ["GRANTED", "ACCEPTED", "DOWNLOADING", "DOWNLOADED", "INSTALLED"]
TABLE: dict[str, set[str]] = {
    **{
        state: {*PROGRESS[index + 1 :], "FAILED", "EXPIRED", "CANCELLED"}
        for index, state in enumerate(PROGRESS)
    },
    "BOOTED": {"CONFIRMED", "FAILED", "REVERTED", "WENT_DARK"},
    "CONFIRMED": {"FAILED", "REVERTED", "WENT_DARK"},
    "WENT_DARK": {"CONFIRMED", "FAILED", "REVERTED"},
    "FAILED": set(),
    "REVERTED": set(),
    "EXPIRED": set(),
    "CANCELLED": set(),
}  # fmt: skip
WITH_GO = {state: (TABLE[state] - {"EXPIRED", "CANCELLED"}) | {"BOOTED", "REVERTED", "WENT_DARK"} for state in PROGRESS}
BASE = Attempt(
    name="a", device="d", claim="c", plan="p", rollout="", stage=0, kind=FORWARD, release="r", bundle="b", version="1",
    security_version=0, rollback_of="", state=1, policy=PLAIN_POLICY, ordinal=1, granted_ms=0,
    receipt=events_pb2.AttemptGranted(), lease_from_ms=0, first_lease_ms=0,
)  # fmt: skip


@pytest.mark.parametrize("go", [False, True])
@pytest.mark.parametrize("state", NAMES)
def test_only_what_the_table_says(state: str, go: bool) -> None:
    allowed = WITH_GO.get(state, TABLE[state]) if go else TABLE[state]
    attempt = replace(BASE, state=NAMES[state], go=go)
    assert {to for to, number in NAMES.items() if may_move(attempt, number)} == allowed


def test_in_flight_is_everything_up_to_booted() -> None:
    counted = {name for name, number in NAMES.items() if replace(BASE, state=number).in_flight}
    assert counted == {*PROGRESS, "BOOTED"}


def test_a_superseded_attempt_moves_no_more() -> None:
    for number in NAMES.values():
        attempt = replace(BASE, state=number, superseded=True, go=True)
        assert not any(may_move(attempt, to) for to in NAMES.values())
