"""CA certificates and device certificates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.pki.v1 import pki_pb2

from clients.cli.context import session

ca = typer.Typer(help="CA certificates and their proof of possession.", no_args_is_help=True)
certificate = typer.Typer(help="Device certificates.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the groups."""
    app.add_typer(ca, name="ca")
    app.add_typer(certificate, name="certificate")


@ca.command("code")
def ca_code(context: typer.Context, code_id: str) -> None:
    """Get a verification code: make a certificate with it as common name, signed by your CA."""
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


def _set_state(context: typer.Context, name: str, wanted: pki_pb2.CaCertificate.State.ValueType) -> None:
    state = session(context)
    full = state.name_in_product("caCertificates", name)
    request = pki_pb2.UpdateCaCertificateRequest(
        ca_certificate=pki_pb2.CaCertificate(name=full, state=wanted), update_mask=FieldMask(paths=["state"])
    )
    state.output.one(state.client.pki.UpdateCaCertificate(request))


@ca.command("suspend")
def ca_suspend(context: typer.Context, name: str) -> None:
    """Refuse new devices and handshakes of a CA."""
    _set_state(context, name, pki_pb2.CaCertificate.STATE_SUSPENDED)


@ca.command("activate")
def ca_activate(context: typer.Context, name: str) -> None:
    """End a suspension."""
    _set_state(context, name, pki_pb2.CaCertificate.STATE_ACTIVE)


@certificate.command("revoke")
def certificate_revoke(
    context: typer.Context, name: str, reason: Annotated[str, typer.Option(help="Why, for the audit.")] = ""
) -> None:
    """Revoke a device certificate (by its SHA-256 fingerprint) for good."""
    state = session(context)
    full = state.name_in_organization("deviceCertificates", name)
    answer = state.client.pki.RevokeDeviceCertificate(pki_pb2.RevokeDeviceCertificateRequest(name=full, reason=reason))
    state.output.text(
        f"{full} is revoked; every gateway refuses it by {answer.effective_by.ToJsonString()}",
        **json.loads(json.dumps({"name": full, "effective_by": answer.effective_by.ToJsonString()})),
    )
