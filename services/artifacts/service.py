"""The artifacts service's gRPC servicers: they translate; `uploads` and `documents` talk to the store."""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.message import Message
from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.artifacts.v1 import artifacts_pb2_grpc
from groundswell.registry.v1 import registry_pb2, registry_pb2_grpc

from libs.blobs import BlobStore
from libs.eventlog import Runtime
from libs.names import organization_of, product_of
from libs.rpc import not_found, page, snapshot_state, submit
from services.artifacts import bundles, commands
from services.artifacts.documents import Documents
from services.artifacts.rules import wrong_state
from services.artifacts.state import Shelves, State, find, shelf, upload_of
from services.artifacts.uploads import LINK_LIFE_S, Uploads, in_seconds, store_answers

B = pb.Binary
M = TypeVar("M", bound=Message)


class ArtifactsServicer(artifacts_pb2_grpc.ArtifactsServiceServicer):
    """Public API."""

    def __init__(
        self,
        runtime: Runtime[State],
        registry: registry_pb2_grpc.RegistryInternalServiceAsyncStub,
        blobs: BlobStore,
    ) -> None:
        self._runtime = runtime
        self._registry = registry
        self._blobs = blobs
        self._uploads = Uploads(runtime, blobs)
        self._documents = Documents(runtime, blobs)

    async def _product(self, name: str) -> registry_pb2.Product:
        return await self._registry.LookupProduct(registry_pb2.GetProductRequest(name=name))

    def _state(self, name: str) -> State:
        return snapshot_state(self._runtime, name)

    async def _submit(self, name: str, command: object, request: Any, context: Any) -> Any:
        return await submit(self._runtime, organization_of(name), command, request, context)

    async def CreateSigningKey(self, request: Any, context: Any) -> Any:
        await self._product(request.parent)
        name = f"{request.parent}/signingKeys/{request.signing_key_id}"
        key = pb.SigningKey(name=name, public_key=request.signing_key.public_key)
        return await self._submit(name, commands.CreateSigningKey(key), request, context)

    async def GetSigningKey(self, request: Any, context: Any) -> Any:
        return _found(self._state(request.name).signing_keys, request.name)

    async def ListSigningKeys(self, request: Any, context: Any) -> Any:
        found, token = _page(self._state(request.parent).signing_keys, "signingKeys", request)
        return pb.ListSigningKeysResponse(signing_keys=found, next_page_token=token)

    async def RevokeSigningKey(self, request: Any, context: Any) -> Any:
        command = commands.RevokeSigningKey(request.name, request.etag, request.reason)
        return await self._submit(request.name, command, request, context)

    async def CreateArtifact(self, request: Any, context: Any) -> Any:
        await self._product(request.parent)
        name = f"{request.parent}/artifacts/{request.artifact_id}"
        artifact = pb.Artifact(
            name=name,
            display_name=request.artifact.display_name,
            custom_metadata=request.artifact.custom_metadata,
        )
        return await self._submit(name, commands.CreateArtifact(artifact), request, context)

    async def GetArtifact(self, request: Any, context: Any) -> Any:
        return _found(self._state(request.name).artifacts, request.name)

    async def ListArtifacts(self, request: Any, context: Any) -> Any:
        found, token = _page(self._state(request.parent).artifacts, "artifacts", request)
        return pb.ListArtifactsResponse(artifacts=found, next_page_token=token)

    async def UpdateArtifact(self, request: Any, context: Any) -> Any:
        command = commands.UpdateArtifact(request.artifact, tuple(request.update_mask.paths))
        return await self._submit(request.artifact.name, command, request, context)

    async def DeleteArtifact(self, request: Any, context: Any) -> Any:
        command = commands.DeleteArtifact(request.name, request.etag)
        return await self._submit(request.name, command, request, context)

    async def CreateArtifactVersion(self, request: Any, context: Any) -> Any:
        name = f"{request.parent}/versions/{request.artifact_version_id}"
        version = pb.ArtifactVersion(
            name=name,
            version=request.artifact_version.version,
            custom_metadata=request.artifact_version.custom_metadata,
            dependencies=request.artifact_version.dependencies,
        )
        return await self._submit(name, commands.CreateVersion(version), request, context)

    async def GetArtifactVersion(self, request: Any, context: Any) -> Any:
        return _found(self._state(request.name).versions, request.name)

    async def ListArtifactVersions(self, request: Any, context: Any) -> Any:
        found, token = _page(self._state(request.parent).versions, "versions", request)
        return pb.ListArtifactVersionsResponse(artifact_versions=found, next_page_token=token)

    async def UpdateArtifactVersion(self, request: Any, context: Any) -> Any:
        command = commands.UpdateVersion(request.artifact_version, tuple(request.update_mask.paths))
        return await self._submit(request.artifact_version.name, command, request, context)

    async def DeleteArtifactVersion(self, request: Any, context: Any) -> Any:
        command = commands.DeleteVersion(request.name, request.etag)
        return await self._submit(request.name, command, request, context)

    async def CreateBinary(self, request: Any, context: Any) -> Any:
        name = f"{request.parent}/binaries/{request.binary_id}"
        wanted = request.binary
        binary = pb.Binary(
            name=name,
            target=wanted.target,
            size=wanted.size,
            sha256=wanted.sha256,
            custom_metadata=wanted.custom_metadata,
        )
        return await self._submit(name, commands.CreateBinary(binary), request, context)

    async def GetBinary(self, request: Any, context: Any) -> Any:
        return _found(self._state(request.name).binaries, request.name)

    async def ListBinaries(self, request: Any, context: Any) -> Any:
        found, token = _page(self._state(request.parent).binaries, "binaries", request)
        return pb.ListBinariesResponse(binaries=found, next_page_token=token)

    async def UpdateBinary(self, request: Any, context: Any) -> Any:
        command = commands.UpdateBinary(request.binary, tuple(request.update_mask.paths))
        return await self._submit(request.binary.name, command, request, context)

    async def DeleteBinary(self, request: Any, context: Any) -> Any:
        command = commands.DeleteBinary(request.name, request.etag)
        return await self._submit(request.name, command, request, context)

    async def PresignParts(self, request: Any, context: Any) -> Any:
        return await self._uploads.presign(request, context)

    async def ListUploadParts(self, request: Any, context: Any) -> Any:
        return await self._uploads.list_parts(request)

    async def CompleteUpload(self, request: Any, context: Any) -> Any:
        return await self._uploads.complete(request, context)

    async def HashBinary(self, request: Any, context: Any) -> Any:
        command = commands.HashBinary(request.name, request.etag)
        return await self._submit(request.name, command, request, context)

    async def ResetBinary(self, request: Any, context: Any) -> Any:
        command = commands.ResetBinary(request.name, request.etag, request.size, request.sha256)
        return await self._submit(request.name, command, request, context)

    async def SignBinary(self, request: Any, context: Any) -> Any:
        required = (await self._product(product_of(request.name))).policy.required_binary_signatures
        command = commands.SignBinary(request.name, request.etag, request.signature, required)
        return await self._submit(request.name, command, request, context)

    async def DestroyBinary(self, request: Any, context: Any) -> Any:
        command = commands.DestroyBinary(request.name, request.etag, request.force, request.reason)
        return await self._submit(request.name, command, request, context)

    async def PresignDownload(self, request: Any, context: Any) -> Any:
        state = self._state(request.name)
        binary = _found(state.binaries, request.name)
        if binary.state not in (B.STATE_SIGNABLE, B.STATE_SIGNED):
            raise wrong_state(binary, "SIGNABLE or SIGNED")
        with store_answers():
            url = await self._blobs.presign_get(upload_of(state, request.name).blob_key, LINK_LIFE_S)
        return pb.ContentLink(url=url, expire_time=in_seconds(LINK_LIFE_S), sha256=binary.sha256, size=binary.size)

    async def CreateAttachment(self, request: Any, context: Any) -> Any:
        return await self._documents.create(request, context)

    async def UploadAttachmentPart(self, request: Any, context: Any) -> Any:
        return await self._documents.part(request, context)

    async def CompleteAttachment(self, request: Any, context: Any) -> Any:
        return await self._documents.complete(request, context)

    async def GetAttachment(self, request: Any, context: Any) -> Any:
        return _found(self._state(request.name).attachments, request.name)

    async def ListAttachments(self, request: Any, context: Any) -> Any:
        found, token = _page(self._state(request.parent).attachments, "attachments", request)
        return pb.ListAttachmentsResponse(attachments=found, next_page_token=token)

    async def GetAttachmentContent(self, request: Any, context: Any) -> Any:
        return await self._documents.content(request)

    async def DeleteAttachment(self, request: Any, context: Any) -> Any:
        command = commands.DeleteAttachment(request.name, request.etag)
        return await self._submit(request.name, command, request, context)

    async def CreateBundle(self, request: Any, context: Any) -> Any:
        await self._product(request.parent)
        command = commands.CreateBundle(
            f"{request.parent}/bundles/{request.bundle_id}",
            request.version,
            request.security_version,
            tuple(request.entries),
        )
        return await self._submit(request.parent, command, request, context)

    async def GetBundle(self, request: Any, context: Any) -> Any:
        return bundle_now(self._runtime, request.name)

    async def ListBundles(self, request: Any, context: Any) -> Any:
        state = self._state(request.parent)
        judging = bundles.is_judging(self._runtime.snapshot(organization_of(request.parent)).open_tasks, request.parent)
        known = shelf(state.bundles, f"{request.parent}/bundles").items()
        found, token = page(bundles.all_current(state, request.parent) if judging else known, request)
        return pb.ListBundlesResponse(bundles=found, next_page_token=token)

    async def UpdateBundle(self, request: Any, context: Any) -> Any:
        command = commands.UpdateBundle(request.bundle, tuple(request.update_mask.paths))
        return await self._submit(request.bundle.name, command, request, context)

    async def SignBundle(self, request: Any, context: Any) -> Any:
        required = (await self._product(product_of(request.name))).policy.required_signatures
        command = commands.SignBundle(request.name, request.etag, request.signature, required)
        return await self._submit(request.name, command, request, context)


class ArtifactsInternalServicer(artifacts_pb2_grpc.ArtifactsInternalServiceServicer):
    """What other services ask."""

    def __init__(self, runtime: Runtime[State]) -> None:
        self._runtime = runtime

    async def LookupBundle(self, request: Any, context: Any) -> Any:
        return bundle_now(self._runtime, request.name)


def bundle_now(runtime: Runtime[State], name: str) -> pb.Bundle:
    """A bundle that is worth what it says, even while a judgement is under way."""
    state = snapshot_state(runtime, name)
    known = _found(state.bundles, name)
    judging = bundles.is_judging(runtime.snapshot(organization_of(name)).open_tasks, product_of(name))
    return bundles.current(state, known) if judging else known


def _found(shelves: Shelves[M], name: str) -> M:
    known = find(shelves, name)
    if known is None:
        raise not_found(name)
    return known


def _page(shelves: Shelves[M], collection: str, request: Any) -> tuple[list[M], str]:
    return page(shelf(shelves, f"{request.parent}/{collection}").items(), request)
