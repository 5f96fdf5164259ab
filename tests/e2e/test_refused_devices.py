"""Devices that are refused, each with its stable reason, and nothing of it in any log."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from groundswell.pki.v1 import pki_pb2
from groundswell.rollout.v1 import events_pb2 as rollout_events

from demo.factory import Factory
from demo.steps import wait_until
from tests.e2e import logs
from tests.e2e.device import RawDevice
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant


@pytest.fixture(scope="module")
def home(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    tenant = Tenant.create(stack, tmp_path_factory.mktemp("home"))
    # Its CA is in the gateway's view when a first device got through.
    tenant.enrolled("pioneer")
    yield tenant
    tenant.close()


@pytest.fixture(scope="module")
def rival(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    tenant = Tenant.create(stack, tmp_path_factory.mktemp("rival"))
    tenant.enrolled("pioneer")
    yield tenant
    tenant.close()


# Certificates.


def handshake_failures(stack: Stack) -> int:
    return sum(stack.health("gateway")["handshake_failures"].values())


def assert_dies_in_the_handshake(stack: Stack, device: RawDevice) -> None:
    before = handshake_failures(stack)
    # With TLS 1.3 the client hears of it at its first read: as an alert, or as a connection that is gone.
    with pytest.raises((ssl.SSLError, ConnectionError)):
        device.check_in()
    assert handshake_failures(stack) == before + 1


def test_a_leaf_of_a_foreign_ca_dies_in_the_handshake_and_is_counted(
    stack: Stack, home: Tenant, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stranger = Factory("stranger", tmp_path_factory.mktemp("stranger"))
    with logs.unchanged(stack, home.organization):
        assert_dies_in_the_handshake(stack, home.raw_device(stranger.device("canary-9")))
    assert f"handshake refused: organization={home.organization} " in stack.log_text("gateway")


def test_a_device_of_another_organization_dies_in_the_handshake(stack: Stack, home: Tenant, rival: Tenant) -> None:
    with logs.unchanged(stack, home.organization, rival.organization):
        assert_dies_in_the_handshake(stack, home.raw_device(rival.factory.device("canary-9")))


def test_a_certificate_that_expired_before_first_contact_makes_no_device(stack: Stack, home: Tenant) -> None:
    begin = datetime.now(UTC) - timedelta(days=2)
    identity = home.factory.device("late", start=begin, valid=timedelta(days=1))
    with logs.unchanged(stack, home.organization):
        answer = home.raw_device(identity).check_in()
        assert (answer.status, answer.reason) == (403, "CERTIFICATE_EXPIRED")
    assert "late" not in home.devices()


def test_a_known_device_is_refused_from_the_moment_its_certificate_expires(home: Tenant) -> None:
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=6)  # a certificate counts whole seconds
    begin = until - timedelta(days=1)
    device = home.raw_device(home.factory.device("mayfly", start=begin, valid=until - begin))
    wait_until("the device to be admitted", 5, lambda: device.check_in().status == 200, 0.2)

    answer = wait_until("the certificate to expire", 15, lambda: (got := device.check_in()).status == 403 and got, 0.2)

    assert answer.reason == "CERTIFICATE_EXPIRED"
    assert datetime.now(UTC) >= until


def test_a_revoked_certificate_is_refused_for_good_whatever_the_operator_wrote(stack: Stack, home: Tenant) -> None:
    device = home.enrolled("stolen")
    certificates = home.client.pages(
        home.client.pki.ListDeviceCertificates,
        pki_pb2.ListDeviceCertificatesRequest(parent=home.name),
        "device_certificates",
    )
    name = next(found.name for found in certificates if found.common_name == "stolen")
    home.client.pki.RevokeDeviceCertificate(
        pki_pb2.RevokeDeviceCertificateRequest(name=name, reason="stolen from a van")
    )

    refused = wait_until("the refusal", 12, lambda: (got := device.check_in()).status == 403 and got, 0.1)

    assert refused.reason == "CERTIFICATE_REVOKED"
    with logs.unchanged(stack, home.organization):
        assert device.check_in().reason == "CERTIFICATE_REVOKED"


# Bodies.


def _without(device: RawDevice, *path: str) -> bytes:
    body = device.body()
    inner: dict[str, Any] = body
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return json.dumps(body).encode()


def _with(sender: RawDevice, /, **changes: Any) -> bytes:
    return json.dumps(sender.body(**changes)).encode()


def _report(number: int, state: str = "ACCEPTED") -> dict[str, Any]:
    return {"counter": number, "attempt": "a", "state": state}


BAD_BODIES: dict[str, tuple[Callable[[RawDevice], bytes], int, str]] = {
    "names-another-device": (lambda it: _with(it, device="pioneer"), 409, "IDENTITY_MISMATCH"),
    "not-json": (lambda _: b"{", 400, "MALFORMED_BODY"),
    "not-utf8": (lambda _: b'{"agent": "\xff"}', 400, "MALFORMED_BODY"),
    "empty": (lambda _: b"", 400, "MALFORMED_BODY"),
    "deeply-nested": (lambda _: b"[" * 8000, 400, "MALFORMED_BODY"),
    "no-counter": (lambda it: _without(it, "agent", "counter"), 400, "MALFORMED_BODY"),
    "nothing-running": (lambda it: _without(it, "running"), 400, "MALFORMED_BODY"),
    "unknown-state": (lambda it: _with(it, reports=[_report(1, "EXPLODED")]), 400, "MALFORMED_BODY"),
    "server-side-state": (lambda it: _with(it, reports=[_report(1, "WENT_DARK")]), 400, "MALFORMED_BODY"),
    "counter-zero": (lambda it: _with(it, counter=0), 400, "INVALID_FIELD"),
    "counter-too-large": (lambda it: _with(it, counter=2**63), 400, "INVALID_FIELD"),
    "reports-do-not-rise": (lambda it: _with(it, reports=[_report(2), _report(2)]), 400, "INVALID_FIELD"),
    "too-many-reports": (lambda it: _with(it, reports=[_report(n + 1) for n in range(65)]), 400, "INVALID_FIELD"),
    "too-many-attributes": (lambda it: _with(it, attributes={str(n): "" for n in range(33)}), 400, "INVALID_FIELD"),
    "oversized": (lambda it: _with(it, attributes={"a": "x" * 17_000}), 413, "BODY_TOO_LARGE"),
}


def test_every_bad_body_is_refused_with_its_reason_and_changes_nothing(stack: Stack, home: Tenant) -> None:
    device = home.enrolled("babbler")
    # What its first check-in leaves in the log is there before the comparison begins.
    wait_until("its running state", 20, lambda: home.runs("babbler") == "1.0.0", 0.1)
    with logs.unchanged(stack, home.organization):
        answers = {case: device.send(make(device)) for case, (make, _, _) in BAD_BODIES.items()}
    assert {case: (answer.status, answer.reason) for case, answer in answers.items()} == {
        case: (status, reason) for case, (_, status, reason) in BAD_BODIES.items()
    }
    assert device.check_in().status == 200, "the same device is still welcome"


def test_a_forged_download_link_is_refused(home: Tenant) -> None:
    device = home.enrolled("thief")
    answer = device.send(b"", "GET", f"/v1/downloads/{'A' * 120}/{'0' * 64}")
    assert (answer.status, answer.reason) == (403, "LINK_INVALID")


# Repeats, reorderings, forks.


def observed(stack: Stack, tenant: Tenant, device_id: str) -> list[tuple[int, str, bool]]:
    """Counter, version and cloned of each observation of a device in the rollout log."""
    told: list[rollout_events.DeviceObserved] = []
    for entry in logs.entries(stack, "rollout", tenant.organization):
        message = entry.message()
        if isinstance(message, rollout_events.AttemptMoved):
            message = message.observed
        if isinstance(message, rollout_events.DeviceObserved) and message.device == tenant.device_name(device_id):
            told.append(message)
    return [(message.counter, message.running.version, message.cloned) for message in told]


def _runs(version: str) -> dict[str, Any]:
    return {"running": {"version": version, "slot": "a", "security_version": 1}}


def _sees(tenant: Tenant, device_id: str, version: str) -> None:
    wait_until(f"version {version}", 20, lambda: tenant.runs(device_id) == version, 0.1)


def test_duplicate_reordered_and_replayed_check_ins_are_observed_once(stack: Stack, home: Tenant) -> None:
    device = home.enrolled("echo")
    _sees(home, "echo", "1.0.0")
    known = observed(stack, home, "echo")
    said = json.dumps(device.body(counter=100, **_runs("1.0.1"))).encode()
    older = json.dumps(device.body(counter=50, **_runs("0.9.0"))).encode()

    assert [device.send(body).status for body in (said, said, older, said, older)] == [200] * 5
    # The stream is in order: when this has been seen, so has all before it.
    assert device.check_in(counter=101, **_runs("1.0.2")).status == 200
    _sees(home, "echo", "1.0.2")

    assert observed(stack, home, "echo") == [*known, (100, "1.0.1", False), (101, "1.0.2", False)]


def test_two_bodies_under_one_counter_mark_the_identity_cloned_and_it_is_granted_nothing(
    stack: Stack, tenant: Tenant
) -> None:
    bundle = tenant.bundle("1.1.0")
    device = tenant.enrolled("canary-1")
    _sees(tenant, "canary-1", "1.0.0")
    assert device.check_in(counter=100, **_runs("1.0.1")).status == 200
    _sees(tenant, "canary-1", "1.0.1")
    assert device.check_in(counter=100, **_runs("1.0.2")).status == 200

    def cloned() -> list[Any]:
        return [
            entry
            for entry in logs.entries(stack, "rollout", tenant.organization, "public")
            if getattr(entry.message(), "change", "") == "identity.cloned"
        ]

    wait_until("identity.cloned", 20, cloned, 0.2)
    rollout = tenant.start_rollout(bundle, cohorts=[("canary", 1)])
    device.counter = 200

    def refused() -> bool:
        answer = device.check_in(**_runs("1.0.1"))
        assert answer.body["answer"] == "none"
        return "IDENTITY_CLONED" in answer.codes

    wait_until("the reason", 20, refused, 0.2)
    assert [entry.message().device for entry in cloned()] == [tenant.device_name("canary-1")]
    assert not tenant.attempts(rollout)


def test_a_lower_security_version_is_never_offered(tenant: Tenant) -> None:
    hardened, careless = tenant.bundle("1.1.0", security_version=5), tenant.bundle("1.2.0", security_version=4)
    tenant.start_agents("canary-1")
    tenant.await_completion(tenant.start_rollout(hardened, cohorts=[("canary", 1)], soak_s=0.5))

    lower = tenant.start_rollout(careless, cohorts=[("canary", 1)])

    def reason() -> Any:
        steps = tenant.explain("canary-1").last_check_in.steps
        return next((step for step in steps if step.code in ("SECURITY_VERSION_BELOW_FLOOR", "SECURITY_FLOOR")), None)

    found = wait_until("the reason in explain", 20, reason, 0.2)
    assert found.blocking
    assert not tenant.attempts(lower)
    assert tenant.devices()["canary-1"].reported.version == "1.1.0"
