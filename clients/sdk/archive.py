"""Bundle archives: one file that holds a bundle with all that is needed to trust it and to have it elsewhere.

A tar with one spelling. Its members are, in this order, ``manifest.json`` (canonical JSON), ``statement`` (the signed
bytes), ``signatures.json`` (canonical JSON) and ``blobs/<sha256>`` in the order of their digests: regular files, with
headers that say nothing but name and size. A reader makes each header anew and compares it byte for byte, so links,
sparse files, extended headers, other names, other orders and anything behind the end are refused without being
understood. Nothing is ever unpacked to a path that an archive names.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from clients.sdk.errors import SdkError
from libs.trust.canonical import parse_strict, to_canonical
from libs.trust.statement import Statement, StatementBinary, parse

FORMAT: Final = "groundswell.bundle-archive.v1"
MANIFEST: Final = "manifest.json"
STATEMENT: Final = "statement"
SIGNATURES: Final = "signatures.json"
_BLOCK: Final = tarfile.BLOCKSIZE
_END: Final = bytes(2 * _BLOCK)
_LIMITS: Final = {MANIFEST: 16 * 1024 * 1024, STATEMENT: 1024 * 1024, SIGNATURES: 64 * 1024}
_CHUNK: Final = 1024 * 1024
_ID: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_MOST: Final = 64
"""Entries of a bundle."""


class ArchiveError(SdkError):
    """The archive is not one, or not whole; the message says what was found."""


@dataclass(frozen=True, slots=True)
class Blob:
    """Where content lies in the archive."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Archive:
    """A verified archive: every digest and size in it was compared, its signatures were not."""

    path: Path
    manifest: Mapping[str, Any]
    statement: bytes
    signatures: tuple[tuple[str, str], ...]
    """(key id, hex signature) over the statement."""
    blobs: Mapping[str, Blob] = field(default_factory=dict)


def write_archive(
    path: Path,
    manifest: Mapping[str, Any],
    statement: bytes,
    signatures: list[dict[str, str]],
    content: Callable[[str], Iterator[bytes]],
) -> None:
    """Write it beside its name and move it there when it is whole. ``content`` gives the bytes of a digest."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    sizes = {binary["sha256"]: binary["size"] for binary in manifest["binaries"]}
    try:
        with scratch.open("xb") as file:
            for name, data in (
                (MANIFEST, to_canonical(dict(manifest))),
                (STATEMENT, statement),
                (SIGNATURES, to_canonical(signatures)),
            ):
                file.write(_header(name, len(data)))
                file.write(data)
                file.write(_padding(len(data)))
            for digest in sorted(sizes):
                file.write(_header(f"blobs/{digest}", sizes[digest]))
                _copy(content(digest), file, digest, sizes[digest])
                file.write(_padding(sizes[digest]))
            file.write(_END)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _copy(chunks: Iterator[bytes], file: BinaryIO, digest: str, size: int) -> None:
    whole, left = hashlib.sha256(), size
    for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            break
        whole.update(chunk)
        file.write(chunk)
    if left or whole.hexdigest() != digest:
        raise ArchiveError(f"what was received for {digest} is not that content")


def read_archive(path: Path) -> Archive:
    """Verify the whole file. Raises ArchiveError, OSError."""
    with path.open("rb") as file:
        texts = {}
        for name in (MANIFEST, STATEMENT, SIGNATURES):
            size = _size_of(file, name)
            if size > _LIMITS[name]:
                raise ArchiveError(f"{name} has {size} bytes, more than {_LIMITS[name]}")
            texts[name] = _exactly(file, size, name)
            _skip_padding(file, size, name)
        manifest, statement = _manifest(texts[MANIFEST]), texts[STATEMENT]
        _compare(manifest, statement)
        signatures = _signatures(texts[SIGNATURES], "signatures.json")
        blobs = {}
        for digest, size in sorted({one["sha256"]: one["size"] for one in manifest["binaries"]}.items()):
            name = f"blobs/{digest}"
            if _size_of(file, name) != size:
                raise ArchiveError(f"{name} has another size than the manifest says")
            blobs[digest] = Blob(file.tell(), size)
            _verify(file, digest, size)
            _skip_padding(file, size, name)
        if file.read(len(_END) + 1) != _END:
            raise ArchiveError("the archive goes on behind its last member, or was cut")
    return Archive(path, manifest, statement, signatures, blobs)


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    try:
        return member.tobuf(tarfile.USTAR_FORMAT)
    except ValueError:
        raise ArchiveError(f"{name} has {size} bytes: an archive holds files below 8 GiB") from None


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _size_of(file: BinaryIO, name: str) -> int:
    """Size of the member that has to come next: its header is what we would have written."""
    header = _exactly(file, _BLOCK, f"the header of {name}")
    digits = header[124:135]
    if not re.fullmatch(rb"[0-7]{11}", digits) or header != _header(name, int(digits, 8)):
        raise ArchiveError(f"{name} was expected, and something else is there")
    return int(digits, 8)


def _exactly(file: BinaryIO, size: int, what: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ArchiveError(f"the archive ends within {what}")
    return data


def _skip_padding(file: BinaryIO, size: int, name: str) -> None:
    padding = _padding(size)
    if _exactly(file, len(padding), name) != padding:
        raise ArchiveError(f"there are bytes behind {name} that do not belong there")


def _verify(file: BinaryIO, digest: str, size: int) -> None:
    whole, left = hashlib.sha256(), size
    while left:
        chunk = _exactly(file, min(_CHUNK, left), f"blobs/{digest}")
        whole.update(chunk)
        left -= len(chunk)
    if whole.hexdigest() != digest:
        raise ArchiveError(f"blobs/{digest} holds other bytes")


def _document(text: bytes, name: str) -> Any:
    try:
        document = parse_strict(text)
        if to_canonical(document) != text:
            raise ArchiveError(f"{name} is not in canonical form")
    except ValueError as error:
        raise ArchiveError(f"{name} cannot be read: {error}") from None
    return document


def _manifest(text: bytes) -> dict[str, Any]:
    manifest = _fields(
        _document(text, MANIFEST),
        "the manifest",
        {"format": str, "bundle": dict, "artifacts": list, "versions": list, "binaries": list},
    )
    if manifest["format"] != FORMAT:
        raise ArchiveError(f"the format is '{manifest['format'][:80]}', not {FORMAT}")
    bundle = _fields(
        manifest["bundle"],
        "bundle",
        {
            "id": str,
            "display_name": str,
            "product": str,
            "version": str,
            "security_version": int,
            "entries": list,
        },
    )
    for entry in bundle["entries"]:
        _fields(entry, "an entry", {"artifact": str, "version": str, "binary": str, "metadata": str})
    for artifact in manifest["artifacts"]:
        _fields(artifact, "an artifact", {"id": str, "display_name": str, "custom_metadata": str})
    for version in manifest["versions"]:
        _fields(
            version,
            "a version",
            {"artifact": str, "id": str, "version": str, "custom_metadata": str, "dependencies": list},
        )
        for dependency in version["dependencies"]:
            _fields(dependency, "a dependency", {"artifact": str, "requirement": str})
    for binary in manifest["binaries"]:
        _fields(
            binary,
            "a binary",
            {
                "artifact": str,
                "version": str,
                "id": str,
                "target": str,
                "size": int,
                "sha256": str,
                "custom_metadata": str,
                "signatures": list,
            },
        )
        _signatures(to_canonical(binary["signatures"]), f"signatures of {binary['id'][:80]}")
        if not _DIGEST.fullmatch(binary["sha256"]) or binary["size"] < 1:
            raise ArchiveError("a binary has no proper digest and size")
    _check_references(manifest)
    return manifest


def _fields(value: Any, what: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(kinds):
        raise ArchiveError(f"{what} is no object with exactly {', '.join(sorted(kinds))}")
    for name, kind in kinds.items():
        if type(value[name]) is not kind:
            raise ArchiveError(f"{name} of {what} is no {kind.__name__}")
    return value


def _check_references(manifest: Mapping[str, Any]) -> None:
    """Ids are ids, nothing stands twice, and what is named is there, and nothing else."""
    binaries = [(one["artifact"], one["version"], one["id"]) for one in manifest["binaries"]]
    versions = [(one["artifact"], one["id"]) for one in manifest["versions"]]
    artifacts = [one["id"] for one in manifest["artifacts"]]
    entries = [(one["artifact"], one["version"], one["binary"]) for one in manifest["bundle"]["entries"]]
    for part in (manifest["bundle"]["id"], *artifacts, *(text for one in (*versions, *binaries) for text in one)):
        if not _ID.fullmatch(part):
            raise ArchiveError(f"'{part[:80]}' is no id")
    if not 0 < len(entries) <= _MOST or len(set(entries)) != len(entries):
        raise ArchiveError(f"a bundle has 1 to {_MOST} entries, each once")
    for listed, needed in (
        (binaries, set(entries)),
        (versions, {one[:2] for one in entries}),
        (artifacts, {one[0] for one in entries}),
    ):
        if len(listed) != len(set(listed)) or set(listed) != needed:
            raise ArchiveError("the manifest lists other artifacts, versions or binaries than the bundle holds")


def _signatures(text: bytes, what: str) -> tuple[tuple[str, str], ...]:
    listed = _document(text, what)
    if not isinstance(listed, list) or len(listed) > _MOST:
        raise ArchiveError(f"{what} is no list of at most {_MOST}")
    found: list[tuple[str, str]] = []
    for one in listed:
        _fields(one, "a signature", {"key_id": str, "signature": str})
        if not _DIGEST.fullmatch(one["key_id"]) or not re.fullmatch(r"[0-9a-f]{128}", one["signature"]):
            raise ArchiveError(f"{what} hold something that is no signature")
        found.append((one["key_id"], one["signature"]))
    if len({key for key, _ in found}) != len(found):
        raise ArchiveError(f"{what} name a key twice")
    return tuple(found)


def _compare(manifest: Mapping[str, Any], statement: bytes) -> None:
    """The signed statement says what the manifest says."""
    bundle = manifest["bundle"]
    binaries = {(one["artifact"], one["version"], one["id"]): one for one in manifest["binaries"]}
    try:
        stated = parse(statement)
        wanted = Statement(
            bundle["product"],
            bundle["version"],
            bundle["security_version"],
            tuple(
                StatementBinary(
                    digest=binary["sha256"],
                    metadata_digest=hashlib.sha256(entry["metadata"].encode()).hexdigest(),
                    size=binary["size"],
                    target=binary["target"],
                )
                for entry in bundle["entries"]
                for binary in (binaries[entry["artifact"], entry["version"], entry["binary"]],)
            ),
        )
    except ValueError as error:
        raise ArchiveError(f"the statement cannot be read: {error}") from None
    if stated != wanted:
        raise ArchiveError("the signed statement is about another bundle than the manifest")
