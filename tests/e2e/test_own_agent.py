"""An agent of somebody's own, in the one file of the example, gets a rollout like any other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from clients.sdk.signing import public_bytes
from deploy.local.settings import ROOT
from tests.e2e import logs
from tests.e2e.stack import Stack
from tests.e2e.tenant import TARGET, Tenant

EXAMPLE = ROOT / "examples/own_agent.py"


def test_the_example_is_as_short_as_it_says() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 150


def test_an_agent_of_ones_own_is_updated_and_confirms(stack: Stack, tenant: Tenant, tmp_path: Path) -> None:
    bundle = tenant.bundle("1.1.0")
    identity = tenant.factory.device("canary-2")
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "root": str(tmp_path / "device"),
                "gateway": stack.profile.gateway,
                "server_name": tenant.server_name,
                "ca": str(stack.profile.ca.resolve()),
                "certificate": str(identity.certificate),
                "key": str(identity.key),
                "product": tenant.product,
                "target": TARGET,
                "trusted_keys": [public_bytes(tenant.key()).hex()],
                "factory_version": "1.0.0",
            }
        )
    )
    command = [sys.executable, str(EXAMPLE), str(config), "--until", "1.1.0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as agent:
        try:
            name = tenant.start_rollout(bundle, cohorts=[("canary", 1)])
            tenant.await_completion(name)
            assert agent.wait(60) == 0
        finally:
            agent.kill()

    assert logs.confirmations(stack, tenant.organization, name) == {tenant.device_name("canary-2"): 1}
    wanted = tenant.program("1.1.0", 1.0).read_bytes()
    assert (tmp_path / "device/firmware").read_bytes() == wanted
    logs.check(stack, tenant.organization, tenant.request_ids)
