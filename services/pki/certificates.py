"""What a certificate must be: pure checks, each with its own stable reason.

A CA must be one (basicConstraints, keyCertSign), valid now, with a strong key and signature. A proof of possession is a
leaf that the CA signed over a one-time code. A device leaf must be for client authentication, not a CA, valid now, with
a common name that is a device id, and at most one URI. Signatures are checked here again whatever a handshake said.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from libs.errors import InvalidArgumentError

MIN_RSA_BITS: Final = 2048
MIN_CURVE_BITS: Final = 256
_DEVICE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_OWN_URN: Final = re.compile(r"urn:[^:]+:org:([^:]*):product:([^:]*):device:([^:]*)\Z")
_VERIFY_URN: Final = re.compile(r"urn:[^:]+:verify:([0-9a-f]{64})\Z")
_WEAK_HASHES: Final = (hashes.MD5, hashes.SHA1)
_KNOWN_CRITICAL: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    }
)
_E = TypeVar("_E", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a certificate is refused."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class CaFacts:
    """What the registration of a CA needs to know."""

    der: bytes
    subject: str
    canonical_subject: str
    spki_fingerprint: str
    subject_key_id: str
    not_before_s: int
    not_after_s: int


def parse_pem(text: str, field: str) -> x509.Certificate:
    """Exactly one PEM certificate."""
    try:
        found = x509.load_pem_x509_certificates(text.encode())
    except ValueError:
        found = []
    if len(found) != 1:
        raise InvalidArgumentError(
            "CERTIFICATE_MALFORMED", f"{field} must hold exactly one PEM certificate", field=field
        )
    return parse_der(found[0].public_bytes(serialization.Encoding.DER), field)


@lru_cache(maxsize=4096)
def parse_der(der: bytes, field: str = "certificate") -> x509.Certificate:
    """A certificate all of whose parts can be read. Cached: CAs are looked at for every leaf."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        # The parser is lazy: what would fail later fails here.
        _ = certificate.extensions, certificate.subject, certificate.issuer, certificate.public_key()
        _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise InvalidArgumentError("CERTIFICATE_MALFORMED", f"{field} cannot be read", field=field) from None
    return certificate


def fingerprint_of(der: bytes) -> str:
    """Lowercase hex SHA-256."""
    return hashlib.sha256(der).hexdigest()


def spki_fingerprint_of(certificate: x509.Certificate) -> str:
    """Lowercase hex SHA-256 of the subject public key info."""
    spki = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(spki).hexdigest()


def canonical_name(name: x509.Name) -> str:
    """Equal for names that TLS libraries take for equal: they fold case and white space."""
    rdns = []
    for rdn in name.rdns:
        values = sorted(f"{part.oid.dotted_string}={' '.join(str(part.value).casefold().split())}" for part in rdn)
        rdns.append("+".join(value.replace("\\", "\\\\").replace("/", "\\/") for value in values))
    return "/".join(rdns)


def ca_facts(ca: x509.Certificate) -> CaFacts:
    """Facts of a CA that passed :func:`ca_problem`."""
    key_id = _extension(ca, x509.SubjectKeyIdentifier)
    return CaFacts(
        der=ca.public_bytes(serialization.Encoding.DER),
        subject=ca.subject.rfc4514_string(),
        canonical_subject=canonical_name(ca.subject),
        spki_fingerprint=spki_fingerprint_of(ca),
        subject_key_id=key_id.digest.hex() if key_id else "",
        not_before_s=int(ca.not_valid_before_utc.timestamp()),
        not_after_s=int(ca.not_valid_after_utc.timestamp()),
    )


def _ca_rules(ca: x509.Certificate, now_ms: int) -> Iterable[Problem]:
    basic = _extension(ca, x509.BasicConstraints)
    if basic is None or not basic.ca:
        yield Problem("CA_NOT_A_CA", "the certificate does not say cA=TRUE in its basicConstraints")
    usage = _extension(ca, x509.KeyUsage)
    if usage is None or not usage.key_cert_sign:
        yield Problem("CA_KEY_USAGE", "the CA's keyUsage does not allow keyCertSign")
    if not ca.subject.rdns:
        yield Problem("CA_SUBJECT_EMPTY", "the CA has no subject, so its leaves could not name it")
    if weak_key(ca):
        yield Problem("CA_WEAK_KEY", "the CA's key is too weak: use EC P-256 or larger, Ed25519, or RSA 2048 or larger")
    if weak_signature(ca):
        yield Problem("CA_WEAK_SIGNATURE", "the CA is signed with SHA-1 or weaker")
    yield from _validity(ca, now_ms, "CA", "the CA")


def ca_problem(ca: x509.Certificate, now_ms: int) -> Problem | None:
    """The first rule for CAs that is broken."""
    return next(iter(_ca_rules(ca, now_ms)), None)


def _proof_rules(proof: x509.Certificate, ca: x509.Certificate, now_ms: int) -> Iterable[Problem]:
    if is_ca(proof):
        yield Problem("PROOF_IS_CA", "the verification certificate must be a leaf, not a CA")
    if weak_signature(proof):
        yield Problem("PROOF_WEAK_SIGNATURE", "the verification certificate is signed with SHA-1 or weaker")
    if not is_issued_by(proof, ca):
        yield Problem("PROOF_NOT_SIGNED_BY_CA", "the verification certificate is not signed by the key of this CA")
    yield from _validity(proof, now_ms, "PROOF", "the verification certificate")


def proof_problem(proof: x509.Certificate, ca: x509.Certificate, now_ms: int) -> Problem | None:
    """The first rule for proofs that is broken; whose code it holds is decided elsewhere."""
    return next(iter(_proof_rules(proof, ca, now_ms)), None)


def proof_codes(proof: x509.Certificate) -> frozenset[str]:
    """Codes that the proof may mean: its common names, and URIs `urn:…:verify:<code>`."""
    found = {str(part.value) for part in proof.subject.get_attributes_for_oid(NameOID.COMMON_NAME)}
    for uri in uris_of(proof):
        match = _VERIFY_URN.match(uri)
        if match:
            found.add(match[1])
    return frozenset(found)


def _leaf_rules(leaf: x509.Certificate, now_ms: int, organization: str, product: str) -> Iterable[Problem]:
    if is_ca(leaf):
        yield Problem("CERTIFICATE_IS_CA", "a CA certificate cannot identify a device")
    yield from _validity(leaf, now_ms, "CERTIFICATE", "the certificate")
    if weak_signature(leaf):
        yield Problem("CERTIFICATE_WEAK_SIGNATURE", "the certificate is signed with SHA-1 or weaker")
    if weak_key(leaf):
        yield Problem("CERTIFICATE_WEAK_KEY", "the device's key is too weak: use EC P-256")
    usage = _extension(leaf, x509.KeyUsage)
    if usage is not None and not usage.digital_signature:
        yield Problem("CERTIFICATE_KEY_USAGE", "the certificate's keyUsage does not allow digitalSignature")
    extended = _extension(leaf, x509.ExtendedKeyUsage)
    if extended is None:
        yield Problem("CERTIFICATE_EKU_MISSING", "the certificate has no extendedKeyUsage; clientAuth is needed")
    elif ExtendedKeyUsageOID.CLIENT_AUTH not in extended:
        yield Problem("CERTIFICATE_EKU", "the certificate's extendedKeyUsage does not include clientAuth")
    unknown = [part.oid.dotted_string for part in leaf.extensions if part.critical and part.oid not in _KNOWN_CRITICAL]
    if unknown:
        yield Problem("CERTIFICATE_CRITICAL_EXTENSION", f"the critical extension {unknown[0]} is not understood")
    yield from _name_rules(leaf, organization, product)


def _name_rules(leaf: x509.Certificate, organization: str, product: str) -> Iterable[Problem]:
    names = [str(part.value) for part in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if not names:
        yield Problem("COMMON_NAME_MISSING", "the certificate has no common name to take the device id from")
        return
    if len(names) > 1:
        yield Problem("COMMON_NAME_AMBIGUOUS", "the certificate has more than one common name")
    name = names[0]
    if any(unicodedata.category(character)[0] == "C" for character in name):
        yield Problem("COMMON_NAME_CONTROL_CHARACTER", "the common name holds NUL or another control character")
    if not _DEVICE_ID.match(name):
        yield Problem(
            "COMMON_NAME_INVALID",
            "the common name is not a device id: 1 to 128 of letters, digits, '.', '_', '-', not beginning with a sign",
        )
    uris = uris_of(leaf)
    if len(uris) > 1:
        yield Problem("SUBJECT_URIS", "the certificate has more than one URI in its subjectAltName")
    own = _OWN_URN.match(uris[0]) if uris else None
    if own and own.groups() != (organization, product, name):
        yield Problem("SUBJECT_URI_MISMATCH", "the certificate's URI names another organization, product or device")


def leaf_problem(leaf: x509.Certificate, now_ms: int, *, organization: str, product: str) -> Problem | None:
    """The first rule for device leaves that is broken. The signature is judged by :func:`is_issued_by`."""
    return next(iter(_leaf_rules(leaf, now_ms, organization, product)), None)


def common_name(leaf: x509.Certificate) -> str:
    """The first common name, empty when there is none."""
    names = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def names_as_issuer(leaf: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether the leaf names this CA: issuer, and key identifiers where both have one."""
    if canonical_name(leaf.issuer) != canonical_name(ca.subject):
        return False
    authority = _extension(leaf, x509.AuthorityKeyIdentifier)
    subject = _extension(ca, x509.SubjectKeyIdentifier)
    wanted = authority.key_identifier if authority else None
    return wanted is None or subject is None or wanted == subject.digest


def is_issued_by(leaf: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether the CA's key signed the leaf."""
    try:
        leaf.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return True


def is_ca(certificate: x509.Certificate) -> bool:
    """Whether it could sign others."""
    basic = _extension(certificate, x509.BasicConstraints)
    usage = _extension(certificate, x509.KeyUsage)
    return (basic is not None and basic.ca) or (usage is not None and usage.key_cert_sign)


def weak_key(certificate: x509.Certificate) -> bool:
    """Whether the key is below 112 bits of strength or of a kind not used here."""
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        return key.key_size < MIN_RSA_BITS
    if isinstance(key, ec.EllipticCurvePublicKey):
        return key.curve.key_size < MIN_CURVE_BITS
    return not isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey)


def weak_signature(certificate: x509.Certificate) -> bool:
    """Whether the signature rests on a broken hash, or on one that is not known."""
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return True
    return isinstance(algorithm, _WEAK_HASHES)


def uris_of(certificate: x509.Certificate) -> list[str]:
    """URIs of the subjectAltName."""
    names = _extension(certificate, x509.SubjectAlternativeName)
    return names.get_values_for_type(x509.UniformResourceIdentifier) if names else []


def _validity(certificate: x509.Certificate, now_ms: int, prefix: str, what: str) -> Iterable[Problem]:
    now = datetime.fromtimestamp(now_ms / 1000, UTC)
    if now > certificate.not_valid_after_utc:
        yield Problem(f"{prefix}_EXPIRED", f"{what} expired at {certificate.not_valid_after_utc.isoformat()}")
    if now < certificate.not_valid_before_utc:
        yield Problem(f"{prefix}_NOT_YET_VALID", f"{what} is valid from {certificate.not_valid_before_utc.isoformat()}")


def _extension(certificate: x509.Certificate, kind: type[_E]) -> _E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
