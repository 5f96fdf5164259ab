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
    reason: str = ""


@dataclass(frozen=True, slots=True)
class JudgeProduct:
    """Go on with judging what a product holds anew."""

    product: str
    after: str
    """Name of the last one that was looked at."""
    task_id: str


@dataclass(frozen=True, slots=True)
class CreateArtifact:
    """A new artifact."""

    artifact: pb.Artifact


@dataclass(frozen=True, slots=True)
class UpdateArtifact:
    """New values for named fields."""

    artifact: pb.Artifact
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeleteArtifact:
    """Delete an artifact without versions."""

    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class CreateVersion:
    """A new version of an artifact."""

    version: pb.ArtifactVersion


@dataclass(frozen=True, slots=True)
class UpdateVersion:
    """New values for named fields."""

    version: pb.ArtifactVersion
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeleteVersion:
    """Delete a version without binaries and attachments."""

    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class CreateBinary:
    """Declare size, digest and target."""

    binary: pb.Binary


@dataclass(frozen=True, slots=True)
class UpdateBinary:
    """New values for named fields."""

    binary: pb.Binary
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeleteBinary:
    """Delete a binary that was never signed."""

    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class ResetBinary:
    """Back to UPLOADABLE; zero and empty keep what was declared."""

    name: str
    etag: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class DestroyBinary:
    """Give up the content for good."""

    name: str
    etag: str
    force: bool
    reason: str


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
    sha1: str = ""
    md5: str = ""


@dataclass(frozen=True, slots=True)
class SignBinary:
    """A signature over the hex digest."""

    name: str
    etag: str
    signature: pb.Signature
    required_signatures: int
    """As the registry says now: what is known here may be a moment old."""


@dataclass(frozen=True, slots=True)
class CreateAttachment:
    """Declare a document."""

    attachment: pb.Attachment


@dataclass(frozen=True, slots=True)
class AttachmentPart:
    """The store has this part."""

    name: str
    part: pb.UploadPart


@dataclass(frozen=True, slots=True)
class AttachmentStored:
    """The whole content is under its content key, compared with what was declared."""

    name: str


@dataclass(frozen=True, slots=True)
class DeleteAttachment:
    """Delete a document."""

    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class CreateBundle:
    """An ordered set of binaries."""

    name: str
    version: str
    security_version: int
    entries: Sequence[pb.BundleEntrySpec]


@dataclass(frozen=True, slots=True)
class UpdateBundle:
    """New values for named fields."""

    bundle: pb.Bundle
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SignBundle:
    """A signature over the statement."""

    name: str
    etag: str
    signature: pb.Signature
    required_signatures: int
    """As the registry says now: what is known here may be a moment old."""
