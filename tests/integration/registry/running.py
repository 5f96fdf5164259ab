"""A registry process of its own on the real broker, and a client of its two ports."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import msgspec
from google.rpc import error_details_pb2
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.registry.v1 import registry_pb2_grpc as pb_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from deploy.local.credentials import ensure_certificates
from deploy.local.settings import load
from deploy.topics import ensure_topics
from libs.settings import Settings
from tests.ports import free_address
from tests.servers import Servers

PARTITIONS = 4
READY_WITHIN_S = 40.0
TARGET = (("grpc.ssl_target_name_override", "localhost"),)


def status_of(error: Any) -> Any:
    """Typed as calls are: an error of grpc is the call it ended."""
    return rpc_status.from_call(error)


def reason(error: grpc.RpcError) -> tuple[str, str, dict[str, str]]:
    """(status, reason, metadata) of a refused call."""
    status = status_of(error)
    for detail in status.details if status else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            return error.code().name, info.reason, dict(info.metadata)
    return error.code().name, "", {}


@dataclass
class Running:
    """What a test needs of it."""

    settings: Settings
    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    log: Path

    def public(self, service: str = "registry") -> grpc.Channel:
        address = self.settings.address(service, "public")
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(self.settings.ca), TARGET)

    def internal(self, identity: str | None) -> grpc.Channel:
        certificate, key = self.settings.certificate(identity) if identity else (None, None)
        credentials = grpc.ssl_channel_credentials(self.settings.ca, key, certificate)
        return grpc.secure_channel(self.settings.address("registry", "internal"), credentials, TARGET)

    def restart(self) -> None:
        """Kill it as a power cut would, and start it anew."""
        self.process.kill()
        self.process.wait(10)
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(self.process.args, env=self.environment, stderr=output, stdout=output)
        _await_serving(self)

    def bootstrap(self) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "services.registry.bootstrap"]
        return subprocess.run(command, env=self.environment, capture_output=True, check=False, timeout=50)

    @property
    def profile(self) -> dict[str, Any]:
        text = (self.settings.local_dir / "profile.json").read_bytes()
        return dict(msgspec.json.decode(text))

    def organization(self) -> Tenant:
        """A new organization with its owner's key."""
        organization, secret = f"t{secrets.token_hex(5)}", secrets.token_hex(24)
        platform = Tenant(self, "platform", self.profile["platform_key"])
        platform.call(
            "CreateOrganization",
            pb.CreateOrganizationRequest(
                organization_id=organization, owner_key_id="owner", owner_key_sha256=digest(secret)
            ),
        )
        return Tenant(self, organization, f"gsw_{organization}_owner_{secret}")


def digest(secret: str) -> bytes:
    from hashlib import sha256

    return sha256(secret.encode()).digest()


class Tenant:
    """Calls with one key, reading what it wrote."""

    def __init__(self, running: Running, organization: str, key: str) -> None:
        self.running = running
        self.organization = organization
        self.name = f"organizations/{organization}"
        self.key = key
        self.tokens: list[str] = []

    def call(self, method: str, request: Any, *, stub: Any = pb_grpc.RegistryServiceStub) -> Any:
        metadata = [("authorization", f"Bearer {self.key}"), *(("x-read-after", token) for token in self.tokens[-8:])]
        with self.running.public() as channel:
            call = getattr(stub(channel), method)
            answer, done = call.with_call(request, metadata=metadata, timeout=15)
        self.tokens += [str(value) for key, value in done.trailing_metadata() if key == "x-log-position"]
        return answer

    def refused(self, method: str, request: Any, **options: Any) -> tuple[str, str, dict[str, str]]:
        try:
            answer = self.call(method, request, **options)
        except grpc.RpcError as error:
            return reason(error)
        raise AssertionError(f"{method} was not refused but answered {answer}")

    def with_key(
        self, key_id: str, *, role: str = "owner", scopes: tuple[str, ...] = ("*",), prefix: str = ""
    ) -> Tenant:
        """Another key of the organization."""
        secret = secrets.token_hex(24)
        member = f"{self.name}/members/owner"
        if role != "owner":
            made = pb.CreateMemberRequest(parent=self.name, member_id=key_id, member=pb.Member(role=role))
            member = self.call("CreateMember", made).name
        wanted = pb.ApiKey(member=member, scopes=scopes, resource_prefix=prefix, secret_sha256=digest(secret))
        self.call("CreateApiKey", pb.CreateApiKeyRequest(parent=self.name, api_key_id=key_id, api_key=wanted))
        return Tenant(self.running, self.organization, f"gsw_{self.organization}_{key_id}_{secret}")

    def product(self, product_id: str = "pump") -> pb.Product:
        request = pb.CreateProductRequest(parent=self.name, product_id=product_id, product=pb.Product())
        found: pb.Product = self.call("CreateProduct", request)
        return found


def _health(channel: grpc.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)  # its stubs say nothing of its methods


def _await_serving(running: Running) -> None:
    until = time.monotonic() + READY_WITHIN_S
    while True:
        with running.public() as channel:
            request = health_pb2.HealthCheckRequest()
            try:
                answer = _health(channel).Check(request, timeout=2, wait_for_ready=True)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
        if running.process.poll() is not None or time.monotonic() > until:
            raise AssertionError(f"the registry does not serve:\n{running.log.read_text()[-4000:]}")
        time.sleep(0.1)


@contextlib.contextmanager
def registry(servers: Servers, folder: Path) -> Iterator[Running]:
    """Runs until the block ends; then it has to end cleanly by SIGTERM."""
    with replicas(servers, folder, 1) as (only,):
        yield only


@contextlib.contextmanager
def replicas(servers: Servers, folder: Path, count: int) -> Iterator[tuple[Running, ...]]:
    """Several processes of one registry."""
    env = f"t{secrets.token_hex(6)}"
    asyncio.run(ensure_topics(servers.kafka, env, PARTITIONS))
    local = folder / "local"
    local.mkdir(mode=0o700)
    ensure_certificates(load({"GROUNDSWELL_LOCAL_DIR": str(local)}))
    secret = local / "bootstrap.secret"
    secret.write_text(secrets.token_urlsafe(32))
    secret.chmod(0o600)
    given = {
        "env": env,
        "kafka": servers.kafka,
        "partitions": str(PARTITIONS),
        "local_dir": str(local),
        "tls_dir": str(local / "tls"),
        "bootstrap_secret_file": str(secret),
        "registry_internal": ",".join(free_address() for _ in range(count)),
        "registry_public": ",".join(free_address() for _ in range(count)),
    }
    with contextlib.ExitStack() as stack:
        started = tuple(
            stack.enter_context(_process(given | {"replica": str(index)}, folder / f"registry-{index}.log"))
            for index in range(count)
        )
        for each in started:
            _await_serving(each)
        made = started[0].bootstrap()
        assert made.returncode == 0, made.stderr.decode()
        yield started


@contextlib.contextmanager
def _process(given: dict[str, str], log: Path) -> Iterator[Running]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GROUNDSWELL_")}
    environment = {**inherited, **{f"GROUNDSWELL_{name.upper()}": value for name, value in given.items()}}
    with log.open("wb") as output:
        command = [sys.executable, "-m", "services.registry"]
        process = subprocess.Popen(command, env=environment, stderr=output, stdout=output)
    running = Running(Settings.model_validate(given), process, environment, log)
    try:
        yield running
    finally:
        running.process.terminate()
        try:
            status = running.process.wait(20)
        except subprocess.TimeoutExpired:
            running.process.kill()
            running.process.wait()
            raise
    assert status == 0, log.read_text()[-4000:]
