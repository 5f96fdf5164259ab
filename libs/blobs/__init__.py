"""Firmware in an object store: a port, an S3 adapter (:mod:`libs.blobs.s3`), a fake for unit tests.

A content key is never overwritten, and a key once deleted is never written again. Uploads go straight to the store by
links that bind each part's SHA-256. What the store says about content is not believed: whoever needs a digest streams
the whole object. All methods may be called again after an unknown outcome.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

GENERATION: Final = 1
"""Part of every content key; it grows for a digest whose content was deleted."""
_CONTENT_KEY: Final = re.compile(r"sha256/([a-z][a-z0-9-]{1,40})/([1-9][0-9]{0,9})/([0-9a-f]{64})")


class BlobStoreError(Exception):
    """The store refused or did not answer; the message says what it said."""


class BlobNotFoundError(BlobStoreError):
    """No such key or upload."""


class StoreUnfitError(BlobStoreError):
    """The store breaks a promise on which integrity rests: no service starts on it."""


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part as the store holds it."""

    index: int
    size: int
    etag: str
    sha256: str = ""
    """Lowercase hex; empty when the store does not tell."""


def content_key(organization: str, sha256: str, generation: int = GENERATION) -> str:
    """Key of hashed content.

    Content belongs to an organization: one partition's log decides when nothing refers to it any more, and nobody can
    tell from the store what another organization holds.
    """
    return f"sha256/{organization}/{generation}/{sha256}"


def parse_content_key(key: str) -> tuple[str, str, int] | None:
    """Organization, digest and generation of a content key; None for any other key."""
    match = _CONTENT_KEY.fullmatch(key)
    return None if match is None else (match[1], match[3], int(match[2]))


class BlobStore(Protocol):
    """What the services need of an object store."""

    async def create_upload(self, key: str) -> str:
        """Id of the key's multipart upload; one that is open already is found again, not doubled."""

    async def presign_part(
        self, key: str, upload_id: str, index: int, sha256: str, expires_s: int
    ) -> tuple[str, Mapping[str, str]]:
        """URL and headers of a PUT that the store accepts only with a body of that digest."""

    async def list_parts(self, key: str, upload_id: str) -> Sequence[StoredPart]:
        """Parts that are there, in order. When the upload is gone: BlobNotFoundError, or none, as the store likes."""

    async def complete(self, key: str, upload_id: str, parts: Sequence[StoredPart]) -> None:
        """Make the object from its parts, create-only: a repeat leaves what is there."""

    async def abort(self, key: str, upload_id: str) -> None:
        """Drop an upload; one that is gone is fine."""

    async def size(self, key: str) -> int | None:
        """Bytes of an object, None when there is none."""

    async def keys(self, prefix: str) -> Sequence[str]:
        """Keys of all objects that begin so."""

    def stream(self, key: str) -> AsyncIterator[bytes]:
        """Content in chunks. Raises BlobNotFoundError."""

    async def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a small object; False, and nothing written, when the key exists."""

    async def promote(self, source: str, target: str) -> None:
        """Copy to a key that is written at most once; an existing target is left alone."""

    async def delete(self, key: str) -> None:
        """Delete an object; one that is gone is fine."""

    async def presign_get(self, key: str, expires_s: int) -> str:
        """Link for a device or operator, on the public endpoint."""

    async def self_test(self) -> None:
        """Raises StoreUnfitError, one clear line, when the store keeps less than it must promise."""
