"""Composition root of the releases service."""

from __future__ import annotations

from groundswell.artifacts.v1 import artifacts_pb2_grpc
from groundswell.registry.v1 import registry_pb2_grpc
from groundswell.releases.v1 import releases_pb2_grpc as grpc_api

from libs.eventlog import Runtime, RuntimeConfig
from libs.eventlog.kafka import KafkaLog
from libs.eventlog.ports import EventLog
from libs.rpc import AccessDirectory, RpcServer, channel
from libs.settings import Settings
from services.releases.domain import Releases, State
from services.releases.service import References, ReleasesInternalServicer, ReleasesServicer


async def build(settings: Settings, *, log: EventLog | None = None) -> RpcServer:
    """The releases service, ready to start."""
    log = log or KafkaLog(settings.kafka)
    config = RuntimeConfig(
        env=settings.env, partitions=settings.partitions, address=settings.address("releases", "internal")
    )
    runtime: Runtime[State] = Runtime(Releases(), log, config)
    registry = registry_pb2_grpc.RegistryInternalServiceStub(channel(settings, "registry", identity="releases"))
    artifacts = artifacts_pb2_grpc.ArtifactsInternalServiceStub(channel(settings, "artifacts", identity="releases"))
    references = References(registry, artifacts)
    directory = AccessDirectory(log, settings, registry)
    return RpcServer(
        settings,
        "releases",
        runtime,
        log,
        public=[(grpc_api.add_ReleasesServiceServicer_to_server, ReleasesServicer(runtime, references))],
        internal=[
            (grpc_api.add_ReleasesInternalServiceServicer_to_server, ReleasesInternalServicer(runtime, references))
        ],
        directory=directory,
        parts=[directory],
    )
