"""Decisions on verification codes, CA certificates, and the reservation of their keys.

Invariants:

* One CA key belongs to one organization: a CA becomes ACTIVE only after `spki:<fingerprint>` was confirmed for it,
  and a reservation is given back only by a task of the decision that put ``RegistrationAbandoned`` into its log.
* A code has one use, seven days, and one organization; only its name is in the log.
* Inside an organization no two CAs share subject or key id but not the key: a TLS library could take one for the other.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator

from groundswell.pki.v1 import events_pb2, pki_pb2

from libs.errors import (
    AlreadyExistsError,
    DomainError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    check_etag,
)
from libs.eventlog import Context, Decision, NewEvent, Public, Task
from libs.names import is_within, organization_of, product_of
from services.pki import certificates
from services.pki.certificates import CaFacts, Problem
from services.pki.model import (
    CODE_LIFE_MS,
    MAX_CA_CERTIFICATES,
    MAX_COHORT_RULES,
    MAX_OPEN_CODES,
    MAX_TAG_LENGTH,
    MAX_TAGS,
    RELEASE,
    RESERVE,
    AbandonCa,
    ActivateCa,
    Ca,
    ConfirmSpki,
    CreateVerificationCode,
    RegisterCa,
    ReleaseSpki,
    ReserveSpki,
    SetCaState,
    State,
    UpdateCa,
    milliseconds,
    timestamp,
)

CodeOf = Callable[[str], str]
"""Code of a verification code's resource name; needs the key store, not the log."""

_USABLE = (Ca.STATE_ACTIVE, Ca.STATE_SUSPENDED)


def create_code(state: State, command: CreateVerificationCode, ctx: Context) -> Decision:
    """A retry gets the same open code; a used or expired name is not used again."""
    known = state.codes.get(command.name)
    if known is not None:
        if known.used or milliseconds(known.expire_time) <= ctx.now_ms:
            raise AlreadyExistsError(
                "ALREADY_EXISTS",
                f"{command.name} is used or expired: choose another id",
                resource=command.name,
            )
        return Decision(result=known)
    organization = organization_of(command.name)
    still_open = sum(
        1
        for name, code in state.codes.items()
        if organization_of(name) == organization and not code.used and milliseconds(code.expire_time) > ctx.now_ms
    )
    if still_open >= MAX_OPEN_CODES:
        raise ResourceExhaustedError(
            "QUOTA_EXCEEDED",
            f"{MAX_OPEN_CODES} verification codes are open: use one, or wait until they expire",
            limit=MAX_OPEN_CODES,
        )
    code = pki_pb2.VerificationCode(name=command.name, expire_time=timestamp(ctx.now_ms + CODE_LIFE_MS))
    event = events_pb2.VerificationCodeIssued(verification_code=code)
    return Decision(events=(NewEvent(ctx.organization, command.name, event),), result=code)


def register(state: State, command: RegisterCa, ctx: Context, code_of: CodeOf) -> Decision:
    """Judge certificate and proof, use the code, and begin the reservation of the key."""
    if command.name in state.cas:
        raise AlreadyExistsError("ALREADY_EXISTS", f"{command.name} exists: choose another id", resource=command.name)
    certificate = certificates.parse_pem(command.certificate_pem, "certificate_pem")
    proof = certificates.parse_pem(command.proof_pem, "verification_certificate_pem")
    _refuse(certificates.ca_problem(certificate, ctx.now_ms), "certificate_pem")
    _refuse(certificates.proof_problem(proof, certificate, ctx.now_ms), "verification_certificate_pem")
    organization = organization_of(command.name)
    code = _usable_code(state, organization, certificates.proof_codes(proof), ctx.now_ms, code_of)
    facts = certificates.ca_facts(certificate)
    _check_siblings(state, organization, facts)
    check_jitp(command.jitp, product_of(command.name))
    ca = pki_pb2.CaCertificate(
        name=command.name,
        der=facts.der,
        subject=facts.subject,
        spki_fingerprint=facts.spki_fingerprint,
        subject_key_id=facts.subject_key_id,
        environment=command.environment or Ca.ENVIRONMENT_PRODUCTION,
        state=Ca.STATE_PENDING,
        jitp=command.jitp,
        create_time=timestamp(ctx.now_ms),
        etag=str(ctx.version(command.name) + 1),
    )
    ca.not_before.FromSeconds(facts.not_before_s)
    ca.not_after.FromSeconds(facts.not_after_s)
    used = events_pb2.VerificationCodeUsed(name=code, ca_certificate=command.name)
    return Decision(
        events=(
            NewEvent(ctx.organization, code, used),
            NewEvent(ctx.organization, command.name, events_pb2.CaCertificateSaved(ca_certificate=ca)),
        ),
        result=ca,
        open_tasks=(Task(_task(RESERVE, command.name), RESERVE, command.name.encode()),),
    )


def activate(state: State, command: ActivateCa, ctx: Context) -> Decision:
    """End of a registration that got its key."""
    ca = state.cas.get(command.name)
    done = (_task(RESERVE, command.name),)
    if ca is None or ca.state != Ca.STATE_PENDING:
        return Decision(close_tasks=done)
    image = _changed(ca, ctx, state=Ca.STATE_ACTIVE)
    return Decision(events=(_saved(image, ctx, "ca_certificate.registered"),), close_tasks=done)


def abandon(state: State, command: AbandonCa, ctx: Context) -> Decision:
    """End of a registration that did not. Whatever it holds of the key is given back after this is in the log."""
    ca = state.cas.get(command.name)
    done = (_task(RESERVE, command.name),)
    if ca is None or ca.state != Ca.STATE_PENDING:
        return Decision(close_tasks=done)
    image = _changed(ca, ctx, state=Ca.STATE_ABANDONED)
    event = events_pb2.RegistrationAbandoned(ca_certificate=image, reason=command.reason)
    return Decision(
        events=(NewEvent(ctx.organization, ca.name, event),),
        close_tasks=done,
        open_tasks=(Task(_task(RELEASE, ca.name), RELEASE, ca.name.encode()),),
    )


def update(state: State, command: UpdateCa, ctx: Context) -> Decision:
    """Change jitp and state of a CA that has its key."""
    ca = state.cas.get(command.ca.name)
    if ca is None:
        raise not_found(command.ca.name)
    check_etag(command.ca.etag, ca.etag, ca.name)
    if ca.state not in _USABLE:
        raise FailedPreconditionError(
            "WRONG_STATE", f"{ca.name} is {Ca.State.Name(ca.state)}: it cannot be changed", resource=ca.name
        )
    image = _changed(ca, ctx)
    for path in command.paths:
        if path == "state":
            if command.ca.state not in _USABLE:
                raise InvalidArgumentError(
                    "INVALID_FIELD", "state can be set to STATE_ACTIVE or STATE_SUSPENDED", field="ca_certificate.state"
                )
            image.state = command.ca.state
        elif path == "jitp":
            image.jitp.CopyFrom(command.ca.jitp)
        elif path.startswith("jitp.") and path[5:] in pki_pb2.JitpSettings.DESCRIPTOR.fields_by_name:
            _copy_field(command.ca.jitp, image.jitp, path[5:])
        else:
            raise InvalidArgumentError(
                "INVALID_FIELD", f"'{path}' cannot be updated; state, jitp and its fields can", field="update_mask"
            )
    check_jitp(image.jitp, product_of(ca.name))
    image.admitted_count = state.admitted.get(ca.name, 0)
    return Decision(events=(_saved(image, ctx, "ca_certificate.updated"),), result=image)


_CHANGES = {
    Ca.STATE_SUSPENDED: "ca_certificate.suspended",
    Ca.STATE_ACTIVE: "ca_certificate.resumed",
    Ca.STATE_REVOKED: "ca_certificate.revoked",
}


def set_state(state: State, command: SetCaState, ctx: Context) -> Decision:
    """Suspend, resume, revoke. Revocation is for good; a repeat of any changes nothing."""
    ca = state.cas.get(command.name)
    if ca is None:
        raise not_found(command.name)
    check_etag(command.etag, ca.etag, ca.name)
    if ca.state == command.state:
        return Decision(result=_shown(state, ca))
    if ca.state not in _USABLE:
        raise FailedPreconditionError(
            "WRONG_STATE", f"{ca.name} is {Ca.State.Name(ca.state)}: it cannot be changed", resource=ca.name
        )
    image = _changed(ca, ctx, state=command.state)
    image.state_reason = command.reason
    shown = _shown(state, image)
    return Decision(events=(_saved(image, ctx, _CHANGES[command.state]),), result=shown)


def _shown(state: State, ca: pki_pb2.CaCertificate) -> pki_pb2.CaCertificate:
    image = pki_pb2.CaCertificate()
    image.CopyFrom(ca)
    image.admitted_count = state.admitted.get(ca.name, 0)
    return image


def reserve_spki(state: State, command: ReserveSpki, ctx: Context) -> Decision:
    """The first to ask holds the key."""
    held = state.spki.get(command.fingerprint)
    if held is not None:
        return Decision(result=_holder(command.fingerprint, held.ca_certificate))
    event = events_pb2.SpkiReserved(spki_fingerprint=command.fingerprint, ca_certificate=command.ca_certificate)
    return Decision(events=(_at_key(ctx, event),), result=_holder(command.fingerprint, command.ca_certificate))


def confirm_spki(state: State, command: ConfirmSpki, ctx: Context) -> Decision:
    """Only a reservation that still is one's own becomes final."""
    held = state.spki.get(command.fingerprint)
    if held is None or held.ca_certificate != command.ca_certificate or held.confirmed:
        return Decision(result=_holder(command.fingerprint, held.ca_certificate if held else ""))
    event = events_pb2.SpkiConfirmed(spki_fingerprint=command.fingerprint, ca_certificate=command.ca_certificate)
    return Decision(events=(_at_key(ctx, event),), result=_holder(command.fingerprint, command.ca_certificate))


def release_spki(state: State, command: ReleaseSpki, ctx: Context) -> Decision:
    """A reservation of another, or a final one, stays."""
    held = state.spki.get(command.fingerprint)
    if held is None or held.ca_certificate != command.ca_certificate or held.confirmed:
        return Decision()
    event = events_pb2.SpkiReleased(spki_fingerprint=command.fingerprint, ca_certificate=command.ca_certificate)
    return Decision(events=(_at_key(ctx, event),))


def check_jitp(jitp: pki_pb2.JitpSettings, product: str) -> None:
    """Cohorts are of the CA's product; tags and rules are few and short. Whether cohorts exist is asked elsewhere."""
    for path, cohort in cohorts_of(jitp):
        if not is_within(cohort, f"{product}/cohorts"):
            raise InvalidArgumentError(
                "INVALID_FIELD", f"'{cohort}' is not a cohort of {product}", field=f"ca_certificate.jitp.{path}"
            )
    if len(jitp.cohort_rules) > MAX_COHORT_RULES:
        raise InvalidArgumentError(
            "INVALID_FIELD", f"at most {MAX_COHORT_RULES} cohort rules", field="ca_certificate.jitp.cohort_rules"
        )
    for tags in (jitp.tags, *(rule.tags for rule in jitp.cohort_rules)):
        if len(tags) > MAX_TAGS or not all(0 < len(tag) <= MAX_TAG_LENGTH for tag in tags):
            raise InvalidArgumentError(
                "INVALID_FIELD",
                f"at most {MAX_TAGS} tags of 1 to {MAX_TAG_LENGTH} characters",
                field="ca_certificate.jitp.tags",
            )


def cohorts_of(jitp: pki_pb2.JitpSettings) -> Iterator[tuple[str, str]]:
    """(field path, cohort) of every cohort that is named."""
    if jitp.cohort:
        yield "cohort", jitp.cohort
    for index, rule in enumerate(jitp.cohort_rules):
        yield f"cohort_rules[{index}].cohort", rule.cohort


def not_found(name: str) -> NotFoundError:
    """No such resource."""
    return NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)


def _usable_code(state: State, organization: str, given: frozenset[str], now_ms: int, code_of: CodeOf) -> str:
    """Resource name of the code that the proof holds. A code of another organization is as unknown as any other."""
    for name, code in state.codes.items():
        if organization_of(name) != organization:
            continue
        expected = code_of(name).encode()
        if not any(hmac.compare_digest(expected, text.encode()) for text in given):
            continue
        if code.used:
            raise _proof_error("PROOF_CODE_USED", f"the code {name} was used: it has one use")
        if milliseconds(code.expire_time) <= now_ms:
            raise _proof_error("PROOF_CODE_EXPIRED", f"the code {name} has expired: create another one")
        return name
    raise _proof_error(
        "PROOF_CODE_UNKNOWN", "the verification certificate's common name is no code of this organization"
    )


def _check_siblings(state: State, organization: str, facts: CaFacts) -> None:
    live = [
        ca for ca in state.cas.values() if organization_of(ca.name) == organization and ca.state != Ca.STATE_ABANDONED
    ]
    for ca in live:
        if ca.spki_fingerprint == facts.spki_fingerprint:
            raise AlreadyExistsError(
                "CA_ALREADY_REGISTERED", f"the key of this CA is registered as {ca.name}", resource=ca.name
            )
        _check_sibling(ca, facts)
    for issuing in state.issuing.values():
        if organization_of(issuing.name) == organization:
            _check_sibling(issuing, facts)
    if len(live) >= MAX_CA_CERTIFICATES:
        raise ResourceExhaustedError(
            "QUOTA_EXCEEDED", f"an organization has at most {MAX_CA_CERTIFICATES} CAs", limit=MAX_CA_CERTIFICATES
        )


def _check_sibling(ca: pki_pb2.CaCertificate | pki_pb2.IssuingCa, facts: CaFacts) -> None:
    subject = certificates.canonical_name(certificates.parse_der(ca.der).subject)
    same_key_id = bool(facts.subject_key_id) and ca.subject_key_id == facts.subject_key_id
    if subject == facts.canonical_subject or same_key_id:
        raise FailedPreconditionError(
            "CA_SUBJECT_CONFLICT",
            f"{ca.name} has the same subject or key id but another key: give the new CA a subject of its own",
            resource=ca.name,
        )


def _refuse(problem: Problem | None, field: str) -> None:
    if problem is not None:
        raise InvalidArgumentError(problem.reason, problem.message, field=field)


def _proof_error(reason: str, message: str) -> DomainError:
    return InvalidArgumentError(reason, message, field="verification_certificate_pem")


def _changed(
    ca: pki_pb2.CaCertificate, ctx: Context, *, state: Ca.State.ValueType | None = None
) -> pki_pb2.CaCertificate:
    image = pki_pb2.CaCertificate()
    image.CopyFrom(ca)
    image.etag = str(ctx.version(ca.name) + 1)
    if state is not None:
        image.state = state
    return image


def _copy_field(source: pki_pb2.JitpSettings, target: pki_pb2.JitpSettings, field: str) -> None:
    target.ClearField(field)  # type: ignore[arg-type]
    part = pki_pb2.JitpSettings()
    part.CopyFrom(source)
    for name in pki_pb2.JitpSettings.DESCRIPTOR.fields_by_name:
        if name != field:
            part.ClearField(name)  # type: ignore[arg-type]
    target.MergeFrom(part)


def _saved(image: pki_pb2.CaCertificate, ctx: Context, change: str) -> NewEvent:
    return NewEvent(
        ctx.organization,
        image.name,
        events_pb2.CaCertificateSaved(ca_certificate=image),
        public=(Public(image.name, events_pb2.CaCertificateChanged(ca_certificate=image, change=change)),),
    )


def _at_key(
    ctx: Context, event: events_pb2.SpkiReserved | events_pb2.SpkiConfirmed | events_pb2.SpkiReleased
) -> NewEvent:
    return NewEvent(ctx.organization, ctx.organization, event)


def _holder(fingerprint: str, ca_certificate: str) -> events_pb2.SpkiReserved:
    return events_pb2.SpkiReserved(spki_fingerprint=fingerprint, ca_certificate=ca_certificate)


def _task(kind: str, name: str) -> str:
    return f"{kind}/{name}"
