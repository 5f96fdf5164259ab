"""Firmware from an upload in parts to an offerable bundle: real log, real object store, over the public port."""

from __future__ import annotations

import hashlib
import uuid

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from groundswell.artifacts.v1 import artifacts_pb2 as pb

from libs.trust.statement import parse
from tests.integration.artifacts.site import FIRMWARE, B, Site, Upload, put, signature


async def test_an_upload_that_was_cut_goes_on_where_it_was(site: Site) -> None:
    binary, upload = await site.declare(FIRMWARE), Upload(FIRMWARE)
    await site.send(binary, upload, indexes=(2,))
    links = await site.links(binary, upload.parts)
    assert [(link.stored, bool(link.url)) for link in links] == [(False, True), (True, False), (False, True)]

    complete = pb.CompleteUploadRequest(name=binary.name, parts=upload.parts, request_id=str(uuid.uuid4()))
    assert await site.refused("CompleteUpload", complete) == "PARTS_MISSING"
    assert await put(links[0], upload.chunk(3)) == 400, "the link takes only the declared bytes"
    await site.send(binary, upload)
    done = await site.call("CompleteUpload", complete)
    assert done.state == B.STATE_HASHABLE
    assert await site.call("CompleteUpload", complete) == done, "a repeat has the same answer"

    found = await site.hashed(binary)
    assert (found.state, found.state_reason) == (B.STATE_SIGNABLE, "")
    assert await site.refused("PresignParts", pb.PresignPartsRequest(name=binary.name, parts=upload.parts)) == (
        "WRONG_STATE"
    )


async def test_other_bytes_than_declared_are_found_out_and_uploaded_anew(site: Site) -> None:
    wrong = bytes(len(FIRMWARE[:1000]))
    binary = await site.declare(wrong, sha256=hashlib.sha256(FIRMWARE[:1000]).hexdigest())
    for data, state, reason in (
        (wrong, B.STATE_UPLOADABLE, "DIGEST_MISMATCH"),
        (FIRMWARE[:1000], B.STATE_SIGNABLE, ""),
    ):
        upload = Upload(data)
        await site.send(binary, upload)
        await site.call("CompleteUpload", pb.CompleteUploadRequest(name=binary.name, parts=upload.parts))
        found = await site.hashed(binary)
        assert (found.state, found.state_reason) == (state, reason)


async def test_a_bundle_is_offerable_while_enough_distinct_keys_vouch_for_it(site: Site) -> None:
    first, second, stranger = await site.signing_key("one"), await site.signing_key("two"), Ed25519PrivateKey.generate()
    binary = await site.signable(FIRMWARE[:1000])
    create = pb.CreateBundleRequest(
        parent=site.product,
        bundle_id="one",
        version="1.0.0",
        security_version=3,
        entries=[pb.BundleEntrySpec(binary=binary.name)],
    )
    assert await site.refused("CreateBundle", create) == "BINARY_NOT_SIGNED"
    over_digest = binary.sha256.encode()
    sign = pb.SignBinaryRequest(name=binary.name, signature=signature(stranger, over_digest))
    assert await site.refused("SignBinary", sign) == "SIGNING_KEY_UNKNOWN"
    sign.signature.CopyFrom(signature(first, b"something else"))
    assert await site.refused("SignBinary", sign) == "SIGNATURE_INVALID"
    for key in (first, second):
        sign.signature.CopyFrom(signature(key, over_digest))
        signed = await site.call("SignBinary", sign)
    assert signed.state == B.STATE_SIGNED

    bundle = await site.call("CreateBundle", create)
    statement = parse(bundle.statement)
    assert statement.digest() == bundle.digest
    assert (statement.version, statement.security_version) == ("1.0.0", 3)
    assert bundle.entries[0].metadata == '{"of":"version"}'
    assert not bundle.offerable

    for key, offerable in ((first, False), (first, False), (second, True)):
        request = pb.SignBundleRequest(name=bundle.name, signature=signature(key, bundle.statement))
        assert (await site.call("SignBundle", request)).offerable is offerable
    assert (await site.lookup(bundle.name)).offerable

    await site.call("RevokeSigningKey", pb.RevokeSigningKeyRequest(name=f"{site.product}/signingKeys/two"))
    after = await site.lookup(bundle.name)
    assert not after.offerable
    assert after.not_offerable_reason
    create.bundle_id = "two"
    later = await site.call("CreateBundle", create)
    assert later.statement == bundle.statement
    again = pb.SignBundleRequest(name=later.name, signature=signature(second, later.statement))
    assert await site.refused("SignBundle", again) == "SIGNING_KEY_REVOKED"
