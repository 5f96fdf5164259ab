"""Decisions on issuing CAs and on the certificates that they sign: issue, confirm, replace.

Invariants:

* An organization has at most one issuing CA that signs; a replaced one signs nothing new and stays an anchor.
* A certificate is issued only to a device that showed a certificate in force, for its own name, with a key that it
  never used before. The same request is answered with the same certificate.
* A device has at most one announced certificate (NEXT): a newer announcement replaces it.
* Until an announced certificate is used, the one in force stays so; its first use makes it ACTIVE and retires what was
  ACTIVE, in one decision. So there is always exactly one step between old and new, and a kill on either side of it
  leaves the device with an identity that is accepted.
"""

from __future__ import annotations

from groundswell.pki.v1 import events_pb2, pki_pb2

from libs.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    check_etag,
)
from libs.eventlog import Context, Decision, NewEvent, Public
from libs.names import last_segment, organization_of
from services.pki import certificates
from services.pki.agenda import saved
from services.pki.model import (
    ISSUANCE_WINDOW_MS,
    MAX_ISSUANCES,
    MAX_ISSUING_CAS,
    ROTATION_LIFE_MS,
    Ca,
    CreateIssuingCa,
    IssueCertificate,
    Issuing,
    Leaf,
    State,
    milliseconds,
    timestamp,
)


def signing_ca(state: State, organization: str) -> pki_pb2.IssuingCa:
    """The issuing CA that signs now."""
    for issuing in _issuing_of(state, organization):
        if issuing.state == Issuing.STATE_ACTIVE and not issuing.expired:
            return issuing
    raise FailedPreconditionError(
        "ISSUING_CA_MISSING",
        f"organization {organization} has no issuing CA: create one with `swell issuing-ca create`",
        organization=organization,
    )


def check_new_issuing_ca(state: State, name: str, replaces: str, etag: str = "") -> None:
    """Whether an issuing CA of that name may be made now."""
    if name in state.issuing:
        raise AlreadyExistsError("ALREADY_EXISTS", f"{name} exists: choose another id", resource=name)
    living = [one for one in _issuing_of(state, organization_of(name)) if not one.expired]
    if replaces:
        old = state.issuing.get(replaces)
        if old is None:
            raise NotFoundError("RESOURCE_NOT_FOUND", f"{replaces} does not exist", resource=replaces)
        check_etag(etag, old.etag, old.name)
        if old.state != Issuing.STATE_ACTIVE:
            raise FailedPreconditionError(
                "WRONG_STATE", f"{replaces} was replaced by {old.replaced_by} already", resource=replaces
            )
    elif any(one.state == Issuing.STATE_ACTIVE for one in living):
        active = next(one.name for one in living if one.state == Issuing.STATE_ACTIVE)
        raise FailedPreconditionError(
            "ISSUING_CA_EXISTS", f"{active} signs already: rotate it instead", resource=active
        )
    if len(living) >= MAX_ISSUING_CAS:
        raise ResourceExhaustedError(
            "QUOTA_EXCEEDED",
            f"an organization has at most {MAX_ISSUING_CAS} issuing CAs that have not expired",
            limit=MAX_ISSUING_CAS,
        )


def create_issuing_ca(state: State, command: CreateIssuingCa, ctx: Context) -> Decision:
    """The first, or the successor of one."""
    check_new_issuing_ca(state, command.name, command.replaces, command.etag)
    facts = certificates.ca_facts(certificates.parse_der(command.der))
    issuing = pki_pb2.IssuingCa(
        name=command.name,
        der=facts.der,
        subject=facts.subject,
        spki_fingerprint=facts.spki_fingerprint,
        subject_key_id=facts.subject_key_id,
        state=Issuing.STATE_ACTIVE,
        create_time=timestamp(ctx.now_ms),
        etag=str(ctx.version(command.name) + 1),
    )
    issuing.not_before.FromSeconds(facts.not_before_s)
    issuing.not_after.FromSeconds(facts.not_after_s)
    events = [_issuing_saved(issuing, "issuing_ca.created", ctx)]
    if command.replaces:
        old = pki_pb2.IssuingCa()
        old.CopyFrom(state.issuing[command.replaces])
        old.state, old.replaced_by = Issuing.STATE_RETIRING, issuing.name
        old.etag = str(ctx.version(old.name) + 1)
        events.insert(0, _issuing_saved(old, "issuing_ca.rotated", ctx))
    return Decision(events=tuple(events), result=issuing)


def answered(state: State, device: str, csr_sha256: str) -> pki_pb2.DeviceCertificate | None:
    """The certificate that this request got before. Raises when it is of no more use."""
    name = state.requests.get((device, csr_sha256))
    if name is None:
        return None
    known = state.certificates[name]
    if known.state not in {Leaf.STATE_NEXT, Leaf.STATE_ACTIVE}:
        raise FailedPreconditionError(
            "CSR_SPENT",
            "the certificate of this request has lapsed, was superseded or revoked: ask again with a new key",
            resource=name,
        )
    return known


def current_of(state: State, name: str) -> pki_pb2.DeviceCertificate:
    """The certificate in force with which a device may ask for another. Raises when it is not."""
    current = state.certificates.get(name)
    if current is None:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)
    if current.state != Leaf.STATE_ACTIVE:
        raise PermissionDeniedError(
            "CERTIFICATE_NOT_IN_FORCE", f"{name} is {Leaf.State.Name(current.state)}", resource=name
        )
    ca = state.cas.get(current.ca_certificate)
    if ca is not None and ca.state in {Ca.STATE_SUSPENDED, Ca.STATE_REVOKED}:
        reason = "CA_SUSPENDED" if ca.state == Ca.STATE_SUSPENDED else "CA_REVOKED"
        raise PermissionDeniedError(reason, f"{ca.name} is not in force", resource=ca.name)
    return current


def check_issuance(state: State, current: pki_pb2.DeviceCertificate, spki_fingerprint: str, now_ms: int) -> None:
    """A key is used once in a device's life, and a device asks so often in an hour and no more."""
    had = [state.certificates[name] for name in state.history.get(current.device, ())]
    if any(one.spki_fingerprint == spki_fingerprint for one in had):
        raise FailedPreconditionError(
            "CSR_KEY_REUSED", "a certificate of this device has this key already: make a new one", device=current.device
        )
    issued = sorted(milliseconds(one.create_time) for one in had if one.issuing_ca)
    recent = [at for at in issued if at > now_ms - ISSUANCE_WINDOW_MS]
    if len(recent) >= MAX_ISSUANCES:
        raise ResourceExhaustedError(
            "ISSUANCE_RATE_EXCEEDED",
            f"{current.device} asked for {MAX_ISSUANCES} certificates within an hour",
            device=current.device,
            retry_after_s=(recent[-MAX_ISSUANCES] + ISSUANCE_WINDOW_MS - now_ms) / 1000,
        )


def issue(state: State, command: IssueCertificate, ctx: Context) -> Decision:
    """Announce a signed certificate; whatever was announced before it lapses."""
    current = current_of(state, command.current)
    known = answered(state, current.device, command.csr_sha256)
    if known is not None:
        return Decision(result=known)
    issuing = state.issuing.get(command.issuing_ca)
    if issuing is None or issuing.state != Issuing.STATE_ACTIVE:
        raise AbortedError("ISSUING_CA_ROTATED", f"{command.issuing_ca} signs no more: ask again")
    leaf = certificates.parse_der(command.der)
    spki = certificates.spki_fingerprint_of(leaf)
    check_issuance(state, current, spki, ctx.now_ms)
    fingerprint = certificates.fingerprint_of(command.der)
    name = f"organizations/{ctx.organization}/deviceCertificates/{fingerprint}"
    image = pki_pb2.DeviceCertificate(
        name=name,
        device=current.device,
        device_uid=current.device_uid,
        fingerprint=fingerprint,
        serial=f"{leaf.serial_number:x}",
        common_name=certificates.common_name(leaf),
        issuing_ca=issuing.name,
        supersedes=current.name,
        csr_sha256=command.csr_sha256,
        spki_fingerprint=spki,
        der=command.der,
        state=Leaf.STATE_NEXT,
        create_time=timestamp(ctx.now_ms),
        etag=str(ctx.version(name) + 1),
    )
    image.not_before.FromDatetime(leaf.not_valid_before_utc)
    image.not_after.FromDatetime(leaf.not_valid_after_utc)
    until = min(ctx.now_ms + ROTATION_LIFE_MS, milliseconds(image.not_after))
    image.confirm_by.CopyFrom(timestamp(until))
    public = Public(name, events_pb2.DeviceCertificateChanged(device_certificate=image, change="certificate.issued"))
    event = events_pb2.CertificateIssued(device_certificate=image)
    replaced = [
        _ended(other, Leaf.STATE_LAPSED, "ROTATION_REPLACED", "certificate.lapsed", ctx)
        for other in _held(state, current.device, Leaf.STATE_NEXT)
    ]
    return Decision(events=(*replaced, NewEvent(ctx.organization, name, event, (public,))), result=image)


def confirm(state: State, known: pki_pb2.DeviceCertificate, ctx: Context) -> Decision:
    """First use of an announced certificate: it is in force, and what was is retired."""
    if ctx.now_ms >= milliseconds(known.confirm_by):
        raise PermissionDeniedError(
            "CERTIFICATE_LAPSED", "this certificate was not used in its time", resource=known.name
        )
    image = _copy(known, ctx)
    image.state = Leaf.STATE_ACTIVE
    image.ClearField("confirm_by")
    retired = [
        _ended(other, Leaf.STATE_RETIRED, "CERTIFICATE_SUPERSEDED", "certificate.superseded", ctx)
        for other in _held(state, known.device, Leaf.STATE_ACTIVE)
    ]
    return Decision(events=(*retired, saved(image, "certificate.confirmed")), result=image)


def _held(state: State, device: str, in_state: Leaf.State.ValueType) -> list[pki_pb2.DeviceCertificate]:
    names = state.history.get(device, ())
    return [leaf for name in names if (leaf := state.certificates[name]).state == in_state]


def _ended(
    leaf: pki_pb2.DeviceCertificate, state: Leaf.State.ValueType, reason: str, change: str, ctx: Context
) -> NewEvent:
    image = _copy(leaf, ctx)
    image.state, image.reason = state, reason
    return saved(image, change)


def _copy(leaf: pki_pb2.DeviceCertificate, ctx: Context) -> pki_pb2.DeviceCertificate:
    image = pki_pb2.DeviceCertificate()
    image.CopyFrom(leaf)
    image.etag = str(ctx.version(leaf.name) + 1)
    return image


def _issuing_of(state: State, organization: str) -> list[pki_pb2.IssuingCa]:
    return [one for one in state.issuing.values() if organization_of(one.name) == organization]


def _issuing_saved(issuing: pki_pb2.IssuingCa, change: str, ctx: Context) -> NewEvent:
    public = Public(issuing.name, events_pb2.IssuingCaChanged(issuing_ca=issuing, change=change))
    event = events_pb2.IssuingCaSaved(issuing_ca=issuing)
    return NewEvent(ctx.organization, issuing.name, event, (public,))


def key_name(issuing_ca: str) -> str:
    """Name of an issuing CA's key in the key store."""
    return f"issuing-ca.{organization_of(issuing_ca)}.{last_segment(issuing_ca)}"
