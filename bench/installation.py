"""A whole installation for benchmarks of the device edge, beside the one of `make up`, and a tenant with devices.

It uses the hands of the end-to-end tests: the same supervised processes, the same public APIs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from clients.sdk import Client, Profile
from demo.factory import Identity
from demo.steps import wait_until
from deploy.local import control
from deploy.local.settings import ROOT, Settings, load
from tests.e2e.device import RawDevice
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant, is_admitted

PORTS_FROM_BASE = 12000


@contextlib.contextmanager
def running() -> Iterator[Stack]:
    """An empty installation; gone afterwards."""
    names = ("GROUNDSWELL_LOCAL_DIR", "GROUNDSWELL_PORT_BASE", "GROUNDSWELL_JARS_DIR")
    parent = load({name: os.environ[name] for name in names if name in os.environ}, ROOT)
    ours = Settings(ROOT, parent.local_dir / "bench", parent.jars_dir, parent.port_base + PORTS_FROM_BASE)
    control.clean(ours, say=lambda _: None)
    try:
        control.up(ours, say=lambda _: None)
        profile = Profile.load(ours.local_dir / "profile.json")
        with Client(profile.endpoints, profile.keys["platform"], profile.ca.read_bytes()) as platform:
            yield Stack(ours, profile, platform)
    finally:
        control.down(ours, say=lambda _: None)


@contextlib.contextmanager
def tenant_of(stack: Stack) -> Iterator[Tenant]:
    """An organization with product, cohorts and a factory CA."""
    with TemporaryDirectory() as directory:
        tenant = Tenant.create(stack, Path(directory))
        try:
            yield tenant
        finally:
            tenant.close()


def enrolled(tenant: Tenant, names: Sequence[str]) -> list[Identity]:
    """Devices that are known everywhere, with their certificates."""

    def enrol(name: str) -> Identity:
        identity = tenant.factory.device(name)
        device = RawDevice(tenant.stack.profile.gateway, tenant.server_name, tenant.stack.profile.ca, identity)
        wait_until(f"{name} to be admitted", 60, lambda: is_admitted(device), 0.2)
        return identity

    with ThreadPoolExecutor(8) as hands:
        identities = list(hands.map(enrol, names))
    wait_until("rollouts to know them", 60, lambda: all(map(tenant.is_known_to_rollouts, names)), 0.2)
    return identities


def what_else_ran() -> str:
    """For the reader of the figures."""
    one, five, _ = os.getloadavg()
    return f"{os.cpu_count()} cores, load average {one:.1f} (5 min {five:.1f})"
