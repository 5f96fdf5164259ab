"""Issuing CAs, and certificates in two phases: announced, confirmed by their first use, or lapsed."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from google.protobuf.duration_pb2 import Duration
from groundswell.pki.v1 import events_pb2, pki_pb2

from services.pki import requests
from services.pki.model import MAX_ISSUANCES, ROTATION_LIFE_MS, Issuing, Leaf
from tests.unit.pki.factory import DAY, Ca, csr, new_key
from tests.unit.pki.world import ORG, World, both, context, refused, running

URI = "urn:local:org:acme:product:thermostat:device:SN-1"


async def enrolled(world: World) -> pki_pb2.DeviceCertificate:
    """A device with a factory certificate, in an organization with an issuing CA."""
    ca = Ca()
    await world.register(ca)
    await world.issuing_ca()
    return await world.admit(ca.leaf("SN-1"))


# Issuing CAs.


async def test_an_issuing_ca_is_made_with_a_key_that_is_in_no_log() -> None:
    async with running() as world:
        made = await world.issuing_ca(days=100)
        certificate = x509.load_der_x509_certificate(made.der)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
        assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == timedelta(days=100, minutes=5)
        certificate.verify_directly_issued_by(certificate)
        assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
        key = world.keystore.get("issuing-ca.acme.one")
        assert key is not None
        written = b"".join(
            record.value
            for topic in ("t.pki.events.v1", "t.pki.public.v1")
            for partition in range(4)
            for record in world.log.records(topic, partition)
        )
        assert made.der in written
        assert key not in written
        private = load_der_private_key(key, None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert private.private_numbers().private_value.to_bytes(32, "big") not in written
        assert world.told(events_pb2.IssuingCaChanged) == [("issuing_ca.created", "one")]


async def test_there_is_one_that_signs_and_a_rotation_keeps_the_old_one_as_an_anchor() -> None:
    async with running() as world:
        first = await world.issuing_ca("one")
        assert await refused(world.issuing_ca("two")) == "ISSUING_CA_EXISTS"
        assert await refused(world.issuing_ca("one")) == "ALREADY_EXISTS"
        assert world.keystore.get("issuing-ca.acme.two") is None, "what is refused makes no key"
        assert await refused(world.rotate(first.name, "two", etag="7")) == "ETAG_MISMATCH"
        assert await refused(world.rotate(f"{ORG}/issuingCas/none", "two")) == "RESOURCE_NOT_FOUND"
        second = await world.rotate(first.name, "two", etag=first.etag)
        old = world.state().issuing[first.name]
        assert (old.state, old.replaced_by) == (Issuing.STATE_RETIRING, second.name)
        assert second.state == Issuing.STATE_ACTIVE
        assert await refused(world.rotate(first.name, "three")) == "WRONG_STATE"
        listed = await world.public.ListIssuingCas(
            pki_pb2.ListIssuingCasRequest(parent=ORG, filter="state = STATE_ACTIVE"), context()
        )
        assert [one.name for one in listed.issuing_cas] == [second.name]
        request = pki_pb2.GetIssuingCaRequest(name=f"{ORG}/issuingCas/none")
        assert await refused(world.public.GetIssuingCa(request, context())) == "RESOURCE_NOT_FOUND"


async def test_a_retry_of_a_creation_is_the_same_creation() -> None:
    async with running() as world:
        request = pki_pb2.CreateIssuingCaRequest(
            parent=ORG, issuing_ca_id="one", request_id="5b5c9c2e-6b0e-4a53-9a0e-9f4a3c1d2e3f"
        )
        first = await world.public.CreateIssuingCa(request, context())
        before = world.written()
        assert await world.public.CreateIssuingCa(request, context()) == first
        assert world.written() == before


async def test_an_issuing_ca_expires_and_another_may_be_made() -> None:
    async with running() as world:
        first = await world.issuing_ca("one", days=10)
        world.clock.ahead_ms += 11 * 24 * 3600 * 1000
        await world.until(lambda: world.state().issuing[first.name].expired)
        await world.issuing_ca("two")


async def test_a_customers_ca_may_not_have_the_subject_of_an_issuing_ca() -> None:
    async with running() as world:
        made = await world.issuing_ca()
        subject = x509.load_der_x509_certificate(made.der).subject
        assert await refused(world.register(Ca(name=subject))) == "CA_SUBJECT_CONFLICT"


# Issuing.


async def test_a_certificate_has_the_profile_and_waits_for_its_first_use() -> None:
    async with running() as world:
        await world.policy(validity=Duration(seconds=90 * 24 * 3600))
        current = await enrolled(world)
        key = new_key()
        issued = await world.issue(current, csr("SN-1", key))
        leaf = x509.load_der_x509_certificate(issued.der)
        anchor = x509.load_der_x509_certificate(world.state().issuing[issued.issuing_ca].der)
        leaf.verify_directly_issued_by(anchor)
        assert leaf.public_key() == key.public_key()
        assert [part.value for part in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == ["SN-1"]
        get = leaf.extensions.get_extension_for_class
        assert get(x509.BasicConstraints).critical
        assert not get(x509.BasicConstraints).value.ca
        assert get(x509.KeyUsage).critical
        assert get(x509.KeyUsage).value.digital_signature
        assert not get(x509.KeyUsage).value.key_cert_sign
        assert list(get(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
        names = get(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [URI]
        authority = get(x509.AuthorityKeyIdentifier).value.key_identifier
        assert authority == anchor.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
        assert get(x509.SubjectKeyIdentifier).value
        assert leaf.serial_number.bit_length() > 100
        assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(days=90, minutes=5)
        assert issued.state == Leaf.STATE_NEXT
        assert (issued.device, issued.device_uid) == (current.device, current.device_uid)
        assert issued.supersedes == current.name
        assert world.now(current).state == Leaf.STATE_ACTIVE
        assert world.told()[-1] == ("certificate.issued", "SN-1")


async def test_it_never_outlives_its_ca() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        made = await world.issuing_ca(days=30)
        issued = await world.issue(await world.admit(ca.leaf("SN-1")), csr("SN-1"))
        assert issued.not_after.seconds == made.not_after.seconds


def _forged() -> bytes:
    raw = bytearray(csr("SN-1"))
    raw[-1] ^= 1
    return bytes(raw)


REQUESTS = {
    "garbage": (lambda: b"0\x03\x02\x01\x01", "CSR_MALFORMED"),
    "RSA": (lambda: csr("SN-1", rsa.generate_private_key(65537, 2048)), "CSR_KEY_TYPE"),
    "Ed25519": (lambda: csr("SN-1", ed25519.Ed25519PrivateKey.generate()), "CSR_KEY_TYPE"),
    "small curve": (lambda: csr("SN-1", ec.generate_private_key(ec.SECP224R1())), "CSR_KEY_SIZE"),
    "another curve": (lambda: csr("SN-1", ec.generate_private_key(ec.SECP256K1())), "CSR_KEY_SIZE"),
    "not its own key": (_forged, "CSR_SIGNATURE"),
    "another device": (lambda: csr("SN-2"), "CSR_SUBJECT_MISMATCH"),
    "no name": (lambda: csr(""), "CSR_SUBJECT_MISMATCH"),
    "another case": (lambda: csr("sn-1"), "CSR_SUBJECT_MISMATCH"),
    "a CA": (lambda: csr("SN-1", ca=True), "CSR_ASKS_FOR_CA"),
    "another URI": (lambda: csr("SN-1", uris=[URI.replace("acme", "beta")]), "CSR_URI_MISMATCH"),
}


@pytest.mark.parametrize("case", REQUESTS)
async def test_a_bad_request_is_refused_with_its_own_reason_and_writes_nothing(case: str) -> None:
    make, expected = REQUESTS[case]
    async with running() as world:
        current = await enrolled(world)
        before = world.written()
        assert await refused(world.issue(current, make())) == expected
        assert world.written() == before


def test_its_own_uri_and_p384_are_fine() -> None:
    request = requests.parse(csr("SN-1", ec.generate_private_key(ec.SECP384R1()), uris=[URI]))
    requests.check(request, "SN-1", URI)


async def test_without_an_issuing_ca_nothing_is_issued() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        current = await world.admit(ca.leaf("SN-1"))
        assert await refused(world.issue(current, csr("SN-1"))) == "ISSUING_CA_MISSING"


async def test_who_asks_must_have_a_certificate_in_force() -> None:
    async with running() as world:
        current = await enrolled(world)
        stranger = pki_pb2.DeviceCertificate(fingerprint="0" * 64)
        assert await refused(world.issue(stranger, csr("SN-1"))) == "RESOURCE_NOT_FOUND"
        announced = await world.issue(current, csr("SN-1"))
        assert await refused(world.issue(announced, csr("SN-1"))) == "CERTIFICATE_NOT_IN_FORCE"
        await world.public.SuspendCaCertificate(
            pki_pb2.SuspendCaCertificateRequest(name=current.ca_certificate), context()
        )
        assert await refused(world.issue(current, csr("SN-1"))) == "CA_SUSPENDED"


async def test_a_first_enrolment_is_for_factory_certificates_only() -> None:
    async with running() as world:
        current = await enrolled(world)
        issued = await world.issue(current, csr("SN-1"), first=True)
        await world.connect(issued)
        assert await refused(world.issue(issued, csr("SN-1"), first=True)) == "ALREADY_ENROLLED"
        await world.issue(issued, csr("SN-1"))


# Two phases.


async def test_the_first_use_confirms_and_retires_the_old_one() -> None:
    async with running() as world:
        current = await enrolled(world)
        issued = await world.issue(current, csr("SN-1"))
        assert (await world.connect(issued)).state == Leaf.STATE_ACTIVE
        old = world.now(current)
        assert (old.state, old.reason) == (Leaf.STATE_RETIRED, "CERTIFICATE_SUPERSEDED")
        assert [change for change, _ in world.told()][-2:] == ["certificate.superseded", "certificate.confirmed"]
        before = world.written()
        await world.connect(issued)
        assert world.written() == before, "a second connection is a connection"


async def test_the_old_one_is_refused_after_the_confirmation_and_not_before() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        await world.issuing_ca()
        factory = ca.leaf("SN-1")
        current = await world.admit(factory)
        issued = await world.issue(current, csr("SN-1"))
        assert (await world.admit(factory)).state == Leaf.STATE_ACTIVE
        await world.connect(issued)
        assert await refused(world.admit(factory)) == "CERTIFICATE_SUPERSEDED"
        assert await refused(world.issue(current, csr("SN-1"))) == "CERTIFICATE_NOT_IN_FORCE"


async def test_a_lost_answer_is_given_again() -> None:
    async with running() as world:
        current = await enrolled(world)
        request = csr("SN-1")
        first = await world.issue(current, request)
        before = world.written()
        assert await world.issue(current, request) == first
        assert world.written() == before
        both_at_once = await both(*(world.issue(current, csr_) for csr_ in [csr("SN-1")] * 4))
        assert len({one.name for one in both_at_once}) == 1


async def test_of_two_announced_keys_the_newer_counts() -> None:
    async with running() as world:
        current = await enrolled(world)
        request = csr("SN-1")
        older = await world.issue(current, request)
        newer = await world.issue(current, csr("SN-1"))
        assert (world.now(older).state, world.now(older).reason) == (Leaf.STATE_LAPSED, "ROTATION_REPLACED")
        assert await refused(world.connect(older)) == "CERTIFICATE_LAPSED"
        assert await refused(world.issue(current, request)) == "CSR_SPENT"
        assert world.now(current).state == Leaf.STATE_ACTIVE
        assert (await world.connect(newer)).state == Leaf.STATE_ACTIVE


async def test_a_rotation_that_is_never_confirmed_lapses() -> None:
    async with running() as world:
        current = await enrolled(world)
        request = csr("SN-1")
        issued = await world.issue(current, request)
        world.clock.ahead_ms += ROTATION_LIFE_MS
        await world.until(lambda: world.now(issued).state == Leaf.STATE_LAPSED)
        assert world.now(issued).reason == "ROTATION_LAPSED"
        assert await refused(world.connect(issued)) == "CERTIFICATE_LAPSED"
        assert await refused(world.issue(current, request)) == "CSR_SPENT"
        assert world.now(current).state == Leaf.STATE_ACTIVE
        assert ("certificate.lapsed", "SN-1") in world.told()
        await world.connect(await world.issue(current, csr("SN-1")))


async def test_a_key_is_used_once() -> None:
    async with running() as world:
        ca, key = Ca(), new_key()
        await world.register(ca)
        await world.issuing_ca()
        current = await world.admit(ca.leaf("SN-1", key=key))
        assert await refused(world.issue(current, csr("SN-1", key))) == "CSR_KEY_REUSED"
        again = new_key()
        issued = await world.issue(current, csr("SN-1", again))
        await world.connect(issued)
        assert await refused(world.issue(issued, csr("SN-1", again, uris=[URI]))) == "CSR_KEY_REUSED"


async def test_revoking_the_one_in_force_revokes_what_it_announced() -> None:
    async with running() as world:
        current = await enrolled(world)
        issued = await world.issue(current, csr("SN-1"))
        await world.public.RevokeDeviceCertificate(
            pki_pb2.RevokeDeviceCertificateRequest(name=current.name, reason="stolen"), context()
        )
        assert world.now(issued).state == Leaf.STATE_REVOKED
        assert await refused(world.connect(issued)) == "CERTIFICATE_REVOKED"


async def test_the_certificates_of_a_retired_device_are_revoked() -> None:
    async with running() as world:
        current = await enrolled(world)
        issued = await world.issue(current, csr("SN-1"))
        await world.retire(f"{current.device}x")
        assert world.now(current).state == Leaf.STATE_ACTIVE
        await world.retire(current.device)
        for one in (current, issued):
            assert (world.now(one).state, world.now(one).reason) == (Leaf.STATE_REVOKED, "DEVICE_RETIRED")
            assert one.name not in world.state().agenda
        before = world.written()
        await world.retire(current.device)
        assert world.written() == before


async def test_a_device_asks_so_often_and_no_more() -> None:
    async with running() as world:
        current = await enrolled(world)
        for _ in range(MAX_ISSUANCES):
            await world.issue(current, csr("SN-1"))
        assert await refused(world.issue(current, csr("SN-1"))) == "ISSUANCE_RATE_EXCEEDED"
        world.clock.ahead_ms += 3600 * 1000
        await world.issue(current, csr("SN-1"))


async def test_after_a_rotation_of_the_ca_the_successor_signs() -> None:
    async with running() as world:
        current = await enrolled(world)
        first = await world.issue(current, csr("SN-1"))
        await world.connect(first)
        await world.rotate(first.issuing_ca, "two")
        second = await world.issue(first, csr("SN-1"))
        assert second.issuing_ca == f"{ORG}/issuingCas/two"
        await world.connect(second)


async def test_replay_of_the_log_gives_the_same_state() -> None:
    async with running() as world:
        current = await enrolled(world)
        await world.policy(expiring_soon=Duration(seconds=100))
        issued = await world.issue(current, csr("SN-1"))
        await world.connect(issued)
        await world.issue(issued, csr("SN-1"))
        folded = world.state()
    async with running(world.log, world.registry, world.keystore, world.clock) as second:
        assert second.state() == folded


# T49: every kind of wrong certificate has a code of its own.


async def test_t49_every_fault_of_a_certificate_has_its_own_code() -> None:
    async with running() as world:
        ca = Ca()
        other = Ca("Second CA")
        await world.register(ca)
        await world.register(other, ca_id="second")
        await world.issuing_ca()
        revoked, factory = ca.leaf("SN-2"), ca.leaf("SN-3")
        known = await world.admit(revoked)
        await world.public.RevokeDeviceCertificate(pki_pb2.RevokeDeviceCertificateRequest(name=known.name), context())
        lapsing = await world.issue(await world.admit(factory), csr("SN-3"))
        await world.connect(await world.issue(await world.admit(factory), csr("SN-3")))
        faults = {
            "expired": ca.leaf("SN-1", begin=-2 * DAY, end=-DAY),
            "not yet valid": ca.leaf("SN-1", begin=DAY),
            "wrong EKU": ca.leaf("SN-1", extended=[ExtendedKeyUsageOID.SERVER_AUTH]),
            "no EKU": ca.leaf("SN-1", extended=None),
            "path length: a CA below a CA that may have none": ca.leaf("SN-1", basic=True),
            "weak key": ca.leaf("SN-1", key=ec.generate_private_key(ec.SECP224R1())),
            "key usage": ca.leaf("SN-1", digital=False),
            "critical extension": ca.leaf("SN-1", critical="1.2.3.4"),
            "revoked": revoked,
            "superseded": factory,
            "lapsed": x509.load_der_x509_certificate(lapsing.der),
            "same CN under a second CA": other.leaf("SN-2"),
            "second certificate": ca.leaf("SN-2"),
            "forged": ca.leaf("SN-1", signer=new_key()),
            "unknown CA": Ca("Stranger").leaf("SN-1"),
            "NUL in CN": ca.leaf("SN-1\0.evil"),
            "unicode in CN": ca.leaf("SN-é"),
            "no CN": ca.leaf(),
            "two CNs": ca.leaf("SN-1", "SN-2"),
            "two URIs": ca.leaf("SN-1", uris=["urn:a:b", "urn:a:c"]),
            "foreign URI": ca.leaf("SN-1", uris=[URI.replace("acme", "beta")]),
        }
        before = world.written()
        codes = {fault: await refused(world.admit(leaf)) for fault, leaf in faults.items()}
        assert codes == {
            "expired": "CERTIFICATE_EXPIRED",
            "not yet valid": "CERTIFICATE_NOT_YET_VALID",
            "wrong EKU": "CERTIFICATE_EKU",
            "no EKU": "CERTIFICATE_EKU_MISSING",
            "path length: a CA below a CA that may have none": "CERTIFICATE_IS_CA",
            "weak key": "CERTIFICATE_WEAK_KEY",
            "key usage": "CERTIFICATE_KEY_USAGE",
            "critical extension": "CERTIFICATE_CRITICAL_EXTENSION",
            "revoked": "CERTIFICATE_REVOKED",
            "superseded": "CERTIFICATE_SUPERSEDED",
            "lapsed": "CERTIFICATE_LAPSED",
            "same CN under a second CA": "DEVICE_IDENTIFIER_TAKEN",
            "second certificate": "SECOND_CERTIFICATE",
            "forged": "CERTIFICATE_SIGNATURE",
            "unknown CA": "CA_UNKNOWN",
            "NUL in CN": "COMMON_NAME_CONTROL_CHARACTER",
            "unicode in CN": "COMMON_NAME_INVALID",
            "no CN": "COMMON_NAME_MISSING",
            "two CNs": "COMMON_NAME_AMBIGUOUS",
            "two URIs": "SUBJECT_URIS",
            "foreign URI": "SUBJECT_URI_MISMATCH",
        }
        assert len(set(codes.values())) == len(codes)
        assert world.written() == before
