"""What a certificate signing request must be: pure checks, each with its own stable reason.

Only key and name are taken from a request; every extension of a certificate is ours (reference profile). What a request
asks for beyond that is ignored, unless it would make it another thing than a device's certificate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from libs.errors import InvalidArgumentError
from services.pki.certificates import Problem

CURVES: Final = (ec.SECP256R1, ec.SECP384R1)
_WEAK_HASHES: Final = (hashes.MD5, hashes.SHA1)


def parse(der: bytes) -> x509.CertificateSigningRequest:
    """A request all of whose parts can be read."""
    try:
        request = x509.load_der_x509_csr(der)
        _ = request.subject, request.extensions, request.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise InvalidArgumentError("CSR_MALFORMED", "this is not a readable PKCS#10 request", field="csr_der") from None
    return request


def digest_of(der: bytes) -> str:
    """Lowercase hex SHA-256 of a request: with the device, what makes a repeat the same request."""
    return hashlib.sha256(der).hexdigest()


def spki_fingerprint_of(request: x509.CertificateSigningRequest) -> str:
    """Lowercase hex SHA-256 of the subject public key info."""
    spki = request.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(spki).hexdigest()


def device_uri(deployment: str, organization: str, product: str, device: str) -> str:
    """The one URI of a device's certificate."""
    return f"urn:{deployment}:org:{organization}:product:{product}:device:{device}"


def check(request: x509.CertificateSigningRequest, common_name: str, uri: str) -> None:
    """Raise the first rule that is broken."""
    problem = next(iter(_rules(request, common_name, uri)), None)
    if problem is not None:
        raise InvalidArgumentError(problem.reason, problem.message, field="csr_der")


def _rules(request: x509.CertificateSigningRequest, common_name: str, uri: str) -> Iterable[Problem]:
    key = request.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        yield Problem("CSR_KEY_TYPE", "the key must be an elliptic curve key: use EC P-256")
    elif not isinstance(key.curve, CURVES):
        yield Problem("CSR_KEY_SIZE", f"the curve {key.curve.name} is not allowed: use EC P-256 or P-384")
    try:
        if isinstance(request.signature_hash_algorithm, _WEAK_HASHES):
            yield Problem("CSR_WEAK_SIGNATURE", "the request is signed with SHA-1 or weaker")
        valid = request.is_signature_valid
    except UnsupportedAlgorithm:
        valid = False
    if not valid:
        yield Problem("CSR_SIGNATURE", "the request is not signed by the key that it names")
    names = [str(part.value) for part in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [common_name]:
        yield Problem(
            "CSR_SUBJECT_MISMATCH", f"the request's common name must be the device's own, {common_name!r}, and only it"
        )
    yield from _extension_rules(request, uri)


def _extension_rules(request: x509.CertificateSigningRequest, uri: str) -> Iterable[Problem]:
    for extension in request.extensions:
        value = extension.value
        if isinstance(value, x509.BasicConstraints) and value.ca:
            yield Problem("CSR_ASKS_FOR_CA", "a device's certificate is not a CA")
        if isinstance(value, x509.KeyUsage) and (value.key_cert_sign or value.crl_sign):
            yield Problem("CSR_ASKS_FOR_CA", "a device's certificate signs no others")
        if isinstance(value, x509.SubjectAlternativeName):
            others = [name for name in value.get_values_for_type(x509.UniformResourceIdentifier) if name != uri]
            if others:
                yield Problem("CSR_URI_MISMATCH", f"the request may name one URI, {uri}, or none")
