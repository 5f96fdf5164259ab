"""Small checksummed JSON files that a power cut leaves old or new, never torn.

A write goes to a temporary file, which is flushed to the disk before it takes the name, and the directory is
flushed after it did. The checksum tells bit rot from a programming error; a file that fails it is refused, since
going on with an older copy would let a security floor or a boot pointer fall back unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clients.device.errors import StateError


def sync_directory(path: Path) -> None:
    """Make names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file, old or new whatever happens."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def _encode(body: object) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


class StateFile:
    """One JSON object on disk."""

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> dict[str, Any] | None:
        """What was saved last, or None when nothing ever was."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            document = json.loads(data)
            body, checksum = document["body"], document["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise StateError("STATE_CORRUPT", f"{self._path.name} is not a state file: {error}") from None
        if hashlib.sha256(_encode(body)).hexdigest() != checksum or not isinstance(body, dict):
            raise StateError("STATE_CORRUPT", f"{self._path.name} does not match its own checksum")
        return body

    def save(self, body: Mapping[str, Any]) -> None:
        """Durable when it returns."""
        checksum = hashlib.sha256(_encode(body)).hexdigest()
        write_atomically(self._path, _encode({"body": body, "sha256": checksum}))
