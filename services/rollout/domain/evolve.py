"""The fold: state after an event. Counters, indexes and deadlines follow from the events alone.

Invariants: a counter of a plan changes only here, by the difference between an attempt before and after its event; an
attempt with a deadline is in exactly one bucket of ``due``, that of its deadline or an earlier one, and one without is
in none. Deadlines mostly move later, with each sign of life: an attempt moves to its own bucket only when stream time
comes to the one it is in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from google.protobuf.message import Message
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.rollout.v1 import events_pb2, rollout_pb2
from immutables import Map
from msgspec.structs import replace

from libs.eventlog.model import Event
from services.rollout.domain import facts, summary, tally
from services.rollout.domain.state import (
    CONFIRMED,
    DUE_BUCKET_MS,
    FAILED,
    FORWARD,
    NO_BUCKET,
    PLAIN_POLICY,
    REVERTED,
    ROLLBACK,
    WENT_DARK,
    Attempt,
    Claim,
    Counts,
    Plan,
    Policy,
    Running,
    Seen,
    State,
    claim_key,
    expected_ms,
    policy_of,
    tries_of,
    way_back_key,
)

_Rollout = rollout_pb2.Rollout
ACTIVE_STATES: Final = frozenset(
    {_Rollout.STATE_RUNNING, _Rollout.STATE_PAUSED, _Rollout.STATE_HALTED, _Rollout.STATE_ROLLING_BACK}
)
"""States in which a rollout holds its cohorts."""
_LOST: Final = frozenset({FAILED, REVERTED, WENT_DARK})
"""States of an attempt that say whether its device may still come back."""


def _put(index: Map[str, Map[str, None]], key: str, member: str) -> Map[str, Map[str, None]]:
    return index.set(key, index.get(key, Map()).set(member, None))


def _drop(index: Map[str, Map[str, None]], key: str, member: str) -> Map[str, Map[str, None]]:
    members = index.get(key)
    if members is None or member not in members:
        return index
    rest = members.delete(member)
    return index.set(key, rest) if rest else index.delete(key)


# Deadlines ---------------------------------------------------------------------------------------------------------


def deadline_ms(state: State, attempt: Attempt) -> int:
    """Stream time at which the attempt is due to expire, go dark or be soaked; -1 when nothing is due any more."""
    policy = attempt.policy
    if attempt.in_flight and not attempt.go:
        return min(attempt.lease_from_ms + policy.lease_ms, attempt.first_lease_ms + policy.max_lease_ms)
    if attempt.in_flight:
        return max(silence_ms(state, attempt), attempt.go_ms + policy.go_valid_ms)
    if attempt.in_soak and not attempt.superseded and attempt.kind == FORWARD:
        return min(silence_ms(state, attempt), attempt.confirmed_ms + policy.soak_ms)
    return -1


def silence_ms(state: State, attempt: Attempt) -> int:
    """Stream time at which the device, if it stays silent, is dark."""
    seen = state.seen.get(attempt.device, Seen())
    return seen.last_seen_ms + expected_ms(state, attempt.device) + attempt.policy.dark_after_ms


def _indexed(state: State, attempt: Attempt) -> dict[str, Any]:
    """Store an attempt, with its deadline and in a bucket that is not later."""
    due_ms, held = deadline_ms(state, attempt), attempt.bucket
    bucket = due_ms // DUE_BUCKET_MS if due_ms >= 0 else NO_BUCKET
    if NO_BUCKET < held <= bucket or held == bucket:
        if due_ms != attempt.due_ms:
            attempt = replace(attempt, due_ms=due_ms)
        return {"attempts": state.attempts.set(attempt.name, attempt)}
    changes: dict[str, Any] = {
        "attempts": state.attempts.set(attempt.name, replace(attempt, due_ms=due_ms, bucket=bucket))
    }
    due = state.due
    if held > NO_BUCKET:
        rest = due[held].delete(attempt.name)
        due = due.set(held, rest) if rest else due.delete(held)
    if bucket > NO_BUCKET:
        due = due.set(bucket, due.get(bucket, Map()).set(attempt.name, None))
        changes["due_floor"] = min(state.due_floor, bucket)
    changes["due"] = due
    if held == NO_BUCKET:
        changes["watched"] = state.watched.set(attempt.name, None)
    elif bucket == NO_BUCKET:
        changes["watched"] = state.watched.delete(attempt.name)
    return changes


def _swept(state: State, now: int) -> dict[str, Any]:
    """Stream time has come to bucket ``now``: what is in an earlier one and due later moves to its own.

    What is left in earlier buckets is overdue.
    """
    floor, due, attempts = state.due_floor, state.due, state.attempts
    while floor < now:
        names = due.get(floor)
        if names is not None:
            later = [
                attempt for attempt in (attempts[name] for name in names) if attempt.due_ms // DUE_BUCKET_MS > floor
            ]
            for attempt in later:
                bucket = attempt.due_ms // DUE_BUCKET_MS
                names = names.delete(attempt.name)
                due = due.set(bucket, due.get(bucket, Map()).set(attempt.name, None))
                attempts = attempts.set(attempt.name, replace(attempt, bucket=bucket))
            if names:
                due = due.set(floor, names)
                break
            due = due.delete(floor)
        floor += 1
    return {"due_floor": floor, "due": due, "attempts": attempts}


def _index(state: State, attempt: Attempt) -> State:
    return replace(state, **_indexed(state, attempt))


def _store(state: State, before: Attempt, after: Attempt) -> State:
    counts = tally.recount(state, tally.counts_of(state, after), before, after)
    return replace(state, **tally.placed(state, after, counts), **_indexed(state, after))


# Devices that must come back ---------------------------------------------------------------------------------------


def _awaited_by(state: State, device: str) -> str:
    """The rollout that must wait for this device to come back, if it were rolled back now; empty when none."""
    seen = state.seen.get(device)
    release = seen.running.release if seen is not None else ""
    rollout = state.owners.get(release, "") if release else ""
    if not rollout:
        return ""
    back = state.claims.get(way_back_key(device, release))
    if back is not None:
        if back.held:
            return ""
        if back.attempts and state.attempts[back.attempts[-1]].state in _LOST:
            return ""
    there = state.claims.get(claim_key(device, release))
    if there is not None and there.attempts and state.attempts[there.attempts[-1]].state == WENT_DARK:
        return ""
    return rollout


def _with_awaited(state: State, before: str, after: str) -> State:
    if before == after:
        return state
    rollouts = state.rollouts
    for name, amount in ((before, -1), (after, 1)):
        plan = rollouts.get(name)
        if plan is not None:
            rollouts = rollouts.set(name, replace(plan, to_return=plan.to_return + amount))
    return replace(state, rollouts=rollouts)


# Events of attempts ------------------------------------------------------------------------------------------------


def _policy_for(state: State, attempt: rollout_pb2.Attempt) -> Policy:
    plan = state.rollouts.get(attempt.rollout) if attempt.rollout else None
    return plan.policies[attempt.stage] if plan is not None else PLAIN_POLICY


def _let_go(state: State, rollout: str, device: str) -> State:
    """The device is held no longer."""
    plan = state.rollouts[rollout]
    if device not in plan.held:
        return state
    return replace(state, rollouts=state.rollouts.set(rollout, replace(plan, held=plan.held.delete(device))))


def _granted(state: State, payload: events_pb2.AttemptGranted, event: Event) -> State:
    it = payload.attempt
    key = (
        way_back_key(it.device, it.rollback_of)
        if it.kind == ROLLBACK
        else claim_key(it.device, it.release or it.bundle)
    )
    attempt = Attempt(
        name=it.name,
        device=it.device,
        claim=key,
        plan=it.rollout or it.release or it.bundle,
        rollout=it.rollout,
        stage=it.stage,
        kind=it.kind,
        release=it.release,
        bundle=it.bundle,
        version=payload.version,
        security_version=it.security_version,
        rollback_of=it.rollback_of,
        state=it.state,
        policy=_policy_for(state, it),
        ordinal=it.ordinal,
        granted_ms=event.occurred_at_ms,
        receipt=payload,
        lease_from_ms=state.stream_ms,
        first_lease_ms=state.stream_ms,
    )
    came_from = Running(payload.came_from_release, payload.came_from_bundle, payload.came_from_version)
    claim = state.claims.get(key) or Claim(key, it.device, came_from, ())
    fresh = not claim.attempts
    if claim.attempts:
        last = state.attempts[claim.attempts[-1]]
        state = _store(state, last, replace(last, superseded=True))
    counts = tally.counts_of(state, attempt)
    if it.kind == FORWARD:
        pace = summary.granted(counts.pace, event.occurred_at_ms, tally.rate(state, it))
        counts = replace(counts, claimed=counts.claimed + (1 if fresh else 0), pace=pace)
    elif claim.held:
        counts = replace(counts, held=counts.held - 1)
        state = _let_go(state, it.rollout, it.device)
    counts = tally.recount(state, counts, None, attempt)
    seen = state.seen.get(it.device, Seen())
    changes = tally.placed(state, attempt, counts) | _indexed(state, attempt)
    if it.rollout:
        changes["by_rollout"] = _put(state.by_rollout, it.rollout, it.name)
    return replace(
        state,
        claims=state.claims.set(key, replace(claim, attempts=(*claim.attempts, it.name), held="")),
        seen=state.seen.set(it.device, replace(seen, live=it.name, attempts=(*seen.attempts, it.name))),
        live=_put(state.live, attempt.plan, it.name),
        **changes,
    )


def _moved(state: State, payload: events_pb2.AttemptMoved, event: Event) -> State:
    if payload.HasField("observed"):
        state = _observed(state, payload.observed, event)
    before = state.attempts[payload.attempt]
    seen = state.seen[before.device]
    after = replace(
        before,
        state=payload.state,
        withdrawn=payload.withdrawn,
        code=payload.code,
        lease_from_ms=state.stream_ms,
        confirmed_ms=state.stream_ms if payload.state == CONFIRMED else before.confirmed_ms,
        soaked=before.soaked and payload.state == CONFIRMED,
    )
    changes: dict[str, Any] = {}
    seen_changes: dict[str, Any] = {}
    if before.in_flight and not after.in_flight:
        changes["live"] = _drop(state.live, before.plan, before.name)
        if seen.live == before.name:
            seen_changes["live"] = ""
    if after.state in (CONFIRMED, WENT_DARK) and not after.superseded:
        seen_changes["anchor"] = after.name
    elif seen.anchor == after.name:
        seen_changes["anchor"] = ""
    if after.state == CONFIRMED:
        seen_changes["floor"] = max(seen.floor, after.security_version)
    if seen_changes:
        changes["seen"] = state.seen.set(before.device, replace(seen, **seen_changes))
    changes |= tally.tried(state, before, after)
    changes |= tally.moved(state, before, after, event)
    changes |= _indexed(state, after)
    return replace(state, **changes)


def _retry_allowed(state: State, payload: events_pb2.RetryAllowed, _event: Event) -> State:
    key = f"{payload.device} {payload.rollout}"
    if payload.attempt:
        key = tries_of(state, state.attempts[payload.attempt])
    known = state.tries[key]
    return replace(state, tries=state.tries.set(key, replace(known, allowed=True)))


def _go(state: State, payload: events_pb2.GoGiven, event: Event) -> State:
    if payload.HasField("observed"):
        state = _observed(state, payload.observed, event)
    else:  # it asked just now
        seen = replace(state.seen[payload.device], last_seen_ms=state.stream_ms)
        state = replace(state, seen=state.seen.set(payload.device, seen))
    return _index(state, replace(state.attempts[payload.attempt], go=True, go_ms=state.stream_ms))


def _soaked(state: State, payload: events_pb2.AttemptSoaked, _event: Event) -> State:
    before = state.attempts[payload.attempt]
    return _store(state, before, replace(before, soaked=True))


def _held(state: State, payload: events_pb2.DeviceHeld, _event: Event) -> State:
    key = way_back_key(payload.device, payload.release)
    claim = state.claims.get(key) or Claim(key, payload.device, Running(), ())
    plan = state.rollouts[payload.rollout]
    counts = plan.counts[payload.stage]
    if not claim.held:
        counts = replace(counts, held=counts.held + 1)
    changed = (*plan.counts[: payload.stage], counts, *plan.counts[payload.stage + 1 :])
    plan = replace(plan, counts=changed, held=plan.held.set(payload.device, payload))
    return replace(
        state,
        claims=state.claims.set(key, replace(claim, held=payload.reason.code)),
        rollouts=state.rollouts.set(payload.rollout, plan),
    )


def _observed(state: State, payload: events_pb2.DeviceObserved, _event: Event) -> State:
    before = state.seen.get(payload.device, Seen())
    retired = before.retired_instances
    if before.instance and payload.instance != before.instance:
        retired |= {before.instance}
    it = payload.running
    after = replace(
        before,
        running=Running(it.release, it.bundle, it.version, it.security_version),
        instance=payload.instance,
        retired_instances=retired,
        counter=payload.counter,
        body_sha256=payload.body_sha256,
        floor=max(before.floor, payload.security_floor),
        cloned=payload.cloned,
        gateway=payload.gateway or before.gateway,
        last_seen_ms=state.stream_ms,
    )
    state = replace(state, seen=state.seen.set(payload.device, after))
    if payload.metrics:
        state = tally.measured(state, after, dict(payload.metrics))
    return _reschedule(state, after)


def _reschedule(state: State, seen: Seen) -> State:
    """The device was seen (or its silence is excused): its deadlines move."""
    for name in (seen.live, seen.anchor):
        if not name:
            continue
        attempt = state.attempts[name]
        if attempt.due_ms >= 0 and deadline_ms(state, attempt) != attempt.due_ms:
            state = _index(state, attempt)
    return state


# Events of the stream ----------------------------------------------------------------------------------------------


def _recorded(state: State, payload: events_pb2.ObservationsRecorded, _event: Event) -> State:
    swept = _swept(state, payload.stream_time_ms // DUE_BUCKET_MS)
    return replace(
        state,
        watermarks=state.watermarks.set(payload.source_partition, payload.through_position),
        stream_ms=payload.stream_time_ms,
        append_ms=payload.append_time_ms,
        beats=state.beats.update(dict(payload.beats)) if payload.beats else state.beats,
        **swept,
    )


def _presence(state: State, payload: events_pb2.GatewayPresenceChanged, _event: Event) -> State:
    if not payload.lost:
        return replace(state, lost=state.lost.delete(payload.gateway)) if payload.gateway in state.lost else state
    state = replace(state, lost=state.lost.set(payload.gateway, None))
    for device in {state.attempts[name].device for name in state.watched}:
        seen = state.seen[device]
        if seen.gateway == payload.gateway:
            seen = replace(seen, last_seen_ms=state.stream_ms)
            state = _reschedule(replace(state, seen=state.seen.set(device, seen)), seen)
    return state


# Events of control -------------------------------------------------------------------------------------------------


def _saved(state: State, payload: events_pb2.RolloutSaved, _event: Event) -> State:
    control = payload.rollout
    old = state.rollouts.get(control.name)
    if old is None:
        plan = Plan(
            control,
            tuple(Counts() for _ in control.stages),
            tuple(policy_of(control, it) for it in control.stages),
            summaries=tuple(summary.Summary() for _ in control.stages),
        )
    else:
        counts = tuple(
            _stage_saved(state, each, old.control, control, index, payload) for index, each in enumerate(old.counts)
        )
        plan = replace(old, control=control, counts=counts)
    if control.state == _Rollout.STATE_COMPLETED and plan.count_until_ms < 0:
        plan = replace(plan, count_until_ms=state.stream_ms + max(policy.soak_ms for policy in plan.policies))
    owners = state.owners
    for status in control.stage_statuses:
        if status.release and status.release not in owners:
            owners = owners.set(status.release, control.name)
    active = state.active
    if control.state in ACTIVE_STATES:
        active = active.set(control.name, None)
    elif control.name in active:
        active = active.delete(control.name)
    return replace(state, rollouts=state.rollouts.set(control.name, plan), owners=owners, active=active)


def _stage_saved(
    state: State,
    counts: Counts,
    old: rollout_pb2.Rollout,
    new: rollout_pb2.Rollout,
    index: int,
    payload: events_pb2.RolloutSaved,
) -> Counts:
    is_open = new.stage_statuses[index].state == rollout_pb2.StageStatus.STATE_OPEN
    if is_open and counts.open_ms < 0:
        counts = replace(counts, open_ms=state.stream_ms)
    if payload.change == "rollout.resumed" and old.state == _Rollout.STATE_HALTED:
        counts = replace(counts, forgiven=counts.bad)
    if payload.change == "rollout.stage_advanced" and payload.stage == index:
        counts = replace(counts, advanced=True)
    return counts


_Fold = Callable[[State, Any, Event], State]


def _turned(state: State, payload: events_pb2.AttemptMoved) -> str:
    before = state.attempts[payload.attempt]
    if payload.state in _LOST or before.state in _LOST:
        return before.device
    return _runs_another(state, payload.observed) if payload.HasField("observed") else ""


def _runs_another(state: State, payload: events_pb2.DeviceObserved) -> str:
    before = state.seen.get(payload.device)
    return payload.device if before is None or before.running.release != payload.running.release else ""


_DEVICE_EVENTS: Final[dict[type[Message], tuple[_Fold, Callable[[State, Any], str]]]] = {
    events_pb2.AttemptGranted: (_granted, lambda _state, it: str(it.attempt.device)),
    events_pb2.AttemptMoved: (_moved, _turned),
    events_pb2.DeviceHeld: (_held, lambda _state, it: str(it.device)),
    events_pb2.DeviceObserved: (_observed, _runs_another),
}
"""Events that may change which rollout waits for a device, with the device; empty when this one cannot."""

_OTHER_EVENTS: Final[dict[type[Message], _Fold]] = {
    events_pb2.RolloutSaved: _saved,
    events_pb2.GoGiven: _go,
    events_pb2.AttemptSoaked: _soaked,
    events_pb2.RetryAllowed: _retry_allowed,
    events_pb2.ObservationsRecorded: _recorded,
    events_pb2.GatewayPresenceChanged: _presence,
    registry_events.DeviceChanged: facts.device_changed,
    registry_events.ProductChanged: facts.product_changed,
    artifacts_events.BundleChanged: facts.bundle_changed,
    releases_events.GraphChanged: facts.graph_changed,
    releases_events.BundleOverrideChanged: facts.override_changed,
}

EVENT_TYPES: Final[tuple[type[Message], ...]] = (*_DEVICE_EVENTS, *_OTHER_EVENTS)


def evolve(state: State, event: Event) -> State:
    """The state after the event."""
    kind = type(event.payload)
    found = _DEVICE_EVENTS.get(kind)
    if found is None:
        return _OTHER_EVENTS[kind](state, event.payload, event)
    fold, device_of = found
    device = device_of(state, event.payload)
    if not device:
        return fold(state, event.payload, event)
    before = _awaited_by(state, device)
    state = fold(state, event.payload, event)
    return _with_awaited(state, before, _awaited_by(state, device))
