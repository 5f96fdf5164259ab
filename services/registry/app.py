"""Composition root of the registry."""

from __future__ import annotations

from groundswell.registry.v1 import registry_pb2_grpc as grpc_api

from libs.eventlog import Runtime, RuntimeConfig
from libs.eventlog.kafka import KafkaLog
from libs.eventlog.ports import EventLog
from libs.rpc import RpcServer
from libs.settings import Settings
from services.registry.domain import Registry, State
from services.registry.service import OwnKeys, RegistryInternalServicer, RegistryServicer


async def build(settings: Settings, *, log: EventLog | None = None) -> RpcServer:
    """The registry, ready to start."""
    log = log or KafkaLog(settings.kafka)
    config = RuntimeConfig(
        env=settings.env, partitions=settings.partitions, address=settings.address("registry", "internal")
    )
    runtime: Runtime[State] = Runtime(Registry(), log, config)
    return RpcServer(
        settings,
        "registry",
        runtime,
        log,
        public=[(grpc_api.add_RegistryServiceServicer_to_server, RegistryServicer(runtime))],
        internal=[(grpc_api.add_RegistryInternalServiceServicer_to_server, RegistryInternalServicer(runtime))],
        directory=OwnKeys(runtime),
    )
