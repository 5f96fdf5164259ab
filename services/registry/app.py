"""Composition root of the registry."""

from __future__ import annotations

from groundswell.registry.v1 import registry_pb2_grpc as pb_grpc

from libs.eventlog.kafka import KafkaLog
from libs.eventlog.ports import EventLog
from libs.rpc import RpcServer, service_runtime
from libs.settings import Settings
from services.registry.domain import Quotas, Registry
from services.registry.service import OwnKeys, RegistryInternalServicer, RegistryServicer
from services.registry.tasks import HANDLERS


async def build(settings: Settings, *, log: EventLog | None = None) -> RpcServer:
    """Everything, wired; nothing is started yet."""
    log = log or KafkaLog(settings.kafka)
    quotas = Quotas(
        products=settings.quota_products,
        cohorts=settings.quota_cohorts,
        devices=settings.quota_devices,
        members=settings.quota_members,
        api_keys=settings.quota_api_keys,
        gateways=settings.quota_gateways,
    )
    runtime = service_runtime(Registry(quotas), log, settings, HANDLERS)
    return RpcServer(
        settings,
        "registry",
        runtime,
        log,
        public=[(pb_grpc.add_RegistryServiceServicer_to_server, RegistryServicer(runtime))],
        internal=[(pb_grpc.add_RegistryInternalServiceServicer_to_server, RegistryInternalServicer(runtime))],
        directory=OwnKeys(runtime),
    )
