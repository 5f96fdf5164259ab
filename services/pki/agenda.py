"""What time does to certificates: expiring soon, expired, lapsed. One timer a partition stands at what is due first.

Invariants:

* Every certificate that time will still change is in the agenda, with the one moment of its next change.
* The timer stands no later than the first entry, or a pause after the last look. It may stand earlier, after an entry
  has gone: then it finds nothing and moves on.
* What is due is told once: the flag or state that tells it is in the same event that takes it off the agenda.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, TypeVar

import immutables
from google.protobuf.message import Message
from groundswell.pki.v1 import events_pb2, pki_pb2
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from msgspec.structs import replace

from libs.eventlog import Context, Decision, Foreign, NewEvent, Public, Timer
from libs.names import organization_of, product_of
from services.pki.model import ALARM, DEFAULT_VALIDITY_MS, Ca, Leaf, State, milliseconds

_MINUTE_MS: Final = 60 * 1000
_DAY_MS: Final = 24 * 3600 * 1000
_NONE: Final[immutables.Map[Any, Any]] = immutables.Map()
MOST_AT_ONCE: Final = 200
"""Changes in one decision; the rest follows in the next, so that nobody's command waits long."""
PAUSE_MS: Final = 1000
"""Between two looks at the agenda: a fleet made in one hour ends in one hour, and nobody counts in milliseconds."""
_RESOURCE: Final = "agenda"
_NO_POLICY: Final = registry_pb2.CertificatePolicy()

_Days = immutables.Map[int, immutables.Map[int, immutables.Map[str, int]]]
M = TypeVar("M", pki_pb2.DeviceCertificate, pki_pb2.CaCertificate, pki_pb2.IssuingCa)


def validity_ms(policy: registry_pb2.CertificatePolicy) -> int:
    """Life of the certificates that this server issues for a product."""
    return policy.validity.ToMilliseconds() or DEFAULT_VALIDITY_MS


def policy_of(state: State, name: str) -> registry_pb2.CertificatePolicy:
    """Certificate policy of the product that a resource is of."""
    return state.policies.get(product_of(name), _NO_POLICY)


def leaf_due(leaf: pki_pb2.DeviceCertificate, policy: registry_pb2.CertificatePolicy) -> int | None:
    """When time next changes a device certificate."""
    if leaf.state == Leaf.STATE_NEXT:
        return milliseconds(leaf.confirm_by)
    if leaf.state != Leaf.STATE_ACTIVE or leaf.expired:
        return None
    end = milliseconds(leaf.not_after)
    return end if leaf.expiring else end - expiring_ms(leaf, policy)


def expiring_ms(leaf: pki_pb2.DeviceCertificate, policy: registry_pb2.CertificatePolicy) -> int:
    """Life left below which a certificate is expiring soon: the product's own, else a third of its life."""
    return policy.expiring_soon.ToMilliseconds() or (milliseconds(leaf.not_after) - milliseconds(leaf.not_before)) // 3


def due_of(state: State, image: Message) -> int | None:
    """When time next changes a certificate of any kind; None: never again."""
    match image:
        case pki_pb2.DeviceCertificate():
            return leaf_due(image, policy_of(state, image.device))
        case pki_pb2.CaCertificate():
            lives = image.state in {Ca.STATE_ACTIVE, Ca.STATE_SUSPENDED} and not image.expired
            return milliseconds(image.not_after) if lives else None
        case pki_pb2.IssuingCa():
            return None if image.expired else milliseconds(image.not_after)
    raise TypeError(image)


def image_of(payload: Message) -> Message | None:
    """The certificate that an event of ours is about."""
    for field in ("device_certificate", "ca_certificate", "issuing_ca"):
        image = getattr(payload, field, None)
        if isinstance(image, Message):
            return image
    return None


def moved(state: State, name: str, due: int | None) -> State:
    """The state with an entry set, moved, or gone."""
    before = state.agenda.get(name)
    if before == due:
        return state
    days, entries = state.days, state.agenda
    if before is not None:
        days = _without(days, name, before)
        entries = entries.delete(name)
    if due is not None:
        day = days.get(due // _DAY_MS, _NONE)
        minute = day.get(due // _MINUTE_MS, _NONE)
        days = days.set(due // _DAY_MS, day.set(due // _MINUTE_MS, minute.set(name, due)))
        entries = entries.set(name, due)
    return replace(state, agenda=entries, days=days)


def _without(days: _Days, name: str, due: int) -> _Days:
    day = days[due // _DAY_MS]
    minute = day[due // _MINUTE_MS].delete(name)
    day = day.set(due // _MINUTE_MS, minute) if minute else day.delete(due // _MINUTE_MS)
    return days.set(due // _DAY_MS, day) if day else days.delete(due // _DAY_MS)


def follow(state: State, image: Message) -> State:
    """The state after a certificate became this one."""
    return moved(state, image.name, due_of(state, image))  # type: ignore[attr-defined]


def note_policy(state: State, noted: events_pb2.CertificatePolicyNoted) -> State:
    """The state under a product's new policy: each of its certificates gets its new moment."""
    state = replace(state, policies=state.policies.set(noted.product, noted.policy))
    for leaf in _leaves_of(state, noted.product):
        state = follow(state, leaf)
    return state


def take_in(state: State, record: Foreign, ctx: Context) -> Decision:
    """What the registry publishes: certificate policies, and the end of devices. Nothing else matters here."""
    if isinstance(record.payload, registry_events.DeviceChanged):
        return _device_ended(state, record.payload.device, ctx)
    if not isinstance(record.payload, registry_events.ProductChanged):
        return Decision()
    product = record.payload.product
    policy = product.policy.certificate_policy
    if state.policies.get(product.name, _NO_POLICY) == policy:
        return Decision()
    noted = events_pb2.CertificatePolicyNoted(product=product.name, policy=policy)
    return Decision(events=(NewEvent(organization_of(product.name), product.name, noted),))


def _device_ended(state: State, device: registry_pb2.Device, ctx: Context) -> Decision:
    """A retired device's certificates are revoked: no gateway, list or reminder takes them for living ones."""
    if device.state != registry_pb2.Device.STATE_RETIRED:
        return Decision()
    events = []
    for name in state.history.get(device.name, ()):
        leaf = state.certificates[name]
        if leaf.state in {Leaf.STATE_ACTIVE, Leaf.STATE_NEXT}:
            image = _changed(leaf, ctx)
            image.state, image.reason = Leaf.STATE_REVOKED, "DEVICE_RETIRED"
            events.append(saved(image, "device_certificate.revoked"))
    return Decision(events=tuple(events))


def with_alarm(state: State, decision: Decision, ctx: Context) -> Decision:
    """The decision with the timer moved forward where it brings something that is due earlier."""
    dues = [due for event in decision.events for due in _dues(state, event.payload)]
    if not dues or (state.alarm_ms and min(dues) >= state.alarm_ms):
        return decision
    if not state.alarm_ms:
        dues.extend(_first(state, {}))
    return _alarmed(decision, min(dues), ctx)


def fire(state: State, ctx: Context) -> Decision:
    """Everything that is due by now, at most so much of it, and the timer at what comes next."""
    events: list[NewEvent] = []
    handled: dict[str, int | None] = {}
    for name in _due(state, ctx.now_ms):
        event, due = _happened(state, name, ctx)
        events.append(event)
        handled[name] = due
        if len(events) == MOST_AT_ONCE:
            break
    coming = [due for due in handled.values() if due is not None]
    coming.extend(_first(state, handled))
    at_ms = min(coming, default=0)
    if at_ms and len(events) < MOST_AT_ONCE:
        at_ms = max(at_ms, ctx.now_ms + PAUSE_MS)
    return _alarmed(Decision(events=tuple(events)), at_ms, ctx)


def _alarmed(decision: Decision, at_ms: int, ctx: Context) -> Decision:
    event = NewEvent(ctx.organization, _RESOURCE, events_pb2.AlarmSet(at_ms=at_ms))
    timers = (Timer(ALARM, ALARM, at_ms),) if at_ms else ()
    # Before the others: the last event of a command carries its answer.
    return decision.replace(events=(event, *decision.events), set_timers=(*decision.set_timers, *timers))


def _dues(state: State, payload: Message) -> Iterator[int]:
    if isinstance(payload, events_pb2.CertificatePolicyNoted):
        for leaf in _leaves_of(state, payload.product):
            due = leaf_due(leaf, payload.policy)
            if due is not None:
                yield due
        return
    image = image_of(payload)
    due = due_of(state, image) if image is not None else None
    if due is not None:
        yield due


def _leaves_of(state: State, product: str) -> Iterable[pki_pb2.DeviceCertificate]:
    return [leaf for leaf in state.certificates.values() if product_of(leaf.device) == product]


def _due(state: State, now_ms: int) -> Iterator[str]:
    for minute in _minutes(state):
        for name, due in minute.items():
            if due <= now_ms:
                yield name
        if min(minute.values()) > now_ms:
            return


def _first(state: State, handled: Mapping[str, int | None]) -> Iterator[int]:
    """The first entry that was not handled just now."""
    for minute in _minutes(state):
        left = [due for name, due in minute.items() if name not in handled]
        if left:
            yield min(left)
            return


def _minutes(state: State) -> Iterator[immutables.Map[str, int]]:
    """What is on the agenda, a minute after the other. Looks no further than it is asked to."""
    for day in sorted(state.days):
        for minute in sorted(state.days[day]):
            yield state.days[day][minute]


def _happened(state: State, name: str, ctx: Context) -> tuple[NewEvent, int | None]:
    """The event of an entry that is due, and its next moment."""
    leaf = state.certificates.get(name)
    if leaf is not None:
        return _leaf_happened(state, leaf, ctx)
    ca = state.cas.get(name)
    if ca is not None:
        ca = _changed(ca, ctx)
        ca.expired = True
        public = Public(name, events_pb2.CaCertificateChanged(ca_certificate=ca, change="ca.expired"))
        return NewEvent(organization_of(name), name, events_pb2.CaCertificateSaved(ca_certificate=ca), (public,)), None
    issuing = _changed(state.issuing[name], ctx)
    issuing.expired = True
    told = Public(name, events_pb2.IssuingCaChanged(issuing_ca=issuing, change="issuing_ca.expired"))
    return NewEvent(organization_of(name), name, events_pb2.IssuingCaSaved(issuing_ca=issuing), (told,)), None


def _leaf_happened(state: State, leaf: pki_pb2.DeviceCertificate, ctx: Context) -> tuple[NewEvent, int | None]:
    image = _changed(leaf, ctx)
    if leaf.state == Leaf.STATE_NEXT:
        image.state, image.reason = Leaf.STATE_LAPSED, "ROTATION_LAPSED"
        change = "certificate.lapsed"
    elif ctx.now_ms >= milliseconds(leaf.not_after):
        image.expiring = image.expired = True
        change = "certificate.expired"
    else:
        image.expiring = True
        change = "certificate.expiring"
    return saved(image, change), leaf_due(image, policy_of(state, image.device))


def saved(image: pki_pb2.DeviceCertificate, change: str) -> NewEvent:
    """A device certificate that became another, told to all."""
    public = Public(image.name, events_pb2.DeviceCertificateChanged(device_certificate=image, change=change))
    event = events_pb2.DeviceCertificateSaved(device_certificate=image)
    return NewEvent(organization_of(image.name), image.name, event, (public,))


def _changed(image: M, ctx: Context) -> M:
    copy = type(image)()
    copy.CopyFrom(image)
    copy.etag = str(ctx.version(image.name) + 1)
    return copy
