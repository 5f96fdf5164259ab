"""What the artifacts service knows of one partition: the fold of its events.

Resources lie on shelves: collection name → resource name → after-image, so that a list, a look-up of a key and a
bundle's judgement cost what the product holds and not what the partition holds. Messages in state are never mutated.
"""

from __future__ import annotations

from typing import TypeVar

import immutables
import msgspec
from google.protobuf.message import Message
from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.artifacts.v1 import events_pb2 as ev
from msgspec.structs import replace

from libs.eventlog import Event
from libs.names import product_of

M = TypeVar("M", bound=Message)
Shelves = immutables.Map[str, immutables.Map[str, M]]


class Upload(msgspec.Struct, frozen=True, gc=False):
    """Where the bytes of a binary or an attachment are."""

    staging_key: str = ""
    upload_id: str = ""
    blob_key: str = ""
    """Content key that it holds: from before anything is written there until it is given up."""


class State(msgspec.Struct, frozen=True, gc=False):
    """See the module."""

    signing_keys: Shelves[pb.SigningKey] = msgspec.field(default_factory=immutables.Map)
    artifacts: Shelves[pb.Artifact] = msgspec.field(default_factory=immutables.Map)
    versions: Shelves[pb.ArtifactVersion] = msgspec.field(default_factory=immutables.Map)
    binaries: Shelves[pb.Binary] = msgspec.field(default_factory=immutables.Map)
    attachments: Shelves[pb.Attachment] = msgspec.field(default_factory=immutables.Map)
    bundles: Shelves[pb.Bundle] = msgspec.field(default_factory=immutables.Map)
    uploads: immutables.Map[str, Upload] = msgspec.field(default_factory=immutables.Map)
    """By binary or attachment."""
    bundles_of: immutables.Map[str, immutables.Map[str, None]] = msgspec.field(default_factory=immutables.Map)
    """Binary → the bundles that hold it."""
    waiting: immutables.Map[str, immutables.Map[str, None]] = msgspec.field(default_factory=immutables.Map)
    """Product → SIGNABLE binaries that have some of the signatures they need."""
    holders: immutables.Map[str, immutables.Map[str, None]] = msgspec.field(default_factory=immutables.Map)
    """Content key → the binaries and attachments that hold it."""
    generations: immutables.Map[str, int] = msgspec.field(default_factory=immutables.Map)
    """``organization/digest`` → generation of its next content key, once content of it was given up."""
    bundle_blobs: immutables.Map[str, tuple[str, ...]] = msgspec.field(default_factory=immutables.Map)
    """Content keys by bundle, in the order of its entries."""
    required_signatures: immutables.Map[str, int] = msgspec.field(default_factory=immutables.Map)
    """Product → signatures its bundles need; 1 when absent."""
    required_binary_signatures: immutables.Map[str, int] = msgspec.field(default_factory=immutables.Map)
    """Product → signatures each binary needs; 1 when absent."""


def shelf(shelves: Shelves[M], collection: str) -> immutables.Map[str, M]:
    """All resources of a collection."""
    return shelves.get(collection) or immutables.Map()


def find(shelves: Shelves[M], name: str) -> M | None:
    """A resource by its name."""
    return shelf(shelves, name.rpartition("/")[0]).get(name)


def put(shelves: Shelves[M], name: str, message: M) -> Shelves[M]:
    """The shelves with a resource's new after-image."""
    collection = name.rpartition("/")[0]
    return shelves.set(collection, shelf(shelves, collection).set(name, message))


def drop(shelves: Shelves[M], name: str) -> Shelves[M]:
    """The shelves without a resource."""
    collection = name.rpartition("/")[0]
    known = shelf(shelves, collection)
    if name not in known:
        return shelves
    rest = known.delete(name)
    return shelves.set(collection, rest) if rest else shelves.delete(collection)


def keys_of(state: State, product: str) -> dict[str, pb.SigningKey]:
    """Signing keys of a product by key id."""
    return {key.key_id: key for key in shelf(state.signing_keys, f"{product}/signingKeys").values()}


def upload_of(state: State, name: str) -> Upload:
    """Where the bytes of a binary or an attachment are, so far as any are."""
    return state.uploads.get(name) or Upload()


def evolve(state: State, event: Event) -> State:
    """The state after an event."""
    name = event.resource
    match event.payload:
        case ev.BinarySaved(binary=binary, staging_key=staging_key, upload_id=upload_id, blob_key=blob_key):
            moved = _upload_moved(state, name, Upload(staging_key, upload_id, blob_key), deleted=event.payload.deleted)
            waits = binary.state == pb.Binary.STATE_SIGNABLE and binary.signatures and not event.payload.deleted
            mark = _marked if waits else _unmarked
            return replace(
                moved,
                binaries=drop(state.binaries, name) if event.payload.deleted else put(state.binaries, name, binary),
                waiting=mark(state.waiting, product_of(name), name),
            )
        case ev.AttachmentSaved(attachment=attachment, upload_id=upload_id, blob_key=blob_key):
            moved = _upload_moved(state, name, Upload("", upload_id, blob_key), deleted=event.payload.deleted)
            if event.payload.deleted:
                return replace(moved, attachments=drop(state.attachments, name))
            return replace(moved, attachments=put(state.attachments, name, attachment))
        case ev.BundleSaved(bundle=bundle, blob_keys=blob_keys):
            bundles_of = state.bundles_of
            if name not in state.bundle_blobs:
                for entry in bundle.entries:
                    bundles_of = _marked(bundles_of, entry.binary, name)
            return replace(
                state,
                bundles_of=bundles_of,
                bundles=put(state.bundles, name, bundle),
                bundle_blobs=state.bundle_blobs.set(name, tuple(blob_keys)),
            )
        case ev.SigningKeySaved(signing_key=key):
            return replace(state, signing_keys=put(state.signing_keys, name, key))
        case ev.ArtifactSaved(artifact=artifact, deleted=deleted):
            left = drop(state.artifacts, name) if deleted else put(state.artifacts, name, artifact)
            return replace(state, artifacts=left)
        case ev.ArtifactVersionSaved(artifact_version=version, deleted=deleted):
            return replace(
                state, versions=drop(state.versions, name) if deleted else put(state.versions, name, version)
            )
        case ev.SignaturePolicySaved(product=product, required_signatures=required, required_binary_signatures=binary):
            return replace(
                state,
                required_signatures=state.required_signatures.set(product, required),
                required_binary_signatures=state.required_binary_signatures.set(product, max(1, binary)),
            )
        case ev.ContentCondemned(sha256=sha256, generation=generation):
            return replace(state, generations=state.generations.set(f"{event.organization}/{sha256}", generation + 1))
    return state


def _upload_moved(state: State, name: str, upload: Upload, *, deleted: bool) -> State:
    """The state with where a resource's bytes are now, and with that who holds which content."""
    before = upload_of(state, name).blob_key
    after = "" if deleted else upload.blob_key
    holders = state.holders
    if before != after:
        holders = _unmarked(holders, before, name)
        holders = _marked(holders, after, name) if after else holders
    if deleted:
        uploads = state.uploads.delete(name) if name in state.uploads else state.uploads
    else:
        uploads = state.uploads.set(name, upload)
    return replace(state, uploads=uploads, holders=holders)


Marks = immutables.Map[str, immutables.Map[str, None]]


def _marked(marks: Marks, key: str, name: str) -> Marks:
    return marks.set(key, (marks.get(key) or immutables.Map()).set(name, None))


def _unmarked(marks: Marks, key: str, name: str) -> Marks:
    known = marks.get(key)
    if known is None or name not in known:
        return marks
    rest = known.delete(name)
    return marks.set(key, rest) if rest else marks.delete(key)
