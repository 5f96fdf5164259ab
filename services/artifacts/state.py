"""What the artifacts service knows of one partition: the fold of its events.

Resources lie on shelves: collection name → resource name → after-image, so that a list, a look-up of a key and a
bundle's judgement cost what the product holds and not what the partition holds. Messages in state are never mutated.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

import immutables
from google.protobuf.message import Message
from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.artifacts.v1 import events_pb2 as ev

from libs.eventlog import Event

M = TypeVar("M", bound=Message)
Shelves = immutables.Map[str, immutables.Map[str, M]]


@dataclass(frozen=True, slots=True)
class Upload:
    """Where a binary's bytes are."""

    staging_key: str = ""
    upload_id: str = ""
    blob_key: str = ""


@dataclass(frozen=True, slots=True)
class State:
    """See the module."""

    signing_keys: Shelves[pb.SigningKey] = field(default_factory=immutables.Map)
    artifacts: Shelves[pb.Artifact] = field(default_factory=immutables.Map)
    versions: Shelves[pb.ArtifactVersion] = field(default_factory=immutables.Map)
    binaries: Shelves[pb.Binary] = field(default_factory=immutables.Map)
    bundles: Shelves[pb.Bundle] = field(default_factory=immutables.Map)
    uploads: immutables.Map[str, Upload] = field(default_factory=immutables.Map)
    """By binary."""
    bundle_blobs: immutables.Map[str, tuple[str, ...]] = field(default_factory=immutables.Map)
    """Content keys by bundle, in the order of its entries."""
    required_signatures: immutables.Map[str, int] = field(default_factory=immutables.Map)
    """Product → signatures its bundles need; 1 when absent."""


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


def keys_of(state: State, product: str) -> dict[str, pb.SigningKey]:
    """Signing keys of a product by key id."""
    return {key.key_id: key for key in shelf(state.signing_keys, f"{product}/signingKeys").values()}


def upload_of(state: State, binary: str) -> Upload:
    """Where a binary's bytes are, so far as any are."""
    return state.uploads.get(binary) or Upload()


def evolve(state: State, event: Event) -> State:
    """The state after an event."""
    name = event.resource
    match event.payload:
        case ev.BinarySaved(binary=binary, staging_key=staging_key, upload_id=upload_id, blob_key=blob_key):
            return replace(
                state,
                binaries=put(state.binaries, name, binary),
                uploads=state.uploads.set(name, Upload(staging_key, upload_id, blob_key)),
            )
        case ev.BundleSaved(bundle=bundle, blob_keys=blob_keys):
            return replace(
                state,
                bundles=put(state.bundles, name, bundle),
                bundle_blobs=state.bundle_blobs.set(name, tuple(blob_keys)),
            )
        case ev.SigningKeySaved(signing_key=key):
            return replace(state, signing_keys=put(state.signing_keys, name, key))
        case ev.ArtifactSaved(artifact=artifact):
            return replace(state, artifacts=put(state.artifacts, name, artifact))
        case ev.ArtifactVersionSaved(artifact_version=version):
            return replace(state, versions=put(state.versions, name, version))
        case ev.SignaturePolicySaved(product=product, required_signatures=required):
            return replace(state, required_signatures=state.required_signatures.set(product, required))
    return state
