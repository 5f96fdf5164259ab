"""Snapshots of folds in the object store: an adapter of ``libs.eventlog.ports.SnapshotStore``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from libs.blobs import BlobStore


class BlobSnapshotStore:
    """Names are keys. What exists is never overwritten: equal positions of equal schemas hold equal folds."""

    def __init__(self, blobs: BlobStore, close: Callable[[], Awaitable[None]]) -> None:
        self._blobs = blobs
        self._close = close

    async def names(self, prefix: str) -> Sequence[str]:
        return await self._blobs.keys(prefix)

    async def read(self, name: str) -> bytes:
        return b"".join([chunk async for chunk in self._blobs.stream(name)])

    async def write(self, name: str, data: bytes) -> None:
        await self._blobs.put_if_absent(name, data)

    async def delete(self, name: str) -> None:
        await self._blobs.delete(name)

    async def close(self) -> None:
        await self._close()
