"""Quarantine: by an operator, and by itself where the product's policy says so.

Rules: a quarantined device checks in and gets nothing; every quarantine is an event with a reason. A failed or reverted
attempt counts once, a confirmed update begins to count anew, and so does a release. What an operator decides stands:
quarantining again by hand takes the end away that an automatic quarantine had.

A device that failed three times in a row under `failures = 3, block_for = 24 h` has its third failure, its quarantine
and the timer of its release in one transaction.
"""

from __future__ import annotations

from typing import Final

from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import events_pb2 as ev
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.rollout.v1 import rollout_pb2

from libs.eventlog import Context, Decision, NewEvent, Public, Timer
from libs.names import organization_of, product_of
from services.registry.domain.policy import FAILURES_MOST
from services.registry.domain.rules import timestamp
from services.registry.domain.state import Failures, State, find, is_active

TIMER_KIND: Final = "quarantine-end"
FAILED: Final = frozenset({device_pb2.ATTEMPT_STATE_FAILED, device_pb2.ATTEMPT_STATE_REVERTED})
_NONE: Final = Failures("", 0, ())


def timer_id(device: str) -> str:
    """Of the timer that ends a device's quarantine."""
    return f"{TIMER_KIND}/{device}"


def device_event(device: pb.Device, change: str, reason: str = "") -> NewEvent:
    """A device's new image; the operator's reason is for the audit alone."""
    return NewEvent(
        organization_of(device.name),
        device.name,
        ev.DeviceSaved(device=device, change=change, reason=reason),
        (Public(device.name, ev.DeviceChanged(device=device, change=change)),),
    )


def change_of(before: pb.Device, after: pb.Device) -> str:
    """What to call a change that an operator made."""
    if before.quarantined != after.quarantined:
        return "device.quarantined" if after.quarantined else "device.released"
    return "device.updated"


def by_hand(state: State, before: pb.Device, after: pb.Device) -> tuple[tuple[NewEvent, ...], tuple[str, ...]]:
    """Events and ended timers that go with a change of quarantine; takes the end out of the new image, in place."""
    if (before.quarantined, before.quarantine_reason) == (after.quarantined, after.quarantine_reason):
        return (), ()
    after.ClearField("quarantine_end_time")
    events = () if after.quarantined else _forgotten(state, after.name)
    return events, (timer_id(after.name),) if before.HasField("quarantine_end_time") else ()


def _counted(device: str, known: Failures) -> NewEvent:
    payload = ev.DeviceFailuresCounted(
        device=device, attempt=known.attempt, failures=known.in_a_row, recent_ms=known.recent_ms
    )
    # A resource beside the device: what is counted must not move the version that its etag is.
    return NewEvent(organization_of(device), f"{device}/failures", payload)


def _forgotten(state: State, device: str) -> tuple[NewEvent, ...]:
    known = state.failures.get(device, _NONE)
    return (_counted(device, Failures(known.attempt, 0, ())),) if known.in_a_row or known.recent_ms else ()


def attempt_ended(state: State, attempt: rollout_pb2.Attempt, at_ms: int, ctx: Context) -> Decision:
    """What an attempt's outcome means for its device."""
    device = find(state.devices, attempt.device)
    product = find(state.products, product_of(attempt.device))
    if device is None or not is_active(device) or product is None:
        return Decision()
    if attempt.state not in FAILED:
        forward = attempt.kind == rollout_pb2.Attempt.KIND_FORWARD
        confirmed = attempt.state == device_pb2.ATTEMPT_STATE_CONFIRMED and forward and not attempt.withdrawn
        return Decision(events=_forgotten(state, device.name)) if confirmed else Decision()
    policy = product.policy.automatic_quarantine
    known = state.failures.get(device.name, _NONE)
    if not product.policy.HasField("automatic_quarantine") or known.attempt == attempt.name:
        return Decision()
    window_ms = policy.window.ToMilliseconds()
    recent = tuple(sorted((*(ms for ms in known.recent_ms if ms > at_ms - window_ms), at_ms))) if policy.burst else ()
    counted = Failures(attempt.name, known.in_a_row + 1, recent[-FAILURES_MOST:])
    events = [_counted(device.name, counted)]
    reason = _tripped(policy, counted)
    if not reason or device.quarantined:
        return Decision(events=tuple(events))
    changed = pb.Device()
    changed.CopyFrom(device)
    changed.quarantined, changed.quarantine_reason = True, reason
    changed.ClearField("quarantine_end_time")
    changed.etag = str(ctx.version(device.name) + 1)
    timers: tuple[Timer, ...] = ()
    if policy.HasField("block_for"):
        end_ms = ctx.now_ms + policy.block_for.ToMilliseconds()
        changed.quarantine_end_time.CopyFrom(timestamp(end_ms))
        timers = (Timer(timer_id(device.name), TIMER_KIND, end_ms, device.name.encode()),)
    events.append(device_event(changed, "device.quarantined"))
    return Decision(events=tuple(events), set_timers=timers)


def _tripped(policy: pb.AutomaticQuarantine, known: Failures) -> str:
    """Why the device is quarantined, or empty."""
    if policy.failures and known.in_a_row >= policy.failures:
        return f"automatic: {known.in_a_row} failed attempts in a row"
    if policy.burst and len(known.recent_ms) >= policy.burst:
        return f"automatic: {len(known.recent_ms)} failed attempts within {policy.window.ToSeconds()} s"
    return ""


def ended(state: State, name: str, ctx: Context) -> Decision:
    """The time of an automatic quarantine is over; one that an operator has touched since has no end."""
    device = find(state.devices, name)
    if device is None or not is_active(device) or not device.quarantined:
        return Decision()
    if not device.HasField("quarantine_end_time") or device.quarantine_end_time.ToMilliseconds() > ctx.now_ms:
        return Decision()
    changed = pb.Device()
    changed.CopyFrom(device)
    changed.quarantined, changed.quarantine_reason = False, ""
    changed.ClearField("quarantine_end_time")
    changed.etag = str(ctx.version(name) + 1)
    return Decision(events=(*_forgotten(state, name), device_event(changed, "device.released")))
