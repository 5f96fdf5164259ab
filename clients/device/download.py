"""Fetching one binary into a file, however often the line breaks.

Rules: never more bytes than were signed, whatever the peer declares or sends; a peer slower than the floor rate is
left for a fresh link; what was fetched stays on disk for the next try; the digest is judged over the whole file
before anybody else may read it, and a file that fails it is removed.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

from clients.device.api import DeviceApi
from clients.device.errors import DownloadError, RefusedError
from clients.device.model import Binary

_CHUNK = 64 * 1024
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")


@dataclass(frozen=True, slots=True)
class Pace:
    """How slow is too slow."""

    floor_bytes_s: float = 1024.0
    window_s: float = 30.0
    total_s: float = 3600.0


def fetch_once(
    api: DeviceApi, binary: Binary, path: Path, pace: Pace, on_chunk: Callable[[], None], *, remaining_s: float
) -> None:
    """One try: a fresh link, then bytes from where the file ends. Returns when the file has the signed length.

    ``on_chunk`` is called after each piece is written. Raises RefusedError for what no retry can mend.
    """
    have = path.stat().st_size if path.exists() else 0
    if have > binary.size:
        path.unlink()
        have = 0
    if have == binary.size and have:
        return
    location = api.link(binary.url)
    with api.fetch(location, have, max(0.1, remaining_s)) as response, path.open("ab") as file:
        have = _judge(response, binary, have, file)
        _copy(response, file, binary.size - have, pace, on_chunk)


def _judge(response: http.client.HTTPResponse, binary: Binary, have: int, file: BinaryIO) -> int:
    """Decide from status and headers at which byte the body begins."""
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if match is None or int(match[1]) != have:
            raise DownloadError("RANGE_MISMATCH", "the object store sent another range than was asked for")
    elif response.status == HTTPStatus.OK:
        file.truncate(0)
        have = 0
    elif response.status in {HTTPStatus.FORBIDDEN, HTTPStatus.UNAUTHORIZED}:
        raise DownloadError("LINK_EXPIRED", "the object store does not take the link any more")
    else:
        raise DownloadError("OBJECT_STORE_ERROR", f"the object store answered {response.status}")
    if response.length is not None and response.length != binary.size - have:
        raise RefusedError(
            "SIZE_MISMATCH", f"{response.length} bytes are announced where {binary.size - have} were signed"
        )
    return have


def _copy(
    response: http.client.HTTPResponse, file: BinaryIO, expected: int, pace: Pace, on_chunk: Callable[[], None]
) -> None:
    window_start, window_bytes = time.monotonic(), 0
    while expected:
        data = response.read1(min(_CHUNK, expected))
        if not data:
            raise DownloadError("CONNECTION_LOST", f"the body ended {expected} bytes early")
        try:
            file.write(data)
            file.flush()
        except OSError as error:
            raise DownloadError("DISK_WRITE_FAILED", str(error)) from error
        expected -= len(data)
        window_bytes += len(data)
        passed = time.monotonic() - window_start
        if passed >= pace.window_s:
            if window_bytes < pace.floor_bytes_s * passed:
                raise DownloadError("DOWNLOAD_TOO_SLOW", f"{window_bytes} bytes in {passed:.0f} s")
            window_start, window_bytes = time.monotonic(), 0
        before = time.monotonic()
        on_chunk()
        # What we did ourselves meanwhile (a check-in) is not the peer's slowness.
        window_start += time.monotonic() - before
    # A chunked body announces no length, so its end must be seen too.
    if response.read1(1):
        raise RefusedError("SIZE_MISMATCH", "the body goes on beyond the signed length")
    os.fsync(file.fileno())


def verify_file(path: Path, binary: Binary) -> None:
    """The whole file is exactly what was signed; else it is removed."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(1024 * 1024):
            digest.update(data)
            size += len(data)
    if size != binary.size or digest.hexdigest() != binary.digest:
        path.unlink()
        raise RefusedError("DIGEST_MISMATCH", "the bytes are not those of the signed digest")
