"""Composition root of the artifacts service."""

from __future__ import annotations

from groundswell.artifacts.v1 import artifacts_pb2_grpc as grpc_api
from groundswell.registry.v1 import registry_pb2_grpc

from libs.blobs.s3 import S3BlobStore
from libs.eventlog import Runtime, RuntimeConfig
from libs.eventlog.kafka import KafkaLog
from libs.eventlog.ports import EventLog
from libs.rpc import AccessDirectory, RpcServer, channel
from libs.settings import Settings
from services.artifacts.domain import Artifacts
from services.artifacts.service import ArtifactsInternalServicer, ArtifactsServicer
from services.artifacts.state import State
from services.artifacts.tasks import HashTask


async def build(settings: Settings, *, log: EventLog | None = None) -> RpcServer:
    """The artifacts service, ready to start."""
    log = log or KafkaLog(settings.kafka)
    config = RuntimeConfig(
        env=settings.env, partitions=settings.partitions, address=settings.address("artifacts", "internal")
    )
    blobs = S3BlobStore.from_settings(settings)
    runtime: Runtime[State] = Runtime(Artifacts(), log, config, {"hash": HashTask(blobs)})
    registry = registry_pb2_grpc.RegistryInternalServiceStub(channel(settings, "registry", identity="artifacts"))
    directory = AccessDirectory(log, settings, registry)
    return RpcServer(
        settings,
        "artifacts",
        runtime,
        log,
        public=[(grpc_api.add_ArtifactsServiceServicer_to_server, ArtifactsServicer(runtime, registry, blobs))],
        internal=[(grpc_api.add_ArtifactsInternalServiceServicer_to_server, ArtifactsInternalServicer(runtime))],
        directory=directory,
        parts=[blobs, directory],
    )
