"""docs/guides/progressive-deployment.md, command by command, with a real agent in each cohort."""

from __future__ import annotations

import json
from typing import Any

import pytest
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import releases_pb2

from demo.steps import wait_until
from tests.e2e import logs
from tests.e2e.guide import Guide
from tests.e2e.stack import Stack
from tests.e2e.tenant import Rollout, StageStatus, Tenant

COHORTS = ("canary", "beta", "production")


def made_small(rollout: dict[str, Any]) -> dict[str, Any]:
    """The page's rollout, for a fleet of three devices and a test's patience. Everything else stays as it is shown."""
    assert [stage["cohort"] for stage in rollout["stages"]] == list(COHORTS)
    for stage in rollout["stages"]:
        stage["gate"] |= {"min_sample": 1, "soak": "2s", "dark_after": "60s"}
    return rollout


@pytest.mark.timeout(600)
def test_the_guide_to_progressive_deployment_holds(stack: Stack, tenant: Tenant) -> None:
    for cohort in ("beta", "production"):
        tenant.client.registry.CreateCohort(
            registry_pb2.CreateCohortRequest(
                parent=tenant.product, cohort_id=cohort, cohort=registry_pb2.Cohort(display_name=cohort)
            )
        )
    devices = [f"{cohort}-1" for cohort in COHORTS]
    tenant.start_agents(*devices)
    for cohort, device in zip(COHORTS, devices, strict=True):
        tenant.update_device(device, cohort=tenant.cohort(cohort))
    tenant.bundle("1.1.0")
    guide = Guide.open("progressive-deployment.md", stack, tenant)
    rollout = made_small(guide.file("rollout.json"))
    (guide.directory / "rollout.json").write_text(json.dumps(rollout))
    name = tenant.rollout_name("to-1-1-0")
    try:
        for command in guide.commands():
            match command[1:4]:
                case ["explain", "device", _]:  # as the page says: when the stage awaits approval
                    waiting = tenant.await_rollout(name, "approval to be awaited", awaits_approval)
                    assert [status.confirmed for status in waiting.stage_statuses] == [1, 1, 0]
            said = guide.run(command)
            match command[1:3]:
                case ["rollout", "pause"]:
                    assert tenant.rollout(name).state == Rollout.STATE_PAUSED
                case ["rollout", "resume"]:
                    assert tenant.rollout(name).state == Rollout.STATE_RUNNING
                case ["explain", "device"]:
                    assert "granted" in said
                case ["list", "rollouts"]:
                    assert "STATE_COMPLETED" in said
    finally:
        guide.close()
    ended = tenant.rollout(name)
    assert ended.state == Rollout.STATE_COMPLETED
    asked = releases_pb2.GetGraphRequest(cohort=tenant.cohort("production"))

    def arrived() -> bool:
        return [node.devices for node in tenant.client.releases.GetGraph(asked).nodes] == [1]

    wait_until("the device to stand on its release", 30, arrived)
    confirmed = logs.confirmations(stack, tenant.organization, name)
    assert confirmed == {tenant.device_name(device): 1 for device in devices}


def awaits_approval(rollout: Rollout) -> bool:
    return rollout.stage_statuses[1].state == StageStatus.STATE_AWAITING_APPROVAL
