"""Read models of rollout: pure functions from committed state to what people are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from google.protobuf.message import Message
from groundswell.rollout.v1 import rollout_pb2

from libs.errors import NotFoundError
from services.rollout.domain import State, summary
from services.rollout.domain.attempts import attempt_proto
from services.rollout.domain.observation import reported_proto
from services.rollout.domain.stages import view
from services.rollout.domain.state import Attempt, Plan, Seen

M = TypeVar("M", bound=Message)
Walk = Callable[[str], Iterator[tuple[str, M]]]
RECENT = 100
RECEIPTS = 20


def _plan(state: State, name: str) -> Plan:
    plan = state.rollouts.get(name)
    if plan is None:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)
    return plan


def rollout_of(state: State, name: str, now_ms: int) -> rollout_pb2.Rollout:
    """A rollout with its counts and what they sum up."""
    plan = _plan(state, name)
    image = view(plan)
    for status, counts, told in zip(image.stage_statuses, plan.counts, plan.summaries, strict=True):
        status.grants_per_minute = summary.per_minute_now(counts.pace, now_ms)
        summary.describe(told, status)
    return image


def _walk(names: Iterable[str], make: Callable[[str], M]) -> Walk[M]:
    """What has names after a given one, in their order; made when its turn comes."""

    def walk(after: str) -> Iterator[tuple[str, M]]:
        for name in sorted(name for name in names if name > after):
            yield name, make(name)

    return walk


def rollouts_of(state: State, product: str) -> Walk[rollout_pb2.Rollout]:
    """All rollouts of a product."""
    prefix = f"{product}/rollouts/"
    return _walk((name for name in state.rollouts if name.startswith(prefix)), lambda name: view(state.rollouts[name]))


def held_in(state: State, rollout: str) -> Walk[rollout_pb2.HeldDevice]:
    """Devices that must go back and cannot."""
    held = _plan(state, rollout).held

    def make(device: str) -> rollout_pb2.HeldDevice:
        it = held[device]
        return rollout_pb2.HeldDevice(device=device, release=it.release, stage=it.stage, reason=it.reason)

    return _walk(held, make)


def attempts_of(state: State, parent: str) -> Walk[rollout_pb2.Attempt]:
    """All attempts of a rollout or of a device."""
    if parent in state.rollouts:
        names = tuple(state.by_rollout.get(parent, ()))
    elif parent in state.devices or parent in state.seen:
        names = state.seen.get(parent, Seen()).attempts
    else:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{parent} does not exist", resource=parent)
    return _walk(names, lambda name: attempt_proto(state, state.attempts[name]))


def recent_attempts(state: State, rollout: str) -> list[rollout_pb2.Attempt]:
    """Those in flight, the newest first, then those that ended last, at most a hundred."""

    def newest(attempt: Attempt) -> tuple[int, str]:
        return -attempt.granted_ms, attempt.name

    live = sorted((state.attempts[name] for name in state.live.get(rollout, ())), key=newest)
    ended = [state.attempts[name] for name in reversed(_plan(state, rollout).recent)]
    return [attempt_proto(state, attempt) for attempt in (*live, *ended)[:RECENT]]


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
