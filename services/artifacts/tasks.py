"""Outgoing work: the server hashes what was uploaded, itself, whole; and clears away what was only staged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

from libs.blobs import BlobNotFoundError, BlobStore
from libs.eventlog import Command, Task, TaskContext, TaskHandler
from services.artifacts.binaries import ABORT, HASH
from services.artifacts.bundles import JUDGE
from services.artifacts.commands import HashFinished, JudgeProduct
from services.artifacts.contents import DROP
from services.artifacts.state import State, find, upload_of


class _Digests(NamedTuple):
    sha256: str
    size: int
    sha1: str
    md5: str


class ArtifactsTasks:
    """Handlers by kind. Each may run again after any fail-over."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    def handlers(self) -> Mapping[str, TaskHandler]:
        """For the runtime."""
        return {HASH: self.hash, DROP: self.drop, ABORT: self.abort, JUDGE: self.judge}

    async def hash(self, task: Task, ctx: TaskContext) -> Command | None:
        """Read the staged object once, and promote it when it is what was declared.

        Only these bytes count. That content of the declared digest exists already, perhaps another organization's,
        proves nothing about who asks. A staged object that the store has lost is an upload of no bytes.
        """
        name = task.payload.decode()
        state = ctx.snapshot().state
        assert isinstance(state, State)  # noqa: S101 - the runtime was built for this domain
        binary, upload = find(state.binaries, name), upload_of(state, name)
        if binary is None or task.task_id != f"{HASH}/{upload.staging_key}":
            return None
        found = await self._digests(upload.staging_key)
        target = upload.blob_key
        if (found.sha256, found.size) == (binary.sha256, binary.size):
            await self._blobs.promote(upload.staging_key, target)
        finished = HashFinished(
            name, task.task_id, upload.staging_key, found.sha256, found.size, target, found.sha1, found.md5
        )
        return Command(task.organization, finished)

    async def drop(self, task: Task, ctx: TaskContext) -> Command | None:  # noqa: ARG002 - the key says it all
        """Delete objects that nothing refers to."""
        for key in task.payload.decode().split("\n"):
            await self._blobs.delete(key)
        return None

    async def abort(self, task: Task, ctx: TaskContext) -> Command | None:  # noqa: ARG002 - the payload says it all
        """Clear away an upload, and the object if one was made of it."""
        key, _, upload_id = task.payload.decode().partition("\n")
        if upload_id:
            await self._blobs.abort(key, upload_id)
        await self._blobs.delete(key)
        return None

    async def judge(self, task: Task, ctx: TaskContext) -> Command | None:  # noqa: ARG002 - the decision sees the state
        """Go on with judging a product's bundles, a chunk at a time."""
        product, _, after = task.payload.decode().partition("\n")
        return Command(task.organization, JudgeProduct(product, after, task.task_id))

    async def _digests(self, key: str) -> _Digests:
        """All in one reading. SHA-1 and MD5 are for clients of older protocols and prove nothing."""
        whole, size = hashlib.sha256(), 0
        sha1, md5 = hashlib.sha1(usedforsecurity=False), hashlib.md5(usedforsecurity=False)
        try:
            async for chunk in self._blobs.stream(key):
                for digest in (whole, sha1, md5):
                    digest.update(chunk)
                size += len(chunk)
        except BlobNotFoundError:
            return _Digests("", 0, "", "")
        return _Digests(whole.hexdigest(), size, sha1.hexdigest(), md5.hexdigest())
