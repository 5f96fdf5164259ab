"""``get``, ``list``, ``audit`` and ``doctor``: the same for every resource."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer
from google.protobuf.message import Message
from groundswell.artifacts.v1 import artifacts_pb2 as artifacts
from groundswell.audit.v1 import audit_pb2
from groundswell.pki.v1 import pki_pb2 as pki
from groundswell.registry.v1 import device_imports_pb2 as device_imports
from groundswell.registry.v1 import registry_pb2 as registry
from groundswell.releases.v1 import releases_pb2 as releases
from groundswell.rollout.v1 import rollout_pb2 as rollout
from groundswell.webhooks.v1 import webhooks_pb2 as webhooks

from clients.cli.context import Session, session


@dataclass(frozen=True, slots=True)
class Kind:
    """One collection: how to get and list it."""

    collection: str
    """Segment of resource names, also what ``swell list`` takes."""
    service: str
    singular: str
    """Suffix of the Get method, empty when there is none."""
    plural: str
    module: Any
    field: str
    parent: str
    """``organization``, ``product``, or ``given`` when --parent is needed; ``none`` for the top."""
    columns: tuple[str, ...]


KINDS: Final = (
    Kind(
        "organizations",
        "registry",
        "Organization",
        "Organizations",
        registry,
        "organizations",
        "none",
        ("name", "display_name"),
    ),
    Kind("products", "registry", "Product", "Products", registry, "products", "organization", ("name", "display_name")),
    Kind("cohorts", "registry", "Cohort", "Cohorts", registry, "cohorts", "product", ("name", "display_name")),
    Kind(
        "devices",
        "registry",
        "Device",
        "Devices",
        registry,
        "devices",
        "product",
        ("identifier", "cohort", "reported.version", "quarantined", "state"),
    ),
    Kind(
        "deviceImports",
        "registry",
        "DeviceImport",
        "DeviceImports",
        device_imports,
        "device_imports",
        "product",
        ("name", "state", "row_count", "problem_count", "created_count"),
    ),
    Kind("roles", "registry", "Role", "Roles", registry, "roles", "organization", ("name", "permissions")),
    Kind("members", "registry", "Member", "Members", registry, "members", "organization", ("name", "role")),
    Kind(
        "apiKeys",
        "registry",
        "ApiKey",
        "ApiKeys",
        registry,
        "api_keys",
        "organization",
        ("name", "member", "scopes", "revoked"),
    ),
    Kind(
        "gateways",
        "registry",
        "Gateway",
        "Gateways",
        registry,
        "gateways",
        "organization",
        ("name", "key_id", "disabled"),
    ),
    Kind(
        "caCertificates",
        "pki",
        "CaCertificate",
        "CaCertificates",
        pki,
        "ca_certificates",
        "product",
        ("name", "subject", "state", "admitted_count", "not_after"),
    ),
    Kind(
        "deviceCertificates",
        "pki",
        "DeviceCertificate",
        "DeviceCertificates",
        pki,
        "device_certificates",
        "organization",
        ("fingerprint", "common_name", "state", "not_after"),
    ),
    Kind(
        "issuingCas",
        "pki",
        "IssuingCa",
        "IssuingCas",
        pki,
        "issuing_cas",
        "organization",
        ("name", "state", "not_after", "replaced_by"),
    ),
    Kind(
        "signingKeys",
        "artifacts",
        "SigningKey",
        "SigningKeys",
        artifacts,
        "signing_keys",
        "product",
        ("name", "key_id", "revoked"),
    ),
    Kind(
        "artifacts", "artifacts", "Artifact", "Artifacts", artifacts, "artifacts", "product", ("name", "display_name")
    ),
    Kind(
        "versions",
        "artifacts",
        "ArtifactVersion",
        "ArtifactVersions",
        artifacts,
        "artifact_versions",
        "given",
        ("name", "version"),
    ),
    Kind(
        "binaries",
        "artifacts",
        "Binary",
        "Binaries",
        artifacts,
        "binaries",
        "given",
        ("name", "target", "size", "state"),
    ),
    Kind(
        "attachments",
        "artifacts",
        "Attachment",
        "Attachments",
        artifacts,
        "attachments",
        "given",
        ("name", "kind", "size", "state"),
    ),
    Kind(
        "bundles",
        "artifacts",
        "Bundle",
        "Bundles",
        artifacts,
        "bundles",
        "product",
        ("name", "version", "security_version", "offerable"),
    ),
    Kind(
        "releases",
        "releases",
        "Release",
        "Releases",
        releases,
        "releases",
        "given",
        ("name", "version", "disabled", "retracted", "rollout"),
    ),
    Kind(
        "bundleOverrides",
        "releases",
        "BundleOverride",
        "BundleOverrides",
        releases,
        "bundle_overrides",
        "product",
        ("name", "bundle"),
    ),
    Kind(
        "rollouts",
        "rollout",
        "Rollout",
        "Rollouts",
        rollout,
        "rollouts",
        "product",
        ("name", "version", "state", "state_reason"),
    ),
    Kind(
        "attempts",
        "rollout",
        "",
        "Attempts",
        rollout,
        "attempts",
        "given",
        ("device", "release", "kind", "state", "code"),
    ),
    Kind(
        "webhookEndpoints",
        "webhooks",
        "WebhookEndpoint",
        "WebhookEndpoints",
        webhooks,
        "webhook_endpoints",
        "organization",
        ("name", "url", "state", "delivered_count"),
    ),
    Kind(
        "deliveries",
        "webhooks",
        "Delivery",
        "Deliveries",
        webhooks,
        "deliveries",
        "given",
        ("event_type", "state", "attempt_count", "last_status", "last_error"),
    ),
    Kind(
        "replays",
        "webhooks",
        "Replay",
        "Replays",
        webhooks,
        "replays",
        "given",
        ("name", "state", "matched_count", "delivered_count", "failed_count"),
    ),
    Kind(
        "eventTypes",
        "webhooks",
        "EventType",
        "EventTypes",
        webhooks,
        "event_types",
        "organization",
        ("name", "description"),
    ),
)
BY_COLLECTION: Final = {kind.collection: kind for kind in KINDS}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("get")(get)
    app.command("list")(list_)
    app.command("audit")(audit)


def get(context: typer.Context, name: str) -> None:
    """Read any resource by its full name.

    Example: `swell get organizations/acme/products/thermostat/devices/SN-0042`
    """
    state = session(context)
    segments = name.split("/")
    kind = BY_COLLECTION.get(segments[-2]) if len(segments) % 2 == 0 and len(segments) > 1 else None
    if kind is None or not kind.singular:
        known = ", ".join(kind.collection for kind in KINDS if kind.singular)
        raise typer.BadParameter(f"'{name}' is not a full resource name; collections: {known}")
    request = getattr(kind.module, f"Get{kind.singular}Request")(name=name)
    state.output.one(getattr(getattr(state.client, kind.service), f"Get{kind.singular}")(request))


def list_(
    context: typer.Context,
    collection: Annotated[str, typer.Argument(help=f"One of: {', '.join(BY_COLLECTION)}.")],
    parent: Annotated[str, typer.Option(help="Full name of the parent; default: your organization or product.")] = "",
    filter_: Annotated[str, typer.Option("--filter", help='`field = "value"`, joined by AND.')] = "",
) -> None:
    """List any collection. Example: `swell -O acme -P thermostat list devices --filter 'cohort = "…/cohorts/beta"'`."""
    state = session(context)
    kind = BY_COLLECTION.get(collection)
    if kind is None:
        raise typer.BadParameter(f"no collection '{collection}'; known: {', '.join(BY_COLLECTION)}")
    request = getattr(kind.module, f"List{kind.plural}Request")()
    if kind.parent != "none":
        request.parent = parent or _default_parent(state, kind)
    if filter_:
        request.filter = filter_
    method = getattr(getattr(state.client, kind.service), f"List{kind.plural}")
    if "page_token" in request.DESCRIPTOR.fields_by_name:
        request.page_size = 500
        state.output.many(state.client.pages(method, request, kind.field), kind.columns)
    else:
        state.output.many(getattr(method(request), kind.field), kind.columns)


def _default_parent(state: Session, kind: Kind) -> str:
    if kind.parent == "organization":
        return state.organization_name()
    if kind.parent == "product":
        return state.product_name()
    raise typer.BadParameter(f"`list {kind.collection}` needs --parent with a full name")


def audit(
    context: typer.Context,
    service: Annotated[str, typer.Option(help="Only this service.")] = "",
) -> None:
    """Who did what in the organization, merged from all services in the order of time.

    Example: `swell -O acme audit --service rollout`
    """
    state = session(context)
    services = [service] if service else list(state.client.audit)
    records: list[Message] = []
    for name in services:
        request = audit_pb2.ListAuditRecordsRequest(parent=state.organization_name(), page_size=500)
        records.extend(state.client.pages(state.client.audit[name].ListAuditRecords, request, "audit_records"))
    records.sort(key=lambda record: (record.occur_time.ToNanoseconds(), record.event_id))  # type: ignore[attr-defined]
    state.output.many(records, ("occur_time", "principal", "event_type", "resource"))
