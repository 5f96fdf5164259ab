"""Export of bundles into archives, and import of archives into another product, over the public API.

An import verifies the whole archive first: every digest, the statement, and its signatures against the signing keys
that are registered *where it is imported*. Only then it creates what is missing; what is there already has to be the
same. So it can be repeated after any interruption, and goes on where it was.

A statement names its product. Into a product of the same full name, on another installation, its signatures come
along. Into another product the server makes another statement: the old signatures vouch for where the content came
from, and somebody who may release there signs the new one. That is what keeps a signature from being relabelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.registry.v1 import registry_pb2

from clients.sdk.archive import FORMAT, Archive, ArchiveError, read_archive, write_archive
from clients.sdk.client import Client
from clients.sdk.errors import ApiError
from clients.sdk.signing import sign_bundle, sign_digest
from clients.sdk.upload import Progress, Upload, UploadError, upload_binary
from libs.trust.signatures import key_id, verify

_CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import made or found."""

    bundle: pb.Bundle
    same_statement: bool
    """Whether the archive's signatures are about this bundle."""


def export_bundle(client: Client, name: str, path: Path) -> None:
    """Write a bundle with everything that belongs to it. Raises ApiError, ArchiveError, OSError."""
    bundle = client.artifacts.GetBundle(pb.GetBundleRequest(name=name))
    binaries = {
        entry.binary: client.artifacts.GetBinary(pb.GetBinaryRequest(name=entry.binary)) for entry in bundle.entries
    }
    by_digest = {binary.sha256: binary for binary in binaries.values()}
    write_archive(
        path,
        _manifest(client, bundle, binaries),
        bundle.statement,
        _listed(bundle.signatures),
        lambda digest: _download(client, by_digest[digest]),
    )


def _manifest(client: Client, bundle: pb.Bundle, binaries: dict[str, pb.Binary]) -> dict[str, Any]:
    product, _, bundle_id = bundle.name.partition("/bundles/")
    artifacts: dict[str, dict[str, Any]] = {}
    versions: dict[str, dict[str, Any]] = {}
    entries = []
    for entry in bundle.entries:
        version_name, _, binary_id = entry.binary.partition("/binaries/")
        artifact_name, _, version_id = version_name.partition("/versions/")
        artifact_id = artifact_name.rpartition("/")[2]
        if artifact_name not in artifacts:
            artifact = client.artifacts.GetArtifact(pb.GetArtifactRequest(name=artifact_name))
            artifacts[artifact_name] = {
                "id": artifact_id,
                "display_name": artifact.display_name,
                "custom_metadata": artifact.custom_metadata,
            }
        if version_name not in versions:
            version = client.artifacts.GetArtifactVersion(pb.GetArtifactVersionRequest(name=version_name))
            versions[version_name] = {
                "artifact": artifact_id,
                "id": version_id,
                "version": version.version,
                "custom_metadata": version.custom_metadata,
                "dependencies": [
                    {"artifact": one.artifact.rpartition("/")[2], "requirement": one.requirement}
                    for one in version.dependencies
                ],
            }
        entries.append(
            {"artifact": artifact_id, "version": version_id, "binary": binary_id, "metadata": entry.metadata}
        )
    listed = []
    for name, binary in sorted(binaries.items()):
        parts = name.split("/")
        listed.append(
            {
                "artifact": parts[5],
                "version": parts[7],
                "id": parts[9],
                "target": binary.target,
                "size": binary.size,
                "sha256": binary.sha256,
                "custom_metadata": binary.custom_metadata,
                "signatures": _listed(binary.signatures),
            }
        )
    return {
        "format": FORMAT,
        "bundle": {
            "id": bundle_id,
            "display_name": bundle.display_name,
            "product": product,
            "version": bundle.version,
            "security_version": bundle.security_version,
            "entries": entries,
        },
        "artifacts": [artifacts[name] for name in sorted(artifacts)],
        "versions": [versions[name] for name in sorted(versions)],
        "binaries": listed,
    }


def _listed(signatures: Any) -> list[dict[str, str]]:
    return [
        {"key_id": one.key_id, "signature": one.signature} for one in sorted(signatures, key=lambda one: one.key_id)
    ]


def _download(client: Client, binary: pb.Binary) -> Iterator[bytes]:
    link = client.artifacts.PresignDownload(pb.PresignDownloadRequest(name=binary.name))
    with urllib3.PoolManager(retries=urllib3.Retry(3, backoff_factor=0.2)) as pool:
        response = pool.request("GET", link.url, preload_content=False)
        if response.status != 200:
            raise ArchiveError(f"the object store refused the content of {binary.name}: {response.status}")
        yield from response.stream(_CHUNK)
        response.release_conn()


def import_bundle(
    client: Client,
    product: str,
    path: Path,
    *,
    key: Ed25519PrivateKey | None = None,
    progress: Progress = lambda *_: None,
) -> Imported:
    """Verify an archive and have its bundle in the product; with a key, sign there. Safe to repeat.

    Raises ArchiveError, UploadError, ApiError, OSError; up to the first of those calls that create something, nothing
    was changed.
    """
    archive = read_archive(path)
    trusted = {
        one.key_id: one.public_key
        for one in client.pages(
            client.artifacts.ListSigningKeys, pb.ListSigningKeysRequest(parent=product), "signing_keys"
        )
        if not one.revoked
    }
    policy = client.registry.GetProduct(registry_pb2.GetProductRequest(name=product)).policy
    _check_signatures(archive, trusted, max(1, policy.required_signatures))
    _check_binaries(archive, trusted, max(1, policy.required_binary_signatures), key)
    _create_containers(client, product, archive)
    for binary in archive.manifest["binaries"]:
        _import_binary(client, product, archive, binary, trusted, key, progress)
    return _import_bundle(client, product, archive, trusted, key)


def _valid(signatures: Any, message: bytes, trusted: dict[str, bytes], what: str) -> list[pb.Signature]:
    """Signatures of trusted keys. One that names a trusted key and is not its signature refuses the archive."""
    found = []
    for name, text in signatures:
        if name not in trusted:
            continue
        if not verify(trusted[name], bytes.fromhex(text), message):
            raise ArchiveError(f"the signature of {name[:16]}… over {what} is not right")
        found.append(pb.Signature(key_id=name, signature=text))
    return found


def _check_signatures(archive: Archive, trusted: dict[str, bytes], needed: int) -> None:
    found = len(_valid(archive.signatures, archive.statement, trusted, "the statement"))
    if found < needed:
        raise ArchiveError(
            f"{found} of the {needed} needed signing keys that are registered here have signed the statement: "
            "register the publisher's public key first"
        )


def _check_binaries(archive: Archive, trusted: dict[str, bytes], needed: int, key: Ed25519PrivateKey | None) -> None:
    own = "" if key is None else key_id(key.public_key().public_bytes_raw())
    for binary in archive.manifest["binaries"]:
        valid = {one.key_id for one in _of_binary(binary, trusted)} | ({own} if own in trusted else set())
        if len(valid) < needed:
            raise ArchiveError(
                f"{len(valid)} of the {needed} needed signing keys have signed the binary {binary['id']}: "
                "sign it with a registered key (--sign-with)"
            )


def _of_binary(binary: dict[str, Any], trusted: dict[str, bytes]) -> list[pb.Signature]:
    pairs = [(one["key_id"], one["signature"]) for one in binary["signatures"]]
    return _valid(pairs, binary["sha256"].encode(), trusted, f"the binary {binary['id']}")


def _create_containers(client: Client, product: str, archive: Archive) -> None:
    """Artifacts first, then the versions that depend on them."""
    for artifact in archive.manifest["artifacts"]:
        wanted = pb.Artifact(display_name=artifact["display_name"], custom_metadata=artifact["custom_metadata"])
        artifact_request = pb.CreateArtifactRequest(parent=product, artifact_id=artifact["id"], artifact=wanted)
        _made(lambda request=artifact_request: client.artifacts.CreateArtifact(request))  # type: ignore[misc]
    for version in archive.manifest["versions"]:
        parent = f"{product}/artifacts/{version['artifact']}"
        request = pb.CreateArtifactVersionRequest(
            parent=parent,
            artifact_version_id=version["id"],
            artifact_version=pb.ArtifactVersion(
                version=version["version"],
                custom_metadata=version["custom_metadata"],
                dependencies=[
                    pb.Dependency(artifact=f"{product}/artifacts/{one['artifact']}", requirement=one["requirement"])
                    for one in version["dependencies"]
                ],
            ),
        )
        if not _made(lambda request=request: client.artifacts.CreateArtifactVersion(request)):  # type: ignore[misc]
            name = f"{parent}/versions/{version['id']}"
            known = client.artifacts.GetArtifactVersion(pb.GetArtifactVersionRequest(name=name))
            if known.version != version["version"]:
                raise ArchiveError(f"{name} exists and is version '{known.version}', not '{version['version']}'")


def _made(create: Callable[[], object]) -> bool:
    """False when it exists."""
    try:
        create()
    except ApiError as error:
        if error.code != "ALREADY_EXISTS":
            raise
        return False
    return True


def _import_binary(
    client: Client,
    product: str,
    archive: Archive,
    binary: dict[str, Any],
    trusted: dict[str, bytes],
    key: Ed25519PrivateKey | None,
    progress: Progress,
) -> None:
    blob = archive.blobs[binary["sha256"]]
    upload = Upload(
        path=archive.path,
        artifact=f"{product}/artifacts/{binary['artifact']}",
        version=binary["version"],
        binary_id=binary["id"],
        target=binary["target"],
        metadata=binary["custom_metadata"],
        offset=blob.offset,
        length=blob.size,
    )
    done = upload_binary(client, upload, progress)
    if (done.sha256, done.target) != (binary["sha256"], binary["target"]):
        raise ArchiveError(f"{done.name} exists and is another: target {done.target}")
    if done.state == pb.Binary.STATE_DESTROYED:
        raise UploadError(f"{done.name} was destroyed: import it under another version")
    signatures = _of_binary(binary, trusted)
    if key is not None:
        signatures.append(sign_digest(key, done.sha256))
    held = {one.key_id for one in done.signatures}
    for signature in signatures:
        if signature.key_id not in held:
            client.artifacts.SignBinary(pb.SignBinaryRequest(name=done.name, signature=signature))


def _import_bundle(
    client: Client, product: str, archive: Archive, trusted: dict[str, bytes], key: Ed25519PrivateKey | None
) -> Imported:
    given = archive.manifest["bundle"]
    name = f"{product}/bundles/{given['id']}"
    request = pb.CreateBundleRequest(
        parent=product,
        bundle_id=given["id"],
        version=given["version"],
        security_version=given["security_version"],
        entries=[
            pb.BundleEntrySpec(
                binary=f"{product}/artifacts/{one['artifact']}/versions/{one['version']}/binaries/{one['binary']}",
                metadata=one["metadata"],
            )
            for one in given["entries"]
        ],
    )
    _made(lambda: client.artifacts.CreateBundle(request))
    bundle = client.artifacts.GetBundle(pb.GetBundleRequest(name=name))
    same = bundle.statement == archive.statement
    if not same and not _same_content(bundle, archive):
        raise ArchiveError(f"{name} exists and is another bundle")
    signatures = _valid(archive.signatures, archive.statement, trusted, "the statement") if same else []
    if key is not None:
        signatures.append(sign_bundle(key, bundle))
    for signature in signatures:
        bundle = client.artifacts.SignBundle(pb.SignBundleRequest(name=name, signature=signature))
    return Imported(bundle, same)


def _same_content(bundle: pb.Bundle, archive: Archive) -> bool:
    """Whether the bundle is what the archive's would be under the other product's name."""
    given = archive.manifest["bundle"]
    binaries = {(one["artifact"], one["version"], one["id"]): one for one in archive.manifest["binaries"]}
    wanted = [
        (binary["sha256"], binary["size"], binary["target"], entry["metadata"])
        for entry in given["entries"]
        for binary in (binaries[entry["artifact"], entry["version"], entry["binary"]],)
    ]
    found = [(entry.sha256, entry.size, entry.target, entry.metadata) for entry in bundle.entries]
    return (bundle.version, bundle.security_version, found) == (given["version"], given["security_version"], wanted)
