from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from deploy.local.credentials import ensure_all
from deploy.local.errors import StackError
from deploy.local.settings import IDENTITIES, load


def _read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_each_identity_has_a_certificate_of_its_own(tmp_path: Path) -> None:
    settings = load({}, tmp_path)
    ensure_all(settings)
    ca = _read(settings.tls_dir / "ca.pem")
    for name in IDENTITIES:
        certificate = _read(settings.tls_dir / f"{name}.pem")
        certificate.verify_directly_issued_by(ca)
        assert isinstance(key := certificate.public_key(), ec.EllipticCurvePublicKey)
        assert isinstance(key.curve, ec.SECP256R1)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"spiffe://local/service/{name}"]
        assert "localhost" in names.get_values_for_type(x509.DNSName)
        assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}


def test_what_is_secret_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    settings = load({}, tmp_path)
    ensure_all(settings)
    secret = [
        *settings.tls_dir.glob("*.key"),
        settings.keystore_dir / "kek",
        settings.bootstrap_secret,
        settings.local_dir / "s3.json",
    ]
    assert len(secret) == len(IDENTITIES) + 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}


def test_a_second_start_changes_nothing(tmp_path: Path) -> None:
    settings = load({}, tmp_path)
    first = ensure_all(settings)
    before = {path: path.read_bytes() for path in settings.local_dir.rglob("*") if path.is_file()}
    assert ensure_all(settings) == first
    assert {path: path.read_bytes() for path in settings.local_dir.rglob("*") if path.is_file()} == before


def test_another_trust_domain_gets_new_certificates(tmp_path: Path) -> None:
    ensure_all(load({}, tmp_path))
    settings = load({"GROUNDSWELL_DEPLOYMENT": "other"}, tmp_path)
    ensure_all(settings)
    names = _read(settings.tls_dir / "pki.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://other/service/pki"]


def test_a_damaged_certificate_is_replaced(tmp_path: Path) -> None:
    settings = load({}, tmp_path)
    ensure_all(settings)
    (settings.tls_dir / "pki.pem").write_text("not a certificate")
    ensure_all(settings)
    _read(settings.tls_dir / "pki.pem").verify_directly_issued_by(_read(settings.tls_dir / "ca.pem"))


def test_somebody_elses_s3_needs_its_credentials(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="GROUNDSWELL_S3_ACCESS_KEY"):
        ensure_all(load({"GROUNDSWELL_S3_ENDPOINT": "http://127.0.0.1:9"}, tmp_path))
