"""Automatic quarantine through the real log: records of rollout in, a quarantine out, its end by a timer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.rollout.v1 import events_pb2 as rollout_events
from groundswell.rollout.v1 import rollout_pb2

from demo.steps import wait_until
from libs.eventlog import Command, Context, Deadline, Decision, Event, NewEvent, Public, Runtime, RuntimeConfig
from libs.eventlog.kafka import KafkaLog
from tests.integration.registry.running import PARTITIONS, Running

WITHIN_S = 40.0
BLOCK_S = 15


class Rollout:
    """A rollout service that only publishes."""

    service = "rollout"
    event_types: Sequence[type[Message]] = (rollout_events.AttemptChanged,)
    sources: Mapping[str, Sequence[type[Message]]] = MappingProxyType({})

    def initial_state(self, partition: int) -> None:
        return None

    def decide(self, _state: None, command: object, ctx: Context) -> Decision:
        assert isinstance(command, Public)
        return Decision((NewEvent(ctx.organization, command.resource, command.payload, (command,)),))

    def evolve(self, _state: None, _event: Event) -> None:
        return None


async def fail(running: Running, organization: str, device: str, attempts: Sequence[int]) -> None:
    """Publish that attempts of a device failed."""
    log = KafkaLog(running.settings.kafka)
    runtime: Runtime[Any] = Runtime(Rollout(), log, RuntimeConfig(env=running.settings.env, partitions=PARTITIONS))
    await runtime.start()
    try:
        await runtime.wait_leading(Deadline.after(WITHIN_S))
        for number in attempts:
            name = f"{device}/attempts/{number}"
            image = rollout_pb2.Attempt(name=name, device=device, state=device_pb2.ATTEMPT_STATE_FAILED)
            said = Public(name, rollout_events.AttemptChanged(attempt=image, change="device.update_failed"))
            await runtime.submit(Command(organization, said), Deadline.after(WITHIN_S))
    finally:
        await runtime.stop()
        await log.close()


@pytest.mark.timeout(240)
def test_a_failing_device_is_quarantined_and_released_by_itself(running: Running) -> None:
    tenant = running.organization()
    product = tenant.product().name
    device = tenant.call("CreateDevice", pb.CreateDeviceRequest(parent=product, device_id="SN-1", device=pb.Device()))
    limits = pb.AutomaticQuarantine(failures=3, block_for=Duration(seconds=BLOCK_S))
    wanted = pb.Product(name=product, policy=pb.ConfigurationPolicy(automatic_quarantine=limits))
    mask = FieldMask(paths=["policy.automatic_quarantine"])
    tenant.call("UpdateProduct", pb.UpdateProductRequest(product=wanted, update_mask=mask))

    def now() -> pb.Device:
        found: pb.Device = tenant.call("GetDevice", pb.GetDeviceRequest(name=device.name))
        return found

    asyncio.run(fail(running, tenant.organization, device.name, (1, 2)))
    running.restart()
    assert not now().quarantined
    # What was counted before the power cut counts, and an attempt that is told again does not.
    asyncio.run(fail(running, tenant.organization, device.name, (2, 3)))
    held = wait_until("the device to be quarantined", WITHIN_S, lambda: (found := now()).quarantined and found, 0.05)
    assert held.quarantine_reason == "automatic: 3 failed attempts in a row"
    assert held.HasField("quarantine_end_time")
    running.restart()
    free = wait_until("the quarantine to end", WITHIN_S, lambda: not (found := now()).quarantined and found, 0.1)
    assert not free.HasField("quarantine_end_time")
    assert int(free.etag) == int(held.etag) + 1
