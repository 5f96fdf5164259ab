"""The registry's decisions: organizations, products and cohorts here, everything else in a module of its own.

Rules: an organization id is unique and `platform` is reserved; a device's identifier is unique in its organization, for
ever; a device's cohort belongs to its product; retired and revoked are final; a product is archived only when it has no
devices left. Who may give what is in `access`, devices are in `devices`, `quarantine` and `imports`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from google.protobuf.message import Message
from groundswell.registry.v1 import events_pb2 as ev
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.rollout.v1 import events_pb2 as rollout_events

from libs.errors import AlreadyExistsError, FailedPreconditionError, check_etag
from libs.eventlog import Context, Decision, Event, Foreign, NewEvent, Public, TimerFired
from libs.names import organization_of
from libs.rpc.access import PLATFORM, not_found
from services.registry.domain import access, devices, gateways, imports, quarantine, rules
from services.registry.domain import commands as ask
from services.registry.domain.devices import existing, next_etag, refuse_existing
from services.registry.domain.policy import PRODUCT_FIELDS, clean_policy
from services.registry.domain.rules import Quotas, check_quota, check_text, invalid, timestamp
from services.registry.domain.state import State, evolve, find, shelf

ORGANIZATION_FIELDS: Final = ("display_name",)
COHORT_FIELDS: Final = ("display_name", "description", "labels")

Decider = Callable[[State, Any, Context, Quotas], Decision]


def _organization_event(organization: pb.Organization, change: str) -> NewEvent:
    image = ev.OrganizationChanged(organization=organization, change=change)
    created = change == "organization.created"
    kind = ev.OrganizationCreated if created else ev.OrganizationSaved
    return NewEvent(
        organization_of(organization.name),
        organization.name,
        kind(organization=organization),
        (Public(organization.name, image),),
    )


def _product_event(product: pb.Product, change: str) -> NewEvent:
    image = ev.ProductChanged(product=product, change=change)
    return NewEvent(
        organization_of(product.name), product.name, ev.ProductSaved(product=product), (Public(product.name, image),)
    )


def _cohort_event(cohort: pb.Cohort, change: str) -> NewEvent:
    image = ev.CohortChanged(cohort=cohort, change=change)
    return NewEvent(
        organization_of(cohort.name), cohort.name, ev.CohortSaved(cohort=cohort), (Public(cohort.name, image),)
    )


def _founding(
    organization: str, display_name: str, role: str, key_id: str, secret_sha256: bytes, ctx: Context
) -> tuple[pb.Organization, pb.Member, pb.ApiKey]:
    """An organization with the one member and key that it begins with."""
    name = f"organizations/{organization}"
    now = timestamp(ctx.now_ms)
    member = f"{name}/members/{role}"
    key = f"{name}/apiKeys/{key_id}"
    return (
        pb.Organization(
            name=name,
            uid=ctx.new_uuid("organization"),
            display_name=display_name,
            create_time=now,
            etag=next_etag(ctx, name),
        ),
        pb.Member(name=member, role=role, display_name=role, create_time=now, etag=next_etag(ctx, member)),
        pb.ApiKey(
            name=key,
            member=member,
            scopes=["*"],
            secret_sha256=secret_sha256,
            create_time=now,
            etag=next_etag(ctx, key),
        ),
    )


def _bootstrap(state: State, command: ask.Bootstrap, ctx: Context, _quotas: Quotas) -> Decision:
    """A new secret replaces the old one: whoever holds the registry's own certificate may mend a lost secret."""
    name = f"organizations/{PLATFORM}"
    found = find(state.api_keys, f"{name}/apiKeys/{command.api_key_id}")
    if found is not None:
        if found.secret_sha256 == command.secret_sha256:
            return Decision(result=pb.BootstrapResponse(api_key=found))
        replaced = pb.ApiKey()
        replaced.CopyFrom(found)
        replaced.secret_sha256 = command.secret_sha256
        replaced.etag = next_etag(ctx, found.name)
        return Decision((access.key_event(replaced, "api_key.updated"),), pb.BootstrapResponse(api_key=replaced))
    if name in state.organizations:
        raise AlreadyExistsError("ALREADY_BOOTSTRAPPED", "the platform has a key of another id", resource=name)
    organization, member, key = _founding(
        PLATFORM, "Platform", PLATFORM, command.api_key_id, command.secret_sha256, ctx
    )
    return Decision(
        events=(
            _organization_event(organization, "organization.created"),
            access.member_event(member, "member.created"),
            access.key_event(key, "api_key.created"),
        ),
        result=pb.BootstrapResponse(api_key=key),
    )


def _create_organization(state: State, command: ask.CreateOrganization, ctx: Context, _quotas: Quotas) -> Decision:
    check_text("organization.display_name", command.display_name, rules.NAME_LIMIT)
    if command.organization_id == PLATFORM:
        raise invalid("organization_id", f"'{PLATFORM}' is reserved", value=PLATFORM)
    refuse_existing(state.organizations, f"organizations/{command.organization_id}")
    organization, member, key = _founding(
        command.organization_id, command.display_name, "owner", command.owner_key_id, command.owner_key_sha256, ctx
    )
    return Decision(
        events=(
            _organization_event(organization, "organization.created"),
            access.member_event(member, "member.created"),
            access.key_event(key, "api_key.created"),
        ),
        result=organization,
    )


def _create_product(state: State, command: ask.CreateProduct, ctx: Context, quotas: Quotas) -> Decision:
    if command.parent not in state.organizations:
        raise not_found(command.parent)
    name = f"{command.parent}/products/{command.product_id}"
    products = shelf(state.products, f"{command.parent}/products")
    refuse_existing(products, name)
    check_text("product.display_name", command.product.display_name, rules.NAME_LIMIT)
    check_quota("products", len(products), quotas.products)
    product = pb.Product(
        name=name,
        uid=ctx.new_uuid("product"),
        display_name=command.product.display_name,
        policy=command.product.policy,
        create_time=timestamp(ctx.now_ms),
        etag=next_etag(ctx, name),
    )
    clean_policy(product.policy)
    return Decision(events=(_product_event(product, "product.created"),), result=product)


def _update_product(state: State, command: ask.UpdateProduct, ctx: Context, _quotas: Quotas) -> Decision:
    current = existing(state.products, command.product.name)
    check_etag(command.product.etag, current.etag, current.name)
    changed = rules.masked(current, command.product, command.paths, PRODUCT_FIELDS, "a product")
    check_text("product.display_name", changed.display_name, rules.NAME_LIMIT)
    clean_policy(changed.policy)
    if changed == current:
        return Decision(result=current)
    changed.etag = next_etag(ctx, current.name)
    return Decision(events=(_product_event(changed, "product.updated"),), result=changed)


def _create_cohort(state: State, command: ask.CreateCohort, ctx: Context, quotas: Quotas) -> Decision:
    devices.open_product(state, command.parent)
    name = f"{command.parent}/cohorts/{command.cohort_id}"
    cohorts = shelf(state.cohorts, f"{command.parent}/cohorts")
    refuse_existing(cohorts, name)
    _check_cohort(command.cohort)
    check_quota("cohorts", len(cohorts), quotas.cohorts)
    cohort = pb.Cohort(
        name=name,
        uid=ctx.new_uuid("cohort"),
        display_name=command.cohort.display_name,
        description=command.cohort.description,
        labels=command.cohort.labels,
        create_time=timestamp(ctx.now_ms),
        etag=next_etag(ctx, name),
    )
    return Decision(events=(_cohort_event(cohort, "cohort.created"),), result=cohort)


def _check_cohort(cohort: pb.Cohort) -> None:
    check_text("cohort.display_name", cohort.display_name, rules.NAME_LIMIT)
    check_text("cohort.description", cohort.description, rules.TEXT_LIMIT)
    rules.check_labels(cohort.labels)


def _update_organization(state: State, command: ask.UpdateOrganization, ctx: Context, _quotas: Quotas) -> Decision:
    current = state.organizations.get(command.organization.name)
    if current is None:
        raise not_found(command.organization.name)
    check_etag(command.organization.etag, current.etag, current.name)
    changed = rules.masked(current, command.organization, command.paths, ORGANIZATION_FIELDS, "an organization")
    check_text("organization.display_name", changed.display_name, rules.NAME_LIMIT)
    if changed == current:
        return Decision(result=current)
    changed.etag = next_etag(ctx, current.name)
    return Decision(events=(_organization_event(changed, "organization.updated"),), result=changed)


def _archive_product(state: State, command: ask.ArchiveProduct, ctx: Context, _quotas: Quotas) -> Decision:
    """Out of use, or into use again; a repeat changes nothing."""
    current = existing(state.products, command.name)
    if current.archived == command.archived:
        return Decision(result=current)
    check_etag(command.etag, current.etag, current.name)
    devices_left = state.active_devices.get(command.name, 0)
    if command.archived and devices_left:
        raise FailedPreconditionError(
            "PRODUCT_HAS_DEVICES",
            f"{command.name} has {devices_left} devices that are not retired: retire them first",
            resource=command.name,
            devices=devices_left,
        )
    changed = pb.Product()
    changed.CopyFrom(current)
    changed.archived = command.archived
    changed.etag = next_etag(ctx, current.name)
    change = "product.archived" if command.archived else "product.unarchived"
    return Decision(events=(_product_event(changed, change),), result=changed)


def _update_cohort(state: State, command: ask.UpdateCohort, ctx: Context, _quotas: Quotas) -> Decision:
    current = existing(state.cohorts, command.cohort.name)
    check_etag(command.cohort.etag, current.etag, current.name)
    changed = rules.masked(current, command.cohort, command.paths, COHORT_FIELDS, "a cohort")
    _check_cohort(changed)
    if changed == current:
        return Decision(result=current)
    changed.etag = next_etag(ctx, current.name)
    return Decision(events=(_cohort_event(changed, "cohort.updated"),), result=changed)


def _timer_fired(state: State, fired: TimerFired, ctx: Context, _quotas: Quotas) -> Decision:
    end = {quarantine.TIMER_KIND: quarantine.ended, imports.TIMER_KIND: imports.expired}[fired.kind]
    return end(state, fired.payload.decode(), ctx)


_DECIDERS: Mapping[type, Decider] = {
    ask.Bootstrap: _bootstrap,
    ask.CreateOrganization: _create_organization,
    ask.UpdateOrganization: _update_organization,
    ask.CreateProduct: _create_product,
    ask.UpdateProduct: _update_product,
    ask.ArchiveProduct: _archive_product,
    ask.CreateCohort: _create_cohort,
    ask.UpdateCohort: _update_cohort,
    ask.CreateMember: access.create_member,
    ask.UpdateMember: access.update_member,
    ask.DeleteMember: access.delete_member,
    ask.CreateRole: access.create_role,
    ask.UpdateRole: access.update_role,
    ask.DeleteRole: access.delete_role,
    ask.CreateApiKey: access.create_api_key,
    ask.UpdateApiKey: access.update_api_key,
    ask.RotateApiKey: access.rotate_api_key,
    ask.RevokeApiKey: access.revoke_api_key,
    ask.CreateGateway: gateways.create,
    ask.UpdateGateway: gateways.update,
    ask.EnrolGateway: gateways.enrol,
    ask.CreateDevice: devices.create,
    ask.UpdateDevice: devices.update,
    ask.BatchUpdateDevices: devices.batch_update,
    ask.RetireDevice: devices.retire,
    ask.ProvisionDevice: devices.provision,
    ask.UndoProvisioning: devices.undo_provisioning,
    ask.CreateDeviceImport: imports.create,
    ask.AppendDeviceImportRows: imports.append,
    ask.ValidateDeviceImport: imports.validate,
    ask.CommitDeviceImport: imports.commit,
    ask.CancelDeviceImport: imports.cancel,
    ask.DeleteDeviceImport: imports.delete,
    ask.AdvanceDeviceImport: imports.advance,
    Foreign: devices.learned,
    TimerFired: _timer_fired,
}


class Registry:
    """The `Domain` of this service."""

    service = "registry"
    event_types: Sequence[type[Message]] = (
        ev.OrganizationCreated,
        ev.ProductSaved,
        ev.CohortSaved,
        ev.DeviceSaved,
        ev.MemberSaved,
        ev.ApiKeySaved,
        ev.GatewaySaved,
        ev.OrganizationSaved,
        ev.MemberRemoved,
        ev.RoleSaved,
        ev.RoleDeleted,
        ev.DeviceFailuresCounted,
        ev.DeviceImportSaved,
        ev.DeviceImportRowsAppended,
        ev.DeviceImportAdvanced,
        ev.DeviceImportDeleted,
    )
    sources: Mapping[str, Sequence[type[Message]]] = {
        "rollout": (rollout_events.RolloutChanged, rollout_events.AttemptChanged, rollout_events.DeviceReported)
    }

    def __init__(self, quotas: Quotas | None = None) -> None:
        self._quotas = quotas or Quotas()

    def initial_state(self, partition: int) -> State:  # noqa: ARG002 - every partition begins empty
        return State()

    def decide(self, state: State, command: object, ctx: Context) -> Decision:
        return _DECIDERS[type(command)](state, command, ctx, self._quotas)

    def evolve(self, state: State, event: Event) -> State:
        return evolve(state, event)
