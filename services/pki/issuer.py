"""Keys of issuing CAs and what is signed with them. The only place where such a key is in memory.

A key is made by the key store and stays there; what leaves this module are certificates. Profile: reference page on
pki, section 4.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from groundswell.pki.v1 import pki_pb2

from libs.keystore import KeyStore
from libs.names import last_segment, organization_of
from services.pki.model import ISSUING_CA_DAYS, milliseconds
from services.pki.rotation import key_name

BACKDATE: Final = timedelta(minutes=5)
"""Devices' and gateways' clocks differ a little."""


def _new_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class Issuer:
    """Signs as the issuing CAs."""

    def __init__(self, keystore: KeyStore, deployment: str) -> None:
        self._keystore = keystore
        self.deployment: Final = deployment

    def make_ca(self, name: str, days: int, now_ms: int) -> bytes:
        """DER of a self-signed certificate for an issuing CA; its key is made at the first call for its name."""
        key = self._key(name)
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization_of(name)),
                x509.NameAttribute(NameOID.COMMON_NAME, f"Groundswell issuing CA {last_segment(name)}"),
            ]
        )
        now = datetime.fromtimestamp(now_ms / 1000, UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(now + timedelta(days=days or ISSUING_CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.DER)

    def sign(
        self,
        issuing: pki_pb2.IssuingCa,
        request: x509.CertificateSigningRequest,
        common_name: str,
        uri: str,
        now_ms: int,
        validity_ms: int,
    ) -> bytes:
        """DER of a device's certificate. It never outlives its CA."""
        key = self._key(issuing.name)
        ca = x509.load_der_x509_certificate(issuing.der)
        public = request.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise TypeError("requests are checked before they are signed")
        now = datetime.fromtimestamp(now_ms / 1000, UTC)
        end = datetime.fromtimestamp(min(now_ms + validity_ms, milliseconds(issuing.not_after)) / 1000, UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(ca.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.DER)

    def _key(self, name: str) -> ec.EllipticCurvePrivateKey:
        sealed = self._keystore.get_or_create(key_name(name), _new_key)
        key = serialization.load_der_private_key(sealed, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError("issuing CA keys are EC keys")
        return key


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
