"""Registry and artifacts on the real log and store, and operators that speak to their public ports."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.artifacts.v1 import artifacts_pb2_grpc
from groundswell.registry.v1 import registry_pb2, registry_pb2_grpc
from yarl import URL

from clients.sdk import Client
from clients.sdk.profile import SERVICES
from deploy.local.credentials import ensure_all
from deploy.local.settings import ROOT
from deploy.local.settings import Settings as StackSettings
from libs.errors import GroundswellError
from libs.eventlog import Deadline
from libs.rpc import RpcServer, channel, error_of
from libs.settings import Settings
from libs.trust.signatures import key_id
from services.artifacts.app import build as build_artifacts
from services.registry.app import build as build_registry
from tests.conftest import S3, KafkaEnv
from tests.ports import free_address

PART = 5 * 1024 * 1024
FIRMWARE = os.urandom(2 * PART + 1234)
B = pb.Binary


def settings_of(kafka: KafkaEnv, s3: S3, folder: Path, grace_s: int = 86_400) -> Settings:
    stack = StackSettings(ROOT, folder, folder, 19000, {"GROUNDSWELL_KEYSTORE_DIR": str(folder / "keystore")})
    ensure_all(stack)
    services = ("registry", "artifacts")
    ports = {f"{service}_{port}": free_address() for service in services for port in ("internal", "public")}
    return Settings(
        env=kafka.env,
        kafka=kafka.bootstrap,
        partitions=kafka.partitions,
        tls_dir=stack.tls_dir,
        keystore_dir=stack.keystore_dir,
        s3_endpoint=s3.endpoint,
        s3_access_key=s3.access_key,
        s3_secret_key=s3.secret_key,  # type: ignore[arg-type]
        s3_bucket=s3.bucket,
        artifacts_grace_s=grace_s,
        **ports,  # type: ignore[arg-type]
    )


@contextlib.asynccontextmanager
async def running_site(settings: Settings) -> AsyncIterator[Site]:
    """Both services, and the operator of `acme` with a product that wants two signatures on its bundles."""
    made = Site(settings)
    registry = await build_registry(settings)
    await serving(registry)
    artifacts = await build_artifacts(settings)
    try:
        await serving(artifacts)
        secret = secrets.token_hex(16)
        bootstrap = registry_pb2.BootstrapRequest(
            api_key_id="bootstrap", secret_sha256=hashlib.sha256(secret.encode()).digest()
        )
        async with channel(settings, "registry", identity="registry") as opened:
            await registry_pb2_grpc.RegistryInternalServiceStub(opened).Bootstrap(bootstrap, timeout=20)
        made.platform_key = f"gsw_platform_bootstrap_{secret}"
        await made.organize("acme", required_signatures=2)
        yield made
    finally:
        await artifacts.stop()
        await registry.stop()


async def serving(server: RpcServer) -> None:
    """Started, and leading all partitions."""
    await server.start()
    deadline = Deadline.after(60)
    await server._runtime.wait_ready(deadline)
    await server._runtime.wait_leading(deadline)


@dataclass
class Upload:
    """What a client declares of a file."""

    data: bytes
    parts: list[pb.UploadPart] = field(default_factory=list)

    def __post_init__(self) -> None:
        for index, start in enumerate(range(0, len(self.data), PART), start=1):
            chunk = self.data[start : start + PART]
            self.parts.append(pb.UploadPart(index=index, size=len(chunk), sha256=hashlib.sha256(chunk).hexdigest()))

    def chunk(self, index: int) -> bytes:
        return self.data[(index - 1) * PART : index * PART]


class Site:
    """Registry and artifacts, and an operator with a product in an organization."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.key = ""
        self.product = ""
        self.platform_key = ""

    def client(self, key: str = "") -> Client:
        """The SDK, as an operator uses it."""
        endpoints = {service: self.settings.address(service, "public") for service in ("registry", "artifacts")}
        unused = {service: "127.0.0.1:1" for service in SERVICES if service not in endpoints}
        return Client(endpoints | unused, key or self.key, self.settings.ca, server_name="localhost")

    @contextlib.asynccontextmanager
    async def public(self, service: str, key: str) -> AsyncIterator[tuple[grpc.aio.Channel, Any]]:
        credentials = grpc.ssl_channel_credentials(self.settings.ca)
        options = (("grpc.ssl_target_name_override", "localhost"),)
        address = self.settings.address(service, "public")
        async with grpc.aio.secure_channel(address, credentials, options=options) as opened:
            yield opened, (("authorization", f"Bearer {key}"),)

    async def organize(self, name: str, required_signatures: int) -> None:
        """An organization with its owner's key and a product; from now on the operator is that owner."""
        secret = secrets.token_hex(16)
        self.key = f"gsw_{name}_owner_{secret}"
        self.product = f"organizations/{name}/products/thermostat"
        create = registry_pb2.CreateOrganizationRequest(
            organization_id=name, owner_key_id="owner", owner_key_sha256=hashlib.sha256(secret.encode()).digest()
        )
        async with self.public("registry", self.platform_key) as (opened, metadata):
            stub = registry_pb2_grpc.RegistryServiceStub(opened)
            await stub.CreateOrganization(create, metadata=metadata, timeout=20)
        policy = registry_pb2.ConfigurationPolicy(required_signatures=required_signatures)
        product = registry_pb2.CreateProductRequest(
            parent=f"organizations/{name}",
            product_id="thermostat",
            product=registry_pb2.Product(display_name="T", policy=policy),
        )
        async with self.public("registry", self.key) as (opened, metadata):
            stub = registry_pb2_grpc.RegistryServiceStub(opened)
            await stub.CreateProduct(product, metadata=metadata, timeout=20)

    async def call(self, method: str, request: Any) -> Any:
        """One call of the public API; refusals come as our errors."""
        async with self.public("artifacts", self.key) as (opened, metadata):
            stub = artifacts_pb2_grpc.ArtifactsServiceStub(opened)
            try:
                return await getattr(stub, method)(request, metadata=metadata, timeout=20)
            except grpc.aio.AioRpcError as error:
                raise error_of(error) from error

    async def refused(self, method: str, request: Any) -> str:
        with pytest.raises(GroundswellError) as refused:
            await self.call(method, request)
        return refused.value.reason

    async def signing_key(self, key_name: str) -> Ed25519PrivateKey:
        private = Ed25519PrivateKey.generate()
        request = pb.CreateSigningKeyRequest(
            parent=self.product,
            signing_key_id=key_name,
            signing_key=pb.SigningKey(public_key=private.public_key().public_bytes_raw()),
        )
        await self.call("CreateSigningKey", request)
        return private

    async def declare(self, data: bytes, target: str = "board", sha256: str = "") -> pb.Binary:
        """Artifact, version and binary, as far as they are missing."""
        artifact = f"{self.product}/artifacts/app"
        for method, request in (
            (
                "CreateArtifact",
                pb.CreateArtifactRequest(parent=self.product, artifact_id="app", artifact=pb.Artifact()),
            ),
            (
                "CreateArtifactVersion",
                pb.CreateArtifactVersionRequest(
                    parent=artifact,
                    artifact_version_id="one",
                    artifact_version=pb.ArtifactVersion(version="one", custom_metadata='{"of": "version"}'),
                ),
            ),
        ):
            with contextlib.suppress(GroundswellError):
                await self.call(method, request)
        wanted = B(target=target, size=len(data), sha256=sha256 or hashlib.sha256(data).hexdigest())
        request = pb.CreateBinaryRequest(parent=f"{artifact}/versions/one", binary_id=target, binary=wanted)
        binary: pb.Binary = await self.call("CreateBinary", request)
        return binary

    async def links(self, binary: pb.Binary, parts: Sequence[pb.UploadPart]) -> list[pb.PresignedPart]:
        answer = await self.call("PresignParts", pb.PresignPartsRequest(name=binary.name, parts=parts))
        return list(answer.parts)

    async def send(self, binary: pb.Binary, upload: Upload, indexes: Sequence[int] = ()) -> None:
        """Put the parts that are asked for and not there yet."""
        for link in await self.links(binary, upload.parts):
            if not link.stored and link.index in (indexes or range(1, 10_001)):
                assert await put(link, upload.chunk(link.index)) == 200

    async def hashed(self, binary: pb.Binary) -> pb.Binary:
        await self.call("HashBinary", pb.HashBinaryRequest(name=binary.name))
        deadline = asyncio.get_running_loop().time() + 20
        while asyncio.get_running_loop().time() < deadline:
            found: pb.Binary = await self.call("GetBinary", pb.GetBinaryRequest(name=binary.name))
            if found.state != B.STATE_HASHING:
                return found
            await asyncio.sleep(0.05)
        raise AssertionError("still hashing")

    async def signable(self, data: bytes, target: str = "board") -> pb.Binary:
        binary, upload = await self.declare(data, target), Upload(data)
        await self.send(binary, upload)
        await self.call("CompleteUpload", pb.CompleteUploadRequest(name=binary.name, parts=upload.parts))
        return await self.hashed(binary)

    async def lookup(self, name: str) -> pb.Bundle:
        async with channel(self.settings, "artifacts", identity="releases") as opened:
            stub = artifacts_pb2_grpc.ArtifactsInternalServiceStub(opened)
            bundle: pb.Bundle = await stub.LookupBundle(pb.GetBundleRequest(name=name), timeout=20)
            return bundle


async def put(link: pb.PresignedPart, data: bytes) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.put(URL(link.url, encoded=True), headers=dict(link.headers), data=io.BytesIO(data)) as response,
    ):
        return response.status


def signature(key: Ed25519PrivateKey, message: bytes) -> pb.Signature:
    return pb.Signature(key_id=key_id(key.public_key().public_bytes_raw()), signature=key.sign(message).hex())
