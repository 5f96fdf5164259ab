"""The artifacts service's rules, pure: signing keys, artifacts and versions here, the rest in modules of their own.

`binaries` has the life of a binary, `bundles` what signatures are worth, `contents` when bytes in the store go,
`attachments` and `dependencies` what versions have besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from groundswell.artifacts.v1 import events_pb2 as ev
from msgspec.structs import replace

from libs.errors import AlreadyExistsError, check_etag
from libs.eventlog import Context, Decision, Event, Foreign, NewEvent, TimerFired
from libs.names import last_segment, parent_of, product_of
from libs.rpc.directory import REGISTRY_RECORDS
from libs.trust.signatures import is_usable_key, key_id
from services.artifacts import attachments, binaries, bundles, contents
from services.artifacts.commands import (
    AttachmentPart,
    AttachmentStored,
    CreateArtifact,
    CreateAttachment,
    CreateBinary,
    CreateBundle,
    CreateSigningKey,
    CreateVersion,
    DeleteArtifact,
    DeleteAttachment,
    DeleteBinary,
    DeleteVersion,
    DestroyBinary,
    ForgetUpload,
    HashBinary,
    HashFinished,
    JudgeProduct,
    OpenUpload,
    ResetBinary,
    RevokeSigningKey,
    SignBinary,
    SignBundle,
    UpdateArtifact,
    UpdateBinary,
    UpdateBundle,
    UpdateVersion,
    UploadCompleted,
)
from services.artifacts.dependencies import check_declared
from services.artifacts.rules import (
    check_text,
    clean_metadata,
    copied,
    existing,
    in_use,
    invalid,
    key_saved,
    masked,
    next_etag,
    refuse_existing,
    timestamp,
)
from services.artifacts.state import State, evolve, keys_of, put, shelf

DAY_MS: Final = 86_400_000
"""How long content stays after nothing refers to it: longer than any copy or download under way."""


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
    """Revoke for good; bundles that needed it stop being offerable at once."""
    known = existing(state.signing_keys, command.name)
    if known.revoked:
        return Decision(result=known)
    check_etag(command.etag, known.etag, known.name)
    key = copied(known)
    key.revoked = True
    saved = key_saved(key, "signing_key.revoked", ctx, command.reason)
    after = replace(state, signing_keys=put(state.signing_keys, key.name, key))
    judged, tasks = bundles.judge_again(after, product_of(key.name), ctx)
    return Decision((saved, *judged), key, open_tasks=tasks)


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
    check_declared(state, version)
    version.create_time.CopyFrom(timestamp(ctx.now_ms))
    version.etag = next_etag(ctx, version.name)
    payload = ev.ArtifactVersionSaved(artifact_version=version)
    return Decision((NewEvent(ctx.organization, version.name, payload),), version)


def update_artifact(state: State, command: UpdateArtifact, ctx: Context) -> Decision:
    """New display name and custom metadata."""
    known = existing(state.artifacts, command.artifact.name)
    check_etag(command.artifact.etag, known.etag, known.name)
    artifact = masked(known, command.artifact, command.paths, ("display_name", "custom_metadata"))
    check_text("artifact.display_name", artifact.display_name)
    artifact.custom_metadata = clean_metadata("artifact.custom_metadata", artifact.custom_metadata)
    if artifact == known:
        return Decision(result=known)
    artifact.etag = next_etag(ctx, artifact.name)
    return Decision((NewEvent(ctx.organization, artifact.name, ev.ArtifactSaved(artifact=artifact)),), artifact)


def delete_artifact(state: State, command: DeleteArtifact, ctx: Context) -> Decision:
    """Only what has no versions."""
    known = existing(state.artifacts, command.name)
    check_etag(command.etag, known.etag, known.name)
    for name in shelf(state.versions, f"{known.name}/versions"):
        raise in_use(known.name, name, "has versions")
    payload = ev.ArtifactSaved(artifact=known, deleted=True)
    return Decision((NewEvent(ctx.organization, known.name, payload),), Empty())


def update_version(state: State, command: UpdateVersion, ctx: Context) -> Decision:
    """New custom metadata and dependencies; its version text is part of what was built on it."""
    known = existing(state.versions, command.version.name)
    check_etag(command.version.etag, known.etag, known.name)
    version = masked(known, command.version, command.paths, ("custom_metadata", "dependencies"))
    version.custom_metadata = clean_metadata("artifact_version.custom_metadata", version.custom_metadata)
    if version == known:
        return Decision(result=known)
    check_declared(state, version)
    version.etag = next_etag(ctx, version.name)
    payload = ev.ArtifactVersionSaved(artifact_version=version)
    return Decision((NewEvent(ctx.organization, version.name, payload),), version)


def delete_version(state: State, command: DeleteVersion, ctx: Context) -> Decision:
    """Only what has no binaries, destroyed ones included, and no attachments."""
    known = existing(state.versions, command.name)
    check_etag(command.etag, known.etag, known.name)
    for name in (
        *shelf(state.binaries, f"{known.name}/binaries"),
        *shelf(state.attachments, f"{known.name}/attachments"),
    ):
        raise in_use(known.name, name, "has binaries or attachments")
    payload = ev.ArtifactVersionSaved(artifact_version=known, deleted=True)
    return Decision((NewEvent(ctx.organization, known.name, payload),), Empty())


_DECIDERS: Final[Mapping[type, Callable[[State, Any, Context], Decision]]] = {
    CreateSigningKey: create_key,
    RevokeSigningKey: revoke_key,
    CreateArtifact: create_artifact,
    CreateVersion: create_version,
    CreateBinary: binaries.create_binary,
    OpenUpload: binaries.open_upload,
    ForgetUpload: binaries.forget_upload,
    UploadCompleted: binaries.upload_completed,
    HashBinary: binaries.hash_binary,
    HashFinished: binaries.hash_finished,
    SignBinary: binaries.sign_binary,
    CreateBundle: bundles.create_bundle,
    SignBundle: bundles.sign_bundle,
    UpdateArtifact: update_artifact,
    DeleteArtifact: delete_artifact,
    UpdateVersion: update_version,
    DeleteVersion: delete_version,
    UpdateBinary: binaries.update_binary,
    DeleteBinary: binaries.delete_binary,
    ResetBinary: binaries.reset_binary,
    DestroyBinary: binaries.destroy_binary,
    CreateAttachment: attachments.create_attachment,
    AttachmentPart: attachments.attachment_part,
    AttachmentStored: attachments.attachment_stored,
    DeleteAttachment: attachments.delete_attachment,
    UpdateBundle: bundles.update_bundle,
    JudgeProduct: bundles.judge_product,
    TimerFired: contents.collect,
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
        ev.AttachmentSaved,
        ev.ContentCondemned,
    )
    sources: Mapping[str, Sequence[type[Message]]] = {"registry": REGISTRY_RECORDS}

    def __init__(self, grace_ms: int = DAY_MS) -> None:
        self._grace_ms = grace_ms

    def initial_state(self, partition: int) -> State:  # noqa: ARG002 - every partition begins empty
        return State()

    def decide(self, state: State, command: object, ctx: Context) -> Decision:
        decision = _DECIDERS[type(command)](state, command, ctx)
        return contents.with_timers(state, decision, ctx, self._grace_ms)

    def evolve(self, state: State, event: Event) -> State:
        return evolve(state, event)
