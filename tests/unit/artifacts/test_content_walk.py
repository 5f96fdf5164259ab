"""A random walk over everything that takes up and gives up content, with hardly any grace time.

Whatever the order: what is held and said to be there is there, and a key once deleted is never written again.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from typing import Any

import pytest
from groundswell.artifacts.v1 import artifacts_pb2 as pb

from libs.blobs import BlobStoreError
from libs.blobs.memory import MemoryBlobStore
from libs.errors import GroundswellError
from libs.eventlog import Deadline
from tests.unit.artifacts.lab import VERSION, B, Lab, Signer, running

CONTENTS = tuple(f"image {n}".encode() for n in range(5))
SIGNER = Signer()
STEPS = 120
RACED = ("WRONG_STATE", "RESOURCE_NOT_FOUND", "PARTS_MISSING", "OBJECT_STORE_UNAVAILABLE", "UPLOAD_CHANGED")
"""What an operator may be told because another was quicker."""


class WatchedStore(MemoryBlobStore):
    """Knows every content key that was ever deleted."""

    def __init__(self) -> None:
        super().__init__()
        self.deleted: set[str] = set()
        self.reborn: set[str] = set()

    def _written(self, key: str) -> None:
        if key in self.deleted:
            self.reborn.add(key)

    async def promote(self, source: str, target: str) -> None:
        await asyncio.sleep(0)
        await super().promote(source, target)
        self._written(target)

    async def put_if_absent(self, key: str, data: bytes) -> bool:
        await asyncio.sleep(0)
        self._written(key)
        return await super().put_if_absent(key, data)

    async def delete(self, key: str) -> None:
        await asyncio.sleep(0)
        if key.startswith("sha256/"):
            self.deleted.add(key)
        await super().delete(key)


class Walk:
    """What random operators do, one step or two at once."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab = lab
        self.dice = random.Random(seed)
        self.made = 0
        self.content: dict[str, bytes] = {}
        """By resource name."""

    async def step(self) -> None:
        name = self.dice.choice(list(self.content)) if self.content else ""
        steps: list[Any] = [self.binary, self.attachment]
        if name:
            steps += [lambda: self.onward(name)] * 4 + [lambda: self.back(name)] * 3
        try:
            await self.dice.choice(steps)()
        except BlobStoreError:
            pass  # a client's link, whose upload another operator gave up meanwhile
        except GroundswellError as error:
            if error.reason not in RACED:
                raise

    def _new(self) -> tuple[str, bytes]:
        self.made += 1
        return f"n{self.made}", self.dice.choice(CONTENTS)

    async def binary(self) -> None:
        name, content = self._new()
        self.content[(await self.lab.binary(content, name, name)).name] = content

    async def attachment(self) -> None:
        name, content = self._new()
        wanted = pb.Attachment(kind=pb.Attachment.KIND_OTHER, media_type="text/plain")
        request = pb.CreateAttachmentRequest(
            parent=VERSION, attachment_id=name, attachment=wanted, content=content, request_id=""
        )
        self.content[(await self.lab.call("CreateAttachment", request)).name] = content

    async def onward(self, name: str) -> None:
        if "/attachments/" in name:
            return
        content = self.content[name]
        match (await self.lab.get(name)).state:
            case B.STATE_UPLOADABLE:
                parts = await self.lab.upload(name, content)
                await self.lab.call("CompleteUpload", pb.CompleteUploadRequest(name=name, parts=parts))
            case B.STATE_HASHABLE:
                await self.lab.call("HashBinary", pb.HashBinaryRequest(name=name))
            case B.STATE_SIGNABLE:
                digest = hashlib.sha256(content).hexdigest().encode()
                await self.lab.call("SignBinary", pb.SignBinaryRequest(name=name, signature=SIGNER(digest)))

    async def back(self, name: str) -> None:
        if "/attachments/" in name:
            await self.lab.call("DeleteAttachment", pb.DeleteAttachmentRequest(name=name))
            self.content.pop(name, None)
            return
        match (await self.lab.get(name)).state:
            case B.STATE_SIGNED:
                await self.lab.call("DestroyBinary", pb.DestroyBinaryRequest(name=name))
            case B.STATE_DESTROYED:
                self.content.pop(name, None)
            case B.STATE_HASHABLE | B.STATE_SIGNABLE if self.dice.random() < 0.5:
                await self.lab.call("ResetBinary", pb.ResetBinaryRequest(name=name))
            case _:
                await self.lab.call("DeleteBinary", pb.DeleteBinaryRequest(name=name))
                self.content.pop(name, None)

    async def leave(self) -> None:
        """Give everything up, one after the other."""
        for name in list(self.content):
            while name in self.content:
                await self.back(name)

    def check(self) -> None:
        """What is said to be there is there."""
        state: Any = self.lab.runtime.snapshot("acme").state
        held = dict(state.binaries.get(f"{VERSION}/binaries") or {})
        held.update(state.attachments.get(f"{VERSION}/attachments") or {})
        for name, known in held.items():
            there = (B.STATE_SIGNABLE, B.STATE_SIGNED) if isinstance(known, B) else (pb.Attachment.STATE_STORED,)
            if known.state in there:
                key = state.uploads[name].blob_key
                assert hashlib.sha256(self.lab.blobs.objects[key]).hexdigest() == known.sha256, name
                assert name in state.holders[key], name


@pytest.mark.parametrize("grace_ms", [0, 50])
@pytest.mark.parametrize("seed", range(4))
async def test_content_is_there_while_it_is_held_and_its_key_is_used_once(seed: int, grace_ms: int) -> None:
    blobs = WatchedStore()
    async with running(blobs=blobs, grace_ms=grace_ms) as lab:
        await lab.version()
        await lab.key(SIGNER)
        walk = Walk(lab, seed)
        for _ in range(STEPS):
            await asyncio.gather(*(walk.step() for _ in range(walk.dice.choice((1, 1, 2, 3)))))
            walk.check()
        while lab.open_tasks():
            await lab.runtime.changed("acme", Deadline.after(10))
        walk.check()
        await walk.leave()  # a quick walk takes everything up again before its grace time is over
        assert not blobs.reborn
        state: Any = lab.runtime.snapshot("acme").state
        held = {key for key in state.holders if state.holders[key]}
        left = {key for key in blobs.objects if key.startswith("sha256/")} - held
        for key in left:  # its timer may not have fired yet
            deadline = Deadline.after(10)
            while key in blobs.objects:
                await lab.runtime.changed("acme", deadline)
        assert blobs.deleted, "the walk has to collect something, or it tests nothing"
