"""Bundle archives: one spelling, and everything else refused before anything is made of it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clients.sdk.archive import ArchiveError, read_archive, write_archive
from libs.trust.canonical import to_canonical
from libs.trust.statement import Statement, StatementBinary

PRODUCT = "organizations/acme/products/pump"
CONTENT = b"firmware" * 1000
OTHER = b"boot loader"
SIGNATURES = [{"key_id": "ab" * 32, "signature": "cd" * 64}]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def binary(content: bytes, target: str) -> dict[str, Any]:
    return {
        "artifact": "main",
        "version": "1.0.0",
        "id": target,
        "target": target,
        "size": len(content),
        "sha256": digest(content),
        "custom_metadata": "",
        "signatures": SIGNATURES,
    }


def manifest() -> dict[str, Any]:
    return {
        "format": "groundswell.bundle-archive.v1",
        "bundle": {
            "id": "fw",
            "display_name": "",
            "product": PRODUCT,
            "version": "1.0.0",
            "security_version": 3,
            "entries": [
                {"artifact": "main", "version": "1.0.0", "binary": target, "metadata": "{}"} for target in ("b", "a")
            ],
        },
        "artifacts": [{"id": "main", "display_name": "Main", "custom_metadata": ""}],
        "versions": [
            {"artifact": "main", "id": "1.0.0", "version": "1.0.0", "custom_metadata": "", "dependencies": []}
        ],
        "binaries": [binary(CONTENT, "a"), binary(OTHER, "b")],
    }


def statement(product: str = PRODUCT) -> bytes:
    return Statement(
        product,
        "1.0.0",
        3,
        tuple(StatementBinary(digest(it), digest(b"{}"), len(it), to) for it, to in ((OTHER, "b"), (CONTENT, "a"))),
    ).to_bytes()


def content(wanted: str) -> Iterator[bytes]:
    data = {digest(CONTENT): CONTENT, digest(OTHER): OTHER}[wanted]
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "fw.tar"
    write_archive(path, manifest(), statement(), SIGNATURES, content)
    return path


def test_what_is_written_is_read_and_is_the_same_every_time(archive: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.tar"
    write_archive(again, manifest(), statement(), SIGNATURES, content)
    assert again.read_bytes() == archive.read_bytes()
    read = read_archive(archive)
    assert (read.manifest, read.statement) == (manifest(), statement())
    assert read.signatures == (("ab" * 32, "cd" * 64),)
    for data in (CONTENT, OTHER):
        blob = read.blobs[digest(data)]
        assert archive.read_bytes()[blob.offset : blob.offset + blob.size] == data
    assert sorted(one.name for one in tmp_path.iterdir()) == ["again.tar", "fw.tar"], "nothing half written is left"


def test_any_tar_program_lists_it(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    blobs = sorted(f"blobs/{digest(data)}" for data in (CONTENT, OTHER))
    assert names == ["manifest.json", "statement", "signatures.json", *blobs]


def test_content_that_is_not_what_was_asked_for_leaves_no_file(tmp_path: Path) -> None:
    for wrong in (b"", CONTENT[:-1], CONTENT + b"x", CONTENT[::-1]):
        with pytest.raises(ArchiveError):
            write_archive(
                tmp_path / "fw.tar", manifest(), statement(), SIGNATURES, lambda _, wrong=wrong: iter([wrong])
            )
        assert not list(tmp_path.iterdir())


def test_it_is_refused_wherever_it_is_cut(archive: Path) -> None:
    whole = archive.read_bytes()
    for end in [*range(0, len(whole), 511), len(whole) - 1]:
        archive.write_bytes(whole[:end])
        with pytest.raises(ArchiveError):
            read_archive(archive)


def test_no_changed_byte_goes_unseen(archive: Path) -> None:
    """Names and signatures can be spelled otherwise; then the reader sees others, and the import judges them."""
    whole = archive.read_bytes()
    for at in range(0, len(whole), 97):
        archive.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            read = read_archive(archive)
        except ArchiveError:
            continue
        assert (read.manifest, read.signatures) != (manifest(), (("ab" * 32, "cd" * 64),)), at
        assert read.statement == statement()


def members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def rewritten(path: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> None:
    found = members(path)
    change(found)
    buffer = io.BytesIO()
    for member, data in found:
        if member.isreg():
            member.size = len(data)
        buffer.write(member.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
    path.write_bytes(buffer.getvalue() + bytes(1024))


def extra(name: str, kind: bytes = tarfile.REGTYPE) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def change(found: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "../../etc/passwd" if kind != tarfile.REGTYPE else ""
        found.append((member, b"" if kind != tarfile.REGTYPE else b"x"))

    return change


def renamed(name: str) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def change(found: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        found[-1][0].name = name

    return change


@pytest.mark.parametrize(
    "change",
    [
        extra("notes.txt"),
        extra("../../escape"),
        extra("/etc/passwd"),
        extra("link", tarfile.SYMTYPE),
        extra("link", tarfile.LNKTYPE),
        extra("device", tarfile.CHRTYPE),
        renamed("blobs/../../escape"),
        renamed("/blobs/x"),
        lambda found: found.reverse(),
        lambda found: found.append(found[-1]),
        lambda found: found.pop(),
        lambda found: setattr(found[0][0], "mode", 0o4755),
        lambda found: setattr(found[0][0], "mtime", 1),
        lambda found: setattr(found[0][0], "uname", "root"),
    ],
)
def test_t22_members_that_do_not_belong_are_refused(archive: Path, change: Any) -> None:
    rewritten(archive, change)
    with pytest.raises(ArchiveError):
        read_archive(archive)


def test_what_follows_the_end_is_refused(archive: Path) -> None:
    whole = archive.read_bytes()
    for tail in (b"\0", b"x", whole):
        archive.write_bytes(whole + tail)
        with pytest.raises(ArchiveError):
            read_archive(archive)


@pytest.mark.parametrize("form", ["w:gz", "w:xz", "w:bz2"])
def test_compressed_archives_are_not_opened_at_all(archive: Path, form: str) -> None:
    """So there is nothing that could blow up."""
    found = members(archive)
    with tarfile.open(archive, form) as tar:  # type: ignore[call-overload]
        for member, data in found:
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(ArchiveError):
        read_archive(archive)


def test_a_member_that_claims_to_be_huge_is_refused_before_it_is_read(archive: Path) -> None:
    def change(found: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        del found[1:]

    rewritten(archive, change)
    member = tarfile.TarInfo("manifest.json")
    member.size = 8 * 1024**3 - 1
    archive.write_bytes(member.tobuf(tarfile.USTAR_FORMAT) + archive.read_bytes()[512:])
    with pytest.raises(ArchiveError, match="more than"):
        read_archive(archive)


def with_manifest(path: Path, text: bytes, signed: bytes = b"", signatures: bytes = b"") -> None:
    def change(found: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        found[0] = (found[0][0], text)
        if signed:
            found[1] = (found[1][0], signed)
        if signatures:
            found[2] = (found[2][0], signatures)

    rewritten(path, change)


def edit(change: Callable[[dict[str, Any]], None]) -> bytes:
    document = manifest()
    change(document)
    return to_canonical(document)


@pytest.mark.parametrize(
    "change",
    [
        lambda it: it["bundle"].update(version="1.0.1"),
        lambda it: it["bundle"].update(security_version=2),
        lambda it: it["bundle"].update(security_version=True),
        lambda it: it["bundle"].update(product="organizations/other/products/pump"),
        lambda it: it["bundle"].update(id="../escape"),
        lambda it: it["bundle"]["entries"].reverse(),
        lambda it: it["bundle"]["entries"].pop(),
        lambda it: it["bundle"].update(entries=[]),
        lambda it: it["bundle"]["entries"][0].update(metadata='{"a":1}'),
        lambda it: it["binaries"][0].update(target="c"),
        lambda it: it["binaries"][0].update(size=1),
        lambda it: it["binaries"][0].update(sha256="zz"),
        lambda it: it["binaries"][0].update(id="a/b"),
        lambda it: it["binaries"][0].update(extra=1),
        lambda it: it["binaries"].append(it["binaries"][0]),
        lambda it: it["binaries"][0]["signatures"].append({"key_id": "x", "signature": "y"}),
        lambda it: it["versions"].pop(),
        lambda it: it["artifacts"].append({"id": "more", "display_name": "", "custom_metadata": ""}),
        lambda it: it["versions"][0].update(dependencies=["boot"]),
        lambda it: it.update(format="groundswell.bundle-archive.v2"),
        lambda it: it.pop("format"),
    ],
)
def test_a_manifest_says_what_was_signed_and_nothing_else(archive: Path, change: Any) -> None:
    with_manifest(archive, edit(change))
    with pytest.raises(ArchiveError):
        read_archive(archive)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(manifest()).encode(),
        to_canonical(manifest()) + b" ",
        b'{"format":1,"format":2}',
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b"NaN",
    ],
)
def test_t22_a_manifest_has_one_spelling(archive: Path, text: bytes) -> None:
    with_manifest(archive, text)
    with pytest.raises(ArchiveError):
        read_archive(archive)


@pytest.mark.parametrize(
    ("signed", "signatures"),
    [
        (statement("organizations/other/products/pump"), b""),
        (statement() + b" ", b""),
        (b"{}", b""),
        (b"", to_canonical(SIGNATURES * 2)),
        (b"", to_canonical([{"key_id": "AB" * 32, "signature": "cd" * 64}])),
        (b"", to_canonical([{"key_id": "ab" * 32, "signature": "cd" * 64, "algorithm": "none"}])),
        (b"", to_canonical({})),
    ],
)
def test_t22_statement_and_signatures_have_one_form(archive: Path, signed: bytes, signatures: bytes) -> None:
    with_manifest(archive, to_canonical(manifest()), signed, signatures)
    with pytest.raises(ArchiveError):
        read_archive(archive)
