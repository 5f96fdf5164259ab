"""Composition root of pki."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import grpc
from groundswell.pki.v1 import keys_pb2_grpc, pki_pb2_grpc
from groundswell.registry.v1 import registry_pb2, registry_pb2_grpc

from libs.eventlog import Runtime
from libs.eventlog.kafka import KafkaLog
from libs.eventlog.ports import EventLog
from libs.keystore import DirectoryKeyStore, KeyStore
from libs.rpc import AccessDirectory, RpcServer, channel, error_of, service_runtime
from libs.settings import Settings
from services.pki.authorities import CodeOf
from services.pki.domain import Pki
from services.pki.issuer import Issuer
from services.pki.keys import CaKeyForwarder, CaKeyServicer
from services.pki.model import State
from services.pki.service import PkiInternalServicer, PkiServicer
from services.pki.tasks import PkiTasks

CODE_KEY = "verification-codes"

T = TypeVar("T")


class GrpcRegistry:
    """``RegistryPort`` over the registry's internal port; its errors pass through with their reasons."""

    def __init__(self, stub: registry_pb2_grpc.RegistryInternalServiceAsyncStub) -> None:
        self._stub = stub

    async def lookup_product(self, name: str) -> registry_pb2.Product:
        return await _answer(self._stub.LookupProduct(registry_pb2.GetProductRequest(name=name)))

    async def lookup_cohort(self, name: str) -> registry_pb2.Cohort:
        return await _answer(self._stub.LookupCohort(registry_pb2.GetCohortRequest(name=name)))

    async def provision_device(self, request: registry_pb2.ProvisionDeviceRequest) -> registry_pb2.Device:
        return await _answer(self._stub.ProvisionDevice(request))

    async def undo_provisioning(self, request: registry_pb2.UndoProvisioningRequest) -> registry_pb2.Device:
        return await _answer(self._stub.UndoProvisioning(request))


async def _answer(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_of(error) from error


def code_function(keystore: KeyStore) -> CodeOf:
    """Codes are derived from their resource names, so that a retry gives the same and no log holds one."""

    def code_of(name: str) -> str:
        return keystore.derive(CODE_KEY, "verification-code", name).hex()

    code_of("")  # makes the key now: a store that cannot be used must stop the start, not a request
    return code_of


class _ChannelPart:
    """Closes the channel last, when nothing uses it any more."""

    def __init__(self, open_channel: grpc.aio.Channel) -> None:
        self._channel = open_channel

    async def start(self) -> None:
        """Channels connect when they are used."""

    async def stop(self) -> None:
        await self._channel.close()


async def build(settings: Settings, *, log: EventLog | None = None) -> RpcServer:
    """Everything of one process; nothing runs yet."""
    event_log = log or KafkaLog(settings.kafka)
    to_registry = channel(settings, "registry", identity="pki")
    stub = registry_pb2_grpc.RegistryInternalServiceStub(to_registry)
    registry = GrpcRegistry(stub)
    keystore = DirectoryKeyStore(settings.keystore_dir)
    code_of = code_function(keystore)
    issuer = Issuer(keystore, settings.deployment)
    tasks = PkiTasks(registry)
    runtime: Runtime[State] = service_runtime(
        Pki(code_of), event_log, settings, tasks.handlers(), forward=CaKeyForwarder(settings)
    )
    tasks.submit = runtime.submit
    directory = AccessDirectory(event_log, settings, stub)
    return RpcServer(
        settings,
        "pki",
        runtime,
        event_log,
        public=[(pki_pb2_grpc.add_PkiServiceServicer_to_server, PkiServicer(runtime, registry, code_of, issuer))],
        internal=[
            (pki_pb2_grpc.add_PkiInternalServiceServicer_to_server, PkiInternalServicer(runtime, issuer)),
            (keys_pb2_grpc.add_CaKeyInternalServiceServicer_to_server, CaKeyServicer(runtime)),
        ],
        directory=directory,
        parts=[_ChannelPart(to_registry), directory],
    )
