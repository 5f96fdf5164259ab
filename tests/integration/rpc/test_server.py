"""The gate of both ports with servicers that misbehave, over TLS, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from groundswell.rollout.v1 import rollout_pb2, rollout_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.credentials import ensure_certificates
from deploy.local.settings import load
from libs.eventlog import Deadline, Runtime, RuntimeConfig
from libs.eventlog.memory import MemoryLog
from libs.rpc import KeyRecord, RpcServer, error_of
from libs.settings import Settings
from services.registry.domain import Registry
from tests.integration.registry.running import TARGET
from tests.ports import free_address

NAME = "organizations/acme/products/pump/rollouts/r"
SECRET = "secret"


class Keys:
    """One key, which can be revoked."""

    def __init__(self) -> None:
        self.revoked = False

    async def lookup(self, organization: str, name: str) -> KeyRecord | None:
        digest = hashlib.sha256(SECRET.encode()).digest()
        return KeyRecord(name, digest, "m", "viewer", ("*",), "", 0, self.revoked)


class Servicer(rollout_pb2_grpc.RolloutServiceServicer):
    """Slow, broken, unfinished and endless methods."""

    def __init__(self) -> None:
        self.remaining: float | None = None
        self.closed = asyncio.Event()

    async def GetRollout(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.remaining = context.time_remaining()
        await asyncio.sleep(60)

    async def ListRollouts(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise ValueError("the details that nobody outside may see")

    async def ListAttempts(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def WatchRollout(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            while True:
                yield rollout_pb2.WatchRolloutResponse(stream_time_s=1)
                await asyncio.sleep(0.05)
        finally:
            self.closed.set()


class World:
    """A running server and a stub with the key."""

    def __init__(self, server: RpcServer, settings: Settings, keys: Keys, servicer: Servicer) -> None:
        self.server = server
        self.keys = keys
        self.servicer = servicer
        self.metadata = (("authorization", f"Bearer gsw_acme_k_{SECRET}"),)
        credentials = grpc.ssl_channel_credentials(settings.ca)
        self.channel = grpc.aio.secure_channel(settings.rollout_public, credentials, TARGET)
        self.stub: Any = rollout_pb2_grpc.RolloutServiceStub(self.channel)

    async def refused(self, method: str, request: Any, **options: Any) -> Any:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await getattr(self.stub, method)(request, metadata=self.metadata, **options)
        return error.value


async def drained(call: Any) -> None:
    async for _ in call:
        pass


@contextlib.asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[World]:
    ensure_certificates(load({"GROUNDSWELL_LOCAL_DIR": str(folder)}))
    settings = Settings(
        env="t",
        tls_dir=folder / "tls",
        rollout_internal=free_address(),
        rollout_public=free_address(),
    )
    log = MemoryLog(partitions=settings.partitions)
    runtime = Runtime(Registry(), log, RuntimeConfig(env="t", partitions=settings.partitions, verify_folds=True))
    keys = Keys()
    servicer = Servicer()  # type: ignore[abstract]  # most methods are not there, and say so
    server = RpcServer(
        settings,
        "rollout",
        runtime,
        log,
        public=[(rollout_pb2_grpc.add_RolloutServiceServicer_to_server, servicer)],
        internal=[],
        directory=keys,
    )
    await server.start()
    world = World(server, settings, keys, servicer)
    try:
        await runtime.wait_leading(Deadline.after(10))
        yield world
    finally:
        await world.channel.close()
        await server.stop()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with serving(tmp_path) as found:
        yield found


async def test_a_call_ends_at_its_deadline(world: World) -> None:
    began = time.monotonic()
    request = rollout_pb2.GetRolloutRequest(name=NAME)
    error = await world.refused("GetRollout", request, timeout=0.5)
    assert error.code() in {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}
    assert time.monotonic() - began < 5


async def test_a_call_without_a_deadline_gets_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libs.rpc.interceptor.DEFAULT_DEADLINE_S", 0.3)
    error = await world.refused("GetRollout", rollout_pb2.GetRolloutRequest(name=NAME))
    assert world.servicer.remaining is None
    assert (error.code(), error_of(error).reason) == (grpc.StatusCode.UNAVAILABLE, "DEADLINE_EXCEEDED")


async def test_a_bug_is_logged_under_an_id_and_shows_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    error = await world.refused("ListRollouts", rollout_pb2.ListRolloutsRequest(parent=NAME.rpartition("/rollouts")[0]))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "details" not in error.details()
    incident = error.details().rpartition(" ")[2]
    assert any(incident in record.getMessage() for record in caplog.records)


async def test_an_unfinished_method_says_so(world: World) -> None:
    error = await world.refused("ListAttempts", rollout_pb2.ListAttemptsRequest(parent=NAME))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_stream_ends_when_its_key_is_revoked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libs.rpc.interceptor.STREAM_RECHECK_S", 0.2)
    call = world.stub.WatchRollout(rollout_pb2.WatchRolloutRequest(name=NAME), metadata=world.metadata, timeout=20)
    await anext(aiter(call))
    world.keys.revoked = True
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await drained(call)
    assert error_of(error.value).reason == "API_KEY_REVOKED"
    await asyncio.wait_for(world.servicer.closed.wait(), 5)


async def test_a_stream_is_refused_like_any_call(world: World) -> None:
    for name, metadata, reason in (
        ("organizations/other/products/p/rollouts/r", world.metadata, "RESOURCE_NOT_FOUND"),
        (NAME, (), "CREDENTIALS_MISSING"),
        ("nonsense", world.metadata, "INVALID_FIELD"),
    ):
        call = world.stub.WatchRollout(rollout_pb2.WatchRolloutRequest(name=name), metadata=metadata, timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await anext(aiter(call))
        assert error_of(error.value).reason == reason


async def test_a_viewer_changes_nothing(world: World) -> None:
    error = await world.refused("PauseRollout", rollout_pb2.PauseRolloutRequest(name=NAME))
    assert (error.code(), error_of(error).reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")


async def test_health_needs_no_key_and_follows_the_runtime(world: World) -> None:
    stub: Any = health_pb2_grpc.HealthStub(world.channel)
    call = stub.Watch(health_pb2.HealthCheckRequest(), timeout=20)
    states = []
    async for answer in call:
        states.append(answer.status)
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            break
    stopping = asyncio.create_task(world.server.stop())
    async for answer in call:
        states.append(answer.status)
        if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
            break
    call.cancel()
    await stopping
    assert states[-2:] == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
