"""The examples, run as a reader would run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from deploy.local.settings import ROOT
from tests.e2e.tenant import Tenant


def run(tenant: Tenant, example: str, *arguments: str, within_s: float = 120.0) -> str:
    environment = {
        **os.environ,
        "GROUNDSWELL_PROFILE": str(tenant.stack.profile.path),
        "GROUNDSWELL_API_KEY": tenant.api_key,
    }
    done = subprocess.run(
        [sys.executable, f"examples/{example}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=within_s,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_release_is_shipped_and_the_fleet_reported(tenant: Tenant, tmp_path: Path) -> None:
    tenant.start_agents("canary-1", "main-1")
    program = tenant.program("1.1.0", 0.5)
    tenant.key()
    key = tenant.directory / "release.pem"
    said = run(tenant, "ship_release.py", tenant.product, str(program), "1.1.0", str(key), "canary", "main")
    assert said.splitlines()[-1].startswith("STATE_COMPLETED"), said

    again = run(tenant, "ship_release.py", tenant.product, str(program), "1.1.0", str(key), "canary", "main")
    assert again.splitlines()[-1].startswith("STATE_COMPLETED"), "a second run finds everything done"

    report = json.loads(run(tenant, "fleet_report.py", tenant.product))
    assert report == {"canary": {"1.1.0": 1}, "main": {"1.1.0": 1}}


def test_a_tag_is_added_once_and_nothing_else_is_lost(tenant: Tenant) -> None:
    tenant.enrolled("canary-1")
    before = tenant.devices()["canary-1"]
    for _ in range(2):
        assert run(tenant, "careful_update.py", before.name, "field-test") == "field-test, made\n"
    after = tenant.devices()["canary-1"]
    assert list(after.tags) == ["field-test", "made"]
    assert (after.cohort, after.target) == (before.cohort, before.target)
