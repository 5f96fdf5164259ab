"""Going back: from a retracted release to the release the device came from, under the caps of the stage it leaves.

A device that must go back and cannot — security floor, the target retracted, unsigned, unknown, or none at all — is
held: one event with the reason, and a place in the rollout's list. It is never silently skipped, and goes as soon as it
can.
"""

from __future__ import annotations

import msgspec
from groundswell.rollout.v1 import events_pb2, rollout_pb2

from libs.eventlog.model import Context
from services.rollout.domain import attempts
from services.rollout.domain.admission import (
    Admitted,
    Refusal,
    bundle_refusal,
    claim_refusal,
    room_refusal,
    window_refusal,
)
from services.rollout.domain.draft import Draft
from services.rollout.domain.state import ROLLBACK, DeviceFacts, Seen, State, cap_of, claim_key, way_back_key

_GOES_BACK = frozenset({rollout_pb2.Rollout.STATE_ROLLING_BACK, rollout_pb2.Rollout.STATE_ROLLED_BACK})


class Hold(msgspec.Struct, frozen=True, gc=False):
    """The device stays where it is, and why."""

    rollout: str
    stage: int
    refusal: Refusal


def judge_way_back(
    state: State, ctx: Context, facts: DeviceFacts, seen: Seen, retracted: str
) -> Admitted | Refusal | Hold:
    """Say whether the device may go back now, to what, and in whose slot."""
    release = state.releases.get(retracted)
    if release is None or not release.retracted:
        return Refusal("RELEASE_NOT_RETRACTED", "the release was not retracted, as far as is known here", retracted)
    if seen.running.release != retracted:
        return Refusal("NOT_RUNNING_IT", "the device does not run the retracted release", retracted)
    rollout = state.owners.get(retracted, "")
    plan = state.rollouts.get(rollout)
    if plan is None or plan.control.state not in _GOES_BACK:
        return Refusal(
            "ROLLOUT_NOT_ROLLING_BACK", "the rollout of the release is not rolling back", rollout or retracted
        )
    there = state.claims.get(claim_key(facts.name, retracted))
    stage = (
        state.attempts[there.attempts[-1]].stage
        if there is not None and there.attempts
        else _first_stage(plan.control, retracted)
    )
    target = there.came_from.release if there is not None else ""
    missing = _target_refusal(state, ctx, facts, seen, target)
    if missing is not None and missing.code == "RESOURCE_PARKED":
        return missing  # passes by itself
    if missing is not None:
        return Hold(rollout, stage, missing)
    back = way_back_key(facts.name, retracted)
    refusal = (
        claim_refusal(state, state.claims.get(back))
        or window_refusal(state, ctx, facts.name, rollout, rollout)
        or room_refusal(state, ctx, rollout, stage, ROLLBACK)
    )
    if refusal is not None:
        return refusal
    bundle = state.bundles[state.releases[target].bundle]
    return Admitted(back, bundle, target, rollout, stage, cap_of(plan.control.stages[stage]))


def _first_stage(control: rollout_pb2.Rollout, release: str) -> int:
    return next(index for index, status in enumerate(control.stage_statuses) if status.release == release)


def _target_refusal(state: State, ctx: Context, facts: DeviceFacts, seen: Seen, target: str) -> Refusal | None:
    if not target:
        return Refusal("CAME_FROM_NO_RELEASE", "the device came from no release", facts.name)
    release = state.releases.get(target)
    if release is None:
        return Refusal("TARGET_UNKNOWN", "the release it came from does not exist", target)
    if release.retracted:
        return Refusal("TARGET_RETRACTED", "the release it came from was retracted too", target)
    return bundle_refusal(state, ctx, facts, seen, release.bundle)


def hold(draft: Draft, device: str, retracted: str, held: Hold) -> None:
    """Say once that the device is held."""
    claim = draft.state.claims.get(way_back_key(device, retracted))
    if claim is not None and claim.held == held.refusal.code:
        return
    refusal = held.refusal
    payload = events_pb2.DeviceHeld(
        device=device,
        rollout=held.rollout,
        stage=held.stage,
        reason=attempts.reason(refusal.code, refusal.message, refusal.subject, blocking=True),
        release=retracted,
    )
    draft.emit(device, payload)
    draft.touched[held.rollout] = None
