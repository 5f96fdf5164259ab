"""The artifacts service's gRPC servicers: they translate, and talk to the object store about parts."""

from __future__ import annotations

import time
import uuid
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.artifacts.v1 import artifacts_pb2_grpc
from groundswell.registry.v1 import registry_pb2, registry_pb2_grpc

from libs.blobs import BlobNotFoundError, BlobStore, BlobStoreError, StoredPart
from libs.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from libs.eventlog import Runtime
from libs.names import organization_of, product_of
from libs.rpc import not_found, page, snapshot_state, submit
from services.artifacts import state as commands
from services.artifacts.state import State, Upload

LINK_LIFE_S: Final = 900
MIN_PART: Final = 5 * 1024 * 1024
B = pb.Binary


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

    async def _product(self, name: str) -> registry_pb2.Product:
        return await self._registry.LookupProduct(registry_pb2.GetProductRequest(name=name))

    def _get(self, attribute: str, name: str) -> Any:
        found = getattr(snapshot_state(self._runtime, name), attribute).get(name)
        if found is None:
            raise not_found(name)
        return found

    def _list(self, attribute: str, collection: str, request: Any) -> tuple[list[Any], str]:
        held = getattr(snapshot_state(self._runtime, request.parent), attribute)
        prefix = f"{request.parent}/{collection}/"
        items = ((n, item) for n, item in held.items() if n.startswith(prefix) and "/" not in n[len(prefix) :])
        return page(items, request)

    async def _submit(self, name: str, command: object, request: Any, context: Any) -> Any:
        return await submit(self._runtime, organization_of(name), command, request, context)

    async def CreateSigningKey(self, request: Any, context: Any) -> Any:
        await self._product(request.parent)
        name = f"{request.parent}/signingKeys/{request.signing_key_id}"
        key = pb.SigningKey(name=name, public_key=request.signing_key.public_key)
        return await self._submit(name, commands.CreateSigningKey(key), request, context)

    async def GetSigningKey(self, request: Any, context: Any) -> Any:
        return self._get("signing_keys", request.name)

    async def ListSigningKeys(self, request: Any, context: Any) -> Any:
        found, token = self._list("signing_keys", "signingKeys", request)
        return pb.ListSigningKeysResponse(signing_keys=found, next_page_token=token)

    async def RevokeSigningKey(self, request: Any, context: Any) -> Any:
        command = commands.RevokeSigningKey(request.name, request.etag)
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
        return self._get("artifacts", request.name)

    async def ListArtifacts(self, request: Any, context: Any) -> Any:
        found, token = self._list("artifacts", "artifacts", request)
        return pb.ListArtifactsResponse(artifacts=found, next_page_token=token)

    async def CreateArtifactVersion(self, request: Any, context: Any) -> Any:
        name = f"{request.parent}/versions/{request.artifact_version_id}"
        version = pb.ArtifactVersion(
            name=name,
            version=request.artifact_version.version,
            custom_metadata=request.artifact_version.custom_metadata,
        )
        return await self._submit(name, commands.CreateVersion(version), request, context)

    async def GetArtifactVersion(self, request: Any, context: Any) -> Any:
        return self._get("versions", request.name)

    async def ListArtifactVersions(self, request: Any, context: Any) -> Any:
        found, token = self._list("versions", "versions", request)
        return pb.ListArtifactVersionsResponse(artifact_versions=found, next_page_token=token)

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
        return self._get("binaries", request.name)

    async def ListBinaries(self, request: Any, context: Any) -> Any:
        found, token = self._list("binaries", "binaries", request)
        return pb.ListBinariesResponse(binaries=found, next_page_token=token)

    async def PresignParts(self, request: Any, context: Any) -> Any:
        binary = self._get("binaries", request.name)
        if binary.state != B.STATE_UPLOADABLE:
            raise FailedPreconditionError("WRONG_STATE", f"{binary.name} takes no parts any more", resource=binary.name)
        upload = await self._open_upload(binary, request, context)
        stored = {part.index: part for part in await self._parts(upload)}
        answer = pb.PresignPartsResponse()
        for part in request.parts:
            known = stored.get(part.index)
            # The store keeps no SHA-256 of a part we could trust; same index and size means the part that the
            # link's signed checksum admitted. The whole object is hashed before anything rests on it.
            if known is not None and known.size == part.size:
                answer.parts.add(index=part.index, stored=True)
                continue
            url, headers = await self._blobs.presign_part(
                upload.staging_key, upload.upload_id, part.index, part.sha256, LINK_LIFE_S
            )
            answer.parts.add(index=part.index, url=url, headers=dict(headers))
        answer.expire_time.CopyFrom(_in(LINK_LIFE_S))
        return answer

    async def _open_upload(self, binary: pb.Binary, request: Any, context: Any) -> Upload:
        """The binary's upload, opened in the store when it has none; a lost race drops its own."""
        state = snapshot_state(self._runtime, binary.name)
        known = state.uploads.get(binary.name, Upload())
        if known.upload_id:
            return known
        staging_key = f"staging/{uuid.uuid4().hex}"
        try:
            upload_id = await self._blobs.create_upload(staging_key)
        except BlobStoreError as error:
            raise _store_unavailable(error) from error
        command = commands.OpenUpload(binary.name, staging_key, upload_id)
        await self._submit(binary.name, command, request, context)
        opened = snapshot_state(self._runtime, binary.name).uploads[binary.name]
        if opened.upload_id != upload_id:
            await self._blobs.abort(staging_key, upload_id)
        return opened

    async def _parts(self, upload: Upload) -> list[StoredPart]:
        try:
            return list(await self._blobs.list_parts(upload.staging_key, upload.upload_id))
        except BlobStoreError as error:
            raise _store_unavailable(error) from error

    async def CompleteUpload(self, request: Any, context: Any) -> Any:
        binary = self._get("binaries", request.name)
        upload = snapshot_state(self._runtime, request.name).uploads.get(request.name, Upload())
        if binary.state == B.STATE_UPLOADABLE:
            if not upload.upload_id:
                raise FailedPreconditionError(
                    "PARTS_MISSING", "no part was uploaded yet: ask for links with PresignParts", resource=binary.name
                )
            await self._complete(binary, upload, request)
        return await self._submit(request.name, commands.UploadCompleted(request.name), request, context)

    async def _complete(self, binary: pb.Binary, upload: Upload, request: Any) -> None:
        """Check against what the store holds, then make the object; a repeat after a lost answer finds it made."""
        try:
            stored = {part.index: part for part in await self._blobs.list_parts(upload.staging_key, upload.upload_id)}
        except BlobNotFoundError as error:
            if await self._blobs.size(upload.staging_key) == binary.size:
                return
            raise FailedPreconditionError(
                "PARTS_MISSING", "the upload is gone from the store: upload the file again", resource=binary.name
            ) from error
        except BlobStoreError as error:
            raise _store_unavailable(error) from error
        _check_parts(binary, request.parts, stored)
        try:
            await self._blobs.complete(
                upload.staging_key, upload.upload_id, [stored[part.index] for part in request.parts]
            )
        except BlobStoreError as error:
            if await self._blobs.size(upload.staging_key) != binary.size:
                raise _store_unavailable(error) from error

    async def HashBinary(self, request: Any, context: Any) -> Any:
        command = commands.HashBinary(request.name, request.etag)
        return await self._submit(request.name, command, request, context)

    async def SignBinary(self, request: Any, context: Any) -> Any:
        command = commands.SignBinary(request.name, request.etag, request.signature)
        return await self._submit(request.name, command, request, context)

    async def CreateBundle(self, request: Any, context: Any) -> Any:
        product = await self._product(request.parent)
        command = commands.CreateBundle(
            f"{request.parent}/bundles/{request.bundle_id}",
            request.version,
            request.security_version,
            tuple(request.entries),
            max(1, product.policy.required_signatures),
        )
        return await self._submit(request.parent, command, request, context)

    async def GetBundle(self, request: Any, context: Any) -> Any:
        return self._get("bundles", request.name)

    async def ListBundles(self, request: Any, context: Any) -> Any:
        found, token = self._list("bundles", "bundles", request)
        return pb.ListBundlesResponse(bundles=found, next_page_token=token)

    async def SignBundle(self, request: Any, context: Any) -> Any:
        command = commands.SignBundle(request.name, request.etag, request.signature)
        return await self._submit(request.name, command, request, context)


class ArtifactsInternalServicer(artifacts_pb2_grpc.ArtifactsInternalServiceServicer):
    """What other services ask."""

    def __init__(self, runtime: Runtime[State]) -> None:
        self._runtime = runtime

    async def LookupBundle(self, request: Any, context: Any) -> Any:
        found = snapshot_state(self._runtime, request.name).bundles.get(request.name)
        if found is None or not product_of(request.name):
            raise not_found(request.name)
        return found


def _check_parts(binary: pb.Binary, declared: Any, stored: dict[int, StoredPart]) -> None:
    """Every declared part is there, of its size, and together they are the binary."""
    missing = [part.index for part in declared if part.index not in stored]
    if missing:
        raise FailedPreconditionError(
            "PARTS_MISSING",
            f"{len(missing)} parts are not in the store, the first is {missing[0]}",
            resource=binary.name,
            first_missing=missing[0],
        )
    indexes = [part.index for part in declared]
    if indexes != list(range(1, len(indexes) + 1)):
        raise InvalidArgumentError("INVALID_FIELD", "parts are numbered 1, 2, 3 … without gaps", field="parts")
    for part in declared:
        size = stored[part.index].size
        if size != part.size or (part.index < len(indexes) and size < MIN_PART):
            raise FailedPreconditionError(
                "PART_SIZE_MISMATCH",
                f"part {part.index} has {size} bytes, not {part.size}; all but the last have at least {MIN_PART}",
                resource=binary.name,
                part=part.index,
            )
    total = sum(part.size for part in declared)
    if total != binary.size:
        raise FailedPreconditionError(
            "SIZE_MISMATCH", f"the parts are {total} bytes, {binary.size} were declared", resource=binary.name
        )


def _store_unavailable(error: BlobStoreError) -> UnavailableError:
    return UnavailableError("OBJECT_STORE_UNAVAILABLE", f"the object store did not do it: {error}", retry_after_s=1)


def _in(seconds: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromSeconds(int(time.time()) + seconds)
    return stamp
