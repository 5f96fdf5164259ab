"""The registry's decisions.

Rules: an organization id is unique and `platform` is reserved; a device's identifier is unique in its organization, for
ever; a device's cohort belongs to its product; retired and revoked are final; nobody gives a role, a scope or a reach
that they lack; the last key of an owner cannot be revoked. Devices made for certificates live in `devices`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.protobuf.message import Message
from groundswell.registry.v1 import events_pb2 as ev
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.rollout.v1 import events_pb2 as rollout_events

from libs.errors import AlreadyExistsError, FailedPreconditionError, check_etag
from libs.eventlog import Context, Decision, Event, Foreign, NewEvent, Public
from libs.names import organization_of
from libs.rpc.access import PLATFORM, covers, not_found
from services.registry.domain import commands as ask
from services.registry.domain import devices, rules
from services.registry.domain.devices import existing, next_etag, refuse_existing
from services.registry.domain.rules import Quotas, check_quota, check_text, invalid, timestamp
from services.registry.domain.state import State, evolve, find, known_key, shelf

Decider = Callable[[State, Any, Context, Quotas], Decision]


def _organization_event(organization: pb.Organization, change: str) -> NewEvent:
    image = ev.OrganizationChanged(organization=organization, change=change)
    return NewEvent(
        organization_of(organization.name),
        organization.name,
        ev.OrganizationCreated(organization=organization),
        (Public(organization.name, image),),
    )


def _product_event(product: pb.Product, change: str) -> NewEvent:
    image = ev.ProductChanged(product=product, change=change)
    return NewEvent(
        organization_of(product.name), product.name, ev.ProductSaved(product=product), (Public(product.name, image),)
    )


def _member_event(member: pb.Member, change: str) -> NewEvent:
    image = ev.MemberChanged(member=member, change=change)
    return NewEvent(
        organization_of(member.name), member.name, ev.MemberSaved(member=member), (Public(member.name, image),)
    )


def _key_event(key: pb.ApiKey, change: str) -> NewEvent:
    image = ev.ApiKeyChanged(api_key=key, change=change)
    return NewEvent(organization_of(key.name), key.name, ev.ApiKeySaved(api_key=key), (Public(key.name, image),))


def _gateway_event(gateway: pb.Gateway, change: str) -> NewEvent:
    image = ev.GatewayChanged(gateway=gateway, change=change)
    return NewEvent(
        organization_of(gateway.name), gateway.name, ev.GatewaySaved(gateway=gateway), (Public(gateway.name, image),)
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
        return Decision((_key_event(replaced, "api_key.updated"),), pb.BootstrapResponse(api_key=replaced))
    if name in state.organizations:
        raise AlreadyExistsError("ALREADY_BOOTSTRAPPED", "the platform has a key of another id", resource=name)
    organization, member, key = _founding(
        PLATFORM, "Platform", PLATFORM, command.api_key_id, command.secret_sha256, ctx
    )
    return Decision(
        events=(
            _organization_event(organization, "organization.created"),
            _member_event(member, "member.created"),
            _key_event(key, "api_key.created"),
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
            _member_event(member, "member.created"),
            _key_event(key, "api_key.created"),
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
    rules.clean_policy(product.policy)
    return Decision(events=(_product_event(product, "product.created"),), result=product)


def _update_product(state: State, command: ask.UpdateProduct, ctx: Context, _quotas: Quotas) -> Decision:
    current = existing(state.products, command.product.name)
    check_etag(command.product.etag, current.etag, current.name)
    changed = rules.masked(current, command.product, command.paths, rules.PRODUCT_FIELDS, "a product")
    check_text("product.display_name", changed.display_name, rules.NAME_LIMIT)
    rules.clean_policy(changed.policy)
    if changed == current:
        return Decision(result=current)
    changed.etag = next_etag(ctx, current.name)
    return Decision(events=(_product_event(changed, "product.updated"),), result=changed)


def _create_cohort(state: State, command: ask.CreateCohort, ctx: Context, quotas: Quotas) -> Decision:
    existing(state.products, command.parent)
    name = f"{command.parent}/cohorts/{command.cohort_id}"
    cohorts = shelf(state.cohorts, f"{command.parent}/cohorts")
    refuse_existing(cohorts, name)
    check_text("cohort.display_name", command.cohort.display_name, rules.NAME_LIMIT)
    check_quota("cohorts", len(cohorts), quotas.cohorts)
    cohort = pb.Cohort(
        name=name,
        uid=ctx.new_uuid("cohort"),
        display_name=command.cohort.display_name,
        create_time=timestamp(ctx.now_ms),
        etag=next_etag(ctx, name),
    )
    image = ev.CohortChanged(cohort=cohort, change="cohort.created")
    event = NewEvent(ctx.organization, name, ev.CohortSaved(cohort=cohort), (Public(name, image),))
    return Decision(events=(event,), result=cohort)


def _create_member(state: State, command: ask.CreateMember, ctx: Context, quotas: Quotas) -> Decision:
    rules.check_role(known_key(state, ctx.principal), command.member.role, "member.role")
    check_text("member.display_name", command.member.display_name, rules.NAME_LIMIT)
    name = f"{command.parent}/members/{command.member_id}"
    members = shelf(state.members, f"{command.parent}/members")
    refuse_existing(members, name)
    check_quota("members", len(members), quotas.members)
    member = pb.Member(
        name=name,
        role=command.member.role,
        display_name=command.member.display_name,
        create_time=timestamp(ctx.now_ms),
        etag=next_etag(ctx, name),
    )
    return Decision(events=(_member_event(member, "member.created"),), result=member)


def _create_api_key(state: State, command: ask.CreateApiKey, ctx: Context, quotas: Quotas) -> Decision:
    wanted = command.api_key
    giver = known_key(state, ctx.principal)
    if len(wanted.secret_sha256) != hashlib.sha256().digest_size:
        raise invalid("api_key.secret_sha256", "must be the 32 bytes of the secret's SHA-256")
    if wanted.HasField("expire_time") and wanted.expire_time.ToMilliseconds() <= ctx.now_ms:
        raise invalid("api_key.expire_time", "has passed already")
    member_name = wanted.member or (giver.member if giver else "")
    member = find(state.members, member_name)
    if member is None or not member_name.startswith(f"{command.parent}/members/"):
        raise not_found(member_name)
    rules.check_role(giver, member.role, "api_key.member")
    rules.check_scopes(giver, wanted.scopes, wanted.resource_prefix, ctx.organization)
    name = f"{command.parent}/apiKeys/{command.api_key_id}"
    keys = shelf(state.api_keys, f"{command.parent}/apiKeys")
    refuse_existing(keys, name)
    check_quota("api_keys", sum(not key.revoked for key in keys.values()), quotas.api_keys)
    key = pb.ApiKey(
        name=name,
        member=member_name,
        scopes=sorted(set(wanted.scopes)),
        resource_prefix=wanted.resource_prefix,
        secret_sha256=wanted.secret_sha256,
        create_time=timestamp(ctx.now_ms),
        etag=next_etag(ctx, name),
    )
    if wanted.HasField("expire_time"):
        key.expire_time.CopyFrom(wanted.expire_time)
    return Decision(events=(_key_event(key, "api_key.created"),), result=key)


def _revoke_api_key(state: State, command: ask.RevokeApiKey, ctx: Context, _quotas: Quotas) -> Decision:
    current = existing(state.api_keys, command.name)
    if current.revoked:
        return Decision(result=current)
    check_etag(command.etag, current.etag, current.name)
    target = known_key(state, command.name)
    if target is not None and command.name != ctx.principal:
        rules.check_role(known_key(state, ctx.principal), target.role, "name")
    if _governs(state, command.name) and not any(
        _governs(state, name) for name in shelf(state.api_keys, command.name.rpartition("/")[0]) if name != command.name
    ):
        raise FailedPreconditionError(
            "LAST_OWNER_KEY",
            f"{command.name} is the last key of an owner: without it nobody could manage the organization",
            resource=command.name,
        )
    revoked = pb.ApiKey()
    revoked.CopyFrom(current)
    revoked.revoked = True
    revoked.etag = next_etag(ctx, command.name)
    return Decision(events=(_key_event(revoked, "api_key.revoked"),), result=revoked)


def _governs(state: State, name: str) -> bool:
    """Whether a key can manage its organization for ever."""
    key = known_key(state, name)
    return (
        key is not None
        and not key.revoked
        and key.role == "owner"
        and not key.expire_ms
        and not key.resource_prefix
        and covers(key.scopes, "registry.apiKeys.create")
    )


def _new_gateway(state: State, name: str, public_key: bytes, ctx: Context, quotas: Quotas) -> pb.Gateway:
    if len(public_key) != 32:
        raise invalid("gateway.public_key", "must be a raw Ed25519 public key of 32 bytes")
    gateways = shelf(state.gateways, name.rpartition("/")[0])
    refuse_existing(gateways, name)
    key_id = hashlib.sha256(public_key).hexdigest()
    if any(gateway.key_id == key_id for gateway in gateways.values()):
        raise AlreadyExistsError("GATEWAY_KEY_TAKEN", "another gateway has this key", key_id=key_id)
    check_quota("gateways", len(gateways), quotas.gateways)
    return pb.Gateway(
        name=name,
        public_key=public_key,
        key_id=key_id,
        create_time=timestamp(ctx.now_ms),
        etag=next_etag(ctx, name),
    )


def _create_gateway(state: State, command: ask.CreateGateway, ctx: Context, quotas: Quotas) -> Decision:
    if command.parent not in state.organizations:
        raise not_found(command.parent)
    name = f"{command.parent}/gateways/{command.gateway_id}"
    gateway = _new_gateway(state, name, command.gateway.public_key, ctx, quotas)
    return Decision(events=(_gateway_event(gateway, "gateway.created"),), result=gateway)


def _enrol_gateway(state: State, command: ask.EnrolGateway, ctx: Context, quotas: Quotas) -> Decision:
    """The platform's own gateways; they may come before the platform is bootstrapped."""
    name = f"organizations/{PLATFORM}/gateways/{command.gateway_id}"
    found = find(state.gateways, name)
    if found is not None:
        if found.public_key != command.public_key:
            raise AlreadyExistsError(
                "GATEWAY_KEY_CONFLICT",
                f"{name} has another key: give this gateway an id of its own",
                resource=name,
                key_id=found.key_id,
            )
        return Decision(result=found)
    gateway = _new_gateway(state, name, command.public_key, ctx, quotas)
    return Decision(events=(_gateway_event(gateway, "gateway.created"),), result=gateway)


_DECIDERS: Mapping[type, Decider] = {
    ask.Bootstrap: _bootstrap,
    ask.CreateOrganization: _create_organization,
    ask.CreateProduct: _create_product,
    ask.UpdateProduct: _update_product,
    ask.CreateCohort: _create_cohort,
    ask.CreateMember: _create_member,
    ask.CreateApiKey: _create_api_key,
    ask.RevokeApiKey: _revoke_api_key,
    ask.CreateGateway: _create_gateway,
    ask.EnrolGateway: _enrol_gateway,
    ask.CreateDevice: devices.create,
    ask.UpdateDevice: devices.update,
    ask.RetireDevice: devices.retire,
    ask.ProvisionDevice: devices.provision,
    ask.UndoProvisioning: devices.undo_provisioning,
    Foreign: devices.reported,
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
