"""The demonstration firmware on the real agent: what the demonstration will show, one board at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.firmware import CONFIG_METADATA, PROGRAM_METADATA, Firmware, build
from tests.integration.agent.conftest import Device
from tests.integration.agent.doubles import Bundle, Gateway


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Firmware]:
    return build(tmp_path_factory.mktemp("firmware"))


def _bundle(firmware: Firmware) -> Bundle:
    files = [
        (Path(firmware.program_path).read_bytes(), dict(PROGRAM_METADATA)),
        (Path(firmware.config_path).read_bytes(), dict(CONFIG_METADATA)),
    ]
    return Bundle(firmware.version, firmware.security_version, files)


@pytest.mark.parametrize(("serial", "states"), [("SN-0002", ["CONFIRMED"]), ("SN-0007", ["REVERTED"])])
def test_2_0_0_boots_or_not_by_the_serial(
    gateway: Gateway, device: Device, built: list[Firmware], serial: str, states: list[str]
) -> None:
    device.start(serial=serial)
    assert gateway.ended(gateway.release(_bundle(built[1]))) == "CONFIRMED"
    attempt = gateway.release(_bundle(built[2]))
    assert [gateway.ended(attempt)] == states
    expected = "2.0.0" if states == ["CONFIRMED"] else "1.1.0"
    gateway.until(lambda: gateway.running[-1]["version"] == expected, expected)


def test_2_0_0_fails_in_the_soak_and_is_rolled_back(gateway: Gateway, device: Device, built: list[Firmware]) -> None:
    device.start(serial="SN-0004")
    assert gateway.ended(gateway.release(_bundle(built[1]))) == "CONFIRMED"
    attempt = gateway.release(_bundle(built[2]))
    assert gateway.ended(attempt) == "CONFIRMED"
    gateway.until(lambda: gateway.states(attempt)[-1] == "FAILED", "the failure in the soak")
    back = gateway.release(_bundle(built[1]), kind="rollback")
    assert gateway.ended(back) == "CONFIRMED"
    assert gateway.running[-1]["version"] == "1.1.0"
    seen = len(gateway.running)
    gateway.until(lambda: len(gateway.running) > seen + 8, "a while of health")
    assert gateway.states(back)[-1] == "CONFIRMED"
