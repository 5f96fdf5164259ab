"""Composition root of the artifacts service."""

from __future__ import annotations

import grpc
from groundswell.artifacts.v1 import artifacts_pb2_grpc as pb_grpc
from groundswell.registry.v1 import registry_pb2_grpc

from libs.blobs.s3 import S3BlobStore
from libs.eventlog import Runtime
from libs.eventlog.kafka import KafkaLog
from libs.eventlog.ports import EventLog
from libs.rpc import AccessDirectory, RpcServer, channel, service_runtime
from libs.settings import Settings
from services.artifacts.domain import Artifacts
from services.artifacts.service import ArtifactsInternalServicer, ArtifactsServicer
from services.artifacts.state import State
from services.artifacts.tasks import ArtifactsTasks


class _Connection:
    """A channel: opened on first use, closed last."""

    def __init__(self, opened: grpc.aio.Channel) -> None:
        self._channel = opened

    async def start(self) -> None:
        """It connects when it is needed."""

    async def stop(self) -> None:
        await self._channel.close()


async def build(settings: Settings, *, log: EventLog | None = None) -> RpcServer:
    """Everything, wired; nothing is started yet."""
    log = log or KafkaLog(settings.kafka)
    blobs = S3BlobStore.from_settings(settings)
    domain = Artifacts(settings.artifacts_grace_s * 1000)
    runtime: Runtime[State] = service_runtime(domain, log, settings, ArtifactsTasks(blobs).handlers())
    to_registry = channel(settings, "registry", identity="artifacts")
    registry = registry_pb2_grpc.RegistryInternalServiceStub(to_registry)
    directory = AccessDirectory(log, settings, registry)
    return RpcServer(
        settings,
        "artifacts",
        runtime,
        log,
        public=[(pb_grpc.add_ArtifactsServiceServicer_to_server, ArtifactsServicer(runtime, registry, blobs))],
        internal=[(pb_grpc.add_ArtifactsInternalServiceServicer_to_server, ArtifactsInternalServicer(runtime))],
        directory=directory,
        parts=[_Connection(to_registry), blobs, directory],
    )
