"""Uploads a binary in parts straight to the object store, resumably, and waits until the server has hashed it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import urllib3
from groundswell.artifacts.v1 import artifacts_pb2

from clients.sdk.client import Client
from clients.sdk.errors import ApiError, SdkError

PART_SIZE: Final = 8 * 1024 * 1024
PARALLEL: Final = 4
PRESIGN_BATCH: Final = 100
HASH_TIMEOUT_S: Final = 300.0

State = artifacts_pb2.Binary.State
Progress = Callable[[str, int, int], None]
"""Called with (phase, bytes done, bytes in all); phases: digest, upload, hash."""


class UploadError(SdkError):
    """The upload cannot go on; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Upload:
    """What to upload and as what."""

    path: Path
    artifact: str
    """Resource name `…/artifacts/{artifact}`."""
    version: str
    """Id of the artifact version, also its text."""
    binary_id: str
    target: str = "portable"
    metadata: str = ""
    part_size: int = PART_SIZE
    offset: int = 0
    """Where the binary begins in the file."""
    length: int | None = None
    """How many bytes it has; None means to the end of the file."""


def digest_parts(upload: Upload, progress: Progress) -> tuple[str, list[artifacts_pb2.UploadPart]]:
    """SHA-256 of the binary and of each part, in one reading."""
    whole, done = hashlib.sha256(), 0
    size = upload.path.stat().st_size - upload.offset if upload.length is None else upload.length
    parts: list[artifacts_pb2.UploadPart] = []
    for chunk in _chunks(upload, size):
        whole.update(chunk)
        digest = hashlib.sha256(chunk).hexdigest()
        parts.append(artifacts_pb2.UploadPart(index=len(parts) + 1, size=len(chunk), sha256=digest))
        done += len(chunk)
        progress("digest", done, size)
    if not parts:
        raise UploadError(f"{upload.path} is empty: there is nothing to upload")
    return whole.hexdigest(), parts


def upload_binary(client: Client, upload: Upload, progress: Progress = lambda *_: None) -> artifacts_pb2.Binary:
    """Create what is missing, upload what is not there yet, hash, and return the binary (SIGNABLE or SIGNED).

    Safe to repeat after any interruption. Raises UploadError, ApiError, OSError.
    """
    sha256, parts = digest_parts(upload, progress)
    binary = _declare(client, upload, sha256, sum(part.size for part in parts))
    if binary.state == State.STATE_UPLOADABLE:
        _send_parts(client, upload, binary.name, parts, progress)
        binary = client.artifacts.CompleteUpload(artifacts_pb2.CompleteUploadRequest(name=binary.name, parts=parts))
    if binary.state == State.STATE_HASHABLE:
        binary = client.artifacts.HashBinary(artifacts_pb2.HashBinaryRequest(name=binary.name))
    return wait_hashed(client, binary, progress)


def wait_hashed(client: Client, binary: artifacts_pb2.Binary, progress: Progress) -> artifacts_pb2.Binary:
    """Follow the server's hashing. Raises UploadError when the digest differs from the declared one."""
    give_up = time.monotonic() + HASH_TIMEOUT_S
    while binary.state == State.STATE_HASHING:
        if time.monotonic() > give_up:
            raise UploadError(
                f"{binary.name} is still being hashed after {HASH_TIMEOUT_S:.0f} s: repeat the command later"
            )
        progress("hash", 0, binary.size)
        time.sleep(0.1)
        binary = client.artifacts.GetBinary(artifacts_pb2.GetBinaryRequest(name=binary.name))
    if binary.state == State.STATE_UPLOADABLE:
        raise UploadError(
            f"the server refused the bytes of {binary.name}: {binary.state_reason}; upload the file again"
        )
    progress("hash", binary.size, binary.size)
    return binary


def _declare(client: Client, upload: Upload, sha256: str, size: int) -> artifacts_pb2.Binary:
    product, _, artifact_id = upload.artifact.rpartition("/artifacts/")
    version_name = f"{upload.artifact}/versions/{upload.version}"
    _create_if_missing(
        lambda: client.artifacts.CreateArtifact(
            artifacts_pb2.CreateArtifactRequest(
                parent=product, artifact_id=artifact_id, artifact=artifacts_pb2.Artifact(display_name=artifact_id)
            )
        )
    )
    _create_if_missing(
        lambda: client.artifacts.CreateArtifactVersion(
            artifacts_pb2.CreateArtifactVersionRequest(
                parent=upload.artifact,
                artifact_version_id=upload.version,
                artifact_version=artifacts_pb2.ArtifactVersion(version=upload.version),
            )
        )
    )
    wanted = artifacts_pb2.Binary(target=upload.target, size=size, sha256=sha256, custom_metadata=upload.metadata)
    try:
        return client.artifacts.CreateBinary(
            artifacts_pb2.CreateBinaryRequest(parent=version_name, binary_id=upload.binary_id, binary=wanted)
        )
    except ApiError as error:
        if error.code != "ALREADY_EXISTS":
            raise
    found = client.artifacts.GetBinary(
        artifacts_pb2.GetBinaryRequest(name=f"{version_name}/binaries/{upload.binary_id}")
    )
    if (found.sha256, found.size) != (sha256, size):
        raise UploadError(
            f"{found.name} exists with other bytes ({found.sha256[:12]}…): use another version or id, "
            "or `swell binary reset` if it was never signed"
        )
    return found


def _create_if_missing(create: Callable[[], object]) -> None:
    try:
        create()
    except ApiError as error:
        if error.code != "ALREADY_EXISTS":
            raise


def _send_parts(
    client: Client, upload: Upload, name: str, parts: list[artifacts_pb2.UploadPart], progress: Progress
) -> None:
    total, done = sum(part.size for part in parts), 0
    pool = urllib3.PoolManager(maxsize=PARALLEL, retries=urllib3.Retry(3, backoff_factor=0.2, allowed_methods={"PUT"}))
    sizes = {part.index: part.size for part in parts}
    for start in range(0, len(parts), PRESIGN_BATCH):
        batch = parts[start : start + PRESIGN_BATCH]
        answer = client.artifacts.PresignParts(artifacts_pb2.PresignPartsRequest(name=name, parts=batch))
        with ThreadPoolExecutor(PARALLEL) as threads:
            for index in threads.map(lambda part: _put(pool, upload, part), answer.parts):
                done += sizes[index]
                progress("upload", done, total)


def _put(pool: urllib3.PoolManager, upload: Upload, part: artifacts_pb2.PresignedPart) -> int:
    if part.stored:
        return part.index
    start = (part.index - 1) * upload.part_size
    most = upload.part_size if upload.length is None else min(upload.part_size, upload.length - start)
    with upload.path.open("rb") as file:
        file.seek(upload.offset + start)
        data = file.read(most)
    response = pool.request("PUT", part.url, body=data, headers=dict(part.headers))
    if response.status != 200:
        raise UploadError(f"the object store refused part {part.index}: {response.status} {response.data[:200]!r}")
    return part.index


def _chunks(upload: Upload, left: int) -> Iterator[bytes]:
    with upload.path.open("rb") as file:
        file.seek(upload.offset)
        while chunk := file.read(min(upload.part_size, left)):
            left -= len(chunk)
            yield chunk
