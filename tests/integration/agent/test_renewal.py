"""A real agent renews its certificate: lost answers, refusals, and kill -9 at every step."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clients.agent.failpoints import RENEWAL_STEPS
from clients.device.certificate import read_life
from tests.integration.agent.conftest import Device
from tests.integration.agent.doubles import Enrolment, Gateway

# Of the test's device certificates: an hour before, a day after now; see `pki.make`.
BEFORE_DUE, DUE = timedelta(hours=1), timedelta(hours=22)


def at(offset: timedelta) -> str:
    return (datetime.now(UTC) + offset).isoformat().replace("+00:00", "Z")


@pytest.fixture
def enrolment(tmp_path: Path, gateway: Gateway) -> Enrolment:
    tls = tmp_path / "tls"
    key = serialization.load_pem_private_key((tls / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    factory = x509.load_pem_x509_certificate((tls / "device.pem").read_bytes())
    found = Enrolment(
        x509.load_pem_x509_certificate((tls / "ca.pem").read_bytes()),
        key,
        factory.public_bytes(serialization.Encoding.DER),
    )
    gateway.enrolment = found
    return found


def identities(device: Device) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((device.state / "identity" / "identity.json").read_bytes())["body"]
    return found


def confirmed(gateway: Gateway, enrolment: Enrolment) -> None:
    """Until the device is seen with a new certificate in force, and has gone on after it."""
    gateway.until(lambda: enrolment.confirmed == 1, "a confirmation")
    seen = len(gateway.running)
    gateway.until(lambda: len(gateway.running) > seen + 2, "check-ins after it")


def test_it_renews_when_it_is_due_and_not_before(gateway: Gateway, device: Device, enrolment: Enrolment) -> None:
    gateway.server_time = at(BEFORE_DUE)
    device.start()
    gateway.until(lambda: len(gateway.running) > 5, "check-ins")
    assert enrolment.asked == 0
    factory = enrolment.in_force
    with gateway.lock:
        gateway.server_time = at(DUE)
    confirmed(gateway, enrolment)
    assert enrolment.in_force != factory
    assert (enrolment.asked, enrolment.superseded) == (1, 0)
    assert identities(device)["current"] == 1
    key = device.state / "identity" / "1" / "key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert read_life(key.with_name("certificate.pem")).common_name == "SN-0042"
    events = [line["event"] for line in device.log()]
    assert events.index("renewal-stored") < events.index("renewal-confirmed")


@pytest.mark.parametrize("step", RENEWAL_STEPS)
def test_killed_at_any_step_it_still_has_an_identity(
    gateway: Gateway, device: Device, enrolment: Enrolment, step: str
) -> None:
    gateway.server_time = at(DUE)
    device.kill_at(device.start(failpoint=step), step)
    seen = len(gateway.running)
    device.start()
    gateway.until(lambda: len(gateway.running) > seen, "a check-in after the kill")
    confirmed(gateway, enrolment)
    assert identities(device)["next"] == 0
    left = [path.name for path in (device.state / "identity").iterdir() if path.is_dir()]
    assert left == [str(identities(device)["current"])]
    assert len(enrolment.answers) == 1, "the same request got the same certificate"


def test_an_expired_certificate_is_renewed_at_once(gateway: Gateway, device: Device, enrolment: Enrolment) -> None:
    enrolment.expired = True  # and the gateway tells no time that would say so
    device.start()
    confirmed(gateway, enrolment)


def test_a_spent_request_is_replaced_by_another_key(
    gateway: Gateway, device: Device, enrolment: Enrolment, tmp_path: Path
) -> None:
    gateway.server_time = at(DUE)
    enrolment.refusing = ["CSR_SPENT"]
    first = device.start()
    gateway.until(lambda: enrolment.asked == 1, "a request")
    seen = len(gateway.running)
    gateway.until(lambda: len(gateway.running) > seen + 3, "check-ins with the old certificate")
    assert enrolment.asked == 1, "it waits before it asks again"
    assert identities(device)["next"] == 0
    first.terminate()
    assert first.wait(10) == 0
    device.start()
    confirmed(gateway, enrolment)


def test_a_certificate_for_another_key_is_not_taken(gateway: Gateway, device: Device, enrolment: Enrolment) -> None:
    gateway.server_time = at(DUE)
    enrolment.wrong_key = True
    device.start()
    gateway.until(lambda: enrolment.asked == 1, "a request")
    seen = len(gateway.running)
    gateway.until(lambda: len(gateway.running) > seen + 3, "check-ins with the old certificate")
    assert not (device.state / "identity" / "1" / "certificate.pem").exists()
    assert enrolment.confirmed == 0


def test_a_certificate_that_lapsed_meanwhile_is_dropped(gateway: Gateway, device: Device, enrolment: Enrolment) -> None:
    gateway.server_time = at(DUE)
    device.kill_at(device.start(failpoint="renewal-stored"), "renewal-stored")
    enrolment.announced = b""
    with gateway.lock:
        gateway.server_time = at(BEFORE_DUE)
    seen = len(gateway.running)
    device.start()
    gateway.until(lambda: len(gateway.running) > seen + 2, "check-ins with the old certificate")
    assert (identities(device)["current"], identities(device)["next"]) == (0, 0)


def test_a_certificate_given_by_hand_counts_again(
    gateway: Gateway, device: Device, enrolment: Enrolment, tmp_path: Path
) -> None:
    gateway.server_time = at(DUE)
    first = device.start()
    confirmed(gateway, enrolment)
    first.terminate()
    assert first.wait(10) == 0
    own = device.state / "identity" / "1"
    tls = tmp_path / "tls"
    made = enrolment.in_force
    (tls / "device.pem").write_bytes((own / "certificate.pem").read_bytes())
    (tls / "device.key").write_bytes((own / "key.pem").read_bytes())
    with gateway.lock:
        gateway.server_time = at(BEFORE_DUE)
    device.start()
    seen = len(gateway.running)
    gateway.until(lambda: len(gateway.running) > seen + 2, "check-ins")
    assert enrolment.in_force == made
    assert enrolment.superseded == 0
