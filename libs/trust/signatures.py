"""Detached Ed25519 signatures: keys are counted, never signatures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


def key_id(public_key: bytes) -> str:
    """Lowercase hex SHA-256 of the raw 32-byte public key."""
    return hashlib.sha256(public_key).hexdigest()


def verify(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the key signed exactly these bytes."""
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
