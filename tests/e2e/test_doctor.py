"""`swell doctor` against a whole installation: silent when all is well, and right about what is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from demo.steps import wait_until
from deploy.local.settings import ROOT
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant


def doctor(profile: Path, organization: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit status, and level and sight of each check."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "clients.cli",
            "--output",
            "json",
            "--profile",
            str(profile),
            "-O",
            organization,
            "doctor",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, {row["check"]: (row["level"], row["seen"]) for row in json.loads(done.stdout)}


def profile_for(tenant: Tenant, directory: Path, **changes: Any) -> Path:
    document = json.loads(tenant.stack.profile.path.read_text())
    document.pop("platform_key", None)
    document |= {"ca": str(tenant.stack.profile.ca.resolve()), "keys": {"owner": tenant.api_key}, "current": "owner"}
    path = directory / "profile.json"
    path.write_text(json.dumps(document | changes))
    path.chmod(0o600)
    return path


def test_a_sound_set_up_fails_nothing_and_each_fault_is_named(stack: Stack, tenant: Tenant, tmp_path: Path) -> None:
    tenant.enrolled("pioneer")  # its CA is known at the gateway
    profile = profile_for(tenant, tmp_path)

    status, found = doctor(profile, tenant.organization)
    assert (status, [check for check, (level, _) in found.items() if level == "fail"]) == (0, []), found
    assert {"profile", "CA of the servers", "gateway", "API key", *stack.profile.endpoints} <= found.keys()
    assert found[tenant.product] == ("warn", "no signing key: nothing can be offered")

    tenant.key()
    tenant.update_device("pioneer", quarantined=True, quarantine_reason="water damage")
    profile.chmod(0o644)
    status, found = doctor(profile, tenant.organization)
    assert status == 0
    assert found[tenant.product] == ("warn", "1 devices are quarantined: they get nothing")
    assert found["profile"][0] == "warn"

    endpoints = dict(stack.profile.endpoints)
    wrong_port = endpoints | {"pki": "127.0.0.1:1"}
    status, found = doctor(profile_for(tenant, tmp_path, endpoints=wrong_port), tenant.organization)
    assert status == 1
    assert found["pki"][0] == "fail"
    assert "API key" not in found, "what rests on a failed part is left out"

    status, found = doctor(profile_for(tenant, tmp_path, keys={"owner": tenant.api_key + "x"}), tenant.organization)
    assert (status, found["API key"][0]) == (1, "fail")
    assert "API_KEY_UNKNOWN" in found["API key"][1] or "not known" in found["API key"][1]


def test_a_service_that_is_frozen_is_found(stack: Stack, tenant: Tenant, tmp_path: Path) -> None:
    profile = profile_for(tenant, tmp_path)
    with stack.stopped("webhooks"):
        status, found = doctor(profile, tenant.organization)
    assert (status, found["webhooks"][0]) == (1, "fail")
    wait_until("it to serve again", 30, lambda: doctor(profile, tenant.organization)[1]["webhooks"][0] == "ok", 0.2)
