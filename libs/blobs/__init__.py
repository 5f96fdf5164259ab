"""Firmware in an object store: a port with an S3 adapter (:mod:`libs.blobs.s3`) and a fake for unit tests.

Rules of the port:

* Uploads go straight to the store by presigned part; the link binds the part's SHA-256, so that other bytes are refused.
* A key is written create-only, whole or not at all. Content keys are ``sha256/<generation>/<hex>``; a generation is made
  for one promotion, so that a key once deleted is never written again.
* Nothing the store says about content is believed: whoever needs a digest reads the whole object (:meth:`BlobStore.read`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from libs.errors import FailedPreconditionError, NotFoundError, UnavailableError

MIN_PART_BYTES: Final = 5 * 1024 * 1024
"""Least size of every part but the last."""
MAX_PART_BYTES: Final = 5 * 1024 * 1024 * 1024
MAX_PARTS: Final = 10_000


@dataclass(frozen=True, slots=True)
class PresignedPart:
    """Where to PUT a part, and the headers that are signed and so must be sent."""

    url: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part as the store lists it."""

    index: int
    size: int
    etag: str
    sha256: str = ""
    """Lowercase hex; empty when the store does not tell."""


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """An object as the store knows it."""

    size: int
    etag: str


class BlobStoreError(UnavailableError):
    """The store did not do what was asked, for a reason that may go away. The message holds no link and no secret."""

    def __init__(self, message: str) -> None:
        super().__init__("BLOB_STORE_UNAVAILABLE", message, retry_after_s=1.0)


class BlobNotFoundError(NotFoundError):
    """No object has this key."""

    def __init__(self, key: str) -> None:
        super().__init__("BLOB_NOT_FOUND", f"the object store has no {key}", key=key)


class UploadNotFoundError(NotFoundError):
    """No such multipart upload: it was completed, aborted, or never opened."""

    def __init__(self, key: str) -> None:
        super().__init__("UPLOAD_NOT_FOUND", f"the object store has no such upload of {key}", key=key)


class PartsRefusedError(FailedPreconditionError):
    """The store holds other parts than were named."""

    def __init__(self, key: str) -> None:
        super().__init__("PARTS_CHANGED", f"the parts of {key} changed while they were put together: try again", key=key)


class BlobStore(Protocol):
    """Objects by key. All methods may be called again after an unknown outcome."""

    async def create_multipart(self, key: str) -> str:
        """Upload id of a multipart upload of the key; an upload that is open already is found again, not doubled."""

    async def presign_part(
        self, key: str, upload_id: str, index: int, sha256: str, expires_s: float
    ) -> PresignedPart:
        """A link that takes exactly the bytes of this digest as this part."""

    async def list_parts(self, key: str, upload_id: str) -> Sequence[StoredPart]:
        """Stored parts by index; empty or UploadNotFoundError once the upload is over."""

    async def complete(self, key: str, upload_id: str, parts: Sequence[StoredPart]) -> None:
        """Make the object of these parts, create-only. UploadNotFoundError, PartsRefusedError."""

    async def abort(self, key: str) -> None:
        """Drop every open upload of the key, with its parts."""

    def read(self, key: str) -> AsyncIterator[bytes]:
        """The whole object in chunks. BlobNotFoundError."""

    async def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a small object; False, and nothing written, when the key exists."""

    async def promote(self, source: str, key: str) -> bool:
        """Copy inside the store, create-only; False when the key exists. BlobNotFoundError for the source."""

    async def head(self, key: str) -> BlobInfo | None:
        """The object, if there is one."""

    async def delete(self, key: str) -> None:
        """Delete; a key that does not exist is deleted already."""

    async def presign_get(self, key: str, expires_s: float) -> str:
        """A link for reading, at the public address."""

    async def self_test(self) -> None:
        """Raises :class:`StoreUnfitError` with one clear line when the store keeps less than it promises."""

    async def close(self) -> None: ...


class StoreUnfitError(Exception):
    """The object store breaks a promise on which integrity rests; a service does not start on it."""


def content_key(generation: str, sha256: str) -> str:
    """Key of verified content."""
    return f"sha256/{generation}/{sha256}"
