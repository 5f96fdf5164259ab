"""Watching, killing, retrying over the real ports: streams that outlive a leader, answers that are the same twice."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.device.v1 import device_pb2
from groundswell.rollout.v1 import rollout_pb2
from grpc_status import rpc_status

from services.rollout.app import build
from tests.conftest import KafkaEnv
from tests.integration.rollout.stack import PRODUCT, Installation, eventually, installation
from tests.integration.rollout.test_path import BUNDLE, NAME, claim, create_and_start, offered, say

State = rollout_pb2.Rollout
NO_ID = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
async def world(kafka_env: KafkaEnv, redis_url: str, tmp_path: Path) -> AsyncIterator[Installation]:
    bundle = artifacts_pb2.Bundle()
    bundle.CopyFrom(BUNDLE)
    made = installation(kafka_env, redis_url, tmp_path)
    await made.start(bundle)
    try:
        yield made
    finally:
        await made.stop()


def reason_of(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason


async def refused(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code(), reason_of(caught.value)


def watch(world: Installation) -> object:
    return world.public.WatchRollout(rollout_pb2.WatchRolloutRequest(name=NAME), metadata=world.metadata)


@pytest.mark.timeout(180)
async def test_a_watcher_hears_of_changes_and_takes_the_stream_up_again_after_its_server_went_away(
    world: Installation,
) -> None:
    await create_and_start(world)
    seen: list[int] = []
    ended: list[grpc.StatusCode] = []

    async def follow() -> None:
        while True:
            try:
                async for update in watch(world):  # type: ignore[attr-defined]
                    if not seen or seen[-1] != update.rollout.state:
                        seen.append(update.rollout.state)
            except grpc.aio.AioRpcError as error:
                ended.append(error.code())
            await asyncio.sleep(0.05)

    async def shows(*states: int) -> bool:
        return seen == list(states)

    following = asyncio.create_task(follow())
    try:
        await eventually(lambda: shows(State.STATE_RUNNING), "the rollout as it is")
        await world.public.PauseRollout(rollout_pb2.PauseRolloutRequest(name=NAME), metadata=world.metadata, timeout=10)
        await eventually(lambda: shows(State.STATE_RUNNING, State.STATE_PAUSED), "the pause")

        assert world.app is not None
        await world.app.stop()
        world.app = await build(world.settings)
        await world.app.start()

        async def resumed() -> bool:
            try:
                await world.public.ResumeRollout(
                    rollout_pb2.ResumeRolloutRequest(name=NAME), metadata=world.metadata, timeout=10
                )
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    return False
                raise
            return True

        await eventually(resumed, "a new leader")
        wanted = (State.STATE_RUNNING, State.STATE_PAUSED, State.STATE_RUNNING)
        await eventually(lambda: shows(*wanted), "the stream went on")
    finally:
        following.cancel()
    assert ended
    assert set(ended) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


@pytest.mark.timeout(180)
async def test_a_kill_is_one_command_however_often_it_is_sent_and_stops_offers_and_go(world: Installation) -> None:
    device, other = await world.device("d0"), await world.device("d1")
    await create_and_start(world)
    world.start_beating()
    offer = await offered(world, device)

    request = rollout_pb2.KillRolloutRequest(name=NAME, reason="bricks", request_id=str(uuid.uuid4()))
    killed = await world.public.KillRollout(request, metadata=world.metadata, timeout=10)
    again = await world.public.KillRollout(request, metadata=world.metadata, timeout=10)
    assert again == killed
    assert killed.state == State.STATE_KILLED

    go = await world.internal.AuthorizeSwitch(
        rollout_pb2.AuthorizeSwitchRequest(organization="acme", attempt=offer.attempt, device=device.device), timeout=10
    )
    assert go.answer == go.ANSWER_CANCEL
    results = await claim(world, device, other)
    assert not any(result.HasField("offer") for result in results)
    assert results[1].reasons[0].code in ("ROLLOUT_KILLED", "RELEASE_DISABLED")
    listed = await world.public.ListAttempts(
        rollout_pb2.ListAttemptsRequest(parent=NAME, filter="state = CANCELLED"), metadata=world.metadata, timeout=5
    )
    assert [attempt.name for attempt in listed.attempts] == [offer.attempt]


@pytest.mark.timeout(180)
async def test_bad_input_gets_a_clear_error_and_changes_nothing(world: Installation) -> None:
    device = await world.device("d0")
    await create_and_start(world)
    before = await world.public.GetRollout(rollout_pb2.GetRolloutRequest(name=NAME), metadata=world.metadata, timeout=5)
    unknown = f"{PRODUCT}/rollouts/none"
    foreign = NAME.replace("acme", "other")
    calls = world.public
    kill, retry = rollout_pb2.KillRolloutRequest, rollout_pb2.RetryRolloutRequest
    held, attempt = rollout_pb2.ListHeldDevicesRequest, rollout_pb2.RetryAttemptRequest
    code = grpc.StatusCode
    table = [
        (calls.KillRollout, kill(name=unknown), code.NOT_FOUND, "RESOURCE_NOT_FOUND"),
        (calls.KillRollout, kill(name=foreign), code.NOT_FOUND, "RESOURCE_NOT_FOUND"),
        (calls.KillRollout, kill(name="nonsense"), code.INVALID_ARGUMENT, "INVALID_FIELD"),
        (calls.KillRollout, kill(name=NAME, etag="0"), code.ABORTED, "ETAG_MISMATCH"),
        (calls.KillRollout, kill(name=NAME, reason="x" * 1025), code.INVALID_ARGUMENT, "INVALID_FIELD"),
        (calls.KillRollout, kill(name=NAME, request_id="1"), code.INVALID_ARGUMENT, "INVALID_FIELD"),
        (calls.RetryRollout, retry(name=NAME), code.FAILED_PRECONDITION, "NOTHING_TO_RETRY"),
        (calls.RetryRollout, retry(name=NAME, devices=["d"] * 2), code.INVALID_ARGUMENT, "INVALID_FIELD"),
        (
            calls.RetryRollout,
            retry(name=NAME, devices=[f"d{index}" for index in range(501)]),
            code.INVALID_ARGUMENT,
            "INVALID_FIELD",
        ),
        (calls.RetryRollout, retry(name=foreign), code.NOT_FOUND, "RESOURCE_NOT_FOUND"),
        (calls.RetryAttempt, attempt(name=f"{device.device}/attempts/{NO_ID}"), code.NOT_FOUND, "RESOURCE_NOT_FOUND"),
        (calls.RetryAttempt, attempt(name=f"{device.device}/attempts/none"), code.INVALID_ARGUMENT, "INVALID_FIELD"),
        (
            calls.RetryAttempt,
            attempt(name=f"{device.device}/attempts/{NO_ID}", reason="x" * 1025),
            code.INVALID_ARGUMENT,
            "INVALID_FIELD",
        ),
        (
            calls.RetryAttempt,
            attempt(name=f"{device.device.replace('acme', 'other')}/attempts/{NO_ID}"),
            code.NOT_FOUND,
            "RESOURCE_NOT_FOUND",
        ),
        (calls.ListHeldDevices, held(parent=unknown), code.NOT_FOUND, "RESOURCE_NOT_FOUND"),
        (calls.ListHeldDevices, held(parent=foreign), code.NOT_FOUND, "RESOURCE_NOT_FOUND"),
        (calls.ListHeldDevices, held(parent=NAME, page_token="?"), code.INVALID_ARGUMENT, "INVALID_FIELD"),
    ]
    for method, request, status, reason in table:
        found = await refused(method(request, metadata=world.metadata, timeout=10))
        assert found == (status, reason), (request, found)
    after = await world.public.GetRollout(rollout_pb2.GetRolloutRequest(name=NAME), metadata=world.metadata, timeout=5)
    assert after == before

    # One that failed is retried by name, once, and only then asked again.
    offer = await offered(world, device)
    failed = say(device, device_pb2.ATTEMPT_STATE_FAILED, attempt=offer.attempt)
    request = rollout_pb2.ClaimOffersRequest(organization="acme", gateway="organizations/platform/gateways/g1")
    request.items.add(device=device.device, device_uid=device.device_uid, check_in=failed)
    await world.internal.ClaimOffers(request, timeout=10)
    other = f"{PRODUCT}/devices/d9"
    found = await refused(
        calls.RetryRollout(retry(name=NAME, devices=[device.device, other]), metadata=world.metadata, timeout=10)
    )
    assert found == (code.FAILED_PRECONDITION, "NOTHING_TO_RETRY"), "all or none"
    device.attempt = ""
    await calls.RetryRollout(retry(name=NAME, devices=[device.device]), metadata=world.metadata, timeout=10)
    await calls.ResumeRollout(rollout_pb2.ResumeRolloutRequest(name=NAME), metadata=world.metadata, timeout=10)
    again = await offered(world, device)
    assert again.attempt != offer.attempt

    # By its attempt: only the last one, and said twice with one id it is one answer.
    found = await refused(calls.RetryAttempt(attempt(name=offer.attempt), metadata=world.metadata, timeout=10))
    assert found == (code.FAILED_PRECONDITION, "NOTHING_TO_RETRY")
    failed = say(device, device_pb2.ATTEMPT_STATE_FAILED, attempt=again.attempt)
    del request.items[:]
    request.items.add(device=device.device, device_uid=device.device_uid, check_in=failed)
    await world.internal.ClaimOffers(request, timeout=10)
    once = attempt(name=again.attempt, request_id=str(uuid.uuid4()), reason="new battery")
    answers = [await calls.RetryAttempt(once, metadata=world.metadata, timeout=10) for _ in range(2)]
    assert answers[0] == answers[1]
    assert (answers[0].name, answers[0].state) == (again.attempt, device_pb2.ATTEMPT_STATE_FAILED)
    device.attempt = ""
    await calls.ResumeRollout(rollout_pb2.ResumeRolloutRequest(name=NAME), metadata=world.metadata, timeout=10)
    assert (await offered(world, device)).attempt not in (offer.attempt, again.attempt)
