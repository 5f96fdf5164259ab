"""Rollout and its worker on real Kafka and Redis; the services around it are feeders that speak their public topics."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import Message
from groundswell.artifacts.v1 import artifacts_pb2, artifacts_pb2_grpc
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.releases.v1 import releases_pb2, releases_pb2_grpc
from groundswell.rollout.v1 import rollout_pb2_grpc

from deploy.local.credentials import ensure_all
from deploy.local.settings import ROOT
from deploy.local.settings import Settings as StackSettings
from libs.checkins import CheckInSigner, key_id_of
from libs.checkins.producer import KafkaCheckInProducer, checkin_topic
from libs.eventlog import (
    Command,
    Context,
    Deadline,
    Decision,
    Event,
    NewEvent,
    Public,
    Runtime,
    RuntimeConfig,
    partition_of,
)
from libs.eventlog.kafka import KafkaLog
from libs.rpc import RpcServer, channel
from libs.settings import Settings
from services.rollout.app import build
from tests.conftest import KafkaEnv
from tests.ports import free_address

PRODUCT = "organizations/acme/products/thermostat"
COHORT = f"{PRODUCT}/cohorts/canary"
GATEWAY = "organizations/platform/gateways/g1"
SECRET = "test-secret-of-nobody"
FEEDS: dict[str, tuple[type[Message], ...]] = {
    "registry": (
        registry_events.ProductChanged,
        registry_events.DeviceChanged,
        registry_events.MemberChanged,
        registry_events.ApiKeyChanged,
        registry_events.GatewayChanged,
    ),
    "artifacts": (artifacts_events.BundleChanged,),
    "releases": (releases_events.GraphChanged,),
}


@dataclass(frozen=True)
class Say:
    resource: str
    payload: Message


class Feeder:
    """A service that only publishes."""

    sources: Mapping[str, Sequence[type[Message]]] = MappingProxyType({})

    def __init__(self, service: str) -> None:
        self.service = service
        self.event_types = FEEDS[service]

    def initial_state(self, partition: int) -> None:
        return None

    def decide(self, _state: None, command: object, _ctx: Context) -> Decision:
        assert isinstance(command, Say)
        organization = command.resource.split("/")[1]
        event = NewEvent(organization, command.resource, command.payload, (Public(command.resource, command.payload),))
        return Decision((event,))

    def evolve(self, _state: None, _event: Event) -> None:
        return None


class Releases(releases_pb2_grpc.ReleasesInternalServiceServicer):
    """The internal API that rollout's tasks call."""

    def __init__(self, say: Callable[..., Any]) -> None:
        self._say = say
        self.graph: dict[str, releases_pb2.Release] = {}

    async def CreateManagedRelease(  # noqa: N802 - gRPC's name
        self, request: Any, _context: Any
    ) -> releases_pb2.Release:
        if request.validate_only:
            return request.release
        made = self.graph.setdefault(request.release.name, request.release)
        await self.publish()
        return made

    async def ReleaseManagement(  # noqa: N802 - gRPC's name
        self, request: Any, _context: Any
    ) -> releases_pb2.Release:
        self.graph[request.name].rollout = ""
        await self.publish()
        return self.graph[request.name]

    async def DisableManagedRelease(  # noqa: N802 - gRPC's name
        self, request: Any, _context: Any
    ) -> releases_pb2.Release:
        self.graph[request.name].disabled = True
        await self.publish()
        return self.graph[request.name]

    async def publish(self) -> None:
        await self._say("releases", COHORT, releases_events.GraphChanged(cohort=COHORT, releases=self.graph.values()))


class Artifacts(artifacts_pb2_grpc.ArtifactsInternalServiceServicer):
    def __init__(self, bundle: artifacts_pb2.Bundle) -> None:
        self._bundle = bundle

    async def LookupBundle(  # noqa: N802 - gRPC's name
        self, _request: Any, _context: Any
    ) -> artifacts_pb2.Bundle:
        return self._bundle


@dataclass
class Installation:
    """What a test drives."""

    settings: Settings
    feeders: dict[str, Runtime[Any]]
    logs: list[KafkaLog]
    servers: list[grpc.aio.Server] = field(default_factory=list)
    app: RpcServer | None = None
    worker: asyncio.subprocess.Process | None = None
    beating: asyncio.Task[None] | None = None

    async def say(self, service: str, resource: str, payload: Message) -> None:
        command = Command(resource.split("/")[1], Say(resource, payload), principal="test")
        await self.feeders[service].submit(command, Deadline.after(10))

    async def start(self, bundle: artifacts_pb2.Bundle) -> None:
        for feeder in self.feeders.values():
            await feeder.start()
        for feeder in self.feeders.values():
            await feeder.wait_leading(Deadline.after(90))
        self.releases = Releases(self.say)
        await self._serve("releases", releases_pb2_grpc.add_ReleasesInternalServiceServicer_to_server, self.releases)
        await self._serve(
            "artifacts", artifacts_pb2_grpc.add_ArtifactsInternalServiceServicer_to_server, Artifacts(bundle)
        )
        self.app = await build(self.settings)
        await self.app.start()
        self.gateway_channel = channel(self.settings, "rollout", identity="gateway")
        self.internal = rollout_pb2_grpc.RolloutInternalServiceStub(self.gateway_channel)
        self.worker_channel = channel(self.settings, "rollout", identity="worker")
        self.as_worker = rollout_pb2_grpc.RolloutInternalServiceStub(self.worker_channel)
        credentials = grpc.ssl_channel_credentials(self.settings.ca)
        options = [("grpc.ssl_target_name_override", "localhost")]
        self.public_channel = grpc.aio.secure_channel(self.settings.rollout_public, credentials, options=options)
        self.public = rollout_pb2_grpc.RolloutServiceStub(self.public_channel)
        self.metadata = (("authorization", f"Bearer gsw_acme_owner_{SECRET}"),)
        self.key = Ed25519PrivateKey.generate()
        self.signer = CheckInSigner(self.key, GATEWAY, str(uuid.uuid4()), checkin_topic(self.settings.env))
        self.producer = KafkaCheckInProducer(self.settings.kafka, checkin_topic(self.settings.env))
        await self.producer.start()
        await self._tell_registry()

    async def _serve(self, name: str, add: Any, servicer: Any) -> None:
        server = grpc.aio.server()
        add(servicer, server)
        certificate, key = self.settings.certificate(name)
        credentials = grpc.ssl_server_credentials([(key, certificate)], self.settings.ca, require_client_auth=True)
        server.add_secure_port(self.settings.address(name, "internal"), credentials)
        await server.start()
        self.servers.append(server)

    async def _tell_registry(self) -> None:
        member = registry_pb2.Member(name="organizations/acme/members/owner", role="owner")
        key = registry_pb2.ApiKey(
            name="organizations/acme/apiKeys/owner",
            member=member.name,
            scopes=["*"],
            secret_sha256=hashlib.sha256(SECRET.encode()).digest(),
        )
        product = registry_pb2.Product(name=PRODUCT)
        product.policy.poll_interval.FromMilliseconds(500)
        product.policy.poll_jitter.FromMilliseconds(0)
        raw = self.key.public_key().public_bytes_raw()
        gateway = registry_pb2.Gateway(name=GATEWAY, public_key=raw, key_id=key_id_of(raw))
        await self.say("registry", member.name, registry_events.MemberChanged(member=member))
        await self.say("registry", key.name, registry_events.ApiKeyChanged(api_key=key))
        await self.say("registry", PRODUCT, registry_events.ProductChanged(product=product))
        await self.say("registry", GATEWAY, registry_events.GatewayChanged(gateway=gateway))

    async def device(self, serial: str) -> device_pb2.CheckInItem:
        name = f"{PRODUCT}/devices/{serial}"
        uid = str(uuid.uuid5(uuid.NAMESPACE_URL, name))
        image = registry_pb2.Device(
            name=name, uid=uid, cohort=COHORT, target="t", state=registry_pb2.Device.STATE_ACTIVE
        )
        await self.say("registry", name, registry_events.DeviceChanged(device=image))
        item = device_pb2.CheckInItem(device=name, device_uid=uid, instance="i", counter=0)
        item.running.version = "1.0.0"
        return item

    # Check-ins.

    async def publish(self, *items: device_pb2.CheckInItem, heartbeat: bool = False, forged: bool = False) -> None:
        batch = device_pb2.CheckInBatch(gateway=GATEWAY, items=items, heartbeat=heartbeat)
        if not heartbeat:
            batch.organization = "acme"
        partition = partition_of("acme", self.settings.partitions)
        value = batch.SerializeToString()
        headers = self.signer.headers(partition, value)
        if forged:
            headers = [(name, bytes(64) if name == "signature" else content) for name, content in headers]
        await self.producer.send(partition, b"acme", value, headers)

    def start_beating(self) -> None:
        async def beat() -> None:
            while True:
                await self.publish(heartbeat=True)
                await asyncio.sleep(0.25)

        self.beating = asyncio.create_task(beat())

    # The worker, a process of its own.

    async def start_worker(self) -> None:
        environment = {
            **os.environ,
            **{
                f"GROUNDSWELL_{name.upper()}": str(getattr(self.settings, name))
                for name in (
                    "env",
                    "kafka",
                    "redis",
                    "partitions",
                    "tls_dir",
                    "rollout_internal",
                    "worker_health",
                    "deployment",
                )
            },
        }
        self.worker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.rollout.worker", cwd=ROOT, env=environment
        )

    async def worker_health(self) -> int:
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://{self.settings.worker_health}/healthz") as answer,
            ):
                return answer.status
        except aiohttp.ClientError:
            return 0

    async def stop(self) -> None:
        if self.beating is not None:
            self.beating.cancel()
        if self.worker is not None and self.worker.returncode is None:
            self.worker.kill()
            await self.worker.wait()
        await self.producer.stop()
        for each in (self.gateway_channel, self.worker_channel, self.public_channel):
            await each.close()
        if self.app is not None:
            await self.app.stop()
        for server in self.servers:
            await server.stop(0)
        for feeder in self.feeders.values():
            await feeder.stop()
        for log in self.logs:
            await log.close()


def installation(kafka_env: KafkaEnv, redis_url: str, folder: Path) -> Installation:
    """Settings of a corner of its own, with certificates and a key store."""
    stack = StackSettings(root=ROOT, local_dir=folder / "local", jars_dir=folder, port_base=0)
    ensure_all(stack)
    ports = {
        f"{service}_{port}": free_address()
        for service in ("registry", "artifacts", "releases", "rollout")
        for port in ("internal", "public")
    }
    settings = Settings(
        env=kafka_env.env,
        kafka=kafka_env.bootstrap,
        redis=redis_url,
        partitions=kafka_env.partitions,
        tls_dir=stack.tls_dir,
        keystore_dir=stack.keystore_dir,
        worker_health=free_address(),
        **ports,
    )
    config = RuntimeConfig(env=settings.env, partitions=settings.partitions, address="127.0.0.1:1", verify_folds=True)
    logs = {name: KafkaLog(settings.kafka) for name in FEEDS}
    feeders = {name: Runtime(Feeder(name), logs[name], config) for name in FEEDS}
    return Installation(settings, feeders, list(logs.values()))


async def eventually(condition: Callable[[], Any], what: str, limit_s: float = 30.0) -> Any:
    """Await a condition on something outside; its true value is the answer."""
    async with asyncio.timeout(limit_s):
        while True:
            found = await condition()
            if found:
                return found
            await asyncio.sleep(0.05)
    raise AssertionError(what)
