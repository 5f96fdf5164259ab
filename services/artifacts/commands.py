"""What the artifacts service can be asked to do. Messages in a command are the caller's and are never changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from groundswell.artifacts.v1 import artifacts_pb2 as pb


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
class ForgetUpload:
    """The upload is gone from the store: a new one has to be opened."""

    name: str
    upload_id: str


@dataclass(frozen=True, slots=True)
class UploadCompleted:
    """The store has the whole object under the staging key of that upload."""

    name: str
    upload_id: str


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
    staging_key: str
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


@dataclass(frozen=True, slots=True)
class SignBundle:
    """A signature over the statement."""

    name: str
    etag: str
    signature: pb.Signature
    required_signatures: int
    """As the registry says now: what is known here may be a moment old."""
