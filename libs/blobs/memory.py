"""A ``BlobStore`` in memory, for unit tests: the contract of the S3 adapter without sockets.

Its part links are taken by :meth:`MemoryBlobStore.put_part`, which refuses what a real store refuses.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from libs.blobs import BlobNotFoundError, BlobStoreError, StoredPart


class MemoryBlobStore:
    """Objects, open uploads and links of one process."""

    def __init__(self, *, tells_checksums: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, tuple[str, dict[int, bytes]]] = {}
        """Upload id → (key, parts)."""
        self._links: dict[str, tuple[str, int, str, float]] = {}
        self._tells_checksums = tells_checksums
        self._clock = clock

    async def create_upload(self, key: str) -> str:
        for upload_id, (name, _) in self.uploads.items():
            if name == key:
                return upload_id
        upload_id = secrets.token_hex(8)
        self.uploads[upload_id] = (key, {})
        return upload_id

    async def presign_part(
        self, key: str, upload_id: str, index: int, sha256: str, expires_s: int
    ) -> tuple[str, Mapping[str, str]]:
        url = f"memory:///{key}?{secrets.token_hex(8)}"
        self._links[url] = (upload_id, index, sha256, self._clock() + expires_s)
        return url, {"x-amz-checksum-sha256": base64.b64encode(bytes.fromhex(sha256)).decode()}

    async def put_part(self, url: str, headers: Mapping[str, str], data: bytes) -> None:
        """What a client does with a link. BlobStoreError is a store's refusal."""
        upload_id, index, sha256, expires = self._links.get(url, ("", 0, "", 0.0))
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        bound = headers.get("x-amz-checksum-sha256") == checksum and hashlib.sha256(data).hexdigest() == sha256
        if not bound or expires <= self._clock() or upload_id not in self.uploads:
            raise BlobStoreError("the part is refused")
        self.uploads[upload_id][1][index] = data

    async def list_parts(self, key: str, upload_id: str) -> Sequence[StoredPart]:
        parts = self._upload(key, upload_id)
        return [
            StoredPart(
                index,
                len(parts[index]),
                _etag(parts[index]),
                hashlib.sha256(parts[index]).hexdigest() if self._tells_checksums else "",
            )
            for index in sorted(parts)
        ]

    def _upload(self, key: str, upload_id: str) -> dict[int, bytes]:
        name, parts = self.uploads.get(upload_id, ("", {}))
        if name != key:
            raise BlobNotFoundError(f"{key} has no such upload")
        return parts

    async def complete(self, key: str, upload_id: str, parts: Sequence[StoredPart]) -> None:
        stored = self._upload(key, upload_id)
        if any(part.index not in stored or _etag(stored[part.index]) != part.etag for part in parts):
            raise BlobStoreError("the store holds other parts")
        content = b"".join(stored[part.index] for part in sorted(parts, key=lambda part: part.index))
        self.objects.setdefault(key, content)
        del self.uploads[upload_id]

    async def abort(self, key: str, upload_id: str) -> None:
        if self.uploads.get(upload_id, ("", {}))[0] == key:
            del self.uploads[upload_id]

    async def size(self, key: str) -> int | None:
        return len(self.objects[key]) if key in self.objects else None

    async def keys(self, prefix: str) -> Sequence[str]:
        return sorted(key for key in self.objects if key.startswith(prefix))

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        if key not in self.objects:
            raise BlobNotFoundError(f"{key} is not in the store")
        data = self.objects[key]
        for start in range(0, len(data), 65_536):
            yield data[start : start + 65_536]

    async def put_if_absent(self, key: str, data: bytes) -> bool:
        if key in self.objects:
            return False
        self.objects[key] = data
        return True

    async def promote(self, source: str, target: str) -> None:
        if target in self.objects:
            return
        if source not in self.objects:
            raise BlobNotFoundError(f"{source} is not in the store")
        self.objects[target] = self.objects[source]

    async def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    async def presign_get(self, key: str, expires_s: int) -> str:
        return f"memory:///{key}?expires={expires_s}"

    async def self_test(self) -> None:
        """It keeps its promises."""


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
