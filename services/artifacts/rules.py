"""Rules of single fields and names, and the after-images that decisions are made of. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.artifacts.v1 import events_pb2 as ev

from libs.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from libs.eventlog import Context, NewEvent, Public
from libs.names import product_of
from libs.trust.canonical import canonical_object
from libs.trust.signatures import verify
from services.artifacts.state import Shelves, State, Upload, find, keys_of

M = TypeVar("M", bound=Message)

MAX_RECORD: Final = 900_000
"""Bytes of one record that the log takes (`RuntimeConfig.max_record_bytes`)."""
MAX_METADATA: Final = 430_000
"""Less than the 1,000,000 bytes that a request may hold: a resource has to fit into a record together with the answer
to the command that saved it."""
MAX_SIGNATURES: Final = 32
MAX_SIZE: Final = 5 * 1024**4
"""The largest object of S3."""
TEXT_LIMIT: Final = 128
_TARGET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_SIGNATURE: Final = re.compile(r"[0-9a-fA-F]{128}")


def invalid(field: str, why: str) -> InvalidArgumentError:
    """A wrong field."""
    return InvalidArgumentError("INVALID_FIELD", f"{field} {why}", field=field)


def check_text(field: str, text: str) -> None:
    """Refuse text that is too long or holds control characters."""
    if len(text) > TEXT_LIMIT or any(ord(character) < 32 for character in text):
        raise invalid(field, f"must have at most {TEXT_LIMIT} characters, and no control characters")


def check_content(binary: pb.Binary) -> None:
    """Refuse what cannot be a binary's declaration."""
    if not _DIGEST.fullmatch(binary.sha256):
        raise invalid("binary.sha256", "must be 64 lowercase hexadecimal digits")
    if not 0 < binary.size <= MAX_SIZE:
        raise invalid("binary.size", f"must be 1 to {MAX_SIZE} bytes")
    if not _TARGET.fullmatch(binary.target):
        raise invalid("binary.target", "must be letters, digits, '.', '_' or '-', at most 64")


def clean_metadata(field: str, text: str) -> str:
    """Canonical form of custom metadata; empty stays empty, so that a less specific one can apply."""
    if not text.strip():
        return ""
    try:
        canonical = canonical_object(text)
    except ValueError as error:
        raise invalid(field, f"is no JSON object: {error}") from None
    if len(canonical) > MAX_METADATA:
        raise invalid(field, f"has more than {MAX_METADATA} bytes in canonical form")
    return canonical


def verified(state: State, signature: pb.Signature, resource: str, message: bytes) -> pb.Signature:
    """The signature in its stored form. Unknown, revoked and wrong ones each have their reason."""
    product = product_of(resource)
    key = keys_of(state, product).get(signature.key_id)
    if key is None:
        shown = signature.key_id[:64]
        raise FailedPreconditionError("SIGNING_KEY_UNKNOWN", f"{product} has no signing key {shown}", key_id=shown)
    if key.revoked:
        raise FailedPreconditionError("SIGNING_KEY_REVOKED", f"{key.name} was revoked", resource=key.name)
    text = signature.signature
    if not _SIGNATURE.fullmatch(text) or not verify(key.public_key, bytes.fromhex(text), message):
        raise InvalidArgumentError(
            "SIGNATURE_INVALID",
            f"this is no signature of {key.name} over {resource}",
            field="signature.signature",
            key=key.name,
            resource=resource,
        )
    return pb.Signature(key_id=key.key_id, signature=text.lower())


def is_repeated(signature: pb.Signature, held: list[pb.Signature]) -> bool:
    """Whether exactly this one is attached already, which stays true when its key is revoked later."""
    sent = (signature.key_id, signature.signature.lower())
    return any((one.key_id, one.signature) == sent for one in held)


def check_room(resource: str, held: list[pb.Signature]) -> None:
    """Refuse one more signature when there are as many as a record is sure to hold."""
    if len(held) >= MAX_SIGNATURES:
        raise FailedPreconditionError(
            "TOO_MANY_SIGNATURES",
            f"{resource} has {MAX_SIGNATURES} signatures, the most it can have",
            resource=resource,
            limit=MAX_SIGNATURES,
        )


def masked(known: M, wanted: M, paths: Sequence[str], allowed: Sequence[str]) -> M:
    """A copy of the known resource with the named fields taken from the wanted one; ``*`` names all that may change."""
    wrong = [path for path in paths if path != "*" and path not in allowed]
    if wrong or not paths:
        raise invalid("update_mask", f"may name {', '.join(allowed)}; not {(wrong or ['nothing'])[0][:80]}")
    changed = copied(known)
    for path in allowed if "*" in paths else paths:
        changed.ClearField(path)
        if changed.DESCRIPTOR.fields_by_name[path].is_repeated:
            getattr(changed, path).extend(getattr(wanted, path))
        else:
            setattr(changed, path, getattr(wanted, path))
    return changed


def in_use(resource: str, by: str, why: str) -> FailedPreconditionError:
    """Something else still needs the resource."""
    return FailedPreconditionError("RESOURCE_IN_USE", f"{resource} {why}: {by}", resource=resource, used_by=by)


def wrong_state(binary: pb.Binary, wanted: str) -> FailedPreconditionError:
    """The binary is in a state that does not allow this."""
    now = state_name(binary)
    return FailedPreconditionError(
        "WRONG_STATE", f"{binary.name} is {now}; this needs {wanted}", resource=binary.name, state=now, needed=wanted
    )


def state_name(binary: pb.Binary) -> str:
    """The state as people write it: UPLOADABLE, HASHABLE and so on."""
    return pb.Binary.State.Name(binary.state).removeprefix("STATE_")


def existing(shelves: Shelves[M], name: str) -> M:
    """The resource, or NOT_FOUND."""
    known = find(shelves, name)
    if known is None:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)
    return known


def refuse_existing(shelves: Shelves[M], name: str) -> None:
    """A name is given once."""
    if find(shelves, name) is not None:
        raise AlreadyExistsError("ALREADY_EXISTS", f"{name} exists already", resource=name)


def copied(message: M) -> M:
    """One's own copy: messages of state and of commands are never changed."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def timestamp(now_ms: int) -> Timestamp:
    """Milliseconds as a message."""
    stamp = Timestamp()
    stamp.FromMilliseconds(now_ms)
    return stamp


def next_etag(ctx: Context, name: str) -> str:
    """The etag after this decision's one event of the resource."""
    return str(ctx.version(name) + 1)


def binary_saved(binary: pb.Binary, upload: Upload, ctx: Context) -> NewEvent:
    """The event of a binary's new after-image, which gets its etag."""
    binary.etag = next_etag(ctx, binary.name)
    payload = ev.BinarySaved(
        binary=binary, staging_key=upload.staging_key, upload_id=upload.upload_id, blob_key=upload.blob_key
    )
    return NewEvent(ctx.organization, binary.name, payload)


def key_saved(key: pb.SigningKey, change: str, ctx: Context, reason: str = "") -> NewEvent:
    """The event of a signing key's new after-image, which gets its etag."""
    key.etag = next_etag(ctx, key.name)
    public = Public(key.name, ev.SigningKeyChanged(signing_key=key, change=change))
    payload = ev.SigningKeySaved(signing_key=key, reason=reason)
    return NewEvent(ctx.organization, key.name, payload, public=(public,))
