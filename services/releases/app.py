"""Composition root of the releases service."""

from __future__ import annotations

import grpc
from groundswell.artifacts.v1 import artifacts_pb2, artifacts_pb2_grpc
from groundswell.registry.v1 import registry_pb2, registry_pb2_grpc
from groundswell.releases.v1 import releases_pb2_grpc as grpc_api

from libs.eventlog import Runtime
from libs.eventlog.kafka import KafkaLog
from libs.eventlog.ports import EventLog
from libs.rpc import AccessDirectory, RpcServer, channel, service_runtime
from libs.settings import Settings
from services.releases.domain import Releases, State
from services.releases.service import References, ReleasesInternalServicer, ReleasesServicer


class GrpcReferences:
    """``References`` over the owners' internal ports; their errors pass through with their reasons."""

    def __init__(
        self,
        registry: registry_pb2_grpc.RegistryInternalServiceAsyncStub,
        artifacts: artifacts_pb2_grpc.ArtifactsInternalServiceAsyncStub,
    ) -> None:
        self._registry = registry
        self._artifacts = artifacts

    async def check_cohort(self, name: str) -> None:
        await self._registry.LookupCohort(registry_pb2.GetCohortRequest(name=name))

    async def check_product(self, name: str) -> None:
        await self._registry.LookupProduct(registry_pb2.GetProductRequest(name=name))

    async def check_device(self, name: str) -> None:
        await self._registry.LookupDevice(registry_pb2.GetDeviceRequest(name=name))

    async def bundle(self, name: str) -> artifacts_pb2.Bundle:
        found: artifacts_pb2.Bundle = await self._artifacts.LookupBundle(artifacts_pb2.GetBundleRequest(name=name))
        return found


class _ChannelPart:
    """Closes a channel last, when nothing uses it any more."""

    def __init__(self, opened: grpc.aio.Channel) -> None:
        self._channel = opened

    async def start(self) -> None:
        """Channels connect when they are used."""

    async def stop(self) -> None:
        await self._channel.close()


async def build(settings: Settings, *, log: EventLog | None = None, references: References | None = None) -> RpcServer:
    """The releases service, ready to start."""
    log = log or KafkaLog(settings.kafka)
    runtime: Runtime[State] = service_runtime(Releases(), log, settings)
    to_registry = channel(settings, "registry", identity="releases")
    to_artifacts = channel(settings, "artifacts", identity="releases")
    registry = registry_pb2_grpc.RegistryInternalServiceStub(to_registry)
    artifacts = artifacts_pb2_grpc.ArtifactsInternalServiceStub(to_artifacts)
    references = references or GrpcReferences(registry, artifacts)
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
        parts=[_ChannelPart(to_registry), _ChannelPart(to_artifacts), directory],
    )
