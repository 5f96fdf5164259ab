"""``BlobStore`` over plain S3: SigV4, path style, nothing of a vendor's.

Every request is signed in its query, ours as well as those of links, so there is one signer to be right. Writes carry
their SHA-256. Create-only copies are multipart copies, because stores honour ``If-None-Match: *`` when an upload is
completed and some ignore it on CopyObject.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

import aiohttp
from yarl import URL

from libs.blobs import (
    BlobInfo,
    BlobNotFoundError,
    BlobStoreError,
    PartsRefusedError,
    PresignedPart,
    StoredPart,
    StoreUnfitError,
    UploadNotFoundError,
)
from libs.blobs.sigv4 import Signer
from libs.settings import Settings

CHUNK: Final = 1024 * 1024
OWN_LINK_S: Final = 300
"""Life of the links of our own requests: covers clocks that differ a little."""
COPY_PART: Final = 1024 * 1024 * 1024
CHECKSUM: Final = "x-amz-checksum-sha256"
_CREATE_ONLY: Final = {"if-none-match": "*"}
_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=60.0)
_RETRIES: Final = 3


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    code: str
    headers: Mapping[str, str]
    body: bytes

    def texts(self, *path: str) -> list[str]:
        """Texts of all elements of that path."""
        return [element.text or "" for element in self.elements(*path)]

    def elements(self, *path: str) -> list[ET.Element]:
        """All elements of that path, whatever their name space."""
        found = [ET.fromstring(self.body)]  # noqa: S314 - from our own store, over its authenticated address
        for name in path:
            found = [child for element in found for child in element if _local(child) == name]
        return found


class S3BlobStore:
    """One bucket of one store. Signing needs no connection; the first other call opens the pool."""

    def __init__(
        self, signer: Signer, endpoint: str, public_endpoint: str = "", now: Callable[[], datetime] = _now
    ) -> None:
        self._signer = signer
        self._endpoint = endpoint
        self._public = public_endpoint or endpoint
        self._now = now
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> S3BlobStore:
        """The store of this installation."""
        signer = Signer(
            settings.s3_bucket, settings.s3_region, settings.s3_access_key, settings.s3_secret_key.get_secret_value()
        )
        return cls(signer, settings.s3_endpoint, settings.s3_public)

    async def close(self) -> None:
        """Close the pool."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # Links

    async def presign_part(
        self, key: str, upload_id: str, index: int, sha256: str, expires_s: float
    ) -> PresignedPart:
        headers = {CHECKSUM: base64.b64encode(bytes.fromhex(sha256)).decode()}
        query = {"partNumber": str(index), "uploadId": upload_id}
        url = self._signer.url(self._public, "PUT", key, self._now(), int(expires_s), query, headers)
        return PresignedPart(url, headers)

    async def presign_get(self, key: str, expires_s: float) -> str:
        query = {"response-content-type": "application/octet-stream"}
        return self._signer.url(self._public, "GET", key, self._now(), int(expires_s), query)

    # Multipart uploads

    async def create_multipart(self, key: str) -> str:
        open_uploads = await self._uploads(key)
        if open_uploads:
            return open_uploads[0]
        answer = await self._call("POST", key, {"uploads": ""}, {"x-amz-checksum-algorithm": "SHA256"})
        return _expect(answer, 200).texts("UploadId")[0]

    async def _uploads(self, key: str) -> list[str]:
        answer = _expect(await self._call("GET", "", {"uploads": "", "prefix": key}), 200)
        found = ((_text(one, "Key"), _text(one, "UploadId")) for one in answer.elements("Upload"))
        return sorted(upload_id for name, upload_id in found if name == key)

    async def list_parts(self, key: str, upload_id: str) -> Sequence[StoredPart]:
        parts: dict[int, StoredPart] = {}
        query = {"uploadId": upload_id}
        while True:
            answer = await self._call("GET", key, query)
            if answer.code == "NoSuchUpload":
                raise UploadNotFoundError(key)
            for element in _expect(answer, 200).elements("Part"):
                part = _stored_part(element)
                parts[part.index] = part
            if answer.texts("IsTruncated") != ["true"]:
                return [parts[index] for index in sorted(parts)]
            query = {**query, "part-number-marker": answer.texts("NextPartNumberMarker")[0]}

    async def complete(self, key: str, upload_id: str, parts: Sequence[StoredPart]) -> None:
        body = "".join(
            f"<Part><PartNumber>{part.index}</PartNumber><ETag>{escape(part.etag)}</ETag>{_checksum_tag(part)}</Part>"
            for part in sorted(parts, key=lambda part: part.index)
        )
        answer = await self._call(
            "POST",
            key,
            {"uploadId": upload_id},
            _CREATE_ONLY,
            f'<CompleteMultipartUpload xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{body}'
            "</CompleteMultipartUpload>".encode(),
        )
        if answer.code == "NoSuchUpload":
            raise UploadNotFoundError(key)
        if answer.code in {"InvalidPart", "InvalidPartOrder", "BadDigest"}:
            raise PartsRefusedError(key)
        if answer.status == 412:
            return  # an earlier try of the same call has made the object
        _expect(answer, 200)

    async def abort(self, key: str) -> None:
        for upload_id in await self._uploads(key):
            await self._abort(key, upload_id)

    async def _abort(self, key: str, upload_id: str) -> None:
        answer = await self._call("DELETE", key, {"uploadId": upload_id})
        if answer.code != "NoSuchUpload":
            _expect(answer, 204, 200)

    # Objects

    async def read(self, key: str) -> AsyncIterator[bytes]:
        try:
            async with self._request("GET", key) as response:
                if response.status == 404:
                    raise BlobNotFoundError(key)
                if response.status != 200:
                    raise BlobStoreError(f"the object store answered {response.status} to a read")
                async for chunk in response.content.iter_chunked(CHUNK):
                    yield chunk
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BlobStoreError(f"reading from the object store failed: {type(error).__name__}") from None

    async def put_if_absent(self, key: str, data: bytes) -> bool:
        return await self._put(key, data, hashlib.sha256(data).digest())

    async def _put(self, key: str, data: bytes, digest: bytes) -> bool:
        headers = {**_CREATE_ONLY, CHECKSUM: base64.b64encode(digest).decode()}
        answer = await self._call("PUT", key, {}, headers, data)
        if answer.status == 412:
            return False
        _expect(answer, 200)
        return True

    async def promote(self, source: str, key: str) -> bool:
        info = await self.head(source)
        if info is None:
            raise BlobNotFoundError(source)
        if await self.head(key) is not None:
            return False
        # Not `create_multipart`: two leaders that copy at once must not mix their parts.
        answer = await self._call("POST", key, {"uploads": ""})
        upload_id = _expect(answer, 200).texts("UploadId")[0]
        try:
            parts = await self._copy_parts(source, info, key, upload_id)
            body = "".join(
                f"<Part><PartNumber>{index}</PartNumber><ETag>{escape(etag)}</ETag></Part>" for index, etag in parts
            )
            answer = await self._call(
                "POST",
                key,
                {"uploadId": upload_id},
                _CREATE_ONLY,
                f"<CompleteMultipartUpload>{body}</CompleteMultipartUpload>".encode(),
            )
            if answer.status != 412:
                _expect(answer, 200)
                return True
        except BaseException:
            with contextlib.suppress(BlobStoreError):
                await self._abort(key, upload_id)
            raise
        await self._abort(key, upload_id)
        return False

    async def _copy_parts(self, source: str, info: BlobInfo, key: str, upload_id: str) -> list[tuple[int, str]]:
        parts: list[tuple[int, str]] = []
        size = max(COPY_PART, -(-info.size // 10_000))
        for index, start in enumerate(range(0, info.size, size), start=1):
            headers = {
                "x-amz-copy-source": f"/{self._signer.bucket}/{source}",
                "x-amz-copy-source-range": f"bytes={start}-{min(start + size, info.size) - 1}",
                "x-amz-copy-source-if-match": info.etag,
            }
            query = {"partNumber": str(index), "uploadId": upload_id}
            answer = _expect(await self._call("PUT", key, query, headers), 200)
            parts.append((index, answer.texts("ETag")[0]))
        return parts

    async def head(self, key: str) -> BlobInfo | None:
        answer = await self._call("HEAD", key)
        if answer.status == 404:
            return None
        headers = _expect(answer, 200).headers
        return BlobInfo(int(headers["Content-Length"]), headers.get("ETag", ""))

    async def delete(self, key: str) -> None:
        answer = await self._call("DELETE", key)
        if answer.status != 404:
            _expect(answer, 204, 200)

    async def self_test(self) -> None:
        key = f"self-test/{secrets.token_hex(16)}"
        try:
            if not await self.put_if_absent(key, b"first"):
                raise StoreUnfitError("the object store refuses a create-only write of a new key")
            if await self.put_if_absent(key, b"second"):
                raise StoreUnfitError("the object store ignores If-None-Match: firmware could be overwritten")
            with contextlib.suppress(BlobStoreError):
                await self._put(f"{key}-checksum", b"other bytes", hashlib.sha256(b"these bytes").digest())
                raise StoreUnfitError("the object store ignores x-amz-checksum-sha256: damaged uploads would be kept")
        finally:
            await self.delete(key)
            await self.delete(f"{key}-checksum")

    # Requests

    def _request(
        self,
        method: str,
        key: str,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=_TIMEOUT, auto_decompress=False)
        url = self._signer.url(self._endpoint, method, key, self._now(), OWN_LINK_S, query, headers)
        return self._session.request(method, URL(url, encoded=True), headers=headers, data=data, allow_redirects=False)

    async def _call(
        self,
        method: str,
        key: str,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
    ) -> _Answer:
        """One request, again after a broken connection or a 5xx: all of them may be repeated."""
        problem = ""
        for attempt in range(_RETRIES):
            if attempt:
                await asyncio.sleep(0.1 * 2**attempt)
            try:
                async with self._request(method, key, query, headers, data) as response:
                    body = await response.read()
                    if response.status < 500 or response.status == 501:
                        return _Answer(response.status, _code(body), response.headers.copy(), body)
                    problem = f"answered {response.status}"
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = f"cannot be reached: {type(error).__name__}"
        raise BlobStoreError(f"the object store {problem}")


def _expect(answer: _Answer, *statuses: int) -> _Answer:
    # Completing an upload may answer 200 and put the error into the body.
    if answer.status not in statuses or answer.code:
        raise BlobStoreError(f"the object store answered {answer.status} {answer.code}".rstrip())
    return answer


def _code(body: bytes) -> str:
    """Error code of an answer's body; empty when it holds none."""
    if b"<Error" not in body[:200]:
        return ""
    try:
        root = ET.fromstring(body)  # noqa: S314 - from our own store
    except ET.ParseError:
        return "Unreadable"
    return _text(root, "Code") if _local(root) == "Error" else ""


def _stored_part(element: ET.Element) -> StoredPart:
    checksum = _text(element, "ChecksumSHA256")
    return StoredPart(
        int(_text(element, "PartNumber")),
        int(_text(element, "Size")),
        _text(element, "ETag"),
        base64.b64decode(checksum).hex() if checksum else "",
    )


def _checksum_tag(part: StoredPart) -> str:
    if not part.sha256:
        return ""
    return f"<ChecksumSHA256>{base64.b64encode(bytes.fromhex(part.sha256)).decode()}</ChecksumSHA256>"


def _local(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]


def _text(element: ET.Element, name: str) -> str:
    return next((child.text or "" for child in element if _local(child) == name), "")
