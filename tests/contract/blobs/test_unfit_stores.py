"""A store that breaks a promise is named in one line when a service starts, not found out later."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from libs.blobs import BlobStoreError, StoreUnfitError
from libs.blobs.s3 import S3BlobStore
from libs.blobs.sigv4 import Credentials

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class LaxStore:
    """Keeps what it is sent; ``create_only`` and ``checksums`` say which promises it keeps."""

    def __init__(self, *, create_only: bool, checksums: bool) -> None:
        self._create_only = create_only
        self._checksums = checksums
        self.objects: set[str] = set()

    async def handle(self, request: web.Request) -> web.Response:
        if request.method == "PUT":
            damaged = request.path.endswith("-damaged")
            if (self._checksums and damaged) or (self._create_only and request.path in self.objects):
                return web.Response(status=400 if damaged else 412)
            self.objects.add(request.path)
        elif request.method == "DELETE":
            self.objects.discard(request.path)
            return web.Response(status=204)
        elif request.path not in self.objects:
            return web.Response(status=404)
        return web.Response()


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[S3BlobStore]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
    store = S3BlobStore(endpoint, endpoint, "bucket", Credentials("key", "not-to-be-shown", "us-east-1"))
    yield store
    await store.close()
    await runner.cleanup()


@pytest.mark.parametrize(
    ("create_only", "checksums", "named"),
    [(False, True, "If-None-Match"), (True, False, "x-amz-checksum-sha256")],
)
async def test_the_broken_promise_is_named_and_nothing_is_left(create_only: bool, checksums: bool, named: str) -> None:
    lax = LaxStore(create_only=create_only, checksums=checksums)
    async with served(lax.handle) as store:
        with pytest.raises(StoreUnfitError, match=named) as refused:
            await store.start()
    assert "\n" not in str(refused.value)
    assert lax.objects == set()


async def test_a_store_that_keeps_both_is_taken() -> None:
    async with served(LaxStore(create_only=True, checksums=True).handle) as store:
        await store.start()


async def test_a_store_in_trouble_is_tried_again_and_then_named_without_link_or_secret() -> None:
    calls = 0

    async def trouble(_: web.Request) -> web.Response:
        nonlocal calls
        calls += 1
        return web.Response(status=503)

    async with served(trouble) as store:
        with pytest.raises(BlobStoreError, match="503") as refused:
            await store.size("key")
    assert calls == 3
    assert "X-Amz" not in str(refused.value)
    assert "not-to-be-shown" not in str(refused.value)
