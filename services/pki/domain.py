"""The pki service's pure core: dispatch of commands and the fold of events.

Rules and invariants are stated where they are decided: :mod:`services.pki.authorities` for codes, CAs and the
reservation of CA keys, :mod:`services.pki.admission` for device certificates, :mod:`services.pki.rotation` for issuing
CAs and what they sign, :mod:`services.pki.agenda` for what time does to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import immutables
from google.protobuf.message import Message
from groundswell.pki.v1 import events_pb2, pki_pb2
from msgspec.structs import replace

from libs.eventlog import Context, Decision, Event, Foreign, TimerFired
from libs.names import organization_of
from libs.rpc.directory import REGISTRY_RECORDS
from services.pki import admission, agenda, authorities, rotation
from services.pki.model import (
    AbandonCa,
    ActivateCa,
    AdmitCertificate,
    Ca,
    CloseAdmission,
    ConfirmSpki,
    CreateIssuingCa,
    CreateVerificationCode,
    IssueCertificate,
    Leaf,
    RegisterCa,
    ReleaseSpki,
    Reservation,
    ReserveSpki,
    RevokeDeviceCertificate,
    SetCaState,
    State,
    UpdateCa,
    interval_us,
)

_DECISIONS: Final[Mapping[type, Callable[[State, Any, Context], Decision]]] = {
    CreateVerificationCode: authorities.create_code,
    ActivateCa: authorities.activate,
    AbandonCa: authorities.abandon,
    UpdateCa: authorities.update,
    SetCaState: authorities.set_state,
    ReserveSpki: authorities.reserve_spki,
    ConfirmSpki: authorities.confirm_spki,
    ReleaseSpki: authorities.release_spki,
    AdmitCertificate: admission.admit,
    CloseAdmission: admission.close,
    RevokeDeviceCertificate: admission.revoke,
    CreateIssuingCa: rotation.create_issuing_ca,
    IssueCertificate: rotation.issue,
}


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
        events_pb2.IssuingCaSaved,
        events_pb2.CertificateIssued,
        events_pb2.DeviceCertificateSaved,
        events_pb2.CertificatePolicyNoted,
        events_pb2.AlarmSet,
    )
    sources: Mapping[str, Sequence[type[Message]]] = {"registry": REGISTRY_RECORDS}

    def __init__(self, code_of: authorities.CodeOf) -> None:
        self._code_of = code_of

    def initial_state(self, partition: int) -> State:
        del partition
        return State()

    def decide(self, state: State, command: object, ctx: Context) -> Decision:
        match command:
            case Foreign():
                return agenda.with_alarm(state, agenda.take_in(state, command, ctx), ctx)
            case TimerFired():
                return agenda.fire(state, ctx)
        return agenda.with_alarm(state, self._decide(state, command, ctx), ctx)

    def _decide(self, state: State, command: object, ctx: Context) -> Decision:
        if isinstance(command, RegisterCa):
            return authorities.register(state, command, ctx, self._code_of)
        decide = _DECISIONS.get(type(command))
        if decide is None:
            raise TypeError(command)
        return decide(state, command, ctx)

    def evolve(self, state: State, event: Event) -> State:
        state = self._evolve(state, event)
        image = agenda.image_of(event.payload)
        return agenda.follow(state, image) if image is not None else state

    def _evolve(self, state: State, event: Event) -> State:
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
            case events_pb2.IssuingCaSaved() as issuing:
                return replace(state, issuing=state.issuing.set(event.resource, issuing.issuing_ca))
            case events_pb2.CertificatePolicyNoted() as noted:
                return agenda.note_policy(state, noted)
            case events_pb2.AlarmSet() as alarm:
                return replace(state, alarm_ms=alarm.at_ms)
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
                history=_with_certificate(state, image),
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
        case events_pb2.CertificateIssued() as issued:
            image = issued.device_certificate
            return replace(
                state,
                certificates=state.certificates.set(image.name, image),
                requests=state.requests.set((image.device, image.csr_sha256), image.name),
                history=_with_certificate(state, image),
            )
        case events_pb2.DeviceCertificateSaved() as saved:
            image = saved.device_certificate
            state = replace(state, certificates=state.certificates.set(image.name, image))
            if image.state == Leaf.STATE_ACTIVE:
                return replace(state, holders=state.holders.set(_holder_key(image), image.name))
            return state
    return state


def _with_certificate(state: State, image: pki_pb2.DeviceCertificate) -> immutables.Map[str, tuple[str, ...]]:
    had = state.history.get(image.device, ())
    return state.history if image.name in had else state.history.set(image.device, (*had, image.name))


def _holder_key(image: pki_pb2.DeviceCertificate) -> tuple[str, str]:
    return organization_of(image.name), image.common_name


def with_count(state: State, ca: pki_pb2.CaCertificate) -> Ca:
    """A CA as it is shown."""
    image = pki_pb2.CaCertificate()
    image.CopyFrom(ca)
    image.admitted_count = state.admitted.get(ca.name, 0)
    return image
