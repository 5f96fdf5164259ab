"""Two replicas of the registry in one process, on both adapters; the test decides who leads."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.registry.v1 import registry_pb2_grpc as pb_grpc

from deploy.local.credentials import ensure_certificates
from deploy.local.settings import load
from libs.eventlog import Runtime
from libs.eventlog.kafka import KafkaLog
from libs.eventlog.memory import MemoryLog
from libs.eventlog.ports import EventLog
from libs.rpc import RpcServer
from libs.settings import Settings
from services.registry.app import build
from tests.conftest import KafkaEnv
from tests.contract.eventlog.support import PARTITIONS, SteeredLog, soon
from tests.integration.registry.running import TARGET
from tests.ports import free_address

SECRET = "s" * 40
DIGEST = hashlib.sha256(SECRET.encode()).digest()
ALL = tuple(range(PARTITIONS))


@dataclass
class Replica:
    """One process of the registry, as far as it can be told from one."""

    settings: Settings
    log: SteeredLog
    server: RpcServer

    @property
    def runtime(self) -> Runtime[Any]:
        return self.server._runtime

    async def lead(self) -> None:
        self.log.election.assign(*ALL)
        await self.runtime.wait_leading(soon(), ALL)

    def retire(self) -> None:
        self.log.election.assign()

    @contextlib.asynccontextmanager
    async def channel(self, identity: str = "") -> AsyncIterator[grpc.aio.Channel]:
        """To the internal port as a service, else to the public one."""
        pair = self.settings.certificate(identity) if identity else None
        credentials = grpc.ssl_channel_credentials(
            self.settings.ca, pair[1] if pair else None, pair[0] if pair else None
        )
        address = self.settings.address("registry", "internal" if identity else "public")
        async with grpc.aio.secure_channel(address, credentials, TARGET) as channel:
            yield channel

    async def call(
        self, method: str, request: Any, *, key: str = "", identity: str = "", within: float = 10.0, **headers: str
    ) -> tuple[Any, list[str]]:
        """(answer, positions)."""
        metadata = [(name.replace("_", "-"), value) for name, value in headers.items()]
        if key:
            metadata.append(("authorization", f"Bearer {key}"))
        async with self.channel(identity) as channel:
            internal = hasattr(pb_grpc.RegistryInternalServiceServicer, method)
            stub: Any = (pb_grpc.RegistryInternalServiceStub if internal else pb_grpc.RegistryServiceStub)(channel)
            call = getattr(stub, method)(request, metadata=metadata, timeout=within)
            answer = await call
            trailing = await call.trailing_metadata()
        return answer, [str(value) for name, value in trailing or () if name == "x-log-position"]

    async def error(self, method: str, request: Any, **options: Any) -> grpc.aio.AioRpcError | None:
        try:
            await self.call(method, request, **options)
        except grpc.aio.AioRpcError as error:
            return error
        return None

    async def refused(self, method: str, request: Any, **options: Any) -> grpc.aio.AioRpcError:
        error = await self.error(method, request, **options)
        assert error is not None, f"{method} was not refused"
        return error


@dataclass
class Site:
    """An installation."""

    env: str
    folder: Path
    make_log: Callable[[], EventLog]
    replicas: list[Replica] = field(default_factory=list)
    logs: list[EventLog] = field(default_factory=list)

    async def start(self) -> Replica:
        settings = Settings(
            env=self.env,
            partitions=PARTITIONS,
            tls_dir=self.folder / "tls",
            registry_internal=free_address(),
            registry_public=free_address(),
        )
        inner = self.make_log()
        self.logs.append(inner)
        log = SteeredLog(inner)
        server = await build(settings, log=log)
        await server.start()
        replica = Replica(settings, log, server)
        self.replicas.append(replica)
        await replica.runtime.wait_ready(soon())
        return replica

    async def close(self) -> None:
        for replica in self.replicas:
            await replica.server.stop()
        for log in self.logs:
            await log.close()


@dataclass
class Pair:
    """A leader of everything, a follower, and an organization with an owner's key."""

    site: Site
    leader: Replica
    follower: Replica
    key: str = f"gsw_acme_first_{SECRET}"


@pytest.fixture
async def memory_site(tmp_path: Path, env_prefix: str) -> AsyncIterator[Site]:
    ensure_certificates(load({"GROUNDSWELL_LOCAL_DIR": str(tmp_path)}))
    log = MemoryLog(partitions=PARTITIONS)
    made = Site(env_prefix, tmp_path, lambda: log)
    yield made
    await made.close()


@pytest.fixture
async def kafka_site(tmp_path: Path, kafka_env: KafkaEnv) -> AsyncIterator[Site]:
    ensure_certificates(load({"GROUNDSWELL_LOCAL_DIR": str(tmp_path)}))
    made = Site(kafka_env.env, tmp_path, partial(KafkaLog, kafka_env.bootstrap))
    yield made
    await made.close()


@pytest.fixture
def site(request: pytest.FixtureRequest) -> Site:
    """An installation of its own on one kind of log."""
    found: Site = request.getfixturevalue(f"{request.param}_site")
    return found


@pytest.fixture
async def pair(site: Site) -> Pair:
    leader = await site.start()
    await leader.lead()
    bootstrap = pb.BootstrapRequest(api_key_id="bootstrap", secret_sha256=DIGEST)
    await leader.call("Bootstrap", bootstrap, identity="registry")
    create = pb.CreateOrganizationRequest(organization_id="acme", owner_key_id="first", owner_key_sha256=DIGEST)
    await leader.call("CreateOrganization", create, key=f"gsw_platform_bootstrap_{SECRET}")
    return Pair(site, leader, await site.start())
