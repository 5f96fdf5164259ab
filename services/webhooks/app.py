"""Composition root of the webhooks service."""

from __future__ import annotations

from groundswell.registry.v1 import registry_pb2_grpc
from groundswell.webhooks.v1 import webhooks_pb2_grpc

from libs.errors import UnavailableError
from libs.eventlog import Runtime
from libs.eventlog.config import partition_of, wall_clock_ms
from libs.eventlog.kafka import KafkaLog
from libs.eventlog.ports import EventLog, LogError, TopicPartition
from libs.keystore import DirectoryKeyStore
from libs.rpc import AccessDirectory, RpcServer, channel, service_runtime
from libs.settings import Settings
from services.webhooks.domain import Webhooks
from services.webhooks.model import VERIFY, Place, State
from services.webhooks.policy import UrlPolicy, own_hosts
from services.webhooks.sender import Sender
from services.webhooks.service import Parts, Starts, WebhooksServicer
from services.webhooks.signing import Signer
from services.webhooks.source import places_of
from services.webhooks.transport import HttpsTransport
from services.webhooks.verify import Verifier


class WebhooksApp:
    """Server and sender. The sender ends first, because it records its last deliveries through the runtime."""

    def __init__(self, server: RpcServer, sender: Sender, transport: HttpsTransport) -> None:
        self._server = server
        self._sender = sender
        self._transport = transport

    async def start(self) -> None:
        """Listen, then send."""
        await self._transport.start()
        await self._server.start()
        await self._sender.start()

    def live(self) -> bool:
        """Whether both are."""
        return self._server.live() and self._sender.live

    async def stop(self) -> None:
        """Stop sending, then everything else."""
        await self._sender.stop()
        await self._server.stop()
        await self._transport.stop()


def starts_function(log: EventLog, settings: Settings) -> Starts:
    """Where deliveries of a new endpoint begin."""

    async def starts(organization: str) -> tuple[tuple[Place, int], ...]:
        partition = partition_of(organization, settings.partitions)
        try:
            ends = await log.end_positions([TopicPartition(*place) for place in places_of(settings.env, partition)])
        except LogError as error:
            raise UnavailableError("LOG_UNAVAILABLE", "the source logs cannot be read now") from error
        return tuple(((place.topic, place.partition), position) for place, position in ends.items())

    return starts


async def build(settings: Settings, *, log: EventLog | None = None) -> WebhooksApp:
    """The webhooks service, ready to start."""
    event_log = log or KafkaLog(settings.kafka)
    policy = UrlPolicy.parse(settings.webhook_allow, own_hosts(settings))
    signer = Signer(DirectoryKeyStore(settings.keystore_dir))
    transport = HttpsTransport(policy, wall_clock_ms)
    verifier = Verifier(transport, signer, f"groundswell.{settings.deployment}", wall_clock_ms)
    domain = Webhooks(lambda name, uid, generation: signer.keys(name, uid, generation).public_key)
    runtime: Runtime[State] = service_runtime(domain, event_log, settings, {VERIFY: verifier.task})
    sender = Sender(runtime, event_log, settings.env, transport, signer, wall_clock_ms)
    registry = registry_pb2_grpc.RegistryInternalServiceStub(channel(settings, "registry", identity="webhooks"))
    directory = AccessDirectory(event_log, settings, registry)
    servicer = WebhooksServicer(Parts(runtime, policy, signer, verifier, starts_function(event_log, settings)))
    server = RpcServer(
        settings,
        "webhooks",
        runtime,
        event_log,
        public=[(webhooks_pb2_grpc.add_WebhooksServiceServicer_to_server, servicer)],
        internal=[],
        directory=directory,
        parts=[directory],
    )
    return WebhooksApp(server, sender, transport)
