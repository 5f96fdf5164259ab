"""The artifacts service's rules, pure: signing keys, artifacts, versions, and the life of a binary.

UPLOADABLE → HASHABLE → HASHING → SIGNABLE → SIGNED. Only the server's own hash of the bytes in the store leads to
SIGNABLE; a difference leads back to UPLOADABLE with the reason, and the upload is forgotten. A staged object is deleted
by a task after what was learnt of it is in the log, never before: a hashing that runs again finds the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from google.protobuf.message import Message
from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.artifacts.v1 import events_pb2 as ev

from libs.errors import AlreadyExistsError, FailedPreconditionError, check_etag
from libs.eventlog import Context, Decision, Event, Foreign, NewEvent, Task
from libs.names import last_segment, parent_of, product_of
from libs.rpc.directory import REGISTRY_RECORDS
from libs.trust.signatures import is_usable_key, key_id
from services.artifacts import bundles
from services.artifacts.commands import (
    CreateArtifact,
    CreateBinary,
    CreateBundle,
    CreateSigningKey,
    CreateVersion,
    ForgetUpload,
    HashBinary,
    HashFinished,
    OpenUpload,
    RevokeSigningKey,
    SignBinary,
    SignBundle,
    UploadCompleted,
)
from services.artifacts.rules import (
    binary_saved,
    check_content,
    check_room,
    check_text,
    clean_metadata,
    copied,
    existing,
    invalid,
    is_repeated,
    key_saved,
    next_etag,
    refuse_existing,
    timestamp,
    verified,
    wrong_state,
)
from services.artifacts.state import State, Upload, evolve, keys_of, put, shelf, upload_of

HASH: Final = "hash"
DROP: Final = "drop_staged"
B = pb.Binary


def create_key(state: State, command: CreateSigningKey, ctx: Context) -> Decision:
    """Register a public key; a product knows it once, under one name, for good."""
    key = copied(command.key)
    refuse_existing(state.signing_keys, key.name)
    if not is_usable_key(key.public_key):
        raise invalid("signing_key.public_key", "must be a raw Ed25519 public key of 32 bytes")
    key.key_id = key_id(key.public_key)
    known = keys_of(state, product_of(key.name)).get(key.key_id)
    if known is not None:
        raise AlreadyExistsError("ALREADY_EXISTS", f"this key is registered as {known.name}", resource=known.name)
    key.revoked = False
    key.create_time.CopyFrom(timestamp(ctx.now_ms))
    return Decision((key_saved(key, "signing_key.created", ctx),), key)


def revoke_key(state: State, command: RevokeSigningKey, ctx: Context) -> Decision:
    """Revoke for good; bundles that needed it stop being offerable in the same transaction."""
    known = existing(state.signing_keys, command.name)
    if known.revoked:
        return Decision(result=known)
    check_etag(command.etag, known.etag, known.name)
    key = copied(known)
    key.revoked = True
    saved = key_saved(key, "signing_key.revoked", ctx)
    after = replace(state, signing_keys=put(state.signing_keys, key.name, key))
    return Decision((saved, *bundles.judge_again(after, product_of(key.name), ctx)), key)


def create_artifact(state: State, command: CreateArtifact, ctx: Context) -> Decision:
    """A new artifact; its product is the servicer's to check."""
    artifact = copied(command.artifact)
    refuse_existing(state.artifacts, artifact.name)
    check_text("artifact.display_name", artifact.display_name)
    artifact.custom_metadata = clean_metadata("artifact.custom_metadata", artifact.custom_metadata)
    artifact.create_time.CopyFrom(timestamp(ctx.now_ms))
    artifact.etag = next_etag(ctx, artifact.name)
    return Decision((NewEvent(ctx.organization, artifact.name, ev.ArtifactSaved(artifact=artifact)),), artifact)


def create_version(state: State, command: CreateVersion, ctx: Context) -> Decision:
    """A new version of an artifact."""
    version = copied(command.version)
    existing(state.artifacts, parent_of(version.name))
    refuse_existing(state.versions, version.name)
    version.version = version.version or last_segment(version.name)
    check_text("artifact_version.version", version.version)
    version.custom_metadata = clean_metadata("artifact_version.custom_metadata", version.custom_metadata)
    version.create_time.CopyFrom(timestamp(ctx.now_ms))
    version.etag = next_etag(ctx, version.name)
    payload = ev.ArtifactVersionSaved(artifact_version=version)
    return Decision((NewEvent(ctx.organization, version.name, payload),), version)


def create_binary(state: State, command: CreateBinary, ctx: Context) -> Decision:
    """Declare a binary; a version has one live binary for a target."""
    binary = copied(command.binary)
    existing(state.versions, parent_of(binary.name))
    refuse_existing(state.binaries, binary.name)
    binary.target = binary.target or "portable"
    check_content(binary)
    for name, known in shelf(state.binaries, binary.name.rpartition("/")[0]).items():
        if known.target == binary.target and known.state != B.STATE_DESTROYED:
            raise FailedPreconditionError(
                "TARGET_TAKEN",
                f"{name} is this version's binary for the target {binary.target}",
                resource=name,
                target=binary.target,
            )
    binary.custom_metadata = clean_metadata("binary.custom_metadata", binary.custom_metadata)
    binary.state, binary.state_reason = B.STATE_UPLOADABLE, ""
    del binary.signatures[:]
    binary.create_time.CopyFrom(timestamp(ctx.now_ms))
    return _save(binary, Upload(), ctx)


def open_upload(state: State, command: OpenUpload, ctx: Context) -> Decision:
    """Record an upload; whoever finds another recorded was slower, and aborts its own."""
    binary = _in_state(state, command.name, B.STATE_UPLOADABLE)
    if upload_of(state, command.name).upload_id:
        return Decision(result=binary)
    return _save(copied(binary), Upload(command.staging_key, command.upload_id), ctx)


def forget_upload(state: State, command: ForgetUpload, ctx: Context) -> Decision:
    """Let a new upload be opened; a newer one is left alone."""
    binary = _in_state(state, command.name, B.STATE_UPLOADABLE)
    if upload_of(state, command.name).upload_id != command.upload_id:
        return Decision(result=binary)
    return _save(copied(binary), Upload(), ctx)


def upload_completed(state: State, command: UploadCompleted, ctx: Context) -> Decision:
    """The whole object is in the store."""
    known = existing(state.binaries, command.name)
    upload = upload_of(state, command.name)
    if known.state == B.STATE_HASHABLE and upload.upload_id == command.upload_id:
        return Decision(result=known)
    binary = copied(_in_state(state, command.name, B.STATE_UPLOADABLE))
    if not command.upload_id or upload.upload_id != command.upload_id:
        raise FailedPreconditionError(
            "PARTS_MISSING", f"another upload of {binary.name} has begun: upload its parts", resource=binary.name
        )
    binary.state, binary.state_reason = B.STATE_HASHABLE, ""
    return _save(binary, upload, ctx)


def hash_binary(state: State, command: HashBinary, ctx: Context) -> Decision:
    """Ask for the server's own hash; asking again while it runs changes nothing."""
    known = existing(state.binaries, command.name)
    if known.state == B.STATE_HASHING:
        return Decision(result=known)
    check_etag(command.etag, known.etag, known.name)
    binary = copied(_in_state(state, command.name, B.STATE_HASHABLE))
    binary.state = B.STATE_HASHING
    upload = upload_of(state, command.name)
    task = Task(f"{HASH}/{upload.staging_key}", HASH, binary.name.encode(), organization=ctx.organization)
    return replace(_save(binary, upload, ctx), open_tasks=(task,))


def hash_finished(state: State, command: HashFinished, ctx: Context) -> Decision:
    """What the server's own hash says; the staged object is of no more use either way."""
    known = existing(state.binaries, command.name)
    upload = upload_of(state, command.name)
    if known.state != B.STATE_HASHING or upload.staging_key != command.staging_key:
        return Decision(close_tasks=(command.task_id,))
    binary = copied(known)
    if (command.sha256, command.size) == (known.sha256, known.size):
        binary.state = B.STATE_SIGNABLE
        upload = Upload(blob_key=command.blob_key)
    else:
        binary.state = B.STATE_UPLOADABLE
        binary.state_reason = "SIZE_MISMATCH" if command.size != known.size else "DIGEST_MISMATCH"
        upload = Upload()
    drop = Task(f"{DROP}/{command.staging_key}", DROP, command.staging_key.encode(), organization=ctx.organization)
    return replace(_save(binary, upload, ctx), open_tasks=(drop,), close_tasks=(command.task_id,))


def sign_binary(state: State, command: SignBinary, ctx: Context) -> Decision:
    """Attach a signature over the ASCII lowercase hex of the digest."""
    known = existing(state.binaries, command.name)
    if known.state not in (B.STATE_SIGNABLE, B.STATE_SIGNED):
        raise wrong_state(known, "SIGNABLE or SIGNED")
    if is_repeated(command.signature, list(known.signatures)):
        return Decision(result=known)
    check_etag(command.etag, known.etag, known.name)
    signature = verified(state, command.signature, known.name, known.sha256.encode())
    if any(one.key_id == signature.key_id for one in known.signatures):
        return Decision(result=known)
    check_room(known.name, list(known.signatures))
    binary = copied(known)
    binary.signatures.append(signature)
    binary.state = B.STATE_SIGNED
    return _save(binary, upload_of(state, command.name), ctx)


def _save(binary: pb.Binary, upload: Upload, ctx: Context) -> Decision:
    return Decision((binary_saved(binary, upload, ctx),), binary)


def _in_state(state: State, name: str, wanted: pb.Binary.State.ValueType) -> pb.Binary:
    binary = existing(state.binaries, name)
    if binary.state != wanted:
        raise wrong_state(binary, B.State.Name(wanted).removeprefix("STATE_"))
    return binary


_DECIDERS: Final[Mapping[type, Callable[[State, Any, Context], Decision]]] = {
    CreateSigningKey: create_key,
    RevokeSigningKey: revoke_key,
    CreateArtifact: create_artifact,
    CreateVersion: create_version,
    CreateBinary: create_binary,
    OpenUpload: open_upload,
    ForgetUpload: forget_upload,
    UploadCompleted: upload_completed,
    HashBinary: hash_binary,
    HashFinished: hash_finished,
    SignBinary: sign_binary,
    CreateBundle: bundles.create_bundle,
    SignBundle: bundles.sign_bundle,
    Foreign: bundles.foreign,
}


class Artifacts:
    """A :class:`libs.eventlog.Domain`."""

    service = "artifacts"
    event_types: Sequence[type[Message]] = (
        ev.SigningKeySaved,
        ev.ArtifactSaved,
        ev.ArtifactVersionSaved,
        ev.BinarySaved,
        ev.BundleSaved,
        ev.SignaturePolicySaved,
    )
    sources: Mapping[str, Sequence[type[Message]]] = {"registry": REGISTRY_RECORDS}

    def initial_state(self, partition: int) -> State:  # noqa: ARG002 - every partition begins empty
        return State()

    def decide(self, state: State, command: object, ctx: Context) -> Decision:
        return _DECIDERS[type(command)](state, command, ctx)

    def evolve(self, state: State, event: Event) -> State:
        return evolve(state, event)
