"""Named secret keys in storage that all replicas share, and secrets derived from them.

Invariants:

* A key, once created under a name, never changes: replicas that race agree on the one that was written first.
* No key is on disk in clear: files are sealed with AES-GCM under the key-encryption key, bound to their name.
* What is derived (codes, webhook secrets, MAC keys) needs no storage: the same name, purpose and resource always give
  the same 32 bytes, so a retry of a request can answer with the same secret without any log having held it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES: Final = 32
_MAGIC: Final = b"GSK1"
_NONCE_BYTES: Final = 12
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}\Z")
_PRIVATE_MODE: Final = 0o600


class KeyStoreError(Exception):
    """The store cannot be used as it is; the message says what to do and never holds key material."""


class KeyStore(Protocol):
    """Named keys."""

    def get(self, name: str) -> bytes | None:
        """The key, or None when there is none of that name."""

    def get_or_create(self, name: str, make: Callable[[], bytes]) -> bytes:
        """The key of that name; the first caller anywhere makes it, all others get that one."""

    def derive(self, name: str, purpose: str, resource: str) -> bytes:
        """HMAC-SHA256 of purpose, NUL, resource under the named key, which is made at first use."""


def new_key() -> bytes:
    """A fresh random key."""
    return secrets.token_bytes(KEY_BYTES)


def check_name(name: str) -> str:
    """Names become file names: nothing that could leave the folder or hide in it."""
    if not _NAME.match(name) or name == "kek":
        raise KeyStoreError(f"{name!r} is not a key name: use lowercase letters, digits, '.', '_' and '-', not 'kek'")
    return name


def derive(key: bytes, purpose: str, resource: str) -> bytes:
    """The derivation itself. A NUL in the purpose would let two different pairs give the same input."""
    if "\0" in purpose:
        raise KeyStoreError("a purpose holds no NUL")
    return hmac.digest(key, purpose.encode() + b"\0" + resource.encode(), hashlib.sha256)


class MemoryKeyStore:
    """Keys that live as long as the object, for tests."""

    def __init__(self) -> None:
        self._keys: dict[str, bytes] = {}

    def get(self, name: str) -> bytes | None:
        return self._keys.get(check_name(name))

    def get_or_create(self, name: str, make: Callable[[], bytes]) -> bytes:
        if check_name(name) not in self._keys:
            self._keys[name] = make()
        return self._keys[name]

    def derive(self, name: str, purpose: str, resource: str) -> bytes:
        return derive(self.get_or_create(name, new_key), purpose, resource)


class DirectoryKeyStore:
    """Sealed files in one folder. Keys that were read stay in memory: they never change."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cipher = AESGCM(_read_kek(folder / "kek"))
        self._known: dict[str, bytes] = {}

    def get(self, name: str) -> bytes | None:
        known = self._known.get(check_name(name))
        if known is not None:
            return known
        try:
            sealed = self._path(name).read_bytes()
        except FileNotFoundError:
            return None
        key = self._open(name, sealed)
        self._known[name] = key
        return key

    def get_or_create(self, name: str, make: Callable[[], bytes]) -> bytes:
        found = self.get(name)
        if found is None:
            self._create(name, make())
            # Whoever linked first has won; read what is there, not what was made here.
            found = self.get(name)
        if found is None:
            raise KeyStoreError(f"key {name} vanished while it was created: is {self._folder} on shared storage?")
        return found

    def derive(self, name: str, purpose: str, resource: str) -> bytes:
        return derive(self.get_or_create(name, new_key), purpose, resource)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.key"

    def _open(self, name: str, sealed: bytes) -> bytes:
        head = len(_MAGIC) + _NONCE_BYTES
        if not sealed.startswith(_MAGIC):
            raise KeyStoreError(f"key {name} is not in a format this build knows")
        try:
            return self._cipher.decrypt(sealed[len(_MAGIC) : head], sealed[head:], name.encode())
        except InvalidTag:
            raise KeyStoreError(
                f"key {name} does not open: it was damaged or renamed, or the key-encryption key is another one"
            ) from None

    def _create(self, name: str, key: bytes) -> None:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = _MAGIC + nonce + self._cipher.encrypt(nonce, key, name.encode())
        draft = self._folder / f".{name}.{secrets.token_hex(8)}.draft"
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE_MODE)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(sealed)
                file.flush()
                os.fsync(file.fileno())
            # A link is create-only and atomic: a reader sees a whole key or none, and the first writer wins.
            with contextlib.suppress(FileExistsError):
                os.link(draft, self._path(name))
        finally:
            draft.unlink()
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read_kek(path: Path) -> bytes:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        kek = path.read_bytes()
    except FileNotFoundError:
        raise KeyStoreError(f"there is no key-encryption key at {path}: `make up` makes one for development") from None
    if mode & 0o077:
        raise KeyStoreError(f"{path} may be read by others (mode {mode:04o}): set it to 0600")
    if len(kek) != KEY_BYTES:
        raise KeyStoreError(f"{path} holds {len(kek)} bytes, a key-encryption key has {KEY_BYTES}")
    return kek
