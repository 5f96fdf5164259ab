"""Decisions on device certificates: admission at first contact, its closing, revocation.

Invariants:

* A certificate's device is created once: admissions are known by fingerprint, and one common name has one certificate.
* Quota is taken by ``AdmissionOpened`` and given back by ``AdmissionRefused``, both in this log, so it never drifts.
* The closing decision looks at CA, quota and policy again: what was switched off in between is not let in, and the
  device that was created meanwhile is undone by a task.
* A refusal before ``AdmissionOpened`` writes nothing. One whose device existed is final; any other may be retried.
* An expired CA creates no new devices; certificates bound before stay bound.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from cryptography import x509
from groundswell.pki.v1 import events_pb2, pki_pb2

from libs.errors import DomainError, PermissionDeniedError, ResourceExhaustedError, check_etag
from libs.eventlog import Context, Decision, NewEvent, Public, Task
from libs.names import last_segment, organization_of, product_of
from services.pki import certificates, rotation
from services.pki.authorities import not_found
from services.pki.certificates import Problem
from services.pki.model import (
    PROVISION,
    UNDO,
    AdmitCertificate,
    Ca,
    CloseAdmission,
    Leaf,
    RevokeDeviceCertificate,
    State,
    interval_us,
    milliseconds,
    quota_of,
    timestamp,
)

_MINUTE_US = 60_000_000


def certificate_name(organization: str, leaf_der: bytes) -> str:
    """Resource name of a leaf."""
    return f"organizations/{organization}/deviceCertificates/{certificates.fingerprint_of(leaf_der)}"


def admit(state: State, command: AdmitCertificate, ctx: Context) -> Decision:
    """Open an admission, or answer with the one that is known."""
    name = certificate_name(command.organization, command.leaf_der)
    known = state.certificates.get(name)
    if known is not None:
        problem = known_problem(known)
        if problem is not None:
            raise problem
        if known.state == Leaf.STATE_NEXT:
            return rotation.confirm(state, known, ctx)
        if known.state != Leaf.STATE_REFUSED:
            return Decision(result=known)
    leaf = certificates.parse_der(command.leaf_der, "leaf_der")
    ca = _issuer(state, command.organization, leaf)
    product = product_of(ca.name)
    _refuse(
        certificates.leaf_problem(leaf, ctx.now_ms, organization=command.organization, product=last_segment(product)),
        ca,
    )
    _refuse(ca_policy_problem(ca, ctx.now_ms), ca)
    common_name = certificates.common_name(leaf)
    _check_holder(state, command.organization, common_name, name, ca)
    _check_capacity(state, ca, ctx.now_ms)
    image = pki_pb2.DeviceCertificate(
        name=name,
        device=f"{product}/devices/{common_name}",
        fingerprint=last_segment(name),
        serial=f"{leaf.serial_number:x}",
        common_name=common_name,
        ca_certificate=ca.name,
        state=Leaf.STATE_PENDING,
        spki_fingerprint=certificates.spki_fingerprint_of(leaf),
        create_time=timestamp(ctx.now_ms),
        etag=str(ctx.version(name) + 1),
    )
    image.not_before.FromDatetime(leaf.not_valid_before_utc)
    image.not_after.FromDatetime(leaf.not_valid_after_utc)
    cohort, tags = placement(ca.jitp, common_name)
    event = events_pb2.AdmissionOpened(
        device_certificate=image,
        cohort=cohort,
        tags=tags,
        target=ca.jitp.target,
        description=ca.jitp.description,
        development=ca.environment == Ca.ENVIRONMENT_DEVELOPMENT,
    )
    return Decision(
        events=(NewEvent(ctx.organization, name, event),),
        result=image,
        open_tasks=(Task(f"{PROVISION}/{name}", PROVISION, name.encode()),),
    )


def close(state: State, command: CloseAdmission, ctx: Context) -> Decision:
    """Bind the certificate to the device that the registry made, or refuse it."""
    known = state.certificates.get(command.certificate)
    done = (f"{PROVISION}/{command.certificate}",)
    if known is None or known.state != Leaf.STATE_PENDING:
        return Decision(close_tasks=done)
    image = _changed(known, ctx)
    image.device_uid = command.device_uid
    if command.reason:
        image.state, image.reason = Leaf.STATE_REFUSED, command.reason
        refused = events_pb2.AdmissionRefused(device_certificate=image, reason=command.reason)
        return Decision(events=(NewEvent(ctx.organization, image.name, refused),), close_tasks=done)
    problem = _closing_problem(state, known, ctx.now_ms)
    if problem is not None:
        image.state, image.reason = Leaf.STATE_REFUSED, problem.reason
        refused = events_pb2.AdmissionRefused(device_certificate=image, reason=problem.reason)
        public = (_public(image, "device_certificate.refused"),)
        return Decision(
            events=(NewEvent(ctx.organization, image.name, refused, public),),
            close_tasks=done,
            open_tasks=(Task(f"{UNDO}/{image.name}", UNDO, image.name.encode()),),
        )
    image.state = Leaf.STATE_ACTIVE
    bound = events_pb2.CertificateBound(device_certificate=image)
    public = (_public(image, "device_certificate.bound"),)
    return Decision(events=(NewEvent(ctx.organization, image.name, bound, public),), close_tasks=done)


def revoke(state: State, command: RevokeDeviceCertificate, ctx: Context) -> Decision:
    """Deny for good, also in the middle of an admission. A repeat changes nothing.

    What the certificate announced goes with it: whoever holds its key may have asked for the next one.
    """
    known = state.certificates.get(command.name)
    if known is None:
        raise not_found(command.name)
    if known.state == Leaf.STATE_REVOKED:
        return Decision(result=known)
    check_etag(command.etag, known.etag, known.name)
    announced = [
        other
        for name in state.history.get(known.device, ())
        if (other := state.certificates[name]).state == Leaf.STATE_NEXT and other.supersedes == known.name
    ]
    events = [_revoked(leaf, command.reason, ctx) for leaf in (*announced, known)]
    return Decision(events=tuple(events), result=events[-1].payload.device_certificate)  # type: ignore[attr-defined]


def _revoked(known: pki_pb2.DeviceCertificate, reason: str, ctx: Context) -> NewEvent:
    image = _changed(known, ctx)
    image.state, image.reason = Leaf.STATE_REVOKED, reason
    event = events_pb2.DeviceCertificateRevoked(device_certificate=image)
    return NewEvent(ctx.organization, image.name, event, (_public(image, "device_certificate.revoked"),))


def known_problem(known: pki_pb2.DeviceCertificate) -> DomainError | None:
    """Why a certificate that is known is refused for good, or None."""
    if known.state == Leaf.STATE_REVOKED:
        return PermissionDeniedError("CERTIFICATE_REVOKED", "this certificate was revoked", resource=known.name)
    if known.state == Leaf.STATE_RETIRED:
        return PermissionDeniedError(
            "CERTIFICATE_SUPERSEDED", "the device has confirmed a newer certificate", resource=known.name
        )
    if known.state == Leaf.STATE_LAPSED:
        return PermissionDeniedError(
            "CERTIFICATE_LAPSED", "this certificate was not used in time, or replaced by another", resource=known.name
        )
    if known.state == Leaf.STATE_REFUSED and known.device_uid:
        return refusal(known)
    return None


def refusal(known: pki_pb2.DeviceCertificate) -> DomainError:
    """The error of a refused admission."""
    return PermissionDeniedError(
        known.reason or "CERTIFICATE_REFUSED",
        f"the admission of {known.common_name} was refused: {known.reason}",
        resource=known.name,
    )


def ca_policy_problem(ca: pki_pb2.CaCertificate, now_ms: int) -> Problem | None:
    """Why a CA may not create devices now, or None."""
    if ca.state == Ca.STATE_REVOKED:
        return Problem("CA_REVOKED", f"{ca.name} was revoked")
    if ca.state != Ca.STATE_ACTIVE:
        return Problem("CA_SUSPENDED", f"{ca.name} is suspended")
    if now_ms > milliseconds(ca.not_after):
        return Problem("CA_EXPIRED", f"{ca.name} has expired: it creates no new devices")
    if not ca.jitp.enabled:
        return Problem("JITP_DISABLED", f"{ca.name} does not create devices at their first contact")
    return None


def placement(jitp: pki_pb2.JitpSettings, common_name: str) -> tuple[str, list[str]]:
    """Cohort and tags of a new device: the first rule that matches, else the default."""
    for rule in jitp.cohort_rules:
        if fnmatchcase(common_name, rule.common_name_pattern):
            return rule.cohort, sorted({*jitp.tags, *rule.tags})
    return jitp.cohort, sorted(set(jitp.tags))


def rate_after(due_us: int, now_ms: int, step_us: int) -> int:
    """When the next admission would be due, were they evenly spaced; a whole minute may come at once."""
    return max(due_us, now_ms * 1000) + step_us


def _issuer(state: State, organization: str, leaf: x509.Certificate) -> pki_pb2.CaCertificate:
    named = [
        ca
        for ca in state.cas.values()
        if organization_of(ca.name) == organization
        and ca.state in {Ca.STATE_ACTIVE, Ca.STATE_SUSPENDED, Ca.STATE_REVOKED}
        and certificates.names_as_issuer(leaf, certificates.parse_der(ca.der))
    ]
    for ca in named:
        if certificates.is_issued_by(leaf, certificates.parse_der(ca.der)):
            return ca
    if named:
        raise PermissionDeniedError(
            "CERTIFICATE_SIGNATURE", f"the certificate names {named[0].name} but its key did not sign it"
        )
    raise PermissionDeniedError("CA_UNKNOWN", "the certificate's CA is not registered in this organization")


def _check_holder(state: State, organization: str, common_name: str, name: str, ca: pki_pb2.CaCertificate) -> None:
    holder = state.holders.get((organization, common_name))
    if holder is None or holder == name:
        return
    other = state.certificates[holder]
    if other.ca_certificate != ca.name:
        raise PermissionDeniedError(
            "DEVICE_IDENTIFIER_TAKEN",
            f"another CA's certificate already identifies {common_name}",
            device=other.device,
        )
    raise PermissionDeniedError(
        "SECOND_CERTIFICATE",
        f"{common_name} already has a certificate; a second one is not allowed",
        device=other.device,
    )


def _check_capacity(state: State, ca: pki_pb2.CaCertificate, now_ms: int) -> None:
    quota = quota_of(ca)
    if state.admitted.get(ca.name, 0) >= quota:
        raise ResourceExhaustedError(
            "CA_QUOTA_EXCEEDED", f"{ca.name} has created its {quota} devices", resource=ca.name, quota=quota
        )
    due_us = rate_after(state.next_admission_us.get(ca.name, 0), now_ms, interval_us(ca))
    if due_us - now_ms * 1000 > _MINUTE_US:
        raise ResourceExhaustedError(
            "CA_RATE_EXCEEDED",
            f"{ca.name} creates devices too fast: try again later",
            resource=ca.name,
            retry_after_s=round((due_us - now_ms * 1000 - _MINUTE_US) / 1_000_000, 3),
        )


def _closing_problem(state: State, known: pki_pb2.DeviceCertificate, now_ms: int) -> Problem | None:
    ca = state.cas[known.ca_certificate]
    problem = ca_policy_problem(ca, now_ms)
    if problem is None and state.admitted.get(ca.name, 0) > quota_of(ca):
        problem = Problem("CA_QUOTA_EXCEEDED", f"the quota of {ca.name} was lowered")
    if problem is None and now_ms > milliseconds(known.not_after):
        problem = Problem("CERTIFICATE_EXPIRED", "the certificate expired during its admission")
    return problem


def _refuse(problem: Problem | None, ca: pki_pb2.CaCertificate) -> None:
    if problem is not None:
        raise PermissionDeniedError(problem.reason, problem.message, ca_certificate=ca.name)


def _changed(known: pki_pb2.DeviceCertificate, ctx: Context) -> pki_pb2.DeviceCertificate:
    image = pki_pb2.DeviceCertificate()
    image.CopyFrom(known)
    image.etag = str(ctx.version(known.name) + 1)
    return image


def _public(image: pki_pb2.DeviceCertificate, change: str) -> Public:
    return Public(image.name, events_pb2.DeviceCertificateChanged(device_certificate=image, change=change))
