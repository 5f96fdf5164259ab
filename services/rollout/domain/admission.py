"""Admission: may this device be offered this candidate now? Judged from the leader's own state; no gateway is trusted.

Checks go from what never changes to what changes soonest. A refusal says whether it *ends* the list of candidates
(security floor, a bundle that cannot be offered: nothing older is tried), whether it is *final* for a live attempt
(then ``go`` answers cancel, otherwise wait), and how long the plan stays closed. Refusals write nothing.

* A release without a rollout is an implicit plan of one stage without cap: its phase by tags, share and count holds.
* The release of a completed rollout is a plain one that reaches whom its stages reached: tags, shares and counts of the
  stages stay in force until somebody gives it a phase of its own. A hotfix for tagged devices stays one.
* Outside the product's maintenance window nothing is granted; expedited rollouts do not wait for it.
* A device superseded by an emergency drops what it has not switched to yet, if the emergency means it too.
"""

from __future__ import annotations

import uuid
from typing import Final

import msgspec
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import rollout_pb2
from msgspec.structs import replace

from libs.eventlog.model import Context
from libs.resolution.buckets import in_share
from services.rollout.domain import attempts, summary
from services.rollout.domain.stages import REACHED
from services.rollout.domain.state import (
    FORWARD,
    ROLLBACK,
    WENT_DARK,
    Attempt,
    BundleFacts,
    Claim,
    Counts,
    DeviceFacts,
    Plan,
    Seen,
    State,
    cap_of,
    claim_key,
    product_of,
    tries_key,
    tries_of,
)
from services.rollout.domain.windows import closed_for_ms

_Rollout = rollout_pb2.Rollout

NOT_YET_KNOWN_MS: Final = 2_000
CLOSED_MS: Final = 10_000
"""For plans that only an operator opens again; gateways forget it at the next public event of the plan."""
FULL_MS: Final = 1_000
INBOX_LIMIT_MS: Final = 2_000
RETRY_BUDGET: Final = 10
"""Attempts of one device at one target that may fail, whatever an operator retries."""


class Refusal(msgspec.Struct, frozen=True, gc=False):
    """Why not."""

    code: str
    message: str
    subject: str = ""
    closed_for_ms: int = 0
    plan: str = ""
    ends: bool = False
    final: bool = False


class Admitted(msgspec.Struct, frozen=True, gc=False):
    """What may be granted."""

    claim: str
    bundle: BundleFacts
    release: str = ""
    rollout: str = ""
    stage: int = 0
    cap: int = 0
    came_through: str = ""
    """Override it comes from."""


_STATE_REFUSALS: Final[dict[int, tuple[str, str, bool]]] = {
    _Rollout.STATE_DRAFT: ("ROLLOUT_NOT_STARTED", "the rollout has not started", False),
    _Rollout.STATE_PAUSED: ("ROLLOUT_PAUSED", "the rollout is paused", False),
    _Rollout.STATE_HALTED: ("ROLLOUT_HALTED", "a gate of the rollout tripped", False),
    _Rollout.STATE_ROLLING_BACK: ("ROLLOUT_ROLLING_BACK", "the rollout is being rolled back", True),
    _Rollout.STATE_ROLLED_BACK: ("ROLLOUT_ROLLED_BACK", "the rollout was rolled back", True),
    _Rollout.STATE_ABORTED: ("ROLLOUT_ABORTED", "the rollout was aborted", True),
    _Rollout.STATE_KILLED: ("ROLLOUT_KILLED", "the rollout was killed", True),
}


def device_refusal(state: State, ctx: Context, device: str, uid: str) -> Refusal | None:
    """Whether the device takes part at all."""
    facts = state.devices.get(device)
    if ctx.parked(device):
        return Refusal("RESOURCE_PARKED", "a record of the device is not understood yet", device)
    if facts is None:
        return Refusal("DEVICE_NOT_YET_KNOWN", "the device is not known here yet", device, NOT_YET_KNOWN_MS)
    if uid and uid != facts.uid:
        return Refusal("IDENTITY_MISMATCH", "the device's UUID is another", device, final=True)
    if facts.retired:
        return Refusal("DEVICE_RETIRED", "the device is retired", device, final=True)
    if facts.quarantined:
        return Refusal("DEVICE_QUARANTINED", "the device is quarantined", device)
    if state.seen.get(device, Seen()).cloned:
        return Refusal("IDENTITY_CLONED", "two agents use this identity", device, final=True)
    return None


def bundle_refusal(state: State, ctx: Context, facts: DeviceFacts, seen: Seen, bundle: str) -> Refusal | None:
    """Whether the bundle may reach this device: security floor, signatures, target."""
    if ctx.parked(bundle):
        return Refusal("RESOURCE_PARKED", "a record of the bundle is not understood yet", bundle)
    known = state.bundles.get(bundle)
    if known is None:
        return Refusal("BUNDLE_NOT_YET_KNOWN", "the bundle is not known here yet", bundle, ends=True)
    if known.bundle.security_version < seen.floor:
        message = f"security version {known.bundle.security_version} is below the confirmed {seen.floor}"
        return Refusal("SECURITY_FLOOR", message, bundle, ends=True, final=True)
    if not known.bundle.offerable:
        return Refusal(
            "BUNDLE_NOT_OFFERABLE", known.bundle.not_offerable_reason or "not offerable", bundle, ends=True, final=True
        )
    if not any(entry.target in (facts.target, "portable") for entry in known.bundle.entries):
        return Refusal("NO_BINARY_FOR_TARGET", f"no binary for target {facts.target!r}", bundle, final=True)
    return None


def release_refusal(state: State, ctx: Context, facts: DeviceFacts, name: str) -> Refusal | None:
    """Whether the release can be a target of this device."""
    cohort = name.partition("/releases/")[0]
    if ctx.parked(cohort):
        return Refusal("RESOURCE_PARKED", "a record of the cohort's graph is not understood yet", cohort)
    release = state.releases.get(name)
    if release is None:
        return Refusal("RELEASE_NOT_YET_KNOWN", "the release is not known here yet", name)
    if release.retracted:
        return Refusal("RELEASE_RETRACTED", "the release was retracted", name, final=True)
    if release.disabled:
        return Refusal("RELEASE_DISABLED", "the release is disabled", name, final=True)
    if facts.cohort != cohort:
        return Refusal("COHORT_MISMATCH", "the device is not in the cohort of the release", name, final=True)
    if release.HasField("schedule_time") and release.schedule_time.ToMilliseconds() > ctx.now_ms:
        return Refusal("NOT_SCHEDULED_YET", "its time has not come", name)
    return None


def claim_refusal(state: State, claim: Claim | None) -> Refusal | None:
    """A failed or reverted device gets no further attempt at that target until someone retries it."""
    if claim is None or not claim.attempts:
        return None
    last = state.attempts[claim.attempts[-1]]
    if last.state == WENT_DARK:
        return Refusal("WENT_DARK", "the outcome of an earlier attempt is not known yet", last.name)
    tries = state.tries.get(tries_of(state, last))
    if attempts.closed_by(last) and not (tries is not None and tries.allowed):
        return Refusal("ALREADY_FAILED", f"an earlier attempt ended with {last.code or 'a failure'}", last.name)
    return None


def retry_allowed(state: State, key: str, rollout: str) -> bool:
    """Whether somebody retried a device after its last failure."""
    tries, plan = state.tries[key], state.rollouts.get(rollout)
    return tries.allowed or (plan is not None and plan.control.retries > tries.epoch)


def tries_refusal(state: State, facts: DeviceFacts, release: str, bundle: str) -> Refusal | None:
    """The same for a release. What counts is device and rollout (or bundle): a move to another cohort resets none."""
    claim = state.claims.get(claim_key(facts.name, release))
    if claim is not None and claim.attempts and state.attempts[claim.attempts[-1]].state == WENT_DARK:
        return claim_refusal(state, claim)
    key = tries_key(state, facts.name, release, bundle)
    tries = state.tries.get(key)
    if tries is None or not tries.failed:
        return None
    if tries.failed >= RETRY_BUDGET:
        return Refusal("RETRY_BUDGET_SPENT", f"{tries.failed} attempts of the device failed", release)
    if retry_allowed(state, key, state.owners.get(release, "")):
        return None
    return Refusal("ALREADY_FAILED", f"an earlier attempt ended with {tries.code or 'a failure'}", release)


def window_refusal(state: State, ctx: Context, device: str, rollout: str, plan: str) -> Refusal | None:
    """Whether the product's maintenance window is closed, and the rollout is no emergency."""
    window = product_of(state, device).window
    if window is None or (rollout and state.rollouts[rollout].control.expedited):
        return None
    closed = closed_for_ms(window, ctx.now_ms)
    if not closed:
        return None
    message = f"the maintenance window opens in {-(-closed // 1000)} s"
    return Refusal("MAINTENANCE_WINDOW_CLOSED", message, plan, closed, plan)


def override_refusal(state: State, ctx: Context, device: str, name: str, bundle: str) -> Refusal | None:
    """Whether the override is active now and speaks of this device and bundle."""
    if ctx.parked(name):
        return Refusal("RESOURCE_PARKED", "a record of the override is not understood yet", name)
    override = state.overrides.get(name)
    if override is None:
        return Refusal("OVERRIDE_NOT_YET_KNOWN", "the override is not known here yet", name, ends=True)
    started = override.start_time.ToMilliseconds() <= ctx.now_ms
    ended = override.HasField("end_time") and override.end_time.ToMilliseconds() <= ctx.now_ms
    if not started or ended:
        return Refusal("OVERRIDE_NOT_ACTIVE", "the override is not active now", name, ends=True, final=True)
    if device not in override.devices or bundle != override.bundle:
        return Refusal(
            "OVERRIDE_MISMATCH", "the override is not about this device and bundle", name, ends=True, final=True
        )
    return None


def managing_rollout(state: State, release: releases_pb2.Release) -> str:
    """The rollout whose stages limit a release; a completed one leaves a plain release behind."""
    plan = state.rollouts.get(release.rollout) if release.rollout else None
    if release.rollout and (plan is None or plan.control.state != _Rollout.STATE_COMPLETED):
        return release.rollout
    return ""


def rollout_refusal(state: State, rollout: str) -> Refusal | None:
    """Whether the rollout grants at all in its control state."""
    plan = state.rollouts.get(rollout)
    if plan is None:
        return Refusal("ROLLOUT_UNKNOWN", "the rollout is not known here", rollout)
    found = _STATE_REFUSALS.get(plan.control.state)
    if found is None:
        return None
    code, message, final = found
    by = plan.control.superseded_by
    if by and plan.control.state == _Rollout.STATE_PAUSED:
        return Refusal("ROLLOUT_SUPERSEDED", f"paused until {by} ends", rollout, CLOSED_MS, rollout)
    return Refusal(code, message, rollout, CLOSED_MS, rollout, final=final)


def is_meant(plan: Plan, facts: DeviceFacts) -> bool:
    """Whether a stage of the rollout speaks of the device."""
    return any(
        stage.cohort == facts.cohort and (not stage.tags or not facts.tags.isdisjoint(stage.tags))
        for stage in plan.control.stages
    )


def room_refusal(state: State, ctx: Context, rollout: str, stage: int, kind: int = FORWARD) -> Refusal | None:
    """I1: nothing is granted where in flight has reached the cap. The rate is about going forward only."""
    plan = state.rollouts[rollout]
    cap = cap_of(plan.control.stages[stage])
    counts = plan.counts[stage]
    if counts.in_flight >= cap:
        return Refusal(
            "STAGE_AT_CAPACITY", f"{counts.in_flight} of {cap} attempts are in flight", rollout, FULL_MS, rollout
        )
    rate = plan.control.stages[stage].max_grants_per_minute if kind == FORWARD else 0
    left_ms = summary.wait_ms(counts.pace, ctx.now_ms, rate)
    if left_ms > 0:
        return Refusal("STAGE_RATE_LIMITED", f"{rate} grants a minute are used up", rollout, left_ms, rollout)
    return None


def _within(
    facts: DeviceFacts,
    salt: str,
    tags: tuple[str, ...],
    share_ppm: int,
    count: int,
    counts: Counts,
    *,
    holds_claim: bool,
    plan: str,
) -> Refusal | None:
    untagged = _untagged(facts, tags, plan)
    if untagged is not None:
        return untagged
    if holds_claim:
        return None  # a claim is permanent: a share that fell or a count that filled takes nothing away
    if share_ppm and not in_share(uuid.UUID(salt).bytes, uuid.UUID(facts.uid).bytes, share_ppm):
        return Refusal("OUTSIDE_SHARE", f"the device is outside the share of {share_ppm} ppm", plan)
    if count and counts.claimed >= count:
        return Refusal("COUNT_REACHED", f"all {count} places are taken", plan)
    return None


def _stage_for(
    state: State, ctx: Context, facts: DeviceFacts, claim: Claim | None, release: str, rollout: str
) -> int | Refusal:
    """The stage whose slot the device would hold: that of its claim, else the first open one that takes it."""
    plan = state.rollouts[rollout]
    held = state.attempts[claim.attempts[-1]].stage if claim is not None and claim.attempts else None
    refusal = Refusal("STAGE_NOT_OPEN", "the stage of the release is not open", rollout, FULL_MS, rollout)
    for stage, status in enumerate(plan.control.stage_statuses):
        if status.release != release or (held is not None and stage != held):
            continue
        if status.state not in REACHED:
            continue
        if stage > plan.control.current_stage:
            refusal = Refusal("STAGE_NOT_CURRENT", "an earlier stage re-opened", rollout, FULL_MS, rollout)
            continue
        spec = plan.control.stages[stage]
        outside = _within(
            facts, plan.control.uid, tuple(spec.tags), spec.share_ppm, spec.count, plan.counts[stage],
            holds_claim=held is not None, plan=rollout,
        )  # fmt: skip
        refused = outside or room_refusal(state, ctx, rollout, stage)
        if refused is None:
            return stage
        refusal = refused
    return refusal


def judge_release(
    state: State, ctx: Context, facts: DeviceFacts, seen: Seen, candidate: releases_pb2.Candidate
) -> Admitted | Refusal:
    """A forward candidate: a stage of a rollout, or a plain release as an implicit plan."""
    name = candidate.release
    refusal = release_refusal(state, ctx, facts, name)
    if refusal is not None:
        return refusal
    release = state.releases[name]
    if candidate.bundle and candidate.bundle != release.bundle:
        return Refusal("BUNDLE_MISMATCH", "the release has another bundle", name)
    refusal = bundle_refusal(state, ctx, facts, seen, release.bundle)
    if refusal is not None:
        return refusal
    if seen.running.release == name:
        return Refusal("ALREADY_RUNNING", "the device runs it", name)
    key = claim_key(facts.name, name)
    claim = state.claims.get(key)
    refusal = tries_refusal(state, facts, name, release.bundle)
    if refusal is not None:
        return refusal
    rollout = managing_rollout(state, release)
    bundle = state.bundles[release.bundle]
    if rollout:
        refusal = rollout_refusal(state, rollout) or window_refusal(state, ctx, facts.name, rollout, rollout)
        if refusal is not None:
            return refusal
        stage = _stage_for(state, ctx, facts, claim, name, rollout)
        if isinstance(stage, Refusal):
            return stage
        return Admitted(key, bundle, name, rollout, stage, cap_of(state.rollouts[rollout].control.stages[stage]))
    refusal = window_refusal(state, ctx, facts.name, "", name) or _phase_refusal(state, facts, claim, release)
    return refusal or Admitted(key, bundle, name)


def _phase_refusal(
    state: State, facts: DeviceFacts, claim: Claim | None, release: releases_pb2.Release
) -> Refusal | None:
    """Whether a plain release reaches the device: by its phase, else by the stages of the rollout that made it."""
    name, phase, counts = release.name, release.phase, state.plain.get(release.name, Counts())
    owner = state.rollouts.get(state.owners.get(name, ""))
    if owner is None or release.HasField("phase"):
        return _within(
            facts, release.uid, tuple(phase.tags), phase.share_ppm, phase.count, counts,
            holds_claim=claim is not None, plan=name,
        )  # fmt: skip
    refusal = None
    for stage, status, before in zip(owner.control.stages, owner.control.stage_statuses, owner.counts, strict=True):
        if status.release != name:
            continue
        so_far = Counts(claimed=before.claimed + counts.claimed)
        refusal = _within(
            facts, owner.control.uid, tuple(stage.tags), stage.share_ppm, stage.count, so_far,
            holds_claim=claim is not None, plan=name,
        )  # fmt: skip
        if refusal is None:
            return None
    return refusal


def judge_override(
    state: State, ctx: Context, facts: DeviceFacts, seen: Seen, candidate: releases_pb2.Candidate
) -> Admitted | Refusal:
    """A candidate of an override: an implicit plan whose release is empty."""
    refusal = (
        override_refusal(state, ctx, facts.name, candidate.bundle_override, candidate.bundle)
        or bundle_refusal(state, ctx, facts, seen, candidate.bundle)
    )  # fmt: skip
    if refusal is not None:
        return refusal
    if seen.running.bundle == candidate.bundle:
        return Refusal("ALREADY_RUNNING", "the device runs it", candidate.bundle, ends=True)
    key = claim_key(facts.name, candidate.bundle)
    refusal = claim_refusal(state, state.claims.get(key)) or window_refusal(
        state, ctx, facts.name, "", candidate.bundle_override
    )
    if refusal is not None:
        return refusal
    return Admitted(key, state.bundles[candidate.bundle], came_through=candidate.bundle_override)


def standing_refusal(state: State, ctx: Context, attempt: Attempt) -> Refusal | None:
    """Every admission check again, except the caps: what stands against a live attempt now."""
    refusal = device_refusal(state, ctx, attempt.device, "")
    if refusal is not None:
        return refusal
    facts, seen = state.devices[attempt.device], state.seen[attempt.device]
    refusal = bundle_refusal(state, ctx, facts, seen, attempt.bundle)
    if refusal is not None:
        return refusal
    if attempt.kind == ROLLBACK:
        refusal = _standing_way_back(state, attempt)
    elif not attempt.release:
        refusal = _standing_override(state, ctx, attempt)
    else:
        refusal = release_refusal(state, ctx, facts, attempt.release) or _standing_in_plan(state, facts, attempt)
    return refusal or window_refusal(state, ctx, attempt.device, attempt.rollout, attempt.plan)


def _standing_way_back(state: State, attempt: Attempt) -> Refusal | None:
    target = state.releases.get(attempt.release)
    if target is None or target.retracted:
        return Refusal("RELEASE_RETRACTED", "the release it leads back to is gone", attempt.release, final=True)
    if attempt.rollout and state.rollouts[attempt.rollout].control.state == _Rollout.STATE_KILLED:
        return rollout_refusal(state, attempt.rollout)
    return None


def _standing_override(state: State, ctx: Context, attempt: Attempt) -> Refusal | None:
    for name, override in state.overrides.items():
        if override.bundle == attempt.bundle and not override_refusal(state, ctx, attempt.device, name, attempt.bundle):
            return None
    return Refusal(
        "OVERRIDE_NOT_ACTIVE", "no active override is about this device and bundle", attempt.bundle, final=True
    )


def _standing_in_plan(state: State, facts: DeviceFacts, attempt: Attempt) -> Refusal | None:
    """Tags and the state of the plan; a device that holds a claim keeps it whatever share and count say."""
    if not attempt.rollout:
        tags: tuple[str, ...] = tuple(state.releases[attempt.release].phase.tags)
        return _untagged(facts, tags, attempt.plan)
    plan = state.rollouts[attempt.rollout]
    refusal = rollout_refusal(state, attempt.rollout)
    if refusal is not None:
        by = state.rollouts.get(plan.control.superseded_by)
        if by is not None and refusal.code == "ROLLOUT_SUPERSEDED" and is_meant(by, facts):
            return replace(refusal, final=True)
        return refusal
    if attempt.stage > plan.control.current_stage:
        return Refusal("STAGE_NOT_CURRENT", "an earlier stage re-opened", attempt.rollout, FULL_MS, attempt.rollout)
    return _untagged(facts, tuple(plan.control.stages[attempt.stage].tags), attempt.rollout)


def _untagged(facts: DeviceFacts, tags: tuple[str, ...], plan: str) -> Refusal | None:
    if tags and facts.tags.isdisjoint(tags):
        return Refusal("TAGS_NOT_MATCHED", "the device has none of the tags", plan, final=True)
    return None
