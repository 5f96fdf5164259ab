"""The stream of check-ins stands still: nothing is decided meanwhile, and nothing is lost."""

from __future__ import annotations

import asyncio

from groundswell.device.v1 import device_pb2

from demo import checker
from demo.steps import wait_until
from tests.e2e import logs
from tests.e2e.stack import Stack
from tests.e2e.tenant import Rollout, StageStatus, Tenant

CANARY = ("canary-1", "canary-2")
MAIN = ("main-1",)
STAGES = (("canary", len(CANARY)), ("main", len(MAIN)))
DARK_AFTER_S = 5.0


def assert_nothing_was_lost(stack: Stack, tenant: Tenant, name: str) -> None:
    ended = tenant.await_completion(name)
    assert [status.dark + status.failed + status.reverted for status in ended.stage_statuses] == [0, 0]
    confirmed = logs.confirmations(stack, tenant.organization, name)
    assert confirmed == {tenant.device_name(device): 1 for device in (*CANARY, *MAIN)}
    logs.check(stack, tenant.organization, tenant.request_ids)


def heartbeats_after_confirmations(stack: Stack, tenant: Tenant) -> float:
    """Seconds of heartbeats, by the broker's clock, since the last canary said in the topic that it is confirmed."""
    topic = f"{stack.settings.env}.device.checkins.v1"
    confirmed: dict[str, int] = {}
    beat = 0
    for record in asyncio.run(checker.read_topic(stack.settings.kafka, topic)):
        batch = device_pb2.CheckInBatch.FromString(record.value)
        if batch.heartbeat:
            beat = max(beat, record.timestamp)
        elif batch.organization == tenant.organization:
            for item in batch.items:
                if any(report.state == device_pb2.ATTEMPT_STATE_CONFIRMED for report in item.reports):
                    confirmed.setdefault(item.device, record.timestamp)
    return (beat - max(confirmed.values())) / 1000 if len(confirmed) == len(CANARY) else 0.0


def test_with_the_worker_frozen_no_stage_passes_no_gate_trips_and_nothing_is_lost(stack: Stack, tenant: Tenant) -> None:
    bundle = tenant.bundle("1.1.0")
    tenant.start_agents(*CANARY, *MAIN)
    name = tenant.start_rollout(bundle, cohorts=STAGES, dark_after_s=DARK_AFTER_S)
    tenant.await_attempt(name, "INSTALLED")

    with stack.stopped("worker"):
        wait_until(
            "heartbeats to outlast soak and silence",
            60,
            lambda: heartbeats_after_confirmations(stack, tenant) > DARK_AFTER_S + 3,
            0.5,
        )
        meanwhile = tenant.rollout(name)

    assert meanwhile.state == Rollout.STATE_RUNNING
    assert [status.state for status in meanwhile.stage_statuses] == [
        StageStatus.STATE_OPEN,
        StageStatus.STATE_PENDING,
    ]
    assert meanwhile.stage_statuses[0].soaked == 0
    assert_nothing_was_lost(stack, tenant, name)


def test_a_worker_ended_while_the_leader_is_away_acknowledges_nothing_that_was_not_folded(
    stack: Stack, tenant: Tenant
) -> None:
    bundle = tenant.bundle("1.1.0")
    tenant.start_agents(*CANARY, *MAIN)
    name = tenant.start_rollout(bundle, cohorts=STAGES, dark_after_s=DARK_AFTER_S)
    tenant.await_attempt(name, "INSTALLED")

    with stack.stopped("rollout"):
        ended = stack.terminate("worker")
        wait_until("the worker to end", 60, lambda: stack.status("worker").pid != ended, 0.1)

    stack.await_successor("worker", ended)
    assert_nothing_was_lost(stack, tenant, name)
