"""Detached Ed25519 signatures: keys are counted, never signatures.

A signature of an unknown key, an empty list, or one key under two names never helps to reach a threshold. A threshold
below one is read as one: nothing is trusted for want of a rule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64

_P: Final = 2**255 - 19
_ORDER_8_Y: Final = 2707385501144840649318225287225658788936804267575313519463743609750303402022
"""y of two points of order 8; its negative is that of the other two."""
_SMALL_ORDER_Y: Final = frozenset({0, 1, _P - 1, _ORDER_8_Y, _P - _ORDER_8_Y})


class ThresholdError(ValueError):
    """Too few distinct trusted keys have signed."""

    def __init__(self, found: int, needed: int) -> None:
        super().__init__(f"{found} of the {needed} needed trusted keys have signed")
        self.found = found
        self.needed = needed


def key_id(public_key: bytes) -> str:
    """Lowercase hex SHA-256 of the raw 32-byte public key."""
    return hashlib.sha256(public_key).hexdigest()


def is_usable_key(public_key: bytes) -> bool:
    """Whether the bytes can be a signer's key: a point of small order verifies signatures that nobody made."""
    if len(public_key) != KEY_BYTES:
        return False
    return (int.from_bytes(public_key, "little") & (2**255 - 1)) % _P not in _SMALL_ORDER_Y


def verify(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the key signed exactly these bytes."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not is_usable_key(public_key):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def signers(message: bytes, signatures: Iterable[tuple[str, bytes]], trusted: Iterable[bytes]) -> frozenset[str]:
    """Ids of the *distinct* trusted keys that signed the message; (key id, signature) pairs of others do not count."""
    keys = {key_id(key): key for key in trusted}
    found: set[str] = set()
    for name, signature in signatures:
        if name in keys and name not in found and verify(keys[name], signature, message):
            found.add(name)
    return frozenset(found)


def count_valid(message: bytes, signatures: Iterable[tuple[str, bytes]], trusted: Iterable[bytes]) -> int:
    """Number of distinct trusted keys that signed the message."""
    return len(signers(message, signatures, trusted))


def require_threshold(
    message: bytes, signatures: Iterable[tuple[str, bytes]], trusted: Iterable[bytes], threshold: int
) -> frozenset[str]:
    """Ids of the keys that signed, when they are enough. Raises ThresholdError."""
    found = signers(message, signatures, trusted)
    needed = max(threshold, 1)
    if len(found) < needed:
        raise ThresholdError(len(found), needed)
    return found
