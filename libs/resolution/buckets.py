"""Shares that are salted, monotone and stable: 10 % is inside 20 %, for ever.

A device is in a share when the big-endian uint64 of the first 8 bytes of SHA-256(salt ‖ uid) lies below
ppm · 2⁶⁴ / 10⁶; computed with integers, so that two implementations agree on every device. The salt and uid are the 16
bytes of server-made UUIDs. ``vectors.json`` beside this file is published for others.
"""

from __future__ import annotations

import hashlib
import uuid
from typing import Final

PPM: Final = 1_000_000


def bucket(salt: bytes, uid: bytes) -> int:
    """Place of a device on the ring, 0 to 2⁶⁴ less 1."""
    return int.from_bytes(hashlib.sha256(salt + uid).digest()[:8], "big")


def in_share(salt: bytes, uid: bytes, ppm: int) -> bool:
    """Whether the device is in the share; 0 holds none, 1,000,000 all."""
    return bucket(salt, uid) * PPM < ppm << 64


def uid_bytes(text: str) -> bytes:
    """16 bytes of a UUID's text form."""
    return uuid.UUID(text).bytes
