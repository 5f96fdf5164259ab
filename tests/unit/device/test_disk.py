"""State, counter and slots: what a power cut or a hostile archive may leave."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from clients.device.counter import BLOCK, Counter
from clients.device.errors import ArchiveError, StateError
from clients.device.slots import Caps, Part, SlotStore
from clients.device.state import StateFile


def test_a_state_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "s.json")
    assert file.load() is None
    file.save({"a": 1})
    file.save({"a": 2})
    assert file.load() == {"a": 2}


def test_a_write_cut_short_leaves_the_old_state(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "s.json")
    file.save({"a": 1})
    (tmp_path / "s.json.new").write_bytes(b'{"body":{"a"')
    assert file.load() == {"a": 1}


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"null", b'{"body":{"a":2},"sha256":"0"}'])
def test_a_damaged_state_is_refused_not_guessed(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "s.json").write_bytes(damage)
    with pytest.raises(StateError, match="STATE_CORRUPT"):
        StateFile(tmp_path / "s.json").load()


def test_counters_rise_over_kills_and_are_reserved_before_use(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "c.json")
    seen: list[int] = []
    for _ in range(4):
        counter = Counter(file)
        for _ in range(BLOCK + 3):
            value = counter.take()
            reserved = file.load()
            assert reserved is not None
            assert value <= reserved["reserved"]
            seen.append(value)
    assert seen == sorted(set(seen))
    assert seen[0] == 1


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return gzip.compress(raw.getvalue())


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode = kind, link, 0o755
    return member


RUN = (_member("run"), b"#!/bin/sh\n")


def _install(root: Path, data: bytes, caps: Caps | None = None, *more: Part) -> SlotStore:
    store = SlotStore(root, caps)
    path = store.part("f" * 64)
    path.write_bytes(data)
    store.install("b", [Part(path), *more], active="a")
    return store


def test_a_slot_is_filled_whole_and_replaces_the_old(tmp_path: Path) -> None:
    config = tmp_path / "config.part"
    config.write_text("{}")
    store = _install(tmp_path, _tar(RUN, (_member("old"), b"x")))
    store = _install(tmp_path, _tar(RUN, (_member("lib/new"), b"y")), None, Part(config, "config.json"))
    assert sorted(path.name for path in store.path("b").iterdir()) == ["config.json", "lib", "run"]
    assert store.program("b") is not None
    assert store.program("a") is None


def test_the_active_slot_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="active"):
        SlotStore(tmp_path).install("a", [], active="a")


@pytest.mark.parametrize(
    "members",
    [
        [(_member("/etc/run"), b"x"), RUN],
        [(_member("../run"), b"x"), RUN],
        [(_member("a/../../x"), b"x"), RUN],
        [(_member("link", tarfile.SYMTYPE, "/etc"), b""), RUN],
        [(_member("link", tarfile.LNKTYPE, "run"), b""), RUN],
        [(_member("tty", tarfile.CHRTYPE), b""), RUN],
        [(_member("pipe", tarfile.FIFOTYPE), b""), RUN],
        [RUN, RUN],
        [(_member("file"), b"x"), (_member("file/below"), b"x"), RUN],
        [(_member("config.json"), b"x")],
    ],
)
def test_an_archive_that_reaches_elsewhere_leaves_no_trace(
    tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    with pytest.raises(ArchiveError, match="ARCHIVE_UNSAFE"):
        _install(tmp_path, _tar(*members))
    assert list((tmp_path / "slots").iterdir()) == []
    assert [path.name for path in (tmp_path / "staging").iterdir()] == [f"{'f' * 64}.part"]


def test_a_failed_install_keeps_what_was_in_the_slot(tmp_path: Path) -> None:
    _install(tmp_path, _tar(RUN, (_member("old"), b"x")))
    with pytest.raises(ArchiveError):
        _install(tmp_path, b"not an archive")
    assert (tmp_path / "slots" / "b" / "old").exists()


def test_t23_bombs_end_at_the_cap(tmp_path: Path) -> None:
    bomb = _tar(RUN, (_member("big"), bytes(4_000_000)))
    with pytest.raises(ArchiveError, match="ARCHIVE_TOO_LARGE"):
        _install(tmp_path, bomb, Caps(total_bytes=1_000_000))
    many = _tar(RUN, *[(_member(f"f{index}"), b"") for index in range(50)])
    with pytest.raises(ArchiveError, match="ARCHIVE_TOO_LARGE"):
        _install(tmp_path, many, Caps(members=20))
    # A header that unpacks without end, before any member is seen.
    header = _member("x", tarfile.XHDTYPE)
    endless = _tar((header, bytes(8_000_000)))
    with pytest.raises(ArchiveError):
        _install(tmp_path, endless, Caps(total_bytes=1_000_000, members=10))


def test_a_cut_archive_is_refused(tmp_path: Path) -> None:
    whole = _tar(RUN, (_member("noise"), bytes(range(256)) * 4000))
    with pytest.raises(ArchiveError, match="ARCHIVE_UNSAFE"):
        _install(tmp_path, whole[: len(whole) // 2])


def test_two_parts_may_not_write_the_same_file(tmp_path: Path) -> None:
    config = tmp_path / "c.part"
    config.write_text("{}")
    with pytest.raises(ArchiveError):
        _install(tmp_path, _tar(RUN, (_member("config.json"), b"{}")), None, Part(config, "config.json"))


def test_staging_is_swept_but_for_what_is_needed(tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    for digest in ("a" * 64, "b" * 64):
        store.part(digest).write_bytes(b"x")
    (tmp_path / "staging" / "b.new").mkdir()
    store.keep_only(["a" * 64])
    assert [path.name for path in (tmp_path / "staging").iterdir()] == [f"{'a' * 64}.part"]
