"""The pki service's pure core: dispatch of commands and the fold of events.

Rules and invariants are stated where they are decided: :mod:`services.pki.authorities` for codes, CAs and the
reservation of CA keys, :mod:`services.pki.admission` for device certificates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from google.protobuf.message import Message
from groundswell.pki.v1 import events_pb2, pki_pb2

from libs.eventlog import Context, Decision, Event
from libs.names import organization_of
from services.pki import admission, authorities
from services.pki.model import (
    AbandonCa,
    ActivateCa,
    AdmitCertificate,
    Ca,
    CloseAdmission,
    ConfirmSpki,
    CreateVerificationCode,
    RegisterCa,
    ReleaseSpki,
    Reservation,
    ReserveSpki,
    RevokeDeviceCertificate,
    State,
    UpdateCa,
    interval_us,
)


class Pki:
    """A ``Domain[State]``. ``code_of`` is a function of the key store alone, the same on every replica."""

    service: str = "pki"
    event_types: Sequence[type[Message]] = (
        events_pb2.VerificationCodeIssued,
        events_pb2.VerificationCodeUsed,
        events_pb2.CaCertificateSaved,
        events_pb2.SpkiReserved,
        events_pb2.SpkiConfirmed,
        events_pb2.SpkiReleased,
        events_pb2.RegistrationAbandoned,
        events_pb2.AdmissionOpened,
        events_pb2.CertificateBound,
        events_pb2.AdmissionRefused,
        events_pb2.DeviceCertificateRevoked,
    )
    sources: Mapping[str, Sequence[type[Message]]] = {}

    def __init__(self, code_of: authorities.CodeOf) -> None:
        self._code_of = code_of

    def initial_state(self, partition: int) -> State:
        del partition
        return State()

    def decide(self, state: State, command: object, ctx: Context) -> Decision:
        match command:
            case CreateVerificationCode():
                return authorities.create_code(state, command, ctx)
            case RegisterCa():
                return authorities.register(state, command, ctx, self._code_of)
            case ActivateCa():
                return authorities.activate(state, command, ctx)
            case AbandonCa():
                return authorities.abandon(state, command, ctx)
            case UpdateCa():
                return authorities.update(state, command, ctx)
            case ReserveSpki():
                return authorities.reserve_spki(state, command, ctx)
            case ConfirmSpki():
                return authorities.confirm_spki(state, command, ctx)
            case ReleaseSpki():
                return authorities.release_spki(state, command, ctx)
            case AdmitCertificate():
                return admission.admit(state, command, ctx)
            case CloseAdmission():
                return admission.close(state, command, ctx)
            case RevokeDeviceCertificate():
                return admission.revoke(state, command, ctx)
        raise TypeError(command)

    def evolve(self, state: State, event: Event) -> State:
        match event.payload:
            case events_pb2.VerificationCodeIssued() as issued:
                return replace(state, codes=state.codes.set(event.resource, issued.verification_code))
            case events_pb2.VerificationCodeUsed() as used:
                code = pki_pb2.VerificationCode()
                code.CopyFrom(state.codes[used.name])
                code.used = True
                return replace(state, codes=state.codes.set(used.name, code))
            case events_pb2.CaCertificateSaved() | events_pb2.RegistrationAbandoned() as saved:
                return replace(state, cas=state.cas.set(event.resource, saved.ca_certificate))
            case events_pb2.SpkiReserved() as reserved:
                held = Reservation(reserved.ca_certificate, confirmed=False)
                return replace(state, spki=state.spki.set(reserved.spki_fingerprint, held))
            case events_pb2.SpkiConfirmed() as confirmed:
                held = Reservation(confirmed.ca_certificate, confirmed=True)
                return replace(state, spki=state.spki.set(confirmed.spki_fingerprint, held))
            case events_pb2.SpkiReleased() as released:
                return replace(state, spki=state.spki.delete(released.spki_fingerprint))
        return _evolve_device(state, event)


def _evolve_device(state: State, event: Event) -> State:
    match event.payload:
        case events_pb2.AdmissionOpened() as opened:
            image = opened.device_certificate
            ca = image.ca_certificate
            due = admission.rate_after(
                state.next_admission_us.get(ca, 0), event.occurred_at_ms, interval_us(state.cas[ca])
            )
            return replace(
                state,
                certificates=state.certificates.set(image.name, image),
                openings=state.openings.set(image.name, opened),
                holders=state.holders.set(_holder_key(image), image.name),
                admitted=state.admitted.set(ca, state.admitted.get(ca, 0) + 1),
                next_admission_us=state.next_admission_us.set(ca, due),
            )
        case events_pb2.CertificateBound() as bound:
            image = bound.device_certificate
            return replace(
                state,
                certificates=state.certificates.set(image.name, image),
                openings=state.openings.delete(image.name),
            )
        case events_pb2.AdmissionRefused() as refused:
            image = refused.device_certificate
            ca = image.ca_certificate
            return replace(
                state,
                certificates=state.certificates.set(image.name, image),
                openings=state.openings.delete(image.name),
                holders=state.holders.delete(_holder_key(image)),
                admitted=state.admitted.set(ca, state.admitted[ca] - 1),
            )
        case events_pb2.DeviceCertificateRevoked() as revoked:
            image = revoked.device_certificate
            openings = state.openings.delete(image.name) if image.name in state.openings else state.openings
            return replace(state, certificates=state.certificates.set(image.name, image), openings=openings)
    return state


def _holder_key(image: pki_pb2.DeviceCertificate) -> tuple[str, str]:
    return organization_of(image.name), image.common_name


def with_count(state: State, ca: pki_pb2.CaCertificate) -> Ca:
    """A CA as it is shown."""
    image = pki_pb2.CaCertificate()
    image.CopyFrom(ca)
    image.admitted_count = state.admitted.get(ca.name, 0)
    return image
