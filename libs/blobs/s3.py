"""Plain S3: SigV4, path style, multipart, presigned requests. Speaks to any store that does (docs/operations.md)."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final
from xml.etree import ElementTree

import aiohttp
from yarl import URL

from libs.blobs import BlobNotFoundError, BlobStoreError, StoredPart
from libs.blobs.sigv4 import Credentials, presign
from libs.settings import Settings

CHUNK: Final = 1024 * 1024
_OWN_REQUEST_S: Final = 300
"""Life of the signature of a request that is sent at once."""
_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, connect=5, sock_read=60)


class S3BlobStore:
    """A :class:`libs.blobs.BlobStore` over one bucket. The client session opens at first use; ``close`` ends it."""

    def __init__(self, endpoint: str, public_endpoint: str, bucket: str, credentials: Credentials) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._public = public_endpoint.rstrip("/")
        self._bucket = bucket
        self._credentials = credentials
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> S3BlobStore:
        """The store of an installation."""
        credentials = Credentials(settings.s3_access_key, settings.s3_secret_key.get_secret_value(), settings.s3_region)
        return cls(settings.s3_endpoint, settings.s3_public, settings.s3_bucket, credentials)

    async def close(self) -> None:
        """End the session."""
        if self._session is not None:
            await self._session.close()

    async def create_upload(self, key: str) -> str:
        body = await self._call("POST", key, {"uploads": ""})
        return _text(ElementTree.fromstring(body), "UploadId")  # noqa: S314 - our own store's answer

    async def presign_part(
        self, key: str, upload_id: str, index: int, sha256: str, expires_s: int
    ) -> tuple[str, Mapping[str, str]]:
        headers = {"x-amz-checksum-sha256": base64.b64encode(bytes.fromhex(sha256)).decode()}
        query = {"partNumber": str(index), "uploadId": upload_id}
        return presign(self._credentials, "PUT", self._url(self._public, key), query, headers, expires_s), headers

    async def list_parts(self, key: str, upload_id: str) -> Sequence[StoredPart]:
        parts: list[StoredPart] = []
        marker = ""
        while True:
            query = {"uploadId": upload_id, "max-parts": "1000"} | ({"part-number-marker": marker} if marker else {})
            root = ElementTree.fromstring(await self._call("GET", key, query))  # noqa: S314 - our own store's answer
            for element in root.iter():
                if element.tag.rpartition("}")[2] == "Part":
                    etag = _text(element, "ETag").strip('"')
                    parts.append(StoredPart(int(_text(element, "PartNumber")), int(_text(element, "Size")), etag))
            if _text(root, "IsTruncated", "false") != "true":
                return sorted(parts, key=lambda part: part.index)
            marker = _text(root, "NextPartNumberMarker")

    async def complete(self, key: str, upload_id: str, parts: Sequence[StoredPart]) -> None:
        listed = "".join(
            f"<Part><PartNumber>{part.index}</PartNumber><ETag>&quot;{part.etag}&quot;</ETag></Part>" for part in parts
        )
        body = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
        answer = await self._call("POST", key, {"uploadId": upload_id}, body=body)
        # S3 may answer 200 and then an error: the body is the truth.
        if b"<Error>" in answer:
            raise BlobStoreError(f"completing {key}: {answer[:300]!r}")

    async def abort(self, key: str, upload_id: str) -> None:
        try:
            await self._call("DELETE", key, {"uploadId": upload_id})
        except BlobNotFoundError:
            return

    async def size(self, key: str) -> int | None:
        url = presign(self._credentials, "HEAD", self._url(self._endpoint, key), {}, {}, _OWN_REQUEST_S)
        async with self._client().head(URL(url, encoded=True)) as response:
            if response.status == 404:
                return None
            if response.status != 200:
                raise BlobStoreError(f"HEAD {key}: {response.status}")
            return int(response.headers["Content-Length"])

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        url = presign(self._credentials, "GET", self._url(self._endpoint, key), {}, {}, _OWN_REQUEST_S)
        async with self._client().get(URL(url, encoded=True)) as response:
            if response.status == 404:
                raise BlobNotFoundError(f"{key} is not in the store")
            if response.status != 200:
                raise BlobStoreError(f"GET {key}: {response.status}")
            async for chunk in response.content.iter_chunked(CHUNK):
                yield chunk

    async def promote(self, source: str, target: str) -> None:
        if await self.size(target) is not None:
            return
        headers = {"x-amz-copy-source": f"/{self._bucket}/{source}"}
        await self._call("PUT", target, {}, headers=headers)

    async def delete(self, key: str) -> None:
        try:
            await self._call("DELETE", key, {})
        except BlobNotFoundError:
            return

    async def presign_get(self, key: str, expires_s: int) -> str:
        return presign(self._credentials, "GET", self._url(self._public, key), {}, {}, expires_s)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=_TIMEOUT, trust_env=False)
        return self._session

    def _url(self, endpoint: str, key: str) -> str:
        return f"{endpoint}/{self._bucket}/{key}"

    async def _call(
        self,
        method: str,
        key: str,
        query: Mapping[str, str],
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> bytes:
        signed = dict(headers or {})
        url = presign(self._credentials, method, self._url(self._endpoint, key), query, signed, _OWN_REQUEST_S)
        try:
            async with self._client().request(method, URL(url, encoded=True), headers=signed, data=body) as response:
                answer = await response.read()
                if response.status == 404:
                    raise BlobNotFoundError(f"{method} {key}: not found")
                if response.status >= 300:
                    raise BlobStoreError(f"{method} {key}: {response.status} {answer[:300]!r}")
                return answer
        except aiohttp.ClientError as error:
            raise BlobStoreError(f"{method} {key}: {type(error).__name__}: {error}") from error


def _text(element: ElementTree.Element, name: str, default: str | None = None) -> str:
    for child in element.iter():
        if child.tag.rpartition("}")[2] == name:
            return child.text or ""
    if default is None:
        raise BlobStoreError(f"the store's answer has no {name}")
    return default
