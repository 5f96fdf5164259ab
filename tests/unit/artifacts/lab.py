"""Artifacts as it runs, on the log and the object store in memory, with a registry that knows one organization."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2

from libs.blobs.memory import MemoryBlobStore
from libs.errors import GroundswellError, NotFoundError
from libs.eventlog import Command, Deadline, Foreign, Runtime, RuntimeConfig
from libs.eventlog.memory import MemoryLog
from libs.rpc.identity import Principal, set_caller
from libs.trust.signatures import key_id
from services.artifacts.domain import Artifacts
from services.artifacts.service import ArtifactsInternalServicer, ArtifactsServicer
from services.artifacts.state import State
from services.artifacts.tasks import ArtifactsTasks

PRODUCT = "organizations/acme/products/pump"
OTHER = "organizations/acme/products/valve"
VERSION = f"{PRODUCT}/artifacts/main/versions/v1"
PART = 5 * 1024 * 1024
B = pb.Binary


@dataclass
class FakeRegistry:
    products: dict[str, registry_pb2.Product] = field(
        default_factory=lambda: {name: registry_pb2.Product(name=name) for name in (PRODUCT, OTHER)}
    )

    async def LookupProduct(self, request: registry_pb2.GetProductRequest) -> registry_pb2.Product:  # noqa: N802
        if request.name not in self.products:
            raise NotFoundError("RESOURCE_NOT_FOUND", f"{request.name} does not exist", resource=request.name)
        return self.products[request.name]


def context() -> Any:
    set_caller(Principal("organizations/acme/apiKeys/test", "api_key"))
    return SimpleNamespace(time_remaining=lambda: 5.0)


class Signer:
    """An operator's key."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.public = self._key.public_key().public_bytes_raw()
        self.id = key_id(self.public)

    def __call__(self, message: bytes) -> pb.Signature:
        return pb.Signature(key_id=self.id, signature=self._key.sign(message).hex())


@dataclass
class Lab:
    runtime: Runtime[State]
    blobs: MemoryBlobStore
    registry: FakeRegistry
    servicer: ArtifactsServicer
    internal: ArtifactsInternalServicer

    async def call(self, method: str, request: Any) -> Any:
        return await getattr(self.servicer, method)(request, context())

    async def refused(self, method: str, request: Any) -> str:
        return await refused(self.call(method, request))

    async def version(self) -> None:
        product, _, _ = VERSION.partition("/artifacts/")
        await self.call("CreateArtifact", pb.CreateArtifactRequest(parent=product, artifact_id="main"))
        request = pb.CreateArtifactVersionRequest(parent=f"{product}/artifacts/main", artifact_version_id="v1")
        await self.call("CreateArtifactVersion", request)

    async def binary(self, content: bytes, binary_id: str = "b", target: str = "m4", **fields: Any) -> pb.Binary:
        wanted = pb.Binary(
            target=target, **({"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} | fields)
        )
        request = pb.CreateBinaryRequest(parent=VERSION, binary_id=binary_id, binary=wanted)
        made: pb.Binary = await self.call("CreateBinary", request)
        return made

    async def upload(self, name: str, content: bytes) -> list[pb.UploadPart]:
        parts = parts_of(content)
        answer = await self.call("PresignParts", pb.PresignPartsRequest(name=name, parts=parts))
        for part in answer.parts:
            if not part.stored:
                at = (part.index - 1) * PART
                await self.blobs.put_part(part.url, dict(part.headers), content[at : at + PART])
        return parts

    async def hashed(self, name: str, content: bytes) -> pb.Binary:
        parts = await self.upload(name, content)
        await self.call("CompleteUpload", pb.CompleteUploadRequest(name=name, parts=parts))
        await self.call("HashBinary", pb.HashBinaryRequest(name=name))
        return await self.until_hashed(name)

    async def until_hashed(self, name: str) -> pb.Binary:
        deadline = Deadline.after(10)
        while (binary := await self.get(name)).state == B.STATE_HASHING or self.open_tasks():
            await self.runtime.changed("acme", deadline)
        return binary

    def open_tasks(self) -> list[str]:
        return list(self.runtime.snapshot("acme").open_tasks)

    async def get(self, name: str) -> pb.Binary:
        found: pb.Binary = await self.call("GetBinary", pb.GetBinaryRequest(name=name))
        return found

    async def key(self, signer: Signer, key_id_: str = "k1", product: str = PRODUCT) -> pb.SigningKey:
        request = pb.CreateSigningKeyRequest(
            parent=product, signing_key_id=key_id_, signing_key=pb.SigningKey(public_key=signer.public)
        )
        made: pb.SigningKey = await self.call("CreateSigningKey", request)
        return made

    async def signed(self, signer: Signer, content: bytes, binary_id: str = "b", target: str = "m4") -> pb.Binary:
        binary = await self.binary(content, binary_id, target)
        await self.hashed(binary.name, content)
        request = pb.SignBinaryRequest(name=binary.name, signature=signer(binary.sha256.encode()))
        made: pb.Binary = await self.call("SignBinary", request)
        return made

    async def bundle(self, *binaries: str, bundle_id: str = "one", **fields: Any) -> pb.Bundle:
        made: pb.Bundle = await self.call("CreateBundle", bundle_request(*binaries, bundle_id=bundle_id, **fields))
        return made

    async def sign_bundle(self, bundle: pb.Bundle, signer: Signer) -> pb.Bundle:
        request = pb.SignBundleRequest(name=bundle.name, signature=signer(bundle.statement))
        made: pb.Bundle = await self.call("SignBundle", request)
        return made

    async def lookup(self, name: str) -> pb.Bundle:
        found: pb.Bundle = await self.internal.LookupBundle(pb.GetBundleRequest(name=name), context())
        return found

    async def policy(self, required: int, *, record: bool = True, of_binary: int = 0) -> None:
        """The product asks for so many signatures; without `record` the registry's log is still behind."""
        product = registry_pb2.Product(name=PRODUCT)
        product.policy.required_signatures = required
        product.policy.required_binary_signatures = of_binary
        self.registry.products[PRODUCT] = product
        if record:
            changed = registry_events.ProductChanged(product=product, change="product.updated")
            foreign = Foreign("registry", "t.registry.public.v1", 0, 0, 1, "acme", PRODUCT, changed, 0)
            await self.runtime.submit(Command("acme", foreign), Deadline.after(5))

    def written(self) -> int:
        """Position of the last record: what writes nothing leaves it."""
        return self.runtime.snapshot("acme").token.position


def bundle_request(*binaries: str, bundle_id: str = "one", metadata: str = "", **fields: Any) -> pb.CreateBundleRequest:
    entries = [pb.BundleEntrySpec(binary=name, metadata=metadata) for name in binaries]
    given = {"parent": PRODUCT, "version": "1.2.3", "security_version": 7} | fields
    return pb.CreateBundleRequest(bundle_id=bundle_id, entries=entries, **given)


def parts_of(content: bytes) -> list[pb.UploadPart]:
    chunks = [content[at : at + PART] for at in range(0, len(content), PART)]
    return [
        pb.UploadPart(index=index, size=len(chunk), sha256=hashlib.sha256(chunk).hexdigest())
        for index, chunk in enumerate(chunks, start=1)
    ]


async def refused(call: Awaitable[Any]) -> str:
    """Reason of the refusal that the call must end with."""
    try:
        answer = await call
    except GroundswellError as error:
        return error.reason
    raise AssertionError(f"was not refused: {answer}")


@asynccontextmanager
async def running(
    log: MemoryLog | None = None, blobs: MemoryBlobStore | None = None, grace_ms: int = 86_400_000
) -> AsyncIterator[Lab]:
    blobs, registry = blobs or MemoryBlobStore(), FakeRegistry()
    config = RuntimeConfig(env="t", partitions=4, retry_first_s=0.01, retry_most_s=0.05, verify_folds=True)
    handlers = ArtifactsTasks(blobs).handlers()
    runtime: Runtime[State] = Runtime(Artifacts(grace_ms), log or MemoryLog(partitions=4), config, handlers)
    await runtime.start()
    await runtime.wait_leading(Deadline.after(10))
    servicer = ArtifactsServicer(runtime, cast("Any", registry), blobs)
    try:
        yield Lab(runtime, blobs, registry, servicer, ArtifactsInternalServicer(runtime))
    finally:
        await runtime.stop()
