"""``BlobStore`` in memory, for unit tests: the contract of the S3 adapter, without sockets.

Its part links are taken by :meth:`MemoryBlobStore.put_part`, which refuses what a real store would refuse.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from libs.blobs import (
    BlobInfo,
    BlobNotFoundError,
    BlobStoreError,
    PartsRefusedError,
    PresignedPart,
    StoredPart,
    UploadNotFoundError,
)


def _now() -> datetime:
    return datetime.now(UTC)


class MemoryBlobStore:
    """Objects, open uploads and links of one process."""

    def __init__(self, now: Callable[[], datetime] = _now, *, tells_checksums: bool = False) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, tuple[str, dict[int, bytes]]] = {}
        """Upload id -> (key, parts)."""
        self._links: dict[str, tuple[str, int, str, datetime]] = {}
        self._now = now
        self._tells_checksums = tells_checksums

    async def create_multipart(self, key: str) -> str:
        for upload_id, (name, _) in self.uploads.items():
            if name == key:
                return upload_id
        upload_id = secrets.token_hex(8)
        self.uploads[upload_id] = (key, {})
        return upload_id

    async def presign_part(
        self, key: str, upload_id: str, index: int, sha256: str, expires_s: float
    ) -> PresignedPart:
        url = f"memory:///{key}?{secrets.token_hex(8)}"
        self._links[url] = (upload_id, index, sha256, self._now() + timedelta(seconds=expires_s))
        return PresignedPart(url, {"x-amz-checksum-sha256": base64.b64encode(bytes.fromhex(sha256)).decode()})

    async def put_part(self, url: str, headers: Mapping[str, str], data: bytes) -> None:
        """What a client does with a link. Raises BlobStoreError for what a store refuses."""
        upload_id, index, sha256, expires = self._links.get(url, ("", 0, "", self._now()))
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        bound = headers.get("x-amz-checksum-sha256") == checksum and hashlib.sha256(data).hexdigest() == sha256
        if expires <= self._now() or not bound or upload_id not in self.uploads:
            raise BlobStoreError("refused")
        self.uploads[upload_id][1][index] = data

    async def list_parts(self, key: str, upload_id: str) -> Sequence[StoredPart]:
        parts = self._upload(key, upload_id)
        return [self._stored(index, parts[index]) for index in sorted(parts)]

    def _stored(self, index: int, data: bytes) -> StoredPart:
        digest = hashlib.sha256(data).hexdigest()
        return StoredPart(index, len(data), _etag(data), digest if self._tells_checksums else "")

    def _upload(self, key: str, upload_id: str) -> dict[int, bytes]:
        name, parts = self.uploads.get(upload_id, ("", {}))
        if name != key:
            raise UploadNotFoundError(key)
        return parts

    async def complete(self, key: str, upload_id: str, parts: Sequence[StoredPart]) -> None:
        stored = self._upload(key, upload_id)
        if any(part.index not in stored or _etag(stored[part.index]) != part.etag for part in parts):
            raise PartsRefusedError(key)
        ordered = sorted(part.index for part in parts)
        self.objects.setdefault(key, b"".join(stored[index] for index in ordered))
        del self.uploads[upload_id]

    async def abort(self, key: str) -> None:
        self.uploads = {upload_id: one for upload_id, one in self.uploads.items() if one[0] != key}

    async def read(self, key: str) -> AsyncIterator[bytes]:
        if key not in self.objects:
            raise BlobNotFoundError(key)
        data = self.objects[key]
        for start in range(0, len(data), 65_536):
            yield data[start : start + 65_536]

    async def put_if_absent(self, key: str, data: bytes) -> bool:
        if key in self.objects:
            return False
        self.objects[key] = data
        return True

    async def promote(self, source: str, key: str) -> bool:
        if source not in self.objects:
            raise BlobNotFoundError(source)
        return await self.put_if_absent(key, self.objects[source])

    async def head(self, key: str) -> BlobInfo | None:
        data = self.objects.get(key)
        return None if data is None else BlobInfo(len(data), _etag(data))

    async def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    async def presign_get(self, key: str, expires_s: float) -> str:
        return f"memory:///{key}?expires={expires_s}"

    async def self_test(self) -> None:
        """It keeps its promises."""

    async def close(self) -> None:
        """Nothing is open."""


def _etag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'
