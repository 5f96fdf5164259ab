"""A real agent process against a gateway and an object store of the test's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from demo.firmware import CONFIG_METADATA, PROGRAM_METADATA, archive
from tests.integration.agent import pki
from tests.integration.agent.doubles import PRODUCT, TARGET, Bundle, Gateway, raw_public, serving

GOOD = "#!/bin/sh\necho well\n"


def bundle(
    version: str, run: str = GOOD, *, security_version: int = 1, filler: int = 200_000, **changes: Any
) -> Bundle:
    """A small real firmware."""
    payload = version.encode() * (filler // len(version))
    # Stored bytes must not shrink, or a download would be a single read.
    noise = os.urandom(filler)
    program = archive({"run": (run.encode(), 0o755), "payload.bin": (payload[:10] + noise, 0o644)})
    config = json.dumps({"version": version}).encode()
    files = [(program, dict(PROGRAM_METADATA)), (config, dict(CONFIG_METADATA))]
    return Bundle(version, security_version, files, **changes)


@dataclass
class Device:
    """Starts, kills and looks into one agent."""

    root: Path
    config: dict[str, Any]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def state(self) -> Path:
        return self.root / "state"

    def start(self, failpoint: str = "", **changes: Any) -> subprocess.Popen[bytes]:
        path = self.root / "agent.json"
        path.write_text(json.dumps({**self.config, **changes}))
        process = subprocess.Popen(
            [sys.executable, "-m", "clients.agent", "--config", str(path)],
            env={**os.environ, "GROUNDSWELL_AGENT_FAILPOINT": failpoint},
        )
        self.processes.append(process)
        return process

    def kill_at(self, process: subprocess.Popen[bytes], step: str, timeout_s: float = 25.0) -> None:
        """Kill -9 where the agent says it is."""
        marker, until = self.state / f"at-{step}", time.monotonic() + timeout_s
        while not marker.exists():
            assert process.poll() is None, f"the agent ended before {step}"
            assert time.monotonic() < until, f"{step} was never reached"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.state / "state.json").read_bytes())["body"]["machine"]
        return found

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / "agent.log").read_text().splitlines()]

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def signers() -> list[Ed25519PrivateKey]:
    return [Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()]


@pytest.fixture
def gateway(tmp_path: Path, signers: list[Ed25519PrivateKey]) -> Iterator[Gateway]:
    pki.make(tmp_path / "tls")
    with serving(tmp_path / "tls", signers) as found:
        yield found
    assert found.violations == []


@pytest.fixture
def device(tmp_path: Path, gateway: Gateway, signers: list[Ed25519PrivateKey]) -> Iterator[Device]:
    config = {
        "gateway": f"127.0.0.1:{gateway.port}",
        "server_name": pki.SERVER_NAME,
        "ca_file": "tls/ca.pem",
        "certificate": "tls/device.pem",
        "key": "tls/device.key",
        "state_directory": "state",
        "product": PRODUCT,
        "target": TARGET,
        "trusted_keys": [raw_public(key).hex() for key in signers],
        "threshold": 2,
        "factory": {"version": "0.9.0", "security_version": 0},
        "serial": "SN-0042",
        "log": "agent.log",
        "timeout_s": 5,
        "trial_timeout_s": 20,
    }
    found = Device(tmp_path, config)
    yield found
    found.end()
