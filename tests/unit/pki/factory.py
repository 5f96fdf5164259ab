"""A small certificate factory: every part of a certificate can be made wrong."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
DAY = timedelta(days=1)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def name_of(*common_names: str, organization: str = "") -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in common_names]
    if organization:
        parts.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    return x509.Name(parts)


def usage(*, sign: bool, digital: bool = True) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital,
        content_commitment=False,
        key_encipherment=not sign and not digital,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign,
        crl_sign=sign,
        encipher_only=False,
        decipher_only=False,
    )


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


class Ca:
    """A CA and what it signs."""

    def __init__(
        self,
        subject: str = "Factory CA",
        *,
        key: Key | None = None,
        basic: bool | None = True,
        sign: bool = True,
        begin: timedelta = -DAY,
        end: timedelta = 3650 * DAY,
        key_id: bytes | None = None,
        name: x509.Name | None = None,
    ) -> None:
        self.key = key or new_key()
        self.name = name if name is not None else name_of(subject)
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(self.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begin)
            .not_valid_after(now + end)
            .add_extension(usage(sign=sign), critical=True)
        )
        identifier = x509.SubjectKeyIdentifier.from_public_key(self.key.public_key())
        self.key_id = key_id or identifier.digest
        builder = builder.add_extension(x509.SubjectKeyIdentifier(self.key_id), critical=False)
        if basic is not None:
            builder = builder.add_extension(x509.BasicConstraints(ca=basic, path_length=None), critical=True)
        self.certificate = builder.sign(self.key, hashes.SHA256())

    @property
    def pem(self) -> str:
        return pem(self.certificate)

    def leaf(
        self,
        *common_names: str,
        key: Key | None = None,
        begin: timedelta = -DAY,
        end: timedelta = 100 * DAY,
        extended: Sequence[x509.ObjectIdentifier] | None = (ExtendedKeyUsageOID.CLIENT_AUTH,),
        basic: bool = False,
        digital: bool = True,
        uris: Sequence[str] = (),
        critical: str = "",
        authority: bool = True,
        signer: Key | None = None,
        now: datetime | None = None,
    ) -> x509.Certificate:
        now = now or datetime.now(UTC)
        subject_key = key or new_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(name_of(*common_names))
            .issuer_name(self.name)
            .public_key(subject_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begin)
            .not_valid_after(now + end)
            .add_extension(x509.BasicConstraints(ca=basic, path_length=None), critical=True)
            .add_extension(usage(sign=basic, digital=digital), critical=True)
        )
        if extended is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(extended), critical=False)
        if uris:
            names = [x509.UniformResourceIdentifier(uri) for uri in uris]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if critical:
            unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier(critical), b"\x05\x00")
            builder = builder.add_extension(unknown, critical=True)
        if authority:
            builder = builder.add_extension(x509.AuthorityKeyIdentifier(self.key_id, None, None), critical=False)
        return builder.sign(signer or self.key, hashes.SHA256())

    def proof(self, code: str) -> str:
        return pem(self.leaf(code))


def csr(
    common_name: str,
    key: Key | ed25519.Ed25519PrivateKey | None = None,
    *,
    uris: Sequence[str] = (),
    ca: bool = False,
    digest: hashes.HashAlgorithm | None = None,
) -> bytes:
    """DER of a signing request."""
    key = key or new_key()
    builder = x509.CertificateSigningRequestBuilder().subject_name(name_of(*([common_name] if common_name else [])))
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else digest or hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)


def with_sha1(certificate: x509.Certificate, signer: Key) -> x509.Certificate:
    """The same certificate, signed by an RSA key with SHA-1, which no builder does any more."""
    if not isinstance(signer, rsa.RSAPrivateKey):
        raise TypeError("RSA is needed: its two algorithm identifiers have the same length")
    sha256, sha1 = bytes.fromhex("2a864886f70d01010b"), bytes.fromhex("2a864886f70d010105")
    tbs = certificate.tbs_certificate_bytes.replace(sha256, sha1)
    signature = signer.sign(tbs, padding.PKCS1v15(), hashes.SHA1())  # noqa: S303 - what must be refused
    raw = der(certificate).replace(certificate.tbs_certificate_bytes, tbs)
    raw = raw.replace(certificate.signature, signature)
    return x509.load_der_x509_certificate(raw.replace(sha256, sha1))
