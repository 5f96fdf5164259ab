"""Outgoing work: the server hashes what was uploaded, itself, whole."""

from __future__ import annotations

import hashlib

from libs.blobs import BlobNotFoundError, BlobStore, content_key
from libs.eventlog import Command, Task, TaskContext
from services.artifacts.state import HashFinished, State, Upload


class HashTask:
    """Streams the staged object once, and promotes it to its content key when it is what was declared.

    Safe to repeat: promotion is create-only, and a staged object that is gone was promoted or forgotten before.
    """

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    async def __call__(self, task: Task, ctx: TaskContext) -> Command | None:
        """Hash one binary."""
        name = task.payload.decode()
        state: State = ctx.snapshot().state  # type: ignore[assignment]
        binary = state.binaries[name]
        upload = state.uploads.get(name, Upload())
        digest, size = await self._digest(upload.staging_key)
        if not digest:
            digest, size = await self._digest(content_key(binary.sha256))
        target = content_key(binary.sha256)
        if (digest, size) == (binary.sha256, binary.size):
            await self._blobs.promote(upload.staging_key, target)
        await self._blobs.delete(upload.staging_key)
        return Command(task.organization, HashFinished(name, task.task_id, digest, size, target), principal="task")

    async def _digest(self, key: str) -> tuple[str, int]:
        whole, size = hashlib.sha256(), 0
        try:
            async for chunk in self._blobs.stream(key):
                whole.update(chunk)
                size += len(chunk)
        except BlobNotFoundError:
            return "", 0
        return whole.hexdigest(), size
