"""One suite for every ``BlobStore``: the real S3 server and the fake that unit tests use."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import aiohttp
import pytest
from yarl import URL

from libs.blobs import BlobNotFoundError, BlobStore, BlobStoreError, StoredPart
from libs.blobs.memory import MemoryBlobStore
from libs.blobs.s3 import S3BlobStore
from libs.blobs.sigv4 import Credentials
from libs.blobs.snapshots import BlobSnapshotStore
from libs.eventlog.ports import SnapshotStore
from tests.conftest import S3

FIRST = os.urandom(5 * 1024 * 1024)
LAST = b"the rest"

Put = Callable[[str, Mapping[str, str], bytes], Awaitable[None]]


async def _http_put(url: str, headers: Mapping[str, str], data: bytes) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.put(URL(url, encoded=True), headers=headers, data=io.BytesIO(data)) as response,
    ):
        if response.status != 200:
            raise BlobStoreError(f"the part is refused: {response.status}")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Fixture:
    """A store, and how its clients put parts."""

    def __init__(self, store: Any, put: Put) -> None:
        self.store: BlobStore = store
        self.put = put

    async def upload(self, key: str, *parts: bytes) -> tuple[str, list[StoredPart]]:
        upload_id = await self.store.create_upload(key)
        for index, data in enumerate(parts, start=1):
            await self.put(*await self.store.presign_part(key, upload_id, index, sha256(data), 60), data)
        return upload_id, list(await self.store.list_parts(key, upload_id))

    async def content(self, key: str) -> bytes:
        return b"".join([chunk async for chunk in self.store.stream(key)])


@pytest.fixture(params=["memory", "s3"])
async def blobs(request: pytest.FixtureRequest) -> AsyncIterator[Fixture]:
    if request.param == "memory":
        memory = MemoryBlobStore()
        yield Fixture(memory, memory.put_part)
        return
    s3: S3 = request.getfixturevalue("s3")
    store = S3BlobStore(s3.endpoint, s3.endpoint, s3.bucket, Credentials(s3.access_key, s3.secret_key, "us-east-1"))
    yield Fixture(store, _http_put)
    await store.close()


async def test_an_upload_in_parts_becomes_their_content(blobs: Fixture) -> None:
    upload_id, parts = await blobs.upload("staging/a", FIRST, LAST)
    assert [(part.index, part.size) for part in parts] == [(1, len(FIRST)), (2, len(LAST))]
    assert await blobs.store.size("staging/a") is None
    await blobs.store.complete("staging/a", upload_id, parts)
    assert await blobs.store.size("staging/a") == len(FIRST) + len(LAST)
    assert await blobs.content("staging/a") == FIRST + LAST


async def test_an_open_upload_is_found_again_with_its_parts(blobs: Fixture) -> None:
    upload_id, parts = await blobs.upload("staging/a", FIRST)
    assert await blobs.store.create_upload("staging/a") == upload_id
    assert await blobs.store.create_upload("staging/ab") != upload_id
    assert await blobs.store.list_parts("staging/a", upload_id) == parts


async def test_a_part_is_overwritten_by_its_index(blobs: Fixture) -> None:
    upload_id, _ = await blobs.upload("staging/a", b"one")
    await blobs.put(*await blobs.store.presign_part("staging/a", upload_id, 1, sha256(b"other"), 60), b"other")
    await blobs.store.complete("staging/a", upload_id, await blobs.store.list_parts("staging/a", upload_id))
    assert await blobs.content("staging/a") == b"other"


async def test_a_part_with_other_bytes_is_refused_and_not_kept(blobs: Fixture) -> None:
    upload_id = await blobs.store.create_upload("staging/a")
    url, headers = await blobs.store.presign_part("staging/a", upload_id, 1, sha256(b"right"), 60)
    with pytest.raises(BlobStoreError):
        await blobs.put(url, headers, b"wrong")
    assert await blobs.store.list_parts("staging/a", upload_id) == []
    await blobs.put(url, headers, b"right")


async def test_the_checksum_cannot_be_left_out_or_replaced(blobs: Fixture) -> None:
    upload_id = await blobs.store.create_upload("staging/a")
    url, _ = await blobs.store.presign_part("staging/a", upload_id, 1, sha256(b"right"), 60)
    _, others = await blobs.store.presign_part("staging/a", upload_id, 1, sha256(b"wrong"), 60)
    for sent in ({}, others):
        with pytest.raises(BlobStoreError):
            await blobs.put(url, sent, b"wrong")
    assert await blobs.store.list_parts("staging/a", upload_id) == []


async def test_a_tampered_link_is_refused(blobs: Fixture) -> None:
    upload_id = await blobs.store.create_upload("staging/a")
    url, headers = await blobs.store.presign_part("staging/a", upload_id, 1, sha256(b"x"), 60)
    for tampered in (url.replace("staging/a", "staging/b"), url[:-1] + ("0" if url[-1] != "0" else "1")):
        with pytest.raises(BlobStoreError):
            await blobs.put(tampered, headers, b"x")


async def test_an_expired_link_is_refused(blobs: Fixture) -> None:
    upload_id = await blobs.store.create_upload("staging/a")
    url, headers = await blobs.store.presign_part("staging/a", upload_id, 1, sha256(b"x"), 1)
    deadline = asyncio.get_running_loop().time() + 15
    while True:
        try:
            await blobs.put(url, headers, b"x")
        except BlobStoreError:
            break
        assert asyncio.get_running_loop().time() < deadline, "the link still works"
        await asyncio.sleep(0.2)


async def test_complete_refuses_parts_that_changed(blobs: Fixture) -> None:
    upload_id, parts = await blobs.upload("staging/a", b"one")
    await blobs.put(*await blobs.store.presign_part("staging/a", upload_id, 1, sha256(b"two"), 60), b"two")
    with pytest.raises(BlobStoreError):
        await blobs.store.complete("staging/a", upload_id, parts)
    assert await blobs.store.size("staging/a") is None


async def test_an_aborted_upload_takes_its_parts_along(blobs: Fixture) -> None:
    upload_id, _ = await blobs.upload("staging/a", b"one")
    await blobs.store.abort("staging/a", upload_id)
    await blobs.store.abort("staging/a", upload_id)
    try:
        left = await blobs.store.list_parts("staging/a", upload_id)
    except BlobNotFoundError:
        left = []
    assert left == []


async def test_promotion_copies_once_and_never_overwrites(blobs: Fixture) -> None:
    await blobs.store.put_if_absent("staging/a", b"content")
    await blobs.store.put_if_absent("staging/b", b"other")
    for source in ("staging/a", "staging/a", "staging/b"):
        await blobs.store.promote(source, "sha256/1/key")
    assert await blobs.content("sha256/1/key") == b"content"
    with pytest.raises(BlobNotFoundError):
        await blobs.store.promote("staging/none", "sha256/1/none")


async def test_promotions_at_once_leave_one_whole_object(blobs: Fixture) -> None:
    await blobs.store.put_if_absent("staging/a", b"content")
    await asyncio.gather(*(blobs.store.promote("staging/a", "sha256/1/key") for _ in range(6)))
    assert await blobs.content("sha256/1/key") == b"content"


async def test_create_only(blobs: Fixture) -> None:
    assert await blobs.store.put_if_absent("one", b"first")
    assert not await blobs.store.put_if_absent("one", b"second")
    assert await blobs.content("one") == b"first"


async def test_what_is_deleted_is_gone_and_deleting_again_is_fine(blobs: Fixture) -> None:
    await blobs.store.put_if_absent("one", b"first")
    await blobs.store.delete("one")
    await blobs.store.delete("one")
    assert await blobs.store.size("one") is None
    with pytest.raises(BlobNotFoundError):
        await blobs.content("one")


async def test_a_fit_store_passes_its_self_test(blobs: Fixture) -> None:
    await blobs.store.self_test()


async def test_keys_are_listed_by_prefix(blobs: Fixture) -> None:
    folder = f"listed-{os.urandom(6).hex()}"
    names = [f"{folder}/a/{number:04d}" for number in range(7)]
    await asyncio.gather(*(blobs.store.put_if_absent(name, b"x") for name in (*names, f"{folder}/b")))
    assert sorted(await blobs.store.keys(f"{folder}/a/")) == names
    assert await blobs.store.keys(f"{folder}/none/") == []
    await asyncio.gather(*(blobs.store.delete(name) for name in (*names, f"{folder}/b")))
    assert await blobs.store.keys(folder) == []


async def test_snapshots_are_kept_in_it(blobs: Fixture) -> None:
    async def close() -> None:
        """The fixture does."""

    store: SnapshotStore = BlobSnapshotStore(blobs.store, close)
    folder = f"snapshots-{os.urandom(6).hex()}/0/"
    await store.write(f"{folder}1", FIRST)
    await store.write(f"{folder}1", b"the same position again")
    assert await store.names(folder) == [f"{folder}1"]
    assert await store.read(f"{folder}1") == FIRST
    await store.delete(f"{folder}1")
    await store.delete(f"{folder}1")
    with pytest.raises(BlobNotFoundError):
        await store.read(f"{folder}1")
