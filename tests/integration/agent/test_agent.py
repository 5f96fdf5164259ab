"""The agent as a process: a whole update, refusals, a bad line, a watchdog."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from clients.device.model import Report
from clients.device.state import StateFile
from tests.integration.agent.conftest import Device, bundle
from tests.integration.agent.doubles import (
    Gateway,
    announces_more,
    cut_after,
    drip,
    link_expired,
    longer,
    raw_public,
    serve,
    swapped,
)

WHOLE = ["ACCEPTED", "DOWNLOADING", "DOWNLOADED", "INSTALLED", "BOOTED", "CONFIRMED"]


def test_an_update_is_installed_booted_and_confirmed(gateway: Gateway, device: Device) -> None:
    process = device.start()
    first = gateway.release(bundle("1.0.0"))
    assert gateway.ended(first) == "CONFIRMED"
    assert gateway.states(first) == WHOLE
    # What said BOOTED and CONFIRMED was the new firmware itself.
    assert {version for _, state, _, version in gateway.history if state in {"BOOTED", "CONFIRMED"}} == {"1.0.0"}
    assert gateway.running[-1]["slot"] == "b"
    assert (device.state / "slots" / "b" / "config.json").read_text() == '{"version": "1.0.0"}'
    second = gateway.release(bundle("1.1.0", security_version=3))
    assert gateway.ended(second) == "CONFIRMED"
    assert gateway.running[-1]["slot"] == "a"
    assert device.body()["floor"] == 3
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_a_rollback_goes_back_but_never_below_the_floor(gateway: Gateway, device: Device) -> None:
    device.start()
    old, new = bundle("1.0.0", security_version=2), bundle("1.1.0", security_version=2)
    gateway.ended(gateway.release(old))
    gateway.ended(gateway.release(new))
    assert gateway.ended(gateway.release(old, kind="rollback")) == "CONFIRMED"
    assert gateway.running[-1]["version"] == "1.0.0"
    # T05: older firmware with a lower security version, validly signed.
    below = gateway.release(bundle("0.8.0", security_version=1), kind="rollback")
    assert gateway.ended(below) == "FAILED"
    assert gateway.code(below) == "SECURITY_VERSION_TOO_LOW"
    assert gateway.running[-1]["version"] == "1.0.0"


def test_no_leave_no_switch_and_a_cancel_is_obeyed(gateway: Gateway, device: Device) -> None:
    gateway.hold_go = True
    device.start()
    attempt = gateway.release(bundle("1.0.0"))
    gateway.until(lambda: "INSTALLED" in gateway.states(attempt), "INSTALLED")
    asked = len(gateway.running)
    gateway.until(lambda: len(gateway.running) > asked + 3, "more questions")
    assert {one["version"] for one in gateway.running} == {"0.9.0"}
    gateway.cancel = True
    gateway.until(lambda: device.body()["work"] is None, "the attempt forgotten")
    gateway.cancel = gateway.hold_go = False
    assert gateway.ended(gateway.release(bundle("1.0.1"))) == "CONFIRMED"
    assert attempt in device.body()["ended"]


def test_a_go_that_lapsed_is_asked_for_again(gateway: Gateway, device: Device) -> None:
    gateway.go_valid_s = 0.0
    device.start()
    attempt = gateway.release(bundle("1.0.0"))
    gateway.until(lambda: gateway.goes >= 3, "three leaves asked for")
    assert gateway.running[-1]["version"] == "0.9.0"
    gateway.go_valid_s = 5.0
    assert gateway.ended(attempt) == "CONFIRMED"


def test_a_broken_line_resumes_and_tells_the_store_nothing(gateway: Gateway, device: Device) -> None:
    gateway.store.faults += [cut_after(70_000), link_expired, cut_after(50_000)]
    device.start()
    assert gateway.ended(gateway.release(bundle("1.0.0"))) == "CONFIRMED"
    ranges = [one.get("range") for one in gateway.store.requests]
    assert ranges[:4] == [None, "bytes=70000-", "bytes=70000-", "bytes=120000-"]
    for headers in gateway.store.requests:
        assert set(headers) <= {"host", "range"}


def test_t01_swapped_bytes_reach_no_slot(gateway: Gateway, device: Device) -> None:
    gateway.store.faults.append(swapped)
    device.start()
    attempt = gateway.release(bundle("1.0.0"))
    assert gateway.ended(attempt) == "FAILED"
    assert gateway.code(attempt) == "DIGEST_MISMATCH"
    assert list((device.state / "slots").iterdir()) == []
    assert list((device.state / "staging").iterdir()) == []


@pytest.mark.parametrize("fault", [longer, announces_more])
def test_t14_nothing_beyond_the_signed_length_is_written(gateway: Gateway, device: Device, fault: object) -> None:
    gateway.store.faults.append(fault)  # type: ignore[arg-type] # one of the faults above
    device.start()
    offered = bundle("1.0.0")
    attempt = gateway.release(offered)
    assert gateway.ended(attempt) == "FAILED"
    assert gateway.code(attempt) == "SIZE_MISMATCH"
    assert sum(path.stat().st_size for path in (device.state / "staging").iterdir()) <= len(offered.files[0][0])


def test_t15_a_dripping_store_is_left_for_a_fresh_link(gateway: Gateway, device: Device) -> None:
    gateway.store.faults.append(drip)
    device.start(rate_window_s=0.4)
    assert gateway.ended(gateway.release(bundle("1.0.0"))) == "CONFIRMED"
    assert any(line.get("reason") == "DOWNLOAD_TOO_SLOW" for line in device.log())
    assert len(gateway.store.requests) >= 3


def test_t15_a_store_that_only_drips_ends_in_a_report(gateway: Gateway, device: Device) -> None:
    gateway.store.faults += [drip] * 50
    device.start(rate_window_s=0.3, download_timeout_s=1.5)
    attempt = gateway.release(bundle("1.0.0"))
    assert gateway.ended(attempt) == "FAILED"
    assert gateway.code(attempt) in {"DOWNLOAD_TOO_SLOW", "DOWNLOAD_INCOMPLETE"}


def test_t13_one_blocked_download_activates_no_part(gateway: Gateway, device: Device) -> None:
    device.start(download_timeout_s=1.5)
    offered = bundle("1.0.0")
    gateway.store.faults += [serve, *[link_expired] * 50]
    attempt = gateway.release(offered)
    assert gateway.ended(attempt) == "FAILED"
    assert gateway.code(attempt) == "DOWNLOAD_INCOMPLETE"
    assert list((device.state / "slots").iterdir()) == []
    failed = next(line for line in device.log() if line["event"] == "attempt-failed")
    assert failed["reason"] == "DOWNLOAD_INCOMPLETE"


def test_a_key_named_twice_is_counted_once(gateway: Gateway, device: Device) -> None:
    offered = bundle("1.0.0")
    key = gateway.keys[0]
    gateway.keys = [key]
    signature = {
        "key_id": hashlib.sha256(raw_public(key)).hexdigest().upper(),
        "signature": key.sign(offered.statement()).hex(),
    }
    gateway.extra_signatures = [signature, {**signature, "key_id": signature["key_id"].lower()}]
    device.start()
    attempt = gateway.release(offered)
    assert gateway.ended(attempt) == "FAILED"
    assert gateway.code(attempt) == "SIGNATURES_BELOW_THRESHOLD"
    assert gateway.store.requests == []


def test_firmware_that_does_not_boot_is_taken_back(gateway: Gateway, device: Device) -> None:
    device.start()
    gateway.ended(gateway.release(bundle("1.0.0")))
    attempt = gateway.release(bundle("2.0.0", run='#!/bin/sh\n[ "$1" = --health ]\n'))
    assert gateway.ended(attempt) == "REVERTED"
    assert gateway.code(attempt) == "BOOT_FAILED"
    gateway.until(lambda: gateway.running[-1]["version"] == "1.0.0", "the old firmware")
    # Only the old firmware ever spoke after the switch.
    assert "2.0.0" not in {one["version"] for one in gateway.running}


def test_firmware_that_hangs_is_taken_back(gateway: Gateway, device: Device) -> None:
    device.start(boot_timeout_s=0.5)
    attempt = gateway.release(bundle("2.0.0", run="#!/bin/sh\nsleep 60\n"))
    assert gateway.ended(attempt) == "REVERTED"
    assert gateway.code(attempt) == "BOOT_TIMED_OUT"


def test_firmware_that_finds_itself_unwell_is_taken_back(gateway: Gateway, device: Device) -> None:
    device.start()
    attempt = gateway.release(bundle("2.0.0", run='#!/bin/sh\n[ "$1" = --boot ]\n'))
    assert gateway.ended(attempt) == "REVERTED"
    assert gateway.states(attempt) == [*WHOLE[:5], "REVERTED"]
    assert gateway.code(attempt) == "UNHEALTHY"


def test_t25_firmware_that_cannot_check_in_is_taken_back(gateway: Gateway, device: Device) -> None:
    device.start(trial_timeout_s=1.0)
    gateway.down_after_go = True
    attempt = gateway.release(bundle("2.0.0"))
    gateway.until(lambda: gateway.goes == 1, "leave")
    _await(lambda: any(line["event"] == "reverted" for line in device.log()))
    gateway.down = gateway.down_after_go = False
    assert gateway.ended(attempt) == "REVERTED"
    assert gateway.code(attempt) == "WATCHDOG_EXPIRED"


def test_a_confirmed_device_that_falls_ill_says_so_once_and_goes_on(gateway: Gateway, device: Device) -> None:
    ill = '#!/bin/sh\n[ "$1" = --boot ] || [ ! -e "$GROUNDSWELL_STATE/ill" ]\n'
    device.start()
    attempt = gateway.release(bundle("1.0.0", run=ill))
    assert gateway.ended(attempt) == "CONFIRMED"
    (device.state / "ill").touch()
    gateway.until(lambda: gateway.states(attempt)[-1] == "FAILED", "the withdrawal")
    seen = len(gateway.running)
    gateway.until(lambda: len(gateway.running) > seen + 5, "more check-ins")
    assert gateway.states(attempt).count("FAILED") == 1
    assert gateway.running[-1]["version"] == "1.0.0"
    # And it can be rolled back from there.
    assert gateway.ended(gateway.release(bundle("0.9.5"), kind="rollback")) == "CONFIRMED"


def test_an_empty_trust_list_is_a_clear_error(device: Device) -> None:
    assert device.start(trusted_keys=[], log=None).wait(10) == 1


def _await(condition: Callable[[], bool], timeout_s: float = 25.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_more_reports_than_one_body_holds_all_arrive(gateway: Gateway, device: Device) -> None:
    gateway.down = True
    process = device.start()
    _await((device.state / "state.json").exists)
    process.kill()
    process.wait()
    # As if a long time without the server had filled the outbox.
    file = StateFile(device.state / "state.json")
    body = file.load()
    assert body is not None
    body["outbox"] = [
        Report(counter, f"attempt-{counter}", "FAILED", "UNHEALTHY", "x" * 500).to_json() for counter in range(1, 101)
    ]
    file.save(body)
    StateFile(device.state / "counter.json").save({"reserved": 128})
    gateway.down = False
    device.start()
    gateway.until(lambda: len(gateway.history) >= 100, "every report")
    assert [name for name, *_ in gateway.history] == [f"attempt-{number}" for number in range(1, 101)]


def test_a_fleet_is_many_agents_that_end_together(gateway: Gateway, device: Device) -> None:
    gateway.one_device = False
    files = []
    for name in ("x", "y", "z"):
        path = device.root / f"{name}.json"
        path.write_text(json.dumps({**device.config, "state_directory": name, "log": f"{name}.log"}))
        files += ["--config", str(path)]
    command = [sys.executable, "-m", "clients.agent.fleet", *files]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = json.loads(parent.stdout.readline())["pids"]
        gateway.until(lambda: len(gateway.running) >= 9, "check-ins")
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(10) == 0
    assert len(set(pids)) == 3
    for name in ("x", "y", "z"):
        assert json.loads((device.root / f"{name}.log").read_text().splitlines()[-1])["event"] == "ended"
