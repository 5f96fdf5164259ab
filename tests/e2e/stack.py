"""A whole installation of the tests' own, and the hands that hurt it: kill, stop, continue, arm a fail point."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.sdk import Client, Profile
from demo.steps import wait_until
from deploy.local import control
from deploy.local.settings import ROOT, SPAN, Settings, load
from deploy.local.supervisor import Status, read_state

# Below the ports that the system gives to outgoing connections: a service that restarts must find its port free.
PORTS_FROM_BASE = 11000
FAIL_POINTS_DIR = "GROUNDSWELL_FAIL_POINTS_DIR"
READY_WITHIN_S = 90.0


@dataclass(slots=True)
class Stack:
    """Every process of an installation, started by the same code as `make up`."""

    settings: Settings
    profile: Profile
    platform: Client
    _stopped: set[int] = field(default_factory=set)

    @property
    def ca_pem(self) -> bytes:
        return self.profile.ca.read_bytes()

    def client(self, api_key: str, **options: Any) -> Client:
        return Client(self.profile.endpoints, api_key, self.ca_pem, **options)

    # Processes.

    def processes(self) -> tuple[Status, ...]:
        return tuple(read_state(self.settings.run_dir).processes)

    def status(self, name: str) -> Status:
        return next(found for found in self.processes() if found.name == name)

    def pid(self, name: str) -> int:
        return int((self.settings.run_dir / f"{name}.pid").read_text())

    def kill9(self, name: str) -> int:
        """Power is cut; the pid that died. The supervisor brings the process back."""
        before = self.status(name)
        assert before.state == "ready", before
        os.kill(before.pid, signal.SIGKILL)
        return before.pid

    def terminate(self, name: str) -> int:
        before = self.status(name)
        os.kill(before.pid, signal.SIGTERM)
        return before.pid

    def await_successor(self, name: str, of_pid: int) -> None:
        """Until the supervisor has another process of that name ready."""
        wait_until(
            f"{name} to be ready again",
            READY_WITHIN_S,
            lambda: (now := self.status(name)).state == "ready" and now.pid != of_pid,
            0.1,
        )

    @contextlib.contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """Frozen (SIGSTOP): alive for the supervisor, silent for everybody else."""
        pid = self.pid(name)
        os.kill(pid, signal.SIGSTOP)
        self._stopped.add(pid)
        try:
            yield
        finally:
            self._stopped.discard(pid)
            os.kill(pid, signal.SIGCONT)

    def arm(self, service: str, point: str) -> Path:
        """Arm a fail point of a running service; the file is gone once it has acted."""
        armed = self.settings.local_dir / "failpoints" / f"{service}.{point}"
        armed.touch()
        return armed

    # What can be seen from outside.

    def health(self, name: str) -> dict[str, Any]:
        """The `/healthz` of the gateway or the worker."""
        address = self.settings.environment[f"GROUNDSWELL_{name.upper()}_HEALTH"]
        try:
            with urllib.request.urlopen(f"http://{address}/healthz", timeout=5) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def log_text(self, name: str) -> str:
        return (self.settings.logs_dir / f"{name}.log").read_text(errors="replace")

    def log_tails(self, lines: int = 12) -> str:
        """The end of every log but the servers', for a test that failed."""
        names = [path for path in sorted(self.settings.logs_dir.glob("*.log")) if path.stem not in ("redis", "s3")]
        return "\n".join(
            f"==> {path.stem} <==\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
            for path in names
        )


def settings(replicas: int = 1) -> Settings:
    """Beside the stack of `make up` and the servers of other tests, with the jars shared."""
    names = ("GROUNDSWELL_LOCAL_DIR", "GROUNDSWELL_PORT_BASE", "GROUNDSWELL_JARS_DIR")
    parent = load({name: os.environ[name] for name in names if name in os.environ}, ROOT)
    base = parent.port_base + PORTS_FROM_BASE
    if replicas == 1:
        return Settings(ROOT, parent.local_dir / "e2e", parent.jars_dir, base)
    folder = parent.local_dir / f"e2e-{replicas}"
    return Settings(ROOT, folder, parent.jars_dir, base + SPAN, replicas=replicas)


@contextlib.contextmanager
def running(replicas: int = 1) -> Iterator[Stack]:
    """An empty installation, alone: two runs of these tests would kill each other's processes."""
    ours = settings(replicas)
    ours.local_dir.mkdir(parents=True, exist_ok=True)
    with (ours.local_dir / "one-run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        control.clean(ours, say=lambda _: None)
        fail_points = ours.local_dir / "failpoints"
        fail_points.mkdir(exist_ok=True)
        for left in fail_points.iterdir():
            left.unlink()
        given = os.environ.get(FAIL_POINTS_DIR)
        os.environ[FAIL_POINTS_DIR] = str(fail_points)
        try:
            try:
                control.up(ours, say=lambda _: None)
            finally:
                if given is None:
                    del os.environ[FAIL_POINTS_DIR]
                else:
                    os.environ[FAIL_POINTS_DIR] = given
            profile = Profile.load(ours.local_dir / "profile.json")
            with Client(profile.endpoints, profile.keys["platform"], profile.ca.read_bytes()) as platform:
                yield Stack(ours, profile, platform)
        finally:
            control.down(ours, say=lambda _: None)
