"""Every kind of wrong certificate has its own reason."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from libs.errors import InvalidArgumentError
from services.pki import certificates as c
from tests.unit.pki.factory import DAY, Ca, name_of, new_key, pem, with_sha1

FACTORY = Ca()
NOW = time.time_ns() // 1_000_000
RSA = rsa.generate_private_key(65537, 2048)
SHORT = rsa.generate_private_key(65537, 1024)  # noqa: S505 - what must be refused
RSA_CA = Ca("RSA CA", key=RSA)


def leaf_reason(leaf: x509.Certificate) -> str:
    problem = c.leaf_problem(leaf, NOW, organization="acme", product="thermostat")
    return problem.reason if problem else ""


LEAVES: dict[str, tuple[Callable[[], x509.Certificate], str]] = {
    "good": (lambda: FACTORY.leaf("SN-0042"), ""),
    "own urn": (lambda: FACTORY.leaf("SN-1", uris=["urn:local:org:acme:product:thermostat:device:SN-1"]), ""),
    "foreign uri": (lambda: FACTORY.leaf("SN-1", uris=["https://example.com/SN-1"]), ""),
    "any purpose beside client": (
        lambda: FACTORY.leaf("SN-1", extended=[ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
        "",
    ),
    "expired": (lambda: FACTORY.leaf("SN-1", begin=-2 * DAY, end=-DAY), "CERTIFICATE_EXPIRED"),
    "not yet valid": (lambda: FACTORY.leaf("SN-1", begin=DAY), "CERTIFICATE_NOT_YET_VALID"),
    "server only": (lambda: FACTORY.leaf("SN-1", extended=[ExtendedKeyUsageOID.SERVER_AUTH]), "CERTIFICATE_EKU"),
    "no usage": (lambda: FACTORY.leaf("SN-1", extended=None), "CERTIFICATE_EKU_MISSING"),
    "key usage": (lambda: FACTORY.leaf("SN-1", digital=False), "CERTIFICATE_KEY_USAGE"),
    "a CA": (lambda: FACTORY.leaf("SN-1", basic=True), "CERTIFICATE_IS_CA"),
    "the CA itself": (lambda: FACTORY.certificate, "CERTIFICATE_IS_CA"),
    "SHA-1": (lambda: with_sha1(RSA_CA.leaf("SN-1"), RSA), "CERTIFICATE_WEAK_SIGNATURE"),
    "short RSA": (lambda: FACTORY.leaf("SN-1", key=SHORT), "CERTIFICATE_WEAK_KEY"),
    "small curve": (
        lambda: FACTORY.leaf("SN-1", key=ec.generate_private_key(ec.SECP224R1())),
        "CERTIFICATE_WEAK_KEY",
    ),
    "critical": (lambda: FACTORY.leaf("SN-1", critical="1.2.3.4"), "CERTIFICATE_CRITICAL_EXTENSION"),
    "no name": (FACTORY.leaf, "COMMON_NAME_MISSING"),
    "two names": (lambda: FACTORY.leaf("SN-1", "SN-2"), "COMMON_NAME_AMBIGUOUS"),
    "NUL": (lambda: FACTORY.leaf("SN-1\0.evil"), "COMMON_NAME_CONTROL_CHARACTER"),
    "newline": (lambda: FACTORY.leaf("SN-1\n"), "COMMON_NAME_CONTROL_CHARACTER"),
    "right to left": (lambda: FACTORY.leaf("SN-\u202e1"), "COMMON_NAME_CONTROL_CHARACTER"),
    "unicode": (lambda: FACTORY.leaf("SN-é"), "COMMON_NAME_INVALID"),
    "path": (lambda: FACTORY.leaf("../SN"), "COMMON_NAME_INVALID"),
    "two URIs": (lambda: FACTORY.leaf("SN-1", uris=["urn:a:b", "urn:a:c"]), "SUBJECT_URIS"),
    "other organization": (
        lambda: FACTORY.leaf("SN-1", uris=["urn:local:org:beta:product:thermostat:device:SN-1"]),
        "SUBJECT_URI_MISMATCH",
    ),
    "other device": (
        lambda: FACTORY.leaf("SN-1", uris=["urn:local:org:acme:product:thermostat:device:SN-2"]),
        "SUBJECT_URI_MISMATCH",
    ),
}


@pytest.mark.parametrize("case", LEAVES)
def test_t49_leaves(case: str) -> None:
    make, expected = LEAVES[case]
    assert leaf_reason(make()) == expected


CAS: dict[str, tuple[Callable[[], x509.Certificate], str]] = {
    "good": (lambda: FACTORY.certificate, ""),
    "RSA": (lambda: RSA_CA.certificate, ""),
    "not a CA": (lambda: Ca(basic=False).certificate, "CA_NOT_A_CA"),
    "no basic constraints": (lambda: Ca(basic=None).certificate, "CA_NOT_A_CA"),
    "key usage": (lambda: Ca(sign=False).certificate, "CA_KEY_USAGE"),
    "expired": (lambda: Ca(begin=-2 * DAY, end=-DAY).certificate, "CA_EXPIRED"),
    "not yet valid": (lambda: Ca(begin=DAY).certificate, "CA_NOT_YET_VALID"),
    "short RSA": (lambda: Ca(key=SHORT).certificate, "CA_WEAK_KEY"),
    "SHA-1": (lambda: with_sha1(RSA_CA.certificate, RSA), "CA_WEAK_SIGNATURE"),
    "no subject": (lambda: Ca(name=x509.Name([])).certificate, "CA_SUBJECT_EMPTY"),
}


@pytest.mark.parametrize("case", CAS)
def test_cas(case: str) -> None:
    make, expected = CAS[case]
    problem = c.ca_problem(make(), NOW)
    assert (problem.reason if problem else "") == expected


PROOFS: dict[str, tuple[Callable[[], x509.Certificate], str]] = {
    "good": (lambda: FACTORY.leaf("code"), ""),
    "signed by another key": (lambda: FACTORY.leaf("code", signer=new_key()), "PROOF_NOT_SIGNED_BY_CA"),
    "of another CA": (lambda: RSA_CA.leaf("code"), "PROOF_NOT_SIGNED_BY_CA"),
    "a CA": (lambda: FACTORY.leaf("code", basic=True), "PROOF_IS_CA"),
    "the CA itself": (lambda: FACTORY.certificate, "PROOF_IS_CA"),
    "expired": (lambda: FACTORY.leaf("code", begin=-2 * DAY, end=-DAY), "PROOF_EXPIRED"),
    "not yet valid": (lambda: FACTORY.leaf("code", begin=DAY), "PROOF_NOT_YET_VALID"),
}


@pytest.mark.parametrize("case", PROOFS)
def test_proofs(case: str) -> None:
    make, expected = PROOFS[case]
    problem = c.proof_problem(make(), FACTORY.certificate, NOW)
    assert (problem.reason if problem else "") == expected


def test_a_proof_with_sha1_is_refused() -> None:
    problem = c.proof_problem(with_sha1(RSA_CA.leaf("code"), RSA), RSA_CA.certificate, NOW)
    assert problem is not None
    assert problem.reason == "PROOF_WEAK_SIGNATURE"


def test_codes_of_a_proof() -> None:
    code = "ab" * 32
    assert c.proof_codes(FACTORY.leaf(code)) == {code}
    assert code in c.proof_codes(FACTORY.leaf("x", uris=[f"urn:nerveshub:verify:{code}"]))
    assert c.proof_codes(FACTORY.leaf("x", uris=["urn:nerveshub:verify:short"])) == {"x"}


def test_validity_has_its_edges_inside() -> None:
    leaf = FACTORY.leaf("SN-1", begin=timedelta(0), end=timedelta(days=1))
    begin = int(leaf.not_valid_before_utc.timestamp() * 1000)
    end = int(leaf.not_valid_after_utc.timestamp() * 1000)
    reasons = []
    for at in (begin - 1, begin, end, end + 1):
        problem = c.leaf_problem(leaf, at, organization="acme", product="thermostat")
        reasons.append(problem.reason if problem else "")
    assert reasons == ["CERTIFICATE_NOT_YET_VALID", "", "", "CERTIFICATE_EXPIRED"]


def test_an_issuer_is_named_and_has_signed() -> None:
    leaf = FACTORY.leaf("SN-1")
    twin = Ca()  # the same subject, another key
    copy = Ca(key_id=FACTORY.key_id)  # subject and key id copied
    assert c.names_as_issuer(leaf, FACTORY.certificate)
    assert c.is_issued_by(leaf, FACTORY.certificate)
    assert not c.names_as_issuer(leaf, twin.certificate)
    assert c.names_as_issuer(leaf, copy.certificate)
    assert not c.is_issued_by(leaf, copy.certificate)
    assert c.names_as_issuer(FACTORY.leaf("SN-1", authority=False), twin.certificate)


def test_names_that_tls_takes_for_equal_are_equal() -> None:
    assert c.canonical_name(name_of("Factory  CA ")) == c.canonical_name(name_of("factory ca"))
    assert c.canonical_name(name_of("a", "b")) != c.canonical_name(name_of("b", "a"))
    assert c.canonical_name(name_of("a/2.5.4.3=b")) != c.canonical_name(name_of("a", "b"))


@pytest.mark.parametrize("text", ["", "x", pem(FACTORY.certificate) * 2, pem(FACTORY.certificate)[:200]])
def test_what_is_not_one_certificate_is_malformed(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        c.parse_pem(text, "certificate_pem")
    assert refused.value.reason == "CERTIFICATE_MALFORMED"
    with pytest.raises(InvalidArgumentError):
        c.parse_der(b"\x30\x03\x02\x01")
