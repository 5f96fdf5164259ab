"""The artifacts service's gRPC servicers: they translate, and talk to the object store about parts."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.artifacts.v1 import artifacts_pb2_grpc
from groundswell.registry.v1 import registry_pb2, registry_pb2_grpc

from libs.blobs import BlobNotFoundError, BlobStore, BlobStoreError, StoredPart
from libs.errors import FailedPreconditionError, UnavailableError
from libs.eventlog import Runtime
from libs.names import organization_of, product_of
from libs.rpc import not_found, page, snapshot_state, submit
from services.artifacts import commands
from services.artifacts.rules import wrong_state
from services.artifacts.state import Shelves, State, Upload, find, shelf, upload_of

log = logging.getLogger(__name__)

LINK_LIFE_S: Final = 900
MIN_PART: Final = 5 * 1024 * 1024
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

    async def _product(self, name: str) -> registry_pb2.Product:
        return await self._registry.LookupProduct(registry_pb2.GetProductRequest(name=name))

    def _state(self, name: str) -> State:
        return snapshot_state(self._runtime, name)

    async def _required(self, product: str) -> int:
        return max(1, (await self._product(product)).policy.required_signatures)

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
        return _found(self._state(request.name).artifacts, request.name)

    async def ListArtifacts(self, request: Any, context: Any) -> Any:
        found, token = _page(self._state(request.parent).artifacts, "artifacts", request)
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
        return _found(self._state(request.name).versions, request.name)

    async def ListArtifactVersions(self, request: Any, context: Any) -> Any:
        found, token = _page(self._state(request.parent).versions, "versions", request)
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
        return _found(self._state(request.name).binaries, request.name)

    async def ListBinaries(self, request: Any, context: Any) -> Any:
        found, token = _page(self._state(request.parent).binaries, "binaries", request)
        return pb.ListBinariesResponse(binaries=found, next_page_token=token)

    async def PresignParts(self, request: Any, context: Any) -> Any:
        binary = _found(self._state(request.name).binaries, request.name)
        if binary.state != B.STATE_UPLOADABLE:
            raise wrong_state(binary, "UPLOADABLE")
        answer = pb.PresignPartsResponse()
        with _store_answers():
            upload, stored = await self._open_upload(binary, request, context)
            for part in request.parts:
                if stored is None or _is_stored(stored.get(part.index), part):
                    answer.parts.add(index=part.index, stored=True)
                    continue
                url, headers = await self._blobs.presign_part(
                    upload.staging_key, upload.upload_id, part.index, part.sha256, LINK_LIFE_S
                )
                answer.parts.add(index=part.index, url=url, headers=dict(headers))
        answer.expire_time.CopyFrom(_in(LINK_LIFE_S))
        return answer

    async def _open_upload(
        self, binary: pb.Binary, request: Any, context: Any
    ) -> tuple[Upload, dict[int, StoredPart] | None]:
        """The binary's upload with its parts' sizes, or None for the object made of them when that is there already.

        It is opened when there is none, or the store has lost it; of several opened at once the first recorded counts.
        """
        known = upload_of(self._state(binary.name), binary.name)
        if known.upload_id:
            try:
                parts = await self._blobs.list_parts(known.staging_key, known.upload_id)
            except BlobNotFoundError:
                if await self._blobs.size(known.staging_key) == binary.size:
                    return known, None
                await self._submit(binary.name, commands.ForgetUpload(binary.name, known.upload_id), request, context)
            else:
                if not parts and await self._blobs.size(known.staging_key) == binary.size:
                    return known, None
                return known, {part.index: part for part in parts}
        staging_key = f"staging/{uuid.uuid4()}"
        upload_id = await self._blobs.create_upload(staging_key)
        await self._submit(binary.name, commands.OpenUpload(binary.name, staging_key, upload_id), request, context)
        opened = upload_of(self._state(binary.name), binary.name)
        if opened.upload_id == upload_id:
            return opened, {}
        await self._blobs.abort(staging_key, upload_id)
        if not opened.upload_id:
            raise UnavailableError("UPLOAD_CHANGED", "the upload has just been given up: ask again", retry_after_s=0.2)
        parts = await self._blobs.list_parts(opened.staging_key, opened.upload_id)
        return opened, {part.index: part for part in parts}

    async def CompleteUpload(self, request: Any, context: Any) -> Any:
        state = self._state(request.name)
        binary, upload = _found(state.binaries, request.name), upload_of(state, request.name)
        if binary.state == B.STATE_UPLOADABLE:
            with _store_answers():
                await self._complete(binary, upload, request)
        command = commands.UploadCompleted(request.name, upload.upload_id)
        return await self._submit(request.name, command, request, context)

    async def _complete(self, binary: pb.Binary, upload: Upload, request: Any) -> None:
        """Check against what the store holds, then make the object; a repeat after a lost answer finds it made.

        A store says of an upload that was completed either that it does not exist, or that it has no parts.
        """
        stored = await self._parts(upload)
        if not stored and upload.upload_id and await self._blobs.size(upload.staging_key) == binary.size:
            return
        _check_parts(binary, request.parts, stored)
        try:
            await self._blobs.complete(
                upload.staging_key, upload.upload_id, [stored[part.index] for part in request.parts]
            )
        except BlobStoreError:
            if await self._blobs.size(upload.staging_key) != binary.size:
                raise

    async def _parts(self, upload: Upload) -> dict[int, StoredPart]:
        if not upload.upload_id:
            return {}
        try:
            return {part.index: part for part in await self._blobs.list_parts(upload.staging_key, upload.upload_id)}
        except BlobNotFoundError:
            return {}

    async def HashBinary(self, request: Any, context: Any) -> Any:
        command = commands.HashBinary(request.name, request.etag)
        return await self._submit(request.name, command, request, context)

    async def SignBinary(self, request: Any, context: Any) -> Any:
        command = commands.SignBinary(request.name, request.etag, request.signature)
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
        return _found(self._state(request.name).bundles, request.name)

    async def ListBundles(self, request: Any, context: Any) -> Any:
        found, token = _page(self._state(request.parent).bundles, "bundles", request)
        return pb.ListBundlesResponse(bundles=found, next_page_token=token)

    async def SignBundle(self, request: Any, context: Any) -> Any:
        required = await self._required(product_of(request.name))
        command = commands.SignBundle(request.name, request.etag, request.signature, required)
        return await self._submit(request.name, command, request, context)


class ArtifactsInternalServicer(artifacts_pb2_grpc.ArtifactsInternalServiceServicer):
    """What other services ask."""

    def __init__(self, runtime: Runtime[State]) -> None:
        self._runtime = runtime

    async def LookupBundle(self, request: Any, context: Any) -> Any:
        return _found(snapshot_state(self._runtime, request.name).bundles, request.name)


def _found(shelves: Shelves[M], name: str) -> M:
    known = find(shelves, name)
    if known is None:
        raise not_found(name)
    return known


def _page(shelves: Shelves[M], collection: str, request: Any) -> tuple[list[M], str]:
    return page(shelf(shelves, f"{request.parent}/{collection}").items(), request)


def _is_stored(known: StoredPart | None, part: pb.UploadPart) -> bool:
    """Whether the store has the part as declared.

    Not every store names the SHA-256 of a part. Then index and size say it is the part that a link's signed checksum
    let in: enough to skip it, because the whole object is hashed before anything rests on it.
    """
    return known is not None and known.size == part.size and known.sha256 in ("", part.sha256)


def _check_parts(binary: pb.Binary, declared: Any, stored: dict[int, StoredPart]) -> None:
    """Every part is declared, is there with its size, and together they are the binary."""
    name = binary.name
    missing = next((index for index, part in enumerate(declared, start=1) if part.index != index), 0)
    missing = missing or next((part.index for part in declared if part.index not in stored), 0)
    if missing:
        raise FailedPreconditionError(
            "PARTS_MISSING", f"part {missing} of {name} is not there: parts are 1, 2, 3 …", resource=name, part=missing
        )
    for part in declared:
        size = stored[part.index].size
        if size != part.size or (part.index < len(declared) and size < MIN_PART):
            raise FailedPreconditionError(
                "PART_SIZE_MISMATCH",
                f"part {part.index} has {size} bytes, {part.size} were declared; all but the last need {MIN_PART}",
                resource=name,
                part=part.index,
                size=size,
                declared=part.size,
                least=MIN_PART,
            )
    total = sum(part.size for part in declared)
    if total != binary.size:
        raise FailedPreconditionError(
            "SIZE_MISMATCH",
            f"the parts of {name} are {total} bytes, {binary.size} were declared",
            resource=name,
            size=total,
            declared=binary.size,
        )


@contextmanager
def _store_answers() -> Iterator[None]:
    """What the store did not do may work later; what it said stays in the log and does not reach the caller."""
    try:
        yield
    except BlobStoreError as error:
        log.warning("object store: %s", error)
        raise UnavailableError(
            "OBJECT_STORE_UNAVAILABLE", "the object store did not do it: try again", retry_after_s=1
        ) from error


def _in(seconds: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromSeconds(int(time.time()) + seconds)
    return stamp
