"""Uploads of binaries, as the object store and the log know them together: parts, links, completion."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.artifacts.v1 import artifacts_pb2 as pb

from libs.blobs import BlobNotFoundError, BlobStore, BlobStoreError, StoredPart
from libs.errors import FailedPreconditionError, UnavailableError
from libs.eventlog import Runtime
from libs.names import organization_of
from libs.rpc import not_found, page, snapshot_state, submit
from services.artifacts import commands
from services.artifacts.rules import wrong_state
from services.artifacts.state import State, Upload, find, upload_of

log = logging.getLogger(__name__)

LINK_LIFE_S: Final = 900
MIN_PART: Final = 5 * 1024 * 1024
B = pb.Binary


class Uploads:
    """What the servicer asks about parts."""

    def __init__(self, runtime: Runtime[State], blobs: BlobStore) -> None:
        self._runtime = runtime
        self._blobs = blobs

    def _state(self, name: str) -> State:
        return snapshot_state(self._runtime, name)

    def _binary(self, name: str) -> pb.Binary:
        binary = find(self._state(name).binaries, name)
        if binary is None:
            raise not_found(name)
        return binary

    async def _submit(self, name: str, command: object, request: Any, context: Any) -> Any:
        return await submit(self._runtime, organization_of(name), command, request, context)

    async def presign(self, request: Any, context: Any) -> pb.PresignPartsResponse:
        """A link for each part that is not there as declared."""
        binary = self._binary(request.name)
        if binary.state != B.STATE_UPLOADABLE:
            raise wrong_state(binary, "UPLOADABLE")
        answer = pb.PresignPartsResponse()
        with store_answers():
            upload, stored = await self._open_upload(binary, request, context)
            for part in request.parts:
                state = pb.PART_STATE_VALID if stored is None else _part_state(stored.get(part.index), part)
                if state == pb.PART_STATE_VALID:
                    answer.parts.add(index=part.index, stored=True, state=state)
                    continue
                url, headers = await self._blobs.presign_part(
                    upload.staging_key, upload.upload_id, part.index, part.sha256, LINK_LIFE_S
                )
                answer.parts.add(index=part.index, url=url, headers=dict(headers), state=state)
        answer.expire_time.CopyFrom(in_seconds(LINK_LIFE_S))
        return answer

    async def list_parts(self, request: Any) -> pb.ListUploadPartsResponse:
        """Parts that are there. What was put together already has none."""
        binary = self._binary(request.name)
        if binary.state != B.STATE_UPLOADABLE:
            raise wrong_state(binary, "UPLOADABLE")
        with store_answers():
            stored = await self._parts(upload_of(self._state(request.name), request.name))
        last = max(stored, default=0)
        parts = [
            (
                f"{part.index:05}",
                pb.StoredPart(
                    index=part.index,
                    size=part.size,
                    sha256=part.sha256,
                    state=pb.PART_STATE_INVALID_SIZE
                    if part.size > binary.size or (part.size < MIN_PART and part.index < last)
                    else pb.PART_STATE_VALID,
                ),
            )
            for part in stored.values()
        ]
        found, token = page(parts, request)
        return pb.ListUploadPartsResponse(parts=found, next_page_token=token)

    async def complete(self, request: Any, context: Any) -> Any:
        """HASHABLE, when the store has every part and has put them together."""
        binary, upload = self._binary(request.name), upload_of(self._state(request.name), request.name)
        if binary.state == B.STATE_UPLOADABLE:
            with store_answers():
                await self._complete(binary, upload, request)
        command = commands.UploadCompleted(request.name, upload.upload_id)
        return await self._submit(request.name, command, request, context)

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


def _part_state(known: StoredPart | None, part: pb.UploadPart) -> pb.PartState.ValueType:
    """Whether the store has the part as declared.

    Not every store names the SHA-256 of a part. Then index and size say it is the part that a link's signed checksum
    let in: enough to skip it, because the whole object is hashed before anything rests on it.
    """
    if known is None:
        return pb.PART_STATE_UPLOADABLE
    if known.size != part.size:
        return pb.PART_STATE_INVALID_SIZE
    return pb.PART_STATE_VALID if known.sha256 in ("", part.sha256) else pb.PART_STATE_INVALID_HASH


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
def store_answers() -> Iterator[None]:
    """What the store did not do may work later; what it said stays in the log and does not reach the caller."""
    try:
        yield
    except BlobStoreError as error:
        log.warning("object store: %s", error)
        raise UnavailableError(
            "OBJECT_STORE_UNAVAILABLE", "the object store did not do it: try again", retry_after_s=1
        ) from error


def in_seconds(seconds: int) -> Timestamp:
    """That long from now."""
    stamp = Timestamp()
    stamp.FromSeconds(int(time.time()) + seconds)
    return stamp
