"""The demonstration firmware called as the agent calls it: which boards the defect of 2.0.0 meets, and when."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest

from clients.agent.program import call
from clients.device.slots import Part, SlotStore
from demo.firmware import BOOT_FAILS, LOG_LIMIT, SOAK_FAILS, Firmware, build


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Firmware]:
    return build(tmp_path_factory.mktemp("firmware"))


def _verdicts(root: Path, firmware: Firmware, digit: str) -> tuple[str, list[str]]:
    """Boot, then three times as many health checks as the log holds."""
    store = SlotStore(root)
    store.install("b", [Part(firmware.program_path), Part(firmware.config_path, "config.json")], active="a")
    (root / "serial").write_text(f"SN-004{digit}\n")
    environment = {"PATH": os.defpath, "GROUNDSWELL_STATE": str(root), "GROUNDSWELL_DATA": str(root)}
    program = store.program("b")
    assert program is not None
    boot = call(program, "boot", 10.0, environment).code
    return boot, [call(program, "health", 10.0, environment).code for _ in range(3 * LOG_LIMIT)]


def test_builds_are_the_same_bytes_and_large_enough_to_take_two_parts(tmp_path: Path, built: list[Firmware]) -> None:
    again = build(tmp_path)
    assert [one.version for one in built] == ["1.0.0", "1.1.0", "2.0.0"]
    for one, other in zip(built, again, strict=True):
        assert one.program_path.read_bytes() == other.program_path.read_bytes()
        assert one.config_path.read_bytes() == other.config_path.read_bytes()
        assert json.loads(one.config_path.read_text())["log_limit"] == LOG_LIMIT
        with tarfile.open(one.program_path) as tar:
            assert sorted(tar.getnames()) == ["payload.bin", "run"]
    assert built[-1].program_path.stat().st_size > 5 * 1024 * 1024


@pytest.mark.parametrize("digit", "0123456789")
def test_good_versions_stay_well_on_every_board(tmp_path: Path, built: list[Firmware], digit: str) -> None:
    for firmware in built[:2]:
        assert _verdicts(tmp_path / firmware.version, firmware, digit) == ("", [""] * 3 * LOG_LIMIT)


@pytest.mark.parametrize("digit", "0123456789")
def test_the_defect_of_2_0_0_meets_the_boards_it_is_said_to(tmp_path: Path, built: list[Firmware], digit: str) -> None:
    boot, health = _verdicts(tmp_path, built[2], digit)
    assert bool(boot) == (digit in BOOT_FAILS)
    ill = ["UNHEALTHY"] * 2 * LOG_LIMIT if digit in SOAK_FAILS else [""] * 2 * LOG_LIMIT
    assert health == [""] * LOG_LIMIT + ill
