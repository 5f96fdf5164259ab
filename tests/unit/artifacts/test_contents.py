"""Reset, destruction and the collection of content, on the log and the store in memory."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator

import pytest
from groundswell.artifacts.v1 import artifacts_pb2 as pb

from libs.blobs import content_key, parse_content_key
from libs.blobs.memory import MemoryBlobStore
from libs.errors import GroundswellError
from libs.eventlog import Command, Deadline, TimerFired
from libs.eventlog.memory import MemoryLog
from services.artifacts import commands
from services.artifacts.state import upload_of
from tests.unit.artifacts.lab import PART, VERSION, B, Lab, Signer, bundle_request, parts_of, running

CONTENT = b"firmware"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
SIGNER = Signer()
FIRST, SECOND = content_key("acme", DIGEST), content_key("acme", DIGEST, 2)


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    async with running() as one:
        await one.version()
        await one.key(SIGNER)
        yield one


@pytest.fixture
async def hasty() -> AsyncIterator[Lab]:
    """Content goes as soon as nothing holds it."""
    async with running(grace_ms=0) as one:
        await one.version()
        await one.key(SIGNER)
        yield one


async def until_gone(lab: Lab, key: str) -> None:
    deadline = Deadline.after(10)
    while key in lab.blobs.objects or lab.open_tasks():
        await lab.runtime.changed("acme", deadline)


async def destroy(lab: Lab, name: str, **fields: object) -> pb.Binary:
    made: pb.Binary = await lab.call("DestroyBinary", pb.DestroyBinaryRequest(name=name, **fields))  # type: ignore[arg-type]
    return made


def test_a_content_key_says_whose_it_is() -> None:
    assert parse_content_key(SECOND) == ("acme", DIGEST, 2)
    for other in (f"sha256/1/{DIGEST}", f"sha256/acme/0/{DIGEST}", f"sha256/acme/1/{DIGEST[1:]}", "staging/x"):
        assert parse_content_key(other) is None


@pytest.mark.parametrize("state", ["HASHABLE", "SIGNABLE"])
async def test_a_reset_takes_the_parts_and_lets_declare_anew(lab: Lab, state: str) -> None:
    binary = await lab.binary(CONTENT)
    if state == "HASHABLE":
        parts = await lab.upload(binary.name, CONTENT)
        await lab.call("CompleteUpload", pb.CompleteUploadRequest(name=binary.name, parts=parts))
    else:
        await lab.hashed(binary.name, CONTENT)
    other = b"another image"
    request = pb.ResetBinaryRequest(name=binary.name, size=len(other), sha256=hashlib.sha256(other).hexdigest())
    fallen = await lab.call("ResetBinary", request)
    assert (fallen.state, fallen.size, fallen.sha256) == (B.STATE_UPLOADABLE, request.size, request.sha256)
    while lab.open_tasks():
        await lab.runtime.changed("acme", Deadline.after(10))
    assert not lab.blobs.uploads
    assert not [key for key in lab.blobs.objects if key.startswith("staging/")]
    assert await lab.refused("ResetBinary", request) == "WRONG_STATE"
    assert (await lab.hashed(binary.name, other)).state == B.STATE_SIGNABLE


async def test_a_reset_while_hashing_leaves_the_late_result_without_effect(lab: Lab) -> None:
    binary = await lab.binary(CONTENT)
    await lab.hashed(binary.name, CONTENT)
    await lab.call("ResetBinary", pb.ResetBinaryRequest(name=binary.name))
    late = commands.HashFinished(binary.name, "hash/gone", "staging/gone", DIGEST, len(CONTENT), FIRST)
    await lab.runtime.submit(Command("acme", late), Deadline.after(5))
    assert (await lab.get(binary.name)).state == B.STATE_UPLOADABLE


async def test_resets_that_are_refused(lab: Lab) -> None:
    binary = await lab.signed(SIGNER, CONTENT)
    assert await lab.refused("ResetBinary", pb.ResetBinaryRequest(name=binary.name)) == "WRONG_STATE"
    assert await lab.refused("ResetBinary", pb.ResetBinaryRequest(name=f"{binary.name}x")) == "RESOURCE_NOT_FOUND"
    other = await lab.binary(CONTENT, "o", "m7")
    await lab.hashed(other.name, CONTENT)
    stale = pb.ResetBinaryRequest(name=other.name, etag="1")
    assert await lab.refused("ResetBinary", stale) == "ETAG_MISMATCH"
    wrong = pb.ResetBinaryRequest(name=other.name, sha256="zz")
    assert await lab.refused("ResetBinary", wrong) == "INVALID_FIELD"
    assert (await lab.get(other.name)).state == B.STATE_SIGNABLE


async def test_destroying_leaves_a_tombstone_and_frees_the_target(lab: Lab) -> None:
    binary = await lab.signed(SIGNER, CONTENT)
    gone = await destroy(lab, binary.name, reason="recalled")
    assert (gone.state, gone.destroy_reason, gone.sha256) == (B.STATE_DESTROYED, "recalled", DIGEST)
    assert gone.HasField("destroy_time")
    before = lab.written()
    assert await destroy(lab, binary.name) == gone
    assert lab.written() == before
    for method, request in (
        ("SignBinary", pb.SignBinaryRequest(name=binary.name, signature=SIGNER(b"x"))),
        ("PresignDownload", pb.PresignDownloadRequest(name=binary.name)),
        ("ResetBinary", pb.ResetBinaryRequest(name=binary.name)),
        ("DeleteBinary", pb.DeleteBinaryRequest(name=binary.name)),
        (
            "UpdateBinary",
            pb.UpdateBinaryRequest(binary=pb.Binary(name=binary.name), update_mask={"paths": ["custom_metadata"]}),
        ),
    ):
        assert await lab.refused(method, request) == "WRONG_STATE", method
    assert await lab.refused("CreateBundle", bundle_request(binary.name)) == "BINARY_NOT_SIGNED"
    assert (await lab.binary(CONTENT, "again")).target == binary.target
    assert FIRST in lab.blobs.objects, "the grace time is not over"


async def test_only_what_is_signed_can_be_destroyed(lab: Lab) -> None:
    binary = await lab.binary(CONTENT)
    assert await lab.refused("DestroyBinary", pb.DestroyBinaryRequest(name=binary.name)) == "WRONG_STATE"


async def test_a_bundle_that_may_be_offered_keeps_its_binary(lab: Lab) -> None:
    binary = await lab.signed(SIGNER, CONTENT)
    bundle = await lab.sign_bundle(await lab.bundle(binary.name), SIGNER)
    assert await lab.refused("DestroyBinary", pb.DestroyBinaryRequest(name=binary.name)) == "RESOURCE_IN_USE"
    silent = pb.DestroyBinaryRequest(name=binary.name, force=True)
    assert await lab.refused("DestroyBinary", silent) == "INVALID_FIELD"
    assert (await lab.lookup(bundle.name)).offerable
    await destroy(lab, binary.name, force=True, reason="a secret is in it")
    after = await lab.lookup(bundle.name)
    assert (after.offerable, after.not_offerable_reason) == (False, "BINARY_DESTROYED")


async def test_content_goes_when_the_last_holder_has_gone(hasty: Lab) -> None:
    one = await hasty.signed(SIGNER, CONTENT, "one", "m4")
    two = await hasty.signed(SIGNER, CONTENT, "two", "m7")
    await destroy(hasty, one.name)
    assert FIRST in hasty.blobs.objects
    await destroy(hasty, two.name)
    await until_gone(hasty, FIRST)
    again = await hasty.binary(CONTENT, "three")
    assert (await hasty.hashed(again.name, CONTENT)).state == B.STATE_SIGNABLE
    assert list(hasty.blobs.objects) == [SECOND], "a key once deleted is never written again"


async def test_another_holder_in_the_grace_time_keeps_the_content() -> None:
    log, blobs = MemoryLog(partitions=4), MemoryBlobStore()
    async with running(log, blobs, grace_ms=3_600_000) as lab:
        await lab.version()
        await lab.key(SIGNER)
        gone = await lab.signed(SIGNER, CONTENT)
        await destroy(lab, gone.name)
        kept = await lab.binary(CONTENT, "kept")
        await lab.hashed(kept.name, CONTENT)
        fired = TimerFired(f"collect/{FIRST}", "collect", FIRST.encode())
        before = lab.written()
        await lab.runtime.submit(Command("acme", fired), Deadline.after(5))
        assert lab.written() == before
        assert FIRST in blobs.objects


async def test_an_upload_that_races_with_the_collection_gets_its_bytes(hasty: Lab) -> None:
    """Interleaving: declared and uploaded, then the old content is condemned and deleted, then it is hashed."""
    gone = await hasty.signed(SIGNER, CONTENT)
    late = await hasty.binary(CONTENT, "late", "m7")
    parts = await hasty.upload(late.name, CONTENT)
    await hasty.call("CompleteUpload", pb.CompleteUploadRequest(name=late.name, parts=parts))
    await destroy(hasty, gone.name)
    await until_gone(hasty, FIRST)
    await hasty.call("HashBinary", pb.HashBinaryRequest(name=late.name))
    assert (await hasty.until_hashed(late.name)).state == B.STATE_SIGNABLE
    assert upload_of(hasty.runtime.snapshot("acme").state, late.name).blob_key == SECOND  # type: ignore[arg-type]
    assert hasty.blobs.objects[SECOND] == CONTENT


async def test_a_key_is_held_before_it_is_written(hasty: Lab) -> None:
    """Interleaving: hashing has begun when the last other holder goes; the collection must not take the key."""
    gone = await hasty.signed(SIGNER, CONTENT)
    late = await hasty.binary(CONTENT, "late", "m7")
    parts = await hasty.upload(late.name, CONTENT)
    await hasty.call("CompleteUpload", pb.CompleteUploadRequest(name=late.name, parts=parts))
    await hasty.call("HashBinary", pb.HashBinaryRequest(name=late.name))
    await destroy(hasty, gone.name)
    assert (await hasty.until_hashed(late.name)).state == B.STATE_SIGNABLE
    assert hasty.blobs.objects == {FIRST: CONTENT}


async def test_the_reference_count_comes_back_from_the_log() -> None:
    log, blobs = MemoryLog(partitions=4), MemoryBlobStore()
    async with running(log, blobs, grace_ms=0) as lab:
        await lab.version()
        await lab.key(SIGNER)
        gone = await lab.signed(SIGNER, CONTENT)
        await destroy(lab, gone.name)
        await until_gone(lab, FIRST)
    async with running(log, blobs, grace_ms=0) as lab:
        again = await lab.binary(CONTENT, "again")
        await lab.hashed(again.name, CONTENT)
        assert list(blobs.objects) == [SECOND]


async def test_what_was_never_signed_can_be_deleted(lab: Lab) -> None:
    binary = await lab.binary(CONTENT)
    await lab.upload(binary.name, CONTENT)
    assert (
        await lab.refused("DeleteArtifactVersion", pb.DeleteArtifactVersionRequest(name=VERSION)) == "RESOURCE_IN_USE"
    )
    artifact = VERSION.rpartition("/versions/")[0]
    assert await lab.refused("DeleteArtifact", pb.DeleteArtifactRequest(name=artifact)) == "RESOURCE_IN_USE"
    await lab.call("DeleteBinary", pb.DeleteBinaryRequest(name=binary.name))
    while lab.open_tasks():
        await lab.runtime.changed("acme", Deadline.after(10))
    assert not lab.blobs.uploads
    assert await lab.refused("GetBinary", pb.GetBinaryRequest(name=binary.name)) == "RESOURCE_NOT_FOUND"
    again = await lab.binary(CONTENT)
    assert int(again.etag) > int(binary.etag)
    await lab.call("DeleteBinary", pb.DeleteBinaryRequest(name=again.name))
    await lab.call("DeleteArtifactVersion", pb.DeleteArtifactVersionRequest(name=VERSION))
    await lab.call("DeleteArtifact", pb.DeleteArtifactRequest(name=artifact))
    assert await lab.refused("DeleteArtifact", pb.DeleteArtifactRequest(name=artifact)) == "RESOURCE_NOT_FOUND"
    signed = pb.DeleteBinaryRequest(name=again.name)
    assert await lab.refused("DeleteBinary", signed) == "RESOURCE_NOT_FOUND"


async def test_a_signed_binary_cannot_be_deleted(lab: Lab) -> None:
    binary = await lab.signed(SIGNER, CONTENT)
    assert await lab.refused("DeleteBinary", pb.DeleteBinaryRequest(name=binary.name)) == "WRONG_STATE"


async def test_fields_that_may_change(lab: Lab) -> None:
    binary = await lab.binary(CONTENT)
    artifact = VERSION.rpartition("/versions/")[0]
    mask = {"paths": ["custom_metadata"]}
    for method, request in (
        (
            "UpdateArtifact",
            pb.UpdateArtifactRequest(artifact=pb.Artifact(name=artifact, custom_metadata='{"a": 1}'), update_mask=mask),
        ),
        (
            "UpdateArtifactVersion",
            pb.UpdateArtifactVersionRequest(
                artifact_version=pb.ArtifactVersion(name=VERSION, custom_metadata='{"a": 1}'), update_mask=mask
            ),
        ),
        (
            "UpdateBinary",
            pb.UpdateBinaryRequest(binary=pb.Binary(name=binary.name, custom_metadata='{"a": 1}'), update_mask=mask),
        ),
    ):
        changed = await lab.call(method, request)
        assert changed.custom_metadata == '{"a":1}'
        before = lab.written()
        assert await lab.call(method, request) == changed
        assert lab.written() == before, "nothing new is nothing written"
        field = next(one for one in request.DESCRIPTOR.fields_by_name if one not in ("update_mask", "request_id"))
        getattr(request, field).etag = "1"
        assert await lab.refused(method, request) == "ETAG_MISMATCH"
        getattr(request, field).etag = changed.etag
        getattr(request, field).custom_metadata = "[]"
        assert await lab.refused(method, request) == "INVALID_FIELD"
        request.update_mask.paths[:] = ["name"]
        assert await lab.refused(method, request) == "INVALID_FIELD"
        del request.update_mask.paths[:]
        assert await lab.refused(method, request) == "INVALID_FIELD"


async def test_a_bundle_keeps_the_metadata_it_was_made_with(lab: Lab) -> None:
    binary = await lab.signed(SIGNER, CONTENT)
    bundle = await lab.bundle(binary.name)
    changed = pb.Binary(name=binary.name, custom_metadata='{"later": true}')
    request = pb.UpdateBinaryRequest(binary=changed, update_mask={"paths": ["custom_metadata"]})
    await lab.call("UpdateBinary", request)
    after = await lab.lookup(bundle.name)
    assert (after.entries[0].metadata, after.digest) == ("{}", bundle.digest)
    later = await lab.bundle(binary.name, bundle_id="two")
    assert later.entries[0].metadata == '{"later":true}'
    named = pb.UpdateBundleRequest(
        bundle=pb.Bundle(name=bundle.name, display_name="First", version="9.9.9"),
        update_mask={"paths": ["display_name"]},
    )
    renamed = await lab.call("UpdateBundle", named)
    assert (renamed.display_name, renamed.version, renamed.digest) == ("First", "1.2.3", bundle.digest)
    named.update_mask.paths[:] = ["version"]
    assert await lab.refused("UpdateBundle", named) == "INVALID_FIELD"


async def test_metadata_that_fits_is_taken_with_its_answer_and_more_is_refused(lab: Lab) -> None:
    """A command with a request id carries its answer in its record: the two have to fit together."""
    most = '{"a":"' + "x" * (430_000 - 8) + '"}'
    artifact = VERSION.rpartition("/versions/")[0]
    request = pb.UpdateArtifactRequest(
        artifact=pb.Artifact(name=artifact, custom_metadata=most),
        update_mask={"paths": ["custom_metadata"]},
        request_id=str(uuid.uuid4()),
    )
    assert (await lab.call("UpdateArtifact", request)).custom_metadata == most
    request.artifact.custom_metadata, request.request_id = most.replace("x", "xx", 1), str(uuid.uuid4())
    assert await lab.refused("UpdateArtifact", request) == "INVALID_FIELD"
    binary = await lab.signed(SIGNER, CONTENT)
    made = await lab.call("CreateBundle", bundle_request(binary.name, request_id=str(uuid.uuid4())))
    assert made.entries[0].metadata == most


async def test_stored_parts_are_listed_for_whoever_resumes(lab: Lab) -> None:
    content = bytes(PART) + b"tail"
    binary = await lab.binary(content)
    request = pb.ListUploadPartsRequest(name=binary.name)
    assert not (await lab.call("ListUploadParts", request)).parts
    parts = parts_of(content)
    answer = await lab.call("PresignParts", pb.PresignPartsRequest(name=binary.name, parts=parts))
    assert [part.state for part in answer.parts] == [pb.PART_STATE_UPLOADABLE] * 2
    await lab.blobs.put_part(answer.parts[1].url, dict(answer.parts[1].headers), b"tail")
    listed = (await lab.call("ListUploadParts", request)).parts
    assert [(part.index, part.size, part.state) for part in listed] == [(2, 4, pb.PART_STATE_VALID)]
    parts[1].size = 5
    again = await lab.call("PresignParts", pb.PresignPartsRequest(name=binary.name, parts=parts))
    assert [part.state for part in again.parts] == [pb.PART_STATE_UPLOADABLE, pb.PART_STATE_INVALID_SIZE]
    with pytest.raises(GroundswellError, match="WRONG_STATE"):
        await lab.call(
            "ListUploadParts", pb.ListUploadPartsRequest(name=(await lab.signed(SIGNER, b"x", "s", "s")).name)
        )
