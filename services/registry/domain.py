"""The registry's rules, pure.

* An organization id is unique because all its events live in one partition; ``platform`` is reserved.
* A device's identifier is unique in its organization, across products, for ever: a retired identifier is not reused.
* A device's cohort is of the device's product. A quarantined device stays in its cohort and gets nothing.
* Nobody creates a member or a key with more than their own role; a key's secret is known here as SHA-256 only.
* ``ProvisionDevice`` and ``UndoProvisioning`` are idempotent by the certificate's fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

import immutables
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.registry.v1 import events_pb2 as events
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.rollout.v1 import events_pb2 as rollout_events

from libs.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    PermissionDeniedError,
    ResourceExhaustedError,
    check_etag,
)
from libs.eventlog import Context, Decision, Event, Foreign, NewEvent, Public
from libs.names import is_within, last_segment, organization_of, parent_of, product_of
from libs.rpc.access import PLATFORM, may_grant, not_found

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Quotas:
    """Limits per organization; each refusal names its quota."""

    devices: int = 1_000_000
    products: int = 1_000
    cohorts: int = 10_000
    members: int = 1_000
    api_keys: int = 1_000
    gateways: int = 1_000


@dataclass(frozen=True, slots=True)
class State:
    """One partition's resources by full name."""

    organizations: immutables.Map[str, pb.Organization] = field(default_factory=immutables.Map)
    products: immutables.Map[str, pb.Product] = field(default_factory=immutables.Map)
    cohorts: immutables.Map[str, pb.Cohort] = field(default_factory=immutables.Map)
    devices: immutables.Map[str, pb.Device] = field(default_factory=immutables.Map)
    members: immutables.Map[str, pb.Member] = field(default_factory=immutables.Map)
    api_keys: immutables.Map[str, pb.ApiKey] = field(default_factory=immutables.Map)
    gateways: immutables.Map[str, pb.Gateway] = field(default_factory=immutables.Map)
    identifiers: immutables.Map[str, str] = field(default_factory=immutables.Map)
    """``<organization>/<identifier>`` → device name."""
    counts: immutables.Map[str, int] = field(default_factory=immutables.Map)
    """``<organization>/<collection>`` → how many."""


@dataclass(frozen=True, slots=True)
class CreateOrganization:
    """A new tenant with its first owner."""

    organization: str
    display_name: str
    owner_key_id: str
    owner_key_sha256: bytes


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """The platform organization with its key; repeating it with the same secret changes nothing."""

    api_key_id: str
    secret_sha256: bytes


@dataclass(frozen=True, slots=True)
class Create:
    """A product, cohort, device, member, API key or gateway by hand."""

    name: str
    resource: pb.Product | pb.Cohort | pb.Device | pb.Member | pb.ApiKey | pb.Gateway
    giver_role: str = ""
    """Role of the caller, for members and keys."""
    giver_member: str = ""
    giver_scopes: tuple[str, ...] = ()
    giver_prefix: str = ""


@dataclass(frozen=True, slots=True)
class Update:
    """New values for named fields of a product or device."""

    resource: pb.Product | pb.Device
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RetireDevice:
    """Decommission for good."""

    name: str
    etag: str
    reason: str


@dataclass(frozen=True, slots=True)
class RevokeApiKey:
    """Revoke for good; repeating it changes nothing."""

    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class ProvisionDevice:
    """A device for an admitted certificate."""

    request: pb.ProvisionDeviceRequest


@dataclass(frozen=True, slots=True)
class UndoProvisioning:
    """Retire a device whose admission was refused after all."""

    request: pb.UndoProvisioningRequest


@dataclass(frozen=True, slots=True)
class EnrolGateway:
    """A platform gateway registers its own key; the same key again changes nothing."""

    name: str
    public_key: bytes
    key_id: str


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one kind of resource is kept and published."""

    collection: str
    attribute: str
    saved: type[Message]
    changed: type[Message]
    payload_field: str
    created: str


_KINDS: Final[Mapping[type[Message], _Kind]] = {
    pb.Organization: _Kind(
        "organizations",
        "organizations",
        events.OrganizationCreated,
        events.OrganizationChanged,
        "organization",
        "organization.created",
    ),
    pb.Product: _Kind("products", "products", events.ProductSaved, events.ProductChanged, "product", "product.created"),
    pb.Cohort: _Kind("cohorts", "cohorts", events.CohortSaved, events.CohortChanged, "cohort", "cohort.created"),
    pb.Device: _Kind("devices", "devices", events.DeviceSaved, events.DeviceChanged, "device", "device.created"),
    pb.Member: _Kind("members", "members", events.MemberSaved, events.MemberChanged, "member", "member.created"),
    pb.ApiKey: _Kind("apiKeys", "api_keys", events.ApiKeySaved, events.ApiKeyChanged, "api_key", "api_key.created"),
    pb.Gateway: _Kind("gateways", "gateways", events.GatewaySaved, events.GatewayChanged, "gateway", "gateway.created"),
}
_PRODUCT_PATHS: Final = frozenset({"display_name", "policy"})
_DEVICE_PATHS: Final = frozenset({"cohort", "tags", "target", "description", "quarantined", "quarantine_reason"})
_MAX_TAGS: Final = 64


def _copy(message: M) -> M:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def _time(now_ms: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMilliseconds(now_ms)
    return stamp


def _save(resource: Message, change: str, ctx: Context) -> NewEvent:
    """The event for an after-image; stamps the etag."""
    kind = _KINDS[type(resource)]
    name: str = resource.name  # type: ignore[attr-defined]
    resource.etag = str(ctx.version(name) + 1)  # type: ignore[attr-defined]
    private = kind.saved(**{kind.payload_field: resource})
    if isinstance(private, events.DeviceSaved):
        private.change = change
    public = kind.changed(**{kind.payload_field: resource, "change": change})
    return NewEvent(ctx.organization, name, private, public=(Public(name, public),))


class Registry:
    """The domain; see the module for its rules."""

    service = "registry"
    event_types: Sequence[type[Message]] = tuple(kind.saved for kind in _KINDS.values())
    sources: Mapping[str, Sequence[type[Message]]] = {
        "rollout": (rollout_events.RolloutChanged, rollout_events.AttemptChanged, rollout_events.DeviceReported)
    }

    def __init__(self, quotas: Quotas | None = None) -> None:
        self._quotas = quotas or Quotas()
        self._handlers: dict[type, Callable[[State, object, Context], Decision]] = {
            CreateOrganization: self._create_organization,  # type: ignore[dict-item]
            Bootstrap: self._bootstrap,  # type: ignore[dict-item]
            Create: self._create,  # type: ignore[dict-item]
            Update: self._update,  # type: ignore[dict-item]
            RetireDevice: self._retire_device,  # type: ignore[dict-item]
            RevokeApiKey: self._revoke_api_key,  # type: ignore[dict-item]
            ProvisionDevice: self._provision,  # type: ignore[dict-item]
            UndoProvisioning: self._undo_provisioning,  # type: ignore[dict-item]
            EnrolGateway: self._enrol_gateway,  # type: ignore[dict-item]
            Foreign: self._foreign,  # type: ignore[dict-item]
        }

    def initial_state(self, partition: int) -> State:  # noqa: ARG002 - all partitions begin empty
        """Nothing."""
        return State()

    def decide(self, state: State, command: object, ctx: Context) -> Decision:
        """See :class:`libs.eventlog.Domain`."""
        return self._handlers[type(command)](state, command, ctx)

    def evolve(self, state: State, event: Event) -> State:
        """After-images replace what they are images of."""
        for resource_type, kind in _KINDS.items():
            if isinstance(event.payload, kind.saved):
                resource = getattr(event.payload, kind.payload_field)
                return _put(state, resource_type, kind, resource)
        return state

    # Organizations.

    def _create_organization(self, state: State, command: CreateOrganization, ctx: Context) -> Decision:
        name = f"organizations/{command.organization}"
        if command.organization == PLATFORM:
            raise InvalidArgumentError(
                "INVALID_FIELD", "the id 'platform' is reserved", field="organization_id", value=PLATFORM
            )
        _refuse_existing(name, state.organizations)
        organization = pb.Organization(
            name=name,
            uid=ctx.new_uuid("organization"),
            display_name=command.display_name,
            create_time=_time(ctx.now_ms),
        )
        member = pb.Member(
            name=f"{name}/members/owner", role="owner", display_name="owner", create_time=_time(ctx.now_ms)
        )
        key = pb.ApiKey(
            name=f"{name}/apiKeys/{command.owner_key_id}",
            member=member.name,
            scopes=["*"],
            secret_sha256=command.owner_key_sha256,
            create_time=_time(ctx.now_ms),
        )
        saved = (
            _save(organization, "organization.created", ctx),
            _save(member, "member.created", ctx),
            _save(key, "api_key.created", ctx),
        )
        return Decision(saved, organization)

    def _bootstrap(self, state: State, command: Bootstrap, ctx: Context) -> Decision:
        name = f"organizations/{PLATFORM}"
        key_name = f"{name}/apiKeys/{command.api_key_id}"
        known = state.api_keys.get(key_name)
        if known is not None and known.secret_sha256 == command.secret_sha256:
            return Decision(result=pb.BootstrapResponse(api_key=known))
        saved: list[NewEvent] = []
        if name not in state.organizations:
            organization = pb.Organization(
                name=name, uid=ctx.new_uuid("organization"), display_name=PLATFORM, create_time=_time(ctx.now_ms)
            )
            member = pb.Member(name=f"{name}/members/{PLATFORM}", role=PLATFORM, create_time=_time(ctx.now_ms))
            saved += [_save(organization, "organization.created", ctx), _save(member, "member.created", ctx)]
        key = _copy(known) if known is not None else pb.ApiKey(name=key_name, create_time=_time(ctx.now_ms))
        key.member, key.secret_sha256 = f"{name}/members/{PLATFORM}", command.secret_sha256
        key.scopes[:] = ["*"]
        saved.append(_save(key, "api_key.created" if known is None else "api_key.updated", ctx))
        return Decision(tuple(saved), pb.BootstrapResponse(api_key=key))

    # What operators create.

    def _create(self, state: State, command: Create, ctx: Context) -> Decision:
        kind = _KINDS[type(command.resource)]
        _need(parent_of(command.name), state)
        _refuse_existing(command.name, getattr(state, kind.attribute))
        self._check_quota(state, ctx.organization, kind.collection)
        resource = _copy(command.resource)
        resource.name = command.name
        resource.create_time.CopyFrom(_time(ctx.now_ms))
        if isinstance(resource, pb.Device):
            _complete_device(state, resource, ctx)
        elif isinstance(resource, pb.ApiKey):
            _complete_key(state, resource, command)
        elif isinstance(resource, pb.Member):
            _check_role(command.giver_role, resource.role, "role")
        elif isinstance(resource, pb.Gateway):
            _check_gateway(state, resource)
        elif isinstance(resource, pb.Product | pb.Cohort):
            resource.uid = ctx.new_uuid("uid")
            if isinstance(resource, pb.Product):
                _check_policy(resource.policy)
        return Decision((_save(resource, kind.created, ctx),), resource)

    def _check_quota(self, state: State, organization: str, collection: str) -> None:
        names = {"apiKeys": "api_keys"}
        quota = names.get(collection, collection)
        limit: int = getattr(self._quotas, quota)
        if state.counts.get(f"{organization}/{collection}", 0) >= limit:
            raise ResourceExhaustedError(
                "QUOTA_EXCEEDED", f"the organization may have {limit} {quota}", quota=quota, limit=limit
            )

    def _update(self, state: State, command: Update, ctx: Context) -> Decision:
        wanted = command.resource
        if isinstance(wanted, pb.Product):
            return self._update_product(state, wanted, command.paths, ctx)
        device = _copy(_device(state, wanted.name))
        check_etag(wanted.etag, device.etag, wanted.name)
        _check_paths(command.paths, _DEVICE_PATHS)
        if device.state == pb.Device.STATE_RETIRED:
            raise FailedPreconditionError("DEVICE_RETIRED", f"{device.name} is retired", resource=device.name)
        for path in command.paths:
            if path == "tags":
                device.tags[:] = _tags(wanted.tags)
            elif path == "cohort":
                device.cohort = _cohort_of_product(state, wanted.cohort, device.name)
            else:
                setattr(device, path, getattr(wanted, path))
        if not device.quarantined:
            device.quarantine_reason = ""
        return Decision((_save(device, "device.updated", ctx),), device)

    def _update_product(self, state: State, wanted: pb.Product, paths: tuple[str, ...], ctx: Context) -> Decision:
        known = state.products.get(wanted.name)
        if known is None:
            raise not_found(wanted.name)
        check_etag(wanted.etag, known.etag, wanted.name)
        _check_paths(paths, _PRODUCT_PATHS)
        product = _copy(known)
        if "display_name" in paths:
            product.display_name = wanted.display_name
        if "policy" in paths:
            _check_policy(wanted.policy)
            product.policy.CopyFrom(wanted.policy)
        return Decision((_save(product, "product.updated", ctx),), product)

    def _retire_device(self, state: State, command: RetireDevice, ctx: Context) -> Decision:
        known = _device(state, command.name)
        check_etag(command.etag, known.etag, command.name)
        if known.state == pb.Device.STATE_RETIRED:
            return Decision(result=known)
        device = _copy(known)
        device.state = pb.Device.STATE_RETIRED
        return Decision((_save(device, "device.retired", ctx),), device)

    def _revoke_api_key(self, state: State, command: RevokeApiKey, ctx: Context) -> Decision:
        known = state.api_keys.get(command.name)
        if known is None:
            raise not_found(command.name)
        check_etag(command.etag, known.etag, command.name)
        if known.revoked:
            return Decision(result=known)
        key = _copy(known)
        key.revoked = True
        return Decision((_save(key, "api_key.revoked", ctx),), key)

    # What other services ask.

    def _provision(self, state: State, command: ProvisionDevice, ctx: Context) -> Decision:
        wanted = command.request
        name = f"{wanted.parent}/devices/{wanted.device_id}"
        product = state.products.get(wanted.parent)
        if product is None or product.archived:
            raise not_found(wanted.parent)
        known = state.devices.get(state.identifiers.get(f"{ctx.organization}/{wanted.device_id}", name))
        if known is not None:
            if known.name == name and known.certificate_fingerprint == wanted.certificate_fingerprint:
                return Decision(result=known)
            raise AlreadyExistsError(
                "DEVICE_IDENTIFIER_TAKEN",
                f"the identifier {wanted.device_id} belongs to a device with another certificate",
                identifier=wanted.device_id,
            )
        if wanted.development and not product.policy.allow_development_ca:
            raise FailedPreconditionError(
                "DEVELOPMENT_CA_NOT_ALLOWED",
                f"{wanted.parent} takes no devices of development CAs",
                product=wanted.parent,
            )
        self._check_quota(state, ctx.organization, "devices")
        device = pb.Device(
            name=name,
            cohort=wanted.cohort,
            tags=wanted.tags,
            target=wanted.target,
            description=wanted.description,
            provisioned_by=wanted.provisioned_by,
            certificate_fingerprint=wanted.certificate_fingerprint,
            create_time=_time(ctx.now_ms),
        )
        _complete_device(state, device, ctx)
        return Decision((_save(device, "device.created", ctx),), device)

    def _undo_provisioning(self, state: State, command: UndoProvisioning, ctx: Context) -> Decision:
        known = _device(state, command.request.name)
        if known.certificate_fingerprint != command.request.certificate_fingerprint:
            raise FailedPreconditionError(
                "WRONG_STATE", f"{known.name} was provisioned for another certificate", resource=known.name
            )
        return self._retire_device(state, RetireDevice(known.name, "", "admission refused"), ctx)

    def _enrol_gateway(self, state: State, command: EnrolGateway, ctx: Context) -> Decision:
        known = state.gateways.get(command.name)
        if known is not None and known.public_key == command.public_key:
            return Decision(result=known)
        if known is not None:
            raise AlreadyExistsError(
                "GATEWAY_EXISTS", f"{command.name} is registered with another key", resource=command.name
            )
        gateway = pb.Gateway(
            name=command.name,
            public_key=command.public_key,
            key_id=command.key_id,
            create_time=_time(ctx.now_ms),
        )
        return Decision((_save(gateway, "gateway.created", ctx),), gateway)

    def _foreign(self, state: State, record: Foreign, ctx: Context) -> Decision:
        """A changed running state, as the rollout leader folded it."""
        if not isinstance(record.payload, rollout_events.DeviceReported):
            return Decision()
        known = state.devices.get(record.payload.device)
        if known is None or known.reported == record.payload.running:
            return Decision()
        device = _copy(known)
        device.reported.CopyFrom(record.payload.running)
        # Published under no webhook type of its own: rollout already published `device.release_changed`.
        return Decision((_save(device, "", ctx),))


def _put(state: State, resource_type: type[Message], kind: _Kind, resource: Message) -> State:
    name: str = resource.name  # type: ignore[attr-defined]
    held: immutables.Map[str, Message] = getattr(state, kind.attribute)
    changes: dict[str, object] = {kind.attribute: held.set(name, resource)}
    if name not in held:
        key = f"{organization_of(name)}/{kind.collection}"
        changes["counts"] = state.counts.set(key, state.counts.get(key, 0) + 1)
    if resource_type is pb.Device:
        key = f"{organization_of(name)}/{last_segment(name)}"
        changes["identifiers"] = state.identifiers.set(key, name)
    return replace(state, **changes)  # type: ignore[arg-type]


def _need(parent: str, state: State) -> None:
    held: Mapping[str, object] = state.products if product_of(parent) else state.organizations
    if parent not in held:
        raise not_found(parent)


def _refuse_existing(name: str, held: Mapping[str, object]) -> None:
    if name in held:
        raise AlreadyExistsError("ALREADY_EXISTS", f"{name} exists already", resource=name)


def _device(state: State, name: str) -> pb.Device:
    known = state.devices.get(name)
    if known is None:
        raise not_found(name)
    return known


def _complete_device(state: State, device: pb.Device, ctx: Context) -> None:
    identifier = last_segment(device.name)
    taken = state.identifiers.get(f"{ctx.organization}/{identifier}")
    if taken is not None:
        raise AlreadyExistsError(
            "DEVICE_IDENTIFIER_TAKEN", f"the identifier {identifier} belongs to {taken}", identifier=identifier
        )
    device.uid = ctx.new_uuid("device")
    device.identifier = identifier
    device.cohort = _cohort_of_product(state, device.cohort, device.name)
    device.tags[:] = _tags(device.tags)
    device.state = pb.Device.STATE_ACTIVE
    device.ClearField("reported")


def _cohort_of_product(state: State, cohort: str, device: str) -> str:
    if not cohort:
        return ""
    if product_of(cohort) != product_of(device):
        raise InvalidArgumentError(
            "COHORT_OF_OTHER_PRODUCT",
            f"{cohort} is not a cohort of the device's product",
            field="cohort",
            cohort=cohort,
        )
    if cohort not in state.cohorts:
        raise not_found(cohort)
    return cohort


def _tags(tags: Sequence[str]) -> list[str]:
    distinct = sorted(set(tags))
    if len(distinct) > _MAX_TAGS or any(not tag or len(tag) > 128 for tag in distinct):
        raise InvalidArgumentError("INVALID_FIELD", f"at most {_MAX_TAGS} tags of 1–128 characters", field="tags")
    return distinct


def _check_paths(paths: Sequence[str], known: frozenset[str]) -> None:
    wrong = [path for path in paths if path not in known]
    if wrong or not paths:
        allowed = ", ".join(sorted(known))
        raise InvalidArgumentError(
            "INVALID_FIELD", f"update_mask may name {allowed}; not {', '.join(wrong) or 'nothing'}", field="update_mask"
        )


def _check_policy(policy: pb.ConfigurationPolicy) -> None:
    interval = policy.poll_interval.ToMilliseconds()
    if interval < 0 or policy.poll_jitter.ToMilliseconds() < 0 or 0 < interval < 100:
        raise InvalidArgumentError(
            "INVALID_FIELD", "poll_interval is at least 0.1 s, poll_jitter not negative", field="policy.poll_interval"
        )


def _check_role(giver: str, given: str, path: str) -> None:
    if given not in ("owner", "admin", "operator", "viewer"):
        raise InvalidArgumentError("INVALID_FIELD", f"there is no role '{given}'", field=path, role=given)
    if not may_grant(giver, given):
        raise PermissionDeniedError(
            "ROLE_ABOVE_OWN", f"a {giver} cannot give the role {given}", role=given, own_role=giver
        )


def _complete_key(state: State, key: pb.ApiKey, command: Create) -> None:
    key.member = key.member or command.giver_member
    member = state.members.get(key.member)
    if member is None or organization_of(key.member) != organization_of(key.name):
        raise not_found(key.member)
    _check_role(command.giver_role, member.role, "api_key.member")
    if len(key.secret_sha256) != 32:
        raise InvalidArgumentError("INVALID_FIELD", "secret_sha256 holds 32 bytes", field="api_key.secret_sha256")
    if not key.scopes:
        raise InvalidArgumentError("INVALID_FIELD", "a key needs at least one scope", field="api_key.scopes")
    if command.giver_scopes and "*" not in command.giver_scopes and not set(key.scopes) <= set(command.giver_scopes):
        raise PermissionDeniedError(
            "SCOPE_ABOVE_OWN", "a key cannot give scopes that it does not have", scopes=" ".join(key.scopes)
        )
    if not is_within(key.resource_prefix or command.giver_prefix, command.giver_prefix):
        raise PermissionDeniedError(
            "PREFIX_ABOVE_OWN", "a key cannot reach beyond its giver's prefix", prefix=key.resource_prefix
        )
    key.resource_prefix = key.resource_prefix or command.giver_prefix
    if key.resource_prefix and not is_within(key.resource_prefix, parent_of(key.name)):
        raise InvalidArgumentError(
            "INVALID_FIELD", "resource_prefix lies in the key's organization", field="api_key.resource_prefix"
        )
    key.revoked = False


def _check_gateway(state: State, gateway: pb.Gateway) -> None:
    if len(gateway.public_key) != 32:
        raise InvalidArgumentError("INVALID_FIELD", "public_key holds 32 bytes", field="gateway.public_key")
    for known in state.gateways.values():
        if known.public_key == gateway.public_key:
            raise AlreadyExistsError("GATEWAY_KEY_TAKEN", "another gateway has this key")
    gateway.key_id = hashlib.sha256(gateway.public_key).hexdigest()
