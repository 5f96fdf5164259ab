"""Two slots on disk, staging beside them.

    <root>/slots/a, <root>/slots/b   a slot proper: complete, or absent
    <root>/staging/<digest>.part     downloads
    <root>/staging/<slot>.new        a slot being unpacked

Which slot is active is not kept here but in the agent's state file, outside the slots. A slot appears by one rename
of a completely written and flushed directory; the active slot is never touched. Archives are read as a stream with
caps: regular files and directories only, plain relative paths only, each path once.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from clients.device.errors import ArchiveError
from clients.device.state import sync_directory

SLOTS = ("a", "b")
PROGRAM = "run"


def other(slot: str) -> str:
    """The other slot."""
    return "b" if slot == "a" else "a"


@dataclass(frozen=True, slots=True)
class Caps:
    """Limits of what an archive may become."""

    total_bytes: int = 256 * 1024 * 1024
    members: int = 4096


@dataclass(frozen=True, slots=True)
class Part:
    """A verified download: an archive to unpack, or a single file to put beside the program under ``filename``."""

    path: Path
    filename: str = ""


class SlotStore:
    """The slots of one device."""

    def __init__(self, root: Path, caps: Caps | None = None) -> None:
        self._slots = root / "slots"
        self._staging = root / "staging"
        self._caps = caps or Caps()
        self._slots.mkdir(parents=True, exist_ok=True)
        self._staging.mkdir(exist_ok=True)

    def path(self, slot: str) -> Path:
        return self._slots / slot

    def program(self, slot: str) -> Path | None:
        """The program of a slot, or None for factory firmware that is not in a slot."""
        program = self._slots / slot / PROGRAM
        return program if program.is_file() else None

    def part(self, digest: str) -> Path:
        return self._staging / f"{digest}.part"

    def free_bytes(self) -> int:
        found = os.statvfs(self._staging)
        return found.f_bavail * found.f_frsize

    def keep_only(self, digests: Sequence[str]) -> None:
        """Remove every download but these, and whatever an interrupted unpacking left."""
        kept = {f"{digest}.part" for digest in digests}
        for path in self._staging.iterdir():
            if path.name in kept:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def install(self, slot: str, parts: Sequence[Part], active: str) -> None:
        """Fill the inactive slot with these parts, whole or not at all."""
        if slot == active:
            raise ValueError("the active slot is never written")
        building = self._staging / f"{slot}.new"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            taken: set[str] = set()
            budget = self._caps.total_bytes
            for part in parts:
                if part.filename:
                    budget -= _place(part, building, budget, taken)
                else:
                    budget -= _unpack(part.path, building, Caps(budget, self._caps.members), taken)
            if not (building / PROGRAM).is_file():
                raise ArchiveError("ARCHIVE_UNSAFE", f"the bundle holds no program {PROGRAM!r}")
            (building / PROGRAM).chmod(0o755)
            _sync_tree(building)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        final = self.path(slot)
        if final.exists():
            shutil.rmtree(final)
        building.rename(final)
        sync_directory(self._slots)


def safe_name(name: str) -> PurePosixPath:
    """A plain relative path of an archive member, or a refusal."""
    path = PurePosixPath(name)
    plain = path.parts and not path.is_absolute() and ".." not in path.parts
    if not plain or "\0" in name or "\\" in name or len(name) > 512:
        raise ArchiveError("ARCHIVE_UNSAFE", f"the path {name[:80]!r} leads elsewhere")
    return path


def _place(part: Part, building: Path, budget: int, taken: set[str]) -> int:
    path = safe_name(part.filename)
    if len(path.parts) != 1:
        raise ArchiveError("ARCHIVE_UNSAFE", "a single file lies beside the program, not in a folder")
    size = part.path.stat().st_size
    if size > budget:
        raise ArchiveError("ARCHIVE_TOO_LARGE", "the bundle unpacks to more than is allowed")
    _take(str(path), taken)
    with part.path.open("rb") as source:
        _write(building / path, source, size, 0o644)
    return size


class _Limited:
    """The unpacked stream of an archive, refused once it grows beyond a limit: a bomb ends here."""

    def __init__(self, source: gzip.GzipFile, limit: int) -> None:
        self._source = source
        self._left = limit

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(min(size, 1 << 20) if size >= 0 else 1 << 20)
        self._left -= len(data)
        if self._left < 0:
            raise ArchiveError("ARCHIVE_TOO_LARGE", "the archive unpacks to more than is allowed")
        return data


def _unpack(archive: Path, building: Path, caps: Caps, taken: set[str]) -> int:
    total = members = 0
    # Headers and padding come on top of the content: 2 KiB a member is ample.
    limit = caps.total_bytes + 2048 * caps.members
    try:
        with gzip.open(archive, "rb") as packed, tarfile.open(fileobj=_Limited(packed, limit), mode="r|") as tar:  # type: ignore[call-overload] # only read() is used
            for member in tar:
                members += 1
                total += member.size
                if members > caps.members or total > caps.total_bytes:
                    raise ArchiveError("ARCHIVE_TOO_LARGE", "the archive unpacks to more than is allowed")
                if member.name.rstrip("/") in {".", ""} and member.isdir():
                    continue
                path = safe_name(member.name)
                if member.isdir():
                    (building / path).mkdir(parents=True, exist_ok=True)
                elif member.isreg():
                    _take(str(path), taken)
                    source = tar.extractfile(member)
                    if source is None:
                        raise ArchiveError("ARCHIVE_UNSAFE", f"{member.name[:80]!r} has no content")
                    (building / path).parent.mkdir(parents=True, exist_ok=True)
                    _write(building / path, source, member.size, 0o755 if member.mode & 0o100 else 0o644)
                else:
                    raise ArchiveError("ARCHIVE_UNSAFE", f"{member.name[:80]!r} is neither file nor folder")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, UnicodeError, FileExistsError) as error:
        raise ArchiveError("ARCHIVE_UNSAFE", f"the archive cannot be read: {error}") from error
    except NotADirectoryError as error:
        raise ArchiveError("ARCHIVE_UNSAFE", f"a path goes through a file: {error.filename}") from error
    return total


def _take(name: str, taken: set[str]) -> None:
    if name in taken:
        raise ArchiveError("ARCHIVE_UNSAFE", f"{name[:80]!r} comes twice")
    taken.add(name)


def _write(path: Path, source: object, size: int, mode: int) -> None:
    read = source.read  # type: ignore[attr-defined] # any binary reader
    with path.open("xb") as file:
        left = size
        while left:
            data = read(min(left, 1 << 18))
            if not data:
                raise ArchiveError("ARCHIVE_UNSAFE", f"{path.name!r} ends early")
            file.write(data)
            left -= len(data)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(mode)


def _sync_tree(root: Path) -> None:
    for directory, _, _ in os.walk(root):
        sync_directory(Path(directory))
