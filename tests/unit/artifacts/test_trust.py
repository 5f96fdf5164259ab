"""k of n, revocation, attachments and dependencies, on the log and the store in memory."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from groundswell.artifacts.v1 import artifacts_pb2 as pb

from libs.blobs import content_key
from libs.eventlog import Command, Deadline
from libs.eventlog.memory import MemoryLog
from libs.trust.statement import parse
from services.artifacts import bundles, commands
from tests.unit.artifacts.lab import OTHER, PRODUCT, VERSION, B, Lab, Signer, bundle_request, running

CONTENT = b"firmware"
ONE, TWO, THREE = Signer(), Signer(), Signer()
A = pb.Attachment
CYCLONEDX = json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.6", "components": []}).encode()


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    async with running() as one:
        await one.version()
        for index, signer in enumerate((ONE, TWO, THREE)):
            await one.key(signer, f"k{index}")
        yield one


async def sign(lab: Lab, binary: pb.Binary, signer: Signer) -> pb.Binary:
    request = pb.SignBinaryRequest(name=binary.name, signature=signer(binary.sha256.encode()))
    made: pb.Binary = await lab.call("SignBinary", request)
    return made


async def revoke(lab: Lab, key: str) -> None:
    await lab.call("RevokeSigningKey", pb.RevokeSigningKeyRequest(name=f"{PRODUCT}/signingKeys/{key}"))


async def test_a_binary_is_signed_when_enough_distinct_keys_have_signed(lab: Lab) -> None:
    await lab.policy(1, of_binary=2)
    binary = await lab.binary(CONTENT)
    await lab.hashed(binary.name, CONTENT)
    for _ in range(2):
        binary = await sign(lab, binary, ONE)
        assert (binary.state, len(binary.signatures)) == (B.STATE_SIGNABLE, 1)
    assert await lab.refused("CreateBundle", bundle_request(binary.name)) == "BINARY_NOT_SIGNED"
    await revoke(lab, "k0")
    binary = await sign(lab, binary, TWO)
    assert binary.state == B.STATE_SIGNABLE, "a revoked key does not count"
    assert (await sign(lab, binary, THREE)).state == B.STATE_SIGNED


async def test_a_lower_number_makes_waiting_binaries_signed(lab: Lab) -> None:
    await lab.policy(1, of_binary=2)
    binary = await lab.binary(CONTENT)
    await lab.hashed(binary.name, CONTENT)
    await sign(lab, binary, ONE)
    await lab.policy(1, of_binary=1)
    assert (await lab.get(binary.name)).state == B.STATE_SIGNED


async def test_a_lower_number_reaches_every_waiting_binary_in_chunks(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "_CHUNK_EVENTS", 1)
    await lab.policy(1, of_binary=2)
    names = []
    for n in range(4):
        binary = await lab.binary(CONTENT, f"b{n}", f"t{n}")
        await lab.hashed(binary.name, CONTENT)
        names.append((await sign(lab, binary, ONE)).name)
    await lab.policy(1, of_binary=1)
    while lab.open_tasks():
        await lab.runtime.changed("acme", Deadline.after(10))
    assert [(await lab.get(name)).state for name in names] == [B.STATE_SIGNED] * 4


async def test_a_policy_on_binaries_that_is_not_folded_yet_counts_when_one_is_signed(lab: Lab) -> None:
    binary = await lab.binary(CONTENT)
    await lab.hashed(binary.name, CONTENT)
    await lab.policy(1, of_binary=2, record=False)
    assert (await sign(lab, binary, ONE)).state == B.STATE_SIGNABLE


async def test_signatures_of_binaries_are_counted_anew_where_they_are_offered(lab: Lab) -> None:
    binary = await sign(lab, await lab.signed(ONE, CONTENT), TWO)
    bundle = await lab.sign_bundle(await lab.bundle(binary.name), THREE)
    assert bundle.offerable
    for policy, reason in ((3, "BINARY_SIGNATURES_MISSING"), (2, "")):
        await lab.policy(1, of_binary=policy)
        found = await lab.lookup(bundle.name)
        assert (found.offerable, found.not_offerable_reason) == (not reason, reason)
    await revoke(lab, "k1")
    assert (await lab.lookup(bundle.name)).not_offerable_reason == "SIGNING_KEY_REVOKED"
    assert (await lab.get(binary.name)).state == B.STATE_SIGNED, "what was bundled is never reset"
    await sign(lab, binary, THREE)
    await lab.sign_bundle(bundle, ONE)
    assert (await lab.lookup(bundle.name)).offerable


async def test_a_new_signature_on_a_binary_is_felt_by_its_bundles(lab: Lab) -> None:
    """Nobody has to touch the bundle for it to be offerable again."""
    binary = await lab.signed(ONE, CONTENT)
    bundle = await lab.sign_bundle(await lab.bundle(binary.name), THREE)
    await revoke(lab, "k0")
    assert not (await lab.lookup(bundle.name)).offerable
    await sign(lab, binary, TWO)
    assert (await lab.lookup(bundle.name)).offerable
    state: Any = lab.runtime.snapshot("acme").state
    assert state.bundles[f"{PRODUCT}/bundles"][bundle.name].offerable, "the public record says so too"


@pytest.mark.parametrize(("bound", "most"), [("_CHUNK_EVENTS", 3), ("_CHUNK_NAMES", 2), ("_CHUNK_BYTES", 0)])
async def test_t40_a_revocation_reaches_every_bundle_in_chunks(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, bound: str, most: int
) -> None:
    monkeypatch.setattr(bundles, bound, most)
    binary = await sign(lab, await lab.signed(ONE, CONTENT), TWO)
    names = [(await lab.sign_bundle(await lab.bundle(binary.name, bundle_id=f"b{n}"), TWO)).name for n in range(10)]
    kept = await lab.sign_bundle(await lab.bundle(binary.name, bundle_id="kept"), ONE)
    await revoke(lab, "k1")
    for name in names:  # at once, whatever the log still lacks
        assert (await lab.lookup(name)).not_offerable_reason == "SIGNING_KEY_REVOKED"
    listed = await lab.call("ListBundles", pb.ListBundlesRequest(parent=PRODUCT, filter="offerable = true"))
    assert [bundle.name for bundle in listed.bundles] == [kept.name]
    while lab.open_tasks():
        await lab.runtime.changed("acme", Deadline.after(10))
    state: Any = lab.runtime.snapshot("acme").state
    stored = state.bundles[f"{PRODUCT}/bundles"]
    assert [name for name in sorted(stored) if stored[name].offerable] == [kept.name]


async def test_the_judgement_goes_on_after_a_fail_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "_CHUNK_EVENTS", 1)
    log = MemoryLog(partitions=4)
    async with running(log) as lab:
        await lab.version()
        await lab.key(ONE)
        binary = await lab.signed(ONE, CONTENT)
        for n in range(5):
            await lab.sign_bundle(await lab.bundle(binary.name, bundle_id=f"b{n}"), ONE)
        await revoke(lab, "k1")
    async with running(log) as lab:
        while lab.open_tasks():
            await lab.runtime.changed("acme", Deadline.after(10))
        state: Any = lab.runtime.snapshot("acme").state
        assert not any(one.offerable for one in state.bundles[f"{PRODUCT}/bundles"].values())


async def test_t38_the_same_artifact_name_elsewhere_is_another_artifact(lab: Lab) -> None:
    await lab.call("CreateArtifact", pb.CreateArtifactRequest(parent=OTHER, artifact_id="main"))
    there = f"{OTHER}/artifacts/main"
    version = pb.CreateArtifactVersionRequest(parent=there, artifact_version_id="v1")
    await lab.call("CreateArtifactVersion", version)
    wanted = B(target="m4", size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
    request = pb.CreateBinaryRequest(parent=f"{there}/versions/v1", binary_id="b", binary=wanted)
    elsewhere = await lab.call("CreateBinary", request)
    await lab.hashed(elsewhere.name, CONTENT)
    signature = pb.SignBinaryRequest(name=elsewhere.name, signature=ONE(elsewhere.sha256.encode()))
    assert await lab.refused("SignBinary", signature) == "SIGNING_KEY_UNKNOWN", "keys belong to a product"
    here = await lab.signed(ONE, CONTENT)
    assert here.name != elsewhere.name
    assert (await lab.get(elsewhere.name)).state == B.STATE_SIGNABLE
    assert await lab.refused("CreateBundle", bundle_request(elsewhere.name)) == "INVALID_FIELD"


async def test_t16_a_statement_names_the_hardware_of_every_image(lab: Lab) -> None:
    """What a device or the rollout leader compares: an image cannot be relabelled for other hardware."""
    binary = await lab.signed(ONE, CONTENT, "b", "board-a")
    bundle = await lab.bundle(binary.name)
    assert [entry.target for entry in parse(bundle.statement).binaries] == ["board-a"] == [bundle.entries[0].target]
    update = pb.UpdateBinaryRequest(binary=B(name=binary.name, target="board-b"), update_mask={"paths": ["target"]})
    assert await lab.refused("UpdateBinary", update) == "INVALID_FIELD"


@pytest.mark.parametrize(
    "change",
    [
        lambda it: it.ClearField("signature"),
        lambda it: it.signature.ClearField("signature"),
        lambda it: setattr(it.signature, "signature", it.signature.signature + "00"),
        lambda it: setattr(it.signature, "signature", "dsse:" + it.signature.signature[5:]),
        lambda it: setattr(it.signature, "key_id", ""),
        lambda it: setattr(it.signature, "key_id", it.signature.key_id.upper()),
    ],
    ids=["empty", "no-signature", "trailing-data", "unknown-algorithm", "no-key", "another-spelling-of-the-key"],
)
async def test_t22_a_signature_has_one_form(lab: Lab, change: Any) -> None:
    bundle = await lab.bundle((await lab.signed(ONE, CONTENT)).name)
    request = pb.SignBundleRequest(name=bundle.name, signature=ONE(bundle.statement))
    change(request)
    assert await lab.refused("SignBundle", request) in ("SIGNING_KEY_UNKNOWN", "SIGNATURE_INVALID")
    assert not (await lab.lookup(bundle.name)).signatures


# Attachments.


def attach(content: bytes, attachment_id: str = "sbom", **fields: Any) -> pb.CreateAttachmentRequest:
    inline = fields.pop("inline", True)
    given = {"kind": A.KIND_SBOM_CYCLONEDX, "media_type": "application/vnd.cyclonedx+json"} | fields
    given = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} | given
    return pb.CreateAttachmentRequest(
        parent=VERSION,
        attachment_id=attachment_id,
        attachment=A(**given),
        content=content if inline else b"",
        request_id=str(uuid.uuid4()),
    )


def part(name: str, index: int, content: bytes) -> pb.UploadAttachmentPartRequest:
    digest = hashlib.sha256(content).hexdigest()
    declared = pb.UploadPart(index=index, size=len(content), sha256=digest)
    return pb.UploadAttachmentPartRequest(name=name, part=declared, content=content)


async def test_a_document_is_stored_whole_and_found_again(lab: Lab) -> None:
    subject = "ab" * 32
    request = attach(CYCLONEDX, subject_sha256=subject)
    made = await lab.call("CreateAttachment", request)
    assert (made.state, made.subject_sha256, made.size) == (A.STATE_STORED, subject, len(CYCLONEDX))
    before = lab.written()
    assert await lab.call("CreateAttachment", request) == made, "a repeat has the same answer"
    assert lab.written() == before
    request.request_id = str(uuid.uuid4())
    assert await lab.refused("CreateAttachment", request) == "ALREADY_EXISTS"
    link = await lab.call("GetAttachmentContent", pb.GetAttachmentContentRequest(name=made.name))
    assert content_key("acme", made.sha256) in link.url
    assert lab.blobs.objects[content_key("acme", made.sha256)] == CYCLONEDX
    listed = await lab.call("ListAttachments", pb.ListAttachmentsRequest(parent=VERSION, filter="kind = KIND_OTHER"))
    assert not listed.attachments
    found = await lab.call("GetAttachment", pb.GetAttachmentRequest(name=made.name))
    assert found == made


async def test_a_repeat_after_a_crash_before_the_content_was_stored_stores_it(lab: Lab) -> None:
    request = attach(CYCLONEDX)
    named = A()
    named.CopyFrom(request.attachment)
    named.name = f"{VERSION}/attachments/sbom"
    digest = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
    command = Command(
        "acme",
        commands.CreateAttachment(named),
        principal="organizations/acme/apiKeys/test",
        request_id=request.request_id,
        request_digest=digest,
    )
    await lab.runtime.submit(command, Deadline.after(5))
    assert not lab.blobs.objects
    assert (await lab.call("CreateAttachment", request)).state == A.STATE_STORED
    assert list(lab.blobs.objects) == [content_key("acme", named.sha256)]


async def test_a_large_document_comes_in_parts_and_the_same_index_overwrites(lab: Lab) -> None:
    content = bytes(range(256)) * 5000
    halves = content[: 1024 * 1024], content[1024 * 1024 :]
    made = await lab.call("CreateAttachment", attach(content, kind=A.KIND_OTHER, inline=False))
    assert made.state == A.STATE_UPLOADABLE
    complete = pb.CompleteAttachmentRequest(name=made.name)
    assert await lab.refused("CompleteAttachment", complete) == "PARTS_MISSING"
    link = pb.GetAttachmentContentRequest(name=made.name)
    assert await lab.refused("GetAttachmentContent", link) == "WRONG_STATE"
    await lab.call("UploadAttachmentPart", part(made.name, 2, halves[1]))
    await lab.call("UploadAttachmentPart", part(made.name, 1, halves[0][::-1]))
    assert await lab.refused("CompleteAttachment", complete) == "DIGEST_MISMATCH"
    lying = part(made.name, 1, halves[0])
    lying.part.sha256 = "0" * 64
    assert await lab.refused("UploadAttachmentPart", lying) == "INVALID_FIELD"
    for _ in range(2):
        known = await lab.call("UploadAttachmentPart", part(made.name, 1, halves[0]))
    assert [(one.index, one.size) for one in known.parts] == [(1, len(halves[0])), (2, len(halves[1]))]
    done = await lab.call("CompleteAttachment", complete)
    assert (done.state, list(done.parts)) == (A.STATE_STORED, [])
    assert await lab.call("CompleteAttachment", complete) == done
    assert await lab.refused("UploadAttachmentPart", part(made.name, 1, halves[0])) == "WRONG_STATE"
    assert lab.blobs.objects[content_key("acme", done.sha256)] == content


async def test_deleting_the_last_holder_of_a_document_lets_it_go() -> None:
    async with running(grace_ms=0) as lab:
        await lab.version()
        first = await lab.call("CreateAttachment", attach(CYCLONEDX, "one"))
        second = await lab.call("CreateAttachment", attach(CYCLONEDX, "two"))
        key = content_key("acme", first.sha256)
        await lab.call("DeleteAttachment", pb.DeleteAttachmentRequest(name=first.name))
        assert key in lab.blobs.objects
        await lab.call("DeleteAttachment", pb.DeleteAttachmentRequest(name=second.name))
        while key in lab.blobs.objects:
            await lab.runtime.changed("acme", Deadline.after(10))
        assert await lab.refused("GetAttachment", pb.GetAttachmentRequest(name=first.name)) == "RESOURCE_NOT_FOUND"


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (A.KIND_SBOM_CYCLONEDX, b"<bom/>"),
        (A.KIND_SBOM_CYCLONEDX, b'{"bomFormat":"Other","specVersion":"1.6"}'),
        (A.KIND_SBOM_CYCLONEDX, b'{"bomFormat":"CycloneDX","bomFormat":"CycloneDX","specVersion":"1.6"}'),
        (A.KIND_SBOM_SPDX, CYCLONEDX),
        (A.KIND_PROVENANCE, b"[]"),
        (A.KIND_PROVENANCE, b'{"payloadType":"application/vnd.in-toto+json"}'),
        (A.KIND_SBOM_SPDX, b"[" * 100_000),
    ],
)
async def test_a_document_is_what_it_says_it_is(lab: Lab, kind: Any, content: bytes) -> None:
    before = lab.written()
    assert await lab.refused("CreateAttachment", attach(content, kind=kind)) == "ATTACHMENT_INVALID"
    assert lab.written() == before


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (A.KIND_SBOM_SPDX, b'{"spdxVersion":"SPDX-2.3"}'),
        (A.KIND_SBOM_SPDX, b'{"@context":"https://spdx.org/rdf/3.0.1/spdx-context.jsonld"}'),
        (A.KIND_PROVENANCE, b'{"_type":"https://in-toto.io/Statement/v1"}'),
        (A.KIND_PROVENANCE, b'{"payloadType":"application/vnd.in-toto+json","payload":"e30="}'),
        (A.KIND_OTHER, b"\x00\x01"),
    ],
)
async def test_documents_of_each_kind_are_taken(lab: Lab, kind: Any, content: bytes) -> None:
    assert (await lab.call("CreateAttachment", attach(content, kind=kind))).state == A.STATE_STORED


async def test_declarations_that_are_refused(lab: Lab) -> None:
    for fields in (
        {"kind": A.KIND_UNSPECIFIED},
        {"media_type": "nonsense"},
        {"size": 33 * 1024 * 1024},
        {"sha256": "zz"},
        {"subject_sha256": "AB" * 32},
    ):
        request = attach(CYCLONEDX, inline=False, **fields)
        assert await lab.refused("CreateAttachment", request) == "INVALID_FIELD", fields
    assert await lab.refused("CreateAttachment", attach(CYCLONEDX, sha256="0" * 64)) == "DIGEST_MISMATCH"
    elsewhere = attach(CYCLONEDX)
    elsewhere.parent = f"{VERSION}x"
    assert await lab.refused("CreateAttachment", elsewhere) == "RESOURCE_NOT_FOUND"


# Dependencies.


async def version_of(lab: Lab, artifact: str, text: str, *needs: tuple[str, str]) -> str:
    parent = f"{PRODUCT}/artifacts/{artifact}"
    known = await lab.call("ListArtifacts", pb.ListArtifactsRequest(parent=PRODUCT))
    if parent not in [one.name for one in known.artifacts]:
        await lab.call("CreateArtifact", pb.CreateArtifactRequest(parent=PRODUCT, artifact_id=artifact))
    version = pb.ArtifactVersion(
        version=text,
        dependencies=[pb.Dependency(artifact=f"{PRODUCT}/artifacts/{name}", requirement=it) for name, it in needs],
    )
    request = pb.CreateArtifactVersionRequest(parent=parent, artifact_version_id=f"v{text}", artifact_version=version)
    made: str = (await lab.call("CreateArtifactVersion", request)).name
    return made


async def binary_of(lab: Lab, version: str, target: str = "portable") -> str:
    wanted = B(target=target, size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
    request = pb.CreateBinaryRequest(parent=version, binary_id=target, binary=wanted)
    made = await lab.call("CreateBinary", request)
    await lab.hashed(made.name, CONTENT)
    return (await sign(lab, made, ONE)).name


async def test_a_bundle_has_what_its_binaries_need(lab: Lab) -> None:
    old = await binary_of(lab, await version_of(lab, "boot", "1.0.0"))
    new = await binary_of(lab, await version_of(lab, "boot", "1.5.0"))
    app = await binary_of(lab, await version_of(lab, "app", "2.0.0", ("boot", ">= 1.2.0 and < 2.0.0")))
    for entries in ((app,), (app, old), (app, new, old)):
        assert await lab.refused("CreateBundle", bundle_request(*entries)) == "DEPENDENCY_UNSATISFIED"
    assert await lab.bundle(new, app)


async def test_a_need_is_met_for_every_target_it_reaches(lab: Lab) -> None:
    boot = await version_of(lab, "boot", "1.5.0")
    for_a, for_b = await binary_of(lab, boot, "a"), await binary_of(lab, boot, "b")
    app = await version_of(lab, "app", "2.0.0", ("boot", ">= 1.0.0"))
    app_a, app_any = await binary_of(lab, app, "a"), await binary_of(lab, app)
    assert await lab.refused("CreateBundle", bundle_request(app_a, for_b)) == "DEPENDENCY_UNSATISFIED"
    assert await lab.bundle(app_a, for_a, bundle_id="a")
    other = await binary_of(lab, await version_of(lab, "extra", "1.0.0"), "b")
    assert await lab.refused("CreateBundle", bundle_request(app_any, for_a, other)) == "DEPENDENCY_UNSATISFIED"
    assert await lab.bundle(app_any, for_a, for_b, other, bundle_id="both")


async def test_circles_are_refused_by_whoever_closes_them(lab: Lab) -> None:
    await version_of(lab, "a", "1.0.0")
    await version_of(lab, "b", "1.0.0", ("a", ">= 2.0.0"))
    await version_of(lab, "c", "1.0.0", ("b", ">= 1.0.0"))
    closing = pb.CreateArtifactVersionRequest(
        parent=f"{PRODUCT}/artifacts/a",
        artifact_version_id="v2",
        artifact_version=pb.ArtifactVersion(
            version="2.0.0", dependencies=[pb.Dependency(artifact=f"{PRODUCT}/artifacts/c", requirement=">= 1.0.0")]
        ),
    )
    assert await lab.refused("CreateArtifactVersion", closing) == "DEPENDENCY_CYCLE"
    closing.artifact_version.version = "1.5.0"
    made = await lab.call("CreateArtifactVersion", closing)
    harmless = pb.UpdateArtifactVersionRequest(
        artifact_version=pb.ArtifactVersion(name=f"{PRODUCT}/artifacts/b/versions/v1.0.0"),
        update_mask={"paths": ["dependencies"]},
    )
    harmless.artifact_version.dependencies.add(artifact=f"{PRODUCT}/artifacts/a", requirement=">= 1.5.0")
    assert await lab.refused("UpdateArtifactVersion", harmless) == "DEPENDENCY_CYCLE"
    harmless.artifact_version.dependencies[0].requirement = "< 1.5.0"
    assert await lab.call("UpdateArtifactVersion", harmless)
    assert made.dependencies


async def test_dependencies_that_cannot_be_meant(lab: Lab) -> None:
    await version_of(lab, "boot", "1.0.0")
    boot = f"{PRODUCT}/artifacts/boot"
    for needs, reason in (
        ([(f"{PRODUCT}/artifacts/main", ">= 1.0.0")], "INVALID_FIELD"),
        ([(f"{OTHER}/artifacts/boot", ">= 1.0.0")], "INVALID_FIELD"),
        ([(boot, "newer")], "INVALID_FIELD"),
        ([(boot, ">= 1.0.0"), (boot, "< 2.0.0")], "INVALID_FIELD"),
        ([(f"{PRODUCT}/artifacts/none", ">= 1.0.0")], "RESOURCE_NOT_FOUND"),
    ):
        request = pb.UpdateArtifactVersionRequest(
            artifact_version=pb.ArtifactVersion(name=VERSION), update_mask={"paths": ["dependencies"]}
        )
        for artifact, requirement in needs:
            request.artifact_version.dependencies.add(artifact=artifact, requirement=requirement)
        assert await lab.refused("UpdateArtifactVersion", request) == reason, needs
