"""State of a pki partition, its commands, and the numbers of its rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import immutables
import msgspec
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.pki.v1 import events_pb2, pki_pb2
from groundswell.registry.v1 import registry_pb2

CODE_LIFE_MS: Final = 7 * 24 * 3600 * 1000
MAX_OPEN_CODES: Final = 100
"""Codes of an organization that may wait for their use at a time."""
MAX_CA_CERTIFICATES: Final = 200
"""Per organization: every one is an anchor of its TLS listeners."""
MAX_COHORT_RULES: Final = 100
MAX_TAGS: Final = 64
MAX_TAG_LENGTH: Final = 128
DEFAULT_QUOTA: Final = 100_000
DEFAULT_RATE_PER_MINUTE: Final = 6_000

ROTATION_LIFE_MS: Final = 7 * 24 * 3600 * 1000
"""An issued certificate that is not used within this time lapses."""
DEFAULT_VALIDITY_MS: Final = 365 * 24 * 3600 * 1000
ISSUING_CA_DAYS: Final = 3650
MAX_ISSUING_CAS: Final = 16
"""Per organization, of those that have not expired: anchors of its TLS listeners, too."""
ISSUANCE_WINDOW_MS: Final = 3600 * 1000
MAX_ISSUANCES: Final = 10
"""Certificates that one device may ask for in the window."""

ALARM: Final = "pki.alarm"
"""The one timer of a partition; it stands at the next certificate that is due."""
RESERVE: Final = "pki.reserve"
RELEASE: Final = "pki.release"
PROVISION: Final = "pki.provision"
UNDO: Final = "pki.undo"

_EMPTY: Final[immutables.Map[Any, Any]] = immutables.Map()

Ca = pki_pb2.CaCertificate
Leaf = pki_pb2.DeviceCertificate
Issuing = pki_pb2.IssuingCa


class Reservation(msgspec.Struct, frozen=True, gc=False):
    """Who holds a CA key, at the key's own partition."""

    ca_certificate: str
    confirmed: bool


class State(msgspec.Struct, frozen=True, gc=False):
    """Fold of one partition. Messages in it are never mutated."""

    codes: immutables.Map[str, pki_pb2.VerificationCode] = _EMPTY
    """Without their code, which is derived."""
    cas: immutables.Map[str, pki_pb2.CaCertificate] = _EMPTY
    """``admitted_count`` is kept in ``admitted``."""
    admitted: immutables.Map[str, int] = _EMPTY
    """CA -> devices, admissions open or bound."""
    next_admission_us: immutables.Map[str, int] = _EMPTY
    """CA -> when its next admission would be due if they came evenly at its rate (microseconds)."""
    spki: immutables.Map[str, Reservation] = _EMPTY
    certificates: immutables.Map[str, pki_pb2.DeviceCertificate] = _EMPTY
    openings: immutables.Map[str, events_pb2.AdmissionOpened] = _EMPTY
    """Device certificate -> its admission under way."""
    holders: immutables.Map[tuple[str, str], str] = _EMPTY
    """(organization, common name) -> the device certificate that has it."""
    history: immutables.Map[str, tuple[str, ...]] = _EMPTY
    """Device -> every certificate that it ever had, in the order of their coming."""
    requests: immutables.Map[tuple[str, str], str] = _EMPTY
    """(device, SHA-256 of a signing request) -> the certificate that answered it."""
    issuing: immutables.Map[str, pki_pb2.IssuingCa] = _EMPTY
    policies: immutables.Map[str, registry_pb2.CertificatePolicy] = _EMPTY
    """Product -> what the registry says of its certificates; absent means the defaults."""
    agenda: immutables.Map[str, int] = _EMPTY
    """Certificate of any kind -> when time next changes it (ms)."""
    days: immutables.Map[int, immutables.Map[int, immutables.Map[str, int]]] = _EMPTY
    """The agenda by day and minute, so that what is due first is found without looking at all of it."""
    alarm_ms: int = 0
    """Where the partition's timer stands; 0: nowhere."""


@dataclass(frozen=True, slots=True)
class CreateVerificationCode:
    """Issue a code, or answer with the open one of that name."""

    name: str


@dataclass(frozen=True, slots=True)
class RegisterCa:
    """Register a CA with its proof. References were checked by the caller; the certificates are judged here."""

    name: str
    certificate_pem: str
    proof_pem: str
    environment: pki_pb2.CaCertificate.Environment.ValueType
    jitp: pki_pb2.JitpSettings


@dataclass(frozen=True, slots=True)
class ActivateCa:
    """The key is reserved for this registration, finally."""

    name: str


@dataclass(frozen=True, slots=True)
class AbandonCa:
    """The key is not to be had."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class UpdateCa:
    """Change jitp and state. ``jitp`` is complete; None leaves it."""

    ca: pki_pb2.CaCertificate
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SetCaState:
    """Suspend, resume or revoke a CA."""

    name: str
    state: pki_pb2.CaCertificate.State.ValueType
    etag: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CreateIssuingCa:
    """Record an issuing CA whose key and certificate were made outside; ``replaces`` names its predecessor."""

    name: str
    der: bytes
    replaces: str = ""
    etag: str = ""


@dataclass(frozen=True, slots=True)
class IssueCertificate:
    """Record a certificate that was signed outside for the device of ``current``."""

    current: str
    csr_sha256: str
    der: bytes
    issuing_ca: str


@dataclass(frozen=True, slots=True)
class ReserveSpki:
    """At `spki:<fingerprint>`: ask for a CA key. The answer names its holder."""

    fingerprint: str
    ca_certificate: str


@dataclass(frozen=True, slots=True)
class ConfirmSpki:
    """At `spki:<fingerprint>`: make one's own reservation final. The answer names the holder."""

    fingerprint: str
    ca_certificate: str


@dataclass(frozen=True, slots=True)
class ReleaseSpki:
    """At `spki:<fingerprint>`: give back a reservation, if it is one's own and not final."""

    fingerprint: str
    ca_certificate: str


@dataclass(frozen=True, slots=True)
class AdmitCertificate:
    """First contact of a leaf."""

    organization: str
    leaf_der: bytes


@dataclass(frozen=True, slots=True)
class CloseAdmission:
    """The registry has created the device (``device_uid``), or refused to (``reason``)."""

    certificate: str
    device_uid: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RevokeDeviceCertificate:
    """Deny a device certificate for good."""

    name: str
    etag: str
    reason: str


def routing_key(fingerprint: str) -> str:
    """Where a CA key is reserved. Organization ids hold no colon, so this is none of them."""
    return f"spki:{fingerprint}"


def timestamp(ms: int) -> Timestamp:
    """Milliseconds since the epoch as a message."""
    return Timestamp(seconds=ms // 1000, nanos=ms % 1000 * 1_000_000)


def milliseconds(stamp: Timestamp) -> int:
    """A message as milliseconds since the epoch."""
    return stamp.seconds * 1000 + stamp.nanos // 1_000_000


def quota_of(ca: pki_pb2.CaCertificate) -> int:
    """Devices that a CA may create in all."""
    return ca.jitp.quota or DEFAULT_QUOTA


def interval_us(ca: pki_pb2.CaCertificate) -> int:
    """Microseconds between admissions at the CA's rate."""
    return 60_000_000 // (ca.jitp.rate_per_minute or DEFAULT_RATE_PER_MINUTE)
