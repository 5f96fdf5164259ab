"""Composition root of rollout."""

from __future__ import annotations

import grpc
from groundswell.artifacts.v1 import artifacts_pb2_grpc
from groundswell.registry.v1 import registry_pb2_grpc
from groundswell.releases.v1 import releases_pb2_grpc
from groundswell.rollout.v1 import edge_pb2_grpc, rollout_pb2_grpc
from redis.asyncio import Redis

from libs.eventlog import Runtime
from libs.eventlog.kafka import KafkaLog
from libs.eventlog.ports import EventLog
from libs.keystore import DirectoryKeyStore
from libs.rpc import AccessDirectory, RpcServer, channel, service_runtime
from libs.settings import Settings
from services.rollout.domain import RolloutDomain, State
from services.rollout.edge import RolloutEdgeServicer
from services.rollout.internal import RolloutInternalServicer
from services.rollout.offers import OfferBuilder
from services.rollout.service import RolloutServicer
from services.rollout.tasks import handlers

NAME = "rollout"


class _Connections:
    """Channels and Redis: opened on first use, closed last."""

    def __init__(self, channels: list[grpc.aio.Channel], redis: Redis) -> None:
        self._channels = channels
        self._redis = redis

    async def start(self) -> None:
        """Connections are made when they are needed."""

    async def stop(self) -> None:
        for each in self._channels:
            await each.close()
        await self._redis.aclose()


async def build(settings: Settings, *, log: EventLog | None = None) -> RpcServer:
    """Everything, wired by plain calls."""
    log = log or KafkaLog(settings.kafka)
    registry, artifacts, releases = (
        channel(settings, service, identity=NAME) for service in ("registry", "artifacts", "releases")
    )
    releases_stub = releases_pb2_grpc.ReleasesInternalServiceStub(releases)
    redis = Redis.from_url(settings.redis, socket_timeout=2, socket_connect_timeout=2)
    # A stage that opens waits for what releases say of it, and with it a fleet: nothing is held up here.
    runtime: Runtime[State] = service_runtime(RolloutDomain(), log, settings, handlers(releases_stub), inbox_pace_s=0.0)
    public = RolloutServicer(
        runtime, artifacts_pb2_grpc.ArtifactsInternalServiceStub(artifacts), releases_stub, redis, settings.env
    )
    offers = OfferBuilder(DirectoryKeyStore(settings.keystore_dir))
    internal = RolloutInternalServicer(runtime, offers, settings.partitions)
    directory = AccessDirectory(log, settings, registry_pb2_grpc.RegistryInternalServiceStub(registry))
    return RpcServer(
        settings,
        NAME,
        runtime,
        log,
        public=[
            (rollout_pb2_grpc.add_RolloutServiceServicer_to_server, public),
            (
                edge_pb2_grpc.add_RolloutEdgeServiceServicer_to_server,
                RolloutEdgeServicer(internal, directory),
            ),
        ],
        internal=[(rollout_pb2_grpc.add_RolloutInternalServiceServicer_to_server, internal)],
        directory=directory,
        parts=[_Connections([registry, artifacts, releases], redis), directory],
    )
