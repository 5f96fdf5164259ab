"""Documents about artifact versions: small ones in one call, larger ones in parts, resumably."""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import urllib3
from groundswell.artifacts.v1 import artifacts_pb2 as pb

from clients.sdk.client import Client
from clients.sdk.errors import ApiError
from clients.sdk.upload import UploadError

PART_SIZE: Final = 1024 * 1024
MEDIA_TYPES: Final = {
    pb.Attachment.KIND_SBOM_CYCLONEDX: "application/vnd.cyclonedx+json",
    pb.Attachment.KIND_SBOM_SPDX: "application/spdx+json",
    pb.Attachment.KIND_PROVENANCE: "application/vnd.in-toto+json",
}


@dataclass(frozen=True, slots=True)
class Document:
    """What to attach, and to what."""

    path: Path
    version: str
    """Resource name `…/versions/{version}`."""
    attachment_id: str
    kind: pb.Attachment.Kind.ValueType
    media_type: str = ""
    subject_sha256: str = ""


def add_attachment(client: Client, document: Document) -> pb.Attachment:
    """Attach a file. Safe to repeat after any interruption. Raises UploadError, ApiError, OSError."""
    content = document.path.read_bytes()
    guessed = mimetypes.guess_type(document.path.name)[0] or "application/octet-stream"
    wanted = pb.Attachment(
        kind=document.kind,
        media_type=document.media_type or MEDIA_TYPES.get(document.kind, guessed),
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        subject_sha256=document.subject_sha256,
    )
    request = pb.CreateAttachmentRequest(
        parent=document.version,
        attachment_id=document.attachment_id,
        attachment=wanted,
        content=content if len(content) <= PART_SIZE else b"",
    )
    try:
        made = client.artifacts.CreateAttachment(request)
    except ApiError as error:
        if error.code != "ALREADY_EXISTS":
            raise
        name = f"{document.version}/attachments/{document.attachment_id}"
        made = client.artifacts.GetAttachment(pb.GetAttachmentRequest(name=name))
        if (made.sha256, made.kind) != (wanted.sha256, wanted.kind):
            raise UploadError(f"{name} exists and is another document: use another id") from None
    return made if made.state == pb.Attachment.STATE_STORED else _in_parts(client, made, content)


def _in_parts(client: Client, made: pb.Attachment, content: bytes) -> pb.Attachment:
    stored = {part.index: part.sha256 for part in made.parts}
    for index, start in enumerate(range(0, len(content), PART_SIZE), start=1):
        chunk = content[start : start + PART_SIZE]
        digest = hashlib.sha256(chunk).hexdigest()
        if stored.get(index) != digest:
            part = pb.UploadPart(index=index, size=len(chunk), sha256=digest)
            client.artifacts.UploadAttachmentPart(
                pb.UploadAttachmentPartRequest(name=made.name, part=part, content=chunk)
            )
    return client.artifacts.CompleteAttachment(pb.CompleteAttachmentRequest(name=made.name))


def fetch_attachment(client: Client, name: str, path: Path) -> None:
    """Write the content to a file after comparing it. Raises UploadError, ApiError, OSError."""
    link = client.artifacts.GetAttachmentContent(pb.GetAttachmentContentRequest(name=name))
    with urllib3.PoolManager(retries=urllib3.Retry(3, backoff_factor=0.2)) as pool:
        response = pool.request("GET", link.url)
    if response.status != 200 or hashlib.sha256(response.data).hexdigest() != link.sha256:
        raise UploadError(f"what the object store gave for {name} is not its content: {response.status}")
    path.write_bytes(response.data)
