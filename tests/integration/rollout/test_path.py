"""Claim → observations through the worker → confirm → soak → gate, on real Kafka and Redis."""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from aiokafka import AIOKafkaConsumer
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.device.v1 import device_pb2
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import rollout_pb2

from libs.eventlog import partition_of
from libs.keystore import DirectoryKeyStore
from libs.seal import accepted_keys, unseal
from services.rollout.app import build
from tests.conftest import KafkaEnv
from tests.integration.rollout.stack import COHORT, GATEWAY, PRODUCT, Installation, eventually, installation

NAME = f"{PRODUCT}/rollouts/r1"
BUNDLE = artifacts_pb2.Bundle(
    name=f"{PRODUCT}/bundles/b2", version="2.0.0", security_version=1, offerable=True, statement=b"statement"
)
BUNDLE.entries.add(binary="x", target="t", size=3, sha256="ab" * 32, metadata="{}", metadata_sha256="cd" * 32)
BUNDLE.entries.add(binary="y", target="other", size=3, sha256="ef" * 32, metadata="{}", metadata_sha256="cd" * 32)
State = rollout_pb2.Rollout


@pytest.fixture
async def world(kafka_env: KafkaEnv, redis_url: str, tmp_path: Path) -> AsyncIterator[Installation]:
    made = installation(kafka_env, redis_url, tmp_path)
    await made.start(BUNDLE)
    try:
        yield made
    finally:
        await made.stop()


def plan() -> rollout_pb2.Rollout:
    rollout = rollout_pb2.Rollout(bundle=BUNDLE.name)
    stage = rollout.stages.add(display_name="canary", cohort=COHORT, max_in_flight=2)
    stage.gate.min_sample = 3
    stage.gate.soak.FromMilliseconds(1000)
    stage.gate.dark_after.FromMilliseconds(60_000)
    return rollout


async def get(world: Installation) -> rollout_pb2.Rollout:
    return await world.public.GetRollout(rollout_pb2.GetRolloutRequest(name=NAME), metadata=world.metadata, timeout=5)


async def in_state(world: Installation, state: int) -> bool:
    return (await get(world)).state == state


async def create_and_start(world: Installation) -> None:
    await world.say("artifacts", BUNDLE.name, artifacts_events.BundleChanged(bundle=BUNDLE, blob_keys=["k", "l"]))

    async def created() -> bool:
        try:
            await world.public.CreateRollout(
                rollout_pb2.CreateRolloutRequest(parent=PRODUCT, rollout_id="r1", rollout=plan()),
                metadata=world.metadata,
                timeout=10,
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            raise
        return True

    await eventually(created, "the rollout was created")
    await world.public.StartRollout(rollout_pb2.StartRolloutRequest(name=NAME), metadata=world.metadata, timeout=10)

    async def opened() -> bool:
        return (await get(world)).stage_statuses[0].state == rollout_pb2.StageStatus.STATE_OPEN

    await eventually(opened, "the stage opened")


def say(item: device_pb2.CheckInItem, *states: int, attempt: str = "") -> device_pb2.CheckInItem:
    """The device's next check-in."""
    item.ClearField("reports")
    for state in states:
        item.counter += 1
        item.reports.add(counter=item.counter, attempt=attempt, state=state)  # type: ignore[arg-type]
    item.counter += 1
    item.attempt = attempt
    item.body_sha256 = item.counter.to_bytes(32, "big")
    item.receipt.answer = "none"
    item.receipt.ClearField("steps")
    item.receipt.steps.add(code="RESOLVED", message="by a test")
    copy = device_pb2.CheckInItem()
    copy.CopyFrom(item)
    return copy


async def claim(world: Installation, *items: device_pb2.CheckInItem) -> list[rollout_pb2.ClaimResult]:
    candidate = releases_pb2.Candidate(release=f"{COHORT}/releases/r1-1", bundle=BUNDLE.name)
    request = rollout_pb2.ClaimOffersRequest(organization="acme", gateway=GATEWAY)
    for item in items:
        request.items.add(device=item.device, device_uid=item.device_uid, candidates=[candidate], check_in=say(item))
    return list((await world.internal.ClaimOffers(request, timeout=10)).results)


async def offered(world: Installation, item: device_pb2.CheckInItem) -> rollout_pb2.Offer:
    async def ask() -> rollout_pb2.Offer | None:
        result = (await claim(world, item))[0]
        return result.offer if result.HasField("offer") else None

    return await eventually(ask, "an offer")  # type: ignore[no-any-return]


async def state_of(world: Installation, attempt: str) -> int:
    listed = await world.public.ListAttempts(
        rollout_pb2.ListAttemptsRequest(parent=NAME), metadata=world.metadata, timeout=5
    )
    return next(int(each.state) for each in listed.attempts if each.name == attempt)


async def reaches(world: Installation, attempt: str, state: int) -> None:
    async def there() -> bool:
        return await state_of(world, attempt) == state

    await eventually(there, f"{attempt} in state {state}")


async def asked_together(world: Installation, item: device_pb2.CheckInItem, attempt: str) -> None:
    """Many at once: each gets its own answer or refusal, and strangers spoil the call before anything is decided."""
    Ask = rollout_pb2.AuthorizeSwitchRequest  # noqa: N806 - a class
    mine = Ask(organization="acme", attempt=attempt, device=item.device)
    not_mine = Ask(organization="acme", attempt=attempt, device=f"{item.device}-other")
    unknown = Ask(organization="acme", attempt=f"{item.device}/attempts/none", device=item.device)
    request = rollout_pb2.BatchAuthorizeSwitchRequest(
        organization="acme", requests=[mine, not_mine, unknown, *[mine] * 200]
    )
    call = world.internal.BatchAuthorizeSwitch(request, timeout=10)
    results = (await call).results
    assert results[0].response.answer == results[-1].response.answer == rollout_pb2.AuthorizeSwitchResponse.ANSWER_GO
    assert results[1].refusal.code == "ATTEMPT_NOT_YOURS"
    assert not results[1].HasField("response")
    assert results[2].response.answer == rollout_pb2.AuthorizeSwitchResponse.ANSWER_CANCEL
    assert len(results) == 203
    assert len([key for key, _ in await call.trailing_metadata() or () if key == "x-log-position"]) == 1
    request.requests.add(organization="other", attempt=attempt, device=item.device)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await world.internal.BatchAuthorizeSwitch(request, timeout=10)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def update(world: Installation, item: device_pb2.CheckInItem) -> None:
    """One device, all the way; its reports go through the topic and the worker."""
    offer = await offered(world, item)
    await world.publish(say(item, 2, 3, 4, 5, attempt=offer.attempt))
    await reaches(world, offer.attempt, device_pb2.ATTEMPT_STATE_INSTALLED)
    go = await world.internal.AuthorizeSwitch(
        rollout_pb2.AuthorizeSwitchRequest(organization="acme", attempt=offer.attempt, device=item.device), timeout=10
    )
    assert go.answer == go.ANSWER_GO
    await asked_together(world, item, offer.attempt)
    item.running.release, item.running.bundle, item.running.version = offer.release, offer.bundle, offer.version
    await world.publish(say(item, 6, 7, attempt=offer.attempt))
    await reaches(world, offer.attempt, device_pb2.ATTEMPT_STATE_CONFIRMED)


@pytest.mark.timeout(120)
async def test_a_stage_passes_on_what_devices_said_through_the_worker(world: Installation) -> None:
    devices = [await world.device(f"d{index}") for index in range(3)]
    await world.start_worker()
    await create_and_start(world)
    world.start_beating()

    # The offer: whole manifest, only what fits, links sealed for this device; and no third one under a cap of two.
    offer = await offered(world, devices[0])
    assert (offer.version, offer.statement, [binary.target for binary in offer.binaries]) == (
        "2.0.0",
        b"statement",
        ["t"],
    )
    _, _, _, sealed, digest = offer.binaries[0].link.split("/")
    now_ms = time.time_ns() // 1_000_000
    link = unseal(accepted_keys(DirectoryKeyStore(world.settings.keystore_dir), now_ms), sealed, now_ms)
    assert (link.attempt, link.digest, link.rollout) == (offer.attempt, digest, NAME)
    await offered(world, devices[1])
    refused = (await claim(world, devices[2]))[0]
    assert [reason.code for reason in refused.reasons] == ["STAGE_AT_CAPACITY"]

    # A record that nobody signed is kept aside with its reason, and holds nothing up.
    await world.publish(say(devices[2], 8, attempt=offer.attempt), forged=True)
    for item in devices:
        await update(world, item)
    await eventually(lambda: in_state(world, State.STATE_COMPLETED), "completed")
    status = (await get(world)).stage_statuses[0]
    assert (status.confirmed, status.soaked, status.failed, status.peak_in_flight) == (3, 3, 0, 2)

    explained = await world.public.ExplainDevice(
        rollout_pb2.ExplainDeviceRequest(name=devices[0].device), metadata=world.metadata, timeout=5
    )
    assert explained.running.version == "2.0.0"
    assert explained.grants[0].reasons[0].code == "GRANTED"
    assert explained.last_check_in.steps[0].code == "RESOLVED"
    assert await dead_letters(world) == [b"BAD_SIGNATURE"]

    async def healthy() -> bool:
        return await world.worker_health() == 200

    await eventually(healthy, "a healthy worker")
    assert world.worker is not None
    world.worker.send_signal(signal.SIGTERM)
    assert await world.worker.wait() == 0


async def dead_letters(world: Installation) -> list[bytes]:
    consumer = AIOKafkaConsumer(
        f"{world.settings.env}.device.checkins.dead.v1",
        bootstrap_servers=world.settings.kafka,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    try:
        record = await consumer.getone()
        return [value for name, value in record.headers if name == "rejected-reason"]
    finally:
        await consumer.stop()


@pytest.mark.timeout(120)
async def test_a_worker_that_is_killed_loses_nothing(world: Installation) -> None:
    device = await world.device("d0")
    await world.start_worker()
    await create_and_start(world)
    world.start_beating()
    offer = await offered(world, device)
    await world.publish(say(device, 2, attempt=offer.attempt))
    await reaches(world, offer.attempt, device_pb2.ATTEMPT_STATE_ACCEPTED)

    assert world.worker is not None
    world.worker.kill()
    await world.worker.wait()
    await world.publish(say(device, 3, 4, 5, attempt=offer.attempt))
    partition = partition_of("acme", world.settings.partitions)
    asked = rollout_pb2.GetWatermarkRequest(source_partition=partition)
    before = (await world.as_worker.GetWatermark(asked, timeout=5)).through_position
    await world.start_worker()
    await reaches(world, offer.attempt, device_pb2.ATTEMPT_STATE_INSTALLED)
    assert (await world.as_worker.GetWatermark(asked, timeout=5)).through_position > before


@pytest.mark.timeout(120)
async def test_a_worker_without_a_leader_is_not_healthy_and_loses_nothing(world: Installation) -> None:
    device = await world.device("d0")
    await world.start_worker()
    await create_and_start(world)
    world.start_beating()
    offer = await offered(world, device)

    async def health(status: int) -> bool:
        return await world.worker_health() == status

    await eventually(lambda: health(200), "healthy")
    assert world.app is not None
    await world.app.stop()
    await world.publish(say(device, 2, 3, attempt=offer.attempt))
    await eventually(lambda: health(503), "not healthy")
    world.app = await build(world.settings)
    await world.app.start()
    await eventually(lambda: health(200), "healthy again")

    async def arrived() -> bool:
        try:
            return await state_of(world, offer.attempt) == device_pb2.ATTEMPT_STATE_DOWNLOADING
        except grpc.aio.AioRpcError:
            return False

    await eventually(arrived, "the reports arrived")
