"""A device's identities on disk: the one in use, and the one that is to follow it.

The factory's files are never touched; every later identity has a folder of its own with ``key.pem``, ``request.der``
and ``certificate.pem``. One small file says which counts, and it is replaced whole, after what it names is on the disk.
So a power cut between any two steps leaves an identity that the server accepts:

* before the next certificate is known to be stored, the one in use is the only one;
* from then on the next one is tried first, and given up only when the server refuses it for what it is;
* the one in use is dropped after the server has answered to the next one, by which it retired the old.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from clients.device.errors import StateError
from clients.device.state import StateFile, sync_directory

KEY, REQUEST, CERTIFICATE = "key.pem", "request.der", "certificate.pem"
_FACTORY = 0


@dataclass(frozen=True, slots=True)
class Files:
    """Of one identity."""

    certificate: Path
    key: Path


class IdentityStore:
    """Which identity counts. ``folder`` is in the state directory, outside the slots."""

    def __init__(self, folder: Path, factory: Files) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._factory = factory
        self._file = StateFile(folder / "identity.json")
        made_with = hashlib.sha256(factory.certificate.read_bytes()).hexdigest() if factory.certificate.exists() else ""
        body = self._file.load() or {}
        # Somebody gave the device another certificate by hand: that one counts, whatever came of the old.
        if made_with and body.get("factory", made_with) != made_with:
            body = {}
        self._made_with = made_with
        try:
            self._current = int(body.get("current", _FACTORY))
            self._next = int(body.get("next", _FACTORY))
            self._stored = bool(body.get("stored", False))
        except (TypeError, ValueError) as error:
            raise StateError("STATE_CORRUPT", "the identity file names no identity") from error

    @property
    def current(self) -> Files:
        """The identity in use."""
        return self._files(self._current)

    @property
    def announced(self) -> Path | None:
        """Folder of the key for which a certificate is wanted."""
        return self._path(self._next) if self._next and not self._stored else None

    @property
    def following(self) -> Files | None:
        """The next identity, once its certificate is stored."""
        return self._files(self._next) if self._next and self._stored else None

    def begin(self) -> Path:
        """An empty folder for a new key. Nothing counts on it yet."""
        number = max(self._current, self._next, *self._numbers(), _FACTORY) + 1
        path = self._path(number)
        path.mkdir()
        sync_directory(self._folder)
        return path

    def announce(self, path: Path) -> None:
        """The key of that folder is on the disk, and its request may be sent."""
        self._save(self._current, int(path.name), stored=False)

    def stored(self) -> None:
        """The certificate of the announced key is on the disk."""
        self._save(self._current, self._next, stored=True)

    def confirmed(self) -> None:
        """The server has answered to the next identity."""
        self._save(self._next, _FACTORY, stored=False)
        self.tidy()

    def drop(self) -> None:
        """Go on with the one in use."""
        self._save(self._current, _FACTORY, stored=False)
        self.tidy()

    def tidy(self) -> None:
        """Remove folders that do not count: what a kill left, and what was replaced."""
        for number in self._numbers():
            if number not in (self._current, self._next):
                shutil.rmtree(self._path(number), ignore_errors=True)

    def _save(self, current: int, following: int, *, stored: bool) -> None:
        self._file.save({"factory": self._made_with, "current": current, "next": following, "stored": stored})
        self._current, self._next, self._stored = current, following, stored

    def _numbers(self) -> list[int]:
        return [int(path.name) for path in self._folder.iterdir() if path.is_dir() and path.name.isdecimal()]

    def _path(self, number: int) -> Path:
        return self._folder / str(number)

    def _files(self, number: int) -> Files:
        path = self._path(number)
        return Files(path / CERTIFICATE, path / KEY) if number else self._factory
