"""The factory, outside the server: a CA of its own, proofs of possession, and a key and certificate for each device."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


def _write_secret(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


@dataclass(frozen=True, slots=True)
class Identity:
    """Files of a certificate and its key."""

    certificate: Path
    key: Path


class Factory:
    """An EC P-256 CA that signs device leaves by the profile of docs (CN = device id, clientAuth)."""

    def __init__(self, name: str, directory: Path, *, days: int = 3650, start: datetime | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.signing_key: Final = ec.generate_private_key(ec.SECP256R1())
        begin = start or datetime.now(UTC) - timedelta(minutes=5)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(name))
            .public_key(self.signing_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.signing_key.public_key()), critical=False)
            .sign(self.signing_key, hashes.SHA256())
        )
        self.certificate_file = directory / "ca.pem"
        self.certificate_file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def proof(self, code: str) -> Path:
        """A verification certificate whose common name is the server's code."""
        return self._leaf(code, "proof", timedelta(days=1)).certificate

    def device(
        self, device_id: str, *, valid: timedelta = timedelta(days=365), start: datetime | None = None
    ) -> Identity:
        """Key and certificate of a device."""
        return self._leaf(device_id, device_id, valid, start)

    def _leaf(self, common_name: str, file: str, valid: timedelta, start: datetime | None = None) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        begin = start or datetime.now(UTC) - timedelta(minutes=5)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.signing_key.public_key())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(common_name))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + valid)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(authority, critical=False)
            .sign(self.signing_key, hashes.SHA256())
        )
        identity = Identity(self._directory / f"{file}.pem", self._directory / f"{file}.key")
        identity.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        _write_secret(identity.key, _key_pem(key))
        return identity


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def server_identity(directory: Path) -> tuple[Identity, Path]:
    """A private CA and an HTTPS certificate for 127.0.0.1, for the webhook receiver: (identity, CA file)."""
    directory.mkdir(parents=True, exist_ok=True)
    factory = Factory("receiver CA", directory)
    key = ec.generate_private_key(ec.SECP256R1())
    begin = datetime.now(UTC) - timedelta(minutes=5)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(factory.signing_key.public_key())
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name("receiver"))
        .issuer_name(factory.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(authority, critical=False)
        .add_extension(names, critical=False)
        .sign(factory.signing_key, hashes.SHA256())
    )
    identity = Identity(directory / "receiver.pem", directory / "receiver.key")
    identity.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    _write_secret(identity.key, _key_pem(key))
    return identity, factory.certificate_file
