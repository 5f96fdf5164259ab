"""Documents about artifact versions: SBOMs, provenance, anything else. Pure.

UPLOADABLE → STORED. An attachment holds its content key from its creation, so that whoever stores the content may do so
again after any failure. Content never changes: another document is another attachment.
"""

from __future__ import annotations

import re
from typing import Final

from google.protobuf.empty_pb2 import Empty
from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.artifacts.v1 import events_pb2 as ev

from libs.errors import FailedPreconditionError, check_etag
from libs.eventlog import Context, Decision, NewEvent
from libs.names import parent_of
from libs.trust.canonical import parse_strict
from services.artifacts.commands import AttachmentPart, AttachmentStored, CreateAttachment, DeleteAttachment
from services.artifacts.contents import drop_task, reserved
from services.artifacts.rules import copied, existing, invalid, next_etag, refuse_existing, timestamp
from services.artifacts.state import State, Upload, upload_of

MAX_PART: Final = 1024 * 1024
MAX_PARTS: Final = 32
MAX_SIZE: Final = MAX_PART * MAX_PARTS
A = pb.Attachment
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_MEDIA_TYPE: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9!#$&^_.+-]{0,63}/[a-zA-Z0-9][a-zA-Z0-9!#$&^_.+-]{0,127}")


def create_attachment(state: State, command: CreateAttachment, ctx: Context) -> Decision:
    """Declare a document; its content follows."""
    attachment = copied(command.attachment)
    existing(state.versions, parent_of(attachment.name))
    refuse_existing(state.attachments, attachment.name)
    _check(attachment)
    attachment.state = A.STATE_UPLOADABLE
    attachment.create_time.CopyFrom(timestamp(ctx.now_ms))
    upload = Upload("", ctx.new_uuid("upload"), reserved(state, ctx.organization, attachment.sha256))
    return _save(attachment, upload, ctx)


def attachment_part(state: State, command: AttachmentPart, ctx: Context) -> Decision:
    """A part is stored; the same index overwrites."""
    known = existing(state.attachments, command.name)
    if known.state != A.STATE_UPLOADABLE:
        raise wrong_attachment_state(known)
    if command.part in known.parts:
        return Decision(result=known)
    attachment = copied(known)
    parts = {part.index: part for part in known.parts} | {command.part.index: command.part}
    del attachment.parts[:]
    attachment.parts.extend(parts[index] for index in sorted(parts))
    return _save(attachment, upload_of(state, known.name), ctx)


def attachment_stored(state: State, command: AttachmentStored, ctx: Context) -> Decision:
    """The whole content is there; its parts are of no more use."""
    known = existing(state.attachments, command.name)
    if known.state == A.STATE_STORED:
        return Decision(result=known)
    attachment = copied(known)
    attachment.state = A.STATE_STORED
    del attachment.parts[:]
    upload = upload_of(state, known.name)
    return _cleared(_save(attachment, upload, ctx), known, upload, ctx)


def delete_attachment(state: State, command: DeleteAttachment, ctx: Context) -> Decision:
    """Delete it; the content goes when nothing else holds it."""
    known = existing(state.attachments, command.name)
    check_etag(command.etag, known.etag, known.name)
    payload = ev.AttachmentSaved(attachment=known, deleted=True)
    decision = Decision((NewEvent(ctx.organization, known.name, payload),), Empty())
    return _cleared(decision, known, upload_of(state, known.name), ctx)


def part_key(upload_id: str, part: pb.UploadPart) -> str:
    """Where a part is staged: by its content, so that parts of one index do not meet."""
    return f"staging/{upload_id}/{part.index}-{part.sha256}"


def check_document(kind: pb.Attachment.Kind.ValueType, content: bytes) -> str:
    """What keeps the content from being a document of its kind; empty when nothing does."""
    if kind == A.KIND_OTHER:
        return ""
    try:
        document = parse_strict(content)
    except ValueError as error:
        return f"is no JSON: {error}"
    if not isinstance(document, dict):
        return "is no JSON object"
    if kind == A.KIND_SBOM_CYCLONEDX:
        fits = document.get("bomFormat") == "CycloneDX" and isinstance(document.get("specVersion"), str)
        return "" if fits else "has no bomFormat CycloneDX with a specVersion"
    if kind == A.KIND_SBOM_SPDX:
        # SPDX 2 says its version itself; SPDX 3 is JSON-LD.
        context = str(document.get("@context", ""))
        fits = str(document.get("spdxVersion", "")).startswith("SPDX-") or "spdx.org" in context
        return "" if fits else "has no spdxVersion"
    fits = str(document.get("_type", "")).startswith("https://in-toto.io/Statement/") or (
        document.get("payloadType") == "application/vnd.in-toto+json" and isinstance(document.get("payload"), str)
    )
    return "" if fits else "is neither an in-toto statement nor an envelope of one"


def wrong_attachment_state(attachment: pb.Attachment) -> FailedPreconditionError:
    """Content is there, or is not there yet."""
    now = A.State.Name(attachment.state).removeprefix("STATE_")
    needed = "STORED" if attachment.state == A.STATE_UPLOADABLE else "UPLOADABLE"
    message = f"{attachment.name} is {now}; this needs {needed}"
    return FailedPreconditionError("WRONG_STATE", message, resource=attachment.name, state=now, needed=needed)


def _check(attachment: pb.Attachment) -> None:
    if attachment.kind == A.KIND_UNSPECIFIED or attachment.kind not in A.Kind.values():
        raise invalid("attachment.kind", "must be SBOM_CYCLONEDX, SBOM_SPDX, PROVENANCE or OTHER")
    if not _MEDIA_TYPE.fullmatch(attachment.media_type):
        raise invalid("attachment.media_type", "must be a media type such as application/json")
    if not 0 < attachment.size <= MAX_SIZE:
        raise invalid("attachment.size", f"must be 1 to {MAX_SIZE} bytes")
    if not _DIGEST.fullmatch(attachment.sha256):
        raise invalid("attachment.sha256", "must be 64 lowercase hexadecimal digits")
    if attachment.subject_sha256 and not _DIGEST.fullmatch(attachment.subject_sha256):
        raise invalid("attachment.subject_sha256", "must be 64 lowercase hexadecimal digits, or empty")


def _save(attachment: pb.Attachment, upload: Upload, ctx: Context) -> Decision:
    attachment.etag = next_etag(ctx, attachment.name)
    payload = ev.AttachmentSaved(attachment=attachment, upload_id=upload.upload_id, blob_key=upload.blob_key)
    return Decision((NewEvent(ctx.organization, attachment.name, payload),), attachment)


def _cleared(decision: Decision, known: pb.Attachment, upload: Upload, ctx: Context) -> Decision:
    """The decision, with a task that deletes the staged parts."""
    if not known.parts:
        return decision
    keys = tuple(part_key(upload.upload_id, part) for part in known.parts)
    return decision.replace(open_tasks=(drop_task(keys, ctx.organization),))
