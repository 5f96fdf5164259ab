"""What follows from an attempt's steps beside its own state: counters of its plan, tries of its device, summaries.

A counter of a plan changes only by the difference between an attempt before and after its event.
"""

from __future__ import annotations

from typing import Any, Final

from groundswell.rollout.v1 import rollout_pb2
from msgspec.structs import replace

from libs.eventlog.model import Event
from services.rollout.domain import summary
from services.rollout.domain.state import (
    CANCELLED,
    CONFIRMED,
    EXPIRED,
    FAILED,
    FORWARD,
    REVERTED,
    ROLLBACK,
    WENT_DARK,
    Attempt,
    Counts,
    Seen,
    State,
    Tries,
    tries_of,
)

RECENT: Final = 32
"""Ended attempts of a rollout that are remembered for watchers."""


def counts_of(state: State, attempt: Attempt) -> Counts:
    """Counters of the plan the attempt is under."""
    if attempt.rollout:
        return state.rollouts[attempt.rollout].counts[attempt.stage]
    return state.plain.get(attempt.plan, Counts())


Changes = dict[str, Any]
"""Fields of the state that change; one event is one copy of the state."""


def placed(state: State, attempt: Attempt, counts: Counts, **more: Any) -> Changes:
    """Store counters of its plan, with ``more`` of a rollout's."""
    if not attempt.rollout:
        return {} if state.plain.get(attempt.plan) is counts else {"plain": state.plain.set(attempt.plan, counts)}
    plan, stage = state.rollouts[attempt.rollout], attempt.stage
    if plan.counts[stage] is counts and not more:
        return {}
    changed = (*plan.counts[:stage], counts, *plan.counts[stage + 1 :])
    return {"rollouts": state.rollouts.set(attempt.rollout, replace(plan, counts=changed, **more))}


def _share(attempt: Attempt) -> dict[str, int]:
    """What one attempt adds to the counters of its plan."""
    if attempt.in_flight:
        return {"in_flight": 1}
    if attempt.superseded:
        return {}
    if attempt.kind == ROLLBACK:
        if attempt.state == CONFIRMED:
            return {"rolled_back": 1}
        return {"rollback_failed": 1} if attempt.state in (FAILED, REVERTED, WENT_DARK) else {}
    share: dict[str, int] = {}
    match attempt.state:
        case s if s == CONFIRMED:
            share["confirmed"] = 1
            if attempt.soaked:
                share["soaked"] = 1
        case s if s == FAILED:
            share["failed"] = 1
        case s if s == REVERTED:
            share["reverted"] = 1
        case s if s == WENT_DARK:
            share["dark"] = 1
    if attempt.withdrawn:
        share["withdrawn"] = 1
    return share


def recount(state: State, counts: Counts, before: Attempt | None, after: Attempt) -> Counts:
    """Counters moved by the difference."""
    if before is not None and before.in_flight and after.in_flight:
        return counts
    plan = state.rollouts.get(after.rollout) if after.rollout else None
    delta: dict[str, int] = _share(after)
    if before is not None:
        for name, amount in _share(before).items():
            delta[name] = delta.get(name, 0) - amount
    if plan is not None and 0 <= plan.count_until_ms < state.stream_ms:
        # Long after completion, outcomes are events only; what is in flight is always true.
        delta = {name: amount for name, amount in delta.items() if name == "in_flight"}
    changed: dict[str, int] = {name: getattr(counts, name) + amount for name, amount in delta.items() if amount}
    if not changed:
        return counts
    if changed.get("in_flight", 0) > counts.peak_in_flight:
        changed["peak_in_flight"] = changed["in_flight"]
    bad = counts.bad
    counts = replace(counts, **changed)
    if counts.forgiven and counts.bad < bad:  # what is tried again is no longer among the failures that were accepted
        counts = replace(counts, forgiven=max(0, counts.forgiven - (bad - counts.bad)))
    return counts


def rate(state: State, attempt: rollout_pb2.Attempt) -> int:
    """Grants a minute of its stage; 0 means no limit."""
    plan = state.rollouts.get(attempt.rollout) if attempt.rollout else None
    return plan.control.stages[attempt.stage].max_grants_per_minute if plan is not None else 0


def tried(state: State, before: Attempt, after: Attempt) -> Changes:
    """What an outcome uses up of the device's tries."""
    if after.state == before.state or after.state not in (EXPIRED, FAILED, REVERTED, CONFIRMED):
        return {}
    key = tries_of(state, after)
    known = state.tries.get(key)
    match after.state:
        case s if s == EXPIRED:
            tries = replace(known or Tries(), expired=(known.expired if known else 0) + 1)
        case s if s == CONFIRMED:
            if known is None:
                return {}
            tries = replace(known, expired=0)
        case _:
            plan = state.rollouts.get(after.rollout) if after.rollout else None
            epoch = plan.control.retries if plan is not None else 0
            tries = Tries((known.failed if known else 0) + 1, 0, epoch, allowed=False, code=after.code)
    return {"tries": state.tries.set(key, tries)}


def moved(state: State, before: Attempt, after: Attempt, event: Event) -> Changes:
    """Counters, and of a rollout the summary of its stage and the list of what ended last."""
    counts = recount(state, counts_of(state, after), before, after)
    if not after.rollout or after.state == before.state:
        return placed(state, after, counts)
    plan, stage = state.rollouts[after.rollout], after.stage
    told = plan.summaries[stage]
    if after.state == EXPIRED:
        counts = replace(counts, expired=counts.expired + 1)
    elif after.state == CANCELLED:
        counts = replace(counts, cancelled=counts.cancelled + 1)
    elif after.state in (FAILED, REVERTED):
        told = summary.ended_with(told, after.code)
    elif after.state == CONFIRMED and after.kind == FORWARD and before.state != WENT_DARK:
        told = summary.took(told, max(0, event.occurred_at_ms - after.granted_ms))
    more: Changes = {}
    if told is not plan.summaries[stage]:
        more["summaries"] = (*plan.summaries[:stage], told, *plan.summaries[stage + 1 :])
    if before.in_flight and not after.in_flight:
        more["recent"] = (*plan.recent[1 - RECENT :], after.name)
    return placed(state, after, counts, **more)


def measured(state: State, seen: Seen, metrics: dict[str, float]) -> State:
    """Metrics count for the stage of the attempt that the device works on, else of its last one."""
    attempt = state.attempts.get(seen.live or seen.anchor)
    if attempt is None or not attempt.rollout:
        return state
    plan = state.rollouts[attempt.rollout]
    told = summary.measured(plan.summaries[attempt.stage], metrics)
    plan = replace(plan, summaries=(*plan.summaries[: attempt.stage], told, *plan.summaries[attempt.stage + 1 :]))
    return replace(state, rollouts=state.rollouts.set(attempt.rollout, plan))
