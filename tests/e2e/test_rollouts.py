"""A rollout walks its stages to the end, whatever dies on the way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e import logs
from tests.e2e.stack import Stack
from tests.e2e.tenant import Rollout, StageStatus, Tenant

CANARY = ("canary-1", "canary-2")
MAIN = ("main-1", "main-2")
STAGES = (("canary", len(CANARY)), ("main", len(MAIN)))

EVERY_PROCESS = ("registry", "pki", "artifacts", "releases", "rollout", "webhooks", "gateway", "worker", "kafka")
ON_THE_PATH = ("rollout", "gateway", "worker")


class Versions:
    """A version for each rollout of the module, each higher than the one before."""

    def __init__(self) -> None:
        self.last = 0

    def next(self) -> str:
        self.last += 1
        return f"1.{self.last}.0"


@pytest.fixture(scope="module")
def versions() -> Versions:
    return Versions()


@pytest.fixture(scope="module")
def fleet(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    """One fleet for all: each test takes it a version further."""
    tenant = Tenant.create(stack, tmp_path_factory.mktemp("fleet"))
    tenant.start_agents(*CANARY, *MAIN)
    yield tenant
    tenant.close()


def assert_everybody_confirmed_once(stack: Stack, fleet: Tenant, name: str, version: str) -> None:
    ended = fleet.rollout(name)
    assert [status.confirmed for status in ended.stage_statuses] == [len(CANARY), len(MAIN)]
    confirmed = logs.confirmations(stack, fleet.organization, name)
    assert confirmed == {fleet.device_name(device): 1 for device in (*CANARY, *MAIN)}
    assert {device.reported.version for device in fleet.devices().values()} == {version}
    logs.check(stack, fleet.organization, fleet.request_ids)


def test_a_rollout_passes_its_stages_in_order_and_completes(stack: Stack, fleet: Tenant, versions: Versions) -> None:
    version = versions.next()
    name = fleet.start_rollout(fleet.bundle(version), cohorts=STAGES)

    first = fleet.await_rollout(name, "a canary to confirm", lambda now: now.stage_statuses[0].confirmed)
    assert first.stage_statuses[1].claimed == 0
    ended = fleet.await_completion(name)

    assert [status.state for status in ended.stage_statuses] == [StageStatus.STATE_PASSED] * 2
    assert ended.stage_statuses[0].pass_time.ToNanoseconds() <= ended.stage_statuses[1].open_time.ToNanoseconds()
    assert_everybody_confirmed_once(stack, fleet, name, version)


@pytest.mark.parametrize("process", EVERY_PROCESS)
def test_a_process_killed_while_devices_install_only_delays_the_rollout(
    stack: Stack, fleet: Tenant, versions: Versions, process: str
) -> None:
    version = versions.next()
    name = fleet.start_rollout(fleet.bundle(version), cohorts=STAGES)

    fleet.await_attempt(name, "DOWNLOADING", "DOWNLOADED", "INSTALLED")
    died = stack.kill9(process)

    fleet.await_completion(name)
    stack.await_successor(process, died)
    assert_everybody_confirmed_once(stack, fleet, name, version)


@pytest.mark.parametrize("process", ON_THE_PATH)
def test_a_process_killed_just_before_a_stage_passes_only_delays_the_rollout(
    stack: Stack, fleet: Tenant, versions: Versions, process: str
) -> None:
    version = versions.next()
    name = fleet.start_rollout(fleet.bundle(version), cohorts=STAGES, soak_s=2)

    seen = fleet.await_rollout(
        name, "all canaries to confirm", lambda now: now.stage_statuses[0].confirmed == len(CANARY)
    )
    assert seen.stage_statuses[0].state == StageStatus.STATE_OPEN
    died = stack.kill9(process)

    ended = fleet.await_completion(name)
    assert ended.state == Rollout.STATE_COMPLETED
    stack.await_successor(process, died)
    assert_everybody_confirmed_once(stack, fleet, name, version)
