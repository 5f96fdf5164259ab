"""State and commands of the artifacts service: frozen values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import immutables
from groundswell.artifacts.v1 import artifacts_pb2 as pb


@dataclass(frozen=True, slots=True)
class Upload:
    """Where a binary's bytes are."""

    staging_key: str = ""
    upload_id: str = ""
    blob_key: str = ""


@dataclass(frozen=True, slots=True)
class State:
    """One partition's resources by full name. Messages are never changed in place."""

    signing_keys: immutables.Map[str, pb.SigningKey] = field(default_factory=immutables.Map)
    artifacts: immutables.Map[str, pb.Artifact] = field(default_factory=immutables.Map)
    versions: immutables.Map[str, pb.ArtifactVersion] = field(default_factory=immutables.Map)
    binaries: immutables.Map[str, pb.Binary] = field(default_factory=immutables.Map)
    uploads: immutables.Map[str, Upload] = field(default_factory=immutables.Map)
    bundles: immutables.Map[str, pb.Bundle] = field(default_factory=immutables.Map)
    bundle_blobs: immutables.Map[str, tuple[str, ...]] = field(default_factory=immutables.Map)
    required_signatures: immutables.Map[str, int] = field(default_factory=immutables.Map)
    """Product → signatures its bundles need; 1 when absent."""


@dataclass(frozen=True, slots=True)
class CreateSigningKey:
    """Register a public key."""

    key: pb.SigningKey


@dataclass(frozen=True, slots=True)
class RevokeSigningKey:
    """Revoke for good."""

    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class CreateArtifact:
    """A new artifact."""

    artifact: pb.Artifact


@dataclass(frozen=True, slots=True)
class CreateVersion:
    """A new version of an artifact."""

    version: pb.ArtifactVersion


@dataclass(frozen=True, slots=True)
class CreateBinary:
    """Declare size, digest and target."""

    binary: pb.Binary


@dataclass(frozen=True, slots=True)
class OpenUpload:
    """An upload was opened in the store; the first to be recorded counts."""

    name: str
    staging_key: str
    upload_id: str


@dataclass(frozen=True, slots=True)
class UploadCompleted:
    """The store has the whole object under the staging key."""

    name: str


@dataclass(frozen=True, slots=True)
class HashBinary:
    """The client asks for the server's own hash."""

    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class HashFinished:
    """The server's own hash of what was uploaded."""

    name: str
    task_id: str
    sha256: str
    size: int
    blob_key: str


@dataclass(frozen=True, slots=True)
class SignBinary:
    """A signature over the hex digest."""

    name: str
    etag: str
    signature: pb.Signature


@dataclass(frozen=True, slots=True)
class CreateBundle:
    """An ordered set of binaries."""

    name: str
    version: str
    security_version: int
    entries: Sequence[pb.BundleEntrySpec]
    required_signatures: int


@dataclass(frozen=True, slots=True)
class SignBundle:
    """A signature over the statement."""

    name: str
    etag: str
    signature: pb.Signature
