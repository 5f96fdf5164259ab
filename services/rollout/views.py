"""Read models of rollout: pure functions from committed state to what people are shown."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from groundswell.rollout.v1 import rollout_pb2

from libs.errors import NotFoundError
from services.rollout.domain import State
from services.rollout.domain.attempts import attempt_proto
from services.rollout.domain.observe import reported_proto
from services.rollout.domain.stages import view
from services.rollout.domain.state import Seen

RECENT = 100
RECEIPTS = 20


def rollout_of(state: State, name: str) -> rollout_pb2.Rollout:
    """A rollout with its counts."""
    plan = state.rollouts.get(name)
    if plan is None:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)
    return view(plan)


def rollouts_of(state: State, product: str) -> Iterator[tuple[str, rollout_pb2.Rollout]]:
    """All rollouts of a product."""
    prefix = f"{product}/rollouts/"
    for name, plan in state.rollouts.items():
        if name.startswith(prefix):
            yield name, view(plan)


def attempts_of(state: State, parent: str) -> Iterator[tuple[str, rollout_pb2.Attempt]]:
    """All attempts of a rollout or of a device."""
    if parent in state.rollouts:
        names = tuple(state.by_rollout.get(parent, ()))
    elif parent in state.devices or parent in state.seen:
        names = state.seen.get(parent, Seen()).attempts
    else:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{parent} does not exist", resource=parent)
    for name in names:
        yield name, attempt_proto(state, state.attempts[name])


def recent_attempts(state: State, rollout: str) -> list[rollout_pb2.Attempt]:
    """Those in flight first, then the newest, at most a hundred."""
    found = [state.attempts[name] for name in state.by_rollout.get(rollout, ())]
    newest = heapq.nsmallest(RECENT, found, key=lambda it: (not it.in_flight, -it.granted_ms, it.name))
    return [attempt_proto(state, attempt) for attempt in newest]


def explanation(state: State, device: str) -> rollout_pb2.ExplainDeviceResponse:
    """Why the device got what it got, from the receipts in its grants."""
    if device not in state.devices:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{device} does not exist", resource=device)
    seen = state.seen.get(device, Seen())
    answer = rollout_pb2.ExplainDeviceResponse(device=device, running=reported_proto(seen.running))
    for name in reversed(seen.attempts[-RECEIPTS:]):
        attempt = state.attempts[name]
        answer.grants.add(
            attempt=attempt_proto(state, attempt),
            reasons=[*attempt.receipt.reasons, *attempt.receipt.steps],
            views=attempt.receipt.views,
        )
    return answer
