"""Folds what a device said: counters, running state, reports.

The same fold serves ClaimOffers, AuthorizeSwitch and the check-in stream, and a repeat of any item changes nothing.

* One counter sequence per agent instance. A counter that went back is stale: what it says to run is dropped; its
  reports may still move an attempt forward, because the stream may bring an older item after a claim was answered.
* The same counter with another body is a fork: the device is marked cloned and gets no grant any more.
* A new instance (factory reset) restarts the sequence; retired instances never return.
* What a check-in says is part of the first event that follows from it, a step that it reports or leave to switch, and
  an event of its own when none does: a third of the events of an update would say nothing but a counter.
"""

from __future__ import annotations

from enum import Enum, auto

from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import registry_pb2
from groundswell.rollout.v1 import events_pb2

from services.rollout.domain import attempts
from services.rollout.domain.draft import Draft
from services.rollout.domain.observation import Observation, reported_proto
from services.rollout.domain.state import (
    BOOTED,
    CONFIRMED,
    FAILED,
    INSTALLED,
    REVERTED,
    WENT_DARK,
    Attempt,
    Running,
    Seen,
    State,
)
from services.rollout.domain.summary import worth_keeping

_REPORTABLE = frozenset(range(device_pb2.ATTEMPT_STATE_ACCEPTED, device_pb2.ATTEMPT_STATE_REVERTED + 1))


class Freshness(Enum):
    """How an item stands to what is known of the device."""

    FRESH = auto()
    REPEAT = auto()
    STALE = auto()
    FORK = auto()
    RETIRED_INSTANCE = auto()


def running_of(it: registry_pb2.ReportedState) -> Running:
    """As held in state."""
    return Running(it.release, it.bundle, it.version, it.security_version)


def freshness(seen: Seen | None, item: device_pb2.CheckInItem) -> Freshness:
    """Compare by instance and counter."""
    if seen is None or not seen.instance:
        return Freshness.FRESH
    if item.instance in seen.retired_instances:
        return Freshness.RETIRED_INSTANCE
    if item.instance != seen.instance or item.counter > seen.counter:
        return Freshness.FRESH
    if item.counter < seen.counter:
        return Freshness.STALE
    return Freshness.REPEAT if item.body_sha256 == seen.body_sha256 else Freshness.FORK


def fold_item(draft: Draft, item: device_pb2.CheckInItem, gateway: str) -> Freshness | None:
    """Fold one check-in; None when the device is not known here."""
    fresh, observed = fold_all_but_counter(draft, item, gateway)
    if observed is not None:
        observed.emit(draft)
    return fresh


def fold_all_but_counter(
    draft: Draft, item: device_pb2.CheckInItem, gateway: str
) -> tuple[Freshness | None, Observation | None]:
    """The same; what is left to append, with another event or alone, says no more than a counter and a time."""
    device = item.device
    facts = draft.state.devices.get(device)
    if facts is None or (item.device_uid and item.device_uid != facts.uid):
        return None, None
    seen = draft.state.seen.get(device)
    fresh = freshness(seen, item)
    match fresh:
        case Freshness.RETIRED_INSTANCE:
            return fresh, None
        case Freshness.FORK:
            _cloned(draft, device, seen or Seen())
            return fresh, None
        case Freshness.FRESH:
            observed = _observe(draft, item, gateway, seen)
        case _:
            observed = None
    for report in item.reports:
        if _report(draft, item, report, observed, fresh=fresh is Freshness.FRESH):
            observed = None
    if observed is not None and observed.change:
        observed.emit(draft)
        observed = None
    if fresh is Freshness.FRESH:
        _implied(draft, item)
    return fresh, observed


def _tracked(state: State, seen: Seen) -> bool:
    """Whether silence of this device would mean something: then each of its check-ins is an event."""
    if seen.live:
        return True
    anchor = state.attempts.get(seen.anchor) if seen.anchor else None
    return anchor is not None and (anchor.due_ms >= 0 or anchor.state == WENT_DARK)


def _in_stage(state: State, seen: Seen) -> bool:
    """Whether its metrics say something of a stage."""
    attempt = state.attempts.get(seen.live or seen.anchor)
    return attempt is not None and bool(attempt.rollout)


def _observe(draft: Draft, item: device_pb2.CheckInItem, gateway: str, seen: Seen | None) -> Observation | None:
    """What is new of the device."""
    before = seen or Seen()
    changed = running_of(item.running) != before.running
    news = seen is None or changed or item.instance != before.instance or bool(item.reports)
    if not news and not _tracked(draft.state, before):
        return None
    payload = events_pb2.DeviceObserved(
        device=item.device,
        running=item.running,
        instance=item.instance,
        counter=item.counter,
        body_sha256=item.body_sha256,
        security_floor=before.floor,
        cloned=before.cloned,
        gateway=gateway,
        metrics=worth_keeping(dict(item.metrics)) if item.metrics and _in_stage(draft.state, before) else {},
    )
    return Observation(payload, before.running, "device.release_changed" if changed else "")


def _cloned(draft: Draft, device: str, before: Seen) -> None:
    if before.cloned:
        return
    payload = events_pb2.DeviceObserved(
        device=device,
        running=reported_proto(before.running),
        instance=before.instance,
        counter=before.counter,
        body_sha256=before.body_sha256,
        security_floor=before.floor,
        cloned=True,
        gateway=before.gateway,
    )
    Observation(payload, before.running, "identity.cloned").emit(draft)


def _report(
    draft: Draft,
    item: device_pb2.CheckInItem,
    report: device_pb2.Report,
    observed: Observation | None,
    *,
    fresh: bool,
) -> bool:
    """Whether it was a step; then ``observed`` is in the log."""
    attempt = draft.state.attempts.get(report.attempt)
    if attempt is None or attempt.device != item.device or report.state not in _REPORTABLE:
        return False
    if report.state == CONFIRMED:
        return _confirm(draft, attempt, running_of(item.running), observed)
    if attempts.may_move(attempt, report.state):
        failed = report.state in (FAILED, REVERTED)
        code = (report.code or ("UNSPECIFIED" if report.state == FAILED else "REVERTED")) if failed else report.code
        attempts.move(draft, attempt, report.state, code, report.detail, observed=observed)
        return True
    if fresh and report.state == attempt.state and attempt.state <= INSTALLED and not attempt.go:
        # progress renews the lease
        attempts.move(draft, attempt, attempt.state, report.code, report.detail, observed=observed)
        return True
    return False


def _confirms(attempt: Attempt, running: Running) -> bool:
    """A confirmation counts only from the firmware it speaks of."""
    return attempt.leads_to(running) and running.version == attempt.version


def _confirm(draft: Draft, attempt: Attempt, running: Running, observed: Observation | None = None) -> bool:
    if not _confirms(attempt, running):
        return False
    before = attempt
    if attempt.state <= INSTALLED and attempts.may_move(attempt, BOOTED):
        attempts.move(draft, attempt, BOOTED, observed=observed)
        attempt, observed = draft.state.attempts[attempt.name], None
    if attempts.may_move(attempt, CONFIRMED):
        attempts.move(draft, attempt, CONFIRMED, observed=observed)
        return True
    return attempt is not before


def _implied(draft: Draft, item: device_pb2.CheckInItem) -> None:
    """What running state alone says about the last confirmation, or about a device that was dark."""
    seen = draft.state.seen.get(item.device, Seen())
    running = running_of(item.running)
    if not seen.anchor or not running:
        return
    anchor = draft.state.attempts[seen.anchor]
    if anchor.leads_to(running):
        if anchor.state == WENT_DARK and anchor.withdrawn:
            _confirm(draft, anchor, running)  # its health was confirmed before it fell silent
        return
    later = seen.attempts[seen.attempts.index(anchor.name) + 1 :]
    if any(draft.state.attempts[name].go for name in later):
        return
    if anchor.state == WENT_DARK and not anchor.withdrawn and item.attempt == anchor.name:
        return  # still at work on it, not yet switched
    if attempts.may_move(anchor, REVERTED):
        attempts.move(draft, anchor, REVERTED, "RUNS_ANOTHER_RELEASE", "checked in with other firmware")
