"""Decisions about devices: made by hand, made for a certificate, changed, retired, and what they report to run.

A device that was registered before it had a certificate is bound to the first one that is admitted under its identifier
in its product: cohort, tags, target and description stay what they were. A bound one takes no other certificate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

from google.protobuf.message import Message
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.rollout.v1 import events_pb2 as rollout_events

from libs.errors import AlreadyExistsError, FailedPreconditionError, check_etag
from libs.eventlog import Context, Decision, Foreign, NewEvent
from libs.names import product_of
from libs.rpc.access import not_found
from services.registry.domain import commands as ask
from services.registry.domain import rules
from services.registry.domain.quarantine import attempt_ended, by_hand, change_of, device_event, timer_id
from services.registry.domain.rules import Quotas, invalid, timestamp, wrong_state
from services.registry.domain.state import Shelves, State, find, is_active

M = TypeVar("M", bound=Message)

BATCH_LIMIT: Final = 500


def next_etag(ctx: Context, name: str) -> str:
    """Etag of the after-image that a decision is about to write."""
    return str(ctx.version(name) + 1)


def existing(shelves: Shelves[M], name: str) -> M:
    """A resource that has to exist."""
    found = find(shelves, name)
    if found is None:
        raise not_found(name)
    return found


def refuse_existing(resources: Mapping[str, Message], name: str) -> None:
    """Refuse a name that is taken."""
    if name in resources:
        raise AlreadyExistsError("ALREADY_EXISTS", f"{name} exists already", resource=name)


def _saved(device: pb.Device, change: str, ctx: Context) -> Decision:
    device.etag = next_etag(ctx, device.name)
    return Decision(events=(device_event(device, change),), result=device)


def _copy(device: pb.Device) -> pb.Device:
    copied = pb.Device()
    copied.CopyFrom(device)
    return copied


def _check_cohort(state: State, device: pb.Device) -> None:
    if not device.cohort:
        return
    if product_of(device.cohort) != product_of(device.name):
        raise invalid("device.cohort", "must be a cohort of the device's own product", cohort=device.cohort)
    if find(state.cohorts, device.cohort) is None:
        raise not_found(device.cohort)


def open_product(state: State, name: str) -> pb.Product:
    """A product that takes devices."""
    product = existing(state.products, name)
    if product.archived:
        raise wrong_state(name, "is archived: it takes no new devices")
    return product


def new_device(state: State, parent: str, identifier: str, given: pb.Device, ctx: Context, quotas: Quotas) -> pb.Device:
    """A new device with the settable fields of the given one, checked; the caller adds what else it knows."""
    rules.check_identifier("device_id", identifier)
    name = f"{parent}/devices/{identifier}"
    device = pb.Device(
        name=name,
        uid=ctx.new_uuid(f"device/{identifier}"),
        identifier=identifier,
        cohort=given.cohort,
        tags=given.tags,
        target=given.target,
        description=given.description,
        quarantined=given.quarantined,
        quarantine_reason=given.quarantine_reason,
        state=pb.Device.STATE_ACTIVE,
        create_time=timestamp(ctx.now_ms),
    )
    rules.clean_device(device)
    _check_cohort(state, device)
    rules.check_quota("devices", state.active_devices.get(ctx.organization, 0), quotas.devices)
    return device


def _taken(organization: str, identifier: str) -> AlreadyExistsError:
    return AlreadyExistsError(
        "DEVICE_IDENTIFIER_TAKEN",
        f"the identifier '{identifier}' belongs to another device of the organization",
        identifier=identifier,
        organization=organization,
    )


def create(state: State, command: ask.CreateDevice, ctx: Context, quotas: Quotas) -> Decision:
    """By hand."""
    open_product(state, command.parent)
    holder = state.identifiers.get((ctx.organization, command.device_id))
    name = f"{command.parent}/devices/{command.device_id}"
    if holder == name:
        raise AlreadyExistsError("ALREADY_EXISTS", f"{name} exists already", resource=name)
    if holder is not None:
        raise _taken(ctx.organization, command.device_id)
    device = new_device(state, command.parent, command.device_id, command.device, ctx, quotas)
    return _saved(device, "device.created", ctx)


def provision(state: State, command: ask.ProvisionDevice, ctx: Context, quotas: Quotas) -> Decision:
    """For a certificate: the same identifier with the same fingerprint is the same device, whatever it became since."""
    rules.check_fingerprint("certificate_fingerprint", command.certificate_fingerprint)
    product = open_product(state, command.parent)
    name = f"{command.parent}/devices/{command.device_id}"
    holder = state.identifiers.get((ctx.organization, command.device_id))
    if holder is not None:
        found = existing(state.devices, holder)
        if holder != name or found.certificate_fingerprint not in ("", command.certificate_fingerprint):
            raise _taken(ctx.organization, command.device_id)
        if not is_active(found):
            raise FailedPreconditionError("DEVICE_RETIRED", f"{name} was retired for good", resource=name)
        if found.certificate_fingerprint:
            return Decision(result=found)
        _check_environment(product, development=command.development)
        bound = _copy(found)
        bound.provisioned_by = command.provisioned_by
        bound.certificate_fingerprint = command.certificate_fingerprint
        bound.preregistered = True
        return _saved(bound, "device.updated", ctx)
    _check_environment(product, development=command.development)
    device = new_device(state, command.parent, command.device_id, command.device, ctx, quotas)
    device.provisioned_by = command.provisioned_by
    device.certificate_fingerprint = command.certificate_fingerprint
    return _saved(device, "device.created", ctx)


def _check_environment(product: pb.Product, *, development: bool) -> None:
    if development and not product.policy.allow_development_ca:
        raise FailedPreconditionError(
            "DEVELOPMENT_CA_NOT_ALLOWED",
            f"{product.name} takes no devices of a development CA",
            resource=product.name,
        )


def undo_provisioning(state: State, command: ask.UndoProvisioning, ctx: Context, _quotas: Quotas) -> Decision:
    """Retire what was provisioned for this certificate and then refused; a repeat changes nothing.

    A device that was there before its certificate is only parted from it.
    """
    current = existing(state.devices, command.name)
    if current.certificate_fingerprint != command.certificate_fingerprint:
        raise FailedPreconditionError(
            "CERTIFICATE_MISMATCH", f"{current.name} was not made for this certificate", resource=current.name
        )
    if current.preregistered and is_active(current):
        parted = _copy(current)
        for field in ("provisioned_by", "certificate_fingerprint", "preregistered"):
            parted.ClearField(field)
        return _saved(parted, "device.updated", ctx)
    return _retired(current, ctx) if is_active(current) else Decision(result=current)


def update(state: State, command: ask.UpdateDevice, ctx: Context, _quotas: Quotas) -> Decision:
    """Change what the mask names."""
    current = existing(state.devices, command.device.name)
    check_etag(command.device.etag, current.etag, current.name)
    changed = rules.masked(current, command.device, command.paths, rules.DEVICE_FIELDS, "a device")
    if not is_active(current):
        raise wrong_state(current.name, "is retired")
    events, timers = _changed(state, current, changed, ctx)
    return Decision(events=events, result=changed if events else current, clear_timers=timers)


def _changed(
    state: State, current: pb.Device, changed: pb.Device, ctx: Context
) -> tuple[tuple[NewEvent, ...], tuple[str, ...]]:
    """Events and ended timers of a change by hand, checked; nothing when nothing differs."""
    rules.clean_device(changed)
    if changed.cohort != current.cohort:
        _check_cohort(state, changed)
    if changed == current:
        return (), ()
    more, timers = by_hand(state, current, changed)
    changed.etag = next_etag(ctx, changed.name)
    return (*more, device_event(changed, change_of(current, changed))), timers


def batch_update(state: State, command: ask.BatchUpdateDevices, ctx: Context, _quotas: Quotas) -> Decision:
    """The same change for many devices of one product: all of them or none. A foreign name does not exist (T60)."""
    request = command.request
    existing(state.products, request.parent)
    _check_batch(request)
    events: list[NewEvent] = []
    timers: list[str] = []
    answer = pb.BatchUpdateDevicesResponse()
    for name in request.names:
        if not name.startswith(f"{request.parent}/devices/"):
            raise not_found(name)
        current = existing(state.devices, name)
        if not is_active(current):
            raise wrong_state(name, "is retired")
        changed = _with_batch(current, request)
        more, ended = _changed(state, current, changed, ctx)
        events += more
        timers += ended
        answer.devices.append(changed if more else current)
    return Decision(events=tuple(events), result=answer, clear_timers=tuple(timers))


def _check_batch(request: pb.BatchUpdateDevicesRequest) -> None:
    if not 1 <= len(request.names) <= BATCH_LIMIT or len(set(request.names)) != len(request.names):
        raise invalid("names", f"must be 1 to {BATCH_LIMIT} distinct devices")
    add = rules.clean_tags(request.add_tags, "add_tags")
    both = sorted(set(add) & set(rules.clean_tags(request.remove_tags, "remove_tags")))
    if both:
        raise invalid("remove_tags", f"hold '{both[0]}', which is to be added as well", value=both[0])
    if request.quarantine == pb.BatchUpdateDevicesRequest.QUARANTINE_SET and not request.quarantine_reason:
        raise invalid("quarantine_reason", "is required: people will ask why")
    wanted = (request.add_tags, request.remove_tags, request.HasField("cohort"), request.quarantine)
    if not any(wanted):
        raise invalid("names", "are given nothing to change: add or remove tags, move, quarantine or release")


def _with_batch(current: pb.Device, request: pb.BatchUpdateDevicesRequest) -> pb.Device:
    changed = _copy(current)
    tags = sorted((set(current.tags) | set(request.add_tags)) - set(request.remove_tags))
    del changed.tags[:]
    changed.tags.extend(tags)
    if request.HasField("cohort"):
        changed.cohort = request.cohort
    if request.quarantine == pb.BatchUpdateDevicesRequest.QUARANTINE_SET:
        changed.quarantined, changed.quarantine_reason = True, request.quarantine_reason
    elif request.quarantine == pb.BatchUpdateDevicesRequest.QUARANTINE_RELEASED:
        changed.quarantined = False
    return changed


def retire(state: State, command: ask.RetireDevice, ctx: Context, _quotas: Quotas) -> Decision:
    """For good."""
    current = existing(state.devices, command.name)
    check_etag(command.etag, current.etag, current.name)
    if not is_active(current):
        raise wrong_state(current.name, "is retired already")
    rules.check_text("reason", command.reason, rules.REASON_LIMIT)
    return _retired(current, ctx, command.reason)


def _retired(current: pb.Device, ctx: Context, reason: str = "") -> Decision:
    device = _copy(current)
    device.state = pb.Device.STATE_RETIRED
    device.etag = next_etag(ctx, device.name)
    timers = (timer_id(device.name),) if current.HasField("quarantine_end_time") else ()
    return Decision(events=(device_event(device, "device.retired", reason),), result=device, clear_timers=timers)


def learned(state: State, record: Foreign, ctx: Context, _quotas: Quotas) -> Decision:
    """What rollout says of a device: what it runs, as it learned from check-ins, and how its attempts ended."""
    payload = record.payload
    if isinstance(payload, rollout_events.AttemptChanged):
        return attempt_ended(state, payload.attempt, record.occurred_at_ms, ctx)
    if not isinstance(payload, rollout_events.DeviceReported) or payload.change != "device.release_changed":
        return Decision()
    current = find(state.devices, payload.device)
    if current is None or current.reported == payload.running:
        return Decision()
    device = _copy(current)
    device.reported.CopyFrom(payload.running)
    # Under no webhook type of its own: rollout has published `device.release_changed` with what ran before.
    return _saved(device, "", ctx)
