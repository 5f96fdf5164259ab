"""Development certificates and secrets, made at first start and never committed.

Each service has an identity of its own even on a laptop, so that a missing authorization rule shows there and not in
production. The material is replaced only when it is missing or about to expire: services hold it open.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.local.errors import StackError
from deploy.local.files import private_directory, write
from deploy.local.settings import IDENTITIES, Settings

_CA_DAYS = 3650
_LEAF_DAYS = 397
_RENEW_BEFORE = datetime.timedelta(days=14)
_BACKDATE = datetime.timedelta(minutes=5)
_KEK_BYTES = 32


class S3Credentials(msgspec.Struct, frozen=True):
    """What services sign S3 requests with."""

    access_key: str
    secret_key: str


@dataclass(frozen=True, slots=True)
class _Issuer:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def ensure_all(settings: Settings) -> S3Credentials:
    """Make whatever is missing. Safe to repeat."""
    private_directory(settings.local_dir)
    ensure_certificates(settings)
    private_directory(settings.keystore_dir)
    _ensure_file(settings.keystore_dir / "kek", lambda: os.urandom(_KEK_BYTES))
    _ensure_file(settings.bootstrap_secret, lambda: secrets.token_urlsafe(32).encode())
    return s3_credentials(settings)


def s3_credentials(settings: Settings) -> S3Credentials:
    """The given credentials, or the ones made for this stack."""
    given = (
        settings.overrides.get("GROUNDSWELL_S3_ACCESS_KEY"),
        settings.overrides.get("GROUNDSWELL_S3_SECRET_KEY"),
    )
    if given[0] and given[1]:
        return S3Credentials(given[0], given[1])
    if settings.is_external("GROUNDSWELL_S3_ENDPOINT"):
        raise StackError(
            "GROUNDSWELL_S3_ENDPOINT is set: set GROUNDSWELL_S3_ACCESS_KEY and GROUNDSWELL_S3_SECRET_KEY too"
        )
    path = settings.local_dir / "s3.json"
    made = S3Credentials(secrets.token_hex(10), secrets.token_hex(20))
    _ensure_file(path, lambda: msgspec.json.encode(made))
    return msgspec.json.decode(path.read_bytes(), type=S3Credentials)


def ensure_certificates(settings: Settings) -> None:
    """A development CA and one certificate an identity."""
    if settings.is_external("GROUNDSWELL_TLS_DIR"):
        return
    folder = private_directory(settings.tls_dir)
    issuer = _load_issuer(folder) or _make_issuer(folder, settings)
    for name in IDENTITIES:
        if not _is_current(folder, name, issuer, settings):
            _issue(folder, name, issuer, settings)


def renew_certificates(settings: Settings, *, new_ca: bool = False, forget_old_ca: bool = False) -> list[str]:
    """Every identity gets a new certificate, on request from a new CA; running processes take them by themselves.

    With a new CA the old one stays an anchor (`ca.pem` holds both), so that no order of taking them shuts anybody out.
    Once all have taken them, another run with ``forget_old_ca`` leaves only the new one.
    """
    if settings.is_external("GROUNDSWELL_TLS_DIR"):
        raise StackError("GROUNDSWELL_TLS_DIR is set: its certificates are not made here")
    folder = settings.tls_dir
    issuer = _load_issuer(folder)
    if issuer is None:
        raise StackError(f"there is no usable CA in {folder}: `make up` makes one")
    before = b"" if forget_old_ca else _pem(issuer.certificate)
    if new_ca:
        issuer = _make_issuer(folder, settings, also=before)
    elif forget_old_ca:
        write(folder / "ca.pem", _pem(issuer.certificate), mode=0o644)
    for name in IDENTITIES:
        _issue(folder, name, issuer, settings)
    return list(IDENTITIES)


def spiffe_id(deployment: str, name: str) -> str:
    """How a service is named in its certificate."""
    return f"spiffe://{deployment}/service/{name}"


def _load_issuer(folder: Path) -> _Issuer | None:
    try:
        certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    except (OSError, ValueError):
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or _is_old(certificate):
        return None
    return _Issuer(certificate, key)


def _make_issuer(folder: Path, settings: Settings, also: bytes = b"") -> _Issuer:
    key = ec.generate_private_key(ec.SECP256R1())
    # A name of its own: two CAs of one name beside each other are told apart by luck.
    common_name = f"Groundswell development CA ({settings.deployment}, {secrets.token_hex(4)})"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    certificate = (
        _builder(name, name, key.public_key(), _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_pair(folder, "ca", certificate, key, also)
    return _Issuer(certificate, key)


def _issue(folder: Path, name: str, issuer: _Issuer, settings: Settings) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(spiffe_id(settings.deployment, name)),
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    if name == "gateway":
        domain = settings.environment["GROUNDSWELL_GATEWAY_DOMAIN"]
        names += [x509.DNSName(domain), x509.DNSName(f"*.{domain}")]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer_key = issuer.key.public_key()
    certificate = (
        _builder(subject, issuer.certificate.subject, key.public_key(), _LEAF_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
        .sign(issuer.key, hashes.SHA256())
    )
    _write_pair(folder, name, certificate, key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _is_current(folder: Path, name: str, issuer: _Issuer, settings: Settings) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate((folder / f"{name}.pem").read_bytes())
        certificate.verify_directly_issued_by(issuer.certificate)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except Exception:  # noqa: BLE001 - whatever is wrong with it, the answer is a new one
        return False
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return (
        (folder / f"{name}.key").exists()
        and not _is_old(certificate)
        and uris == [spiffe_id(settings.deployment, name)]
    )


def _is_old(certificate: x509.Certificate) -> bool:
    return certificate.not_valid_after_utc - _RENEW_BEFORE < datetime.datetime.now(datetime.UTC)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_pair(
    folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, also: bytes = b""
) -> None:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write(folder / f"{name}.key", pem)
    write(folder / f"{name}.pem", _pem(certificate) + also, mode=0o644)


def _ensure_file(path: Path, make: Callable[[], bytes]) -> None:
    if not path.exists():
        write(path, make())
