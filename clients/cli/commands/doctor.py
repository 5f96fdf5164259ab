"""`swell doctor`: looks at a set-up from the outside, part by part, and says what is wrong and what to do about it.

A finding is `ok`, `warn` (works, but soon will not, or not as wanted) or `fail`. Later checks are left out when what
they need has failed already, so that one cause is named once. The exit status is 1 when anything failed.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import grpc
import typer
from cryptography import x509
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.audit.v1 import audit_pb2
from groundswell.pki.v1 import pki_pb2
from groundswell.registry.v1 import registry_pb2
from groundswell.rollout.v1 import rollout_pb2
from groundswell.webhooks.v1 import webhooks_pb2
from grpc_health.v1 import health_pb2

from clients.cli.context import Session, session
from clients.sdk import ApiError, Client, Profile, ProfileError

SOON: Final = timedelta(days=30)
TIMEOUT_S: Final = 5.0
OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check saw."""

    level: str
    check: str
    seen: str
    next_step: str = ""


Findings = Iterator[Finding]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(context: typer.Context) -> None:
    """Find what is wrong with a set-up, from the profile to the last rollout.

    Examples: `swell doctor`, `swell -O acme doctor`, `swell --output json -O acme doctor`.
    """
    state = session(context)
    findings = list(examine(state))
    state.output.rows(
        [
            {"": found.level, "check": found.check, "seen": found.seen, "next step": found.next_step}
            for found in findings
        ]
    )
    if any(found.level == FAIL for found in findings):
        raise typer.Exit(1)


def examine(state: Session) -> Findings:
    """All checks, in the order in which one rests on another."""
    try:
        profile = state.profile
    except ProfileError as error:
        yield Finding(FAIL, "profile", str(error))
        return
    yield from profile_findings(profile)
    try:
        ca = x509.load_pem_x509_certificate(profile.ca.read_bytes())
    except (OSError, ValueError) as error:
        yield Finding(
            FAIL, "CA of the servers", f"{profile.ca}: {error}", "run `make up` again, or correct the profile"
        )
        return
    yield _validity("CA of the servers", ca, "make new certificates, see docs/operations.md")
    services = list(service_findings(profile))
    yield from services
    if profile.gateway:
        yield gateway_finding(profile, state)
    if any(found.level == FAIL for found in services):
        return
    try:
        client = state.client
        key = list(key_findings(client, profile))
    except ProfileError as error:
        key = [Finding(FAIL, "API key", str(error))]
    yield from key
    if not any(found.level == FAIL for found in key) and not state.organization_name().endswith("/platform"):
        yield from organization_findings(client, state.organization_name())


def profile_findings(profile: Profile) -> Findings:
    """The file itself: it holds keys."""
    mode = profile.path.stat().st_mode & 0o777
    if mode & 0o077:
        yield Finding(
            WARN, "profile", f"{profile.path} can be read by others (mode {mode:o})", f"chmod 600 {profile.path}"
        )
    else:
        yield Finding(OK, "profile", f"{profile.path}, {len(profile.keys)} keys")


def service_findings(profile: Profile) -> Findings:
    """Every public port: reachable, speaking TLS with a certificate of the CA, and serving."""
    credentials = grpc.ssl_channel_credentials(profile.ca.read_bytes())
    for name, target in profile.endpoints.items():
        problem = _connect(target)
        if problem:
            yield Finding(FAIL, name, f"{target}: {problem}", "is it running? `make status`; else correct the profile")
            continue
        with grpc.secure_channel(target, credentials) as channel:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            try:
                status = check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status
            except grpc.RpcError as error:
                yield Finding(
                    FAIL,
                    name,
                    f"{target}: {error.details()}",
                    "does the CA in the profile belong to this installation?",
                )
                continue
        if status == health_pb2.HealthCheckResponse.SERVING:
            yield Finding(OK, name, f"{target} is serving")
        else:
            yield Finding(
                FAIL, name, f"{target} is not serving", f"its log says why: `make logs L={name}`; Kafka may be away"
            )


def gateway_finding(profile: Profile, state: Session) -> Finding:
    """The device port: a certificate for the organization's name. It closes on us, who have no device certificate."""
    organization = state.organization_name().removeprefix("organizations/")
    name = f"{organization}.{profile.gateway_domain}"
    problem = _connect(profile.gateway)
    if problem:
        return Finding(FAIL, "gateway", f"{profile.gateway}: {problem}", "is it running? `make status`")
    context = ssl.create_default_context(cafile=str(profile.ca))
    host, _, port = profile.gateway.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), TIMEOUT_S) as plain:
            plain.settimeout(TIMEOUT_S)
            with context.wrap_socket(plain, server_hostname=name) as secure:
                der = secure.getpeercert(binary_form=True) or b""
    except ssl.SSLCertVerificationError as error:
        return Finding(
            FAIL, "gateway", f"{name}: {error.verify_message}", "its certificate must cover *.<gateway domain>"
        )
    except ssl.SSLError as error:
        if "UNRECOGNIZED_NAME" in str(error).upper().replace(" ", "_"):
            return Finding(
                WARN,
                "gateway",
                f"it knows no CA of {organization} yet",
                "register one: `swell ca code`, `swell ca register`",
            )
        return Finding(FAIL, "gateway", f"{name}: {error}", "see `make logs L=gateway`")
    except OSError as error:
        return Finding(FAIL, "gateway", f"{name}: {error}", "see `make logs L=gateway`")
    return _validity("gateway", x509.load_der_x509_certificate(der), "renew it: docs/operations.md")


def key_findings(client: Client, profile: Profile) -> Findings:
    """The key in use: known, and able to read something at every service."""
    organization = profile.api_key.split("_", 3)[1]
    if organization == "platform":
        client.registry.ListOrganizations(registry_pb2.ListOrganizationsRequest(page_size=1))
        yield Finding(OK, "API key", "platform key: it makes organizations, and sees nothing of theirs")
        return
    for name, stub in client.audit.items():
        try:
            stub.ListAuditRecords(
                audit_pb2.ListAuditRecordsRequest(parent=f"organizations/{organization}", page_size=1)
            )
        except ApiError as error:
            if error.code != "PERMISSION_DENIED":
                yield Finding(FAIL, "API key", f"{name}: {error}", "check the key: `swell auth list`")
                return
    yield Finding(OK, "API key", f"{profile.current} is taken by every service")


def organization_findings(client: Client, organization: str) -> Findings:
    """What keeps an organization's devices from being updated, as far as the key may see it."""
    products = list(
        client.pages(client.registry.ListProducts, registry_pb2.ListProductsRequest(parent=organization), "products")
    )
    if not products:
        yield Finding(WARN, organization, "it has no product", "swell product create NAME")
    for product in products:
        if not product.archived:
            yield from _seen(product.name, lambda name=product.name: product_findings(client, name))  # type: ignore[misc]
    yield from _seen("webhooks", lambda: webhook_findings(client, organization))


def _seen(check: str, look: Callable[[], Findings]) -> Findings:
    """A part that the key may not see is said to be so, and does not end the others."""
    try:
        yield from list(look())
    except ApiError as error:
        if error.code != "PERMISSION_DENIED":
            raise
        yield Finding(WARN, check, str(error), "use a key with more scopes to look there too")


def product_findings(client: Client, product: str) -> Findings:
    """One product: devices can enrol, something can be signed, nothing hangs."""
    now = datetime.now(UTC)
    cohorts = client.registry.ListCohorts(registry_pb2.ListCohortsRequest(parent=product, page_size=1)).cohorts
    if not cohorts:
        yield Finding(WARN, product, "no cohort: its devices can get releases only in one", "swell cohort create NAME")
    authorities = list(
        client.pages(
            client.pki.ListCaCertificates, pki_pb2.ListCaCertificatesRequest(parent=product), "ca_certificates"
        )
    )
    active = [ca for ca in authorities if ca.state == pki_pb2.CaCertificate.STATE_ACTIVE]
    if not active:
        yield Finding(WARN, product, "no active CA: no device can enrol by itself", "swell ca code, swell ca register")
    for ca in active:
        yield from _authority(ca, now)
    keys = client.artifacts.ListSigningKeys(artifacts_pb2.ListSigningKeysRequest(parent=product)).signing_keys
    if not any(not key.revoked for key in keys):
        yield Finding(WARN, product, "no signing key: nothing can be offered", "swell signing-key register NAME FILE")
    held = client.registry.ListDevices(
        registry_pb2.ListDevicesRequest(parent=product, filter="quarantined = true", page_size=1000)
    ).devices
    if held:
        yield Finding(WARN, product, f"{len(held)} devices are quarantined: they get nothing", "swell device list")
    yield from rollout_findings(client, product)


def _authority(ca: pki_pb2.CaCertificate, now: datetime) -> Findings:
    end = ca.not_after.ToDatetime(UTC)
    if end < now + SOON:
        level, word = (FAIL, "expired") if end <= now else (WARN, "expires")
        yield Finding(level, ca.name, f"{word} on {end:%Y-%m-%d %H:%M}", "register its successor: `swell ca register`")
    elif not ca.jitp.enabled:
        yield Finding(WARN, ca.name, "just-in-time provisioning is off", "switch it on, if devices should enrol")


def rollout_findings(client: Client, product: str) -> Findings:
    """Rollouts that wait for somebody."""
    waiting = {"PAUSED": "swell rollout resume NAME", "STALLED": "swell rollout advance NAME --reason …"}
    for found in client.pages(client.rollout.ListRollouts, rollout_pb2.ListRolloutsRequest(parent=product), "rollouts"):
        state = rollout_pb2.Rollout.State.Name(found.state).removeprefix("STATE_")
        stages = {
            rollout_pb2.StageStatus.State.Name(status.state).removeprefix("STATE_") for status in found.stage_statuses
        }
        for word in {state, *stages} & waiting.keys():
            if state not in ("COMPLETED", "ABORTED", "ROLLED_BACK", "KILLED"):
                yield Finding(WARN, found.name, f"{word.lower()}: it goes on when somebody says so", waiting[word])


def webhook_findings(client: Client, organization: str) -> Findings:
    """Endpoints that get nothing."""
    request = webhooks_pb2.ListWebhookEndpointsRequest(parent=organization)
    for found in client.pages(client.webhooks.ListWebhookEndpoints, request, "webhook_endpoints"):
        state = webhooks_pb2.WebhookEndpoint.State.Name(found.state).removeprefix("STATE_")
        if state != "ACTIVE":
            yield Finding(WARN, found.name, f"it is {state.lower()} and gets nothing", "swell webhook --help")


def _connect(target: str) -> str:
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host, int(port)), TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _validity(check: str, certificate: x509.Certificate, next_step: str) -> Finding:
    now = datetime.now(UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begin:
        return Finding(FAIL, check, f"valid only from {begin:%Y-%m-%d %H:%M}", "is the clock of this machine right?")
    if now >= end:
        return Finding(FAIL, check, f"expired on {end:%Y-%m-%d %H:%M}", next_step)
    if now >= end - SOON:
        return Finding(WARN, check, f"expires on {end:%Y-%m-%d %H:%M}", next_step)
    return Finding(OK, check, f"valid until {end:%Y-%m-%d}")
