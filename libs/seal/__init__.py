"""Sealed download links: what a rollout leader grants and a gateway checks without asking anyone.

One link is sealed for exactly one digest, so links stay short and each is good for one file. The seal binds device,
attempt, digest, plan, control epoch and expiry; whoever lacks the key can change none of them. A link alone is of no
use: the gateway also asks for the device's own certificate and looks at the plan's control epoch.

Text: base64url without padding of ``version || generation || body || MAC``. The MAC is HMAC-SHA256 cut to 16 bytes over
a domain tag and all before it. Keys are derived from the key store's ``download-mac``, one a day; the generation is the
day, and today's and its neighbours' keys open links, so that a link sealed at midnight still works.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from libs.errors import PermissionDeniedError
from libs.keystore import KeyStore

KEY_NAME: Final = "download-mac"
GENERATION_MS: Final = 24 * 3600 * 1000
MAX_TEXT: Final = 2048
_DOMAIN: Final = b"groundswell.download-grant.v1\0"
_VERSION: Final = 1
_MAC_BYTES: Final = 16
_HEAD: Final = struct.Struct(">BI")
_BODY: Final = struct.Struct(">16s32sQQHH")


@dataclass(frozen=True, slots=True)
class DownloadGrant:
    """Leave for one device to fetch one file."""

    attempt: str
    device_uid: str
    digest: str
    """Lowercase hex SHA-256 of the file."""
    rollout: str
    control_epoch: int
    """Control epoch of the plan when the link was sealed: a pause, abort or kill makes it old."""
    expires_at_ms: int


def generation_at(now_ms: int) -> int:
    """The generation in force: days since the epoch."""
    return now_ms // GENERATION_MS


def generation_key(store: KeyStore, generation: int) -> bytes:
    """Key of one generation."""
    return store.derive(KEY_NAME, "download-grant", str(generation))


def accepted_keys(store: KeyStore, now_ms: int) -> dict[int, bytes]:
    """Keys that open links now: today's, yesterday's, and tomorrow's for a leader whose clock is a little ahead."""
    today = generation_at(now_ms)
    return {generation: generation_key(store, generation) for generation in (today - 1, today, today + 1)}


def seal(key_generation: int, key: bytes, grant: DownloadGrant) -> str:
    """Text of the link's ``{grant}`` part."""
    attempt, rollout = grant.attempt.encode(), grant.rollout.encode()
    body = _BODY.pack(
        uuid.UUID(grant.device_uid).bytes,
        _digest_bytes(grant.digest),
        grant.control_epoch,
        grant.expires_at_ms,
        len(attempt),
        len(rollout),
    )
    signed = _HEAD.pack(_VERSION, key_generation) + body + attempt + rollout
    return base64.urlsafe_b64encode(signed + _mac(key, signed)).rstrip(b"=").decode()


def unseal(keys_by_generation: Mapping[int, bytes], text: str, now_ms: int) -> DownloadGrant:
    """The grant, or ``LINK_INVALID`` / ``LINK_EXPIRED``."""
    raw = _decode(text)
    signed, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
    if len(signed) < _HEAD.size + _BODY.size:
        raise _invalid()
    version, generation = _HEAD.unpack_from(signed)
    key = keys_by_generation.get(generation)
    # Nothing of the body is looked at before the MAC holds.
    if version != _VERSION or key is None or not hmac.compare_digest(_mac(key, signed), mac):
        raise _invalid()
    uid, digest, epoch, expires_at_ms, attempt_size, rollout_size = _BODY.unpack_from(signed, _HEAD.size)
    names = signed[_HEAD.size + _BODY.size :]
    if len(names) != attempt_size + rollout_size:
        raise _invalid()
    if now_ms >= expires_at_ms:
        raise PermissionDeniedError("LINK_EXPIRED", "this download link has expired: check in again for a new one")
    return DownloadGrant(
        attempt=names[:attempt_size].decode(),
        device_uid=str(uuid.UUID(bytes=uid)),
        digest=digest.hex(),
        rollout=names[attempt_size:].decode(),
        control_epoch=epoch,
        expires_at_ms=expires_at_ms,
    )


def _mac(key: bytes, signed: bytes) -> bytes:
    return hmac.digest(key, _DOMAIN + signed, hashlib.sha256)[:_MAC_BYTES]


def _digest_bytes(digest: str) -> bytes:
    raw = bytes.fromhex(digest)
    if len(raw) != 32 or digest != raw.hex():
        raise ValueError("a digest is 64 lowercase hex digits")
    return raw


def _decode(text: str) -> bytes:
    if len(text) > MAX_TEXT:
        raise _invalid()
    try:
        raw = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _invalid() from None
    # One text per grant: spare bits in the last character would otherwise give several.
    if base64.urlsafe_b64encode(raw).rstrip(b"=") != text.encode("ascii"):
        raise _invalid()
    return raw


def _invalid() -> PermissionDeniedError:
    return PermissionDeniedError("LINK_INVALID", "this is not a download link of this installation, or it was changed")
