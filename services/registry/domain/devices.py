"""Decisions about devices: made by hand, made for a certificate, changed, retired, and what they report to run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from google.protobuf.message import Message
from groundswell.registry.v1 import events_pb2 as ev
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.rollout.v1 import events_pb2 as rollout_events

from libs.errors import AlreadyExistsError, FailedPreconditionError, check_etag
from libs.eventlog import Context, Decision, Foreign, NewEvent, Public
from libs.names import organization_of, product_of
from libs.rpc.access import not_found
from services.registry.domain import commands as ask
from services.registry.domain import rules
from services.registry.domain.rules import Quotas, invalid, timestamp, wrong_state
from services.registry.domain.state import Shelves, State, find, is_active

M = TypeVar("M", bound=Message)


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


def _event(device: pb.Device, change: str) -> NewEvent:
    return NewEvent(
        organization_of(device.name),
        device.name,
        ev.DeviceSaved(device=device, change=change),
        (Public(device.name, ev.DeviceChanged(device=device, change=change)),),
    )


def _saved(device: pb.Device, change: str, ctx: Context) -> Decision:
    device.etag = next_etag(ctx, device.name)
    return Decision(events=(_event(device, change),), result=device)


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


def _open_product(state: State, name: str) -> pb.Product:
    product = existing(state.products, name)
    if product.archived:
        raise wrong_state(name, "is archived: it takes no new devices")
    return product


def _new_device(
    state: State, parent: str, identifier: str, given: pb.Device, ctx: Context, quotas: Quotas
) -> pb.Device:
    """A new device with the settable fields of the given one, checked; the caller adds what else it knows."""
    rules.check_identifier("device_id", identifier)
    name = f"{parent}/devices/{identifier}"
    device = pb.Device(
        name=name,
        uid=ctx.new_uuid("device"),
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
    _open_product(state, command.parent)
    holder = state.identifiers.get((ctx.organization, command.device_id))
    name = f"{command.parent}/devices/{command.device_id}"
    if holder == name:
        raise AlreadyExistsError("ALREADY_EXISTS", f"{name} exists already", resource=name)
    if holder is not None:
        raise _taken(ctx.organization, command.device_id)
    device = _new_device(state, command.parent, command.device_id, command.device, ctx, quotas)
    return _saved(device, "device.created", ctx)


def provision(state: State, command: ask.ProvisionDevice, ctx: Context, quotas: Quotas) -> Decision:
    """For a certificate: the same identifier with the same fingerprint is the same device, whatever it became since."""
    rules.check_fingerprint("certificate_fingerprint", command.certificate_fingerprint)
    product = _open_product(state, command.parent)
    name = f"{command.parent}/devices/{command.device_id}"
    holder = state.identifiers.get((ctx.organization, command.device_id))
    if holder is not None:
        found = existing(state.devices, holder)
        if holder != name or found.certificate_fingerprint != command.certificate_fingerprint:
            raise _taken(ctx.organization, command.device_id)
        if not is_active(found):
            raise FailedPreconditionError("DEVICE_RETIRED", f"{name} was retired for good", resource=name)
        return Decision(result=found)
    if command.development and not product.policy.allow_development_ca:
        raise FailedPreconditionError(
            "DEVELOPMENT_CA_NOT_ALLOWED",
            f"{product.name} takes no devices of a development CA",
            resource=product.name,
        )
    device = _new_device(state, command.parent, command.device_id, command.device, ctx, quotas)
    device.provisioned_by = command.provisioned_by
    device.certificate_fingerprint = command.certificate_fingerprint
    return _saved(device, "device.created", ctx)


def undo_provisioning(state: State, command: ask.UndoProvisioning, ctx: Context, _quotas: Quotas) -> Decision:
    """Retire what was provisioned for this certificate and then refused; a repeat changes nothing."""
    current = existing(state.devices, command.name)
    if current.certificate_fingerprint != command.certificate_fingerprint:
        raise FailedPreconditionError(
            "CERTIFICATE_MISMATCH", f"{current.name} was not made for this certificate", resource=current.name
        )
    return _retired(current, ctx) if is_active(current) else Decision(result=current)


def update(state: State, command: ask.UpdateDevice, ctx: Context, _quotas: Quotas) -> Decision:
    """Change what the mask names."""
    current = existing(state.devices, command.device.name)
    check_etag(command.device.etag, current.etag, current.name)
    changed = rules.masked(current, command.device, command.paths, rules.DEVICE_FIELDS, "a device")
    if not is_active(current):
        raise wrong_state(current.name, "is retired")
    rules.clean_device(changed)
    if changed.cohort != current.cohort:
        _check_cohort(state, changed)
    return _saved(changed, "device.updated", ctx) if changed != current else Decision(result=current)


def retire(state: State, command: ask.RetireDevice, ctx: Context, _quotas: Quotas) -> Decision:
    """For good."""
    current = existing(state.devices, command.name)
    check_etag(command.etag, current.etag, current.name)
    if not is_active(current):
        raise wrong_state(current.name, "is retired already")
    return _retired(current, ctx)


def _retired(current: pb.Device, ctx: Context) -> Decision:
    device = _copy(current)
    device.state = pb.Device.STATE_RETIRED
    return _saved(device, "device.retired", ctx)


def reported(state: State, record: Foreign, ctx: Context, _quotas: Quotas) -> Decision:
    """What a device runs, as rollout learned it from check-ins. Other records of rollout say nothing about devices."""
    payload = record.payload
    if not isinstance(payload, rollout_events.DeviceReported) or payload.change != "device.release_changed":
        return Decision()
    current = find(state.devices, payload.device)
    if current is None or current.reported == payload.running:
        return Decision()
    device = _copy(current)
    device.reported.CopyFrom(payload.running)
    # Under no webhook type of its own: rollout has published `device.release_changed` with what ran before.
    return _saved(device, "", ctx)
