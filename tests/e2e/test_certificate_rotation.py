"""A certificate's whole way: from the factory's to one of our own, in two phases, to its end."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs7
from cryptography.x509.oid import NameOID
from groundswell.pki.v1 import pki_pb2
from typer.testing import CliRunner

from clients.cli.main import app
from clients.sdk import ApiError
from demo.factory import Identity
from demo.steps import wait_until
from tests.e2e.device import RawDevice
from tests.e2e.tenant import Tenant

Leaf = pki_pb2.DeviceCertificate
CONNECTIONS = 200
PAUSE_S = 0.25
UNSEEN = "/v1/downloads/none/none"
"""A path that is judged by identity first: `LINK_INVALID` means that the certificate was accepted."""


def aged(tenant: Tenant, device_id: str, age: timedelta, life: timedelta) -> Identity:
    """A factory certificate that is so old already."""
    return tenant.factory.device(device_id, start=datetime.now(UTC) - age, valid=life)


def request_of(device_id: str) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device_id)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return key, request.public_bytes(serialization.Encoding.DER)


def identity_of(directory: Path, name: str, key: ec.EllipticCurvePrivateKey, answer: bytes) -> Identity:
    (certificate,) = pkcs7.load_der_pkcs7_certificates(answer)
    found = Identity(directory / f"{name}.pem", directory / f"{name}.key")
    found.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    found.key.write_bytes(pem)
    return found


def enrolled_with(tenant: Tenant, identity: Identity) -> RawDevice:
    device = tenant.raw_device(identity)
    wait_until("the device to be admitted", 20, lambda: device.check_in().status == 200, 0.2)
    return device


def accepted(device: RawDevice) -> bool:
    """Until every gateway has the CA that signed it, a certificate dies in the handshake."""
    try:
        return device.check_in().status == 200
    except (ssl.SSLError, ConnectionError):
        return False


def states(tenant: Tenant, device_id: str) -> list[str]:
    return [Leaf.State.Name(one.state).removeprefix("STATE_") for one in tenant.certificates(device_id)]


def test_an_agent_renews_at_two_thirds_and_its_old_certificate_is_refused(tenant: Tenant) -> None:
    issuing = tenant.issuing_ca()
    # 150 of 240 s have passed: it is due between 10 and 30 s from now, and ends a minute later.
    old = aged(tenant, "canary-1", timedelta(seconds=150), timedelta(seconds=240))
    tenant.start_agents("canary-1", identity=old)

    wait_until("the new certificate to be confirmed", 90, lambda: states(tenant, "canary-1") == ["RETIRED", "ACTIVE"])

    first, second = tenant.certificates("canary-1")
    assert (second.issuing_ca, second.supersedes) == (issuing.name, first.name)
    assert (second.device, second.device_uid) == (first.device, first.device_uid)
    assert tenant.devices().keys() == {"canary-1"}, "the same device"
    refused = wait_until(
        "the refusal", 12, lambda: (got := tenant.raw_device(old).check_in()).status == 403 and got, 0.2
    )
    assert refused.reason == "CERTIFICATE_SUPERSEDED"
    # The agent goes on with what it has now.
    bundle = tenant.bundle("1.1.0")
    tenant.await_completion(tenant.start_rollout(bundle, cohorts=[("canary", 1)], soak_s=0.5))


def test_est_by_hand_from_enrolment_to_a_lost_answer(tenant: Tenant, tmp_path: Path) -> None:
    device = enrolled_with(tenant, tenant.factory.device("canary-1"))
    key, request = request_of("canary-1")
    none, _ = device.enroll(request, "simpleenroll")
    assert (none.status, none.reason) == (403, "ISSUING_CA_MISSING")
    issuing = tenant.issuing_ca()
    _, foreign = request_of("canary-2")
    assert device.enroll(foreign, "simpleenroll")[0].reason == "CSR_SUBJECT_MISMATCH"
    assert device.enroll(request, "another/simpleenroll")[0].reason == "EST_LABEL_UNKNOWN"

    answer, certificates = device.enroll(request, "pump/simpleenroll")
    assert answer.headers["content-type"] == "application/pkcs7-mime; smime-type=certs-only"
    again, same = device.enroll(request, "simpleenroll")
    assert (again.status, same) == (200, certificates), "a lost answer is given again"
    assert states(tenant, "canary-1") == ["ACTIVE", "NEXT"]
    assert device.check_in().status == 200, "until the new one is used, the old one is in force"

    new = tenant.raw_device(identity_of(tmp_path, "new", key, certificates))
    new.instance, new.boot_id, new.counter = device.instance, device.boot_id, device.counter
    wait_until("the new certificate to be accepted", 15, lambda: accepted(new), 0.2)
    assert states(tenant, "canary-1") == ["RETIRED", "ACTIVE"]
    wait_until("the old one to be refused", 12, lambda: device.check_in().reason == "CERTIFICATE_SUPERSEDED", 0.1)
    assert device.enroll(request)[0].reason == "CERTIFICATE_SUPERSEDED"
    assert new.enroll(request_of("canary-1")[1], "simpleenroll")[0].reason == "ALREADY_ENROLLED"

    # The CA is rotated; what the old one signed stays accepted, the next is of the new one.
    tenant.client.pki.RotateIssuingCa(pki_pb2.RotateIssuingCaRequest(name=issuing.name, successor_id="two"))
    key, request = request_of("canary-1")
    _, certificates = new.enroll(request)
    newest = tenant.raw_device(identity_of(tmp_path, "newest", key, certificates))
    newest.instance, newest.boot_id, newest.counter = new.instance, new.boot_id, new.counter
    assert new.check_in().status == 200
    wait_until("the newest certificate to be accepted", 15, lambda: accepted(newest), 0.2)
    assert tenant.certificates("canary-1")[-1].issuing_ca.endswith("/two")


def test_operators_see_and_do_all_of_it_with_swell(tenant: Tenant, tmp_path: Path) -> None:
    device = tenant.enrolled("canary-1")
    environment = {
        "GROUNDSWELL_PROFILE": str(tenant.stack.settings.local_dir / "profile.json"),
        "GROUNDSWELL_API_KEY": tenant.api_key,
    }

    def swell(*arguments: str, form: str = "json") -> str:
        """What it writes, or the reason of its refusal."""
        given = ["-o", form, "-O", tenant.organization, "-P", "pump", *arguments]
        done = CliRunner().invoke(app, given, env=environment)
        if isinstance(done.exception, ApiError):
            return done.exception.reason
        assert done.exit_code == 0, done.output
        return done.stdout

    made = json.loads(swell("issuing-ca", "create", "one", "--days", "100"))
    assert made["state"] == "STATE_ACTIVE"
    assert swell("issuing-ca", "create", "two") == "ISSUING_CA_EXISTS"
    assert json.loads(swell("issuing-ca", "rotate", "one", "--successor", "two"))["name"].endswith("/two")
    assert json.loads(swell("issuing-ca", "get", "one"))["replaced_by"].endswith("/two")
    assert [one["state"] for one in json.loads(swell("issuing-ca", "list"))] == ["STATE_RETIRING", "STATE_ACTIVE"]
    swell("issuing-ca", "download", "one", "--out", str(tmp_path / "one.pem"))
    assert x509.load_pem_x509_certificate((tmp_path / "one.pem").read_bytes()).subject.rfc4514_string()

    (certificate,) = json.loads(swell("certificate", "list", "--device", "canary-1", "--state", "active"))
    assert json.loads(swell("certificate", "get", certificate["fingerprint"])) == certificate
    assert json.loads(swell("certificate", "list", "--ca", "factory"))[0]["fingerprint"] == certificate["fingerprint"]
    assert json.loads(swell("certificate", "expiring")) == []
    assert swell("certificate", "list", "--filter", "nonsense") == "INVALID_FIELD"

    (ca,) = json.loads(swell("ca", "list"))
    assert ca["admitted_count"] == "1"
    assert json.loads(swell("ca", "jitp", "factory", "--disable", "--quota", "5"))["jitp"]["quota"] == "5"
    assert json.loads(swell("ca", "suspend", "factory", "--reason", "audit"))["state"] == "STATE_SUSPENDED"
    assert json.loads(swell("ca", "resume", "factory"))["state"] == "STATE_ACTIVE"
    assert "factory" in swell("ca", "get", "factory", form="table")
    assert json.loads(swell("ca", "revoke", "factory"))["state"] == "STATE_REVOKED"
    assert swell("ca", "resume", "factory") == "WRONG_STATE"
    assert json.loads(swell("certificate", "revoke", certificate["fingerprint"]))["effective_by"]
    wait_until("the refusal", 15, lambda: not accepted(device), 0.2)


def test_an_expired_certificate_may_only_renew(tenant: Tenant, tmp_path: Path) -> None:
    tenant.issuing_ca()
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=8)
    begin = until - timedelta(days=10)
    device = enrolled_with(tenant, tenant.factory.device("canary-1", start=begin, valid=until - begin))
    refused = wait_until("it to expire", 20, lambda: (got := device.check_in()).status == 403 and got, 0.2)
    assert refused.reason == "CERTIFICATE_EXPIRED"
    key, request = request_of("canary-1")
    assert device.enroll(request, "simpleenroll")[0].reason == "CERTIFICATE_EXPIRED"
    answer, certificates = device.enroll(request)
    assert answer.status == 200, answer
    new = tenant.raw_device(identity_of(tmp_path, "new", key, certificates))
    wait_until("the new certificate to be accepted", 15, lambda: accepted(new), 0.2)
    expired = tenant.certificates("canary-1")[0]
    assert (expired.expiring, expired.expired) == (True, True)


def test_a_suspended_ca_ends_open_connections_and_a_resumed_one_has_them_back(tenant: Tenant) -> None:
    device = tenant.enrolled("canary-1")
    ca = f"{tenant.product}/caCertificates/factory"

    async def judged(session: aiohttp.ClientSession, wanted: str) -> None:
        until = time.monotonic() + 15
        while (seen := await _reason(session, tenant)) != wanted:
            assert time.monotonic() < until, f"{seen} is not {wanted}"
            await asyncio.sleep(0.05)

    async def scene() -> None:
        async with _session(device) as session:
            await judged(session, "LINK_INVALID")
            tenant.client.pki.SuspendCaCertificate(pki_pb2.SuspendCaCertificateRequest(name=ca))
            await judged(session, "CA_SUSPENDED")
            tenant.client.pki.ResumeCaCertificate(pki_pb2.ResumeCaCertificateRequest(name=ca))
            await judged(session, "LINK_INVALID")
            tenant.client.pki.RevokeCaCertificate(pki_pb2.RevokeCaCertificateRequest(name=ca))
            await judged(session, "CA_REVOKED")

    asyncio.run(scene())


def _session(device: RawDevice) -> aiohttp.ClientSession:
    """One connection that is kept."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=device.context, limit=1, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=30),
    )


async def _reason(session: aiohttp.ClientSession, tenant: Tenant) -> str:
    url = f"https://{tenant.stack.profile.gateway}{UNSEEN}"
    async with session.get(url, server_hostname=tenant.server_name) as answer:
        return (await answer.json())["error"]["reason"]


def test_the_revocation_bound_while_connections_are_open(tenant: Tenant) -> None:
    device = tenant.enrolled("stolen")
    (certificate,) = tenant.certificates("stolen")
    last_accepted = [0.0]
    answers = [0]
    refusals: set[str] = set()

    async def hold(barrier: asyncio.Barrier, gate: asyncio.Semaphore, stopped: asyncio.Event) -> None:
        async with _session(device) as session:
            async with gate:
                assert await _reason(session, tenant) == "LINK_INVALID"
            await barrier.wait()
            while True:
                begun = time.time()
                reason = await _reason(session, tenant)
                answers[0] += 1
                if reason != "LINK_INVALID":
                    refusals.add(reason)
                    return
                last_accepted[0] = max(last_accepted[0], begun)
                assert not stopped.is_set(), "accepted long after the bound"
                await asyncio.sleep(PAUSE_S)

    async def scene() -> tuple[float, float]:
        barrier, gate, stopped = asyncio.Barrier(CONNECTIONS + 1), asyncio.Semaphore(8), asyncio.Event()
        holders = [asyncio.create_task(hold(barrier, gate, stopped)) for _ in range(CONNECTIONS)]
        await barrier.wait()
        await asyncio.sleep(2 * PAUSE_S)
        answer = await asyncio.to_thread(
            tenant.client.pki.RevokeDeviceCertificate,
            pki_pb2.RevokeDeviceCertificateRequest(name=certificate.name, reason="stolen from a van"),
        )
        revoked_at = time.time()
        asyncio.get_running_loop().call_later(20, stopped.set)
        await asyncio.gather(*holders)
        return revoked_at, answer.effective_by.ToNanoseconds() / 1e9

    revoked_at, effective_by = asyncio.run(scene())

    bound_s = last_accepted[0] - revoked_at
    print(
        f"revocation: {CONNECTIONS} open connections, {answers[0]} requests; the last accepted one began "
        f"{bound_s * 1000:+.0f} ms after the revocation was acknowledged (promised: {effective_by - revoked_at:.0f} s)"
    )
    assert refusals == {"CERTIFICATE_REVOKED"}
    assert last_accepted[0] <= effective_by
