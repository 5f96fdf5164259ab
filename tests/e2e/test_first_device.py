"""docs/guides/first-device.md in a shell, as it stands there."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local.settings import ROOT
from tests.e2e.guide import Guide
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant


@pytest.mark.timeout(240)
def test_whoever_follows_the_page_has_a_device_that_took_an_update(
    stack: Stack, tenant: Tenant, tmp_path: Path
) -> None:
    page = Guide.open("first-device.md", stack, tenant)
    where, *steps = [text for _, text in page.blocks("sh")]
    assert "export GATEWAY=" in where
    hands = tmp_path / "bin"
    hands.mkdir()
    (hands / "python").symlink_to(sys.executable)
    swell = hands / "swell"
    swell.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m clients.cli "$@"\n')
    swell.chmod(0o755)
    environment = {
        **page.environment,
        "PATH": f"{hands}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}",
        "GATEWAY": stack.profile.gateway,
        "DOMAIN": str(stack.profile.gateway_domain),
        "GATEWAY_CA": str(stack.profile.ca),
    }
    end = 'kill "$(cat agent.pid)" 2>/dev/null'
    script = "\n".join(["set -eu", f"trap '{end}' EXIT", *steps, "wait", "trap - EXIT"])
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "COMPLETED" in said
    assert "GRANTED: admitted by its plan" in said
    assert tenant.runs("canary-001") == "1.1.0"
