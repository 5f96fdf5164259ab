"""CA certificates and device certificates."""

from __future__ import annotations

import json
import ssl
import sys
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.pki.v1 import pki_pb2

from clients.cli.context import session

ca = typer.Typer(help="CA certificates and their proof of possession.", no_args_is_help=True)
certificate = typer.Typer(help="Device certificates.", no_args_is_help=True)
issuing_ca = typer.Typer(help="The organization's own CA for operational certificates.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the groups."""
    app.add_typer(ca, name="ca")
    app.add_typer(certificate, name="certificate")
    app.add_typer(issuing_ca, name="issuing-ca")


@ca.command("code")
def ca_code(context: typer.Context, code_id: str) -> None:
    """Get a verification code: make a certificate with it as common name, signed by your CA.

    Example: `swell ca code factory`
    """
    state = session(context)
    request = pki_pb2.CreateVerificationCodeRequest(parent=state.organization_name(), verification_code_id=code_id)
    state.output.one(state.client.pki.CreateVerificationCode(request))


@ca.command("register")
def ca_register(
    context: typer.Context,
    ca_id: str,
    certificate: Annotated[Path, typer.Option(help="PEM of the CA certificate.", exists=True)],
    proof: Annotated[Path, typer.Option(help="PEM of the verification certificate.", exists=True)],
    development: Annotated[bool, typer.Option(help="A CA for development devices.")] = False,
    jitp: Annotated[bool, typer.Option(help="Create devices at their first contact.")] = False,
    cohort: Annotated[str, typer.Option(help="Cohort when no rule matches.")] = "",
    rule: Annotated[list[str] | None, typer.Option(help="`PATTERN=COHORT` over the common name, repeatable.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag of every device, repeatable.")] = None,
    target: Annotated[str, typer.Option(help="Hardware target of every device.")] = "",
    quota: Annotated[int, typer.Option(help="Devices in all; 0 means the default.")] = 0,
) -> None:
    """Register a CA with its proof of possession.

    Example: `swell ca register factory --certificate ca.pem --proof proof.pem --jitp --rule 'canary-*=canary'
    --cohort production`
    """
    state = session(context)
    rules = []
    for text in rule or []:
        pattern, separator, target_cohort = text.rpartition("=")
        if not separator:
            raise typer.BadParameter(f"'{text}' is not PATTERN=COHORT")
        name = state.name_in_product("cohorts", target_cohort)
        rules.append(pki_pb2.CohortRule(common_name_pattern=pattern, cohort=name))
    settings = pki_pb2.JitpSettings(
        enabled=jitp,
        cohort=state.name_in_product("cohorts", cohort) if cohort else "",
        cohort_rules=rules,
        tags=tag or [],
        target=target,
        quota=quota,
    )
    kind = pki_pb2.CaCertificate.Environment
    environment = kind.ENVIRONMENT_DEVELOPMENT if development else kind.ENVIRONMENT_PRODUCTION
    request = pki_pb2.RegisterCaCertificateRequest(
        parent=state.product_name(),
        ca_certificate_id=ca_id,
        certificate_pem=certificate.read_text(),
        verification_certificate_pem=proof.read_text(),
        ca_certificate=pki_pb2.CaCertificate(environment=environment, jitp=settings),
    )
    state.output.one(state.client.pki.RegisterCaCertificate(request))


@ca.command("suspend")
def ca_suspend(
    context: typer.Context, name: str, reason: Annotated[str, typer.Option(help="Why, for the audit.")] = ""
) -> None:
    """Refuse new devices and connections of a CA until it is resumed.

    Example: `swell ca suspend factory --reason 'key under investigation'`
    """
    state = session(context)
    full = state.name_in_product("caCertificates", name)
    request = pki_pb2.SuspendCaCertificateRequest(name=full, reason=reason)
    state.output.one(state.client.pki.SuspendCaCertificate(request))


@ca.command("resume")
def ca_resume(context: typer.Context, name: str) -> None:
    """End a suspension.

    Example: `swell ca resume factory`
    """
    state = session(context)
    full = state.name_in_product("caCertificates", name)
    state.output.one(state.client.pki.ResumeCaCertificate(pki_pb2.ResumeCaCertificateRequest(name=full)))


@ca.command("activate", hidden=True)
def ca_activate(context: typer.Context, name: str) -> None:
    """The former name of `resume`."""
    ca_resume(context, name)


@ca.command("revoke")
def ca_revoke(
    context: typer.Context, name: str, reason: Annotated[str, typer.Option(help="Why, for the audit.")] = ""
) -> None:
    """Deny a CA for good, and with it every device certificate that it signed.

    Example: `swell ca revoke factory --reason 'key stolen'`
    """
    state = session(context)
    full = state.name_in_product("caCertificates", name)
    request = pki_pb2.RevokeCaCertificateRequest(name=full, reason=reason)
    state.output.one(state.client.pki.RevokeCaCertificate(request))


@ca.command("get")
def ca_get(context: typer.Context, name: str) -> None:
    """One CA certificate.

    Example: `swell ca get factory`
    """
    state = session(context)
    full = state.name_in_product("caCertificates", name)
    state.output.one(state.client.pki.GetCaCertificate(pki_pb2.GetCaCertificateRequest(name=full)))


@ca.command("list")
def ca_list(
    context: typer.Context, where: Annotated[str, typer.Option("--filter", help='E.g. `state = "STATE_ACTIVE"`.')] = ""
) -> None:
    """The CA certificates of the product.

    Example: `swell ca list --filter 'expired = true'`
    """
    state = session(context)
    request = pki_pb2.ListCaCertificatesRequest(parent=state.product_name(), filter=where)
    found = state.client.pages(state.client.pki.ListCaCertificates, request, "ca_certificates")
    state.output.many(found, ("name", "state", "environment", "admitted_count", "not_after", "expired"))


@ca.command("jitp")
def ca_jitp(
    context: typer.Context,
    name: str,
    enabled: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Whether unknown devices are created.")
    ] = None,
    quota: Annotated[int | None, typer.Option(help="Devices in all; 0 means the default.")] = None,
    rate: Annotated[int | None, typer.Option(help="Devices a minute; 0 means the default.")] = None,
    cohort: Annotated[str | None, typer.Option(help="Cohort when no rule matches.")] = None,
) -> None:
    """Change how a CA creates devices at their first contact.

    Example: `swell ca jitp factory --disable`
    """
    state = session(context)
    settings = pki_pb2.JitpSettings(enabled=bool(enabled), quota=quota or 0, rate_per_minute=rate or 0)
    if cohort:
        settings.cohort = state.name_in_product("cohorts", cohort)
    given = {"enabled": enabled, "quota": quota, "rate_per_minute": rate, "cohort": cohort}
    paths = [f"jitp.{field}" for field, value in given.items() if value is not None]
    if not paths:
        raise typer.BadParameter("say what to change, e.g. --disable")
    full = state.name_in_product("caCertificates", name)
    request = pki_pb2.UpdateCaCertificateRequest(
        ca_certificate=pki_pb2.CaCertificate(name=full, jitp=settings), update_mask=FieldMask(paths=paths)
    )
    state.output.one(state.client.pki.UpdateCaCertificate(request))


_LEAF_COLUMNS = ("device", "state", "not_after", "expiring", "ca_certificate", "issuing_ca", "fingerprint")


def _list_certificates(context: typer.Context, clauses: list[str]) -> None:
    state = session(context)
    request = pki_pb2.ListDeviceCertificatesRequest(parent=state.organization_name(), filter=" AND ".join(clauses))
    found = state.client.pages(state.client.pki.ListDeviceCertificates, request, "device_certificates")
    state.output.many(found, _LEAF_COLUMNS)


@certificate.command("list")
def certificate_list(
    context: typer.Context,
    device: Annotated[str, typer.Option(help="Of this device: its key history.")] = "",
    ca: Annotated[str, typer.Option(help="Signed by this CA.")] = "",
    in_state: Annotated[str, typer.Option("--state", help="E.g. ACTIVE, NEXT, RETIRED, REVOKED.")] = "",
    where: Annotated[str, typer.Option("--filter", help="More of the filter, by the fields of a certificate.")] = "",
) -> None:
    """Device certificates of the organization.

    Example: `swell certificate list --device SN-0042`
    """
    state = session(context)
    clauses = [where] if where else []
    if device:
        clauses.append(f'device = "{state.name_in_product("devices", device)}"')
    if ca:
        clauses.append(f'ca_certificate = "{state.name_in_product("caCertificates", ca)}"')
    if in_state:
        clauses.append(f"state = STATE_{in_state.upper().removeprefix('STATE_')}")
    _list_certificates(context, clauses)


@certificate.command("expiring")
def certificate_expiring(context: typer.Context) -> None:
    """Certificates in force with less life left than their product's policy wants.

    Example: `swell --output json certificate expiring`
    """
    _list_certificates(context, ["expiring = true", "state = STATE_ACTIVE"])


@certificate.command("get")
def certificate_get(context: typer.Context, name: str) -> None:
    """One device certificate, by its SHA-256 fingerprint.

    Example: `swell certificate get 5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9`
    """
    state = session(context)
    full = state.name_in_organization("deviceCertificates", name)
    state.output.one(state.client.pki.GetDeviceCertificate(pki_pb2.GetDeviceCertificateRequest(name=full)))


@issuing_ca.command("create")
def issuing_ca_create(
    context: typer.Context,
    issuing_ca_id: str,
    days: Annotated[int, typer.Option(help="Its life; 0 means 3650.")] = 0,
) -> None:
    """Make the CA that signs the organization's operational certificates. Its key never leaves the key store.

    Example: `swell issuing-ca create 2026`
    """
    state = session(context)
    request = pki_pb2.CreateIssuingCaRequest(
        parent=state.organization_name(), issuing_ca_id=issuing_ca_id, validity_days=days
    )
    state.output.one(state.client.pki.CreateIssuingCa(request))


@issuing_ca.command("get")
def issuing_ca_get(context: typer.Context, name: str) -> None:
    """One issuing CA.

    Example: `swell issuing-ca get 2026`
    """
    state = session(context)
    full = state.name_in_organization("issuingCas", name)
    state.output.one(state.client.pki.GetIssuingCa(pki_pb2.GetIssuingCaRequest(name=full)))


@issuing_ca.command("list")
def issuing_ca_list(context: typer.Context) -> None:
    """The issuing CAs of the organization.

    Example: `swell issuing-ca list`
    """
    state = session(context)
    request = pki_pb2.ListIssuingCasRequest(parent=state.organization_name())
    found = state.client.pages(state.client.pki.ListIssuingCas, request, "issuing_cas")
    state.output.many(found, ("name", "state", "not_after", "replaced_by"))


@issuing_ca.command("rotate")
def issuing_ca_rotate(
    context: typer.Context,
    name: str,
    successor: Annotated[str, typer.Option(help="Id of the new one.")],
    days: Annotated[int, typer.Option(help="Life of the new one; 0 means 3650.")] = 0,
) -> None:
    """Let a new issuing CA sign from now on. What the old one signed stays accepted.

    Example: `swell issuing-ca rotate 2026 --successor 2027`
    """
    state = session(context)
    full = state.name_in_organization("issuingCas", name)
    request = pki_pb2.RotateIssuingCaRequest(name=full, successor_id=successor, validity_days=days)
    state.output.one(state.client.pki.RotateIssuingCa(request))


@issuing_ca.command("download")
def issuing_ca_download(
    context: typer.Context,
    name: str,
    out: Annotated[Path | None, typer.Option(help="File to write; standard output when it is not given.")] = None,
) -> None:
    """The certificate of an issuing CA as PEM.

    Example: `swell issuing-ca download 2026 --out issuing-2026.pem`
    """
    state = session(context)
    full = state.name_in_organization("issuingCas", name)
    found = state.client.pki.GetIssuingCa(pki_pb2.GetIssuingCaRequest(name=full))
    pem = ssl.DER_cert_to_PEM_cert(found.der)
    if out is None:
        sys.stdout.write(pem)
        return
    out.write_text(pem)
    state.output.text(f"wrote {out}", file=str(out), name=full)


@certificate.command("revoke")
def certificate_revoke(
    context: typer.Context, name: str, reason: Annotated[str, typer.Option(help="Why, for the audit.")] = ""
) -> None:
    """Revoke a device certificate (by its SHA-256 fingerprint) for good.

    Example: `swell certificate revoke 3f5a…c1 --reason "board lost"`
    """
    state = session(context)
    full = state.name_in_organization("deviceCertificates", name)
    answer = state.client.pki.RevokeDeviceCertificate(pki_pb2.RevokeDeviceCertificateRequest(name=full, reason=reason))
    state.output.text(
        f"{full} is revoked; every gateway refuses it by {answer.effective_by.ToJsonString()}",
        **json.loads(json.dumps({"name": full, "effective_by": answer.effective_by.ToJsonString()})),
    )
