"""The table of attempt states (protocols.md section 2) and the events that walk through it.

Nothing else appends AttemptGranted, AttemptMoved or AttemptSoaked, so the table is obeyed everywhere:

* reports only move forward; ``go`` is needed for BOOTED, REVERTED and WENT_DARK, and after it nothing expires or is
  cancelled; a confirmation can be withdrawn; a dark device may still show up, but never gets back in flight;
* the third EXPIRED of a claim is FAILED;
* an attempt superseded by a later one of its claim moves no more.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.device.v1 import device_pb2
from groundswell.rollout.v1 import events_pb2, rollout_pb2

from libs.eventlog.model import Public
from services.rollout.domain.draft import Draft
from services.rollout.domain.observation import Observation
from services.rollout.domain.state import (
    BOOTED,
    CANCELLED,
    CONFIRMED,
    EXPIRED,
    FAILED,
    FORWARD,
    GRANTED,
    INSTALLED,
    REVERTED,
    ROLLBACK,
    WENT_DARK,
    Attempt,
    State,
    Tries,
    product_of,
    tries_of,
)
from services.rollout.domain.tally import counts_of
from services.rollout.domain.windows import closed_for_ms

LAST_EXPIRY: Final = 3
_AFTER: Final[dict[int, frozenset[int]]] = {
    BOOTED: frozenset({CONFIRMED, FAILED, REVERTED, WENT_DARK}),
    CONFIRMED: frozenset({FAILED, REVERTED, WENT_DARK}),
    WENT_DARK: frozenset({CONFIRMED, FAILED, REVERTED}),
}
_NEEDS_GO: Final = frozenset({BOOTED, REVERTED, WENT_DARK})
_NOT_AFTER_GO: Final = frozenset({EXPIRED, CANCELLED})
_NONE: Final = Tries()
_Rollout = rollout_pb2.Rollout
_WAITING: Final = frozenset({_Rollout.STATE_PAUSED, _Rollout.STATE_HALTED})


def may_move(attempt: Attempt, to: int) -> bool:
    """The table."""
    if attempt.superseded:
        return False
    if GRANTED <= attempt.state <= INSTALLED:
        if attempt.state < to <= INSTALLED or to == FAILED:
            return True
        return (to in _NEEDS_GO and attempt.go) or (to in _NOT_AFTER_GO and not attempt.go)
    return to in _AFTER.get(attempt.state, ())


def closed_by(attempt: Attempt) -> bool:
    """Whether this outcome of the last attempt forbids another at the same target until someone retries it."""
    return attempt.state in (FAILED, REVERTED)


def timestamp(ms: int) -> Timestamp:
    """Milliseconds since the epoch as a proto timestamp."""
    return Timestamp(seconds=ms // 1000, nanos=ms % 1000 * 1_000_000)


def attempt_proto(state: State, attempt: Attempt) -> rollout_pb2.Attempt:
    """After-image of an attempt."""
    facts = state.devices.get(attempt.device)
    return rollout_pb2.Attempt(
        name=attempt.name,
        device=attempt.device,
        device_uid=facts.uid if facts is not None else attempt.receipt.attempt.device_uid,
        release=attempt.release,
        bundle=attempt.bundle,
        rollout=attempt.rollout,
        stage=attempt.stage,
        kind=attempt.kind,  # type: ignore[arg-type]
        rollback_of=attempt.rollback_of,
        state=attempt.state,  # type: ignore[arg-type]
        go_given=attempt.go,
        withdrawn=attempt.withdrawn,
        code=attempt.code,
        ordinal=attempt.ordinal,
        security_version=attempt.security_version,
        grant_time=timestamp(attempt.granted_ms),
    )


def _change(attempt: Attempt) -> str:
    """Webhook event type of the outcome; empty for progress, which is not published."""
    if attempt.withdrawn:
        return "device.update_withdrawn"
    match attempt.state:
        case s if s == CONFIRMED:
            return "device.rolled_back" if attempt.kind == ROLLBACK else "device.update_confirmed"
        case s if s in (FAILED, REVERTED, WENT_DARK):
            return "device.update_failed"
        case s if s in (EXPIRED, CANCELLED):
            return "device.update_cancelled"
    return ""


def _publish(state: State, name: str, change: str) -> tuple[Public, ...]:
    if not change:
        return ()
    image = attempt_proto(state, state.attempts[name])
    return (Public(name, events_pb2.AttemptChanged(attempt=image, change=change)),)


def grant(draft: Draft, granted: events_pb2.AttemptGranted) -> Attempt:
    """Append a grant that admission allowed; the event is the receipt of the offer."""
    name = granted.attempt.name
    draft.emit(name, granted, lambda state: _publish(state, name, "device.claimed_release"))
    return draft.state.attempts[name]


def move(
    draft: Draft,
    attempt: Attempt,
    to: int,
    code: str = "",
    detail: str = "",
    *,
    observed: Observation | None = None,
) -> None:
    """Append one step of the table; the caller asked ``may_move`` (or renews the lease by ``to == attempt.state``).

    With the step goes what the check-in that reported it said of its device, if no other event has that yet.
    """
    if to == EXPIRED and draft.state.tries.get(tries_of(draft.state, attempt), _NONE).expired + 1 >= LAST_EXPIRY:
        to = FAILED
    was_confirmed = attempt.state == CONFIRMED or attempt.withdrawn
    withdrawn = was_confirmed and to in (FAILED, REVERTED, WENT_DARK) and attempt.kind == FORWARD
    still = GRANTED <= to <= BOOTED
    in_flight = counts_of(draft.state, attempt).in_flight - (1 if attempt.in_flight and not still else 0)
    payload = events_pb2.AttemptMoved(
        attempt=attempt.name,
        state=to,  # type: ignore[arg-type]
        previous=attempt.state,  # type: ignore[arg-type]
        withdrawn=withdrawn,
        code=code,
        detail=detail,
        rollout=attempt.rollout,
        stage=attempt.stage,
        in_flight_after=in_flight,
        observed=observed.payload if observed is not None else None,
    )
    changed = to != attempt.state

    def public(state: State) -> tuple[Public, ...]:
        told = _publish(state, attempt.name, _change(state.attempts[attempt.name])) if changed else ()
        return told if observed is None else (*observed.public(), *told)

    draft.emit(attempt.name, payload, public)
    if observed is not None:
        observed.touch(draft)
    if attempt.rollout and changed:
        draft.touched[attempt.rollout] = None


def soaked(draft: Draft, attempt: Attempt) -> None:
    """A confirmation held."""
    payload = events_pb2.AttemptSoaked(attempt=attempt.name, rollout=attempt.rollout, stage=attempt.stage)
    draft.emit(attempt.name, payload)
    if attempt.rollout:
        draft.touched[attempt.rollout] = None


def _kept_waiting(draft: Draft, attempt: Attempt) -> bool:
    """Whether the device could not have gone on: its plan is paused, or its window is closed.

    Such an expiry is not held against it.
    """
    plan = draft.state.rollouts.get(attempt.rollout) if attempt.rollout else None
    if plan is not None and attempt.kind == FORWARD and plan.control.state in _WAITING:
        return True
    if plan is not None and plan.control.expedited:
        return False
    return closed_for_ms(product_of(draft.state, attempt.device).window, draft.ctx.now_ms) > 0


def due(draft: Draft, attempt: Attempt) -> None:
    """A deadline has come in stream time: expire, go dark, or be soaked."""
    if attempt.in_flight and not attempt.go and _kept_waiting(draft, attempt):
        move(draft, attempt, CANCELLED, "LEASE_EXPIRED_WAITING", "the lease ended while the server made it wait")
    elif attempt.in_flight and not attempt.go:
        move(draft, attempt, EXPIRED, "LEASE_EXPIRED", "no progress within the lease")
    elif attempt.in_flight:
        move(draft, attempt, WENT_DARK, "WENT_DARK", "took the release and missed its expected check-ins")
    elif attempt.due_ms >= attempt.confirmed_ms + attempt.policy.soak_ms:
        soaked(draft, attempt)
    else:
        move(draft, attempt, WENT_DARK, "WENT_DARK", "missed its expected check-ins in soak")


def reason(
    code: str, message: str, subject: str = "", *, blocking: bool = False, **metadata: object
) -> device_pb2.Reason:
    """A coded reason."""
    values = {key: str(value) for key, value in metadata.items()}
    return device_pb2.Reason(code=code, message=message, subject=subject, blocking=blocking, metadata=values)
