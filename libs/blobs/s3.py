"""Plain S3: SigV4, path style, multipart, presigned requests. Speaks to any store that does (docs/operations.md).

Our own requests are signed in their query like the links, so there is one signer to be right. Create-only copies are
multipart copies, because stores honour ``If-None-Match: *`` where an upload is completed and some ignore it on
CopyObject; that also copies more than the 5 GiB that CopyObject takes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import aiohttp
from yarl import URL

from libs.blobs import BlobNotFoundError, BlobStoreError, StoredPart, StoreUnfitError
from libs.blobs.sigv4 import Credentials, presign
from libs.settings import Settings

CHUNK: Final = 1024 * 1024
CHECKSUM: Final = "x-amz-checksum-sha256"
_OWN_REQUEST_S: Final = 300
"""Life of the signature of a request that is sent at once."""
_COPY_PART: Final = 1024 * 1024 * 1024
_MAX_PARTS: Final = 10_000
_TRIES: Final = 3
_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=60)
_CREATE_ONLY: Final = {"if-none-match": "*"}
_EXISTS: Final = 412


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    error: str
    """S3's error code; also that of a 200 whose body is an error."""
    length: int
    etag: str
    body: bytes

    def expect(self, what: str) -> _Answer:
        """The answer when it is good; the code alone goes into the error, never a link or a body."""
        if self.status == 404:
            raise BlobNotFoundError(f"{what}: not found")
        if self.status >= 300 or self.error:
            raise BlobStoreError(f"{what}: {self.status} {self.error}".rstrip())
        return self

    def root(self) -> ElementTree.Element:
        """The body."""
        try:
            return ElementTree.fromstring(self.body)  # noqa: S314 - our own store's answer
        except ElementTree.ParseError as error:
            raise BlobStoreError("the store's answer cannot be read") from error


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

    async def start(self) -> None:
        """As a part of a service: refuse to start on a store that does not keep its promises."""
        await self.self_test()

    async def stop(self) -> None:
        """As a part of a service."""
        await self.close()

    async def close(self) -> None:
        """End the session."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def presign_part(
        self, key: str, upload_id: str, index: int, sha256: str, expires_s: int
    ) -> tuple[str, Mapping[str, str]]:
        headers = {CHECKSUM: base64.b64encode(bytes.fromhex(sha256)).decode()}
        query = {"partNumber": str(index), "uploadId": upload_id}
        return presign(self._credentials, "PUT", self._url(self._public, key), query, headers, expires_s), headers

    async def presign_get(self, key: str, expires_s: int) -> str:
        return presign(self._credentials, "GET", self._url(self._public, key), {}, {}, expires_s)

    async def create_upload(self, key: str) -> str:
        answer = (await self._call("GET", "", {"uploads": "", "prefix": key})).expect("listing uploads")
        for element in _all(answer.root(), "Upload"):
            if _text(element, "Key") == key:
                return _text(element, "UploadId")
        return await self._new_upload(key, {"x-amz-checksum-algorithm": "SHA256"})

    async def _new_upload(self, key: str, headers: Mapping[str, str] | None = None) -> str:
        answer = await self._call("POST", key, {"uploads": ""}, headers)
        return _text(answer.expect(f"opening an upload of {key}").root(), "UploadId")

    async def list_parts(self, key: str, upload_id: str) -> Sequence[StoredPart]:
        parts: dict[int, StoredPart] = {}
        query = {"uploadId": upload_id}
        while True:
            root = (await self._call("GET", key, query)).expect(f"listing parts of {key}").root()
            for element in _all(root, "Part"):
                part = _stored_part(element)
                parts[part.index] = part
            if _text(root, "IsTruncated", "false") != "true":
                return [parts[index] for index in sorted(parts)]
            query["part-number-marker"] = _text(root, "NextPartNumberMarker")

    async def complete(self, key: str, upload_id: str, parts: Sequence[StoredPart]) -> None:
        await self._complete(key, upload_id, parts)

    async def _complete(self, key: str, upload_id: str, parts: Iterable[StoredPart]) -> bool:
        """False when the key exists already."""
        listed = "".join(
            f"<Part><PartNumber>{part.index}</PartNumber><ETag>&quot;{escape(part.etag)}&quot;</ETag>"
            f"{_checksum(part)}</Part>"
            for part in sorted(parts, key=lambda part: part.index)
        )
        body = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
        answer = await self._call("POST", key, {"uploadId": upload_id}, _CREATE_ONLY, body)
        if answer.status == _EXISTS:
            return False
        answer.expect(f"completing {key}")
        return True

    async def abort(self, key: str, upload_id: str) -> None:
        with contextlib.suppress(BlobNotFoundError):
            (await self._call("DELETE", key, {"uploadId": upload_id})).expect(f"aborting an upload of {key}")

    async def size(self, key: str) -> int | None:
        found = await self._head(key)
        return None if found is None else found.length

    async def _head(self, key: str) -> _Answer | None:
        answer = await self._call("HEAD", key)
        return None if answer.status == 404 else answer.expect(f"looking at {key}")

    async def keys(self, prefix: str) -> Sequence[str]:
        found: list[str] = []
        query = {"list-type": "2", "prefix": prefix}
        while True:
            root = (await self._call("GET", "", query)).expect("listing objects").root()
            found += [_text(element, "Key") for element in _all(root, "Contents")]
            if _text(root, "IsTruncated", "false") != "true":
                return found
            query["continuation-token"] = _text(root, "NextContinuationToken")

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        url = presign(self._credentials, "GET", self._url(self._endpoint, key), {}, {}, _OWN_REQUEST_S)
        try:
            async with self._client().get(URL(url, encoded=True), allow_redirects=False) as response:
                if response.status == 404:
                    raise BlobNotFoundError(f"{key} is not in the store")
                if response.status != 200:
                    raise BlobStoreError(f"reading {key}: {response.status}")
                async for chunk in response.content.iter_chunked(CHUNK):
                    yield chunk
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BlobStoreError(f"reading {key}: {type(error).__name__}") from None

    async def put_if_absent(self, key: str, data: bytes) -> bool:
        return await self._put(key, data, hashlib.sha256(data).digest())

    async def _put(self, key: str, data: bytes, digest: bytes) -> bool:
        headers = _CREATE_ONLY | {CHECKSUM: base64.b64encode(digest).decode()}
        answer = await self._call("PUT", key, {}, headers, data)
        if answer.status == _EXISTS:
            return False
        answer.expect(f"writing {key}")
        return True

    async def promote(self, source: str, target: str) -> None:
        found = await self._head(source)
        if await self.size(target) is not None:
            return
        if found is None:
            raise BlobNotFoundError(f"{source} is not in the store")
        # An upload of its own, not `create_upload`: two leaders that copy at once must not mix their parts.
        upload_id = await self._new_upload(target)
        made = False
        try:
            made = await self._complete(target, upload_id, await self._copied(source, found, target, upload_id))
        finally:
            if not made:
                with contextlib.suppress(BlobStoreError):
                    await self.abort(target, upload_id)

    async def _copied(self, source: str, found: _Answer, target: str, upload_id: str) -> list[StoredPart]:
        parts: list[StoredPart] = []
        step = max(_COPY_PART, -(-found.length // _MAX_PARTS))
        for index, start in enumerate(range(0, found.length, step), start=1):
            end = min(start + step, found.length)
            headers = {
                "x-amz-copy-source": f"/{self._bucket}/{source}",
                "x-amz-copy-source-range": f"bytes={start}-{end - 1}",
                "x-amz-copy-source-if-match": found.etag,
            }
            query = {"partNumber": str(index), "uploadId": upload_id}
            answer = (await self._call("PUT", target, query, headers)).expect(f"copying {source}")
            parts.append(StoredPart(index, end - start, _text(answer.root(), "ETag").strip('"')))
        return parts

    async def delete(self, key: str) -> None:
        with contextlib.suppress(BlobNotFoundError):
            (await self._call("DELETE", key)).expect(f"deleting {key}")

    async def self_test(self) -> None:
        key = f"self-test/{secrets.token_hex(16)}"
        damaged = f"{key}-damaged"
        try:
            if not await self.put_if_absent(key, b"first"):
                raise StoreUnfitError("the object store refuses to create a new key")
            if await self.put_if_absent(key, b"second"):
                raise StoreUnfitError("the object store ignores If-None-Match: firmware could be overwritten")
            with contextlib.suppress(BlobStoreError):
                await self._put(damaged, b"other bytes", hashlib.sha256(b"these bytes").digest())
            if await self.size(damaged) is not None:
                raise StoreUnfitError("the object store ignores x-amz-checksum-sha256: it would keep damaged uploads")
        finally:
            await self.delete(key)
            await self.delete(damaged)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=_TIMEOUT, trust_env=False, auto_decompress=False)
        return self._session

    def _url(self, endpoint: str, key: str) -> str:
        return f"{endpoint}/{self._bucket}/{key}" if key else f"{endpoint}/{self._bucket}"

    async def _call(
        self,
        method: str,
        key: str,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> _Answer:
        """One request, tried again after a broken connection or a 5xx: each of them may be repeated."""
        problem = ""
        for attempt in range(_TRIES):
            if attempt:
                await asyncio.sleep(0.1 * 2**attempt)
            signed = dict(headers or {})
            target = self._url(self._endpoint, key)
            url = presign(self._credentials, method, target, query or {}, signed, _OWN_REQUEST_S)
            try:
                async with self._client().request(
                    method, URL(url, encoded=True), headers=signed, data=_payload(body), allow_redirects=False
                ) as response:
                    answer = await response.read()
                    if response.status < 500 or response.status == 501:
                        length = int(response.headers.get("Content-Length", 0))
                        etag = response.headers.get("ETag", "")
                        return _Answer(response.status, _error_code(answer), length, etag, answer)
                    problem = str(response.status)
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = type(error).__name__
        raise BlobStoreError(f"{method} {key}: {problem}")


def _payload(body: bytes) -> bytes | io.BytesIO:
    """A big body is sent piece by piece, so that it does not hold the event loop."""
    return io.BytesIO(body) if len(body) > CHUNK else body


def _error_code(body: bytes) -> str:
    if b"<Error" not in body[:300]:
        return ""
    try:
        return _text(ElementTree.fromstring(body), "Code", "unknown")  # noqa: S314 - our own store's answer
    except ElementTree.ParseError:
        return "unreadable"


def _stored_part(element: ElementTree.Element) -> StoredPart:
    checksum = _text(element, "ChecksumSHA256", "")
    return StoredPart(
        int(_text(element, "PartNumber")),
        int(_text(element, "Size")),
        _text(element, "ETag").strip('"'),
        base64.b64decode(checksum).hex() if checksum else "",
    )


def _checksum(part: StoredPart) -> str:
    if not part.sha256:
        return ""
    return f"<ChecksumSHA256>{base64.b64encode(bytes.fromhex(part.sha256)).decode()}</ChecksumSHA256>"


def _all(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if element.tag.rpartition("}")[2] == name]


def _text(element: ElementTree.Element, name: str, default: str | None = None) -> str:
    for child in element.iter():
        if child.tag.rpartition("}")[2] == name:
            return child.text or ""
    if default is None:
        raise BlobStoreError(f"the store's answer has no {name}")
    return default
