"""The real registry beside a webhooks process of its own, on the real log, and receivers behind a private CA."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import ssl
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from aiohttp import web
from groundswell.registry.v1 import registry_pb2, registry_pb2_grpc
from groundswell.webhooks.v1 import webhooks_pb2 as pb
from groundswell.webhooks.v1 import webhooks_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from demo.factory import server_identity
from demo.receiver import verify
from deploy.local.credentials import ensure_all
from deploy.local.settings import ROOT
from deploy.local.settings import Settings as StackSettings
from libs.eventlog import Deadline
from libs.rpc import channel
from libs.settings import Settings
from services.registry.app import build as build_registry
from tests.conftest import KafkaEnv
from tests.ports import free_address, free_port

PARENT = "organizations/acme"
_TARGET = (("grpc.ssl_target_name_override", "localhost"),)


async def until(condition: Callable[[], bool | Awaitable[bool]], within_s: float = 25.0) -> None:
    """Wait for a condition; a test that waits in vain fails here."""
    async with asyncio.timeout(within_s):
        while True:
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.02)


@dataclass
class Receiver:
    """An HTTPS server that verifies every delivery. ``answer`` says with what it answers."""

    folder: Path
    port: int = field(default_factory=free_port)
    secret: str = ""
    public_key: str = ""
    status: int = 204
    delay_s: float = 0.0
    ids: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Event id → webhook ids."""
    events: list[dict[str, Any]] = field(default_factory=list)
    bodies: dict[str, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    problems: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    tests: int = 0
    signatures: list[int] = field(default_factory=list)
    """How many each request had."""
    paths: list[str] = field(default_factory=list)
    _runner: web.AppRunner | None = None

    def __post_init__(self) -> None:
        self.identity, self.ca_file = server_identity(self.folder)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}/hooks"

    @property
    def resources(self) -> set[str]:
        return {event["resource"] for event in self.events}

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._receive)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.identity.certificate, self.identity.key)
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=context).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _receive(self, request: web.Request) -> web.Response:
        body = await request.read()
        if not self.secret:
            return web.Response(status=503)
        self.paths.append(request.path)
        self.signatures.append(len(request.headers["webhook-signature"].split()))
        await asyncio.sleep(self.delay_s)
        if self.status == 204:
            try:
                event = verify(self.secret, self.public_key, dict(request.headers), body)
            except ValueError as error:
                self.problems.append(str(error))
                return web.Response(status=401)
            if event["type"] == "webhook.test_fire":
                self.tests += 1
                return web.json_response({"challenge": event["data"]["challenge"]})
            identifier = request.headers["webhook-id"]
            self.headers.append({name.lower(): value for name, value in request.headers.items()})
            self.ids[event["event_id"]].add(identifier)
            self.bodies[identifier].add(body)
            self.events.append(event)
        headers = {"location": f"https://127.0.0.1:{self.port}/elsewhere"} if 300 <= self.status < 400 else {}
        return web.Response(status=self.status, headers=headers)


@dataclass
class Site:
    """What a test talks to."""

    settings: Settings
    folder: Path
    key: str
    process: subprocess.Popen[bytes] | None = None

    @contextlib.asynccontextmanager
    async def _public(self, service: str) -> AsyncIterator[grpc.aio.Channel]:
        credentials = grpc.ssl_channel_credentials(self.settings.ca)
        async with grpc.aio.secure_channel(
            self.settings.address(service, "public"), credentials, options=_TARGET
        ) as opened:
            yield opened

    async def call(self, method: str, request: Any, service: str = "webhooks") -> Any:
        stubs: Any = {
            "webhooks": webhooks_pb2_grpc.WebhooksServiceStub,
            "registry": registry_pb2_grpc.RegistryServiceStub,
        }
        async with self._public(service) as opened:
            metadata = (("authorization", f"Bearer {self.key}"),)
            return await getattr(stubs[service](opened), method)(request, metadata=metadata, timeout=20)

    async def create(self, receiver: Receiver, endpoint: str = "ops", **fields: Any) -> pb.WebhookEndpoint:
        wanted = pb.WebhookEndpoint(**{"url": receiver.url, "ca_pem": receiver.ca_file.read_text(), **fields})
        request = pb.CreateWebhookEndpointRequest(
            parent=PARENT, webhook_endpoint_id=endpoint, webhook_endpoint=wanted, request_id=new_uuid()
        )
        first = await self.call("CreateWebhookEndpoint", request)
        again = await self.call("CreateWebhookEndpoint", request)
        assert again == first, "a retry must answer with the same endpoint and secret"
        receiver.secret, receiver.public_key = first.secret.secret, first.webhook_endpoint.public_key
        # Asked at once, before this receiver knew its secret; asked again it can answer.
        verify = pb.VerifyWebhookEndpointRequest(name=first.webhook_endpoint.name)
        made: pb.WebhookEndpoint = await self.call("VerifyWebhookEndpoint", verify)
        return made

    async def product(self, identifier: str) -> str:
        request = registry_pb2.CreateProductRequest(
            parent=PARENT, product_id=identifier, product=registry_pb2.Product(display_name=identifier)
        )
        name: str = (await self.call("CreateProduct", request, "registry")).name
        return name

    async def deliveries(self, endpoint: str = "ops") -> list[pb.Delivery]:
        request = pb.ListDeliveriesRequest(parent=f"{PARENT}/webhookEndpoints/{endpoint}")
        return list((await self.call("ListDeliveries", request)).deliveries)

    async def start(self, allow: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GROUNDSWELL_")}
        given = self.settings.model_dump(mode="json", exclude={"s3_secret_key"}) | {"webhook_allow": allow}
        environment = inherited | {f"GROUNDSWELL_{name.upper()}": str(value) for name, value in given.items()}
        self._spawn(environment)
        await until(self._serving, 40.0)

    def _spawn(self, environment: dict[str, str]) -> None:
        with (self.folder / "webhooks.log").open("ab") as output:
            command = [sys.executable, "-m", "services.webhooks"]
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    async def _serving(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log_text
        with contextlib.suppress(grpc.aio.AioRpcError):
            async with self._public("webhooks") as opened:
                stub: Any = health_pb2_grpc.HealthStub(opened)
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        return False

    def kill(self) -> None:
        """As a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        if self.process is None or self.process.poll() is not None:
            return 0
        self.process.terminate()
        return self.process.wait(20)

    @property
    def log_text(self) -> str:
        return (self.folder / "webhooks.log").read_text()


def new_uuid() -> str:
    import uuid

    return str(uuid.uuid4())


@contextlib.asynccontextmanager
async def running_site(kafka: KafkaEnv, folder: Path) -> AsyncIterator[Site]:
    """Registry in this process with one organization; the test starts webhooks."""
    stack = StackSettings(ROOT, folder, folder, 19000, {"GROUNDSWELL_KEYSTORE_DIR": str(folder / "keystore")})
    ensure_all(stack)
    ports: Any = {
        f"{service}_{port}": free_address() for service in ("registry", "webhooks") for port in ("internal", "public")
    }
    settings = Settings(
        env=kafka.env,
        kafka=kafka.bootstrap,
        partitions=kafka.partitions,
        tls_dir=stack.tls_dir,
        keystore_dir=stack.keystore_dir,
        **ports,
    )
    registry = await build_registry(settings)
    await registry.start()
    await registry._runtime.wait_leading(Deadline.after(30))
    owner, platform = secrets.token_hex(16), secrets.token_hex(16)
    site = Site(settings, folder, f"gsw_platform_bootstrap_{platform}")
    try:
        async with channel(settings, "registry", identity="registry") as opened:
            bootstrap = registry_pb2.BootstrapRequest(api_key_id="bootstrap", secret_sha256=digest(platform))
            await registry_pb2_grpc.RegistryInternalServiceStub(opened).Bootstrap(bootstrap, timeout=20)
        create = registry_pb2.CreateOrganizationRequest(
            organization_id="acme", owner_key_id="owner", owner_key_sha256=digest(owner)
        )
        await site.call("CreateOrganization", create, "registry")
        site.key = f"gsw_acme_owner_{owner}"
        yield site
        assert site.stop() == 0, site.log_text
    finally:
        if site.process is not None and site.process.poll() is None:
            site.kill()
        await registry.stop()


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
