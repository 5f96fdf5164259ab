"""Content of attachments, between callers and the object store.

The log says first that the attachment holds its content key; then the content is written there, create-only; then the
log says that it is there. After a crash in between, the same calls again end the same way.
"""

from __future__ import annotations

import hashlib
from typing import Any

from groundswell.artifacts.v1 import artifacts_pb2 as pb

from libs.blobs import BlobStore
from libs.errors import FailedPreconditionError
from libs.eventlog import Runtime
from libs.names import organization_of
from libs.rpc import not_found, snapshot_state, submit
from services.artifacts import commands
from services.artifacts.attachments import MAX_PARTS, check_document, part_key, wrong_attachment_state
from services.artifacts.rules import invalid
from services.artifacts.state import State, find, upload_of
from services.artifacts.uploads import LINK_LIFE_S, in_seconds, store_answers

A = pb.Attachment


class Documents:
    """What the servicer asks about attachments."""

    def __init__(self, runtime: Runtime[State], blobs: BlobStore) -> None:
        self._runtime = runtime
        self._blobs = blobs

    def _state(self, name: str) -> State:
        return snapshot_state(self._runtime, name)

    def _attachment(self, name: str) -> pb.Attachment:
        attachment = find(self._state(name).attachments, name)
        if attachment is None:
            raise not_found(name)
        return attachment

    async def create(self, request: Any, context: Any) -> Any:
        """Declare it, and store it when the content came along."""
        given = request.attachment
        name = f"{request.parent}/attachments/{request.attachment_id}"
        attachment = A(
            name=name,
            kind=given.kind,
            media_type=given.media_type,
            size=given.size or len(request.content),
            sha256=given.sha256 or (hashlib.sha256(request.content).hexdigest() if request.content else ""),
            subject_sha256=given.subject_sha256,
        )
        if request.content:
            _check_content(attachment, request.content)
        command = commands.CreateAttachment(attachment)
        made = await submit(self._runtime, organization_of(name), command, request, context)
        return await self._store(name, request.content, context) if request.content else made

    async def part(self, request: Any, context: Any) -> Any:
        """Store a part under its own digest, then say so in the log."""
        attachment, part = self._attachment(request.name), request.part
        if attachment.state != A.STATE_UPLOADABLE:
            raise wrong_attachment_state(attachment)
        if part.index > MAX_PARTS:
            raise invalid("part.index", f"must be at most {MAX_PARTS}")
        if (part.size, part.sha256) != (len(request.content), hashlib.sha256(request.content).hexdigest()):
            raise invalid("part", "does not declare size and digest of the content that came with it")
        upload = upload_of(self._state(request.name), request.name)
        with store_answers():
            await self._blobs.put_if_absent(part_key(upload.upload_id, part), request.content)
        command = commands.AttachmentPart(request.name, part)
        return await submit(self._runtime, organization_of(request.name), command, request, context)

    async def complete(self, request: Any, context: Any) -> Any:
        """Put the parts together; they are few and small, so in memory."""
        attachment = self._attachment(request.name)
        if attachment.state == A.STATE_STORED:
            return attachment
        missing = next((n for n, part in enumerate(attachment.parts, start=1) if part.index != n), 0)
        if missing or sum(part.size for part in attachment.parts) != attachment.size:
            raise FailedPreconditionError(
                "PARTS_MISSING",
                f"the parts of {attachment.name} are not 1, 2, 3 … of {attachment.size} bytes in all",
                resource=attachment.name,
                size=attachment.size,
            )
        upload_id, content = upload_of(self._state(request.name), request.name).upload_id, bytearray()
        with store_answers():
            for part in attachment.parts:
                async for chunk in self._blobs.stream(part_key(upload_id, part)):
                    content += chunk
        _check_content(attachment, bytes(content))
        return await self._store(request.name, bytes(content), context)

    async def _store(self, name: str, content: bytes, context: Any) -> Any:
        """Idempotent by name: the attachment holds the key, and only this content fits it."""
        key = upload_of(self._state(name), name).blob_key
        if not key:
            raise not_found(name)
        with store_answers():
            await self._blobs.put_if_absent(key, content)
        request = pb.GetAttachmentRequest(name=name)
        return await submit(self._runtime, organization_of(name), commands.AttachmentStored(name), request, context)

    async def content(self, request: Any) -> pb.ContentLink:
        """A link for the reader."""
        attachment = self._attachment(request.name)
        if attachment.state != A.STATE_STORED:
            raise wrong_attachment_state(attachment)
        with store_answers():
            url = await self._blobs.presign_get(
                upload_of(self._state(request.name), request.name).blob_key, LINK_LIFE_S
            )
        return pb.ContentLink(
            url=url, expire_time=in_seconds(LINK_LIFE_S), sha256=attachment.sha256, size=attachment.size
        )


def _check_content(attachment: pb.Attachment, content: bytes) -> None:
    """Refuse content that is not what was declared."""
    digest = hashlib.sha256(content).hexdigest()
    if (len(content), digest) != (attachment.size, attachment.sha256):
        raise FailedPreconditionError(
            "DIGEST_MISMATCH",
            f"the content has {len(content)} bytes and digest {digest}, which is not what was declared",
            resource=attachment.name,
            size=len(content),
            sha256=digest,
        )
    problem = check_document(attachment.kind, content)
    if problem:
        kind = A.Kind.Name(attachment.kind).removeprefix("KIND_")
        raise FailedPreconditionError(
            "ATTACHMENT_INVALID", f"this is no {kind}: it {problem}", resource=attachment.name, kind=kind
        )
