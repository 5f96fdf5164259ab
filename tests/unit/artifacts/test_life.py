"""The life of a binary and what bundles are worth, on the log and the store in memory."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

import pytest
from groundswell.artifacts.v1 import artifacts_pb2 as pb

from libs.blobs import BlobStoreError, content_key
from libs.blobs.memory import MemoryBlobStore
from libs.eventlog.memory import MemoryLog
from libs.trust.statement import parse
from tests.unit.artifacts.lab import OTHER, PART, PRODUCT, VERSION, B, Lab, Signer, bundle_request, parts_of, running

CONTENT = b"firmware"
SIGNER = Signer()


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    async with running() as one:
        await one.version()
        yield one


async def test_from_declaration_to_offerable(lab: Lab) -> None:
    await lab.key(SIGNER)
    content = bytes(PART) + b"tail"
    binary = await lab.signed(SIGNER, content)
    assert binary.state == B.STATE_SIGNED
    assert list(lab.blobs.objects) == [content_key("acme", binary.sha256)]
    assert binary.sha1 == hashlib.sha1(content, usedforsecurity=False).hexdigest()
    assert binary.md5 == hashlib.md5(content, usedforsecurity=False).hexdigest()
    bundle = await lab.bundle(binary.name)
    assert (bundle.offerable, bundle.not_offerable_reason) == (False, "SIGNATURES_MISSING")
    statement = parse(bundle.statement)
    assert (statement.product, statement.version, statement.security_version) == (PRODUCT, "1.2.3", 7)
    assert statement.digest() == bundle.digest
    bundle = await lab.sign_bundle(bundle, SIGNER)
    assert bundle.offerable
    assert list(bundle.public_keys) == [SIGNER.public]
    assert await lab.lookup(bundle.name) == bundle


async def test_other_bytes_lead_back_to_uploadable_and_a_new_upload(lab: Lab) -> None:
    binary = await lab.binary(CONTENT)
    wrong = CONTENT[::-1]
    fallen = await lab.hashed(binary.name, wrong)
    assert (fallen.state, fallen.state_reason) == (B.STATE_UPLOADABLE, "DIGEST_MISMATCH")
    assert not lab.blobs.objects
    right = await lab.hashed(binary.name, CONTENT)
    assert (right.state, right.state_reason) == (B.STATE_SIGNABLE, "")


async def test_a_declared_digest_of_known_content_grants_nothing(lab: Lab) -> None:
    await lab.hashed((await lab.binary(CONTENT)).name, CONTENT)
    thief = await lab.binary(CONTENT, "thief", "other")
    parts = await lab.upload(thief.name, b"nonsense")
    await lab.call("CompleteUpload", pb.CompleteUploadRequest(name=thief.name, parts=parts))
    for key in [key for key in lab.blobs.objects if key.startswith("staging/")]:
        await lab.blobs.delete(key)  # as a deletion that ran before a fail-over would have left it
    await lab.call("HashBinary", pb.HashBinaryRequest(name=thief.name))
    assert (await lab.until_hashed(thief.name)).state == B.STATE_UPLOADABLE


async def test_the_store_is_asked_about_every_part(lab: Lab) -> None:
    content = bytes(PART) + b"tail"
    binary = await lab.binary(content)
    parts = parts_of(content)
    complete = pb.CompleteUploadRequest(name=binary.name, parts=parts)
    assert await lab.refused("CompleteUpload", complete) == "PARTS_MISSING"
    answer = await lab.call("PresignParts", pb.PresignPartsRequest(name=binary.name, parts=parts))
    with pytest.raises(BlobStoreError):
        await lab.blobs.put_part(answer.parts[0].url, dict(answer.parts[0].headers), b"other")
    await lab.blobs.put_part(answer.parts[0].url, dict(answer.parts[0].headers), bytes(PART))
    assert await lab.refused("CompleteUpload", complete) == "PARTS_MISSING"
    again = await lab.call("PresignParts", pb.PresignPartsRequest(name=binary.name, parts=parts))
    assert [(part.stored, bool(part.url)) for part in again.parts] == [(True, False), (False, True)]
    await lab.blobs.put_part(again.parts[1].url, dict(again.parts[1].headers), b"tail")
    for change, reason in (
        ((1, PART, 5), "PART_SIZE_MISMATCH"),
        ((2, PART, 4), "PARTS_MISSING"),
    ):
        first, size, tail = change
        declared = [pb.UploadPart(index=first, size=size), pb.UploadPart(index=2, size=tail)]
        request = pb.CompleteUploadRequest(name=binary.name, parts=declared)
        assert await lab.refused("CompleteUpload", request) == reason
    request = pb.CompleteUploadRequest(name=binary.name, parts=parts[:1])
    assert await lab.refused("CompleteUpload", request) == "SIZE_MISMATCH"
    assert (await lab.call("CompleteUpload", complete)).state == B.STATE_HASHABLE
    assert (await lab.call("CompleteUpload", complete)).state == B.STATE_HASHABLE


async def test_a_small_part_may_only_be_the_last(lab: Lab) -> None:
    binary = await lab.binary(b"ab")
    parts = [
        pb.UploadPart(index=index, size=1, sha256=hashlib.sha256(body).hexdigest())
        for index, body in enumerate((b"a", b"b"), start=1)
    ]
    answer = await lab.call("PresignParts", pb.PresignPartsRequest(name=binary.name, parts=parts))
    for part, body in zip(answer.parts, (b"a", b"b"), strict=True):
        await lab.blobs.put_part(part.url, dict(part.headers), body)
    request = pb.CompleteUploadRequest(name=binary.name, parts=parts)
    assert await lab.refused("CompleteUpload", request) == "PART_SIZE_MISMATCH"


async def test_a_lost_answer_of_the_store_is_found_out(lab: Lab) -> None:
    binary = await lab.binary(CONTENT)
    parts = await lab.upload(binary.name, CONTENT)
    ((upload_id, (key, _)),) = lab.blobs.uploads.items()
    await lab.blobs.complete(key, upload_id, await lab.blobs.list_parts(key, upload_id))
    presigned = await lab.call("PresignParts", pb.PresignPartsRequest(name=binary.name, parts=parts))
    assert all(part.stored for part in presigned.parts)
    done = await lab.call("CompleteUpload", pb.CompleteUploadRequest(name=binary.name, parts=parts))
    assert done.state == B.STATE_HASHABLE


async def test_an_upload_that_the_store_lost_is_opened_anew(lab: Lab) -> None:
    binary = await lab.binary(CONTENT)
    parts = await lab.upload(binary.name, CONTENT)
    lab.blobs.uploads.clear()
    request = pb.CompleteUploadRequest(name=binary.name, parts=parts)
    assert await lab.refused("CompleteUpload", request) == "PARTS_MISSING"
    assert (await lab.hashed(binary.name, CONTENT)).state == B.STATE_SIGNABLE


async def test_of_uploads_opened_at_once_one_remains(lab: Lab) -> None:
    binary = await lab.binary(CONTENT)
    request = pb.PresignPartsRequest(name=binary.name, parts=parts_of(CONTENT))
    await asyncio.gather(*(lab.call("PresignParts", request) for _ in range(5)))
    assert len(lab.blobs.uploads) == 1


async def test_calls_out_of_turn(lab: Lab) -> None:
    await lab.key(SIGNER)
    binary = await lab.binary(CONTENT)
    name, sign = binary.name, SIGNER(binary.sha256.encode())
    hash_, sign_ = pb.HashBinaryRequest(name=name), pb.SignBinaryRequest(name=name, signature=sign)
    presign = pb.PresignPartsRequest(name=name, parts=parts_of(CONTENT))
    assert await lab.refused("HashBinary", hash_) == "WRONG_STATE"
    assert await lab.refused("SignBinary", sign_) == "WRONG_STATE"
    assert await lab.refused("CreateBundle", bundle_request(name)) == "BINARY_NOT_SIGNED"
    parts = await lab.upload(name, CONTENT)
    complete = pb.CompleteUploadRequest(name=name, parts=parts)
    await lab.call("CompleteUpload", complete)
    assert await lab.refused("PresignParts", presign) == "WRONG_STATE"
    assert await lab.refused("SignBinary", sign_) == "WRONG_STATE"
    await lab.call("HashBinary", hash_)
    await lab.until_hashed(name)
    for method, request in (("HashBinary", hash_), ("CompleteUpload", complete), ("PresignParts", presign)):
        assert await lab.refused(method, request) == "WRONG_STATE"
    assert await lab.refused("CreateBundle", bundle_request(name)) == "BINARY_NOT_SIGNED"


async def test_signatures_of_a_binary(lab: Lab) -> None:
    await lab.key(SIGNER)
    gone = Signer()
    revoked = await lab.key(gone, "k2")
    await lab.call("RevokeSigningKey", pb.RevokeSigningKeyRequest(name=revoked.name))
    binary = await lab.signed(SIGNER, CONTENT)
    digest = binary.sha256.encode()
    for signature, reason in (
        (Signer()(digest), "SIGNING_KEY_UNKNOWN"),
        (gone(digest), "SIGNING_KEY_REVOKED"),
        (SIGNER(b"another"), "SIGNATURE_INVALID"),
        (pb.Signature(key_id=SIGNER.id, signature="00"), "SIGNATURE_INVALID"),
    ):
        assert await lab.refused("SignBinary", pb.SignBinaryRequest(name=binary.name, signature=signature)) == reason
    before, upper = lab.written(), SIGNER(digest)
    upper.signature = upper.signature.upper()
    for signature in (SIGNER(digest), upper):
        assert await lab.call("SignBinary", pb.SignBinaryRequest(name=binary.name, signature=signature)) == binary
    assert lab.written() == before


async def test_names_keys_and_targets_are_given_once(lab: Lab) -> None:
    await lab.key(SIGNER)
    same = pb.SigningKey(public_key=SIGNER.public)
    again = pb.CreateSigningKeyRequest(parent=PRODUCT, signing_key_id="k9", signing_key=same)
    assert await lab.refused("CreateSigningKey", again) == "ALREADY_EXISTS"
    await lab.key(SIGNER, product=OTHER)
    small = pb.CreateSigningKeyRequest(
        parent=PRODUCT, signing_key_id="k8", signing_key=pb.SigningKey(public_key=bytes(32))
    )
    assert await lab.refused("CreateSigningKey", small) == "INVALID_FIELD"
    binary = await lab.binary(CONTENT)
    wanted = pb.Binary(target="m4", size=1, sha256="0" * 64)
    for binary_id, reason in (("b", "ALREADY_EXISTS"), ("c", "TARGET_TAKEN")):
        request = pb.CreateBinaryRequest(parent=VERSION, binary_id=binary_id, binary=wanted)
        assert await lab.refused("CreateBinary", request) == reason
    assert binary.target == "m4"
    unknown = pb.CreateArtifactRequest(parent="organizations/acme/products/none", artifact_id="main")
    assert await lab.refused("CreateArtifact", unknown) == "RESOURCE_NOT_FOUND"


async def test_keys_are_counted_and_revocation_is_felt(lab: Lab) -> None:
    second = Signer()
    key = await lab.key(SIGNER)
    await lab.key(second, "k2")
    await lab.policy(2)
    binary = await lab.signed(SIGNER, CONTENT)
    over_digest = second(binary.sha256.encode())
    await lab.call("SignBinary", pb.SignBinaryRequest(name=binary.name, signature=over_digest))
    bundle = await lab.bundle(binary.name)
    for _ in range(2):
        bundle = await lab.sign_bundle(bundle, SIGNER)
        assert (bundle.offerable, len(bundle.signatures)) == (False, 1)
    assert (await lab.sign_bundle(bundle, second)).offerable
    await lab.call("RevokeSigningKey", pb.RevokeSigningKeyRequest(name=key.name))
    found = await lab.lookup(bundle.name)
    assert (found.offerable, found.not_offerable_reason) == (False, "SIGNING_KEY_REVOKED")
    await lab.policy(1)
    assert (await lab.lookup(bundle.name)).offerable
    before = lab.written()
    await lab.call("RevokeSigningKey", pb.RevokeSigningKeyRequest(name=key.name))
    assert lab.written() == before


async def test_a_policy_that_is_not_folded_yet_counts_when_a_bundle_is_signed(lab: Lab) -> None:
    await lab.key(SIGNER)
    binary = await lab.signed(SIGNER, CONTENT)
    bundle = await lab.bundle(binary.name)
    await lab.policy(2, record=False)
    assert not (await lab.sign_bundle(bundle, SIGNER)).offerable
    await lab.policy(2)
    assert not (await lab.lookup(bundle.name)).offerable
    await lab.policy(0)
    assert (await lab.lookup(bundle.name)).offerable


async def test_the_most_specific_metadata_holds_whole(lab: Lab) -> None:
    await lab.key(SIGNER)
    artifact = pb.Artifact(custom_metadata='{"of": "artifact", "a": 1}')
    await lab.call("CreateArtifact", pb.CreateArtifactRequest(parent=PRODUCT, artifact_id="meta", artifact=artifact))
    names = []
    for version, own in (("plain", ""), ("own", '{ "of" : "version" }')):
        request = pb.CreateArtifactVersionRequest(
            parent=f"{PRODUCT}/artifacts/meta",
            artifact_version_id=version,
            artifact_version=pb.ArtifactVersion(custom_metadata=own),
        )
        parent = (await lab.call("CreateArtifactVersion", request)).name
        wanted = pb.Binary(target="m4", size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
        made = await lab.call("CreateBinary", pb.CreateBinaryRequest(parent=parent, binary_id="b", binary=wanted))
        await lab.hashed(made.name, CONTENT)
        signature = SIGNER(made.sha256.encode())
        await lab.call("SignBinary", pb.SignBinaryRequest(name=made.name, signature=signature))
        names.append(made.name)
    bundle = await lab.bundle(*names)
    assert [entry.metadata for entry in bundle.entries] == ['{"a":1,"of":"artifact"}', '{"of":"version"}']
    given = await lab.bundle(names[0], bundle_id="two", metadata="{}")
    assert given.entries[0].metadata == "{}"
    for wrong in ("[]", '{"a":1,"a":2}', '{"a":"' + "x" * 860_000 + '"}'):
        request = bundle_request(names[0], bundle_id="three", metadata=wrong)
        assert await lab.refused("CreateBundle", request) == "INVALID_FIELD"


async def test_what_a_bundle_refuses(lab: Lab) -> None:
    await lab.key(SIGNER)
    name = (await lab.signed(SIGNER, CONTENT)).name
    for request in (
        bundle_request(name, version="1.2"),
        bundle_request(name, name),
        bundle_request(name, parent=OTHER),
    ):
        assert await lab.refused("CreateBundle", request) == "INVALID_FIELD"
    assert await lab.refused("CreateBundle", bundle_request(f"{name}x")) == "RESOURCE_NOT_FOUND"
    await lab.bundle(name)
    assert await lab.refused("CreateBundle", bundle_request(name)) == "ALREADY_EXISTS"


async def test_lists_hold_their_own_collection(lab: Lab) -> None:
    await lab.binary(CONTENT, "one", "m4")
    await lab.binary(CONTENT, "two", "m7")
    found = await lab.call("ListBinaries", pb.ListBinariesRequest(parent=VERSION, filter='target = "m7"'))
    assert [binary.name for binary in found.binaries] == [f"{VERSION}/binaries/two"]
    found = await lab.call("ListArtifacts", pb.ListArtifactsRequest(parent=OTHER))
    assert not found.artifacts


async def test_all_of_it_comes_back_from_the_log() -> None:
    log, blobs = MemoryLog(partitions=4), MemoryBlobStore()
    async with running(log, blobs) as lab:
        await lab.version()
        await lab.key(SIGNER)
        bundle = await lab.bundle((await lab.signed(SIGNER, CONTENT)).name)
        bundle = await lab.sign_bundle(bundle, SIGNER)
    async with running(log, blobs) as lab:
        assert await lab.lookup(bundle.name) == bundle
