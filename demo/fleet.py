"""Sixty devices as sixty processes of the real agent, each with its own key, certificate and slots on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from demo.factory import Identity
from demo.steps import ROOT, DemoError

FAILPOINT = "GROUNDSWELL_AGENT_FAILPOINT"


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """One device as the factory makes it."""

    device_id: str
    identity: Identity
    serial: str


@dataclass(frozen=True, slots=True)
class Site:
    """What all devices of the fleet share."""

    gateway: str
    server_name: str
    ca_file: Path
    product: str
    target: str
    trusted_keys: Sequence[str]
    factory_version: str


@dataclass(slots=True)
class Device:
    """A device's process and folder."""

    plan: DevicePlan
    directory: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self, failpoint: str = "") -> None:
        """Start the agent, optionally armed to stop at a named step."""
        environment = dict(os.environ)
        environment.pop(FAILPOINT, None)
        if failpoint:
            environment[FAILPOINT] = failpoint
        with (self.directory / "agent.stderr").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "clients.agent", "--config", str(self.directory / "agent.json")],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def marker(self, failpoint: str) -> Path:
        """The file that appears when the armed step is reached."""
        return self.directory / "state" / f"at-{failpoint}"

    def kill(self) -> None:
        """Kill -9: power is cut."""
        if self.process is None:
            raise DemoError(f"{self.plan.device_id} is not running")
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Ask it to end, then make sure."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def alive(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.poll() is None


@dataclass(slots=True)
class Fleet:
    """All devices by id."""

    directory: Path
    devices: dict[str, Device] = field(default_factory=dict)

    def add(self, plan: DevicePlan, site: Site) -> None:
        """Write a device's configuration."""
        directory = self.directory / plan.device_id
        directory.mkdir(parents=True)
        configuration = {
            "gateway": site.gateway,
            "server_name": site.server_name,
            "ca_file": str(site.ca_file),
            "certificate": str(plan.identity.certificate),
            "key": str(plan.identity.key),
            "state_directory": str(directory / "state"),
            "product": site.product,
            "target": site.target,
            "trusted_keys": list(site.trusted_keys),
            "threshold": 1,
            "factory": {"version": site.factory_version, "security_version": 1},
            "serial": plan.serial,
            "log": str(directory / "agent.log"),
            "boot_timeout_s": 10,
            "health_timeout_s": 5,
        }
        (directory / "agent.json").write_text(json.dumps(configuration, indent=1))
        self.devices[plan.device_id] = Device(plan, directory)

    def start(self, armed: Mapping[str, str]) -> None:
        """Start every device; ``armed`` maps a device id to the step it stops at."""
        for device_id, device in self.devices.items():
            device.start(armed.get(device_id, ""))

    def stop(self) -> None:
        """End every process that was started here."""
        for device in self.devices.values():
            if device.alive() and device.process is not None:
                device.process.terminate()
        for device in self.devices.values():
            device.stop()

    def resident_mib(self) -> float:
        """Resident memory of all agents together."""
        total = 0
        for device in self.devices.values():
            if device.process is None:
                continue
            try:
                fields = Path(f"/proc/{device.process.pid}/statm").read_text().split()
            except OSError:
                continue
            total += int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
        return total / 2**20

    def dead(self) -> list[str]:
        """Devices whose process has ended although nobody asked."""
        return [device_id for device_id, device in self.devices.items() if not device.alive()]


class PowerCuts:
    """Kills armed devices when they reach their step, and starts them again unarmed."""

    def __init__(self, fleet: Fleet, armed: Mapping[str, str]) -> None:
        self._fleet = fleet
        self._waiting = dict(armed)
        self.done: list[tuple[str, str, float]] = []

    def poll(self) -> None:
        """Cut the power of whoever has reached its step."""
        for device_id, step in list(self._waiting.items()):
            device = self._fleet.devices[device_id]
            marker = device.marker(step)
            if marker.exists():
                device.kill()
                marker.unlink()
                device.start()
                del self._waiting[device_id]
                self.done.append((device_id, step, time.monotonic()))

    @property
    def waiting(self) -> Mapping[str, str]:
        """Devices not yet killed."""
        return self._waiting
